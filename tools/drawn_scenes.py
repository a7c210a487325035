"""Images of the drawn tools: crops on benches with exact masks, the photo of a workbench, odd and broken files. Not a program."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from drawn_tools import (
    CLASS_NAMES,
    ON_WORKBENCH,
    SATIN,
    TOOLS,
    UNKNOWN_KINDS,
    UNKNOWN_ON_WORKBENCH,
    Material,
    Part,
    Stock,
    bend,
    circle,
    direction,
    rotation,
    tint,
)
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

_CELLS = (4, 3)  # columns, rows of the grid that places objects on the workbench
_CELL_PX = 300  # side of a cell of that grid, photo px
_SUPERSAMPLE = 2  # tools and benches are drawn this much larger and box-filtered: PIL polygons have no antialiasing
_BENCH_PX = 420  # side of a drawn bench, supersampled px; holds the longest crop (140 px) turned by a few degrees
_TEXTURE_PX = 512  # side of a cached texture, from which benches are cut at any angle


@dataclass(frozen=True)
class _Scene:
    """What all frames of one shot have in common."""

    bench: Image.Image  # RGB, _BENCH_PX square, with clutter
    angle: float  # radians, of the tool
    mirror: int  # 1, or -1 for a mirrored tool
    light: float  # direction that the light comes from, radians in image axes
    longest_px: int  # longest side of the crop
    recess: tuple[int, int, int] | None  # colour of the recess in a shadow board of foam, None on an open bench
    shadow: tuple[float, float, float]  # length in crop px, blur in crop px, opacity
    gain: np.ndarray  # (3,), exposure and colour temperature


# Colours of clutter on a bench, and of the recesses in a shadow board of foam.
_CLUTTER_COLOURS = (
    *((206, 210, 216), (178, 182, 188), (152, 155, 160), (124, 126, 130), (84, 86, 92), (190, 184, 170)),
    *((225, 222, 210), (150, 140, 138)),
)
_RECESS_COLOURS = ((186, 176, 150), (150, 140, 138), (24, 24, 26), (112, 128, 140))


# Surfaces: brightness (H, W) around 1, made of noise around 0, which multiplies a colour.


def _noise(rng: np.random.Generator, *layers: tuple[float, int, int]) -> np.ndarray:
    """Return the sum of layers of smooth noise, each (strength, bumps per column, bumps per row); few bumps make streaks."""
    total = 0
    for strength, *shape in layers:
        bumps = Image.fromarray(rng.uniform(-1, 1, shape).astype(np.float32))
        total = total + strength * np.asarray(bumps.resize((_TEXTURE_PX, _TEXTURE_PX), Image.Resampling.BICUBIC))
    return total


def _grain(rng: np.random.Generator, strength: float) -> np.ndarray:
    return strength * rng.normal(0, 1, (_TEXTURE_PX, _TEXTURE_PX))


@functools.cache
def _wear() -> np.ndarray:
    """Return the blotches and fine grain of a used surface, (H, W) around 1."""
    rng = np.random.default_rng(0)
    return (1 + (_noise(rng, (0.09, 24, 24), (0.06, 90, 90)) + _grain(rng, 0.05))).astype(np.float32)


def _paint_wood(rng: np.random.Generator) -> np.ndarray:
    value = 1 + _noise(rng, (0.10, 130, 4), (0.06, 256, 12), (0.08, 9, 3)) + _grain(rng, 0.025)
    boards = np.cumsum(rng.integers(70, 150, 7))
    for number, row in enumerate(boards[boards < _TEXTURE_PX]):
        value[row:] *= 1.09 if number % 2 else 0.92
        value[row : row + 3] *= 0.55
    return value


def _paint_foam(rng: np.random.Generator) -> np.ndarray:
    return 1 + _noise(rng, (0.12, 200, 200)) + _grain(rng, 0.10)


def _paint_metal(rng: np.random.Generator) -> np.ndarray:
    return 1 + _noise(rng, (0.07, 400, 5)) + _noise(rng, (0.10, 5, 5)) + _grain(rng, 0.03)


def _paint_cloth(rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.indices((_TEXTURE_PX, _TEXTURE_PX))
    weave = 0.07 * (np.sin(rows * 1.5) * np.sign(np.sin(columns * 0.75)) + np.sin(columns * 1.5))
    return 1 + weave + _noise(rng, (0.20, 5, 7), (0.08, 16, 14)) + _grain(rng, 0.04)


def _paint_mat(rng: np.random.Generator) -> np.ndarray:
    value = 1 + _noise(rng, (0.05, 7, 7)) + _grain(rng, 0.05)
    step = int(rng.integers(44, 70))
    value[::step] *= 1.5
    value[:, ::step] *= 1.5
    return value


def _paint_concrete(rng: np.random.Generator) -> np.ndarray:
    return 1 + _noise(rng, (0.12, 6, 6)) + _noise(rng, (0.07, 60, 60)) + _grain(rng, 0.05)


_TEXTURES = (  # (function that paints the surface of a bench, its possible colours)
    (_paint_wood, ((196, 168, 134), (164, 134, 104), (214, 192, 160))),
    (_paint_foam, ((44, 46, 50), (48, 58, 74), (66, 68, 72))),
    (_paint_metal, ((158, 162, 166), (112, 118, 122), (108, 126, 124))),
    (_paint_cloth, ((96, 106, 126), (176, 168, 152), (134, 112, 106))),
    (_paint_mat, ((62, 88, 82), (64, 76, 96), (58, 60, 66))),
    (_paint_concrete, ((150, 146, 138), (120, 122, 124), (196, 190, 178))),
)


def _to_image(colours: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))


@functools.cache
def _texture(kind: int, variant: int) -> Image.Image:
    paint, colours = _TEXTURES[kind]
    value = paint(np.random.default_rng((kind, variant)))
    return _to_image(value[..., None] * np.array(colours[variant]))


# Rendering.


def _light_part(mask: Image.Image, material: Material, bevel_px: float, light: float) -> np.ndarray:
    """Return the lit colours (H, W, 3) of one part, with its blurred silhouette as height map."""
    if not material.bevel:
        return np.full((mask.height, mask.width, 3), material.colour, np.float32) * 0.86
    blur = max(0.8, bevel_px)
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32) / 255
    slope_rows = np.zeros_like(height)
    slope_columns = np.zeros_like(height)
    slope_rows[1:-1] = height[2:] - height[:-2]
    slope_columns[:, 1:-1] = height[:, 2:] - height[:, :-2]
    # A silhouette blurred by r has a slope of about 0.4 / r at its edge; the factor makes the edge face sideways.
    facing = -(slope_columns * math.cos(light) + slope_rows * math.sin(light)) * (blur * 1.2)
    facing = np.clip(facing, -1, 1)
    lit = 0.86 + 0.62 * facing
    highlight = 150 * material.gloss * np.clip(facing - 0.25, 0, 1) ** 1.5
    return lit[..., None] * np.array(material.colour, dtype=np.float32) + highlight[..., None]


def _render(parts: Sequence[Part], pose: np.ndarray, light: float, longest_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float colours (H, W, 3) and the binary mask (H, W) uint8 of a tool, cropped tight; the longer side is `longest_px`."""
    corners = np.concatenate([part.outline for part in parts]) @ pose.T
    low = corners.min(axis=0)
    high = corners.max(axis=0)
    scale = (longest_px - 1) / (high - low).max()
    width, height = (int(side) for side in np.ceil((high - low) * scale) + 1)
    colours = np.zeros((height, width, 3), np.float32)
    mask = np.zeros((height, width), np.uint8)
    for part in parts:  # each in a padded window, because most parts are small
        outline, *holes = ((points @ pose.T - low) * scale for points in (part.outline, *part.holes))
        pad = 3 + int(2 * part.material.bevel * scale)
        left, top = (np.floor(outline.min(axis=0)).astype(int) - pad).tolist()
        right, bottom = (np.ceil(outline.max(axis=0)).astype(int) + pad + 1).tolist()
        window = Image.new("L", (right - left, bottom - top))
        for ink, points in ((255, outline), *((0, hole) for hole in holes)):
            ImageDraw.Draw(window).polygon((points - (left, top)).ravel().tolist(), fill=ink)
        lit = _light_part(window, part.material, float(part.material.bevel * scale), light)
        rows = slice(max(0, top), min(height, bottom))
        columns = slice(max(0, left), min(width, right))
        inner = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        covered = np.asarray(window)[inner] > 0
        colours[rows, columns][covered] = lit[inner][covered]
        mask[rows, columns][covered] = 255
    return colours, mask


