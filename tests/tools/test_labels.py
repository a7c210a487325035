"""tools/labels.py: boxes and masks of every kind mean the same pixels; what is wrong with a file is said in one sentence."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import geometry
import label_objects
import label_writers
import label_yolo
import labels
import numpy as np
import pytest
from conftest import REPO
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
def test_run_lengths_and_polygons_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = rng.integers(1, 40, 2)
        mask = rng.random((height, width)) < rng.random()
        packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = packed["counts"].decode()
        size, window = (int(width), int(height)), (width // 3, height // 4, int(width), height // 4 + 1)
        part = geometry.read_segmentation({"size": [height, width], "counts": text}, size, window)
        assert (part == mask[height // 4 : height // 4 + 1, width // 3 :]).all()
        counts = geometry.unpack_rle(text)
        assert sum(counts) == mask.size and (geometry.decode_rle(counts, width, height) == mask).all()
    for _ in range(30):
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 7)), rng.uniform(20, 45, 7)
        polygon = (50 + np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)).ravel().tolist()
        theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], 100, 100))).astype(bool)
        ours = geometry.read_segmentation([polygon], (100, 100), (0, 0, 100, 100))
        assert (ours != theirs).sum() < 40  # they disagree only where the outline runs through a pixel's centre
        assert (geometry.read_segmentation([polygon], (100, 100), (30, 40, 60, 90)) == ours[40:90, 30:60]).all()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0,0.5,0.5,0.1", "has 4 numbers"),
        ("x 0.5 0.5 0.1 0.1", "not a line of numbers"),
        ("0.5 0.5 0.5 0.1 0.1", "class number"),
        ("-1 0.5 0.5 0.1 0.1", "class number"),
        ("0 nan 0.5 0.1 0.1", "not finite"),
        ("0", "has 1 numbers"),
    ],
)
def test_a_bad_yolo_line_says_what_is_wrong(line: str, reason: str) -> None:
    with pytest.raises(geometry.BoxError, match=reason):
        label_yolo.parse_yolo_line(line)


def test_hostile_segmentations_raise_nothing_else() -> None:
    rng = np.random.default_rng(1)
    atoms = [None, True, -1, 0, 3, 10**400, 1e308, float("nan"), "", "x", "ÿ" * 40, "o" * 500, [], {}, [[]], [[1] * 6]]
    for _ in range(3000):
        pick = [atoms[i] for i in rng.integers(0, len(atoms), 8)]
        segmentation = pick[0] if rng.random() < 0.3 else {"size": [4, 5] if rng.random() < 0.8 else pick[1]}
        if isinstance(segmentation, dict):
            segmentation["counts"] = pick[2] if rng.random() < 0.5 else pick[3:6]
        detection = {"bbox": pick[6] if rng.random() < 0.3 else [pick[7], 1, 2, pick[5]], "segmentation": segmentation}
        for key in ("", "bbox"):
            detection.pop(key, None)
            try:
                box = geometry.find_box(detection, 5, 4)
                assert 0 <= box[0] < 5 and 0 <= box[1] < 4 and box[2] > 0 and box[3] > 0
                mask = geometry.read_segmentation(segmentation, (5, 4), (0, 0, 5, 4))
                assert mask.shape == (4, 5) and mask.dtype == bool
            except geometry.BoxError as error:
                assert str(error)


def test_a_padded_box_stays_inside_and_is_never_nothing() -> None:
    assert geometry.pad_box((10, 20, 40, 80), 0.25, 300, 240) == (0, 0, 60, 120)
    assert geometry.pad_box((10, 20, 40, 80), 0.25, 55, 110) == (0, 0, 55, 110)
    assert geometry.pad_box((99.998, 5, 0.2, 0.2), 0.0, 100, 240) == (99, 5, 100, 6)


@pytest.mark.parametrize(
    "counts", [[5], [3, 4], [21], [10, -3, 13], [10.5, 9.5], [2**70], "", "5", "40000", "P", "ooo", "o" * 400, None, {}]
)
def test_run_lengths_that_do_not_fill_the_image_are_refused(counts: object) -> None:
    with pytest.raises(geometry.BoxError, match="run lengths"):
        geometry.read_segmentation({"size": [4, 5], "counts": counts}, (5, 4), (0, 0, 5, 4))


# --- files that are read


def read(path: Path, image_paths: Iterable[str] = ("a.jpg", "deep/b.png")) -> labels.FoundObjects:
    return labels.read_objects(path, list(image_paths))


def test_without_a_source_each_image_is_one_object() -> None:
    found = labels.read_objects(None, ["a.jpg", "deep/b.png"])
    assert [number for number, _ in found.objects] == found.images == [0, 1] and found.image_ids == [1, 2]
    boxes = [geometry.find_box(geometry.to_pixels(json.loads(text), 30, 20), 30, 20) for _, text in found.objects]
    assert boxes == [(0, 0, 30, 20)] * 2


def test_names_are_compared_composed_and_objects_elsewhere_are_counted(tmp_path: Path) -> None:
    images = [
        {"id": "x", "file_name": "./деи\u0306/b.png", "width": 30, "height": True},
        {"id": 2, "file_name": "no.png"},
        {"id": 3, "file_name": "деи\u0306/b.png"},
    ]
    ids = ("x", 2, 2, 3)
    objects = [{"image_id": key, "category_id": 7, "bbox": [1, 2, 3, 4], "comment": "left out"} for key in ids]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": objects}))
    found = read(tmp_path / "coco.json", ["деи\u0306/b.png", "деи/b.png"])
    assert found.images == [0] and found.image_ids == ["x"]
    assert [(number, json.loads(text)) for number, text in found.objects] == [
        (0, {"category_id": 7, "bbox": [1, 2, 3, 4]})
    ]
    assert found.notes == ["objects of images that are left out: 3, images: 2"]
    assert [problem.reason for problem in found.problems] == [
        "is not in --images", "is listed twice; the second time is left out"
    ]  # fmt: skip


def test_a_source_that_is_no_plain_file_is_said_to_be_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(labels.LabelError) as caught:
        read(tmp_path / "pipe.json")
    assert caught.value.what == "cannot be read as JSON: is not a regular file"
    assert caught.value.where == str(tmp_path / "pipe.json") and "COCO" in caught.value.remedy
    os.mkfifo(tmp_path / "a.txt")  # of a folder of YOLO files
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("4 .5 .5 .2 .1\n")
    found = read(tmp_path)
    assert [(number, json.loads(text)["category_id"]) for number, text in found.objects] == [(1, 4)]
    assert found.problems == [labels.Problem("a.jpg", None, "has a .txt that cannot be read: is not a regular file")]


CVAT = '<annotations><image id="0" name="a.jpg" width="20" height="{height}">{shapes}</image></annotations>'
CSV = "image,x,y,width,height,class,more\n"
LABELME = {"imagePath": "a.jpg", "imageWidth": 20, "imageHeight": 10}
PERCENT = {"x": 1, "y": 2, "width": 3, "height": 4}


def task(*regions: dict, **more: object) -> str:
    return json.dumps([{"data": {"image": "/data/local-files/?d=a.jpg"}, "annotations": [{"result": regions}], **more}])


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.xml", CVAT.format(height=10, shapes='<box label="b" xtl="1" ytl="2" xbr="x" ybr="4"/>'), "not of numbers"),
        ("a.xml", CVAT.format(height=10, shapes='<box label="b" xtl="1" ytl="2" xbr="3"/>'), "not of numbers"),
        ("a.xml", CVAT.format(height=10, shapes='<polygon label="b"/>'), "not of numbers"),
        ("a.xml", CVAT.format(height=10, shapes='<points label="b" points="1,2"/>'), "has the shape points"),
        ("a.xml", CVAT.format(height=10, shapes='<cuboid label="b" xtl1="1" ytl1="2"/>'), "has the shape cuboid"),
        ("a.csv", CSV + "a.jpg,1,2,,4,b,m\n", "not of numbers"),
        ("a.csv", CSV + "a.jpg,1,2\n", "not of numbers"),
        (
            "a.json",
            task({"type": "rectanglelabels", "value": {**PERCENT, "rotation": 9}}),
            "not of numbers",  # without the photo's sides, a turn in percent is none in px
        ),
        (
            "a.json",
            task({"type": "rectanglelabels", "value": {"x": 1, "y": 2, "width": [], "height": 4}}),
            "of numbers",
        ),
        ("a.json", json.dumps({**LABELME, "shapes": [{"points": [[1, 2], [3], [4, 5, 6]]}]}), "not of numbers"),
        ("a.json", task({"type": "polygonlabels", "value": {"points": [[1, 2], 3]}}), "not of numbers"),
        ("a.json", task({"type": "polygonlabels", "value": {"points": [[1, 2], [3], [4, 5]]}}), "not of numbers"),
        ("a.json", task({"type": "polygonlabels", "value": {"points": [[1, 2], [3, 10**400]]}}), "not of numbers"),
        (
            "a.json",
            task({"type": "rectangle", "original_width": 0, "original_height": 9, "value": {**PERCENT, "rotation": 9}}),
            "not of numbers",
        ),
        ("a.json", task({"type": "keypointlabels", "value": {"x": 1, "y": 2, "width": 3}}), "neither a rectangle"),
        ("a.json", task({"type": "rectanglelabels", "value": {"rectanglelabels": ["b", "c"]}}), "has 2 classes"),
        ("a.json", task({"type": "rectanglelabels", "image_rotation": 90, "value": {}}), "its image turned"),
        (
            "a.json",
            task({"type": "brushlabels", "value": {"rle": [1, 2]}}),
            "neither a rectangle, a polygon nor an ellipse",
        ),
    ],
)
def test_a_bad_object_of_any_format_is_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    found = read(tmp_path / name)
    assert not found.objects and found.images == [0]
    (problem,) = found.problems
    assert problem.image == "a.jpg" and reason in problem.reason


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.xml", "", "cannot be read as XML"),
        ("a.xml", '<?xml version="1.0" encoding="none"?><annotations/>', "cannot be read as XML: unknown encoding"),
        ("a.xml", "<annotations><image", "cannot be read as XML"),
        ("a.xml", "<annotations><track/></annotations>", "has no images"),
        ("a.xml", CVAT.format(height="x", shapes=""), "cannot be read as XML"),
        (
            "a.xml",
            CVAT.replace("a.jpg", "b.jpg").format(height=10, shapes=""),
            "none of its images (1) is there: b.jpg is not in",
        ),
        ("a.xml", CVAT.replace("name=", "title=").format(height=10, shapes=""), "without file_name"),
        ("a.xml", CVAT.replace("name=", "title=").format(height=10, shapes="<points/>"), "without file_name"),
        ("a.csv", "", "it has no column image"),
        ("a.csv", "annotation_id,annotator,id,image,label\n", "it is Label Studio's CSV"),
        ("a.csv", "image,x,y,width,height\n", "it has no column class"),
        ("a.csv", CSV + "b.jpg,1,2,3,4,b,m\n", "none of its images (1) is there: b.jpg is not in"),
        ("a.json", '[{"data": {"image": 3}}]', "none of its images (1)"),
        ("a.json", '[{"data": 3}]', "is a list, but none of tasks"),
        ("a.json", "[]", "is a list of results"),
    ],
)
def test_a_file_that_is_not_of_its_kind_costs_one_sentence(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(labels.LabelError) as caught:
        read(tmp_path / name)
    assert reason in caught.value.what and caught.value.remedy


def test_turned_boxes_have_their_corners_and_keep_them_as_a_mask(tmp_path: Path) -> None:
    """CVAT turns a box about its centre, as OpenCV does; Label Studio about its first corner, in px and not in percent.

    CVAT's COCO export has the box before the turn, and the angle among its attributes (cvat-ai/cvat#4745).
    """
    shapes = '<box label="b" xtl="6" ytl="2" xbr="14" ybr="6" rotation="30.5"/>'
    (tmp_path / "a.xml").write_text(CVAT.format(height=10, shapes=shapes))
    percent = {"x": 50, "y": 20, "width": 20, "height": 60, "rotation": 90, "rectanglelabels": ["b"]}  # of 20 by 10 px
    region = {"type": "rectanglelabels", "original_width": 20, "original_height": 10, "value": percent}
    (tmp_path / "a.json").write_text(task(region))
    box = {"image_id": 1, "category_id": 1, "bbox": [6, 2, 8, 4], "segmentation": []}
    box["attributes"] = {"occluded": False, "rotation": 30.5}
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [box]}))
    turned = cv2.boxPoints(((10, 4), (8, 4), 30.5)).tolist()
    expected = {"a.xml": turned, "coco.json": turned, "a.json": [[10, 2], [10, 6], [4, 6], [4, 2]]}
    for name, corners in expected.items():
        [(_, text)] = read(tmp_path / name).objects
        detection = geometry.to_pixels(json.loads(text), 20, 10)
        points = np.array(detection["segmentation"][0]).reshape(-1, 2)
        in_order = [np.array(sorted(map(tuple, np.round(each, 2).tolist()))) for each in (points, corners)]
        assert np.allclose(*in_order, atol=0.011)
        low, high = np.min(corners, axis=0), np.max(corners, axis=0)
        assert geometry.find_box(detection, 20, 10) == pytest.approx([*low, *(high - low)], abs=0.01)


FOUR = [[2, 1], [10, 1], [10, 7], [2, 7]]
LABELSTUDIO_BOX = {"x": 10, "y": 10, "width": 40, "height": 60, "rectanglelabels": ["b"]}
LABELSTUDIO_ELLIPSE = {
    "x": 30,
    "y": 40,
    "radiusX": 15,
    "radiusY": 40,
    "rotation": 90,
    "ellipselabels": ["b"],
}  # in percent
VIA_ELLIPSE = {"name": "ellipse", "cx": 6, "cy": 4, "rx": 3, "ry": 4, "theta": 1.5707963267948966}
SAME_BOX = {
    "ellipse of CVAT": ("a.xml", CVAT.format(height=10, shapes='<ellipse label="b" cx="6" cy="4" rx="4" ry="3"/>')),
    "turned ellipse of CVAT": (
        "a.xml",
        CVAT.format(height=10, shapes='<ellipse label="b" cx="6" cy="4" rx="3" ry="4" rotation="90"/>'),
    ),
    "turned ellipse of Label Studio": (
        "a.json",
        task({"type": "ellipselabels", "original_width": 20, "original_height": 10, "value": LABELSTUDIO_ELLIPSE}),
    ),
    "turned ellipse of VIA": (
        "a.json",
        {"a": {"filename": "a.jpg", "regions": [{"shape_attributes": VIA_ELLIPSE, "region_attributes": {"class": "b"}}]}},
    ),
    "rectangle of X-AnyLabeling": (
        "a.json", {**LABELME, "shapes": [{"label": "b", "shape_type": "rectangle", "points": FOUR}]},
    ),
    "turned box of X-AnyLabeling": (
        "a.json", {**LABELME, "shapes": [{"label": "b", "shape_type": "rotation", "points": FOUR}]},
    ),
    "one task of Label Studio": (
        "a.json",
        json.loads(task({"type": "rectanglelabels", "value": LABELSTUDIO_BOX}))[0],
    ),
    "shape of Label Studio without class": (
        "a.json", task({"type": "rectangle", "value": {**LABELSTUDIO_BOX, "rectanglelabels": []}}),
    ),
    "table of a country with decimal commas": ("a.csv", "\ufeffImage;x;Y;width;height;class\r\na.jpg;2,0;1,0;8,0;6,0;b\r\n"),
    "table that states its separator": ("a.csv", "sep=|\r\nimage|x|y|width|height|class\r\na.jpg|2|1|8|6|b\r\n"),
    "table that is typed, with empty rows": (
        "a.csv", 'class, x, y, width, height, image\nb , 2, 1, 8, 6, "a.jpg"\n,,,,,\n , ,,,,\n',
    ),
    "LVIS": (
        "a.json",
        {
            "images": [{"id": 3, "coco_url": "http://images.cocodataset.org/train2017/a.jpg"}],
            "annotations": [{"image_id": 3, "category_id": 1, "bbox": [2, 1, 8, 6]}],
            "categories": [{"id": 1, "name": "b"}],
        },
    ),
    "task of Label Studio with a caption": (
        "a.json",
        [{
            "data": {"from": "https://shop/1/2", "name": "other.jpg", "image": "s3://x/a.jpg?v=1"},
            "annotations": [{"result": [{"type": "rectanglelabels", "value": LABELSTUDIO_BOX}]}],
        }],
    ),
    "table of Excel's Unicode text": (
        "A.CSV", "image\tx\ty\twidth\theight\tclass\r\na.jpg\t2\t1\t8\t6\tb\r\n".encode("utf-16"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME_BOX)
def test_shapes_and_files_of_every_kind_have_the_same_box(tmp_path: Path, kind: str) -> None:
    name, content = SAME_BOX[kind]
    content = json.dumps(content) if isinstance(content, (dict, list)) else content
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read(tmp_path / name)
    [(_, text)] = found.objects
    box = geometry.find_box(geometry.to_pixels(json.loads(text), 20, 10), 20, 10)
    assert box == pytest.approx((2, 1, 8, 6)) and not found.problems
    with contextlib.suppress(geometry.BoxError):  # one of them has no class
        assert label_objects.find_class_name(found.class_names, json.loads(text)["category_id"]) == "b"


def test_a_labelme_file_that_names_no_photo_is_named_itself(tmp_path: Path) -> None:
    for name in ("a.json", "lost.json"):
        (tmp_path / name).write_text('{"shapes": []}')
    assert read(tmp_path).problems == [labels.Problem("lost.json", None, "is not in --images")]


def test_categories_of_one_id_leave_it_open(tmp_path: Path) -> None:
    content = make_coco(nothing, nothing)
    content["categories"] = [{"id": 1, "name": "hammer"}, {"id": "1", "name": "pliers"}]
    content["images"].append(content["images"][0])  # as where files were put together
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = read(tmp_path / "coco.json", ["a.jpg", "b.jpg"])
    assert boxes_of(found, ["a.jpg", "b.jpg"]) == BOXES and not found.problems
    assert found.class_names == {"1": None} and "several categories have the id 1" in found.notes[0]


# 9 x 6 px as label_studio_sdk packs them (converter.brush.encode_rle): rows 1 to 3 of columns 2 to 6, and one pixel below.
BRUSH = [
    *(
        0,
        0,
        0,
        216,
        57,
        27,
        254,
        43,
        0,
        194,
        127,
        247,
        192,
        48,
        159,
        253,
        240,
        12,
        39,
        255,
        132,
        192,
        35,
        255,
        198,
        224,
        0,
    )
]


def test_what_a_brush_has_painted_is_a_mask(tmp_path: Path) -> None:
    painted = np.zeros((6, 9), bool)
    painted[1:4, 2:7] = True
    painted[4, 3] = True
    assert (labels.decode_brush(BRUSH, 9, 6) == painted).all()
    value = {"format": "rle", "rle": BRUSH, "brushlabels": ["b"]}
    region = {"type": "brushlabels", "original_width": 9, "original_height": 6, "value": value}
    (tmp_path / "a.json").write_text(task(region))
    [(_, text)] = read(tmp_path / "a.json").objects
    detection = geometry.to_pixels(json.loads(text), 9, 6)
    assert detection["segmentation"] == geometry.encode_rle(painted, 0, 0, 9, 6)
    assert geometry.find_box(detection, 9, 6) == (2, 1, 5, 4)


@pytest.mark.parametrize(
    ("data", "width", "reason"),
    [
        (BRUSH, 8, "another size"),
        (BRUSH[:9], 9, "cut off"),
        ([], 9, "cut off"),
        ([300] * 9, 9, "not of bytes"),
        ([255] * 9, 9, "another size"),
        ([300] * 9, 9, "not of bytes"),
    ],
)
def test_a_damaged_brush_costs_itself(data: list[int], width: int, reason: str) -> None:
    with pytest.raises(geometry.BoxError, match=reason):
        labels.decode_brush(data, width, 6)


def test_packed_numbers_of_any_length_are_read() -> None:
    """Against a packer of our own: literal and repeated groups, words and counts of many lengths."""
    rng = np.random.default_rng(4)
    for word, lengths in ((8, (3, 4, 8, 16)), (3, (1, 2, 5, 9)), (1, (2, 2, 2, 2))):
        mask = rng.random((5, 7)) < 0.5
        values = np.repeat(mask.ravel() * (2**word - 1), 4)
        bits = f"{len(values):032b}{word - 1:05b}" + "".join(f"{length - 1:04b}" for length in lengths)
        done = 0
        while done < len(values):
            which = int(rng.integers(4))
            count = min(int(rng.integers(1, 2 ** lengths[which] + 1)), len(values) - done, 9)
            group = values[done : done + count]
            is_repeated = bool((group == group[0]).all() and rng.random() < 0.7)
            bits += f"{is_repeated:b}{which:02b}{count - 1:0{lengths[which]}b}"
            bits += "".join(f"{value:0{word}b}" for value in (group[:1] if is_repeated else group).tolist())
            done += count
        bits += "0" * (-len(bits) % 8)
        data = [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]
        assert (labels.decode_brush(data, 7, 5) == mask).all()


def test_an_object_is_the_same_whatever_format_it_comes_in(tmp_path: Path) -> None:
    box, polygon = [2.0, 3.0, 8.0, 5.0], [2.0, 3.0, 10.0, 3.0, 4.0, 8.0]
    shapes = '<tag label="day"/><box label="b &amp; c" xtl="2" ytl="3" xbr="10" ybr="8"><attribute name="k">1</attribute></box>'
    shapes += '<polygon label="b &amp; c" points="2.0,3.0;10.0,3.0;4.0,8.0"/>'
    (tmp_path / "a.xml").write_text(CVAT.format(height=10, shapes=shapes))
    percent = {"x": 10, "y": 30, "width": 40, "height": 50, "rotation": 0, "rectanglelabels": ["b & c"]}
    points = [[10, 30], [50, 30], [20, 80]]
    regions = [
        {"type": "rectanglelabels", "value": percent},
        {"type": "polygonlabels", "value": {"points": points, "polygonlabels": ["b & c"]}},
        {"type": "choices", "value": {"choices": ["day"]}},
    ]
    cancelled = {"was_cancelled": True, "result": []}
    (tmp_path / "a.json").write_text(
        task(annotations=[{"result": regions}, cancelled], predictions=[{"result": regions[:1]}])
    )
    (tmp_path / "predicted.json").write_text(task(annotations=[], predictions=[{"result": []}, {"result": regions}]))
    (tmp_path / "a.csv").write_text("\ufeff" + CSV + 'a.jpg,2,3,8,5,b & c,"m"\r\n', encoding="utf-8")
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "a.txt").write_text("7 .3 .55 .4 .5\n7 .1 .3 .5 .3 .2 .8\n")
    for name in ("a.xml", "a.json", "predicted.json", "a.csv", "yolo"):
        found = read(tmp_path / name)
        objects = [geometry.to_pixels(json.loads(text), 20, 10) for _, text in found.objects]
        assert [item["category_id"] for item in objects] == [7 if name == "yolo" else "b & c"] * (1 + (name != "a.csv"))
        assert [geometry.find_box(item, 20, 10) for item in objects] == [pytest.approx(box)] * len(objects), name
        assert [item["segmentation"] for item in objects[1:]] == [[pytest.approx(polygon)]] * (len(objects) - 1)
        assert not found.problems


# --- files that are written


def test_every_format_writes_every_object_and_holds_one_image_at_a_time() -> None:
    alive: list[int] = []

    def images() -> Iterable[label_writers.LabelledImage]:
        for number in range(3):
            alive.append(number)
            item = label_writers.LabelledObject(
                number, (1, 2, 3, 4), number % 2, 0.5, {"best_class": "a\x1b<b", "note": None}
            )
            yield label_writers.LabelledImage(number, 10 + number, f"{number} &.jpg", (20, 10), [item])

    label_set = label_writers.LabelSet(Path("/photos"), ('a "x"\n', "b"), "model", "description", images)
    for name, write in label_writers.WRITERS.items():
        for path, content in write(label_set):
            if isinstance(content, Path):
                is_link_each = name == "yolo" and path.startswith("yolo/images/") and content.parent == Path("/photos")
                assert is_link_each or (content == Path("/photos") and path == f"{name}/images")
                continue
            alive.clear()
            first = next(iter(content), "")
            assert isinstance(first, str) and len(alive) <= 1, f"{path} goes over all images before its first line"
        assert path.startswith(f"{name}/") or name == "csv"


def test_it_needs_nothing_of_ours_and_no_torch() -> None:
    code = f"import sys; sys.path.insert(0, {str(REPO / 'tools')!r}); import labels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "lct_dino3", "PIL", "pycocotools"} & set(done.stdout.split())


# --- files as people really have them

BOXES = {"a.jpg": [[20, 20, 187, 200], [300, 40, 145, 180], [60, 260, 180, 44]]}
BOXES["b.jpg"] = [[30, 30, 200, 145], [260, 150, 200, 117]]
SIZES = {"a.jpg": (640, 480), "b.jpg": (500, 400)}


def make_coco(change_image: Callable[[dict], object], change_object: Callable[[dict], object], **more: object) -> dict:
    """Return the five boxes as COCO, each entry changed."""
    images, annotations = [], []
    for number, (name, boxes) in enumerate(BOXES.items(), 1):
        images.append({"id": number, "file_name": name, "width": SIZES[name][0], "height": SIZES[name][1]})
        annotations += [{"image_id": number, "category_id": 1, "bbox": box} for box in boxes]
    for number, item in enumerate(annotations, 1):
        x, y, w, h = item["bbox"]
        item.update(id=number, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
        change_object(item)
    for item in images:
        change_image(item)
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tool"}], **more}


def nothing(_: dict) -> None:
    pass


def boxes_of(found: labels.FoundObjects, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """Return the boxes in px by the name of their photo, and see that a mask means the same as its box."""
    boxes: dict[str, list[list[float]]] = {}
    for number, text in found.objects:
        name = names[found.images[number]]
        item = geometry.to_pixels(json.loads(text), *SIZES[name[-5:]])
        box = geometry.find_box(item, *SIZES[name[-5:]])
        if item.get("segmentation"):
            window = geometry.pad_box(box, 0, *SIZES[name[-5:]])
            assert geometry.read_segmentation(item["segmentation"], SIZES[name[-5:]], window).mean() > 0.7
        boxes.setdefault(name[-5:], []).append([round(value, 1) for value in box])
    return boxes


COCO_KINDS = {
    "attributes of CVAT": (nothing, lambda o: o.update(attributes={"occluded": False, "rotation": 0.0}), {}),
    "rotated box with its outline": (nothing, lambda o: o.update(attributes={"occluded": False, "rotation": 30.0}), {}),
    "rotation of another kind": (nothing, lambda o: o.update(attributes={"occluded": 0, "rotation": "l"}, segmentation=[]), {}),
    "rotation of others than CVAT": (nothing, lambda o: o.update(segmentation=[], attributes={"rotation": 30}), {}),
    "attributes that are none": (nothing, lambda o: o.update(segmentation=[], attributes=["occluded", "rotation"]), {}),
    "as it is": (nothing, nothing, {}),
    "image_id among an image's keys": (lambda i: i.update(image_id=i["id"]), nothing, {}),
    "image_id and category_id there": (lambda i: i.update(image_id=i["id"], category_id=1), nothing, {}),
    "file_name among an object's keys": (nothing, lambda o: o.update(file_name="a.jpg"), {}),
    "float ids": (lambda i: i.update(id=float(i["id"])), lambda o: o.update(category_id=1.0), {}),
    "float image_id": (nothing, lambda o: o.update(image_id=float(o["image_id"])), {}),
    "string image_id": (nothing, lambda o: o.update(image_id=str(o["image_id"])), {}),
    "string image_id of a float": (nothing, lambda o: o.update(image_id=f"{o['image_id']}.0"), {}),
    "string id": (lambda i: i.update(id=str(i["id"])), nothing, {}),
    "categories empty": (nothing, nothing, {"categories": []}),
    "categories null": (nothing, nothing, {"categories": None}),
    "categories unlisted": (nothing, lambda o: o.update(category_id=99), {}),
    "category_id absent": (nothing, lambda o: o.pop("category_id"), {}),
    "category_id null": (nothing, lambda o: o.update(category_id=None), {}),
    "bbox empty": (nothing, lambda o: o.update(bbox=[]), {}),
    "bbox null": (nothing, lambda o: o.update(bbox=None), {}),
    "bbox of zeros": (nothing, lambda o: o.update(bbox=[0, 0, 0, 0]), {}),
    "flat polygon": (nothing, lambda o: o.update(segmentation=o["segmentation"][0]), {}),
    "flat polygon alone": (nothing, lambda o: o.update(segmentation=o["segmentation"][0], bbox=None), {}),
    "a part of two points": (nothing, lambda o: o["segmentation"].append([5, 5, 6, 6]), {}),
    "a part of one, and no box": (nothing, lambda o: o.update(bbox=[], segmentation=[[5, 5], *o["segmentation"]]), {}),
    "an empty part": (nothing, lambda o: o["segmentation"].insert(0, []), {}),
    "names of Windows": (lambda i: i.update(file_name=f".\\{i['file_name']}"), nothing, {}),
    "absolute names": (lambda i: i.update(file_name=f"/home/x/images/{i['file_name']}"), nothing, {}),
    "absolute names of Windows": (lambda i: i.update(file_name=f"C:\\x y\\images\\{i['file_name']}"), nothing, {}),
    "names of a server": (lambda i: i.update(file_name=f"https://host/x/{i['file_name']}"), nothing, {}),
    "names of a bucket": (lambda i: i.update(file_name=f"s3://x/{i['file_name']}"), nothing, {}),
    "names of uploads": (lambda i: i.update(file_name=f"../../media/upload/1/1a2b3c4d-{i['file_name']}"), nothing, {}),
    "names that are given out": (lambda i: i.update(file_name=f"images/1a2b3c4d__{i['file_name']}"), nothing, {}),
    "names of uploads as URLs": (lambda i: i.update(file_name=f"/up/1a2b3c4d-{i['file_name'].replace('.', '%2E')}"), nothing, {}),
    "names from the server's folder": (lambda i: i.update(file_name=f"../../home/x/images/{i['file_name']}"), nothing, {}),
    "names of categories that are numbers": (nothing, nothing, {"categories": [{"id": 1, "name": 5}]}),
    "names of a share": (lambda i: i.update(file_name=f"\\\\server\\{i['file_name']}"), nothing, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", COCO_KINDS)
def test_coco_is_read_as_pycocotools_reads_it(tmp_path: Path, kind: str) -> None:
    change_image, change_object, more = COCO_KINDS[kind]
    (tmp_path / "coco.json").write_text(json.dumps(make_coco(change_image, change_object, **more)))
    found = read(tmp_path / "coco.json", ["a.jpg", "b.jpg"])
    assert boxes_of(found, ["a.jpg", "b.jpg"]) == BOXES and not found.problems
    assert all(type(number) is not float for number in found.image_ids)


def test_an_object_that_is_drawn_as_a_mask_in_cvat_is_no_crowd(tmp_path: Path) -> None:
    """CVAT's COCO export says so of all of them (ryouchinsa/Rectlabel-support#241)."""
    content = make_coco(nothing, lambda o: o.update(iscrowd=1, attributes={"occluded": False} if o["id"] > 1 else {}))
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = read(tmp_path / "coco.json", ["a.jpg", "b.jpg"])
    assert [json.loads(text).get("iscrowd") for _, text in found.objects] == [1, None, None, None, None]


