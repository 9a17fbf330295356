"""Published latents: what a .npy file may hold, and a store of them that equals the encoded one."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from store_worlds import data_files, done_shards, encode_patch, partials, picture, shard_facts

from latentstore.encoders import PatchEncoder
from latentstore.errors import ImageError, SpaceMismatchError, StoreIncompleteError, UsageError
from latentstore.features import Features, load_queries, parse
from latentstore.images import load
from latentstore.importing import Origin, import_features
from latentstore.schema import OK, STATUS_CODE
from latentstore.store import open_store
from latentstore.verify import verify

SHAPE = (4, 8, 8)
DIM = 256


def npy_bytes(array, **options):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array), **options)
    return out.getvalue()


def header_bytes(text, version=(1, 0)):
    """A .npy file of a header alone."""
    body = text.encode("latin1")
    width = 2 if version == (1, 0) else 4
    return b"\x93NUMPY" + bytes(version) + len(body).to_bytes(width, "little") + body


def feature_folder(folder, n, *, seed=0):
    """n latents as OriPID's names have them, an origin and two translations an identity; and the rows."""
    folder.mkdir(parents=True)
    rows = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    for i, row in enumerate(rows):
        np.save(folder / f"T{i // 3:06d}_{i % 3}.npy", row)
    return rows


def imported(folder, root, **options):
    """Import in shards of 84 rows."""
    origin = options.pop("origin", None) or Origin.named("some VAE", latent_shape=SHAPE)
    source = options.pop("source", None) or Features(folder, latent_shape=SHAPE)
    return import_features(source, root, origin, **{"shard_rows": 84, "threads": 2} | options)


def rows_of(root):
    store = open_store(root)
    return store.reader.read(0, len(store))


# --- one file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("shape", [(DIM,), (1, DIM), SHAPE, (1, *SHAPE)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_every_spelling_of_a_latent_is_the_same_row(dtype, shape, order, version):
    # Numbers that float16 holds, so that every dtype holds the same.
    row = np.random.default_rng(3).standard_normal(DIM).astype(np.float16)
    data = npy_bytes(np.asarray(row.reshape(shape).astype(dtype), order=order), version=version)
    found = parse(data, SHAPE)
    assert found.dtype == np.float32
    assert found.shape == (DIM,)
    assert np.array_equal(found, row.astype(np.float32))


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_objects_are_never_loaded(tmp_path):
    mark = tmp_path / "executed"
    evil = npy_bytes(np.array([Evil(mark)] * DIM, object), allow_pickle=True)
    for data in (evil, pickle.dumps(Evil(mark))):
        with pytest.raises(ImageError) as refused:
            parse(data, SHAPE)
        assert refused.value.status == "unreadable"
    assert not mark.exists()
    np.load(io.BytesIO(evil), allow_pickle=True)  # the opposite: the pickle does what it says
    assert mark.exists()


def zipped():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("arr_0.npy", npy_bytes(np.zeros(DIM)))
    return out.getvalue()


WHOLE = npy_bytes(np.ones(DIM, np.float32))


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"", "unreadable", "empty"),
        (b"\x93NUMPY", "unreadable", "not a .npy"),
        (b"\x93NUMPY\x03\x00" + bytes(100), "unreadable", "not a .npy"),
        (zipped(), "unreadable", "not a .npy"),
        (WHOLE[:-1], "unreadable", "1023 bytes"),
        (WHOLE + b"\0", "unreadable", "1025 bytes"),
        (WHOLE[:60], "unreadable", "not a .npy"),
        (npy_bytes(np.ones(DIM - 1)), "unreadable", "(255,)"),
        (npy_bytes(np.ones((8, 8, 4))), "unreadable", "(8, 8, 4)"),
        (npy_bytes(np.ones((2, DIM))), "unreadable", "(2, 256)"),
        (npy_bytes(np.float32(1)), "unreadable", "()"),
        (npy_bytes(np.ones(DIM, np.int64)), "unreadable", "int64"),
        (npy_bytes(np.ones(DIM, np.complex64)), "unreadable", "complex64"),
        (npy_bytes(np.ones(DIM, np.longdouble)), "unreadable", "float128"),
        (npy_bytes(np.ones(DIM, [("x", "f4")])), "unreadable", "x"),
        (header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 60,)}"), "unreadable", "npy"),
        (header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (10**18,)}"), "unreadable", "npy"),
        (
            header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"),
            "unreadable",
            "(1000000000000,)",
        ),
        (header_bytes("(" * 9000), "unreadable", "not a .npy"),
        (header_bytes("-" * 9000 + "1"), "unreadable", "not a .npy"),
        (header_bytes(" " * 60_000), "unreadable", "not a .npy"),
        (header_bytes("__import__('os').abort()"), "unreadable", "not a .npy"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "unreadable", "not a .npy"),
        (npy_bytes(np.array([np.nan, np.inf] + [0.0] * (DIM - 2))), "not_finite", "2 of its 256"),
        (npy_bytes(np.full(DIM, 1e39)), "not_finite", "256 of its 256"),
    ],
)
def test_what_is_no_latent_is_named(data, status, says):
    with pytest.raises(ImageError) as refused:
        parse(data, SHAPE)
    assert refused.value.status == status
    assert says in refused.value.reason


