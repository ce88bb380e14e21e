"""The lab corpus: standard-library source, its tokeniser, its splits and its prompts."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END = "<|begin|>", "<|end|>"
HELD_OUT = (
    "bisect",
    "calendar",
    "cmd",
    "codeop",
    "colorsys",
    "copy",
    "csv",
    "difflib",
    "filecmp",
    "fnmatch",
    "fractions",
    "getopt",
    "glob",
    "graphlib",
    "heapq",
    "linecache",
    "mailcap",
    "netrc",
    "plistlib",
    "poplib",
    "queue",
    "quopri",
    "reprlib",
    "sched",
    "shelve",
    "shlex",
    "tabnanny",
    "textwrap",
    "timeit",
    "tomllib",
    "trace",
    "uuid",
    "wave",
    "zipapp",
)
_TABLES = ("encodings/", "pydoc_data/", "_sysconfigdata")
_TOP_LEVEL = re.compile(r"^(?:@|def |class |async def )", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One source file; name is its path below the library's folder."""

    name: str
    text: str

    @property
    def module(self) -> str | None:
        """The held-out module this file belongs to, as its code or as its tests."""
        parts = self.name.removesuffix(".py").split("/")
        owner = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
        owner = owner.removeprefix("test_") if parts[0] == "test" else owner
        return owner if owner in HELD_OUT else None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An excerpt that a model is asked to go on from, or that calibrates a quantiser."""

    prompt_id: str
    module: str
    python: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A split as one stream: each document begins with BEGIN and ends with END.

    stream: [n] uint16; starts: [m] int64, where a document or a top-level definition begins.
    """

    stream: NDArray[np.uint16]
    starts: NDArray[np.int64]


def read_documents(library: Path) -> list[Document]:
    """Read every distinct hand-written UTF-8 source file below a folder, in order of name."""
    seen: set[str] = set()
    documents = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if "site-packages" in path.parts or name.startswith(_TABLES):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if not text.strip() or text in seen or _is_table(text):
            continue
        seen.add(text)
        documents.append(Document(name=name, text=text))
    return documents


def _is_table(text: str) -> bool:
    digits = sum(map(text.count, "0123456789"))
    return digits > 0.2 * len(text) or max(map(len, text.split("\n"))) > 1000


def train_tokenizer(texts: Sequence[str], *, vocab: int) -> Tokenizer:
    """Train a byte-level BPE whose encoding begins with BEGIN."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, token_id(tokenizer, BEGIN))],
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The number of a token that must be there."""
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    """Encode documents into one stream and note where definitions begin."""
    end = token_id(tokenizer, END)
    pieces, starts, length = [], [], 0
    encodings = tokenizer.encode_batch([document.text for document in documents])
    for document, encoding in zip(documents, encodings, strict=True):
        # The first token is BEGIN, whose offsets are (0, 0): definitions are sought behind it.
        offsets = np.array([start for start, _ in encoding.offsets[1:]])
        heads = [match.start() for match in _TOP_LEVEL.finditer(document.text)]
        starts += [length, *(length + 1 + np.searchsorted(offsets, heads)).tolist()]
        pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
        length += len(pieces[-1])
    return Tokens(stream=np.concatenate(pieces), starts=np.unique(np.array(starts)))


def excerpts(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    sizes: tuple[int, int],
    room: int,
    rng: random.Random,
) -> Iterator[tuple[str, str]]:
    """Cut excerpts that begin at a definition and end at a line's end, one document after another.

    Each holds sizes[0]..sizes[1] tokens and is followed by at least room tokens of its document.
    """
    for document in documents:
        text = document.text
        heads = [0, *(match.start() for match in _TOP_LEVEL.finditer(text))]
        heads = [
            head for head in heads if head == 0 or text[text.rfind("\n", 0, head - 1) + 1] != "@"
        ]
        rng.shuffle(heads)
        wanted = rng.randint(*sizes)
        for head in heads:
            end = _line_end(text, head, tokenizer, wanted=wanted)
            cut = text[head:end]
            size = len(tokenizer.encode(cut).ids)
            rest = len(tokenizer.encode(text[end : end + 8 * room]).ids)
            if sizes[0] <= size <= sizes[1] and rest >= room:
                yield document.name, cut
                break


