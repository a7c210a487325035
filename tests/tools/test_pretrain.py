"""tools/pretrain_dino_*.py: what they learn from, what they leave, that they resume exactly, and that the script trains on it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pretrain_dino_face
import pretrain_utils
import pytest
import torch
from conftest import REPO, draw_image, interrupt_writing, make_dataset, run_main
from killing import Nursery, do, kill
from PIL import Image
from slt import data, losses, measures, models, views
from slt.options import PRESETS, PretrainOptions, apply_preset
from torch.nn import functional as F

import lct_dino3 as lct

Main = Callable[..., int]
# The smallest run: 24 images, 2 of them held out, 2 steps an epoch.
TINY = (
    "--image-size 16 --patch-size 8 --vit-embed-dim 16 --vit-depth 1 --vit-num-heads 2 --out-dim 32 --head-hidden-dim 16"
    " --head-bottleneck-dim 8 --patch-out-dim 24 --local-crop-size 8 --num-local-crops 2 --batch-size 10 --source-size 24"
    " --epochs 3 --device cpu --log-interval 1"
).split()
GEOMETRY = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of eight images."""
    return make_dataset(tmp_path_factory.mktemp("crops") / "crops", {"left": 8, "right": 8, "both": 8})


def start(crops: Path, out: Path, *flags: object) -> int:
    return run_main("pretrain_dino_face", "--train-dir", crops, "--output-dir", out, *TINY, *flags)


