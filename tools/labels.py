"""Label formats of detectors and annotation tools, read: COCO, YOLO, CVAT, Label Studio, LabelMe, VIA, CSV. No program.

Readers turn a file or folder into `FoundObjects`, whose boxes and masks geometry.py brings into px of the upright image. A new
format is a function, entered in READERS. Raises LabelError for a file that cannot be used as a whole, BoxError for a single object.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote
from xml.etree import ElementTree

import numpy as np
from geometry import MAX_MASK_PIXELS, BoxError, decode_rle, encode_rle, printable
from label_objects import (
    CSV_COLUMNS,
    READ_REMEDY,
    FoundObjects,
    LabelError,
    Problem,
    Rows,
    category_key,
    decode_text,
    list_images,
    make_annotation,
    make_read_error,
    match_images,
    read_file,
)
from label_yolo import find_uploads, read_yolo

LABELSTUDIO_SHAPES = ("rectangle", "polygon", "ellipse", "brush")
VIA_CLASS_NAMES = ("class", "label", "name", "category", "type", "object")  # what its attribute may be called
FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a spreadsheet computes, or what was that before it was quoted


def read_objects(source: Path | None, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects that a file or folder names in some images; none of these is opened.

    Args:
        source: what is to be read; None = each image is one object.
        image_paths: relative to the folder that the file names start from, with '/'.

    Raises:
        LabelError: it cannot be read, is not of its format, or names none of the images.
    """
    if source is not None and source.is_file() and source.suffix.lower() == ".txt":
        raise LabelError("is one file of a folder of YOLO", str(source), f"give the folder, {source.parent}")
    if source is None:
        found = list_images(image_paths)
        found.objects = [(number, '{"yolo":[0.5,0.5,1,1]}') for number in found.images]
        return found
    kind = "folder" if source.is_dir() else source.suffix.lower()
    return READERS.get(kind, read_json)(source, image_paths)


