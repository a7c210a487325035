"""Sections 03, 13, 15 and 19: runs that are killed, interrupted or hurt at every stage, and end as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_image, snapshot
from killing import Nursery, differences, do, fail, kill

import lct_dino3 as lct

SETTINGS = (
    "--model_id test_vit:depth=1 --no-pretrained --no-freeze_backbone --img_size 32 --batch 8 --workers 0 --gpus 0 --emb_dim 16"
    " --epochs 3 --save_every 2 --save_minutes 1e-6"  # saves after every step
).split()
KILL, TERM, INT, HUP = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP
Main = Callable[..., int]


@pytest.fixture(scope="module")
def straight(nursery: Nursery, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to. Shared: read only."""
    out_dir = tmp_path_factory.mktemp("straight") / "run"
    code, text = nursery.run("--data_root", data, "--out_dir", out_dir, *SETTINGS)
    assert code == 0, text
    return out_dir


@pytest.fixture
def start(nursery: Nursery, data: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Return a function that starts, or starts again, the run in tmp_path/run."""

    def start(*plans: dict[str, Any], flags: tuple = (), **job: Any) -> tuple[int, str]:
        argv = ("--data_root", data, "--out_dir", tmp_path / "run", *SETTINGS, *flags)
        return nursery.run(*argv, plans=plans, **job)

    return start


def assert_ends_like(straight: Path, start: Callable[..., tuple[int, str]], out_dir: Path, *flags: object) -> str:
    code, text = start(flags=flags)
    assert code == 0, text
    assert differences(straight, out_dir) == []
    return text


def events_of(out_dir: Path) -> list[str]:
    return [event["event"] for event in lct.read_events(out_dir)]


# --- killed and interrupted

# Several deaths a run, by what it is doing: the next start dies further on.
DEATHS = {
    "scan": (
        kill("list_images", 1, TERM),
        kill("read_deep_rgb", 20, KILL),
        kill("decode_image", 20, TERM),
        kill("os.pwrite", 15, KILL),  # a square
        kill("build_backbone", 1, INT),
        kill("FileMemory.save", 1, KILL),
        kill("open_store", 1, TERM),
    ),
    "first checkpoint": (
        kill("measure_baseline", 1, TERM),
        kill("save_checkpoint", 1, KILL),
        kill("train_step", 1, KILL),
        kill("SquareStore.get", 150, TERM),
    ),
    "steps": (
        kill("nn.utils.clip_grad_norm_", 3, KILL),  # between gradient and update
        kill("nn.utils.clip_grad_norm_", 3, TERM),
        kill("torch.optim.AdamW.step", 2, KILL, when="after"),  # an update that nobody has noted
        kill("torch.optim.AdamW.step", 2, HUP, when="after"),
    ),
    "validation": (
        kill("train_step", 4, INT, when="after"),  # the last of an epoch
        kill("score_val", 1, KILL),
        kill("compute_metrics", 2, INT),
        kill("score_epoch", 2, TERM),
        kill("save_epoch", 1, KILL),  # between record and checkpoint
    ),
    "writing": (
        kill("os.write", 6, KILL, when="half"),
        kill("torch.serialization._save", 3, KILL, when="after"),
        kill("os.fsync", 12, KILL),
        kill("Path.replace", 5, KILL),
        kill("Path.replace", 5, KILL, when="after"),
        kill("sync_folder", 5, TERM),
    ),
    "end": (
        kill("build_gallery", 1, TERM),
        kill("save_gallery", 1, KILL),
        kill("compute_gallery_metrics", 1, KILL),
        kill("start_report", 1, TERM),
        kill("start_report", 1, KILL, when="after"),
    ),
}
EXIT_CODES = {KILL: -9, TERM: 143, INT: 130, HUP: 143}


@pytest.mark.parametrize("stage", DEATHS)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    stage: str, straight: Path, start: Any, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    for plan in DEATHS[stage]:
        code, text = start(plan)
        assert code == EXIT_CODES[plan["signal"]], (plan, text)
        assert "Traceback" not in text
        if plan["signal"] != KILL and (out_dir / "checkpoint_last.pth").exists():
            assert events_of(out_dir)[-2:] == ["interrupted", "run_end"]
            kept = lct.load_checkpoint(out_dir / "checkpoint_interrupt.pth")
            last = lct.load_checkpoint(out_dir / "checkpoint_last.pth")
            assert lct.progress_of(kept) == lct.progress_of(last)
    assert_ends_like(straight, start, out_dir)


VIT = "--model_id test_vit --batch 16 --epochs 2 --save_every 0"
RECIPES = {
    "lora": f"{VIT} --freeze_backbone --lora_rank 2 --drop_path 0.2 --backbone_lr 0.01 --ema_decay 0.5",
    "layers": f"{VIT} --batch 8 --accumulate_grad_batches 2 --drop_path 0.3 --layer_decay 0.7 --lr_type one_lr",
    "mean of the weights": (
        "--epochs 2 --save_every 0 --ema_decay 0.9 --accumulate_grad_batches 2 --criterion subcenter_arcface --optimizer lamb"
        " --scheduler onecycle --val_batch 5 --max_grad_norm 1"
    ),
    "classifier": (
        "--epochs 4 --save_every 0 --criterion focal --label_smoothing 0.1 --accumulate_grad_batches 3 --ema_decay 0.5 --patience 1"
        " --scheduler onecycle --anneal_strategy linear --optimizer sgd --weight_decay 0.001 --no-save_checkpoints"
    ),
    "last blocks with running statistics": (
        "--model_id test_efficientnet --epochs 2 --save_every 0 --freeze_backbone --unfreeze_blocks 2 --drop_path 0.2 --fc_lr 0.002"
        " --in_channels 1"
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_way_to_train_goes_on_as_if_nothing_had_happened(
    name: str, nursery: Nursery, data: Path, start: Any, tmp_path: Path
) -> None:
    # DEATHS tries checkpoints of each step; here a single one shows that nothing of a recipe's state is lost.
    flags, straight = [*RECIPES[name].split(), "--save_minutes", 0], tmp_path / "straight"
    code, text = nursery.run("--data_root", data, "--out_dir", straight, *SETTINGS, *flags)
    assert code == 0, text
    assert start(kill("train_step", 1, TERM), flags=flags)[0] == 143
    text = assert_ends_like(straight, start, tmp_path / "run", *flags)
    assert re.search(r"resumed after epoch 0 and [123] batches", text)


def test_what_patience_has_ended_says_how_to_go_on(start: Any, tmp_path: Path) -> None:
    flags = (
        "--freeze_backbone --epochs 5 --lr 1e-8 --arc_lr 1e-8 --backbone_lr 1e-8 --drop_path 0.1 --patience 1".split()
    )
    code, text = start(flags=flags)
    assert code == 0 and "without effect beside the other options: --backbone_lr, --drop_path" in text
    assert re.search(r"training ends after epoch \d: no better acc since epoch \d \(--patience 1\)", text)
    assert events_of(tmp_path / "run").count("epoch_end") < 5
    flags = [flag for flag in flags if flag not in ("--drop_path", "0.1")]  # which is not asked for again
    assert "to train on, give a --patience above 1" in start(flags=flags)[1]
    code, text = start(flags=(*flags, "--patience", 0))
    assert code == 0, text
    assert events_of(tmp_path / "run").count("epoch_end") == 5
    assert "to train on, give more --epochs" in start(flags=(*flags, "--patience", 0))[1]


def test_an_interrupt_costs_no_step(start: Any, tmp_path: Path) -> None:
    for number, position in ((INT, (1, 2)), (TERM, (1, 3))):
        code, _ = start(kill("torch.optim.AdamW.step", 6 if number == INT else 1, number), flags=("--save_minutes", 0))
        assert code == EXIT_CODES[number]
        assert lct.progress_of(lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")) == position


def test_interrupted_twice_in_one_epoch_with_other_workers(straight: Path, start: Any, tmp_path: Path) -> None:
    one, two = (("--workers", number, "--save_minutes", 0) for number in (1, 2))
    assert start(kill("train_step", 5, TERM), flags=one)[0] == 143
    assert start(kill("train_step", 2, INT))[0] == 130
    assert start(kill("train_step", 1, KILL), flags=two)[0] == -9
    text = assert_ends_like(straight, start, tmp_path / "run", *one, "--resume")
    assert "resumed after epoch 1 and 3 batches" in text


def test_a_second_ctrl_c_ends_at_once_and_leaves_a_whole_checkpoint(straight: Path, start: Any, tmp_path: Path) -> None:
    """The first asks for a checkpoint, and the second comes while that is written."""
    code, _ = start(
        kill("train_step", 6, INT), kill("torch.serialization._save", 3, INT, times=2), flags=("--save_minutes", 0)
    )
    assert code == 130
    assert "interrupted" not in events_of(tmp_path / "run")
    assert list((tmp_path / "run").glob(".*.tmp"))
    lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")
    assert_ends_like(straight, start, tmp_path / "run")


def test_signals_that_are_repeated_do_not_cost_the_checkpoint(straight: Path, start: Any, tmp_path: Path) -> None:
    """A launcher passes on the Ctrl-C that the terminal has sent; `timeout` sends SIGTERM to the process and to its group."""
    for number, gap, step, position in ((INT, 0.01, 6, (1, 2)), (TERM, 0.6, 1, (1, 3))):
        plan = kill("train_step", step, number, times=3, gap=gap)
        assert start(plan, flags=("--save_minutes", 0))[0] == EXIT_CODES[number]
        assert events_of(tmp_path / "run")[-2:] == ["interrupted", "run_end"]
        assert lct.progress_of(lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")) == position
    assert_ends_like(straight, start, tmp_path / "run")


def test_sigusr1_saves_and_goes_on(straight: Path, start: Any, tmp_path: Path) -> None:
    flags = ("--save_minutes", 0)
    code, text = start(kill("train_step", 6, signal.SIGUSR1), kill("train_step", 7, KILL), flags=flags)
    assert code == -9 and "saved on SIGUSR1: epoch 1 and 2 batches" in text
    assert start(kill("list_images", 1, signal.SIGUSR1), kill("score_val", 1, KILL))[0] == -9
    assert_ends_like(straight, start, tmp_path / "run")


def test_without_save_minutes_the_state_is_saved_when_an_epoch_ends(start: Any, tmp_path: Path) -> None:
    assert start(kill("train_step", 7, KILL), flags=("--save_minutes", 0))[0] == -9
    assert lct.progress_of(lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")) == (1, 0)
    assert start(kill("score_val", 1, KILL), flags=("--save_minutes", 0))[0] == -9
    assert lct.progress_of(lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")) == (1, 4), "before validation"


def test_an_interrupted_scan_keeps_what_it_has_learned(
    data: Path, start: Any, nursery: Nursery, tmp_path: Path
) -> None:
    assert start(kill("read_deep_rgb", 40, TERM))[0] == 143
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"memory.sqlite", ".lock", ".lock_holder"}
    assert start(kill("read_deep_rgb", 20, KILL), kill("build_backbone", 1, TERM))[0] == 143, "fewer than 20 were left"
    assert start(kill("read_deep_rgb", 1, KILL))[0] == 0, "and none after that"
    argv = ("scan", "--data_root", data, "--out_dir", tmp_path / "scan")
    assert nursery.run(*argv, plans=[kill("read_deep_rgb", 40, INT)])[0] == 130
    assert nursery.run(*argv, plans=[kill("read_deep_rgb", 20, KILL)])[0] == 0


def test_a_swallowed_interrupt_is_honoured_all_the_same(start: Any, tmp_path: Path) -> None:
    """Python drops exceptions that are raised in destructors and callbacks."""
    assert start(kill("SquareStore.get", 130, TERM, when="swallowed"), flags=("--save_minutes", 0))[0] == 143
    assert lct.progress_of(lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth"))[0] == 1


# --- damaged archives


def test_no_flipped_bit_and_no_cut_changes_what_is_loaded(tmp_path: Path) -> None:
    """What decides about content is covered by checksums; padding and dates of the archive may change unnoticed."""
    path, array = tmp_path / "small.npz", np.arange(3, dtype=np.int8)
    np.savez(path, a=array)
    whole, passed = path.read_bytes(), 0
    lct.check_zip(path)
    for position in range(len(whole) * 8):
        hurt = bytearray(whole)
        hurt[position // 8] ^= 1 << position % 8
        path.write_bytes(hurt)
        try:
            lct.check_zip(path)
        except zipfile.BadZipFile:
            continue
        passed += 1
        with np.load(path) as content:
            assert np.array_equal(content["a"], array), f"bit {position}"
    assert passed < len(whole) * 4
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(zipfile.BadZipFile):
            lct.check_zip(path)


def test_a_flipped_method_of_compression_is_damage(tmp_path: Path) -> None:
    path, name = tmp_path / "small.npz", b"a.npy"
    np.savez_compressed(path, a=np.arange(3))
    hurt = bytearray(path.read_bytes())
    for header, field in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        start = hurt.index(header)
        assert name in hurt[start : start + 80] and hurt[start + field] == zipfile.ZIP_DEFLATED
        hurt[start + field] = zipfile.ZIP_BZIP2
    path.write_bytes(hurt)
    with pytest.raises(zipfile.BadZipFile, match="Invalid data stream"):
        lct.check_zip(path)


def test_a_sound_checkpoint_that_finds_no_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lct.write_checkpoint(tmp_path / "large.pth", {"weights": torch.zeros(9)})
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))  # fails as it would
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        lct.load_checkpoint(tmp_path / "large.pth", {"weights": torch.Tensor})


def test_an_interruption_without_room_for_its_copy_stays_an_interruption(tmp_path: Path) -> None:
    lct.write_checkpoint(tmp_path / "checkpoint_last.pth", {"epoch": 1})
    (tmp_path / f".checkpoint_interrupt.pth.{os.getpid()}.tmp").mkdir()  # where the copy would be written
    with pytest.raises(lct.Interrupted), lct.keep_interrupted(tmp_path):
        raise lct.Interrupted(INT)


def test_an_event_without_its_epoch_does_not_hide_the_others(tmp_path: Path) -> None:
    events = [{"event": "epoch_end"}, {"event": "epoch_end", "epoch": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    with pytest.raises(lct.UserError, match="2 epochs trained, and no checkpoint is left"):
        lct.find_resume_point(tmp_path, None, overwrite=False)


def test_flipped_bits_of_a_real_checkpoint_and_of_prototypes_change_nothing_that_is_loaded(
    straight: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)

    def words(loaded: object) -> list[object]:
        leaves = torch.utils._pytree.tree_leaves(vars(loaded[0]) if isinstance(loaded, tuple) else loaded)
        arrays = (np.asarray(leaf) if isinstance(leaf, torch.Tensor | np.ndarray) else leaf for leaf in leaves)
        return [leaf.tobytes() if isinstance(leaf, np.ndarray) else repr(leaf) for leaf in arrays]

    for name, load in (("checkpoint_last.pth", lct.load_checkpoint), ("prototypes.npz", lct.load_gallery)):
        whole, refused = (straight / name).read_bytes(), 0
        expected = words(load(straight / name))
        for position in rng.integers(0, len(whole), 80).tolist():
            hurt = bytearray(whole)
            hurt[position] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(hurt)
            try:
                assert words(load(tmp_path / name)) == expected
            except lct.UserError:
                refused += 1
        assert refused > 60
        for start in rng.integers(0, len(whole) - 4096, 20).tolist() if len(whole) > 4096 else ():
            (tmp_path / name).write_bytes(whole[:start] + bytes(4096) + whole[start + 4096 :])
            with pytest.raises(lct.UserError, match="cannot be read as"):
                load(tmp_path / name)


def test_a_gallery_comes_back_as_it_was_written(straight: Path) -> None:
    gallery, meta = lct.load_gallery(straight / "prototypes.npz")
    with np.load(straight / "prototypes.npz") as file:
        for name in ("centroids", "stacks", "stack_labels", "thresholds"):
            assert np.array_equal(getattr(gallery, name), file[name])
        assert gallery.matcher == str(file["matcher"]) and list(gallery.class_names) == file["id2cls"].tolist()
    assert meta["img_size"] == 32 and gallery.temperature == meta["temperature"]
    assert gallery.scores(gallery.stacks).shape == (len(gallery.stacks), 3)


def test_a_foreign_or_hostile_gallery_is_refused_and_never_executed(tmp_path: Path, straight: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "owned",))

    array = np.array([Hostile()], dtype=object)
    np.savez(tmp_path / "hostile.npz", centroids=array, meta=array)
    np.savez(tmp_path / "other.npz", meta=np.array(json.dumps({"format": 1})))
    shutil.copy(straight / "checkpoint_last.pth", tmp_path / "checkpoint.npz")
    for name in ("hostile", "other", "checkpoint", "missing"):
        with pytest.raises(lct.UserError, match=f"{name}.npz"):
            lct.load_gallery(tmp_path / f"{name}.npz")
    assert not (tmp_path / "owned").exists()


# --- damaged and foreign checkpoints


def hurt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def interrupted_once(nursery: Nursery, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run interrupted in its third epoch. Shared: read only."""
    out_dir = tmp_path_factory.mktemp("interrupted") / "run"
    argv = ("--data_root", data, "--out_dir", out_dir, *SETTINGS)
    code, text = nursery.run(*argv, plans=[kill("train_step", 11, TERM)])
    assert code == 143, text
    return out_dir


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(interrupted_once, tmp_path / "run")


@pytest.mark.parametrize(
    "names, position",
    [
        (("last",), "epoch 2 and 3 batches of 3 epochs, from checkpoint_interrupt.pth"),
        (("last", "interrupt"), "epoch 2 of 3 epochs, from checkpoint_"),
        (("last", "interrupt", "ep002"), "from checkpoint_best.pth"),
    ],
)
def test_the_newest_sound_checkpoint_is_used_and_the_damaged_are_set_aside(
    names: tuple, position: str, interrupted: Path, straight: Path, start: Any
) -> None:
    for name in names:
        hurt(interrupted / f"checkpoint_{name}.pth")
    code, text = start()
    # A damaged checkpoint of an epoch is not written again when an older best one is of that epoch too.
    gone = {key for key in differences(straight, interrupted) if key != "files" and not key.startswith("ep002/")}
    assert code == 0 and not gone, text
    assert "ep002" in names or differences(straight, interrupted) == []
    assert position in text
    for name in names:
        assert len(list(interrupted.glob(f"checkpoint_{name}.pth.damaged-*"))) == 1
        assert f"checkpoint_{name}.pth cannot be read as a checkpoint: is damaged" in text


def test_an_interrupt_before_the_damaged_is_set_aside_does_not_spread_it(
    interrupted: Path, straight: Path, start: Any
) -> None:
    hurt(interrupted / "checkpoint_last.pth")
    assert start(kill("write_json", 1, TERM))[0] == 143
    text = assert_ends_like(straight, start, interrupted)
    assert "epoch 2 and 3 batches of 3 epochs, from checkpoint_interrupt.pth" in text


def test_a_damaged_best_checkpoint_is_found_again_among_the_others(
    straight: Path, start: Any, tmp_path: Path, nursery: Nursery
) -> None:
    """The best epoch is among the kept ones; else the run goes on, and says that it has lost it."""
    flags = ("--save_every", 1)
    assert start(kill("train_step", 11, TERM), flags=flags)[0] == 143
    hurt(tmp_path / "run" / "checkpoint_best.pth")
    code, text = start(flags=flags)
    assert code == 0 and "checkpoint_best.pth cannot be read" in text
    assert not [
        name for name in differences(straight, tmp_path / "run") if not name.startswith("ep") and name != "files"
    ]


def test_when_no_checkpoint_is_sound_the_run_stops_and_touches_nothing(interrupted: Path, start: Any) -> None:
    for path in interrupted.glob("checkpoint_*.pth"):
        hurt(path)
    before = snapshot(interrupted)
    for flags in ((), ("--resume",)):
        code, text = start(flags=flags)
        assert code == 2 and "no checkpoint is sound" in text and "checkpoint_last.pth" in text
        assert str(interrupted) in text and "--overwrite" in text
    assert snapshot(interrupted) == before
    for path in interrupted.glob("checkpoint_*.pth"):
        path.unlink()
    code, text = start()
    assert code == 2 and "2 epochs trained, and no checkpoint is left" in text


def test_a_hostile_checkpoint_in_the_folder_is_refused_and_never_executed(
    start: Any, interrupted: Path, straight: Path, tmp_path: Path
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "owned",))

    payload = {"format": lct.CHECKPOINT_FORMAT, "model": Hostile()}
    torch.save(payload, interrupted / "checkpoint_last.pth")
    text = assert_ends_like(straight, start, interrupted)
    assert "checkpoint_last.pth cannot be read as a checkpoint" in text and not (tmp_path / "owned").exists()


