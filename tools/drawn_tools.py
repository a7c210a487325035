"""The hand tools of the demo and some unknown objects, as polygons with materials. Not a program: demo.py draws them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stock:
    """The RGB colours that one class has in the kit."""

    grip: tuple[int, int, int]
    metal: tuple[int, int, int]


@dataclass(frozen=True)
class Material:
    """The surface of a part."""

    colour: tuple[float, float, float]  # RGB, 0..255
    gloss: float  # strength of highlights, 0 = chalk, 1 = chrome
    bevel: float  # width of the rounded edge in tool lengths; half the width of the part makes a rod, 0 a flat mark


@dataclass(frozen=True)
class Part:
    """One piece of a tool."""

    outline: np.ndarray  # (N, 2) in tool lengths, x along the tool
    material: Material
    holes: tuple[np.ndarray, ...] = ()  # cut out of this part only; may reach beyond its outline to form a jaw


# Shapes, in tool lengths, x along the tool.


def circle(centre: tuple[float, float], radius: float, corners: int = 30, phase: float = 0.0) -> np.ndarray:
    """Return the corners (N, 2) of a regular polygon, by default nearly a circle; `phase` in radians turns it."""
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


def bend(points: Sequence[tuple[float, float]] | np.ndarray, rounds: int = 3) -> np.ndarray:
    """Round the corners of an open line; its two ends stay in place."""
    points = np.asarray(points, dtype=np.float64)
    for _ in range(rounds):
        points = np.concatenate([points[:1], _smooth(points, 1)[1:-3], points[-1:]])
    return points


def _profile(*stations: tuple[float, float]) -> np.ndarray:
    """Return the outline of a lathe-turned piece from its stations (x, half width), mirrored at the x axis."""
    upper = np.array(stations, dtype=np.float64)
    return np.concatenate([upper, upper[::-1] * (1, -1)])


def _tube(path: Sequence[tuple[float, float]] | np.ndarray, *half_widths: float) -> np.ndarray:
    """Return the outline of a band along a path; the half widths apply at even distances along it."""
    path = np.asarray(path, dtype=np.float64)
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-9
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    width = np.interp(length / length[-1], np.linspace(0, 1, len(half_widths)), half_widths)
    offset = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1) * width[:, None]
    return np.concatenate([path + offset, (path - offset)[::-1]])


def rotation(angle: float) -> np.ndarray:
    """Return the matrix (2, 2) that rotates by an angle in radians."""
    return np.array([(math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))])


def direction(angle: float) -> np.ndarray:
    """Return the unit vector (2,) at an angle in radians."""
    return np.array([math.cos(angle), math.sin(angle)])


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
    return points @ rotation(angle).T


def _stripes(x_range: tuple[float, float], count: int, reach: float, slant: float, width: float) -> list[np.ndarray]:
    """Return `count` lines across the tool from -reach to +reach: file teeth, knurls, grip ribs."""
    line = np.array(
        [(-slant - width, -reach), (-slant + width, -reach), (slant + width, reach), (slant - width, reach)]
    )
    return [line + (x, 0) for x in np.linspace(*x_range, count)]


# Materials.


def tint(rng: np.random.Generator, colour: tuple[int, int, int]) -> tuple[float, float, float]:
    """Return a colour of the kit a little off, as it varies between factory batches."""
    varied = np.array(colour, dtype=np.float64) * rng.uniform(0.82, 1.12) + rng.normal(0, 7, 3)
    return tuple(np.clip(varied, 8, 250).tolist())


def _metal(rng: np.random.Generator, bevel: float, stock: Stock) -> Material:
    return Material(tint(rng, stock.metal), rng.uniform(0.45, 1.0), bevel)


def _grip(rng: np.random.Generator, bevel: float, stock: Stock) -> Material:
    return Material(tint(rng, stock.grip), rng.uniform(0.2, 0.6), bevel)


def _shade(material: Material, factor: float) -> Material:
    return dataclasses.replace(material, colour=tuple(channel * factor for channel in material.colour))


def _mark(outlines: Iterable[np.ndarray], material: Material, factor: float) -> list[Part]:
    """Return marks that are stamped, cut or printed into a surface: flat parts in a darker or lighter tone."""
    flat = dataclasses.replace(_shade(material, factor), gloss=0.0, bevel=0.0)
    return [Part(outline, flat) for outline in outlines]


# Tools: one function per class; each call returns another make and size. The formatter would put every point on a line:
# fmt: off


def _make_adjustable_wrench(rng: np.random.Generator, stock: Stock) -> list[Part]:
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
        Part(handle, metal), Part(jaw, _shade(metal, 0.9)), Part(head, metal), Part(sleeve, _grip(rng, 0.03, stock)),
        *_mark([worm], metal, 0.45), *_mark(ridges, metal, 1.05),
    ]


def _make_combination_wrench(rng: np.random.Generator, stock: Stock) -> list[Part]:
    metal = _metal(rng, 0.018, stock)
    shaft = rng.uniform(0.026, 0.04)
    ring = rng.uniform(0.062, 0.088)
    jaw = rng.uniform(0.078, 0.105)
    gap = jaw * rng.uniform(0.45, 0.6)
    tilt = rng.choice([-1, 1]) * rng.uniform(0.2, 0.32)
    ring_centre = (-0.5 + ring, 0.0)
    jaw_centre = (0.5 - jaw, 0.0)
    notch = np.array([(-jaw * 0.25, 0), (-jaw * 0.05, -gap), (jaw * 1.5, -gap), (jaw * 1.5, gap), (-jaw * 0.05, gap)])
    open_end = _smooth(jaw * np.array([
        (-1.1, -0.45), (-0.3, -1.05), (0.6, -1.08), (1.05, -0.75), (1.0, 0.75), (0.6, 1.0), (-0.3, 1.05), (-1.1, 0.45),
    ]))
    ring_hole = circle(ring_centre, ring * rng.uniform(0.58, 0.68), int(rng.choice([6, 12])), rng.uniform(0, 1))
    body = _profile((ring_centre[0] + ring * 0.8, shaft * 1.15), (-0.25, shaft), (0.2, shaft * 1.05),
                    (jaw_centre[0] - jaw * 0.3, shaft * 1.5))
    parts = [
        Part(body, metal),
        Part(_turn(open_end, tilt) + jaw_centre, metal, (_turn(notch, tilt) + jaw_centre,)),
        Part(circle(ring_centre, ring), metal, (ring_hole,)),
    ]
    if rng.random() < 0.75:  # a recessed panel with the size stamped in
        panel = _smooth(_profile((-0.22, shaft * 0.5), (0.2, shaft * 0.55)))
        stamps = [_box(x, -shaft * 0.25, x + 0.012, shaft * 0.25) for x in (-0.03, 0.0, 0.02)]
        parts += [Part(panel, _shade(metal, rng.uniform(0.7, 0.88))), *_mark(stamps, metal, 0.5)]
    return parts


def _make_file(rng: np.random.Generator, stock: Stock) -> list[Part]:
    metal = _shade(_metal(rng, 0.012, stock), 0.82)  # steel full of teeth looks darker than polished steel
    handle = _grip(rng, 0.04, stock)
    width = rng.uniform(0.038, 0.06)
    start = rng.uniform(-0.2, -0.12)
    tip = rng.uniform(0.25, 1.0)
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
    return [Part(blade, metal), *_mark(teeth, metal, 0.66), Part(grip, handle), Part(ferrule, _metal(rng, 0.02, stock))]


def _make_hammer(rng: np.random.Generator, stock: Stock) -> list[Part]:
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
    parts = [Part(_smooth(stick), handle)]
    if rng.random() < 0.3:  # rubber pulled over the end
        rubber = _smooth(_profile((-0.5, width), (-0.47, width * 1.5), (-0.3, width * 1.4), (-0.12, width * 1.15)))
        parts.append(Part(rubber, _grip(rng, 0.025, stock)))
    parts.append(Part(head + (head_x, 0), metal))
    if kind == "ball":
        parts.append(Part(circle((head_x, peen * 0.62), thick * 0.75), metal))
    eye = _smooth(_box(head_x - thick * 0.5, -0.02, head_x + thick * 0.5, 0.02), 1)
    return [*parts, Part(eye, _shade(handle, 0.8))]


def _make_hex_key(rng: np.random.Generator, stock: Stock) -> list[Part]:
    width = rng.uniform(0.024, 0.036)
    short = rng.uniform(0.2, 0.42)
    metal = _metal(rng, width * 0.7, stock)  # powder coated
    radius = rng.uniform(0.05, 0.09)
    corner = bend([(0.5 - radius, 0.0), (0.5, 0.0), (0.5, radius)])
    path = np.concatenate([[(-0.5, 0.0), (0.0, 0.0)], corner, [(0.5, short)]])
    facet = _shade(Material(metal.colour, 0.9, width * 0.3), 1.25)
    parts = [Part(_tube(path, width), metal), Part(_tube(path, width * 0.3), facet)]
    if rng.random() < 0.4:  # ball end
        groove = _box(-0.475, -width * 1.1, -0.462, width * 1.1)
        parts += [Part(circle((-0.5, 0), width * 1.15, 16), metal), *_mark([groove], metal, 0.5)]
    if rng.random() < 0.3:  # plastic sleeve on the long arm
        sleeve = _smooth(_box(rng.uniform(-0.3, -0.15), -width * 1.5, 0.3, width * 1.5), 1)
        parts.append(Part(sleeve, _grip(rng, width, stock)))
    return parts


def _make_oil_can(rng: np.random.Generator, stock: Stock) -> list[Part]:
    paint = Material(_grip(rng, 0.07, stock).colour, 0.7, 0.07)
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
    spout = bend([(0, high * 0.9), (0, high + rise * 0.5), (lean * 0.25, high + rise * 0.85), (lean, high + rise)])
    handle = bend([(-top * 0.3, high), (-base - 0.12, high * 0.98), (-base - 0.13, high * 0.45), (-base * 0.9, high * 0.2)])
    lever = bend([(0.0, high * 1.12), (-base, high * 1.28), (-base - 0.1, high * 1.1)], 2)
    parts = [
        Part(_tube(handle, 0.016), steel),
        Part(_tube(spout, 0.024, 0.016, 0.009), steel),
        Part(body, paint),
        Part(_box(-base * 1.08, -0.012, base * 1.08, 0.022), _shade(paint, 0.75)),
        Part(_smooth(_box(-top * 0.5, high * 0.94, top * 0.5, high * 1.14), 1), _shade(steel, 0.9)),
    ]
    if rng.random() < 0.6:
        parts.append(Part(_tube(lever, 0.014), _shade(steel, 0.85)))
    if rng.random() < 0.6:
        paper = ((232, 226, 205), (210, 190, 60))[rng.integers(2)]
        label = _box(-base * 0.7, high * 0.22, base * 0.7, high * 0.58)
        parts.append(Part(label, Material(tint(rng, paper), 0.2, 0.004)))
    return [Part(part.outline * (1, -1), part.material) for part in parts]


def _pincer(rng: np.random.Generator, stock: Stock, jaw: np.ndarray, opening: float, length: float) -> list[Part]:
    """Return two mirrored arms, crossed at the origin and opened by `opening` radians each; `jaw` is the upper one, towards +x."""
    metal = _metal(rng, 0.02, stock)
    sleeve = _grip(rng, 0.026, stock)
    spread = rng.uniform(0.1, 0.17)
    width = rng.uniform(0.028, 0.038)
    curve = bend([(0.03, -0.012), (-0.08, 0.05), (-length * 0.45, spread), (-length * 0.8, spread * 0.95),
                   (-length, spread * rng.uniform(0.7, 1.15))])
    grip = curve[len(curve) // 4 :]
    arm = [
        Part(_tube(curve, 0.045, width * 0.75, width * 0.7), metal), Part(_smooth(jaw * (1, -1), 1), metal),
        Part(_smooth(_tube(grip, width, width * 1.1, width * 1.15, width * 0.8), 1), sleeve),
    ]
    if rng.random() < 0.4:
        inlay = Material(_shade(sleeve, 0.5).colour, 0.4, 0.015)
        arm.append(Part(_tube(grip[3:-3], width * 0.35), inlay))
    pivot = rng.uniform(0.032, 0.042)
    return [
        *(Part(_turn(part.outline * (1, side), -side * opening), part.material) for side in (-1, 1) for part in arm),
        Part(circle((0, 0), pivot * 1.45), metal),
        Part(circle((0, 0), pivot), _shade(metal, 0.75)),
        Part(circle((0, 0), pivot * 0.6), _shade(metal, 1.1)),
    ]


def _make_pliers(rng: np.random.Generator, stock: Stock) -> list[Part]:
    long = rng.uniform(0.25, 0.36)
    tip = rng.uniform(0.018, 0.042)
    root = rng.uniform(0.07, 0.085)
    jaw = np.array([
        (-0.05, 0.0), (0.02, root), (0.1, root * 0.95), (long, tip), (long, 0.002), (0.17, 0.002), (0.13, 0.022),
        (0.075, 0.022), (0.05, 0.0),
    ])
    parts = _pincer(rng, stock, jaw, rng.uniform(0.0, 0.22), rng.uniform(0.5, 0.62))
    if rng.random() < 0.5:
        dark = Material((50, 50, 54), 0.2, 0.004)
        parts += [Part(tooth, dark) for tooth in _stripes((0.19, long - 0.015), 7, 0.012, 0.0, 0.003)]
    return parts


def _make_side_cutter(rng: np.random.Generator, stock: Stock) -> list[Part]:
    long = rng.uniform(0.13, 0.19)
    root = rng.uniform(0.085, 0.115)
    jaw = np.array([(-0.06, 0.0), (-0.03, root * 0.8), (0.05, root), (long * 0.75, root * 0.62), (long, 0.012), (long, 0.0),
                    (0.03, 0.0)])
    parts = _pincer(rng, stock, jaw, rng.uniform(0.0, 0.24), rng.uniform(0.5, 0.65))
    bright = Material((222, 226, 230), 0.8, 0.006)  # the ground cutting edge
    edge = np.array([(0.045, 0.0), (0.06, 0.03), (long * 0.97, 0.012), (long, 0.0)])
    return [*parts, Part(edge * (1, -1), bright), Part(edge, bright)]


def _make_ratchet(rng: np.random.Generator, stock: Stock) -> list[Part]:
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
        Part(_profile((start - 0.02, neck * 1.1), (middle, neck)), metal),
        Part(pear, metal),
        Part(circle(centre, head * 0.72), _shade(metal, 0.72)),
        Part(circle(centre, head * 0.62), _shade(metal, 1.02)),
    ]
    if rng.random() < 0.5:  # seen from the drive side, else from the lever side
        square = circle(centre, head * 0.42, 4, rng.uniform(0, 1.5))
        parts += [*_mark([square], metal, 0.55), Part(circle(centre, head * 0.16, 12), _shade(metal, 1.15))]
    else:
        lever = _smooth(_box(-head * 0.2, -head * 0.22, head * 0.75, head * 0.22))
        lever = _turn(lever, rng.uniform(-0.6, 0.6) + math.pi) + centre
        parts.append(Part(lever, Material((42, 42, 46), 0.5, 0.012)))
    handle = _smooth(_profile((-0.5, grip * 0.7), (-0.48, grip), (-0.36, grip * 0.92), (start - 0.05, grip),
                              (start, neck * 1.2)))
    knurl = _stripes((-0.46, start - 0.07), 16, grip * 0.86, 0.008, 0.003)
    return [*parts, Part(handle, metal), *_mark(knurl, metal, 0.68)]


def _make_screwdriver(rng: np.random.Generator, stock: Stock) -> list[Part]:
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
        Part(_profile((end - 0.02, shaft), (0.42, shaft)), metal),
        Part(tip, _shade(metal, rng.uniform(0.55, 1.0))),
        Part(grip, handle),
        *_mark(flutes, handle, 0.65),
    ]
    if rng.random() < 0.6:  # two-component handle: another colour at the butt
        butt = _smooth(_profile((-0.5, bulge * 0.58), (-0.485, bulge * 0.98), (-0.42, bulge * 1.01)), 1)
        parts.append(Part(butt, _grip(rng, 0.03, stock)))
    return parts


def _make_speed_brace(rng: np.random.Generator, stock: Stock) -> list[Part]:
    width = rng.uniform(0.016, 0.022)
    throw = rng.uniform(0.13, 0.21)
    metal = _metal(rng, width, stock)
    knob = _grip(rng, 0.035, stock)
    left = rng.uniform(-0.26, -0.18)
    right = rng.uniform(0.08, 0.18)
    slope = rng.uniform(0.02, 0.07)
    path = [(-0.42, 0), (left - slope, 0), (left + slope, throw), (right - slope, throw), (right + slope, 0), (0.42, 0)]
    halved = [point for a, b in itertools.pairwise(path) for point in (a, tuple(np.add(a, b) / 2))]  # for tighter bends
    radius = rng.uniform(0.036, 0.05)
    handle = _profile((-0.5, radius * 0.6), (-0.49, radius), (-0.45, radius), (-0.4, radius * 0.6), (-0.37, radius * 0.45))
    socket = rng.uniform(0.026, 0.038)
    sleeve = _profile((left + slope + 0.05, width * 1.9), (right - slope - 0.05, width * 1.9)) + (0, throw)
    return [
        Part(_tube(bend([*halved, path[-1]], 2), width), metal),
        Part(_smooth(handle), knob),
        Part(_profile((0.37, width), (0.4, socket), (0.5, socket)), _shade(metal, 0.9)),
        *_mark([_box(0.455, -socket, 0.463, socket)], metal, 0.5),
        Part(_smooth(sleeve, 1), knob),  # a sleeve that turns in the hand
    ]


# Unknown objects: the mug lies on the workbench; the other kinds, in random colours, set the thresholds.


def _make_mug(rng: np.random.Generator, stock: Stock) -> list[Part]:
    """Return a mug of coffee, seen from above."""
    china = Material(tint(rng, stock.grip), 0.7, 0.03)
    coffee = Material(tint(rng, stock.metal), 0.5, 0.02)
    inside = 0.4 - rng.uniform(0.035, 0.05)
    handle = bend([(0.25, -0.1), (0.62, -0.1), (0.62, 0.1), (0.25, 0.1)])
    return [
        Part(_tube(handle, 0.04), china), Part(circle((0, 0), 0.4, 60), china),
        *_mark([circle((0, 0), inside, 60)], china, 0.7), Part(circle((0, 0), inside - 0.01, 60), coffee),
    ]


def _make_pencil(rng: np.random.Generator, stock: Stock) -> list[Part]:
    paint = _grip(rng, 0.02, stock)
    width = rng.uniform(0.022, 0.032)
    start = rng.uniform(0.36, 0.4)
    wood = Material(tint(rng, (216, 180, 132)), 0.2, 0.01)
    rubber = Material(tint(rng, (206, 120, 112)), 0.1, 0.01)
    return [
        Part(_box(-0.42, -width, start, width), paint), Part(_profile((start, width), (0.48, width * 0.25)), wood),
        *_mark([_box(-0.42, -width * 0.2, start, width * 0.2)], paint, 1.25),
        *_mark([_profile((0.465, width * 0.36), (0.5, 0.002))], paint, 0.3),
        Part(_box(-0.5, -width, -0.46, width), rubber), Part(_box(-0.46, -width, -0.41, width), _metal(rng, 0.01, stock)),
    ]


def _make_scissors(rng: np.random.Generator, stock: Stock) -> list[Part]:
    metal = _metal(rng, 0.012, stock)
    plastic = _grip(rng, 0.02, stock)
    opening = rng.uniform(0.05, 0.3)
    ring = rng.uniform(0.1, 0.13)
    blade = np.array([(-0.27, -0.08), (-0.26, -0.04), (0.0, 0.045), (0.5, 0.0), (0.0, -0.03)])
    eye, hole = (circle((0, 0), radius) * (ring * 1.25, ring) + (-0.36, -ring * 0.9) for radius in (1.0, 0.66))
    parts = [Part(circle((0, 0), 0.025), _shade(metal, 0.7))]
    for side in (1, -1):
        turned = [_turn(outline * (1, side), side * opening) for outline in (blade, eye, hole)]
        parts = [Part(turned[0], metal), Part(turned[1], plastic, (turned[2],)), *parts]
    return parts


def _make_tape(rng: np.random.Generator, stock: Stock) -> list[Part]:
    tape = _grip(rng, 0.03, stock)
    card = Material(tint(rng, (190, 160, 120)), 0.1, 0.01)
    hole = rng.uniform(0.24, 0.34)
    torn = _box(0.0, -0.5, rng.uniform(0.1, 0.45), -0.46)
    inside = (circle((0, 0), hole, 40),)
    roll = circle((0, 0), 0.5, 60)
    core = circle((0, 0), hole * 1.1, 40)
    return [Part(torn, tape), Part(roll, tape, inside), Part(core, card, inside)]


def _make_watch(rng: np.random.Generator, stock: Stock) -> list[Part]:
    strap = _grip(rng, 0.03, stock)
    case = _metal(rng, 0.02, stock)
    radius = rng.uniform(0.13, 0.18)
    dial = Material(tint(rng, ((232, 230, 222), (30, 32, 38))[rng.integers(2)]), 0.3, 0.01)
    stations = ((-0.5, 0.4), (-0.46, 0.55), (0, 0.8), (0.44, 0.5), (0.5, 0.4))
    hands = [_tube([(0, 0), reach * radius * direction(rng.uniform(0, 2 * math.pi))], 0.012) for reach in (0.45, 0.7)]
    return [
        Part(_smooth(_profile(*((x, width * radius) for x, width in stations))), strap),
        Part(_box(-0.02, radius, 0.02, radius * 1.15), case), Part(circle((0, 0), radius), case),
        Part(circle((0, 0), radius * 0.82), dial), *(Part(hand, Material((150, 40, 40), 0.2, 0.0)) for hand in hands),
    ]


# fmt: on


_CHROME = (206, 210, 216)
SATIN = (165, 168, 172)
_DARK = (74, 76, 82)
_BRASS = (190, 168, 110)
# A colour-coded kit, as in aviation workshops: colour is a real cue, on benches that are mostly neutral.
TOOLS: dict[str, tuple[Callable[[np.random.Generator, Stock], list[Part]], Stock]] = {
    "adjustable_wrench": (_make_adjustable_wrench, Stock((28, 82, 172), SATIN)),
    "combination_wrench": (_make_combination_wrench, Stock((120, 96, 168), (150, 128, 186))),
    "file": (_make_file, Stock((226, 98, 22), _DARK)),
    "hammer": (_make_hammer, Stock((150, 66, 36), _DARK)),
    "hex_key": (_make_hex_key, Stock((60, 80, 30), (128, 176, 48))),
    "oil_can": (_make_oil_can, Stock((26, 128, 74), _BRASS)),
    "pliers": (_make_pliers, Stock((196, 34, 32), SATIN)),
    "ratchet": (_make_ratchet, Stock(_CHROME, _CHROME)),
    "screwdriver": (_make_screwdriver, Stock((236, 186, 28), _CHROME)),
    "side_cutter": (_make_side_cutter, Stock((20, 150, 170), SATIN)),
    "speed_brace": (_make_speed_brace, Stock((150, 30, 80), SATIN)),
}
CLASS_NAMES = tuple(TOOLS)
UNKNOWN_KINDS = {"pencil": _make_pencil, "scissors": _make_scissors, "tape": _make_tape, "watch": _make_watch}
UNKNOWN_ON_WORKBENCH = "mug"
ON_WORKBENCH = TOOLS | {UNKNOWN_ON_WORKBENCH: (_make_mug, Stock((230, 226, 216), (74, 46, 28)))}
