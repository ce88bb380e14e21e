"""A family of tiny checkpoints with random weights, in the published names and shapes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from methods.architecture import read_shape, transformer_shapes
from methods.head_shapes import eagle2_shapes, eagle3_shapes
from methods.recipe import Family

VOCAB = 96


def llama_config(**changes: object) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return config | changes


# What each family's config.json has besides, or in another place's stead, as published.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": 64,
        "max_window_layers": 3,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 3,
    },
}
# Every way to stretch 64 original positions to the 256 of `llama_config`.
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def family_config(family: str, **changes: object) -> dict[str, Any]:
    return llama_config(model_type=family, **FAMILIES[family]) | changes


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, *, scale: float = 1.5
) -> dict[str, Tensor]:
    """Norm weights near 1, biases near 0; matrices of unit gain times `scale`.

    So that logits are decided, and nothing is at a value at which leaving it out would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            made[name] = 0.5 * noise
        elif len(shape) == 1:
            made[name] = 1 + 0.1 * noise
        else:
            made[name] = scale * noise / shape[-1] ** 0.5
    return made


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def write_llama(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """Write a model of any family that Llama's names fit."""
    return write_checkpoint(
        folder, config, random_tensors(transformer_shapes(read_shape(config)), seed)
    )


def write_eagle2(folder: Path, target: dict[str, Any], seed: int) -> Path:
    config = target | {"num_hidden_layers": 1, "bias": False}
    return write_checkpoint(folder, config, random_tensors(eagle2_shapes(read_shape(config)), seed))


def write_eagle3(
    folder: Path, target: dict[str, Any], seed: int, *, draft_vocab: int | None = None
) -> Path:
    vocab = target["vocab_size"]
    draft_vocab = draft_vocab or vocab // 2
    layers = target["num_hidden_layers"]
    config = target | {
        "num_hidden_layers": 1,
        "draft_vocab_size": draft_vocab,
        "eagle_aux_hidden_state_layer_ids": [1, layers // 2, layers - 1],
    }
    shapes = eagle3_shapes(read_shape(config), draft_vocab, taps=3, width=target["hidden_size"])
    tensors = random_tensors(shapes, seed)
    kept = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[:draft_vocab]
    kept = kept.sort().values
    tensors["d2t"] = kept - torch.arange(draft_vocab)
    tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, kept, True)
    return write_checkpoint(folder, config, tensors)


def write_family(root: Path, **changes: object) -> Family:
    """Write a target with both heads, and a smaller model with both heads."""
    large = llama_config(**changes)
    little = large | {"num_hidden_layers": 4, "tie_word_embeddings": True}
    small = Family(
        target=write_llama(root / "small", little, 2),
        heads={
            "eagle2": write_eagle2(root / "small-eagle2", little, 3),
            "eagle3": write_eagle3(root / "small-eagle3", little, 4),
        },
    )
    return Family(
        target=write_llama(root / "target", large, 1),
        heads={
            "eagle2": write_eagle2(root / "target-eagle2", large, 5),
            "eagle3": write_eagle3(root / "target-eagle3", large, 6),
        },
        small=small,
    )