def test_what_python_2_wrote_is_read_without_a_word():
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (4L, 8L, 8L)}\n"
    assert np.array_equal(parse(header_bytes(text) + bytes(4 * DIM), SHAPE), np.zeros(DIM))


def test_folders_too_deep_to_be_walked_are_refused(tmp_path):
    deep = tmp_path / "features"
    deep.joinpath(*"a" * 200).mkdir(parents=True)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)
    try:
        with pytest.raises(UsageError, match="too many levels deep"):
            Features(deep, latent_shape=SHAPE).list()
    finally:
        sys.setrecursionlimit(limit)


# --- a folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_imported_store_is_the_encoded_one_bit_for_bit(tmp_path, dtype):
    """The opposite: the same files under a name alone are another space, though the rows are the same."""
    pictures, features = tmp_path / "images", tmp_path / "features"
    pictures.mkdir()
    features.mkdir()
    encoder = PatchEncoder(64)
    for i in range(200):
        name = f"T{i // 4:06d}_{i % 4}"
        picture(i).save(pictures / f"{name}.png", compress_level=1)
        pixels = load(pictures / f"{name}.png", 64).rgb[None]
        np.save(features / f"{name}.npy", encoder.encode(pixels, np.array([i])).reshape(SHAPE))
    encode_patch(pictures, tmp_path / "encoded.zarr", dtype=dtype)
    encoded = open_store(tmp_path / "encoded.zarr")
    origin = Origin.of_store(encoded)
    summary = imported(features, tmp_path / "imported.zarr", origin=origin, dtype=dtype)
    store = open_store(tmp_path / "imported.zarr")
    assert summary.counts == {"ok": 200}
    assert store.kind == "imported"
    for shard in range(3):
        own, theirs = (root / f"latents/c/{shard}/0" for root in (store.root, encoded.root))
        assert own.read_bytes() == theirs.read_bytes()
    assert store.data_hash() == encoded.data_hash()
    same = ["row", "identity", "group", "role", "split", "status"]
    assert store.manifest(same).equals(encoded.manifest(same))
    assert set(store.manifest(["width"])["width"].to_pylist()) == {None}
    assert not verify(store).damages
    imported(features, tmp_path / "named.zarr", dtype=dtype)
    named = open_store(tmp_path / "named.zarr")
    assert np.array_equal(rows_of(named.root), rows_of(store.root))
    assert named.space.id != store.space.id


def test_a_named_space_is_that_of_the_same_words_alone():
    space = Origin.named("a VAE", latent_shape=SHAPE).space
    assert space.id == Origin.named(" a VAE ", latent_shape=SHAPE).space.id
    others = [
        Origin.named("another VAE", latent_shape=SHAPE),
        Origin.named("a VAE", latent_shape=(4, 16, 4)),
        Origin.named("a VAE", latent_shape=SHAPE, posterior="mean"),
        Origin.named("a VAE", latent_shape=SHAPE, image_size=64),
    ]
    assert len({space.id, PatchEncoder(64).space.id, *(o.space.id for o in others)}) == 6
    with pytest.raises(UsageError):
        Origin.named("  ")


