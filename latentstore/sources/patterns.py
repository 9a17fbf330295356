"""Names with wildcards and braces: which folder they are in, and which files they name."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from latentstore.errors import UsageError
from latentstore.manifest import is_url
from latentstore.sources import urls

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*(?:,|\d\.\.\d)[^{}]*)\}")
_WILD = re.compile(r"[*?\[]")
_MOST_NAMES = 100_000


def is_pattern(text: str) -> bool:
    """Tell whether a name holds wildcards or braces."""
    plain = _plain(text, text)
    return bool(_WILD.search(plain) or _BRACES.search(plain))


def is_tar(name: str) -> bool:
    """Tell whether a name is that of a tar archive."""
    return name.lower().endswith(".tar")


def split(text: str) -> tuple[str, str]:
    """Return (folder, pattern below it): the folder is what stands before the first part with a wildcard."""
    head, parts = "", text.split("/")
    if is_url(text):
        head, parts = "/".join(parts[:3]), parts[3:]
    first = next((i for i, part in enumerate(parts) if is_pattern(part)), len(parts) - 1)
    folder = "/".join([head, *parts[:first]] if head else parts[:first])
    return folder or ("/" if text.startswith("/") else "."), "/".join(parts[first:])


def expand(pattern: str) -> list[str]:
    """Return what braces stand for: ``a-{000..002}`` and ``a-{x,y}``, as in a shell.

    Raises
    ------
    UsageError
        More than 100,000 names.
    """
    out: list[str] = []
    for name in _expanded(pattern):
        out.append(name)
        if len(out) > _MOST_NAMES:
            raise UsageError(f"{pattern} stands for more than {_MOST_NAMES:,} names.")
    return out


def _expanded(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    for word in _words(found.group(1)):
        yield from _expanded(before + word + after)


def _words(inside: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        yield from inside.split(",")
        return
    first, last = numbers.groups()
    # Zeros in front of either end set the width of all, as in a shell.
    padded = any(len(n) > 1 and n.startswith("0") for n in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    yield from (f"{n:0{width}d}" for n in range(int(first), int(last) + step, step))


def files(root: Path | str, pattern: str) -> list[str]:
    """Return the files that a pattern names, relative to the root.

    Parameters
    ----------
    root : Path or str
        A folder, or the URL of one.
    pattern : str

    Raises
    ------
    UsageError
        It names none, or a name without a wildcard that is not there.
    """
    if isinstance(root, str):
        named = ((n, bool(_WILD.search(_plain(n, root)))) for n in expand(pattern))
        found = [n for name, wild in named for n in (urls.glob(root, name) if wild else [name])]
    elif is_there(root / pattern):
        found = [pattern]
    else:
        found = [n for name in expand(pattern) for n in _local(root, name)]
    if not found:
        where = root if isinstance(root, str) else root.absolute()
        raise UsageError(f"No file matches {pattern} in {where}. Name tar shards or images that are there.")
    return found


def _local(root: Path, name: str) -> list[str]:
    if is_there(root / name):
        return [name]
    if _WILD.search(name):
        found = glob.glob(name, root_dir=os.fspath(root), recursive=True)  # noqa: PTH207
        return [n for n in found if (root / n).is_file()]
    raise UsageError(
        f"There is no file {root / name} (looked in {Path.cwd()}). Name a tar shard, several by a pattern in "
        "quotes ('shards/*.tar', 'photos-{000..009}.tar'), or the folder that holds them."
    )


def is_there(path: Path) -> bool:
    """Tell whether something lies at a path; a pattern may be no possible name at all."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _plain(text: str, url: str) -> str:
    """Return the text without what is no wildcard: in a web address ? begins a query."""
    return text.replace("?", "") if is_url(url) and urls.is_web(url) else text
