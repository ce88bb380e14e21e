"""Tasks: a yaml names data, prompt form and stop rule; `load` and `encode` make token ids of it.

    task = ...                                   # from conf/task/*.yaml
    for prompt in load(task):
        ids = encode(tokenizer, task, prompt, history=[])
        output = generate(method, ids, limit=task.max_new_tokens, stop=Stopper(tokenizer, task))
        answer = cut(output.token_ids, tokenizer, task)

The corrected protocol is the default: one BOS, a stop at the end of a turn and at the task's stop
strings. `paper_faithful` repeats what arXiv 2505.22179's release does: a plain task never stops
(GSM8K always decodes max_new_tokens), a chat stops at EOS and <|eot_id|> only, stop strings are not
looked at while decoding, and a chat with an answer prefix (HumanEval) begins with two BOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from bench.build import ROOT, named_node
from bench.score import Scorer, Unscored
from bench.source import Row, Source, draw, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = ("plain", "chat")
PROTOCOLS = ("corrected", "paper_faithful")

_PAPER_STOP_TOKENS = ("<|eot_id|>",)  # besides EOS, in the chats of the paper's release

# Llama-3.1's own default for the date its template writes; without it a template may write the
# day of the run, and two runs of a campaign would read different prompts.
_DATE = "26 Jul 2024"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as the tokenizer gets it: few-shot preamble and template are already in it.

    reference: what a scorer needs, text or a JSON object; None where nothing is scored.
    """

    prompt_id: str
    category: str
    turns: tuple[str, ...]
    reference: str | None


