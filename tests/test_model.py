"""Section 09: any timm model, weights from files, and refusal of what does not fit."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

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


def test_pool_overrides() -> None:
    assert build(model_id="vit_tiny_patch16_224", pool="avg")[1].pool == "avg"


def test_the_default_model_is_known_and_takes_the_default_size() -> None:
    settings, feature_dim = lct.probe_model(lct.Config())
    assert settings == {"num_classes": 0, "img_size": 224, "global_pool": "token"} and feature_dim == 1024


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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
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
    assert "classifier" in said[0] and "fc.weight" in said[0]
    assert info.weights == str(path) and info.weights_hash != build()[1].weights_hash


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
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
    with pytest.raises(lct.UserError, match=r"\(1, 2, 3\) instead of"):
        build(backbone_weights=tmp_path / "shape.pth")


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


def test_weights_that_cannot_be_fetched_name_the_three_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as on a machine without network
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(lct.UserError) as caught:
        build(model_id="vit_tiny_patch16_224", pretrained=True, img_size=224)
    assert all(way in str(caught.value) for way in ("--backbone_weights", "cache", "--no-pretrained"))


def test_one_image_on_a_replica_does_not_crash_the_head() -> None:
    head = lct.Head(6, 4, parts=2).train()
    assert head(torch.randn(1, 6)).shape == (1, 4)
    assert head.norm.num_batches_tracked == 0
    head(torch.randn(2, 6))
    assert head.norm.num_batches_tracked == 1


def test_the_parts_of_a_head_share_nothing_but_their_input() -> None:
    head = lct.Head(6, 8, parts=4).eval()
    hidden = head.hidden.weight
    (gradient,) = torch.autograd.grad(head(torch.randn(3, 6))[:, 2:4].sum(), hidden)  # the second part of the embedding
    touched = gradient.abs().sum(dim=1).unflatten(0, (4, -1)).sum(dim=1) > 0
    assert touched.tolist() == [False, True, False, False]


@pytest.mark.parametrize(("emb_dim", "parts"), [(128, 4), (64, 4), (66, 2), (67, 1), (32, 1), (2, 1)])
def test_any_length_of_embedding_is_cut_into_equal_parts(emb_dim: int, parts: int) -> None:
    assert lct.count_parts(emb_dim) == parts
    vectors = lct.normalize_parts(torch.randn(3, emb_dim), parts)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(vectors.unflatten(1, (parts, -1)).norm(dim=2), torch.full((3, parts), parts**-0.5))


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


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_tiny_patch16_224"])
def test_the_last_block_computes_its_class_token_alone(name: str) -> None:
    model = timm.create_model(name, num_classes=0, global_pool="token", img_size=112, depth=2)
    model, names = vary_weights(model), list(model.state_dict())
    images = torch.randn(3, 3, 112, 112)
    expected = model(images)
    weight = model.blocks[-1].attn.qkv.weight
    (expected.square().sum()).backward()
    gradient, weight.grad = weight.grad, None
    lct.keep_class_token(model)
    assert type(model.blocks[-1]) is lct.ClassTokenBlock and list(model.state_dict()) == names
    features = model(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    (features.square().sum()).backward()
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert not torch.allclose(vary_weights(model)(images), expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "pool"), [("deit_tiny_distilled_patch16_224", "token"), ("vit_tiny_patch16_224", "avg")]
)
def test_last_blocks_that_serve_other_tokens_or_are_not_known_stay(name: str, pool: str) -> None:
    model = timm.create_model(name, num_classes=0, global_pool=pool, depth=2)
    block = model.blocks[-1]
    lct.keep_class_token(model)
    assert model.blocks[-1] is block


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
    assert info.weights_hash == lct.hash_weights(donor)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    expected = donor((images - backbone.mean) / backbone.std)  # buffers outside the state dict are there too
    torch.testing.assert_close(backbone.eval()(images), expected, rtol=1e-5, atol=1e-5)
    torch.set_rng_state(state)


def test_fetched_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    donor = timm.create_model(TINY, num_classes=0)
    weights = donor.state_dict()
    settings = {"architecture": TINY, "num_classes": 0, "pretrained_cfg": donor.pretrained_cfg}
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


def test_precision_auto_rounds_frozen_backbones_only_and_fp32_none() -> None:
    frozen, trained = build()[0], build()[0]
    frozen.freeze()
    automatic = lct.make_runtime(make_config(gpus=0))
    fast = torch.bfloat16 if lct.cpu_multiplies_bf16() else torch.float32
    assert (automatic.dtype_of(frozen), automatic.dtype_of(trained)) == (fast, torch.float32)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        runtime = lct.make_runtime(make_config(gpus=0, precision=name))
        assert runtime.dtype_of(frozen) == runtime.dtype_of(trained) == dtype
