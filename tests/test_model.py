"""Section 09: any timm model, weights from files, and refusal of what does not fit."""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import export
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from killing import Nursery

import lct_dino3 as lct

TINY = "test_resnet"


def make_config(**options: object) -> lct.Config:
    return lct.Config(**{"model_id": TINY, "pretrained": False, "img_size": 32, **options})


def build(**options: object) -> tuple[lct.Backbone, lct.BackboneInfo]:
    return lct.build_backbone(make_config(**options), lambda text: None)


@pytest.mark.parametrize(
    ("model_id", "pool"),
    [
        ("vit_tiny_patch16_224", "token"),
        ("vit_small_patch16_dinov3", "token"),
        (TINY, "avg"),
        ("mobilenetv3_small_050", "avg"),
    ],
)
def test_vits_pool_the_class_token_and_others_their_default(model_id: str, pool: str) -> None:
    backbone, info = build(model_id=model_id, img_size=64)
    features = backbone.eval()(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8))
    assert features.shape == (2, info.feature_dim) and features.dtype == torch.float32
    assert info.pool == pool
    expected = timm.models.get_pretrained_cfg(model_id)
    assert (info.mean, info.std) == (expected.mean, expected.std)


def test_pool_overrides() -> None:
    assert build(model_id="vit_tiny_patch16_224", pool="avg")[1].pool == "avg"
    assert build(pool="max")[1].pool == "max"


def test_the_default_model_is_known_and_takes_the_default_size() -> None:
    settings, feature_dim = lct.probe_model(lct.Config())
    expected = {"num_classes": 0, "img_size": 224, "dynamic_img_size": False, "global_pool": "token"}
    assert settings == expected and feature_dim == 1024


def test_images_are_normalised_on_the_device() -> None:
    backbone, info = build(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert info.mean == (0.1, 0.2, 0.3)
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    expected = (images / 255 - torch.tensor(info.mean).view(1, 3, 1, 1)) / torch.tensor(info.std).view(1, 3, 1, 1)
    torch.testing.assert_close(backbone.eval()(images), backbone.model(expected), rtol=1e-4, atol=1e-4)


def test_random_weights_are_a_function_of_the_seed() -> None:
    torch.rand(7)
    first = build(seed=1)[1].weights_hash
    torch.rand(3)
    assert build(seed=1)[1].weights_hash == first != build(seed=2)[1].weights_hash


@pytest.mark.parametrize("suffix", [".pth", "-00001-of-00001.safetensors"])  # the hub's name of a model in one part
def test_weights_from_a_file_without_and_with_classifier(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(5)
    donor = timm.create_model(TINY, num_classes=10)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in donor.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(donor.state_dict(), path)
    said: list[str] = []
    backbone, info = lct.build_backbone(make_config(backbone_weights=path), said.append)
    assert torch.equal(backbone.model.state_dict()["conv1.0.weight"], donor.state_dict()["conv1.0.weight"])
    assert "not used of the file: fc" in said[0]
    assert info.weights == str(path) and info.weights_hash != build()[1].weights_hash


def test_weights_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "list_models", lambda: [TINY])  # of all of them it builds forty to find one that fits
    state = timm.create_model(TINY, num_classes=0).state_dict()
    lost = next(iter(state))
    state["invented.weight"] = state.pop(lost)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(lct.UserError) as caught:
        build(backbone_weights=tmp_path / "other.pth")
    assert lost in str(caught.value) and "invented.weight" in str(caught.value)
    state = timm.create_model(TINY, num_classes=0).state_dict()
    state[lost] = torch.zeros(1, 2, 3)
    torch.save(state, tmp_path / "shape.pth")
    with pytest.raises(lct.UserError, match=r"conv1.0.weight.*\[1, 2, 3\]"):
        build(backbone_weights=tmp_path / "shape.pth")


@pytest.mark.parametrize(
    ("name", "keep", "reason"), [("a.safetensors", None, "a pointer that git lfs pull"), ("a.pth", 5000, "is cut off")]
)
def test_weights_that_did_not_come_whole_are_called_that(
    tmp_path: Path, name: str, keep: int | None, reason: str
) -> None:
    torch.save({"weight": torch.zeros(5000)}, tmp_path / name)
    data = (
        (tmp_path / name).read_bytes()[:keep] if keep else b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    )
    (tmp_path / name).write_bytes(data)
    with pytest.raises(lct.UserError, match=reason):
        build(backbone_weights=tmp_path / name)


def test_weights_are_never_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.write_text, (tmp_path / "owned", "x"))

    torch.save({"state_dict": {"conv1.weight": Hostile()}}, tmp_path / "hostile.pth")
    with pytest.raises(lct.UserError, match="cannot be read as weights"):
        build(backbone_weights=tmp_path / "hostile.pth")
    assert not (tmp_path / "owned").exists()


def test_unknown_models_and_sizes_are_refused_with_help() -> None:
    with pytest.raises(lct.UserError, match="vit_large_patch16_dinov3"):
        build(model_id="vit_large_patch16_dino3")
    with pytest.raises(lct.UserError, match="img_size 33"):
        build(model_id="vit_tiny_patch16_224", img_size=33)
    with pytest.raises(lct.UserError, match="--pool"):
        build(model_id="vit_tiny_patch16_224", pool="no_such_pool", img_size=32)
    with pytest.raises(lct.UserError, match="timm has no weights for it"):
        build(model_id="test_vit.r160_in1k:depth=2", pretrained=True)
    with pytest.raises(lct.UserError, match=r"none/config\.json(.|\n)*check the name, and that the hub or the folder"):
        build(model_id="local-dir:none")


def test_weights_that_cannot_be_fetched_name_the_three_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as on a machine without network
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(lct.UserError) as caught:
        build(model_id="vit_tiny_patch16_224", pretrained=True, img_size=224)
    assert all(way in str(caught.value) for way in ("--backbone_weights", "cache", "--no-pretrained"))


