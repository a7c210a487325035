"""Label formats of detectors and annotation tools, read: COCO, YOLO, CVAT, Label Studio, LabelMe, VIA, CSV. No program.

Readers turn a file or folder into `FoundObjects`, whose boxes and masks geometry.py brings into px of the upright image. A new
format is a function, entered in READERS. Raises LabelError for a file that cannot be used as a whole, BoxError for a single object.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote
from xml.etree import ElementTree

import numpy as np
from geometry import MAX_MASK_PIXELS, BoxError, decode_rle, encode_rle, plain_id, printable

MAX_FILE_BYTES = 500_000_000
MAX_NAMES_BYTES = 1_000_000  # of a file with class names
YOLO_NAMES_FILES = ("classes.txt", "labels.txt", "obj.names")  # a class name a line
YOLO_LIST_FILES = ("train.txt", "val.txt", "test.txt", "images.txt", "README.dataset.txt", "README.roboflow.txt")
VIA_CLASS_NAMES = ("class", "label", "name", "category", "type", "object")  # what its attribute may be called
CSV_COLUMNS = ("image", "x", "y", "width", "height", "class")
FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a spreadsheet computes, or what was that before it was quoted
READ_REMEDY = (
    "give a COCO .json with images and annotations, a folder of YOLO .txt or LabelMe .json, or labels of CVAT (.xml),"
    f" Label Studio or VIA (.json) or a .csv with {','.join(CSV_COLUMNS)}"
)


class LabelError(ValueError):
    """A file of labels that cannot be used: what is wrong, where, and what to do about it."""

    def __init__(self, what: str, where: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}\n  {remedy}")
        self.what = what
        self.where = where
        self.remedy = remedy


class Problem(NamedTuple):
    """Something in the input that gets no answer, or a worse one."""

    image: str
    detection: Any  # its id in the COCO file, its line in the YOLO file; None = the whole image
    reason: str

    def __str__(self) -> str:
        place = self.image if self.detection is None else f"{self.image} ({self.detection})"
        return f"{place} {self.reason}"


@dataclass
class FoundObjects:
    """What a file or folder says of the images that are there."""

    images: list[int] = field(default_factory=list)  # positions in the list of image files
    image_ids: list[Any] = field(default_factory=list)  # of these images
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height that the file claims; 0, 0 = none
    # Position in `images`, and the object as JSON, which `to_pixels` reads once it is loaded: flat in memory, whatever polygons.
    objects: list[tuple[int, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # worth a line in the log
    # Class names by `category_key`; None = an object's category is the name itself.
    class_names: dict[str, str] | None = None


def read_objects(source: Path | None, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects that a file or folder names in some images; none of these is opened.

    Args:
        source: what is to be read; None = each image is one object.
        image_paths: relative to the folder that the file names start from, with '/'.

    Raises:
        LabelError: it cannot be read, is not of its format, or names none of the images.
    """
    if source is None:
        found = _all_images(image_paths)
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


def category_key(category: Any) -> str:
    """Return a category's id as text: 3, 3.0 and "3" are the same."""
    return str(plain_id(category))


def find_class_name(class_names: dict[str, str] | None, category: Any) -> str:
    """Return what an object's class is called.

    Raises:
        BoxError: it has no class, or one without a name.
    """
    if category in (None, ""):
        raise BoxError("has no class")
    name = category if class_names is None else class_names.get(category_key(category))
    if not isinstance(name, str) or not name.strip():
        raise BoxError(f"has a class {printable(str(category))[:40]} without a name")
    return name


def _all_images(image_paths: Sequence[str]) -> FoundObjects:
    numbers = list(range(len(image_paths)))
    return FoundObjects(numbers, [number + 1 for number in numbers], [(0, 0)] * len(numbers))


def _read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or too large.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO would wait for a writer for ever
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES // 1_000_000} MB")
        return file.read()


class _Annotation(NamedTuple):
    """One object of a file; `text` is the JSON of what is needed of it."""

    image_id: Any
    id: Any
    text: str


