"""The values that report.html.j2 shows of one run: header, curves, classes, map, errors, trust, data. Not a program."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from run_files import (
    BASELINE_NAMES,
    MATCHER_NAMES,
    MAX_CARDS,
    MAX_LISTED,
    SPLIT_NAMES,
    Embeddings,
    Figures,
    Pictures,
    Run,
    Shot,
    capitalize,
    format_duration,
    format_number,
    jpeg_uri,
    make_colors,
    name_matcher,
    name_training,
    shorten,
)

RETRIEVAL_NAMES = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "map_at_r": "mAP@R"}
FEW_IMAGES = 10  # with fewer, one image moves the recall of a class by more than ten points
MAP_MAX_POINTS = 1_500  # t-SNE of 1,500 x 128 takes seconds; more dots would only cover each other
MIN_TSNE_POINTS = 50  # fewer are placed by PCA: they form no neighbourhoods, and scikit-learn takes a second to import
MAP_THUMB_PX = 48  # a multiple of 16, so that no JPEG chroma block bleeds into the neighbouring cell of the sprite
MAP_SPRITE_COLUMNS = 40
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 1000, 660, 22  # px on a wide screen; the style sheet has the same ratio
MAX_CONFLICT_GROUPS = 12  # label conflicts shown as images; the list below them has all
MAX_MATRIX_CLASSES = 60  # with more, the cells and names are too small to use
MAX_CLASSES_BESIDE_PAIRS = 20  # with more, the list of pairs does not fit beside the matrix
MAX_VIEW_CLASSES = 12  # classes listed because their recall differs most with and without background
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 44, 470, 10, 206  # plot area in a chart of 480 x 250 SVG user units
MAX_DOTTED_EPOCHS = 40  # dots mark single epochs, but clutter longer runs


def describe_run(run: Run, pictures: Pictures) -> dict[str, Any]:
    """Return the variables of the template for the page of one run."""
    num_shots = len({item.shot.path for item in run.predictions})
    return {
        "class_names": run.class_names,
        "colors": make_colors(len(run.class_names)),
        "num_images": sum(map(run.count, SPLIT_NAMES)),
        "num_test": len(run.predictions),
        "of_test": "views of test images" if len(run.predictions) > num_shots else "test images",
        "missing_test": run.missing_test,
        "split_names": SPLIT_NAMES,
        "max_listed": MAX_LISTED,
        "figures": run.figures,
        "header": view_header(run),
        "facts": list_facts(run),
        "options": sorted(run.config["options"].items()),
        "curves": view_curves(run.figures),
        "classes": list_classes(run),
        "small_support": FEW_IMAGES,
        "confusion": view_confusion(run),
        "map": view_map(run, pictures),
        "errors": view_errors(run),
        "views": compare_views(run),
        "measured": view_measured(run.figures.measured, run.figures.unseen),
        "unseen": run.figures.unseen,
        "calibration": view_calibration(run),
        "sessions": view_sessions(run.figures.test),
        "data": view_data(run.data_report),
    }


def view_header(run: Run) -> dict[str, Any]:
    """Return the verdict, the key figures, and the bars that compare the trained model with the frozen backbone."""
    figures = run.figures
    verdict, _, note = run.verdict.partition(": ")
    if figures.test and figures.measured and figures.prototypes:
        note = f"{capitalize(note)}."
        interval = figures.measured["closed"][figures.prototypes["matcher"]]["acc"]["interval"]
        if interval:  # of enough groups
            note += " Test images put the accuracy between {:.3f} and {:.3f} (95 % interval).".format(*interval)
        coverage = figures.measured["thresholds"]["coverage"]["value"]
        note += f" The thresholds give a class to {coverage:.3f} of the test images; the others are unknown."
    elif not figures.test:
        note = "The figures below are of the val split, which also chose the best epoch: expect less on new data."
    frozen = figures.baseline.get(figures.scored, {})
    bars = [("trained, prototypes", figures.scores.get("acc"), "trained")]
    bars += [("trained, classifier", figures.scores.get("classifier_acc"), "trained")]
    bars += [(f"frozen, {text}", frozen.get(f"{key}_acc"), "frozen") for key, text in BASELINE_NAMES.items()]
    return {
        "verdict": capitalize(verdict),
        "tone": {"training helped": "good", "training hurt": "bad"}.get(verdict, "plain"),
        "note": note,
        "tiles": list_tiles(run),
        "bars": [{"name": name, "value": value, "kind": kind} for name, value, kind in bars if value is not None],
    }


def list_tiles(run: Run) -> list[tuple[str, str, str]]:
    """Return the key figures as (label, value, note)."""
    figures = run.figures
    best = figures.best
    predictor = "prototypes" if figures.test else "the classifier"
    best_note = (
        f"of {len(figures.epochs)}; {best['metric']} {format_number(best['value'])}" if best else "no epoch has ended"
    )
    split_sizes = {split: run.count(split) for split in SPLIT_NAMES}
    class_sizes = [sum(run.counts[split][name] for split in SPLIT_NAMES) for name in run.class_names]
    size_range = " to ".join(f"{size:,}" for size in sorted({min(class_sizes), max(class_sizes)}))
    size_note = ", ".join(f"{count:,} {split}" for split, count in split_sizes.items() if count)
    scores = (
        (
            "Accuracy",
            "acc",
            f"prototypes, {figures.test['images']:,} test images" if figures.test else "prototypes, val",
        ),
        ("Macro F1", "f1_macro", f"{predictor}, {figures.scored}"),
        ("Macro ROC AUC", "auc_macro", f"{predictor}, {figures.scored}"),
        ("Recall@1", "recall_at_1", f"nearest reference, {figures.scored}"),
        ("Classifier accuracy", "classifier_acc", f"trained classifier, {figures.scored}"),
    )
    return [
        *((label, format_number(figures.scores.get(key)), note) for label, key, note in scores),
        ("Best epoch", f"{best['epoch']}" if best else "–", best_note),
        ("Images", f"{sum(class_sizes):,}", size_note),
        ("Classes", f"{len(run.class_names):,}", f"{size_range} images each"),
    ]


def list_facts(run: Run) -> list[tuple[str, Any]]:
    """Return the settings and circumstances of the run as (name, value)."""
    figures = run.figures
    options = run.config["options"]
    seconds = sum(epoch["seconds"] for epoch in figures.epochs)
    started = None if figures.started is None else datetime.fromtimestamp(figures.started, tz=UTC)
    prototypes = figures.prototypes
    return [
        ("Model", options["model_id"]),
        ("Backbone", name_training(options)),
        ("Embedding", options["emb_dim"]),
        ("Image size", options["img_size"]),
        ("Matcher", name_matcher(prototypes)),
        ("References", f"{prototypes['refs']:,}, {prototypes['prototypes']:,} prototypes" if prototypes else "–"),
        ("Epochs", f"{len(figures.epochs)} of {options['epochs']}, {format_duration(seconds)}"),
        ("Seed", options["seed"]),
        ("Device", run.config["device"]),
        ("Started", f"{started:%Y-%m-%d %H:%M} UTC" if started else "–"),
        ("Data", options["data_root"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.config["versions"].items())),
    ]


def list_classes(run: Run) -> list[dict[str, Any]]:
    """Return one row per class: images by split, scores on the split `figures.scored`, threshold."""
    rows = []
    for label, name in enumerate(run.class_names):
        scores = run.figures.per_class.get(name, {})
        row = {split: run.counts[split][name] for split in SPLIT_NAMES}
        row |= {key: scores.get(key) for key in ("precision", "recall", "f1", "auc")}
        row |= {"label": label, "name": name, "threshold": run.thresholds.get(name), "is_pooled": name in run.pooled}
        rows.append({"is_small": row[run.figures.scored] < FEW_IMAGES, **row})
    return rows


def view_confusion(run: Run) -> dict[str, Any] | None:
    """Return the confusion matrix, unless it is too large to read, and the most confused pairs."""
    if not run.predictions:
        return None
    num_classes = len(run.class_names)
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)  # rows true, columns predicted
    for item in run.predictions:
        matrix[run.label_of[item.class_name], run.label_of[item.answer]] += 1
    totals = matrix.sum(axis=1)
    pairs = [
        {"true": true, "predicted": predicted, "count": int(matrix[true, predicted]), "total": int(totals[true])}
        for true, predicted in np.argwhere(matrix).tolist()
        if true != predicted
    ]
    pairs.sort(key=lambda pair: (-pair["count"], pair["total"]))
    is_drawn = num_classes <= MAX_MATRIX_CLASSES
    is_beside = num_classes <= MAX_CLASSES_BESIDE_PAIRS
    names = [shorten(name, 30) for name in run.class_names]
    width = (720 if is_beside else 1080) - 8 * max(map(len, names))  # px beside the names, on a screen 1,280 px wide
    return {
        "matrix": matrix.tolist() if is_drawn else None,
        "totals": totals.tolist(),
        "names": names,
        "cell": min(40, width // num_classes),  # px: fits without scrolling
        "is_beside": is_beside,
        "pairs": pairs[: 12 if is_drawn else 50],
        "num_pairs": len(pairs),
    }


def view_map(run: Run, pictures: Pictures) -> dict[str, Any] | None:
    """Return the images of the embedding map with their positions; test images come last and are drawn on top."""
    table = run.embeddings
    if table is None or not len(table.labels):
        return None
    chosen = choose_map_rows(table)
    positions = project(table.embeddings[chosen])
    low = positions.min(axis=0)
    spread = np.maximum(positions.max(axis=0) - low, 1e-12)
    positions = MAP_MARGIN + (positions - low) / spread * (np.array([MAP_WIDTH, MAP_HEIGHT]) - 2 * MAP_MARGIN)
    order = np.argsort([SPLIT_NAMES.index(split) for split in table.splits[chosen]], kind="stable")
    rows = chosen[order].tolist()
    positions = positions[order]
    size = (min(len(rows), MAP_SPRITE_COLUMNS), math.ceil(len(rows) / MAP_SPRITE_COLUMNS))  # cells: columns, rows
    answers = {item.shot: item for item in run.predictions}
    sprite = Image.new("RGB", (size[0] * MAP_THUMB_PX, size[1] * MAP_THUMB_PX), (226, 228, 232))
    points = []
    for index, (row, (x, y)) in enumerate(zip(rows, positions.tolist(), strict=True)):
        shot = Shot(table.paths[row], "mask" if table.views[row] else "bbox")
        label = int(table.labels[row])
        split = str(table.splits[row])
        answer = answers.get(shot) if split == "test" else None
        outcome = "" if answer is None else ", recognised" if answer.is_right else f", taken for {answer.answer}"
        masked = " (masked)" if shot.view == "mask" else ""
        down, across = divmod(index, MAP_SPRITE_COLUMNS)  # cell of the sprite
        thumb = f"{100 * across / max(1, size[0] - 1):.3f}% {100 * down / max(1, size[1] - 1):.3f}%"  # CSS background-position
        points.append({
            "style": f"{place_in_map(x, y)}; --thumb: {thumb}",
            "label": label,
            "split": split,
            "is_error": answer is not None and not answer.is_right,
            "text": f"{run.class_names[label]}\n{split}{outcome}\n{shot.path}{masked}",
        })  # fmt: skip
        image = pictures.load(shot, MAP_THUMB_PX) or Image.new("RGB", (MAP_THUMB_PX, MAP_THUMB_PX), (128, 128, 128))
        margins = [(MAP_THUMB_PX - side) // 2 for side in image.size]
        sprite.paste(image, (across * MAP_THUMB_PX + margins[0], down * MAP_THUMB_PX + margins[1]))
    return {
        "points": points,
        "num_rows": len(table.labels),
        "num_errors": sum(point["is_error"] for point in points),
        "sprite": jpeg_uri(sprite),  # takes a third of the bytes of single JPEGs, which are mostly headers
        "size": size,
        "names": place_names(run.class_names, positions, table.labels[rows]),
        "counts": [sum(run.counts[split][name] for split in SPLIT_NAMES) for name in run.class_names],
        "splits": [split for split in SPLIT_NAMES if (table.splits == split).any()],
    }


def choose_map_rows(table: Embeddings) -> np.ndarray:
    """Return at most MAP_MAX_POINTS row indices: even steps through rows sorted by class and split keep the proportions."""
    order = np.lexsort((table.splits, table.labels))
    steps = np.linspace(0, len(order) - 1, min(len(order), MAP_MAX_POINTS)).astype(int)
    return np.sort(order[steps])


def project(embeddings: np.ndarray) -> np.ndarray:
    """Project embeddings (N, D) onto a plane (N, 2): by t-SNE, or by PCA if there are too few or all are nearly equal."""
    centered = (embeddings - embeddings.mean(axis=0)).astype(np.float64)
    is_collapsed = float(centered.std()) < 1e-6  # t-SNE divides by the spread of its PCA start
    if len(embeddings) < MIN_TSNE_POINTS or embeddings.shape[1] < 2 or is_collapsed:
        left_vectors, singular_values, _ = np.linalg.svd(centered, full_matrices=False)
        scores = (left_vectors * singular_values)[:, :2]
        return np.pad(scores, ((0, 0), (0, 2 - scores.shape[1])))
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    # One thread: OpenMP sums in no fixed order, and t-SNE amplifies a difference in the last bit into another map.
    with threadpool_limits(limits=1):
        return TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(centered.astype(np.float32))


def place_names(class_names: tuple[str, ...], positions: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Place class names beside their points, large classes first; a name that fits nowhere is only in the legend."""
    boxes: list[tuple[float, float, float]] = []  # x, y, half width of the names placed so far
    names = []
    for label in sorted(np.unique(labels).tolist(), key=lambda label: -(labels == label).sum()):
        text = shorten(class_names[label], 24)
        half = 6.5 * sum(1.05 if ord(character) > 0x2E80 else 0.62 for character in text)  # px at 13 px; CJK is wider
        points = positions[labels == label]
        distances = np.linalg.norm(points[:, None] - points[None], axis=2)
        from_medoid = distances[distances.sum(axis=1).argmin()]
        points = points[from_medoid <= np.median(from_medoid)]  # outliers do not pull the name away
        x = float(np.clip(np.median(points[:, 0]), half + 4, max(half + 4, MAP_WIDTH - half - 4)))
        above, middle, below = np.quantile(points[:, 1], (0.05, 0.5, 0.95)).tolist()
        for y in (above - 14, below + 16, middle - 4, middle - 22, middle + 14):
            is_free = all(abs(x - other_x) > half + width or abs(y - other_y) > 16 for other_x, other_y, width in boxes)
            if is_free and 10 < y < MAP_HEIGHT - 10:
                boxes.append((x, y, half))
                names.append({"label": label, "text": text, "style": place_in_map(x, y)})
                break
    return names


