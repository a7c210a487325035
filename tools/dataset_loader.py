#!/usr/bin/env python3
"""Data sets of meshes: download the known ones, draw the toy set, or use existing folders; and voxelise them for modelit.py.

    python tools/dataset_loader.py                  a menu; its answers may also come from a pipe

Interrupted downloads continue where they stopped, and archives are unpacked into the folder of the data set only. Folders made here
carry a marker file; no others are ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import http.client
import json
import lzma
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from meshes import MESH_SUFFIXES, VOXELS_VERSION, format_off, voxelize_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct

MARKER_NAME = ".modelit_dataset.json"  # in each folder that was made here
TOY_NAME = "toy"
TOY_SHAPES = 60  # per class
DOWNLOAD_TRIES = 4
TRY_AGAIN_SECONDS = 1.0  # before the second try; doubled before each further one
TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20
MAX_UNPACKED_BYTES = 50 << 30  # ModelNet40 unpacks to 10 GB
MAX_RATIO = 200  # unpacked to packed size of a file; meshes as text have 3 to 10
RATIO_FREE_BYTES = 10 << 20  # smaller files may have any ratio
MAX_FILES = 1_000_000
NEEDS_LOGIN = (
    "ShapeNet gives its files only to those who have registered at https://shapenet.org: download and unpack it there"
)


class Link(NamedTuple):
    """A known data set and its source."""

    url: str  # '' = no download
    text: str  # shown in the menu
    classes: tuple[str, ...] = ()  # only these are used; () = all
    folder: str = ""  # name of the larger data set that contains it


# Addresses from https://modelnet.cs.princeton.edu.
MODELNET10_URL = "http://3dvision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip"
DATASET_LINKS: dict[str, Link] = {
    TOY_NAME: Link("", f"drawn here: chairs, tables, lamps, monitors, {TOY_SHAPES} each"),
    "modelnet10": Link(MODELNET10_URL, "4,899 CAD models of furniture in 10 classes, 450 MB"),
    "modelnet40": Link("http://modelnet.cs.princeton.edu/ModelNet40.zip", "12,311 CAD models in 40 classes, 2 GB"),
    "chairs": Link(MODELNET10_URL, "the chairs of modelnet10", ("chair",), "modelnet10"),
    "tables": Link(MODELNET10_URL, "the tables of modelnet10", ("table",), "modelnet10"),
    "shapenetcore": Link("", "51,300 models in 55 classes; needs a login"),
    "shapenetsem": Link("", "12,000 models in 270 classes; needs a login"),
}


def list_available_datasets() -> dict[str, str]:
    """Return the known data sets: description by name."""
    return {name: link.text for name, link in DATASET_LINKS.items()}


def load_dataset(source: str | Path, download_path: str | Path = "datasets") -> list[Path]:
    """Return the folders of meshes of a data set; fetch or draw it into `download_path` first if necessary.

    `source` is a folder, or a name in `DATASET_LINKS`; a folder of that name takes precedence. Raises UserError if it is neither,
    needs a login, or cannot be fetched.
    """
    path = Path(source)
    if path.is_dir():
        return [path]
    name = str(source).lower()
    where = f"--dataset {source}"
    if path.exists():
        raise lct.UserError("is a file, not a folder", where, f"give a folder of {' '.join(MESH_SUFFIXES)}")
    if name not in DATASET_LINKS:
        remedy = lct.did_you_mean(name, DATASET_LINKS, f"give a folder of meshes, or one of {' '.join(DATASET_LINKS)}")
        raise lct.UserError("is neither a folder nor a known data set", where, remedy)
    link = DATASET_LINKS[name]
    folder = Path(download_path) / (link.folder or name)
    if not link.url and name != TOY_NAME:
        raise lct.UserError("needs a login", where, f"{NEEDS_LOGIN}; then give its folder")
    if not (folder / MARKER_NAME).is_file():
        if folder.exists():
            raise lct.UserError("was not made here", str(folder), f"give --dataset {folder}, or move it away")
        with lct.lock_directory(folder.parent, "--download_path"):
            fill_folder(folder, link)
    if not link.classes:
        return [folder]
    class_folders = [path for path in sorted(folder.rglob("*")) if path.is_dir() and path.name in link.classes]
    if not class_folders:
        raise lct.UserError(f"has no class {' '.join(link.classes)}", str(folder), "clear it, and load it again")
    return class_folders


def fill_folder(folder: Path, link: Link) -> None:
    """Fetch or draw a data set in a temporary folder, and rename that to `folder` when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process; this one has the lock
    if link.url:
        archive = folder.with_name(f"{folder.name}.zip")
        if not archive.exists():  # else a start that could not unpack it has left it
            download_file(link.url, archive)
        extract_archive(archive, temporary)
    else:
        draw_toy_set(temporary)
    lct.write_json(temporary / MARKER_NAME, {"source": link.url or "drawn", "time": time.strftime("%Y-%m-%d %H:%M:%S")})
    temporary.rename(folder)
    lct.sync_folder(folder.parent)
    if link.url:
        archive.unlink()


