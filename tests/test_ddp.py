"""Section 04: the processes that torchrun starts do together what one process does, and end together.

Processes are forked as torchrun would start them; one test has a real torchrun, which starts them anew.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SCRIPT, make_dataset
from killing import Nursery, differences, fail, kill

import lct_dino3 as lct

# 30 training images: the last batch of an epoch has two, which three processes cannot share evenly.
FROZEN = (
    "--model_id test_resnet --no-pretrained --img_size 32 --batch 7 --workers 0 --gpus 0 --emb_dim 16 --epochs 4"
    " --save_every 2 --save_minutes 1e-6"  # saves after every step
).split()
FINE_TUNED = (
    "--model_id test_vit --no-pretrained --no-freeze_backbone --pool avg --img_size 32 --batch 7 --workers 0 --gpus 0"
    " --emb_dim 16 --epochs 4 --lr 1e-4"
).split()
# Whatever is added before BatchNorm is taken out by it: these have no gradient but rounding errors, which AdamW makes steps of.
ARBITRARY = ("backbone.model.fc_norm.bias", "head.hidden.bias", "head.norm.running_mean")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("output"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("ddp") / "data", {"молоток": 14, "side cutter": 11, "wrench": 18})


@pytest.fixture(scope="module")
def alone(nursery: Nursery, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process. Shared: read only."""
    out_dir = tmp_path_factory.mktemp("alone") / "run"
    code, text = nursery.run("--data_root", data, "--out_dir", out_dir, *FROZEN)
    assert code == 0, text
    return out_dir


def run_team(
    nursery: Nursery, data: Path, out_dir: Path, *plans: dict[str, Any], size: int = 2
) -> list[tuple[int, str]]:
    """Run FROZEN with several processes; the plans are for the last one."""
    ranks: list[dict[str, Any]] = [{} for _ in range(size)]
    ranks[-1] = {"plans": plans}
    return nursery.run_team("--data_root", data, "--out_dir", out_dir, *FROZEN, ranks=ranks)


def test_a_frozen_run_of_three_processes_is_that_of_one_bit_for_bit(
    nursery: Nursery, data: Path, alone: Path, tmp_path: Path
) -> None:
    ends = run_team(nursery, data, tmp_path / "run", size=3)
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert differences(alone, tmp_path / "run") == []
    assert [text for _, text in ends[1:]] == ["", ""]


def test_a_fine_tuned_run_of_two_processes_is_that_of_one(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    argv = ("--data_root", data, *FINE_TUNED, "--out_dir")
    assert nursery.run(*argv, tmp_path / "one")[0] == 0
    ends = nursery.run_team(*argv, tmp_path / "two", ranks=[{}, {}])
    assert [code for code, _ in ends] == [0, 0], ends
    one, two = (torch.load(tmp_path / name / "checkpoint_last.pth", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == 20
    for key, value in one["model"].items():
        if key not in ARBITRARY:
            torch.testing.assert_close(two["model"][key], value, rtol=0, atol=1e-5, msg=lambda text: f"{key}: {text}")
    epochs = [[e for e in lct.read_events(tmp_path / n) if e["event"] == "epoch_end"] for n in ("one", "two")]
    for first, second in zip(*epochs, strict=True):
        for split in ("train", "val"):
            assert second[split] == pytest.approx(first[split], abs=1e-3), f"{split} of epoch {first['epoch']}"
        supports = [[figures["support"] for figures in e["train_per_class"].values()] for e in (first, second)]
        assert supports[0] == supports[1]
        assert sum(supports[0]) == 30


def one_message(ends: list[tuple[int, str]]) -> str:
    """Return the lines in which the processes say how it ended: it has to be one, of one of them."""
    lines = [line for _, text in ends for line in text.splitlines() if line.startswith(("error: ", "interrupted "))]
    assert len(lines) == 1, ends
    assert "Traceback" not in str(ends)
    return lines[0]


@pytest.mark.parametrize(
    ("plan", "codes"),
    [
        (kill("train_step", 8, signal.SIGKILL), [2, 2, -9]),
        (kill("nn.utils.clip_grad_norm_", 8, signal.SIGKILL), [2, 2, -9]),
        (kill("CropDataset.__getitem__", 3, signal.SIGKILL), [2, 2, -9]),  # baseline
        (kill("train_step", 8, signal.SIGTERM), [143, 143, 143]),  # as when a scheduler wants one machine back
        (fail("train_step", 8, error="MemoryError"), [2, 2, 2]),
    ],
    ids=["killed", "killed between gradient and update", "killed while embedding", "terminated", "out of memory"],
)
def test_one_process_that_ends_ends_all_with_one_message_and_another_number_goes_on(
    plan: dict[str, Any], codes: list[int], nursery: Nursery, data: Path, alone: Path, tmp_path: Path
) -> None:
    ends = run_team(nursery, data, tmp_path / "run", plan, size=3)
    assert [code for code, _ in ends] == codes, ends
    message = one_message(ends)
    assert ("out of memory" in message) == ("error" in plan)
    code, text = nursery.run("--data_root", data, "--out_dir", tmp_path / "run", *FROZEN)
    assert code == 0, text
    assert differences(alone, tmp_path / "run") == []


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        (kill("train_step", 8, signal.SIGKILL), -9),
        (kill("train_step", 8, signal.SIGINT), 130),
        (kill("score_training", 2, signal.SIGTERM), 143),
        (fail("evaluate_val", 1, errno=28), 2),
        (fail("train_step", 8, error="KeyError"), 1),
    ],
    ids=["killed", "Ctrl-C", "terminated while it works alone", "disk full", "bug"],
)
def test_the_first_process_ends_all_with_its_code(
    plan: dict[str, Any], code: int, nursery: Nursery, data: Path, alone: Path, tmp_path: Path
) -> None:
    ranks = [{"plans": [plan]}, {}]
    ends = nursery.run_team("--data_root", data, "--out_dir", tmp_path / "run", *FROZEN, ranks=ranks)
    assert [end for end, _ in ends] == [code, 2 if code == -9 else code], ends
    if code == 1:
        assert "KeyError" in ends[0][1]
        assert ends[1][1] == ""
    else:
        one_message(ends)
    ends = run_team(nursery, data, tmp_path / "run")
    assert [end for end, _ in ends] == [0, 0], ends
    assert differences(alone, tmp_path / "run") == []
