"""Tiny models, tokenizers and data that need no hub, the same in both processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def llama(seed: int = 0, **changes: Any) -> Any:
    """A two-layer Llama, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def bert(kind: str = "BertModel", **changes: Any) -> Any:
    """A two-layer BERT with a head of some kind."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **changes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, kind)(config).eval()


def t5() -> Any:
    """A one-layer T5."""
    import transformers

    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config).eval()


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def pipeline() -> Any:
    """Stable Diffusion, tiny; it takes embedded prompts."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=32
    )
    pipe = StableDiffusionPipeline(
        vae, CLIPTextModel(text).eval(), None, unet(), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class MLP(nn.Module):
    """The custom model of PEFT's documentation, with a normalisation and a convolution as timm's models have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.seq = nn.Sequential(
            nn.Linear(20, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(self.conv(x[:, None])[:, 0]).log_softmax(-1)


def mlp() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP()


def tokenizer() -> Any:
    """A tokenizer of letters with spaces between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.padding_side = "left"
    return made


def ids(rows: int = 2, columns: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(3, 19, (rows, columns), generator=torch.Generator().manual_seed(seed))


def sentences(count: int, seed: int = 0, length: int = 8) -> list[str]:
    """Sentences whose letters go up by one, which can be learned."""
    starts = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[(s + i) % len(WORDS)] for i in range(length)) for s in starts]


def noise(model: nn.Module, part: str = "", seed: int = 0) -> Any:
    """Noise in every parameter that is trained, or has `part` in its name, by name and not by order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad if not part else part in name:
                key = sum(ord(c) * (i + 1) for i, c in enumerate(name)) + seed
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key))
                parameter.add_(0.2 * drawn.to(parameter.dtype))
    return model


@torch.no_grad()
def out(model: Any, rows: Tensor | None = None, **kwargs: Any) -> Tensor:
    return model(input_ids=ids() if rows is None else rows, **kwargs)[0]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def names(folder: Path) -> list[str]:
    """Every file below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def adapter(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says: its tensors, and its config with lists that are sets sorted."""
    import json

    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(set(config[key]))
    if config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = Path(config["base_model_name_or_path"]).name
    return {"config": config, "tensors": load_file(folder / "adapter_model.safetensors")}
