"""Self-supervised pre-training with DINO and iBOT: the code that pretrain_dino_face.py and pretrain_dino_hands.py share.

A student learns to give, for a view of an image, the output that the teacher, the running mean of the student, gives for another
view. A run is a function of data, options and seed; it resumes exactly after an interruption or a kill.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lct_dino3 as lct  # before torch: it sets environment variables that torch reads at import

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
from timm.optim import param_groups_weight_decay
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
MIN_INFORMATION = 0.3  # share of the highest; below it the teacher's outputs say too little about the image
TALLY = ("loss", "loss_class", "loss_patch", "koleo", "grad_norm")  # figures of a step
SHEET_IMAGES = 12  # rows of the sheet of views
FRESH_RUN = "with --overwrite or in another --output-dir"  # end of each advice to try other settings


# --- networks


class Networks(nn.Module):
    """A backbone and its heads; student and teacher are two copies."""

    def __init__(self, options: PretrainOptions) -> None:
        super().__init__()
        self.backbone = ViTSmallPatch16(**options.geometry)
        widths = (options.vit_embed_dim, options.head_hidden_dim, options.head_bottleneck_dim)
        self.head = DinoHead(*widths, options.out_dim)
        self.patch_head = self.head
        if options.algorithm == "ibot" and not options.share_head:
            self.patch_head = DinoHead(*widths, options.patch_out_dim)
        for name in ("mean", "std"):
            value = torch.tensor(getattr(options, f"aug_{name}"), dtype=torch.float32).view(3, 1, 1) * 255
            self.register_buffer(name, value, persistent=False)

    def encode(self, views: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tokens (V, B, 1 + N, embed_dim) of uint8 views (V, B, 3, H, W); masks are bool (V, B, N)."""
        images = (views.flatten(0, 1).float() - self.mean) / self.std
        tokens = self.backbone.encode(images, None if masks is None else masks.flatten(0, 1))
        return tokens.unflatten(0, views.shape[:2])


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's weights and float buffers towards the student's by 1 - momentum; copy integer buffers."""
    # State dicts list a shared head twice, parameters() once.
    pairs = zip((*teacher.parameters(), *teacher.buffers()), (*student.parameters(), *student.buffers()), strict=True)
    averaged = []
    for teacher_tensor, student_tensor in pairs:
        if teacher_tensor.is_floating_point():
            averaged.append((teacher_tensor, student_tensor))
        else:
            teacher_tensor.copy_(student_tensor)
    torch._foreach_lerp_([pair[0] for pair in averaged], [pair[1] for pair in averaged], 1 - momentum)


@dataclass(frozen=True)
class Schedule:
    """Values that are pure functions of the optimizer step."""

    options: PretrainOptions
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Steps in the whole run."""
        return self.options.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.options.warmup_epochs * self.steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear up to the highest, then a cosine to the lowest."""
        high = self.options.learning_rate
        low = self.options.min_lr
        if step < self.warmup_steps:
            return high * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * progress))

    def momentum(self, step: int) -> float:
        """Return the teacher's momentum at a step: a cosine from the base to the final value."""
        base = self.options.teacher_momentum_base
        final = self.options.teacher_momentum_final
        return final - 0.5 * (final - base) * (1 + math.cos(math.pi * step / self.total_steps))

    def freezes_last_layer(self, step: int) -> bool:
        """Whether a step leaves the last layer of the heads unchanged."""
        return step < round(self.options.freeze_last_layer_epochs * self.steps_per_epoch)


# --- state


