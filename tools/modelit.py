#!/usr/bin/env python3
"""Text to 3D shapes: a conditional VAE-GAN over voxels learns from meshes and turns a prompt into a mesh.

    python tools/modelit.py --mode train --dataset toy --epochs 60 --voxel_size 16 --text_encoder hash
    python tools/modelit.py --mode generate --prompt "3d model of a chair" --output chair.obj --preview chair.png
    python tools/modelit.py --mode analyze --prompts prompts.txt

Training saves its state to --checkpoint after every epoch. The same command resumes it; on the CPU the result is bit for bit that
of an uninterrupted run. The checkpoint holds the architecture and the name of the text encoder, so generate needs no other flags.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct  # before torch: sets environment variables that torch reads at import

# isort: split
import numpy as np
import torch
from dataset_loader import Shapes, load_shapes
from meshes import (
    MeshError,
    draw_curves,
    draw_matrix,
    draw_mesh,
    draw_points,
    draw_sheet,
    draw_voxels,
    encode_mesh,
    encode_png,
    extract_surface,
)
from PIL import Image
from torch import nn
from torch.nn import functional as F
from voxel_gan import (
    ARCHITECTURE,
    CLIP_MODEL,
    ENCODER_NAMES,
    CVAE_Conditional,
    TrainState,
    compute_iou,
    embed_prompts,
    fits_architecture,
    kl_divergence,
    make_latents,
    restore_state,
    score_baselines,
    start_state,
    take_step,
)

CHECKPOINT_FORM = {
    "epoch": int,
    "run": str,
    "class_names": (list, tuple),
    "architecture": dict.fromkeys(ARCHITECTURE, (int, float, bool)),
    "identity": dict,
    "text": {"encoder": str, "pretrained": str},
    "optimizers": [dict],
    "scalers": [dict],
    "model": {str: torch.Tensor},
    "discriminator": {str: torch.Tensor},
}
# Prompts for a class name in training; a prompt for `generate` may be worded differently.
TEMPLATES = ("a {}", "a 3d model of a {}", "3d model of a {}", "{}", "generate a {}")
GOOD_IOU, BAD_IOU = 0.7, 0.5  # verdicts: "good" at the first or above, "bad" at the second or below
COLLAPSED_KL = 0.01  # nats per latent dimension; below it the decoder learns nothing from z
LAST_LR = 0.02  # where the cosine schedule ends, as a fraction of --lr
JUDGED_SAMPLES = 64  # drawn from the prior at the end of training; more if there are more classes
JUDGED_REFERENCES = 2000  # training shapes, at most, that the samples are compared with
MESH_KINDS = ("obj", "ply", "stl", "glb")
CURVES = {
    "reconstruction": ("recon",),
    "other losses": ("kl", "adv"),
    "IoU": ("iou", "val_iou", "class_mean", "mean_shape"),
    "discriminator": ("disc_real_acc", "disc_fake_acc"),
}
SHEET_CLASSES = 6
SHEET_SAMPLES = 3
SHEET_SIDE = 120  # px per picture
PREVIEW_SIDE = 300  # px per picture
SHEETS = 3  # per run, evenly spaced, the last at the end
SIGMA = 0.5  # voxels; from 0.6 on, a rod one voxel thick vanishes


@dataclass(frozen=True)
class ModelitOptions(lct.Options):
    """Learn shapes from meshes, and make meshes of words."""

    # fmt: off
    mode: str = lct.option("train", "what is done", "run", choices=("train", "generate", "analyze"))
    dataset: tuple[str, ...] = lct.option(("testdataset",),
        "folders of meshes, with class folders or <class>/{train,test}, or known names: toy modelnet10 modelnet40 chairs tables",
        "data", metavar="NAME", nargs="+")
    download_path: Path = lct.option(Path("datasets"), "folder that known data sets and voxels are kept in",
        "data", metavar="DIR")
    max_samples: int = lct.option(0, "meshes that are used, evenly from all classes; 0 = all", "data", low=0)
    val_split: float = lct.option(0.2, "share that is held out, where there are no folders named test", "data",
        low=0.0, high=0.9, fixed=True)
    voxel_size: int = lct.option(64, "side of the grid", "data", low=4, high=512, fixed=True)
    voxel_mode: str = lct.option("surface", "voxels that the surface passes through, or what it encloses too", "data",
        choices=("surface", "solid"), fixed=True)
    num_workers: int = lct.option(0, "processes that voxelise; 0 = this one", "data", low=0, high=256)

    text_encoder: str = lct.option("openclip", "openclip knows meanings; hash knows letters only, for tests and offline use",
        "text", choices=("openclip", "hash"), fixed=True)
    clip_pretrained: str = lct.option("laion2b_s34b_b79k", f"weights of {CLIP_MODEL}: a file, or a name that open_clip fetches",
        "text", metavar="FILE|NAME", fixed=True)
    cond_dim: int = lct.option(512, "numbers of a prompt's embedding", "text", low=8, high=4096, fixed=True)

    latent_dim: int = lct.option(128, "numbers of z", "model", low=1, high=4096, fixed=True)
    hidden_channels: int = lct.option(32, "channels of the first layer; twice as many in each further one, up to eight times",
        "model", low=1, high=1024, fixed=True)
    num_encoder_layers: int = lct.option(4, "layers that halve the grid", "model", low=1, high=9, fixed=True)
    num_decoder_layers: int = lct.option(4, "layers that double it", "model", low=1, high=9, fixed=True)
    use_batch_norm: bool = lct.option(False, "BatchNorm after each layer", "model", fixed=True)
    dropout_rate: float = lct.option(0.0, "share of the channels that is dropped", "model", low=0.0, high=0.9, fixed=True)
    disc_hidden_channels: int = lct.option(32, "channels of the discriminator's first layer", "model", low=1, high=1024, fixed=True)
    disc_num_layers: int = lct.option(4, "its layers", "model", low=1, high=9, fixed=True)

    epochs: int = lct.option(50, "passes over the meshes", "training", low=1)
    batch_size: int = lct.option(8, "shapes a step", "training", low=1, high=65536, fixed=True)
    lr: float = lct.option(5e-3, "learning rate of the generator at first; falls along a cosine; the discriminator has a tenth",
        "training", low=0.0, high=1.0, fixed=True)
    recon_weight: float = lct.option(10.0, "weight of the reconstruction", "training", low=0.0, high=1e6, fixed=True)
    pos_weight: float = lct.option(1.0, "weight of filled voxels against empty ones", "training", low=0.01, high=1e4, fixed=True)
    kl_weight: float = lct.option(0.01, "weight of KL, which is counted in nats a latent dimension", "training",
        low=0.0, high=1e4, fixed=True)
    kl_warmup_epochs: int = lct.option(10, "epochs until KL has its weight", "training", low=0, high=100000, fixed=True)
    lambda_adv: float = lct.option(0.001, "weight of the adversarial loss", "training", low=0.0, high=1e4, fixed=True)
    g_steps: int = lct.option(2, "steps of the generator to one of the discriminator", "training", low=1, high=1000, fixed=True)
    cond_dropout: float = lct.option(0.1, "share of the shapes that are learned without a prompt", "training",
        low=0.0, high=1.0, fixed=True)
    seed: int = lct.same_option("seed")

    prompt: str | None = lct.option(None, "what to make; left out: any shape", "generate", metavar="TEXT")
    prompts: Path | None = lct.option(None, "file with a prompt a line", "generate", metavar="FILE", file=True)
    output: Path = lct.option(Path("model.obj"), "mesh; several get _001 and so on", "generate", metavar="FILE")
    format: str | None = lct.option(None, "kind of mesh, whose ending --output gets (default: by the name of --output)", "generate",
        choices=MESH_KINDS)
    num_samples: int = lct.option(1, "shapes a prompt", "generate", low=1, high=100000)
    latent_seed: int = lct.option(0, "of z: the same for every prompt", "generate", low=0)
    z: Path | None = lct.option(None, "z from a .npy file, (latent_dim,) or (num_samples, latent_dim)",
        "generate", metavar="FILE", file=True)
    level: float = lct.option(0.5, "probability at which the surface lies", "generate", low=0.0, high=1.0)
    sigma: float = lct.option(SIGMA, "gaussian filter, in voxels; 0 = none", "generate", low=0.0, high=10.0)
    guidance: float = lct.option(1.0, "how far beyond the shape without prompt; 1 = as learned", "generate", low=0.0, high=100.0)
    preview: Path | None = lct.option(None, "picture of the meshes", "generate", metavar="PNG")
    show: bool = lct.option(False, "open the pictures in a window", "generate")

    checkpoint: Path = lct.option(Path("vae_gan_test.pth"), "where training keeps its state, and generate finds it", "run",
        metavar="FILE")
    out_dir: Path = lct.option(Path("rez"), "folder of the runs, their verdicts, and analyses", "run", metavar="DIR")
    resume: bool = lct.option(False, "only go on with --checkpoint, which a run does anyhow where there is one", "run")
    overwrite: bool = lct.option(False, "start afresh; the old checkpoint is moved aside", "run")
    device: str = lct.option("auto", "auto = a GPU if there is one", "machine", choices=("auto", "cpu", "gpu"))
    parallel: bool = lct.option(False, "spread each batch over all GPUs", "machine")
    amp: bool = lct.option(False, "half precision on the GPU", "machine", fixed=True)
    debug: bool = lct.same_option("debug")
    # fmt: on

    @property
    def starts_anew(self) -> bool:
        """Whether an interrupted command starts again: training alone continues."""
        return self.mode != "train"


def check_options(options: ModelitOptions) -> None:
    """Check the options before anything is read.

    Raises UserError if the layers cannot halve the grid, options contradict each other, or a file is missing.
    """
    if options.prompt is not None and options.prompts is not None:
        raise lct.UserError("contradict each other", "--prompt, --prompts", "give one of them")
    if options.resume and options.overwrite:
        raise lct.UserError("contradict each other", "--resume, --overwrite", "give one of them")
    if options.checkpoint.exists() and not options.checkpoint.is_file():
        raise lct.UserError("is not a file", options.describe("checkpoint"), "give another")
    for name in ("num_encoder_layers", "num_decoder_layers", "disc_num_layers"):
        num_layers = getattr(options, name)
        divisor = 2**num_layers
        if options.mode == "train" and options.voxel_size % divisor:
            lower = options.voxel_size // divisor * divisor
            sizes = " or ".join(str(size) for size in (lower, lower + divisor) if size)
            max_layers = (options.voxel_size & -options.voxel_size).bit_length() - 1
            remedy = f"give --voxel_size {sizes}" + (f", or --{name} {max_layers} or fewer" if max_layers else "")
            problem = f"{num_layers} layers cannot halve {options.voxel_size} evenly"
            raise lct.UserError(problem, f"--{name} {num_layers}", remedy)


def choose_runtime(options: ModelitOptions) -> lct.Runtime:
    """Return the device and precision to compute with; if --device gpu finds no GPU, say so and use the CPU."""
    available = torch.cuda.device_count()
    if options.device == "gpu" and not available:
        lct.show("--device gpu: there is none; it goes on with the CPU")
    gpus = 0 if options.device == "cpu" else available if options.parallel else min(available, 1)
    return lct.make_runtime(gpus, "auto" if options.amp else "fp32")


# --- prompts


def read_prompts(options: ModelitOptions) -> list[str]:
    """Return the prompts of --prompts or --prompt, [] without either. Raises UserError if the file holds none."""
    if options.prompts is None:
        return [options.prompt] if options.prompt and options.prompt.strip() else []
    lines = options.prompts.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise lct.UserError("holds no prompt", options.describe("prompts"), "write one a line")
    return prompts


# --- training


@dataclass(frozen=True)
class Job:
    """Everything that stays the same during training."""

    options: ModelitOptions
    runtime: lct.Runtime
    shapes: Shapes
    prompts: torch.Tensor  # float32 (num_classes, len(TEMPLATES), cond_dim)
    baselines: dict[str, float]
    run: lct.RunDirectory
    folder: Path  # of the run
    identity: dict[str, Any]

    def save(self, state: TrainState) -> None:
        """Write the state to --checkpoint."""
        options = self.options
        payload = {
            "epoch": state.epoch,
            "batches": 0,
            "architecture": {name: getattr(options, name) for name in ARCHITECTURE},
            "identity": self.identity,
            "run": self.folder.name,
            "class_names": self.shapes.class_names,
            "text": describe_encoder(options),
            "model": state.model.state_dict(),
            "discriminator": state.discriminator.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
            "scalers": [scaler.state_dict() for scaler in state.scalers],
        }
        lct.write_checkpoint(options.checkpoint, payload)


def train(options: ModelitOptions) -> None:
    """Train or resume a run; when it ends or is interrupted, copy its folder to the one of its verdict."""
    payload = None
    if options.resume or (options.checkpoint.exists() and not options.overwrite):
        payload = read_state(options.checkpoint, "give another --checkpoint, or start afresh with --overwrite")
    # Else two runs, which have folders of their own, would save to one checkpoint in turns.
    with lct.lock_directory(options.checkpoint.with_name(f".{options.checkpoint.name}.lock"), "--checkpoint"):
        start_or_resume(options, payload)


def start_or_resume(options: ModelitOptions, payload: dict[str, Any] | None) -> None:
    """Train the run of `payload` to its end, or a new run; the caller holds the lock of --checkpoint."""
    runtime = choose_runtime(options)
    shapes, problems = load_shapes(options, lct.show)
    num_layers = max(options.num_encoder_layers, options.disc_num_layers)
    num_shapes = np.count_nonzero(~shapes.held_out)
    if options.use_batch_norm and options.voxel_size == 2**num_layers and 1 in (num_shapes, options.batch_size):
        where = f"{options.describe('batch_size')}, with {lct.count_of(num_shapes, 'shape')} to train on"
        problem = "BatchNorm after a layer that leaves one voxel needs two shapes a step"
        raise lct.UserError(problem, where, "give more, or --no-use_batch_norm")
    plain = options.as_plain()
    fixed = [field.name for field in lct.option_fields(type(options)) if field.metadata.get("fixed")]
    identity = {name: plain[name] for name in fixed} | {"class_names": shapes.class_names}
    identity["data"] = lct.fingerprint(shapes.packed, shapes.labels, shapes.held_out)
    if payload is not None:
        lct.check_identity(options.checkpoint, payload["identity"], identity, elsewhere="give another --checkpoint")
    texts = [template.format(name.replace("_", " ")) for name in shapes.class_names for template in TEMPLATES]
    prompts = torch.from_numpy(embed_prompts(texts, describe_encoder(options), options.cond_dim))
    prompts = prompts.reshape(len(shapes.class_names), len(TEMPLATES), -1)
    folder = options.out_dir / (payload["run"] if payload else time.strftime("run_%Y-%m-%d_%H-%M-%S"))
    while payload is None and folder.exists():  # a run that began in the same second
        folder = folder.with_name(f"{folder.name}_")
    try:
        with lct.RunDirectory(folder / "logs") as run:
            (folder / "weights").mkdir(exist_ok=True)
            config = {"options": plain, "identity": identity, "device": runtime.describe()}
            lct.write_json(run.path / "config.json", config)
            lct.write_json(run.path / "problems.json", [{"path": path, "reason": reason} for path, reason in problems])
            baselines = score_baselines(shapes, options.voxel_size)
            train_run(Job(options, runtime, shapes, prompts, baselines, run, folder, identity), payload)
    except lct.Interrupted:
        copy_to_verdict(options, folder)
        raise
    copy_to_verdict(options, folder)


def read_state(path: Path, remedy: str) -> dict[str, Any]:
    """Read a checkpoint. Raises UserError, with `remedy`, if it is missing, damaged, or not of this program."""
    where = f"--checkpoint {path}"
    if not path.exists():
        raise lct.UserError("does not exist", where, remedy)
    try:
        payload = lct.load_checkpoint(path, CHECKPOINT_FORM)
    except lct.UserError as error:
        raise lct.UserError(error.what, where, remedy) from error
    if payload["text"]["encoder"] not in ENCODER_NAMES or not fits_architecture(payload):
        raise lct.UserError("holds other weights than it says, or a text encoder that is not known", where, remedy)
    return payload


def describe_encoder(options: ModelitOptions) -> dict[str, Any]:
    """Return the text encoder as a checkpoint stores it."""
    return {"encoder": options.text_encoder, "pretrained": options.clip_pretrained}


def train_run(job: Job, payload: dict[str, Any] | None) -> None:
    """Train a run to its end, resuming from `payload` if it is not None, and judge its samples."""
    options = job.options
    shapes = job.shapes
    state = start_state(options, job.runtime)
    if payload is not None:
        restore_state(state, payload)
        job.run.forget_epochs_after(state.epoch)
        job.run.event("resumed", epoch=state.epoch)
        job.run.log(f"goes on after epoch {state.epoch} of {options.checkpoint}")
    else:
        if options.checkpoint.exists():
            options.checkpoint.rename(lct.name_aside(options.checkpoint, "old"))
        job.save(state)  # a run killed in its first epoch then resumes in the same folder
        job.run.event("run_start", seed=options.seed, classes=shapes.class_names)
    counts = f"{(~shapes.held_out).sum():,} shapes train, {shapes.held_out.sum():,} are held out"
    classes = ", ".join(shapes.class_names[:8]) + (" ..." if len(shapes.class_names) > 8 else "")
    job.run.log(f"{counts}; {lct.count_of(len(shapes.class_names), 'class')}: {classes}")
    job.run.log(f"on {job.runtime.describe()}; text encoder: {ENCODER_NAMES[options.text_encoder]}")
    fit(job, state)
    write_pictures(job, state)
    metrics = judge_samples(job, state)
    job.run.event("samples_end", epoch=state.epoch, **metrics)
    means = f"mean shape {job.baselines['mean_shape']:.3f}, class mean {job.baselines['class_mean']:.3f}"
    kind = "held-out" if shapes.held_out.any() else "training (nothing is held out)"
    job.run.log(f"{kind} IoU without learning: {means}")
    job.run.log(
        f"{metrics['samples']} samples from the prior: {metrics['adherence']:.0%} are nearest to a shape of their prompt's class"
        f" (IoU {metrics['nearest_iou']:.2f}), {metrics['closed']:.0%} give a watertight mesh"
    )


def fit(job: Job, state: TrainState) -> None:
    """Train the remaining epochs and record each. Raises Diverged if a loss is not finite; that epoch is not saved."""
    options = job.options
    sheet_epochs = {round(options.epochs * number / SHEETS) for number in range(1, SHEETS)}
    while state.epoch < options.epochs:
        started = time.monotonic()
        metrics = train_epoch(job, state)
        if not all(map(math.isfinite, metrics.values())):
            problem = f"the loss is not finite in epoch {state.epoch + 1}"
            saved = f"{options.checkpoint} is as it was after epoch {state.epoch}"
            raise lct.Diverged(f"{problem}; {saved}; lower --lr, or give --use_batch_norm")
        metrics["val_iou"] = score_held_out(job, state)
        state.epoch += 1
        seconds = time.monotonic() - started
        with lct.SIGNALS.hold():
            job.run.event("epoch_end", epoch=state.epoch, **metrics, **job.baselines, seconds=seconds)
            job.save(state)
        names = ("recon", "kl", "adv", "disc_real_acc", "disc_fake_acc", "iou", "val_iou")
        summary = "  ".join(f"{name} {metrics[name]:.3f}" for name in names if name in metrics)
        job.run.log(f"epoch {state.epoch:4}  {summary}  {seconds:.1f} s")
        if metrics["kl"] < COLLAPSED_KL and state.epoch > options.kl_warmup_epochs:
            remedy = f"lower --kl_weight {options.kl_weight:g}, or raise --kl_warmup_epochs {options.kl_warmup_epochs}"
            job.run.log(
                f"warning: the posterior has collapsed (KL {metrics['kl']:.4f}): all z give the same shape; {remedy}"
            )
        if state.epoch in sheet_epochs:
            write_pictures(job, state)


def train_epoch(job: Job, state: TrainState) -> dict[str, float]:
    """Train one epoch; return the means of its metrics over the steps. All randomness is a function of the seed and the epoch."""
    options = job.options
    device = job.runtime.device
    lct.seed_torch(options.seed, 1, state.epoch)
    state.model.train()
    state.discriminator.train()
    model = state.model
    if job.runtime.num_gpus > 1:
        model = nn.DataParallel(state.model, list(range(job.runtime.num_gpus)))
    rows = np.flatnonzero(~job.shapes.held_out)
    rows = rows[torch.randperm(len(rows)).numpy()]
    borders = lct.batch_borders(len(rows), options.batch_size)
    autocast = functools.partial(
        torch.autocast, device.type, dtype=job.runtime.dtype, enabled=job.runtime.dtype != torch.float32
    )
    # With the cosine decay the IoU of the toy set reaches .93; at a constant learning rate it stays at .87.
    factor = LAST_LR + (1 - LAST_LR) * (1 + math.cos(math.pi * state.epoch / options.epochs)) / 2
    for optimizer in state.optimizers:
        lct.set_learning_rate(optimizer, factor)
    kl_warmup = min(1.0, (state.epoch + 1) / (options.kl_warmup_epochs + 1))
    pos_weight = torch.tensor(options.pos_weight, device=device)
    totals: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()
    for step, (start, end) in enumerate(lct.progress(itertools.pairwise(borders), len(borders) - 1, "training")):
        lct.SIGNALS.check()
        batch = rows[start:end]
        voxels = lct.send(torch.from_numpy(job.shapes.grids(batch, options.voxel_size)), device)
        labels = torch.from_numpy(job.shapes.labels[batch])
        prompts = lct.send(job.prompts[labels, torch.randint(len(TEMPLATES), (len(batch),))], device)
        has_prompt = lct.send(torch.rand(len(batch)) >= options.cond_dropout, device)
        with autocast():
            logits, mean, log_variance = model(voxels, prompts, has_prompt)
        logits = logits.float()
        fakes = logits.sigmoid()
        # Detached: the condition for no prompt learns through the generator alone.
        condition = state.model.make_condition(prompts, has_prompt).detach()
        with autocast():
            fake_scores = state.discriminator(fakes, condition)
        metrics = {
            "recon": F.binary_cross_entropy_with_logits(logits, voxels, pos_weight=pos_weight),
            "kl": kl_divergence(mean, log_variance),
            "adv": F.softplus(-fake_scores.float()).mean(),  # -log D(fake)
        }
        loss = options.recon_weight * metrics["recon"] + kl_warmup * options.kl_weight * metrics["kl"]
        take_step(state, 0, loss + options.lambda_adv * metrics["adv"])
        metrics["iou"] = compute_iou(fakes.detach(), voxels).mean()
        if step % options.g_steps == 0:
            with autocast():
                real_scores = state.discriminator(voxels, condition)
                fake_scores = state.discriminator(fakes.detach(), condition)
            metrics["disc"] = (F.softplus(-real_scores.float()) + F.softplus(fake_scores.float())).mean()
            take_step(state, 1, metrics["disc"])
            metrics["disc_real_acc"] = (real_scores > 0).float().mean()
            metrics["disc_fake_acc"] = (fake_scores < 0).float().mean()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value.detach()
            counts[name] += 1
    return {name: (total / counts[name]).item() for name, total in totals.items()}


@torch.inference_mode()
def score_held_out(job: Job, state: TrainState) -> float:
    """Return the mean IoU of held-out shapes with their reconstructions from the mean of z; NaN if none is held out."""
    state.model.eval()
    rows = np.flatnonzero(job.shapes.held_out)
    ious = []
    for start in range(0, len(rows), job.options.batch_size):
        batch = rows[start : start + job.options.batch_size]
        voxels = torch.from_numpy(job.shapes.grids(batch, job.options.voxel_size)).to(job.runtime.device)
        prompts = job.prompts[torch.from_numpy(job.shapes.labels[batch]), 0].to(job.runtime.device)
        ious.append(compute_iou(state.model.reconstruct(voxels, prompts), voxels))
    return torch.cat(ious).mean().item() if ious else math.nan


@torch.inference_mode()
def write_pictures(job: Job, state: TrainState) -> None:
    """Write the curves, and a sheet with a held-out shape of each class, its reconstruction, and samples of the class."""
    epochs = [event for event in lct.read_events(job.run.path) if event["event"] == "epoch_end"]
    panels = {title: {name: [epoch.get(name) for epoch in epochs] for name in names} for title, names in CURVES.items()}
    lct.write_bytes(job.run.path / "curves.png", encode_png(draw_curves(panels)))
    device = job.runtime.device
    state.model.eval()
    generator = torch.Generator().manual_seed(job.options.seed)
    z = torch.randn(SHEET_SAMPLES, job.options.latent_dim, generator=generator).to(device)
    rows = []
    for label, name in enumerate(job.shapes.class_names[:SHEET_CLASSES]):
        in_class = job.shapes.labels == label
        held_out = np.flatnonzero(in_class & job.shapes.held_out)
        example = (held_out if len(held_out) else np.flatnonzero(in_class))[:1]
        voxels = job.shapes.grids(example, job.options.voxel_size)
        prompt = job.prompts[label, :1].to(device)
        reconstruction = state.model.reconstruct(torch.from_numpy(voxels).to(device), prompt).cpu().numpy()
        samples = state.model.generate(z, prompt.expand(SHEET_SAMPLES, -1)).cpu().numpy()
        grids = [voxels[0, 0], reconstruction[0, 0], *samples[:, 0]]
        captions = [f"{name}, held out" if len(held_out) else name, "reconstructed"] + ["sample"] * SHEET_SAMPLES
        with lct.SIGNALS.hold():  # trimesh swallows exceptions of any kind
            pictures = [draw_voxels(grid, SIGMA, SHEET_SIDE) for grid in grids]
        rows.append(list(zip(captions, pictures, strict=True)))
    sheet = encode_png(draw_sheet(rows, SHEET_SIDE))
    lct.write_bytes(job.run.path / f"samples_ep{state.epoch:04}.png", sheet)


@torch.inference_mode()
def judge_samples(job: Job, state: TrainState) -> dict[str, float]:
    """Judge samples that are generated from the prior, in turn for the prompt of each class.

    Returns the number of `samples`; `adherence`, the fraction whose nearest training shape by IoU has the prompted class;
    `nearest_iou`, their mean IoU with that shape; and `closed`, the fraction whose mesh is watertight and not empty.
    """
    options = job.options
    state.model.eval()
    generator = torch.Generator().manual_seed(options.seed)
    num_classes = len(job.shapes.class_names)
    train_rows = np.flatnonzero(~job.shapes.held_out)
    train_rows = np.random.default_rng(options.seed).permutation(train_rows)[:JUDGED_REFERENCES]
    labels = np.arange(max(JUDGED_SAMPLES, num_classes)) % num_classes
    grids = []
    is_closed = []
    for label in labels:
        z = torch.randn(1, options.latent_dim, generator=generator).to(job.runtime.device)
        probabilities = state.model.generate(z, job.prompts[label, :1].to(job.runtime.device)).cpu()
        grids.append((probabilities >= 0.5).flatten())
        try:
            with lct.SIGNALS.hold():  # trimesh swallows exceptions of any kind
                _, warning = extract_surface(probabilities[0, 0].numpy(), 0.5, SIGMA)
            is_closed.append(not warning)  # a warning: no voxel reaches the level
        except MeshError:
            is_closed.append(False)
    samples = torch.stack(grids).float()
    ious = []
    for start in range(0, len(train_rows), 64):  # in blocks: 2,000 grids of 128^3 take 16 GB
        references = torch.from_numpy(job.shapes.grids(train_rows[start : start + 64], options.voxel_size)).flatten(1)
        intersection = references @ samples.T
        ious.append(intersection / (references.sum(dim=1, keepdim=True) + samples.sum(dim=1) - intersection))
    nearest = torch.cat(ious).max(dim=0)  # over training shapes
    is_adherent = job.shapes.labels[train_rows[nearest.indices.numpy()]] == labels
    means = {"adherence": is_adherent.mean(), "closed": np.mean(is_closed), "nearest_iou": nearest.values.mean()}
    return {"samples": len(labels), **{name: float(value) for name, value in means.items()}}


def copy_to_verdict(options: ModelitOptions, folder: Path) -> None:
    """Copy the folder of a run, with its weights, to good/, neutral/ or bad/ in --out_dir, if an epoch is finished."""
    epochs = [event for event in lct.read_events(folder / "logs") if event["event"] == "epoch_end"]
    if not epochs:
        return
    name = "val_iou" if epochs[-1]["val_iou"] is not None else "iou"
    iou = epochs[-1][name]
    verdict = "good" if iou >= GOOD_IOU else "bad" if iou <= BAD_IOU else "neutral"
    target = options.out_dir / verdict / folder.name
    with lct.SIGNALS.hold():
        lct.copy_checkpoint(options.checkpoint, folder / "weights" / options.checkpoint.name)
        temporary = target.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(".*"))
        except shutil.Error as error:  # lists (source, target, reason), without errno
            raise lct.write_error(target, OSError(error.args[0][0][2]), 0) from error
        for old_verdict in ("good", "neutral", "bad"):
            shutil.rmtree(options.out_dir / old_verdict / folder.name, ignore_errors=True)
        temporary.rename(target)
    kind = "held-out" if name == "val_iou" else "training (nothing is held out)"
    lct.show(f"{verdict}: {kind} IoU {iou:.3f}; {target}")


# --- generate


def generate(options: ModelitOptions) -> None:
    """Write a mesh for each prompt and z. Raises UserError for an unknown file type, an empty shape, or an open surface."""
    if options.preview is not None and options.preview.suffix.lower() != ".png":
        raise lct.UserError("is no PNG", options.describe("preview"), "end it in .png")
    if options.output.is_dir():
        raise lct.UserError("is a folder", options.describe("output"), "give the name of a file in it")
    kind = options.format or options.output.suffix.lower().removeprefix(".")
    if kind not in MESH_KINDS:
        raise lct.UserError("is no kind of mesh", options.describe("output"), f"end it in .{', .'.join(MESH_KINDS)}")
    runtime = choose_runtime(options)
    model, payload = load_generator(options, runtime)
    prompts = read_prompts(options)
    vectors: list[torch.Tensor | None] = [None]
    encoder = payload["text"]["encoder"]
    if prompts:
        vectors = list(torch.from_numpy(embed_prompts(prompts, payload["text"], payload["architecture"]["cond_dim"])))
    z = make_latents(options, payload["architecture"]["latent_dim"])
    pairs = list(itertools.product(range(len(vectors)), range(len(z))))
    numbers = [f"_{number:03}" if len(pairs) > 1 else "" for number in range(1, len(pairs) + 1)]
    suffix = options.output.suffix
    is_kind = suffix.lower().removeprefix(".") in MESH_KINDS
    stem = options.output.stem if is_kind else options.output.name  # "guidance_1.5" ends in no kind of mesh
    ending = suffix if suffix.lower() == f".{kind}" else f".{kind}"
    paths = [options.output.with_name(f"{stem}{number}{ending}") for number in numbers]
    for path in paths:
        lct.check_replaceable(path, f"--output {path}")
    if options.preview is not None:
        lct.check_replaceable(options.preview, f"--preview {options.preview}")
    lct.create_out_dir(options.output.parent, "--output")
    captioned_meshes = []
    for path, (row, sample) in zip(paths, pairs, strict=True):
        caption = prompts[row] if prompts else "no prompt"
        vector = vectors[row]
        with torch.inference_mode():
            condition = None if vector is None else vector[None].to(runtime.device)
            probabilities = model.generate(z[sample : sample + 1].to(runtime.device), condition, options.guidance)
        prompt = f"prompt: {caption}" if prompts else "no prompt"
        latent = f"z from {options.z}" if options.z else f"latent_seed {options.latent_seed}"
        comments = [
            prompt,
            f"{latent}, sample {sample}",
            f"by {options.checkpoint}, text encoder: {ENCODER_NAMES[encoder]}",
        ]
        try:
            with lct.SIGNALS.hold():  # trimesh swallows exceptions of any kind
                mesh, warning = extract_surface(probabilities[0, 0].cpu().numpy(), options.level, options.sigma)
                content = encode_mesh(mesh, kind, comments)
        except MeshError as error:
            remedy = "train longer, or take another --latent_seed, --prompt or --guidance"
            raise lct.UserError(str(error), f"{prompt}, sample {sample}", remedy) from error
        lct.write_bytes(path, content)
        if warning:
            lct.show(f"warning: {path}: {warning}")
        lct.show(f"{path}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces, watertight; {prompt}")
        captioned_meshes.append((caption, mesh))
    if encoder == "hash" and prompts:
        lct.show(f"text encoder: {ENCODER_NAMES['hash']}")
    if options.preview or options.show:
        columns = len(z) if len(z) > 1 and prompts else 4
        pictures = [(caption, draw_mesh(mesh, PREVIEW_SIDE)) for caption, mesh in captioned_meshes]
        rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
        save_picture(options, options.preview, draw_sheet(rows, PREVIEW_SIDE))


def load_generator(options: ModelitOptions, runtime: lct.Runtime) -> tuple[CVAE_Conditional, dict[str, Any]]:
    """Return the trained generator and its checkpoint.

    Raises UserError if there is no checkpoint, or if a given option names another architecture or text encoder.
    """
    payload = read_state(options.checkpoint, "train first: --mode train, or name another --checkpoint")
    for name, trained in (*payload["architecture"].items(), ("text_encoder", payload["text"]["encoder"])):
        if name in options.origins and getattr(options, name) != trained:
            raise lct.UserError(
                f"{options.checkpoint} was trained with {trained}", options.describe(name), "leave it out"
            )
    if "clip_pretrained" in options.origins:  # the same weights at another place
        payload["text"]["pretrained"] = options.clip_pretrained
    model = CVAE_Conditional(payload["architecture"])
    model.load_state_dict(payload["model"])
    return model.to(runtime.device).eval(), payload


def save_picture(options: ModelitOptions, path: Path | None, picture: Image.Image) -> None:
    """Write a picture if `path` is not None, and open it in a window with --show."""
    if path is not None:
        lct.create_out_dir(path.parent, "--preview")
        lct.write_bytes(path, encode_png(picture))
        lct.show(f"{path}")
    if options.show:
        picture.show()


# --- analyze


def main(argv: Sequence[str] | None = None) -> int:
    """Train, generate or analyze, as the command line says; return the exit code."""
    return lct.run_program("modelit", ModelitOptions, run_mode, argv)


def run_mode(options: ModelitOptions) -> None:
    """Run the mode of --mode."""
    check_options(options)
    {"train": train, "generate": generate, "analyze": analyze}[options.mode](options)


def analyze(options: ModelitOptions) -> None:
    """Write the embeddings of prompts, their cosines, and their first two principal components."""
    prompts = read_prompts(options)
    if options.checkpoint.exists() or "checkpoint" in options.origins:
        payload = read_state(options.checkpoint, "name another --checkpoint")
        text = payload["text"]
        trained = {"text_encoder": text["encoder"], "clip_pretrained": text["pretrained"]}
        trained["cond_dim"] = payload["architecture"]["cond_dim"]
        untyped = {name: value for name, value in trained.items() if name not in options.origins}
        options = dataclasses.replace(options, **untyped)
        prompts = prompts or [TEMPLATES[2].format(name.replace("_", " ")) for name in payload["class_names"]]
    if len(prompts) < 2:
        problem = f"needs two prompts to compare, not {len(prompts)}"
        raise lct.UserError(problem, "--prompts", "give a file with several, one a line")
    vectors = embed_prompts(prompts, describe_encoder(options), options.cond_dim).astype(np.float64)
    cosines = vectors @ vectors.T
    centred = vectors - vectors.mean(axis=0)
    _, singular_values, axes = np.linalg.svd(centred, full_matrices=False)
    # The sign of an axis is arbitrary; its largest entry is made positive, so that the same prompts give the same picture.
    axes = axes[:2] * np.sign(np.take_along_axis(axes[:2], np.abs(axes[:2]).argmax(axis=1)[:, None], axis=1))
    points = centred @ axes.T
    explained = (singular_values[:2] ** 2).sum() / max((singular_values**2).sum(), 1e-12)
    folder = options.out_dir / "analysis"
    lct.create_out_dir(folder)
    tables = {
        "embeddings": (vectors, range(options.cond_dim)),
        "cosine": (cosines, prompts),
        "pca": (points, ("x", "y")),
    }
    for name, (values, columns) in tables.items():
        text_file = io.StringIO()
        writer = csv.writer(text_file, lineterminator="\n")
        writer.writerow(["prompt", *columns])
        writer.writerows(
            [prompt, *(f"{value:.6f}" for value in row)] for prompt, row in zip(prompts, values, strict=True)
        )
        lct.write_bytes(folder / f"{name}.csv", text_file.getvalue().encode("utf-8", "backslashreplace"))
    save_picture(options, folder / "cosine.png", draw_matrix(cosines, prompts))
    save_picture(options, folder / "pca.png", draw_points(points, prompts))
    encoder = ENCODER_NAMES[options.text_encoder]
    lct.show(f"{len(prompts)} prompts, text encoder: {encoder}; two components hold {explained:.0%} of the variance")


if __name__ == "__main__":
    lct.exit_process(main())
