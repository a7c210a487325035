"""Reads the files of a run for its report, loads thumbnails and formats figures. Not a program; needs no torch."""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import difflib
import io
import json
import stat
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

SPLIT_NAMES = ("train", "val", "test")
MATCHER_NAMES = {
    "centroid": "nearest centroid",
    "prototypes": "nearest of several prototypes a class",
    "knn": "k nearest references of a class",
}
BASELINE_NAMES = {
    "logreg": "logistic regression",
    "logreg_views": "logistic regression with augmented views",
    "nn1": "nearest neighbour",
    "centroid": "nearest centroid",
}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # otherwise Pillow tries 40 decoders, Ghostscript among them
MAX_PIXELS = 100_000_000  # an image whose header claims more is refused before decoding
PADDING_GRAY = 114  # replaces the background of a masked crop, and transparent pixels
ORIENTATION = 0x0112  # EXIF tag
MASK_LEVEL = 127  # pixels above it are the object: brightness in a mask, opacity in a cutout
CARD_THUMB_PX = 96
MAX_CARDS = 48  # images of wrong answers per section
MAX_LISTED = 200
GOLDEN_ANGLE = 137.508  # degrees; its multiples never come close to each other on the colour circle
# Ten hues that stay distinct on white and on near-black; more classes take hues at multiples of the golden angle.
TEN_COLORS = (
    *("#4c78c8", "#e0812b", "#3f9e5b", "#cf4b4b", "#8d6bc0"),
    *("#a0705a", "#d573b5", "#7f868f", "#a8a32c", "#2ba5b5"),
)


class ReportError(Exception):
    """A folder or file cannot be used for a page; the message is one sentence for the user."""


class Shot(NamedTuple):
    """One view of a crop: as it was cut (`bbox`), or with its background replaced (`mask`)."""

    path: str  # relative to data_root
    view: str


@dataclass(frozen=True)
class Prediction:
    """A row of predictions.csv: the answer of the gallery to a crop of known class."""

    shot: Shot
    class_name: str
    answer: str  # the nearest class, even if below its threshold
    cosine: float
    probability: float
    class_cosine: float
    nearest_reference: Shot  # of the answered class
    nearest_of_class: Shot  # without a path if the class has no reference
    mask: str
    group: str  # equal for crops that were kept in one split, e.g. of one photo; older runs have none: each image is its own

    @property
    def is_right(self) -> bool:
        """Whether the answer is the true class."""
        return self.answer == self.class_name


class Embeddings(NamedTuple):
    """embeddings.npz: N views of crops."""

    embeddings: np.ndarray  # (N, D) float32 unit norm
    labels: np.ndarray  # (N,) int
    paths: np.ndarray  # (N,) str
    views: np.ndarray  # (N,) int, 1 = with its background replaced
    splits: np.ndarray  # (N,) str
    masks: np.ndarray  # (N,) str, paths relative to data_root, '' without a mask


@dataclass(frozen=True)
class Figures:
    """The figures of a run, from its events; if a resumed run repeated an epoch, its last event counts."""

    epochs: list[dict[str, Any]]  # epoch_end events, by epoch
    best: dict[str, Any] | None  # best_update event
    baseline: dict[str, Any]  # accuracies of the frozen backbone, by split
    prototypes: dict[str, Any] | None  # proto_end event
    test: dict[str, Any] | None  # test_end event
    views: dict[str, Any] | None  # test_views event
    measured: dict[str, Any] | None  # measured event
    unseen: dict[str, Any] | None  # unseen_classes event
    started: float | None  # seconds since 1970
    ending: str  # of a run that has ended: completed, interrupted, diverged or failed
    is_continued: bool  # a finished run that has trained on, and has not finished again
    scored: str  # the split of the scores below: test, else val
    scores: dict[str, Any]  # acc by prototypes, classifier_acc, f1_macro, auc_macro, recall_at_1
    per_class: dict[str, dict[str, Any]]  # by class name


@dataclass(frozen=True)
class Run:
    """The contents of a run's files."""

    path: Path
    config: dict[str, Any]
    figures: Figures
    class_names: tuple[str, ...]
    counts: dict[str, dict[str, int]]  # images of each class, by split
    data_report: dict[str, Any] | None
    thresholds: dict[str, float]  # similarity below which the answer is `unknown`, by class
    pooled: frozenset[str]  # classes that use one common threshold, fitted on all classes together
    predictions: list[Prediction]
    view_predictions: list[Prediction]  # test crops with a mask, each in both views
    embeddings: Embeddings | None
    label_of: dict[str, int]  # by class name

    def count(self, split: str) -> int:
        """Return the number of images in a split."""
        return sum(self.counts[split].values())

    @property
    def missing_test(self) -> str:
        """The reason why a page shows no single test images."""
        if self.figures.is_continued:
            return "The run has trained on since it was tested, and is not finished again"
        return "There is no predictions.csv in the run's folder" if self.count("test") else "No test split"

    @property
    def verdict(self) -> str:
        """Whether training helped, in a few words."""
        if self.figures.test:
            return self.figures.test["verdict"]
        return "no test split, no verdict" if self.figures.prototypes else f"{self.figures.ending}, no verdict yet"


