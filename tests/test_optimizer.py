"""Section 11: groups and schedule."""

import copy
import dataclasses
import importlib.util
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
    factors = [lct.lr_factor(lct.Config(), step, 200) for step in range(200)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0 and factors[-1] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert lct.lr_factor(lct.Config(), 105, 200) == pytest.approx(0.5 * (1 + math.cos(math.pi * 95 / 190)))


def test_groups_have_the_rates_and_decays_of_the_contract() -> None:
    model, config = make_model(freeze=False)
    optimizer = lct.build_optimizer(lct.parameter_groups(model, config), config)
    lct.set_learning_rate(optimizer, 0.5)
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    classes = 0.5 * lct.optimizer_settings(config)["class_vectors"]["lr"]
    assert found == [(5e-4, 1e-4), (5e-4, 0.0), (classes, 1e-4), (1e-4, 0.05), (1e-4, 0.0)]
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize(
    ("options", "head", "classes", "backbone"),
    [
        ({}, 1e-3, 1e-2, 2e-4),
        ({"lr": 1e-4}, 1e-4, 1e-3, 5e-5),
        ({"backbone_lr": 3e-6}, 1e-3, 1e-2, 3e-6),
        ({"fc_lr": 0.02}, 0.02, 0.2, 2e-4),
        ({"fc_lr": 0.02, "criterion": "cross_entropy"}, 0.02, 0.02, 2e-4),
        ({"fc_lr": 0.02, "arc_lr": 0.5}, 0.02, 0.5, 2e-4),
        ({"lr_type": "one_lr"}, 1e-3, 1e-2, 1e-3),
    ],
)
def test_head_and_backbone_have_rates_of_their_own(options: dict, head: float, classes: float, backbone: float) -> None:
    model, config = make_model(freeze=False)
    rates = [group["peak_lr"] for group in lct.parameter_groups(model, dataclasses.replace(config, **options))]
    assert rates == pytest.approx([head, head, classes, backbone, backbone])


def test_a_weight_decay_that_is_given_is_that_of_all() -> None:
    model, config = make_model(freeze=False)
    groups = lct.parameter_groups(model, dataclasses.replace(config, weight_decay=0.2))
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0, 0.2, 0.2, 0.0]
    none = lct.parameter_groups(model, dataclasses.replace(config, weight_decay=0.0))
    assert [group["weight_decay"] for group in none] == [0.0] * 3, "what has the same rate and decay is one group"
    config = dataclasses.replace(config, criterion="cross_entropy", weight_decay=0.2)
    linear = lct.Recognizer(model.backbone, model.head, lct.CRITERIA["cross_entropy"](config, 3))
    decay_of = {id(p): group["weight_decay"] for group in lct.parameter_groups(linear, config) for p in group["params"]}
    undecayed = {name for name, parameter in linear.named_parameters() if not decay_of[id(parameter)]}
    assert undecayed == {
        *("head.hidden.bias", "head.norm.weight", "head.norm.bias", "head.output.bias"),
        *("criterion.bias", "backbone.model.1.bias"),
    }


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
    optimizer = lct.build_optimizer(lct.parameter_groups(model, config), config)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in model.backbone.parameters()}
    model.train()
    assert model.head.training and not model.backbone.training and not model.backbone.model.training
    features = model.backbone(torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
    assert not features.requires_grad


ONECYCLE = {"scheduler": "onecycle", "div_factor": 10.0, "final_div_factor": 100.0}


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize(
    ("total", "pct_start"), [(10, 0.3), (301, 0.05), (301, 0.3), (3, 0.9), (10, 0.95), (10, 0.0), (2, 0.3)]
)
def test_onecycle_equals_that_of_torch_value_by_value(total: int, pct_start: float, strategy: str) -> None:
    config = lct.Config(**ONECYCLE, anneal_strategy=strategy, pct_start=pct_start)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    peer = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.7,
        total_steps=total,
        pct_start=pct_start,
        anneal_strategy=strategy,
        div_factor=10.0,
        final_div_factor=100.0,
    )
    for step in range(total):
        assert 0.7 * lct.lr_factor(config, step, total) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < total - 1:
            peer.step()


@pytest.mark.parametrize("total", [1, 2, 3, 7])
@pytest.mark.parametrize("pct_start", [0.0, 0.1, 0.5, 1.0])
def test_onecycle_of_few_steps_where_torch_divides_by_zero(total: int, pct_start: float) -> None:
    factors = [lct.lr_factor(lct.Config(**ONECYCLE, pct_start=pct_start), step, total) for step in range(total)]
    assert all(0.001 - 1e-12 <= factor <= 1 for factor in factors)


