"""Boxes and masks in px of the upright image, and the cutting of objects that crop.py and prelabel.py share; a library.

An object is a dict in COCO's form, or as a reader of labels.py returns it. Raises BoxError for an object that cannot be used.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_MASK_PIXELS = 200_000_000  # largest image, by the size that a label file claims, for which a mask is made


class BoxError(ValueError):
    """An object that cannot be cut from its image; the text is the reason."""


def check_size(size: tuple[int, int], claimed: tuple[int, int], detections: Iterable[dict[str, Any]]) -> str | None:
    """Compare the image size that a label file claims with the real one; return a warning if the boxes may be wrong, else None.

    The file may give the size before the EXIF rotation but boxes on the upright image, as Label Studio's COCO export does, or both
    from before the rotation. The orientation that holds more of the boxes decides.

    Args:
        size: width and height of the upright image.
        claimed: width and height in the file, 0 where it claims none.
        detections: the objects of the image, as `to_pixels` returns them.

    Raises:
        BoxError: the size is of another image, or the boxes are from before the rotation.
    """
    if claimed == size or 0 in claimed:
        return None
    reason = "is {} x {} px, but {} x {} px in the labels".format(*size, *claimed)
    if claimed != size[::-1]:
        raise BoxError(reason)
    num_inside = [0, 0]
    for detection in detections:
        box = detection.get("bbox")
        with contextlib.suppress(BoxError):
            box = box or _find_bounds(detection.get("segmentation"), *size)
        if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
            for frame, (width, height) in enumerate((size, claimed)):
                # 2 px of tolerance, for boxes that were rounded in percent of the sides.
                num_inside[frame] += box[0] + box[2] <= width + 2 and box[1] + box[3] <= height + 2
    upright, stored = num_inside
    if stored > upright:
        raise BoxError(f"{reason}; the boxes are those of the pixels before the EXIF rotation")
    if stored < upright:
        return None
    return f"{reason}, before the EXIF rotation; its boxes are taken for those of the upright image"


def encode_rle(mask: np.ndarray, left: int, top: int, width: int, height: int) -> dict[str, Any]:
    """Return a mask bool (h, w) at left, top of an image as COCO's uncompressed run lengths of the whole image.

    Raises BoxError if width x height, which a file claims, exceeds MAX_MASK_PIXELS.
    """
    if width * height > MAX_MASK_PIXELS:
        raise BoxError(f"has a mask of an image of {width} x {height} px")
    columns = np.zeros((width, height), dtype=bool)
    columns[left : left + mask.shape[1], top : top + mask.shape[0]] = mask.T
    changes = np.flatnonzero(np.diff(columns.ravel(), prepend=False))
    return {"size": [height, width], "counts": np.diff(changes, prepend=0, append=columns.size).tolist()}


def rotate_box(bbox: Sequence[float], degrees: float, pivot: tuple[float, float]) -> list[float]:
    """Rotate a box x, y, w, h clockwise about `pivot`, in fractions of its sides; return the corners x1, y1 ... y4 in px."""
    x, y, width, height = bbox
    cos = math.cos(math.radians(degrees))
    sin = math.sin(math.radians(degrees))
    corners = []
    for along, down in ((0, 0), (1, 0), (1, 1), (0, 1)):
        right = (along - pivot[0]) * width
        below = (down - pivot[1]) * height
        corners += [x + pivot[0] * width + right * cos - below * sin, y + pivot[1] * height + right * sin + below * cos]
    return corners


class Cutting(NamedTuple):
    """An object, cut from its image."""

    box: tuple[float, ...]  # x, y, width, height in px, clipped, not padded
    pixels: np.ndarray  # uint8 (h, w, 3), a view of the image
    mask: np.ndarray | None  # bool (h, w)
    problem: str  # why its mask cannot be used, or ''


def cut_object(image: np.ndarray, detection: dict[str, Any], padding: float, with_mask: bool) -> Cutting:
    """Cut an object from its image; training and recognition both cut here, so that they see the same pixels.

    Args:
        image: uint8 (H, W, 3), upright.
        detection: as a reader returns it.
        padding: fraction of the box's sides added on each side.
        with_mask: return its mask too, if it has one.

    Raises:
        BoxError: there is nothing to cut; the text is the reason.
    """
    height, width = image.shape[:2]
    detection = to_pixels(detection, width, height)
    # Rounded to the four digits of written labels, so that a box is cut in the same place after it is written and read again.
    box = tuple(round(value, 4) for value in find_box(detection, width, height))
    window = pad_box(box, padding, width, height)
    mask = None
    problem = ""
    if with_mask and detection.get("segmentation"):
        try:
            mask = read_segmentation(detection["segmentation"], (width, height), window)
            if not mask.any():
                raise BoxError("has an empty mask")
        except BoxError as error:
            mask = None
            problem = str(error)
    left, top, right, bottom = window
    return Cutting(box, image[top:bottom, left:right], mask, problem)


def to_pixels(detection: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """Return a detection in COCO's form: `bbox` x, y, width, height and any `segmentation`, in px of the upright image."""
    if "yolo" in detection:
        x, y, w, h = detection["yolo"]
        return {**detection, "bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    if "yolo_polygon" in detection:
        points = np.array(detection["yolo_polygon"]) * np.tile([width, height], len(detection["yolo_polygon"]) // 2)
        return {**detection, "segmentation": [np.round(points, 3).tolist()]}
    return detection


def find_box(detection: dict[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
    """Return the box x, y, width, height of a detection in px, clipped to the image; without a box, the bounds of its mask.

    Raises BoxError if it has neither, or its box is not four numbers, has no area or lies outside the image.
    """
    box = detection.get("bbox")
    segmentation = detection.get("segmentation")
    if box is None or box == [] or (box == [0, 0, 0, 0] and segmentation):
        box = _find_bounds(segmentation, width, height)
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise BoxError("has a box that is not four numbers")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise BoxError("has a box of no size")
    left = max(0.0, x)
    top = max(0.0, y)
    right = min(float(width), x + w)
    bottom = min(float(height), y + h)
    if right <= left or bottom <= top:
        raise BoxError(f"has a box outside its image of {width} x {height} px")
    return left, top, right - left, bottom - top


def _find_bounds(segmentation: Any, width: int, height: int) -> list[float]:
    """Return the bounding box x, y, width, height of a segmentation."""
    if isinstance(segmentation, list):
        points = np.concatenate(list_polygons(segmentation), dtype=np.float64).reshape(-1, 2)
        return [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
    mask = read_segmentation(segmentation, (width, height), (0, 0, width, height))
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise BoxError("has no box, and an empty mask")
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def read_segmentation(segmentation: Any, size: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """Decode a window of a COCO segmentation: polygons, or run lengths, compressed or not.

    Args:
        segmentation: as in the file.
        size: width and height of the image.
        window: left, top, right, bottom.

    Returns:
        bool (bottom - top, right - left).

    Raises:
        BoxError: not such a segmentation, or one for another image size.
    """
    width, height = size
    left, top, right, bottom = window
    if isinstance(segmentation, dict):
        return decode_rle(read_counts(segmentation, size), width, height)[top:bottom, left:right]
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for numbers in list_polygons(segmentation):
        points = np.array(numbers, dtype=np.float64).reshape(-1, 2)
        mask |= fill_polygon(points - (left, top), right - left, bottom - top)
    return mask


def read_counts(segmentation: dict[str, Any], size: tuple[int, int]) -> list[int]:
    """Return the run lengths of a mask for an image of `size` (width, height). Raises BoxError if they are not of such an image."""
    width, height = size
    if segmentation.get("size") != [height, width]:
        claimed = printable(str(segmentation.get("size")))[:40]
        raise BoxError(f"has a mask of size {claimed}, not {height} x {width} (rows x columns)")
    counts = segmentation.get("counts")
    return check_counts(unpack_rle(counts) if isinstance(counts, str) else counts, width * height)


def printable(text: str) -> str:
    """Return text on one line, with escapes for control characters and undecodable bytes."""
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )
    return escaped.encode("utf-8", "backslashreplace").decode()


def unpack_rle(text: str) -> list[int]:
    """Decode COCO's compressed run lengths: 5 bits per character, low bits first; the fourth and later are relative to two before.

    Source: rleFrString in common/maskApi.c of pycocotools. pycocotools is not called because its `decode` returns uninitialised
    memory as the rest of a mask whose run lengths add up to less than the image. Raises BoxError if a number has more than 60 bits.
    """
    counts: list[int] = []
    value = 0
    shift = 0
    for char in text:
        bits = ord(char) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if shift > 60:
            raise BoxError("has a mask whose run lengths are damaged")
        if not bits & 0x20:  # the last character of a number
            value -= (bits & 0x10) << (shift - 4)  # its sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = 0
            shift = 0
    return counts


def check_counts(counts: Any, num_pixels: int) -> list[int]:
    """Return run lengths as integers. Raises BoxError if they are not whole numbers that add up to the image."""
    counts = [plain_id(count) for count in counts] if isinstance(counts, list) else None
    if counts is None or not all(type(count) is int and 0 <= count <= num_pixels for count in counts):
        raise BoxError("has a mask whose run lengths are not whole numbers")
    if sum(counts) != num_pixels:
        raise BoxError("has a mask whose run lengths do not add up to the image")
    return counts


def decode_rle(counts: Sequence[int], width: int, height: int) -> np.ndarray:
    """Return the mask bool (H, W) of run lengths that go down the columns and start with background."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def plain_id(value: Any) -> Any:
    """Return an id, as an int if it is a whole float: ids of a table with missing values are read as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def list_polygons(segmentation: Any) -> list[list[float]]:
    """Return the polygons x, y, x, y, ... of a mask, without those of one or two points, which cover nothing.

    Raises BoxError if it is no such mask, or has no polygon.
    """
    if not isinstance(segmentation, list) or not segmentation:
        raise BoxError("has neither a box nor a mask")
    is_flat = all(map(_is_number, segmentation))  # one polygon, not in a list
    polygons = []
    for numbers in [segmentation] if is_flat else segmentation:
        are_numbers = isinstance(numbers, list) and all(map(_is_number, numbers))
        if not are_numbers or (len(numbers) % 2 and len(numbers) > 5):
            raise BoxError("has a polygon that is not pairs of numbers")
        if len(numbers) > 5:
            polygons.append(numbers)
    if not polygons:
        raise BoxError("has a mask without three points")
    return polygons


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e9 < value < 1e9  # excludes NaN, infinity, huge integers


def fill_polygon(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the pixels whose centre lies inside a polygon of corners (n, 2), bool (H, W); pixel 0 spans 0 to 1.

    Pillow and OpenCV also draw the outline, which enlarges every mask by half a pixel on each side.
    """
    # Number, mod 2, of edges that cross the row between the centres of the previous pixel and this one.
    crossings = np.zeros((height, width + 1), dtype=np.uint8)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        low, high = np.clip(np.ceil(np.sort([y0, y1]) - 0.5), 0, height).astype(int)
        if low < high:
            rows = np.arange(low, high)
            columns = np.ceil(x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0)) - 0.5)
            crossings[rows, np.clip(columns, 0, width).astype(int)] ^= 1
    return np.bitwise_xor.accumulate(crossings[:, :width], axis=1).astype(bool)


def pad_box(box: Sequence[float], padding: float, width: int, height: int) -> tuple[int, int, int, int]:
    """Grow a box x, y, width, height by `padding` of its sides and return left, top, right, bottom in whole px inside the image.

    Edges are rounded to the nearest pixel, not outwards: with the six digits of a YOLO file an edge at 100 becomes 99.998.
    """
    x, y, w, h = box
    left = min(max(0, round(x - padding * w)), width - 1)
    top = min(max(0, round(y - padding * h)), height - 1)
    right = min(width, round(x + w + padding * w))
    bottom = min(height, round(y + h + padding * h))
    return left, top, max(right, left + 1), max(bottom, top + 1)