@dataclass(frozen=True, kw_only=True)
class Task(Source):
    """Where prompts come from, what the model reads, and when it is stopped."""

    draw_lengths: list[int] | None  # rows are not read but drawn: random tokens, as many as these
    draw_below: int | None  # ids that are drawn are below it
    prompt_key: str  # a string, or a list of strings (turns)
    id_key: str | None  # None = <name>/<row from 0>
    category_key: str | None  # None = the task's name
    fold: dict[str, str]  # category in the data -> category in the tables
    reference_keys: list[str]  # one = its text; more = a JSON object
    reference_mark: str | None  # the reference is the number after this mark
    scorer: Scorer
    form: str  # plain | chat
    system: str | None  # chat: system prompt
    preamble: str | None  # file in the checkout, put before a prompt with an empty line between
    template: str  # {prompt} is replaced in every turn
    answer_prefix: str  # chat: the answer's opening, read by the model, not generated
    max_new_tokens: int
    stop: list[str]  # strings that end an answer
    stop_tokens: list[str]  # tokens that end an answer besides EOS, where the vocabulary has them
    protocol: str  # corrected | paper_faithful
    limit: int | None  # prompts at most, spread over the categories; None = all

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {self.form!r}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {PROTOCOLS}, got {self.protocol!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, or null for all, got {self.limit}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if "{prompt}" not in self.template:
            raise ValueError(f"template must contain {{prompt}}, got {self.template!r}")
        if self.form == "plain" and (self.system or self.answer_prefix):
            raise ValueError("system and answer_prefix must be empty where form is plain")
        if not self.reference_keys and not isinstance(self.scorer, Unscored):
            raise ValueError("reference_keys must be given where answers are scored")
        if self.draw_lengths is not None and min(self.draw_below or 0, *self.draw_lengths, 1) < 1:
            raise ValueError(
                "draw_lengths and draw_below must be 1 or more, got "
                f"{list(self.draw_lengths)} and {self.draw_below}"
            )
        if "" in self.stop:
            raise ValueError(f"stop must not contain an empty string, got {list(self.stop)}")

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings that are looked for while decoding."""
        return [] if self.protocol == "paper_faithful" else list(self.stop)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """New tokens up to a stop or the limit, stop token included, and their text without it."""

    token_ids: list[int]
    text: str
    stop: str  # stop | limit


class Stopper:
    """When to stop: told all new tokens of one generation, says how many to keep, or None.

    Kept are the tokens up to the one that is a stop token or completes a stop string, wherever a
    step's tokens begin and end. One object serves one generation: it looks at each token once.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", task: Task) -> None:
        self._tokenizer = tokenizer
        self._ids = stop_ids(tokenizer, task)
        self._strings = task.stop_strings
        # A token has a byte or more, so this many end with the whole string; the slack is for
        # decoders that treat the first token of a text in a special way.
        self._window = max((len(s.encode()) for s in self._strings), default=0) + 8
        self._num_read = 0
        self._starts = [0]  # where a character begins; the first is where the window begins

    def __call__(self, token_ids: list[int]) -> int | None:
        """token_ids: all new tokens so far, those of earlier calls first."""
        assert len(token_ids) >= self._num_read, "a Stopper serves one generation"
        for end in range(self._num_read + 1, len(token_ids) + 1):
            if token_ids[end - 1] in self._ids or self._completes(token_ids, end):
                return end
        self._num_read = len(token_ids)
        return None

    def _completes(self, token_ids: list[int], end: int) -> bool:
        if not self._strings:
            return False
        while len(self._starts) > 1 and self._starts[1] <= end - self._window:
            self._starts.pop(0)
        text = _decode(self._tokenizer, token_ids[self._starts[0] : end])
        if not text.endswith("\ufffd"):  # half a character
            self._starts.append(end)
        return any(string in text for string in self._strings)


def load(task: Task) -> list[Prompt]:
    """Read a task's prompts, in the order of the data; a limit spreads them over categories."""
    drawn, below = task.draw_lengths, task.draw_below or 0
    rows = task.rows() if drawn is None else draw(task.name, drawn, below=below)
    if not rows:
        raise ValueError(f"task {task.name}: the data must have a prompt or more, got none")
    preamble = _preamble(task)
    prompts = [_prompt(task, row, i, preamble) for i, row in enumerate(rows)]
    seen: dict[str, str] = {}
    for prompt, row in zip(prompts, rows, strict=True):
        if prompt.prompt_id in seen:
            raise ValueError(
                f"{row.place}: prompt ids must differ, {prompt.prompt_id!r} also stands at "
                f"{seen[prompt.prompt_id]}"
            )
        seen[prompt.prompt_id] = row.place
    if task.limit is None:
        return prompts
    return [prompts[i] for i in spread([p.category for p in prompts], task.limit)]


def encode(
    tokenizer: "PreTrainedTokenizerBase", task: Task, prompt: Prompt, history: Sequence[str]
) -> list[int]:
    """Token ids of the next turn. history: the model's own answers to the turns before it.

    A plain prompt begins with one BOS where the tokenizer has one. A chat prompt begins as the
    template says, with one BOS at most: a template that writes none means none.
    """
    assert len(history) < len(prompt.turns), "every turn has its answer already"
    bos: int | None = tokenizer.bos_token_id
    if task.form == "plain":
        ids = _ids(tokenizer, prompt.turns[0])
        return ids if bos is None else [bos, *_without_head(ids, bos)]
    ids = _ids(tokenizer, _chat_text(tokenizer, task, prompt, history))
    if bos is None or ids[:1] != [bos]:
        return ids
    twice = task.protocol == "paper_faithful" and task.answer_prefix
    return [bos] * (2 if twice else 1) + _without_head(ids, bos)


def stop_ids(tokenizer: "PreTrainedTokenizerBase", task: Task) -> frozenset[int]:
    """Tokens that end an answer: EOS and those of the task's names that the vocabulary has."""
    faithful = task.protocol == "paper_faithful"
    if faithful and task.form == "plain":
        return frozenset()
    names = _PAPER_STOP_TOKENS if faithful else task.stop_tokens
    ids = (tokenizer.convert_tokens_to_ids(name) for name in names)
    known = {i for i in ids if i is not None and i != tokenizer.unk_token_id}
    eos: int | None = tokenizer.eos_token_id
    return frozenset(known if eos is None else known | {eos})


def find_stop(text: str, task: Task) -> int | None:
    """Where the first stop string begins, or None."""
    found = [place for s in task.stop_strings if (place := text.find(s)) >= 0]
    return min(found, default=None)


def cut(token_ids: list[int], tokenizer: "PreTrainedTokenizerBase", task: Task) -> Cut:
    """Cut new tokens at the first stop or the limit; what is cut already stays as it is."""
    token_ids = token_ids[: task.max_new_tokens]
    stopper = Stopper(tokenizer, task)
    keep = stopper(token_ids)
    if keep is None:
        return Cut(token_ids=token_ids, text=_decode(tokenizer, token_ids), stop="limit")
    token_ids = token_ids[:keep]
    ended = token_ids[-1] in stop_ids(tokenizer, task)
    text = _decode(tokenizer, token_ids[:-1] if ended else token_ids)
    return Cut(token_ids=token_ids, text=text[: find_stop(text, task)], stop="stop")


def _preamble(task: Task) -> str:
    if task.preamble is None:
        return ""
    path = ROOT / task.preamble
    if not path.is_file():
        raise ValueError(f"task {task.name}: preamble must be a file, got {path}")
    return path.read_text(encoding="utf-8").rstrip("\n") + "\n\n"


def _prompt(task: Task, row: Row, number: int, preamble: str) -> Prompt:
    turns = row.texts(task.prompt_key)
    scored = not isinstance(task.scorer, Unscored)
    if len(turns) > 1 and (task.form == "plain" or task.answer_prefix or scored):
        kinds = "a plain, prefixed or scored prompt"
        raise ValueError(f"{row.place}: {kinds} has 1 turn, got {len(turns)}")
    reference = row.reference(task.reference_keys, mark=task.reference_mark)
    try:
        task.scorer.check(reference)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from error
    category = str(row.get(task.category_key)) if task.category_key else task.name
    return Prompt(
        prompt_id=str(row.get(task.id_key)) if task.id_key else f"{task.name}/{number}",
        category=task.fold.get(category, category),
        turns=tuple(preamble + task.template.replace("{prompt}", turn) for turn in turns),
        reference=reference,
    )


def _chat_text(
    tokenizer: "PreTrainedTokenizerBase", task: Task, prompt: Prompt, history: Sequence[str]
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"task {task.name} needs a chat template, the tokenizer has none: take a task of plain "
            f"prompts, {' or '.join(f'task={name}' for name in _plain_tasks())}"
        )
    messages = [{"role": "system", "content": task.system}] if task.system else []
    for user, answer in zip(prompt.turns, history, strict=False):
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": prompt.turns[len(history)]})
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string=_DATE
        )
    except TemplateError as error:  # some templates take no system prompt
        raise ValueError(f"task {task.name}: the chat template refuses: {error}") from error
    return text + task.answer_prefix


def _plain_tasks() -> list[str]:
    names = sorted(path.stem for path in (ROOT / "conf" / "task").glob("*.yaml"))
    return [name for name in names if named_node("task", name, key="task").get("form") == "plain"]


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _decode(tokenizer: "PreTrainedTokenizerBase", token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    return text


def _without_head(ids: list[int], token: int) -> list[int]:
    return list(dropwhile(lambda i: i == token, ids))