def _add_sheen(rng: np.random.Generator, colours: np.ndarray) -> np.ndarray:
    """Vary the brightness over a tool: long waves for reflections of the room, short ones for blotches of wear."""
    height, width = colours.shape[:2]
    row, column = rng.integers(0, _TEXTURE_PX - np.array([height, width]) + 1)
    wear = _wear()[row : row + height, column : column + width]
    angle = rng.uniform(0, 2 * math.pi)
    waves = rng.uniform(0.5, 2.0)
    phase = rng.uniform(0, 2 * math.pi)
    along = np.add.outer(np.arange(height) * math.sin(angle), np.arange(width) * math.cos(angle))
    sheen = 1 + 0.13 * np.sin(2 * math.pi * waves * (along / max(height, width)) + phase)
    return colours * (wear * sheen.astype(np.float32))[..., None]


# Benches: a texture, cut at any angle, with clutter on it.


def _cut_out(
    image: Image.Image, size: tuple[int, int], centre: np.ndarray, turn: float, zoom: float, resample: Image.Resampling
) -> Image.Image:
    """Cut a rectangle of `size`, turned by `turn` radians, out of an image around `centre`."""
    matrix = rotation(turn) / zoom
    offset = centre - matrix @ (np.array(size) / 2)
    return image.transform(size, Image.Transform.AFFINE, np.column_stack([matrix, offset]).ravel().tolist(), resample)


