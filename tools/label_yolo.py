"""Reader of YOLO labels: a folder with a .txt per image, and the files that name its classes; a library.

The format fixes neither the numbers after a box or corners nor where the files lie. The numbers are interpreted from all lines
together, and files are looked for in the places that programs use.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from geometry import BoxError
from label_objects import (
    READ_REMEDY,
    UPLOADED,
    FoundObjects,
    LabelError,
    Problem,
    category_key,
    decode_text,
    describe_error,
    list_images,
    read_file,
)

MAX_NAMES_BYTES = 1_000_000  # read from a file of class names
MAX_KEYPOINTS = 200  # per box; more points are an outline
YOLO_NAMES_FILES = ("classes.txt", "labels.txt", "obj.names")  # one class name per line
YOLO_LIST_FILES = ("train.txt", "val.txt", "test.txt", "images.txt", "README.dataset.txt", "README.roboflow.txt")

# What the numbers after a class may be -> how many of them are the shape (4 = a box, more = corners), and the score.
Readings = dict[tuple[Any, ...], tuple[int, float | None]]


def read_yolo(folder: Path, image_paths: Sequence[str]) -> FoundObjects:
    """Read a folder with a .txt for each image that has objects.

    Lines are parsed first and interpreted later: only all of them together tell what the numbers after a box or corners are.
    """
    detections = list_images(image_paths)
    detections.class_names = read_yolo_names(folder)
    detections.notes += [f"passed over: {text}" for text in read_descriptions(folder) if isinstance(text, str)]
    num_keypoint_values = read_keypoint_values(folder)
    num_empty = 0
    name_by_file: dict[Path, str] = {}
    lines: list[tuple[int, str]] = []  # index of the image; line number, class and numbers as JSON
    num_lines: Counter[tuple[Any, ...]] = Counter()  # by reading
    uploads = find_uploads(folder, image_paths)
    direct_names = {f"{name.rpartition('.')[0]}.txt" for name in image_paths}  # may not serve another image
    for index, name in enumerate(image_paths):
        first, *others = _find_yolo_files(name)
        candidates = [folder / first, *(folder / other for other in others if other not in direct_names)]
        path = next(filter(Path.exists, candidates), uploads.get(name.rpartition(".")[0]))
        if path is None:
            num_empty += 1
            continue
        if path in name_by_file:
            reason = f"has the same .txt as {name_by_file[path]}, to which its objects went"
            detections.problems.append(Problem(name, None, reason))
            continue
        name_by_file[path] = name
        try:
            data = read_file(path)
        except (OSError, ValueError) as error:
            detections.problems.append(Problem(name, None, f"has a .txt that cannot be read: {describe_error(error)}"))
            continue
        num_empty += not data
        for line_number, line in _number_lines(data):
            try:
                category_id, numbers = parse_yolo_line(line)
            except BoxError as error:
                detections.problems.append(Problem(name, f"line {line_number}", str(error)))
                continue
            num_lines.update(read_yolo_numbers(numbers, num_keypoint_values).keys())
            lines.append((index, json.dumps([line_number, category_id, numbers], separators=(",", ":"))))
    most_lines = max(num_lines.values(), default=0)
    usual_readings = {key for key, count in num_lines.items() if count == most_lines}
    _interpret_lines(lines, usual_readings, num_keypoint_values, image_paths, detections)
    for path in sorted(folder.rglob("*.txt")):
        name = path.relative_to(folder).as_posix()
        is_known = path in name_by_file or path.name in (*YOLO_NAMES_FILES, *YOLO_LIST_FILES)
        is_score = name.startswith("confidences/")  # from `write_yolo`
        is_hidden = "/." in f"/{name}"  # such as ._a.txt, which macOS packs with a.txt
        if not (is_known or is_score or is_hidden):
            detections.problems.append(Problem(name, None, "has no image of its name in --images"))
    if num_empty:
        detections.notes.append(f"images without objects: {num_empty:,} of {len(image_paths):,}")
    if not name_by_file:
        suffixes = Counter(path.suffix for path in folder.iterdir() if path.suffix in (".json", ".xml", ".csv", ".TXT"))
        instead = "".join(f", but {count:,} {suffix}" for suffix, count in suffixes.most_common(1))
        first = f": {detections.problems[0]}" if detections.problems else ""
        raise LabelError(f"has no .txt of these images{instead}{first}", str(folder), READ_REMEDY)
    return detections


def read_yolo_names(folder: Path) -> dict[str, str]:
    """Return class names by `category_key`, from a .yaml or list of names in a folder of labels or up to two above; else {}."""
    for content in read_descriptions(folder):
        names = content.get("names") if isinstance(content, dict) else content
        if names and isinstance(names, (dict, list)):
            items = names.items() if isinstance(names, dict) else enumerate(names)
            return {category_key(number): name.strip() for number, name in items if isinstance(name, str)}
    return {}


def read_keypoint_values(folder: Path) -> int | None:
    """Return how many keypoint values follow a box: `kpt_shape` of a .yaml, keypoints times 2 or 3.

    0 = a .yaml has names but no kpt_shape, None = no .yaml has either.
    """
    descriptions = [content for content in read_descriptions(folder) if isinstance(content, dict)]
    for content in descriptions:
        shape = content.get("kpt_shape")
        text = " ".join(map(str, shape)) if isinstance(shape, list) else ""  # as [17 3], without comma, is one entry
        if match := re.fullmatch("([1-9][0-9]{0,3}) ([23])", text):
            return int(match[1]) * int(match[2])
    return 0 if any("names" in content for content in descriptions) else None


def read_descriptions(folder: Path) -> Iterator[dict[str, Any] | list[str] | str]:
    """Yield the files that may describe labels, the nearest first: a dict from YAML, or the lines of a list of names.

    Of a file that cannot be read a sentence with the reason: Windows paths in "..." and tabs are no YAML.
    """
    import yaml

    folder = folder.absolute()
    for place in (folder, *folder.parents[:2]):
        for path in sorted((*place.glob("*.yaml"), *place.glob("*.yml"), *(place / name for name in YOLO_NAMES_FILES))):
            try:
                data = read_file(path)
                if len(data) > MAX_NAMES_BYTES:
                    continue
                text = decode_text(data)
                is_list = path.name in YOLO_NAMES_FILES
                # BaseLoader leaves scalars as text: a class may be called `no`.
                content = text.rstrip().splitlines() if is_list else yaml.load(text, yaml.BaseLoader)
            except FileNotFoundError:
                continue
            except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
                yield f"{path} cannot be read: {describe_error(error)}"
                continue
            if is_list or isinstance(content, dict):
                yield content


def find_uploads(folder: Path, image_paths: Sequence[str]) -> dict[str, Path]:
    """Return the .txt files that Label Studio exported for uploaded photos, by the stem that each photo had before the upload."""
    stems = {name.rpartition(".")[0].rpartition("/")[2] for name in image_paths}
    uploads: dict[str, list[Path]] = {}
    for path in folder.rglob("*.txt"):
        if path.stem not in stems and (upload := UPLOADED.fullmatch(path.stem)):
            uploads.setdefault(unquote(upload[1]), []).append(path)
    return {stem: paths[0] for stem, paths in uploads.items() if len(paths) == 1}


def _find_yolo_files(name: str) -> Iterator[str]:
    """Yield the paths in the label folder where the .txt of an image may lie; the last two are those of `write_yolo`."""
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
    """Return a file name that is unique for a path: '/' becomes %2F, as in URLs, and the end of a long one a hash."""
    name = path.replace("%", "%25").replace("/", "%2F")
    if len(name.encode("utf-8", "backslashreplace")) < 240:  # file systems allow 255 bytes
        return name
    return f"{name[:50]}-{hashlib.blake2b(path.encode('utf-8', 'surrogatepass'), digest_size=12).hexdigest()}"


def _number_lines(data: bytes) -> Iterator[tuple[int, str]]:
    """Return number and text of the lines that are not blank."""
    return ((index, line) for index, line in enumerate(decode_text(data, "replace").splitlines(), 1) if line.strip())


def parse_yolo_line(line: str) -> tuple[int, list[float]]:
    """Return the class id of a line, and the numbers after it. Raises BoxError if it is not of numbers, or has too few."""
    try:
        category_id, *numbers = map(float, line.replace(",", " ").split())
    except ValueError:
        raise BoxError("is not a line of numbers") from None
    if not all(map(math.isfinite, (category_id, *numbers))) or category_id < 0 or category_id != int(category_id):
        raise BoxError("does not start with a class number, or has numbers that are not finite")
    if len(numbers) < 4:
        raise BoxError(f"has {len(numbers) + 1} numbers; a box has 5 or 6")
    return int(category_id), numbers


def _interpret_lines(
    lines: Sequence[tuple[int, str]],
    usual_readings: set[tuple[Any, ...]],
    num_keypoint_values: int | None,
    image_paths: Sequence[str],
    detections: FoundObjects,
) -> None:
    """Add the objects of lines to `detections`, each by the readings that fit the most lines; these must agree on the shape."""
    num_unused = 0
    for index, text in lines:
        number, category_id, numbers = json.loads(text)
        readings = read_yolo_numbers(numbers, num_keypoint_values)
        likely = [reading for key, reading in readings.items() if key in usual_readings]
        if not likely and all(size == 4 for size, _ in readings.values()):  # certainly a box
            likely = list(readings.values())
        if len({size for size, _ in likely}) != 1:
            reason = "neither shares of the image's sides nor what may follow them: a confidence, a track id, keypoints"
            if readings:
                reason = "not what those of the other lines are"
            if likely:
                reason = "perhaps corners, perhaps a box and keypoints: a data.yaml with names tells, by kpt_shape or without it"
            reason = f"has {len(numbers)} numbers after its class, which are {reason}"
            detections.problems.append(Problem(image_paths[index], f"line {number}", reason))
            continue
        size, score = likely[0]
        score = score if all(other == score for _, other in likely) else None
        num_unused += len(numbers) - size - (score is not None) > 0
        shape = {"yolo" if size == 4 else "yolo_polygon": numbers[:size]}
        detection = {"id": number, "category_id": category_id, **shape, **({} if score is None else {"score": score})}
        detections.objects.append((index, json.dumps(detection, separators=(",", ":"))))
    if num_unused:
        reason = "a track id, keypoints, or what may be a confidence or an id"
        detections.notes.append(f"lines whose numbers after box or corners are not used: {num_unused:,}; {reason}")


def read_yolo_numbers(numbers: Sequence[float], num_keypoint_values: int | None = None) -> Readings:
    """Return all readings of the numbers after a class, as programs write them; see `read_keypoint_values` for the second argument.

    A shape may be followed by a confidence, a track id or both, and a box also by keypoints x, y and perhaps visibility.
    """
    size = len(numbers)
    if num_keypoint_values and 0 <= size - 4 - num_keypoint_values <= 2:  # a confidence, a track id or both may follow
        return {("keypoints", size): (4, None)}
    shapes = _read_shapes(numbers)
    triples = _read_keypoints(numbers, 3)
    for reading in triples:
        num_keypoints = reading[2]
        if num_keypoints > 1 and all(value in (0, 1, 2) for value in numbers[6 : 4 + 3 * num_keypoints : 3]):
            return {reading: triples[reading]}  # visibility flags: no polygon has every third number at an edge
    pairs = _read_keypoints(numbers, 2)
    if num_keypoint_values == 0 or _is_outline(numbers):
        pairs = {}
    elif pairs and size > 9:  # as corners they cross, which is rare in a data set of outlines
        shapes = {("crossing", *key): value for key, value in shapes.items()}
    return shapes | triples | pairs


def _read_shapes(numbers: Sequence[float]) -> Readings:
    """Return the readings as a box or corners, with or without a confidence and a track id."""
    size = len(numbers)
    last = numbers[-1]
    is_id = last >= 0 and last == int(last)
    tails: list[tuple[str, int, float | None]] = []  # name, numbers after the shape, score among them
    if size % 2 == 0:
        tails += [("confidence", 0, None), ("track id", 0, None)]
        if size > 5 and is_id and last > 0 and 0 < numbers[-2] <= 1:
            tails.append(("both", 2, numbers[-2]))
    else:
        if 0 <= last <= 1:
            tails += [("confidence", 1, last), ("both", 1, last)]
        if is_id:
            tails.append(("track id", 1, None))
    readings: Readings = {}
    for tail, num_after, score in tails:
        shape = numbers[: size - num_after]
        if all(-0.1 <= value <= 1.1 for value in shape):
            readings[("shape", tail)] = (len(shape), score)
    return readings


def _read_keypoints(numbers: Sequence[float], num_values: int) -> Readings:
    """Return the readings as a box inside the image, keypoints inside the box, and up to two more numbers.

    A keypoint has `num_values` values: x and y, both 0 if it is not visible, and with 3 also visibility or confidence.
    """
    x, y, w, h = numbers[:4]
    is_box = w > 0 and h > 0 and min(x - w / 2, y - h / 2) > -0.02 and max(x + w / 2, y + h / 2) < 1.02
    readings: Readings = {}
    for num_after in range(3):
        num_keypoints, remainder = divmod(len(numbers) - 4 - num_after, num_values)
        if not is_box or remainder or not 0 < num_keypoints <= MAX_KEYPOINTS:
            continue
        points = np.reshape(numbers[4 : len(numbers) - num_after], (-1, num_values))
        is_inside = (np.abs(points[:, :2] - (x, y)) <= (0.6 * w, 0.6 * h)).all(axis=1)
        is_unseen = (points[:, :2] == 0).all(axis=1)
        flags = points[:, 2:]
        are_flags = np.isin(flags, (0, 1, 2)).all() or (num_keypoints > 1 and ((flags >= 0) & (flags <= 1)).all())
        if are_flags and (is_inside | is_unseen).all():
            readings[("keypoints", num_values, num_keypoints, num_after)] = (4, None)
    return readings


def _is_outline(numbers: Sequence[float]) -> bool:
    """Whether numbers are more likely corners, of a rotated box or of an outline without crossings, than a box and keypoints."""
    corners = np.reshape(numbers[: len(numbers) // 2 * 2], (-1, 2))
    if len(corners) < 5:
        return len(corners) == 4 and np.abs(corners[0] + corners[2] - corners[1] - corners[3]).max() < 0.004
    corners = corners[:-1] if (corners[0] == corners[-1]).all() else corners
    edges = np.roll(corners, -1, axis=0) - corners
    offsets = corners[None] - corners[:, None]  # from the start of edge i to corner j
    sides = np.sign(edges[:, None, 0] * offsets[..., 1] - edges[:, None, 1] * offsets[..., 0])
    # Edges cross if the ends of each lie on different sides of the other.
    is_between = sides * np.roll(sides, -1, axis=1) < 0
    return len(np.unique(corners, axis=0)) == len(corners) and not (is_between & is_between.T).any()