def place_in_map(x: float, y: float) -> str:
    """Return the CSS position of a point in the map."""
    return f"left: {100 * x / MAP_WIDTH:.2f}%; top: {100 * y / MAP_HEIGHT:.2f}%"


def view_errors(run: Run) -> dict[str, Any]:
    """Return the wrong test images, most confident first, each with the reference that misled the matcher and the one it missed."""
    wrong = sorted((item for item in run.predictions if not item.is_right), key=lambda item: -item.probability)
    cards = []
    for item in wrong[:MAX_CARDS]:
        sides = [
            ("predicted", item.answer, item.cosine, item.probability, item.nearest_reference),
            ("true", item.class_name, item.class_cosine, None, item.nearest_of_class),
        ]
        keys = ("kind", "name", "cosine", "probability", "reference")
        cards.append({"shot": item.shot, "sides": [dict(zip(keys, side, strict=True)) for side in sides]})
    return {"cards": cards, "num_errors": len(wrong)}


def compare_views(run: Run) -> dict[str, Any] | None:
    """Return the results on the same test crops in both views, and the crops with different answers, most confident first."""
    figures = run.figures.views
    by_view = {
        view: {item.shot.path: item for item in run.view_predictions if item.shot.view == view}
        for view in ("bbox", "mask")
    }
    pairs = [(item, by_view["mask"][path]) for path, item in by_view["bbox"].items() if path in by_view["mask"]]
    if figures is None or not pairs:
        return None
    disagreements = [pair for pair in pairs if pair[0].answer != pair[1].answer]
    disagreements.sort(key=lambda pair: -pair[0].probability - pair[1].probability)
    is_right = np.array([(plain.is_right, masked.is_right) for plain, masked in pairs]).T
    tallies = {
        "both ways": is_right.all(axis=0),
        "only as it is": is_right[0] & ~is_right[1],
        "only masked": is_right[1] & ~is_right[0],
        "neither way": ~is_right.any(axis=0),
    }
    labels = np.array([run.label_of[plain.class_name] for plain, _ in pairs])
    classes = []
    for label in np.unique(labels).tolist():
        recall = is_right[:, labels == label].mean(axis=1).tolist()
        if recall[0] != recall[1]:
            classes.append({"label": label, "count": int((labels == label).sum()), "recall": recall})
    classes.sort(key=lambda row: (-abs(row["recall"][1] - row["recall"][0]), -row["count"]))
    return {
        "figures": figures,
        "cards": disagreements[:MAX_CARDS],
        "num_differ": len(disagreements),
        "tallies": {name: int(tally.sum()) for name, tally in tallies.items()},
        "classes": classes[:MAX_VIEW_CLASSES],
    }


