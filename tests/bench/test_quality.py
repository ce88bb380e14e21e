"""`specquant quality` from the command line's words to records, against transformers."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from bench import quality, quality_cell
from bench.block import Arm, read_status
from bench.child import ArmJob, Child, Job
from bench.config import parse
from bench.likelihood import Reader, score
from bench.load import Loader
from bench.plan import Planner
from bench.record import Quality, read_lines, write_lines
from bench.text import Window, windows
from tests.bench.tiny import composed, write_tokenizer, write_world
from tests.family import VOCAB
from tests.methods.test_stored import write_native

LENGTH, WINDOW, STRIDE = 150, 32, 12
WORDS = (f"quality.window={WINDOW}", f"quality.stride={STRIDE}", "threads=1")
NAMES = {"model": "lab", "method": "vanilla", "task": "perplexity"}
TEXT = "".join(random.Random(3).choices([chr(ord("!") + i) for i in range(VOCAB - 3)], k=LENGTH))
TOKENS = [ord(character) - ord("!") for character in TEXT]  # by the tiny tokenizer's definition

Door = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("world")
    words = [word for word in write_world(root) if not word.startswith("task.path")]
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return [*words, f"task.path={root / 'text.txt'}"]


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Door:
    """`specquant quality` in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["specquant quality", *arguments])
        code = quality.main()
        told = capfd.readouterr()
        return code, told.out, told.err

    return call


def place(world: Sequence[str], key: str) -> Path:
    (found,) = [word.partition("=")[2] for word in world if word.startswith(f"{key}=")]
    return Path(found)


def planned(world: Sequence[str], *words: str, quant: str = "dense") -> Planner:
    planner = Planner(quality.CHILD)
    config = composed(*world, *WORDS, f"quant={quant}", *words, door="quality")
    planner.add(config, names=NAMES | {"quant": quant}, overrides=[*WORDS, *words])
    return planner


def arm_of(world: Sequence[str], *words: str, quant: str = "dense") -> Arm:
    (block,) = planned(world, *words, quant=quant).blocks()
    (arm,) = block.arms
    return arm


def measured(world: Sequence[str], folder: Path, *words: str, quant: str = "dense") -> Path:
    """Run a cell's child in this process; give the folder of its records."""
    arm = arm_of([*world, f"results_dir={folder}"], *words, quant=quant)
    arm.folder.mkdir(parents=True, exist_ok=True)
    job = ArmJob(folder=str(arm.folder), label="vanilla", config=arm.config)
    child = Child(Job(name="b", arms=[job], baseline="", argv=["x"], progress=False), folder)
    quality_cell.work(child)
    status = read_status(arm.folder)
    assert status is not None
    assert status.state == "done"
    return arm.folder


def records(cell: Path) -> list[Quality]:
    return [Quality.parse(values) for values in read_lines(cell / "records.jsonl")]


@torch.no_grad()
def strided(model: LlamaForCausalLM) -> list[Tensor]:
    """Log-probabilities of every window's scored tokens, as the usual strided loop has them."""
    found, scored_to = [], 1
    for begin in range(0, LENGTH, STRIDE):
        end = min(begin + WINDOW, LENGTH)
        logits = model(torch.tensor([TOKENS[begin:end]])).logits[0]
        found.append(logits[scored_to - begin - 1 : -1].log_softmax(-1))
        scored_to = end
        if end == LENGTH:
            return found
    raise AssertionError


def oracle(world: Sequence[str]) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(place(world, "model.target"), dtype=torch.float32)


def oracle_in_scheme(world: Sequence[str], quant: str) -> LlamaForCausalLM:
    """The oracle with every weight replaced by what the scheme's layer says it holds."""
    model = oracle(world)
    layers = Loader(parse(arm_of(world, quant=quant).config)).target.linears
    for i, block in enumerate(model.model.layers):
        own = block.self_attn
        parts = {
            f"blocks.{i}.attention.qkv": [own.q_proj, own.k_proj, own.v_proj],
            f"blocks.{i}.attention.out": [own.o_proj],
            f"blocks.{i}.mlp.gate_up": [block.mlp.gate_proj, block.mlp.up_proj],
            f"blocks.{i}.mlp.down": [block.mlp.down_proj],
        }
        for name, linears in parts.items():
            sizes = [linear.out_features for linear in linears]
            stored = layers[name].dequantize().split(sizes)
            for linear, weight in zip(linears, stored, strict=True):
                linear.weight.data.copy_(weight)
    return model


def labels(rows: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.tensor(TOKENS[1:]).split([len(part) for part in rows]))


@pytest.mark.parametrize("quant", ["dense", "w4a16"])
def test_likelihood_is_that_of_transformers(world: list[str], tmp_path: Path, quant: str) -> None:
    expected = strided(oracle_in_scheme(world, quant))
    found = records(measured(world, tmp_path, quant=quant))
    nll = [
        float(F.nll_loss(p, t, reduction="sum"))
        for p, t in zip(expected, labels(expected), strict=True)
    ]
    assert [r.nll_nats for r in found] == pytest.approx(nll, rel=1e-5)
    assert sum(r.tokens for r in found) == LENGTH - 1


