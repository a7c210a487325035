"""Writers of label formats: COCO, YOLO, CVAT, Label Studio, CSV; a library.

A writer turns a `LabelSet` into the text of files and leaves the writing to its caller. To add a format, write a function and enter
it in WRITERS.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import escape

import numpy as np
from geometry import BoxError, list_polygons, read_counts
from label_objects import CSV_COLUMNS, Problem
from label_yolo import flat_name
from labels import FORMULA

CVAT_ATTRIBUTES = ("best_class", "probability", "cosine", "runner_up", "margin", "detection_id")
# What XML or a list of names, one a line, cannot hold. Names may need any other character: Persian and Hindi are written with
# joiners, and macOS puts a narrow no-break space into the names of screenshots.
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


class LabelledObject(NamedTuple):
    """An object and its label."""

    object_index: int  # among all objects
    box: Sequence[float]  # x, y, width, height in px of the upright image
    label: int  # index into `LabelSet.names`
    score: float  # probability that the label is right, 0 to 1
    details: dict[str, Any]  # everything else to write, texts and numbers; the same keys for every object
    segmentation: Any = None  # in COCO's form
    is_crowd: bool = False


class LabelledImage(NamedTuple):
    """An image and its objects."""

    image_index: int  # ascending with the path
    image_id: Any  # from the file that its objects came from
    path: str  # relative to the root, with '/'
    size: tuple[int, int]  # width, height
    objects: Sequence[LabelledObject]


@dataclass(frozen=True)
class LabelSet:
    """The labels of a folder of images."""

    root: Path  # of the images
    names: Sequence[str]  # of the labels
    model: str  # name of their source, for annotation tools
    description: str
    images: Callable[[], Iterator[LabelledImage]]  # returns a fresh iterator: a writer may need several passes


# A file and its text in chunks, so that memory never holds all labels; or a link and its target.
LabelFile = tuple[str, Iterable[str] | Path]


def write_coco(labels: LabelSet) -> Iterator[LabelFile]:
    """Yield the folder coco: a complete data set, and results.json, the scores for pycocotools."""
    yield "coco/images", labels.root
    yield "coco/annotations/instances_default.json", _write_coco_instances(labels)
    results = (_coco_result(image, item) for image in labels.images() for item in image.objects)
    yield "coco/results.json", _json_array(results)


def _write_coco_instances(labels: LabelSet) -> Iterator[str]:
    info = {"description": labels.description, "version": labels.model}
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in enumerate(labels.names, 1)]
    yield f'{{"info":{_to_json(info)},"licenses":[],"categories":{_to_json(categories)},\n"images":'
    yield from _json_array(
        {"id": image.image_id, "file_name": image.path, "width": image.size[0], "height": image.size[1]}
        for image in labels.images()
    )
    yield ',\n"annotations":'
    annotation_ids = itertools.count(1)
    yield from _json_array(
        {
            "id": next(annotation_ids),
            **_coco_result(image, item),
            **_describe_mask(item, image.size),
            "iscrowd": int(item.is_crowd),
            "attributes": {key: value for key, value in item.details.items() if value is not None},
        }
        for image in labels.images()
        for item in image.objects
    )
    yield "}\n"


def _describe_mask(item: LabelledObject, size: tuple[int, int]) -> dict[str, Any]:
    """Return COCO's segmentation of an object, as pycocotools decodes it, and area in px.

    Without a mask that fits the image, the segmentation is [], and the area that of the box.
    """
    mask = item.segmentation
    try:
        if isinstance(mask, dict):
            return {"area": sum(read_counts(mask, size)[1::2]), "segmentation": mask}
        polygons = list_polygons(mask)
    except BoxError:
        return {"area": round(item.box[2] * item.box[3], 3), "segmentation": []}
    areas = []  # by the shoelace formula
    for polygon in polygons:
        x, y = np.array(polygon, float).reshape(-1, 2).T
        areas.append(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
    return {"area": round(sum(areas), 3), "segmentation": polygons}


def _coco_result(image: LabelledImage, item: LabelledObject) -> dict[str, Any]:
    return {"image_id": image.image_id, "category_id": item.label + 1, "bbox": item.box, "score": item.score}


def write_yolo(labels: LabelSet) -> Iterator[LabelFile]:
    """Yield the folder yolo: data.yaml, classes.txt, labels/, confidences/ with a line per line of labels/, and links in images/.

    Each image has a link, because a link to the folder would be resolved and labels looked for beside the photos. Paths are flat,
    because labels of images in a second folder named images are looked for elsewhere.
    """
    names = list(map(_escape_controls, labels.names))
    yield "yolo/classes.txt", [f"{name}\n" for name in names]
    # A JSON string is valid YAML.
    lines = [f"  {number}: {json.dumps(name, ensure_ascii=False)}\n" for number, name in enumerate(names)]
    for name in ("data.yaml", "dataset.yaml"):  # for Ultralytics and for FiftyOne's importer
        yield f"yolo/{name}", ["train: ./images/\nval: ./images/\nnames:\n", *lines]
    written: set[str] = set()
    for image in labels.images():
        stem, _, suffix = image.path.rpartition(".")
        name = flat_name(stem) + ".txt"
        if name in written:  # 1.jpg and 1.png: `find_equal_stems` reports the second
            continue
        written.add(name)
        yield f"yolo/images/{flat_name(stem)}.{suffix}", labels.root / image.path
        width, height = image.size
        lines = []
        for item in image.objects:
            x, y, w, h = item.box
            numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(f"{item.label} " + " ".join(f"{number:.8f}" for number in numbers) + "\n")
        yield f"yolo/labels/{name}", lines
        yield f"yolo/confidences/{name}", [f"{item.score:.6f}\n" for item in image.objects]


def find_equal_stems(paths: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each image that differs from an earlier one only in its suffix, as both would have the same YOLO .txt."""
    by_stem: dict[str, str] = {}
    for path in paths:
        first = by_stem.setdefault(path.rpartition(".")[0], path)
        if first != path:
            yield Problem(path, None, f"has the same .txt in yolo/ as {first}, and is left out there")


