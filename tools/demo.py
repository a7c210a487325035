#!/usr/bin/env python3
"""Draw a data set of eleven hand tools, train on it, and pre-label a photo of a workbench: the whole job, without any data.

    python lct_dino3.py demo                       the same as: python tools/demo.py
    python lct_dino3.py demo --epochs 5 --gpus 0   flags of training are passed on

Everything is drawn with exact masks, and a few files are odd or broken on purpose, as in every real folder. The same command
continues an interrupted demo. Knows the script only as a command that it starts, and reads the COCO labels that this writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

SCRIPT = Path(__file__).resolve().parents[1] / "lct_dino3.py"
IMAGES_PER_STRANGER = 40
# A small ResNet learns the drawn tools from scratch in a minute; with the margin of 0.30 it would need several. A scale of 30 is
# content with eleven classes too early: things of no class then look more like tools. The crops have 1 to 6 % of bench around them.
# Val alone is too easy to tell how near a stranger may come: things of other kinds than the one on the photo set the thresholds.
TRAIN_FLAGS = {
    "--group_regex": r"^(shot\d+)_",
    "--target_precision": "0.92",
    "--model_id": "test_resnet",
    "--no-pretrained": None,
    "--no-freeze_backbone": None,
    "--img_size": "64",
    "--arc_scale": "12",
    "--arc_margin": "0.1",
    "--lr": "0.01",
    "--arc_lr": "0.01",
    "--batch": "32",
    "--epochs": "18",
    "--save_every": "0",
}
FONT_NAMES = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "Arial.ttf")
OUTLINE = 3  # px of a box that is drawn, in an image of 1,000 px

_PLACES = (4, 3)
_PLACE_PX = 300  # for objects on the workbench: columns and rows, side of each in photo px
_SUPERSAMPLE = 2  # tools and benches are drawn this much larger and box-filtered: PIL polygons have no antialiasing
_BENCH_PX = 420  # side of a drawn piece of bench, supersampled: holds the longest crop (140 px) turned by a few degrees
_TEXTURE_PX = 512  # side of a cached texture, from which benches are cut at any angle


@dataclass(frozen=True)
class _Stock:
    """The colours in which the kit has one class, RGB."""

    grip: tuple[int, int, int]
    metal: tuple[int, int, int]


@dataclass(frozen=True)
class _Material:
    colour: tuple[float, float, float]  # RGB, 0..255
    gloss: float  # strength of highlights, 0 = chalk, 1 = chrome
    bevel: float  # width of the rounded edge, in tool lengths; half the part's width makes a rod, 0 a flat mark


@dataclass(frozen=True)
class _Part:
    outline: np.ndarray  # (N, 2), tool lengths, x along the tool
    material: _Material
    holes: tuple[np.ndarray, ...] = ()  # cut out of this part only; may reach over its outline to make a jaw


@dataclass(frozen=True)
class _Scene:
    """What the frames of one shot share."""

    bench: Image.Image  # RGB, _BENCH_PX square, with clutter
    angle: float  # radians, of the tool
    mirror: int  # 1 or -1
    light: float  # direction the light comes from, radians in image axes
    longest_px: int  # longest side of the crop
    recess: tuple[int, int, int] | None  # colour below the foam of a shadow board, None on an open bench
    shadow: tuple[float, float, float]  # length in crop px, blur in crop px, opacity
    gain: np.ndarray  # (3,), exposure and colour temperature


# Shapes: all in tool lengths, x along the tool.


def _circle(centre: tuple[float, float], radius: float, corners: int = 30, phase: float = 0.0) -> np.ndarray:
    angles = phase + np.arange(corners) * (2 * math.pi / corners)
    return np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], axis=1)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)


def _smooth(points: Sequence[tuple[float, float]] | np.ndarray, rounds: int = 2) -> np.ndarray:
    """Round the corners of an outline by Chaikin's corner cutting."""
    points = np.asarray(points, dtype=np.float64)
    for _ in range(rounds):
        following = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], axis=1).reshape(-1, 2)
    return points


def _bend(points: Sequence[tuple[float, float]] | np.ndarray, rounds: int = 3) -> np.ndarray:
    """Round the corners of an open line, which keeps its two ends."""
    points = np.asarray(points, dtype=np.float64)
    for _ in range(rounds):
        points = np.concatenate([points[:1], _smooth(points, 1)[1:-3], points[-1:]])
    return points


def _profile(*stations: tuple[float, float]) -> np.ndarray:
    """Return the outline of a turned piece: (x, half width) stations mirrored at the axis."""
    upper = np.array(stations, dtype=np.float64)
    return np.concatenate([upper, upper[::-1] * (1, -1)])


def _tube(path: Sequence[tuple[float, float]] | np.ndarray, *half_widths: float) -> np.ndarray:
    """Return the outline of a band along a path; half widths are spread evenly over its length."""
    path = np.asarray(path, dtype=np.float64)
    direction = np.gradient(path, axis=0)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True) + 1e-9
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    width = np.interp(length / length[-1], np.linspace(0, 1, len(half_widths)), half_widths)
    offset = np.stack([-direction[:, 1], direction[:, 0]], axis=1) * width[:, None]
    return np.concatenate([path + offset, (path - offset)[::-1]])


def _rotation(angle: float) -> np.ndarray:
    return np.array([(math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))])


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
    return points @ _rotation(angle).T


def _stripes(x_range: tuple[float, float], count: int, reach: float, slant: float, width: float) -> list[np.ndarray]:
    """Return `count` cross lines from -reach to +reach: file teeth, knurls, grip ribs."""
    line = np.array(
        [(-slant - width, -reach), (-slant + width, -reach), (slant + width, reach), (slant - width, reach)]
    )
    return [line + (x, 0) for x in np.linspace(*x_range, count)]


# Materials.


def _tint(rng: np.random.Generator, colour: tuple[int, int, int]) -> tuple[float, float, float]:
    varied = np.array(colour, dtype=np.float64) * rng.uniform(0.82, 1.12) + rng.normal(0, 7, 3)
    return tuple(np.clip(varied, 8, 250).tolist())


def _metal(rng: np.random.Generator, bevel: float, stock: _Stock) -> _Material:
    return _Material(_tint(rng, stock.metal), rng.uniform(0.45, 1.0), bevel)


def _grip(rng: np.random.Generator, bevel: float, stock: _Stock) -> _Material:
    return _Material(_tint(rng, stock.grip), rng.uniform(0.2, 0.6), bevel)


def _shade(material: _Material, factor: float) -> _Material:
    return dataclasses.replace(material, colour=tuple(channel * factor for channel in material.colour))


def _mark(outlines: Iterable[np.ndarray], material: _Material, factor: float) -> list[_Part]:
    """Return what is stamped, cut or printed into a surface: flat, in a darker or lighter tone."""
    flat = dataclasses.replace(_shade(material, factor), gloss=0.0, bevel=0.0)
    return [_Part(outline, flat) for outline in outlines]


# Tools: one function per class; every call is another make and size of it. Points stand in rows, not one a line:
# fmt: off


