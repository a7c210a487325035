"""Small data sets drawn in milliseconds, and functions that run the script in this process or in another, as users do."""

from __future__ import annotations

import colorsys
import functools
import importlib
import inspect
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType

# Two processes run the tests on two cores, and the last bits of a sum depend on the number of threads.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np
import pytest
import yaml
from killing import FEW_DRAWS, Nursery, find_main, report_here
from PIL import Image, ImageDraw

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "lct_dino3.py"
# Runs on classes that are easily confused, so that metrics of the wrong images, weights or epoch differ.
HARD_CLASSES = ("hammer", "pliers", "side cutter", "wrench", "бокорезы")
HARD_RUN = (
    "--model_id test_resnet --img_size 32 --emb_dim 32 --heads 2 --precision fp32 --gpus 0 --workers 0 --save_every 1"
    r" --val_split 0.35 --test_split 0.25 --target_precision 0.85 --seed 1 --group_regex ^\d+_(shot\d+)"
).split()
HARD_RUNS = {  # --patience makes the best epoch another one than the last
    "plain": "--epochs 20 --patience 3 --batch 12 --cache_views 0 --unknown_dir unknown",
    "tuned": "--epochs 40 --patience 3 --batch 64 --accumulate_grad_batches 2 --no-freeze_backbone --ema_decay 0.7 --lr 3e-3"
    " --unknown_dir unknown",  # one step an epoch
    "mix": "--epochs 20 --patience 3 --batch 8 --accumulate_grad_batches 2 --crop_mode mix --best_metric loss --cache_views 0",
    "cached": "--epochs 20 --patience 3 --batch 12 --cache_views 2",
}
# Begun first, or one of them would be left at the end with a core idle.
LONGEST_FILES = (
    "test_resume.py test_figures.py test_ddp.py tools/test_pretrain.py tools/test_prelabel.py test_run.py tools/test_demo.py"
    " tools/test_export.py tools/test_track.py tools/test_masks.py test_device.py tools/test_modelit.py"
).split()
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# The smallest real training job: a test that expects a refusal ends soon even if none comes.
TINY_RUN = "--model_id test_resnet --no-pretrained --img_size 32 --batch 16 --epochs 1 --save_every 1 --gpus 0 --workers 0".split()
sys.path.insert(0, str(REPO))
# A shell that starts the tests with `&` makes them, and every process they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files: LONGEST_FILES first."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(os.path.relpath(item.path, REPO / "tests"), len(ranks)))


def draw_image(kind: int, *seed: int, side: int = 56) -> Image.Image:
    """Draw an image of class `kind`, which sets the colour and the number of corners; the rest varies with the seed."""
    rng = np.random.default_rng((kind, *seed))
    background = Image.fromarray(rng.integers(40, 216, (5, 5, 3), dtype=np.uint8))
    image = background.resize((side, side), Image.Resampling.BICUBIC)
    colour = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(kind * 0.381966 % 1, 1.0, 1.0))
    centre, radius, turn = rng.uniform(0.35, 0.65, 2) * side, rng.uniform(0.25, 0.38) * side, rng.uniform(0, math.tau)
    corners = 3 + kind % 4
    angles = turn + np.arange(2 * corners) * math.pi / corners
    reach = radius * np.tile([1.0, 0.45], corners)  # a star: outer and inner corners in turn
    points = centre[:, None] + reach * np.stack([np.cos(angles), np.sin(angles)])
    ImageDraw.Draw(image).polygon(list(zip(*points.tolist(), strict=True)), fill=colour, outline=(0, 0, 0))
    return image


def make_dataset(root: Path, classes: dict[str, int], seed: int = 0, side: int = 56, suffix: str = ".png") -> Path:
    """Draw `classes` {name: number of images} as `root/<name>/0000.png`...; equal arguments give equal bytes."""
    for kind, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            draw_image(kind, seed, index, side=side).save(root / name / f"{index:04d}{suffix}")
    return root