def test_a_named_checkpoint_that_is_damaged_is_refused_and_left(interrupted: Path, start: Any) -> None:
    hurt(interrupted / "checkpoint_ep002.pth")
    before = snapshot(interrupted)
    code, text = start(flags=("--resume", interrupted / "checkpoint_ep002.pth"))
    assert code == 2 and "checkpoint_ep002.pth" in text and snapshot(interrupted) == before


# --- flags at resume


def test_flags_that_do_not_change_the_result_are_accepted_and_named(
    interrupted: Path, straight: Path, start: Any
) -> None:
    flags = ("--workers", 1, "--save_minutes", 7, "--debug", "--max_refs_per_class", 100)
    text = assert_ends_like(straight, start, interrupted, *flags)
    for said in (
        "--workers was 0 at the last start and is 1 now",
        "--save_minutes was 1e-06",
        "--max_refs_per_class was None",
    ):
        assert said in text
    assert "--debug was" not in text


@pytest.mark.parametrize(
    "flags, named", [(("--seed", 7), "seed: 42 -> 7"), (("--deterministic",), "deterministic: False -> True")]
)
def test_flags_that_change_the_result_are_refused(interrupted: Path, start: Any, flags: tuple, named: str) -> None:
    before = snapshot(interrupted)
    code, text = start(flags=flags)
    assert code == 2 and named in text and snapshot(interrupted) == before