def _make_adjustable_wrench(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    metal = _metal(rng, 0.018, stock)
    neck = rng.uniform(0.034, 0.044)
    tail = rng.uniform(0.046, 0.062)
    reach = rng.uniform(0.105, 0.135)
    gap = rng.uniform(0.035, 0.11)
    tilt = rng.uniform(0.2, 0.4)
    handle = _smooth(_profile((-0.5, tail * 0.6), (-0.47, tail), (-0.3, tail * 0.95), (0.1, neck), (0.24, neck * 1.3)))
    sleeve = _smooth(_profile((-0.5, tail * 0.7), (-0.47, tail * 1.2), (-0.3, tail * 1.15), (-0.05, neck * 1.3)))
    head = _smooth([
        (-0.1, -0.05), (-0.02, -reach), (0.1, -reach * 1.08), (0.24, -reach * 0.8), (0.25, -gap / 2),
        (0.08, -gap / 2), (0.06, reach * 0.75), (-0.04, reach * 0.85), (-0.1, 0.05),
    ], 1)
    jaw = np.array([
        (0.03, gap / 2), (0.25, gap / 2), (0.245, gap / 2 + 0.035), (0.16, gap / 2 + 0.085), (0.03, gap / 2 + 0.095),
    ])
    worm = _box(-0.055, 0.0, 0.02, 0.062)
    ridges = [line + (0, 0.031) for line in _stripes((-0.045, 0.01), 5, 0.028, 0.004, 0.003)]
    head, jaw, worm, *ridges = (_turn(outline, tilt) + (0.3, 0.0) for outline in (head, jaw, worm, *ridges))
    return [
        _Part(handle, metal), _Part(jaw, _shade(metal, 0.9)), _Part(head, metal), _Part(sleeve, _grip(rng, 0.03, stock)),
        *_mark([worm], metal, 0.45), *_mark(ridges, metal, 1.05),
    ]


def _make_combination_wrench(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    metal = _metal(rng, 0.018, stock)
    shaft = rng.uniform(0.026, 0.04)
    ring = rng.uniform(0.062, 0.088)
    jaw = rng.uniform(0.078, 0.105)
    gap = jaw * rng.uniform(0.45, 0.6)
    tilt = rng.choice([-1, 1]) * rng.uniform(0.2, 0.32)
    left = (-0.5 + ring, 0.0)
    right = (0.5 - jaw, 0.0)
    notch = np.array([(-jaw * 0.25, 0), (-jaw * 0.05, -gap), (jaw * 1.5, -gap), (jaw * 1.5, gap), (-jaw * 0.05, gap)])
    open_end = _smooth(jaw * np.array([
        (-1.1, -0.45), (-0.3, -1.05), (0.6, -1.08), (1.05, -0.75), (1.0, 0.75), (0.6, 1.0), (-0.3, 1.05), (-1.1, 0.45),
    ]))
    ring_hole = _circle(left, ring * rng.uniform(0.58, 0.68), int(rng.choice([6, 12])), rng.uniform(0, 1))
    body = _profile((left[0] + ring * 0.8, shaft * 1.15), (-0.25, shaft), (0.2, shaft * 1.05),
                    (right[0] - jaw * 0.3, shaft * 1.5))
    parts = [
        _Part(body, metal),
        _Part(_turn(open_end, tilt) + right, metal, (_turn(notch, tilt) + right,)),
        _Part(_circle(left, ring), metal, (ring_hole,)),
    ]
    if rng.random() < 0.75:  # the recessed panel with the size stamped in
        panel = _smooth(_profile((-0.22, shaft * 0.5), (0.2, shaft * 0.55)))
        stamps = [_box(x, -shaft * 0.25, x + 0.012, shaft * 0.25) for x in (-0.03, 0.0, 0.02)]
        parts += [_Part(panel, _shade(metal, rng.uniform(0.7, 0.88))), *_mark(stamps, metal, 0.5)]
    return parts


def _make_file(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    metal = _metal(rng, 0.012, stock)
    handle = _grip(rng, 0.04, stock)
    width = rng.uniform(0.038, 0.06)
    start = rng.uniform(-0.2, -0.12)
    tip = rng.uniform(0.25, 1.0)
    metal = _shade(metal, 0.82)  # steel full of teeth looks darker than polished steel
    blade = _profile((start, width * 0.45), (start + 0.05, width), (0.2, width), (0.47, width * tip),
                     (0.5, width * tip * 0.85))
    reach = width * 0.86
    slant = rng.uniform(0.012, 0.03)
    toothed = (start + 0.08, 0.46 if tip > 0.7 else 0.24)
    count = int(rng.integers(16, 24))
    teeth = _stripes(toothed, count, reach, slant, 0.0032)
    if rng.random() < 0.6:
        teeth += _stripes(toothed, count, reach, -slant, 0.0028)
    bulge = rng.uniform(0.042, 0.058)
    grip = _smooth(_profile((-0.5, bulge * 0.5), (-0.48, bulge), (-0.4, bulge * 1.05), (-0.3, bulge * 0.8),
                            (start - 0.03, bulge * 0.62), (start + 0.005, bulge * 0.55)))
    ferrule = _profile((start - 0.035, bulge * 0.64), (start + 0.012, bulge * 0.56))
    return [_Part(blade, metal), *_mark(teeth, metal, 0.66), _Part(grip, handle), _Part(ferrule, _metal(rng, 0.02, stock))]


def _make_hammer(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    metal = _metal(rng, 0.03, stock)
    handle = _grip(rng, 0.025, stock)
    width = rng.uniform(0.024, 0.034)
    head_x = 0.44
    thick = rng.uniform(0.046, 0.066)
    face = rng.uniform(0.12, 0.17)
    peen = rng.uniform(0.14, 0.2)
    kind = ("wedge", "claw", "ball")[rng.integers(3)]
    stick = _profile((-0.5, width * 0.9), (-0.47, width * 1.35), (-0.3, width * 1.25), (0.0, width), (0.47, width * 0.9))
    back = {
        "wedge": [(thick * 0.9, 0.05), (thick * 0.35, peen), (-thick * 0.1, peen)],
        "claw": [  # bent back towards the handle
            (thick * 0.9, 0.05), (thick * 0.5, peen * 0.7), (-thick * 0.9, peen * 1.15), (-thick * 1.1, peen * 1.08),
            (-thick * 0.3, peen * 0.6),
        ],
        "ball": [(thick * 0.8, 0.05), (thick * 0.5, peen * 0.45), (-thick * 0.5, peen * 0.45)],
    }[kind]
    head = _smooth([
        (thick * 1.1, -face), (thick * 1.1, -face * 0.7), (thick * 0.75, -face * 0.6), (thick * 0.9, -0.05), *back,
        (-thick * 0.9, 0.05), (-thick * 0.9, -0.05), (-thick * 0.75, -face * 0.6), (-thick * 1.1, -face * 0.7),
        (-thick * 1.1, -face),
    ], 1)
    parts = [_Part(_smooth(stick), handle)]
    if rng.random() < 0.3:  # rubber pulled over the end
        rubber = _smooth(_profile((-0.5, width), (-0.47, width * 1.5), (-0.3, width * 1.4), (-0.12, width * 1.15)))
        parts.append(_Part(rubber, _grip(rng, 0.025, stock)))
    parts.append(_Part(head + (head_x, 0), metal))
    if kind == "ball":
        parts.append(_Part(_circle((head_x, peen * 0.62), thick * 0.75), metal))
    eye = _smooth(_box(head_x - thick * 0.5, -0.02, head_x + thick * 0.5, 0.02), 1)
    return [*parts, _Part(eye, _shade(handle, 0.8))]


def _make_hex_key(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    width = rng.uniform(0.024, 0.036)
    short = rng.uniform(0.2, 0.42)
    metal = _metal(rng, width * 0.7, stock)  # powder coated
    radius = rng.uniform(0.05, 0.09)
    corner = _bend([(0.5 - radius, 0.0), (0.5, 0.0), (0.5, radius)])
    path = np.concatenate([[(-0.5, 0.0), (0.0, 0.0)], corner, [(0.5, short)]])
    facet = _shade(_Material(metal.colour, 0.9, width * 0.3), 1.25)
    parts = [_Part(_tube(path, width), metal), _Part(_tube(path, width * 0.3), facet)]
    if rng.random() < 0.4:  # ball end
        groove = _box(-0.475, -width * 1.1, -0.462, width * 1.1)
        parts += [_Part(_circle((-0.5, 0), width * 1.15, 16), metal), *_mark([groove], metal, 0.5)]
    if rng.random() < 0.3:  # plastic sleeve on the long arm
        sleeve = _smooth(_box(rng.uniform(-0.3, -0.15), -width * 1.5, 0.3, width * 1.5), 1)
        parts.append(_Part(sleeve, _grip(rng, width, stock)))
    return parts


def _make_oil_can(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    paint = _Material(_grip(rng, 0.07, stock).colour, 0.7, 0.07)
    steel = _metal(rng, 0.012, stock)
    base = rng.uniform(0.15, 0.19)
    top = rng.uniform(0.09, 0.14)
    high = rng.uniform(0.24, 0.34)
    if rng.random() < 0.5:  # straight can with a cone on it
        body = _smooth([(-base, 0), (base, 0), (base, high * 0.75), (top * 0.35, high * 1.1), (-top * 0.35, high * 1.1),
                        (-base, high * 0.75)], 1)
    else:  # bell
        body = _smooth([(-base * 1.1, 0), (base * 1.1, 0), (base, high * 0.35), (top * 0.45, high), (-top * 0.45, high),
                        (-base, high * 0.35)])
    lean = rng.uniform(0.2, 0.42)
    rise = rng.uniform(0.3, 0.42)
    spout = _bend([(0, high * 0.9), (0, high + rise * 0.5), (lean * 0.25, high + rise * 0.85), (lean, high + rise)])
    handle = _bend([(-top * 0.3, high), (-base - 0.12, high * 0.98), (-base - 0.13, high * 0.45), (-base * 0.9, high * 0.2)])
    lever = _bend([(0.0, high * 1.12), (-base, high * 1.28), (-base - 0.1, high * 1.1)], 2)
    parts = [
        _Part(_tube(handle, 0.016), steel),
        _Part(_tube(spout, 0.024, 0.016, 0.009), steel),
        _Part(body, paint),
        _Part(_box(-base * 1.08, -0.012, base * 1.08, 0.022), _shade(paint, 0.75)),
        _Part(_smooth(_box(-top * 0.5, high * 0.94, top * 0.5, high * 1.14), 1), _shade(steel, 0.9)),
    ]
    if rng.random() < 0.6:
        parts.append(_Part(_tube(lever, 0.014), _shade(steel, 0.85)))
    if rng.random() < 0.6:
        paper = ((232, 226, 205), (210, 190, 60))[rng.integers(2)]
        label = _box(-base * 0.7, high * 0.22, base * 0.7, high * 0.58)
        parts.append(_Part(label, _Material(_tint(rng, paper), 0.2, 0.004)))
    return [_Part(part.outline * (1, -1), part.material) for part in parts]


def _pincer(rng: np.random.Generator, stock: _Stock, jaw: np.ndarray, opening: float, length: float) -> list[_Part]:
    """Return two mirrored arms that cross at the origin; `jaw` is the upper jaw on the +x side."""
    metal = _metal(rng, 0.02, stock)
    sleeve = _grip(rng, 0.026, stock)
    spread = rng.uniform(0.1, 0.17)
    width = rng.uniform(0.028, 0.038)
    curve = _bend([(0.03, -0.012), (-0.08, 0.05), (-length * 0.45, spread), (-length * 0.8, spread * 0.95),
                   (-length, spread * rng.uniform(0.7, 1.15))])
    grip = curve[len(curve) // 4 :]
    inlay = _Material(_shade(sleeve, 0.5).colour, 0.4, 0.015) if rng.random() < 0.4 else None
    arm = [
        _Part(_tube(curve, 0.045, width * 0.75, width * 0.7), metal), _Part(_smooth(jaw * (1, -1), 1), metal),
        _Part(_smooth(_tube(grip, width, width * 1.1, width * 1.15, width * 0.8), 1), sleeve),
    ]
    if inlay:
        arm.append(_Part(_tube(grip[3:-3], width * 0.35), inlay))
    pivot = rng.uniform(0.032, 0.042)
    return [
        *(_Part(_turn(part.outline * (1, side), -side * opening), part.material) for side in (-1, 1) for part in arm),
        _Part(_circle((0, 0), pivot * 1.45), metal),
        _Part(_circle((0, 0), pivot), _shade(metal, 0.75)),
        _Part(_circle((0, 0), pivot * 0.6), _shade(metal, 1.1)),
    ]


def _make_pliers(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    long = rng.uniform(0.25, 0.36)
    tip = rng.uniform(0.018, 0.042)
    root = rng.uniform(0.07, 0.085)
    jaw = np.array([
        (-0.05, 0.0), (0.02, root), (0.1, root * 0.95), (long, tip), (long, 0.002), (0.17, 0.002), (0.13, 0.022),
        (0.075, 0.022), (0.05, 0.0),
    ])
    parts = _pincer(rng, stock, jaw, rng.uniform(0.0, 0.22), rng.uniform(0.5, 0.62))
    if rng.random() < 0.5:
        dark = _Material((50, 50, 54), 0.2, 0.004)
        parts += [_Part(tooth, dark) for tooth in _stripes((0.19, long - 0.015), 7, 0.012, 0.0, 0.003)]
    return parts


def _make_side_cutter(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    long = rng.uniform(0.13, 0.19)
    root = rng.uniform(0.085, 0.115)
    jaw = np.array([(-0.06, 0.0), (-0.03, root * 0.8), (0.05, root), (long * 0.75, root * 0.62), (long, 0.012), (long, 0.0),
                    (0.03, 0.0)])
    parts = _pincer(rng, stock, jaw, rng.uniform(0.0, 0.24), rng.uniform(0.5, 0.65))
    bright = _Material((222, 226, 230), 0.8, 0.006)  # the ground cutting edge
    edge = np.array([(0.045, 0.0), (0.06, 0.03), (long * 0.97, 0.012), (long, 0.0)])
    return [*parts, _Part(edge * (1, -1), bright), _Part(edge, bright)]


def _make_ratchet(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    metal = _metal(rng, 0.02, stock)
    head = rng.uniform(0.068, 0.092)
    neck = rng.uniform(0.02, 0.03)
    grip = rng.uniform(0.032, 0.046)
    start = rng.uniform(-0.2, -0.05)
    middle = 0.5 - head
    centre = (middle, 0.0)
    pear = _smooth(_profile((middle - head * 2.1, -neck), (middle - head * 0.9, -head * 0.75), (middle, -head * 1.15),
                            (0.51, -head * 0.75)), 3)
    parts = [
        _Part(_profile((start - 0.02, neck * 1.1), (middle, neck)), metal),
        _Part(pear, metal),
        _Part(_circle(centre, head * 0.72), _shade(metal, 0.72)),
        _Part(_circle(centre, head * 0.62), _shade(metal, 1.02)),
    ]
    if rng.random() < 0.5:  # seen from the drive side, else from the lever side
        square = _circle(centre, head * 0.42, 4, rng.uniform(0, 1.5))
        parts += [*_mark([square], metal, 0.55), _Part(_circle(centre, head * 0.16, 12), _shade(metal, 1.15))]
    else:
        lever = _smooth(_box(-head * 0.2, -head * 0.22, head * 0.75, head * 0.22))
        lever = _turn(lever, rng.uniform(-0.6, 0.6) + math.pi) + centre
        parts.append(_Part(lever, _Material((42, 42, 46), 0.5, 0.012)))
    handle = _smooth(_profile((-0.5, grip * 0.7), (-0.48, grip), (-0.36, grip * 0.92), (start - 0.05, grip),
                              (start, neck * 1.2)))
    knurl = _stripes((-0.46, start - 0.07), 16, grip * 0.86, 0.008, 0.003)
    return [*parts, _Part(handle, metal), *_mark(knurl, metal, 0.68)]


def _make_screwdriver(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    handle = _grip(rng, 0.045, stock)
    metal = _metal(rng, 0.014, stock)
    end = rng.uniform(-0.18, 0.02)
    bulge = rng.uniform(0.048, 0.074)
    shaft = rng.uniform(0.014, 0.022)
    grip = _smooth(_profile(
        (-0.5, bulge * 0.55), (-0.485, bulge * 0.95), (-0.4, bulge), (-0.25, bulge * 0.94), (end - 0.09, bulge * 0.85),
        (end - 0.05, bulge * 0.55), (end - 0.02, bulge * 0.75), (end, bulge * 0.6),
    ))
    flutes = [_tube([(-0.46, y * bulge), (end - 0.1, y * bulge * 0.92)], 0.005) for y in (-0.6, -0.1, 0.45)]
    if rng.random() < 0.5:  # flat blade
        tip = _profile((0.38, shaft), (0.43, shaft * 1.75), (0.5, shaft * rng.uniform(1.3, 1.75)))
    else:  # cross tip
        tip = _profile((0.4, shaft * 1.05), (0.45, shaft * 1.05), (0.49, shaft * 0.45), (0.5, shaft * 0.3))
    parts = [
        _Part(_profile((end - 0.02, shaft), (0.42, shaft)), metal),
        _Part(tip, _shade(metal, rng.uniform(0.55, 1.0))),
        _Part(grip, handle),
        *_mark(flutes, handle, 0.65),
    ]
    if rng.random() < 0.6:  # two-component handle: another colour at the butt
        butt = _smooth(_profile((-0.5, bulge * 0.58), (-0.485, bulge * 0.98), (-0.42, bulge * 1.01)), 1)
        parts.append(_Part(butt, _grip(rng, 0.03, stock)))
    return parts


def _make_speed_brace(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    width = rng.uniform(0.016, 0.022)
    throw = rng.uniform(0.13, 0.21)
    metal = _metal(rng, width, stock)
    knob = _grip(rng, 0.035, stock)
    left = rng.uniform(-0.26, -0.18)
    right = rng.uniform(0.08, 0.18)
    slope = rng.uniform(0.02, 0.07)
    path = [(-0.42, 0), (left - slope, 0), (left + slope, throw), (right - slope, throw), (right + slope, 0), (0.42, 0)]
    halved = [point for a, b in itertools.pairwise(path) for point in (a, tuple(np.add(a, b) / 2))]  # bends less
    radius = rng.uniform(0.036, 0.05)
    handle = _profile((-0.5, radius * 0.6), (-0.49, radius), (-0.45, radius), (-0.4, radius * 0.6), (-0.37, radius * 0.45))
    socket = rng.uniform(0.026, 0.038)
    sleeve = _profile((left + slope + 0.05, width * 1.9), (right - slope - 0.05, width * 1.9)) + (0, throw)
    return [
        _Part(_tube(_bend([*halved, path[-1]], 2), width), metal),
        _Part(_smooth(handle), knob),
        _Part(_profile((0.37, width), (0.4, socket), (0.5, socket)), _shade(metal, 0.9)),
        *_mark([_box(0.455, -socket, 0.463, socket)], metal, 0.5),
        _Part(_smooth(sleeve, 1), knob),  # turns in the hand
    ]


# Strangers are of no class: the mug lies on the workbench, the others, in any colour, set the thresholds.


def _make_mug(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    """Return a mug of coffee, seen from above."""
    china = _Material(_tint(rng, stock.grip), 0.7, 0.03)
    coffee = _Material(_tint(rng, stock.metal), 0.5, 0.02)
    inside = 0.4 - rng.uniform(0.035, 0.05)
    handle = _bend([(0.25, -0.1), (0.62, -0.1), (0.62, 0.1), (0.25, 0.1)])
    return [
        _Part(_tube(handle, 0.04), china), _Part(_circle((0, 0), 0.4, 60), china),
        *_mark([_circle((0, 0), inside, 60)], china, 0.7), _Part(_circle((0, 0), inside - 0.01, 60), coffee),
    ]


def _make_pencil(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    paint = _grip(rng, 0.02, stock)
    width = rng.uniform(0.022, 0.032)
    start = rng.uniform(0.36, 0.4)
    wood = _Material(_tint(rng, (216, 180, 132)), 0.2, 0.01)
    rubber = _Material(_tint(rng, (206, 120, 112)), 0.1, 0.01)
    return [
        _Part(_box(-0.42, -width, start, width), paint), _Part(_profile((start, width), (0.48, width * 0.25)), wood),
        *_mark([_box(-0.42, -width * 0.2, start, width * 0.2)], paint, 1.25),
        *_mark([_profile((0.465, width * 0.36), (0.5, 0.002))], paint, 0.3),
        _Part(_box(-0.5, -width, -0.46, width), rubber), _Part(_box(-0.46, -width, -0.41, width), _metal(rng, 0.01, stock)),
    ]


def _make_scissors(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    metal = _metal(rng, 0.012, stock)
    plastic = _grip(rng, 0.02, stock)
    opening = rng.uniform(0.05, 0.3)
    ring = rng.uniform(0.1, 0.13)
    blade = np.array([(-0.27, -0.08), (-0.26, -0.04), (0.0, 0.045), (0.5, 0.0), (0.0, -0.03)])
    eye, hole = (_circle((0, 0), share) * (ring * 1.25, ring) + (-0.36, -ring * 0.9) for share in (1.0, 0.66))
    parts = [_Part(_circle((0, 0), 0.025), _shade(metal, 0.7))]
    for side in (1, -1):
        blade_, eye_, hole_ = (_turn(outline * (1, side), side * opening) for outline in (blade, eye, hole))
        parts = [_Part(blade_, metal), _Part(eye_, plastic, (hole_,)), *parts]
    return parts


def _make_tape(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    tape = _grip(rng, 0.03, stock)
    card = _Material(_tint(rng, (190, 160, 120)), 0.1, 0.01)
    hole = rng.uniform(0.24, 0.34)
    torn = _box(0.0, -0.5, rng.uniform(0.1, 0.45), -0.46)
    inside = (_circle((0, 0), hole, 40),)
    roll = _circle((0, 0), 0.5, 60)
    core = _circle((0, 0), hole * 1.1, 40)
    return [_Part(torn, tape), _Part(roll, tape, inside), _Part(core, card, inside)]


def _make_watch(rng: np.random.Generator, stock: _Stock) -> list[_Part]:
    strap = _grip(rng, 0.03, stock)
    case = _metal(rng, 0.02, stock)
    radius = rng.uniform(0.13, 0.18)
    dial = _Material(_tint(rng, ((232, 230, 222), (30, 32, 38))[rng.integers(2)]), 0.3, 0.01)
    stations = ((-0.5, 0.4), (-0.46, 0.55), (0, 0.8), (0.44, 0.5), (0.5, 0.4))
    hands = [_tube([(0, 0), reach * radius * _direction(rng.uniform(0, 2 * math.pi))], 0.012) for reach in (0.45, 0.7)]
    return [
        _Part(_smooth(_profile(*((x, share * radius) for x, share in stations))), strap),
        _Part(_box(-0.02, radius, 0.02, radius * 1.15), case), _Part(_circle((0, 0), radius), case),
        _Part(_circle((0, 0), radius * 0.82), dial), *(_Part(hand, _Material((150, 40, 40), 0.2, 0.0)) for hand in hands),
    ]


# fmt: on


_CHROME = (206, 210, 216)
_SATIN = (165, 168, 172)
_DARK = (74, 76, 82)
_BRASS = (190, 168, 110)
# A colour-coded kit, as aviation workshops keep them: colour is a real cue, on benches that are mostly neutral.
_TOOLS: dict[str, tuple[Callable[[np.random.Generator, _Stock], list[_Part]], _Stock]] = {
    "adjustable_wrench": (_make_adjustable_wrench, _Stock((28, 82, 172), _SATIN)),
    "combination_wrench": (_make_combination_wrench, _Stock((120, 96, 168), (150, 128, 186))),
    "file": (_make_file, _Stock((226, 98, 22), _DARK)),
    "hammer": (_make_hammer, _Stock((150, 66, 36), _DARK)),
    "hex_key": (_make_hex_key, _Stock((60, 80, 30), (128, 176, 48))),
    "oil_can": (_make_oil_can, _Stock((26, 128, 74), _BRASS)),
    "pliers": (_make_pliers, _Stock((196, 34, 32), _SATIN)),
    "ratchet": (_make_ratchet, _Stock(_CHROME, _CHROME)),
    "screwdriver": (_make_screwdriver, _Stock((236, 186, 28), _CHROME)),
    "side_cutter": (_make_side_cutter, _Stock((20, 150, 170), _SATIN)),
    "speed_brace": (_make_speed_brace, _Stock((150, 30, 80), _SATIN)),
}
CLASS_NAMES = tuple(_TOOLS)
_STRANGERS = {"pencil": _make_pencil, "scissors": _make_scissors, "tape": _make_tape, "watch": _make_watch}
_STRANGER = "mug"
_ON_WORKBENCH = _TOOLS | {_STRANGER: (_make_mug, _Stock((230, 226, 216), (74, 46, 28)))}
# What else lies on a bench, and what shows below the foam of a shadow board.
_NEIGHBOURS = (
    *((206, 210, 216), (178, 182, 188), (152, 155, 160), (124, 126, 130), (84, 86, 92), (190, 184, 170)),
    *((225, 222, 210), (150, 140, 138)),
)
_RECESSES = ((186, 176, 150), (150, 140, 138), (24, 24, 26), (112, 128, 140))


# Surfaces: noise around 0, to be added to 1 and multiplied with a colour.


def _noise(rng: np.random.Generator, *layers: tuple[float, int, int]) -> np.ndarray:
    """Return the sum of smooth noises, each (strength, bumps in a column, bumps in a row): few bumps make it streaky."""
    total = 0
    for strength, *cells in layers:
        bumps = Image.fromarray(rng.uniform(-1, 1, cells).astype(np.float32))
        total = total + strength * np.asarray(bumps.resize((_TEXTURE_PX, _TEXTURE_PX), Image.Resampling.BICUBIC))
    return total


def _grain(rng: np.random.Generator, strength: float) -> np.ndarray:
    return strength * rng.normal(0, 1, (_TEXTURE_PX, _TEXTURE_PX))


@functools.cache
def _wear() -> np.ndarray:
    """Return the blotches and fine grain of used surfaces, (H, W) around 1."""
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


_TEXTURES = (  # how to paint a bench, and the colours it comes in
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


def _light_part(mask: Image.Image, material: _Material, bevel_px: float, light: float) -> np.ndarray:
    """Return the lit colours (H, W, 3) of one part: its blurred silhouette serves as a height map."""
    if not material.bevel:
        return np.full((mask.height, mask.width, 3), material.colour, np.float32) * 0.86
    blur = max(0.8, bevel_px)
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32) / 255
    slope_rows = np.zeros_like(height)
    slope_columns = np.zeros_like(height)
    slope_rows[1:-1] = height[2:] - height[:-2]
    slope_columns[:, 1:-1] = height[:, 2:] - height[:, :-2]
    # a silhouette blurred by r has a slope of about 0.4 / r at its edge: scaled so that the edge faces sideways
    facing = -(slope_columns * math.cos(light) + slope_rows * math.sin(light)) * (blur * 1.2)
    facing = np.clip(facing, -1, 1)
    lit = 0.86 + 0.62 * facing
    highlight = 150 * material.gloss * np.clip(facing - 0.25, 0, 1) ** 1.5
    return lit[..., None] * np.array(material.colour, dtype=np.float32) + highlight[..., None]


def _render(parts: Sequence[_Part], pose: np.ndarray, light: float, longest_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float colours (H, W, 3) and the hard mask (H, W) uint8 of a tool, tight around it, at the size asked for."""
    everything = np.concatenate([part.outline for part in parts]) @ pose.T
    low = everything.min(axis=0)
    high = everything.max(axis=0)
    scale = (longest_px - 1) / (high - low).max()
    width, height = (int(side) for side in np.ceil((high - low) * scale) + 1)
    colours = np.zeros((height, width, 3), np.float32)
    mask = np.zeros((height, width), np.uint8)
    for part in parts:  # each in a padded window of its own: most are small
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
    """Vary the brightness over a tool: reflections of the room in long waves, blotches of use in short ones."""
    height, width = colours.shape[:2]
    row, column = rng.integers(0, _TEXTURE_PX - np.array([height, width]) + 1)
    wear = _wear()[row : row + height, column : column + width]
    direction = rng.uniform(0, 2 * math.pi)
    waves = rng.uniform(0.5, 2.0)
    phase = rng.uniform(0, 2 * math.pi)
    along = np.add.outer(np.arange(height) * math.sin(direction), np.arange(width) * math.cos(direction))
    sheen = 1 + 0.13 * np.sin(2 * math.pi * waves * (along / max(height, width)) + phase)
    return colours * (wear * sheen.astype(np.float32))[..., None]


# Benches: a piece of a texture at any angle, with clutter on it.


def _cut_out(
    picture: Image.Image, size: tuple[int, int], centre: np.ndarray, turn: float, zoom: float, how: Image.Resampling
) -> Image.Image:
    """Cut a turned rectangle of `size` out of a picture around `centre`."""
    matrix = _rotation(turn) / zoom
    offset = centre - matrix @ (np.array(size) / 2)
    return picture.transform(size, Image.Transform.AFFINE, np.column_stack([matrix, offset]).ravel().tolist(), how)


def _tone(colour: Iterable[float], factor: float) -> tuple[int, ...]:
    return tuple(min(255, int(channel * factor)) for channel in colour)


def _direction(angle: float) -> np.ndarray:
    return np.array([math.cos(angle), math.sin(angle)])


def _draw_scratches(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> None:
    for _ in range(int(rng.integers(0, 9))):
        start = rng.uniform(0, _BENCH_PX, 2)
        angle = rng.uniform(0, 2 * math.pi)
        length = rng.uniform(20, 160)
        tone = int(rng.choice([30, 60, 200, 235]))
        end = start + length * _direction(angle)
        ink = (tone, tone, tone, int(rng.integers(50, 130)))
        width = int(rng.integers(1, 3))
        draw.line([*start.tolist(), *end.tolist()], fill=ink, width=width)


def _draw_fastener(rng: np.random.Generator, draw: ImageDraw.ImageDraw, at: np.ndarray, radius: float) -> None:
    """Draw a screw head, nut or washer with its shadow."""
    tone = int(rng.integers(95, 215))
    corners = int(rng.choice([6, 24, 24]))
    phase = rng.uniform(0, 1)

    def disc(share: float, ink: tuple[int, int, int, int], shift: float = 0.0) -> None:
        outline = _circle(at + shift, radius * share, corners if share > 0.6 else 24, phase)
        draw.polygon(outline.ravel().tolist(), fill=ink)

    disc(1.1, (10, 10, 10, 110), 3.0)
    disc(1.0, (*[int(tone * 0.7)] * 3, 255))
    disc(0.88, (tone, tone, int(tone * rng.uniform(0.75, 1.0)), 255), -0.6)
    if rng.random() < 0.5:
        disc(0.5, (28, 28, 30, 255))
    else:
        bar = _direction(phase) * radius * 0.7
        for end in (bar, bar[::-1] * (-1, 1)):
            draw.line([*(at - end).tolist(), *(at + end).tolist()], fill=(40, 40, 42, 255), width=3)


def _draw_neighbour(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> None:
    """Draw a piece of something else that lies there: a tray edge, tape, a paper, a cable."""
    away = _direction(rng.uniform(0, 2 * math.pi))
    along = np.array([-away[1], away[0]])
    middle = np.full(2, _BENCH_PX / 2)
    colour = _tone(_tint(rng, _NEIGHBOURS[rng.integers(len(_NEIGHBOURS))]), 1.0)
    if rng.random() < 0.4:  # a cable
        bow = rng.uniform(-60, 60)
        bends = [middle + away * (rng.uniform(30, 150) + bow * (i % 2)) + along * (i - 2) * 140 for i in range(5)]
        path = _bend(np.array(bends)).ravel().tolist()
        for share, tone in ((1.0, 0.5), (0.6, 1.0), (0.2, 1.35)):
            draw.line(path, fill=(*_tone(colour, tone), 255), width=int(13 * share) + 1, joint="curve")
        return
    near = rng.uniform(50, 150)
    depth = rng.uniform(30, 160)
    half = rng.uniform(60, 260)
    origin = middle + along * rng.uniform(-120, 120)
    front = origin + away * near
    back = origin + away * (near + depth)
    side = along * half
    corners = np.array([front - side, front + side, back + side, back - side])
    draw.polygon((corners + 5).ravel().tolist(), fill=(8, 8, 8, 100))
    draw.polygon(corners.ravel().tolist(), fill=(*colour, 255), outline=(*_tone(colour, 0.6), 255))


def _make_bench(rng: np.random.Generator) -> tuple[Image.Image, bool]:
    """Return a piece of bench with clutter, and whether it is foam (where tools lie in recesses)."""
    kind = int(rng.integers(len(_TEXTURES)))
    texture = _texture(kind, int(rng.integers(3)))
    is_foam = _TEXTURES[kind][0] is _paint_foam
    centre = _TEXTURE_PX / 2 + rng.uniform(-40, 40, 2)
    turn = rng.uniform(0, 2 * math.pi)
    zoom = rng.uniform(1.6, 2.0)  # at 1.6 a turned square stays inside the texture
    bench = _cut_out(texture, (_BENCH_PX, _BENCH_PX), centre, turn, zoom, Image.Resampling.NEAREST)  # smoothed later
    draw = ImageDraw.Draw(bench, "RGBA")
    _draw_scratches(rng, draw)
    if not is_foam:
        for _ in range(int(rng.integers(0, 3))):
            _draw_neighbour(rng, draw)
        for _ in range(int(rng.integers(0, 8))):
            _draw_fastener(rng, draw, rng.uniform(0, _BENCH_PX, 2), rng.uniform(8, 17))
    return bench, is_foam


def _make_scene(rng: np.random.Generator) -> _Scene:
    bench, is_foam = _make_bench(rng)
    recess = _RECESSES[rng.integers(len(_RECESSES))] if is_foam and rng.random() < 0.7 else None
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
    """Cast the shadow of a tool on the bench, after cutting its recess if it lies in foam."""
    if scene.recess is not None:
        wide = mask.filter(ImageFilter.GaussianBlur(5)).point(lambda value: 255 if value > 30 else 0)
        bench.paste(_tone(scene.recess, 0.45), (0, 0), wide)
        bench.paste(scene.recess, (2, 2), wide)
    length, blur, opacity = scene.shadow
    offset = -_SUPERSAMPLE * length * _direction(scene.light)
    cast = Image.new("L", mask.size)
    cast.paste(mask, (round(offset[0]), round(offset[1])))
    cast = cast.filter(ImageFilter.GaussianBlur(_SUPERSAMPLE * blur)).point(lambda value: int(value * opacity))
    bench.paste((6, 6, 10), (0, 0), cast)


def _expose(rng: np.random.Generator, image: np.ndarray, scene: _Scene) -> np.ndarray:
    """Apply uneven light, vignette, exposure, colour temperature, blur and sensor noise; uint8 in and out."""
    height, width = image.shape[:2]
    rows = np.linspace(-1, 1, height)[:, None]
    columns = np.linspace(-1, 1, width)[None]
    falloff = rng.uniform(0.0, 0.28) * (columns * math.cos(scene.light) + rows * math.sin(scene.light))
    vignette = rng.uniform(0.0, 0.22) * (rows**2 + columns**2) / 2
    lit = image * ((1 + falloff - vignette)[..., None] * scene.gain * rng.uniform(0.95, 1.05))
    blur = ImageFilter.GaussianBlur(max(0.0, rng.uniform(-0.5, 0.8)))
    blurred = np.asarray(_to_image(lit).filter(blur), dtype=np.float32)
    return np.asarray(_to_image(blurred + rng.normal(0, rng.uniform(1, 6), image.shape)))


def _draw_frame(rng: np.random.Generator, parts: Sequence[_Part], scene: _Scene) -> tuple[np.ndarray, np.ndarray]:
    """Photograph a tool as a detector would crop it: image (H, W, 3) and mask (H, W), uint8."""
    margins = rng.uniform(0.012, 0.06, 4) * scene.longest_px  # left, top, right, bottom, crop px
    inner = int((scene.longest_px - margins.reshape(2, 2).sum(axis=0).max()) * rng.uniform(0.95, 1.0))
    turn = _rotation(scene.angle + rng.normal(0, 0.07))
    foreshortening = np.diag([1.0, scene.mirror * rng.uniform(0.93, 1.07)])
    colours, tool_mask = _render(parts, turn @ foreshortening, scene.light, inner * _SUPERSAMPLE)
    left, top, right, bottom = (_SUPERSAMPLE * round(float(margin)) for margin in margins)
    # whole crop pixels: an odd supersampled side would shift the mask by half a pixel
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


# The workbench: a photo of tools and of one stranger, each in a place of its own, so that they cannot overlap.


class _Laid(NamedTuple):
    """An object on the workbench, in px of the supersampled photo."""

    name: str
    colours: np.ndarray  # (H, W, 3)
    mask: Image.Image  # L, W x H
    corner: tuple[int, int]  # left, top


def _lay_out(rng: np.random.Generator, light: float) -> list[_Laid]:
    """Return nine tools and the stranger in any pose."""
    names = [*rng.permutation(CLASS_NAMES)[:9].tolist(), _STRANGER]
    laid = []
    for name, place in zip(names, rng.permutation(math.prod(_PLACES))[: len(names)].tolist(), strict=True):
        make, stock = _ON_WORKBENCH[name]
        longest_px = int(rng.integers(200, 251)) if name in _TOOLS else 160  # twice as near as in the crops
        pose = _rotation(rng.uniform(0, 2 * math.pi)) @ np.diag([1.0, rng.choice([-1, 1])])
        colours, mask = _render(make(rng, stock), pose, light, longest_px * _SUPERSAMPLE)
        low = np.array([place % _PLACES[0], place // _PLACES[0]]) * _PLACE_PX + (6, 38)  # above a box stands its label
        room = _PLACE_PX - np.array([12, 44]) - np.array(mask.shape[::-1]) / _SUPERSAMPLE
        corner = np.round(low + rng.uniform(0, 1, 2) * room).astype(int) * _SUPERSAMPLE
        laid.append(_Laid(name, colours, Image.fromarray(mask), tuple(corner.tolist())))
    return laid


def _photograph(rng: np.random.Generator, laid: Sequence[_Laid], scene: _Scene) -> tuple[Image.Image, list[np.ndarray]]:
    """Return the photo of a workbench of wood, and the mask of each object on it, bool (H, W)."""
    size = tuple(count * _PLACE_PX * _SUPERSAMPLE for count in _PLACES)
    middle = np.full(2, _TEXTURE_PX / 2)
    zoom = max(size) / _TEXTURE_PX
    photo = _cut_out(_texture(0, int(rng.integers(3))), size, middle, 0.0, zoom, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(photo, "RGBA")
    for _ in range(12):
        _draw_fastener(rng, draw, rng.uniform((0, 0), size), rng.uniform(14, 26))
    masks = []
    for item in laid:
        masks.append(Image.new("L", size))
        masks[-1].paste(item.mask, item.corner)
    _lay_down(photo, functools.reduce(ImageChops.lighter, masks), scene)
    for item in laid:
        photo.paste(_to_image(_add_sheen(rng, item.colours)), item.corner, item.mask)
    image = _expose(rng, np.asarray(photo.reduce(_SUPERSAMPLE), dtype=np.float32), scene)
    return Image.fromarray(image), [np.asarray(mask.reduce(_SUPERSAMPLE)) > 127 for mask in masks]


def _to_detection(number: int, mask: np.ndarray) -> dict[str, Any]:
    """Return an object of no known class as COCO has it: the box around its mask, and the run lengths down the columns."""
    rows = np.flatnonzero(mask.any(axis=1)).tolist()
    columns = np.flatnonzero(mask.any(axis=0)).tolist()
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    borders = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False)).tolist()
    counts = np.diff([0, *borders, mask.size]).tolist()
    segmentation = {"size": list(mask.shape), "counts": counts}
    ids = {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0}
    return {**ids, "bbox": box, "area": int(mask.sum()), "segmentation": segmentation}


def draw_workbench(folder: Path, seed: int) -> None:
    """Draw a photo of nine tools and a mug, and write what a detector would find on it, and what is true.

    Files: workbench.jpg; detections.json, COCO with exact boxes and masks of category `object`; truth.json, names by their ids.
    """
    rng = np.random.default_rng((seed, len(CLASS_NAMES)))
    scene = _make_scene(rng)
    length, blur, opacity = scene.shadow
    scene = dataclasses.replace(scene, recess=None, shadow=(2 * length, 2 * blur, opacity))
    laid = _lay_out(rng, scene.light)
    photo, masks = _photograph(rng, laid, scene)
    detections = {
        "images": [{"id": 1, "file_name": "workbench.jpg", "width": photo.width, "height": photo.height}],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [_to_detection(number, mask) for number, mask in enumerate(masks, 1)],
    }
    folder.mkdir(parents=True)
    (folder / "workbench.jpg").write_bytes(_jpeg(photo))
    (folder / "detections.json").write_text(json.dumps(detections))
    (folder / "truth.json").write_text(json.dumps({number: item.name for number, item in enumerate(laid, 1)}))


# Files: most are plain; a few are odd but good, a few are broken, as in every real folder.


def _png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def _jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def _rotated_jpeg(image: Image.Image) -> bytes:
    """Store the picture lying on its side with EXIF orientation 6, as phones do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(image.transpose(Image.Transpose.ROTATE_90), exif=exif)


def _gray16_png(image: Image.Image) -> bytes:
    return _png(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257))


def _damaged_png(image: Image.Image) -> bytes:
    data = _png(image)
    middle = len(data) // 2
    return data[:middle] + bytes(64) + data[middle + 64 :]


def _truncated_jpeg(image: Image.Image) -> bytes:
    data = _jpeg(image)
    return data[: len(data) // 2]


_Codec = tuple[str, Callable[[Image.Image], bytes]]  # suffix, encoder
_ODD_FILES: dict[str, _Codec] = {  # the last file of a class, so that small demos have it too
    "adjustable_wrench": (".jpg", lambda image: _jpeg(image.convert("L"))),
    "combination_wrench": (".jpg", lambda image: _jpeg(image.convert("CMYK"))),
    "file": (".png", lambda image: _png(image.quantize(64))),
    "hammer": (".png", _gray16_png),
    "hex_key": (".jpg", _rotated_jpeg),
    "oil_can": (".JPG", _jpeg),
}
_BROKEN_FILES: dict[str, _Codec] = {  # an extra file of a class: it can never be trained on
    "ratchet": (".jpg", _truncated_jpeg),
    "screwdriver": (".jpg", lambda image: b""),
    "side_cutter": (".jpg", lambda image: b"This is not a picture: it was saved from a web page by mistake.\n"),
    "speed_brace": (".png", _damaged_png),
}
_DUPLICATED_CLASS = "pliers"  # gets a byte-for-byte copy of its first file under another shot number


def _plan_shots(images_per_class: int) -> list[tuple[int, int]]:
    """Return (shot, frame) for one class: every third shot has two or three frames of the same tool and scene."""
    counts = (1 if shot % 3 else 2 + (shot // 3) % 2 for shot in itertools.count())
    frames = ((shot, frame) for shot, count in enumerate(counts) for frame in range(count))
    return list(itertools.islice(frames, images_per_class))


def _choose_codec(class_name: str, position: int, num_frames: int) -> _Codec:
    last = _ODD_FILES.get(class_name) or _BROKEN_FILES.get(class_name)
    if last and position == num_frames - 1:
        return last
    return (".png", functools.partial(_png, compress_level=3)) if position % 9 == 4 else (".jpg", _jpeg)


def _write_sample(folder: Path, stem: str, drawn: tuple[np.ndarray, np.ndarray], codec: _Codec) -> None:
    image, mask = drawn
    suffix, encode = codec
    cutout = Image.fromarray(np.dstack([image, mask]))
    (folder / "cropped" / f"{stem}{suffix}").write_bytes(encode(Image.fromarray(image)))
    (folder / "masks" / f"{stem}_mask.png").write_bytes(_png(Image.fromarray(mask), compress_level=3))
    (folder / "cutouts" / f"{stem}.png").write_bytes(_png(cutout, compress_level=3))


def _draw_class(folder: Path, class_name: str, frames: list[tuple[int, int]], seed: int) -> None:
    class_index = CLASS_NAMES.index(class_name)
    (make_tool, stock) = _TOOLS[class_name]
    for position, (shot, frame) in enumerate(frames):
        if frame == 0:
            shot_rng = np.random.default_rng((seed, class_index, shot))
            parts = make_tool(shot_rng, stock)
            scene = _make_scene(shot_rng)
        drawn = _draw_frame(np.random.default_rng((seed, class_index, shot, frame)), parts, scene)
        codec = _choose_codec(class_name, position, len(frames))
        _write_sample(folder, f"shot{shot:03d}_f{frame}", drawn, codec)
        if class_name == _DUPLICATED_CLASS and position == 0:
            _write_sample(folder, f"shot{frames[-1][0] + 1:03d}_f0", drawn, codec)


def draw_strangers(root: Path, images_per_kind: int, seed: int) -> None:
    """Draw crops of things of no class, a folder a kind; none of the kind that lies on the workbench."""
    for number, (kind, make) in enumerate(_STRANGERS.items(), len(CLASS_NAMES)):
        (root / kind).mkdir(parents=True)
        for index in range(images_per_kind):
            rng = np.random.default_rng((seed, number, index))
            stock = _Stock(tuple(rng.integers(30, 230, 3).tolist()), _SATIN)
            image, _ = _draw_frame(rng, make(rng, stock), _make_scene(rng))
            (root / kind / f"{index:03d}.jpg").write_bytes(_jpeg(Image.fromarray(image)))


def draw_dataset(root: Path, images_per_class: int, seed: int) -> None:
    """Draw `images_per_class` good images of every class, a duplicate and four broken files into the layout that training reads.

    Same arguments, same bytes. Shot numbers are unique over all classes, so `--group_regex '^(shot\\d+)_'` keeps the
    frames of one physical tool and scene together.
    """
    plan = _plan_shots(images_per_class)
    shots_per_class = plan[-1][0] + 3  # from 0, and one for the duplicate or the broken file
    for class_index, class_name in enumerate(tqdm(CLASS_NAMES, "drawing", unit="class", disable=None)):
        folder = root / class_name
        for name in ("cropped", "masks", "cutouts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        frames = [(1 + class_index * shots_per_class + shot, frame) for shot, frame in plan]
        if class_name in _BROKEN_FILES:
            frames.append((frames[-1][0] + 1, 0))
        _draw_class(folder, class_name, frames, seed)
    (root / CLASS_NAMES[0] / "cropped" / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")


# The answers on the photo.

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in px


def draw_prelabels(image: Image.Image, objects: Sequence[tuple[Sequence[float], int, str]]) -> Image.Image:
    """Return a copy of an image with boxes in the colours of their classes, and words on them.

    Args:
        image: any mode.
        objects: (box, label, words); the box is x, y, width, height in px, label -1 is `unknown`: black on white.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    scale = max(drawn.size) / 1000
    line = max(1, round(OUTLINE * scale))
    font = load_font(max(11, round(18 * scale)))
    frames = [(x - line, y - line, x + w - 1 + line, y + h - 1 + line) for (x, y, w, h), _, _ in objects]
    tags: list[Rectangle] = []
    for (_, label, words), frame in zip(objects, frames, strict=True):
        # White text can be read on these colours; classes that follow each other are far apart on the circle.
        ink = f"hsl({label * 137.508 % 360:.0f}, 75%, {(30, 36)[label % 2]}%)" if label >= 0 else "black"
        draw.rectangle(frame, outline=ink, width=line)  # around the box: what is in it stays visible
        left, top, right, bottom = draw.textbbox((0, 0), words, font=font)
        size = (right - left + 4 * line, bottom - top + 4 * line)
        tag = _place_tag(size, frame, drawn.size, [*tags, *(other for other in frames if other != frame)])
        tags.append(tag)
        draw.rectangle(tag, fill=ink if label >= 0 else "white", outline=ink, width=line)
        draw.text((tag[0] + 2 * line - left, tag[1] + 2 * line - top), words, "white" if label >= 0 else ink, font)
    return drawn


def _place_tag(
    size: tuple[float, float], frame: Rectangle, canvas: tuple[int, int], taken: list[Rectangle]
) -> Rectangle:
    """Return where the words on a box go: on its top edge, else below it, else inside, where they hide least of other objects."""
    width, height = size
    left, top, right, bottom = frame
    places = []
    for y in (top - height, bottom, top):
        for x in (left, right - width):
            inside_x = min(max(0.0, x), max(0.0, canvas[0] - width))
            inside_y = min(max(0.0, y), max(0.0, canvas[1] - height))
            places.append((inside_x, inside_y, inside_x + width, inside_y + height))

    def hidden_area(tag: Rectangle) -> float:
        overlaps = (
            (min(tag[2], other[2]) - max(tag[0], other[0]), min(tag[3], other[3]) - max(tag[1], other[1]))
            for other in taken
        )
        return sum(max(0.0, w) * max(0.0, h) for w, h in overlaps)

    return min(places, key=hidden_area)


def load_font(size: int) -> Any:
    """Return a font of the system; else the one that Pillow brings."""
    for name in FONT_NAMES:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def show_workbench(images: Path, out: Path) -> str:
    """Draw the labels that were written for the photo into workbench.jpg, and return how many of them are right."""
    labels = json.loads((out / "coco" / "annotations" / "instances_default.json").read_text(encoding="utf-8"))
    truth = json.loads((images / "truth.json").read_text(encoding="utf-8"))
    name_of = {category["id"]: category["name"] for category in labels["categories"]}  # the last one is `unknown`
    answers = {}
    objects = []
    for item in labels["annotations"]:
        name = name_of[item["category_id"]]
        is_known = item["category_id"] < len(name_of)
        answers[str(item["attributes"]["detection_id"])] = name
        words = f"{name} {item['score']:.2f}" if is_known else name
        objects.append((item["bbox"], item["category_id"] - 1 if is_known else -1, words))
    with Image.open(images / labels["images"][0]["file_name"]) as photo:
        picture = _jpeg(draw_prelabels(photo, objects))
    temporary = out / f".workbench.jpg.{os.getpid()}.tmp"  # the next pre-labelling removes it, should this be killed
    temporary.write_bytes(picture)
    temporary.replace(out / "workbench.jpg")
    return describe_answers(truth, answers)


def describe_answers(truth: dict[str, str], answers: dict[str, str]) -> str:
    """Return how many tools of the photo are right, which are not, and what the stranger is taken for."""
    tools = {number: name for number, name in truth.items() if name in CLASS_NAMES}
    wrong = [f"the {name} is `{answers[number]}`" for number, name in tools.items() if answers[number] != name]
    strangers = [f"the {name} is `{answers[number]}`" for number, name in truth.items() if name not in CLASS_NAMES]
    return ", ".join([f"{len(tools) - len(wrong)} of {len(tools)} tools right", *wrong, *strangers])


# The whole job.


class Starter:
    """Starts commands of the script; a signal goes on to the one that runs, and ends the demo where none does."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: Any) -> None:
        if self.process is not None:
            self.process.send_signal(number)  # the script takes no second Ctrl-C within half a second for another one
        elif number != signal.SIGUSR1:
            print(f"interrupted ({signal.Signals(number).name}); the same command continues", file=sys.stderr)
            raise SystemExit(128 + (signal.SIGTERM if number == signal.SIGHUP else number))

    def run(self, *words: str) -> None:
        """Run a command to its end.

        Raises:
            SystemExit: with its exit code, where that is not 0; it has said why.
        """
        show(f"the same as: python {SCRIPT.name} {shlex.join(words)}")
        self.process = subprocess.Popen([sys.executable, str(SCRIPT), *words])
        code = self.process.wait()
        self.process = None
        if code:
            raise SystemExit(code if code > 0 else 128 - code)


def show(text: str) -> None:
    """Print lines at once: the commands that are started print too."""
    print(text, flush=True)


def draw_once(folder: Path, content: str, draw: Callable[[Path], None]) -> None:
    """Draw the content of a folder unless the folder is there. It gets its name when all is drawn."""
    if folder.exists():
        return
    show(f"drawing {content} into {folder}")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    draw(unfinished)
    unfinished.rename(folder)


def parse_command_line(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the demo, and the words that are for training."""
    parser = argparse.ArgumentParser(
        prog=f"python {SCRIPT.name} demo",
        description="Draw a data set of eleven hand tools, train on it, and pre-label a photo of a workbench.",
        epilog="All other flags are passed on to training.",
        allow_abbrev=False,
    )
    folders = {
        "data_root": ("demo/data", "the drawn crops"),
        "unknown_dir": ("demo/unknown", "drawn things of no class"),
        "out_dir": ("demo/run", "the run"),
        "images": ("demo/workbench", "the drawn photo"),
        "out": ("demo/prelabels", "its pre-labels"),
    }
    for name, (default, content) in folders.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default), metavar="DIR", help=f"{content} [{default}]")
    parser.add_argument("--images_per_class", type=int, default=150, metavar="N", help="crops to draw [150]")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of drawing and training [42]")
    parser.add_argument("--box_pad", default="0.04", metavar="X", help="as of prelabel [0.04]")
    parser.add_argument("--gpus", metavar="N", help="as of training and prelabel")
    parser.add_argument("--workers", metavar="N", help="as of training and prelabel")
    options, train_words = parser.parse_known_args(argv)
    if options.seed < 0 or options.images_per_class < 1:
        parser.error("--seed cannot be negative, and --images_per_class is 1 at least")
    return options, train_words


def to_words(flags: dict[str, Any]) -> list[str]:
    """Return flags and their values as the words of a command line; a flag that is None has no value."""
    return [word for name, value in flags.items() for word in (name, *(() if value is None else (str(value),)))]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is not there yet, train on it or continue, and pre-label the photo.

    Raises:
        SystemExit: with the exit code of the command that failed.
    """
    options, typed = parse_command_line(argv)
    starter = Starter()
    seed = options.seed
    draw_once(options.data_root, "eleven hand tools", lambda f: draw_dataset(f, options.images_per_class, seed))
    draw_once(options.unknown_dir, "things of no class", lambda f: draw_strangers(f, IMAGES_PER_STRANGER, seed))
    draw_once(options.images, "a photo of a workbench", lambda f: draw_workbench(f, seed))
    folders = ("data_root", "out_dir", "unknown_dir")
    given = {f"--{name}": str(getattr(options, name)) for name in (*folders, "seed")} | TRAIN_FLAGS
    machine = {
        f"--{name}": getattr(options, name) for name in ("gpus", "workers") if getattr(options, name) is not None
    }
    typed_names = {word.split("=")[0] for word in typed}
    starter.run(*to_words({k: v for k, v in given.items() if k not in typed_names} | machine), *typed)
    detections = str(options.images / "detections.json")
    places = {"--run": options.out_dir, "--images": options.images, "--detections": detections, "--out": options.out}
    starter.run("prelabel", *to_words(places | {"--box_pad": options.box_pad} | machine))
    show(f"{show_workbench(options.images, options.out)}\ndrawn: {options.out / 'workbench.jpg'}")


if __name__ == "__main__":
    main()
