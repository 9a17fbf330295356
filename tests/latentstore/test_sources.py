"""Tar shards and patterns: the rows that loose files give, whatever is in the archive; nothing unpacked."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest
from store_worlds import SIZE, encode_patch, file_bytes, picture, tree

from latentstore import images
from latentstore.encode import Source
from latentstore.errors import ImageError, LatentStoreError, ManifestError, UsageError
from latentstore.sources import patterns, tars
from latentstore.sources.places import LocalFile
from latentstore.store import open_store

MTIME = 1_700_000_000


def png(seed):
    return file_bytes(picture(seed), "PNG")


def tar_bytes(members, **options):
    """A tar of (name, bytes) pairs, in their order; a TarInfo stands for itself."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg() and not isinstance(name, tarfile.TarInfo):
                info.size, info.mtime = len(data), MTIME
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **options))
    return path


def paths(source):
    return source.list()["path"].to_pylist()


def listed(path):
    return {"path": path, "path_raw": None}


@pytest.fixture
def shards(tmp_path):
    """Three tars of 30 pictures each, in no order of names."""
    rng = random.Random(0)
    for shard in range(3):
        names = [f"{shard}{i:03d}.png" for i in range(30)]
        rng.shuffle(names)
        write_tar(tmp_path / "in" / f"photos-{shard:03d}.tar", [(n, png(int(n[:4]))) for n in names])
    return tmp_path / "in"


# --- rows --------------------------------------------------------------------------------------------


def test_a_tar_gives_the_rows_of_its_files(shards, tmp_path):
    loose = tmp_path / "loose"
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                target = loose / path.name.replace(".tar", ".d") / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    before = tree(tmp_path / "in")
    encode_patch(shards, tmp_path / "tar.zarr")
    encode_patch(loose, tmp_path / "loose.zarr")
    tar, plain = open_store(tmp_path / "tar.zarr"), open_store(tmp_path / "loose.zarr")
    assert tar.counts() == {"ok": 90}
    by_path = {p.replace(".d/", ".tar/"): i for i, p in enumerate(plain.manifest()["path"].to_pylist())}
    order = [by_path[p] for p in tar.manifest()["path"].to_pylist()]
    assert sorted(order) == list(range(90))
    assert order != list(range(90)), "the tar's own order"
    assert (tar.reader.read(0, 90) == plain.reader.gather(order)).all()
    columns = ["sha256", "bytes", "width", "height"]
    assert tar.manifest(columns).to_pydict() == plain.manifest(columns).take(order).to_pydict()
    assert set(tar.manifest()["mtime"].to_pylist()) == {MTIME * 10**9}
    assert tree(tmp_path / "in") == before, "nothing is unpacked"


def test_the_order_is_the_archives(tmp_path):
    names = ["c.png", "a.png", "b/a.png", "./B.png"]
    write_tar(tmp_path / "x.tar", [(n, b"") for n in names])
    write_tar(tmp_path / "Y.TAR", [("z.png", b"")])
    expected = ["Y.TAR/z.png", *(f"x.tar/{n.removeprefix('./')}" for n in names)]
    assert paths(Source(tmp_path)) == expected


