"""Lists of images: folders, CSV, Parquet."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_worlds import encode_patch, picture, rows_of

from latentstore.encode import Source
from latentstore.errors import ManifestError
from latentstore.manifest import (
    INPUT_SCHEMA,
    MANIFEST_SCHEMA,
    input_table,
    list_folder,
    list_manifest,
    new_inputs,
)
from latentstore.schema import split_of
from latentstore.store import open_store


def csv(tmp_path, text, name="list.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def parquet(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    return tmp_path / "list.parquet"


def test_the_path_is_enough(tmp_path):
    table = list_manifest(csv(tmp_path, "path\nb/cat.jpg\nT000001_3.jpg\na.png\nT000001.jpg\n"))
    assert table.schema.equals(INPUT_SCHEMA)
    assert table["path"].to_pylist() == ["T000001.jpg", "T000001_3.jpg", "a.png", "b/cat.jpg"]
    assert table["identity"].to_pylist() == ["T000001", "T000001", "a.png", "b/cat.jpg"]
    assert table["role"].to_pylist() == ["origin", "translation", "reference", "reference"]
    assert table["split"].to_pylist() == [split_of(i) for i in table["identity"].to_pylist()]
    assert table["group"].to_pylist() == table["identity"].to_pylist()
    assert set(table["source"].to_pylist()) == {"file"}
    assert table["strength"].null_count == 4


COLUMNS = {
    "path": ["b.png", "a.png"],
    "identity": ["007", "008"],
    "group": ["g", "g"],
    "role": ["origin", "query"],
    "split": ["test", "test"],
    "model": ["", "SD 2"],
    "prompt": ["", 'a "cat", red\nand blue'],
    "strength": [None, 0.75],
}


def test_csv_and_parquet_say_the_same(tmp_path):
    text = (
        "path,identity,group,role,split,model,prompt,strength,unknown\n"
        "b.png,007,g,origin,test,,,,1\n"
        'a.png,008,g,query,test,SD 2,"a ""cat"", red\nand blue",0.75,2\n'
    )
    a = list_manifest(csv(tmp_path, text))
    b = list_manifest(parquet(tmp_path, **COLUMNS, unknown=[1, 2]))
    assert a.equals(b)
    assert a.to_pylist()[0] == {
        "path": "a.png",
        "path_raw": None,
        "identity": "008",  # not the number 8
        "group": "g",
        "role": "query",
        "split": "test",
        "source": "file",
        "model": "SD 2",
        "prompt": 'a "cat", red\nand blue',
        "strength": 0.75,
    }


@pytest.mark.parametrize("name", ["NA", "null", "nan", "NULL", "N/A", "None", "true", "1.0", "1e5", "-nan"])
def test_names_that_look_like_nothing(tmp_path, name):
    table = list_manifest(csv(tmp_path, f"path,identity\n{name},{name}\n"))
    assert table["path"].to_pylist() == [name]
    assert table["identity"].to_pylist() == [name]


def test_utf8(tmp_path):
    names = ["Ärger.jpg", "写真/猫.png", "🌲.png", "<script>.png", "q'uote.png"]
    text = "path\n" + "\n".join(names) + "\n"
    for encoding in ("utf-8", "utf-8-sig"):
        table = list_manifest(csv(tmp_path, text, encoding=encoding))
        assert table["path"].to_pylist() == sorted(names)
    with pytest.raises(ManifestError, match="not a readable"):
        list_manifest(csv(tmp_path, "path\nÄrger.jpg\n", encoding="latin-1"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file,role\na.png,origin\n", "none named path"),
        ("path\n", "lists no images"),
        ("", "not a readable"),
        ("path,role\na.png\n", "not a readable"),
        ("path,role\na.png,orgin\n", "role is 'orgin'"),
        ("path,split\na.png,dev\n", "split is 'dev'"),
        ("path,role\n,origin\n", "empty path"),
        ("path,strength\na.png,strong\n", "not a readable"),
        ("path,identity,split\na.png,x,train\nb.png,x,test\n", "in two splits"),
        ("path,identity,group\na.png,x,g1\nb.png,x,GROUP\n", "in two splits"),
    ],
)
def test_bad_lists(tmp_path, text, match):
    other = next(g for g in (f"g{i}" for i in range(2, 100)) if split_of(g) != split_of("g1"))
    text = text.replace("GROUP", other)
    with pytest.raises(ManifestError, match=match) as caught:
        list_manifest(csv(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ManifestError, match="There is no manifest"):
        list_manifest(tmp_path / "none.csv")
    (tmp_path / "a.parquet").write_text("path\n")
    with pytest.raises(ManifestError, match="not a readable"):
        list_manifest(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("a.png\n")
    with pytest.raises(ManifestError, match=r"is a \.csv or \.parquet file with a column named path"):
        list_manifest(tmp_path / "a.txt")
    with pytest.raises(ManifestError, match="none named path"):
        list_manifest(parquet(tmp_path, file=["a.png"]))


def test_identities_of_one_split_may_share_a_group():
    table = input_table([{"path": f"t{i}.png", "group": "photo"} for i in range(30)])
    assert set(table["split"].to_pylist()) == {split_of("photo")}
    assert len(set(table["identity"].to_pylist())) == 30


def test_paths_are_relative_to_the_list(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    for i in range(3):
        picture(i).save(folder / "pictures" / f"{i}.png")
    listed = csv(folder, "path,identity,role\npictures/2.png,x,query\npictures/0.png,x,origin\nnone.png,,\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    encode_patch(None, tmp_path / "s.zarr", source=Source.of(None, listed))
    table = open_store(tmp_path / "s.zarr").manifest()
    assert table["path"].to_pylist() == ["none.png", "pictures/0.png", "pictures/2.png"]
    assert table["status"].to_pylist() == ["missing", "ok", "ok"]
    assert table["identity"].to_pylist() == ["none.png", "x", "x"]
    assert table.schema.equals(MANIFEST_SCHEMA)
    # or to a folder that is named
    short = csv(tmp_path, "path\n1.png\n", name="short.csv")
    encode_patch(None, tmp_path / "t.zarr", source=Source.of(folder / "pictures", short))
    assert open_store(tmp_path / "t.zarr").counts() == {"ok": 1}


def test_a_list_may_grow_but_not_leak(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    csv(tmp_path, "path,identity,split\n1.png,x,train\n")
    source = Source.of(None, tmp_path / "list.csv")
    encode_patch(None, tmp_path / "s.zarr", source=source)
    csv(tmp_path, "path,identity,split\n0.png,x,test\n")
    with pytest.raises(ManifestError, match="would leak") as caught:
        encode_patch(None, tmp_path / "s.zarr", source=source)
    assert "train" in str(caught.value)
    assert len(open_store(tmp_path / "s.zarr")) == 1
    csv(tmp_path, "path,identity,split\n0.png,x,train\n2.png,y,test\n")
    encode_patch(None, tmp_path / "s.zarr", source=source)
    assert open_store(tmp_path / "s.zarr").manifest()["path"].to_pylist() == ["1.png", "0.png", "2.png"]


def test_new_inputs_keep_their_order():
    committed = rows_of(5)
    listed = rows_of(8)
    assert new_inputs(listed, committed)["path"].to_pylist() == [f"00000{i}.png" for i in (5, 6, 7)]
    assert new_inputs(committed, listed).num_rows == 0
    assert new_inputs(listed, rows_of(0)).equals(listed)


def test_a_folder_is_listed_sorted(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"{x:04d}.JPG" for x in rng.permutation(200)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert list_folder(tmp_path)["path"].to_pylist() == sorted(names)


def test_numbers_are_identities(tmp_path):
    """Identity 0 is an identity, in CSV and in Parquet, and not a missing cell."""
    table = pa.table({"path": ["a.png", "b.png"], "identity": [0, 0], "role": ["origin", "translation"]})
    pq.write_table(table, tmp_path / "m.parquet")
    found = list_manifest(tmp_path / "m.parquet")
    assert found["identity"].to_pylist() == ["0", "0"]
    assert len(set(found["split"].to_pylist())) == 1


def test_a_path_listed_twice_is_refused(tmp_path):
    (tmp_path / "m.csv").write_text("path\na.png\na.png\n")
    with pytest.raises(ManifestError, match=r"a\.png is listed twice"):
        list_manifest(tmp_path / "m.csv")


def test_a_long_list_is_checked_as_a_whole():
    """Rows are made into a table some thousand at a time; two splits of one identity may lie far apart."""
    rows = [{"path": f"{i:05d}.png"} for i in range(10_000)]
    table = input_table(rows)
    assert table.num_rows == 10_000
    assert table.slice(7000, 3).equals(input_table(rows[7000:7003]))
    assert input_table(iter(())).equals(table.slice(0, 0))
    rows[3] |= {"identity": "x", "split": "train"}
    rows[9999] |= {"identity": "x", "split": "test"}
    with pytest.raises(ManifestError, match=r"'x' is in two splits \(train and test\)"):
        input_table(rows)


def test_committed_rows_do_not_change():
    committed = input_table([{"path": f"{i}.png", "prompt": "a cat"} for i in range(9)])
    rows = [{"path": f"{i}.png", "prompt": "a cat"} for i in (8, 2, 5, 11)]
    assert new_inputs(input_table(rows), committed)["path"].to_pylist() == ["11.png"], "order plays no part"
    rows[2]["prompt"] = "a dog"
    with pytest.raises(ManifestError, match=r"5\.png: prompt is now 'a dog'; .* made with 'a cat'"):
        new_inputs(input_table(rows), committed)
