"""Figures computed once more from what a run leaves in its folder: by a few lines of torch, scikit-learn and Pillow, not by ours.

The runs are far from perfect, so that a figure of other images, another half, other weights or another epoch is another number.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import HARD_RUN, HARD_RUNS, draw_confusable
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn

GRAY = 114  # around a crop that is not square, and where the background was
RESAMPLING = {"bicubic, antialiased": Image.Resampling.BICUBIC}  # the words of prototypes.npz
SPLITS = ("train", "val", "test")


# --- what a stranger makes of the files


def read_square(path: Path, mask_path: Path | None, side: int, resize: Callable) -> np.ndarray:
    """Return the model's input of a crop, uint8 (side, side, 3): in the middle of gray, with a mask without its background."""
    image = np.asarray(Image.open(path).convert("RGB"))
    if mask_path:
        mask = np.asarray(Image.open(mask_path).convert("L"))[:, :, None]
        image = np.dstack([np.where(mask > 127, image, GRAY), mask]).astype(np.uint8)
    height, width = image.shape[:2]
    factor = side / max(height, width)
    image = resize(image, max(1, round(width * factor)), max(1, round(height * factor)))
    square = np.full((side, side, image.shape[2]), GRAY, np.uint8)
    square[:, :, 3:] = 0
    top, left = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
    square[top : top + image.shape[0], left : left + image.shape[1]] = image
    return np.where(square[:, :, 3:] > 127, square[:, :, :3], GRAY).astype(np.uint8) if mask_path else square


