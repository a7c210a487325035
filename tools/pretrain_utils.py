"""Self-supervised pre-training with DINO and iBOT: what pretrain_dino_face.py and pretrain_dino_hands.py share.

A student learns to answer to views of an image as its teacher, the running mean of itself, does to other views. A run is a function
of data, options and seed; it goes on exactly where it was interrupted or killed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct  # before torch: it sets what torch reads when it is imported

# isort: split
import cv2
import numpy as np
import timm
import torch
from PIL import Image
from slt import losses, measures
from slt.data import Data, read_data
from slt.models import ARCHITECTURE, DinoHead, ViTSmallPatch16, fill_model, read_backbone
from slt.options import FREE_OPTIONS, PretrainOptions, apply_preset, check_options
from slt.views import EpochBatches, ViewBatch, ViewDataset, ViewKey, resize
from torch import nn
from torch.utils.data import DataLoader

CHECKPOINT_FORM = {
    **dict.fromkeys(("epoch", "batches", "step"), int),
    **dict.fromkeys(("identity", "targets", "optimizer", "best", "start"), dict),
    "student": {str: torch.Tensor},
    "teacher": {str: torch.Tensor},
    "tally": torch.Tensor,
}
EVAL_BATCH = 256
MIN_INFORMATION = 0.3  # share of ln(out_dim) below which the teacher's answers say too little of the image
TALLY = ("loss", "loss_class", "loss_patch", "koleo", "grad_norm")
SHEET_IMAGES = 12  # of --dry-run
ANEW = "with --overwrite or in another --output-dir"  # how other settings are tried


# --- networks


class Networks(nn.Module):
    """A backbone with its heads, as student and teacher have them."""

    def __init__(self, options: PretrainOptions) -> None:
        super().__init__()
        self.backbone = ViTSmallPatch16(**options.geometry)
        width, sizes = options.vit_embed_dim, (options.head_hidden_dim, options.head_bottleneck_dim)
        self.head = DinoHead(width, *sizes, options.out_dim)
        self.patch_head = self.head
        if options.algorithm == "ibot" and not options.share_head:
            self.patch_head = DinoHead(width, *sizes, options.patch_out_dim)
        for name in ("mean", "std"):
            value = torch.tensor(getattr(options, f"aug_{name}"), dtype=torch.float32).view(3, 1, 1) * 255
            self.register_buffer(name, value, persistent=False)

    def encode(self, views: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Return tokens (V, B, 1 + N, embed_dim) of views uint8 (V, B, 3, H, W); masks are bool (V, B, N)."""
        images = (views.flatten(0, 1).float() - self.mean) / self.std
        tokens = self.backbone.encode(images, None if masks is None else masks.flatten(0, 1))
        return tokens.unflatten(0, views.shape[:2])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return what decays, matrices, and what does not: biases, norms, positions, tokens."""
    plain = ("cls_token", "pos_embed", "mask_token")
    decaying, others = [], []
    for name, parameter in model.named_parameters():
        is_plain = parameter.ndim < 2 or name.rpartition(".")[2] in plain
        (others if is_plain else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's weights towards the student's; buffers of numbers too, counters are copied."""
    # Not by state dicts, in which a head that is shared stands twice.
    pairs = zip((*teacher.parameters(), *teacher.buffers()), (*student.parameters(), *student.buffers()), strict=True)
    moved = []
    for of_teacher, of_student in pairs:
        if of_teacher.is_floating_point():
            moved.append((of_teacher, of_student))
        else:
            of_teacher.copy_(of_student)
    torch._foreach_lerp_([pair[0] for pair in moved], [pair[1] for pair in moved], 1 - momentum)


@dataclass(frozen=True)
class Schedule:
    """What changes with the optimizer step, and with nothing else."""

    options: PretrainOptions
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.options.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.options.warmup_epochs * self.steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0 on: linear to the highest, then a cosine to the lowest."""
        high, low = self.options.learning_rate, self.options.min_lr
        if step < self.warmup_steps:
            return high * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * done))

    def momentum(self, step: int) -> float:
        """Return the teacher's momentum of a step: a cosine from base to final."""
        base, final = self.options.teacher_momentum_base, self.options.teacher_momentum_final
        return final - 0.5 * (final - base) * (1 + math.cos(math.pi * step / max(1, self.total_steps)))

    def freezes_last_layer(self, step: int) -> bool:
        """Say whether the last layer of the heads stays in a step."""
        return step < round(self.options.freeze_last_layer_epochs * self.steps_per_epoch)