def draw_confusable(
    hue: float, corners: int, rng: np.random.Generator, spread: float, saturation: float = 1.0
) -> tuple[Image.Image, Image.Image]:
    """Draw a polygon and its mask; the standard deviation of the hue is `spread` of the colour circle."""
    size = (44, 36)
    noise = Image.fromarray(rng.integers(30, 226, (4, 5, 3), dtype=np.uint8))
    image, mask = noise.resize(size, Image.Resampling.BICUBIC), Image.new("L", size)
    hsv = (hue + spread * rng.normal()) % 1, saturation * rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.0)
    angles = rng.uniform(0, math.tau) + np.arange(corners) * math.tau / corners
    centre, radius = rng.uniform(0.4, 0.6, 2) * size, rng.uniform(11, 17)
    points = [tuple(point) for point in (centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).tolist()]
    ImageDraw.Draw(image).polygon(points, fill=tuple(round(255 * value) for value in colorsys.hsv_to_rgb(*hsv)))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return image, mask


def make_hard_dataset(folder: Path) -> None:
    """Draw `data`, 60 images of each of five easily confused classes, and `unknown`, 40 images of other objects.

    Files are named <number>_shot<shot>.png; every fourth shot has two frames. Four of five crops have a mask.
    """
    rng, shots = np.random.default_rng(0), [shot for shot in range(1, 300) for _ in range(1 + (shot % 4 == 0))]
    for kind, name in enumerate(HARD_CLASSES):
        for dirname in ("cropped", "masks"):
            (folder / "data" / name / dirname).mkdir(parents=True)
        for number in range(60):
            image, mask = draw_confusable(kind / 5, 3 + kind % 2, rng, spread=0.045)
            stem = f"{number:04d}_shot{shots[60 * kind + number]:03d}"
            image.save(folder / "data" / name / "cropped" / f"{stem}.png")
            if number % 5:
                mask.save(folder / "data" / name / "masks" / f"{stem}_mask.png")
    (folder / "unknown" / "deep").mkdir(parents=True)
    for number in range(40):
        image, _ = draw_confusable(rng.uniform(), 12, rng, spread=0.0, saturation=0.5)
        image.save(folder / "unknown" / ("deep" if number % 3 else ".") / f"{number:03d}.png")


def make_backbone(folder: Path) -> Path:
    """Write a file with the small backbone and return its path: random weights, BatchNorm statistics of the data."""
    import timm
    import torch

    crops = [np.asarray(Image.open(path).resize((32, 32))) for path in sorted(folder.glob("data/*/cropped/*.png"))]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", pretrained=False, num_classes=0).train()
        for _ in range(50):
            model(pixels[torch.randperm(len(pixels))[:100]])
    torch.save(model.state_dict(), folder / "backbone.pth")
    return folder / "backbone.pth"


