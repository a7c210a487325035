"""The objects that labels.py and label_yolo.py read, and the matching of names in a label file to images; a library."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from geometry import BoxError, plain_id, printable, rotate_box

MAX_FILE_BYTES = 4_000_000_000  # the largest file of LVIS has 1.1 GB
CSV_COLUMNS = ("image", "x", "y", "width", "height", "class")
READ_REMEDY = (
    "give a COCO .json with images and annotations, a folder of YOLO .txt or LabelMe .json, or labels of CVAT (.xml),"
    f" Label Studio or VIA (.json) or a .csv with {','.join(CSV_COLUMNS)}"
)

# File name of a photo that Label Studio imported ("-") or exported ("__"); the name of an upload it does not find is URL-encoded.
UPLOADED = re.compile(r"[0-9a-f]{8}(?:-|__)(.+)", re.DOTALL)


class LabelError(ValueError):
    """A label file that cannot be used: what is wrong, where, and the remedy."""

    def __init__(self, what: str, where: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}\n  {remedy}")
        self.what = what
        self.where = where
        self.remedy = remedy


class Problem(NamedTuple):
    """An image or object that gets no answer, or a worse one."""

    image: str
    detection: Any  # id in the COCO file, line in the YOLO file; None = the whole image
    reason: str

    def __str__(self) -> str:
        place = self.image if self.detection is None else f"{self.image} ({self.detection})"
        return f"{place} {self.reason}"


@dataclass
class FoundObjects:
    """The objects of a label file or folder, and those of its images that exist."""

    images: list[int] = field(default_factory=list)  # indices into the list of image paths
    image_ids: list[Any] = field(default_factory=list)  # ids of these images in the file
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height that the file claims; 0, 0 = none
    # Index into `images`, and the object as JSON text, which is compact even with polygons; `to_pixels` takes the parsed object.
    objects: list[tuple[int, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for the log
    # Class names by `category_key`; None = an object's category is its class name.
    class_names: dict[str, str] | None = None


def find_class_name(class_names: dict[str, str] | None, category: Any) -> str:
    """Return the name of an object's class. Raises BoxError if it has no class, or one without a name."""
    if category in (None, ""):
        raise BoxError("has no class")
    name = category if class_names is None else class_names.get(category_key(category))
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not name.strip():
        raise BoxError(f"has a class {printable(str(category))[:40]} without a name")
    return name.strip()  # typed by hand in some tools: "nut " is "nut"


def category_key(category: Any) -> str:
    """Return a category id as text, the same for 3, 3.0 and "3"."""
    return str(plain_id(category))


def list_images(image_paths: Sequence[str]) -> FoundObjects:
    """Return all images, without objects."""
    indices = list(range(len(image_paths)))
    return FoundObjects(indices, [index + 1 for index in indices], [(0, 0)] * len(indices))


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises OSError, or ValueError if it is no regular file or larger than MAX_FILE_BYTES."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # O_NONBLOCK: a FIFO would wait for a writer
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES // 1_000_000} MB")
        return file.read()


def make_read_error(path: Path, error: Exception, kind: str) -> LabelError:
    """Return the error for a file that cannot be read as `kind`."""
    return LabelError(f"cannot be read as {kind}: {describe_error(error)}", str(path), READ_REMEDY)


