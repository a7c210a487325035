"""Frozen training on ViT-S DINOv3 at 224 px, batch 64, against the loops people write; start-up and checkpoints of ViT-L.

    python tests/benchmarks/epochs.py [rounds [row ...]]

A row is a pair of functions without arguments, reference and ours, which return their cost; `ROWS` has them with their targets.
Costs are process CPU seconds, with one thread and no loader workers, unless the row says otherwise. Images are drawn photos of
0.64 MP; all loops use the same albumentations, and the weights are random. Rows of 15 epochs measure one epoch of either kind and
count: the reference 15 of train and val, ours what a whole run embeds. pytorch-metric-learning is used where it is installed. The
loop of open-metric-learning is written after its source (4.0.0): a benchmark need not install all that it depends on.

A row in which a frozen backbone rounds to bf16 or views are cached has its effect on accuracy in quality.py. On a GPU the same
figures stand in the epochs' lines of train.log (images/s, waiting for data):

    python lct_dino3.py --data_root DATA --out_dir RUN --workers 16 --batch 256 --epochs 2 [--compile] [--no-freeze_backbone]
"""

import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lct_dino3 as lct

NAME, LARGE, EPOCHS = "vit_small_patch16_dinov3.lvd1689m", "vit_large_patch16_dinov3.lvd1689m", 15


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def draw_photos(root: Path) -> None:
    """Draw four classes of 23 JPEGs of 800 x 800 px: 64 for training, 18 for val."""
    rng = np.random.default_rng(0)
    for label in range(4):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(23):
            coarse = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            coarse.resize((800, 800), Image.Resampling.BICUBIC).save(
                root / f"class{label}" / f"{number}.jpg", quality=90
            )


@functools.cache
def make_job(precision: str, cache_views: int = 0) -> tuple[lct.Job, lct.TrainState]:
    """Return what `train` would work with."""
    root = Path(scratch().name) / "data"
    if not root.exists():
        draw_photos(root)
    config = lct.Config(
        data_root=root, out_dir=root.parent / f"run_{precision}_{cache_views}", model_id=NAME, pretrained=False, workers=0, gpus=0,
        precision=precision, cache_views=cache_views,
    )  # fmt: skip
    scan, (backbone, info) = lct.scan_dataset(config), lct.build_backbone(config, print)
    runtime = lct.make_runtime(config)
    job = lct.Job(config, scan.records, runtime, lct.RunDirectory(config.out_dir), info, scan.fingerprint)
    model = lct.build_recognizer(config, 4, backbone, info)
    backbone.dtype = runtime.dtype_of(backbone)
    return job, lct.start_state(model, config, runtime)


def list_augmentations(A: Any, gray: dict[str, int]) -> list[Any]:  # noqa: N803
    """Return what ours does to a training image, as albumentations has it."""
    return [
        A.HorizontalFlip(p=0.5),
        A.Affine(rotate=(-180, 180), p=0.2, **gray),
        A.Affine(scale=(0.85, 1.1), translate_percent=(-0.06, 0.06), p=0.25, **gray),
        A.Perspective(scale=(0.02, 0.08), p=0.12, **gray),
        *lct._looks(A),
    ]


