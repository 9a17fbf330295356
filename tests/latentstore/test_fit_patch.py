"""The photographs that the built-in encoders are fitted on, as the scripts read them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from store_worlds import picture

from latentstore.errors import ImageError
from latentstore.training.fit_patch import SIZE, read_photos


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i, place in enumerate(("a.jpg", "deep/b.png")):
        picture(i, 90, 70).save(folder / place)
    (folder / "notes.txt").write_text("no photo")
    return folder


def packed(folder, tar):
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, ".")
    return tar


def test_a_folder_and_a_tar_of_it_give_the_same_photos(folder, tmp_path):
    photos = dict(read_photos([folder]))
    assert sorted(photos) == ["a.jpg", "b.png"]
    assert {photo.shape for photo in photos.values()} == {(SIZE, SIZE, 3)}
    again = dict(read_photos([packed(folder, tmp_path / "photos.tar")]))
    assert again.keys() == photos.keys()
    for name, photo in photos.items():
        np.testing.assert_array_equal(again[name], photo)


@pytest.mark.parametrize("tarred", [False, True])
def test_a_damaged_photo_is_named(folder, tmp_path, tarred):
    whole = io.BytesIO()
    picture(3, 90, 70).save(whole, "PNG")
    (folder / "deep" / "cut.png").write_bytes(whole.getvalue()[:200])
    source = packed(folder, tmp_path / "photos.tar") if tarred else folder
    with pytest.raises(ImageError, match="cannot be trained on") as caught:
        list(read_photos([source]))
    assert f"cut.png in {source}" in str(caught.value)
    assert caught.value.status == "unreadable"
