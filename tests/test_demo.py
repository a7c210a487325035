"""Tests of the DEMO section: same bytes every time, exact masks, odd files readable, broken files not."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import lct_dino3 as demo

IMAGES_PER_CLASS = 6
BROKEN = {"ratchet": ".jpg", "screwdriver": ".jpg", "side_cutter": ".jpg", "speed_brace": ".png"}


def list_crops(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cropped").iterdir() if not path.name.startswith("."))


def is_readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


def hash_tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.draw_demo_dataset(folder, IMAGES_PER_CLASS, seed=3)
    return folder


def test_same_arguments_give_the_same_bytes_and_another_seed_does_not(root: Path, tmp_path: Path) -> None:
    demo.draw_demo_dataset(tmp_path / "again", IMAGES_PER_CLASS, seed=3)
    assert hash_tree(tmp_path / "again") == hash_tree(root)
    demo.draw_demo_dataset(tmp_path / "other", IMAGES_PER_CLASS, seed=4)
    mine, other = hash_tree(root), hash_tree(tmp_path / "other")
    assert sum(mine[name] == other.get(name) for name in mine if "cropped" in name) <= 3  # .DS_Store, empty, text


def test_every_class_has_as_many_good_images_as_asked_for(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == list(demo.DEMO_CLASSES)
    for class_name in demo.DEMO_CLASSES:
        readable = [path for path in list_crops(root / class_name) if is_readable(path)]
        assert len(readable) == IMAGES_PER_CLASS + (class_name == "pliers"), class_name


def test_masks_equal_cutout_alpha_and_fit_the_upright_crop(root: Path) -> None:
    for class_name in demo.DEMO_CLASSES:
        for path in filter(is_readable, list_crops(root / class_name)):
            mask = Image.open(root / class_name / "masks" / f"{path.stem}_mask.png")
            cutout = Image.open(root / class_name / "cutouts" / f"{path.stem}.png")
            upright = ImageOps.exif_transpose(Image.open(path))
            assert (mask.mode, cutout.mode) == ("L", "RGBA")
            assert mask.size == cutout.size == upright.size
            assert set(np.unique(mask)) == {0, 255}
            assert np.array_equal(np.asarray(mask), np.asarray(cutout)[..., 3])
            assert 0.02 < (np.asarray(mask) > 0).mean() < 0.9
            assert 90 <= max(upright.size) <= 142


def test_upright_crop_shows_the_same_picture_as_the_cutout(root: Path) -> None:
    path = next(path for path in list_crops(root / "hex_key") if Image.open(path).getexif().get(0x0112) == 6)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)), dtype=float)
    cutout = np.asarray(Image.open(root / "hex_key" / "cutouts" / f"{path.stem}.png"), dtype=float)[..., :3]
    assert np.abs(upright - cutout).mean() < 6  # JPEG noise; a wrong turn gives 20 and more


@pytest.mark.parametrize(("class_name", "suffix"), BROKEN.items())
def test_exactly_one_file_of_these_classes_is_broken(root: Path, class_name: str, suffix: str) -> None:
    broken = [path for path in list_crops(root / class_name) if not is_readable(path)]
    assert [path.suffix for path in broken] == [suffix]


def test_odd_but_good_files_are_what_they_claim(root: Path) -> None:
    modes = {
        Image.open(path).mode for name in demo.DEMO_CLASSES for path in list_crops(root / name) if is_readable(path)
    }
    assert {"RGB", "L", "CMYK", "P"} <= modes and any(mode.startswith("I") for mode in modes)
    assert any(path.suffix == ".JPG" for path in list_crops(root / "oil_can"))
    assert (root / demo.DEMO_CLASSES[0] / "cropped" / ".DS_Store").is_file()
    contents = [path.read_bytes() for path in list_crops(root / "pliers")]
    assert len(contents) - len(set(contents)) == 1


def test_shot_numbers_are_unique_over_classes_and_some_shots_have_frames(root: Path) -> None:
    shots = [(path.name.split("_")[0], name) for name in demo.DEMO_CLASSES for path in list_crops(root / name)]
    assert len({shot for shot, _ in shots}) == len(set(shots)) < len(shots)


@pytest.mark.parametrize("class_name", demo.DEMO_CLASSES)
def test_tools_differ_by_make_and_fill_their_frame(class_name: str) -> None:
    make, stock = demo._TOOLS[class_name]
    shapes = set()
    for seed in range(20):
        parts = make(np.random.default_rng(seed), stock)
        colours, mask = demo._render(parts, np.eye(2), light=1.0, longest_px=120)
        shapes.add(mask.tobytes())
        assert colours.shape == (*mask.shape, 3) and abs(max(mask.shape) - 120) <= 1
        assert all(side.any() for side in (mask[:2], mask[-2:], mask[:, :2], mask[:, -2:])), "not tight"
        assert 0.05 < (mask > 0).mean() < 0.9
    assert len(shapes) == 20
