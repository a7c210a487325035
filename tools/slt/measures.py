"""Measures of features that need no training: two-view retrieval and k-NN accuracy; pixel and colour features as baselines."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

NEIGHBOURS = 5
TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO
PIXEL_SIDE = 16  # px of the downscaled images whose pixels are the features
COLOUR_BINS = 8  # per channel of the joint histogram


def two_view_retrieval(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the share of first views whose nearest second view is of the same image; features (N, D) each, joint mean removed."""
    mean = torch.cat([first, second]).mean(dim=0)
    cosines = F.normalize(first - mean, dim=1) @ F.normalize(second - mean, dim=1).T
    return (cosines.argmax(dim=1) == torch.arange(len(first), device=cosines.device)).double().mean().item()


def knn_accuracy(
    gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray | None, query_labels: np.ndarray | None
) -> float:
    """Return the accuracy of queries classified by their NEIGHBOURS nearest gallery features, whose votes are weighted by cosine.

    Args:
        gallery: features (N, D); their mean and deviation standardise all features.
        gallery_labels: (N,).
        queries: features (M, D); None classifies each gallery feature by the other ones.
        query_labels: (M,).
    """
    mean = gallery.mean(axis=0)
    deviation = gallery.std(axis=0) + 1e-6
    gallery_unit, query_unit = (
        F.normalize(torch.from_numpy((features - mean) / deviation).float(), dim=1)
        for features in (gallery, gallery if queries is None else queries)
    )
    cosines = query_unit @ gallery_unit.T
    if queries is None:
        cosines.fill_diagonal_(-np.inf)
        query_labels = gallery_labels
    values, nearest = cosines.topk(min(NEIGHBOURS, len(gallery) - (queries is None)), dim=1)
    labels = torch.from_numpy(gallery_labels)[nearest]
    votes = torch.zeros(len(values), int(gallery_labels.max()) + 1)
    votes.scatter_add_(1, labels, (values / TEMPERATURE).softmax(dim=1))
    return (votes.argmax(dim=1).numpy() == query_labels).mean().item()


def pixel_features(images: torch.Tensor) -> np.ndarray:
    """Return the pixels of uint8 images (N, 3, H, W) downscaled to PIXEL_SIDE px, float32 (N, D)."""
    small = F.interpolate(images, (PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True)
    return small.flatten(1).float().numpy()


def colour_features(images: torch.Tensor) -> np.ndarray:
    """Return the joint colour histograms of uint8 images (N, 3, H, W), float32 (N, COLOUR_BINS ** 3)."""
    counts = []
    # One image at a time: cells take eight times the memory of pixels.
    for bins in images.flatten(2) // (256 // COLOUR_BINS):
        cells = np.ravel_multi_index(tuple(bins.numpy()), (COLOUR_BINS,) * 3)
        counts.append(np.bincount(cells, minlength=COLOUR_BINS**3))
    shares = np.stack(counts) / images[0, 0].numel()
    return np.sqrt(shares, dtype=np.float32)  # roots, as in Hellinger's distance: no bin drowns the rest