def test_divergence_is_torchs_between_two_oracles(world: list[str], tmp_path: Path) -> None:
    dense, packed = strided(oracle(world)), strided(oracle_in_scheme(world, "w4a16"))
    found = records(measured(world, tmp_path, quant="w4a16"))
    pairs = list(zip(packed, dense, strict=True))
    kl = [float(F.kl_div(q, p, log_target=True, reduction="sum")) for q, p in pairs]
    assert min(kl) > 0.01
    assert [r.kl_nats for r in found] == pytest.approx(kl, rel=1e-4)
    agreeing = [int((q.argmax(-1) == p.argmax(-1)).sum()) for q, p in pairs]
    assert [r.top1_agree for r in found] == agreeing


def test_dense_diverges_from_itself_by_exactly_nothing(world: list[str], tmp_path: Path) -> None:
    for record in records(measured(world, tmp_path)):
        assert (record.kl_nats, record.top1_agree) == (0.0, record.tokens)


def test_a_dense_target_is_loaded_once(world: list[str]) -> None:
    target = place(world, "model.target")
    loader = Loader(parse(arm_of(world).config))
    assert loader.dense(target) is loader.target
    loader = Loader(parse(arm_of(world, "quant.lm_head=w8a8").config))
    assert loader.dense(target) is not loader.target


def test_a_folder_stored_quantised_is_held_against_its_dense_one(
    world: list[str], tmp_path: Path
) -> None:
    dense = place(world, "model.target")
    scheme = parse(arm_of(world, quant="w4a16").config).schemes.target
    stored = write_native(dense, tmp_path / "stored", scheme)
    write_tokenizer(stored)
    words = [f"quality.reference={dense}", f"model.target={stored}"]
    found = records(measured(world, tmp_path / "a", *words, quant="checkpoint"))
    packed = records(measured(world, tmp_path / "b", quant="w4a16"))
    assert [(r.kl_nats, r.nll_nats) for r in found] == [(r.kl_nats, r.nll_nats) for r in packed]
    refused = refusal(world, f"model.target={stored}", "quant=checkpoint")
    assert refused == (
        "quality.reference must be the folder of the dense model that the target was quantised "
        f"from, or quality.kl false, got null: {stored} holds w4a16-g128"
    )


def test_dense_diverges_from_a_copy_by_exactly_nothing(world: list[str], tmp_path: Path) -> None:
    copy = shutil.copytree(place(world, "model.target"), tmp_path / "copy")
    for record in records(measured(world, tmp_path, f"quality.reference={copy}")):
        assert (record.kl_nats, record.top1_agree) == (0.0, record.tokens)


def test_a_reference_is_what_the_target_is_held_against(world: list[str], tmp_path: Path) -> None:
    # Held against the smaller model, a dense target diverges.
    small = place(world, "model.small.target")
    found = records(measured(world, tmp_path, f"quality.reference={small}"))
    other = LlamaForCausalLM.from_pretrained(small, dtype=torch.float32)
    pairs = zip(strided(oracle(world)), strided(other), strict=True)
    kl = [float(F.kl_div(q, p, log_target=True, reduction="sum")) for q, p in pairs]
    assert [r.kl_nats for r in found] == pytest.approx(kl, rel=1e-4)


def test_without_kl_no_dense_model_is_read(world: list[str], tmp_path: Path) -> None:
    found = records(measured(world, tmp_path, "quality.kl=false", quant="w4a16"))
    assert {(r.kl_nats, r.top1_agree) for r in found} == {(None, None)}


def test_small_chunks_of_logits_give_the_same_sums(world: list[str]) -> None:
    loader = Loader(parse(arm_of(world, quant="w4a16").config))
    target = Reader(loader.target, window=WINDOW)
    dense = Reader(loader.dense(place(world, "model.target")), window=WINDOW)
    window = Window(number=1, start=12, first=32, end=44)
    whole = score(window, TOKENS, target, dense)
    parts = score(window, TOKENS, target, dense, chunk_logits=5 * VOCAB)
    assert parts.nll_nats == pytest.approx(whole.nll_nats, rel=1e-6)
    assert parts.kl_nats == pytest.approx(whole.kl_nats, rel=1e-6)
    assert (parts.tokens, parts.top1_agree) == (whole.tokens, whole.top1_agree)


def test_logits_that_are_no_numbers_are_no_likelihood(world: list[str]) -> None:
    loader = Loader(parse(arm_of(world).config))
    loader.target.embedding[TOKENS[3]] = float("nan")
    (window, *_) = windows(LENGTH, parse(arm_of(world).config).quality)
    with pytest.raises(FloatingPointError, match="window 0 must have finite logits"):
        score(window, TOKENS, Reader(loader.target, window=WINDOW), None)


