"""Bringing older stores up to the present schema, in place; latents are never touched.

Schema 2 knows two more statuses (``changed``, ``killed``), several arrays, codecs and removals. What a store
of schema 1 holds reads the same, so only metadata changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentstore.create import status_attributes
from latentstore.files import write_atomic
from latentstore.schema import SCHEMA_VERSION, STATUS, read_attributes
from latentstore.seal import write_seal


def migrate(root: Path) -> tuple[int, int]:
    """Bring a store to :data:`~latentstore.schema.SCHEMA_VERSION`. Needs the writer's lock.

    The version is written last, so that a migration which was killed is done again.

    Returns
    -------
    before, after : int

    Raises
    ------
    StoreFormatError
        The store is of a newer schema, or none at all.
    """
    path = root / "zarr.json"
    group = json.loads(path.read_bytes())
    before = int(read_attributes(group["attributes"], str(root))["schema"])
    if before < SCHEMA_VERSION:
        statuses = root / STATUS / "zarr.json"
        body = json.loads(statuses.read_bytes())
        body["attributes"] |= status_attributes()
        write_atomic(statuses, _json(body))
        group["attributes"]["latentstore"]["schema"] = SCHEMA_VERSION
        data = _json(group)
        write_seal(root, written=[f"{STATUS}/zarr.json"], coming={path: data})
        write_atomic(path, data)
    return before, SCHEMA_VERSION


def record_origin(root: Path, origin: dict[str, Any]) -> None:
    """Write anew where the images of a store come from. Needs the lock."""
    path = root / "zarr.json"
    group = json.loads(path.read_bytes())
    group["attributes"]["latentstore"]["origin"] = origin
    write_atomic(path, _json(group))
    write_seal(root, written=["zarr.json"])


def _json(body: Any) -> bytes:
    return json.dumps(body, indent=2).encode()
