"""The Hub of Hugging Face: files from it, and uploads to it. `huggingface_hub` is imported when it is needed."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import funcadapt


class HubMixin:
    """Uploading, for classes that have `save_pretrained`."""

    if TYPE_CHECKING:
        save_pretrained: Any

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Upload to the Hub what `save_pretrained` writes.

        Args:
            repo_id: the repository; it is made if need be.
            commit_message: the commit's message.
            commit_description: its description.
            private: whether a new repository is private.
            token: the token for the Hub.
            revision: the branch.
            create_pr: whether to open a pull request.
            **kwargs: for `save_pretrained`. `max_shard_size` and `tags`, which only matter to models, are dropped.

        Returns:
            What `HfApi.upload_folder` returns.
        """
        options = {name: value for name, value in kwargs.items() if name not in ("max_shard_size", "tags")}
        api: Any = import_module("huggingface_hub").HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            return api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def hub_arguments() -> Collection[str]:
    """The names of the arguments of `huggingface_hub.hf_hub_download`."""
    return inspect.signature(import_module("huggingface_hub").hf_hub_download).parameters.keys()


def local_or_downloaded(path: str, name: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> str:
    """The path of a file in a directory; if there is none, of the same file of a repository, downloaded.

    Args:
        path: the directory, or the id of the repository.
        name: the file's name.
        subfolder: the folder that it is in.
        kwargs: arguments of `hf_hub_download`, among others.

    Returns:
        The path.

    Raises:
        ValueError: if it is in neither.
    """
    local = os.path.join(path, subfolder or "", name)
    if os.path.isfile(local):
        return local
    try:
        known = {argument: value for argument, value in kwargs.items() if argument in hub_arguments()}
        agent = known.pop("user_agent", f"funcadapt/{funcadapt.__version__}")
        download = import_module("huggingface_hub").hf_hub_download
        return download(path, name, subfolder=subfolder, user_agent=agent, **known)
    except Exception as error:  # the Hub's client has many
        raise ValueError(f"Can't find '{name}' at '{path}'") from error