def test_a_resumed_cell_scores_what_is_missing(world: list[str], tmp_path: Path) -> None:
    cell = measured(world, tmp_path, quant="w4a16")
    whole = records(cell)
    marked = replace(whole[0], nll_nats=-1.0)  # would not survive being scored again
    write_lines(cell / "records.jsonl", [marked, whole[2]])
    with (cell / "records.jsonl").open("a") as file:
        file.write('{"schema":1,"win')
    resumed = records(measured(world, tmp_path, quant="w4a16"))
    assert resumed[:2] == [marked, whole[2]]
    assert sorted(r.window for r in resumed) == [r.window for r in whole]
    assert resumed[2:] == [r for r in whole if r.window not in (0, 2)]


def test_a_cell_is_the_targets_own_whatever_the_method(world: list[str], door: Door) -> None:
    line = (*world, *WORDS, "-m", "quant=dense,w4a16", "method=vanilla,eagle2,chain")
    code, out, _ = door(*line)
    end = f"{WORDS[1]}.{WORDS[0]}.{WORDS[2]}"  # overrides in the order of their names
    names = [f"lab.{quant}.vanilla.perplexity.{end}" for quant in ("dense", "w4a16")]
    assert code == 0
    assert out.splitlines()[:-1] == [f"{name}: done" for name in names]
    code, out, _ = door(*line)
    assert out.splitlines()[:-1] == [f"{name}: finished, skipped" for name in names]


def test_a_cell_says_its_door_and_its_text(world: list[str]) -> None:
    cell = arm_of(world, quant="w4a16").cell
    assert (cell.door, cell.task, cell.scheme) == ("quality", "perplexity", "w4a16-g128")


def test_another_text_makes_a_cell_stale(world: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT, encoding="utf-8")
    moved = [w for w in world if not w.startswith("task.path")] + [f"task.path={other}"]
    before = arm_of(world).cell.config_hash
    assert arm_of(moved).cell.config_hash == before
    other.write_text(TEXT[:-1], encoding="utf-8")
    assert arm_of(moved).cell.config_hash != before


def test_a_reference_elsewhere_is_the_same_cell(world: list[str], tmp_path: Path) -> None:
    copy = shutil.copytree(place(world, "model.target"), tmp_path / "copy")
    there = arm_of(world, f"quality.reference={copy}")
    assert there.folder == arm_of(world).folder
    assert any("copy/model.safetensors" in name for name in there.cell.weight_hashes)


def refusal(world: Sequence[str], *words: str) -> str:
    with pytest.raises(ValueError) as refused:
        planned(world, *words).blocks()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("quality.stride=32", "quality: stride must be below window=32, got 32"),
        (
            "quality.window=257",
            "quality.window must be within the model's 256 positions, got 257",
        ),
        ("quality.window=wide", "quality.window: Value 'wide' of type 'str'"),
        ("task.path=none.txt", "task perplexity: path must be a file, got "),
        ("task.path=README.md", "a task's path must end in .jsonl, .jsonl.gz, .parquet or .txt"),
        ("quality.reference=none", "quality.reference must be a dense checkpoint, or "),
        ("task=gsm8k", "task must be a running text, such as perplexity, got gsm8k"),
    ],
)
def test_what_cannot_be_measured_is_refused(world: list[str], word: str, message: str) -> None:
    assert refusal(world, word).startswith(message)


def test_a_text_of_one_token_is_refused(world: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a", encoding="utf-8")
    refused = refusal(world, f"task.path={tmp_path / 'x.txt'}")
    assert refused == "task perplexity: the text must have two tokens or more, got [64]"


def test_a_text_of_tokens_that_the_model_lacks_is_refused(world: list[str]) -> None:
    target = place(world, "model.target")
    write_tokenizer(target, ids_from=90)
    told = "the tokenizer must give ids below vocab_size=96 for the text that is read, got "
    assert refusal(world, "quality.kl=false").startswith(f"{target}: {told}")


def test_a_reference_of_another_vocabulary_is_refused(world: list[str], tmp_path: Path) -> None:
    target = place(world, "model.target")
    copy = shutil.copytree(target, tmp_path / "copy")
    write_tokenizer(copy, first="0")
    refused = refusal(world, f"quality.reference={copy}")
    assert refused == f"{copy}: the vocabulary must be that of {target}"


def test_a_quantised_folder_is_no_dense_reference(world: list[str], tmp_path: Path) -> None:
    copy = shutil.copytree(place(world, "model.target"), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "unheard of"}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert refusal(world, f"quality.reference={copy}").startswith(
        "quality.reference must be a dense checkpoint, or quality.kl false: "
        f"{copy}: quantization_config: quant_method must be "
    )


@pytest.mark.parametrize("name", ["run", "cost"])
def test_a_text_is_no_task_of_another_door(world: list[str], name: str) -> None:
    with pytest.raises(ValueError) as refused:
        config = composed(*world, "task=perplexity", door=name)
        Planner("bench.cell").add(config, names=NAMES | {"quant": "dense"}, overrides=[])
    assert str(refused.value) == (
        "task must have prompts, got perplexity, a text for specquant quality"
    )