def read_run(folder: Path) -> Run:
    """Read the files of a run; only config.json and metrics.jsonl must exist. Raises ReportError."""
    if missing := [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]:
        raise ReportError(f"{folder} is no folder of a run: it has no {' and no '.join(missing)}")
    config = read_file(folder / "config.json", read_json)
    if "num_devices" in config:
        raise ReportError(f"{folder} is of lct-dino-3.py, whose figures are others; train anew")
    names = tuple(config["data"]["classes"])
    splits = read_file(folder / "splits.json", read_json) or {}
    gallery = read_file(folder / "prototypes.npz", read_arrays) or {}
    meta = json.loads(str(gallery["meta"])) if gallery else {}
    figures = collect_figures(read_file(folder / "metrics.jsonl", read_events))
    readers = {
        "predictions.csv": read_predictions,
        "predictions_by_view.csv": read_predictions,
        "embeddings.npz": read_embeddings,
    }
    answers = {name: None if figures.is_continued else read_file(folder / name, read) for name, read in readers.items()}
    run = Run(
        path=folder,
        config=config,
        figures=figures,
        class_names=names,
        counts={split: {name: len(splits.get(split, {}).get(name, ())) for name in names} for split in SPLIT_NAMES},
        data_report=read_file(folder / "data_report.json", read_json),
        thresholds=dict(zip(gallery["id2cls"].tolist(), gallery["thresholds"].tolist(), strict=True))
        if gallery
        else {},
        pooled=frozenset(meta.get("pooled_thresholds", ())),
        predictions=answers["predictions.csv"] or [],
        view_predictions=answers["predictions_by_view.csv"] or [],
        embeddings=answers["embeddings.npz"],
        label_of={name: label for label, name in enumerate(names)},
    )
    for name, items in (("predictions.csv", run.predictions), ("predictions_by_view.csv", run.view_predictions)):
        if unknown := {name for item in items for name in (item.class_name, item.answer)}.difference(names):
            raise ReportError(f"{folder / name} names a class that the run does not have: {min(unknown)}")
    return run


