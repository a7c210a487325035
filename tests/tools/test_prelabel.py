"""tools/prelabel.py: what goes in comes out once, in files that the real tools read; interrupted, it goes on."""

from __future__ import annotations

import csv
import errno
import html
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import geometry
import label_writers
import numpy as np
import photos
import prelabel
import pytest
import torch
from conftest import FITS, REPO, TINY_RUN, draw_image, make_dataset, probe, run_main
from killing import Nursery, kill
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import lct_dino3 as lct

CLASSES = ("hammer", 'гаечный <b>ключ "5"', "pliers & co")
# The precision is low, so that the labels hold classes as well as `unknown`.
TRAINED = (
    *TINY_RUN,
    *"--no-freeze_backbone --batch 64 --epochs 12 --lr 0.01 --save_every 0 --target_precision 0.5 --unknown_share 0".split(),
)
FLAGS = ("--gpus", "0", "--workers", "0")
SIZE = (300, 240)


def train(folder: Path, data: Path, *flags: object) -> Path:
    """Train a real run."""
    assert run_main("--data_root", data, "--out_dir", folder, *TRAINED, *flags) == 0
    return folder


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("prelabel") / "data", dict.fromkeys(CLASSES, 20))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, drawn_data: Path) -> Path:
    """A run of three classes, read only."""
    return train(tmp_path_factory.mktemp("prelabel") / "run", drawn_data)