class PlainData(torch.utils.data.Dataset):
    """Pillow, albumentations, float tensors."""

    def __init__(self, split: str) -> None:
        import albumentations as A

        records = make_job("fp32")[0].records
        rows = records.rows(split)
        self.paths = [records.root / records.paths[row] for row in rows.tolist()]
        self.labels = records.labels[rows].tolist()
        gray = {"border_mode": 0, "fill": 114}
        square = [A.LongestMaxSize(224), A.PadIfNeeded(224, 224, **gray)]
        augment = list_augmentations(A, gray) if split == "train" else []
        self.transform = A.Compose([*square, *augment, A.Normalize(), A.ToTensorV2()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = np.asarray(Image.open(self.paths[index]).convert("RGB"))
        return self.transform(image=image)["image"], self.labels[index]


@functools.cache
def plain_parts() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module, torch.optim.Optimizer]:
    trunk = (
        timm.create_model(NAME, pretrained=False, num_classes=0, img_size=224, global_pool="token")
        .eval()
        .requires_grad_(False)
    )
    head, arcface = lct.Head(384, 128, 1), lct.ArcFace(128, 4, 0.3, 30.0)
    return trunk, head, arcface, torch.optim.AdamW([*head.parameters(), *arcface.parameters()], lr=1e-3)


def loader(split: str) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(PlainData(split), 64, shuffle=split == "train")


def plain_epoch() -> float:
    """Train and validate as a plain PyTorch loop does."""
    trunk, head, arcface, optimizer = plain_parts()
    batches, val = loader("train"), loader("val")
    started = time.process_time()
    head.train()
    for images, labels in batches:
        with torch.no_grad():
            features = trunk(images)
        logits, _ = arcface(F.normalize(head(features)), labels)
        loss = F.cross_entropy(logits[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    head.eval()
    with torch.no_grad():
        for images, labels in val:
            (arcface.plain_logits(F.normalize(head(trunk(images)))).argmax(1) == labels).sum().item()
    return time.process_time() - started


def oml_epoch() -> float:
    """Train and validate as open-metric-learning's examples do: one extractor, criterion on embeddings, `inference`, Recall@1."""
    trunk, head, arcface, optimizer = plain_parts()
    extractor = torch.nn.Sequential(trunk, head)
    batches, val = loader("train"), loader("val")
    started = time.process_time()
    extractor.train()
    for images, labels in batches:
        loss = F.cross_entropy(arcface(F.normalize(extractor(images)), labels)[0][:, 0], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    extractor.eval()
    with torch.no_grad():
        embeddings, labels = map(
            torch.cat, zip(*[(extractor(images).cpu(), labels) for images, labels in val], strict=True)
        )
        nearest = torch.cdist(embeddings, embeddings).fill_diagonal_(torch.inf).argmin(1)
        (labels[nearest] == labels).float().mean().item()
    return time.process_time() - started


def pml_epoch() -> float:
    """Train with pytorch-metric-learning's trainer, and embed val with its tester."""
    from pytorch_metric_learning import distances, losses, testers, trainers
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    trunk, head, _, _ = plain_parts()
    criterion = losses.ArcFaceLoss(4, 128, margin=17.2, scale=30)
    optimizers = {"embedder_optimizer": torch.optim.AdamW(head.parameters(), lr=1e-3),
                  "metric_loss_optimizer": torch.optim.AdamW(criterion.parameters(), lr=1e-2)}  # fmt: skip
    trainer = trainers.MetricLossOnly(
        {"trunk": trunk, "embedder": head}, optimizers, 64, {"metric_loss": criterion}, PlainData("train"),
        data_device="cpu", dataloader_num_workers=0, freeze_these=("trunk",),
    )  # fmt: skip
    calculator = AccuracyCalculator(knn_func=CustomKNN(distances.CosineSimilarity()), device=torch.device("cpu"))
    tester = testers.GlobalEmbeddingSpaceTester(
        batch_size=64, dataloader_num_workers=0, data_device="cpu", accuracy_calculator=calculator
    )
    started = time.process_time()
    trainer.train(num_epochs=1)
    tester.get_all_embeddings(PlainData("val"), trunk, head)
    return time.process_time() - started


def our_parts(precision: str) -> tuple[float, float]:
    """Return the cost of a training epoch, its checkpoint included, and of embedding and scoring val."""
    lct.keep_freed_memory()  # as a run does
    job, state = make_job(precision)
    state.batches, state.tally = 0, lct.Tally()
    started = time.process_time()
    lct.train_epoch(job, state, lct.TrainFeed(job), lct.SaveClock(0))
    trained = time.process_time()
    lct.score_classifier(
        job, state.model, lct.embed(job, state.model, lct.FeatureBank(job, state.model.backbone).get("val"))
    )
    return trained - started, time.process_time() - trained


def our_epoch(precision: str) -> float:
    return sum(our_parts(precision))


def our_run(precision: str) -> float:
    """Return the cost of 15 epochs with fresh views, and of embedding every image once, for figures and prototypes."""
    epoch, val = our_parts(precision)
    return EPOCHS * epoch + val * len(make_job(precision)[0].records.paths) / len(
        make_job(precision)[0].records.rows("val")
    )


def our_cached_run(precision: str) -> float:
    """Return the cost of 15 epochs on four cached views and the clean one: the cache, every image once, and the head."""
    lct.keep_freed_memory()
    job, state = make_job(precision, 4)
    one = dataclasses.replace(job, config=dataclasses.replace(job.config, cache_views=1))
    bank = lct.FeatureBank(job, state.model.backbone)
    started = time.process_time()
    bank.get("train")
    clean = (time.process_time() - started) * len(job.records.paths) / len(job.records.rows("train"))
    job.run.path.joinpath("cached_views.json").unlink(missing_ok=True)
    started = time.process_time()
    feed = lct.CachedFeed(one, state.model, bank)
    view = time.process_time() - started
    state.batches, state.tally = 0, lct.Tally()
    started = time.process_time()
    lct.train_epoch(one, state, feed, lct.SaveClock(0))
    return 4 * view + clean + EPOCHS * (time.process_time() - started)


@functools.cache
def large_weights() -> Path:
    model = timm.create_model(LARGE, pretrained=False, num_classes=0, img_size=224, global_pool="token")
    torch.save(model.state_dict(), Path(scratch().name) / "large.pth")
    return Path(scratch().name) / "large.pth"


def plain_start() -> float:
    """Build and fill the backbone three times, as the predecessor did."""
    weights = large_weights()
    started = time.process_time()
    for _ in range(3):
        model = timm.create_model(LARGE, pretrained=False, num_classes=0, img_size=224, global_pool="token")
        model.load_state_dict(torch.load(weights, weights_only=True))
    return time.process_time() - started


def our_start() -> float:
    """Look at the model, build it, fill it, and hash its weights."""
    weights = large_weights()
    lct._probe.cache_clear()
    started = time.process_time()
    lct.build_backbone(lct.Config(model_id=LARGE, backbone_weights=weights), print)
    return time.process_time() - started


@functools.cache
def large_state() -> lct.TrainState:
    config = lct.Config(model_id=LARGE, backbone_weights=large_weights())
    model = lct.build_recognizer(config, 100, *lct.build_backbone(config, print))
    state = lct.start_state(model, config, lct.make_runtime(config))
    logits, _ = model(torch.randn(64, 1024), torch.zeros(64, dtype=torch.int64))
    logits.sum().backward()
    state.optimizer.step()
    return state


def plain_checkpoint(count_bytes: bool) -> float:
    state, path = large_state(), Path(scratch().name) / "plain.pth"
    started = time.perf_counter()
    torch.save({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}, path)
    return path.stat().st_size if count_bytes else time.perf_counter() - started


def our_checkpoint(count_bytes: bool) -> float:
    state, path = large_state(), Path(scratch().name) / "ours.pth"
    started = time.perf_counter()
    lct.save_checkpoint(path, state, {})
    return path.stat().st_size if count_bytes else time.perf_counter() - started


def passes_after_training(keep: bool) -> float:
    """Return how many images go through the backbone for the prototypes, figures and report of a run that has been trained."""
    job, state = make_job("fp32")
    bank, seen = lct.FeatureBank(job, state.model.backbone), []
    for split in lct.SPLIT_NAMES if keep else ():  # as the baseline has done before training
        bank.get(split)
    hook = state.model.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for split in lct.SPLIT_NAMES:
        bank.get(split)
    hook.remove()
    return 1 + sum(seen)  # a ratio needs one


ROWS: dict[str, tuple[float, Callable[[], float], Callable[[], float]]] = {  # target, reference, ours
    "epoch, against a plain loop": (1.6, plain_epoch, lambda: our_epoch("auto")),
    "epoch, against open-metric-learning": (1.6, oml_epoch, lambda: our_epoch("auto")),
    "epoch, against pytorch-metric-learning": (1.6, pml_epoch, lambda: our_epoch("auto")),
    "epoch in fp32, against a plain loop": (1.0, plain_epoch, lambda: our_epoch("fp32")),
    "15 epochs, fresh views": (2.0, lambda: EPOCHS * plain_epoch(), lambda: our_run("auto")),
    "15 epochs, --cache_views 4": (6.0, lambda: EPOCHS * plain_epoch(), lambda: our_cached_run("auto")),
    "start, ViT-L with weights": (2.5, plain_start, our_start),
    "checkpoint of a frozen ViT-L, bytes": (100, lambda: plain_checkpoint(True), lambda: our_checkpoint(True)),
    "checkpoint of a frozen ViT-L, wall seconds": (30, lambda: plain_checkpoint(False), lambda: our_checkpoint(False)),
    "images embedded after training, and one": (
        50,
        lambda: passes_after_training(False),
        lambda: passes_after_training(True),
    ),
}


def cost_alone(function: Callable[[], float]) -> float:
    """Return what a function costs in a process of its own, so that none profits from what another has set or left."""
    receiver, sender = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(sender, repr(function()).encode())
        except ImportError as error:
            os.write(sender, str(error).encode())
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
    os.close(sender)
    with os.fdopen(receiver) as file:
        text = file.read()
    try:
        return float(text)
    except ValueError as error:
        raise ImportError(text or "it failed") from error


def compare(name: str, rounds: int) -> bool:
    """Print a row: the medians of turns taken; say whether the target is met."""
    target, reference, ours = ROWS[name]
    try:
        costs = [(cost_alone(reference), cost_alone(ours)) for _ in range(rounds)]
    except ImportError as error:
        print(f"{name:<45} left out: {error}", flush=True)
        return True
    first, second = (statistics.median(own) for own in zip(*costs, strict=True))
    ratio = statistics.median(own[0] / own[1] for own in costs)
    verdict = "pass" if ratio >= target else "FAIL"
    print(f"{name:<45}{first:>16,.3f}{second:>16,.3f}{ratio:>10.2f} x  {verdict} ({target:g})", flush=True)
    return ratio >= target


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{'':<45}{'reference':>16}{'ours':>16}{'ratio':>10}", flush=True)
    for name in ROWS:
        if any(word in name for word in sys.argv[2:] or [""]):
            compare(name, rounds)
