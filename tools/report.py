"""Makes report.html of a run, or one page that compares several, of the files in their folders alone.

    python tools/report.py RUN                   RUN/report.html
    python tools/report.py RUN1 RUN2 ...         compare.html in the current folder
    --out FILE                                   the page goes there
    --data_root DIR                              the pictures lie there now

Needs neither torch nor the script that trained. A file that a run lacks costs the sections that it feeds. A page opens offline,
and its bytes are a function of its input: no clock, no random state. Text from the data counts as hostile: everything is escaped,
and the page runs our one script, which reads no data but what it finds in the page.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

MARK = (
    b'<meta name="generator" content="lct_dino3 report">'  # a file that holds it near its beginning may be overwritten
)
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
RETRIEVAL_NAMES = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "map_at_r": "mAP@R"}
FEW_IMAGES = 10  # below, one image moves the recall of a class by more than ten points
SIGNIFICANCE = 0.05  # of the sign test between two runs

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # Pillow tries 40 decoders otherwise, Ghostscript among them
MAX_PIXELS = 100_000_000  # a header that claims more is refused before anything is decoded
PADDING_GRAY = 114  # what the background of a masked crop, and what is transparent, is shown as
ORIENTATION = 0x0112  # EXIF tag
MASK_LEVEL = 127  # brighter pixels of a mask, more opaque ones of a cutout, are the object

MAP_MAX_POINTS = 1_500  # t-SNE of 1,500 x 128 takes seconds, and more dots only cover each other
MIN_TSNE_POINTS = 50  # fewer are placed by PCA: they make no neighbourhoods, and scikit-learn takes a second to import
MAP_THUMB_PX = 48  # a multiple of 16: JPEG chroma blocks then never bleed into the neighbouring cell of the sprite
MAP_SPRITE_COLUMNS = 40
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 1000, 660, 22  # px of a wide screen; the style sheet has the same proportion
CARD_THUMB_PX = 96
MAX_CARDS = 48  # pictures of wrong answers in a section
MAX_CONFLICT_GROUPS = 12  # label conflicts shown as pictures; the list below them has all
MAX_LISTED = 200
MAX_MATRIX_CLASSES = 60  # beyond, a cell is smaller than a finger and a name smaller than a reader's patience
MAX_CLASSES_BESIDE_PAIRS = 20  # up to here the matrix leaves room for the list of pairs beside it
MAX_VIEW_CLASSES = 12  # whose recall with and without background differs most
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 44, 470, 10, 206  # SVG user units of the plot in a 480 x 250 chart
MAX_DOTTED_EPOCHS = 40  # dots show the single epoch, but clutter a long run
GOLDEN_ANGLE = 137.508  # degrees; multiples of it never come close to each other on the colour circle
# Ten hues that stay apart on white and on near-black; more classes walk the colour circle by the golden angle.
TEN_COLORS = (
    *("#4c78c8", "#e0812b", "#3f9e5b", "#cf4b4b", "#8d6bc0"),
    *("#a0705a", "#d573b5", "#7f868f", "#a8a32c", "#2ba5b5"),
)
# Options that say where and how a run was made, not which.
PLACE_OPTIONS = {"command", "config", "out_dir", "resume", "overwrite", "experiment_name", "clearml_task_name"}
# Figures of which more is not better: one is had at the cost of the other, and the last is no merit of the training.
WITHOUT_BEST = ("Answered above thresholds", "Right among those", "Frozen backbone, best baseline")


class ReportError(Exception):
    """A folder or file that no page can be made of; the text is one sentence for people."""


# --- the files of a run


class Shot(NamedTuple):
    """What a picture shows: a crop as it was cut (view `bbox`), or with its background replaced (`mask`)."""

    path: str  # relative to data_root
    view: str


@dataclass(frozen=True)
class Prediction:
    """A row of predictions.csv: what the gallery answers to a crop whose class is known."""

    shot: Shot
    class_name: str
    answer: str  # the nearest class, whatever its threshold says
    cosine: float
    probability: float
    class_cosine: float
    nearest_reference: Shot  # of the answered class
    nearest_of_class: Shot
    mask: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the class."""
        return self.answer == self.class_name


@dataclass(frozen=True)
class Embeddings:
    """embeddings.npz: N views of crops."""

    embeddings: np.ndarray  # (N, D) float32 unit norm
    labels: np.ndarray  # (N,) int
    paths: list[str]  # (N,)
    views: list[str]  # (N,)
    splits: np.ndarray  # (N,) str
    masks: list[str]  # (N,) '' where there is none


@dataclass(frozen=True)
class Figures:
    """The figures of a run, picked from its events; a resumed run repeats epochs and the last one counts."""

    epochs: list[dict[str, Any]]  # epoch_end events, by epoch
    best: dict[str, Any] | None  # best_update event
    baseline: dict[str, Any]  # accuracies of the frozen backbone, by split
    prototypes: dict[str, Any] | None  # proto_end event
    test: dict[str, Any] | None  # test_end event
    views: dict[str, Any] | None  # test_views event
    measured: dict[str, Any] | None  # measured event
    unseen: dict[str, Any] | None  # unseen_classes event
    started: float | None  # seconds since 1970
    scored: str  # the split that the page leads with: test, else val
    scores: dict[str, Any]  # of that split: acc by prototypes, classifier_acc, f1_macro, auc_macro, recall_at_1
    per_class: dict[str, dict[str, Any]]  # of that split, by class name


@dataclass(frozen=True)
class Run:
    """All that the files of a run say."""

    path: Path
    config: dict[str, Any]
    figures: Figures
    class_names: tuple[str, ...]
    counts: dict[str, dict[str, int]]  # images of each class, by split
    data_report: dict[str, Any] | None
    thresholds: dict[str, float]  # similarity below which the answer is `unknown`, by class
    pooled: frozenset[str]  # classes whose threshold is that of all classes together
    predictions: list[Prediction]
    view_predictions: list[Prediction]  # test crops that have a mask, each as `bbox` and as `mask`
    embeddings: Embeddings | None
    label_of: dict[str, int]  # number of each class

    def count(self, split: str) -> int:
        """Return the number of images in a split."""
        return sum(self.counts[split].values())

    @property
    def missing_test(self) -> str:
        """Why there is nothing to say about single test images."""
        return "There is no predictions.csv in the run's folder" if self.count("test") else "No test split"

    @property
    def verdict(self) -> str:
        """What the training was good for, in a few words."""
        if self.figures.test:
            return self.figures.test["verdict"]
        return "no test split, no verdict" if self.figures.prototypes else "not finished, no verdict yet"