def test_a_model_in_the_cache_of_the_hub_is_built_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    donor = timm.create_model(TINY, num_classes=0)
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    settings = {"architecture": TINY, "num_classes": 0, "pretrained_cfg": donor.pretrained_cfg}
    (snapshot / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    safetensors.torch.save_file(donor.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    create, is_offline = timm.create_model, []

    def record(*args: Any, **kwargs: Any) -> torch.nn.Module:
        is_offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", record)
    backbone, _ = build(model_id="hf-hub:me/tiny", pretrained=True)
    assert torch.equal(backbone.model.conv1[0].weight, donor.conv1[0].weight)
    assert len(is_offline) == 3 and all(is_offline) and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_one_image_on_a_replica_does_not_crash_the_head() -> None:
    head = lct.Head(6, 4, num_heads=2).train()
    assert head(torch.randn(1, 6)).shape == (1, 4)
    assert head.norm.num_batches_tracked == 0
    head(torch.randn(2, 6))
    assert head.norm.num_batches_tracked == 1


@pytest.mark.parametrize("used", ["load", "create_model"])
def test_want_of_memory_is_not_taken_for_weights_that_are_wrong_or_missing(
    used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(TINY, num_classes=0).state_dict(), path)
    config = make_config(pretrained=True, backbone_weights=path if used == "load" else None)
    settings = lct.probe_model(config)[0]
    monkeypatch.setattr(torch if used == "load" else timm, used, lambda *_, **__: torch.empty(1 << 60))
    with pytest.raises(RuntimeError) as caught:
        lct.load_timm_model(config, settings, print)
    assert lct.explain_failure(caught.value, config).what.startswith("out of memory")


def test_heads_share_nothing_but_their_input() -> None:
    head = lct.Head(6, 8, num_heads=4).eval()
    hidden = head.hidden.weight
    (gradient,) = torch.autograd.grad(head(torch.randn(3, 6))[:, 2:4].sum(), hidden)  # the second head of the embedding
    touched = gradient.abs().sum(dim=1).unflatten(0, (4, -1)).sum(dim=1) > 0
    assert touched.tolist() == [False, True, False, False]


@pytest.mark.parametrize(("emb_dim", "num_heads"), [(128, 4), (64, 4), (66, 2), (67, 1), (32, 1), (2, 1)])
def test_heads_have_equal_parts_of_an_embedding_of_any_length(emb_dim: int, num_heads: int) -> None:
    assert lct.count_heads(lct.Config(emb_dim=emb_dim)) == num_heads
    vectors = lct.normalize_heads(torch.randn(3, emb_dim), num_heads)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(
        vectors.unflatten(1, (num_heads, -1)).norm(dim=2), torch.full((3, num_heads), num_heads**-0.5)
    )


@pytest.mark.parametrize("has_weights", [True, False])
def test_training_moves_the_statistics_of_batchnorm_only_where_weights_are_random(
    has_weights: bool, tmp_path: Path
) -> None:
    torch.save(build()[0].model.state_dict(), tmp_path / "weights.pth")
    backbone, _ = build(backbone_weights=tmp_path / "weights.pth" if has_weights else None)
    norm = next(part for part in backbone.modules() if isinstance(part, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    backbone.train()(torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    assert backbone.model.training and norm.weight.grad is not None
    assert torch.equal(norm.running_mean, before) == has_weights


def test_bf16_autocast_returns_float32_features() -> None:
    backbone, _ = build()
    images = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    exact = backbone.eval()(images)
    backbone.dtype = torch.bfloat16
    rounded = backbone(images)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded, exact).min() > 0.99


@pytest.mark.parametrize(("model_id", "img_size"), [("pvt_v2_b0", 160), ("xcit_nano_12_p16_224", 64)])
def test_models_with_other_stems_are_not_refused(model_id: str, img_size: int) -> None:
    assert lct.probe_model(make_config(model_id=model_id, img_size=img_size))[1] > 0


def vary_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Move weights from where they start: LayerScale, biases and tokens that are near zero would hide what goes wrong."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_a_model_that_will_be_filled_is_built_without_random_numbers(tmp_path: Path) -> None:
    donor = vary_weights(
        timm.create_model("vit_small_patch16_dinov3", num_classes=0, global_pool="token", img_size=64)
    ).eval()
    safetensors.torch.save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    options = {
        "model_id": "vit_small_patch16_dinov3",
        "img_size": 64,
        "backbone_weights": tmp_path / "weights.safetensors",
    }
    state = torch.get_rng_state()
    torch.manual_seed(0)
    backbone, info = build(**options)
    assert info.weights_hash == lct.fingerprint(lct.hash_tensors(donor))
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    expected = donor((images - backbone.mean) / backbone.std)  # buffers outside the state dict are there too
    torch.testing.assert_close(backbone.eval()(images), expected, rtol=1e-5, atol=1e-5)
    torch.set_rng_state(state)


def test_fetched_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    """With a classifier, as timm's own have, timm accepts weights that lack a part."""
    donor = timm.create_model(TINY, num_classes=5)
    weights = donor.state_dict()
    settings = {"architecture": TINY, "num_classes": 5, "pretrained_cfg": donor.pretrained_cfg}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    backbone, _ = build(model_id=f"local-dir:{tmp_path}", pretrained=True)
    assert all(torch.equal(value, weights[key]) for key, value in backbone.model.state_dict().items())
    lost = next(key for key in weights if key.endswith("conv1.weight"))
    safetensors.torch.save_file(
        {key: value for key, value in weights.items() if key != lost}, tmp_path / "model.safetensors"
    )
    with pytest.raises(lct.UserError, match=lost.replace(".", r"\.")):
        build(model_id=f"local-dir:{tmp_path}", pretrained=True)


def test_precision_auto_rounds_the_training_of_frozen_backbones_only_and_fp32_nothing() -> None:
    fast = torch.bfloat16 if lct.cpu_multiplies_bf16() else torch.float32
    for is_frozen, dtype in ((True, fast), (False, torch.float32)):
        runtime = lct.training_runtime(make_config(gpus=0, freeze_backbone=is_frozen))
        assert (runtime.dtype, runtime.inference_dtype) == (dtype, torch.float32)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        runtime = lct.training_runtime(make_config(gpus=0, precision=name))
        assert runtime.dtype == runtime.inference_dtype == dtype


def test_precision_auto_rounds_where_the_cpu_is_faster_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {  # AMX, AVX512-BF16, vendor: measured on the last two
        (True, True, "GenuineIntel"): True,
        (False, False, "AuthenticAMD"): False,
        (False, True, "AuthenticAMD"): True,
        (False, True, "GenuineIntel"): False,
    }
    for (has_amx, has_avx, vendor), is_faster in known.items():
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=has_amx: value)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=has_avx: value)
        cpuinfo = f"processor\t: 0\nvendor_id\t: {vendor}\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, value=cpuinfo, **__: value)
        assert lct.training_runtime(make_config(gpus=0)).dtype == (torch.bfloat16 if is_faster else torch.float32)


# --- trained in part

EVA = "vit_small_patch16_dinov3_qkvb"  # adds its own bias to what the weight of qkv gives


def build_whole(**options: object) -> tuple[lct.Recognizer, lct.Config]:
    config = make_config(emb_dim=8, **options)
    backbone, info = lct.build_backbone(config, lambda text: None)
    vary_weights(backbone.model)
    return lct.build_recognizer(config, 3, backbone, info), config


def draw_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def train_a_little(model: lct.Recognizer, config: lct.Config) -> None:
    optimizer = lct.build_optimizer(lct.parameter_groups(model, config), config)
    model.train()
    for _ in range(2):
        features = model.backbone(draw_images(4, 3, config.img_size, config.img_size))
        logits, _ = model.criterion(model.embed(features), torch.arange(4) % 3)
        optimizer.zero_grad()
        model.criterion.losses(logits, torch.arange(4) % 3).mean().backward()
        optimizer.step()


def changed_keys(model: lct.Recognizer, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def copy_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["test_vit", "resnet10t", "mobilenetv2_035", "test_maxvit"])
def test_depths_are_timms_own_where_it_names_all_layers(name: str) -> None:
    from timm.models._manipulate import group_parameters

    model = timm.create_model(name, num_classes=0)
    expected = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    depths = lct.block_depths(model)
    assert {key: depths[key] for key in expected} == expected and max(expected.values()) > 3
    assert depths.keys() >= model.state_dict().keys()


def test_models_whose_blocks_are_shared_or_not_told_can_still_be_frozen() -> None:
    for name, has_blocks in (("cait_xxs24_224", False), ("coat_tiny", True)):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        assert (max(lct.block_depths(model).values()) > 3) == has_blocks
        backbone = lct.Backbone(model, (0.5,) * 3, (0.5,) * 3)
        config = make_config(emb_dim=4)
        info = lct.BackboneInfo(name, "random", "0", 8, 32, "token", (0.5,) * 3, (0.5,) * 3, "area")
        assert lct.build_recognizer(config, 3, backbone, info).backbone.frozen


def test_register_tokens_stand_before_the_first_block() -> None:
    depths = lct.block_depths(timm.create_model(EVA, num_classes=0, depth=3))
    assert (depths["reg_token"], depths["blocks.0.attn.q_bias"], depths["norm.weight"]) == (0, 1, 3)


@pytest.mark.parametrize(
    ("name", "number", "last", "below"),
    [
        ("test_vit", 2, ("blocks.4.", "blocks.5.", "norm."), "blocks.3"),
        (f"{EVA}:depth=3", 1, ("blocks.2.", "norm."), "blocks.1"),
        ("resnet10t", 1, ("layer4.0.",), "layer3.0"),
        ("mobilenetv2_035", 2, ("blocks.5.2.", "blocks.6.0.", "conv_head.", "bn2."), "blocks.5.1"),
    ],
)
def test_the_last_blocks_alone_are_trained_and_stored(name: str, number: int, last: tuple, below: str) -> None:
    model, config = build_whole(model_id=name, unfreeze_blocks=number)
    before, prefix = copy_state(model), "backbone.model."
    wants_gradient: list[bool] = []
    for part in (below, last[0][:-1]):
        hook = lambda module, inputs, output: wants_gradient.append(output.requires_grad)  # noqa: E731
        model.backbone.model.get_submodule(part).register_forward_hook(hook)
    train_a_little(model, config)
    assert wants_gradient == [False, True] * 2, "the trunk leaves nothing in memory for a backward pass"
    changed = {key.removeprefix(prefix) for key in changed_keys(model, before) if key.startswith(prefix)}
    assert changed and all(key.startswith(last) for key in changed), "running statistics among them"
    assert all(any(key.startswith(part) for key in changed) for part in last)
    layers = {key: part for key, part in model.backbone.model.named_modules() if list(part.parameters(recurse=False))}
    assert all(part.training == f"{key}.".startswith(last) for key, part in layers.items() if key)
    stored = model.trained_state()
    assert {key.removeprefix(prefix) for key in stored if key.startswith(prefix)} == {
        key for key in model.backbone.model.state_dict() if key.startswith(last)
    }
    again, _ = build_whole(model_id=name, unfreeze_blocks=number)
    again.load_state_dict(stored, strict=False)
    assert changed_keys(again, copy_state(model)) == set()


@pytest.mark.parametrize("name", ["test_vit", f"{EVA}:depth=3"])
def test_lora_starts_from_the_base_trains_its_own_weights_and_merges(name: str) -> None:
    options = {"model_id": name, "img_size": 32, "lora_rank": 3}
    images = draw_images(4, 3, 32, 32)
    base, _ = build_whole(**{**options, "lora_rank": 0})
    model, config = build_whole(**options)
    expected, before = base.eval().backbone(images), copy_state(model)
    assert torch.equal(model.eval().backbone(images), expected)
    train_a_little(model, config)
    changed = {key for key in changed_keys(model, before) if key.startswith("backbone.")}
    layers = 2 * len(model.backbone.model.blocks)
    assert len(changed) == 2 * layers and all(".lora_" in key for key in changed)
    assert {key for key in model.trained_state() if key.startswith("backbone.")} == changed
    lora = [parameter for key, parameter in model.named_parameters() if key in changed]
    optimised = [
        p
        for group in lct.build_optimizer(lct.parameter_groups(model, config), config).param_groups
        for p in group["params"]
    ]
    assert {id(p) for p in optimised} >= {id(p) for p in lora}
    model.eval()
    unmerged = model.backbone(images)
    assert not torch.allclose(unmerged, expected, rtol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(model.backbone(images), unmerged, rtol=1e-4, atol=1e-4)
    lct.merge_lora(model.backbone.model)
    assert model.backbone.model.state_dict().keys() == base.backbone.model.state_dict().keys()
    torch.testing.assert_close(model.backbone(images), unmerged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lora_rank": 4}, "no attention"),
        ({"unfreeze_blocks": 99}, "has 4 blocks"),
        ({"model_id": "test_vit", "unfreeze_blocks": 7}, "has 6 blocks"),
        ({"model_id": "vgg11", "drop_path": 0.1}, "pooling, or leave out drop_path_rate=0.1$"),
        ({"model_id": "hammerfinder"}, "list_models"),
    ],
)
def test_parts_that_a_model_has_not_are_refused_before_the_scan(options: dict, complaint: str) -> None:
    with pytest.raises(lct.UserError, match=complaint):
        lct.probe_model(make_config(**options))


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_rank 4 --unfreeze_blocks 1",
        "--no-freeze_backbone --lora_rank 4",
        "--no-freeze_backbone --unfreeze_blocks 1",
        "--cache_views 2 --lora_rank 4",
        "--cache_views 2 --unfreeze_blocks 1",
        "--lr_type one_lr --fc_lr 0.1",
        "--load_from a.pth --backbone_weights b.pth",
    ],
)
def test_options_that_contradict_each_other_are_refused(flags: str) -> None:
    with pytest.raises(lct.UserError) as caught:
        lct.parse_command_line(flags.split())
    assert all(word in str(caught.value) for word in flags.split() if word.startswith("--"))