def test_bad_files_are_rows_with_a_reason_and_shift_no_others(tmp_path):
    folder = tmp_path / "features"
    rows = feature_folder(folder, 90)
    outside = tmp_path / "outside.npy"
    np.save(outside, rows[0])
    bad = {
        "T000000_1": "unreadable",
        "T000000_2": "too_large",
        "T000001_0": "not_finite",
        "T000001_1": "link_outside",
        "T000001_2": "unreadable",
        "T000002_0": "not_finite",
    }
    paths = [folder / f"{name}.npy" for name in bad]
    paths[0].write_bytes(b"not latents")
    os.truncate(paths[1], 1 << 40)  # sparse: reading it would take a terabyte
    np.save(paths[2], np.full(DIM, np.nan))
    paths[3].unlink()
    paths[3].symlink_to(outside)
    paths[4].unlink()
    os.mkfifo(paths[4])
    np.save(paths[5], np.full(DIM, 1e5))  # beyond float16, not beyond float32
    root = tmp_path / "s.zarr"
    summary = imported(folder, root)
    status = open_store(root).status()
    expected = [STATUS_CODE[bad.get(f"T{i // 3:06d}_{i % 3}", "ok")] for i in range(90)]
    assert status.tolist() == expected
    assert {Path(path).stem: found for path, found, _ in summary.bad} == bad
    ok = status == OK
    assert np.array_equal(rows_of(root)[ok], rows.astype(np.float16)[ok])
    assert not rows_of(root)[~ok].any()
    manifest = open_store(root).manifest(["status", "reason", "sha256", "bytes"]).to_pylist()
    assert all(m["reason"] for m in manifest if m["status"] != "ok")
    why = {Path(path).stem: reason for path, _, reason in summary.bad}
    assert (
        why["T000002_0"] == "a number is beyond float16, whose largest is 65504: import with --dtype float32"
    )
    assert "float32" not in why["T000001_1"]
    # What is mended is read again; the link is accepted where links are.
    for path in (paths[1], paths[4]):
        path.unlink()
    for i in (0, 1, 2, 4, 5):
        np.save(paths[i], rows[i])
    again = imported(folder, root, retry_bad=True, source=Features(folder, None, True, latent_shape=SHAPE))
    assert again.counts == {"ok": 90}
    assert again.encoded == 6
    imported(folder, tmp_path / "whole.zarr", dtype="float32")


def test_a_manifest_names_identities_and_may_not_lead_out(tmp_path):
    folder = tmp_path / "features"
    rows = feature_folder(folder, 4)
    np.save(tmp_path / "secret.npy", rows[0])
    listed = tmp_path / "list.csv"
    listed.write_text(
        "path,identity,role,split\nT000000_1.npy,a,origin,test\n../secret.npy,b,origin,train\n"
        "absent.npy,c,reference,train\nT000000_0.npy,d,query,train\n"
    )
    imported(folder, tmp_path / "s.zarr", source=Features(folder, listed, latent_shape=SHAPE))
    found = open_store(tmp_path / "s.zarr").manifest(["path", "identity", "role", "split", "status"])
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        ("../secret.npy", "b", "origin", "train", "link_outside"),
        ("T000000_0.npy", "d", "query", "train", "ok"),
        ("T000000_1.npy", "a", "origin", "test", "ok"),
        ("absent.npy", "c", "reference", "train", "missing"),
    ]


def test_new_files_are_appended_and_changed_ones_are_told(tmp_path):
    folder, root = tmp_path / "features", tmp_path / "s.zarr"
    rows = feature_folder(folder, 90)
    imported(folder, root)
    before = shard_facts(root)
    assert imported(folder, root).encoded == 0
    assert shard_facts(root) == before
    np.save(folder / "T900000.npy", rows[5] + 1)
    np.save(folder / "T000000_0.npy", -rows[0].astype(np.float64))
    summary = imported(folder, root)
    assert (summary.rows, summary.appended, summary.encoded) == (91, 1, 1)
    assert summary.changed == {"size": 1}
    assert np.array_equal(rows_of(root), np.vstack([rows, rows[5:6] + 1]).astype(np.float16))
    assert shard_facts(root)["0"] == before["0"]
    imported(folder, root, retry_changed=True)
    assert np.array_equal(rows_of(root)[0], -rows[0].astype(np.float16))


