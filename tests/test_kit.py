"""What other programs use of the script: options, run folder, whole files, checkpoints, signals. Here the small GAN of gan.py."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killing import Nursery, kill

import lct_dino3 as lct


@pytest.fixture
def start(nursery: Nursery) -> Callable[..., tuple[int, str]]:
    """Return a function that runs the program in a forked process, and returns its exit code and output."""
    return lambda *argv, **job: nursery.run(*argv, function=("gan", "main"), **job)


def test_a_program_with_two_optimizers_is_interrupted_killed_and_ends_as_if_nothing_had_happened(
    start: Callable, tmp_path: Path
) -> None:
    flags, whole, parts = ("--epochs", 12, "--gpus", 0), tmp_path / "whole", tmp_path / "parts"
    code, text = start("--out_dir", whole, *flags)
    assert code == 0, text
    for plan, code in (
        (kill("write_checkpoint", 4, signal.SIGTERM), 143),
        (kill("RunDirectory.event", 3), -9),  # between record and checkpoint
        (kill("torch.optim.Adam.step", 50, signal.SIGINT), 130),
    ):
        assert start("--out_dir", parts, *flags, plans=[plan])[0] == code
    code, text = start("--out_dir", parts, *flags)
    assert code == 0, text
    one, other = (lct.load_checkpoint(path / lct.LAST_NAME, {"generator": dict}) for path in (whole, parts))
    assert one["epoch"] == other["epoch"] == 12
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    recorded = [
        [(event["epoch"], event["loss"]) for event in lct.read_events(path) if event["event"] == "epoch_end"]
        for path in (whole, parts)
    ]
    assert recorded[0] == recorded[1] and len(recorded[0]) == 12
    assert [event["event"] for event in lct.read_events(parts)].count("interrupted") == 2


def test_its_options_are_read_checked_and_explained_like_those_of_the_script(start: Callable, tmp_path: Path) -> None:
    (tmp_path / "gan.yaml").write_text("training: {epochs: many}", encoding="utf-8")
    for argv, said in (
        ((), "--out_dir: is missing"),
        (("--epoch", 3), "did you mean --epochs"),
        (("--lr", 2), "--lr: 2.0 is out of range"),
        (("--out_dir", tmp_path, "--config", tmp_path / "gan.yaml"), "training.epochs: 'many' is not a whole number"),
        (("--out_dir", tmp_path / "none", "--resume"), "there is no checkpoint_last.pth"),
    ):
        code, text = start(*argv)
        assert code == 2 and said in text and text.startswith("error: ") and len(text.splitlines()) <= 2, text
    assert "Learn a distribution on a circle." in start("--help")[1]


def test_a_checkpoint_of_another_program_is_refused(start: Callable, tmp_path: Path) -> None:
    lct.write_checkpoint(tmp_path / lct.LAST_NAME, {"epoch": 1, "batches": 0, "model": {}})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "run_start"}) + "\n", encoding="utf-8")
    code, text = start("--out_dir", tmp_path)
    assert code == 2 and text.startswith("error: ") and "is not a checkpoint of this script" in text
