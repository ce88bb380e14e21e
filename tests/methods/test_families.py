"""Every family under every scaling computes what transformers does, from folders it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from methods.checkpoint import check_transformer
from methods.eagle2 import Eagle2
from methods.eagle3 import Eagle3
from methods.recipe import Family, Recipe
from methods.transformer import Transformer
from methods.vanilla import Vanilla
from quant.dense import Dense
from tests.family import (
    FAMILIES,
    SCALINGS,
    family_config,
    llama_config,
    random_tensors,
    write_eagle2,
    write_eagle3,
    write_llama,
)
from tests.methods.parts import decode, load, make_parts

ORIGINAL, LENGTH = 64, 100  # positions before a scaling; tokens read, within the stretched 256
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 24, "num_attention_heads": 4}
SHARD = "150KB"


def write(folder: Path, config: dict[str, Any], *, shard: str | None = None) -> PreTrainedModel:
    """Let transformers make a model of this config, and write it; give it for comparison."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(random_tensors(shapes, seed=7), strict=False)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model.eval()


def logits_of(oracle: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = oracle(tokens[None]).logits[0]
    return logits


def read(model: Transformer, tokens: torch.Tensor, *, at_once: int) -> torch.Tensor:
    """Logits of tokens read so many at once through the cache. [n] -> [n, V]."""
    kv = model.cache(len(tokens))
    found = []
    for start in range(0, len(tokens), at_once):
        piece = tokens[start : start + at_once]
        positions = torch.arange(start, start + len(piece))
        found.append(model.logits(model(piece[None], positions, kv).hidden[0]))
        kv.advance(len(piece))
    return torch.cat(found)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def random_tokens(n: int) -> torch.Tensor:
    return torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(
    tmp_path: Path, family: str, scaling: str, tied: bool
) -> None:
    config = family_config(
        family, tie_word_embeddings=tied, rope_parameters={"rope_theta": 1e4, **SCALINGS[scaling]}
    )
    oracle = write(tmp_path, config | SMALL, shard=SHARD if tied else None)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not tied
    tokens = random_tokens(LENGTH)
    expected = logits_of(oracle, tokens)
    model = load(tmp_path, Dense(), torch.float32)
    for at_once in (LENGTH, 1):
        found = read(model, tokens, at_once=at_once)
        assert error(found[:ORIGINAL], expected[:ORIGINAL]) < 1e-5
        assert error(found[ORIGINAL:], expected[ORIGINAL:]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_file_may_hold_its_output_only_as_a_copy(tmp_path: Path, family: str) -> None:
    oracle = write(tmp_path, family_config(family, tie_word_embeddings=True) | SMALL)
    path, tokens = tmp_path / "model.safetensors", random_tokens(40)
    tensors = load_file(path)
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, path, metadata={"format": "pt"})
    found = read(load(tmp_path, Dense(), torch.float32), tokens, at_once=40)
    assert error(found, logits_of(oracle, tokens)) < 1e-5
    save_file(tensors | {"lm_head.weight": -copy}, path, metadata={"format": "pt"})
    untied = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert error(logits_of(untied, tokens), -found) < 1e-5  # so the embedding would not do
    with pytest.raises(ValueError, match=r"lm_head\.weight must be absent or equal model\.embed"):
        load(tmp_path, Dense(), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_scaling_would_show(tmp_path: Path, family: str) -> None:
    found = []
    for scaling, rope in SCALINGS.items():
        config = family_config(family, rope_parameters={"rope_theta": 1e4, **rope})
        write(tmp_path / scaling, config | SMALL)
        model = load(tmp_path / scaling, Dense(), torch.float32)
        found.append(read(model, random_tokens(LENGTH), at_once=LENGTH))
    distinct = [logits for name, logits in zip(SCALINGS, found, strict=True) if name != "dynamic"]
    for i, one in enumerate(distinct):
        for other in distinct[:i]:
            assert error(one[ORIGINAL:], other[ORIGINAL:]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_older_spelling_reads_alike(tmp_path: Path, family: str) -> None:
    config = family_config(family, rope_theta=5e5, rope_scaling=dict(SCALINGS["llama3"])) | SMALL
    write(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = random_tokens(LENGTH)
    found = read(load(tmp_path, Dense(), torch.float32), tokens, at_once=LENGTH)
    assert error(found, logits_of(oracle, tokens)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_bias_is_on_all_four_projections(tmp_path: Path, family: str) -> None:
    oracle = write(tmp_path, family_config(family, attention_bias=True) | SMALL)
    tokens = random_tokens(40)
    found = read(load(tmp_path, Dense(), torch.float32), tokens, at_once=40)
    assert error(found, logits_of(oracle, tokens)) < 1e-5


@pytest.mark.parametrize("changes", [{"pretraining_tp": 2}, {"sliding_window": 8}])
def test_keys_that_change_nothing_are_let_pass(tmp_path: Path, changes: dict[str, Any]) -> None:
    oracle = write(tmp_path, llama_config(**changes) | SMALL)
    tokens = random_tokens(40)
    found = read(load(tmp_path, Dense(), torch.float32), tokens, at_once=40)
    assert error(found, logits_of(oracle, tokens)) < 1e-5


SLIDING: dict[str, dict[str, Any]] = {
    "mistral": family_config("mistral", sliding_window=48),
    "qwen2": family_config("qwen2", use_sliding_window=True, sliding_window=48)
    | {"max_window_layers": 1},
    "qwen3": family_config("qwen3", use_sliding_window=True, sliding_window=48)
    | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", SLIDING)
def test_within_a_sliding_window_logits_are_exact(tmp_path: Path, family: str) -> None:
    oracle = write(tmp_path, SLIDING[family] | SMALL)
    most = check_transformer(tmp_path).max_positions
    assert most == 48
    tokens = random_tokens(most + 1)
    expected = logits_of(oracle, tokens)
    found = read(load(tmp_path, Dense(), torch.float32), tokens, at_once=most + 1)
    assert error(found[:most], expected[:most]) < 1e-5
    # One position more, and the window has left a token behind.
    assert error(found[most:], expected[most:]) > 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "most"),
    [
        ("mistral", {"sliding_window": None}, 256),
        ("mistral", {"sliding_window": 1000}, 256),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 48}, 256),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 5}, 256),
        ("qwen3", {"layer_types": ["full_attention"] * 5}, 256),
        # YaRN as Qwen documents it: the original positions stay where they were.
        ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 1024),
        ("qwen3", {"rope_scaling": SCALINGS["yarn"]}, 256),
        ("llama", {"rope_scaling": SCALINGS["dynamic"]}, 256),
    ],
)
def test_positions_end_where_exactness_does(
    tmp_path: Path, family: str, changes: dict[str, Any], most: int
) -> None:
    folder = write_llama(tmp_path, family_config(family, **changes), seed=1)
    assert check_transformer(folder).max_positions == most


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"layer_types": ["chunked_attention"] * 5}, r"layer_types must be .*chunked"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 5}, r"where use_sliding_window is true"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = write_llama(tmp_path, family_config(family), seed=1)
    (folder / "config.json").write_text(json.dumps(family_config(family, **changes)), "utf-8")
    with pytest.raises(ValueError, match=message):
        check_transformer(folder)


