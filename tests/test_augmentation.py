"""Section 07: square crops with a gray border, and randomness that is a function of the seed alone."""

import warnings

import numpy as np
import pytest

import lct_dino3 as lct

CROP = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def augment() -> lct.Transform:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # albumentations only warns about argument names that it does not know
        return lct.build_transform(64, augment=True)


def test_fit_keeps_the_aspect_and_pads_with_gray() -> None:
    image = lct.build_transform(64, augment=False)(np.full((20, 40, 3), 200, np.uint8), None, 0)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert (image[:16] == lct.PADDING_GRAY).all() and (image[48:] == lct.PADDING_GRAY).all()
    assert (image[16:48] == 200).all()


def test_fit_reduces_by_area_not_by_picking_pixels() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(lct.build_transform(32, augment=False)(stripes, None, 0).astype(int) - 127).max() <= 1


def test_the_same_seed_gives_the_same_picture_whatever_came_before(augment: lct.Transform) -> None:
    first = augment(CROP, None, 5)
    for seed in range(10):
        augment(CROP, None, seed)
    assert np.array_equal(augment(CROP, None, 5), first)
    assert np.array_equal(lct.build_transform(64, augment=True)(CROP, None, 5), first)


def test_other_seeds_give_other_pictures(augment: lct.Transform) -> None:
    pictures = {augment(CROP, None, seed).tobytes() for seed in range(30)}
    assert len(pictures) >= 28  # a few may by chance be left as they are


def test_transforms_draw_independently(augment: lct.Transform) -> None:
    """One seed copied to every transform would make those of equal probability fire together."""
    white = np.full((64, 64, 3), 255, np.uint8)
    white[:, :32] = 40
    flipped_and_dark = np.zeros((2, 2), dtype=int)
    for seed in range(300):
        picture = augment(white, None, seed)
        centre = picture[24:40].astype(float).mean(axis=(0, 2))
        flipped_and_dark[int(centre[:24].mean() > centre[40:].mean()), int(picture.max() < 245)] += 1
    assert (flipped_and_dark > 10).all(), flipped_and_dark


def test_the_border_that_geometry_opens_is_gray(augment: lct.Transform) -> None:
    colours = [augment(np.full((64, 64, 3), 250, np.uint8), None, seed)[0, 0] for seed in range(80)]
    turned = [colour for colour in colours if colour.max() < 190]
    assert len(turned) > 5
    assert abs(np.median(turned) - lct.PADDING_GRAY) < 25, "colour changes come after, but the fill is not black"


def test_the_input_is_left_alone(augment: lct.Transform) -> None:
    before = CROP.copy()
    for seed in range(20):
        augment(CROP, None, seed)
    assert np.array_equal(CROP, before)
