"""What the arms of a block share, each loaded once: tokenizer, target, smaller models."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from bench.check import check_ids
from bench.config import Config, Settings
from bench.context import context
from bench.kernel_timing import copy_tb_per_s
from bench.schemes import Schemes
from bench.source import read_file
from methods.calibrate import load_calibrated
from methods.checkpoint import check_transformer, stored_in
from methods.decode import Method
from methods.drafter import Mark, unmarked
from methods.random_weights import is_random
from methods.recipe import Parts
from methods.transformer import Transformer
from methods.values import read_json
from quant.kernels import triton_cache
from quant.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What transformers raises on files that are torn or no tokenizer's.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
COPIES = 15  # timings of the device's own copy
# Classes that are nothing but their tokenizer.json.
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


class Loader:
    """Loads a target at once and smaller models when they are asked for."""

    def __init__(self, config: Config, *, mark: Mark = unmarked) -> None:
        """config: of any arm; what it says of its method does not matter here.

        mark: told `tokenizer`, `device`, and what a `Packer` tells.
        """
        model, schemes, settings = config.model, config.schemes, config.settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.model = model
        self._schemes = schemes
        self._mark = mark
        self.tokenizer = load_tokenizer(model.family.target)
        mark("tokenizer")
        self.device = torch.device(settings.device)
        self.copy_tb_per_s = None
        if self.device.type == "cuda":
            triton_cache.prepare()
            self.copy_tb_per_s = copy_tb_per_s(self.device, repeats=COPIES)
        mark("device")
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._texts: list[list[int]] | None = None
        self._loaded: dict[tuple[Path, Scheme, Scheme, bool], Transformer] = {}
        # What else is loaded drafts or is held against: its rounding decides no token.
        self.target = self._load(
            model.family.target, schemes, schemes.target, schemes.lm_head, exact=settings.exact
        )

    @property
    def kernels(self) -> dict[str, str]:
        """What computes the target's layers, by shape KxN; several are joined by a plus."""
        found: dict[str, set[str]] = defaultdict(set)
        for layer in self.target.linears.values():
            found[f"{layer.in_features}x{layer.out_features}"].add(layer.kernel)
        return {shape: "+".join(sorted(names)) for shape, names in sorted(found.items())}

    def context(self, argv: Sequence[str], config: Config) -> dict[str, Any]:
        """Describe this process and its machine, for an arm's cell.

        argv: of the command that asked for the work. config: the arm's.
        """
        return context(
            self.device,
            argv,
            self.kernels,
            exact=config.settings.exact,
            draft_vocab=config.draft_vocab.facts(self.model.family.target),
            copy_tb_per_s=self.copy_tb_per_s,
        )

    def method(self, config: Config) -> Method:
        """Join a method's settings to loaded models."""
        return config.recipe.method(self.parts(config))

    def parts(self, config: Config) -> Parts:
        """What an arm's method is made from."""
        settings, schemes = config.settings, config.schemes
        return Parts(
            target=self.target,
            family=self.model.family,
            rule=config.rule,
            context=context_of(settings, self.target),
            scheme=schemes.draft,
            lm_head=schemes.draft_lm_head,
            target_lm_head=schemes.lm_head,
            dense=schemes.dense,
            draft_ids=config.draft_ids,
            load=lambda folder: self._load(
                folder, schemes, schemes.draft, schemes.draft_lm_head or schemes.dense
            ),
        )

    def dense(self, folder: Path) -> Transformer:
        """Load a model unquantised; the target itself where that is what it is."""
        schemes, plain = self._schemes, self._schemes.dense
        stored = stored_in(folder, schemes.target, schemes.lm_head)
        if folder == self.model.family.target and {stored.label, stored.lm_head} == {plain.label}:
            return self.target
        return self._load(folder, schemes, plain, plain)

    def _load(
        self,
        folder: Path,
        schemes: Schemes,
        scheme: Scheme,
        lm_head: Scheme,
        *,
        exact: bool = False,
    ) -> Transformer:
        key = (folder, scheme, lm_head, exact)
        if key not in self._loaded:
            self._loaded[key] = load_calibrated(
                folder,
                scheme=scheme,
                dense=schemes.dense,
                lm_head=lm_head,
                dtype=self._dtype,
                device=self.device,
                texts=self._calibration() if scheme.needs_absmax or lm_head.needs_absmax else [],
                mark=self._mark,
                exact=exact,
            )
        return self._loaded[key]

    def _calibration(self) -> list[list[int]]:
        if self._texts is None and self.model.calibration is not None:
            texts = [str(row.get("text")) for row in read_file(self.model.calibration)]
            most = check_transformer(self.model.family.target).max_positions
            read = [self.tokenizer(text)["input_ids"][:most] for text in texts]
            check_ids(self.model.family.target, chain.from_iterable(read))
            self._texts = read
        return self._texts or []


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Read a checkpoint's tokenizer, or raise ValueError naming the folder.

    Where weights are made up, a token's text is its number, and nothing ends an answer.
    """
    if is_random(folder):
        return _numbers(check_transformer(folder).vocab_size)
    config = folder / "tokenizer_config.json"
    try:
        named = read_json(config).get("tokenizer_class")
        # AutoTokenizer would give the same, after importing every model for a second or two.
        plain = named in PLAIN and (folder / "tokenizer.json").is_file()
        kind = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
        return kind.from_pretrained(folder, local_files_only=True)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} must have a tokenizer: {reason}") from error


def _numbers(vocab_size: int) -> "PreTrainedTokenizerBase":
    words = Tokenizer(WordLevel({str(token): token for token in range(vocab_size)}))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


def context_of(settings: Settings, target: Transformer) -> int:
    """Decided tokens that a generation may hold."""
    return settings.context or target.shape.max_positions