def clear_dataset_cache(download_path: str | Path = "datasets") -> list[str]:
    """Delete the data sets made here and the remains of downloads, and no other folders; return the names of the data sets."""
    root = Path(download_path)
    if not root.is_dir():
        return []
    cleared = []
    with lct.lock_directory(root, "--download_path"):
        for name in sorted({link.folder or name for name, link in DATASET_LINKS.items()}):
            for leftover in (root / f"{name}.zip", root / f"{name}.zip.part", root / f"{name}.zip.part.json"):
                leftover.unlink(missing_ok=True)
            shutil.rmtree(root / f".{name}.tmp", ignore_errors=True)
            if (root / name / MARKER_NAME).is_file() and not (root / name).is_symlink():
                shutil.rmtree(root / name)
                cleared.append(name)
    return cleared


def select_local_dataset() -> Path | None:
    """Ask for a folder in a window; return None if none is chosen. Raises UserError without PyQt5 or a display."""
    remedy = "pip install PyQt5, or give the path: --dataset DIR"
    try:
        from PyQt5.QtWidgets import QApplication, QFileDialog
    except ImportError as error:
        raise lct.UserError("choosing a folder in a window needs PyQt5", "select_local_dataset", remedy) from error
    if sys.platform == "linux" and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"))):
        raise lct.UserError("there is no display", "select_local_dataset", "give the path: --dataset DIR")
    application = QApplication.instance() or QApplication([])
    folder = QFileDialog.getExistingDirectory(None, "Folder of meshes")
    del application
    return Path(folder) if folder else None


# --- downloads


def download_file(url: str, path: Path) -> None:
    """Fetch a file over HTTP; after a failure, the next try continues from `<path>.part`.

    Raises UserError if the server cannot be reached or refuses, or the disk is full.
    """
    part = path.with_name(f"{path.name}.part")
    last_error: Exception | None = None
    for attempt in range(DOWNLOAD_TRIES):
        if attempt:
            time.sleep(TRY_AGAIN_SECONDS * 2 ** (attempt - 1))
        try:
            _fetch_rest(url, part)
            break
        except urllib.error.HTTPError as error:
            last_error = error
            if error.code < 500 and error.code not in (408, 416, 429):
                raise _download_error(url, error) from error
        except (http.client.HTTPException, ValueError) as error:  # cut off, or no HTTP
            last_error = error
        except OSError as error:  # no route, refused, reset, timed out, cut off
            is_disk_error = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
            if is_disk_error or isinstance(error, (PermissionError, IsADirectoryError)):
                raise lct.write_error(part, error, 0) from error
            last_error = error
    else:
        raise _download_error(url, last_error) from last_error
    part.replace(path)
    part.with_name(f"{part.name}.json").unlink(missing_ok=True)
    lct.sync_folder(path.parent)


