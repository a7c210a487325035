"""How fast each part is against the usual script, and against the strongest.

    python tests/benchmarks/run.py [--quick] [--growth] [--data DIR] [ROW ...]

The usual script is what most people write: Pillow, albumentations, float tensors, a plain loop. The strongest is what somebody
writes who knows the libraries well, for the same work, as well done: JPEGs decoded at a fraction, torchvision v2, a memory
map of fitted squares, numpy's selection, bf16, features embedded once. The sides take turns, each time in a fork of their own with
one thread, and what counts is process CPU time: the medians of the rounds are printed, and of the ratios of each round, in half an
hour on two cores, with --quick in five minutes. The usual script is a plain process; the others keep freed memory, ours as a run
does, the strongest as with jemalloc. Rows of whole epochs have fewer rounds, and share a side that they have in common.

Where our views differ from the usual ones, the effect on accuracy stands beneath the row: paired seeds on real data (--data, with
`grocery40` and `weights`; by default ../shared/data), not measured where that is absent, nor with --quick. --growth prints how cost
grows instead.

A row is a function that returns a `Case`, with `@row(name, target)`, or a line of `EPOCH_ROWS`. The target is the least ratio to
the strongest; 0.9 where both do the same, for the noise of a machine, less where the strongest wins. Exit code 1 if a row fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by numpy's BLAS and by torch, and a fork must not lose threads
REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(Path(__file__).parent)]

import epochs
import numpy as np
import torch
from PIL import Image

import lct_dino3 as lct

IMG_SIZE = 224
ENOUGH_PIXELS = 1.75  # times IMG_SIZE: JPEGs decoded at a fraction that leaves as many cost no accuracy
STUDY_SIZE = 72  # px; the groceries' 256 are as many times that as the photos' 800 are of IMG_SIZE


@dataclass(frozen=True)
class Side:
    """What a row makes of the costs of one of SIDES."""

    name: str
    count: Callable[[tuple[float, ...]], float] = sum


@dataclass(frozen=True)
class Case:
    """One comparison, set up and ready to be repeated; a side that returns a float returns its cost, else it is its CPU time."""

    usual: Callable[[], object] | Side
    strongest: Callable[[], object] | Side
    ours: Callable[[], object] | Side
    unit: str = "ms"
    scale: float = 1e3  # from cost to unit, for one of what the row names
    check: Callable[[], tuple[bool, str]] | None = None  # also has to hold; the text is printed beneath the row


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    rounds: int
    long_rounds: int  # of rows of whole epochs
    seeds: int  # paired, for accuracy; 0 = it is not measured
    data: Path
    scratch: Path


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    make: Callable[[Settings], Case | None]  # None where it cannot be had
    target: float  # the least ratio of the strongest to ours
    limit: float | None = None  # the highest cost of ours, in the unit shown; then the ratio does not matter


ROWS: dict[str, Row] = {}


def row(name: str, target: float, limit: float | None = None) -> Callable:
    """Enter a function that makes a case into the table."""

    def enter(make: Callable[[Settings], Case]) -> Callable[[Settings], Case]:
        ROWS[name] = Row(make, target, limit)
        return make

    return enter


def measure(side: Callable[[], object], keeps_memory: bool, warm: bool = True) -> tuple[float, ...]:
    """Return what one call costs in a fork, after one that warms it up."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if keeps_memory:
                lct.keep_freed_memory()
            with (
                open(os.devnull, "w") as nothing,
                redirect_stdout(nothing),
                redirect_stderr(nothing),
            ):  # of what peers say
                if warm:
                    side()
                started = time.process_time()
                cost = side()
                took = time.process_time() - started
            costs = cost if isinstance(cost, epochs.Costs) else (cost if isinstance(cost, float) else took,)
            os.write(writer, struct.pack(f"{len(costs)}d", *costs))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise SystemExit("a side of this row has failed")
    return struct.unpack(f"{len(answer) // 8}d", answer)


def cost_of(side: Side | Callable[[], object], keeps_memory: bool, number: int) -> float:
    """Return what a side costs in a round."""
    if isinstance(side, Side):
        return side.count(measure_once(side.name, number))
    return measure(side, keeps_memory)[0]


@functools.cache
def measure_once(name: str, _: int) -> tuple[float, ...]:
    """Return what a side of epochs.py costs in a round, for all rows that have it."""
    return measure(SIDES[name], False, warm=False)


