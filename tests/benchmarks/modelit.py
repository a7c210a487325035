"""How fast tools/modelit.py makes voxels, and what an epoch costs beside a plain loop that makes them with trimesh each time.

    python tests/benchmarks/modelit.py             on one CPU thread: two minutes
    python tests/benchmarks/modelit.py FOLDER      twenty scanned tools, in a new folder: six minutes

Meshes are the drawn toy set, and the real tools and ModelNet10 files of shared/data where these lie beside the repository. The
plain loop is what one writes first: trimesh's `voxelized` and `fill` for each sample of each epoch, float32 grids, the same
networks and losses. Ratios are of seconds in one run; memory is that of the voxels of a data set while it trains.

With FOLDER, the tools of shared/data are turned about the vertical axis into 24 views each, the last of which is held out; they
are learned, and FOLDER/tools.png shows of each tool the view that is held out, what becomes of it, and a shape made of its name.
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
import torch
import trimesh

ROOT = Path(__file__).resolve().parents[2]
MESHES = ROOT.parent / "shared" / "data" / "meshes"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import meshes
import modelit
import voxel_gan
from dataset_loader import draw_toy_set, load_shapes

import lct_dino3 as lct

SIZES = (16, 32, 64)
VIEWS = 24
TOOL_FLAGS = "--voxel_size 32 --hidden_channels 16 --epochs 25 --device cpu --text_encoder hash"
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


def turn_tools(folder: Path) -> None:
    """Write views of each tool as folder/<tool>/train/view_00.ply and so on, the last one in `test`."""
    for path in sorted(MESHES.glob("tools20/*.ply")):
        scan = trimesh.load(path)
        for view in range(VIEWS):
            turned = scan.copy()
            turned.apply_transform(trimesh.transformations.rotation_matrix(2 * np.pi * view / VIEWS, (0, 0, 1)))
            target = folder / path.stem / ("test" if view == VIEWS - 1 else "train") / f"view_{view:02}.ply"
            target.parent.mkdir(parents=True, exist_ok=True)
            turned.export(target)


@torch.inference_mode()
def draw_tools(words: list[str], checkpoint: Path) -> bytes:
    """Return a PNG: two tools a row, and of each the view that is held out, what becomes of it, and a sample."""
    options = lct.parse_options(modelit.ModelitOptions, words, "modelit")
    shapes, _ = load_shapes(options, print)
    payload = modelit.read_state(checkpoint, "")
    model = voxel_gan.CVAE_Conditional(payload["architecture"]).eval()
    model.load_state_dict(payload["model"])
    z = torch.randn(1, options.latent_dim, generator=torch.Generator().manual_seed(0))
    cells = []
    for row in np.flatnonzero(shapes.held_out):
        name = shapes.class_names[shapes.labels[row]].replace("_", " ")
        prompt = torch.from_numpy(voxel_gan.embed_prompts([f"a {name}"], payload["text"], options.cond_dim))
        voxels = torch.from_numpy(shapes.grids(np.array([row]), options.voxel_size))
        made = model.reconstruct(voxels, prompt), model.generate(z, prompt)
        for caption, grid in zip((name, "reconstructed", "sample"), (voxels, *made), strict=True):
            cells.append((caption, meshes.draw_voxels(grid.numpy()[0, 0], modelit.SIGMA, 110)))
    return meshes.encode_png(meshes.draw_sheet([cells[start : start + 6] for start in range(0, len(cells), 6)], 110))


def learn_tools(folder: Path) -> None:
    """Turn the tools, learn them, and draw what comes out."""
    if not (folder / "views").is_dir():
        turn_tools(folder / "views")
    paths = f"--dataset {folder}/views --checkpoint {folder}/tools.pth --out_dir {folder}/rez --download_path {folder}"
    words = [*paths.split(), *TOOL_FLAGS.split()]
    subprocess.run([sys.executable, ROOT / "tools" / "modelit.py", *words], check=True)
    lct.write_bytes(folder / "tools.png", draw_tools(words, folder / "tools.pth"))


def main() -> None:
    """Print a table of voxels, and a line about epochs."""
    if len(sys.argv) > 1:
        learn_tools(Path(sys.argv[1]))
        return
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
