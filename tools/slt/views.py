"""Random views of images: a function of (seed, epoch, index), so that the number of loader workers does not change them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lct_dino3 as lct  # before torch: it sets environment variables that torch reads at import

# isort: split
import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

# First entries of the random seeds, so that order, views and masks draw from separate streams.
ORDER = 1
VIEWS = 2
MASKS = 3
ASPECT = (3 / 4, 4 / 3)  # range of the aspect ratio of crops, as in torchvision's RandomResizedCrop
BLUR_SIGMA = (0.1, 2.0)  # range, in px of a view of 224 px, as in DINO
SOLARIZE_FROM = 128
MASK_PROBABILITY = 0.5  # share of the global views that are masked, as in iBOT
MASK_SPREAD = 0.2  # largest deviation of the masked share from its mean, as in iBOT; less near 0 and 1
BLOCK_ASPECT = 0.3  # lowest aspect ratio of a masked block, as in BEiT; the highest is its inverse
BLOCK_TRIES = 10  # failures in a row that end a mask, as in iBOT
EVAL_AUGMENTATION = {
    **{"global_crop_scale": (0.5, 1.0), "local_crop_scale": (0.5, 1.0), "hflip_prob": 0.5},
    **{"brightness": 0.2, "contrast": 0.2, "saturation": 0.1, "hue": 0.02, "color_jitter_prob": 0.8},
}
LUMA = np.array(lct.LUMA)
# From RGB to YIQ, NTSC's colour space: a rotation about its first axis changes hues and leaves grays alone.
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(TO_YIQ)


@dataclass(frozen=True)
class Augmentation:
    """Parameters of random views; each probability applies to every view on its own."""

    image_size: int  # px of a global view
    local_crop_size: int
    num_local_crops: int
    global_crop_scale: tuple[float, float]  # share of the image's area
    local_crop_scale: tuple[float, float]
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # full turns
    color_jitter_prob: float = 0.0
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    solarize_prob: float = 0.0
    hflip_prob: float = 0.0

    def for_evaluation(self) -> Augmentation:
        """Return the mild augmentation that two-view retrieval uses for every training augmentation.

        With views as strong as those of training, features that ignore colours would score well.
        """
        return Augmentation(self.image_size, self.local_crop_size, 0, **EVAL_AUGMENTATION)

    def draw_view(self, image: torch.Tensor, side: int, scale: Sequence[float], rng: np.random.Generator) -> np.ndarray:
        """Draw a random view uint8 (side, side, 3) of a uint8 image (1, 3, H, W); `scale` is the range of its share of the area."""
        height, width = image.shape[2:]
        draws = rng.random(16)
        area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ASPECT[0]) + draws[1] * math.log(ASPECT[1] / ASPECT[0]))
        crop_width = min(width, max(1, round(math.sqrt(area * aspect))))
        crop_height = min(height, max(1, round(math.sqrt(area / aspect))))
        left = int(draws[2] * (width - crop_width + 1))
        top = int(draws[3] * (height - crop_height + 1))
        view = resize(image[:, :, top : top + crop_height, left : left + crop_width], side)
        if draws[4] < self.hflip_prob:
            view = view[:, ::-1]
        view = np.ascontiguousarray(view)
        is_gray = draws[6] < self.grayscale_prob
        if draws[5] < self.color_jitter_prob or is_gray:
            jitter = draws[7:11] if draws[5] < self.color_jitter_prob else np.full(4, 0.5)
            view = cv2.transform(view, self._colour_matrix(view, 2 * jitter - 1, is_gray))
        if draws[11] < self.gaussian_blur_prob:
            sigma = (BLUR_SIGMA[0] + draws[12] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])) * side / 224
            view = cv2.GaussianBlur(view, (0, 0), max(sigma, 0.05))
        if draws[13] < self.solarize_prob:
            view = np.where(view >= SOLARIZE_FROM, 255 - view, view)
        return view

    def _colour_matrix(self, view: np.ndarray, jitter: np.ndarray, is_gray: bool) -> np.ndarray:
        """Return an affine matrix (3, 4) that changes brightness, contrast, saturation and hue of RGB at once.

        All four are linear except for the offset of the contrast; hue rotates in YIQ. One product clips values only once.
        """
        brightness, contrast, saturation = 1 + jitter[:3] * (self.brightness, self.contrast, self.saturation)
        angle = jitter[3] * self.hue * math.tau
        rotate = np.array(
            [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]], dtype=np.float64
        )
        to_gray = np.tile(LUMA, (3, 1))
        saturate = saturation * np.eye(3) + (1 - saturation) * to_gray
        matrix = FROM_YIQ @ rotate @ TO_YIQ @ saturate * (brightness * contrast)
        offset = (1 - contrast) * brightness * float(LUMA @ cv2.mean(view)[:3])
        if is_gray:
            matrix = to_gray @ matrix
        return np.column_stack([matrix, np.full(3, offset)])


def resize(image: torch.Tensor, side: int) -> np.ndarray:
    """Resize a uint8 image (1, 3, H, W) to a square uint8 (side, side, 3), antialiased; the aspect ratio is not kept."""
    if image.shape[2:] != (side, side):
        image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
    return image[0].permute(1, 2, 0).numpy()


class Images:
    """Images by index: decoded at each read, or already decoded to small squares in memory that workers share."""

    def __init__(self, paths: Sequence[str], pixels: np.ndarray | None = None) -> None:
        self.paths = np.array(paths, dtype=lct.STRINGS)
        self.pixels = pixels  # uint8 (N, S, S, 3)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> torch.Tensor:
        """Return the uint8 image (1, 3, H, W) of an index, channels last in memory.

        Raises:
            UserError: the image was readable at the start of the run and no longer is.
        """
        if self.pixels is not None:
            image = self.pixels[index]
        else:
            try:
                image = lct.load_image(self.paths[index])
            except lct.ImageError as error:
                remedy = "put it back, or start afresh without it; the same command continues"
                raise lct.UserError(f"cannot be read any more: {error}", self.paths[index], remedy) from error
        return torch.from_numpy(image)[None].permute(0, 3, 1, 2)


class ViewKey(NamedTuple):
    """Identifies the views of an image in an epoch."""

    epoch: int  # from 1; 0 for evaluation
    index: int


class ViewBatch(NamedTuple):
    """A batch from the loader; the first axis counts the views of an image, the second the images."""

    global_views: torch.Tensor  # uint8 (2, B, 3, S, S)
    local_views: torch.Tensor  # uint8 (L, B, 3, s, s)
    masks: torch.Tensor  # bool (2, B, N): patches of the global views hidden from the student


class ViewDataset(Dataset):
    """Global views of each image, its local views, and masks of the global views."""

    def __init__(self, images: Images, augmentation: Augmentation, seed: int, grid: int, mask_ratio: float) -> None:
        self.images = images
        self.augmentation = augmentation
        self.seed = seed
        self.grid = grid  # patches per side of a global view
        self.mask_ratio = mask_ratio  # mean share of masked patches; 0: no masks

    def __getitem__(self, key: ViewKey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng((VIEWS, self.seed, *key))
        image = self.images.read(key.index)
        aug = self.augmentation
        global_views = [aug.draw_view(image, aug.image_size, aug.global_crop_scale, rng) for _ in range(2)]
        side = aug.local_crop_size
        local_views = np.zeros((aug.num_local_crops, side, side, 3), np.uint8)
        for view in local_views:
            view[...] = aug.draw_view(image, side, aug.local_crop_scale, rng)
        masks = np.zeros((2, self.grid**2), dtype=bool)
        if self.mask_ratio:
            rng = np.random.default_rng((MASKS, self.seed, *key))
            masks = np.stack([draw_block_mask(rng, self.grid, self.mask_ratio) for _ in range(2)])
        return np.stack(global_views), local_views, masks

    def __getitems__(self, keys: Sequence[ViewKey]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]] | lct.UserError:
        """Return the samples of a batch, or the UserError: torch passes on only the traceback of an error raised in a worker."""
        try:
            return [self[key] for key in keys]
        except lct.UserError as error:
            return error

    @staticmethod
    def collate(
        samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]] | lct.UserError,
    ) -> ViewBatch | lct.UserError:
        """Stack samples to a batch; pass an error on."""
        if isinstance(samples, lct.UserError):
            return samples
        global_views, local_views, masks = (
            torch.from_numpy(np.stack(arrays, axis=1)) for arrays in zip(*samples, strict=True)
        )
        return ViewBatch(global_views.permute(0, 1, 4, 2, 3), local_views.permute(0, 1, 4, 2, 3), masks)


def draw_block_mask(rng: np.random.Generator, grid: int, mean_ratio: float) -> np.ndarray:
    """Draw a mask of patches, bool (grid * grid,), made of blocks; it is empty with probability 1 - MASK_PROBABILITY."""
    mask = np.zeros((grid, grid), dtype=bool)
    if rng.random() >= MASK_PROBABILITY:
        return mask.reshape(-1)
    spread = min(MASK_SPREAD, mean_ratio, 1 - mean_ratio)
    target = max(1, round(rng.uniform(mean_ratio - spread, mean_ratio + spread) * grid * grid))
    failures = 0
    while failures < BLOCK_TRIES and (missing := target - int(mask.sum())) > 0:
        area = rng.uniform(1, missing + 1)
        aspect = math.exp(rng.uniform(math.log(BLOCK_ASPECT), -math.log(BLOCK_ASPECT)))
        height = min(grid, max(1, round(math.sqrt(area * aspect))))
        width = min(grid, max(1, round(math.sqrt(area / aspect))))
        top = rng.integers(grid - height + 1)
        left = rng.integers(grid - width + 1)
        block = mask[top : top + height, left : left + width]
        failures += 1
        if 0 < block.size - int(block.sum()) <= missing:
            block[...] = True
            failures = 0
    return mask.reshape(-1)


class EpochBatches:
    """Batch sampler of one epoch; set `epoch` and `first`, the batch to begin with, before each pass of the one loader."""

    def __init__(self, num_images: int, batch_size: int, seed: int, is_shuffled: bool) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.is_shuffled = is_shuffled
        self.epoch = 0
        self.first = 0

    @property
    def per_epoch(self) -> int:
        """Batches per epoch; images that do not fill a batch are left out, with shuffling other ones in each epoch."""
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[ViewKey]]:
        order = np.arange(self.num_images)
        if self.is_shuffled:
            order = np.random.default_rng((ORDER, self.seed, self.epoch)).permutation(self.num_images)
        for number in range(self.first, self.per_epoch):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield [ViewKey(self.epoch, index) for index in batch.tolist()]
