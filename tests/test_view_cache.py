"""Section 15: features of augmented views on disk; what they are, whose turn it is, and that interruptions change nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dataset
from PIL import Image

import lct_dino3 as lct

FLAGS = "--model_id test_resnet --no-pretrained --img_size 32 --gpus 0 --batch 8 --cache_views 2".split()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Draw three classes of twelve images, two of three with a mask."""
    root = make_dataset(tmp_path / "data", {"hammer": 12, "pliers": 12, "wrench": 12})
    for path in sorted(root.rglob("*.png"))[::3] + sorted(root.rglob("*.png"))[1::3]:
        (path.parent / "masks").mkdir(exist_ok=True)
        mask = np.zeros((56, 56), np.uint8)
        mask[8:48, 12:44] = 255
        Image.fromarray(mask).save(path.parent / "masks" / f"{path.stem}_mask.png")
    return root


def open_cache(data: Path, **options: object) -> tuple[lct.ViewCache, lct.Job, lct.Backbone, lct.Embedded]:
    fixed = {"model_id": "test_resnet", "pretrained": False, "img_size": 32, "gpus": 0, "workers": 0, "batch": 8}
    config = lct.Config(
        data_root=data, out_dir=data.parent / "run", **{**fixed, "cache_views": 2, "precision": "fp32", **options}
    )
    scan = lct.attach_masks(lct.scan_dataset(config), config)
    backbone, info = lct.build_backbone(config, print)
    backbone.freeze()
    with lct.RunDirectory(config.out_dir) as run:
        job = lct.Job(config, scan.records, lct.training_runtime(config), run, info)
        clean = lct.FeatureBank(job, backbone).get("train")
        return lct.ViewCache(job, backbone, clean), job, backbone, clean


def embed_alone(job: lct.Job, backbone: lct.Backbone, row: int, view: int, seed: int | None) -> np.ndarray:
    """Embed one crop, apart from loaders and caches; without a seed it is not augmented."""
    image, mask, _ = lct.load_crop(job.records, row, view)
    crop = job.transform(seed is not None)(image, mask, seed or 0)
    with torch.inference_mode():
        return backbone(torch.from_numpy(crop)[None].permute(0, 3, 1, 2))[0].numpy()


def test_what_the_schedule_does_not_augment_is_shown_clean(data: Path) -> None:
    cache, job, _, clean = open_cache(data, aug_start_p=0.0)
    rows = job.records.rows("train").tolist()
    for showing in range(3):
        keys = [
            lct.SampleKey(row, (), 0, showing, augmented)
            for row, augmented in zip(rows, [False, True] * 99, strict=False)
        ]
        features, expected = (
            cache.take(keys).images[::2],
            torch.from_numpy(clean.values)[np.searchsorted(clean.rows, rows)][::2],
        )
        assert torch.equal(features, expected)
    assert not torch.equal(
        cache.take([lct.SampleKey(row, (), 0, 1) for row in rows]).images, torch.from_numpy(clean.values)
    )


@pytest.mark.parametrize("crop_mode", ["bbox", "mask", "mix"])
def test_every_view_comes_in_its_turn_and_is_what_it_says(data: Path, crop_mode: str) -> None:
    cache, job, backbone, _ = open_cache(data, crop_mode=crop_mode, mix_mask_p=0.5)
    rows = job.records.rows("train")
    seen: dict[int, list[tuple]] = {row: [] for row in rows.tolist()}
    for showing in range(3):
        batch = cache.take([lct.SampleKey(row, (), 0, showing) for row in rows.tolist()])
        assert batch.rows.tolist() == rows.tolist() and torch.equal(
            batch.labels, torch.from_numpy(job.records.labels[rows]).long()
        )
        for row, view, features in zip(batch.rows.tolist(), batch.views.tolist(), batch.images.numpy(), strict=True):
            seen[row].append((view, features))
    views = np.array([[view for view, _ in own] for own in seen.values()])
    has_mask = job.records.has_mask[rows]
    assert {"bbox": not views.any(), "mask": (views == has_mask[:, None]).all(), "mix": 0 < views.mean() < 0.6}[
        crop_mode
    ]
    for row, own in list(seen.items())[::5]:
        words = [(job.config.seed, 3, view, row, 0) for view in range(2)]
        seeds = [None, *(lct.SampleKey(row, own_words, 0).seed for own_words in words)]
        for view, features in own:  # in one of three orders
            errors = [np.abs(features - embed_alone(job, backbone, row, view, seed)).max() for seed in seeds]
            best = int(np.argmin(errors))
            assert errors[best] < 2e-3 * max(1.0, np.abs(features).max())
            seeds.pop(best)
        assert not seeds


