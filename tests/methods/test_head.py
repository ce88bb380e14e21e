import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.checkpoint import check_transformer
from methods.eagle2 import Eagle2
from methods.eagle3 import Eagle3
from methods.recipe import Family
from methods.tree_recipe import TreeRecipe
from tests.methods.eagle_oracle import Oracle
from tests.methods.parts import make_parts
from tests.methods.published import (
    EAGLE2_FORMS,
    EAGLE3_FORMS,
    VOCAB,
    WIDTH,
    Published,
    eagle2,
    eagle3,
    noise,
    with_copies,
    with_rotation,
    with_tensors,
    write_pickle,
    write_safetensors,
    write_speculators,
)

PROMPT = [0, 5, 17, 23, 42, 8, 61]
INF = float("inf")
DRAFTED = (3, 88)  # tokens after the prompt, for which the head is fed its own output
FORMS = EAGLE2_FORMS | {f"eagle3: {name}": make for name, make in EAGLE3_FORMS.items()}


def family_of(head: Published) -> Family:
    return Family(target=head.target, heads={"eagle3" if head.eagle3 else "eagle2": head.folder})


def recipe_of(head: Published) -> TreeRecipe:
    kind = Eagle3 if head.eagle3 else Eagle2
    return kind(depth=2, top_k=2, nodes=4)


def check(head: Published) -> None:
    recipe_of(head).check(family_of(head))


@pytest.mark.parametrize("form", FORMS)
def test_a_published_head_gives_the_oracles_probabilities(tmp_path: Path, form: str) -> None:
    published = FORMS[form](tmp_path)
    check(published)
    parts = make_parts(family_of(published))
    target = parts.target
    kv = target.cache(len(PROMPT))
    tokens = torch.tensor([PROMPT[:-1]])
    positions = torch.arange(len(PROMPT) - 1)
    features = target(tokens, positions, kv, taps=published.taps).features[0]

    head = recipe_of(published).head(parts)
    assert head.taps == published.taps
    kv = head.cache(20)
    out = head(torch.tensor(PROMPT[1:]), head.enter(features), positions, kv, None)
    kv.advance(len(positions))
    for i, token in enumerate(DRAFTED):
        out = head(torch.tensor([token]), out[-1:], torch.tensor([len(positions) + i]), kv, None)
        kv.advance(1)

    own = published.tensors
    lm_head = target.lm_head.dequantize().double()
    oracle = Oracle(
        config=published.config,
        tensors=own,
        embedding=own.get("embed_tokens.weight", target.embedding).double(),
        lm_head=own["lm_head.weight"].double() if "lm_head.weight" in own else lm_head,
        eagle3=published.eagle3,
    )
    expected = oracle.walk(oracle.pairs(features, PROMPT), DRAFTED)
    # float32 holds nothing here but the stored weights and the angles
    torch.testing.assert_close(head.logits(out[-1]).log_softmax(-1), expected, rtol=0, atol=1e-9)
    ids = torch.arange(len(expected))
    drafted = ids if head.kept is None else head.kept[ids]
    assert drafted.tolist() == [oracle.target_id(i) for i in range(len(ids))]


def test_a_copy_of_the_targets_embedding_takes_no_memory(tmp_path: Path) -> None:
    published = write_pickle(with_copies(eagle2(tmp_path, bias=False)))
    parts = make_parts(family_of(published))
    assert recipe_of(published).head(parts).embedding is parts.target.embedding


def test_a_copy_in_another_precision_is_still_a_copy(tmp_path: Path) -> None:
    published = with_copies(eagle2(tmp_path, bias=False))
    half = published.tensors["embed_tokens.weight"].bfloat16()
    parts = make_parts(family_of(write_pickle(with_tensors(published, embed_tokens__weight=half))))
    assert recipe_of(published).head(parts).embedding is parts.target.embedding


def test_one_row_of_its_own_makes_an_embedding_its_own(tmp_path: Path) -> None:
    published = with_copies(eagle2(tmp_path, bias=False))
    published.tensors["embed_tokens.weight"][50] *= 1.05
    parts = make_parts(family_of(write_pickle(published)))
    head = recipe_of(published).head(parts)
    assert torch.equal(head.embedding.float(), published.tensors["embed_tokens.weight"])


@pytest.mark.parametrize("made", [eagle2, eagle3, lambda root: with_rotation(eagle2(root))])
def test_an_embedding_of_its_own_is_finite(
    tmp_path: Path, made: Callable[[Path], Published]
) -> None:
    published = with_tensors(
        made(tmp_path),
        embed_tokens__weight=noise(VOCAB, WIDTH).index_fill(0, torch.tensor(50), INF),
    )
    published.config["bias"] = False
    parts = make_parts(family_of(write_pickle(published)))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight must be finite in torch\.float64"):
        recipe_of(published).head(parts)


