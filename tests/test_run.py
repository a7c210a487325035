"""Sections 13, 15 and 19: whole runs on small data - what they leave behind, and how they end and go on."""

import csv
import errno
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tqdm
from conftest import SCRIPT, TINY_RUN, make_dataset, run_main, snapshot

import lct_dino3 as lct

SETTINGS = "--model_id test_resnet --no-pretrained --img_size 32 --batch 8 --workers 0 --gpus 0 --emb_dim 16".split()
Main = Callable[..., int]


def train(call_main: Main, data: Path, out_dir: Path, *flags: object) -> int:
    return call_main("--data_root", data, "--out_dir", out_dir, *SETTINGS, *flags)


def load_state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = load_state(first)["model"], load_state(second)["model"]
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def epoch_records(out_dir: Path) -> list[dict[str, Any]]:
    times = ("time", "seconds", "pace")
    return [
        {k: v for k, v in r.items() if k not in times} for r in lct.read_events(out_dir) if r["event"] == "epoch_end"
    ]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four epochs."""
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(run_main, data, out_dir, "--epochs", 4, "--save_every", 2, "--preview") == 0
    return out_dir


def test_a_run_leaves_what_the_contract_lists(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    checkpoints = {f"checkpoint_{name}.pth" for name in ("last", "best", "ep002", "ep004")}
    logs = {"train.log", "metrics.jsonl", "config.json", "splits.json", "data_report.json"}
    assert names == checkpoints | logs | {
        "prototypes.npz",
        "predictions.csv",
        "embeddings.npz",
        "report.html",
        "lct_dino3.py",
        "preview.jpg",
        "memory.sqlite",
        ".lock",
        ".lock_holder",
    }
    assert (run / "lct_dino3.py").read_bytes() == Path(lct.__file__).read_bytes()
    log = (run / "train.log").read_text("utf-8")
    assert len(re.findall(r"epoch +\d/4 .*train loss.*val loss", log)) == 4
    assert "get a class all the same: not measured; give pictures of no class" in log.splitlines()[-3]  # three classes
    assert "most stay `unknown`: " in log.splitlines()[-2]


def test_metrics_hold_every_event_in_order_and_are_strict_json(run: Path, data: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    names = [event["event"] for event in events if event["event"] != "best_update"]
    ending = ["proto_start", "proto_end", "test_end", "measured", "run_end"]
    assert names == ["run_start", "baseline_end", *["epoch_end"] * 4, *ending]
    epoch = next(event for event in events if event["event"] == "epoch_end")
    assert {"loss", "acc", "f1_macro", "auc_macro"} == set(epoch["train"])
    assert {"loss", "acc", "f1_macro", "auc_macro", "proto_acc", "recall_at_1"} == set(epoch["val"])
    for part in ("train_per_class", "val_per_class"):
        assert set(epoch[part]) == {"молоток", "side cutter", "wrench"}
        assert set(epoch[part]["wrench"]) == {"precision", "recall", "f1", "auc", "support"}
    assert events[-1]["status"] == "completed"


def test_the_split_is_whole_and_the_broken_image_is_named(run: Path, data: Path) -> None:
    splits = json.loads((run / "splits.json").read_text("utf-8"))
    listed = [path for split in lct.SPLIT_NAMES for paths in splits[split].values() for path in paths]
    assert len(listed) == len(set(listed)) == 42 and all((data / path).is_file() for path in listed)
    report = json.loads((run / "data_report.json").read_text("utf-8"))
    assert [item["path"] for item in report["quarantined"]] == ["wrench/broken.jpg"]
    assert report["classes"]["wrench"]["quarantined"] == 1 and (data / "wrench" / "broken.jpg").exists()


def test_predictions_follow_from_the_embeddings_and_the_gallery(run: Path) -> None:
    """Computed anew, row by row, from what the two .npz files hold."""
    gallery, table = (dict(np.load(run / name, allow_pickle=False)) for name in ("prototypes.npz", "embeddings.npz"))
    names = gallery["id2cls"].tolist()
    assert table["class_names"].tolist() == names and str(gallery["matcher"]) in ("centroid", "knn")
    counts = gallery["knn_counts"] if str(gallery["matcher"]) == "knn" else None
    slope, intercept = gallery["log_odds"][0]
    with open(run / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    is_test = table["splits"] == "test"
    assert [row["path"] for row in rows] == table["paths"][is_test].tolist() and len(rows) > 2
    for row, query, label in zip(rows, table["embeddings"][is_test], table["labels"][is_test], strict=True):
        to_references = gallery["stacks"] @ query
        of_class = [np.sort(to_references[gallery["stack_labels"] == i])[::-1] for i in range(3)]
        scores = (
            gallery["centroids"] @ query
            if counts is None
            else [c[:k].mean() for c, k in zip(of_class, counts, strict=True)]
        )
        order = np.argsort(-np.array(scores))
        assert [row["class"], row["answer"], row["runner_up"]] == [names[i] for i in (label, order[0], order[1])]
        cosines = [float(row[key]) for key in ("class_cosine", "cosine", "runner_up_cosine")]
        assert cosines == pytest.approx([scores[i] for i in (label, order[0], order[1])], abs=1e-6)
        chance = 1 / (1 + np.exp(-(slope * scores[order[0]] + intercept)))
        assert float(row["probability"]) == pytest.approx(chance, abs=1e-4)
        assert row["is_unknown"] == ("true" if scores[order[0]] < gallery["thresholds"][order[0]] else "false")
        for key, chosen in (("nearest_reference", order[0]), ("nearest_of_class", label)):
            nearest = np.flatnonzero(gallery["stack_labels"] == chosen)[
                to_references[gallery["stack_labels"] == chosen].argmax()
            ]
            assert (row[key], row[f"{key}_view"]) == (gallery["stack_paths"][nearest], "bbox")
        assert (row["view"], row["mask"]) == ("bbox", "")
    test = next(event for event in lct.read_events(run) if event["event"] == "test_end")
    assert np.mean([row["class"] == row["answer"] for row in rows]) == pytest.approx(test["prototypes"]["acc"])


def test_embeddings_are_of_every_image_in_its_split(run: Path) -> None:
    splits = json.loads((run / "splits.json").read_text("utf-8"))
    expected = {
        (path, split, name) for split in lct.SPLIT_NAMES for name, paths in splits[split].items() for path in paths
    }
    table = dict(np.load(run / "embeddings.npz", allow_pickle=False))
    classes = table["class_names"][table["labels"]].tolist()
    rows = list(zip(table["paths"].tolist(), table["splits"].tolist(), classes, strict=True))
    assert set(rows) == expected and len(rows) == len(expected)
    assert not table["views"].any() and not any(table["masks"]) and table["embeddings"].dtype == np.float32
    gallery = dict(np.load(run / "prototypes.npz", allow_pickle=False))
    vector_of = dict(zip(table["paths"].tolist(), table["embeddings"], strict=True))
    assert np.array_equal(gallery["stacks"], [vector_of[path] for path in gallery["stack_paths"].tolist()])


def test_the_script_alone_makes_a_run_that_is_whole_without_its_report(small_data: Path, tmp_path: Path) -> None:
    """As a user starts it, with no tools beside it."""
    script = tmp_path / "alone" / "lct_dino3.py"
    script.parent.mkdir()
    script.write_bytes(Path(lct.__file__).read_bytes())
    command = [sys.executable, script, "--data_root", small_data, "--out_dir", tmp_path / "run", *TINY_RUN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "prototype matching" in done.stdout and "Traceback" not in done.stderr and "%|" not in done.stderr
    assert_whole_without_report(tmp_path / "run", "tools/report.py is not beside the script")


def assert_whole_without_report(run: Path, said: str) -> None:
    log = (run / "train.log").read_text("utf-8")
    assert f"no report: {said}" in log and "report.html" not in log
    assert (run / "predictions.csv").is_file() and not (run / "report.html").exists()
    assert lct.read_events(run)[-1]["status"] == "completed"


def test_a_run_is_whole_if_its_report_fails(
    small_data: Path, tmp_path: Path, call_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.py").write_text("raise SystemExit('no ink')")
    monkeypatch.setattr(lct, "TOOLS_DIR", tmp_path)
    assert call_main("--data_root", small_data, "--out_dir", tmp_path / "run", *TINY_RUN) == 0
    assert_whole_without_report(tmp_path / "run", "no ink")


def test_a_frozen_backbone_is_not_in_the_checkpoint(run: Path) -> None:
    checkpoint = load_state(run / "checkpoint_last.pth")
    assert not [key for key in checkpoint["model"] if key.startswith("backbone")]
    assert not [key for key in checkpoint["model"] if "module." in key or "_orig_mod" in key]
    assert checkpoint["epoch"] == 4 and len(checkpoint["identity"]["backbone_hash"]) == 16


def rebuild_embeddings(run: Path, data: Path, paths: list[str]) -> np.ndarray:
    """Embed images with the best checkpoint, apart from the code that the run used."""
    options = json.loads((run / "config.json").read_text("utf-8"))["options"]
    config = lct.Config(model_id=options["model_id"], pretrained=False, img_size=32, emb_dim=16, seed=options["seed"])
    backbone, info = lct.build_backbone(config, print)
    model = lct.build_recognizer(config, 3, backbone, info)
    checkpoint = load_state(run / "checkpoint_best.pth")
    model.load_state_dict(checkpoint["model"], strict=False)
    fit_square = lct.build_transform(32, augment=False)
    images = np.stack([fit_square(lct.load_image(data / path), None, 0) for path in paths])
    with torch.no_grad():
        features = model.backbone(torch.from_numpy(images).permute(0, 3, 1, 2))
        embeddings = model.eval().embed(features).numpy()
    with np.load(run / "prototypes.npz", allow_pickle=False) as file:
        weight = float(file["feature_weight"])
        projected = (features.numpy() - file["feature_mean"]) @ file["feature_projection"]
    projected /= np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
    return np.hstack([np.sqrt(1 - weight) * embeddings, np.sqrt(weight) * projected]) if weight else embeddings


def test_prototypes_are_the_training_images_seen_by_the_best_checkpoint(run: Path, data: Path) -> None:
    splits = json.loads((run / "splits.json").read_text("utf-8"))
    with np.load(run / "prototypes.npz", allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    paths = content["stack_paths"].tolist()
    assert sorted(paths) == sorted(path for own in splits["train"].values() for path in own)
    assert [path.split("/")[0] for path in paths] == content["id2cls"][content["stack_labels"]].tolist()
    embeddings = rebuild_embeddings(run, data, paths)
    np.testing.assert_allclose(content["stacks"], embeddings, atol=1e-5)
    for label in range(3):
        mean = embeddings[content["stack_labels"] == label].mean(axis=0)
        np.testing.assert_allclose(content["centroids"][label], mean / np.linalg.norm(mean), atol=1e-5)


def test_the_test_figures_are_those_of_the_exported_gallery(run: Path, data: Path) -> None:
    """What is measured is what is deployed: numpy and prototypes.npz alone give the accuracy that the run reports."""
    splits = json.loads((run / "splits.json").read_text("utf-8"))
    names = splits["classes"]
    pairs = [(path, names.index(name)) for name, paths in splits["test"].items() for path in paths]
    queries = rebuild_embeddings(run, data, [path for path, _ in pairs])
    labels = np.array([label for _, label in pairs])
    with np.load(run / "prototypes.npz") as file:
        cosine = queries @ file["stacks"].T
        scores = queries @ file["centroids"].T
        if str(file["matcher"]) == "knn":
            by_class = [np.sort(cosine[:, file["stack_labels"] == c])[:, -k:] for c, k in enumerate(file["knn_counts"])]
            scores = np.stack([best.mean(axis=1) for best in by_class], axis=1)
        nearest = file["stack_labels"][cosine.argmax(axis=1)]
    test = next(event for event in lct.read_events(run) if event["event"] == "test_end")
    assert test["prototypes"]["acc"] == pytest.approx((scores.argmax(axis=1) == labels).mean())
    assert test["prototypes"]["recall_at_1"] == pytest.approx((nearest == labels).mean())
    measured = next(event for event in lct.read_events(run) if event["event"] == "measured")
    assert measured["retrieval"]["recall_at_1"]["value"] == pytest.approx(test["prototypes"]["recall_at_1"])
    by_centroid = (queries @ np.load(run / "prototypes.npz")["centroids"].T).argmax(axis=1)
    assert measured["closed"]["centroid"]["acc"]["value"] == pytest.approx((by_centroid == labels).mean())
    assert len(measured["open_set"]["others"]) == 4 and measured["few"] == names  # two test images a class


def test_running_again_says_finished_and_changes_nothing(run: Path, data: Path, call_main: Main, capsys: Any) -> None:
    before = snapshot(run)
    assert train(call_main, data, run, "--epochs", 4, "--save_every", 2, "--preview") == 0
    said = capsys.readouterr().out
    assert "is finished" in said and "prototypes --run" not in said
    assert train(call_main, data, run, "--epochs", 4, "--save_every", 2, "--preview", "--target_precision", 0.6) == 0
    said = capsys.readouterr().out
    assert (
        "--target_precision was 0.95 at the last start and is 0.6 now\n" in said and f"prototypes --run {run}\n" in said
    )
    assert snapshot(run) == before


def test_four_epochs_are_three_and_an_interrupt_and_one(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With a frozen backbone, as runs have by default; test_resume.py is about the others."""
    format_epoch = lct.format_epoch

    def press_ctrl_c(record: dict, epochs: int) -> str:
        if record["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return format_epoch(record, epochs)

    with monkeypatch.context() as patch:
        patch.setattr(lct, "format_epoch", press_ctrl_c)
        assert train(run_main, data, tmp_path / "broken", "--epochs", 4) == 130
    assert "interrupted" in [event["event"] for event in lct.read_events(tmp_path / "broken")]
    assert load_state(tmp_path / "broken" / "checkpoint_last.pth")["epoch"] == 3
    assert train(run_main, data, tmp_path / "broken", "--epochs", 4) == 0
    assert "resumed after epoch 3" in capsys.readouterr().out
    for name in ("checkpoint_last.pth", "checkpoint_best.pth"):
        assert_same_weights(run / name, tmp_path / "broken" / name)
    assert epoch_records(run) == epoch_records(tmp_path / "broken")
    with np.load(run / "prototypes.npz") as a, np.load(tmp_path / "broken/prototypes.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files if name != "meta")


def test_workers_do_not_change_the_weights(data: Path, tmp_path: Path, call_main: Main) -> None:
    for workers in (0, 2):
        assert train(call_main, data, tmp_path / f"w{workers}", "--epochs", 2, "--workers", workers) == 0
    assert_same_weights(tmp_path / "w0" / "checkpoint_last.pth", tmp_path / "w2" / "checkpoint_last.pth")
    assert epoch_records(tmp_path / "w0") == epoch_records(tmp_path / "w2")


@pytest.mark.parametrize(
    ("flags", "named"),
    [(("--emb_dim", 24), "emb_dim: 16 -> 24"), (("--model_id", "test_vit"), "model_id: test_resnet -> test_vit"),
     (("--seed", 7), "seed: 42 -> 7"), (("--batch", 4, "--lr", 0.1), "batch: 8 -> 4")],
)  # fmt: skip
def test_resuming_with_other_settings_says_what_differs(
    run: Path, data: Path, call_main: Main, capsys: Any, flags: tuple, named: str
) -> None:
    before = snapshot(run)
    assert train(call_main, data, run, "--epochs", 6, *flags) == 2
    assert named in capsys.readouterr().err
    assert snapshot(run) == before


def test_resuming_with_other_classes_names_them(run: Path, tmp_path: Path, call_main: Main, capsys: Any) -> None:
    other = make_dataset(tmp_path / "data", {"молоток": 14, "spanner": 11, "wrench": 17})
    assert train(call_main, other, run, "--epochs", 6) == 2
    error = capsys.readouterr().err
    assert "gone: side cutter" in error and "new: spanner" in error


def test_other_weights_behind_the_same_name_are_noticed(
    data: Path, tmp_path: Path, call_main: Main, capsys: Any
) -> None:
    import timm

    for name in ("first", "second"):
        torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / f"{name}.pth")
    assert train(call_main, data, tmp_path / "run", "--epochs", 1, "--backbone_weights", tmp_path / "first.pth") == 0
    assert train(call_main, data, tmp_path / "run", "--epochs", 2, "--backbone_weights", tmp_path / "second.pth") == 2
    assert "backbone_hash" in capsys.readouterr().err


def test_more_epochs_continue_a_finished_run(data: Path, tmp_path: Path, call_main: Main) -> None:
    assert train(call_main, data, tmp_path / "run", "--epochs", 1) == 0
    assert train(call_main, data, tmp_path / "run", "--epochs", 3) == 0
    assert [record["epoch"] for record in epoch_records(tmp_path / "run")] == [1, 2, 3]


def test_overwrite_moves_the_old_run_aside(
    data: Path, tmp_path: Path, call_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is one, which may be a link to another disk."""
    assert train(call_main, data, tmp_path / "run", "--epochs", 1, "--overwrite") == 0
    rename = os.rename

    def rename_folder(source: Path, target: Path) -> None:
        if Path(source).is_file():
            raise OSError(errno.EXDEV, "another disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_folder)
    before = (tmp_path / "run" / "checkpoint_last.pth").read_bytes()
    assert train(call_main, data, tmp_path / "run", "--epochs", 2, "--overwrite", "--seed", 1) == 0
    (old,) = (path for path in tmp_path.iterdir() if path.name.startswith("run.old-"))
    assert (old / "checkpoint_last.pth").read_bytes() == before
    assert len(epoch_records(tmp_path / "run")) == 2


def test_a_directory_in_use_is_refused(data: Path, tmp_path: Path, call_main: Main, capsys: Any) -> None:
    with lct.RunDirectory(tmp_path / "run"):
        assert train(call_main, data, tmp_path / "run", "--epochs", 1) == 2
        assert train(call_main, data, tmp_path / "run", "--epochs", 1, "--overwrite") == 2
    assert capsys.readouterr().err.count(f"in use by process {os.getpid()}") == 2


def test_a_loss_that_is_not_finite_ends_with_3_and_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, call_main: Main, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    steps_per_epoch = len(lct.batch_borders(29, 8)) - 1
    monkeypatch.setattr(lct, "lr_factor", lambda _, step, __: float("nan") if step == steps_per_epoch + 1 else 1.0)
    assert train(call_main, data, tmp_path / "run", "--epochs", 3) == 3
    error = capsys.readouterr().err
    assert f"step {steps_per_epoch + 3}" in error and "checkpoint_last.pth (epoch 1)" in error
    checkpoint = load_state(tmp_path / "run" / "checkpoint_last.pth")
    assert checkpoint["epoch"] == 1 and all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    assert lct.read_events(tmp_path / "run")[-1]["status"] == "diverged"


@pytest.mark.parametrize(("room", "missed"), [(8, 0), (0, 3)])
def test_an_image_that_vanishes_during_the_run_costs_that_image(
    tmp_path: Path, call_main: Main, monkeypatch: pytest.MonkeyPatch, room: int, missed: int
) -> None:
    """Where the scan keeps what it decodes, it is not missed at all."""
    root = make_dataset(tmp_path / "data", {"a": 12, "b": 12})
    open_run = lct.open_run

    def lose_an_image(job: lct.Job, *rest: Any) -> None:
        open_run(job, *rest)
        for split in lct.SPLIT_NAMES:
            (root / job.records.paths[int(job.records.rows(split)[0])]).unlink()

    monkeypatch.setattr(lct, "open_run", lose_an_image)
    assert train(call_main, root, tmp_path / "run", "--epochs", 2, "--cache_crops", room) == 0
    log = (tmp_path / "run" / "train.log").read_text("utf-8")
    assert log.count("cannot be read any more") == missed
    assert (f"warning: {lct.count_of(missed, 'file')} could not be used as scanned" in log) == bool(missed)
    assert lct.read_events(tmp_path / "run")[-1]["status"] == "completed"


def test_a_class_whose_training_images_vanish_is_named_and_costs_the_class(
    tmp_path: Path, call_main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of two classes one is left, which no logistic regression can be fitted on."""
    root = make_dataset(tmp_path / "data", {"a": 12, "b": 12})
    open_run = lct.open_run

    def lose_a_class(job: lct.Job, *rest: Any) -> None:
        open_run(job, *rest)
        for row in job.records.rows("train")[job.records.labels[job.records.rows("train")] == 1].tolist():
            (root / job.records.paths[row]).unlink()

    batches, save_epoch = [], lct.save_epoch

    def note_position(job: lct.Job, state: lct.TrainState, *rest: Any) -> None:
        batches.append(state.batches)
        save_epoch(job, state, *rest)

    monkeypatch.setattr(lct, "open_run", lose_a_class)
    monkeypatch.setattr(lct, "save_epoch", note_position)
    assert train(call_main, root, tmp_path / "run", "--epochs", 1, "--cache_crops", 0, "--batch", 2) == 0
    assert batches == [8], "those without a readable image count"
    log = (tmp_path / "run" / "train.log").read_text("utf-8")
    assert "without a readable training image, and never recognised: b\n" in log
    baseline = next(event for event in lct.read_events(tmp_path / "run") if event["event"] == "baseline_end")
    assert baseline["test"]["logreg_acc"] == 0.5
    with open(tmp_path / "run" / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["class"] == "b"]
    blanks = [(row["answer"], row["nearest_of_class"], row["nearest_of_class_view"]) for row in rows]
    assert set(blanks) == {("a", "", "")}, "there is no reference of b"
    capsys.readouterr()
    assert call_main("prototypes", "--run", tmp_path / "run", "--gpus", 0, "--workers", 0) == 0
    assert "never recognised: b\n" in capsys.readouterr().out


def test_training_images_that_are_all_gone_are_told() -> None:
    job = SimpleNamespace(records=SimpleNamespace(class_names=("a", "b"), root=Path("data")))
    with pytest.raises(lct.UserError, match="none of the training images can be read any more"):
        lct.score_epoch(job, SimpleNamespace(tally=lct.Tally()), {})


def test_the_state_is_saved_each_time_that_save_minutes_have_passed(
    data: Path, tmp_path: Path, call_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is made to go on by 1,000 seconds a step."""
    saved, steps = [], []
    monotonic, train_step, save_state = time.monotonic, lct.train_step, lct.save_state

    def note_step(*values: Any) -> Any:
        steps.append(1)
        return train_step(*values)

    def note_saving(job: lct.Job, state: lct.TrainState) -> None:
        saved.append(state.batches)
        save_state(job, state)

    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 1000 * len(steps))
    monkeypatch.setattr(lct, "train_step", note_step)
    monkeypatch.setattr(lct, "save_state", note_saving)
    assert train(call_main, data, tmp_path / "run", "--epochs", 1, "--batch", 4, "--save_minutes", 50) == 0
    assert len(steps) == 7 and saved == [0, 3, 6, 7]


def test_without_a_test_split_there_is_no_test(data: Path, tmp_path: Path, call_main: Main) -> None:
    assert train(call_main, data, tmp_path / "run", "--epochs", 1, "--test_split", 0) == 0
    events = [event["event"] for event in lct.read_events(tmp_path / "run")]
    assert "test_end" not in events and events[-1] == "run_end" and (tmp_path / "run" / "report.html").exists()


def test_two_classes_balanced_and_few_references(tmp_path: Path, call_main: Main) -> None:
    root = make_dataset(tmp_path / "data", {"few": 6, "many": 30})
    flags = ("--epochs", 2, "--balanced_per_class", "--samples_per_class", 9, "--max_refs_per_class", 3)
    assert train(call_main, root, tmp_path / "run", *flags) == 0
    support = epoch_records(tmp_path / "run")[0]["train_per_class"]
    assert {name: row["support"] for name, row in support.items()} == {"few": 9, "many": 9}
    with np.load(tmp_path / "run" / "prototypes.npz") as file:
        assert np.bincount(file["stack_labels"]).tolist() == [3, 3]
    (measured,) = (event for event in lct.read_events(tmp_path / "run") if event["event"] == "measured")
    methods = measured["open_set"]["others"]
    assert "trained, nearest reference" in methods
    assert "classifier, highest softmax" not in methods, "that of one class, when the other is held out, is always 1"


def test_class_map_and_exclude_hold_for_the_prototypes(data: Path, tmp_path: Path, call_main: Main) -> None:
    (tmp_path / "map.yaml").write_text("striking: [молоток]\nturning: [wrench]\nnull: [side cutter]\n", "utf-8")
    flags = ("--epochs", 1, "--class_map", tmp_path / "map.yaml", "--exclude", "0000.*")
    assert train(call_main, data, tmp_path / "run", *flags) == 0
    with np.load(tmp_path / "run" / "prototypes.npz") as file:
        assert file["id2cls"].tolist() == ["striking", "turning"]
        assert not [path for path in file["stack_paths"].tolist() if "side" in path or "0000" in path]
    assert "молоток -> striking" in (tmp_path / "run" / "train.log").read_text("utf-8")


def test_the_best_epoch_is_the_one_with_the_best_figure_and_ties_go_to_the_lower_loss(run: Path) -> None:
    records = epoch_records(run)
    best = min(records, key=lambda record: (-record["val"]["acc"], record["val"]["loss"]))
    assert load_state(run / "checkpoint_best.pth")["epoch"] == best["epoch"]


def test_a_foreign_checkpoint_is_refused_and_never_executed(
    data: Path, tmp_path: Path, call_main: Main, capsys: Any
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"model": Hostile()}, tmp_path / "hostile.pth")
    torch.save({"epoch": 3}, tmp_path / "foreign.pth")
    for name in ("hostile.pth", "foreign.pth"):
        assert train(call_main, data, tmp_path / "run", "--resume", tmp_path / name) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "owned").exists() and not (tmp_path / "run").exists()


BASELINE = {
    "val": {"centroid_acc": 0.5, "nn1_acc": 0.6, "logreg_acc": 0.7},
    "test": {"centroid_acc": 0.99, "nn1_acc": 0.98, "logreg_acc": 0.7},
}


def number_paths(paths: Iterable[str]) -> dict[str, int]:
    """Return a group of its own for each image."""
    return {path: group for group, path in enumerate(paths)}


@pytest.mark.parametrize(
    ("num_better", "num_worse", "word"),
    [
        (30, 10, "training helped: "),
        (10, 30, "training hurt: "),
        (6, 0, "training helped: "),
        (5, 0, "no measurable difference: "),  # five coins that all fall on one side: one time in sixteen
        (12, 9, "no measurable difference: "),
        (0, 0, "no measurable difference: "),
    ],
)
def test_verdict_compares_the_answers_to_the_same_images(num_better: int, num_worse: int, word: str) -> None:
    """With the baseline that is the best on val, though on test another one looks better."""
    frozen = {f"{index}.jpg": float(index >= num_better) for index in range(100)}
    trained = {path: float(int(path[:-4]) < 100 - num_worse) for path in frozen}
    judged = lct.judge_training(BASELINE, frozen, trained | {"gone.jpg": 1.0}, number_paths(frozen))
    assert judged["baseline"] == {"name": "logreg", "acc": pytest.approx(1 - num_better / 100)}
    assert judged["gain"]["value"] == pytest.approx((num_better - num_worse) / 100)
    low, high = judged["gain"]["interval"]
    assert low <= judged["gain"]["value"] <= high and 0.03 < high - low < 0.3, "never sure, with 100 images"
    num_unequal = num_better + num_worse
    expected = sum(math.comb(num_unequal, k) for k in range(min(num_better, num_worse) + 1)) / 2 ** max(
        num_unequal - 1, 0
    )
    assert judged["p_value"] == pytest.approx(min(1.0, expected))
    assert ("; the test, which decides, has p = 0.06)" in judged["verdict"]) == ((num_better, num_worse) == (5, 0))
    assert judged["verdict"].startswith(f"{word}prototype matching {1 - num_worse / 100:.3f}, logistic regression")
    assert (
        f"({100 * judged['gain']['value']:+.1f} points, " in judged["verdict"]
        and "on 100 test images" in judged["verdict"]
    )


def test_an_image_better_in_one_of_two_views_counts_half() -> None:
    """Many such, and few that are worse by a whole, are no gain and no loss."""
    frozen = {f"{index}.jpg": 0.5 if index < 40 else float(index < 61) for index in range(100)}
    trained = {path: float(int(path[:-4]) < 40) for path in frozen}
    judged = lct.judge_training(BASELINE, frozen, trained, number_paths(frozen))
    assert judged["p_value"] > 0.5 and judged["gain"]["value"] == pytest.approx(-0.01)
    assert judged["verdict"].startswith("no measurable difference: ")


def test_the_sign_of_each_gain_could_have_been_the_other() -> None:
    """The p-value is the share of all choices of signs whose sum lies as far from 0."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        gains = rng.choice([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.5], 11)
        sums = np.array(list(itertools.product((-1, 1), repeat=11))) @ gains
        assert lct.sign_flip_test(gains) == pytest.approx((np.abs(sums) >= abs(gains.sum())).mean())
    large = np.append(np.full(7, 2.0), np.full(5, -0.5))  # most gain much, few lose little; signs alone tell less
    assert lct.sign_flip_test(large) < 0.05 < lct.sign_flip_test(np.sign(large))


def test_the_frames_of_one_video_are_one_proof() -> None:
    frozen = {f"{index}.jpg": float(index >= 30) for index in range(100)}
    trained = dict.fromkeys(frozen, 1.0)
    apart, together, few = (
        lct.judge_training(BASELINE, frozen, trained, {path: int(path[:-4]) // size for path in frozen})
        for size in (1, 15, 30)
    )
    assert apart["verdict"].startswith("training helped: ") and apart["p_value"] < 1e-8
    assert together["verdict"].startswith("no measurable difference: ") and together["p_value"] == 0.5
    assert together["gain"]["value"] == apart["gain"]["value"] == pytest.approx(0.3)
    assert together["gain"]["interval"][0] == 0.0 and together["gain"]["interval"][1] > 0.5
    assert few["verdict"].startswith("no measurable difference: ") and few["p_value"] == 1.0
    assert few["gain"]["interval"] is None
    assert few["verdict"].endswith("(+30.0 points, on 100 test images; fewer than 6 groups of them have no interval)")


def test_there_is_no_verdict_on_images_that_the_frozen_backbone_never_saw() -> None:
    judged = lct.judge_training(BASELINE, {"gone.jpg": 1.0}, {"new.jpg": 1.0}, {})
    assert (
        judged["verdict"].startswith("no verdict: none of these test images") and judged["baseline"]["name"] == "logreg"
    )


def test_an_image_of_two_views_is_one_image() -> None:
    records = SimpleNamespace(paths=["a.jpg", "b.jpg", "c.jpg"])
    rows, is_right = np.array([2, 0, 2, 0, 1]), np.array([True, False, False, False, True])
    assert lct.image_accuracy(records, rows, is_right) == {"a.jpg": 0.0, "b.jpg": 1.0, "c.jpg": 0.5}


def test_training_on_real_crops_beats_matching_with_the_frozen_backbone(
    shared_data: Path, tmp_path: Path, call_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lct, "TOOLS_DIR", tmp_path)  # no report, and no heads without some classes: a third of the time
    monkeypatch.setattr(lct, "UNSEEN_MAX_IMAGES", 0)
    weights = shared_data / "weights" / "mobilenetv2_035.timm.pth"
    flags = ["--model_id", "mobilenetv2_035", "--backbone_weights", weights]
    flags += ["--group_regex", r"^(src\d+)_", "--img_size", 96, "--epochs", 8, "--workers", 2, "--gpus", 0]
    assert call_main("--data_root", shared_data / "tools17", "--out_dir", tmp_path / "run", *flags) == 0
    events = {event["event"]: event for event in lct.read_events(tmp_path / "run")}
    baseline, trained = events["baseline_end"]["test"], events["test_end"]["prototypes"]
    assert trained["acc"] > max(baseline["centroid_acc"], baseline["nn1_acc"]) + 0.03
    assert trained["recall_at_1"] > baseline["nn1_acc"]


def test_an_update_that_ruins_the_weights_is_never_saved(
    data: Path, tmp_path: Path, call_main: Main, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The last step of an epoch: its loss was finite, and no training loss has seen what it did."""
    last_of_epoch_two = 2 * (len(lct.batch_borders(29, 8)) - 1) - 1
    monkeypatch.setattr(lct, "lr_factor", lambda _, step, __: float("nan") if step == last_of_epoch_two else 1.0)
    assert train(call_main, data, tmp_path / "run", "--epochs", 3) == 3
    assert "checkpoint_last.pth (epoch 1)" in capsys.readouterr().err
    for name in ("checkpoint_last.pth", "checkpoint_best.pth"):
        assert all(torch.isfinite(value).all() for value in load_state(tmp_path / "run" / name)["model"].values())


def test_dropout_in_a_fine_tuned_backbone_does_not_depend_on_workers(
    data: Path, tmp_path: Path, call_main: Main
) -> None:
    flags = ("--epochs", 1, "--model_id", "test_vit", "--drop_path", 0.3, "--no-freeze_backbone", "--test_split", 0)
    for workers in (0, 1):
        assert train(call_main, data, tmp_path / f"w{workers}", *flags, "--workers", workers) == 0
    assert_same_weights(tmp_path / "w0" / "checkpoint_last.pth", tmp_path / "w1" / "checkpoint_last.pth")


def test_resuming_from_an_older_checkpoint_forgets_the_epochs_after_it(
    data: Path, tmp_path: Path, call_main: Main, capsys: Any
) -> None:
    """Epochs of the discarded part must not live on in checkpoint_best.pth, nor in others; but they are not lost."""
    assert train(call_main, data, tmp_path / "back", "--epochs", 5, "--save_every", 1) == 0
    path = tmp_path / "back" / "checkpoint_ep002.pth"
    before = {path.name: path.read_bytes() for path in lct.list_checkpoints(path.parent)}
    path.with_name("checkpoint_ep004.pth").rename(path.with_name("checkpoint_ep044.pth"))  # no epoch to come writes it
    assert train(call_main, data, tmp_path / "back", "--epochs", 5, "--save_every", 1, "--resume", path) == 0
    assert "ahead of checkpoint_ep002.pth: checkpoint_ep044.pth, checkpoint_ep005.pth" in capsys.readouterr().out
    aside = {path.name.split(".old-")[0].replace("044", "004"): path for path in path.parent.glob("*.old-*")}
    assert {f"checkpoint_{name}.pth" for name in ("ep003", "ep004", "ep005", "last")} <= aside.keys()
    assert all(path.read_bytes() == before[name] for name, path in aside.items())
    assert {path.name for path in lct.list_checkpoints(path.parent)} == before.keys()
    best = load_state(tmp_path / "back" / "checkpoint_best.pth")
    events = lct.read_events(tmp_path / "back")
    assert [record["epoch"] for record in epoch_records(tmp_path / "back")] == [1, 2, 3, 4, 5]
    assert best["epoch"] == best["best"]["epoch"] == [e for e in events if e["event"] == "proto_start"][-1]["epoch"]
    assert load_state(tmp_path / "back" / "checkpoint_last.pth")["best"] == best["best"]


def test_a_checkpoint_of_another_folder_is_refused(
    run: Path, data: Path, tmp_path: Path, call_main: Main, capsys: Any
) -> None:
    assert train(call_main, data, tmp_path / "new", "--resume", run / "checkpoint_last.pth") == 2
    assert f"--out_dir {run}" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_excluding_files_later_is_another_run(run: Path, data: Path, call_main: Main, capsys: Any) -> None:
    assert train(call_main, data, run, "--epochs", 6, "--exclude", "0001.png") == 2
    assert "exclude: [] -> ['0001.png']" in capsys.readouterr().err


def test_scan_leaves_a_run_alone(run: Path, data: Path, call_main: Main, capsys: Any) -> None:
    before = snapshot(run)
    assert call_main("scan", "--data_root", data, "--out_dir", run) == 2
    assert "holds a run" in capsys.readouterr().err and snapshot(run) == before


def end_cli(*args: object, out_dir: Path) -> tuple[int, str, int]:
    """Start a run and send SIGTERM to its process group after the first epoch; return exit code, stderr and group id."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, args), "--out_dir", str(out_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    log = out_dir / "metrics.jsonl"
    while not (log.exists() and b'"epoch_end"' in log.read_bytes()) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do
    error = process.communicate(timeout=60)[1]
    return process.returncode, error, process.pid


def test_sigterm_from_outside_ends_workers_too_and_leaves_a_run_that_goes_on(data: Path, tmp_path: Path) -> None:
    flags = ("--data_root", data, *SETTINGS, "--epochs", 4000, "--workers", 2)
    code, error, group = end_cli(*flags, out_dir=tmp_path / "run")
    assert code == 143 and "continues" in error and "Traceback" not in error
    assert lct.read_events(tmp_path / "run")[-1]["status"] == "interrupted"
    assert load_state(tmp_path / "run" / "checkpoint_last.pth")["epoch"] >= 1
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(group, 0)
            time.sleep(0.1)


def test_samples_can_be_sent_to_workers_that_were_not_forked(data: Path) -> None:
    import pickle

    transform = pickle.loads(pickle.dumps(lct.build_transform(32, augment=True)))
    image = lct.load_image(data / "wrench" / "0000.png")
    assert np.array_equal(transform(image, None, 3), lct.build_transform(32, augment=True)(image, None, 3))


def test_the_baseline_is_scored_like_the_trained_model(run: Path, data: Path) -> None:
    """Against scikit-learn on features made apart from the code that the run used."""
    from sklearn.metrics import f1_score
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

    splits = json.loads((run / "splits.json").read_text("utf-8"))
    backbone, _ = lct.build_backbone(lct.Config(model_id="test_resnet", pretrained=False, img_size=32), print)
    fit_square, parts = lct.build_transform(32, augment=False), {}
    for split in ("train", "test"):
        pairs = [(path, name) for name, paths in splits[split].items() for path in paths]
        images = np.stack([fit_square(lct.load_image(data / path), None, 0) for path, _ in pairs])
        with torch.no_grad():
            features = torch.nn.functional.normalize(backbone.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)))
        parts[split] = features.numpy(), np.array([name for _, name in pairs])
    (train_features, train_names), (test_features, test_names) = parts["train"], parts["test"]
    test = next(event for event in lct.read_events(run) if event["event"] == "baseline_end")["test"]
    nearest = KNeighborsClassifier(1).fit(train_features, train_names).predict(test_features)
    assert test["nn1_acc"] == pytest.approx((nearest == test_names).mean())
    assert test["nn1_f1_macro"] == pytest.approx(f1_score(test_names, nearest, average="macro"))
    means = np.stack([train_features[train_names == name].mean(axis=0) for name in splits["classes"]])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    central = NearestCentroid().fit(means, splits["classes"]).predict(test_features)  # unit vectors: the same order
    assert test["centroid_acc"] == pytest.approx((central == test_names).mean())
    assert {f"logreg_{key}" for key in ("acc", "f1_macro", "auc_macro")} <= set(test)


def test_a_progress_bar_shows_on_a_terminal_and_as_a_line_now_and_then_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, terminal = os.openpty()
    os.set_blocking(screen, False)
    termios.tcsetwinsize(terminal, (24, 80))
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert list(lct.progress(range(3), 3, "reading", "crop")) == [0, 1, 2]
        assert b"reading:" in os.read(screen, 4096)
    os.close(screen)
    now = 1000.0  # seconds
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(tqdm.std, "time", lambda: now)
    monkeypatch.setattr(lct, "PROGRESS_LOG", lct.ProgressLog())
    with open(tmp_path / "log", "w+") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        for label in ("reading", "fitting"):  # 2 x 60 s, in steps of 5 s
            for _ in lct.progress(range(12), 12, label, "crop"):
                now += 5
        lines = (tmp_path / "log").read_text().splitlines()
        stderr.truncate(0)
        now += 30
        list(lct.progress(range(3), 3, "short", "crop"))
    assert [re.match(r"(\w+: \d+) of 12, ", line)[1] for line in lines] == [
        "reading: 4", "reading: 8", "reading: 12", "fitting: 4", "fitting: 8", "fitting: 12"
    ]  # fmt: skip
    assert (tmp_path / "log").read_text().strip("\0") == ""
    with open(tmp_path / "log", "rb") as stderr:  # cannot be written to
        monkeypatch.setattr(sys, "stderr", stderr)
        for _ in lct.progress(range(12), 12, "reading", "crop"):
            now += 20
