"""Boxes and masks of objects in px of their upright image, and how an object is cut from it: training and recognition see the same.

An object is a dict as COCO has it, or as the readers of labels.py give it. Raises BoxError for an object that cannot be used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_MASK_PIXELS = 200_000_000  # of an image that a file claims for a mask


class BoxError(ValueError):
    """An object that cannot be cut from its image; the text is the reason."""


def printable(text: str) -> str:
    """Return text on one line, with control characters and undecodable bytes shown as escapes."""
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )
    return escaped.encode("utf-8", "backslashreplace").decode()


def plain_id(value: Any) -> Any:
    """Return an id, which a table that was read with gaps in it has made a float, as the whole number that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def to_pixels(detection: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """Return a detection as COCO has it: `bbox` x, y, width, height, and perhaps `segmentation`, in px of the upright image."""
    if "yolo" in detection:
        x, y, w, h = detection["yolo"]
        return {**detection, "bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    if "yolo_polygon" in detection:
        points = np.array(detection["yolo_polygon"]) * np.tile([width, height], len(detection["yolo_polygon"]) // 2)
        return {**detection, "segmentation": [np.round(points, 3).tolist()]}
    return detection


def check_size(size: tuple[int, int], claimed: tuple[int, int], detections: Iterable[dict[str, Any]]) -> str | None:
    """Return a doubt about objects whose file claims another size of their image, None if there is none.

    A file may have the sides of the pixels as they are stored, before the EXIF rotation, and yet boxes on the upright image, as
    Label Studio's COCO export does; or all of it before the rotation. In which of the two more of the boxes lie tells.

    Args:
        size: width and height of the upright image.
        claimed: those of the file, 0 where it claims none.
        detections: the objects of the image, as `to_pixels` returns them.

    Raises:
        BoxError: the boxes do not lie on this image.
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
            for side, (width, height) in enumerate((size, claimed)):
                # Two px for what percents of the sides round away.
                num_inside[side] += box[0] + box[2] <= width + 2 and box[1] + box[3] <= height + 2
    upright, stored = num_inside
    if stored > upright:
        raise BoxError(f"{reason}; the boxes are those of the pixels before the EXIF rotation")
    return (
        f"{reason}, before the EXIF rotation; its boxes are taken for those of the upright image"
        if stored == upright
        else None
    )


def find_box(detection: dict[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
    """Return the box x, y, width, height of a detection in px, clipped to the image; without one that of its mask.

    Raises:
        BoxError: it has none, none of four numbers, one of no size, or one outside the image.
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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e9 < value < 1e9  # no NaN, no infinity, no integer of a thousand digits


def _find_bounds(segmentation: Any, width: int, height: int) -> list[float]:
    """Return the box x, y, width, height around a segmentation."""
    if isinstance(segmentation, list):
        points = np.concatenate(_read_polygons(segmentation))
        return [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
    mask = read_segmentation(segmentation, (width, height), (0, 0, width, height))
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise BoxError("has no box, and an empty mask")
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def _read_polygons(segmentation: list[Any]) -> list[np.ndarray]:
    """Return the corners float64 (n, 2) of each polygon x, y, x, y, ... of a mask; one or two points cover nothing."""
    if not segmentation:
        raise BoxError("has neither a box nor a mask")
    is_flat = all(map(_is_number, segmentation))  # one polygon, without the list around it
    polygons = []
    for numbers in [segmentation] if is_flat else segmentation:
        if (
            not isinstance(numbers, list)
            or not all(map(_is_number, numbers))
            or (len(numbers) % 2 and len(numbers) > 5)
        ):
            raise BoxError("has a polygon that is not pairs of numbers")
        if len(numbers) > 5:
            polygons.append(np.array(numbers, dtype=np.float64).reshape(-1, 2))
    if not polygons:
        raise BoxError("has a mask without three points")
    return polygons


def pad_box(box: Sequence[float], padding: float, width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom in whole px of a box (x, y, width, height) grown by a share of its sides, inside the image.

    Rounded, not grown to whole pixels: the six digits of a YOLO file put an edge at 99.998 that was at 100.
    """
    x, y, w, h = box
    left = min(max(0, round(x - padding * w)), width - 1)
    top = min(max(0, round(y - padding * h)), height - 1)
    right = min(width, round(x + w + padding * w))
    bottom = min(height, round(y + h + padding * h))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def read_segmentation(segmentation: Any, size: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """Return a part of the mask of a COCO segmentation: polygons, or run lengths, compressed or not.

    Args:
        segmentation: as it was in the file.
        size: width and height of the image.
        window: left, top, right, bottom of the part.

    Returns:
        bool (bottom - top, right - left).

    Raises:
        BoxError: it is none of these, or of another size.
    """
    width, height = size
    left, top, right, bottom = window
    if isinstance(segmentation, dict):
        claimed = segmentation.get("size")
        counts = segmentation.get("counts")
        if claimed != [height, width]:
            claimed = printable(str(claimed))[:40]
            raise BoxError(f"has a mask of size {claimed}, not {height} x {width} (rows x columns)")
        counts = unpack_rle(counts) if isinstance(counts, str) else counts
        return decode_rle(counts, width, height)[top:bottom, left:right]
    if not isinstance(segmentation, list):
        raise BoxError("has neither a box nor a mask")
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for points in _read_polygons(segmentation):
        mask |= fill_polygon(points - (left, top), right - left, bottom - top)
    return mask


def fill_polygon(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return which pixels have their centre inside a polygon of corners (n, 2), bool (H, W); pixel 0 reaches from 0 to 1.

    Pillow and OpenCV draw the outline too, which makes every mask half a pixel larger all around.
    """
    crossings = np.zeros((height, width + 1), dtype=np.uint8)  # an edge crosses the row left of this pixel's centre
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        low, high = np.clip(np.ceil(np.sort([y0, y1]) - 0.5), 0, height).astype(int)
        if low < high:
            rows = np.arange(low, high)
            columns = np.ceil(x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0)) - 0.5)
            crossings[rows, np.clip(columns, 0, width).astype(int)] ^= 1
    return np.bitwise_xor.accumulate(crossings[:, :width], axis=1).astype(bool)


def unpack_rle(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed string: 5 bits a character, low first, each from the third on a difference.

    Source: rleFrString of pycocotools, common/maskApi.c. It is not called here: where run lengths add up to less than the
    image, its `decode` returns whatever lay in memory as the rest of the mask.

    Raises:
        BoxError: a number of more than 60 bits.
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


def decode_rle(counts: Any, width: int, height: int) -> np.ndarray:
    """Return the mask bool (H, W) of run lengths down the columns, which start with background.

    Raises:
        BoxError: they are not whole numbers that add up to the image.
    """
    size = width * height
    counts = [plain_id(count) for count in counts] if isinstance(counts, list) else None
    if counts is None or not all(type(count) is int and 0 <= count <= size for count in counts):
        raise BoxError("has a mask whose run lengths are not whole numbers")
    if sum(counts) != size:
        raise BoxError("has a mask whose run lengths do not add up to the image")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def encode_rle(mask: np.ndarray, left: int, top: int, width: int, height: int) -> dict[str, Any]:
    """Return a mask bool (h, w) that lies at left, top of an image as COCO's run lengths of the whole image.

    Raises:
        BoxError: the image is said to be larger than any.
    """
    if width * height > MAX_MASK_PIXELS:
        raise BoxError(f"has a mask of an image of {width} x {height} px")
    columns = np.zeros((width, height), dtype=bool)
    columns[left : left + mask.shape[1], top : top + mask.shape[0]] = mask.T
    borders = np.flatnonzero(np.diff(columns.ravel(), prepend=False))
    return {"size": [height, width], "counts": np.diff(borders, prepend=0, append=columns.size).tolist()}


class Cutting(NamedTuple):
    """An object as it was cut from its image."""

    box: tuple[float, ...]  # x, y, width, height in px, clipped, not padded
    pixels: np.ndarray  # uint8 (h, w, 3), a view of the image
    mask: np.ndarray | None  # bool (h, w)
    problem: str  # why the object's mask cannot be used, or ''


def cut_object(image: np.ndarray, detection: dict[str, Any], padding: float, with_mask: bool) -> Cutting:
    """Cut an object from its image: training and recognition see the same pixels, as both cut here.

    Args:
        image: uint8 (H, W, 3), upright.
        detection: as a reader gave it.
        padding: share of the box's sides added on each side.
        with_mask: the mask is wanted, where it has one.

    Raises:
        BoxError: there is nothing to cut; the text is the reason.
    """
    height, width = image.shape[:2]
    detection = to_pixels(detection, width, height)
    # Four digits are what labels are written with: a box that has been written and read again is cut in the same place.
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