def view_measured(measured: dict[str, Any] | None, unseen: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the tables of the trust section: figures with intervals, ways to detect unknown objects, answers at a precision."""
    if measured is None:
        return None
    rows = []
    for name, scores in measured["closed"].items():
        matcher = MATCHER_NAMES[name] + (f", k = {scores['k']}" if name == "knn" else "")
        rows += [(f"Accuracy, {matcher}", scores["acc"]), (f"Macro F1, {matcher}", scores["f1_macro"])]
    rows += [(name, measured["retrieval"][key]) for key, name in RETRIEVAL_NAMES.items()]
    unknown = {"prototypes, similarity": measured["open_set"], **measured["open_set"].get("others", {})}
    if unseen:
        unknown["prototypes, classes never trained on"] = unseen["open_set"]
        unknown |= {f"{name}, the same classes": way for name, way in unseen["open_set"]["others"].items()}
    sources = (("the unknown objects", measured), ("the images of classes never trained on", unseen or {}))
    return {
        "rows": [(name, figure["value"], figure["interval"]) for name, figure in rows],
        "unknown": unknown,
        "strangers": [(subject, source) for subject, source in sources if "unknown_passed" in source],
        # None in a run of an older script, whose thresholds allow for no unknown objects.
        "unknown_share": measured.get("unknown_share"),
        "source": measured["open_set"]["source"],
        "answers": measured["answers"],
        "thresholds": measured["thresholds"],
        "few": measured["few"],
    }


def view_calibration(run: Run) -> dict[str, Any] | None:
    """Return reliability by bin of probability, the source of its unknown objects, and the expected calibration error."""
    figures = run.figures
    if figures.measured is None or not figures.test:
        return None
    # Classes that the embedder was trained on are too easy as unknown objects: prefer heads that were trained without them.
    is_easy = figures.measured["open_set"]["trained_on_them"]
    source = figures.unseen if is_easy and figures.unseen else figures.measured
    bins = source["reliability"]
    right = sum(row["share"] * row["right"] for row in bins)
    images = figures.test["images"]
    groups = len({item.group for item in run.predictions}) or images
    return {
        "bins": bins,
        "source": source["open_set"]["source"],
        "of_heads": source is figures.unseen,
        "error": source["ece"],
        "unknown_share": source.get("unknown_share", 0.2),  # older runs do not name it
        "claimed": sum(row["share"] * row["probability"] for row in bins),
        "right": right,
        "sample": f"{images:,} test images" + (f" in {groups:,} groups" if groups < images else ""),
        "noise": 2 * math.sqrt(right * (1 - right) / groups),  # two standard errors of the share right
    }


def view_sessions(test: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the test images that seem to share a session with a training image, closest first, and the accuracy without them."""
    if not test or not test.get("without_same_session", {}).get("pairs"):
        return None
    without = test["without_same_session"]
    pairs = [
        {"test": Shot(path, "bbox"), "train": Shot(pair["train"], "bbox"), "cosine": pair["cosine"]}
        for path, pair in without["pairs"].items()
    ]
    return {
        "count": test["images"] - without["images"],
        "cards": pairs[:MAX_CARDS],
        "acc": without["acc"],
        "images": without["images"],
    }


def view_data(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the results of the scan: facts, warnings, findings by heading with one line per item, label conflicts as images."""
    if data is None:
        return None
    masks = data["masks"]
    groups = {
        "Label conflicts: one picture under several classes": data["label_conflicts"],
        "Groups of exact duplicates": data["duplicates"]["exact"],
        "Groups of near duplicates": data["duplicates"]["near"],
    }
    problems = {
        "Quarantined files": data["quarantined"],
        "Refused masks": masks["refused"],
        "Masks that SAM-2 could not draw": masks["not_made"],
    }
    findings = {title: [f"{item['path']} — {item['reason']}" for item in items] for title, items in problems.items()}
    findings |= {title: ["   =   ".join(group) for group in members] for title, members in groups.items()}
    facts = [("Images found", f"{data['num_images']:,}"), ("Usable", f"{data['num_usable']:,}")]
    if data["num_used"] < data["num_usable"]:
        facts.append(("Used", f"{data['num_used']:,}"))
    facts.append(("With a mask", f"{masks['usable']:,}, {masks['made']:,} of them drawn by SAM-2"))
    facts += [(title.split(":")[0], f"{len(items):,}") for title, items in findings.items()]
    facts.append(("Leaks between splits prevented", f"{data['leaks_prevented']:,}"))
    facts.append(("Turned by EXIF", f"{data['exif_rotated']:,}"))
    for side in ("width", "height"):
        values = " / ".join(f"{data['sizes'][f'{side}_{name}']:,}" for name in ("min", "median", "max"))
        facts.append((f"{side.capitalize()} min / median / max", f"{values} px"))
    facts.append(("Colour modes", ", ".join(f"{mode} {count:,}" for mode, count in data["modes"].items())))
    conflicts = [[Shot(path, "bbox") for path in group] for group in data["label_conflicts"][:MAX_CONFLICT_GROUPS]]
    return {"facts": facts, "findings": findings, "warnings": data["warnings"], "conflicts": conflicts}


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    ink: str  # CSS colour
    values: dict[int, float | None]  # by epoch


def view_curves(figures: Figures) -> dict[str, Any]:
    """Return the four charts over epochs, and the name of the frozen baseline in the accuracy chart."""
    frozen = figures.baseline.get("val", {})
    scores = {name: frozen[f"{key}_acc"] for key, name in BASELINE_NAMES.items() if f"{key}_acc" in frozen}
    baseline = max(scores, key=scores.__getitem__, default=None)  # also the one in the verdict
    if not figures.epochs:
        return {"charts": [], "baseline": baseline}
    titles = {"loss": "Loss", "acc": "Accuracy", "f1_macro": "Macro F1", "auc_macro": "Macro ROC AUC"}
    best = figures.best["epoch"] if figures.best else None
    charts = []
    for key, title in titles.items():
        lines = [
            Line(split, f"var(--{split})", {epoch["epoch"]: epoch[split].get(key) for epoch in figures.epochs})
            for split in ("train", "val")
        ]
        if key == "acc":
            proto_acc = {epoch["epoch"]: epoch["val"].get("proto_acc") for epoch in figures.epochs}
            lines.append(Line("val, prototypes", "var(--proto)", proto_acc))
        charts.append(draw_chart(title, lines, best, scores.get(baseline) if key == "acc" else None))
    return {"charts": charts, "baseline": baseline}


def draw_chart(title: str, lines: list[Line], best: int | None = None, level: float | None = None) -> dict[str, Any]:
    """Return a chart of lines over epochs in SVG units: ticks, lines, hover areas, best epoch and horizontal `level`."""
    epochs = sorted({epoch for line in lines for epoch in line.values})
    values = [value for line in lines for value in line.values.values() if value is not None]
    values += [] if level is None else [level]
    y_ticks = make_ticks(min(values), max(values)) if values else [(0.0, ""), (1.0, "")]
    x_ticks = [tick for tick in make_ticks(epochs[0], epochs[-1], least_step=1) if epochs[0] <= tick[0] <= epochs[-1]]
    pad = 0.03 * (epochs[-1] - epochs[0]) or 0.5

    def x_of(epoch: float) -> float:
        return round(float(np.interp(epoch, (epochs[0] - pad, epochs[-1] + pad), (CHART_LEFT, CHART_RIGHT))), 1)

    def y_of(value: float) -> float:
        return round(float(np.interp(value, (y_ticks[0][0], y_ticks[-1][0]), (CHART_BOTTOM, CHART_TOP))), 1)

    paths = []
    for line in lines:
        series = [(epoch, line.values.get(epoch)) for epoch in epochs]
        points = [None if value is None else f"{x_of(epoch)} {y_of(value)}" for epoch, value in series]
        dots = "".join(f"M{point}h0" for point in points if point) if len(epochs) <= MAX_DOTTED_EPOCHS else ""
        paths.append({"ink": line.ink, "path": draw_line(points), "dots": dots})
    borders = [epochs[0] - pad, *(sum(pair) / 2 for pair in itertools.pairwise(epochs)), epochs[-1] + pad]
    hits = []
    for epoch, (low, high) in zip(epochs, itertools.pairwise(map(x_of, borders)), strict=True):
        readings = [f"{line.name} {format_number(line.values.get(epoch))}" for line in lines]
        hits.append({"x": low, "width": round(high - low, 1), "text": "\n".join([f"epoch {epoch}", *readings])})
    return {
        "title": title,
        "x_ticks": [(x_of(tick), text) for tick, text in x_ticks],
        "y_ticks": [(y_of(tick), text) for tick, text in y_ticks],
        "lines": [path for path in paths if path["path"]],
        "hits": hits if values else [],
        "best": None if best is None else x_of(best),
        "level": None if level is None else y_of(level),
    }


def make_ticks(low: float, high: float, least_step: float = 0.0) -> list[tuple[float, str]]:
    """Return up to ten ticks (value, text) that enclose a range, in steps of 1, 2 or 5 times a power of ten."""
    if low == high:
        low, high = low - 0.05, high + 0.05
    power = 10.0 ** math.floor(math.log10((high - low) / 8))
    step = max(least_step, next(factor * power for factor in (1, 2, 5, 10) if factor * power * 8 >= high - low))
    decimals = max(0, -math.floor(math.log10(step)))
    first = math.floor(low / step + 1e-9)  # 0.3 / 0.05 is 5.999
    last = math.ceil(high / step - 1e-9)
    return [(number * step, f"{number * step:.{decimals}f}") for number in range(first, last + 1)]


def draw_line(points: list[str | None]) -> str:
    """Return the SVG path through "x y" points; None leaves a gap, and `h0` shows a point between two gaps as a dot."""
    pairs = itertools.pairwise([None, *points])
    return "".join(f"L{point}" if previous else f"M{point}h0" for previous, point in pairs if point)