def _tone(colour: Iterable[float], factor: float) -> tuple[int, ...]:
    return tuple(min(255, int(channel * factor)) for channel in colour)


def _draw_fastener(rng: np.random.Generator, draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float) -> None:
    """Draw a screw head, nut or washer with its shadow."""
    tone = int(rng.integers(95, 215))
    corners = int(rng.choice([6, 24, 24]))
    phase = rng.uniform(0, 1)

    def draw_disc(scale: float, ink: tuple[int, int, int, int], shift: float = 0.0) -> None:
        outline = circle(centre + shift, radius * scale, corners if scale > 0.6 else 24, phase)
        draw.polygon(outline.ravel().tolist(), fill=ink)

    draw_disc(1.1, (10, 10, 10, 110), 3.0)
    draw_disc(1.0, (*[int(tone * 0.7)] * 3, 255))
    draw_disc(0.88, (tone, tone, int(tone * rng.uniform(0.75, 1.0)), 255), -0.6)
    if rng.random() < 0.5:
        draw_disc(0.5, (28, 28, 30, 255))
    else:
        bar = direction(phase) * radius * 0.7
        for end in (bar, bar[::-1] * (-1, 1)):
            draw.line([*(centre - end).tolist(), *(centre + end).tolist()], fill=(40, 40, 42, 255), width=3)


def _draw_clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> None:
    """Draw something else that lies on the bench: the edge of a tray, tape, paper or a cable."""
    away = direction(rng.uniform(0, 2 * math.pi))
    along = np.array([-away[1], away[0]])
    middle = np.full(2, _BENCH_PX / 2)
    colour = _tone(tint(rng, _CLUTTER_COLOURS[rng.integers(len(_CLUTTER_COLOURS))]), 1.0)
    if rng.random() < 0.4:  # a cable
        bow = rng.uniform(-60, 60)
        bends = [middle + away * (rng.uniform(30, 150) + bow * (i % 2)) + along * (i - 2) * 140 for i in range(5)]
        path = bend(np.array(bends)).ravel().tolist()
        for scale, tone in ((1.0, 0.5), (0.6, 1.0), (0.2, 1.35)):
            draw.line(path, fill=(*_tone(colour, tone), 255), width=int(13 * scale) + 1, joint="curve")
        return
    near = rng.uniform(50, 150)
    depth = rng.uniform(30, 160)
    half_length = rng.uniform(60, 260)
    origin = middle + along * rng.uniform(-120, 120)
    front = origin + away * near
    back = origin + away * (near + depth)
    side = along * half_length
    corners = np.array([front - side, front + side, back + side, back - side])
    draw.polygon((corners + 5).ravel().tolist(), fill=(8, 8, 8, 100))
    draw.polygon(corners.ravel().tolist(), fill=(*colour, 255), outline=(*_tone(colour, 0.6), 255))


