"""Sections 03, 05, 08, 15: what is known of files, and fitted crops on disk. They change nothing, and cost no run anything."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_dataset, snapshot
from killing import Nursery, differences, kill
from PIL import Image

import lct_dino3 as lct

SIDE = 32
PLAIN, MASKED = 3 * SIDE**2, 4 * SIDE**2  # bytes of a square
FLAGS = ("--model_id", "test_resnet", "--no-pretrained", "--img_size", SIDE, "--gpus", 0, "--batch", 8, "--workers", 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Draw three classes of twelve JPEGs, half of them with a mask."""
    root = make_dataset(tmp_path / "data", {"hammer": 12, "pliers": 12, "wrench": 12}, side=120, suffix=".jpg")
    for path in sorted(root.rglob("*.jpg"))[::2]:
        (path.parent / "masks").mkdir(exist_ok=True)
        mask = np.zeros((120, 120), np.uint8)
        mask[20:100, 30:90] = 255
        Image.fromarray(mask).save(path.parent / "masks" / f"{path.stem}_mask.png")
    return root


class Run:
    """A run up to the point where it trains, in a folder that is locked."""

    def __init__(self, data: Path, **options: object) -> None:
        fixed = {"model_id": "test_resnet", "pretrained": False, "img_size": SIDE, "gpus": 0, "workers": 0, "batch": 8}
        config = lct.Config(data_root=data, out_dir=data.parent / "run", **{**fixed, **options})
        self.squares = lct.SquareFile(config.out_dir, SIDE, lct.square_room(config))
        filled = self.squares if lct.scan_fills_squares(config) else None
        self.scan = lct.attach_masks(lct.scan_dataset(config, squares=filled), config)
        info = lct.BackboneInfo("", "", "", 1, SIDE, "avg", (0.5,) * 3, (0.5,) * 3, "bicubic")
        with lct.RunDirectory(config.out_dir) as run:
            job = lct.Job(config, self.scan.records, lct.training_runtime(config), run, info)
            self.scan.memory.save()
            self.store = lct.open_store(job, self.squares)
        self.job = dataclasses.replace(job, run=None, store=self.store)
        self.records = self.scan.records

    def size(self) -> int:
        """Return the bytes that the squares take on the disk."""
        return 0 if self.squares.file is None else os.fstat(self.squares.file.fileno()).st_size

    def rows(self, split: str, masked: bool | None = None) -> list[int]:
        rows = self.records.rows(split)
        return (rows if masked is None else rows[self.records.has_mask[rows] == masked]).tolist()

    def has(self, masked: bool) -> list[int]:
        """Return the rows whose plain or masked square is there."""
        return [] if self.store is None else np.flatnonzero(self.store.places[int(masked)] >= 0).tolist()


def load(job: lct.Job, dataset: lct.CropDataset, epoch: int) -> tuple[dict[tuple[int, int], np.ndarray], list]:
    """Return the images of an epoch by record and view, and what could not be read."""
    sampler = lct.EpochSampler(job.records.rows("train"), job.records.labels, job.config)
    sampler.start_at(epoch, 0)
    batches = list(lct.make_loader(dataset, sampler, job.config, job.runtime))
    images = {
        (int(row), int(view)): image.numpy()
        for batch in batches
        for row, view, image in zip(batch.rows, batch.views, batch.images, strict=True)
    }
    return images, [failure for batch in batches for failure in batch.failures]


def hide_images(data: Path) -> None:
    for path in data.rglob("*.jpg"):
        path.write_bytes(b"gone")


# --- squares: the same pixels, without decoding


@pytest.mark.parametrize(
    ("options", "workers"),
    [({}, 0), ({"crop_mode": "mask"}, 0), *(({"crop_mode": "mix", "mask_fill": "blur"}, number) for number in (0, 2))],
)
def test_crops_come_from_the_store_and_are_those_of_the_files(data: Path, options: dict, workers: int) -> None:
    job = Run(data, workers=workers, **options).job
    plain, stored = dataclasses.replace(job, store=None).training_crops(), job.training_crops()
    wanted = [load(job, plain, epoch)[0] for epoch in range(2)]
    hide_images(data)
    for epoch in range(2):
        images, failures = load(job, stored, epoch)
        assert failures == [] and len(images) == len(job.records.rows("train"))
        assert images.keys() == wanted[epoch].keys()
        assert all(np.array_equal(images[key], wanted[epoch][key]) for key in images)
    images, failures = load(job, plain, 1)
    assert images == {} and len(failures) == len(wanted[1]), "without a store the images are gone"


