"""Texts beside the lab family: for its perplexity, and for counting tokens."""

from __future__ import annotations

import json
import platform
import random
import sysconfig
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from lab.corpus import (
    HELD_OUT,
    Document,
    Prompt,
    digest,
    excerpts,
    read_documents,
    to_prompt,
    write_prompts,
)

NAME = "perplexity.jsonl"


def write_evaluation(family: Path, *, library: Path | None) -> None:
    """Write the text into a finished family's folder.

    Raises ValueError where the library is not the one that the family was trained on.
    """
    documents = _documents_of(family, library)
    tokenizer = Tokenizer.from_file(str(family / "target" / "tokenizer.json"))
    write_prompts(family / NAME, evaluation_texts(documents, tokenizer))


def write_training(family: Path, out: Path, *, library: Path | None) -> None:
    """Write the files that a family was trained on as lines with `text`; errors as above."""
    kept = [document for document in _documents_of(family, library) if not document.module]
    lines = [json.dumps({"name": document.name, "text": document.text}) for document in kept]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _documents_of(family: Path, library: Path | None) -> list[Document]:
    documents = read_documents(library or Path(sysconfig.get_path("stdlib")))
    facts = json.loads((family / "corpus.json").read_text())
    if (found := digest(documents)) != facts["sha256"]:
        raise ValueError(
            f"the library must be that of {family / 'corpus.json'}, of Python {facts['python']} "
            f"with sha256 {facts['sha256']}, got {found} of Python {platform.python_version()}"
        )
    return documents


def evaluation_texts(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Prompt]:
    """One excerpt of 1,000 to 1,500 tokens from each held-out module, from its code where it can.

    They are long, so that few tokens have the end of another module as their context.
    """
    rng, cuts = random.Random(2), []
    for module in HELD_OUT:
        own = [document for document in documents if document.module == module]
        own.sort(key=lambda document: "test" in document.name)
        cuts += islice(excerpts(own, tokenizer, sizes=(1000, 1500), room=0, rng=rng), 1)
    return [to_prompt(f"evaluation-{i:03d}", *cut) for i, cut in enumerate(cuts)]
