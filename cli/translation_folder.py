"""A folder of translations: its settings, its record of what is made, its manifest."""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli.translation_plan import Original, Originals
from latentstore.errors import ManifestError, StoreLockedError, UsageError
from latentstore.files import PARTIAL, Staged, fsync_dir
from latentstore.schema import canonical_json

SETTINGS, MADE, MANIFEST = "settings.json", "made.jsonl", "manifest.csv"
_COLUMNS = ("path", "identity", "group", "role", "split", "source", "model", "prompt", "strength")


class Folder:
    """A folder of translations, held by one process at a time; see :func:`opened`.

    A picture is written under a partial name and renamed; then its line goes into ``made.jsonl``. What has no
    line is made again, to the same bytes.

    Attributes
    ----------
    root : Path
    made : dict
        Path of a translation → its line: identity, k, model, strength, prompt.
    """

    def __init__(self, root: Path, journal: io.BufferedRandom) -> None:
        self.root, self._journal = root, journal
        self.made: dict[str, dict[str, Any]] = {}
        self._settings: dict[str, Any] = {}
        self._recorded: dict[str, Any] = {}

    def agree(self, asked: Mapping[str, Any]) -> None:
        """Take the settings of a first run, which are recorded with its first picture; or refuse other ones.

        Raises
        ------
        UsageError
        """
        for name, value in asked.items():
            held = self._settings.get(name, value)
            if held != value:
                raise UsageError(
                    f"{self.root} was made with {name} {_shown(held)}, and {_shown(value)} is asked for now. "
                    "Go on with the settings of then, or choose another folder with --out."
                )
        self._settings |= asked

    def has(self, path: str, prompt: str) -> bool:
        """Tell whether a translation is there.

        Raises
        ------
        UsageError
            It was made under another prompt.
        """
        line = self.made.get(path)
        if line is None or not (self.root / path).is_file():
            return False
        if line["prompt"] != prompt:
            raise UsageError(
                f"{self.root / path} was made under the prompt {line['prompt']!r}, and {prompt!r} is asked "
                "for now. Go on with the prompts of then, or choose another folder with --out."
            )
        return True

    def add(self, files: Mapping[str, bytes], lines: Sequence[Mapping[str, Any]]) -> None:
        """Write new settings, then translations, and then their lines (each with its ``path``)."""
        if self._settings != self._recorded:
            self._write(SETTINGS, (json.dumps(self._settings, indent=1, ensure_ascii=False) + "\n").encode())
            self._recorded = dict(self._settings)
        with Staged() as staged:
            for path, data in files.items():
                staged.add(self.root / path, data)
            staged.publish()
        for line in lines:
            self._journal.write(canonical_json(line).encode() + b"\n")
        self._journal.flush()
        self.made |= {line["path"]: dict(line) for line in lines}

    def write_manifest(self, originals: Originals, bad: set[str]) -> tuple[int, int]:
        """List every original that can be read, and every translation of one, for ``encode --manifest``.

        Originals are named by absolute paths; one that was translated has the role ``origin``.

        Parameters
        ----------
        bad : set of str
            Paths of originals that could not be read.

        Returns
        -------
        translations, translations whose original is gone
        """
        by_identity = originals.of_identity()
        lines = [line for line in self.made.values() if (self.root / line["path"]).is_file()]
        mine = [line for line in lines if line["identity"] in by_identity]
        translated = {by_identity[line["identity"]].row for line in mine}
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        writer.writerow(_COLUMNS)
        for o in originals.listed:
            if o.path not in bad and originals.is_there(o):
                role = "origin" if o.row in translated else o.role
                writer.writerow([*_named(originals.location(o), o, role, "file"), "", o.prompt, ""])
        for line in sorted(mine, key=lambda line: str(line["path"])):
            row = _named(line["path"], by_identity[line["identity"]], "translation", "translated")
            writer.writerow([*row, line["model"], line["prompt"], line["strength"]])
        self._write(MANIFEST, out.getvalue().encode())
        return len(mine), len(lines) - len(mine)

    def _write(self, name: str, data: bytes) -> None:
        with Staged() as staged:
            staged.add(self.root / name, data)
            staged.publish()

    def _read(self) -> None:
        settings = self.root / SETTINGS
        if settings.exists():
            self._recorded = _json(settings, settings.read_bytes())
            self._settings = dict(self._recorded)
        self._journal.seek(0)
        at = 0
        for number, line in enumerate(self._journal.read().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):  # torn by a kill: what it spoke of is made again
                break
            entry = _json(f"{self.root / MADE}, line {number}", line)
            self.made[str(entry["path"])] = entry
            at += len(line)
        self._journal.seek(at)
        self._journal.truncate()


@contextmanager
def opened(root: Path) -> Iterator[Folder]:
    """Make or open a folder of translations, and hold it.

    Raises
    ------
    UsageError
        No folder can be made there, or one is there that holds something else.
    StoreLockedError
        Another process holds it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in root.iterdir())
    except OSError as exc:
        raise UsageError(f"--out is {root}, and no folder can be made there: {exc.strerror}.") from exc
    if held and MADE not in held:
        raise UsageError(
            f"--out is {root}, which holds {held[0]} and was not made by translate. Name a new or empty "
            "folder."
        )
    journal = root / MADE
    journal.touch()
    fsync_dir(root)
    with journal.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StoreLockedError(
                f"{root} is being written by another process. Wait for it, or stop it; nothing was changed."
            ) from exc
        for partial in root.rglob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)
        folder = Folder(root, file)
        folder._read()
        yield folder


def _named(path: str, original: Original, role: str, source: str) -> list[Any]:
    return [path, original.identity, original.group, role, original.split, source]


def _json(what: object, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as exc:
        raise ManifestError(
            f"{what} is damaged ({exc}). Choose another folder with --out, or translate into it anew."
        ) from exc
    if not isinstance(found, dict):
        raise ManifestError(f"{what} holds no settings. Choose another folder with --out.")
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
