"""The losses of DINO and iBOT: the student has to give the teacher's outputs for other views of an image and for masked patches.

DINO: arXiv:2104.14294; iBOT: arXiv:2111.07832; Sinkhorn: arXiv:2006.09882; KoLeo: arXiv:1806.03198.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Target(nn.Module):
    """Turns the teacher's logits into the target distribution of the student; centring or Sinkhorn prevents collapse."""

    def __init__(
        self, out_dim: int, temperature: float, center_momentum: float = 0.9, sinkhorn_iterations: int = 0
    ) -> None:
        """Args:
        out_dim: number of logits.
        temperature: temperature of the teacher.
        center_momentum: momentum of the running mean of the logits, the centre.
        sinkhorn_iterations: 0 subtracts the centre from the logits; else Sinkhorn runs on the logits without centring.
        """
        super().__init__()
        self.temperature = temperature
        self.center_momentum = center_momentum
        self.sinkhorn_iterations = sinkhorn_iterations
        self.register_buffer("center", torch.zeros(out_dim))

    def softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Return probabilities (N, K) without Sinkhorn: the row of an image does not depend on the rest of the batch."""
        offset = 0 if self.sinkhorn_iterations else self.center
        return F.softmax((logits - offset) / self.temperature, dim=-1)

    @torch.no_grad()
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Return target probabilities (N, K) of all the teacher's logits in a step, and update the centre once."""
        if self.sinkhorn_iterations:
            return sinkhorn(logits, self.temperature, self.sinkhorn_iterations)
        probabilities = self.softmax(logits)
        self.center.lerp_(logits.mean(dim=0), 1 - self.center_momentum)
        return probabilities


def sinkhorn(logits: torch.Tensor, temperature: float, num_iterations: int) -> torch.Tensor:
    """Return the probabilities (N, K) closest to softmax(logits / temperature) that use all K outputs equally often in a batch."""
    log_plan = logits / temperature  # in logarithms: at low temperatures, whole rows of exp() are 0
    for _ in range(num_iterations):
        log_plan = log_plan.log_softmax(dim=0).log_softmax(dim=1)
    return log_plan.exp()


def class_loss(student: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean cross-entropy of each student view with each teacher view except the same view.

    Args:
        student: logits (V, B, K), global views first.
        target: the teacher's probabilities (G, B, K) of the G global views.
        temperature: temperature of the student.
    """
    log_probabilities = F.log_softmax(student / temperature, dim=-1)
    num_global = len(target)
    num_views = len(student)
    losses = -torch.einsum("gbk,vbk->gv", target, log_probabilities) / student.shape[1]
    is_same = torch.eye(num_global, num_views, dtype=torch.bool, device=losses.device)
    return losses.masked_fill(is_same, 0.0).sum() / (num_global * (num_views - 1))


def patch_loss(student: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the cross-entropy of the student with the teacher at masked patches.

    Args:
        student: logits (M, K) of the masked patches.
        target: probabilities (M, K) of the teacher, which sees these patches.
        weights: weight (M,) of each patch; the weights sum to 1 if every view has masked patches.
        temperature: temperature of the student.
    """
    log_probabilities = F.log_softmax(student / temperature, dim=-1)
    return -((target * log_probabilities).sum(dim=-1) * weights).sum()


def koleo_loss(features: torch.Tensor) -> torch.Tensor:
    """Return minus the mean log distance of features (B, D) to their nearest neighbours on the unit sphere; spreads them evenly."""
    unit = F.normalize(features.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        cosines = unit @ unit.T
        nearest = cosines.fill_diagonal_(-math.inf).argmax(dim=1)
    return -((unit - unit[nearest]).norm(dim=1) + 1e-8).log().mean()


def mutual_information(probabilities: torch.Tensor) -> float:
    """Return H(mean p) - mean H(p) of probabilities (N, K), in nats: 0 if all rows are equal, as in a collapse."""

    def entropy(values: torch.Tensor) -> torch.Tensor:
        return -torch.xlogy(values, values).sum(dim=-1)

    values = probabilities.double()
    return float(entropy(values.mean(dim=0)) - entropy(values).mean())
