"""The options of pre-training, the values of `--preset small`, and the checks made before any image is read."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lct_dino3 as lct  # before torch: it sets environment variables that torch reads at import

# isort: split
import torch
from slt.models import check_geometry
from slt.views import Augmentation

# Any of them marks an output_dir as a run of pre-training.
MARKER_FILES = {"params.json", "artifacts.json", "views.png"}
FIXED_NAMES = {*MARKER_FILES, "train.log"}  # files that a run writes to output_dir
# For some thousand crops and one CPU core; found in a study and measured in tools/README.md.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        **{"image_size": 32, "source_size": 64, "patch_size": 8, "vit_embed_dim": 96, "vit_depth": 3},
        **{"vit_num_heads": 3, "head_hidden_dim": 256, "head_bottleneck_dim": 64, "out_dim": 256, "share_head": True},
        **{"global_crop_scale": (0.5, 1.0), "local_crop_scale": (0.25, 0.6), "local_crop_size": 16},
        **{"aug_brightness": 0.2, "aug_contrast": 0.2, "aug_saturation": 0.1, "aug_hue": 0.02},
        **{"aug_grayscale_prob": 0.0, "aug_gaussian_blur_prob": 0.0, "aug_solarize_prob": 0.0},
        **{"teacher_temp": 0.025, "use_sinkhorn": True, "koleo_weight": 0.1, "patch_loss_weight": 0.3},
        **{"teacher_momentum_base": 0.9, "teacher_momentum_final": 0.995, "clip_grad_norm": 3.0},
        **{"learning_rate": 2.5e-3, "min_lr": 2.5e-5, "weight_decay": 0.04, "epochs": 18, "batch_size": 32},
        **{"warmup_epochs": 1.8, "freeze_last_layer_epochs": 0.9},
    }
}


@dataclass(frozen=True)
class PretrainOptions(lct.Options):
    """Pre-train a ViT on unlabelled crops with DINO or iBOT."""

    word_break: ClassVar[str] = "-"

    # A table: default and purpose of each option, then its group and allowed values.
    # fmt: off
    config: Path | None = lct.option(None, "TOML, JSON or YAML with options; what is typed wins",
        "data", metavar="FILE", once=True)
    train_dir: tuple[Path, ...] = lct.option((), "folders of crops, subfolders included, or single files; may be repeated",
        "data", metavar="DIR", nargs="+", action="extend", needed=True)
    output_dir: Path | None = lct.option(None, "where the run is written; an unfinished run in it is continued",
        "data", metavar="DIR", needed=True)
    knn_dir: tuple[Path, ...] = lct.option((), "labelled crops, a folder a class, to choose by: one DIR, or gallery and queries",
        "data", metavar="DIR", nargs="+")
    source_size: int = lct.option(0, "decode once, keep squares of so many px in memory (0: decode for each view)",
        "data", low=0, high=1024)
    dataset_shuffle: bool = lct.option(True, "another order in each epoch", "data", key="dataset.shuffle")
    num_workers: int = lct.option(0, "processes that make views; they change nothing but the time",
        "data", low=0, high=256, key="dataset.num_workers")
    dataset_pin_memory: bool = lct.option(False, "pinned memory for views on their way to a GPU", "data",
        key="dataset.pin_memory")
    dataset_persistent_workers: bool = lct.option(False, "keep the workers from epoch to epoch", "data",
        key="dataset.persistent_workers")

    preset: str | None = lct.option(None, "settings for some thousand crops on a CPU; what is given wins",
        "training", choices=tuple(PRESETS))
    algorithm: str = lct.option("dino", "dino, or ibot, which masks patches too", "training", choices=("dino", "ibot"))
    epochs: int = lct.option(10, "passes over the crops", "training", low=1, high=1_000_000)
    batch_size: int = lct.option(32, "crops a step", "training", low=2, high=65_536, key="dataset.batch_size")
    learning_rate: float = lct.option(1e-3, "highest one, of AdamW", "training", low=0.0, high=1.0)
    min_lr: float = lct.option(1e-6, "lowest one, at the end of the cosine", "training", low=0.0, high=1.0)
    warmup_epochs: float = lct.option(1.0, "epochs in which the learning rate rises", "training", low=0.0)
    weight_decay: float = lct.option(1e-4, "not on biases, norms, positions, tokens", "training", low=0.0, high=1.0)
    clip_grad_norm: float = lct.option(1.0, "longest gradient (0: any)", "training", low=0.0)
    teacher_momentum_base: float = lct.option(0.996, "of the teacher's running mean, at the start",
        "training", low=0.0, high=1.0)
    teacher_momentum_final: float = lct.option(1.0, "the same at the end", "training", low=0.0, high=1.0)
    freeze_last_layer_epochs: float = lct.option(0.0, "epochs in which the last layer of the heads stays",
        "training", low=0.0)
    amp: bool = lct.option(False, "compute in bf16", "training")
    init_from: Path | None = lct.option(None, "exported backbone to start from",
        "training", metavar="FILE", file=True)
    seed: int = lct.option(42, "of weights, order, views and masks", "training", low=0, high=2**32 - 1)

    image_size: int = lct.option(224, "px of a global view", "model", low=8, high=1024)
    patch_size: int = lct.option(16, "px of a patch", "model", low=2, high=64)
    vit_embed_dim: int = lct.option(384, "width", "model", low=8, high=8192)
    vit_depth: int = lct.option(12, "blocks", "model", low=1, high=100)
    vit_num_heads: int = lct.option(6, "heads of attention", "model", low=1, high=128)
    vit_mlp_ratio: float = lct.option(4.0, "width inside a block, in widths", "model", low=0.1, high=16.0)
    out_dim: int = lct.option(1024, "outputs of the head", "model", low=2, high=1_000_000)
    head_hidden_dim: int = lct.option(2048, "width inside the head", "model", low=2, high=65_536)
    head_bottleneck_dim: int = lct.option(256, "width before its last layer", "model", low=2, high=65_536)
    patch_out_dim: int = lct.option(256, "outputs of the head for patches", "model", low=2, high=1_000_000)
    share_head: bool = lct.option(False, "one head for class token and patches", "model")

    student_temp: float = lct.option(0.1, "temperature of the student", "loss", low=0.001, high=10.0)
    teacher_temp: float = lct.option(0.04, "temperature of the teacher", "loss", low=0.001, high=10.0)
    center_momentum: float = lct.option(0.9, "of the running mean of the teacher's outputs", "loss", low=0.0, high=1.0)
    use_sinkhorn: bool = lct.option(False, "Sinkhorn in place of centring", "loss")
    sinkhorn_iters: int = lct.option(3, "its iterations", "loss", low=1, high=100)
    koleo_weight: float = lct.option(0.0, "of the loss that spreads features evenly", "loss", low=0.0, high=100.0)
    patch_mask_ratio: float = lct.option(0.3, "share of patches masked on average, in every second view",
        "loss", low=0.01, high=0.99)
    patch_loss_weight: float = lct.option(1.0, "of the loss at masked patches", "loss", low=0.0, high=100.0)

    global_crop_scale: tuple[float, ...] = lct.option((0.4, 1.0), "share of the area in a global view",
        "views", nargs=2, metavar=("LOW", "HIGH"), low=0.001, high=1.0)
    local_crop_scale: tuple[float, ...] = lct.option((0.05, 0.4), "share of the area in a local view",
        "views", nargs=2, metavar=("LOW", "HIGH"), low=0.001, high=1.0)
    num_local_crops: int = lct.option(4, "local views of an image", "views", low=0, high=64)
    local_crop_size: int = lct.option(96, "px of a local view", "views", low=2, high=1024)
    aug_brightness: float = lct.option(0.4, "largest change", "views", low=0.0, high=1.0, key="augmentation.brightness")
    aug_contrast: float = lct.option(0.4, "largest change", "views", low=0.0, high=1.0, key="augmentation.contrast")
    aug_saturation: float = lct.option(0.2, "largest change", "views", low=0.0, high=1.0, key="augmentation.saturation")
    aug_hue: float = lct.option(0.1, "largest turn, in turns", "views", low=0.0, high=0.5, key="augmentation.hue")
    aug_color_jitter_prob: float = lct.option(0.8, "views that these four change", "views", low=0.0, high=1.0,
        key="augmentation.color_jitter_prob")
    aug_grayscale_prob: float = lct.option(0.2, "views in gray", "views", low=0.0, high=1.0,
        key="augmentation.grayscale_prob")
    aug_gaussian_blur_prob: float = lct.option(0.5, "blurred views", "views", low=0.0, high=1.0,
        key="augmentation.gaussian_blur_prob")
    aug_solarize_prob: float = lct.option(0.1, "views with bright pixels inverted", "views", low=0.0, high=1.0,
        key="augmentation.solarize_prob")
    aug_hflip_prob: float = lct.option(0.5, "mirrored views", "views", low=0.0, high=1.0, key="augmentation.hflip_prob")
    aug_mean: tuple[float, ...] = lct.option((0.485, 0.456, 0.406), "of pixels from 0 to 1, subtracted",
        "views", nargs=3, metavar="X", key="augmentation.mean")
    aug_std: tuple[float, ...] = lct.option((0.229, 0.224, 0.225), "of pixels, divided by",
        "views", nargs=3, metavar="X", low=1e-6, key="augmentation.std")

    resume: str | None = lct.option(None, "continue from checkpoint_last, or from PATH; must be there",
        "run", metavar="PATH", nargs="?", const="last", once=True)
    overwrite: bool = lct.option(False, "start afresh; an old run is moved aside", "run", once=True)
    export_backbone: Path | None = lct.option(None, "write the best teacher there at the end, with a .json beside it",
        "run", metavar="FILE")
    dry_run: bool = lct.option(False, "show options, size of the model and a sheet of views, train nothing", "run", once=True)
    stop_on_collapse: bool = lct.option(False, "end with exit code 3 when features collapse", "run")
    checkpoint_best_name: str = lct.option("checkpoint_best.pt", "file name", "run", key="checkpointing.best_name")
    checkpoint_last_name: str = lct.option("checkpoint_last.pt", "file name", "run", key="checkpointing.last_name")
    checkpoint_history_file: str = lct.option("metrics.jsonl", "file name", "run", key="checkpointing.history_file")
    experiment_name: str | None = lct.option(None, "goes into params.json", "run", metavar="TEXT", key="experiment.name")
    experiment_notes: str | None = lct.option(None, "goes into params.json", "run", metavar="TEXT", key="experiment.notes")
    experiment_tag: tuple[str, ...] = lct.option((), "goes into params.json; may be repeated",
        "run", metavar="TEXT", nargs="+", action="extend", key="experiment.tags")
    device: str = lct.option("auto", "where it is computed", "run", choices=("auto", "cpu", "cuda"))
    log_interval: int = lct.option(10, "steps between two records", "run", low=1, high=1_000_000)
    debug: bool = lct.option(False, "show the traceback of errors", "run")
    # fmt: on

    @property
    def geometry(self) -> dict[str, Any]:
        """Arguments of `ViTSmallPatch16`."""
        names = ("vit_embed_dim", "vit_depth", "vit_num_heads", "vit_mlp_ratio")
        vit = {name.removeprefix("vit_"): getattr(self, name) for name in names}
        return {"image_size": self.image_size, "patch_size": self.patch_size, **vit}

    @property
    def sidecar(self) -> Path:
        """The .json beside --export-backbone; in a name such as face_v1.5 the dot begins no suffix."""
        export = self.export_backbone
        stem = export.stem if export.suffix in (".pt", ".pth") else export.name
        return export.with_name(f"{stem}.json")

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation of the training views; an option is named like its field, some with `aug_` in front."""
        names = [field.name for field in dataclasses.fields(Augmentation)]
        return Augmentation(**{n: getattr(self, f"aug_{n}" if hasattr(self, f"aug_{n}") else n) for n in names})


