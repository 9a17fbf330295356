"""Worlds that several tests look at and none changes."""

from __future__ import annotations

import os

# Before huggingface_hub is imported: no test asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from store_worlds import encode_patch, photo_folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 800 tiny pictures (ten shards of 84 rows at --shard-rows 84). Read only."""
    return photo_folder(tmp_path_factory.mktemp("photos") / "images", 800)


@pytest.fixture(scope="session")
def undisturbed(photos, tmp_path_factory):
    """The store of ``photos`` that nothing disturbed. Read only."""
    root = tmp_path_factory.mktemp("undisturbed") / "latents.zarr"
    encode_patch(photos, root)
    return root
