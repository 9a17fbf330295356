"""A bad image is a recorded row, never a gap, a shift or a crash; an odd one that is fine stays fine."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
from PIL import Image
from store_worlds import SIZE, encode_patch, file_bytes, picture, png_claiming, write_raw

from latentstore import images
from latentstore.encode import Source
from latentstore.encoders import PatchEncoder
from latentstore.errors import ImageError
from latentstore.store import open_store

MAX_PIXELS = 50_000


def good_bytes(seed=1):
    return file_bytes(picture(seed, 64, 48), "PNG")


@pytest.fixture
def outside(tmp_path):
    path = tmp_path / "outside.png"
    path.write_bytes(good_bytes(2))
    return path


def bad_and_good(folder, outside):
    """Fill a folder; return what each row's status must be."""
    folder.mkdir()
    jpeg = file_bytes(picture(3, 200, 150), "JPEG")
    files = {
        b"a-good.png": (good_bytes(), "ok"),
        b"b-truncated.jpg": (jpeg[: len(jpeg) // 2], "unreadable"),
        b"c-text.jpg": (b"this is not a picture\n", "unreadable"),
        b"d-empty.jpg": (b"", "unreadable"),
        b"e-bomb.png": (png_claiming(60_000, 60_000), "too_large"),
        b"f-large-bomb.png": (png_claiming(10_000, 10_000), "too_large"),
        b"g-large.png": (file_bytes(Image.new("RGB", (300, 200)), "PNG"), "too_large"),
        b"h-header-only.png": (png_claiming(40, 40), "unreadable"),
        b"i-svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable"),
        b"j-script-<script>alert(1)</script>".replace(b"/", b"_") + b".png": (good_bytes(4), "ok"),
        b"k-new\nline.png": (good_bytes(5), "ok"),
        b"l-\"quotes\" 'and' ,commas;.png": (good_bytes(6), "ok"),
        b"m-latin1-\xe9\xff.png": (good_bytes(7), "ok"),
        b"m-latin1-broken-\xe9.png": (b"no picture", "unreadable"),
        "n-ümläut-写真-🌲.png".encode(): (good_bytes(8), "ok"),
        b"o-" + b"x" * 240 + b".png": (good_bytes(9), "ok"),
        b"z-good.png": (good_bytes(10), "ok"),
    }
    for name, (data, _) in files.items():
        write_raw(folder, name, data)
    expected = {name: status for name, (_, status) in files.items()}

    os.mkfifo(folder / "p-pipe.jpg")
    expected[b"p-pipe.jpg"] = "unreadable"
    (folder / "q-inside.png").symlink_to("a-good.png")
    expected[b"q-inside.png"] = "ok"
    (folder / "r-outside.png").symlink_to(outside)
    expected[b"r-outside.png"] = "link_outside"
    (folder / "s-dangling.png").symlink_to("nowhere.png")
    expected[b"s-dangling.png"] = "missing"
    (folder / "t-loop.png").symlink_to("t-loop.png")
    expected[b"t-loop.png"] = "unreadable"
    if os.geteuid() != 0:
        write_raw(folder, b"u-closed.png", good_bytes())
        (folder / "u-closed.png").chmod(0)
        expected[b"u-closed.png"] = "unreadable"
    # A link to a folder, and a folder, that are called like pictures: not files, so not listed.
    (folder / "v-link.png").symlink_to(outside.parent)
    (folder / "w-folder.png").mkdir()
    return expected


@pytest.mark.timeout(60)
def test_each_bad_image_is_a_row(tmp_path, outside):
    folder = tmp_path / "images"
    expected = bad_and_good(folder, outside)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = encode_patch(folder, tmp_path / "s.zarr", max_pixels=MAX_PIXELS)
    store = open_store(tmp_path / "s.zarr")
    assert len(store) == len(expected) == summary.rows
    assert store.todo() == []
    table = store.manifest()
    order = sorted(expected)
    assert table["path"].to_pylist() == [n.decode("utf-8", "backslashreplace") for n in order]
    status = table["status"].to_pylist()
    assert dict(zip(order, status, strict=True)) == expected
    latents = store.reader.read(0, len(store))
    for row, name in enumerate(order):
        said = table.slice(row, 1).to_pylist()[0]
        if expected[name] == "ok":
            assert said["reason"] == ""
            data = (folder / os.fsdecode(name)).read_bytes()
            with Image.open(folder / os.fsdecode(name)) as image:
                rgb = images.resize(image.convert("RGB"), SIZE)
            # Alone in its batch or among bad ones: the very same row.
            alone = np.zeros((64, SIZE, SIZE, 3), np.uint8)
            alone[0] = rgb
            latent = PatchEncoder(SIZE).encode(alone, np.arange(64))[0].astype(np.float16)
            np.testing.assert_array_equal(latents[row], latent)
            assert said["bytes"] == len(data)
        else:
            assert not latents[row].any()
            assert said["reason"]
            assert "\n" not in said["reason"]
            assert " at 0x" not in said["reason"]
    bad = {(p, s) for p, s, _ in summary.bad}
    assert bad == {(n.decode("utf-8", "backslashreplace"), s) for n, s in expected.items() if s != "ok"}
    assert summary.counts["ok"] == status.count("ok")
    # What was bad stays recorded; a rerun does not try again.
    assert encode_patch(folder, tmp_path / "s.zarr", max_pixels=MAX_PIXELS).encoded == 0


def test_links_may_be_followed(tmp_path, outside):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    picture(1).save(folder / "a.png")
    picture(2).save(tmp_path / "more" / "deep.png")
    (folder / "b.png").symlink_to(outside)
    (folder / "c.png").symlink_to("a.png")
    (folder / "sub" / "linked").symlink_to(tmp_path / "more")
    encode_patch(folder, tmp_path / "no.zarr")
    no = open_store(tmp_path / "no.zarr")
    assert no.manifest()["path"].to_pylist() == ["a.png", "b.png", "c.png"]
    assert no.manifest()["status"].to_pylist() == ["ok", "link_outside", "ok"]
    encode_patch(None, tmp_path / "yes.zarr", source=Source(folder, follow_links=True))
    yes = open_store(tmp_path / "yes.zarr")
    assert yes.manifest()["path"].to_pylist() == ["a.png", "b.png", "c.png", "sub/linked/deep.png"]
    assert yes.manifest()["status"].to_pylist() == ["ok"] * 4
    np.testing.assert_array_equal(*yes.reader.gather([0, 2]))


def test_all_bad_is_a_store_too(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(90):
        (folder / f"{i}.jpg").write_bytes(b"x" * i)
    summary = encode_patch(folder, tmp_path / "s.zarr")
    assert summary.counts == {"unreadable": 90}
    assert len(summary.bad) == 20
    reasons = {path: reason for path, _, reason in summary.bad}
    assert reasons.pop("0.jpg") == "the file is empty"
    assert set(reasons.values()) == {"not an image"}
    assert not open_store(tmp_path / "s.zarr").reader.read(0, 90).any()


@pytest.mark.parametrize("cut", [2, 20, 200, 600, -2])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_have_a_status(kind, cut):
    data = file_bytes(picture(1, 120, 90), kind)
    images.decode(data)
    error = None
    try:
        images.decode(data[:cut])
    except ImageError as exc:
        error = exc
    if error is None:
        # Only the last bytes may be spared (a JPEG's end marker, a GIF's trailer, a PNG's checksum).
        assert cut == -2
    else:
        assert error.status == "unreadable"
        assert error.reason


def test_random_bytes_have_a_status():
    rng = np.random.default_rng(1)
    whole = [file_bytes(picture(1, 40, 30), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")]
    for data in whole:
        for _ in range(60):
            broken = bytearray(data)
            for place in rng.integers(0, len(broken), 3):
                broken[place] = rng.integers(256)
            try:
                image, _ = images.decode(bytes(broken), max_pixels=10**6)
            except ImageError as exc:
                assert exc.status in ("unreadable", "too_large")  # noqa: PT017
            else:
                assert image.mode == "RGB"


@pytest.mark.parametrize("side", [9_500, 12_000, 60_000])
def test_a_bomb_is_judged_by_its_header_without_a_warning(side):
    with pytest.raises(ImageError, match="pixels") as caught:
        images.decode(png_claiming(side, side))
    assert caught.value.status == "too_large"


def test_the_bound_is_the_bound():
    data = file_bytes(Image.new("RGB", (100, 50)), "PNG")
    assert images.decode(data, max_pixels=5000)[0].size == (100, 50)
    with pytest.raises(ImageError, match="100 x 50 pixels, more than 4999"):
        images.decode(data, max_pixels=4999)


@pytest.mark.parametrize("name", ["nul\0byte.png", "x" * 300 + ".png", "a-file.png/inside.png"])
def test_names_that_cannot_be(tmp_path, name):
    (tmp_path / "a-file.png").write_bytes(good_bytes())
    with pytest.raises(ImageError) as caught:
        images.read_file(tmp_path / name, tmp_path)
    assert caught.value.status in ("unreadable", "missing")


def test_too_many_bytes(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # takes no room
    with pytest.raises(ImageError, match="bytes") as caught:
        images.read_file(path)
    assert caught.value.status == "too_large"


# --- good ones ---------------------------------------------------------------------------------------


def rgb(image):
    return np.asarray(image).astype(int)


def test_cmyk_jpeg():
    image = picture(1, 64, 48)
    plain, _ = images.decode(file_bytes(image, "JPEG", quality=95))
    cmyk, _ = images.decode(file_bytes(image.convert("CMYK"), "JPEG", quality=95))
    assert cmyk.mode == "RGB"
    # Not inverted, as CMYK files often come out: the same picture up to what JPEG loses.
    assert np.abs(rgb(cmyk) - rgb(plain)).mean() < 8
    assert np.abs(255 - rgb(cmyk) - rgb(plain)).mean() > 30


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    grey8 = np.asarray(picture(1, 64, 48).convert("L"))
    grey16 = grey8.astype(np.uint16) * 257
    low, _ = images.decode(file_bytes(Image.fromarray(grey8), kind))
    high, _ = images.decode(file_bytes(Image.fromarray(grey16), kind))
    assert (low.mode, high.mode) == ("RGB", "RGB")
    assert np.abs(rgb(low) - rgb(high)).max() <= 1
    assert len(np.unique(rgb(high))) > 20  # clipping would leave one white


def test_float_grey():
    grey = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)
    image, _ = images.decode(file_bytes(Image.fromarray(grey), "TIFF"))
    assert np.abs(rgb(image)[..., 0] - grey * 255).max() <= 1
    grey[3, 4] = np.nan
    with pytest.raises(ImageError, match="not finite"):
        images.decode(file_bytes(Image.fromarray(grey), "TIFF"))


def test_alpha_is_dropped():
    image = picture(1, 64, 48)
    alpha = Image.fromarray((np.arange(48 * 64) % 256).astype(np.uint8).reshape(48, 64))
    rgba = image.copy()
    rgba.putalpha(alpha)
    got, _ = images.decode(file_bytes(rgba, "PNG"))
    np.testing.assert_array_equal(rgb(got), rgb(image))
    grey = Image.merge("LA", (image.convert("L"), alpha))
    got, _ = images.decode(file_bytes(grey, "PNG"))
    np.testing.assert_array_equal(rgb(got), rgb(image.convert("L").convert("RGB")))


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 100, 200, 255])])
def test_palettes(transparency):
    image = picture(1, 64, 48).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, _ = images.decode(file_bytes(image, "PNG", **options))
    np.testing.assert_array_equal(rgb(got), rgb(image.convert("RGB")))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [picture(i, 32, 24).quantize(32) for i in range(3)]
    data = file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    got, note = images.decode(data)
    assert note == "first of 3 frames"
    np.testing.assert_array_equal(rgb(got), rgb(frames[0].convert("RGB")))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.gif").write_bytes(data)
    encode_patch(tmp_path / "images", tmp_path / "s.zarr")
    said = open_store(tmp_path / "s.zarr").manifest().to_pylist()[0]
    assert (said["status"], said["reason"]) == ("ok", "first of 3 frames")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = picture(1, 64, 32)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    stored.save(path, exif=exif)
    pixels = images.load(path, SIZE)
    assert (pixels.width, pixels.height) == (64, 32)
    np.testing.assert_array_equal(pixels.rgb, images.resize(upright, SIZE))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (SIZE, SIZE)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_small_and_grey(tmp_path, size, mode):
    path = tmp_path / "a.png"
    picture(2, *size).convert(mode).save(path)
    pixels = images.load(path, SIZE)
    assert pixels.rgb.shape == (SIZE, SIZE, 3)
    assert (pixels.width, pixels.height) == size
    if mode != "RGB":
        assert (pixels.rgb[..., 0] == pixels.rgb[..., 2]).all()


