import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.config import Config, parse, resolve
from bench.load import Loader
from bench.memory import available, misfit, needed, packed_bytes
from quant.dense import Dense
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from tests.bench.tiny import composed, write_world

GIB = 2**30
# Keys and values of a token in float32: 5 layers, 2 key-value heads of 32.
TARGET_TOKEN = 2 * 5 * 2 * 32 * 4
# Behind the gate, of a token: 256 inside thrice, four streams of 128.
ACTIVATIONS = (3 * 256 + 4 * 128) * 4


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    return write_world(tmp_path)


def config_of(world: list[str], *overrides: str) -> Config:
    return parse(resolve(composed(*world, *overrides)))


@pytest.mark.parametrize("quant", ["dense", "w8a8", "w4a16", "w4a16_asym", "w4a8_qoq_g128", "fp8"])
@pytest.mark.parametrize("lm_head", ["checkpoint", "w8a8"])
def test_weights_take_what_the_loaded_model_holds(
    world: list[str], quant: str, lm_head: str
) -> None:
    config = config_of(world, f"quant={quant}", f"quant.lm_head={lm_head}")
    target = Loader(config).target
    held = target.weight_bytes + target.embedding.nbytes
    assert needed(config, [], 256).weights == held


def test_caches_take_what_the_loaded_model_reserves_for_a_token(world: list[str]) -> None:
    config = config_of(world)
    need = needed(config, [], positions=256)
    assert need.per_token == TARGET_TOKEN == Loader(config).target.cache(8).bytes_per_token
    assert need.total == need.weights + 256 * (TARGET_TOKEN + ACTIVATIONS)
    shorter = needed(config_of(world, "context=100"), [], positions=256)
    assert shorter.total == need.weights + 100 * (TARGET_TOKEN + ACTIVATIONS)


def test_a_prompt_is_read_in_chunks_and_a_weight_may_be_opened_whole(world: list[str]) -> None:
    long = needed(config_of(world, "context=null"), [], positions=5000)
    assert (long.context, long.workspace) == (5000, 1024 * ACTIVATIONS)
    opened = needed(config_of(world, "quant=w4a16"), [], positions=5000)
    assert opened.workspace == 1024 * ACTIVATIONS + 2 * 256 * 128 * 4  # gate and up


def test_a_costed_context_is_read_at_once_by_every_row_of_a_batch(world: list[str]) -> None:
    words = ("cost.contexts=[100]", "cost.widths=[1,9]", "cost.batches=[1,3]", "+cost.repeats=15")
    config = parse(resolve(composed(*world, *words[:3], door="cost")))
    need = needed(config, [], positions=256)
    assert (need.context, need.workspace) == (3 * 109, 300 * ACTIVATIONS)
    have = need.weights + 300 * ACTIVATIONS + 3 * (80 + 9) * TARGET_TOKEN
    assert misfit(config, [], 256, have=have).endswith(": cost.contexts=[80] fits")


@pytest.mark.parametrize(("name", "taps"), [("eagle2", 1), ("eagle3", 3)])
def test_a_head_takes_its_own_cache_and_the_features_it_reads(
    world: list[str], name: str, taps: int
) -> None:
    plain = needed(config_of(world), [], 256)
    config = config_of(world, f"method={name}")
    need = needed(config, config.recipe.folders(config.model.family), 256)
    method = Loader(config).method(config)
    assert method.features.shape[1] == taps * 128
    own = method.drafter.kv.bytes_per_token  # type: ignore[attr-defined]
    assert need.per_token == plain.per_token + own + taps * 128 * 4


def test_what_a_method_reads_is_counted_in_the_drafters_schemes(world: list[str]) -> None:
    plain = needed(config_of(world), [], 256)
    for scheme, per_weight in (("dense", 4), ("w8a8", 1)):
        config = config_of(world, "method=eagle2", f"method.draft_scheme={scheme}")
        folders = config.recipe.folders(config.model.family)
        head = needed(config, folders, 256).weights - plain.weights
        # fc, q, k, v, o, gate, up, down of 128 wide, 256 inside, 128 + 2 x 64 attended
        weights = 256 * 128 + 128 * (128 + 64 + 64) + 128 * 128 + 3 * 128 * 256
        assert per_weight * weights <= head < 1.1 * per_weight * weights
    chain = config_of(world, "method=chain")
    need = needed(chain, chain.recipe.folders(chain.model.family), 256)
    assert need.per_token == TARGET_TOKEN + TARGET_TOKEN * 4 // 5


def test_a_slice_shows_what_the_whole_takes() -> None:
    weight = torch.randn(256, 384)
    for scheme in (
        Dense(),
        W8A8(smooth_alpha=0.5),
        W4A16(group_size=128, symmetric=False, range_search=True),
    ):
        absmax = torch.ones(384) if scheme.needs_absmax else None
        whole = sum(t.nbytes for t in scheme.pack(weight, absmax).values())
        assert packed_bytes(scheme, 256, 384, torch.float32) == whole


