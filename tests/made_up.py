"""Tiny folders whose weights are drawn, in place of checkpoints."""

import json
from pathlib import Path
from typing import Any

from methods.recipe import Family
from tests.family import llama_config


def write_random(folder: Path, config: dict[str, Any], holds: str, *, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    draw = json.dumps({"seed": seed, "holds": holds})
    (folder / "random_weights.json").write_text(draw, encoding="utf-8")
    return folder


def write_random_family(root: Path, **changes: object) -> Family:
    """Write a target and a smaller model, each with both heads."""
    large = llama_config(torch_dtype="float32", **changes)
    little = large | {"num_hidden_layers": 4}
    families = []
    for place, config in (("small", little), ("target", large)):
        own = {"num_hidden_layers": 1}
        draft_vocab = {
            "draft_vocab_size": config["vocab_size"] // 2,
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        }
        family = Family(
            target=write_random(root / place, config, "transformer", seed=len(place)),
            heads={
                "eagle2": write_random(root / f"{place}-eagle2", config | own, "eagle2"),
                "eagle3": write_random(
                    root / f"{place}-eagle3", config | own | draft_vocab, "eagle3"
                ),
            },
            small=families[0] if families else None,
        )
        families.append(family)
    return families[1]
