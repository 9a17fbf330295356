"""What a store is, before any byte is written."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest

from latentstore.errors import SpaceMismatchError, StoreFormatError, UsageError
from latentstore.schema import (
    SCHEMA_VERSION,
    SPLITS,
    STATUS_NAMES,
    Layout,
    Space,
    check_space,
    identity_and_role,
    read_attributes,
    split_of,
)

SPACE = Space(
    encoder="AutoencoderKL", weights="ab" * 32, image_size=256, latent_shape=(4, 32, 32), posterior="mean"
)


def test_split_fractions_are_80_10_10():
    n = 5000
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(n):
        counts[split_of(f"photo-{i}")] += 1
    for name, p in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        # Five standard deviations of the binomial: a false alarm in two million choices of names.
        assert abs(counts[name] - n * p) < 5 * math.sqrt(n * p * (1 - p)), name


def test_split_is_part_of_the_format():
    # Written down, so that no release moves a picture to another side. "\udcff" cannot be UTF-8.
    names = ["T000000", "T000001", "a/b.jpg", "Ärger.png", "", "\udcff", "T000010", "x", "y", "z", "w"]
    short = {"train": "t", "validation": "v", "test": "T"}
    assert "".join(short[split_of(name)] for name in names) == "tTtTttvTvtt"


@pytest.mark.parametrize(
    ("path", "identity", "role"),
    [
        ("T000123_4.jpg", "T000123", "translation"),
        ("T000123_10.png", "T000123", "translation"),
        ("T000123.jpg", "T000123", "origin"),
        ("T000123_0.jpg", "T000123", "origin"),
        ("T000123_00.jpg", "T000123", "origin"),
        ("T1234567_2.jpg", "T1234567", "translation"),
        ("sub/folder/T000123_4.webp", "T000123", "translation"),
        ("T000123/holiday.jpg", "T000123/holiday.jpg", "reference"),
        ("T12345_4.jpg", "T12345_4.jpg", "reference"),
        ("t000123_4.jpg", "t000123_4.jpg", "reference"),
        ("T000123_a.jpg", "T000123_a.jpg", "reference"),
        ("T000123-4.jpg", "T000123-4.jpg", "reference"),
        ("xT000123_4.jpg", "xT000123_4.jpg", "reference"),
        ("T000123_4_5.jpg", "T000123_4_5.jpg", "reference"),
        ("a/cat.jpg", "a/cat.jpg", "reference"),
        ("b/cat.jpg", "b/cat.jpg", "reference"),
    ],
)
def test_oripid_rule(path, identity, role):
    assert identity_and_role(path) == (identity, role)


@pytest.mark.parametrize("rows", [1, 83, 84, 2687, 2688, 2689, 5376, 5377, 100_000, 129_023, 129_025, 10**7])
def test_shard_rows_are_a_function_of_the_rows(rows):
    layout = Layout.plan(rows, 4096)
    assert layout.shard_rows == min(4032, 84 * math.ceil(rows / 2688))
    spans = [layout.span(s) for s in range(layout.n_shards)]
    assert spans[0].start == 0
    assert spans[-1].stop == rows
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert all(len(s) == layout.shard_rows for s in spans[:-1])


def test_layout_counts_bytes():
    layout = Layout.plan(200, 256, shard_rows=168)
    # Two chunks in the full shard, one in the tail; each index has two entries of 16 bytes and a crc32c.
    assert [layout.shard_bytes(s) for s in (0, 1)] == [2 * 84 * 512 + 36, 84 * 512 + 36]
    assert layout.total_bytes == 3 * 84 * 512 + 72
    assert Layout.plan(200, 256, shard_rows=168, dtype="float32").row_bytes == 1024


@pytest.mark.parametrize("shard_rows", [0, -84, 1, 83, 85, 100, 4000])
def test_shard_rows_must_be_a_multiple_of_84(shard_rows):
    with pytest.raises(UsageError, match="multiple of 84") as caught:
        Layout.plan(1000, 8, shard_rows=shard_rows)
    assert str(shard_rows) in str(caught.value)


@pytest.mark.parametrize("shard_rows", [84, 168, 4032, 8400])
def test_shard_rows_may_be_chosen(shard_rows):
    assert Layout.plan(10, 8, shard_rows=shard_rows).shard_rows == shard_rows


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int8", ">f4"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UsageError, match="float16 or float32"):
        Layout.plan(10, 8, dtype=dtype)


OTHERS = {
    "encoder": "AutoencoderTiny",
    "weights": "ac" * 32,
    "image_size": 512,
    "latent_shape": (16, 32, 32),
    "posterior": "sample",
    "resize": "pillow-bicubic",
    "seed": 0,
}


def test_every_field_of_the_space_is_tried():
    assert set(OTHERS) == {f.name for f in dataclasses.fields(Space)}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_space_id_changes_with_every_field(name):
    assert dataclasses.replace(SPACE, **{name: OTHERS[name]}).id != SPACE.id


def test_space_id_changes_with_nothing_else():
    again = Space.from_dict(dataclasses.asdict(SPACE) | {"latent_shape": [4, 32, 32]})
    assert again == SPACE
    assert again.id == SPACE.id
    assert SPACE.id == "cae69c68e9056ef0"  # part of the format: a release that changes it orphans every store
    assert SPACE.dim == 4096


def test_spaces_do_not_meet():
    other = dataclasses.replace(SPACE, image_size=512)
    check_space(SPACE.id, SPACE.id, what="W")
    with pytest.raises(SpaceMismatchError, match=r"W\.safetensors") as caught:
        check_space(other.id, SPACE.id, what="W.safetensors")
    assert other.id in str(caught.value)
    assert SPACE.id in str(caught.value)


def test_status_codes_are_part_of_the_format():
    names = "not_written ok unreadable too_large not_finite missing link_outside removed changed killed"
    assert " ".join(STATUS_NAMES) == names


def test_attributes_of_another_schema_are_refused():
    assert read_attributes({"latentstore": {"schema": SCHEMA_VERSION}}, "s") == {"schema": SCHEMA_VERSION}
    with pytest.raises(StoreFormatError, match="schema 99"):
        read_attributes({"latentstore": {"schema": 99}}, "s")
    for raw in ({}, {"latentstore": 1}, {"latentstore": {}}):
        with pytest.raises(StoreFormatError, match="not a latentstore store"):
            read_attributes(raw, "s")