def write_cvat(labels: LabelSet) -> Iterator[LabelFile]:
    """Yield cvat/annotations.xml, `CVAT for images 1.1`: boxes with CVAT_ATTRIBUTES."""
    yield "cvat/images", labels.root
    yield "cvat/annotations.xml", _write_cvat_xml(labels)


def _write_cvat_xml(labels: LabelSet) -> Iterator[str]:
    attributes = "".join(
        f"<attribute><name>{name}</name><mutable>False</mutable><input_type>text</input_type>"
        "<default_value></default_value><values></values></attribute>"
        for name in CVAT_ATTRIBUTES
    )
    yield '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
    yield f"<meta><task><name>{_xml(labels.model)}</name><mode>annotation</mode><labels>\n"
    for name in labels.names:
        yield f"<label><name>{_xml(name)}</name><attributes>{attributes}</attributes></label>\n"
    yield "</labels></task></meta>\n"
    for image in labels.images():
        width, height = image.size
        yield f'<image id="{image.image_index}" name="{_xml(image.path)}" width="{width}" height="{height}">\n'
        for item in image.objects:
            x, y, w, h = item.box
            edges = f'xtl="{x:.4f}" ytl="{y:.4f}" xbr="{x + w:.4f}" ybr="{y + h:.4f}"'
            yield f'<box label="{_xml(labels.names[item.label])}" source="auto" occluded="0" {edges} z_order="0">\n'
            for name in CVAT_ATTRIBUTES:
                if item.details.get(name) is not None:
                    yield f'<attribute name="{name}">{_xml(item.details[name])}</attribute>\n'
            yield "</box>\n"
        yield "</image>\n"
    yield "</annotations>\n"


