"""tools/demo.py: same bytes every time, exact masks, odd files readable, broken files not; and the whole demo."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import demo
import drawn_scenes
import drawn_tools
import numpy as np
import pytest
from conftest import REPO, run_cli, run_main
from PIL import Image, ImageFilter, ImageOps

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
    drawn_scenes.draw_dataset(folder, IMAGES_PER_CLASS, seed=3)
    return folder


def test_same_arguments_give_the_same_bytes_and_another_seed_does_not(root: Path, tmp_path: Path) -> None:
    drawn_scenes.draw_dataset(tmp_path / "again", IMAGES_PER_CLASS, seed=3)
    assert hash_tree(tmp_path / "again") == hash_tree(root)
    drawn_scenes.draw_dataset(tmp_path / "other", IMAGES_PER_CLASS, seed=4)
    mine, other = hash_tree(root), hash_tree(tmp_path / "other")
    assert sum(mine[name] == other.get(name) for name in mine if "cropped" in name) <= 3  # .DS_Store, empty, text


def test_every_class_has_as_many_good_images_as_asked_for(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == list(demo.CLASS_NAMES)
    for class_name in demo.CLASS_NAMES:
        readable = [path for path in list_crops(root / class_name) if is_readable(path)]
        assert len(readable) == IMAGES_PER_CLASS + (class_name == "pliers"), class_name


def test_masks_equal_cutout_alpha_and_fit_the_upright_crop(root: Path) -> None:
    for class_name in demo.CLASS_NAMES:
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
        Image.open(path).mode for name in demo.CLASS_NAMES for path in list_crops(root / name) if is_readable(path)
    }
    assert {"RGB", "L", "CMYK", "P"} <= modes and any(mode.startswith("I") for mode in modes)
    assert any(path.suffix == ".JPG" for path in list_crops(root / "oil_can"))
    assert (root / demo.CLASS_NAMES[0] / "cropped" / ".DS_Store").is_file()
    contents = [path.read_bytes() for path in list_crops(root / "pliers")]
    assert len(contents) - len(set(contents)) == 1


def test_shot_numbers_are_unique_over_classes_and_some_shots_have_frames(root: Path) -> None:
    shots = [(path.name.split("_")[0], name) for name in demo.CLASS_NAMES for path in list_crops(root / name)]
    assert len({shot for shot, _ in shots}) == len(set(shots)) < len(shots)


@pytest.mark.parametrize("class_name", demo.CLASS_NAMES)
def test_tools_differ_by_make_and_fill_their_frame(class_name: str) -> None:
    make, stock = drawn_tools.TOOLS[class_name]
    shapes = set()
    for seed in range(20):
        parts = make(np.random.default_rng(seed), stock)
        colours, mask = drawn_scenes._render(parts, np.eye(2), light=1.0, longest_px=120)
        shapes.add(mask.tobytes())
        assert colours.shape == (*mask.shape, 3) and abs(max(mask.shape) - 120) <= 1
        assert all(side.any() for side in (mask[:2], mask[-2:], mask[:, :2], mask[:, -2:])), "not tight"
        assert 0.05 < (mask > 0).mean() < 0.9
    assert len(shapes) == 20


def test_a_tool_lies_where_its_mask_says() -> None:
    make, stock = drawn_tools.TOOLS["screwdriver"]
    dark = {"bench": Image.new("RGB", (drawn_scenes._BENCH_PX,) * 2), "recess": None, "shadow": (1.0, 1.0, 0.0)}
    for seed in range(1, 5):
        rng = np.random.default_rng(seed)
        scene = dataclasses.replace(drawn_scenes._make_scene(rng), **dark)
        image, mask = drawn_scenes._draw_frame(rng, make(rng, stock), scene)
        assert ((image.max(axis=2) > 40) != (mask > 0)).sum() < 0.1 * (mask > 0).sum(), seed
        pale = dataclasses.replace(scene, bench=Image.new("RGB", scene.bench.size, "white"))
        image, mask = drawn_scenes._draw_frame(rng, make(rng, stock), pale)
        assert image[mask == 0].min() > 40, "the bench is as large as the crop"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "workbench"
    drawn_scenes.draw_workbench(folder, seed=3)
    return folder


def read_workbench(bench: Path) -> tuple[list[dict], list[np.ndarray]]:
    """Return the detections and their masks, bool (H, W), as pycocotools reads them."""
    from pycocotools import mask as coco

    objects = json.loads((bench / "detections.json").read_text())["annotations"]
    height, width = objects[0]["segmentation"]["size"]
    codes = [coco.frPyObjects(item["segmentation"], height, width) for item in objects]
    return objects, [coco.decode(code).astype(bool) for code in codes]


def test_the_workbench_is_drawn_the_same_way_every_time(bench: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        drawn_scenes.draw_workbench(tmp_path / str(seed), seed)
    assert hash_tree(tmp_path / "3") == hash_tree(bench)
    assert not set(hash_tree(tmp_path / "4").values()) & set(hash_tree(bench).values())


def test_boxes_on_the_workbench_are_those_of_the_masks_and_apart(bench: Path) -> None:
    objects, masks = read_workbench(bench)
    with Image.open(bench / "workbench.jpg") as photo:
        assert masks[0].shape == photo.size[::-1]
    boxed = np.zeros(masks[0].shape, int)
    for item, mask in zip(objects, masks, strict=True):
        x, y, w, h = item["bbox"]
        window = mask[y : y + h, x : x + w]
        assert window.sum() == mask.sum() == item["area"] > 500
        assert window[0].any() and window[-1].any() and window[:, 0].any() and window[:, -1].any()
        assert 150 <= max(w, h) <= 250
        boxed[y : y + h, x : x + w] += 1
    assert boxed.max() == 1


def test_what_is_no_wood_on_the_workbench_lies_under_a_mask(bench: Path) -> None:
    """Wood is redder than green and blue in any light of the demo; a mask in a wrong place leaves paint outside."""
    photo = np.asarray(Image.open(bench / "workbench.jpg").convert("RGB"), dtype=int)
    painted = photo[..., 1:].max(axis=2) > photo[..., 0] + 25
    covered = np.any(read_workbench(bench)[1], axis=0)
    near = np.asarray(Image.fromarray(covered).convert("L").filter(ImageFilter.MaxFilter(7))) > 0  # JPEG blurs colours
    assert painted.sum() > 3000 and (painted & ~near).sum() < 0.005 * painted.sum()


def test_the_truth_names_nine_tools_and_a_stranger(bench: Path) -> None:
    truth = json.loads((bench / "truth.json").read_text())
    assert list(truth) == [str(item["id"]) for item in read_workbench(bench)[0]]
    tools = [name for name in truth.values() if name in demo.CLASS_NAMES]
    assert len(tools) == len(set(tools)) == 9 and len(truth) == 10
    assert "hammer" not in (bench / "detections.json").read_text()


def test_drawn_prelabels_show_class_and_unknown() -> None:
    image = Image.new("RGB", (400, 300), "white")
    objects = [((50, 60, 100, 80), 0, "pliers 0.97"), ((250, 2, 140, 200), -1, "unknown")]
    drawn = demo.draw_prelabels(image, objects)
    pixels = np.asarray(drawn)
    ink = pixels[100, 49]
    assert drawn.size == (400, 300) and np.asarray(image).min() == 255  # the original is untouched
    assert ink.min() < 40 < 80 < ink.max(), "a colour on which white can be read"
    assert (pixels[100, [49, 150]] == ink).all() and (pixels[[59, 140], 100] == ink).all()  # around the box
    assert (pixels[60:140, 50:150] == 255).all() and (pixels[100, [249, 390]] == 0).all()
    assert (pixels[30:59, 50:120] == ink).all(axis=2).mean() > 0.3  # the words on a ground of the class's colour
    assert (pixels[202:230, 250:300] == 0).all(axis=2).any()  # below the box: above it there is no room


def test_words_on_drawn_prelabels_do_not_hide_each_other_or_other_objects() -> None:
    boxes = [(20, 60, 30, 100), (70, 50, 100, 100), (180, 60, 100, 60), (180, 150, 90, 60), (360, 40, 40, 90)]
    objects = [(box, 0, "combination_wrench") for box in boxes]
    drawn = np.asarray(demo.draw_prelabels(Image.new("RGB", (400, 300), "white"), objects))
    assert all((drawn[y : y + h, x : x + w] == 255).all() for x, y, w, h in boxes)


QUICK = ("demo", "--images_per_class", IMAGES_PER_CLASS, "--epochs", "1", "--workers", "0", "--gpus", "0")


def test_the_whole_demo_ends_with_labels_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "demo" / ".workbench.unfinished").mkdir(parents=True)  # of a start that was interrupted
    done = run_cli(*QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    labels = tmp_path / "demo" / "prelabels"
    folders = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert folders == ["data", "prelabels", "run", "unknown", "workbench"]
    options = json.loads((tmp_path / "demo" / "run" / "config.json").read_text())["options"]
    assert (options["epochs"], options["batch"], options["group_regex"]) == (1, 32, r"^(shot\d+)_"), (
        "what is typed wins"
    )
    assert json.loads((labels / "problems.json").read_text()) == []
    with open(labels / "objects.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    truth = json.loads((tmp_path / "demo" / "workbench" / "truth.json").read_text())
    assert sorted(row["detection_id"] for row in rows) == sorted(truth)
    right = sum(truth[row["detection_id"]] == row["class"] for row in rows)
    told = re.search(r"^(\d) of 9 tools right(.*), the mug is `(\w+)`$", done.stdout, re.MULTILINE)
    mug = next(row["class"] for row in rows if truth[row["detection_id"]] == "mug")
    assert (int(told[1]), told[2].count(" is `"), told[3]) == (right, 9 - right, mug)
    picture = (labels / "workbench.jpg").read_bytes()
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (1200, 900)

    for name in ("workbench.jpg", "objects.csv"):  # as if it had been killed while it wrote the answers
        (labels / name).unlink()
    os.truncate(labels / ".progress.jsonl", (labels / ".progress.jsonl").stat().st_size - 9)
    monkeypatch.chdir(tmp_path)
    # The commands of the first start were processes of their own; now they run in this one.
    monkeypatch.setattr(demo.Starter, "run", lambda _, *words: run_main(*words))
    assert run_main(*QUICK[1:], main=demo.main) is None
    assert "finished" in capsys.readouterr().out
    assert (labels / "workbench.jpg").read_bytes() == picture and (labels / "objects.csv").exists()


@pytest.fixture
def drawn(root: Path, bench: Path, tmp_path: Path) -> Path:
    """A folder in which the demo finds everything drawn."""
    shutil.copytree(root, tmp_path / "demo" / "data")
    shutil.copytree(bench, tmp_path / "demo" / "workbench")
    drawn_scenes.draw_unknown_objects(tmp_path / "demo" / "unknown", 2, seed=3)
    return tmp_path


def test_what_training_refuses_ends_the_demo_with_its_message_and_code(drawn: Path) -> None:
    done = run_cli(*QUICK, "--epocs", "2", cwd=drawn)
    assert done.returncode == 2 and "--epocs" in done.stderr and "--epochs" in done.stderr
    assert "Traceback" not in done.stderr and not (drawn / "demo" / "prelabels").exists()


def test_a_place_that_cannot_be_written_ends_the_demo_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "demo").write_bytes(b"a file")
    for folder in ("demo/data", "a" * 256):
        done = run_cli(*QUICK, "--data_root", folder, cwd=tmp_path)
        assert done.returncode == 2 and f"{folder}: cannot be written" in done.stderr
        assert "Traceback" not in done.stderr


def test_two_demos_at_once_draw_once(tmp_path: Path) -> None:
    drawn = []

    def draw(folder: Path) -> None:
        folder.mkdir()
        time.sleep(0.2)
        (folder / "crop.jpg").write_bytes(b"crop")
        drawn.append(folder)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: demo.draw_once(tmp_path / "data", "tools", draw), range(2)))
    assert len(drawn) == 1 and (tmp_path / "data" / "crop.jpg").exists()


@pytest.mark.parametrize("until", ["drawing", "epoch   1"])
def test_a_signal_reaches_what_is_running(tmp_path: Path, until: str, request: pytest.FixtureRequest) -> None:
    """A scheduler sends it to the demo alone: training saves and ends as if it had been asked itself."""
    if until != "drawing":
        request.getfixturevalue("drawn")
    words = [sys.executable, REPO / "tools" / "demo.py", "--images_per_class", "6", "--epochs", "90", "--gpus", "0"]
    with open(tmp_path / "said.txt", "w") as said:
        process = subprocess.Popen(list(map(str, words)), cwd=tmp_path, stdout=said, stderr=said)
    deadline = time.monotonic() + 400
    while until not in (tmp_path / "said.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    said = (tmp_path / "said.txt").read_text()
    assert "interrupted (SIGTERM)" in said and "Traceback" not in said
    assert (tmp_path / "demo" / "run" / "checkpoint_interrupt.pth").exists() == (until != "drawing")


@pytest.mark.parametrize("moment", ["a library swallows the exception", "a command is being started"])
def test_a_signal_ends_the_demo_at_any_moment(moment: str, drawn: Path) -> None:
    """A drawing library once swallowed the exception of the handler, and the demo went on to train to its end."""
    code = f"""
import contextlib, os, signal, subprocess, sys
sys.path.insert(0, {str(REPO / "tools")!r})
import demo
if {moment!r} == "a command is being started":
    start = subprocess.Popen
    def start_and_signal(command):
        process = start([sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60); print('left running')"])
        os.kill(os.getpid(), signal.SIGTERM)
        return process
    subprocess.Popen = start_and_signal
else:
    draw = demo.draw_workbench
    def draw_and_swallow(*arguments):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        draw(*arguments)
    demo.draw_workbench = draw_and_swallow
    os.rename("demo/workbench", "demo/old")
demo.main({[str(word) for word in QUICK[1:]]!r})
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=drawn, capture_output=True, text=True, timeout=100)
    assert done.returncode == 143 and "went on" not in done.stdout and "val loss" not in done.stdout
    assert "Traceback" not in done.stderr and "left running" not in done.stdout
    assert ("interrupted (SIGTERM)" in done.stderr) == (moment == "a library swallows the exception")
