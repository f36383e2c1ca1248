"""Trainable tokens: rows of embeddings, so there are no layers to put under the laws."""

from __future__ import annotations

from peft_tools import tokens

from specs import Parity, Spec

ROWS = tokens("llama")["input_ids"][0, :3].unique().tolist()
SPECS = {
    "trainable_tokens": Spec(
        [],
        parity={
            "default": Parity({"token_indices": ROWS}, ("llama",)),
            "tied": Parity({"token_indices": ROWS}, ("llama_tied", "gpt2")),
            "named": Parity({"token_indices": ROWS, "target_modules": ["embed_tokens"]}, ("llama",)),
        },
    )
}
