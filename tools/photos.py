"""What `crop` and `prelabel` ask of photos before they cut objects from them. No program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct

# isort: split
import numpy as np


def find_photo_bits(root: Path, paths: Sequence[str]) -> tuple[int, ...]:
    """Return how many bits photos of more than 8 a channel really use, as the scan finds them over a data set; () without such."""
    looks = lct.map_in_threads(read_highest, [root / path for path in paths])
    with lct.progress(looks, len(paths), "looking for more than 8 bits", unit="photo") as bar:
        highest = np.array([value for _, value in bar], dtype=np.int64)
    bits = lct.find_image_bits(highest)
    if bits and bits != (16,):
        lct.show(f"warning: {lct.describe_image_bits(np.count_nonzero(highest), bits)}")
    return bits


def read_highest(path: Path) -> int:
    """Return the highest value in a photo, 0 in one of 8 bits a channel or one that cannot be read."""
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\xff\xd8":  # JPEG: most photos need not be read twice
                return 0
        data = lct.read_file(path)
        with lct.opened_image(data) as image:
            return lct.highest_value(image, data)
    except (OSError, lct.ImageError):
        return 0  # whoever cuts it says why


def read_image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image once it is upright, without decoding it.

    Raises:
        ImageError: with the reason.
    """
    with lct.opened_image(lct.read_file(path)) as image:
        return image.size[::-1] if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else image.size
