#!/usr/bin/env python3
"""Turn folders of crops, one folder per class, into a recogniser: embedder, prototypes and a report.
    python lct_dino3.py --data_root DATA --out_dir RUN --gpus 2     train; the same command continues an interrupted run
    python lct_dino3.py scan --data_root DATA --out_dir RUN         data health and split preview, trains nothing
    python lct_dino3.py prelabel --run RUN --images DIR --out OUT   classes for detected objects, for annotation tools
    python lct_dino3.py demo                                        draw a small data set and train on it

Training fits an MLP head with L2 norm on a timm backbone (DINOv3 ViT-L by default) with ArcFace. Production matches objects by
cosine against the class centroids and reference embeddings in `prototypes.npz`.

Sections:
    01  IMPORTS & CONSTANTS
    02  CONFIG & CLI
    03  RUN DIRECTORY & LOGGING
    04  RUNTIME
    05  DATASET SCAN
    06  MASKS
    07  AUGMENTATION
    08  LOADERS
    09  MODEL
    10  CRITERION
    11  OPTIMIZER & SCHEDULE
    12  METRICS
    13  TRAIN STATE & CHECKPOINTS
    14  PROTOTYPES
    15  TRAINING
    16  COMMANDS & MAIN
"""

# ======================================================================================================================
# 01  IMPORTS & CONSTANTS
# ======================================================================================================================
# Standard library only: numpy, torch and the other packages are imported after section 02, once the command line is parsed.
from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import fnmatch
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import operator
import os
import random
import re
import reprlib
import resource
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # albumentations otherwise calls home at import
# By default, waiting OpenMP threads spin on cores that the loader workers need. Passive waiting gives 1.7 times as many images/s
# with one of two cores busy, and a fifth fewer on an idle machine (tests/benchmarks/cpu.py). Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SCRIPT_NAME = "lct_dino3.py"


def _stop_imports(number: int, _: Any) -> None:
    """End a program of ours by Ctrl-C during its imports, which take seconds; `Signals` takes over after them."""
    os.write(2, b"interrupted (SIGINT) before anything began\n")
    os._exit(128 + number)


_program = Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve()
_is_ours = _program.name == SCRIPT_NAME or _program.parent == Path(__file__).resolve().parent / "tools"
if _is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop_imports)


# ======================================================================================================================
# 02  CONFIG & CLI
# ======================================================================================================================
# `Config` describes every option once; parser, help and validation are generated from it. Reads argv. Raises UserError.
MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_VALUES = 100_000  # YAML values with aliases expanded: nine lines can stand for a billion
MAX_ERROR_LINE = 2000  # characters
CUTOUTS_DIRNAME = "cutouts"
LINEAR_CRITERIA = ("cross_entropy", "focal")  # have neither class directions nor a margin
LAST_NAME, INTERRUPT_NAME, BEST_NAME = "checkpoint_last.pth", "checkpoint_interrupt.pth", "checkpoint_best.pth"
MAX_WORKERS = 16  # default limit: 16 x 540 images/s feed a ViT-L three times over; more cost memory and start-up time
# Against fresh views: -0.2 +- 0.2 points in 293 head trainings, -0.2 to -0.7 +- 0.4 in tests/benchmarks; a third of the passes.
CACHED_VIEWS = 4
MEMORY_NAME = "memory.sqlite"  # cached results of reading files
# A folder is the out_dir of a run if it holds one of these files with these bytes in it.
RUN_MARKERS = {"metrics.jsonl": b'"event"', "data_report.json": b'"quarantined"', MEMORY_NAME: b"SQLite"}
DATA_TREE = """expected:  data_root/
               hammer/            one folder a class, with images in it
                   0001.jpg
               pliers/
                   cropped/       or in a folder `cropped`
                       0001.jpg"""
# Whether torchrun started this process as a rank other than 0.
IS_OTHER_RANK = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"
EXIT_OK, EXIT_BUG, EXIT_USER, EXIT_DIVERGED = 0, 1, 2, 3


class UserError(Exception):
    """An error that the user can fix: what is wrong, where, and what to do. Shown without a traceback; exit code 2."""

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        what, where, remedy = (
            "\n".join(printable(line, MAX_ERROR_LINE) for line in text.split("\n")) for text in (what, where, remedy)
        )
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(": ".join(filter(None, (where, what))) + (f"\n  {remedy}" if remedy else ""))


def printable(text: str, max_length: int | None = None) -> str:
    """Return `text` on one line, control characters and undecodable bytes escaped, the middle cut out above `max_length`."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    if max_length is None or len(text) <= max_length:
        return text
    return f"{text[: max_length // 2]} ... {text[-max_length // 3 :]}"


class Diverged(Exception):
    """The loss or the features are not finite. Exit code 3."""


class Interrupted(BaseException):
    """A signal asked the run to stop. Like KeyboardInterrupt it is no Exception, so that no handler on the way swallows it."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(signal.Signals(signal_number).name)


@dataclass(frozen=True)
class Options:
    """Options of a command. A subclass declares each one with `option`; parser, help and checks are generated from that.

    The annotation gives the type: int, float, str, bool, Path or dict, or a tuple of one of them, or `| None`. Never mutated.
    """

    command: str = "train"
    # Where each given option was set; options without an entry have their defaults.
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    word_break: ClassVar[str] = "_"  # between the words of a flag; if it is "-", "_" is accepted too
    starts_anew: ClassVar[bool] = False  # after an interruption, where other commands continue

    def as_plain(self) -> dict[str, Any]:
        """Return the options as JSON values: paths become absolute strings, tuples become lists."""
        values = {field.name: getattr(self, field.name) for field in option_fields(type(self))}
        return json.loads(json.dumps(values, default=lambda path: str(path.absolute())))

    @classmethod
    def flag(cls, name: str) -> str:
        """Return the flag of an option as the help spells it."""
        return f"--{name.replace('_', cls.word_break)}"

    def place(self, name: str) -> str:
        """Return where an option was set, for messages: its flag, or the config file and key."""
        origin = self.origins.get(name, COMMAND_LINE_ORIGIN)
        if origin != COMMAND_LINE_ORIGIN:
            return origin
        is_typed_no = name in self.origins and getattr(self, name) is False
        return self.flag(f"no-{name}" if is_typed_no else name)

    def describe(self, name: str) -> str:
        """Return where an option was set, and its value."""
        return f"{self.place(name)} {getattr(self, name)}"


COMMANDS = {
    "train": "scan, split, train, evaluate, export prototypes, report (default)",
    "scan": "data health and split preview only; writes data_report.json",
    "evaluate": "figures of a finished run on its test or val images, or on another labelled folder; writes evaluation.json",
    "prototypes": "enrol classes from a few crops, or remove them, without training; writes prototypes.npz",
}
# Each is a script in tools/ with separate options; this script starts it and imports nothing from it.
TOOLS = {
    "masks": "draw the masks that are missing with SAM-2; writes masks_preview.png",
    "crop": "cut labelled photos into folders of crops, to train on",
    "prelabel": "give detected objects a class or unknown, for annotation tools",
    "export": "write a finished run as one ONNX or safetensors file, checked against PyTorch",
    "report": "make report.html of a run anew, or one page that compares several runs",
    "track": "record a run in ClearML or TensorBoard, while it trains or afterwards",
    "demo": "draw a data set of eleven hand tools and run the whole job on it",
}
TOOLS_DIR = Path(__file__).resolve().parent / "tools"
COMMAND_LINE_ORIGIN = "command line"
DERIVED_ORIGIN = "--models and --experiment_name"


def option(default: Any, text: str, group: str, **extra: Any) -> Any:
    """Declare one option of an `Options` class: a dataclass field whose metadata describe the option completely.

    `text` is its line in the help, `group` the heading above. `extra` takes `low`, `high`: inclusive bounds; `choices`, `metavar`,
    `nargs`, `const`, `action`: as in argparse; `needed`: must be given; `fixed`: must not change at resume; `key`: dotted key in a
    config file; `alias`: second flag; `spelled`: other spellings of values; `once`: for this start only, never from a config file;
    `in_models`: a path that is also looked up below --models; `file`, `folder`: the path must exist; True, or the remedy to show;
    `taken`: the value names one folder, none of these.
    """
    return dataclasses.field(default=default, metadata={"help": text, "group": group, **extra})


@dataclass(frozen=True)
class Config(Options):
    """Turn folders of crops, one folder a class, into a recogniser."""

    # A table: help text first, then group and constraints; a long text comes last.
    # fmt: off
    config: Path | None = option(None, "YAML, TOML or JSON with options, or config.json of a run; what is typed wins",
        "data", metavar="FILE", alias="config_filename", once=True)
    data_root: Path | None = option(None, "folder with one folder of crops a class",
        "data", metavar="DIR", key="directories.images", needed=True, folder=DATA_TREE)
    out_dir: Path | None = option(None, "where the run is written; an unfinished run in it is continued",
        "data", metavar="DIR", needed=True)
    class_map: Path | None = option(None, "YAML that merges, renames, drops classes {new: [old, ...], null: [...]}",
        "data", metavar="FILE", file=True)
    exclude: tuple[str, ...] = option((), "leave out files whose path or name matches one of these; may be repeated",
        "data", metavar="GLOB", nargs="+", action="extend", fixed=True)
    min_per_class: int = option(3, "usable images that every class needs", "data", low=1)
    image_bits: tuple[int, ...] = option((), group="data", metavar="N", nargs="+", low=8, high=16, fixed=True,
        text="bits a channel that images of more than 8 really use, such as 12 (default: what their values show)")
    near_dup_bits: int = option(4, "bits of 64 in which the hashes of near-duplicates may differ", "data", low=0, high=16)

    val_split: float = option(0.2, "share of the images for validation",
        "split", low=0.0, high=0.9, fixed=True, key="dataset.val_part")
    test_split: float = option(0.1, "share of the images for the final test; 0 = no test",
        "split", low=0.0, high=0.9, fixed=True, key="dataset.test_part")
    splits: str = option("random", "from_folders = data_root holds train/<class>, val/<class>, test/<class>, which are the splits",
        "split", choices=("random", "from_folders"), fixed=True)
    group_regex: str | None = option(None, "one capture group on the file name: what it captures stays in one split",
        "split", metavar="REGEX", fixed=True)
    seed: int = option(42, "of split, weights, order and augmentation", "split", low=0, high=2**31 - 1, fixed=True)

    data_fraction: float = option(1.0, "share of the data to use: whole groups, the same share of every class and split",
        "data", key="dataset.data_fraction", low=1e-6, high=1.0, fixed=True)

    crop_mode: str = option("bbox", group="masks", choices=("bbox", "mask", "mix"), fixed=True,
        text="bbox = crops as they are, mask = background replaced, mix = replaced at times, judged both ways")
    mix_mask_p: float = option(0.4, "share of the training samples that mix shows masked", "masks", low=0.0, high=1.0, fixed=True)
    mask_fill: str = option("gray",
        "new background: gray, black, blur, mean (of the model), random (in training), keep (the old one)",
        "masks", choices=("gray", "black", "blur", "mean", "random", "keep"), metavar="NAME", fixed=True)
    masks_dirname: str = option("masks", "folder of the masks inside a class folder",
        "masks", metavar="NAME", taken=("cropped", CUTOUTS_DIRNAME), fixed=True)
    masks_out: Path | None = option(None, "write new masks here, and look for masks here too: data_root may then be read-only",
        "masks", metavar="DIR")
    auto_generate_masks: bool = option(False, "draw the masks that are missing with SAM-2", "masks")
    sam2_cfg: str = option("configs/sam2.1/sam2.1_hiera_l.yaml", "Hydra name of a config in the sam2 package",
        "masks", metavar="NAME")
    sam2_ckpt: Path | None = option(None, "checkpoint of SAM-2 that belongs to the config", "masks", metavar="FILE", file=True)

    backgrounds: Path | None = option(None, "folder of pictures to put crops on in training",
        "augmentation", key="directories.backgrounds", metavar="DIR", folder=True)
    insert_background_p: float = option(0.0, group="augmentation", key="dataset.insert_background_p", low=0.0, high=1.0, fixed=True,
        text="share of the training samples that are put on one of them; those with a mask without their background")
    background_max_ratio: float = option(2.0, "sides of what then surrounds a crop, at most so many times its own",
        "augmentation", key="dataset.background_max_ratio", low=1.0, high=10.0, fixed=True)
    pre_transforms: tuple[dict, ...] | None = option(None,
        "list of {type: name, argument: value} for every image, first of all; any class of albumentations",
        "augmentation", key="dataset.pre_transforms", metavar="LIST", fixed=True)
    train_augmentations: tuple[dict, ...] | None = option(None,
        "list of transforms for training, instead of the built-in augmentation",
        "augmentation", key="dataset.train_augmentations", metavar="LIST", fixed=True)
    val_augmentations: tuple[dict, ...] | None = option(None,
        "list of transforms for evaluation and production, where training has its own",
        "augmentation", key="dataset.val_augmentations", metavar="LIST", fixed=True)
    post_transforms: tuple[dict, ...] | None = option(None, "list of transforms for every image, last of all",
        "augmentation", key="dataset.post_transforms", metavar="LIST", fixed=True)
    aug_start_p: float = option(1.0, "share of the samples of the first epoch that are augmented at all",
        "augmentation", key="dataset.augmentation_p_schedule.start_p", low=0.0, high=1.0, fixed=True)
    aug_end_p: float = option(1.0, "the same of the last epoch; p(e) = start + (end - start) (e / (epochs - 1))^exponent",
        "augmentation", key="dataset.augmentation_p_schedule.end_p", low=0.0, high=1.0, fixed=True)
    aug_exponent: float = option(1.0, "exponent of that",
        "augmentation", key="dataset.augmentation_p_schedule.exponent_factor", low=1e-3, high=1e3, fixed=True)
    mixing: str = option("none", "mix the images of a batch in pairs: mixup = their pixels, cutmix = a box",
        "augmentation", key="training.mixing.strategy", choices=("none", "mixup", "cutmix"), fixed=True)
    mixing_p: float = option(0.5, "share of the batches that are mixed",
        "augmentation", key="training.mixing.p", low=0.0, high=1.0, fixed=True)
    mixing_alpha: float = option(1.0, "shares of the two images are drawn from Beta(alpha, alpha)",
        "augmentation", key="training.mixing.alpha", low=1e-3, high=100.0, fixed=True)

    model_id: str = option("vit_large_patch16_dinov3.lvd1689m", "any timm model",
        "model", metavar="NAME", fixed=True, key="model.backbone_name")
    pretrained: bool = option(True, "start from the weights that timm names for the model",
        "model", fixed=True, key="model.pretrained")
    backbone_weights: Path | None = option(None, "start from this .pth or .safetensors instead", "model", metavar="FILE", file=True)
    load_from: Path | None = option(None, group="model", metavar="PATH", key="model.load_from", in_models=True,
        text="start from these weights: a run or checkpoint of ours with its head, or a timm or safetensors file")
    in_channels: int = option(3, "channels that the model sees: 1 = gray, 3 = RGB, 4 = RGB and mask",
        "model", choices=(1, 3, 4), key="model.in_channels", fixed=True)
    n_classes: int | None = option(None, "number of classes that there must be (default: any)",
        "model", low=2, key="model.n_classes")
    pool: str | None = option(None, "pooling of the backbone, as timm names it (default: token for ViTs)",
        "model", metavar="NAME", fixed=True)
    mean: tuple[float, ...] = option((), "three channel means in 0..1 (default: those of the timm config)",
        "model", nargs=3, metavar=("R", "G", "B"), low=0.0, high=1.0, fixed=True)
    std: tuple[float, ...] = option((), "three channel deviations (default: those of the timm config)",
        "model", nargs=3, metavar=("R", "G", "B"), low=1e-3, high=1.0, fixed=True)
    img_size: int = option(224, "side of the square input in px", "model", low=16, high=2048, fixed=True, key="dataset.image_size")
    heads: int = option(4, "small heads side by side, each with its share of emb_dim and a loss of its own",
        "model", low=1, high=64, fixed=True, key="model.heads")
    emb_dim: int = option(128, "length of an embedding", "model", low=2, high=8192, fixed=True, key="model.emb_dim")
    freeze_backbone: bool = option(True, "train only the head; --no-freeze_backbone fine-tunes everything",
        "model", fixed=True, key="model.freeze_backbone")
    criterion: str = option("arcface", "loss: arcface, cosface, subcenter_arcface; cross_entropy, focal (linear classifier)",
        "model", metavar="NAME", fixed=True, choices=("arcface", "cosface", "subcenter_arcface", *LINEAR_CRITERIA),
        key="criterion.type")
    sub_centers: int = option(3, "directions a class of subcenter_arcface",
        "model", low=1, high=100, fixed=True, key="criterion.sub_centers")
    focal_gamma: float = option(2.0, "exponent of the focal loss", "model", low=0.0, high=10.0, fixed=True, key="criterion.gamma")
    label_smoothing: float = option(0.0, "share of the target spread over all classes",
        "model", low=0.0, high=0.9, fixed=True, key="criterion.label_smoothing")
    arc_scale: float = option(30.0, "scale of the cosines: the logits' range",
        "model", low=1.0, high=512.0, fixed=True, key="criterion.scale")
    arc_margin: float = option(0.30, "margin: radians for ArcFace, cosine for CosFace",
        "model", low=0.0, high=1.5, fixed=True, key="criterion.margin")
    unfreeze_blocks: int = option(0, "last blocks of a frozen backbone that are trained",
        "model", low=0, key="model.unfreeze_blocks", fixed=True)
    lora_rank: int = option(0, "rank of the updates (LoRA) that a frozen backbone's attention layers learn; 0 = none",
        "model", low=0, high=1024, key="model.lora_rank", fixed=True)
    drop_path: float = option(0.0, group="model", low=0.0, high=0.9, key="model.drop_path", fixed=True,
        text="share of the residual branches that a trained backbone leaves out at random (stochastic depth)")

    epochs: int = option(15, "passes over the training images", "training", low=1, high=100_000, key="training.epochs")
    val_batch: int | None = option(None, "images a pass where nothing is trained (default: batch)",
        "training", low=1, high=65_536, key="dataset.data_loaders.val_batch_size")
    batch: int = option(64, "images a step, over all GPUs together",
        "training", low=2, high=65_536, fixed=True, key="dataset.data_loaders.train_batch_size")
    lr: float = option(1e-3, "peak learning rate of the head; a fine-tuned backbone gets max(0.2 lr, 5e-5)",
        "training", low=1e-8, high=10.0, fixed=True, key="optimizer.lr")
    lr_type: str = option("two_lrs", "one_lr trains the backbone with the head's learning rate, two_lrs with its own",
        "optimizer", choices=("one_lr", "two_lrs"), key="optimizer.lr_type", fixed=True)
    backbone_lr: float | None = option(None, "peak learning rate of what is trained of the backbone (default: max(0.2 lr, 5e-5))",
        "optimizer", low=1e-8, high=10.0, key="optimizer.backbone_lr", fixed=True)
    fc_lr: float | None = option(None, "peak learning rate of the head (default: lr)",
        "optimizer", low=1e-8, high=10.0, key="optimizer.fc_lr", fixed=True)
    weight_decay: float | None = option(None, group="optimizer", low=0.0, high=10.0, key="optimizer.weight_decay", fixed=True,
        text="weight decay (default: head 1e-4, backbone 0.05); norms, biases and tokens have none")
    layer_decay: float = option(1.0, "factor on the backbone's learning rate from each block to the one before",
        "optimizer", low=0.01, high=1.0, key="optimizer.layer_decay", fixed=True)
    arc_lr: float | None = option(None, "peak learning rate of the class weights (default: 10 fc_lr; linear classifier: fc_lr)",
        "training", low=1e-8, high=100.0, fixed=True)
    optimizer: str = option("adamw", "any optimizer of timm", "optimizer", metavar="NAME", fixed=True, key="optimizer.type")
    betas: tuple[float, ...] = option((), "decay of the optimizer's two running means (default: its own)",
        "optimizer", nargs=2, metavar=("B1", "B2"), low=0.0, high=0.9999999, fixed=True, key="optimizer.betas")
    eps: float | None = option(None, "what the optimizer adds to a denominator (default: its own)",
        "optimizer", low=0.0, high=1.0, fixed=True, key="optimizer.eps")
    max_grad_norm: float = option(5.0, "norm that gradients are clipped to; 0 = not clipped",
        "optimizer", low=0.0, high=1e9, fixed=True, key="training.max_grad_norm")
    accumulate_grad_batches: int = option(1, "batches a step; of a frozen backbone exactly as one batch of all their images",
        "optimizer", low=1, high=100_000, fixed=True, key="training.accumulate_grad_batches")
    ema_decay: float = option(0.0, "judge and keep a running mean of the weights with this decay; 0 = the weights",
        "optimizer", low=0.0, high=0.999999, fixed=True, key="training.ema_decay")
    scheduler: str = option("cosine", "learning rate over the steps: warm-up and half a cosine, or one cycle",
        "optimizer", fixed=True, choices=("cosine", "onecycle"), key="scheduler.type")
    warmup_epochs: float | None = option(None, "cosine: epochs of linear warm-up (default: a twentieth of all)",
        "optimizer", low=0.0, high=100_000, fixed=True, key="scheduler.warmup_epochs")
    pct_start: float = option(0.3, "onecycle: share of the steps with a rising learning rate",
        "optimizer", low=0.0, high=1.0, fixed=True, key="scheduler.pct_start")
    div_factor: float = option(25.0, "onecycle: peak over first learning rate",
        "optimizer", low=1.0, high=1e9, fixed=True, key="scheduler.div_factor")
    final_div_factor: float = option(1e4, "onecycle: first over last learning rate",
        "optimizer", low=1.0, high=1e12, fixed=True, key="scheduler.final_div_factor")
    anneal_strategy: str = option("cos", "onecycle: how it rises and falls",
        "optimizer", fixed=True, choices=("cos", "linear"), key="scheduler.anneal_strategy")
    balanced_per_class: bool = option(False, "show every class equally often", "training", fixed=True)
    samples_per_class: int = option(300, "images a class and epoch with --balanced_per_class", "training", low=1, fixed=True)
    cache_views: int | None = option(None, group="training", low=0, high=1000, fixed=True,
        text=f"views of an image, embedded once and shown in turn; 0 = fresh (default: {CACHED_VIEWS} if the backbone is frozen)")
    best_metric: str = option("acc",
        "figure on val that chooses the best checkpoint: acc, f1_macro, auc_macro, loss, proto_acc or recall_at_1",
        "training", metavar="NAME", fixed=True, choices=("acc", "f1_macro", "auc_macro", "loss", "proto_acc", "recall_at_1"))
    patience: int = option(0, "stop after so many epochs without a better best_metric; 0 = never",
        "training", low=0, high=100_000, key="training.patience")
    target_precision: float = option(0.95, "share of right answers that the thresholds for `unknown` are set to, on val",
        "prototypes", low=0.5, high=1.0)
    unknown_share: float = option(0.2, "share of all objects in production that thresholds and probabilities take to be unknown",
        "prototypes", low=0.0, high=0.9)
    unknown_dir: Path | None = option(None, "images of no class: half of them set the thresholds, the other half measures",
        "prototypes", metavar="DIR", folder=True)
    max_refs_per_class: int | None = option(None, group="prototypes", low=1,
        text="references a class in prototypes.npz: those nearest to k-means centres (default: all)")
    matcher: str = option("auto", "how a class is matched; auto = what is best on val",
        "prototypes", choices=("auto", "centroid", "knn"))
    match_features: bool = option(True, group="prototypes",
        text="match by features of the backbone too, where val hardly loses by it: enrolled classes are found more often")
    prototypes_per_class: str = option("auto", group="prototypes", metavar="auto|N", choices=("auto", *map(str, range(1, 31))),
        text="prototypes that a class may have; auto = several where val says so, else its centroid alone")

    gpus: int | None = option(None, "number of GPUs, 0 = CPU (default: one if there is one)", "machine", low=0, high=64)
    workers: int | None = option(None, group="machine", low=0, high=256, key="dataset.data_loaders.workers",
        text=f"processes that read images, capped at the cores there are (default: one core less, {MAX_WORKERS} at most)")
    cache_crops: float = option(8.0, group="machine", low=0.0, high=100_000.0,
        text="GB of disk, while a run lasts, for what is decoded: of each crop once, not every epoch; 0 = none")
    precision: str = option("auto",
        "auto answers in fp32, trains in bf16 or fp16 (DINOv3: fp32) on a GPU, fp32 on CPUs (frozen: bf16 if fast)",
        "machine", choices=("auto", "fp32", "bf16", "fp16"), spelled={"32": "fp32", "16": "fp16"}, fixed=True,
        key="training.precision")
    compile: bool = option(False, "compile the backbone with torch.compile: minutes first, faster then",
        "machine", fixed=True, key="training.compile")
    fsdp: bool = option(False, "stands in older config files; weights are not shared among processes any more",
        "machine", key="training.fsdp")
    deterministic: bool = option(False, "let torch choose only operations that give the same bits each time", "machine", fixed=True)

    resume: str | None = option(None, "continue from this checkpoint; without PATH from the last one in out_dir",
        "run", metavar="PATH", nargs="?", const="last", once=True)
    experiment_name: str | None = option(None, "name of the run: its folder below --models, and its ClearML task",
        "run", metavar="NAME", key="experiment_name", taken=())
    models: Path | None = option(None, "folder of runs: out_dir is then models/experiment_name, and --load_from looks here too",
        "run", metavar="DIR", key="directories.models")
    overwrite: bool = option(False, "start afresh; the old run is moved aside, not deleted", "run", once=True)
    save_every: int = option(5, "epochs between the checkpoints that are kept (checkpoint_epXXX.pth); 0 = none", "run", low=0)
    save_checkpoints: bool = option(True, "keep checkpoints on the way; off = only what resuming and export need",
        "run", key="training.save_checkpoints")
    save_metrics: bool = option(True, "record the figures of each class for each epoch; off = totals only",
        "run", key="training.save_metrics")
    save_minutes: float = option(10.0, "minutes between the saves inside an epoch; 0 = only when it ends", "run", low=0.0, high=1e6)
    preview: bool = option(False, "write preview.jpg: 64 images of training as the model sees them", "run")
    debug: bool = option(False, "show tracebacks", "run", once=True)

    use_clearml: bool = option(False, "record the run in ClearML too (offline into out_dir when no server answers)", "tracking")
    use_tensorboard: bool = option(False, "record the run for TensorBoard too, into out_dir/tensorboard", "tracking")
    clearml_project: str = option("DINOv3-Embeddings", "project in ClearML", "tracking", metavar="NAME")
    clearml_task_name: str | None = option(None, "task in ClearML (default: experiment_name, or the name of out_dir)",
        "tracking", metavar="NAME")
    # fmt: on

    @property
    def trains_backbone(self) -> bool:
        """Whether training changes parameters of the backbone."""
        return not self.freeze_backbone or self.unfreeze_blocks > 0 or self.lora_rank > 0


def same_option(name: str) -> Any:
    """Return a copy of a `Config` field for another options class, without `key` and neither fixed nor needed."""
    field = Config.__dataclass_fields__[name]
    metadata = {**field.metadata, "key": None, "fixed": False, "needed": False}
    return dataclasses.field(default=field.default, metadata=metadata)


@dataclass(frozen=True)
class RunOptions(Options):
    """Options shared by the commands that work on a finished run."""

    run: Path | None = option(None, "out_dir of the finished run", "run", metavar="DIR", needed=True, folder=True)
    backbone_weights: Path | None = option(
        None, "weights of its frozen backbone, if the run does not find them any more", "run", metavar="FILE", file=True
    )
    batch: int = option(64, "images a pass, over all GPUs together", "machine", low=1, high=65_536)
    gpus: int | None = same_option("gpus")
    workers: int | None = same_option("workers")
    precision: str = same_option("precision")
    debug: bool = same_option("debug")


@dataclass(frozen=True)
class EvaluateOptions(RunOptions):
    """Measure a finished run on its own test or val images, or on another labelled folder."""

    starts_anew: ClassVar[bool] = True
    data_root: Path | None = same_option("data_root")
    split: str = option(
        "test", "images of the run to judge; beside --data_root, which holds them now", "run", choices=("test", "val")
    )
    unknown_dir: Path | None = option(
        None, "images of no class (default: the run's, with its images)", "data", metavar="DIR", folder=True
    )
    class_map: Path | None = same_option("class_map")
    exclude: tuple[str, ...] = same_option("exclude")
    masks_out: Path | None = same_option("masks_out")

    @property
    def is_of_run(self) -> bool:
        """Whether the run's own images are measured: without --data_root, or with --split, which another folder does not have."""
        return self.data_root is None or "split" in self.origins


@dataclass(frozen=True)
class PrototypesOptions(RunOptions):
    """Make the gallery of a finished run anew, show it, enrol classes from a few crops, or take one out."""

    starts_anew: ClassVar[bool] = True
    add: Path | None = option(
        None, "folder with one folder of crops a class, to enrol", "run", metavar="DIR", folder=DATA_TREE
    )
    remove: str | None = option(None, "class to take out", "run", metavar="CLASS")
    list: bool = option(False, "show what is in the gallery", "run")
    data_root: Path | None = same_option("data_root")
    class_map: Path | None = same_option("class_map")
    exclude: tuple[str, ...] = same_option("exclude")
    masks_out: Path | None = same_option("masks_out")
    unknown_dir: Path | None = same_option("unknown_dir")
    target_precision: float = same_option("target_precision")
    unknown_share: float = same_option("unknown_share")
    max_refs_per_class: int | None = same_option("max_refs_per_class")
    matcher: str = same_option("matcher")
    match_features: bool = same_option("match_features")
    prototypes_per_class: str = same_option("prototypes_per_class")


COMMAND_OPTIONS: dict[str, type[Options]] = {"evaluate": EvaluateOptions, "prototypes": PrototypesOptions}


def option_fields(options_class: type[Options] = Config) -> list[dataclasses.Field]:
    """Return the fields of an options class that have a flag."""
    return [field for field in dataclasses.fields(options_class) if field.metadata]


def format_flags(options: Options, names: Iterable[str]) -> list[str]:
    """Return command-line arguments for those of the named options, none a list of entries, that differ from their defaults."""
    argv: list[str] = []
    for name in names:
        value = getattr(options, name)
        if value != getattr(type(options), name):
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            argv += [f"--{name}", *map(str, values)]
    return argv


def ineffective_options(config: Config) -> list[str]:
    """Return the options whose values have no effect, because another option would have to be set first."""
    conditions = {
        "backbone_lr layer_decay drop_path lr_type": config.trains_backbone,
        "test_split": config.splits == "random",
        "pct_start div_factor final_div_factor anneal_strategy": config.scheduler == "onecycle",
        "warmup_epochs": config.scheduler != "onecycle",
        "focal_gamma": config.criterion == "focal",
        "sub_centers": config.criterion == "subcenter_arcface",
        "arc_margin": config.criterion not in LINEAR_CRITERIA,
        "mixing_p mixing_alpha": config.mixing != "none",
        "backgrounds background_max_ratio": config.insert_background_p > 0,
        "samples_per_class": config.balanced_per_class,
        "mix_mask_p": config.crop_mode == "mix",
        "masks_out": config.crop_mode != "bbox" or config.auto_generate_masks,
        "sam2_cfg sam2_ckpt": config.auto_generate_masks,
    }
    return " ".join(names for names, has_effect in conditions.items() if not has_effect).split()


def name_training(options: dict[str, Any]) -> str:
    """Describe in words how the backbone is trained, given the options as `Config.as_plain` returns them."""
    if not options["freeze_backbone"]:
        return "fine-tuned"
    if blocks := options.get("unfreeze_blocks"):
        return f"fine-tuned in its last {blocks} blocks" if blocks > 1 else "fine-tuned in its last block"
    rank = options.get("lora_rank")
    return f"LoRA of rank {rank}" if rank else "frozen"


# How errors describe a value of each type.
EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    dict: "a list of entries such as {type: median_blur, p: 0.1}",
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows one line per option: its first flag, or `--[no-]flag` for a boolean."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        action = copy.copy(action)
        action.option_strings = action.option_strings[:1]
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for usage errors."""

    def error(self, message: str) -> Any:
        problem = re.sub(r"^argument ([^/:]+)(/[^:]+)?", r"\1", message)  # keep the first flag of the option
        raise UserError(problem, "command line", f"{self.prog} --help lists all options")


def parse_command_line(argv: Sequence[str]) -> Options:
    """Parse the arguments of this script into the options of a command. Raises UserError if they contradict each other."""
    command = argv[0] if argv and not argv[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise UserError(f"unknown command {command}", "command line", did_you_mean(command, [*COMMANDS, *TOOLS]))
    config = parse_options(COMMAND_OPTIONS.get(command, Config), argv[command in argv[:1] :], command)
    if not isinstance(config, Config):
        return config
    if config.out_dir is None and config.experiment_name is not None and config.models is not None:
        origins = {**config.origins, "out_dir": DERIVED_ORIGIN}
        config = dataclasses.replace(config, out_dir=config.models / config.experiment_name, origins=origins)
    if config.load_from:  # absolute if it exists where it was given
        is_typed = config.place("load_from") == config.flag("load_from")
        folder = config.models or (Path() if is_typed else config.config.parent)
        config = dataclasses.replace(config, load_from=(folder / config.load_from).absolute())
    check_config(config)
    return config


def parse_options(options_class: type[Options], argv: Sequence[str], command: str) -> Options:
    """Parse command-line arguments into options, and check their ranges. `--help` prints and exits.

    If the class has an option `config`, typed values override that file, which overrides the defaults; the folder of a run stands
    for its config.json. Raises UserError for an unknown flag, a wrong type, or a value out of range.
    """
    parser = build_parser(options_class, command)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        if unknown[0] in COMMANDS | TOOLS:
            raise UserError(f"{unknown[0]} is a command", "command line", "put the command first")
        actions = parser._option_string_actions
        remedy = did_you_mean(unknown[0].split("=")[0], actions, f"{parser.prog} --help lists what there is")
        before = actions.get(dict(zip(argv[1:], argv, strict=False)).get(unknown[0]))
        if isinstance(before, argparse.BooleanOptionalAction):  # --freeze_backbone False
            on, off = (options_class.flag(f"{prefix}{before.dest}") for prefix in ("", "no-"))
            remedy = f"on is {on}, off is {off}, without a value"
        raise UserError(f"unknown argument {unknown[0]}", "command line", remedy)
    typed, from_file, places = vars(namespace), {}, {}
    if path := typed.get("config"):
        with contextlib.suppress(OSError):  # reading names the reason
            path = path / "config.json" if path.is_dir() else path
        where = f"--config {path}"
        loaders = {".yaml": load_yaml, ".yml": load_yaml, ".toml": tomllib.loads, ".json": load_json}
        if path.suffix.lower() not in loaders:
            raise UserError("is not named .yaml, .toml or .json", where, "rename it after what it is")
        text = read_text(path, where)
        try:
            tree = loaders[path.suffix.lower()](text)
        except (ValueError, RecursionError) as error:  # tomllib raises the latter
            raise UserError(f"cannot be read: {error}", where, "see configs/ for how one looks") from error
        from_file, places = convert_options(path, tree, options_class)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in (from_file | typed).items()}
    origins = places | dict.fromkeys(typed, COMMAND_LINE_ORIGIN)
    options = options_class(command=command, origins=origins, **values)
    check_ranges(options)
    return options


def build_parser(options_class: type[Options], command: str) -> argparse.ArgumentParser:
    """Generate the parser of a command from its options class. The help has a section per group and a line per option."""
    positionals = ["[COMMAND]"] if command == "train" else []
    program, fields = program_name(command), option_fields(options_class)
    commands = "".join(f"  {name:<12}{text}\n" for name, text in (COMMANDS | TOOLS).items())
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        usage=" ".join([program, *positionals, *needed_flags(options_class), "[options]"]),
        description=(options_class.__doc__ or "").split("\n")[0],
        epilog=f"commands, each with a --help of its own:\n{commands}" if positionals else None,
        formatter_class=functools.partial(_HelpFormatter, max_help_position=38, width=150),
    )
    titles = dict.fromkeys(field.metadata["group"] for field in fields)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for field in fields:
        meta, kind = field.metadata, field_kind(field)
        settings = {key: meta[key] for key in ("metavar", "nargs", "const", "action") if key in meta}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = functools.partial(_parse_word, field, options_class.flag(field.name))
            choices = ",".join(map(str, meta.get("choices", ())))
            settings.setdefault("metavar", f"{{{choices}}}" if choices else "N" if kind is int else "X")
        default = ("on" if field.default else "off") if kind is bool else field.default
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        settings["help"] = meta["help"] + (f" [{default}]" if default not in (None, "") else "")
        names = filter(None, (field.name, meta.get("alias"), meta.get("key")))
        flags = dict.fromkeys(flag for name in names for flag in (options_class.flag(name), f"--{name}"))
        groups[meta["group"]].add_argument(*flags, dest=field.name, default=argparse.SUPPRESS, **settings)
    return parser


def program_name(command: str) -> str:
    """Return how a user starts a command: through this script if it knows the command, else as a script in tools/."""
    if command == "train":
        return f"python {SCRIPT_NAME}"
    return f"python {SCRIPT_NAME} {command}" if command in COMMANDS | TOOLS else f"python tools/{command}.py"


def needed_flags(options_class: type[Options]) -> list[str]:
    """Return the required flags of a command, each followed by its metavar."""
    needed = (field for field in option_fields(options_class) if field.metadata.get("needed"))
    return [f"{options_class.flag(field.name)} {field.metadata['metavar']}" for field in needed]


def _parse_word(field: dataclasses.Field, flag: str, text: str) -> Any:
    """Convert a command-line word to a value; `none` and `auto` mean None if that is the default, to override a config file."""
    kind = field_kind(field)
    if text in ("none", "auto") and field.default is None and "nargs" not in field.metadata:
        return None
    try:  # a `dict` option is a whole list of entries in one word; JSON is valid YAML
        value = {int: int, float: float, dict: load_yaml}.get(kind, str)(text)
    except ValueError as error:
        problem = f"is no YAML: {error}" if kind is dict else f"{text!r} is not {EXPECTED[kind]}"
        raise UserError(problem, flag, "correct the value") from error
    convert = _convert_value if kind is dict else _convert_item
    return convert(field, value, flag, Path())


def field_kind(field: dataclasses.Field) -> type:
    """Return the type of one value of an option: `int` for `int | None`, `str` for `tuple[str, ...]`."""
    type_name = re.match(r"\w+", field.type.removeprefix("tuple["))[0]
    return {"int": int, "float": float, "str": str, "Path": Path, "bool": bool, "dict": dict}[type_name]


def check_ranges(options: Options) -> None:
    """Refuse numbers that are not finite or outside the bounds of their option, and what cannot name a folder."""
    for field in option_fields(type(options)):
        value, meta, place = getattr(options, field.name), field.metadata, options.place(field.name)
        low, high = meta.get("low"), meta.get("high")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{number} is not a finite number", place, "give a plain number")
            if number is not None and ((low is not None and number < low) or (high is not None and number > high)):
                allowed = f"from {low} to {high}" if high is not None else f"{low} or more"
                raise UserError(f"{number} is out of range", place, f"give a value {allowed}")
        if value is not None and "taken" in meta and ("/" in value or value.strip() in ("", ".", "..", *meta["taken"])):
            raise UserError(f"{value!r} is not the name of a folder that is free for this", place, "give a plain name")


def open_streams() -> None:
    """Open closed standard streams on /dev/null, else the next opened file gets their descriptors; let stdout escape letters."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free one, which is that of the stream
            os.set_inheritable(descriptor, True)  # tools print too
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w"))  # noqa: SIM115  stays open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # class names in Cyrillic on a Latin-1 terminal


def find_tool(command: str) -> Path:
    """Return the script of a tool. Raises UserError if it is not beside this script, which may be the copy kept in a run."""
    path = TOOLS_DIR / f"{command}.py"
    if not path.is_file():
        raise UserError("is not there", str(path), f"put the folder tools/ beside {SCRIPT_NAME}, as the project has it")
    return path


def convert_options(path: Path, tree: Any, options_class: type[Options]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the options in the `tree` of a config file, and the file and key that sets each, both by field name.

    The config.json of a run gives the options of that run, except `once` and derived ones. Raises UserError for an unknown or
    repeated key, or a value of the wrong type.
    """
    fields, where = option_fields(options_class), f"--config {path}"
    if isinstance(tree, dict) and all(isinstance(tree.get(key), dict) for key in ("options", "origins")):
        unused = {"command", *(field.name for field in fields if field.metadata.get("once"))}
        unused |= {name for name, origin in tree["origins"].items() if origin == DERIVED_ORIGIN}
        tree = {key: value for key, value in tree["options"].items() if key not in unused}
    if is_predecessor_config(tree):
        raise UserError(f"is of {PREDECESSOR}", where, "see configs/lct-dino-3.yaml, and type what differs")
    if not isinstance(tree, dict | None):
        raise UserError("holds no options, which are written as  key: value", where, "see configs/")
    options: dict[str, Any] = {}
    places: dict[str, str] = {}
    known = {field.name: field for field in fields}
    known |= {field.metadata["key"]: field for field in fields if field.metadata.get("key")}
    for key, value in _walk_keys(path, tree or {}, known):
        field, place = known[key], f"{path}: {key}"
        if field.name in options:
            problem = f"says the same as {places[field.name].removeprefix(f'{path}: ')}"
            raise UserError(problem, place, "leave one of them out")
        if value is not None and (value != [] or field.default != ()):  # null and an empty list mean the default
            options[field.name] = _convert_value(field, value, place, path.parent)
            places[field.name] = place
    return options, places


def _walk_keys(path: Path, tree: dict, known: Mapping[str, dataclasses.Field], prefix: str = "") -> Iterator[tuple]:
    """Yield the dotted key and the value of each option in a tree of sections."""
    sections = {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 1)}
    for name, value in tree.items():
        key, place = f"{prefix}{name}", f"{path}: {prefix}{name}"
        if key in sections and isinstance(value, dict | None):  # an option may have the same name: optimizer
            yield from _walk_keys(path, value or {}, known, f"{key}.")
        elif key in known and not known[key].metadata.get("once"):
            yield key, value
        elif key in sections:
            keys = ", ".join(sorted(other for other in known if other.startswith(f"{key}.")))
            raise UserError("is a section", place, f"give values of {keys}")
        else:
            problem = "belongs on the command line" if key in known else "is no known key"
            remedy = f"type --{name}" if key in known else did_you_mean(key, [*known, *sections])
            raise UserError(problem, place, remedy)


def _convert_value(field: dataclasses.Field, value: Any, where: str, folder: Path) -> Any:
    """Convert a parsed value to the type of its option; relative paths start from `folder`, that of the config file."""
    if not field.type.startswith("tuple["):
        return _convert_item(field, value, where, folder)
    count = field.metadata.get("nargs")
    values = [value] if count == "+" and not isinstance(value, list) else value
    if not isinstance(values, list) or (isinstance(count, int) and len(values) != count):
        expected = f"a list of {count} numbers" if isinstance(count, int) else EXPECTED[field_kind(field)]
        raise UserError(f"{reprlib.repr(value)} is not {expected}", where, "correct the value")
    return tuple(_convert_item(field, item, f"{where}[{index}]", folder) for index, item in enumerate(values))


def _convert_item(field: dataclasses.Field, value: Any, where: str, folder: Path) -> Any:
    kind, choices = field_kind(field), field.metadata.get("choices")
    if type(value) is int and value.bit_length() > 63:
        raise UserError("is too large a number", where, "correct the value")
    if kind in (str, float) and type(value) is int:  # e.g. precision: 16, prototypes_per_class: 3
        value = kind(value)
    if kind is str and type(value) is float:  # 1.10 would become 1.1
        raise UserError(f"{value!r} is a number", where, "put it in quotes")
    if type(value) is not (str if kind is Path else kind):
        raise UserError(f"{reprlib.repr(value)} is not {EXPECTED[kind]}", where, "correct the value")
    value = field.metadata.get("spelled", {}).get(value, value) if kind is str else value
    if choices and value not in choices:
        names = [str(choice) for choice in choices]
        remedy = did_you_mean(str(value), names, "correct the value")
        raise UserError(f"{value!r} is none of {', '.join(names)}", where, remedy)
    if kind is dict:
        try:
            json.dumps(value)
        except TypeError as error:  # a date of TOML, !!binary of YAML
            raise UserError(str(error), where, "give text, numbers and lists") from error
    if kind is not Path:
        return value
    if not value:  # on the command line an unset shell variable; Path("") would be the current folder
        raise UserError("is empty", where, "give a path, or leave it out")
    try:
        path = folder / Path(value).expanduser()
    except RuntimeError as error:
        raise UserError(f"{value!r} names a user that is not known here", where, "correct the path") from error
    if not field.metadata.get("in_models"):
        return path
    return path.absolute() if os.path.lexists(path) else Path(value)


def did_you_mean(
    word: str, known: Iterable[str], fallback: str = f"python {SCRIPT_NAME} --help lists what there is"
) -> str:
    """Return a remedy that names up to three known words, with the same last part as `word` or else similar; or the `fallback`."""
    names, ending = {other.lstrip("-"): other for other in known}, word.rpartition(".")[2]
    close = [other for other in names.values() if other.rpartition(".")[2] == ending][:3]
    close = close or [names[name] for name in difflib.get_close_matches(word.lstrip("-"), names, n=3, cutoff=0.6)]
    return f"did you mean {' or '.join(close)}?" if close else fallback


def load_yaml(text: str, is_plain: bool = False) -> Any:
    """Parse YAML as `_make_yaml_loader` does, or with `is_plain` all scalars as text. Raises ValueError with the reason."""
    import yaml

    try:
        loader = _make_yaml_loader()(text)
        if is_plain:
            loader.yaml_implicit_resolvers = {}
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > MAX_CONFIG_VALUES:
            raise ValueError(f"its aliases stand for more than {MAX_CONFIG_VALUES:,} values, or for themselves")
        return loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{error.reason} in line {line}") from error
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{error.problem or error} in line {error.problem_mark.line + 1}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (TypeError, LookupError, AttributeError) as error:  # raised by yaml's constructors
        raise ValueError("a value is not what its tag says") from error


@functools.cache
def _make_yaml_loader() -> type:
    """Return a safe YAML loader that reads 4e-4 as a number and dates as text, and refuses repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012 - without the dates, octal numbers and floats of YAML 1.1 (no 4e-4)
            first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float", ":int"))]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    def construct(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        names: set[Any] = set()
        for key in (key for key, _ in node.value if not key.tag.endswith(":merge")):
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
            name = loader.construct_object(key)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
            names.add(name)
        return loader.construct_mapping(node, deep=True)  # keys of the node override those merged with <<

    Loader.add_constructor("tag:yaml.org,2002:map", construct)
    # 007 stays text
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
    number = r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(number), list("-+.0123456789"))
    return Loader


def _count_values(node: Any, counts: dict[Any, float]) -> float:
    if node not in counts:
        counts[node] = math.inf  # a node that contains itself stays infinite
        items = node.value if isinstance(node.value, list) else ()
        children = [child for item in items for child in (item if isinstance(item, tuple) else (item,))]
        counts[node] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[node]


def load_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError, also for a repeated key, NaN, infinity, and too deep nesting."""

    def to_dict(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        if len(items := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
        return items

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, object_pairs_hook=to_dict, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_text(path: Path, where: str) -> str:
    """Read the text of a small UTF-8 file, and drop a byte-order mark. Raises UserError with `where` in it."""
    try:
        return read_regular(path, MAX_CONFIG_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error.strerror) if isinstance(error, OSError) else "is not UTF-8"
        raise UserError(problem, where, "check the path") from error


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Read the bytes of a file. Raises OSError, also if it is not a regular file (a FIFO, say) or larger than `max_bytes`."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # opening a FIFO would wait for a writer
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"the file is larger than {max_bytes // 1_000_000} MB", str(path))
        return file.read()


def check_config(config: Config) -> None:
    """Refuse training options that contradict each other; the error names all of them."""
    for name, values in (("exclude", config.exclude), ("resume", (config.resume,))):
        for word in set(values) & (COMMANDS | TOOLS).keys():
            raise UserError(f"has taken the command {word} for its value", config.place(name), "put the command first")
    ways = [name for name in ("unfreeze_blocks", "lora_rank") if getattr(config, name)]
    ways += [] if config.freeze_backbone else ["freeze_backbone"]
    given_lrs = [name for name in ("backbone_lr", "fc_lr") if getattr(config, name) is not None]
    give_one, drop_one, sees_masks = "give one of them", "leave one of them out", config.in_channels == 4
    # fmt: off
    # is_wrong, names of the options, problem, remedy
    refusals: tuple[tuple[bool, Sequence[str], str, str], ...] = (
        (config.val_split + config.test_split > 0.9 + 1e-9, ("val_split", "test_split"),
            "leave less than a tenth for training", "lower them"),
        (config.val_split <= 0, ("val_split",), "0 leaves nothing to choose the best checkpoint by", "give a share such as 0.2"),
        (len(ways) > 1, ways, "are different ways to train a backbone", give_one),
        (bool(config.cache_views) and len(ways) > 0, ("cache_views", *ways),
            "do not go together: a backbone that is trained gives other features after each step", give_one),
        (bool(config.cache_views) and config.mixing != "none", ("mixing", "cache_views"),
            "mixes pixels, and cached views are features", drop_one),
        (config.load_from is not None and config.backbone_weights is not None, ("load_from", "backbone_weights"),
            "are two ways to start, of which load_from does what the other does", give_one),
        (config.lr_type == "one_lr" and len(given_lrs) > 0, ("lr_type", *given_lrs), "contradict each other", give_one),
        (sees_masks and config.crop_mode == "bbox", ("in_channels", "crop_mode"),
            "the fourth channel would never see a mask", "give --crop_mode mask or mix"),
        (sees_masks and config.insert_background_p > 0, ("in_channels", "insert_background_p"),
            "a crop on another picture has no mask any more", drop_one),
        (not sees_masks and config.mask_fill == "keep", ("mask_fill",),
            "keep leaves nothing to be seen of a mask", "show it to the model with --in_channels 4"),
        (config.compile and (config.gpus or 0) > 1, ("compile",),
            "is for one GPU a process", "leave it out, or start one process a GPU with torchrun"),
        (config.fsdp, ("fsdp",), "is gone: weights are not shared among processes any more",
            "leave it out; a frozen ViT-7B in bf16 fits one large GPU"),
        (config.insert_background_p > 0 and config.backgrounds is None, ("insert_background_p",),
            "needs pictures", "give their folder with --backgrounds DIR"),
        (bool(config.mean) != bool(config.std), ("mean", "std"),
            "come together", "give both, e.g. --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"),
    )
    # fmt: on
    for is_wrong, names, problem, remedy in refusals:
        if is_wrong:
            raise UserError(problem, ", ".join(map(config.place, names)), remedy)


def check_paths(config: Config) -> None:
    """Check all named files and folders as far as that is possible without reading images; write nothing."""
    check_given(config)
    check_out_dir(config)
    out_dir, data_root = config.out_dir.resolve(), config.data_root.resolve()
    read_later = {"backbone_weights", "unknown_dir", "backgrounds", "masks_out"}.difference(ineffective_options(config))
    for name in ("load_from", *sorted(read_later)):
        path = locate_start(config) if name == "load_from" else getattr(config, name)
        if config.overwrite and path is not None and path.resolve().is_relative_to(out_dir):
            problem = "would be moved aside by --overwrite before the run has read it"
            raise UserError(problem, f"{config.place(name)} {path}", "choose a new --out_dir")
    if config.insert_background_p:
        backgrounds, where = config.backgrounds.resolve(), config.describe("backgrounds")
        remedy = "choose a folder of other pictures"
        if backgrounds.is_relative_to(data_root) or data_root.is_relative_to(backgrounds):
            problem = "and data_root lie one inside the other: crops would be put on crops, also of val and test"
            raise UserError(problem, where, remedy)
        if out_dir.is_relative_to(backgrounds):
            problem = "holds out_dir, whose own pictures would be taken for backgrounds"
            raise UserError(problem, where, f"{remedy}, or another --out_dir")
    if config.group_regex is not None:
        try:
            num_groups = re.compile(config.group_regex).groups
            problem = f"has {num_groups} capture groups, not one"
        except (re.error, OverflowError, RecursionError) as error:
            num_groups, problem = 0, f"is no regular expression: {error}"
        if num_groups != 1:
            raise UserError(problem, config.describe("group_regex"), r"for example '^(shot\d+)_'")


def check_given(options: Options) -> None:
    """Check that required options are given, and that paths are accessible, of the right kind, and not the predecessor's."""
    for field in option_fields(type(options)):
        value = getattr(options, field.name)
        if field.metadata.get("needed") and value in (None, ()):
            remedy = " ".join((program_name(options.command), *needed_flags(type(options))))
            raise UserError("is missing", options.flag(field.name), remedy)
        if not isinstance(value, (Path, str) if field.name == "resume" else Path):
            continue
        try:
            if stat.S_ISDIR(os.stat(value).st_mode) and not os.access(value, os.R_OK | os.X_OK):  # noqa: PTH116  `resume` is text
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:  # no permission on a parent folder, too long a name, a NUL in it
            problem = getattr(error, "strerror", None) or str(error)
            raise UserError(problem, options.describe(field.name), "check the path") from error
    check_predecessor(options)
    check_existing(options)


def check_predecessor(options: Options) -> None:
    """Refuse a run of lct-dino-3.py, a file in it, or the folder of its runs, where an option needs a run of this script."""
    for name, remedy in PREDECESSOR_REMEDIES.items():
        path = getattr(options, name, None)
        is_moved = name == "out_dir" and getattr(options, "overwrite", False)
        if not isinstance(path, (str, Path)) or path == "last" or is_moved:
            continue
        path = Path(path)
        runs = [path.parent if path.is_file() else path, *sorted(path.glob("run_[0-9]*"))]
        for run in [path] if name == "data_root" else runs:  # a data_root may contain runs
            config: Any = None
            with contextlib.suppress(OSError, ValueError):
                config = load_json(read_regular(run / "config.json", MAX_CONFIG_BYTES))
            if is_predecessor_config(config):
                raise UserError(f"is of {PREDECESSOR}", options.describe(name), remedy.format(run=run))


PREDECESSOR = "lct-dino-3.py, which this script replaces"
PREDECESSOR_REMEDIES = {
    "run": "train anew with --load_from {run}, which takes its backbone",
    "resume": "give --load_from {run}, which takes its backbone, in place of --resume",
    "out_dir": "choose a new --out_dir; --load_from {run} takes the backbone",
    "data_root": "give the folder of its crops",
}


def is_predecessor_config(tree: Any) -> bool:
    """Whether a parsed config.json was written by lct-dino-3.py."""
    return isinstance(tree, dict) and {"model_id", "data_parallel", "num_devices"} <= tree.keys()


def check_existing(options: Options, *names: str) -> None:
    """Check that the paths of options with an effect are the `file` or `folder` that they must be; `names` limits the check."""
    ineffective = ineffective_options(options) if isinstance(options, Config) else ()
    for field in option_fields(type(options)):
        name, path = field.name, getattr(options, field.name)
        kind = next((kind for kind in ("file", "folder") if field.metadata.get(kind)), None)
        if kind is None or path is None or name in ineffective or (names and name not in names):
            continue
        if not (path.is_file() if kind == "file" else path.is_dir()):
            problem = f"is not a {kind}" if path.exists() else "does not exist"
            patterns = ("*.index.json", "model*.safetensors", "pytorch_model*.bin")  # weights in a folder of the hub
            remedies = [f"give {file}" for pattern in patterns for file in path.glob(pattern)]
            remedies.append("check the path" if field.metadata[kind] is True else field.metadata[kind])
            if options.place(name) != options.flag(name):  # set in a config file
                remedies = [f"give {options.flag(name)} PATH, where it is now"]
            raise UserError(problem, options.describe(name), remedies[0])


def check_out_dir(config: Options) -> None:
    """Refuse an out_dir that is not writable, holds other files than a run, or overlaps with data_root."""
    out_dir, data_root = config.out_dir.resolve(), config.data_root.resolve()
    is_moved = getattr(config, "overwrite", False)
    existing = existing_folder(out_dir)
    is_run = False
    for name, mark in RUN_MARKERS.items():
        if (out_dir / name).is_file():
            with open(out_dir / name, "rb") as file:
                beginning = file.read(1_000_000)
            is_run = is_run or not beginning or mark in beginning  # the files of a run that has just begun are empty
    is_foreign = out_dir.is_dir() and any(out_dir.iterdir()) and not is_run
    # fmt: off
    refusals = (
        (out_dir.is_relative_to(data_root),
            "lies inside data_root, where it would be taken for a class", "choose a folder outside the data"),
        (is_moved and Path.cwd().is_relative_to(out_dir),
            "is the current folder, which --overwrite would move aside", "start from another folder"),
        (data_root.is_relative_to(out_dir), "holds data_root, which --overwrite would move aside with it", "choose another folder"),
        (out_dir.exists() and not out_dir.is_dir(), "is a file, not a folder", "choose another path"),
        (not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK),
            f"{existing} is not a folder that can be written to", "choose a folder of your own"),
        (is_foreign, "is neither empty nor a run of this script", "choose a new folder"),
    )
    # fmt: on
    for is_wrong, problem, remedy in refusals:
        if is_wrong:
            raise UserError(problem, config.describe("out_dir"), remedy)
    if config.masks_out is not None and config.masks_out.resolve() != data_root:
        check_outside(config.masks_out, config.describe("masks_out"), {"data_root": data_root})


def existing_folder(path: Path) -> Path:
    """Return a folder, or the nearest one above that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


OUTPUT_MARK = b"lct_dino3"  # tools put it into the files that they write to a path given by the user


def check_outside(path: Path, where: str, folders: Mapping[str, Path | None]) -> None:
    """Refuse an output path inside any run, or inside one of the named folders, where the output would be taken for input."""
    path, names = path.resolve(), ("metrics.jsonl", "config.json")
    run = next((folder for folder in path.parents if all((folder / name).is_file() for name in names)), None)
    for name, folder in {**folders, "a run": run}.items():
        if folder is not None and path.is_relative_to(folder.resolve()):
            raise UserError(f"lies inside {name}, {folder.resolve()}", where, "choose a place outside it")


def locate_start(config: Config) -> Path | None:
    """Return the file that --load_from names; for a folder its best checkpoint, else its last one. Raises UserError."""
    path = config.load_from
    if path is None or path.is_file():
        return path
    checkpoints = [path / name for name in (BEST_NAME, LAST_NAME) if (path / name).is_file()]
    if not checkpoints:
        problem = "is neither a file nor a folder" if path.exists() else "does not exist"
        problem = "holds no checkpoint" if path.is_dir() else problem
        raise UserError(problem, config.describe("load_from"), "give the folder of a run, or a file")
    return checkpoints[0]


def check_replaceable(path: Path, where: str, mark: bytes = OUTPUT_MARK) -> None:
    """Refuse to overwrite a path that is not a file with the `mark` of this tool in it."""
    if os.path.lexists(path) and not (path.is_file() and mark in path.read_bytes()):
        raise UserError("is no such file of this tool, and is not overwritten", where, "give another name")


# --help and usage errors must answer at once, but importing torch alone takes 2 s: so the command line is parsed here, before the
# heavy imports, and only if this file is run as a script. Under torchrun only rank 0 reports an error and exits; the other ranks go
# on and wait for it until torchrun ends them.
if __name__ == "__main__":
    open_streams()
    try:
        if sys.argv[1:2] and sys.argv[1] in TOOLS:
            os.execv(sys.executable, [sys.executable, str(find_tool(sys.argv[1])), *sys.argv[2:]])
        with contextlib.redirect_stdout(None) if IS_OTHER_RANK else contextlib.nullcontext():  # print --help once
            _options = parse_command_line(sys.argv[1:])
        # With --debug, `main` makes the same checks and shows a traceback. Only rank 0 needs to report; `main` parses again.
        if not _options.debug and not IS_OTHER_RANK:
            (check_paths if isinstance(_options, Config) else check_given)(_options)
    except UserError as _error:
        if not IS_OTHER_RANK:
            sys.exit(print(f"error: {_error}", file=sys.stderr) or EXIT_USER)

import itertools
import multiprocessing.queues

import cv2
import filelock
import numpy as np
import scipy.fft
import scipy.sparse
import scipy.special
import simplejpeg
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, TiffImagePlugin
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

# ======================================================================================================================
# 03  RUN DIRECTORY & LOGGING
# ======================================================================================================================
# Writes the files that stay in out_dir: atomically, as logs of complete lines, or in SQLite transactions. Receives signals, and
# starts tools as processes. Raises UserError for files that cannot be written.
MAX_FILE_BYTES = 500_000_000
SECOND_PRESS_SECONDS = 0.5  # a second Ctrl-C counts only after this: launchers repeat the one from the terminal
CLOSE_SECONDS = 4.5  # longest wait for the tracker at the end of a run; nothing else waits for it


def get_world_size() -> int:
    """Return the number of processes that torchrun has started for this job, 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


class Signals:
    """Signals from the terminal and the scheduler. A process has one set of handlers, hence one instance: `SIGNALS`.

    A signal to stop raises Interrupted, at once or at the end of a `hold` block; SIGUSR1 sets `wants_save`.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the first signal to stop
        self.wants_save = False
        self._asked_at, self._holds, self._is_deferred = 0.0, 0, False

    def catch(self, is_first: bool = True) -> None:
        """Install the handlers. Ranks other than 0 only note a signal to stop, because rank 0 decides when to stop.

        A signal that the parent process has set to be ignored, as nohup does with SIGHUP, stays ignored.
        """
        self.__init__()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop if is_first else lambda number, _: setattr(self, "asked", number))
        signal.signal(signal.SIGUSR1, (lambda *_: setattr(self, "wants_save", True)) if is_first else signal.SIG_IGN)

    def receive_any(self, signals: Iterable[int | None]) -> None:
        """Act in rank 0 on a signal that only another rank received, e.g. when a scheduler takes one machine back."""
        number = next(filter(None, signals), None)
        if number is not None and get_rank() == 0 and self.asked is None:
            self._stop(number, None)

    def _stop(self, number: int, _: Any) -> None:
        if self.asked is not None:
            # A second Ctrl-C ends the process at once; files on disk are always complete. Schedulers repeat SIGTERM, to no effect.
            if number == signal.SIGINT and time.monotonic() - self._asked_at > SECOND_PRESS_SECONDS:
                os._exit(128 + number)
            return
        self.asked = signal.SIGTERM if number == signal.SIGHUP else number
        self._asked_at, self._is_deferred = time.monotonic(), self._holds > 0
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises for loader workers that the same signal ended
        if not self._holds:
            raise Interrupted(self.asked)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Defer a signal to stop until the block ends, so that the block runs to its end."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._is_deferred and not self._holds:
            self._is_deferred = False
            raise Interrupted(self.asked)

    def check(self) -> None:
        """Raise Interrupted if rank 0 has received a signal to stop; for places where a library may swallow the exception."""
        if self.asked is not None and get_rank() == 0:
            raise Interrupted(self.asked)


def get_rank() -> int:
    """Return the rank of this process under torchrun, 0 without it. Only rank 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def check_zip(path: Path) -> None:
    """Check every member of a zip archive (checkpoint, .npz) against its CRC-32, which torch's reader does not do.

    Raises zipfile.BadZipFile if it is damaged, truncated or no zip archive; OSError if it cannot be read.
    """
    if path.exists() and not path.is_file():  # opening a FIFO would block until another process writes to it
        raise zipfile.BadZipFile("is no regular file")
    zip_errors = (OSError, RuntimeError, EOFError, ValueError, zlib.error)  # all that zipfile raises for flipped bits
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zip_errors as error:
        # Flipped bits raise EINVAL for a negative offset, and None in bz2.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise zipfile.BadZipFile(f"is damaged: {error}") from error
    if damaged is not None:
        raise zipfile.BadZipFile(f"is damaged: {damaged} in it is not what was written")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented UTF-8 JSON, atomically."""
    text = json.dumps(to_json(value), indent=1, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears complete or not at all: temporary file, fsync, rename, fsync of the folder.

    The writers of torch and numpy replace an Interrupted raised inside them: hold signals around them with `SIGNALS.hold`.

    Raises UserError if it cannot be written; an earlier file of this name then stays as it is, unless only the fsync of the folder
    failed.
    """
    temporary, written = path.with_name(f".{path.name}.{os.getpid()}.tmp"), 0
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                written = temporary.stat().st_size
                temporary.unlink()
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save raises RuntimeError("unexpected pos") for any failed write; its context is the OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise write_error(path, cause, written) from error


def sync_folder(path: Path) -> None:
    """Write the entries of a folder to disk, so that created and renamed files survive a power failure."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems lack it, and do not need it
            raise
    finally:
        os.close(folder)


SIGNALS = Signals()


def write_error(path: Path, error: OSError, num_bytes: int) -> UserError:
    """Return the error for a file that cannot be written: the reason, bytes written so far, bytes free on the disk."""
    free = ""
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(path.parent).free:,} bytes are free there"
    problem = f"cannot be written: {error.strerror or error} (after {num_bytes:,} bytes{free})"
    remedy = "what was there before is kept; once it can be written, the same command continues"
    return UserError(problem, str(path), remedy)


def read_json(path: Path, form: Any) -> Any:
    """Read a JSON file and check it against `form`. Raises OSError, or ValueError with the reason."""
    value = load_json(read_regular(path, MAX_FILE_BYTES))
    check_form(value, form)
    return value


def check_form(value: Any, form: Any, name: str = "it") -> None:
    """Check parsed JSON against a form, at every depth. Raises ValueError, which names the missing key or the wrong type.

    A form is a type or a tuple of types; [form] for every item of a list; {key: form} for a mapping that needs these keys;
    {str: form} for every value of a mapping.
    """
    types = form if isinstance(form, tuple) else (form if isinstance(form, type) else type(form),)
    accepts_bool = bool in types or object in types  # to Python, True is an int
    if not isinstance(value, types) or (isinstance(value, bool) and not accepts_bool):
        expected = " or ".join(expected_type.__name__ for expected_type in types)
        raise ValueError(f"{name} is of type {type(value).__name__}, not {expected}")
    if isinstance(form, list):
        for index, item in enumerate(value):
            check_form(item, form[0], f"{name}[{index}]")
    elif isinstance(form, dict):
        forms = dict.fromkeys(value, form[str]) if str in form else form
        if missing := [key for key in forms if key not in value]:
            raise ValueError(f"{name} has no {missing[0]}")
        for key, form_of_key in forms.items():
            check_form(value[key], form_of_key, f"{'' if name == 'it' else f'{name}.'}{key}")


def fingerprint(*values: Any) -> str:
    """Return 16 hex digits of the SHA-256 of bytes, arrays and JSON values; order, kind, dtype and shape count too."""
    digest = hashlib.sha256()
    for value in values:
        kind, content = "bytes", value
        if isinstance(value, np.ndarray):
            kind, content = f"{value.dtype} {value.shape}", np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        elif not isinstance(value, bytes):
            kind, content = "json", json.dumps(value, sort_keys=True, default=to_json).encode()
        digest.update(f"{kind} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def to_json(value: Any) -> Any:
    """Convert numpy values and paths to plain JSON values; NaN and infinity, which JSON lacks, become None."""
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


class LineFile:
    """A log that grows by complete lines: each append reaches the disk before it returns, or is undone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if not (data := path.read_bytes()).endswith(b"\n"):  # a killed process leaves half a line
                os.ftruncate(self._fd, data.rfind(b"\n") + 1)
        except OSError as error:
            raise write_error(path, error, 0) from error

    def append(self, text: str) -> None:
        """Write one or more lines. Raises UserError if the disk is full or gone, and leaves the file as it was."""
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        size, written = None, 0
        with SIGNALS.hold():
            try:
                size = os.fstat(self._fd).st_size
                while written < len(data):
                    written += os.write(self._fd, data[written:])
                os.fsync(self._fd)
            except OSError as error:
                if size is not None:
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._fd, size)
                raise write_error(self.path, error, written) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class RunDirectory:
    """The folder of a run: its lock, `train.log` for people, `metrics.jsonl` for programs, and the tracker that reads it."""

    def __init__(self, path: Path, flag: str = "--out_dir", events_name: str = "metrics.jsonl") -> None:
        self.path = path
        self.events_path = path / events_name
        self._tracker: subprocess.Popen | None = None
        self._lock = lock_directory(path, flag).lock
        # Leftovers of a run killed while writing; safe to delete, because only the holder of the lock writes.
        for leftover in path.glob(".*.[0-9]*.tmp"):
            leftover.unlink()
        self._log = LineFile(path / "train.log")
        self._events = LineFile(self.events_path)

    def log(self, text: str = "") -> None:
        """Print a line, and append it to train.log with a timestamp."""
        show(text)
        self._write_log(text)

    def _write_log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.append("".join(f"{stamp}  {line}\n" for line in text.splitlines() or [""]))

    def event(self, name: str, **values: Any) -> None:
        """Append one JSON object to metrics.jsonl."""
        record = to_json({"event": name, "time": round(time.time(), 3), **values})
        self._events.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def forget_epochs_after(self, epoch: int) -> None:
        """Delete the events of epochs after `epoch`, which will run again; -1 deletes those of the baseline too."""
        epoch_events = ("baseline_end", "unseen_classes", "epoch_end", "best_update")
        self.forget(lambda record: record["event"] in epoch_events and record.get("epoch", 0) > epoch)

    def forget(self, is_outdated: Callable[[dict[str, Any]], bool]) -> None:
        """Delete the events that `is_outdated` selects."""
        records = read_events(self.path, self.events_path.name)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records if not is_outdated(record)]
        if len(lines) < len(records):
            write_bytes(self.events_path, "".join(lines).encode("utf-8", "backslashreplace"))
            self._events.close()
            self._events = LineFile(self.events_path)

    def __reduce__(self) -> tuple[type[ReadOnlyRunDirectory], tuple[Path]]:
        return ReadOnlyRunDirectory, (self.path,)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Record how the run ended, then close it."""
        try:
            if isinstance(error, Interrupted):
                self.event("interrupted", signal=str(error))
            elif error is not None:
                self._write_log(f"{type(error).__name__}: {error}")
            endings = {type(None): "completed", Interrupted: "interrupted", Diverged: "diverged"}
            self.event("run_end", status=endings.get(type(error), "failed"))
        except UserError as failure:  # the disk is full; the error that ended the run matters more
            if error is None:
                raise
            show(f"warning: {failure}")
        finally:
            self.close()

    def close(self) -> None:
        """End the tracker, close both logs and release the lock."""
        try:
            if self._tracker is not None:
                self._tracker.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            remedy = f"python {SCRIPT_NAME} track {self.path} --help says how to record all of it again"
            with contextlib.suppress(UserError):  # the disk is full, which has been reported
                self.log(f"warning: the tracker had not finished after {CLOSE_SECONDS} s and was ended; {remedy}")
        finally:
            if self._tracker is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._tracker.pid, signal.SIGKILL)
                self._tracker.wait()
            self._events.close()
            self._log.close()
            self._lock.release()

    def start_tracker(self, *flags: str) -> None:
        """Start tools/track.py, which follows metrics.jsonl; the run waits for it only in `close`."""
        # In a new session the tracker receives neither Ctrl-C nor a scheduler's signal to the job.
        detached = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        try:
            command = [sys.executable, str(find_tool("track")), str(self.path), "--pid", str(os.getpid()), *flags]
            with open(self.path / "track.log", "ab") as log:
                self._tracker = subprocess.Popen(command, stdout=log, env=tool_environment(), **detached)
        except (UserError, OSError) as error:
            self.log(f"warning: the run is not tracked: {error}")
        else:
            self.log(f"tracked by process {self._tracker.pid}; what it has to say is in {self.path / 'track.log'}")


def create_out_dir(path: Path, flag: str = "--out_dir") -> None:
    """Create out_dir. Raises UserError if that fails, which permission bits do not reliably predict."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be created: {error.strerror}", f"{flag} {path}", "choose another") from error


def show(text: str) -> None:
    """Print a line above the progress bars, on rank 0 only; a closed terminal ends the printing but not the run."""
    if get_rank():
        return
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # else the text still buffered raises again when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_events(out_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl; skip damaged lines."""
    return read_records(out_dir / name, {"event": str})


def read_records(path: Path, form: Any) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file that match `form`; skip damaged lines and epochs that are no integer."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = load_json(line)
            check_form(record, form)
            check_form(record.get("epoch", 0), int)
            records.append(record)
    return records


def move_aside(path: Path, flag: str = "--out_dir") -> Path:
    """Rename the folder of an old run to `<name>.old-<date>`, and return the new path.

    Raises UserError if it is in use, or cannot be renamed, as a mount point cannot.
    """
    refuse_if_in_use(path, flag)
    try:
        return path.rename(name_aside(path, "old"))
    except OSError as error:
        raise UserError(
            f"cannot be moved aside: {error.strerror}", f"{flag} {path}", "choose another folder"
        ) from error


def refuse_if_in_use(path: Path, flag: str = "--out_dir") -> None:
    """Raise UserError if another process works in a folder; write nothing, so that this can run early."""
    if (path / ".lock").exists():
        lock_directory(path, flag, is_probe=True).lock.release()


def lock_directory(path: Path, flag: str = "--out_dir", is_probe: bool = False) -> filelock.AcquireReturnProxy:
    """Create a folder if need be and take its lock; a with-block, `.lock.release()` or the end of this process releases it.

    With `is_probe`, the folder need not be writable and no holder is recorded; the caller releases at once. Raises UserError, which
    names the present holder.
    """
    create_out_dir(path, flag)
    lock = filelock.FileLock(path / ".lock", thread_local=False)  # another thread may release it
    holder_path = path / ".lock_holder"
    where = f"{flag} {path}"
    holder = ""
    if not is_probe and not os.access(path, os.W_OK | os.X_OK):
        raise UserError("cannot be written to", where, "make it writable, or work with a copy of it")
    try:
        proxy = lock.acquire(timeout=0)
    except filelock.Timeout:
        with contextlib.suppress(OSError):
            holder = printable(holder_path.read_text(encoding="utf-8", errors="replace"))
        remedy = "wait for it, stop it, or choose another folder"
        raise UserError(f"is in use by {holder or 'another process'}", where, remedy) from None
    except (OSError, NotImplementedError) as error:
        remedy = "choose a folder of your own, on a file system that has locks"
        raise UserError(f"cannot be locked: {getattr(error, 'strerror', None) or error}", where, remedy) from error
    with contextlib.suppress(OSError):  # e.g. the disk is full: the lock holds without a name in it
        if not is_probe:
            holder_path.write_text(f"process {os.getpid()} on {os.uname().nodename}", encoding="utf-8")
    return proxy


def name_aside(path: Path, reason: str) -> Path:
    """Return an unused path `<name>.<reason>-<date>` beside `path`."""
    target = path.with_name(f"{path.name}.{reason}-{time.strftime('%Y%m%d-%H%M%S')}")
    while target.exists():
        target = target.with_name(target.name + "_")
    return target


class ReadOnlyRunDirectory(RunDirectory):
    """The folder of a run on ranks other than 0, which write nothing; a pickled RunDirectory unpickles as this."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, *_: Any, **__: Any) -> None:
        """Do nothing: rank 0 runs the same call and writes."""

    event = forget_epochs_after = start_tracker = log


def run_tool(command: str, argv: Sequence[str]) -> None:
    """Run a tool and wait for it; pass a signal to stop on to it. Raises CalledProcessError if it fails, which it explains."""
    process = subprocess.Popen([sys.executable, str(find_tool(command)), *argv], env=tool_environment())
    try:
        code = process.wait()
    except Interrupted as interruption:
        process.send_signal(interruption.signal_number)
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code if code > 0 else 128 - code, f"tools/{command}.py")


def tool_environment() -> dict[str, str]:
    """Return the environment without torchrun's variables: a tool is not one of the ranks, even if this process is."""
    torchrun_names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in torchrun_names and not k.startswith("TORCHELASTIC_")}


class FileMemory:
    """A cache of facts about files: one table in `memory.sqlite` of a folder, (kind, path) -> (size, mtime_ns, value).

    A value is valid while its file has that size and mtime. Writers hold the lock of the folder. A table that is damaged, or that
    another program made, is deleted and started anew, which is safe: the files can be read again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / MEMORY_NAME
        self._pending: list[tuple[Any, ...]] = []
        self._is_damaged = False

    def recall(self, kind: str) -> dict[str, tuple[int, int, bytes]]:
        """Return (size, mtime in ns, value) by path; {} if there is no readable table."""
        query = "SELECT path, size, mtime_ns, value, checksum FROM files WHERE kind = ?"
        try:
            with self._open_table("rw") as table:  # not ro: opening rolls back what a killed process has half written
                rows = table.execute(query, (kind,)).fetchall()
        except sqlite3.Error as error:  # also if the file does not exist
            self._is_damaged = _is_damage(error)
            return {}
        return {
            path: (size, mtime_ns, value)
            for path, size, mtime_ns, value, checksum in rows
            if isinstance(value, bytes) and zlib.crc32(value) == checksum
        }

    def learn(self, kind: str, path: str, stamp: tuple[int, int], value: bytes) -> None:
        """Queue a value for the next `save`; `stamp` is (size, mtime in ns)."""
        self._pending.append((kind, path, *stamp, value, zlib.crc32(value)))

    def save(self) -> None:
        """Write the queued values in one transaction. The caller holds the lock of the folder. Raises UserError."""
        columns = "kind TEXT, path TEXT, size INTEGER, mtime_ns INTEGER, value BLOB, checksum INTEGER"
        create = f"CREATE TABLE IF NOT EXISTS files ({columns}, PRIMARY KEY (kind, path)) WITHOUT ROWID"
        if not self._pending:
            return
        with SIGNALS.hold():
            for is_last_try in (False, True):
                try:
                    if self._is_damaged:
                        self.path.unlink(missing_ok=True)
                        self.path.with_name(f"{MEMORY_NAME}-journal").unlink(missing_ok=True)
                        self._is_damaged = False
                    with self._open_table("rwc") as table:
                        table.execute(create)
                        table.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", self._pending)
                    break
                except (sqlite3.Error, OSError) as error:
                    self._is_damaged = _is_damage(error)
                    if is_last_try or not self._is_damaged:
                        raise write_error(self.path, OSError(str(error)), 0) from error
            self._pending = []

    def save_early(self) -> None:
        """Save at once, also before the run has opened the folder; do nothing if it is in use or cannot be written."""
        with contextlib.suppress(UserError), lock_directory(self.folder):
            self.save()

    @contextlib.contextmanager
    def _open_table(self, mode: str) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction, so that no fork and no other thread inherits a connection."""
        address = f"{self.path.absolute().as_uri()}?mode={mode}"
        with contextlib.closing(sqlite3.connect(address, timeout=60, uri=True)) as table, table:
            yield table


def _is_damage(error: Exception) -> bool:
    """Whether a table must be started anew: it is damaged, no database, or has other columns; a full disk is no damage."""
    damage = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    code = getattr(error, "sqlite_errorcode", None)  # None e.g. for a path that is not UTF-8
    return isinstance(error, sqlite3.Error) and (code is None or code & 0xFF in damage)


# ======================================================================================================================
# 04  RUNTIME
# ======================================================================================================================
# Owns device, precision and seeds. A run uses one device, DataParallel, or the ranks that torchrun starts: each rank runs the same
# program on its part of each batch, and rank 0 writes. Raises UserError for devices that this machine lacks.
# Models with larger activations: DINOv3 does not support fp16 (facebookresearch/dinov3, issue 181); EVA's blocks are similar.
FP16_OVERFLOWS = ("dinov3", "eva")
OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|can(not|'t) allocate memory", re.IGNORECASE)


def start_processes() -> dist.Store | None:
    """Join the other ranks that torchrun has started. Return the store that all of them share, None without torchrun."""
    if not dist.is_torchelastic_launched():
        return None
    # Default handlers end the process at once: nothing is lost yet, and a Python handler would run only after the rendezvous.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(agree_on_prefix(store, rank, world_size), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # No effective timeout: rank 0 may work alone for long, and when a rank ends, those waiting for it notice at once.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(days=365))
    return store


def agree_on_prefix(store: dist.Store, rank: int, world_size: int) -> str:
    """Return a random key prefix that only the ranks of this start know.

    After a restart the store of torchrun still holds the addresses of dead ranks, to which gloo would connect: torch 2.14 does not
    give each start a new prefix, and machines may count restarts differently.
    """
    if rank:
        token = os.urandom(8).hex()
        store.set(f"asks/{rank}", token)
        prefix = store.get(f"answers/{token}").decode()  # blocks; only a live rank 0 answers a new token
        store.set(f"{prefix}/{rank}", "known")
        return prefix
    prefix, waiting = os.urandom(8).hex(), set(range(1, world_size))
    while waiting:
        for other_rank in waiting:
            if store.check([f"asks/{other_rank}"]):
                store.set(f"answers/{store.get(f'asks/{other_rank}').decode()}", prefix)
        waiting = {other_rank for other_rank in waiting if not store.check([f"{prefix}/{other_rank}"])}
        time.sleep(0.02)
    return prefix


def agree_on_failure(store: dist.Store | None, code: int) -> tuple[int, bool]:
    """Return the exit code of the rank that failed first, and whether this is that rank, which alone prints the reason.

    A rank reports its failure before it closes its sockets, because closing them makes the other ranks fail too.
    """
    if store is None:
        return code, True
    SIGNALS.catch(is_first=False)  # torchrun may already be ending this process because of another one
    first = f"{get_rank()} {code}"
    with contextlib.suppress(RuntimeError):  # torchrun has ended, and its store with it
        first = store.compare_set("failed", "", first).decode()
    rank, code = map(int, first.split())
    return code, rank == get_rank()


def from_first(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on rank 0 only, and return its result on every rank."""
    return broadcast(function(*args) if get_rank() == 0 else None)


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def gather_batch(batch: Batch) -> Batch:
    """Return a training batch with this rank's images, the labels and failures of all ranks, and each rank's number of images."""
    if not dist.is_initialized():
        return batch
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, (batch.labels, batch.failures, tuple(batch.images.shape[1:]), SIGNALS.asked))
    labels, failures, shapes, signals = zip(*gathered, strict=True)
    SIGNALS.receive_any(signals)
    images = batch.images if len(batch.labels) else batch.images.new_zeros(0, *max(shapes))
    failures = list(itertools.chain(*failures))
    return batch._replace(images=images, labels=torch.cat(labels), failures=failures, sizes=tuple(map(len, labels)))


def gather_rows(rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the rows (B, ...) of all ranks, each of which passes `sizes[rank]` rows; return `rows` if `sizes` is empty.

    Every rank computes the same loss from all rows, and so has the gradient of the rows it passed without exchanging gradients. It
    is multiplied by the world size here, because DistributedDataParallel divides the sum of gradients by that.
    """
    if not sizes:
        return rows
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    gathered[get_rank()] = rows
    if rows.requires_grad:
        rows.register_hook(lambda gradient: gradient * len(sizes))
    return torch.cat([rank_rows[:size] for rank_rows, size in zip(gathered, sizes, strict=True)])


def gather_answers(answer: Any) -> list[Any]:
    """Return the answers of all ranks on rank 0, and [] on the others. An answer of None is left out."""
    if not dist.is_initialized():
        return [answer]
    answers: list[Any] | None = None if get_rank() else [None] * get_world_size()
    dist.gather_object((answer, SIGNALS.asked), answers, 0)
    if answers is None:
        return []
    SIGNALS.receive_any([signal_number for _, signal_number in answers])
    return [answer for answer, _ in answers if answer is not None]


class FrozenDataParallel(nn.DataParallel):
    """DataParallel that copies a backbone to the GPUs once and not for every batch, because its weights do not change."""

    def replicate(self, module: Backbone, device_ids: Sequence[int]) -> list[Backbone]:
        """Return the copies for the first `len(device_ids)` GPUs."""
        if not module.replicas:
            with torch.inference_mode(False), torch.no_grad():
                module.replicas = super().replicate(module, self.device_ids)
        return module.replicas[: len(device_ids)]


@dataclass(frozen=True)
class Runtime:
    """Device and precision of a run."""

    device: torch.device
    num_gpus: int  # used by this process; 0 = CPU
    dtype: torch.dtype  # of the backbone in training; float32 = no autocast
    # For embedding references, val, test and all later queries: by default float32, as in exported files. References in bf16 have a
    # mean cosine of .999 (groceries; lowest .986) and .995 (hand tools; lowest .985) with those of an exported file, and one answer
    # in 90 or in 32 differs.
    inference_dtype: torch.dtype = torch.float32
    deterministic: bool = False

    def wrap(self, backbone: Backbone, is_trained: bool = False) -> nn.Module:
        """Return the backbone, wrapped in DataParallel for several GPUs, or in DDP if it is trained on several ranks.

        The layers after it see whole batches; those of several ranks come from `gather_rows`.
        """
        if self.num_gpus > 1:
            return (FrozenDataParallel if backbone.frozen else nn.DataParallel)(backbone, list(range(self.num_gpus)))
        if not dist.is_initialized() or backbone.frozen or not is_trained:
            return backbone
        return nn.parallel.DistributedDataParallel(backbone, [self.device] if self.num_gpus else None)

    def sync_batchnorm(self, backbone: Backbone) -> None:
        """Convert a trained backbone's BatchNorm to SyncBatchNorm on several ranks, so that it normalises over whole batches.

        Raises UserError for several GPUs in one process and for several ranks on CPUs, neither of which SyncBatchNorm supports.
        """
        if backbone.freezes_batchnorm or not any(map(is_batchnorm, backbone.modules())):
            return
        if self.num_gpus > 1:
            remedy = f"use torchrun --nproc_per_node {self.num_gpus} {SCRIPT_NAME} ... without --gpus"
            raise UserError("the backbone has BatchNorm, which needs whole batches", f"--gpus {self.num_gpus}", remedy)
        if get_world_size() > 1 and not self.num_gpus:
            problem = "the backbone has BatchNorm, whose statistics processes share on GPUs only"
            raise UserError(problem, f"{get_world_size()} processes on CPUs", "start one process, without torchrun")
        if get_world_size() > 1:
            from timm.layers import convert_sync_batchnorm

            convert_sync_batchnorm(backbone)

    def make_scaler(self) -> torch.amp.GradScaler:
        """Return the gradient scaler, a no-op unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def describe(self) -> str:
        """Return devices, dtypes and number of processes as one phrase for the log."""
        name = torch.cuda.get_device_name(0) if self.num_gpus else f"CPU, {torch.get_num_threads()} threads"
        types = ", answers in ".join(dict.fromkeys(map(name_dtype, (self.dtype, self.inference_dtype))))
        notes = ", no TF32" if self.num_gpus else ""
        notes += ", deterministic" if self.deterministic else ""
        notes += f", one of {get_world_size()} processes" if get_world_size() > 1 else ""
        return f"{self.num_gpus or 1} x {name}, {types}{notes}"


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm layer."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype, e.g. float32."""
    return str(dtype).removeprefix("torch.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, of a GPU or of the computer; torch raises RuntimeError for both."""
    is_torchs = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    return is_torchs or isinstance(error, MemoryError)


def training_runtime(config: Config) -> Runtime:
    """Return the runtime of training, whose automatic precision also depends on the model and the CPU."""
    runtime = make_runtime(config.gpus, config.precision, config.deterministic)
    if config.precision != "auto":
        return runtime
    if runtime.dtype == torch.float16 and any(family in config.model_id.lower() for family in FP16_OVERFLOWS):
        return dataclasses.replace(runtime, dtype=torch.float32)
    # A frozen backbone has no gradients that bf16 could spoil. On a CPU that multiplies faster in bf16, it embeds 1.5 to 1.9 times
    # as many images/s, with accuracy within the noise of seeds (tests/benchmarks/quality.py).
    if not (config.trains_backbone or runtime.num_gpus) and cpu_multiplies_bf16():
        return dataclasses.replace(runtime, dtype=torch.bfloat16)
    return runtime


def make_runtime(gpus: int | None, precision: str, deterministic: bool = False) -> Runtime:
    """Choose device and precision; `gpus` None means one GPU if there is one. Raises UserError for what this machine lacks."""
    available = torch.cuda.device_count()
    num_gpus = min(available, 1) if gpus is None else gpus
    where = f"--gpus {num_gpus}"
    if dist.is_initialized() and num_gpus > 1:
        raise UserError("torchrun gives each process one GPU", where, "leave --gpus out, or give 0 for the CPU")
    if num_gpus > available:
        raise UserError(f"this machine has {available}", where, "give fewer; --gpus 0 is the CPU")
    if precision == "fp16" and not num_gpus:
        raise UserError("the CPU has no fp16 training", "--precision fp16", "use fp32 or bf16")
    has_bf16 = bool(num_gpus) and torch.cuda.is_bf16_supported(including_emulation=False)
    auto_dtype = torch.bfloat16 if has_bf16 else torch.float16 if num_gpus else torch.float32
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": auto_dtype}
    if deterministic:  # cuBLAS reads it at its first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # float32 keeps its 24 bits, in the head and in a backbone that is not rounded: by default torch gives convolutions the 11 bits
    # of TF32, which moves cosines by 1.4e-4.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # The same bits each time. An operation without a deterministic variant only warns, by name: such a run is better than none.
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call takes 2 s to import modules
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    device = torch.device("cuda" if num_gpus else "cpu")
    if dist.is_initialized() and num_gpus:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= available:
            where = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
            raise UserError(f"{os.uname().nodename} has {available} GPUs", where, "start one process a GPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dtype = dtypes[precision]
    return Runtime(device, num_gpus, dtype, torch.float32 if precision == "auto" else dtype, deterministic)


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies matrices faster in bf16 than in fp32: with AMX, or with AVX512-BF16 on a CPU that is not Intel's.

    On Intel without AMX, as in some virtual machines, AVX512-BF16 takes 1.6 times as long as fp32 (ViT-S on Emerald Rapids). The
    answer is a property of the machine and not a timing, so that a run can be repeated on it.
    """
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        return torch.cpu._is_amx_tile_supported()
    return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next batch instead of returning it to the system and faulting it in again.

    By default activations of a few MB are allocated with mmap, and a small model on the CPU spends half of its time on page faults:
    mobilenetv2_035 at 160 px embeds 3 times as many images/s with this (tests/benchmarks/cpu.py).
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to the device, from pinned memory, so that the copy does not wait for work queued on the device."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


def count_cores() -> int:
    """Return the number of cores that this process may use: by its affinity, and by the quota of its container."""
    import joblib

    return joblib.cpu_count()


def seed_torch(*entropy: int, rank: int = 0) -> None:
    """Seed torch's generators with a hash of `entropy`, so that (seed 1, epoch 2) and (seed 2, epoch 1) differ.

    With `rank`, each rank draws different dropout; the GPUs of one process always do. A GPU that is not in use yet is not seeded.
    """

    def derive(device: int) -> int:
        stream = (rank, device) if rank or device else ()
        # 63 bits: not needed by torch, but kept so that runs repeat
        return int(np.random.SeedSequence(entropy, spawn_key=stream).generate_state(1, np.uint64)[0]) >> 1

    torch.default_generator.manual_seed(derive(0))  # torch.manual_seed takes up to 0.5 ms: it formats the call stack
    if torch.cuda.is_initialized():
        first = torch.cuda.current_device()  # of this rank, or the first of this process
        for device in range(1 if dist.is_initialized() else torch.cuda.device_count()):
            torch.cuda.default_generators[first + device].manual_seed(derive(device))


PROGRESS_SECONDS = 20  # between lines of progress in a log; with items of up to 10 s there is one at least every 30 s
SHORT_SECONDS = 2  # shorter work gets no line


class ProgressLog:
    """The file that progress bars write to; prints one line to stderr every PROGRESS_SECONDS, for the bar that writes then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def write(self, text: str) -> None:
        """Print the state of a bar if a line is due."""
        line = " ".join(text.split())  # a bar that moves or closes writes blanks
        if line and sys.stderr is not None and time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            with contextlib.suppress(OSError):  # the reader of the log may be gone; the run goes on
                print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: each line is flushed."""


PROGRESS_LOG = ProgressLog()
LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} to go, {rate_fmt}"


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun in singular or plural: 1 image, 2,000 images, 3 classes."""
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def progress(iterable: Iterable, total: int, label: str, unit: str = "batch") -> tqdm:
    """Return a progress bar, shown on rank 0 only; it prints lines if stderr is no terminal."""
    options: dict[str, Any] = {"dynamic_ncols": True}
    if sys.stderr is None or not sys.stderr.isatty():
        options = dict(file=PROGRESS_LOG, bar_format=LINE_FORMAT, mininterval=1, miniters=1, delay=SHORT_SECONDS)
    return tqdm(iterable, total=total, desc=label, unit=unit, leave=False, disable=get_rank() > 0, **options)


# ======================================================================================================================
# 05  DATASET SCAN
# ======================================================================================================================
# Lists, decodes and checks the images, merges classes, groups related images and assigns splits. data_root is only read.
# Raises UserError for unusable data; a bad image is quarantined with path and reason. Deep images have more than 8 bits a channel.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # Pillow tries 40 decoders otherwise, Ghostscript among them
IMAGE_ENTRY = "."  # results of `entry_type`
FOLDER_ENTRY = "/"
MASKS_ENTRY = "masks/"
# Noun and place of entries that a listing passes over, beside files of other types.
IGNORED_PLACES = {
    FOLDER_ENTRY: ("folder", "inside class folders"),
    IMAGE_ENTRY: ("image", "beside the class folders"),
    MASKS_ENTRY: ("folder", "of masks"),
}
MAX_TABLE_CLASSES = 100  # in the log; data_report.json has all
CROP_FILES = ("crops.jsonl", "problems.json")  # tools/crop.py writes them beside the class folders
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a header that claims more is refused before anything is decoded
CAMERA_BITS = (8, 10, 12, 14, 16)  # bit depths that an image stored in 16 bits may really use
JPEG2000_TAGS = (34712, 33003, 33005)  # values of the TIFF tag Compression (259)
STRIP_PIXELS = 4_000_000  # an image is converted in strips of at most this size
BIG_PIXELS = 16_000_000  # images with more pixels are checked one at a time
TINY_SIDE = 16  # px; a crop with a shorter side is used but named in the report
PADDING_GRAY = 114  # letterbox colour of YOLO; also shows through transparent pixels
SPLIT_NAMES = ("train", "val", "test")
# Folder names that --splits from_folders takes for splits, in lower case.
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_FOLDERS |= dict.fromkeys(("val", "valid", "validation"), "val")
LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in gray: ITU-R BT.601, as in Pillow and cv2
THUMB_SIDE = 8  # px of the colour thumbnail that confirms a near-duplicate
THUMB_TOLERANCE = 6.0  # mean absolute difference of 8-bit values; re-encoded JPEGs stay below 3
# Folder names that suggest images of no class.
UNKNOWN_NAMES = tuple("unknown other others background none misc negative negatives".split())
SCAN_SAVE_SECONDS = 300  # time between saves during a long scan
NO_CLASS = ("null", "~", "")  # spellings of null in YAML
STRINGS = np.dtypes.StringDType()  # a list of a million str costs each forked worker 200 MB, an array of these nothing
CLASS_MAP_EXAMPLE = "write lines such as  pliers: [needle_nose_pliers, cutting_pliers]  and  null: [to_leave_out]"


@dataclass(frozen=True)
class Records:
    """The usable images of a data set, ordered by class and path: record i is `paths[i]` with `labels[i]`."""

    root: Path
    class_names: tuple[str, ...]
    paths: np.ndarray  # (N,) STRINGS, relative to root, with '/'
    labels: np.ndarray  # (N,) int32 into class_names
    groups: np.ndarray  # (N,) int32: images of one group never straddle splits
    splits: np.ndarray  # (N,) int8 into SPLIT_NAMES
    masks_dirname: str = "masks"
    image_bits: tuple[int, ...] = ()  # from `find_image_bits`
    # Mask or cutout of each record, or the crop itself if its alpha is the mask; relative to root or absolute; '' without a mask.
    masks: np.ndarray | None = None  # (N,) STRINGS; None = not looked for
    digests: np.ndarray | None = None  # (N, 2) uint64, of the contents of image and mask; 0 = gone, or no mask

    @property
    def fingerprint(self) -> str:
        """Hash of the paths and contents of the images."""
        return fingerprint(list(self.paths), self.digests[:, 0])

    @property
    def masks_hash(self) -> str:
        """Hash of the names and contents of the masks; '' without masks."""
        rows = np.flatnonzero(self.has_mask).tolist()
        return fingerprint({self.masks[row]: self.digests[row, 1] for row in rows}) if rows else ""

    @property
    def has_mask(self) -> np.ndarray:
        """Whether each record has a usable mask, bool (N,)."""
        return np.zeros(len(self.paths), dtype=bool) if self.masks is None else self.masks != ""

    def mask_of(self, row: int, view: int) -> str:
        """Return the mask path of a record for a view, an index into VIEW_NAMES; '' for the bbox view or without a mask."""
        return self.masks[row] if view and self.masks is not None else ""

    def rows(self, split: str) -> np.ndarray:
        """Return the record numbers of a split, ascending, int64 (n,)."""
        return np.flatnonzero(self.splits == SPLIT_NAMES.index(split))


@dataclass(frozen=True)
class Scan:
    """The result of a scan: the records to train on, what the check of their files found, and the content of data_report.json."""

    records: Records
    report: dict[str, Any]
    listing: Listing
    crops: np.ndarray  # (N,) IMAGE_DTYPE, of each record
    memory: FileMemory  # of out_dir; `save` writes the results of the scan


def scan_dataset(config: Config, splits_path: Path | None = None, squares: SquareFile | None = None) -> Scan:
    """List, check, merge, group and split the data. Reads data_root and the memory of out_dir, writes only to `squares`.

    Masks are left to `attach_masks`. `splits_path` is the splits.json of a continued run; `squares` gets the decoded images if it
    has room for all of them. Raises UserError if no image can be used.
    """
    listing, class_of, excluded = _choose_images(config)
    memory = FileMemory(config.out_dir)
    if squares is not None and 3 * squares.side**2 * len(listing.paths) > squares.room:
        squares = None
    check = functools.partial(check_image, squares=squares)
    rows, reasons = check_files(config.data_root, listing.paths, "image", IMAGE_DTYPE, check, memory)
    image_bits = config.image_bits or find_image_bits(rows["highest"])
    deep = np.flatnonzero(rows["highest"])  # which is 0 for images of 8 bits
    if len(deep):  # checked again, now that the bit depth is known
        paths = [listing.paths[index] for index in deep]
        name = f"{'/'.join(map(str, image_bits))}-bit image"
        check = functools.partial(check, bits=image_bits)
        rows[deep], deep_reasons = check_files(config.data_root, paths, name, IMAGE_DTYPE, check, memory)
        reasons |= deep_reasons
    usable = np.flatnonzero(~rows["broken"])
    if not len(usable):
        path, reason = next(iter(reasons.items()))
        problem = f"none of {count_of(len(listing.paths), 'image')} can be read (the first: {path}: {reason})"
        raise UserError(problem, config.describe("data_root"), "check that the files are whole")
    names = tuple(sorted({name for name in class_of.values() if name is not None}))
    label_of_class = {name: index for index, name in enumerate(names)}
    label_of = {path: label_of_class[class_of[listing.class_of(path)]] for path in listing.paths}
    order = sorted(usable, key=lambda i: (label_of[listing.paths[i]], listing.paths[i]))
    paths = [listing.paths[i] for i in order]
    labels = np.array([label_of[path] for path in paths], dtype=np.int32)
    crops = rows[order]
    near_pairs = find_near_duplicates(crops["phash"], crops["thumb"], config.near_dup_bits)
    duplicates = {"exact": chain_equal(crops["digest"]), "near": near_pairs}  # exact: the same bytes
    edges = np.concatenate([chain_equal(group_keys(paths, config.group_regex)), *duplicates.values()])
    groups = find_components(len(paths), edges)
    splits = choose_splits(paths, labels, groups, config)
    table = np.array(paths, dtype=STRINGS)
    digests = np.stack((crops["digest"], np.zeros_like(crops["digest"])), axis=1)
    records = Records(
        config.data_root, names, table, labels, groups, splits, config.masks_dirname, image_bits, None, digests
    )
    used = take_fraction(records, config.data_fraction, config.seed, splits_path)
    folders_are_splits, own_groups = config.splits == "from_folders", np.arange(len(used.paths))
    # Val and test images that share a group with a training image, in the folders' splits or if groups were ignored.
    is_fixed = folders_are_splits or not len(used.paths)  # a continued run may find none of its images
    naive_splits = used.splits if is_fixed else choose_splits(list(used.paths), used.labels, own_groups, config)
    num_leaks = int(np.isin(used.groups[naive_splits != 0], used.groups[naive_splits == 0]).sum())
    report = {
        "data_root": config.data_root.resolve(),
        "num_images": len(listing.paths) + sum(path.lower().endswith(IMAGE_SUFFIXES) for path, _ in listing.problems),
        "num_usable": len(paths),
        "num_used": len(used.paths),
        "num_groups": len(np.unique(used.groups)),
        "excluded": dict(excluded),
        "class_map": {folder: name for folder, name in class_of.items() if folder != name},
        "image_bits": image_bits,
        "splits": config.splits,
        **describe_health(listing, rows, reasons, class_of, config.splits),
        **describe_duplicates(records, duplicates),
        "leaks_prevented": 0 if folders_are_splits else num_leaks,
    }
    if folders_are_splits and not any(SPLIT_FOLDERS[path.split("/", 1)[0].lower()] == "val" for path in paths):
        report["warnings"].append("no folder val, valid or validation has images: val is drawn from train")
    if folders_are_splits and num_leaks:
        some = f"{num_leaks} val and test images, as the folders have them"
        report["warnings"].append(f"{some}, are duplicates of training images or of their group: figures flatter")
    report["warnings"] += [f"--exclude {glob} matches no file" for glob, count in excluded.items() if not count]
    if len(deep) and image_bits != (16,):
        report["warnings"].append(describe_image_bits(len(deep), image_bits) + " (--image_bits)")
    unusable = (*dict(listing.problems), *reasons)
    broken = Counter(class_of.get(listing.class_of(path)) for path in unusable)
    report["classes"], notes = count_classes(used, broken, config)
    report["warnings"] += notes
    chosen = set(used.paths)
    used_crops = crops[[path in chosen for path in paths]]
    return Scan(used, report, listing, used_crops, memory)


def _choose_images(config: Config) -> tuple[Listing, dict[str, str | None], Counter[str]]:
    """Return the listing without excluded images, the class map, and the number of files per --exclude glob. Raises UserError."""
    where = config.describe("data_root")
    try:
        listing = list_images(config.data_root, config.masks_dirname, config.splits)
    except OSError as error:
        raise UserError(error.strerror, where, "check the permissions") from error
    folders = set(listing.classes.values())
    has_images = (config.splits == "random" and listing.ignored[IMAGE_ENTRY] > 0) or "cropped" in folders
    if has_images and folders <= {"cropped", config.masks_dirname, CUTOUTS_DIRNAME}:
        root = config.data_root.resolve()
        parent = root.parent.parent if root.name == "cropped" else root.parent
        remedy = f"give its parent, {parent}, if it is one\n{DATA_TREE}"
        raise UserError("holds no class folders, and looks like one itself", where, remedy)
    if not folders:
        problem = "no train/ and val/ with class folders" if config.splits == "from_folders" else "no class folders"
        raise UserError(f"holds {problem}", where, DATA_TREE)
    class_of = read_class_map(config.class_map, sorted(folders))
    used, problems, excluded, matched = [], [], [], Counter({glob: 0 for glob in config.exclude})
    is_dropped = {}  # class folder -> whether globs such as `rulers/*` exclude all of it
    for path, reason in (*((path, "") for path in listing.paths), *listing.problems):
        folder, name = listing.class_of(path), path.rsplit("/", 1)[-1]
        hits = [glob for glob in config.exclude if any(fnmatch.fnmatchcase(text, glob) for text in (path, name))]
        matched.update(hits)
        is_dropped[folder] = is_dropped.get(folder, True) and any("/" in glob for glob in hits)
        if hits or class_of.get(folder, "") is None:
            excluded.append(path)
        elif reason:
            problems.append((path, reason))
        else:
            used.append(path)
    if excluded and not used:
        raise UserError(f"leave none of {len(excluded)} images", "--class_map, --exclude", "leave out less")
    if not used and problems:
        path, reason = problems[0]
        problem = f"holds no usable images (the first: {path}: {reason})"
        raise UserError(problem, where, "check names and permissions of its files and folders")
    if not used:
        ignored = f", only {describe_ignored(listing.ignored)}" if listing.ignored else ""
        split_folders = {name.lower() for name in folders} & SPLIT_FOLDERS.keys()
        are_splits = split_folders and listing.ignored[FOLDER_ENTRY]
        hint = "are train, val and test folders of class folders? give --splits from_folders to train on them, else one of them"
        raise UserError(f"holds no images{ignored}", where, hint if are_splits else DATA_TREE)
    class_of |= {folder: None for folder, dropped in is_dropped.items() if dropped and folder}
    listing = dataclasses.replace(listing, paths=used, problems=problems, excluded=excluded)
    return listing, class_of, matched


def read_class_map(path: Path | None, folders: Sequence[str]) -> dict[str, str | None]:
    """Return the class name of every folder; None leaves the folder out.

    The YAML file has lines `new name: [old names]` and `null: [names to leave out]`; lines are read as `old name: new name` if
    only that makes sense. Raises UserError for another structure, an unknown folder, or a folder that is named twice.
    """
    class_of: dict[str, str | None] = {folder: folder for folder in folders}
    if path is None:
        return class_of
    where = f"--class_map {path}"
    try:  # plain strings: a class may be called no or 010
        tree = load_yaml(read_text(path, where), is_plain=True)
    except ValueError as error:
        raise UserError(f"is no valid YAML: {error}", where, CLASS_MAP_EXAMPLE) from error
    entries: dict[str | None, list[str]] = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        items = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(name, str) for name in (key, *items)):
            raise UserError("holds something other than lists of names", where, CLASS_MAP_EXAMPLE)
        new_name, *old_names = (unicodedata.normalize("NFC", name).rstrip("/") for name in (key, *items))
        new_name = None if new_name in NO_CLASS else new_name
        if new_name in entries:
            raise UserError(f"has two lists for {new_name or 'null'}", where, CLASS_MAP_EXAMPLE)
        entries[new_name] = old_names
    if not entries:
        raise UserError("holds no mapping", where, CLASS_MAP_EXAMPLE)
    pairs = [(new, old) for new, old_names in entries.items() for old in old_names]
    is_one_to_one = all(len(old_names) == 1 for old_names in entries.values())
    if is_one_to_one and "0" not in class_of and list(entries) == list(map(str, range(len(entries)))):
        raise UserError("lists numbers and names of classes, which number themselves", where, "leave --class_map out")
    if is_one_to_one and all(new in class_of for new in entries) and any(old not in class_of for _, old in pairs):
        pairs = [(None if new in NO_CLASS else new, old) for old, new in pairs]
    if odd := [new for new, _ in pairs if not _is_plain(new or "")]:
        problem = f"gives a class the name {printable(odd[0])}, with control characters"
        raise UserError(problem, where, "rename it")
    counts = Counter(old for _, old in pairs)
    if unknown := [name for name in counts if name not in class_of]:
        problem = f"names {unknown[0]}, and data_root has no such folder"
        existing = f"data_root has {', '.join(folders[:10])}{', ...' if len(folders) > 10 else ''}"
        raise UserError(problem, where, did_you_mean(unknown[0], folders, existing))
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"names {repeated[0]} twice", where, "give each folder to one class")
    return class_of | {old: new for new, old in pairs}


@dataclass
class Listing:
    """The files of the class folders, before any image is opened."""

    paths: list[str] = dataclasses.field(default_factory=list)  # relative to data_root, with '/'
    classes: dict[str, str] = dataclasses.field(default_factory=dict)  # folder, also an empty one -> class folder, NFC
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # path, reason
    excluded: list[str] = dataclasses.field(default_factory=list)  # paths that --exclude or --class_map dropped
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)  # by `entry_type`, also beside class folders

    def class_of(self, path: str) -> str:
        """Return the class folder of an image (also an excluded or problematic one) or of a folder of images; '' if it has none."""
        return self.classes.get(path.rpartition("/")[0]) or self.classes.get(path, "")

    def add_folder(self, root: Path, prefix: str) -> list[str]:
        """Add the files of a folder below root and return the names of its subfolders; `prefix` is '' or ends with '/'."""
        names, others = [], []
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    if entry.name[0] == ".":
                        continue
                    if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry_problem(entry):
                        names.append(entry.name)
                    else:
                        others.append(entry)
        except OSError as error:
            self.problems.append((prefix.rstrip("/"), f"the folder cannot be read: {error.strerror}"))
            return []
        names.sort()
        self.paths += [f"{prefix}{name}" for name in names]
        folders = []
        for entry in sorted(others, key=operator.attrgetter("name")):
            kind = entry_type(entry)
            if kind == FOLDER_ENTRY:
                folders.append(entry.name)
            elif kind == IMAGE_ENTRY:
                self.problems.append((f"{prefix}{entry.name}", entry_problem(entry)))
            else:
                self.ignored[kind] += 1
        return folders


def entry_problem(entry: os.DirEntry) -> str:
    """Return why an entry of a folder cannot be used as a file, or ''."""
    if not entry.name.isprintable() and not _is_plain(entry.name):
        return ODD_NAME
    try:
        return "" if entry.is_file() else "is not a regular file"
    except OSError as error:
        return error.strerror or "cannot be read"


def list_images(data_root: Path, masks_dirname: str = "masks", splits: str = "random") -> Listing:
    """List the images of every class folder or of its `cropped/`; odd names and entries that are no files become problems."""
    listing = Listing()
    folders: list[tuple[str, os.DirEntry]] = []  # prefix ('' or a split's folder with '/'), class folder
    for entry in visible_entries(data_root):
        if not is_folder(entry):
            if entry.name not in CROP_FILES:
                listing.ignored[entry_type(entry)] += 1
            continue
        if splits == "random":
            folders.append(("", entry))
            continue
        if entry.name.lower() not in SPLIT_FOLDERS:
            listing.problems.append((entry.name, "is a folder beside train, val and test, and passed over"))
            continue
        try:
            inside = visible_entries(Path(entry.path))
        except OSError as error:
            listing.problems.append((entry.name, f"the folder cannot be read: {error.strerror}"))
            continue
        folders += ((f"{entry.name}/", folder) for folder in inside if is_folder(folder))
        listing.ignored.update(entry_type(file) for file in inside if not is_folder(file))
    for split_prefix, folder in folders:
        prefix = f"{split_prefix}{folder.name}"
        if not _is_plain(folder.name):
            listing.problems.append((prefix, ODD_NAME))
            continue
        prefix += "/cropped" if is_folder(Path(folder.path, "cropped")) else ""
        listing.classes[prefix] = unicodedata.normalize("NFC", folder.name)
        if subfolders := {*listing.add_folder(data_root, f"{prefix}/")} - {masks_dirname, CUTOUTS_DIRNAME}:
            listing.ignored[FOLDER_ENTRY] += len(subfolders)
    return listing


def visible_entries(folder: Path) -> list[os.DirEntry]:
    """Return the entries of a folder, sorted by name, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if entry.name[0] != "."), key=operator.attrgetter("name"))


def entry_type(entry: os.DirEntry) -> str:
    """Return IMAGE_ENTRY for a name with an image suffix, FOLDER_ENTRY for another folder, else the suffix, or the name if none."""
    if entry.name.lower().endswith(IMAGE_SUFFIXES):
        return IMAGE_ENTRY
    return FOLDER_ENTRY if is_folder(entry) else Path(entry.name).suffix.lower() or entry.name


def is_folder(entry: os.DirEntry | Path) -> bool:
    """Whether an entry is a folder or a link to one; False for a circular link and for one into a folder without permission."""
    with contextlib.suppress(OSError):
        return entry.is_dir()
    return False


def class_folder(path: str, splits: str) -> str:
    """Return the class folder of an image, relative to data_root."""
    return "/".join(path.split("/")[: 2 if splits == "from_folders" else 1])


def list_image_tree(root: Path) -> Listing:
    """List the images below a folder without opening them; follows links to folders, but passes over hidden entries and masks."""
    tree, pending, seen = Listing(), [""], set()
    while pending:
        prefix = pending.pop()
        if (resolved := (root / prefix).resolve()) in seen:  # a link back to a folder already listed
            continue
        seen.add(resolved)
        num_before = len(tree.paths)
        folders = tree.add_folder(root, prefix)
        has_crops = "cropped" in folders or len(tree.paths) > num_before
        for name in folders:
            if has_crops and name in ("masks", CUTOUTS_DIRNAME):  # of the crops beside it
                tree.ignored[MASKS_ENTRY] += 1
            elif _is_plain(name):
                pending.append(f"{prefix}{name}/")
            else:
                tree.problems.append((f"{prefix}{name}", ODD_NAME))
    tree.paths.sort()
    tree.problems.sort()
    return tree


def _is_plain(name: str) -> bool:
    """Whether a name is free of undecodable bytes and control characters; odd spaces and emoji are fine."""
    return not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name)


# Results of checking one image; `FileMemory` keeps them for every file.
IMAGE_FIELDS = "width height mode orientation phash digest thumb broken highest".split()
IMAGE_TYPES = ("<i4", "<i4", "<U6", "u1", "<u8", "<u8", f"({THUMB_SIDE**2 * 3},)u1", "?", "<u4")
IMAGE_DTYPE = np.dtype({"names": IMAGE_FIELDS, "formats": IMAGE_TYPES})
BIG_IMAGE_LOCK = threading.Lock()
ODD_NAME = "its name is not UTF-8, or has control characters"


def check_image(
    root: Path, path: str, squares: SquareFile | None = None, bits: Sequence[int] = ()
) -> tuple[np.ndarray, str]:
    """Return an image's IMAGE_DTYPE row and why it is broken, or ''. `squares` gets the image, a deep one only with `bits`."""
    row = np.zeros((), dtype=IMAGE_DTYPE)
    try:
        data = read_file(root / path)
        row["digest"] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        with opened_image(data) as image:  # reads the header only
            is_big = image.width * image.height > BIG_PIXELS
        with BIG_IMAGE_LOCK if is_big else contextlib.nullcontext():  # takes up to 1 GB, so only one thread at a time
            pixels, row["mode"], row["orientation"] = decode_image(data, bits)
            with opened_image(data) as image:
                row["highest"] = highest_value(image, data)
            small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX), dtype=np.float32)
            if squares is not None and (bits or not row["highest"]):
                squares.keep_image(path, pixels)
    except ImageError as error:
        row["broken"] = True
        return row, str(error)
    row["height"], row["width"] = pixels.shape[:2]
    thumb = small.reshape(THUMB_SIDE, 32 // THUMB_SIDE, THUMB_SIDE, 32 // THUMB_SIDE, 3).mean(axis=(1, 3))
    row["thumb"] = np.rint(thumb).astype(np.uint8).ravel()
    # 64-bit pHash: which of the lowest frequencies exceed their median. imagehash takes five times as long: it resizes again.
    frequencies = scipy.fft.dctn(small @ np.array(LUMA, dtype=np.float32), norm="ortho")[:8, :8].ravel()
    is_high = frequencies > np.median(frequencies[1:])  # the first is the brightness
    row["phash"] = int.from_bytes(np.packbits(is_high).tobytes(), "big")
    return row, ""


def check_files(
    root: Path,
    paths: Sequence[str],
    name: str,
    dtype: np.dtype,
    check: Callable[[Path, str], tuple],
    memory: FileMemory,
) -> tuple[np.ndarray, dict[str, str]]:
    """Check every file in parallel, unless the memory knows it with the same size and mtime. Return rows (N,), reasons by path.

    `check(root, path)` returns a file's row of `dtype` and the reason why it is broken, or ''. `paths` are absolute or relative to
    `root`. The memory learns the results; a check that is interrupted or long also saves it.
    """
    kind = f"{name}/{dtype.itemsize} {printable(str(root.resolve()))}"
    known, stamps = memory.recall(kind), list(map(tuple, stat_files(root, paths).tolist()))
    values = []  # row and reason of each file as bytes; b"" until it is checked
    for path, stamp in zip(paths, stamps, strict=True):
        num_bytes, mtime_ns, value = known.get(path, (0, 0, b""))
        values.append(value if (num_bytes, mtime_ns) == stamp else b"")
    todo = [index for index, value in enumerate(values) if len(value) < dtype.itemsize]
    saved_at = time.monotonic()
    results = map_in_threads(lambda index: check(root, paths[index]), todo)
    with keep_memory(memory), progress(results, len(todo), f"checking {name}s", name) as bar:
        for index, (row, reason) in bar:
            values[index] = row.tobytes() + reason.encode("utf-8")
            if row["digest"]:  # it could be read: a permission changes neither size nor mtime
                memory.learn(kind, paths[index], stamps[index], values[index])
            if time.monotonic() - saved_at > SCAN_SAVE_SECONDS:
                memory.save_early()
                saved_at = time.monotonic()
    rows = np.frombuffer(bytearray().join(value[: dtype.itemsize] for value in values), dtype)  # writable
    pairs = zip(paths, values, strict=True)
    reasons = {path: value[dtype.itemsize :].decode("utf-8") for path, value in pairs if len(value) > dtype.itemsize}
    return rows, reasons


def stat_files(root: Path, paths: Sequence[str]) -> np.ndarray:
    """Return size in bytes and mtime in ns of each file, int64 (N, 2); zeros for a missing one, which opening will report."""
    stats: list[int] = []  # flat: one tuple per file would keep the garbage collector busy
    for path in paths:
        try:
            status = os.stat(path if path.startswith("/") else f"{root}/{path}")  # noqa: PTH116  a Path is slower
            stats += (status.st_size, status.st_mtime_ns)
        except OSError:
            stats += (0, 0)
    return np.array(stats, dtype=np.int64).reshape(-1, 2)


def map_in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (item, result) in order. Items are submitted in small chunks, so that Ctrl-C has little to wait for."""
    chunk_size = 32 * count_cores()
    pool = ThreadPoolExecutor(count_cores())
    try:
        for start in range(0, len(items), chunk_size):
            chunk = items[start : start + chunk_size]
            yield from zip(chunk, pool.map(function, chunk), strict=True)
    finally:
        pool.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)


@contextlib.contextmanager
def keep_memory(memory: FileMemory) -> Iterator[None]:
    """Save the memory if the block is interrupted."""
    try:
        yield
    except Interrupted:
        memory.save_early()
        raise


def highest_value(image: Image.Image, data: bytes) -> int:
    """Return the highest value of an opened deep image, 0 for any other image."""
    values = np.asarray(image) if image.mode.startswith("I") else read_deep_rgb(image, data)
    return 0 if values is None else int(values.max())


def find_image_bits(highest: np.ndarray) -> tuple[int, ...]:
    """Return how many bits the deep images (more than 8 bits a channel) really use: (bits,), or () if there are none.

    `highest` (n,) is the highest value of each image, 0 if it is not deep. (8, bits): all images below a quarter of the range stay
    below 256 and half of them reach 128, so they hold 8-bit values; the highest values of dark photos would scatter.
    """
    highest = highest[highest > 0]
    if not len(highest):
        return ()
    bits = fitting_bits(highest.max(), CAMERA_BITS)
    dark = highest[highest < 2 ** (bits - 2)]
    is_mixed = bits >= 12 and len(dark) > 0 and dark.max() < 256 and np.median(dark) >= 128
    return (8, bits) if is_mixed else (bits,)


def describe_image_bits(count: int, bits: Sequence[int]) -> str:
    """Return the note on `count` deep images."""
    subject = "1 image has" if count == 1 else f"{count:,} images have"
    return f"{subject} more than 8 bits a channel, of which {' or '.join(map(str, bits))} are used: scaled by that"


class ImageError(ValueError):
    """An image cannot be used; the message is the reason."""


def load_image(path: str | Path, bits: Sequence[int] = ()) -> np.ndarray:
    """Read an image file as upright RGB, uint8 (H, W, 3); `bits` as for `to_rgb`. Raises ImageError."""
    return decode_image(read_file(path), bits)[0]


def decode_image(data: bytes, bits: Sequence[int] = ()) -> tuple[np.ndarray, str, int]:
    """Decode an image file: return its upright pixels, uint8 (H, W, 3), Pillow mode and EXIF orientation. Raises ImageError."""
    with opened_image(data) as image:
        deep_values = read_deep_rgb(image, data) if bits else None  # before a PNG is decoded
        mode, orientation, pixels = image.mode, read_orientation(image), None
        if data.startswith(b"\xff\xd8") and mode in ("RGB", "L"):
            with contextlib.suppress(ValueError):  # then Pillow decodes it below, or reports the error
                pixels = simplejpeg.decode_jpeg(data, "RGB")  # the same pixels as Pillow's, in half the time
        turn = orientation  # still to be applied
        if pixels is None:
            image.load()  # turns a TIFF upright and drops its orientation
            turn = read_orientation(image)
            if deep_values is not None and deep_values.shape[:2] == (image.height, image.width):
                pixels = scale_to_bytes(deep_values, 255 / (2 ** fitting_bits(int(deep_values.max()), bits) - 1))
            else:
                pixels = to_rgb(image, bits)
    if turn in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels), mode, orientation if orientation in range(1, 9) else 1


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 if it has none or damaged EXIF, which Pillow then drops."""
    if image.format == "PNG":  # getexif would decode it, too
        image.load()
    with contextlib.suppress(SyntaxError):
        return image.getexif().get(0x0112, 1)
    return 1


@contextlib.contextmanager
def opened_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image from the bytes of its file; pixels are decoded at first use. Any error in the block becomes an ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} px is more than {MAX_PIXELS // 1_000_000} megapixels")
            yield image
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything from KeyError to struct.error on a damaged file
        is_unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = describe_tiff(data) or "is no JPEG, PNG, BMP, WebP or TIFF" if is_unknown else str(error)
        raise ImageError(printable(reason or type(error).__name__)[:200]) from error


def describe_tiff(data: bytes) -> str:
    """Return the reason why Pillow cannot read a TIFF; '' for another file type."""
    if data[:4] not in TiffImagePlugin.PREFIXES:
        return ""
    try:
        file = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if 43 in data[2:4] else 8))  # 43: BigTIFF
        file.seek(tags.next)
        tags.load(file)
        bands, bits, sample_format = tags.get(277, 1), tags.get(258, (1,))[0], tags.get(339, (1,))[0]
        compression = ", packed as JPEG 2000" if tags.get(259, 1) in JPEG2000_TAGS else ""
    except Exception as error:  # anything, like the decoders
        return f"is a damaged TIFF ({type(error).__name__})"
    number_type = {2: "signed ", 3: "floating-point "}.get(sample_format, "")
    return f"is a TIFF of {bands} bands of {bits}-bit {number_type}values{compression}: save it as RGB of 8 or 16 bits"


def read_deep_rgb(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Return the values of an opened, not yet decoded image with 16-bit colours, uint16 (H, W, 3); None for any other image."""
    if image.mode != "RGB" or not any(";16" in str(tile[3]) for tile in image.tile):
        return None
    # Pillow drops the lower 8 bits, which hold most of a 10- or 12-bit value.
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # ignores EXIF, but turns a TIFF upright
    return pixels[:, :, ::-1] if pixels is not None and pixels.dtype == np.uint16 and pixels.ndim == 3 else None


def to_rgb(image: Image.Image, bits: Sequence[int] = ()) -> np.ndarray:
    """Convert an opened image of any mode to uint8 (H, W, 3), with gray behind transparent pixels.

    `bits` from `find_image_bits` scale a deep image. Works in strips: 100 megapixels at once would need 3 GB in between.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode.startswith(("I", "F")):  # 16-bit or float gray, which Pillow's conversion clips to white
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ImageError("has values that are not finite")
        highest = float(values.max(initial=0))
        if image.mode == "I" and (values.min(initial=0) < 0 or highest > 65_535):
            raise ImageError("has values outside 0 to 65,535")
        # Deep values are scaled by their bits; float gray up to 1 by 255; anything up to 255 is taken as it is.
        is_deep = image.mode.startswith("I;16") or highest > 255 or (image.mode == "I" and bits)
        depth = fitting_bits(highest, bits if image.mode != "F" else ())
        factor = 255 / (2**depth - 1) if is_deep else 255.0 if image.mode == "F" and highest <= 1 else 1.0
        return scale_to_bytes(values[:, :, None], factor)
    rgb = np.empty((image.height, image.width, 3), dtype=np.uint8)
    num_rows = max(1, STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, num_rows):
        strip = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        if strip.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in strip.info:
            rgba = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", rgba.size, (PADDING_GRAY,) * 3 + (255,)), rgba)
        rgb[top : top + num_rows] = np.asarray(strip.convert("RGB"))
    return rgb


def scale_to_bytes(values: np.ndarray, factor: float) -> np.ndarray:
    """Return values (H, W, 3), or (H, W, 1) for gray, times a factor, uint8 (H, W, 3)."""
    rgb = np.empty((*values.shape[:2], 3), dtype=np.uint8)
    for row, line in enumerate(values):  # the whole image in float64 would take eight times the memory
        rgb[row] = np.rint(line.astype(np.float64) * factor).clip(0, 255)
    return rgb


def fitting_bits(highest: float, bits: Sequence[int]) -> int:
    """Return the smallest of `bits` that holds a value, or the largest if none does; 16 without `bits`."""
    return next((number for number in sorted(bits) if highest < 2**number), max(bits, default=16))


def read_file(path: str | Path) -> bytes:
    """Read the bytes of an image file. Raises ImageError if it is unreadable, empty or larger than MAX_FILE_BYTES."""
    try:
        data = read_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    if not data:
        raise ImageError("the file is empty")
    return data


def find_near_duplicates(phashes: np.ndarray, thumbs: np.ndarray, max_bits: int) -> np.ndarray:
    """Return pairs (P, 2) of images whose hashes, uint64 (N,), differ in at most `max_bits` bits and whose thumbs (N, K) agree.

    By the pigeonhole principle two such hashes agree in one of `max_bits + 1` slices of their bits, so only images with an equal
    slice are compared. The first of the images with the same hash and similar thumbs stands for the others, which are not compared
    themselves.
    """

    def thumb_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.abs(thumbs[first].astype(np.int16) - thumbs[second]).mean(axis=1)

    pairs, representatives = [], [np.zeros(0, np.int64)]
    remaining = np.argsort(phashes, kind="stable")
    while len(remaining):  # the first remaining image of each hash stands for those with a similar thumb
        starts = np.flatnonzero(np.r_[True, phashes[remaining][1:] != phashes[remaining][:-1]])
        first = np.repeat(remaining[starts], np.diff(np.r_[starts, len(remaining)]))
        is_alike = thumb_distance(remaining, first) <= THUMB_TOLERANCE
        pairs.append(np.stack([first, remaining], axis=1)[is_alike & (first != remaining)])
        representatives.append(remaining[starts])
        remaining = remaining[~is_alike]
    first = np.concatenate(representatives)
    hashes = phashes[first]
    for low, high in itertools.pairwise(np.linspace(0, 64, max_bits + 2).astype(int)):
        slices = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(slices, kind="stable")
        remaining = np.arange(max(0, len(order) - 1))
        offset = 1
        while len(remaining):  # compare each image with the next, the second next ... while both have the same slice
            remaining = remaining[remaining + offset < len(order)]
            remaining = remaining[slices[order[remaining]] == slices[order[remaining + offset]]]
            distance = np.bitwise_count(hashes[order[remaining]] ^ hashes[order[remaining + offset]])
            close = remaining[(distance <= max_bits) & (distance > 0)]  # 0: compared above
            pairs.append(first[np.stack([order[close], order[close + offset]], axis=1)])
            offset += 1
    candidates = np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)
    return candidates[thumb_distance(candidates[:, 0], candidates[:, 1]) <= THUMB_TOLERANCE]


def chain_equal(keys: np.ndarray) -> np.ndarray:
    """Return edges (P, 2) that link each item to the next one with an equal key."""
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    return np.stack([order[equal], order[equal + 1]], axis=1)


def group_keys(paths: Sequence[str], pattern: str | None) -> np.ndarray:
    """Return a key per path, (N,), equal where `pattern` captures the same in the file name. Raises UserError if none matches."""
    keys = np.arange(len(paths))
    if pattern is None:
        return keys
    first_with = {}
    for index, path in enumerate(paths):
        if (text := captured_text(path, pattern)) is not None:
            keys[index] = first_with.setdefault(text, index)
    if not first_with:
        problem = f"matches no file name, for instance not {''.join(paths[:1]).rsplit('/', 1)[-1]}"
        raise UserError(problem, f"--group_regex {pattern}", r"for example '^(shot\d+)_'")
    return keys


def captured_text(path: str, pattern: str | None) -> str | None:
    """Return what the group of `pattern` captures in the name of a file, None for nothing."""
    match = re.search(pattern, path.rsplit("/", 1)[-1]) if pattern else None
    return match and match.group(1)


def find_components(num_items: int, pairs: np.ndarray) -> np.ndarray:
    """Return the index of each item's connected component, int32 (num_items,), for edges (P, 2)."""
    from scipy.sparse.csgraph import connected_components

    edges = scipy.sparse.coo_matrix((np.ones(len(pairs), dtype=np.int8), pairs.T), shape=(num_items, num_items))
    return connected_components(edges, directed=False)[1].astype(np.int32)


def rows_by_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return the ascending positions of each class in labels (N,). One sort finds all: a search per class would be quadratic."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, num_classes)))


def choose_splits(paths: Sequence[str], labels: np.ndarray, groups: np.ndarray, config: Config) -> np.ndarray:
    """Return the split of each image, int8 (N,): drawn, or given by its top folder; a missing val is drawn from train."""
    if config.splits == "random":
        return assign_splits(labels, groups, split_shares(config), config.seed)
    names = [SPLIT_FOLDERS[path.split("/", 1)[0].lower()] for path in paths]
    splits = np.array([SPLIT_NAMES.index(name) for name in names], dtype=np.int8)
    if 1 not in splits and 0 in splits:
        rows, shares = np.flatnonzero(splits == 0), (1 - config.val_split, config.val_split, 0.0)
        splits[rows] = assign_splits(labels[rows], groups[rows], shares, config.seed)
    return splits


def take_fraction(records: Records, fraction: float, seed: int, splits_path: Path | None = None) -> Records:
    """Return `fraction` of the records of each class in each split, in whole groups and at least one; no split changes.

    A continued run takes its records from its splits.json, `splits_path`, because changed data would give another draw.
    """
    if fraction == 1:
        return records
    is_used = np.zeros(len(records.labels), dtype=bool)
    if splits_path is None:
        for rows in filter(len, map(records.rows, SPLIT_NAMES)):
            selection = assign_splits(records.labels[rows], records.groups[rows], (fraction, 1 - fraction, 0.0), seed)
            is_used[rows] = selection == 0
    else:
        table = read_splits(splits_path)
        chosen = {path for split in SPLIT_NAMES for paths in table[split].values() for path in paths}
        is_used[:] = [path in chosen for path in records.paths]
    arrays = {name: getattr(records, name)[is_used] for name in ("paths", "labels", "groups", "splits", "digests")}
    return dataclasses.replace(records, **arrays)


def assign_splits(labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Split whole groups, each class as closely to `shares` as its groups allow: int8 (N,) into SPLIT_NAMES.

    `labels`, `groups`: int (N,). `shares` of train, val, test: sum to one, 0 leaves a split empty. `seed` orders equal groups.

    Groups of several images are placed first, largest first, each in the split where it adds least to the chi-square distance
    between class counts and targets. Single images then fill what each target lacks, rounded so that `shares` also hold over all
    classes. Finally, a class that has enough groups but an empty split gets one moved there.
    """
    group_ids, groups = np.unique(groups, return_inverse=True)
    num_groups, num_classes = len(group_ids), int(labels.max()) + 1
    counts = scipy.sparse.csr_matrix((np.ones(len(labels)), (groups, labels)), shape=(num_groups, num_classes))
    sizes = np.asarray(counts.sum(axis=1)).ravel()
    targets = np.bincount(labels, minlength=num_classes)[:, None] * np.asarray(shares)
    order = np.random.default_rng((seed, 0)).permutation(num_groups)
    multiples = order[sizes[order] > 1]
    split_of = np.full(num_groups, -1, dtype=np.int8)
    assigned = np.zeros_like(targets)
    for group in multiples[np.argsort(-sizes[multiples], kind="stable")]:
        classes, added = _group_counts(counts, group)
        # Growth of sum (assigned - target)^2 / target in each split; infinite where the target is zero.
        target, change = targets[classes], added[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = (change**2 - 2 * change * (target - assigned[classes])) / target
        split_of[group] = np.argmin(np.where(target > 0, growth, np.inf).sum(axis=0))
        assigned[classes, split_of[group]] += added
    singles = order[sizes[order] == 1]
    single_labels = counts.indices[counts.indptr[singles]]
    # Rounding error of each split so far; it decides which splits are rounded up. Otherwise 40 classes of 35 images at 10 % would
    # all round 3.5 the same way, and test would get 8.6 % or 11.4 % of the data.
    carry = np.zeros(3)
    for label, positions in enumerate(rows_by_class(single_labels, num_classes)):
        if not len(positions):
            continue
        missing = np.maximum(targets[label] - assigned[label], 0)
        weights = missing if missing.sum() > 0 else targets[label]
        quota = weights / weights.sum() * len(positions)
        rounded = np.floor(quota).astype(int)
        priority = np.where(weights > 0, quota - rounded + carry, -np.inf)
        rounded[np.argsort(-priority, kind="stable")[: len(positions) - rounded.sum()]] += 1
        carry = carry + quota - rounded
        split_of[singles[positions]] = np.repeat(np.arange(3), rounded)
    _give_every_class_its_splits(counts, split_of, np.flatnonzero(np.asarray(shares) > 0))
    return split_of[groups]


def _give_every_class_its_splits(counts: Any, split_of: np.ndarray, wanted: np.ndarray) -> None:
    """Move groups, in place, so that each class has one in every wanted split, train first, as far as its groups suffice."""
    by_class = counts.tocsc()
    groups_of = np.split(by_class.indices, by_class.indptr[1:-1])  # by class
    # Number of groups, (num_classes, 3).
    present = np.stack([counts[split_of == split].getnnz(axis=0) for split in range(3)], axis=1)

    def cost(group: int) -> tuple[int, float, int]:
        """Prefer a group that is no class's only one in its split, then one in train, then a small one."""
        classes, added = _group_counts(counts, group)
        return int((present[classes, split_of[group]] <= 1).sum()), float(split_of[group] != 0), int(added.sum())

    def move(group: int, split: int) -> None:
        classes, _ = _group_counts(counts, group)
        present[classes, split_of[group]] -= 1
        present[classes, split] += 1
        split_of[group] = split

    for _ in range(3):  # a move may take the only group of another class; the next round repairs that
        for label, split in np.argwhere(present == 0):
            members = groups_of[label]
            # A class's last group may only move towards train.
            donors = [g for g in members if present[label, split_of[g]] > 1 or split_of[g] > split]
            # With k groups only the first k splits can be had.
            if split in wanted[: len(members)] and not present[label, split] and donors:
                move(min(donors, key=cost), split)
    # Random walk for the rare case that single moves get stuck, because classes share their few groups. A move that leaves the
    # group's classes with more empty splits than before is made one time in ten only.
    rng = np.random.default_rng(0)
    splittable = np.flatnonzero(np.diff(by_class.indptr) >= len(wanted))
    for _ in range(2000):
        empty = [(label, split) for label in splittable for split in wanted if not present[label, split]]
        if not empty:
            break
        label, split = empty[rng.integers(len(empty))]
        group = rng.choice(groups_of[label])
        affected = np.ix_(np.intersect1d(_group_counts(counts, group)[0], splittable), wanted)
        old_split, num_empty = split_of[group], (present[affected] == 0).sum()
        move(group, split)
        if (present[affected] == 0).sum() > num_empty + (rng.random() < 0.1):
            move(group, old_split)
    # A class that is not measured somewhere is better than one that is not trained on.
    for label, members in enumerate(groups_of):
        if len(members) and not present[label, 0]:
            move(min(members, key=cost), 0)


def _group_counts(counts: Any, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes of a group and the number of its images in each."""
    span = slice(counts.indptr[group], counts.indptr[group + 1])
    return counts.indices[span], counts.data[span]


def describe_health(
    listing: Listing, rows: np.ndarray, reasons: dict[str, str], class_of: dict[str, str | None], splits: str
) -> dict[str, Any]:
    """Return the entries of the data report on single images and folders: quarantine, sizes, modes, orientation, warnings."""
    rows = rows[~rows["broken"]]
    broken = [*listing.problems, *reasons.items()]
    quarantined = [{"path": printable(path), "reason": reason} for path, reason in broken]
    sizes = {}
    for side, measure in itertools.product(("width", "height"), ("min", "median", "max")):
        sizes[f"{side}_{measure}"] = int(getattr(np, measure)(rows[side]))
    folders, by_case, notes = Counter(listing.classes.values()), {}, []
    for name, count in sorted(folders.items()):
        by_case.setdefault(name.casefold(), []).append(name)
        if count > 1 and splits == "random":  # folders of several splits may have one name
            notes.append(f"{count} folders are all named {name} once their Unicode is normalised: one class")
    for names in by_case.values():
        if (num_classes := len({class_of[name] for name in names} - {None})) > 1:
            notes.append(f"the folders {', '.join(names)} differ only in case: {num_classes} classes")
    # Not by the name `cropped`, which a class may have.
    with_cropped = {
        listing.class_of(path) for path in listing.paths if path.rpartition("/")[0] != class_folder(path, splits)
    }
    without = sorted({listing.class_of(path) for path in listing.paths} - with_cropped)
    if with_cropped and without:
        listed = ", ".join(without[:10]) + (f" and {len(without) - 10} more" if len(without) > 10 else "")
        has_cropped = f"{count_of(len(with_cropped), 'class')} {'has' if len(with_cropped) == 1 else 'have'} cropped/"
        notes.append(f"{has_cropped}, and {listed} not: images of these are used as they lie there")
    if listing.ignored:
        notes.append(f"passed over: {describe_ignored(listing.ignored)}")
    if tiny := int((np.minimum(rows["width"], rows["height"]) < TINY_SIDE).sum()):
        notes.append(f"images with a side shorter than {TINY_SIDE} px: {tiny}")
    return {
        "quarantined": sorted(quarantined, key=lambda item: item["path"]),
        "sizes": sizes,
        "warnings": notes,
        "modes": dict(Counter(rows["mode"].tolist()).most_common()),
        "exif_rotated": int((rows["orientation"] > 1).sum()),
    }


def describe_ignored(ignored: Counter[str]) -> str:
    """Describe the entries that a listing passed over: files of other types, and those of IGNORED_PLACES."""
    kinds = [kind for kind, _ in ignored.most_common() if kind not in IGNORED_PLACES]
    files = sum(ignored[kind] for kind in kinds)
    phrases = [f"{count_of(files, 'file')} of other types ({', '.join(kinds[:6])})"] if files else []
    for kind, (noun, place) in IGNORED_PLACES.items():
        phrases += [f"{count_of(ignored[kind], noun)} {place}"] if ignored[kind] else []
    return " and ".join(phrases)


def describe_duplicates(records: Records, duplicates: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the sets of duplicates by kind, and those sets joined over all kinds that span several classes, as lists of paths."""

    def sets_of(pairs: np.ndarray) -> list[np.ndarray]:
        components = find_components(len(records.labels), pairs)
        return [rows for rows in rows_by_class(components, int(components.max()) + 1) if len(rows) > 1]

    all_sets = sets_of(np.concatenate(list(duplicates.values())))
    conflicts = [records.paths[rows].tolist() for rows in all_sets if len(np.unique(records.labels[rows])) > 1]
    named = {kind: [records.paths[rows].tolist() for rows in sets_of(pairs)] for kind, pairs in duplicates.items()}
    return {"duplicates": named, "label_conflicts": conflicts}


def count_classes(
    records: Records, broken: Counter[str | None], config: Config
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return for each class its usable and `broken` images, groups and images per split; and a note on each suspicious class."""
    table, notes = {}, []
    by_class = rows_by_class(records.labels, len(records.class_names))
    for name, rows in zip(records.class_names, by_class, strict=True):
        num_groups = len(np.unique(records.groups[rows]))
        by_split = zip(SPLIT_NAMES, np.bincount(records.splits[rows], minlength=3).tolist(), strict=True)
        table[name] = {"usable": len(rows), "quarantined": broken[name], "groups": num_groups, **dict(by_split)}
    wanted = required_splits(table, config)
    for name, row in table.items():
        empty = " and ".join(split for split in wanted if not row[split])
        if empty and row["usable"]:
            images = f"{name}: {count_of(row['usable'], 'image')} in {count_of(row['groups'], 'group')}"
            so = "so " if config.splits == "random" else ""
            notes.append(f"{images}, {so}none in {empty} (its figures there are missing)")
        if name.lower() in UNKNOWN_NAMES and config.unknown_dir is None:
            remedy = "if its images are of no class, move it out of data_root and give it as --unknown_dir"
            notes.append(f"a class is named {name}: {remedy}")
        if name in (config.masks_dirname, CUTOUTS_DIRNAME):
            notes.append(f"a class is named {name}: masks lie inside the class folder of their images")
    return table, notes


def check_trainable(scan: Scan, config: Config) -> None:
    """Raise UserError for one class, a wrong --n_classes, known images in --unknown_dir, small classes or an empty split."""
    where, records = config.describe("data_root"), scan.records
    num_classes = len(records.class_names)
    if num_classes < 2:
        problem = f"has one class only ({records.class_names[0]}); a recogniser needs two"
        raise UserError(problem, where, "add another class")
    if config.n_classes not in (None, num_classes):
        problem = f"has {num_classes} classes, and --n_classes says {config.n_classes}"
        raise UserError(problem, where, "correct the number, or see what there is with the command scan")
    if config.unknown_dir is not None:
        root, unknown_dir = config.data_root.resolve(), config.unknown_dir.resolve()
        if num_known := sum(f"{root}/{path}".startswith(f"{unknown_dir}/") for path in records.paths):
            problem = f"holds {num_known:,} of the images to train on, which have classes"
            remedy = "give a folder of other images, or leave these out: --exclude"
            raise UserError(problem, config.describe("unknown_dir"), remedy)
    small = {name: row for name, row in scan.report["classes"].items() if row["usable"] < config.min_per_class}
    if small:
        problem = f"{len(small)} of {num_classes} classes have fewer than {config.min_per_class} usable images:"
        for name, row in small.items():
            broken = f", {row['quarantined']} broken" if row["quarantined"] else ""
            problem += f"\n    {name}: {row['usable']} usable{broken}"
        lower = "lower --min_per_class, " if any(row["usable"] for row in small.values()) else ""
        remedy = f"add images, {lower}or leave the classes out with --class_map"
        remedy += ", or raise --data_fraction" if config.data_fraction < 1 else ""
        raise UserError(problem, where, remedy)
    for split in required_splits(scan.report["classes"], config):
        if not len(records.rows(split)):
            groups = count_of(len(np.unique(records.groups)), "group")
            problem = f"{count_of(len(records.labels), 'image')} in {groups} leave none for {split}"
            regex = ", --group_regex" if config.group_regex else ""
            remedy = f"add images, or change --val_split, --test_split{regex}"
            raise UserError(problem, where, remedy if config.splits == "random" else f"put images into {split}/")
    untrained = [name for name, row in scan.report["classes"].items() if row["usable"] and not row["train"]]
    if untrained and config.splits == "from_folders":
        problem = f"{', '.join(untrained)} {'has' if len(untrained) == 1 else 'have'} no training image"
        raise UserError(problem, where, "add images to train/, or leave it out with --class_map")


def required_splits(classes: dict[str, dict[str, int]], config: Config) -> list[str]:
    """Return the splits that need images; test may be missing with --splits from_folders."""
    has_test = config.splits == "random" or any(row["test"] for row in classes.values())
    pairs = zip(SPLIT_NAMES, split_shares(config), strict=True)
    return [split for split, share in pairs if share > 0 and (has_test or split != "test")]


def split_shares(config: Config) -> tuple[float, float, float]:
    """Return the shares of train, val and test; a share of zero leaves the split empty."""
    return 1 - config.val_split - config.test_split, config.val_split, config.test_split


def format_class_table(report: dict[str, Any]) -> str:
    """Return the per-class table of a data report as text."""
    shows_masks = report["masks"]["usable"] or report["masks"]["refused"]
    columns = ("usable", "quarantined", *(["masks"] if shows_masks else []), "groups", *SPLIT_NAMES)
    rows = {name: [row[key] for key in columns] for name, row in report["classes"].items()}
    return format_table(columns, rows, 13, groups=report["num_groups"])  # a group may hold images of several classes


def format_table(heads: Sequence[str], rows: dict[str, Sequence[int]], width: int, **totals: int) -> str:
    """Return counts by class as an aligned text table with a last line of `totals`, by default sums, in columns `width` wide.

    Of more than MAX_TABLE_CLASSES classes only those with the smallest first count are listed, which are worth a look.
    """
    name_width = max(5, *map(len, rows))
    sums = [totals.get(head, sum(column)) for head, column in zip(heads, zip(*rows.values(), strict=True), strict=True)]
    lines = [f"{'class':<{name_width}}" + "".join(f"{head:>{width}}" for head in heads)]
    listed = list(rows.items())
    if len(rows) > MAX_TABLE_CLASSES:
        listed = sorted(listed, key=lambda row: row[1][0])[:MAX_TABLE_CLASSES]
    for name, values in [*listed, ("all", sums)]:
        lines.append(f"{name:<{name_width}}" + "".join(f"{value:>{width},}" for value in values))
    if num_more := len(rows) - len(listed):
        lines.insert(-1, f"... and {num_more:,} more, as large or larger, in data_report.json")
    return "\n".join(lines)


def format_findings(report: dict[str, Any]) -> str:
    """Return the findings of a scan, one a line; long lists of files are cut here and complete in data_report.json."""

    def list_some(kind: str, items: list[dict[str, str]]) -> list[str]:
        shown = [f"  {kind}: {item['path']}: {item['reason']}" for item in items[:10]]
        return shown + ([f"  ... and {len(items) - 10} more in data_report.json"] if len(items) > 10 else [])

    lines = [f"{report['num_usable']:,} of {report['num_images']:,} images usable"]
    if report["num_used"] < report["num_usable"]:
        used = f"--data_fraction: {report['num_used']:,} of them are used"
        lines.append(f"{used}: whole groups, one of every class and split at least")
    lines += list_some("quarantined", report["quarantined"])
    masks = report["masks"]
    if masks["usable"] or masks["refused"]:
        drawn = f", {masks['made']:,} of them drawn by SAM-2" if masks["made"] else ""
        lines.append(f"masks: {masks['usable']:,} of {report['num_used']:,} crops have one that can be used{drawn}")
    lines += list_some("refused", masks["refused"])
    if masks["not_made"]:
        path, reason = masks["not_made"][0]["path"], masks["not_made"][0]["reason"]
        lines.append(f"SAM-2 drew no acceptable mask for {len(masks['not_made']):,} crops, e.g. {path}: {reason}")
    lines += [
        f"--exclude {glob} left out {count_of(count, 'file')}" for glob, count in report["excluded"].items() if count
    ]
    if report["class_map"]:
        changes = (f"{old} -> {new or '(left out)'}" for old, new in report["class_map"].items())
        lines.append(f"classes of folders: {', '.join(changes)}")
    exact, near = (sum(len(group) - 1 for group in report["duplicates"][kind]) for kind in ("exact", "near"))
    if exact or near:
        stays = "; each set stays in one split" if report["splits"] == "random" else ""
        lines.append(f"duplicates: {near} near, {exact} of them exact{stays}")
    conflicts, leaks = report["label_conflicts"], report["leaks_prevented"]
    if conflicts:
        example = " = ".join(conflicts[0][:3])
        lines.append(f"{len(conflicts)} sets of duplicates lie in different classes, e.g. {example}")
    if leaks:
        lines.append(f"a split that ignores groups would have leaked {leaks} val and test images into training")
    return "\n".join(lines + [f"warning: {text}" for text in report["warnings"]])


def write_splits(path: Path, records: Records, seed: int) -> None:
    """Write splits.json: the paths of each class in train, val and test, relative to data_root."""
    table: dict[str, Any] = {"seed": seed, "classes": list(records.class_names), "masks_hash": records.masks_hash}
    for split in SPLIT_NAMES:
        table[split] = {name: [] for name in records.class_names}
        for row in records.rows(split).tolist():
            table[split][records.class_names[records.labels[row]]].append(records.paths[row])
    write_json(path, table)


def reuse_splits(path: Path, records: Records) -> tuple[Records, list[str]]:
    """Return the records of a run's splits.json, whatever happened to the data since, and a warning for each change.

    Augmentation and batches depend on the order of the records, so missing files keep their place (reading one fails and costs
    that image) and new ones stay out of the run. Raises UserError if the classes differ.
    """
    table = read_splits(path)
    class_names = table["classes"]
    if class_names != list(records.class_names):
        problem = f"the run was started with other classes: {describe_change(class_names, records.class_names)}"
        remedy = "restore the data or --class_map (a line `null: [NAME]` in its file leaves a class out),"
        remedy += " or train anew, in a new --out_dir or with --overwrite"
        raise UserError(problem, str(path.parent), remedy)
    rows = []
    for split_index, split in enumerate(SPLIT_NAMES):
        for name, items in table[split].items():
            rows += [(class_names.index(name), item, split_index) for item in items]
    labels, paths, splits = zip(*sorted(rows), strict=True) if rows else ((), (), ())
    row_of = {path: row for row, path in enumerate(records.paths)}
    scanned_rows = np.array([row_of.get(path, -1) for path in paths], dtype=np.int64)
    listed, notes = set(paths), []
    if gone := [path for path in paths if path not in row_of]:
        notes.append(f"{count_of(len(gone), 'image')} of this run's split gone or broken now, e.g. {gone[0]}")
    if new := [path for path in row_of if path not in listed]:
        notes.append(f"{count_of(len(new), 'image')} new since this run was started, and out of it, e.g. {new[0]}")
    first_free = records.groups.max(initial=-1) + 1  # with --data_fraction, groups have gaps
    own_groups = first_free + np.arange(len(paths))
    masks = [records.mask_of(row, 1) if row >= 0 else "" for row in scanned_rows.tolist()]
    reused = dataclasses.replace(
        records,
        paths=np.array(paths, dtype=STRINGS),
        labels=np.array(labels, dtype=np.int32),
        groups=np.where(scanned_rows < 0, own_groups, np.append(records.groups, 0)[scanned_rows]).astype(np.int32),
        splits=np.array(splits, dtype=np.int8),
        masks=np.array(masks, dtype=STRINGS),
        digests=np.append(records.digests, np.zeros((1, 2), np.uint64), axis=0)[scanned_rows],
    )
    if table.get("masks_hash", "") != reused.masks_hash:
        notes.append("the masks or the masked images are not those that this run was started with")
    return reused, notes


def read_splits(path: Path) -> dict[str, Any]:
    """Read and check a splits.json. Raises UserError."""
    try:
        table = read_json(path, {"classes": [str], **{split: {str: [str]} for split in SPLIT_NAMES}})
        if unknown := {name for split in SPLIT_NAMES for name in table[split]} - set(table["classes"]):
            raise ValueError(f"{min(unknown)} is none of its classes")
        counts = Counter(path for split in SPLIT_NAMES for items in table[split].values() for path in items)
        for item, count in counts.most_common(1):
            if count > 1:
                raise ValueError(f"{item} stands there twice")
        return table
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UserError(problem, str(path), "restore it, or train anew with --overwrite") from error


def describe_change(old: Sequence[str], new: Sequence[str]) -> str:
    """Describe which class names are gone and which are new."""
    gone, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    return f"{len(old)} -> {len(new)}, gone: {', '.join(gone) or 'none'}, new: {', '.join(added) or 'none'}"


# ======================================================================================================================
# 06  MASKS
# ======================================================================================================================
# Masks and cutouts tell which pixels of a crop are the object. This section finds, checks, reads and applies them. Raises
# UserError if masks are requested and none is usable; the report lists each refused mask with its path and reason.
MASK_LEVEL = 127  # mask pixels that are brighter, and cutout pixels that are more opaque, are the object
MASK_ASPECT_TOLERANCE = 0.01  # a mask of another size is resized if its aspect ratio differs by no more than this
MAX_LABEL = 100  # class numbers in label maps are smaller: COCO has 91
FILL_DRAW = 1  # second number of a sample's seed for its fill colour; section 07 has the others
MASK_LOG_NAME = "masks.jsonl"
MASK_RECORD_KEYS = ("path", "size", "mtime_ns", "score", "area", "reason", "settings")
MASKS_REMEDY = (
    "put masks into <class>/masks/<stem>_mask.png, or have SAM-2 draw them: --auto_generate_masks --sam2_ckpt FILE"
)
MASK_DTYPE = np.dtype([("width", "<i4"), ("height", "<i4"), ("area", "<f8"), ("digest", "<u8"), ("broken", "?")])


def attach_masks(scan: Scan, config: Config) -> Scan:
    """Return the scan with a mask for each record: the first usable one of `find_masks`. Files are checked once, as images are."""
    records, listing = scan.records, scan.listing
    choices, refused = find_masks(config, (*listing.paths, *listing.excluded), tuple(dict(listing.problems)))
    for path, mode in zip(records.paths, scan.crops["mode"].tolist(), strict=True):
        if mode in ("RGBA", "LA", "PA"):
            choices[path].append(path)
    paths = sorted({mask for path in records.paths for mask in choices[path]})
    check = functools.partial(check_mask, masks_dirname=config.masks_dirname)
    name = f"{config.masks_dirname}/ object mask"
    rows, broken = check_files(config.data_root, paths, name, MASK_DTYPE, check, scan.memory)
    mask_rows, masks = dict(zip(paths, rows, strict=True)), []
    for path, crop in zip(records.paths, scan.crops, strict=True):
        reasons = {mask: broken.get(mask) or _misfit(mask_rows[mask], crop) for mask in choices[path]}
        refused |= {mask: reason for mask, reason in reasons.items() if reason and mask != path}
        masks.append(next((mask for mask, reason in reasons.items() if not reason), ""))
    mask_log, kinds, not_made = read_mask_log(config.out_dir), Counter(), []
    classes = {name: {"masks": 0, "made": 0, "not_made": 0} for name in records.class_names}
    for crop, mask, label in zip(records.paths, masks, records.labels.tolist(), strict=True):
        logged, counts = mask_log.get(crop), classes[records.class_names[label]]
        is_cutout = bool(mask) and is_alpha_file(mask, config.masks_dirname)
        kinds["none" if not mask else "own_alpha" if mask == crop else "cutouts" if is_cutout else "masks"] += 1
        counts["masks"] += bool(mask)
        counts["made"] += bool(mask and logged and not logged["reason"])
        if logged and logged["reason"] and not mask:
            counts["not_made"] += 1
            not_made.append({key: logged[key] for key in ("path", "score", "area", "reason")})
    report = dict(scan.report)
    report["masks"] = {
        "usable": len(masks) - kinds["none"],
        **{kind: kinds[kind] for kind in ("cutouts", "masks", "own_alpha", "none")},
        "made": sum(counts["made"] for counts in classes.values()),
        "refused": [{"path": printable(path), "reason": reason} for path, reason in sorted(refused.items())],
        "not_made": not_made,
    }
    report["classes"] = {name: row | classes[name] for name, row in report["classes"].items()}
    mask_digests = np.array([mask_rows[path]["digest"] if path else 0 for path in masks], np.uint64)
    digests = np.stack((records.digests[:, 0], mask_digests), axis=1)
    records = dataclasses.replace(records, masks=np.array(masks, dtype=STRINGS), digests=digests)
    return dataclasses.replace(scan, records=records, report=report)


def find_masks(
    config: Config, paths: Sequence[str], unusable: Sequence[str] = ()
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the mask files of each image, best first, and by path why other files of `cutouts/` and the masks folder are refused.

    Cutouts come before masks, data_root before --masks_out. `<file name>_mask.png` and COLMAP's `<file name>.png` distinguish crops
    that differ only in their suffix. The folders are those of `paths`; masks of `unusable` images in them are not refused.
    """
    roots = ["", f"{config.masks_out.absolute()}/"] if config.masks_out else [""]
    folders = sorted({class_folder(path, config.splits) for path in paths})
    listing = Listing()
    for root, folder, dirname in itertools.product(roots, folders, (CUTOUTS_DIRNAME, config.masks_dirname)):
        if is_folder(config.data_root / f"{root}{folder}/{dirname}"):
            listing.add_folder(config.data_root, f"{root}{folder}/{dirname}/")
    non_png = [path for path in listing.paths if not path.lower().endswith(".png")]
    refused = dict(listing.problems) | dict.fromkeys(non_png, "is no PNG")
    files: dict[str, str] = {}  # by `_mask_key`
    for path in (path for path in listing.paths if path not in refused):
        if twin := files.get(_mask_key(path)):
            refused[twin] = "another file has the same name but for case or Unicode form"
        files[_mask_key(path)] = path
    choices: dict[str, list[str]] = {path: [] for path in (*paths, *unusable)}
    for path in choices if files else ():
        folder, name = class_folder(path, config.splits), path.rsplit("/", 1)[-1]
        stem = name.rsplit(".", 1)[0]
        names = [f"{CUTOUTS_DIRNAME}/{stem}_cutout", f"{CUTOUTS_DIRNAME}/{stem}"]
        names += [f"{config.masks_dirname}/{mask}" for mask in (f"{name}_mask", name, f"{stem}_mask", stem)]
        keys = [_mask_key(f"{root}{folder}/{mask}.png") for root in roots for mask in names]
        choices[path] = [files[key] for key in keys if key in files]
    refused |= dict.fromkeys(set(files.values()).difference(*choices.values()), "has no image")
    return choices, refused


def _mask_key(path: str) -> str:
    return unicodedata.normalize("NFC", path[:-4] + path[-4:].lower())


def check_mask(root: Path, path: str, masks_dirname: str) -> tuple[np.ndarray, str]:
    """Decode one mask; return its MASK_DTYPE row, and the reason why it cannot be used or ''."""
    row = np.zeros((), dtype=MASK_DTYPE)
    try:
        data = read_file(root / path)
        row["digest"] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        mask = decode_mask(data, is_alpha_file(path, masks_dirname))
    except ImageError as error:
        row["broken"] = True
        return row, str(error)
    row["height"], row["width"], row["area"] = *mask.shape, mask.mean()
    if 0 < row["area"] < 1:
        return row, ""
    return row, f"{'every' if row['area'] else 'no'} pixel is above {MASK_LEVEL}"


def _misfit(mask: np.void, crop: np.void) -> str:
    """Return '' if a mask has the aspect ratio of its crop, the problem otherwise."""
    width, height, crop_width, crop_height = (int(row[side]) for row in (mask, crop) for side in ("width", "height"))
    if abs(width * crop_height - height * crop_width) <= MASK_ASPECT_TOLERANCE * height * crop_width:
        return ""
    return f"is {width} x {height} px, which does not fit a crop of {crop_width} x {crop_height} px"


def read_mask_log(out_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the newest record of each crop in masks.jsonl, the log of tools/masks.py."""
    records = read_records(out_dir / MASK_LOG_NAME, {**dict.fromkeys(MASK_RECORD_KEYS, object), "path": str})
    return {record["path"]: {key: record[key] for key in MASK_RECORD_KEYS} for record in records}


def check_masks_usable(scan: Scan, config: Config) -> None:
    """Check that some crop has a usable mask if --crop_mode needs masks. Raises UserError."""
    if config.crop_mode == "bbox" or scan.records.has_mask.any():
        return
    refused = scan.report["masks"]["refused"]
    first = f" ({len(refused)} are refused, the first: {refused[0]['path']}: {refused[0]['reason']})" if refused else ""
    problem = f"needs masks, and none of the {len(scan.records.labels):,} crops has a usable one{first}"
    raise UserError(problem, config.describe("crop_mode"), MASKS_REMEDY)


def load_crop(records: Records, row: int, view: int) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Read a crop, uint8 (H, W, 3), and for the masked view its mask, uint8 (H, W) with 255 for the object, else None.

    The third value is the reason why a mask of the scan can no longer be read, or ''. Raises ImageError for the crop itself.
    """
    image = load_image(records.root / records.paths[row], records.image_bits)
    mask_path = records.mask_of(row, view)
    if not mask_path:
        return image, None, ""
    try:
        mask = decode_mask(read_file(records.root / mask_path), is_alpha_file(mask_path, records.masks_dirname))
    except ImageError as error:
        return image, None, str(error)
    if mask.shape != image.shape[:2]:
        resized = Image.fromarray(mask.view(np.uint8) * 255).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
        mask = np.asarray(resized) > MASK_LEVEL
    return image, mask.view(np.uint8) * 255, ""


def decode_mask(data: bytes, is_alpha: bool) -> np.ndarray:
    """Decode a mask file, or the alpha channel of a cutout, as upright bool (H, W): True is object. Raises ImageError.

    Pixels above MASK_LEVEL are the object. Where they do not separate anything, the object is the opaque pixels or, in a file with
    only 0 and one other value, the non-zero pixels.
    """
    with opened_image(data) as image:
        read_orientation(image)  # drops damaged EXIF
        upright = ImageOps.exif_transpose(image)
        has_alpha = upright.has_transparency_data
        alpha = np.asarray(upright.convert("RGBA").getchannel("A")) > MASK_LEVEL if has_alpha else None
        if is_alpha and not has_alpha:
            raise ImageError("has no alpha channel")
        if is_alpha:
            return alpha
        is_gray = upright.mode in ("1", "L")
        bands = [np.asarray(upright.convert("L"))] if is_gray else cv2.split(to_rgb(upright))  # drawn in any colour
        levels = functools.reduce(np.maximum, bands)  # `max(axis=2)` takes four times as long
        mask = levels > MASK_LEVEL
        if alpha is not None and 0 < alpha.mean() < 1 and mask[alpha].mean() in (0, 1):  # object on transparent ground
            return alpha
        values = np.asarray(upright) if upright.mode[0] in "PIF" else levels  # palette indices, or more than 8 bits
        if values.dtype == np.uint8:  # np.unique takes four times as long as decoding
            distinct = sorted(value for _, value in Image.fromarray(values).getcolors())
        else:
            distinct = np.unique(values).tolist()
        listed = ", ".join(map(str, distinct[:5])) + (", ..." if len(distinct) > 5 else "")
        if mask.mean() in (0, 1):
            if len(distinct) == 2 and distinct[0] == 0:
                return values != 0
            problem = f"{'every' if mask.all() else 'no'} pixel is above {MASK_LEVEL}"
            raise ImageError(f"{problem}, and of its values {listed} none is plainly the object")
        if is_gray and len(distinct) == 3 and distinct[1] < MAX_LABEL and distinct[::2] == [0, 255]:
            problem = f"its values are {listed}, as of a label and of what is to be ignored"
            raise ImageError(f"{problem}: write 0 and 255 alone")
        return mask


def is_alpha_file(path: str | Path, masks_dirname: str) -> bool:
    """Return whether the mask in this file is its alpha channel: in cutouts, and in crops with an alpha channel."""
    return Path(path).parent.name != masks_dirname


class Fill(NamedTuple):
    """What replaces the background of a masked crop."""

    kind: str  # a choice of --mask_fill
    colour: tuple[int, int, int]  # RGB; `random` draws one for each training sample instead


def make_fill(config: Config, mean: Sequence[float]) -> Fill:
    """Return the fill for --mask_fill; `mean` is the RGB mean that the model subtracts, in 0..1."""
    colours = {"black": (0, 0, 0), "mean": tuple(round(255 * value) for value in mean)}
    return Fill(config.mask_fill, colours.get(config.mask_fill, (PADDING_GRAY,) * 3))


def fill_background(image: np.ndarray, mask: np.ndarray, fill: Fill, seed: int | None) -> np.ndarray:
    """Copy an image (H, W, 3) and fill it outside the mask, uint8 (H, W). `seed` draws a `random` colour; None in evaluation."""
    if fill.kind == "keep":
        return image.copy()
    is_object = (mask > MASK_LEVEL).view(np.uint8)
    if fill.kind == "blur":  # mean of the background pixels nearby; the object's colours do not enter
        kernel_size = (max(3, image.shape[1] // 4), max(3, image.shape[0] // 4))
        weight = (is_object == 0).astype(np.float32)
        total = cv2.blur(image * weight[:, :, None], kernel_size)
        mean = total / np.maximum(cv2.blur(weight, kernel_size), 1e-6)[:, :, None]
        background = np.rint(mean).clip(0, 255).astype(np.uint8)
    else:
        colour = fill.colour
        if fill.kind == "random" and seed is not None:
            colour = np.random.default_rng((seed, FILL_DRAW)).integers(0, 256, 3, dtype=np.uint8)
        background = np.full_like(image, colour)
    return cv2.copyTo(image, is_object, background)  # 20 times as fast as indexing with a boolean array


# ======================================================================================================================
# 07  AUGMENTATION
# ======================================================================================================================
# Turns (image, mask, seed) into a uint8 model input, and mixes the images of a batch. No global state: all randomness follows
# from seeds. Raises UserError for lists of transforms and folders of backgrounds that cannot be used.
# Second numbers of a sample's seed, one for each purpose, beside FILL_DRAW; `Transform._apply` needs those of lists below 8.
BACKGROUND_DRAW = 2
PRE_DRAW = 3
LIST_DRAW = 4  # of --train_augmentations and --val_augmentations
POST_DRAW = 5
MIXING_DRAW = 9  # second number of the run's seed, for the mixing of a batch
TRANSFORM_LISTS = ("pre_transforms", "train_augmentations", "val_augmentations", "post_transforms")
POLICIES = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}  # torchvision's class names
POLICY_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")  # operations that move the mask, too
DEVICE_TRANSFORMS = ("normalize", "totensor", "totensorv2")  # the device does these in any case
# Arguments of albumentations 1 that version 2 has under another name: the value is passed on unchanged ...
RENAMED_ARGUMENTS = {"value": "fill", "mask_value": "fill_mask", "fill_value": "fill", "mask_fill_value": "fill_mask"}
# ... or two arguments became one range; a missing lower bound is set to the upper one.
RANGE_ARGUMENTS = {
    "num_holes_range": ("min_holes", "max_holes"),
    "hole_height_range": ("min_height", "max_height"),
    "hole_width_range": ("min_width", "max_width"),
    "quality_range": ("quality_lower", "quality_upper"),
    "scale_range": ("scale_min", "scale_max"),
}


@dataclass(frozen=True)
class Transform:
    """Turns a crop into a square model input: gray letterbox and, in training, augmentation, or the given lists of transforms."""

    img_size: int
    fill: Fill  # replaces the pixels outside the mask, padding included (blur leaves the padding gray)
    colours: Any = None  # albumentations.Compose of colour changes; None = no built-in augmentation
    is_training: bool = False  # augmentation and random fills are on
    pre_steps: tuple[Any, ...] = ()  # of --pre_transforms; step(image=, mask=) -> dict of both, after set_random_state
    list_steps: tuple[Any, ...] | None = None  # replace the built-in augmentation; None = no such list is given
    post_steps: tuple[Any, ...] = ()  # of --post_transforms
    shows_mask: bool = False  # the mask is returned as a fourth channel

    def __call__(self, image: np.ndarray, mask: np.ndarray | None, seed: int, augmented: bool = True) -> np.ndarray:
        """Return the model input, uint8 (img_size, img_size, 3), or 4 channels with the mask last, 255 everywhere without a mask.

        The mask, uint8 (H, W), is above MASK_LEVEL on the object and moves with the image; colours change last, on the object only.
        `augmented` False skips the augmentation, but not pre- and post-transforms. Raises ImageError if a listed transform fails.
        """
        image, mask = self._apply(self.pre_steps, image, mask, (seed, PRE_DRAW))
        if self.list_steps is None:
            return self.finish(self.make_square(image, mask, seed), seed, augmented)
        if augmented or not self.is_training:
            image, mask = self._apply(self.list_steps, image, mask, (seed, LIST_DRAW))
        return self._complete(image, mask, seed)

    def is_cacheable(self, is_masked: bool) -> bool:
        """Return whether a sample is `finish(make_square(crop))` with a square that is the same for every seed."""
        if self.list_steps is not None or self.pre_steps:
            return False
        return not (is_masked and self.is_training and self.fill.kind == "random")

    def make_square(self, image: np.ndarray, mask: np.ndarray | None, seed: int) -> np.ndarray:
        """Return the fitted crop, uint8 (img_size, img_size, 3), or 4 channels with the mask last."""
        if mask is None:
            return fit_square(image, self.img_size)
        # Filled before it is resized: interpolation would blend the background into the edge of the object.
        filled = fill_background(image, mask, self.fill, seed if self.is_training else None)
        return fit_square(cv2.merge((filled, mask)), self.img_size)

    def finish(self, square: np.ndarray, seed: int, augmented: bool = True) -> np.ndarray:
        """Turn a square of `make_square` into the result of `__call__`. The square may be read-only, and then so may the result."""
        if self.colours is not None or self.post_steps:
            square = square.copy()  # libraries may write into it
        if not augmented or self.colours is None:
            return self._complete(*self._split(square, seed), seed)
        rng = np.random.default_rng(seed)
        image, mask = self._split(move_square(square, rng), seed)
        # One generator for all transforms: Compose.set_random_seed would give each the same seed, and so the same draws.
        self.colours.set_random_state(rng, random.Random(seed))
        changed = np.ascontiguousarray(self.colours(image=image, force_apply=True)["image"])
        if mask is not None and self.fill.kind != "keep":
            # Only the object changes: the fill keeps its value, because production sees no other.
            changed = cv2.copyTo(changed, (mask > MASK_LEVEL).view(np.uint8), image.copy())
        return self._complete(changed, mask, seed)

    def _complete(self, image: np.ndarray, mask: np.ndarray | None, seed: int) -> np.ndarray:
        """Apply the post-transforms, fit the image unless it has the input size, and append the mask if `shows_mask`."""
        image, mask = self._apply(self.post_steps, image, mask, (seed, POST_DRAW))
        if image.shape != (self.img_size, self.img_size, 3):
            pixels = image if mask is None else np.dstack((image, mask))
            image, mask = self._split(fit_square(pixels, self.img_size), seed)
        if not self.shows_mask:
            return image
        return np.dstack((image, np.full(image.shape[:2], 255, np.uint8) if mask is None else mask))

    def _split(self, square: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Split a square into image and mask, and fill the background again (except blur), since moving and resizing alter it."""
        if square.shape[2] == 3:
            return square, None
        image, mask = cv2.cvtColor(square, cv2.COLOR_RGBA2RGB), cv2.extractChannel(square, 3)
        if self.fill.kind != "blur":
            image = fill_background(image, mask, self.fill, seed if self.is_training else None)
        return image, mask

    def _apply(
        self, steps: tuple[Any, ...], image: np.ndarray, mask: np.ndarray | None, entropy: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Apply a list of steps; the background is the fill before and after. `entropy` is (sample seed, list number)."""
        if not steps:
            return image, mask
        fill_seed = entropy[0] if self.is_training else None
        if mask is not None:  # first, since interpolation would draw the background into the object's edge
            image = fill_background(image, mask, self.fill, fill_seed)
        rng, generator = np.random.default_rng(entropy), random.Random(8 * entropy[0] + entropy[1])
        for step in steps:
            name = getattr(step, "kind", "") or type(step.transforms[0]).__name__
            step.set_random_state(rng, generator)
            try:
                changed = step(image=image, mask=mask) if mask is not None else step(image=image)
            except Exception as error:  # libraries raise any type, e.g. if the image is too small
                reason = printable(f"{type(error).__name__}: {error}")[:200]
                raise ImageError(f"{name} cannot be applied: {reason}") from error
            image, mask = changed["image"], changed.get("mask")
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                needed = "what is needed is uint8 (height, width, 3)"
                raise ImageError(f"{name} makes {image.dtype} {image.shape} of it, and {needed}")
        if mask is not None and self.fill.kind != "blur":
            image = fill_background(image, mask, self.fill, fill_seed)
        return np.ascontiguousarray(image), None if mask is None else np.ascontiguousarray(mask)


def fit_square(image: np.ndarray, side: int) -> np.ndarray:
    """Fit an image, uint8 (H, W, 3 or 4), into the middle of a gray square; a fourth channel, the mask, is padded with 0.

    Antialiased bicubic, the same as Pillow's BICUBIC. On grocery40 and tools17, at 96 and 160 px with mobilenetv2_035, as good as
    INTER_AREA (on average -0.10 points by nearest centroid, +0.12 by linear classifier) and better than BILINEAR (-0.35, -0.06).
    """
    factor = side / max(image.shape[:2])
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    if (height, width) != image.shape[:2]:
        # torch's uint8 kernel takes a quarter of the time of cv2's INTER_AREA
        writable = image if image.flags.writeable else image.copy()  # torch warns about read-only arrays
        pixels = torch.from_numpy(writable)[None].permute(0, 3, 1, 2)
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        image = pixels[0].permute(1, 2, 0).numpy()
    square = np.full((side, side, image.shape[2]), PADDING_GRAY, dtype=np.uint8)
    square[:, :, 3:] = 0
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def move_square(square: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move and flip a square, uint8 (S, S, 3 or 4), at random, with its mask in the fourth channel."""
    matrix = draw_move(rng, len(square))
    if matrix is not None:
        # cv2 takes twice as long for three channels as for four; the result is the same.
        pixels = square if square.shape[2] == 4 else cv2.cvtColor(square, cv2.COLOR_RGB2RGBA)
        moved = cv2.warpPerspective(pixels, matrix, pixels.shape[:2], borderValue=(PADDING_GRAY,) * 3 + (0,))
        square = moved if square.shape[2] == 4 else cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB)
    return cv2.flip(square, 1) if rng.random() < 0.5 else square


def draw_move(rng: np.random.Generator, side: int) -> np.ndarray | None:
    """Draw a random move as a matrix (3, 3), source to target in homogeneous px; None, about half of the time, for no move.

    Covers views of a workbench: tools lie in any direction, and crops are loose. The probabilities are low because a frozen
    backbone works best on upright, clean photos: on tools17, twice these (and rotation in half of the samples) cost prototype
    matching 3 to 4 points, more than any other choice of the recipe.
    """
    centre, moves = np.full(2, side / 2 - 0.5), []

    def add(linear: np.ndarray, shift: np.ndarray) -> None:
        matrix = np.eye(3)
        matrix[:2, :2] = linear
        matrix[:2, 2] = shift + centre - linear @ centre
        moves.append(matrix)

    if rng.random() < 0.2:
        angle = rng.uniform(-math.pi, math.pi)
        add(np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]), np.zeros(2))
    if rng.random() < 0.25:
        scale = np.diag(rng.uniform(0.85, 1.1, 2))
        add(scale, rng.uniform(-0.06, 0.06, 2) * side)
    if rng.random() < 0.12:  # a tilted camera, drawn as albumentations' Perspective does
        square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
        jitter = np.abs(rng.normal(0, rng.uniform(0.02, 0.08), (4, 2))) % 0.32  # corners stay in their quarter
        corners = np.abs(square - jitter)
        top, right, bottom, left = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)
        # With keep_size albumentations enlarges twice: the quadrangle to the image, then by the part cut off.
        zoom = np.array([max(top, bottom), max(right, left)])
        source, target = (corners * side).astype(np.float32), (square / zoom * side).astype(np.float32)
        moves.append(cv2.getPerspectiveTransform(source, target))
    return functools.reduce(lambda before, move: move @ before, moves) if moves else None  # one warp, as each blurs


class ListEntry(NamedTuple):
    """One entry of a list of transforms."""

    where: str  # place in the configuration, for messages
    kind: str  # the type in lower case, without underscores
    type: str  # as the user wrote it
    arguments: dict[str, Any]


def production_transforms(config: Config) -> list[dict[str, Any]]:
    """Return the listed transforms that evaluation applies to a crop, as any other program that embeds crops must."""
    lists = given_lists(config)
    lists.pop("train_augmentations", None)
    entries = itertools.chain(*lists.values())
    return [{"type": entry.type, **entry.arguments} for entry in entries if entry.kind not in DEVICE_TRANSFORMS]


def make_transform(config: Config, mean: Sequence[float], augment: bool = False) -> Transform:
    """Return the `Transform` of a run whose backbone subtracts this mean, RGB in 0..1."""
    fill = make_fill(config, mean)
    return build_transform(config.img_size, augment, fill, given_lists(config), config.in_channels == 4)


def check_transforms(config: Config) -> None:
    """Check the lists of transforms, and try them on a random image before anything is loaded. Raises UserError."""
    lists = given_lists(config)
    given_normalization(config)
    for chosen in ("train_augmentations", "val_augmentations"):
        normalize = ""
        for entry in itertools.chain(*(lists.get(name, ()) for name in ("pre_transforms", chosen, "post_transforms"))):
            if normalize and entry.kind not in DEVICE_TRANSFORMS:
                problem = f"comes after {normalize} (normalize), which is done last, on the device"
                raise UserError(problem, entry.where, "put it before")
            normalize = entry.where if entry.kind == "normalize" else normalize
    side = max(512, 2 * config.img_size)
    image = np.random.default_rng(0).integers(0, 256, (side, side + 64, 3), dtype=np.uint8)
    try_transforms(config, lists, image, "a picture")


def given_normalization(config: Config) -> tuple[tuple[float, ...], ...]:
    """Return mean and std of the options or lists, three numbers each; () and () stand for the model's. Raises UserError."""
    requested = (config.mean, config.std)
    for where, kind, _, arguments in itertools.chain(*given_lists(config).values()):
        if kind != "normalize":
            continue
        import albumentations as A

        _check_arguments(where, A.Normalize, arguments)
        for key, supported in (("max_pixel_value", 255), ("normalization", "standard"), ("p", 1)):
            if arguments.get(key, supported) != supported:
                problem = f"is {arguments[key]}, and the device does (image / 255 - mean) / std alone"
                raise UserError(problem, f"{where}.{key}", "leave it out, and give --mean and --std")
        if "mean" not in arguments and "std" not in arguments:  # the model's values apply
            continue
        for key, lowest in (("mean", 0), ("std", 0.001)):
            values = arguments.get(key)
            is_triple = isinstance(values, (list, tuple)) and len(values) == 3
            if not is_triple or not all(isinstance(value, (int, float)) and lowest <= value <= 1 for value in values):
                problem = f"is not a list of three numbers from {lowest} to 1"
                raise UserError(problem, f"{where}.{key}", "for example [0.5, 0.5, 0.5]")
        pair = tuple(map(float, arguments["mean"])), tuple(map(float, arguments["std"]))
        if requested[0] and pair != requested:
            problem = f"has mean {pair[0]} and std {pair[1]}, and elsewhere they are {requested[0]} and {requested[1]}"
            raise UserError(problem, where, "the device normalises once: give one mean and std")
        requested = pair
    return requested


def check_transforms_fit(scan: Scan, config: Config) -> list[str]:
    """Try the lists of transforms on the crops of extreme size before training; return warnings. Raises UserError."""
    lists, records, is_random = given_lists(config), scan.records, False
    width, height = scan.crops["width"].astype(float), scan.crops["height"].astype(float)
    extremes = {int(size.argmin()) for size in (width, height, width * height, width / height, height / width)}
    for path in records.paths[sorted(extremes)] if lists else ():
        with contextlib.suppress(ImageError):  # a file removed since the scan
            is_random |= try_transforms(config, lists, load_image(records.root / path, records.image_bits), path)
    note = "evaluation and production are random: pre_transforms, val_augmentations or post_transforms draw lots"
    return [note] if is_random else []


def given_lists(config: Config) -> dict[str, list[ListEntry]]:
    """Return the given lists of transforms by option. Raises UserError for an entry without a type."""
    given = {name: getattr(config, name) for name in TRANSFORM_LISTS}
    return {name: _read_entries(config.place(name), entries) for name, entries in given.items() if entries is not None}


def try_transforms(config: Config, lists: dict[str, list[ListEntry]], image: np.ndarray, name: str) -> bool:
    """Return whether the lists are random in evaluation. Raises UserError if they fail on the image, in training or evaluation."""
    views: set[bytes] = set()
    for augment in (True, False) if lists else ():
        transform = build_transform(config.img_size, augment, lists=lists)
        try:
            views = {transform(image, None, seed).tobytes() for seed in range(8)}
            transform(image, np.full(image.shape[:2], 255, np.uint8), 1)
        except ImageError as error:
            problem = f"fail on {name} of {image.shape[1]} x {image.shape[0]} px: {error}"
            remedy = "put longest_max_size and pad_if_needed before that, change it, or leave it out"
            raise UserError(problem, ", ".join(map(config.place, lists)), remedy) from error
    return len(views) > 1


def build_transform(
    img_size: int,
    augment: bool,
    fill: Fill | None = None,
    lists: dict[str, list[ListEntry]] | None = None,
    shows_mask: bool = False,
) -> Transform:
    """Build a `Transform`: `augment` for training, `lists` from `given_lists`. Raises UserError."""
    fill, lists = fill or Fill("gray", (PADDING_GRAY,) * 3), lists or {}
    if not lists and not augment:
        return Transform(img_size, fill, shows_mask=shows_mask)
    import albumentations as A

    cv2.setNumThreads(0)  # loader workers are the parallelism
    steps = {}
    for name, entries in lists.items():
        entries = [entry for entry in entries if entry.kind not in DEVICE_TRANSFORMS]  # the device normalises
        built = (Policy(e) if e.kind in POLICIES else A.Compose([_build_transform(e)]) for e in entries)
        steps[name] = tuple(built)
    chosen = "train_augmentations" if augment else "val_augmentations"
    colours = None
    if augment and chosen not in lists:  # lighting, cameras, compression, and occlusion
        hole = (0.05, 0.18)
        colours = A.Compose([
            A.RandomBrightnessContrast(brightness_limit=0.25, contrast_limit=0.25, p=0.25),
            A.HueSaturationValue(hue_shift_limit=8, sat_shift_limit=25, val_shift_limit=15, p=0.2),
            A.RandomGamma(gamma_limit=(75, 130), p=0.12),
            A.CLAHE(clip_limit=(1.0, 3.0), p=0.05),
            A.GaussNoise(std_range=(0.01, 0.05), p=0.1),
            A.MotionBlur(blur_limit=(3, 7), p=0.05),
            A.ImageCompression(quality_range=(50, 95), p=0.1),
            A.CoarseDropout((1, 4), hole_height_range=hole, hole_width_range=hole, fill=PADDING_GRAY, p=0.12),
        ])  # fmt: skip
    pre_steps, post_steps = steps.get("pre_transforms", ()), steps.get("post_transforms", ())
    return Transform(img_size, fill, colours, augment, pre_steps, steps.get(chosen), post_steps, shows_mask)


class Policy:
    """torchvision's RandAugment (arXiv:1909.13719) or TrivialAugment (arXiv:2103.10158) as a step of `Transform._apply`.

    It is applied with the probability `p` of its entry; its moves also move the mask, which torchvision refuses.
    """

    def __init__(self, entry: ListEntry) -> None:
        from torchvision.transforms import v2

        self.kind = entry.kind  # name in error messages
        arguments = {"fill": [PADDING_GRAY] * 3, **entry.arguments}
        self._probability = arguments.pop("p", 1.0)
        if not isinstance(self._probability, (int, float)) or not 0 <= self._probability <= 1:
            raise UserError(f"{self._probability} is no probability", f"{entry.where}.p", "give a number from 0 to 1")
        policy = _construct(entry.where, getattr(v2, POLICIES[entry.kind]), arguments)
        bins, magnitude = policy.num_magnitude_bins, getattr(policy, "magnitude", 0)
        if not (isinstance(bins, int) and isinstance(magnitude, int) and bins > 1 and 0 <= magnitude < bins):
            remedy = "give a whole number from 0 to num_magnitude_bins - 1, and two bins or more"
            raise UserError(f"magnitude {magnitude} is none of {bins} bins", entry.where, remedy)
        self._policy = policy
        policy._apply_image_or_video_transform = self._apply_operation

    def set_random_state(self, rng: np.random.Generator, _: random.Random) -> None:
        """Take the generator of the sample, as transforms of albumentations do."""
        self._rng = rng

    def __call__(self, image: np.ndarray, mask: np.ndarray | None = None) -> dict[str, Any]:
        if self._rng.random() >= self._probability:
            return {"image": image, "mask": mask}
        self._mask = None if mask is None else torch.from_numpy(mask.copy())[None]
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator, which training uses
            torch.default_generator.manual_seed(int(self._rng.integers(2**62)))
            moved = self._policy(torch.from_numpy(image.copy()).permute(2, 0, 1))
        mask = None if mask is None else self._mask[0].numpy()
        return {"image": np.ascontiguousarray(moved.permute(1, 2, 0).numpy()), "mask": mask}

    def _apply_operation(self, image: torch.Tensor, transform_id: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        apply = functools.partial(type(self._policy)._apply_image_or_video_transform, self._policy)
        if self._mask is not None and transform_id in POLICY_MOVES:
            self._mask = apply(self._mask, transform_id, *args, **kwargs | {"fill": {torch.Tensor: [0]}})
        return apply(image, transform_id, *args, **kwargs)


# Lists of transforms: each entry is checked and becomes a step. A UserError names the place of the entry in its file.
def _build_transform(entry: ListEntry) -> Any:
    """Return the albumentations transform of an entry; its argument `transforms`, e.g. of OneOf, holds entries too."""
    import albumentations as A

    bases = (A.BasicTransform, A.BaseCompose, A.DualTransform, A.ImageOnlyTransform, A.Transform3D)
    classes = [value for value in vars(A).values() if inspect.isclass(value) and issubclass(value, bases)]
    # By lower-case name, which `entry.kind` is, without underscores: so coarse_dropout, rgb_shift and RGBShift all match.
    known = {value.__name__.lower(): value for value in classes if value not in bases}
    where = entry.where
    is_nested = "].transforms[" in where
    if is_nested and entry.kind in (*POLICIES, *DEVICE_TRANSFORMS):
        raise UserError(f"{entry.type} cannot stand inside another transform", where, "put it into the list itself")
    if entry.kind not in known:
        long_names = [transform.__name__ for transform in known.values()]
        short_names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in long_names]
        names = [*short_names, *long_names, *POLICIES, "to_tensor"]
        problem = f"{entry.type} is no transform of albumentations {A.__version__}"
        remedy = did_you_mean(entry.type, names, "https://albumentations.ai/docs lists them")
        raise UserError(problem, f"{where}.type", remedy)
    transform, arguments = known[entry.kind], dict(entry.arguments)
    parameters = inspect.signature(transform).parameters
    for old, new in RENAMED_ARGUMENTS.items():
        if old in arguments and old not in parameters and new in parameters and new not in arguments:
            arguments[new] = arguments.pop(old)
    for new, (low, high) in RANGE_ARGUMENTS.items():
        if high in arguments and high not in parameters and new in parameters and new not in arguments:
            end = arguments.pop(high)
            start = arguments.pop(low, None)
            arguments[new] = [end if start is None else start, end]
    for key, value in arguments.items():
        if isinstance(value, str) and re.fullmatch(r"(cv2\.)?(INTER|BORDER)_[A-Z0-9_]+", value):
            arguments[key] = getattr(cv2, value.removeprefix("cv2."), value)
    if isinstance(arguments.get("transforms"), list):
        inner = _read_entries(f"{where}.transforms", arguments["transforms"])
        arguments["transforms"] = [_build_transform(item) for item in inner]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(special case|specialized|an alias|very slow)")  # only advice
        return _construct(where, transform, arguments)


def _read_entries(where: str, entries: Iterable[Any]) -> list[ListEntry]:
    parsed = []
    for number, entry in enumerate(entries):
        place = f"{where}[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise UserError("has no type", place, "write an entry such as {type: coarse_dropout, p: 0.5}")
        arguments = {key: value for key, value in entry.items() if key != "type"}
        if isinstance(arguments.get("always_apply"), bool):  # of albumentations 1
            arguments |= {"p": 1.0} if arguments.pop("always_apply") else {}
        parsed.append(ListEntry(place, entry["type"].replace("_", "").lower(), entry["type"], arguments))
    return parsed


def _construct(where: str, transform: Callable, arguments: dict[str, Any]) -> Any:
    _check_arguments(where, transform, arguments)
    try:
        return transform(**arguments)
    except Exception as error:  # libraries raise any type; albumentations wraps pydantic's errors
        cause = error.__cause__ if hasattr(error.__cause__, "errors") else error
        details = cause.errors()[0] if hasattr(cause, "errors") else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, (where, *details["loc"][:1])))
        problem = f"cannot be used: {' '.join(str(details['msg']).split())[:200]}"
        raise UserError(problem, place, f"see {transform.__name__} in the documentation of its library") from error


def _check_arguments(where: str, transform: Callable, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(transform).parameters
    for key in (key for key in arguments if key not in parameters):
        remedy = did_you_mean(str(key), parameters, f"it has {', '.join(parameters)}")
        for new in (new for new, pair in RANGE_ARGUMENTS.items() if key in pair and new in parameters):
            remedy = f"write {new}: [low, high]"
        raise UserError(f"is no argument of {transform.__name__}", f"{where}.{key}", remedy)


# Backgrounds: pictures on which crops are pasted before they are transformed. Each is checked once, like the data set's images.
@dataclass(frozen=True)
class Backgrounds:
    """Pictures on which training pastes crops."""

    reasons: dict[str, str]  # path of a picture in the folder -> why it cannot be used
    root: Path
    paths: np.ndarray  # STRINGS; usable pictures, relative to root
    identity: str  # must be equal for a run to resume
    probability: float  # that a sample gets a background
    max_ratio: float  # largest ratio of a canvas side to the side of the crop
    max_side: int  # px; larger crops are shrunk to it first: one of 2000 x 1500 px takes 180 ms

    def generator_for(self, seed: int) -> np.random.Generator | None:
        """Return the random generator of a sample that gets a background, None for the others."""
        rng = np.random.default_rng((seed, BACKGROUND_DRAW))
        return rng if rng.random() < self.probability else None

    def insert(self, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
        """Paste the crop at a random place on a canvas, uint8 (H, W, 3), 1 to `max_ratio` times as large along each axis.

        The canvas is a random region of a random picture, rotated by k * 90 degrees and flipped at random. With a mask, only what
        exceeds MASK_LEVEL is pasted; its edge fades out over the first pixels outside. Raises ImageError for an unreadable picture.
        """
        path = self.paths[int(rng.integers(len(self.paths)))]
        try:
            picture = load_image(self.root / path)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
        factor = self.max_side / max(image.shape[:2])
        if factor < 1:
            size = [max(1, round(length * factor)) for length in image.shape[1::-1]]
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            mask = None if mask is None else cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
        height, width = image.shape[:2]
        canvas_size = [round(length * rng.uniform(1, self.max_ratio)) for length in (height, width)]
        turned = np.rot90(picture, int(rng.integers(4)))
        turned = turned[:, ::-1] if rng.random() < 0.5 else turned
        # At least half as long and wide as the largest region with the canvas's aspect ratio: large regions show a background best.
        scale = min(turned.shape[0] / canvas_size[0], turned.shape[1] / canvas_size[1]) * rng.uniform(0.5, 1.0)
        sides = [min(max(1, round(canvas_size[axis] * scale)), turned.shape[axis]) for axis in (0, 1)]
        top, left = (int(rng.integers(turned.shape[axis] - sides[axis] + 1)) for axis in (0, 1))
        region = np.ascontiguousarray(turned[top : top + sides[0], left : left + sides[1]])
        canvas = cv2.resize(region, canvas_size[::-1], interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR)
        top, left = (int(rng.integers(room + 1)) for room in (canvas_size[0] - height, canvas_size[1] - width))
        target = canvas[top : top + height, left : left + width]
        if mask is None:
            target[:] = image
            return canvas
        solid = (mask > MASK_LEVEL).astype(np.float32)
        softness = max(1.0, 0.005 * max(height, width))  # px; relative to the crop, so equal after fitting
        alpha = np.maximum(solid, cv2.GaussianBlur(solid, (0, 0), softness))[:, :, None]
        target[:] = np.rint(alpha * image + (1 - alpha) * target)
        return canvas

    def describe(self) -> str:
        """Return lines for the log: the number of usable pictures, and up to ten that cannot be used."""
        unused = [f"warning: not used as a background: {path}: {why}" for path, why in self.reasons.items()]
        more = [f"  ... and {len(unused) - 10} more"] if len(unused) > 10 else []
        return "\n".join([f"backgrounds: {len(self.paths):,} pictures in {self.root}", *unused[:10], *more])


def scan_backgrounds(config: Config, memory: FileMemory) -> Backgrounds | None:
    """Check all pictures of --backgrounds; None if --insert_background_p is 0. Raises UserError if no picture is usable."""
    if not config.insert_background_p:
        return None
    root, tree = config.backgrounds, list_image_tree(config.backgrounds)
    rows, reasons = check_files(root, tree.paths, "background", IMAGE_DTYPE, check_image, memory)
    reasons |= dict(tree.problems)
    usable = np.flatnonzero(~rows["broken"])
    if not len(usable):
        reason = next((f": {path} {reason}" for path, reason in reasons.items()), ", for it has no images")
        where, remedy = f"{config.place('backgrounds')} {root}", f"give a folder with {' '.join(IMAGE_SUFFIXES)} files"
        raise UserError(f"holds no picture that can be used{reason}", where, remedy)
    paths = np.array(tree.paths, dtype=STRINGS)[usable]
    share, max_ratio = config.insert_background_p, config.background_max_ratio
    identity = f"{len(paths)} pictures of contents {fingerprint(list(paths), rows['digest'][usable])}"
    identity += f", p {share}, max_ratio {max_ratio}"
    return Backgrounds(reasons, root, paths, identity, share, max_ratio, max_side=2 * config.img_size)


# Mixing of the images of a batch, on the device. The draws are a function of seed, epoch and batch number.
class Mixing(NamedTuple):
    """How a batch is mixed: each image with the image of its partner."""

    partners: torch.Tensor  # int64 (B,), a permutation
    lam: float  # lambda, the weight of the image itself: at least a half, less the rounding of the box
    box: tuple[int, int, int, int] | None  # top, bottom, left, right of the region from the partner; None = MixUp


def draw_mixing(config: Config, place: tuple[int, int], images: torch.Tensor, num_images: int) -> Mixing | None:
    """Draw how a batch of `num_images` over all ranks is mixed; None if it is not. `place` is its epoch and its batch number.

    MixUp: arXiv:1710.09412. CutMix: arXiv:1905.04899, with lambda measured on the clipped box. lambda is folded to at least a half,
    less the rounding of the box; in MixUp that only swaps image and partner. `images`, (b, C, H, W), are those of this rank.
    """
    rng = np.random.default_rng((config.seed, MIXING_DRAW, *place))
    if config.mixing == "none" or rng.random() >= config.mixing_p:
        return None
    lam = float(rng.beta(config.mixing_alpha, config.mixing_alpha))
    lam, partners = max(lam, 1 - lam), torch.from_numpy(rng.permutation(num_images))
    if config.mixing == "mixup":
        return Mixing(partners, lam, None)
    height, width = images.shape[-2:]
    box = []
    for length in (height, width):
        reach, centre = length * math.sqrt(1 - lam) / 2, rng.uniform(0, length)
        box += [max(0, round(centre - reach)), min(length, round(centre + reach))]
    area = (box[1] - box[0]) * (box[3] - box[2])
    return Mixing(partners, 1 - area / (height * width), tuple(box))


def mix_images(images: torch.Tensor, mixing: Mixing) -> torch.Tensor:
    """Mix the images (B, C, H, W) of a batch over all ranks; the result has their dtype and is channels last in memory."""
    partners = images[send(mixing.partners, images.device)]
    if mixing.box is None:
        mixed = torch.lerp(partners.float(), images.float(), mixing.lam).round().to(images.dtype)
    else:
        top, bottom, left, right = mixing.box
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
    return mixed.contiguous(memory_format=torch.channels_last)


# ======================================================================================================================
# 08  LOADERS
# ======================================================================================================================
# Samples, their order, and batches of uint8 images, decoded or read from the fitted crops that the run has stored. A crop that
# cannot be read is left out of its batch and reported.
SQUARES_SYNC_BYTES = 1 << 28  # bytes written between fsyncs; a full disk may show only in an fsync
LOADER_RESTARTS = 3  # restarts after killed workers, per epoch or pass over images
LOADER_SECONDS = 600  # without a batch; then the workers count as stuck and are killed
# Beginnings of torch's messages about a dead worker.
DEAD_WORKER = ("DataLoader worker (pid", "Pin memory thread exited")


class Batch(NamedTuple):
    """One batch of a loader."""

    images: torch.Tensor  # uint8 (B, 3 or 4, H, W), channels last in memory; or features, float32 (B, feature_dim)
    labels: torch.Tensor  # int64 (B,)
    rows: torch.Tensor  # int64 (B,) record numbers
    views: torch.Tensor  # uint8 (B,) into VIEW_NAMES
    failures: list[tuple[int, str]]  # record number, and which of its files could not be read and why
    sizes: tuple[int, ...] = ()  # images per rank, where `images` holds this rank's, labels and failures those of all


class SampleKey(NamedTuple):
    """Determines a sample completely, given the files."""

    row: int  # record number
    entropy: tuple[int, ...]  # entropy of its augmentation; () = no randomness
    view: int  # into VIEW_NAMES; a crop without a usable mask looks the same in both
    showing: int = 0  # number of epochs and repetitions before it; selects the view for --cache_views
    augmented: bool = True  # False = the augmentation schedule skips this sample

    @property
    def seed(self) -> int:
        """Seed of the augmentation, 0 without `entropy`. A property, so that workers spend the 18 us, not the main process."""
        return int(np.random.SeedSequence(self.entropy).generate_state(1, np.uint64)[0]) if self.entropy else 0


class SquareFile:
    """Temporary file of fitted crops ("squares"), uint8 (side, side, 3), or 4 channels with the mask last, up to byte `room`.

    It has no name, so that the system frees it with the last process that uses it, even a killed one. It lies on the disk of
    `folder`, which need not exist yet. The file only saves time: if writing fails, it is given up. Threads may write together.
    """

    def __init__(self, folder: Path, side: int, room: int) -> None:
        self.side, self.room, self.end = side, room, 0
        self.places: dict[str, int] = {}  # first byte of each square of `keep_image`, by path
        self.failure: OSError | None = None
        self.file: BinaryIO | None = None
        self._folder, self._guard = folder, threading.Lock()

    def keep_image(self, path: str, image: np.ndarray) -> None:
        """Fit a decoded image, and store the square."""
        self.places[path] = self.put(fit_square(image, self.side))

    def put(self, square: np.ndarray) -> int:
        """Store a square, and return its first byte, or -1 if it is not stored."""
        try:
            with self._guard:
                place = self.end
                if place + square.nbytes > self.room:
                    return -1
                if self.file is None:
                    self.file = tempfile.TemporaryFile(dir=existing_folder(self._folder))  # noqa: SIM115
                self.end += square.nbytes
            if os.pwrite(self.file.fileno(), square, place) < square.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if place // SQUARES_SYNC_BYTES < (place + square.nbytes) // SQUARES_SYNC_BYTES:
                os.fsync(self.file.fileno())
        except OSError as error:
            self.give_up(error)
            return -1
        return place

    def give_up(self, failure: OSError) -> None:
        """Store no further squares, and free the disk space."""
        with self._guard:
            self.failure, self.room = failure, 0
            if self.file is not None:  # not closed: another thread may be writing
                with contextlib.suppress(OSError):
                    self.file.truncate(0)

    def flush(self) -> None:
        """Write all squares to the disk, which may turn out to be full."""
        if self.file is not None and self.failure is None:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                self.give_up(error)


class SquareStore:
    """Memory map of a `SquareFile`: its squares equal newly fitted crops. The system caches the pages once for all processes."""

    def __init__(self, file: BinaryIO, records: Records, places: np.ndarray, side: int) -> None:
        self.records = records  # rows of other records, e.g. of unknown objects, mean other crops
        self.places = places  # int64 (2, N), [plain or masked, record] -> first byte, -1 = not stored
        self._file, self._side = file, side
        self._bytes = np.asarray(np.memmap(file, np.uint8, "r"))

    def __reduce__(self) -> tuple[Any, ...]:
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"  # the file has no other name
        return _reopen_store, (stat_files(Path(), [path]), path, self.records, self.places, self._side)

    def get(self, row: int, is_masked: bool) -> np.ndarray | None:
        """Return a square, read-only uint8 (side, side, 3 or 4); None if it is not stored."""
        place = int(self.places[int(is_masked), row])
        shape = (self._side, self._side, 4 if is_masked else 3)
        return None if place < 0 else self._bytes[place : place + math.prod(shape)].reshape(shape)


def _reopen_store(stamp: np.ndarray, path: str, *arguments: Any) -> SquareStore | None:
    """Reopen a store in another process; None where it is not found, e.g. on another machine, where crops are then decoded."""
    if not np.array_equal(stat_files(Path(), [path]), stamp):
        return None
    return SquareStore(open(path, "rb"), *arguments)


class CropDataset(Dataset):
    """Crops by `SampleKey`. The key carries all randomness, so workers need no random state."""

    def __init__(
        self, records: Records, transform: Transform, backgrounds: Backgrounds | None = None, store: Any = None
    ) -> None:
        """Read crops of these records, from `store` if it holds squares of the same `Records` object."""
        self.records, self.transform, self.backgrounds = records, transform, backgrounds
        self.store = store if store is not None and store.records is records else None

    def __getitem__(self, key: SampleKey) -> tuple[np.ndarray | None, SampleKey, str]:
        seed, is_masked = key.seed, bool(self.records.mask_of(key.row, key.view))
        rng = self.backgrounds.generator_for(seed) if self.backgrounds else None
        problem = ""
        try:
            if self.store is not None and rng is None and self.transform.is_cacheable(is_masked):
                square = self.store.get(key.row, is_masked)
                if square is not None:
                    return self.transform.finish(square, seed, key.augmented), key, ""
            view = key.view if rng is None else 1  # a background needs the object's mask in any view
            try:
                image, mask, reason = load_crop(self.records, key.row, view)
            except ImageError as error:
                return None, key, f"cannot be read any more and is left out: {error}"
            if reason:
                problem = f"is used with its background, since its mask cannot be read any more: {reason}"
            if rng is not None:
                try:
                    image, mask = self.backgrounds.insert(image, mask, rng), None
                except ImageError as error:
                    mask = mask if key.view else None
                    reason = f"is used without the background that cannot be read any more: {error}"
                    problem = "; ".join(filter(None, (problem, reason)))
            return self.transform(image, mask, seed, key.augmented), key, problem
        except ImageError as error:
            return None, key, f"is left out: {error}"

    def collate(self, samples: list[tuple[np.ndarray | None, SampleKey, str]]) -> Batch:
        """Stack the images that could be read; collect why files could not be, also masks and backgrounds that are left out."""
        images = [image for image, _, _ in samples if image is not None]
        stacked = np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
        keys = [key for image, key, _ in samples if image is not None]
        rows = np.array([key.row for key in keys], dtype=np.int64)
        return Batch(
            images=torch.from_numpy(stacked).permute(0, 3, 1, 2),
            labels=torch.from_numpy(self.records.labels[rows].astype(np.int64)),
            rows=torch.from_numpy(rows),
            views=torch.tensor([key.view for key in keys], dtype=torch.uint8),
            failures=[(key.row, reason) for _, key, reason in samples if reason],
        )


# The second number of a seed separates random streams. In (config.seed, number, ...): 0 splits, 1 order of an epoch, 2 order within
# a class, 3 augmentation of a sample, 4 images of logistic regression, 6 views of an epoch, 7 masked views of --cache_views,
# 8 samples that are augmented, 9 mixing of a batch, also folds, order and enrolled crops of `measure_unseen`; of torch: 0 backbone,
# 1 head and class vectors, 5 dropout. In (seed of a sample, number): 1 colour of a random fill, 2 background, 3 pre-transforms,
# 4 a list of transforms, 5 post-transforms.
class EpochSampler(Sampler):
    """Batches of sample keys for one epoch: a function of the epoch and the number of finished batches, both set by `start_at`.

    Plain: each training image once. Balanced: `per_class` images of each class; its sequence of shuffles continues across epochs.
    """

    def __init__(self, rows: np.ndarray, labels: np.ndarray, config: Config) -> None:
        self.rows, self.labels, self.epoch, self.first_batch = rows, labels, 0, 0
        self.rank, self.world_size = 0, 1  # only this rank's part of each batch is yielded
        self.config, self.seed, self.batch = config, config.seed, config.batch
        self.masked_share = {"bbox": 0.0, "mask": 1.0, "mix": config.mix_mask_p}[config.crop_mode]
        self.per_class = config.samples_per_class if config.balanced_per_class else None

    def __len__(self) -> int:
        samples = len(self.rows) if self.per_class is None else self.per_class * len(np.unique(self.labels[self.rows]))
        return len(batch_borders(samples, self.batch)) - 1

    def start_at(self, epoch: int, first_batch: int) -> None:
        """Let the next iteration yield the batches of `epoch` from `first_batch` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rows = self.rows if self.per_class is None else self._balanced_rows()
        rows = rows[np.random.default_rng((self.seed, 1, self.epoch)).permutation(len(rows))]
        views = np.random.default_rng((self.seed, 6, self.epoch)).random(len(rows)) < self.masked_share
        # Epoch e, from 0, augments a share of its samples: p(e) = start + (end - start) (e / (E - 1))^exponent.
        done = min(1.0, self.epoch / max(1, self.config.epochs - 1))
        growth = self.config.aug_end_p - self.config.aug_start_p
        share = self.config.aug_start_p + growth * done**self.config.aug_exponent
        augmented = np.random.default_rng((self.seed, 8, self.epoch)).random(len(rows)) < share
        repetitions: Counter[int] = Counter()  # earlier showings of an image in the epoch
        for number, (start, stop) in enumerate(itertools.pairwise(batch_borders(len(rows), self.batch))):
            keys = []
            drawn = zip(*(values[start:stop].tolist() for values in (rows, views, augmented)), strict=True)
            for row, view, is_augmented in drawn:
                entropy = (self.seed, 3, self.epoch, row, repetitions[row])
                keys.append(SampleKey(row, entropy, int(view), self.epoch + repetitions[row], is_augmented))
                repetitions[row] += 1
            if number >= self.first_batch:
                yield keys[len(keys) * self.rank // self.world_size : len(keys) * (self.rank + 1) // self.world_size]

    def _balanced_rows(self) -> np.ndarray:
        chosen = []
        labels, first = self.labels[self.rows], self.epoch * self.per_class  # first position in the sequence
        for label, positions in enumerate(rows_by_class(labels, int(labels.max()) + 1)):
            if not len(positions):
                continue
            rows = self.rows[positions]
            turns = range(first // len(rows), (first + self.per_class - 1) // len(rows) + 1)
            shuffles = [np.random.default_rng((self.seed, 2, label, turn)).permutation(rows) for turn in turns]
            start = first - turns[0] * len(rows)
            chosen.append(np.concatenate(shuffles)[start : start + self.per_class])
        return np.concatenate(chosen)


def batch_borders(num_samples: int, batch: int) -> list[int]:
    """Return the borders of the batches; a last batch of one sample joins the previous one: BatchNorm cannot train on it."""
    borders = [*range(0, num_samples, batch), num_samples]
    if len(borders) > 2 and borders[-1] - borders[-2] == 1:
        del borders[-2]
    return borders


def make_loader(dataset: CropDataset, batches: Any, config: Config | RunOptions, runtime: Runtime) -> DataLoader:
    """Return a loader over batches of sample keys; what it yields does not depend on the number of workers."""
    workers = count_workers(config.workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate,
        num_workers=workers,
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
        pin_memory=runtime.num_gpus > 0,
    )


def count_workers(workers: int | None) -> int:
    """Return the loader workers of a rank, at most its part of the cores. None: one fewer, for training; 1 to MAX_WORKERS."""
    cores = -(-count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return min(max(cores - 1, 1), MAX_WORKERS) if workers is None else min(workers, cores)


def start_worker(_: int) -> None:
    """Prepare a worker process: it leaves signals to the main process, writes nothing to stderr and uses one thread."""
    # libjpeg writes a line to stderr about each file that it repairs, in every epoch; failures are raised in the main process.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # sent to the whole terminal or job; main decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # a scheduler's SIGTERM is no failure of the worker
    torch.set_num_threads(1)
    # Otherwise a batch that cannot be sent, e.g. for lack of file descriptors, is dropped, and the loader waits forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))


class DeadWorker(Exception):
    """Loader workers died more often than LOADER_RESTARTS allows; the text is the last reason."""


def take_turns(
    loader: Callable[[Any], DataLoader], batches: Sequence[Any], answer: Callable[[Any], Any]
) -> Iterator[Any]:
    """Yield the answer to each batch, in order, on rank 0, and nothing on other ranks; the ranks take turns at the batches.

    `loader` makes a loader of a sequence of batches; `answer` turns a loaded batch into the object that rank 0 gathers.
    """
    batches_of_rank = batches[get_rank() :: get_world_size()]
    read = outlive_workers(lambda _, num_yielded: loader(batches_of_rank[num_yielded:]), show)
    for _ in range(-(-len(batches) // get_world_size())):
        batch = next(read, None)
        yield from gather_answers(None if batch is None else answer(batch))


def outlive_workers(read: Callable[[int, int], Iterable[Any]], say: Callable[[str], None]) -> Iterator[Any]:
    """Yield the batches of a loader; restart it if a worker is killed, e.g. for lack of memory.

    Workers are also killed if no batch comes for LOADER_SECONDS. `read(failed_loaders, yielded_batches)` starts a loader. Raises
    DeadWorker if a loader fails after LOADER_RESTARTS restarts.
    """
    num_yielded = 0
    is_stalled = threading.Event()

    def kill_workers() -> None:
        is_stalled.set()
        for worker in multiprocessing.active_children():
            worker.kill()

    for num_failed in itertools.count():
        is_stalled.clear()
        try:
            iterator = iter(read(num_failed, num_yielded))
            # torch's handler would raise anywhere, even in the middle of a step; the loader itself also notices a dead worker.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            while True:
                timer = threading.Timer(LOADER_SECONDS, kill_workers)
                timer.daemon = True
                timer.start()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                finally:
                    timer.cancel()
                num_yielded += 1
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            # torch noticed a dead worker, or a batch cannot be fetched from one
            if isinstance(error, RuntimeError) and not str(error).startswith(DEAD_WORKER):
                raise
            reason = printable(str(error) or type(error).__name__)[:200]
            if is_stalled.is_set():
                reason = f"no batch came for {LOADER_SECONDS} s"
            if num_failed == LOADER_RESTARTS:
                raise DeadWorker(reason) from error
            warning = f"warning: a loader worker was killed ({reason}); the loader is started again at this batch"
            if get_rank():  # `say` is silent here, and rank 0 does not know
                print(f"process {get_rank()}: {warning}", file=sys.stderr, flush=True)
            else:
                say(warning)
            iterator = None  # ends the other workers before new ones start


def eval_keys(records: Records, rows: np.ndarray, crop_mode: str) -> list[SampleKey]:
    """Return the samples of an evaluation: bbox and mask show each crop once, mix shows crops with a mask in both views."""
    has_mask = records.has_mask[rows]
    views = has_mask & (crop_mode == "mask")
    keys = [SampleKey(row, (), int(view)) for row, view in zip(rows.tolist(), views, strict=True)]
    return keys + [SampleKey(row, (), 1) for row in rows[has_mask & (crop_mode == "mix")].tolist()]


def cut_batches(keys: list[SampleKey], batch: int) -> list[list[SampleKey]]:
    """Cut the keys, in order, into batches of 1 / world_size of `batch`, so that all ranks together take `batch` at a time."""
    batch = -(-batch // get_world_size())
    return [keys[start : start + batch] for start in range(0, len(keys), batch)]


# ======================================================================================================================
# 09  MODEL
# ======================================================================================================================
# Backbone with normalisation, embedding head, and the loading of weights. Raises UserError for a model or weights that do not fit.
HEAD_WIDTHS = (512, 192)  # hidden units of a single embedding head, and of each of several parallel heads
PRETRAINED_VIT = "vit_small_patch16_224"  # timm's name for the model of tools/slt/models.py; only the sizes differ
# Prefixes that training scripts put before parameter names; the fallback for names that are not the model's.
WEIGHT_WRAPPERS = re.compile(
    r"((state_dict_ema|model_ema|state_dict|model_state_dict|teacher|model|net|module|_orig_mod|backbone|encoder)\.)*"
)
# Matches keys of a backbone: top-level tensors, and layers that change features. Other keys that a model lacks belong to a head.
BACKBONE_PART = re.compile(r"^[^.]*(norm|embed|token|stem|conv|layer|block|stage|bn\d|patch|rope)|^[^.]*$")
HUB_PREFIXES = ("hf-hub:", "local-dir:")  # of model ids outside timm's registry
MIN_HEAD_DIM = 16  # embedding dimensions a head; in one dimension every unit vector is +-1, and nothing can be learned
WEIGHTS_REMEDY = (
    "give --backbone_weights FILE, or copy the hub's cache (~/.cache/huggingface) from a machine that has it, or train"
    " from random weights with --no-pretrained"
)
STATE_DICT_REMEDY = "give a state dict saved by torch.save or safetensors"


class Backbone(nn.Module):
    """A timm model without classifier that takes uint8 images and normalises them on the device.

    A one-channel model gets gray images, normalised by the average of the three means and that of the three deviations; a
    four-channel model gets the mask as its last channel, from -1 (background) to 1 (object).
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], in_channels: int = 3) -> None:
        super().__init__()
        self.model = model
        self.frozen = False  # no parameter of the model is trained
        self.dtype = torch.float32  # of the autocast region
        self.is_rounded = False  # the weights themselves have this dtype, and there is no autocast
        self.hashes: dict[str, str] = {}  # `hash_tensors` of the newly built model
        self.trained_keys: frozenset[str] | None = None  # of the model's state dict; None = all
        self._trained_modules: list[nn.Module] = []  # of a partly frozen model
        self.freezes_batchnorm = False  # training leaves the running statistics of BatchNorm unchanged
        self.replicas: list[Backbone] = []  # copies of a frozen backbone on the GPUs of this process
        for name, values in (("mean", mean), ("std", std)):
            value = torch.tensor((*values, 0.5)[: max(in_channels, 3)], dtype=torch.float32).view(1, -1, 1, 1) * 255
            self.register_buffer(name, value.mean(1, keepdim=True) if in_channels == 1 else value, persistent=False)
        luma = torch.tensor(LUMA).view(1, 3, 1, 1) if in_channels == 1 else None
        self.register_buffer("luma", luma, persistent=False)

    def freeze(self, is_trained: Callable[[str], bool] = lambda name: False) -> None:
        """Keep the model in eval mode and out of autograd from now on, except modules and parameters that `is_trained` selects."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_trained(name))
        self.trained_keys = frozenset(filter(is_trained, self.model.state_dict()))
        self._trained_modules = [module for name, module in self.model.named_modules() if is_trained(name)]
        self.frozen = not self.trained_keys
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode; frozen modules stay in eval mode, and so does BatchNorm under `freezes_batchnorm`."""
        super().train(mode and self.trained_keys is None)
        for module in self._trained_modules:
            module.training = mode
        if self.freezes_batchnorm:
            for module in self.modules():
                module.training &= not is_batchnorm(module)
        return self

    @property
    def rounds_weights(self) -> bool:
        """Whether bf16 weights replace autocast, which would round them in each pass; a CPU keeps it, though 3 to 18 % slower."""
        return self.frozen and self.dtype == torch.bfloat16 and self.mean.device.type == "cuda"

    def with_dtype(self, dtype: torch.dtype) -> Backbone:
        """Return a backbone with the same weights, shared or rounded once, that computes in `dtype`; BatchNorm stays in float32."""
        if dtype == self.dtype:
            return self
        backbone = copy.copy(self)
        backbone._modules = dict(self._modules)
        backbone.replicas = []
        backbone.dtype = dtype
        if backbone.rounds_weights:
            backbone.model = copy.deepcopy(self.model).to(torch.bfloat16)
            for module, original in zip(backbone.model.modules(), self.model.modules(), strict=True):
                if is_batchnorm(original):
                    module.float().load_state_dict(original.state_dict())
            backbone.is_rounded = True
        return backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features float32 (B, feature_dim) of images uint8 (B, 3 or 4, H, W)."""
        if get_world_size() > 1 and not len(images) and not any(map(is_batchnorm, self.modules())):
            # This rank has no images of the batch, and timm's ViTs fail on an empty one.
            return self(images.new_zeros(1, *images.shape[1:]))[:0]
        # Autocast is entered here because it belongs to a thread: DataParallel's replicas would not see an outer one.
        autocast = contextlib.nullcontext()
        if self.dtype != torch.float32 and not self.is_rounded:
            autocast = torch.autocast(images.device.type, dtype=self.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), autocast:
            inputs = images.float() if self.luma is None else (images * self.luma).sum(1, keepdim=True)
            inputs = (inputs - self.mean) / self.std
            return self.model(inputs.to(self.dtype) if self.is_rounded else inputs).float()


class LoraUpdate(nn.Module):
    """A trained low-rank update U D of a frozen weight. Hu et al., "LoRA", arXiv:2106.09685, with alpha = rank.

    As a parametrization, it changes the weight itself: Eva (DINOv3) uses a layer's weight and never calls its forward, so peft's
    update would silently have no effect (and peft depends on transformers and accelerate).
    """

    def __init__(self, out_features: int, in_features: int, rank: int) -> None:
        super().__init__()
        self.lora_down = nn.Parameter(torch.empty(rank, in_features))  # D
        self.lora_up = nn.Parameter(torch.zeros(out_features, rank))  # U: training starts from the frozen weight
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))  # as in nn.Linear

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the updated weight (out_features, in_features)."""
        return weight + self.lora_up @ self.lora_down


class Head(nn.Module):
    """Linear, BatchNorm, ReLU, then one Linear for each of `num_heads` independent heads: (B, feature_dim) -> (B, emb_dim)."""

    def __init__(self, feature_dim: int, emb_dim: int, num_heads: int) -> None:
        super().__init__()
        width = num_heads * HEAD_WIDTHS[num_heads > 1]
        self.hidden = nn.Linear(feature_dim, width)
        self.norm = nn.BatchNorm1d(width)
        self.output = nn.Conv1d(width, emb_dim, kernel_size=1, groups=num_heads)  # one Linear for each head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings before normalisation."""
        hidden = self.hidden(features)
        norm = self.norm
        if self.training and len(hidden) == 1:  # the other images may be unreadable; one sample has no variance
            hidden = F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        else:
            hidden = norm(hidden)
        # A matrix product, because a convolution rounds differently on a GPU.
        hidden_by_head = F.relu(hidden).unflatten(1, (self.output.groups, -1))
        weights = self.output.weight[:, :, 0].unflatten(0, (self.output.groups, -1))
        return torch.einsum("bhw,hdw->bhd", hidden_by_head, weights).flatten(1) + self.output.bias


def count_heads(config: Config) -> int:
    """Return how many heads split an embedding into equal parts: --heads, fewer if they do not divide it, one if it is short."""
    return math.gcd(config.emb_dim, config.heads) if config.emb_dim >= config.heads * MIN_HEAD_DIM else 1


def normalize_heads(vectors: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Scale vectors (N, D) to unit norm, and all heads' parts to equal norms: a dot product is the mean of the heads' cosines."""
    return F.normalize(vectors.unflatten(1, (num_heads, -1)), dim=2).flatten(1) / math.sqrt(num_heads)


@dataclass(frozen=True)
class BackboneInfo:
    """Identity of a backbone, stored with checkpoints and prototypes."""

    model_id: str
    weights: str  # their source, in words
    weights_hash: str  # `fingerprint` of `hash_tensors`
    feature_dim: int
    img_size: int
    pool: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic, antialiased"


def build_backbone(config: Config, log: Callable[[str], None]) -> tuple[Backbone, BackboneInfo]:
    """Build the timm model with weights from the hub or a file, or with random weights drawn from the seed. Raises UserError."""
    settings, feature_dim = probe_model(config)
    model, source = load_timm_model(config, settings, log)
    mean, std = given_normalization(config)
    pooling = getattr(getattr(model, "global_pool", None), "pool_type", None)
    hashes = hash_tensors(model)
    info = BackboneInfo(
        config.model_id,
        source or f"random, seed {config.seed}",
        fingerprint(hashes),
        feature_dim,
        config.img_size,
        pool=str(settings.get("global_pool") or pooling or "default"),
        mean=tuple(mean or model.pretrained_cfg["mean"]),
        std=tuple(std or model.pretrained_cfg["std"]),
    )
    backbone = Backbone(model.to(memory_format=torch.channels_last), info.mean, info.std, config.in_channels)
    backbone.hashes = hashes
    # Statistics of the large pre-training set belong to the weights; those of a few hundred augmented batches are no substitute.
    backbone.freezes_batchnorm = source is not None
    return backbone, info


def adopt_geometry(config: Config) -> Config:
    """Return the config with model, size and normalisation from an export of tools/pretrain_dino_*.py, unless options give them."""
    path = locate_start(config) or config.backbone_weights
    if path is None or path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return config
    start = read_start(config)
    metadata = start.metadata
    geometry = metadata.get("geometry")
    if not isinstance(geometry, dict) or "image_size" not in geometry:
        return config
    sizes = ",".join(f"{name}={value}" for name, value in geometry.items() if name != "image_size")
    values = {"model_id": f"{PRETRAINED_VIT}:{sizes}", "img_size": geometry["image_size"]}
    values |= {name: tuple(metadata[name]) for name in ("mean", "std") if name in metadata}
    adopted = {name: value for name, value in values.items() if name not in config.origins}
    origins = {**config.origins, **dict.fromkeys(adopted, start.where)}
    return dataclasses.replace(config, origins=origins, **adopted)


class _Unfilled(TorchDispatchMode):
    """Writes NaN instead of random numbers that loaded weights will replace; drawing them takes 4 of the 6 s to build a ViT-L.

    On the meta device, where tensors have no values, it skips whatever would change them: two thirds of the time.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return args[0].fill_(math.nan)
        is_skipped = func._schema.is_mutable and args[0].is_meta
        return args[0] if is_skipped or func is torch.ops.aten.erfinv_.default else func(*args, **(kwargs or {}))


class _Inert:
    """Placeholder for objects in a file other than tensors and plain values: a trainer's options, numpy scalars."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class StartWeights:
    """Weights that a run starts from: a checkpoint or export of this script, or a file saved by timm or others."""

    where: str  # the flag that names the file and its value, for messages
    path: Path
    backbone: dict[str, torch.Tensor]  # from a checkpoint of this script: the trained part only
    head: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # all other tensors, by Recognizer's names
    class_names: tuple[str, ...] = ()  # of the class vectors
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the checkpoint
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # of an export of tools/pretrain_dino_*.py


def block_depths(model: nn.Module) -> dict[str, int]:
    """Return the depth of each module, parameter and buffer of a timm model: 0 before the first block, i in block i or after it.

    `timm.optim.param_groups_layer_decay` agrees except for ConvNeXt, EVA-02 (its last norm is one more block), CoaT and CaiT.
    """
    groups = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {}
    patterns = []
    for group, spec in groups.items() if isinstance(groups, dict) else ():  # CaiT's function marks no blocks
        if group != "stem":
            pairs = [(spec, None)] if isinstance(spec, str) else spec or ()
            patterns += [re.compile(pattern) for pattern, suffix in pairs if suffix is None]
    depth = 0
    depths = {}
    for name, module in model.named_modules():
        depth += any(pattern.groups and pattern.fullmatch(name) for pattern in patterns)
        depths[name] = depth
        for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            depths[f"{name}.{key}".lstrip(".")] = depth
    return depths


def attention_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a model's attention blocks: queries, keys, values and output projection."""
    pattern = re.compile(r"(.*\.)?attn\.(qkv|q|k|v|kv|q_proj|k_proj|v_proj|proj)")
    named = model.named_modules()
    return [module for name, module in named if isinstance(module, nn.Linear) and pattern.fullmatch(name)]


def add_lora(model: nn.Module, rank: int) -> None:
    """Add a LoRA update to every attention layer; D is drawn from torch's generator, U = 0 makes the update zero at first."""
    for layer in attention_layers(model):
        parametrize.register_parametrization(layer, "weight", LoraUpdate(*layer.weight.shape, rank))


def merge_lora(model: nn.Module) -> None:
    """Merge the LoRA updates into the weights, in float64 and rounded once, so that all machines get the same weights."""
    for layer in attention_layers(model):
        if parametrize.is_parametrized(layer):
            layer.double()
            parametrize.remove_parametrizations(layer, "weight")
            layer.float()


def load_timm_model(
    config: Config, settings: dict[str, Any], log: Callable[[str], None]
) -> tuple[nn.Module, str | None]:
    """Return the timm model with its weights, and their source in words; None = random weights drawn from the seed."""
    import timm

    seed_torch(config.seed, 0)
    start = read_start(config)
    name, sizes = split_model_id(config.model_id)  # `settings` contain the sizes
    if start is not None:
        with _Unfilled():
            model = timm.create_model(name, **settings)
        fill_backbone(model, start, log)
        return model, str(start.path)
    if not config.pretrained:
        return timm.create_model(name, **settings), None
    pretrained_cfg = None if sizes else timm.models.get_pretrained_cfg(name)
    if not name.startswith(HUB_PREFIXES) and (pretrained_cfg is None or not pretrained_cfg.has_weights):
        raise UserError("timm has no weights for it", config.describe("model_id"), WEIGHTS_REMEDY)

    def fetch() -> nn.Module:
        with _Unfilled():
            model = timm.create_model(name, pretrained=True, **settings)
        # _Unfilled leaves NaN where timm would draw random numbers: a tensor that is not finite was not in the weights.
        tensors = (*model.named_parameters(), *model.named_buffers())
        missing = [key for key, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
        if missing:
            raise ValueError(f"they lack {', '.join(missing[:4])}, or what they have there is not finite")
        return model

    try:
        return build_from_cache(fetch, name, log), "timm"
    except Exception as error:  # hub, network and file errors of several libraries
        if is_out_of_memory(error):  # `explain_failure` says which option to lower
            raise
        problem = f"its weights cannot be fetched: {printable(str(error)).split('. ')[0][:200]}"
        raise UserError(problem, config.describe("model_id"), WEIGHTS_REMEDY) from error


def build_from_cache(build: Callable[[], Any], name: str, log: Callable[[str], None]) -> Any:
    """Build a model from the hub's cache, or else from the hub: without a network, asking it first costs minutes of retries."""
    import huggingface_hub.constants as hub_constants

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    was_offline = hub_constants.HF_HUB_OFFLINE
    try:
        hub_constants.HF_HUB_OFFLINE = True
        return build()
    except (OSError, RuntimeError, ValueError) as error:  # missing or incomplete in the cache
        if is_out_of_memory(error):
            raise
        log(f"fetching the weights of {name} (once; they stay in the cache of huggingface_hub)")
        hub_constants.HF_HUB_OFFLINE = was_offline
        return build()
    finally:
        hub_constants.HF_HUB_OFFLINE = was_offline


def read_start(config: Config) -> StartWeights | None:
    """Read the file that --load_from or --backbone_weights names, running no code in it; None without either. Raises UserError."""
    path = locate_start(config) or config.backbone_weights
    if path is None:
        return None
    where = config.describe("backbone_weights" if config.load_from is None else "load_from")
    if path.suffix == ".npz":
        raise UserError("holds prototypes, not weights", where, f"give the folder of its run, {path.parent}")
    if shard := re.fullmatch(r"(.+)-\d{5}-of-(?!00001)\d{5}(\.\w+)", path.name):
        index = path.with_name(f"{shard[1]}{shard[2]}.index.json")
        raise UserError("is one of several parts of a model", where, f"give {index}, with all of them beside it")
    identity = {}  # of a checkpoint of this script
    try:
        state, class_names = read_weights(path)
        if isinstance(state, dict) and {"identity", "format", "model"} <= state.keys():
            identity, state = state["identity"], state.get("average", state["model"])  # the weights that val judged
            class_names = identity["class_names"]
        tensors = dict(walk_tensors(state))
    except Exception as error:  # a wrong file raises pickle, zip, safetensors, key or I/O errors
        if is_out_of_memory(error):
            raise
        is_explained = isinstance(error, (OSError, zipfile.BadZipFile)) or path.suffix in (".safetensors", ".json")
        reason = (
            printable(str(error))[:200]
            if is_explained
            else "torch.save has not written it, or it holds more than tensors, lists and dictionaries"
        )
        raise UserError(f"cannot be read as weights: {reason}", where, STATE_DICT_REMEDY) from error
    if isinstance(state, dict) and {"student", "teacher", "format"} <= state.keys():
        remedy = "give the file that --export-backbone of the same pre-training command writes"
        raise UserError("is a checkpoint of pre-training", where, remedy)
    if not class_names:
        metadata = state.get("metadata") if isinstance(state, dict) else None
        return StartWeights(where, path, tensors, metadata=metadata if isinstance(metadata, dict) else {})
    check_weights_finite(tensors, where)
    prefix = "backbone.model."
    backbone = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    head = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    return StartWeights(where, path, backbone, head, tuple(class_names), identity)


def read_weights(path: Path) -> tuple[Any, Sequence[str]]:
    """Return the content of a file of weights, and the class names if it is an export of this script.

    A hub's .json index stands for all shards that it names. A wrong file raises exceptions of any type.
    """
    from safetensors import safe_open

    with open(path, "rb") as file:
        magic = file.read(40)
    if magic.startswith(b"version https://git-lfs"):
        raise OSError("is a pointer that git lfs pull replaces by the file itself")
    if magic.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("the file is cut off")
    if path.suffix == ".json":
        names = set(read_json(path, {"weight_map": {str: str}})["weight_map"].values())
        if strays := [name for name in names if Path(name).name != name or name.endswith(".json")]:
            raise ValueError(f"it names {printable(strays[0])[:80]}, which is no file of weights beside it")
        shards = [read_weights(path.with_name(name))[0] for name in sorted(names)]
        return {key: value for shard in shards for key, value in shard.items()}, ()
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
            return state, json.loads((file.metadata() or {}).get("lct_dino3", "{}")).get("classes", ())
    is_zip = zipfile.is_zipfile(path)  # the format of torch.save since torch 1.6
    if is_zip:
        check_zip(path)
    unsafe_globals = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else ()
    with torch.serialization.safe_globals([(_Inert, name) for name in unsafe_globals]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip), ()


def walk_tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor in nested dictionaries with its keys joined by dots."""
    if isinstance(tree, torch.Tensor):
        yield prefix[:-1], tree
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        yield from walk_tensors(value, f"{prefix}{key}.")


def fill_backbone(model: nn.Module, start: StartWeights, log: Callable[[str], None]) -> None:
    """Load a file into a timm model: skips and logs its classifier and heads, adapts input channels like timm. Raises UserError."""
    from timm.models._manipulate import adapt_input_conv

    architecture = model.pretrained_cfg.get("architecture") or type(model).__name__
    tensors = complete_backbone(start, log)
    expected = model.state_dict()
    if not tensors:
        problem = "cannot be read as weights: it holds no tensors by name, as a model saved whole does not"
        raise UserError(problem, start.where, STATE_DICT_REMEDY)
    renamed = rename_hub_weights(tensors)
    weights, prefix = choose_weights(renamed, expected)
    check_weights_finite(weights, start.where)
    outside = (key.split(".") for key in tensors if not key.startswith(prefix))
    unused = dict.fromkeys(".".join(names[: prefix.count(".")]) for names in outside)  # as many parts as the prefix has
    # The authors' DINOv3 files have these biases even where they are zero, and timm's models have none then.
    for key in [key for key in weights if key.endswith("attn.qkv.bias") and "storage_tokens" in weights]:
        if key.replace("qkv.bias", "q_bias") not in expected and weights.pop(key).any():
            problem = f"has biases of queries and values that are not zero, and {architecture} has none"
            raise UserError(problem, start.where, f"give --model_id {architecture}_qkvb")
    convert = find_converter(model)
    try:
        weights = convert(weights, model) if convert else weights
    except Exception as error:  # key and shape errors in timm's code for the model
        problem = f"cannot be read as weights of {architecture}: {printable(str(error))[:200]}"
        raise UserError(problem, start.where, name_fitting_model(renamed, architecture)) from error

    def layer_prefixes(kind: str) -> tuple[str, ...]:
        names = model.pretrained_cfg.get(kind) or ()
        return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))

    modules = {key.split(".")[0] for key in expected}
    is_whole = expected.keys() <= weights.keys()
    for key in list(weights):
        is_foreign = is_whole and key.split(".")[0] not in modules and not BACKBONE_PART.search(key)
        if is_foreign or key.startswith(layer_prefixes("classifier")):
            unused[key.rpartition(".")[0]] = None
            del weights[key]
    if unused:
        log(f"{start.where}: not used of the file: {', '.join([*unused][:8])}{', ...' if len(unused) > 8 else ''}")
    for layer in layer_prefixes("first_conv"):
        key = f"{layer}weight"
        if key in expected and key in weights and weights[key].shape[1:2] == (3,) != expected[key].shape[1:2]:
            weights[key] = adapt_input_conv(expected[key].shape[1], weights[key])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # one line for missing keys, one for unexpected keys, one for each wrong shape
        problems = [line.strip()[:200] for line in str(error).splitlines()[1:5]]
        remedy = name_fitting_model(renamed, architecture)
        raise UserError(f"does not fit {architecture}: {'; '.join(problems)}", start.where, remedy) from error


def complete_backbone(start: StartWeights, log: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """Return all weights of the backbone; frozen ones, which a checkpoint lacks, are built as in its run. Raises UserError."""
    identity = start.identity
    if not identity.get("freeze_backbone"):
        return start.backbone
    files: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # without a config.json, the weights are timm's or random
        form = {"options": dict.fromkeys(("load_from", "backbone_weights"), (str, type(None)))}
        options = read_json(start.path.with_name("config.json"), form)["options"]
        files = {name: Path(options[name]) for name in form["options"] if options[name]}
    for name, file in files.items():
        if not file.exists():
            remedy = f"put them back there, or correct {name} in {start.path.with_name('config.json')}"
            raise UserError(f"the weights of its backbone are not at {file} any more", start.where, remedy)
    names = ("model_id", "pretrained", "pool", "img_size", "in_channels", "seed")
    config = Config(**{name: identity[name] for name in names if name in identity}, **files)
    model, source = load_timm_model(config, probe_model(config)[0], log)
    weights_hash = fingerprint(hash_tensors(model))
    if weights_hash != identity.get("backbone_hash"):
        hashes = f"was {identity.get('backbone_hash')}, and is {weights_hash} here ({source or 'random weights'})"
        remedy = "give it in the folder of its run, with config.json beside it"
        raise UserError(f"its backbone, which is not stored in it, {hashes}", start.where, remedy)
    if identity.get("lora_rank"):
        add_lora(model, identity["lora_rank"])
    model.load_state_dict(start.backbone, strict=False)
    merge_lora(model)
    return model.state_dict()


def probe_model(config: Config) -> tuple[dict[str, Any], int]:
    """Return timm's keyword arguments for the model and its feature_dim; check that it has what is trained. Raises UserError."""
    where = f"--model_id {config.model_id}"
    settings, feature_dim, num_blocks, has_attention = _build_on_meta(
        config.model_id, config.img_size, config.pool, config.in_channels, config.drop_path
    )
    if config.unfreeze_blocks > num_blocks:
        problem = f"has {num_blocks or 'no'} blocks that timm names"
        remedy = "give fewer, or train all with --no-freeze_backbone"
        raise UserError(problem, f"{where} {config.describe('unfreeze_blocks')}", remedy)
    if config.layer_decay < 1 and not num_blocks:
        raise UserError("has no blocks that timm names", f"{where} --layer_decay", "leave it out")
    if config.lora_rank and not has_attention:
        remedy = "choose a ViT, or train the last blocks with --unfreeze_blocks"
        raise UserError("has no attention layers", f"{where} {config.describe('lora_rank')}", remedy)
    return settings, feature_dim


@functools.lru_cache  # a ViT-L takes a second or two
def _build_on_meta(
    model_id: str, img_size: int, pool: str | None, in_channels: int, drop_path: float
) -> tuple[dict[str, Any], int, int, bool]:
    """Return arguments for timm, feature_dim, number of blocks, and whether there are attention layers; build the model on meta."""
    import timm

    where = f"--model_id {model_id}"
    name, sizes = split_model_id(model_id)
    base = name.split(".")[0]
    if not name.startswith(HUB_PREFIXES) and not timm.is_model(base):
        remedy = did_you_mean(base, timm.list_models(), "timm.list_models('*part of a name*') lists what there is")
        raise UserError("is not known to timm", where, remedy)
    options = {"in_chans": in_channels} if in_channels != 3 else {}
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    settings: dict[str, Any] = {"num_classes": 0, **options, **sizes}
    try:
        with torch.device("meta"), torch.no_grad():
            with _Unfilled():
                model = build_from_cache(lambda: timm.create_model(name, **settings), name, lambda _: None)
            if "img_size" in inspect.signature(type(model).__init__).parameters:
                settings["img_size"] = img_size
            # All images have one size, so DINOv3 need not rebuild its position table on the CPU for each batch.
            if getattr(model, "dynamic_img_size", False):
                settings["dynamic_img_size"] = False
            if pool or getattr(model, "cls_token", None) is not None:
                settings["global_pool"] = pool or "token"
            with _Unfilled():
                model = build_from_cache(lambda: timm.create_model(name, **settings), name, lambda _: None).eval()
            stem = getattr(getattr(model, "patch_embed", None), "proj", None)
            has_patches = isinstance(stem, nn.Conv2d) and stem.kernel_size == stem.stride
            if has_patches and img_size % stem.stride[0]:  # timm would silently drop the remainder at the border
                raise ValueError(f"{img_size} px is not a multiple of its patches of {stem.stride[0]} px")
            shape = model(torch.empty(1, in_channels, img_size, img_size)).shape
            if len(shape) != 2:
                raise ValueError(f"its features have the shape {tuple(shape)}: choose a --pool such as avg")
    except Exception as error:  # timm and its models raise anything from AssertionError to KeyError
        where += f" --img_size {img_size}" + (f" --pool {pool}" if pool else "")
        options_text = "".join(f", or leave out {name}={value}" for name, value in options.items())
        problem = f"timm cannot build it: {printable(str(error))[:300]}"
        unread = "check the name, and that the hub or the folder can be reached"  # of `hf-hub:` and `local-dir:`
        remedy = unread if isinstance(error, OSError) else f"try another size or pooling{options_text}"
        if "pretrained tag" in problem:  # what stands behind the dot
            remedy = did_you_mean(name, timm.list_pretrained(f"{base}.*"))
        raise UserError(problem, where, remedy) from error
    return settings, shape[1], max(block_depths(model).values()), bool(attention_layers(model))


def split_model_id(model_id: str) -> tuple[str, dict[str, float]]:
    """Split a model id like `vit_small_patch16_224:embed_dim=96,depth=3` into timm's name and the sizes. Raises UserError."""
    if model_id.startswith(HUB_PREFIXES) or ":" not in model_id:
        return model_id, {}
    name, _, sizes = model_id.partition(":")
    try:
        pairs = [size.split("=") for size in sizes.split(",")]
        return name, {key: float(value) if "." in value else int(value) for key, value in pairs}
    except ValueError as error:
        remedy = "write sizes as in vit_small_patch16_224:embed_dim=96,depth=3"
        raise UserError(f"{sizes} is no list of sizes", f"--model_id {model_id}", remedy) from error


def hash_tensors(module: nn.Module) -> dict[str, str]:
    """Return a hash, 16 hex digits, of dtype, shape and bytes of each tensor in a module's state dict."""
    hashes = {}
    for key, value in module.state_dict().items():
        value = value.detach().cpu().contiguous()
        hashes[key] = fingerprint(str(value.dtype), value.shape, value.flatten().view(torch.uint8).numpy())
    return hashes


def rename_hub_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights of DINOv2 and DINOv3 from transformers' names to their authors', which timm reads; others stay."""
    markers = ("embeddings.cls_token", "stages.0.downsample_layers.0.weight")  # of a ViT, of a ConvNeXt
    base = next((key.removesuffix(marker) for key in tensors for marker in markers if key.endswith(marker)), None)
    if base is None:
        return tensors
    weights = {key.removeprefix(base): value for key, value in tensors.items() if key.startswith(base)}
    registers = "register_tokens" if "embeddings.position_embeddings" in weights else "storage_tokens"
    up, down = ("w2", "w3") if any(".gate_proj." in key for key in weights) else ("fc1", "fc2")
    replacements = (
        (r"^stages\.(\d+)\.downsample_layers\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.layers\.", r"stages.\1."),
        (r"\.depthwise_conv\.", ".dwconv."),
        (r"\.pointwise_conv(\d)\.", r".pwconv\1."),
        (r"(^|\.)layer_norm\.", r"\1norm."),
        (r"^(encoder|model)\.", ""),
        (r"^layers?\.", "blocks."),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.register_tokens", registers),
        (r"^embeddings\.patch_embeddings(\.projection)?", "patch_embed.proj"),
        (r"^embeddings\.", ""),
        (r"^layernorm\.", "norm."),
        (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
        (r"\.weights_in\.", ".w12."),
        (r"\.weights_out\.", ".w3."),
        (r"\.gate_proj\.", ".w1."),
        (r"\.up_proj\.", f".{up}."),
        (r"\.down_proj\.", f".{down}."),
    )
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in replacements:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    for key in [key for key in renamed if re.search(r"\.attn\.q\.(weight|bias)$", key)]:
        partners = [key.replace(".q.", f".{name}.") for name in "kv"]
        if key.endswith("weight") and not renamed.keys() >= set(partners):
            continue  # incomplete: loading names the layer
        query = renamed.pop(key)
        no_bias = torch.zeros_like(query)  # DINOv3's keys have none
        key_and_value = [renamed.pop(partner, no_bias) for partner in partners]
        renamed[key.replace(".q.", ".qkv.")] = torch.cat([query, *key_and_value])
    return renamed


def check_weights_finite(weights: dict[str, torch.Tensor], where: str) -> None:
    """Raise UserError if weights are not finite, with the names of up to four."""
    if odd := [key for key, value in weights.items() if value.layout != torch.strided or "float8" in str(value.dtype)]:
        raise UserError(
            f"holds sparse or 8-bit tensors, such as {odd[0]}", where, "give weights in float32 or bfloat16"
        )
    if broken := [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]:
        problem = f"holds values that are not finite, in {', '.join(broken[:4])}"
        raise UserError(problem, where, "give weights of a training that went well")


def name_fitting_model(tensors: dict[str, torch.Tensor], architecture: str) -> str:
    """Return a remedy for tensors that do not fit a timm model; it names a similarly named model that they fit, if any."""
    import timm

    scores = {}
    for name in difflib.get_close_matches(architecture, timm.list_models(), n=40, cutoff=0):
        with contextlib.suppress(Exception), torch.device("meta"):  # some models cannot be built this way
            with _Unfilled():
                model = timm.create_model(name, pretrained=False, num_classes=0)
            expected = model.state_dict()
            weights, _ = choose_weights(tensors, expected)
            if not weights.keys() & expected.keys() and (convert := find_converter(model)):  # names are their authors'
                weights = convert(weights, model)
            num_fitting = sum(key in weights and weights[key].shape == value.shape for key, value in expected.items())
            scores[name] = num_fitting / max(len(expected), len(weights))
            if scores[name] == 1:
                break
    best = max(scores, key=scores.__getitem__, default=architecture)
    if scores.get(best, 0) < 0.9:
        return f"its tensors are those of no model like {architecture}: give the --model_id that they were saved from"
    if best == architecture:
        return f"the rest of it does fit {architecture}: give a file with the whole state dict"
    return f"its tensors are those of --model_id {best}"


def choose_weights(tensors: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> tuple[dict, str]:
    """Return the tensors below the key prefix that fits `expected` best, and this prefix; ties go to an EMA or teacher, if any."""
    votes: Counter[str] = Counter()
    for key, value in tensors.items():
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
            votes[key[:start]] += key[start:] in expected and expected[key[start:]].shape == value.shape
    prefix = max(votes, key=lambda name: (votes[name], bool(re.search("ema|teacher", name))), default="")
    if 2 * votes[prefix] < len(expected):  # names that timm has yet to convert, or those of another model
        wrappers = Counter(WEIGHT_WRAPPERS.match(key).group() for key in tensors)
        prefix = max(wrappers, key=lambda name: (bool(name), wrappers[name]), default="")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}, prefix


def find_converter(model: nn.Module) -> Callable[[dict, nn.Module], dict] | None:
    """Return timm's function that converts weights with their authors' names to the model's names, or None."""
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


# ======================================================================================================================
# 10  CRITERION
# ======================================================================================================================
# From embeddings to the loss: class vectors, logits with a margin, all in float32. Touches no files.
class Criterion(nn.Module):
    """Base class of all criteria: each head learns independently, from its equal part of the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.scale = config.arc_scale
        self.num_heads = count_heads(config)

    def split_heads(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Split embeddings (B, D) from `normalize_heads` into those of each head (B, H, D / H), of unit norm."""
        return math.sqrt(self.num_heads) * embeddings.unflatten(1, (self.num_heads, -1))

    def score_heads(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the scores of each head (B, H, C) without margin: cosines, or logits divided by the scale."""
        raise NotImplementedError

    def add_margin(self, scores: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """Apply the margin to the scores (N, C) of the true classes, labels (N,); the base class has none."""
        return scores

    def plain_logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) of embeddings (B, D) without margin, for evaluation."""
        return self.scale * self.score_heads(embeddings).mean(dim=1)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the heads' logits with margin (B, H, C), for the loss, and their mean logits without margin (B, C)."""
        scores = self.score_heads(embeddings)
        shifted = self.add_margin(scores.flatten(0, 1), labels.repeat_interleave(self.num_heads))
        return self.scale * shifted.view_as(scores), self.scale * scores.mean(dim=1)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy (B, H) of logits (B, H, C)."""
        smoothing = self.config.label_smoothing
        targets = labels.repeat_interleave(self.num_heads)
        losses = F.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=smoothing, reduction="none")
        return losses.unflatten(0, (-1, self.num_heads))


class ArcFace(Criterion):
    """Class directions on each head's unit sphere, and an angular margin. Deng et al., "ArcFace", arXiv:1801.07698, eq. 3.

    As subcenter_arcface, each class has several directions, of which the nearest counts ("Sub-center ArcFace", ECCV 2020, eq. 2).
    """

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config)
        self.per_class = config.sub_centers if config.criterion == "subcenter_arcface" else 1
        directions = torch.randn(num_classes * self.per_class, config.emb_dim)
        self.weight = nn.Parameter(normalize_heads(directions, self.num_heads))
        self.margin = config.arc_margin

    def score_heads(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the cosines (B, H, C) to the class directions of each head."""
        directions = F.normalize(self.weight.unflatten(1, (self.num_heads, -1)), dim=2)
        cosines = torch.einsum("bhd,chd->bhc", self.split_heads(embeddings), directions).clamp(-1.0, 1.0)
        return cosines if self.per_class == 1 else cosines.unflatten(2, (-1, self.per_class)).amax(3)

    def plain_logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute the same logits in one product: the cosine of whole embeddings is the mean of the heads' cosines."""
        if self.per_class > 1:  # each head picks its nearest direction independently
            return super().plain_logits(embeddings)
        return self.scale * F.linear(embeddings, normalize_heads(self.weight, self.num_heads)).clamp(-1.0, 1.0)

    def add_margin(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Replace cos(theta) of the true classes in cosines (N, C) by cos(theta + m), finite in value and gradient at +-1.

        The margin m is in radians, 0 <= m < pi / 2; where theta + m would pass pi, cos(theta) - m sin(m) keeps the logit falling.
        d sin / d cos = -cos / sin has a pole at +-1, which float32 unit vectors do reach: sin is set to 0 there, without gradient.
        """
        target = scores.gather(1, labels[:, None])
        sine_squared = 1.0 - target * target
        is_regular = sine_squared > 1e-7  # the largest float32 cosine below 1 gives 1.2e-7
        sine = torch.where(is_regular, sine_squared, torch.ones_like(sine_squared)).sqrt() * is_regular
        shifted = target * math.cos(self.margin) - sine * math.sin(self.margin)
        past_pi = target < math.cos(math.pi - self.margin)
        shifted = torch.where(past_pi, target - self.margin * math.sin(self.margin), shifted)
        return scores.scatter(1, labels[:, None], shifted)


class CosFace(ArcFace):
    """ArcFace with the margin subtracted from the cosine. Wang et al., "CosFace", arXiv:1801.09414, eq. 4."""

    def add_margin(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Subtract the margin from the cosines (N, C) of the true classes."""
        return scores.scatter_add(1, labels[:, None], torch.full_like(scores[:, :1], -self.margin))


class LinearClassifier(Criterion):
    """A linear layer on each head's scaled embeddings: plain cross-entropy, with embeddings that can be compared by cosine."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config)
        bound = math.sqrt(self.num_heads / config.emb_dim)  # as in torch.nn.Linear
        self.weight = nn.Parameter(torch.empty(num_classes, config.emb_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_classes, self.num_heads))

    def score_heads(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, H, C) of the heads, divided by the scale."""
        weight = self.weight.unflatten(1, (self.num_heads, -1))
        return torch.einsum("bhd,chd->bhc", self.split_heads(embeddings), weight) + self.bias.T / self.scale


class FocalClassifier(LinearClassifier):
    """Cross-entropy weighted by (1 - p)^gamma, p being the true class's probability. Lin et al., arXiv:1708.02002, eq. 4."""

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the focal losses (B, H) of logits (B, H, C)."""
        classes = labels[:, None, None].expand(-1, self.num_heads, 1)
        probability = F.log_softmax(logits, dim=2).gather(2, classes)[:, :, 0].exp()
        # The clamp keeps the gradient of the power finite at p = 1.
        return (1 - probability).clamp(min=1e-6) ** self.config.focal_gamma * super().losses(logits, labels)


CRITERIA: dict[str, type[Criterion]] = {
    "arcface": ArcFace,
    "cosface": CosFace,
    "subcenter_arcface": ArcFace,
    "cross_entropy": LinearClassifier,
    "focal": FocalClassifier,
}


class Recognizer(nn.Module):
    """Backbone, head and criterion. The backbone may see a batch in pieces, on several devices; the others see the whole batch."""

    def __init__(self, backbone: Backbone, head: Head, criterion: Criterion) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.criterion = criterion

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Return embeddings (B, emb_dim), of unit norm, of features (B, feature_dim)."""
        return normalize_heads(self.head(features), self.criterion.num_heads)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return the state dict without the frozen part of the backbone, which the hash of the backbone stands for."""
        trained = self.backbone.trained_keys
        prefix = "backbone.model."
        return {
            key: value
            for key, value in self.state_dict().items()
            if trained is None or not key.startswith(prefix) or key.removeprefix(prefix) in trained
        }


def build_recognizer(config: Config, num_classes: int, backbone: Backbone, info: BackboneInfo) -> Recognizer:
    """Put a new head and class vectors, drawn from the seed, on a backbone, and freeze the part of it that is not trained."""
    seed_torch(config.seed, 1)
    head = Head(info.feature_dim, config.emb_dim, count_heads(config))
    model = Recognizer(backbone, head, CRITERIA[config.criterion](config, num_classes))
    if config.lora_rank:
        add_lora(backbone.model, config.lora_rank)
        backbone.freeze(lambda name: "lora_" in name or "drop_path" in name)
    elif config.freeze_backbone:
        depths = block_depths(backbone.model)
        first = max(depths.values()) - config.unfreeze_blocks + 1
        backbone.freeze(lambda name: depths.get(name, 0) >= first)  # depths has only one name of a shared layer
    return model


def load_head(model: Recognizer, start: StartWeights, class_names: Sequence[str], log: Callable[[str], None]) -> None:
    """Load what fits from a checkpoint or export, and log it: head layers of equal shape, vectors of equally named classes."""
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    common = {key: (start.head[key], value) for key, value in state.items() if key in start.head}
    layers = {key: old for key, (old, new) in common.items() if key.startswith("head.") and old.shape == new.shape}
    if "head.hidden.weight" not in layers:  # trained layers after a random one would be no better than random
        layers = {}
    old_row_of = {name: row for row, name in enumerate(start.class_names)}
    old_rows = {row: old_row_of[name] for row, name in enumerate(class_names) if name in old_row_of}
    vectors = {}
    for key, (old, new) in common.items():
        if old_rows and key.startswith("criterion."):  # one or several rows a class
            per_class = len(new) // len(class_names)
            if old.shape == (per_class * len(start.class_names), *new.shape[1:]):
                vectors[key] = new.clone()
                old_by_class = old.unflatten(0, (-1, per_class))
                vectors[key].unflatten(0, (-1, per_class))[[*old_rows]] = old_by_class[[*old_rows.values()]].to(new)
    if "criterion.weight" not in vectors:  # biases mean nothing beside random vectors
        vectors = {}
    model.load_state_dict(layers | vectors, strict=False)
    text = (
        f"{start.where}: backbone, {len(layers)} tensors of the head and the vectors of {len(old_rows) if vectors else 0} of"
        f" {len(class_names)} classes are taken"
    )
    random_keys = [key for key in state if key not in layers and key not in vectors]
    log(f"{text}; these start at random: {', '.join(random_keys)}" if random_keys else text)


# ======================================================================================================================
# 11  OPTIMIZER & SCHEDULE
# ======================================================================================================================
# Parameter groups; the learning rate, a pure function of the step: nothing to save, nothing to drift; the average of the weights.
BACKBONE_WEIGHT_DECAY = 0.05
HEAD_WEIGHT_DECAY = 1e-4


def parameter_groups(model: Recognizer, config: Config) -> list[dict[str, Any]]:
    """Return groups of head, class vectors and the backbone's trained parameters, each with its peak lr and weight decay."""
    backbone = model.backbone.model
    depths = block_depths(backbone)
    deepest = max(depths.values())
    exempt = getattr(backbone, "no_weight_decay", set)()
    modules = {"head": model.head, "class_vectors": model.criterion, "backbone": backbone}
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for module_name, settings in optimizer_settings(config).items():
        for name, parameter in modules[module_name].named_parameters():
            if not parameter.requires_grad:
                continue
            peak_lr = settings["lr"]
            decays = parameter.ndim > 1 and not name.endswith("bias")
            if module_name == "backbone":
                peak_lr = config.layer_decay ** (deepest - depths[name]) * peak_lr
                decays = decays and "." in name and name not in exempt  # tokens and position embeddings have no dot
            weight_decay = settings["weight_decay"] * decays
            new_group = {"params": [], "peak_lr": peak_lr, "weight_decay": weight_decay}
            groups.setdefault((module_name, peak_lr, weight_decay), new_group)["params"].append(parameter)
    return list(groups.values())


def optimizer_settings(config: Config) -> dict[str, dict[str, float]]:
    """Return the peak `lr` and the `weight_decay` of head, class vectors, and the last block of the backbone."""
    head_lr = config.lr if config.fc_lr is None else config.fc_lr
    class_lr = config.arc_lr
    if class_lr is None:  # class vectors that are directions would move too slowly at the lr of a layer
        class_lr = (1 if config.criterion in LINEAR_CRITERIA else 10) * head_lr
    backbone_lr = max(0.2 * config.lr, 5e-5) if config.backbone_lr is None else config.backbone_lr
    if config.lr_type == "one_lr":
        backbone_lr = config.lr
    head_decay = HEAD_WEIGHT_DECAY if config.weight_decay is None else config.weight_decay
    backbone_decay = BACKBONE_WEIGHT_DECAY if config.weight_decay is None else config.weight_decay
    return {
        "head": {"lr": head_lr, "weight_decay": head_decay},
        "class_vectors": {"lr": class_lr, "weight_decay": head_decay},
        "backbone": {"lr": backbone_lr, "weight_decay": backbone_decay},
    }


def check_optimizer(config: Config) -> None:
    """Raise UserError for an optimizer that timm lacks, that this loop cannot drive, or that lacks a setting given for it."""
    from timm.optim import get_optimizer_info, list_optimizers

    names = list_optimizers()
    where = config.describe("optimizer")
    if config.optimizer not in names:
        fallback = "give one of timm.optim.list_optimizers(), such as adamw, lamb, lion or sgd"
        raise UserError("timm has no optimizer of this name", where, did_you_mean(config.optimizer, names, fallback))
    remedy = "choose another, such as adamw"
    if get_optimizer_info(config.optimizer).second_order or "schedulefree" in config.optimizer:
        raise UserError("needs another training loop", where, remedy)
    if "kron" in config.optimizer:
        raise UserError("draws random numbers that no checkpoint has, so that no run could be continued", where, remedy)
    try:
        group = build_optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))]}], config).param_groups[0]
    except IndexError as error:
        raise UserError(f"{config.optimizer} has more than two", config.place("betas"), "leave it out") from error
    except TypeError:  # the optimizer lacks a setting
        group = {}
    except (AssertionError, ImportError, RuntimeError) as error:  # raised by apex and bitsandbytes
        raise UserError(f"cannot be had here: {printable(str(error))[:200]}", where, remedy) from error
    for name, value in (("betas", config.betas or None), ("eps", config.eps)):  # timm silently drops some
        if value is not None and group.get(name) != value:
            raise UserError(f"{config.optimizer} has no such setting", config.place(name), "leave it out")


def build_optimizer(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """Build the optimizer that --optimizer names over parameter groups."""
    options = {key: value for key, value in (("betas", config.betas), ("eps", config.eps)) if value not in ((), None)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True, **options)
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(groups, config.optimizer, lr=config.lr, **options)


def lr_factor(config: Config, step: int, total_steps: int) -> float:
    """Return the learning rate at a step, counted from 0, as a fraction of its peak.

    cosine: linear warm-up, then half a cosine that would reach 0 one step after the last. onecycle: torch's OneCycleLR divided by
    its max_lr, from 1 / div_factor up to 1, then down to 1 / (div_factor * final_div_factor).
    """
    last_step = total_steps - 1
    step = min(step, last_step)  # a resumed run may have fewer images than before, and thus fewer steps
    if config.scheduler == "cosine":
        warmup_fraction = 0.05 if config.warmup_epochs is None else min(config.warmup_epochs / config.epochs, 1.0)
        warmup_steps = max(1, int(total_steps * warmup_fraction + 1e-9))  # 0.29 * 100 is 28.999...
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
    peak_step = config.pct_start * total_steps - 1  # as in torch
    first_factor = 1 / config.div_factor
    if step <= peak_step:
        start = first_factor
        end = 1.0
        progress = step / peak_step if peak_step else 1.0
    else:
        start = 1.0
        end = first_factor / config.final_div_factor
        progress = (step - peak_step) / (last_step - peak_step)
    if config.anneal_strategy == "linear":
        return start + (end - start) * progress
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the lr of every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class WeightAverage:
    """Exponential moving average (EMA) of the model's trained state; tensors that are not float, such as counters, are copied."""

    def __init__(self, model: Recognizer, decay: float) -> None:
        self._live = model.trained_state()  # shares memory with the model
        self._decay = decay
        self.values = {key: value.clone() for key, value in self._live.items()}

    def update(self, step: int) -> None:
        """Update the average after `step`, counted from 1; the first steps weigh more, because there is little to average yet."""
        decay = min(self._decay, (1 + step) / (10 + step))  # as in TensorFlow's ExponentialMovingAverage
        floats = [key for key, value in self._live.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[key] for key in floats], [self._live[key] for key in floats], 1 - decay)
        for key in self._live.keys() - set(floats):
            self.values[key].copy_(self._live[key])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averaged weights inside the with-block."""
        live_values = [value.clone() for value in self._live.values()]
        torch._foreach_copy_(list(self._live.values()), list(self.values.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(list(self._live.values()), live_values)


# ======================================================================================================================
# 12  METRICS
# ======================================================================================================================
# Pure functions of scores and labels.
BOUND_CONFIDENCE = 0.6  # of the error bound that sets thresholds: at 0.5 precision falls short, at 0.7 coverage
PRIOR_ANSWERS = 10  # the answers of all classes count as 10 in the threshold of one: this keeps precision on hand tools
MAX_SCORE_ENTRIES = 200_000_000  # (images x classes) float32 scores kept for ROC AUC: 800 MB; above it AUC is left out
# Fewer groups have no interval: even the range of five holds the median in 94 % of cases only, that of two in 50 %.
MIN_GROUPS = 6
BOOTSTRAP_DRAWS = 500
BOOTSTRAP_SAMPLES = 10_000_000  # draws x samples: larger sets get fewer draws, but 100 in any case
RETRIEVAL_NAMES = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "map_at_r": "mAP@R"}
RETRIEVAL_CHUNK = 20_000_000  # (queries x references) cosines, or (queries x classes) scores, computed at a time: 80 MB
Scorer = Callable[[np.ndarray], np.ndarray]  # maps queries (n, D) to scores (n, C)


def classify(
    score: Scorer, queries: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> tuple[float, dict[str, float], dict[str, dict]]:
    """Return mean cross-entropy, figures and figures by class of the logits (n, C) that `score` computes from queries (n, D)."""
    has_auc = len(queries) * len(class_names) <= MAX_SCORE_ENTRIES

    def reduce(logits: np.ndarray, block: slice) -> tuple[np.ndarray, ...]:
        log_probabilities = log_softmax(logits)
        log_likelihoods = log_probabilities[np.arange(len(logits)), labels[block]]
        scores = log_probabilities.astype(np.float32) if has_auc else np.zeros((len(logits), 0), np.float32)
        return log_probabilities.argmax(axis=1), log_likelihoods, scores

    answers, log_likelihoods, scores = reduce_scores(score, queries, reduce)
    figures, per_class = compute_metrics(answers, labels, class_names, scores if has_auc else None)
    return float(0.0 - log_likelihoods.mean()), figures, per_class  # not -0.0, which is shown as such


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of logits (N, C), in float64."""
    return scipy.special.log_softmax(logits.astype(np.float64), axis=1)


def reduce_scores(
    score: Scorer, queries: np.ndarray, reduce: Callable[[np.ndarray, slice], tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, ...]:
    """Reduce the scores of all queries, block by block, because those of 100,000 classes exceed the memory.

    `reduce(scores, block)` returns arrays (n, ...) for the n queries in the slice `block`; they are concatenated over blocks.
    """
    step = max(1, RETRIEVAL_CHUNK // max(1, score(queries[:1]).shape[1]))
    blocks = [slice(start, start + step) for start in range(0, max(1, len(queries)), step)]
    reduced = [reduce(score(queries[block]), block) for block in blocks]
    return tuple(np.concatenate(arrays) for arrays in zip(*reduced, strict=True))


def compute_metrics(
    answers: np.ndarray, labels: np.ndarray, class_names: Sequence[str], scores: np.ndarray | None = None
) -> tuple[dict[str, float], dict[str, dict]]:
    """Return acc, f1_macro, auc_macro, and by class precision, recall, f1, auc, support, from answers and labels, int (N,).

    AUC (one class against the rest) needs scores (N, C) with columns that are comparable over rows (log-probabilities); without
    scores it is None. A class without images has None for undefined figures and no part in the means; every image counts.
    """
    precision, recall, f1, support = precision_recall_f1(answers, labels, len(class_names))
    auc = np.full(len(class_names), np.nan)
    defined = np.flatnonzero((support > 0) & (support < len(labels)))
    # Sorting a float32 column is vectorised: 50,000 images of 1,000 classes, twice an epoch, take 2.4 s, where `roc_auc_score`
    # takes 22 s and `rankdata` 11 s. All columns at once would double the memory.
    for block in () if scores is None else np.split(defined, range(64, len(defined), 64)):
        columns = np.ascontiguousarray(scores[:, block].T, dtype=np.float32)
        for label, column in zip(block.tolist(), columns, strict=True):
            is_positive = labels == label
            auc[label] = roc_area(np.sort(column[is_positive]), column[~is_positive])
    columns = {"precision": precision, "recall": recall, "f1": f1, "auc": auc}
    per_class = {}
    for label, name in enumerate(class_names):
        per_class[name] = {key: none_if_nan(values[label]) for key, values in columns.items()}
        per_class[name]["support"] = int(support[label])
    figures = {
        "acc": float((answers == labels).mean()),
        "f1_macro": none_if_nan(mean_of_defined(f1)),
        "auc_macro": none_if_nan(mean_of_defined(auc)),
    }
    return figures, per_class


def precision_recall_f1(answers: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, ...]:
    """Return precision, recall, F1 and support of each class, (C,); NaN where undefined. sklearn takes 30 times as long."""
    support = np.bincount(labels, minlength=num_classes)
    num_answers = np.bincount(answers, minlength=num_classes)
    hits = np.bincount(labels[labels == answers], minlength=num_classes)
    images = np.where(support, support, np.nan)
    precision = hits / np.where(num_answers, num_answers, images)  # 0 for a class that has images but is never answered
    return precision, hits / images, 2 * hits / (images + num_answers), support


def roc_area(positives: np.ndarray, negatives: np.ndarray, is_right: np.ndarray | bool = True) -> float:
    """Return the share of (positive, negative) pairs in the right order, the area under the ROC curve; a tie counts half.

    Pairs of a positive (P,) that is not right are not in order: the area under Dhamija's curve of correct classification against
    false positives (arXiv:1811.04110). Sorted positives are fastest.
    """
    ranked = np.sort(negatives)
    won = ranked.searchsorted(positives, "left") + ranked.searchsorted(positives, "right")  # doubled: a tie counts half
    return float((is_right * won / 2).mean() / len(negatives))


def retrieval_scores(
    queries: np.ndarray, labels: np.ndarray, references: np.ndarray, reference_labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Return recall_at_1, recall_at_5, map_at_r (Q,) of retrieving references (N, D) of a query's class; NaN if there are none.

    MAP@R (Musgrave et al., "A Metric Learning Reality Check", arXiv:2003.08505): R is the number of references of the query's
    class; the precisions at those of the first R ranks that hold a reference of this class are summed and divided by R.
    """
    counts = np.bincount(reference_labels, minlength=int(labels.max(initial=0)) + 1)
    num_right = counts[labels]
    top = min(len(references), max(5, int(counts.max(initial=0))))
    ranks = np.arange(1, top + 1)
    scores = {name: np.full(len(labels), np.nan) for name in RETRIEVAL_NAMES}
    defined = np.flatnonzero(num_right > 0)
    for block in np.array_split(defined, max(1, -(-len(defined) * len(references) // RETRIEVAL_CHUNK))):
        cosine = queries[block] @ references.T
        nearest = np.argpartition(-cosine, top - 1, axis=1)[:, :top]
        order = np.argsort(-np.take_along_axis(cosine, nearest, axis=1), axis=1, kind="stable")
        is_right = reference_labels[np.take_along_axis(nearest, order, axis=1)] == labels[block][:, None]
        precision = np.cumsum(is_right, axis=1) / ranks * is_right * (ranks <= num_right[block][:, None])
        scores["recall_at_1"][block] = is_right[:, 0]
        scores["recall_at_5"][block] = is_right[:, :5].any(axis=1)
        scores["map_at_r"][block] = precision.sum(axis=1) / num_right[block]
    return scores


def open_set_metrics(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """Return auroc, the probability that a known object scores above an unknown one, and fpr95; both NaN if either group is empty.

    fpr95 is the fraction of unknown objects that pass the threshold which 95 % of the known ones pass. `known` (N,) and `unknown`
    (U,) are scores. 300 objects take 50 us, `roc_auc_score` and `roc_curve` 2.3 ms, which adds up over 500 draws of ten folds.
    """
    if not len(known) or not len(unknown):
        return {"auroc": math.nan, "fpr95": math.nan}
    known = np.sort(known)
    threshold = known[len(known) // 20]  # at least 95 % of the known reach it
    return {"auroc": roc_area(known, unknown), "fpr95": float((unknown >= threshold).mean())}


def share_weights(is_known: np.ndarray, unknown_share: float) -> np.ndarray:
    """Return the weight of each object (N,): unknown ones together get `unknown_share` of it, known ones the rest; the sum is 1."""
    counts = np.where(is_known, is_known.sum(), (~is_known).sum())
    weights = np.where(is_known, 1 - unknown_share, unknown_share) / counts
    return weights / max(1e-12, weights.sum())  # with only known or only unknown objects too


def mixed_precision(
    groups: np.ndarray, is_known: np.ndarray, is_accepted: np.ndarray, is_right: np.ndarray, unknown_share: float
) -> dict[str, dict[str, Any]]:
    """Return the share of accepted answers that are right, if `unknown_share` of the objects are unknown: {value, interval}.

    All are (N,): the group of each object, whether it is of a known class, whether its answer passes the threshold, and is right.
    """

    def compute(drawn: np.ndarray) -> dict[str, float]:
        weights = share_weights(is_known[drawn], unknown_share) * is_accepted[drawn]
        return {"mixed_precision": (weights * is_right[drawn]).sum() / weights.sum() if weights.any() else math.nan}

    figures = with_intervals(compute, groups)
    figure = figures["mixed_precision"]
    if figure["value"] in (0.0, 1.0):  # all draws agree
        figure["interval"] = wilson_interval(figure["value"], groups[is_accepted])
    return figures


def reliability(
    probability: np.ndarray, is_right: np.ndarray, is_known: np.ndarray, unknown_share: float
) -> dict[str, Any]:
    """Return the expected calibration error of probabilities (N,), `ece` (Guo et al., arXiv:1706.04599, eq. 3), over ten bins.

    `reliability` is the diagram: weight, mean probability and accuracy of each. Unknown objects get `unknown_share` of the weight.
    """
    num_bins = 10
    weights = share_weights(is_known, unknown_share)
    bins = np.minimum((probability * num_bins).astype(int), num_bins - 1)
    bin_weights = np.bincount(bins, weights, num_bins)
    mean_probabilities = np.bincount(bins, weights * probability, num_bins) / np.maximum(bin_weights, 1e-12)
    accuracies = np.bincount(bins, weights * is_right, num_bins) / np.maximum(bin_weights, 1e-12)
    rows = np.stack((bin_weights, mean_probabilities, accuracies), axis=1).tolist()
    return {
        "ece": sum(weight * abs(probability - right) for weight, probability, right in rows),
        "reliability": [dict(zip(("share", "probability", "right"), row, strict=True)) for row in rows],
    }


# How far a cosine moves when the same image is embedded in another batch or on another device, by the backbone's dtype. Measured
# with 840 crops against a float32 gallery: in bf16, 99 of 100 move by less than 0.011 with tf_efficientnet_lite0, 87 of 100 with
# mobilenetv2_035; in fp16, 99 of 100 by 0.0022; in other batch sizes on a CPU by 3e-7. Harmless, because thresholds are lowered by
# at most half the way to the next score.
SCORE_ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Answers(NamedTuple):
    """Answers to some objects of known classes, and to unknown objects, which thresholds and probabilities are fitted to."""

    scores: np.ndarray  # (N,) of answers to known objects
    is_right: np.ndarray  # (N,) bool
    strangers: np.ndarray = np.zeros(0, np.float32)  # (U,) scores of answers to unknown objects, all of them wrong
    unknown_share: float = 0.0  # of all objects in production

    def mix(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scores, is_right and weights of all answers, (N + U,) each.

        A known object weighs 1; unknown ones make up `unknown_share` of the total, and are left out if that is 0.
        """
        strangers = self.strangers if self.unknown_share else self.strangers[:0]
        weight = self.unknown_share / (1 - self.unknown_share) * len(self.scores) / max(1, len(strangers))
        is_right = np.append(self.is_right, np.zeros(len(strangers), bool))
        weights = np.repeat([1.0, weight], [len(self.scores), len(strangers)])
        return np.append(self.scores, strangers), is_right, weights


def precision_threshold(
    answers: Answers, precision: float, prior: np.ndarray | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Return the lowest threshold above which new answers can be expected to have this precision, or one above all scores if none.

    The threshold lies below the lowest passing score, by SCORE_ROUNDING of the backbone's `dtype` but at most half the way to the
    next one, so that the same image passes in another batch too. Equal scores are treated alike. `prior`, the precision expected at
    each score of `answers.mix()`, counts as PRIOR_ANSWERS further answers: one error in few proves little.

    The plain fraction of right answers above a threshold flatters, because chance helped to choose it. So the error rate is the
    upper bound of Clopper and Pearson (1934) at BOUND_CONFIDENCE, or, with a prior, the quantile of the posterior. 95 % takes at
    least 18 answers, all right. Precision above thresholds for .95, set on val sets redrawn from 451 answers (hand tools) and 420
    (groceries): .945 to .955 with 150 to 800 answers (plain fraction: .929 to .948); .900 and .953 with 70 (plain: .913 and .942).
    """
    scores, is_right, weights = answers.mix()
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    num_right = np.cumsum((weights * is_right)[order])
    num_answers = np.cumsum(weights[order])
    if prior is not None:
        num_right = num_right + PRIOR_ANSWERS * prior[order]
        num_answers = num_answers + PRIOR_ANSWERS
    is_last_of_score = np.append(ranked[1:] < ranked[:-1], True)[: len(ranked)]  # cut where there are no answers
    wrong_parameter = num_answers - num_right + (1 if prior is None else 1e-9)  # of the Beta distribution, above 0
    # The confidence that the error rate is low enough; the rate at BOUND_CONFIDENCE (betaincinv) takes 16 times as long.
    confidence = scipy.special.betainc(wrong_parameter, np.maximum(num_right, 1e-9), 1 - precision)
    # No bound promises 100 %.
    is_precise = confidence >= BOUND_CONFIDENCE if precision < 1 else num_right == num_answers
    passing = np.flatnonzero(is_precise & is_last_of_score)
    if not len(passing):
        return float(np.float32(scores.max(initial=-1.0) + SCORE_ROUNDING[dtype]))
    last, below = (float(score) for score in np.append(ranked, -np.inf)[passing[-1] : passing[-1] + 2])
    threshold = np.float32(max(last - SCORE_ROUNDING[dtype], (last + below) / 2))
    return float(max(threshold, np.nextafter(np.float32(below), np.float32(np.inf))))


def mean_intervals(groups: np.ndarray, **scores: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the means of the scores (N,), 0 to 1, that are not NaN, with intervals as in `with_intervals`."""
    figures = with_intervals(
        lambda drawn: {name: mean_of_defined(values[drawn]) for name, values in scores.items()}, groups
    )
    for name, values in scores.items():
        if figures[name]["value"] in (0.0, 1.0):
            figures[name]["interval"] = wilson_interval(figures[name]["value"], groups[~np.isnan(values)])
    return figures


def wilson_interval(value: float, groups: np.ndarray) -> list[float]:
    """Return Wilson's (1927) interval of a proportion that is 0 or 1 over groups (N,), of which all draws agree."""
    width = 1.96**2 / (len(np.unique(groups)) + 1.96**2)
    return [1 - width, 1.0] if value else [0.0, width]


def with_intervals(compute: Callable[[np.ndarray], dict[str, float]], groups: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return figures as {name: {value, interval}}, with 95 % percentile bootstrap intervals over groups.

    `groups`, int (N,), is the group of each sample. A group is drawn as a whole, with replacement: frames of one video are right or
    wrong together, and intervals over 20 videos of 10 frames would hold the truth in 60 % of cases if each frame were drawn alone.
    `compute` maps the positions (n,) of samples to figures; NaN = undefined, None in the result. The interval of fewer than
    MIN_GROUPS is None too.
    """
    unique, inverse = np.unique(groups, return_inverse=True)
    positions = np.arange(len(groups))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(min(BOOTSTRAP_DRAWS, max(100, BOOTSTRAP_SAMPLES // max(1, len(groups))))):
        counts = np.bincount(rng.integers(0, len(unique), len(unique)), minlength=len(unique))
        drawn.append(compute(np.repeat(positions, counts[inverse])))
    figures = {}
    for name, value in compute(positions).items():
        values = np.array([draw[name] for draw in drawn])
        defined = values[~np.isnan(values)]
        has_interval = len(defined) and len(unique) >= MIN_GROUPS
        interval = np.quantile(defined, (0.025, 0.975)).tolist() if has_interval else None
        figures[name] = {"value": none_if_nan(value), "interval": interval}
    return figures


def none_if_nan(value: float) -> float | None:
    """Return a float, or None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(value)


def mean_of_defined(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN, or NaN without any."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


# ======================================================================================================================
# 13  TRAIN STATE & CHECKPOINTS
# ======================================================================================================================
# Everything that changes while training, and how it is saved and restored. The only section that reads or writes checkpoints.
# Raises UserError for a checkpoint that cannot be read or belongs to another run, Diverged instead of saving non-finite weights.
# Fields of TrainState that are saved unchanged.
CHECKPOINT_FORMAT = 6
PLAIN_STATE = ("epoch", "batches", "step", "seconds", "best", "baseline", "frozen_right", "unseen", "sessions")
# Keys that a training checkpoint needs, with their types; further keys are allowed.
CHECKPOINT_FORM = {
    "epoch": int,
    "batches": int,
    "step": int,
    "seconds": (int, float),
    "best": dict,
    "frozen_right": {str: object},
    "baseline": {"val": {str: object}},
    "unseen": {str: object},
    "sessions": {str: {"train": str, "cosine": float}},
    "identity": {"class_names": [str], "backbone_hash": str},
    "model": {str: torch.Tensor},
    "optimizer": {"state": dict, "param_groups": [dict]},
    "scaler": dict,
    "tally": {str: torch.Tensor},
    "backbone_dtype": str,
}
RESTORE_OR_OVERWRITE = "restore a checkpoint from a copy, or train anew with --overwrite"


class Tally:
    """Collects losses, answers and labels of an epoch's steps for its train figures; new steps stay on the device until `fetch`."""

    def __init__(self, totals: dict[str, torch.Tensor] | None = None) -> None:
        self.fetched = [totals] if totals else []  # chunks of several steps, with the keys of `totals`
        self.pending: list[tuple[torch.Tensor, ...]] = []  # arguments of `add`, a tuple per step

    def add(self, loss: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Record loss (), logits (b, C) or answers (b,), and labels (b,) of a step, without waiting for the device."""
        self.pending.append((loss, scores, labels))

    def fetch(self) -> int | None:
        """Move pending steps to the CPU; return how many steps ago (1 = last) the first non-finite loss was, None without one."""
        if not self.pending:
            return None
        losses, scores, labels = zip(*self.pending, strict=True)
        self.pending = []
        chunk = {"losses": torch.stack(losses).cpu(), "sizes": torch.tensor(list(map(len, labels)))}
        chunk["answers" if scores[0].ndim == 1 else "logits"] = torch.cat(scores).cpu()
        self.fetched.append({**chunk, "labels": torch.cat(labels)})
        non_finite = (~torch.isfinite(chunk["losses"])).nonzero()
        return len(losses) - int(non_finite[0]) if len(non_finite) else None

    def totals(self) -> dict[str, torch.Tensor]:
        """Return losses and sizes (steps,), labels (N,), and logits (N, C) or answers (N,) of all fetched steps; {} without any."""
        names = self.fetched[0] if self.fetched else ()
        return {name: torch.cat([chunk[name] for chunk in self.fetched]) for name in names}


@dataclass
class TrainState:
    """Everything that changes while training; all else is a function of (config, data, epoch, step)."""

    model: Recognizer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype  # in which the backbone computes while training
    average: WeightAverage | None = None  # with --ema_decay
    epoch: int = 0  # finished epochs: trained, evaluated, recorded
    batches: int = 0  # finished batches of the next epoch; all of them while it is evaluated
    step: int = 0  # optimizer steps
    seconds: float = 0.0  # spent in the current epoch so far
    tally: Tally = dataclasses.field(default_factory=Tally)  # of the current epoch
    best: dict[str, Any] = dataclasses.field(default_factory=dict)  # epoch, metric, value, loss of the best epoch
    baseline: dict[str, Any] = dataclasses.field(default_factory=dict)  # figures of the frozen backbone before training
    frozen_right: dict[str, float] = dataclasses.field(default_factory=dict)  # `image_accuracy` of the best one on test
    unseen: dict[str, Any] = dataclasses.field(default_factory=dict)  # scores of `measure_unseen`, for `calibrate`
    sessions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # see `find_sessions`


def start_state(model: Recognizer, config: Config, runtime: Runtime) -> TrainState:
    """Return the training state of a model before the first step."""
    average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
    optimizer = build_optimizer(parameter_groups(model, config), config)
    return TrainState(model, optimizer, runtime.make_scaler(), runtime.dtype, average)


def make_identity(config: Config, class_names: Sequence[str], info: BackboneInfo | None) -> dict[str, Any]:
    """Return what must match for a checkpoint to be resumed: classes, every option that changes the result, and the backbone."""
    options = config.as_plain()
    identity = {"class_names": list(class_names)}
    identity |= {field.name: options[field.name] for field in option_fields() if field.metadata.get("fixed")}
    if info is not None:
        identity |= {"feature_dim": info.feature_dim, "head_widths": list(HEAD_WIDTHS), "used_pool": info.pool}
        identity |= {"backbone_hash": info.weights_hash, "used_mean": list(info.mean), "used_std": list(info.std)}
    return identity


# Programs around lct-dino-3.py load checkpoints with strict=False and would silently keep a random head, as no other key matches.
# This key matches with another shape, which torch refuses even then.
FOREIGN_GUARD = {"head.3.weight": torch.empty(0)}


def save_checkpoint(path: Path, state: TrainState, identity: dict[str, Any]) -> None:
    """Write the state, without a frozen backbone, in rank 0 only. Raises Diverged if a weight is not finite."""
    if get_rank():
        return
    weights = state.model.trained_state() | FOREIGN_GUARD  # makes programs that load with strict=False fail
    if not all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point()):
        raise Diverged(describe_divergence("a weight", state.step, state.epoch + 1, path.parent))
    payload = {
        "identity": identity,
        **{key: getattr(state, key) for key in PLAIN_STATE},
        "model": weights,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        **({"average": state.average.values} if state.average else {}),
        "backbone_dtype": name_dtype(state.dtype),
        "tally": state.tally.totals(),
    }
    write_checkpoint(path, payload)


def describe_divergence(subject: str, step: int, epoch: int, folder: Path) -> str:
    """Return the text of Diverged: what is not finite, at which step, and the checkpoint to resume from."""
    last = folder / LAST_NAME
    try:
        payload = load_checkpoint(last)
        advice = f"the last good checkpoint is {last} ({describe_position(*progress_of(payload))})"
    except UserError:
        advice = f"{last} cannot be read" if last.exists() else "there is no checkpoint yet"
    return f"{subject} is not finite at step {step} (epoch {epoch}); {advice}; lower --lr"


def describe_position(epoch: int, batches: int) -> str:
    """Return the progress of a checkpoint in words."""
    return f"epoch {epoch}" if not batches else f"epoch {epoch} and {batches} batches"


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write a dictionary of tensors and plain values, nested in any way; the file appears whole or not at all.

    A program that resumes from it needs `epoch` (finished epochs) and `batches` (finished batches of the next) in the payload.
    """
    with SIGNALS.hold(), atomic_file(path) as file:
        torch.save({"format": CHECKPOINT_FORMAT, **payload}, file)


def restore_state(state: TrainState, payload: dict[str, Any]) -> None:
    """Load a checkpoint that `check_identity` has accepted into the state."""
    state.model.load_state_dict(payload["model"], strict=False)
    state.optimizer.load_state_dict(payload["optimizer"])
    if payload["scaler"]:  # empty if the run began without loss scaling
        state.scaler.load_state_dict(payload["scaler"])
    if state.average:
        averages = state.average.values
        torch._foreach_copy_(list(averages.values()), [payload["average"][key] for key in averages])
    for key in PLAIN_STATE:
        setattr(state, key, payload[key])
    state.tally = Tally(payload["tally"])
    if state.model.backbone.frozen:
        # With a frozen backbone a run keeps its first dtype, in which its features were computed, also on a machine that would
        # choose another.
        state.dtype = getattr(torch, payload["backbone_dtype"])


def check_weights(expected: dict, weights: dict, where: str, remedy: str = RESTORE_OR_OVERWRITE) -> None:
    """Check weights against a state dict. Raises UserError, which names tensors that are missing, foreign, or of another shape."""
    wanted = {key: str(tuple(value.shape)) for key, value in expected.items()}
    shapes = {key: str(tuple(value.shape)) for key, value in weights.items() if key not in FOREIGN_GUARD}
    unfit = [key for key in sorted(wanted.keys() | shapes.keys()) if wanted.get(key) != shapes.get(key)]
    if unfit:
        named = [f"{key} {shapes.get(key, 'none')} instead of {wanted.get(key, 'none')}" for key in unfit[:4]]
        problem = f"{len(unfit)} of its tensors do not fit the model: {printable(', '.join(named))}"
        raise UserError(problem, where, remedy)


def deployed_weights(payload: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint that validation measures: the running mean, if there is one."""
    return payload.get("average", payload["model"])


def check_identity(
    path: Path, saved: dict, current: dict, ineffective: Sequence[str] = (), elsewhere: str = "choose a new --out_dir"
) -> None:
    """Check that `saved` equals `current` in all but the ineffective keys. Raises UserError, which lists each difference."""
    compared = current.keys() - ineffective
    changed = {key: (saved.get(key), current[key]) for key in compared if saved.get(key) != current[key]}
    lines = [f"{key}: {old} -> {new}" for key, (old, new) in changed.items() if key != "class_names"]
    if "class_names" in changed:
        lines.append(f"classes: {describe_change(*changed['class_names'])}")
    if lines:
        problem = "belongs to a run with other settings:\n    " + "\n    ".join(sorted(lines))
        remedy = f"use the settings of that run, {elsewhere}, or start afresh with --overwrite"
        raise UserError(problem, str(path), remedy)


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint from which a run resumes, and the unreadable ones found on the way."""

    path: Path
    payload: dict[str, Any]
    damaged: dict[Path, str] = dataclasses.field(default_factory=dict)  # path: why it cannot be read


def find_resume_point(
    folder: Path, resume: str | None, overwrite: bool, form: dict[str, Any] = CHECKPOINT_FORM
) -> ResumePoint | None:
    """Return where to resume; None for a fresh start. `resume` is None without the option, and "last" for --resume without PATH.

    --resume PATH allows that checkpoint alone. Otherwise it is checkpoint_last.pth or, if that is damaged or gone, the sound
    checkpoint with the most progress. Raises UserError, and moves no file, if the run has been trained but none is sound.
    """
    if overwrite and resume is not None:
        raise UserError("contradict each other", "--resume, --overwrite", "give one of them")
    if overwrite:
        return None
    if resume not in (None, "last"):
        path = Path(resume)
        path = path / LAST_NAME if path.is_dir() else path
        if path.exists() and path.resolve().parent != folder.resolve():
            remedy = f"give --out_dir {path.parent}, or copy that folder first"
            raise UserError("belongs to the run in another folder", f"--resume {path}", remedy)
        return ResumePoint(path, load_checkpoint(path, form))
    damaged: dict[Path, str] = {}
    point = None
    for path in list_checkpoints(folder):
        try:
            payload = load_checkpoint(path, form)
        except UserError as error:
            damaged[path] = error.what
            continue
        if point is None or progress_of(payload) > progress_of(point.payload):
            point = ResumePoint(path, payload, damaged)
        if path.name == LAST_NAME:
            break
    if point is None and damaged:
        lines = [f"{path.name} {reason}" for path, reason in damaged.items()]
        raise UserError("no checkpoint is sound:\n    " + "\n    ".join(lines), str(folder), RESTORE_OR_OVERWRITE)
    epochs = [row["epoch"] for row in read_events(folder) if row["event"] == "epoch_end" and "epoch" in row]
    if point is None and epochs:
        problem = f"{count_of(max(epochs), 'epoch')} trained, and no checkpoint is left"
        raise UserError(problem, str(folder), RESTORE_OR_OVERWRITE)
    if point is None and resume == "last":
        raise UserError(f"there is no {LAST_NAME} in {folder}", "--resume", "leave --resume out to start afresh")
    return point


def load_checkpoint(path: Path, form: dict[str, Any] = CHECKPOINT_FORM) -> dict[str, Any]:
    """Check and read a checkpoint onto the CPU, executing nothing in it. Raises UserError if it is damaged or not of `form`."""
    if not path.is_file():
        raise UserError("there is no such checkpoint", f"--resume {path}", "check the path, or leave --resume out")
    try:
        check_zip(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any zip, pickle or I/O error that a damaged or foreign file causes
        if is_out_of_memory(error):
            raise
        problem = f"cannot be read as a checkpoint: {printable(str(error)).split('. ')[0][:200]}"
        remedy = "leave --resume out to continue from the newest sound checkpoint, or name another with --resume PATH"
        raise UserError(problem, str(path), remedy) from error
    if isinstance(payload, dict) and {"arc", "model_name"} <= payload.keys():
        remedy = f"give it as --load_from {path}, which takes its backbone"
        raise UserError(f"is a checkpoint of {PREDECESSOR}", str(path), remedy)
    try:
        check_form(payload, {"format": int})
        if payload["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"it is of format {payload['format']}, not {CHECKPOINT_FORMAT}")
        check_form(payload, form)
    except ValueError as error:
        problem = f"is not a checkpoint of this script and version: {error}"
        raise UserError(problem, str(path), "resume from another one with --resume PATH") from error
    return payload


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, checkpoint_last.pth first."""
    paths = [path for path in folder.glob("checkpoint_*.pth") if path.is_file()]
    return sorted(paths, key=lambda path: (path.name != LAST_NAME, path.name))


def progress_of(payload: dict[str, Any]) -> tuple[int, int]:
    """Return the progress of a checkpoint: finished epochs, and finished batches of the next one."""
    return payload["epoch"], payload["batches"]


def rename_damaged(path: Path, reason: str, log: Callable[[str], None]) -> None:
    """Rename a checkpoint that cannot be used, and log a warning."""
    target = name_aside(path, "damaged")
    path.rename(target)
    sync_folder(path.parent)
    log(f"warning: {path.name} {reason}; it is now {target.name}")


def set_aside_later(
    paths: Iterable[Path], point: ResumePoint, log: Callable[[str], None], form: dict[str, Any] = CHECKPOINT_FORM
) -> None:
    """Rename the checkpoints with more progress than that of `point` to `<name>.old-<date>`, and log their former names."""
    ahead = []
    for path in paths:
        with contextlib.suppress(UserError):  # missing or damaged
            if progress_of(load_checkpoint(path, form)) > progress_of(point.payload):
                path.rename(name_aside(path, "old"))
                ahead.append(path.name)
    if ahead:
        log(f"set aside as *.old-DATE, ahead of {point.path.name}: {', '.join(ahead)}")


@contextlib.contextmanager
def keep_interrupted(folder: Path) -> Iterator[None]:
    """Copy checkpoint_last.pth to checkpoint_interrupt.pth if the block is interrupted; delete the copy when a block finishes."""
    try:
        yield
    except Interrupted:
        # OSError: none yet; BadZipFile: a damaged one; UserError: no room for the copy
        with contextlib.suppress(OSError, zipfile.BadZipFile, UserError):
            copy_checkpoint(folder / LAST_NAME, folder / INTERRUPT_NAME)
        raise
    (folder / INTERRUPT_NAME).unlink(missing_ok=True)  # left by an earlier start of the run


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint, whole or not at all. Raises zipfile.BadZipFile if it is damaged."""
    check_zip(source)
    with open(source, "rb") as file, atomic_file(target) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)


# ======================================================================================================================
# 14  PROTOTYPES
# ======================================================================================================================
# The gallery of reference embeddings: built, matched, calibrated on val, saved and loaded; and finished runs, loaded as model and
# gallery for inference. Raises UserError for files that cannot be read or do not belong together.
VIEW_NAMES = ("bbox", "mask")  # a crop as cut, and with its background replaced
OFFSET_WEIGHT, OFFSET_PRIOR_CROPS = 0.25, 2  # for enrolled classes; see `enrolment_offsets`
LEAD_WEIGHT = 0.5  # weight of an enrolled class's lead over the best trained class, in its score
MATCHER_NAMES = {
    "centroid": "nearest centroid",
    "prototypes": "nearest of several prototypes a class",
    "knn": "k nearest references of a class",
}
KNN_CHOICES = (1, 3, 5, 10)
FEATURE_WEIGHTS = (0.3, 0.5, 0.7)  # candidate weights of the backbone's features in a similarity
# Match quality that the features may cost on val: below the error of val, where the embedding has an edge, as it chose the epoch.
FEATURE_LOSS = 0.01
FEATURE_DIM = 128  # principal axes of the features that are kept
FEATURE_REFERENCES = 20_000  # references that the covariance of the features is estimated on
PROTOTYPE_CHOICES = (2, 3, 5)  # prototypes per class that --prototypes_per_class auto tries
MIN_CLUSTER = 3  # references that a cluster needs to become a prototype: fewer may be a mislabelled image
MAX_SPLIT_CLASSES = 2000  # above it auto uses centroids only: k-means takes about 10 ms per class
SIGNIFICANCE = 0.05  # level of the tests: gain from training, and several prototypes per class against one
MIN_CALIBRATION_SAMPLES = 20  # a class with fewer val answers gets the threshold of all classes
PRECISION_TARGETS = (0.90, 0.95, 0.99)
HELD_OUT_FOLDS = 10  # folds of the classes; each counts as unknown in turn
FEW_IMAGES = 10  # with fewer, one image moves the recall of a class by more than ten points
MATCHER_CHUNK = 8_000_000  # (queries x vectors) cosines that the matcher computes at a time: 32 MB
PROTOTYPES_FORMAT = 3


class Matcher(nn.Module):
    """Scores each class by the mean cosine to its nearest vectors: in evaluation, in labelling tools, and in exported models."""

    def __init__(self, vectors: np.ndarray, labels: np.ndarray, num_nearest: np.ndarray) -> None:
        """Arrange unit vectors float32 (P, D) that are sorted by their labels (P,).

        The score of a class averages `num_nearest` int (C,) vectors, or all if it has fewer; a class without vectors scores -1, as
        does one whose only vector is zero, the centroid of no references.
        """
        super().__init__()
        if not (is_given := vectors.any(axis=1)).all():
            vectors, labels = vectors[is_given], labels[is_given]
        self.has_enrolled = False
        sizes = np.bincount(labels, minlength=len(num_nearest))
        used = np.minimum(np.maximum(num_nearest, 1), sizes)
        # Classes of equal size are adjacent, so that their cosines need no gather or padding. Classes without vectors come first.
        order = np.lexsort((used, sizes))
        places = np.argsort(order)
        # (vectors of a class, vectors averaged): number of such classes
        self.groups = Counter(zip(sizes[order].tolist(), used[order].tolist(), strict=True))
        self.num_empty = self.groups.pop((0, 0), 0)
        self.has_one_each = set(self.groups) == {(1, 1)} and not self.num_empty
        if len(self.groups) > 1:
            vectors = vectors[np.argsort(places[labels], kind="stable")]
        self.array = vectors  # the buffer shares its memory; a new view for each product would slow it by a tenth
        self.register_buffer("vectors", torch.from_numpy(vectors))
        self.register_buffer("places", torch.from_numpy(places))

    def adjust_enrolled(self, is_enrolled: np.ndarray, offsets: np.ndarray) -> Matcher:
        """Add `offsets` float32 (C,) and LEAD_WEIGHT of their lead to the scores of enrolled classes (C,); return self.

        The lead is the gap to the best trained class, the usual confusion of an enrolled one. It separates right answers from wrong
        ones better than a cosine does, and changes no answer, only its confidence.
        """
        self.has_enrolled = bool(is_enrolled.any() and not is_enrolled.all())
        self.register_buffer("is_enrolled", torch.from_numpy(is_enrolled.astype(np.float32)))
        self.register_buffer("offsets", torch.from_numpy(offsets))
        return self

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the score (N, C) of each class for unit embeddings (N, D); a cosine similarity unless the class was enrolled."""
        scores = embeddings @ self.vectors.T if self.has_one_each else self.mean_of_nearest(embeddings)
        if not self.has_enrolled:
            return scores
        scores = scores + self.offsets
        best_trained = (scores - 9 * self.is_enrolled).amax(dim=1, keepdim=True)  # -9: never the best
        return scores + LEAD_WEIGHT * self.is_enrolled * (scores - best_trained)

    def mean_of_nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the mean cosine (N, C) of unit embeddings (N, D) to the nearest vectors of each class."""
        cosine = self.vectors @ embeddings.T  # (P, N)
        scores, start = [], 0
        for (size, used), num_classes in self.groups.items():
            stop = start + size * num_classes
            group = cosine[start:stop].reshape(num_classes, size, -1)
            start = stop
            if used == 1:
                scores.append(group.amax(dim=1))
            elif torch.compiler.is_exporting() or 64 * used <= size:
                scores.append(group.topk(used, dim=1).values.mean(dim=1))
            else:  # for small classes, numpy takes a quarter of the time of topk; in place, the largest come last
                group.numpy().partition(-used, axis=1)
                scores.append(group[:, -used:].mean(dim=1))
        scores = F.pad(torch.cat(scores), (0, 0, self.num_empty, 0), value=-1.0)
        return scores[self.places].T  # transposed once, here: OpenVINO drops the transpose of a single class

    def score(self, queries: np.ndarray) -> np.ndarray:
        """Return the score float32 (Q, C) of each class for unit queries (Q, D), in bounded memory."""
        if self.has_one_each and not self.has_enrolled:  # makes no array but the scores
            return queries @ self.array.T
        with torch.inference_mode():
            blocks = torch.from_numpy(queries).split(max(1, MATCHER_CHUNK // len(self.vectors)))
            return torch.cat([self(block) for block in blocks]).numpy()


class Embedded(NamedTuple):
    """Embeddings, or backbone features, of some records."""

    rows: np.ndarray  # (n,) int64 record numbers
    views: np.ndarray  # (n,) uint8 into VIEW_NAMES
    labels: np.ndarray  # (n,) int64
    values: np.ndarray  # (n, D) float32, embeddings with unit norm

    def take(self, chosen: np.ndarray) -> Embedded:
        """Return the chosen rows, given as positions or as a boolean mask."""
        return Embedded(*(column[chosen] for column in self))

    def by_class(self) -> Embedded:
        """Return the rows in ascending order of their labels."""
        return self.take(np.argsort(self.labels, kind="stable"))


class Fusion(nn.Module):
    """Concatenates embeddings with projected backbone features, which still separate classes that training has not seen."""

    def __init__(self, mean: np.ndarray, projection: np.ndarray, weight: float) -> None:
        """Take the mean (F,) and projection (F, K) of features, and the weight of features in a cosine, 0 = unused."""
        super().__init__()
        self.weight = weight
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("projection", torch.from_numpy(projection))

    def forward(self, features: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return unit vectors (B, D + K) from features (B, F) and unit embeddings (B, D).

        The cosine of two such vectors is the weighted mean of the cosines of their embeddings and of their projected features.
        """
        if not self.weight:
            return embeddings
        projected = F.normalize((features - self.mean) @ self.projection, dim=1)
        return torch.cat([embeddings * math.sqrt(1 - self.weight), projected * math.sqrt(self.weight)], dim=1)

    def fuse(self, features: Embedded, embedded: Embedded) -> Embedded:
        """Return the fused vectors of features and of the embeddings computed from them."""
        values = self(torch.from_numpy(features.values), torch.from_numpy(embedded.values))
        return embedded._replace(values=values.numpy())


NO_FUSION = Fusion(np.zeros(0, np.float32), np.zeros((0, 0), np.float32), 0.0)


@dataclass(frozen=True)
class Gallery:
    """References and thresholds that production matches against; format 3 of prototypes.npz. `fusion` makes its vectors."""

    class_names: tuple[str, ...]
    centroids: np.ndarray  # (C, D) float32 unit norm
    prototypes: np.ndarray  # (P, D) float32 unit norm, grouped by class: the centroids, or several per class
    prototype_labels: np.ndarray  # (P,) int64
    stacks: np.ndarray  # (N, D) float32 unit norm, the references, grouped by class
    stack_labels: np.ndarray  # (N,) int64
    stack_paths: tuple[str, ...]
    stack_views: np.ndarray  # (N,) uint8 into VIEW_NAMES
    thresholds: np.ndarray  # (C,) float32; an answer that scores below is `unknown`
    matcher: str  # centroid, prototypes (the nearest of a class) or knn
    knn_counts: np.ndarray  # (C,) int64, nearest references that knn averages; see `count_nearest`. Their maximum is k
    temperature: float
    is_pooled: np.ndarray  # (C,) bool, the threshold is the pooled one, as the class has too few val answers
    is_enrolled: np.ndarray  # (C,) bool, the class was added after training
    offsets: np.ndarray  # (C,) float32, added to scores of enrolled classes, 0 for others; see `enrolment_offsets`
    log_odds: np.ndarray  # (C, 2) float64, slope and intercept for answers of each class; see `fit_log_odds`
    unknown_share: float = 0.0  # of all objects, for which thresholds and log-odds were fitted
    spreads: tuple[float, float] = (0.0, 0.0)  # mean `class_spreads` of the references and of val; 0 = unknown
    val_thresholds: tuple[float, ...] = ()  # pooled over all classes, for each of PRECISION_TARGETS
    # By number of crops that a class is enrolled with: its threshold and log-odds, and `measure_enrolment` at that threshold.
    enrolment: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    by_centroid: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `match_by_centroid`
    fusion: Fusion = NO_FUSION

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of prototypes.npz, by name."""
        arrays = GALLERY_ARRAYS.items()
        return {name: np.asarray(operator.attrgetter(field)(self), dtype) for name, (field, dtype, _) in arrays}

    @functools.cached_property
    def module(self) -> Matcher:
        """The matcher as a torch module."""
        ones = np.ones(len(self.class_names), np.int64)
        arguments = {
            "centroid": (self.centroids, np.arange(len(ones)), ones),
            "prototypes": (self.prototypes, self.prototype_labels, ones),
            "knn": (self.stacks, self.stack_labels, self.knn_counts),
        }
        return Matcher(*arguments[self.matcher]).adjust_enrolled(self.is_enrolled, self.offsets)

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Return the score (Q, C) of each class for unit queries (Q, D), by the gallery's matcher."""
        return self.module.score(queries)

    def answer(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the most similar class of each of the queries (Q, D), and its score, (Q,) both."""
        return best_answers(self.scores, queries)

    def probability(self, answers: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return the probability (n,) that answers (n,) with scores (n,) are right, with `unknown_share` of unknown objects."""
        slope, intercept = self.log_odds[answers].T
        return scipy.special.expit(slope * scores.astype(np.float64) + intercept)

    def judge(self, queries: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return answer, true class and runner-up of queries (Q, D) with labels (Q,), and the scores of the three, (Q, 3) both."""

        def reduce(scores: np.ndarray, block: slice) -> tuple[np.ndarray, ...]:
            answers = scores.argmax(axis=1)
            other_scores = scores.copy()
            other_scores[np.arange(len(scores)), answers] = -np.inf  # a single class is its own runner-up
            classes = np.stack([answers, labels[block], other_scores.argmax(axis=1)], axis=1)
            return classes, np.take_along_axis(scores, classes, axis=1)

        return reduce_scores(self.scores, queries, reduce)

    @property
    def most_prototypes(self) -> int:
        """The largest number of prototypes of a class."""
        return int(np.bincount(self.prototype_labels).max())


def nearest_reference_matcher(references: Embedded, num_classes: int) -> Matcher:
    """Return the matcher that scores each class by its nearest reference."""
    references = references.by_class()
    return Matcher(references.values, references.labels, np.ones(num_classes, np.int64))


def export_gallery(
    model: Recognizer, records: Records, features: dict[str, Embedded], config: Config, unseen: dict
) -> tuple[Gallery, dict[str, Embedded]]:
    """Return the calibrated gallery built from features of train and val, and the vectors of each given split but `unknown`.

    `unknown` holds objects of no class; `unseen` is the evidence of `measure_unseen`, {} for none.
    """
    embedded = {name: embed(model, values) for name, values in features.items()}
    fusion = choose_fusion(features, embedded, len(records.class_names)) if config.match_features else NO_FUSION
    vectors = {name: fusion.fuse(features[name], embedded[name]) for name in features}
    strangers = vectors.pop("unknown").values if "unknown" in vectors else None
    gallery = build_gallery(records, vectors["train"], vectors["val"], config, strangers)
    evidence = (vectors["val"], config, strangers, unseen, model.backbone.dtype)
    by_centroid = {}
    if gallery.matcher == "knn" and config.matcher == "auto":
        plain = calibrate(dataclasses.replace(gallery, matcher="centroid"), *evidence)
        by_centroid = {name: getattr(plain, name) for name in CALIBRATED}
    return dataclasses.replace(calibrate(gallery, *evidence), fusion=fusion, by_centroid=by_centroid), vectors


def embed(model: Recognizer, features: Embedded) -> Embedded:
    """Put the model into eval mode, and return the embeddings that its head makes of features."""
    model.eval()
    device = next(model.head.parameters()).device
    with torch.inference_mode():
        chunks = torch.from_numpy(features.values).split(4096)
        values = torch.cat([model.embed(chunk.to(device)).cpu() for chunk in chunks])
    return features._replace(values=values.numpy())


def choose_fusion(features: dict[str, Embedded], embedded: dict[str, Embedded], num_classes: int) -> Fusion:
    """Return the fusion with the most weight for which nearest centroids lose at most FEATURE_LOSS of `match_quality` on val."""
    mean, projection = fit_projection(features["train"])
    candidates = [NO_FUSION]
    if projection.shape[1]:
        candidates += [Fusion(mean, projection, weight) for weight in FEATURE_WEIGHTS]
    qualities = []
    names = [name for name in ("train", "val", "unknown") if name in features]
    for fusion in candidates:
        train, val, *unknown = (fusion.fuse(features[name], embedded[name]) for name in names)
        centroids = class_centroids(train.values, train.labels, num_classes)
        strangers = unknown[0].values if unknown else None
        qualities.append(match_quality(lambda queries, centroids=centroids: queries @ centroids.T, val, strangers))
    return candidates[max(i for i, value in enumerate(qualities) if value >= qualities[0] - FEATURE_LOSS)]


def fit_projection(features: Embedded) -> tuple[np.ndarray, np.ndarray]:
    """Return mean (F,) and projection (F, K) that bring the within-class covariance of features half way to the identity.

    The projection is the inverse fourth root of the covariance, shrunk as in Ledoit and Wolf (2004): directions in which images of
    a class differ count less. With the inverse square root they hardly count, and new classes are recognised less often. Only the
    K <= FEATURE_DIM axes of largest variance are kept; K = 0 if no class has two references.
    """
    from sklearn.covariance import ledoit_wolf

    sample = np.linspace(0, len(features.labels) - 1, min(len(features.labels), FEATURE_REFERENCES)).astype(int)
    features = features.take(sample)
    _, labels = np.unique(features.labels, return_inverse=True)
    values = features.values.astype(np.float64)
    mean = values.mean(axis=0)
    class_means = sum_by_class(values, labels, labels.max() + 1) / np.bincount(labels)[:, None]
    within_variance, axes = np.linalg.eigh(ledoit_wolf(values - class_means[labels], assume_centered=True)[0])
    if within_variance[-1] <= 0:
        return mean.astype(np.float32), np.zeros((len(mean), 0), np.float32)
    whitening = axes / np.maximum(within_variance, 1e-6 * within_variance[-1]) ** 0.25 @ axes.T
    centred = (values - mean) @ whitening
    variance, principal = np.linalg.eigh(centred.T @ centred)
    principal = principal[:, variance > 1e-6 * variance[-1]][:, -FEATURE_DIM:]
    # The sign of an axis depends on rounding: make its largest component positive.
    principal *= np.sign(principal[np.abs(principal).argmax(axis=0), np.arange(principal.shape[1])])
    return mean.astype(np.float32), (whitening @ principal).astype(np.float32)


def build_gallery(
    records: Records, references: Embedded, val: Embedded, config: Config, strangers: np.ndarray | None = None
) -> Gallery:
    """Build a gallery whose centroids use all references, and choose its matcher on val; `calibrate` must follow.

    Unless `config.matcher` names one, the matcher, and its k of KNN_CHOICES, are those with the highest `match_quality`; the
    simpler wins ties. Without the vectors of `strangers` (U, D), accuracy on val decides: held-out classes cannot stand in for
    them, because the embedder was trained on them and separates them too well.
    """
    num_classes = len(records.class_names)
    references = references.by_class()
    centroids = class_centroids(references.values, references.labels, num_classes)
    stacks = references
    if config.max_refs_per_class is not None:
        by_class = rows_by_class(stacks.labels, num_classes)
        chosen = [rows[choose_references(stacks.values[rows], config.max_refs_per_class)] for rows in by_class]
        stacks = stacks.take(np.concatenate(chosen))
    gallery = Gallery(
        class_names=records.class_names,
        centroids=centroids,
        prototypes=centroids,
        prototype_labels=np.arange(num_classes),
        stacks=stacks.values,
        stack_labels=stacks.labels,
        stack_paths=tuple(records.paths[row] for row in stacks.rows.tolist()),
        stack_views=stacks.views,
        thresholds=np.zeros(num_classes, np.float32),
        matcher="centroid",
        knn_counts=np.ones(num_classes, np.int64),
        temperature=1.0,
        is_pooled=np.ones(num_classes, bool),
        is_enrolled=np.zeros(num_classes, bool),
        offsets=np.zeros(num_classes, np.float32),
        log_odds=np.zeros((num_classes, 2)),
    )
    if config.prototypes_per_class not in ("auto", "1"):
        gallery = split_classes(gallery, references, int(config.prototypes_per_class))
    sizes = np.bincount(stacks.labels, minlength=num_classes)
    knn_counts = [count_nearest(sizes, np.median(sizes), k) for k in KNN_CHOICES]
    candidates = [dataclasses.replace(gallery, matcher="knn", knn_counts=counts) for counts in knn_counts]
    *qualities, simple_quality = [match_quality(each.scores, val, strangers) for each in (*candidates, gallery)]
    knn = candidates[int(np.argmax(qualities))]
    if config.matcher == "knn" or (config.matcher == "auto" and max(qualities) > simple_quality):
        gallery = knn
    gallery = dataclasses.replace(gallery, knn_counts=knn.knn_counts)
    if config.matcher == config.prototypes_per_class == "auto" and num_classes <= MAX_SPLIT_CLASSES:
        gallery = try_several_prototypes(gallery, references, val)
    return gallery


def choose_references(embeddings: np.ndarray, limit: int) -> np.ndarray:
    """Return the ascending positions of at most `limit` references that cover a class best.

    They are the references nearest to the centres of `limit` k-means clusters: all usual views are represented, but a single
    mislabelled image is not, unlike in farthest-point sampling.
    """
    if len(embeddings) <= limit:
        return np.arange(len(embeddings))
    chosen: list[int] = []
    for similarity in cluster(embeddings, limit, 1).cluster_centers_ @ embeddings.T:
        chosen.append(next(i for i in np.argsort(-similarity, kind="stable").tolist() if i not in chosen))
    return np.sort(chosen)


def match_quality(score: Scorer, val: Embedded, strangers: np.ndarray | None) -> float:
    """Return the accuracy on val; given vectors of strangers (U, D), objects of no class, return `roc_area` instead."""
    answers, scores = best_answers(score, val.values)
    is_right = answers == val.labels
    if strangers is None:
        return float(is_right.mean())
    return roc_area(scores, best_answers(score, strangers)[1], is_right)


def best_answers(score: Scorer, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the class with the highest score for each of the queries (Q, D), and that score, (Q,) both."""
    return reduce_scores(score, queries, lambda scores, _: (scores.argmax(axis=1), scores.max(axis=1)))


def try_several_prototypes(gallery: Gallery, references: Embedded, val: Embedded) -> Gallery:
    """Return the gallery with the best of PROTOTYPE_CHOICES a class if significantly better on val, else the gallery unchanged.

    One-sided sign test over the val images that only one of the two gets right, at SIGNIFICANCE divided by the number of choices.
    """
    from scipy.stats import binomtest

    def hits(candidate: Gallery) -> np.ndarray:
        return (candidate.answer(val.values)[0] == val.labels).astype(float)

    rivals = [split_classes(gallery, references, count) for count in PROTOTYPE_CHOICES]
    best = max(rivals, key=lambda rival: hits(rival).sum())
    gain = np.bincount(val.rows, weights=hits(best) - hits(gallery))  # by image: mix has two views of some
    wins = int((gain > 0).sum())
    losses = int((gain < 0).sum())
    if wins and binomtest(wins, wins + losses, alternative="greater").pvalue < SIGNIFICANCE / len(rivals):
        return best
    return gallery


def split_classes(gallery: Gallery, references: Embedded, per_class: int) -> Gallery:
    """Return the gallery with up to `per_class` prototypes a class, which become its matcher if any class has more than one."""
    by_class = zip(rows_by_class(references.labels, len(gallery.class_names)), gallery.centroids, strict=True)
    prototypes = [mean_of_clusters(references.values[rows], per_class, centroid) for rows, centroid in by_class]
    gallery = take_prototypes(gallery, prototypes)
    return dataclasses.replace(gallery, matcher="prototypes") if gallery.most_prototypes > 1 else gallery


def calibrate(
    gallery: Gallery, val: Embedded, config: Config, strangers: np.ndarray | None, unseen: dict, dtype: torch.dtype
) -> Gallery:
    """Return the gallery with temperature fitted to val, thresholds and log-odds to val and unknown objects.

    Unknown objects are taken to be --unknown_share of all. `strangers` (U, D), vectors of such, give their scores. Without, these
    are what `measure_unseen` found for classes new to its heads, on the scale of this gallery's val scores; without that either,
    those of val crops whose classes are held out in turn, though the embedder has seen them, and real strangers score higher.
    `dtype` is the compute dtype of the backbone.
    """
    num_classes = len(gallery.class_names)
    answers, scores = gallery.answer(val.values)
    is_right = answers == val.labels
    median, spread = score_scale(scores)
    num_few = min(len(answers), 1 + RETRIEVAL_CHUNK // num_classes)  # enough to fit one number
    few = np.linspace(0, len(answers) - 1, num_few).astype(int)
    if strangers is not None:
        stranger_scores = gallery.answer(strangers)[1]
    elif unseen:
        stranger_scores = (median + spread * np.array(unseen["strangers"])).astype(np.float32)
    else:
        stranger_scores = answer_without_class(gallery.scores, val)[1]
    known = Answers(scores, is_right, stranger_scores, config.unknown_share)
    thresholds, is_pooled = fit_thresholds(answers, known, config.target_precision, num_classes, dtype)
    enrolment = {}
    for num_crops, enrolled in unseen.get("enrolled", {}).items():
        if not enrolled["scores"]:
            continue  # no val image was taken for an enrolled class
        enrolled_scores = (median + spread * np.array(enrolled["scores"])).astype(np.float32)
        of_enrolled = known._replace(scores=enrolled_scores, is_right=np.array(enrolled["is_right"], bool))
        figures = enrolled["figures"]
        is_same = all(figures.get(name) == getattr(config, name) for name in ("target_precision", "unknown_share"))
        enrolment[num_crops] = {
            "threshold": precision_threshold(of_enrolled, config.target_precision, dtype=dtype),
            "log_odds": fit_log_odds(of_enrolled),
            "figures": figures if is_same else None,
        }
    reference_spread = mean_of_defined(class_spreads(gallery.stacks, gallery.stack_labels, num_classes))
    val_spread = mean_of_defined(class_spreads(val.values, val.labels, num_classes))
    return dataclasses.replace(
        gallery,
        temperature=fit_temperature(gallery.scores(val.values[few]), val.labels[few]),
        thresholds=thresholds,
        is_pooled=is_pooled,
        val_thresholds=tuple(precision_threshold(known, level, dtype=dtype) for level in PRECISION_TARGETS),
        log_odds=np.tile(fit_log_odds(known), (num_classes, 1)),
        enrolment=enrolment,
        unknown_share=config.unknown_share,
        spreads=(0.0, 0.0) if math.isnan(reference_spread + val_spread) else (reference_spread, val_spread),
    )


def score_scale(scores: np.ndarray) -> tuple[float, float]:
    """Return the median of the scores (N,) of answers to known objects, and its distance from their 10 % quantile.

    On this scale, the scores of strangers agree between galleries of different heads.
    """
    median, low = np.quantile(scores, (0.5, 0.1)).tolist()
    return median, max(median - low, 1e-6)


def fit_thresholds(
    classes: np.ndarray, answers: Answers, precision: float, num_classes: int, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest threshold of each class that keeps `precision`, and whether it is the pooled one, (C,) both.

    `classes` (N,) are those that known objects were taken for; unknown ones are spread over the classes as these are. The precision
    of all answers together is the prior (see `precision_threshold`); a class with fewer than MIN_CALIBRATION_SAMPLES answers gets
    the pooled threshold.
    """
    thresholds = np.full(num_classes, precision_threshold(answers, precision, dtype=dtype), dtype=np.float32)
    is_pooled = np.bincount(classes, minlength=num_classes) < MIN_CALIBRATION_SAMPLES
    scores, is_right, weights = answers.mix()
    order = np.argsort(-scores, kind="stable")
    precisions = np.cumsum((weights * is_right)[order]) / np.cumsum(weights[order])
    # For each answer, the precision of all answers that score at least as high.
    prior = precisions[np.searchsorted(-scores[order], -scores, side="right") - 1]
    for label in np.flatnonzero(~is_pooled):
        in_class = classes == label
        of_class = answers._replace(scores=answers.scores[in_class], is_right=answers.is_right[in_class])
        prior_of_class = np.append(prior[: len(classes)][in_class], prior[len(classes) :])
        thresholds[label] = precision_threshold(of_class, precision, prior_of_class, dtype)
    return thresholds, is_pooled


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the T that minimises the cross-entropy of softmax(scores / T) (Guo et al., arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar

    def cross_entropy(log_temperature: float) -> float:
        return -log_softmax(scores / math.exp(log_temperature))[np.arange(len(labels)), labels].mean()

    best = minimize_scalar(cross_entropy, bounds=(math.log(0.005), math.log(2.0)), method="bounded")
    return math.exp(best.x)


def fit_log_odds(answers: Answers) -> tuple[float, float]:
    """Return slope and intercept of the log-odds that an answer is right, over its score (Platt, 1999)."""
    from sklearn.linear_model import LogisticRegression

    scores, is_right, weights = answers.mix()
    if is_right.all() or not is_right.any():
        smoothed_accuracy = (answers.is_right.sum() + 1) / (len(answers.is_right) + 2)
        return 0.0, float(scipy.special.logit(smoothed_accuracy))
    mean, std = scores.mean(), max(scores.std(), 1e-6)
    fitted = LogisticRegression().fit((scores[:, None] - mean) / std, is_right, sample_weight=weights)
    slope = max(0.0, fitted.coef_.item()) / std
    return slope, fitted.intercept_.item() - slope * mean


def measure_gallery(
    gallery: Gallery, test: Embedded, groups: np.ndarray, unknown: Embedded | None = None
) -> dict[str, Any]:
    """Measure how a gallery will do in production, on test queries of known classes that no choice was based on.

    `unknown` are vectors of objects of no class, whose labels do not count; without them, classes are held out in turn. The rows of
    both index `groups`, int (N,), which intervals draw as a whole.

    Returns:
        Figures as {value, interval}. closed: acc and f1_macro by `centroid`, by `knn`, and by `prototypes` if a class has several;
        retrieval: recall_at_1, recall_at_5, map_at_r; open_set: auroc, fpr95; answers: for each of PRECISION_TARGETS, threshold
        from val, precision and coverage on test; thresholds: precision and coverage with the thresholds of the classes; reliability
        and ece: of the probabilities of answers to test images and unknown objects, see `reliability`; unknown_passed: share of
        `unknown` that gets a class; mixed_precision: see there; few: classes with fewer than FEW_IMAGES test images.
    """
    num_classes = len(gallery.class_names)
    answers, scores = gallery.answer(test.values)
    is_right = answers == test.labels
    test_groups = groups[test.rows]

    def closed_set(matcher: str) -> dict[str, Any]:
        matched = dataclasses.replace(gallery, matcher=matcher).answer(test.values)[0]
        figures = mean_intervals(test_groups, acc=(matched == test.labels).astype(float))

        def f1_macro(drawn: np.ndarray) -> dict[str, float]:
            f1 = precision_recall_f1(matched[drawn], test.labels[drawn], num_classes)[2]
            return {"f1_macro": mean_of_defined(f1)}

        figures |= with_intervals(f1_macro, test_groups)
        if figures["acc"]["value"] in (0.0, 1.0):  # all draws agree
            figures["f1_macro"]["interval"] = figures["acc"]["interval"]
        return figures | ({"k": int(gallery.knn_counts.max())} if matcher == "knn" else {})

    def above(thresholds: np.ndarray | float) -> dict[str, Any]:
        passed = scores >= thresholds
        return mean_intervals(test_groups, coverage=passed, precision=np.where(passed, is_right, np.nan))

    if unknown is None:
        unknown_answers, unknown_scores = answer_without_class(gallery.scores, test)
    else:
        unknown_answers, unknown_scores = gallery.answer(unknown.values)
    all_answers, all_scores = np.append(answers, unknown_answers), np.append(scores, unknown_scores)
    is_known = np.arange(len(all_scores)) < len(scores)
    all_right = np.append(is_right, np.zeros(len(unknown_scores), bool))
    probability = gallery.probability(all_answers, all_scores)
    calibration = reliability(probability, all_right, is_known, gallery.unknown_share)
    matchers = [name for name in MATCHER_NAMES if name != "prototypes" or gallery.most_prototypes > 1]
    retrieval = retrieval_scores(test.values, test.labels, gallery.stacks, gallery.stack_labels)
    images = np.unique(test.rows, return_index=True)[1]  # with --crop_mode mix, an image has two views
    support = np.bincount(test.labels[images], minlength=num_classes)
    figures = {
        "closed": {matcher: closed_set(matcher) for matcher in matchers},
        "retrieval": mean_intervals(test_groups, **retrieval),
        "open_set": open_set_figures(gallery.scores, test, groups, unknown),
        "answers": [
            {"target": target, "threshold": threshold, **above(threshold)}
            for target, threshold in zip(PRECISION_TARGETS, gallery.val_thresholds, strict=True)
        ],
        "thresholds": above(gallery.thresholds[answers]),
        "unknown_share": gallery.unknown_share,
        **calibration,  # no interval: redrawn images fit the bins worse, which raises it
        "few": [gallery.class_names[i] for i in np.flatnonzero((support > 0) & (support < FEW_IMAGES)).tolist()],
    }
    if unknown is not None:
        is_accepted = all_scores >= gallery.thresholds[all_answers]
        figures |= mean_intervals(groups[unknown.rows], unknown_passed=is_accepted[~is_known])
        all_groups = np.append(test_groups, groups[unknown.rows])
        figures |= mixed_precision(all_groups, is_known, is_accepted, all_right, gallery.unknown_share)
    return figures


def answer_without_class(score: Scorer, known: Embedded) -> tuple[np.ndarray, np.ndarray]:
    """Return the answer to each query without its class and the others of that fold of HELD_OUT_FOLDS, and its score, (N,) both."""
    folds = known.labels % HELD_OUT_FOLDS

    def reduce(scores: np.ndarray, block: slice) -> tuple[np.ndarray, np.ndarray]:
        is_held_out = np.arange(scores.shape[1]) % HELD_OUT_FOLDS == folds[block, None]
        others = np.where(is_held_out, -1.0, scores)
        return others.argmax(axis=1), others.max(axis=1)

    return reduce_scores(score, known.values, reduce)


def write_predictions(path: Path, gallery: Gallery, records: Records, embedded: Embedded) -> None:
    """Write the gallery's answers to crops of known classes as a CSV file, one row for each view of a crop.

    `answer` is the nearest class, even where `is_unknown` says that its score lies below the threshold. A cosine is the similarity
    that the gallery's matcher computes. `nearest_reference` belongs to the answered class, `nearest_of_class` to the true one, and
    is empty if that class has none.
    """
    labels, scores = gallery.judge(embedded.values, embedded.labels)
    answers, true_labels, runners_up = labels.T
    names = np.array(gallery.class_names, object)
    view_names = np.array(VIEW_NAMES)
    cosines = scores.astype(np.str_)  # the shortest text that reads back as the same float32
    has_runner_up = runners_up != answers
    rows = embedded.rows.tolist()
    columns = {
        "path": [records.paths[row] for row in rows],
        "view": view_names[embedded.views],
        "class": names[true_labels],
        "answer": names[answers],
        "is_unknown": np.where(scores[:, 0] < gallery.thresholds[answers], "true", "false"),
        "cosine": cosines[:, 0],
        "probability": gallery.probability(answers, scores[:, 0]).tolist(),
        "runner_up": np.where(has_runner_up, names[runners_up], ""),
        "runner_up_cosine": np.where(has_runner_up, cosines[:, 2], ""),
        "class_cosine": cosines[:, 1],
    }
    reference_paths = np.array([*gallery.stack_paths, ""], object)  # at -1, no reference
    reference_views = np.append(view_names[gallery.stack_views], "")
    for name, class_labels in (("nearest_reference", answers), ("nearest_of_class", true_labels)):
        nearest = nearest_references(gallery, embedded.values, class_labels)
        columns[name] = reference_paths[nearest]
        columns[f"{name}_view"] = reference_views[nearest]
    columns["mask"] = [records.mask_of(row, VIEW_NAMES.index("mask")) for row in rows]
    columns["group"] = records.groups[rows].tolist()  # crops with the same number were kept in one split
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_bytes(path, text.getvalue().encode("utf-8"))


def nearest_references(gallery: Gallery, queries: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the position in the stacks of each query's nearest reference with the label given for it, int64 (Q,); -1 if none."""
    nearest = np.full(len(queries), -1)
    by_class = rows_by_class(gallery.stack_labels, len(gallery.class_names))
    for label in np.unique(labels).tolist():
        rows = by_class[label]
        if len(rows):
            cosine = queries[labels == label] @ gallery.stacks[rows].T
            nearest[labels == label] = rows[cosine.argmax(axis=1)]
    return nearest


def write_embeddings(path: Path, records: Records, embedded: dict[str, Embedded]) -> None:
    """Write the embeddings of all splits with their labels, paths, views and masks; readable with `allow_pickle=False`."""
    combined = concatenate_embedded(embedded.values())
    with SIGNALS.hold(), atomic_file(path) as file:
        np.savez(
            file,
            embeddings=combined.values,
            labels=combined.labels,
            paths=np.array([records.paths[row] for row in combined.rows.tolist()], dtype=np.str_),
            views=combined.views,
            splits=np.repeat(list(embedded), [len(part.rows) for part in embedded.values()]),
            masks=np.array([records.mask_of(row, 1) for row in combined.rows.tolist()], dtype=np.str_),
            class_names=np.array(records.class_names, dtype=np.str_),
        )


# Fields of `Gallery` that `calibrate` sets.
CALIBRATED_ARRAYS = ("thresholds", "is_pooled", "log_odds")
CALIBRATED = (*CALIBRATED_ARRAYS, "temperature", "val_thresholds", "enrolment")
# Arrays of prototypes.npz: field of `Gallery`, dtype kind and item size in bytes (0 = any), a letter or the length of each axis.
GALLERY_ARRAYS = {
    "id2cls": ("class_names", "U0", "C"),
    "centroids": ("centroids", "f4", "CD"),
    "thresholds": ("thresholds", "f4", "C"),
    "is_enrolled": ("is_enrolled", "b1", "C"),
    "offsets": ("offsets", "f4", "C"),  # added to the scores of enrolled classes
    "log_odds": ("log_odds", "f8", "C2"),  # slope and intercept
    "knn_counts": ("knn_counts", "i8", "C"),
    "prototypes": ("prototypes", "f4", "PD"),
    "prototype_labels": ("prototype_labels", "i8", "P"),
    "stacks": ("stacks", "f4", "ND"),
    "stack_labels": ("stack_labels", "i8", "N"),
    "stack_paths": ("stack_paths", "U0", "N"),
    "stack_views": ("stack_views", "u1", "N"),
    "matcher": ("matcher", "U0", ""),
    "feature_mean": ("fusion.mean", "f4", "F"),  # subtracted from the backbone's features
    "feature_projection": ("fusion.projection", "f4", "FK"),  # then applied to them; K = 0: only the embedding counts
    "feature_weight": ("fusion.weight", "f4", ""),  # of the projected features in a cosine
}


def save_gallery(path: Path, gallery: Gallery, meta: dict[str, Any]) -> None:
    """Write prototypes.npz, format 3: plain arrays and JSON, readable with `allow_pickle=False`."""
    meta = {
        "format": PROTOTYPES_FORMAT,
        **meta,
        "temperature": gallery.temperature,
        "enrolment": gallery.enrolment,
        "unknown_share": gallery.unknown_share,
        "spreads": gallery.spreads,
        "by_centroid": gallery.by_centroid,
        "val_thresholds": gallery.val_thresholds,
        "pooled_thresholds": list(itertools.compress(gallery.class_names, gallery.is_pooled)),  # names of the classes
    }
    texts = {"cls2id": {name: index for index, name in enumerate(gallery.class_names)}, "meta": to_json(meta)}
    with SIGNALS.hold(), atomic_file(path) as file:
        np.savez(
            file,
            **gallery.arrays(),
            **{name: np.array(json.dumps(content, ensure_ascii=False)) for name, content in texts.items()},
        )


def back_up_gallery(path: Path, class_names: Collection[str], say: Callable[[str], None]) -> None:
    """Keep a copy of the gallery that is about to be replaced by one with `class_names`; set it aside if it is damaged."""
    if not os.path.lexists(path):
        return
    try:
        missing = sorted(set(load_gallery(path)[0].class_names) - set(class_names))
    except UserError as error:
        rename_damaged(path, error.what, say)
        return
    backup = path.with_name(f"prototypes.{time.strftime('%Y%m%d-%H%M%S')}.npz")
    while backup.exists():
        backup = backup.with_name(f"{backup.stem}_.npz")
    copy_checkpoint(path, backup)
    say(f"{path.name} as it was is now {backup.name}")
    if missing:
        say(f"warning: enrolled classes have to be added again: {', '.join(missing)}")


def warn_of_bare_classes(gallery: Gallery, say: Callable[[str], None]) -> None:
    """Name the classes without a reference, which no crop can be matched with."""
    counts = np.bincount(gallery.stack_labels, minlength=len(gallery.class_names))
    if bare := list(itertools.compress(gallery.class_names, counts == 0)):
        say(f"warning: without a readable training image, and never recognised: {', '.join(bare)}")


def describe_gallery(
    config: Config, info: BackboneInfo, class_names: Sequence[str], model: Recognizer
) -> dict[str, Any]:
    """Return the meta of prototypes.npz: how its embeddings are made, target precision, dtype, date, and a hash of the options."""
    return {
        **describe_embedding(config, info, model),
        "target_precision": config.target_precision,
        "precision": name_dtype(model.backbone.dtype),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "config_hash": fingerprint(make_identity(config, class_names, None)),  # covers neither paths nor the backbone
    }


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, loaded for inference: the model, and the gallery that was made with it."""

    path: Path
    config: Config  # of the training
    info: BackboneInfo
    model: Recognizer  # in eval mode
    runtime: Runtime
    extract: Callable[..., np.ndarray]  # images to features; see `make_extractor`
    gallery: Gallery | None = None  # None while it is being rebuilt
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the gallery
    unseen: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `measure_unseen`

    def embed(self, images: torch.Tensor, name_of: Callable[[int], str] = str, batch: int | None = None) -> np.ndarray:
        """Return the unit vectors float32 (N, D) that the gallery matches; arguments and Raises as for `extract`."""
        features = torch.from_numpy(self.extract(images, name_of, batch))
        with torch.inference_mode():
            blocks = features.split(batch or len(features))
            embeddings = torch.cat([self.model.embed(send(block, self.runtime.device)).cpu() for block in blocks])
            return self.gallery.fusion(features, embeddings).numpy()

    def transform(self) -> Transform:
        """Return the transform of a crop into the model's input."""
        return make_transform(self.config, self.info.mean)


def load_run(path: Path, runtime: Runtime, backbone_weights: Path | None = None) -> TrainedRun:
    """Load the best model and the gallery of a finished run. Raises UserError like `load_model`, or if the two do not match."""
    config = read_run_config(path)
    gallery_path = path / "prototypes.npz"
    gallery, meta = load_gallery(gallery_path)
    run = load_model(path, config, runtime, backbone_weights)
    differences = [
        f"\n    {key}: {meta.get(key)} in the prototypes, {value} in the run"
        for key, value in to_json(describe_embedding(config, run.info, run.model)).items()
        if meta.get(key) != value
    ]
    if differences:
        problem = f"does not belong to the checkpoint beside it:{''.join(differences)}"
        raise UserError(problem, str(gallery_path), gallery_remedy(path))
    return dataclasses.replace(run, gallery=gallery, meta=meta)


def read_run_config(path: Path) -> Config:
    """Read the options of a run from its config.json. Raises UserError if it is damaged, of another version, or out of range."""
    where = f"--run {path}"
    remedy = "give the out_dir of a finished run, or start its training command again, which writes config.json anew"
    try:
        record = read_json(path / "config.json", {"options": dict, "origins": dict})
    except (OSError, ValueError) as error:
        reason = printable(getattr(error, "strerror", None) or str(error))[:200]
        raise UserError(f"has no config.json that can be read: {reason}", where, remedy) from error
    known = {field.name: field for field in option_fields()}
    foreign = sorted(record["options"].keys() - known.keys() - {"command"})
    missing = [name for name in known if known[name].metadata.get("fixed") and name not in record["options"]]
    if foreign or missing:
        names = ", ".join((*foreign, *missing)[:8])
        problem = f"was made by another version of this script, with other options: {names}"
        raise UserError(problem, where, _other_version_remedy(path))
    options, places = convert_options(path / "config.json", record, Config)
    config = Config(origins=places, **options)
    check_ranges(config)
    check_config(config)
    return config


def load_gallery(path: Path) -> tuple[Gallery, dict[str, Any]]:
    """Read prototypes.npz and its meta, checked and never unpickled. Raises UserError if it is damaged or of another format."""
    if not os.path.lexists(path):
        raise UserError(f"has no {path.name}", str(path.parent), gallery_remedy(path.parent))
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as content:
            if set(content.files) == {"centroids", "stacks", "cls2id", "id2cls"}:
                raise ValueError(f"they are of {PREDECESSOR}")
            return unpack_gallery(dict(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = printable(getattr(error, "strerror", None) or str(error)).split(". ")[0][:200]
        raise UserError(f"cannot be read as prototypes: {reason}", str(path), gallery_remedy(path.parent)) from error


def gallery_remedy(run_dir: Path) -> str:
    """Return the remedy for a missing or damaged gallery: the command that rebuilds it, if the folder is that of a run."""
    if not (run_dir / "config.json").exists():
        return "give the out_dir of a finished run"
    return f"python {SCRIPT_NAME} prototypes --run {shlex.quote(str(run_dir))} makes them anew from the best checkpoint"


def unpack_gallery(arrays: dict[str, np.ndarray]) -> tuple[Gallery, dict[str, Any]]:
    """Build the gallery from the arrays of prototypes.npz; return it and the meta. Raises ValueError naming what does not fit."""
    meta = json.loads(str(arrays.get("meta", "{}")))
    if meta.get("format", PROTOTYPES_FORMAT) != PROTOTYPES_FORMAT:
        raise ValueError(f"its meta says format {meta['format']}, not {PROTOTYPES_FORMAT}")
    missing = [f"array {name}" for name in ("meta", *GALLERY_ARRAYS) if name not in arrays]
    keys = "by_centroid enrolment format pooled_thresholds spreads temperature val_thresholds".split()
    missing += [f"{key} in its meta" for key in keys if key not in meta]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    fields: dict[str, Any] = {}
    lengths = {"2": 2}  # of axes, by their letter; "2" is a fixed length
    for name, (field, kind, axes) in GALLERY_ARRAYS.items():
        array = arrays[name]
        if array.dtype.kind != kind[0] or kind[1] not in ("0", str(array.dtype.itemsize)):
            raise ValueError(f"its {name} holds {array.dtype}, not {np.dtype(kind).name}")
        expected = tuple(lengths.setdefault(axis, size) for axis, size in zip(axes, array.shape, strict=False))
        if array.shape != expected or array.ndim != len(axes):
            sizes = ", ".join(str(lengths.get(axis, "any")) for axis in axes)
            raise ValueError(f"its {name} has the shape {array.shape}, not ({sizes})")
        fields[field] = array
        if kind == "U0":
            fields[field] = tuple(array.tolist()) if axes else str(array)
    for name in ("prototype_labels", "stack_labels"):
        labels = arrays[name]
        if not len(labels) or labels[0] < 0 or labels[-1] >= lengths["C"] or (np.diff(labels) < 0).any():
            raise ValueError(f"its {name} are not numbers of its {lengths['C']} classes in ascending order")
    if fields["matcher"] not in MATCHER_NAMES:
        raise ValueError(f"its matcher is {fields['matcher']}, none of {', '.join(MATCHER_NAMES)}")
    mean, projection, weight = (fields.pop(f"fusion.{key}") for key in ("mean", "projection", "weight"))
    if not 0 <= weight < 1 or lengths["K"] > lengths["D"]:
        raise ValueError("its feature_weight is not from 0 to 1, or its feature_projection is wider than its vectors")
    enrolment = {
        str(int(crops)): {
            "threshold": float(entry["threshold"]),
            "log_odds": np.array(entry["log_odds"], float).reshape(2),
            "figures": entry["figures"],
        }
        for crops, entry in meta["enrolment"].items()
    }
    reference_spread, val_spread = map(float, meta["spreads"])
    gallery = Gallery(
        **fields,
        temperature=float(meta["temperature"]),
        is_pooled=np.isin(arrays["id2cls"], meta["pooled_thresholds"]),
        val_thresholds=tuple(map(float, meta["val_thresholds"])),
        enrolment=enrolment,
        unknown_share=float(meta.get("unknown_share", 0.2)),  # older galleries lack it
        fusion=Fusion(mean, projection, float(weight)),
        spreads=(reference_spread, val_spread),
        by_centroid=meta["by_centroid"],
    )
    if len(match_by_centroid(gallery).thresholds) != lengths["C"]:
        raise ValueError(f"its by_centroid is not of {lengths['C']} classes")
    return gallery, meta


def load_model(path: Path, config: Config, runtime: Runtime, backbone_weights: Path | None = None) -> TrainedRun:
    """Load the best model of a run; `backbone_weights` locates moved backbone weights. Raises UserError if files are unusable."""
    place = f"--run {path}"
    restart = "start its training command again, which takes it from the other checkpoints"
    if not (path / BEST_NAME).is_file():
        raise UserError(f"has no {BEST_NAME}", place, f"give the out_dir of a run that has finished, or {restart}")
    try:
        payload = load_checkpoint(path / BEST_NAME)
    except UserError as error:
        remedy = f"{restart}; if the run is of another version, {_other_version_remedy(path)}"
        raise UserError(error.what, str(path / BEST_NAME), remedy) from error
    weights = config.load_from or config.backbone_weights
    source: dict[str, Any] = {}
    if not config.freeze_backbone:  # the checkpoint holds the backbone's weights
        source = {"pretrained": False, "backbone_weights": None, "load_from": None}
    elif backbone_weights is not None:
        source = {"backbone_weights": backbone_weights, "load_from": None}
    elif weights is not None and not weights.exists():
        raise UserError(f"its backbone's weights are no longer at {weights}", place, "give --backbone_weights FILE")
    backbone, info = build_backbone(dataclasses.replace(config, **source), show)
    saved = payload["identity"]["backbone_hash"]
    if config.freeze_backbone and info.weights_hash != saved:
        problem = f"its head was trained on other backbone weights: {saved}, here {info.weights_hash} ({info.weights})"
        raise UserError(problem, place, "give those weights with --backbone_weights FILE")
    model = build_recognizer(config, len(payload["identity"]["class_names"]), backbone, info)
    check_weights(model.trained_state(), deployed_weights(payload), str(path / BEST_NAME))
    model.load_state_dict(deployed_weights(payload), strict=False)
    model.eval().to(runtime.device)
    model.backbone = model.backbone.with_dtype(runtime.inference_dtype)
    extract = make_extractor(model.backbone, info, runtime)
    return TrainedRun(path, config, info, model, runtime, extract, unseen=payload["unseen"])


def _other_version_remedy(path: Path) -> str:
    return f"use the script that made the run, which lies in it: {path / SCRIPT_NAME}; or train again with this one"


def make_extractor(backbone: Backbone, info: BackboneInfo, runtime: Runtime) -> Callable[..., np.ndarray]:
    """Return a function that maps images uint8 (N, 3 or 4, H, W) to features float32 (N, F); the backbone must not train meanwhile.

    The function runs `batch` images at a time. It raises Diverged, with the image's name by `name_of`, if features are not finite.
    """
    network = runtime.wrap(backbone.eval())

    def extract(images: torch.Tensor, name_of: Callable[[int], str] = str, batch: int | None = None) -> np.ndarray:
        with torch.inference_mode():
            blocks = images.split(batch or len(images))
            features = torch.cat([network(send(block, runtime.device)) for block in blocks])
        is_finite = features.norm(dim=1).isfinite().cpu()
        if not is_finite.all():
            name = printable(name_of(int(is_finite.int().argmin())))
            made_by = f"by {info.model_id} ({info.weights}) in {name_dtype(backbone.dtype)}"
            remedy = "" if backbone.dtype == torch.float32 else "--precision fp32, or "
            remedy += "other weights" if backbone.frozen else "other weights, or lower --lr"
            raise Diverged(f"the features of {name}, {made_by}, are not finite numbers; give {remedy}")
        return features.cpu().numpy()

    return extract


def describe_embedding(config: Config, info: BackboneInfo, model: Recognizer) -> dict[str, Any]:
    """Return everything that determines an embedding, besides the crop."""
    transforms = production_transforms(config)
    backbone = model.backbone
    backbone_hashes = backbone.hashes if backbone.frozen and backbone.hashes else hash_tensors(backbone.model)
    hashes = {f"0.{key}": value for key, value in backbone_hashes.items()}
    hashes |= {f"1.{key}": value for key, value in hash_tensors(model.head).items()}
    return {
        **{name: getattr(info, name) for name in ("model_id", "img_size", "mean", "std", "interpolation", "pool")},
        **{name: getattr(config, name) for name in ("emb_dim", "in_channels", "crop_mode")},
        "weights_hash": fingerprint(hashes),
        "padding": PADDING_GRAY,
        "mask_fill": {"kind": config.mask_fill, "colour": make_fill(config, info.mean).colour},
        **({"transforms": transforms} if transforms else {}),
    }


def unknown_records(folder: Path, config: Config) -> Records:
    """Return the images of a folder, split by a hash of their paths into val, which sets thresholds, and test, which measures.

    Images whose names agree in what --group_regex captures stay together. Raises UserError if one half is empty.
    """
    paths = list_image_tree(folder).paths
    keys = [captured_text(path, config.group_regex) or path for path in paths]
    splits = [2 - hashlib.sha256(os.fsencode(key)).digest()[0] % 2 for key in keys]  # odd: val, even: test
    if len(set(splits)) < 2:
        num_groups = len(set(keys))
        of_groups = f" in {count_of(num_groups, 'group')} (--group_regex)" if num_groups < len(keys) else ""
        problem = f"holds {count_of(len(paths), 'image')}{of_groups}, which leaves one half empty"
        raise UserError(problem, f"--unknown_dir {folder}", "give a folder with more images of no class")
    labels = np.zeros(len(paths), np.int32)
    groups = np.unique(keys, return_inverse=True)[1].astype(np.int32)
    table = np.array(paths, dtype=STRINGS)
    return Records(folder, ("unknown",), table, labels, groups, np.array(splits, np.int8), image_bits=config.image_bits)


def embed_records(
    run: TrainedRun, records: Records, rows: np.ndarray, config: RunOptions, make_values: Callable[..., np.ndarray]
) -> Embedded | None:
    """Embed some records with run.embed or run.extract, in the views that the run was trained with.

    --batch and --workers come from `config`. Every rank embeds a part of the records; ranks other than 0 get None.
    """

    def note(failures: list[tuple[int, str]]) -> None:
        for row, reason in failures:
            show(f"warning: {printable(f'{records.root}/{records.paths[row]}')} {reason}")

    batches = cut_batches(eval_keys(records, rows, run.config.crop_mode), config.batch)
    dataset = CropDataset(records, run.transform())
    embedded = embed_batches(make_values, dataset, batches, config, run.runtime, note)
    return collect_embedded(progress(embedded, len(batches), "embedding"), str(records.root))


def embed_batches(
    make_values: Callable[[torch.Tensor, Callable[[int], str]], np.ndarray],
    dataset: CropDataset,
    batches: list[list[SampleKey]],
    config: Config | RunOptions,
    runtime: Runtime,
    note: Callable[[list[tuple[int, str]]], None],
) -> Iterator[Embedded]:
    """Yield the embeddings of each batch, on rank 0 only; there, `note` receives the images that could not be read.

    `make_values` maps images uint8 (B, 3 or 4, H, W), and a function that returns the name of image i, to embeddings (B, D). All
    ranks have to iterate, because each result is gathered.
    """

    def answer(batch: Batch) -> tuple[list[tuple[int, str]], Embedded]:
        values = np.zeros((0, 1), np.float32)
        if len(batch.rows):
            values = make_values(batch.images, lambda index: dataset.records.paths[int(batch.rows[index])])
        return batch.failures, Embedded(batch.rows.numpy(), batch.views.numpy(), batch.labels.numpy(), values)

    for failures, embedded in take_turns(lambda chunk: make_loader(dataset, chunk, config, runtime), batches, answer):
        note(failures)
        yield embedded


def collect_embedded(batches: Iterable[Embedded], where: str) -> Embedded | None:
    """Concatenate the batches of `embed_batches`; None on ranks other than 0. Raises UserError if no image can be read."""
    readable = [embedded for embedded in batches if len(embedded.rows)]
    if get_rank():
        return None
    if not readable:
        raise UserError("none of the images can be read", where, "check that the files are there and whole")
    return concatenate_embedded(readable)


def scan_for_run(
    run: TrainedRun, root: Path, config: Config | EvaluateOptions | PrototypesOptions, splits_path: Path | None = None
) -> Scan:
    """Scan a folder and its masks with the run's options; with the run's splits.json, keep only the images that the run used."""
    place = "--add" if root == getattr(config, "add", None) else config.origins.get("data_root")
    regex = run.config.group_regex
    if not splits_path and not any(captured_text(path, regex) for path in list_image_tree(root).paths):
        regex = None  # files of another folder may have other names
    options = dataclasses.replace(
        run.config,
        origins=run.config.origins | ({"data_root": place} if place else {}),
        data_root=root,
        out_dir=run.path,
        class_map=config.class_map,
        exclude=config.exclude,
        group_regex=regex,
        masks_out=config.masks_out,
        data_fraction=run.config.data_fraction if splits_path else 1.0,
        splits=run.config.splits if splits_path else "random",  # any other folder holds class folders
    )
    return attach_masks(scan_dataset(options, splits_path), options)


def enrol(gallery: Gallery, added: Embedded, names: Sequence[str], paths: Sequence[str]) -> Gallery:
    """Return the gallery with more references, of its classes or of new ones; nothing is trained.

    Labels of the added crops index `names`, rows index `paths`. Each class that gets crops has the mean of all its references as
    centroid; the direction of images that --max_refs_per_class has left out is kept. Trained classes keep their thresholds; an
    enrolled one gets that of `measure_unseen` for as many crops as it has now, or the highest of the others. Scores of its crops
    among each other say too little: they are few, and the crops to compare them with are of training classes, which the model
    separates too well. With a new class, a gallery that chose nearest references matches by centroids.
    """
    class_names = (*gallery.class_names, *(name for name in names if name not in gallery.class_names))
    num_classes = len(class_names)
    num_old = len(gallery.class_names)
    num_new = num_classes - num_old
    if num_new:
        gallery = match_by_centroid(gallery)
    label_of = np.array([class_names.index(name) for name in names], dtype=np.int64)
    num_stacks = len(gallery.stacks)
    stacks = Embedded(np.arange(num_stacks), gallery.stack_views, gallery.stack_labels, gallery.stacks)
    added = added._replace(rows=num_stacks + added.rows, labels=label_of[added.labels])
    stacks = concatenate_embedded([stacks, added]).by_class()
    stack_paths = (*gallery.stack_paths, *paths)
    changed = np.unique(added.labels)
    centroids = np.concatenate([gallery.centroids, np.zeros((num_new, stacks.values.shape[1]), np.float32)])
    old_sums = sum_by_class(gallery.stacks, gallery.stack_labels, num_old)
    weighted = np.linalg.norm(old_sums, axis=1, keepdims=True) * gallery.centroids
    values, labels = np.concatenate([weighted, added.values]), np.append(np.arange(num_old), added.labels)
    centroids[changed] = class_centroids(values, labels, num_classes)[changed]
    median_count = float(np.median(np.bincount(gallery.stack_labels, minlength=num_old)))
    counts = count_nearest(np.bincount(stacks.labels, minlength=num_classes), median_count, gallery.knn_counts.max())
    knn_counts = np.append(gallery.knn_counts, np.ones(num_new, np.int64))
    thresholds = np.append(gallery.thresholds, np.full(num_new, gallery.thresholds.max(), np.float32))
    trained_odds = gallery.log_odds[np.argmin(gallery.is_enrolled)]
    log_odds = np.concatenate([gallery.log_odds, np.tile(trained_odds, (num_new, 1))])
    is_enrolled = np.append(gallery.is_enrolled, np.ones(num_new, bool))
    offsets = np.where(is_enrolled, enrolment_offsets(gallery.spreads, stacks, num_classes), np.float32(0))
    prototypes = [gallery.prototypes[rows] for rows in rows_by_class(gallery.prototype_labels, num_classes)]
    class_rows = rows_by_class(stacks.labels, num_classes)
    for label in changed.tolist():  # as many prototypes a class as before
        values = stacks.values[class_rows[label]]
        prototypes[label] = mean_of_clusters(values, gallery.most_prototypes, centroids[label])
        if not is_enrolled[label]:
            continue
        knn_counts[label] = counts[label]
        crops = {stack_paths[row] for row in stacks.rows[class_rows[label]].tolist()}
        if measured := find_enrolment_figures(gallery, len(crops)):
            thresholds[label] = measured["threshold"]
            log_odds[label] = measured["log_odds"]
    return dataclasses.replace(
        take_prototypes(gallery, prototypes),
        class_names=class_names,
        centroids=centroids,
        stacks=stacks.values,
        stack_labels=stacks.labels,
        stack_paths=tuple(stack_paths[row] for row in stacks.rows.tolist()),
        stack_views=stacks.views,
        thresholds=thresholds,
        is_enrolled=is_enrolled,
        offsets=offsets,
        log_odds=log_odds,
        knn_counts=knn_counts,
        is_pooled=np.append(gallery.is_pooled, np.ones(num_new, bool)),
    )


def match_by_centroid(gallery: Gallery) -> Gallery:
    """Return the gallery as it matches once classes are enrolled: by centroids, since knn rarely finds a class of few references.

    `by_centroid` holds the fields CALIBRATED for that, as arrays or as JSON; {} leaves the gallery unchanged.
    """
    if not gallery.by_centroid:
        return gallery
    arrays = {name: np.array(gallery.by_centroid[name], getattr(gallery, name).dtype) for name in CALIBRATED_ARRAYS}
    fields = gallery.by_centroid | arrays
    return dataclasses.replace(gallery, matcher="centroid", by_centroid={}, **fields)


def concatenate_embedded(items: Iterable[Embedded]) -> Embedded:
    """Return the rows of all items as one."""
    return Embedded(*map(np.concatenate, zip(*items, strict=True)))


def count_nearest(num_references: np.ndarray, usual: float, k: int) -> np.ndarray:
    """Return how many nearest references (C,) the score of each class averages: k, less for classes with fewer than usual.

    Otherwise all five references of a class would compete with the best five of a hundred. `usual` is the median over classes.
    """
    return np.clip(np.ceil(k * num_references / max(1.0, usual)), 1, k).astype(np.int64)


def mean_of_clusters(embeddings: np.ndarray, count: int, centroid: np.ndarray) -> np.ndarray:
    """Return the unit means (n, D), n <= count, of the k-means clusters of a class; its centroid if it does not split."""
    count = min(count, len(embeddings) // MIN_CLUSTER)
    if count < 2:
        return centroid[None]
    clusters = cluster(embeddings, count, 4).labels_
    means = class_centroids(embeddings, clusters, count)[np.bincount(clusters, minlength=count) >= MIN_CLUSTER]
    return means if len(means) > 1 else centroid[None]


def cluster(embeddings: np.ndarray, count: int, starts: int) -> Any:
    """Return scikit-learn's k-means of embeddings (n, D), the best of `starts` random starts."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters, because of duplicates: harmless
        return KMeans(count, n_init=starts, random_state=0).fit(embeddings)


def class_centroids(embeddings: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the re-normalised mean embedding of each class, float32 (C, D); zeros for a class without references."""
    sums = sum_by_class(embeddings, labels, num_classes)
    return (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def enrolment_offsets(spreads: tuple[float, float], references: Embedded, num_classes: int) -> np.ndarray:
    """Return the number to add to the scores of each class if it is enrolled, float32 (C,).

    Training pulls the images of its classes together; images of other classes lie wider apart, so an equally typical one has a
    smaller cosine. OFFSET_WEIGHT times the excess of the class's spread over that of the training references makes up for it. The
    spread of few crops is a guess: that of val is averaged in, as OFFSET_PRIOR_CROPS more crops. `spreads` are these two.
    """
    reference_spread, val_spread = spreads
    if not reference_spread:  # not known
        return np.zeros(num_classes, np.float32)
    num_more = np.maximum(np.bincount(references.labels, minlength=num_classes) - 1, 0)  # crops after the first
    spread = np.nan_to_num(class_spreads(references.values, references.labels, num_classes))
    spread = (num_more * spread + OFFSET_PRIOR_CROPS * val_spread) / (num_more + OFFSET_PRIOR_CROPS)
    return (OFFSET_WEIGHT * (spread - reference_spread)).astype(np.float32)


def class_spreads(embeddings: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return one minus the mean cosine of pairs of embeddings (N, D) within each class, float64 (C,); NaN without a pair."""
    counts = np.bincount(labels, minlength=num_classes)
    pair_sums = (sum_by_class(embeddings, labels, num_classes) ** 2).sum(axis=1) - counts
    return 1 - np.divide(pair_sums, counts * (counts - 1), out=np.full(num_classes, np.nan), where=counts > 1)


def sum_by_class(embeddings: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the sum of the embeddings (N, D) of each class, float64 (C, D); 30 times as fast as np.add.at."""
    from scipy.sparse import csr_matrix

    rows = np.arange(len(labels))
    members = csr_matrix((np.ones(len(rows)), (labels, rows)), shape=(num_classes, len(rows)))
    return members @ embeddings


def take_prototypes(gallery: Gallery, prototypes: Sequence[np.ndarray]) -> Gallery:
    """Return the gallery with the given prototypes, an array (n, D) per class; if none has several, centroids match."""
    labels = np.repeat(np.arange(len(prototypes)), list(map(len, prototypes)))
    gallery = dataclasses.replace(gallery, prototypes=np.concatenate(prototypes), prototype_labels=labels)
    is_idle = gallery.matcher == "prototypes" and gallery.most_prototypes == 1
    return dataclasses.replace(gallery, matcher="centroid") if is_idle else gallery


def describe_enrolled(gallery: Gallery, names: Sequence[str]) -> list[str]:
    """Return one sentence for each named class that was enrolled: its threshold, and the precision of such ones on test images."""
    sentences = []
    for label in map(gallery.class_names.index, names):
        if not gallery.is_enrolled[label]:
            continue
        crops = set(itertools.compress(gallery.stack_paths, gallery.stack_labels == label))
        measured = find_enrolment_figures(gallery, len(crops))
        figures = measured and measured["figures"]
        if measured is None:
            basis = "the highest of the other classes, as nothing was measured"
        elif figures is None:
            basis = "set for another precision or share of unknown objects than in training, and not tested"
        elif not figures["answers"]:
            basis = f"with which classes that heads of the training did not know got no answer at {figures['target_precision']:.0%}"
        else:
            basis = (
                f"with which classes that heads of the training did not know had {figures['precision']:.0%} of"
                f" {figures['answers']} answers right, where {figures['target_precision']:.0%} were asked"
            )
        named = f"{gallery.class_names[label]}, {count_of(len(crops), 'crop')}"
        sentences.append(f"threshold of {named}: {gallery.thresholds[label]:.3f}, {basis}")
    return sentences


def find_enrolment_figures(gallery: Gallery, num_crops: int) -> dict[str, Any] | None:
    """Return what was measured for the largest number of crops up to `num_crops`, else for the smallest; None if nothing was."""
    counts = sorted(map(int, gallery.enrolment))
    fitting = [count for count in counts if count <= num_crops] or counts[:1]
    return gallery.enrolment[str(fitting[-1])] if fitting else None


def find_collisions(gallery: Gallery, names: Sequence[str]) -> list[str]:
    """Return one sentence for each named class that is hard to tell from another, and one if few references face many."""
    # One view of each crop: the nearest to it would be its other view.
    crops = np.sort(np.unique(np.array(gallery.stack_paths, object), return_index=True)[1])
    references, labels = gallery.stacks[crops], gallery.stack_labels[crops]
    counts = np.bincount(labels, minlength=len(gallery.class_names))
    sentences = []
    for label in map(gallery.class_names.index, names):
        nearest, _ = nearest_others(references, np.flatnonzero(labels == label))
        neighbours = labels[nearest] if counts[label] > 1 else np.zeros(0, np.int64)  # one alone has none
        num_taken = np.bincount(neighbours[neighbours != label], minlength=len(counts))
        similarity = gallery.centroids @ gallery.centroids[label]
        similarity[label] = -1.0
        other = int(num_taken.argmax()) if num_taken.any() else int(similarity.argmax())
        twins = f"{gallery.class_names[label]} is hard to tell from {gallery.class_names[other]}"
        if num_taken[other]:
            taken = f"{num_taken[other]} of its {counts[label]} crops"
            sentences.append(f"{twins}: {taken} are nearer to a crop of that class than to each other")
        elif similarity[other] >= gallery.thresholds[other]:
            cosine = f"similarity of their centroids {similarity[other]:.3f}"
            sentences.append(f"{twins}: {cosine}, which is above the threshold of that class")
    few = [name for name in itertools.compress(gallery.class_names, 5 * counts < np.median(counts)) if name in names]
    if gallery.matcher == "knn" and few:
        sentences.append(
            f"{', '.join(few)}: of many references of another class one is often nearer than the few of these; matched by"
            " centroids (prototypes --matcher centroid, then --add again) new classes are found more often"
        )
    return sentences


def remove_class(gallery: Gallery, name: str) -> Gallery:
    """Return the gallery without one class. Raises UserError if it has no such class, or the rest is too little to match."""
    if name not in gallery.class_names:
        remedy = did_you_mean(name, gallery.class_names, "--list shows what there is")
        raise UserError(f"there is no class {printable(name)}", "--remove", remedy)
    num_classes = len(gallery.class_names)
    if num_classes <= 2:
        raise UserError("would leave one class only", f"--remove {name}", "a gallery needs two")
    label = gallery.class_names.index(name)
    if np.delete(gallery.is_enrolled, label).all():
        problem = "is the last class that the run was trained on: the scores of enrolled ones are relative to such"
        raise UserError(problem, f"--remove {name}", "train a run with the classes that are left")
    keep_masks = {  # by the letter of an array's first axis
        "C": np.arange(num_classes) != label,
        "N": gallery.stack_labels != label,
    }
    fields: dict[str, Any] = {"is_pooled": gallery.is_pooled[keep_masks["C"]]}
    if gallery.by_centroid:
        by_class = {name: np.array(gallery.by_centroid[name])[keep_masks["C"]] for name in CALIBRATED_ARRAYS}
        fields["by_centroid"] = gallery.by_centroid | by_class
    for field, kind, axes in GALLERY_ARRAYS.values():
        if axes[:1] in keep_masks:
            values = np.array(getattr(gallery, field))[keep_masks[axes[0]]]
            fields[field] = tuple(values.tolist()) if kind == "U0" else values
    fields["stack_labels"] -= fields["stack_labels"] > label
    prototypes = [gallery.prototypes[rows] for rows in rows_by_class(gallery.prototype_labels, num_classes)]
    del prototypes[label]
    return take_prototypes(dataclasses.replace(gallery, **fields), prototypes)


def format_gallery(gallery: Gallery) -> str:
    """Return an aligned table with the references, prototypes, threshold and nearest class of each class."""
    num_classes = len(gallery.class_names)
    nearest, similarity = nearest_others(gallery.centroids, np.arange(num_classes))
    references = np.bincount(gallery.stack_labels, minlength=num_classes)
    prototypes = np.bincount(gallery.prototype_labels, minlength=num_classes)
    width = max(5, *map(len, gallery.class_names))
    lines = [f"{'class':<{width}}{'references':>12}{'prototypes':>12}{'threshold':>11}  nearest class"]
    for label, name in enumerate(gallery.class_names):
        mark = "*" if gallery.is_pooled[label] else " "
        lines.append(
            f"{name:<{width}}{references[label]:>12,}{prototypes[label]:>12}{gallery.thresholds[label]:>10.3f}{mark}"
            f"  {gallery.class_names[nearest[label]]} ({similarity[label]:.3f})"
        )
    if gallery.is_pooled.any():
        lines.append("* no threshold of its own: that of all classes together, or of enrolled ones")
    return "\n".join(lines)


def nearest_others(vectors: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of the rows (n,) of vectors (N, D) the position of the nearest other vector, and its cosine, (n,) both."""

    def reduce(cosine: np.ndarray, block: slice) -> tuple[np.ndarray, np.ndarray]:
        cosine[np.arange(len(cosine)), rows[block]] = -1.0  # of a vector with itself
        return cosine.argmax(axis=1), cosine.max(axis=1)

    return reduce_scores(lambda block: block @ vectors.T, vectors[rows], reduce)


def best_score(scores: np.ndarray) -> np.ndarray:
    """Return the score (N,) of the best class from scores (N, C)."""
    return scores.max(axis=1)


def open_set_figures(
    score: Scorer,
    known: Embedded,
    groups: np.ndarray,
    unknown: Embedded | None,
    confide: Callable[..., np.ndarray] = best_score,
) -> dict[str, Any]:
    """Return auroc and fpr95, as {value, interval}, of the confidence (n,) that `confide` computes from scores (n, C) of queries.

    `unknown` are queries of no class. If None, each fold of the classes in turn leaves the gallery, its queries count as unknown,
    and figures are means over the folds. The embedder was trained on those classes: real unknown objects are harder. `unknowns`
    counts their images.
    """

    def hold_out(scores: np.ndarray, _: slice) -> tuple[np.ndarray, ...]:
        fold_of_class = np.arange(scores.shape[1]) % HELD_OUT_FOLDS
        return tuple(confide(scores[:, fold_of_class != fold]) for fold in range(min(HELD_OUT_FOLDS, scores.shape[1])))

    if unknown is not None:
        queries = (known.values, unknown.values)
        confidences = [reduce_scores(score, values, lambda scores, _: (confide(scores),))[0] for values in queries]
        is_unknown = np.arange(len(known.rows) + len(unknown.rows)) >= len(known.rows)
        rows = np.append(known.rows, unknown.rows)
        figures = measure_unknown(groups[rows], [(np.concatenate(confidences), ~is_unknown, is_unknown)])
        source = "images of no class"
        return figures | {"unknowns": len(np.unique(unknown.rows)), "source": source, "trained_on_them": False}
    is_held_out = [known.labels % HELD_OUT_FOLDS == fold for fold in range(HELD_OUT_FOLDS)]
    pairs = zip(reduce_scores(score, known.values, hold_out), is_held_out, strict=False)
    folds = [(confidences, ~is_unknown, is_unknown) for confidences, is_unknown in pairs]
    figures = measure_unknown(groups[known.rows], folds)
    source = "classes held out in turn, on which it was trained"
    return figures | {"unknowns": len(np.unique(known.rows)), "source": source, "trained_on_them": True}


def measure_unknown(
    groups: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """Return auroc and fpr95, means over folds as {value, interval}, of telling known from unknown objects by confidence.

    Each fold holds the confidences of all queries (n,), and the masks of the known and of the unknown ones, bool (n,) both.
    `groups` (n,) is the group of each query, drawn as a whole.
    """

    def mean_of_folds(drawn: np.ndarray) -> dict[str, float]:
        per_fold = [
            open_set_metrics(confidences[drawn[is_known[drawn]]], confidences[drawn[is_unknown[drawn]]])
            for confidences, is_known, is_unknown in folds
        ]
        return {name: mean_of_defined(np.array([metrics[name] for metrics in per_fold])) for name in per_fold[0]}

    figures = with_intervals(mean_of_folds, groups)
    sides = [np.unique(groups[np.any([fold[i] for fold in folds], axis=0)]) for i in (1, 2)]
    for figure in figures.values():
        if figure["interval"] in ([0.0, 0.0], [1.0, 1.0]):
            figure["interval"] = wilson_interval(figure["value"], min(sides, key=len))
    return figures


# ======================================================================================================================
# 15  TRAINING
# ======================================================================================================================
# The training loop (`fit` > `train_epoch` > `train_step`), features, evaluation and the frozen baseline. Raises Diverged.
EPOCH_REFS_PER_CLASS = 50  # training images per class that a fine-tuned run embeds for the metrics of each epoch
# Heads trained without a fold of the classes measure unseen classes, in about a minute; skipped above UNSEEN_MAX_IMAGES.
UNSEEN_FOLDS, UNSEEN_MAX_IMAGES = 5, 50_000
UNKNOWN_QUANTILES, ENROLMENT_ANSWERS = 201, 2000  # stored from these heads, for thresholds and probabilities
UNSEEN_STEPS = 1500  # optimizer steps of all these heads together
UNSEEN_REFS_PER_CLASS = 50  # references in their galleries
ENROLMENT_CROPS, ENROLMENT_DRAWS = (1, 5, 20), 3  # crops per enrolled class, and random draws of each number
LOGREG_MAX_IMAGES = 20_000  # the logistic regression of the frozen baseline is fitted on at most this many
LOGREG_MAX_CLASSES = 2000  # no regression above it: its solver keeps 20 copies of (classes x feature_dim) in float64
FINITE_CHECK_STEPS = 50  # steps between checks for non-finite losses, since each check waits for the device
MAX_DATA_WAIT = 0.1  # share of an epoch spent waiting for data; above it the log says what to change
CACHE_NOTE_SECONDS = 10  # time between progress notes while views are embedded; an interruption loses no more
FP16_MAX = 65504.0
SAME_SESSION = 0.8  # images of one session have at least this cosine of the untrained backbone's standardised features
SESSION_PAIRS = 20_000_000_000  # (test, training) pairs of views; above it sessions are not searched


@dataclass(frozen=True)
class Job:
    """Everything about a run that stays the same while it trains."""

    config: Config
    records: Records
    runtime: Runtime
    run: RunDirectory | None  # None until the folder is opened; other ranks get a ReadOnlyRunDirectory
    info: BackboneInfo
    backgrounds: Backgrounds | None = None
    store: SquareStore | None = None  # crops that are decoded already
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> reason; failed after the scan

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Values that must be equal in a checkpoint for this run to resume from it."""
        identity = make_identity(self.config, self.records.class_names, self.info)
        return identity | {"backgrounds": self.backgrounds and self.backgrounds.identity}

    def transform(self, augment: bool) -> Transform:
        """Return the transform from a crop to the model's input."""
        return make_transform(self.config, self.info.mean, augment)

    def training_crops(self) -> CropDataset:
        """Return the dataset of augmented crops, as training sees them."""
        return CropDataset(self.records, self.transform(augment=True), self.backgrounds, self.store)

    def note_failures(self, failures: Sequence[tuple[int, str]]) -> None:
        """Log the images and masks that could not be read, as (row, reason), each image once per run."""
        for row, reason in failures:
            path = self.records.paths[row]
            if self.records.root != self.config.data_root:  # of --unknown_dir
                path = f"{self.records.root}/{path}"
            if path not in self.unreadable:
                self.unreadable[path] = reason
                self.run.log(f"warning: {path} {reason}")


def scan_fills_squares(config: Config) -> bool:
    """Return whether training reads the fitted squares of all crops that a scan decodes.

    It does not if its transforms need the unfitted crop. With --crop_mode mask, most crops are shown masked, but a scan does not
    know the masks yet; with --data_fraction, most squares would go unread.
    """
    lists = given_lists(config)
    is_read = not lists.get("pre_transforms") and not {"train_augmentations", "val_augmentations"} <= lists.keys()
    return is_read and config.crop_mode != "mask" and config.data_fraction == 1


def open_store(job: Job, squares: SquareFile) -> SquareStore | None:
    """Open the store of fitted crops: those of the scan, and those that the run fits to the same square again, decoded here.

    There are as many as have room. Returns None if there is no square, or if writing them fails.
    """
    config, records, run = job.config, job.records, job.run
    if not config.cache_crops:
        return None
    train = records.rows("train")
    uses = []  # (augmented, rows) of what is read in several epochs or views
    always_on_background = job.backgrounds is not None and job.backgrounds.probability == 1  # a new one each time
    if (config.cache_views or config.epochs) > 1 and not always_on_background:
        uses.append((True, train))
    if config.trains_backbone and config.epochs > 1:  # each epoch embeds them anew
        references = first_of_each_class(train, records.labels, EPOCH_REFS_PER_CLASS)
        uses += [(False, records.rows("val")), (False, references)]
    crops: dict[tuple[int, int], None] = {}  # (row, view into VIEW_NAMES), an ordered set
    for augment, rows in uses:
        is_cacheable = [job.transform(augment).is_cacheable(is_masked) for is_masked in (False, True)]
        keys = eval_keys(records, rows, config.crop_mode)  # for mix both views, either of which training may draw
        crops |= dict.fromkeys((key.row, key.view) for key in keys if is_cacheable[key.view])
    transform = job.transform(augment=False)
    places = np.full((len(VIEW_NAMES), len(records.paths)), -1, np.int64)
    places[0] = [squares.places.get(path, -1) for path in records.paths]
    missing = [(row, view) for row, view in crops if places[view, row] < 0]
    ends = squares.end + np.cumsum([(3, 4)[view] * config.img_size**2 for _, view in missing])
    pending = missing[: np.searchsorted(ends, squares.room, side="right")]

    def write(crop: tuple[int, int]) -> int:
        with contextlib.suppress(ImageError):
            image, mask, reason = load_crop(records, *crop)
            return -1 if reason else squares.put(transform.make_square(image, mask, 0))
        return -1

    for (row, view), place in progress(map_in_threads(write, pending), len(pending), "fitting crops", "crop"):
        places[view, row] = place
    squares.flush()
    count = int((places >= 0).sum())
    if squares.failure is not None or (missing and not count):
        reason = f": {squares.failure}" if squares.failure else ""
        run.log(f"warning: no room to keep decoded crops in {run.path}{reason}: they are decoded each epoch")
    elif count:
        run.log(
            f"decoded crops are kept on disk while the run lasts: {count:,}, {squares.end / 1e6:,.1f} MB (--cache_crops)"
        )
        return SquareStore(squares.file, records, places, config.img_size)
    return None


def square_room(config: Config) -> int:
    """Return how many bytes of fitted crops a run may keep: at most --cache_crops, and a quarter of free disk and of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Beyond memory, a read is slower than decoding.
    return int(min(1e9 * config.cache_crops, free_disk(config.out_dir) / 4, memory / 4))


class FeatureBank:
    """Features (n, feature_dim) of whole splits without augmentation; kept if the backbone is frozen, else extracted anew."""

    def __init__(self, job: Job, backbone: Backbone) -> None:
        self._job = job
        self._backbone = backbone
        self._cache: dict[str, Embedded] = {}
        self._dataset = CropDataset(job.records, job.transform(augment=False), store=job.store)

    def get(self, split: str, per_class: int | None = None) -> Embedded | None:
        """Return the features of a split, None on other ranks; `per_class` limits the images per class unless all are kept."""
        if split in self._cache:
            return self._cache[split]
        records = self._job.records
        rows = records.rows(split)
        if not self._backbone.frozen and per_class is not None:
            rows = first_of_each_class(rows, records.labels, per_class)
        features = self.extract(eval_keys(records, rows, self._job.config.crop_mode), split)
        if self._backbone.frozen:
            self._cache[split] = features
        return features

    def extract(self, keys: list[SampleKey], name: str) -> Embedded | None:
        """Return the features of samples, None on other ranks than 0; `name` labels the progress bar."""
        job = self._job
        batches = cut_batches(keys, job.config.val_batch or job.config.batch)
        extract = make_extractor(self._backbone, job.info, job.runtime)
        embedded = embed_batches(extract, self._dataset, batches, job.config, job.runtime, job.note_failures)
        bar = progress(embedded, len(batches), f"embedding {name}")
        return collect_embedded(bar, f"{name} images of {job.records.root}")


class ViewCache:
    """Feeds training with features of augmented views, embedded once and shown in turn with the features of the clean image.

    The features lie in out_dir, float16 (views, images, feature_dim), NaN for an image that cannot be read. A JSON note beside them
    records how many are done, and for which run, data and library versions: an interrupted run continues its file, any other is
    overwritten. All ranks embed; rank 0 alone trains the head, which needs no images.
    """

    def __init__(self, job: Job, backbone: Backbone, clean: Embedded | None) -> None:
        self._job, self._backbone = job, backbone
        self._rows = job.records.rows("train")
        self._sampler = EpochSampler(self._rows, job.records.labels, job.config)
        self.num_batches = len(self._sampler)  # per epoch
        self.network = nn.Identity()  # the batches hold features
        self._path = job.run.path / "cached_views.f16"
        num_views = job.config.cache_views
        generators = [np.random.default_rng((job.config.seed, 7, turn)) for turn in range(num_views + 1)]
        draws = np.stack([rng.random(len(self._rows)) for rng in generators])
        # bool (1 + views, images): whether a view shows the image masked; view 0 is the clean one
        self._is_masked = (draws < self._sampler.masked_share) & job.records.has_mask[self._rows]
        self._shape = (num_views, len(self._rows), job.info.feature_dim)
        self._fill()
        if clean is None:  # other ranks only help to embed
            return
        # Position of each image's clean view in `clean`, -1 if it could not be read, int64 (images,).
        clean_keys = 2 * clean.rows + clean.views
        image_keys = 2 * self._rows + self._is_masked[0]
        order = np.argsort(clean_keys)
        candidates = order[np.searchsorted(clean_keys[order], image_keys).clip(max=len(clean_keys) - 1)]
        self._clean_index = np.where(clean_keys[candidates] == image_keys, candidates, -1)
        self._clean = clean.values
        self._features = np.memmap(self._path, np.float16, "r", shape=self._shape)

    def sample(self) -> Embedded | None:
        """Return the features of at most LOGREG_MAX_IMAGES cached views, drawn at random; None on other ranks."""
        if get_rank():
            return None
        order = np.random.default_rng((self._job.config.seed, 4)).permutation(len(self._features) * len(self._rows))
        views, positions = np.divmod(np.sort(order[:LOGREG_MAX_IMAGES]), len(self._rows))
        return self._look_up(1 + views, positions)

    def batches(self, state: TrainState) -> Iterator[Batch]:
        """Yield the batches of the epoch that the state has not seen yet; none on other ranks."""
        if get_rank():
            return
        self._sampler.start_at(state.epoch, state.batches)
        label = f"epoch {state.epoch + 1}/{self._job.config.epochs}"
        yield from map(self.take, progress(self._sampler, self.num_batches - state.batches, label))

    def take(self, keys: list[SampleKey]) -> Batch:
        """Return the features of samples as a batch; each image shows its views in turn, the clean one if it is not augmented."""
        positions = np.searchsorted(self._rows, [key.row for key in keys])
        turns = (positions + [key.showing for key in keys]) % len(self._is_masked)
        turns *= np.array([key.augmented for key in keys])
        rows, views, labels, features = map(torch.from_numpy, self._look_up(turns, positions))
        return Batch(features, labels, rows, views, [])

    def _look_up(self, turns: np.ndarray, positions: np.ndarray) -> Embedded:
        """Return the features of views `turns` (n,) of images `positions` (n,) that can be read; view 0 is the clean one."""
        index = self._clean_index[positions]
        features = np.where(index[:, None] < 0, np.nan, self._clean[index])
        is_cached = turns > 0
        features[is_cached] = self._features[turns[is_cached] - 1, positions[is_cached]]
        rows, is_masked = self._rows[positions], self._is_masked[turns, positions]
        labels = self._job.records.labels[rows].astype(np.int64)
        return Embedded(rows, is_masked.astype(np.uint8), labels, features).take(~np.isnan(features[:, 0]))

    def _fill(self) -> None:
        """Embed the views that the file lacks, and keep its note up to date."""
        num_views, num_images, feature_dim = self._shape
        note_path = self._path.with_suffix(".json")
        maker = {  # everything that the features depend on
            "format": CHECKPOINT_FORMAT,
            "identity": self._job.identity,
            "data": [self._job.records.fingerprint, self._job.records.masks_hash],
            "dtype": str(self._backbone.dtype),
            "versions": list_versions(),
            "shape": list(self._shape),
        }
        done = from_first(self._count_done, note_path, maker)
        if done == num_views * num_images:
            return
        done_text = f", {done:,} are there" if done else ""
        self._job.run.log(f"embedding {num_views} augmented views of {num_images:,} images once{done_text}")
        if get_rank():
            deque(self._embed(done), maxlen=0)
            return
        with open(self._path, "r+b" if done else "wb") as file:
            file.seek(done * 2 * feature_dim)

            def write_note() -> None:
                file.flush()
                os.fsync(file.fileno())
                write_json(note_path, {"done": done, "maker": maker})

            last_note = time.monotonic()
            try:
                for features in self._embed(done):
                    file.write(features.tobytes())
                    done += len(features)
                    if time.monotonic() - last_note > CACHE_NOTE_SECONDS:
                        write_note()
                        last_note = time.monotonic()
            finally:
                write_note()

    def _count_done(self, note_path: Path, maker: dict[str, Any]) -> int:
        """Return how many features of this maker the file holds. Raises UserError if the disk has no room for the missing ones."""
        num_views, num_images, feature_dim = self._shape
        row_bytes = 2 * feature_dim
        done = 0
        with contextlib.suppress(OSError, ValueError):  # no note, or a malformed one
            note = read_json(note_path, {"maker": dict, "done": int})
            if note["maker"] == to_json(maker):
                done = min(note["done"], self._path.stat().st_size // row_bytes)
        missing_bytes = (num_views * num_images - done) * row_bytes
        folder = self._path.parent
        if missing_bytes and (free := free_disk(folder)) < missing_bytes:
            problem = f"need {missing_bytes:,} bytes, and {free:,} are free"
            raise UserError(problem, f"--cache_views {num_views}", f"make room in {folder}, or cache fewer views")
        return done

    def _embed(self, first: int) -> Iterator[np.ndarray]:
        """Yield the features from number `first` on in batches, float16 (B, feature_dim), NaN if unreadable; rank 0 only."""
        job, (num_views, num_images, feature_dim) = self._job, self._shape
        dataset = job.training_crops()
        extract = make_extractor(self._backbone, job.info, job.runtime)
        for view in range(first // num_images, num_views):
            keys = [
                SampleKey(row, (job.config.seed, 3, view, row, 0), int(is_masked))
                for row, is_masked in zip(self._rows.tolist(), self._is_masked[view + 1].tolist(), strict=True)
            ]
            batches = cut_batches(keys[max(0, first - view * num_images) :], job.config.batch)
            embedded = embed_batches(extract, dataset, batches, job.config, job.runtime, job.note_failures)
            bar = progress(embedded, len(batches), f"embedding view {view + 1} of {num_views}")
            for batch, extracted in zip(batches, bar, strict=get_rank() == 0):  # other ranks embed, but get nothing
                features = np.full((len(batch), feature_dim), np.nan, np.float16)
                is_readable = np.isin([key.row for key in batch], extracted.rows)
                features[is_readable] = extracted.values.clip(-FP16_MAX, FP16_MAX)
                yield features


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    import platform
    from importlib.metadata import version

    packages = "torch timm albumentations opencv-python-headless scikit-learn numpy pillow simplejpeg".split()
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def free_disk(path: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(existing_folder(path)).free


class TrainFeed:
    """Feeds training with augmented images from any batch of any epoch on; each rank gets its part of each batch."""

    def __init__(self, job: Job, backbone: Backbone) -> None:
        self._job = job
        self._dataset = job.training_crops()
        self._sampler = EpochSampler(job.records.rows("train"), job.records.labels, job.config)
        self._sampler.rank = get_rank()
        self._sampler.world_size = get_world_size()
        self._loader: DataLoader | None = None
        self.num_batches = len(self._sampler)  # per epoch
        self.network = job.runtime.wrap(backbone, is_trained=True)  # maps images to features

    def batches(self, state: TrainState) -> Iterator[Batch]:
        """Yield the batches of the epoch that the state has not seen yet."""
        job = self._job
        if dist.is_initialized():  # heads drift apart where devices round differently
            for value in (*state.model.head.state_dict().values(), *state.model.criterion.state_dict().values()):
                dist.broadcast(value, 0)
        first = state.batches

        def read(failed: int, taken: int) -> DataLoader:
            if failed or self._loader is None:
                self._loader = make_loader(self._dataset, self._sampler, job.config, job.runtime)
            self._sampler.start_at(state.epoch, first + taken)
            return self._loader

        label = f"epoch {state.epoch + 1}/{job.config.epochs}"
        bar = progress(outlive_workers(read, job.run.log), self.num_batches - first, label)
        yield from map(gather_batch, bar)


@dataclass
class Clock:
    """Times an epoch in this process; monotonic, so a change of the system time does not matter."""

    device: torch.device
    seconds_before: float = 0.0  # spent on the epoch before an interruption
    images: int = 0
    started: float = dataclasses.field(default_factory=time.monotonic)
    waits: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)  # marks of each batch: requested, arrived

    def seconds(self) -> float:
        """Return the seconds spent on the epoch so far."""
        return self.seconds_before + time.monotonic() - self.started

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and record how long the device was idle before each: a GPU may still be busy with the last step."""
        requested = self._mark()
        for batch in batches:
            self.waits.append((requested, self._mark()))
            self.images += len(batch.labels)
            yield batch
            requested = self._mark()

    def _mark(self) -> float | torch.cuda.Event:
        """Return the time on a CPU; on a GPU an event, recorded when the GPU has finished all work queued so far."""
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def pace(self) -> dict[str, float]:
        """Return images/s of all ranks and the share of time spent waiting for data; the device must have finished its work."""
        is_cuda = self.device.type == "cuda"
        waited = sum(start.elapsed_time(end) / 1000 if is_cuda else end - start for start, end in self.waits)
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {"images_per_s": round(self.images / seconds, 1), "data_wait": round(waited / seconds, 3)}


def fit(job: Job, state: TrainState, bank: FeatureBank) -> None:
    """Train from the state's position to the last epoch; evaluate, record and save each epoch."""
    config = job.config
    backbone = backbone_in_training(state, config)
    if not has_ended(config, state.epoch, state.best):  # else only what a finished run leaves is made anew
        feed = ViewCache(job, backbone, bank.get("train")) if config.cache_views else TrainFeed(job, backbone)
    if not backbone.frozen:  # epochs are evaluated in the training dtype, unlike the best weights at the end
        bank = FeatureBank(job, backbone)
    while not has_ended(config, state.epoch, state.best):
        clock = Clock(job.runtime.device, state.seconds)
        try:
            train_epoch(job, state, feed, clock)
        except Interrupted:  # always between two steps
            save_state(job, state)
            raise
        pace = clock.pace()
        with state.average.applied() if state.average else contextlib.nullcontext():
            features = {"val": bank.get("val"), "train": bank.get("train", EPOCH_REFS_PER_CLASS)}
            record, per_class = from_first(score_epoch, job, state, features)
        record |= {"seconds": round(clock.seconds(), 2), "pace": pace}
        with SIGNALS.hold():  # the record, the best epoch and the checkpoints must agree
            job.run.log(format_epoch(record, config))
            job.run.event("epoch_end", **record, **(per_class if config.save_metrics else {}))
            save_epoch(job, state, record["val"])
            SIGNALS.wants_save = False
    if state.epoch < config.epochs:
        reason = f"no better {config.best_metric} since epoch {state.best['epoch']}"
        job.run.log(f"training ends after epoch {state.epoch}: {reason} (--patience {config.patience})")


def backbone_in_training(state: TrainState, config: Config) -> Backbone:
    """Return the backbone in the dtype that training computes in, compiled with --compile; evaluation may use another dtype."""
    backbone = state.model.backbone.with_dtype(state.dtype)
    if config.compile:
        backbone.model.compile()
    return backbone


def has_ended(config: Config, epoch: int, best: dict[str, Any]) -> bool:
    """Whether training is over after `epoch` epochs: all are done, or --patience is exhausted."""
    return epoch >= config.epochs or bool(config.patience and best and epoch - best["epoch"] >= config.patience)


def train_epoch(job: Job, state: TrainState, feed: TrainFeed | ViewCache, clock: Clock) -> None:
    """Train once on each remaining sample of an epoch; `state.tally` collects losses, answers and labels."""
    save_seconds = job.config.save_minutes * 60 or math.inf
    last_save = time.monotonic()
    state.model.train()
    total_steps = math.ceil(feed.num_batches / job.config.accumulate_grad_batches) * job.config.epochs
    # Beyond MAX_SCORE_ENTRIES logits, only the answered classes are kept: 1.2 million images of 1,000 classes would take 5 GB,
    # in each checkpoint too. A resumed epoch goes on with the kind that it began with.
    num_scores = feed.num_batches * job.config.batch * len(job.records.class_names)
    keeps_logits = "logits" in state.tally.fetched[0] if state.tally.fetched else num_scores <= MAX_SCORE_ENTRIES
    stream = clock.watch(feed.batches(state))
    while batches := list(itertools.islice(stream, job.config.accumulate_grad_batches)):  # the last step may have fewer
        for batch in batches:
            job.note_failures(batch.failures)
        readable = [batch for batch in batches if len(batch.labels)]
        with SIGNALS.hold():  # weights, position and tally change together
            if readable:
                set_learning_rate(state.optimizer, lr_factor(job.config, state.step, total_steps))
                loss, logits = train_step(job.config, job.runtime, feed.network, state, readable)
                scores = logits if keeps_logits else logits.argmax(dim=1)
                state.tally.add(loss, scores, torch.cat([batch.labels for batch in readable]))
            state.batches += len(batches)
            state.seconds = clock.seconds()
        if len(state.tally.pending) >= FINITE_CHECK_STEPS:
            check_finite(job, state)
        if SIGNALS.wants_save or time.monotonic() - last_save >= save_seconds:
            save_state(job, state)
            if SIGNALS.wants_save:
                job.run.log(f"saved on SIGUSR1: {describe_position(state.epoch, state.batches)}")
                SIGNALS.wants_save = False
            last_save = time.monotonic()
        SIGNALS.check()
    save_state(job, state)  # before evaluation, which can be interrupted too


def save_state(job: Job, state: TrainState) -> None:
    """Write checkpoint_last.pth. Raises Diverged instead if a loss since the last check is not finite."""
    check_finite(job, state)
    save_checkpoint(job.run.path / LAST_NAME, state, job.identity)


def check_finite(job: Job, state: TrainState) -> None:
    """Check that the losses since the last check are finite; waits for the device. Raises Diverged, naming the first bad step."""
    with SIGNALS.hold():  # a stop while the device is waited for would lose these steps
        steps_ago = state.tally.fetch()
    if steps_ago is not None and get_rank() == 0:  # the loss is the same on every rank
        raise Diverged(describe_divergence("the loss", state.step - steps_ago + 1, state.epoch + 1, job.run.path))


def score_epoch(job: Job, state: TrainState, features: dict[str, Embedded]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an epoch's record and per-class metrics. Raises UserError without training images, Diverged if val diverged."""
    totals = state.tally.totals()
    names = job.records.class_names
    if not totals:
        raise UserError("none of the training images can be read any more", str(job.records.root), "restore the images")
    labels = totals["labels"].numpy()
    if "logits" in totals:  # beyond MAX_SCORE_ENTRIES, the tally keeps only the answered classes, which have no AUC
        _, train, train_per_class = classify(lambda logits: logits, totals["logits"].numpy(), labels, names)
    else:
        train, train_per_class = compute_metrics(totals["answers"].numpy(), labels, names)
    sizes = totals["sizes"].double()  # images of each step
    # The loss that training minimises, ArcFace's margin included: mean over images.
    train = {"loss": float((totals["losses"].double() * sizes).sum() / sizes.sum()), **train}
    val, val_per_class, val_by_view = score_val(job, state.model, features)
    if not math.isfinite(val["loss"]):
        raise Diverged(describe_divergence("the loss", state.step, state.epoch + 1, job.run.path))
    record = {"epoch": state.epoch + 1, "lr": state.optimizer.param_groups[0]["lr"], "train": train, "val": val}
    if val_by_view:
        record["val_by_view"] = val_by_view
    return record, {"train_per_class": train_per_class, "val_per_class": val_per_class}


def score_val(job: Job, model: Recognizer, features: dict[str, Embedded]) -> tuple[dict, dict, dict]:
    """Return val's metrics by the classifier and by matching with training images, per class, and per view for --crop_mode mix."""
    val = embed(model, features["val"])
    references = embed(model, features["train"])
    class_labels = np.arange(len(job.records.class_names))
    centroids = class_centroids(references.values, references.labels, len(class_labels))

    def score(queries: Embedded) -> tuple[dict, dict]:
        metrics, per_class = score_classifier(job, model, queries)
        metrics["proto_acc"] = recall_at_1(centroids, class_labels, queries)
        metrics["recall_at_1"] = recall_at_1(references.values, references.labels, queries)
        return metrics, per_class

    has_mask = job.records.has_mask[val.rows]
    by_view = {}
    if job.config.crop_mode == "mix" and has_mask.any():
        by_view = {name: score(val.take(has_mask & (val.views == view)))[0] for view, name in enumerate(VIEW_NAMES)}
    return *score(val), by_view


def score_classifier(job: Job, model: Recognizer, queries: Embedded) -> tuple[dict, dict]:
    """Return loss and metrics of the trained classifier, without margin, and its metrics per class."""
    logits = functools.partial(classifier_logits, job, model)
    loss, metrics, per_class = classify(logits, queries.values, queries.labels, job.records.class_names)
    return {"loss": loss, **metrics}, per_class


def classifier_logits(job: Job, model: Recognizer, embeddings: np.ndarray) -> np.ndarray:
    """Return the logits without margin, float32 (n, C), of unit embeddings (n, emb_dim)."""
    with torch.inference_mode():
        return model.criterion.plain_logits(torch.from_numpy(embeddings).to(job.runtime.device)).cpu().numpy()


def recall_at_1(vectors: np.ndarray, labels: np.ndarray, queries: Embedded) -> float:
    """Return the share of queries whose nearest vector has the same label; `vectors` are (n, D), their `labels` (n,)."""
    nearest, _ = best_answers(lambda block: block @ vectors.T, queries.values)
    return float((labels[nearest] == queries.labels).mean())


def format_epoch(record: dict[str, Any], config: Config) -> str:
    """Return the epoch's aligned line for train.log; if the device waits for data, it ends with a remedy."""
    names = dict(loss="loss", acc="acc", f1_macro="F1", auc_macro="AUC", proto_acc="proto", recall_at_1="R@1")

    def format_split(split: str) -> str:
        values = [(name, record[split][key]) for key, name in names.items() if key in record[split]]
        return " ".join(f"{name} {'-':>6}" if value is None else f"{name} {value:6.3f}" for name, value in values)

    line = f"epoch {record['epoch']:>3}/{config.epochs}  train {format_split('train')}  |  val {format_split('val')}"
    for view, by_view in record.get("val_by_view", {}).items():
        line += f"  |  {view} acc {by_view['acc']:.3f} proto {by_view['proto_acc']:.3f}"
    rate, wait = record["pace"]["images_per_s"], record["pace"]["data_wait"]
    line += f"  |  {record['seconds']:.1f} s, {rate:,.0f} images/s, {wait:.0%} of it waiting for data"
    if wait <= MAX_DATA_WAIT:
        return line
    needs_crops = config.pre_transforms or config.train_augmentations is not None  # which fitted squares cannot replace
    if config.cache_views:
        remedy = "put --out_dir on a faster disk"
    elif not config.cache_crops and config.epochs > 1 and not needs_crops:
        remedy = f"keep what is decoded: --cache_crops {Config.cache_crops:g}"
    elif (workers := count_workers(config.workers)) < count_cores():
        remedy = f"raise --workers, {workers} of {count_cores()} cores"
    elif config.trains_backbone or config.mixing != "none":
        remedy = "store smaller images, or add CPU cores"
    else:
        remedy = f"try --cache_views {CACHED_VIEWS}"
    return f"{line} ({remedy})"


def save_epoch(job: Job, state: TrainState, val: dict[str, float | None]) -> None:
    """Advance the state to the next epoch, update the best epoch by --best_metric (ties: lower loss), and write the checkpoints."""
    config, folder, metric = job.config, job.run.path, job.config.best_metric
    state.epoch += 1
    state.batches = 0
    state.seconds = 0.0
    state.tally = Tally()
    sign = -1.0 if metric == "loss" else 1.0
    value = -math.inf if val[metric] is None else sign * val[metric]
    if not state.best or (value, -val["loss"]) > (sign * state.best["value"], -state.best["loss"]):
        state.best = {"epoch": state.epoch, "metric": f"val_{metric}", "value": sign * value, "loss": val["loss"]}
        job.run.event("best_update", **state.best)
        # Written before checkpoint_last.pth: a run that is killed in between resumes one epoch earlier.
        save_checkpoint(folder / BEST_NAME, state, job.identity)
    if config.save_checkpoints and config.save_every and state.epoch % config.save_every == 0:
        save_checkpoint(folder / f"checkpoint_ep{state.epoch:03d}.pth", state, job.identity)
    save_checkpoint(folder / LAST_NAME, state, job.identity)


def measure_baseline(
    job: Job, features: dict[str, Embedded], cached: Embedded | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Score the untrained backbone on val and test: nearest centroid, nearest neighbour, and logistic regression on its features.

    Training has to beat the baseline that is best on val. `cached` views, which training will see, add a second logistic
    regression; above LOGREG_MAX_CLASSES classes there is no regression.

    Returns:
        {split: {`centroid_acc`, `centroid_f1_macro`, `centroid_auc_macro`, and the same for `nn1`, `logreg` and `logreg_views`}};
        and `image_accuracy` of the best baseline's answers to the test images, {} without test.
    """
    scorers = fit_baselines(job, features["train"], cached)
    baseline: dict[str, dict[str, float]] = {split: {} for split in ("val", "test") if split in features}
    for split, (name, score) in itertools.product(baseline, scorers.items()):
        _, metrics, _ = classify(score, features[split].values, features[split].labels, job.records.class_names)
        baseline[split] |= {f"{name}_{key}": value for key, value in metrics.items()}
    if "test" not in features:
        return baseline, {}
    best, test = best_baseline(baseline["val"]), features["test"]
    answers = best_answers(scorers[best], test.values)[0]
    return baseline, image_accuracy(job.records, test.rows, answers == test.labels)


def fit_baselines(job: Job, train: Embedded, cached: Embedded | None = None) -> dict[str, Scorer]:
    """Fit the baselines on features of train; return a scorer, from features (n, F) to logits (n, C), by key of BASELINE_NAMES."""
    num_classes, scale = len(job.records.class_names), job.config.arc_scale
    references = train._replace(values=unit_vectors(train.values))
    centroids = class_centroids(references.values, references.labels, num_classes)
    nearest_reference = nearest_reference_matcher(references, num_classes)
    scorers: dict[str, Scorer] = {
        "centroid": lambda features: scale * (unit_vectors(features) @ centroids.T),
        "nn1": lambda features: scale * nearest_reference.score(unit_vectors(features)),
    }
    if num_classes <= LOGREG_MAX_CLASSES:
        scorers["logreg"] = score_by_regression(job, train)
        if cached is not None:
            scorers["logreg_views"] = score_by_regression(job, concatenate_embedded([train, cached]))
    return scorers


def image_accuracy(records: Records, rows: np.ndarray, is_right: np.ndarray) -> dict[str, float]:
    """Return the share of right answers over the views of each image, by path; `rows` and `is_right` (n,) are per view."""
    images, inverse = np.unique(rows, return_inverse=True)
    shares = np.bincount(inverse, weights=is_right) / np.bincount(inverse)
    return {records.paths[row]: share for row, share in zip(images.tolist(), shares.tolist(), strict=True)}


def find_sessions(job: Job, features: dict[str, Embedded]) -> dict[str, dict[str, Any]]:
    """Return for each test image (path) its nearest training image (`train`) and `cosine`, if SAME_SESSION or more, highest first.

    Slightly moved shots of one session are no duplicates to the scan, but a model trained on one knows the other.
    """
    from sklearn.preprocessing import StandardScaler

    if "test" not in features or len(features["test"].rows) * len(features["train"].rows) > SESSION_PAIRS:
        return {}
    train, test, paths = features["train"], features["test"], job.records.paths
    scaler = StandardScaler().fit(train.values)
    references, queries = (unit_vectors(scaler.transform(split.values).astype(np.float32)) for split in (train, test))
    partners, cosines = best_answers(lambda block: block @ references.T, queries)
    sessions: dict[str, dict[str, Any]] = {}
    for i in np.argsort(-cosines, kind="stable").tolist():
        if cosines[i] >= SAME_SESSION:  # of two views of an image the more similar one comes first, and stays
            pair = {"train": paths[train.rows[partners[i]]], "cosine": float(cosines[i])}
            sessions.setdefault(paths[test.rows[i]], pair)
    return sessions


def unit_vectors(values: np.ndarray) -> np.ndarray:
    """Return the vectors (n, F) scaled to length 1."""
    return F.normalize(torch.from_numpy(values)).numpy()


class UnseenHead(NamedTuple):
    """Answers to all val and test crops by a head trained without some of the classes."""

    scores: np.ndarray  # (Q,) on `score_scale`
    classes: np.ndarray  # (Q,) labels of the answers, in the head's gallery
    is_right: np.ndarray  # (Q,) bool
    is_unseen: np.ndarray  # (Q,) bool, the true class was left out
    logits: np.ndarray  # (Q,) largest logit of logistic regression on features, without the same classes
    # By number of crops that enrol each class left out: scores, bool the answer is an enrolled class, bool right; (DRAWS, Q) each.
    enrolled: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]


def measure_unseen(job: Job, features: dict[str, Embedded]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure how an embedding handles classes that it was not trained on; ({}, {}) without test, with too few or many images.

    Holding classes out of the run itself would take more runs. Instead, heads of the same kind are trained on the clean features of
    the untrained backbone, each without one fold of the classes: all UNSEEN_FOLDS folds, or as many as UNSEEN_STEPS allows. The
    matcher is chosen on val images of the known classes, i.e. those that a head was trained on.

    Returns:
        Metrics. classes: those left out; images: the number of their val and test images; known_acc: accuracy on test images of
        known classes; open_set: auroc and fpr95 of telling left-out from known classes, and the same by other methods in `others`;
        enrolment: see `measure_enrolment`. On test, with thresholds and probabilities fitted on val and the strangers of the other
        heads: unknown_passed: share of the images of left-out classes that get a class, as {value, interval}; `mixed_precision`,
        ece and `reliability`, where unknown_share of the objects are unknown.

        Data for `calibrate`. strangers: quantiles of the val scores of left-out classes, on `score_scale`; enrolled: by number of
        crops, the scores on that scale and is_right of `answers_of_enrolled`, and the metrics at the target precision.
    """
    names, train = job.records.class_names, features["train"]
    folds = np.random.default_rng((job.config.seed, 9)).permutation(len(names)) % UNSEEN_FOLDS
    steps = job.config.epochs * -(-len(train.rows) // (job.config.batch * job.config.accumulate_grad_batches))
    num_folds = max(1, min(UNSEEN_FOLDS, UNSEEN_STEPS // steps))
    if "test" not in features or len(names) < UNSEEN_FOLDS or len(train.rows) > UNSEEN_MAX_IMAGES:
        return {}, {}
    for split in SPLIT_NAMES:  # each needs images of known classes and of left-out ones
        folds_of_images = folds[features[split].labels]
        if folds_of_images.min() >= num_folds or len(np.unique(folds_of_images)) < 2:
            return {}, {}
    queries = concatenate_embedded([features["val"], features["test"]])
    is_test = np.arange(len(queries.rows)) >= len(features["val"].rows)
    heads = [answer_unseen(job, train, queries, is_test, np.flatnonzero(folds == fold)) for fold in range(num_folds)]
    masks = [(~head.is_unseen & is_test, head.is_unseen) for head in heads]  # known, unknown
    groups = job.records.groups[queries.rows]
    open_set = measure_unknown(groups, [(head.scores, *pair) for head, pair in zip(heads, masks, strict=True)])
    others = {}
    if len(names) <= LOGREG_MAX_CLASSES:
        by_regression = [(head.logits, *pair) for head, pair in zip(heads, masks, strict=True)]
        others["frozen backbone, largest logit of logistic regression"] = measure_unknown(groups, by_regression)
    open_set |= {"source": "classes it was not trained on", "trained_on_them": False}
    strangers = [head.scores[head.is_unseen & ~is_test] for head in heads]
    strangers_of_others = list(map(np.concatenate, leave_one_out(strangers)))
    share = job.config.unknown_share
    precision = job.config.target_precision
    columns_of_heads = []
    for head, other_strangers in zip(heads, strangers_of_others, strict=True):
        is_val = ~head.is_unseen & ~is_test  # of known classes
        answers = Answers(head.scores[is_val], head.is_right[is_val], other_strangers, share)
        slope, intercept = fit_log_odds(answers)
        probability = scipy.special.expit(slope * head.scores + intercept)
        thresholds, _ = fit_thresholds(head.classes[is_val], answers, precision, len(names), torch.float32)
        is_accepted = head.scores >= thresholds[head.classes]
        columns = (groups, probability, head.is_right, ~head.is_unseen, is_accepted)
        columns_of_heads.append([column[is_test] for column in columns])
    drawn, probability, is_right, is_known, is_accepted = map(np.concatenate, zip(*columns_of_heads, strict=True))
    enrolment = [measure_enrolment(heads, strangers_of_others, is_test, count, job.config) for count in ENROLMENT_CROPS]
    evidence = [answers_of_enrolled(heads, is_test, count) for count in ENROLMENT_CROPS]
    return {
        "classes": [names[label] for label in np.flatnonzero(folds < num_folds).tolist()],
        "images": len(np.unique(queries.rows[folds[queries.labels] < num_folds])),
        "known_acc": float(np.mean([head.is_right[~head.is_unseen & is_test].mean() for head in heads])),
        "open_set": {**open_set, "others": others},
        "unknown_share": share,
        **mean_intervals(drawn[~is_known], unknown_passed=is_accepted[~is_known]),
        **mixed_precision(drawn, is_known, is_accepted, is_right, share),
        **reliability(probability, is_right, is_known, share),
        "enrolment": enrolment,
    }, {
        "strangers": np.quantile(np.concatenate(strangers), np.linspace(0, 1, UNKNOWN_QUANTILES)).tolist(),
        "enrolled": {
            str(metrics["crops"]): {"scores": scores.tolist(), "is_right": is_right.tolist(), "figures": metrics}
            for metrics, (scores, is_right) in zip(enrolment, evidence, strict=True)
        },
    }


def answer_unseen(job: Job, train: Embedded, queries: Embedded, is_test: np.ndarray, unseen: np.ndarray) -> UnseenHead:
    """Train a head without the `unseen` classes, and let its gallery answer the val and test queries, before and after enrolment.

    `is_test` bool (Q,) marks the queries of test, the others are of val; `unseen` are labels, int64 (U,).
    """
    names, config = job.records.class_names, job.config
    seen = np.setdiff1d(np.arange(len(names)), unseen)
    model = train_without(job, train, seen)
    is_unseen = np.isin(queries.labels, unseen)
    new_labels = np.empty(len(names), np.int64)  # in the gallery: seen classes first
    new_labels[np.append(seen, unseen)] = np.arange(len(names))
    labels = new_labels[queries.labels]
    train = train._replace(labels=new_labels[train.labels])
    is_seen = train.labels < len(seen)
    reference_rows = first_of_each_class(np.flatnonzero(is_seen), train.labels, UNSEEN_REFS_PER_CLASS)
    is_known_val = ~is_unseen & ~is_test
    gallery, _ = export_gallery(
        model,
        dataclasses.replace(job.records, class_names=tuple(names[label] for label in seen.tolist())),
        {"train": train.take(reference_rows), "val": queries._replace(labels=labels).take(is_known_val)},
        dataclasses.replace(config, prototypes_per_class="1"),
        {},
    )
    references, answered = (gallery.fusion.fuse(values, embed(model, values)) for values in (train, queries))
    answers, best = gallery.answer(answered.values)
    middle, spread = score_scale(best[is_known_val])
    # With enrolled classes, a gallery matches by centroid.
    middle_after, spread_after = score_scale(match_by_centroid(gallery).answer(answered.values)[1][is_known_val])
    enrolled = {}
    for num_crops in ENROLMENT_CROPS:
        draws = []
        for draw in range(ENROLMENT_DRAWS):
            rng = np.random.default_rng((config.seed, 9, num_crops, draw))
            crops = [rng.permutation(np.flatnonzero(train.labels == label))[:num_crops] for label in new_labels[unseen]]
            added = references.take(np.concatenate(crops))
            added = added._replace(rows=np.arange(len(added.rows)), labels=added.labels - len(seen))
            enlarged = enrol(gallery, added, [names[label] for label in unseen.tolist()], [""] * len(added.rows))
            new_answers, new_best = enlarged.answer(answered.values)
            draws.append(((new_best - middle_after) / spread_after, new_answers >= len(seen), new_answers == labels))
        enrolled[num_crops] = tuple(map(np.stack, zip(*draws, strict=True)))
    logits = np.zeros(len(labels))
    if len(names) <= LOGREG_MAX_CLASSES:
        logits = score_by_regression(job, train.take(is_seen))(queries.values).max(axis=1)
    return UnseenHead((best - middle) / spread, answers, answers == labels, is_unseen, logits, enrolled)


def train_without(job: Job, train: Embedded, seen: np.ndarray) -> Recognizer:
    """Return a head trained on the features of the `seen` classes, as the run does, but on clean views, each once an epoch."""
    config = dataclasses.replace(
        job.config, freeze_backbone=True, unfreeze_blocks=0, lora_rank=0, ema_decay=0.0, mixing="none", compile=False
    )
    train = train.take(np.isin(train.labels, seen))
    labels = torch.from_numpy(np.searchsorted(seen, train.labels))
    values = torch.from_numpy(train.values)
    backbone = Backbone(nn.Identity(), job.info.mean, job.info.std)
    model = build_recognizer(config, len(seen), backbone, job.info).to(job.runtime.device)
    state = start_state(model, config, job.runtime)
    borders = batch_borders(len(labels), config.batch * config.accumulate_grad_batches)
    num_epochs = max(1, min(config.epochs, UNSEEN_STEPS // (len(borders) - 1)))
    total_steps = num_epochs * (len(borders) - 1)
    model.train()
    for epoch in progress(range(num_epochs), num_epochs, "a head without some classes", "epoch"):
        order = torch.from_numpy(np.random.default_rng((config.seed, 9, epoch)).permutation(len(labels)))
        for start, stop in itertools.pairwise(borders):
            rows = order[start:stop]
            batch = Batch(values[rows], labels[rows], rows, rows, [])
            set_learning_rate(state.optimizer, lr_factor(config, state.step, total_steps))
            train_step(config, job.runtime, nn.Identity(), state, [batch])
    return model.eval()


def train_step(
    config: Config, runtime: Runtime, network: nn.Module, state: TrainState, batches: list[Batch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do one optimizer step; return its loss () and the logits (B, C) without margin, both still on the device.

    `network` maps images to features: the backbone as `Runtime.wrap` returns it, or nn.Identity if the batches hold features.
    `batches` are the micro-batches of the step. With a frozen backbone their features are concatenated, so that the loss equals
    that of one large batch. With a trained one, each has its own backward pass, weighted by its number of images, and BatchNorm
    sees micro-batches. With several ranks, `batch.sizes` counts the images of each; features, loss and logits cover all ranks.
    """
    is_trained = any(parameter.requires_grad for parameter in state.model.backbone.parameters())
    indexed = list(enumerate(batches))
    groups = [[pair] for pair in indexed] if is_trained else [indexed]
    num_images = sum(len(batch.labels) for batch in batches)
    state.optimizer.zero_grad(set_to_none=True)
    losses: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    for group in groups:
        labels = [batch.labels for _, batch in group]
        mixings = [
            draw_mixing(config, (state.epoch, state.batches + index), batch.images, len(batch.labels))
            for index, batch in group
        ]
        # DDP averages the gradients of a step once, in the last backward pass.
        skips_sync = isinstance(network, nn.parallel.DistributedDataParallel) and group is not groups[-1]
        with network.no_sync() if skips_sync else contextlib.nullcontext():
            features = []
            for (index, batch), mixing in zip(group, mixings, strict=True):
                images = send(batch.images, runtime.device)
                if mixing is not None:  # partners may be on other ranks
                    mixed = mix_images(gather_rows(images, batch.sizes), mixing)
                    images = mixed.split(batch.sizes)[get_rank()] if batch.sizes else mixed
                seed_torch(config.seed, 5, state.step, index, rank=get_rank())  # for dropout
                features.append(gather_rows(network(images), batch.sizes))
            embeddings = state.model.embed(torch.cat(features))
            loss, group_logits = mixed_loss(state.model.criterion, embeddings, labels, mixings)
            weight = sum(map(len, labels)) / num_images
            state.scaler.scale(loss * weight).backward()
        losses.append(loss.detach() * weight)
        logits.append(group_logits.detach())
    state.scaler.unscale_(state.optimizer)
    if config.max_grad_norm:
        trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    if state.average:
        state.average.update(state.step)
    return torch.stack(losses).sum(), torch.cat(logits)


def mixed_loss(
    criterion: Criterion, embeddings: torch.Tensor, labels: Sequence[torch.Tensor], mixings: Sequence[Mixing | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss () of embeddings (B, emb_dim), and their logits (B, C) without margin.

    The loss of a mixed image is lambda times the loss for its own label plus 1 - lambda times the loss for its partner's label.
    Both labels are hard, because margins need hard labels. `labels` and `mixings` have one entry per batch, on the CPU.
    """
    device = embeddings.device
    targets = send(torch.cat(list(labels)), device)
    logits, plain_logits = criterion(embeddings, targets)
    if not any(mixings):
        return criterion.losses(logits, targets).mean(), plain_logits
    pairs = list(zip(labels, mixings, strict=True))
    partners = [batch if mixing is None else batch[mixing.partners] for batch, mixing in pairs]
    shares = [torch.full((len(batch),), 1.0 if mixing is None else mixing.lam) for batch, mixing in pairs]
    partner_targets, lambdas = (send(torch.cat(values), device) for values in (partners, shares))
    partner_logits, _ = criterion(embeddings, partner_targets)
    losses = criterion.losses(logits, targets).mean(dim=1)
    partner_losses = criterion.losses(partner_logits, partner_targets).mean(dim=1)
    return (lambdas * losses + (1 - lambdas) * partner_losses).mean(), plain_logits


def first_of_each_class(rows: np.ndarray, labels: np.ndarray, per_class: int) -> np.ndarray:
    """Return the first `per_class` rows of each class, in the order of `rows`; `labels` are those of all records."""
    by_class = rows_by_class(labels[rows], int(labels.max()) + 1)
    return rows[np.sort(np.concatenate([positions[:per_class] for positions in by_class]))]


def score_by_regression(job: Job, features: Embedded) -> Scorer:
    """Fit logistic regression on features; return the scorer, from features to logits (n, C), -inf for a class without features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng((job.config.seed, 4)).permutation(len(features.labels))
    chosen = np.sort(order[:LOGREG_MAX_IMAGES])
    present = np.unique(features.labels[chosen])
    if len(present) < 2:  # those of all other classes cannot be read any more; sklearn refuses to fit one
        logits_of_one = np.where(np.arange(len(job.records.class_names)) == present, 0.0, -np.inf)
        return lambda queries: np.tile(logits_of_one, (len(queries), 1))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that has not converged in 1000 iterations is still a baseline
        classifier.fit(features.values[chosen], features.labels[chosen])

    def score(queries: np.ndarray) -> np.ndarray:
        scores = np.full((len(queries), len(job.records.class_names)), -np.inf)
        logits = classifier.decision_function(queries)
        is_binary = logits.ndim == 1  # sklearn returns one column for two classes
        scores[:, classifier.classes_] = np.stack([-logits, logits], axis=1) / 2 if is_binary else logits
        return scores

    return score


def measure_enrolment(
    heads: list[UnseenHead], strangers_of_others: list[np.ndarray], is_test: np.ndarray, num_crops: int, config: Config
) -> dict[str, Any]:
    """Measure how well classes are recognised that are enrolled from `num_crops` crops each, as means over heads and draws.

    Returns:
        crops, target_precision, unknown_share; accuracy on val and test images of the enrolled classes (`new`), and on test images
        of the other classes after enrolment (`old`) and `before`. On test, at the threshold that val images and strangers of the
        other heads set for the target precision: the number of answers per draw that name an enrolled class (`answers`), the share
        of them that is right (`precision`), and the share of the enrolled classes' images that get such a right answer (`recall`).
    """
    figures: dict[str, list[float]] = {key: [] for key in ("new", "old", "before", "recall", "precision")}
    for head, other_heads, strangers in zip(heads, leave_one_out(heads), strangers_of_others, strict=True):
        answers = Answers(*answers_of_enrolled(other_heads, is_test, num_crops), strangers, config.unknown_share)
        threshold = precision_threshold(answers, config.target_precision) if len(answers.scores) else math.inf
        is_known_test = ~head.is_unseen & is_test
        for scores, is_new, is_right in zip(*head.enrolled[num_crops], strict=True):
            is_accepted = is_test & is_new & (scores >= threshold)
            figures["new"].append(mean_of_defined(is_right[head.is_unseen].astype(float)))
            figures["old"].append(is_right[is_known_test].mean())
            figures["before"].append(head.is_right[is_known_test].mean())
            is_found = (is_right & is_accepted)[is_test & head.is_unseen]
            figures["recall"].append(mean_of_defined(is_found.astype(float)))
            figures["precision"] += is_right[is_accepted].tolist()
    return {
        "crops": num_crops,
        "target_precision": config.target_precision,
        "unknown_share": config.unknown_share,
        **{key: none_if_nan(mean_of_defined(np.array(values, float))) for key, values in figures.items()},
        "answers": -(-len(figures["precision"]) // ENROLMENT_DRAWS),  # rounded up: 0 are none in any draw
    }


def leave_one_out(items: list[Any]) -> list[list[Any]]:
    """Return for each item the list of all others, or of itself if it is alone: each head is calibrated on data of other heads."""
    return [items[:i] + items[i + 1 :] or items for i in range(len(items))]


def answers_of_enrolled(heads: list[UnseenHead], is_test: np.ndarray, num_crops: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and is_right, (N,) both, of up to ENROLMENT_ANSWERS answers to val images that name an enrolled class."""
    enrolled = [head.enrolled[num_crops] for head in heads]
    answers = [(scores[is_new & ~is_test], is_right[is_new & ~is_test]) for scores, is_new, is_right in enrolled]
    scores, is_right = map(np.concatenate, zip(*answers, strict=True))
    positions = np.linspace(0, len(scores) - 1, min(len(scores), ENROLMENT_ANSWERS)).astype(int)
    return scores[positions].astype(np.float32), is_right[positions]


BASELINE_NAMES = {
    "logreg": "logistic regression",
    "logreg_views": "logistic regression with augmented views",
    "nn1": "nearest neighbour",
    "centroid": "nearest centroid",
}


def judge_training(
    baseline: dict[str, dict[str, float]],
    frozen_right: dict[str, float],
    trained_right: dict[str, float],
    group_of: Mapping[str, int],
) -> dict[str, Any]:
    """Compare the trained model with the best frozen baseline of val on the same test images, given `image_accuracy` of both.

    A verdict needs both `sign_flip_test` of the gains of groups, and the gain's bootstrap interval over groups. `group_of` is the
    group of each image, by path.
    """
    name = best_baseline(baseline["val"])
    common = sorted(frozen_right.keys() & trained_right.keys())
    if not common:  # the files have changed since training began
        verdict = "no verdict: none of these test images was answered by the frozen backbone"
        return {"baseline": {"name": name, "acc": None}, "verdict": verdict}
    pairs = np.array([(trained_right[path], frozen_right[path]) for path in common])
    gains = pairs[:, 0] - pairs[:, 1]
    groups = np.array([group_of[path] for path in common])
    p_value = sign_flip_test(np.bincount(groups, weights=gains))
    gain = with_intervals(lambda drawn: {"gain": gains[drawn].mean()}, groups)["gain"]
    if not gains.any():  # all draws agree: the interval is that of the share of groups answered differently
        bound = wilson_interval(0.0, groups)[1]
        gain["interval"] = [-bound, bound]
    interval = gain["interval"]
    span = "" if interval is None else ", {:+.1f} to {:+.1f}".format(*(100 * bound for bound in interval))
    outcome = "no measurable difference"
    caveat = ""
    is_outside = interval is not None and not interval[0] <= 0 <= interval[1]
    if p_value < SIGNIFICANCE and is_outside:
        outcome = "training helped" if gain["value"] > 0 else "training hurt"
    elif is_outside:
        caveat = f"; the test, which decides, has p = {p_value:.2f}"
    elif interval is None:
        caveat = f"; fewer than {MIN_GROUPS} groups of them have no interval"
    trained, frozen = pairs.mean(axis=0).tolist()
    verdict = f"{outcome}: prototype matching {trained:.3f}, {BASELINE_NAMES[name]} on the frozen backbone {frozen:.3f}"
    verdict += f" ({100 * gain['value']:+.1f} points{span}, on {len(common)} test images{caveat})"
    return {"baseline": {"name": name, "acc": frozen}, "gain": gain, "p_value": p_value, "verdict": verdict}


def sign_flip_test(gains: np.ndarray) -> float:
    """Return the two-sided p-value of the sum of gains (G,), multiples of a half, each of which could have had the other sign.

    Fisher's randomisation test, exact. For gains of one size it is McNemar's exact test; a group that gains much counts for more.
    """
    from scipy.signal import convolve
    from scipy.stats import binom

    steps = np.rint(2 * gains).astype(int)
    chances = np.ones(1)  # of each possible sum of steps, lowest first
    for size, count in Counter(np.abs(steps[steps != 0]).tolist()).items():
        chances_of_size = np.zeros(2 * size * count + 1)
        chances_of_size[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, chances_of_size)
    sums = np.arange(len(chances)) - len(chances) // 2
    return float(np.clip(chances[np.abs(sums) >= abs(steps.sum())].sum(), 0, 1))


def best_baseline(metrics: dict[str, float]) -> str:
    """Return the name of the baseline with the highest accuracy; `metrics` are those of one split."""
    return max((name for name in BASELINE_NAMES if f"{name}_acc" in metrics), key=lambda name: metrics[f"{name}_acc"])


# ======================================================================================================================
# 16  COMMANDS & MAIN
# ======================================================================================================================
# One recipe for each command, and how the process ends: exit codes, signals, messages.
SHOWN_SESSIONS = 200
# Options of training that tools/masks.py shares.
MASK_FLAGS = (
    "data_root out_dir class_map exclude data_fraction near_dup_bits val_split test_split splits image_bits group_regex seed"
    " masks_dirname masks_out sam2_cfg sam2_ckpt gpus workers precision debug"
).split()
# Options of training that the command prototypes can change afterwards.
GALLERY_OPTIONS = (
    "unknown_dir target_precision unknown_share max_refs_per_class prototypes_per_class matcher match_features"
).split()
LOCATIONS = ("data_root", "masks_out", "class_map")  # options of training whose files may have moved since


def run_scan(config: Config) -> None:
    """Check the data and preview the split; write data_report.json without training."""
    if get_rank():
        return
    check_paths(config)
    check_transforms(config)
    if (config.out_dir / "metrics.jsonl").exists():
        raise UserError("holds a run, whose data report would be lost", config.describe("out_dir"), "choose another")
    scan = scan_dataset(config)
    with keep_memory(scan.memory):
        scan = attach_masks(scan, config)
    with lock_directory(config.out_dir):
        scan.memory.save()
        write_json(config.out_dir / "data_report.json", scan.report)
    show(format_class_table(scan.report))
    show(format_findings(scan.report))
    show(f"written: {config.out_dir / 'data_report.json'}")
    check_trainable(scan, config)


def run_evaluate(config: EvaluateOptions) -> None:
    """Measure a finished run on its test or val images, or on another labelled folder; write evaluation.json into the run.

    Images of another folder whose class is not in the gallery count as unknown objects, like those of --unknown_dir.
    """
    read_run_config(config.run)  # refuses a folder that holds no run before a lock file is written into it
    with contextlib.nullcontext() if get_rank() else lock_directory(config.run, "--run"):
        run = load_run(config.run, make_runtime(config.gpus, config.precision), config.backbone_weights)
        options = choose_options(run.config, config) if config.is_of_run else config
        check_existing(options, "unknown_dir")
        records, rows = from_first(choose_records, run, config, options)
        embedded = embed_records(run, records, rows, config, run.embed)
        unknown = None
        if options.unknown_dir is not None:
            unknown_half = from_first(unknown_records, options.unknown_dir, run.config)
            unknown = embed_records(run, unknown_half, unknown_half.rows("test"), config, run.embed)
        if get_rank():
            return
        label_of = {name: label for label, name in enumerate(run.gallery.class_names)}
        labels = np.array([label_of.get(name, -1) for name in records.class_names])[embedded.labels]
        known = embedded._replace(labels=labels).take(labels >= 0)
        strangers = embedded.take(labels < 0)
        groups = records.groups
        if unknown is not None:
            strangers = concatenate_embedded([strangers, unknown._replace(rows=unknown.rows + len(groups))])
            groups = np.append(groups, groups.max() + 1 + unknown_half.groups)
        figures = measure_gallery(run.gallery, known, groups, strangers if len(strangers.rows) else None)
        source = str((config.data_root or run.config.data_root).resolve())
        split = config.split if config.is_of_run else None
        measured = {"data": source, "split": split, "images": len(np.unique(known.rows)), **figures}
        write_json(run.path / "evaluation.json", measured)
        references = {(run.config.data_root / path).resolve() for path in run.gallery.stack_paths}
        is_file = [(records.root / records.paths[row]).resolve() in references for row in embedded.rows.tolist()]
        # In another precision than the gallery's, copies are not told from images that only look alike, and not counted.
        _, nearest = best_answers(lambda block: block @ run.gallery.stacks.T, embedded.values)
        if num_seen := len(np.unique(embedded.rows[is_file | (nearest > 1 - 1e-6)])):
            images = f"{num_seen:,} of {count_of(len(np.unique(embedded.rows)), 'image')}"
            show(f"warning: {images} are references of the gallery: the figures are better than those of new images")
        show(f"the run matches by: {MATCHER_NAMES[run.gallery.matcher]}")
        show(format_measures(figures))
        show(f"written: {run.path / 'evaluation.json'}")


def choose_records(run: TrainedRun, config: EvaluateOptions, options: Options) -> tuple[Records, np.ndarray]:
    """Scan the images that the run is measured on, print which they are, and return the records and the rows to use.

    `options` are `config`, or, for the run's own images, those of `choose_options`.
    """
    names = run.gallery.class_names
    if config.is_of_run:
        try:
            check_existing(options, "data_root")
        except UserError as error:
            remedy = f"give --split {config.split} --data_root PATH, where it is now"
            raise UserError(error.what, error.where, remedy) from error
        records = scan_run_data(run, options)
        rows = records.rows(config.split)
        # Those of classes that were removed are no strangers: the run was trained on them.
        rows = rows[np.isin(np.array(records.class_names)[records.labels[rows]], names)]
        if not len(rows):
            remedy = "give --split val, or --data_root DIR"
            raise UserError(f"has no {config.split} images", f"--run {run.path}", remedy)
        show(f"{config.split} images of {options.data_root}")
        return records, rows
    records = scan_for_run(run, config.data_root, config).records
    present = [records.class_names[label] for label in np.unique(records.labels).tolist()]
    foreign = [name for name in present if name not in names]
    num_known = len(present) - len(foreign)
    class_map = run.config.class_map and shlex.quote(str(run.config.class_map))
    given = {"class_map": class_map, "exclude": " ".join(map(shlex.quote, run.config.exclude))}
    flags = [f"--{name} {value}" for name, value in given.items() if value and not getattr(config, name)]
    hint = f"for folders that are named as those of the run, give its {' '.join(flags)} too" if flags else ""
    if not num_known:
        problem = f"has no class of the gallery, only {', '.join(map(repr, foreign[:5]))}"
        raise UserError(problem, config.describe("data_root"), hint or f"it knows {', '.join(map(repr, names[:8]))}")
    show(f"{count_of(len(records.paths), 'image')} of {config.data_root}, {count_of(num_known, 'known class')}")
    if foreign:
        show(f"not in the gallery, and so unknown objects: {', '.join(map(repr, foreign))}{hint and '; '}{hint}")
    return records, np.arange(len(records.paths))


def format_measures(figures: dict[str, Any]) -> str:
    """Format the figures of `measure_gallery`, one a line."""
    lines = []
    for name, closed in figures["closed"].items():
        matcher = MATCHER_NAMES[name] + (f", k = {closed['k']}" if name == "knn" else "")
        accuracy = format_figure(closed["acc"])
        lines.append(f"closed set, {matcher}: acc {accuracy}, macro F1 {format_figure(closed['f1_macro'])}")
    retrieval = (f"{RETRIEVAL_NAMES[key]} {format_figure(figure)}" for key, figure in figures["retrieval"].items())
    lines.append("retrieval: " + ", ".join(retrieval))
    open_set = figures["open_set"]
    for name, method in {"prototypes": open_set, **open_set.get("others", {})}.items():
        metrics = f"AUROC {format_figure(method['auroc'])}, FPR95 {format_figure(method['fpr95'])}"
        lines.append(f"unknown objects ({open_set['source']}) by {name}: {metrics}")
    thresholds = {f"threshold for {entry['target']:.0%} precision": entry for entry in figures["answers"]}
    for name, entry in {**thresholds, "thresholds of the classes": figures["thresholds"]}.items():
        coverage = format_figure(entry["coverage"])
        lines.append(f"{name}: answers {coverage} of the images, {format_figure(entry['precision'])} of them right")
    if "unknown_passed" in figures:
        lines.append(format_unknown(figures))
    lines.append(f"expected calibration error {figures['ece']:.3f}")
    if figures["few"]:
        lines.append(f"few test images (fewer than {FEW_IMAGES}): {', '.join(figures['few'])}")
    return "\n".join(lines)


def run_prototypes(config: PrototypesOptions) -> None:
    """Rebuild a run's gallery, print it, enrol classes from a few crops, or remove a class; keep the old file beside the new."""
    action = choose_action(config)
    path = config.run / "prototypes.npz"
    removed = config.remove and unicodedata.normalize("NFC", config.remove)
    if get_rank() and action in ("--list", "--remove"):
        return
    if action == "--list":
        show(format_gallery(load_gallery(path)[0]))
        return
    added_names: Sequence[str] = ()
    read_run_config(config.run)  # refuses a folder that holds no run before a lock file is written into it
    with contextlib.nullcontext() if get_rank() else lock_directory(config.run, "--run"):
        if not action:
            gallery, meta = rebuild_gallery(config)
        else:
            run = load_run(config.run, make_runtime(config.gpus, config.precision), config.backbone_weights)
            meta = run.meta
        if action == "--remove":
            gallery = remove_class(run.gallery, removed)
        elif action == "--add":
            gallery, added_names = add_classes(run, config)
        if gallery is None:
            return
        back_up_gallery(path, {*gallery.class_names, removed}, show)
        save_gallery(path, gallery, meta | {"date": time.strftime("%Y-%m-%dT%H:%M:%S")})
    show(format_gallery(gallery))
    warn_of_bare_classes(gallery, show)
    if added_names and (run.gallery.matcher, gallery.matcher) == ("knn", "centroid"):
        show("classes are matched by their centroids now: nearest references hardly find those that have few")
    for sentence in describe_enrolled(gallery, added_names):
        show(sentence)
    for sentence in find_collisions(gallery, added_names):
        show(f"warning: {sentence}")
    show(f"written: {path}")


def choose_action(config: PrototypesOptions) -> str:
    """Return --list, --add or --remove, '' for a new gallery. Raises UserError for two of them, or an option without effect."""
    given = {"--list": config.list, "--add": config.add is not None, "--remove": config.remove is not None}
    actions = [flag for flag, is_given in given.items() if is_given]
    if len(actions) > 1:
        raise UserError("does one thing at a time", "prototypes", "give --list, --add DIR or --remove CLASS")
    if not actions:
        return ""
    idle = config.origins.keys() & {*GALLERY_OPTIONS, *LOCATIONS, "exclude"}
    if actions == ["--add"]:  # `add_classes` compares the precision with that of the gallery
        idle -= {*LOCATIONS, "exclude", "target_precision"}
    if idle:
        more = "" if idle == {"exclude"} else f", or make the gallery anew with it first, without {actions[0]}"
        where = ", ".join(map(config.flag, sorted(idle)))
        raise UserError(f"has no effect beside {actions[0]}", where, f"leave it out{more}")
    return actions[0]


def rebuild_gallery(config: PrototypesOptions) -> tuple[Gallery | None, dict[str, Any]]:
    """Return the gallery of the run's images, None on ranks other than 0, and its meta; typed options replace the run's."""
    runtime = make_runtime(config.gpus, config.precision)
    run = load_model(config.run, read_run_config(config.run), runtime, config.backbone_weights)
    options = choose_options(run.config, config)
    check_existing(options, "unknown_dir")
    records = from_first(scan_run_data, run, options)
    features = {
        split: embed_records(run, records, records.rows(split), config, run.extract) for split in ("train", "val")
    }
    if options.unknown_dir is not None:
        strangers = from_first(unknown_records, options.unknown_dir, options)
        features["unknown"] = embed_records(run, strangers, strangers.rows("val"), config, run.extract)
    meta = describe_gallery(options, run.info, records.class_names, run.model)
    if get_rank():
        return None, meta
    return export_gallery(run.model, records, features, options, run.unseen)[0], meta


def choose_options(trained: Config, typed: RunOptions) -> Config:
    """Return the run's options with those replaced that this command may set. Raises UserError for --exclude, which it may not."""
    if "exclude" in typed.origins:
        problem = "has no effect on the images of the run itself, which its splits.json lists"
        raise UserError(problem, typed.flag("exclude"), "leave it out")
    given = {name: getattr(typed, name) for name in {*LOCATIONS, *GALLERY_OPTIONS} & typed.origins.keys()}
    return dataclasses.replace(trained, origins={**trained.origins, **typed.origins}, **given)


def scan_run_data(run: TrainedRun, options: Config) -> Records:
    """Return the records of the run's data in the splits of its training; warn of each change since."""
    check_existing(options, "data_root", "class_map")
    splits_path = run.path / "splits.json"
    records, notes = reuse_splits(splits_path, scan_for_run(run, options.data_root, options, splits_path).records)
    for note in notes:
        show(f"warning: {note}")
    return records


def add_classes(run: TrainedRun, config: PrototypesOptions) -> tuple[Gallery | None, Sequence[str]]:
    """Add the crops of --add to the gallery; return it, None on ranks other than 0 or if no crop is new, and the crops' classes."""
    flag = f"--target_precision {config.target_precision}"
    target = run.meta["target_precision"]
    if "target_precision" in config.origins and config.target_precision != target:
        remedy = f"first: python {SCRIPT_NAME} prototypes --run {shlex.quote(str(config.run))} {flag}"
        raise UserError(f"thresholds of this gallery are for {target}", flag, remedy)
    records = from_first(lambda: scan_for_run(run, config.add, config).records)
    paths = [str((config.add / name).resolve()) for name in records.paths]
    data_root = config.data_root or run.config.data_root
    stored = {
        (run.gallery.class_names[label], str((data_root / path).resolve()))
        for label, path in zip(run.gallery.stack_labels.tolist(), run.gallery.stack_paths, strict=True)
    }
    crops = zip(records.labels.tolist(), paths, strict=True)
    rows = np.flatnonzero([(records.class_names[label], path) not in stored for label, path in crops])
    if not len(rows):
        show(f"nothing to add: the gallery has all {len(paths):,} crops of {config.add}")
        return None, ()
    if len(rows) < len(paths):
        show(f"{len(paths) - len(rows):,} of {len(paths):,} crops are in the gallery and not added again")
    with contextlib.suppress(OSError, ValueError):  # splits.json is needed for a warning only
        splits = read_json(run.path / "splits.json", {"val": {str: [str]}, "test": {str: [str]}})
        eval_paths = itertools.chain(*splits["val"].values(), *splits["test"].values())
        resolved = {str((data_root / path).resolve()) for path in eval_paths}
        if num_eval := len(resolved.intersection(paths[row] for row in rows)):
            problem = f"{num_eval:,} of the crops are val or test images of the run, whose figures on them say nothing any more"
            show(f"warning: {problem}")
    added = embed_records(run, records, rows, config, run.embed)
    if get_rank():
        return None, ()
    labels = np.unique(added.labels)
    names = [records.class_names[label] for label in labels.tolist()]
    if empty := sorted(set(records.class_names) - {records.class_names[label] for label in records.labels.tolist()}):
        show(f"warning: without one usable crop, and not added: {', '.join(map(printable, empty))}")
    added = added._replace(labels=np.searchsorted(labels, added.labels))
    return enrol(run.gallery, added, names, paths), names


def run_train(config: Config) -> None:
    """Scan, split, train, export prototypes, test and report; or continue where an interrupted run stopped."""
    config = adopt_geometry(config)
    runtime = training_runtime(config)
    with contextlib.ExitStack() as stack:
        if get_rank():
            backbone, info = build_for_training(config, runtime)  # while rank 0 scans
            job, point = broadcast(None)
        else:
            job, backbone, point = prepare_run(config, runtime, stack)
            broadcast((job, point))
        if job is None:
            return
        if get_rank():
            job = dataclasses.replace(job, runtime=runtime)
            if info.weights_hash != job.info.weights_hash:
                problem = f"its weights are {info.weights_hash} here, and {job.info.weights_hash} in the first process"
                raise UserError(problem, config.describe("model_id"), "give all machines the same weights")
        bank, state = start_training(job, backbone, point)
        if trackers := [f"--{name}" for name in ("clearml", "tensorboard") if getattr(config, f"use_{name}")]:
            task = config.clearml_task_name or config.experiment_name or config.out_dir.resolve().name
            job.run.start_tracker(*trackers, "--project", config.clearml_project, "--task", task)
        fit(job, state, bank)
        finish_run(job, state, bank)


def prepare_run(
    config: Config, runtime: Runtime, stack: contextlib.ExitStack
) -> tuple[Job | None, Backbone | None, ResumePoint | None]:
    """Scan, split, check that all fits together, and open the run directory until `stack` closes; None if the run is finished."""
    check_paths(config)
    check_transforms(config)
    refuse_if_in_use(config.out_dir)
    point = find_resume_point(config.out_dir, config.resume, config.overwrite)
    splits_path = point and point.path.with_name("splits.json")
    identity = point.payload["identity"] if point else {}
    if "image_bits" in identity:  # as found when the run began, whatever images there are now
        config = dataclasses.replace(config, image_bits=config.image_bits or tuple(identity["image_bits"]))
    probe_model(config)  # a mistyped model should not cost a scan
    check_optimizer(config)
    if config.unknown_dir is not None:
        unknown_records(config.unknown_dir, config)
    has_old_run = config.overwrite and config.out_dir.exists()
    squares = SquareFile(config.out_dir, config.img_size, square_room(config))
    if config.auto_generate_masks and config.sam2_ckpt is None:
        show("--auto_generate_masks has no --sam2_ckpt: if a crop lacks a mask, the run ends after the scan")
    scan = scan_dataset(config, splits_path, squares if scan_fills_squares(config) else None)
    if "image_bits" not in identity:  # a new run, or an older checkpoint; later starts and commands keep this
        config = dataclasses.replace(config, image_bits=scan.records.image_bits)
        identity["image_bits"] = list(config.image_bits)
    with keep_memory(scan.memory):
        scan = attach_masks(scan, config)
        plan = plan_run(config, runtime, scan, scan_backgrounds(config, scan.memory), point)
    if plan is None:
        return None, None, None
    job, backbone, notes = plan
    if config.auto_generate_masks and not scan.records.has_mask.all():
        scan.memory.save_early()  # the tool scans the same files
        run_tool("masks", format_flags(config, MASK_FLAGS))
        scan = attach_masks(scan, config)
        check_masks_usable(scan, config)
        records = reuse_splits(splits_path, scan.records)[0] if point else scan.records
        job = dataclasses.replace(job, records=records)
    if has_old_run:
        old_dir = move_aside(config.out_dir)
        show(f"the old run is moved to {old_dir}")
        create_out_dir(config.out_dir)
        for name in (MEMORY_NAME, MASK_LOG_NAME, "masks_preview.png"):  # still valid for these images
            with contextlib.suppress(FileNotFoundError):
                shutil.move(old_dir / name, config.out_dir / name)  # out_dir may have been a link to another disk
    job = dataclasses.replace(job, run=stack.enter_context(RunDirectory(config.out_dir)))
    stack.enter_context(keep_interrupted(config.out_dir))
    open_run(job, scan, notes)
    return dataclasses.replace(job, store=open_store(job, squares)), backbone, point


def plan_run(
    config: Config, runtime: Runtime, scan: Scan, backgrounds: Backgrounds | None, point: ResumePoint | None
) -> tuple[Job, Backbone, list[str]] | None:
    """Check that data, model and checkpoint fit together; return job, model and warnings, or None if the run is finished."""
    records = scan.records
    notes: list[str] = []
    if point:  # first, since more images of a class that the run does not have would not help
        records, notes = reuse_splits(point.path.with_name("splits.json"), records)
    check_trainable(scan, config)
    if not config.auto_generate_masks:
        check_masks_usable(scan, config)
    notes += check_transforms_fit(scan, config)
    if point:
        if config.cache_views is None:  # as decided when the run began
            config = dataclasses.replace(config, cache_views=point.payload["identity"].get("cache_views"))
        identity = make_identity(config, records.class_names, None)
        identity["backgrounds"] = backgrounds and backgrounds.identity
        check_identity(point.path, point.payload["identity"], identity, ineffective_options(config))
        epoch = point.payload["epoch"]
        events = read_events(config.out_dir)
        is_completed = bool(events) and events[-1].get("status") == "completed"
        damage = list_damaged_files(config.out_dir) if is_completed else []
        if is_completed and not damage and has_ended(config, epoch, point.payload["best"]):
            more = "more --epochs" if epoch >= config.epochs else f"a --patience above {config.patience}"
            epochs = count_of(epoch, "epoch")
            show(f"the run in {config.out_dir} is finished: {epochs}, see {config.out_dir / 'report.html'}")
            show(f"to train on, give {more}; to start afresh, --overwrite")
            flags = {f"--{name}" for name in GALLERY_OPTIONS}
            late = [note for note in describe_changes(config, records) if note.split()[0] in flags]
            if late:
                command = f"python {SCRIPT_NAME} prototypes --run {shlex.quote(str(config.out_dir))}"
                show("\n".join([*late, f"for a gallery made with that, give it to {command}"]))
            if not (config.out_dir / "report.html").is_file():
                show(f"to have its report, python {SCRIPT_NAME} report {shlex.quote(str(config.out_dir))}")
            return None
        notes += describe_changes(config, records) + damage
    backbone, info = build_for_training(config, runtime)
    if config.cache_views is None:  # cache views where possible, if that saves forward passes
        size = 2 * CACHED_VIEWS * len(records.rows("train")) * info.feature_dim
        is_possible = not config.trains_backbone and config.mixing == "none" and config.epochs > CACHED_VIEWS
        has_room = is_possible and size <= free_disk(config.out_dir) / 4
        config = dataclasses.replace(config, cache_views=CACHED_VIEWS if has_room else 0)
    job = Job(config, records, runtime, None, info, backgrounds)
    if point:
        check_identity(point.path, point.payload["identity"], job.identity, ineffective_options(job.config))
    return job, backbone, notes


def list_damaged_files(out_dir: Path) -> list[str]:
    """Return one sentence for each missing or damaged file of a finished run, and one on what follows; [] if there is none."""
    since_export = itertools.takewhile(lambda event: event["event"] != "proto_end", reversed(read_events(out_dir)))
    last = {event["event"]: event for event in since_export}
    num_rows: dict[str, Any] = {}
    if test := last.get("test_end"):
        num_rows["predictions.csv"] = test.get("views", test.get("images"))  # older runs do not count views
    if views := last.get("test_views"):
        num_rows["predictions_by_view.csv"] = len(VIEW_NAMES) * views["images"]

    def check_rows(path: Path) -> None:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [None not in row.values() for row in csv.DictReader(file, strict=True)]
        if len(rows) != num_rows[path.name] or not all(rows):
            raise ValueError(f"has {sum(rows)} whole rows of {num_rows[path.name]}")

    checks: dict[str, Callable[[Path], Any]] = {
        "config.json": lambda path: read_run_config(path.parent),
        BEST_NAME: load_checkpoint,
        "prototypes.npz": load_gallery,
        "embeddings.npz": check_zip,
        **dict.fromkeys(num_rows, check_rows),
    }
    damage = []
    for name, check in checks.items():
        try:
            if not (out_dir / name).is_file():
                raise UserError("is no regular file" if os.path.lexists(out_dir / name) else "is missing")
            check(out_dir / name)
        except (UserError, OSError, ValueError, csv.Error, zipfile.BadZipFile) as error:
            damage.append(f"{name}: {getattr(error, 'what', error)}")
    return [*damage, "what a finished run leaves is made anew"] if damage else []


def describe_changes(config: Config, records: Records) -> list[str]:
    """Return one sentence for each option that changed since the last start, and one if the images did; none prevents a resume."""
    try:
        last = read_json(config.out_dir / "config.json", {"options": dict, "data": {"fingerprint": str}})
    except (OSError, ValueError):  # the changes only inform the user
        return ["config.json of the last start cannot be read, so that changed options are not named"]
    old = last["options"]
    notes = [
        f"--{name} was {old.get(name)} at the last start and is {value} now"
        for name, value in config.as_plain().items()
        if old.get(name) != value and not Config.__dataclass_fields__[name].metadata.get("once")
    ]
    if last["data"]["fingerprint"] != records.fingerprint:
        notes.append("the images are not those of the last start: what follows is no exact continuation")
    return notes


def build_for_training(config: Config, runtime: Runtime) -> tuple[Backbone, BackboneInfo]:
    """Build the backbone; if it trains, share its BatchNorm statistics. Raises UserError where they cannot be shared."""
    backbone, info = build_backbone(config, show)
    if config.trains_backbone:
        runtime.sync_batchnorm(backbone)
    return backbone, info


def open_run(job: Job, scan: Scan, notes: Sequence[str]) -> None:
    """Write what is known before training: options, splits, data report, and a copy of the script."""
    config = job.config
    run = job.run
    records = job.records
    is_fresh = records is scan.records  # else they are those of splits.json
    scan.memory.save()
    write_bytes(run.path / SCRIPT_NAME, Path(__file__).read_bytes())
    optimizer = optimizer_settings(config)
    if not config.trains_backbone:
        del optimizer["backbone"]
    content = {
        "options": config.as_plain(),
        "origins": {field.name: config.origins.get(field.name, "default") for field in option_fields()},
        "model": dataclasses.asdict(job.info),
        "optimizer": {"type": config.optimizer, **optimizer},
        "schedule": config.scheduler,
        "loss": config.criterion,
        "data": {
            "fingerprint": records.fingerprint,
            "masks_hash": records.masks_hash,
            "images": len(records.paths),
            "classes": list(records.class_names),
            "backgrounds": job.backgrounds and job.backgrounds.identity,
        },
        "device": job.runtime.describe(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": list_versions(),
    }
    write_json(run.path / "config.json", content)
    if is_fresh:
        write_splits(run.path / "splits.json", records, config.seed)
        write_json(run.path / "data_report.json", scan.report)
    run.log(f"data: {config.data_root}, {len(records.class_names)} classes")
    run.log(format_class_table(scan.report) if is_fresh else "the split is that of splits.json")
    run.log("\n".join([format_findings(scan.report), *(f"warning: {note}" for note in notes)]))
    training = name_training(config.as_plain())
    run.log(f"model: {job.info.model_id} ({job.info.weights}), {training}, on {job.runtime.describe()}")
    if ineffective := [name for name in ineffective_options(config) if getattr(config, name) != getattr(Config, name)]:
        run.log(f"warning: without effect beside the other options: {', '.join(map(config.place, ineffective))}")
    if job.backgrounds is not None:
        run.log(job.backgrounds.describe())
    if config.mixing != "none":
        run.log(f"{config.mixing}: the train figures are of mixed images, against the label of the larger part")
        if config.criterion not in LINEAR_CRITERIA and config.arc_margin:
            run.log(f"warning: {config.mixing} usually costs a little with a margin, as {config.criterion} has it")
    if config.preview:
        write_preview(job)


def write_preview(job: Job) -> None:
    """Write preview.jpg: the first 64 images of the first epoch, augmented and mixed as in training, in an 8 x 8 grid."""
    from torchvision.utils import make_grid

    sampler = EpochSampler(job.records.rows("train"), job.records.labels, job.config)
    dataset = job.training_crops()
    batches = []
    for index, keys in enumerate(sampler):
        images = dataset.collate([dataset[key] for key in keys]).images
        mixing = draw_mixing(job.config, (0, index), images, len(images))
        batches.append(images if mixing is None else mix_images(images, mixing))
        if sum(map(len, batches)) >= 64:
            break
    grid = make_grid(torch.cat(batches)[:64], nrow=8, padding=0).permute(1, 2, 0).contiguous().numpy()
    sheet = Image.fromarray(grid[:, :, :3]).convert("L" if job.config.in_channels == 1 else "RGB")
    if grid.shape[2] == 4:  # channel 3 is the mask: darken the background, which the model sees undarkened
        sheet.paste(0, mask=Image.fromarray((255 - grid[:, :, 3]) // 2))
    with atomic_file(job.run.path / "preview.jpg") as file:
        sheet.convert("RGB").save(file, "JPEG", quality=90)
    job.run.log(f"preview: {job.run.path / 'preview.jpg'}")


def start_training(job: Job, backbone: Backbone, point: ResumePoint | None) -> tuple[FeatureBank, TrainState]:
    """Build model, optimizer and feature bank; restore the checkpoint, or measure the frozen baseline if there is none."""
    config = job.config
    run = job.run
    model = build_recognizer(config, len(job.records.class_names), backbone, job.info)
    if config.load_from is not None and point is None:
        load_head(model, read_start(config), job.records.class_names, run.log)
    model.to(job.runtime.device)
    model.backbone = backbone.with_dtype(job.runtime.inference_dtype)
    state = start_state(model, config, job.runtime)
    bank = FeatureBank(job, model.backbone)
    if point:
        for weights in (point.payload["model"], deployed_weights(point.payload)):
            check_weights(model.trained_state(), weights, str(point.path))
        try:
            restore_state(state, point.payload)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # from torch, e.g. other param groups
            raise UserError(f"cannot be restored: {error}", str(point.path), RESTORE_OR_OVERWRITE) from error
        state.best = from_first(place_checkpoints, job, state, point)
        run.forget_epochs_after(state.epoch)
        run.event("resumed", epoch=state.epoch, batches=state.batches, step=state.step, checkpoint=point.path.name)
        position = describe_position(state.epoch, state.batches)
        run.log(f"resumed after {position} of {config.epochs} epochs, from {point.path.name}")
        if state.dtype != job.runtime.dtype:
            run.log(f"the backbone goes on in {name_dtype(state.dtype)}, as the run began")
        return bank, state
    run.forget_epochs_after(-1)  # left by a start that ended before its first checkpoint
    run.event("run_start", options=config.as_plain(), classes=list(job.records.class_names))
    features = {split: bank.get(split) for split in SPLIT_NAMES if len(job.records.rows(split))}
    cached = None
    if config.cache_views:
        cached = ViewCache(job, backbone_in_training(state, config), features["train"]).sample()
    state.baseline, state.frozen_right = from_first(measure_baseline, job, features, cached)
    run.event("baseline_end", **state.baseline)
    state.sessions = from_first(find_sessions, job, features)
    if state.sessions:
        num_test = len(job.records.rows("test"))
        run.log(
            f"warning: {len(state.sessions)} of {num_test} test images look as if taken in one session with a training image,"
            " though no duplicates; --group_regex keeps sessions together, the report shows the pairs, and accuracy without them"
        )
    unseen, state.unseen = from_first(measure_unseen, job, features)
    if unseen:
        run.event("unseen_classes", **unseen)
    for split, figures in state.baseline.items():
        accuracies = {text: figures.get(f"{name}_acc") for name, text in BASELINE_NAMES.items()}
        shown = (f"{text} {value:.3f}" for text, value in accuracies.items() if value is not None)
        run.log(f"accuracy of the frozen backbone on {split}: {', '.join(shown)}")
    save_state(job, state)  # from here on a complete checkpoint always exists
    return bank, state


def place_checkpoints(job: Job, state: TrainState, point: ResumePoint) -> dict[str, Any]:
    """Put the resumed checkpoint and that of the best epoch in `state` in their places; return the record of the best epoch.

    Checkpoints ahead of the resumed one are of epochs that are given up, and no start may go on from them. The record is {} if the
    weights of the best epoch are gone. Raises UserError if they are and no epoch is left to train.
    """
    run = job.run
    best_path = run.path / BEST_NAME
    for path, reason in point.damaged.items():
        rename_damaged(path, reason, run.log)
    if point.path.name != LAST_NAME:
        # checkpoint_last.pth at the end: a restart would take it
        set_aside_later(reversed(list_checkpoints(run.path)), point, run.log)
        copy_checkpoint(point.path, run.path / LAST_NAME)
    if not state.best:  # the first epoch will write the file
        return {}
    for candidate in sorted(list_checkpoints(run.path), key=lambda candidate: candidate != best_path):
        try:
            payload = load_checkpoint(candidate)
        except UserError as error:
            rename_damaged(candidate, error.what, run.log)
            continue
        if payload["best"] == state.best and progress_of(payload) == (state.best["epoch"], 0):
            if candidate != best_path:
                copy_checkpoint(candidate, best_path)
            return state.best
    problem = f"the weights of the best epoch so far, {state.best['epoch']}, are gone"
    if state.epoch >= job.config.epochs:
        raise UserError(problem, str(best_path), "give more --epochs, or resume from an older checkpoint")
    run.log(f"warning: {problem}; the best is chosen among the epochs to come")
    return {}


def finish_run(job: Job, state: TrainState, bank: FeatureBank) -> None:
    """With the best weights, export the prototypes, test classifier and gallery, judge the training, and make the report."""
    run = job.run
    records = job.records
    model = state.model
    run.event("proto_start", epoch=state.best["epoch"])
    weights = from_first(lambda: deployed_weights(load_checkpoint(run.path / BEST_NAME)))
    model.load_state_dict(weights, strict=False)
    features = {split: bank.get(split) for split in SPLIT_NAMES if len(records.rows(split))}
    unknown: dict[str, Embedded] = {}  # features of --unknown_dir, by split
    if job.config.unknown_dir is not None:
        strangers = from_first(unknown_records, job.config.unknown_dir, job.config)
        unknown_bank = FeatureBank(dataclasses.replace(job, records=strangers), model.backbone)
        for split in ("val", "test"):
            unknown[split] = unknown_bank.extract(eval_keys(strangers, strangers.rows(split), "bbox"), "unknown")
    other_views = None  # features of the masked test crops in the view that --crop_mode does not use
    test_rows = records.rows("test")
    masked_rows = test_rows[records.has_mask[test_rows]].tolist()
    if job.config.crop_mode != "mix" and masked_rows:
        view = int(job.config.crop_mode == "bbox")
        other_views = bank.extract([SampleKey(row, (), view) for row in masked_rows], f"test as {VIEW_NAMES[view]}")
    if get_rank():
        return
    to_fit = features | ({"unknown": unknown["val"]} if unknown else {})
    gallery, embedded = export_gallery(model, records, to_fit, job.config, state.unseen)
    meta = describe_gallery(job.config, job.info, records.class_names, model)
    # Classes may have been enrolled since an earlier completion.
    if any(event.get("status") == "completed" for event in read_events(run.path)):
        back_up_gallery(run.path / "prototypes.npz", records.class_names, run.log)
    save_gallery(run.path / "prototypes.npz", gallery, meta)
    warn_of_bare_classes(gallery, run.log)
    sizes = {"refs": len(gallery.stack_labels), "prototypes": len(gallery.prototypes)}
    matched = {"matcher": gallery.matcher, "knn_k": int(gallery.knn_counts.max()), "temperature": gallery.temperature}
    run.event("proto_end", **sizes, **matched, feature_weight=gallery.fusion.weight)
    write_embeddings(run.path / "embeddings.npz", records, embedded)
    result = "no test split: accuracy is not measured on images that nothing was chosen by"
    if "test" in embedded:
        test = embedded["test"]
        write_predictions(run.path / "predictions.csv", gallery, records, test)
        prototypes, per_class = compute_gallery_metrics(gallery, test)
        classifier = score_classifier(job, model, embed(model, features["test"]))[0]
        trained_right = image_accuracy(records, test.rows, gallery.answer(test.values)[0] == test.labels)
        group_of = dict(zip(records.paths, records.groups.tolist(), strict=True))
        judgement = judge_training(state.baseline, state.frozen_right, trained_right, group_of)
        counts = {
            "images": len(np.unique(test.rows)),
            "views": len(test.rows),
        }  # with --crop_mode mix, two views an image
        scored = {"classifier": classifier, "prototypes": prototypes, "per_class": per_class, **counts}
        accuracies = np.array([value for path, value in trained_right.items() if path not in state.sessions])
        pairs = dict(itertools.islice(state.sessions.items(), SHOWN_SESSIONS))
        sessions = {"acc": none_if_nan(mean_of_defined(accuracies)), "images": len(accuracies), "pairs": pairs}
        run.event("test_end", **scored, **judgement, without_same_session=sessions)
        groups = records.groups
        if unknown:  # their rows follow those of the records
            unknown["test"] = unknown["test"]._replace(rows=unknown["test"].rows + len(groups))
            groups = np.append(groups, groups.max() + 1 + strangers.groups)
        figures = measure_run(job, model, gallery, features, unknown.get("test"), groups)
        compare_views(job, model, gallery, test, other_views)
        result = summarize_run(job, judgement["verdict"], figures, gallery.matcher, counts)
    has_report = start_report(run)
    if job.unreadable:
        run.log(f"warning: {count_of(len(job.unreadable), 'file')} could not be used as scanned, named above")
    run.log(result)
    run.log(f"finished: {run.path / 'prototypes.npz'}" + (f", {run.path / 'report.html'}" if has_report else ""))


def summarize_run(job: Job, verdict: str, figures: dict[str, Any], matcher: str, counts: dict[str, int]) -> str:
    """Return the lines that the log ends with; `figures` are those of `measure_gallery`, `counts` the test's images and views."""
    closed = figures["closed"][matcher]
    coverage = figures["thresholds"]["coverage"]
    images = f"{counts['images']:,}"
    if counts["views"] > counts["images"]:
        images = f"{counts['views']:,} views of {images}"
    lines = [
        verdict,
        f"accuracy {format_figure(closed['acc'])}, macro F1 {format_figure(closed['f1_macro'])}, on {images} test images",
        f"test images that get a class, not `unknown`: {format_figure(coverage)}",
    ]
    unseen = next((event for event in read_events(job.run.path) if event["event"] == "unseen_classes"), {})
    if "unknown_passed" in figures:
        lines.append(format_unknown(figures))
    elif "unknown_share" in unseen:  # a run that an older script began has not measured it
        lines.append(format_unknown(unseen))
        lines.append(
            "these are of classes that heads were trained without; --unknown_dir DIR measures those of production"
        )
    else:
        remedy = "give pictures of no class as --unknown_dir DIR"
        lines.append(f"unknown objects that get a class all the same: not measured; {remedy}")
    if coverage["value"] < 0.5:
        command = f"python {SCRIPT_NAME} prototypes --run {shlex.quote(str(job.run.path))}"
        command += f" --target_precision {max(0.5, job.config.target_precision - 0.05):g}"
        command += f" --unknown_share {job.config.unknown_share / 4:g}"
        lines.append(f"most stay `unknown`: {command} asks for less")
    return "\n".join(lines)


def measure_run(
    job: Job,
    model: Recognizer,
    gallery: Gallery,
    features: dict[str, Embedded],
    unknown: Embedded | None,
    groups: np.ndarray,
) -> dict[str, Any]:
    """Measure the gallery on test, and how well simpler methods tell unknown objects; log and return the figures.

    `groups`, int (N,), is the group of each record, those of `unknown` included.
    """
    nearest_reference = nearest_reference_matcher(embed(model, features["train"]), len(job.records.class_names))
    logits = functools.partial(classifier_logits, job, model)
    simple = fit_baselines(job, features["train"])

    def represent(features: Embedded) -> dict[str, Embedded]:
        embedded = embed(model, features)
        return {"features": features, "embeddings": embedded, "vectors": gallery.fusion.fuse(features, embedded)}

    known = represent(features["test"])
    strangers = represent(unknown) if unknown is not None else {}
    backbone = "fine-tuned" if job.config.trains_backbone else "frozen"
    methods: dict[str, tuple[str, Callable, Callable]] = {
        f"{backbone} backbone, nearest centroid": ("features", simple["centroid"], best_score),
        "classifier, highest softmax": ("embeddings", logits, lambda scores: np.exp(log_softmax(scores)).max(axis=1)),
        "trained, nearest reference": ("embeddings", nearest_reference.score, best_score),
    }
    if unknown is None and len(job.records.class_names) == 2:  # the softmax of the one that is not held out is always 1
        del methods["classifier, highest softmax"]
    if "logreg" in simple:
        name = f"{backbone} backbone, largest logit of logistic regression"
        methods[name] = ("features", simple["logreg"], best_score)
    figures = measure_gallery(gallery, known["vectors"], groups, strangers.get("vectors"))
    figures["open_set"]["others"] = {
        name: open_set_figures(score, known[kind], groups, strangers.get(kind), confide)
        for name, (kind, score, confide) in methods.items()
    }
    job.run.event("measured", **figures)
    return figures


def compare_views(job: Job, model: Recognizer, gallery: Gallery, test: Embedded, other_views: Embedded | None) -> None:
    """Score the masked test crops with and without background; write the answers to predictions_by_view.csv."""
    test = test.take(job.records.has_mask[test.rows])
    if other_views is not None:
        test = concatenate_embedded([test, gallery.fusion.fuse(other_views, embed(model, other_views))])
    pair = [test.take(test.views == view) for view in range(len(VIEW_NAMES))]
    common = np.intersect1d(pair[0].rows, pair[1].rows)  # a file may have vanished in between
    if not len(common):
        (job.run.path / "predictions_by_view.csv").unlink(missing_ok=True)  # of an earlier end, when there were masks
        return
    pair = [embedded.take(np.searchsorted(embedded.rows, common)) for embedded in pair]
    write_predictions(job.run.path / "predictions_by_view.csv", gallery, job.records, concatenate_embedded(pair))
    bbox, mask = (compute_gallery_metrics(gallery, queries)[0] for queries in pair)
    answers, masked_answers = (gallery.answer(queries.values)[0] for queries in pair)
    disagree = int((answers != masked_answers).sum())
    job.run.event("test_views", images=len(common), disagree=disagree, bbox=bbox, mask=mask)


def compute_gallery_metrics(gallery: Gallery, queries: Embedded) -> tuple[dict, dict]:
    """Return the figures of the gallery's answers, with recall_at_1, and the figures of each class."""
    _, figures, per_class = classify(
        lambda block: gallery.scores(block) / gallery.temperature, queries.values, queries.labels, gallery.class_names
    )
    return figures | {"recall_at_1": recall_at_1(gallery.stacks, gallery.stack_labels, queries)}, per_class


def format_unknown(figures: dict[str, Any]) -> str:
    """Format two figures of `measure_gallery` or `measure_unseen`: how unknown objects fare, and what answers then are worth."""
    return (
        f"unknown objects that get a class all the same: {format_figure(figures['unknown_passed'])}\n"
        f"classes given that are right, if {100 * figures['unknown_share']:g}% of all objects are unknown (--unknown_share):"
        f" {format_figure(figures['mixed_precision'])}"
    )


def format_figure(figure: dict[str, Any]) -> str:
    """Format a value and its interval."""
    if figure["value"] is None:
        return "-"
    interval = "" if figure["interval"] is None else " ({:.3f} to {:.3f})".format(*figure["interval"])
    return f"{figure['value']:.3f}{interval}"


def start_report(run: RunDirectory) -> bool:
    """Run tools/report.py, which writes report.html; return whether it succeeded. The run is complete without a report."""
    tool = TOOLS_DIR / "report.py"
    if not tool.is_file():
        run.log("no report: tools/report.py is not beside the script")
        return False
    command = [sys.executable, tool, run.path]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode:
        reason = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        run.log(f"no report: {reason.removeprefix('error: ')}")
    return process.returncode == 0


RECIPES = {"train": run_train, "scan": run_scan, "evaluate": run_evaluate, "prototypes": run_prototypes}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the script and return the exit code."""
    return run_recipe(
        lambda: parse_command_line(sys.argv[1:] if argv is None else argv),
        lambda options: RECIPES[options.command](options),
        is_shared=True,
    )


def run_program(
    command: str,
    options_class: type[Options],
    recipe: Callable[[Any], None],
    argv: Sequence[str] | None = None,
    is_shared: bool = False,
) -> int:
    """Run a tool: parse its options, pass them to the recipe, and return the exit code.

    `command` names the tool; `argv` defaults to the process's arguments. If `is_shared`, all ranks run the recipe, else rank 0.
    """
    open_streams()
    arguments = sys.argv[1:] if argv is None else argv
    return run_recipe(lambda: parse_options(options_class, arguments, command), recipe, is_shared)


def run_recipe(parse: Callable[[], Options], recipe: Callable[[Any], None], is_shared: bool) -> int:
    """Run a recipe with the parsed options, on all ranks if `is_shared`, else on rank 0; return the exit code.

    0 done, 2 user, 3 diverged, 130 and 143 interrupted; a bug is raised again, for which Python exits with 1. Under torchrun one
    rank explains a failure, and all ranks return the same code.
    """
    store = start_processes()
    warnings.filterwarnings("ignore", module="PIL")  # it warns of odd metadata; the data report has what matters
    options = Options()
    try:
        SIGNALS.catch(is_first=get_rank() == 0)
        options = parse()
        if is_shared or get_rank() == 0:
            check_given(options)
            keep_freed_memory()
            recipe(options)
        if store is not None:
            dist.destroy_process_group()
        return EXIT_OK
    except (Exception, Interrupted) as error:
        failure = error
    code, message = explain_end(failure, options)
    code, is_first = agree_on_failure(store, code)
    if not is_first:
        return code
    if not message:
        raise failure
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr)
    if getattr(options, "debug", False):
        traceback.print_exception(failure)
    return code


def explain_end(failure: BaseException, options: Options) -> tuple[int, str]:
    """Return the exit code of a failure and its message, '' for a bug, whose traceback says more."""
    if isinstance(failure, Diverged):
        return EXIT_DIVERGED, f"error: {failure}"
    if isinstance(failure, Interrupted):
        again = "the same command"
        again += " without --overwrite" if getattr(options, "overwrite", False) else ""
        resume = getattr(options, "resume", None)
        again += " without --resume" if isinstance(resume, str) and resume != "last" else ""
        again += " starts again" if options.starts_anew else " continues where it stopped"
        return 128 + failure.signal_number, f"interrupted ({failure}); {again}"
    if isinstance(failure, subprocess.CalledProcessError):  # of `run_tool`
        return failure.returncode, f"error: {failure.cmd} has ended with exit code {failure.returncode}, as said above"
    explained = failure if isinstance(failure, UserError) else explain_failure(failure, options)
    if explained is not None:  # name an option of a config file by file and key
        places = {options.flag(name): options.place(name) for name in options.origins}
        where = re.sub(r"--\w[\w-]*", lambda flag: places.get(flag[0], flag[0]), explained.where)
        explained = UserError(explained.what, where, explained.remedy)
    return (EXIT_BUG, "") if explained is None else (EXIT_USER, f"error: {explained}")


SHARED_MEMORY = re.compile(r"/dev/shm|shared memory|unable to (write to|mmap)")
TOO_MANY_FILES = re.compile(re.escape(os.strerror(errno.EMFILE)), re.IGNORECASE)
PEER_ENDED = re.compile(
    r"connection (closed|reset|refused)|broken pipe|remote process|socket (closed|timeout)", re.IGNORECASE
)


def explain_failure(error: Exception, options: Options) -> UserError | None:
    """Explain a failure that is no bug and that the user can remedy: memory, disk, a path, a killed worker; None for any other."""
    text = printable(str(error))
    given = vars(options)
    cause = text.partition("\n")[0].split(". ")[0][:200]
    if is_out_of_memory(error):
        sizes = [name for name in ("batch", "batch_size", "img_size", "image_size") if name in given]
        where = " ".join(f"{options.flag(name)} {given[name]}" for name in (*sizes, "precision") if name in given)
        remedy = f"lower {' or '.join(map(options.flag, sizes)) or 'the sizes'}"
        remedy += ", or give --precision bf16" if given.get("precision", "bf16") != "bf16" else ""
        remedy += ", and start afresh with --overwrite" if "overwrite" in given else ""
        remedy += "; if something else fills the memory, the same command continues"
        return UserError("out of memory" + (f": {cause}" if cause else ""), where, remedy)
    if isinstance(error, RuntimeError) and SHARED_MEMORY.search(text):
        remedy = "give it more room (docker run --shm-size 8g, or --ipc host); the same command continues"
        return UserError(f"processes cannot share memory: {cause}", "/dev/shm", remedy)
    if isinstance(error, RuntimeError) and dist.is_initialized():
        place = f"torchrun, process {get_rank()}"
        if "Duplicate GPU" in text:
            return UserError(f"two processes have the same GPU: {cause}", place, "start one process a GPU")
        if PEER_ENDED.search(text):
            remedy = "see what it has said itself, and torchrun of it; the same command continues"
            return UserError(f"another process of the job has ended ({cause})", place, remedy)
    max_files = f"ulimit -n, which is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}"
    if TOO_MANY_FILES.search(text):
        return UserError("too many files are open", "this process", f"raise {max_files}; the same command continues")
    if isinstance(error, DeadWorker):
        name = "num_workers" if "num_workers" in given else "workers"
        remedy = f"lower {options.flag(name)} if memory is short (/dev/shm too), or raise {max_files}; the same command continues"
        where = f"{options.flag(name)} {count_workers(given.get(name))}"
        return UserError(f"a process that reads images was killed: {text}", where, remedy)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        remedy = "make room" + (", or give a lower --cache_crops" if given.get("cache_crops") else "")
        remedy = "make it writable" if error.errno == errno.EROFS else remedy
        places = (error.filename, *(given.get(name) for name in ("out_dir", "output_dir", "out", "run")), Path.cwd())
        unwritten = write_error(Path(next(filter(None, places))), error, 0)
        return UserError(unwritten.what, unwritten.where, remedy)
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ENAMETOOLONG) and error.filename:
        return UserError(error.strerror, str(error.filename), "check the path")
    return None


def exit_process(code: int) -> None:
    """End the process with an exit code; without Python's clean-up if it waits for busy threads, or is one of several ranks.

    After an interruption a huge image may still be decoding, and ranks that have ended never answer. In the clean-up, threads of
    gloo may abort a rank; if rank 0 has not finished then, torchrun ends the whole job.
    """
    is_busy = any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate())
    if (code > 128 and is_busy) or dist.is_torchelastic_launched():
        for worker in multiprocessing.active_children():  # of loaders
            worker.terminate()
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(end="", flush=True)
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    exit_process(main())
