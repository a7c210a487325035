"""Section 06, and the way of masks through augmentation, loaders, training and prototypes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import drawn_scenes
import numpy as np
import pytest
from conftest import TINY_RUN, image_bytes
from PIL import Image, ImageDraw

import lct_dino3 as lct

GRAY = lct.Fill("gray", (114, 114, 114))


def draw_object(kind: int, seed: int, side: int = 48, background: tuple[int, int, int] | None = None) -> tuple:
    """Draw an ellipse of the colour of its kind; return the crop and its mask, 255 for the object."""
    rng = np.random.default_rng((kind, seed))
    colour = ((230, 30, 30), (30, 200, 40), (40, 60, 230))[kind]
    noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = Image.fromarray(noise) if background is None else Image.new("RGB", (side, side), background)
    mask = Image.new("L", (side, side))
    x, y = rng.uniform(0.15, 0.3, 2) * side
    box = (x, y, side - rng.uniform(0.15, 0.3) * side, side - y * 0.8)
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return image, mask


def make_masked_dataset(root: Path, per_class: int = 10, side: int = 48, seed: int = 0) -> Path:
    """Draw three classes with a mask for every crop."""
    for kind, name in enumerate(("bolt", "nut", "washer")):
        (root / name / "cropped").mkdir(parents=True)
        (root / name / "masks").mkdir()
        for index in range(per_class):
            image, mask = draw_object(kind, seed + index, side)
            image.save(root / name / "cropped" / f"{index:02d}.png")
            mask.save(root / name / "masks" / f"{index:02d}_mask.png")
    return root


def scan(root: Path, **options: object) -> lct.Scan:
    config = lct.Config(data_root=root, out_dir=root.parent / "run", **options)
    return lct.attach_masks(lct.scan_dataset(config), config)


def mask_of(found: lct.Scan, name: str) -> str:
    records = found.records
    (row,) = [i for i in range(len(records.paths)) if records.paths[i] == name]
    return records.masks[row]


def reasons(found: lct.Scan) -> dict[str, str]:
    return {item["path"]: item["reason"] for item in found.report["masks"]["refused"]}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A data_root with one crop, a/1.jpg of 40 x 30 px, and no mask."""
    (tmp_path / "data/a").mkdir(parents=True)
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "data/a/1.jpg")
    return tmp_path / "data"


