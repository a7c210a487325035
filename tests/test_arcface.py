"""Section 10: the angular margin against a float64 formula and a peer, and its gradient where others give NaN."""

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


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3, 0.5, 1.2])
def test_logits_equal_the_float64_formula(margin: float) -> None:
    cosine = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 500), [-1, -0.999, 0, 0.999, 1]])
    cosine = np.stack([cosine, np.roll(cosine, 7), np.roll(cosine, 31)], axis=1).astype(np.float32)
    labels = np.arange(len(cosine)) % 3
    ours = 30 * lct.add_angular_margin(torch.from_numpy(cosine), torch.from_numpy(labels), margin)
    np.testing.assert_allclose(ours.numpy(), brute_force_logits(cosine, labels, margin, 30.0), atol=2e-4 * 30)


def test_only_the_true_class_is_changed_and_the_margin_makes_it_harder() -> None:
    cosine = torch.linspace(-1, 1, 41)[:, None].repeat(1, 4)
    shifted = lct.add_angular_margin(cosine, torch.full((41,), 2), 0.3)
    assert torch.equal(shifted[:, [0, 1, 3]], cosine[:, [0, 1, 3]])
    assert (shifted[:, 2] < cosine[:, 2]).all()
    assert (shifted[1:, 2] > shifted[:-1, 2]).all(), "the harder the sample the lower its logit, also past pi"


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 1.0 - 2**-24, -1.0 + 2**-24])
def test_loss_and_gradient_are_finite_at_the_poles(value: float) -> None:
    cosine = torch.full((2, 3), value, requires_grad=True)
    loss = F.cross_entropy(30 * lct.add_angular_margin(cosine, torch.tensor([0, 2]), 0.3), torch.tensor([0, 2]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(cosine.grad).all()


def test_gradient_through_unit_vectors_equal_to_their_class_direction_is_finite() -> None:
    arcface = lct.ArcFace(8, 5, margin=0.3, scale=30.0)
    raw = arcface.weight.detach().repeat(40, 1).mul(torch.rand(200, 1) * 5).requires_grad_()
    logits, cosine = arcface(F.normalize(raw), torch.arange(5).repeat(40))
    assert (cosine.diagonal() > 0.999999).all()
    F.cross_entropy(logits[:, :, 0], torch.arange(5).repeat(40)).backward()
    assert torch.isfinite(raw.grad).all() and torch.isfinite(arcface.weight.grad).all()


def test_gradient_is_the_derivative_of_the_formula() -> None:
    cosine = torch.linspace(-0.9, 0.95, 30, dtype=torch.float64)[:, None].requires_grad_()
    lct.add_angular_margin(cosine, torch.zeros(30, dtype=torch.int64), 0.3).sum().backward()
    theta = torch.acos(cosine.detach())
    np.testing.assert_allclose(cosine.grad, torch.sin(theta + 0.3) / torch.sin(theta), rtol=1e-9)


def test_loss_and_gradient_equal_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    arcface = lct.ArcFace(16, 7, margin=0.3, scale=30.0)
    peer = losses.ArcFaceLoss(7, 16, margin=math.degrees(0.3), scale=30.0)
    peer.W.data = arcface.weight.detach().T.clone()
    labels = torch.arange(64) % 7
    raw = torch.randn(64, 16)
    mine, theirs = raw.clone().requires_grad_(), raw.clone().requires_grad_()
    loss = F.cross_entropy(arcface(F.normalize(mine), labels)[0][:, :, 0], labels)
    peer_loss = peer(theirs, labels)
    loss.backward()
    peer_loss.backward()
    assert float(loss) == pytest.approx(float(peer_loss), rel=1e-5)
    np.testing.assert_allclose(mine.grad, theirs.grad, atol=1e-5)


def test_evaluation_never_sees_the_margin() -> None:
    arcface = lct.ArcFace(8, 4, margin=0.5, scale=30.0)
    embeddings = F.normalize(torch.randn(10, 8))
    expected = embeddings @ F.normalize(arcface.weight).T
    torch.testing.assert_close(arcface.cosine(embeddings), expected)
    torch.testing.assert_close(arcface(embeddings, torch.arange(10) % 4)[1], expected)


def test_parts_learn_as_heads_of_their_own_and_answer_together() -> None:
    torch.manual_seed(0)
    together, labels = lct.ArcFace(12, 5, margin=0.3, scale=30.0, parts=3), torch.arange(10) % 5
    raw = torch.randn(10, 12)
    logits, cosine = together(lct.normalize_parts(raw, 3), labels)
    assert logits.shape == (10, 5, 3)
    cosines = []
    for part in range(3):
        alone, own = lct.ArcFace(4, 5, margin=0.3, scale=30.0), slice(4 * part, 4 * part + 4)
        alone.weight.data = together.weight.detach()[:, own].clone()
        expected, own_cosine = alone(F.normalize(raw[:, own]), labels)
        torch.testing.assert_close(logits[:, :, part], expected[:, :, 0])
        cosines.append(own_cosine)
    torch.testing.assert_close(cosine, torch.stack(cosines).mean(dim=0))
    torch.testing.assert_close(together.cosine(lct.normalize_parts(raw, 3)), cosine)