def test_evaluation_reads_the_same_squares(data: Path) -> None:
    run = Run(data, crop_mode="mix")
    datasets = [lct.CropDataset(run.records, run.job.transform(False), store=store) for store in (None, run.store)]
    keys = [lct.SampleKey(row, (), view) for row in run.rows("train") for view in (0, 1)]
    wanted = [datasets[0][key][0] for key in keys]
    hide_images(data)
    assert all(np.array_equal(datasets[1][key][0], image) for key, image in zip(keys, wanted, strict=True))


def test_the_scan_s_one_look_at_an_image_is_enough(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], lct.decode_image
    monkeypatch.setattr(lct, "decode_image", lambda *args: decoded.append(1) or decode(*args))
    run = Run(data)
    assert len(decoded) == len(run.records.paths) == 36 and run.has(masked=False) == list(range(36))
    load(run.job, run.job.training_crops(), 0)
    assert len(decoded) == 36
    again = Run(data)
    assert again.has(masked=False) == again.rows("train") and len(decoded) == 36 + len(again.rows("train"))


def test_random_fills_and_crops_on_backgrounds_are_made_anew(data: Path, tmp_path: Path) -> None:
    run = Run(data, crop_mode="mask", mask_fill="random", freeze_backbone=False)
    dataset, row = run.job.training_crops(), run.rows("train", masked=True)[0]
    assert row in run.has(masked=True), "for evaluation, whose fill is gray"
    images = [dataset[lct.SampleKey(row, (word,), 1, augmented=False)][0] for word in (1, 2)]
    assert not np.array_equal(*images) and (images[0][0, 0] != lct.PADDING_GRAY).any()
    make_dataset(tmp_path / "pictures", {"wall": 2})
    config = dataclasses.replace(run.job.config, backgrounds=tmp_path / "pictures", insert_background_p=1.0)
    backgrounds = lct.scan_backgrounds(config, run.scan.memory)
    other = run.rows("train", masked=False)[0]
    assert other in run.has(masked=False)
    dataset = lct.CropDataset(run.records, run.job.transform(True), backgrounds, run.store)
    assert not np.array_equal(*(dataset[lct.SampleKey(other, (word,), 0)][0] for word in (1, 2)))


def test_plain_and_masked_have_squares_of_their_own_and_only_what_is_shown_has_one(data: Path) -> None:
    mixed = Run(data, crop_mode="mix")
    assert mixed.has(masked=False) == list(range(36)) and mixed.has(masked=True) == mixed.rows("train", masked=True)
    assert mixed.store.get(mixed.rows("train", masked=True)[0], True).shape == (SIDE, SIDE, 4)
    masked = Run(data, crop_mode="mask")
    assert masked.has(masked=True) == masked.rows("train", masked=True)
    assert masked.has(masked=False) == masked.rows("train", masked=False)


def test_a_crop_whose_mask_is_lost_is_not_stored_without_it(data: Path, patch_used: Callable) -> None:
    lost, open_store = sorted(data.rglob("*_mask.png"))[3], lct.open_store

    def lose_and_open(*arguments: Any) -> Any:
        lost.unlink()
        return open_store(*arguments)

    patch_used(lct, "open_store", lose_and_open)
    run = Run(data, crop_mode="mask", val_split=0.02, test_split=0.02)
    (row,) = (row for row in run.rows("train", masked=True) if data / run.records.masks[row] == lost)
    assert run.has(masked=True) == [other for other in run.rows("train", masked=True) if other != row]
    image, _, reason = run.job.training_crops()[lct.SampleKey(row, (1,), 1)]
    assert image is not None and "its mask cannot be read any more" in reason


def test_crops_of_others_are_not_taken_for_those_that_are_stored(data: Path) -> None:
    """As of --unknown_dir, which are embedded in the same run."""
    job = Run(data).job
    others = dataclasses.replace(job, records=dataclasses.replace(job.records, root=data.parent / "nowhere"))
    key = lct.SampleKey(int(job.records.rows("train")[0]), (), 0)
    assert job.training_crops()[key][0] is not None
    image, _, reason = others.training_crops()[key]
    assert image is None and "No such file" in reason


def save_square(folder: str, row: str) -> int:
    store = pickle.loads(Path(folder, "store.pkl").read_bytes())
    np.save(Path(folder, "square.npy"), store.get(int(row), False))
    return 0