@pytest.mark.parametrize("options", [{"freeze_backbone": False}, {"unfreeze_blocks": 6}, {"lora_rank": 2}])
def test_branches_are_dropped_at_random_in_training_only(options: dict) -> None:
    model, _ = build_whole(model_id="test_vit", drop_path=0.5, **options)
    images = draw_images(2, 3, 32, 32)
    model.train()
    lct.seed_torch(1)
    first, second = model.backbone(images), model.backbone(images)
    lct.seed_torch(1)
    assert torch.equal(model.backbone(images), first) and not torch.equal(first, second)
    model.eval()
    assert torch.equal(model.backbone(images), model.backbone(images))


# --- weights as other trainers leave them

HUB_NAMES = {  # of transformers for what timm calls DINOv2 and DINOv3
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
}


def save_and_build(tree: Any, path: Path, **options: Any) -> tuple[torch.nn.Module, str]:
    said: list[str] = []
    torch.save(tree, path) if path.suffix == ".pth" else safetensors.torch.save_file(tree, path)
    return lct.build_backbone(make_config(backbone_weights=path, **options), said.append)[0].model, "\n".join(said)


@pytest.fixture(scope="module")
def vit_state() -> dict[str, torch.Tensor]:
    return vary_weights(timm.create_model("test_vit", num_classes=0, img_size=160)).state_dict()


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [
        ("", "weights_of_mine"),
        ("model.", "model"),
        ("module._orig_mod.", "model_state_dict"),
        ("model.backbone.", None),
        ("encoder.", "net"),
        ("_orig_mod.module.model.backbone.", "state_dict"),
        ("net.feature_extractor.", "teacher"),
    ],
)
def test_prefixes_and_wrappers_come_off_before_timm_converts(
    prefix: str, wrapper: str | None, vit_state: dict, tmp_path: Path
) -> None:
    state = {f"{prefix}{key}": value for key, value in vit_state.items()}
    tree = {wrapper: state, "epoch": 3} if wrapper else state
    model, _ = save_and_build(tree, tmp_path / "a.pth", model_id="test_vit", img_size=32)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, vit_state["blocks.3.mlp.fc1.weight"])
    assert model.pos_embed.shape[1] == 5, "interpolated by timm from 100 patches"


