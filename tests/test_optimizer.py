"""Section 11: groups and schedule."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

import lct_dino3 as lct


def make_model(freeze: bool) -> tuple[lct.Recognizer, lct.Config]:
    config = lct.Config(freeze_backbone=freeze, lr=1e-3, emb_dim=4)
    backbone = lct.Backbone(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), (0.5,) * 3, (0.5,) * 3)
    info = lct.BackboneInfo("m", "random", "0", 6, 2, "avg", (0.5,) * 3, (0.5,) * 3, "area")
    return lct.build_recognizer(config, 3, backbone, info), config


def test_schedule_warms_up_and_falls_to_zero() -> None:
    factors = [lct.lr_factor(step, 200) for step in range(200)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0 and factors[-1] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert lct.lr_factor(105, 200) == pytest.approx(0.5 * (1 + math.cos(math.pi * 95 / 190)))


def test_groups_have_the_rates_and_decays_of_the_contract() -> None:
    model, config = make_model(freeze=False)
    optimizer = lct.build_optimizer(model, config)
    lct.set_learning_rate(optimizer, 0.5)
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(5e-4, 1e-4), (0.5 * lct.arc_learning_rate(config), 1e-4), (1e-4, 0.05), (1e-4, 0.0)]
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize(
    ("options", "head", "backbone"),
    [
        ({}, 1e-3, 2e-4),
        ({"lr": 1e-4}, 1e-4, 5e-5),
        ({"backbone_lr": 3e-6}, 1e-3, 3e-6),
        ({"fc_lr": 0.02}, 0.02, 2e-4),
        ({"lr_type": "one_lr"}, 1e-3, 1e-3),
    ],
)
def test_head_and_backbone_have_rates_of_their_own(options: dict, head: float, backbone: float) -> None:
    model, config = make_model(freeze=False)
    rates = [group["peak_lr"] for group in lct.parameter_groups(model, dataclasses.replace(config, **options))]
    assert rates == pytest.approx([head, 10 * options.get("lr", 1e-3), backbone, backbone])


def rates_and_decays(groups: list[dict], model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (round(group.get("lr_scale", group.get("peak_lr")), 9), group["weight_decay"])
        for group in groups
        for p in group["params"]
        if id(p) in names
    }


@pytest.mark.parametrize(
    ("name", "layer_decay"),
    [("test_vit", 1.0), ("test_vit", 0.7), ("mobilenetv2_035", 0.7), ("swin_tiny_patch4_window7_224", 1.0)],
)
def test_rates_and_decays_of_the_layers_are_those_of_timm(name: str, layer_decay: float) -> None:
    from timm.optim import param_groups_layer_decay

    config = lct.Config(
        model_id=name, pretrained=False, freeze_backbone=False, layer_decay=layer_decay, backbone_lr=1.0
    )
    backbone, info = lct.build_backbone(config, print)
    model = lct.build_recognizer(config, 3, backbone, info)
    exempt = getattr(backbone.model, "no_weight_decay", set)()
    expected = param_groups_layer_decay(backbone.model, 0.05, list(exempt), layer_decay=layer_decay)
    found = rates_and_decays(lct.parameter_groups(model, config), backbone.model)
    assert found == rates_and_decays(expected, backbone.model)
    assert len({rate for rate, _ in found.values()}) > 3 or layer_decay == 1


def test_norms_biases_and_tokens_are_not_pulled_to_zero() -> None:
    config = lct.Config(model_id="vit_small_patch16_dinov3_qkvb", pretrained=False, freeze_backbone=False, img_size=32)
    backbone, info = lct.build_backbone(config, print)
    groups = lct.parameter_groups(lct.build_recognizer(config, 3, backbone, info), config)
    decays = {name: decay for name, (_, decay) in rates_and_decays(groups, backbone.model).items()}
    assert {name for name, decay in decays.items() if decay} == {
        name for name in decays if name.endswith("weight") and "norm" not in name
    }
    assert decays["reg_token"] == decays["cls_token"] == decays["blocks.3.attn.q_bias"] == 0


def test_a_frozen_backbone_is_not_optimised_and_stays_in_eval_mode() -> None:
    model, config = make_model(freeze=True)
    optimizer = lct.build_optimizer(model, config)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in model.backbone.parameters()}
    model.train()
    assert model.head.training and not model.backbone.training and not model.backbone.model.training
    features = model.backbone(torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
    assert not features.requires_grad