@dataclass
class State:
    """Everything that changes during training."""

    student: Networks
    teacher: Networks
    targets: nn.ModuleDict  # `losses.Target` of class tokens ("class") and, with iBOT, of patches ("patch")
    optimizer: torch.optim.Optimizer
    tally: torch.Tensor  # float64 (5,): sums over the steps of the epoch, in the order of TALLY
    epoch: int = 0  # finished epochs
    batches: int = 0  # finished batches of the next epoch
    step: int = 0
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: dict[str, float] = dataclasses.field(default_factory=dict)  # figures of the initial weights

    def pack(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return the state and the identity of the run as tensors and plain values."""
        payload = {name: getattr(self, name) for name in ("epoch", "batches", "step", "best", "start", "tally")}
        payload |= {name: getattr(self, name).state_dict() for name in ("student", "teacher", "targets", "optimizer")}
        return {**payload, "identity": identity}

    def restore(self, payload: dict[str, Any]) -> None:
        """Load a payload of `pack`."""
        for name in ("epoch", "batches", "step", "best", "start"):
            setattr(self, name, payload[name])
        self.tally.copy_(payload["tally"])
        for name in ("student", "teacher", "targets", "optimizer"):
            getattr(self, name).load_state_dict(payload[name])


@dataclass(frozen=True)
class Job:
    """Everything that stays the same during training."""

    options: PretrainOptions
    data: Data
    runtime: lct.Runtime
    schedule: Schedule
    batches: EpochBatches
    identity: dict[str, Any]
    run: lct.RunDirectory
    held_out_views: torch.Tensor  # uint8 (2, N, 3, S, S): two views of each held-out image

    def autocast(self) -> torch.autocast:
        """Return an autocast context for the dtype of the run; with float32 it does nothing."""
        dtype = self.runtime.dtype
        return torch.autocast(self.runtime.device.type, dtype, enabled=dtype != torch.float32)


def build_state(options: PretrainOptions, device: torch.device) -> State:
    """Build the state at step 0, a function of the options.

    Raises:
        UserError: the file of --init-from is no export or does not fit the model.
    """
    lct.seed_torch(options.seed, 0)
    student = Networks(options)
    if options.init_from is not None:
        where = options.describe("init_from")
        weights, metadata = read_backbone(options.init_from, where)
        saved = metadata["geometry"]
        changed = [f"{k}: {saved[k]} -> {v}" for k, v in options.geometry.items() if saved[k] != v]
        if changed:
            raise lct.UserError(f"has another geometry: {', '.join(changed)}", where, "give the model its sizes")
        normalisation = {"mean": list(options.aug_mean), "std": list(options.aug_std)}
        changed = [f"{k}: {metadata[k]} -> {v}" for k, v in normalisation.items() if metadata.get(k, v) != v]
        if changed:
            lct.show(f"warning: {where}: was trained with another --aug-mean or --aug-std: {', '.join(changed)}")
        fill_model(student.backbone, weights, where)
    student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    iterations = options.sinkhorn_iters if options.use_sinkhorn else 0
    settings = (options.teacher_temp, options.center_momentum, iterations)
    targets = nn.ModuleDict({"class": losses.Target(options.out_dim, *settings)})
    if options.algorithm == "ibot":
        targets["patch"] = losses.Target(len(student.patch_head.prototypes), *settings)
    undecayed = ("backbone.cls_token", "backbone.pos_embed")  # besides biases, norms and the mask token
    groups = param_groups_weight_decay(student, options.weight_decay, no_weight_decay_list=undecayed)[::-1]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, foreach=True)
    tally = torch.zeros(len(TALLY), dtype=torch.float64, device=device)
    return State(student, teacher, targets.to(device), optimizer, tally)


# --- training


def fit(job: Job, state: State) -> None:
    """Train the remaining epochs; evaluate and save after each.

    Raises:
        Diverged: the loss is not finite, or the features collapse and --stop-on-collapse is given.
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
            job.run.event("epoch_end", epoch=state.epoch, step=state.step, **figures, collapse=collapse or None)
            # The loss never chooses the best epoch: a collapsed run has a low loss as well. Of equal epochs the latest: a few crops
            # reach 1.0 at once.
            value = figures[job.identity["chosen_by"]]
            if not state.best or value >= state.best["value"]:
                save_best(job, state, value)
            save_last(job, state)
        job.run.log(format_epoch(job, state, figures, time.monotonic() - began))
        if collapse:
            job.run.log(f"warning: {collapse}")
        if collapse and job.options.stop_on_collapse:
            raise lct.Diverged(f"{collapse}; stopped after epoch {state.epoch} (--stop-on-collapse)")


def train_epoch(job: Job, state: State, loaders: list[DataLoader]) -> None:
    """Train on the remaining batches of the epoch. `loaders` holds one loader; a new one replaces it after a worker was killed.

    Raises:
        Diverged: a loss or gradient is not finite.
        UserError: an image can no longer be read.
    """
    job.batches.epoch = state.epoch + 1
    first = state.batches

    def start_loader(num_failed: int, num_yielded: int) -> DataLoader:
        job.batches.first = first + num_yielded
        if num_failed:
            loaders[0] = make_loader(job)
        return loaders[0]

    batches = lct.outlive_workers(start_loader, job.run.log)
    for batch in lct.progress(batches, job.batches.per_epoch - first, f"epoch {state.epoch + 1}"):
        if isinstance(batch, lct.UserError):
            raise batch
        with lct.SIGNALS.hold():  # no signal interrupts a step
            figures = train_step(job, state, batch)
            state.tally += figures
            if state.step % job.options.log_interval == 0 or state.batches == job.batches.per_epoch:
                check_finite(job, state)
                values = dict(zip(TALLY, figures.tolist(), strict=True))
                values["lr"] = job.schedule.learning_rate(state.step - 1)
                values["momentum"] = job.schedule.momentum(state.step - 1)
                job.run.event("iteration", epoch=state.epoch + 1, step=state.step, **values)
        lct.SIGNALS.check()


def make_loader(job: Job) -> DataLoader:
    """Build the loader of training views; each pass yields the batches that `job.batches` is set to."""
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


def train_step(job: Job, state: State, batch: ViewBatch) -> torch.Tensor:
    """Take one optimizer step and update the teacher; return the figures of TALLY, float64 (5,)."""
    for group in state.optimizer.param_groups:
        group["lr"] = job.schedule.learning_rate(state.step)
    loss, *terms = compute_losses(job, state, batch)
    state.optimizer.zero_grad()
    loss.backward()
    if job.schedule.freezes_last_layer(state.step):
        for head in (state.student.head, state.student.patch_head):
            head.prototypes.grad = None
    grad_norm = nn.utils.clip_grad_norm_(state.student.parameters(), job.options.clip_grad_norm or math.inf)
    state.optimizer.step()
    update_teacher(state.teacher, state.student, job.schedule.momentum(state.step))
    state.step += 1
    state.batches += 1
    return torch.stack([figure.detach().double() for figure in (loss, *terms, grad_norm)])


def compute_losses(job: Job, state: State, batch: ViewBatch) -> tuple[torch.Tensor, ...]:
    """Return the loss of a step and its terms, the figures of TALLY without the gradient norm."""
    options = job.options
    global_views, local_views, masks = (lct.send(tensor, job.runtime.device) for tensor in batch)
    is_ibot = options.algorithm == "ibot"
    with job.autocast():
        with torch.no_grad():
            teacher_tokens = state.teacher.encode(global_views)
            class_target = state.targets["class"](state.teacher.head(teacher_tokens[:, :, 0]).flatten(0, 1))
        tokens = state.student.encode(global_views, masks if is_ibot else None)
        class_tokens = tokens[:, :, 0]
        if len(local_views):
            class_tokens = torch.cat([class_tokens, state.student.encode(local_views)[:, :, 0]])
        logits = state.student.head(class_tokens)
    loss_class = losses.class_loss(logits, class_target.unflatten(0, (2, -1)), options.student_temp)
    loss_patch = koleo = loss_class.new_zeros(())
    if is_ibot:
        with job.autocast():
            with torch.no_grad():  # all patches: the masked ones are too few for Sinkhorn and bias the centre
                patch_target = state.targets["patch"](state.teacher.patch_head(teacher_tokens[:, :, 1:]).flatten(0, 2))
            patch_logits = state.student.patch_head(tokens[:, :, 1:][masks])
        # Each masked view counts the same, however many of its patches are masked.
        weights = (masks / masks.sum(-1, keepdim=True).clamp_min(1))[masks] / (len(masks) * masks.shape[1])
        loss_patch = losses.patch_loss(patch_logits, patch_target[masks.flatten()], weights, options.student_temp)
    if options.koleo_weight:
        koleo = (losses.koleo_loss(class_tokens[0]) + losses.koleo_loss(class_tokens[1])) / 2
    loss = loss_class + options.patch_loss_weight * loss_patch + options.koleo_weight * koleo
    return loss, loss_class, loss_patch, koleo


def check_finite(job: Job, state: State) -> None:
    """Check that the figures of the epoch so far are finite; waits for the device.

    Raises:
        Diverged: a figure is not finite.
    """
    if state.tally.isfinite().all():
        return
    last = job.options.output_dir / job.options.checkpoint_last_name
    fallback = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
    advice = f"lower --learning-rate or set --clip-grad-norm 1, {FRESH_RUN}"
    raise lct.Diverged(f"the loss is not finite at step {state.step} (epoch {state.epoch + 1}); {fallback}; {advice}")


def evaluate(job: Job, state: State) -> dict[str, float]:
    """Return figures of the teacher's features: retrieval, information, and k-NN accuracies if there are labelled crops."""
    state.teacher.eval()
    first, second = (embed(job, state.teacher, views)[0] for views in job.held_out_views)
    with torch.no_grad():
        logits = state.teacher.head(torch.cat([first, second]).to(job.runtime.device))
        probabilities = state.targets["class"].softmax(logits)
    figures = {
        "retrieval": measures.two_view_retrieval(first, second),
        "information": losses.mutual_information(probabilities),
    }

    def extract_features(images: torch.Tensor) -> dict[str, np.ndarray]:
        class_tokens, mean_patches = embed(job, state.teacher, images)
        return {"class": class_tokens.numpy(), "patch": mean_patches.numpy()}

    return figures | score_knn(job.data, extract_features)


@torch.no_grad()
def embed(job: Job, networks: Networks, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return class tokens and mean patch tokens of uint8 images (N, 3, S, S), each float32 (N, embed_dim) on the CPU."""
    class_tokens = []
    mean_patches = []
    chunks = images.split(EVAL_BATCH)
    for chunk in lct.progress(chunks, len(chunks), "evaluating"):
        with job.autocast():
            tokens = networks.encode(lct.send(chunk[None], job.runtime.device))[0].float()
        class_tokens.append(tokens[:, 0].cpu())
        mean_patches.append(tokens[:, 1:].mean(dim=1).cpu())
    return torch.cat(class_tokens), torch.cat(mean_patches)


def score_knn(data: Data, extract_features: Callable[[torch.Tensor], dict[str, np.ndarray]]) -> dict[str, float]:
    """Return the k-NN accuracy of each kind of features (N, D) of uint8 images (N, 3, S, S); empty without labelled crops."""
    if data.gallery is None:
        return {}
    gallery_features = extract_features(data.gallery.pixels)
    query_features = {} if data.queries is None else extract_features(data.queries.pixels)
    query_labels = None if data.queries is None else data.queries.labels
    return {
        f"knn_{name}": measures.knn_accuracy(features, data.gallery.labels, query_features.get(name), query_labels)
        for name, features in gallery_features.items()
    }


def find_collapse(job: Job, state: State, figures: dict[str, float]) -> str:
    """Return a warning if features collapse, else ''; '' up to twice the warm-up, because a healthy run may begin with a dip."""
    if state.step < 2 * job.schedule.warmup_steps:
        return ""
    limit = MIN_INFORMATION * highest_information(job)
    signs = []
    is_random = job.options.init_from is None  # trained weights may lose a little
    if is_random and figures["retrieval"] <= state.start["retrieval"] and figures["retrieval"] < 1:
        signs.append(
            f"retrieval {figures['retrieval']:.3f} is not above that of the initial weights, {state.start['retrieval']:.3f}"
        )
    if figures["information"] < limit:
        signs.append(f"the teacher's answers hold {figures['information']:.2f} nats, less than {limit:.2f}")
    remedies = "--use-sinkhorn, --koleo-weight 0.1, a lower --teacher-temp, weaker --aug-*, larger --global-crop-scale"
    return f"collapsing: {' and '.join(signs)}; try {remedies}, {FRESH_RUN}" if signs else ""


def highest_information(job: Job) -> float:
    """Return the most nats that the teacher's outputs can hold: ln of their number, or of that of the held-out views if less."""
    return math.log(min(job.options.out_dim, job.held_out_views.shape[:2].numel()))


def save_best(job: Job, state: State, value: float) -> None:
    """Write the best checkpoint so far; `value` is its figure in the metric that decides."""
    state.best = {"metric": job.identity["chosen_by"], "value": value, "epoch": state.epoch, "step": state.step}
    job.run.event("best", **state.best)
    lct.write_checkpoint(job.options.output_dir / job.options.checkpoint_best_name, state.pack(job.identity))


def save_last(job: Job, state: State) -> None:
    """Write the last checkpoint and artifacts.json."""
    lct.write_checkpoint(job.options.output_dir / job.options.checkpoint_last_name, state.pack(job.identity))
    write_artifacts(job, state)


def format_epoch(job: Job, state: State, figures: dict[str, float], seconds: float) -> str:
    """Return the log line of an epoch."""
    columns = [
        f"epoch {state.epoch}/{job.options.epochs}",
        f"loss {figures['loss']:.3f}",
        f"retrieval {figures['retrieval']:.3f} (initial {state.start['retrieval']:.3f})",
        f"information {figures['information']:.2f} of {highest_information(job):.2f}",
    ]
    if "knn_class" in figures:
        columns.append(f"k-NN class token {figures['knn_class']:.3f}, mean patch {figures['knn_patch']:.3f}")
    mark = " *" if state.best["epoch"] == state.epoch else ""
    return "  ".join([*columns, f"{seconds:.0f} s{mark}"])


# --- files


def describe_run(job: Job, num_parameters: dict[str, int]) -> dict[str, Any]:
    """Return the content of params.json."""
    options = job.options
    values = options.as_plain()
    view_prefixes = ("aug_", "global_", "local_", "num_local")
    other_prefixes = (*view_prefixes, "experiment_", "vit_")  # in other entries than "training"
    path_names = ("train_dir", "knn_dir", "output_dir", "export_backbone", "init_from", "config")
    return {
        "model": {"architecture": ARCHITECTURE, "geometry": options.geometry, "parameters": num_parameters},
        "augmentation": {k: v for k, v in values.items() if k.startswith(view_prefixes)},
        "dataset": {
            "images": len(job.data.train),
            "held_out": len(job.data.held_out),
            "labelled": sum(len(crops.labels) for crops in (job.data.gallery, job.data.queries) if crops is not None),
            "fingerprint": job.data.fingerprint,
            "steps_per_epoch": job.batches.per_epoch,
        },
        "paths": {name: values[name] for name in path_names},
        "training": {k: v for k, v in values.items() if not k.startswith(other_prefixes) and k not in path_names},
        "experiment": {
            "name": options.experiment_name,
            "notes": options.experiment_notes,
            "tags": list(options.experiment_tag),
        },
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__},
        "device": job.runtime.describe(),
    }


def export_best(job: Job, state: State) -> None:
    """Write the backbone of the best teacher, and its metadata beside it as JSON."""
    options = job.options
    path = options.export_backbone
    best = lct.load_checkpoint(options.output_dir / options.checkpoint_best_name, CHECKPOINT_FORM)
    weights = {k.removeprefix("backbone."): v for k, v in best["teacher"].items() if k.startswith("backbone.")}
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
    with lct.SIGNALS.hold(), lct.atomic_file(path) as file:
        torch.save({"model": weights, "metadata": metadata}, file)
    lct.write_json(options.sidecar, metadata)
    write_artifacts(job, state, metadata)
    job.run.log(f"exported: {path} (epoch {best['epoch']})")


def write_artifacts(job: Job, state: State, export: dict[str, Any] | None = None) -> None:
    """Write artifacts.json: path, SHA-256, size in bytes and metadata of checkpoints and exports; `export` describes a new one."""
    options = job.options
    position = {"epoch": state.epoch, "step": state.step, "batches": state.batches}
    artifacts = [
        ("checkpoint_last", options.output_dir / options.checkpoint_last_name, position),
        ("checkpoint_best", options.output_dir / options.checkpoint_best_name, state.best),
    ]
    if export is not None:
        artifacts.append(("backbone", options.export_backbone, export))
    entries = {}
    for kind, path, metadata in artifacts:
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = str(path.resolve())
            size = path.stat().st_size
            entries[name] = {"kind": kind, "path": name, "sha256": digest, "size": size, "metadata": metadata}
    listing = options.output_dir / "artifacts.json"
    with contextlib.suppress(OSError, ValueError):  # the file does not exist yet, or is damaged
        for entry in lct.read_json(listing, {"artifacts": [{"kind": str, "path": str}]})["artifacts"]:
            if entry["kind"] == "backbone":  # exports of earlier starts stay listed
                entries.setdefault(entry["path"], entry)
    lct.write_json(listing, {"artifacts": list(entries.values())})


def draw_sheet(dataset: ViewDataset) -> Image.Image:
    """Draw a sheet of views: each row shows an image, its global views and its local views."""
    side = max(64, dataset.augmentation.image_size)
    rows = []
    for index in range(min(SHEET_IMAGES, len(dataset.images))):
        global_views, local_views, _ = dataset[ViewKey(1, index)]
        images = [resize(dataset.images.read(index), side), *global_views, *local_views]
        tiles = [cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST) for image in images]
        rows.append(np.concatenate(tiles, axis=1))
    return Image.fromarray(np.concatenate(rows))