def run_row(name: str, settings: Settings) -> bool:
    """Measure a row, print its line, and say whether it passes."""
    own = ROWS[name]
    case = own.make(settings)
    if case is None:
        print(f"{name:<36} left out: what it is compared with is not installed", flush=True)
        return True
    rounds = range(settings.rounds if isinstance(case.usual, Callable) else settings.long_rounds)
    costs = np.array(
        [
            (
                cost_of(case.usual, False, number),
                cost_of(case.strongest, True, number),
                cost_of(case.ours, True, number),
            )
            for number in rounds
        ]
    )
    usual, strongest, ours = np.median(costs, axis=0) * case.scale
    ratios = np.median(costs[:, :2] / np.maximum(costs[:, 2:], 1e-12), axis=0)
    passes = ours <= own.limit if own.limit is not None else ratios[1] >= own.target
    holds, note = case.check() if case.check else (True, "")
    target = f"<= {own.limit:g} {case.unit}" if own.limit is not None else f"{own.target:g} x"
    shown = "".join(f"{value:.3g} {case.unit}".rjust(17) for value in (usual, strongest, ours))
    against = "".join(f"{ratio:.2f} x".rjust(11) for ratio in ratios)
    verdict = "pass" if passes and holds else "FAIL"
    print(f"{name:<36}{shown}{against}{target:>10}  {verdict}", flush=True)
    if note:
        print(*(f"    {line}" for line in note.splitlines()), sep="\n", flush=True)
    return bool(passes and holds)


# ---------------------------------------------------------------------------------------------------------------- items
def draw_photos(settings: Settings, count: int = 48) -> list[Path]:
    """Return JPEGs of 0.64 megapixels: groceries enlarged, or drawn where there are none."""
    folder = settings.scratch / "photos"
    if not folder.is_dir():
        folder.mkdir()
        rng, sources = np.random.default_rng(0), sorted((settings.data / "grocery40").rglob("*.jpg"))
        for index in range(count):
            if sources:
                image = Image.open(sources[int(rng.integers(len(sources)))]).convert("RGB")
            else:
                image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            factor = (640_000 / (image.width * image.height)) ** 0.5
            size = (round(image.width * factor), round(image.height * factor))
            image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:03}.jpg", quality=90)
    return sorted(folder.iterdir())


def albumentations_recipe(
    side: int, augment: bool, as_float: bool, is_fitted: bool = False
) -> Callable[[np.ndarray], object]:
    """Return the Compose that our augmentation is equal to in distribution: the usual way to write it."""
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)
    gray = {"border_mode": cv2.BORDER_CONSTANT, "fill": lct.PADDING_GRAY}
    fit = [] if is_fitted else [A.LongestMaxSize(side, area_for_downscale="image"), A.PadIfNeeded(side, side, **gray)]
    moves = epochs.list_augmentations(A, gray) if augment else []
    compose = A.Compose([*fit, *moves, *([A.Normalize(), ToTensorV2()] if as_float else [])])
    if not compose.transforms:
        return lambda image: image  # which may be read-only
    # Its `seed` would give every transform the same draws: they would fire together, and leave more pictures as they are.
    compose.set_random_state(np.random.default_rng(0), random.Random(0))
    return lambda image: compose(image=image)["image"]


def open_plainly(path: Path) -> np.ndarray:
    """Decode an image as everybody does."""
    return np.array(Image.open(path).convert("RGB"))


def letterbox(image: torch.Tensor, side: int) -> torch.Tensor:
    """Fit an image uint8 (3, H, W) into a gray square with torchvision's functions, as `fit_square` does."""
    from torchvision.transforms.v2 import functional

    height, width = (max(1, round(length * side / max(image.shape[1:]))) for length in image.shape[1:])
    image = functional.resize(image, [height, width], functional.InterpolationMode.BICUBIC, antialias=True)
    left, top = (side - width) // 2, (side - height) // 2
    return functional.pad(image, [left, top, side - width - left, side - height - top], fill=lct.PADDING_GRAY)


def item_case(settings: Settings, augment: bool) -> Case:
    """Compare decoding and transforming all photos."""
    import simplejpeg
    from torchvision.io import decode_image

    photos = draw_photos(settings)
    as_float, as_bytes = (albumentations_recipe(IMG_SIZE, augment, as_float) for as_float in (True, False))
    ours, enough = lct.build_transform(IMG_SIZE, augment), round(ENOUGH_PIXELS * IMG_SIZE)

    def usual() -> None:
        for path in photos:
            as_float(open_plainly(path))

    def strongest_of_training() -> None:
        for path in photos:
            as_bytes(simplejpeg.decode_jpeg(path.read_bytes(), min_height=enough, min_width=enough))

    def strongest_of_val() -> None:
        for path in photos:
            letterbox(decode_image(str(path), "RGB", apply_exif_orientation=True), IMG_SIZE)

    def own() -> None:
        for seed, path in enumerate(photos):
            ours(lct.load_image(path), None, seed)

    check = functools.partial(compare_accuracy, settings) if augment else functools.partial(compare_pixels, photos)
    strongest = strongest_of_training if augment else strongest_of_val
    return Case(usual, strongest, own, "ms/image", 1e3 / len(photos), check)


