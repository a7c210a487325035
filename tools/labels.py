"""Readers of label formats: COCO, YOLO, CVAT, Label Studio, LabelMe, VIA, CSV; a library.

A reader turns a file or folder into `FoundObjects`; geometry.py converts their boxes and masks to px of the upright image. To add a
format, write a function and enter it in READERS. Raises LabelError for a file that cannot be used, BoxError for a single object.
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
from geometry import MAX_MASK_PIXELS, BoxError, check_counts, decode_rle, encode_rle, printable, rotate_box
from label_objects import (
    CSV_COLUMNS,
    READ_REMEDY,
    FoundObjects,
    LabelError,
    Problem,
    Rows,
    category_key,
    decode_text,
    describe_error,
    list_images,
    make_annotation,
    make_read_error,
    match_images,
    read_file,
)
from label_yolo import find_uploads, read_descriptions, read_yolo

LABELSTUDIO_SHAPES = ("rectangle", "polygon", "ellipse", "brush")
IMAGE_URL = re.compile(r"[/\\].*\.(?:jpe?g|png|bmp|webp|tiff?)\b", re.IGNORECASE | re.DOTALL)  # a query may follow
VIA_CLASS_NAMES = ("class", "label", "name", "category", "type", "object")  # attributes that may hold the class
# A cell that a spreadsheet computes, or that begins with a space, which `read_csv` skips; quoted or not.
FORMULA = re.compile(r"'*[=+\-@\t\r ]")


def read_labels(source: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Read objects as `read_objects` does, and raise LabelError also if their classes have no names."""
    detections = read_objects(source, image_paths)
    if detections.class_names == {} and detections.objects:
        place = "in its categories" if source.is_file() else "in a data.yaml or classes.txt beside the labels"
        unread = [] if source.is_file() else [text for text in read_descriptions(source) if isinstance(text, str)]
        reason = "; ".join(["says nowhere what its classes are called", *unread])
        raise LabelError(reason, str(source), f"write their names {place}")
    return detections


def read_objects(source: Path | None, image_paths: Sequence[str]) -> FoundObjects:
    """Read the objects of images from a label file or folder, without opening the images.

    Args:
        source: file or folder; None = each image is one object.
        image_paths: relative to the folder that names in the file start from, with '/'.

    Raises:
        LabelError: `source` cannot be read, is not in its format, or names none of the images.
    """
    if source is None:
        detections = list_images(image_paths)
        detections.objects = [(index, '{"yolo":[0.5,0.5,1,1]}') for index in detections.images]
        return detections
    kind = "folder" if source.is_dir() else source.suffix.lower()
    if kind in (".txt", ".yaml", ".yml"):
        raise LabelError("is one file of a folder of YOLO", str(source), "give the folder of its .txt files")
    if kind == ".zip":
        raise LabelError("is a packed export", str(source), "unpack it, and give the file or folder of labels in it")
    return READERS.get(kind, read_json)(source, image_paths)