def test_another_process_of_the_machine_opens_the_same_store(data: Path, tmp_path: Path, nursery: Nursery) -> None:
    run = Run(data)
    row, packed = run.rows("train")[0], pickle.dumps(run.store)
    (tmp_path / "store.pkl").write_bytes(packed)
    code, text = nursery.run(tmp_path, row, function=("test_store", "save_square"))
    assert code == 0, text
    assert np.array_equal(np.load(tmp_path / "square.npy"), run.store.get(row, False))
    dataset = pickle.loads(pickle.dumps(run.job.training_crops()))
    assert np.array_equal(dataset.store.get(row, False), run.store.get(row, False))
    os.utime(run.squares.file.fileno(), ns=(1, 1))
    assert pickle.loads(packed) is None, "another machine's file of that name"
    packed = pickle.dumps(run.store)
    run.squares.file.close()
    dataset = dataclasses.replace(run.job, store=pickle.loads(packed)).training_crops()
    assert dataset.store is None and dataset[lct.SampleKey(row, (1,), 0)][0] is not None


# --- squares: which, how many, for how long


@pytest.mark.parametrize(
    ("options", "plain", "masked"),
    [
        ({}, "all", ""),
        ({"epochs": 1}, "all", ""),
        ({"cache_crops": 0.0}, "", ""),
        ({"train_augmentations": ({"type": "medianblur"},)}, "all", ""),
        ({"train_augmentations": (), "val_augmentations": ()}, "", ""),
        ({"pre_transforms": ({"type": "medianblur"},)}, "", ""),
        ({"post_transforms": ({"type": "medianblur"},)}, "all", ""),
        ({"crop_mode": "mix"}, "all", "train"),
        ({"crop_mode": "mix", "epochs": 1}, "all", ""),
        ({"crop_mode": "mix", "mask_fill": "random"}, "all", ""),
        ({"crop_mode": "mask", "freeze_backbone": False, "mask_fill": "random"}, "train val", "train val"),
        ({"data_fraction": 0.5}, "train", ""),
    ],
)
def test_the_store_has_what_is_read_again_and_what_the_scan_has_at_hand(
    data: Path, options: dict, plain: str, masked: str
) -> None:
    run = Run(data, **options)
    everything = list(range(len(run.records.paths)))
    for is_masked, splits in ((False, plain), (True, masked)):
        kind = is_masked if run.job.config.crop_mode == "mask" or is_masked else None
        wanted = sorted(row for split in splits.split() if split != "all" for row in run.rows(split, kind))
        assert run.has(is_masked) == (everything if splits == "all" else wanted)
    assert bool(run.size()) == bool(plain or masked)


