"""Door: count a text's tokens, and list the most frequent as a draft vocabulary.

    specquant vocab model=llama3_8b_instruct task.path=corpus.jsonl size=32768 out=frequent.json

`python -m bench.vocab` does the same. `method.draft_vocab` reads what was written.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from tqdm import tqdm

from bench import hub
from bench.build import build, typed, without
from bench.config import parse_model, plain_tree
from bench.door import OK, collect, sweeping_elsewhere
from bench.draft_vocab import Ranking, origin_of, tokenizer_digest
from bench.record import write_text
from bench.text import Text
from methods.architecture import read_shape
from methods.random_weights import is_random
from methods.weights import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 256  # tokenised at once


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of conf/vocab.yaml that are not groups; their meaning is written there."""

    out: str
    size: int | None
    limit: int | None

    def __post_init__(self) -> None:
        for name in ("size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, or null, got {value}")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A checked job. target: the model's folder; model: how the command names it."""

    model: str
    target: Path
    out: Path
    settings: Settings
    text: Text


class Jobs:
    """Collects the jobs of one command, checked before the first computes."""

    def __init__(self) -> None:
        self.planned: dict[Path, Planned] = {}

    def add(
        self, config: DictConfig, *, names: Mapping[str, str], overrides: Sequence[str]
    ) -> None:
        """Check one; ValueError where something is wrong with it."""
        tree = plain_tree(config)
        settings = typed(without(tree, "model", "task"), Settings, key="")
        out = Path(settings.out).expanduser().resolve()
        if out in self.planned or out.exists():
            raise ValueError(f"out must be a new file, one for each list, got {out}")
        if not out.parent.is_dir():
            raise ValueError(f"out must be in a folder that is there, got {out}")
        self.planned[out] = Planned(
            model=names["model"],
            target=_target(tree["model"]),
            out=out,
            settings=settings,
            text=build(tree["task"], Text, key="task"),
        )


def main() -> int:
    """Count and list as the command line asks; give the exit code."""
    with sweeping_elsewhere():
        return collect("vocab", Jobs, finish=_work)


def _target(model: Mapping[str, Any]) -> Path:
    """Bring the model here where a hub id names it, for its tokenizer."""
    name = hub.fetch(model["target"], key="model.target")
    target = parse_model({**model, "target": name}).family.target
    if is_random(target):
        raise ValueError(
            f"model.target must have a tokenizer, got {target}, whose weights are random: there "
            "method.draft_vocab_size needs no list"
        )
    return target


def _work(jobs: Jobs) -> int:
    from bench.load import load_tokenizer  # transformers takes seconds

    for planned in jobs.planned.values():
        tokenizer = load_tokenizer(planned.target)
        rows = [str(row.get(planned.text.text_key)) for row in planned.text.rows()]
        ranking = rank(planned, count(tokenizer, rows[: planned.settings.limit]))
        write_text(planned.out, json.dumps(asdict(ranking), separators=(",", ":")) + "\n")
        sys.stdout.write(
            f"{len(ranking.ids):,} of {ranking.vocab_size:,} tokens are "
            f"{ranking.covers(len(ranking.ids)):.2%} of the {ranking.tokens:,} in {ranking.text}\n"
            f"specquant run model={planned.model} method=eagle2 method.draft_vocab={planned.out}\n"
        )
    return OK


def count(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[str]) -> Counter[int]:
    """How often each token occurs in some texts, each of which ends with the end token."""
    found: Counter[int] = Counter()
    starts = range(0, len(rows), ROWS)
    for start in tqdm(starts, desc="texts", disable=not sys.stderr.isatty()):
        batch = rows[start : start + ROWS]
        # verbose: a text may be longer than the model's positions.
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            found.update(ids)
    if tokenizer.eos_token_id is not None:
        found[tokenizer.eos_token_id] += len(rows)
    return found


def rank(planned: Planned, counts: Counter[int]) -> Ranking:
    """List the most frequent tokens, the lower id first of equals; ValueError where it cannot be.

    planned: of which model and text, and how many.
    """
    size, text = planned.settings.size, planned.text
    vocab = read_shape(read_config(planned.target)).vocab_size
    order = sorted((-times, token) for token, times in counts.items() if token < vocab)
    if not order:
        raise ValueError(f"task {text.name}: the text must have tokens to count, got none")
    if size is not None and size > len(order):
        raise ValueError(
            f"size must be within the {len(order)} different tokens of {text.name}, got {size}"
        )
    kept = order[:size]
    return Ranking(
        ids=[token for _, token in kept],
        counts=[-times for times, _ in kept],
        tokens=counts.total(),
        text=text.name if text.file is None else text.file.name,
        origin=origin_of(text),
        tokenizer=tokenizer_digest(planned.target),
        vocab_size=vocab,
    )


if __name__ == "__main__":
    sys.exit(main())