def compare_pixels(photos: list[Path]) -> tuple[bool, str]:
    """Compare what torchvision makes of the photos with ours."""
    from torchvision.io import decode_image

    gaps = [
        np.abs(
            letterbox(decode_image(str(path), "RGB"), IMG_SIZE).permute(1, 2, 0).numpy().astype(int)
            - lct.fit_square(lct.load_image(path), IMG_SIZE)
        )
        for path in photos
    ]
    return bool(np.max(gaps) <= 1), f"largest difference of a pixel from torchvision: {np.max(gaps)} of 255"


@row("train item, decoded anew", 0.9)
def train_item(settings: Settings) -> Case:
    """Decode and augment a training image, whole: a run is the same whatever its disk had room for; the strongest need not be."""
    return item_case(settings, True)


@row("val item, decoded anew", 0.9)
def val_item(settings: Settings) -> Case:
    """Decode and fit an evaluation image, exactly."""
    return item_case(settings, False)


def stored_case(settings: Settings, augment: bool) -> Case:
    """Compare batches of the squares that the scan has written with those of a memory map, and with decoding everything again."""
    photos, fresh = draw_photos(settings), item_case(settings, augment)
    count = np.zeros(len(photos), np.int32)
    records = lct.Records(
        photos[0].parent, ("a",), np.array([path.name for path in photos], dtype=lct.STRINGS), count, count, count
    )
    writer = lct.SquareFile(settings.scratch, IMG_SIZE, 10**9)
    places = [writer.put(lct.fit_square(lct.load_image(path), IMG_SIZE)) for path in photos]
    store = lct.SquareStore(writer.file, records, np.array([places, places]), IMG_SIZE)
    dataset = lct.CropDataset(records, lct.build_transform(IMG_SIZE, augment), store=store)
    squares = np.memmap(writer.file, np.uint8, "r").reshape(-1, IMG_SIZE, IMG_SIZE, 3)
    change = albumentations_recipe(IMG_SIZE, augment, False, is_fitted=True)

    def strongest() -> None:
        for _ in range(10):
            samples = [(change(squares[row]), int(records.labels[row])) for row in range(len(photos))]
            images, labels = zip(*samples, strict=True)
            torch.from_numpy(np.stack(images)), torch.tensor(labels)

    def own() -> None:
        for _ in range(10):
            keys = [lct.SampleKey(row, (0, 3, 0, row, 0) if augment else (), 0) for row in range(len(photos))]
            dataset.collate([dataset[key] for key in keys])

    def usual() -> None:
        for _ in range(10):
            fresh.usual()

    return Case(usual, strongest, own, "ms/image", 100 / len(photos))


@row("train item, kept by the scan", 1.2)
def train_item_again(settings: Settings) -> Case:
    """Augment a training image that is decoded already; exact."""
    return stored_case(settings, True)


@row("val item, kept by the scan", 0.9)
def val_item_again(settings: Settings) -> Case:
    """Fetch an evaluation image that is decoded already, as a fine-tuned run does every epoch; exact, and microseconds."""
    return stored_case(settings, False)