def _make_bench(rng: np.random.Generator) -> tuple[Image.Image, bool]:
    """Return a bench with clutter, and whether it is foam, where tools lie in recesses."""
    kind = int(rng.integers(len(_TEXTURES)))
    texture = _texture(kind, int(rng.integers(3)))
    is_foam = _TEXTURES[kind][0] is _paint_foam
    centre = _TEXTURE_PX / 2 + rng.uniform(-40, 40, 2)
    turn = rng.uniform(0, 2 * math.pi)
    zoom = rng.uniform(1.6, 2.0)  # at 1.6 a turned square stays inside the texture
    bench = _cut_out(texture, (_BENCH_PX, _BENCH_PX), centre, turn, zoom, Image.Resampling.NEAREST)  # smoothed later
    draw = ImageDraw.Draw(bench, "RGBA")
    for _ in range(int(rng.integers(0, 9))):  # scratches
        start = rng.uniform(0, _BENCH_PX, 2)
        angle = rng.uniform(0, 2 * math.pi)
        end = start + rng.uniform(20, 160) * direction(angle)
        tone = int(rng.choice([30, 60, 200, 235]))
        ink = (tone, tone, tone, int(rng.integers(50, 130)))
        draw.line([*start.tolist(), *end.tolist()], fill=ink, width=int(rng.integers(1, 3)))
    if not is_foam:
        for _ in range(int(rng.integers(0, 3))):
            _draw_clutter(rng, draw)
        for _ in range(int(rng.integers(0, 8))):
            _draw_fastener(rng, draw, rng.uniform(0, _BENCH_PX, 2), rng.uniform(8, 17))
    return bench, is_foam


def _make_scene(rng: np.random.Generator) -> _Scene:
    bench, is_foam = _make_bench(rng)
    recess = _RECESS_COLOURS[rng.integers(len(_RECESS_COLOURS))] if is_foam and rng.random() < 0.7 else None
    warmth = rng.normal(0, 0.07)
    gain = rng.uniform(0.72, 1.22) * np.array([1 + warmth, 1.0, 1 - warmth])
    return _Scene(
        bench=bench,
        recess=recess,
        gain=gain,
        shadow=(rng.uniform(1.0, 5.0), rng.uniform(1.0, 3.5), rng.uniform(0.35, 0.75)),
        angle=rng.uniform(0, 2 * math.pi),
        mirror=int(rng.choice([-1, 1])),
        light=rng.uniform(0, 2 * math.pi),
        longest_px=int(rng.integers(96, 141)),
    )


def _lay_down(bench: Image.Image, mask: Image.Image, scene: _Scene) -> None:
    """Cast the shadow of a tool on the bench; in foam, cut its recess first."""
    if scene.recess is not None:
        wide = mask.filter(ImageFilter.GaussianBlur(5)).point(lambda value: 255 if value > 30 else 0)
        bench.paste(_tone(scene.recess, 0.45), (0, 0), wide)
        bench.paste(scene.recess, (2, 2), wide)
    length, blur, opacity = scene.shadow
    offset = -_SUPERSAMPLE * length * direction(scene.light)
    cast = Image.new("L", mask.size)
    cast.paste(mask, (round(offset[0]), round(offset[1])))
    cast = cast.filter(ImageFilter.GaussianBlur(_SUPERSAMPLE * blur)).point(lambda value: int(value * opacity))
    bench.paste((6, 6, 10), (0, 0), cast)


def _expose(rng: np.random.Generator, image: np.ndarray, scene: _Scene) -> np.ndarray:
    """Return uint8 pixels after uneven light, vignette, exposure, colour temperature, blur and sensor noise."""
    height, width = image.shape[:2]
    rows = np.linspace(-1, 1, height)[:, None]
    columns = np.linspace(-1, 1, width)[None]
    falloff = rng.uniform(0.0, 0.28) * (columns * math.cos(scene.light) + rows * math.sin(scene.light))
    vignette = rng.uniform(0.0, 0.22) * (rows**2 + columns**2) / 2
    lit = image * ((1 + falloff - vignette)[..., None] * scene.gain * rng.uniform(0.95, 1.05))
    blur = ImageFilter.GaussianBlur(max(0.0, rng.uniform(-0.5, 0.8)))
    blurred = np.asarray(_to_image(lit).filter(blur), dtype=np.float32)
    return np.asarray(_to_image(blurred + rng.normal(0, rng.uniform(1, 6), image.shape)))


