import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from lab.attention import Keys, attend_plainly, flash_unrolled  # noqa: E402
from lab.corpus import HELD_OUT, Document, read_corpus, read_documents, write_corpus  # noqa: E402
from lab.evaluation import evaluation_texts, write_evaluation, write_training  # noqa: E402
from lab.family import assemble  # noqa: E402
from lab.fit import Plan, Rows  # noqa: E402
from lab.heads import Eagle2Head, Eagle3Head, Head, head_shape, unroll  # noqa: E402
from lab.llama import Llama, Shape, config_of, continue_greedily, save_half, write_json  # noqa: E402
from lab.measure import (  # noqa: E402
    Continued,
    before_repeats,
    chain_of_head,
    chain_of_model,
    continue_prompts,
)
from lab.run import STAGES, Recipe, Run  # noqa: E402

SHAPE = Shape(
    vocab=300,
    hidden=32,
    layers=6,
    intermediate=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    positions=32,
    dropout=0.0,
)
SMALL = Shape(**(vars(SHAPE) | {"layers": 4, "hidden": 16}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of a small library: two training modules and two held-out ones."""
    folder = tmp_path_factory.mktemp("lab")
    library = folder / "library"
    library.mkdir()
    for name in ("abc", "enum", HELD_OUT[0], HELD_OUT[1]):
        source = Path(json.__file__).parents[1] / f"{name}.py"
        (library / f"{name}.py").write_text(source.read_text())
    write_corpus(folder / "corpus", library=library, vocab=300)
    return folder / "corpus"


def model(shape: Shape, seed: int) -> Llama:
    torch.manual_seed(seed)
    made = Llama(shape)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def heads(shape: Shape) -> list[Head]:
    torch.manual_seed(5)
    frequent = torch.arange(0, shape.vocab, 2)
    made: list[Head] = [Eagle2Head(head_shape(shape)), Eagle3Head(head_shape(shape), frequent)]
    return [head.eval() for head in made]


def drafted_in_order(
    head: Head, target: Llama, tokens: Tensor, features: Tensor, decided: int, depth: int
) -> list[Tensor]:
    """Outputs of the last decided pair and of `depth` drafts behind it, one query at a time."""
    layer = head.layers[0] if isinstance(head, Eagle2Head) else head.midlayer
    hidden = head.enter(features)
    embedded = target.model.embed_tokens(tokens)
    keys, values, outputs = [], [], []
    for position in range(decided + 1 + depth):
        stream = hidden[0, position] if position <= decided else outputs[-1]
        token = embedded[0, position + 1]
        if isinstance(head, Eagle2Head):
            attended = residual = head.fc(torch.cat([token, stream]))
        else:
            attended = torch.cat([layer.input_layernorm(token), layer.hidden_norm(stream)])
            residual = stream
        at = torch.tensor([position])
        q, k, v = layer.self_attn.project(attended[None, None], at)
        keys.append(layer.self_attn.spread(k)[0, :, 0])
        values.append(layer.self_attn.spread(v)[0, :, 0])
        scores = torch.einsum("hd,nhd->hn", q[0, :, 0], torch.stack(keys)) * q.shape[-1] ** -0.5
        mixed = torch.einsum("hn,nhd->hd", scores.softmax(-1), torch.stack(values))
        x = residual + layer.self_attn.o_proj(mixed.flatten())
        outputs.append(x + layer.mlp(layer.post_attention_layernorm(x)))
    return outputs[decided:]


@torch.no_grad()
@pytest.mark.parametrize("kind", [0, 1])
def test_unrolled_pass_equals_drafting_one_token_after_another(kind: int) -> None:
    target, head = model(SHAPE, 0), heads(SHAPE)[kind]
    tokens = torch.randint(SHAPE.vocab, (1, 12))
    features = head.features(target, target(tokens))[:, :-1]
    unrolled = unroll(head, target, tokens, features, steps=4)
    for decided in (0, 3, 7):
        expected = drafted_in_order(head, target, tokens, features, decided, 3)
        for depth, row in enumerate(expected):
            torch.testing.assert_close(unrolled[depth][0, decided], row, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_transformers_reads_the_saved_model_as_the_same_function(tmp_path: Path) -> None:
    made = model(SHAPE, 1)
    made.load_state_dict({name: value.half() for name, value in made.state_dict().items()})
    save_half(made.state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", config_of(SHAPE, begin=0, end=1))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(SHAPE.vocab, (2, 40))
    ours, theirs = made(tokens), loaded(tokens, output_hidden_states=True)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ours.final, theirs.hidden_states[-1], atol=1e-3, rtol=1e-4)
    for layer in range(SHAPE.layers):
        torch.testing.assert_close(
            ours.inputs[layer], theirs.hidden_states[layer], atol=1e-3, rtol=1e-4
        )


@torch.no_grad()
def test_cached_continuations_equal_full_passes() -> None:
    made = model(SHAPE, 2)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7]]
    expected = []
    for prompt in prompts:
        tokens = prompt
        for _ in range(9):
            tokens = [*tokens, int(made(torch.tensor([tokens])).logits[0, -1].argmax())]
        expected.append(tokens)
    found = continue_prompts(made, prompts, 9, end=-1)
    ragged = [row[:end] for row, end in zip(found.tokens.tolist(), found.ends, strict=True)]
    assert ragged == expected
    alone = continue_greedily(made, torch.tensor(prompts[:1]), 9, dtype=torch.float32)
    assert alone.tolist() == expected[:1]


def test_text_ends_where_its_first_repetition_begins() -> None:
    tokens = torch.tensor([[7, 7, 1, 2, 3, 1, 2, 4], [7, 1, 2, 3, 4, 5, 6, 0]])
    text = Continued(tokens=tokens, begins=[2, 1], ends=[8, 7])
    assert before_repeats(text, size=2).ends == [5, 7]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_form_of_unrolled_attention_has_the_plain_forms_values_and_gradients() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(4, 512, 4, 64, device="cuda").transpose(1, 2) for _ in range(3)]
    drafted = [torch.randn(3, 4, 4, 512, 64, device="cuda") for _ in range(2)]
    half = [x.bfloat16().requires_grad_() for x in (*rows, *drafted)]
    full = [x.detach().float().requires_grad_() for x in half]
    grad = torch.randn(4, 4, 512, 64, device="cuda")
    ours = flash_unrolled(half[0], Keys(k=half[1], v=half[2]), half[3], half[4])
    plain = attend_plainly(full[0], Keys(k=full[1], v=full[2]), full[3], full[4])
    found = [ours, *torch.autograd.grad(ours, half, grad.bfloat16())]
    expected = [plain, *torch.autograd.grad(plain, full, grad.bfloat16().float())]
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()


@torch.no_grad()
def test_replayed_acceptance_equals_drafting_and_checking() -> None:
    target, drafter = model(SHAPE, 3), model(SHAPE, 3)
    # A disturbed copy of the target, so that some drafts are right and some are not.
    drafter.model.embed_tokens.weight.add_(0.1 * torch.randn(SHAPE.vocab, SHAPE.hidden))
    text = continue_prompts(target, [[5, 6, 7], [9, 8, 7, 6]], 24, end=-1)
    emitted = steps = 0
    for row, (begin, end) in enumerate(zip(text.begins, text.ends, strict=True)):
        newest = begin
        while newest + 3 < end:
            draft = text.tokens[row : row + 1, :newest]
            for _ in range(3):
                draft = torch.cat([draft, drafter(draft).logits[:, -1:].argmax(-1)], dim=1)
            right = (draft[0, newest:] == text.tokens[row, newest : newest + 3]).tolist()
            kept = next((i for i, hit in enumerate(right) if not hit), 3)
            emitted, steps, newest = emitted + kept + 1, steps + 1, newest + kept + 1
    found = chain_of_model(drafter, text, depth=3)
    assert (found.steps, found.length) == (steps, round(emitted / steps, 3))
    assert 1.0 < found.length < 4.0
    assert chain_of_model(target, text, depth=3).length == 4.0


@torch.no_grad()
def test_more_choices_at_each_depth_never_accept_less() -> None:
    target = model(SHAPE, 3)
    text = continue_prompts(target, [[5, 6, 7], [9, 8, 7, 6]], 24, end=-1)
    for head in heads(SHAPE):
        lengths = [
            chain_of_head(head, target, text, depth=4, width=width).length for width in (1, 20, 150)
        ]
        assert lengths == sorted(lengths)


def test_held_out_modules_include_their_tests() -> None:
    names = [
        "bisect.py",
        "test/test_bisect.py",
        "tomllib/_re.py",
        "test/test_tomllib/burntsushi.py",
    ]
    assert [Document(name=name, text="").module for name in names] == ["bisect"] * 2 + [
        "tomllib"
    ] * 2
    assert Document(name="bisection.py", text="").module is None


def test_rows_begin_with_the_beginning_and_then_a_definition_where_one_is_near(
    corpus: Path,
) -> None:
    split = read_corpus(corpus)["train"]
    taken = Rows(split, length=400, seed=0, device=torch.device("cpu")).take(128)
    assert taken.shape == (128, 400)
    assert set(taken[:, 0].tolist()) == {0}
    begins = {tuple(split.stream[start : start + 12].tolist()) for start in split.starts}
    assert any(tuple(row[1:13].tolist()) in begins for row in taken)


def test_pipeline_leaves_loadable_checkpoints(corpus: Path, tmp_path: Path) -> None:
    plan = Plan(seconds=5, max_steps=2, rows=2, length=24, rate=1e-3, decay=0.1, seed=0)
    recipe = Recipe(
        target=SHAPE,
        small=SMALL,
        draft_vocab=120,
        plans=dict.fromkeys(STAGES[:4], plan),
        row=24,
        own_batches=1,
        own_batch=4,
        unroll=3,
    )
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    run = Run(recipe, corpus, run_folder, device=torch.device("cpu"), start=None)
    for stage in STAGES:
        run.stage(stage)
    assemble(
        run=run_folder,
        corpus=corpus,
        out=tmp_path / "family",
        shapes={"target": SHAPE, "small": SMALL},
        draft_vocab=120,
        begin=0,
        end=1,
    )
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "family" / "small")
    assert loaded.config.bos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "family" / "target")
    text = "def f(x):\n\treturn 'caf\u00e9 \u4e2d'  # two  spaces\n\n\n    \u0000end"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id == 0
    chat = [{"role": "user", "content": "hi"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "<|begin|># user: hi\n# assistant:"
    record = json.loads((tmp_path / "family" / "training.json").read_text())
    assert set(record["runs"][0]["acceptance"]["target_greedy"]["all"]) == {
        "small_chain_7",
        "eagle2_chain_6",
        "eagle2_bound_6_of_10",
        "eagle3_chain_6",
        "eagle3_bound_6_of_10",
    }


def test_evaluation_text_is_one_long_excerpt_per_held_out_module(corpus: Path) -> None:
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    documents = read_documents(corpus.parent / "library")
    texts = evaluation_texts(documents, tokenizer)
    assert [text.module for text in texts] == [f"{name}.py" for name in HELD_OUT[:2]]
    sources = {document.name: document.text for document in documents}
    for text in texts:
        assert text.text in sources[text.module]
        assert 1000 <= len(tokenizer.encode(text.text).ids) <= 1500


def test_evaluation_text_of_another_library_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text((corpus / "corpus.json").read_text())
    other = tmp_path / "library"
    other.mkdir()
    (other / "abc.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"the library must be that of .*corpus\.json, of Python"):
        write_evaluation(tmp_path, library=other)
    assert not (tmp_path / "perplexity.jsonl").exists()


def test_training_text_is_what_nobody_holds_out(corpus: Path, tmp_path: Path) -> None:
    library = corpus.parent / "library"
    write_training(corpus, tmp_path / "training.jsonl", library=library)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    kept = {d.name: d.text for d in read_documents(library) if not d.module}
    assert {line["name"]: line["text"] for line in lines} == kept
    assert 0 < len(kept) < len(read_documents(library))
