"""Shapes from words: meshes and voxels, training and what it leaves, exact resume, generated meshes, analyses."""

from __future__ import annotations

import contextlib
import csv
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dataset_loader
import meshes
import modelit
import numpy as np
import pytest
import torch
import trimesh
import voxel_gan
from conftest import run_main
from killing import REPO, Nursery, kill
from PIL import Image, ImageColor

import lct_dino3 as lct

TINY = (
    "--voxel_size 8 --hidden_channels 4 --num_encoder_layers 2 --num_decoder_layers 2 --disc_hidden_channels 4"
    " --disc_num_layers 2 --latent_dim 8 --cond_dim 32 --text_encoder hash --device cpu"
).split()
CUBE = trimesh.creation.box()


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shapes of each class."""
    folder = tmp_path_factory.mktemp("toys") / "toys"
    dataset_loader.draw_toy_set(folder, 6)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: what is not named otherwise is written there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Most of the time of a tiny training goes into its 20 pictures an evaluation and the meshes of 64 samples at its end.
FEW_PICTURES = {"SHEET_SIDE": 12, "JUDGED_SAMPLES": 4}


def train(toys: Path, *flags: object) -> int:
    """Train a tiny generator, with small pictures and few samples judged."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW_PICTURES.items():
            patch.setattr(modelit, name, value)
        return train_whole(toys, *flags)


def train_whole(toys: Path, *flags: object) -> int:
    return run_main("modelit", "--mode", "train", "--dataset", toys, *TINY, "--epochs", 4, *flags)


@pytest.fixture(scope="module")
def trained(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a small generator has been trained until it knows its classes."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_whole(toys, "--epochs", 40, "--hidden_channels", 8, "--kl_warmup_epochs", 2) == 0
    return folder


def read_checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def events_of(folder: Path, name: str) -> list[dict]:
    (logs,) = folder.glob("rez/run_*/logs")
    return [event for event in lct.read_events(logs) if event["event"] == name]


# --- meshes


@pytest.mark.parametrize(
    ("text", "faces"),
    [
        ("OFF\n4 2 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 2 3\n", [[0, 1, 2], [0, 2, 3]]),
        ("OFF4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n", [[0, 1, 2], [0, 2, 3]]),
        ("# made by hand\nOFF # really\n\n4 2\n0 0 0 # origin\n1 0 0\n\n1 1 0\n0 1 0\n4 0 1 2 3\n3 0 1 2\n",
            [[0, 1, 2], [0, 2, 3], [0, 1, 2]]),
        ("COFF\n3 1 0\n0 0 0 255 0 0 255\n1 0 0 255 0 0 255\n0 1 0 255 0 0 255\n3 0 1 2 0.5 0.5 0.5\n", [[0, 1, 2]]),
    ],
)  # fmt: skip
def test_off_files_as_they_are_found(text: str, faces: list) -> None:
    mesh = meshes.parse_off(text.replace("\n", "\r\n"))
    assert mesh.faces.tolist() == faces
    assert mesh.vertices[1].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("PLY\n", "line 1: does not begin with OFF"),
        ("OFF\n3 one 0\n", "line 2: is not the numbers of"),
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n\n0 1 0\n", "line 6: ends after 3 lines of the 3 vertices and 1 faces of line 2"),
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n3 0 2 1\n", "line 7: is more than"),
        ("OFF\n2 1 0\n0 0 0\n1 0 0\n0 1 0\n", "line 5: is not a face"),
        ("OFF\n3 1 0\n0 0 0\n1 0\n0 1 0\n3 0 1 2\n", "line 4: is not the three coordinates"),
        ("OFF\n3 1 0\n0 0 0\n1 0 x\n0 1 0\n3 0 1 2\n", "line 4: is not the three coordinates"),
        ("OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n3 0 1 3\n", "line 7: names a vertex that is not one of 0 to 2"),
        ("OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n4 0 1 2\n", "line 7: has 3 of the 4 corners"),
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n4 0 1 2\n", "line 6: has 3 of the 4 corners"),
    ],
)
def test_broken_off_files_are_named_by_line(text: str, said: str) -> None:
    with pytest.raises(meshes.MeshError) as caught:
        meshes.parse_off(text)
    assert str(caught.value).startswith(said)


PLY = """ply
format ascii 1.0
element vertex 3
property float x
property float y
property float z
element face 1
property list uchar int vertex_indices
end_header
0 0 0
1 0 0
0 1 0
3 0 1 """


