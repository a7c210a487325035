"""Objects in images, as the readers of labels.py and label_yolo.py give them, and which image a name in a file is. No program."""

from __future__ import annotations

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

from geometry import BoxError, plain_id, printable

MAX_FILE_BYTES = 500_000_000
CSV_COLUMNS = ("image", "x", "y", "width", "height", "class")
READ_REMEDY = (
    "give a COCO .json with images and annotations, a folder of YOLO .txt or LabelMe .json, or labels of CVAT (.xml),"
    f" Label Studio or VIA (.json) or a .csv with {','.join(CSV_COLUMNS)}"
)

# The name of a photo that Label Studio has taken or given out; it spells an uploaded one as URLs do where it does not find it.
UPLOADED = re.compile(r"[0-9a-f]{8}(?:-|__)(.+)", re.DOTALL)


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
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not name.strip():
        raise BoxError(f"has a class {printable(str(category))[:40]} without a name")
    return name


def list_images(image_paths: Sequence[str]) -> FoundObjects:
    """Return all images, without objects."""
    numbers = list(range(len(image_paths)))
    return FoundObjects(numbers, [number + 1 for number in numbers], [(0, 0)] * len(numbers))


def read_file(path: Path) -> bytes:
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


def refuse_file(path: Path, error: Exception, kind: str) -> LabelError:
    """Return what to tell of a file that is not of its kind."""
    reason = str(getattr(error, "strerror", None) or error)[:200]
    return LabelError(f"cannot be read as {kind}: {reason}", str(path), READ_REMEDY)


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Return the text of a file: Notepad writes a byte order mark, and UTF-16 where it is asked for "Unicode", as Excel does."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors)


class Annotation(NamedTuple):
    """One object of a file; `text` is the JSON of what is needed of it."""

    image_id: Any
    id: Any
    text: str


def make_annotation(item: dict[str, Any]) -> Annotation:
    """Return an annotation of COCO with what is needed of it."""
    keys = ("id", "category_id", "score", "bbox", "segmentation", "iscrowd")
    needed = {key: item[key] for key in keys if key in item}
    if "category_id" in needed:
        needed["category_id"] = plain_id(needed["category_id"])
    ids = [plain_id(item.get(key)) for key in ("image_id", "id")]
    ids = [number if isinstance(number, (int, float, str)) else None for number in ids]
    return Annotation(*ids, json.dumps(needed, separators=(",", ":")))


def _same_id(value: Any) -> Any:
    """Return what ids that differ in type alone have in common: 7 and "7" and "7.0"."""
    is_number = isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}(\.0+)?", value)
    return int(value.partition(".")[0]) if is_number else value


class Rows:
    """Images and objects of a file that is none of COCO, entered one by one, to be matched as those of COCO are."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[Annotation] = []
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
        self.annotations.append(Annotation(len(self.images), detection_id, text))

    def match(self, path: Path, image_paths: Sequence[str]) -> FoundObjects:
        """Return the objects of those images that are there."""
        found = match_images(path, self.images, self.annotations, image_paths)
        found.problems += self.problems
        return found


def match_images(path: Path, images: list[Any], annotations: Sequence[Any], image_paths: Sequence[str]) -> FoundObjects:
    """Return the objects of those images of a file that are there.

    Args:
        path: the file.
        images: its images, as COCO has them.
        annotations: its objects, `Annotation`; anything else names no image.
        image_paths: the images that are there.

    Raises:
        LabelError: an image without name, one that is listed twice, or none that is there.
    """
    found = FoundObjects()
    images = _check_images(path, images)
    names = [unicodedata.normalize("NFC", item["file_name"]) for item in images]
    number_of: dict[Any, int | None] = {}  # image id -> position in `found.images`, None for one that is not there
    taken: set[int] = set()
    for item, name, number in zip(images, names, _find_names(names, image_paths), strict=True):
        image_id = plain_id(item["id"])
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
        item = make_annotation(item) if isinstance(item, dict) and "image_id" in item else item
        image_id = item.image_id if isinstance(item, Annotation) else None
        number = number_of.get(image_id, by_value.get(_same_id(image_id), -1))
        if number is None:
            missed[image_id] += 1
        elif number < 0:
            reason = "its image is not in the list of images" if image_id is not None else "names no image"
            found.problems.append(Problem("", getattr(item, "id", None) or f"annotation {index + 1}", reason))
        else:
            found.objects.append((number, item.text))
    if missed:
        found.notes.append(f"objects in images that are not in --images: {missed.total():,}, images: {len(missed):,}")
    if not found.images:
        first = f": {found.problems[0]}" if images else ""
        reason = f"none of its images ({len(images):,}) is there{first}"
        raise LabelError(reason, str(path), "give --images the folder that the file names start from")
    return found


def _check_images(path: Path, images: list[Any]) -> list[dict[str, Any]]:
    """Return the images that a file lists, each once, as files that were put together list some again."""
    by_id: dict[Any, dict[str, Any]] = {}
    for item in images:
        for key, kinds in (("file_name", str), ("id", (int, float, str))):
            if not isinstance(item, dict) or not isinstance(item.get(key), kinds):
                raise LabelError(f"has an image without {key}", str(path), "mend the file")
        image_id = plain_id(item["id"])
        if by_id.setdefault(image_id, item)["file_name"] != item["file_name"]:
            raise LabelError(f"has two images of id {image_id}", str(path), "mend the file")
    return list(by_id.values())


def _find_names(names: Sequence[str], image_paths: Sequence[str]) -> Iterator[int | str]:
    """Yield the position of the image that each name of a file means, or why there is none.

    A name that is none as it stands may be of Windows, and one of another machine or a server starts from the folder below which
    most names are images. With images a.jpg and X/a.jpg, the name /X/a.jpg alone may be either.
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
    plain = name.replace("\\", "/")
    upload = UPLOADED.fullmatch(plain.rpartition("/")[2])
    uploaded = [f"/{upload[1]}", f"/{unquote(upload[1])}"] if upload else []
    for spelled in (name, plain, *uploaded):
        path = os.path.normpath(spelled)
        if path in position:
            return {None: position[path]}
        # Label Studio names the photos of a storage from its own folder: ../../photos/a.jpg. But ../a.jpg is in no folder.
        is_elsewhere = re.match(r"/|(?:\.\./)+(?!\.\./)[^/]+/|[A-Za-z][\w+.-]*:/", spelled)
        folders = path.strip("/").split("/") if is_elsewhere else []
        for depth in range(len(folders)):
            end = "/".join(folders[depth:])
            if end in position:
                ends["/".join(folders[:depth])] = position[end]
    return ends
