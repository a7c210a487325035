"""What other programs use of the script: options, run folder, whole files, checkpoints, signals. Here a small GAN, which needs
no data set of crops and has two optimizers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO

import lct_dino3 as lct

PROGRAM = f"""
from __future__ import annotations
import sys
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, {str(REPO)!r})
import lct_dino3 as lct
import torch
from torch import nn

FORM = {{"epoch": int, "batches": int, "generator": dict, "critic": dict, "optimizers": [dict]}}


@dataclass(frozen=True)
class GanOptions(lct.Options):
    '''Learn a distribution on a circle.'''

    config: Path | None = lct.option(None, "options", "data", metavar="FILE", once=True)
    out_dir: Path | None = lct.option(None, "where it is written", "data", metavar="DIR", needed=True)
    epochs: int = lct.option(4, "passes", "training", low=1, key="training.epochs")
    lr: float = lct.option(1e-3, "learning rate", "training", low=0.0, high=1.0)
    resume: str | None = lct.option(None, "go on", "run", metavar="PATH", nargs="?", const="last", once=True)
    overwrite: bool = lct.option(False, "start afresh", "run", once=True)
    seed: int = lct.same_option("seed")
    gpus: int | None = lct.same_option("gpus")


def train(options: GanOptions) -> None:
    lct.check_given(options)
    runtime = lct.make_runtime(options.gpus, "fp32")
    point = lct.find_resume_point(options.out_dir, options.resume, options.overwrite, FORM)
    lct.seed_torch(options.seed, 0)
    generator, critic = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizers = [torch.optim.Adam(part.parameters(), lr=options.lr) for part in (generator, critic)]
    first = 0
    with lct.RunDirectory(options.out_dir) as run, lct.keep_interrupted(options.out_dir):
        if point:
            first = point.payload["epoch"]
            generator.load_state_dict(point.payload["generator"])
            critic.load_state_dict(point.payload["critic"])
            for optimizer, state in zip(optimizers, point.payload["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            run.forget_epochs_after(first)
        for epoch in range(first, options.epochs):
            lct.seed_torch(options.seed, 1, epoch)
            for _ in range(20):
                lct.SIGNALS.check()
                real = nn.functional.normalize(torch.randn(16, 2))
                fake = generator(torch.randn(16, 2))
                for optimizer in optimizers[::-1]:  # the critic first
                    learns = optimizer is optimizers[1]
                    loss = critic(fake.detach()).mean() - critic(real).mean() if learns else -critic(fake).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            with lct.SIGNALS.hold():
                run.event("epoch_end", epoch=epoch + 1, loss=loss.item())
                payload = {{"generator": generator.state_dict(), "critic": critic.state_dict()}}
                payload["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
                lct.write_checkpoint(options.out_dir / lct.LAST_NAME, {{"epoch": epoch + 1, "batches": 0, **payload}})
        run.log(f"done on {{runtime.describe()}}")


if __name__ == "__main__":
    lct.exit_process(lct.run_program("gan", GanOptions, train))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tool") / "gan.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def start(program: Path, *argv: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(program), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_program_with_two_optimizers_is_interrupted_killed_and_ends_as_if_nothing_had_happened(
    program: Path, tmp_path: Path
) -> None:
    flags = ("--epochs", 120, "--gpus", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = start(program, "--out_dir", whole, *flags)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process, log = start(program, "--out_dir", parts, *flags), parts / "metrics.jsonl"
        size = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not log.exists() or log.stat().st_size < size + 2000):
            time.sleep(0.01)
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == code, error
    assert straight.wait(timeout=120) == 0
    last = start(program, "--out_dir", parts, *flags)
    assert last.wait(timeout=120) == 0, last.stderr.read()
    one, other = (lct.load_checkpoint(path / lct.LAST_NAME, {"generator": dict}) for path in (whole, parts))
    assert one["epoch"] == other["epoch"] == 120
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    recorded = [
        [(event["epoch"], event["loss"]) for event in lct.read_events(path) if event["event"] == "epoch_end"]
        for path in (whole, parts)
    ]
    assert recorded[0] == recorded[1] and len(recorded[0]) == 120
    assert [event["event"] for event in lct.read_events(parts)].count("interrupted") == 1


def test_its_options_are_read_checked_and_explained_like_those_of_the_script(program: Path, tmp_path: Path) -> None:
    (tmp_path / "gan.yaml").write_text("training: {epochs: many}", encoding="utf-8")
    for argv, said in (
        ((), "--out_dir: is missing"),
        (("--epoch", 3), "did you mean --epochs"),
        (("--lr", 2), "--lr: 2.0 is out of range"),
        (("--out_dir", tmp_path, "--config", tmp_path / "gan.yaml"), "training.epochs: 'many' is not a whole number"),
        (("--out_dir", tmp_path / "none", "--resume"), "there is no checkpoint_last.pth"),
    ):
        process = start(program, *argv)
        output, error = process.communicate(timeout=60)
        assert (process.returncode, output) == (2, "") and said in error and "Traceback" not in error, error
    process = start(program, "--help")
    assert "Learn a distribution on a circle." in process.communicate(timeout=60)[0]


def test_a_checkpoint_of_another_program_is_refused(program: Path, tmp_path: Path) -> None:
    lct.write_checkpoint(tmp_path / lct.LAST_NAME, {"epoch": 1, "batches": 0, "model": {}})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "run_start"}) + "\n", encoding="utf-8")
    process = start(program, "--out_dir", tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "is not a checkpoint of this script" in error