def read_run(folder: Path) -> Run:
    """Read the files of a run; all but config.json and metrics.jsonl may be missing."""
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise ReportError(f"{folder} is no folder of a run: it has no config.json and metrics.jsonl")
    config = read_file(folder / "config.json", read_json)
    if "num_devices" in config:
        raise ReportError(f"{folder} is of lct-dino-3.py, whose figures are others; train anew")
    names = tuple(config["data"]["classes"])
    splits = read_file(folder / "splits.json", read_json) or {}
    gallery = read_file(folder / "prototypes.npz", read_arrays) or {}
    meta = json.loads(str(gallery["meta"])) if gallery else {}
    run = Run(
        path=folder,
        config=config,
        figures=collect_figures(read_file(folder / "metrics.jsonl", read_events)),
        class_names=names,
        counts={split: {name: len(splits.get(split, {}).get(name, ())) for name in names} for split in SPLIT_NAMES},
        data_report=read_file(folder / "data_report.json", read_json),
        thresholds=dict(zip(gallery["id2cls"].tolist(), gallery["thresholds"].tolist(), strict=True))
        if gallery
        else {},
        pooled=frozenset(meta.get("pooled_thresholds", ())),
        predictions=read_file(folder / "predictions.csv", read_predictions) or [],
        view_predictions=read_file(folder / "predictions_by_view.csv", read_predictions) or [],
        embeddings=read_file(folder / "embeddings.npz", read_embeddings),
        label_of={name: label for label, name in enumerate(names)},
    )
    named = {name for item in run.predictions + run.view_predictions for name in (item.class_name, item.answer)}
    if strange := sorted(named - set(names)):
        raise ReportError(f"{folder / 'predictions.csv'} names a class that the run does not have: {strange[0]}")
    return run


