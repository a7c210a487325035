"""Triangle meshes: reading and writing, conversion to voxels and back; and the pictures of modelit.py.

A mesh has vertices, float64 (V, 3), and faces, int64 (F, 3). The third axis points upwards, as in ModelNet.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fonts import load_font
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

MESH_SUFFIXES = (".off", ".obj", ".ply", ".stl")
VOXELS_VERSION = 2  # raise it when `voxelize` changes: voxels cached on disk by another version are not used
SAMPLE_SPACING = 0.5  # voxels between samples of a surface; they can miss only voxels that it grazes at a corner
MAX_SAMPLES = 2_000_000  # points on a surface at a time: 48 MB
# Numbers of steps along an edge. Triangles with equal numbers are sampled together, each with at most 1.5 times the steps it needs.
STEP_COUNTS = np.unique(np.concatenate([2 ** np.arange(14), 3 * 2 ** np.arange(13)]))
MIN_POINTS = 100  # a smaller point cloud does not show a shape
MAX_COORDINATE = 1e30  # squares and quotients of larger coordinates can overflow float64
EMPTY_PROBABILITY = 0.05  # a grid that stays below it everywhere holds no shape, whatever the level
LIGHT = np.array([0.35, -0.55, 0.75]) / np.linalg.norm([0.35, -0.55, 0.75])
CLAY = np.array([196, 138, 92])  # RGB of a drawn mesh
MADE_BY = "lct_dino3 modelit"  # written into each file; only files that contain it are overwritten
MATRIX_CELL = 46  # px; wide enough for a printed cosine
MATRIX_SIDE = 4000  # px; the largest side of a drawn matrix, unless it has more rows than that
PAPER = 250  # gray level of the background
INK, GRID = "#374151", "#d7dae0"
COLOURS = ("#26547c", "#c8553d", "#3a7d44", "#8e5ea2", "#b08900", "#6b7280")


class MeshError(ValueError):
    """Raised for a mesh that cannot be used; the message is the reason, with the line number if it is known."""


class Mesh(NamedTuple):
    """Vertices, float64 (V, 3), and faces, int64 (F, 3)."""

    vertices: np.ndarray
    faces: np.ndarray


# --- reading


def read_mesh(path: Path) -> Mesh:
    """Read a mesh; a scene of several meshes becomes one, and a point cloud in a .ply file has no faces.

    Raises MeshError if the file cannot be read or has no surface.
    """
    import trimesh

    try:
        if path.suffix.lower() == ".off":
            mesh = parse_off(path.read_bytes().decode("utf-8-sig", errors="replace"))
        else:
            loaded = trimesh.load_scene(path, process=False).to_geometry()
            faces = np.asarray(getattr(loaded, "faces", np.zeros((0, 3))), dtype=np.int64)
            mesh = Mesh(np.asarray(loaded.vertices, dtype=np.float64), faces)
    except (OSError, MemoryError, MeshError):
        raise
    except Exception as error:  # for damaged files, the parsers of trimesh raise many types
        raise MeshError(f"cannot be read: {str(error)[:200] or type(error).__name__}") from error
    if ((mesh.faces < 0) | (mesh.faces >= len(mesh.vertices))).any():
        raise MeshError("has faces with vertices that it does not have")
    if not len(mesh.faces) and (path.suffix.lower() != ".ply" or len(mesh.vertices) < MIN_POINTS):
        raise MeshError("has no faces")
    if not (np.abs(mesh.vertices) < MAX_COORDINATE).all():  # NaN fails the comparison too
        raise MeshError("has vertices that are no finite numbers, or far too large")
    corners = mesh.vertices[mesh.faces].reshape(-1, 3) if len(mesh.faces) else mesh.vertices
    if not np.ptp(corners, axis=0).max() > 1 / MAX_COORDINATE:
        raise MeshError("has no extent")
    return mesh


def parse_off(text: str) -> Mesh:
    """Parse an .off file; it may begin with `OFF8 6 0` on one line, and have comments, polygons, and colours, which are ignored.

    Raises MeshError with the line number.
    """
    stripped = ((number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), start=1))
    lines = [(number, line) for number, line in stripped if line]
    header = re.match(r"(?:ST)?C?N?OFF(?!\s*BINARY)\s*(.*)", lines[0][1]) if lines else None
    if header is None:
        raise MeshError("line 1: does not begin with OFF")
    counts_line, counts = lines[0][0], header[1].split()
    del lines[0]
    if not counts and lines:
        counts_line, counts = lines[0][0], lines[0][1].split()
        del lines[0]
    if len(counts) not in (2, 3) or not all(word.isdecimal() for word in counts):
        raise MeshError(f"line {counts_line}: is not the numbers of vertices, faces and edges")
    num_vertices, num_faces = int(counts[0]), int(counts[1])
    expected = f"the {num_vertices} vertices and {num_faces} faces of line {counts_line}"
    if len(lines) < num_vertices + num_faces:
        number = lines[-1][0] if lines else counts_line
        raise MeshError(f"line {number}: ends after {len(lines)} lines of {expected}")
    if len(lines) > num_vertices + num_faces:
        number = lines[num_vertices + num_faces][0]
        raise MeshError(f"line {number}: is more than {expected}")
    vertices = _parse_vertices(lines[:num_vertices])
    faces, positions = _parse_faces(lines[num_vertices:])
    invalid = np.flatnonzero(((faces < 0) | (faces >= num_vertices)).any(axis=1))
    if len(invalid):
        number = lines[num_vertices + positions[invalid[0]]][0]
        raise MeshError(f"line {number}: names a vertex that is not one of 0 to {num_vertices - 1}")
    return Mesh(vertices, faces)


def _parse_vertices(lines: Sequence[tuple[int, str]]) -> np.ndarray:
    if not lines:
        return np.zeros((0, 3))
    try:
        return np.loadtxt([line for _, line in lines], usecols=(0, 1, 2), ndmin=2)
    except ValueError:
        for number, line in lines:
            try:
                _, _, _ = map(float, line.split()[:3])
            except ValueError:
                raise MeshError(f"line {number}: is not the three coordinates of a vertex") from None
        raise


def _parse_faces(lines: Sequence[tuple[int, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return triangles (F, 3), and for each the index of its line, (F,); polygons are cut into fans."""
    try:  # fast path: in most files all faces have equally many corners, and no colours
        table = (
            np.loadtxt([line for _, line in lines], dtype=np.int64, ndmin=2) if lines else np.zeros((0, 4), np.int64)
        )
        sizes = np.unique(table[:, 0])
        is_uniform = len(sizes) == 1 and 3 <= sizes[0] < table.shape[1]
    except ValueError:
        is_uniform = False
    if is_uniform:
        num_triangles = int(sizes[0]) - 2
        fans = [table[:, [1, corner + 2, corner + 3]] for corner in range(num_triangles)]
        return np.stack(fans, axis=1).reshape(-1, 3), np.repeat(np.arange(len(table)), num_triangles)
    triangles = []
    positions = []
    for position, (number, line) in enumerate(lines):
        words = line.split()
        size = int(words[0]) if words[0].isdecimal() else 0
        if size < 3:
            raise MeshError(f"line {number}: is not a face, which begins with the number of its corners")
        try:
            corners = [int(word) for word in words[1 : size + 1]]
        except ValueError:
            raise MeshError(f"line {number}: names vertices that are no whole numbers") from None
        if len(corners) < size:
            raise MeshError(f"line {number}: has {len(corners)} of the {size} corners of its face")
        triangles += [(corners[0], *corners[corner : corner + 2]) for corner in range(1, size - 1)]
        positions += [position] * (size - 2)
    return np.array(triangles, dtype=np.int64).reshape(-1, 3), np.array(positions, dtype=np.int64)