def test_every_way_of_naming_gives_the_same_rows(shards, monkeypatch):
    whole = Source(shards).list()
    monkeypatch.chdir(shards.parent)
    for named in (
        "in/*.tar",
        "in/photos-{000..002}.tar",
        "in/photos-00[0-2].tar",
        f"{shards}/photos-{{000,001,002}}.tar",
        ["in/photos-002.tar", "in/photos-000.tar", "in/photos-001.tar"],
    ):
        source = Source.of(named)
        assert source.list().equals(whole), named
        assert source.describe()["root"] == str(shards)
    assert paths(Source.of("in/photos-001.tar")) == [p for p in whole["path"].to_pylist() if "-001" in p]
    assert paths(Source.of(["in/photos-000.tar"])) == paths(Source.of("in/photos-000.tar"))
    # Also below a folder, and pictures beside tars.
    (shards / "one.png").write_bytes(png(1))
    assert paths(Source.of("*/photos-000.tar"))[0].startswith("in/photos-000.tar/")
    assert paths(Source.of("in/*"))[0] == "one.png"
    assert paths(Source(shards)) == ["one.png"], "tars beside loose pictures are something else"
    # A name that is there is itself, whatever signs it holds.
    (shards / "odd[1]{a,b}.tar").write_bytes(tar_bytes([("x.png", b"")]))
    assert paths(Source.of(str(shards / "odd[1]{a,b}.tar"))) == ["odd[1]{a,b}.tar/x.png"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{09..11}", ["09", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{,y}", ["x", "xy"]),
        ("{a}", ["{a}"]),
        ("plain", ["plain"]),
    ],
)
def test_braces(pattern, names):
    assert patterns.expand(pattern) == names


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ("none-*.tar", "No file matches none-"),
        ("photos-{000..003}.tar", r"There is no file .*photos-003\.tar"),
        ("photos-009.tar", r"There is no file .*photos-009\.tar"),
        ("{0..99999999}.tar", "100,000 names"),
        ("nowhere", "There is no folder"),
        (["in", "photos-000.tar"], "a store has one"),
        ("photos.tar.gz", "compressed"),
        ("https://example.org/photos", "no list of the files"),
    ],
)
def test_names_that_are_not_there(shards, monkeypatch, named, match):
    monkeypatch.chdir(shards)
    with pytest.raises(UsageError, match=match) as caught:
        Source.of(named).list()
    assert "\n" not in str(caught.value)


def test_a_resumed_and_a_grown_tar(shards, tmp_path):
    """New tars, and new members of an old one, come behind; what was there stays, byte for byte."""
    first = tmp_path / "in" / "photos-000.tar"
    encode_patch(None, tmp_path / "s.zarr", source=Source.of(str(first)))
    before = open_store(tmp_path / "s.zarr").reader.read(0, 30).copy()
    old = paths(Source.of(str(first)))
    with tarfile.open(first, "a") as tar:
        info = tarfile.TarInfo("0999.png")
        info.size = len(png(999))
        tar.addfile(info, io.BytesIO(png(999)))
    summary = encode_patch(None, tmp_path / "s.zarr", source=Source(shards))
    store = open_store(tmp_path / "s.zarr")
    assert (summary.encoded, summary.appended, summary.changed) == (61, 61, {})
    now = store.manifest()["path"].to_pylist()
    assert now[:31] == [*old, "photos-000.tar/0999.png"]
    assert (store.reader.read(0, 30) == before).all()
    assert store.counts() == {"ok": 91}


# --- what stands beside an image ---------------------------------------------------------------------


def test_sidecars_and_stems(tmp_path):
    def say(**fields):
        return json.dumps(fields).encode()

    write_tar(
        tmp_path / "in" / "a.tar",
        [
            ("T000123.png", b""),
            ("T000123_4.caption", b"a cat\n"),
            ("T000123_4.png", b""),
            ("d/x.y.json", say(identity=0, role="query", model="SD", strength=0.5, split="test", other=[1])),
            ("d/x.y.png", b""),
            ("d/x.txt", b"of x, since a sample's name ends at the first dot"),
            ("e.png", b""),
            ("e.txt", b"not a prompt: e is no translation"),
            ("f.png", b""),
            ("f.json", say(role="translation", identity="e.g.", group="g", prompt="mine")),
            ("f.txt", b"theirs"),
            ("g.png", b""),
            ("g.json", b"[1, 2]"),
        ],
    )
    rows = {r["path"].removeprefix("a.tar/"): r for r in Source(tmp_path / "in").list().to_pylist()}
    assert list(rows) == ["T000123.png", "T000123_4.png", "d/x.y.png", "e.png", "f.png", "g.png"]
    original, translated = rows["T000123.png"], rows["T000123_4.png"]
    assert (original["identity"], original["role"], original["prompt"]) == ("T000123", "origin", "")
    assert (translated["identity"], translated["role"]) == ("T000123", "translation")
    assert translated["prompt"] == "a cat"
    x = rows["d/x.y.png"]
    said = {"identity": "0", "role": "query", "model": "SD", "strength": 0.5, "split": "test", "prompt": ""}
    assert {k: x[k] for k in said} == said
    assert (rows["e.png"]["prompt"], rows["e.png"]["identity"]) == ("", "a.tar/e.png")
    assert (rows["f.png"]["prompt"], rows["f.png"]["group"]) == ("mine", "g")
    assert rows["g.png"]["role"] == "reference"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{not json", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"identity": {"a": 1}}', "identity is"),
        (b'{"strength": "strong"}', "strength is"),
        (b'{"role": "king"}', "role is 'king'"),
        (b'{"split": "dev"}', "split is 'dev'"),
    ],
)
def test_bad_sidecars(tmp_path, text, match):
    """Left out in silence, they would move rows to another identity or split."""
    write_tar(tmp_path / "a.tar", [("x.png", b""), ("x.json", text)])
    with pytest.raises(ManifestError, match=match):
        Source(tmp_path).list()


