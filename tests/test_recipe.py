"""Sections 07, 08 and 15: backgrounds, the schedule of the augmentation, and images that are mixed."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image, make_dataset
from killing import Nursery, differences, kill
from PIL import Image
from torch.nn import functional as F

import lct_dino3 as lct

CPU = lct.Runtime(torch.device("cpu"), 0, torch.float32)
TRAINED = (
    "--model_id test_resnet --no-pretrained --no-freeze_backbone --img_size 32 --batch 8 --gpus 0 --emb_dim 16 --epochs 3"
    " --workers 0 --save_minutes 0"
).split()

END_AFTER_PREVIEW = kill("write_preview", 1, lct.signal.SIGTERM, when="after")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures to put crops on, one of them in a folder, and one that is broken. Shared: read only."""
    root = tmp_path_factory.mktemp("backgrounds") / "pictures"
    (root / "more").mkdir(parents=True)
    for index, size in enumerate([(40, 30), (200, 90), (64, 64), (90, 300), (5, 4)]):
        draw_image(9, index, side=64).resize(size).save(root / ("more" if index == 4 else "") / f"{index}.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    return root


@pytest.fixture(scope="module")
def masked_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of twelve images, two of three with a mask. Shared: read only."""
    root = make_dataset(tmp_path_factory.mktemp("masked") / "data", {"hammer": 12, "pliers": 12, "wrench": 12})
    mask = np.zeros((56, 56), np.uint8)
    mask[8:48, 12:44] = 255
    for index, path in enumerate(sorted(root.rglob("*.png"))):
        if index % 3:
            (path.parent / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(path.parent / "masks" / f"{path.stem}_mask.png")
    return root


# --- backgrounds


def paste(root: Path, has_mask: bool, seed: int, max_ratio: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put a crop with noise onto a picture without it; return crop, mask and canvas."""
    rng = np.random.default_rng(1)
    crop, mask = rng.integers(128, 256, (40, 60, 3), dtype=np.uint8), np.zeros((40, 60), np.uint8)
    mask[10:30, 15:45] = 255
    Image.fromarray(rng.integers(0, 100, (33, 77, 3), dtype=np.uint8)).save(root / "wall.png")
    paths = np.array(["wall.png"], dtype=lct.STRINGS)
    backgrounds = lct.Backgrounds(None, root, paths, "", probability=1.0, max_ratio=max_ratio, max_side=1000)
    return crop, mask, backgrounds.insert(crop, mask if has_mask else None, np.random.default_rng(seed))


def find(canvas: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """Return where a part lies in a canvas, exactly."""
    windows = np.lib.stride_tricks.sliding_window_view(canvas, part.shape)[:, :, 0]
    places = np.argwhere((windows == part).all(axis=(2, 3, 4)))
    assert len(places) == 1
    return tuple(places[0].tolist())


@pytest.mark.parametrize("max_ratio", [1.0, 1.5, 3.0])
def test_a_crop_lies_whole_on_a_canvas_that_the_picture_covers(max_ratio: float, tmp_path: Path) -> None:
    places, sizes = set(), set()
    for seed in range(40):
        crop, _, canvas = paste(tmp_path, False, seed, max_ratio)
        height, width = canvas.shape[:2]
        assert 40 <= height <= 40 * max_ratio + 0.5 and 60 <= width <= 60 * max_ratio + 0.5
        top, left = find(canvas, crop)
        rest = np.ones(canvas.shape[:2], bool)
        rest[top : top + 40, left : left + 60] = False
        assert (canvas[rest] < 100).all(), "the picture is everywhere else"
        places.add((top, left))
        sizes.add((height, width))
    assert len(places) > 20 < len(sizes) if max_ratio > 1 else places == {(0, 0)} and sizes == {(40, 60)}


def test_with_a_mask_the_object_alone_is_pasted_exactly_and_its_edge_is_soft(tmp_path: Path) -> None:
    for seed in range(20):
        crop, mask, canvas = paste(tmp_path, True, seed, 2.0)
        top, left = find(canvas, crop[10:30, 15:45])  # every pixel of the object as it was
        assert 10 <= top <= canvas.shape[0] - 30 and 15 <= left <= canvas.shape[1] - 45
        around = canvas[top - 10 : top + 30, left - 15 : left + 45].astype(int)
        far = lct.np.ones(mask.shape, bool)
        far[5:35, 10:50] = False
        assert (around[far] < 100).all(), "nothing of the crop's own background is left"
        edge = around[9, 15:45].mean(axis=1)
        assert around[6, 15:45].mean() < edge.mean() < crop[10, 15:45].mean(), "the edge lies between the two"


def test_backgrounds_are_a_function_of_the_sample_and_hit_their_share(masked_data: Path, pictures: Path) -> None:
    config = lct.Config(
        data_root=masked_data,
        out_dir=masked_data.parent / "none",
        insert_background_p=0.3,
        backgrounds=pictures,
        batch=6,
    )
    scan, backgrounds = (
        lct.attach_masks(lct.scan_dataset(config), config),
        lct.scan_backgrounds(config, lct.FileMemory(config.out_dir)),
    )
    assert list(backgrounds.paths) == ["0.png", "1.png", "2.png", "3.png", "more/4.png"]
    said = backgrounds.describe()
    assert "5 pictures" in said and "not used as a background: broken.jpg" in said
    crowded = dataclasses.replace(backgrounds, reasons=dict.fromkeys(map(str, range(12)), "broken"))
    assert crowded.describe().count("not used") == 10 and crowded.describe().endswith("\n  ... and 2 more")
    assert 0.25 < np.mean([backgrounds.generator_for(seed) is not None for seed in range(1000)]) < 0.35
    transform = lct.build_transform(32, augment=False)
    own, plain = (lct.CropDataset(scan.records, transform, given) for given in (backgrounds, None))
    sampler = lct.EpochSampler(scan.records.rows("train"), scan.records.labels, config)
    loaded = []
    for workers in (0, 1, 2):
        loader = lct.make_loader(own, sampler, dataclasses.replace(config, workers=workers), CPU)
        loaded.append([batch.images for epoch in range(3) for batch in (sampler.start_at(epoch, 0), *loader)[1:]])
    assert all(torch.equal(*pair) for images in loaded[1:] for pair in zip(loaded[0], images, strict=True))
    keys = [key for batch in sampler for key in batch]
    changed = [not np.array_equal(own[key][0], plain[key][0]) for key in keys]
    assert changed == [backgrounds.generator_for(key.seed) is not None for key in keys] and 0 < sum(changed) < len(keys)


def test_a_large_crop_is_shrunk_before_it_is_put_on_a_picture(pictures: Path, masked_data: Path) -> None:
    config = lct.Config(data_root=masked_data, out_dir=masked_data.parent / "none", img_size=32)
    config = dataclasses.replace(config, insert_background_p=1.0, backgrounds=pictures, background_max_ratio=1.0)
    crop, mask = np.full((300, 150, 3), 255, np.uint8), np.zeros((300, 150), np.uint8)
    mask[150:] = 255
    canvas = lct.scan_backgrounds(config, lct.FileMemory(config.out_dir)).insert(crop, mask, np.random.default_rng(0))
    assert canvas.shape == (64, 32, 3) and (canvas[32:] == 255).all() and (canvas[:29] < 250).any()


def test_a_background_that_vanishes_costs_itself_alone(masked_data: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    os.mkfifo(tmp_path / "pictures" / "pipe.png")
    root = shutil.copytree(masked_data, tmp_path / "data")
    config = lct.Config(
        data_root=root, out_dir=tmp_path / "x", insert_background_p=1.0, backgrounds=tmp_path / "pictures"
    )
    records = lct.attach_masks(lct.scan_dataset(config), config).records
    backgrounds = lct.scan_backgrounds(config, lct.FileMemory(config.out_dir))
    assert "not used as a background: pipe.png: " in backgrounds.describe()
    shutil.rmtree(tmp_path / "pictures")
    dataset = lct.CropDataset(records, lct.build_transform(32, False), backgrounds)
    plain, masked = (int(np.flatnonzero(records.has_mask == has_mask)[0]) for has_mask in (False, True))
    image, _, reason = dataset[lct.SampleKey(plain, (1,), 0)]
    assert reason.startswith("is used without the background that cannot be read") and ".png" in reason
    assert np.array_equal(image, lct.fit_square(lct.load_image(root / records.paths[plain]), 32))
    (root / records.masks[masked]).unlink()
    _, _, reason = dataset[lct.SampleKey(masked, (1,), 1)]
    assert "its mask cannot be read any more" in reason and "; is used without the background" in reason


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--insert_background_p", 0.5], "give their folder with --backgrounds"),
        (["--insert_background_p", 0.5, "--backgrounds", "nowhere"], "does not exist"),
        (["--insert_background_p", 0.5, "--backgrounds", "data/hammer"], "lie one inside the other"),
        (["--insert_background_p", 0.5, "--backgrounds", "data"], "lie one inside the other"),
        (["--insert_background_p", 0.5, "--backgrounds", "."], "lie one inside the other"),
        (["--insert_background_p", 0.5, "--backgrounds", "output"], "holds out_dir"),
        (["--insert_background_p", 0.5, "--backgrounds", "empty"], "holds no picture that can be used, for it has no"),
        (["--insert_background_p", 0.5, "--backgrounds", "broken"], "broken.jpg"),
        (["--freeze_backbone", "--mixing", "cutmix", "--cache_views", 2], "cached views are features"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(
    flags: list, said: str, nursery: Nursery, masked_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(masked_data, tmp_path / "data")
    for name in ("empty", "broken", "output"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    flags = [
        tmp_path / word if flag == "--backgrounds" else word for flag, word in zip(["", *flags], flags, strict=False)
    ]
    out_dir = tmp_path / "output" / "run"
    code, text = nursery.run("--data_root", tmp_path / "data", "--out_dir", out_dir, *TRAINED, *flags)
    assert code == 2 and said in text
    assert not (out_dir / "metrics.jsonl").exists()


# --- the schedule


@pytest.mark.parametrize(
    "start, end, exponent, epochs, expected",
    [
        (1.0, 1.0, 1.0, 4, [1, 1, 1, 1]),
        (0.0, 1.0, 1.0, 5, [0, 0.25, 0.5, 0.75, 1]),
        (0.2, 0.8, 2.0, 4, [0.2, 0.2 + 0.6 / 9, 0.2 + 0.6 * 4 / 9, 0.8]),
        (0.9, 0.1, 0.5, 3, [0.9, 0.9 - 0.8 * 0.5**0.5, 0.1]),
        (0.3, 0.9, 1.0, 1, [0.3]),
    ],
)
def test_the_share_of_augmented_samples_follows_its_formula(
    start: float, end: float, exponent: float, epochs: int, expected: list[float]
) -> None:
    config = lct.Config(aug_start_p=start, aug_end_p=end, aug_exponent=exponent, epochs=epochs)
    sampler = lct.EpochSampler(np.arange(10_000), np.zeros(10_000, int), config)
    for epoch, share in enumerate(expected):
        sampler.start_at(epoch, 0)
        is_augmented = np.random.default_rng((config.seed, 8, epoch)).random(10_000) < share
        assert [key.augmented for batch in sampler for key in batch] == is_augmented.tolist()


def test_the_schedule_gates_samples_and_reaches_workers_that_persist(masked_data: Path) -> None:
    config = lct.Config(
        data_root=masked_data, out_dir=masked_data.parent / "none", aug_start_p=0.0, aug_end_p=1.0, epochs=3, batch=6
    )
    records = lct.scan_dataset(config).records
    dataset = lct.CropDataset(records, lct.build_transform(32, augment=True))
    sampler = lct.EpochSampler(records.rows("train"), records.labels, config)
    plain, augmented = lct.build_transform(32, augment=False), lct.build_transform(32, augment=True)
    loaders = [lct.make_loader(dataset, sampler, dataclasses.replace(config, workers=number), CPU) for number in (0, 2)]
    shares = []
    for epoch in range(3):
        sampler.start_at(epoch, 0)
        keys, (alone, together) = [key for batch in sampler for key in batch], [list(loader) for loader in loaders]
        images = torch.cat([batch.images for batch in alone])
        assert torch.equal(images, torch.cat([batch.images for batch in together]))
        for key, image in zip(keys, images, strict=True):
            crop = lct.load_image(records.root / records.paths[key.row])
            expected = augmented(crop, None, key.seed) if key.augmented else plain(crop, None, 0)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
        shares.append(np.mean([key.augmented for key in keys]))
    assert shares[0] == 0 and shares[2] == 1 and 0.2 < shares[1] < 0.8


# --- mixing


def draw(strategy: str, batch: int, alpha: float = 1.0, p: float = 1.0, side: int = 32) -> lct.Mixing | None:
    config = lct.Config(mixing=strategy, mixing_p=p, mixing_alpha=alpha)
    return lct.draw_mixing(config, (3, batch), torch.zeros(4, 3, side, 48), 10)


def test_mixup_is_the_weighted_mean_of_two_images() -> None:
    images = torch.randint(0, 256, (10, 3, 32, 48), dtype=torch.uint8)
    for batch in range(20):
        mixing = draw("mixup", batch, alpha=0.4)
        exact = mixing.lam * images.double() + (1 - mixing.lam) * images[mixing.partners].double()
        mixed = lct.mix_images(images, mixing)
        assert mixed.dtype == torch.uint8 and (mixed.double() - exact).abs().max() <= 0.5 + 1e-4
        assert 0.5 <= mixing.lam <= 1 and sorted(mixing.partners.tolist()) == list(range(10))


def test_lambda_of_cutmix_is_the_area_that_is_really_the_own_image() -> None:
    own = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 32, 48)
    shares, clipped = [], 0
    for batch in range(300):
        mixing = draw("cutmix", batch)
        mixed = lct.mix_images(own, mixing)
        for row in range(10):
            if mixing.partners[row] != row:
                assert (mixed[row] == row).double().mean().item() == pytest.approx(mixing.lam, abs=1e-12)
                assert ((mixed[row] == row) | (mixed[row] == mixing.partners[row])).all()
        top, bottom, left, right = mixing.box
        clipped += top == 0 or left == 0 or bottom == 32 or right == 48
        shares.append(mixing.lam)
    assert min(shares) >= 0.49 and clipped > 50 and np.mean(shares) > 0.76, "0.75 before boxes are clipped"


def test_mixing_is_a_function_of_seed_epoch_and_batch_and_hits_its_share() -> None:
    assert draw("none", 0) is None
    drawn = [draw("mixup", batch, p=0.3) for batch in range(1000)]
    assert 250 < sum(mixing is not None for mixing in drawn) < 350
    first, again, other = draw("mixup", 1), draw("mixup", 1), draw("mixup", 2)
    assert torch.equal(first.partners, again.partners) and first.lam == again.lam != other.lam


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_the_mixed_loss_is_that_of_the_two_hard_labels(margin: float) -> None:
    """With a margin each label has its own logits; without, it is the cross-entropy of soft labels. A batch is not mixed."""
    torch.manual_seed(0)
    embeddings, labels = F.normalize(torch.randn(14, 8)), torch.arange(14) % 5
    mixing, arcface = draw("mixup", 4), lct.ArcFace(lct.Config(emb_dim=8, arc_margin=margin), 5)
    others = torch.cat([labels[:10][mixing.partners], labels[10:]])
    shares = torch.tensor([mixing.lam] * 10 + [1.0] * 4)
    batches = [labels[:10], labels[10:]]
    found, plain = lct.mixed_loss(arcface, embeddings, batches, [mixing, None])
    torch.testing.assert_close(plain, arcface.plain_logits(embeddings))
    by_hand = 0.0
    for row in range(14):
        for share, own in ((shares[row], labels), (1 - shares[row], others)):
            cosine = F.normalize(arcface.weight) @ embeddings[row]
            logits = 30 * cosine
            logits[own[row]] = 30 * torch.cos(torch.acos(cosine[own[row]]) + margin)
            by_hand += share * (torch.logsumexp(logits, 0) - logits[own[row]]) / 14
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
    soft = shares[:, None] * F.one_hot(labels, 5) + (1 - shares[:, None]) * F.one_hot(others, 5)
    is_soft = torch.isclose(found, F.cross_entropy(30 * arcface.score_heads(embeddings)[:, 0], soft), rtol=1e-4)
    assert bool(is_soft) == (margin == 0)


# --- all of it at once

LISTS = (
    *("--pre_transforms", "[{type: median_blur, p: 0.3}]"),
    *("--train_augmentations", "[{type: randaugment}, {type: coarse_dropout, p: 0.5}]"),
    *("--val_augmentations", "[{type: longest_max_size, max_size: 32}]"),
    *("--post_transforms", "[{type: normalize, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}, {type: to_tensor}]"),
)
RECIPES = {
    "cutmix": (*LISTS, "--mixing", "cutmix", "--crop_mode", "mix"),
    "cached": ("--freeze_backbone", "--cache_views", 2, "--crop_mode", "mix"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_with_all_of_it_resumes_exactly_with_any_number_of_workers(
    name: str, nursery: Nursery, masked_data: Path, pictures: Path, tmp_path: Path
) -> None:
    recipe = ("--insert_background_p", 0.5, "--backgrounds", pictures, "--data_fraction", 0.8, "--preview")
    recipe = (*recipe, "--aug_start_p", 0.3, "--aug_end_p", 0.9, "--aug_exponent", 2, *RECIPES[name])
    start = lambda out, *flags, plans=(): nursery.run(  # noqa: E731
        "--data_root", masked_data, "--out_dir", tmp_path / out, *TRAINED, *recipe, *flags, plans=list(plans)
    )
    code, text = start("straight")
    assert code == 0, text
    log = (tmp_path / "straight" / "train.log").read_text(encoding="utf-8")
    assert "of them are used" in log and "not used as a background: broken.jpg" in log
    assert log.count("usually costs a little") == (name != "cached")
    assert start("hurt", plans=[kill("train_step", 4, lct.signal.SIGTERM)])[0] == 143
    assert start("hurt", "--workers", 2, plans=[kill("train_step", 3, lct.signal.SIGKILL)])[0] == -9
    code, text = start("hurt", "--workers", 1)
    assert code == 0, text
    assert differences(tmp_path / "straight", tmp_path / "hurt") == []


def test_other_backgrounds_are_another_run(nursery: Nursery, masked_data: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    flags = ("--insert_background_p", 0.5, "--backgrounds", tmp_path / "pictures")
    argv = ("--data_root", masked_data, "--out_dir", tmp_path / "run", *TRAINED, *flags)
    assert nursery.run(*argv, plans=[kill("train_step", 2, lct.signal.SIGTERM)])[0] == 143
    (tmp_path / "pictures" / "2.png").unlink()
    code, text = nursery.run(*argv)
    assert code == 2 and re.search(r"backgrounds: 5 pictures .* -> 4 pictures", text), text


def test_a_part_of_the_data_is_evaluated_without_warnings(nursery: Nursery, masked_data: Path, tmp_path: Path) -> None:
    flags = ("--data_fraction", 0.6, "--epochs", 1, "--crop_mode", "mix")
    code, text = nursery.run("--data_root", masked_data, "--out_dir", tmp_path / "run", *TRAINED, *flags)
    assert code == 0, text
    code, text = nursery.run("evaluate", "--run", tmp_path / "run", "--split", "val")
    assert code == 0 and "warning" not in text, text


def test_the_preview_shows_channels_as_the_model_sees_them(nursery: Nursery, masked_data: Path, tmp_path: Path) -> None:
    sheets = {}
    for channels in (1, 3, 4):
        flags = ("--in_channels", channels, "--preview", "--crop_mode", "mask")
        out_dir = tmp_path / str(channels)
        argv = ("--data_root", masked_data, "--out_dir", out_dir, *TRAINED, *flags)
        code, text = nursery.run(*argv, plans=[END_AFTER_PREVIEW])
        assert code == 143, text
        sheets[channels] = np.asarray(Image.open(out_dir / "preview.jpg")).astype(int)
    assert (np.ptp(sheets[1], axis=2) <= 2).all() and np.ptp(sheets[3], axis=2).max() > 50
    is_outside = (np.abs(sheets[3] - lct.PADDING_GRAY) <= 2).all(axis=2)
    assert sheets[4][is_outside].mean() < 70, "what is outside the mask is darker"


def test_two_processes_mix_what_one_does(nursery: Nursery, masked_data: Path, tmp_path: Path) -> None:
    flags = (*TRAINED, "--freeze_backbone", "--mixing", "cutmix", "--preview")
    for out, ranks in (("one", [{}]), ("two", [{}, {}])):
        argv = ("--data_root", masked_data, "--out_dir", tmp_path / out, *flags, "--mixing_p", 1)
        ends = nursery.run_team(*argv, ranks=ranks)
        assert {code for code, _ in ends} == {0}, ends
    argv = ("--data_root", masked_data, "--out_dir", tmp_path / "plain", *flags, "--mixing_p", 0)
    code, text = nursery.run(*argv, plans=[END_AFTER_PREVIEW])
    assert code == 143, text
    assert differences(tmp_path / "one", tmp_path / "two") == []
    one, two, plain = ((tmp_path / out / "preview.jpg").read_bytes() for out in ("one", "two", "plain"))
    assert one == two != plain