def image_bytes(image: Image.Image, file_format: str, **options: object) -> bytes:
    """Encode an image as a file and return the bytes."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def snapshot(folder: Path) -> dict[str, object]:
    """Return times and bytes of all files in a folder, by path, to assert that nothing was touched."""
    entries = sorted(folder.rglob("*")) if folder.is_dir() else []
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in entries
    }


def run_cli(
    *args: object, cwd: Path | None = None, env: dict | None = None, python: tuple[str, ...] = (), timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does; `python` holds flags of the interpreter."""
    return subprocess.run(
        [sys.executable, *python, str(SCRIPT), *map(str, args)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_main(*args: object, main: Callable[..., int] | None = None, draws: int = FEW_DRAWS) -> int:
    """Run `main` of the script, or of the tool that the arguments name, in this process; restore the signal handlers after it.

    Intervals are of so many `draws`.
    """
    import lct_dino3 as lct

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
    handlers = {number: signal.getsignal(number) for number in numbers}
    lct.PROGRESS_LOG = lct.ProgressLog()  # its clock starts with the import, which does not happen again
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(lct, "BOOTSTRAP_DRAWS", draws)
            if lct.TOOLS_DIR == REPO / "tools":  # else a test is about the report
                patch.setattr(lct, "start_report", report_here)
            argv = [str(arg) for arg in args]
            if main is None:
                main, argv, _ = find_main(lct, argv)
            return main(argv)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def interrupt_writing(patch: pytest.MonkeyPatch, name: str) -> None:
    """Send SIGTERM at the second of the writes to a file of the script whose name contains `name`: torch replaces the exception."""

    class InterruptedFile(io.FileIO):
        num_writes = 0

        def write(self, data: bytes) -> int:
            self.num_writes += 1
            if self.num_writes == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().write(data)

    def open_file(path: Path, mode: str, **more: object) -> io.IOBase:
        return InterruptedFile(path, mode) if name in str(path) and mode == "wb" else open(path, mode, **more)

    import lct_dino3 as lct

    patch.setattr(lct, "open", open_file, raising=False)


@pytest.fixture
def call_main() -> Callable[..., int]:
    """Return `run_main`."""
    return run_main


def our_modules() -> list[ModuleType]:
    """Return the imported modules of the script and the tools."""
    folders = (REPO, REPO / "tools")
    modules = [(module, getattr(module, "__file__", None)) for module in list(sys.modules.values())]
    return [module for module, file in modules if file and Path(file).resolve().parent in folders]


@dataclass
class Patched:
    """A name of the script or a tool, patched while a test runs."""

    name: str
    value: object
    calls: list[tuple] = field(default_factory=list)  # arguments of each call, if the value is a function
    is_read: bool = False

    def __call__(self, *args: object, **options: object) -> object:
        """Record a call and make it."""
        self.calls.append(args)
        self.is_read = True
        return self.value(*args, **options)


@pytest.fixture
def patch_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Patched]]:
    """Return `patch(module, name, value)`, which patches a name in every file that has it; the test fails if nothing uses it.

    Without this check, a test whose patched name moves to another file keeps passing and tests nothing. A function counts as used
    if it is called, another value if a function that names it is called. Without `value`, calls of the original are recorded.
    """
    patched: list[Patched] = []
    paths = (str(SCRIPT), str(REPO / "tools"))
    before = sys.getprofile()

    def note_call(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(paths):
            for item in patched:
                item.is_read |= item.name in frame.f_code.co_names and not inspect.isroutine(item.value)

    def patch(module: ModuleType, name: str, value: object = None) -> Patched:
        owners = [owner for owner in {module, *our_modules()} if name in vars(owner)]
        assert owners, f"none of our files has the name {name}"
        item = Patched(name, vars(owners[0])[name] if value is None else value)
        patched.append(item)
        if not inspect.isroutine(item.value):
            threading.setprofile(note_call)
            sys.setprofile(note_call)
        for owner in owners:
            monkeypatch.setattr(owner, name, item if inspect.isroutine(item.value) else value)
        return item

    yield patch
    sys.setprofile(before)
    threading.setprofile(before)
    unread = [item.name for item in patched if not item.is_read]
    assert not unread, f"patched, and used by nothing: {', '.join(unread)}"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images; shared by all tests, read-only."""
    return make_dataset(tmp_path_factory.mktemp("small") / "data", {"hammer": 8, "pliers": 8, "wrench": 8})


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with 42 images in total and a broken file; shared by all tests, read-only."""
    root = make_dataset(tmp_path_factory.mktemp("data") / "data", {"молоток": 14, "side cutter": 11, "wrench": 17})
    (root / "wrench" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    return root


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, 42 images in three unequal classes, and `run`, an epoch on it; shared by all tests, read-only."""
    folder = tmp_path_factory.mktemp("tiny")
    make_dataset(folder / "data", {"axe": 16, "bit": 12, "клещи": 14})
    assert run_main("--data_root", folder / "data", "--out_dir", folder / "run", *TINY_RUN) == 0
    return folder


@pytest.fixture(scope="session")
def hard_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and `unknown` of `make_hard_dataset`, and `backbone.pth`; shared by all tests, read-only."""
    folder = tmp_path_factory.mktemp("hard")
    make_hard_dataset(folder)
    make_backbone(folder)
    return folder


@pytest.fixture(scope="session")
def hard_run(hard_data: Path) -> Callable[[str], Path]:
    """Return a function that trains a run of HARD_RUNS when it is first asked for and returns its folder; read-only."""

    @functools.cache
    def train(name: str) -> Path:
        out_dir = hard_data / name
        options = [hard_data / word if word == "unknown" else word for word in HARD_RUNS[name].split()]
        folders = ("--data_root", hard_data / "data", "--out_dir", out_dir)
        flags = ("--backbone_weights", hard_data / "backbone.pth", *HARD_RUN, *options)
        assert run_main(*folders, *flags, draws=500) == 0
        return out_dir

    return train


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """A process that imports torch once and runs the script as often as needed."""
    nursery = Nursery(tmp_path_factory.mktemp("output"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets beside the repository, on the machines of this project only."""
    if not SHARED_DATA.is_dir():
        pytest.skip("shared/data is not on this machine")
    return SHARED_DATA


def browse(path: Path, width: int = 1280) -> tuple[str, str]:
    """Open a page in a browser window; return its HTML after its scripts have run, and the browser's messages."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    window = (f"--window-size={width},800", f"--user-data-dir={path.parent / 'profile'}")
    result = subprocess.run(
        [chromium, *flags.split(), *window, path.as_uri()], capture_output=True, timeout=90, check=True
    )
    return result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")


# A script for `probe`: whether the page is no wider than its window, and whether every image lies inside its frame.
FITS = """[
  document.documentElement.scrollWidth <= innerWidth,
  [...document.querySelectorAll(".frame img")].every(image => {
    const [inner, outer] = [image, image.parentElement].map(element => element.getBoundingClientRect());
    return image.naturalWidth && inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1
      && inner.left >= outer.left - 1 && inner.right <= outer.right + 1;
  }),
]"""


def probe(page: Path, script: str, width: int = 1280) -> str:
    """Evaluate a JavaScript expression in a page once it has loaded; return the result as text."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text("utf-8"))  # the content policy would block the script
    copy = page.with_name("probe.html")
    on_load = f"<script>onload = () => {{ document.title = {script}; }}</script></body>"
    copy.write_text(text.replace('loading="lazy"', "").replace("</body>", on_load), "utf-8")
    return re.search(r"<title>(.*?)</title>", browse(copy, width)[0])[1]


def shrink_config(cfg: str, folder: Path) -> str:
    """Write an official config with fewer and narrower layers to `folder`; return its name, which leads out of the package.

    Its model takes 0.3 s for a crop where the official one takes 7. The predictor asks for the image size as it is.
    """
    root = Path(importlib.import_module("sam2").__path__[0])
    content = yaml.safe_load((root / cfg).read_text(encoding="utf-8"))
    model = content["model"]
    encoder, attention, memory = model["image_encoder"], model["memory_attention"], model["memory_encoder"]
    stages = [max(1, num_blocks // 5) for num_blocks in encoder["trunk"]["stages"]]
    encoder["trunk"] |= {"embed_dim": 8, "stages": stages, "global_att_blocks": []}
    encoder["neck"] |= {"d_model": 64, "backbone_channel_list": [64, 32, 16, 8]}
    attention |= {"d_model": 64, "num_layers": 1}
    attention["layer"] |= {"d_model": 64, "dim_feedforward": 64}
    for part in ("self_attention", "cross_attention"):
        attention["layer"][part]["embedding_dim"] = 64
    memory["fuser"]["layer"]["dim"] = 64
    for part in (encoder["neck"], memory):
        part["position_encoding"]["num_pos_feats"] = 64
    path = folder / cfg
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\n{yaml.safe_dump(content)}", encoding="utf-8")
    return os.path.relpath(path, root)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module tests/benchmarks/gpu.py, with its temporary files in tmp_path."""
    monkeypatch.syspath_prepend(REPO / "tests/benchmarks")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return importlib.import_module("gpu")
