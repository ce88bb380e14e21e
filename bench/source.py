"""Rows of a data file or of a data set on the hub, and which of them a limit keeps.

JSONL and plain text are read by the standard library; Parquet and the hub need the extra `data`.
"""

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.build import ROOT
from bench.hub import TIMEOUT_S
from methods.values import parse_json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row. place: `file:line` or `data set:row`, both from 1, for messages."""

    place: str
    values: dict[str, Any]

    def get(self, key: str) -> Any:  # noqa: ANN401  a row holds whatever its file holds
        """The value under a key that the task needs."""
        if self.values.get(key) is None:
            raise ValueError(f"{self.place}: a row must have the key {key!r}")
        return self.values[key]

    def texts(self, key: str) -> list[str]:
        """A string, as a list of one, or a list of strings."""
        value = self.get(key)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{self.place}: {key!r} must be a string or a list of strings")
        return texts

    def reference(self, keys: list[str], *, mark: str | None) -> str | None:
        """What a scorer compares with: nothing, one key's text, or several keys as JSON.

        mark: the text after the last one of it is a number, kept without commas and dollars.
        """
        if not keys:
            return None
        if len(keys) > 1:
            return json.dumps({key: self.get(key) for key in keys})
        text = str(self.get(keys[0]))
        if mark is None:
            return text
        _, found, answer = text.rpartition(mark)
        if not found:
            raise ValueError(f"{self.place}: {keys[0]!r} must contain {mark!r}")
        return answer.strip().replace(",", "").replace("$", "")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the rows of a task come from: what every yaml of conf/task has in common."""

    name: str
    path: str | None  # local .jsonl, .jsonl.gz, .parquet or .txt; wins over the hub
    data_dir: str | None  # what a relative path is relative to; None = the checkout
    hub: str | None  # id on the hub, or a folder that `datasets` can read
    hub_config: str | None
    hub_split: str | None

    @property
    def file(self) -> Path | None:
        """The local file; None where rows come from the hub."""
        if self.path is None:
            return None
        base = ROOT if self.data_dir is None else Path(self.data_dir).expanduser()
        return base / Path(self.path).expanduser()

    def rows(self) -> list[Row]:
        """Read all rows; ValueError where there is no file, or no data set."""
        if (path := self.file) is not None:
            if not path.is_file():
                other = (
                    f"task.path=null reads {self.hub} from the hub" if self.hub else "no hub copy"
                )
                raise ValueError(f"task {self.name}: path must be a file, got {path} ({other})")
            return read_file(path)
        if self.hub is None:
            raise ValueError(f"task {self.name} has no hub data set: give task.path=<file>")
        if self.hub_split is None:
            raise ValueError(f"task {self.name}: hub_split must be given where hub is, got null")
        return read_hub(self.hub, config=self.hub_config, split=self.hub_split)


def draw(name: str, lengths: list[int], *, below: int) -> list[Row]:
    """Draw the text of prompts of so many tokens, which is the numbers of their tokens.

    name: what the draws depend on, besides a prompt's place.
    """
    texts = []
    for i, length in enumerate(lengths):
        generator = random.Random(f"{name}/{i}")
        texts.append(" ".join(str(generator.randrange(below)) for _ in range(length)))
    return [Row(place=f"{name}:{i}", values={"text": text}) for i, text in enumerate(texts, 1)]


def read_file(path: Path) -> list[Row]:
    """Read a local .jsonl, .jsonl.gz, .parquet or .txt file whole; a .txt is one row, `text`."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return list(_jsonl(path))
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".txt":
        return [_plain(path)]
    raise ValueError(f"a task's path must end in .jsonl, .jsonl.gz, .parquet or .txt, got {path}")


def read_hub(hub: str, *, config: str | None, split: str) -> list[Row]:
    """Read one split of a data set through `datasets`: a hub id, or a folder with its files.

    `datasets` looks in its cache first, so HF_HUB_OFFLINE=1 works for what was read before.
    """
    try:
        import datasets  # optional, and slow to import
    except ImportError as error:
        raise ValueError(_needs_extra(f"the hub data set {hub}")) from error
    if not Path(hub).is_dir():
        _check_route(hub)
    try:
        table = datasets.load_dataset(hub, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the hub data set {hub} (config {config}, split {split}) cannot be read: {reason}; "
            "give a local file with task.path=<file>"
        ) from error
    return [
        Row(place=f"{hub}/{split}:{i}", values=dict(values))
        for i, values in enumerate(table, start=1)
    ]


def _check_route(hub: str) -> None:
    """Ask once for a data set, with a timeout: `datasets` tries again for half a minute.

    Any answer will do: what it means is for `datasets` to tell.
    """
    import huggingface_hub as hf
    from httpx import HTTPError

    try:
        hf.HfApi().dataset_info(hub, timeout=TIMEOUT_S)
    except (hf.errors.HfHubHTTPError, hf.errors.OfflineModeIsEnabled, hf.errors.HFValidationError):
        return
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"the hub data set {hub} cannot be had from {hf.constants.ENDPOINT} "
            f"({' '.join(str(error).split())}): HF_HUB_OFFLINE=1 takes what was read before; or "
            "give a local file with task.path=<file>"
        ) from error


def spread(categories: list[str], limit: int) -> list[int]:
    """Which `limit` rows to keep, given the category of each; in the order of the rows.

    Categories take turns, in the order in which they first appear, and each keeps rows at even
    distances. So a limit of the number of categories or more covers all of them, and the choice
    depends on the data and the limit only.
    """
    places: dict[str, list[int]] = {}
    for i, category in enumerate(categories):
        places.setdefault(category, []).append(i)
    share = dict.fromkeys(places, 0)
    left = min(limit, len(categories))
    while left:
        for category in [c for c in places if share[c] < len(places[c])][:left]:
            share[category] += 1
            left -= 1
    return sorted(
        places[category][i * len(places[category]) // n]
        for category, n in share.items()
        for i in range(n)
    )


def _jsonl(path: Path) -> Iterator[Row]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} must be a gzip file: {error}") from error
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{place}: a line must be a JSON object: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{place}: a line must be a JSON object, got {line[:40]!r}")
        yield Row(place=place, values=values)


def _plain(path: Path) -> Row:
    try:
        return Row(place=f"{path}:1", values={"text": path.read_text(encoding="utf-8")})
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}") from error


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # optional
    except ImportError as error:
        raise ValueError(_needs_extra(f"{path}")) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path} must be a Parquet file: {error}") from error
    return [Row(place=f"{path}:{i}", values=values) for i, values in enumerate(rows, start=1)]


def _needs_extra(what: str) -> str:
    return (
        f"reading {what} needs the extra `data` (pip install 'specquant[data]'); "
        "or give a local JSONL file with task.path=<file>"
    )
