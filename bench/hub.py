"""Models by hub id: `org/name` or `org/name@revision` wherever a checkpoint folder can stand.

    place(name)        the folder that a name stands for; asks nobody
    fetch(name, key)   brings it here, and gives the name at its commit, which `place` understands

An existing folder wins over an id of the same spelling. The cache is looked at first, so that a
model that was fetched once costs no request and needs no network. Only what a checkpoint folder is
read for is fetched, never code; pickles only where there are no safetensors.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bench.build import ROOT
from bench.identity import CHECKPOINT_FILES

HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.))(?P<repo>\w[\w.-]*/[\w.-]*\w)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
DEFAULT_REVISION = "main"
PICKLES = ("*.bin", "*.bin.index.json")
FILES = (
    *(pattern for pattern in CHECKPOINT_FILES if pattern not in PICKLES),
    "generation_config.json",
    "added_tokens.json",
)
# Folders of a repository hold other formats (original/, onnx/); `consolidated` weights stand twice.
IGNORED = ("*/*", "*.py", "consolidated*")
SAFE = ".safetensors"
TIMEOUT_S = 10.0  # to the hub's first answer; downloads have their own timeouts and retries


def is_id(name: str) -> bool:
    """Tell whether a name is a hub id: of its form, and no folder."""
    return HUB_ID.fullmatch(name) is not None and not _folder(name).is_dir()


def place(name: str) -> Path:
    """Folder that a name stands for: itself, or a snapshot in the hub's cache.

    What is not here is a folder of that name which does not exist.
    """
    folder = _folder(name)
    found = HUB_ID.fullmatch(name)
    if found is None or folder.is_dir():
        return folder
    return _snapshot(found["repo"], found["revision"] or DEFAULT_REVISION, ()) or folder


def fetch(name: str, *, key: str) -> str:
    """Bring a model here; give its name, a hub id at the commit that came.

    key: where the name stands, for messages. Raises ValueError where it cannot be had.
    """
    folder = _folder(name)
    if folder.is_dir():
        return name
    found = HUB_ID.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{key} must be a checkpoint folder or a hub id, org/name or org/name@revision, got "
            f"{name!r}: {folder} is no folder{_elsewhere(name)}"
        )
    repo, revision = found["repo"], found["revision"] or DEFAULT_REVISION
    snapshot = _whole(repo, revision) or _download(repo, revision, key)
    return f"{repo}@{snapshot.name}"


def names(model: Mapping[str, Any], key: str = "model") -> Iterator[tuple[str, str]]:
    """Every folder or hub id of a model's node, after its full key."""
    yield f"{key}.target", model["target"]
    for head, name in model["heads"].items():
        yield f"{key}.heads.{head}", name
    if model.get("small") is not None:
        yield from names(model["small"], f"{key}.small")


def pinned(model: Mapping[str, Any], pins: Mapping[str, str]) -> dict[str, Any]:
    """Copy a model's node with names replaced by those that `fetch` gave for them."""
    small = model.get("small")
    return {
        **model,
        "target": pins.get(model["target"], model["target"]),
        "heads": {head: pins.get(name, name) for head, name in model["heads"].items()},
        "small": None if small is None else pinned(small, pins),
    }


def _folder(name: str) -> Path:
    return ROOT / Path(name).expanduser()


def _snapshot(repo: str, revision: str, files: Sequence[str]) -> Path | None:
    """Snapshot in the cache, unless it is known to lack some of these files."""
    import huggingface_hub as hf  # half a second that a folder does not cost

    try:
        found = hf.snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=list(files)
        )
    except hf.errors.LocalEntryNotFoundError:
        return None
    return Path(found)


def _whole(repo: str, revision: str) -> Path | None:
    """Snapshot in the cache that is known to be whole."""
    import huggingface_hub as hf

    try:
        listed = hf.get_cached_repo_tree(repo, revision=revision)
    except hf.errors.CachedRepoTreeNotFoundError:
        return None
    return _snapshot(repo, revision, _wanted(file.path for file in listed))


def _download(repo: str, revision: str, key: str) -> Path:
    import huggingface_hub as hf
    from httpx import HTTPError

    try:
        # Asked first, because it has a timeout: the download itself waits for a route for minutes.
        info = hf.HfApi().model_info(
            repo, revision=revision, timeout=TIMEOUT_S, files_metadata=True
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = _wanted(sizes)
        megabytes = sum(sizes[name] for name in wanted) / 1e6
        sys.stderr.write(
            f"{repo}@{info.sha}: {len(wanted)} files, {megabytes:,.1f} MB from the hub\n"
        )
        return Path(hf.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (HTTPError, OSError) as error:
        # An older client leaves no list of a repository's files: what it cached is taken as it is.
        answered = isinstance(error, hf.errors.HfHubHTTPError)
        if not answered and (snapshot := _snapshot(repo, revision, FILES)) is not None:
            return snapshot
        told = f"{_folder(repo)} is no folder, and {_reason(error, repo, revision)}"
        raise ValueError(f"{told}; or give {key}=<folder>{_elsewhere(repo)}") from error


def _elsewhere(name: str) -> str:
    """Tell of a folder below the current one, where paths do not begin."""
    here = Path.cwd() / name
    told = f"; {here} is one, but a relative path begins at the checkout"
    return told if here.is_dir() else ""


def _wanted(listed: Iterable[str]) -> list[str]:
    """Which of a repository's files a checkpoint folder is read for."""
    top = [name for name in listed if not _matches(name, IGNORED)]
    safe = any(name.endswith(SAFE) for name in top)
    return sorted(name for name in top if _matches(name, FILES if safe else (*FILES, *PICKLES)))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _reason(error: Exception, repo: str, revision: str) -> str:
    """What went wrong, and the way out, in one line."""
    import huggingface_hub as hf

    endpoint = hf.constants.ENDPOINT
    if isinstance(error, hf.errors.GatedRepoError):
        return (
            f"{repo} is gated: accept its terms at {endpoint}/{repo}, then `hf auth login` or set "
            "HF_TOKEN"
        )
    if isinstance(error, hf.errors.RepositoryNotFoundError):
        return (
            f"{repo} must be a folder or a model on the hub, and {endpoint} shows none: check the "
            "name, or where it is private `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, hf.errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision} on the hub"
    if isinstance(error, hf.errors.OfflineModeIsEnabled):
        return f"{repo}@{revision} is not whole in the cache and HF_HUB_OFFLINE is set: unset it"
    told = " ".join(str(error).split()) or type(error).__name__
    return f"{repo}@{revision} cannot be had from {endpoint} ({told}): go on when it answers"