def _draw_frame(rng: np.random.Generator, parts: Sequence[Part], scene: _Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return a tool photographed as a detector would crop it: image (H, W, 3) and mask (H, W), uint8."""
    margins = rng.uniform(0.012, 0.06, 4) * scene.longest_px  # left, top, right, bottom in crop px
    inner = int((scene.longest_px - margins.reshape(2, 2).sum(axis=0).max()) * rng.uniform(0.95, 1.0))
    turn = rotation(scene.angle + rng.normal(0, 0.07))
    foreshortening = np.diag([1.0, scene.mirror * rng.uniform(0.93, 1.07)])
    colours, tool_mask = _render(parts, turn @ foreshortening, scene.light, inner * _SUPERSAMPLE)
    left, top, right, bottom = (_SUPERSAMPLE * round(float(margin)) for margin in margins)
    # Rounded up to whole crop pixels: an odd supersampled side would shift the mask by half a pixel.
    sides = (left + tool_mask.shape[1] + right, top + tool_mask.shape[0] + bottom)
    width, height = (-(-side // _SUPERSAMPLE) * _SUPERSAMPLE for side in sides)
    tool = Image.fromarray(tool_mask)
    mask = Image.new("L", (width, height))
    mask.paste(tool, (left, top))
    centre = _BENCH_PX / 2 + rng.normal(0, 6, 2)
    wobble = rng.normal(0, 0.07)
    zoom = rng.uniform(1.0, 1.06)
    photo = _cut_out(scene.bench, mask.size, centre, wobble, zoom, Image.Resampling.BILINEAR)
    _lay_down(photo, mask, scene)
    photo.paste(_to_image(_add_sheen(rng, colours)), (left, top), tool)
    image = _expose(rng, np.asarray(photo.reduce(_SUPERSAMPLE), dtype=np.float32), scene)
    return image, np.where(np.asarray(mask.reduce(_SUPERSAMPLE)) > 127, 255, 0).astype(np.uint8)


# The workbench: a photo of tools and one unknown object, each in its own cell of a grid, so that they cannot overlap.


class _PlacedObject(NamedTuple):
    """An object on the workbench, in px of the supersampled photo."""

    name: str
    colours: np.ndarray  # (H, W, 3)
    mask: Image.Image  # mode L, (W, H)
    corner: tuple[int, int]  # left, top


def _place_objects(rng: np.random.Generator, light: float) -> list[_PlacedObject]:
    """Return nine tools and the unknown object in random cells and poses."""
    names = [*rng.permutation(CLASS_NAMES)[:9].tolist(), UNKNOWN_ON_WORKBENCH]
    objects = []
    for name, cell in zip(names, rng.permutation(math.prod(_CELLS))[: len(names)].tolist(), strict=True):
        make, stock = ON_WORKBENCH[name]
        longest_px = int(rng.integers(200, 251)) if name in TOOLS else 160  # tools twice as large as in the crops
        pose = rotation(rng.uniform(0, 2 * math.pi)) @ np.diag([1.0, rng.choice([-1, 1])])
        colours, mask = _render(make(rng, stock), pose, light, longest_px * _SUPERSAMPLE)
        low = np.array([cell % _CELLS[0], cell // _CELLS[0]]) * _CELL_PX + (6, 38)  # leaves room for the label above
        slack = _CELL_PX - np.array([12, 44]) - np.array(mask.shape[::-1]) / _SUPERSAMPLE
        corner = np.round(low + rng.uniform(0, 1, 2) * slack).astype(int) * _SUPERSAMPLE
        objects.append(_PlacedObject(name, colours, Image.fromarray(mask), tuple(corner.tolist())))
    return objects


def _photograph(
    rng: np.random.Generator, objects: Sequence[_PlacedObject], scene: _Scene
) -> tuple[Image.Image, list[np.ndarray]]:
    """Return the photo of a wooden workbench, and the mask of each object on it, bool (H, W)."""
    size = tuple(count * _CELL_PX * _SUPERSAMPLE for count in _CELLS)
    centre = np.full(2, _TEXTURE_PX / 2)
    zoom = max(size) / _TEXTURE_PX
    photo = _cut_out(_texture(0, int(rng.integers(3))), size, centre, 0.0, zoom, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(photo, "RGBA")
    for _ in range(12):
        _draw_fastener(rng, draw, rng.uniform((0, 0), size), rng.uniform(14, 26))
    masks = [Image.new("L", size) for _ in objects]
    for item, mask in zip(objects, masks, strict=True):
        mask.paste(item.mask, item.corner)
    _lay_down(photo, functools.reduce(ImageChops.lighter, masks), scene)
    for item in objects:
        photo.paste(_to_image(_add_sheen(rng, item.colours)), item.corner, item.mask)
    image = _expose(rng, np.asarray(photo.reduce(_SUPERSAMPLE), dtype=np.float32), scene)
    return Image.fromarray(image), [np.asarray(mask.reduce(_SUPERSAMPLE)) > 127 for mask in masks]


def _to_detection(number: int, mask: np.ndarray) -> dict[str, Any]:
    """Return the COCO annotation of an object: its box, and its mask as run lengths down the columns."""
    rows = np.flatnonzero(mask.any(axis=1)).tolist()
    columns = np.flatnonzero(mask.any(axis=0)).tolist()
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    borders = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False)).tolist()
    segmentation = {"size": list(mask.shape), "counts": np.diff([0, *borders, mask.size]).tolist()}
    ids = {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0}
    return {**ids, "bbox": box, "area": int(mask.sum()), "segmentation": segmentation}


def draw_workbench(folder: Path, seed: int) -> None:
    """Draw a photo of nine tools and a mug, and write the detections and the true names.

    Files: workbench.jpg; detections.json, COCO with exact boxes and masks of category `object`; truth.json, names by detection id.
    """
    rng = np.random.default_rng((seed, len(CLASS_NAMES)))
    scene = _make_scene(rng)
    length, blur, opacity = scene.shadow
    scene = dataclasses.replace(scene, recess=None, shadow=(2 * length, 2 * blur, opacity))
    objects = _place_objects(rng, scene.light)
    photo, masks = _photograph(rng, objects, scene)
    detections = {
        "images": [{"id": 1, "file_name": "workbench.jpg", "width": photo.width, "height": photo.height}],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [_to_detection(number, mask) for number, mask in enumerate(masks, 1)],
    }
    folder.mkdir(parents=True)
    (folder / "workbench.jpg").write_bytes(encode_jpeg(photo))
    (folder / "detections.json").write_text(json.dumps(detections))
    (folder / "truth.json").write_text(json.dumps({number: item.name for number, item in enumerate(objects, 1)}))


# Files: most are ordinary, a few are odd but valid, and a few are broken, as in every real folder.


def _encode_png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, **options: Any) -> bytes:
    """Return an image as the bytes of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def _encode_rotated_jpeg(image: Image.Image) -> bytes:
    """Return the image as a JPEG on its side with EXIF orientation 6, as phones store it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_jpeg(image.transpose(Image.Transpose.ROTATE_90), exif=exif)


def _encode_gray16_png(image: Image.Image) -> bytes:
    return _encode_png(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257))


def _encode_damaged_png(image: Image.Image) -> bytes:
    data = _encode_png(image)
    middle = len(data) // 2
    return data[:middle] + bytes(64) + data[middle + 64 :]


def _encode_truncated_jpeg(image: Image.Image) -> bytes:
    data = encode_jpeg(image)
    return data[: len(data) // 2]


_Codec = tuple[str, Callable[[Image.Image], bytes]]  # suffix, encoder
_ODD_FILES: dict[str, _Codec] = {  # by class; its last file, so that small demos have one too
    "adjustable_wrench": (".jpg", lambda image: encode_jpeg(image.convert("L"))),
    "combination_wrench": (".jpg", lambda image: encode_jpeg(image.convert("CMYK"))),
    "file": (".png", lambda image: _encode_png(image.quantize(64))),
    "hammer": (".png", _encode_gray16_png),
    "hex_key": (".jpg", _encode_rotated_jpeg),
    "oil_can": (".JPG", encode_jpeg),
}
_BROKEN_FILES: dict[str, _Codec] = {  # by class; an extra file, because it can never be trained on
    "ratchet": (".jpg", _encode_truncated_jpeg),
    "screwdriver": (".jpg", lambda image: b""),
    "side_cutter": (".jpg", lambda image: b"This is not a picture: it was saved from a web page by mistake.\n"),
    "speed_brace": (".png", _encode_damaged_png),
}
_DUPLICATED_CLASS = "pliers"  # its first file is copied byte for byte under another shot number


def _plan_shots(images_per_class: int) -> list[tuple[int, int]]:
    """Return the (shot, frame) pairs of one class; every third shot has two or three frames of the same tool and scene."""
    counts = (1 if shot % 3 else 2 + (shot // 3) % 2 for shot in itertools.count())
    frames = ((shot, frame) for shot, count in enumerate(counts) for frame in range(count))
    return list(itertools.islice(frames, images_per_class))


def _write_sample(folder: Path, stem: str, drawn: tuple[np.ndarray, np.ndarray], codec: _Codec) -> None:
    image, mask = drawn
    suffix, encode = codec
    cutout = Image.fromarray(np.dstack([image, mask]))
    (folder / "cropped" / f"{stem}{suffix}").write_bytes(encode(Image.fromarray(image)))
    (folder / "masks" / f"{stem}_mask.png").write_bytes(_encode_png(Image.fromarray(mask), compress_level=3))
    (folder / "cutouts" / f"{stem}.png").write_bytes(_encode_png(cutout, compress_level=3))


def draw_unknown_objects(root: Path, images_per_kind: int, seed: int) -> None:
    """Draw crops of unknown objects, one folder per kind; the kind on the workbench is not among them."""
    for number, (kind, make) in enumerate(UNKNOWN_KINDS.items(), len(CLASS_NAMES)):
        (root / kind).mkdir(parents=True)
        for index in range(images_per_kind):
            rng = np.random.default_rng((seed, number, index))
            stock = Stock(tuple(rng.integers(30, 230, 3).tolist()), SATIN)
            image, _ = _draw_frame(rng, make(rng, stock), _make_scene(rng))
            (root / kind / f"{index:03d}.jpg").write_bytes(encode_jpeg(Image.fromarray(image)))


def draw_dataset(root: Path, images_per_class: int, seed: int) -> None:
    """Draw a data set as training reads it: `images_per_class` good images of every class, a duplicate and four broken files.

    The same arguments give the same bytes. Shot numbers are unique over all classes, so that `--group_regex '^(shot\\d+)_'` keeps
    the frames of one physical tool and scene together.
    """
    plan = _plan_shots(images_per_class)
    shots_per_class = plan[-1][0] + 3  # numbered from 0, with one more for the duplicate or the broken file
    for class_index, class_name in enumerate(tqdm(CLASS_NAMES, "drawing", unit="class", disable=None)):
        folder = root / class_name
        for name in ("cropped", "masks", "cutouts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        frames = [(1 + class_index * shots_per_class + shot, frame) for shot, frame in plan]
        if class_name in _BROKEN_FILES:
            frames.append((frames[-1][0] + 1, 0))
        make_tool, stock = TOOLS[class_name]
        last_codec = _ODD_FILES.get(class_name) or _BROKEN_FILES.get(class_name)
        for position, (shot, frame) in enumerate(frames):
            if frame == 0:
                shot_rng = np.random.default_rng((seed, class_index, shot))
                parts = make_tool(shot_rng, stock)
                scene = _make_scene(shot_rng)
            drawn = _draw_frame(np.random.default_rng((seed, class_index, shot, frame)), parts, scene)
            codec = (".jpg", encode_jpeg)
            if last_codec and position == len(frames) - 1:
                codec = last_codec
            elif position % 9 == 4:
                codec = (".png", functools.partial(_encode_png, compress_level=3))
            _write_sample(folder, f"shot{shot:03d}_f{frame}", drawn, codec)
            if class_name == _DUPLICATED_CLASS and position == 0:
                _write_sample(folder, f"shot{frames[-1][0] + 1:03d}_f0", drawn, codec)
    (root / CLASS_NAMES[0] / "cropped" / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