@pytest.mark.parametrize(
    ("family", "key"),
    [("mistral", "sliding_window"), ("qwen2", "num_key_value_heads"), ("qwen3", "head_dim")],
)
def test_a_key_with_a_default_of_the_familys_own_must_be_there(
    tmp_path: Path, family: str, key: str
) -> None:
    folder = write_llama(tmp_path, family_config(family), seed=1)
    config = {k: v for k, v in family_config(family).items() if k != key}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=f"config.json must have '{key}'"):
        check_transformer(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
    ],
)
def test_a_familys_own_tensors_are_required(tmp_path: Path, family: str, name: str) -> None:
    folder = write_llama(tmp_path, family_config(family), seed=1)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing {name}, superfluous none"):
        check_transformer(folder)


def test_weight_bytes_count_biases_and_head_norms(tmp_path: Path) -> None:
    plain, biased, normed = (
        load(write_llama(tmp_path / name, family_config(name), seed=1), Dense(), torch.float32)
        for name in ("llama", "qwen2", "qwen3")
    )
    assert biased.weight_bytes - plain.weight_bytes == 5 * 4 * (4 + 2 + 2) * 32
    # A row for each of the 4 query and 2 key heads.
    assert normed.weight_bytes - plain.weight_bytes == 5 * 4 * (4 + 2) * 32


@pytest.mark.parametrize(
    ("family", "recipe", "heads"),
    [
        ("qwen2", Eagle2, "llama"),
        ("qwen2", Eagle3, "qwen2"),
        ("qwen3", Eagle2, "qwen3"),
        ("qwen3", Eagle3, "llama"),
    ],
)
def test_trees_over_a_familys_target_give_plain_decodings_tokens(
    tmp_path: Path, family: str, recipe: type[Eagle2] | type[Eagle3], heads: str
) -> None:
    config, head = family_config(family), family_config(heads)
    made = Family(
        target=write_llama(tmp_path / "target", config, seed=1),
        heads={
            "eagle2": write_eagle2(tmp_path / "eagle2", head, 2),
            "eagle3": write_eagle3(tmp_path / "eagle3", head, 3),
        },
    )
    drafts: Recipe = recipe(depth=4, top_k=4, nodes=16)
    drafts.check(made)
    parts = make_parts(made)
    prompt = [0, 5, 17, 23, 42, 8]
    assert decode(drafts, parts, prompt) == decode(Vanilla(), parts, prompt)
