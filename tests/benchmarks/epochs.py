"""What run.py compares of whole epochs: ViT-S DINOv3 at 224 px, batch 64, ours and loops people write.

A side returns what it costs: process CPU seconds with one thread and no loader workers. Images are drawn photos of 0.64 MP; all
loops use the same albumentations, and the weights are random. Of a run of 15 epochs one is measured and counted 15 times; ours and
the strongest embed every image once besides, for figures and prototypes, and read crops that were fitted before, in the scan or a
first epoch. The loop of open-metric-learning is written after its source (4.0.0): a benchmark need not install all that it needs.
"""

import dataclasses
import functools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import sklearn.metrics  # noqa: F401  what figures need is imported once in a run, not once an epoch
import timm
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lct_dino3 as lct

NAME = "vit_small_patch16_dinov3.lvd1689m"


class Costs(tuple):
    """What a side costs, in parts."""

    __slots__ = ()


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
    squares = lct.SquareFile(config.out_dir, config.img_size, lct.square_room(config))
    scan = lct.scan_dataset(config, squares=squares if lct.scan_fills_squares(config) else None)
    backbone, info = lct.build_backbone(config, print)
    runtime = lct.training_runtime(config)
    job = lct.Job(config, scan.records, runtime, lct.RunDirectory(config.out_dir), info)
    job = dataclasses.replace(job, store=lct.open_store(job, squares))
    model = lct.build_recognizer(config, 4, backbone, info)
    return job, lct.start_state(model, config, runtime)


def list_augmentations(A: Any, gray: dict[str, int]) -> list[Any]:  # noqa: N803
    """Return what ours does to a training image, as albumentations has it."""
    return [
        A.HorizontalFlip(p=0.5),
        A.Affine(rotate=(-180, 180), p=0.2, **gray),
        A.Affine(scale=(0.85, 1.1), translate_percent=(-0.06, 0.06), p=0.25, **gray),
        A.Perspective(scale=(0.02, 0.08), p=0.12, **gray),
        *lct.build_transform(224, augment=True).colours.transforms,
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
    head, arcface = lct.Head(trunk.num_features, 128, 1), lct.ArcFace(lct.Config(heads=1), 4)
    return trunk, head, arcface, torch.optim.AdamW([*head.parameters(), *arcface.parameters()], lr=1e-3)


def loader(split: str) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(PlainData(split), 64, shuffle=split == "train")


def plain_epoch() -> Costs:
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
    return Costs((time.process_time() - started,))


def oml_epoch() -> Costs:
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
    return Costs((time.process_time() - started,))


def pml_epoch() -> Costs:
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
    return Costs((time.process_time() - started,))


@functools.cache
def fitted_squares(split: str) -> tuple[np.ndarray, torch.Tensor]:
    """Return a memory map of the fitted images of a split, uint8 (n, 224, 224, 3), and their labels."""
    records, path = make_job("fp32")[0].records, Path(scratch().name) / f"{split}.npy"
    rows = records.rows(split)
    np.save(path, [lct.fit_square(lct.load_image(records.root / records.paths[row]), 224) for row in rows.tolist()])
    return np.load(path, mmap_mode="r"), torch.from_numpy(records.labels[rows].astype(np.int64))


def strongest_features(trunk: torch.nn.Module, squares: list[np.ndarray]) -> torch.Tensor:
    """Return the features of fitted images, at most a batch, in float32."""
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        images = images.to(next(trunk.parameters()).dtype).div_(127.5).sub_(1)
        features = trunk(images).float()
    return features.clone()  # outside, so that the head may train on it


def strongest_step(features: torch.Tensor, labels: torch.Tensor) -> None:
    """Train the head on the features of a batch."""
    _, head, arcface, optimizer = plain_parts()
    loss = F.cross_entropy(arcface(F.normalize(head.train()(features)), labels)[0][:, 0], labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def strongest_score(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the accuracy of the head on features."""
    _, head, arcface, _ = plain_parts()
    with torch.inference_mode():
        return (arcface.plain_logits(F.normalize(head.eval()(features))).argmax(1) == labels).float().mean().item()


def strongest_epoch(dtype: torch.dtype) -> Costs:
    """Return the cost of a training epoch as somebody writes it who knows how, and of embedding and scoring val.

    Squares in a memory map, uint8 up to the model, the frozen backbone in bf16 and inference mode; the features of val are kept.
    """
    import albumentations as A

    lct.keep_freed_memory()  # as ours
    trunk = plain_parts()[0].to(dtype)
    transform = A.Compose(list_augmentations(A, {"border_mode": 0, "fill": 114}))
    squares, labels = fitted_squares("train")
    val, val_labels = fitted_squares("val")
    started = time.process_time()
    for rows in torch.randperm(len(squares)).split(64):
        views = [transform(image=squares[row].copy())["image"] for row in rows.tolist()]
        strongest_step(strongest_features(trunk, views), labels[rows])
    trained = time.process_time()
    strongest_score(strongest_features(trunk, list(val)), val_labels)
    return Costs((trained - started, time.process_time() - trained))


def strongest_cached_epoch() -> Costs:
    """Return the cost of embedding one augmented and one clean view of the training images, and of an epoch of the head on them."""
    import albumentations as A

    lct.keep_freed_memory()
    trunk = plain_parts()[0].to(torch.bfloat16 if lct.cpu_multiplies_bf16() else torch.float32)
    transform = A.Compose(list_augmentations(A, {"border_mode": 0, "fill": 114}))
    squares, labels = fitted_squares("train")
    val, val_labels = fitted_squares("val")
    val_features = strongest_features(trunk, list(val))
    started = time.process_time()
    strongest_features(trunk, list(squares))
    clean = time.process_time()
    features = strongest_features(trunk, [transform(image=image.copy())["image"] for image in squares])
    view = time.process_time()
    for rows in torch.randperm(len(squares)).split(64):
        strongest_step(features[rows], labels[rows])
    strongest_score(val_features, val_labels)
    return Costs((view - clean, clean - started, time.process_time() - view))


def our_epoch(precision: str) -> Costs:
    """Return the cost of a training epoch, its checkpoint included, and of embedding and scoring val."""
    lct.keep_freed_memory()  # as a run does
    job, state = make_job(precision)
    state.batches, state.tally = 0, lct.Tally()
    started = time.process_time()
    lct.train_epoch(
        job, state, lct.TrainFeed(job, lct.backbone_in_training(state, job.config)), lct.Clock(job.runtime.device)
    )
    trained = time.process_time()
    lct.score_classifier(
        job, state.model, lct.embed(state.model, lct.FeatureBank(job, state.model.backbone).get("val"))
    )
    return Costs((trained - started, time.process_time() - trained))


def our_cached_epoch() -> Costs:
    """Return the cost of embedding one augmented view and one clean view of the training images, and of an epoch on them."""
    lct.keep_freed_memory()
    job, state = make_job("auto", 1)
    bank = lct.FeatureBank(job, state.model.backbone)
    started = time.process_time()
    bank.get("train")
    clean = time.process_time()
    job.run.path.joinpath("cached_views.json").unlink(missing_ok=True)
    feed = lct.ViewCache(job, lct.backbone_in_training(state, job.config), bank.get("train"))
    view = time.process_time()
    state.batches, state.tally = 0, lct.Tally()
    lct.train_epoch(job, state, feed, lct.Clock(job.runtime.device))
    return Costs((view - clean, clean - started, time.process_time() - view))


def count_images(split: str | None = None) -> int:
    """Return how many photos there are, in one split or in all."""
    records = make_job("fp32")[0].records
    return len(records.paths if split is None else records.rows(split))
