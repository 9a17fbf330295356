"""Attacks on pixels, and the tiles of the demo's photographs."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image
from store_worlds import encode_patch, picture

from latentstore import attacks
from latentstore.attacks import (
    FAMILIES,
    USUAL,
    blur,
    brightness,
    colour,
    contrast,
    crop,
    flip,
    jpeg,
    noise,
    rotation,
    saturation,
    shrink,
    watermark,
)
from latentstore.encode import Source
from latentstore.errors import MissingExtraError, UsageError
from latentstore.photos import bundled, tiles, write_tiles
from latentstore.store import open_store


def array(image):
    return np.asarray(image).astype(int)


IMAGE = picture(1, 100, 60)


@pytest.mark.parametrize("quality", [1, 30, 95, 100])
def test_jpeg(quality):
    attack = jpeg(quality)
    assert attack.name == f"JPEG {quality}"
    out = attack(IMAGE, 0)
    assert (out.mode, out.size) == ("RGB", IMAGE.size)
    np.testing.assert_array_equal(array(out), array(attack(IMAGE, 99)))  # there is nothing to draw


def test_worse_jpeg_is_worse():
    losses = [np.abs(array(jpeg(q)(IMAGE, 0)) - array(IMAGE)).mean() for q in (5, 30, 95)]
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize("quality", [0, -1, 101, 90.5, float("nan")])
def test_jpeg_bounds(quality):
    with pytest.raises(UsageError, match="from 1 to 100"):
        jpeg(quality)


@pytest.mark.parametrize("attack", [blur(2), noise(20), colour(0.3)], ids=lambda a: a.name)
def test_attacks_change_values_not_size(attack):
    out = attack(IMAGE, 3)
    assert (out.mode, out.size) == ("RGB", IMAGE.size)
    assert (array(out) != array(IMAGE)).any()
    np.testing.assert_array_equal(array(out), array(attack(IMAGE, 3)))
    drawn = (array(out) != array(attack(IMAGE, 4))).any()
    assert drawn == ("blur" not in attack.name)


def test_blur_keeps_the_mean_and_takes_the_detail():
    photo = noisy(1, 100, 60)
    out = array(blur(3)(photo, 0))
    assert abs(out.mean() - array(photo).mean()) < 1.0  # rounding, and borders that are repeated
    assert np.abs(np.diff(out, axis=1)).mean() < 0.1 * np.abs(np.diff(array(photo), axis=1)).mean()


def test_noise_has_the_deviation_that_was_asked_for():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    error = array(noise(10)(grey, 0)) - 128
    # 120,000 draws know their deviation to 10 / sqrt(240,000) = 0.02; rounding adds 1/12 to the variance.
    assert abs(error.std() - np.sqrt(100 + 1 / 12)) < 0.1
    assert abs(error.mean()) < 0.15


def test_colour_is_one_curve_for_each_channel():
    before, after = array(IMAGE), array(colour(0.5)(IMAGE, 1))
    for channel in range(3):
        order = np.argsort(before[..., channel].ravel(), kind="stable")
        assert (np.diff(after[..., channel].ravel()[order]) >= 0).all()


def test_shrink():
    assert shrink(0.25)(IMAGE, 0).size == (25, 15)
    assert shrink(0.001)(IMAGE, 0).size == (1, 1)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        *((blur, 0), (blur, float("nan")), (noise, -1), (colour, 0), (colour, float("inf")), (shrink, 1)),
        *((watermark, -0.1), (watermark, 1.1), (watermark, float("nan")), (flip, 0), (flip, 3)),
        *((rotation, -1), (rotation, 181), (rotation, float("nan"))),
        *((brightness, -1), (contrast, float("inf")), (saturation, float("nan"))),
    ],
)
def test_attacks_refuse_nothing_and_nonsense(make, value):
    with pytest.raises(UsageError, match=str(value)):
        make(value)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.875, 0.999])
def test_crop(keep):
    attack = crop(keep)
    places = set()
    for seed in range(20):
        out = attack(IMAGE, seed)
        assert out.size == (round(100 * keep), round(60 * keep))
        np.testing.assert_array_equal(array(out), array(attack(IMAGE, seed)))
        # It is a part of the picture, moved but not changed.
        windows = np.lib.stride_tricks.sliding_window_view(array(IMAGE), (*out.size[::-1], 3))[:, :, 0]
        where = np.argwhere((windows == array(out)).all(axis=(2, 3, 4)))
        assert len(where) >= 1
        places.add(tuple(where[0]))
    assert (len(places) > 3) is (keep < 0.9)


def test_crop_of_one_pixel():
    assert crop(0.1)(Image.new("RGB", (1, 3)), 0).size == (1, 1)


@pytest.mark.parametrize("keep", [0, 1, -0.5, 1.5])
def test_crop_bounds(keep):
    with pytest.raises(UsageError, match="between 0 and 1"):
        crop(keep)


@pytest.mark.parametrize(
    "attack", [rotation(0), watermark(0), brightness(1), contrast(1), saturation(1)], ids=lambda a: a.name
)
def test_no_intensity_is_no_attack(attack):
    np.testing.assert_array_equal(array(attack(IMAGE, 3)), array(IMAGE))


@pytest.mark.parametrize("kind", [1, 2])
def test_a_flip_undoes_itself_and_leaves_its_own_symmetry_alone(kind):
    attack = flip(kind)
    once = attack(IMAGE, 0)
    assert (array(once) != array(IMAGE)).any()
    np.testing.assert_array_equal(array(attack(once, 0)), array(IMAGE))
    axis = 2 - kind
    symmetric = Image.fromarray(
        np.concatenate([array(IMAGE), np.flip(array(IMAGE), axis)], axis).astype(np.uint8)
    )
    np.testing.assert_array_equal(array(attack(symmetric, 0)), array(symmetric))
    assert (array(flip(3 - kind)(symmetric, 0)) != array(symmetric)).any()


def test_right_angles_lose_nothing():
    turned = {rotation(90)(IMAGE, seed).tobytes() for seed in range(10)}
    ways = [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270]
    assert turned == {IMAGE.transpose(way).tobytes() for way in ways}  # both directions, seeded
    assert rotation(90)(IMAGE, 0).size == IMAGE.size[::-1]
    np.testing.assert_array_equal(array(rotation(180)(IMAGE, 0)), array(flip(1)(flip(2)(IMAGE, 0), 0)))


@pytest.mark.parametrize("degrees", [5, 20, 45])
def test_other_turns_keep_the_frame_and_the_middle_and_blacken_the_corners(degrees):
    grey = Image.new("RGB", (101, 61), (200, 100, 50))
    out = array(rotation(degrees)(grey, 0))
    assert out.shape == (61, 101, 3)
    assert out[30, 50].tolist() == [200, 100, 50]
    corners = out[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.min(axis=0) == 0).all()
    left, right = rotation(degrees)(IMAGE, 0), rotation(degrees)(IMAGE, 2)
    assert {left.tobytes(), right.tobytes()} == {
        IMAGE.rotate(turn, Image.Resampling.BICUBIC).tobytes() for turn in (degrees, -degrees)
    }


def test_a_watermark_is_seeded_and_lies_over_every_part():
    photo = noisy(1, 300, 200)
    marked = array(watermark(0.6)(photo, (0, 7)))
    np.testing.assert_array_equal(marked, array(watermark(0.6)(photo, (0, 7))))
    assert len({watermark(0.6)(photo, (0, row)).tobytes() for row in range(8)}) == 8
    touched = (marked != array(photo)).any(axis=2)
    assert 0.02 < touched.mean() < 0.5
    assert all(part.any() for rows in np.array_split(touched, 3) for part in np.array_split(rows, 3, axis=1))


def test_opacity_is_the_share_of_the_mark():
    photo = noisy(1, 120, 90)
    before, weak, strong = (array(watermark(share)(photo, 4)) for share in (0, 0.3, 0.9))
    # Both masks and both blends are rounded: half a level of 255 each, thrice in the weak one.
    np.testing.assert_allclose(3 * (weak - before), strong - before, atol=3 * (0.5 + 0.5) + 1.5)
    assert np.abs(strong - before).max() > 100


def test_enhancements_end_where_they_say():
    photo = noisy(2, 40, 30)
    assert not array(brightness(0)(photo, 0)).any()
    assert len(np.unique(array(contrast(0)(photo, 0)))) == 1
    plain = array(saturation(0)(photo, 0))
    assert (plain == plain[..., :1]).all()
    assert len(np.unique(plain)) > 1


def test_noise_and_colour_do_not_depend_on_how_the_picture_is_cut(monkeypatch):
    """Drawn for some rows at a time, noise is the noise of the whole; a colour curve is one of each value."""
    photo = noisy(3, 20, 700)
    whole = array(noise(30)(photo, 5))
    monkeypatch.setattr(attacks, "_ROWS", 11)
    np.testing.assert_array_equal(array(noise(30)(photo, 5)), whole)
    *gains, gamma = np.exp(np.random.default_rng(5).normal(0.0, 0.4, 4))
    by_value = np.rint(255 * (np.array(gains) * (array(photo) / 255) ** gamma).clip(0, 1))
    np.testing.assert_array_equal(array(colour(0.4)(photo, 5)), by_value)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    family = FAMILIES[name]
    made = [family.make(intensity) for intensity in family.intensities]
    assert len({attack.name for attack in made}) == len(made)
    assert list(family.intensities) == sorted(family.intensities, reverse=not family.rises)
    assert family.neutral not in family.intensities
    assert (family.neutral < min(family.intensities)) == family.rises
    drawn = name in ("crop", "colour", "noise", "watermark")
    for attack in made:
        pictures = [attack(IMAGE, (0, row)).tobytes() for row in (1, 1, 2)]
        assert pictures[0] == pictures[1]
        assert (pictures[0] != pictures[2]) or not drawn
        for size in ((1, 1), (1, 90), (90, 1), (3, 2)):
            out = attack(Image.new("RGB", size, (9, 8, 7)), (0, 1))
            assert out.mode == "RGB"
            assert min(out.size) >= 1


def test_the_papers_strongest_are_there_and_something_beyond():
    assert set(USUAL) <= set(FAMILIES)
    assert FAMILIES["jpeg"].intensities[:8] == (100, 90, 80, 70, 60, 50, 40, 30)
    assert FAMILIES["jpeg"].intensities[-1] < 30
    assert FAMILIES["blur"].intensities[:3] == (1, 2, 3)
    assert FAMILIES["blur"].intensities[-1] > 3


# --- photos ------------------------------------------------------------------------------------------


def noisy(seed, width, height):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_tiles_are_the_photo_in_pieces(tmp_path):
    photo = noisy(1, 100, 70)
    photo.paste((9, 9, 9), (32, 0, 64, 32))  # a blank tile
    photo.save(tmp_path / "photo.png")
    found = dict(tiles(tmp_path / "photo.png", 32))
    assert sorted(found) == [
        f"photo-{y:02d}-{x:02d}.png" for y in (0, 1) for x in (0, 1, 2) if (y, x) != (0, 1)
    ]
    for name, tile in found.items():
        y, x = (32 * int(part) for part in name.removesuffix(".png").split("-")[1:])
        assert tile.size == (32, 32)
        np.testing.assert_array_equal(array(tile), array(photo)[y : y + 32, x : x + 32])


def test_no_photo_is_in_two_splits(tmp_path):
    photos = []
    for i in range(10):
        noisy(i, 300, 260).save(tmp_path / f"p{i}.png")
        photos.append(tmp_path / f"p{i}.png")
    listed = write_tiles(tmp_path / "tiles", photos, limit_per_photo=3)
    again = write_tiles(tmp_path / "again", photos[::-1], limit_per_photo=3)
    with listed.open(encoding="utf-8") as a, again.open(encoding="utf-8") as b:
        rows = list(csv.DictReader(a))
        assert sorted(map(str, rows)) == sorted(map(str, csv.DictReader(b)))  # whatever the order
    split = {}
    for row in rows:
        assert split.setdefault(row["group"], row["split"]) == row["split"]
        assert row["path"].startswith(row["group"])
    sides = list(split.values())
    assert {s: sides.count(s) for s in sides} == {"train": 6, "validation": 2, "test": 2}
    assert len(rows) == 30
    encode_patch(None, tmp_path / "s.zarr", source=Source.of(None, listed))
    table = open_store(tmp_path / "s.zarr").manifest()
    assert table["split"].to_pylist() == [split[g] for g in table["group"].to_pylist()]
    assert open_store(tmp_path / "s.zarr").counts() == {"ok": 30}


def test_bundled_photos(tmp_path):
    pytest.importorskip("skimage")
    photos = bundled()
    assert len(photos) >= 5
    assert len({p.stem for p in photos}) == len(photos)  # stems are groups
    listed = write_tiles(tmp_path / "tiles", photos, limit_per_photo=2)
    with listed.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {r["split"] for r in rows} == {"train", "validation", "test"}
    by_group = {r["group"]: set() for r in rows}
    for r in rows:
        by_group[r["group"]].add(r["split"])
        with Image.open(tmp_path / "tiles" / r["path"]) as tile:
            assert tile.size == (128, 128)
    assert all(len(s) == 1 for s in by_group.values())


def test_without_the_packages_the_pip_line_is_said(monkeypatch):
    from latentstore import photos

    monkeypatch.setattr(photos, "PHOTOS", {"no_such_package/data": ("a.png",)})
    with pytest.raises(MissingExtraError, match="pip install"):
        photos.bundled()