def compare_accuracy(settings: Settings) -> tuple[bool, str]:
    """Compare what a frozen backbone learns from the views of the usual script and from ours.

    40 kinds of groceries at 72 px; two views of each training image, ridge regression onto the classes, accuracy on clean val
    images. Holds when ours is not significantly worse.
    """
    from scipy.stats import t as student

    root, weights = settings.data / "grocery40", settings.data / "weights/mobilenetv2_035.timm.pth"
    if not settings.seeds or not weights.is_file():
        return True, "effect on accuracy: not measured with --quick, nor without real data (--data)"
    paths = sorted(root.rglob("*.jpg"))
    labels = np.unique([path.relative_to(root).parts[0] for path in paths], return_inverse=True)[1]
    embed = functools.partial(embed_images, load_backbone(weights))
    usual, transform = albumentations_recipe(STUDY_SIZE, True, False), lct.build_transform(STUDY_SIZE, True)
    fits = albumentations_recipe(STUDY_SIZE, False, False), lct.build_transform(STUDY_SIZE, False)
    clean = (
        embed(fits[0](open_plainly(path)) for path in paths),
        embed(fits[1](lct.load_image(path), None, 0) for path in paths),
    )
    found = []
    for seed in range(settings.seeds):
        is_val = np.random.default_rng(seed).random(len(paths)) < 0.3
        chosen = [paths[i] for i in np.flatnonzero(~is_val)] * 2
        views = (
            (usual(open_plainly(path)) for path in chosen),
            (transform(lct.load_image(path), None, (seed << 20) + i) for i, path in enumerate(chosen)),
        )
        heads = [fit_ridge(embed(own), np.tile(labels[~is_val], 2)) for own in views]
        found.append(
            [((own[is_val] @ head).argmax(1) == labels[is_val]).mean() for own, head in zip(clean, heads, strict=True)]
        )
    theirs, ours = np.transpose(found)
    differences = 100 * (ours - theirs)
    error = differences.std(ddof=1) / len(differences) ** 0.5
    line = (
        f"accuracy against the usual script: {ours.mean():.3f} and {theirs.mean():.3f}, {differences.mean():+.2f} points,"
        f" standard error {error:.2f}, {settings.seeds} paired seeds"
    )
    return bool(differences.mean() >= error * student.ppf(0.025, len(differences) - 1)), line


def load_backbone(weights: Path) -> torch.nn.Module:
    """Return mobilenetv2_035 with its ImageNet weights."""
    import timm

    model = timm.create_model("mobilenetv2_035", num_classes=0)
    model.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    return model.eval().to(memory_format=torch.channels_last)


def embed_images(model: torch.nn.Module, images: object) -> np.ndarray:
    """Return unit features (N, D) of uint8 images (H, W, 3)."""
    stacked, parts = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2), []
    with torch.inference_mode():
        for part in stacked.split(64):
            parts.append(torch.nn.functional.normalize(model(part.float() / 127.5 - 1)))
    return torch.cat(parts).numpy()


def fit_ridge(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return weights (D, C) of least squares onto the classes."""
    gram = features.T @ features
    return np.linalg.solve(gram + 0.3 * np.eye(len(gram)), features.T @ np.eye(labels.max() + 1)[labels])


# ----------------------------------------------------------------------------------------------------------------- scan
def make_files(folder: Path, count: int, num_classes: int = 50) -> Path:
    """Create empty images, in equal shares."""
    if not folder.is_dir():
        for label in range(num_classes):
            (folder / f"class{label:03}").mkdir(parents=True)
            for index in range(count // num_classes):
                os.close(os.open(f"{folder}/class{label:03}/{index:06}.jpg", os.O_CREAT))
    return folder


@row("scan of 100k files", 0.9)
def scan(settings: Settings) -> Case:
    """List what is there to train on."""
    root = make_files(settings.scratch / "files", 100_000)

    def usual() -> None:
        found = []
        for label, name in enumerate(sorted(os.listdir(root))):
            folder = f"{root}/{name}"
            for file in sorted(os.listdir(folder)):
                path = f"{folder}/{file}"
                if os.path.isfile(path) and file.lower().endswith(lct.IMAGE_SUFFIXES):  # noqa: PTH113
                    found.append((path, label))

    def strongest() -> None:
        found = []
        for label, folder in enumerate(sorted(os.scandir(root), key=lambda entry: entry.name)):
            prefix = f"{folder.name}/cropped" if os.path.isdir(f"{folder.path}/cropped") else folder.name  # noqa: PTH112
            with os.scandir(root / prefix) as entries:
                names = [
                    own.name
                    for own in entries
                    if own.name[0] != "." and own.name.lower().endswith(lct.IMAGE_SUFFIXES)
                    if own.name.isprintable() and own.is_file()
                ]
            found += [(f"{prefix}/{name}", label) for name in sorted(names)]

    return Case(usual, strongest, lambda: lct.list_images(root))


def count_private_mb() -> float:
    """Return the memory that is this process's alone, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1e3


@row("1M records, growth of a worker", 1.0, limit=20.0)
def worker_memory(_: Settings) -> Case:
    """How much memory of its own a forked worker gets from reading each record once."""
    paths = [f"class{index % 100:03}/image{index:07}.jpg" for index in range(1_000_000)]
    listed = [(path, index % 100) for index, path in enumerate(paths)]
    table, labels = np.array(paths, dtype=lct.STRINGS), (np.arange(1_000_000) % 100).astype(np.int32)
    names = np.array(paths, dtype=bytes)  # as long as the longest, each
    state: dict[str, float] = {}  # the second call finds the pages that the first has copied

    def grow(touch: Callable[[], object]) -> float:
        before = state.setdefault("before", count_private_mb())
        touch()
        return count_private_mb() - before

    def read(column: np.ndarray) -> None:
        for index in range(1_000_000):
            column[index], labels[index]

    return Case(
        lambda: grow(lambda: [pair is None for pair in listed]),
        lambda: grow(lambda: read(names)),
        lambda: grow(lambda: read(table)),
        "MB",
        1.0,
    )


# -------------------------------------------------------------------------------------------------- metrics and matching
@row("epoch metrics, 70k x 11", 0.9)
def epoch_metrics(_: Settings) -> Case:
    """Accuracy, precision, recall, F1 and ROC AUC of each class: sklearn's functions; a confusion matrix and ranks."""
    from scipy.stats import rankdata
    from sklearn import metrics

    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 11, 70_000), rng.normal(size=(70_000, 11)).astype(np.float32)
    logits[np.arange(70_000), labels] += 1.5
    scores, names = lct.log_softmax(logits), [str(label) for label in range(11)]
    probabilities = np.exp(scores)

    def usual() -> dict[str, object]:
        answers = probabilities.argmax(axis=1)
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(labels, answers, zero_division=0)
        auc = metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average=None)
        return {
            "acc": metrics.accuracy_score(labels, answers),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "auc": auc,
        }

    def strongest() -> dict[str, object]:
        confusion = np.bincount(11 * labels + probabilities.argmax(axis=1), minlength=121).reshape(11, 11)
        right, support, answered = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        ranks = np.array([rankdata(probabilities[:, label])[labels == label].sum() for label in range(11)])
        return {
            "acc": right.sum() / len(labels),
            "precision": right / np.maximum(answered, 1),
            "recall": right / support,
            "f1": 2 * right / (support + answered),
            "auc": (ranks - support * (support + 1) / 2) / (support * (len(labels) - support)),
        }

    def check() -> tuple[bool, str]:
        ours, per_class = lct.compute_metrics(scores.argmax(axis=1), labels, names, scores)
        columns = {key: [own[key] for own in per_class.values()] for key in ("precision", "recall", "f1", "auc")}
        columns["acc"] = ours["acc"]
        gap = max(np.abs(columns[key] - other()[key]).max() for key in columns for other in (usual, strongest))
        return gap <= 1e-6, f"largest difference from the others: {gap:.1e}"

    return Case(
        usual, strongest, lambda: lct.compute_metrics(scores.argmax(axis=1), labels, names, scores), check=check
    )