def read_file(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return `read(path)`, None for a missing file. Raises ReportError for one that cannot be read."""
    if not path.exists():
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error, zipfile.BadZipFile) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0] or type(error).__name__
        remedy = "start the training command again: it writes the files of a finished run anew"
        if path.name in ("splits.json", "data_report.json"):  # written once, when a run begins
            remedy = "restore it from a copy, or move it away: the page does without what it holds"
        raise ReportError(f"{path} cannot be read: {reason}; {remedy}") from error


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def collect_figures(events: list[dict[str, Any]]) -> Figures:
    """Collect the figures of a run from its events; those of an end after which it has trained on do not count."""
    last = {event["event"]: event for event in events}  # a later event replaces an earlier one of the same kind
    kinds = [event["event"] for event in events]
    num_trained = max((number for number, kind in enumerate(kinds, 1) if kind == "epoch_end"), default=0)
    is_continued = "proto_end" in kinds[:num_trained] and "proto_end" not in kinds[num_trained:]
    for kind in ("proto_end", "test_end", "measured", "test_views") if is_continued else ():
        last.pop(kind, None)
    by_epoch = {event["epoch"]: event for event in events if event["event"] == "epoch_end"}
    best = last.get("best_update")
    test = last.get("test_end")
    if test:
        scores = {**test["prototypes"], "classifier_acc": test["classifier"]["acc"]}
        per_class = test["per_class"]
    else:
        epoch = by_epoch.get(best["epoch"] if best else None, {"val": {}})
        scores = {**epoch["val"], "acc": epoch["val"].get("proto_acc"), "classifier_acc": epoch["val"].get("acc")}
        per_class = epoch.get("val_per_class", {})  # left out with --no-save_metrics
    return Figures(
        epochs=[by_epoch[epoch] for epoch in sorted(by_epoch)],
        best=best,
        baseline=last.get("baseline_end", {}),
        prototypes=last.get("proto_end"),
        test=test,
        views=last.get("test_views"),
        measured=last.get("measured"),
        unseen=last.get("unseen_classes"),
        started=events[0]["time"] if events else None,
        ending=events[-1].get("status", "not finished") if events else "not finished",
        is_continued=is_continued,
        scored="test" if test else "val",
        scores=scores,
        per_class=per_class,
    )


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of metrics.jsonl without damaged lines, such as one that a killed run wrote only half."""
    events = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and "event" in record:
                events.append(record)
    return events


def read_predictions(path: Path) -> list[Prediction]:
    """Return the rows of predictions.csv or predictions_by_view.csv."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if "mask" not in (reader.fieldnames or ()):
            raise ValueError("its header is not whole")
        rows = list(reader)
    if any(None in row.values() for row in rows):
        raise ValueError("it has a row that is not whole")
    return [
        Prediction(
            shot=Shot(row["path"], row["view"]),
            class_name=row["class"],
            answer=row["answer"],
            cosine=float(row["cosine"]),
            probability=float(row["probability"]),
            class_cosine=float(row["class_cosine"]),
            nearest_reference=Shot(row["nearest_reference"], row["nearest_reference_view"]),
            nearest_of_class=Shot(row["nearest_of_class"], row["nearest_of_class_view"]),
            mask=row["mask"],
            group=row.get("group", row["path"]),
        )
        for row in rows
    ]


def read_embeddings(path: Path) -> Embeddings:
    """Return the contents of embeddings.npz."""
    arrays = read_arrays(path)
    return Embeddings(*(arrays[name] for name in Embeddings._fields))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file; pickled objects, which could run code, are refused."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


class Pictures:
    """Thumbnails of a run's crops. `missing` has the paths of those that were deleted or damaged since training."""

    def __init__(self, run: Run, data_root: Path | None) -> None:
        options = run.config["options"]
        self.root = data_root or Path(options["data_root"])
        self.missing: set[str] = set()
        self._image_bits = options.get("image_bits", ())
        self._masks_dirname = options.get("masks_dirname", "masks")
        self._masks = {item.shot.path: item.mask for item in run.predictions + run.view_predictions}
        if run.embeddings:
            self._masks.update(zip(run.embeddings.paths, run.embeddings.masks, strict=True))

    def load(self, shot: Shot, size: int) -> Image.Image | None:
        """Return a crop, its longer side at most `size` px, gray outside the mask; None if it cannot be read."""
        try:
            image = load_thumbnail(self.root / shot.path, size, self._image_bits)
        except Exception:  # decoders raise anything from KeyError to struct.error on a damaged file
            self.missing.add(shot.path)
            return None
        if shot.view == "mask" and (mask_path := self._masks.get(shot.path)):
            is_alpha = Path(mask_path).parent.name != self._masks_dirname  # a cutout, or a crop with an alpha channel
            try:
                mask = load_mask(self.root / mask_path, is_alpha, image.size)
            except Exception:  # as above
                self.missing.add(mask_path)
            else:
                image = Image.composite(image, Image.new("RGB", image.size, (PADDING_GRAY,) * 3), mask)
        return image

    def uri(self, shot: Shot | None) -> str | None:
        """Return a thumbnail as a data URI, None without an image."""
        image = self.load(shot, CARD_THUMB_PX) if shot and shot.path else None
        return jpeg_uri(image) if image else None


def load_thumbnail(path: Path, size: int, bits: Sequence[int]) -> Image.Image:
    """Return an upright RGB image, its longer side at most `size` px; `bits` are the --image_bits of the run."""
    with open_picture(path) as source:
        is_deep = bits and source.mode == "RGB" and ";16" in str(source.tile)  # which Pillow forgets when it decodes
        image = source if source.format == "JPEG" else to_rgb(source, bits)
        if is_deep:
            source.load()  # turns a TIFF upright, as OpenCV does
            image = read_deep_rgb(path, bits) or image
        image.thumbnail((size, size))  # decodes a JPEG at down to an eighth of its size
        image = image.convert("RGB")
        with contextlib.suppress(SyntaxError):  # of damaged EXIF
            # Read last: Pillow turns a TIFF upright.
            image.getexif()[ORIENTATION] = source.getexif().get(ORIENTATION, 1)
            return ImageOps.exif_transpose(image)
        return image


def read_deep_rgb(path: Path, bits: Sequence[int]) -> Image.Image | None:
    """Return an image with 16-bit colours as RGB, scaled as in training; None if training, too, took what Pillow reads."""
    import cv2

    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)  # Pillow drops the lower 8 bits
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        return None
    factor = 255 / (2 ** fitting_bits(values.max(), bits) - 1)
    bytes_of = np.rint(np.arange(1 << 16) * factor).clip(0, 255).astype(np.uint8)
    return Image.fromarray(bytes_of[values[:, :, ::-1]])


def fitting_bits(highest: float, bits: Sequence[int]) -> int:
    """Return the smallest of `bits` that holds a value, or the largest if none does; 16 without `bits`."""
    return next((number for number in sorted(bits) if highest < 2**number), max(bits, default=16))


