"""The rows of a store: what is listed before encoding, and what is recorded with each shard."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from latentstore.errors import ManifestError, UsageError
from latentstore.schema import ROLES, SPLITS, identity_and_role, split_of

IMAGE_SUFFIXES = frozenset(
    [
        ".bmp",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".png",
        ".ppm",
        ".pgm",
        ".tif",
        ".tiff",
        ".webp",
        ".avif",
    ]
)

INPUT_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("path_raw", pa.binary()),
        ("identity", pa.string()),
        ("group", pa.string()),
        ("role", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),
        ("prompt", pa.string()),
        ("strength", pa.float32()),
    ]
)
"""The committed input list. ``path_raw`` holds the bytes of a name that is not valid UTF-8, else null."""

MANIFEST_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("mtime", pa.int64()),
        ("sha256", pa.string()),
        ("identity", pa.string()),
        ("group", pa.string()),
        ("role", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),
        ("prompt", pa.string()),
        ("strength", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
"""One row an image. ``mtime`` is in nanoseconds since 1970; ``group`` is what the split was hashed from."""


def display_name(raw: bytes) -> str:
    r"""Return a file name as text; bytes that are not UTF-8 become ``\xNN``."""
    return raw.decode("utf-8", "backslashreplace")


def list_folder(folder: Path, *, follow_links: bool = False) -> pa.Table:
    """List the images below a folder, sorted by path.

    Parameters
    ----------
    folder : Path
    follow_links : bool
        Also descend into linked folders. Linked files are always listed (and checked when read).

    Returns
    -------
    pyarrow.Table
        :data:`INPUT_SCHEMA`; ``path`` relative to ``folder``, with ``/``.

    Raises
    ------
    UsageError
        The folder is missing, no folder, unreadable, or holds no image file.
    """
    if not folder.exists():
        raise UsageError(
            f"There is no folder {folder} (looked in {Path.cwd()}). Name the folder that holds your images: "
            "latentstore encode FOLDER, or a list of them: latentstore encode --manifest LIST.csv."
        )
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder. Name the folder that holds your images.")
    names = sorted(_walk(os.fsencode(folder), follow_links))
    if not names:
        raise UsageError(
            f"{folder} holds no image files (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, also "
            "in subfolders)."
        )
    return input_table({"path": display_name(n), "path_raw": _raw_if_needed(n)} for n in names)


def _walk(folder: bytes, follow_links: bool) -> Iterator[bytes]:
    def refuse(exc: OSError) -> None:
        raise UsageError(f"Cannot read the folder {exc.filename!r}: {exc.strerror}.") from exc

    for where, folders, files in os.walk(folder, followlinks=follow_links, onerror=refuse):
        # Hidden folders hold caches and trash, not collections.
        folders[:] = [name for name in folders if not name.startswith(b".")]
        for name in files:
            if os.path.splitext(os.fsdecode(name))[1].lower() in IMAGE_SUFFIXES and not name.startswith(b"."):  # noqa: PTH122
                yield os.path.relpath(os.path.join(where, name), folder)  # noqa: PTH118


def _raw_if_needed(raw: bytes) -> bytes | None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
    return None


def list_manifest(path: Path) -> pa.Table:
    """Read a CSV or Parquet list of images.

    It needs a column ``path`` and may hold ``identity, group, role, split, model, prompt, strength``.

    Raises
    ------
    ManifestError
        Unreadable, without ``path``, empty, an unknown role or split, or one identity in two splits.
    """
    if not path.exists():
        raise ManifestError(f"There is no manifest {path} (looked in {Path.cwd()}).")
    try:
        if path.suffix.lower() == ".csv":
            types = {f.name: f.type for f in INPUT_SCHEMA if f.name != "path_raw"}
            # Only an empty cell is empty: "NA" and "null" are names like any other.
            options = pacsv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
            parsing = pacsv.ParseOptions(newlines_in_values=True)
            table = pacsv.read_csv(path, convert_options=options, parse_options=parsing)
        else:
            table = pq.read_table(path)
    except (pa.ArrowException, OSError) as exc:
        raise ManifestError(
            f"{path} is not a readable CSV or Parquet file: {str(exc).splitlines()[0]}"
        ) from exc
    if "path" not in table.column_names:
        raise ManifestError(
            f"{path} has the columns {', '.join(table.column_names)}, but none named path: "
            "at least that one is needed, with one image file a row."
        )
    known = [n for n in INPUT_SCHEMA.names if n in table.column_names and n != "path_raw"]
    rows = table.select(known).to_pylist()
    if not rows:
        raise ManifestError(f"{path} lists no images.")
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if not row["path"]:
            raise ManifestError(f"{path}: row {number + 1} has an empty path.")
        if str(row["path"]) in seen:
            raise ManifestError(f"{path}: {row['path']} is listed twice (again in row {number + 1}).")
        seen.add(str(row["path"]))
    return input_table(sorted(rows, key=lambda row: str(row["path"])))


def input_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Fill in what the rows leave open (identity and role by file name, split by hash) and check them.

    Raises
    ------
    ManifestError
        An unknown role or split, or one identity in two splits.
    """
    filled: list[dict[str, Any]] = []
    split_by_identity: dict[str, str] = {}
    for row in rows:
        path = str(row["path"])
        by_name, role_by_name = identity_and_role(path)
        identity = _text(row.get("identity"), by_name)
        # A named identity without a role is a reference unless the file name says more.
        role = _text(row.get("role"), role_by_name)
        group = _text(row.get("group"), identity)
        split = _text(row.get("split"), split_of(group))
        if role not in ROLES:
            raise ManifestError(f"{path}: role is {role!r}; it must be one of {', '.join(ROLES)}.")
        if split not in SPLITS:
            raise ManifestError(f"{path}: split is {split!r}; it must be one of {', '.join(SPLITS)}.")
        if split_by_identity.setdefault(identity, split) != split:
            raise ManifestError(
                f"identity {identity!r} is in two splits ({split_by_identity[identity]} and {split}): "
                "what is learned on one would leak into the other. Give all its rows one split or group."
            )
        strength = row.get("strength")
        filled.append(
            {
                "path": path,
                "path_raw": row.get("path_raw"),
                "identity": identity,
                "group": group,
                "role": role,
                "split": split,
                "source": _text(row.get("source"), "file"),
                "model": _text(row.get("model"), ""),
                "prompt": _text(row.get("prompt"), ""),
                "strength": None if strength is None else float(strength),
            }
        )
    return pa.Table.from_pylist(filled, schema=INPUT_SCHEMA)