def make_gallery(num_classes: int, sizes: int | np.ndarray, matcher: str) -> lct.Gallery:
    """Draw a gallery of 128 dimensions, with as many references of each class."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), sizes)
    stacks = rng.normal(size=(len(labels), 128)).astype(np.float32)
    stacks /= np.linalg.norm(stacks, axis=1, keepdims=True)
    centroids = lct.class_centroids(stacks, labels, num_classes)
    return lct.Gallery(
        class_names=tuple(str(label) for label in range(num_classes)),
        centroids=centroids,
        prototypes=centroids,
        prototype_labels=np.arange(num_classes),
        stacks=stacks,
        stack_labels=labels,
        stack_paths=("",) * len(stacks),
        stack_views=np.zeros(len(stacks), np.uint8),
        thresholds=np.zeros(num_classes, np.float32),
        matcher=matcher,
        knn_counts=np.full(num_classes, 5),
        temperature=1.0,
        is_pooled=np.ones(num_classes, bool),
        is_enrolled=np.zeros(num_classes, bool),
        offsets=np.zeros(num_classes, np.float32),
        log_odds=np.zeros((num_classes, 2)),
    )


@row("matching 256 x 1,000, centroid", 0.9)
def matching_centroid(_: Settings) -> Case:
    """Cosine to the centroid of each class, 20 times: sklearn, one matrix product, ours."""
    from sklearn.metrics.pairwise import cosine_similarity

    gallery, queries = make_gallery(1000, 1, "centroid"), make_gallery(256, 1, "centroid").stacks

    def check() -> tuple[bool, str]:
        gap = np.abs(gallery.scores(queries) - cosine_similarity(queries, gallery.centroids)).max()
        return gap < 1e-5, f"largest difference from sklearn: {gap:.1e}"

    return Case(
        lambda: [cosine_similarity(queries, gallery.centroids) for _ in range(20)],
        lambda: [queries @ gallery.centroids.T for _ in range(20)],
        lambda: [gallery.scores(queries) for _ in range(20)],
        scale=50.0,
        check=check,
    )


@row("matching 256 x 1,000, knn", 1.0)
def matching_knn(_: Settings) -> Case:
    """Mean cosine of the five nearest of 5 to 35 references of each class.

    The usual script sorts the cosines of one class after the other; the strongest makes them in one product, and has numpy pick
    out the five, class after class; ours does so for all classes of one size at once.
    """
    gallery = make_gallery(1000, np.random.default_rng(1).integers(5, 36, 1000), "knn")
    queries = make_gallery(256, 1, "knn").stacks
    places = [slice(rows[0], rows[-1] + 1) for rows in lct.rows_by_class(gallery.stack_labels, 1000)]

    def usual() -> np.ndarray:
        ordered = [np.sort(queries @ gallery.stacks[place].T, axis=1) for place in places]
        return np.stack([own[:, -5:].mean(axis=1) for own in ordered], axis=1)

    def strongest() -> np.ndarray:
        cosine = queries @ gallery.stacks.T
        return np.stack([np.partition(cosine[:, place], -5)[:, -5:].mean(axis=1) for place in places], axis=1)

    def check() -> tuple[bool, str]:
        gap = max(np.abs(gallery.scores(queries) - other()).max() for other in (usual, strongest))
        return gap < 1e-5, f"largest difference from the others: {gap:.1e}"

    return Case(usual, strongest, lambda: gallery.scores(queries), check=check)


# --------------------------------------------------------------------------------------------------------------- epochs
SIDES: dict[str, Callable[[], object]] = {
    "plain": epochs.plain_epoch,
    "oml": epochs.oml_epoch,
    "pml": epochs.pml_epoch,
    "strongest": lambda: epochs.strongest_epoch(torch.bfloat16 if lct.cpu_multiplies_bf16() else torch.float32),
    "strongest, fp32": lambda: epochs.strongest_epoch(torch.float32),
    "strongest, cached": epochs.strongest_cached_epoch,
    "ours": lambda: epochs.our_epoch("auto"),
    "ours, fp32": lambda: epochs.our_epoch("fp32"),
    "ours, cached": epochs.our_cached_epoch,
}
NUM_EPOCHS = 15


def count_plain_run(costs: tuple[float, ...]) -> float:
    """Return the cost of 15 epochs that embed val each time."""
    return NUM_EPOCHS * costs[0]


def count_run(costs: tuple[float, ...]) -> float:
    """Return the cost of 15 epochs with fresh views, and of embedding every image once, for figures and prototypes."""
    return NUM_EPOCHS * costs[0] + costs[1] * epochs.count_images() / epochs.count_images("val")


def count_cached_run(costs: tuple[float, ...]) -> float:
    """Return the cost of 15 epochs on four cached views and the clean one: the cache, every image once, and the head."""
    return 4 * costs[0] + costs[1] * epochs.count_images() / epochs.count_images("train") + NUM_EPOCHS * costs[2]


EPOCH_ROWS: dict[str, tuple[float, Side, Side, Side]] = {  # target, usual, strongest, ours
    "epoch, plain loop": (0.8, Side("plain"), Side("strongest"), Side("ours")),
    "epoch, open-metric-learning": (0.8, Side("oml"), Side("strongest"), Side("ours")),
    "epoch, pytorch-metric-learning": (0.8, Side("pml"), Side("strongest"), Side("ours")),
    "epoch in fp32, plain loop": (0.9, Side("plain"), Side("strongest, fp32"), Side("ours, fp32")),
    "15 epochs, fresh views": (
        0.85, Side("plain", count_plain_run), Side("strongest", count_run), Side("ours", count_run),
    ),
    "15 epochs, --cache_views 4": (
        0.75, Side("plain", count_plain_run), Side("strongest, cached", count_cached_run), Side("ours, cached", count_cached_run),
    ),
}  # fmt: skip


def epoch_case(name: str, settings: Settings) -> Case | None:
    """Return a row of `EPOCH_ROWS`, with the effect on accuracy where the lever has one."""
    _, usual, strongest, ours = EPOCH_ROWS[name]
    if usual.name == "pml" and importlib.util.find_spec("pytorch_metric_learning") is None:
        return None
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        epochs.make_job("fp32")  # the forks then have the same photos
    check = functools.partial(compare_cached_views, settings) if "cache_views" in name else None
    if check is None and ours.name == "ours" and not lct.cpu_multiplies_bf16():
        check = lambda: (True, "in fp32, since this CPU is no faster in bf16")  # noqa: E731
    return Case(usual, strongest, ours, "s", 1.0, check)


def compare_cached_views(settings: Settings) -> tuple[bool, str]:
    """Compare runs on four cached views with runs on fresh ones; holds within one point."""
    import quality

    if not settings.seeds or not (quality.SHARED / "grocery40").is_dir():
        return (
            True,
            "effect on accuracy: not measured with --quick, nor without data; tests/benchmarks/quality.py has it",
        )
    gain, error = quality.compare("grocery40", settings.seeds)["--cache_views 4"]
    return gain >= -1, f"accuracy against fresh views: {gain:+.2f} points, standard error {error:.2f}"


for _name, (_target, *_) in EPOCH_ROWS.items():
    ROWS[_name] = Row(functools.partial(epoch_case, _name), _target)

ON_A_GPU = {  # images/s and the share of waiting stand in the lines of the epochs
    "ViT-L frozen, 2,800 images/s, waiting below 5 %": "--epochs 2 --workers 16 --batch 256",
    "ViT-L fine-tuned, 45 % of 790 TFLOP/s: 940 images/s": "--epochs 2 --workers 16 --batch 256 --no-freeze_backbone --compile",
}


def print_gpu_rows() -> None:
    """Count the times that 50 steps wait for a GPU; say how the rest is measured where there is one."""
    where = "" if torch.cuda.is_available() else "no GPU here: "
    for name, flags in ON_A_GPU.items():
        print(f"{name:<53} {where}python lct_dino3.py --data_root DATA --out_dir RUN {flags}")
    name = "steps of 50 in which Python waits for the GPU, 1"
    if not torch.cuda.is_available():
        print(f"{name:<53} no GPU here: python {Path(__file__).relative_to(REPO)}")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_head(50, 100, torch.device("cuda"))
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    print(f"{name:<53} {waits}  {'pass' if waits <= 1 else 'FAIL'}")


# --------------------------------------------------------------------------------------------------------------- growth
GROWTH: dict[str, Callable[[Settings, int], Callable[[], object]]] = {}
SIZES = (1_000, 10_000, 100_000)


def grows(name: str) -> Callable:
    """Enter a function of (settings, n), which returns what is to be timed, into the table of growth."""

    def enter(make: Callable[[Settings, int], Callable[[], object]]) -> Callable:
        GROWTH[name] = make
        return make

    return enter


def draw_labels(count: int, num_classes: int) -> np.ndarray:
    """Return labels (N,), all classes equally often."""
    return np.random.default_rng(0).permutation(np.arange(count) % num_classes)


@grows("scan, n files")
def grow_scan(settings: Settings, count: int) -> Callable[[], object]:
    """List the files and look at the size and time of each."""
    root = make_files(settings.scratch / f"files{count}", count)
    return lambda: lct.stat_files(root, lct.list_images(root).paths)


@grows("near duplicates, n images")
def grow_duplicates(_: Settings, count: int) -> Callable[[], object]:
    """Find them by their hashes."""
    rng = np.random.default_rng(0)
    hashes, thumbs = rng.integers(0, 2**63, count).astype(np.uint64), rng.integers(0, 255, (count, 192), dtype=np.uint8)
    return lambda: lct.find_near_duplicates(hashes, thumbs, 4)


@grows("split, n images, 100 classes")
def grow_split(_: Settings, count: int) -> Callable[[], object]:
    """Assign train, val and test; every other image has a sister."""
    labels = np.sort(draw_labels(count, 100))
    groups = np.arange(count) - (np.arange(count) % 4 == 1)
    return lambda: lct.assign_splits(labels, groups, (0.7, 0.2, 0.1), 0)


@grows("split, n classes of 10")
def grow_split_classes(_: Settings, count: int) -> Callable[[], object]:
    """Assign train, val and test."""
    labels = np.repeat(np.arange(count), 10)
    return lambda: lct.assign_splits(labels, np.arange(10 * count), (0.7, 0.2, 0.1), 0)


@grows("order of an epoch, n images")
def grow_epoch(_: Settings, count: int) -> Callable[[], object]:
    """Draw order and seeds."""
    sampler = lct.EpochSampler(np.arange(count), draw_labels(count, 100), lct.Config())
    return lambda: list(sampler)


@grows("balanced epoch, n classes of 10")
def grow_balanced(_: Settings, count: int) -> Callable[[], object]:
    """Draw the rows."""
    config = lct.Config(balanced_per_class=True, samples_per_class=10)
    sampler = lct.EpochSampler(np.arange(10 * count), np.repeat(np.arange(count), 10), config)
    return sampler._balanced_rows


@grows("epoch of a head, n cached images")
def grow_head(_: Settings, count: int) -> Callable[[], object]:
    """Train head and class directions on features of 384 dimensions."""
    return functools.partial(train_head, count // 64, 100)


@grows("20 steps of a head, n classes")
def grow_classes(_: Settings, count: int) -> Callable[[], object]:
    """Train head and class directions."""
    return functools.partial(train_head, 20, count)


def train_head(num_steps: int, num_classes: int, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
    """Do so many steps on batches of 64 features; a GPU warns when it is waited for."""
    config, runtime = lct.Config(), lct.Runtime(device, int(device.type == "cuda"), torch.float32)
    backbone = lct.Backbone(torch.nn.Identity(), (0.5,) * 3, (0.5,) * 3)
    backbone.freeze()
    model = lct.Recognizer(
        backbone, lct.Head(384, 128, lct.count_heads(config)), lct.CRITERIA[config.criterion](config, num_classes)
    )
    state = lct.start_state(model.train().to(device), config, runtime)
    features, labels = torch.randn(64, 384), torch.arange(64) % num_classes
    batch = lct.Batch(features, labels, labels, None, [])
    if device.type == "cuda":
        lct.train_step(config, runtime, torch.nn.Identity(), state, [batch])
        torch.cuda.set_sync_debug_mode("warn")
    for _ in range(num_steps):
        lct.train_step(config, runtime, torch.nn.Identity(), state, [batch])


@grows("metrics, n images, 11 classes")
def grow_metrics(_: Settings, count: int) -> Callable[[], object]:
    """Score an epoch."""
    scores, names = np.random.default_rng(0).normal(size=(count, 11)).astype(np.float32), [str(i) for i in range(11)]
    return lambda: lct.compute_metrics(scores.argmax(axis=1), draw_labels(count, 11), names, scores)


@grows("metrics, 1,000 images, n classes")
def grow_metrics_classes(_: Settings, count: int) -> Callable[[], object]:
    """Score an epoch; above 200 million scores there is no ROC AUC."""
    scores, names = np.random.default_rng(0).random((1000, count), np.float32), [str(i) for i in range(count)]
    return lambda: lct.compute_metrics(scores.argmax(axis=1), np.arange(1000) % count, names, scores)


@grows("prototypes, n classes of 10")
def grow_prototypes(_: Settings, count: int) -> Callable[[], object]:
    """Average the references of each class."""
    rows, labels = np.ones((10 * count, 128), np.float32), np.repeat(np.arange(count), 10)
    return lambda: lct.class_centroids(rows, labels, count)


@grows("matching 256 to n classes, centroid")
def grow_matching(_: Settings, count: int) -> Callable[[], object]:
    """Score queries."""
    gallery = make_gallery(count, 1, "centroid")
    return lambda: gallery.scores(gallery.stacks[:256])


@grows("matching 256 to n classes of 5, knn")
def grow_knn(_: Settings, count: int) -> Callable[[], object]:
    """Score queries."""
    gallery = make_gallery(count, 5, "knn")
    return lambda: gallery.scores(gallery.stacks[:256])


def print_growth(settings: Settings) -> None:
    """Print how long each takes at three sizes, and the exponent of the last tenfold: 1 is linear."""
    print(f"{'what':<40}" + "".join(f"{size:>12,}" for size in SIZES) + f"{'exponent':>10}")
    for name, make in GROWTH.items():
        seconds = [min(measure(make(settings, size), True)[0] for _ in range(2)) for size in SIZES]
        cells = "".join(f"{1e3 * own:>9.1f} ms" for own in seconds)
        print(f"{name:<40}{cells}{np.log10(seconds[2] / seconds[1]):>10.2f}", flush=True)


def main() -> int:
    """Run the rows that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of: {', '.join(ROWS)}; the first letters do")
    parser.add_argument("--growth", action="store_true", help="print how cost grows with size instead")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 5, 1 of whole epochs, no accuracy")
    parser.add_argument("--data", type=Path, default=REPO.parent / "shared/data", help="real data, for accuracy")
    args = parser.parse_args()
    names = [name for name in ROWS if not args.rows or name.startswith(tuple(args.rows))]
    if not names:
        parser.error(f"no such row; there are: {', '.join(ROWS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rounds = (3, 1, 0) if args.quick else (5, 3, 8)
        settings = Settings(*rounds, args.data, Path(scratch))
        if args.growth:
            return print_growth(settings) or 0
        print(f"{'':<36}{'':>17}{'':>17}{'':>17}{'against the':>22}")
        print(
            f"{'what':<36}{'usual script':>17}{'strongest':>17}{'ours':>17}{'usual':>11}{'strongest':>11}{'target':>10}"
        )
        passes = [run_row(name, settings) for name in names]
        if not args.rows:
            print_gpu_rows()
        return int(not all(passes))


if __name__ == "__main__":
    sys.exit(main())
