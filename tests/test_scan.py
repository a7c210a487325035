"""Section 05, first half: finding, decoding and checking images, duplicates, class map, cache."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import shutil
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, draw_image, image_bytes, make_dataset, snapshot
from PIL import Image, ImageOps

import lct_dino3 as lct

GRAY = lct.PADDING_GRAY


def list_names(root: Path) -> list[str]:
    return lct.list_images(root).paths


def scan(root: Path, out_dir: Path, **options: object) -> lct.Scan:
    config = lct.Config(data_root=root, out_dir=out_dir, **options)
    return lct.attach_masks(lct.scan_dataset(config), config)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.fixture
def picture() -> np.ndarray:
    """An upright picture without any symmetry, uint8 (24, 36, 3)."""
    return np.random.default_rng(3).integers(0, 256, (24, 36, 3), dtype=np.uint8)


# --- what is found


def test_cropped_folder_wins_and_other_folders_are_not_entered(tmp_path):
    for name in ("a/1.png", "b/cropped/2.png", "b/ignored.png", "c/masks/3_mask.png", "c/4.png", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_names(tmp_path) == ["a/1.png", "b/cropped/2.png", "c/4.png"]


def test_a_tree_of_images_leaves_out_the_masks_of_crops(tmp_path):
    names = ("a/cropped/1.png", "a/masks/1_mask.png", "b/2.png", "b/cutouts/2.png", "masks/venetian/3.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tree = lct.list_image_tree(tmp_path)
    assert tree.paths == ["a/cropped/1.png", "b/2.png", "masks/venetian/3.png"]
    assert lct.describe_ignored(tree.ignored) == "2 folders of masks"


def test_suffixes_count_in_any_case_and_only_those_of_images(tmp_path):
    (tmp_path / "a").mkdir()
    wanted = ["1.JPG", "2.jpeg", "3.Png", "4.BMP", "5.webp", "6.TIF", "7.tiff", "8.tar.jpg"]
    for name in [*wanted, "notes.txt", "jpg", "9.gif", "10.jpg.part"]:
        (tmp_path / "a" / name).touch()
    assert list_names(tmp_path) == [f"a/{name}" for name in wanted]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    for name in ("a/1.png", "a/.2.png", "a/._1.png", ".b/3.png", "c/.cropped/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_names(tmp_path) == ["a/1.png"]


@pytest.mark.parametrize(
    "name",
    [
        "ключ на 10",
        'it\'s a "hammer"',
        "a, b; c=d [e] {f} *?",
        "锤子",
        "🔨",
        pytest.param("10\u00a0мм", id="no-break space"),
        pytest.param("スパナ\u300010", id="ideographic space"),
        pytest.param("پیچ\u200cگوشتی", id="zero-width non-joiner, Persian"),
    ],
)
def test_class_names_are_any_unicode(tmp_path, name):
    make_dataset(tmp_path / "data", {name: 3, "b": 3})
    found = scan(tmp_path / "data", tmp_path / "run")
    assert set(found.records.class_names) == {name, "b"} and len(found.records.paths) == 6
    assert found.report["classes"][name]["usable"] == 3 and not found.report["quarantined"]


def test_a_decomposed_folder_name_gives_the_composed_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "клей é") for form in ("NFC", "NFD"))
    make_dataset(tmp_path / "data", {decomposed: 3, "b": 3})
    found = scan(tmp_path / "data", tmp_path / "run").records
    assert composed in found.class_names and decomposed not in found.class_names
    assert all((tmp_path / "data" / found.paths[i]).is_file() for i in range(6))  # the path keeps the name on the disk


def test_two_spellings_of_one_name_become_one_class_with_a_warning(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    make_dataset(tmp_path / "data", {decomposed: 3, composed: 3, "b": 3})
    found = scan(tmp_path / "data", tmp_path / "run")
    assert found.report["classes"][composed]["usable"] == 6
    assert any(composed in text for text in found.report["warnings"])


def test_undecodable_names_are_named_problems(tmp_path):
    make_dataset(tmp_path / "data", {"a": 3, "b": 3})
    Path(os.fsdecode(os.fsencode(tmp_path / "data/a") + b"/caf\xe9.png")).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/cl\xe9")).mkdir()
    found = scan(tmp_path / "data", tmp_path / "run")
    problems = {item["path"]: item["reason"] for item in found.report["quarantined"]}
    assert len(problems) == 2 and all("UTF-8" in reason for reason in problems.values())
    assert json.loads(json.dumps(lct.to_json(found.report)).encode())  # what is written is valid UTF-8
    assert found.report["classes"]["a"]["quarantined"] == 1


def test_things_named_like_images_are_problems_and_nothing_hangs(tmp_path):
    make_dataset(tmp_path / "data", {"a": 3, "b": 3})
    (tmp_path / "data/a/folder.jpg").mkdir()
    os.mkfifo(tmp_path / "data/a/pipe.JPG")
    (tmp_path / "data/b/gone.jpg").symlink_to("nowhere")
    found = scan(tmp_path / "data", tmp_path / "run")
    problems = {item["path"]: item["reason"] for item in found.report["quarantined"]}
    assert set(problems) == {"a/folder.jpg", "a/pipe.JPG", "b/gone.jpg"} and all(problems.values())
    assert found.report["num_usable"] == 6 and found.report["num_images"] == 9
    assert found.report["classes"]["a"]["quarantined"] == 2


def test_twenty_thousand_paths_are_listed_in_order(tmp_path):
    try:
        names = [f"{index * 7919 % 2_000:05d}.jpg" for index in range(2_000)]  # made in another order than sorted
        for label in range(10):
            folder = tmp_path / f"class{9 - label}"
            folder.mkdir()
            (folder / names[0]).write_bytes(b"x" * label)
            for name in names[1:]:
                os.link(folder / names[0], folder / name)
        listing = lct.list_images(tmp_path)
        assert listing.paths == [f"class{label}/{index:05d}.jpg" for label in range(10) for index in range(2_000)]
        assert [listing.class_of(path) for path in listing.paths] == [path.split("/")[0] for path in listing.paths]
        assert lct.stat_files(tmp_path, listing.paths)[:, 0].tolist() == [
            9 - label for label in range(10) for _ in range(2_000)
        ]
        assert not listing.problems
    finally:
        shutil.rmtree(tmp_path)  # pytest keeps temporary folders for a while


# --- how it is decoded


def stored_for(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels that a file holds so that `orientation` (EXIF 2.3, tag 0x0112) makes them upright."""
    transposed = upright.swapaxes(0, 1)
    return np.ascontiguousarray({
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: transposed, 6: transposed[::-1], 7: transposed[::-1, ::-1], 8: transposed[:, ::-1],
    }[orientation])  # fmt: skip


