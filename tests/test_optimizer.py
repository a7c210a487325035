"""Section 11: groups and schedule."""

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
    assert found == [(5e-4, 1e-4), (0.5 * lct.arc_learning_rate(config), 1e-4), (1e-4, 0.05)]
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_a_frozen_backbone_is_not_optimised_and_stays_in_eval_mode() -> None:
    model, config = make_model(freeze=True)
    optimizer = lct.build_optimizer(model, config)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in model.backbone.parameters()}
    model.train()
    assert model.head.training and not model.backbone.training and not model.backbone.model.training
    features = model.backbone(torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
    assert not features.requires_grad