def test_warmup_epochs_are_steps_of_that_many_epochs() -> None:
    config = lct.Config(epochs=10, warmup_epochs=2.5)
    factors = [lct.lr_factor(config, step, 100) for step in range(100)]
    assert factors[:25] == pytest.approx([(step + 1) / 25 for step in range(25)])
    assert factors[25:] == sorted(factors[25:], reverse=True)
    none = lct.Config(epochs=10, warmup_epochs=0.0)
    assert lct.lr_factor(none, 0, 100) == 1.0


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion", "nadamw"])
def test_optimizers_of_timm_take_the_groups(name: str) -> None:
    model, config = make_model(freeze=False)
    config = dataclasses.replace(config, optimizer=name)
    lct.check_optimizer(config)
    optimizer = lct.build_optimizer(lct.parameter_groups(model, config), config)
    assert name in type(optimizer).__name__.lower()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0, 1e-4, 0.05, 0.0]
    before = [p.clone() for p in model.parameters()]
    lct.set_learning_rate(optimizer, 1.0)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.abs().sum())


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamp", "novograd", "mars", "muon", "sgd"])
def test_what_optimizers_keep_is_restored(name: str) -> None:
    """Some keep numbers and lists beside tensors."""

    def step(state: lct.TrainState, times: int) -> None:
        for _ in range(times):
            for number, parameter in enumerate(state.model.parameters()):
                parameter.grad = torch.cos(torch.arange(parameter.numel()) + number).view_as(parameter) * parameter
            state.optimizer.step()

    def start() -> lct.TrainState:
        model, config = make_model(freeze=False)
        config = dataclasses.replace(config, optimizer=name)
        lct.check_optimizer(config)
        return lct.start_state(model, config, lct.training_runtime(config))

    straight, saved, resumed = start(), start(), start()
    step(straight, 8)
    step(saved, 4)
    payload = copy.deepcopy((saved.model.state_dict(), saved.optimizer.state_dict()))
    resumed.model.load_state_dict(payload[0])
    resumed.optimizer.load_state_dict(payload[1])
    step(resumed, 4)
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "words"), [("kron", "random numbers"), ("fusedadam", "cannot be had here"), ("adahessian", "another")]
)
def test_optimizers_that_cannot_be_used_are_refused(name: str, words: str) -> None:
    if name == "fusedadam" and importlib.util.find_spec("apex"):
        pytest.skip("apex is installed")
    with pytest.raises(lct.UserError, match=words):
        lct.check_optimizer(lct.Config(optimizer=name))


def test_steps_beyond_the_last_go_on_with_its_rate() -> None:
    """Fewer images after an interruption make fewer steps of an epoch."""
    for scheduler in ("cosine", "onecycle"):
        config = lct.Config(scheduler=scheduler)
        assert lct.lr_factor(config, 230, 200) == lct.lr_factor(config, 199, 200)


def test_betas_and_eps_reach_the_optimizer_that_has_them() -> None:
    model, config = make_model(freeze=True)
    for name in ("adamw", "lamb"):
        own = dataclasses.replace(config, optimizer=name, betas=(0.8, 0.9), eps=1e-3)
        group = lct.build_optimizer(lct.parameter_groups(model, own), own).param_groups[0]
        assert tuple(group["betas"]) == (0.8, 0.9) and group["eps"] == 1e-3
        lct.check_optimizer(own)
    with pytest.raises(lct.UserError, match="betas: rmsprop has no such setting"):
        lct.check_optimizer(dataclasses.replace(config, optimizer="rmsprop", betas=(0.8, 0.9)))
    with pytest.raises(lct.UserError, match="eps: lion has no such setting"):
        lct.check_optimizer(dataclasses.replace(config, optimizer="lion", eps=1e-3))


def test_an_optimizer_that_needs_more_betas_is_refused_with_two() -> None:
    with pytest.raises(lct.UserError, match="betas: adan has more than two"):
        lct.check_optimizer(lct.Config(optimizer="adan", betas=(0.9, 0.99)))


@pytest.mark.parametrize("name, part", [("adamww", "did you mean adamw"), ("adahessian", "another training loop")])
def test_names_of_optimizers_are_checked(name: str, part: str) -> None:
    with pytest.raises(lct.UserError, match=part):
        lct.check_optimizer(lct.Config(optimizer=name))


