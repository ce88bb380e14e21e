"""Tiny draft heads in every form that they are published in, and what they are in EAGLE's terms."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.family import llama_config, random_tensors, write_llama

VOCAB, WIDTH = 96, 128  # of `llama_config`
SPECULATORS = {
    "eagle": {"fc.": "fusion_fc.", "layers.0.": "transformer."},
    "eagle3": {"midlayer.": "layers.0."},
}


@dataclass
class Published:
    """A head as a test made it. config, tensors: EAGLE's. taps: inputs of layers that it reads."""

    target: Path
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    taps: tuple[int, ...]

    @property
    def eagle3(self) -> bool:
        return "midlayer.hidden_norm.weight" in self.tensors


def layer(prefix: str, *, width: int, attention_in: int) -> dict[str, tuple[int, ...]]:
    """Written out from the published files, with `llama_config`'s heads and inner size."""
    return {
        f"{prefix}self_attn.q_proj.weight": (128, attention_in),
        f"{prefix}self_attn.k_proj.weight": (64, attention_in),
        f"{prefix}self_attn.v_proj.weight": (64, attention_in),
        f"{prefix}self_attn.o_proj.weight": (width, 128),
        f"{prefix}mlp.gate_proj.weight": (256, width),
        f"{prefix}mlp.up_proj.weight": (256, width),
        f"{prefix}mlp.down_proj.weight": (width, 256),
        f"{prefix}post_attention_layernorm.weight": (width,),
    }


def eagle2(root: Path, **config: object) -> Published:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (WIDTH, 2 * WIDTH)}
    shapes |= layer("layers.0.", width=WIDTH, attention_in=WIDTH)
    return _published(root, shapes, config, taps=(5,))


def eagle3(
    root: Path, *, width: int = WIDTH, draft_vocab: int = 48, num_taps: int = 3, **config: object
) -> Published:
    shapes = {
        "fc.weight": (width, num_taps * WIDTH),
        "midlayer.input_layernorm.weight": (width,),
        "midlayer.hidden_norm.weight": (width,),
        "norm.weight": (width,),
        "lm_head.weight": (draft_vocab, width),
    } | layer("midlayer.", width=width, attention_in=2 * width)
    config = {"draft_vocab_size": draft_vocab, "hidden_size": width} | config
    # 2, L / 2 and L - 3 of 5 layers would be one layer twice
    config.setdefault("eagle_aux_hidden_state_layer_ids", [1, 2, 4, 0][:num_taps])
    taps = config["eagle_aux_hidden_state_layer_ids"]
    assert isinstance(taps, list)
    head = _published(root, shapes, config, taps=tuple(taps))
    if draft_vocab < VOCAB:
        kept = torch.arange(draft_vocab) * 2
        head.tensors["d2t"] = kept - torch.arange(draft_vocab)
        head.tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, kept, True)
    return head


def target_embedding(head: Published) -> Tensor:
    return load_file(head.target / "model.safetensors")["model.embed_tokens.weight"]


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_pickle(head: Published, **how: bool) -> Published:
    """As the EAGLE authors publish."""
    write_config(head.folder, head.config)
    torch.save(head.tensors, head.folder / "pytorch_model.bin", **how)
    return head


def write_shards(head: Published) -> Published:
    """As `save_pretrained` splits a large pickle."""
    write_config(head.folder, head.config)
    names = sorted(head.tensors)
    place = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(names)}
    for file in set(place.values()):
        torch.save({n: head.tensors[n] for n in names if place[n] == file}, head.folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    path = head.folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    return head


def write_safetensors(head: Published) -> Published:
    write_config(head.folder, head.config)
    save_file(head.tensors, head.folder / "model.safetensors")
    return head


def write_speculators(head: Published) -> Published:
    """As vLLM's speculators saves: the layer's keys apart, and only those that are no defaults."""
    kind = "eagle3" if head.eagle3 else "eagle"
    own = ("draft_vocab_size", "norm_before_residual", "norm_output", "target_hidden_size")
    own += ("eagle_aux_hidden_state_layer_ids",)
    config: dict[str, Any] = {
        "architectures": ["Eagle3Speculator" if head.eagle3 else "EagleSpeculator"],
        "speculators_model_type": kind,
        "speculators_version": "0.3.0",
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "some/target"}},
        "transformer_layer_config": {
            key: value
            for key, value in head.config.items()
            if key not in (*own, "bias") and (key, value) != ("rope_theta", 10000.0)
        },
    } | {key: head.config[key] for key in own if key in head.config}
    if not head.eagle3:
        config |= {"layernorms": False, "fusion_bias": head.config.get("bias", True)}
    write_config(head.folder, config)
    starts = SPECULATORS[kind]
    save_file(
        {_renamed(k, starts): v for k, v in head.tensors.items()}, head.folder / "x.safetensors"
    )
    return head