def test_tensors_that_are_no_numbers_of_a_layer_are_refused_by_name(vit_state: dict, tmp_path: Path) -> None:
    for odd in (torch.zeros(4, dtype=torch.float8_e4m3fn), torch.eye(4).to_sparse()):
        with pytest.raises(lct.UserError, match=r"sparse or 8-bit tensors, such as norm\.weight"):
            save_and_build(vit_state | {"norm.weight": odd}, tmp_path / "a.pth", model_id="test_vit", img_size=32)


def test_a_tree_that_holds_itself_is_no_file_of_weights(vit_state: dict, tmp_path: Path) -> None:
    tree = {"model": vit_state}
    tree["self"] = tree
    with pytest.raises(lct.UserError, match="cannot be read as weights"):
        save_and_build(tree, tmp_path / "a.pth", model_id="test_vit", img_size=32)


def test_options_and_numbers_of_a_trainer_do_not_hinder(vit_state: dict, tmp_path: Path) -> None:
    tree = {"args": argparse.Namespace(lr=0.1, out=Path("x")), "best": np.float64(0.7), "hist": np.arange(3)}
    tree |= {"optimizer": {"state": {0: {"exp_avg": torch.full((3,), math.inf)}}}, "model": vit_state}
    model, said = save_and_build(tree, tmp_path / "a.pth", model_id="test_vit", img_size=32)
    assert torch.equal(model.norm.weight, vit_state["norm.weight"]) and "optimizer" in said