@pytest.fixture(scope="module")
def finished(crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of iBOT with labelled crops, and an export beside it."""
    folder = tmp_path_factory.mktemp("finished")
    flags = "--algorithm ibot --use-sinkhorn --experiment-name first --experiment-tag a --experiment-tag b".split()
    assert start(crops, folder / "run", *flags, "--knn-dir", crops, "--export-backbone", folder / "backbone.pt") == 0
    return folder


# --- networks


def test_pixels_under_the_mask_do_not_change_what_the_student_sees() -> None:
    torch.manual_seed(0)
    model = models.ViTSmallPatch16(**GEOMETRY | {"image_size": 32})
    images = torch.randn(2, 3, 32, 32)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, [1, 6]] = True  # row by row: the second patch of the first row, the third of the second
    changed = images.clone()
    changed[0, :, 0:8, 8:16] = 7.0
    changed[0, :, 8:16, 16:24] = -7.0
    torch.testing.assert_close(model.encode(changed, masks), model.encode(images, masks), rtol=0, atol=0)
    assert not torch.allclose(model.encode(changed)[0], model.encode(images)[0])
    changed[0, :, 0:8, 16:24] = 7.0  # a patch that is seen
    assert not torch.allclose(model.encode(changed, masks)[0], model.encode(images, masks)[0])
    model.encode(images, masks).sum().backward()
    assert model.mask_token.grad.abs().sum() > 0


def test_without_masks_it_is_timms_model() -> None:
    torch.manual_seed(0)
    model = models.ViTSmallPatch16(**GEOMETRY).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.encode(images), model.forward_features(images))
    assert model.encode(torch.randn(2, 3, 8, 8)).shape == (2, 2, 16)  # a local crop of one patch


def test_the_head_gives_cosines_with_unit_prototypes() -> None:
    head = models.DinoHead(16, 32, 8, 24)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in head.mlp) == 3
    tokens = torch.randn(5, 16)
    expected = F.cosine_similarity(head.mlp(tokens)[:, None], head.prototypes[None], dim=-1)
    torch.testing.assert_close(head(tokens), expected)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(tokens)
        bottleneck = head.mlp(tokens)
    expected = F.cosine_similarity(bottleneck.float()[:, None], head.prototypes[None], dim=-1)
    torch.testing.assert_close(logits, expected)  # of float32: bf16 would be wrong by .002 / --teacher-temp


def test_the_teacher_is_the_running_mean_with_its_buffers_and_moves_once() -> None:
    options = apply_preset(pretrain_utils.PretrainOptions(preset="small", algorithm="ibot"))
    assert options.share_head
    state = pretrain_utils.build_state(options, torch.device("cpu"))
    for networks in (state.student, state.teacher):
        networks.register_buffer("count", torch.zeros((), dtype=torch.long))
        networks.register_buffer("average", torch.zeros(2))
    before = {key: value.clone() for key, value in state.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in state.student.parameters():
            parameter.add_(1.0)
    state.student.count += 3
    state.student.average += 4
    pretrain_utils.update_teacher(state.teacher, state.student, 0.75)
    after = state.teacher.state_dict()
    for key, value in state.teacher.named_parameters():
        torch.testing.assert_close(value, before[key] + 0.25, msg=key)
    assert after["count"] == 3 and after["average"].tolist() == [1.0, 1.0]


def test_biases_norms_positions_and_tokens_do_not_decay() -> None:
    options = apply_preset(pretrain_utils.PretrainOptions(preset="small", weight_decay=0.04))
    state = pretrain_utils.build_state(options, torch.device("cpu"))
    groups = state.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.04, 0.0]
    names = {id(parameter): name for name, parameter in state.student.named_parameters()}
    plain = {names[id(parameter)] for parameter in groups[1]["params"]}
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.mask_token", "backbone.norm.weight"} <= plain
    assert {name for name in names.values() if name.endswith("bias")} <= plain
    assert {"backbone.blocks.0.attn.qkv.weight", "head.prototypes", "backbone.patch_embed.proj.weight"} <= set(
        names.values()
    ) - plain
    assert sum(len(group["params"]) for group in groups) == len(names)


# --- losses


def test_losses_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 3, 5, generator=generator)
    target = torch.randn(2, 3, 5, generator=generator).softmax(-1)
    terms = [
        -(target[t, image] * (student[s, image] / 0.1).log_softmax(-1)).sum()
        for t in range(2) for s in range(4) if s != t for image in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(losses.class_loss(student, target, 0.1), torch.stack(terms).mean())
    weights = torch.tensor([0.5, 0.25, 0.25])
    expected = sum(
        weight * -(p * (s / 0.2).log_softmax(-1)).sum()
        for weight, p, s in zip(weights, target[0], student[0], strict=True)
    )
    torch.testing.assert_close(losses.patch_loss(student[0], target[0], weights, 0.2), expected)
    features = torch.randn(6, 4, generator=generator)
    unit = F.normalize(features, dim=1)
    distances = torch.cdist(unit, unit) + torch.eye(6) * 9
    torch.testing.assert_close(
        losses.koleo_loss(features), -distances.min(dim=1).values.log().mean(), rtol=1e-4, atol=1e-4
    )


def test_sinkhorn_uses_all_outputs_equally_often_and_leaves_the_centre_out() -> None:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 8 + torch.linspace(0, 1, 8)
    target = losses.Target(8, 0.1, 0.9, sinkhorn_iterations=30)
    target.center += 100.0 * torch.arange(8)
    plan = target(logits)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(plan.sum(dim=0), torch.full((8,), 8.0), rtol=0.01, atol=0.01)
    ratio = (plan.log() - logits / 0.1).numpy()  # of the form a_n + b_k: only rows and columns are scaled
    residual = ratio - ratio.mean(0) - ratio.mean(1, keepdims=True) + ratio.mean()
    assert np.abs(residual).max() < 1e-3
    assert losses.mutual_information(target.softmax(logits)) < losses.mutual_information(plan)
    sharp = losses.sinkhorn(logits, 0.001, 30)  # the lowest --teacher-temp: exp() of whole rows and columns is 0
    torch.testing.assert_close(sharp.sum(dim=1), torch.ones(64))
    assert (sharp.sum(dim=0) > 1).all()


def test_the_centre_moves_once_a_step_by_all_that_the_teacher_says() -> None:
    target = losses.Target(3, 0.04, center_momentum=0.9)
    logits = torch.randn(10, 3)
    first = target(logits)
    torch.testing.assert_close(first, (logits / 0.04).softmax(-1))
    torch.testing.assert_close(target.center, 0.1 * logits.mean(0))
    torch.testing.assert_close(target(logits), ((logits - 0.1 * logits.mean(0)) / 0.04).softmax(-1))


def test_information_is_zero_for_equal_and_for_unsure_answers() -> None:
    assert losses.mutual_information(torch.eye(8)) == pytest.approx(math.log(8))
    assert losses.mutual_information(torch.full((5, 8), 1 / 8)) == pytest.approx(0, abs=1e-9)
    assert losses.mutual_information(torch.eye(8)[[3] * 5]) == pytest.approx(0, abs=1e-9)


def make_job(options: pretrain_utils.PretrainOptions, **parts: object) -> pretrain_utils.Job:
    names = ("data", "schedule", "batches", "run", "held_out_views")
    runtime = lct.Runtime(torch.device("cpu"), 0, torch.float32)
    given = {name: parts.get(name) for name in names}
    return pretrain_utils.Job(options, runtime=runtime, identity={}, **given)


def test_patches_are_learned_from_the_teacher_at_masked_places_alone() -> None:
    """The patch loss of a step, computed once more from the definition."""
    options = apply_preset(pretrain_utils.PretrainOptions(preset="small", algorithm="ibot"))
    options = lct.dataclasses.replace(options, use_sinkhorn=False, koleo_weight=0.0)
    state = pretrain_utils.build_state(options, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    global_views = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(2, 3, 16, dtype=torch.bool)
    masks[0, 1, :3] = True
    masks[1, 2, 4:9] = True
    batch = views.ViewBatch(global_views, torch.zeros(0, 3, 3, 16, 16, dtype=torch.uint8), masks)
    job = make_job(options)
    _, _, found, _ = pretrain_utils.compute_losses(job, state, batch)
    mean, std = (torch.tensor(getattr(options, f"aug_{name}")).view(3, 1, 1) for name in ("mean", "std"))
    images = (global_views.float() / 255 - mean) / std
    expected = 0.0
    for view, image in ((0, 1), (1, 2)):
        place = masks[view, image]
        taught = state.teacher.head(state.teacher.backbone.encode(images[view, [image]])[0, 1:])[place]
        learned = state.student.head(state.student.backbone.encode(images[view, [image]], masks[view, [image]])[0, 1:])
        target = (taught / options.teacher_temp).softmax(-1)
        expected += -(target * (learned[place] / options.student_temp).log_softmax(-1)).sum(-1).mean() / 6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        state.targets["patch"].center, 0.1 * state.teacher.head(state.teacher.encode(global_views)[:, :, 1:]).mean((0, 1, 2)),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_a_step_freezes_the_last_layer_clips_and_weighs_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    options = apply_preset(pretrain_utils.PretrainOptions(preset="small", algorithm="ibot"))
    options = lct.dataclasses.replace(options, clip_grad_norm=1e-3, freeze_last_layer_epochs=1.0, num_local_crops=1)
    job = make_job(options, schedule=pretrain_utils.Schedule(options, steps_per_epoch=1))
    state = pretrain_utils.build_state(options, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    crops = (
        torch.randint(0, 256, (n, 6, 3, side, side), dtype=torch.uint8, generator=generator)
        for n, side in ((2, 32), (1, 16))
    )
    batch = views.ViewBatch(*crops, torch.rand(2, 6, 16, generator=generator) < 0.3)
    before = {name: value.clone() for name, value in state.student.named_parameters()}
    koleo_loss, spread = losses.koleo_loss, []
    monkeypatch.setattr(losses, "koleo_loss", lambda tokens: spread.append(koleo_loss(tokens)) or spread[-1])
    figures = dict(zip(pretrain_utils.TALLY, pretrain_utils.train_step(job, state, batch).tolist(), strict=True))
    assert len({value.item() for value in spread}) == 2, "of both global views"
    weighted = figures["loss_class"] + 0.3 * figures["loss_patch"] + 0.1 * figures["koleo"]
    assert figures["loss"] == pytest.approx(weighted) and figures["loss_patch"] > 0 and figures["koleo"] != 0
    gradients = {name: p.grad for name, p in state.student.named_parameters() if p.grad is not None}
    assert "head.prototypes" not in gradients and "head.mlp.0.weight" in gradients
    assert figures["grad_norm"] > 0.01  # as it was
    assert sum(g.square().sum() for g in gradients.values()).sqrt() == pytest.approx(1e-3, rel=0.01)
    changed = {name for name, value in state.student.named_parameters() if not torch.equal(value, before[name])}
    assert "head.prototypes" not in changed and "backbone.mask_token" in changed
    pretrain_utils.train_step(job, state, batch)  # the second epoch
    assert not torch.equal(state.student.head.prototypes, before["head.prototypes"])
    assert (state.step, state.batches) == (2, 2)


def test_it_is_the_teacher_that_is_judged() -> None:
    options = apply_preset(pretrain_utils.PretrainOptions(preset="small"))
    state = pretrain_utils.build_state(options, torch.device("cpu"))
    with torch.no_grad():
        for parameter in state.student.parameters():
            parameter.zero_()
    held_out = make_views()
    pairs = torch.cat([held_out.collate([held_out[views.ViewKey(0, n)] for n in range(4)]).global_views] * 3, dim=1)
    pixels = pairs[0]
    labelled = pretrain_utils.Data(None, None, "", data.LabelledImages(pixels, np.arange(12) % 4, ""), None)
    job = make_job(options, data=labelled, held_out_views=pairs[:, :4])
    figures = pretrain_utils.evaluate(job, state)
    first, second = (state.teacher.encode(part[None, :4])[0, :, 0] for part in pairs)
    assert figures["retrieval"] == measures.two_view_retrieval(first, second)
    answers = (state.teacher.head(torch.cat([first, second])) / options.teacher_temp).softmax(-1)
    assert figures["information"] == pytest.approx(losses.mutual_information(answers), rel=1e-4)
    assert figures["knn_class"] == figures["knn_patch"] == 1.0  # each crop stands there three times
    patches = state.teacher.encode(pixels[None])[0, :, 1:]
    torch.testing.assert_close(pretrain_utils.embed(job, state.teacher, pixels)[1], patches.mean(dim=1))


# --- schedules


def test_schedules_count_optimizer_steps() -> None:
    options = pretrain_utils.PretrainOptions(
        epochs=10, warmup_epochs=1.5, learning_rate=0.1, min_lr=0.001, teacher_momentum_base=0.9,
        teacher_momentum_final=0.99, freeze_last_layer_epochs=0.5,
    )  # fmt: skip
    schedule = pretrain_utils.Schedule(options, steps_per_epoch=20)
    rates = [schedule.learning_rate(step) for step in range(200)]
    assert rates[:30] == pytest.approx([0.1 * (step + 1) / 30 for step in range(30)])
    assert rates[115] == pytest.approx(0.001 + 0.099 / 2) and rates[-1] == pytest.approx(0.001, abs=1e-4)
    assert (np.diff(rates[30:]) < 0).all()
    assert schedule.momentum(0) == pytest.approx(0.9) and schedule.momentum(100) == pytest.approx(0.945)
    assert schedule.momentum(200) == pytest.approx(0.99)
    assert [schedule.freezes_last_layer(step) for step in (0, 9, 10)] == [True, True, False]


# --- views


def make_views(seed: int = 0, **changes: float) -> views.ViewDataset:
    images = views.Images(
        [f"{n}" for n in range(4)], np.stack([np.asarray(draw_image(n, 5, side=40)) for n in range(4)])
    )
    options = pretrain_utils.PretrainOptions(image_size=32, local_crop_size=16, patch_size=8, **changes)
    return views.ViewDataset(images, options.augmentation, seed, 4, 0.3)


def test_views_are_a_function_of_seed_epoch_and_index() -> None:
    def draw(seed: int, *key: int) -> list[bytes]:
        return [part.tobytes() for part in make_views(seed)[views.ViewKey(*key)]]

    expected = draw(0, 1, 2)
    np.random.seed(3)
    torch.manual_seed(3)
    assert draw(0, 1, 2) == expected
    drawn = [draw(seed, epoch, index) for seed in (0, 1) for epoch in (1, 2, 3) for index in (1, 2)]
    global_views, local_views, masks = (len(set(part)) for part in zip(*drawn, strict=True))
    assert (global_views, local_views) == (12, 12) and masks > 6  # every second view has none
    samples = [make_views()[views.ViewKey(1, index)] for index in (1, 2)]
    batch = views.ViewDataset.collate(samples)
    for number, images in enumerate((batch.global_views, batch.local_views)):
        for index, sample in enumerate(samples):
            assert np.array_equal(images[:, index], sample[number].transpose(0, 3, 1, 2)), "upright, channels first"


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    batches = views.EpochBatches(23, 5, seed=1, is_shuffled=True)
    orders = []
    for epoch in (1, 2):
        batches.epoch = epoch
        orders.append([key.index for batch in batches for key in batch])
        assert len(set(orders[-1])) == len(orders[-1]) == 20 and {key.epoch for batch in batches for key in batch} == {
            epoch
        }
    assert orders[0] != orders[1]
    batches.first = 3
    assert [key.index for batch in batches for key in batch] == orders[1][15:]
    batches.is_shuffled, batches.first = False, 0
    assert [key.index for batch in batches for key in batch] == list(range(20))


def test_blur_and_solarisation_do_what_they_say() -> None:
    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    how = {"image_size": 224, "local_crop_size": 8, "num_local_crops": 0}
    scale = (1.0, 1.0)
    plain, blurred, solarised = (
        views.Augmentation(**how, global_crop_scale=scale, local_crop_scale=scale, **more).draw_view(
            image, 224, scale, np.random.default_rng(4)
        ).astype(int)
        for more in ({}, {"gaussian_blur_prob": 1.0}, {"solarize_prob": 1.0})
    )  # fmt: skip
    assert blurred.std() < 0.8 * plain.std() and abs(blurred.mean() - plain.mean()) < 3
    np.testing.assert_array_equal(solarised, np.where(plain >= 128, 255 - plain, plain))
    blur = views.Augmentation(**how, global_crop_scale=scale, local_crop_scale=scale, gaussian_blur_prob=1.0)
    small = image[:, :, :28, :28]
    blurred = blur.draw_view(small, 28, scale, np.random.default_rng(4))
    assert blurred.std() > 0.9 * small.float().std(), "as of a view of 224 px that is shrunk"


def test_colours_change_as_torchvision_changes_them() -> None:
    """One matrix for brightness, contrast and saturation; hue leaves gray as it is and turns the rest."""
    from torchvision.transforms.v2 import functional as reference

    rng = np.random.default_rng(0)
    view = rng.integers(90, 160, (16, 16, 3), dtype=np.uint8)  # nothing is clipped on the way
    tensor = torch.from_numpy(view).permute(2, 0, 1).float() / 255
    how = views.Augmentation(16, 8, 0, (1.0, 1.0), (1.0, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    for jitter in ((0.3, 0, 0, 0), (0, -0.5, 0, 0), (0, 0, 0.5, 0), (0.2, 0.3, -0.4, 0)):
        matrix = how._colour_matrix(view, np.array(jitter, dtype=float), is_gray=False)
        found = view @ matrix[:, :3].T + matrix[:, 3]
        brightness, contrast, saturation = 1 + 0.4 * np.array(jitter[:3])
        expected = reference.adjust_brightness(tensor, brightness)
        expected = reference.adjust_saturation(reference.adjust_contrast(expected, contrast), saturation)
        np.testing.assert_allclose(found, expected.permute(1, 2, 0).numpy() * 255, atol=1.0)
    matrix = how._colour_matrix(view, np.array([0, 0, 0, 1.0]), is_gray=False)
    np.testing.assert_allclose(matrix[:, :3] @ np.full(3, 99.0) + matrix[:, 3], 99.0, atol=0.5)
    assert not np.allclose(matrix[:, :3] @ [200.0, 50.0, 50.0], [200.0, 50.0, 50.0], atol=5)
    gray = how._colour_matrix(view, np.zeros(4), is_gray=True)
    np.testing.assert_allclose(gray[:, :3] @ [10.0, 20.0, 30.0], np.full(3, views.LUMA @ [10, 20, 30]))


def test_crops_have_the_area_and_place_that_is_asked_for() -> None:
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0] = np.arange(64)[None] * 4
    ramp[..., 1] = np.arange(64)[:, None] * 4
    image = views.Images(["ramp.png"], ramp[None]).read(0)
    how = views.Augmentation(16, 8, 0, (0.2, 0.3), (0.2, 0.3), hflip_prob=0.5)
    areas, mirrored, lefts = [], [], []
    for number in range(300):
        view = how.draw_view(image, 16, (0.2, 0.3), np.random.default_rng(number)).astype(float)
        across, down = view[8, -1, 0] - view[8, 0, 0], view[-1, 8, 1] - view[0, 8, 1]
        areas.append(abs(across) * down / (15 / 16 * 256) ** 2)
        mirrored.append(across < 0)
        lefts.append(min(view[8, 0, 0], view[8, -1, 0]))
    assert 0.18 < min(areas) < 0.22 and 0.28 < max(areas) < 0.33
    assert 0.4 < np.mean(mirrored) < 0.6
    assert min(lefts) < 10 and max(lefts) > 100


def test_masks_are_blocks_of_the_share_that_is_asked_for() -> None:
    masks = np.stack([views.draw_block_mask(np.random.default_rng(n), 8, 0.3) for n in range(600)])
    shares = masks.mean(1)[masks.any(1)]
    assert 0.42 < masks.any(1).mean() < 0.58  # every second view
    assert 0.25 < shares.mean() < 0.32 and shares.min() < 0.15 and shares.max() <= 0.52
    together = masks.reshape(-1, 8, 8)[masks.any(1)]
    neighbours = (together[:, :, 1:] & together[:, :, :-1]).sum() / together.sum()
    assert neighbours > 0.5  # 0.26 if they lay at random
    for ratio in (0.05, 0.7):
        masks = np.stack([views.draw_block_mask(np.random.default_rng(n), 14, ratio) for n in range(300)])
        assert masks.mean(1)[masks.any(1)].mean() == pytest.approx(ratio, abs=0.02)
    masks = np.stack([views.draw_block_mask(np.random.default_rng(n), 14, 0.05) for n in range(600)])
    sides = np.stack([masks.reshape(-1, 14, 14).any(axis).sum(1) for axis in (1, 2)], axis=1)
    blocks = sides[masks.any(1) & (masks.sum(1) == sides.prod(1))]  # single ones
    assert (blocks.max(1) >= 2 * blocks.min(1)).mean() > 0.25, "they are not square"


# --- measures


def test_retrieval_and_neighbours_equal_a_search_by_hand() -> None:
    rng = np.random.default_rng(0)
    first = torch.from_numpy(rng.normal(size=(20, 6)) + 9).float()  # a mean that hides all else
    second = first + 0.1 * torch.from_numpy(rng.normal(size=(20, 6))).float()
    assert measures.two_view_retrieval(first, second) == 1.0
    assert measures.two_view_retrieval(first, second.flip(0)) < 0.3
    centers = rng.normal(size=(4, 6))
    labels = rng.integers(0, 4, 60)
    features = (centers[labels] + 0.8 * rng.normal(size=(60, 6))) * [1, 1, 1, 1, 1, 100]
    standard = (features[:40] - features[:40].mean(0)) / features[:40].std(0)
    queries = (features[40:] - features[:40].mean(0)) / features[:40].std(0)
    right = []
    for query, label in zip(queries, labels[40:], strict=True):
        cosines = standard @ query / np.linalg.norm(standard, axis=1) / np.linalg.norm(query)
        votes = np.zeros(4)
        for near in np.argsort(-cosines)[:5]:
            votes[labels[near]] += math.exp(cosines[near] / 0.07)
        right.append(votes.argmax() == label)
    found = measures.knn_accuracy(features[:40], labels[:40], features[40:], labels[40:])
    assert found == pytest.approx(np.mean(right)) and 0.3 < found < 1
    alone = measures.knn_accuracy(np.eye(4), np.arange(4), None, None)
    assert alone == 0.0  # nothing votes for itself
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 5, 4), dtype=np.uint8))
    counts = [np.histogramdd(image.flatten(1).T.numpy(), bins=8, range=[(0, 256)] * 3)[0].ravel() for image in images]
    np.testing.assert_allclose(measures.colour_features(images), np.sqrt(np.stack(counts) / 20), rtol=1e-6)


# --- runs


def test_a_run_leaves_what_the_documentation_says(finished: Path, crops: Path) -> None:
    """Written from tools/README.md alone."""
    run = finished / "run"
    params = json.loads((run / "params.json").read_text("utf-8"))
    assert {"model", "augmentation", "dataset", "paths", "training", "experiment"} <= params.keys()
    assert params["model"]["geometry"] == {
        "image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 4.0
    }  # fmt: skip
    assert params["experiment"] == {"name": "first", "notes": None, "tags": ["a", "b"]}
    assert params["paths"]["train_dir"] == [str(crops)] and params["dataset"]["images"] == 24
    assert params["augmentation"]["aug_brightness"] == 0.4
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    iterations = [record for record in records if record["event"] == "iteration"]
    assert [record["step"] for record in iterations] == [1, 2, 3, 4, 5, 6]
    assert all(record["loss"] > 0 and record["loss_patch"] >= 0 and "lr" in record for record in iterations)
    saved = torch.load(run / "checkpoint_last.pt", weights_only=True)
    assert iterations[-1]["lr"] == saved["optimizer"]["param_groups"][0]["lr"], "that of the step, not of the next"
    ends = [record for record in records if record["event"] == "epoch_end"]
    assert [record["epoch"] for record in ends] == [1, 2, 3]
    for record in ends:
        steps = [item["loss"] for item in iterations if item["epoch"] == record["epoch"]]
        assert record["loss"] == pytest.approx(np.mean(steps))
    bests = [record for record in records if record["event"] == "best"]
    values = [record["knn_class"] for record in ends]
    assert bests[0]["epoch"] == 1 and bests[-1]["value"] == max(values) and bests[-1]["metric"] == "knn_class"
    artifacts = json.loads((run / "artifacts.json").read_text("utf-8"))["artifacts"]
    assert [entry["kind"] for entry in artifacts] == ["checkpoint_last", "checkpoint_best", "backbone"]
    for entry in artifacts:
        data = Path(entry["path"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["size"])
        assert entry["metadata"]
    assert sorted(path.name for path in run.iterdir() if path.name[0] != ".") == [
        "artifacts.json", "checkpoint_best.pt", "checkpoint_last.pt", "metrics.jsonl", "params.json", "train.log"
    ]  # fmt: skip


def test_the_export_is_the_best_teacher_with_its_geometry(finished: Path, tmp_path: Path) -> None:
    best = torch.load(finished / "run" / "checkpoint_best.pt", weights_only=True)
    odd_path = tmp_path / "with:colon.pt"
    odd_path.write_bytes((finished / "backbone.pt").read_bytes())
    model = models.load_dinov2_backbone(f"file::{odd_path}:slt_vitsmall_patch16")
    assert not model.training and model.geometry["depth"] == 1
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, best["teacher"][f"backbone.{key}"], rtol=0, atol=0)
    assert any(not torch.equal(v, best["student"][f"backbone.{k}"]) for k, v in model.state_dict().items())
    metadata = json.loads((finished / "backbone.json").read_text("utf-8"))
    assert metadata == torch.load(finished / "backbone.pt", weights_only=True)["metadata"]
    assert metadata["epoch"] == best["best"]["epoch"] and metadata["algorithm"] == "ibot"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("backbone.pt", "names no file"),
        ("file::{}/none.pt:slt_vitsmall_patch16", "there is no such file"),
        ("file::{}/backbone.pt:dinov2_vits14", "dinov2_vits14 is no model"),
        ("file::{}/lacking.pt:slt_vitsmall_patch16", "cls_token none instead of"),
        ("file::{}/pickle.pt:slt_vitsmall_patch16", "cannot be read"),
        ("file::{}/run/checkpoint_last.pt:slt_vitsmall_patch16", "is no exported backbone: it has no model"),
        ("file::{}/text.pt:slt_vitsmall_patch16", "metadata.geometry.depth is of type str, not int"),
        ("file::{}/heads.pt:slt_vitsmall_patch16", "its geometry makes no model: integer modulo by zero"),
        ("file::{}/width.pt:slt_vitsmall_patch16", "its geometry makes no model: "),
        ("file::{}/number.pt:slt_vitsmall_patch16", "model.cls_token is of type int, not Tensor"),
        ("file::{}/nan.pt:slt_vitsmall_patch16", "holds values that are not finite, in norm.bias"),
    ],
)
def test_other_backbones_are_refused_by_name(finished: Path, spec: str, said: str) -> None:
    changes = {
        "lacking": ("model", {"cls_token": None}),
        "text": ("geometry", {"depth": "1"}),
        "heads": ("geometry", {"num_heads": 0}),
        "width": ("geometry", {"embed_dim": -16}),
        "number": ("model", {"cls_token": 1}),
        "nan": ("model", {"norm.bias": torch.full((16,), math.nan)}),
    }
    for name, (part, values) in changes.items():
        payload = torch.load(finished / "backbone.pt", weights_only=True)
        place = payload["model"] if part == "model" else payload["metadata"]["geometry"]
        place |= values
        payload["model"] = {key: value for key, value in payload["model"].items() if value is not None}
        torch.save(payload, finished / f"{name}.pt")
    (finished / "pickle.pt").write_bytes(pickle.dumps(Hostile(finished / "executed")))
    with pytest.raises(lct.UserError) as caught:
        models.load_dinov2_backbone(spec.format(finished))
    assert said in str(caught.value)
    assert not (finished / "executed").exists()


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_streams_are_fused_frame_by_frame_and_what_was_not_seen_does_not_count(finished: Path) -> None:
    backbone = models.load_dinov2_backbone(f"file::{finished / 'backbone.pt'}:slt_vitsmall_patch16")
    torch.manual_seed(0)
    names = ("face", "hand_left", "hand_right")
    encoder = models.MultiStreamEncoder(backbones=dict.fromkeys(names, backbone), d_model=12, pose_dim=6).eval()
    crops = {name: torch.randn(2, 3, 3, 16, 16) for name in names}
    pose = torch.randn(2, 3, 3, 2)
    masks = {"hand_left": torch.tensor([[True, True, False], [True, True, True]])}
    fused = encoder(**crops, pose=pose, masks=masks)
    assert fused.shape == (2, 3, 12)
    for name in names:
        changed = dict(crops)
        changed[name] = crops[name].clone()
        changed[name][0, 2] += 1
        other = encoder(**changed, pose=pose, masks=masks)
        assert torch.equal(other[0, 2], fused[0, 2]) == (name == "hand_left")
        torch.testing.assert_close(other[:, :2], fused[:, :2])
    assert not torch.allclose(encoder(**crops, pose=pose + 1, masks=masks), fused)
    with pytest.raises(ValueError, match="pose is None, but the encoder was built with it"):
        encoder(**crops)


def test_dino_on_real_crops_gains_what_it_should(shared_data: Path, tmp_path: Path) -> None:
    """235 steps of the preset, k-NN by .035 and .025 better than random weights."""
    command = [sys.executable, REPO / "tests" / "benchmarks" / "pretrain.py", "quick"]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_ibot_has_learned_tells_classes_apart_that_it_was_never_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """72 steps of the preset on drawings of eight classes: k-NN with other drawings, random weights .40."""
    classes = {str(kind): 24 for kind in range(8)}
    seen = make_dataset(tmp_path / "seen", classes, side=48)
    other = make_dataset(tmp_path / "other", classes, seed=1, side=48)
    places = ("--train-dir", seen, "--knn-dir", seen, other, "--output-dir", tmp_path / "run")
    flags = "--preset small --epochs 12 --algorithm ibot --device cpu".split()
    assert run_main("pretrain_dino_face", *places, *flags) == 0
    records = lct.read_events(tmp_path / "run")
    start = next(record for record in records if record["event"] == "start_end")
    end = [record for record in records if record["event"] == "epoch_end"][-1]
    gains = {name: end[name] - start[name] for name in ("knn_class", "knn_patch", "retrieval")}
    assert gains["knn_class"] > 0.2 and gains["knn_patch"] > 0.1 and gains["retrieval"] > 0.02, gains
    assert end["collapse"] is None and "collapsing" not in capsys.readouterr().out


def read_run(out: Path) -> dict[str, object]:
    """Return all that must not depend on interruptions."""
    content: dict[str, object] = {}
    for name in ("last", "best"):
        payload = torch.load(out / f"checkpoint_{name}.pt", weights_only=True)
        content[name] = json.dumps(
            payload, sort_keys=True, default=lambda t: hashlib.sha256(t.numpy().tobytes()).hexdigest()
        )
    records = lct.read_events(out)
    kinds = ("iteration", "epoch_end", "best", "start_end")
    content["history"] = [{k: v for k, v in r.items() if k != "time"} for r in records if r["event"] in kinds]
    artifacts = json.loads((out / "artifacts.json").read_text("utf-8"))["artifacts"]
    content["artifacts"] = [(entry["kind"], entry["metadata"]) for entry in artifacts]
    return content


ALGORITHMS = {
    "ibot": ("--algorithm", "ibot", "--koleo-weight", "0.1"),
    "dino": ("--use-sinkhorn", "--num-workers", "0"),
}
PLANS = {
    "dino": [
        kill("pretrain_utils.train_step", 2),
        kill("lct.write_checkpoint", 1, when="after"),  # the best of the first epoch, without a last one
        kill("lct.write_checkpoint", 3, when="after"),  # of the second epoch
        kill("lct.os.write", 6, when="half"),
    ],
    "ibot": [
        kill("lct.RunDirectory.event", 5),
        kill("pretrain_utils.train_step", 3, number=signal.SIGINT),
        kill("lct.write_checkpoint", 1, when="after"),
        kill("pretrain_utils.evaluate", 1, number=signal.SIGTERM),
    ],
}


@pytest.mark.parametrize("algorithm", ["dino", "ibot"])
def test_killed_anywhere_it_goes_on_as_if_nothing_had_happened(
    algorithm: str, crops: Path, nursery: Nursery, tmp_path: Path
) -> None:
    def go(out: str, *plans: dict) -> tuple[int, str]:
        places = ("pretrain_dino_face", "--train-dir", crops, "--output-dir", tmp_path / out)
        return nursery.run(*places, *TINY, "--knn-dir", crops, *ALGORITHMS[algorithm], plans=plans)

    assert go("straight")[0] == 0
    for plan in PLANS[algorithm]:
        code, text = go("parts", plan)
        expected = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[plan["signal"]]
        assert code == expected, (plan, text)
    code, text = go("parts")
    assert code == 0 and "resumed at" in text, text
    straight, parts = read_run(tmp_path / "straight"), read_run(tmp_path / "parts")
    assert straight == parts
    assert len(straight["history"]) == 6 + 3 + 1 + sum(r["event"] == "best" for r in straight["history"])


def test_neither_workers_nor_the_death_of_one_change_anything(crops: Path, nursery: Nursery, tmp_path: Path) -> None:
    assert start(crops, tmp_path / "none", "--source-size", 0) == 0
    places = ("pretrain_dino_face", "--train-dir", crops, "--output-dir", tmp_path / "two", *TINY, "--source-size", 0)
    flags = ("--num-workers", 1, "--dataset-persistent-workers", "--dataset-pin-memory")
    code, text = nursery.run(*places, *flags, plans=[do("pretrain_utils.train_step", 3, worker_signal=signal.SIGKILL)])
    assert code == 0 and "a loader worker was killed" in text, text
    assert read_run(tmp_path / "none") == read_run(tmp_path / "two")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_vanish_end_the_run_with_one_sentence(num_workers: int, nursery: Nursery, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", {"one": 24})
    places = ("pretrain_dino_face", "--train-dir", folder, "--output-dir", tmp_path / "run", *TINY, "--source-size", 0)
    plans = [do("pretrain_utils.evaluate", 1, shell=f"rm -r '{folder}'")]
    code, text = nursery.run(*places, "--num-workers", num_workers, plans=plans)
    assert code == 2 and "cannot be read any more" in text and "Traceback" not in text, text


def test_interrupted_with_ctrl_c_it_leaves_a_checkpoint_of_the_step(
    crops: Path, nursery: Nursery, tmp_path: Path
) -> None:
    places = ("pretrain_dino_face", "--train-dir", crops, "--output-dir", tmp_path / "run")
    code, text = nursery.run(*places, *TINY, plans=[kill("pretrain_utils.train_step", 3, number=signal.SIGINT)])
    assert code == 130 and "the same command continues" in text
    payload = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    assert (payload["epoch"], payload["batches"], payload["step"]) == (1, 1, 3)  # the step is finished
    events = [record["event"] for record in lct.read_events(tmp_path / "run")]
    assert events.count("interrupted") == 1


def test_interrupted_while_it_exports_it_says_so(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    interrupt_writing(monkeypatch, "teacher.pt")
    places = ("pretrain_dino_face", "--train-dir", crops, "--output-dir", tmp_path / "run")
    assert run_main(*places, *TINY, "--epochs", 1, "--export-backbone", tmp_path / "teacher.pt") == 143
    assert "interrupted (SIGTERM); the same command continues" in capsys.readouterr().err
    assert torch.load(tmp_path / "teacher.pt", weights_only=True)["metadata"]["epoch"] == 1


def test_artifacts_are_described_as_they_are_after_a_kill_and_a_second_export(
    finished: Path, crops: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """Killed between the last checkpoint and its description; then exported twice; then continued in another folder."""
    places = ("pretrain_dino_face", "--train-dir", crops, *TINY, "--epochs", 1, "--output-dir", tmp_path / "run")
    exports = [("--export-backbone", tmp_path / name) for name in ("teacher_1.5", "teacher_1.6")]
    assert nursery.run(*places, *exports[0], plans=[kill("pretrain_utils.write_artifacts", 1)])[0] == -9
    names = ["checkpoint_last.pt", "checkpoint_best.pt"]
    moved = ("--output-dir", tmp_path / "moved", "--resume", tmp_path / "run")
    both = [*names, "teacher_1.6", "teacher_1.5"]
    calls = [((), names), (exports[0], [*names, "teacher_1.5"]), (exports[1], both), ((), both)]
    for flags, expected in [*calls, ((*moved, *exports[1]), [*names, "teacher_1.6"])]:
        assert run_main(*places, *flags) == 0
        entries = json.loads(
            (tmp_path / ("moved" if moved[1] in flags else "run") / "artifacts.json").read_text("utf-8")
        )
        assert [Path(entry["path"]).name for entry in entries["artifacts"]] == expected
        for entry in entries["artifacts"]:
            assert hashlib.sha256(Path(entry["path"]).read_bytes()).hexdigest() == entry["sha256"]
    assert all((tmp_path / f"{name}.json").is_file() for name in ("teacher_1.5", "teacher_1.6"))


def test_the_best_is_chosen_by_retrieval_and_never_by_the_loss(
    crops: Path, tmp_path: Path, patch_used: Callable
) -> None:
    values = iter([0.1, 0.5, 0.9, 0.9, 0.7])  # of equal ones the latest
    patch_used(pretrain_utils, "evaluate", lambda job, state: {"retrieval": next(values), "information": 3.0})
    assert start(crops, tmp_path / "run", "--epochs", 4) == 0
    best = torch.load(tmp_path / "run" / "checkpoint_best.pt", weights_only=True)["best"]
    assert best == {"metric": "retrieval", "value": 0.9, "epoch": 3, "step": 6}


def test_retrieval_is_measured_with_one_yardstick_whatever_is_trained_with(crops: Path, tmp_path: Path) -> None:
    flags = "--aug-solarize-prob 1 --aug-grayscale-prob 1 --global-crop-scale 0.1 0.2".split()
    assert (
        start(crops, tmp_path / "mild", "--epochs", 1) == start(crops, tmp_path / "strong", "--epochs", 1, *flags) == 0
    )
    first, other = (
        next(record for record in lct.read_events(tmp_path / name) if record["event"] == "start_end")
        for name in ("mild", "strong")
    )
    assert (first["retrieval"], first["information"]) == (other["retrieval"], other["information"])


def test_a_collapse_is_said_and_ends_the_run_only_if_asked(
    crops: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, patch_used: Callable
) -> None:
    """Answers that are the same for all images; features that tell less than at random."""
    figures = {
        "retrieval": 0.5,
        "information": 0.2 * math.log(4),
    }  # two held-out crops in two views, fewer than outputs
    patch_used(pretrain_utils, "evaluate", lambda job, state: figures if state.step else {**figures, "retrieval": 0.4})
    assert start(crops, tmp_path / "goes_on", "--warmup-epochs", 0) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3 and all("collapsing: the teacher's answers hold 0.28 nats" in line for line in warnings)
    assert all("--use-sinkhorn" in line and "retrieval" not in line for line in warnings)
    assert all(line.endswith(", with --overwrite or in another --output-dir") for line in warnings)
    assert start(crops, tmp_path / "stops", "--stop-on-collapse", "--warmup-epochs", 0) == 3
    records = lct.read_events(tmp_path / "stops")
    assert [r["epoch"] for r in records if r["event"] == "epoch_end"] == [1] and records[-1]["status"] == "diverged"
    figures = {"retrieval": 0.4, "information": 3.0}
    assert start(crops, tmp_path / "blind", "--warmup-epochs", 1) == 0
    said = capsys.readouterr().out
    assert (
        said.count("collapsing: retrieval 0.400 is not above that of the initial weights, 0.400") == 2
    )  # not while it warms up
    trained = ("--init-from", finished / "backbone.pt")
    assert start(crops, tmp_path / "on", "--warmup-epochs", 0, *trained, "--stop-on-collapse") == 0
    figures = {"retrieval": 1.0, "information": 0.4 * math.log(4)}
    patch_used(pretrain_utils, "evaluate", lambda job, state: figures)
    assert start(crops, tmp_path / "easy", "--stop-on-collapse", "--warmup-epochs", 0) == 0


def test_centring_collapses_and_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A real one: a centre that never moves, and a sharp teacher."""
    folder = make_dataset(tmp_path / "data", {"one": 40})
    flags = (
        "--teacher-temp 0.1 --student-temp 0.1 --center-momentum 1 --learning-rate 0.02 --warmup-epochs 0 --epochs 6"
    )
    assert start(folder, tmp_path / "run", *flags.split(), "--stop-on-collapse", "--teacher-momentum-base", 0.5) == 3
    assert "collapsing" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture, patch_used: Callable
) -> None:
    real = pretrain_utils.compute_losses

    def spoil(job: pretrain_utils.Job, state: pretrain_utils.State, batch: views.ViewBatch) -> tuple:
        figures = real(job, state, batch)
        return tuple(figure * (math.nan if state.step == 3 else 1.0) for figure in figures)

    patch_used(pretrain_utils, "compute_losses", spoil)
    assert start(crops, tmp_path / "run") == 3
    error = capsys.readouterr().err
    assert "the loss is not finite at step 4" in error and "with --overwrite or in another --output-dir" in error
    payload = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    assert payload["step"] == 2 and all(value.isfinite().all() for value in payload["student"].values())


