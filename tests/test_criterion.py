"""Section 10: margins and losses against float64 formulas and a peer, and gradients where others give NaN."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lct_dino3 as lct


def brute_force_logits(cosine: np.ndarray, labels: np.ndarray, margin: float, scale: float) -> np.ndarray:
    logits = cosine.astype(np.float64).copy()
    for row, label in enumerate(labels):
        theta = math.acos(logits[row, label])
        is_regular = theta <= math.pi - margin
        logits[row, label] = math.cos(theta + margin) if is_regular else math.cos(theta) - margin * math.sin(margin)
    return scale * logits


def turn_away(cosine: torch.Tensor, labels: torch.Tensor, margin: float = 0.3) -> torch.Tensor:
    return lct.ArcFace(lct.Config(arc_margin=margin), cosine.shape[1]).add_margin(cosine, labels)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3, 0.5, 1.2])
def test_logits_equal_the_float64_formula(margin: float) -> None:
    cosine = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 500), [-1, -0.999, 0, 0.999, 1]])
    cosine = np.stack([cosine, np.roll(cosine, 7), np.roll(cosine, 31)], axis=1).astype(np.float32)
    labels = np.arange(len(cosine)) % 3
    ours = 30 * turn_away(torch.from_numpy(cosine), torch.from_numpy(labels), margin)
    np.testing.assert_allclose(ours.numpy(), brute_force_logits(cosine, labels, margin, 30.0), atol=2e-4 * 30)


def test_only_the_true_class_is_changed_and_the_margin_makes_it_harder() -> None:
    cosine = torch.linspace(-1, 1, 41)[:, None].repeat(1, 4)
    shifted = turn_away(cosine, torch.full((41,), 2))
    assert torch.equal(shifted[:, [0, 1, 3]], cosine[:, [0, 1, 3]])
    assert (shifted[:, 2] < cosine[:, 2]).all()
    assert (shifted[1:, 2] > shifted[:-1, 2]).all(), "the harder the sample the lower its logit, also past pi"


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 1.0 - 2**-24, -1.0 + 2**-24])
def test_loss_and_gradient_are_finite_at_the_poles(value: float) -> None:
    cosine = torch.full((2, 3), value, requires_grad=True)
    loss = F.cross_entropy(30 * turn_away(cosine, torch.tensor([0, 2])), torch.tensor([0, 2]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(cosine.grad).all()


def test_gradient_through_unit_vectors_equal_to_their_class_direction_is_finite() -> None:
    arcface = lct.ArcFace(lct.Config(emb_dim=8), 5)
    raw = arcface.weight.detach().repeat(40, 1).mul(torch.rand(200, 1) * 5).requires_grad_()
    logits, plain = arcface(F.normalize(raw), torch.arange(5).repeat(40))
    assert (plain.diagonal() > 30 * 0.999999).all()
    F.cross_entropy(logits[:, 0], torch.arange(5).repeat(40)).backward()
    assert torch.isfinite(raw.grad).all() and torch.isfinite(arcface.weight.grad).all()


def test_gradient_is_the_derivative_of_the_formula() -> None:
    cosine = torch.linspace(-0.9, 0.95, 30, dtype=torch.float64)[:, None].requires_grad_()
    turn_away(cosine, torch.zeros(30, dtype=torch.int64)).sum().backward()
    theta = torch.acos(cosine.detach())
    np.testing.assert_allclose(cosine.grad, torch.sin(theta + 0.3) / torch.sin(theta), rtol=1e-9)


def test_loss_and_gradient_equal_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    arcface = lct.ArcFace(lct.Config(emb_dim=16, heads=1), 7)
    peer = losses.ArcFaceLoss(7, 16, margin=math.degrees(0.3), scale=30.0)
    peer.W.data = arcface.weight.detach().T.clone()
    labels = torch.arange(64) % 7
    raw = torch.randn(64, 16)
    mine, theirs = raw.clone().requires_grad_(), raw.clone().requires_grad_()
    loss = F.cross_entropy(arcface(F.normalize(mine), labels)[0][:, 0], labels)
    peer_loss = peer(theirs, labels)
    loss.backward()
    peer_loss.backward()
    assert float(loss) == pytest.approx(float(peer_loss), rel=1e-5)
    np.testing.assert_allclose(mine.grad, theirs.grad, atol=1e-5)


def test_evaluation_never_sees_the_margin() -> None:
    arcface = lct.ArcFace(lct.Config(emb_dim=8, arc_margin=0.5), 4)
    embeddings = F.normalize(torch.randn(10, 8))
    expected = embeddings @ F.normalize(arcface.weight).T
    torch.testing.assert_close(arcface(embeddings, torch.arange(10) % 4)[1], 30 * expected)
    torch.testing.assert_close(arcface.plain_logits(embeddings), 30 * expected)


def build(criterion: str, **options: object) -> lct.Criterion:
    torch.manual_seed(0)
    config = lct.Config(criterion=criterion, emb_dim=8, **options)  # too short for several heads
    return lct.CRITERIA[criterion](config, 4)


def some_embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)))
    return embeddings, torch.arange(20) % 4


def test_cosface_takes_the_margin_from_the_cosine_of_the_true_class() -> None:
    cosface = build("cosface", arc_margin=0.35, arc_scale=16.0)
    embeddings, labels = some_embeddings()
    logits, plain = cosface(embeddings, labels)
    torch.testing.assert_close(plain - logits[:, 0], 16 * 0.35 * F.one_hot(labels, 4).float())


def test_subcenter_arcface_takes_the_nearest_of_several_directions_and_is_arcface_with_one() -> None:
    several = build("subcenter_arcface", sub_centers=3)
    embeddings, labels = some_embeddings()
    assert several.weight.shape == (12, 8)
    directions = F.normalize(several.weight).view(4, 3, 8)
    expected = torch.stack([(embeddings @ own.T).max(dim=1).values for own in directions], dim=1)
    torch.testing.assert_close(several.plain_logits(embeddings), 30 * expected)
    logits = several(embeddings, labels)[0][:, 0]
    torch.testing.assert_close(logits, 30 * turn_away(expected, labels))
    single = build("subcenter_arcface", sub_centers=1)
    plain = build("arcface")
    torch.testing.assert_close(single(embeddings, labels), plain(embeddings, labels))


def test_cross_entropy_is_a_linear_classifier_without_margin() -> None:
    linear = build("cross_entropy")
    embeddings, labels = some_embeddings()
    torch.nn.init.normal_(linear.bias)
    logits, plain = linear(embeddings, labels)
    expected = 30 * embeddings @ linear.weight.T + linear.bias[:, 0]
    torch.testing.assert_close(logits[:, 0], expected)
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(linear.losses(logits, labels).mean(), F.cross_entropy(expected, labels))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_equals_its_formula_also_where_the_class_is_certain(gamma: float) -> None:
    focal = build("focal", focal_gamma=gamma)
    logits = torch.cat([torch.randn(50, 4, dtype=torch.float64), torch.tensor([[90.0, 0, 0, 0]])]).requires_grad_()
    labels = torch.arange(51) % 4
    labels[-1] = 0
    p = torch.softmax(logits.detach(), dim=1)[torch.arange(51), labels]
    loss = focal.losses(logits[:, None], labels).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float((-((1 - p) ** gamma) * p.log()).mean()), rel=1e-6)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["arcface", "focal"])
def test_label_smoothing_spreads_a_share_of_the_target_in_every_head(name: str) -> None:
    config = lct.Config(criterion=name, emb_dim=48, heads=3, label_smoothing=0.2, focal_gamma=0.0)
    criterion = lct.CRITERIA[name](config, 4)
    logits, labels = torch.randn(30, 3, 4), torch.arange(30) % 4
    target = (0.8 * F.one_hot(labels, 4) + 0.05)[:, None]
    expected = -(target * F.log_softmax(logits, dim=2)).sum(dim=2)
    torch.testing.assert_close(criterion.losses(logits, labels), expected)


@pytest.mark.parametrize("name", sorted(lct.CRITERIA))
def test_heads_learn_by_themselves_and_answer_together(name: str) -> None:
    torch.manual_seed(0)
    config = lct.Config(criterion=name, emb_dim=48, heads=3)
    together, labels = lct.CRITERIA[name](config, 5), torch.arange(10) % 5
    raw = torch.randn(10, 48)
    logits, plain = together(lct.normalize_heads(raw, 3), labels)
    assert logits.shape == (10, 3, 5)
    answers = []
    for head in range(3):
        alone, columns = lct.CRITERIA[name](lct.Config(criterion=name, emb_dim=16), 5), slice(16 * head, 16 * head + 16)
        alone.weight.data = together.weight.detach()[:, columns].clone()
        expected, plain_alone = alone(F.normalize(raw[:, columns]), labels)
        torch.testing.assert_close(logits[:, head], expected[:, 0])
        torch.testing.assert_close(together.losses(logits, labels)[:, head], alone.losses(expected, labels)[:, 0])
        answers.append(plain_alone)
    torch.testing.assert_close(plain, torch.stack(answers).mean(dim=0))
    torch.testing.assert_close(together.plain_logits(lct.normalize_heads(raw, 3)), plain)


def test_embeddings_of_heads_have_unit_norm_and_the_mean_cosine_of_the_heads() -> None:
    one, other = (lct.normalize_heads(torch.randn(6, 12), 3) for _ in range(2))
    torch.testing.assert_close(one.norm(dim=1), torch.ones(6))
    cosines = F.cosine_similarity(one.unflatten(1, (3, 4)), other.unflatten(1, (3, 4)), dim=2)
    torch.testing.assert_close((one * other).sum(dim=1), cosines.mean(dim=1))