def with_tensors(head: Published, **tensors: Tensor) -> Published:
    """Add tensors; `__` in a name stands for a dot."""
    head.tensors |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return head


def noise(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def with_copies(head: Published) -> Published:
    return with_tensors(head, embed_tokens__weight=target_embedding(head))


def with_rotation(head: Published) -> Published:
    """As arXiv 2505.22179 publishes: over a target whose final norm was folded away."""
    path = head.target / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(WIDTH)
    save_file(tensors, path)
    return with_tensors(
        head,
        rms_norm_rotation__weight=noise(WIDTH, WIDTH, seed=1),
        embed_tokens__weight=noise(VOCAB, WIDTH, seed=2),
        lm_head__weight=5 * noise(VOCAB, WIDTH, seed=3),
    )


EAGLE2_FORMS: dict[str, Callable[[Path], Published]] = {
    "a pickle without a bias": lambda root: write_pickle(eagle2(root, bias=False)),
    "a pickle whose config is silent on the bias": lambda root: write_pickle(
        with_tensors(eagle2(root), fc__bias=noise(WIDTH))
    ),
    "a pickle from before torch 1.6": lambda root: write_pickle(
        eagle2(root, bias=False), _use_new_zipfile_serialization=False
    ),
    "pickled shards": lambda root: write_shards(eagle2(root, bias=False)),
    "safetensors with a copy of the embedding": lambda root: write_safetensors(
        with_copies(eagle2(root, bias=False))
    ),
    "an embedding of its own": lambda root: write_pickle(
        with_tensors(eagle2(root, bias=False), embed_tokens__weight=noise(VOCAB, WIDTH))
    ),
    "speculators": lambda root: write_speculators(
        with_tensors(eagle2(root, bias=True), fc__bias=noise(WIDTH))
    ),
    "made for a rotated target": lambda root: write_pickle(with_rotation(eagle2(root, bias=False))),
}
EAGLE3_FORMS: dict[str, Callable[[Path], Published]] = {
    "a pickle": lambda root: write_pickle(eagle3(root)),
    "another width than its target's": lambda root: write_pickle(
        with_tensors(
            eagle3(root, width=64, target_hidden_size=WIDTH), embed_tokens__weight=noise(VOCAB, 64)
        )
    ),
    "the whole vocabulary": lambda root: write_safetensors(eagle3(root, draft_vocab=VOCAB)),
    "speculators": lambda root: write_speculators(with_copies(eagle3(root))),
    "speculators with the norm before the residual": lambda root: write_speculators(
        eagle3(root, norm_before_residual=True)
    ),
    "speculators with a normed output": lambda root: write_speculators(
        eagle3(root, norm_output=True)
    ),
    "four streams": lambda root: write_pickle(eagle3(root, num_taps=4)),
}


def _published(
    root: Path,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, object],
    *,
    taps: tuple[int, ...],
) -> Published:
    target = write_llama(root / "target", llama_config(), 1)
    return Published(
        target=target,
        folder=root / "head",
        config=llama_config(num_hidden_layers=1) | config,
        tensors=random_tensors(shapes, 7),
        taps=taps,
    )


def _renamed(name: str, starts: Mapping[str, str]) -> str:
    for old, new in starts.items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return name