def test_a_lack_of_memory_names_the_flags_of_this_tool(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture, patch_used: Callable
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    patch_used(pretrain_utils, "compute_losses", fail)
    assert start(crops, tmp_path / "run") == 2
    assert "lower --batch-size or --image-size, and start" in capsys.readouterr().err


def test_with_amp_it_computes_in_bf16_and_without_in_float32(crops: Path, tmp_path: Path, patch_used: Callable) -> None:
    used = []

    def stop(job: pretrain_utils.Job, *_: object) -> None:
        used.append(job.runtime.dtype)
        raise MemoryError

    patch_used(pretrain_utils, "compute_losses", stop)
    assert [start(crops, tmp_path / "run", *flags) for flags in ((), ("--amp",))] == [2, 2]
    assert used == [torch.float32, torch.bfloat16]


def test_a_run_can_start_from_an_export(crops: Path, finished: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*TINY, "--init-from", str(finished / "backbone.pt"), "--train-dir", str(crops), "--output-dir", "x"]
    options = lct.parse_options(pretrain_dino_face.FaceOptions, words, "pretrain_dino_face")
    state = pretrain_utils.build_state(options, torch.device("cpu"))
    exported = torch.load(finished / "backbone.pt", weights_only=True)["model"]
    for networks in (state.student, state.teacher):
        torch.testing.assert_close(networks.backbone.state_dict(), exported, rtol=0, atol=0, check_dtype=True)
    assert "warning" not in capsys.readouterr().out
    options = lct.parse_options(pretrain_dino_face.FaceOptions, [*words, "--aug-std", "1", "1", "1"], "x")
    pretrain_utils.build_state(options, torch.device("cpu"))
    said = capsys.readouterr().out
    assert "--aug-mean or --aug-std: std: [0.229, 0.224, 0.225] -> [1.0, 1.0, 1.0]" in said and "mean: " not in said


# --- options


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "run.toml"
    path.write_text(
        'train_dir = ["faces", "/abs"]\npreset = "small"\nepochs = 7\noutput_dir = "out"\n[dataset]\nbatch_size = 12\n'
        "num_workers = 1\npin_memory = true\npersistent_workers = true\n[augmentation]\nbrightness = 0.3\nmean = [0.5, 0.5, 0.5]\n"
        '[checkpointing]\nbest_name = "b.pt"\nhistory_file = "h.jsonl"\n[experiment]\nname = "n"\ntags = ["x", "y"]\n'
    )
    words = ["--config", str(path), "--epochs", "36", "--experiment-tag", "z", "--vit_depth", "2"]
    options = apply_preset(lct.parse_options(pretrain_dino_face.FaceOptions, words, "pretrain_dino_face"))
    assert (
        options.train_dir == (tmp_path / "sub" / "faces", Path("/abs"))
        and options.output_dir == tmp_path / "sub" / "out"
    )
    assert (options.epochs, options.batch_size, options.num_workers, options.vit_depth) == (36, 12, 1, 2)
    assert (options.dataset_pin_memory, options.dataset_persistent_workers) == (True, True)
    assert (options.aug_brightness, options.aug_mean, options.aug_contrast) == (0.3, (0.5, 0.5, 0.5), 0.2)
    assert (options.checkpoint_best_name, options.checkpoint_history_file) == ("b.pt", "h.jsonl")
    assert (options.experiment_name, options.experiment_tag) == ("n", ("z",))
    assert options.image_size == 32 and options.warmup_epochs == pytest.approx(3.6)
    assert options.origins["image_size"] == "--preset small"
    path = path.with_suffix(".json")
    refusals = {"learning_rat": r"is no known key\n  did you mean learning_rate"}
    refusals |= dict.fromkeys(("resume", "overwrite", "dry_run"), "belongs on the command line")
    for key, said in refusals.items():
        path.write_text(json.dumps({key: 1}))
        with pytest.raises(lct.UserError, match=f"{key}: {said}"):
            lct.parse_options(pretrain_dino_face.FaceOptions, ["--config", str(path)], "pretrain_dino_face")


def test_defaults_are_those_of_the_documentation() -> None:
    documented = (
        "--image-size 224 --patch-size 16 --vit-embed-dim 384 --vit-depth 12 --vit-num-heads 6 --vit-mlp-ratio 4.0"
        " --algorithm dino --epochs 10 --batch-size 32 --num-workers 0 --learning-rate 1e-3 --weight-decay 1e-4"
        " --warmup-epochs 1.0 --teacher-momentum-base 0.996 --teacher-momentum-final 1.0 --clip-grad-norm 1.0 --out-dim 1024"
        " --head-hidden-dim 2048 --patch-out-dim 256 --patch-mask-ratio 0.3 --patch-loss-weight 1.0 --student-temp 0.1"
        " --teacher-temp 0.04 --center-momentum 0.9 --global-crop-scale 0.4 1.0 --local-crop-scale 0.05 0.4"
        " --num-local-crops 4 --local-crop-size 96 --aug-brightness .4 --aug-contrast .4 --aug-saturation .2 --aug-hue .1"
        " --aug-color-jitter-prob .8 --aug-grayscale-prob .2 --aug-gaussian-blur-prob .5 --aug-solarize-prob .1"
        " --aug-hflip-prob .5 --checkpoint-best-name checkpoint_best.pt --checkpoint-last-name checkpoint_last.pt"
        " --checkpoint-history-file metrics.jsonl --seed 42 --log-interval 10 --head-bottleneck-dim 256"
    )
    assert lct.parse_options(pretrain_dino_face.FaceOptions, documented.split(), "x") == lct.parse_options(
        pretrain_dino_face.FaceOptions, [], "x"
    )
    assert set(PRESETS["small"]) <= {field.name for field in lct.option_fields(pretrain_dino_face.FaceOptions)}
    # And what is written but once.
    words = "--no-dataset-shuffle --use-sinkhorn --sinkhorn-iters 3 --koleo-weight 0.1 --aug-mean 0 0 0 --aug-std 1 1 1"
    options = lct.parse_options(pretrain_dino_face.FaceOptions, words.split(), "x")
    assert (options.dataset_shuffle, options.use_sinkhorn, options.koleo_weight) == (False, True, 0.1)


@pytest.mark.parametrize("name", ["pretrain_dino_face", "pretrain_dino_hands"])
def test_help_names_its_own_program(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_main(name, "--help")
    assert f"{name}.py" in capsys.readouterr().out.splitlines()[0]


def test_a_dry_run_shows_views_and_trains_nothing(crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert start(crops, tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "batch_size: 10" in said
    with Image.open(tmp_path / "run" / "views.png") as sheet:
        assert sheet.size == (5 * 64, 12 * 64)
    assert sorted(os.listdir(tmp_path / "run")) == ["views.png"]
    assert start(crops, tmp_path / "run", "--epochs", 1) == 0  # into the same folder
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert start(crops, tmp_path / "run", "--epochs", 1, "--dry-run") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


# --- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--train-dir {empty}", "holds no images"),
        ("--train-dir {one}", "holds one image"),
        ("--train-dir {none}", "does not exist"),
        (f"--train-dir {'a' * 256}", "aaa: File name too long"),
        ("--train-dir {text}", "is no image"),
        ("--train-dir {broken}", "7 of 13 images cannot be read, such as"),
        ("--batch-size 100", "is more than the 22 crops to train on"),
        ("--image-size 20", "20 px is not a multiple of patches of 8 px"),
        ("--local-crop-size 12", "12 px is not a multiple of patches of 8 px"),
        ("--vit-embed-dim 15", "15 dimensions are not a multiple of 2 heads"),
        ("--global-crop-scale 0.9 0.5", "begins above its end"),
        ("--warmup-epochs 5", "last longer than the training\n  lower --warmup-epochs"),
        ("--learning-rate 1e-7", "1e-06 is the higher one\n  lower --min-lr"),
        pytest.param(
            "--device cuda", "give --device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU")
        ),
        ("--checkpoint-best-name a/b.pt", "is not the name of a visible file"),
        ("--checkpoint-best-name checkpoint_last.pt", "name the same file"),
        ("--checkpoint-best-name views.png", "or one that every run has"),
        ("--output-dir {crops}", "lies inside the images"),
        ("--output-dir {one}", "is neither empty nor a run"),
        ("--output-dir {script}", "is neither empty nor a run"),
        ("--knn-dir {one}", "classes need two"),
        ("--knn-dir {crops}/.. {empty}", "empty: holds no folders of images"),
        ("--knn-dir {single}", "single: holds one crop of each class, and each is matched with the others"),
        ("--knn-dir {spoiled}", "spoiled: 2 of 3 images cannot be read"),
        ("--knn-dir {unread}", "unread: has readable crops of one class alone"),
        ("--resume", "there is no such checkpoint\n  start afresh with --overwrite, without --resume"),
        ("--resume {text}", "cannot be read as a checkpoint: File is not a zip file\n  start afresh with --overwrite"),
        ("--epochs many", "'many' is not a whole number"),
        ("--epoch 3", "did you mean --epochs"),
        ("--init-from {export}", "has another geometry: embed_dim: 16 -> 8"),
        ("--export-backbone {text}", "is no such file of this tool, and is not overwritten"),
        ("--export-backbone {described}", "described.json, beside --export-backbone: is no such file"),
        ("--export-backbone {text}/backbone.pt", "text.txt is not a folder that can be written to"),
        ("--export-backbone {run}", "is a file of the run itself"),
        ("--export-backbone {run}/metrics.jsonl", "is a file of the run itself"),
    ],
)
def test_bad_input_costs_one_sentence(
    flags: str, said: str, crops: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = {
        name: tmp_path / name
        for name in ("empty", "one", "none", "broken", "run", "spoiled", "single", "script", "unread")
    }
    for folder in ("empty", "one", "broken", "script"):
        places[folder].mkdir()
    places |= {"text": tmp_path / "text.txt", "crops": crops / "left", "export": finished / "backbone.pt"}
    places["text"].write_text("no image")
    (places["script"] / "config.json").write_text("{}")  # a run of lct_dino3.py
    (places["script"] / "metrics.jsonl").write_text('{"event": "epoch_end", "epoch": 1}\n')
    places["described"] = tmp_path / "described.pt"
    places["described"].with_suffix(".json").write_text("{}")
    draw_image(0, 1).save(places["one"] / "a.png")
    for number in range(13):
        draw_image(0, number).save(places["broken"] / f"{number:02}.png")
        if number >= 6:
            (places["broken"] / f"{number:02}.png").write_bytes(b"\x89PNG cut off")
    make_dataset(places["spoiled"], {"a": 2, "b": 1})
    make_dataset(places["single"], {"a": 1, "b": 1})
    make_dataset(places["unread"], {"a": 1, "b": 2})
    for name in ("spoiled/a", "spoiled/b", "unread/a"):
        (tmp_path / name / "0000.png").write_bytes(b"\x89PNG cut off")
    words = flags.format(**places).split()
    base = {"--train-dir": crops, "--output-dir": tmp_path / "run"}
    given = [word for flag, value in base.items() if flag not in words for word in (flag, value)]
    extra = ("--vit-embed-dim", 8) if "--init-from" in words else ()
    assert run_main("pretrain_dino_face", *TINY, *extra, *given, *words) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.splitlines()) <= 3, error
    assert places["text"].read_text() == "no image"


def test_a_few_unreadable_images_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_dataset(tmp_path / "data", {"one": 7})
    for name in ("broken.tiff", "cut.tiff"):
        (folder / "one" / name).write_bytes(b"II*\0 cut off")
    assert start(folder, tmp_path / "run", "--epochs", 1, "--batch-size", 5) == 0
    assert f"left out: {folder / 'one' / 'broken.tiff'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "params.json").read_text())["dataset"]["images"] == 5  # 2 are held out


def test_no_class_leaves_the_gallery_because_there_are_many_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "KNN_IMAGES", 4)
    folder = make_dataset(tmp_path / "data", {"many": 7, "rare": 1, "some": 4})
    options = PretrainOptions(image_size=16)
    gallery, paths, names = data.read_labelled(options, folder, None)
    assert names == ["many", "rare", "some"] and gallery.labels.tolist() == [0, 0, 0, 1, 2, 2]
    for path, pixels in zip(paths, gallery.pixels, strict=True):
        image = torch.from_numpy(lct.load_image(path))[None].permute(0, 3, 1, 2)
        assert np.array_equal(views.resize(image, 16), pixels.permute(1, 2, 0))


