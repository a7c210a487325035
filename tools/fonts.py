"""The font of drawn pictures; a library."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from PIL import ImageFont


@functools.cache
def load_font(size: int) -> Any:
    """Return a system font with Cyrillic and Greek, else Pillow's default, which shows boxes for them."""
    for name in ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "Arial.ttf"):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