def format_off(vertices: np.ndarray, polygons: Sequence[Sequence[int]]) -> str:
    """Return the text of an .off file."""
    lines = ["OFF", f"{len(vertices)} {len(polygons)} 0"]
    lines += [" ".join(f"{value:.6g}" for value in vertex) for vertex in vertices.tolist()]
    lines += [" ".join(map(str, (len(polygon), *polygon))) for polygon in polygons]
    return "\n".join(lines) + "\n"


# --- voxels


def voxelize_file(path: Path, size: int, is_solid: bool) -> bytes | str:
    """Return the voxels of a file as packed bits, or the reason why it cannot be used."""
    try:
        return np.packbits(voxelize(read_mesh(path), size, is_solid)).tobytes()
    except (MeshError, OSError) as error:
        return str(error)


def voxelize(mesh: Mesh, size: int, is_solid: bool) -> np.ndarray:
    """Return the voxels that the surface passes through, and with `is_solid` also those that it encloses, bool (size, size, size).

    The mesh is centred, and its longest side fills the grid.
    """
    triangles = mesh.vertices[mesh.faces] if len(mesh.faces) else mesh.vertices[:, None]  # a point cloud has no faces
    low, high = triangles.min(axis=(0, 1)), triangles.max(axis=(0, 1))
    # Slightly smaller than the grid, so that the outermost plane lies in the last voxel, and off centre by nearly half of the gap:
    # otherwise rounding errors put a plane between two voxels, such as the middle of a symmetric mesh, on either side.
    scale = size * (1 - 1e-6) / (high - low).max()
    triangles = (triangles - (low + high) / 2) * scale + size / 2 + size * 4.9e-7
    grid = np.zeros(size**3, dtype=bool)
    batches = (batch[0] for batch in sample_surface(triangles, SAMPLE_SPACING)) if len(mesh.faces) else [triangles]
    for points in batches:
        indices = np.clip(np.floor(points).astype(np.int64), 0, size - 1).reshape(-1, 3)  # voxel i spans i to i + 1
        grid[(indices[:, 0] * size + indices[:, 1]) * size + indices[:, 2]] = True
    grid = grid.reshape(size, size, size)
    if not len(mesh.faces):
        grid = _close_gaps(grid, triangles[:, 0])
    if is_solid:
        from scipy.ndimage import binary_fill_holes

        grid = binary_fill_holes(grid)
    return grid


