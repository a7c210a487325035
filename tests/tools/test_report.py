"""tools/report.py: what the pages show is what the files of the runs say, whatever the data is called."""

import base64
import csv
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import report
import report_comparison
import report_page
import run_files
import tifffile
import torch
from conftest import FITS, browse, probe
from PIL import Image

import lct_dino3 as lct

TOOL = Path(report.__file__)
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    '"><img src="https://evil.example/x.png" onerror="document.title=1">',
    "{{ 7 * 7 }} {% raw %} & 'quotes'\nnew line \u2028 \u2029 \x01 \u202e",
)
PLAIN = ("hammer", "pliers", "wrench")
COLUMNS = (
    "path view class answer is_unknown cosine probability runner_up runner_up_cosine class_cosine"
    " nearest_reference nearest_reference_view nearest_of_class nearest_of_class_view mask group"
).split()


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
    matched = {"refs": 1021, "prototypes": 43, "matcher": "knn", "knn_k": 5, "feature_weight": 0.25}
    events.append({"event": "proto_end", "time": 1.0, **matched})
    if has_test:
        prototypes = {"acc": 0.7123, "f1_macro": 0.7234, "auc_macro": 0.8345, "recall_at_1": 0.7456}
        arcface = {"loss": 1.1, "acc": 0.7012, "f1_macro": 0.69, "auc_macro": 0.82}
        events.append({"event": "test_end", "time": 1.0, "classifier": arcface, "prototypes": prototypes,
                       "images": 2 * len(names), "per_class": per_class, "baseline": {"name": "logreg", "acc": 0.544},
                       "verdict": "training helped: matching 0.712, regression 0.544 (+16.8 points)"})  # fmt: skip
    return events


def make_data_report(names: tuple[str, ...], paths: list[str]) -> dict[str, Any]:
    sizes = {f"{side}_{name}": 10 for side in ("width", "height") for name in ("min", "median", "max")}
    return {
        "num_images": 40, "num_usable": 36, "num_used": 36,
        "leaks_prevented": 1, "exif_rotated": 2, "sizes": sizes, "modes": {"RGB": 36},
        "quarantined": [{"path": f"bad/{name}", "reason": f"unreadable: {name}"} for name in names],
        "masks": {"usable": 17, "made": 4, "refused": [{"path": f"m/{name}", "reason": name} for name in names], "not_made": []},
        "warnings": list(names), "duplicates": {"exact": [], "near": [list(names)]},
        "label_conflicts": [[paths[1], paths[13]], ["gone.png", "gone too"]],
    }  # fmt: skip


