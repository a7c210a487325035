"""Section 08: order, seeds and batches are functions of (seed, epoch, row), not of the workers."""

import dataclasses
import inspect
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import DEAD_WORKER_POLL
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import lct_dino3 as lct

CPU = lct.Runtime(torch.device("cpu"), 0, torch.float32)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> lct.Records:
    root = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    names = [f"{index:02}.png" for index in range(21)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (30, 24, 3), dtype=np.uint8)).save(root / name)
    labels = np.array([0] * 4 + [1] * 6 + [2] * 11, dtype=np.int32)
    rows = np.arange(21, dtype=np.int32)
    return lct.Records(root, ("a", "b", "c"), np.array(names, dtype=lct.STRINGS), labels, rows, np.zeros(21, np.int8))


def load_epoch(records: lct.Records, workers: int, epoch: int, **options: object) -> list[lct.Batch]:
    config = lct.Config(batch=5, workers=workers, **options)
    sampler = lct.EpochSampler(records.rows("train"), records.labels, config)
    dataset = lct.CropDataset(records, lct.build_transform(32, augment=True))
    loader = lct.make_loader(dataset, sampler, config, CPU)
    for sampler.epoch in range(epoch + 1):  # persistent workers must follow the epoch
        batches = list(loader)
    return batches


@pytest.mark.parametrize(
    ("cores", "processes", "default"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 3), (16, 1, 15), (192, 1, 16), (192, 8, 16), (16, 8, 1)],
)
def test_by_default_there_is_a_worker_for_each_core_that_training_leaves(
    cores: int, processes: int, default: int, monkeypatch: pytest.MonkeyPatch, patch_used: Callable
) -> None:
    """And nobody gets more of them than there are cores, however many are asked for."""
    patch_used(lct, "count_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    records = lct.Records(Path(), ("a",), ["x"], np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int8))
    dataset = lct.CropDataset(records, None)
    for asked, expected in ((None, default), (0, 0), (1, 1), (256, -(-cores // processes))):
        assert lct.make_loader(dataset, [], lct.Config(workers=asked), CPU).num_workers == expected


def test_the_quota_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joblib.externals.loky.backend.context._cpu_count_cgroup", lambda _: 1)
    assert lct.count_cores() == 1


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_what_is_loaded(records: lct.Records, workers: int, patch_used: Callable) -> None:
    patch_used(lct, "count_cores", lambda: 8)  # workers are capped at the cores there are
    alone, together = load_epoch(records, 0, 1), load_epoch(records, workers, 1)
    assert len(alone) == len(together) == 4
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.rows, b.rows) and torch.equal(a.labels, b.labels)


def test_epochs_differ_in_order_and_augmentation(records: lct.Records) -> None:
    first, second = load_epoch(records, 0, 0), load_epoch(records, 0, 1)
    assert torch.cat([b.rows for b in first]).sort().values.tolist() == list(range(21))
    assert torch.cat([b.rows for b in first]).tolist() != torch.cat([b.rows for b in second]).tolist()
    by_row = [{int(r): i for b in epoch for r, i in zip(b.rows, b.images, strict=True)} for epoch in (first, second)]
    assert sum(torch.equal(by_row[0][row], by_row[1][row]) for row in range(21)) < 5


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    assert lct.batch_borders(21, 5) == [0, 5, 10, 15, 21]
    assert lct.batch_borders(22, 5) == [0, 5, 10, 15, 20, 22]
    assert lct.batch_borders(20, 5) == [0, 5, 10, 15, 20]
    assert lct.batch_borders(1, 5) == [0, 1]


def test_balanced_epochs_show_every_class_equally_and_rotate_through_it(records: lct.Records) -> None:
    config = lct.Config(batch=4, balanced_per_class=True, samples_per_class=3)
    sampler = lct.EpochSampler(records.rows("train"), records.labels, config)
    seen: Counter[int] = Counter()
    for sampler.epoch in range(4):
        batches = list(sampler)
        rows = [key.row for batch in batches for key in batch]
        assert np.bincount(records.labels[rows]).tolist() == [3, 3, 3]
        assert len(batches) == len(sampler)
        seen.update(rows)
    assert [seen[row] for row in range(4)] == [3] * 4, "12 draws of 4 images: each three times"
    assert [seen[row] for row in range(4, 10)] == [2] * 6
    assert max(seen[row] for row in range(10, 21)) == 2 and min(seen[row] for row in range(10, 21)) == 1


def test_repetitions_of_an_image_in_one_epoch_are_augmented_differently(records: lct.Records) -> None:
    config = lct.Config(batch=4, balanced_per_class=True, samples_per_class=12)
    sampler = lct.EpochSampler(records.rows("train"), records.labels, config)
    batches = list(sampler)
    keys = [key for batch in batches for key in batch]
    assert len({key.row for key in keys}) == 21 and len({(key.row, key.seed) for key in keys}) == len(keys) == 36
    sampler.start_at(0, 5)
    assert list(sampler) == batches[5:], "also where an epoch goes on"


def test_a_loader_that_lost_a_worker_ends_before_the_next_one_starts(
    records: lct.Records, patch_used: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_used(lct, "count_cores", lambda: 2)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (DEAD_WORKER_POLL,))
    dataset = lct.CropDataset(records, lct.build_transform(32, augment=False))
    batches = lct.cut_batches(lct.eval_keys(records, np.arange(21), "bbox"), 5)
    alive = []

    def read(_: int, taken: int) -> Iterable:
        alive.append(len(multiprocessing.active_children()))
        return lct.make_loader(dataset, batches[taken:], lct.Config(workers=2), CPU)

    handler = signal.getsignal(signal.SIGCHLD)
    loaded = []
    for batch in lct.outlive_workers(read, print):
        if not loaded:
            multiprocessing.active_children()[0].kill()
        loaded += batch.rows.tolist()
    signal.signal(signal.SIGCHLD, handler)
    assert loaded == list(range(21)) and len(alive) > 1 and not any(alive)


def test_a_dead_thread_that_pins_memory_is_a_dead_worker() -> None:
    """torch pins memory on a machine with a GPU alone."""
    error = RuntimeError("Pin memory thread exited unexpectedly")
    assert str(error) in inspect.getsource(torch.utils.data.dataloader)

    def read(failed: int, taken: int) -> Iterable:
        yield from range(taken, 3)
        if not failed:
            raise error

    assert list(lct.outlive_workers(read, print)) == [0, 1, 2]


def test_an_unreadable_image_costs_itself_and_is_named(records: lct.Records, tmp_path: Path) -> None:
    (tmp_path / "00.png").write_bytes((records.root / "00.png").read_bytes())
    (tmp_path / "02.png").write_bytes((records.root / "02.png").read_bytes()[:200])
    dataset = lct.CropDataset(dataclasses.replace(records, root=tmp_path), lct.build_transform(32, augment=False))
    batch = dataset.collate([dataset[lct.SampleKey(row, (), 0)] for row in (0, 1, 2)])
    assert batch.rows.tolist() == [0] and batch.images.shape == (1, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert [row for row, _ in batch.failures] == [1, 2]
    assert "left out: No such file or directory" in batch.failures[0][1] and "truncated" in batch.failures[1][1].lower()
    empty = dataset.collate([dataset[lct.SampleKey(1, (), 0)]])
    assert len(empty.labels) == 0 and len(empty.images) == 0