def put(path: Path, size: tuple[int, int] = (40, 30), *, cutout: bool = False, mode: str = "L") -> None:
    """Write a mask, or a cutout, whose left half is object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    if cutout:
        rgba = Image.new("RGBA", size, (9, 250, 9, 255))
        rgba.putalpha(mask)
        rgba.save(path, "PNG")
    else:
        mask.convert(mode).save(path, "PNG")


ORDER = [
    "cutouts/1_cutout.png",
    "cutouts/1.png",
    "masks/1.jpg_mask.png",
    "masks/1.jpg.png",
    "masks/1_mask.png",
    "masks/1.png",
]


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_masks_are_found_under_all_their_names_and_the_best_one_wins(tree: Path, first: int) -> None:
    for name in ORDER[first:]:
        put(tree / "a" / name, cutout=name.startswith("cutouts"))
    found = scan(tree)
    assert mask_of(found, "a/1.jpg") == f"a/{ORDER[first]}"
    assert found.report["masks"]["usable"] == 1 and reasons(found) == {}
    assert found.report["classes"]["a"]["masks"] == 1
    _, mask, reason = lct.load_crop(found.records, 0, 1)
    assert reason == "" and mask.shape == (30, 40)
    assert (mask[:, :20] == 255).all() and (mask[:, 20:] == 0).all()
    assert lct.load_crop(found.records, 0, 0)[1] is None


def test_folder_name_suffix_and_unicode_form_may_differ(tree: Path) -> None:
    put(tree / "a/silhouettes/1_mask.PNG")
    Image.new("RGB", (40, 30)).save(tree / "a" / "Шлиц й.png")  # й as one character ...
    put(tree / "a/silhouettes" / "Шлиц й_mask.png".replace("й", "и\u0306"))  # ... and as two, as macOS has it
    found = scan(tree, masks_dirname="silhouettes")
    assert mask_of(found, "a/1.jpg") == "a/silhouettes/1_mask.PNG"
    assert found.report["masks"]["usable"] == 2


def test_crops_of_one_stem_can_have_a_mask_each(tree: Path) -> None:
    Image.new("RGB", (40, 30)).save(tree / "a/1.png")
    put(tree / "a/masks/1.png_mask.png")
    put(tree / "a/masks/1_mask.png")
    found = scan(tree)
    assert mask_of(found, "a/1.png") == "a/masks/1.png_mask.png" and mask_of(found, "a/1.jpg") == "a/masks/1_mask.png"


def test_masks_out_is_searched_after_data_root(tree: Path, tmp_path: Path) -> None:
    put(tmp_path / "made/a/masks/1_mask.png")
    found = scan(tree, masks_out=tmp_path / "made")
    assert mask_of(found, "a/1.jpg") == str(tmp_path / "made/a/masks/1_mask.png")
    assert lct.load_crop(found.records, 0, 1)[1] is not None
    run = SimpleNamespace(config=lct.Config(), path=tmp_path / "run")
    command = lct.EvaluateOptions(run=run.path, data_root=tree, masks_out=tmp_path / "made")
    assert lct.scan_for_run(run, tree, command).records.has_mask.all(), "of another folder too"
    put(tree / "a/masks/1.png")
    assert mask_of(scan(tree, masks_out=tmp_path / "made"), "a/1.jpg") == "a/masks/1.png"


LEFT = np.repeat([[True] * 20 + [False] * 20], 30, axis=0)  # (30, 40)
ODD_MASKS = {
    "0 and 1": Image.fromarray(LEFT.astype(np.uint8)),
    "16 bits, 0 and 255": Image.fromarray(LEFT.astype(np.uint16) * 255),
    "16 bits, 0 and 1": Image.fromarray(LEFT.astype(np.uint16)),
    "16 bits, 0 and 4095": Image.fromarray(LEFT.astype(np.uint16) * 4095),
    "dark palette": Image.fromarray(LEFT.astype(np.uint8)).convert("P", palette=Image.Palette.WEB),
    "dark colour": Image.fromarray(LEFT[:, :, None] * np.array([0, 0, 90], np.uint8)),
    "black on transparent": Image.fromarray(LEFT[:, :, None] * np.array([0, 0, 0, 255], np.uint8)),
    "dark red on transparent white": Image.fromarray(
        np.where(LEFT[:, :, None], [60, 0, 0, 255], [255, 255, 255, 0]).astype(np.uint8)
    ),
    "gray on transparent": Image.fromarray(LEFT[:, :, None] * np.array([0, 255], np.uint8), "LA"),
}
ODD_MASKS["dark palette"].putdata(LEFT.astype(int).ravel().tolist())
ODD_MASKS["dark palette"].putpalette([120, 120, 120, 64, 0, 0])
UNCLEAR_MASKS = {
    "no pixel is above 127, and of its values 0, 1, 2 none": LEFT.astype(np.uint8),
    "no pixel is above 127, and of its values 0 none": LEFT * np.uint8(0),
    "every pixel is above 127, and of its values 128, 255 none": np.where(LEFT, 255, 128).astype(np.uint8),
    "no pixel is above 127, and of its values 1, 2 none": np.where(LEFT, 1, 2).astype(np.uint8),
    "its values are 0, 15, 255, as of a label": np.where(LEFT, 15, 0).astype(np.uint8),
}
UNCLEAR_MASKS["no pixel is above 127, and of its values 0, 1, 2 none"][:3, :3] = 2
UNCLEAR_MASKS["its values are 0, 15, 255, as of a label"][:, 20] = 255


@pytest.mark.parametrize("kind", ODD_MASKS)
def test_masks_are_told_by_what_is_zero_where_that_is_plain(kind: str, tree: Path) -> None:
    (tree / "a/masks").mkdir()
    ODD_MASKS[kind].save(tree / "a/masks/1.png")
    found = scan(tree)
    assert reasons(found) == {} and np.array_equal(lct.load_crop(found.records, 0, 1)[1] > 0, LEFT)


@pytest.mark.parametrize("reason", UNCLEAR_MASKS)
def test_masks_that_are_not_plain_are_refused_by_their_values(reason: str, tree: Path) -> None:
    (tree / "a/masks").mkdir()
    Image.fromarray(UNCLEAR_MASKS[reason]).save(tree / "a/masks/1.png")
    assert reason in reasons(scan(tree))["a/masks/1.png"]


CASES = Path(__file__).parents[2] / "shared/cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="no cases")
@pytest.mark.parametrize("number", [70, 71, 76, 77])
def test_masks_of_public_reports_are_used(number: int, tmp_path: Path) -> None:
    (root,) = CASES.glob(f"{number}_*")
    config = lct.Config(data_root=root, out_dir=tmp_path / "run")
    found = lct.attach_masks(lct.scan_dataset(config), config)
    assert found.report["masks"]["usable"] == 15 and reasons(found) == {}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16", "RGBA"])
def test_masks_of_every_mode_are_read(tree: Path, mode: str) -> None:
    (tree / "a/masks").mkdir()
    values = np.zeros((30, 40), np.uint8)
    values[:, :20] = 255
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode == "P":  # as VOC has it: an index whose colour is dark red
        image = Image.fromarray((values > 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 128, 0, 0])
    elif mode == "RGBA":
        image = Image.fromarray(np.dstack([np.full((30, 40, 3), 255, np.uint8), values]), "RGBA")
    else:
        image = Image.fromarray(values).convert(mode)
    image.save(tree / "a/masks/1.png")
    _, mask, _ = lct.load_crop(scan(tree).records, 0, 1)
    assert np.array_equal(mask, values)


def test_a_mask_of_another_size_and_the_same_aspect_is_resized(tree: Path) -> None:
    put(tree / "a/masks/1.png", (80, 60))
    _, mask, _ = lct.load_crop(scan(tree).records, 0, 1)
    assert mask.shape == (30, 40) and set(np.unique(mask)) == {0, 255} and (mask[:, :20] == 255).all()
    values = np.zeros((60, 80), np.uint8)
    values[:, :40] = 255
    values[1::2, 41::2] = 255  # a quarter of each pixel of the crop: not the object, though the nearest pixel says so
    Image.fromarray(values).save(tree / "a/masks/1.png")
    _, mask, _ = lct.load_crop(scan(tree).records, 0, 1)
    assert (mask[:, :20] == 255).all() and (mask[:, 21:] == 0).all()


BAD_MASKS = {
    "another aspect": (lambda path: put(path, (42, 30)), "42 x 30 px"),
    "on its side": (lambda path: put(path, (30, 40)), "30 x 40 px"),
    "empty": (lambda path: Image.new("L", (40, 30), 127).save(path), "no pixel is above 127"),
    "full": (lambda path: Image.new("L", (40, 30), 128).save(path), "every pixel is above 127"),
    "no image": (lambda path: path.write_bytes(b"<svg>"), "is no JPEG"),
    "cut off": (lambda path: path.write_bytes(image_bytes(Image.effect_noise((40, 30), 90), "PNG")[:300]), "truncated"),
    "nothing in it": (lambda path: path.write_bytes(b""), "empty"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_a_mask_that_cannot_be_used_is_refused_by_name_and_reason_and_the_next_is_tried(tree: Path, case: str) -> None:
    write, reason = BAD_MASKS[case]
    (tree / "a/masks").mkdir()
    write(tree / "a/masks/1_mask.png")
    found = scan(tree)
    assert mask_of(found, "a/1.jpg") == "" and not found.records.has_mask.any()
    assert list(reasons(found)) == ["a/masks/1_mask.png"] and reason in reasons(found)["a/masks/1_mask.png"]
    assert lct.load_crop(found.records, 0, 1)[1] is None, "used as it is"
    put(tree / "a/masks/1.png")
    assert mask_of(scan(tree), "a/1.jpg") == "a/masks/1.png"


def test_a_cutout_without_alpha_and_masks_without_image_or_in_jpeg_are_refused(tree: Path) -> None:
    (tree / "a/cutouts").mkdir()
    Image.new("RGB", (40, 30), (255, 255, 255)).save(tree / "a/cutouts/1.png")
    put(tree / "a/masks/2_mask.png")
    Image.new("L", (40, 30)).save(tree / "a/masks/1_mask.jpg")
    (tree / "a/broken.jpg").write_bytes(b"broken")
    Image.new("RGB", (40, 30)).save(tree / "a/out.jpg")
    put(tree / "a/masks/broken_mask.png")  # their images are there, though not used
    put(tree / "a/masks/out.png")
    put(tree / "a/3.png", mode="RGB")
    put(tree / "a/masks/3_mask.PNG")
    put(tree / "a/masks/3_mask.png")
    found = scan(tree, exclude=("out.*",))
    assert reasons(found) == {
        "a/masks/3_mask.PNG": "another file has the same name but for case or Unicode form",
        "a/cutouts/1.png": "has no alpha channel",
        "a/masks/2_mask.png": "has no image",
        "a/masks/1_mask.jpg": "is no PNG",
    }


def test_a_crop_with_alpha_is_its_own_mask_and_an_opaque_one_is_no_problem(tree: Path) -> None:
    put(tree / "a/own.png", cutout=True)
    Image.new("RGBA", (40, 30), (1, 2, 3, 255)).save(tree / "a/opaque.png")
    found = scan(tree)
    assert mask_of(found, "a/own.png") == "a/own.png" and mask_of(found, "a/opaque.png") == ""
    assert reasons(found) == {} and found.report["masks"]["own_alpha"] == 1
    row = [found.records.paths[i] for i in range(3)].index("a/own.png")
    assert (lct.load_crop(found.records, row, 1)[1][:, :20] == 255).all()
    assert lct.is_alpha_file("masks/venetian.png", "mask") and lct.is_alpha_file("masks/cropped/venetian.png", "masks")


@pytest.mark.parametrize("kind", ["gray", "black", "blur", "mean", "random"])
@pytest.mark.parametrize("view", [0, 1])
def test_colour_hidden_under_alpha_0_is_never_seen(tree: Path, kind: str, view: int) -> None:
    rgba = np.zeros((30, 40, 4), np.uint8)
    rgba[..., 1] = 255  # bright green under the transparent half
    rgba[:, :20] = (200, 60, 60, 255)
    Image.fromarray(rgba, "RGBA").save(tree / "a/1.png")
    (tree / "a/1.jpg").unlink()
    records = scan(tree).records
    image, mask, _ = lct.load_crop(records, 0, view)
    for augment in (False, True):
        fill = lct.Fill(kind, (114, 114, 114))
        seen = lct.build_transform(48, augment, fill)(image, mask, 5).astype(int)
        if not (augment and kind == "random" and view):  # a random colour may be green
            assert (seen[..., 1] - seen[..., 0]).max() < 40


def test_a_second_scan_opens_no_mask_again(tmp_path: Path, patch_used: Callable) -> None:
    root, decoded = make_masked_dataset(tmp_path / "data", 3), patch_used(lct, "decode_mask")
    bars = patch_used(lct, "progress")
    first = scan(root)
    assert [label for _, _, label, *_ in bars.calls] == ["checking images", "checking masks/ object masks"]
    (tmp_path / "run").mkdir()
    first.memory.save()
    assert decoded.calls
    decoded.calls.clear()
    again = scan(root)
    assert not decoded.calls
    assert again.report == first.report and again.records.has_mask.all()


@pytest.mark.parametrize("mode", ["mask", "mix"])
def test_masks_asked_for_where_there_are_none_end_with_two_ways_out(
    small_data: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture, mode: str
) -> None:
    assert call_main("--data_root", small_data, "--out_dir", tmp_path / "run", "--crop_mode", mode, *TINY_RUN) == 2
    message = capsys.readouterr().err
    assert f"--crop_mode {mode}" in message and "_mask.png" in message and "--auto_generate_masks" in message
    assert not (tmp_path / "run").exists()


def move(image: np.ndarray, mask: np.ndarray, side: int, seed: int) -> np.ndarray:
    """Return image and mask as augmentation moves them, uint8 (side, side, 4)."""
    return lct.move_square(lct.fit_square(np.dstack([image, mask]), side), np.random.default_rng(seed))


def test_augmented_mask_is_the_mask_of_the_augmented_object() -> None:
    """Image and mask move together: IoU above 0.98 over many seeds, at sizes that shrink and that enlarge."""
    for side, seed in [(side, seed) for side in (90, 300) for seed in range(40)]:
        image, mask = draw_object(seed % 3, seed, side, background=(0, 0, 0))
        drawn = np.asarray(mask)
        white = np.repeat(drawn[:, :, None], 3, axis=2)
        moved = move(white, drawn, 160, seed)
        border = np.abs(moved[..., 0].astype(int) - lct.PADDING_GRAY) <= 1  # opened by moving, gray in the image
        seen, expected = moved[..., 3] > 127, (moved[..., 0] > 127) & ~border
        assert (seen & expected).sum() / (seen | expected).sum() > 0.98, (side, seed)
        assert np.asarray(image).shape[:2] == drawn.shape


@pytest.mark.parametrize(
    ("fill", "values"),
    [(GRAY, {114}), (lct.Fill("black", (0, 0, 0)), {0}), (lct.Fill("mean", (124, 116, 104)), {124, 116, 104})],
)
def test_the_fill_keeps_its_value_through_augmentation(fill: lct.Fill, values: set[int]) -> None:
    transform = lct.build_transform(64, augment=True, fill=fill)
    for seed in range(40):
        image, mask = (np.asarray(part) for part in draw_object(0, seed))
        seen = transform(image, mask, seed)
        background = move(image, mask, 64, seed)[..., 3] <= 127
        assert background.any() and set(np.unique(seen[background])) == values
        assert (seen[~background].reshape(-1, 3) != fill.colour).any()


def test_random_fill_is_a_colour_of_the_seed_in_training_and_gray_in_evaluation() -> None:
    image, mask = (np.asarray(part) for part in draw_object(0, 1))
    fill = lct.Fill("random", (114, 114, 114))
    corners = {tuple(lct.build_transform(48, True, fill)(image, mask, seed)[0, 0].tolist()) for seed in range(20)}
    assert len(corners) >= 18
    first, again = (lct.build_transform(48, True, fill)(image, mask, 3) for _ in range(2))
    assert np.array_equal(first, again)
    assert lct.build_transform(48, False, fill)(image, mask, 3)[0, 0].tolist() == [114] * 3


def test_blur_keeps_the_background_s_colours_and_none_of_the_object() -> None:
    image, mask = (np.asarray(part) for part in draw_object(0, 1, background=(50, 60, 70)))
    filled = lct.fill_background(image, mask, lct.Fill("blur", (114, 114, 114)), None)
    assert np.abs(filled[mask == 0].astype(int) - (50, 60, 70)).max() <= 1
    assert np.array_equal(filled[mask == 255], image[mask == 255])
    noisy = np.asarray(draw_object(0, 1)[0])
    smooth = lct.fill_background(noisy, mask, lct.Fill("blur", (114, 114, 114)), None)[mask == 0]
    assert smooth.std() < 0.4 * noisy[mask == 0].std()


def test_the_background_of_a_masked_crop_has_no_influence_at_all() -> None:
    for seed in range(20):
        _, mask = draw_object(0, seed, 90)
        crops = [np.asarray(draw_object(0, seed, 90, background=colour)[0]) for colour in ((255, 0, 255), (0, 40, 0))]
        for augment in (False, True):
            seen = [lct.build_transform(64, augment, GRAY)(crop, np.asarray(mask), seed) for crop in crops]
            assert np.array_equal(*seen)


def test_mix_shows_its_share_masked_the_same_for_the_same_seed_and_other_ones_each_epoch() -> None:
    rows, labels = np.arange(1000), np.zeros(1000, np.int32)

    def views(mode: str, epoch: int, **options: object) -> list[int]:
        sampler = lct.EpochSampler(rows, labels, lct.Config(crop_mode=mode, **options))
        sampler.epoch = epoch
        shown = sorted((key.row, key.view) for batch in sampler for key in batch)
        return [view for _, view in shown]

    assert sum(views("bbox", 0)) == 0 and sum(views("mask", 0)) == 1000
    assert views("mix", 0) == views("mix", 0) != views("mix", 1)
    assert views("mix", 0) != views("mix", 0, seed=7)
    assert 340 < sum(views("mix", 0)) < 460 and 650 < sum(views("mix", 0, mix_mask_p=0.7)) < 750


def test_evaluation_sees_each_crop_once_and_in_mix_those_with_masks_both_ways(tree: Path) -> None:
    put(tree / "a/masks/1.png")
    Image.new("RGB", (40, 30)).save(tree / "a/2.jpg")
    records = scan(tree).records
    views = {
        mode: [(key.row, key.view) for key in lct.eval_keys(records, np.arange(2), mode)]
        for mode in ("bbox", "mask", "mix")
    }
    assert views == {"bbox": [(0, 0), (1, 0)], "mask": [(0, 1), (1, 0)], "mix": [(0, 0), (1, 0), (0, 1)]}


def test_a_mask_that_vanishes_costs_the_mask_and_is_named(tmp_path: Path) -> None:
    root = make_masked_dataset(tmp_path / "data", 3)
    records = scan(root).records
    (root / "bolt/masks/00_mask.png").unlink()
    dataset = lct.CropDataset(records, lct.build_transform(32, augment=False))
    batch = dataset.collate([dataset[lct.SampleKey(row, (), 1)] for row in (0, 1)])
    assert batch.rows.tolist() == [0, 1] and batch.views.tolist() == [1, 1]
    ((row, reason),) = batch.failures
    assert row == 0 and "used with its background" in reason


def read_run(out_dir: Path) -> tuple[dict[str, list[dict]], dict[str, np.ndarray]]:
    events: dict[str, list[dict]] = {}
    for event in lct.read_events(out_dir):
        events.setdefault(event["event"], []).append(event)
    with np.load(out_dir / "prototypes.npz", allow_pickle=False) as file:
        return events, {name: file[name] for name in file.files}


def read_predictions(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_mix_runs_on_half_the_masks_and_reports_both_views(
    tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    root = make_masked_dataset(tmp_path / "data", 12)
    for index, path in enumerate(sorted(root.rglob("*_mask.png"))):
        if index % 2:
            path.unlink()
    assert call_main("--data_root", root, "--out_dir", tmp_path / "run", "--crop_mode", "mix", *TINY_RUN) == 0
    capsys.readouterr()
    events, gallery = read_run(tmp_path / "run")
    num_images = events["test_end"][0]["images"]
    num_views = len(read_predictions(tmp_path / "run/predictions.csv"))
    log = (tmp_path / "run/train.log").read_text()
    assert num_views > num_images and f"on {num_views} views of {num_images} test images" in log
    report = json.loads((tmp_path / "run/data_report.json").read_text())
    assert report["masks"]["usable"] == 18 and {row["masks"] for row in report["classes"].values()} == {6}
    splits = json.loads((tmp_path / "run/splits.json").read_text())
    train = [path for paths in splits["train"].values() for path in paths]
    masked = [path for path in train if int(Path(path).stem) % 2 == 0]
    views = gallery["stack_views"]
    assert sorted(gallery["stack_paths"][views == 0]) == sorted(train)
    assert sorted(gallery["stack_paths"][views == 1]) == sorted(masked)
    assert set(events["epoch_end"][0]["val_by_view"]) == {"bbox", "mask"}
    test = [path for paths in splits["test"].values() for path in paths]
    assert events["test_views"][0]["images"] == sum(int(Path(path).stem) % 2 == 0 for path in test)
    assert events["test_end"][0]["images"] == len(test)
    rows = read_predictions(tmp_path / "run/predictions.csv")
    pairs = read_predictions(tmp_path / "run/predictions_by_view.csv")
    with_mask = {path for path in test if int(Path(path).stem) % 2 == 0}
    both = sorted((path, view) for path in with_mask for view in ("bbox", "mask"))
    assert sorted((row["path"], row["view"]) for row in pairs) == both
    assert sorted((row["path"], row["view"]) for row in rows) == sorted({*both, *((path, "bbox") for path in test)})
    answers = {(row["path"], row["view"]): row["answer"] for row in rows}
    assert all(answers[row["path"], row["view"]] == row["answer"] for row in pairs)
    for row in rows + pairs:
        assert (root / row["mask"]).is_file() if row["path"] in with_mask else row["mask"] == ""
        assert Path(row["mask"]).stem in ("", f"{Path(row['path']).stem}_mask")
    saved = np.load(tmp_path / "run/embeddings.npz", allow_pickle=False)
    assert {Path(path).stem for path in saved["masks"]} == {"", *(f"{number:02d}_mask" for number in range(0, 12, 2))}
    disagree = sum(answers[path, "bbox"] != answers[path, "mask"] for path in with_mask)
    assert events["test_views"][0]["disagree"] == disagree
    meta = json.loads(str(gallery["meta"]))
    assert meta["crop_mode"] == "mix" and meta["mask_fill"] == {"kind": "gray", "colour": [114] * 3}
    epoch = events["epoch_end"][0]
    assert epoch["val"]["acc"] is not None and {"acc", "loss", "proto_acc"} <= set(epoch["val_by_view"]["mask"])
    path = tmp_path / "run/predictions_by_view.csv"
    path.write_bytes(path.read_bytes()[:-200])
    for status in ("made anew", "is finished"):
        assert call_main("--data_root", root, "--out_dir", tmp_path / "run", "--crop_mode", "mix", *TINY_RUN) == 0
        assert status in capsys.readouterr().out
    assert read_predictions(path) == pairs


def test_answers_by_view_go_with_the_masks(tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture) -> None:
    argv = ("--data_root", make_masked_dataset(tmp_path / "data", 5), "--out_dir", tmp_path / "run", *TINY_RUN)
    assert call_main(*argv) == 0 and (tmp_path / "run/predictions_by_view.csv").is_file()
    for path in (tmp_path / "data").glob("*/masks"):
        shutil.rmtree(path)
    assert call_main(*argv, "--epochs", 2) == 0
    assert not (tmp_path / "run/predictions_by_view.csv").exists(), "they are of the weights of an earlier end"
    assert call_main(*argv, "--epochs", 2) == 0 and "is finished" in capsys.readouterr().out


def test_masks_that_changed_since_the_run_was_started_are_named_when_it_is_continued(tmp_path: Path) -> None:
    root = make_masked_dataset(tmp_path / "data", 4)
    first = scan(root).records
    lct.write_splits(tmp_path / "splits.json", first, 42)
    assert lct.reuse_splits(tmp_path / "splits.json", scan(root).records)[1] == []
    for folder, name in (("cropped", "new"), ("masks", "new_mask")):  # out of the run, and so is its mask
        shutil.copy(root / f"bolt/{folder}/{name.replace('new', '00')}.png", root / f"bolt/{folder}/{name}.png")
    (note,) = lct.reuse_splits(tmp_path / "splits.json", scan(root).records)[1]
    assert "1 image new since" in note
    draw_object(0, 99)[1].save(root / "bolt/masks/00_mask.png")
    again, notes = lct.reuse_splits(tmp_path / "splits.json", scan(root).records)
    assert notes == [note, "the masks or the masked images are not those that this run was started with"]
    assert again.has_mask.all() and [again.masks[i] for i in range(12)] == [first.masks[i] for i in range(12)]


def test_in_mask_mode_training_prototypes_and_test_see_no_background(tmp_path: Path, call_main: Callable) -> None:
    """Two data sets that differ in their backgrounds only give the same run, bit for bit."""
    runs = []
    for index, colour in enumerate([(250, 250, 250), (10, 90, 160)]):
        root = make_masked_dataset(tmp_path / f"data{index}", 8)
        for kind, name in enumerate(("bolt", "nut", "washer")):
            for number in range(8):  # noise that differs keeps near-duplicates out; the masks stay as they are
                image = np.asarray(draw_object(kind, number)[0]).copy()
                mask = np.asarray(Image.open(root / name / "masks" / f"{number:02d}_mask.png")) > 127
                image[~mask] = (image[~mask] * 0.3 + np.array(colour) * 0.7).astype(np.uint8)
                Image.fromarray(image).save(root / name / "cropped" / f"{number:02d}.png")
        flags = ("--crop_mode", "mask", "--near_dup_bits", "0", *TINY_RUN)
        assert call_main("--data_root", root, "--out_dir", tmp_path / f"run{index}", *flags) == 0
        runs.append(read_run(tmp_path / f"run{index}"))
    (events, gallery), (other_events, other) = runs
    for name in ("stacks", "centroids", "stack_paths", "thresholds"):
        assert np.array_equal(gallery[name], other[name])
    assert gallery["stack_views"].tolist() == [1] * len(gallery["stack_views"])
    figures = [
        [run[name][0][key] for name, key in (("test_end", "prototypes"), ("epoch_end", "val"))]
        for run in (events, other_events)
    ]
    assert figures[0] == figures[1]
    assert events["test_views"][0]["mask"]["acc"] == pytest.approx(events["test_end"][0]["prototypes"]["acc"])


def test_masks_beat_bbox_where_the_background_changes_between_train_and_test(
    tmp_path: Path, call_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn tools on benches that tell the class in training and validation, and mislead in the test."""
    accuracy = {}
    drawn = tmp_path / "drawn"
    classes = ("hammer", "oil_can", "pliers", "file")
    monkeypatch.setattr(drawn_scenes, "CLASS_NAMES", classes)
    drawn_scenes.draw_dataset(drawn, 24, seed=3)
    root = paste_on_misleading_benches(drawn, tmp_path / "data", classes)
    flags = "--group_regex ^(shot\\d+)_ --near_dup_bits 0 --model_id test_resnet --no-pretrained --no-freeze_backbone --workers 0"
    recipe = (
        "--img_size 48 --epochs 8 --batch 16 --lr 0.01 --arc_lr 0.01 --arc_margin 0.1 --save_every 0 --test_split 0.3"
    )
    for mode in ("bbox", "mask"):
        out_dir = tmp_path / mode
        args = ("--data_root", root, "--out_dir", out_dir, "--crop_mode", mode, *flags.split(), *recipe.split())
        assert call_main(*args) == 0
        accuracy[mode] = read_run(out_dir)[0]["test_end"][0]["prototypes"]["acc"]
    print(accuracy)
    assert accuracy["mask"] > accuracy["bbox"] + 0.3