def _fetch_rest(url: str, part: Path) -> None:
    """Append the missing bytes of a file, or fetch it from the start if it has changed on the server."""
    state_path = part.with_name(f"{part.name}.json")
    saved: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        saved = json.loads(state_path.read_text(encoding="utf-8"))
    start = part.stat().st_size if part.is_file() and saved.get("url") == url and saved.get("validator") else 0
    request = urllib.request.Request(url, headers={"User-Agent": "modelit"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", saved["validator"])
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and saved.get("length") == start:
            return  # already complete
        if error.code == 416:
            state_path.unlink(missing_ok=True)
        raise
    with response:
        is_partial = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        start = start if is_partial else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        validator = response.headers.get("ETag", "")
        if not validator or validator.startswith("W/"):  # a weak tag does not promise equal bytes
            validator = response.headers.get("Last-Modified", "")
        lct.write_json(state_path, {"url": url, "validator": validator, "length": total})
        bar = lct.progress((), total or 0, url.rpartition("/")[2], unit="B")
        bar.unit_scale = True
        bar.update(start)
        with contextlib.closing(bar), open(part, "ab" if start else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"ended after {size:,} of {total:,} bytes")


def _download_error(url: str, error: Exception | None) -> lct.UserError:
    reason = lct.printable(str(getattr(error, "reason", "") or error or type(error).__name__).partition("\n")[0])
    remedy = "check the network and start again: it goes on where it stopped; or unpack it yourself and give its folder"
    return lct.UserError(f"cannot be fetched: {reason}", url, remedy)


# --- archives


def extract_archive(archive: Path, folder: Path) -> None:
    """Unpack a zip archive into a new folder.

    Raises UserError, and removes the folder, if the archive is damaged, does not fit on the disk, or holds a link, a path outside
    the folder, or far more than its size promises.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = [info for info in file.infolist() if not info.is_dir()]
            _check_members(archive, members)
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
            needed = sum(info.file_size for info in members)
            if needed > free:
                raise lct.UserError(f"unpacks to {needed:,} bytes, and {free:,} are free", str(folder), "make room")
            for info in lct.progress(members, len(members), "unpacking", unit="file"):
                target = folder.joinpath(*PurePosixPath(info.filename).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as source, open(target, "xb") as copy:  # zipfile reads at most file_size bytes
                    shutil.copyfileobj(source, copy, CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        archive.unlink(missing_ok=True)
        remedy = "it is deleted; start again to fetch it anew"
        raise lct.UserError(f"is damaged: {error}", str(archive), remedy) from error
    except OSError as error:  # the disk is full, or a path in the archive is impossible, e.g. a file below a file
        shutil.rmtree(folder, ignore_errors=True)
        problem = f"cannot be unpacked: {error.strerror or error}"
        raise lct.UserError(problem, str(archive), "make room, or delete it and start again") from error
    except lct.UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_members(archive: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    remedy = "it is no archive of a data set: delete it"
    names = set()
    total = 0
    for info in members:
        path = PurePosixPath(info.filename)
        mode = info.external_attr >> 16
        total += info.file_size
        is_outside = path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename
        is_bomb = info.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * info.compress_size)
        is_plain = stat.S_IFMT(mode) in (0, stat.S_IFREG)
        checks = (
            (is_outside, "leads out of the folder"),
            (not is_plain, "is a link or a device"),
            (is_bomb, f"would unpack to {info.file_size:,} bytes from {info.compress_size:,}"),
            (path in names, "is there twice"),
            (total > MAX_UNPACKED_BYTES or len(members) > MAX_FILES, "is one too many: the archive is far too large"),
        )
        for is_bad, problem in checks:
            if is_bad:
                raise lct.UserError(f"{info.filename!r} in it {problem}", str(archive), remedy)
        names.add(path)


# --- the toy set


class Solid:
    """A body of boxes and round columns, as vertices and polygons of an .off file."""

    def __init__(self) -> None:
        self.vertices: list[tuple[float, float, float]] = []
        self.polygons: list[list[int]] = []

    def add_prism(self, bottom: np.ndarray, top: np.ndarray) -> None:
        """Add the body between two polygons with equally many corners, each (N, 3), counter-clockwise from above."""
        count = len(bottom)
        low = len(self.vertices)  # the first corner of the bottom
        high = low + count
        self.vertices += [tuple(corner) for corner in (*bottom.tolist(), *top.tolist())]
        self.polygons.append([low + corner for corner in reversed(range(count))])
        self.polygons.append([high + corner for corner in range(count)])
        for corner in range(count):
            following = (corner + 1) % count
            self.polygons.append([low + corner, low + following, high + following, high + corner])

    def add_box(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Add a box between two opposite corners."""
        corners = np.array([[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]])
        bottom, top = (np.column_stack([corners, np.full(4, z)]) for z in (low[2], high[2]))
        self.add_prism(bottom, top)

    def add_column(self, radii: tuple[float, float], heights: tuple[float, float]) -> None:
        """Add a round column about the vertical axis; `radii` and `heights` are those of its bottom and its top."""
        angles = np.arange(20) * np.pi / 10
        circle = np.column_stack([np.cos(angles), np.sin(angles)])
        bottom, top = (np.column_stack([r * circle, np.full(20, z)]) for r, z in zip(radii, heights, strict=True))
        self.add_prism(bottom, top)

    def add_legs(self, half: tuple[float, float], thickness: float, height: float) -> None:
        """Add four legs at the corners of a rectangle whose half sides are `half`."""
        for x in (-half[0], half[0] - thickness):
            for y in (-half[1], half[1] - thickness):
                self.add_box((x, y, 0), (x + thickness, y + thickness, height))


def draw_chair(rng: np.random.Generator) -> Solid:
    """Draw a chair: a seat on four legs with a back, and in some cases arms."""
    solid = Solid()
    width, depth = rng.uniform(0.22, 0.3, 2)
    seat, back, thickness = rng.uniform(0.38, 0.52), rng.uniform(0.85, 1.15), rng.uniform(0.06, 0.09)
    solid.add_box((-width, -depth, seat - thickness), (width, depth, seat))
    solid.add_box((-width, depth - thickness, seat), (width, depth, back))
    solid.add_legs((width, depth), thickness, seat - thickness)
    if rng.random() < 0.4:
        for x in (-width, width - thickness):
            solid.add_box((x, -depth, seat + 0.2), (x + thickness, depth, seat + 0.2 + thickness))
            solid.add_box((x, -depth, seat), (x + thickness, -depth + thickness, seat + 0.2))
    return solid


def draw_table(rng: np.random.Generator) -> Solid:
    """Draw a table: a top on four legs, or on a column with a foot."""
    solid = Solid()
    width, depth = rng.uniform(0.42, 0.6), rng.uniform(0.3, 0.45)
    height, thickness = rng.uniform(0.5, 0.75), rng.uniform(0.06, 0.1)
    solid.add_box((-width, -depth, height - thickness), (width, depth, height))
    if rng.random() < 0.7:
        solid.add_legs((width, depth), thickness, height - thickness)
    else:
        solid.add_column((0.08, 0.08), (thickness, height - thickness))
        solid.add_column((0.28, 0.28), (0, thickness))
    return solid


def draw_lamp(rng: np.random.Generator) -> Solid:
    """Draw a lamp: a foot, a pole and a shade."""
    solid = Solid()
    height, foot = rng.uniform(1.0, 1.4), rng.uniform(0.16, 0.26)
    shade, shade_height = rng.uniform(0.22, 0.34), rng.uniform(0.25, 0.4)
    solid.add_column((foot, foot), (0, 0.07))
    solid.add_column((0.04, 0.04), (0.07, height - shade_height))
    solid.add_column((shade, shade * rng.uniform(0.4, 0.8)), (height - shade_height, height))
    return solid


def draw_monitor(rng: np.random.Generator) -> Solid:
    """Draw a monitor: a screen on a stand."""
    solid = Solid()
    width, height, thickness = rng.uniform(0.45, 0.6), rng.uniform(0.45, 0.65), rng.uniform(0.05, 0.1)
    stand, foot = rng.uniform(0.12, 0.25), rng.uniform(0.18, 0.3)
    solid.add_box((-foot, -foot * 0.7, 0), (foot, foot * 0.7, 0.05))
    solid.add_box((-0.06, -0.04, 0.05), (0.06, 0.04, stand))
    solid.add_box((-width, -thickness, stand), (width, thickness, stand + height))
    return solid


TOY_CLASSES = {"chair": draw_chair, "lamp": draw_lamp, "monitor": draw_monitor, "table": draw_table}


def draw_toy_set(folder: Path, count: int = TOY_SHAPES) -> None:
    """Draw `count` shapes of each class as `<class>/<class>_0001.off`, the same ones in every call."""
    for label, (name, draw) in enumerate(TOY_CLASSES.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            solid = draw(np.random.default_rng((label, number)))
            text = format_off(np.array(solid.vertices), solid.polygons)
            (folder / name / f"{name}_{number + 1:04}.off").write_text(text, encoding="ascii")


# --- voxels of a data set; `options` are those of modelit.py


class Shapes(NamedTuple):
    """The voxels of all usable meshes."""

    packed: np.ndarray  # uint8 (N, voxel_size**3 / 8)
    labels: np.ndarray  # int64 (N,)
    held_out: np.ndarray  # bool (N,)
    class_names: list[str]

    def grids(self, rows: np.ndarray, size: int) -> np.ndarray:
        """Unpack the voxels of B rows, float32 (B, 1, size, size, size)."""
        bits = np.unpackbits(self.packed[rows], axis=1)[:, : size**3]
        return bits.reshape(-1, 1, size, size, size).astype(np.float32)


def load_shapes(options: Any, log: Callable[[str], None]) -> tuple[Shapes, list[tuple[str, str]]]:
    """Voxelise the meshes that are not in the cache, and choose which are held out; also return path and problem of unusable ones.

    Raises UserError if fewer than two meshes are usable.
    """
    meshes = list_meshes(options)
    kind = f"{options.voxel_mode} {options.voxel_size} {VOXELS_VERSION}"
    memory = lct.FileMemory(options.download_path / ".voxels")
    cached = memory.recall(kind)
    stamps = list(map(tuple, lct.stat_files(Path(), [str(path) for path, _, _ in meshes]).tolist()))
    names = [str(path.resolve()) for path, _, _ in meshes]
    voxels: list[bytes | str | None] = [
        cached[name][2] if name in cached and cached[name][:2] == stamp else None
        for name, stamp in zip(names, stamps, strict=True)
    ]
    missing = [row for row, packed in enumerate(voxels) if packed is None]
    try:
        for row, packed in zip(missing, voxelize_files([meshes[row][0] for row in missing], options), strict=True):
            voxels[row] = packed
            if isinstance(packed, bytes):
                memory.learn(kind, names[row], stamps[row], packed)
    finally:
        memory.save_early()
    problems = [(names[row], packed) for row, packed in enumerate(voxels) if isinstance(packed, str)]
    for name, reason in problems[:5]:
        log(f"left out: {name}: {reason}")
    usable = [row for row, packed in enumerate(voxels) if isinstance(packed, bytes)]
    if len(usable) < 2:
        problem = f"has too few meshes that can be used: {len(usable)} of {len(meshes)}"
        raise lct.UserError(problem, f"--dataset {' '.join(options.dataset)}", "give two or more")
    if len(problems) > 5:
        log(f"left out: {len(problems) - 5:,} more, see problems.json")
    class_names = sorted({meshes[row][1] for row in usable})
    labels = np.array([class_names.index(meshes[row][1]) for row in usable])
    held_out = np.array([meshes[row][2] for row in usable])
    if not held_out.any() or held_out.all():
        shares = (1 - options.val_split, options.val_split, 0.0)
        held_out = lct.assign_splits(labels, np.arange(len(labels)), shares, options.seed) == 1
    packed = np.frombuffer(b"".join(voxels[row] for row in usable), np.uint8).reshape(len(usable), -1)
    return Shapes(packed, labels, held_out, class_names), problems


def list_meshes(options: Any) -> list[tuple[Path, str, bool]]:
    """Return path, class name and whether it is in a folder named test, for each mesh that is not hidden.

    Raises UserError if there are none.
    """
    meshes = []
    seen = set()  # `modelnet10 chairs` lists each chair twice: it could be held out and trained on
    folders = [folder for source in options.dataset for folder in load_dataset(source, options.download_path)]
    for folder in folders:
        names = glob.iglob("**", root_dir=folder, recursive=True)  # noqa: PTH207  follows links to folders, skips what is hidden
        for relative in sorted(map(Path, names)):
            path = folder / relative
            if path.suffix.lower() not in MESH_SUFFIXES or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            # ModelNet10/chair/train/chair_0001.off is of class chair; without class folders, the class is the name of `folder`.
            parents = (folder.resolve().name, *relative.parts[:-1])
            class_names = [parent for parent in parents if parent not in ("train", "test")]
            if path.stem in ("model", "model_normalized"):  # ShapeNet: <class>/<id>/model.obj, or models/ below <id>
                depth = 2 if class_names[-1:] == ["models"] else 1
                class_names = class_names[:-depth] or class_names
            meshes.append((path, class_names[-1] if class_names else "shape", "test" in parents))
    if not meshes:
        remedy = f"give a folder with <class>/*.off ({' '.join(MESH_SUFFIXES)}), or --dataset toy, which is drawn"
        raise lct.UserError("holds no meshes", f"--dataset {' '.join(options.dataset)}", remedy)
    if options.max_samples:
        counts: Counter[str] = Counter()
        ranks = []  # of each mesh in its class
        for _, name, _ in meshes:
            ranks.append(counts[name])
            counts[name] += 1
        chosen = np.argsort(ranks, kind="stable")[: options.max_samples]
        meshes = [meshes[row] for row in sorted(chosen.tolist())]
    return meshes


def voxelize_files(paths: Sequence[Path], options: Any) -> Iterator[bytes | str]:
    """Yield the packed voxels of each file, or the reason why it cannot be used."""
    voxelize = functools.partial(voxelize_file, size=options.voxel_size, is_solid=options.voxel_mode == "solid")
    if not options.num_workers or len(paths) < 2:
        for path in lct.progress(paths, len(paths), "voxels", unit="mesh"):
            with lct.SIGNALS.hold():  # trimesh swallows exceptions of any kind, from its import on
                packed = voxelize(path)
            yield packed
        return
    context = multiprocessing.get_context("spawn")  # a fork can hang, because torch has threads
    workers = lct.count_workers(options.num_workers)
    with ProcessPoolExecutor(workers, context, follow_parent) as pool:
        try:
            yield from lct.progress(pool.map(voxelize, paths, chunksize=8), len(paths), "voxels", unit="mesh")
        except BrokenProcessPool as error:
            remedy = "lower it if memory is short; the same command continues"
            where = f"--num_workers {options.num_workers}"
            raise lct.UserError("a process that voxelises was killed", where, remedy) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def follow_parent() -> None:
    """Leave Ctrl-C to the parent process, and end with it: after a kill, a pool's processes would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_and_end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


# --- the menu


@dataclass(frozen=True)
class LoaderOptions(lct.Options):
    """Fetch, draw, choose or delete sets of meshes by a menu."""

    download_path: Path = lct.option(Path("datasets"), "folder that data sets are kept in", "data", metavar="DIR")
    debug: bool = lct.same_option("debug")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the menu; return the exit code."""
    return lct.run_program("dataset_loader", LoaderOptions, run_menu, argv)


def run_menu(options: LoaderOptions) -> None:
    """Run entries of the menu until the answers end; report failures, and raise UserError at the end if the answers are piped."""
    names = list(DATASET_LINKS)
    actions = [*names, "choose a folder", "clear"]
    texts = {"choose a folder": "in a window", "clear": f"delete what was fetched to {options.download_path}"}
    for number, name in enumerate(actions, start=1):
        print(f"{number:3}  {name:<16}{texts.get(name) or DATASET_LINKS[name].text}")
    num_failures = 0
    for answer in read_answers():
        action = actions[int(answer) - 1] if answer.isdecimal() and 0 < int(answer) <= len(actions) else answer
        try:
            print(run_action(action, options.download_path))
        except lct.UserError as error:
            num_failures += 1
            print(f"error: {error}", file=sys.stderr)
    if num_failures and not sys.stdin.isatty():
        raise lct.UserError(f"answers that failed: {num_failures}", "the menu", "mend what is said above")


def read_answers() -> Iterator[str]:
    """Yield answers, typed or from a pipe, until the input ends or one is 0 or q."""
    while True:
        print("number or name, 0 = end: ", end="", flush=True)
        answer = sys.stdin.readline()
        if not answer or answer.strip() in ("0", "q"):
            print()
            return
        if answer.strip():
            yield answer.strip()


def run_action(action: str, download_path: Path) -> str:
    """Run an entry of the menu, and return the line to print."""
    if action == "clear":
        return f"deleted: {' '.join(clear_dataset_cache(download_path)) or 'nothing'}"
    if action == "choose a folder":
        return f"chosen: {select_local_dataset() or 'none'}"
    return f"ready: {' '.join(map(str, load_dataset(action, download_path)))}"


if __name__ == "__main__":
    lct.exit_process(main())