def test_an_interrupted_cache_is_continued_and_one_of_other_settings_is_not(data: Path) -> None:
    path = data.parent / "run" / "cached_views.f16"
    cache, job, *_ = open_cache(data)
    images = len(job.records.rows("train"))
    assert np.array_equal(cache.sample().values.ravel(), np.fromfile(path, np.float16)), "each view but the clean one"
    whole, noted = path.read_bytes(), json.loads(path.with_suffix(".json").read_text("utf-8"))
    row_bytes = len(whole) // (2 * images)
    assert noted["done"] == 2 * images
    mark = np.full(row_bytes // 2, 7, np.float16).tobytes()
    path.write_bytes(mark + whole[row_bytes : 19 * row_bytes])  # three rows were written and not noted
    path.with_suffix(".json").write_text(json.dumps(noted | {"done": 16}), "utf-8")
    open_cache(data, workers=2)
    assert path.read_bytes() == mark + whole[row_bytes:]
    open_cache(data, seed=43)
    other = path.read_bytes()
    assert len(other) == len(whole) and mark not in other
    open_cache(data)
    assert path.read_bytes() == whole


def test_an_image_that_is_gone_is_left_out_and_named(data: Path) -> None:
    _, job, backbone, clean = open_cache(data)
    first, row = job.records.rows("train")[[0, 3]].tolist()
    (data / job.records.paths[row]).unlink()
    (job.run.path / "cached_views.json").unlink()
    with lct.RunDirectory(job.run.path) as run:
        cache = lct.ViewCache(dataclasses.replace(job, run=run), backbone, clean)
    assert list(job.unreadable) == [job.records.paths[row]]
    shown = [
        cache.take([lct.SampleKey(row, (), 0, showing), lct.SampleKey(first, (), 0, 0)]).rows.tolist()
        for showing in range(3)
    ]
    assert sorted(map(len, shown)) == [1, 1, 2]  # its clean view was embedded before


def test_no_room_is_told_before_anything_is_embedded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(lct.UserError, match=r"--cache_views 1000: need [\d,]+ bytes, and 1,000 are free"):
        open_cache(data, cache_views=1000)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4),
        ({"cache_views": 0}, 0),
        ({"epochs": 4}, 0),  # as many passes
        ({"mixing": "mixup"}, 0),
        ({"freeze_backbone": False}, 0),
    ],
)
def test_four_views_are_cached_where_nothing_forbids_it(
    data: Path, options: dict, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = {"model_id": "test_resnet", "pretrained": False, "img_size": 32, "gpus": 0, "workers": 0, "epochs": 6}
    config = lct.Config(data_root=data, out_dir=data.parent / "not there" / "run", **{**fixed, **options})
    scan, runtime = lct.scan_dataset(config), lct.training_runtime(config)
    job, *_ = lct.plan_run(config, runtime, scan, None, None)
    assert job.config.cache_views == expected
    if expected:
        needed = 2 * expected * len(job.records.rows("train")) * job.info.feature_dim
        for free, then in ((4 * needed, expected), (4 * needed - 1, 0)):
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: types.SimpleNamespace(free=free))
            assert lct.plan_run(config, runtime, scan, None, None)[0].config.cache_views == then


def test_a_run_keeps_what_was_chosen_at_its_start(
    data: Path, tmp_path: Path, call_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*FLAGS[:-2], "--data_root", data, "--out_dir", tmp_path / "run", "--workers", "0"]
    assert call_main(*words, "--epochs", "5", "--cache_views", "auto") == 0
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**6))
    score_epoch = lct.score_epoch
    monkeypatch.setattr(lct, "score_epoch", lambda *given: time.sleep(0.5) or score_epoch(*given))
    assert call_main(*words, "--epochs", "6") == 0
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert options["cache_views"] == 4 and options["epochs"] == 6
    last = [event for event in lct.read_events(tmp_path / "run") if event["event"] == "epoch_end"][-1]
    train = json.loads((tmp_path / "run" / "splits.json").read_text())["train"]
    seconds = sum(map(len, train.values())) / last["pace"]["images_per_s"]
    assert last["seconds"] - seconds > 0.45, "the pace is that of training, without evaluation"


