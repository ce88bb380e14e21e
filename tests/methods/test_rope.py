"""Frequencies and attention factors are those that transformers computes from the same config."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from methods.rope import Rope, read_rope
from tests.family import SCALINGS

HEAD_DIM = 128
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# As published by Llama 3.1 (factor 8) and 3.2 (32), Qwen 2.5 and 3, and with every optional key.
PUBLISHED: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3.1": SCALINGS["llama3"] | {"factor": 8.0, "original_max_position_embeddings": 8192},
    "llama3.2": SCALINGS["llama3"] | {"factor": 32.0, "original_max_position_embeddings": 8192},
    "llama3 of the whole": {
        k: v for k, v in SCALINGS["llama3"].items() if k != "original_max_position_embeddings"
    },
    "yarn": YARN,
    "yarn of the whole": {"rope_type": "yarn", "factor": 4.0},
    "yarn, factor implied": YARN | {"factor": None},
    "yarn, betas": YARN | {"beta_fast": 16, "beta_slow": 2.5},
    "yarn, betas null": YARN | {"beta_fast": None, "beta_slow": None},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, attention": YARN | {"attention_factor": 1.25},
    "yarn, attention 1": YARN | {"attention_factor": 1.0},
    "yarn, mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn, one mscale": YARN | {"mscale": 0.707},
    "yarn, the other mscale": YARN | {"mscale_all_dim": 0.5},
    "yarn, no stretch": YARN | {"factor": 1.0},
    "yarn, a short original": YARN | {"original_max_position_embeddings": 6},
    "yarn, a blend past the end": YARN
    | {"rope_theta": 1e4, "original_max_position_embeddings": 131072},
    "yarn, a step": YARN
    | {"truncate": False, "beta_fast": 1, "beta_slow": 1, "original_max_position_embeddings": 2048},
}


def config_of(spelling: str, rope: dict[str, Any], **changes: object) -> dict[str, Any]:
    """A config.json in one of its spellings; the oldest also says `type`."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 4 * HEAD_DIM,
        "num_attention_heads": 4,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 131072,
    }
    if spelling == "new":
        return config | {"rope_parameters": {"rope_theta": 1e6, **rope}} | changes
    if spelling == "oldest":
        rope = {"type" if k == "rope_type" else k: v for k, v in rope.items()}
    return config | {"rope_theta": 1e6, "rope_scaling": rope} | changes


def require_equal(config: dict[str, Any]) -> Rope:
    # transformers completes the dictionaries that it is given.
    oracle = LlamaRotaryEmbedding(LlamaConfig(**deepcopy(config)))
    rope = read_rope(config)
    found = rope.frequencies(HEAD_DIM, torch.device("cpu"))
    torch.testing.assert_close(found, oracle.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 2047])
    cos, sin = rope.angles(positions, HEAD_DIM, torch.float32)
    expected = oracle(torch.zeros(1), positions[None])
    # In float32 an angle of 2047 rad is known to 2047 * 2**-24.
    torch.testing.assert_close((cos, sin), (expected[0][0], expected[1][0]), rtol=0, atol=5e-4)
    # Position 0 has angle 0: its cosine is the attention factor itself.
    torch.testing.assert_close(cos[0], torch.full((HEAD_DIM,), oracle.attention_scaling))
    return rope


@pytest.mark.parametrize("spelling", ["new", "old", "oldest"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_and_factor_are_those_of_transformers(name: str, spelling: str) -> None:
    require_equal(config_of(spelling, dict(PUBLISHED[name])))


def test_scalings_are_told_apart() -> None:
    names = ("plain", "linear", "llama3.1", "llama3.2", "yarn", "yarn, betas", "yarn, mscale")
    found = [require_equal(config_of("new", dict(PUBLISHED[name]))) for name in names]
    far = torch.arange(0, 131072, 1000)
    angles = [torch.cat(rope.angles(far, HEAD_DIM, torch.float32)) for rope in found]
    for i, one in enumerate(angles):
        for other in angles[:i]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("scaling", [None, {}])
def test_no_scaling_is_the_plain_one(scaling: dict[str, Any] | None) -> None:
    rope = require_equal(config_of("old", {}) | {"rope_scaling": scaling})
    assert rope == Rope(theta=1e6)


def test_no_theta_is_that_of_llama() -> None:
    config = config_of("new", {}) | {"rope_parameters": None}
    assert require_equal(config).theta == 10000


def test_the_older_spelling_goes_first_where_both_stand() -> None:
    config = config_of("old", dict(PUBLISHED["linear"]), rope_parameters=dict(YARN))
    assert (
        require_equal(config).scaling
        == require_equal(config_of("old", dict(PUBLISHED["linear"]))).scaling
    )


def test_original_positions_beside_the_scaling_go_first() -> None:
    config = config_of("new", dict(YARN), original_max_position_embeddings=4096)
    require_equal(config)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "rope type must be one of .*got 'longrope'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "factor must be 1, got 0.5"),
        ({"rope_type": "linear"}, "factor must be a finite number above 0, got None"),
        ({"rope_type": "yarn", "factor": "4"}, "factor must be a finite number above 0, got '4'"),
        (SCALINGS["llama3"] | {"high_freq_factor": 1.0}, "high_freq_factor must be above .*=1.0"),
        ({"full_attention": {"rope_type": "default"}}, "must be the same for all layers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read_rope(config_of("new", rope))