@pytest.mark.parametrize("file_format, options", [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_exif_orientations_come_out_upright(picture, file_format, options):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = image_bytes(Image.fromarray(stored_for(picture, orientation)), file_format, exif=exif, **options)
        image, mode, found = lct.decode_image(data)
        assert np.array_equal(image, picture), orientation
        assert (mode, found) == ("RGB", orientation)


@pytest.mark.parametrize("file_format, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_damaged_exif_costs_no_image_and_no_mask(picture, file_format, options):
    image = Image.fromarray(picture)
    whole, damaged = (image_bytes(image, file_format, exif=exif, **options) for exif in (b"", b"Exif\0\0text, no tags"))
    assert b"text, no tags" in damaged
    assert np.array_equal(lct.decode_image(damaged)[0], lct.decode_image(whole)[0])
    mask = image_bytes(Image.fromarray(np.tri(9, dtype=bool)), "PNG", exif=b"Exif\0\0text, no tags")
    assert np.array_equal(lct.decode_mask(mask, is_alpha=False), np.tri(9, dtype=bool))


def test_exif_orientation_of_a_jpeg_and_a_senseless_one(picture):
    smooth = np.asarray(Image.fromarray(picture[:3, :4]).resize((64, 48), Image.Resampling.BICUBIC))
    for orientation in (6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = image_bytes(Image.fromarray(stored_for(smooth, orientation)), "JPEG", quality=95, exif=exif)
        assert np.abs(lct.decode_image(data)[0].astype(int) - smooth).mean() < 4
    exif[0x0112] = 77
    image, _, orientation = lct.decode_image(image_bytes(Image.fromarray(picture), "PNG", exif=exif))
    assert np.array_equal(image, picture) and orientation == 1


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_keeps_its_values(file_format):
    values = np.linspace(0, 65_535, 40 * 50).astype(np.uint16).reshape(40, 50)
    image = lct.decode_image(image_bytes(Image.fromarray(values), file_format))[0]
    assert np.abs(image - values[:, :, None] / 257).max() <= 1
    dark = lct.decode_image(image_bytes(Image.fromarray(values // 300), file_format))[0]
    assert dark.max() <= 1  # 218 of 65,535 is black, not light gray


def test_sixteen_bit_colour_keeps_its_values(tmp_path):
    import cv2

    values = np.random.default_rng(0).integers(0, 65_536, (20, 30, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), values[:, :, ::-1])
    assert np.abs(lct.load_image(tmp_path / "a.png") - values / 257).max() <= 1


@pytest.mark.parametrize("top, factor", [(1.0, 255.0), (255.0, 1.0), (65_535.0, 1 / 257)])
def test_float_tiff_is_scaled_by_its_range(top, factor):
    values = np.linspace(0, top, 40 * 50, dtype=np.float32).reshape(40, 50)
    image = lct.decode_image(image_bytes(Image.fromarray(values), "TIFF"))[0]
    assert np.abs(image - values[:, :, None] * factor).max() <= 1


@pytest.mark.parametrize("value", [-5, 65_536])
def test_gray_beyond_sixteen_bits_is_broken(value, tmp_path):
    Image.fromarray(np.full((8, 8), value, np.int32)).save(tmp_path / "a.tif")
    assert lct.check_image(tmp_path, "a.tif")[1] == "has values outside 0 to 65,535"


def test_float_tiff_with_nan_is_broken():
    with pytest.raises(lct.ImageError, match="not finite"):
        lct.decode_image(image_bytes(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"))


def test_gray_palette_and_bilevel_images_become_rgb(picture):
    few = picture // 128 * 255  # eight colours
    for name, image in {
        "L": Image.fromarray(picture[:, :, 0]),
        "1": Image.fromarray(few[:, :, 0]).convert("1", dither=Image.Dither.NONE),
        "P": Image.fromarray(few).quantize(8, dither=Image.Dither.NONE),
    }.items():
        expected = few if name == "P" else np.repeat((picture if name == "L" else few)[:, :, :1], 3, axis=2)
        found, mode, _ = lct.decode_image(image_bytes(image, "PNG"))
        assert np.array_equal(found, expected) and mode == name


def test_cmyk_becomes_the_colours_it_means():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8)
    picture = np.repeat(np.repeat(colours.reshape(2, 3, 3), 16, axis=0), 16, axis=1)
    for file_format, options in (("TIFF", {}), ("JPEG", {"quality": 95})):
        data = image_bytes(Image.fromarray(picture).convert("CMYK"), file_format, **options)
        image, mode, _ = lct.decode_image(data)
        assert mode == "CMYK" and np.abs(image.astype(int) - picture).mean() < 4


def over_gray(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite over PADDING_GRAY in float64, the reference."""
    share = alpha[:, :, None] / 255
    return colours * share + GRAY * (1 - share)


@pytest.mark.parametrize(
    "file_format, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})]
)
def test_rgba_is_laid_over_gray(picture, file_format, options):
    alpha = np.random.default_rng(1).choice([0, 60, 128, 255], picture.shape[:2]).astype(np.uint8)
    data = image_bytes(Image.fromarray(np.dstack([picture, alpha])), file_format, **options)
    image, mode, _ = lct.decode_image(data)
    assert mode == "RGBA" and np.abs(image - over_gray(picture, alpha)).max() <= 1
    assert (image[alpha == 0] == GRAY).all()


def test_gray_with_alpha_and_transparent_colours_are_laid_over_gray(picture):
    gray, alpha = picture[:, :, :1], np.where(picture[:, :, 1] > 127, 255, 0).astype(np.uint8)
    image = lct.decode_image(image_bytes(Image.fromarray(np.dstack([gray, alpha])), "PNG"))[0]
    assert np.abs(image - over_gray(np.repeat(gray, 3, axis=2), alpha)).max() <= 1
    few = picture // 128 * 255
    palette = Image.fromarray(few).quantize(8, dither=Image.Dither.NONE)
    index = np.asarray(palette)
    image = lct.decode_image(image_bytes(palette, "PNG", transparency=2))[0]
    assert (image[index == 2] == GRAY).all() and np.array_equal(image[index != 2], few[index != 2])
    image = lct.decode_image(image_bytes(Image.fromarray(few), "PNG", transparency=(255, 0, 255)))[0]
    is_key = (few == (255, 0, 255)).all(axis=2)
    assert is_key.any() and (image[is_key] == GRAY).all() and np.array_equal(image[~is_key], few[~is_key])


# --- what is broken

JPEG = image_bytes(draw_image(0, 0, side=64), "JPEG")
BROKEN = {
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"this is not a picture\n" * 20, "no JPEG, PNG, BMP, WebP or TIFF"),
    "vector.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n", "no JPEG"),
    "animation.jpg": (image_bytes(draw_image(0, 0), "GIF"), "no JPEG"),
    "half.png": (image_bytes(draw_image(0, 0), "PNG")[:900], "truncated"),
    "huge.png": (png_header(11_000, 11_000), "megapixels"),
    "bomb.png": (png_header(100_000, 100_000), "pixels"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_images_are_quarantined_with_reason_and_left_alone(tmp_path):
    make_dataset(tmp_path / "data", {"a": 4, "b": 4})
    for name, (data, _) in BROKEN.items():
        (tmp_path / "data/a" / name).write_bytes(data)
    before = snapshot(tmp_path / "data")
    found = scan(tmp_path / "data", tmp_path / "run")
    reasons = {item["path"]: item["reason"] for item in found.report["quarantined"]}
    assert set(reasons) == {f"a/{name}" for name in BROKEN}
    for name, (_, reason) in BROKEN.items():
        assert reason in reasons[f"a/{name}"], name
    assert (found.report["classes"]["a"]["usable"], found.report["classes"]["a"]["quarantined"]) == (4, len(BROKEN))
    assert not any(Path(found.records.paths[i]).name in BROKEN for i in range(8))
    assert snapshot(tmp_path / "data") == before
    assert not (tmp_path / "run").exists()  # scan_dataset itself writes nothing


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_claims_too_much_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(lct.ImageError, match="11000 x 11000 px is more than 100 megapixels"):
        lct.decode_image(png_header(11_000, 11_000))


def test_the_report_tells_sizes_modes_and_orientation(tmp_path):
    make_dataset(tmp_path / "data", {"a": 3, "b": 3}, side=40)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((30, 90, 3), np.uint8)).save(tmp_path / "data/a/turned.png", exif=exif)
    draw_image(4, 1, side=8).convert("L").save(tmp_path / "data/b/tiny.png")
    report = scan(tmp_path / "data", tmp_path / "run").report
    assert report["sizes"] == {
        "width_min": 8, "width_median": 40, "width_max": 40, "height_min": 8, "height_median": 40, "height_max": 90,
    }  # fmt: skip
    assert report["modes"] == {"RGB": 7, "L": 1} and report["exif_rotated"] == 1
    assert any(
        text.startswith("images with a side shorter than") and text.endswith("px: 1") for text in report["warnings"]
    )


# --- what is known from the last look


@pytest.fixture
def scanned(tmp_path, call_main, capsys):
    """A data set that `scan` has seen, with a broken image in it, and a function that scans it again."""
    root, out_dir = make_dataset(tmp_path / "data", {"a": 4, "b": 4}), tmp_path / "run"
    (root / "a/bad.png").write_bytes(b"no picture")
    assert call_main("scan", "--data_root", root, "--out_dir", out_dir) == 0
    capsys.readouterr()
    return root, out_dir, lambda: scan(root, out_dir).report


@pytest.fixture
def opened(patch_used):
    """Calls of `check_image` from here on: (root, path)."""
    return patch_used(lct, "check_image").calls


def test_scan_writes_report_and_memory_and_prints_a_table(scanned, call_main, capsys):
    root, out_dir, _ = scanned
    assert {path.name for path in out_dir.iterdir()} == {".lock", ".lock_holder", "data_report.json", "memory.sqlite"}
    assert call_main("scan", "--data_root", root, "--out_dir", out_dir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "usable", "quarantined", "groups", "train", "val", "test"]
    assert lines[1].split()[:3] == ["a", "4", "1"] and lines[3].split()[:3] == ["all", "8", "1"]
    assert any("a/bad.png" in line and "no JPEG" in line for line in lines)


def test_a_photo_of_two_classes_is_one_group_in_all(tmp_path, call_main, capsys):
    root = make_dataset(tmp_path / "data", {"cap": 6, "mug": 6})
    for path in root.rglob("*.png"):
        path.rename(path.with_name(f"shot{int(path.stem) // 2}_{path.name}"))
    args = ("--data_root", root, "--out_dir", tmp_path / "run", "--group_regex", r"^(shot\d+)_")
    assert call_main("scan", *args, "--near_dup_bits", 0) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [row[:4] for row in table] == [["cap", "6", "0", "3"], ["mug", "6", "0", "3"], ["all", "12", "0", "3"]]


def test_a_second_scan_opens_nothing_and_finds_the_same(scanned, opened):
    root, out_dir, again = scanned
    assert lct.to_json(again()) == json.loads((out_dir / "data_report.json").read_text(encoding="utf-8"))
    assert opened == []
    os.utime(root / "b/0002.png", ns=(1, 1))
    again()
    assert opened == [(root, "b/0002.png")], "what is opened is noted"


def test_changed_touched_and_new_files_are_looked_at_again(scanned, opened):
    root, _, again = scanned
    draw_image(0, 99).save(root / "a/bad.png")  # mended
    os.utime(root / "a/0000.png", ns=(1, 1))
    (root / "b/new.png").write_bytes(b"")
    (root / "b/0001.png").unlink()
    report = again()
    assert sorted(path for _, path in opened) == ["a/0000.png", "a/bad.png", "b/new.png"]
    assert [item["path"] for item in report["quarantined"]] == ["b/new.png"]
    assert report["num_usable"] == 8


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "folder"])
def test_a_damaged_memory_is_ignored(scanned, opened, damage):
    _, out_dir, again = scanned
    path = out_dir / "memory.sqlite"
    good, expected = path.read_bytes(), again()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"text": b"hello", "empty": b"", "truncated": good[:3000]}[damage])
    assert again() == expected
    assert len(opened) == 9


def test_what_is_known_of_another_data_root_is_not_used(scanned, opened, tmp_path):
    root, out_dir, _ = scanned
    shutil.copytree(root, tmp_path / "copy")
    scan(tmp_path / "copy", out_dir)
    assert len(opened) == 9


# --- class map, exclude


def test_class_map_merges_renames_and_drops(tmp_path):
    make_dataset(tmp_path / "data", {"saw": 3, "backsaw": 4, "hand": 3, "é": 3, "kept": 3})
    decomposed = unicodedata.normalize("NFD", "é")
    (tmp_path / "map.yaml").write_text(f"пила: [saw, backsaw]\nnull: [hand]\ne2: {decomposed}\n", encoding="utf-8")
    found = scan(tmp_path / "data", tmp_path / "run", class_map=tmp_path / "map.yaml")
    assert found.records.class_names == ("e2", "kept", "пила")
    assert np.bincount(found.records.labels).tolist() == [3, 3, 7]
    assert found.report["class_map"] == {"saw": "пила", "backsaw": "пила", "hand": None, "é": "e2"}
    assert "hand -> (left out)" in lct.format_findings(found.report)
    assert not any(found.records.paths[i].startswith("hand/") for i in range(13))


def test_twins_by_case_are_warned_of_only_if_they_stay_two_classes(tmp_path):
    make_dataset(tmp_path / "data", {"Cat": 3, "cat": 3, "Dog": 3, "dog": 3})
    (tmp_path / "map.yaml").write_text("feline: [Cat, cat]\n")
    found = scan(tmp_path / "data", tmp_path / "run", class_map=tmp_path / "map.yaml")
    assert found.report["warnings"] == ["the folders Dog, dog differ only in case: 2 classes"]


def test_names_in_a_class_map_are_taken_as_they_are_written(tmp_path):
    """YAML reads an unquoted `on` as true and 010 as eight; folders are named otherwise."""
    make_dataset(tmp_path / "data", {"010": 3, "off": 3, "1.50": 3, "b": 3})
    (tmp_path / "map.yaml").write_text("no: [010]\n012: [off, 1.50]\n")
    found = scan(tmp_path / "data", tmp_path / "run", class_map=tmp_path / "map.yaml").records
    assert found.class_names == ("012", "b", "no") and np.bincount(found.labels).tolist() == [6, 3, 3]


def test_broken_images_of_merged_folders_count_for_the_new_class(tmp_path):
    make_dataset(tmp_path / "data", {"saw": 3, "backsaw": 4, "hand": 3})
    for folder in ("saw", "backsaw", "hand"):
        (tmp_path / "data" / folder / "bad.png").write_bytes(b"")
    (tmp_path / "map.yaml").write_text("saws: [saw, backsaw]\n")
    classes = scan(tmp_path / "data", tmp_path / "run", class_map=tmp_path / "map.yaml").report["classes"]
    assert {name: row["quarantined"] for name, row in classes.items()} == {"hand": 1, "saws": 2}


def test_exclude_leaves_out_by_path_or_name(tmp_path):
    make_dataset(tmp_path / "data", {"a": 4, "b": 4})
    report = scan(tmp_path / "data", tmp_path / "run", exclude=("0000.*", "b/0003*", "0001")).report
    assert report["excluded"] == {"0000.*": 2, "b/0003*": 1, "0001": 0}
    assert "--exclude 0001 matches no file" in report["warnings"]
    for link in ("a/bad.png", "a/worse.png", "b/bad.png"):
        (tmp_path / "data" / link).symlink_to("nowhere")
    (tmp_path / "map.yaml").write_text("null: [b]\n")
    options = {"exclude": ("a/bad.png",), "class_map": tmp_path / "map.yaml"}
    half = scan(tmp_path / "data", tmp_path / "run", **options).report
    assert half["excluded"] == {"a/bad.png": 1} and [row["path"] for row in half["quarantined"]] == ["a/worse.png"]
    whole = scan(tmp_path / "data", tmp_path / "run", exclude=("b/*",))
    assert whole.records.class_names == ("a",), "a folder that is left out by its name is no class"
    assert {name: row["usable"] for name, row in report["classes"].items()} == {"a": 3, "b": 2}


# --- duplicates


def test_copies_are_found_and_different_pictures_are_not(tmp_path):
    root = make_dataset(tmp_path / "data", {"a": 12, "b": 12}, side=96)
    original = Image.open(root / "a/0003.png")
    brighter = np.clip(np.asarray(original).astype(int) + 2, 0, 255).astype(np.uint8)
    original.save(root / "a/jpeg.jpg", quality=70)
    original.resize((70, 70), Image.Resampling.LANCZOS).save(root / "a/small.png")
    Image.fromarray(brighter).save(root / "a/brighter.png")
    shutil.copy(root / "a/0003.png", root / "b/same.png")  # in another class: a label conflict
    shutil.copy(root / "b/0005.png", root / "b/copy.png")
    found = scan(root, tmp_path / "run")
    family = {"a/0003.png", "a/jpeg.jpg", "a/small.png", "a/brighter.png", "b/same.png"}
    report, records = found.report, found.records
    assert [set(group) for group in report["duplicates"]["near"]] == [family, {"b/0005.png", "b/copy.png"}]
    assert [set(group) for group in report["duplicates"]["exact"]] == [
        {"a/0003.png", "b/same.png"}, {"b/0005.png", "b/copy.png"},
    ]  # fmt: skip
    assert [set(group) for group in report["label_conflicts"]] == [family]
    assert "duplicates: 5 near, 2 of them exact; each set stays in one split\n" in lct.format_findings(report)
    groups = {records.paths[i]: int(records.groups[i]) for i in range(len(records.paths))}
    assert len({groups[path] for path in family}) == 1 and len(set(groups.values())) == 24


def same_components(num_items: int, pairs: np.ndarray, expected: np.ndarray) -> bool:
    return np.array_equal(
        lct.find_components(num_items, pairs), lct.find_components(num_items, expected.reshape(-1, 2))
    )


def brute_force_pairs(hashes: np.ndarray, thumbs: np.ndarray, max_bits: int) -> np.ndarray:
    return np.array([
        (i, j) for i, j in itertools.combinations(range(len(hashes)), 2)
        if int(hashes[i] ^ hashes[j]).bit_count() <= max_bits
        and np.abs(thumbs[i].astype(int) - thumbs[j]).mean() <= lct.THUMB_TOLERANCE
    ], dtype=np.int64)  # fmt: skip


def plant_hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random hashes, and as many again that differ from one of them in 0 to 18 bits; some share whole slices."""
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    hashes[: count // 3] &= np.uint64(0xFFFFFFFF00000000)
    flipped = []
    for index in rng.permutation(count):
        bits = rng.choice(64, rng.integers(0, 19), replace=False)
        flipped.append(int(hashes[index]) ^ sum(1 << int(bit) for bit in bits))
    return rng.permutation(np.concatenate([hashes, np.array(flipped, dtype=np.uint64)]))


@pytest.mark.parametrize("max_bits", [0, 1, 4, 7, 16])
def test_near_duplicates_equal_brute_force(max_bits):
    rng = np.random.default_rng(max_bits)
    hashes = plant_hashes(rng, 150)
    thumbs = np.full((len(hashes), 12), 100, dtype=np.uint8)
    expected = brute_force_pairs(hashes, thumbs, max_bits)
    found = lct.find_near_duplicates(hashes, thumbs, max_bits)
    assert len(expected) > 3 and same_components(len(hashes), found, expected)
    assert {tuple(pair) for pair in found.tolist()} <= {tuple(pair) for pair in expected.tolist()}


@pytest.mark.parametrize("max_bits", [0, 4])
def test_near_duplicates_equal_brute_force_where_thumbnails_disagree(max_bits):
    """Images of equal or close hash in several colours: a copy of a colour must find its own colour."""
    rng = np.random.default_rng(max_bits + 100)
    hashes = np.repeat(plant_hashes(rng, 30), 5)
    thumbs = np.repeat(rng.choice([20, 120, 220], len(hashes)).astype(np.uint8)[:, None], 12, axis=1)
    found = lct.find_near_duplicates(hashes, thumbs, max_bits)
    assert same_components(len(hashes), found, brute_force_pairs(hashes, thumbs, max_bits))


@pytest.mark.parametrize("count", [1, 2])
def test_near_duplicates_of_almost_nothing(count):
    thumbs = np.zeros((count, 12), np.uint8)
    assert len(lct.find_near_duplicates(np.zeros(count, np.uint64), thumbs, 4)) == count - 1


# --- paths of a million records


def private_mb() -> float:
    """Return the memory of this process that it shares with no other, MB."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_a_million_records_cost_a_forked_worker_less_than_20_mb():
    count = 1_000_000
    paths = np.array([f"class{i % 97:03d}/cropped/image_{i:07d}.jpg" for i in range(count)], dtype=lct.STRINGS)
    labels = np.arange(count, dtype=np.int32) % 97
    records = lct.Records(Path("data"), tuple(map(str, range(97))), paths, labels, labels, labels.astype(np.int8))
    dataset = lct.CropDataset(records, lambda image, mask, seed, augmented: image)
    gc.collect()
    gc.freeze()  # pytest's own objects are not what is measured
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = private_mb()
        total = 0
        for i in range(count):
            total += len(dataset.records.paths[i]) + int(dataset.records.labels[i])
        os.write(writer, f"{private_mb() - before} {total}".encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    gc.unfreeze()
    growth, total = os.read(reader, 100).decode().split()
    os.close(reader)
    assert int(total) == len("class000/cropped/image_0000000.jpg") * count + int(labels.sum())
    assert float(growth) < 20


def test_jpegs_load_with_the_very_pixels_of_pillow(tmp_path: Path) -> None:
    """Another library decodes them; what is upright, gray or for print must not depend on which."""
    path, picture = tmp_path / "a.jpg", draw_image(1, 2, side=61).resize((61, 40))
    for mode, options in itertools.product(
        ("RGB", "L", "CMYK"), ({}, {"progressive": True}, {"subsampling": 0, "quality": 30})
    ):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            path.write_bytes(image_bytes(picture.convert(mode), "JPEG", exif=exif, **options))
            with Image.open(path) as opened:
                upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
            assert np.array_equal(lct.load_image(path), upright), (mode, options)


def test_jpegs_that_are_cut_off_are_refused_for_pillow_s_reason(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.jpg", np.random.default_rng(0)
    whole = image_bytes(draw_image(1, 2, side=90), "JPEG")
    for length in rng.integers(1, len(whole) - 2, 60).tolist():
        path.write_bytes(whole[:length])
        with pytest.raises(lct.ImageError) as refused:
            lct.load_image(path)
        try:
            with Image.open(path) as opened:
                opened.load()
            pytest.fail("Pillow reads it")
        except Image.UnidentifiedImageError:
            assert "is no JPEG" in str(refused.value)
        except Exception as error:
            assert str(error)[:200] == str(refused.value)


CASES = Path(__file__).parents[2] / "shared/cases"

# --- trees of other tools


def put_images(root: Path, *paths: str) -> Path:
    rng = np.random.default_rng(len(paths))
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(root / path)
    return root


def split_tree(root: Path, *splits: str) -> Path:
    return put_images(
        root, *(f"{split}/{name}/{i}.png" for split in splits for name in ("nut", "saw") for i in range(5))
    )


@pytest.mark.parametrize("val", ["valid", "val", "Validation"])
def test_train_valid_test_folders_are_the_splits(val: str, tmp_path: Path) -> None:
    root = split_tree(tmp_path / "data", "train", val, "test")
    (root / "README.txt").write_text("roboflow")
    with pytest.raises(lct.UserError, match="give --splits from_folders to train on them, else one of them"):
        lct.scan_dataset(lct.Config(data_root=root, out_dir=tmp_path / "run"))
    put_images(root, "train/beside.png")
    (root / "test/saw/masks").mkdir()
    Image.fromarray(np.eye(24, dtype=np.uint8) * 255).save(root / "test/saw/masks/3.png")
    (root / "train/nut/1.png").write_bytes(b"broken")
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", splits="from_folders")
    found = lct.attach_masks(lct.scan_dataset(config), config)
    assert found.records.class_names == ("nut", "saw") and found.report["warnings"] == [
        "passed over: 1 file of other types (.txt) and 1 image beside the class folders"
    ]
    assert all(
        lct.SPLIT_FOLDERS[path.split("/")[0].lower()] == split
        for split in lct.SPLIT_NAMES
        for path in map(found.records.paths.__getitem__, found.records.rows(split))
    )
    assert found.report["classes"]["nut"]["quarantined"] == 1
    assert found.records.masks[list(found.records.paths).index("test/saw/3.png")] == "test/saw/masks/3.png"
    lct.check_trainable(found, config)


def test_given_splits_may_lack_val_or_test_and_leaks_are_named(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "data", "train", "test")
    (root / "test/nut/0.png").write_bytes((root / "train/nut/0.png").read_bytes())
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", splits="from_folders")
    found = lct.scan_dataset(config)
    assert [len(found.records.rows(split)) for split in lct.SPLIT_NAMES] == [8, 2, 10]
    assert any(
        text.startswith("1 val and test images, as the folders have them, are dup") for text in found.report["warnings"]
    )
    findings = lct.format_findings(lct.attach_masks(found, config).report)
    assert "duplicates: 1 near, 1 of them exact\n" in findings, "the folders parted them"
    drawn = "no folder val, valid or validation has images: val is drawn from train"
    assert drawn in found.report["warnings"]
    put_images(root, "vaild/nut/7.png")
    report = lct.scan_dataset(config).report
    (passed_over,) = report["quarantined"]
    assert report["num_images"] == 20, "a folder is no image"
    assert passed_over["path"] == "vaild" and "beside train, val and test" in passed_over["reason"]
    shutil.rmtree(root / "vaild")
    (root / "test").rename(root / "valid")
    found = lct.scan_dataset(config)
    assert drawn not in found.report["warnings"]
    assert [len(found.records.rows(split)) for split in lct.SPLIT_NAMES] == [10, 10, 0]
    lct.check_trainable(found, config)
    assert not any("none in" in text for text in found.report["warnings"])
    (root / "train").rename(root / "other")
    with pytest.raises(lct.UserError, match=r"leave none for train\b[\s\S]*put images into train/$"):
        lct.check_trainable(lct.scan_dataset(config), config)


def test_with_given_splits_each_class_needs_training_images(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "data", "train", "val")
    put_images(root, *(f"{split}/cap/{i}.png" for split in ("val", "test") for i in range(3)))
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", splits="from_folders")
    found = lct.scan_dataset(config)
    assert "cap: 6 images in 6 groups, none in train (its figures there are missing)" in found.report["warnings"]
    with pytest.raises(lct.UserError, match="cap has no training image"):
        lct.check_trainable(found, config)


def test_of_many_classes_the_table_lists_the_smallest_and_counts_all() -> None:
    rows = {f"part_{number}": [300 - number, 1] for number in range(150)}
    head, *lines, more, total = lct.format_table(("usable", "test"), rows, 13).splitlines()
    assert [line.split()[0] for line in lines] == [f"part_{number}" for number in range(149, 49, -1)]
    assert more == "... and 50 more, as large or larger, in data_report.json"
    assert head.split() == ["class", "usable", "test"] and total.split() == ["all", "33,825", "150"]
    few = dict(list(rows.items())[:100])
    assert [line.split()[0] for line in lct.format_table(("usable", "test"), few, 13).splitlines()[1:-1]] == list(few)


@pytest.mark.parametrize("inside", ["", "cropped/"])
def test_a_folder_that_is_one_class_itself_names_its_parent(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(tmp_path / "data/nut", *(f"{inside}{i}.png" for i in range(3)))
    (tmp_path / "data/nut/masks").mkdir()
    for folder in ("data/nut", f"data/nut/{inside}"):
        with pytest.raises(lct.UserError, match=rf"looks like one itself\n.*its parent, {tmp_path}/data, "):
            lct.scan_dataset(lct.Config(data_root=tmp_path / folder, out_dir=tmp_path / "run"))
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(lct.UserError, match=rf"looks like one itself\n.*its parent, {tmp_path}/data, "):
            lct.scan_dataset(lct.Config(data_root=Path(), out_dir=tmp_path / "run"))


def test_classes_without_cropped_beside_others_with_it_are_named(tmp_path: Path) -> None:
    root = put_images(
        tmp_path / "data", "a/cropped/1.png", "a/9.png", "b/1.png", "c/cropped/1.png", "d/1.png", "stray.png"
    )
    (root / "b/2.gif").write_bytes(b"GIF89a")
    warnings = lct.scan_dataset(lct.Config(data_root=root, out_dir=tmp_path / "run")).report["warnings"]
    assert any("2 classes have cropped/, and b, d not" in text for text in warnings)
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", exclude=("c/*",))
    assert any(
        text.startswith("1 class has cropped/, and b, d not") for text in lct.scan_dataset(config).report["warnings"]
    )
    assert any("(.gif)" in text and "1 image beside the class folders" in text for text in warnings)
    root = put_images(tmp_path / "other", "cropped/1.png", "b/1.png")
    warnings = lct.scan_dataset(lct.Config(data_root=root, out_dir=tmp_path / "run")).report["warnings"]
    assert not any("cropped/" in text for text in warnings), "a class is called cropped"


def test_classes_named_like_no_class_or_like_masks_are_asked_about(tmp_path: Path) -> None:
    root = put_images(tmp_path / "data", "nut/1.png", "Others/1.png", "masks/1.png", "bolt/1.png")
    config = lct.Config(data_root=root, out_dir=tmp_path / "run")
    warnings = lct.scan_dataset(config).report["warnings"]
    asked = [text.partition(":")[0] for text in warnings if text.startswith("a class is named ")]
    assert asked == ["a class is named Others", "a class is named masks"]
    with_strangers = dataclasses.replace(config, unknown_dir=tmp_path)
    assert not any("named Others" in text for text in lct.scan_dataset(with_strangers).report["warnings"])


@pytest.mark.parametrize(
    "text, classes",
    [
        ("a: striking\nb: power\n", {"a": "striking", "b": "power"}),
        ("a: tool\nb: tool\nd: ~\n", {"a": "tool", "b": "tool", "d": None}),
        ("a: b\nd: c\nb: c\n", {"a": "b", "d": "c", "b": "c"}),  # no folder is named c
        ("new: [a/, b/]\n", {"a": "new", "b": "new"}),
        ("\ufeffnew: [a, b]\r\nnull: [d]\r\n", {"a": "new", "b": "new", "d": None}),
    ],
)
def test_a_class_map_is_read_in_the_direction_that_makes_sense(text: str, classes: dict, tmp_path: Path) -> None:
    root = put_images(tmp_path / "data", *(f"{name}/{i}.png" for name in "abd" for i in range(2)))
    (tmp_path / "map.yaml").write_bytes(text.encode())
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", class_map=tmp_path / "map.yaml")
    assert lct.scan_dataset(config).report["class_map"] == classes


def test_a_class_map_of_folders_that_are_numbers_is_read(tmp_path: Path) -> None:
    root = put_images(tmp_path / "data", *(f"{name}/{i}.png" for name in "012" for i in range(2)))
    (tmp_path / "map.yaml").write_text("0: zero\n1: one\n2: ~\n")
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", class_map=tmp_path / "map.yaml")
    assert lct.scan_dataset(config).report["class_map"] == {"0": "zero", "1": "one", "2": None}


def test_two_lists_to_leave_out_are_named_as_yaml_writes_them(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("null: [a]\n~: [b]\n")
    with pytest.raises(lct.UserError, match="has two lists for null"):
        lct.read_class_map(tmp_path / "map.yaml", "ab")


# --- more than eight bits


def put_deep(path: Path, values: np.ndarray) -> None:
    """Write values of 0..1 as an image of 16 bits, of which the folder's name says how many are used."""
    import cv2

    values = np.rint(values * (2 ** int(path.parent.name.split("_")[-1]) - 1)).astype(np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), values if values.ndim == 2 else values[:, :, ::-1])


def shades(seed: int, top: float, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0, top, shape)
    values.flat[0] = top
    return values


DEEP = {"gray.png": (20, 30), "gray.tif": (20, 30), "colour.png": (20, 30, 3), "colour.tif": (20, 30, 3)}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_images_of_more_bits_are_scaled_by_those_of_the_data_set(bits: int, name: str, tmp_path: Path) -> None:
    tops = (1.0, 0.6, 0.3)  # also the dark one by the bits of the others
    for index, top in enumerate(tops):
        put_deep(tmp_path / f"data/a_{bits}/{index}{name}", shades(index, top, DEEP[name]))
    config = lct.Config(data_root=tmp_path / "data", out_dir=tmp_path / "run")
    found = lct.attach_masks(lct.scan_dataset(config), config)
    assert found.records.image_bits == (bits,) and not found.report["quarantined"]
    for index, top in enumerate(tops):
        image, expected = lct.load_crop(found.records, index, 0)[0], shades(index, top, DEEP[name]) * 255
        assert np.abs(image - (expected[:, :, None] if expected.ndim == 2 else expected)).max() <= 1
    assert any("--image_bits" in text for text in found.report["warnings"]) == (bits != 16)
    assert len(set(found.crops["phash"].tolist())) == 3
    forced = lct.scan_dataset(dataclasses.replace(config, image_bits=(16,))).records
    assert abs(int(lct.load_crop(forced, 0, 0)[0].max()) - 255 * 2**bits / 2**16) <= 1


def test_a_run_reads_its_images_as_when_it_began_whatever_images_come_later(
    tmp_path: Path, call_main: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    for index in range(12):
        put_deep(tmp_path / f"data/{'ab'[index % 2]}_12/{index}.png", shades(index, 1, (20, 30)))
    argv = ("--data_root", tmp_path / "data", "--out_dir", tmp_path / "run", *TINY_RUN)
    assert call_main(*argv) == 0
    put_deep(tmp_path / "new_16/new.png", shades(12, 1, (20, 30)))  # would make all others black
    (tmp_path / "new_16/new.png").rename(tmp_path / "data/a_12/new.png")
    assert call_main(*argv, "--epochs", 2) == 0 and "1 image new since this run" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text("utf-8"))["options"]["image_bits"] == [12]
    assert call_main(*argv, "--epochs", 3, "--image_bits", 16) == 2
    assert "image_bits: [12] -> [16]" in capsys.readouterr().err
    (tmp_path / "data/a_12/new.png").unlink()
    payload = lct.load_checkpoint(tmp_path / "run/checkpoint_last.pth")
    del payload["identity"]["image_bits"]  # as in older checkpoints, whose runs find them again
    torch.save(payload, tmp_path / "run/checkpoint_last.pth")
    assert call_main(*argv, "--epochs", 3) == 0
    assert json.loads((tmp_path / "run/config.json").read_text("utf-8"))["options"]["image_bits"] == [12]


def test_a_deep_image_that_fails_at_its_second_reading_is_named(tmp_path: Path, patch_used) -> None:
    for index in range(3):
        put_deep(tmp_path / f"data/a_12/{index}.png", shades(index, 1, (20, 30)))
    find_image_bits = lct.find_image_bits

    def find_and_lose(highest: np.ndarray) -> tuple[int, ...]:
        for path in (tmp_path / "data/a_12").glob(lost):
            path.unlink()
        return find_image_bits(highest)

    lost = "0.png"
    patch_used(lct, "find_image_bits", find_and_lose)
    config = lct.Config(data_root=tmp_path / "data", out_dir=tmp_path / "run")
    scan = lct.scan_dataset(config)
    assert list(scan.records.paths) == ["a_12/1.png", "a_12/2.png"]
    assert [item["path"] for item in scan.report["quarantined"]] == ["a_12/0.png"]
    lost = "*.png"
    with pytest.raises(lct.UserError, match=r"none of 2 images can be read \(the first: a_12/1.png: No such file"):
        lct.scan_dataset(config)


def test_images_of_8_bits_beside_others_of_12_keep_their_light(tmp_path: Path) -> None:
    for index in range(3):
        put_deep(tmp_path / f"data/a_12/{index}.png", shades(index, 0.7 + index / 10, (20, 30)))
        put_deep(tmp_path / f"data/b_8/{index}.png", shades(index, 0.7 + index / 10, (20, 30)))
    config = lct.Config(data_root=tmp_path / "data", out_dir=tmp_path / "run")
    records = lct.scan_dataset(config).records
    assert records.image_bits == (8, 12)
    for row in range(3):
        first, second = (lct.load_crop(records, place, 0)[0].astype(int) for place in (row, row + 3))
        assert np.abs(first - second).max() <= 1 and first.max() > 170
    highest = np.array([4000, 3000, 900, 300, 200, 90, 0])  # shades all the way down: a dark picture, not one of 8 bits
    assert lct.find_image_bits(highest) == (12,) and lct.find_image_bits(np.array([0])) == ()


def test_colours_of_16_bits_are_turned_upright_once(picture: np.ndarray, tmp_path: Path) -> None:
    import tifffile

    for orientation in range(1, 9):
        path, values = tmp_path / f"{orientation}.tif", stored_for(picture, orientation).astype(np.uint16) * 16
        tifffile.imwrite(path, values, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        assert np.abs(lct.load_image(path, (12,)).astype(int) - picture).max() <= 1, orientation


TIFF_KINDS = {
    "3 bands of 32-bit floating-point values": (np.ones((8, 8, 3), np.float32), {"photometric": "rgb"}),
    "5 bands of 8-bit values": (np.ones((8, 8, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}),
    "4 bands of 64-bit floating-point values": (np.ones((8, 8, 4)), {"photometric": "rgb", "bigtiff": True}),
    "1 bands of 64-bit values": (np.ones((8, 8), np.uint64), {"byteorder": ">"}),
}


@pytest.mark.parametrize("kind", TIFF_KINDS)
def test_tiffs_that_are_not_read_are_called_what_they_are(kind: str, tmp_path: Path) -> None:
    import tifffile

    values, options = TIFF_KINDS[kind]
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    with pytest.raises(lct.ImageError, match=f"is a TIFF of {kind}: save it"):
        lct.load_image(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    for size in range(4, len(data), 7):  # cut anywhere: refused, by whichever name
        with warnings.catch_warnings(action="ignore"), pytest.raises(lct.ImageError):
            lct.decode_image(data[:size])


@pytest.mark.skipif(not CASES.is_dir(), reason="no cases")
def test_images_of_instruments(tmp_path: Path) -> None:
    (root,) = CASES.glob("95_*")
    found = lct.scan_dataset(lct.Config(data_root=root, out_dir=tmp_path / "run"))
    records = found.records
    assert all(lct.load_crop(records, row, 0)[0].max() > 150 for row in range(len(records.paths)))
    reasons = {item["path"]: item["reason"] for item in found.report["quarantined"]}
    assert "JPEG 2000" in reasons["drill/06_jp2k.tif"]
