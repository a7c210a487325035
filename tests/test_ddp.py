"""Section 04: the processes that torchrun starts do together what one process does, and end together.

Processes are forked as torchrun would start them; one test has a real torchrun, which starts them anew.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, SCRIPT, make_dataset
from killing import Nursery, differences, do, fail, kill
from timm.layers import BatchNormAct2d
from torch import nn

import lct_dino3 as lct

# 30 training images: the last batch of an epoch has two, which three processes cannot share.
COMMON = "--no-pretrained --img_size 32 --batch 7 --workers 0 --gpus 0 --emb_dim 16".split()
FROZEN = (
    *COMMON,
    *"--model_id test_resnet --epochs 3 --save_every 2 --save_minutes 1e-6".split(),  # saves after every step
    *"--precision bf16".split(),  # in fp32 a convolution rounds by the size of its batch
)
FINE_TUNED = (*COMMON, *"--model_id test_vit --no-freeze_backbone --pool avg --epochs 4 --lr 1e-4".split())
# Whatever is added before BatchNorm is taken out by it: these have no gradient but rounding errors, which AdamW makes steps of.
ARBITRARY = ("backbone.model.fc_norm.bias", "head.hidden.bias", "head.norm.running_mean")
ALONE_ON_A_MACHINE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


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


# --- the same numbers


def test_a_frozen_run_of_three_processes_is_that_of_one_bit_for_bit(
    nursery: Nursery, data: Path, alone: Path, tmp_path: Path
) -> None:
    """The third is the only one of another machine, as torchrun says it."""
    ranks = [{}, {}, {"env": ALONE_ON_A_MACHINE}]
    ends = nursery.run_team("--data_root", data, "--out_dir", tmp_path / "run", *FROZEN, ranks=ranks)
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert differences(alone, tmp_path / "run") == []
    assert [text for _, text in ends[1:]] == ["", ""]


def test_a_fine_tuned_run_of_two_processes_is_that_of_one(
    nursery: Nursery, data: Path, alone: Path, tmp_path: Path
) -> None:
    """An image vanishes when training begins: the parts of its batches are then of uneven size."""
    splits = json.loads((alone / "splits.json").read_text(encoding="utf-8"))
    gone = splits["train"]["wrench"][0]
    ends = []
    for name, ranks in (("one", [{}]), ("two", [{}, {}])):
        shutil.copytree(data, tmp_path / name / "data")
        ranks[0]["plans"] = [do("TrainFeed.__init__", 1, shell=f"rm '{tmp_path / name / 'data' / gone}'")]
        argv = ("--data_root", tmp_path / name / "data", "--out_dir", tmp_path / name / "run", *FINE_TUNED)
        ends += nursery.run_team(*argv, "--cache_crops", 0, ranks=ranks)
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert all(end[1].count(f"{gone} cannot be read any more") == 1 for end in ends[:2])
    one, two = (torch.load(tmp_path / name / "run/checkpoint_last.pth", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == 20
    far = {key: float((two["model"][key] - value).abs().max()) for key, value in one["model"].items() if value.numel()}
    assert {key: value for key, value in far.items() if value > 1e-5 and key not in ARBITRARY} == {}
    epochs = [[e for e in lct.read_events(tmp_path / n / "run") if e["event"] == "epoch_end"] for n in ("one", "two")]
    for first, second in zip(*epochs, strict=True):
        for split in ("train", "val"):
            assert second[split] == pytest.approx(first[split], abs=1e-3), f"{split} of epoch {first['epoch']}"
        supports = [[figures["support"] for figures in e["train_per_class"].values()] for e in (first, second)]
        assert supports[0] == supports[1]
        assert sum(supports[0]) == 29


@pytest.mark.parametrize(
    "flags",
    ["--lora_rank 2 --backbone_lr 1e-3", "--unfreeze_blocks 2 --epochs 2 --ema_decay 0.5 --accumulate_grad_batches 2"],
)
def test_two_processes_train_a_part_of_the_backbone_as_one_does(
    flags: str, nursery: Nursery, data: Path, tmp_path: Path
) -> None:
    words = (*FINE_TUNED, "--freeze_backbone", "--epochs", 1, "--batch", 15, *flags.split())
    for name, ranks in (("one", [{}]), ("two", [{}, {}])):
        argv = ("--data_root", data, "--out_dir", tmp_path / name, *words)
        assert {code for code, _ in nursery.run_team(*argv, ranks=ranks)} == {0}
    one, two = (
        torch.load(tmp_path / name / "checkpoint_last.pth", weights_only=True)["model"] for name in ("one", "two")
    )
    assert len(one) < 40 and any(key.startswith("backbone.") for key in one)
    for key in one.keys() - set(ARBITRARY):
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)


class Small(nn.Sequential):
    """A backbone whose every layer is trained."""

    frozen, trained_keys, model = False, None, property(lambda self: self)

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(128, 12))


def train_small(path: str, is_alone: bool = False) -> int:
    """Do 20 steps in float64, some of two batches, together with other processes if there are any; write what comes out."""
    if not is_alone:
        lct.start_processes()
    rank, world_size = lct.get_rank(), lct.get_world_size()
    torch.manual_seed(rank)  # weights come from the first process
    config = lct.Config(freeze_backbone=False, emb_dim=32, heads=2)
    model = lct.Recognizer(Small(), lct.Head(12, 32, 2), lct.ArcFace(config, 5)).double().train()
    model.load_state_dict(lct.broadcast(model.state_dict()))
    runtime = lct.Runtime(torch.device("cpu"), 0, torch.float32)
    state = lct.start_state(model, config, runtime)
    network, losses = runtime.wrap(model.backbone, is_trained=True), []
    for step in range(20):
        rng = np.random.default_rng(step)
        batches = []
        for size in ((7,), (6, 3), (2,), (5, 4))[step % 4]:
            images = torch.from_numpy(rng.normal(size=(size, 3, 8, 8)))
            labels = torch.from_numpy(rng.integers(0, 5, size))
            own = slice(size * rank // world_size, size * (rank + 1) // world_size)
            batches.append(lct.gather_batch(lct.Batch(images[own], labels[own], labels[own], labels[own], [])))
        losses.append(lct.train_step(config, runtime, network, state, batches)[0])
    torch.save({"losses": torch.stack(losses), **model.state_dict()}, f"{path}{rank}")
    return 0


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_gradients_and_statistics_are_those_of_the_whole_batch(
    num_processes: int, nursery: Nursery, tmp_path: Path
) -> None:
    """In float64, where rounding hides nothing; of the batches of two, one of three processes has no image."""
    assert train_small(str(tmp_path / "alone"), is_alone=True) == 0
    ranks = [{} for _ in range(num_processes)]
    ends = nursery.run_team(str(tmp_path / "team"), ranks=ranks, function=("test_ddp", "train_small"))
    assert [code for code, _ in ends] == [0] * num_processes, ends
    expected = torch.load(tmp_path / "alone0", weights_only=True)
    for rank in range(num_processes):
        found = torch.load(tmp_path / f"team{rank}", weights_only=True)
        for key, value in expected.items():
            if key not in (
                "backbone.5.bias",
                "head.hidden.bias",
                "head.norm.running_mean",
            ):  # arbitrary before BatchNorm
                torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)


def test_batchnorm_is_trained_on_whole_batches_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is embedded; a backbone that keeps its statistics, as with pretrained weights, may be trained anywhere."""
    gpus = lct.Runtime(torch.device("cpu"), 2, torch.float32)
    backbone = lct.Backbone(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(lct.UserError, match="torchrun --nproc_per_node 2"):
        gpus.sync_batchnorm(backbone)
    monkeypatch.setattr(lct, "get_world_size", lambda: 2)
    with pytest.raises(lct.UserError, match="start one process"):
        dataclasses.replace(gpus, num_gpus=0).sync_batchnorm(backbone)
    dataclasses.replace(gpus, num_gpus=1).sync_batchnorm(backbone)
    assert isinstance(backbone.model[1], nn.SyncBatchNorm)
    backbone = lct.Backbone(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), (0.5,) * 3, (0.5,) * 3)
    backbone.freezes_batchnorm = True
    gpus.sync_batchnorm(backbone)
    assert isinstance(backbone.model[1], BatchNormAct2d)


