"""Faults of finished runs, and what the messages say: each remedy that can be typed is typed, and helps."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SCRIPT, TINY_RUN, draw_image, make_dataset, snapshot
from killing import Nursery

import lct_dino3 as lct

Main = Callable[..., int]
QUIET = ("--gpus", "0", "--workers", "0")


@pytest.fixture
def run_dir(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run / "run", tmp_path / "the run")  # in a message, it has to be quoted
    return tmp_path / "the run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    draw_image(0, 5).save(tmp_path / "photos" / "1.png")
    return tmp_path / "photos"


@pytest.fixture
def told(call_main: Main, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return a function that runs a command which must be refused, and returns what it says."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert call_main(*words) == 2, words
        text = capsys.readouterr().err
        assert text.startswith("error: ") and "Traceback" not in text and "None" not in text
        return text

    return run


def train_again(run_dir: Path, data: Path) -> tuple[object, ...]:
    return ("--data_root", data, "--out_dir", run_dir, *TINY_RUN)


def find_command(text: str) -> list[str]:
    """Return the words of the command that a message prints, for `call_main`."""
    return shlex.split(re.search(r"python lct_dino3\.py (.+?)(?: makes |$)", text, re.MULTILINE)[1])


# --- prototypes.npz


def hurt(kind: str, path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind != "missing":
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"flipped": flipped, "cut": data[:middle], "empty": b""}[kind])


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "FIFO", "missing", "folder", "link"])
def test_the_command_that_a_damaged_gallery_prints_makes_it_anew(
    kind: str, run_dir: Path, photos: Path, told: Callable[..., str], call_main: Main
) -> None:
    path = run_dir / "prototypes.npz"
    sound = lct.load_gallery(path)[0]
    hurt(kind, path)
    prelabel = ("prelabel", "--run", run_dir, "--images", photos, "--out", run_dir.parent / "labels", *QUIET)
    commands = {told("evaluate", "--run", run_dir, *QUIET)}
    if kind == "cut":
        prototypes = ("prototypes", "--run", run_dir)
        commands |= {
            told(*prelabel),
            told("export", "--run", run_dir, "--format", "safetensors"),
            told(*prototypes, "--list"),
            told(*prototypes, "--add", photos.parent, *QUIET),
            told(*prototypes, "--remove", "bit", *QUIET),
        }
    assert len(commands) == 1, "all say the same"
    assert call_main(*find_command(commands.pop()), *QUIET) == 0
    assert np.allclose(lct.load_gallery(path)[0].stacks, sound.stacks, atol=1e-5)
    assert len(list(run_dir.glob("prototypes.npz.damaged-*"))) == (kind != "missing"), "it is set aside"
    assert kind != "cut" or call_main(*prelabel) == 0


def test_a_finished_run_that_lacks_something_finishes_once_more(
    run_dir: Path, tiny_run: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    again = train_again(run_dir, tiny_run / "data")
    assert (
        call_main("prototypes", "--run", run_dir, "--add", make_dataset(run_dir.parent / "more", {"saw": 3}), *QUIET)
        == 0
    )
    hurts: dict[str, Callable[[Path], object]] = {
        "embeddings.npz": lambda path: path.write_bytes(b""),
        "predictions.csv": lambda path: path.write_bytes(path.read_bytes()[:-20]),
        "checkpoint_best.pth": lambda path: hurt("cut", path),
        "config.json": lambda path: path.write_text("{}"),
        "prototypes.npz": lambda path: hurt("empty", path),
    }
    for number, (name, do) in enumerate(hurts.items()):
        do(run_dir / name)
        capsys.readouterr()
        assert call_main(*again) == 0
        text = capsys.readouterr().out
        assert f"warning: {name}: " in text and "what a finished run leaves is made anew" in text
        assert ("have to be added again: saw" in text) == (number == 0), "what was enrolled is kept beside the new file"
        assert call_main(*again) == 0 and "is finished" in capsys.readouterr().out
    assert (run_dir / "predictions.csv").read_bytes() == (tiny_run / "run" / "predictions.csv").read_bytes()
    assert any("saw" in lct.load_gallery(path)[0].class_names for path in run_dir.glob("prototypes.2*.npz"))
    (run_dir / "report.html").unlink()
    assert call_main(*again) == 0
    words = find_command(capsys.readouterr().out)
    assert words[0] == "report" and call_main(*words) == 0 and (run_dir / "report.html").is_file()


@pytest.mark.parametrize("name", ["splits.json", "data_report.json"])
def test_the_page_does_without_a_damaged_file_of_the_start_once_it_is_moved_away(
    name: str, run_dir: Path, told: Callable[..., str], call_main: Main
) -> None:
    hurt("cut", run_dir / name)
    assert "move it away" in told("report", run_dir), "training writes it but once"
    (run_dir / name).unlink()
    assert call_main("report", run_dir) == 0


# --- what else messages say


def set_options(run_dir: Path, **values: object) -> None:
    record = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    record["options"].update(values)
    (run_dir / "config.json").write_text(json.dumps(record), encoding="utf-8")


def test_data_that_have_moved_are_named_by_file_and_key_with_the_flag_that_helps(
    run_dir: Path, tiny_run: Path, tmp_path: Path, told: Callable[..., str], call_main: Main
) -> None:
    where = run_dir / "config.json"
    for name, command, help_words in (
        ("data_root", ("evaluate",), ("--split", "test", "--data_root", tiny_run / "data")),
        ("data_root", ("prototypes",), ("--data_root", tiny_run / "data")),
        ("class_map", ("prototypes",), ("--class_map", "none")),
        ("unknown_dir", ("prototypes",), ("--unknown_dir", "none")),
        ("unknown_dir", ("evaluate",), ("--unknown_dir", "none")),
    ):
        set_options(run_dir, data_root=str(tiny_run / "data"), class_map=None, unknown_dir=None)
        set_options(run_dir, **{name: str(tmp_path / "gone")})
        words = (*command, "--run", run_dir, *QUIET)
        text = told(*words)
        assert (
            text.startswith(f"error: {where}: {name} {tmp_path / 'gone'}: does not exist")
            and f"give {' '.join(help_words[:-1]) if command == ('evaluate',) else f'--{name}'} PATH" in text
        )
        assert call_main(*words, *help_words) == 0
    set_options(run_dir, unknown_dir=None)
    assert f"{where}: data_root" in told("--config", where, "--data_root", tmp_path / "gone").replace(
        "--data_root", f"{where}: data_root"
    )


@pytest.mark.parametrize("name", ["checkpoint_best.pth", "config.json"])
def test_the_training_command_restores_what_other_commands_miss(
    name: str, run_dir: Path, tiny_run: Path, told: Callable[..., str], call_main: Main
) -> None:
    evaluate = ("evaluate", "--run", run_dir, *QUIET)
    for kind in ("cut", "missing"):
        hurt(kind, run_dir / name)
        assert "start its training command again" in told(*evaluate)
        assert call_main(*train_again(run_dir, tiny_run / "data")) == 0
        assert call_main(*evaluate) == 0


def test_remedies_of_a_split_that_is_empty_or_damaged_work(
    run_dir: Path, tiny_run: Path, told: Callable[..., str], call_main: Main
) -> None:
    splits = json.loads((run_dir / "splits.json").read_text(encoding="utf-8"))
    splits["test"] = {}
    (run_dir / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    evaluate = ("evaluate", "--run", run_dir, *QUIET)
    assert "give --split val, or --data_root DIR" in told(*evaluate)
    assert call_main(*evaluate, "--split", "val") == 0 and call_main(*evaluate, "--data_root", tiny_run / "data") == 0
    (run_dir / "splits.json").write_text("{}", encoding="utf-8")
    again = train_again(run_dir, tiny_run / "data")
    assert "train anew with --overwrite" in told(*again)
    assert call_main(*again, "--overwrite") == 0


def test_a_class_that_is_new_is_named_rather_than_that_it_is_small(
    run_dir: Path, tiny_run: Path, tmp_path: Path, told: Callable[..., str], call_main: Main
) -> None:
    data = shutil.copytree(tiny_run / "data", tmp_path / "data")
    make_dataset(data, {"saw": 1})
    (tmp_path / "map.yaml").write_text("null: [saw]")
    for command in (train_again(run_dir, data), ("evaluate", "--run", run_dir, "--split", "val", "--data_root", data)):
        text = told(*command, *QUIET)
        assert "other classes: 3 -> 4, gone: none, new: saw\n" in text and "`null: [NAME]` in its file leaves" in text
        assert call_main(*command, *QUIET, "--class_map", tmp_path / "map.yaml") == 0


def test_a_gallery_of_another_model_is_put_right_by_the_command_it_prints(
    run_dir: Path, told: Callable[..., str], call_main: Main
) -> None:
    path = run_dir / "prototypes.npz"
    gallery, meta = lct.load_gallery(path)
    lct.save_gallery(path, gallery, meta | {"weights_hash": "another"})
    text = told("evaluate", "--run", run_dir, *QUIET)
    assert "weights_hash: another" in text and call_main(*find_command(text), *QUIET) == 0
    assert call_main("evaluate", "--run", run_dir, *QUIET) == 0


def test_the_same_files_are_enrolled_once(
    run_dir: Path, tiny_run: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    add = ("prototypes", "--run", run_dir, *QUIET, "--add")
    more = make_dataset(tmp_path / "more", {"saw": 3, "awl": 2})
    assert call_main(*add, more) == 0
    before, files = lct.load_gallery(run_dir / "prototypes.npz")[0], sorted(run_dir.iterdir())
    capsys.readouterr()
    (tmp_path / "link").symlink_to(more)
    for folder in (more, tmp_path / "link"):
        assert call_main(*add, folder) == 0
        assert "nothing to add: the gallery has all 5 crops" in capsys.readouterr().out
    assert sorted(run_dir.iterdir()) == files
    draw_image(0, 9).save(more / "saw" / "new.png")
    assert call_main(*add, more) == 0 and "5 of 6 crops are in the gallery" in capsys.readouterr().out
    assert call_main(*add, tiny_run / "data") == 0
    assert "are in the gallery and not added again" in capsys.readouterr().out, "training images count too"
    after = lct.load_gallery(run_dir / "prototypes.npz")[0]
    num_rest = 42 - len(lct.load_gallery(tiny_run / "run" / "prototypes.npz")[0].stacks)  # of val and test
    assert len(after.stacks) == len(before.stacks) + 1 + num_rest and len(set(after.stack_paths)) == len(
        after.stack_paths
    )


# --- files that are sound, and not what a run writes


def edit_json(name: str, **values: Any) -> Callable[[Path], object]:
    def edit(run_dir: Path) -> None:
        content = json.loads((run_dir / name).read_text(encoding="utf-8"))
        (run_dir / name).write_text(json.dumps({**content, **values}), encoding="utf-8")

    return edit


def edit_checkpoint(name: str, **values: Any) -> Callable[[Path], object]:
    def edit(run_dir: Path) -> None:
        payload = torch.load(run_dir / name, weights_only=True)
        torch.save({**payload, **values}, run_dir / name)

    return edit


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda run_dir: (run_dir / name).write_text(text, encoding="utf-8")


EVALUATE, TRAIN, REPORT = "evaluate", "train", "report"
ODD_FILES = {
    "splits: number": (write("splits.json", "5"), EVALUATE, "splits.json"),
    "splits: deep": (write("splits.json", "[" * 100_000), EVALUATE, "nested too deeply"),
    "splits: class": (edit_json("splits.json", classes=[1, 2]), EVALUATE, "classes[0] is of type int"),
    "splits: image": (edit_json("splits.json", train={"axe": [5]}), EVALUATE, "train.axe[0] is of type int"),
    "splits: stranger": (edit_json("splits.json", train={"saw": []}), TRAIN, "saw is none of its classes"),
    "splits: twice": (edit_json("splits.json", val={"axe": ["axe/1.png"] * 2}), TRAIN, "axe/1.png stands there twice"),
    "config: list": (write("config.json", "[]"), EVALUATE, "config.json"),
    "config: no options": (edit_json("config.json", options=5), EVALUATE, "options is of type int"),
    "best: epoch": (edit_checkpoint("checkpoint_best.pth", epoch="1"), EVALUATE, "epoch is of type str"),
    "best: flag": (edit_checkpoint("checkpoint_best.pth", epoch=True), EVALUATE, "epoch is of type bool, not int"),
    "best: identity": (edit_checkpoint("checkpoint_best.pth", identity={}), EVALUATE, "identity has no class_names"),
    "best: model": (edit_checkpoint("checkpoint_best.pth", model={"head": 5}), EVALUATE, "model.head is of type int"),
    "report: config": (edit_json("config.json", data={}), REPORT, "classes"),
    "report: splits": (edit_json("splits.json", train=[]), REPORT, "holds what no run writes"),
    "report: data": (write("data_report.json", "{}"), REPORT, "masks"),
    "report: events": (write("metrics.jsonl", '{"event": "epoch_end", "time": 0}\n'), REPORT, "epoch"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_sound_file_of_another_form_is_refused_in_one_sentence(
    name: str, run_dir: Path, tiny_run: Path, told: Callable[..., str]
) -> None:
    edit, command, said = ODD_FILES[name]
    edit(run_dir)
    if command == TRAIN:
        text = told(*train_again(run_dir, tiny_run / "data"), "--epochs", 2)
    elif command == REPORT:
        text = told("report", run_dir)
    else:
        text = told("evaluate", "--run", run_dir, *QUIET)
    assert said in text and str(run_dir) in text and len(text) < 700


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("option", 5),
        ("data_root", 5),
        ("lr", "fast"),
        ("emb_dim", "128"),
        ("crop_mode", "all"),
        ("prototypes_per_class", "x"),
    ],
)
def test_a_stored_option_is_checked_as_one_in_a_config_file(
    key: str, value: object, run_dir: Path, told: Callable[..., str]
) -> None:
    set_options(run_dir, **{key: value})
    text = told("prototypes", "--run", run_dir, *QUIET)
    assert "another version" in text if key == "option" else f"config.json: {key}" in text


@pytest.mark.parametrize(
    "values",
    [
        {"step": "x"},
        {"seconds": None},
        {"baseline": {}},
        {"tally": {"losses": 5}},
        {"optimizer": {"state": {}, "param_groups": []}},
    ],
)
def test_a_checkpoint_of_another_form_costs_itself(
    values: dict[str, Any], run_dir: Path, tiny_run: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    edit_checkpoint("checkpoint_last.pth", **values)(run_dir)
    code = call_main(*train_again(run_dir, tiny_run / "data"), "--epochs", 2)
    out, error = capsys.readouterr()
    if "optimizer" in values:  # of this form, and of another model
        assert code == 2 and "cannot be restored" in error
    else:
        assert (
            code == 0
            and f"checkpoint_last.pth is not a checkpoint of this script and version: {next(iter(values))}" in out
        )


@pytest.mark.parametrize("change", ["size = 'x'", "value = x'00', checksum = 3523407757"])
def test_what_the_memory_of_files_holds_is_looked_at_again_if_it_is_odd(
    change: str, run_dir: Path, call_main: Main
) -> None:
    with sqlite3.connect(run_dir / "memory.sqlite") as table:
        table.execute(f"UPDATE files SET {change}")
    assert call_main("evaluate", "--run", run_dir, *QUIET) == 0


# --- outputs, and places that cannot be written


def test_no_output_takes_the_place_of_another_file_or_lies_among_inputs(
    run_dir: Path, tiny_run: Path, photos: Path, tmp_path: Path, told: Callable[..., str], call_main: Main
) -> None:
    shutil.copytree(tiny_run / "data", tmp_path / "data")
    set_options(run_dir, data_root=str(tmp_path / "data"))
    (tmp_path / "mine.txt").write_text("mine")
    before = [snapshot(folder) for folder in (tmp_path / "data", run_dir, photos)]
    export = ("export", "--run", run_dir, "--format", "safetensors", "--out")
    prelabel = ("prelabel", "--run", run_dir, "--images", photos, *QUIET, "--formats", "csv", "--out")
    labels = tmp_path / "coco.json"
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30]}
    image = {"id": 1, "file_name": "1.png", "width": 56, "height": 56}
    coco = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "axe"}]}
    labels.write_text(json.dumps(coco))
    crop = ("crop", "--images", photos, "--labels", labels, "--out")
    scan = ("scan", "--data_root", tmp_path / "data", "--out_dir", tmp_path / "scan", "--masks_out")
    for words, text in (
        ((*export, tmp_path / "mine.txt"), "is not overwritten"),
        ((*export, run_dir / "checkpoint_best.pth"), "lies inside a run"),
        ((*export, tmp_path / "data" / "axe" / "0000.png"), "lies inside data_root"),
        ((*prelabel, tmp_path / "data" / "axe" / "labels"), "lies inside the run's data_root"),
        ((*prelabel, run_dir / "labels"), "lies inside a run"),
        ((*prelabel, photos / "labels"), "lies inside --images"),
        ((*crop, run_dir / "crops"), "lies inside a run"),
        ((*crop, photos / "crops"), "lies inside --images"),
        ((*scan, tmp_path / "data" / "masks of SAM"), "lies inside data_root"),
    ):
        assert text in told(*words), words
    assert [snapshot(folder) for folder in (tmp_path / "data", run_dir, photos)] == before
    assert (tmp_path / "mine.txt").read_text() == "mine"
    for _ in range(2):  # an export takes the place of an export
        assert call_main(*export, tmp_path / "model.safetensors") == 0
        assert call_main(*export[:-1]) == 0


def test_a_run_that_cannot_be_written_is_refused_before_any_work(
    run_dir: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("work")

    monkeypatch.setattr(lct, "load_run", load)
    monkeypatch.setattr(lct, "load_model", load)
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))  # root may write everywhere
    for words in (("evaluate",), ("prototypes",), ("prototypes", "--remove", "bit")):
        assert "cannot be written to" in told(*words, "--run", run_dir, *QUIET)


# --- the world around a process


def test_closed_streams_are_no_fault_and_nothing_is_printed_into_a_file(tiny_run: Path, tmp_path: Path) -> None:
    closed = "<&- >&- 2>&-"
    words = [sys.executable, SCRIPT, "scan", "--data_root", tiny_run / "data", "--out_dir", tmp_path / "scan"]
    assert subprocess.run(f"{shlex.join(map(str, words))} {closed}", shell=True, check=False).returncode == 0
    json.loads((tmp_path / "scan" / "data_report.json").read_text(encoding="utf-8"))
    refused = subprocess.run(f"{shlex.join(map(str, [*words, '--nonsense']))} {closed}", shell=True, check=False)
    assert refused.returncode == 2


@pytest.mark.parametrize(("limit", "code"), [(64, 0), (14, 2)])
def test_few_open_files_suffice_or_are_named(limit: int, code: int, run_dir: Path, nursery: Nursery) -> None:
    """A batch that cannot be sent to the process that waits for it is dropped by the queue between them."""
    words = ("evaluate", "--run", run_dir, "--gpus", 0, "--workers", 1)
    done, text = nursery.run(*words, open_files=limit, constants={"LOADER_RESTARTS": 0})
    assert done == code and "Traceback" not in text, text
    assert code == 0 or f"raise ulimit -n, which is {limit}" in text
