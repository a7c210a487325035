"""Section 12: figures against scikit-learn, and what happens where a class is absent."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm
from sklearn import metrics
from sklearn.metrics import roc_auc_score

import lct_dino3 as lct

NAMES = tuple("abcdef")


def draw_scores(num_samples: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_samples)
    logits = rng.normal(size=(num_samples, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return lct.log_softmax(np.round(logits, 1)).astype(np.float32), labels  # rounding makes ties


@pytest.mark.parametrize(("num_samples", "num_classes"), [(400, 2), (400, 6), (40_000, 3)])
def test_figures_equal_scikit_learn(num_samples: int, num_classes: int) -> None:
    """Of many samples too, which another library sorts."""
    scores, labels = draw_scores(num_samples, num_classes)
    figures, per_class = lct.compute_metrics(scores.argmax(axis=1), labels, NAMES[:num_classes], scores)
    predictions = scores.argmax(axis=1)
    assert figures["acc"] == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert figures["f1_macro"] == pytest.approx(metrics.f1_score(labels, predictions, average="macro"))
    one_hot = np.eye(num_classes)[labels]
    expected_auc = metrics.roc_auc_score(one_hot, scores, average=None)
    columns = metrics.precision_recall_fscore_support(labels, predictions, zero_division=0.0)
    for index, name in enumerate(NAMES[:num_classes]):
        row = per_class[name]
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx(
            [c[index] for c in columns]
        )
        assert row["auc"] == pytest.approx(expected_auc[index], abs=1e-6)
    assert figures["auc_macro"] == pytest.approx(expected_auc.mean(), abs=1e-6)


@pytest.mark.parametrize("kind", ["no ties", "infinite", "signed zeros"])
def test_roc_auc_equals_scikit_learn_with_and_without_ties(kind: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    values = (rng.normal(size=500) + labels).astype(np.float32)
    expected = metrics.roc_auc_score(labels, values)
    if kind == "infinite":
        values = np.where(np.abs(values) > 1, np.sign(values) * np.float32(np.inf), values)
        expected = metrics.roc_auc_score(labels, np.clip(values, -1e30, 1e30))
    elif kind == "signed zeros":
        values = np.where(values > 0.5, values, np.where(rng.random(500) < 0.5, np.float32(0), np.float32(-0.0)))
        expected = metrics.roc_auc_score(labels, values)
    scores = np.stack([-values, values], axis=1)
    _, per_class = lct.compute_metrics(labels, labels, ("a", "b"), scores)
    assert [per_class[name]["auc"] for name in "ab"] == pytest.approx([expected, expected], abs=1e-9)


def test_roc_auc_of_scores_that_are_not_numbers_counts_them_as_equal() -> None:
    labels = np.array([0, 1, 0, 1])
    _, per_class = lct.compute_metrics(labels, labels, ("a", "b"), np.full((4, 2), np.nan, np.float32))
    assert [per_class[name]["auc"] for name in "ab"] == [0.5, 0.5]


def test_an_absent_class_is_none_and_leaves_the_means_alone() -> None:
    scores, labels = draw_scores(300, 6)
    labels[labels == 2] = 3
    figures, per_class = lct.compute_metrics(scores.argmax(axis=1), labels, NAMES, scores)
    assert per_class["c"] == {"precision": 0.0, "recall": None, "f1": None, "auc": None, "support": 0}
    present = [0, 1, 3, 4, 5]
    expected = metrics.f1_score(labels, scores.argmax(axis=1), labels=present, average="macro")
    assert figures["f1_macro"] == pytest.approx(expected)
    json.dumps([figures, per_class], allow_nan=False)


def test_a_class_never_answered_has_precision_zero_not_nan() -> None:
    figures, per_class = lct.compute_metrics(np.array([0, 0, 0]), np.array([0, 0, 1]), ("a", "b"))
    assert per_class["b"]["precision"] == 0.0 and per_class["b"]["f1"] == 0.0
    assert figures["acc"] == pytest.approx(2 / 3)


def test_only_one_class_present_has_no_auc() -> None:
    figures, _ = lct.compute_metrics(np.array([0, 1]), np.array([0, 0]), ("a", "b"), np.log([[0.9, 0.1], [0.4, 0.6]]))
    assert figures == {"acc": 0.5, "f1_macro": pytest.approx(2 / 3), "auc_macro": None}


def test_log_softmax_ranks_what_underflows_in_float32() -> None:
    log_probabilities = lct.log_softmax(np.array([[0.0, -200.0, -201.0]], dtype=np.float32))
    assert log_probabilities[0, 1] > log_probabilities[0, 2] > -np.inf
    assert log_probabilities.dtype == np.float64


def draw_units(num: int, num_classes: int, seed: int, spread: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num)
    values = np.random.default_rng(5).normal(size=(num_classes, 12))[labels] + spread * rng.normal(size=(num, 12))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("chunk", [10**9, 500])
def test_retrieval_equals_the_definition_written_as_loops(chunk: int, patch_used: Callable) -> None:
    patch_used(lct, "RETRIEVAL_CHUNK", chunk)
    (stacks, stack_labels), (queries, labels) = draw_units(150, 5, 0), draw_units(60, 5, 1)
    found = lct.retrieval_scores(queries, labels, stacks, stack_labels)
    for i, (query, label) in enumerate(zip(queries, labels.tolist(), strict=True)):
        ranked = stack_labels[np.argsort(-(stacks @ query), kind="stable")] == label
        num_right = int((stack_labels == label).sum())
        average = sum(ranked[: rank + 1].mean() for rank in range(num_right) if ranked[rank]) / num_right
        assert found["map_at_r"][i] == pytest.approx(average)
        assert [found["recall_at_1"][i], found["recall_at_5"][i]] == [float(ranked[0]), float(ranked[:5].any())]
    assert 0.3 < found["map_at_r"].mean() < 0.99 and found["recall_at_1"].mean() < found["recall_at_5"].mean()


def test_a_query_whose_class_has_no_reference_has_no_retrieval_figure() -> None:
    stacks = np.eye(3, dtype=np.float32)
    found = lct.retrieval_scores(stacks, np.array([0, 1, 9]), stacks[:2], np.array([0, 1]))
    assert found["map_at_r"][:2].tolist() == [1.0, 1.0] and all(np.isnan(values[2]) for values in found.values())


def test_open_set_figures_equal_scikit_learn_and_the_definition() -> None:
    rng = np.random.default_rng(0)
    scores = np.round(np.r_[rng.normal(0.6, 0.2, 200), rng.normal(0.3, 0.2, 90)], 2)
    ranks = np.unique(scores, return_inverse=True)[1]
    for known in (np.arange(200), rng.integers(0, 200, 200), np.arange(13)):
        unknown = rng.integers(200, 290, 90)
        figures = lct.open_set_metrics(ranks[known], ranks[unknown])
        truth = np.arange(len(known) + 90) < len(known)
        drawn = scores[np.r_[known, unknown]]
        assert figures["auroc"] == pytest.approx(metrics.roc_auc_score(truth, drawn))
        false, true, _ = metrics.roc_curve(truth, drawn, drop_intermediate=False)
        assert figures["fpr95"] == pytest.approx(false[np.flatnonzero(true >= 0.95)[0]])
    nothing = np.zeros(0, int)
    for pair in ((nothing, ranks), (ranks, nothing)):
        assert all(np.isnan(value) for value in lct.open_set_metrics(*pair).values())


def test_roc_area_is_the_share_of_pairs_in_the_right_order_and_auroc_when_all_is_right() -> None:
    rng = np.random.default_rng(0)
    known, unknown, is_right = np.round(rng.random(40), 1), np.round(rng.random(30), 1), rng.random(40) < 0.7
    pairs = [(k > u) + (k == u) / 2 if right else 0 for k, right in zip(known, is_right, strict=True) for u in unknown]
    assert lct.roc_area(known, unknown, is_right) == pytest.approx(np.mean(pairs))
    truth = np.r_[np.ones(40), np.zeros(30)]
    expected = metrics.roc_auc_score(truth, np.r_[known, unknown])
    assert lct.roc_area(known, unknown) == pytest.approx(expected)


def test_classes_held_out_are_not_answers_while_they_are_unknown() -> None:
    def figures(scores: np.ndarray, unknown: np.ndarray | None = None) -> tuple[float, float]:
        labels = np.arange(len(scores))
        queries = lct.Embedded(labels, labels, labels, scores)
        strangers = None if unknown is None else lct.Embedded(*[len(scores) + np.arange(len(unknown))] * 3, unknown)
        found = lct.open_set_figures(lambda own: own, queries, np.arange(100), strangers)
        for name in ("auroc", "fpr95"):
            value, (low, high) = found[name]["value"], found[name]["interval"] or (0.0, 1.0)
            assert low <= value <= high and (low < high or 0 < value < 1), "never sure, with so few"
        return found["auroc"]["value"], found["fpr95"]["value"]

    scores = np.array([[0.9, 0.1, 0.2], [0.2, 0.8, 0.1], [0.1, 0.3, 0.7]])
    assert figures(scores) == (1.0, 0.0), "held out, each falls to 0.3 or less"
    assert figures(np.full((2, 2), 0.9))[0] == 0.5
    assert figures(scores, np.full((4, 3), 0.75))[1] == 1.0


def test_a_figure_that_draws_of_images_change_keeps_their_interval() -> None:
    """The unknown object lies between two known ones, and above the threshold only if the lowest of these is drawn."""
    known, unknown = np.arange(8) >= 1, np.arange(8) < 1
    confidences = np.array([0.5, 0.4, *[0.9] * 6])
    figures = lct.measure_unknown(np.arange(8), [(confidences, known, unknown)])
    assert figures["fpr95"] == {"value": 1.0, "interval": [0.0, 1.0]}


def test_unknown_objects_are_told_in_each_fold_as_scikit_learn_says() -> None:
    rng = np.random.default_rng(0)
    images = np.arange(60) // 2
    folds = [(rng.random(60) + 0.4 * (images % 3 != fold), images % 3 != fold, images % 3 == fold) for fold in range(3)]
    folds[0][1][:10] = False  # neither known nor unknown: a head was chosen on them
    folds.append((rng.random(60), images >= 0, images < 0))  # without an unknown object: left out of the mean
    figures = lct.measure_unknown(images, folds)
    expected = [
        roc_auc_score(is_known[is_known | is_unknown], confidence[is_known | is_unknown])
        for confidence, is_known, is_unknown in folds[:3]
    ]
    assert figures["auroc"]["value"] == pytest.approx(np.mean(expected))
    assert figures["auroc"]["interval"][0] < figures["auroc"]["value"] < figures["auroc"]["interval"][1]


def test_perfect_separation_is_as_sure_as_the_fewer_objects_allow() -> None:
    images = np.arange(30)
    for known in (images < 7, images >= 7):
        figures = lct.measure_unknown(images, [(known.astype(float), known, ~known)])
        low = proportion_interval(7, 7)[0]
        assert figures["auroc"] == {"value": 1.0, "interval": pytest.approx([low, 1.0], rel=1e-4)}
        assert figures["fpr95"] == {"value": 0.0, "interval": pytest.approx([0.0, 1 - low], rel=1e-4)}
    videos = np.append(np.arange(7), np.arange(23) // 12 + 7)  # 23 frames of two videos are two objects
    figures = lct.measure_unknown(videos, [((images < 7).astype(float), images < 7, images >= 7)])
    assert figures["auroc"]["interval"] == pytest.approx([proportion_interval(2, 2)[0], 1.0], rel=1e-4)


def test_calibration_error_is_that_of_the_definition() -> None:
    """Of known objects, and of strangers that count as a fifth of all."""
    known, strangers = np.array([0.95, 0.91, 1.0, 0.05]), np.array([0.55, 0.93])
    probability, is_right = np.concatenate([known, strangers]), np.array([True, False, True, False, False, False])
    figures = lct.reliability(probability, is_right, np.arange(6) < 4, 0.2)
    bins = figures["reliability"]
    assert [row["share"] for row in bins] == pytest.approx([0.2, 0, 0, 0, 0, 0.1, 0, 0, 0, 0.7])
    high = bins[-1]
    assert high["probability"] == pytest.approx((0.2 * (0.95 + 0.91 + 1.0) + 0.1 * 0.93) / 0.7)
    assert high["right"] == pytest.approx(0.4 / 0.7)
    expected = 0.2 * 0.05 + 0.1 * 0.55 + abs(0.2 * (0.95 + 0.91 + 1.0) + 0.1 * 0.93 - 0.4)
    assert figures["ece"] == pytest.approx(expected)
    only_known = lct.reliability(known, is_right[:4], np.ones(4, bool), 0.2)["reliability"]
    assert [only_known[0]["share"], only_known[-1]["share"]] == pytest.approx([0.25, 0.75])
    assert lct.reliability(np.zeros(0), np.zeros(0, bool), np.zeros(0, bool), 0.2)["ece"] == 0.0


def proportion_interval(num_right: int, count: int) -> tuple[float, float]:
    """Return the interval of Wilson as scipy has it."""
    interval = binomtest(num_right, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def test_precision_threshold_keeps_its_promise_and_ties_together() -> None:
    scores, is_right = np.array([0.9, 0.8, 0.8, 0.7, 0.6]), np.array([True, True, False, True, True])
    for precision, expected in ((1.0, 0.9), (0.6, 0.6), (0.5, 0.6)):
        threshold = lct.precision_threshold(lct.Answers(scores, is_right), precision)
        assert threshold < expected == pytest.approx(threshold, abs=2e-4), "the same picture may round otherwise"
    near = np.array([0.5, 0.49999, 0.49998], np.float32)
    assert (
        near[1] < np.float32(lct.precision_threshold(lct.Answers(near, np.array([True, False, False])), 1.0)) < near[0]
    )
    near[1] = np.nextafter(near[0], np.float32(0))
    assert lct.precision_threshold(lct.Answers(near, np.array([True, False, False])), 1.0) == 0.5
    assert lct.precision_threshold(lct.Answers(np.array([0.5]), np.array([False])), 0.9) > 0.5
    rng = np.random.default_rng(0)
    scores = np.round(rng.random(300), 2)
    is_right = rng.random(300) < scores

    def promised(threshold: float) -> float:  # the precision that the binomial test at 40 % does not reject
        num_right, num_answers = int(is_right[scores >= threshold].sum()), int((scores >= threshold).sum())
        return brentq(lambda share: binom.sf(num_right - 1, num_answers, share) - 0.4, 1e-9, 1 - 1e-9)

    threshold = lct.precision_threshold(lct.Answers(scores, is_right), 0.9)
    assert promised(threshold) >= 0.9
    assert all(promised(lower) < 0.9 for lower in np.unique(scores) if lower < threshold)


def test_eighteen_right_answers_are_the_least_that_promise_95_percent() -> None:
    scores = np.linspace(0.9, 0.5, 18)
    assert lct.precision_threshold(lct.Answers(scores, np.ones(18, bool)), 0.95) < 0.5
    assert lct.precision_threshold(lct.Answers(scores[:17], np.ones(17, bool)), 0.95) > 0.9


@pytest.mark.parametrize(("num_answers", "least"), [(70, 0.93), (150, 0.94), (300, 0.9475), (800, 0.9475)])
def test_thresholds_keep_their_promise_over_redrawn_val_sets(num_answers: int, least: float) -> None:
    """Answers are right as often as their score says, .8 to 1; the plain share of right answers on val falls short of 95 %."""
    rng = np.random.default_rng(num_answers)
    right = wrong = 0.0
    for _ in range(300):
        scores = rng.uniform(0.8, 1.0, num_answers)
        threshold = lct.precision_threshold(lct.Answers(scores, rng.random(num_answers) < scores), 0.95)
        share = (
            max(0.0, 1.0 - max(threshold, 0.8)) / 0.2
        )  # of further answers that pass; they are right (1 + threshold) / 2 times
        right += share * (1 + max(threshold, 0.8)) / 2
        wrong += share * (1 - max(threshold, 0.8)) / 2
    assert least <= right / (right + wrong) <= 0.97


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_thresholds_keep_their_promise_where_a_share_of_the_objects_is_unknown(share: float) -> None:
    """However many of each were seen: of 300 known objects and 90 or 900 strangers, the mix of new ones decides."""
    rng = np.random.default_rng(1)
    for num_strangers in (90, 900):
        right = passed = 0.0
        for _ in range(200):
            known, strangers = rng.normal(0.7, 0.1, 300), rng.normal(0.55, 0.1, num_strangers)
            answers = lct.Answers(known, rng.random(300) < 0.98, strangers, share)
            threshold = lct.precision_threshold(answers, 0.95)
            known_passed, unknown_passed = (norm.sf(threshold, mean, 0.1) for mean in (0.7, 0.55))
            right += (1 - share) * known_passed * 0.98
            passed += (1 - share) * known_passed + share * unknown_passed
        assert (right / passed == pytest.approx(0.98)) if share == 0 else (0.945 < right / passed < 0.965)
    if share == 0:
        alone = lct.precision_threshold(answers._replace(strangers=np.zeros(0)), 0.95)
        assert threshold == alone, "strangers of which there are none say nothing"


def test_strangers_count_in_each_class_as_they_do_in_all() -> None:
    """They are spread over the classes as the answers are: two classes alike have the threshold of both together."""
    rng = np.random.default_rng(2)
    half = np.sort(rng.normal(0.7, 0.1, 400))
    answers = lct.Answers(np.tile(half, 2), np.ones(800, bool), rng.normal(0.55, 0.1, 250), 0.2)
    thresholds, is_pooled = lct.fit_thresholds(np.repeat([0, 1], 400), answers, 0.9, 2, torch.float32)
    pooled = lct.precision_threshold(answers, 0.9)
    assert not is_pooled.any() and thresholds[0] == thresholds[1]
    assert thresholds[0] == pytest.approx(pooled, abs=0.01) and (half < pooled).mean() > 0.05
    rarer = lct.fit_thresholds(np.repeat([0, 1], 400), answers._replace(unknown_share=0.1), 0.9, 2, torch.float32)[0]
    assert (rarer < thresholds - 0.01).all()


def test_the_mixed_precision_is_that_of_objects_of_which_a_share_is_unknown() -> None:
    rng = np.random.default_rng(3)
    is_known, is_accepted = np.arange(1000) < 600, rng.random(1000) < np.repeat([0.7, 0.3], [600, 400])
    is_right = is_known & (rng.random(1000) < 0.9)
    figure = lct.mixed_precision(np.arange(1000), is_known, is_accepted, is_right, 0.25)["mixed_precision"]
    known, unknown = is_accepted[:600].mean(), is_accepted[600:].mean()
    expected = 0.75 * (is_right & is_accepted)[:600].mean() / (0.75 * known + 0.25 * unknown)
    assert figure["value"] == pytest.approx(expected)
    assert figure["interval"][0] < expected < figure["interval"][1] and np.ptp(figure["interval"]) < 0.1
    nobody = lct.mixed_precision(np.arange(1000), is_known, np.zeros(1000, bool), is_right, 0.25)["mixed_precision"]
    assert nobody == {"value": None, "interval": None}
    sure = lct.mixed_precision(np.arange(1000), is_known, is_accepted & is_right, is_right, 0.25)["mixed_precision"]
    low = proportion_interval(count := int((is_accepted & is_right).sum()), count)[0]
    assert sure == {"value": 1.0, "interval": pytest.approx([low, 1.0], rel=1e-4)}


def test_where_all_are_right_the_interval_is_that_of_wilson() -> None:
    images = np.arange(13)
    figures = lct.mean_intervals(images, right=np.ones(13), wrong=np.zeros(13), half=np.arange(13) % 2 == 0)
    low, high = proportion_interval(13, 13)
    assert figures["right"] == {"value": 1.0, "interval": pytest.approx([low, 1.0], rel=1e-4)} and low == pytest.approx(
        0.772, abs=1e-3
    )
    assert figures["wrong"] == {
        "value": 0.0,
        "interval": pytest.approx([0.0, 1 - low], rel=1e-4),
    } and high == pytest.approx(1.0)
    assert 0 < figures["half"]["interval"][0] < figures["half"]["interval"][1] < 1
    views = lct.mean_intervals(images // 2, right=np.ones(13))
    assert views["right"]["interval"] == pytest.approx([proportion_interval(7, 7)[0], 1.0], rel=1e-4), (
        "two views are one image"
    )


def test_a_threshold_leaves_as_much_room_as_the_precision_of_the_backbone_needs() -> None:
    """As far as there is room: half the way to the next score."""
    scores, is_right, sure = np.array([0.9, 0.5, 0.1]), np.array([True, True, False]), np.ones(3, bool)
    room = [
        0.5 - lct.precision_threshold(lct.Answers(scores, is_right), 1.0, dtype=dtype) for dtype in lct.SCORE_ROUNDING
    ]
    assert room == pytest.approx(list(lct.SCORE_ROUNDING.values()), rel=1e-2) and room == sorted(room)
    assert lct.SCORE_ROUNDING[torch.float32] == 1e-4 and lct.SCORE_ROUNDING[torch.bfloat16] >= 9.4e-4
    alone = lct.fit_thresholds(np.zeros(3, int), lct.Answers(scores, sure), 0.5, 1, torch.bfloat16)[0]
    assert alone == pytest.approx(0.1 - lct.SCORE_ROUNDING[torch.bfloat16])
    near = np.array([0.5, 0.4999])
    assert lct.precision_threshold(lct.Answers(near, np.array([True, False])), 1.0, dtype=torch.bfloat16) > 0.49994


def test_intervals_are_the_binomial_ones_and_keep_views_of_an_image_together(monkeypatch: pytest.MonkeyPatch) -> None:
    values = (np.arange(200) % 5 > 0).astype(float)  # 0.8

    def interval(values: np.ndarray, images: np.ndarray) -> list[float]:
        figure = lct.with_intervals(lambda drawn: {"mean": lct.mean_of_defined(values[drawn])}, images)["mean"]
        assert figure["value"] == pytest.approx(0.8)
        return figure["interval"]

    expected = stats.binom.ppf([0.025, 0.975], 200, 0.8) / 200
    assert interval(values, np.arange(200)) == pytest.approx(expected, abs=0.0051), "a 90 % interval is 0.0089 shorter"
    twice = interval(np.repeat(values, 2), np.repeat(np.arange(200), 2))
    assert twice == pytest.approx(expected, abs=0.0051), "as many images, twice as many samples"
    tile = interval(np.tile(values, 2), np.tile(np.arange(200) + 7, 2))
    assert tile == twice, "the views of an image need not stand side by side"
    monkeypatch.setattr(lct, "BOOTSTRAP_SAMPLES", 1)
    assert interval(values, np.arange(200)) == pytest.approx(expected, abs=0.02), "the largest sets get some draws too"


@pytest.mark.parametrize("num_groups", [1, 2, 5, 6])
def test_a_few_groups_have_no_interval(num_groups: int) -> None:
    """All draws of one camera's images are the same, and an interval of no width says that the figure is sure."""
    is_right = np.arange(60) % 4 > 0
    figures = lct.mean_intervals(np.arange(60) % num_groups, right=is_right, all=np.ones(60))
    assert figures["right"]["value"] == 0.75 and (figures["right"]["interval"] is None) == (num_groups < 6)
    low = proportion_interval(num_groups, num_groups)[0]
    assert figures["all"]["interval"] == pytest.approx([low, 1.0], rel=1e-4), "Wilson's is wide enough"