def _shrink(item: dict[str, Any]) -> Any:
    """Make an annotation a string as soon as it is parsed: a polygon takes forty times as much memory as lists of floats.

    An image, or the data of a task, may have a key image_id too; an annotation with a file_name waits until its list is read.
    """
    is_annotation = "image_id" in item and not item.keys().isdisjoint(("bbox", "segmentation", "category_id"))
    return _make_annotation(item) if is_annotation and "file_name" not in item else item


def _make_annotation(item: dict[str, Any]) -> _Annotation:
    keys = ("id", "category_id", "score", "bbox", "segmentation", "iscrowd")
    needed = {key: item[key] for key in keys if key in item}
    if "category_id" in needed:
        needed["category_id"] = plain_id(needed["category_id"])
    ids = [plain_id(item.get(key)) for key in ("image_id", "id")]
    ids = [number if isinstance(number, (int, float, str)) else None for number in ids]
    return _Annotation(*ids, json.dumps(needed, separators=(",", ":")))


def _same_id(value: Any) -> Any:
    """Return what ids that differ in type alone have in common: 7 and "7" and "7.0"."""
    is_number = isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}(\.0+)?", value)
    return int(value.partition(".")[0]) if is_number else value


def _refuse(path: Path, error: Exception, kind: str) -> LabelError:
    """Return what to tell of a file that is not of its kind."""
    reason = str(getattr(error, "strerror", None) or error)[:200]
    return LabelError(f"cannot be read as {kind}: {reason}", str(path), READ_REMEDY)


def read_json(path: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of a file of COCO, Label Studio, LabelMe or VIA.

    Raises:
        LabelError: not JSON, of none of these, or of other images.
    """
    try:
        data = _read_file(path)
        if not data:
            raise ValueError("the file is empty")
        content = json.loads(data, object_hook=_shrink)
    except (OSError, ValueError, RecursionError) as error:
        raise _refuse(path, error, "JSON") from error
    is_list = isinstance(content, list) and bool(content)
    if is_list and all(isinstance(task, dict) and isinstance(task.get("data"), dict) for task in content):
        return _read_labelstudio(path, content, image_paths)
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return _read_labelme(path, [(path.name, content)], image_paths)
    if (photos := _list_via_photos(path, content)) is not None:
        return _read_via(path, photos, image_paths)
    if isinstance(content, list):
        raise _refuse_list(path, content)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise LabelError(f"is no COCO file: it has no list {key}", str(path), READ_REMEDY)
    found = _match_images(path, content["images"], content["annotations"], image_paths)
    categories = content.get("categories")
    named = [item for item in (categories if isinstance(categories, list) else ()) if isinstance(item, dict)]
    found.class_names = {category_key(item["id"]): item["name"] for item in named if {"id", "name"} <= item.keys()}
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


class _Rows:
    """Images and objects of a file that is none of COCO, entered one by one, to be matched as those of COCO are."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[_Annotation] = []
        self.problems: list[Problem] = []

    def add_image(self, name: Any, **size: int) -> None:
        """Enter an image; the objects that follow are in it."""
        self.images.append({"id": len(self.images) + 1, "file_name": name, **size})

    def add_object(self, detection_id: Any, class_name: str, read_shape: Callable[..., dict], *shape: Any) -> None:
        """Enter an object, or why `read_shape` finds none in `shape`."""
        try:
            detection = {"id": detection_id, "category_id": class_name, **read_shape(*shape)}
        except (BoxError, TypeError, ValueError, AttributeError, KeyError) as error:
            reason = str(error) if isinstance(error, BoxError) else "has a shape that is not of numbers"
            self.problems.append(Problem(self.images[-1]["file_name"].lstrip("/"), detection_id, reason))
            return
        text = json.dumps(detection, separators=(",", ":"))
        self.annotations.append(_Annotation(len(self.images), detection_id, text))

    def match(self, path: Path, image_paths: Sequence[str]) -> FoundObjects:
        """Return the objects of those images that are there."""
        found = _match_images(path, self.images, self.annotations, image_paths)
        found.problems += self.problems
        return found


def _read_labelstudio(path: Path, tasks: list[dict[str, Any]], image_paths: Sequence[str]) -> FoundObjects:
    """Return the regions of tasks: of the last annotation that was not cancelled, else of the last prediction."""
    rows = _Rows()
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
        for region in regions if isinstance(regions, list) else ():
            value = region.get("value") if isinstance(region, dict) else None
            if isinstance(value, dict) and str(region.get("type", "")).endswith("labels"):
                names = value.get(region["type"])
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
    if value.get("format") == "rle":
        sides = [int(region[key]) for key in ("original_width", "original_height")]
        return {"segmentation": encode_rle(decode_brush(value["rle"], *sides), 0, 0, *sides)}
    if "points" in value:
        return {"yolo_polygon": [float(number) / 100 for point in value["points"] for number in point]}
    if "width" not in value:
        raise BoxError("is neither a rectangle nor a polygon")
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
    rows = _Rows()
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(_read_file(path))):
            if element.tag != "image":
                continue
            sides = {key: int(element.get(key, "0")) for key in ("width", "height")}
            rows.add_image(element.get("name"), **sides)
            for index, shape in enumerate(element, 1):
                if shape.tag != "tag":  # of the image as a whole
                    rows.add_object(index, shape.get("label", ""), _read_cvat_shape, shape, sides)
            element.clear()
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise _refuse(path, error, "XML") from error
    if not rows.images:
        raise LabelError("has no images: it is not of CVAT for images 1.1", str(path), READ_REMEDY)
    return rows.match(path, image_paths)