# --- run


def pretrain(options: PretrainOptions) -> None:
    """Pre-train with the options of the command line: the recipe of both programs."""
    options = apply_preset(options)
    check_options(options)
    cv2.setNumThreads(1)  # small views gain nothing from threads, and workers are processes
    gpus = {"auto": None, "cpu": 0, "cuda": 1}[options.device]
    runtime = lct.make_runtime(gpus, "bf16" if options.amp else "fp32")
    checkpoints = read_checkpoints(options)
    data = read_data(options)
    identity = make_identity(options, data)
    for path, checkpoint in checkpoints.items():
        lct.check_identity(path, checkpoint["identity"], identity, elsewhere="choose a new --output-dir")
    batches = EpochBatches(len(data.train), options.batch_size, options.seed, options.dataset_shuffle)
    schedule = Schedule(options, batches.per_epoch)
    grid = options.image_size // options.patch_size
    held_out = ViewDataset(data.held_out, options.augmentation.for_evaluation(), options.seed, grid, 0.0)
    num_held_out = len(data.held_out)
    indices = lct.progress(range(num_held_out), num_held_out, "held-out views", "image")
    views = ViewDataset.collate([held_out[ViewKey(0, index)] for index in indices]).global_views
    state = build_state(options, runtime.device)
    modules = {"backbone": state.student.backbone, "student": state.student}
    num_parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    summary = (
        f"{len(data.train):,} crops, {lct.count_of(batches.per_epoch, 'step')} an epoch; backbone of"
        f" {num_parameters['backbone']:,} parameters, with heads {num_parameters['student']:,}; on {runtime.describe()}"
    )
    if options.dry_run:
        lct.create_out_dir(options.output_dir, "--output-dir")
        path = options.output_dir / "views.png"
        with lct.atomic_file(path) as file:
            draw_sheet(ViewDataset(data.train, options.augmentation, options.seed, grid, 0.0)).save(file, "PNG")
        settings = [f"  {name}: {value}" for name, value in options.as_plain().items()]
        lct.show("\n".join([summary, *settings, f"written: {path}; nothing is trained (--dry-run)"]))
        return
    if options.overwrite and options.output_dir.exists():
        lct.show(f"the old run is now {lct.move_aside(options.output_dir, '--output-dir')}")
    with lct.RunDirectory(options.output_dir, "--output-dir", options.checkpoint_history_file) as run:
        job = Job(options, data, runtime, schedule, batches, identity, run, views)
        run.log(summary)
        lct.write_json(options.output_dir / "params.json", describe_run(job, num_parameters))
        start_or_resume(job, state, next(iter(checkpoints.values()), None))
        checkpoints.clear()  # frees their memory
        try:
            fit(job, state)
            if options.export_backbone is not None:
                export_best(job, state)
        except lct.Interrupted:  # possibly in the middle of an epoch
            if state.step and state.tally.isfinite().all():
                save_last(job, state)
            raise
        best = f"best: epoch {state.best['epoch']}, {state.best['metric']} {state.best['value']:.3f}"
        run.log(f"{best}; {describe_start(state.start)}")