def test_a_run_with_other_settings_or_a_foreign_checkpoint_is_refused(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert start(crops, out, "--epochs", 1) == 0
    assert start(crops, out, "--epochs", 1, "--vit-depth", 2, "--log-interval", 3) == 2
    error = capsys.readouterr().err
    assert "vit_depth: 1 -> 2" in error and "log_interval" not in error and "--output-dir" in error
    saved = torch.load(out / "checkpoint_last.pt", weights_only=True)
    assert saved.keys() == {"format", *pretrain_utils.CHECKPOINT_FORM}, "a checkpoint without one of them is refused"
    del saved["optimizer"]["param_groups"][1:]
    torch.save(saved, out / "checkpoint_last.pt")
    assert start(crops, out, "--epochs", 1) == 2
    error = capsys.readouterr().err
    assert (
        "cannot be restored: loaded state dict has a different number of parameter groups" in error
        and "--output-dir" in error
    )
    (out / "checkpoint_last.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
    assert start(crops, out, "--epochs", 1) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err and not (tmp_path / "executed").exists()
    torch.save({"model": {}}, out / "checkpoint_last.pt")
    assert start(crops, out, "--epochs", 1) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
    assert start(crops, out, "--epochs", 1, "--resume", out / "checkpoint_best.pt") == 0
    assert start(crops, out, "--epochs", 1, "--overwrite") == 0
    assert len(list(tmp_path.glob("run.old-*"))) == 1
    capsys.readouterr()
    draw_image(0, 1).save(out / "mine.png")
    assert start(out / "mine.png", out, "--epochs", 1, "--overwrite") == 2
    assert "holds the images, which --overwrite would move aside" in capsys.readouterr().err
    (tmp_path / "run.toml").write_text(f'export_backbone = "{out}/sub/backbone.pt"')
    (out / "sub").mkdir()
    (out / "sub" / "backbone.json").write_text("{}")
    assert start(crops, out, "--epochs", 1, "--config", tmp_path / "run.toml") == 2
    assert f"beside {tmp_path / 'run.toml'}: export_backbone: is no such file" in capsys.readouterr().err
    (out / "checkpoint_last.pt").unlink()
    assert start(crops, out, "--epochs", 1, "--resume") == 2
    assert f"give --resume {out / 'checkpoint_best.pt'}" in capsys.readouterr().err
    assert start(crops, out, "--epochs", 1) == 0  # what has been trained is never begun again unasked
    assert "resumed at epoch 1" in capsys.readouterr().out
    assert start(crops, out, "--epochs", 1, "--init-from", out / "checkpoint_best.pt", "--overwrite") == 2
    assert "holds the file of --init-from, which --overwrite would move aside" in capsys.readouterr().err
    monkeypatch.chdir(out)
    assert start(crops, Path(), "--epochs", 1, "--overwrite") == 2
    assert "is the current folder, which --overwrite would move aside" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert start(crops, out, "--epochs", 1, "--batch-size", 100, "--overwrite") == 2
    assert (out / "checkpoint_best.pt").exists()  # moved aside only once the new run can begin
    assert start(crops, out, "--epochs", 1, "--vit-depth", 2, "--overwrite", "--dry-run") == 0
    assert (out / "checkpoint_best.pt").exists()


def test_a_run_continues_only_with_its_own_labelled_crops_and_its_own_best(
    crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    labelled = make_dataset(tmp_path / "labelled", {"a": 3, "b": 3})
    assert start(crops, out, "--epochs", 1, "--knn-dir", labelled) == 0
    labelled.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*"):
        os.utime(path, (0, 0))  # as a copy may have other times
    assert start(crops, out, "--epochs", 1, "--knn-dir", tmp_path / "moved") == 0
    assert start(crops, out, "--epochs", 1, "--knn-dir", crops) == 2
    assert f"{out / 'checkpoint_last.pt'}: belongs to a run with other" in (error := capsys.readouterr().err)
    assert "labelled: " in error and "data: " not in error
    assert start(crops, other, "--epochs", 1, "--seed", 1, "--knn-dir", tmp_path / "moved") == 0
    assert start(crops, other, "--epochs", 1, "--knn-dir", tmp_path / "moved", "--resume", out) == 2
    assert (
        f"{other / 'checkpoint_best.pt'}: belongs to a run" in (error := capsys.readouterr().err) and "seed: 1" in error
    )
    os.truncate(out / "checkpoint_best.pt", 3000)
    assert start(crops, out, "--epochs", 1, "--knn-dir", tmp_path / "moved") == 2
    assert "checkpoint_best.pt: cannot be read" in (error := capsys.readouterr().err) and "delete it; the same" in error


def test_what_is_ahead_of_a_named_checkpoint_is_set_aside(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the best of the epochs that are given up would be exported, and the last of them be overwritten."""
    out, older, values = tmp_path / "run", tmp_path / "older.pt", iter((0.5, 0.4, 0.6, 0.4, 0.3))
    save_last, evaluate = pretrain_utils.save_last, pretrain_utils.evaluate

    def save(job: pretrain_utils.Job, state: pretrain_utils.State) -> None:
        save_last(job, state)
        if state.epoch == 1 and not older.exists():
            shutil.copy(out / "checkpoint_last.pt", older)

    monkeypatch.setattr(pretrain_utils, "save_last", save)
    monkeypatch.setattr(
        pretrain_utils, "evaluate", lambda job, state: evaluate(job, state) | {"retrieval": next(values)}
    )
    assert start(crops, out, "--epochs", 2) == 0

    def epochs_of(pattern: str) -> dict[str, int]:
        paths = out.glob(pattern)
        return {path.name.split(".")[0]: lct.load_checkpoint(path, {"epoch": int})["epoch"] for path in paths}

    assert epochs_of("*.pt") == {"checkpoint_last": 2, "checkpoint_best": 2}
    assert start(crops, out, "--epochs", 2, "--resume", older) == 0
    assert "ahead of older.pt: checkpoint_best.pt, checkpoint_last.pt" in (out / "train.log").read_text("utf-8")
    assert epochs_of("*.old-*") == {"checkpoint_last": 2, "checkpoint_best": 2}
    assert epochs_of("*.pt") == {"checkpoint_last": 2, "checkpoint_best": 1}
    found = [record["value"] for record in lct.read_events(out) if record["event"] == "best"]
    assert found == [0.4, 0.4], "none of what was given up"


# --- together with the rest


@pytest.mark.parametrize(
    ("mode", "flag"), [("--freeze_backbone", "--backbone_weights"), ("--no-freeze_backbone", "--load_from")]
)
def test_the_script_trains_on_what_was_pretrained(
    finished: Path, small_data: Path, tmp_path: Path, mode: str, flag: str
) -> None:
    weights = tmp_path / "backbone.pt"
    weights.write_bytes((finished / "backbone.pt").read_bytes())
    flags = "--epochs 1 --emb_dim 16 --gpus 0 --workers 0 --precision fp32 --batch 8".split()
    run = tmp_path / "run"
    assert run_main("--data_root", small_data, "--out_dir", run, flag, weights, mode, *flags) == 0
    config = json.loads((run / "config.json").read_text())["options"]
    assert config["img_size"] == 16 and "embed_dim=16,depth=1" in config["model_id"]
    assert config["mean"] == [0.485, 0.456, 0.406]
    if mode == "--no-freeze_backbone":
        weights.unlink()  # what was fine-tuned is in the run
    trained = lct.load_run(run, lct.Runtime(torch.device("cpu"), 0, torch.float32))
    state = trained.model.backbone.model.state_dict()
    exported = torch.load(finished / "backbone.pt", weights_only=True)["model"]
    same = [torch.equal(state[key], exported[key]) for key in state]
    assert all(same) == (mode == "--freeze_backbone") and len(same) == len(exported) - 1  # without the mask token
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    if mode == "--freeze_backbone":
        ours = models.load_dinov2_backbone(f"file::{weights}:slt_vitsmall_patch16")
        pixels = (images.float() - trained.model.backbone.mean) / trained.model.backbone.std
        with torch.inference_mode():
            torch.testing.assert_close(trained.model.backbone(images), ours.encode(pixels)[:, 0], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_in_place_of_an_export_is_named(
    finished: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = finished / "run" / "checkpoint_best.pt"
    assert run_main("--data_root", small_data, "--out_dir", tmp_path, "--backbone_weights", weights, "--gpus", 0) == 2
    error = capsys.readouterr().err
    assert f"{weights}: is a checkpoint of pre-training\n  give the file that --export-backbone" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [("", "command continues"), ("--resume", "command continues"), ("--resume x.pt", "command without --resume continues"),
     ("--overwrite", "command without --overwrite continues")],
)  # fmt: skip
def test_what_continues_an_interrupted_run_is_not_what_began_it_elsewhere(flags: str, said: str) -> None:
    options = lct.parse_options(pretrain_dino_face.FaceOptions, flags.split(), "x")
    assert f"the same {said}" in lct.explain_end(lct.Interrupted(signal.SIGINT), options)[1]


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("vit_small_patch16_224:depth", "depth is no list of sizes"),
        ("vit_small_patch16_224:depth=two", "depth=two is no list of sizes"),
        ("vit_small_patch16_224:deepness=3", "timm cannot build it"),
        ("vit_smal_patch16_224:depth=3", "did you mean vit_small_patch16_224"),
    ],
)
def test_sizes_in_the_name_of_a_model_are_checked(
    model_id: str, said: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ("--no-pretrained", "--gpus", 0, "--epochs", 1)
    assert run_main("--data_root", small_data, "--out_dir", tmp_path / "run", "--model_id", model_id, *flags) == 2
    assert said in capsys.readouterr().err


def documented_commands() -> list[str]:
    text = (REPO / "tools" / "README.md").read_text("utf-8").replace("\\\n", " ")
    return re.findall(r"^    (python tools/pretrain_dino_\w+\.py .*?)(?: +#.*)?$", text, re.MULTILINE)


def test_the_documented_commands_run_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only smaller: what is appended wins. One in a process of its own, as a user starts it."""
    commands = documented_commands()
    words = " ".join(commands)
    assert len(commands) >= 3 and "--algorithm ibot" in words and "pretrain_dino_hands.py" in words
    for name in ("face", "hand_left", "hand_right"):
        make_dataset(tmp_path / "data" / "rois" / name, {"a": 36, "b": 36}, side=20)
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    small = [word for pair in pairs if pair[0] != "--batch-size" for word in pair]
    monkeypatch.chdir(tmp_path)
    for number, command in enumerate(commands):
        program, *flags = shlex.split(command)[1:]
        flags += [*small, "--epochs", "1", "--warmup-epochs", "0"]
        if number:
            assert run_main(Path(program).stem, *flags) == 0
            continue
        done = subprocess.run(
            [sys.executable, REPO / program, *flags], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 and "best: epoch 1" in done.stdout, done.stderr
    for path in re.findall(r"--export-backbone (\S+)", words):
        models.load_dinov2_backbone(f"file::{tmp_path / path}:slt_vitsmall_patch16")
