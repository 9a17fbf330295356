"""The heat map as it is drawn: colours where they belong, the picture under them, few bytes."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from store_worlds import picture

from latentstore.heat import overlay, strength


def drawn(uri):
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"), np.int64)


def warmth(pixels):
    """Red less blue: above zero where it is orange, below where it is blue, zero where it is grey."""
    return pixels[..., 0] - pixels[..., 2]


def corner(value, rest=0.0, side=32):
    grid = np.full((side, side), rest)
    grid[: side // 4, : side // 4] = value
    return grid


@pytest.mark.parametrize("size", [(300, 200), (50, 80), (256, 256)])
def test_it_has_the_pictures_proportions(size):
    pixels = drawn(overlay(corner(1.0), picture(0, *size)))
    assert max(pixels.shape[:2]) == 160
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(size[0] / size[1], rel=0.02)
    assert max(drawn(overlay(corner(1.0), picture(0, *size), 80)).shape) == 80


UNDER = {"photo": picture(1, 200, 200), "black": Image.new("RGB", (200, 200)), "nothing": None}


@pytest.mark.parametrize("under", UNDER.values(), ids=UNDER)
def test_colour_says_for_and_against(under):
    for sign in (1, -1):
        told = warmth(drawn(overlay(corner(sign * 1e-5), under))) * sign
        assert told[:30, :30].min() > 60
        assert np.abs(told[60:, 60:]).max() <= 8  # a palette's rounding of grey
    assert np.abs(warmth(drawn(overlay(np.zeros((32, 32)), under)))).max() <= 8


def test_the_picture_shows_through():
    plain = Image.new("RGB", (160, 160), "white")
    plain.paste("black", (0, 0, 80, 160))
    luma = drawn(overlay(corner(1.0), plain)).mean(axis=2)
    assert luma[100:, 100:].min() > luma[100:, :60].max() + 100  # where nothing speaks
    assert luma[:30, :30].max() < 200


def test_one_place_does_not_hide_the_others():
    grid = corner(1.0)
    grid[20, 20] = 1e6
    assert warmth(drawn(overlay(grid, None)))[:30, :30].min() > 60
    # One place alone is drawn all the same.
    alone = np.zeros((32, 32))
    alone[16, 16] = 1.0
    assert warmth(drawn(overlay(alone, None)))[78:85, 78:85].max() > 60


def test_stronger_is_more_colourful():
    ramp = np.tile(np.linspace(-1, 1, 32), (32, 1))
    told = warmth(drawn(overlay(ramp, None)))[80]
    assert (np.diff(told[::16]) > 0).all()


def test_maps_of_one_scale_compare():
    strong, weak = corner(1.0), corner(0.1)
    alone = warmth(drawn(overlay(weak, None)))[:30, :30].mean()
    beside = warmth(drawn(overlay(weak, None, scale=strength(strong))))[:30, :30].mean()
    assert beside < alone / 3
    assert overlay(strong, None, scale=strength(strong)) == overlay(strong, None)
    assert overlay(weak, None, scale=0.0) == overlay(weak, None)  # the first says nothing: no scale


def test_both_colours_read_on_light_and_dark_and_when_colours_are_not_seen():
    for sign in (1, -1):
        colour = drawn(overlay(np.full((8, 8), float(sign)), None))[80, 80]
        luminance = (np.array([0.2126, 0.7152, 0.0722]) * (colour / 255) ** 2.2).sum()
        for page in (1.0, 0.0):
            light, dark = max(luminance, page) + 0.05, min(luminance, page) + 0.05
            assert light / dark > 2.5
    # Without red-green sight blue and yellowness remain.
    for_, against = (drawn(overlay(np.full((8, 8), s), None))[80, 80] for s in (1.0, -1.0))
    assert abs(int(for_[:2].mean()) - int(for_[2]) - (int(against[:2].mean()) - int(against[2]))) > 100


def test_numbers_that_are_none_are_no_places():
    grid = corner(1.0)
    grid[20:, 20:] = np.nan
    assert np.abs(warmth(drawn(overlay(grid, None)))[120:, 120:]).max() <= 8


def test_a_page_of_many_stays_small():
    rng = np.random.default_rng(0)
    noisy = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
    assert len(overlay(rng.standard_normal((32, 32)), noisy)) < 32_000
    assert len(overlay(corner(1.0), picture(0, 256, 256))) < 16_000
    assert overlay(corner(1.0), noisy) == overlay(corner(1.0), noisy)
