"""What a scheme wants to know of activations before it rounds weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.checkpoint import check_transformer, load_transformer
from methods.drafter import Mark, unmarked
from methods.random_weights import is_random, typical_absmax
from methods.transformer import Transformer
from quant.scheme import Scheme


def load_calibrated(
    folder: Path,
    *,
    scheme: Scheme,
    dense: Scheme,
    lm_head: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    texts: Sequence[list[int]],
    mark: Mark = unmarked,
    exact: bool = False,
) -> Transformer:
    """Read a model in a scheme; where the scheme asks for it, run the dense model on `texts` first.

    texts: token ids. mark: told where the time goes, and exact: as a `Packer`'s. Raises ValueError
    where the scheme needs texts and there are none; made-up weights need none.
    """
    absmax: dict[str, Tensor] | None = None
    asking = [s.label for s in (scheme, lm_head) if s.needs_absmax]
    if asking and is_random(folder):
        absmax = typical_absmax(check_transformer(folder), device)
    elif asking:
        if not texts:
            raise ValueError(f"{asking[0]} must have calibration text, got none for {folder}")
        plain = load_transformer(folder, scheme=dense, lm_head=dense, dtype=dtype, device=device)
        absmax = input_absmax(plain, texts)
        mark("calibration")
    return load_transformer(
        folder,
        scheme=scheme,
        lm_head=lm_head,
        dtype=dtype,
        device=device,
        absmax=absmax,
        mark=mark,
        exact=exact,
    )


def input_absmax(model: Transformer, texts: Sequence[list[int]]) -> dict[str, Tensor]:
    """Largest magnitude of every input channel of every linear layer: name -> [K]."""
    seen: dict[str, Tensor] = {}
    with _watching(model, seen):
        for text in texts:
            tokens = torch.tensor([text], device=model.device)
            positions = torch.arange(len(text), device=model.device)
            model.logits(model(tokens, positions, model.cache(len(text))).hidden)
    return seen


@contextmanager
def _watching(model: Transformer, seen: dict[str, Tensor]) -> Iterator[None]:
    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].flatten(0, -2).abs().amax(dim=0)
            seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

        return layer.register_forward_pre_hook(note)

    handles = [watch(name, layer) for name, layer in model.linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