def test_label_studio_exports_yolo_of_uploaded_photos_by_names_of_its_own(tmp_path: Path) -> None:
    """As its server 1.23 writes them; photos of the same name there are not told apart, and named."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "notes.json").write_text('{"categories": [], "info": {}}')
    (tmp_path / "a.yaml").write_text("# of something else\n" + " " * label_yolo.MAX_NAMES_BYTES)
    (tmp_path / "classes.txt").write_text("nut\nbolt\n", encoding="utf-16")  # as Notepad saves "Unicode"
    for name in ("1a2b3c4d-a_b", "0badc0de-%D0%B3", "1a2b3c4e__c", "1a2b3c4f-twice", "1a2b3c5f-twice", "1a2b3c4d-own"):
        (tmp_path / "labels" / f"{name}.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    photos = ["a_b.jpg", "г.jpg", "c.png", "twice.jpg", "own.jpg", "1a2b3c4d-own.jpg"]
    found = labels.read_objects(tmp_path, photos)
    assert [photos[number] for number, _ in found.objects] == ["a_b.jpg", "г.jpg", "c.png", "1a2b3c4d-own.jpg"]
    assert list(found.class_names.values()) == ["nut", "bolt"]
    assert [problem.image for problem in found.problems] == ["labels/1a2b3c4f-twice.txt", "labels/1a2b3c5f-twice.txt"]
    with pytest.raises(labels.LabelError, match=r"has no \.txt of these images"):
        labels.read_objects(tmp_path, ["x.jpg"])


def test_ids_that_differ_in_type_alone_stay_apart_where_both_are_there(tmp_path: Path) -> None:
    content = make_coco(nothing, nothing)
    content["images"][1]["id"] = "1"
    for item in content["annotations"][3:]:
        item["image_id"] = "1"
    stray = {"image_id": "1.0", "category_id": 1, "bbox": [0, 0, 9, 9]}
    content["annotations"] += [{"id": 9, **stray}, {"id": 0, **stray}]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = read(tmp_path / "coco.json", ["a.jpg", "b.jpg"])
    assert boxes_of(found, ["a.jpg", "b.jpg"]) == BOXES
    assert found.problems == [labels.Problem("", n, "its image is not in the list of images") for n in (9, 0)]


def test_the_end_of_an_absolute_name_counts_and_one_that_two_have_does_not(tmp_path: Path) -> None:
    names = ["/data/run/deep/a.jpg", "/data/one/b.jpg", "D:\\two\\b.jpg", "images/a.jpg", "/data/run/c.jpg"]
    content = {"images": [{"id": n, "file_name": name} for n, name in enumerate(names)], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = read(tmp_path / "coco.json", ["a.jpg", "deep/a.jpg", "b.jpg", "c.jpg"])
    assert found.images == [1, 3] and found.image_ids == [0, 4]  # a relative name starts from --images, or is none
    reasons = [problem.reason for problem in found.problems]
    assert [reason.partition(",")[0] for reason in reasons] == [
        "ends like D:\\two\\b.jpg", "ends like /data/one/b.jpg", "is not in --images"
    ]  # fmt: skip


def test_thousands_of_names_with_one_end_take_no_minute(tmp_path: Path) -> None:
    """As of videos whose frames are numbered from 1 in a folder each, with the frames of one of them in --images."""
    images = [{"id": number, "file_name": f"/videos/{number}/a.jpg"} for number in range(6000)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": []}))
    start = time.process_time()
    with pytest.raises(labels.LabelError, match=r"/videos/0/a\.jpg ends like /videos/1/a\.jpg"):
        read(tmp_path / "coco.json")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("names", "images"),
    [
        (["X/a.jpg", "X/X/a.jpg"], [0, 1]),  # as `write_labelstudio` names them: from the parent of a folder X
        (["X/a.jpg", "X/b.jpg"], [0, 2]),
        (["X/a.jpg", "Y/a.jpg"], [1, 3]),  # from the folder itself
        (["X/a.jpg"], []),
    ],
)
def test_no_task_goes_to_a_photo_of_the_same_end(tmp_path: Path, names: list[str], images: list[int]) -> None:
    tasks = [{"data": {"image": f"/data/local-files/?d={name}"}} for name in names]
    (tmp_path / "a.json").write_text(json.dumps(tasks))
    photos = ["a.jpg", "X/a.jpg", "b.jpg", "Y/a.jpg"]
    if images:
        assert read(tmp_path / "a.json", photos).images == images
    else:
        with pytest.raises(labels.LabelError, match=r"may be X/a\.jpg or a\.jpg"):
            read(tmp_path / "a.json", photos)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}], "is a list of results"),
        ([{"image_id": 1, "detections": []}], "is a list of results"),
        ([{"id": 1, "image": "/a.jpg", "label": [{"x": 1, "original_width": 9}]}], "is of Label Studio's JSON-MIN"),
        ({}, "is no COCO file"),  # an empty project of VIA looks the same
    ],
)
def test_json_of_another_kind_is_named(tmp_path: Path, content: object, what: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(labels.LabelError, match=what):
        read(tmp_path / "a.json")


def test_a_task_may_have_an_image_id(tmp_path: Path) -> None:
    region = {"type": "rectanglelabels", "value": {"x": 0, "y": 0, "width": 50, "height": 50, "rectanglelabels": ["b"]}}
    data = {"image_id": 3, "category_id": 4, "image": "/data/local-files/?d=a.jpg", "file_name": "a.jpg"}
    (tmp_path / "a.json").write_text(json.dumps([{"data": data, "annotations": [{"result": [region]}]}]))
    assert len(read(tmp_path / "a.json").objects) == 1


BOX = "0.26 0.25625 0.4 0.3625"
CORNERS = "0.06 0.075 0.46 0.075 0.46 0.4375 0.06 0.4375"
YOLO_KINDS = {
    "box": ([f"0 {BOX}"], [None]),
    "box, confidence": ([f"0 {BOX} 0.87", f"0 {BOX} 1", f"0 {BOX} 0.87"], [0.87, 1.0, 0.87]),
    "box, track id": ([f"0 {BOX} 0", f"0 {BOX} 2"], [None, None]),
    "box, one or the other": ([f"0 {BOX} 1"], [None]),
    "box, confidence, track id": ([f"0 {BOX} 0.87 1", f"0 {BOX} 1 12", f"0 {BOX} 0.25"], [0.87, 1.0, 0.25]),
    "box, two keypoints": ([f"0 {BOX} 0.2 0.2 1 0.3 0.3 1"], [None]),
    "box, five keypoints, one unseen": ([f"0 {BOX}{' 0.2 0.2 2' * 4} 0 0 0", f"0 {BOX}"], [None, None]),
    "corners": ([f"0 {CORNERS}"], [None]),
    "corners, confidence": ([f"0 {CORNERS} 0.87", f"0 {CORNERS}", f"0 {BOX} 0.5"], [0.87, None, 0.5]),
    "corners, track id": ([f"0 {CORNERS} 7"], [None]),
    "corners, confidence, track id": ([f"0 {CORNERS} 0.87 1", f"0 {CORNERS} 0.5 3"], [0.87, 0.5]),
}


@pytest.mark.parametrize("kind", YOLO_KINDS)
@pytest.mark.parametrize("written", ["{}", "{},", "utf-16"])
def test_what_follows_box_or_corners_is_neither_corner_nor_score(tmp_path: Path, kind: str, written: str) -> None:
    lines, scores = YOLO_KINDS[kind]
    text = "\ufeff" + "\r\n".join(line.replace(" ", ", ") if "," in written else line for line in lines) + "\r\n"
    (tmp_path / "b.txt").write_bytes(text[1:].encode("utf-16") if written == "utf-16" else text.encode())
    found = read(tmp_path, ["b.jpg"])
    assert not found.problems
    assert boxes_of(found, ["b.jpg"]) == {"b.jpg": [[30, 30, 200, 145]] * len(lines)}
    assert [json.loads(item).get("score") for _, item in found.objects] == scores
    assert any("are not used" in note for note in found.notes) == (
        any(word in kind for word in ("track", "keypoints", "other"))
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"0 {BOX} 0.87 1", "perhaps"),  # or three corners
        (f"0 {BOX} 0.2 0.2 2", "perhaps"),  # a keypoint, or three corners and a track id
        (f"0 {BOX}{' 0.2 0.2 0.9' * 17}", "perhaps"),  # predicted keypoints, or 27 corners and a confidence
        (f"0 {BOX} 0.2 0.2 0.3 0.4 0.1 0.2", "perhaps"),  # three keypoints x, y, or five corners
        (f"0 {BOX} 0.2 0.2 0.3 0.4 0.1 0.2 0.87", "perhaps"),
        (f"0 {BOX} 0.2 0.2", "perhaps"),
        ("0 120 30 200 31", "neither"),
        (f"0 {CORNERS} 0.87 1", "perhaps"),  # or five corners
        ("0 120 30 200 31 190 80", "neither"),  # px
        (f"0 {BOX} 87.5", "neither"),
        (f"0 {BOX} 0.87 11.5", "neither"),
        (f"0 {BOX} 0.87 11 3.5", "neither"),
    ],
)
def test_a_line_that_may_be_two_things_is_none(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "b.txt").write_text(line)
    found = read(tmp_path, ["b.jpg"])
    assert not found.objects
    assert [(p.image, p.detection) for p in found.problems] == [("b.jpg", "line 1")] and reason in found.problems[
        0
    ].reason


@pytest.mark.parametrize(
    ("kpt_shape", "tail"),
    [
        ("[1, 3]", " 0.2 0.2 2"),
        ("[17, 3]", " 0.2 0.2 0.9" * 17),
        ("[1, 2]", " 0.2 0.2"),  # or three corners
        ("[2, 2]", " 0.2 0.2 0.4 0.4"),  # or four corners
        ("[17 3]", " 0.2 0.2 0.9" * 17),
        ("[2, 3]", " 0.2 0.2 0.9 0.4 0.4 0.1 0.87 11"),  # as results are saved with confidence and track id
    ],
)
def test_where_data_yaml_has_keypoints_a_line_is_a_box(tmp_path: Path, kpt_shape: str, tail: str) -> None:
    (tmp_path / "data.yaml").write_text(f"kpt_shape: {kpt_shape}\nnames: [hammer]\n")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/classes.txt").write_text("hammer\n")
    (tmp_path / "labels/b.txt").write_text(f"0 {BOX}{tail}\n0 {BOX}\n")
    found = read(tmp_path / "labels", ["b.jpg"])
    assert boxes_of(found, ["b.jpg"]) == {"b.jpg": [[30, 30, 200, 145]] * 2} and not found.problems
    assert found.notes == [
        "lines whose numbers after box or corners are not used: 1; a track id, keypoints, or what may be a confidence or an id"
    ]


def test_small_outlines_and_turned_boxes_are_no_keypoints(tmp_path: Path) -> None:
    """All their corners lie in the box that the first two of them would be."""
    turned, outline = "0.5 0.4 0.55 0.45 0.5 0.5 0.45 0.45", "0.5 0.4 0.55 0.45 0.55 0.5 0.5 0.55 0.45 0.45"
    quadrangle = "0.5 0.4 0.55 0.45 0.51 0.5 0.44 0.45"
    (tmp_path / "a.txt").write_text(f"0 {turned}\n0 {outline}\n0 {outline} 0.5 0.4\n0 {quadrangle}\n0 {CORNERS}\n")
    found = read(tmp_path, ["a.jpg"])
    assert len(found.objects) == 5 and not found.problems
    assert all("yolo_polygon" in json.loads(text) for _, text in found.objects)


def test_a_data_yaml_without_keypoints_makes_lines_that_may_be_both_corners(tmp_path: Path) -> None:
    quadrangles = "0 0.4 0.4 0.6 0.42 0.62 0.63 0.41 0.58\n" * 2
    (tmp_path / "a.txt").write_text(quadrangles)
    found = read(tmp_path, ["a.jpg"])
    assert not found.objects and all("a data.yaml with names tells" in problem.reason for problem in found.problems)
    (tmp_path / "data.yaml").write_text("names: [hammer]\n")
    found = read(tmp_path, ["a.jpg"])
    assert not found.problems and all("yolo_polygon" in json.loads(text) for _, text in found.objects)
    (tmp_path / "data.yaml").write_text("names: [hammer]\nkpt_shape: [2, 2]\n")
    assert all("yolo" in json.loads(text) for _, text in read(tmp_path, ["a.jpg"]).objects)


def test_one_odd_line_costs_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"0 {BOX} 0.5 3\n0 {BOX} 0.5 4\n0 0.1 0.1 0.5 0.5 0.1 0.7\n")
    found = read(tmp_path)
    assert len(found.objects) == 2 and "other lines" in found.problems[0].reason


@pytest.mark.parametrize(
    ("image", "text", "source"),
    [
        ("train/images/b.jpg", "train/labels/b.txt", "."),
        ("images/train/b.jpg", "labels/train/b.txt", "."),
        ("images/train/b.jpg", "labels/train/b.txt", "labels"),
        ("b.jpg", "labels/b.txt", "."),
        ("deep 1/er/b.jpg", "labels/deep 1%2Fer%2Fb.txt", "labels"),
    ],
)
def test_images_and_labels_side_by_side(tmp_path: Path, image: str, text: str, source: str) -> None:
    for name, content in (
        (text, f"0 {BOX}"),
        ("README.roboflow.txt", "words"),
        ("labels/._b.txt", "x"),
        (".x/b.txt", ""),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = read(tmp_path / source, [image, "z.jpg"])
    assert [number for number, _ in found.objects] == [0] and not found.problems


def test_a_text_goes_to_the_image_that_it_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(f"0 {BOX}")
    found = read(tmp_path, ["images/b.jpg", "z/b.jpg", "b.jpg"])
    assert [number for number, _ in found.objects] == [2] and not found.problems


def test_names_of_files_are_never_those_of_others() -> None:
    paths = ["a/b", "a%2Fb", "a%252Fb", "a%b", "b", "д" * 120, "д" * 119 + "/", "д" * 121]
    names = [label_yolo.flat_name(path) for path in paths]
    assert len(set(names)) == len(paths) and all("/" not in name and len(name.encode()) < 240 for name in names)


def test_a_folder_without_texts_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<annotations/>")
    with pytest.raises(labels.LabelError, match=r"no .txt of these images, but 1 .xml"):
        read(tmp_path)


def check_size(claimed: tuple[int, int], *boxes: list[float]) -> str | None:
    return geometry.check_size((640, 480), claimed, [{"bbox": box} for box in boxes])


def test_sides_that_exif_has_swapped_are_understood_by_the_boxes() -> None:
    assert check_size((640, 480)) is check_size((0, 480)) is None
    assert check_size((480, 640), [500, 10, 100, 50], [1, 1, 5, 5]) is None  # outside of 480
    assert "taken for those of the upright image" in check_size((480, 640), [20, 20, 187, 200])  # in both
    assert "taken for those of the upright image" in check_size((480, 640))
    polygon = {"bbox": [], "segmentation": [[500, 10, 600, 10, 600, 90]]}
    assert geometry.check_size((640, 480), (480, 640), [polygon]) is None
    with pytest.raises(geometry.BoxError, match="before the EXIF rotation"):
        check_size((480, 640), [20, 500, 100, 100], [1, 1, 5, 5])
    with pytest.raises(geometry.BoxError, match=r"is 640 x 480 px, but 99 x 480"):
        check_size((99, 480), [20, 20, 5, 5])


@pytest.mark.parametrize("text", [" x", "' x", "=1+1", "+1", "-1", "@x", "\t=1", "'=1", "''=1", "'a", "a=1", "", "'"])
def test_no_cell_is_a_formula_and_each_is_read_back(tmp_path: Path, text: str) -> None:
    item = label_writers.LabelledObject(0, (1, 2, 3, 4), 0, 0.5, {"best_class": text, "cosine": -0.25})
    image = label_writers.LabelledImage(0, 1, f"{text}.jpg", (20, 10), [item])
    label_set = label_writers.LabelSet(tmp_path, [text], "model", "description", lambda: iter([image]))
    ((_, lines),) = label_writers.write_csv(label_set)
    (tmp_path / "a.csv").write_text("".join(lines), newline="")
    with open(tmp_path / "a.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["cosine"] == "-0.25" and all(
        row[key][:1] not in tuple("=+-@\t") for key in ("image", "class", "best_class")
    )
    found = read(tmp_path / "a.csv", ["other.jpg", f"{text}.jpg"])
    assert found.images == [1] and json.loads(found.objects[0][1])["category_id"] == text


def test_a_table_without_objects_still_has_its_columns(tmp_path: Path) -> None:
    image = label_writers.LabelledImage(0, 1, "a.jpg", (20, 10), [])
    label_set = label_writers.LabelSet(tmp_path, ["a"], "model", "description", lambda: iter([image]))
    ((_, lines),) = label_writers.write_csv(label_set)
    assert "".join(lines).splitlines() == [",".join(label_objects.CSV_COLUMNS)]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("coco", "coco/annotations/instances_default.json"),
        ("yolo", "yolo"),
        ("cvat", "cvat/annotations.xml"),
        ("labelstudio", "labelstudio/tasks.json"),
        ("csv", "objects.csv"),
    ],
)
def test_what_a_format_holds_is_read_back_with_its_names_and_pixels(tmp_path: Path, name: str, source: str) -> None:
    paths = ["3.45\u202fPM.jpg", 'deep 1/\u3000б & "c".png', "می\u200cخ.jpg", "क्\u200dष.jpg"]
    classes = ["no\xa0break", "می\u200cخ", '<"&">', "क्\u200dष"]
    boxes = [
        (10.5, 20.4996, 31.0004, 7.0009),
        (0.0, 0.0001, 640.0, 479.9999),
        (1.2345, 6.789, 0.3333, 0.6667),
        (1, 2, 3, 4),
    ]

    def images() -> Iterable[label_writers.LabelledImage]:
        for number, (path, box) in enumerate(zip(paths, boxes, strict=True)):
            item = label_writers.LabelledObject(number, box, number, 0.5, {"best_class": "b"})
            yield label_writers.LabelledImage(number, number + 1, path, (640, 480), [item])

    label_set = label_writers.LabelSet(tmp_path / "photos", classes, "model", "description", images)
    for path, content in label_writers.WRITERS[name](label_set):
        if not isinstance(content, Path):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes("".join(content).encode())
    found = labels.read_labels(tmp_path / source, paths)
    assert found.images == [0, 1, 2, 3] and not found.problems
    for (index, text), box in zip(found.objects, boxes, strict=True):
        detection = json.loads(text)
        assert label_objects.find_class_name(found.class_names, detection["category_id"]) == classes[index]
        cutting = geometry.cut_object(np.zeros((480, 640, 3), np.uint8), detection, 0, with_mask=False)
        assert cutting.box == pytest.approx(box, abs=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
@pytest.mark.parametrize(
    ("segmentation", "num_pixels"),
    [
        ([[10, 10, 50, 10, 50, 50]], 780),
        ([10, 10, 50, 10, 50, 50], 780),
        ([[], [5, 5], [5, 5, 6, 6], [10, 10, 50, 10, 50, 50]], 780),
        ({"size": [64, 60], "counts": [0, 780, 3060]}, 780),
        ({"size": [60, 64], "counts": [0, 780, 3060]}, 0),  # of the photo before its EXIF rotation
        ([[5, 5, 6, 6]], 0),
        ([[1, 2, float("nan"), 4, 5, 6]], 0),
        (None, 0),
    ],
)
def test_pycocotools_decodes_whatever_mask_is_written(tmp_path: Path, segmentation: object, num_pixels: int) -> None:
    item = label_writers.LabelledObject(0, (1, 2, 3, 4), 0, 0.5, {}, segmentation)
    image = label_writers.LabelledImage(0, 1, "a.jpg", (60, 64), [item])
    label_set = label_writers.LabelSet(tmp_path, ["b"], "model", "description", lambda: iter([image]))
    _, (_, lines), _ = label_writers.write_coco(label_set)
    (tmp_path / "coco.json").write_text("".join(lines))
    coco = COCO(tmp_path / "coco.json")
    mask = coco.annToMask(coco.anns[1]) if coco.anns[1]["segmentation"] else np.zeros(0)
    assert mask.sum() == num_pixels


CASES = REPO.parent / "shared" / "cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")
@pytest.mark.parametrize(
    "name",
    "01_ls_backslash 02_images_with_image_id 03_float_ids 04_string_image_id 05_categories_empty"
    " 09_bbox_empty_with_polygon 20_track_id 21_conf_and_track_id 23_bom_crlf 25_commas 27_roboflow_yolo"
    " 35_polygon_plus_degenerate 36_flat_polygon_with_box 90_via_coco_export 90c_via_without_categories".split(),
)
def test_the_cases_have_their_five_boxes(name: str) -> None:
    folder = CASES / name
    root = folder / "images" if (folder / "images").is_dir() else folder
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    (source,) = folder.glob("*.json") if list(folder.glob("*.json")) else [(folder / "labels")]
    found = read(source if source.exists() else root, paths)
    boxes: dict[str, list[list[float]]] = {}
    for number, text in found.objects:
        photo = paths[found.images[number]].rpartition("/")[2][0] + ".jpg"
        item = geometry.to_pixels(json.loads(text), *SIZES[photo])
        assert item.get("score", 0.87) == 0.87
        boxes.setdefault(photo, []).append([round(value) for value in geometry.find_box(item, *SIZES[photo])])
        for mask in [item["segmentation"]] if item.get("segmentation") else []:
            assert geometry.read_segmentation(mask, SIZES[photo], (0, 0, *SIZES[photo])).sum() > 3000
    assert boxes == BOXES and not found.problems