# Options that may change when a run is resumed.
FREE_OPTIONS = frozenset(
    "config train_dir output_dir num_workers dataset_pin_memory dataset_persistent_workers preset resume overwrite"
    " export_backbone init_from dry_run stop_on_collapse checkpoint_best_name checkpoint_last_name checkpoint_history_file"
    " experiment_name experiment_notes experiment_tag device log_interval debug knn_dir".split()
)


def apply_preset(options: PretrainOptions) -> PretrainOptions:
    """Return the options with the preset's values where none is given; warm-up and freezing scale with a given --epochs."""
    if options.preset is None:
        return options
    preset = dict(PRESETS[options.preset])
    if "epochs" in options.origins:
        for name in ("warmup_epochs", "freeze_last_layer_epochs"):
            preset[name] *= options.epochs / preset["epochs"]
    values = {name: value for name, value in preset.items() if name not in options.origins}
    origins = {**options.origins, **dict.fromkeys(values, f"--preset {options.preset}")}
    return dataclasses.replace(options, origins=origins, **values)


def check_options(options: PretrainOptions) -> None:
    """Check everything that can be checked without reading images; writes nothing.

    Raises:
        UserError: options contradict each other, or a path is missing, of the wrong kind, or in use for something else.
    """
    names = [options.checkpoint_best_name, options.checkpoint_last_name, options.checkpoint_history_file]
    odd_names = [name for name in names if not name or name[0] == "." or "/" in name]
    geometry_problem = check_geometry(options.geometry)
    # fmt: off
    # Whether to refuse, the options concerned, the problem, and the remedy.
    refusals = (
        (bool(geometry_problem), ("image_size", "patch_size", "vit_embed_dim", "vit_num_heads"),
            geometry_problem, "give sizes that divide"),
        (options.num_local_crops > 0 and options.local_crop_size % options.patch_size > 0, ("local_crop_size", "patch_size"),
            f"{options.local_crop_size} px is not a multiple of patches of {options.patch_size} px", "give sizes that divide"),
        (options.global_crop_scale[0] > options.global_crop_scale[1], ("global_crop_scale",), "begins above its end",
            "give the lower share first"),
        (options.local_crop_scale[0] > options.local_crop_scale[1], ("local_crop_scale",), "begins above its end",
            "give the lower share first"),
        (options.min_lr > options.learning_rate, ("min_lr", "learning_rate"), f"{options.min_lr:g} is the higher one",
            "lower --min-lr"),
        (options.warmup_epochs > options.epochs, ("warmup_epochs", "epochs"), "last longer than the training",
            "lower --warmup-epochs"),
        (bool(odd_names), ("checkpoint_best_name", "checkpoint_last_name", "checkpoint_history_file"),
            f"{odd_names[0] if odd_names else ''!r} is not the name of a visible file", "give plain names"),
        (len({*names, *FIXED_NAMES}) < 3 + len(FIXED_NAMES), ("checkpoint_best_name", "checkpoint_last_name",
            "checkpoint_history_file"), "name the same file, or one that every run has", "give different names"),
        (len(options.knn_dir) > 2, ("knn_dir",), "has more than two folders", "give one, or gallery and queries"),
        (options.overwrite and options.resume is not None, ("resume", "overwrite"), "contradict each other",
            "give one of them"),
        (options.device == "cuda" and not torch.cuda.is_available(), ("device",), "torch finds no GPU here", "give --device cpu"),
    )
    # fmt: on
    for is_wrong, flags, problem, remedy in refusals:
        if is_wrong:
            raise lct.UserError(problem, ", ".join(map(options.place, flags)), remedy)
    for name in ("train_dir", "knn_dir"):
        for path in getattr(options, name):
            if not path.exists() or (name == "knn_dir" and not path.is_dir()):
                problem = "is a file, not a folder" if path.exists() else "does not exist"
                raise lct.UserError(problem, f"{options.place(name)} {path}", "check the path")
    check_output(options)