def read_file(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what `read` makes of a file, None where there is none."""
    if not path.exists():
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error, zipfile.BadZipFile) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0] or type(error).__name__
        raise ReportError(f"{path} cannot be read: {reason}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; a damaged line, such as the half one that a kill leaves, is left out."""
    events = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and "event" in record:
                events.append(record)
    return events


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file; nothing in it is executed."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_embeddings(path: Path) -> Embeddings:
    """Return the content of embeddings.npz."""
    arrays = read_arrays(path)
    return Embeddings(
        embeddings=arrays["embeddings"],
        labels=arrays["labels"],
        paths=arrays["paths"].tolist(),
        views=["mask" if view else "bbox" for view in arrays["views"].tolist()],
        splits=arrays["splits"],
        masks=arrays["masks"].tolist(),
    )


def read_predictions(path: Path) -> list[Prediction]:
    """Return the rows of predictions.csv or predictions_by_view.csv."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if "mask" not in (reader.fieldnames or ()):
            raise ValueError("its header is not whole")
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
            )
            for row in reader
        ]


def collect_figures(events: list[dict[str, Any]]) -> Figures:
    """Pick the figures of a run from its events."""
    last = {event["event"]: event for event in events}  # a later event replaces an earlier one of its kind
    by_epoch = {event["epoch"]: event for event in events if event["event"] == "epoch_end"}
    best = last.get("best_update")
    test = last.get("test_end")
    if test:
        scores = {**test["prototypes"], "classifier_acc": test["classifier"]["acc"]}
        per_class = test["per_class"]
    else:
        epoch = by_epoch.get(best["epoch"] if best else None, {"val": {}, "val_per_class": {}})
        scores = {**epoch["val"], "acc": epoch["val"].get("proto_acc"), "classifier_acc": epoch["val"].get("acc")}
        per_class = epoch["val_per_class"]
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
        scored="test" if test else "val",
        scores=scores,
        per_class=per_class,
    )


# --- pictures


class Pictures:
    """Thumbnails of the crops of a run; one that was deleted or damaged since training is missing, and counted."""

    def __init__(self, run: Run, data_root: Path | None) -> None:
        options = run.config["options"]
        self.root = data_root or Path(options["data_root"])
        self.num_missing = 0
        self._masks_dirname = options.get("masks_dirname", "masks")
        self._masks = {item.shot.path: item.mask for item in run.predictions + run.view_predictions}
        if run.embeddings:
            self._masks.update(zip(run.embeddings.paths, run.embeddings.masks, strict=True))

    def load(self, shot: Shot, size: int) -> Image.Image | None:
        """Return a crop with its longer side at most `size`, gray outside the mask; None if it cannot be had."""
        try:
            image = load_thumbnail(self.root / shot.path, size)
        except Exception:  # decoders raise anything from KeyError to struct.error on a damaged file
            self.num_missing += 1
            return None
        mask_path = self._masks.get(shot.path, "") if shot.view == "mask" else ""
        if mask_path:
            is_alpha = Path(mask_path).parent.name != self._masks_dirname  # a cutout, or a crop with a mask of its own
            try:
                mask = load_mask(self.root / mask_path, is_alpha, image.size)
            except Exception:
                self.num_missing += 1
            else:
                image = Image.composite(image, Image.new("RGB", image.size, (PADDING_GRAY,) * 3), mask)
        return image

    def uri(self, shot: Shot | None) -> str | None:
        """Return a thumbnail as a data URI."""
        image = self.load(shot, CARD_THUMB_PX) if shot else None
        return jpeg_uri(image) if image else None


def open_picture(path: Path) -> Image.Image:
    """Open an image file; its pixels are decoded when they are first used."""
    if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would wait for a writer for ever
        raise ValueError("is no regular file")
    image = Image.open(path, formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("has too many pixels")
    return image


def load_thumbnail(path: Path, size: int) -> Image.Image:
    """Return an upright RGB image with its longer side at most `size`; gray shows through what is transparent."""
    with open_picture(path) as source:
        image = source
        if image.mode.startswith(("I", "F")):  # 16-bit and float gray, which Pillow's own conversion clips to white
            values = np.asarray(image, dtype=np.float64)
            is_16_bit = image.mode.startswith("I;16") or values.max() > 255
            factor = 1 / 257 if is_16_bit else 255 if image.mode == "F" and values.max() <= 1 else 1
            image = Image.fromarray(np.clip(np.rint(values * factor), 0, 255).astype(np.uint8))
        elif image.has_transparency_data:
            image = Image.new("RGBA", source.size, (PADDING_GRAY, PADDING_GRAY, PADDING_GRAY, 255))
            image.alpha_composite(source.convert("RGBA"))
        if image.mode != "RGB" and image.format != "JPEG":
            image = image.convert("RGB")  # palettes cannot be resized
        image.thumbnail((size, size))  # a JPEG is decoded at an eighth of its size where that is enough
        image = image.convert("RGB")
        image.getexif()[ORIENTATION] = source.getexif().get(ORIENTATION, 1)  # read last: a TIFF turns itself upright
        return ImageOps.exif_transpose(image)


def load_mask(path: Path, is_alpha: bool, size: tuple[int, int]) -> Image.Image:
    """Return the mask of a thumbnail as 8-bit gray: 255 is object."""
    with open_picture(path) as image:
        upright = ImageOps.exif_transpose(image)
        if is_alpha:
            mask = upright.convert("RGBA").getchannel("A")
        elif upright.mode in ("1", "L"):
            mask = upright.convert("L")
        else:
            mask = Image.fromarray(np.asarray(upright.convert("RGB")).max(axis=2))  # drawn in colours
        return mask.point(lambda value: 255 if value > MASK_LEVEL else 0).resize(size, Image.Resampling.BOX)


def jpeg_uri(image: Image.Image) -> str:
    """Return an image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- text


def format_number(value: float | None) -> str:
    """Three decimals; a dash where there is no figure, as for an absent class."""
    return "–" if value is None else f"{value:.3f}"


def format_gain(value: float | None) -> str:
    """Three decimals with a sign; nothing has none."""
    return "–" if value is None else "0" if abs(value) < 0.0005 else f"{value:+.3f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def shorten(text: str, limit: int) -> str:
    """Cut the middle: the names of similar classes often differ at their ends."""
    return text if len(text) <= limit else f"{text[: limit * 3 // 5]}…{text[-(limit * 2 // 5 - 1) :]}"


def capitalize(text: str) -> str:
    """Make the first letter a capital, and leave the others."""
    return text[:1].upper() + text[1:]


def name_training(options: dict[str, Any]) -> str:
    """Return in words which part of the backbone is trained."""
    if not options["freeze_backbone"]:
        return "fine-tuned"
    blocks = options.get("unfreeze_blocks")
    if blocks:
        return f"fine-tuned in its last {blocks} blocks" if blocks > 1 else "fine-tuned in its last block"
    rank = options.get("lora_rank")
    return f"LoRA of rank {rank}" if rank else "frozen"


def name_matcher(prototypes: dict[str, Any] | None) -> str:
    """Return in words how a query is matched, from the proto_end event."""
    if prototypes is None:
        return "–"
    words = MATCHER_NAMES[prototypes["matcher"]]
    if prototypes["matcher"] == "knn":
        k = prototypes["knn_k"]
        words = "nearest reference" if k == 1 else f"mean of the {k} nearest references of a class"
    weight = prototypes.get("feature_weight")
    return f"{words}; {weight:.0%} of a cosine from features of the backbone" if weight else words


def make_colors(count: int) -> list[str]:
    """Return colours for that many classes or runs."""
    if count <= len(TEN_COLORS):
        return list(TEN_COLORS[:count])
    tones = ((62, 50), (48, 40), (58, 63))  # saturation and lightness alternate: 40 hues alone are too close
    return [f"hsl({i * GOLDEN_ANGLE % 360:.0f} {tones[i % 3][0]}% {tones[i % 3][1]}%)" for i in range(count)]


# --- the page of one run


def describe_run(run: Run, pictures: Pictures) -> dict[str, Any]:
    """Return what the template shows of one run."""
    num_shots = len({item.shot.path for item in run.predictions})
    return {
        "class_names": run.class_names,
        "colors": make_colors(len(run.class_names)),
        "num_images": sum(map(run.count, SPLIT_NAMES)),
        "num_test": len(run.predictions),
        "of_test": "views of test images" if len(run.predictions) > num_shots else "test images",
        "missing_test": run.missing_test,
        "split_names": SPLIT_NAMES,
        "max_listed": MAX_LISTED,
        "figures": run.figures,
        "header": view_header(run),
        "facts": list_facts(run),
        "options": sorted(run.config["options"].items()),
        "curves": view_curves(run.figures),
        "classes": list_classes(run),
        "small_support": FEW_IMAGES,
        "confusion": view_confusion(run),
        "map": view_map(run, pictures),
        "errors": view_errors(run),
        "views": compare_views(run),
        "measured": view_measured(run.figures.measured, run.figures.unseen),
        "unseen": run.figures.unseen,
        "calibration": view_calibration(run.figures),
        "sessions": view_sessions(run.figures.test),
        "data": view_data(run.data_report),
    }


def view_header(run: Run) -> dict[str, Any]:
    """Return verdict, key figures and the bars that compare the trained model with the frozen backbone."""
    figures = run.figures
    verdict, _, note = run.verdict.partition(": ")
    if figures.test and figures.measured and figures.prototypes:
        low, high = figures.measured["closed"][figures.prototypes["matcher"]]["acc"]["interval"]
        note = f"{capitalize(note)}. Test images put the accuracy between {low:.3f} and {high:.3f} (95 % interval)."
    elif not figures.test:
        note = "The figures below are of the val split, which also chose the best epoch: expect less on new data."
    frozen = figures.baseline.get(figures.scored, {})
    bars = [("trained, prototypes", figures.scores.get("acc"), "trained")]
    bars += [("trained, classifier", figures.scores.get("classifier_acc"), "trained")]
    bars += [(f"frozen, {text}", frozen.get(f"{key}_acc"), "frozen") for key, text in BASELINE_NAMES.items()]
    return {
        "verdict": capitalize(verdict),
        "tone": {"training helped": "good", "training hurt": "bad"}.get(verdict, "plain"),
        "note": note,
        "tiles": list_tiles(run),
        "bars": [{"name": name, "value": value, "kind": kind} for name, value, kind in bars if value is not None],
    }


def list_tiles(run: Run) -> list[tuple[str, str, str]]:
    """Return the key figures as (label, value, note)."""
    figures = run.figures
    best = figures.best
    by = "prototypes" if figures.test else "the classifier"
    best_note = f"of {len(figures.epochs)}; {best['metric']} {best['value']:.3f}" if best else "none was named"
    in_split = {split: run.count(split) for split in SPLIT_NAMES}
    in_class = [sum(run.counts[split][name] for split in SPLIT_NAMES) for name in run.class_names]
    scores = (
        ("Accuracy", "acc", f"prototypes, {in_split['test']:,} test images" if figures.test else "prototypes, val"),
        ("Macro F1", "f1_macro", f"{by}, {figures.scored}"),
        ("Macro ROC AUC", "auc_macro", f"{by}, {figures.scored}"),
        ("Recall@1", "recall_at_1", f"nearest reference, {figures.scored}"),
        ("Classifier accuracy", "classifier_acc", f"trained one, {figures.scored}"),
    )
    return [
        *((label, format_number(figures.scores.get(key)), note) for label, key, note in scores),
        ("Best epoch", f"{best['epoch']}" if best else "–", best_note),
        ("Images", f"{sum(in_class):,}", ", ".join(f"{count:,} {split}" for split, count in in_split.items() if count)),
        ("Classes", f"{len(run.class_names):,}", f"{min(in_class):,} to {max(in_class):,} images each"),
    ]


def list_facts(run: Run) -> list[tuple[str, Any]]:
    """Return how the run was made as (name, value)."""
    figures = run.figures
    options = run.config["options"]
    seconds = sum(epoch["seconds"] for epoch in figures.epochs)
    started = None if figures.started is None else datetime.fromtimestamp(figures.started, tz=UTC)
    made = figures.prototypes
    return [
        ("Model", options["model_id"]),
        ("Backbone", name_training(options)),
        ("Embedding", options["emb_dim"]),
        ("Image size", options["img_size"]),
        ("Matcher", name_matcher(made)),
        ("References", f"{made['refs']:,}, {made['prototypes']:,} prototypes" if made else "–"),
        ("Epochs", f"{len(figures.epochs)} of {options['epochs']}, {format_duration(seconds)}"),
        ("Seed", options["seed"]),
        ("Device", run.config["device"]),
        ("Started", f"{started:%Y-%m-%d %H:%M} UTC" if started else "–"),
        ("Data", options["data_root"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.config["versions"].items())),
    ]


# --- charts


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    ink: str  # CSS colour
    values: dict[int, float | None]  # by epoch


def view_curves(figures: Figures) -> dict[str, Any]:
    """Return the four charts, and the name of the frozen baseline that the accuracy chart shows."""
    frozen = figures.baseline.get("val", {})
    scores = {name: frozen[f"{key}_acc"] for key, name in BASELINE_NAMES.items() if f"{key}_acc" in frozen}
    baseline = max(scores, key=scores.__getitem__, default=None)
    if figures.test and scores:
        baseline = BASELINE_NAMES[figures.test["baseline"]["name"]]  # the one of the verdict
    titles = {"loss": "Loss", "acc": "Accuracy", "f1_macro": "Macro F1", "auc_macro": "Macro ROC AUC"}
    best = figures.best["epoch"] if figures.best else None
    charts = []
    for key, title in titles.items() if figures.epochs else ():
        lines = [
            Line(split, f"var(--{split})", {epoch["epoch"]: epoch[split].get(key) for epoch in figures.epochs})
            for split in ("train", "val")
        ]
        if key == "acc":
            matched = {epoch["epoch"]: epoch["val"].get("proto_acc") for epoch in figures.epochs}
            lines.append(Line("val, prototypes", "var(--proto)", matched))
        charts.append(draw_chart(title, lines, best, scores.get(baseline) if key == "acc" else None))
    return {"charts": charts, "baseline": baseline}


def draw_chart(title: str, lines: list[Line], best: int | None = None, level: float | None = None) -> dict[str, Any]:
    """Return where a chart of lines over epochs has ticks, lines, best epoch and horizontal `level`, in SVG units."""
    epochs = sorted({epoch for line in lines for epoch in line.values})
    values = [value for line in lines for value in line.values.values() if value is not None]
    values += [] if level is None else [level]
    y_ticks = make_ticks(min(values), max(values)) if values else [(0.0, ""), (1.0, "")]
    x_ticks = [tick for tick in make_ticks(epochs[0], epochs[-1], least_step=1) if epochs[0] <= tick[0] <= epochs[-1]]
    pad = 0.03 * (epochs[-1] - epochs[0]) or 0.5

    def x_of(epoch: float) -> float:
        return round(float(np.interp(epoch, (epochs[0] - pad, epochs[-1] + pad), (CHART_LEFT, CHART_RIGHT))), 1)

    def y_of(value: float) -> float:
        return round(float(np.interp(value, (y_ticks[0][0], y_ticks[-1][0]), (CHART_BOTTOM, CHART_TOP))), 1)

    drawn = []
    for line in lines:
        row = [(epoch, line.values.get(epoch)) for epoch in epochs]
        places = [None if value is None else f"{x_of(epoch)} {y_of(value)}" for epoch, value in row]
        dots = "".join(f"M{place}h0" for place in places if place) if len(epochs) <= MAX_DOTTED_EPOCHS else ""
        drawn.append({"ink": line.ink, "path": draw_line(places), "dots": dots})
    edges = [
        x_of(epochs[0] - pad),
        *(x_of(sum(pair) / 2) for pair in itertools.pairwise(epochs)),
        x_of(epochs[-1] + pad),
    ]
    hits = []
    for epoch, (low, high) in zip(epochs, itertools.pairwise(edges), strict=True):
        values_here = [f"{line.name} {format_number(line.values.get(epoch))}" for line in lines]
        hits.append({"x": low, "width": round(high - low, 1), "text": "\n".join([f"epoch {epoch}", *values_here])})
    return {
        "title": title,
        "x_ticks": [(x_of(tick), text) for tick, text in x_ticks],
        "y_ticks": [(y_of(tick), text) for tick, text in y_ticks],
        "lines": [line for line in drawn if line["path"]],
        "hits": hits if values else [],
        "best": None if best is None else x_of(best),
        "level": None if level is None else y_of(level),
    }


def make_ticks(low: float, high: float, least_step: float = 0.0) -> list[tuple[float, str]]:
    """Return (value, text) of up to ten ticks that enclose a range, in steps of 1, 2 or 5 times a power of ten."""
    if low == high:
        low, high = low - 0.05, high + 0.05
    power = 10.0 ** math.floor(math.log10((high - low) / 8))
    step = max(least_step, next(factor * power for factor in (1, 2, 5, 10) if factor * power * 8 >= high - low))
    decimals = max(0, -math.floor(math.log10(step)))
    first = math.floor(low / step + 1e-9)  # 0.3 / 0.05 is 5.999
    last = math.ceil(high / step - 1e-9)
    return [(number * step, f"{number * step:.{decimals}f}") for number in range(first, last + 1)]


def draw_line(places: list[str | None]) -> str:
    """Return the SVG path through places; None leaves a gap, and `h0` makes a dot of a place between two gaps."""
    steps = itertools.pairwise([None, *places])
    return "".join(f"L{place}" if before else f"M{place}h0" for before, place in steps if place)


def view_calibration(figures: Figures) -> dict[str, Any] | None:
    """Return reliability over bins of probability, where it comes from, and the expected calibration error."""
    if figures.measured is None:
        return None
    # Without pictures of no class the strangers of the test are too easily told; those of heads that did not know them are not.
    is_easy = figures.measured["open_set"]["trained_on_them"]
    source = figures.unseen if is_easy and figures.unseen else figures.measured
    bins = source["reliability"]
    return {
        "bins": bins,
        "source": source["open_set"]["source"],
        "error": source["ece"],
        "claimed": sum(row["share"] * row["probability"] for row in bins),
        "right": sum(row["share"] * row["right"] for row in bins),
    }


def view_sessions(test: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the test images that look as if taken in one session with a training image, closest first, and accuracy without."""
    if not test or not test.get("without_same_session", {}).get("pairs"):
        return None
    without = test["without_same_session"]
    pairs = [
        {"test": Shot(path, "bbox"), "train": Shot(pair["train"], "bbox"), "cosine": pair["cosine"]}
        for path, pair in without["pairs"].items()
    ]
    return {
        "count": test["images"] - without["images"],
        "cards": pairs[:MAX_CARDS],
        "acc": without["acc"],
        "images": without["images"],
    }


# --- classes


def list_classes(run: Run) -> list[dict[str, Any]]:
    """Return one row a class: images by split, scores of the split that the page leads with, threshold."""
    rows = []
    for label, name in enumerate(run.class_names):
        scores = run.figures.per_class.get(name, {})
        row = {split: run.counts[split][name] for split in SPLIT_NAMES}
        row |= {key: scores.get(key) for key in ("precision", "recall", "f1", "auc")}
        row |= {"label": label, "name": name, "threshold": run.thresholds.get(name), "is_pooled": name in run.pooled}
        rows.append({"is_small": row[run.figures.scored] < FEW_IMAGES, **row})
    return rows


def view_confusion(run: Run) -> dict[str, Any] | None:
    """Return the matrix, unless it is too large to be read, and the most confused pairs."""
    if not run.predictions:
        return None
    num_classes = len(run.class_names)
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)  # rows true, columns predicted
    for item in run.predictions:
        matrix[run.label_of[item.class_name], run.label_of[item.answer]] += 1
    totals = matrix.sum(axis=1)
    pairs = [
        {"true": true, "predicted": predicted, "count": int(matrix[true, predicted]), "total": int(totals[true])}
        for true, predicted in np.argwhere(matrix).tolist()
        if true != predicted
    ]
    pairs.sort(key=lambda pair: (-pair["count"], pair["total"]))
    is_drawn = num_classes <= MAX_MATRIX_CLASSES
    is_beside = num_classes <= MAX_CLASSES_BESIDE_PAIRS
    names = [shorten(name, 30) for name in run.class_names]
    room = (720 if is_beside else 1080) - 8 * max(map(len, names))  # px beside the names, on a screen 1,280 px wide
    return {
        "matrix": matrix.tolist() if is_drawn else None,
        "totals": totals.tolist(),
        "names": names,
        "cell": min(40, room // num_classes),  # px: fits without scrolling
        "is_beside": is_beside,
        "pairs": pairs[: 12 if is_drawn else 50],
        "num_pairs": len(pairs),
    }


# --- embedding map


def view_map(run: Run, pictures: Pictures) -> dict[str, Any] | None:
    """Return the images of the map with their place in it; test images are drawn last, on top."""
    table = run.embeddings
    if table is None or not len(table.labels):
        return None
    chosen = choose_map_rows(table)
    places = project(table.embeddings[chosen])
    low = places.min(axis=0)
    spread = np.maximum(places.max(axis=0) - low, 1e-12)
    places = MAP_MARGIN + (places - low) / spread * (np.array([MAP_WIDTH, MAP_HEIGHT]) - 2 * MAP_MARGIN)
    order = np.argsort([SPLIT_NAMES.index(split) for split in table.splits[chosen]], kind="stable")
    rows = chosen[order].tolist()
    places = places[order]
    size = (min(len(rows), MAP_SPRITE_COLUMNS), math.ceil(len(rows) / MAP_SPRITE_COLUMNS))
    answers = {item.shot: item for item in run.predictions}
    sprite = Image.new("RGB", (size[0] * MAP_THUMB_PX, size[1] * MAP_THUMB_PX), (226, 228, 232))
    points = []
    for index, (row, (x, y)) in enumerate(zip(rows, places.tolist(), strict=True)):
        shot = Shot(table.paths[row], table.views[row])
        label = int(table.labels[row])
        split = str(table.splits[row])
        answer = answers.get(shot) if split == "test" else None
        said = "" if answer is None else ", recognised" if answer.is_right else f", taken for {answer.answer}"
        masked = " (masked)" if shot.view == "mask" else ""
        points.append({
            "style": f"{place_in_map(x, y)}; --thumb: {place_in_sprite(index, size)}",
            "label": label,
            "split": split,
            "is_error": answer is not None and not answer.is_right,
            "text": f"{run.class_names[label]}\n{split}{said}\n{shot.path}{masked}",
        })  # fmt: skip
        paste_thumbnail(sprite, pictures.load(shot, MAP_THUMB_PX), index)
    return {
        "points": points,
        "num_rows": len(table.labels),
        "num_errors": sum(point["is_error"] for point in points),
        "sprite": jpeg_uri(sprite),  # one JPEG: a third of the bytes of single files, which are mostly headers
        "size": size,
        "names": place_names(run.class_names, places, table.labels[rows]),
        "counts": [sum(run.counts[split][name] for split in SPLIT_NAMES) for name in run.class_names],
        "splits": [split for split in SPLIT_NAMES if (table.splits == split).any()],
    }


def choose_map_rows(table: Embeddings) -> np.ndarray:
    """Return at most MAP_MAX_POINTS rows: even steps through the rows sorted by class and split keep their shares."""
    order = np.lexsort((table.splits, table.labels))
    steps = np.linspace(0, len(order) - 1, min(len(order), MAP_MAX_POINTS)).astype(int)
    return np.sort(order[steps])


def project(embeddings: np.ndarray) -> np.ndarray:
    """Place embeddings (N, D) in the plane (N, 2): t-SNE, or PCA where t-SNE has too little to work on."""
    centered = (embeddings - embeddings.mean(axis=0)).astype(np.float64)
    is_collapsed = float(centered.std()) < 1e-6  # t-SNE divides by the spread of its PCA start
    if len(embeddings) < MIN_TSNE_POINTS or embeddings.shape[1] < 2 or is_collapsed:
        components, sizes, _ = np.linalg.svd(centered, full_matrices=False)
        places = (components * sizes)[:, :2]
        return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    # One thread: the order in which OpenMP adds up is not fixed, and t-SNE blows a last bit up into another map.
    with threadpool_limits(limits=1):
        return TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(centered.astype(np.float32))


def place_in_map(x: float, y: float) -> str:
    """Return the CSS position of a place in the map."""
    return f"left: {100 * x / MAP_WIDTH:.2f}%; top: {100 * y / MAP_HEIGHT:.2f}%"


def place_in_sprite(index: int, size: tuple[int, int]) -> str:
    """Return the background-position that shows one cell of a grid of `size` (columns, rows)."""
    row, column = divmod(index, MAP_SPRITE_COLUMNS)
    return f"{100 * column / max(1, size[0] - 1):.3f}% {100 * row / max(1, size[1] - 1):.3f}%"


def paste_thumbnail(sprite: Image.Image, image: Image.Image | None, index: int) -> None:
    """Put a picture, gray where it is missing, into the middle of its cell of the sprite."""
    image = image or Image.new("RGB", (MAP_THUMB_PX, MAP_THUMB_PX), (128, 128, 128))
    row, column = divmod(index, MAP_SPRITE_COLUMNS)
    x = column * MAP_THUMB_PX + (MAP_THUMB_PX - image.width) // 2
    y = row * MAP_THUMB_PX + (MAP_THUMB_PX - image.height) // 2
    sprite.paste(image, (x, y))


def place_names(class_names: tuple[str, ...], places: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Put class names beside their points, large classes first; a name with no free place is left to the legend."""
    boxes: list[tuple[float, float, float]] = []  # x, y, half width of the names that have a place
    names = []
    for label in sorted(np.unique(labels).tolist(), key=lambda label: -(labels == label).sum()):
        text = shorten(class_names[label], 24)
        half = 6.5 * sum(1.05 if ord(character) > 0x2E80 else 0.62 for character in text)  # px at 13 px; CJK is wider
        spots = places[labels == label]
        distances = np.linalg.norm(spots[:, None] - spots[None], axis=2)
        from_medoid = distances[distances.sum(axis=1).argmin()]
        spots = spots[from_medoid <= np.median(from_medoid)]  # the heart of the class: strays carry no name away
        x = float(np.clip(np.median(spots[:, 0]), half + 4, max(half + 4, MAP_WIDTH - half - 4)))
        above, middle, below = np.quantile(spots[:, 1], (0.05, 0.5, 0.95)).tolist()
        for y in (above - 14, below + 16, middle - 4, middle - 22, middle + 14):
            is_free = all(abs(x - other_x) > half + width or abs(y - other_y) > 16 for other_x, other_y, width in boxes)
            if is_free and 10 < y < MAP_HEIGHT - 10:
                boxes.append((x, y, half))
                names.append({"label": label, "text": text, "style": place_in_map(x, y)})
                break
    return names


# --- errors, views, trust, data


def view_errors(run: Run) -> dict[str, Any]:
    """Return the test images that are wrong, surest first, next to what misled the matcher and what it missed."""
    wrong = sorted((item for item in run.predictions if not item.is_right), key=lambda item: -item.probability)
    cards = []
    for item in wrong[:MAX_CARDS]:
        sides = [
            ("predicted", item.answer, item.cosine, item.probability, item.nearest_reference),
            ("true", item.class_name, item.class_cosine, None, item.nearest_of_class),
        ]
        keys = ("kind", "name", "cosine", "probability", "reference")
        cards.append({"shot": item.shot, "sides": [dict(zip(keys, side, strict=True)) for side in sides]})
    return {"cards": cards, "num_errors": len(wrong)}


def compare_views(run: Run) -> dict[str, Any] | None:
    """Return how the same test crops fare as they are and masked, and those about which the two disagree, surest first."""
    figures = run.figures.views
    by_view = {
        view: {item.shot.path: item for item in run.view_predictions if item.shot.view == view}
        for view in ("bbox", "mask")
    }
    pairs = [(item, by_view["mask"][path]) for path, item in by_view["bbox"].items() if path in by_view["mask"]]
    if figures is None or not pairs:
        return None
    differ = [pair for pair in pairs if pair[0].answer != pair[1].answer]
    differ.sort(key=lambda pair: -pair[0].probability - pair[1].probability)
    is_right = np.array([(plain.is_right, masked.is_right) for plain, masked in pairs]).T
    tallies = {
        "both ways": is_right.all(axis=0),
        "only as it is": is_right[0] & ~is_right[1],
        "only masked": is_right[1] & ~is_right[0],
        "neither way": ~is_right.any(axis=0),
    }
    labels = np.array([run.label_of[plain.class_name] for plain, _ in pairs])
    classes = []
    for label in np.unique(labels).tolist():
        recall = is_right[:, labels == label].mean(axis=1).tolist()
        if recall[0] != recall[1]:
            classes.append({"label": label, "count": int((labels == label).sum()), "recall": recall})
    classes.sort(key=lambda row: (-abs(row["recall"][1] - row["recall"][0]), -row["count"]))
    return {
        "figures": figures,
        "cards": differ[:MAX_CARDS],
        "num_differ": len(differ),
        "tallies": {name: int(tally.sum()) for name, tally in tallies.items()},
        "classes": classes[:MAX_VIEW_CLASSES],
    }


def view_measured(measured: dict[str, Any] | None, unseen: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the tables of the section on trust: figures with intervals, ways to tell unknown objects, answers at a precision."""
    if measured is None:
        return None
    rows = []
    for name, scores in measured["closed"].items():
        matcher = MATCHER_NAMES[name] + (f", k = {scores['k']}" if name == "knn" else "")
        rows += [(f"Accuracy, {matcher}", scores["acc"]), (f"Macro F1, {matcher}", scores["f1_macro"])]
    rows += [(name, measured["retrieval"][key]) for key, name in RETRIEVAL_NAMES.items()]
    unknown = {"prototypes, similarity": measured["open_set"], **measured["open_set"].get("others", {})}
    if unseen:
        unknown["prototypes, classes never trained on"] = unseen["open_set"]
        unknown |= {f"{name}, the same classes": way for name, way in unseen["open_set"]["others"].items()}
    sources = (("the unknown objects", measured), ("the images of classes never trained on", unseen or {}))
    return {
        "rows": [(name, figure["value"], figure["interval"]) for name, figure in rows],
        "unknown": unknown,
        "passed": [(source["unknown_passed"], whose) for whose, source in sources if "unknown_passed" in source],
        "source": measured["open_set"]["source"],
        "answers": measured["answers"],
        "thresholds": measured["thresholds"],
        "few": measured["few"],
    }


def view_data(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the scan found: facts, warnings, findings by heading with one line an item, and conflicts as pictures."""
    if data is None:
        return None
    masks = data["masks"]
    groups = {
        "Label conflicts: one picture under several classes": data["label_conflicts"],
        "Groups of exact duplicates": data["duplicates"]["exact"],
        "Groups of near duplicates": data["duplicates"]["near"],
    }
    problems = {
        "Quarantined files": data["quarantined"],
        "Refused masks": masks["refused"],
        "Masks that SAM-2 could not draw": masks["not_made"],
    }
    findings = {title: [f"{item['path']} — {item['reason']}" for item in items] for title, items in problems.items()}
    findings |= {title: ["   =   ".join(group) for group in members] for title, members in groups.items()}
    facts = [("Images found", f"{data['num_images']:,}"), ("Usable", f"{data['num_usable']:,}")]
    if data["num_used"] < data["num_usable"]:
        facts.append(("Used", f"{data['num_used']:,}"))
    facts.append(("With a mask", f"{masks['usable']:,}, {masks['made']:,} of them drawn by SAM-2"))
    facts += [(title.split(":")[0], f"{len(items):,}") for title, items in findings.items()]
    facts.append(("Leaks between splits prevented", f"{data['leaks_prevented']:,}"))
    facts.append(("Turned by EXIF", f"{data['exif_rotated']:,}"))
    for side in ("width", "height"):
        values = " / ".join(f"{data['sizes'][f'{side}_{name}']:,}" for name in ("min", "median", "max"))
        facts.append((f"{side.capitalize()} min / median / max", f"{values} px"))
    facts.append(("Colour modes", ", ".join(f"{mode} {count:,}" for mode, count in data["modes"].items())))
    conflicts = [[Shot(path, "bbox") for path in group] for group in data["label_conflicts"][:MAX_CONFLICT_GROUPS]]
    return {"facts": facts, "findings": findings, "warnings": data["warnings"], "conflicts": conflicts}


# --- the page that compares runs


def describe_comparison(runs: list[Run]) -> dict[str, Any]:
    """Return what the template shows of several runs."""
    names = name_runs([run.path for run in runs])
    answers = [choose_answers(run) for run in runs]
    paths = [path for path in answers[0] if all(path in table for table in answers)]
    paths = [path for path in paths if len({table[path].class_name for table in answers}) == 1]
    images = [[table[path] for table in answers] for path in paths]
    classes = [name for name in runs[0].class_names if all(name in run.label_of for run in runs)]
    return {
        "runs": [
            {"name": name, "path": str(run.path), "verdict": capitalize(run.verdict)}
            for name, run in zip(names, runs, strict=True)
        ],
        "header": judge_runs(names, images),
        "colors": make_colors(len(runs)),
        "num_common": len(images),
        "has_both_views": any(len(run.predictions) > len(table) for run, table in zip(runs, answers, strict=True)),
        "num_tested": [len(table) for table in answers],
        "has_many_roots": len({run.config["options"]["data_root"] for run in runs}) > 1,
        "num_classes": len(classes),
        "only_in_some": sorted({name for run in runs for name in run.class_names} - set(classes)),
        "figures": list_figures(runs),
        "curves": overlay_curves(names, runs),
        "gains": list_gains(runs, classes, images),
        "tally": tally_answers(images),
        "groups": group_disagreements(images),
        "options": list_differences([run.config["options"] for run in runs], PLACE_OPTIONS),
        "circumstances": list_differences([list_circumstances(run) for run in runs], set()),
        "max_listed": MAX_LISTED,
    }


def name_runs(paths: list[Path]) -> list[str]:
    """Return the names of the folders, with as many of those around them as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ReportError("one run is given twice: there is nothing to compare")


def choose_answers(run: Run) -> dict[str, Prediction]:
    """Return one answer a test image, by path: the one to the crop as it was cut, where the run judges it masked as well."""
    return {item.shot.path: item for item in sorted(run.predictions, key=lambda item: item.shot.view != "mask")}


def judge_runs(names: list[str], images: list[list[Prediction]]) -> dict[str, str]:
    """Say whether the run that is right most often is measurably ahead of the next one, on the images that all have tested.

    Measurably: of the images that only one of the two gets right, so many are the leader's that a fair coin would do it in less
    than SIGNIFICANCE of all cases.
    """
    if not images:
        note = (
            "Not one image is in the test split of all runs. Each figure below is of the run's own images, so that a"
            " difference may be theirs: compare runs with the same data, --seed, --group_regex and shares of the splits."
        )
        return {"verdict": "No test image in common", "tone": "plain", "note": note}
    is_right = np.array([[item.is_right for item in items] for items in images])  # (images, runs)
    totals = is_right.sum(axis=0)
    first, second = np.argsort(-totals, kind="stable")[:2].tolist()
    wins = int((is_right[:, first] & ~is_right[:, second]).sum())
    losses = int((is_right[:, second] & ~is_right[:, first]).sum())
    chance = sign_test(wins, losses)
    is_ahead = chance < SIGNIFICANCE / (len(names) - 1)
    shares = ", ".join(f"{name} {total / len(images):.3f}" for name, total in zip(names, totals.tolist(), strict=True))
    note = (
        f"Accuracy on the {len(images):,} test images that all runs have in common: {shares}. {names[first]} is right on {wins:,}"
        f" of them where {names[second]} is wrong, and {names[second]} on {losses:,} where {names[first]} is wrong; a fair coin"
        f" would divide them so unevenly in {float(f'{100 * chance:.2g}'):g} % of cases."
    )
    verdict = f"{names[first]} is ahead of {names[second]}" if is_ahead else "No run is measurably ahead"
    return {"verdict": verdict, "tone": "good" if is_ahead else "plain", "note": note}


def sign_test(wins: int, losses: int) -> float:
    """Return how often a fair coin divides so many throws at least so unevenly."""
    count = wins + losses
    tail = sum(math.comb(count, number) for number in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


def tally_answers(images: list[list[Prediction]]) -> list[tuple[tuple[bool, ...], int]]:
    """Return which runs are right, and on how many images: all of them first, none of them last."""
    counts = Counter(tuple(item.is_right for item in items) for items in images)
    return sorted(counts.items(), key=lambda entry: (not all(entry[0]), not any(entry[0]), -entry[1]))


def group_disagreements(images: list[list[Prediction]]) -> list[dict[str, Any]]:
    """Return the images with different answers by who is right, those first whose wrong answers are surest."""
    groups: dict[tuple[bool, ...], list[list[Prediction]]] = {}
    for items in images:
        if len({item.answer for item in items}) > 1:
            groups.setdefault(tuple(item.is_right for item in items), []).append(items)
    for group in groups.values():
        group.sort(key=lambda items: -sum(item.probability for item in items if not item.is_right))
    limit = max(6, MAX_CARDS // max(1, len(groups)))
    ordered = sorted(groups.items(), key=lambda entry: (not any(entry[0]), -len(entry[1])))
    return [{"is_right": pattern, "cards": group[:limit], "count": len(group)} for pattern, group in ordered]


def list_figures(runs: list[Run]) -> list[dict[str, Any]]:
    """Return the key figures side by side as rows of {name, values, best}; values are numbers or text."""
    scores = {
        "Accuracy, prototypes": [run.figures.scores.get("acc") for run in runs],
        "Accuracy, classifier": [run.figures.scores.get("classifier_acc") for run in runs],
        "Macro F1": [run.figures.scores.get("f1_macro") for run in runs],
        "Macro ROC AUC": [run.figures.scores.get("auc_macro") for run in runs],
        "Recall@1": [run.figures.scores.get("recall_at_1") for run in runs],
    }
    measured = [run.figures.measured for run in runs]
    if any(measured):
        scores["Unknown objects, AUROC"] = [item and item["open_set"]["auroc"]["value"] for item in measured]
        scores["Answered above thresholds"] = [item and item["thresholds"]["coverage"]["value"] for item in measured]
        scores["Right among those"] = [item and item["thresholds"]["precision"]["value"] for item in measured]
    frozen = [run.figures.baseline.get(run.figures.scored, {}) for run in runs]
    scores["Frozen backbone, best baseline"] = [
        max((item[f"{key}_acc"] for key in BASELINE_NAMES if item.get(f"{key}_acc") is not None), default=None)
        for item in frozen
    ]
    rows = []
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        best = max(known) if len(set(known)) > 1 and name not in WITHOUT_BEST else None
        rows.append({"name": name, "values": values, "best": best, "is_score": True})
    epochs = [run.figures.epochs for run in runs]
    texts = {
        "Measured on": [f"{run.figures.scored}, {run.count(run.figures.scored):,} images" for run in runs],
        "Best epoch": [
            f"{run.figures.best['epoch']} of {len(run.figures.epochs)}" if run.figures.best else "–" for run in runs
        ],
        "Training": [format_duration(sum(epoch["seconds"] for epoch in items)) for items in epochs],
        "Matcher": [name_matcher(run.figures.prototypes) for run in runs],
        "Backbone": [name_training(run.config["options"]) for run in runs],
        "Images": [f"{sum(map(run.count, SPLIT_NAMES)):,} of {len(run.class_names):,} classes" for run in runs],
    }
    return rows + [{"name": name, "values": values, "best": None, "is_score": False} for name, values in texts.items()]


def overlay_curves(names: list[str], runs: list[Run]) -> list[dict[str, Any]]:
    """Return the charts of train and val, each with one line a run."""
    colors = make_colors(len(runs))
    titles = (
        ("Loss on train", "train", "loss"),
        ("Loss on val", "val", "loss"),
        ("Accuracy on val, classifier", "val", "acc"),
        ("Accuracy on val, prototypes", "val", "proto_acc"),
        ("Macro F1 on val", "val", "f1_macro"),
        ("Macro ROC AUC on val", "val", "auc_macro"),
    )
    charts = []
    for title, split, key in titles if any(run.figures.epochs for run in runs) else ():
        lines = []
        for name, color, run in zip(names, colors, runs, strict=True):
            values = {epoch["epoch"]: epoch[split].get(key) for epoch in run.figures.epochs}
            lines.append(Line(name, color, values))
        charts.append(draw_chart(title, lines))
    return charts


def list_gains(runs: list[Run], classes: list[str], images: list[list[Prediction]]) -> list[dict[str, Any]]:
    """Return recall and F1 of the common classes by run, and what each run gains over the first; largest gain first.

    Of the images that all have tested; where there are none, of each run's own.
    """
    tables = [
        score_classes([items[i] for items in images]) if images else run.figures.per_class for i, run in enumerate(runs)
    ]
    rows = []
    for name in classes:
        scores = [table.get(name, {}) for table in tables]
        row: dict[str, Any] = {"name": name, "support": [score.get("support") for score in scores]}
        for key in ("recall", "f1"):
            values = [score.get(key) for score in scores]
            gains = [None if None in (value, values[0]) else value - values[0] for value in values[1:]]
            row[key] = {"values": values, "gains": gains}
        if any(row["support"]):
            rows.append(row)
    rows.sort(key=lambda row: -math.inf if row["f1"]["gains"][-1] is None else row["f1"]["gains"][-1], reverse=True)
    return rows


def score_classes(items: list[Prediction]) -> dict[str, dict[str, Any]]:
    """Return support, recall and F1 of each class that occurs."""
    support = Counter(item.class_name for item in items)
    given = Counter(item.answer for item in items)
    hits = Counter(item.class_name for item in items if item.is_right)
    return {
        name: {"support": count, "recall": hits[name] / count, "f1": 2 * hits[name] / (count + given[name])}
        for name, count in support.items()
    }


def list_circumstances(run: Run) -> dict[str, Any]:
    """Return what can differ between runs besides options."""
    groups = {"data": run.config["data"], "model": run.config["model"], "version of": run.config["versions"]}
    facts = {f"{group} {name}": value for group, values in groups.items() for name, value in values.items()}
    facts.pop("data classes")
    return facts | {"classes": len(run.class_names), "device": run.config["device"]}


def list_differences(tables: list[dict[str, Any]], ignored: set[str]) -> list[tuple[str, list[Any]]]:
    """Return the entries whose values are not the same everywhere."""
    rows = [
        (name, [table.get(name, "–") for table in tables])
        for name in sorted({name for table in tables for name in table})
    ]
    return [
        (name, values) for name, values in rows if name not in ignored and any(value != values[0] for value in values)
    ]


# --- writing


def render(context: dict[str, Any], thumbnail: Callable[[Shot | None], str | None]) -> bytes:
    """Return a page. A name may carry bytes that are no Unicode (lone surrogates): shown escaped, never a crash."""
    import jinja2
    from markupsafe import Markup

    def digest(script: str) -> str:
        return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def breakable(name: str) -> str:
        return Markup("<wbr>").join(re.split(r"(?<=[_./-])(?=.)", name))

    strict = jinja2.StrictUndefined  # a name that the template misspells is a bug, not an empty cell
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=strict,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=format_number, gain=format_gain, count="{:,}".format, digest=digest, breakable=breakable
    )
    environment.globals["thumbnail"] = thumbnail
    return environment.get_template("report.html.j2").render(context).encode("utf-8", "backslashreplace")


def write_page(path: Path, page: bytes, *, is_ours: bool) -> None:
    """Write a page whole; a file that is no such page is left alone unless its place is `is_ours`."""
    if path.is_dir():
        raise ReportError(f"--out {path} is a folder: give the path of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not is_ours:
            with open(path, "rb") as file:
                if MARK not in file.read(4096):
                    raise ReportError(f"{path} is not a page of this tool and is not overwritten: give another --out")
        with open(temporary, "wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_page(folders: list[Path], out: Path | None, data_root: Path | None) -> Path:
    """Make the page of one run, or of several together; return its path."""
    runs = [read_run(folder) for folder in folders]
    pictures = [Pictures(run, data_root) for run in runs]
    if len(runs) == 1:
        path = out or folders[0] / "report.html"
        page = render(describe_run(runs[0], pictures[0]), pictures[0].uri)
    else:
        path = out or Path("compare.html")

        def find_picture(shot: Shot | None) -> str | None:
            return next((uri for source in pictures if (uri := source.uri(shot))), None)

        page = render(describe_comparison(runs), find_picture)
    for run in runs:
        data_root = Path(run.config["options"]["data_root"])
        if path.resolve().is_relative_to(data_root.resolve()):
            raise ReportError(f"--out {path} lies inside data_root {data_root}: give another --out")
    write_page(path, page, is_ours=out is None and len(runs) == 1)
    if missing := sum(source.num_missing for source in pictures):
        print(f"note: {missing:,} pictures cannot be read; --data_root DIR says where they are now", file=sys.stderr)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Make a page; return the exit code: 0 done, 2 a run or file that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="Make one page of a run, or one that compares several.", allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="out_dir of a run; several are compared")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html; compare.html for several runs)"
    )
    parser.add_argument(
        "--data_root", type=Path, metavar="DIR", help="where the pictures are now (default: as in the run)"
    )
    options = parser.parse_args(argv)
    try:
        path = make_page(options.runs, options.out, options.data_root)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:  # of a file that is sound JSON, of another form
        place = traceback.extract_tb(error.__traceback__)[-1].name
        names = ", ".join(map(str, options.runs))
        print(f"error: a file of {names} holds what no run writes: {error!r} in {place}", file=sys.stderr)
        return 2
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