def test_the_teacher_is_taken_before_the_student(vit_state: dict, tmp_path: Path) -> None:
    student = {f"backbone.{key}": value + 1 for key, value in vit_state.items()}
    teacher = {f"backbone.{key}": value for key, value in vit_state.items()}
    teacher["head.mlp.0.weight"] = torch.zeros(4, 4)
    model, said = save_and_build(
        {"student": student, "teacher": teacher}, tmp_path / "a.pth", model_id="test_vit", img_size=32
    )
    assert torch.equal(model.norm.weight, vit_state["norm.weight"])
    assert "teacher.head" in said and "student.backbone" in said


@pytest.mark.parametrize("prefix", ["", "model."])
def test_heads_in_the_file_are_named_and_left(prefix: str, vit_state: dict, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in vit_state.items()}
    state |= {f"{prefix}arcface.weight": torch.ones(3, 64), "criterion.centers.weight": torch.ones(3, 64)}
    model, said = save_and_build(state, tmp_path / "a.pth", model_id="test_vit", img_size=32)
    assert torch.equal(model.norm.weight, vit_state["norm.weight"])
    assert "arcface" in said and "criterion" in said


@pytest.fixture
def few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm list no others, because forty of them are built to find one that fits a file."""
    monkeypatch.setattr(timm, "list_models", lambda: ["test_vit", "test_vit2", "convnext_small", "convnext_tiny"])


@pytest.mark.parametrize(
    "key", ["norm_pre.weight", "reg_token", "blocks.9.norm1.weight", "blocks.0.attn.q_norm.weight"]
)
def test_what_would_change_features_is_not_left(key: str, few_models: None, vit_state: dict, tmp_path: Path) -> None:
    with pytest.raises(lct.UserError, match=rf"does not fit test_vit.*{re.escape(key)}"):
        save_and_build(vit_state | {key: torch.ones(64)}, tmp_path / "a.pth", model_id="test_vit", img_size=32)


def test_the_remedy_names_what_would_match(vit_state: dict, tmp_path: Path) -> None:
    with pytest.raises(lct.UserError, match=r"--model_id test_vit$"):
        save_and_build({"model": vit_state}, tmp_path / "a.pth", model_id="test_vit2", img_size=32)
    with pytest.raises(lct.UserError, match="holds no tensors by name"):
        save_and_build(timm.create_model(TINY), tmp_path / "whole.pth")


def test_a_file_that_lacks_a_tensor_is_to_be_whole(few_models: None, vit_state: dict, tmp_path: Path) -> None:
    part = {f"model.{key}": value for key, value in vit_state.items() if key != "norm.weight"}
    with pytest.raises(
        lct.UserError, match=r'Missing key.*"norm.weight"(.|\n)*does fit test_vit: give a file with'
    ) as caught:
        save_and_build(part, tmp_path / "a.pth", model_id="test_vit", img_size=32)
    assert "check --model_id" not in str(caught.value)


def name_as_hub(state: dict[str, torch.Tensor], version: int, layers: str) -> dict[str, torch.Tensor]:
    """Return the weights of a timm DINO under the names of transformers, whose keys have no bias in DINOv3."""
    inner = ("attention.output.dense", "fc1", "fc2") if version == 2 else ("attention.o_proj", "up_proj", "down_proj")
    parts = ("attention.query", "attention.key", "attention.value") if version == 2 else ("q_proj", "k_proj", "v_proj")
    projection, norm = ("projection.", "layernorm") if version == 2 else ("", "norm")
    named = {}
    for key, value in state.items():
        if ".attn.qkv" in key:
            named |= dict(
                zip((key.replace("attn.qkv", f"attention.{part}") for part in parts), value.chunk(3), strict=True)
            )
        else:
            new = (
                key.replace("attn.proj", inner[0])
                .replace("mlp.fc1", f"mlp.{inner[1]}")
                .replace("mlp.fc2", f"mlp.{inner[2]}")
            )
            new = re.sub(r"(ls(\d)\.gamma|gamma_(\d))$", lambda m: f"layer_scale{m[2] or m[3]}.lambda1", new)
            new = re.sub(r"^norm\.", f"{norm}.", new).replace(
                "patch_embed.proj.", f"embeddings.patch_embeddings.{projection}"
            )
            named[HUB_NAMES.get(key, new)] = value
    named = {re.sub(r"^blocks\.", layers, key): value.clone() for key, value in named.items()}
    for key in [key for key in named if version == 3 and key.endswith("q_proj.weight")]:
        for part in "qv":
            named[key.replace("q_proj.weight", f"{part}_proj.bias")] = torch.zeros(len(named[key]))
    return named | {"embeddings.mask_token": torch.zeros(1, 1, len(state["norm.weight"]))}


HUB = [
    ("vit_small_patch16_dinov3", 3, "layer.", ""),
    ("vit_small_patch16_dinov3", 3, "model.layer.", "backbone."),
    ("vit_small_patch14_dinov2", 2, "encoder.layer.", ""),
    ("vit_small_patch14_reg4_dinov2", 2, "encoder.layer.", "dinov2_with_registers."),
]


@pytest.mark.parametrize("name, version, layers, prefix", HUB)
def test_dino_as_the_hub_has_it_gives_the_features_of_timm(
    name: str, version: int, layers: str, prefix: str, tmp_path: Path
) -> None:
    size = 32 if version == 3 else 28
    donor = vary_weights(timm.create_model(name, num_classes=0, img_size=size, global_pool="token")).eval()
    state = {key: value for key, value in donor.state_dict().items() if "rope" not in key}
    if "reg_token" in state and version == 2:  # the authors add a position to the class token
        state["pos_embed"] = torch.cat((torch.ones(1, 1, 384), state["pos_embed"]), 1)
        state["cls_token"] = state["cls_token"] - 1
    hub = {f"{prefix}{key}": value for key, value in name_as_hub(state, version, layers).items()}
    hub["classifier.weight"] = torch.zeros(5, 384)
    model, _ = save_and_build(hub, tmp_path / "model.safetensors", model_id=name, img_size=size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), donor(images), rtol=1e-4, atol=1e-5)
    if version == 3:
        hub[f"{prefix}{layers}2.attention.v_proj.bias"] += 0.1
        with pytest.raises(lct.UserError, match=rf"biases.*not zero(.|\n)*--model_id {name}_qkvb"):
            save_and_build(hub, tmp_path / "model.safetensors", model_id=name, img_size=size)


def test_a_convnext_dino_as_the_hub_has_it_whole_or_in_parts_gives_the_features_of_timm(
    few_models: None, tmp_path: Path
) -> None:
    """Names as in transformers' DINOv3ConvNextModel, the second time below the name that a model with a classifier has."""
    name = "convnext_tiny.dinov3_lvd1689m"
    donor = vary_weights(timm.create_model(name, num_classes=0)).eval()
    names = (
        (r"^stem\.", "stages.0.downsample_layers."),
        (r"^(stages\.\d+)\.downsample\.", r"\1.downsample_layers."),
        (r"\.blocks\.", ".layers."),
        (r"\.conv_dw\.", ".depthwise_conv."),
        (r"\.mlp\.fc(\d)\.", r".pointwise_conv\1."),
        (r"^(stages\.\d+\.layers\.\d+)\.norm\.", r"\1.layer_norm."),
        (r"^head\.norm\.", "layer_norm."),
    )
    hub = donor.state_dict()
    for pattern, word in names:
        hub = {re.sub(pattern, word, key): value for key, value in hub.items()}
    assert {
        "stages.0.downsample_layers.1.bias",
        "stages.3.layers.1.pointwise_conv2.weight",
        "layer_norm.bias",
    } <= hub.keys()
    weight_map, folder = {}, tmp_path / "snapshot"
    folder.mkdir()
    for index, keys in enumerate((sorted(hub)[::2], sorted(hub)[1::2]), 1):
        part = f"model-{index:05}-of-00002.safetensors"
        safetensors.torch.save_file({key: hub[key].contiguous() for key in keys}, folder / part)
        weight_map |= dict.fromkeys(keys, part)
    index_path = folder / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    prefixed = {f"dinov3_convnext.{key}": value.contiguous() for key, value in hub.items()}
    safetensors.torch.save_file(prefixed, tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for path in (index_path, tmp_path / "model.safetensors"):
        model, _ = build(model_id=name, img_size=64, backbone_weights=path)
        with torch.inference_mode():
            torch.testing.assert_close(model.model.eval()(images), donor(images), rtol=1e-4, atol=1e-5)
    assert lct.name_fitting_model(lct.rename_hub_weights(hub), "convnext_small").endswith(" --model_id convnext_tiny")
    for wrong in (folder, folder / part):
        config = make_config(model_id=name, backbone_weights=wrong)
        with pytest.raises(lct.UserError) as caught:
            lct.check_existing(config, "backbone_weights")
            lct.read_start(config)
        assert f"give {index_path}" in caught.value.remedy
    (folder / part).unlink()
    with pytest.raises(lct.UserError, match=f"No such file.*{part}"):
        build(model_id=name, img_size=64, backbone_weights=index_path)


# --- input channels


@pytest.mark.parametrize("name", [TINY, "test_vit"])
def test_gray_models_see_the_luminance(name: str, tmp_path: Path) -> None:
    donor = timm.create_model(name, num_classes=0, **({"img_size": 32} if name == "test_vit" else {}))
    torch.save(donor.state_dict(), tmp_path / "rgb.pth")
    options = {"model_id": name, "backbone_weights": tmp_path / "rgb.pth", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    gray, colour = build(in_channels=1, **options)[0].eval(), build(**options)[0].eval()
    images = draw_images(2, 3, 32, 32)
    luma = images.float().mul(torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    # timm sums the weights over the channels: the same as showing the gray picture in all three
    expected = colour.model(((luma / 255 - 0.5) / 0.25).expand(-1, 3, -1, -1))
    torch.testing.assert_close(gray(images), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gray(images), colour(images), rtol=1e-2)


def test_mean_and_deviation_of_gray_are_those_of_the_channels() -> None:
    backbone, info = build(in_channels=1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (backbone.mean.item(), backbone.std.item()) == pytest.approx((0.2 * 255, 0.5 * 255))
    assert info.mean == (0.1, 0.2, 0.3), "what --mask_fill mean paints is in colour"


# --- starting from what another training left

VIT_RUN = "--model_id test_vit --no-pretrained --img_size 32 --batch 8 --workers 0 --gpus 0 --emb_dim 8 --epochs 1 --save_every 0"
WAYS = {
    "frozen": "--backbone_weights {donor}",
    "blocks": "--unfreeze_blocks 2 --lr 0.01",
    "lora": "--lora_rank 3 --backbone_lr 0.01",
    "fine-tuned": "--no-freeze_backbone --lr 0.01",
}


@pytest.fixture(scope="module")
def sources(nursery: Nursery, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run for each of WAYS. Shared: read only."""
    root = tmp_path_factory.mktemp("sources")
    donor = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(vary_weights(donor).state_dict(), root / "donor.pth")
    for name, flags in WAYS.items():
        words = (*VIT_RUN.split(), *flags.format(donor=root / "donor.pth").split())
        code, text = nursery.run("--data_root", data, "--out_dir", root / name, *words)
        assert code == 0, text
    return root


def load_source(path: Path) -> lct.TrainedRun:
    return lct.load_model(path, lct.read_run_config(path), lct.make_runtime(0, "fp32"))


def start_from(path: Path, class_names: tuple[str, ...], **options: object) -> tuple[lct.Recognizer, str]:
    said: list[str] = []
    config = make_config(**{"model_id": "test_vit", "emb_dim": 8, "seed": 7, "load_from": path, **options})
    backbone, info = lct.build_backbone(config, said.append)
    model = lct.build_recognizer(config, len(class_names), backbone, info)
    lct.load_head(model, lct.read_start(config), class_names, said.append)
    return model.eval(), "\n".join(said)


def cosines(model: lct.Recognizer) -> torch.Tensor:
    with torch.inference_mode():
        return model.criterion.plain_logits(model.embed(model.backbone(draw_images(4, 3, 32, 32))))


@pytest.mark.parametrize("kind", [*WAYS, "export"])
def test_a_run_starts_from_all_that_another_one_has_learned(kind: str, sources: Path, tmp_path: Path) -> None:
    source = load_source(sources / ("lora" if kind == "export" else kind))
    classes = tuple(lct.load_checkpoint(source.path / "checkpoint_best.pth")["identity"]["class_names"])
    path = source.path
    if kind == "export":
        gallery, meta = lct.load_gallery(path / "prototypes.npz")
        path = tmp_path / "model.safetensors"
        lct.merge_lora(source.model.backbone.model)
        export.export_safetensors(dataclasses.replace(source, gallery=gallery, meta=meta), path)
    model, said = start_from(path, classes)
    torch.testing.assert_close(cosines(model), cosines(source.model), rtol=1e-4, atol=1e-4)
    assert "3 of 3 classes are taken" in said and "at random" not in said


def test_of_other_classes_and_shapes_what_fits_is_taken(sources: Path) -> None:
    source = load_source(sources / "blocks").model
    model, said = start_from(sources / "blocks", ("saw", "wrench", "молоток"))
    assert torch.equal(model.criterion.weight[1:], source.criterion.weight[[1, 2]]), (
        "by name: side cutter, wrench, молоток"
    )
    assert "2 of 3 classes" in said
    model, said = start_from(sources / "blocks", ("wrench", "saw"), emb_dim=5, img_size=64)
    assert torch.equal(model.head.hidden.weight, source.head.hidden.weight)
    assert model.backbone.model.pos_embed.shape[1] == 17, "the position embedding is interpolated"
    assert "0 of 2 classes" in said
    assert all(
        key in said.split("at random")[1] for key in ("head.output.weight", "head.output.bias", "criterion.weight")
    )


def test_a_start_takes_the_running_mean_that_val_judged(sources: Path, tmp_path: Path) -> None:
    payload = lct.load_checkpoint(sources / "fine-tuned" / "checkpoint_best.pth")
    payload["average"] = {key: value + 1 for key, value in payload["model"].items()}
    torch.save(payload, tmp_path / "start.pth")
    start = lct.read_start(make_config(load_from=tmp_path / "start.pth"))
    for prefix, tensors in (("backbone.model.", start.backbone), ("", start.head)):
        assert tensors and all(torch.equal(value, payload["average"][prefix + key]) for key, value in tensors.items())


def test_weights_for_colour_start_a_gray_model(sources: Path) -> None:
    model, _ = start_from(sources / "fine-tuned", ("a", "b"), in_channels=1)
    expected = load_source(sources / "fine-tuned").model.backbone.model.patch_embed.proj.weight
    torch.testing.assert_close(model.backbone.model.patch_embed.proj.weight, expected.sum(1, keepdim=True))


def test_a_start_that_does_not_fit_is_refused_by_its_keys(few_models: None, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(lct.UserError, match=r"--load_from .*Missing key.*conv1.*Unexpected key.*cls_token"):
        start_from(sources / "fine-tuned", ("a", "b"), model_id=TINY)
    alone = tmp_path / "checkpoint.pth"
    alone.write_bytes((sources / "frozen" / "checkpoint_best.pth").read_bytes())
    for damaged in (None, "{", "{}"):
        if damaged:
            (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(lct.UserError, match="backbone, which is not stored in it"):
            start_from(alone, ("a", "b"))
    alone.write_bytes(alone.read_bytes()[:-2000] + bytes(1000) + alone.read_bytes()[-1000:])
    with pytest.raises(lct.UserError, match=r"damaged|cannot be read as weights"):
        start_from(alone, ("a", "b"))
    os.mkfifo(tmp_path / "pipe.pth")
    complaints = {".": "holds no checkpoint", "none.pth": "does not exist", "pipe.pth": "neither a file nor a folder"}
    for path, complaint in complaints.items():
        with pytest.raises(lct.UserError, match=complaint):
            lct.locate_start(make_config(load_from=tmp_path / path))


def test_several_directions_a_class_are_taken_by_class(sources: Path) -> None:
    model, _ = start_from(sources / "lora", ("a", "b", "c"), criterion="subcenter_arcface", sub_centers=2)
    old = torch.arange(48.0).view(6, 8)
    start = lct.StartWeights("--load_from", sources, {}, {"criterion.weight": old}, ("c", "d", "a"))
    before = model.criterion.weight.clone()
    lct.load_head(model, start, ("a", "b", "c"), print)
    assert torch.equal(model.criterion.weight, torch.cat((old[4:], before[2:4], old[:2])))


def test_biases_without_their_vectors_are_not_taken(sources: Path) -> None:
    model, _ = start_from(sources / "lora", ("a", "b", "c"), criterion="cross_entropy")
    bias = {"criterion.bias": torch.ones_like(model.criterion.bias), "criterion.weight": torch.zeros(3, 5)}
    before = model.criterion.bias.clone()
    said: list[str] = []
    lct.load_head(
        model, lct.StartWeights("--load_from", sources, {}, bias, ("a", "b", "c")), ("a", "b", "c"), said.append
    )
    assert torch.equal(model.criterion.bias, before) and "the vectors of 0 of 3 classes" in said[0]


def test_a_start_is_looked_for_below_models_too(sources: Path, tmp_path: Path, monkeypatch: Any) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "c.yaml").write_text(f"directories: {{models: '{sources}'}}\nmodel: {{load_from: lora}}\n", "utf-8")
    for argv in (["--models", str(sources), "--load_from", "lora"], ["--config", str(tmp_path / "c.yaml")]):
        assert lct.locate_start(lct.parse_command_line(argv)) == sources / "lora" / "checkpoint_best.pth"
    monkeypatch.chdir(here)
    (here / "lora").mkdir()
    assert lct.locate_start(lct.parse_command_line(argv)) == sources / "lora" / "checkpoint_best.pth"
    (tmp_path / "lora").mkdir()
    assert lct.parse_command_line(argv).load_from == tmp_path / "lora", "what lies beside the file comes first"
    (tmp_path / "lora").rmdir()
    (here / "lora").rmdir()
    (here / "runs").symlink_to(sources)
    argv += ["--models", "runs"]
    assert lct.locate_start(lct.parse_command_line(argv)).samefile(sources / "lora" / "checkpoint_best.pth")
    (tmp_path / "c.yaml").write_text("directories: {models: here/runs}\nmodel: {load_from: lora}\n", "utf-8")
    assert lct.locate_start(lct.parse_command_line(argv[:2])).samefile(sources / "lora" / "checkpoint_best.pth")


def test_a_start_that_overwrite_would_move_is_refused(sources: Path, small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "lora", tmp_path / "run")
    config = make_config(data_root=small_data, out_dir=tmp_path / "run", overwrite=True, load_from=tmp_path / "run")
    with pytest.raises(lct.UserError, match=r"--load_from .*moved aside"):
        lct.check_paths(config)
    lct.check_paths(dataclasses.replace(config, out_dir=tmp_path / "other"))


def test_a_run_that_starts_from_another_answers_by_itself_and_asks_for_what_is_gone(
    sources: Path, small_data: Path, nursery: Nursery, tmp_path: Path
) -> None:
    source, out_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(sources / "lora", source)
    words = (*VIT_RUN.split(), "--data_root", small_data, "--out_dir", out_dir)
    code, text = nursery.run(*words, "--load_from", source, "--n_classes", 4)
    assert code == 2 and "has 3 classes, and --n_classes says 4" in text
    code, text = nursery.run(*words, "--load_from", source, "--n_classes", 3)
    assert code == 0 and "1 of 3 classes are taken" in text, text
    again = load_source(out_dir).model
    start = lct.read_start(make_config(load_from=source))
    expected = lct.complete_backbone(start, print)
    assert all(torch.equal(value, expected[key]) for key, value in again.backbone.model.state_dict().items())
    source.rename(tmp_path / "gone")
    with pytest.raises(lct.UserError, match=r"no longer at .*source.*\n.*--backbone_weights FILE"):
        load_source(out_dir)
    for words in (("evaluate",), ("prototypes",), ("prototypes", "--add", small_data)):
        places = ("--run", out_dir, "--backbone_weights", tmp_path / "gone/checkpoint_best.pth")
        code, text = nursery.run(*words, *places, "--gpus", 0, "--workers", 0)
        assert code == 0, text


@pytest.mark.parametrize("fill", ["gray", "keep"])
def test_a_model_of_four_channels_sees_the_mask_beside_the_picture(fill: str) -> None:
    image = np.ascontiguousarray(draw_images(3, 40, 40).permute(1, 2, 0))
    mask = np.zeros((40, 40), np.uint8)
    mask[5:20, 10:40] = 255
    crop = lct.build_transform(40, False, lct.Fill(fill, (7, 8, 9)), shows_mask=True)
    masked, whole = crop(image, mask, 0), crop(image, None, 0)
    assert (masked[:, :, 3] == mask).all() and (whole[:, :, 3] == 255).all()
    assert (whole[:, :, :3] == image).all() and (masked[mask > 0, :3] == image[mask > 0]).all()
    assert (masked[mask == 0, :3] == (image[mask == 0] if fill == "keep" else (7, 8, 9))).all()
    train = lct.build_transform(40, True, lct.Fill(fill, (114,) * 3), shows_mask=True)
    flat = np.full_like(image, 114) + mask[:, :, None] // 3  # what is bright is object
    moved = [train(flat, mask, seed) for seed in range(20)]
    for views in moved:  # they move together
        is_object = views[:, :, 3] > 127
        assert views[is_object, 0].mean() > views[~is_object, 0].mean() + 20
    assert any((views[:, :, 3] != mask).any() for views in moved)
    backbone, _ = build(in_channels=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    seen: list[torch.Tensor] = []
    backbone.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    backbone.eval()(torch.from_numpy(masked).permute(2, 0, 1)[None])
    torch.testing.assert_close(seen[0][0, 3], torch.from_numpy(mask / 127.5 - 1).float())
    torch.testing.assert_close(seen[0][0, 1], torch.from_numpy((masked[:, :, 1] / 255 - 0.2) / 0.5).float())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--in_channels 4", "--crop_mode mask"),
        ("--crop_mode mask --mask_fill keep", "--in_channels 4"),
        ("--crop_mode mix --in_channels 4 --insert_background_p 0.5 --backgrounds pictures", "--insert_background_p"),
    ],
)
def test_a_mask_that_nothing_would_show_is_refused(flags: str, complaint: str) -> None:
    with pytest.raises(lct.UserError, match=complaint):
        lct.parse_command_line(flags.split())
