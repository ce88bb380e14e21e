"""The rows of a report's tables: every column has one definition, here.

None stands where nothing was or could be measured; bounds are those of an interval.
"""

from dataclasses import dataclass

DENSE = "dense"


def is_dense(scheme: str) -> bool:
    """Tell whether a scheme's label names unquantised weights."""
    return scheme.startswith(DENSE)


def is_synthetic(*, weights: str, acceptance: str) -> bool:
    """Tell whether tokens mean nothing: random weights, or acceptance that was replayed."""
    return weights == "random" or acceptance != "measured"


def target_label(scheme: str, lm_head: str, folder: str, *, exact: bool = False) -> str:
    """Name a target: its scheme, lm_head's where it is quantised too, a folder of its own.

    exact: where it stands beside others that are not.
    """
    head = "" if is_dense(lm_head) else f", lm_head {lm_head}"
    return scheme + head + ", exact" * exact + (f" ({folder})" if folder else "")


def arm_label(method: str, draft_scheme: str) -> str:
    """Name a method, and its drafter's scheme where that is more than dense."""
    return method + (f", drafter {draft_scheme}" if draft_scheme not in ("", DENSE) else "")


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """One cell of generations as table.csv has it; None where nothing was or could be measured."""

    model: str
    weights: str
    scheme: str
    draft_scheme: str
    method: str
    task: str
    device: str
    num_prompts: int
    num_tokens: int
    tokens_per_s: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    acceptance_length: float | None = None
    agreement: float | None = None
    status: str
    dtype: str
    exact: bool = False  # rows of the target do not depend on how many tokens are read
    lm_head: str
    acceptance: str
    temperature: float
    acceptance_low: float | None = None
    acceptance_high: float | None = None
    speedup_decode: float | None = None
    speedup_request: float | None = None
    lossless: str = ""
    num_ties: int | None = None
    num_differences: int | None = None
    num_too_long: int
    num_steps: int | None = None
    drafted_per_step: float | None = None
    share_draft_prefill: float | None = None
    share_host: float | None = None
    share_draft: float | None = None
    share_verify: float | None = None
    share_commit: float | None = None
    host_gap_share: float | None = None
    predicted_speedup: float | None = None
    reason: str
    cell: str
    compatibility: float | None = None  # speed-up over the dense target's, same method
    compatibility_low: float | None = None
    compatibility_high: float | None = None
    num_paired: int | None = None  # turns the speed-up rests on
    num_incomparable: int | None = None  # later turns after a different answer
    acceptance_change: float | None = None  # tau less the dense target's, same method and prompts
    acceptance_change_low: float | None = None
    acceptance_change_high: float | None = None
    accuracy: float | None = None  # share of the scored answers that are correct
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    num_scored: int = 0
    acceptance_at: tuple[float, ...] = ()
    folder: str = ""  # of the target, where it is not the model's own
    unpredicted: str = ""  # why there is no predicted speed-up, where costs were measured
    # The whole card's, from costs that were held; without the host, the commit and the prompt.
    joules_per_token: float | None = None
    energy_ratio: float | None = None  # plain decoding's joules over these: above 1 saves energy

    @property
    def synthetic(self) -> bool:
        """Random weights or replayed acceptance: costs are real, tokens mean nothing."""
        return is_synthetic(weights=self.weights, acceptance=self.acceptance)

    @property
    def group(self) -> tuple[object, ...]:
        """What the cells of one matrix share."""
        machine = (self.device, self.dtype, self.exact)
        return (self.model, self.weights, self.task, *machine, self.temperature)

    @property
    def target(self) -> str:
        """The row of a matrix."""
        return target_label(self.scheme, self.lm_head, self.folder)

    @property
    def arm(self) -> str:
        """The column of a matrix: the method, and what is unusual about its drafter."""
        replayed = "" if self.acceptance == "measured" else f" [{self.acceptance}]"
        return arm_label(self.method, self.draft_scheme) + replayed


@dataclass(frozen=True, kw_only=True)
class CategoryRow:
    """One category of one cell of generations as categories.csv has it."""

    model: str
    weights: str
    scheme: str
    draft_scheme: str
    method: str
    task: str
    device: str
    acceptance: str
    cell: str
    category: str
    num_prompts: int
    num_tokens: int
    tokens_per_s: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    acceptance_length: float | None
    acceptance_low: float | None
    acceptance_high: float | None
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    num_scored: int


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One timed forward or proposal as cost.csv has it."""

    what: str
    method: str
    scheme: str
    n: int | None = None
    context: int | None = None
    batch: int | None = None
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    count: int | None = None
    ratio: float | None = None  # to T_1: the same target reading one token
    ratio_low: float | None = None
    ratio_high: float | None = None
    tokens_per_s_at_n: float | None = None
    gb_per_s: float | None = None
    forwards: int | None = None
    model: str
    weights: str
    lm_head: str
    draft_scheme: str
    device: str
    dtype: str
    exact: bool = False
    status: str
    reason: str
    cell: str
    folder: str = ""
    energy_mj: float | None = None  # of one, repeated back to back
    held_ms: float | None = None  # likewise
    sm_mhz: int | None = None  # meanwhile
    power_capped: bool | None = None

    @property
    def target(self) -> str:
        """A line of a figure."""
        return target_label(self.scheme, self.lm_head, self.folder, exact=self.exact)

    @property
    def arm(self) -> str:
        """The method, and its drafter's scheme where it is quantised."""
        return arm_label(self.method, self.draft_scheme)


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """What one scheme costs on one text as quality.csv has it."""

    model: str
    weights: str
    scheme: str
    lm_head: str
    task: str
    device: str
    dtype: str
    num_windows: int
    num_tokens: int
    perplexity: float | None = None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    increase: float | None = None  # perplexity less the dense target's, over the same windows
    increase_low: float | None = None
    increase_high: float | None = None
    kl_nats: float | None = None  # KL(dense || scheme) per token
    kl_low: float | None = None
    kl_high: float | None = None
    top1_agreement: float | None = None  # share of tokens with dense's first choice
    top1_low: float | None = None
    top1_high: float | None = None
    num_paired: int | None = None  # windows that the increase rests on
    status: str
    reason: str
    cell: str
    folder: str = ""

    @property
    def target(self) -> str:
        """The row of a matrix that this is the price of."""
        return target_label(self.scheme, self.lm_head, self.folder)

    @property
    def group(self) -> tuple[str, ...]:
        """What the rows of one comparison share."""
        return (self.model, self.weights, self.task, self.device, self.dtype)