def resize_by_torch(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the image resized as the script does it, pixel by pixel."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def resize_by_pillow(image: np.ndarray, width: int, height: int, resampling: int) -> np.ndarray:
    """Return the image resized by Pillow, whose rounding differs a little."""
    bands = [Image.fromarray(image[:, :, band]).resize((width, height), resampling) for band in range(image.shape[2])]
    return np.dstack([np.asarray(band) for band in bands])


class Model:
    """Backbone, head and class vectors of a checkpoint, in evaluation."""

    def __init__(self, options: dict, weights: dict[str, torch.Tensor]) -> None:
        self.backbone = timm.create_model(options["model_id"], pretrained=False, num_classes=0)
        own = {
            key.removeprefix("backbone.model."): value for key, value in weights.items() if key.startswith("backbone")
        }
        self.backbone.load_state_dict(own or torch.load(options["backbone_weights"], weights_only=True))
        head = {key.removeprefix("head."): value for key, value in weights.items() if key.startswith("head.")}
        hidden, parts = len(head["hidden.weight"]), options["heads"]
        layers = (
            nn.Linear(head["hidden.weight"].shape[1], hidden),
            nn.BatchNorm1d(hidden),
            nn.Conv1d(hidden, options["emb_dim"], 1, groups=parts),
        )
        for layer, name in zip(layers, ("hidden", "norm", "output"), strict=True):
            layer.load_state_dict({key.split(".")[1]: head[key] for key in head if key.startswith(f"{name}.")})
        self.hidden, self.norm, self.output = (layer.eval() for layer in layers)
        self.backbone.eval()
        self.parts, self.scale = parts, options["arc_scale"]
        self.class_vectors = self._normalize(weights["criterion.weight"])

    def _normalize(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors whose parts, one a head, are equally long, and which have unit length as a whole."""
        return F.normalize(vectors.unflatten(1, (self.parts, -1)), dim=2).flatten(1) / math.sqrt(self.parts)

    @torch.inference_mode()
    def features(self, squares: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
        """Return the backbone's output (N, F) of squares uint8 (N, side, side, 3)."""
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2) / 255
        pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        return torch.cat([self.backbone(batch) for batch in pixels.split(64)])

    @torch.inference_mode()
    def embed(self, features: torch.Tensor) -> np.ndarray:
        """Return unit embeddings float32 (N, D)."""
        raw = self.output(F.relu(self.norm(self.hidden(features)))[:, :, None])[:, :, 0]
        return self._normalize(raw).numpy()

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        """Return logits without margin (N, C)."""
        return self.scale * embeddings @ self.class_vectors.numpy().T


@dataclass(frozen=True)
class Crops:
    """Crops as the model sees them."""

    rows: np.ndarray  # (N,) the image of each: mix judges one with a mask twice
    views: np.ndarray  # (N,) 0 as it is, 1 masked
    labels: np.ndarray  # (N,) -1 of no class
    paths: list[str]  # (N,) relative to the data
    squares: np.ndarray  # (N, side, side, 3)
    has_mask: np.ndarray  # (N,)


class Run:
    """The files of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options = json.loads((folder / "config.json").read_text("utf-8"))["options"]
        self.events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        self.splits = json.loads((folder / "splits.json").read_text("utf-8"))
        with np.load(folder / "prototypes.npz", allow_pickle=False) as content:
            self.gallery = {name: content[name] for name in content.files}
        self.meta = json.loads(str(self.gallery["meta"]))
        self.class_names = self.gallery["id2cls"].tolist()
        self.val = [event["val"] for event in self.select("epoch_end")]

    def select(self, name: str) -> list[dict]:
        return [event for event in self.events if event["event"] == name]

    def event(self, name: str) -> dict:
        (event,) = self.select(name)
        return event

    @functools.cache  # noqa: B019  a handful of runs, kept anyway
    def crops(self, split: str) -> Crops:
        """Return the crops of a split as evaluation sees them, or with `fit` and `measure` those of one half of --unknown_dir."""
        if split in SPLITS:
            root, table = Path(self.options["data_root"]), self.splits[split]
            named = [(path, self.class_names.index(name)) for name in table for path in table[name]]
        else:
            root = Path(self.options["unknown_dir"])
            names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
            halves = {name: ("measure", "fit")[hashlib.sha256(name.encode()).digest()[0] % 2] for name in names}
            named = [(name, -1) for name in names if halves[name] == split]
        found = []
        for row, (path, label) in enumerate(named):
            mask = root / path.replace("/cropped/", "/masks/").replace(".png", "_mask.png")
            has_mask = "/cropped/" in path and mask.is_file() and self.options["crop_mode"] == "mix"
            for view in range(1 + has_mask):
                square = read_square(root / path, mask if view else None, self.options["img_size"], resize_by_torch)
                found.append((row, view, label, path, square, has_mask))
        rows, views, labels, paths, squares, has_mask = zip(*found, strict=True)
        return Crops(*map(np.array, (rows, views, labels)), list(paths), np.stack(squares), np.array(has_mask))

    @functools.cache  # noqa: B019
    def weights(self, name: str, is_judged: bool = True) -> dict[str, torch.Tensor]:
        """Return what has been trained, by default what was judged: with --ema_decay the running mean."""
        payload = torch.load(self.folder / f"checkpoint_{name}.pth", weights_only=True)
        return payload["average"] if is_judged and self.options["ema_decay"] else payload["model"]

    def model(self, checkpoint: str, is_judged: bool = True) -> Model:
        return Model(self.options, self.weights(checkpoint, is_judged))

    @functools.cache  # noqa: B019
    def features(self, checkpoint: str, split: str, is_judged: bool = True) -> torch.Tensor:
        """Return the features of a split; `frozen` are those of the backbone that training began with."""
        weights = {} if checkpoint == "frozen" else self.weights(checkpoint, is_judged)
        if self.options["freeze_backbone"] and checkpoint != "frozen":
            return self.features("frozen", split)
        model = Model(self.options, weights or self.without_backbone())
        return model.features(self.crops(split).squares, self.meta["mean"], self.meta["std"])

    def without_backbone(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.weights("best").items() if not key.startswith("backbone")}

    def embed(self, checkpoint: str, split: str, is_judged: bool = True) -> np.ndarray:
        return self.model(checkpoint, is_judged).embed(self.features(checkpoint, split, is_judged))

    def fuse(self, features: torch.Tensor, embeddings: np.ndarray, weight: float | None = None) -> np.ndarray:
        """Return what the gallery's vectors are made of: embeddings (N, D), and beside them features (N, F) as the file says."""
        weight = float(self.gallery["feature_weight"]) if weight is None else weight
        projected = (features.numpy() - self.gallery["feature_mean"]) @ self.gallery["feature_projection"]
        projected /= np.linalg.norm(projected, axis=1, keepdims=True)
        return np.hstack([math.sqrt(1 - weight) * embeddings, math.sqrt(weight) * projected]) if weight else embeddings

    def vectors(self, checkpoint: str, split: str, weight: float | None = None) -> np.ndarray:
        return self.fuse(self.features(checkpoint, split), self.embed(checkpoint, split), weight)

    @property
    def best(self) -> str:
        """The name of the best epoch's checkpoint, by the figures in metrics.jsonl."""
        metric = self.options["best_metric"]
        order = [(-val["loss"] if metric == "loss" else val[metric], -val["loss"]) for val in self.val]
        return f"ep{1 + max(range(len(order)), key=lambda epoch: (order[epoch], -epoch)):03d}"

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the similarity (N, C) to each class by the gallery's own matcher."""
        references, labels = self.gallery["stacks"], self.gallery["stack_labels"]
        counts = self.gallery["knn_counts"]
        if self.gallery["matcher"] != "knn":
            references, labels = self.gallery["prototypes"], self.gallery["prototype_labels"]
            counts = np.ones(len(counts), int)
        return mean_of_nearest(embeddings, references, labels, counts)


def unit_means(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    means = np.stack([embeddings[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def mean_of_nearest(queries: np.ndarray, references: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean cosine (N, C) of each query to the so many nearest references of each class."""
    cosine = queries @ references.T
    columns = [np.sort(cosine[:, labels == label])[:, -count:].mean(axis=1) for label, count in enumerate(counts)]
    return np.stack(columns, axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True).astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


def judge(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the figures of a classifier."""
    probabilities = softmax(logits)
    # Ranked as logarithms in float32, as they are stored: what is equal there is a tie.
    ranked = np.log(probabilities).astype(np.float32)
    return {
        "loss": float(-np.log(probabilities[np.arange(len(labels)), labels]).mean()),
        "acc": accuracy_score(labels, logits.argmax(axis=1)),
        "f1_macro": f1_score(labels, logits.argmax(axis=1), average="macro", labels=np.unique(labels)),
        "auc_macro": np.mean([roc_auc_score(labels == label, ranked[:, label]) for label in np.unique(labels)]),
    }


def judge_matching(
    references: np.ndarray, reference_labels: np.ndarray, queries: np.ndarray, labels: np.ndarray
) -> dict:
    nearest = (queries @ references.T).argmax(axis=1)
    centroid = (queries @ unit_means(references, reference_labels).T).argmax(axis=1)
    return {
        "proto_acc": accuracy_score(labels, centroid),
        "recall_at_1": accuracy_score(labels, reference_labels[nearest]),
    }


def approx(figures: dict[str, float]) -> dict:
    return {name: pytest.approx(value, abs=2e-4) for name, value in figures.items()}


@pytest.fixture(params=list(HARD_RUNS))
def run(request: pytest.FixtureRequest, runs: Callable[[str], Run]) -> Run:
    return runs(request.param)


@pytest.fixture(scope="session")
def runs(hard_run: Callable[[str], Path]) -> Callable[[str], Run]:
    return functools.cache(lambda name: Run(hard_run(name)))


# --- the figures of each epoch


def test_the_runs_can_tell_a_wrong_figure_from_a_right_one(run: Run) -> None:
    """Else this file would pass whatever the script does."""
    accuracies = [val["acc"] for val in run.val]
    assert 0.5 < max(accuracies) < 0.9 and len(set(accuracies)) > 3
    assert run.best not in ("ep001", f"ep{len(run.val):03d}")
    test = run.event("test_end")
    assert test["classifier"]["f1_macro"] != test["prototypes"]["f1_macro"]
    assert all(0.3 < val["recall_at_1"] < 0.9 for val in run.val)


def test_each_epoch_is_judged_on_val_by_the_weights_that_are_kept(run: Run) -> None:
    """Loss, accuracy, F1 and AUC of the classifier; centroids and nearest neighbours among the training images."""
    train, val = run.crops("train"), run.crops("val")
    for epoch, recorded in enumerate(run.val, 1):
        checkpoint = f"ep{epoch:03d}"
        queries, references = run.embed(checkpoint, "val"), run.embed(checkpoint, "train")
        figures = judge(run.model(checkpoint).logits(queries), val.labels)
        figures |= judge_matching(references, train.labels, queries, val.labels)
        assert recorded == approx(figures), checkpoint


def test_the_figures_of_the_running_mean_are_not_those_of_the_weights(runs: Callable[[str], Run]) -> None:
    run = runs("tuned")
    differences = []
    for epoch, recorded in enumerate(run.val, 1):
        checkpoint = f"ep{epoch:03d}"
        logits = run.model(checkpoint, False).logits(run.embed(checkpoint, "val", False))
        differences.append(abs(judge(logits, run.crops("val").labels)["loss"] - recorded["loss"]))
    assert max(differences) > 0.05


def test_val_by_view_is_over_the_crops_that_have_both(runs: Callable[[str], Run]) -> None:
    run = runs("mix")
    train, val, checkpoint = run.crops("train"), run.crops("val"), "ep003"
    recorded = run.select("epoch_end")[2]["val_by_view"]
    assert not val.has_mask.all()
    queries, references = run.embed(checkpoint, "val"), run.embed(checkpoint, "train")
    for view, name in enumerate(("bbox", "mask")):
        chosen = val.has_mask & (val.views == view)
        figures = judge(run.model(checkpoint).logits(queries[chosen]), val.labels[chosen])
        figures |= judge_matching(references, train.labels, queries[chosen], val.labels[chosen])
        assert recorded[name] == approx(figures)


def test_the_running_mean_forgets_faster_in_its_first_steps(runs: Callable[[str], Run]) -> None:
    """One step an epoch, so that the weights after each step are on disk."""
    run = runs("tuned")
    decay, key = run.options["ema_decay"], "head.hidden.weight"
    for step in range(2, len(run.val) + 1):
        before, after = (run.weights(f"ep{number:03d}")[key] for number in (step - 1, step))
        share = min(decay, (1 + step) / (10 + step))
        expected = share * before + (1 - share) * run.weights(f"ep{step:03d}", False)[key]
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_falls_over_the_steps_that_there_are(run: Run) -> None:
    """The last step of an epoch may have fewer batches, and is one all the same."""
    options = run.options
    images = sum(map(len, run.splits["train"].values()))
    steps = math.ceil(math.ceil(images / options["batch"]) / options["accumulate_grad_batches"])
    total, warmup = steps * options["epochs"], max(1, steps * options["epochs"] // 20)
    for epoch, recorded in enumerate(run.select("epoch_end"), 1):
        step = epoch * steps - 1
        share = (
            (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        )
        assert recorded["lr"] == pytest.approx(options["lr"] * share)


# --- the best epoch, and what is exported


def test_the_best_epoch_is_the_one_that_best_metric_says(run: Run) -> None:
    number = int(run.best.removeprefix("ep"))
    assert run.select("best_update")[-1]["epoch"] == number == run.event("proto_start")["epoch"]
    best, expected = run.weights("best"), run.weights(run.best)
    assert best.keys() == expected.keys() and all(torch.equal(best[key], expected[key]) for key in best)


def test_references_are_the_training_images_as_the_best_epoch_sees_them(run: Run) -> None:
    train = run.crops("train")
    keys = list(zip(train.paths, train.views.tolist(), strict=True))
    stacks = list(zip(run.gallery["stack_paths"].tolist(), run.gallery["stack_views"].tolist(), strict=True))
    assert sorted(stacks) == sorted(keys)
    order = [keys.index(key) for key in stacks]
    assert run.gallery["stack_labels"].tolist() == train.labels[order].tolist()
    best, last = run.vectors(run.best, "train")[order], run.vectors("last", "train")[order]
    np.testing.assert_allclose(run.gallery["stacks"], best, atol=1e-5)
    assert np.abs(run.gallery["stacks"] - last).max() > 0.01, "the last epoch is another"
    np.testing.assert_allclose(run.gallery["centroids"], unit_means(best, train.labels[order]), atol=1e-5)


def test_a_consumer_who_follows_meta_gets_our_embeddings(run: Run) -> None:
    """All that is needed beside the weights is said: resampling, size, border, mean, deviation."""
    meta, train = run.meta, run.crops("train")
    assert meta["interpolation"] in RESAMPLING and meta["padding"] == GRAY and meta["pool"] == "avg"
    root, model = Path(run.options["data_root"]), run.model("best")
    chosen = np.flatnonzero(run.gallery["stack_views"] == 0)

    def least_cosine(resampling: int) -> float:
        resize = functools.partial(resize_by_pillow, resampling=resampling)
        paths = run.gallery["stack_paths"][chosen]
        squares = np.stack([read_square(root / path, None, meta["img_size"], resize) for path in paths])
        features = model.features(squares, meta["mean"], meta["std"])
        return float((run.fuse(features, model.embed(features)) * run.gallery["stacks"][chosen]).sum(axis=1).min())

    assert len(train.paths) >= len(chosen) > 100
    assert least_cosine(RESAMPLING[meta["interpolation"]]) > 1 - 1e-3
    assert least_cosine(Image.Resampling.BOX) < 1 - 1e-2, "what other words stand for is noticed"


def test_features_weigh_as_much_as_val_allows(run: Run) -> None:
    """The largest weight by which the nearest centroids lose one point at most; strangers of the fit half count."""
    labels = {split: run.crops(split).labels for split in ("train", "val")}

    def quality(weight: float) -> float:
        centroids = unit_means(run.vectors(run.best, "train", weight), labels["train"])
        scores = run.vectors(run.best, "val", weight) @ centroids.T
        is_right = scores.argmax(axis=1) == labels["val"]
        if not run.options["unknown_dir"]:
            return is_right.mean()
        strange = (run.vectors(run.best, "fit", weight) @ centroids.T).max(axis=1)
        return (is_right[:, None] * (scores.max(axis=1)[:, None] > strange)).mean()

    assert run.gallery["feature_projection"].shape[1]
    train = run.features(run.best, "train").numpy()
    np.testing.assert_allclose(run.gallery["feature_mean"], train.mean(axis=0), atol=1e-5)
    allowed = [weight for weight in (0.3, 0.5, 0.7) if quality(weight) >= quality(0) - 0.01]
    assert run.gallery["feature_weight"] == pytest.approx(max(allowed, default=0))
    assert run.event("proto_end")["feature_weight"] == pytest.approx(max(allowed, default=0))


# --- the final test


def test_accuracy_is_given_without_what_looks_like_a_training_image(run: Run) -> None:
    """By the untrained backbone, however it is trained afterwards."""
    train, test = run.crops("train"), run.crops("test")
    scaler = StandardScaler().fit(run.features("frozen", "train").numpy())
    unit = [normalize(scaler.transform(run.features("frozen", split).numpy())) for split in ("test", "train")]
    cosine = unit[0] @ unit[1].T
    is_close = cosine.max(axis=1) >= 0.8
    expected = {test.paths[i]: train.paths[cosine[i].argmax()] for i in np.flatnonzero(is_close)}
    recorded = run.event("test_end")["without_same_session"]
    if run.options["crop_mode"] == "bbox":
        assert {path: pair["train"] for path, pair in recorded["pairs"].items()} == expected
    rest = ~np.isin(test.paths, list(expected))
    scores = run.scores(run.vectors(run.best, "test"))
    assert recorded["images"] == len(np.unique(test.rows[rest]))
    is_right = scores.argmax(axis=1) == test.labels
    assert recorded["acc"] == pytest.approx(mean_by_image(test.rows[rest], is_right[rest]))


def test_the_final_test_is_that_of_the_best_epoch(run: Run) -> None:
    test, recorded = run.crops("test"), run.event("test_end")
    queries = run.vectors(run.best, "test")
    assert recorded["images"] == len(np.unique(test.rows)) == 75
    by_classifier = run.model(run.best).logits(run.embed(run.best, "test"))
    assert recorded["classifier"] == approx(judge(by_classifier, test.labels))
    figures = judge(run.scores(queries) / run.meta["temperature"], test.labels)
    nearest = run.gallery["stack_labels"][(queries @ run.gallery["stacks"].T).argmax(axis=1)]
    figures["recall_at_1"] = accuracy_score(test.labels, nearest)
    del figures["loss"]
    assert recorded["prototypes"] == approx(figures)


def mean_by_image(rows: np.ndarray, is_right: np.ndarray) -> float:
    """Return the mean over images of the share of their views that are answered right."""
    return float(np.mean([is_right[rows == row].mean() for row in np.unique(rows)]))


def fit_regression(features: np.ndarray, labels: np.ndarray) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, labels)


def frozen_baselines(run: Run, split: str) -> dict[str, float]:
    """Return the accuracies of the untrained backbone on a split, and that of logistic regression over images."""
    train, queries = run.crops("train"), run.crops(split)
    features, wanted = run.features("frozen", "train").numpy(), run.features("frozen", split).numpy()
    fitted = {"logreg": fit_regression(features, train.labels)}
    if run.options["cache_views"]:  # what training has seen, regression has
        cached = np.fromfile(run.folder / "cached_views.f16", np.float16).reshape(-1, features.shape[1])
        labels = np.tile(train.labels, 1 + len(cached) // len(features))
        fitted["logreg_views"] = fit_regression(np.concatenate([features, cached.astype(np.float32)]), labels)
    unit, unit_wanted = (F.normalize(torch.from_numpy(values)).numpy() for values in (features, wanted))
    matching = judge_matching(unit, train.labels, unit_wanted, queries.labels)
    return {
        **{f"{name}_acc": accuracy_score(queries.labels, own.predict(wanted)) for name, own in fitted.items()},
        **{
            f"{name}_by_image": mean_by_image(queries.rows, own.predict(wanted) == queries.labels)
            for name, own in fitted.items()
        },
        "nn1_acc": matching["recall_at_1"],
        "centroid_acc": matching["proto_acc"],
    }


def test_training_is_compared_with_the_best_baseline_on_the_test_images(run: Run) -> None:
    measured = run.event("baseline_end")
    expected = {split: frozen_baselines(run, split) for split in ("val", "test")}
    for split, figures in expected.items():
        by_view = {name: value for name, value in figures.items() if not name.endswith("by_image")}
        assert {name: measured[split][name] for name in by_view} == approx(by_view)
    recorded = run.event("test_end")
    names = [name for name in ("logreg", "logreg_views", "nn1", "centroid") if f"{name}_acc" in expected["val"]]
    assert ("logreg_views" in names) == bool(run.options["cache_views"])
    name = max(names, key=lambda name: expected["val"][f"{name}_acc"])
    frozen = expected["test"][f"{name}_by_image" if name.startswith("logreg") else f"{name}_acc"]
    assert name.startswith("logreg") or len(set(run.crops("test").rows.tolist())) == len(run.crops("test").rows)
    test = run.crops("test")
    trained = mean_by_image(test.rows, run.scores(run.vectors(run.best, "test")).argmax(axis=1) == test.labels)
    gain = trained - frozen
    assert recorded["baseline"] == {"name": name, "acc": pytest.approx(frozen)}
    assert recorded["gain"]["value"] == pytest.approx(gain)
    accuracies = re.findall(r"prototype matching (\d\.\d+), .* on the frozen backbone (\d\.\d+)", recorded["verdict"])
    assert accuracies == [(f"{trained:.3f}", f"{frozen:.3f}")]
    word = "no measurable difference" if recorded["p_value"] >= 0.05 else f"training {'helped' if gain > 0 else 'hurt'}"
    assert recorded["verdict"].startswith(f"{word}: ")


def test_training_ends_with_a_few_lines(run: Run) -> None:
    """Verdict, accuracy, images and unknown objects that get a class, what classes are worth, paths."""

    def show(figure: dict) -> str:
        return "{:.3f} ({:.3f} to {:.3f})".format(figure["value"], *figure["interval"])

    lines = [line[21:] for line in (run.folder / "train.log").read_text("utf-8").splitlines()]  # without the time
    last = max(i for i, line in enumerate(lines) if line.startswith(("epoch ", "training ends after")))
    measured, matcher = run.event("measured"), str(run.gallery["matcher"])
    strangers = measured if "unknown_passed" in measured else run.event("unseen_classes")
    closed, test = measured["closed"][matcher], run.event("test_end")
    images = f"{test['views']} views of {test['images']}" if run.options["crop_mode"] == "mix" else f"{test['images']}"
    assert lines[last + 1 : last + 6] == [
        test["verdict"],
        f"accuracy {show(closed['acc'])}, macro F1 {show(closed['f1_macro'])}, on {images} test images",
        f"test images that get a class, not `unknown`: {show(measured['thresholds']['coverage'])}",
        f"unknown objects that get a class all the same: {show(strangers['unknown_passed'])}",
        f"classes given that are right, if 20% of all objects are unknown (--unknown_share): {show(strangers['mixed_precision'])}",
    ]
    is_low = measured["thresholds"]["coverage"]["value"] < 0.5
    assert is_low is (run.folder.name != "tuned")
    command = f"python lct_dino3.py prototypes --run {run.folder} --target_precision 0.8 --unknown_share 0.05"
    assert lines[last + 6 :] == [
        *([] if run.options["unknown_dir"] else [lines[last + 6]]),
        *([f"most stay `unknown`: {command} asks for less"] if is_low else []),
        f"finished: {run.folder / 'prototypes.npz'}, {run.folder / 'report.html'}",
    ]
    assert ("--unknown_dir" in lines[last + 6]) is (run.options["unknown_dir"] is None)


def test_views_are_compared_over_the_test_crops_that_have_both(runs: Callable[[str], Run]) -> None:
    run = runs("mix")
    test, recorded = run.crops("test"), run.event("test_views")
    queries, answers = run.vectors(run.best, "test"), {}
    for view, name in enumerate(("bbox", "mask")):
        chosen = test.has_mask & (test.views == view)
        scores = run.scores(queries[chosen])
        figures = judge(scores / run.meta["temperature"], test.labels[chosen])
        assert {key: recorded[name][key] for key in ("acc", "f1_macro", "auc_macro")} == approx(
            {key: figures[key] for key in ("acc", "f1_macro", "auc_macro")}
        )
        answers[name] = scores.argmax(axis=1)
    assert recorded["images"] == len(answers["bbox"]) < 75
    assert recorded["disagree"] == int((answers["bbox"] != answers["mask"]).sum()) > 0


# --- calibration


def least_threshold(
    scores: np.ndarray,
    is_right: np.ndarray,
    precision: float,
    strange: np.ndarray,
    prior: Callable[[float], float] | None = None,
    share: float = 0.2,
) -> float:
    """Return the least score above which the binomial bound at 60 % promises that precision, where the prior counts as ten more.

    The strangers are this share of the objects, whatever their number.
    """
    passing = 1.0
    for score in sorted([*scores, *strange], reverse=True):
        num_right = float(is_right[scores >= score].sum())
        num_answers = (scores >= score).sum() + share / (1 - share) * len(scores) * (strange >= score).mean()
        if prior is not None:
            num_right, num_answers = num_right + 10 * prior(score), num_answers + 10
        num_wrong = num_answers - num_right + (prior is None)
        if num_right and 1 - beta.ppf(0.6, max(num_wrong, 1e-9), num_right) >= precision:
            passing = score
    return float(passing)


def assert_threshold(threshold: float, scores: np.ndarray, expected: float) -> None:
    """It lies below the last score that passes, above the next one, and not far below; above all if none passes."""
    if expected == 1.0:
        assert threshold == pytest.approx(scores.max() + 1e-4, abs=1e-6)
        return
    below = scores[scores < expected - 1e-6].max(initial=-1.0)
    assert threshold == pytest.approx(max(expected - 1e-4, (expected + below) / 2), abs=1e-5)


def calibration_answers(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return class, score and rightness of the answers to val, and the scores of strangers.

    These are one half of --unknown_dir, or what heads without some classes made of these, on the scale of this gallery.
    """
    scores = run.scores(run.vectors(run.best, "val"))
    best, is_right = scores.max(axis=1), scores.argmax(axis=1) == run.crops("val").labels
    if run.options["unknown_dir"]:
        strange = run.scores(run.vectors(run.best, "fit")).max(axis=1)
    else:
        unseen = torch.load(run.folder / "checkpoint_best.pth", weights_only=True)["unseen"]
        middle, low = np.quantile(best, [0.5, 0.1])
        strange = middle + (middle - low) * np.array(unseen["strangers"])
        assert {"1", "5", "20"} == set(unseen["enrolled"]) == set(run.meta["enrolment"])
    assert len(strange) > 10
    return scores.argmax(axis=1), best, is_right, strange


def test_temperature_is_fitted_on_val_alone(run: Run) -> None:
    scores, labels = run.scores(run.vectors(run.best, "val")), run.crops("val").labels
    found = minimize_scalar(
        lambda log_t: judge(scores / math.exp(log_t), labels)["loss"],
        bounds=(math.log(0.005), math.log(2)),
        method="bounded",
    )
    assert run.meta["temperature"] == pytest.approx(math.exp(found.x), rel=1e-3)


def test_probabilities_are_fitted_on_val_and_on_strangers_that_the_embedder_has_not_seen(run: Run) -> None:
    _, best, is_right, strange = calibration_answers(run)
    every, expected = expected_probabilities(best, is_right, strange)
    np.testing.assert_allclose(probability_of(run, every), expected, atol=2e-3)


def expected_probabilities(
    known: np.ndarray, is_right: np.ndarray, strange: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return all scores, and what scikit-learn makes of them when strangers weigh a fifth."""
    every = np.append(known, strange)
    weights = np.repeat([1, len(known) / 4 / len(strange)], [len(known), len(strange)])
    standardised = (every[:, None] - every.mean()) / every.std()
    classifier = LogisticRegression().fit(standardised, np.append(is_right, np.zeros(len(strange), bool)), weights)
    return every, classifier.predict_proba(standardised)[:, 1]


def test_thresholds_are_fitted_on_val_and_on_strangers_that_are_a_fifth_of_all(run: Run) -> None:
    answers, best, is_right, strange = calibration_answers(run)
    precision = run.options["target_precision"]

    def prior(score: float) -> float:
        passed = (best >= score).mean()
        return 0.8 * is_right[best >= score].sum() / len(best) / (0.8 * passed + 0.2 * (strange >= score).mean())

    is_pooled = np.bincount(answers, minlength=5) < 20
    assert run.meta["pooled_thresholds"] == [run.class_names[label] for label in np.flatnonzero(is_pooled)]
    for label, threshold in enumerate(run.gallery["thresholds"].tolist()):
        mine = answers == label
        if is_pooled[label]:
            assert_threshold(threshold, np.append(best, strange), least_threshold(best, is_right, precision, strange))
        else:
            expected = least_threshold(best[mine], is_right[mine], precision, strange, prior)
            assert_threshold(threshold, np.append(best[mine], strange), expected)
    for target, threshold in zip((0.9, 0.95, 0.99), run.meta["val_thresholds"], strict=True):
        assert_threshold(threshold, np.append(best, strange), least_threshold(best, is_right, target, strange))


def test_the_share_of_unknown_objects_can_be_changed_afterwards(
    runs: Callable[[str], Run], tmp_path: Path, call_main: Callable
) -> None:
    """Thresholds and probabilities follow; where there are no unknown objects, strangers say nothing."""
    run = runs("plain")
    shutil.copytree(run.folder, tmp_path / "run")
    _, best, is_right, strange = calibration_answers(run)
    same = ("--run", tmp_path / "run", "--gpus", 0, "--workers", 0, "--precision", "fp32")
    surest = probability_of(run, best).mean()
    for share in (0.05, 0.0):
        assert call_main("prototypes", "--unknown_share", share, *same) == 0
        new = Run(tmp_path / "run")
        for target, threshold in zip((0.9, 0.95, 0.99), new.meta["val_thresholds"], strict=True):
            own = strange if share else np.array([-9.0])
            expected = least_threshold(best, is_right, target, own, share=share)
            assert_threshold(threshold, np.append(best, own), expected)
        assert new.meta["val_thresholds"][0] < run.meta["val_thresholds"][0]
        assert new.meta["unknown_share"] == share and probability_of(new, best).mean() > surest
        surest = probability_of(new, best).mean()
        assert all(found["figures"] is None for found in new.meta["enrolment"].values()), "measured at another share"
        assert call_main("evaluate", *same) == 0
        assert json.loads((tmp_path / "run" / "evaluation.json").read_text("utf-8"))["unknown_share"] == share


# --- figures of the gallery


def share_that_passes(passed: np.ndarray, is_right: np.ndarray) -> dict[str, float | None]:
    return {"coverage": passed.mean(), "precision": is_right[passed].mean() if passed.any() else None}


def measure(run: Run, split: str = "test") -> dict[str, dict[str, float | None]]:
    """Return what is measured of a gallery: on a split, and on the half of the strangers that set no threshold."""
    crops, queries = run.crops(split), run.vectors(run.best, split)
    gallery, labels, scores = run.gallery, crops.labels, run.scores(queries)
    answers, best = scores.argmax(axis=1), scores.max(axis=1)
    is_right = answers == labels
    cosine = queries @ gallery["stacks"].T
    hits = gallery["stack_labels"][np.argsort(-cosine, axis=1, kind="stable")] == labels[:, None]
    sizes = np.bincount(gallery["stack_labels"])
    average = [
        sum(row[: rank + 1].mean() for rank in range(sizes[label]) if row[rank]) / sizes[label]
        for row, label in zip(hits, labels, strict=True)
    ]
    knn = mean_of_nearest(queries, gallery["stacks"], gallery["stack_labels"], gallery["knn_counts"]).argmax(axis=1)
    centroid = (queries @ gallery["centroids"].T).argmax(axis=1)
    figures = {
        **{
            f"closed {name}": {"acc": accuracy_score(labels, own), "f1_macro": f1_score(labels, own, average="macro")}
            for name, own in (("knn", knn), ("centroid", centroid))
        },
        "retrieval": {
            "recall_at_1": hits[:, 0].mean(),
            "recall_at_5": hits[:, :5].any(axis=1).mean(),
            "map_at_r": np.mean(average),
        },
        "thresholds": share_that_passes(best >= gallery["thresholds"][answers], is_right),
        **{
            f"answers {index}": share_that_passes(best >= threshold, is_right)
            for index, threshold in enumerate(run.meta["val_thresholds"])
        },
    }  # fmt: skip
    if run.options["unknown_dir"]:
        strange = run.scores(run.vectors(run.best, "measure"))
        passed = strange.max(axis=1) >= gallery["thresholds"][strange.argmax(axis=1)]
        known_passed = best >= gallery["thresholds"][answers]
        share = 0.8 * known_passed.mean() + 0.2 * passed.mean()
        mixed = 0.8 * (known_passed & is_right).mean() / share
        figures["unknown_passed"] = {"unknown_passed": passed.mean()}
        figures["mixed_precision"] = {"mixed_precision": mixed}
        figures["open_set"] = separate(best, strange.max(axis=1))
        strange = strange.max(axis=1)
    else:  # each class in turn is taken out, and its images are the strangers
        parts = []
        for label in range(len(run.class_names)):
            rest = np.delete(scores, label, axis=1).max(axis=1)
            parts.append(separate(rest[labels != label], rest[labels == label]))
        figures["open_set"] = {name: np.mean([part[name] for part in parts]) for name in ("auroc", "fpr95")}
        strange = np.where(np.arange(len(run.class_names)) == labels[:, None], -1, scores).max(axis=1)
    claimed = probability_of(run, np.append(best, strange))
    weights = np.repeat([0.8 / len(best), 0.2 / len(strange)], [len(best), len(strange)])
    excess = weights * (claimed - np.append(is_right, np.zeros(len(strange))))
    figures["probabilities"] = {"ece": np.abs(np.bincount(np.clip((10 * claimed).astype(int), 0, 9), excess)).sum()}
    return figures


def probability_of(run: Run, scores: np.ndarray, label: int = 0) -> np.ndarray:
    slope, intercept = run.gallery["log_odds"][label]
    return 1 / (1 + np.exp(-(slope * scores + intercept)))


def separate(known: np.ndarray, strange: np.ndarray) -> dict[str, float]:
    """Return how well a score tells known objects from strangers."""
    is_known = np.repeat([True, False], [len(known), len(strange)])
    threshold = np.sort(known)[math.floor(0.05 * len(known))]  # at or above it lie 95 % of the known ones
    return {"auroc": roc_auc_score(is_known, np.concatenate([known, strange])), "fpr95": (strange >= threshold).mean()}


def values_of(recorded: dict) -> dict[str, dict[str, float | None]]:
    """Return the values of `measured` or of evaluation.json, in the shape of `measure`."""
    found = {f"closed {name}": own for name, own in recorded["closed"].items()}
    found |= {name: recorded[name] for name in ("retrieval", "thresholds", "open_set")}
    found |= {f"answers {index}": own for index, own in enumerate(recorded["answers"])}
    found |= {name: {name: recorded[name]} for name in ("unknown_passed", "mixed_precision") if name in recorded}
    found["probabilities"] = {"ece": {"value": recorded["ece"]}}
    return {
        group: {key: own["value"] for key, own in figures.items() if isinstance(own, dict) and "value" in own}
        for group, figures in found.items()
    }


def test_the_gallery_is_measured_on_what_was_not_tuned_on(run: Run) -> None:
    expected = measure(run)
    assert 0.05 < expected["thresholds"]["coverage"] < 0.95
    recorded = values_of(run.event("measured"))
    assert recorded == {group: approx(figures) for group, figures in expected.items()}


def test_other_ways_to_tell_strangers_are_those_of_the_same_images(runs: Callable[[str], Run]) -> None:
    run = runs("tuned")
    others = {name: {key: own[key]["value"] for key in ("auroc", "fpr95")}
              for name, own in run.event("measured")["open_set"]["others"].items()}  # fmt: skip
    train, best = run.crops("train"), run.best
    pairs = {split: run.embed(best, split) for split in ("test", "measure")}
    features = {split: F.normalize(run.features(best, split)).numpy() for split in ("train", "test", "measure")}
    ways = {
        "fine-tuned backbone, nearest centroid": {
            split: (features[split] @ unit_means(features["train"], train.labels).T).max(axis=1) for split in pairs
        },
        "classifier, highest softmax": {
            split: softmax(run.model(best).logits(own)).max(axis=1) for split, own in pairs.items()
        },
        "trained, nearest reference": {
            split: (own @ run.embed(best, "train").T).max(axis=1) for split, own in pairs.items()
        },
        "fine-tuned backbone, largest logit of logistic regression": {
            split: fit_regression(run.features(best, "train").numpy(), train.labels)
            .decision_function(run.features(best, split).numpy())
            .max(axis=1)
            for split in pairs
        },
    }
    assert others == {name: approx(separate(own["test"], own["measure"])) for name, own in ways.items()}


@pytest.mark.parametrize(("name", "split"), [("plain", "test"), ("mix", "val"), ("tuned", "val")])
def test_evaluate_measures_the_same_as_the_run_itself(
    runs: Callable[[str], Run], call_main: Callable, name: str, split: str
) -> None:
    run = runs(name)
    command = ("evaluate", "--run", run.folder, "--split", split, "--gpus", 0, "--workers", 0)
    assert call_main(*command, "--precision", "fp32") == 0
    written = json.loads((run.folder / "evaluation.json").read_text("utf-8"))
    assert written["images"] == len(np.unique(run.crops(split).rows))
    expected = measure(run, split)
    assert values_of(written) == {group: approx(figures) for group, figures in expected.items()}


def relative_width(run: Run, values: np.ndarray, recorded: dict) -> float:
    """Return how wide an interval is against the 95 % interval of a mean over images, by a bootstrap of its own."""
    rows, rng = run.crops("test").rows, np.random.default_rng(1)
    images = [np.flatnonzero(rows == row) for row in np.unique(rows)]
    means = [
        values[np.concatenate([images[i] for i in rng.integers(0, len(images), len(images))])].mean()
        for _ in range(3000)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return (recorded["interval"][1] - recorded["interval"][0]) / (high - low)


def test_intervals_hold_95_percent_of_draws_of_images(runs: Callable[[str], Run]) -> None:
    """Of 90 % they would be a sixth narrower."""
    widths: dict[str, list[float]] = {}
    for name in HARD_RUNS:
        run = runs(name)
        queries, labels, gallery = run.vectors(run.best, "test"), run.crops("test").labels, run.gallery
        recorded = run.event("measured")
        references, of_reference = gallery["stacks"], gallery["stack_labels"]
        knn = mean_of_nearest(queries, references, of_reference, gallery["knn_counts"]).argmax(axis=1)
        answers = {
            ("closed", "centroid", "acc"): (queries @ gallery["centroids"].T).argmax(axis=1),
            ("closed", "knn", "acc"): knn,
            ("retrieval", "recall_at_1"): of_reference[(queries @ references.T).argmax(axis=1)],
        }
        for keys, own in answers.items():
            figure = functools.reduce(lambda tree, key: tree[key], keys, recorded)
            widths.setdefault(name, []).append(relative_width(run, (own == labels).astype(float), figure))
    assert np.mean([width for own in widths.values() for width in own]) == pytest.approx(1, abs=0.08), widths


def test_two_views_of_an_image_are_one_image_in_the_intervals(
    runs: Callable[[str], Run], tmp_path: Path, call_main: Callable
) -> None:
    """Under masks that cover all but a corner both views get the same answer: counted as two images, 0.71 of the width is left."""
    run, mask = runs("mix"), Image.new("L", (44, 36), 255)
    mask.putpixel((0, 0), 0)
    shutil.copytree(run.options["data_root"], tmp_path / "data")
    for path in (tmp_path / "data").glob("*/cropped/*.png"):
        mask.save(path.parents[1] / "masks" / f"{path.stem}_mask.png")
    shutil.copytree(tmp_path / "data" / "hammer", tmp_path / "data" / "of no class")
    shutil.copytree(run.folder, tmp_path / "run")
    command = ("evaluate", "--run", tmp_path / "run", "--data_root", tmp_path / "data", "--gpus", 0, "--workers", 0)
    assert call_main(*command, draws=500) == 0
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text("utf-8"))
    for matcher in ("centroid", "knn"):
        accuracy, (low, high) = (written["closed"][matcher]["acc"][key] for key in ("value", "interval"))
        expected = 2 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 300)
        assert written["images"] == 300 and (high - low) / expected == pytest.approx(1, abs=0.14)
    passed, (low, high) = (written["unknown_passed"][key] for key in ("value", "interval"))
    expected = 2 * 1.96 * math.sqrt(passed * (1 - passed) / 60)
    assert written["open_set"]["unknowns"] == 60 and (high - low) / expected == pytest.approx(1, abs=0.14)


# --- splits


def test_what_the_regex_captures_never_straddles_splits(run: Run) -> None:
    """The number before it, which is part of the match, is another for each frame."""
    places: dict[str, set[str]] = {}
    frames: dict[str, int] = {}
    for split in SPLITS:
        for paths in run.splits[split].values():
            for path in paths:
                shot = re.search(run.options["group_regex"], Path(path).name)[1]
                places.setdefault(shot, set()).add(split)
                frames[shot] = frames.get(shot, 0) + 1
    assert sum(count == 2 for count in frames.values()) == 60
    assert [shot for shot, found in places.items() if len(found) > 1] == []


# --- a run that is used later


def test_masks_stay_with_their_crops_when_images_have_gone(
    runs: Callable[[str], Run], tmp_path: Path, call_main: Callable
) -> None:
    """References made anew of data of which some has gone, and some has come, are those that were there."""
    run = runs("mix")
    shutil.copytree(run.options["data_root"], tmp_path / "data")
    shutil.copytree(run.folder, tmp_path / "run")
    lost = [run.splits["train"][name][0] for name in run.class_names]
    for path in lost:
        (tmp_path / "data" / path).unlink()
    for number in range(3):
        image, mask = draw_confusable(0.5, 5, np.random.default_rng(number), spread=0.1)
        image.save(tmp_path / "data" / run.class_names[0] / "cropped" / f"000{number}_new.png")
        mask.save(tmp_path / "data" / run.class_names[0] / "masks" / f"000{number}_new_mask.png")
    command = ("prototypes", "--run", tmp_path / "run", "--data_root", tmp_path / "data", "--precision", "fp32")
    assert call_main(*command, "--gpus", 0, "--workers", 0) == 0
    new = Run(tmp_path / "run").gallery
    before, after = (
        dict(
            zip(zip(own["stack_paths"].tolist(), own["stack_views"].tolist(), strict=True), own["stacks"], strict=True)
        )
        for own in (run.gallery, new)
    )
    assert after.keys() == {key for key in before if key[0] not in lost}
    of_head = slice(run.options["emb_dim"])  # features are projected as those images ask for that are left
    for key, vector in after.items():
        own, other = (values[of_head] / np.linalg.norm(values[of_head]) for values in (vector, before[key]))
        np.testing.assert_allclose(own, other, atol=1e-5, err_msg=str(key))


def test_an_enrolled_class_has_the_threshold_and_the_odds_that_heads_without_some_classes_promise(
    runs: Callable[[str], Run], tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    """It cannot have one of its own: what might be taken for it is not known. A gallery of another precision has others."""
    run = runs("plain")
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "new" / "tongs").mkdir(parents=True)
    draw_confusable(0.5, 6, np.random.default_rng(0), spread=0.0)[0].save(tmp_path / "new" / "tongs" / "1.png")
    same = ("--gpus", 0, "--workers", 0, "--precision", "fp32")
    command = ("prototypes", "--run", tmp_path / "run", "--add", tmp_path / "new", *same)
    assert call_main(*command) == 0
    thresholds = Run(tmp_path / "run").gallery["thresholds"]
    np.testing.assert_array_equal(thresholds[:5], run.gallery["thresholds"])
    best = run.scores(run.vectors(run.best, "val")).max(axis=1)
    middle, low = np.quantile(best, [0.5, 0.1])
    unseen = torch.load(run.folder / "checkpoint_best.pth", weights_only=True)["unseen"]
    enrolled = unseen["enrolled"]["1"]
    scores = (middle + (middle - low) * np.array(enrolled["scores"])).astype(np.float32)
    is_right = np.array(enrolled["is_right"])
    strange = calibration_answers(run)[3]
    expected = least_threshold(scores, is_right, run.options["target_precision"], strange)
    assert_threshold(thresholds[5], np.append(scores, strange), expected)
    every, expected = expected_probabilities(scores, is_right, strange)
    grown = Run(tmp_path / "run")
    np.testing.assert_allclose(probability_of(grown, every, 5), expected, atol=2e-3)
    np.testing.assert_array_equal(grown.gallery["log_odds"][:5], run.gallery["log_odds"])
    assert np.abs(probability_of(grown, every, 5) - probability_of(grown, every)).max() > 0.02, "others than before"
    said = capsys.readouterr().out
    assert "threshold of tongs, 1 crop: " in said and "where 85% were asked" in said
    assert call_main(*command, "--target_precision", "0.6") == 2
    remedy = capsys.readouterr().err.partition("first: python lct_dino3.py ")[2].split()
    assert call_main(*remedy, *same) == 0
    assert call_main(*command) == 0
    expected = least_threshold(scores, is_right, 0.6, strange)
    assert_threshold(Run(tmp_path / "run").gallery["thresholds"][5], np.append(scores, strange), expected)


def test_crops_of_an_enrolled_class_that_come_later_count_as_if_they_had_come_at_once(
    runs: Callable[[str], Run], tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    run, rng = runs("plain"), np.random.default_rng(0)
    (tmp_path / "new" / "tongs").mkdir(parents=True)
    galleries = []
    for name, numbers in (("twice", range(1)), ("twice", range(1, 5)), ("once", ())):
        if not (tmp_path / name).exists():
            shutil.copytree(run.folder, tmp_path / name)
        for number in numbers:
            draw_confusable(0.5, 6, rng, spread=0.0)[0].save(tmp_path / "new" / "tongs" / f"{number}.png")
        command = ("prototypes", "--run", tmp_path / name, "--add", tmp_path / "new", "--gpus", 0, "--workers", 0)
        assert call_main(*command) == 0
        galleries.append(Run(tmp_path / name).gallery)
    assert capsys.readouterr().out.count("threshold of tongs, 5 crops: ") == 2
    first, twice, once = galleries
    assert first["thresholds"][5] != once["thresholds"][5]
    for name in ("thresholds", "log_odds", "knn_counts", "offsets", "centroids"):
        np.testing.assert_allclose(twice[name], once[name], atol=1e-6, err_msg=name)


def test_a_best_checkpoint_that_is_gone_is_found_again_among_those_of_its_own_epoch(
    runs: Callable[[str], Run], tmp_path: Path, call_main: Callable
) -> None:
    """All later ones know which epoch was the best, and have other weights. The run was begun by a script that measured less."""
    run = runs("cached")
    shutil.copytree(run.folder, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    events = list(map(json.loads, metrics.read_text("utf-8").splitlines()))
    for event in events:
        event.pop("unknown_share", None)
    metrics.write_text("".join(f"{json.dumps(event)}\n" for event in events), "utf-8")
    for name in ("checkpoint_best.pth", "prototypes.npz"):
        (tmp_path / "run" / name).unlink()
    places = ("--data_root", run.options["data_root"], "--out_dir", tmp_path / "run")
    places += ("--backbone_weights", run.options["backbone_weights"])
    late = tmp_path / "run" / f"checkpoint_ep{len(run.val) - 1:03d}.pth"
    assert call_main(*places, *HARD_RUN, *HARD_RUNS["cached"].split(), "--resume", late) == 0
    np.testing.assert_array_equal(Run(tmp_path / "run").gallery["stacks"], run.gallery["stacks"])
    last = (tmp_path / "run" / "train.log").read_text("utf-8").splitlines()[-3]
    assert "unknown objects that get a class all the same: not measured" in last


def test_the_review_page_begins_with_the_least_certain_answers(
    runs: Callable[[str], Run], tmp_path: Path, call_main: Callable[..., int]
) -> None:
    """An answer may become another, or `unknown`; what is unknown can only become known."""
    run, out = runs("tuned"), tmp_path / "out"
    (tmp_path / "images").mkdir()
    crops = [Path(run.options["data_root"]) / path for path in run.crops("test").paths]
    for number, path in enumerate([*crops, *Path(run.options["unknown_dir"]).rglob("*.png")]):
        shutil.copy(path, tmp_path / "images" / f"{number:03d}.png")
    command = ("prelabel", "--run", run.folder, "--images", tmp_path / "images", "--out", out, "--formats", "csv")
    assert call_main(*command, "--gpus", 0, "--workers", 0) == 0
    with open(out / "objects.csv", encoding="utf-8", newline="") as file:
        rows = [{key: float(row[key]) for key in ("cosine", "threshold", "margin")} for row in csv.DictReader(file)]
    doubts = [
        min(row["cosine"] - row["threshold"], row["margin"])
        if row["cosine"] >= row["threshold"]
        else row["threshold"] - row["cosine"]
        for row in rows
    ]
    assert any(row["cosine"] < row["threshold"] and row["margin"] < row["threshold"] - row["cosine"] for row in rows)
    shown = [float(text) for text in re.findall(r"<small>([\d.]+) ", (out / "review.html").read_text("utf-8"))]
    assert len(rows) == 115 and len(shown) > 30
    assert shown == pytest.approx(sorted(doubts)[: len(shown)], abs=6e-4)


# --- answer by answer


def read_predictions(run: Run, name: str = "predictions.csv") -> list[dict[str, str]]:
    with open(run.folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check_predictions(run: Run, rows: list[dict[str, str]], crops: Crops, chosen: np.ndarray) -> None:
    """Compare answers with those that the gallery gives to the chosen test crops."""
    queries, gallery, names = run.vectors(run.best, "test"), run.gallery, run.class_names
    scores, similarity = run.scores(queries), queries @ gallery["stacks"].T
    probabilities = probability_of(run, scores)
    found = {(row["path"], row["view"]): row for row in rows}
    keys = [(crops.paths[i], ("bbox", "mask")[crops.views[i]]) for i in chosen]
    assert len(rows) == len(found) and found.keys() == set(keys)
    for i, key in zip(chosen.tolist(), keys, strict=True):
        row, label = found[key], crops.labels[i]
        second, answer = np.argsort(scores[i])[-2:]
        assert (row["class"], row["answer"], row["runner_up"]) == (names[label], names[answer], names[second])
        assert row["is_unknown"] == str(bool(scores[i, answer] < gallery["thresholds"][answer])).lower()
        figures = {
            "cosine": scores[i, answer],
            "probability": probabilities[i, answer],
            "runner_up_cosine": scores[i, second],
            "class_cosine": scores[i, label],
        }
        assert {name: float(row[name]) for name in figures} == {
            name: pytest.approx(value, abs=1e-3) for name, value in figures.items()
        }
        for name, of_class in (("nearest_reference", answer), ("nearest_of_class", label)):
            nearest = np.where(gallery["stack_labels"] == of_class, similarity[i], -2.0).argmax()
            view = ("bbox", "mask")[gallery["stack_views"][nearest]]
            assert (row[name], row[f"{name}_view"]) == (gallery["stack_paths"][nearest], view)
        assert Path(row["mask"]).stem.startswith(Path(key[0]).stem) if key[1] == "mask" else True
    shots = [re.search(run.options["group_regex"], Path(row["path"]).name)[1] for row in rows]
    groups = [row["group"] for row in rows]
    assert len({*zip(shots, groups, strict=True)}) == len({*shots}) == len({*groups}) > 1


def test_predictions_are_the_answers_to_the_test_crops(run: Run) -> None:
    crops, rows = run.crops("test"), read_predictions(run)
    check_predictions(run, rows, crops, np.arange(len(crops.paths)))
    accuracy = np.mean([row["class"] == row["answer"] for row in rows])
    assert accuracy == pytest.approx(run.event("test_end")["prototypes"]["acc"])
    assert {row["is_unknown"] for row in rows} == {"true", "false"}


def test_predictions_by_view_are_those_of_crops_that_have_both(runs: Callable[[str], Run]) -> None:
    run = runs("mix")
    crops = run.crops("test")
    check_predictions(run, read_predictions(run, "predictions_by_view.csv"), crops, np.flatnonzero(crops.has_mask))


def test_the_embeddings_are_those_of_the_best_epoch(run: Run) -> None:
    with np.load(run.folder / "embeddings.npz", allow_pickle=False) as content:
        saved = {name: content[name] for name in content.files}
    assert saved["class_names"].tolist() == run.class_names
    assert saved["embeddings"].dtype == np.float32 and set(saved["splits"].tolist()) == set(SPLITS)
    for split in SPLITS:
        crops, chosen = run.crops(split), saved["splits"] == split
        keys = list(zip(crops.paths, crops.views.tolist(), strict=True))
        order = [keys.index(key) for key in zip(saved["paths"][chosen], saved["views"][chosen].tolist(), strict=True)]
        assert sorted(order) == list(range(len(keys)))
        assert saved["labels"][chosen].tolist() == crops.labels[order].tolist()
        np.testing.assert_allclose(saved["embeddings"][chosen], run.vectors(run.best, split)[order], atol=1e-5)