class Scene:
    """Photos of a bench: drawn objects of known classes in known places; kind 3 and up are of no class."""

    def __init__(self, folder: Path, names: list[str], per_image: int = 4) -> None:
        self.folder, self.kinds, self.boxes = folder, {}, {}
        rng = np.random.default_rng(5)
        for number, name in enumerate(names):
            photo = Image.fromarray(rng.integers(90, 160, (6, 8, 3), dtype=np.uint8)).resize(SIZE)
            self.kinds[name], self.boxes[name] = [], []
            for index in range(per_image):
                kind = int(rng.integers(0, 5))
                x = int(rng.integers(0, 60)) + index % 2 * 150
                y = int(rng.integers(0, 50)) + index // 2 % 2 * 110
                photo.paste(draw_image(kind, 77, number, index, side=64), (x, y))
                self.kinds[name].append(kind)
                self.boxes[name].append([x + 0.25, float(y), 64.0, 63.25])
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            photo.save(folder / name, quality=95)

    def coco(self, **extra: object) -> dict:
        """Return the scene as a COCO data set of a detector with one class of its own, number 41."""
        images, annotations = [], []
        for number, (name, boxes) in enumerate(self.boxes.items()):
            images.append({"id": 1000 + number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
            annotations += [{"image_id": 1000 + number, "category_id": 41, "bbox": box, "score": 0.5} for box in boxes]
        for number, annotation in enumerate(annotations, 1):
            annotation["id"] = number
        return {"images": images, "annotations": annotations, "categories": [{"id": 41, "name": "tool"}], **extra}

    def write_coco(self, path: Path, **extra: object) -> Path:
        path.write_text(json.dumps(self.coco(**extra)), encoding="utf-8")
        return path


NAMES = ["plain.png", "под папка/снимок 1.jpg", "a b/c d.JPEG", "empty.png"]


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Four images, the last without objects; read only."""
    made = Scene(tmp_path_factory.mktemp("scene") / "images", NAMES)
    made.boxes["empty.png"], made.kinds["empty.png"] = [], []
    made.boxes["plain.png"][0] = [-20.5, -3.0, 90.0, 70.0]  # over the edge
    return made


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, scene: Scene) -> Path:
    """The scene's pre-labels in every format; read only."""
    folder = tmp_path_factory.mktemp("labelled")
    source = scene.write_coco(folder / "detections.json")
    assert run_main(*command(finished_run, scene.folder, folder / "out", source)) == 0
    return folder / "out"


def command(run: Path, images: Path, out: Path, detections: Path | None = None, *flags: object) -> list[object]:
    words = ["prelabel", "--run", run, "--images", images, "--out", out, *FLAGS]
    return [*words, *(["--detections", detections] if detections else []), *flags]


def read_rows(out: Path) -> list[dict[str, str]]:
    with open(out / "objects.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def list_pictures(out: Path) -> list[tuple[str, str]]:
    """Return the pictures of the review page, as data URIs, and their paths: the object, its reference, and the runner-up's."""
    page = (out / "review.html").read_text(encoding="utf-8").replace("<wbr>", "")
    figures = re.findall('<figure>.*?<img src="(.*?)".*?<bdi class="path">(.*?)</bdi>', page, re.DOTALL)
    return [(picture, html.unescape(path)) for picture, path in figures]


def box_of(row: dict[str, str]) -> list[float]:
    return [float(row[key]) for key in ("x", "y", "width", "height")]


def clip(box: list[float]) -> list[float]:
    left, top = max(0, box[0]), max(0, box[1])
    return [left, top, min(SIZE[0], box[0] + box[2]) - left, min(SIZE[1], box[1] + box[3]) - top]


def expected(scene: Scene, strip_suffix: bool = False) -> list[tuple[str, list[float]]]:
    """Return (image, clipped box) of every object of the scene."""
    return [
        (name.rpartition(".")[0] if strip_suffix else name, clip(box))
        for name, boxes in scene.boxes.items()
        for box in boxes
    ]


def assert_same_objects(found: list[tuple[str, list[float]]], wanted: list[tuple[str, list[float]]]) -> None:
    """Every object once, boxes equal within half a pixel."""
    assert len(found) == len(wanted)
    for (image, box), (wanted_image, wanted_box) in zip(sorted(found), sorted(wanted), strict=True):
        assert image == wanted_image
        assert np.abs(np.subtract(box, wanted_box)).max() < 0.5


def read_back(reader: str, path: Path) -> list[dict]:
    """Return what the real tool reads: datumaro or label_studio_sdk, here or in their own environment."""
    python = os.environ.get("LABEL_READERS", sys.executable)
    if python == sys.executable and not all(map(importlib.util.find_spec, ("datumaro", "label_studio_sdk"))):
        pytest.skip("tests/readers.txt is not installed, and LABEL_READERS names no interpreter that has it")
    script = str(REPO / "tests" / "read_labels.py")
    done = subprocess.run([python, script, reader, str(path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- the files, read by their own tools


def test_coco_is_read_by_pycocotools(labelled: Path, scene: Scene) -> None:
    truth = COCO(str(labelled / "coco" / "annotations" / "instances_default.json"))
    names = [item["name"] for item in truth.loadCats(truth.getCatIds())]
    assert names == [*sorted(CLASSES), "unknown"]
    assert {image["file_name"] for image in truth.loadImgs(truth.getImgIds())} == set(NAMES)
    assert truth.getImgIds() == [1000, 1001, 1002, 1003]  # those of the detector's file
    files = {image["id"]: image["file_name"] for image in truth.loadImgs(truth.getImgIds())}
    found = truth.loadAnns(truth.getAnnIds())
    assert_same_objects([(files[item["image_id"]], item["bbox"]) for item in found], expected(scene))
    assert sorted(item["attributes"]["detection_id"] for item in found) == list(range(1, 13))
    assert {item["attributes"]["detection_category"] for item in found} == {41}
    results = truth.loadRes(str(labelled / "coco" / "results.json"))
    scored = results.loadAnns(results.getAnnIds())
    assert [(i["image_id"], i["category_id"], i["bbox"]) for i in scored] == [
        (i["image_id"], i["category_id"], i["bbox"]) for i in found
    ]
    assert all(0 <= item["score"] <= 1 for item in scored)


@pytest.mark.parametrize(("reader", "folder"), [("yolo", "yolo"), ("cvat", "cvat"), ("coco_instances", "coco")])
def test_datumaro_reads_every_object_once(labelled: Path, scene: Scene, reader: str, folder: str) -> None:
    found = read_back(reader, labelled / folder)
    wanted = expected(scene, strip_suffix=True)
    if reader == "yolo":  # whose folders are flat
        found = [{**item, "image": unquote(item["image"])} for item in found]
    if reader == "coco_instances":  # it looks at the file of each image, and finds them through our link
        assert (labelled / "coco" / "images" / "plain.png").is_file()
    assert_same_objects([(item["image"], item["box"]) for item in found], wanted)
    labels = Counter(row["class"] for row in read_rows(labelled))
    assert Counter(item["label"] for item in found) == labels
    if reader == "cvat":
        assert {item["attributes"]["best_class"] for item in found} <= set(CLASSES)


def test_label_studio_accepts_every_task(labelled: Path, scene: Scene) -> None:
    found = read_back("labelstudio", labelled / "labelstudio")
    below = f"{scene.folder.name}/"  # a local storage is the parent of --images
    assert all(item["image"].startswith(below) for item in found)
    assert_same_objects([(item["image"].removeprefix(below), item["box"]) for item in found], expected(scene))
    assert Counter(item["label"] for item in found) == Counter(row["class"] for row in read_rows(labelled))
    tasks = json.loads((labelled / "labelstudio" / "tasks.json").read_text(encoding="utf-8"))
    assert len(tasks) == len(NAMES)  # the empty one too


def test_the_summary_counts_the_answers_by_class(labelled: Path) -> None:
    text = (labelled / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_float=str)  # 3.0 is no number of objects
    answers = Counter(row["class"] for row in read_rows(labelled))
    assert summary["classes"] == {name: answers[name] for name in (*CLASSES, "unknown")}
    assert (summary["images"], summary["objects"]) == (len(NAMES), answers.total())
    assert summary["unknown"] == answers["unknown"]


def test_a_task_of_label_studio_is_sorted_by_its_least_certain_object(labelled: Path) -> None:
    for task in json.loads((labelled / "labelstudio" / "tasks.json").read_text(encoding="utf-8")):
        (prediction,) = task["predictions"]
        assert prediction.get("score") == min((region["score"] for region in prediction["result"]), default=None)


def test_yolo_lists_its_confidences_apart(labelled: Path, scene: Scene) -> None:
    by_image: dict[str, list[dict[str, str]]] = {}
    for row in read_rows(labelled):
        by_image.setdefault(row["image"], []).append(row)
    for name in NAMES:
        stem = name.rpartition(".")[0]
        flat = stem.replace("/", "%2F")
        labels = (labelled / "yolo" / "labels" / f"{flat}.txt").read_text().splitlines()
        confidences = (labelled / "yolo" / "confidences" / f"{flat}.txt").read_text().splitlines()
        assert (labelled / "yolo" / "images" / (flat + name.removeprefix(stem))).samefile(scene.folder / name)
        assert [float(c) for c in confidences] == [float(row["probability"]) for row in by_image.get(name, [])]
        assert all(len(line.split()) == 5 for line in labels) and len(labels) == len(confidences)
    import yaml

    settings = yaml.safe_load((labelled / "yolo" / "data.yaml").read_text(encoding="utf-8"))
    assert list(settings["names"].values()) == [*sorted(CLASSES), "unknown"]


def test_ultralytics_loads_every_box(
    labelled: Path, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    utils = pytest.importorskip("ultralytics.data.utils")
    from ultralytics.data.dataset import YOLODataset

    shutil.copytree(labelled / "yolo", tmp_path / "yolo", symlinks=True)  # it writes a cache there
    settings = utils.check_det_dataset(str(tmp_path / "yolo" / "data.yaml"), autodownload=False)
    found = []
    for item in YOLODataset(img_path=settings["val"], data=settings, task="detect", imgsz=64).labels:
        height, width = item["shape"]
        for x, y, w, h in item["bboxes"].tolist():
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            found.append((unquote(Path(item["im_file"]).name), box))
    assert_same_objects(found, expected(scene))


def test_fiftyone_imports_every_box(
    labelled: Path, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path))
    importer = pytest.importorskip("fiftyone.utils.yolo").YOLOv5DatasetImporter(
        dataset_dir=str(labelled / "yolo"), split="val"
    )
    importer.setup()
    found = []
    for path, _, detections in importer:
        for item in detections.detections if detections else ():
            found.append((unquote(Path(path).name), (np.array(item.bounding_box) * np.tile(SIZE, 2)).tolist()))
    assert_same_objects(found, expected(scene))


# --- the answers


def test_an_answer_is_what_the_formulas_say(labelled: Path, finished_run: Path, scene: Scene) -> None:
    content = np.load(finished_run / "prototypes.npz", allow_pickle=False)
    run = lct.load_run(finished_run, lct.make_runtime(0, "auto"))
    rows = read_rows(labelled)
    for row in rows:
        x, y, w, h = box_of(row)
        photo = lct.load_image(scene.folder / row["image"])
        crop = photo[round(y) : round(y + h), round(x) : round(x + w)]
        square = torch.from_numpy(run.transform()(crop, None, 0)).permute(2, 0, 1)[None]
        query = run.embed(square, 1)[0]
        cosine, labels = content["stacks"] @ query, content["stack_labels"]
        if content["matcher"] == "centroid":
            scores = content["centroids"] @ query
        else:
            scores = np.array([np.sort(cosine[labels == c])[-k:].mean() for c, k in enumerate(content["knn_counts"])])
        first, second = np.argsort(-scores)[:2]
        slope, intercept = content["log_odds"][first]
        name = content["id2cls"][first] if scores[first] >= content["thresholds"][first] else "unknown"
        assert row["class"] == name and row["best_class"] == content["id2cls"][first]
        assert row["runner_up"] == content["id2cls"][second]
        assert float(row["cosine"]) == pytest.approx(scores[first], abs=1e-4)
        assert float(row["margin"]) == pytest.approx(scores[first] - scores[second], abs=1e-4)
        chance = 1 / (1 + np.exp(-(slope * scores[first] + intercept)))
        assert float(row["probability"]) == pytest.approx(chance, abs=2e-3)
        nearest = np.where(labels == first, cosine, -2).argmax()
        assert row["nearest_reference"] == content["stack_paths"][nearest]


def test_objects_of_the_classes_are_recognised(labelled: Path, scene: Scene) -> None:
    kinds = {
        (name, round(clip(box)[0]), round(clip(box)[1])): kind
        for name in NAMES
        for box, kind in zip(scene.boxes[name], scene.kinds[name], strict=True)
    }
    right = []
    for row in read_rows(labelled):
        kind = kinds[row["image"], round(float(row["x"])), round(float(row["y"]))]
        if kind < 3:
            right.append(row["best_class"] == CLASSES[kind])
    assert len(right) >= 5 and np.mean(right) >= 0.8
    named = [row["class"] != "unknown" for row in read_rows(labelled)]
    assert any(named) and not all(named), "label files of both are read back"


def test_yolo_boxes_and_polygons_get_the_answers_of_coco(
    labelled: Path, finished_run: Path, scene: Scene, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    for name, boxes in scene.boxes.items():
        path = (tmp_path / "yolo" / name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, (x, y, w, h) in enumerate(boxes):
            if index % 2:
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                shares = np.array(corners) / np.tile(SIZE, 4)
            else:
                shares = np.array([x + w / 2, y + h / 2, w, h]) / np.tile(SIZE, 2)
            confidence = " 0.75" * (index > 1)
            lines.append("3 " + " ".join(f"{share:.6f}" for share in shares) + confidence)
        if lines:
            path.write_text("\n".join(lines) + "\n")
    (tmp_path / "yolo" / "classes.txt").write_text("a\nb\nc\nd\n")
    assert call_main(*command(finished_run, scene.folder, tmp_path / "out", tmp_path / "yolo", "--formats", "csv")) == 0
    rows, wanted = (
        {(r["image"], round(float(r["x"]))): r for r in read_rows(out)} for out in (tmp_path / "out", labelled)
    )
    assert rows.keys() == wanted.keys()
    for key, row in rows.items():
        assert row["class"] == wanted[key]["class"] and row["detection_category"] == "3"
        assert float(row["cosine"]) == pytest.approx(float(wanted[key]["cosine"]), abs=1e-5)
    assert {row["detection_score"] for row in rows.values()} == {"", "0.75"}
    assert not (tmp_path / "out" / "yolo").exists()  # only what was asked for


@pytest.mark.parametrize(
    "name",
    [
        "coco/annotations/instances_default.json",
        "yolo/labels",
        "cvat/annotations.xml",
        "labelstudio/tasks.json",
        "objects.csv",
    ],
)
def test_labels_that_were_written_are_read_and_answered_alike(
    labelled: Path, finished_run: Path, scene: Scene, tmp_path: Path, call_main: Callable[..., int], name: str
) -> None:
    out = tmp_path / "out"
    assert call_main(*command(finished_run, scene.folder, out, labelled / name, "--formats", "csv")) == 0
    # YOLO's images come in the order of the folder.
    rows, wanted = (sorted(read_rows(folder), key=lambda row: row["image"]) for folder in (out, labelled))
    assert_same_objects([(r["image"], box_of(r)) for r in rows], [(r["image"], box_of(r)) for r in wanted])
    assert [(r["image"], r["class"]) for r in rows] == [(r["image"], r["class"]) for r in wanted]
    assert json.loads((out / "problems.json").read_text(encoding="utf-8")) == []
    names = [*sorted(CLASSES), "unknown"]
    numbers = {"coco": [1, 2, 3, 4], "yolo": [0, 1, 2, 3]}.get(name[:4], names)
    given = dict(zip(names, map(str, numbers), strict=True))
    assert [row["detection_category"] for row in rows] == [given[row["class"]] for row in wanted]


def test_without_detections_each_image_is_one_object(
    finished_run: Path, drawn_data: Path, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    assert call_main(*command(finished_run, drawn_data, tmp_path / "out")) == 0
    rows = read_rows(tmp_path / "out")
    assert sorted(row["image"] for row in rows) == sorted(f"{c}/{i:04d}.png" for c in CLASSES for i in range(20))
    assert all(box_of(row) == [0, 0, 56, 56] for row in rows)
    assert np.mean([row["best_class"] == row["image"].split("/")[0] for row in rows]) > 0.9


def test_files_that_are_no_images_are_counted(
    finished_run: Path, scene: Scene, tmp_path: Path, call_main: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(scene.folder, tmp_path / "images")
    (tmp_path / "images" / "clip.gif").write_bytes(b"GIF89a")
    (tmp_path / "images" / "a b" / "notes.TXT").write_text("of a person")
    assert call_main(*command(finished_run, tmp_path / "images", tmp_path / "out")) == 0
    said = "".join(capsys.readouterr())
    assert "passed over: 2 files of other types (" in said and ".gif" in said and ".txt" in said


@pytest.mark.parametrize("run_bits", [[12], []])
def test_photos_of_12_bits_get_the_answers_of_8(
    run_bits: list[int], finished_run: Path, scene: Scene, labelled: Path, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    """Also where the run has seen none, as one that was trained on crops of them: 8 bits."""
    import cv2

    run, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(finished_run, run)
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["options"]["image_bits"] = run_bits
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in scene.boxes:
        pixels = np.rint(lct.load_image(scene.folder / name)[:, :, ::-1] * (4095 / 255)).astype(np.uint16)
        path = (images / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels)
    tree = scene.coco()
    for image in tree["images"]:
        image["file_name"] = str(Path(image["file_name"]).with_suffix(".png"))
    source = tmp_path / "detections.json"
    source.write_text(json.dumps(tree), encoding="utf-8")
    assert call_main(*command(run, images, tmp_path / "out", source)) == 0
    deep, plain = read_rows(tmp_path / "out"), read_rows(labelled)
    assert len(deep) == len(plain) > 0
    for ours, others in zip(deep, plain, strict=True):
        assert {**ours, "image": None} == {**others, "image": None}
    ours, others = ([picture for picture, _ in list_pictures(folder)] for folder in (tmp_path / "out", labelled))
    assert ours == others


def test_an_enrolled_class_is_found_and_shown(
    finished_run: Path, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    scene = Scene(tmp_path / "images", [f"{number}.png" for number in range(8)])
    run, new = tmp_path / "run", tmp_path / "new" / "hexagon"
    shutil.copytree(finished_run, run)
    new.mkdir(parents=True)
    for number in range(6):
        draw_image(3, 55, number).save(new / f"{number}.png")
    assert call_main("prototypes", "--run", run, "--add", new.parent, *FLAGS) == 0
    source = scene.write_coco(tmp_path / "coco.json")
    assert call_main(*command(run, scene.folder, tmp_path / "out", source)) == 0
    kinds = [kind for name in scene.kinds for kind in scene.kinds[name]]
    found = [row["best_class"] for row, kind in zip(read_rows(tmp_path / "out"), kinds, strict=True) if kind == 3]
    assert len(found) >= 4 and found.count("hexagon") > len(found) / 2
    assert "no picture" not in (tmp_path / "out" / "review.html").read_text(encoding="utf-8")


def test_real_crops_come_out_once(
    finished_run: Path, shared_data: Path, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    images = shared_data / "tools17"
    (tmp_path / "images").mkdir()
    wanted = {}
    for path in sorted(p for p in images.rglob("*") if p.suffix.lower() in lct.IMAGE_SUFFIXES)[::25]:
        name = f"{len(wanted)} {path.name}"
        (tmp_path / "images" / name).symlink_to(path)
        wanted[name] = lct.load_image(path).shape[1::-1]
    assert len(wanted) > 40
    assert call_main(*command(finished_run, tmp_path / "images", tmp_path / "out")) == 0
    found = {row["image"]: box_of(row) for row in read_rows(tmp_path / "out")}
    assert found == {name: [0, 0, *size] for name, size in wanted.items()}
    assert json.loads((tmp_path / "out" / "problems.json").read_text()) == []
    boxes = [item["box"] for item in read_back("cvat", tmp_path / "out" / "cvat")]
    assert sorted(map(tuple, np.round(boxes).tolist())) == sorted((0, 0, *size) for size in wanted.values())


def test_padding_widens_the_crop_and_not_the_box(
    labelled: Path, finished_run: Path, scene: Scene, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    source = scene.write_coco(tmp_path / "coco.json")
    assert call_main(*command(finished_run, scene.folder, tmp_path / "out", source, "--box_pad", "0.3")) == 0
    rows, plain = read_rows(tmp_path / "out"), read_rows(labelled)
    assert [box_of(row) for row in rows] == [box_of(row) for row in plain]
    assert [row["cosine"] for row in rows] != [row["cosine"] for row in plain]


# --- masks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
def test_masks_are_used_by_a_run_that_was_trained_with_them(
    tmp_path: Path, drawn_data: Path, capsys: pytest.CaptureFixture, call_main: Callable[..., int]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn_data, data)
    for path in data.glob("*/*.png"):
        (path.parent / "masks").mkdir(exist_ok=True)
        image = np.asarray(Image.open(path)).astype(int)
        mask = (image.max(axis=2) - image.min(axis=2) > 200) | (image.max(axis=2) < 20)
        Image.fromarray(mask.astype(np.uint8) * 255).save(path.parent / "masks" / f"{path.stem}_mask.png")
    run = train(tmp_path / "run", data, "--crop_mode", "mask", "--epochs", "1")
    triangle = [60.0, 30.0, 110.0, 110.0, 20.0, 100.0]
    mask = geometry.read_segmentation([triangle], (128, 128), (0, 0, 128, 128))
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    kinds = [
        [triangle],
        {"size": [128, 128], "counts": packed},
        {"size": [128, 128], "counts": geometry.unpack_rle(packed)},
    ]
    images, annotations = [], []
    for number in range(6):  # one object on six backgrounds; the mask is given in three ways
        rng = np.random.default_rng(number)
        photo = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        photo[mask] = (200, 30, 30)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(photo).save(tmp_path / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 128, "height": 128})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [20, 30, 90, 80]})
        annotations[-1]["segmentation"] = kinds[number % 3]
    del annotations[0]["bbox"]  # then the box is that of the mask
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert call_main(*command(run, tmp_path / "images", tmp_path / "out", tmp_path / "coco.json")) == 0
    rows = read_rows(tmp_path / "out")
    assert {row["judged_by_mask"] for row in rows} == {"True"}
    assert np.ptp([float(row["cosine"]) for row in rows]) < 1e-5  # places in a batch differ in the last digit
    truth = COCO(str(tmp_path / "out" / "coco" / "annotations" / "instances_default.json"))
    for item in truth.loadAnns(truth.getAnnIds()):  # the detector's masks are handed on
        assert (truth.annToMask(item).astype(bool) == mask).mean() > 0.98
        assert item["area"] == pytest.approx(mask.sum(), rel=0.02)
    capsys.readouterr()
    annotations[0]["segmentation"] = {"size": [128, 128], "counts": [128 * 128]}  # empty
    annotations[0]["bbox"], annotations[1]["segmentation"] = [20, 30, 90, 80], {"size": [5, 5], "counts": [25]}
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert call_main(*command(run, tmp_path / "images", tmp_path / "out", tmp_path / "coco.json")) == 0
    assert [row["judged_by_mask"] for row in read_rows(tmp_path / "out")] == ["False"] * 2 + ["True"] * 4
    assert "2 objects have no mask" in capsys.readouterr().out
    problems = json.loads((tmp_path / "out" / "problems.json").read_text())
    assert [problem["detection"] for problem in problems] == [0, 1]


def test_a_format_that_is_entered_in_the_table_is_written(
    finished_run: Path, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_main: Callable[..., int]
) -> None:
    def write_names(label_set: label_writers.LabelSet) -> Iterator[label_writers.LabelFile]:
        yield "names/all.txt", (f"{image.path} {len(image.objects)}\n" for image in label_set.images())

    monkeypatch.setitem(label_writers.WRITERS, "names", write_names)
    source = scene.write_coco(tmp_path / "coco.json")
    assert call_main(*command(finished_run, scene.folder, tmp_path / "out", source, "--formats", "names")) == 0
    text = (tmp_path / "out" / "names" / "all.txt").read_text(encoding="utf-8")
    assert text == "".join(f"{name} {len(scene.boxes[name])}\n" for name in NAMES)


# --- what is wrong with the input is named


def test_every_bad_object_is_named_and_the_rest_is_answered(
    finished_run: Path, scene: Scene, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(scene.folder, images)
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (images / "half.png").write_bytes((images / "plain.png").read_bytes()[:3000])
    content = scene.coco()
    good = len(content["annotations"])
    bad_boxes = {
        "no size": [10, 10, 0, 20],
        "of no size": [10, 10, 20, -5],
        "outside": [400, 10, 20, 20],
        "not four numbers": [1, 2, 3],
        "four numbers": [1, 2, "3", 4],
        "are not four": None,
    }
    bad = [*bad_boxes.values(), [float("nan"), 1, 2, 3], [1, 2, 10**400, 3], [1, 2, 1e999, 3], {"x": 1}]
    for number, box in enumerate(bad):
        content["annotations"].append({"id": 500 + number, "image_id": 1000, "category_id": 41, "bbox": box})
    for number, name in enumerate(["broken.png", "half.png", "gone.png", "../plain.png", "plain.png"]):
        content["images"].append({"id": 2000 + number, "file_name": name})
        content["annotations"].append(
            {"id": 600 + number, "image_id": 2000 + number, "category_id": 41, "bbox": [0, 0, 9, 9]}
        )
    content["images"].append({"id": 3000, "file_name": "empty.png", "width": 999, "height": 240})
    content["images"] = [image for image in content["images"] if image["id"] != 1003]
    content["annotations"].append({"id": 700, "image_id": 3000, "category_id": 41, "bbox": [0, 0, 9, 9]})
    content["annotations"].append({"id": 701, "image_id": 4444, "category_id": 41, "bbox": [0, 0, 9, 9]})
    (tmp_path / "coco.json").write_text(json.dumps(content))
    assert call_main(*command(finished_run, images, tmp_path / "out", tmp_path / "coco.json")) == 0
    problems = json.loads((tmp_path / "out" / "problems.json").read_text(encoding="utf-8"))
    assert len(read_rows(tmp_path / "out")) == good
    assert {item["detection"] for item in problems if item["image"] == "plain.png"} == {*range(500, 510), None}
    told = {item["image"]: item["reason"] for item in problems if item["detection"] is None}
    assert "cannot be read" in told["broken.png"] and "cannot be read" in told["half.png"]
    assert told["gone.png"] == told["../plain.png"] == "is not in --images" and "twice" in told["plain.png"]
    assert "300 x 240 px, but 999 x 240" in told["empty.png"]
    assert [item["reason"] for item in problems if item["detection"] == 701] == [
        "its image is not in the list of images"
    ]


def test_boxes_lie_on_the_upright_image(
    finished_run: Path, scene: Scene, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    (tmp_path / "images").mkdir()
    upright = Image.open(scene.folder / "plain.png").convert("RGB")
    upright.save(tmp_path / "images" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    for name in ("1.png", "2.png"):
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "images" / name, exif=exif)
    boxes = [*scene.boxes["plain.png"], [230.0, 10.0, 60.0, 50.0]]
    images = [{"id": i, "file_name": f"{i}.png", "width": 300, "height": 240} for i in range(3)]
    images[2].update(
        width=240, height=300
    )  # of the stored pixels; boxes beyond 240 tell that these are on the upright image
    annotations = [
        {"id": 10 * i + k, "image_id": i, "category_id": 1, "bbox": box}
        for i in range(3)
        for k, box in enumerate(boxes)
    ]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert call_main(*command(finished_run, tmp_path / "images", tmp_path / "out", tmp_path / "coco.json")) == 0
    rows = read_rows(tmp_path / "out")
    plain, *turned = (
        [(*box_of(r), r["best_class"], round(float(r["cosine"]), 3)) for r in rows if r["image"] == name]
        for name in ("0.png", "1.png", "2.png")
    )
    assert turned == [plain, plain]
    assert json.loads((tmp_path / "out" / "problems.json").read_text()) == []
    for box, words in (([10, 10, 50, 50], "are taken for"), ([10, 240, 50, 50], "are those of the pixels before")):
        (tmp_path / "coco.json").write_text(
            json.dumps(
                {
                    "images": images,
                    "annotations": [{**a, "bbox": box} if a["image_id"] == 2 else a for a in annotations],
                }
            )
        )
        assert call_main(*command(finished_run, tmp_path / "images", tmp_path / "two", tmp_path / "coco.json")) == 0
        problems = json.loads((tmp_path / "two" / "problems.json").read_text())
        (reason,) = [problem["reason"] for problem in problems if problem["image"] == "2.png"]
        assert words in reason
        assert any(row["image"] == "2.png" for row in read_rows(tmp_path / "two")) == (words == "are taken for")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_size_of_a_photo_without_objects_is_that_of_its_upright_pixels(tmp_path: Path, suffix: str) -> None:
    for orientation in (1, 3, 5, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (40, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
        height, width, _ = lct.load_image(tmp_path / f"a.{suffix}").shape
        assert photos.read_image_size(tmp_path / f"a.{suffix}") == (width, height)
        assert (width, height) == ((20, 40) if orientation > 4 else (40, 20))


def test_odd_yolo_folders_are_explained(
    finished_run: Path, tmp_path: Path, scene: Scene, call_main: Callable[..., int]
) -> None:
    (tmp_path / "images").mkdir()
    for name in ("1.png", "1.jpg", "2.png"):
        shutil.copy(scene.folder / "plain.png", tmp_path / "images" / name)
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "1.txt").write_text("0 0.5 0.5 0.2 0.2\n\nrubbish\n0 5.5 0.5 0.2 0.2\n")
    (tmp_path / "yolo" / "orphan.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    assert call_main(*command(finished_run, tmp_path / "images", tmp_path / "out", tmp_path / "yolo")) == 0
    problems = json.loads((tmp_path / "out" / "problems.json").read_text())
    told = {(item["image"], item["detection"]): item["reason"] for item in problems}
    assert "not a line of numbers" in told["1.jpg", "line 3"] and "neither shares" in told["1.jpg", "line 4"]
    assert "no image of its name" in told["orphan.txt", None]
    assert any("same .txt" in item["reason"] for item in problems if item["image"] == "1.png")
    assert len(read_rows(tmp_path / "out")) == 1


# --- bad input: one sentence, exit code 2


def refuse(call_main: Callable[..., int], capsys: pytest.CaptureFixture, *args: object) -> str:
    capsys.readouterr()
    assert call_main(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_detections_that_cannot_be_used_cost_one_sentence(
    finished_run: Path, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture, call_main: Callable[..., int]
) -> None:
    content = scene.coco()
    twice = json.loads(json.dumps(content))
    twice["images"][1]["id"] = twice["images"][0]["id"]
    cases = {
        "holds no objects": {**content, "annotations": []},
        "is a list of results": [{"image_id": 1000, "category_id": 41, "bbox": [0, 0, 5, 5], "score": 1}],
        "it has no list images": {"annotations": []},
        "two images of id 1000": twice,
        "none of its images (1) is there: elsewhere/x.png is not in": {
            "images": [{"id": 1, "file_name": "elsewhere/x.png"}], "annotations": []
        },
        "without file_name": {"images": [{"id": 1}], "annotations": []},
    }  # fmt: skip
    for words, value in cases.items():
        (tmp_path / "bad.json").write_text(json.dumps(value))
        error = refuse(call_main, capsys, *command(finished_run, scene.folder, tmp_path / "out", tmp_path / "bad.json"))
        assert words in error
    for raw in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"images": 1' + b"1" * 9000 + b"}", b"null"):
        (tmp_path / "bad.json").write_bytes(raw)
        assert "--detections" in refuse(
            call_main, capsys, *command(finished_run, scene.folder, tmp_path / "out", tmp_path / "bad.json")
        )
    (tmp_path / "nothing").mkdir()
    for words, images, detections in (
        ("has no .txt of these images", scene.folder, tmp_path / "nothing"),
        ("holds no images", tmp_path / "nothing", None),
        ("does not exist", scene.folder, tmp_path / "no.json"),
        ("does not exist", tmp_path / "no", None),
    ):
        assert words in refuse(call_main, capsys, *command(finished_run, images, tmp_path / "out", detections))
    (tmp_path / "nothing" / "rubbish.png").write_bytes(b"rubbish")
    assert "not one object" in refuse(
        call_main, capsys, *command(finished_run, tmp_path / "nothing", tmp_path / "out2")
    )
    assert not (tmp_path / "out").exists()  # nothing was written before the refusal


def test_bad_flags_cost_one_sentence(
    finished_run: Path, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture, call_main: Callable[..., int]
) -> None:
    def told(*args: object) -> str:
        return refuse(call_main, capsys, *args)

    assert "--run: is missing" in told("prelabel", "--images", scene.folder, "--out", tmp_path / "o")
    assert "--out: is missing" in told("prelabel", "--images", scene.folder, "--run", finished_run)
    assert "xml is no format" in told(
        *command(finished_run, scene.folder, tmp_path / "o", None, "--formats", "coco,xml")
    )
    assert "inside --images" in told(*command(finished_run, scene.folder, scene.folder / "o"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "neither empty" in told(*command(finished_run, scene.folder, tmp_path / "mine"))
    error = told("prelabel", "--run", tmp_path / "none", "--images", scene.folder, "--out", tmp_path / "o")
    assert "--run" in error and "does not exist" in error


def test_a_run_that_does_not_fit_together_is_refused(
    finished_run: Path, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture, call_main: Callable[..., int]
) -> None:
    run = tmp_path / "run"
    gallery, meta = lct.load_gallery(finished_run / "prototypes.npz")
    other = meta | {"weights_hash": "another", "img_size": 48}

    def told(change: Callable[[Path], object]) -> str:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished_run, run)
        change(run)
        return refuse(call_main, capsys, *command(run, scene.folder, tmp_path / "out"))

    def set_options(**values: object) -> Callable[[Path], object]:
        content = json.loads((finished_run / "config.json").read_text(encoding="utf-8"))
        content["options"].update(values)
        return lambda folder: (folder / "config.json").write_text(json.dumps(content))

    assert "has no prototypes.npz" in told(lambda folder: (folder / "prototypes.npz").unlink())
    assert "has no checkpoint_best.pth" in told(lambda folder: (folder / "checkpoint_best.pth").unlink())
    assert "config.json" in told(lambda folder: (folder / "config.json").write_text("{"))
    assert "config.json" in told(lambda folder: (folder / "config.json").write_text('{"options": "none"}'))
    assert "another version" in told(set_options(no_such_option=1))
    error = told(lambda folder: lct.save_gallery(folder / "prototypes.npz", gallery, other))
    assert "does not belong" in error and "weights_hash: " in error and "img_size: 48 in the prototypes, 32" in error
    assert "mask_fill" not in error  # only what differs
    damaged = bytearray((finished_run / "checkpoint_best.pth").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    assert "damaged" in told(lambda folder: (folder / "checkpoint_best.pth").write_bytes(damaged))
    assert not (tmp_path / "out").exists()


def test_a_frozen_backbone_comes_from_where_the_run_had_it(
    drawn_data: Path, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture, call_main: Callable[..., int]
) -> None:
    import timm

    torch.manual_seed(1)
    for name in ("right.pth", "wrong.pth"):
        torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / name)
    flags = ("--freeze_backbone", "--pretrained", "--backbone_weights", tmp_path / "right.pth", "--epochs", "1")
    run = train(tmp_path / "run", drawn_data, *flags)
    (tmp_path / "right.pth").rename(tmp_path / "moved.pth")
    words = command(run, scene.folder, tmp_path / "out")
    assert "no longer at" in refuse(call_main, capsys, *words)
    assert "other backbone weights" in refuse(call_main, capsys, *words, "--backbone_weights", tmp_path / "wrong.pth")
    assert call_main(*words, "--backbone_weights", tmp_path / "moved.pth") == 0
    assert len(read_rows(tmp_path / "out")) == len(NAMES)


# --- streaming, and going on


def make_many(folder: Path, num_images: int, per_image: int = 10) -> Path:
    """Write the same photo many times with random boxes; return the COCO file."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(3)
    photo = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((320, 240))
    photo.save(folder / "photo.jpg")
    images, annotations = [], []
    for number in range(num_images):
        shutil.copy(folder / "photo.jpg", folder / "images" / f"{number:05d}.jpg")
        images.append({"id": number, "file_name": f"{number:05d}.jpg", "width": 320, "height": 240})
        for x, y in rng.uniform(0, 200, (per_image, 2)).round(2).tolist():
            annotations.append(
                {"image_id": number, "category_id": 1, "bbox": [x, y, 40, 30], "segmentation": [[x, y] * 20]}
            )
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "coco.json"


@pytest.fixture
def few_cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Have ten cards on the review page instead of 200, which take longer than the answers; return what a fork must set."""
    constants = {"REVIEW_CARDS": 10}
    monkeypatch.setattr(prelabel, "REVIEW_CARDS", constants["REVIEW_CARDS"])
    return constants


def outputs(out: Path) -> dict[str, bytes]:
    """Return the label files, in which the order of the images is that of the detections."""
    found = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".") and "images" not in p.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_interrupted_and_started_again_it_goes_on(
    finished_run: Path, tmp_path: Path, nursery: Nursery, capsys: pytest.CaptureFixture, call_main: Callable[..., int],
    few_cards: dict[str, int],
) -> None:  # fmt: skip
    source, images, flags = make_many(tmp_path, 40, per_image=5), tmp_path / "images", ("--batch", "8")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert call_main(*command(finished_run, images, whole, source, *flags)) == 0
    words = command(finished_run, images, broken, source, *flags, "--workers", "1")
    code, text = nursery.run(*words, constants=few_cards, plans=[kill("AnswerFile.append", 12, signal.SIGTERM)])
    assert code == 143 and "the same command continues" in text, text
    assert outputs(broken) == {}  # whole at the end, or not at all
    progress = broken / ".progress.jsonl"
    assert 20 < progress.read_bytes().count(b"\n") < 40
    progress.write_bytes(progress.read_bytes() + b'{"unit":"half a li')  # what a power failure leaves

    def again(*more: object) -> str:
        capsys.readouterr()
        assert call_main(*command(finished_run, images, broken, source, *flags, *more)) == 0
        return capsys.readouterr().out

    assert "of 40 images are answered already" in again()
    assert outputs(broken) == outputs(whole)
    stamp = progress.stat().st_mtime_ns
    assert "40 of 40 images" in again("--formats", "csv") and progress.stat().st_mtime_ns == stamp
    Image.open(tmp_path / "photo.jpg").rotate(180).save(images / "00007.jpg")  # another image: answered again
    assert re.search(r"3\d of 40 images are answered", again("--formats", "csv"))
    changed = {a["image"] for a, b in zip(read_rows(broken), read_rows(whole), strict=True) if a != b}
    assert changed == {"00007.jpg"}
    assert "answered already" not in again("--box_pad", "0.1", "--formats", "csv")  # other settings: afresh


def test_an_image_that_could_not_be_read_is_tried_again(
    finished_run: Path, scene: Scene, tmp_path: Path, call_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permission changes neither its size nor its time."""
    words = command(finished_run, scene.folder, tmp_path / "out", scene.write_coco(tmp_path / "coco.json"))
    read_file = lct.read_file

    def refuse_one(path: Path) -> bytes:
        if path.name == "plain.png":
            raise lct.ImageError("Permission denied")
        return read_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(lct, "read_file", refuse_one)
        assert call_main(*words) == 0
    assert "plain.png" not in {row["image"] for row in read_rows(tmp_path / "out")}
    assert call_main(*words) == 0
    assert "plain.png" in {row["image"] for row in read_rows(tmp_path / "out")}


def test_a_folder_in_use_is_named_by_its_flag(
    finished_run: Path, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture, call_main: Callable[..., int]
) -> None:
    with lct.lock_directory(tmp_path / "out"):
        for flags in ((), ("--overwrite",)):
            error = refuse(call_main, capsys, *command(finished_run, scene.folder, tmp_path / "out", None, *flags))
            assert f"--out {tmp_path / 'out'}: is in use by process {os.getpid()}" in error


def test_corrections_are_never_written_over(
    finished_run: Path, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture, call_main: Callable[..., int]
) -> None:
    out, source = tmp_path / "out", scene.write_coco(tmp_path / "coco.json")
    words = command(finished_run, scene.folder, out, source)
    assert call_main(*words) == 0
    first = outputs(out)
    (out / "yolo" / "labels.cache").write_bytes(b"of Ultralytics")
    with open(out / ".written.jsonl", "a") as log:  # a kill came before the file of this line took its place
        log.write('["objects.csv", "another"]\n')
    assert call_main(*words) == 0 and outputs(out) == first  # nothing was corrected
    for name in ("yolo/labels/plain.txt", "objects.csv", "yolo/labels/new.txt"):
        path = out / name
        if name == "objects.csv":  # a folder of that format's name is not ours
            (out / "csv").mkdir()
            (out / "csv" / "notes.txt").write_bytes(b"checked")
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n")
        error = refuse(call_main, capsys, *words)
        assert str(path) in error and "was changed after it was written" in error and "--overwrite" in error
        format_name = name.split("/")[0].replace("objects.", "")
        others = ",".join(other for other in label_writers.WRITERS if other != format_name)
        assert call_main(*words, "--formats", others) == 0
        corrected = outputs(out)
        capsys.readouterr()
        assert call_main(*words, "--overwrite") == 0
        text = capsys.readouterr().out
        assert "4 of 4 images are answered already" in text
        old = Path(re.search(r"the old labels are moved to (.*)", text)[1])
        assert outputs(old) == corrected and outputs(out) == first
    (out / "yolo" / "labels" / "plain.txt").write_bytes(b"corrected")
    assert call_main(*command(finished_run, scene.folder, tmp_path / "another", source)) == 0
    (out / "yolo" / "labels" / "plain.txt").unlink()  # thrown away: nothing is lost
    assert call_main(*words) == 0 and outputs(out) == first
    given = refuse(call_main, capsys, *command(finished_run, scene.folder, out, out / "cvat" / "annotations.xml"))
    assert "lies in --out" in given
    (out / ".written.jsonl").unlink()  # by an older version
    assert "may hold corrections" in refuse(call_main, capsys, *words)


def test_a_folder_of_labels_may_be_a_link_to_another_disk_or_a_mount_point(
    finished_run: Path,
    scene: Scene,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    call_main: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = command(finished_run, scene.folder, tmp_path / "out", scene.write_coco(tmp_path / "coco.json"))
    assert call_main(*words) == 0
    rename = os.rename
    refused = {".progress.jsonl": errno.EXDEV}

    def refuse_rename(source: Path, target: Path) -> None:
        if Path(source).name in refused:
            raise OSError(refused[Path(source).name], "refused")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_rename)
    capsys.readouterr()
    assert call_main(*words, "--overwrite") == 0
    said = capsys.readouterr().out
    assert "4 of 4 images are answered already" in said and "12 objects in 4 images: " in said
    (tmp_path / "out" / "yolo").rename(tmp_path / "ssd")
    (tmp_path / "out" / "yolo").symlink_to(tmp_path / "ssd")
    assert call_main(*words) == call_main(*words) == 0
    refused["out"] = errno.EBUSY
    assert "cannot be moved aside" in refuse(call_main, capsys, *words, "--overwrite")


def test_label_studio_is_explained_in_three_steps_that_fit_the_tasks(
    finished_run: Path, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture, call_main: Callable[..., int]
) -> None:
    images = tmp_path / "my photos"
    shutil.copytree(scene.folder, images)
    capsys.readouterr()
    assert call_main(*command(finished_run, images, tmp_path / "out", None, "--formats", "labelstudio")) == 0
    text = capsys.readouterr().out
    (line,) = re.findall(r"1\. (.*)", text)
    settings = dict(word.split("=") for word in shlex.split(line)[:2])
    root = Path(settings["LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT"])
    storage = re.search(r"Local files: (.*) \(", text)[1]
    interface = (tmp_path / "out" / "labelstudio" / "config.xml").read_text()
    for task in json.loads((tmp_path / "out" / "labelstudio" / "tasks.json").read_text()):
        path = root / unquote(task["data"]["image"].partition("?d=")[2])
        assert path.is_file() and path.is_relative_to(storage) and root != Path(storage)
        tags = {tag for item in task["predictions"][0]["result"] for tag in (item["from_name"], item["to_name"])}
        assert all(f'name="{tag}"' in interface for tag in tags)
    assert call_main(*command(finished_run, images, tmp_path / "csv", None, "--formats", "csv")) == 0
    assert "Label Studio" not in capsys.readouterr().out


def test_lone_surrogates_in_a_file_do_not_cost_the_work(
    finished_run: Path, scene: Scene, tmp_path: Path, call_main: Callable[..., int]
) -> None:
    content = scene.coco()
    content["images"].append({"id": "\ud800", "file_name": "\udcff.png"})
    content["images"][0]["id"] = "x\udfff"
    for number, item in enumerate(content["annotations"]):
        item.update(id=f"\ud800{number}", category_id="\udc80", image_id="x\udfff", score="\ud800")
    content["annotations"] += [{"id": "\ud800", "image_id": "\ud800", "bbox": [1, 2, 3, 4]}] * 2
    content["annotations"] += [{"id": "\ud801", "image_id": 1001, "bbox": "\ud800"}]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    assert call_main(*command(finished_run, scene.folder, tmp_path / "out", tmp_path / "coco.json")) == 0
    assert len(read_rows(tmp_path / "out")) == 12


def test_workers_change_nothing_and_an_image_is_decoded_once(
    labelled: Path, finished_run: Path, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    call_main: Callable[..., int],
) -> None:  # fmt: skip
    decoded: list[str] = []
    load = lct.load_image
    monkeypatch.setattr(lct, "load_image", lambda path, *bits: decoded.append(str(path)) or load(path, *bits))
    monkeypatch.setattr(prelabel, "write_review", lambda *_: None)  # it reads the images once more
    source = scene.write_coco(tmp_path / "coco.json")
    assert call_main(*command(finished_run, scene.folder, tmp_path / "out", source)) == 0
    assert sorted(decoded) == sorted(
        str(scene.folder / name) for name in NAMES[:3]
    )  # the one without objects not at all
    assert call_main(*command(finished_run, scene.folder, tmp_path / "two", source, "--workers", 2)) == 0
    assert read_rows(tmp_path / "two") == read_rows(labelled)


def test_an_image_with_very_many_objects_is_answered_in_parts(
    finished_run: Path, tmp_path: Path, call_main: Callable[..., int], few_cards: dict[str, int]
) -> None:
    source = make_many(tmp_path, 1, per_image=600)
    assert (
        call_main(*command(finished_run, tmp_path / "images", tmp_path / "out", source, "--formats", "csv,yolo")) == 0
    )
    rows = read_rows(tmp_path / "out")
    wanted = json.loads(source.read_text())["annotations"]
    assert [box_of(row) for row in rows] == [
        pytest.approx(clip_to(item["bbox"], 320, 240), abs=1e-3) for item in wanted
    ]
    assert len((tmp_path / "out" / "yolo" / "labels" / "00000.txt").read_text().splitlines()) == 600
    lines = (tmp_path / "out" / ".progress.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3
    (tmp_path / "images" / "00000.jpg").write_bytes(b"broken")
    assert call_main(*command(finished_run, tmp_path / "images", tmp_path / "broken", source)) == 2
    problems = json.loads((tmp_path / "broken" / "problems.json").read_text())
    assert [problem["detection"] for problem in problems] == [None], "one photo is one problem"


def clip_to(box: list[float], width: int, height: int) -> list[float]:
    x, y, w, h = box
    return [x, y, min(width, x + w) - x, min(height, y + h) - y]


def show_peak(*argv: str) -> int:
    """Pre-label in this forked process, whose peak of memory begins with what it has, and print the peak in kB."""
    code = prelabel.main(argv[1:])
    print(re.search(r"VmHWM.*", Path("/proc/self/status").read_text("utf-8"))[0])
    return code


def test_memory_does_not_grow_with_the_number_of_objects(
    finished_run: Path, tmp_path: Path, nursery: Nursery, few_cards: dict[str, int]
) -> None:
    peaks = []
    for num_images in (50, 250):
        source = make_many(tmp_path / str(num_images), num_images)
        words = command(finished_run, source.parent / "images", source.parent / "out", source)
        code, said = nursery.run(*words, constants=few_cards, function=("tools.test_prelabel", "show_peak"))
        assert code == 0, said
        peaks.append(int(re.search(r"VmHWM:\D*(\d+) kB", said)[1]) / 1024)
    assert peaks[1] - peaks[0] < 15, f"2,500 objects take {peaks[1]:.0f} MB, 500 take {peaks[0]:.0f} MB"


# --- for people


def test_the_commands_and_examples_of_the_readme_run(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_main: Callable[..., int]
) -> None:
    text = (REPO / "tools" / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## prelabel\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)[1]
    shutil.copytree(finished_run, tmp_path / "RUN")
    (tmp_path / "PHOTOS" / "bench").mkdir(parents=True)
    draw_image(1, 9, side=640).resize((640, 480)).save(tmp_path / "PHOTOS" / "bench" / "a.jpg")
    incoming, outgoing = section.split("### What comes out")
    examples = dict(re.findall(r"^`([\w./]+)`[^`]*\n\n```\w*\n(.*?)```", incoming, re.DOTALL | re.MULTILINE))
    assert examples.keys() == {"boxes.json", "boxes/bench/a.txt", "boxes.csv"}
    for name, example in examples.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    python lct_dino3\.py (.*)$", section, re.MULTILINE)
    assert len(commands) == 2
    for line in commands:
        assert call_main(*shlex.split(line), *FLAGS) == 0
    (line,) = re.findall(r"^    torchrun --nproc_per_node 2 -- tools/prelabel\.py (.*)$", section, re.MULTILINE)
    assert f"prelabel {line}" == commands[0]
    for name in ("boxes", "boxes.csv"):
        assert call_main(*command(tmp_path / "RUN", tmp_path / "PHOTOS", tmp_path / "again" / name, Path(name))) == 0
        assert_same_objects(
            [(row["image"], box_of(row)) for row in read_rows(tmp_path / "again" / name)],
            [(row["image"], box_of(row)) for row in read_rows(tmp_path / "LABELS")],
        )
    for name in re.findall(r"^\| `([\w/.]+)`", outgoing, re.MULTILINE) + re.findall(r", `([\w/.]+\.\w+)` \|", outgoing):
        assert (tmp_path / "LABELS" / name).exists(), name
    for row, example in zip(
        (tmp_path / "LABELS" / "objects.csv").read_text(encoding="utf-8").splitlines(),
        re.findall(r"^image,x,.*", outgoing, re.MULTILINE),
        strict=False,
    ):
        assert row == example, "the columns"


def test_the_review_page_shows_the_least_certain_first_and_runs_nothing(
    finished_run: Path, drawn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_main: Callable[..., int]
) -> None:
    hostile = "<img src=x onerror=alert(1)> & 'q'.png"
    Scene(tmp_path / "images", [hostile, "b.png"])
    (tmp_path / "yolo").mkdir()
    for stem in (hostile.removesuffix(".png"), "b"):
        grid = [(x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)]
        boxes = "".join(f"0 {x} {y} 0.08 0.3\n" for x, y in grid)  # 24 x 72 px
        (tmp_path / "yolo" / f"{stem}.txt").write_text(boxes + "0 9 9 1 1\n")
    monkeypatch.setattr(prelabel, "REVIEW_CARDS", 10)
    monkeypatch.setattr(prelabel, "REVIEW_PROBLEMS", 1)
    out = tmp_path / "out"
    assert call_main(*command(finished_run, tmp_path / "images", out, tmp_path / "yolo")) == 0
    page = (out / "review.html").read_text(encoding="utf-8")
    cards = re.findall(r'<article class="card">(.*?)</article>', page, re.DOTALL)
    assert len(cards) == 10 < len(read_rows(out)) == 18
    doubts = [float(re.search(r"<small>([\d.]+) ", card)[1]) for card in cards]
    assert doubts == sorted(doubts)
    thresholds = [(float(row["cosine"]), float(row["threshold"]), float(row["margin"])) for row in read_rows(out)]
    wanted = sorted(min(abs(c - t), m) if c >= t else t - c for c, t, m in thresholds)[:10]
    assert doubts == pytest.approx(wanted, abs=6e-4)
    assert all(card.count('<img src="data:image/jpeg;base64,') == 3 for card in cards)
    captions = [('class="name none"' in card, "most similar" in card, "proposed" in card) for card in cards]
    assert {*captions} == {(True, True, False), (False, False, True)}
    pictures = list_pictures(out)
    assert {path for _, path in pictures[::3]} <= {hostile, "b.png"}
    for picture, path in pictures[1::3] + pictures[2::3]:
        assert picture == prelabel._make_picture(drawn_data / path)
    assert (
        "<script" not in page
        and "onerror=alert(1)> &" not in page
        and html.escape(hostile, quote=False).split("&#39;")[0][:20] in page
    )
    assert "default-src 'none'" in page and not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "<b>ключ" not in page and "&lt;b&gt;ключ" in page
    assert "2 images or objects have no answer" in page and "and 1 more, in problems.json" in page
    assert [probe(out / "review.html", FITS, width) for width in (400, 1000, 1600)] == ["true,true"] * 3


def test_a_class_called_unknown_keeps_its_name(finished_run: Path) -> None:
    gallery = lct.load_gallery(finished_run / "prototypes.npz")[0]
    import dataclasses

    renamed = dataclasses.replace(gallery, class_names=("unknown", "unknown_", "pliers"))
    prelabels = prelabel.Prelabels(None, [], None, renamed, {}, 0.0)
    assert prelabels.names == ("unknown", "unknown_", "pliers", "unknown__")