def test_a_figure_that_is_undefined_has_neither_value_nor_interval() -> None:
    nothing = lct.with_intervals(lambda drawn: {"mean": lct.mean_of_defined(np.full(5, np.nan)[drawn])}, np.arange(5))
    assert nothing == {"mean": {"value": None, "interval": None}}
    assert lct.mean_of_defined(np.array([1.0, np.nan, 4.0])) == 2.5


def test_the_loss_of_sure_answers_is_not_negative() -> None:
    loss, _, _ = lct.classify(lambda own: own, np.array([[99.0, 0.0]], np.float32), np.array([0]), ("a", "b"))
    assert f"{loss:.3f}" == "0.000"


def test_cosines_of_very_many_classes_are_not_kept_and_cost_only_auc() -> None:
    """Also when the run is interrupted, and goes on where there would be room."""
    generator = torch.Generator().manual_seed(0)
    steps = [(torch.rand(8, 50, generator=generator), torch.arange(8) + step) for step in range(20)]
    totals = {}
    for name in ("logits", "answers"):
        tally = lct.Tally()
        for number, (logits, labels) in enumerate(steps):
            tally.add(torch.tensor(1.0), logits if name == "logits" else logits.argmax(dim=1), labels)
            if number in (3, 7, 15):
                assert tally.fetch() is None
                tally = lct.Tally(tally.totals())
        tally.fetch()
        totals[name] = tally.totals()
    assert torch.equal(totals["logits"].pop("logits").argmax(dim=1), totals["answers"].pop("answers"))
    assert all(torch.equal(totals["logits"][key], value) for key, value in totals["answers"].items())


