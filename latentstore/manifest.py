"""The rows of a store: what is listed before encoding, and what is recorded with each shard."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

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


_BLOCK = 4096
"""Listed rows that are Python objects at a time."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET = re.compile(
    r"(^|[-_.])(key|sig|auth|pwd)$|apikey|accesskey|authorization|credential|passw|secret|signature|token"
    r"|^x-(amz|goog)-",
    re.IGNORECASE,
)


def is_url(name: str) -> bool:
    """Tell whether a name says by which protocol it is read (``s3://…``)."""
    return _URL.match(name) is not None


def refuse_secrets(url: str) -> None:
    """Refuse a URL that carries a password or a token: it would stand in the store for ever.

    Raises
    ------
    ManifestError
        Also for a URL that cannot be parsed, has no host, or chains several protocols.
    """
    bare = url.partition("?")[0]
    shown = bare.rpartition("@")[2] if "@" in bare else bare
    try:
        parts = urlsplit(url)
        web = parts.scheme.lower() in ("http", "https")
        secret = parts.password is not None or (web and parts.username is not None)
        secret = secret or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, True))
    except ValueError as exc:
        raise ManifestError(f"The URL of {shown} is malformed ({exc}).") from exc
    if secret:
        raise ManifestError(
            f"The URL of {shown} carries a password, key or token, which would stand in the store for ever. "
            "Leave it out: credentials come from the environment or from fsspec's own configuration."
        )
    if "::" in url or (web and not parts.hostname):
        raise ManifestError(f"{shown} names no single file or folder: one protocol and one host are needed.")


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
    check_folder(folder)
    names = sorted(files_below(folder, IMAGE_SUFFIXES, follow_links=follow_links))
    if not names:
        raise no_images(folder)
    return input_table(named_row(n) for n in names)


def check_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises
    ------
    UsageError
    """
    if not folder.exists():
        raise UsageError(
            f"There is no folder {folder} (looked in {Path.cwd()}). Name the folder that holds your images: "
            "latentstore encode FOLDER, or a list of them: latentstore encode --manifest LIST.csv."
        )
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder. Name the folder that holds your images.")


def no_images(folder: Path | str) -> UsageError:
    """Return the error for a folder without images."""
    return UsageError(
        f"{folder} holds no image files (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, also in subfolders)."
    )


def files_below(folder: Path, suffixes: Collection[str], *, follow_links: bool = False) -> Iterator[bytes]:
    """Yield the files below a folder that end in one of the suffixes, relative to it, in no order."""

    def refuse(exc: OSError) -> None:
        raise UsageError(f"Cannot read the folder {exc.filename!r}: {exc.strerror}.") from exc

    top = os.fsencode(folder)
    try:
        for where, folders, files in os.walk(top, followlinks=follow_links, onerror=refuse):
            # Hidden folders hold caches and trash, not collections.
            folders[:] = [name for name in folders if not name.startswith(b".")]
            for name in files:
                if suffix_of(os.fsdecode(name)) in suffixes and not name.startswith(b"."):
                    yield os.path.relpath(os.path.join(where, name), top)  # noqa: PTH118
    except RecursionError as exc:
        raise UsageError(
            f"{folder} has folders in folders, too many levels deep to be walked. Name the one that holds "
            "the files, or list them in a --manifest."
        ) from exc


def suffix_of(name: str) -> str:
    """Return a name's last suffix in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def named_row(raw: bytes) -> dict[str, Any]:
    """Return the row of a file of which only the name is known."""
    return {"path": display_name(raw), "path_raw": _raw_if_needed(raw)}


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
            f"{path} is not a readable CSV or Parquet file: {str(exc).splitlines()[0].rstrip('.')}. A "
            "manifest is a .csv or .parquet file with a column named path (its name is a .csv's first line)."
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
        if is_url(str(row["path"])):
            refuse_secrets(str(row["path"]))
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
    rows, tables, hashed = iter(rows), [], True
    # A few rows at a time: as Python objects they take ten times the room of the table's own.
    while block := list(islice(rows, _BLOCK)):
        hashed = hashed and not any(row.get("split") or row.get("group") for row in block)
        tables.append(pa.Table.from_pylist([_listed_row(row) for row in block], schema=INPUT_SCHEMA))
    table = pa.concat_tables(tables).combine_chunks() if tables else INPUT_SCHEMA.empty_table()
    if not hashed:  # the hash of an identity is one split
        _refuse_two_splits(table)
    return table


def _listed_row(row: Mapping[str, Any]) -> dict[str, Any]:
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
    strength = row.get("strength")
    return {
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


def _refuse_two_splits(table: pa.Table) -> None:
    splits = table.group_by("identity", use_threads=False).aggregate([("split", "count_distinct")])
    torn = splits.filter(pc.greater(splits["split_count_distinct"], 1))["identity"]
    if len(torn):
        identity = torn[0].as_py()
        found = table.filter(pc.equal(table["identity"], identity))["split"].unique().to_pylist()
        raise ManifestError(
            f"identity {identity!r} is in two splits ({found[0]} and {found[1]}): "
            "what is learned on one would leak into the other. Give all its rows one split or group."
        )


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
    if listed.equals(committed):  # the usual case, told without a hash table of every path
        return listed.slice(0, 0)
    _refuse_changes(listed, committed)
    new = listed.filter(pc.invert(pc.is_in(listed["path"], value_set=committed["path"])))
    if new.num_rows:
        at = pc.index_in(new["identity"], value_set=committed["identity"])
        known, was = new.filter(pc.is_valid(at)), committed["split"].take(at.drop_null())
        moved = pc.index(pc.equal(known["split"], was), False).as_py()
        if moved >= 0:
            raise ManifestError(
                f"identity {known['identity'][moved].as_py()!r} is in split {was[moved].as_py()} of the "
                f"store, its new rows are in {known['split'][moved].as_py()}: what is learned on one would "
                "leak into the other. Give them the same split."
            )
    return new


def _refuse_changes(listed: pa.Table, committed: pa.Table) -> None:
    at = pc.index_in(committed["path"], value_set=listed["path"])
    was, now = committed.filter(pc.is_valid(at)), listed.take(at.drop_null())
    for name in INPUT_SCHEMA.names:
        if name in ("path", "path_raw", "strength"):
            continue
        changed = pc.index(pc.equal(was[name], now[name]), False).as_py()
        if changed >= 0:
            raise ManifestError(
                f"{was['path'][changed].as_py()}: {name} is now {now[name][changed].as_py()!r}; the store "
                f"was made with {was[name][changed].as_py()!r}. Committed rows do not change: undo it, or "
                "encode the new list into another --store."
            )


def manifest_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return manifest rows as a table of :data:`MANIFEST_SCHEMA`."""
    return pa.Table.from_pylist([dict(r) for r in rows], schema=MANIFEST_SCHEMA)