def test_a_run_that_appends_retries_the_last_shard_too(tmp_path):
    folder, root = tmp_path / "features", tmp_path / "s.zarr"
    rows = feature_folder(folder, 90)
    (folder / "T000029_2.npy").write_bytes(b"no latent")
    imported(folder, root)
    np.save(folder / "T000029_2.npy", rows[89])
    np.save(folder / "T000029_1.npy", -rows[88].astype(np.float64))
    np.save(folder / "T900000.npy", rows[5] + 1)
    summary = imported(folder, root, retry_bad=True, retry_changed=True)
    assert (summary.appended, summary.encoded, summary.counts) == (1, 3, {"ok": 91})
    expected = np.vstack([rows[:88], -rows[88:89], rows[89:], rows[5:6] + 1]).astype(np.float16)
    assert np.array_equal(rows_of(root), expected)
    assert verify(open_store(root)).damages == []


SLOW = """
import sys, time
from pathlib import Path
from latentstore.features import Features
from latentstore.importing import Origin, import_features
class Slow(Features):
    def load(self, listed, size=0, *, max_pixels=0):
        time.sleep(0.002)
        return super().load(listed)
folder, root = map(Path, sys.argv[1:])
origin = Origin.named("some VAE", latent_shape=(4, 8, 8))
import_features(Slow(folder, latent_shape=(4, 8, 8)), root, origin, shard_rows=84, threads=1)
"""


def test_killed_and_run_again_it_is_the_undisturbed_store(tmp_path):
    folder, root = tmp_path / "features", tmp_path / "s.zarr"
    feature_folder(folder, 500)
    imported(folder, tmp_path / "undisturbed.zarr")
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(root)])
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if done_shards(root) and list((root / "latents" / "c").glob("*/*.partial")):
                break
            time.sleep(0.001)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    kept = done_shards(root)
    assert 0 < len(kept) < 6
    assert partials(root)
    with pytest.raises(StoreIncompleteError):
        open_store(root).require_complete()
    before = {name: facts for name, facts in shard_facts(root).items() if f"{int(name):06d}" in kept}
    summary = imported(folder, root)
    assert summary.encoded == 500 - 84 * len(kept)
    assert before.items() <= shard_facts(root).items()
    assert not partials(root)
    assert data_files(root) == data_files(tmp_path / "undisturbed.zarr")


def test_what_cannot_be_this_import_is_refused_and_leaves_nothing(tmp_path):
    folder, root = tmp_path / "features", tmp_path / "s.zarr"
    feature_folder(folder, 6)
    with pytest.raises(UsageError, match="--latent-shape"):
        imported(folder, root, source=Features(folder))
    with pytest.raises(UsageError, match="no folder"):
        imported(tmp_path / "nowhere", root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.npy files"):
        imported(tmp_path / "empty", root)
    assert not root.exists()
    imported(folder, root)
    with pytest.raises(SpaceMismatchError):
        imported(folder, root, origin=Origin.named("another VAE", latent_shape=SHAPE))
    with pytest.raises(UsageError, match="array of a store"):
        imported(folder, root / "second")
    feature_folder(tmp_path / "others", 6, seed=1)
    with pytest.raises(UsageError, match="was made from"):
        imported(tmp_path / "others", root)
    # Pictures and published latents share no store, also where the space is the same.
    (tmp_path / "images").mkdir()
    picture(1).save(tmp_path / "images" / "a.png")
    encode_patch(tmp_path / "images", tmp_path / "encoded.zarr")
    patch = Origin.of_store(open_store(tmp_path / "encoded.zarr"))
    with pytest.raises(UsageError, match="was not imported"):
        imported(folder, tmp_path / "encoded.zarr", origin=patch)
    imported(folder, tmp_path / "patch.zarr", origin=patch)
    picture(1).save(folder / "a.png")
    before = data_files(tmp_path / "patch.zarr")
    with pytest.raises(UsageError):
        encode_patch(folder, tmp_path / "patch.zarr")
    assert data_files(tmp_path / "patch.zarr") == before


def test_queries_are_read_without_a_store(tmp_path):
    rows = feature_folder(tmp_path / "features", 3)
    (tmp_path / "broken.npy").write_bytes(b"x")
    files = [*sorted((tmp_path / "features").iterdir()), tmp_path / "broken.npy"]
    names, latents, unreadable = load_queries(files, Origin.named("a", latent_shape=SHAPE).space)
    assert names == [str(path) for path in files[:3]]
    assert np.array_equal(latents, rows)
    assert unreadable == [(str(files[3]), "unreadable: not a .npy file")]
    assert load_queries(files[3:], Origin.named("a", latent_shape=SHAPE).space)[1].shape == (0, DIM)