def test_a_frozen_backbone_goes_to_the_other_gpus_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataParallel would send it with every batch: 1.2 GB of a ViT-L."""
    sent = []
    monkeypatch.setattr(nn.DataParallel, "replicate", lambda self, module, ids: sent.append(ids) or [module] * len(ids))
    runtime = lct.Runtime(torch.device("cpu"), 3, torch.float32)
    backbone = lct.Backbone(nn.Sequential(nn.Conv2d(3, 4, 3)), (0.5,) * 3, (0.5,) * 3)
    assert type(runtime.wrap(backbone)) is nn.DataParallel
    backbone.freeze()
    for num_used in (3, 2, 3):  # the last batch may be too small for all
        network = runtime.wrap(backbone)
        network.device_ids = [0, 1, 2]  # which DataParallel itself forgets where there is no GPU
        assert len(network.replicate(backbone, [0, 1, 2][:num_used])) == num_used
    assert sent == [[0, 1, 2]]
    assert dataclasses.replace(runtime, num_gpus=1).wrap(backbone) is backbone


def test_processes_and_gpus_draw_dropout_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a backbone on the GPUs of one process would else drop the same paths of their images."""
    gpus = [torch.Generator() for _ in range(3)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    seeds = []
    for words, rank in (((42, 5, 0), 0), ((42, 5, 0), 1), ((42, 5, 0, 1), 0), ((42, 5, 1), 1)):
        lct.seed_torch(*words, rank=rank)
        assert torch.initial_seed() == gpus[0].initial_seed()
        seeds += [gpu.initial_seed() for gpu in gpus]
    assert len(set(seeds)) == 4 * len(gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)  # of the third rank of a machine
    monkeypatch.setattr(lct.dist, "is_initialized", lambda: True)
    lct.seed_torch(42, 5, 0)
    assert [gpu.initial_seed() for gpu in gpus] == [*seeds[-3:-1], seeds[0]]


def test_evaluate_and_prelabel_share_their_images(nursery: Nursery, data: Path, alone: Path, tmp_path: Path) -> None:
    answers = []
    for size in (1, 2):
        run, out = tmp_path / f"run{size}", tmp_path / f"out{size}"
        shutil.copytree(alone, run)
        flags = ("--workers", 0, "--gpus", 0, "--batch", 8)
        for argv in (("evaluate", "--run", run), ("prelabel", "--run", run, "--images", data, "--out", out)):
            ends = nursery.run_team(*argv, *flags, ranks=[{} for _ in range(size)])
            assert [code for code, _ in ends] == [0] * size, ends
        with open(out / "objects.csv", encoding="utf-8", newline="") as file:
            answers.append((json.loads((run / "evaluation.json").read_bytes()), *zip(*csv.reader(file), strict=True)))
    (one, *columns), (two, *others) = answers
    assert one == two
    for column, other in zip(columns, others, strict=True):  # a convolution in fp32 rounds by the size of its batch
        same = column == other
        assert same or np.array(column[1:], float) == pytest.approx(np.array(other[1:], float), abs=1e-5), column[0]


# --- the same end


def one_message(ends: list[tuple[int, str]]) -> str:
    """Return the line in which the processes say how it ended: one line of one of them."""
    lines = [line for _, text in ends for line in text.splitlines() if line.startswith(("error: ", "interrupted "))]
    assert len(lines) == 1, ends
    assert "Traceback" not in str(ends)
    return lines[0]


def test_a_process_that_ends_ends_all_with_one_message_and_one_alone_can_go_on(
    nursery: Nursery, data: Path, alone: Path, tmp_path: Path
) -> None:
    argv = ("--data_root", data, "--out_dir", tmp_path / "run", *FROZEN)
    for plan, code in (
        (kill("SquareStore.get", 20, KILL), -9),
        (kill("train_step", 8, TERM), 143),  # as when a scheduler wants one machine back
        (fail("train_step", 4, error="MemoryError"), 2),
    ):
        ends = nursery.run_team(*argv, ranks=[{}, {}, {"plans": [plan]}])
        assert [end for end, _ in ends] == [code if code > 0 else 2] * 2 + [code], ends
        assert ("out of memory" in one_message(ends)) == ("error" in plan)
    code, text = nursery.run(*argv)
    assert code == 0, text
    assert differences(alone, tmp_path / "run") == []


def test_the_first_process_ends_all_with_its_code_and_two_can_go_on(
    nursery: Nursery, data: Path, alone: Path, tmp_path: Path
) -> None:
    argv = ("--data_root", data, "--out_dir", tmp_path / "run", *FROZEN)
    for plan, code in (
        (kill("train_step", 6, KILL), -9),
        (kill("train_step", 4, INT), 130),
        (fail("train_step", 4, error="KeyError"), 1),
    ):
        ends = nursery.run_team(*argv, ranks=[{"plans": [plan]}, {}])
        assert [end for end, _ in ends] == [code, 2 if code == -9 else code], ends
        if code == 1:
            assert "KeyError" in ends[0][1]
            assert ends[1][1] == ""
        else:
            one_message(ends)
    ends = nursery.run_team(*argv, ranks=[{}, {}])
    assert [end for end, _ in ends] == [0, 0], ends
    assert differences(alone, tmp_path / "run") == []


def test_a_process_that_ends_amid_a_step_is_no_bug(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    ranks = [{}, {"plans": [kill("gather_rows", 5, KILL)]}]
    ends = nursery.run_team("--data_root", data, "--out_dir", tmp_path / "run", *FINE_TUNED, ranks=ranks)
    assert [code for code, _ in ends] == [2, -9], ends
    assert "another process" in one_message(ends)


def test_what_only_another_machine_lacks_is_said_there(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    """As the config file that all processes are given."""
    (tmp_path / "there.yaml").write_text("seed: 1\n")
    folders = ("--data_root", str(data), "--out_dir", str(tmp_path / "run"))
    ranks = [
        {"argv": ["scan", "--config", str(tmp_path / name), *folders], "env": ALONE_ON_A_MACHINE}
        for name in ("there.yaml", "missing.yaml")
    ]
    ends = nursery.run_team(ranks=ranks)
    code, text = ends[1]
    assert code == 2 and text.startswith("error: ") and "missing.yaml" in text, ends
    assert "Traceback" not in str(ends)


def start_torchrun(*argv: object, **variables: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--max_restarts",
        "1",
        "--standalone",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([*command, SCRIPT, *map(str, argv)], env=env, cwd=REPO, stderr=subprocess.PIPE, text=True)


def child_with_rank(parent: int, rank: int) -> int:
    """Return the number of the process that torchrun has started with a rank."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        words = stat.read_text().rsplit(")", 1)[1].split() if stat.exists() else []
        if words and int(words[1]) == parent and f"RANK={rank}" in (stat.parent / "environ").read_text().split("\0"):
            return int(stat.parent.name)
    raise AssertionError("torchrun has no such process")


def test_a_loader_worker_that_is_killed_is_named_by_the_process_that_it_read_for(
    nursery: Nursery, data: Path, alone: Path, tmp_path: Path
) -> None:
    """The first process writes the log, and knows nothing of it; the run is the same all the same."""
    ranks = [{}, {"plans": [do("gather_batch", 2, worker_signal=signal.SIGKILL)]}]
    argv = ("--data_root", data, "--out_dir", tmp_path / "run", *FROZEN, "--workers", 1, "--save_minutes", 10)
    ends = nursery.run_team(*argv, ranks=ranks)
    assert [code for code, _ in ends] == [0, 0], ends
    assert "process 1: warning: a loader worker was killed" in ends[1][1] and "was killed" not in ends[0][1]
    assert differences(alone, tmp_path / "run") == []


def test_torchrun_starts_again_what_was_killed(data: Path, alone: Path, tmp_path: Path) -> None:
    """A rank that ends before the first one has finished, and is aborted by its own threads then, does not end the job."""
    abort_at_exit = "import atexit, os\nif os.environ.get('RANK') == '1':\n    atexit.register(os.abort)\n"
    (tmp_path / "sitecustomize.py").write_text(abort_at_exit)
    launcher = start_torchrun("--data_root", data, "--out_dir", tmp_path / "run", *FROZEN, PYTHONPATH=str(tmp_path))
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("run/checkpoint_last.pth")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child_with_rank(launcher.pid, 1), KILL)
    error = launcher.communicate(timeout=400)[1]
    assert launcher.returncode == 0, error
    assert differences(alone, tmp_path / "run") == []
    kinds = [event["event"] for event in lct.read_events(tmp_path / "run")]
    assert kinds.count("resumed") == 1


# --- from one process to several, and back


def start_fine_tuned(nursery: Nursery, data: Path, out_dir: Path, ranks: list[dict[str, Any]]) -> int:
    """Start or continue a run of two epochs."""
    ends = nursery.run_team("--data_root", data, "--out_dir", out_dir, *FINE_TUNED, "--epochs", 2, ranks=ranks)
    assert len({code for code, _ in ends}) == 1, ends
    return ends[0][0]


def test_a_fine_tuned_run_goes_on_with_another_number_of_processes(
    nursery: Nursery, data: Path, tmp_path: Path
) -> None:
    """Stopped within an epoch, too: the checkpoint is the ordinary one. Of the last batch, one of three processes has no image."""
    stop = {"plans": [kill("train_step", 7, TERM)]}
    assert start_fine_tuned(nursery, data, tmp_path / "one", [{}]) == 0
    assert start_fine_tuned(nursery, data, tmp_path / "a", [{}, stop, {}]) == 143
    saved = torch.load(tmp_path / "a" / "checkpoint_interrupt.pth", weights_only=True)
    assert saved["step"] == 7, "the first process saves all steps, whichever has received the signal"
    assert start_fine_tuned(nursery, data, tmp_path / "a", [{}]) == 0
    assert start_fine_tuned(nursery, data, tmp_path / "b", [stop]) == 143
    assert start_fine_tuned(nursery, data, tmp_path / "b", [{}, {}]) == 0
    names = ("one", "a", "b")
    runs = [torch.load(tmp_path / name / "checkpoint_last.pth", weights_only=True) for name in names]
    moments = [{key: own["exp_avg"] for key, own in run["optimizer"]["state"].items()} for run in runs]
    for run, moment in zip(runs[1:], moments[1:], strict=True):
        assert run["step"] == runs[0]["step"] == 10
        far = {
            key: float((run["model"][key] - value).abs().max())
            for key, value in runs[0]["model"].items()
            if value.numel()
        }
        assert {key: value for key, value in far.items() if value > 1e-5 and key not in ARBITRARY} == {}
        # AdamW's steps hardly depend on the size of a gradient; its moments do.
        largest = max(float(value.abs().max()) for value in moments[0].values())
        assert max(float((moment[key] - value).abs().max()) for key, value in moments[0].items()) < 1e-3 * largest
    tests = [next(e for e in lct.read_events(tmp_path / name) if e["event"] == "test_end") for name in names]
    assert tests[1]["prototypes"] == tests[2]["prototypes"] == pytest.approx(tests[0]["prototypes"], abs=1e-3)
