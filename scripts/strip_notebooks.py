"""Remove outputs and execution counts from notebooks, so that a diff shows what was written.

    python scripts/strip_notebooks.py notebooks/*.ipynb

Exits 1 where a file was changed, as a pre-commit hook does.
"""

import json
import sys
from pathlib import Path


def main(paths: list[str]) -> int:
    """Strip files in place."""
    changed = [path for path in map(Path, paths) if strip(path)]
    for path in changed:
        sys.stdout.write(f"stripped {path}\n")
    return int(bool(changed))


def strip(path: Path) -> bool:
    """Strip one notebook; tell whether it had anything to strip."""
    before = path.read_text(encoding="utf-8")
    notebook = json.loads(before)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
            cell["execution_count"] = None
    after = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