def test_an_epoch_of_very_many_cosines_has_the_same_figures_but_auc(
    small_data: Path, tmp_path: Path, call_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--model_id test_resnet --no-pretrained --img_size 32 --gpus 0 --batch 8 --workers 0 --epochs 2".split()
    records = []
    for name in ("all", "few"):
        out_dir = tmp_path / name
        assert call_main("--data_root", small_data, "--out_dir", out_dir, *words, "--cache_views", 0) == 0
        records.append([event["train"] for event in lct.read_events(out_dir) if event["event"] == "epoch_end"])
        monkeypatch.setattr(lct, "MAX_SCORE_ENTRIES", 10)
    assert all(0 <= train["auc_macro"] <= 1 for train in records[0])
    assert records[1] == [train | {"auc_macro": None} for train in records[0]]


def test_figures_do_not_depend_on_how_many_scores_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = draw_scores(100, 6)
    whole = lct.classify(lambda own: own, scores, labels, NAMES)
    assert whole[0] == pytest.approx(metrics.log_loss(labels, np.exp(scores)))
    for size in (1, 6 * 7):
        monkeypatch.setattr(lct, "RETRIEVAL_CHUNK", size)
        assert lct.classify(lambda own: own, scores, labels, NAMES) == whole
    monkeypatch.setattr(lct, "MAX_SCORE_ENTRIES", 599)
    figures, per_class = lct.classify(lambda own: own, scores, labels, NAMES)[1:]
    assert figures == whole[1] | {"auc_macro": None}
    assert per_class == {name: own | {"auc": None} for name, own in whole[2].items()}


def test_figures_of_very_many_classes_need_no_square_of_them() -> None:
    labels = np.arange(20_000).repeat(2)
    tracemalloc.start()
    figures, per_class = lct.compute_metrics(labels % 19_999, labels, list(map(str, range(20_000))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert figures["acc"] == pytest.approx(1 - 5e-5)
    assert per_class["19999"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "auc": None, "support": 2}
    assert peak < 100e6  # the square has 3.2 GB
