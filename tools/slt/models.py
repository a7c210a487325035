"""The ViT that pretrain_dino_face.py and pretrain_dino_hands.py train, its head, and how others load and use what they export."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lct_dino3 as lct  # before torch: it sets what torch reads when it is imported

# isort: split
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

ARCHITECTURE = "slt_vitsmall_patch16"  # name of the model in exported files, whatever its geometry
GEOMETRY = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
EXPORT_WANTED = "give a file that --export-backbone has written"
TOKEN_STD = 0.02  # of class, mask and position tokens at the start, as timm has it


def init_linear(module: nn.Module) -> None:
    """Give the linear layers and patch embeddings in a module weights of standard deviation 1 / sqrt(fan_in), biases 0.

    Timm's 0.02 is made for widths of some thousand: at 96, signals shrink by five with each layer, and nothing is learned.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fan_in = layer.weight[0].numel()
            nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(fan_in), a=-2, b=2)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ViTSmallPatch16(VisionTransformer):
    """timm's VisionTransformer without classifier, and with a learned token that stands for masked patches."""

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            dynamic_img_size=True,  # local crops are smaller than global ones
        )
        self.geometry = dict(
            zip(GEOMETRY, (image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio), strict=True)
        )
        init_linear(self)
        self.mask_token = nn.Parameter(torch.empty(embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=TOKEN_STD)

    def encode(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Return tokens (B, 1 + N, embed_dim), the class token first, of normalised images (B, 3, H, W).

        Args:
            images: their sides are multiples of patch_size.
            masks: bool (B, N), row by row; nothing of the pixels of a masked patch is seen.
        """
        patches = self.patch_embed(images)  # (B, H / patch, W / patch, embed_dim)
        if masks is not None:
            patches = torch.where(masks.view(*patches.shape[:3], 1), self.mask_token.to(patches.dtype), patches)
        return self.norm(self.blocks(self.norm_pre(self._pos_embed(patches))))


class DinoHead(nn.Module):
    """The projection head of DINO: three layers, an L2 bottleneck, and a last layer whose rows have unit length."""

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck_dim: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        init_linear(self)
        self.prototypes = nn.Parameter(torch.randn(out_dim, bottleneck_dim) / math.sqrt(bottleneck_dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (..., out_dim), which are cosines, of tokens (..., in_dim)."""
        return F.linear(F.normalize(self.mlp(tokens), dim=-1), F.normalize(self.prototypes, dim=-1))


def check_geometry(geometry: Mapping[str, Any]) -> str:
    """Return what is wrong with the geometry of a ViT, or ''."""
    if geometry["image_size"] % geometry["patch_size"]:
        return f"{geometry['image_size']} px is not a multiple of patches of {geometry['patch_size']} px"
    if geometry["embed_dim"] % geometry["num_heads"]:
        return f"{geometry['embed_dim']} dimensions are not a multiple of {geometry['num_heads']} heads"
    return ""


def read_backbone(path: Path, where: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return weights and metadata of an exported backbone, never executing anything in the file.

    Args:
        path: the file.
        where: what names it, for messages.

    Raises:
        UserError: it is missing, damaged, or no export.
    """
    if not path.is_file():
        raise lct.UserError("there is no such file", where, EXPORT_WANTED)
    try:
        lct.check_zip(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle and I/O errors: whatever a damaged or foreign file provokes
        problem = f"cannot be read as an exported backbone: {str(error).split('. ')[0][:200]}"
        raise lct.UserError(problem, where, EXPORT_WANTED) from error
    geometry = {name: (int, float) if name == "mlp_ratio" else int for name in GEOMETRY}
    try:
        lct.check_form(payload, {"model": {str: torch.Tensor}, "metadata": {"geometry": geometry}})
    except ValueError as error:
        raise lct.UserError(f"is no exported backbone: {error}", where, EXPORT_WANTED) from error
    lct.check_weights_finite(payload["model"], where)
    return payload["model"], payload["metadata"]


def fill_model(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Load weights that have to fit a model.

    Raises:
        UserError: naming the tensors that are missing, foreign, or of another shape.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    unfit = [key for key in sorted(expected.keys() | shapes.keys()) if expected.get(key) != shapes.get(key)]
    if unfit:
        named = ", ".join(
            f"{key} {shapes.get(key, 'none')} instead of {expected.get(key, 'none')}" for key in unfit[:4]
        )
        raise lct.UserError(f"{len(unfit)} of its tensors do not fit the model: {named}", where, EXPORT_WANTED)
    model.load_state_dict(weights)


def load_dinov2_backbone(spec: str) -> ViTSmallPatch16:
    """Build the model of an exported backbone with the geometry that the file says, in eval mode.

    Args:
        spec: `file::PATH:slt_vitsmall_patch16`.

    Raises:
        UserError: the words are others, the file is missing or no export, or its weights do not fit its geometry.
    """
    remedy = f"write file::PATH:{ARCHITECTURE}"
    path, _, architecture = spec.removeprefix("file::").rpartition(":")  # a path may hold colons itself
    if not spec.startswith("file::") or not path:
        raise lct.UserError("names no file", spec, remedy)
    if architecture != ARCHITECTURE:
        raise lct.UserError(f"{architecture} is no model that is known here", spec, remedy)
    weights, metadata = read_backbone(Path(path), path)
    geometry = {name: metadata["geometry"][name] for name in GEOMETRY}
    try:
        problem = check_geometry(geometry)
        model = None if problem else ViTSmallPatch16(**geometry)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:  # whatever stands there for numbers
        problem = str(error)
    if problem:
        raise lct.UserError(f"its geometry makes no model: {problem}", path, EXPORT_WANTED)
    fill_model(model, weights, path)
    return model.eval()


class MultiStreamEncoder(nn.Module):
    """Fuse crops of face and hands, frame by frame, with the pose: a backbone a stream, a projection each, their sum, a norm."""

    def __init__(
        self, backbones: Mapping[str, ViTSmallPatch16], d_model: int = 512, pose_dim: int | None = None
    ) -> None:
        """Args:
        backbones: by stream: face, hand_left, hand_right, or some of them.
        d_model: width of the output.
        pose_dim: numbers a frame in the pose; None = it is not used.
        """
        super().__init__()
        self.backbones = nn.ModuleDict(backbones)
        widths = {name: backbone.embed_dim for name, backbone in backbones.items()}
        if pose_dim is not None:
            widths["pose"] = pose_dim
        self.projections = nn.ModuleDict({name: nn.Linear(width, d_model) for name, width in widths.items()})
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.zeros(d_model)) for name in widths})
        self.norm = nn.LayerNorm(d_model)

    def forward(
        self,
        face: torch.Tensor,
        hand_left: torch.Tensor,
        hand_right: torch.Tensor,
        pose: torch.Tensor | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return (B, T, d_model).

        Args:
            face: normalised crops (B, T, 3, H, W), as are those of the hands.
            hand_left: of a stream without backbone nothing is used.
            hand_right: as the left one.
            pose: (B, T, pose_dim), or more dimensions that are flattened to it.
            masks: by stream bool (B, T): where it was seen. Elsewhere a learned vector stands for it.
        """
        streams = {"face": face, "hand_left": hand_left, "hand_right": hand_right, "pose": pose}
        fused = 0
        for name, projection in self.projections.items():
            values = streams[name].flatten(2) if name == "pose" else self._embed(name, streams[name])
            projected = projection(values)
            if masks is not None and name in masks:
                projected = torch.where(masks[name][:, :, None], projected, self.missing[name])
            fused = fused + projected
        return self.norm(fused)

    def _embed(self, name: str, crops: torch.Tensor) -> torch.Tensor:
        """Return the class tokens (B, T, embed_dim) of a stream."""
        return self.backbones[name].encode(crops.flatten(0, 1))[:, 0].unflatten(0, crops.shape[:2])