def read_checkpoints(options: PretrainOptions) -> dict[Path, dict[str, Any]]:
    """Return by path the checkpoint to resume from and then the best one beside it; nothing for a fresh start.

    A run with a checkpoint starts afresh only with --overwrite.

    Raises:
        UserError: a checkpoint is missing, damaged, or not one of pre-training.
    """
    last = options.output_dir / options.checkpoint_last_name
    best = options.output_dir / options.checkpoint_best_name
    if options.resume is None:
        path = last if last.exists() else best  # killed in the first epoch, between writing the best and the last one
    else:
        path = last if options.resume == "last" else Path(options.resume)
        path = path / options.checkpoint_last_name if path.is_dir() else path
    if options.overwrite or (options.resume is None and not path.exists()):
        return {}
    alternatives = [other for other in (last, best) if other.exists() and other != path]
    alternative = f"give --resume {alternatives[0]}, or " if alternatives else ""
    checkpoints = {path: read_checkpoint(path, f"{alternative}start afresh with --overwrite, without --resume")}
    if best.exists() and best != path:
        checkpoints[best] = read_checkpoint(
            best, "delete it; the same command then takes the newest teacher for the best"
        )
    return checkpoints


def read_checkpoint(path: Path, remedy: str) -> dict[str, Any]:
    """Read a checkpoint of pre-training. Raises UserError with `remedy` if it is missing, damaged, or not one."""
    try:
        return lct.load_checkpoint(path, CHECKPOINT_FORM)
    except lct.UserError as error:
        raise lct.UserError(error.what, error.where, remedy) from error


