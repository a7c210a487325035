"""Section 17: what the page shows is what the run measured, whatever the data is called."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lct_dino3 as lct

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    '"><img src="https://evil.example/x.png" onerror="document.title=1">',
    "{{ 7 * 7 }} {% raw %} & 'quotes'\nnew line \u2028 \u2029 \udcff \x00 \u202e",
)
PLAIN = ("hammer", "pliers", "wrench")


def make_events(names: tuple[str, ...], num_epochs: int, has_test: bool) -> list[dict[str, Any]]:
    scores = {"precision": 0.9, "recall": 0.8, "f1": 0.847, "auc": 0.95, "support": 5}
    per_class = {name: dict(scores) for name in names}
    per_class[names[0]] = {"precision": None, "recall": None, "f1": None, "auc": None, "support": 0}
    frozen = {"centroid_acc": 0.511, "nn1_acc": 0.522, "logreg_acc": 0.533}
    events: list[dict[str, Any]] = [{"event": "run_start", "time": 1767323045.0}]
    events.append({"event": "baseline_end", "time": 1.0, "val": frozen, "test": {**frozen, "logreg_acc": 0.544}})
    for epoch in range(1, num_epochs + 1):
        train = {"loss": 3.0 / epoch, "acc": 0.61 + 0.01 * epoch, "f1_macro": 0.6, "auc_macro": None}
        val = {**train, "acc": 0.5717 + 0.01 * epoch, "proto_acc": 0.6, "recall_at_1": 0.59}
        events.append({"event": "epoch_end", "time": 1.0, "epoch": epoch, "lr": 1e-3, "train": train, "val": val,
                       "train_per_class": per_class, "val_per_class": per_class, "seconds": 1.5})  # fmt: skip
    events.append({"event": "best_update", "time": 1.0, "epoch": num_epochs, "metric": "val_acc", "value": val["acc"]})
    events.append({"event": "proto_end", "time": 1.0, "matcher": "knn", "knn_k": 5})
    if has_test:
        prototypes = {"acc": 0.7123, "f1_macro": 0.7234, "auc_macro": 0.8345, "recall_at_1": 0.7456}
        arcface = {"loss": 1.1, "acc": 0.7012, "f1_macro": 0.69, "auc_macro": 0.82}
        events.append({"event": "test_end", "time": 1.0, "classifier": arcface, "prototypes": prototypes,
                       "per_class": per_class, "baseline": {"name": "logreg", "acc": 0.544},
                       "verdict": "training helped by 16.8 points"})  # fmt: skip
    return events


def make_report(
    root: Path, names: tuple[str, ...] = PLAIN, *, num_epochs: int = 3, has_test: bool = True
) -> lct.ReportInput:
    """Twelve pictures a class, every sixth one broken; two test images a class, of which the second is wrong."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(names)), 12)
    splits = np.array((["train"] * 7 + ["val"] * 3 + (["test"] * 2 if has_test else ["train"] * 2)) * len(names))
    paths = [f"{label}/{index}.png" for index, label in enumerate(labels)]
    for label in range(len(names)):
        (root / str(label)).mkdir(exist_ok=True, parents=True)
    for index, path in enumerate(paths):
        if index % 6:
            Image.fromarray(rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(root / path)
        else:
            (root / path).write_bytes(b"no picture")
    vectors = np.eye(len(names), 8)[labels] + 0.3 * rng.normal(size=(len(labels), 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    truth = labels[splits == "test"]
    predictions = np.where(np.arange(len(truth)) % 2, (truth + 1) % len(names), truth)
    scores = rng.uniform(-0.2, 0.4, (len(truth), len(names))).astype(np.float32)
    scores[np.arange(len(truth)), predictions] = rng.uniform(0.5, 0.9, len(truth))
    records = lct.Records(
        root, names, lct.PathTable(paths), labels.astype(np.int32), np.arange(len(paths)), np.zeros(len(paths), np.int8)
    )
    return lct.ReportInput(
        config={"options": lct.Config().as_plain() | {"data_root": str(root), "model_id": names[0]},
                "device": "cpu", "versions": {"python": "3.11"}},
        events=make_events(names, num_epochs, has_test), data_report=make_data_report(names, paths),
        class_names=names, records=records, embeddings=vectors, labels=labels, split_names=splits,
        shown=[lct.Shown(row, 0) for row in range(len(paths))],
        thresholds=np.linspace(0.111, 0.999, len(names)), is_pooled=np.arange(len(names)) == 1, test_scores=scores,
        nearest=[(lct.Shown(0, 0), lct.Shown(12 * a + 1, 0)) for a in truth.tolist()], temperature=0.1,
    )  # fmt: skip


def make_data_report(names: tuple[str, ...], paths: list[str]) -> dict[str, Any]:
    sizes = {f"{side}_{name}": 10 for side in ("width", "height") for name in ("min", "median", "max")}
    return {
        "num_images": 40, "num_usable": 36, "leaks_prevented": 1, "exif_rotated": 2, "sizes": sizes, "modes": {"RGB": 36},
        "quarantined": [{"path": f"bad/{name}", "reason": f"unreadable: {name}"} for name in names],
        "masks": {"usable": 17, "made": 4, "refused": [{"path": f"m/{name}", "reason": name} for name in names], "not_made": []},
        "warnings": list(names), "duplicates": {"exact": [], "near": [list(names)]},
        "label_conflicts": [[paths[1], paths[13]], ["gone.png", "gone too"]],
    }  # fmt: skip


def write(report: lct.ReportInput, path: Path) -> str:
    lct.write_report(report, path)
    return path.read_bytes().decode("utf-8")  # strict: the page is always valid UTF-8


class Page(HTMLParser):
    """Tags, loads, scripts and the text of a page, as a parser that is not ours sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        is_script = bool(self.tags) and self.cdata_elem == "script"
        (self.scripts if is_script else self.words).append(data)


def read_tiles(text: str) -> dict[str, str]:
    return dict(re.findall(r'class="tile"><span>(.*?)</span><b>(.*?)</b>', text))


def test_the_page_shows_the_figures_of_the_events(tmp_path: Path) -> None:
    text = write(make_report(tmp_path / "data"), tmp_path / "report.html")
    assert read_tiles(text) == {"Accuracy": "0.712", "Macro F1": "0.723", "Macro ROC AUC": "0.835", "Recall@1": "0.746",
                                "Classifier accuracy": "0.701", "Best epoch": "3", "Images": "36", "Classes": "3"}  # fmt: skip
    assert '<h1 class="good">Training helped by 16.8 points</h1>' in text
    assert re.findall(r'class="right">(.*?)</span></div>', text) == ["0.712", "0.701", "0.544", "0.522", "0.511"]
    assert "2026-01-02 03:04 UTC" in text and "mean of the 5 nearest references" in text


def test_class_table_has_scores_and_thresholds(tmp_path: Path) -> None:
    text = write(make_report(tmp_path / "data"), tmp_path / "report.html")
    table = text[text.index('<table class="classes">') : text.index('id="confusion"')]
    rows = [re.findall(r'data-v="(.*?)"', row) for row in table.split("<tr")[2:]]
    assert rows[0] == ["hammer", "7", "3", "2", "", "", "", "", "0.111"]
    assert rows[2] == ["wrench", "7", "3", "2", "0.9", "0.8", "0.847", "0.95", "0.999"]


def test_resumed_run_counts_the_last_of_repeated_epochs(tmp_path: Path) -> None:
    events = make_events(PLAIN, 3, True)
    again = json.loads(json.dumps(next(event for event in events if event.get("epoch") == 2)))
    again["val"]["acc"] = 0.123
    figures = lct._collect_figures([*events, {"event": "resumed", "time": 3.0}, again])
    assert [epoch["epoch"] for epoch in figures.epochs] == [1, 2, 3]
    assert figures.epochs[1]["val"]["acc"] == 0.123


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    text = write(make_report(tmp_path / "data", HOSTILE), tmp_path / "report.html")
    page = Page(text)
    assert page.scripts == [lct._REPORT_JS]
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert not re.search(r"(?<!&#34;)=\"https?://", text)
    assert "{{ 7 * 7 }}" in text  # shown as it is, not computed
    shown = [attrs["title"] for tag, attrs in page.tags if tag == "button" and "title" in attrs]
    assert shown == [name.encode("utf-8", "backslashreplace").decode() for name in HOSTILE]


@pytest.mark.parametrize("names", [PLAIN, HOSTILE])
def test_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path, names: tuple[str, ...]) -> None:
    page = Page(write(make_report(tmp_path / "data", names), tmp_path / "report.html"))
    loads = [
        attrs[key]
        for _, attrs in page.tags
        for key in ("src", "href", "xlink:href", "srcset", "action")
        if key in attrs
    ]
    assert loads and all(load.startswith(("data:", "#")) for load in loads)
    assert "url(http" not in page.words and "@import" not in "".join(page.words)
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def browse(path: Path) -> tuple[str, str]:
    """Return the page after its scripts have run in a window 1,280 px wide, and what the browser said about it."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += (
        " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom --window-size=1280,800"
    )
    command = [chromium, *flags.split(), f"--user-data-dir={path.parent / 'profile'}", path.as_uri()]
    result = subprocess.run(command, capture_output=True, timeout=90, check=True)
    return result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")


@pytest.mark.parametrize("case", ["plain", "hostile", "one_epoch", "no_test", "no_epochs"])
def test_browser_shows_it_without_a_console_message(tmp_path: Path, case: str) -> None:
    report = make_report(tmp_path / "data", HOSTILE if case == "hostile" else PLAIN,
                         num_epochs=1 if case == "one_epoch" else 3, has_test=case not in ("no_test", "no_epochs"))  # fmt: skip
    if case == "no_epochs":
        report = replace(report, events=report.events[:1])
    write(report, tmp_path / "report.html")
    dom, messages = browse(tmp_path / "report.html")
    assert "CONSOLE" not in messages
    assert 'id="data"' in dom and "owned</title>" not in dom
    assert 'class="chips" hidden' not in dom  # our script has run to its end


@pytest.mark.parametrize("num_classes", [3, 17, 20, 21, 60])
def test_tables_fit_a_desktop_screen(tmp_path: Path, num_classes: int) -> None:
    names = tuple(f"a rather long class name, number {i}" for i in range(num_classes))
    text = write(make_report(tmp_path / "data", names), tmp_path / "report.html")
    probe = """[
      [...document.querySelectorAll(".scroll")].every(box => box.scrollWidth <= box.clientWidth),
      [...document.querySelectorAll(".matrix td")].every(cell => Math.abs(cell.offsetWidth - cell.offsetHeight) <= 1),
    ]"""  # a table that is too wide squeezes its cells before it scrolls
    text = re.sub(r"<meta http-equiv[^>]*>", "", text)  # the policy would not let the probe run
    (tmp_path / "probe.html").write_text(text.replace("</body>", f"<script>document.title = {probe}</script></body>"))
    assert "<title>true,true</title>" in browse(tmp_path / "probe.html")[0]


def test_single_epoch_is_a_visible_dot(tmp_path: Path) -> None:
    text = write(make_report(tmp_path / "data", num_epochs=1), tmp_path / "report.html")
    curves = text[text.index('id="curves"') : text.index('id="classes"')]
    assert curves.count("<svg") == 4
    assert len(re.findall(r'class="dots" d="M[\d.]+ [\d.]+h0"', curves)) == 7  # loss 2, accuracy 3, F1 2, AUC none
    assert "no figures" in curves


def test_no_test_split_shows_val_and_says_so(tmp_path: Path) -> None:
    text = write(make_report(tmp_path / "data", has_test=False), tmp_path / "report.html")
    assert text.count("No test split") >= 4 and '<h1 class="plain">' in text
    tiles = read_tiles(text)
    assert tiles["Accuracy"] == "0.600" and tiles["Classifier accuracy"] == "0.602"


def test_lost_events_leave_dashes(tmp_path: Path) -> None:
    report = make_report(tmp_path / "data")
    text = write(replace(report, events=[]), tmp_path / "report.html")
    assert read_tiles(text)["Best epoch"] == "–" and "No epoch was finished" in text


def test_same_input_same_bytes(tmp_path: Path) -> None:
    report = make_report(tmp_path / "data")
    assert write(report, tmp_path / "a.html") == write(report, tmp_path / "b.html")


def test_unreadable_and_missing_pictures_become_placeholders(tmp_path: Path) -> None:
    report = make_report(tmp_path / "data")
    text = write(report, tmp_path / "report.html")
    errors = text[text.index('id="errors"') : text.index('id="calibration"')]
    assert errors.count('class="card"') == 3 and "no image" in errors and "data:image/jpeg" in errors
    shutil.rmtree(tmp_path / "data")
    assert "no image" in write(report, tmp_path / "report.html")


def test_errors_are_sorted_by_confidence_and_capped(tmp_path: Path) -> None:
    names = tuple(f"class {i:02d}" for i in range(60))
    report = make_report(tmp_path / "data", names)
    views = lct._error_views(report, lct._collect_test_rows(report))
    sure = [card["sides"][0]["probability"] for card in views["cards"]]
    assert views["num_errors"] == 60 and len(sure) == lct.MAX_ERRORS and sure == sorted(sure, reverse=True)
    row = int(np.flatnonzero(report.split_names == "test")[1])
    powers = [math.exp(float(cosine) / 0.1) for cosine in report.test_scores[1]]
    card = next(card for card in views["cards"] if card["path"] == report.records.paths[row])
    assert [side["kind"] for side in card["sides"]] == ["predicted", "true"]
    assert card["sides"][0]["probability"] == pytest.approx(max(powers) / sum(powers), rel=1e-6)


def test_calibration_error_equals_the_definition(tmp_path: Path) -> None:
    test = lct._collect_test_rows(make_report(tmp_path / "data"))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, is_right in zip(test.confidences, test.predictions == test.labels, strict=True):
        bins.setdefault(min(int(confidence * 10), 9), []).append((float(confidence), bool(is_right)))
    gaps = [abs(sum(c for c, _ in rows) - sum(r for _, r in rows)) for rows in bins.values()]
    view = lct._calibration_view(test)
    assert view["error"] == pytest.approx(sum(gaps) / len(test.rows))
    assert sum(count for count, _, _ in view["bins"]) == len(test.rows)


@pytest.mark.parametrize("num_classes", [2, 40, 61])
def test_confusion_matrix_has_every_test_image(tmp_path: Path, num_classes: int) -> None:
    names = tuple(f"a rather long class name, number {i}" for i in range(num_classes))
    report = make_report(tmp_path / "data", names)
    view = lct._confusion_view(lct._collect_test_rows(report), names)
    assert view and view["num_pairs"] == num_classes
    if num_classes > lct.MAX_MATRIX_CLASSES:
        assert view["matrix"] is None and len(view["pairs"]) == 50
    else:
        assert np.sum(view["matrix"]) == 2 * num_classes and np.trace(view["matrix"]) == num_classes
        assert len(set(view["names"])) == num_classes  # shortened, but still apart


@pytest.mark.parametrize("count", [1, 2, 9, 10, 40])
def test_map_of_few_or_equal_images(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert lct._project(vectors).shape == (count, 2) and np.isfinite(lct._project(vectors)).all()
        assert np.isfinite(lct._project(np.ones_like(vectors))).all()


def test_map_takes_every_class_and_split_in_proportion(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), (4000, 1500, 1000, 500))
    splits = np.tile(np.array(["train"] * 7 + ["val"] * 2 + ["test"]), 700)
    report = replace(make_report(tmp_path / "data"), labels=labels, split_names=splits)
    chosen = lct._choose_map_rows(report)
    assert len(np.unique(chosen)) == len(chosen) == lct.MAP_MAX_POINTS
    share = np.bincount(labels[chosen]) / len(chosen)
    assert np.abs(share - np.bincount(labels) / len(labels)).max() < 0.002
    assert abs((splits[chosen] == "test").mean() - 0.1) < 0.005


@pytest.mark.parametrize("low, high", [(0.3, 0.58), (2.49, 11.7), (0.999, 1.0), (0.5, 0.5), (0, 1234), (-1e-7, 3e-7)])
def test_ticks_are_round_and_enclose_the_figures(low: float, high: float) -> None:
    ticks = lct._nice_ticks(low, high)
    values = [value for value, _ in ticks]
    assert 2 <= len(ticks) <= 10 and values[0] <= low + 1e-12 and values[-1] >= high - 1e-12
    step = (values[-1] - values[0]) / (len(values) - 1)
    assert f"{step:.6e}".startswith(("1.000000", "2.000000", "5.000000"))
    assert [float(text) for _, text in ticks] == pytest.approx(values)
    assert len({text for _, text in ticks}) == len(ticks)


def test_line_leaves_a_gap_where_a_figure_is_absent() -> None:
    assert lct._line_path(["1 1", "2 2", None, "4 4"]) == "M1 1h0L2 2M4 4h0"


def test_long_lists_are_cut_with_a_count(tmp_path: Path) -> None:
    many = [{"path": f"{i}.jpg", "reason": "truncated"} for i in range(1234)]
    report = make_report(tmp_path / "data")
    report = replace(report, data_report=report.data_report | {"quarantined": many})
    text = write(report, tmp_path / "report.html")
    assert text.count(".jpg — truncated") == lct.MAX_LISTED and "and 1,034 more" in text


def test_views_are_compared_on_the_crops_they_disagree_about(tmp_path: Path) -> None:
    report = make_report(tmp_path / "data")
    rows = np.flatnonzero(report.split_names == "test")
    labels = report.labels[rows]
    scores = np.full((2, len(rows), len(PLAIN)), 0.1)
    answers = np.stack([labels, np.where(np.arange(len(rows)) == 1, (labels + 1) % len(PLAIN), labels)])
    np.put_along_axis(scores, answers[:, :, None], 0.8, axis=2)  # masked, the second crop is taken for another class
    figures = {"acc": 1.0, "f1_macro": 1.0, "auc_macro": None, "recall_at_1": 0.9}
    event = {
        "event": "test_views",
        "images": len(rows),
        "disagree": 1,
        "bbox": figures,
        "mask": figures | {"acc": 0.8333},
    }
    pairs = lct.ViewPairs(rows, labels, scores)
    text = write(replace(report, events=[*report.events, event], view_pairs=pairs), tmp_path / "report.html")
    section = text[text.index('id="views"') : text.index('id="map"')]
    assert "0.833" in section and section.count('class="card"') == 1
    assert f"{PLAIN[labels[1]]}" in section and report.records.paths[rows[1]] in section
    assert [lct._view_comparison(report, None), 'href="#views"' in write(report, tmp_path / "b.html")] == [None, False]
    view = lct._view_comparison(replace(report, view_pairs=pairs), event)
    assert list(view["tallies"].values()) == [len(rows) - 1, 1, 0, 0]
    assert view["classes"] == [{"label": int(labels[1]), "count": 2, "recall": [1.0, 0.5]}]


def test_a_masked_test_image_is_shown_masked(tmp_path: Path) -> None:
    report = make_report(tmp_path / "data")
    Image.fromarray(np.full((30, 50, 3), (250, 0, 0), np.uint8)).save(tmp_path / "data/0/1.png")
    mask = np.zeros((30, 50), np.uint8)
    mask[:, :25] = 255
    (tmp_path / "data/0/masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "data/0/masks/1_mask.png")
    masks = lct.PathTable(["", "0/masks/1_mask.png", *[""] * (len(report.labels) - 2)])
    records = replace(report.records, masks=masks)
    plain, masked = (np.asarray(lct._load_thumbnail(records, lct.Shown(1, view), 50)) for view in (0, 1))
    assert (plain == (250, 0, 0)).all()
    assert (masked[:, :25] == (250, 0, 0)).all() and (masked[:, 25:] == lct.PADDING_GRAY).all()


def test_an_image_that_is_judged_both_ways_counts_once(tmp_path: Path) -> None:
    report = make_report(tmp_path / "data")
    twice = {
        name: np.concatenate([getattr(report, name)] * 2)
        for name in ("embeddings", "labels", "split_names", "test_scores")
    }
    shown = [*report.shown, *(lct.Shown(row, 1) for row in range(len(report.labels)))]
    both = replace(report, **twice, shown=shown, nearest=report.nearest * 2)
    assert both.count_images().tolist() == report.count_images().tolist() == [12, 12, 12]
    assert both.count_images("test").tolist() == [2, 2, 2]
    text = write(both, tmp_path / "report.html")
    assert "6 of 12 views of test images are wrong" in " ".join(text.split()) and "36 images" in text


def test_trust_shows_what_was_measured(tmp_path: Path) -> None:
    report = make_report(tmp_path / "data")
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 10)
    values = np.eye(3, 6)[labels] + 0.3 * rng.normal(size=(30, 6))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    part = lct.Embedded(np.arange(30), np.zeros(30, np.uint8), labels, values)
    gallery = lct.build_gallery(report.records, part, part, lct.Config())
    measured = {"event": "measured", **lct.to_json(lct.measure_gallery(gallery, part))}
    text = " ".join(write(replace(report, events=[*report.events, measured]), tmp_path / "report.html").split())
    section = text[text.index('id="trust"') : text.index('id="calibration"')]
    low, high = measured["closed"]["centroid"]["acc"]["interval"]
    assert f"{low:.3f} – {high:.3f}" in section and "classes held out in turn" in section
    assert section.count("%</td>") == len(lct.PRECISION_TARGETS)
    assert measured["few"] == [] and 'href="#trust"' not in write(report, tmp_path / "b.html")


def test_masks_are_counted_and_refused_ones_named(tmp_path: Path) -> None:
    text = write(make_report(tmp_path / "data"), tmp_path / "report.html")
    section = text[text.index('id="data"') :]
    assert "17, 4 of them drawn by SAM-2" in section and "m/hammer — hammer" in section and "Refused masks" in section