# --- state


@dataclass
class State:
    """All that changes while training."""

    student: Networks
    teacher: Networks
    targets: nn.ModuleDict  # `losses.Target` of class tokens and of patches
    optimizer: torch.optim.Optimizer
    tally: torch.Tensor  # float64 (5,): sums over the steps of the epoch, in the order of TALLY
    epoch: int = 0  # finished
    batches: int = 0  # done of the next
    step: int = 0
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: dict[str, float] = dataclasses.field(default_factory=dict)  # figures of the random weights

    def pack(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return it as tensors and plain values."""
        payload = {name: getattr(self, name) for name in ("epoch", "batches", "step", "best", "start", "tally")}
        payload |= {name: getattr(self, name).state_dict() for name in ("student", "teacher", "targets", "optimizer")}
        return {**payload, "identity": identity}

    def restore(self, payload: dict[str, Any]) -> None:
        """Become what was packed."""
        for name in ("epoch", "batches", "step", "best", "start"):
            setattr(self, name, payload[name])
        self.tally.copy_(payload["tally"])
        for name in ("student", "teacher", "targets", "optimizer"):
            getattr(self, name).load_state_dict(payload[name])


@dataclass(frozen=True)
class Job:
    """What does not change while training."""

    options: PretrainOptions
    data: Data
    runtime: lct.Runtime
    schedule: Schedule
    batches: EpochBatches
    identity: dict[str, Any]
    run: lct.RunDirectory
    held_out_views: torch.Tensor  # uint8 (2, N, 3, S, S)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the region in which products are rounded, if they are to be."""
        is_rounded = self.runtime.dtype != torch.float32
        return torch.autocast(self.runtime.device.type, self.runtime.dtype) if is_rounded else contextlib.nullcontext()


def build_state(options: PretrainOptions, device: torch.device) -> State:
    """Return the state at step 0, a function of options and seed.

    Raises:
        UserError: what --init-from names does not fit.
    """
    lct.seed_torch(options.seed, 0)
    student = Networks(options)
    if options.init_from is not None:
        where = options.said("init_from")
        weights, metadata = read_backbone(options.init_from, where)
        changed = [
            f"{k}: {metadata['geometry'][k]} -> {v}"
            for k, v in options.geometry.items()
            if metadata["geometry"][k] != v
        ]
        if changed:
            raise lct.UserError(f"has another geometry: {', '.join(changed)}", where, "give the model its sizes")
        fill_model(student.backbone, weights, where)
    student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    iterations = options.sinkhorn_iters if options.use_sinkhorn else 0
    settings = (options.teacher_temp, options.center_momentum, iterations)
    targets = nn.ModuleDict({"class": losses.Target(options.out_dim, *settings)})
    if options.algorithm == "ibot":
        targets["patch"] = losses.Target(len(student.patch_head.prototypes), *settings)
    groups = parameter_groups(student, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, foreach=True)
    tally = torch.zeros(len(TALLY), dtype=torch.float64, device=device)
    return State(student, teacher, targets.to(device), optimizer, tally)


# --- training


def compute_losses(job: Job, state: State, batch: ViewBatch) -> tuple[torch.Tensor, ...]:
    """Return the loss of a step and its parts, as TALLY names them but for the length of the gradient."""
    options, student, teacher = job.options, state.student, state.teacher
    global_views, local_views, masks = (lct.send(part, job.runtime.device) for part in batch)
    is_ibot = options.algorithm == "ibot"
    with job.autocast():
        with torch.no_grad():
            taught = teacher.encode(global_views)
            class_target = state.targets["class"](teacher.head(taught[:, :, 0]).flatten(0, 1))
        tokens = student.encode(global_views, masks if is_ibot else None)
        class_tokens = tokens[:, :, 0]
        if len(local_views):
            class_tokens = torch.cat([class_tokens, student.encode(local_views)[:, :, 0]])
        logits = student.head(class_tokens)
    loss_class = losses.class_loss(logits, class_target.unflatten(0, (2, -1)), options.student_temp)
    loss_patch = koleo = loss_class.new_zeros(())
    if is_ibot:
        with job.autocast():
            with torch.no_grad():  # of all patches: the masked ones alone are too few for Sinkhorn, and no fair centre
                patch_target = state.targets["patch"](teacher.patch_head(taught[:, :, 1:]).flatten(0, 2))
            patch_logits = student.patch_head(tokens[:, :, 1:][masks])
        # Each view counts as much as another, however many patches of it are masked.
        weights = (masks / masks.sum(-1, keepdim=True).clamp_min(1))[masks] / (len(masks) * masks.shape[1])
        loss_patch = losses.patch_loss(patch_logits, patch_target[masks.flatten()], weights, options.student_temp)
    if options.koleo_weight:
        koleo = (losses.koleo_loss(class_tokens[0]) + losses.koleo_loss(class_tokens[1])) / 2
    loss = loss_class + options.patch_loss_weight * loss_patch + options.koleo_weight * koleo
    return loss, loss_class, loss_patch, koleo


def train_step(job: Job, state: State, batch: ViewBatch) -> torch.Tensor:
    """Do one optimizer step and move the teacher; return its figures, float64 (5,), as TALLY names them."""
    options, optimizer, schedule = job.options, state.optimizer, job.schedule
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(state.step)
    figures = compute_losses(job, state, batch)
    optimizer.zero_grad()
    figures[0].backward()
    if schedule.freezes_last_layer(state.step):
        for head in (state.student.head, state.student.patch_head):
            head.prototypes.grad = None
    grad_norm = nn.utils.clip_grad_norm_(state.student.parameters(), options.clip_grad_norm or math.inf)
    optimizer.step()
    update_teacher(state.teacher, state.student, schedule.momentum(state.step))
    state.step += 1
    state.batches += 1
    return torch.stack([figure.detach().double() for figure in (*figures, grad_norm)])


def make_loader(job: Job) -> DataLoader:
    """Return the loader of views; which ones, `job.batches` says at the time."""
    options = job.options
    grid = options.image_size // options.patch_size
    mask_ratio = options.patch_mask_ratio if options.algorithm == "ibot" else 0.0
    return DataLoader(
        ViewDataset(job.data.train, options.augmentation, options.seed, grid, mask_ratio),
        batch_sampler=job.batches,
        collate_fn=ViewDataset.collate,
        num_workers=options.num_workers,
        worker_init_fn=lct.start_worker,
        persistent_workers=options.dataset_persistent_workers and options.num_workers > 0,
        pin_memory=options.dataset_pin_memory and job.runtime.device.type == "cuda",
    )


def train_epoch(job: Job, state: State, loaders: list[DataLoader]) -> None:
    """Train on what is left of the epoch; another loader takes the place of one whose worker was killed.

    Raises:
        Diverged: a loss or gradient is not finite.
        UserError: an image cannot be read any more.
    """
    options = job.options
    job.batches.epoch = state.epoch + 1

    def read(failed: int, taken: int) -> DataLoader:
        job.batches.first = first + taken
        if failed:
            loaders[0] = make_loader(job)
        return loaders[0]

    first = state.batches
    batches = lct.outlive_workers(read, job.run.log)
    bar = lct.progress(batches, job.batches.per_epoch - first, f"epoch {state.epoch + 1}")
    for batch in bar:
        if isinstance(batch, lct.UserError):
            raise batch
        with lct.SIGNALS.hold():  # a step happens wholly
            figures = train_step(job, state, batch)
            state.tally += figures
            if state.step % options.log_interval == 0 or state.batches == job.batches.per_epoch:
                check_finite(job, state)
                values = dict(zip(TALLY, figures.tolist(), strict=True))
                values["lr"] = job.schedule.learning_rate(state.step - 1)
                values["momentum"] = job.schedule.momentum(state.step - 1)
                job.run.event("iteration", epoch=state.epoch + 1, step=state.step, **values)
        lct.SIGNALS.check()


def check_finite(job: Job, state: State) -> None:
    """Look whether the figures of the epoch so far are finite; waits for the device.

    Raises:
        Diverged: they are not.
    """
    if state.tally.isfinite().all():
        return
    last = job.options.output_dir / job.options.checkpoint_last_name
    sound = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
    advice = f"lower --learning-rate or set --clip-grad-norm 1, {ANEW}"
    raise lct.Diverged(f"the loss is not finite at step {state.step} (epoch {state.epoch + 1}); {sound}; {advice}")


@torch.no_grad()
def embed(job: Job, networks: Networks, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return class tokens and mean patch tokens, float32 (N, embed_dim) each on the CPU, of images uint8 (N, 3, S, S)."""
    parts = []
    for chunk in images.split(EVAL_BATCH):
        with job.autocast():
            tokens = networks.encode(lct.send(chunk[None], job.runtime.device))[0].float()
        parts.append((tokens[:, 0].cpu(), tokens[:, 1:].mean(dim=1).cpu()))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def evaluate(job: Job, state: State) -> dict[str, float]:
    """Return what the teacher's features are worth: retrieval, information, and k-NN where there are labelled crops."""
    state.teacher.eval()
    first, second = (embed(job, state.teacher, views)[0] for views in job.held_out_views)
    with torch.no_grad():
        logits = state.teacher.head(torch.cat([first, second]).to(job.runtime.device))
        answers = state.targets["class"].plain(logits)
    figures = {
        "retrieval": measures.two_view_retrieval(first, second),
        "information": losses.mutual_information(answers),
    }

    def describe(images: torch.Tensor) -> dict[str, np.ndarray]:
        class_tokens, mean_patches = embed(job, state.teacher, images)
        return {"class": class_tokens.numpy(), "patch": mean_patches.numpy()}

    return figures | score_neighbours(job.data, describe)


def score_neighbours(data: Data, describe: Callable[[torch.Tensor], dict[str, np.ndarray]]) -> dict[str, float]:
    """Return the k-NN accuracy with each kind of features (N, D) of images uint8 (N, 3, S, S); none without labelled crops."""
    if data.gallery is None:
        return {}
    of_gallery = describe(data.gallery.pixels)
    of_queries = {} if data.queries is None else describe(data.queries.pixels)
    query_labels = None if data.queries is None else data.queries.labels
    return {
        f"knn_{name}": measures.knn_accuracy(features, data.gallery.labels, of_queries.get(name), query_labels)
        for name, features in of_gallery.items()
    }


def describe_pixels(images: torch.Tensor) -> dict[str, np.ndarray]:
    """Return small pictures as they are, and colour histograms: features that need no network at all."""
    return {"pixels": measures.pixel_features(images), "colours": measures.colour_features(images)}


def find_collapse(job: Job, state: State, figures: dict[str, float]) -> str:
    """Return what shows that features collapse, with the options to turn, or ''; a healthy run too may begin with a dip.

    Nothing is said before twice the warm-up.
    """
    limit = MIN_INFORMATION * math.log(job.options.out_dim)
    if state.step < 2 * job.schedule.warmup_steps:
        return ""
    signs = []
    if figures["retrieval"] <= state.start["retrieval"]:
        signs.append(
            f"retrieval {figures['retrieval']:.3f} is not above that of random weights, {state.start['retrieval']:.3f}"
        )
    if figures["information"] < limit:
        signs.append(f"the teacher's answers hold {figures['information']:.2f} nats, less than {limit:.2f}")
    knobs = "--use-sinkhorn, --koleo-weight 0.1, a lower --teacher-temp, weaker --aug-*, larger --global-crop-scale"
    return f"collapsing: {' and '.join(signs)}; try {knobs}, {ANEW}" if signs else ""


def fit(job: Job, state: State) -> None:
    """Train what is left, judge and save after each epoch.

    Raises:
        Diverged: the loss is not finite; or features collapse, and the run is to stop at that.
    """
    loaders = [make_loader(job)]
    while state.epoch < job.options.epochs:
        began = time.monotonic()
        state.student.train()
        train_epoch(job, state, loaders)
        check_finite(job, state)
        figures = dict(zip(TALLY, (state.tally / job.batches.per_epoch).tolist(), strict=True)) | evaluate(job, state)
        collapse = find_collapse(job, state, figures)
        with lct.SIGNALS.hold():
            state.epoch += 1
            state.batches = 0
            state.tally.zero_()
            finish_epoch(job, state, figures, collapse)
        job.run.log(format_epoch(job, state, figures, time.monotonic() - began))
        if collapse:
            job.run.log(f"warning: {collapse}")
        if collapse and job.options.stop_on_collapse:
            raise lct.Diverged(f"{collapse}; stopped after epoch {state.epoch} (--stop-on-collapse)")


def finish_epoch(job: Job, state: State, figures: dict[str, float], collapse: str) -> None:
    """Record an epoch, and save it; never the lowest loss makes a checkpoint the best, which a collapsed run has as well."""
    metric = job.identity["chosen_by"]
    job.run.event("epoch_end", epoch=state.epoch, step=state.step, **figures, collapse=collapse or None)
    if not state.best or figures[metric] > state.best["value"]:
        save_best(job, state, figures[metric])
    save_last(job, state)


def save_best(job: Job, state: State, value: float) -> None:
    """Write the best checkpoint so far, whose figure that decides has a value."""
    state.best = {"metric": job.identity["chosen_by"], "value": value, "epoch": state.epoch, "step": state.step}
    job.run.event("best", **state.best)
    lct.write_checkpoint(job.options.output_dir / job.options.checkpoint_best_name, state.pack(job.identity))


def save_last(job: Job, state: State) -> None:
    """Write the last checkpoint, and say in artifacts.json what there is."""
    lct.write_checkpoint(job.options.output_dir / job.options.checkpoint_last_name, state.pack(job.identity))
    write_artifacts(job, state)


def format_epoch(job: Job, state: State, figures: dict[str, float], seconds: float) -> str:
    """Return the line of an epoch for people."""
    parts = [
        f"epoch {state.epoch}/{job.options.epochs}",
        f"loss {figures['loss']:.3f}",
        f"retrieval {figures['retrieval']:.3f} (random {state.start['retrieval']:.3f})",
        f"information {figures['information']:.2f} of {math.log(job.options.out_dim):.2f}",
    ]
    if "knn_class" in figures:
        parts.append(f"k-NN class token {figures['knn_class']:.3f}, mean patch {figures['knn_patch']:.3f}")
    best = " *" if state.best["epoch"] == state.epoch else ""
    return "  ".join([*parts, f"{seconds:.0f} s{best}"])


# --- files


def write_artifacts(job: Job, state: State, export: dict[str, Any] | None = None) -> None:
    """Write artifacts.json: checkpoints and exports, earlier ones too, with path, SHA-256, size in bytes and metadata."""
    options, folder = job.options, job.options.output_dir
    position = {"epoch": state.epoch, "step": state.step, "batches": state.batches}
    described = [
        ("checkpoint_last", folder / options.checkpoint_last_name, position),
        ("checkpoint_best", folder / options.checkpoint_best_name, state.best),
    ]
    if export is not None:
        described.append(("backbone", options.export_backbone, export))
    entries = {}
    for kind, path, metadata in described:
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name, size = str(path.resolve()), path.stat().st_size
            entries[name] = {"kind": kind, "path": name, "sha256": digest, "size": size, "metadata": metadata}
    with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is damaged
        for entry in lct.read_json(folder / "artifacts.json", {"artifacts": [{"kind": str, "path": str}]})["artifacts"]:
            if entry["kind"] == "backbone":
                entries.setdefault(entry["path"], entry)
    lct.write_json(folder / "artifacts.json", {"artifacts": list(entries.values())})


def describe_run(job: Job, networks: Networks) -> dict[str, Any]:
    """Return what params.json holds."""
    options = job.options
    modules = {"backbone": networks.backbone, "student": networks}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    plain = options.as_plain()
    of_views, elsewhere = ("aug_", "global_", "local_", "num_local"), ("experiment_", "vit_")
    augmentation = {k: v for k, v in plain.items() if k.startswith(of_views)}
    names = ("train_dir", "knn_dir", "output_dir", "export_backbone", "init_from", "config")
    paths = {name: plain[name] for name in names}
    training = {k: v for k, v in plain.items() if not k.startswith((*of_views, *elsewhere)) and k not in paths}
    return {
        "model": {"architecture": ARCHITECTURE, "geometry": options.geometry, "parameters": counts},
        "augmentation": augmentation,
        "dataset": {
            "images": len(job.data.train),
            "held_out": len(job.data.held_out),
            "labelled": sum(len(part.labels) for part in (job.data.gallery, job.data.queries) if part is not None),
            "fingerprint": job.data.fingerprint,
            "steps_per_epoch": job.batches.per_epoch,
        },
        "paths": paths,
        "training": training,
        "experiment": {
            "name": options.experiment_name,
            "notes": options.experiment_notes,
            "tags": list(options.experiment_tag),
        },
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__},
        "device": job.runtime.describe(),
    }


def export_best(job: Job, state: State) -> None:
    """Write the backbone of the best teacher, and beside it as JSON what it is."""
    options, path = job.options, job.options.export_backbone
    best = lct.load_checkpoint(options.output_dir / options.checkpoint_best_name, CHECKPOINT_FORM)
    prefix = "backbone."
    weights = {key.removeprefix(prefix): value for key, value in best["teacher"].items() if key.startswith(prefix)}
    metadata = {
        "made_by": "lct_dino3 pretrain",
        "architecture": ARCHITECTURE,
        "geometry": options.geometry,
        "mean": list(options.aug_mean),
        "std": list(options.aug_std),
        "algorithm": options.algorithm,
        "epoch": best["epoch"],
        "step": best["step"],
        "chosen_by": dict(best["best"]),
        "data": job.data.fingerprint,
    }
    lct.create_out_dir(path.absolute().parent, "--export-backbone")
    with lct.atomic_file(path) as file:
        torch.save({"model": weights, "metadata": metadata}, file)
    lct.write_json(path.with_suffix(".json"), metadata)
    write_artifacts(job, state, metadata)
    job.run.log(f"exported: {path} (epoch {best['epoch']})")


def draw_sheet(dataset: ViewDataset) -> Image.Image:
    """Return a picture of views: a row an image, as it is, its global views, its local ones."""
    side = max(64, dataset.augmentation.image_size)
    rows = []
    for index in range(min(SHEET_IMAGES, len(dataset.images))):
        global_views, local_views, _ = dataset[ViewKey(1, index)]
        pictures = [resize(dataset.images.read(index), side), *global_views, *local_views]
        enlarged = [cv2.resize(picture, (side, side), interpolation=cv2.INTER_NEAREST) for picture in pictures]
        rows.append(np.concatenate(enlarged, axis=1))
    return Image.fromarray(np.concatenate(rows))


# --- the whole


def choose_start(options: PretrainOptions) -> dict[str, Any] | None:
    """Return the checkpoint to go on from; None for a fresh start, which a run that has a checkpoint never makes by itself.

    Raises:
        UserError: there is none where one should be, or it is damaged or foreign.
    """
    last, best = (options.output_dir / name for name in (options.checkpoint_last_name, options.checkpoint_best_name))
    path = last if options.resume in (None, "last") else Path(options.resume)
    path = path / options.checkpoint_last_name if path.is_dir() else path
    others = [other for other in (last, best) if other.exists() and other != path]
    if options.overwrite or (options.resume is None and not path.exists() and not others):
        return None
    try:
        return lct.load_checkpoint(path, CHECKPOINT_FORM)
    except lct.UserError as error:
        remedy = f"give --resume {others[0]}, or " if others else ""
        raise lct.UserError(
            error.what, error.where, f"{remedy}start afresh with --overwrite, without --resume"
        ) from error


def make_identity(options: PretrainOptions, data: Data) -> dict[str, Any]:
    """Return what must be the same when a run goes on."""
    plain = {name: value for name, value in options.as_plain().items() if name not in FREE_OPTIONS}
    return {**plain, "data": data.fingerprint, "chosen_by": "knn_class" if data.gallery else "retrieval"}


def check_same_run(saved: dict[str, Any], current: dict[str, Any], options: PretrainOptions) -> None:
    """Refuse a checkpoint of a run with other options.

    Raises:
        UserError: listing what differs as old -> new.
    """
    try:
        lct.check_identity(options.output_dir / options.checkpoint_last_name, saved, current)
    except lct.UserError as error:
        remedy = "use the settings of that run, choose a new --output-dir, or start afresh with --overwrite"
        raise lct.UserError(error.what, error.where, remedy) from error


def pretrain(options: PretrainOptions) -> None:
    """Pre-train as the options say: recipe of both programs."""
    options = apply_preset(options)
    check_options(options)
    lct.keep_freed_memory()
    cv2.setNumThreads(1)  # views are small, and workers are processes
    gpus = {"auto": None, "cpu": 0, "cuda": 1}[options.device]
    runtime = lct.make_runtime(gpus, "bf16" if options.amp else "fp32")
    if options.overwrite and options.output_dir.exists() and not options.dry_run:
        lct.show(f"the old run is now {lct.move_aside(options.output_dir)}")
    payload = choose_start(options)
    data = read_data(options)
    identity = make_identity(options, data)
    if payload is not None:
        check_same_run(payload["identity"], identity, options)
    batches = EpochBatches(len(data.train), options.batch_size, options.seed, options.dataset_shuffle)
    schedule = Schedule(options, batches.per_epoch)
    grid = options.image_size // options.patch_size
    held_out = ViewDataset(data.held_out, options.augmentation.yardstick(), options.seed, grid, 0.0)
    views = torch.cat(
        [ViewDataset.collate([held_out[ViewKey(0, i)]]).global_views for i in range(len(data.held_out))], 1
    )
    state = build_state(options, runtime.device)
    with lct.RunDirectory(options.output_dir, "--output-dir", options.checkpoint_history_file) as run:
        job = Job(options, data, runtime, schedule, batches, identity, run, views)
        description = describe_run(job, state.student)
        counts = description["model"]["parameters"]
        run.log(
            f"{len(data.train):,} crops, {batches.per_epoch} steps an epoch; backbone of {counts['backbone']:,} parameters,"
            f" with heads {counts['student']:,}; on {runtime.describe()}"
        )
        if options.dry_run:
            shown = ViewDataset(data.train, options.augmentation, options.seed, grid, 0.0)
            with lct.atomic_file(options.output_dir / "views.png") as file:
                draw_sheet(shown).save(file, "PNG")
            run.log("\n".join(f"  {name}: {value}" for name, value in options.as_plain().items()))
            run.log(f"written: {options.output_dir / 'views.png'}; nothing is trained (--dry-run)")
            return
        lct.write_json(options.output_dir / "params.json", description)
        start_or_resume(job, state, payload)
        try:
            fit(job, state)
            if options.export_backbone is not None:
                export_best(job, state)
        except lct.Interrupted:  # also in the middle of an epoch
            if state.step and state.tally.isfinite().all():
                save_last(job, state)
            raise
        best = f"best: epoch {state.best['epoch']}, {state.best['metric']} {state.best['value']:.3f}"
        run.log(f"{best}; {describe_start(state.start)}")  # beside what needs no training


def start_or_resume(job: Job, state: State, payload: dict[str, Any] | None) -> None:
    """Judge the random weights, or become the checkpoint; what history has of later steps is forgotten."""
    run = job.run
    if payload is not None:
        state.restore(payload)
    step, epoch = state.step, state.epoch
    kinds = ("iteration", "epoch_end", "best", "start_end")
    run.forget(lambda r: r["event"] in kinds and (r["step"] > step or r["epoch"] > epoch + (r["event"] == "iteration")))
    if payload is not None:
        run.event("resumed", epoch=state.epoch, step=state.step)
        best_path = job.options.output_dir / job.options.checkpoint_best_name
        if state.best and not best_path.exists():  # it is in another folder, or gone
            save_best(job, state, evaluate(job, state)[state.best["metric"]])
        save_last(job, state)  # a kill may have left the old artifacts.json
        run.log(f"resumed at {lct.describe_position(state.epoch, state.batches)}")
        return
    run.forget(lambda record: record["event"] == "start_end")
    state.start = evaluate(job, state) | score_neighbours(job.data, describe_pixels)
    run.event("run_start", epoch=0, step=0, algorithm=job.options.algorithm, chosen_by=job.identity["chosen_by"])
    run.event("start_end", epoch=0, step=0, **state.start)
    run.log(describe_start(state.start))


def describe_start(start: dict[str, float]) -> str:
    """Return the figures of what needs no training."""
    text = f"random weights: retrieval {start['retrieval']:.3f}"
    if "knn_pixels" in start:
        text += f", k-NN class token {start['knn_class']:.3f}, mean patch {start['knn_patch']:.3f}"
        text += f"; {measures.PIXEL_SIDE}-px pixels {start['knn_pixels']:.3f}"
        text += f", colour histograms {start['knn_colours']:.3f}"
    return text
