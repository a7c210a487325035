"""Section 12: figures against scikit-learn, and what happens where a class is absent."""

import json

import numpy as np
import pytest
from sklearn import metrics

import lct_dino3 as lct

NAMES = tuple("abcdef")


def draw_scores(num_samples: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_samples)
    logits = rng.normal(size=(num_samples, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return lct.log_softmax(np.round(logits, 1)), labels  # rounding makes ties


@pytest.mark.parametrize("num_classes", [2, 6])
def test_figures_equal_scikit_learn(num_classes: int) -> None:
    scores, labels = draw_scores(400, num_classes)
    figures, per_class = lct.compute_metrics(scores, labels, NAMES[:num_classes])
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


def test_an_absent_class_is_none_and_leaves_the_means_alone() -> None:
    scores, labels = draw_scores(300, 6)
    labels[labels == 2] = 3
    figures, per_class = lct.compute_metrics(scores, labels, NAMES)
    assert per_class["c"] == {"precision": 0.0, "recall": None, "f1": None, "auc": None, "support": 0}
    present = [0, 1, 3, 4, 5]
    expected = metrics.f1_score(labels, scores.argmax(axis=1), labels=present, average="macro")
    assert figures["f1_macro"] == pytest.approx(expected)
    json.dumps([figures, per_class], allow_nan=False)


def test_a_class_never_answered_has_precision_zero_not_nan() -> None:
    scores = np.log(np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]))
    figures, per_class = lct.compute_metrics(scores, np.array([0, 0, 1]), ("a", "b"))
    assert per_class["b"]["precision"] == 0.0 and per_class["b"]["f1"] == 0.0
    assert figures["acc"] == pytest.approx(2 / 3)


def test_only_one_class_present_has_no_auc() -> None:
    figures, _ = lct.compute_metrics(np.log(np.array([[0.9, 0.1], [0.4, 0.6]])), np.array([0, 0]), ("a", "b"))
    assert figures == {"acc": 0.5, "f1_macro": pytest.approx(2 / 3), "auc_macro": None}


def test_log_softmax_ranks_what_underflows_in_float32() -> None:
    log_probabilities = lct.log_softmax(np.array([[0.0, -200.0, -201.0]], dtype=np.float32))
    assert log_probabilities[0, 1] > log_probabilities[0, 2] > -np.inf
    assert lct.cross_entropy(log_probabilities, np.array([1])) == pytest.approx(200.0)


def test_confusion_rows_are_true_classes() -> None:
    matrix = lct.confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), 2)
    assert matrix.tolist() == [[0, 2], [0, 1]]