def sample_surface(triangles: np.ndarray, spacing: float) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield points on triangles (N, 3, 3), at most `spacing` apart, in batches of about MAX_SAMPLES points at most.

    A batch is the points (P, M, 3), the rows (P,) of their P triangles, the order (P, 3) of the corners of each triangle, and the
    barycentric coordinates (M, 3) of the points in this order, which are the same for all P triangles.
    """
    edges = triangles - np.roll(triangles, -1, axis=1)  # between each corner and the next
    lengths = np.linalg.norm(edges, axis=2)
    order = (lengths.argmin(axis=1)[:, None] + np.arange(3)) % 3
    # The points lie on lines from the shortest edge to the opposite corner, so that a sliver needs few of them.
    min_steps = np.stack([lengths.min(axis=1), lengths.max(axis=1)], axis=1) / spacing
    steps = STEP_COUNTS[np.searchsorted(STEP_COUNTS[:-1], min_steps)]
    for across, along in np.unique(steps, axis=0):
        u, v = np.meshgrid(np.arange(across + 1) / across, np.arange(along + 1) / along)
        weights = np.stack([(1 - u) * (1 - v), u * (1 - v), v], axis=-1).reshape(-1, 3)
        members = np.flatnonzero((steps == (across, along)).all(axis=1))
        batch_size = max(1, MAX_SAMPLES // len(weights))
        for start in range(0, len(members), batch_size):
            rows = members[start : start + batch_size]
            points = weights @ np.take_along_axis(triangles[rows], order[rows, :, None], axis=1)
            yield points, rows, order[rows], weights


def _close_gaps(grid: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Fill the gaps between neighbouring points (N, 3) of a point cloud, whose voxels are `grid`."""
    from scipy.ndimage import binary_closing
    from scipy.spatial import KDTree

    points = np.unique(points, axis=0)  # between two equal points there is no gap
    spacing = np.percentile(KDTree(points).query(points, k=2)[0][:, 1], 90)
    radius = int(np.ceil(1.3 * spacing))  # on a slope, neighbours lie further apart in voxels
    # Padded, because closing erodes voxels at the border.
    closed = binary_closing(np.pad(grid, radius), np.ones((3, 3, 3)), iterations=radius)
    return closed[(slice(radius, -radius),) * 3]