def test_an_lm_head_that_published_code_never_reads_is_not_read(tmp_path: Path) -> None:
    published = with_tensors(eagle2(tmp_path, bias=False), lm_head__weight=noise(VOCAB, WIDTH))
    parts = make_parts(family_of(write_pickle(published)))
    assert recipe_of(published).head(parts).lm_head is parts.target.lm_head  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("ids", "inputs_of"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}, (0, 2, 3)),
        # in this place an id is the layer whose output is read
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}}, (1, 3, 4)),
    ],
)
def test_where_layer_ids_stand_says_what_they_mean(
    tmp_path: Path, ids: dict[str, Any], inputs_of: tuple[int, ...]
) -> None:
    published = eagle3(tmp_path)
    del published.config["eagle_aux_hidden_state_layer_ids"]
    published.config |= ids
    parts = make_parts(family_of(write_pickle(published)))
    assert recipe_of(published).head(parts).taps == inputs_of


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run",)


def corrupt(head: Published) -> Published:
    path = write_pickle(head).folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-200])
    return head


def pickled(head: Published, content: object) -> Published:
    write_pickle(head)
    with (head.folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(content, file, protocol=2)
    return head


def saved(head: Published, content: object) -> Published:
    write_pickle(head)
    torch.save(content, head.folder / "pytorch_model.bin")
    return head


def offsets(change: Callable[[Tensor], object]) -> Callable[[Path], Published]:
    def make(root: Path) -> Published:
        head = eagle3(root)
        change(head.tensors["d2t"])
        return write_pickle(head)

    return make


def drop(head: Published, *names: str) -> Published:
    for name in names:
        del head.tensors[name]
    return head


def with_strange_mask(head: Published) -> Published:
    head.tensors["t2d"][0] = False
    head.tensors["t2d"][1] = True
    return head


REFUSALS: dict[str, tuple[Callable[[Path], Published], str]] = {
    "a pickle of code": (
        lambda root: pickled(eagle2(root, bias=False), {"fc.weight": Code()}),
        "pytorch_model.bin must be a whole pickle of nothing but tensors",
    ),
    "a saved module": (
        lambda root: saved(eagle2(root, bias=False), {"fc.weight": torch.nn.Linear(2, 2)}),
        "pytorch_model.bin must be a whole pickle of nothing but tensors",
    ),
    "a list": (
        lambda root: saved(eagle2(root, bias=False), [torch.zeros(2)]),
        "must hold tensors by name, got list",
    ),
    "a number among the tensors": (
        lambda root: saved(eagle2(root, bias=False), {"step": 3}),
        "must hold tensors by name, got int for 'step'",
    ),
    "half a pickle": (
        lambda root: corrupt(eagle2(root, bias=False)),
        "pytorch_model.bin must be a whole pickle of nothing but tensors",
    ),
    "a bias that is not there": (
        lambda root: write_pickle(eagle2(root)),
        r"missing fc\.bias, superfluous none",
    ),
    "two layers": (
        lambda root: write_pickle(eagle2(root, bias=False, num_hidden_layers=2)),
        "num_hidden_layers must be 1 in a draft head, got 2",
    ),
    "a quantised head": (
        lambda root: write_safetensors(
            with_tensors(
                drop(
                    eagle2(root, bias=False, quantization_config={"quant_method": "gptq"}),
                    "layers.0.mlp.up_proj.weight",
                ),
                layers__0__mlp__up_proj__qweight=torch.zeros(16, 256, dtype=torch.int32),
            )
        ),
        "a draft head must be stored dense, got quantization_config 'gptq'",
    ),
    "extra norms": (
        lambda root: _speculators(eagle2(root, bias=False), layernorms=True),
        "layernorms must be false, nothing here computes it",
    ),
    "a norm before fc": (
        lambda root: _speculators(eagle3(root), norm_before_fc=True),
        "norm_before_fc must be false, nothing here computes it",
    ),
    "another of speculators' kinds": (
        lambda root: _speculators(eagle3(root), speculators_model_type="dflash"),
        "speculators_model_type must be eagle3, got 'dflash'",
    ),
    "a layer of another architecture": (
        lambda root: write_speculators(eagle3(root, model_type="qwen3")),
        "transformer_layer_config must be a llama's, got 'qwen3'",
    ),
    "an id above the vocabulary": (
        offsets(lambda d2t: d2t[47:].fill_(49)),
        "d2t must stay within the vocabulary of 96",
    ),
    "an id below the vocabulary": (
        offsets(lambda d2t: d2t[3:4].fill_(-4)),
        "d2t must stay within the vocabulary of 96",
    ),
    "an offset at the end of int64": (
        offsets(lambda d2t: d2t[47:].fill_(2**63 - 1)),
        "d2t must stay within the vocabulary of 96",
    ),
    "an id twice": (
        offsets(lambda d2t: d2t[1:2].fill_(-1)),
        "d2t must lead to 48 different tokens",
    ),
    "a mask of other tokens": (
        lambda root: write_pickle(with_strange_mask(eagle3(root))),
        "t2d must name the tokens that d2t leads to",
    ),
    "no offsets for a part of the vocabulary": (
        lambda root: write_pickle(drop(eagle3(root), "d2t", "t2d")),
        "must hold d2t, since draft_vocab_size is 48 of 96",
    ),
    "a width of its own without an embedding": (
        lambda root: write_pickle(eagle3(root, width=64, target_hidden_size=WIDTH)),
        r"missing embed_tokens\.weight",
    ),
    "a wider target": (
        lambda root: write_pickle(eagle3(root, target_hidden_size=256)),
        "the width of the target that it reads must be 128, got 256",
    ),
    "a width that is a text": (
        lambda root: write_pickle(eagle3(root, target_hidden_size="128")),
        r"head/config\.json: target_hidden_size must be an integer from 1 .*got '128'",
    ),
    "a draft vocabulary that is a switch": (
        lambda root: _edited(eagle3(root), draft_vocab_size=True),
        r"head/config\.json: draft_vocab_size must be an integer from 1 .*got True",
    ),
    "a draft vocabulary that no tensor has": (
        lambda root: _edited(eagle3(root), draft_vocab_size=2**40),
        r"d2t must be \[1099511627776\], got \[48\]",
    ),
    "a size that is a text": (
        lambda root: write_pickle(eagle2(root, bias=False, hidden_size="128")),
        r"head: config\.json: hidden_size must be an integer from 1 .*got '128'",
    ),
    "a number of layers that is a switch": (
        lambda root: write_pickle(eagle2(root, bias=False, num_hidden_layers=True)),
        r"head: config\.json: num_hidden_layers must be an integer from 1 .*got True",
    ),
    "a bias that is a text": (
        lambda root: write_pickle(eagle2(root, bias="false")),
        r"head/config\.json: bias must be true or false, got 'false'",
    ),
    "settings that are a list": (
        lambda root: _edited(eagle3(root), eagle_config=[1]),
        r"head/config\.json: eagle_config must be an object, got \[1\]",
    ),
    "a layer that is a switch": (
        lambda root: _edited(eagle3(root), eagle_aux_hidden_state_layer_ids=[True, 2, 4]),
        r"inputs of the target's layers 0 to 4, got \[True, 2, 4\]",
    ),
    "a layer that the target has not": (
        lambda root: write_pickle(eagle3(root, eagle_aux_hidden_state_layer_ids=[1, 2, 5])),
        r"inputs of the target's layers 0 to 4, got \[1, 2, 5\]",
    ),
    "a rotation over a target that has none": (
        lambda root: write_pickle(
            with_tensors(
                eagle2(root, bias=False),
                rms_norm_rotation__weight=noise(WIDTH, WIDTH),
                embed_tokens__weight=noise(VOCAB, WIDTH),
                lm_head__weight=noise(VOCAB, WIDTH),
            )
        ),
        "must be over a rotated target, but the final norm of .* is not folded away",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_computed_is_refused_in_one_line(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = REFUSALS[what]
    with pytest.raises(ValueError, match=message) as refused:
        check(make(tmp_path))
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""  # nothing that a file holds was run


def test_a_dense_head_that_inherits_a_quantised_targets_config_is_read(tmp_path: Path) -> None:
    check(write_pickle(eagle2(tmp_path, bias=False, quantization_config={"quant_method": "gptq"})))


def test_safetensors_go_before_a_pickle(tmp_path: Path) -> None:
    published = write_safetensors(eagle2(tmp_path, bias=False))
    shutil.copyfile(published.folder / "config.json", published.folder / "pytorch_model.bin")
    check(published)


def _edited(head: Published, **changes: object) -> Published:
    head.config |= changes
    return write_pickle(head)


def _speculators(head: Published, **changes: object) -> Published:
    path = write_speculators(head).folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")
    return head


@pytest.mark.parametrize("write", [write_pickle, write_speculators])
@pytest.mark.parametrize("make", [partial(eagle2, bias=False), eagle3])
def test_a_head_in_the_place_of_a_model_is_told_to_be_one(
    tmp_path: Path, make: Callable[[Path], Published], write: Callable[[Published], Published]
) -> None:
    head = write(make(tmp_path))
    key = "model.heads.eagle3" if head.eagle3 else "model.heads.eagle2"
    with pytest.raises(ValueError, match=f"must be a whole model, got a draft head, which {key} "):
        check_transformer(head.folder)


@pytest.mark.parametrize("write", [write_pickle, write_safetensors])
@pytest.mark.parametrize("make", [partial(eagle2, bias=False), eagle3])
def test_a_head_of_the_other_method_is_told_to_be_one(
    tmp_path: Path, make: Callable[[Path], Published], write: Callable[[Published], Published]
) -> None:
    head = write(make(tmp_path))
    found, asked = ("eagle3", "eagle2") if head.eagle3 else ("eagle2", "eagle3")
    kind = Eagle2 if head.eagle3 else Eagle3
    message = f"must hold a head of {asked}, got one of {found}, which model.heads.{found} takes"
    with pytest.raises(ValueError, match=message):
        kind(depth=2, top_k=2, nodes=4).check(
            Family(target=head.target, heads={asked: head.folder})
        )