def read_labels(source: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects that a file or folder names in some images, and what their classes are called.

    Raises:
        LabelError: as `read_objects`, or its classes have no names.
    """
    found = read_objects(source, image_paths)
    if found.class_names == {} and found.objects:
        place = "in its categories" if source.is_file() else "in a data.yaml or classes.txt beside the labels"
        raise LabelError("says nowhere what its classes are called", str(source), f"write their names {place}")
    return found


def _shrink(item: dict[str, Any]) -> Any:
    """Make an annotation a string as soon as it is parsed: a polygon takes forty times as much memory as lists of floats.

    An image, or the data of a task, may have a key image_id too; an annotation with a file_name waits until its list is read.
    """
    is_annotation = "image_id" in item and not item.keys().isdisjoint(("bbox", "segmentation", "category_id"))
    return make_annotation(item) if is_annotation and "file_name" not in item else item


def read_json(path: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of a file of COCO, Label Studio, LabelMe or VIA.

    Raises:
        LabelError: not JSON, of none of these, or of other images.
    """
    try:
        data = read_file(path)
        if not data:
            raise ValueError("the file is empty")
        content = json.loads(data, object_hook=_shrink)
    except (OSError, ValueError, RecursionError) as error:
        raise make_read_error(path, error, "JSON") from error
    tasks = content if isinstance(content, list) else [content]  # Label Studio's storages get a file a task
    if tasks and all(isinstance(task, dict) and isinstance(task.get("data"), dict) for task in tasks):
        return _read_labelstudio(path, tasks, image_paths)
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return _read_labelme(path, [(path.name, content)], image_paths)
    if (photos := _list_via_photos(path, content)) is not None:
        return _read_via(path, photos, image_paths)
    if isinstance(content, list):
        raise _refuse_list(path, content)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise LabelError(f"is no COCO file: it has no list {key}", str(path), READ_REMEDY)
    found = match_images(path, content["images"], content["annotations"], image_paths)
    categories = content.get("categories")
    named = [item for item in (categories if isinstance(categories, list) else ()) if isinstance(item, dict)]
    found.class_names = {}
    for item in named:
        if {"id", "name"} <= item.keys():
            key = category_key(item["id"])
            if found.class_names.setdefault(key, item["name"]) != item["name"]:
                found.class_names[key] = None
                found.notes.append(
                    f"several categories have the id {printable(key)[:40]}: what its objects are is not certain"
                )
    return found


def _refuse_list(path: Path, content: list[Any]) -> LabelError:
    """Return what to tell of a JSON list that is none of tasks of Label Studio."""
    first = content[0] if content else None
    if not isinstance(first, dict) or "image_id" in first:
        reason = "is a list of results, which does not say which images they are of"
        remedy = 'give a COCO file {"images": [...], "annotations": [...]}, whose annotations this list is'
        return LabelError(reason, str(path), remedy)
    lists = [value for value in first.values() if isinstance(value, list)]
    if any("original_width" in item for items in lists for item in items if isinstance(item, dict)):
        return LabelError("is of Label Studio's JSON-MIN", str(path), "export as JSON or COCO there")
    return LabelError("is a list, but none of tasks of Label Studio", str(path), READ_REMEDY)


def _read_labelstudio(path: Path, tasks: list[dict[str, Any]], image_paths: Sequence[str]) -> FoundObjects:
    """Return the regions of tasks: of the last annotation that was not cancelled, else of the last prediction."""
    rows = Rows()
    for task in tasks:
        urls = [value for value in task["data"].values() if isinstance(value, str)]
        url = next((value for value in urls if "/" in value), urls[0] if urls else "")
        path_of_url, _, query = url.partition("?")
        local = parse_qs(query).get("d")  # /data/local-files/?d=PATH
        # Absolute: it starts from the document root, or from a server, and the end of it is what counts.
        rows.add_image("/" + (local[0] if local else unquote(path_of_url)).lstrip("/"))
        lists = [value if isinstance(value, list) else [] for value in map(task.get, ("annotations", "predictions"))]
        drafts = [draft for drafts in reversed(lists) for draft in drafts if isinstance(draft, dict)]
        chosen = [draft for draft in drafts if not draft.get("was_cancelled")]
        regions = chosen[-1].get("result") if chosen else None
        regions = [region for region in regions if isinstance(region, dict)] if isinstance(regions, list) else []
        # A shape may have its class in a region of its own, of the same id and place.
        labelled = {str(region.get("id")) for region in regions if str(region.get("type")).endswith("labels")}
        for region in regions:
            kind = str(region.get("type"))
            value = region.get("value")
            names = value.get(kind) if isinstance(value, dict) and kind.endswith("labels") else None
            is_bare = kind in LABELSTUDIO_SHAPES and str(region.get("id")) not in labelled
            if is_bare or kind.endswith("labels"):
                name = str(names[0]) if isinstance(names, list) and names else ""
                rows.add_object(region.get("id"), name, _read_region, region)
    return rows.match(path, image_paths)


def decode_brush(data: Sequence[int], width: int, height: int) -> np.ndarray:
    """Return the mask bool (height, width) of bytes as Label Studio packs what a brush has painted.

    A stream of bits: how many numbers there are (32), how long one is (5, less 1), four lengths of counts (4 each, less 1); then
    groups of a bit that says whether one number is repeated, which of the lengths the count has (2), the count, less 1, and the
    number or numbers. The numbers are red, green, blue and opacity of each pixel.

    Raises:
        BoxError: the stream is of another size, or cut off.
    """
    position = 0

    def take(length: int, count: int = 1) -> np.ndarray:
        nonlocal position
        words = bits[position : position + length * count].reshape(count, length)  # fails where they are cut off
        position += length * count
        return words @ (1 << np.arange(length)[::-1])

    try:
        bits = np.unpackbits(np.array(data, dtype=np.uint8))
        num_values = int(take(32)[0])
        if num_values != 4 * width * height or num_values > 4 * MAX_MASK_PIXELS:
            raise BoxError("has a brush mask of another size than its image")
        length = int(take(5)[0]) + 1
        count_lengths = (take(4, 4) + 1).tolist()
        values = np.empty(num_values, np.min_scalar_type(2**length - 1))
        done = 0
        while done < num_values:
            is_repeated = take(1)[0]
            count = int(take(count_lengths[take(2)[0]])[0]) + 1
            values[done : done + count] = take(length) if is_repeated else take(length, count)
            done += count
    except BoxError:
        raise
    except (ValueError, OverflowError) as error:
        raise BoxError("has a brush mask that is cut off, or not of bytes") from error
    return values.reshape(height, width, 4)[..., 3] > 0


def _read_region(region: dict[str, Any]) -> dict[str, Any]:
    """Return a region, which has percent of the image's sides and turns about its first corner, in shares of them."""
    value = region["value"]
    names = value.get(region["type"])
    if isinstance(names, list) and len(names) > 1:
        raise BoxError(f"has {len(names)} classes")
    if region.get("image_rotation"):
        raise BoxError("is drawn on its image turned, which says not surely where it lies on the upright one")
    if value.get("format") == "rle":
        sides = [int(region[key]) for key in ("original_width", "original_height")]
        return {"segmentation": encode_rle(decode_brush(value["rle"], *sides), 0, 0, *sides)}
    if "points" in value:
        return {"yolo_polygon": [float(number) / 100 for point in value["points"] for number in point]}
    if "radiusX" in value:
        sides = [float(region[key]) for key in ("original_width", "original_height")] * 2
        numbers = [
            float(value[key]) / 100 * side for key, side in zip(("x", "y", "radiusX", "radiusY"), sides, strict=True)
        ]
        return _ellipse_box(*numbers, float(value.get("rotation") or 0))
    if not {"x", "y", "width", "height"} <= value.keys():
        raise BoxError("is neither a rectangle, a polygon nor an ellipse")
    x, y, w, h = (float(value[key]) / 100 for key in ("x", "y", "width", "height"))
    if degrees := float(value.get("rotation") or 0):
        sides = [float(region[key]) for key in ("original_width", "original_height")]
        corners = turn_box([x * sides[0], y * sides[1], w * sides[0], h * sides[1]], degrees, (0.0, 0.0))
        return {"yolo_polygon": [number / side for number, side in zip(corners, sides * 4, strict=True)]}
    return {"yolo": [x + w / 2, y + h / 2, w, h]}


def turn_box(bbox: Sequence[float], degrees: float, pivot: tuple[float, float]) -> list[float]:
    """Return the corners x1, y1 ... y4 in px of a box x, y, w, h, turned clockwise about a point of it, in shares of its sides."""
    x, y, width, height = bbox
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = []
    for along, down in ((0, 0), (1, 0), (1, 1), (0, 1)):
        right, below = (along - pivot[0]) * width, (down - pivot[1]) * height
        corners += [x + pivot[0] * width + right * cos - below * sin, y + pivot[1] * height + right * sin + below * cos]
    return corners


def read_cvat(path: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the boxes and polygons of a file of CVAT for images 1.1.

    Raises:
        LabelError: not XML, without images, or of other images.
    """
    rows = Rows()
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(read_file(path))):
            if element.tag != "image":
                continue
            sides = {key: int(element.get(key, "0")) for key in ("width", "height")}
            rows.add_image(element.get("name"), **sides)
            for index, shape in enumerate(element, 1):
                if shape.tag != "tag":  # of the image as a whole
                    rows.add_object(index, shape.get("label", ""), _read_cvat_shape, shape, sides)
            element.clear()
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise make_read_error(path, error, "XML") from error
    if not rows.images:
        raise LabelError("has no images: it is not of CVAT for images 1.1", str(path), READ_REMEDY)
    return rows.match(path, image_paths)


def _read_cvat_shape(shape: ElementTree.Element, sides: dict[str, int]) -> dict[str, Any]:
    if shape.tag == "polygon":
        return {"segmentation": [[float(number) for number in shape.get("points").replace(";", ",").split(",")]]}
    if shape.tag == "mask":
        return {"segmentation": _read_cvat_mask(shape, sides)}
    if shape.tag == "ellipse":
        return _ellipse_box(*(float(shape.get(key, "0")) for key in ("cx", "cy", "rx", "ry", "rotation")))
    if shape.tag != "box":
        raise _refuse_shape(shape.tag)
    left, top, right, bottom = (float(shape.get(key)) for key in ("xtl", "ytl", "xbr", "ybr"))
    bbox = [left, top, right - left, bottom - top]
    if degrees := float(shape.get("rotation", "0")):
        return {"segmentation": [turn_box(bbox, degrees, (0.5, 0.5))]}
    return {"bbox": bbox}


def _read_cvat_mask(shape: ElementTree.Element, sides: dict[str, int]) -> dict[str, Any]:
    """Return a mask that CVAT has as run lengths along the rows of its box, starting with background."""
    left, top, width, height = (int(shape.get(key)) for key in ("left", "top", "width", "height"))
    _check_mask(left, top, width, height, sides)
    mask = decode_rle([int(count) for count in shape.get("rle").split(",")], height, width).T  # rows for columns
    return encode_rle(mask, left, top, sides["width"], sides["height"])


def _refuse_shape(kind: str, num_points: int = 0) -> BoxError:
    points = f" of {num_points} points" if num_points else ""
    return BoxError(f"has the shape {printable(kind)[:40]}{points}, neither a box nor a polygon")


def _check_mask(left: int, top: int, width: int, height: int, sides: dict[str, int]) -> None:
    is_inside = left >= 0 and top >= 0 and left + width <= sides["width"] and top + height <= sides["height"]
    if not is_inside or width <= 0 or height <= 0:
        raise BoxError("has a mask outside its image")


def read_csv(path: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of a table with the columns image, x, y, width, height, class, in px.

    Raises:
        LabelError: a column is missing, or it is of other images.
    """
    rows = Rows()
    images: dict[str, list[tuple[int, dict[str, str]]]] = {}
    try:
        text = decode_text(read_file(path))
        # Excel separates by what its country does, and writes decimals with a comma where that is not ",".
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines.fieldnames = [name.strip().lower() for name in lines.fieldnames or ()]
        missing = [name for name in CSV_COLUMNS if name not in lines.fieldnames]
        if missing:
            is_labelstudio = "annotation_id" in lines.fieldnames
            raise ValueError("it is Label Studio's CSV" if is_labelstudio else f"it has no column {missing[0]}")
        for line in lines:
            images.setdefault(unquote_formula(line["image"] or ""), []).append((lines.line_num, line))
    except (OSError, ValueError, csv.Error) as error:
        raise make_read_error(path, error, f"a table of {', '.join(CSV_COLUMNS)}") from error
    for name, lines_of_image in images.items():
        rows.add_image(name)
        for number, line in lines_of_image:
            rows.add_object(f"line {number}", unquote_formula(line["class"] or ""), _read_csv_box, line)
    return rows.match(path, image_paths)


def unquote_formula(text: str) -> str:
    """Return what stood in a cell before `quote_formula`, of label_writers.py, quoted it."""
    return text[1:] if text[:1] == "'" and FORMULA.match(text) else text


def _read_csv_box(line: dict[str, str]) -> dict[str, Any]:
    return {"bbox": [float(line[key].replace(",", ".")) for key in CSV_COLUMNS[1:5]]}


def read_folder(folder: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of a folder: of YOLO if it holds a .txt of an image's name, else of LabelMe if it holds any .json."""
    stems = {name.rpartition(".")[0].rpartition("/")[2] for name in image_paths}
    names = {path.stem for path in folder.rglob("*.txt")}
    if not stems.isdisjoint(names | find_uploads(folder, image_paths).keys()):
        return read_yolo(folder, image_paths)
    passed_over = {"notes.json"} if names else set()  # which Label Studio adds to its labels of YOLO
    paths = sorted(
        path for path in folder.rglob("*.json") if not path.name.startswith(".") and path.name not in passed_over
    )
    if len(paths) == 1:
        return read_json(paths[0], image_paths)
    return _read_labelme_folder(folder, paths, image_paths) if paths else read_yolo(folder, image_paths)


def _read_labelme_folder(folder: Path, paths: Sequence[Path], image_paths: Sequence[str]) -> FoundObjects:
    foreign: list[Problem] = []

    def read_files() -> Iterator[tuple[str, dict[str, Any]]]:
        for path in paths:  # one at a time: each holds its photo too
            name = path.relative_to(folder).as_posix()
            try:
                content = json.loads(read_file(path))
                if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                    raise ValueError("it has no list shapes")
            except (OSError, ValueError, RecursionError) as error:
                foreign.append(Problem(name, None, f"is no file of LabelMe: {error}"[:200]))
                continue
            yield name, content

    found = _read_labelme(folder, read_files(), image_paths)
    found.problems += foreign
    return found


def _read_labelme(path: Path, files: Iterable[tuple[str, dict[str, Any]]], image_paths: Sequence[str]) -> FoundObjects:
    """Return the shapes of files of LabelMe, each a path and its content."""
    rows = Rows()
    known = {unicodedata.normalize("NFC", name) for name in image_paths}
    by_stem = {name.rpartition(".")[0]: name for name in known}
    num_named = Counter(name.rpartition("/")[2] for name in known)
    by_name = {name.rpartition("/")[2]: name for name in known if num_named[name.rpartition("/")[2]] == 1}
    for name, content in files:
        folder = name.rpartition("/")[0]
        said = unicodedata.normalize("NFC", str(content.get("imagePath") or "").replace("\\", "/"))
        short = said.rpartition("/")[2]
        # Where it says, beside it, of its own name, or anywhere else if there is but one of that name.
        places = [os.path.normpath(os.path.join(folder, word)) for word in (said, short)]  # noqa: PTH118
        places += [by_stem.get(unicodedata.normalize("NFC", name.rpartition(".")[0])), by_name.get(short)]
        sides = {key: content.get(f"image{key.title()}") for key in ("width", "height")}
        photo = next((place for place in places if place in known), places[0])
        rows.add_image(photo, **{key: side for key, side in sides.items() if isinstance(side, int)})
        for index, shape in enumerate(content["shapes"], 1):
            shape = shape if isinstance(shape, dict) else {}
            rows.add_object(index, str(shape.get("label") or ""), _read_labelme_shape, shape, sides)
    if not rows.images:
        raise LabelError("holds no .txt of YOLO and no .json of LabelMe", str(path), READ_REMEDY)
    return rows.match(path, image_paths)


def _read_labelme_shape(shape: dict[str, Any], sides: dict[str, int]) -> dict[str, Any]:
    kind = shape.get("shape_type") or "polygon"
    points = [[float(number) for number in point] for point in shape["points"]]
    if kind in ("polygon", "rotation", "oriented_rectangle"):  # the second of X-AnyLabeling
        return {"segmentation": [[number for point in points for number in point]]}
    if kind == "rectangle" and len(points) == 4:  # of X-AnyLabeling
        points = [
            [min(values) for values in zip(*points, strict=True)],
            [max(values) for values in zip(*points, strict=True)],
        ]
    if kind not in ("rectangle", "circle", "mask") or len(points) != 2:
        raise _refuse_shape(str(kind), len(points))
    (x0, y0), (x1, y1) = points
    if kind == "circle":  # its centre, and a point on it
        radius = math.dist(points[0], points[1])
        return _ellipse_box(x0, y0, radius, radius)
    left, top = min(x0, x1), min(y0, y1)
    if kind == "mask":
        return {"segmentation": _read_labelme_mask(shape["mask"], round(left), round(top), sides)}
    return {"bbox": [left, top, abs(x1 - x0), abs(y1 - y0)]}


def _read_labelme_mask(text: str, left: int, top: int, sides: dict[str, int]) -> dict[str, Any]:
    """Return a mask that LabelMe has as PNG of its box in base64."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]) as picture:
            mask = np.asarray(picture.convert("L")) > 0
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow calls what is damaged
        raise BoxError(f"has a mask that cannot be read: {error}"[:200]) from error
    _check_mask(left, top, *mask.shape[::-1], sides)
    return encode_rle(mask, left, top, sides["width"], sides["height"])


def _ellipse_box(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> dict[str, Any]:
    """Return the box around an ellipse that is turned about its centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    width, height = math.hypot(radius_x * cos, radius_y * sin), math.hypot(radius_x * sin, radius_y * cos)
    return {"bbox": [x - width, y - height, 2 * width, 2 * height]}


def _list_via_photos(path: Path, content: Any) -> list[dict[str, Any]] | None:
    """Return the photos of a project or an export of VIA 2, or None for a file of something else.

    Raises:
        LabelError: it is a project of VIA 3.
    """
    if not isinstance(content, dict):
        return None
    if {"project", "metadata", "view"} <= content.keys():
        raise LabelError("is a project of VIA 3, which is not read", str(path), "export its annotations as COCO there")
    photos = content.get("_via_img_metadata", content)
    photos = list(photos.values()) if isinstance(photos, dict) else [None]
    is_via = bool(photos) and all(isinstance(item, dict) and {"filename", "regions"} <= item.keys() for item in photos)
    return photos if is_via else None


def _read_via(path: Path, photos: list[dict[str, Any]], image_paths: Sequence[str]) -> FoundObjects:
    """Return the regions of VIA; their class is the attribute that is called so, or the only one that there is."""
    regions_of: list[list[dict[str, Any]]] = []
    for photo in photos:
        regions = photo["regions"]
        regions = regions.values() if isinstance(regions, dict) else regions if isinstance(regions, list) else ()
        regions_of.append([region if isinstance(region, dict) else {} for region in regions])
    attributes = [region.get("region_attributes") for regions in regions_of for region in regions]
    names = list(dict.fromkeys(name for item in attributes if isinstance(item, dict) for name in item))
    called = [name for word in VIA_CLASS_NAMES for name in names if name.strip().lower() == word]
    if len(names) > 1 and not called:
        reason = f"has regions with the attributes {', '.join(names[:5])}, and none is called class"
        raise LabelError(reason, str(path), "call the one that is the class so")
    rows = Rows()
    for photo, regions in zip(photos, regions_of, strict=True):
        rows.add_image(photo["filename"])
        for index, region in enumerate(regions, 1):
            values = region.get("region_attributes")
            value = values.get((called or names)[0]) if isinstance(values, dict) and names else None
            if isinstance(value, dict):  # of check boxes
                ticked = [name for name, is_ticked in value.items() if is_ticked]
                value = ticked[0] if len(ticked) == 1 else None
            rows.add_object(index, str(value or ""), _read_via_shape, region.get("shape_attributes"))
    return rows.match(path, image_paths)


def _read_via_shape(shape: dict[str, Any]) -> dict[str, Any]:
    kind = shape["name"]
    if kind == "rect":
        return {"bbox": [float(shape[key]) for key in ("x", "y", "width", "height")]}
    if kind == "polygon":
        points = zip(shape["all_points_x"], shape["all_points_y"], strict=True)
        return {"segmentation": [[float(number) for point in points for number in point]]}
    if kind == "circle":
        return _ellipse_box(*(float(shape[key]) for key in ("cx", "cy", "r", "r")))
    if kind == "ellipse":
        numbers = [float(shape[key]) for key in ("cx", "cy", "rx", "ry")]
        return _ellipse_box(*numbers, math.degrees(float(shape.get("theta", 0))))
    raise _refuse_shape(str(kind))


# What can be read: a folder, or a file by its suffix; a file of any other suffix is taken for COCO.
READERS: dict[str, Callable[[Path, Sequence[str]], FoundObjects]] = {
    "folder": read_folder,
    ".json": read_json,
    ".xml": read_cvat,
    ".csv": read_csv,
}