def test_a_run_that_has_ended_embeds_no_views(data: Path, tmp_path: Path, call_main: Callable[..., int]) -> None:
    words = [*FLAGS, "--data_root", data, "--out_dir", tmp_path / "run", "--workers", "0", "--epochs", "1"]
    assert call_main(*words) == 0
    for name in ("predictions.csv", "cached_views.f16"):
        (tmp_path / "run" / name).unlink()
    assert call_main(*words) == 0
    assert (tmp_path / "run" / "predictions.csv").exists() and not (tmp_path / "run" / "cached_views.f16").exists()


@pytest.mark.parametrize(
    ("flags", "word"), [(("--cache_views", "4"), "--cache_views"), (("--compile", "--gpus", "2"), "--compile")]
)
def test_what_does_not_go_together_is_refused(flags: tuple[str, ...], word: str) -> None:
    with pytest.raises(lct.UserError, match=word):
        lct.parse_command_line(["--no-freeze_backbone", *flags])


def test_the_epochs_line_names_the_knob_when_the_device_waits() -> None:
    figures = {"loss": 1.0, "acc": 0.5, "f1_macro": 0.0, "auc_macro": None}
    record = {"epoch": 2, "train": figures, "val": figures, "seconds": 12.34}

    def line(wait: float, **options: object) -> str:
        return lct.format_epoch(record | {"pace": {"images_per_s": 1234.5, "data_wait": wait}}, lct.Config(**options))

    assert line(0.03).endswith("12.3 s, 1,234 images/s, 3% of it waiting for data")
    assert "val loss  1.000 acc  0.500 F1  0.000 AUC      -  |" in line(0.03)
    assert "--workers" in line(0.4, workers=0)
    assert "--workers" not in line(0.4, workers=lct.count_cores())
    assert "--cache_crops 8" in line(0.4, workers=0, cache_crops=0.0)
    assert "--workers" in line(0.4, workers=0, cache_crops=0.0, train_augmentations=())
    assert "--cache_views" in line(0.4, workers=256)
    assert "--" not in line(0.4, workers=256, freeze_backbone=False).split("waiting")[1]
    assert "--" not in line(0.4, workers=256, mixing="mixup").split("waiting")[1]
    assert "--out_dir" in line(0.4, cache_views=4)


def test_pace_tells_waiting_from_work() -> None:
    batch = lct.Batch(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4), torch.zeros(4), [])
    clock = lct.Clock(torch.device("cpu"))
    assert sum(len(own.labels) for own in clock.watch(iter([batch] * 5))) == clock.images == 20
    clock.started -= 10  # ten seconds of work between the batches
    assert clock.pace()["images_per_s"] == pytest.approx(2, rel=0.05) and clock.pace()["data_wait"] < 0.01


class Gpu:
    """A device that works beside the program: the time is `now`, and it will have done what it was given at `busy_until`."""

    def __init__(self) -> None:
        self.now, self.busy_until = 0.0, 0.0

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds

    def event(self, enable_timing: bool) -> Gpu.Event:
        assert enable_timing
        return Gpu.Event(self)

    class Event:
        def __init__(self, gpu: Gpu) -> None:
            self.gpu, self.at = gpu, None

        def record(self) -> None:
            self.at = max(self.gpu.now, self.gpu.busy_until)

        def query(self) -> bool:
            return self.gpu.now >= self.at

        def elapsed_time(self, end: Gpu.Event) -> float:
            assert self.query() and end.query()
            return 1000 * (end.at - self.at)


@pytest.mark.parametrize(("work", "expected"), [(5.0, 3 / 103), (1.0, 41 / 61)])
def test_a_gpu_waits_for_data_only_when_it_has_finished_its_step(
    work: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 20 batches takes 3 s to come and `work` to be worked on; the program itself waits for each of them nearly always."""
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(time, "monotonic", lambda: gpu.now)

    def load() -> Iterator[lct.Batch]:
        for _ in range(20):
            gpu.now += 3.0
            yield lct.Batch(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4), torch.zeros(4), [])

    clock = lct.Clock(torch.device("cuda"), started=0.0)
    for _ in clock.watch(load()):
        gpu.work(work)
    gpu.now = max(gpu.now, gpu.busy_until)  # the program reads the losses
    pace = clock.pace()
    assert clock.images == 80
    assert pace["images_per_s"] == pytest.approx(80 / gpu.now, abs=0.05)
    assert pace["data_wait"] == pytest.approx(expected, abs=0.02)