def test_an_off_file_of_an_editor_in_cyrillic_is_read(tmp_path: Path) -> None:
    """It has a byte order mark, and a letter whose second byte ends a line in Latin-1."""
    (tmp_path / "chair.off").write_text("\ufeffOFF\n# хвост\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "utf-8")
    assert meshes.read_mesh(tmp_path / "chair.off").faces.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("vertex", [3, -1, 10**20])
@pytest.mark.parametrize("start", [PLY, "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 "])
def test_a_face_with_a_vertex_that_is_not_there_is_a_broken_mesh(start: str, vertex: int, tmp_path: Path) -> None:
    path = tmp_path / f"mesh.{start[:3].lower()}"
    path.write_text(f"{start}{vertex}\n")
    assert isinstance(meshes.voxelize_file(path, 8, False), str)


def as_mesh(mesh: trimesh.Trimesh) -> meshes.Mesh:
    return meshes.Mesh(np.asarray(mesh.vertices, dtype=float), np.asarray(mesh.faces))


def test_a_cube_has_all_its_planes() -> None:
    shell = meshes.voxelize(as_mesh(CUBE), 8, is_solid=False)
    assert shell.sum() == 8**3 - 6**3
    assert meshes.voxelize(as_mesh(CUBE), 8, is_solid=True).all()


def test_no_plane_of_a_stack_vanishes_and_none_is_split_in_two() -> None:
    """Plates at every voxel, among them on the border between two: rounding the index loses half of them."""
    corners = np.array([[0, 0], [16, 0], [16, 16], [0, 16.0]])
    vertices = np.concatenate([np.column_stack([corners, np.full(4, 2.0 * level)]) for level in range(8)])
    faces = np.concatenate([np.array([[0, 1, 2], [0, 2, 3]]) + 4 * level for level in range(8)])
    grid = meshes.voxelize(meshes.Mesh(vertices, faces), 16, is_solid=False)
    assert sorted(set(np.flatnonzero(grid.all(axis=(0, 1))).tolist())) == np.flatnonzero(grid.any(axis=(0, 1))).tolist()
    assert grid.any(axis=(0, 1)).sum() == 8


@pytest.mark.parametrize("size", [16, 48])
def test_voxels_of_a_surface_are_those_that_random_points_on_it_fall_into(size: int) -> None:
    mesh = trimesh.creation.torus(1.0, 0.35, 24, 16).apply_transform(
        trimesh.transformations.euler_matrix(0.3, 0.5, 0.7)
    )
    mesh.merge_vertices()
    grid = meshes.voxelize(as_mesh(mesh), size, is_solid=False)
    points, _ = trimesh.sample.sample_surface(mesh, 300_000, seed=0)
    low, high = mesh.bounds
    indices = ((points - (low + high) / 2) * size * (1 - 1e-6) / (high - low).max() + size / 2).astype(int)
    expected = np.zeros_like(grid)
    expected[tuple(np.clip(indices, 0, size - 1).T)] = True
    assert (grid & expected).sum() > 0.9 * expected.sum()
    assert (grid & ~expected).sum() < 0.01 * expected.sum()
    solid = meshes.voxelize(as_mesh(mesh), size, is_solid=True)
    volume = mesh.volume * (size / (high - low).max()) ** 3
    assert solid.sum() > volume > (solid & ~grid).sum(), "the surface closes, and its inside is filled"
    assert solid.sum() > grid.sum()


def test_slivers_are_covered_and_cost_little() -> None:
    vertices = np.array([[0, 0, 0], [60, 0, 0], [30, 0.01, 60], [0, 0, 60.0]])
    triangles = vertices[np.array([[0, 1, 2], [0, 3, 2]])]
    batches = list(meshes.sample_surface(triangles[:, [2, 0, 1]], 0.5))
    assert sum(points.shape[0] for points, *_ in batches) == 2
    thin = np.array([[[0, 0, 0], [1000, 0, 0], [1000, 0.3, 0.0]]])
    assert sum(points.shape[1] for points, *_ in meshes.sample_surface(thin, 0.5)) < 10_000
    for points, part, corners, weights in batches:
        named = np.take_along_axis(triangles[:, [2, 0, 1]][part], corners[:, :, None], axis=1)
        np.testing.assert_allclose(weights @ named, points)


@pytest.mark.parametrize("suffix", ["obj", "ply", "stl"])
def test_other_files_give_the_same_voxels(suffix: str, tmp_path: Path) -> None:
    shape = trimesh.creation.cylinder(0.4, 1.0).apply_translation((3, 2, 1))
    shape.export(tmp_path / f"shape.{suffix}")
    (tmp_path / "shape.off").write_text(meshes.format_off(np.asarray(shape.vertices), shape.faces.tolist()))
    first, second = (
        meshes.voxelize(meshes.read_mesh(tmp_path / f"shape.{name}"), 24, False) for name in (suffix, "off")
    )
    assert (first & second).sum() / (first | second).sum() > 0.97


def test_a_cloud_of_points_becomes_a_shape_without_gaps(tmp_path: Path) -> None:
    """Scanned points lie 1.7 voxels apart, on a plate and on a pole upon it; some scans hold each point twice."""
    steps = np.linspace(0, 1, 20)
    plate = np.stack([*np.meshgrid(steps, steps), np.zeros((20, 20))], axis=-1).reshape(-1, 3)
    pole = np.column_stack([np.full(20, steps[9]), np.full(20, steps[9]), steps])
    for count in (1, 2):
        trimesh.PointCloud(np.concatenate([plate, pole] * count)).export(tmp_path / "cloud.ply")
        grid = meshes.voxelize(meshes.read_mesh(tmp_path / "cloud.ply"), 32, is_solid=False)
        assert grid[:, :, 0].all() and grid[15, 15].all()
        assert grid.sum() < 1.1 * (32 * 32 + 32)


# --- data


def load(toys: Path, *flags: object) -> tuple[dataset_loader.Shapes, list]:
    words = ["--dataset", str(toys), *TINY, *map(str, flags)]
    return dataset_loader.load_shapes(lct.parse_options(modelit.ModelitOptions, words, "modelit"), lambda text: None)


def test_a_broken_mesh_costs_itself_and_is_named(toys: Path, here: Path) -> None:
    shutil.copytree(toys, here / "data")
    (here / "data" / "chair" / "chair_0003.off").write_text("OFF\n3 1 0\n0 0 0\n")
    (here / "data" / "chair" / "flat.off").write_text("OFF\n3 1 0\n1 1 1\n1 1 1\n1 1 1\n3 0 1 2\n")
    for name, value in (
        ("huge", "1e308"),
        ("nan", "nan"),
        ("tiny", "1e-320"),
    ):  # -1e308 to 1e308 is more than float64 has
        (here / "data" / "chair" / f"{name}.off").write_text(f"OFF\n3 1 0\n{value} 0 0\n-{value} 0 0\n0 0 0\n3 0 1 2\n")
    shapes, problems = load(here / "data")
    assert len(shapes.labels) == 23
    assert [(Path(path).name, reason.split(":")[0]) for path, reason in problems] == [
        ("chair_0003.off", "line 3"),
        ("flat.off", "has no extent"),
        ("huge.off", "has vertices that are no finite numbers, or far too large"),
        ("nan.off", "has vertices that are no finite numbers, or far too large"),
        ("tiny.off", "has no extent"),
    ]


def test_too_few_meshes_name_what_there_is_and_no_file_that_is_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "data").mkdir()
    for number in range(7):
        (here / "data" / f"{number}.off").write_text("OFF\n3 1 0\n0 0 0\n")
    assert train(here / "data") == 2
    output = capsys.readouterr()
    assert "has too few meshes that can be used: 0 of 7" in output.err
    assert output.out.count("line 3: ends after 1 lines") == 5 and "problems.json" not in output.out