def read_cvat(path: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Read the shapes of a file of CVAT for images 1.1. Raises LabelError if it is not XML, or names none of the images."""
    rows = Rows()
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(read_file(path))):
            if element.tag != "image":
                continue
            sides = {key: int(element.get(key, "0")) for key in ("width", "height")}
            rows.add_image(element.get("name"), **sides)
            for index, shape in enumerate(element, 1):
                if shape.tag != "tag":  # a tag is of the whole image
                    rows.add_object(index, shape.get("label", ""), _read_cvat_shape, shape, sides)
            element.clear()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:  # LookupError: no such encoding
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
        return _bound_ellipse(*(float(shape.get(key, "0")) for key in ("cx", "cy", "rx", "ry", "rotation")))
    if shape.tag != "box":
        raise _make_shape_error(shape.tag)
    left, top, right, bottom = (float(shape.get(key)) for key in ("xtl", "ytl", "xbr", "ybr"))
    bbox = [left, top, right - left, bottom - top]
    if degrees := float(shape.get("rotation", "0")):
        return {"segmentation": [rotate_box(bbox, degrees, (0.5, 0.5))]}
    return {"bbox": bbox}


def _read_cvat_mask(shape: ElementTree.Element, sides: dict[str, int]) -> dict[str, Any]:
    """Decode a mask from run lengths along the rows of its box that start with background."""
    left, top, width, height = (int(shape.get(key)) for key in ("left", "top", "width", "height"))
    _check_mask(left, top, width, height, sides)
    counts = check_counts([int(count) for count in shape.get("rle").split(",")], height * width)
    mask = decode_rle(counts, height, width).T  # by rows, so transposed
    return encode_rle(mask, left, top, sides["width"], sides["height"])


def read_csv(path: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Read a table with CSV_COLUMNS, boxes in px. Raises LabelError if a column is missing, or if it names none of the images."""
    rows = Rows()
    lines_by_image: dict[str, list[tuple[int, dict[str, str]]]] = {}
    try:
        text = decode_text(read_file(path))
        # The separator of Excel depends on the locale; where it is not ",", decimals may have a comma.
        first_line = text.partition("\n")[0]
        stated = re.match(r'"?sep=(.)', first_line, re.IGNORECASE)  # a first line for Excel alone
        delimiter = stated[1] if stated else max(",;\t", key=first_line.count)
        lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        if stated:
            next(lines.reader)
        lines.fieldnames = [name.strip().lower() for name in lines.fieldnames or ()]
        missing = [name for name in CSV_COLUMNS if name not in lines.fieldnames]
        if missing:
            is_labelstudio = "annotation_id" in lines.fieldnames
            raise ValueError("it is Label Studio's CSV" if is_labelstudio else f"it has no column {missing[0]}")
        for line in filter(lambda line: any(line.values()), lines):  # spreadsheets leave empty rows at the end
            lines_by_image.setdefault(unquote_formula(line["image"] or ""), []).append((lines.line_num, line))
    except (OSError, ValueError, csv.Error) as error:
        raise make_read_error(path, error, f"a table of {', '.join(CSV_COLUMNS)}") from error
    for name, image_lines in lines_by_image.items():
        rows.add_image(name)
        for number, line in image_lines:
            rows.add_object(f"line {number}", unquote_formula(line["class"] or ""), _read_csv_box, line)
    return rows.match(path, image_paths)


def unquote_formula(text: str) -> str:
    """Return the text of a cell before `_quote_formula` of label_writers.py quoted it."""
    return text[1:] if text[:1] == "'" and FORMULA.match(text) else text


def _read_csv_box(line: dict[str, str]) -> dict[str, Any]:
    return {"bbox": [float(line[key].replace(",", ".")) for key in CSV_COLUMNS[1:5]]}


def read_folder(folder: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Read a folder: as YOLO if a .txt in it is named like an image, else as LabelMe if it holds any .json, else as YOLO."""
    image_stems = {name.rpartition(".")[0].rpartition("/")[2] for name in image_paths}
    label_stems = {path.stem for path in folder.rglob("*.txt")}
    if not image_stems.isdisjoint(label_stems | find_uploads(folder, image_paths).keys()):
        return read_yolo(folder, image_paths)
    ignored = {"notes.json"} if label_stems else set()  # part of Label Studio's YOLO export
    paths = sorted(
        path for path in folder.rglob("*.json") if not path.name.startswith(".") and path.name not in ignored
    )
    if len(paths) == 1:
        return read_json(paths[0], image_paths)
    return _read_labelme_folder(folder, paths, image_paths) if paths else read_yolo(folder, image_paths)


def read_json(path: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Read a file of COCO, Label Studio, LabelMe or VIA. Raises LabelError if it is none of these, or names none of the images."""
    try:
        data = read_file(path)
        if not data:
            raise ValueError("the file is empty")
        content = json.loads(data, object_hook=_compact_annotation)
    except (OSError, ValueError, RecursionError) as error:
        raise make_read_error(path, error, "JSON") from error
    tasks = content if isinstance(content, list) else [content]  # a Label Studio storage has one file per task
    if tasks and all(isinstance(task, dict) and isinstance(task.get("data"), dict) for task in tasks):
        return _read_labelstudio(path, tasks, image_paths)
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return _read_labelme(path, [(path.name, content)], image_paths)
    if (photos := _list_via_photos(path, content)) is not None:
        return _read_via(path, photos, image_paths)
    if isinstance(content, list):
        raise _make_list_error(path, content)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise LabelError(f"is no COCO file: it has no list {key}", str(path), READ_REMEDY)
    detections = match_images(path, content["images"], content["annotations"], image_paths)
    categories = content.get("categories")
    detections.class_names = {}
    for item in categories if isinstance(categories, list) else ():
        if isinstance(item, dict) and {"id", "name"} <= item.keys():
            key = category_key(item["id"])
            if detections.class_names.setdefault(key, item["name"]) != item["name"]:
                detections.class_names[key] = None
                detections.notes.append(
                    f"several categories have the id {printable(key)[:40]}: what its objects are is not certain"
                )
    return detections


def _compact_annotation(item: dict[str, Any]) -> Any:
    """Turn an annotation into JSON text as soon as it is parsed: as lists of floats, polygons take forty times the memory.

    An image or the data of a task may have a key image_id too, so an annotation with a file_name stays a dict until `match_images`.
    """
    is_annotation = "image_id" in item and not item.keys().isdisjoint(("bbox", "segmentation", "category_id"))
    return make_annotation(item) if is_annotation and "file_name" not in item else item


def _read_labelstudio(path: Path, tasks: list[dict[str, Any]], image_paths: Sequence[str]) -> FoundObjects:
    """Read the regions of each task's last annotation that was not cancelled, else of its last prediction."""
    rows = Rows()
    for task in tasks:
        urls = [value for value in task["data"].values() if isinstance(value, str)]
        url = next(filter(IMAGE_URL.search, urls), urls[0] if urls else "")
        path_of_url, _, query = url.partition("?")
        local_paths = parse_qs(query).get("d")  # /data/local-files/?d=PATH
        # With a leading '/', since it starts from the document root or a server: it is matched by its end.
        rows.add_image("/" + (local_paths[0] if local_paths else unquote(path_of_url)).lstrip("/"))
        # Predictions first, so that the last result is an annotation if there is one.
        groups = [value for value in map(task.get, ("predictions", "annotations")) if isinstance(value, list)]
        results = [result for group in groups for result in group if isinstance(result, dict)]
        valid = [result for result in results if not result.get("was_cancelled")]
        regions = valid[-1].get("result") if valid else None
        regions = [region for region in regions if isinstance(region, dict)] if isinstance(regions, list) else []
        # A shape may have its class in a second region with the same id and place.
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


def _read_region(region: dict[str, Any]) -> dict[str, Any]:
    """Return the shape of a region in fractions of the image's sides; a region has percent, and rotates about its first corner."""
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
        return {"yolo_polygon": [float(number) / 100 for x, y in value["points"] for number in (x, y)]}
    if "radiusX" in value:
        sides = [float(region[key]) for key in ("original_width", "original_height")] * 2
        ellipse = [
            float(value[key]) / 100 * side for key, side in zip(("x", "y", "radiusX", "radiusY"), sides, strict=True)
        ]
        return _bound_ellipse(*ellipse, float(value.get("rotation") or 0))
    if not {"x", "y", "width", "height"} <= value.keys():
        raise BoxError("is neither a rectangle, a polygon nor an ellipse")
    x, y, w, h = (float(value[key]) / 100 for key in ("x", "y", "width", "height"))
    if degrees := float(value.get("rotation") or 0):
        sides = [float(region[key]) for key in ("original_width", "original_height")]
        corners = rotate_box([x * sides[0], y * sides[1], w * sides[0], h * sides[1]], degrees, (0.0, 0.0))
        return {"yolo_polygon": [number / side for number, side in zip(corners, sides * 4, strict=True)]}
    return {"yolo": [x + w / 2, y + h / 2, w, h]}


def decode_brush(data: Sequence[int], width: int, height: int) -> np.ndarray:
    """Decode the bytes of a Label Studio brush mask to bool (H, W).

    The bit stream: number of values (32 bits), bits per value less 1 (5), four bit lengths of counts, each less 1 (4 each); then
    runs: a bit that is set if one value is repeated, which of the lengths the count has (2), the count less 1, the value or values.
    The values are red, green, blue and opacity of each pixel. Raises BoxError if the stream has another size, or is cut off.
    """
    position = 0

    def take(num_bits: int, count: int = 1) -> np.ndarray:
        nonlocal position
        groups = bits[position : position + num_bits * count].reshape(count, num_bits)  # ValueError if cut off
        position += num_bits * count
        return groups @ (1 << np.arange(num_bits)[::-1])

    try:
        bits = np.unpackbits(np.array(data, dtype=np.uint8))
        num_values = int(take(32)[0])
        if num_values != 4 * width * height or num_values > 4 * MAX_MASK_PIXELS:
            raise BoxError("has a brush mask of another size than its image")
        num_bits = int(take(5)[0]) + 1
        count_bits = (take(4, 4) + 1).tolist()
        values = np.empty(num_values, np.min_scalar_type(2**num_bits - 1))
        done = 0
        while done < num_values:
            is_repeated = take(1)[0]
            count = int(take(count_bits[take(2)[0]])[0]) + 1
            values[done : done + count] = take(num_bits) if is_repeated else take(num_bits, count)
            done += count
    except BoxError:
        raise
    except (ValueError, OverflowError) as error:
        raise BoxError("has a brush mask that is cut off, or not of bytes") from error
    return values.reshape(height, width, 4)[..., 3] > 0


def _list_via_photos(path: Path, content: Any) -> list[dict[str, Any]] | None:
    """Return the photos of a project or an export of VIA 2, None for another file. Raises LabelError for a project of VIA 3."""
    if not isinstance(content, dict):
        return None
    if {"project", "metadata", "view"} <= content.keys():
        raise LabelError("is a project of VIA 3, which is not read", str(path), "export its annotations as COCO there")
    photos = content.get("_via_img_metadata", content)
    photos = list(photos.values()) if isinstance(photos, dict) else [None]
    is_via = bool(photos) and all(isinstance(item, dict) and {"filename", "regions"} <= item.keys() for item in photos)
    return photos if is_via else None


def _read_via(path: Path, photos: list[dict[str, Any]], image_paths: Sequence[str]) -> FoundObjects:
    """Read the regions of a VIA file; their class is the attribute named in VIA_CLASS_NAMES, or the only attribute."""
    regions_by_photo: list[list[dict[str, Any]]] = []
    for photo in photos:
        regions = photo["regions"]
        regions = regions.values() if isinstance(regions, dict) else regions if isinstance(regions, list) else ()
        regions_by_photo.append([region if isinstance(region, dict) else {} for region in regions])
    region_attributes = [region.get("region_attributes") for regions in regions_by_photo for region in regions]
    attributes = list(dict.fromkeys(name for item in region_attributes if isinstance(item, dict) for name in item))
    class_attributes = [name for wanted in VIA_CLASS_NAMES for name in attributes if name.strip().lower() == wanted]
    if len(attributes) > 1 and not class_attributes:
        reason = f"has regions with the attributes {', '.join(attributes[:5])}, and none is called class"
        raise LabelError(reason, str(path), "call the one that is the class so")
    rows = Rows()
    for photo, regions in zip(photos, regions_by_photo, strict=True):
        rows.add_image(photo["filename"])
        for index, region in enumerate(regions, 1):
            values = region.get("region_attributes")
            value = values.get((class_attributes or attributes)[0]) if isinstance(values, dict) and attributes else None
            if isinstance(value, dict):  # check boxes
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
        return _bound_ellipse(*(float(shape[key]) for key in ("cx", "cy", "r", "r")))
    if kind == "ellipse":
        ellipse = [float(shape[key]) for key in ("cx", "cy", "rx", "ry")]
        return _bound_ellipse(*ellipse, math.degrees(float(shape.get("theta", 0))))
    raise _make_shape_error(str(kind))


def _make_list_error(path: Path, content: list[Any]) -> LabelError:
    """Return the error for a JSON list that does not hold tasks of Label Studio."""
    first = content[0] if content else None
    if not isinstance(first, dict) or "image_id" in first:
        reason = "is a list of results, which does not say which images they are of"
        remedy = 'give a COCO file {"images": [...], "annotations": [...]}, whose annotations this list is'
        return LabelError(reason, str(path), remedy)
    lists = [value for value in first.values() if isinstance(value, list)]
    if any("original_width" in item for items in lists for item in items if isinstance(item, dict)):
        return LabelError("is of Label Studio's JSON-MIN", str(path), "export as JSON or COCO there")
    return LabelError("is a list, but none of tasks of Label Studio", str(path), READ_REMEDY)


def _read_labelme_folder(folder: Path, paths: Sequence[Path], image_paths: Sequence[str]) -> FoundObjects:
    problems: list[Problem] = []

    def read_files() -> Iterator[tuple[str, dict[str, Any]]]:
        for path in paths:  # one at a time, as each embeds its photo
            name = path.relative_to(folder).as_posix()
            try:
                content = json.loads(read_file(path))
                if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                    raise ValueError("it has no list shapes")
            except (OSError, ValueError, RecursionError) as error:
                problems.append(Problem(name, None, f"is no file of LabelMe: {describe_error(error)}"))
                continue
            yield name, content

    detections = _read_labelme(folder, read_files(), image_paths)
    detections.problems += problems
    return detections


def _read_labelme(path: Path, files: Iterable[tuple[str, dict[str, Any]]], image_paths: Sequence[str]) -> FoundObjects:
    """Read the shapes of LabelMe files, given as pairs of path and content."""
    rows = Rows()
    image_names = {unicodedata.normalize("NFC", name) for name in image_paths}
    by_stem = {name.rpartition(".")[0]: name for name in image_names}
    num_equal = Counter(name.rpartition("/")[2] for name in image_names)
    by_name = {name.rpartition("/")[2]: name for name in image_names if num_equal[name.rpartition("/")[2]] == 1}
    for name, content in files:
        folder = name.rpartition("/")[0]
        stated = unicodedata.normalize("NFC", str(content.get("imagePath") or "").replace("\\", "/"))
        base_name = stated.rpartition("/")[2]
        # The stated path, the stated name beside the file, the name of the file, or the stated name anywhere if it is unique.
        candidates = [os.path.normpath(os.path.join(folder, spelling)) for spelling in (stated, base_name)]  # noqa: PTH118
        candidates += [by_stem.get(unicodedata.normalize("NFC", name.rpartition(".")[0])), by_name.get(base_name)]
        sides = {key: content.get(f"image{key.title()}") for key in ("width", "height")}
        photo = next(filter(image_names.__contains__, candidates), candidates[0] if stated else name)
        rows.add_image(photo, **{key: side for key, side in sides.items() if isinstance(side, int)})
        for index, shape in enumerate(content["shapes"], 1):
            shape = shape if isinstance(shape, dict) else {}
            rows.add_object(index, str(shape.get("label") or ""), _read_labelme_shape, shape, sides)
    if not rows.images:
        raise LabelError("holds no .txt of YOLO and no .json of LabelMe", str(path), READ_REMEDY)
    return rows.match(path, image_paths)


def _read_labelme_shape(shape: dict[str, Any], sides: dict[str, int]) -> dict[str, Any]:
    kind = shape.get("shape_type") or "polygon"
    points = [[float(x), float(y)] for x, y in shape["points"]]
    if kind in ("polygon", "rotation", "oriented_rectangle"):  # "rotation" is X-AnyLabeling's
        return {"segmentation": [[number for point in points for number in point]]}
    if kind == "rectangle" and len(points) == 4:  # as X-AnyLabeling writes it
        points = [[extreme(values) for values in zip(*points, strict=True)] for extreme in (min, max)]
    if kind not in ("rectangle", "circle", "mask") or len(points) != 2:
        raise _make_shape_error(str(kind), len(points))
    (x0, y0), (x1, y1) = points
    if kind == "circle":  # given by its centre and a point on it
        radius = math.dist(points[0], points[1])
        return _bound_ellipse(x0, y0, radius, radius)
    left = min(x0, x1)
    top = min(y0, y1)
    if kind == "mask":
        return {"segmentation": _read_labelme_mask(shape["mask"], round(left), round(top), sides)}
    return {"bbox": [left, top, abs(x1 - x0), abs(y1 - y0)]}


def _make_shape_error(kind: str, num_points: int = 0) -> BoxError:
    points = f" of {num_points} points" if num_points else ""
    return BoxError(f"has the shape {printable(kind)[:40]}{points}, neither a box nor a polygon")


def _bound_ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> dict[str, Any]:
    """Return the bounding box of an ellipse that is rotated about its centre."""
    cos = math.cos(math.radians(degrees))
    sin = math.sin(math.radians(degrees))
    half_width = math.hypot(radius_x * cos, radius_y * sin)
    half_height = math.hypot(radius_x * sin, radius_y * cos)
    return {"bbox": [x - half_width, y - half_height, 2 * half_width, 2 * half_height]}


def _read_labelme_mask(text: str, left: int, top: int, sides: dict[str, int]) -> dict[str, Any]:
    """Decode a mask from a base64 PNG of its box."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]) as picture:
            mask = np.asarray(picture.convert("L")) > 0
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's errors for damaged files
        raise BoxError(f"has a mask that cannot be read: {error}"[:200]) from error
    _check_mask(left, top, *mask.shape[::-1], sides)
    return encode_rle(mask, left, top, sides["width"], sides["height"])


def _check_mask(left: int, top: int, width: int, height: int, sides: dict[str, int]) -> None:
    is_inside = left >= 0 and top >= 0 and left + width <= sides["width"] and top + height <= sides["height"]
    if not is_inside or width <= 0 or height <= 0:
        raise BoxError("has a mask outside its image")


# Readers by "folder" or suffix; a file with any other suffix is read as JSON.
READERS: dict[str, Callable[[Path, Sequence[str]], FoundObjects]] = {
    "folder": read_folder,
    ".json": read_json,
    ".xml": read_cvat,
    ".csv": read_csv,
}