# --- hostile archives --------------------------------------------------------------------------------


def special(name, kind, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def test_hostile_members_are_rows(tmp_path):
    names = {
        "good.png": "ok",
        "/absolute.png": "link_outside",
        "../../up.png": "link_outside",
        "a/../b.png": "link_outside",
        "sym.png": "unreadable",
        "hard.png": "unreadable",
        "fifo.png": "unreadable",
        "device.png": "unreadable",
        "folder.png": "unreadable",
        "sparse.png": "unreadable",
        "text.png": "unreadable",
        "long/" * 60 + "name.png": "ok",
        "latin1-\udce9.png": "ok",
        "new\nline.png": "ok",
    }
    kinds = {
        "sym.png": special("sym.png", tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard.png": special("hard.png", tarfile.LNKTYPE, linkname="good.png"),
        "fifo.png": special("fifo.png", tarfile.FIFOTYPE),
        "device.png": special("device.png", tarfile.CHRTYPE),
        "folder.png": special("folder.png", tarfile.DIRTYPE),
        "sparse.png": special(
            "sparse.png", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": "9"}
        ),
    }
    members = [(kinds.get(n, n), b"" if n in kinds else png(1)) for n in names if n != "text.png"]
    write_tar(tmp_path / "in" / "x.tar", [*members, ("text.png", b"no picture"), ("readme.md", b"")])
    before = tree(tmp_path)
    encode_patch(tmp_path / "in", tmp_path / "s.zarr")
    table = open_store(tmp_path / "s.zarr").manifest()
    found = dict(zip(table["path"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert found == {f"x.tar/{n}".replace("\udce9", "\\xe9"): status for n, status in names.items()}
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("s.zarr/")} == before


def test_a_member_may_be_as_large_as_a_file(tmp_path, monkeypatch):
    data = png(1)
    write_tar(tmp_path / "x.tar", [("a.png", data)])
    monkeypatch.setattr(tars, "MAX_BYTES", len(data))
    assert Source(tmp_path).read(listed("x.tar/a.png")).data == data
    monkeypatch.setattr(tars, "MAX_BYTES", len(data) - 1)
    with pytest.raises(ImageError, match="bytes") as caught:
        Source(tmp_path).read(listed("x.tar/a.png"))
    assert caught.value.status == "too_large"


def negative():
    """A member whose size is negative: following it leads back to its own header, for ever."""
    body = bytearray(tar_bytes([("a.png", b"x" * 600)])[:512])
    body[124:136] = (256**12 - 1024).to_bytes(12, "big")
    body[148:156] = b" " * 8
    body[148:156] = f"{sum(body):06o}\0 ".encode()
    return bytes(body)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("data", "match"),
    [
        (gzip.compress(tar_bytes([("a.png", b"x")])), "compressed with gzip"),
        (b"", "no tar archive"),
        (b"no tar at all" * 100, "no tar archive"),
        (tar_bytes([("a.png", b"1"), ("./a.png", b"2")]), r"holds a\.png twice"),
        (tar_bytes([("a.png", b"1")])[:1024] + b"\1" * 512 + bytes(1024), "damaged at byte 1024"),
        (tar_bytes([("a.txt", b"")]), "holds no image files"),
        (negative() + bytes(5120), "negative size|damaged|no tar"),
        (tar_bytes([("a.png", b"1")])[:1024] + negative() + bytes(5120), "negative size|damaged"),
        (tar_bytes([("x" * 150 + ".png", b"")], format=tarfile.GNU_FORMAT)[:1024] * 2000, "damaged"),
    ],
)
def test_archives_that_cannot_be_used(tmp_path, data, match):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UsageError, match=match) as caught:
        Source(tmp_path).list()
    assert "x.tar" in str(caught.value) or "image files" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_torn_tar_keeps_what_it_holds(tmp_path):
    """Cut at any byte: whole members read as they were, the torn one is a bad row or is not there."""
    contents = {f"{i}.png": bytes([i]) * size for i, size in enumerate((700, 0, 512, 1300))}
    whole = tar_bytes(contents.items())[: 512 * (4 + 2 + 0 + 1 + 3)]
    path = tmp_path / "x.tar"
    for cut in [*range(512, len(whole), 97), len(whole)]:
        path.write_bytes(whole[:cut])
        rows = [p.removeprefix("x.tar/") for p in paths(Source(tmp_path))]
        assert rows == list(contents)[: len(rows)]
        for name in rows:
            if name != rows[-1] or cut == len(whole):
                assert Source(tmp_path).read(listed(f"x.tar/{name}")).data == contents[name]
        with tarfile.open(path) as tar:
            end = tar.next()
            while end.name != rows[-1]:
                end = tar.next()
        if end.offset_data + end.size > cut:
            with pytest.raises(ImageError, match="ends inside") as caught:
                Source(tmp_path).read(listed(f"x.tar/{rows[-1]}"))
            assert caught.value.status == "unreadable"
    assert len(rows) == 4


@pytest.mark.timeout(60)
def test_random_damage_never_crashes_nor_mixes_members_up(tmp_path):
    """Whatever byte is flipped: a named refusal, or members of which each has its own bytes or a status."""
    rng = random.Random(1)
    sample = [(f"{'n' * (i * 40)}{i}.png", bytes([i]) * rng.randrange(1500)) for i in range(6)]
    sample.insert(3, ("2.json", b'{"identity": "x"}'))
    outcomes = {"refused": 0, "read": 0, "bad": 0}
    original = dict(sample)
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        fits = [(n, d) for n, d in sample if form != tarfile.USTAR_FORMAT or len(n) < 100]
        whole = tar_bytes(fits, format=form)
        for at in range(250):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
            path = tmp_path / f"{form}-{at}.tar"
            path.write_bytes(data)
            try:
                found, _ = tars.rows(LocalFile(path), b"x.tar")
            except LatentStoreError:
                outcomes["refused"] += 1
                continue
            for row in found:
                name = row["path"].removeprefix("x.tar/")
                try:
                    read = tars.read(LocalFile(path), name)
                    outcomes["read"] += 1
                    if name in original:
                        pairs = zip(read.data, original[name], strict=True)
                        assert sum(x != y for x, y in pairs) <= 1
                except ImageError:
                    outcomes["bad"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 50, outcomes


def test_a_tar_that_changes_behind_our_back(tmp_path):
    """Two members change places, unseen by size and time: neither is read as the other."""
    a, b = bytes([1]) * 600, bytes([2]) * 600
    path = write_tar(tmp_path / "x.tar", [("a.png", a), ("b.png", b)])
    source = Source(tmp_path)
    assert paths(source) == ["x.tar/a.png", "x.tar/b.png"]
    facts = path.stat()
    write_tar(path, [("b.png", b), ("a.png", a)])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    for name in "ab":
        with pytest.raises(ImageError, match="no longer holds") as caught:
            source.read(listed(f"x.tar/{name}.png"))
        assert caught.value.status == "missing"
    os.utime(path)  # now it shows
    assert source.read(listed("x.tar/a.png")).data == a
    path.unlink()
    with pytest.raises(ImageError, match="not there"):
        source.read(listed("x.tar/a.png"))


def test_a_tar_that_was_cut_off_is_told(tmp_path):
    """Between two members nothing is torn: only the mark at the end is missing. What is there is used."""
    whole = tar_bytes([("a.png", png(1)), ("b.png", png(2))], bufsize=512)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        second = tar.getmember("b.png").offset
    ends = second + 512 + -(-len(png(2)) // 512) * 512
    for end, names, cut in [
        (len(whole), "ab", False),
        (ends + 512, "ab", False),  # one block of zeros instead of two: some programs write that
        (ends, "ab", True),
        (second, "a", True),
        (second + 100, "a", True),
    ]:
        (tmp_path / "x.tar").write_bytes(whole[:end])
        source = Source(tmp_path)
        for _ in range(2):  # also when it is listed again
            assert paths(source) == [f"x.tar/{name}.png" for name in names]
            assert len(source.notes) == cut, end
        assert all("x.tar has no end-of-archive mark" in note for note in source.notes)
        for name in names:
            assert source.read(listed(f"x.tar/{name}.png")).data == png("ab".index(name) + 1)


def test_a_tar_in_a_folder_that_is_called_so(tmp_path):
    write_tar(tmp_path / "old.tar" / "new.tar" / "x.tar", [("d.tar/a.png", png(1))])
    source = Source(tmp_path)
    assert paths(source) == ["old.tar/new.tar/x.tar/d.tar/a.png"]
    encode_patch(None, tmp_path / "s.zarr", source=source)
    assert open_store(tmp_path / "s.zarr").counts() == {"ok": 1}


def test_one_folder_has_one_name(tmp_path, monkeypatch):
    """.. is no other folder, and a link is not resolved; behind a link .. leads where it leads."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "deep")
    monkeypatch.chdir(tmp_path / "here")
    for named, root in [
        ("../there", tmp_path / "there"),
        ("../here/../there/./deep", tmp_path / "there" / "deep"),
        ("../link", tmp_path / "link"),
        ("../gone", tmp_path / "gone"),
        ("../link/..", tmp_path / "here" / ".." / "link" / ".."),
    ]:
        assert Source.of(named).describe()["root"] == str(root)
    assert Source(Path(), Path("../list.csv")).describe()["manifest"] == str(tmp_path / "list.csv")


def test_tars_and_links(tmp_path):
    outside = write_tar(tmp_path / "out" / "x.tar", [("a.png", png(1))])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").symlink_to(outside)
    with pytest.raises(UsageError, match="leads outside"):
        Source(tmp_path / "in").list()
    encode_patch(None, tmp_path / "s.zarr", source=Source(tmp_path / "in", follow_links=True))
    assert open_store(tmp_path / "s.zarr").counts() == {"ok": 1}


def test_a_manifest_may_name_members(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("b.png", png(2))])
    (tmp_path / "y.tar").mkdir()  # a folder may be called so, too
    (tmp_path / "y.tar" / "c.png").write_bytes(png(3))
    names = ["x.tar/a.png", "x.tar/none.png", "y.tar/c.png", f"{tmp_path}/x.tar/b.png"]
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names) + "\n")
    encode_patch(None, tmp_path / "s.zarr", source=Source.of(None, tmp_path / "list.csv"))
    table = open_store(tmp_path / "s.zarr").manifest()
    found = dict(zip(table["path"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert found == dict(zip(names, ["ok", "missing", "ok", "ok"], strict=True))


def test_a_source_is_what_its_store_recorded(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (
        Source(Path("in")),
        Source.of("in/*.tar"),
        Source(Path("in"), Path("list.csv"), follow_links=True),
        Source.of("memory://bucket/in"),
    ):
        assert Source.recorded(source.describe()) == source.absolute()


def test_pixels_come_from_bytes_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    from_file = images.load(tmp_path / "a.png", SIZE)
    from_bytes = images.picture(images.hashed(png(1), from_file.mtime), SIZE)
    assert (from_file.rgb == from_bytes.rgb).all()
    assert (from_file.sha256, from_file.bytes) == (from_bytes.sha256, from_bytes.bytes)