def test_a_mesh_that_two_sources_hold_counts_once(toys: Path, here: Path) -> None:
    shapes, _ = load(toys, "--dataset", toys / "chair", toys, toys)
    assert len(shapes.labels) == 24 and shapes.class_names == ["chair", "lamp", "monitor", "table"]


def test_links_to_folders_are_followed(toys: Path, here: Path) -> None:
    (here / "data" / ".hidden").mkdir(parents=True)
    shutil.copy(toys / "lamp" / "lamp_0001.off", here / "data" / ".hidden")
    (here / "data" / "chair").symlink_to(toys / "chair")
    shapes, _ = load(here / "data")
    assert len(shapes.labels) == 6 and shapes.class_names == ["chair"]


def test_a_killed_process_that_voxelises_is_one_sentence(toys: Path, here: Path) -> None:
    def kill_first() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    threading.Thread(target=kill_first, daemon=True).start()
    with pytest.raises(lct.UserError, match="--num_workers 1: a process that voxelises was killed"):
        load(toys, "--num_workers", 1)


def swallow_signal(number: int, call: Any) -> Any:
    """Return `call`, which a signal interrupts, as trimesh has it: `except BaseException` stands at 70 places in it."""

    def wrapper(*arguments: Any, **named: Any) -> Any:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
            return call(*arguments, **named)

    return wrapper


