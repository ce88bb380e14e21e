"""How much a target's choice between its two best tokens moves with the number of tokens read.

    python scripts/read_noise.py --model models/lab/target --text models/lab/heldout.jsonl

Every text is read twice, all at once and token by token. The change of the gap between the two
best tokens is what rounding alone can do to a near-tie, and the ground for `tie_threshold_nats`.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench.build import ROOT, build, named_node
from bench.load import load_tokenizer
from methods.calibrate import load_calibrated
from methods.transformer import Transformer
from quant.scheme import Scheme

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def main() -> None:
    """Print one line per scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/lab/target")
    parser.add_argument("--text", type=Path, default=ROOT / "models/lab/heldout.jsonl")
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.model)
    lines = args.text.read_text(encoding="utf-8").splitlines()[: args.texts]
    rows = [tokenizer(json.loads(line)["text"])["input_ids"][: args.tokens] for line in lines]
    for path in tqdm(sorted((ROOT / "conf/quant").glob("*.yaml")), leave=False):
        scheme = _scheme(path.stem)
        model = load_calibrated(
            args.model,
            scheme=scheme,
            dense=_scheme("dense"),
            lm_head=_scheme("dense"),
            dtype=getattr(torch, args.dtype),
            device=torch.device(args.device),
            texts=rows,
        )
        moves = torch.cat([_moves(model, row) for row in rows])
        told = ", ".join(f"{k} {float(moves.quantile(q)):.2e}" for k, q in QUANTILES.items())
        print(f"{path.stem}: {len(moves)} positions, {told} nats", flush=True)


def _scheme(name: str) -> Scheme:
    return build(named_node("quant", name, key="quant"), Scheme, key="quant")  # type: ignore[type-abstract]


def _moves(model: Transformer, row: list[int]) -> Tensor:
    """Change of the gap between the two best tokens at every position. [n]."""
    whole = torch.tensor([row], device=model.device)
    positions = torch.arange(len(row), device=model.device)
    at_once = model.logits(model(whole, positions, model.cache(len(row))).hidden[0]).double()
    kv = model.cache(len(row))
    one_by_one = []
    for i in range(len(row)):
        read = model(whole[:, i : i + 1], positions[i : i + 1], kv)
        kv.advance(1)
        one_by_one.append(model.logits(read.hidden[0, 0]).double())
    best = at_once.topk(2).indices
    first = at_once.gather(1, best)
    second = torch.stack(one_by_one).gather(1, best)
    return ((first[:, 0] - first[:, 1]) - (second[:, 0] - second[:, 1])).abs().cpu()


if __name__ == "__main__":
    main()