@pytest.mark.parametrize("limit", ["option", "disk"])
def test_it_takes_no_more_than_it_may_and_training_images_first(
    data: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 5 * PLAIN + 1
    if limit == "disk":
        usage = shutil.disk_usage(data)._replace(free=4 * room)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    run = Run(data, **({"cache_crops": room / 1e9} if limit == "option" else {}))
    assert run.has(masked=False) == run.rows("train")[:5] and run.size() == 5 * PLAIN
    images = load(run.job, run.job.training_crops(), 0)[0]
    expected = load(run.job, dataclasses.replace(run.job, store=None).training_crops(), 0)[0]
    assert all(np.array_equal(images[key], expected[key]) for key in expected)


def test_a_disk_without_room_is_named_and_costs_the_store_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(data)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert Run(data).store is None
    assert "no room to keep decoded crops" in (data.parent / "run/train.log").read_text(encoding="utf-8")
    full = OSError(28, "No space left on device", "checkpoint_last.pth")
    for size, is_named in ((8.0, True), (0.0, False)):
        explained = lct.explain_failure(full, lct.Config(cache_crops=size))
        assert ("--cache_crops" in str(explained)) == is_named and "make room" in str(explained)


@pytest.mark.parametrize("at", ["os.pwrite", "os.fsync"])
def test_a_disk_that_fills_up_gets_its_room_back(data: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], getattr(os, at[3:])

    def fail(file: int, *rest: object) -> Any:
        calls.append(1)
        has_no_name = str(Path(f"/proc/self/fd/{file}").readlink()).endswith(" (deleted)")
        if has_no_name and len(calls) > 7 * (at == "os.pwrite"):
            raise OSError(28, "No space left on device")
        return real(file, *rest)

    monkeypatch.setattr(os, at[3:], fail)
    run = Run(data)
    assert run.store is None and os.fstat(run.squares.file.fileno()).st_blocks * 512 <= 16384, "one late square at most"
    assert "No space left on device" in (data.parent / "run/train.log").read_text(encoding="utf-8")
    assert len(load(run.job, run.job.training_crops(), 0)[0]) == len(run.rows("train"))


def test_a_square_that_is_written_in_part_is_not_kept(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the last one is before a disk is full."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, square, place: pwrite(file, square.tobytes()[:-1], place))
    assert Run(data).store is None
    assert "No space left on device" in (data.parent / "run/train.log").read_text(encoding="utf-8")


# --- squares in whole runs


def test_a_fine_tuned_run_with_masks_is_the_same_without_it(data: Path, tmp_path: Path, call_main: Callable) -> None:
    make_dataset(tmp_path / "unknown", {"mug": 8}, seed=5)
    flags = (*FLAGS, "--epochs", 3, "--no-freeze_backbone", "--crop_mode", "mix", "--no-preview")
    flags += ("--unknown_dir", tmp_path / "unknown")
    sizes = {"with": 8, "without": 0}
    for name, size in sizes.items():
        assert call_main("--data_root", data, "--out_dir", tmp_path / name, *flags, "--cache_crops", size) == 0
    assert differences(tmp_path / "with", tmp_path / "without") == []
    logs = [(tmp_path / name / "train.log").read_text(encoding="utf-8") for name in sizes]
    assert ["decoded crops are kept" in log for log in logs] == [True, False]
    weights = torch.load(tmp_path / "with/checkpoint_last.pth", weights_only=True)["model"]
    assert any(key.startswith("backbone.") for key in weights)


def test_refused_data_leave_nothing_behind(data: Path, tmp_path: Path, call_main: Callable, capsys: Any) -> None:
    argv = ("--data_root", data, *FLAGS, "--min_per_class", 30)
    assert call_main(*argv, "--out_dir", tmp_path / "a/b/run") == 2
    assert "fewer than 30" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert call_main("scan", "--data_root", data, "--out_dir", tmp_path / "scanned") == 0
    before = snapshot(tmp_path / "scanned")
    shutil.copy(data / "hammer/0000.jpg", data / "hammer/new.jpg")
    assert call_main(*argv, "--out_dir", tmp_path / "scanned") == 2
    after = snapshot(tmp_path / "scanned")
    assert before.keys() == after.keys()


def test_a_run_that_is_killed_at_once_can_be_started_again(data: Path, tmp_path: Path, nursery: Nursery) -> None:
    argv = ("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS, "--epochs", 1)
    for place in ("list_images", "os.pwrite"):
        assert nursery.run(*argv, plans=[kill(place, 1)])[0] == -9
    code, text = nursery.run(*argv)
    assert code == 0, text


def test_a_finished_run_that_is_started_again_decodes_nothing(data: Path, tmp_path: Path, nursery: Nursery) -> None:
    argv = ("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS, "--epochs", 1)
    assert nursery.run(*argv)[0] == 0
    code, text = nursery.run(*argv, plans=[kill("decode_image", 1)])
    assert code == 0 and "is finished" in text


# --- the memory of files


def remember(memory: lct.FileMemory, kind: str, rows: Iterable[tuple[str, int, int, bytes]]) -> None:
    for path, size, mtime_ns, value in rows:
        memory.learn(kind, path, (size, mtime_ns), value)
    memory.save()


def test_what_is_remembered_is_recalled_by_kind_and_the_newest_counts(tmp_path: Path) -> None:
    memory = lct.FileMemory(tmp_path)
    assert memory.recall("image") == {}
    rows = [("a/1.png", 5, 2**62, b"\0one"), ("ключ/ё'\"?#.png", 0, -7, b"")]
    remember(memory, "image", rows)
    remember(memory, "mask", [("a/1.png", 6, 8, b"two")])
    remember(memory, "image", [("a/1.png", 7, 9, b"three")])
    assert lct.FileMemory(tmp_path).recall("image") == {"a/1.png": (7, 9, b"three"), "ключ/ё'\"?#.png": (0, -7, b"")}
    assert memory.recall("mask") == {"a/1.png": (6, 8, b"two")}
    assert [path.name for path in tmp_path.iterdir()] == [lct.MEMORY_NAME]


def test_what_is_learned_is_there_once_it_is_saved(tmp_path: Path) -> None:
    memory = lct.FileMemory(tmp_path / "new")
    memory.learn("image", "a", (1, 2), b"x")
    assert memory.recall("image") == {}
    with lct.lock_directory(tmp_path):
        memory.save_early()
    assert memory.recall("image") == {"a": (1, 2, b"x")}
    memory.learn("image", "b", (1, 2), b"y")
    with lct.lock_directory(tmp_path / "new"):
        memory.save_early()
        assert set(memory.recall("image")) == {"a"}, "another process works there"
    memory.save_early()
    assert set(memory.recall("image")) == {"a", "b"}
    lct.refuse_if_in_use(tmp_path / "new")


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "zeros", "other table", "other columns"])
def test_a_damaged_or_foreign_table_is_begun_anew(tmp_path: Path, damage: str) -> None:
    memory = lct.FileMemory(tmp_path)
    remember(memory, "image", [(f"a/{index:05}.png", index, index, os.urandom(200)) for index in range(2000)])
    path = tmp_path / lct.MEMORY_NAME
    whole = path.read_bytes()
    if damage.startswith("other"):
        path.unlink()
        with sqlite3.connect(path) as table:
            table.execute(f"CREATE TABLE {'others' if damage == 'other table' else 'files'} (name TEXT)")
        table.close()
    else:
        zeros = whole[:8192] + bytes(4096 * 20) + whole[4096 * 22 :]
        path.write_bytes(
            {"text": b"hello" * 999, "empty": b"", "truncated": whole[: len(whole) // 2]}.get(damage, zeros)
        )
    for reader in (memory, lct.FileMemory(tmp_path)):
        assert reader.recall("image") == {}
        remember(reader, "image", [("a", 1, 2, b"new")])
        assert reader.recall("image") == {"a": (1, 2, b"new")}
        path.write_bytes(b"hello" * 999)


def test_a_flipped_bit_of_a_value_is_noticed(tmp_path: Path) -> None:
    remember(lct.FileMemory(tmp_path), "image", [("a", 1, 2, b"first value"), ("b", 1, 2, b"second value")])
    path = tmp_path / lct.MEMORY_NAME
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"first value", b"firsu value"))
    assert lct.FileMemory(tmp_path).recall("image") == {"b": (1, 2, b"second value")}


def test_a_table_that_cannot_be_written_is_said_so_and_kept(tmp_path: Path, nursery: Nursery) -> None:
    remember(lct.FileMemory(tmp_path), "image", [("a", 1, 2, b"x")])
    with pytest.raises(lct.UserError, match=r"memory\.sqlite.*cannot be written"):
        remember(lct.FileMemory(tmp_path / "nowhere"), "image", [("a", 1, 2, b"x")])
    data = make_dataset(tmp_path / "data", {"a": 5, "b": 5})
    argv = ("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS, "--epochs", 1, "--cache_crops", 0)
    code, text = nursery.run(*argv, file_limit=4096)
    assert code == 2 and "memory.sqlite" in text and "Traceback" not in text
    (tmp_path / lct.MEMORY_NAME).chmod(0o444)
    assert lct.FileMemory(tmp_path).recall("image") == {"a": (1, 2, b"x")}


def test_what_a_killed_process_has_begun_to_write_is_taken_back(tmp_path: Path) -> None:
    memory = lct.FileMemory(tmp_path)
    remember(memory, "image", [("a", 1, 2, b"x")])
    child = os.fork()
    if not child:
        table = sqlite3.connect(memory.path, isolation_level=None)
        table.execute("PRAGMA cache_size = 10")
        table.execute("BEGIN")
        for index in range(5000):  # more than stays in memory
            table.execute("REPLACE INTO files VALUES ('image', ?, 1, 2, zeroblob(500), 0)", (f"{index}",))
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / f"{lct.MEMORY_NAME}-journal").stat().st_size > 0, "or nothing is tested"
    assert memory.recall("image") == {"a": (1, 2, b"x")}


def test_a_hundred_thousand_files_are_recalled_in_a_moment(tmp_path: Path) -> None:
    memory, value = lct.FileMemory(tmp_path), bytes(lct.IMAGE_DTYPE.itemsize)
    remember(
        memory, "image", ((f"class{index // 1000:03}/{index:06}.jpg", 9, 2**60, value) for index in range(100_000))
    )
    started = time.process_time()
    assert len(memory.recall("image")) == 100_000
    assert time.process_time() - started < 3, "0.3 s on an idle core"