def test_resize_is_pillows_bilinear():
    image = picture(1, 100, 37)
    expected = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(images.resize(image, SIZE), expected)
    assert np.abs(images.resize(image, SIZE).astype(int) - np.asarray(image.resize((SIZE, SIZE)))).max() > 0


def test_thumbnail(tmp_path):
    path = tmp_path / "a.png"
    picture(1, 400, 300).save(path)
    import io

    with Image.open(io.BytesIO(images.thumbnail(path))) as image:
        assert (image.format, image.size) == ("JPEG", (128, 96))


# --- bad encoders ------------------------------------------------------------------------------------


class Faulty(PatchEncoder):
    """Gives NaN for some rows and 1e5 (no float16) for others."""

    def encode(self, images, rows):
        out = super().encode(images, rows)
        out[rows % 7 == 3, 11] = np.nan
        out[rows % 7 == 5, 200] = 1e5
        return out


@pytest.mark.parametrize(("dtype", "bad"), [("float16", (3, 5)), ("float32", (3,))])
def test_not_finite_rows(tmp_path, dtype, bad):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(100):
        picture(i).save(folder / f"{i:03d}.png")
    encode_patch(folder, tmp_path / "good.zarr", dtype=dtype)
    summary = encode_patch(folder, tmp_path / "s.zarr", dtype=dtype, encoder=Faulty(SIZE))
    store = open_store(tmp_path / "s.zarr")
    expected = open_store(tmp_path / "good.zarr").reader.read(0, 100)
    wrong = np.isin(np.arange(100) % 7, bad)
    if dtype == "float32":
        expected[np.arange(100) % 7 == 5, 200] = 1e5
    expected[wrong] = 0
    np.testing.assert_array_equal(store.reader.read(0, 100), expected)
    table = store.manifest()
    assert table["status"].to_pylist() == np.where(wrong, "not_finite", "ok").tolist()
    assert summary.counts == {"ok": int((~wrong).sum()), "not_finite": int(wrong.sum())}
    said = table.to_pylist()[3]
    assert "not finite" in said["reason"]
    assert said["width"] == 24  # the picture itself was fine
    assert said["sha256"]


def test_a_relative_path_stays_in_the_folder_and_an_absolute_one_is_meant(tmp_path, outside):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "linked").symlink_to(outside.parent)
    manifest = folder / "list.csv"
    lines = [f"linked/{outside.name}", f"../{outside.relative_to(tmp_path)}", str(outside)]
    manifest.write_text("path\n" + "\n".join(lines) + "\n")
    encode_patch(None, tmp_path / "s.zarr", source=Source(folder, manifest))
    store = open_store(tmp_path / "s.zarr")
    found = dict(zip(*(store.manifest()[c].to_pylist() for c in ("path", "status")), strict=True))
    assert found == {lines[0]: "link_outside", lines[1]: "link_outside", lines[2]: "ok"}