def write_labelstudio(labels: LabelSet) -> Iterator[LabelFile]:
    """Yield labelstudio/config.xml, a labelling interface, and tasks.json, its tasks with predictions.

    Label Studio serves files of a local storage only below its document root; that must be the parent of the folder of images.
    """
    values = "".join(f'    <Label value="{_xml(name)}"/>\n' for name in labels.names)
    head = '<View>\n  <Image name="image" value="$image"/>\n  <RectangleLabels name="label" toName="image">\n'
    yield "labelstudio/config.xml", [head, f"{values}  </RectangleLabels>\n</View>\n"]
    yield "labelstudio/tasks.json", _json_array(_labelstudio_task(labels, image) for image in labels.images())


def _xml(text: Any) -> str:
    return escape(_escape_controls(str(text)), {'"': "&quot;"})


def _escape_controls(text: str) -> str:
    """Return text with backslash escapes for the characters of UNWRITABLE."""
    return UNWRITABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def _json_array(items: Iterable[Any]) -> Iterator[str]:
    """Yield a JSON array, one item per line."""
    yield "["
    for index, item in enumerate(items):
        yield (",\n" if index else "") + _to_json(item)
    yield "]"


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a detector's score may be NaN, which JSON lacks
        return json.dumps(_without_nan(value), separators=(",", ":"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _labelstudio_task(labels: LabelSet, image: LabelledImage) -> dict[str, Any]:
    results = []
    width, height = image.size
    for item in image.objects:
        x, y, w, h = item.box
        percent = {"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height}
        results.append(
            {
                "id": f"object{item.object_index}",
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": item.score,
                "value": {**percent, "rotation": 0, "rectanglelabels": [_escape_controls(labels.names[item.label])]},
                "meta": {"text": [f"{key}: {value}" for key, value in item.details.items()]},
            }
        )
    prediction = {"model_version": labels.model, "result": results}
    if results:
        prediction["score"] = min(item.score for item in image.objects)  # of the least certain object, to sort by
    path = f"{labels.root.resolve().name}/{image.path}".lstrip("/")
    return {"data": {"image": f"/data/local-files/?d={quote(path)}"}, "predictions": [prediction]}


def explain_labelstudio(root: Path, out: Path) -> str:
    """Return the three steps that make Label Studio show the images with their labels."""
    root = root.resolve()
    return (
        "Label Studio shows the photos after three steps:\n"
        f"  1. LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={shlex.quote(str(root.parent))}"
        " label-studio\n"
        f"  2. a project with the interface {out / 'labelstudio' / 'config.xml'}; Settings, Cloud Storage, Add Source Storage,"
        f" Local files: {root} (need not be synchronised)\n"
        f"  3. Import {out / 'labelstudio' / 'tasks.json'}"
    )


def write_csv(labels: LabelSet) -> Iterator[LabelFile]:
    """Yield objects.csv: one line per object, with all details."""
    yield "objects.csv", _write_csv_lines(labels)


def _write_csv_lines(labels: LabelSet) -> Iterator[str]:
    format_row = csv.writer(SimpleNamespace(write=str)).writerow  # returns what `write` returns: the line
    items = ((image, item) for image in labels.images() for item in image.objects)
    index = -1
    for index, (image, item) in enumerate(items):
        if not index:
            yield format_row((*CSV_COLUMNS, *item.details))
        row = (image.path, *item.box, labels.names[item.label], *item.details.values())
        yield format_row([_quote_formula(cell) if isinstance(cell, str) else cell for cell in row])
    if index < 0:  # no objects, and so no details
        yield format_row(CSV_COLUMNS)


def _quote_formula(text: str) -> str:
    """Quote text that FORMULA matches; `unquote_formula` removes the quote."""
    return f"'{text}" if FORMULA.match(text) else text


WRITERS: dict[str, Callable[[LabelSet], Iterator[LabelFile]]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "cvat": write_cvat,
    "labelstudio": write_labelstudio,
    "csv": write_csv,
}