def _line_end(text: str, head: int, tokenizer: Tokenizer, *, wanted: int) -> int:
    """Where the last full, non-blank line within the wanted number of tokens ends."""
    encoding = tokenizer.encode(text[head : head + 8 * wanted], add_special_tokens=False)
    stop = encoding.offsets[min(wanted, len(encoding)) - 1][1]
    newline = text.rfind("\n", head, head + stop)
    # No newline at the end: after a bare one the tokeniser allows no indentation.
    return head + len(text[head:newline].rstrip()) if newline > head else head


def held_out_prompts(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Prompt]:
    """Two prompts of 150 to 400 tokens from each held-out module, from its code where it can."""
    rng, cuts = random.Random(0), []
    for module in HELD_OUT:
        own = sorted((d for d in documents if d.module == module), key=lambda d: "test" in d.name)
        found: list[str] = []
        for name, text in excerpts(
            [*own[:1], *own], tokenizer, sizes=(150, 400), room=128, rng=rng
        ):
            if text not in found and len(found) < 2:
                found.append(text)
                cuts.append((name, text))
    kept = sorted(rng.sample(range(len(cuts)), min(64, len(cuts))))
    return [to_prompt(f"heldout-{i:03d}", *cuts[k]) for i, k in enumerate(kept)]


def calibration_prompts(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Prompt]:
    """32 excerpts of about 512 tokens from training modules."""
    rng = random.Random(1)
    shuffled = rng.sample(list(documents), len(documents))
    cuts = excerpts(shuffled, tokenizer, sizes=(480, 512), room=0, rng=rng)
    return [
        to_prompt(f"calibration-{i:03d}", *cut) for i, cut in zip(range(32), cuts, strict=False)
    ]


def to_prompt(prompt_id: str, name: str, text: str) -> Prompt:
    """Name an excerpt's file and the Python that it is from."""
    return Prompt(prompt_id=prompt_id, module=name, python=platform.python_version(), text=text)


def write_corpus(out: Path, *, library: Path | None, vocab: int) -> dict[str, object]:
    """Write the tokeniser, both splits and the prompts; return what the corpus is."""
    out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(library or Path(sysconfig.get_path("stdlib")))
    held_out = [document for document in documents if document.module]
    training = [document for document in documents if not document.module]
    tokenizer = train_tokenizer([document.text for document in training], vocab=vocab)
    tokenizer.save(str(out / "tokenizer.json"))
    splits = {"train": encode(training, tokenizer), "heldout": encode(held_out, tokenizer)}
    arrays = {f"{name}_stream": split.stream for name, split in splits.items()}
    starts = {f"{name}_starts": split.starts for name, split in splits.items()}
    np.savez_compressed(out / "corpus.npz", **arrays, **starts)  # type: ignore[arg-type]
    write_prompts(out / "heldout.jsonl", held_out_prompts(held_out, tokenizer))
    write_prompts(out / "calibration.jsonl", calibration_prompts(training, tokenizer))
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "sha256": digest(documents),
        "vocab": tokenizer.get_vocab_size(),
        "held_out_modules": HELD_OUT,
    }
    for name, part in (("train", training), ("heldout", held_out)):
        facts[f"{name}_files"] = len(part)
        facts[f"{name}_bytes"] = sum(len(document.text.encode()) for document in part)
        facts[f"{name}_tokens"] = len(splits[name].stream)
    (out / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def digest(documents: Sequence[Document]) -> str:
    """The sha256 of all names and texts."""
    total = hashlib.sha256()
    for document in documents:
        total.update(f"{document.name}\0{document.text}\0".encode())
    return total.hexdigest()


def read_corpus(folder: Path) -> dict[str, Tokens]:
    """Read both splits back."""
    with np.load(folder / "corpus.npz") as arrays:
        return {
            name: Tokens(stream=arrays[f"{name}_stream"], starts=arrays[f"{name}_starts"])
            for name in ("train", "heldout")
        }


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a JSONL file."""
    return [Prompt(**json.loads(line)) for line in path.read_text().splitlines()]


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as a JSONL file."""
    lines = [json.dumps(vars(prompt)) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n")
