"""tools/crop.py: labelled photos become crops, whatever the labels are written in, and crops follow corrected labels."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.sax.saxutils import quoteattr

import crop
import geometry
import label_yolo
import labels
import numpy as np
import prelabel
import pytest
import simplejpeg
from conftest import SHARED_DATA, TINY_RUN, draw_image, run_main
from killing import Nursery, kill
from label_objects import find_class_name
from PIL import Image
from pycocotools import mask as coco_mask

import lct_dino3 as lct

SIZES = {"a.jpg": (640, 480), "bench/b 12.jpg": (400, 300)}
OBJECTS = {
    "a.jpg": [("hammer", (20, 20, 187, 200)), ("ключ", (300, 40, 145, 180)), ("hammer", (60, 260, 180, 44))],
    "bench/b 12.jpg": [("ключ", (30, 30, 200, 145)), ("pliers", (260, 150, 100, 117))],
}
NAMES = ["hammer", "ключ", "pliers"]


def encode_jpeg(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95, colorspace="RGB", colorsubsampling="444")


def draw_photo(size: tuple[int, int], *seed: int) -> Image.Image:
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    return noise.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photos, one of them in a folder, whose five objects are OBJECTS."""
    for seed, (name, size) in enumerate(SIZES.items()):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_photo(size, seed).save(path, quality=95)
    return tmp_path / "photos"


def walk() -> Iterator[tuple[str, tuple[int, int], int, str, tuple[int, ...]]]:
    for name, objects in OBJECTS.items():
        for index, (kind, box) in enumerate(objects):
            yield name, SIZES[name], index, kind, box


def corners(box: tuple[int, ...]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]


def draw_mask(box: tuple[int, ...]) -> np.ndarray:
    """A mask that reaches all edges of its box and is not full."""
    mask = np.ones((box[3], box[2]), dtype=bool)
    mask[: box[3] // 3, : box[2] // 2] = False
    return mask


def write_coco(folder: Path, shape: str = "box", **extra: Any) -> Path:
    ids = {name: number for number, name in enumerate(SIZES, 1)}
    images = [{"id": ids[n], "file_name": n, "width": size[0], "height": size[1]} for n, size in SIZES.items()]
    annotations = []
    for name, (width, height), _, kind, box in walk():
        item = {"id": len(annotations) + 1, "image_id": ids[name], "category_id": NAMES.index(kind) + 7}
        if shape == "box":
            item["bbox"] = list(box)
        elif shape == "polygon":
            item["segmentation"] = [[value for point in corners(box) for value in point]]
        else:
            whole = np.zeros((height, width), np.uint8, order="F")
            whole[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = draw_mask(box)
            packed = coco_mask.encode(whole)
            item["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
        annotations.append(item)
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 7)]
    path = folder / "labels.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories, **extra}))
    return path


def write_yolo(folder: Path, shape: str = "box") -> Path:
    for name, (width, height), _, kind, box in walk():
        x, y, w, h = box
        points = [value for px, py in corners(box) for value in (px / width, py / height)]
        if shape == "segment":
            points += [x / width, (y + h / 2) / height]
        numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height) if shape == "box" else points
        path = (folder / "labels" / name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(f"{NAMES.index(kind)} {' '.join(f'{number:.6f}' for number in numbers)}\n")
    if shape == "box":
        (folder / "labels" / "classes.txt").write_text("\n".join(NAMES) + "\n")
    elif shape == "obb":
        (folder / "data.yaml").write_text(f"train: images\nnc: 3\nnames: [{', '.join(NAMES)}]\n")
    else:
        (folder / "data.yaml").write_text("names:\n" + "".join(f"  {n}: '{name}'\n" for n, name in enumerate(NAMES)))
    return folder / "labels"


def write_cvat(folder: Path, shape: str = "box") -> Path:
    lines = []
    for name, (width, height), index, kind, (x, y, w, h) in walk():
        if not index:
            lines.append(f'<image id="{len(lines)}" name={quoteattr(name)} width="{width}" height="{height}">')
        if shape == "box":
            lines.append(f'<box label="{kind}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}" occluded="0"/>')
        else:
            flat = draw_mask((x, y, w, h)).ravel()
            borders = np.flatnonzero(np.diff(flat, prepend=False))
            counts = ", ".join(map(str, np.diff(borders, prepend=0, append=flat.size)))
            lines.append(f'<mask label="{kind}" rle="{counts}" left="{x}" top="{y}" width="{w}" height="{h}"/>')
        if index == len(OBJECTS[name]) - 1:
            lines.append("</image>")
    path = folder / "annotations.xml"
    path.write_text("<annotations>" + "".join(lines) + "</annotations>", encoding="utf-8")
    return path


def write_labelstudio(folder: Path) -> Path:
    tasks = []
    for name, (width, height), index, kind, (x, y, w, h) in walk():
        if not index:
            tasks.append({"data": {"image": f"/data/local-files/?d={name}"}, "annotations": [{"result": []}]})
        percent = {"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height}
        value = {**percent, "rotation": 0, "rectanglelabels": [kind]}
        tasks[-1]["annotations"][0]["result"].append({"id": f"r{index}", "type": "rectanglelabels", "value": value})
    path = folder / "project.json"
    path.write_text(json.dumps(tasks))
    return path


def write_labelme(folder: Path, shape: str = "rectangle") -> Path:
    for name, (width, height) in SIZES.items():
        shapes = []
        for kind, box in OBJECTS[name]:
            first, _, last, _ = corners(box)
            item = {"label": kind, "shape_type": shape, "points": [last, first]}  # drawn from its last corner
            if shape == "polygon":
                item["points"] = corners(box)
            elif shape == "mask":
                buffer = io.BytesIO()
                Image.fromarray(draw_mask(box)).convert("L").save(buffer, format="PNG")
                item = {**item, "points": [first, last], "mask": base64.b64encode(buffer.getvalue()).decode()}
            shapes.append(item)
        path = (folder / "labelme" / name).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        said = "..\\photos\\" + Path(name).name
        content = {"version": "5.4.1", "shapes": shapes, "imagePath": said, "imageWidth": width, "imageHeight": height}
        path.write_text(json.dumps(content))
    return folder / "labelme"


def write_via(folder: Path, is_project: bool) -> Path:
    photos: dict[str, Any] = {}
    for name, _, _, kind, box in walk():
        photo = photos.setdefault(f"{name}123", {"filename": name, "size": 123, "regions": [], "file_attributes": {}})
        shape = {"name": "rect", **dict(zip(("x", "y", "width", "height"), box, strict=True))}
        if is_project:
            xs, ys = zip(*corners(box), strict=True)
            shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
        photo["regions"].append({"shape_attributes": shape, "region_attributes": {"Class": kind, "note": "x"}})
    content = {"_via_settings": {}, "_via_img_metadata": photos, "_via_attributes": {}} if is_project else photos
    path = folder / "via.json"
    path.write_text(json.dumps(content))
    return path


def write_csv(folder: Path) -> Path:
    rows = [f"{name},{','.join(map(str, box))},{kind}" for name, _, _, kind, box in walk()]
    path = folder / "boxes.csv"
    path.write_text("image,x,y,width,height,class\n" + "\n".join(rows), encoding="utf-8")
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "coco": write_coco,
    "coco_polygons": lambda folder: write_coco(folder, "polygon"),
    "coco_rle": lambda folder: write_coco(folder, "rle"),
    "yolo": write_yolo,
    "yolo_obb": lambda folder: write_yolo(folder, "obb"),
    "yolo_segments": lambda folder: write_yolo(folder, "segment"),
    "cvat": write_cvat,
    "cvat_masks": lambda folder: write_cvat(folder, "mask"),
    "labelstudio": write_labelstudio,
    "labelme": write_labelme,
    "labelme_polygons": lambda folder: write_labelme(folder, "polygon"),
    "labelme_masks": lambda folder: write_labelme(folder, "mask"),
    "via_project": lambda folder: write_via(folder, is_project=True),
    "via_export": lambda folder: write_via(folder, is_project=False),
    "csv": write_csv,
}


def command(photos: Path, source: Path, out: Path, *flags: object) -> list[object]:
    return ["crop", "--images", photos, "--labels", source, "--out", out, *flags]


def read_records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "crops.jsonl").read_text().splitlines()]


