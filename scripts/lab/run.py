"""One training run: its stages, what they leave behind and what it measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lab.corpus import END, read_corpus, read_prompts, token_id
from lab.fit import (
    Curve,
    Plan,
    Rows,
    clock,
    fit_heads,
    fit_small,
    fit_target,
    mixed_batches,
    own_text,
)
from lab.heads import Eagle2Head, Eagle3Head, Head, head_shape
from lab.llama import Llama, Shape, load_half, save_half, write_json
from lab.measure import (
    Continued,
    agreement,
    before_repeats,
    chain_of_head,
    chain_of_model,
    continue_prompts,
    held_out_loss,
    quality,
)

STAGES = ("target", "small", "target-heads", "small-heads", "loss", "acceptance")
HEADS = ("eagle2", "eagle3")
NEW_TOKENS = 128
REPEAT = 8  # tokens that make a repetition


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training run is made of."""

    target: Shape
    small: Shape
    draft_vocab: int
    plans: dict[str, Plan]
    row: int  # tokens of a row of own text
    own_batches: int
    own_batch: int
    unroll: int


class Run:
    """One training run: its models, and its record, saved after every stage."""

    def __init__(
        self, recipe: Recipe, corpus: Path, out: Path, *, device: torch.device, start: Path | None
    ) -> None:
        self.recipe, self.corpus, self.out, self.device = recipe, corpus, out, device
        self.tokens = read_corpus(corpus)
        self.facts = json.loads((corpus / "corpus.json").read_text())
        torch.manual_seed(0)
        self.target, self.small = Llama(recipe.target), Llama(recipe.small)
        counts = torch.bincount(
            torch.from_numpy(self.tokens["train"].stream.astype("int64")),
            minlength=recipe.target.vocab,
        )
        frequent = counts.topk(recipe.draft_vocab).indices.sort().values
        self.heads: dict[str, Head] = {}
        for name, shape in (("target", recipe.target), ("small", recipe.small)):
            self.heads[f"{name}-eagle2"] = Eagle2Head(head_shape(shape))
            self.heads[f"{name}-eagle3"] = Eagle3Head(head_shape(shape), frequent)
        for name, module in self.modules().items():
            if start is not None and (start / f"{name}.safetensors").exists():
                load_half(module, start / f"{name}.safetensors")
            module.to(device).eval()
        past = None if start is None else start / "training.json"
        record = json.loads(past.read_text()) if past and past.exists() else {"runs": []}
        self.record: dict[str, list[object]] = record
        self.own: dict[str, Tensor] = {}
        self.stages: dict[str, object] = {}
        self.record["runs"].append(self.stages)
        self.stages["recipe"] = asdict(recipe)
        self.stages["device"] = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        )
        self.stages["torch"] = torch.__version__

    def modules(self) -> dict[str, nn.Module]:
        """All models by name."""
        return {"target": self.target, "small": self.small, **self.heads}

    def compile(self) -> None:
        """Compile the layers of both models."""
        torch._dynamo.config.recompile_limit = 64  # each shape and mode counts as one
        for model in (self.target, self.small):
            for layer in model.model.layers:
                layer.compile(dynamic=False)

    def rows(self, length: int, seed: int) -> Rows:
        """Training rows of one length."""
        return Rows(self.tokens["train"], length=length, seed=seed, device=self.device)

    def held_out(self, model: Llama) -> Callable[[], float]:
        """A closure that measures the held-out loss in the training precision."""
        split, length = self.tokens["heldout"], self.recipe.target.positions
        return lambda: held_out_loss(model, split, length=length, half=True)

    def own_text(self, name: str) -> Tensor:
        """The greedy text of one of the models, made once."""
        if name not in self.own:
            model = {"target": self.target, "small": self.small}[name]
            rows = self.rows(self.recipe.row, seed=10)
            recipe = self.recipe
            self.own[name] = own_text(
                model, rows, batches=recipe.own_batches, batch=recipe.own_batch
            )
        return self.own[name]

    def stage(self, name: str) -> None:
        """Run one stage and save what it made."""
        begun = clock(self.device)
        torch.manual_seed(self.recipe.plans[name].seed if name in self.recipe.plans else 0)
        if name == "loss":
            self.stages[name] = self.loss()
        elif name == "acceptance":
            self.stages[name] = self.acceptance()
        else:
            self.stages[name] = asdict(self._train(name))
            for key, module in self.modules().items():
                if key == name or key in (name.replace("heads", kind) for kind in HEADS):
                    save_half(module.state_dict(), self.out / f"{key}.safetensors")
        self.stages[f"{name}_wall_s"] = round(clock(self.device) - begun, 1)
        write_json(self.out / "training.json", self.record)

    def _train(self, name: str) -> Curve:
        plan = self.recipe.plans[name]
        length = self.recipe.target.positions
        if name == "target":
            rows = self.rows(plan.length + 1, plan.seed)
            return fit_target(self.target, rows, plan, self.held_out(self.target))
        model = self.small if name == "small-heads" else self.target
        texts = [self.own_text("target")]
        if model is self.small:
            texts.append(self.own_text("small"))
        batches = mixed_batches(self.rows(length + 1, plan.seed), texts, plan)
        if name == "small":
            return fit_small(self.small, self.target, batches, plan, self.held_out(self.small))
        owner = name.removesuffix("-heads")
        heads = [head for key, head in self.heads.items() if key.startswith(owner)]
        return fit_heads(heads, model, batches, plan, steps=self.recipe.unroll)

    def loss(self) -> dict[str, object]:
        """Held-out loss in fp32, of the weights as they stand and as the fp16 files hold them."""
        split, length = self.tokens["heldout"], self.recipe.target.positions
        result: dict[str, object] = {}
        for name, model in (("target", self.target), ("small", self.small)):
            for kind in ("trained", "fp16_file"):
                if kind == "fp16_file":
                    model.load_state_dict(
                        {key: value.half().float() for key, value in model.state_dict().items()}
                    )
                result[f"{name}_{kind}"] = quality(
                    held_out_loss(model, split, length=length, half=False),
                    tokens=self.facts["heldout_tokens"],
                    size_bytes=self.facts["heldout_bytes"],
                )
        return result

    def acceptance(self) -> dict[str, object]:
        """Agreement on held-out text and acceptance along greedy text, in fp32."""
        split, length = self.tokens["heldout"], self.recipe.target.positions
        result: dict[str, object] = {
            "small_and_target": agreement(self.target, self.small, split, length=length)
        }
        tokenizer = Tokenizer.from_file(str(self.corpus / "tokenizer.json"))
        prompts = read_prompts(self.corpus / "heldout.jsonl")
        ids = [tokenizer.encode(prompt.text).ids for prompt in prompts]
        for name, model in (("target", self.target), ("small", self.small)):
            text = continue_prompts(model, ids, NEW_TOKENS, token_id(tokenizer, END))
            fresh = before_repeats(text, size=REPEAT)
            made = sum(text.ends) - sum(text.begins)
            result[f"{name}_greedy"] = {
                "prompts": len(prompts),
                "tokens": made,
                "tokens_before_repeats": sum(fresh.ends) - sum(fresh.begins),
                "all": self._acceptance(name, text),
                "before_repeats": self._acceptance(name, fresh),
            }
        return result

    def _acceptance(self, name: str, text: Continued) -> dict[str, object]:
        """Acceptance of every drafter of one of the models along its greedy text."""
        model = {"target": self.target, "small": self.small}[name]
        found: dict[str, object] = {}
        if model is self.target:
            found["small_chain_7"] = asdict(chain_of_model(self.small, text, depth=7))
        for kind in HEADS:
            head = self.heads[f"{name}-{kind}"]
            for label, width in (("chain_6", 1), ("bound_6_of_10", 10)):
                acceptance = chain_of_head(head, model, text, depth=6, width=width)
                found[f"{kind}_{label}"] = asdict(acceptance)
        return found