def check_output(options: PretrainOptions) -> None:
    """Refuse an output_dir that is not writable, holds other files or lies among the images, and an export over other files."""
    output = options.output_dir.resolve()
    where = options.describe("output_dir")
    existing = lct.existing_folder(output)
    sources = [path.resolve() for path in (*options.train_dir, *options.knn_dir)]
    names = {path.name for path in output.iterdir() if path.name[0] != "."} if output.is_dir() else set()
    logs = {"train.log", options.checkpoint_history_file}  # all that a run killed at its start has
    is_foreign = not names & MARKER_FILES and not names <= logs
    # fmt: off
    refusals = (
        (any(output.is_relative_to(source) for source in sources),
            "lies inside the images, where its files would be taken for some", "choose a folder outside the data"),
        (options.overwrite and any(source.is_relative_to(output) for source in sources),
            "holds the images, which --overwrite would move aside", "choose another folder"),
        (options.overwrite and options.init_from is not None and options.init_from.resolve().is_relative_to(output),
            "holds the file of --init-from, which --overwrite would move aside", "choose another folder"),
        (options.overwrite and Path.cwd().is_relative_to(output),
            "is the current folder, which --overwrite would move aside", "start from another folder"),
        (output.exists() and not output.is_dir(), "is a file, not a folder", "choose another path"),
        (not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK),
            f"{existing} is not a folder that can be written to", "choose a folder of your own"),
        (is_foreign, "is neither empty nor a run of pre-training", "choose a new folder"),
    )
    # fmt: on
    for is_wrong, problem, remedy in refusals:
        if is_wrong:
            raise lct.UserError(problem, where, remedy)
    export = options.export_backbone
    if export is None:
        return
    checkpoints = {options.checkpoint_best_name, options.checkpoint_last_name}
    taken = {output, *(output / name for name in FIXED_NAMES | checkpoints | logs)}
    where = options.describe("export_backbone")
    path = export.resolve()
    if export.is_dir() or path.suffix == ".json" or {path, options.sidecar.resolve()} & taken:
        problem = "is a folder, is named .json, or is a file of the run itself"
        raise lct.UserError(problem, where, "give a name such as backbone.pt")
    folder = lct.existing_folder(path.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        problem = f"{folder} is not a folder that can be written to"
        raise lct.UserError(problem, where, "give a place in a folder of your own")
    lct.check_replaceable(export, where)
    lct.check_replaceable(options.sidecar, f"{options.sidecar}, beside --export-backbone")
