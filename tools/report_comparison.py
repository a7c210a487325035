"""The values that report.html.j2 shows when it compares several runs. Not a program."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from report_page import Line, draw_chart
from run_files import (
    BASELINE_NAMES,
    MAX_CARDS,
    MAX_LISTED,
    SPLIT_NAMES,
    Prediction,
    ReportError,
    Run,
    capitalize,
    format_duration,
    make_colors,
    name_matcher,
    name_training,
)

SIGNIFICANCE = 0.05  # level of the sign test between two runs
# Options that say where and how a run was started; a difference in them is not listed.
PLACE_OPTIONS = {"command", "config", "out_dir", "resume", "overwrite", "experiment_name", "clearml_task_name"}
# Figures without a best run: the first two trade against each other, and training does not change the last.
WITHOUT_BEST = ("Answered above thresholds", "Right among those", "Frozen backbone, best baseline")


def describe_comparison(runs: list[Run]) -> dict[str, Any]:
    """Return the variables of the template for the comparison of several runs."""
    names = name_runs([run.path for run in runs])
    answers = [choose_answers(run) for run in runs]
    common = [[table[path] for table in answers] for path in answers[0] if all(path in table for table in answers)]
    images = [items for items in common if len({item.class_name for item in items}) == 1]  # (images, runs)
    classes = [name for name in runs[0].class_names if all(name in run.label_of for run in runs)]
    return {
        "runs": [
            {"name": name, "path": str(run.path), "verdict": capitalize(run.verdict)}
            for name, run in zip(names, runs, strict=True)
        ],
        "header": judge_runs(names, images, [name for name, table in zip(names, answers, strict=True) if not table]),
        "colors": make_colors(len(runs)),
        "num_common": len(images),
        "has_both_views": any(len(run.predictions) > len(table) for run, table in zip(runs, answers, strict=True)),
        "num_tested": [len(table) for table in answers],
        "has_many_roots": len({run.config["options"]["data_root"] for run in runs}) > 1,
        "num_classes": len(classes),
        "only_in_some": sorted({name for run in runs for name in run.class_names} - set(classes)),
        "figures": list_figures(runs),
        "curves": overlay_curves(names, runs),
        "gains": list_gains(runs, classes, images),
        "tally": tally_answers(images),
        "groups": group_disagreements(images),
        "options": list_differences([run.config["options"] for run in runs], PLACE_OPTIONS),
        "circumstances": list_differences([list_circumstances(run) for run in runs], set()),
        "max_listed": MAX_LISTED,
    }


def name_runs(paths: list[Path]) -> list[str]:
    """Return a unique name for each folder: its last path components, as few as tell the folders apart."""
    components = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, components)) + 1):
        names = ["/".join(parts[-length:]) for parts in components]
        if len(set(names)) == len(names):
            return names
    raise ReportError("one run is given twice: there is nothing to compare")


def choose_answers(run: Run) -> dict[str, Prediction]:
    """Return one prediction per test image, by path; of an image tested in both views, that of the `bbox` view."""
    return {item.shot.path: item for item in sorted(run.predictions, key=lambda item: item.shot.view != "mask")}


def judge_runs(names: list[str], images: list[list[Prediction]], untested: list[str]) -> dict[str, str]:
    """Return whether the run with the most right answers on the common test images is significantly ahead of the second.

    Significant: the sign test on the groups in which one of the two gets more images right gives p < SIGNIFICANCE / (number of runs
    - 1); crops of one photo are right or wrong together, and count once. Without common images, returns why: `untested` are the
    runs without answers.
    """
    if not images:
        reason = "Not one image is in the test split of all runs."
        remedy = "compare runs with the same data, --seed, --group_regex and shares of the splits."
        if untested:
            reason = f"Without answers on test images: {', '.join(untested)}."
            remedy = "compare runs that are finished, have a test split and still have their predictions.csv."
        note = f"{reason} Each figure below is of the run's own images, so that a difference may be theirs: {remedy}"
        return {"verdict": "No test image in common", "tone": "plain", "note": note}
    is_right = np.array([[item.is_right for item in items] for items in images])  # (images, runs)
    accuracies = is_right.mean(axis=0)
    first, second = np.argsort(-accuracies, kind="stable")[:2].tolist()
    groups = np.unique([items[0].group for items in images], return_inverse=True)[1]
    leads = np.bincount(groups, weights=is_right[:, first].astype(int) - is_right[:, second])
    wins, losses = int((leads > 0).sum()), int((leads < 0).sum())
    units = "them"
    if len(leads) < len(images):
        units = f"their {len(leads):,} groups (crops of one photo, say, or near-duplicates)"
    p_value = sign_test(wins, losses)
    is_ahead = p_value < SIGNIFICANCE / (len(names) - 1)
    scores = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in zip(names, accuracies.tolist(), strict=True))
    note = (
        f"Accuracy on the {len(images):,} test images that all runs have in common: {scores}. {names[first]} does better on"
        f" {wins:,} of {units}, and {names[second]} on {losses:,}; a fair coin would divide them so unevenly in"
        f" {float(f'{100 * p_value:.2g}'):g} % of cases."
    )
    verdict = f"{names[first]} is ahead of {names[second]}" if is_ahead else "No run is measurably ahead"
    return {"verdict": verdict, "tone": "good" if is_ahead else "plain", "note": note}


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the sign test: how often a fair coin splits the throws at least as unevenly."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def list_figures(runs: list[Run]) -> list[dict[str, Any]]:
    """Return the key figures of all runs as rows of {name, values, best, is_score}; values are numbers or text."""
    scores = {
        "Accuracy, prototypes": [run.figures.scores.get("acc") for run in runs],
        "Accuracy, classifier": [run.figures.scores.get("classifier_acc") for run in runs],
        "Macro F1": [run.figures.scores.get("f1_macro") for run in runs],
        "Macro ROC AUC": [run.figures.scores.get("auc_macro") for run in runs],
        "Recall@1": [run.figures.scores.get("recall_at_1") for run in runs],
    }
    measured = [run.figures.measured for run in runs]
    if any(measured):
        scores["Unknown objects, AUROC"] = [item and item["open_set"]["auroc"]["value"] for item in measured]
        scores["Answered above thresholds"] = [item and item["thresholds"]["coverage"]["value"] for item in measured]
        scores["Right among those"] = [item and item["thresholds"]["precision"]["value"] for item in measured]
    baselines = [run.figures.baseline.get(run.figures.scored, {}) for run in runs]
    scores["Frozen backbone, best baseline"] = [
        run.figures.test["baseline"]["acc"]  # the one in the verdict, chosen on val
        if run.figures.test
        else max((item[f"{key}_acc"] for key in BASELINE_NAMES if item.get(f"{key}_acc") is not None), default=None)
        for run, item in zip(runs, baselines, strict=True)
    ]
    sources = [item["open_set"]["source"] if item else "–" for item in measured]
    without_best = set(WITHOUT_BEST)
    if len({*sources} - {"–"}) > 1:
        without_best.add("Unknown objects, AUROC")
    if len({run.figures.scored for run in runs}) > 1:  # val and test
        without_best.update(scores)
    rows = []
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        best = max(known) if len(set(known)) > 1 and name not in without_best else None
        rows.append({"name": name, "values": values, "best": best, "is_score": True})
    texts = {
        "Measured on": [f"{run.figures.scored}, {run.count(run.figures.scored):,} images" for run in runs],
        "Best epoch": [
            f"{run.figures.best['epoch']} of {len(run.figures.epochs)}" if run.figures.best else "–" for run in runs
        ],
        "Training": [format_duration(sum(epoch["seconds"] for epoch in run.figures.epochs)) for run in runs],
        "Matcher": [name_matcher(run.figures.prototypes) for run in runs],
        "Backbone": [name_training(run.config["options"]) for run in runs],
        "Images": [f"{sum(map(run.count, SPLIT_NAMES)):,} of {len(run.class_names):,} classes" for run in runs],
    }
    if any(measured):
        texts["Unknown objects"] = sources
    return rows + [{"name": name, "values": values, "best": None, "is_score": False} for name, values in texts.items()]


def overlay_curves(names: list[str], runs: list[Run]) -> list[dict[str, Any]]:
    """Return the charts of train and val over epochs, with one line per run."""
    colors = make_colors(len(runs))
    titles = (
        ("Loss on train", "train", "loss"),
        ("Loss on val", "val", "loss"),
        ("Accuracy on val, classifier", "val", "acc"),
        ("Accuracy on val, prototypes", "val", "proto_acc"),
        ("Macro F1 on val", "val", "f1_macro"),
        ("Macro ROC AUC on val", "val", "auc_macro"),
    )
    charts = []
    for title, split, key in titles if any(run.figures.epochs for run in runs) else ():
        lines = []
        for name, color, run in zip(names, colors, runs, strict=True):
            values = {epoch["epoch"]: epoch[split].get(key) for epoch in run.figures.epochs}
            lines.append(Line(name, color, values))
        charts.append(draw_chart(title, lines))
    return charts


def list_gains(runs: list[Run], classes: list[str], images: list[list[Prediction]]) -> list[dict[str, Any]]:
    """Return recall and F1 of the common classes by run, and the gains over the first run; largest F1 gain of the last run first.

    Counts the common test images; without any, the images on which each run was scored.
    """
    tables = [
        score_classes([items[i] for items in images]) if images else run.figures.per_class for i, run in enumerate(runs)
    ]
    rows = []
    for name in classes:
        scores = [table.get(name, {}) for table in tables]
        row: dict[str, Any] = {"name": name, "support": [score.get("support") for score in scores]}
        for key in ("recall", "f1"):
            values = [score.get(key) for score in scores]
            gains = [None if None in (value, values[0]) else value - values[0] for value in values[1:]]
            row[key] = {"values": values, "gains": gains}
        if any(row["support"]):
            rows.append(row)
    rows.sort(key=lambda row: -math.inf if row["f1"]["gains"][-1] is None else row["f1"]["gains"][-1], reverse=True)
    return rows


def score_classes(items: list[Prediction]) -> dict[str, dict[str, Any]]:
    """Return support, recall and F1 of each true class."""
    support = Counter(item.class_name for item in items)
    predicted = Counter(item.answer for item in items)
    hits = Counter(item.class_name for item in items if item.is_right)
    return {
        name: {"support": count, "recall": hits[name] / count, "f1": 2 * hits[name] / (count + predicted[name])}
        for name, count in support.items()
    }


def tally_answers(images: list[list[Prediction]]) -> list[tuple[tuple[bool, ...], int]]:
    """Return (which runs are right, number of images), all right first, all wrong last, the others by falling number."""
    counts = Counter(tuple(item.is_right for item in items) for items in images)
    return sorted(counts.items(), key=lambda entry: (not all(entry[0]), not any(entry[0]), -entry[1]))


def group_disagreements(images: list[list[Prediction]]) -> list[dict[str, Any]]:
    """Return the images with different answers, grouped by which runs are right; most confident wrong answers first."""
    groups: dict[tuple[bool, ...], list[list[Prediction]]] = {}
    for items in images:
        if len({item.answer for item in items}) > 1:
            groups.setdefault(tuple(item.is_right for item in items), []).append(items)
    for group in groups.values():
        group.sort(key=lambda items: -sum(item.probability for item in items if not item.is_right))
    limit = max(6, MAX_CARDS // max(1, len(groups)))
    ordered = sorted(groups.items(), key=lambda entry: (not any(entry[0]), -len(entry[1])))
    return [{"is_right": pattern, "cards": group[:limit], "count": len(group)} for pattern, group in ordered]


def list_differences(tables: list[dict[str, Any]], ignored: set[str]) -> list[tuple[str, list[Any]]]:
    """Return (name, values) of the entries that differ between the tables, without the `ignored` names."""
    names = sorted({name for table in tables for name in table} - ignored)
    rows = [(name, [table.get(name, "–") for table in tables]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def list_circumstances(run: Run) -> dict[str, Any]:
    """Return the facts besides options in which runs can differ: data, model, versions, device."""
    groups = {"data": run.config["data"], "model": run.config["model"], "version of": run.config["versions"]}
    facts = {f"{group} {name}": value for group, values in groups.items() for name, value in values.items()}
    facts.pop("data classes")
    return facts | {"classes": len(run.class_names), "device": run.config["device"]}
