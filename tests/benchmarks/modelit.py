"""How fast tools/modelit.py makes voxels, and what an epoch costs beside a plain loop that makes them with trimesh each time.

    python tests/benchmarks/modelit.py             on one CPU thread: two minutes

Meshes are the drawn toy set, and the real tools and ModelNet10 files of shared/data where these lie beside the repository. The
plain loop is what one writes first: trimesh's `voxelized` and `fill` for each sample of each epoch, float32 grids, the same
networks and losses. Ratios are of seconds in one run; memory is that of the voxels of a data set while it trains.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import trimesh

ROOT = Path(__file__).resolve().parents[2]
MESHES = ROOT.parent / "shared" / "data" / "meshes"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import meshes
from dataset_loader import draw_toy_set

SIZES = (16, 32, 64)
EPOCH_FLAGS = "--epochs 3 --voxel_size 32 --device cpu --text_encoder hash --no-overwrite"


def voxelize_plainly(path: Path, size: int) -> np.ndarray:
    """Return bool (size, size, size) as trimesh makes it: the longest side fills the grid, what is enclosed is filled."""
    read = meshes.read_mesh(path)  # trimesh cannot read all OFF files with polygons
    mesh = trimesh.Trimesh(read.vertices, read.faces)
    filled = mesh.voxelized(float(mesh.extents.max()) / size).fill().matrix
    grid = np.zeros((size,) * 3, bool)
    cut = filled[:size, :size, :size]  # it may have a layer more
    grid[: cut.shape[0], : cut.shape[1], : cut.shape[2]] = cut
    return grid


def seconds_of(make: Callable[[Path, int], np.ndarray], paths: list[Path], size: int) -> list[float]:
    """Return how long each file takes."""
    seconds = []
    for path in paths:
        started = time.perf_counter()
        make(path, size)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Print a table of voxels, and a line about epochs."""
    with tempfile.TemporaryDirectory() as folder:
        toys = Path(folder) / "toys"
        draw_toy_set(toys, 12)
        sets = {"toy set": sorted(toys.rglob("*.off"))}
        if MESHES.is_dir():
            sets |= {"scanned tools": sorted(MESHES.rglob("*.ply")), "ModelNet10": sorted(MESHES.rglob("*.off"))}
        sets = {name: [path for path in paths if len(meshes.read_mesh(path).faces)] for name, paths in sets.items()}
        print("ms a mesh, median; ours, trimesh, ratio (least to most)")
        for name, paths in sets.items():
            for size in SIZES if paths else ():  # clouds of points have no faces, which trimesh needs
                ours = seconds_of(lambda path, size: meshes.voxelize(meshes.read_mesh(path), size, True), paths, size)
                theirs = seconds_of(voxelize_plainly, paths, size)
                ratios = [slow / fast for fast, slow in zip(ours, theirs, strict=True)]
                middle = [1000 * statistics.median(values) for values in (ours, theirs)]
                shown = f"{statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})"
                print(
                    f"{name:14} {len(paths):3} meshes {size:3}^3  {middle[0]:8.1f} {middle[1]:9.1f}  {shown}",
                    flush=True,
                )
        words = f"--mode train --dataset {toys} --checkpoint {folder}/c.pth --out_dir {folder}/rez --download_path {folder}/d"
        command = [sys.executable, ROOT / "tools" / "modelit.py", *words.split(), *EPOCH_FLAGS.split()]
        subprocess.run(command, check=True, capture_output=True)
        (events,) = Path(folder).glob("rez/run_*/logs/metrics.jsonl")
        records = map(json.loads, events.read_text("utf-8").splitlines())
        epoch = min(record["seconds"] for record in records if record["event"] == "epoch_end")
        paths = sets["toy set"]
        voxels = sum(seconds_of(voxelize_plainly, paths, 32))
        print(
            f"epoch of {len(paths)} meshes at 32^3: {epoch:.1f} s; the plain loop has {voxels:.1f} s of voxels more, ",
            end="",
        )
        print(
            f"{(epoch + voxels) / epoch:.1f} times as long. Voxels in memory: {32**3 // 8:,} bytes a mesh, not {32**3 * 4:,}"
        )


if __name__ == "__main__":
    main()