def paste_on_misleading_benches(drawn: Path, root: Path, classes: tuple[str, ...]) -> Path:
    """Copy classes of the drawn tools onto plain benches: one colour a class, the next class's colour for test images."""
    colours = [(180, 60, 60), (60, 170, 70), (70, 80, 190), (190, 180, 60)]
    for name in classes:
        shutil.copytree(drawn / name, root / name)
        for path in (root / name / "cropped").iterdir():
            if not (root / name / "masks" / f"{path.stem}_mask.png").exists():
                path.unlink()
    config = lct.Config(
        data_root=root, out_dir=root.parent / "none", group_regex=r"^(shot\d+)_", near_dup_bits=0, test_split=0.3
    )
    records = lct.scan_dataset(config).records  # groups are shots, so that other backgrounds leave the split as it is
    for row in range(len(records.paths)):
        path, label = root / records.paths[row], int(records.labels[row])
        mask = np.asarray(Image.open(path.parents[1] / "masks" / f"{path.stem}_mask.png")) > 127
        image = lct.load_image(path).copy()
        is_test = records.splits[row] == lct.SPLIT_NAMES.index("test")
        colour = np.array(colours[(label + is_test) % len(colours)])
        noise = np.random.default_rng(row).integers(-25, 26, image.shape)
        image[~mask] = np.clip(colour + noise, 0, 255).astype(np.uint8)[~mask]
        Image.fromarray(image).save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()
    return root
