"""Sections 08 and 15: decoded crops on disk. They change nothing, are read instead of the files, and cost no run anything."""

import dataclasses
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dataset
from killing import differences
from PIL import Image

import lct_dino3 as lct

SIDE = 32


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Draw three classes of twelve JPEGs, some large enough for a reduced decode, half of them with a mask."""
    root = make_dataset(tmp_path / "data", {"hammer": 12, "pliers": 12, "wrench": 12}, side=120, suffix=".jpg")
    for path in sorted(root.rglob("*.jpg"))[::2]:
        (path.parent / "masks").mkdir(exist_ok=True)
        mask = np.zeros((120, 120), np.uint8)
        mask[20:100, 30:90] = 255
        Image.fromarray(mask).save(path.parent / "masks" / f"{path.stem}_mask.png")
    return root


def make_job(data: Path, **options: object) -> lct.Job:
    fixed = {"model_id": "test_resnet", "pretrained": False, "img_size": SIDE, "gpus": 0, "workers": 0, "batch": 8}
    config = lct.Config(data_root=data, out_dir=data.parent / "run", **{**fixed, **options})
    config.out_dir.mkdir(exist_ok=True)
    scan = lct.attach_masks(lct.scan_dataset(config), config)
    info = lct.BackboneInfo("", "", "", 1, SIDE, "avg", (0.5,) * 3, (0.5,) * 3, "area")
    return lct.Job(config, scan.records, lct.training_runtime(config), None, info, scan.fingerprint)


def with_store(job: lct.Job) -> lct.Job:
    return dataclasses.replace(job, store=lct.open_store(job))


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"crop_mode": "mask"}, {"crop_mode": "mix", "mask_fill": "blur"}])
def test_crops_come_from_the_store_the_second_time_and_are_the_same(data: Path, options: dict, workers: int) -> None:
    job = with_store(make_job(data, workers=workers, **options))
    plain, kept = dataclasses.replace(job, store=None).training_crops(), job.training_crops()
    second = 0 if job.config.crop_mode == "mix" else 1  # in mix, another epoch shows some crops in their other view
    wanted = [load(job, plain, epoch)[0] for epoch in (0, second)]
    found = [load(job, kept, 0)[0]]
    hide_images(data)
    found.append(load(job, kept, second)[0])
    for one, two in zip(wanted, found, strict=True):
        assert one.keys() == two.keys() and len(one) == len(job.records.rows("train"))
        assert all(np.array_equal(one[key], two[key]) for key in one)
    missed = load(job, plain, second)
    assert missed[0] == {} and len(missed[1]) == len(wanted[1]), "without a store the images are gone"


def test_random_fills_and_crops_on_backgrounds_are_made_anew(data: Path, tmp_path: Path) -> None:
    job = with_store(make_job(data, crop_mode="mask", mask_fill="random"))
    dataset, key = job.training_crops(), lct.SampleKey(int(np.flatnonzero(job.records.has_mask)[0]), (1,), 1)
    dataset[key]
    assert job.store.get(key.row, True, True) is None
    plain = int(np.flatnonzero(~job.records.has_mask & (job.records.splits == 0))[0])
    dataset[key._replace(row=plain)]
    assert job.store.get(plain, False, True) is not None
    make_dataset(tmp_path / "pictures", {"wall": 2})
    config = dataclasses.replace(job.config, backgrounds=tmp_path / "pictures", insert_background_p=1.0)
    backgrounds = lct.scan_backgrounds(config)
    other = int(job.records.rows("train")[-1])
    dataset = lct.CropDataset(job.records, job.transform(True), backgrounds, job.store)
    assert not np.array_equal(dataset[lct.SampleKey(other, (1,), 0)][0], dataset[lct.SampleKey(other, (2,), 0)][0])
    assert job.store.get(other, False, True) is None


def test_what_was_written_in_part_is_not_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = with_store(make_job(data))
    store, rows = job.store, job.records.rows("train").tolist()
    square = np.full((SIDE, SIDE, 3), 7, np.uint8)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, pixels, place: write(fd, bytes(pixels)[:100], place))
    store.put(rows[0], False, True, square)

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    store.put(rows[1], False, True, square)
    monkeypatch.setattr(os, "pwrite", write)
    for row in rows[2:4]:
        store.put(row, False, True, square)
    os.pwrite(store._file.fileno(), b"\0" * 16, 3 * lct.store_bytes(SIDE, False) + 1000)  # a page that got lost
    assert [store.get(row, False, True) is None for row in rows[:5]] == [True, True, False, True, True]
    assert np.array_equal(store.get(rows[2], False, True), square)
    assert store.get(rows[2], False, False) is None, "evaluation has another place, and decodes whole"


def test_plain_and_masked_have_places_of_their_own_and_crops_without_mask_one(data: Path) -> None:
    job = with_store(make_job(data, crop_mode="mix"))
    dataset, has_mask = job.training_crops(), job.records.has_mask
    rows = job.records.rows("train")
    for row in rows.tolist():
        dataset[lct.SampleKey(row, (1,), 1)]
    kept = [[job.store.get(row, masked, True) is not None for row in rows.tolist()] for masked in (False, True)]
    assert kept == [(~has_mask[rows]).tolist(), has_mask[rows].tolist()]
    assert {job.store.get(row, True, True).shape[2] for row in rows[has_mask[rows]].tolist()} == {4}
    alone = with_store(make_job(data, crop_mode="mask", mask_fill="random"))
    assert f"lasts: {(~has_mask[rows]).sum()}," in alone.store.describe()


def test_a_crop_whose_mask_is_lost_is_not_kept_without_it(data: Path) -> None:
    job = with_store(make_job(data, crop_mode="mask"))
    row = int(np.flatnonzero(job.records.has_mask & (job.records.splits == 0))[0])
    (data / job.records.masks[row]).write_bytes(b"gone")
    for _ in range(2):
        image, _, reason = job.training_crops()[lct.SampleKey(row, (1,), 1)]
        assert image is not None and "its mask cannot be read any more" in reason


def read_elsewhere(packed: bytes, key: tuple, pipe: object) -> None:
    store = pickle.loads(packed)
    pipe.send(None if store is None else store.get(lct.SampleKey(*key).row, False, True))


def test_another_process_of_the_machine_opens_the_same_store(data: Path) -> None:
    job = with_store(make_job(data))
    key = lct.SampleKey(int(job.records.rows("train")[0]), (), 0)
    square = job.training_crops().transform.make_square(lct.load_image(data / job.records.paths[key.row]), None, 0)
    job.store.put(key.row, False, True, square)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=read_elsewhere, args=(pickle.dumps(job.store), tuple(key), theirs))
    process.start()
    assert ours.poll(60), "the other process has died"
    assert np.array_equal(ours.recv(), square)
    process.join()
    function, (path, _, *rest) = job.store.__reduce__()
    assert function(path, (1, 2), *rest) is None, "another machine's file of that number"
    assert function("/proc/1/fd/987654", (1, 2), *rest) is None
    other = pickle.loads(pickle.dumps(job.training_crops()))
    assert np.array_equal(other.store.get(key.row, False, True), square) and other.store.records is other.records


def test_crops_of_others_are_not_taken_for_those_that_are_kept(data: Path) -> None:
    """As of --unknown_dir, which are embedded in the same run."""
    job = with_store(make_job(data))
    others = dataclasses.replace(job, records=dataclasses.replace(job.records, root=data.parent / "nowhere"))
    key = lct.SampleKey(int(job.records.rows("train")[0]), (), 0)
    assert job.training_crops()[key][0] is not None and job.store.get(key.row, False, True) is not None
    image, _, reason = others.training_crops()[key]
    assert image is None and "No such file" in reason


@pytest.mark.parametrize(
    ("options", "has_one"),
    [
        ({}, True),
        ({"epochs": 1}, False),
        ({"epochs": 1, "cache_views": 2}, True),
        ({"cache_views": 1}, False),
        ({"cache_crops": 0.0}, False),
        ({"train_augmentations": ({"type": "medianblur"},)}, False),
        ({"pre_transforms": ({"type": "medianblur"},)}, False),
        ({"post_transforms": ({"type": "medianblur"},)}, True),
    ],
)
def test_a_store_is_opened_where_crops_are_needed_again(data: Path, options: dict, has_one: bool) -> None:
    job = with_store(make_job(data, **options))
    assert (job.store is not None) == has_one
    assert list(job.config.out_dir.iterdir()) == [], "it has no name"
    if has_one:
        assert f"are kept on disk while the run lasts: {len(job.records.rows('train'))}," in job.store.describe()


def test_evaluation_has_its_places_where_the_backbone_is_trained(data: Path) -> None:
    frozen, trained = (with_store(make_job(data, freeze_backbone=value)) for value in (True, False))
    key = lct.SampleKey(int(trained.records.rows("val")[0]), (), 0)
    square = np.full((SIDE, SIDE, 3), 9, np.uint8)
    for job, is_kept in ((frozen, False), (trained, True)):
        job.store.put(key.row, False, False, square)
        assert (job.store.get(key.row, False, False) is not None) == is_kept
        assert job.store.get(key.row, False, True) is None


@pytest.mark.parametrize("limit", ["option", "disk"])
def test_it_takes_no_more_than_it_may(data: Path, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 5 * lct.store_bytes(SIDE, is_masked=False)
    if limit == "disk":
        usage = shutil.disk_usage(data)._replace(free=4 * room + 3)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    job = make_job(data, **({"cache_crops": (room + 1) / 1e9} if limit == "option" else {}))
    job = with_store(job)
    crops, rows = job.training_crops(), job.records.rows("train").tolist()
    for row in rows:
        crops[lct.SampleKey(row, (), 0)]
    assert [job.store.get(row, False, True) is not None for row in rows] == [i < 5 for i in range(len(rows))]
    assert os.fstat(job.store._file.fileno()).st_size <= room


def test_a_full_disk_is_named_and_costs_the_store_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(data)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with lct.RunDirectory(data.parent / "run") as run:
        assert lct.open_store(dataclasses.replace(make_job(data), run=run)) is None
    assert "no room to keep decoded crops" in (data.parent / "run/train.log").read_text(encoding="utf-8")
    full = OSError(28, "No space left on device", "checkpoint_last.pth")
    for size, is_named in ((8.0, True), (0.0, False)):
        explained = lct.explain_failure(full, lct.Config(cache_crops=size))
        assert ("--cache_crops" in str(explained)) == is_named and "make room" in str(explained)


def test_a_fine_tuned_run_with_masks_is_the_same_without_it(data: Path, tmp_path: Path, call_main: Callable) -> None:
    make_dataset(tmp_path / "unknown", {"mug": 8}, seed=5)
    flags = [
        "--model_id",
        "test_resnet",
        "--no-pretrained",
        "--img_size",
        SIDE,
        "--gpus",
        0,
        "--batch",
        8,
        "--workers",
        1,
    ]
    flags += [
        "--epochs",
        3,
        "--no-freeze_backbone",
        "--crop_mode",
        "mix",
        "--no-preview",
        "--unknown_dir",
        tmp_path / "unknown",
    ]
    for name, size in (("with", 8), ("without", 0)):
        assert call_main("--data_root", data, "--out_dir", tmp_path / name, *flags, "--cache_crops", size) == 0
    assert differences(tmp_path / "with", tmp_path / "without") == []
    logs = [(tmp_path / name / "train.log").read_text(encoding="utf-8") for name in ("with", "without")]
    assert ["decoded crops are kept" in log for log in logs] == [True, False]
    weights = torch.load(tmp_path / "with/checkpoint_last.pth", weights_only=True)["model"]
    assert any(key.startswith("backbone.") for key in weights)
