"""Bit depth and size of photos, which `crop` and `prelabel` need before they cut objects from them. No program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lct_dino3 as lct

# isort: split
import numpy as np


def find_photo_bits(root: Path, paths: Sequence[str]) -> tuple[int, ...]:
    """Return the bits a channel that photos of more than 8 really use, found as in the scan of a data set; () without any."""
    results = lct.map_in_threads(read_highest_value, [root / path for path in paths])
    with lct.progress(results, len(paths), "looking for more than 8 bits", unit="photo") as bar:
        highest = np.array([value for _, value in bar], dtype=np.int64)
    bits = lct.find_image_bits(highest)
    if bits and bits != (16,):
        lct.show(f"warning: {lct.describe_image_bits(np.count_nonzero(highest), bits)}")
    return bits


def read_highest_value(path: Path) -> int:
    """Return the highest value in a photo; 0 if the photo has 8 bits a channel or cannot be read."""
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\xff\xd8":  # JPEG has 8 bits; this spares most photos a second read
                return 0
        data = lct.read_file(path)
        with lct.opened_image(data) as image:
            return lct.highest_value(image, data)
    except (OSError, lct.ImageError):
        return 0  # cutting it will report why


def read_image_size(path: Path) -> tuple[int, int]:
    """Return width and height of the upright image, without decoding it, unless it is a TIFF on its side.

    Raises:
        ImageError: with the reason.
    """
    with lct.opened_image(lct.read_file(path)) as image:
        is_turned = lct.read_orientation(image) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
        if is_turned and image.format == "TIFF":
            image.load()  # turns it upright; which size it has before depends on the version of Pillow
            return image.size
        return image.size[::-1] if is_turned else image.size