class Layers(nn.Module):
    """A backbone of some layers that depends on no other image of its batch."""

    trained_keys, model = None, property(lambda self: self.layers)

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 6))
        self.model.requires_grad_(not frozen)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def step_on(sizes: list[int], frozen: bool, **options: object) -> tuple[lct.Recognizer, torch.Tensor]:
    """Do one step on 32 images in batches of the sizes given; return the model with its gradients and the loss."""
    torch.manual_seed(3)
    config = lct.Config(freeze_backbone=frozen, emb_dim=4, **options)
    model = lct.Recognizer(Layers(frozen), lct.Head(6, 4, 1), lct.ArcFace(config, 3)).double().train()
    state = lct.start_state(model, config, CPU)
    images, labels = torch.randn(32, 3, 2, 2, dtype=torch.float64), torch.arange(32) % 3
    parts = zip(images.split(sizes), labels.split(sizes), strict=True)
    batches = [lct.Batch(own, known, known, known, []) for own, known in parts]
    loss, _ = lct.train_step(config, CPU, model.backbone, state, batches)
    return model, loss


CPU = lct.Runtime(torch.device("cpu"), 0, torch.float32)


def test_accumulated_batches_of_a_frozen_backbone_are_one_batch() -> None:
    """BatchNorm of the head included: its statistics, too, are those of all 32 images."""
    whole, loss = step_on([32], True, max_grad_norm=0.0)
    parts, loss_of_parts = step_on([8, 8, 8, 8], True, max_grad_norm=0.0)
    ragged, _ = step_on([15, 15, 2], True, max_grad_norm=0.0)
    assert float(loss) == pytest.approx(float(loss_of_parts), rel=1e-12)
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    for other in (parts, ragged):
        for name in trained:
            gradient = whole.get_parameter(name).grad
            assert gradient.abs().sum() > 0 or name == "head.hidden.bias"  # which BatchNorm takes away again
            torch.testing.assert_close(other.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-12)
        assert torch.allclose(other.head.norm.running_mean, whole.head.norm.running_mean)


def test_a_step_with_the_scaler_of_fp16_is_that_without_and_brings_the_next_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scaler of the CPU; a GPU alone trains in fp16."""
    plain, loss = step_on([32], True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    monkeypatch.setattr(lct.Runtime, "make_scaler", lambda _: scaler)
    scaled, loss_of_scaled = step_on([32], True)
    assert float(loss) == pytest.approx(float(loss_of_scaled)) and scaler.get_scale() == 2.0**17
    for name, value in scaled.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])


def test_accumulated_gradients_of_a_trained_backbone_are_the_mean_over_images() -> None:
    sizes = [15, 15, 2]
    found, loss = step_on(sizes, False, max_grad_norm=0.0)
    torch.manual_seed(3)  # the same start, and every batch by itself
    config = lct.Config(freeze_backbone=False, emb_dim=4)
    model = lct.Recognizer(Layers(False), lct.Head(6, 4, 1), lct.ArcFace(config, 3)).double().train()
    images, labels = torch.randn(32, 3, 2, 2, dtype=torch.float64), torch.arange(32) % 3
    total = 0.0
    for own, known in zip(images.split(sizes), labels.split(sizes), strict=True):
        logits, _ = model.criterion(model.embed(model.backbone(own)), known)
        part = torch.nn.functional.cross_entropy(logits[:, 0], known, reduction="sum") / 32
        part.backward()
        total += part.item()
    assert float(loss) == pytest.approx(total, rel=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-12)
    assert any(name.startswith("backbone") for name, p in found.named_parameters() if p.grad.abs().sum() > 0)


@pytest.mark.parametrize("limit", [0.01, 0.1])
def test_clipping_bounds_the_norm_of_all_gradients(limit: float) -> None:
    free, _ = step_on([32], False, max_grad_norm=0.0)
    clipped, _ = step_on([32], False, max_grad_norm=limit)

    def norm(model: lct.Recognizer) -> float:
        return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))

    assert norm(free) > 0.1
    assert norm(clipped) == pytest.approx(limit, rel=1e-4)


def test_the_running_mean_follows_its_formula_and_is_shown_for_a_while_only() -> None:
    model, _ = make_model(freeze=False)
    average = lct.WeightAverage(model, 0.5)
    weight, expected = model.head.output.weight, model.head.output.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        average.update(step)
    torch.testing.assert_close(average.values["head.output.weight"], expected)
    live = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyError), average.applied():
        torch.testing.assert_close(weight.detach(), expected)
        raise KeyError
    assert all(torch.equal(value, live[key]) for key, value in model.state_dict().items())


def test_patience_counts_the_epochs_since_the_best() -> None:
    config = lct.Config(epochs=20, patience=3)
    assert not lct.has_ended(config, 0, {})
    assert [lct.has_ended(config, epoch, {"epoch": 4}) for epoch in (4, 6, 7, 8)] == [False, False, True, True]
    assert not lct.has_ended(lct.Config(epochs=20), 19, {"epoch": 1}) and lct.has_ended(config, 20, {"epoch": 20})
