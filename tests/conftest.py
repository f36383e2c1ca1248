"""What all tests share: one thread of torch, a fixed seed, and tiny models that are built once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

torch.set_num_threads(1)

# torch's table of forward-mode rules calls torch.jit.script when it is first needed, which torch itself deprecates.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def _frequent_switches() -> Iterator[None]:
    """Threads change hands as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    """A frozen tiny Llama in eval mode. Tests that change it must put it back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=39,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[1, 5, 9, 2], [7, 3, 3, 11]])