def extract_surface(probabilities: np.ndarray, level: float, sigma: float) -> tuple[Any, str]:
    """Turn probabilities (size, size, size) into a closed surface in the unit cube, by marching cubes after a gaussian filter.

    Returns a `trimesh.Trimesh`, and a warning or ''. Raises MeshError if the grid is empty or the surface is not closed.
    """
    import trimesh
    from scipy.ndimage import gaussian_filter
    from skimage.measure import marching_cubes

    highest = float(probabilities.max())
    if not highest >= EMPTY_PROBABILITY:
        raise MeshError(f"is empty: no voxel has a probability above {highest:.3f}")
    field = np.pad(probabilities.astype(np.float64), 2 + round(3 * sigma))  # an empty margin closes the surface
    field = gaussian_filter(field, sigma) if sigma > 0 else field
    warning = ""
    if not field.min() < level < field.max():
        middle = float(field.min() + field.max()) / 2
        warning = f"level {level:g} lies outside the values, which reach {field.max():.3f}: their middle {middle:.3f} is taken"
        level = middle
    vertices, faces, _, _ = marching_cubes(field, level, allow_degenerate=False)
    vertices = vertices.astype(np.float64)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = (vertices - (low + high) / 2) / (high - low).max() + 0.5
    mesh = trimesh.Trimesh(vertices, faces, process=True)
    if not mesh.is_watertight:
        mesh.fill_holes()
    if not mesh.is_watertight:
        raise MeshError(f"is not closed at level {level:g}; give another --level, or a larger --sigma")
    if mesh.volume < 0:
        mesh.invert()
    return mesh, warning


def encode_mesh(mesh: Any, kind: str, comments: Sequence[str]) -> bytes:
    """Return the bytes of an obj, ply, stl or glb file with MADE_BY in it; an OBJ file also begins with the comments."""
    mesh.metadata["made_by"] = MADE_BY  # a GLB file keeps the metadata
    exported = mesh.export(file_type=kind)
    data = exported.encode() if isinstance(exported, str) else bytes(exported)
    if kind == "obj":
        # Without line breaks: the rest of a prompt must not become a line of the mesh.
        header = "".join(f"# {' '.join(comment.split())}\n" for comment in (*comments, MADE_BY))
        return header.encode("utf-8", "backslashreplace") + data
    if kind == "stl":
        return MADE_BY.encode().ljust(80) + data[80:]
    return data.replace(b"\ncomment ", f"\ncomment {MADE_BY}, ".encode(), 1) if kind == "ply" else data


# --- drawing


def draw_voxels(probabilities: np.ndarray, sigma: float, side: int) -> Image.Image | None:
    """Draw the surface of probabilities (size, size, size); return None if they have none."""
    try:
        mesh, _ = extract_surface(probabilities, 0.5, sigma)
    except MeshError:
        return None
    return draw_mesh(mesh, side)