def test_what_fits_and_what_nobody_knows_is_no_problem(world: list[str]) -> None:
    config = config_of(world)
    total = needed(config, [], 256).total
    assert misfit(config, [], 256, have=total) == ""
    assert misfit(config, [], 256, have=None) == ""


def test_a_context_that_fits_is_offered(world: list[str]) -> None:
    config = config_of(world, "task.max_new_tokens=10")
    need = needed(config, [], 256)
    have = need.weights + need.workspace + 40 * TARGET_TOKEN + 3
    refused = misfit(config, [], 256, have=have)
    assert refused.startswith("memory: 0.00 GiB are needed at least, ")
    assert refused.endswith(f"cpu has {have / GIB:.2f} GiB: context=40 fits")
    assert "\n" not in refused
    fitting = config_of(world, "task.max_new_tokens=10", "context=40")
    assert misfit(fitting, [], 256, have=have) == ""


def test_the_largest_scheme_that_fits_is_offered(world: list[str]) -> None:
    config = config_of(world)
    w8a8 = needed(config_of(world, "quant=w8a8"), [], 256).total
    fp8 = needed(config_of(world, "quant=fp8"), [], 256).total
    have = max(w8a8, fp8)
    assert have < needed(config, [], 256).weights
    refused = misfit(config, [], 256, have=have)
    offered = refused.partition("quant=")[2].partition(" ")[0]
    assert needed(config_of(world, f"quant={offered}"), [], 256).total <= have


def test_what_drafts_is_offered_in_a_smaller_scheme_before_the_target_is(world: list[str]) -> None:
    config = config_of(world, "method=chain")
    folders = config.recipe.folders(config.model.family)
    w8a8 = needed(config_of(world, "method=chain", "method.draft_scheme=w8a8"), folders, 256)
    refused = misfit(config, folders, 256, have=w8a8.total)
    assert "method.draft_scheme=" in refused
    assert refused.endswith(f"fits with {w8a8.total / GIB:.2f} GiB")


def test_a_smaller_model_is_offered_where_no_scheme_fits() -> None:
    words = ("model=llama3_70b", "task=random", "dtype=float16", "context=1024")
    config = parse(resolve(composed(*words)))
    refused = misfit(config, [], 1024, have=20 * GIB)
    assert refused.endswith("cpu has 20.00 GiB: model=qwen3_8b_random fits with 15.50 GiB")
    assert refused.startswith("memory: 131.96 GiB are needed at least, 131.42 GiB of weights, ")
    assert misfit(config, [], 1024, have=100 * GIB).count("quant=") == 1


def test_nothing_fits_into_nothing(world: list[str]) -> None:
    assert misfit(config_of(world), [], 256, have=1000).endswith("nothing here fits")


def test_a_folder_that_says_null_of_its_quantisation_is_dense(world: list[str]) -> None:
    config = config_of(world)
    fp8 = needed(config_of(world, "quant=fp8"), [], 256)
    path = config.model.family.target / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": None}
    path.write_text(json.dumps(values), encoding="utf-8")
    assert needed(config_of(world, "quant=fp8"), [], 256) == fp8
    assert "quant=" in misfit(config, [], 256, have=needed(config, [], 256).weights - 1)


def test_a_folder_that_is_quantised_by_its_names_alone_takes_what_it_stores(
    world: list[str],
) -> None:
    """DeepCompressor's form: int8 codes and a scale for each row, and no quantization_config."""
    config = config_of(world, "quant=checkpoint", "quant.lm_head=checkpoint")
    folder = config.model.family.target
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = (tensors[name].abs().amax(1) / 127).half()
        codes = (tensors[name] / scale.float().unsqueeze(1)).round().clamp(-127, 127)
        tensors |= {name: codes.to(torch.int8), name.replace("weight", "dequant_scale"): scale}
    save_file(tensors, folder / "model.safetensors")
    stored = sum(tensor.nbytes for tensor in tensors.values())
    need = needed(config, [], 256)
    assert need.weights == stored
    assert misfit(config, [], 256, have=stored - 1).endswith("nothing here fits")


def test_the_machine_says_how_much_memory_is_free() -> None:
    have = available("cpu")
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    total = 1024 * int(text.partition("MemTotal:")[2].split()[0])
    assert have is not None
    assert 0 < have <= total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["vanilla", "eagle2", "chain"])
def test_no_more_is_asked_for_than_is_taken(world: list[str], method: str) -> None:
    config = config_of(world, "device=cuda", "dtype=float16", f"method={method}")
    need = needed(config, config.recipe.folders(config.model.family), 256)
    loader = Loader(config)
    torch.cuda.reset_peak_memory_stats()
    made = loader.method(config)
    made.prefill([1] * 256)
    taken = torch.cuda.max_memory_allocated()
    assert need.weights + need.caches < need.total <= taken
