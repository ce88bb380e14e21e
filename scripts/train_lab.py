"""Make the lab family: `corpus` here, `train` on a GPU, `assemble` and `evaluation` here.

`training` writes what a finished family was trained on, for `specquant vocab`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from lab.corpus import BEGIN, END, token_id, write_corpus
from lab.evaluation import write_evaluation, write_training
from lab.family import assemble
from lab.fit import Plan
from lab.llama import Shape
from lab.run import STAGES, Recipe, Run
from tokenizers import Tokenizer


def full_recipe(seconds: dict[str, float]) -> Recipe:
    """The recipe of the published family."""
    target = Shape(
        vocab=2048,
        hidden=256,
        layers=8,
        intermediate=768,
        heads=4,
        kv_heads=2,
        head_dim=64,
        positions=2048,
        dropout=0.1,
    )
    small = replace(
        target, hidden=128, layers=4, intermediate=384, heads=2, kv_heads=1, dropout=0.0
    )
    heads = Plan(
        seconds=seconds["target-heads"],
        max_steps=6000,
        rows=32,
        length=512,
        rate=1.5e-3,
        decay=0.01,
        seed=3,
    )
    plans = {
        "target": Plan(
            seconds=seconds["target"],
            max_steps=1600,
            rows=32,
            length=2048,
            rate=3e-3,
            decay=0.3,
            seed=1,
        ),
        "small": Plan(
            seconds=seconds["small"],
            max_steps=12000,
            rows=96,
            length=512,
            rate=4e-3,
            decay=0.01,
            seed=2,
        ),
        "target-heads": heads,
        "small-heads": replace(heads, seconds=seconds["small-heads"], seed=4),
    }
    return Recipe(
        target=target,
        small=small,
        draft_vocab=1536,
        plans=plans,
        row=513,
        own_batches=4,
        own_batch=4096,
        unroll=6,
    )


def main() -> None:
    """Read the command line and run one sub-command."""
    arguments = _parser().parse_args()
    if arguments.command == "corpus":
        write_corpus(arguments.out, library=arguments.library, vocab=arguments.vocab)
    elif arguments.command == "evaluation":
        write_evaluation(arguments.out, library=arguments.library)
    elif arguments.command == "training":
        write_training(arguments.family, arguments.out, library=arguments.library)
    elif arguments.command == "assemble":
        tokenizer = Tokenizer.from_file(str(arguments.corpus / "tokenizer.json"))
        recipe = full_recipe(dict.fromkeys(STAGES, 0.0))
        assemble(
            run=arguments.run,
            corpus=arguments.corpus,
            out=arguments.out,
            shapes={"target": recipe.target, "small": recipe.small},
            draft_vocab=recipe.draft_vocab,
            begin=token_id(tokenizer, BEGIN),
            end=token_id(tokenizer, END),
        )
    else:
        seconds = dict(zip(STAGES, arguments.seconds, strict=False))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        arguments.out.mkdir(parents=True, exist_ok=True)
        run = Run(
            full_recipe(seconds),
            arguments.corpus,
            arguments.out,
            device=device,
            start=arguments.start,
        )
        if device.type == "cuda":
            run.compile()
        for name in arguments.stages:
            run.stage(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="read the running Python's standard library")
    corpus.add_argument("--vocab", type=int, default=2048)
    train = commands.add_parser("train", help="train the family on what `corpus` wrote")
    train.add_argument("--corpus", type=Path, required=True)
    train.add_argument("--start", type=Path, help="an earlier run's --out to go on from")
    train.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    train.add_argument(
        "--seconds",
        nargs=4,
        type=float,
        default=(60, 70, 75, 45),
        help="at most this long for target, small, target heads, small heads",
    )
    place = commands.add_parser("assemble", help="lay a run out as checkpoint folders")
    place.add_argument("--corpus", type=Path, required=True)
    place.add_argument("--run", type=Path, required=True)
    text = commands.add_parser("evaluation", help="write a family's text for its perplexity")
    source = commands.add_parser("training", help="write the text that a family was trained on")
    source.add_argument("--family", type=Path, default=Path("models/lab"))
    for command in (corpus, text, source):
        command.add_argument("--library", type=Path, help="read this folder instead")
    for command in (corpus, train, place, text, source):
        command.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