def make_identity(options: PretrainOptions, data: Data) -> dict[str, Any]:
    """Return the options, the data and the metric that must not change when a run is resumed."""
    fixed = {name: value for name, value in options.as_plain().items() if name not in FREE_OPTIONS}
    labelled = [crops.fingerprint for crops in (data.gallery, data.queries) if crops is not None]
    chosen_by = "knn_class" if data.gallery else "retrieval"
    return {**fixed, "data": data.fingerprint, "labelled": labelled or None, "chosen_by": chosen_by}


def start_or_resume(job: Job, state: State, payload: dict[str, Any] | None) -> None:
    """Evaluate the initial weights of a fresh run, or restore a checkpoint, and give up what is later than it.

    With --resume PATH, checkpoints of later steps are set aside; records of later steps leave the history. Raises UserError if the
    checkpoint does not fit.
    """
    run, options = job.run, job.options
    if payload is not None:
        try:
            state.restore(payload)
        except (ValueError, KeyError, RuntimeError) as error:  # from torch, e.g. parameter groups of an older version
            problem = f"the checkpoint cannot be restored: {lct.printable(str(error))[:200]}"
            raise lct.UserError(problem, options.describe("output_dir"), lct.RESTORE_OR_OVERWRITE) from error
    best_path, last_path = (
        options.output_dir / name for name in (options.checkpoint_best_name, options.checkpoint_last_name)
    )
    if options.resume not in (None, "last"):
        point = lct.ResumePoint(Path(options.resume), payload)
        lct.set_aside_later((best_path, last_path), point, run.log, CHECKPOINT_FORM)
        save_last(job, state)  # at once, since without it a restart would begin anew
    step = state.step
    epoch = -1 if payload is None else state.epoch  # a fresh start measures the initial weights, epoch 0, again
    kinds = ("iteration", "epoch_end", "best", "start_end")
    run.forget(lambda r: r["event"] in kinds and (r["step"] > step or r["epoch"] > epoch + (r["event"] == "iteration")))
    if payload is not None:
        run.event("resumed", epoch=state.epoch, step=state.step)
        if state.best and not best_path.exists():  # --resume names another folder, or the file was deleted
            save_best(job, state, evaluate(job, state)[state.best["metric"]])
        save_last(job, state)  # after a kill, artifacts.json may be out of date
        run.log(f"resumed at {lct.describe_position(state.epoch, state.batches)}")
        return
    without_network = {"pixels": measures.pixel_features, "colours": measures.colour_features}
    baselines = score_knn(job.data, lambda images: {name: f(images) for name, f in without_network.items()})
    state.start = evaluate(job, state) | baselines
    run.event("run_start", epoch=0, step=0, algorithm=job.options.algorithm, chosen_by=job.identity["chosen_by"])
    run.event("start_end", epoch=0, step=0, **state.start)
    run.log(describe_start(state.start))


def describe_start(start: dict[str, float]) -> str:
    """Return the log text of the figures before training; with labelled crops it includes pixels and colours."""
    text = f"initial weights: retrieval {start['retrieval']:.3f}"
    if "knn_pixels" in start:
        text += f", k-NN class token {start['knn_class']:.3f}, mean patch {start['knn_patch']:.3f}"
        text += f"; {measures.PIXEL_SIDE}-px pixels {start['knn_pixels']:.3f}"
        text += f", colour histograms {start['knn_colours']:.3f}"
    return text
