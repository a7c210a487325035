"""Section 15: what an embedding makes of classes that it was not trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

import lct_dino3 as lct

NUM_CLASSES, PER_CLASS = 10, 24
SPLITS = np.array([0] * 14 + [1] * 5 + [2] * 5)  # of the images of a class: train, val, test


def make_job(epochs: int = 6) -> lct.Job:
    paths = [f"class{label}/{number}.jpg" for label in range(NUM_CLASSES) for number in range(PER_CLASS)]
    labels = np.repeat(np.arange(NUM_CLASSES, dtype=np.int32), PER_CLASS)
    splits = np.tile(SPLITS, NUM_CLASSES).astype(np.int8)
    names = tuple(f"class{label}" for label in range(NUM_CLASSES))
    records = lct.Records(Path(), names, paths, labels, np.arange(len(paths), dtype=np.int32), splits)
    config = lct.Config(epochs=epochs, batch=16, emb_dim=32, heads=2, lr=1e-2)
    info = lct.BackboneInfo("test_vit", "random", "0", 16, 32, "token", (0.5,) * 3, (0.5,) * 3, "bicubic, antialiased")
    return lct.Job(config, records, lct.Runtime(torch.device("cpu"), 0, torch.float32), None, info)


def draw_features(job: lct.Job, spread: float) -> dict[str, lct.Embedded]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(NUM_CLASSES, 16))
    values = (centres[job.records.labels] + spread * rng.normal(size=(len(job.records.paths), 16))).astype(np.float32)
    features = {}
    for split in lct.SPLIT_NAMES:
        rows = job.records.rows(split)
        labels = job.records.labels[rows].astype(np.int64)
        features[split] = lct.Embedded(rows, np.zeros(len(rows), np.uint8), labels, values[rows])
    return features


def test_a_head_sees_nothing_of_the_classes_that_it_is_trained_without() -> None:
    job = make_job()
    train = draw_features(job, 0.5)["train"]
    seen = np.array([0, 2, 3, 5, 6, 7, 8, 9])
    heads = []
    for poison in (np.float32(0), np.float32(np.nan)):
        values = train.values.copy()
        values[~np.isin(train.labels, seen)] += poison
        heads.append(lct.train_without(job, train._replace(values=values), seen).state_dict())
    assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())
    assert heads[0]["criterion.weight"].shape[0] % len(seen) == 0


@pytest.mark.parametrize(("spread", "least"), [(0.2, 0.9), (3.0, 0.0)])
def test_unseen_classes_are_measured_in_five_folds(spread: float, least: float, patch_used: Callable) -> None:
    job = make_job()
    enrolment = patch_used(lct, "measure_enrolment")
    figures, scores = lct.measure_unseen(job, draw_features(job, spread))
    assert figures["classes"] == list(job.records.class_names), "each is left out once"
    assert figures["images"] == NUM_CLASSES * 10, "val and test"
    assert figures["open_set"]["trained_on_them"] is False
    aurocs = [
        figures["open_set"]["auroc"]["value"],
        *(way["auroc"]["value"] for way in figures["open_set"]["others"].values()),
    ]
    assert [at["crops"] for at in figures["enrolment"]] == [1, 5, 20]
    if least:
        assert figures["known_acc"] > least and min(aurocs) > 0.8
        assert figures["enrolment"][1]["new"] >= figures["enrolment"][0]["new"] > 0.5
        assert figures["unknown_passed"]["value"] < 0.4 and figures["ece"] < 0.15
        assert all(at["precision"] > 0.9 and at["recall"] > 0.8 for at in figures["enrolment"])
    else:  # nothing to be told: what is near chance must not look like more
        assert abs(np.mean(aurocs) - 0.5) < 0.15 and figures["enrolment"][2]["new"] < 0.5
        assert all(at["recall"] < 0.1 for at in figures["enrolment"]), "no threshold makes guesses right"
    assert len(scores["strangers"]) == 201 and scores["strangers"] == sorted(scores["strangers"])
    for at, kept in zip(figures["enrolment"], scores["enrolled"].values(), strict=True):
        assert kept["figures"] == at and len(kept["scores"]) == len(kept["is_right"]) > 0
    heads, _, is_test, *_ = enrolment.calls[0]
    found = [at["answers"] * (at["precision"] or 0.0) for at in figures["enrolment"]]
    np.testing.assert_allclose(found, [at["recall"] * is_test.sum() for at in figures["enrolment"]], atol=1)
    strangers = np.concatenate([head.scores[head.is_unseen & ~is_test] for head in heads])
    assert (scores["strangers"][0], scores["strangers"][-1]) == (strangers.min(), strangers.max())
    for head in heads:  # known val images lie around 0, also once a gallery of nearest references matches by centroids
        medians = [np.median(own[0][~head.is_unseen & ~is_test]) for own, *_ in head.enrolled.values()]
        np.testing.assert_allclose(medians, 0, atol=0.5)
        assert len(np.unique(head.enrolled[5][0], axis=0)) == lct.ENROLMENT_DRAWS, "each draw has other crops"
    low, high = figures["unknown_passed"]["interval"]
    assert 0 <= low <= figures["unknown_passed"]["value"] <= high <= 1


def test_thresholds_of_a_head_are_set_with_the_strangers_of_the_others(patch_used: Callable) -> None:
    """Else they would be judged by what they were set with; strangers are a fifth of the objects, for enrolled classes too."""
    job = make_job()
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, target_precision=0.85))
    enrolment = patch_used(lct, "measure_enrolment")
    figures, _ = lct.measure_unseen(job, draw_features(job, 1.2))
    heads, _, is_test, *_ = enrolment.calls[0]
    known_passed, passed, right = [], [], []
    found: dict[int, list[bool]] = {1: [], 5: [], 20: []}
    for head in heads:
        rest = [other for other in heads if other is not head]
        strange = np.concatenate([other.scores[other.is_unseen & ~is_test] for other in rest])
        is_val, is_known, is_strange = (
            mask for mask in (~head.is_unseen & ~is_test, ~head.is_unseen & is_test, head.is_unseen & is_test)
        )
        answers = lct.Answers(head.scores[is_val], head.is_right[is_val], strange, 0.2)
        thresholds = lct.fit_thresholds(head.classes[is_val], answers, 0.85, NUM_CLASSES, torch.float32)[0]
        is_accepted = head.scores >= thresholds[head.classes]
        known_passed += is_accepted[is_known].tolist()
        right += (is_accepted & head.is_right)[is_known].tolist()
        passed += is_accepted[is_strange].tolist()
        for crops, own in found.items():
            evidence = lct.Answers(*lct.answers_of_enrolled(rest, is_test, crops), strange, 0.2)
            threshold = lct.precision_threshold(evidence, 0.85)
            for scores, is_new, is_right in zip(*head.enrolled[crops], strict=True):
                own += is_right[is_test & is_new & (scores >= threshold)].tolist()
    assert 0.1 < np.mean(passed) < 0.7 < np.mean(known_passed)
    assert figures["unknown_passed"]["value"] == pytest.approx(np.mean(passed))
    mixed = 0.8 * np.mean(right) / (0.8 * np.mean(known_passed) + 0.2 * np.mean(passed))
    assert figures["mixed_precision"]["value"] == pytest.approx(mixed)
    assert ", if 20% of all objects are unknown" in lct.format_unknown(figures), "whatever a later start says"
    for at in figures["enrolment"]:
        own = found[at["crops"]]
        assert (at["answers"], at["precision"]) == (
            math.ceil(len(own) / 3),
            pytest.approx(np.mean(own)) if own else None,
        )
    assert sum(map(len, found.values())) > 50


def test_galleries_that_choose_nearest_references_know_how_centroids_answer() -> None:
    job = make_job()
    matchers = set()
    for spread in (0.5, 1.5, 2.0):
        features = draw_features(job, spread)
        model = lct.train_without(job, features["train"], np.arange(NUM_CLASSES))
        gallery, _ = lct.export_gallery(model, job.records, features, job.config, {})
        matchers.add(gallery.matcher)
        assert bool(gallery.by_centroid) == (gallery.matcher == "knn")
        asked = dataclasses.replace(job.config, matcher="centroid")
        by_centroid, _ = lct.export_gallery(model, job.records, features, asked, {})
        for name in (*lct.CALIBRATED, "matcher"):
            own, other = (getattr(one, name) for one in (lct.match_by_centroid(gallery), by_centroid))
            assert np.array_equal(own, other) or gallery.matcher == "prototypes", name
        asked = dataclasses.replace(job.config, matcher="knn")
        assert lct.export_gallery(model, job.records, features, asked, {})[0].by_centroid == {}, "as it was asked for"
    assert {"centroid", "knn"} <= matchers


@pytest.mark.parametrize("num_answers", [0, 1, 4])
def test_an_answer_in_one_of_three_draws_is_not_none(num_answers: int) -> None:
    """Else the page would say that a precision stands on no answer."""
    is_test = np.arange(20) >= 10
    is_unseen = np.arange(20) % 2 == 0
    scores, found = np.full((3, 20), 0.5), np.tile(is_unseen, (3, 1))
    scores[:, is_test] = 0.0
    scores.reshape(-1)[np.flatnonzero(found & is_test)[:num_answers]] = 1.0
    head = lct.UnseenHead(scores[0], is_unseen, is_unseen, is_unseen, scores[0], {1: (scores, found, found)})
    figures = lct.measure_enrolment([head, head], [np.zeros(0)] * 2, is_test, 1, lct.Config(target_precision=0.5))
    assert figures["answers"] == math.ceil(2 * num_answers / 3)  # of two heads, by three draws
    assert (figures["precision"] is None) == (num_answers == 0)


def test_shots_of_one_session_are_found_across_the_split() -> None:
    """Five test images, each a little beside a training image; the others are as far from all as any two images."""
    job = make_job()
    features = draw_features(job, 30.0)
    rng = np.random.default_rng(1)
    train, test = features["train"], features["test"]
    test.values[3:8] = train.values[50:55] + 3.0 * rng.normal(size=(5, 16)).astype(np.float32)
    test.values[:] = 100 + 7 * test.values  # neither where features lie nor how wide they are counts
    train.values[:] = 100 + 7 * train.values
    found = lct.find_sessions(job, features)
    burst = {job.records.paths[test.rows[3 + i]]: job.records.paths[train.rows[50 + i]] for i in range(5)}
    assert burst.items() <= {path: pair["train"] for path, pair in found.items()}.items()
    scaled = [StandardScaler().fit(train.values).transform(part.values) for part in (test, train)]
    best = cosine_similarity(*scaled).max(axis=1)
    assert len(found) == (best >= 0.8).sum() < 15
    cosines = [pair["cosine"] for pair in found.values()]
    assert cosines == sorted(cosines, reverse=True) == pytest.approx(np.sort(best[best >= 0.8])[::-1], abs=1e-5)
    noisy = test._replace(values=test.values + 60 * rng.normal(size=test.values.shape).astype(np.float32))
    of_two_views = lct.find_sessions(job, {"train": train, "test": lct.concatenate_embedded([noisy, test])})
    cosines = [pair["cosine"] for pair in of_two_views.values()]
    assert cosines == sorted(cosines, reverse=True)
    assert all(of_two_views[path]["cosine"] >= pair["cosine"] for path, pair in found.items())
    assert lct.find_sessions(job, {"train": train}) == {}


def test_accumulated_batches_are_one_to_the_heads_too() -> None:
    job = make_job(epochs=2)
    train = draw_features(job, 0.5)["train"]
    configs = [dataclasses.replace(job.config, batch=32 // steps, accumulate_grad_batches=steps) for steps in (1, 4)]
    whole, split = (lct.train_without(dataclasses.replace(job, config=own), train, np.arange(8)) for own in configs)
    assert all(torch.equal(value, split.state_dict()[key]) for key, value in whole.state_dict().items())


def test_beyond_many_classes_no_regression_is_fitted(patch_used: Callable) -> None:
    patch_used(lct, "LOGREG_MAX_CLASSES", NUM_CLASSES - 1)
    job = make_job(epochs=2)
    assert lct.measure_unseen(job, draw_features(job, 0.5))[0]["open_set"]["others"] == {}


def test_where_there_is_too_little_nothing_is_measured() -> None:
    job = make_job()
    features = draw_features(job, 0.2)
    assert lct.measure_unseen(job, {split: features[split] for split in ("train", "val")}) == ({}, {})
    for split in lct.SPLIT_NAMES:  # as in folders that people have filled: one class alone
        of_one_class = {split: features[split].take(features[split].labels == 0)}
        assert lct.measure_unseen(job, features | of_one_class) == ({}, {})
        long = make_job(epochs=120)  # there is time for one head alone, and no image of a class that it leaves out
        folds = np.random.default_rng((job.config.seed, 9)).permutation(NUM_CLASSES) % lct.UNSEEN_FOLDS
        of_others = {split: features[split].take(folds[features[split].labels] > 0)}
        assert lct.measure_unseen(long, features | of_others) == ({}, {})
    few = {split: own.take(own.labels < 4) for split, own in features.items()}
    records = job.records
    small = lct.Records(
        records.root,
        records.class_names[:4],
        records.paths[:96],
        records.labels[:96],
        records.groups[:96],
        records.splits[:96],
    )
    assert lct.measure_unseen(lct.Job(job.config, small, job.runtime, None, job.info), few) == ({}, {})


@pytest.mark.filterwarnings("error")
def test_left_out_classes_without_a_val_or_test_image_are_no_figure_and_no_warning() -> None:
    job = make_job(epochs=2)
    features = draw_features(job, 0.5)
    folds = np.random.default_rng((job.config.seed, 9)).permutation(NUM_CLASSES) % lct.UNSEEN_FOLDS
    for split in ("val", "test"):
        features[split] = features[split].take(folds[features[split].labels] != 1)
    figures, _ = lct.measure_unseen(job, features)
    assert figures["images"] == len(features["val"].rows) + len(features["test"].rows)
    assert all(0 < row["new"] <= 1 for row in figures["enrolment"])


def test_the_baseline_of_the_verdict_is_the_best_on_val() -> None:
    """Here another one is better on test, by luck: choosing there would be unfair to training."""
    job = make_job()
    for seed in range(40):
        features = draw_features(job, 2.0)
        order = np.random.default_rng(seed).permutation(len(features["test"].rows))
        features["test"] = features["test"].take(order[:12])
        figures, right = lct.measure_baseline(job, features)
        best, lucky = (lct.best_baseline(figures[split]) for split in ("val", "test"))
        if figures["test"][f"{lucky}_acc"] > figures["test"][f"{best}_acc"]:
            break
    assert figures["test"][f"{lucky}_acc"] > figures["test"][f"{best}_acc"], "no draw shows the difference"
    assert np.mean(list(right.values())) == pytest.approx(figures["test"][f"{best}_acc"])
