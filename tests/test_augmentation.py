"""Section 07: square crops with a gray border, and randomness that is a function of the seed alone."""

import dataclasses
import warnings

import cv2
import numpy as np
import pytest
from conftest import draw_image
from PIL import Image

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


@pytest.mark.parametrize("size", [(256, 256), (90, 40), (31, 64), (5, 3), (3000, 2)])
def test_fit_resizes_as_pillow_does_antialiased(size: tuple[int, int]) -> None:
    """The README's consumer on numpy and Pillow must see what the model saw."""
    crop = np.asarray(draw_image(1, 2).resize(size[::-1], Image.Resampling.BICUBIC))
    height, width = (max(1, round(64 / max(size) * length)) for length in size)
    resized = Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (64 - height) // 2, (64 - width) // 2
    difference = np.abs(lct.fit_square(crop, 64)[top : top + height, left : left + width].astype(int) - resized)
    assert (
        difference.max() <= 10 and difference.mean() < 0.2
    )  # overshoot is clipped between the two passes, whose order differs


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


def test_moves_are_distributed_as_those_of_albumentations() -> None:
    """Where the corners of a square go: shares of the moves, means and spreads, over 4,000 draws."""
    import albumentations as A
    import cv2

    gray = {"border_mode": cv2.BORDER_CONSTANT, "fill": lct.PADDING_GRAY}
    moves = [
        A.Affine(rotate=(-180, 180), p=0.2, **gray),
        A.Affine(scale=(0.85, 1.1), translate_percent=(-0.06, 0.06), p=0.25, **gray),
        A.Perspective(scale=(0.02, 0.08), p=0.12, **gray),
    ]
    side, rng, generator = 200, np.random.default_rng(0), lct.random.Random(0)
    corners = np.array([[[0, 0], [side, 0], [side, side], [0, side]]], dtype=float)
    for move in moves:
        move.set_random_state(rng, generator)

    def draw_theirs() -> np.ndarray | None:
        matrices = []
        for move in moves:
            if generator.random() < move.p:
                drawn = move.get_params_dependent_on_data({"shape": (side, side, 3)}, {})
                zoom = [side / drawn[key] if key in drawn else 1 for key in ("max_width", "max_height")]
                matrices.append(np.diag([*zoom, 1]) @ drawn["matrix"])
        return lct.functools.reduce(lambda before, move: move @ before, matrices) if matrices else None

    ours, theirs = ([draw() for _ in range(4000)] for draw in (lambda: lct.draw_move(rng, side), draw_theirs))
    for found in (ours, theirs):
        found[:] = [cv2.perspectiveTransform(corners, matrix)[0] for matrix in found if matrix is not None]
    assert abs(len(ours) - len(theirs)) < 200 and 1700 < len(ours) < 2100  # 1 - 0.8 * 0.75 * 0.88 = 0.472
    for power in (1, 2):  # the standard error of a mean is about 1.5 px
        means = [(np.abs(np.stack(found) - side / 2) ** power).mean(axis=0) ** (1 / power) for found in (ours, theirs)]
        assert np.abs(means[0] - means[1]).max() < 4


def test_flips_are_half_of_the_pictures() -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    moved = [lct.move_square(ramp, np.random.default_rng(seed)) for seed in range(400)]
    assert 30 < sum(np.array_equal(picture, ramp) for picture in moved) * 100 / 400 * 2 < 75
    flipped = sum(np.array_equal(picture, ramp[:, ::-1]) for picture in moved)
    assert 0.2 < flipped / 400 < 0.33  # 0.264


def test_four_channels_move_as_three_do_bit_for_bit() -> None:
    square = lct.fit_square(CROP, 64)
    moved = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        matrix = lct.draw_move(rng, 64)
        expected = square
        if matrix is not None:
            expected = cv2.warpPerspective(square, matrix, (64, 64), borderValue=(lct.PADDING_GRAY,) * 3)
            moved += 1
        expected = cv2.flip(expected, 1) if rng.random() < 0.5 else expected
        assert np.array_equal(lct.move_square(square, np.random.default_rng(seed)), expected)
    assert moved > 30


def test_a_square_of_the_store_which_is_read_only_may_be_written_into_by_libraries() -> None:
    import albumentations as A

    def write_in_place(image: np.ndarray, **_: object) -> np.ndarray:
        image[:8] = 0
        return image

    step = A.Compose([A.Lambda(image=write_in_place, p=1.0)])
    square = np.full((32, 32, 3), 200, np.uint8)
    square.flags.writeable = False
    for augment in (True, False):
        transform = dataclasses.replace(lct.build_transform(32, augment), post_steps=(step,))
        assert (transform.finish(square, 0)[:8] == 0).all()
    assert (square == 200).all()
