"""Trainable tokens: some rows of an embedding are trained, nothing else.

    W' = W with the rows `token_indices` replaced by the trained ones

Leaves: `trainable_tokens_delta` (tokens, width); the buffer `token_indices` follows from the config. A head that is
tied to the embedding has the rows, too: if the model's config says that it is, a frozen leaf says so at the head, and
checkpoints repeat the rows there, as PEFT's do. Init: the rows as they are: the identity; normal numbers with
`init_weights=False`.
Cost: tokens x width parameters, and a copy of W with other rows a call. Dense form: W'.
It is what `trainable_token_indices` of other configs does, without another adapter.

Source: PEFT. Differs from PEFT: a linear layer that is targeted keeps its bias, and indices are checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from funcadapt.binding import TOKENS
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(AdapterConfig):
    """Config of trainable tokens, with PEFT's fields.

    Attributes:
        token_indices: the rows to train.
        target_modules: names of embeddings, or a regular expression; None for the model's input embedding.
        init_weights: whether the rows start as they are.
    """

    peft_type: str = "TRAINABLE_TOKENS"
    token_indices: Sequence[int] = ()
    target_modules: Sequence[str] | str | None = None
    init_weights: bool = True

    @property
    def trainable_token_indices(self) -> Sequence[int] | Mapping[str, Sequence[int]]:
        """The same in the form of other configs: rows by embedding name."""
        if self.target_modules is None:
            return self.token_indices
        names = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        return dict.fromkeys(names, self.token_indices)

    def for_model(self, model_type: str | None) -> TrainableTokensConfig:
        """There are no defaults by type: the model says which embedding is its input."""
        return self


def init(site: Site, config: TrainableTokensConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """There are no sites."""
    raise SiteError(f"Trainable tokens are rows of an embedding, and no site like {site.path!r}.")


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """There are no sites."""
    return weight, bias


METHOD = register(
    Method(
        name="trainable_tokens",
        config=TrainableTokensConfig,
        kinds=frozenset(),
        keys={},
        rows=TOKENS,
        tied=frozenset({TOKENS}),
        init=init,
        weight=weight,
        view=View("trainable_tokens", "TrainableTokens", "trainable_tokens_"),
    )
)
