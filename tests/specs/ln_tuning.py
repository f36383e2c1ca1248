"""LN tuning: modules in full, so there are no layers to put under the laws; see `tests/methods/test_ln_tuning.py`."""

from __future__ import annotations

from specs import Parity, Spec

SPECS = {
    "ln_tuning": Spec(
        [],
        parity={
            "default": Parity({}, ("llama", "gpt2")),
            "saved": Parity(
                {"target_modules": ["ln_1"], "modules_to_save": ["ln_f"]},
                ("gpt2",),
                merged=False,  # PEFT's unloaded model still has the wrapper around ln_f
            ),
            "linear": Parity({"target_modules": ["v_proj", "norm"]}, ("llama",)),
        },
    )
}