def test_a_signal_while_trimesh_works_ends_the_program(
    toys: Path, trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It swallowed the exception of the handler: all other meshes were voxelised, and `generate` ended as if nothing had come."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for name in ("extract_surface", "encode_mesh"):
            with monkeypatch.context() as patch:
                patch.setattr(modelit, name, swallow_signal(signal.SIGTERM, getattr(modelit, name)))
                assert generate(trained, "--output", f"{name}.obj", "--preview", "all.png") == 143
            assert not (here / "all.png").exists() and "the same command starts again" in capsys.readouterr().err
            assert not (here / f"{name}.obj").exists()
        voxelize = swallow_signal(signal.SIGTERM, meshes.voxelize_file)
        monkeypatch.setattr(dataset_loader, "voxelize_file", voxelize)
        assert train(toys) == 143
        said = capsys.readouterr().err
        assert "the same command continues" in said and "--resume" not in said and not (here / "rez").exists()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_processes_that_voxelise_end_with_a_killed_parent(toys: Path, here: Path) -> None:
    words = ["--mode", "train", "--dataset", toys, *TINY, "--voxel_size", 256, "--num_workers", 1]
    command = [sys.executable, REPO / "tools" / "modelit.py", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        names = [b""]
        while not any(b"spawn_main" in name for name in names):
            assert process.poll() is None
            time.sleep(0.1)
            names = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children.read_text().split()]
        process.kill()
    deadline = time.monotonic() + 60
    while any(is_in_session(int(path.name), process.pid) for path in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def is_in_session(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False


def test_voxels_are_computed_once(toys: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toys, here / "data")
    first, _ = load(here / "data")
    seen = []
    voxelize = meshes.voxelize_file
    monkeypatch.setattr(
        dataset_loader, "voxelize_file", lambda path, **kw: seen.append(path.name) or voxelize(path, **kw)
    )
    second, _ = load(here / "data")
    assert seen == [] and (first.packed == second.packed).all()
    os.utime(here / "data" / "lamp" / "lamp_0002.off", (1, 1))
    load(here / "data")
    assert seen == ["lamp_0002.off"]
    load(here / "data", "--voxel_mode", "solid")
    assert len(seen) == 25, "other voxels are others"


def test_voxels_do_not_depend_on_processes(toys: Path, here: Path) -> None:
    first, _ = load(toys)
    second, _ = load(toys, "--num_workers", 2, "--download_path", here / "other")
    assert (first.packed == second.packed).all()


def test_folders_named_test_are_held_out_else_a_share_of_each_class(
    toys: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, _ = load(toys, "--val_split", 0.34)
    assert np.bincount(shapes.labels[shapes.held_out]).tolist() == [2, 2, 2, 2]
    for name in ("chair", "lamp"):
        for split, numbers in (("train", (1, 2, 3)), ("test", (4,))):
            (here / "net" / name / split).mkdir(parents=True)
            for number in numbers:
                shutil.copy(toys / name / f"{name}_{number:04}.off", here / "net" / name / split)
    (here / "net/chair/train/gone.off").symlink_to("nowhere.off")
    shapes, problems = load(here / "net")
    assert [Path(name).name for name, _ in problems] == ["nowhere.off"]
    assert shapes.class_names == ["chair", "lamp"] and shapes.labels.tolist() == [0] * 4 + [1] * 4
    assert shapes.held_out.tolist() == [True, False, False, False] * 2
    assert np.bincount(load(toys, "--max_samples", 8)[0].labels).tolist() == [2, 2, 2, 2]
    monkeypatch.chdir(here / "net/lamp/test")
    options = lct.parse_options(modelit.ModelitOptions, ["--dataset", "."], "modelit")
    assert dataset_loader.list_meshes(options) == [(Path("lamp_0004.off"), "shape", True)]


def test_classes_of_shapenet_are_those_of_its_folders(tmp_path: Path) -> None:
    for name in ("v1/0300/a1/model.obj", "v1/0437/b2/model.obj", "v2/0300/a1/models/model_normalized.obj"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    found = []
    for folder in ("v1", "v2", "v2/0300"):
        options = lct.parse_options(modelit.ModelitOptions, ["--dataset", str(tmp_path / folder)], "modelit")
        found.append([name for _, name, _ in dataset_loader.list_meshes(options)])
    assert found == [["0300", "0437"], ["0300"], ["0300"]]


def test_baselines_are_those_of_a_loop(toys: Path, here: Path) -> None:
    words = ["--dataset", str(toys), *TINY, "--val_split", "0.34"]
    options = lct.parse_options(modelit.ModelitOptions, words, "modelit")
    shapes, _ = dataset_loader.load_shapes(options, print)
    grids = shapes.grids(np.arange(len(shapes.labels)), 8)[:, 0] > 0
    judged = []
    for label in range(4):
        members = grids[(shapes.labels == label) & ~shapes.held_out]

        def score(rows: np.ndarray, level: float, members: np.ndarray = members) -> list[float]:
            answer = members.mean(axis=0) >= level
            return [(answer & grid).sum() / (answer | grid).sum() for grid in rows]

        judged.append((score, members, grids[(shapes.labels == label) & shapes.held_out]))
    levels = np.arange(1, 10) / 10
    level = max(levels, key=lambda level: sum(sum(score(members, level - 1e-6)) for score, members, _ in judged))
    expected = np.mean([value for score, _, rows in judged for value in score(rows, level - 1e-6)])
    assert modelit.score_baselines(shapes, options.voxel_size)["class_mean"] == pytest.approx(expected, abs=1e-5)


# --- the model


def test_iou_and_kl_are_those_of_the_books() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities, voxels = (
        torch.rand(3, 1, 4, 4, 4, generator=generator),
        torch.rand(3, 1, 4, 4, 4, generator=generator).round(),
    )
    found = voxel_gan.compute_iou(probabilities, voxels)
    for row in range(3):
        first = {i for i, value in enumerate(probabilities[row].flatten()) if value >= 0.5}
        second = {i for i, value in enumerate(voxels[row].flatten()) if value == 1}
        assert found[row].item() == pytest.approx(len(first & second) / len(first | second))
    mean, log_variance = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).mean()
    torch.testing.assert_close(voxel_gan.kl_divergence(mean, log_variance), expected)


def make_state(*flags: str) -> voxel_gan.TrainState:
    options = lct.parse_options(modelit.ModelitOptions, [*TINY, *flags], "modelit")
    return voxel_gan.start_state(options, lct.make_runtime(0, "fp32"))


@pytest.mark.parametrize("layers", [1, 3])
def test_flags_shape_the_networks(layers: int) -> None:
    state = make_state(
        *("--num_encoder_layers", "2", "--num_decoder_layers", str(layers), "--disc_num_layers", str(layers)),
        *("--hidden_channels", "6", "--use_batch_norm", "--dropout_rate", "0.5", "--latent_dim", "5"),
    )
    kinds = [type(module) for module in state.model.decoder.modules()]
    assert kinds.count(torch.nn.ConvTranspose3d) == layers and kinds.count(torch.nn.BatchNorm3d) == layers - 1
    assert [m.out_channels for m in state.model.encoder.modules() if isinstance(m, torch.nn.Conv3d)] == [6, 12]
    assert torch.nn.Dropout3d in [type(module) for module in state.model.encoder.modules()]
    voxels, prompts = torch.zeros(2, 1, 8, 8, 8), torch.ones(2, 32)
    logits, mean, _ = state.model(voxels, prompts, torch.tensor([True, False]))
    assert logits.shape == voxels.shape and mean.shape == (2, 5)
    assert state.discriminator(voxels, prompts).shape == (2,)
    assert [max(group["peak_lr"] for group in optimizer.param_groups) for optimizer in state.optimizers] == [5e-3, 5e-4]


def test_each_optimizer_moves_its_own_network_alone() -> None:
    state = make_state()
    for position in (0, 1):
        before = [[p.clone() for p in net.parameters()] for net in (state.model, state.discriminator)]
        logits, mean, _ = state.model(torch.ones(2, 1, 8, 8, 8), torch.ones(2, 32), torch.tensor([True, True]))
        voxel_gan.take_step(
            state, position, state.discriminator(logits.sigmoid(), torch.ones(2, 32)).sum() + mean.sum()
        )
        changed = [
            any(not torch.equal(old, new) for old, new in zip(olds, net.parameters(), strict=True))
            for olds, net in zip(before, (state.model, state.discriminator), strict=True)
        ]
        assert changed == [position == 0, position == 1]


def test_a_gradient_of_one_network_that_overflows_costs_the_other_nothing() -> None:
    """What half precision does on a GPU, by the scalers of the CPU: each optimizer has its own."""
    plain, scaled = make_state(), make_state()
    scaled.scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**16) for _ in range(2)]
    before = scaled.model.empty.clone()
    voxel_gan.take_step(scaled, 0, scaled.model.empty.sum() * 1e38)
    for state in (plain, scaled):
        voxel_gan.take_step(state, 1, state.discriminator(torch.ones(2, 1, 8, 8, 8), torch.ones(2, 32)).sum())
    assert [scaler.get_scale() for scaler in scaled.scalers] == [2.0**15, 2.0**16]
    assert torch.equal(scaled.model.empty, before)
    start = make_state().discriminator.state_dict()
    for name, value in scaled.discriminator.state_dict().items():
        torch.testing.assert_close(value, plain.discriminator.state_dict()[name])
        assert not torch.equal(value, start[name])


def test_the_discriminator_sees_probabilities_in_training(
    toys: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = voxel_gan.Discriminator.forward
    monkeypatch.setattr(
        voxel_gan.Discriminator,
        "forward",
        lambda self, voxels, condition: (
            seen.append((voxels.min().item(), voxels.max().item())) or forward(self, voxels, condition)
        ),
    )
    assert train(toys, "--epochs", 1) == 0
    assert min(low for low, _ in seen) >= 0 and max(high for _, high in seen) <= 1
    assert len(seen) == 3 + 2 * 2, "twenty shapes are three steps of the generator and two of the discriminator"


def test_prompts_of_the_hash_are_near_when_they_are_spelled_nearly_alike() -> None:
    text = {"encoder": "hash", "pretrained": ""}
    chair, chairs, table, said = voxel_gan.embed_prompts(
        ["chair", "a 3d model of chairs", "table", "a CHAIR"], text, 256
    )
    assert chair @ chairs > 0.6 > 0.3 > chair @ table
    np.testing.assert_allclose([np.linalg.norm(chairs), chair @ said], 1, rtol=1e-5)


# --- training


def test_nearest_shapes_are_those_of_all_references(toys: Path, here: Path) -> None:
    """More references than are compared at a time, and all of one class but the last."""
    shapes, _ = load(toys)
    rows = np.array([*np.flatnonzero(shapes.labels == 1)] * 30 + [np.flatnonzero(shapes.labels == 0)[0]])
    many = shapes._replace(packed=shapes.packed[rows], labels=shapes.labels[rows], held_out=np.zeros(len(rows), bool))
    words = ["--dataset", str(toys), *TINY]
    options = lct.parse_options(modelit.ModelitOptions, words, "modelit")
    runtime = lct.make_runtime(0, "fp32")
    chair, lamp = (torch.from_numpy(many.grids(rows, 8)) for rows in (np.array([len(rows) - 1]), np.array([0])))
    answers = iter([chair, lamp, lamp, lamp] * 16)  # to prompts of chair, lamp, monitor and table
    state = voxel_gan.start_state(options, runtime)
    state.model.generate = lambda z, prompts: next(answers)
    job = modelit.Job(options, runtime, many, torch.zeros(4, 1, 32), {}, None, here, {})
    judged = modelit.judge_samples(job, state)
    assert judged == {"samples": 64, "adherence": 0.5, "closed": 1.0, "nearest_iou": 1.0}


def test_a_run_leaves_what_is_promised(trained: Path) -> None:
    (run,) = trained.glob("rez/run_*")
    names = {path.name for path in (run / "logs").iterdir()}
    assert {"train.log", "metrics.jsonl", "config.json", "problems.json", "curves.png", "samples_ep0040.png"} <= names
    records = events_of(trained, "epoch_end")
    assert [record["epoch"] for record in records] == list(range(1, 41))
    for name in (
        "recon",
        "kl",
        "adv",
        "disc_real_acc",
        "disc_fake_acc",
        "iou",
        "val_iou",
        "mean_shape",
        "class_mean",
        "seconds",
    ):
        assert all(record[name] is not None for record in records), name
    verdicts = {path.parent.name for path in trained.glob("rez/*/run_*")}
    score = records[-1]["val_iou"]
    assert verdicts == {"good" if score >= 0.7 else "bad" if score <= 0.5 else "neutral"}
    (copy,) = trained.glob("rez/*/run_*/weights/vae_gan_test.pth")
    assert copy.read_bytes() == (trained / "vae_gan_test.pth").read_bytes()
    with Image.open(run / "logs" / "samples_ep0040.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 50, "something is drawn"


def test_it_learns(trained: Path) -> None:
    records = events_of(trained, "epoch_end")
    assert records[-1]["recon"] < 0.5 * records[0]["recon"]
    assert records[-1]["val_iou"] > records[-1]["mean_shape"] + 0.1
    (judged,) = events_of(trained, "samples_end")
    assert judged["adherence"] >= 0.8 and judged["closed"] >= 0.9 and judged["samples"] == 64


def test_the_recorded_held_out_iou_is_that_of_the_checkpoint(trained: Path, toys: Path) -> None:
    payload = read_checkpoint(trained / "vae_gan_test.pth")
    model = voxel_gan.CVAE_Conditional(payload["architecture"]).eval()
    model.load_state_dict(payload["model"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        shapes, _ = load(toys)
    rows = np.flatnonzero(shapes.held_out)
    voxels = torch.from_numpy(shapes.grids(rows, 8))
    texts = [f"a {shapes.class_names[label]}" for label in shapes.labels[rows]]
    prompts = torch.from_numpy(voxel_gan.embed_prompts(texts, payload["text"], 32))
    logits = model(voxels, prompts, torch.ones(len(rows), dtype=torch.bool))[0]
    answers = logits.detach().numpy() >= 0
    wanted = voxels.numpy() > 0
    expected = np.mean([(a & w).sum() / (a | w).sum() for a, w in zip(answers, wanted, strict=True)])
    assert events_of(trained, "epoch_end")[-1]["val_iou"] == pytest.approx(expected, abs=1e-5)


def flatten(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{name}/{key}")
    else:
        yield name, (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


PLANS = (
    kill("load_shapes", 1, when="after"),
    kill("train_epoch", 1),
    kill("take_step", 7),
    kill("lct.RunDirectory.event", 2, when="after"),  # the epoch is recorded, and not saved
    kill("Job.save", 2, when="after"),
    kill("score_held_out", 1, number=15),
    kill("take_step", 4, number=2),
    kill("judge_samples", 1),
    kill("copy_to_verdict", 1),
)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    toys: Path, tmp_path: Path, nursery: Nursery
) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    command = ("modelit", "--dataset", toys, *TINY, "--dropout_rate", 0.2, "--use_batch_norm", "--epochs", 6)

    def start(folder: Path, *plans: dict) -> tuple[int, str]:
        folder.mkdir(exist_ok=True)
        paths = ("--checkpoint", folder / "gan.pth", "--out_dir", folder / "rez", "--download_path", folder)
        return nursery.run(*command, *paths, plans=list(plans), constants=FEW_PICTURES)

    for plan in PLANS:
        code, output = start(parts, plan)
        number = plan["signal"]
        assert code == (-9 if number == 9 else 128 + number), output
        if number != 9:
            assert [*parts.glob("rez/*/run_*/weights/gan.pth")], "a verdict also when it was interrupted"
    for folder in (parts, whole):
        code, output = start(folder)
        assert code == 0, output
    first, second = (dict(flatten(read_checkpoint(folder / "gan.pth"))) for folder in (parts, whole))
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} == {"/run"}
    recorded = []
    for folder in (parts, whole):
        events = events_of(folder, "epoch_end") + events_of(folder, "samples_end")[-1:]
        recorded.append(
            [{key: value for key, value in event.items() if key not in ("time", "seconds")} for event in events]
        )
    assert recorded[0] == recorded[1] and len(recorded[0]) == 7
    assert len([*parts.glob("rez/*/run_*")]) == 1, "one verdict"


def test_settings_of_another_run_are_refused_and_overwrite_moves_it_aside(
    toys: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(toys, "--epochs", 1) == 0
    assert train(toys, "--epochs", 1, "--latent_dim", 9) == 2
    error = capsys.readouterr().err
    assert "latent_dim: 8 -> 9" in error and "--checkpoint" in error and "--out_dir" not in error
    old = (here / "vae_gan_test.pth").read_bytes()
    assert train(toys, "--epochs", 1, "--latent_dim", 9, "--overwrite") == 0
    (aside,) = here.glob("vae_gan_test.pth.old-*")
    assert aside.read_bytes() == old
    (here / "vae_gan_test.pth").write_bytes(old[:1000])
    assert train(toys, "--epochs", 1) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit_cost_one_sentence(
    trained: Path, toys: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(**changes: object) -> Path:
        torch.save({**payload, **changes}, here / "spoiled.pth")
        return here / "spoiled.pth"

    payload = read_checkpoint(trained / "vae_gan_test.pth")
    less = {name: value for name, value in payload["architecture"].items() if name != "cond_dim"}
    for changes in (
        {"architecture": {**payload["architecture"], "latent_dim": 9}},
        {"architecture": less},
        {"discriminator": dict(list(payload["discriminator"].items())[1:])},
        {"text": {"encoder": "letters", "pretrained": ""}},
        {"identity": None},
    ):
        path = spoil(**changes)
        for flags in (("--mode", "generate"), ("--mode", "train", "--dataset", toys, *TINY)):
            assert run_main("modelit", *flags, "--checkpoint", path) == 2
            output = capsys.readouterr()
            assert f"--checkpoint {path}: " in output.err and "Traceback" not in output.err
    (here / "folder").mkdir()
    for flags in ((), ("--overwrite",)):
        assert train(toys, "--checkpoint", here / "folder", *flags) == 2
        assert "folder: is not a file" in capsys.readouterr().err and (here / "folder").is_dir()


def test_a_verdict_that_cannot_be_copied_is_said_and_the_last_one_stays(
    toys: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(toys, "--epochs", 1) == 0
    (run,) = here.glob("rez/run_*")
    (run / "gone").symlink_to("nowhere")
    assert train(toys, "--epochs", 2) == 2
    assert "cannot be written: [Errno 2] No such file" in capsys.readouterr().err
    assert [*here.glob("rez/*/run_*/weights/*.pth")]


def test_a_run_does_not_save_to_the_checkpoint_of_another(
    toys: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both began while there was no checkpoint: each had a folder of its own, and in one the weights of the other."""
    codes = []

    def start_another(*arguments: object) -> object:
        if not codes:
            codes.append(0)
            codes[0] = train(toys, "--out_dir", "other")
        return load_shapes(*arguments)

    load_shapes = modelit.load_shapes
    monkeypatch.setattr(modelit, "load_shapes", start_another)
    assert train(toys) == 0 and codes == [2]
    assert ".vae_gan_test.pth.lock: is in use by process" in capsys.readouterr().err
    assert not (here / "other").exists() and not [*here.glob("vae_gan_test.pth.old-*")]


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    toys: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "run_now")
    for name in ("first.pth", "second.pth"):
        assert train(toys, "--epochs", 1, "--checkpoint", name) == 0
    copies = sorted(path.relative_to(here) for path in here.glob("rez/run_*/weights/*"))
    assert copies == [Path("rez/run_now/weights/first.pth"), Path("rez/run_now_/weights/second.pth")]


def test_nothing_is_called_held_out_where_nothing_is(
    toys: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(toys, "--val_split", 0, "--epochs", 1, "--max_samples", 4) == 0
    output = capsys.readouterr().out
    assert "held-out" not in output and output.count("training (nothing is held out) IoU") == 2


def test_a_collapsed_posterior_is_said_with_its_knob(
    toys: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(toys, "--epochs", 6, "--kl_weight", 1000, "--kl_warmup_epochs", 0) == 0
    output = capsys.readouterr().out
    assert "the posterior has collapsed" in output and "lower --kl_weight 1000" in output


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing_of_it(
    toys: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(toys, "--epochs", 3, "--lr", 0.9, "--max_samples", 12) in (0, 3)  # nothing to assert but that it ends
    monkeypatch.setattr(modelit, "kl_divergence", lambda mean, log_variance: mean.sum() * math.nan)
    assert train(toys, "--epochs", 3, "--checkpoint", "nan.pth") == 3
    assert read_checkpoint(here / "nan.pth")["epoch"] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--voxel_size", 20, "--num_encoder_layers", 3),
            "give --voxel_size 16 or 24, or --num_encoder_layers 2 or fewer",
        ),
        (("--voxel_size", 5), "give --voxel_size 4 or 8"),
        (("--use_batch_norm", "--batch_size", 1, "--disc_num_layers", 3), "needs two shapes a step"),
        (("--dataset", "a" * 256), "aaa: File name too long\n  check the path"),
        (("--dataset", "nowhere"), "is neither a folder nor a known data set"),
        (("--dataset", "shapenetcore"), "needs a login"),
        (("--prompt", "a", "--prompts", __file__), "contradict each other"),
        (("--resume",), "--checkpoint vae_gan_test.pth: does not exist"),
        (("--mode", "generate"), "train first"),
        (("--learning_rate", 1), "unknown argument"),
        (("--text_encoder", "openclip", "--clip_pretrained", "/no/such/file.pt"), "--text_encoder hash works offline"),
    ],
)
def test_mistakes_cost_one_sentence(
    flags: tuple, said: str, toys: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(toys, *flags) == 2
    output = capsys.readouterr()
    assert said in output.err and "Traceback" not in output.err
    assert not [*here.glob("rez/run_*")] and not [*here.glob("*.pth")]


def test_help_shows_defaults_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_main("modelit", "--help")
    assert "[testdataset]\n" in capsys.readouterr().out


def test_files_that_hold_no_weights_of_clip_are_called_that(
    toys: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.pt").write_text("hello")
    assert train(toys, "--text_encoder", "openclip", "--clip_pretrained", "./text.pt") == 2
    assert "./text.pt: the file holds no weights of ViT-B-32" in capsys.readouterr().err


def test_without_open_clip_it_says_how_to_get_it(
    toys: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert train(toys, "--text_encoder", "openclip") == 2
    assert "pip install open_clip_torch" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_said(
    toys: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert train(toys, "--device", "gpu", "--epochs", 1, "--amp", "--parallel") == 0
    assert "--device gpu: there is none; it goes on with the CPU" in capsys.readouterr().out


# --- generate and analyze


def generate(trained: Path, *flags: object) -> int:
    return run_main("modelit", "--mode", "generate", "--checkpoint", trained / "vae_gan_test.pth", *flags)


def test_a_prompt_becomes_a_watertight_mesh_in_the_unit_cube(trained: Path, here: Path) -> None:
    assert (
        generate(trained, "--prompt", "3d model of a chair\nv 9 9 9", "--output", "chair.obj", "--preview", "chair.png")
        == 0
    )
    lines = (here / "chair.obj").read_text().splitlines()
    assert lines[0] == "# prompt: 3d model of a chair v 9 9 9" and lines[1].startswith("# latent_seed 0")
    assert any("hash of letters" in line for line in lines[:5])
    mesh = trimesh.load(here / "chair.obj")
    assert mesh.is_watertight and mesh.volume > 0
    np.testing.assert_allclose([mesh.bounds.min(), mesh.bounds.max()], [0, 1], atol=1e-6)
    with Image.open(here / "chair.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


@pytest.mark.parametrize("kind", ["obj", "ply", "stl", "glb", "png"])
def test_what_it_has_written_is_replaced_and_nothing_else(
    trained: Path, here: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    def write() -> int:
        flag, others = ("--preview", "--output a.obj") if kind == "png" else ("--output", "--preview a.png")
        return generate(trained, "--prompt", "a chair", flag, f"mine.{kind}", *others.split())

    path = here / f"mine.{kind}"
    path.write_bytes(b"ply\nof somebody")
    assert write() == 2 and path.read_bytes() == b"ply\nof somebody"
    assert f"mine.{kind}: is no such file of this tool, and is not overwritten" in capsys.readouterr().err
    path.unlink()
    assert write() == 0
    if kind != "png":
        assert trimesh.load(path, force="mesh").is_watertight
    assert write() == 0


def test_the_shape_is_that_of_the_prompts_class(trained: Path, toys: Path, here: Path) -> None:
    (here / "prompts.txt").write_text("a chair\n\na lamp\n3d model of a monitor\ntable\n")
    assert generate(trained, "--prompts", "prompts.txt", "--output", "all.ply", "--num_samples", 2) == 0
    paths = sorted(here.glob("all_*.ply"))
    assert len(paths) == 8
    shapes, _ = load(toys)
    references = shapes.grids(np.arange(len(shapes.labels)), 8)[:, 0] > 0
    named = []
    for path in paths:
        grid = meshes.voxelize(meshes.read_mesh(path), 8, is_solid=True)
        overlaps = (references & grid).sum(axis=(1, 2, 3)) / (references | grid).sum(axis=(1, 2, 3))
        named.append(shapes.class_names[shapes.labels[overlaps.argmax()]])
    right = [
        name == wanted for name, wanted in zip(named, np.repeat(["chair", "lamp", "monitor", "table"], 2), strict=True)
    ]
    assert sum(right) >= 6, named


def test_z_is_a_function_of_the_seed_or_of_a_file(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bytes_of(*flags: object) -> bytes:
        assert generate(trained, "--output", "one.stl", *flags) == 0
        return (here / "one.stl").read_bytes()

    first = bytes_of("--latent_seed", 3)
    assert bytes_of("--latent_seed", 3) == first != bytes_of("--latent_seed", 4)
    np.save("z.npy", torch.randn(1, 8, generator=torch.Generator().manual_seed(3)).numpy()[0])
    assert bytes_of("--z", "z.npy") == first
    np.save("wrong.npy", np.zeros(9))
    np.save("object.npy", np.array([{}], dtype=object))
    np.save("complex.npy", np.zeros(8, complex))
    np.save("huge.npy", np.full(8, 1e300))
    np.savez("archive.npz", np.zeros(8))
    Path("half.npz").write_bytes(b"PK\3\4")
    for name in ("wrong.npy", "object.npy", "complex.npy", "huge.npy", "archive.npz", "half.npz"):
        assert generate(trained, "--z", name) == 2
        assert f"--z {name}" in capsys.readouterr().err


@pytest.mark.filterwarnings("error", "ignore:Setting the shape:DeprecationWarning")  # scikit-image with numpy 2.5
def test_blank_prompts_are_none_and_byte_order_marks_are_no_letters(trained: Path, here: Path) -> None:
    assert generate(trained, "--prompt", " ", "--output", "blank.OBJ") == 0
    assert (here / "blank.OBJ").read_text().startswith("# no prompt"), "the name is kept as it was typed"
    (here / "prompts.txt").write_text("a chair\n", encoding="utf-8-sig")
    assert generate(trained, "--prompts", "prompts.txt", "--output", "chair.obj") == 0
    assert (here / "chair.obj").read_text().startswith("# prompt: a chair\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--voxel_size", 16), "--voxel_size 16: vae_gan_test.pth was trained with 8"),
        (("--text_encoder", "openclip"), "--text_encoder openclip: vae_gan_test.pth was trained with hash"),
        (("--preview", "shape.obj", "--output", "shape.obj"), "--preview shape.obj: is no PNG"),
        (("--output", ".", "--format", "obj"), "--output .: is a folder"),
        (("--latent_seed", 2**64), "--latent_seed: is too large a number"),
    ],
)
def test_what_contradicts_the_checkpoint_or_itself(
    trained: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    assert run_main("modelit", "--mode", "generate", *flags) == 2
    assert said in capsys.readouterr().err and not [*trained.glob("*.obj")]


def test_guidance_goes_beyond_the_shape_without_prompt() -> None:
    model = make_state().model.eval()
    z, prompts = torch.randn(2, 8), torch.nn.functional.normalize(torch.randn(2, 32))
    with torch.no_grad():
        model.empty.copy_(torch.randn(32) / 6)
        plain, without = (model.generate(z, what).logit() for what in (prompts, None))
        guided = model.generate(z, prompts, 3.0).logit()
        torch.testing.assert_close(guided, without + 3 * (plain - without), rtol=1e-3, atol=1e-4)
        assert not torch.equal(plain, without)


def test_levels_outside_the_values_and_empty_grids(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(trained, "--level", 1.0, "--output", "high.obj") == 0
    assert "level 1 lies outside the values" in capsys.readouterr().out
    payload = read_checkpoint(trained / "vae_gan_test.pth")
    (name,) = [
        name for name, value in payload["model"].items() if name.startswith("decoder.layers") and value.shape == (1,)
    ]
    for shift in (-40, float("nan")):
        payload["model"][name] += shift
        torch.save(payload, here / "empty.pth")
        assert generate(trained, "--checkpoint", here / "empty.pth", "--output", "empty.obj") == 2
        assert "is empty" in capsys.readouterr().err and not (here / "empty.obj").exists()
    assert generate(trained, "--output", "shape.xyz") == 2
    assert "is no kind of mesh" in capsys.readouterr().err
    assert generate(trained, "--output", "shape.xyz", "--format", "glb") == 0
    assert trimesh.load(here / "shape.xyz.glb", force="mesh").is_watertight


def test_a_dot_in_the_name_of_a_mesh_is_kept_and_a_kind_of_mesh_replaced(trained: Path, here: Path) -> None:
    for name, written in (("g_1.5", "g_1.5.obj"), ("g_1.7", "g_1.7.obj"), ("g.PLY", "g.obj"), ("h.OBJ", "h.OBJ")):
        before = {path.name for path in here.iterdir()}
        assert generate(trained, "--output", name, "--format", "obj") == 0
        assert {path.name for path in here.iterdir()} - before == {written}


def test_an_analysis_is_that_of_numpy(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a chair", "a table, round", "chairs", "лампа"]
    (here / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    command = ("modelit", "--mode", "analyze", "--checkpoint", trained / "vae_gan_test.pth")
    assert run_main(*command, "--prompts", "prompts.txt") == 0
    said = capsys.readouterr().out
    tables = {}
    for name in ("embeddings", "cosine", "pca"):
        with open(here / "rez" / "analysis" / f"{name}.csv", encoding="utf-8", newline="") as file:
            _, *rows = csv.reader(file)
        assert [row[0] for row in rows] == prompts
        tables[name] = np.array([row[1:] for row in rows], dtype=float)
    vectors = tables["embeddings"]
    np.testing.assert_allclose(tables["cosine"], vectors @ vectors.T, atol=1e-5)
    from sklearn.decomposition import PCA

    pca = PCA(2).fit(vectors)
    np.testing.assert_allclose(np.abs(tables["pca"]), np.abs(pca.transform(vectors)), atol=1e-5)
    assert f"two components hold {pca.explained_variance_ratio_.sum():.0%} of the variance" in said
    for name in ("cosine", "pca"):
        with Image.open(here / "rez" / "analysis" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    picture = meshes.draw_points(np.array([[0.0, 0.0]] * 6 + [[1.0, 1.0]]), "abcdefg")  # more points than colours
    assert picture.getpixel((550, 90)) == ImageColor.getrgb(meshes.COLOURS[0]), "one far from all others is inside"
    assert run_main(*command) == 0, "without prompts, the classes"


def test_an_analysis_takes_what_is_typed_and_no_other_checkpoint(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("modelit", "--mode", "analyze", "--checkpoint", "clip.pth")
    assert run_main(*command) == 2
    assert "--checkpoint clip.pth: does not exist" in capsys.readouterr().err
    payload = read_checkpoint(trained / "vae_gan_test.pth")
    torch.save({**payload, "text": {"encoder": "openclip", "pretrained": "./old.pt"}}, "clip.pth")
    assert run_main(*command, "--clip_pretrained", "./new.pt") == 2
    assert "--clip_pretrained ./new.pt: is no file" in capsys.readouterr().err


def test_a_mesh_is_drawn_as_seen_from_the_right() -> None:
    posts = [[0, -1, 0], [0.2, -1, 0], [0, -1, 2], [0, 1, 0], [0.2, 1, 0], [0, 1, 0.5]]  # the tall one is in front
    picture = np.asarray(meshes.draw_mesh(meshes.Mesh(np.array(posts, float), np.array([[0, 1, 2], [3, 4, 5]])), 60))
    is_drawn = (picture < meshes.PAPER).any(axis=2)
    assert is_drawn[:, :30].sum() > 2 * is_drawn[:, 30:].sum() > 0


def test_pictures_of_many_prompts_stay_small_and_captions_have_cyrillic() -> None:
    picture = meshes.draw_matrix(np.eye(500), [f"prompt {number}" for number in range(500)])
    assert max(picture.size) < 4500
    few = meshes.draw_matrix(np.eye(3), ["a", "b", "c"])
    assert few.size == (3 * 46 + 230, 3 * 46 + 10) and few.getpixel((225, 5)) == (38, 84, 124) != few.getpixel((275, 5))
    font = meshes.load_font(12)
    if "DejaVu" not in font.getname()[0]:
        pytest.skip("there is no font of the system")
    assert font.getmask("л").getbbox() and bytes(font.getmask("л")) != bytes(font.getmask("п"))


def test_real_meshes_are_read(shared_data: Path) -> None:
    files = sorted((shared_data / "meshes").glob("*/*.*"))
    files = [path for path in files if path.suffix in meshes.MESH_SUFFIXES]
    if not files:
        pytest.skip("the real meshes are not here")
    for path in files:
        grid = meshes.voxelize(meshes.read_mesh(path), 32, is_solid=False)
        assert 100 < grid.sum() < 0.3 * 32**3, path.name
        assert max(np.ptp(np.nonzero(grid), axis=1)) == 31, path.name