def draw_mesh(mesh: Any, side: int) -> Image.Image:
    """Draw a `Mesh` or a `trimesh.Trimesh` as lit clay, seen from the front, the right and above; no display is needed."""
    yaw, pitch = np.radians(35), np.radians(25)
    yaw_matrix = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    pitch_matrix = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    mesh = Mesh(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    used = mesh.vertices[np.unique(mesh.faces)]
    low, high = used.min(axis=0), used.max(axis=0)
    scale = 1.75 * side / np.linalg.norm(high - low)  # drawn at twice the size, then averaged
    vertices = ((mesh.vertices - (low + high) / 2) * scale) @ yaw_matrix.T @ pitch_matrix.T
    triangles = vertices[mesh.faces]
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    # A vertex normal is the mean of its face normals, weighted by area; with face normals, the facets of marching cubes would show.
    vertex_normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(vertex_normals, mesh.faces[:, corner], normals)
    vertex_normals /= np.maximum(np.linalg.norm(vertex_normals, axis=1, keepdims=True), 1e-12)
    brightness = np.zeros((2 * side) ** 2)
    depths = np.full((2 * side) ** 2, np.inf)  # along the second axis, which points away from the viewer
    vertex_light = vertex_normals @ LIGHT
    for points, rows, order, weights in sample_surface(triangles, 0.8):
        # abs, because not all files order the corners of faces consistently.
        shade = np.abs(np.take_along_axis(vertex_light[mesh.faces[rows]], order, axis=1) @ weights.T).ravel()
        points = points.reshape(-1, 3)
        xs = np.clip((points[:, 0] + side).astype(int), 0, 2 * side - 1)
        ys = np.clip((side - points[:, 2]).astype(int), 0, 2 * side - 1)
        pixels = ys * 2 * side + xs
        np.minimum.at(depths, pixels, points[:, 1])
        nearest = points[:, 1] == depths[pixels]
        brightness[pixels[nearest]] = shade[nearest]
    colour = np.where(np.isfinite(depths)[:, None], (0.3 + 0.7 * brightness[:, None]) * CLAY, PAPER)
    picture = Image.fromarray(colour.reshape(2 * side, 2 * side, 3).astype(np.uint8))
    return picture.resize((side, side), Image.Resampling.BOX)


def draw_sheet(rows: Sequence[Sequence[tuple[str, Image.Image | None]]], side: int) -> Image.Image:
    """Arrange rows of captioned pictures in a table; None leaves a cell without a picture."""
    font = load_font(12)
    sheet = Image.new("RGB", (side * max(map(len, rows)), (side + 18) * len(rows)), (PAPER,) * 3)
    pen = ImageDraw.Draw(sheet)
    for row, cells in enumerate(rows):
        for column, (caption, picture) in enumerate(cells):
            corner = (column * side, row * (side + 18))
            if picture is not None:
                sheet.paste(picture, corner)
            pen.text((corner[0] + 6, corner[1] + side), caption[: side // 7], INK, font)
    return sheet


def draw_curves(panels: dict[str, dict[str, Sequence[float | None]]]) -> Image.Image:
    """Draw a chart per title, side by side, with a line per name over epochs 1, 2, ...; None and NaN interrupt a line."""
    width, height, left_margin, top_margin = 420, 300, 60, 40
    font = load_font(12)
    panel_width = width + left_margin + 20
    picture = Image.new("RGB", (len(panels) * panel_width, height + 2 * top_margin), (PAPER,) * 3)
    pen = ImageDraw.Draw(picture)
    for number, (title, lines) in enumerate(panels.items()):
        left = number * panel_width + left_margin
        values = np.array(list(lines.values()), dtype=np.float64)
        finite = values[np.isfinite(values)]
        low, high = finite.min(initial=0.0), finite.max(initial=1e-9)
        pen.text((left, 8), title, INK, font)
        for fraction in (0, 0.25, 0.5, 0.75, 1):
            y = top_margin + height * (1 - fraction)
            pen.line((left, y, left + width, y), GRID)
            pen.text((left - 8, y), f"{low + fraction * (high - low):.3g}", INK, font, anchor="rm")
        pen.text((left + width, top_margin + height + 6), f"epoch {values.shape[1]}", INK, font, anchor="ra")
        for index, (name, line) in enumerate(zip(lines, values, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            xs = left + width * np.arange(len(line)) / max(1, len(line) - 1)
            ys = top_margin + height * (1 - (line - low) / (high - low))
            for start, end in itertools.pairwise(np.column_stack([xs, ys])):
                if np.isfinite([start, end]).all():
                    pen.line((*start, *end), colour, 2)
            pen.text((left + 110 * index, 24), name, colour, font)
    return picture


def draw_matrix(values: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draw a square matrix of cosines as a heat map, where 1 is dark; names and numbers are drawn if there is room for them."""
    cell, left = max(1, min(MATRIX_CELL, MATRIX_SIDE // len(names))), 220
    font = load_font(12)
    colours = PAPER + (np.array([38, 84, 124]) - PAPER) * np.clip(values, 0, 1)[:, :, None]
    side = cell * len(names)
    heat_map = Image.fromarray(colours.round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (left + side + 10, side + 10), (PAPER,) * 3)
    picture.paste(heat_map, (left, 0))
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(names if cell >= 12 else ()):
        pen.text((left - 8, (row + 0.5) * cell), f"{name[:32]}  {row + 1}", INK, font, anchor="rm")
        for column, value in enumerate(values[row].tolist() if cell == MATRIX_CELL else ()):
            middle = (left + (column + 0.5) * cell, (row + 0.5) * cell)
            pen.text(middle, f"{value:.2f}", "white" if value > 0.6 else INK, font, anchor="mm")
    return picture


def draw_points(points: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draw named points (N, 2), both axes at the same scale."""
    side, margin = 640, 90
    font = load_font(12)
    picture = Image.new("RGB", (side, side), (PAPER,) * 3)
    pen = ImageDraw.Draw(picture)
    span = max(float(np.ptp(points, axis=0).max()), 1e-9)
    middle = (points.max(axis=0) + points.min(axis=0)) / 2
    for index, (name, point) in enumerate(zip(names, points, strict=True)):
        x, y = side / 2 + (point - middle) / span * (side - 2 * margin) * (1, -1)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), COLOURS[index % len(COLOURS)])
        pen.text((x, y - 8), name[:32], INK, font, anchor="mb")
    return picture


def encode_png(picture: Image.Image) -> bytes:
    """Return the bytes of a PNG file with MADE_BY in it."""
    buffer = io.BytesIO()
    info = PngInfo()
    info.add_text("Software", MADE_BY)
    picture.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