def read_tree(out: Path) -> dict[str, bytes]:
    """Return what is in a folder but for the locks."""
    files = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def read_problems(out: Path) -> list[str]:
    return [f"{p['image']} {p['detection']} {p['reason']}" for p in json.loads((out / "problems.json").read_text())]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_crops(name: str, photos: Path, tmp_path: Path, call_main: Any) -> None:
    out = tmp_path / "data"
    assert call_main(*command(photos, FORMATS[name](tmp_path), out)) == 0
    assert read_problems(out) == []
    records = read_records(out)
    found = [(record["photo"], record["class"], [round(value) for value in record["box"]]) for record in records]
    assert found == [(photo, kind, list(box)) for photo, _, _, kind, box in walk()]
    for record in records:
        image = lct.load_image(photos / record["photo"])
        x, y, w, h = map(round, record["box"])
        jpeg = (out / record["file"]).read_bytes()
        assert jpeg == encode_jpeg(image[y : y + h, x : x + w])
        assert record["sha256"] == crop.hash_bytes(jpeg)
        if name in ("coco_rle", "cvat_masks", "labelme_masks"):
            mask = lct.decode_mask(lct.read_file(out / record["mask"]), is_alpha=False)
            assert (mask == draw_mask((x, y, w, h))).all()
    listing = lct.list_images(out)
    assert set(listing.classes.values()) == set(NAMES) and len(listing.paths) == 5 and not listing.problems


def test_labelme_files_lie_beside_the_photos_or_alone(photos: Path, tmp_path: Path, call_main: Any) -> None:
    source = write_labelme(tmp_path)
    for name in SIZES:
        path = photos / Path(name).with_suffix(".json")
        shutil.move((source / name).with_suffix(".json"), path)
        path.write_text(path.read_text().replace("..\\\\photos\\\\", ""))
    assert call_main(*command(photos, photos, tmp_path / "data")) == 0
    assert read_problems(tmp_path / "data") == [] and len(read_records(tmp_path / "data")) == 5
    assert call_main(*command(photos, photos / "bench" / "b 12.json", tmp_path / "one")) == 0
    assert read_problems(tmp_path / "one") == [] and len(read_records(tmp_path / "one")) == 2