def to_rgb(image: Image.Image, bits: Sequence[int] = ()) -> Image.Image:
    """Return an image of any mode as RGB: deep gray is scaled as in training, transparent pixels become gray."""
    if image.mode.startswith(("I", "F")):  # 16-bit and float gray, which Pillow's conversion clips to white
        values = np.asarray(image, dtype=np.float64)
        highest = values.max()
        is_deep = image.mode.startswith("I;16") or highest > 255 or (image.mode == "I" and bits)
        depth = fitting_bits(highest, () if image.mode == "F" else bits)
        factor = 255 / (2**depth - 1) if is_deep else 255.0 if image.mode == "F" and highest <= 1 else 1.0
        image = Image.fromarray(np.clip(np.rint(values * factor), 0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (PADDING_GRAY, PADDING_GRAY, PADDING_GRAY, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image if image.mode == "RGB" else image.convert("RGB")


def load_mask(path: Path, is_alpha: bool, size: tuple[int, int]) -> Image.Image:
    """Return the mask of a thumbnail of `size` as 8-bit gray, 255 = object, which is what it is in training (`decode_mask`)."""
    with open_picture(path) as image:
        upright = ImageOps.exif_transpose(image)
        levels = np.asarray(to_rgb(upright)).max(axis=2)
        mask = levels > MASK_LEVEL
        alpha = np.ones_like(mask)
        if upright.has_transparency_data:
            alpha = np.asarray(upright.convert("RGBA").getchannel("A")) > MASK_LEVEL
        if is_alpha or (0 < alpha.mean() < 1 and mask[alpha].mean() in (0, 1)):  # an object on transparent ground
            mask = alpha
        elif mask.mean() in (0, 1):  # 0 and another value, e.g. 1
            mask = (np.asarray(upright) if upright.mode[0] in "PIF" else levels) != 0
        return Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)


def open_picture(path: Path) -> Image.Image:
    """Open an image file; its pixels are decoded on first use. Raises ValueError if it is not a regular file or too large."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would block until something writes to it
        raise ValueError("is no regular file")
    image = Image.open(path, formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("has too many pixels")
    return image


def jpeg_uri(image: Image.Image) -> str:
    """Return an image as the data URI of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; the error for an unknown option suggests the closest one."""
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {close[0]}?" if close else ""))
    return options


def format_number(value: float | None) -> str:
    """Format with three decimals; a missing figure, e.g. of an absent class, becomes a dash."""
    return "–" if value is None else f"{value:.3f}"


def format_gain(value: float | None) -> str:
    """Format with three decimals and a sign; a gain that rounds to zero becomes `0`."""
    return "–" if value is None else "0" if abs(value) < 0.0005 else f"{value:+.3f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """Format as hours and minutes, minutes and seconds, or seconds."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_seconds:02d} s" if minutes else f"{seconds:.1f} s"


def shorten(text: str, limit: int) -> str:
    """Cut a text in the middle, because the names of similar classes often differ at their ends."""
    return text if len(text) <= limit else f"{text[: limit * 3 // 5]}…{text[-(limit * 2 // 5 - 1) :]}"


def capitalize(text: str) -> str:
    """Make the first letter a capital and keep the others."""
    return text[:1].upper() + text[1:]


def name_training(options: dict[str, Any]) -> str:
    """Describe which part of the backbone is trained."""
    if not options["freeze_backbone"]:
        return "fine-tuned"
    if blocks := options.get("unfreeze_blocks"):
        return f"fine-tuned in its last {blocks} blocks" if blocks > 1 else "fine-tuned in its last block"
    return f"LoRA of rank {options['lora_rank']}" if options.get("lora_rank") else "frozen"


def name_matcher(prototypes: dict[str, Any] | None) -> str:
    """Describe how a query is matched, from the proto_end event."""
    if prototypes is None:
        return "–"
    matcher = MATCHER_NAMES[prototypes["matcher"]]
    if prototypes["matcher"] == "knn":
        k = prototypes["knn_k"]
        matcher = "nearest reference" if k == 1 else f"mean of the {k} nearest references of a class"
    weight = prototypes.get("feature_weight")
    return f"{matcher}; {weight:.0%} of a cosine from features of the backbone" if weight else matcher


def make_colors(count: int) -> list[str]:
    """Return `count` CSS colours, for classes or runs."""
    if count <= len(TEN_COLORS):
        return list(TEN_COLORS[:count])
    tones = ((62, 50), (48, 40), (58, 63))  # saturation and lightness alternate: 40 hues alone are too close
    return [f"hsl({i * GOLDEN_ANGLE % 360:.0f} {tones[i % 3][0]}% {tones[i % 3][1]}%)" for i in range(count)]