class MadeRun:
    """A run's folder: twelve pictures a class, every sixth one broken; two test images a class, of which the second is wrong."""

    def __init__(
        self, root: Path, names: tuple[str, ...] = PLAIN, *, num_epochs: int = 3, has_test: bool = True, seed: int = 0
    ) -> None:
        self.path, self.data, self.names = root / "run", root / "data", names
        self.path.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        self.labels = np.repeat(np.arange(len(names)), 12)
        self.splits = np.array((["train"] * 7 + ["val"] * 3 + ["test" if has_test else "train"] * 2) * len(names))
        self.paths = [f"{label}/{index}.png" for index, label in enumerate(self.labels)]
        for label in range(len(names)):
            (self.data / str(label)).mkdir(parents=True)
        for index, path in enumerate(self.paths):
            if index % 6:
                Image.fromarray(rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(self.data / path)
            else:
                (self.data / path).write_bytes(b"no picture")
        self.views = np.zeros(len(self.paths), np.uint8)
        self.masks = [""] * len(self.paths)
        vectors = np.eye(len(names), 8)[self.labels] + 0.3 * rng.normal(size=(len(self.labels), 8))
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.rows = [self.make_row(int(row), rng) for row in np.flatnonzero(self.splits == "test")]
        self.events = make_events(names, num_epochs, has_test)
        self.data_report = make_data_report(names, self.paths)
        self.options = lct.Config().as_plain() | {"data_root": str(self.data), "model_id": names[0]}

    def make_row(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        label = int(self.labels[row])
        answer = (label + row % 2) % len(self.names)
        cosine, class_cosine = rng.uniform(0.5, 0.9, 2)
        probability = rng.uniform(0.2, 0.5)
        values = (
            *(self.paths[row], "bbox", self.names[label], self.names[answer], "false", cosine, probability),
            *(self.names[(label + 1) % len(self.names)], 0.4, class_cosine),
            *(self.paths[0], "bbox", self.paths[12 * label + 1], "bbox", "", row),
        )
        return dict(zip(COLUMNS, values, strict=True))

    def write(self) -> Path:
        """Write the files as the script does, and return the folder."""
        config = {
            "options": self.options,
            "device": "cpu",
            "versions": {"python": "3.11"},
            "model": {"weights_hash": "0"},
        }
        config["data"] = {"fingerprint": "0", "images": len(self.paths), "classes": list(self.names)}
        splits: dict[str, Any] = {"seed": 42}
        for split in run_files.SPLIT_NAMES:
            chosen = [i for i in range(len(self.paths)) if self.splits[i] == split and self.views[i] == 0]
            splits[split] = {
                name: [self.paths[i] for i in chosen if self.labels[i] == n] for n, name in enumerate(self.names)
            }
        for name, content in (("config", config), ("splits", splits), ("data_report", self.data_report)):
            (self.path / f"{name}.json").write_text(json.dumps(content), "utf-8")
        (self.path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events), "utf-8")
        meta = {"pooled_thresholds": [self.names[1]]}
        thresholds = np.linspace(0.111, 0.999, len(self.names), dtype=np.float32)
        np.savez(
            self.path / "prototypes.npz", id2cls=np.array(self.names), thresholds=thresholds, meta=json.dumps(meta)
        )
        np.savez(
            self.path / "embeddings.npz", embeddings=self.vectors, labels=self.labels, paths=np.array(self.paths),
            views=self.views, splits=self.splits, masks=np.array(self.masks), class_names=np.array(self.names),
        )  # fmt: skip
        if self.rows:
            write_rows(self.path / "predictions.csv", self.rows)
        return self.path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_page(*folders: Path, out: Path | None = None) -> str:
    """Call the tool as a user does, in this process; return the page."""
    assert report.main([*map(str, folders), *(["--out", str(out)] if out else [])]) == 0
    return (out or folders[0] / "report.html").read_bytes().decode("utf-8")  # strict: the page is always valid UTF-8


def refuse(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Call the tool, expect exit code 2, and return the sentence."""
    capsys.readouterr()
    assert report.main(list(map(str, args))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


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


def section(text: str, name: str) -> str:
    """Return the words and tags of a section, on one line."""
    start = text.index(f'<section id="{name}"')
    return " ".join(text[start : text.index("</section>", start)].replace("<wbr>", "").split())


# --- the page of one run


def test_the_page_shows_the_figures_of_the_events(tmp_path: Path) -> None:
    text = make_page(MadeRun(tmp_path).write())
    assert read_tiles(text) == {"Accuracy": "0.712", "Macro F1": "0.723", "Macro ROC AUC": "0.835", "Recall@1": "0.746",
                                "Classifier accuracy": "0.701", "Best epoch": "3", "Images": "36", "Classes": "3"}  # fmt: skip
    assert '<h1 class="good">Training helped</h1>' in text and "0.544 (+16.8 points)" in text
    assert re.findall(r'class="right">(.*?)</span></div>', text) == ["0.712", "0.701", "0.544", "0.522", "0.511"]
    assert "2026-01-02 03:04 UTC" in text and "mean of the 5 nearest references of a class; 25% of a cosine" in text
    assert "<small>12 images each</small>" in text and "and 0 more" not in text


def test_it_runs_as_a_program_without_torch_or_anything_of_ours(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "ключи").write()
    (tmp_path / "torch.py").write_text("raise ImportError('torch')")
    (tmp_path / "lct_dino3.py").write_text("raise ImportError('lct_dino3')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, TOOL, run], capture_output=True, text=True, env=env, timeout=60, check=False)
    shown = str(run / "report.html").encode("ascii", "backslashreplace").decode()
    assert (done.returncode, done.stdout) == (0, f"written: {shown}\n"), done.stderr
    assert "pictures that cannot be read: 8;" in done.stderr and (run / "report.html").is_file()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_class_table_has_scores_and_thresholds(tmp_path: Path) -> None:
    text = make_page(MadeRun(tmp_path).write())
    table = text[text.index('<table class="classes">') : text.index('id="confusion"')]
    rows = [re.findall(r'data-v="(.*?)"', row) for row in table.split("<tr")[2:]]
    assert rows[0][:8] == ["hammer", "7", "3", "2", "", "", "", ""] and float(rows[0][8]) == pytest.approx(0.111)
    assert rows[2][:8] == ["wrench", "7", "3", "2", "0.9", "0.8", "0.847", "0.95"] and "0.555 *" in table


def test_resumed_run_counts_the_last_of_repeated_epochs(tmp_path: Path) -> None:
    events = make_events(PLAIN, 3, True)
    again = json.loads(json.dumps(next(event for event in events if event.get("epoch") == 2)))
    again["val"]["acc"] = 0.123
    figures = run_files.collect_figures([*events, {"event": "resumed", "time": 3.0}, again])
    assert [epoch["epoch"] for epoch in figures.epochs] == [1, 2, 3]
    assert figures.epochs[1]["val"]["acc"] == 0.123


def make_hostile_pair(tmp_path: Path) -> tuple[str, str]:
    """Return the page of a run whose classes have hostile names, and one that compares it with another."""
    runs = [MadeRun(tmp_path / name, HOSTILE, seed=seed) for seed, name in enumerate(("<b>a", "b'\"&"))]
    runs[1].rows[0]["answer"] = HOSTILE[2]
    folders = [run.write() for run in runs]
    return make_page(folders[0]), make_page(*folders, out=tmp_path / "compare.html")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    template = (TOOL.with_name("report.html.j2")).read_text("utf-8")
    script = template[template.index("{% set script %}\n") + 17 : template.index("{% endset %}")]
    for text in make_hostile_pair(tmp_path):
        page = Page(text)
        assert page.scripts == [script]
        assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
        assert not re.search(r"(?<!&#34;)=\"https?://", text)
        assert "{{ 7 * 7 }}" in text.replace("<wbr>", "")  # shown as it is, not computed
    text = make_page(tmp_path / "<b>a" / "run")
    shown = [attrs["title"] for tag, attrs in Page(text).tags if tag == "button" and "title" in attrs]
    assert shown == list(HOSTILE)


@pytest.mark.parametrize("kind", [0, 1])
def test_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path, kind: int) -> None:
    page = Page(make_hostile_pair(tmp_path)[kind])
    keys = ("src", "href", "xlink:href", "srcset", "action")
    loads = [attrs[key] for _, attrs in page.tags for key in keys if key in attrs]
    assert loads and all(load.startswith(("data:", "#")) for load in loads)
    assert "url(http" not in page.words and "@import" not in "".join(page.words)
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


@pytest.mark.parametrize("case", ["hostile", "one_epoch", "no_test", "no_epochs"])
def test_browser_shows_it_without_a_console_message(tmp_path: Path, case: str) -> None:
    run = MadeRun(tmp_path, HOSTILE if case == "hostile" else PLAIN,
                  num_epochs=1 if case == "one_epoch" else 3, has_test=case not in ("no_test", "no_epochs"))  # fmt: skip
    if case == "no_epochs":
        run.events = run.events[:1]
    make_page(run.write())
    dom, messages = browse(run.path / "report.html")
    assert "CONSOLE" not in messages
    assert 'id="data"' in dom and "owned</title>" not in dom
    assert 'class="chips" hidden' not in dom  # our script has run to its end


@pytest.fixture
def quick_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the map of hundreds of images drawn as that of a few: t-SNE takes seconds."""
    monkeypatch.setattr(report_page, "MIN_TSNE_POINTS", report_page.MAP_MAX_POINTS + 1)


@pytest.mark.parametrize("num_classes", [3, 17, 20, 21, 60])
def test_tables_fit_a_desktop_screen(quick_map: None, tmp_path: Path, num_classes: int) -> None:
    run = MadeRun(tmp_path, tuple(f"a rather long class name, number {i}" for i in range(num_classes)))
    make_page(run.write())
    script = """[
      [...document.querySelectorAll(".scroll")].every(box => box.scrollWidth <= box.clientWidth),
      [...document.querySelectorAll(".matrix td")].every(cell => Math.abs(cell.offsetWidth - cell.offsetHeight) <= 1),
    ]"""  # a table that is too wide squeezes its cells before it scrolls
    assert probe(run.path / "report.html", script) == "true,true"


@pytest.mark.parametrize("width", [400, 1000, 1600])
def test_no_page_is_wider_than_its_window_and_no_picture_than_its_frame(tmp_path: Path, width: int) -> None:
    runs = [MadeRun(tmp_path / name, tuple(f"class_{'long_' * 9}{i}" for i in range(3))) for name in "ab"]
    for run in runs:
        for index, path in enumerate(run.paths):  # tall and wide ones
            Image.new("RGB", ((20, 160), (160, 20))[index % 2]).save(run.data / path)
        run.write()
    make_page(runs[0].path)
    make_page(*(run.path for run in runs), out=tmp_path / "compare.html")
    assert probe(runs[0].path / "report.html", FITS, width) == "true,true"
    # On a phone too the figures of two runs stand side by side.
    is_whole = (
        '[...document.querySelectorAll(".side")].every(side => side.offsetWidth <= side.parentElement.clientWidth)'
    )
    assert probe(tmp_path / "compare.html", f"[...{FITS}, {is_whole}]", width) == "true,true,true"


def test_a_long_class_name_breaks_between_its_words(tmp_path: Path) -> None:
    """Each line of a pair, as the browser has broken it, ends where a word does."""
    run = MadeRun(
        tmp_path, tuple(f"adjustable_needle_nose_pliers_with_wire_cutter_and_red_handles_{i}" for i in range(3))
    )
    make_page(run.write())
    script = """(() => {
      const words = document.querySelector(".pairs .name"), range = document.createRange(), lines = [];
      let top = null;
      for (const node of words.childNodes) for (let i = 0; i < (node.data || "").length; i++) {
        range.setStart(node, i); range.setEnd(node, i + 1);
        const at = range.getBoundingClientRect().top;
        if (at !== top) lines.push("");
        top = at; lines[lines.length - 1] += node.data[i];
      }
      return lines.join("|");
    })()"""
    is_line = "[...document.querySelectorAll('.chip')].every(chip => chip.offsetHeight < 30)"
    has_flat_legend, *lines = probe(run.path / "report.html", f"[{is_line}, {script}].join('|')").split("|")
    assert has_flat_legend == "true", "the legend of the map has one line a name"
    assert len(lines) > 1 and all(line.endswith("_") for line in lines[:-1])
    assert "".join(lines) in run.names


def test_single_epoch_is_a_visible_dot(tmp_path: Path) -> None:
    curves = section(make_page(MadeRun(tmp_path, num_epochs=1).write()), "curves")
    assert curves.count("<svg") == 4
    assert len(re.findall(r'class="dots" d="M[\d.]+ [\d.]+h0"', curves)) == 7  # loss 2, accuracy 3, F1 2, AUC none
    assert "no figures" in curves


def test_the_figures_of_an_epoch_are_shown_where_the_pointer_is(tmp_path: Path) -> None:
    curves = section(make_page(MadeRun(tmp_path).write()), "curves")
    assert curves.count("<title>epoch 2 train 0.630 val 0.592 val, prototypes 0.600</title>") == 1
    assert curves.count("<title>epoch ") == 3 * 3  # none where there are no figures


def test_no_test_split_shows_val_and_says_so(tmp_path: Path) -> None:
    text = make_page(MadeRun(tmp_path, has_test=False).write())
    assert text.count("No test split") >= 4 and '<h1 class="plain">' in text
    tiles = read_tiles(text)
    assert tiles["Accuracy"] == "0.600" and tiles["Classifier accuracy"] == "0.602"
    assert text.count("the classifier, val") == 2, "macro F1 and macro ROC AUC"


def test_without_the_figures_of_each_class_there_are_dashes(tmp_path: Path) -> None:
    """As with --no-save_metrics."""
    run = MadeRun(tmp_path, has_test=False)
    for event in run.events:
        event.pop("val_per_class", None)
    text = make_page(run.write())
    assert section(text, "classes").count("<span>–</span>") == 4 * 3 and read_tiles(text)["Accuracy"] == "0.600"


def test_a_run_that_has_diverged_says_so(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.events = [event for event in run.events if event["event"] not in ("proto_end", "test_end")]
    assert "Not finished, no verdict yet" in make_page(run.write())
    run.events.append({"event": "run_end", "status": "diverged"})
    assert "Diverged, no verdict yet" in make_page(run.write())


def test_a_finished_run_that_trains_on_shows_no_older_test(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    epoch = next(event for event in run.events if event["event"] == "epoch_end")
    end = [event for event in run.events if event["event"] in ("proto_end", "test_end", "measured", "run_end")]
    run.events += [{"event": "resumed"}, epoch | {"epoch": 4}]
    text = make_page(run.write())
    assert "Not finished, no verdict yet" in text and "has trained on since it was tested" in text
    assert read_tiles(text)["Accuracy"] == "0.600", "of val"
    run.events += end
    assert "Training helped" in make_page(run.write())


def test_lost_events_leave_dashes(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.events = []
    text = make_page(run.write())
    assert read_tiles(text)["Best epoch"] == "–" and "No epoch was finished" in text and "Not finished" in text


def test_a_best_metric_without_a_value_is_a_dash(tmp_path: Path) -> None:
    """As AUC where val times classes exceed the memory that the script takes for scores."""
    run = MadeRun(tmp_path)
    next(event for event in run.events if event["event"] == "best_update").update(metric="auc_macro", value=None)
    assert "auc_macro –" in make_page(run.write())


def test_ctrl_c_costs_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = MadeRun(tmp_path).write()
    (run / "report.html").write_text("earlier")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name in ("describe_run", "write_page"):
        with monkeypatch.context() as patch:
            patch.setattr(report, name, interrupt)
            assert report.main([str(run)]) == 130
        assert capsys.readouterr().err == "interrupted (SIGINT); the same command starts again\n"
    assert (run / "report.html").read_text() == "earlier"


def test_half_a_line_of_a_killed_run_is_passed_over(tmp_path: Path) -> None:
    run = MadeRun(tmp_path).write()
    whole = make_page(run)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "test_end", "prot')
    assert make_page(run) == whole


@pytest.mark.parametrize(
    "name, lost",
    [
        ("predictions.csv", ["confusion", "calibration"]),
        ("embeddings.npz", ["map"]),
        ("data_report.json", ["data"]),
        ("prototypes.npz", []),
        ("splits.json", []),
    ],
)
def test_a_missing_file_costs_only_what_it_feeds(tmp_path: Path, name: str, lost: list[str]) -> None:
    run = MadeRun(tmp_path).write()
    whole = make_page(run)
    (run / name).unlink()
    text = make_page(run)
    assert read_tiles(text)["Accuracy"] == "0.712" and section(text, "curves") == section(whole, "curves")
    for part in lost:
        gone = f'<section id="{part}"' not in text
        assert gone or "no predictions.csv" in section(text, part)
        assert gone == (f'href="#{part}"' not in text)


@pytest.mark.parametrize("name", ["config.json", "predictions.csv", "embeddings.npz", "prototypes.npz", "splits.json"])
def test_a_damaged_file_is_named_in_one_sentence(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = MadeRun(tmp_path).write()
    (run / name).write_bytes((run / name).read_bytes()[:100])
    assert str(run / name) in refuse(capsys, run)
    assert not (run / "report.html").exists()


def test_rows_of_predictions_are_whole_and_of_known_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = MadeRun(tmp_path)
    path = run.write() / "predictions.csv"
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} cannot be read: it has a row that is not whole" in refuse(capsys, run.path)
    run.write()
    path = run.path / "predictions_by_view.csv"
    write_rows(path, [run.rows[0] | {"answer": "spoon"}])
    assert f"{path} names a class that the run does not have: spoon" in refuse(capsys, run.path)


def test_a_mistyped_option_names_the_right_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word, remedy in (
        ("--data-root=x", "; did you mean --data_root?\n"),
        ("--zzz", "unrecognized arguments: --zzz\n"),
    ):
        with pytest.raises(SystemExit) as caught:
            report.main([str(tmp_path), word])
        assert caught.value.code == 2 and capsys.readouterr().err.endswith(remedy)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no folder of a run" in refuse(capsys, tmp_path)
    assert "File name too long" in refuse(capsys, tmp_path / ("a" * 256))
    run = MadeRun(tmp_path)
    run.events[2]["val"]["loss"] = float("inf")
    assert "holds what no run writes" in refuse(capsys, run.write())


def test_nothing_pickled_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = MadeRun(tmp_path).write()
    np.savez(run / "embeddings.npz", embeddings=np.array([print], dtype=object))
    assert "embeddings.npz cannot be read" in refuse(capsys, run)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    runs = [MadeRun(tmp_path / name).write() for name in "ab"]
    assert make_page(runs[0]) == make_page(runs[0])
    pages = [make_page(*runs, out=tmp_path / name) for name in ("1.html", "2.html")]
    assert pages[0] == pages[1]


def test_unreadable_and_missing_pictures_become_placeholders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = MadeRun(tmp_path)
    errors = section(make_page(run.write()), "errors")
    assert errors.count('class="card"') == 3 and "no image" in errors and "data:image/jpeg" in errors
    page = (run.path / "report.html").read_bytes()
    run.data.rename(tmp_path / "moved")
    assert "with its pictures stays as it is: --data_root DIR says" in refuse(capsys, run.path)
    assert (run.path / "report.html").read_bytes() == page
    assert "data:image" not in section(make_page(run.path, out=tmp_path / "bare.html"), "errors")
    assert report.main([str(run.path), "--data_root", str(tmp_path / "moved")]) == 0
    assert section((run.path / "report.html").read_text("utf-8"), "errors") == errors
    capsys.readouterr()
    twin = MadeRun(tmp_path / "twin")
    for row in twin.rows:
        row["answer"] = row["class"]
    text = make_page(run.path, twin.write(), out=tmp_path / "compare.html")
    assert section(text, "disagreements").count("data:image") == 3
    assert "cannot be read" not in capsys.readouterr().err, "the other run's folder has them"


def test_a_duration_is_rounded_before_it_is_split() -> None:
    durations = (59.4, 119.7, 3599.7)
    assert [*map(run_files.format_duration, durations)] == ["59.4 s", "2 min 00 s", "1 h 00 min"]


def test_a_class_without_a_reference_lacks_no_picture(tmp_path: Path) -> None:
    pictures = run_files.Pictures(run_files.read_run(MadeRun(tmp_path).write()), None)
    assert pictures.uri(run_files.Shot("", "")) is None and not pictures.missing


def test_a_page_does_not_lie_among_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = MadeRun(tmp_path)
    out = tmp_path / "data" / "page.html"
    folder = run.write()
    monkeypatch.chdir(run.data)
    for place in (out, "page.html"):
        assert f"lies inside data_root {run.data}" in refuse(capsys, folder, "--out", place)
    run.data.rename(tmp_path / "moved")
    run.options["data_root"] = str(tmp_path)  # where the run trained, in a container
    assert report.main([str(run.write()), "--data_root", str(tmp_path / "moved")]) == 0


def test_errors_are_sorted_by_confidence_and_capped(quick_map: None, tmp_path: Path) -> None:
    run = MadeRun(tmp_path, tuple(f"class {i:02d}" for i in range(60)))
    errors = section(make_page(run.write()), "errors")
    sure = [float(value) for value in re.findall(r"<br> p ([\d.]+)<br>", errors)]
    assert "60 of 120 test images are wrong" in errors and len(sure) == run_files.MAX_CARDS
    assert sure == sorted(sure, reverse=True)
    surest = max(run.rows, key=lambda row: row["probability"] if row["answer"] != row["class"] else 0)
    card = errors[errors.index("<article") : errors.index("</article>")]
    assert surest["path"] in card and re.findall(r'class="who">(.*?)<', card) == ["test image", "predicted", "true"]
    shown = re.findall(r'class="name">(.*?)</span></b><br> (?:p ([\d.]+)<br>)?cos ([\d.]+)<', card)
    assert shown == [
        (surest["answer"], f"{surest['probability']:.3f}", f"{surest['cosine']:.3f}"),
        (surest["class"], "", f"{surest['class_cosine']:.3f}"),
    ]


def test_pairs_of_one_session_are_shown_and_counted(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    assert 'href="#sessions"' not in make_page(run.write())
    (test,) = (event for event in run.events if event["event"] == "test_end")
    paths = [row["path"] for row in run.rows[:2]]
    pairs = {path: {"train": run.paths[0], "cosine": 0.9 - 0.05 * i} for i, path in enumerate(paths)}
    test |= {"images": 120, "without_same_session": {"acc": 0.4321, "images": 118, "pairs": pairs}}
    text = section(make_page(run.write()), "sessions")
    assert "2 test images look" in text and "On the 118 others the accuracy is 0.432" in text
    assert text.count("<article") == 2 and text.count("<figure>") == 4 and "data:image/jpeg" in text
    assert text.index("0.900") < text.index("0.850") and all(path in text for path in (*paths, run.paths[0]))


def measure_drawn(folder: Path) -> dict[str, Any]:
    """Return a `measured` event of drawn embeddings."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 10)
    values = np.eye(3, 6)[labels] + 0.3 * rng.normal(size=(30, 6))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    records = lct.Records(
        folder,
        PLAIN,
        np.array([str(i) for i in range(30)], dtype=lct.STRINGS),
        labels.astype(np.int32),
        np.arange(30),
        np.zeros(30, np.int8),
    )
    part = lct.Embedded(np.arange(30), np.zeros(30, np.uint8), labels, values)
    gallery = lct.calibrate(
        lct.build_gallery(records, part, part, lct.Config()), part, lct.Config(), None, {}, torch.float32
    )
    return lct.to_json(lct.measure_gallery(gallery, part, part.rows))


def test_calibration_is_of_known_objects_and_of_strangers_that_were_never_trained_on(tmp_path: Path) -> None:
    """Where the run had no pictures of strangers, those of heads that did not know a part of the classes."""
    run = MadeRun(tmp_path)
    assert "probabilities cannot be checked" in section(make_page(run.write()), "calibration")
    rng = np.random.default_rng(0)

    def draw(num_strangers: int) -> dict[str, Any]:
        probability, is_known = rng.random(40 + num_strangers), np.arange(40 + num_strangers) < 40
        return lct.reliability(probability, is_known & (rng.random(len(is_known)) < probability), is_known, 0.2)

    measured, unseen = draw(10), draw(30)
    figures = measure_drawn(tmp_path) | measured
    run.events.append({"event": "measured", **figures})
    others = {
        "classes": ["a"],
        "images": 3,
        "unknown_passed": {"value": 0.123, "interval": [0.1, 0.15]},
        "enrolment": [],
        "known_acc": 0.5,
    }
    others["open_set"] = {"source": "classes it was not trained on", "trained_on_them": False, "others": {}}
    others["open_set"] |= {name: {"value": 0.5, "interval": [0.4, 0.6]} for name in ("auroc", "fpr95")}
    for shown in (measured, unseen):
        page = make_page(run.write())
        text = section(page, "calibration")
        assert re.search(r'class="figure">(.*?)<', text)[1] == f"{shown['ece']:.3f}"
        shares = [int(share) for share in re.findall(r'y="270">(\d+) %<', text)]
        assert shares == [round(100 * row["share"]) for row in shown["reliability"]]
        assert ("Answered not by this gallery, but by heads" in text) == (shown is unseen)
        run.events.append({"event": "unseen_classes", **others, **unseen})
    assert "not trained on" in text and "0.123 (0.100 – 0.150) of the images of classes never trained on" in section(
        page, "trust"
    )


@pytest.mark.parametrize(
    ("images", "groups", "right", "words"),
    [
        (8, 8, 0.7, "on 8 test images, that is no measurable difference."),
        (151, 151, 0.6, "on 151 test images, that is no measurable difference."),
        (2000, 2000, 0.7, "it is too modest."),
        (2000, 2000, 0.5, "it is too sure."),
        (2000, 100, 0.7, "on 2,000 test images in 100 groups, that is no measurable difference."),
    ],
)
def test_few_images_do_not_tell_whether_probabilities_are_too_high(
    tmp_path: Path, images: int, groups: int, right: float, words: str
) -> None:
    run = MadeRun(tmp_path)
    run.rows = [run.rows[0] | {"group": index % groups} for index in range(images)]
    (test,) = (event for event in run.events if event["event"] == "test_end")
    test["images"] = images
    bins = [{"share": 1.0, "probability": 0.62, "right": right}]
    run.events.append({"event": "measured", **measure_drawn(tmp_path), "ece": abs(right - 0.62), "reliability": bins})
    page = make_page(run.write())
    assert words in " ".join(section(page, "calibration").split())
    assert f"prototypes, {images:,} test images" in page, "those that were answered: some may have been deleted since"


@pytest.mark.parametrize("num_classes", [2, 40, 61])
def test_confusion_matrix_has_every_test_image(quick_map: None, tmp_path: Path, num_classes: int) -> None:
    run = MadeRun(tmp_path, tuple(f"a rather long class name, number {i}" for i in range(num_classes)))
    text = section(make_page(run.write()), "confusion")
    if num_classes > report_page.MAX_MATRIX_CLASSES:
        assert "too many for a readable matrix" in text and text.count("taken for") == 50
        assert {*re.findall(r'class="right">(\d+) <span class="note">of (\d+)<', text)} == {("1", "2")}
    else:
        cells = re.findall(r'class="(hit|miss)[^>]*title="[^:]*: (\d+) of 2', text)
        assert sorted(cells) == [("hit", "1")] * num_classes + [("miss", "1")] * num_classes
        wrong = re.findall(
            r'class="miss[^>]*title="[^"]*number (\d+) → [^"]*number (\d+): 1 of 2', text
        )  # true, answered
        assert sorted((int(a), int(b)) for a, b in wrong) == [(n, (n + 1) % num_classes) for n in range(num_classes)]
        names = re.findall(r'<th title="[^"]*"><span>(.*?)</span>', text)
        assert len(set(names)) == num_classes  # shortened, but still apart


@pytest.mark.parametrize("count", [1, 2, 9, 49, 50, 60])
def test_map_of_few_or_equal_images(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert report_page.project(vectors).shape == (count, 2) and np.isfinite(report_page.project(vectors)).all()
        assert np.isfinite(report_page.project(np.ones_like(vectors))).all()


def test_map_takes_every_class_and_split_in_proportion() -> None:
    labels = np.repeat(np.arange(4), (4000, 1500, 1000, 500))
    splits = np.tile(np.array(["train"] * 7 + ["val"] * 2 + ["test"]), 700)
    table = run_files.Embeddings(
        np.zeros((7000, 2)), labels, np.full(7000, ""), np.zeros(7000, int), splits, np.full(7000, "")
    )
    chosen = report_page.choose_map_rows(table)
    assert len(np.unique(chosen)) == len(chosen) == report_page.MAP_MAX_POINTS
    share = np.bincount(labels[chosen]) / len(chosen)
    assert np.abs(share - np.bincount(labels) / len(labels)).max() < 0.002
    assert abs((splits[chosen] == "test").mean() - 0.1) < 0.005


def test_the_map_rings_the_wrong_test_images(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    text = section(make_page(run.write()), "map")
    points = re.findall(r'<i class="pt c(\d) (\w+)( error)?" style="[^"]*" title="([^"]*)">', text)
    assert len(points) == 36 and "Rings mark the 3 wrong test images" in text
    assert re.findall(r"<small>(\d+) ?</small></button>", text) == ["12"] * 3, "images of each class, of all splits"
    for label, split, is_error, title in points:
        row = next((row for row in run.rows if title.endswith(row["path"])), None)
        assert (split == "test") == (row is not None) and title.startswith(PLAIN[int(label)])
        assert bool(is_error) == (row is not None and row["answer"] != row["class"]) == ("taken for" in title)


def test_each_point_of_the_map_shows_its_own_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "MAP_SPRITE_COLUMNS", 10)  # 36 pictures in four rows
    run = MadeRun(tmp_path)
    text = make_page(run.write())
    (uri,) = re.findall(r"url\(data:image/jpeg;base64,(.*?)\)", text)
    sprite = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("L"), float)
    points = re.findall(r'--thumb: (.*?)% (.*?)%"[^>]*?(\d/\d+\.png)', text)
    assert len(points) == 36
    for across, down, path in points:
        left, top = round(float(across) / 100 * 9) * 48, round(float(down) / 100 * 3) * 48
        cell = sprite[top : top + 48, left : left + 48]
        is_broken = run.paths.index(path) % 6 == 0
        wanted = (
            Image.new("RGB", (48, 48), (128, 128, 128))
            if is_broken
            else run_files.load_thumbnail(run.data / path, 48, ())
        )
        margins = [(48 - side) // 2 for side in wanted.size]
        cell = cell[margins[1] : margins[1] + wanted.height, margins[0] : margins[0] + wanted.width]
        assert np.abs(cell - np.asarray(wanted.convert("L"), float)).mean() < 20, path


@pytest.mark.parametrize("low, high", [(0.3, 0.58), (2.49, 11.7), (0.999, 1.0), (0.5, 0.5), (0, 1234), (-1e-7, 3e-7)])
def test_ticks_are_round_and_enclose_the_figures(low: float, high: float) -> None:
    ticks = report_page.make_ticks(low, high)
    values = [value for value, _ in ticks]
    assert 2 <= len(ticks) <= 10 and values[0] <= low + 1e-12 and values[-1] >= high - 1e-12
    step = (values[-1] - values[0]) / (len(values) - 1)
    assert f"{step:.6e}".startswith(("1.000000", "2.000000", "5.000000"))
    assert [float(text) for _, text in ticks] == pytest.approx(values)
    assert len({text for _, text in ticks}) == len(ticks)


def test_line_leaves_a_gap_where_a_figure_is_absent() -> None:
    assert report_page.draw_line(["1 1", "2 2", None, "4 4"]) == "M1 1h0L2 2M4 4h0"


def test_a_level_and_the_best_epoch_stand_where_a_line_has_them() -> None:
    line = report_page.Line("val", "", {1: 0.5, 2: 0.9})
    chart = report_page.draw_chart("acc", [line], best=2, level=0.9)
    assert chart["lines"][0]["path"].endswith(f"L{chart['best']} {chart['level']}")


def test_long_lists_are_cut_with_a_count(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.data_report["quarantined"] = [{"path": f"{i}.jpg", "reason": "truncated"} for i in range(1234)]
    text = make_page(run.write())
    assert text.count(".jpg — truncated") == run_files.MAX_LISTED and "and 1,034 more" in text


def test_views_are_compared_on_the_crops_they_disagree_about(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    plain = [row | {"answer": row["class"]} for row in run.rows]
    masked = [row | {"view": "mask"} for row in plain]
    masked[1] = masked[1] | {"answer": "wrench"}  # the second crop, a hammer
    figures = {"acc": 1.0, "f1_macro": 1.0, "auc_macro": None, "recall_at_1": 0.9}
    views = {"bbox": figures, "mask": figures | {"acc": 0.8333}}
    run.events.append({"event": "test_views", "images": 6, "disagree": 1, **views})
    folder = run.write()
    assert 'href="#views"' not in make_page(folder)
    write_rows(folder / "predictions_by_view.csv", plain + masked)
    text = section(make_page(folder), "views")
    assert "0.833" in text and text.count('class="card"') == 1 and run.rows[1]["path"] in text
    assert re.findall(r'class="right">(\d+)<', text) == [
        "5",
        "1",
        "0",
        "0",
    ]  # both ways, only plain, only masked, neither
    recall = text[text.index("recall differs most") :]
    assert re.findall(r"<tr><td>.*?>(\w+)</span></td><td class=\"n\">(\d)<", recall) == [("hammer", "2")]
    assert re.findall(r'class="score"><span>(.*?)<', recall) == ["1.000", "0.500"]


def test_the_tables_of_every_section_are_whole_on_a_small_screen(tmp_path: Path) -> None:
    figures = measure_drawn(tmp_path)
    run = MadeRun(tmp_path)
    views = dict.fromkeys(("acc", "f1_macro", "auc_macro", "recall_at_1"), 0.5)
    share = {"value": 0.123, "interval": [0.1, 0.15]}
    unseen = {"classes": ["a"], "images": 3, "unknown_passed": share, "known_acc": 0.5, "reliability": [], "ece": 0.1}
    unseen["open_set"] = {"source": "x", "trained_on_them": False, "others": {}, "auroc": share, "fpr95": share}
    unseen["enrolment"] = [dict.fromkeys(("crops", "new", "old", "before", "recall", "precision", "answers"), 1)]
    run.events += [
        {"event": "measured", **figures},
        {"event": "test_views", "images": 6, "disagree": 0, "bbox": views, "mask": views},
        {"event": "unseen_classes", **unseen},
    ]
    write_rows(run.write() / "predictions_by_view.csv", [*run.rows, *(row | {"view": "mask"} for row in run.rows)])
    page = make_page(run.path)
    assert section(page, "views") and "New classes from a few crops" in section(page, "trust")
    is_whole = '[...document.querySelectorAll(".scroll")].every(box => box.scrollWidth <= box.clientWidth)'
    assert probe(run.path / "report.html", is_whole, 1000) == "true"


def load_picture(run: MadeRun, path: str, view: str, size: int = 50) -> np.ndarray | None:
    image = run_files.Pictures(run_files.read_run(run.write()), None).load(run_files.Shot(path, view), size)
    return None if image is None else np.asarray(image)


def test_a_masked_picture_is_gray_outside_its_mask(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    Image.fromarray(np.full((30, 50, 3), (250, 0, 0), np.uint8)).save(run.data / "0/1.png")
    mask = np.zeros((30, 50), np.uint8)
    mask[:, :25] = 255
    cutout = np.dstack([np.zeros((30, 50, 3), np.uint8), mask])
    for folder, image in (("masks", mask), ("cutouts", cutout)):
        (run.data / "0" / folder).mkdir()
        Image.fromarray(image).save(run.data / "0" / folder / "1.png")
    Image.fromarray(mask).save(tmp_path / "elsewhere.png")
    for name in ("0/masks/1.png", "0/cutouts/1.png"):
        run.masks[1] = name
        assert (load_picture(run, "0/1.png", "bbox") == (250, 0, 0)).all()
        masked = load_picture(run, "0/1.png", "mask")
        assert (masked[:, :25] == (250, 0, 0)).all() and (masked[:, 25:] == run_files.PADDING_GRAY).all()
    run.masks[1] = "0/masks/gone.png"
    assert (load_picture(run, "0/1.png", "mask") == (250, 0, 0)).all()


def test_pictures_and_masks_are_those_of_training(tmp_path: Path) -> None:
    gray = np.tile(np.arange(50, dtype=np.uint16) * 80, (30, 1))  # 12 bits
    values = np.zeros((30, 50), np.uint8)
    values[:, :25] = 1
    zeros = np.zeros_like(values)
    palette = Image.fromarray(values, "P")
    palette.putpalette([0, 0, 0, 90, 0, 0])
    layers = ((values,), (values * 255,), (values * 100, zeros, zeros), (zeros, zeros, zeros, 100 + values * 155))
    images = [Image.fromarray(np.dstack(layer).squeeze()) for layer in layers]
    images += [palette, Image.fromarray(values > 0), Image.fromarray(values.astype(np.uint16))]
    for index, image in enumerate(images):
        path = tmp_path / f"{index}.png"
        image.save(path)
        mask = np.asarray(run_files.load_mask(path, False, (50, 30)))
        assert (mask == 255 * lct.decode_mask(lct.read_file(path), False)).all() and 0 < mask.mean() < 255, (
            index,
            image.mode,
        )
    Image.fromarray(gray).save(tmp_path / "gray.png")
    colours = np.dstack([gray, gray // 2, gray[:, ::-1]])
    cv2.imwrite(str(tmp_path / "colour.png"), colours)
    tifffile.imwrite(tmp_path / "turned.tif", colours, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    for name, bits in itertools.product(("gray.png", "colour.png", "turned.tif"), ((), (12,), (10, 12), (10,))):
        shown = np.asarray(run_files.load_thumbnail(tmp_path / name, 50, bits))
        assert (shown == lct.load_image(tmp_path / name, bits)).all(), (name, bits)


def test_pictures_are_upright_and_of_any_mode(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise makes it upright: white is on top
    image = Image.fromarray(picture)
    gray = image.convert("L")
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    palette, alpha = image.quantize(2), image.copy()
    alpha.putalpha(255)
    for kind in (image, gray, sixteen, palette, alpha):
        kind.save(run.data / "0/1.png", exif=exif)
        shown = load_picture(run, "0/1.png", "bbox", 40)
        assert shown.shape == (40, 20, 3) and shown[:18].min() > 200 and shown[22:].max() < 50, kind.mode
    image.save(run.data / "0/1.png", "JPEG", exif=exif)
    assert load_picture(run, "0/1.png", "bbox", 10).shape == (10, 5, 3)
    image.save(run.data / "0/1.png", exif=b"Exif\0\0text, no tags")
    assert load_picture(run, "0/1.png", "bbox", 10).shape == (5, 10, 3)


def test_a_picture_that_is_a_pipe_or_a_bomb_is_only_missing(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    (run.data / "0/1.png").unlink()
    os.mkfifo(run.data / "0/1.png")
    assert load_picture(run, "0/1.png", "bbox") is None
    Image.new("1", (20_000, 5_001)).save(run.data / "0/2.png")
    assert load_picture(run, "0/2.png", "bbox") is None
    (run.data / "0/3.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Ghostscript's
    assert load_picture(run, "0/3.png", "bbox") is None


def test_an_image_that_is_judged_both_ways_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeRun(tmp_path)
    count = len(run.paths)
    run.rows += [row | {"view": "mask"} for row in run.rows]
    run.paths, run.masks = run.paths * 2, run.masks * 2
    run.labels, run.splits, run.vectors = np.tile(run.labels, 2), np.tile(run.splits, 2), np.tile(run.vectors, (2, 1))
    run.views = np.repeat(np.array([0, 1], np.uint8), count)
    text = make_page(run.write())
    assert "6 of 12 views of test images are wrong" in section(text, "errors")
    assert "Views of test images by prototype matching" in section(text, "confusion")
    assert "36 images" in text and "prototypes, 6 test images" in text and "1,021, 43 prototypes" in text
    assert section(text, "map").count('<i class="pt c') == 72 and section(text, "map").count(" (masked)") == 36
    monkeypatch.setattr(report_page, "MAP_MAX_POINTS", 40)
    assert "40 of 72 views, the same share" in section(make_page(run.path), "map")


def test_trust_shows_what_was_measured(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    measured = measure_drawn(tmp_path)
    assert 'href="#trust"' not in make_page(run.write())
    run.events.append({"event": "measured", **measured})
    text = section(make_page(run.write()), "trust")
    low, high = measured["closed"]["centroid"]["acc"]["interval"]
    of_matcher = measured["closed"]["knn"]["acc"]["interval"]  # the one of proto_end
    page = make_page(run.write())
    assert "between {:.3f} and {:.3f}".format(*of_matcher) in page, "one interval, in the log and here"
    coverage = measured["thresholds"]["coverage"]["value"]
    assert f"The thresholds give a class to {coverage:.3f} of the test images" in page
    closed = {"knn": measured["closed"]["knn"] | {"acc": {"value": 0.5, "interval": None}}}  # of too few groups
    run.events[-1] = {"event": "measured", **measured, "closed": measured["closed"] | closed}
    few = make_page(run.write())
    assert "put the accuracy between" not in few and f"give a class to {coverage:.3f} of the test images" in few
    run.events[-1] = {"event": "measured", **measured}
    assert f"{low:.3f} – {high:.3f}" in text and "classes held out in turn" in text
    assert text.count("%</td>") == len(lct.PRECISION_TARGETS) and "see below" not in text
    told = {"value": 0.123, "interval": [0.102, 0.145]}
    way = {"auroc": {"value": 0.867, "interval": [0.822, 0.901]}, "fpr95": {"value": 0.501, "interval": [0.367, 0.797]}}
    enrolment = [
        {"crops": 5, "new": 0.383, "old": 0.775, "before": 0.791, "recall": 0.234, "precision": 0.954, "answers": 7}
    ]
    unseen = {"classes": ["hammer"], "images": 9, "unknown_passed": told, "enrolment": enrolment}
    # The run was continued with another share than the one that this was measured at.
    unseen |= {"mixed_precision": {"value": 0.912, "interval": [0.887, 0.936]}, "unknown_share": 0.125}
    unseen |= {"ece": 0.045, "reliability": measured["reliability"]}
    run.events.append(
        {"event": "unseen_classes", **unseen, "open_set": {"source": "others", **way, "others": {"regression": way}}}
    )
    del unseen["reliability"], unseen["unknown_share"]
    figures = {*re.findall(r"\d\.\d{3}", lct.format_measures(measured) + str(unseen))}
    page = make_page(run.write())
    words = " ".join(section(page, "trust").split())
    assert "for objects of which 20 % are unknown. " in words.replace("</p>", " ") and "see below" in words
    assert "12.5 % are taken to be unknown" in " ".join(section(page, "calibration").split())
    assert "If 12.5 % of all objects are such, 0.912 (0.887 – 0.936) of the classes given are right" in words
    shown = {*re.findall(r"\d\.\d{3}", section(page, "trust") + section(page, "calibration"))}
    assert figures - shown <= {f"{measured['ece']:.3f}"}, "the log leaves them to it"


def test_masks_are_counted_and_refused_ones_named(tmp_path: Path) -> None:
    text = section(make_page(MadeRun(tmp_path).write()), "data")
    assert "17, 4 of them drawn by SAM-2" in text and "m/hammer — hammer" in text and "Refused masks" in text
    assert re.findall(r"Groups of (exact|near) duplicates</dt>\s*<dd>(\d)", text) == [("exact", "0"), ("near", "1")]


def test_words_for_figures_are_those_of_the_script() -> None:
    for name in ("SPLIT_NAMES", "MATCHER_NAMES", "BASELINE_NAMES", "RETRIEVAL_NAMES", "FEW_IMAGES", "PADDING_GRAY"):
        room = run_files if hasattr(run_files, name) else report_page
        assert getattr(room, name) == getattr(lct, name), name
    for changes in ({}, {"freeze_backbone": False}, {"unfreeze_blocks": 1}, {"unfreeze_blocks": 3}, {"lora_rank": 4}):
        options = lct.Config().as_plain() | changes
        assert run_files.name_training(options) == lct.name_training(options)


# --- the page that compares runs


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that makes the page of two runs with 5 and 3 right answers of 6; `change` may change the second first."""

    def make(change: Callable[[MadeRun], None] = lambda run: None) -> str:
        first, second = (MadeRun(tmp_path / name) for name in "ab")
        for row in first.rows[:5]:
            row["answer"] = row["class"]
        first.rows[5]["answer"] = "pliers"  # the second run's is hammer; a wrench it is
        change(second)
        return make_page(first.write(), second.write(), out=tmp_path / "compare.html")

    yield make


def test_runs_are_compared_on_their_common_test_images(pair: Callable[..., str]) -> None:
    text = pair()
    assert "17" not in re.findall(r"(\d+) test images in common", " ".join(text.split()))
    summary = " ".join(text[: text.index("</header>")].split())
    assert "3 classes and 6 test images in common" in summary and "No run is measurably ahead" in summary
    assert "a/run 0.833, b/run 0.500" in summary and "a/run does better on 2 of them, and b/run on 0" in summary
    assert "in 50 % of cases" in summary
    part = section(text, "disagreements")
    tally = part[: part.index("<h3")]
    assert re.findall(r'class="right">(\d+)<', tally) == ["3", "2", "1"]  # both, only a, none
    assert part.count("<article") == 3 and part.count('class="bad"') == 2 + 2 and part.count('class="good"') == 2


def test_a_run_that_is_ahead_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_comparison, "MAX_CARDS", 8)
    names = tuple(f"class {i:02d}" for i in range(20))
    runs = [MadeRun(tmp_path / name, names) for name in "ab"]
    text = make_page(*(run.write() for run in runs), out=tmp_path / "same.html")
    assert "so unevenly in 100 % of cases" in " ".join(text.split())
    for row in runs[1].rows:
        row["answer"] = row["class"]
    text = make_page(*(run.write() for run in runs), out=tmp_path / "compare.html")
    assert '<h1 class="good">b/run is ahead of a/run</h1>' in text
    assert "b/run does better on 20 of them, and a/run on 0" in " ".join(text.split())
    assert text.count("<article") == 8 and "and 12 more images" in text
    for index, row in enumerate(runs[0].rows):
        row["group"] = index // 10  # crops of four photos
    for row in runs[1].rows:
        del row["group"]  # as in an older run
    text = make_page(*(run.write() for run in runs), out=tmp_path / "groups.html")
    assert "No run is measurably ahead" in text
    assert "b/run does better on 4 of their 4 groups" in " ".join(text.split()) and "in 12 % of cases" in text


def test_the_sign_test_is_scipys() -> None:
    from scipy.stats import binomtest

    for wins, losses in ((0, 0), (3, 0), (12, 5), (70, 70), (400, 300), (100_300, 100_000)):
        expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert report_comparison.sign_test(wins, losses) == pytest.approx(expected)


def test_gains_of_classes_are_sorted_and_equal_sklearns(pair: Callable[..., str], tmp_path: Path) -> None:
    from sklearn.metrics import f1_score, recall_score

    text = pair()
    rows = [re.findall(r'data-v="(.*?)"', row) for row in section(text, "classes").split("<tr>")[2:]]
    tables = [list(csv.DictReader((tmp_path / name / "run/predictions.csv").open(encoding="utf-8"))) for name in "ab"]
    truth, answers = ([[row[key] for row in table] for table in tables] for key in ("class", "answer"))
    assert len(rows) == 3
    for name, support, *figures in rows:
        expected = []
        for score in (recall_score, f1_score):
            pairs = zip(truth, answers, strict=True)
            a, b = (score(t, p, labels=[name], average=None, zero_division=0)[0] for t, p in pairs)
            expected += [a, b, b - a]
        assert support == "2" and [float(figure) for figure in figures] == pytest.approx(expected)
    gains = [float(row[-1]) for row in rows]
    assert gains == sorted(gains, reverse=True) and gains[0] != gains[-1]


def test_options_that_differ_are_listed_and_no_others(pair: Callable[..., str]) -> None:
    text = pair(lambda run: run.options.update(lr=0.5, out_dir="elsewhere", new_option=3))
    rows = re.findall(
        r'<tr><td class="path">(.*?)</td><td class="path">(.*?)</td><td class="path">(.*?)</td>',
        section(text, "options"),
    )
    assert [row for row in rows if row[0] != "data_root"] == [("lr", "0.001", "0.5"), ("new_option", "–", "3")]
    assert "told by their path" in section(text, "disagreements")  # each has a data_root of its own


def test_curves_lie_over_each_other(pair: Callable[..., str]) -> None:
    def change(run: MadeRun) -> None:
        run.events = make_events(PLAIN, 5, True)

    curves = section(pair(change), "curves")
    assert curves.count("<svg") == 6 and curves.count("<path d=") == 10  # no AUC
    assert "<title>epoch 5 a/run – b/run 0.622</title>" in curves


def test_runs_without_a_common_test_image_say_so(pair: Callable[..., str]) -> None:
    def change(run: MadeRun) -> None:
        for row in run.rows:
            row["path"] = "other/" + row["path"]

    text = pair(change)
    assert '<h1 class="plain">No test image in common</h1>' in text and "--seed, --group_regex" in text
    assert "there is none to disagree about" in section(text, "disagreements")
    assert "Of each run's own images" in section(text, "classes").replace("&#39;", "'")


def test_an_image_with_another_label_is_not_common(pair: Callable[..., str]) -> None:
    def change(run: MadeRun) -> None:
        run.rows[0]["class"] = "wrench"

    assert "5 test images in common" in " ".join(pair(change).split())


def test_runs_with_other_classes_and_without_test_are_compared(tmp_path: Path) -> None:
    first = MadeRun(tmp_path / "a").write()
    second = MadeRun(tmp_path / "b", ("pliers", "saw", "wrench"), has_test=False).write()
    text = make_page(first, second, out=tmp_path / "compare.html")
    assert "2 classes and 0" in text and "hammer, saw" in section(text, "classes") and "val, 9 images" in text
    assert "No test split, no verdict" in text
    summary = " ".join(text[: text.index("</header>")].split())
    assert "Without answers on test images: b/run." in summary and "--seed" not in summary


def test_a_class_without_images_in_one_run_has_a_dash(tmp_path: Path) -> None:
    first = MadeRun(tmp_path / "a").write()
    second = MadeRun(tmp_path / "b", has_test=False)
    second.events = second.events[:1]  # no epoch has ended
    rows = section(make_page(first, second.write(), out=tmp_path / "compare.html"), "classes")
    assert " / –</td>" in rows and "None" not in rows


@pytest.mark.parametrize("has_test", [True, False])
def test_the_best_of_a_row_is_of_figures_of_one_split(pair: Callable[..., str], has_test: bool) -> None:
    def change(run: MadeRun) -> None:
        run.events[-1]["prototypes"]["acc"] = 0.9
        run.events = run.events if has_test else run.events[:-1]

    best = re.findall(r'class="best"><div class="score"><span>(.*?)<', section(pair(change), "figures"))
    assert best == (["0.900"] if has_test else [])


def test_the_best_detector_is_of_the_same_unknown_objects(tmp_path: Path) -> None:
    measured = measure_drawn(tmp_path)
    measured["thresholds"]["coverage"]["value"] = 0.75  # of an answer above its threshold, 1.0 are right
    figures = measured["open_set"]
    others = (
        {**figures, "auroc": {"value": 0.5}},
        {**figures, "auroc": {"value": 0.5}, "source": "images of no class"},
    )
    runs = [MadeRun(tmp_path / name) for name in "abc"]
    for run, open_set in zip(runs, (figures, *others), strict=True):
        run.events.append({"event": "measured", **measured, "open_set": open_set})
        run.write()
    values = [f"{measured['thresholds'][key]['value']:.3f}" for key in ("coverage", "precision")]
    for other, count in zip(runs[1:], (1, 0), strict=True):
        text = section(make_page(runs[0].path, other.path, out=tmp_path / "compare.html"), "figures")
        assert re.findall(r"(?:Answered above thresholds|Right among those).*?<span>(.*?)<", text) == values
        assert text.count('class="best"') == count and other.events[-1]["open_set"]["source"] in text


def test_a_comparison_is_shown_without_a_console_message(pair: Callable[..., str], tmp_path: Path) -> None:
    pair()
    dom, messages = browse(tmp_path / "compare.html")
    assert "CONSOLE" not in messages and 'id="options"' in dom


def test_only_a_page_of_its_own_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [MadeRun(tmp_path / name).write() for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert report.main(list(map(str, runs))) == 0
    first = (tmp_path / "compare.html").read_bytes()
    assert report.main(list(map(str, runs))) == 0 and (tmp_path / "compare.html").read_bytes() == first
    (tmp_path / "compare.html").write_text("<!doctype html><p>mine")
    assert "is not overwritten" in refuse(capsys, *runs)
    assert (tmp_path / "compare.html").read_text() == "<!doctype html><p>mine"
    assert "is not overwritten" in refuse(capsys, runs[0], "--out", "compare.html")
    assert "is a folder" in refuse(capsys, runs[0], "--out", tmp_path)
    assert "cannot be written" in refuse(capsys, runs[0], "--out", tmp_path / "no such folder" / "page.html")
    assert "given twice" in refuse(capsys, runs[0], runs[0])
    (runs[0] / "report.html").write_text("the page of another version")  # its place is the run's own
    assert "lct_dino3 report" in make_page(runs[0])