@pytest.mark.parametrize("padding", [0.0, 0.13])
def test_crops_are_those_of_prelabel_bit_by_bit(padding: float, tmp_path: Path, call_main: Any) -> None:
    """Also from a photo that EXIF turns, and where boxes reach over its edges."""
    photos = tmp_path / "photos"
    photos.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_photo((320, 200), 3).save(photos / "turned.jpg", exif=exif)
    boxes = [[10.5, 20.5, 60.25, 70], [-5, 250.4, 90, 90], [150, -8.5, 60, 40.5]]
    polygon = [150, 5, 195, 5, 195, 30]
    annotations = [{"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes)]
    annotations[2]["segmentation"] = [polygon]
    images = [{"id": 1, "file_name": "turned.jpg", "width": 200, "height": 320}]
    source = tmp_path / "labels.json"
    categories = [{"id": 1, "name": "hammer"}]
    source.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    out = tmp_path / "data"
    assert call_main(*command(photos, source, out, "--box_pad", padding)) == 0
    options = prelabel.PrelabelOptions(images=photos, detections=source)
    detections = prelabel.read_detections(options)
    seen: list[tuple[np.ndarray, Any]] = []
    run = SimpleNamespace(
        transform=lambda: lambda pixels, mask, view: seen.append((pixels.copy(), mask)) or pixels,
        config=SimpleNamespace(crop_mode="mix", img_size=32, image_bits=()),
    )
    dataset = prelabel.DetectionDataset(detections, run, padding)
    _, cut = dataset[prelabel.plan_units(detections)[0]]
    records = read_records(out)
    assert [record["box"] for record in records] == [list(box) for _, box, _ in cut.objects]
    for record, (pixels, mask) in zip(records, seen, strict=True):
        assert (out / record["file"]).read_bytes() == encode_jpeg(pixels)
        written = np.asarray(Image.open(io.BytesIO(encode_jpeg(pixels))))
        assert np.abs(written.astype(int) - pixels).mean() < 3
        if record["mask"]:
            assert (lct.decode_mask(lct.read_file(out / record["mask"]), is_alpha=False) == (mask > 127)).all()
    assert [bool(record["mask"]) for record in records] == [False, False, True]


def test_corrected_labels_move_add_and_remove(photos: Path, tmp_path: Path, call_main: Any, capsys: Any) -> None:
    source, out = write_coco(tmp_path), tmp_path / "data"
    assert call_main(*command(photos, source, out)) == 0
    assert "5 added, 0 removed, 0 moved" in capsys.readouterr().out
    before = {record["id"]: record for record in read_records(out)}
    content = json.loads(source.read_text())
    content["annotations"][0]["category_id"] = 9  # a hammer that is pliers
    content["annotations"][1]["bbox"] = [310, 40, 140, 180]  # drawn anew
    del content["annotations"][2]
    # Right of and below the one that is gone: another object, though both sides of their overlap are negative.
    content["annotations"].append({"id": 77, "image_id": 1, "category_id": 7, "bbox": [300, 380, 50, 60]})
    # Listed first, and half over an earlier box: that box is nearer to the one that was drawn anew.
    content["annotations"].insert(0, {**content["annotations"][1], "id": 78, "bbox": [330, 40, 145, 180]})
    source.write_text(json.dumps(content))
    assert call_main(*command(photos, source, out)) == 0
    assert "2 added, 1 removed, 1 moved, 1 cut anew" in capsys.readouterr().out
    after = {record["id"]: record for record in read_records(out)}
    assert (
        after[1]["file"] == before[1]["file"].replace("hammer", "pliers") and after[1]["sha256"] == before[1]["sha256"]
    )
    assert after[2]["file"] == before[2]["file"] and after[2]["sha256"] != before[2]["sha256"]
    assert after[77]["file"] == "hammer/cropped/a_5.jpg"
    on_disk = {name for name in read_tree(out) if name.endswith(".jpg")}
    assert on_disk == {record["file"] for record in after.values()}
    stamp = (out / after[4]["file"]).stat().st_mtime_ns
    assert call_main(*command(photos, write_cvat(tmp_path), out)) == 0  # the labels as they were, of another tool
    assert "1 added, 2 removed, 1 moved, 1 cut anew" in capsys.readouterr().out
    assert (out / after[4]["file"]).stat().st_mtime_ns == stamp


def test_a_mask_that_was_drawn_later_moves_with_its_crop(photos: Path, tmp_path: Path, call_main: Any) -> None:
    """SAM-2, or a person, draws masks beside crops; when the label is corrected, they belong to the crop still."""
    source, out = write_coco(tmp_path), tmp_path / "data"
    assert call_main(*command(photos, source, out)) == 0
    moving, staying = ({record["id"]: record for record in read_records(out)}[number] for number in (1, 4))
    drawn = {}
    for record in (moving, staying):
        path = (out / record["file"]).parents[1] / "masks" / f"{Path(record['file']).stem}_mask.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", record["box"][2:], 255).save(path)
        drawn[record["id"]] = path, path.read_bytes()
    content = json.loads(source.read_text())
    content["annotations"][0]["category_id"] = 9
    source.write_text(json.dumps(content))
    assert call_main(*command(photos, source, out)) == 0
    moved = {record["id"]: record for record in read_records(out)}[1]
    assert moved["class"] == "pliers" and (out / moved["mask"]).read_bytes() == drawn[1][1]
    assert not drawn[1][0].exists() and drawn[4][0].read_bytes() == drawn[4][1]
    content["annotations"][0]["category_id"] = 7
    source.write_text(json.dumps(content))
    assert call_main(*command(photos, source, out)) == 0
    assert drawn[1][0].read_bytes() == drawn[1][1] and not (out / moved["mask"]).exists()


def test_a_mask_moves_nowhere_if_another_mask_lies_there(
    photos: Path, tmp_path: Path, call_main: Any, capsys: Any
) -> None:
    """The class changes with the box, so its mask stays behind; then the class changes back, and the new mask meets it."""
    source, out, drawn = tmp_path / "boxes.csv", tmp_path / "data", {}
    for name, width in (("pliers", 100), ("hammer", 90), ("pliers", 90)):
        source.write_text(f"image,x,y,width,height,class\na.jpg,20,20,{width},80,{name}\n")
        assert call_main(*command(photos, source, out)) == 0
        path = out / name / "masks" / "a_1_mask.png"
        if path not in drawn:
            path.parent.mkdir()
            Image.new("L", (width, 80), 255).save(path)
            drawn[path] = path.read_bytes()
    assert [record["file"] for record in read_records(out)] == ["pliers/cropped/a_1.jpg"]
    assert {path: path.read_bytes() for path in drawn if path.exists()} == drawn and len(drawn) == 2
    assert "whose mask someone else has drawn, which is kept" in capsys.readouterr().out


def test_labels_of_boxes_alone_take_no_mask_away(photos: Path, tmp_path: Path, call_main: Any, capsys: Any) -> None:
    """Annotation tools give boxes back for masks."""
    out = tmp_path / "data"
    assert call_main(*command(photos, write_coco(tmp_path, "rle"), out)) == 0
    source = write_cvat(tmp_path)
    source.write_text(source.read_text(encoding="utf-8").replace("ключ", "pliers"), encoding="utf-8")
    masks = {record["photo"] + str(record["box"]): (out / record["mask"]).read_bytes() for record in read_records(out)}
    capsys.readouterr()
    assert call_main(*command(photos, source, out)) == 0
    assert "5 with a mask" in (text := capsys.readouterr().out) and "2 moved, 0 cut anew" in text
    assert not (out / "ключ").exists()
    for record in read_records(out):
        assert (out / record["mask"]).read_bytes() == masks[record["photo"] + str(list(map(round, record["box"])))]
        assert record["mask"].startswith(record["class"])
    source = write_cvat(tmp_path)
    source.write_text(source.read_text(encoding="utf-8").replace('xtl="20"', 'xtl="25"'), encoding="utf-8")
    assert call_main(*command(photos, source, out)) == 0
    assert "4 with a mask" in capsys.readouterr().out  # the mask of another box is none of this one


def test_round_trip_moves_exactly_what_was_corrected(tmp_path: Path, call_main: Any, capsys: Any) -> None:
    """Photos -> crops -> a run -> pre-labels -> five corrections in two tools' files -> five moves."""
    photos, out, run = tmp_path / "photos", tmp_path / "data", tmp_path / "run"
    photos.mkdir()
    rows = ["image,x,y,width,height,class"]
    for number in range(16):
        photo = draw_photo((300, 240), number)
        for index in range(4):
            kind = (number + index) % 3
            x, y = 10 + index % 2 * 140 + number % 5, 8 + index // 2 * 115
            photo.paste(draw_image(kind, number, index, side=70), (x, y))
            rows.append(f"shot_{number}.jpg,{x + 0.5},{y},69.5,70.5,{NAMES[kind]}")
        photo.save(photos / f"shot_{number}.jpg", quality=95)
    source = tmp_path / "boxes.csv"
    source.write_text("\n".join(rows), encoding="utf-8")
    assert call_main(*command(photos, source, out)) == 0
    train = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(train)
    assert words[:2] == ["python", "lct_dino3.py"]
    words[words.index("--out_dir") + 1] = str(run)
    assert call_main(*words[2:], *TINY_RUN, "--val_split", "0.25") == 0
    assert json.loads((run / "data_report.json").read_text())["warnings"] == []  # of the tool's own files neither
    groups = lct.group_keys([Path(r["file"]).name for r in read_records(out)], words[words.index("--group_regex") + 1])
    assert len(set(groups.tolist())) == 16
    labelled = tmp_path / "labels"
    machine = ("--gpus", "0", "--workers", "0")
    assert (
        call_main("prelabel", "--run", run, "--images", photos, "--detections", source, "--out", labelled, *machine)
        == 0
    )
    coco = json.loads((labelled / "coco/annotations/instances_default.json").read_text())
    tasks = json.loads((labelled / "labelstudio/tasks.json").read_text())
    names = {item["id"]: item["name"] for item in coco["categories"]}
    regions = [region for task in tasks for region in task["predictions"][0]["result"]]
    order = {(r["photo"], tuple(r["box"])): r["class"] for r in read_records(out)}
    images = {item["id"]: item["file_name"] for item in coco["images"]}
    for item, region in zip(coco["annotations"], regions, strict=True):  # a person confirms or corrects every answer
        name = order[images[item["image_id"]], tuple(item["bbox"])]
        item["category_id"] = next(number for number, word in names.items() if word == name)
        region["value"]["rectanglelabels"] = [name]
    assert len(regions) == len(rows) - 1 == 64
    capsys.readouterr()
    for index in (3, 17, 30, 31, 59):
        old = regions[index]["value"]["rectanglelabels"][0]
        new = NAMES[(NAMES.index(old) + 1) % 3]
        regions[index]["value"]["rectanglelabels"] = [new]
        coco["annotations"][index]["category_id"] = next(number for number, word in names.items() if word == new)
    for task in tasks:
        image = task["data"]["image"]
        task["data"]["image"] = re.sub(r"\?d=photos/", "?d=", image)
        task["annotations"] = task.pop("predictions")
    (tmp_path / "corrected.json").write_text(json.dumps(coco))
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    assert call_main(*command(photos, tmp_path / "corrected.json", out)) == 0
    assert "0 added, 0 removed, 5 moved, 0 cut anew" in capsys.readouterr().out
    assert call_main(*command(photos, tmp_path / "tasks.json", out)) == 0
    assert "0 added, 0 removed, 0 moved, 0 cut anew" in capsys.readouterr().out
    assert call_main(*command(photos, source, out)) == 0
    assert "0 added, 0 removed, 5 moved, 0 cut anew" in capsys.readouterr().out


def test_what_a_person_has_done_stays(photos: Path, tmp_path: Path, call_main: Any, capsys: Any) -> None:
    source, out = write_coco(tmp_path, "rle"), tmp_path / "data"
    assert call_main(*command(photos, source, out)) == 0
    records = {record["id"]: record for record in read_records(out)}
    edited, deleted, mask_edited, removed = (records[number] for number in (1, 2, 3, 4))
    Image.new("RGB", (9, 9)).save(out / edited["file"])
    (out / deleted["file"]).unlink()
    Image.new("L", (180, 44), 255).save(out / mask_edited["mask"])
    Image.new("RGB", (8, 8)).save(out / removed["file"])
    foreign = out / "pliers/cropped" / Path(records[5]["file"]).name.replace("_2", "_3")
    foreign.write_bytes(b"mine")
    touched = {path: (out / path).read_bytes() for path in (edited["file"], mask_edited["file"], mask_edited["mask"])}
    capsys.readouterr()
    content = json.loads(source.read_text())
    for item in content["annotations"][:3]:
        item["category_id"] = 9
    content["annotations"][3] = {"id": 8, "image_id": 2, "category_id": 9, "bbox": [350, 10, 40, 30]}
    source.write_text(json.dumps(content))
    for _ in range(2):
        assert call_main(*command(photos, source, out)) == 0
        text = capsys.readouterr().out
        for record, words in ((edited, "the labels now say pliers"), (mask_edited, "the labels now say pliers")):
            assert f"{record['file']} that was edited by hand and is kept; {words}" in text
        assert f"{deleted['file']} that was removed by hand and stays so; the labels now say pliers" in text
        assert f"{removed['file']} that was edited by hand and is kept; the labels no longer have it" in text
        assert {path: (out / path).read_bytes() for path in touched} == touched
        assert foreign.read_bytes() == b"mine" and not (out / deleted["file"]).exists()
        assert (out / removed["file"]).exists()
        fresh = next(record for record in read_records(out) if record["id"] == 8)
        assert fresh["file"] == "pliers/cropped/bench__b 12_4.jpg" and (out / fresh["file"]).exists()


def test_a_crop_that_is_put_back_counts_and_one_off_the_list_is_cut_again(
    photos: Path, tmp_path: Path, call_main: Any, capsys: Any
) -> None:
    source, out = write_coco(tmp_path), tmp_path / "data"
    assert call_main(*command(photos, source, out)) == 0
    before = read_tree(out)
    file = out / read_records(out)[0]["file"]
    for content, count in ((b"", "4 crops,"), (before[file.relative_to(out).as_posix()], "5 crops,")):
        file.write_bytes(content) if content else file.unlink()
        capsys.readouterr()
        assert call_main(*command(photos, source, out)) == 0
        assert count in capsys.readouterr().out
    assert read_tree(out) == before
    (out / "crops.jsonl").write_bytes(before["crops.jsonl"].partition(b"\n")[2])
    file.unlink()
    assert call_main(*command(photos, source, out)) == 0
    assert "5 crops, 0 with a mask, 0 of no class: 1 added" in capsys.readouterr().out
    assert all((out / record["file"]).is_file() for record in read_records(out))


def test_a_folder_does_not_go_while_another_photo_moves_a_crop_into_it(
    photos: Path, tmp_path: Path, call_main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "boxes.csv", tmp_path / "data"
    real = lct.write_bytes

    def write_late(path: Path, data: bytes) -> None:
        deadline = time.monotonic() + 0.5
        while path.parent == out / "bolt/cropped" and path.parent.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        real(path, data)

    for folders in (("nut", "bolt"), ("bolt", "nut")):
        rows = zip(SIZES, folders, strict=True)
        source.write_text(
            "image,x,y,width,height,class\n" + "".join(f"{photo},9,9,50,50,{name}\n" for photo, name in rows)
        )
        assert call_main(*command(photos, source, out)) == 0
        assert {record["file"].split("/")[0] for record in read_records(out)} == {"nut", "bolt"}
        monkeypatch.setattr(lct, "write_bytes", write_late)


def test_a_mask_that_someone_has_drawn_stays(photos: Path, tmp_path: Path, call_main: Any, capsys: Any) -> None:
    out = tmp_path / "data"
    assert call_main(*command(photos, write_coco(tmp_path), out)) == 0
    record = read_records(out)[0]
    drawn = out / "hammer/masks" / f"{Path(record['file']).stem}_mask.png"
    drawn.parent.mkdir()
    drawn.write_bytes(b"drawn")
    capsys.readouterr()
    assert call_main(*command(photos, write_coco(tmp_path, "rle"), out)) == 0
    assert "whose mask someone else has drawn, which is kept" in capsys.readouterr().out
    assert drawn.read_bytes() == b"drawn"
    assert [bool(record["mask"]) for record in read_records(out)] == [False, True, True, True, True]


@pytest.mark.parametrize("function", ["lct.atomic_file", "lct.LineFile.append", "Path.unlink"])
def test_killed_and_started_again_it_goes_on(
    function: str, photos: Path, tmp_path: Path, nursery: Nursery, call_main: Any
) -> None:
    """Wherever it is killed, in the first call or in one with corrected labels, or before a mask: the end is the same."""
    for copy in range(20):  # several portions
        shutil.copy(photos / "a.jpg", photos / f"c{copy:02}.jpg")
    names = ["a.jpg", *(f"c{copy:02}.jpg" for copy in range(20))]
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    triangles = [[value for corner in corners(box)[:3] for value in corner] for _, box in OBJECTS["a.jpg"]]
    annotations = [
        {"id": 3 * n + k, "image_id": n, "category_id": (n + k) % 2, "segmentation": [list(triangle)]}
        for n in range(len(names))
        for k, triangle in enumerate(triangles)
    ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": NAMES[n]} for n in (0, 1)],
    }
    first, second, third = (tmp_path / f"{name}.json" for name in ("first", "second", "third"))
    first.write_text(json.dumps(content))
    for item in annotations[::7]:
        item["category_id"] = 1 - item["category_id"]
    for item in annotations[1::5]:
        item["segmentation"][0][2] += 6  # is redrawn
    del annotations[4::11]
    second.write_text(json.dumps(content))
    for item in annotations:  # come back as boxes, without their masks
        left, top, right, _, _, bottom = item.pop("segmentation")[0]
        item["bbox"] = [left, top, right - left, bottom - top]
    for item in annotations[::4]:
        item["category_id"] = 1 - item["category_id"]
    for item in annotations[2::9]:
        item["bbox"][2] += 5
    third.write_text(json.dumps(content))
    whole, broken = tmp_path / "whole" / "data", tmp_path / "broken" / "data"
    for out in (whole, broken):
        out.parent.mkdir()
    for source in (first, second, third):
        assert call_main(*command(photos, source, whole)) == 0
        for nth in (1, 4, 6, 9):
            code, _ = nursery.run(*command(photos, source, broken), plans=[kill(function, nth)])
            assert code == -9 or (code == 0 and nth > 1)  # fewer calls were left
            assert not any(path.suffix == ".jpg" and path.stat().st_size == 0 for path in broken.rglob("*"))
        assert call_main(*command(photos, source, broken)) == 0
        assert read_tree(broken) == read_tree(whole)


def test_killed_then_corrected_nothing_is_left_of_the_first_labels(
    photos: Path, tmp_path: Path, nursery: Nursery, call_main: Any
) -> None:
    source, out, whole = write_coco(tmp_path), tmp_path / "broken" / "data", tmp_path / "whole" / "data"
    for folder in (out, whole):
        folder.parent.mkdir()
    code, _ = nursery.run(*command(photos, source, out), plans=[kill("lct.atomic_file", 5)])
    assert code == -9 and not (out / "crops.jsonl").exists() and any(out.rglob("*.jpg"))
    original = (photos / "a.jpg").read_bytes()
    draw_photo((640, 480), 99).save(photos / "a.jpg")  # the next day's a.jpg
    assert call_main(*command(photos, source, out)) == 2
    (photos / "a.jpg").write_bytes(original)
    content = json.loads(source.read_text())
    for item in content["annotations"]:
        item["category_id"] = 9
    source.write_text(json.dumps(content))
    assert call_main(*command(photos, source, out)) == 0
    assert call_main(*command(photos, source, whole)) == 0
    assert read_tree(out) == read_tree(whole)


def test_a_mask_that_a_person_removed_stays_removed_after_a_kill(
    photos: Path, tmp_path: Path, nursery: Nursery, call_main: Any, capsys: Any
) -> None:
    source, out = write_coco(tmp_path, "rle"), tmp_path / "data"
    assert call_main(*command(photos, source, out)) == 0
    removed, moved = (out / record["mask"] for record in read_records(out)[:2])
    removed.unlink()
    content = json.loads(source.read_text())
    content["annotations"][1]["category_id"] = 9
    source.write_text(json.dumps(content))
    code, _ = nursery.run(*command(photos, source, out), plans=[kill("lct.atomic_file", 2)])
    assert code == -9
    assert call_main(*command(photos, source, out)) == 0
    assert not removed.exists() and not moved.exists() and (out / "pliers" / "masks" / moved.name).is_file()
    assert "was edited by hand and is kept" in capsys.readouterr().out


def test_names_are_flat_and_nobody_elses(tmp_path: Path, call_main: Any, capsys: Any) -> None:
    photos = tmp_path / "photos"
    long = "d" * 120
    names = [
        "a/b.jpg",
        "a__b.jpg",
        "A__B.png",
        "x.jpg",
        "x_1.jpg",
        "x_1_2.jpg",
        f"{long}/{long}.jpg",
        f"{long}/{long}.png",
    ]
    rows = ["image,x,y,width,height,class"]
    for seed, name in enumerate(names):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        draw_photo((90, 80), seed).save(photos / name)
        rows += [f"{name},{5 * n},{6 * n},30,{20 + n},hammer" for n in range(12)]
    source, out = tmp_path / "boxes.csv", tmp_path / "data"
    source.write_text("\n".join(rows))
    assert call_main(*command(photos, source, out)) == 0
    train = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    records = read_records(out)
    assert len({record["file"].lower() for record in records}) == len(records) == 12 * len(names)
    keys = lct.group_keys([record["file"] for record in records], train[train.index("--group_regex") + 1])
    groups = {(record["photo"], key) for record, key in zip(records, keys.tolist(), strict=True)}
    assert len(groups) == len({key for _, key in groups}) == len(names)
    files = {record["file"] for record in records}
    (photos / "0").mkdir()
    shutil.copy(photos / "x.jpg", photos / "0" / "a__b.jpg")
    (photos / "x.png").write_bytes((photos / "A__B.png").read_bytes())
    source.write_text("\n".join([rows[0], "x.png,1,1,20,20,hammer", *rows[1:]]))
    assert call_main(*command(photos, source, out)) == 0  # a new photo takes no name that another one has
    assert {record["file"] for record in read_records(out)} > files


def test_class_names_become_safe_folders(photos: Path, tmp_path: Path, call_main: Any) -> None:
    names = ["a/b", "..", ".hidden", "../../etc", "tab\tline\n", "ключ й", "😀 \\ x", "hammer "]
    rows = "".join(f'"a.jpg",{10 * n},10,30,30,"{name}"\n' for n, name in enumerate(names))
    source, out = tmp_path / "boxes.csv", tmp_path / "deep" / "data"
    source.write_text("image,x,y,width,height,class\n" + rows, encoding="utf-8")
    assert call_main(*command(photos, source, out)) == 0
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {"a_b", "__", "_hidden", "___.._etc", "tab_line", "ключ й", "😀 _ x", "hammer"}
    assert lct.list_images(out).problems == [] and len(lct.list_images(out).paths) == len(names)
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"data"}


def test_unknown_classes_lie_beside_the_data(photos: Path, tmp_path: Path, call_main: Any, capsys: Any) -> None:
    source, out = write_coco(tmp_path, "rle"), tmp_path / "data"
    assert call_main(*command(photos, source, out, "--unknown", "pliers", "no such")) == 0
    text = capsys.readouterr().out
    assert "warning: --unknown 'no such': no object is of such a class" in text
    assert text.strip().endswith(f"--unknown_dir {tmp_path / 'data_unknown'}")
    assert set(lct.list_images(out).classes.values()) == {"hammer", "ключ"}
    assert lct.list_image_tree(tmp_path / "data_unknown").paths == ["pliers/bench__b 12_2.jpg"]
    assert call_main(*command(photos, source, out)) == 0
    assert "0 added, 0 removed, 1 moved" in capsys.readouterr().out
    assert not (tmp_path / "data_unknown").exists() and len(lct.list_images(out).paths) == 5


def test_unknown_crops_alone_are_explained(photos: Path, tmp_path: Path, call_main: Any, capsys: Any) -> None:
    """Either there is no other class, or its objects cannot be cut."""
    for rows, words in (
        ("a.jpg,9,9,50,50,pliers", "all labels are of --unknown"),
        ("a.jpg,9,9,50,50,pliers\na.jpg,900,9,50,50,hammer", "a.jpg (line 3) has a box outside"),
    ):
        source = tmp_path / "boxes.csv"
        source.write_text(f"image,x,y,width,height,class\n{rows}\n")
        assert call_main(*command(photos, source, tmp_path / "data", "--unknown", "pliers")) == 2
        text = capsys.readouterr().err
        assert words in text and ("name fewer classes" in text) == ("--unknown" in words), text


def test_problems_are_named_one_by_one(photos: Path, tmp_path: Path, call_main: Any, capsys: Any) -> None:
    (photos / "c.gif").write_bytes(b"GIF89a")
    (photos / "bench" / "film.mp4").write_bytes(b"x")
    os.mkfifo(photos / "pipe.jpg")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no")
    draw_photo((50, 40), 1).save(photos / "other size.png")
    content = json.loads(write_coco(tmp_path).read_text())
    content["images"] += [
        {"id": 5, "file_name": "broken.jpg"},
        {"id": 6, "file_name": "other size.png", "width": 41, "height": 50},
        {"id": 7, "file_name": "c.gif"},
    ]
    odd = [
        ({"image_id": 5, "bbox": [1, 1, 5, 5]}, "broken.jpg None cannot be read"),
        ({"image_id": 6, "bbox": [1, 1, 5, 5]}, "other size.png None is 50 x 40 px, but 41 x 50 px in the labels"),
        ({"image_id": 1, "bbox": [900, 1, 5, 5]}, "a.jpg 102 has a box outside its image"),
        ({"image_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 1}, "a.jpg 103 is a crowd of objects"),
        (
            {"image_id": 1, "bbox": [1, 1, 9, 9], "segmentation": {"size": [1, 1], "counts": [1]}},
            "a.jpg 104 has a mask of",
        ),
    ]
    categories = [{"category_id": 7} for _ in odd]
    for number, ((item, _), category) in enumerate(zip(odd, categories, strict=True), 100):
        content["annotations"].append({"id": number, **category, **item})
    source, out = tmp_path / "odd.json", tmp_path / "data"
    source.write_text(json.dumps(content))
    for _ in range(2):  # a second call knows them too
        assert call_main(*command(photos, source, out)) == 0
        text = capsys.readouterr().out
        assert "passed over, as they are no images: 1 .gif, 1 .mp4" in text and f"{len(odd) + 2} problems" in text
        problems = read_problems(out)
        assert len(problems) == len(odd) + 2
        for start in ("c.gif", "pipe.jpg", *(words for _, words in odd)):
            assert any(problem.startswith(start) for problem in problems), (start, problems)
        assert len(read_records(out)) == 6


ATOMS = [None, True, -1, 0, 2.5, 10**30, 1e308, float("nan"), "", "x", "\ud800", [], {}, [[]], [1, 2], {"a": 1}, "../x"]


def damage(value: Any, rng: np.random.Generator) -> Any:
    """Return a value of JSON in which some things are others, or missing."""
    if rng.random() < 0.03:
        return ATOMS[rng.integers(len(ATOMS))]
    if isinstance(value, dict):
        return {key: damage(item, rng) for key, item in value.items() if rng.random() > 0.02}
    return [damage(item, rng) for item in value if rng.random() > 0.02] if isinstance(value, list) else value


def test_damaged_labels_cost_objects_or_one_sentence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {name: np.zeros((height, width, 3), np.uint8) for name, (width, height) in SIZES.items()}
    num_cut = 0
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = list(FORMATS.values())[number % len(FORMATS)](folder)
        for path in [source] if source.is_file() else sorted(source.rglob("*.*")):
            if path.suffix == ".json":
                path.write_text(json.dumps(damage(json.loads(path.read_text()), rng)))
            else:
                data = bytearray(path.read_bytes())
                data[rng.integers(len(data))] = rng.integers(256)
                path.write_bytes(data)
        try:
            found = labels.read_labels(source, list(SIZES))
        except labels.LabelError:
            continue
        for image, text in found.objects:
            try:
                detection = json.loads(text)
                find_class_name(found.class_names, detection.get("category_id"))
                geometry.cut_object(images[list(SIZES)[found.images[image]]], detection, 0.1, with_mask=True)
                num_cut += 1
            except geometry.BoxError as error:
                assert str(error)
    assert num_cut > 300


def no_names(folder: Path) -> Path:
    source = write_yolo(folder)
    (source / "classes.txt").unlink()
    return source


def no_names_but(description: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        source = no_names(folder)
        data = description if isinstance(description, bytes) else description.encode()
        (source / "data.yaml").write_bytes(data)
        return source

    return write


def collide(folder: Path) -> Path:
    names = [{"id": 7, "name": "a/b"}, {"id": 8, "name": "a_b"}, {"id": 9, "name": "c"}]
    return write_coco(folder, categories=names)


def write_text(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "labels.json"
        path.write_text(text)
        return path

    return write


MISTAKES = [
    (no_names, "says nowhere what its classes are called\n"),
    (
        no_names_but('path: "C:\\data\\tools"\nnames: [hammer]\n'),
        "data.yaml cannot be read: while scanning a double-quoted",
    ),
    (no_names_but("names: [молоток]\n".encode("cp1251")), "data.yaml cannot be read: 'utf-8' codec"),
    (lambda folder: next(write_yolo(folder).rglob("*.txt")), "is one file of a folder of YOLO"),
    (lambda folder: no_names_but("names: [hammer]\n")(folder) / "data.yaml", "is one file of a folder of YOLO"),
    (lambda folder: shutil.make_archive(folder / "a", "zip", write_yolo(folder)), "is a packed export"),
    (lambda folder: write_coco(folder, categories=[]), "categor"),
    (collide, "has the classes 'a/b' and 'a_b', whose crops would go to one folder a_b"),
    (lambda folder: folder / "not there", "does not exist"),
    (write_text(""), "the file is empty"),
    (write_text('{"project": {}, "metadata": {}, "view": {}}'), "is a project of VIA 3"),
    (
        write_text('{"x": {"filename": "a.jpg", "regions": [{"region_attributes": {"p": "1", "q": "2"}}]}}'),
        "attributes p, q",
    ),
    (write_text('{"shapes": [], "imagePath": "a.jpg"}'), "holds no object of a class"),
    (lambda folder: (folder / "empty").mkdir() or folder / "empty", "has no .txt of these images"),
]


@pytest.mark.parametrize(("write", "words"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_cost_one_sentence(
    write: Callable[[Path], Path], words: str, photos: Path, tmp_path: Path, call_main: Any, capsys: Any
) -> None:
    out = tmp_path / "data"
    assert call_main(*command(photos, write(tmp_path), out)) == 2
    text = capsys.readouterr().err
    assert words in text and text.count("\n") <= 2, text
    assert not out.exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("photos/data", "lies inside --images"),
        (".", "holds --images"),
        ("full", "is neither empty nor made by this tool"),
        ("taken", "taken_unknown is neither empty nor made by this tool"),
        ("labels.json", "is a file, not a folder"),
    ],
)
def test_out_is_a_folder_of_its_own(
    place: str, words: str, photos: Path, tmp_path: Path, call_main: Any, capsys: Any
) -> None:
    source = write_coco(tmp_path)
    for folder in ("full", "taken_unknown"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.txt").write_text("mine")
    before = read_tree(tmp_path)
    assert call_main(*command(photos, source, tmp_path / place)) == 2
    assert words in capsys.readouterr().err
    assert read_tree(tmp_path) == before


def test_another_photo_with_as_many_bytes_is_not_taken_for_the_first(
    photos: Path, tmp_path: Path, call_main: Any, capsys: Any
) -> None:
    """As cameras write BMP."""
    source, out = write_coco(tmp_path), tmp_path / "data"
    Image.open(photos / "a.jpg").save(photos / "a.bmp")
    (photos / "a.jpg").unlink()
    source.write_text(source.read_text().replace("a.jpg", "a.bmp"))
    assert call_main(*command(photos, source, out)) == 0
    before = read_tree(out)
    os.utime(photos / "a.bmp")  # a copy of the photo is the photo
    assert call_main(*command(photos, source, out)) == 0
    draw_photo((640, 480), 99).save(photos / "a.bmp")
    capsys.readouterr()
    assert call_main(*command(photos, source, out)) == 2
    assert "is not the photo that was cut before: it has as many bytes" in capsys.readouterr().err
    assert read_tree(out).items() >= {key: before[key] for key in before if key.endswith((".jpg", ".png"))}.items()


def test_a_photo_that_was_still_being_copied_is_the_photo_that_was_cut(
    photos: Path, tmp_path: Path, call_main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_coco(tmp_path), tmp_path / "data"
    whole = (photos / "a.jpg").read_bytes()
    (photos / "a.jpg").write_bytes(whole[:1000])
    cut_photos = crop.cut_photos

    def finish_copy(*arguments: Any) -> Any:
        (photos / "a.jpg").write_bytes(whole)
        return cut_photos(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(crop, "cut_photos", finish_copy)
        assert call_main(*command(photos, source, out)) == 0
    crops = read_tree(out / "hammer")
    assert call_main(*command(photos, source, out)) == 0
    assert read_tree(out / "hammer") == crops


def test_refusals_of_a_second_call(photos: Path, tmp_path: Path, call_main: Any, capsys: Any) -> None:
    source, out = write_coco(tmp_path), tmp_path / "data"
    assert call_main(*command(photos, source, out)) == 0
    before = read_tree(out)
    original = (photos / "a.jpg").read_bytes()
    draw_photo((640, 480), 99).save(photos / "a.jpg")  # the next day's a.jpg
    assert call_main(*command(photos, source, out)) == 2
    assert "is not the photo that was cut before" in capsys.readouterr().err
    (photos / "a.jpg").write_bytes(original)
    record = json.loads((out / "crops.jsonl").read_text().splitlines()[0])
    for damage in ({**record, "file": "../photos/a_1.jpg"}, {**record, "box": [1]}, {"photo": "a.jpg"}, [1], 7):
        (out / "crops.jsonl").write_text(json.dumps(damage) + "\n")
        assert call_main(*command(photos, source, out)) == 2
        assert "line 1 is damaged" in capsys.readouterr().err
    assert {**read_tree(out), "crops.jsonl": b""} == {**before, "crops.jsonl": b""}
    (out / "crops.jsonl").write_bytes(before["crops.jsonl"])
    (out / "мой").mkdir()
    Image.new("RGB", (9, 9)).save(out / "мой" / "1.png")
    content = json.loads(source.read_text())
    content["categories"][0]["name"] = "мой"
    source.write_text(json.dumps(content))
    assert call_main(*command(photos, source, out)) == 2
    assert "which a folder cropped in it would hide" in capsys.readouterr().err


def test_photos_that_the_labels_do_not_name_keep_their_crops(
    photos: Path, tmp_path: Path, call_main: Any, capsys: Any
) -> None:
    out = tmp_path / "data"
    assert call_main(*command(photos, write_coco(tmp_path), out)) == 0
    content = json.loads((tmp_path / "labels.json").read_text())
    content["images"] = content["images"][1:]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert call_main(*command(photos, tmp_path / "labels.json", out)) == 0
    text = capsys.readouterr().out
    assert "crops of photos that these labels do not name, which stay: 3" in text and "0 removed" in text
    assert len(read_records(out)) == 5


def test_class_names_of_yolo_are_found_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "train" / "labels").mkdir(parents=True)
    folder = tmp_path / "train" / "labels"
    assert label_yolo.read_yolo_names(folder) == {}
    (tmp_path / "data.yaml").write_text("names: [no, 'on', 007, null, ключ]\n", encoding="utf-8")
    assert label_yolo.read_yolo_names(folder) == {"0": "no", "1": "on", "2": "007", "3": "null", "4": "ключ"}
    (folder / "classes.txt").write_text("\ufeffhammer\r\n\r\npliers\r\n\r\n", encoding="utf-8")
    assert label_yolo.read_yolo_names(folder) == {"0": "hammer", "1": "", "2": "pliers"}
    (folder / "classes.txt").unlink()
    (folder / "data.yaml").write_text("names: " + "[" * 5000)
    assert label_yolo.read_yolo_names(folder)["4"] == "ключ"


def test_photos_of_12_bits_are_scaled_by_them(tmp_path: Path, call_main: Any, capsys: Any) -> None:
    import cv2

    shades = np.linspace(0, 255, 96 * 64).reshape(64, 96, 1).repeat(3, axis=2).round()
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/a.png"), (shades * 4095 / 255).round().astype(np.uint16))
    labelled = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "ramp"}]}
    labelled["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 96, 64]}]
    (tmp_path / "labels.json").write_text(json.dumps(labelled))
    for bits, error in ((("--image_bits", 16), 255 * 15 / 16), ((), 0)):  # the second call cuts the photo anew
        words = command(tmp_path / "photos", tmp_path / "labels.json", tmp_path / "data", *bits)
        assert call_main(*words) == 0
        (path,) = (tmp_path / "data").rglob("*.jpg")
        difference = shades - lct.load_image(path)
        assert abs(difference.max() - error) < 5
    said = "".join(capsys.readouterr())
    assert "1 image has more than 8 bits a channel, of which 12 are used" in said
    assert "--image_bits 12" in said.splitlines()[-1]  # training hands it on to prelabel, which sees photos again


@pytest.mark.skipif(not (SHARED_DATA / "tools17").is_dir(), reason="needs ../shared/data")
def test_real_crops_come_back_out_of_photos(tmp_path: Path, call_main: Any) -> None:
    """Photos that are put together of real crops: what is cut out of them is what was put in."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rows, put_in = ["image,x,y,width,height,class"], []
    files = sorted((SHARED_DATA / "tools17").glob("*/cropped/*.jpg"))[::60]
    for number, path in enumerate(files):
        picture = Image.open(path).convert("RGB")
        photo = draw_photo((picture.width + 60, picture.height + 50), number)
        photo.paste(picture, (31, 17))
        photo.save(photos / f"{number}.png")
        rows.append(f"{number}.png,31,17,{picture.width},{picture.height},{path.parent.parent.name}")
        put_in.append(np.asarray(picture))
    source, out = tmp_path / "boxes.csv", tmp_path / "data"
    source.write_text("\n".join(rows))
    assert call_main(*command(photos, source, out)) == 0
    for record in read_records(out):
        was = put_in[int(Path(record["photo"]).stem)]
        assert np.abs(lct.load_image(out / record["file"]).astype(int) - was).mean() < 2.5


def test_help_lists_its_own_options(call_main: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run_main("crop", "--help")
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--images", "--labels", "--box_pad", "--unknown")) and "--epochs" not in text