def _read_cvat_shape(shape: ElementTree.Element, sides: dict[str, int]) -> dict[str, Any]:
    if shape.tag == "polygon":
        return {"segmentation": [[float(number) for number in shape.get("points").replace(";", ",").split(",")]]}
    if shape.tag == "mask":
        return {"segmentation": _read_cvat_mask(shape, sides)}
    if shape.tag != "box":
        raise BoxError(f"is a {printable(shape.tag)[:40]}, neither a box nor a polygon")
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


def _check_mask(left: int, top: int, width: int, height: int, sides: dict[str, int]) -> None:
    is_inside = left >= 0 and top >= 0 and left + width <= sides["width"] and top + height <= sides["height"]
    if not is_inside or width <= 0 or height <= 0:
        raise BoxError("has a mask outside its image")


def read_csv(path: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of a table with the columns image, x, y, width, height, class, in px.

    Raises:
        LabelError: a column is missing, or it is of other images.
    """
    rows = _Rows()
    images: dict[str, list[tuple[int, dict[str, str]]]] = {}
    try:
        lines = csv.DictReader(io.StringIO(_read_file(path).decode("utf-8-sig"), newline=""))
        missing = [name for name in CSV_COLUMNS if name not in (lines.fieldnames or ())]
        if missing:
            raise ValueError(f"it has no column {missing[0]}")
        for line in lines:
            images.setdefault(unquote_formula(line["image"] or ""), []).append((lines.line_num, line))
    except (OSError, ValueError, csv.Error) as error:
        raise _refuse(path, error, f"a table of {', '.join(CSV_COLUMNS)}") from error
    for name, lines_of_image in images.items():
        rows.add_image(name)
        for number, line in lines_of_image:
            rows.add_object(f"line {number}", unquote_formula(line["class"] or ""), _read_csv_box, line)
    return rows.match(path, image_paths)


def unquote_formula(text: str) -> str:
    """Return what stood in a cell before `quote_formula`, of label_writers.py, quoted it."""
    return text[1:] if text[:1] == "'" and FORMULA.match(text) else text


def _read_csv_box(line: dict[str, str]) -> dict[str, Any]:
    return {"bbox": [float(line[key]) for key in CSV_COLUMNS[1:5]]}


def _match_images(
    path: Path, images: list[Any], annotations: Sequence[Any], image_paths: Sequence[str]
) -> FoundObjects:
    """Return the objects of those images of a file that are there.

    Args:
        path: the file.
        images: its images, as COCO has them.
        annotations: its objects, `_Annotation`; anything else names no image.
        image_paths: the images that are there.

    Raises:
        LabelError: an image without name, one that is listed twice, or none that is there.
    """
    found = FoundObjects()
    for item in images:
        for key, kinds in (("file_name", str), ("id", (int, float, str))):
            if not isinstance(item, dict) or not isinstance(item.get(key), kinds):
                raise LabelError(f"has an image without {key}", str(path), "mend the file")
    names = [unicodedata.normalize("NFC", item["file_name"]) for item in images]
    number_of: dict[Any, int | None] = {}  # image id -> position in `found.images`, None for one that is not there
    taken: set[int] = set()
    for item, name, number in zip(images, names, _find_names(names, image_paths), strict=True):
        image_id = plain_id(item["id"])
        if image_id in number_of:
            raise LabelError(f"has two images of id {image_id}", str(path), "mend the file")
        if not isinstance(number, int) or number in taken:
            reason = number if isinstance(number, str) else "is listed twice; the second time is left out"
            found.problems.append(Problem(os.path.normpath(name), None, reason))
            number_of[image_id] = None
            continue
        taken.add(number)
        number_of[image_id] = len(found.images)
        found.images.append(number)
        found.image_ids.append(image_id)
        claimed = [item.get(key) for key in ("width", "height")]
        found.sizes.append(tuple(side if isinstance(side, int) and 0 < side < 2**31 else 0 for side in claimed))
    num_same = Counter(map(_same_id, number_of))
    by_value = {_same_id(key): value for key, value in number_of.items() if num_same[_same_id(key)] == 1}
    missed: Counter[Any] = Counter()
    for index, item in enumerate(annotations):
        item = _make_annotation(item) if isinstance(item, dict) and "image_id" in item else item
        image_id = item.image_id if isinstance(item, _Annotation) else None
        number = number_of.get(image_id, by_value.get(_same_id(image_id), -1))
        if number is None:
            missed[image_id] += 1
        elif number < 0:
            reason = "its image is not in the list of images" if image_id is not None else "names no image"
            found.problems.append(Problem("", getattr(item, "id", None) or f"annotation {index + 1}", reason))
        else:
            found.objects.append((number, item.text))
    if missed:
        found.notes.append(f"{missed.total():,} objects are in {len(missed):,} images that are not in --images")
    if not found.images:
        first = f": {found.problems[0]}" if images else ""
        reason = f"none of its {len(images):,} images is there{first}"
        raise LabelError(reason, str(path), "give --images the folder that the file names start from")
    return found


def _find_names(names: Sequence[str], image_paths: Sequence[str]) -> Iterator[int | str]:
    """Yield the position of the image that each name of a file means, or why there is none.

    A name that is none as it stands may be of Windows, and an absolute one of another machine: it starts from the folder below
    which most names are images. With images a.jpg and X/a.jpg, the name /X/a.jpg alone may be either.
    """
    # Names are compared composed: a file system of a Mac gives them decomposed.
    position = {unicodedata.normalize("NFC", name): number for number, name in enumerate(image_paths)}
    candidates = [_find_ends(name, position) for name in names]
    num_names = Counter(folder for ends in candidates for folder in ends)
    meant: list[set[int]] = []
    names_of: dict[int, set[str]] = {}
    for name, ends in zip(names, candidates, strict=True):
        most = max((num_names[folder] for folder in ends), default=0)
        meant.append({number for folder, number in ends.items() if num_names[folder] == most})
        for number in meant[-1] if None not in ends else ():
            names_of.setdefault(number, set()).add(name)
    for name, ends, numbers in zip(names, candidates, meant, strict=True):
        rivals = [other for number in numbers for other in names_of.get(number, ()) if other != name]
        if not numbers:
            yield "is not in --images"
        elif len(numbers) > 1:
            yield f"may be {' or '.join(sorted(image_paths[number] for number in numbers))}"
        elif rivals and None not in ends:
            yield f"ends like {min(rivals)}, and one image alone is in --images"
        else:
            yield next(iter(numbers))


def _find_ends(name: str, position: dict[str, int]) -> dict[str | None, int]:
    """Return the images that a name may mean, by the folder that it would start from; None = as it stands."""
    ends: dict[str | None, int] = {}
    for spelled in (name, name.replace("\\", "/")):
        path = os.path.normpath(spelled)
        if path in position:
            return {None: position[path]}
        folders = path.strip("/").split("/") if re.match(r"/|[A-Za-z]:/", spelled) else []
        for depth in range(len(folders)):
            end = "/".join(folders[depth:])
            if end in position:
                ends["/".join(folders[:depth])] = position[end]
    return ends


def read_yolo(folder: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of a folder with a .txt for each image that has any.

    Files are read twice: what the numbers after a box or its corners are, no line tells, but all of them together.
    """
    found = _all_images(image_paths)
    found.class_names = read_yolo_names(folder)
    without = 0
    image_of: dict[Path, str] = {}
    lines: list[tuple[int, str]] = []  # position of the image; number of the line, class and what follows, as JSON
    num_lines: Counter[tuple[Any, ...]] = Counter()  # by what they may be
    direct = {f"{name.rpartition('.')[0]}.txt" for name in image_paths}
    for number, name in enumerate(image_paths):
        first, *others = _find_yolo_files(name)
        places = (folder / place for place in (first, *(place for place in others if place not in direct)))
        path = next(filter(Path.exists, places), None)
        if path is None:
            without += 1
            continue
        if path in image_of:
            reason = f"has the same .txt as {image_of[path]}, to which its objects went"
            found.problems.append(Problem(name, None, reason))
            continue
        image_of[path] = name
        try:
            data = _read_file(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            found.problems.append(Problem(name, None, f"has a .txt that cannot be read: {reason}"))
            continue
        without += not data
        for index, line in _number_lines(data):
            try:
                category_id, numbers = parse_yolo_line(line)
            except BoxError as error:
                found.problems.append(Problem(name, f"line {index}", str(error)))
                continue
            num_lines.update(read_yolo_numbers(numbers).keys())
            lines.append((number, json.dumps([index, category_id, numbers], separators=(",", ":"))))
    most = max(num_lines.values(), default=0)
    _interpret_lines(lines, {key for key, count in num_lines.items() if count == most}, image_paths, found)
    for path in sorted(folder.rglob("*.txt")):
        name = path.relative_to(folder).as_posix()
        is_other = path.name in (*YOLO_NAMES_FILES, *YOLO_LIST_FILES) or name.startswith(
            "confidences/"
        )  # of `write_yolo`
        if path not in image_of and not is_other:
            found.problems.append(Problem(name, None, "has no image of its name in --images"))
    if without:
        found.notes.append(f"{without:,} of {len(image_paths):,} images have no objects")
    if not image_of:
        others = Counter(path.suffix for path in folder.iterdir() if path.suffix in (".json", ".xml", ".csv"))
        if others:
            suffix, count = others.most_common(1)[0]
            raise LabelError(f"has no .txt of these images, but {count:,} {suffix}", str(folder), READ_REMEDY)
    return found


def _number_lines(data: bytes) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text that are not blank, and their numbers."""
    # Notepad writes a byte order mark, and UTF-16 where it is asked for "Unicode".
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")
    return ((index, line) for index, line in enumerate(text.splitlines(), 1) if line.strip())


def _find_yolo_files(name: str) -> Iterator[str]:
    """Yield where the .txt of an image may lie: beside or below; images/ and labels/ side by side; as `write_yolo` names it."""
    stem = name.rpartition(".")[0]
    yield f"{stem}.txt"
    before, images, after = f"/{stem}".rpartition("/images/")
    if images:
        yield f"{before}/labels/{after}.txt".lstrip("/")
        yield f"{before}/{after}.txt".lstrip("/")
    yield f"labels/{stem}.txt"
    yield f"{flat_name(stem)}.txt"
    yield f"labels/{flat_name(stem)}.txt"


def flat_name(path: str) -> str:
    """Return a path as the name of a file, another one for each path: %2F is its '/', as in URLs."""
    name = path.replace("%", "%25").replace("/", "%2F")
    if len(name.encode("utf-8", "backslashreplace")) < 240:  # a name may have 255 bytes
        return name
    return f"{name[:50]}-{hashlib.blake2b(path.encode('utf-8', 'surrogatepass'), digest_size=12).hexdigest()}"


def parse_yolo_line(line: str) -> tuple[int, list[float]]:
    """Return the class of a line, and the numbers after it.

    Raises:
        BoxError: it is no line of numbers, or has too few.
    """
    try:
        kind, *numbers = map(float, line.replace(",", " ").split())
    except ValueError:
        raise BoxError("is not a line of numbers") from None
    if not all(map(math.isfinite, (kind, *numbers))) or kind < 0 or kind != int(kind):
        raise BoxError("does not start with a class number, or has numbers that are not finite")
    if len(numbers) < 4:
        raise BoxError(f"has {len(numbers) + 1} numbers; a box has 5 or 6")
    return int(kind), numbers


def read_yolo_numbers(numbers: Sequence[float]) -> dict[tuple[Any, ...], tuple[int, float | None]]:
    """Return all that the numbers after a class may be, as programs write them.

    Returns:
        what they may be -> how many of them are the shape (4 = a box, more = corners), and the score. A shape may be followed by a
        confidence ("confidence"), a track id ("track id") or both; a box also by keypoints x, y, visibility.
    """
    size = len(numbers)
    last = numbers[-1]
    is_id = last >= 0 and last == int(last)
    tails: list[tuple[str, int, float | None]] = []  # how many numbers follow the shape, and the score among them
    if size % 2 == 0:
        tails += [("confidence", 0, None), ("track id", 0, None)]
        if size > 5 and is_id and last > 0 and 0 < numbers[-2] <= 1:
            tails.append(("both", 2, numbers[-2]))
    else:
        if 0 <= last <= 1:
            tails += [("confidence", 1, last), ("both", 1, last)]
        if is_id:
            tails.append(("track id", 1, None))
    readings: dict[tuple[Any, ...], tuple[int, float | None]] = {}
    for tail, num_after, score in tails:
        shape = numbers[: size - num_after]
        if len(shape) == 4 or all(-0.1 <= value <= 1.1 for value in shape):
            readings[("shape", tail)] = (len(shape), score)
    for num_after in range(3):
        num_keypoints, rest = divmod(size - 4 - num_after, 3)
        if rest or num_keypoints < 1 or not _are_keypoints(numbers, num_keypoints):
            continue
        keypoints = {("keypoints", num_keypoints, num_after): (4, None)}
        flags = numbers[6 : 4 + 3 * num_keypoints : 3]
        if num_keypoints > 1 and all(value in (0, 1, 2) for value in flags):
            return keypoints  # no polygon has every third number at an edge
        readings.update(keypoints)
    return readings


def _are_keypoints(numbers: Sequence[float], num_keypoints: int) -> bool:
    """Say whether a box in the image can be followed by keypoints in it; one that is not seen is at 0, 0."""
    x, y, w, h = numbers[:4]
    is_box = w > 0 and h > 0 and min(x - w / 2, y - h / 2) > -0.02 and max(x + w / 2, y + h / 2) < 1.02
    end = 4 + 3 * num_keypoints
    flags = numbers[6:end:3]
    points = zip(numbers[4:end:3], numbers[5:end:3], strict=True)
    are_flags = all(value in (0, 1, 2) for value in flags) or (num_keypoints > 1 and all(0 <= v <= 1 for v in flags))
    return (
        is_box
        and are_flags
        and all((abs(px - x) <= 0.6 * w and abs(py - y) <= 0.6 * h) or (px == 0 and py == 0) for px, py in points)
    )


def _interpret_lines(
    lines: Sequence[tuple[int, str]], usual: set[tuple[Any, ...]], image_paths: Sequence[str], found: FoundObjects
) -> None:
    """Enter the objects of lines, each read as most lines can be; of several such readings counts what is common to them."""
    num_unused = 0
    for number, text in lines:
        index, category_id, numbers = json.loads(text)
        readings = read_yolo_numbers(numbers)
        likely = [reading for key, reading in readings.items() if key in usual]
        if not likely and all(size == 4 for size, _ in readings.values()):  # a box, whatever the other lines are
            likely = list(readings.values())
        if len({size for size, _ in likely}) != 1:
            reason = "neither shares of the image's sides nor what may follow them: a confidence, a track id, keypoints"
            if readings:
                reason = "not what those of the other lines are"
            if likely:
                reason = "perhaps corners, perhaps a box and what follows it"
            reason = f"has {len(numbers)} numbers after its class, which are {reason}"
            found.problems.append(Problem(image_paths[number], f"line {index}", reason))
            continue
        size, score = likely[0]
        score = score if all(other == score for _, other in likely) else None
        num_unused += len(numbers) - size - (score is not None) > 0
        shape = {"yolo" if size == 4 else "yolo_polygon": numbers[:size]}
        detection = {"id": index, "category_id": category_id, **shape, **({} if score is None else {"score": score})}
        found.objects.append((number, json.dumps(detection, separators=(",", ":"))))
    if num_unused:
        reason = "a track id, keypoints, or what may be a confidence or an id"
        found.notes.append(f"{num_unused:,} lines have numbers after box or corners that are not used: {reason}")


def read_yolo_names(folder: Path) -> dict[str, str]:
    """Return the class names of a folder of YOLO labels: of a .yaml with names or a list of lines, in it or up to two above."""
    folder = folder.absolute()
    for place in (folder, *folder.parents[:2]):
        for path in sorted((*place.glob("*.yaml"), *place.glob("*.yml"), *(place / name for name in YOLO_NAMES_FILES))):
            try:
                text = _read_file(path)[:MAX_NAMES_BYTES].decode("utf-8-sig")
            except (OSError, ValueError):
                continue
            is_list = path.name in YOLO_NAMES_FILES
            names = text.rstrip().splitlines() if is_list else _read_yaml_names(text)
            if names:
                items = names.items() if isinstance(names, dict) else enumerate(names)
                return {category_key(number): name.strip() for number, name in items if isinstance(name, str)}
    return {}


def _read_yaml_names(text: str) -> Any:
    """Return what stands below `names` in a YAML file, with every word as it is written: a class may be called `no`."""
    import yaml

    try:
        content = yaml.load(text, yaml.BaseLoader)  # which makes text, lists and dicts alone
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    names = content.get("names") if isinstance(content, dict) else None
    return names if isinstance(names, (dict, list)) else None


def read_folder(folder: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of a folder: of YOLO if it holds a .txt of an image's name, else of LabelMe if it holds any .json."""
    stems = {name.rpartition(".")[0].rpartition("/")[2] for name in image_paths}
    if any(path.stem in stems for path in folder.rglob("*.txt")):
        return read_yolo(folder, image_paths)
    paths = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    if len(paths) == 1:
        return read_json(paths[0], image_paths)
    return _read_labelme_folder(folder, paths, image_paths) if paths else read_yolo(folder, image_paths)


def _read_labelme_folder(folder: Path, paths: Sequence[Path], image_paths: Sequence[str]) -> FoundObjects:
    foreign: list[Problem] = []

    def read_files() -> Iterator[tuple[str, dict[str, Any]]]:
        for path in paths:  # one at a time: each holds its photo too
            name = path.relative_to(folder).as_posix()
            try:
                content = json.loads(_read_file(path))
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
    rows = _Rows()
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
    if kind == "polygon":
        return {"segmentation": [[number for point in points for number in point]]}
    if kind not in ("rectangle", "circle", "mask") or len(points) != 2:
        raise BoxError(f"is a {printable(str(kind))[:40]} of {len(points)} points, neither a box nor a polygon")
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


def _ellipse_box(x: float, y: float, radius_x: float, radius_y: float) -> dict[str, Any]:
    return {"bbox": [x - radius_x, y - radius_y, 2 * radius_x, 2 * radius_y]}


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
    rows = _Rows()
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
    if kind == "ellipse" and not float(shape.get("theta", 0)):
        return _ellipse_box(*(float(shape[key]) for key in ("cx", "cy", "rx", "ry")))
    raise BoxError(f"is a {printable(str(kind))[:40]}, neither a box nor a polygon")


# What can be read: a folder, or a file by its suffix; a file of any other suffix is taken for COCO.
READERS: dict[str, Callable[[Path, Sequence[str]], FoundObjects]] = {
    "folder": read_folder,
    ".json": read_json,
    ".xml": read_cvat,
    ".csv": read_csv,
}