def test_more_epochs_go_on_with_the_learning_rate_of_the_longer_schedule(interrupted: Path, start: Any) -> None:
    code, text = start(flags=("--epochs", 5))
    assert code == 0 and "--epochs was 3 at the last start and is 5 now" in text
    rates = [event["lr"] for event in lct.read_events(interrupted) if event["event"] == "epoch_end"]
    steps = len(lct.batch_borders(30, 8)) - 1
    expected = [
        1e-3 * lct.lr_factor(lct.Config(), steps * epoch - 1, steps * (3 if epoch < 3 else 5)) for epoch in range(1, 6)
    ]
    assert rates == pytest.approx(expected)


def test_images_that_have_changed_since_are_named(interrupted: Path, start: Any, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "data")
    shutil.copy(other / "wrench" / "0000.png", other / "wrench" / "0001.png")
    code, text = start(flags=("--data_root", other))
    assert code == 0 and "the images are not those of the last start" in text


def test_deterministic_is_recorded_and_changes_nothing_on_the_cpu(start: Any, straight: Path, tmp_path: Path) -> None:
    assert start(flags=("--deterministic",))[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert config["options"]["deterministic"] is True and "deterministic" in config["device"]
    assert {name.split("/")[-1] for name in differences(straight, tmp_path / "run")} <= {
        "deterministic",
        "prototypes meta",
    }


# --- logs and lock


def test_half_lines_of_metrics_are_cut_off_and_damaged_ones_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with lct.RunDirectory(path.parent) as run:
        run.event("first", text="a\nb\udc80\u2028")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "half", "va')
    with lct.RunDirectory(path.parent):
        pass
    assert path.read_bytes().startswith(whole) and events_of(path.parent) == ["first", "run_end", "run_end"]
    bad = b"\0" * 30 + b"\n" + b'{"event": NaN}\n' + b"[1]\n" + b"\xff\xfe\n"
    path.write_bytes(bad + path.read_bytes())
    assert events_of(path.parent) == ["first", "run_end", "run_end"]


def test_a_lock_outlives_no_process_and_names_its_holder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(lct.UserError, match=r"--run .*/file/run: cannot be created"):
        lct.lock_directory(tmp_path / "file" / "run", "--run")
    with lct.lock_directory(tmp_path), pytest.raises(lct.UserError, match=f"in use by process {os.getpid()}"):
        lct.refuse_if_in_use(tmp_path)
    child = os.fork()
    if not child:
        lct.lock_directory(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert str(child) in (tmp_path / ".lock_holder").read_text()
    lct.refuse_if_in_use(tmp_path)
    lct.lock_directory(tmp_path).lock.release()


def test_leftovers_in_a_folder_in_use_stay(tmp_path: Path) -> None:
    leftover = tmp_path / ".checkpoint_last.pth.123.tmp"
    leftover.write_bytes(b"of a live process")
    with lct.lock_directory(tmp_path), pytest.raises(lct.UserError, match="in use"):
        lct.RunDirectory(tmp_path)
    assert leftover.exists()
    lct.RunDirectory(tmp_path).close()
    assert not leftover.exists()


# --- full disks and other faults


def test_events_that_cannot_be_written_anew_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(lct.UserError, match="cannot be written"), lct.RunDirectory(tmp_path) as run:
        run.event("epoch_end", epoch=3)
        (tmp_path / f".metrics.jsonl.{os.getpid()}.tmp").mkdir()
        run.forget_epochs_after(1)
    assert events_of(tmp_path) == ["epoch_end", "run_end"]


def test_a_write_that_fails_costs_nothing_that_was_written_before(start: Any, straight: Path, tmp_path: Path) -> None:
    """Several in one run: the next start fails further on."""
    for at, nth, reason in (
        ("os.fsync", 30, errno.EIO),
        ("torch.serialization._save", 4, errno.ENOSPC),
        ("Path.replace", 7, errno.EROFS),
        ("os.write", 8, errno.EDQUOT),
    ):
        code, text = start(fail(at, nth, errno=reason))
        assert code == 2, (at, text)
        assert os.strerror(reason) in text and f"{tmp_path}/run/" in text and " bytes" in text
        assert "Traceback" not in text
        assert all(json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines())
        lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")
    assert_ends_like(straight, start, tmp_path / "run")


def test_a_file_that_may_not_grow_further_is_named_with_its_bytes(start: Any, straight: Path, tmp_path: Path) -> None:
    """A limit of the system, not a patched call: torch reports it as `RuntimeError: unexpected pos`."""
    assert start(kill("train_step", 6, KILL))[0] == -9
    last = tmp_path / "run" / "checkpoint_last.pth"
    before, limit = last.read_bytes(), 1_000_000
    assert len(before) > limit
    code, text = start(file_limit=limit)
    assert code == 2 and os.strerror(errno.EFBIG) in text and str(last) in text and "bytes" in text
    assert "Traceback" not in text and last.read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert_ends_like(straight, start, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 32 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", folder], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(start: Any, straight: Path, small_disk: Path) -> None:
    """First no checkpoint has room, and at the next start no line of the log."""
    fill = f"head -c 100m /dev/zero > {small_disk}/filler; truncate -s -{{}} {small_disk}/filler; true"
    flags = ("--out_dir", small_disk / "run")
    for at, nth, room in (("save_checkpoint", 5, "100k"), ("score_val", 2, "0")):
        code, text = start(do(at, nth, shell=fill.format(room)), flags=flags)
        assert code == 2 and os.strerror(errno.ENOSPC) in text and f"{small_disk}/run/" in text, text
        assert "bytes are free there" in text and "Traceback" not in text
        assert all(json.loads(line) for line in (small_disk / "run" / "metrics.jsonl").read_bytes().splitlines())
        lct.load_checkpoint(small_disk / "run" / "checkpoint_last.pth")
        code, text = start(flags=flags)
        assert code == 2 and os.strerror(errno.ENOSPC) in text, "still full"
        (small_disk / "filler").unlink()
    code, text = start(flags=flags)
    assert code == 0, text
    assert differences(straight, small_disk / "run") == []


def test_a_read_only_file_system(start: Any, straight: Path, small_disk: Path) -> None:
    flags = ("--out_dir", small_disk / "run")
    remount = f"mount -o remount,{{}} {small_disk}"
    assert start(kill("score_val", 2, KILL), flags=flags)[0] == -9
    subprocess.run(remount.format("ro"), shell=True, check=True)
    code, text = start(flags=flags)
    assert code == 2 and "written" in text and str(small_disk) in text and "Traceback" not in text
    subprocess.run(remount.format("rw"), shell=True, check=True)
    assert start(flags=flags)[0] == 0
    assert differences(straight, small_disk / "run") == []


def test_a_folder_that_is_deleted_during_the_run(start: Any, tmp_path: Path) -> None:
    code, text = start(do("score_val", 2, shell=f"rm -r {tmp_path / 'run'}"))
    assert code == 2 and "cannot be written" in text and str(tmp_path / "run") in text and "Traceback" not in text


def test_a_loader_worker_that_lives_and_delivers_nothing_is_replaced(
    start: Any, straight: Path, tmp_path: Path
) -> None:
    code, text = start(
        do("train_step", 2, worker_signal=signal.SIGSTOP), flags=("--workers", 1), constants={"LOADER_SECONDS": 1}
    )
    assert code == 0 and "(no batch came for 1 s); the loader is started again" in text, text[-3000:]
    assert differences(straight, tmp_path / "run") == []


def test_a_loader_worker_killed_amid_the_batches_of_one_step(start: Any, tmp_path: Path) -> None:
    """Its first batch is taken, and is not taken again. The workers have been asked for six of the eight batches by then."""
    steps = ("--batch", 4, "--accumulate_grad_batches", 8, "--workers", 2, "--epochs", 2)
    assert start(flags=steps)[0] == 0
    (tmp_path / "run").rename(tmp_path / "calm")
    code, text = start(do("gather_batch", 2, worker_signal=KILL), flags=steps)
    assert code == 0 and "the loader is started again" in text
    assert differences(tmp_path / "calm", tmp_path / "run") == []


def test_a_loader_worker_killed_while_images_are_embedded(start: Any, straight: Path, tmp_path: Path) -> None:
    """One worker has made two batches by then; the others have to be made by another one."""
    code, text = start(do("gather_answers", 1, worker_signal=KILL), flags=("--workers", 1))
    assert code == 0 and "the loader is started again" in text, text[-3000:]
    assert differences(straight, tmp_path / "run") == []


def test_workers_that_are_killed_again_and_again_stop_the_run_with_its_checkpoint(
    start: Any, straight: Path, tmp_path: Path
) -> None:
    """Before the first batch of each loader: a worker that reads nothing."""
    flags = ("--workers", 1)
    code, text = start(
        fail("iter", 4, on=True, error="RuntimeError", text="DataLoader worker (pid 7) is killed by signal: Killed."),
        flags=flags,
    )
    assert code == 2 and "was killed" in text and "--workers 1" in text and "Traceback" not in text
    assert text.count("the loader is started again") == lct.LOADER_RESTARTS
    lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")
    assert_ends_like(straight, start, tmp_path / "run", *flags)


def test_out_of_memory_names_what_to_lower(start: Any, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error, said in (("MemoryError", ""), ("RuntimeError", str(real.value))):
        code, text = start(fail("train_step", 4, error=error, text=said))
        assert code == 2 and "--batch 8 --img_size 32 --precision auto" in text and "Traceback" not in text
    assert_ends_like(straight, start, tmp_path / "run")


GPU_FAILURES = [
    (
        torch.OutOfMemoryError,
        "CUDA out of memory. Tried to allocate 20.00 GiB.",
        "--batch 64 --img_size 224 --precision auto",
    ),
    (
        torch.AcceleratorError,
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: out of memory",
    ),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "lower --batch"),
    (RuntimeError, "NCCL error: unhandled cuda error, ... Cuda failure 2 'out of memory'", "lower --batch"),
    (RuntimeError, "unable to mmap 86708771 bytes from file </a.pth>: Cannot allocate memory (12)", "lower --batch"),
    (
        RuntimeError,
        "NCCL error: Error while creating shared memory segment /dev/shm/nccl-1 (size 9637888)",
        "--shm-size",
    ),
    (RuntimeError, "unable to write to file </torch_12_3>: No space left on device (28)", "--shm-size"),
    (
        RuntimeError,
        "ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
        "one process a GPU",
    ),
    (
        RuntimeError,
        "[../gloo/transport/tcp/pair.cc:545] Read error [::1]:1: Connection reset by peer",
        "Connection reset by peer",
    ),
    (
        torch.distributed.DistBackendError,
        "ncclRemoteError: remote process exited or there was a network error",
        "has ended",
    ),
    (torch.AcceleratorError, "CUDA error: device-side assert triggered", None),
    (RuntimeError, "NCCL error: internal error - please report this issue to the NCCL developers", None),
    (RuntimeError, "shape mismatch", None),
]


@pytest.mark.parametrize(("kind", "text", "expected"), GPU_FAILURES, ids=[text[:40] for _, text, _ in GPU_FAILURES])
def test_a_failure_on_a_gpu_is_told_by_its_cause(
    kind: type[RuntimeError], text: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not known is a bug, whose traceback says more: never that another process has ended."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(lct, "get_rank", lambda: 1)
    error = kind.__new__(kind, text)
    error.args = (text,)
    explained = lct.explain_failure(error, lct.Config())
    assert (explained is None) == (expected is None)
    assert expected is None or expected in str(explained)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (lct.Config(), "lower --batch or --img_size, or give --precision bf16, and start afresh with --overwrite; "),
        (lct.Config(precision="bf16"), "lower --batch or --img_size, and start afresh with --overwrite; "),
        (lct.EvaluateOptions(precision="bf16"), "lower --batch; "),
    ],
)
def test_remedies_against_want_of_memory_are_those_that_there_are(options: lct.Options, remedy: str) -> None:
    explained = lct.explain_failure(MemoryError(), options)
    assert explained.what == "out of memory" and explained.remedy.startswith(remedy)


def test_a_disk_that_is_read_only_is_not_full(tmp_path: Path) -> None:
    remedies = [
        lct.explain_failure(OSError(number, "", str(tmp_path / "a")), lct.Config()).remedy
        for number in (errno.EROFS, errno.ENOSPC)
    ]
    assert remedies == ["make it writable", "make room, or give a lower --cache_crops"]


def test_what_keeps_nothing_starts_again_after_an_interrupt() -> None:
    def tell(options: lct.Options) -> str:
        return lct.explain_end(lct.Interrupted(signal.SIGINT), options)[1]

    assert tell(lct.EvaluateOptions(command="evaluate")).endswith("; the same command starts again")
    assert tell(lct.PrototypesOptions(command="prototypes")).endswith("; the same command starts again")
    again = tell(lct.Config(overwrite=True, resume="run/checkpoint_ep001.pth"))
    assert again.endswith("; the same command without --overwrite without --resume continues where it stopped")
    assert tell(lct.Config(resume="last")).endswith("; the same command continues where it stopped")


def test_a_stop_while_losses_are_fetched_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the train figures of an epoch lack steps, or a short epoch has none at all."""
    tally = lct.Tally()
    for step in range(3):
        tally.add(torch.tensor(float(step)), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    stack, handlers = torch.stack, {number: signal.getsignal(number) for number in (1, 2, 10, 15, 17)}

    def interrupted_stack(tensors: Any, *rest: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return stack(tensors, *rest)

    monkeypatch.setattr(torch, "stack", interrupted_stack)
    lct.SIGNALS.catch()
    try:
        with pytest.raises(lct.Interrupted):
            lct.check_finite(None, SimpleNamespace(tally=tally))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        lct.SIGNALS.__init__()
    assert tally.totals()["losses"].tolist() == [0, 1, 2]


def test_files_of_the_same_number_and_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    """Those of --unknown_dir have numbers of their own, and are named with their folder."""
    config = lct.Config(data_root=tmp_path, out_dir=tmp_path / "run")
    paths = np.array(["a/1.png"], dtype=lct.STRINGS)
    records = [
        lct.Records(root, ("a",), paths, *(np.zeros(1, np.int32) for _ in range(3)))
        for root in (tmp_path, tmp_path / "strangers")
    ]
    with lct.RunDirectory(tmp_path / "run") as run:
        job = lct.Job(config, records[0], lct.make_runtime(0, "fp32"), run, None)
        for of_split in records:
            dataclasses.replace(job, records=of_split).note_failures([(0, "is gone")])
    assert job.unreadable == {"a/1.png": "is gone", f"{tmp_path}/strangers/a/1.png": "is gone"}


def test_images_that_break_or_change_during_the_run_cost_themselves(
    data: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """Where no decoded crops are kept."""
    root = shutil.copytree(data, tmp_path / "data")
    table = lct.scan_dataset(lct.Config(data_root=root, out_dir=tmp_path / "none"))
    rows = table.records.rows("train")[:5].tolist()
    paths = [root / table.records.paths[row] for row in rows]
    other = tmp_path / "other.png"
    draw_image(9, 9, side=200).save(other)
    commands = [f"truncate -s 60 '{paths[0]}'", f"rm '{paths[1]}'", f"rm '{paths[2]}'; mkfifo '{paths[2]}'"]
    commands += [f"rm '{paths[3]}'; mkdir '{paths[3]}'", f"cp '{other}' '{paths[4]}'"]
    argv = ("--data_root", root, "--out_dir", tmp_path / "run", *SETTINGS, "--cache_crops", 0)
    code, text = nursery.run(*argv, plans=[do("train_step", 5, shell="; ".join(commands))])
    assert code == 0, text
    assert text.count("cannot be read any more") == 4
    assert lct.read_events(tmp_path / "run")[-1]["status"] == "completed"


def test_neither_a_clock_that_jumps_nor_a_pipe_that_nobody_reads_changes_anything(
    start: Any, straight: Path, tmp_path: Path
) -> None:
    assert start(do("time.time", 4, add=-1e9), do("time.time", 9, add=2e9), deaf=True)[0] == 0
    assert differences(straight, tmp_path / "run") == []


def test_hangups_that_nohup_has_switched_off_stay_off(start: Any, straight: Path, tmp_path: Path) -> None:
    previous = signal.signal(HUP, signal.SIG_IGN)
    try:
        lct.SIGNALS.catch()
        assert signal.getsignal(HUP) is signal.SIG_IGN
    finally:
        signal.signal(HUP, previous)
        for number in (INT, TERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == INT else signal.SIG_DFL)


def test_a_ctrl_c_inside_torchs_writer_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There torch would make an error of its own of it."""
    atomic_file = lct.atomic_file

    class Pressed:
        """A file in whose third write somebody presses Ctrl-C."""

        def __init__(self, file: Any) -> None:
            self.file, self.num_writes = file, 0

        def write(self, data: Any) -> int:
            self.num_writes += 1
            if self.num_writes == 3:
                os.kill(os.getpid(), INT)
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    @contextlib.contextmanager
    def press(path: Path) -> Iterator[Pressed]:
        with atomic_file(path) as file:
            yield Pressed(file)

    monkeypatch.setattr(lct, "atomic_file", press)
    handlers = {number: signal.getsignal(number) for number in (INT, TERM, HUP, signal.SIGUSR1, signal.SIGCHLD)}
    try:
        lct.SIGNALS.catch()
        with pytest.raises(lct.Interrupted):
            lct.write_checkpoint(tmp_path / "one.pth", {"weights": {"a": torch.arange(9.0)}, "step": 4})
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        lct.SIGNALS.asked = None
    assert torch.load(tmp_path / "one.pth", weights_only=True)["step"] == 4, "it is whole"


# --- the order of a write


def test_a_write_reaches_the_disk_before_its_name_and_the_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(number: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{number}").readlink().name))
        fsync(number)

    def note_replace(self: Path, target: Path) -> Path:
        calls.append(("rename", self.name))
        assert self.parent == target.parent and self.stat().st_size == 4, "all of it was handed to the system before"
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    lct.write_bytes(tmp_path / "file", b"data")
    temporary = f".file.{os.getpid()}.tmp"
    assert calls == [("fsync", temporary), ("rename", temporary), ("fsync", tmp_path.name)]
    calls.clear()
    log = lct.LineFile(tmp_path / "log")
    log.append("line\n")
    log.close()
    assert calls == [("fsync", "log")]


def test_what_has_not_reached_the_disk_takes_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_sync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    lct.write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", fail_to_sync)
    with pytest.raises(lct.UserError, match="cannot be written: Input/output error"):
        lct.write_bytes(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("what", ["signal=SIGKILL", "error=ENOSPC"])
def test_system_calls_that_kill_or_fail_leave_the_old_file(what: str, tmp_path: Path) -> None:
    """Injected into the second rename by strace: nothing of ours is patched."""
    code = "import lct_dino3 as lct, sys; [lct.write_bytes(lct.Path(sys.argv[1]), text) for text in (b'old', b'new')]"
    inject = ["-e", "trace=rename", "-e", f"inject=rename:{what}:when=2"]
    fast = ["--seccomp-bpf"] * (what != "signal=SIGKILL")  # with it strace 6.1 loses the signal
    command = ["strace", "-f", *fast, "-o", tmp_path / "trace", *inject, sys.executable, "-c", code]
    done = subprocess.run([*command, tmp_path / "file"], cwd=Path(lct.__file__).parent, capture_output=True, text=True)
    if "PTRACE" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("this machine lets nobody trace")
    assert done.returncode != 0 and (tmp_path / "file").read_bytes() == b"old", done.stderr
    assert ("cannot be written: No space left" in done.stderr) == (what == "error=ENOSPC")


def test_half_a_line_is_taken_back_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = lct.LineFile(tmp_path / "log"), os.write
    log.append("first\n")

    def write_half(number: int, data: memoryview) -> int:
        if len(data) < 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(number, data[: len(data) // 2])

    with monkeypatch.context() as patch, pytest.raises(lct.UserError, match="No space left on device"):
        patch.setattr(os, "write", write_half)
        log.append("second line\n")
    log.append("third\n")
    log.close()
    assert (tmp_path / "log").read_text() == "first\nthird\n"


def test_a_log_that_is_gone_is_told_as_one_that_cannot_be_written(tmp_path: Path) -> None:
    log = lct.LineFile(tmp_path / "log")
    log.close()
    with pytest.raises(lct.UserError, match="log: cannot be written"):
        log.append("line\n")


def test_weights_that_lack_a_tensor_are_refused(straight: Path, interrupted: Path, start: Any) -> None:
    payload = lct.load_checkpoint(interrupted / "checkpoint_last.pth")
    payload["model"].pop("head.norm.running_mean")
    torch.save(payload, interrupted / "checkpoint_last.pth")
    code, text = start()
    assert code == 2 and "head.norm.running_mean" in text and "Traceback" not in text


def test_weights_of_another_shape_are_refused(straight: Path, interrupted: Path, start: Any) -> None:
    payload = lct.load_checkpoint(interrupted / "checkpoint_last.pth")
    payload["model"]["head.norm.running_mean"] = torch.zeros(3)
    torch.save(payload, interrupted / "checkpoint_last.pth")
    code, text = start()
    assert code == 2 and "head.norm.running_mean" in text and "(3,)" in text and "Traceback" not in text
