"""What lm-evaluation-harness says of GSM8K answers, by its own task files, filters and metric.

The harness brings more than a hundred megabytes of packages, so its verdicts on the texts below
are kept as data. To make them again, in an environment of their own:

    python -m venv /tmp/harness && /tmp/harness/bin/pip install lm_eval==0.4.13 torch transformers
    PYTHONPATH=. /tmp/harness/bin/python -m tests.bench.lm_eval_oracle

Where `lm_eval` can be imported the tests ask it as well.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

VERDICTS = Path(__file__).parent / "data" / "gsm8k_verdicts.json"
# Our name -> the task file of the harness, relative to its tasks, and the name there.
NAMES = {
    "strict": ("gsm8k/gsm8k.yaml", "strict-match"),
    "strict_cot": ("gsm8k/gsm8k-cot.yaml", "strict-match"),
    "flexible": ("gsm8k/gsm8k.yaml", "flexible-extract"),
}

NUMBERS = ["18", "-3", "0.5", "1,250", "$2,125", "18.00", "18.", "$.75", "007", "1e3", "2/3", "5%"]
FORMS = [
    "{}",
    "The answer is {}.",
    "the answer is {}.",
    "The answer is {}",
    "The answer is: {}.",
    "The answer is ${}.",
    "The answer is **{}**.",
    "She has 4 + 5 = 9 left. The answer is {}.\n\nQ: There are 6 birds. The answer is 7.",
    "4 * 3 = <<4*3=12>>12 dollars\n#### {}",
    "#### {}\n#### 99",
    "####{}",
    "So {} of the 12, or 1.5 each, e.g. 3-4...",
    "x = {} - 2, y ={}-2.\nDone.",
    r"\boxed{{{}}}",
]
WITHOUT = [
    "",
    " ",
    "The answer is",
    "I do not know.",
    "#### none",
    "...",
    "$",
    "-",
    "\u0663 \u00b2",
]
REFERENCES = ["18", "-3", "0.5", "1250", "2125", "7", "99"]


def texts() -> list[str]:
    """Answers in every form, and answers without one."""
    filled = (form.replace("{}", number) for form, number in itertools.product(FORMS, NUMBERS))
    return [*dict.fromkeys(filled), *WITHOUT]


def verdicts(name: str, answers: Sequence[str], references: Sequence[str]) -> Iterator[bool]:
    """Ask the harness: filter `name` over answers, each against its reference."""
    import lm_eval.filters  # optional; fills the registry
    import lm_eval.tasks
    import yaml
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.api.registry import get_filter

    file, own = NAMES[name]
    path = Path(lm_eval.tasks.__file__).parent / file
    task: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    (steps,) = [f["filter"] for f in task["filter_list"] if f["name"] == own]
    found: Any = [[answer] for answer in answers]
    for step in steps:
        settings = {key: value for key, value in step.items() if key != "function"}
        found = get_filter(step["function"])(**settings).apply(found, [{} for _ in found])
    (metric,) = task["metric_list"]
    options = {
        key: value
        for key, value in metric.items()
        if key not in ("metric", "aggregation", "higher_is_better")
    }
    for prediction, reference in zip(found, references, strict=True):
        score = exact_match_fn(predictions=[prediction], references=[reference], **options)
        yield bool(score["exact_match"])


def main() -> None:
    """Write the verdicts."""
    pairs = list(itertools.product(texts(), REFERENCES))
    answers, references = [a for a, _ in pairs], [r for _, r in pairs]
    kept = {
        name: [
            [answer, reference]
            for (answer, reference), right in zip(
                pairs, verdicts(name, answers, references), strict=True
            )
            if right
        ]
        for name in NAMES
    }
    values = {"lm_eval": version("lm_eval"), "pairs": len(pairs), "right": kept}
    VERDICTS.parent.mkdir(exist_ok=True)
    VERDICTS.write_text(json.dumps(values, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