def _text(value: Any, default: str) -> str:
    """Return a cell as text; only a missing or empty one takes the default (0 is an identity)."""
    return default if value is None or value == "" else str(value)


def new_inputs(listed: pa.Table, committed: pa.Table) -> pa.Table:
    """Return the rows of ``listed`` whose path is not in ``committed``, in their order.

    Raises
    ------
    ManifestError
        A committed path is listed otherwise than it was, or a new row would put a committed identity into
        a second split.
    """
    _refuse_changes(listed, committed)
    known = pc.is_in(listed["path"], value_set=committed["path"].combine_chunks())
    new = listed.filter(pc.invert(known))
    if new.num_rows:
        was = dict(zip(committed["identity"].to_pylist(), committed["split"].to_pylist(), strict=True))
        for identity, split in zip(new["identity"].to_pylist(), new["split"].to_pylist(), strict=True):
            if was.get(identity, split) != split:
                raise ManifestError(
                    f"identity {identity!r} is in split {was[identity]} of the store, its new rows are in "
                    f"{split}: what is learned on one would leak into the other. Give them the same split."
                )
    return new


def _refuse_changes(listed: pa.Table, committed: pa.Table) -> None:
    names = [n for n in INPUT_SCHEMA.names if n not in ("path_raw", "strength")]
    now = {row["path"]: row for row in listed.select(names).to_pylist()}
    for row in committed.select(names).to_pylist():
        other = now.get(row["path"], row)
        for name in names:
            if other[name] != row[name]:
                raise ManifestError(
                    f"{row['path']}: {name} is now {other[name]!r}; the store was made with {row[name]!r}. "
                    "Committed rows do not change: undo it, or encode the new list into another --store."
                )


def manifest_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return manifest rows as a table of :data:`MANIFEST_SCHEMA`."""
    return pa.Table.from_pylist([dict(r) for r in rows], schema=MANIFEST_SCHEMA)