def describe_error(error: Exception) -> str:
    """Return why a file cannot be read, on one line, without the path that messages of the system repeat."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode a text file, as UTF-16 ("Unicode" in Notepad and Excel) or UTF-8 by its byte order mark; UTF-8 without one."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors)


class Annotation(NamedTuple):
    """One object of a file; `text` is the JSON of the keys that are used."""

    image_id: Any
    id: Any
    text: str


class Rows:
    """Images and objects of a file in another format than COCO, added one by one and matched as those of COCO."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[Annotation] = []
        self.problems: list[Problem] = []

    def add_image(self, name: Any, **size: int) -> None:
        """Add an image; objects that are added next belong to it."""
        self.images.append({"id": len(self.images) + 1, "file_name": name, **size})

    def add_object(self, detection_id: Any, class_name: str, read_shape: Callable[..., dict], *shape: Any) -> None:
        """Add the object that `read_shape` makes of `shape`, or a problem if it raises."""
        try:
            detection = {"id": detection_id, "category_id": class_name, **read_shape(*shape)}
        except (BoxError, TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            reason = str(error) if isinstance(error, BoxError) else "has a shape that is not of numbers"
            self.problems.append(Problem(str(self.images[-1]["file_name"]).lstrip("/"), detection_id, reason))
            return
        text = json.dumps(detection, separators=(",", ":"))
        self.annotations.append(Annotation(len(self.images), detection_id, text))

    def match(self, path: Path, image_paths: Sequence[str]) -> FoundObjects:
        """Return the objects of the images that are in `image_paths`; see `match_images`."""
        detections = match_images(path, self.images, self.annotations, image_paths)
        detections.problems += self.problems
        return detections


def match_images(path: Path, images: list[Any], annotations: Sequence[Any], image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of the images of a label file that are in `image_paths`.

    Args:
        path: the file, for messages.
        images: its images, in COCO's form.
        annotations: its objects, `Annotation` or dict in COCO's form; anything else is reported as without an image.
        image_paths: the images that exist.

    Raises:
        LabelError: an image has no name or id, two images have one id, or none of the images exists.
    """
    detections = FoundObjects()
    images = _check_images(path, images)
    names = [unicodedata.normalize("NFC", item["file_name"]) for item in images]
    index_of: dict[Any, int | None] = {}  # image id -> index into `detections.images`, None if the image is left out
    taken: set[int] = set()
    for item, name, index in zip(images, names, _match_names(names, image_paths), strict=True):
        image_id = plain_id(item["id"])
        if not isinstance(index, int) or index in taken:
            reason = index if isinstance(index, str) else "is listed twice; the second time is left out"
            detections.problems.append(Problem(os.path.normpath(name), None, reason))
            index_of[image_id] = None
            continue
        taken.add(index)
        index_of[image_id] = len(detections.images)
        detections.images.append(index)
        detections.image_ids.append(image_id)
        claimed = [item.get(key) for key in ("width", "height")]
        detections.sizes.append(tuple(side if isinstance(side, int) and 0 < side < 2**31 else 0 for side in claimed))
    num_equal = Counter(map(_normalize_id, index_of))
    by_value = {_normalize_id(key): index for key, index in index_of.items() if num_equal[_normalize_id(key)] == 1}
    left_out: Counter[Any] = Counter()  # objects by their image
    for row, item in enumerate(annotations):
        item = make_annotation(item) if isinstance(item, dict) and "image_id" in item else item
        image_id = item.image_id if isinstance(item, Annotation) else None
        index = index_of.get(image_id, by_value.get(_normalize_id(image_id), -1))
        if index is None:
            left_out[image_id] += 1
        elif index < 0:
            reason = "its image is not in the list of images" if image_id is not None else "names no image"
            item_id = getattr(item, "id", None)
            name = f"annotation {row + 1}" if item_id is None else item_id
            detections.problems.append(Problem("", name, reason))
        else:
            detections.objects.append((index, item.text))
    if left_out:
        detections.notes.append(f"objects of images that are left out: {left_out.total():,}, images: {len(left_out):,}")
    if not detections.images:
        first = f": {detections.problems[0]}" if images else ""
        reason = f"none of its images ({len(images):,}) is there{first}"
        raise LabelError(reason, str(path), "give --images the folder that the file names start from")
    return detections


def _check_images(path: Path, images: list[Any]) -> list[dict[str, Any]]:
    """Return the images that a file lists, each once: merged files repeat some."""
    by_id: dict[Any, dict[str, Any]] = {}
    for item in images:
        if isinstance(item, dict) and "coco_url" in item:  # LVIS has no file_name
            item.setdefault("file_name", item["coco_url"])
        for key, types in (("file_name", str), ("id", (int, float, str))):
            if not isinstance(item, dict) or not isinstance(item.get(key), types):
                raise LabelError(f"has an image without {key}", str(path), "mend the file")
        image_id = plain_id(item["id"])
        if by_id.setdefault(image_id, item)["file_name"] != item["file_name"]:
            raise LabelError(f"has two images of id {image_id}", str(path), "mend the file")
    return list(by_id.values())


def _match_names(names: Sequence[str], image_paths: Sequence[str]) -> Iterator[int | str]:
    """Yield for each name in a label file the index of its image, or the reason why it has none.

    A name that is not an image path may be a Windows path, or a path on another machine or server; the folder under which the most
    names are images is then taken for its root. With images a.jpg and X/a.jpg, the name /X/a.jpg alone may be either.
    """
    # Compared in composed form (NFC), because macOS lists decomposed names.
    index_of = {unicodedata.normalize("NFC", name): index for index, name in enumerate(image_paths)}
    candidates = [_find_candidates(name, index_of) for name in names]
    num_names = Counter(folder for by_folder in candidates for folder in by_folder)
    matches: list[set[int]] = []
    names_by_index: dict[int, set[str]] = {}  # two at most: enough to tell one from another
    for name, by_folder in zip(names, candidates, strict=True):
        most_names = max((num_names[folder] for folder in by_folder), default=0)
        matches.append({index for folder, index in by_folder.items() if num_names[folder] == most_names})
        if None not in by_folder:
            for index in matches[-1]:
                if len(namesakes := names_by_index.setdefault(index, set())) < 2:
                    namesakes.add(name)
    for name, by_folder, indices in zip(names, candidates, matches, strict=True):
        rivals = [other for index in indices for other in names_by_index.get(index, ()) if other != name]
        if not indices:
            yield "is not in --images"
        elif len(indices) > 1:
            yield f"may be {' or '.join(sorted(image_paths[index] for index in indices))}"
        elif rivals and None not in by_folder:
            yield f"ends like {min(rivals)}, and one image alone is in --images"
        else:
            yield next(iter(indices))


def _find_candidates(name: str, index_of: dict[str, int]) -> dict[str | None, int]:
    """Return the images that a name may mean, by the folder that the name would be relative to; None = it is an image path."""
    candidates: dict[str | None, int] = {}
    posix_name = name.replace("\\", "/")
    upload = UPLOADED.fullmatch(posix_name.rpartition("/")[2])
    original_names = [f"/{upload[1]}", f"/{unquote(upload[1])}"] if upload else []
    for spelling in (name, posix_name, *original_names):
        path = os.path.normpath(spelling)
        if path in index_of:
            return {None: index_of[path]}
        # Label Studio writes photos of a storage relative to its own folder, e.g. ../../photos/a.jpg. But ../a.jpg names no folder.
        is_elsewhere = re.match(r"/|(?:\.\./)+(?!\.\./)[^/]+/|[A-Za-z][\w+.-]*:/", spelling)
        folders = path.strip("/").split("/") if is_elsewhere else []
        for depth in range(len(folders)):
            suffix = "/".join(folders[depth:])
            if suffix in index_of:
                candidates["/".join(folders[:depth])] = index_of[suffix]
    return candidates


def _normalize_id(value: Any) -> Any:
    """Return an id, as an int if it is a whole number in text: 7 for 7, "7" and "7.0"."""
    is_number = isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}(\.0+)?", value)
    return int(value.partition(".")[0]) if is_number else value


def make_annotation(item: dict[str, Any]) -> Annotation:
    """Reduce a COCO annotation to the keys that are used.

    CVAT exports an object that is drawn as a mask as a crowd, and a rotated box as it was before, with its angle as an attribute:
    the first is taken for one object, the second becomes a polygon.
    """
    keys = ("id", "category_id", "score", "bbox", "segmentation", "iscrowd")
    needed = {key: item[key] for key in keys if key in item}
    attributes = item.get("attributes")
    if isinstance(attributes, dict) and "occluded" in attributes:  # CVAT alone has it
        needed.pop("iscrowd", None)
        degrees = attributes.get("rotation")
        if type(degrees) in (int, float) and degrees and not item.get("segmentation"):
            with contextlib.suppress(TypeError, ValueError, OverflowError):  # a bad box is reported later
                needed["segmentation"] = [rotate_box(item.get("bbox"), degrees, (0.5, 0.5))]
                del needed["bbox"]
    if "category_id" in needed:
        needed["category_id"] = plain_id(needed["category_id"])
    ids = [plain_id(item.get(key)) for key in ("image_id", "id")]
    ids = [value if isinstance(value, (int, float, str)) else None for value in ids]
    return Annotation(*ids, json.dumps(needed, separators=(",", ":")))
