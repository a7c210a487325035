"""The ViT and the head that pretrain_dino_face.py and pretrain_dino_hands.py train, and functions to load and use the exports."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lct_dino3 as lct  # before torch: it sets environment variables that torch reads at import

# isort: split
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

ARCHITECTURE = "slt_vitsmall_patch16"  # name of the model in exported files, for every geometry
GEOMETRY = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
EXPORT_WANTED = "give a file that --export-backbone has written"
TOKEN_STD = 0.02  # initial deviation of the mask token, as of timm's position embeddings


class ViTSmallPatch16(VisionTransformer):
    """timm's VisionTransformer without classifier, with a learned token in place of masked patches."""

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
        """Return the tokens (B, 1 + N, embed_dim) of normalised images (B, 3, H, W), the class token first.

        Args:
            images: sides are multiples of patch_size.
            masks: bool (B, N), patches row by row; the pixels of a masked patch have no effect.
        """
        patches = self.patch_embed(images)  # (B, H / patch, W / patch, embed_dim)
        if masks is not None:
            patches = torch.where(masks.view(*patches.shape[:3], 1), self.mask_token.to(patches.dtype), patches)
        return self.norm(self.blocks(self.norm_pre(self._pos_embed(patches))))


class DinoHead(nn.Module):
    """DINO's projection head: an MLP of three layers, L2 normalisation, and a last layer with rows of unit length."""

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
        """Return the logits (..., out_dim) of tokens (..., in_dim): cosines in float32, also under autocast.

        The teacher's temperature would multiply the rounding errors of bf16 by 25.
        """
        bottleneck = self.mlp(tokens).float()
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(F.normalize(bottleneck, dim=-1), F.normalize(self.prototypes, dim=-1))


def init_linear(module: nn.Module) -> None:
    """Initialise the linear layers and patch embeddings of a module: weights of deviation 1 / sqrt(fan_in), biases 0.

    timm's deviation of 0.02 suits widths of some thousand: at 96, each layer shrinks its signal by five, and nothing is learned.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fan_in = layer.weight[0].numel()
            nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(fan_in), a=-2, b=2)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def load_dinov2_backbone(spec: str) -> ViTSmallPatch16:
    """Build the model of an exported backbone in eval mode; `spec` is `file::PATH:slt_vitsmall_patch16`.

    Raises:
        UserError: the spec has another form, the file is missing or no export, or its weights do not fit its geometry.
    """
    remedy = f"write file::PATH:{ARCHITECTURE}"
    path, _, architecture = spec.removeprefix("file::").rpartition(":")  # the path may contain colons
    if not spec.startswith("file::") or not path:
        raise lct.UserError("names no file", spec, remedy)
    if architecture != ARCHITECTURE:
        raise lct.UserError(f"{architecture} is no model that is known here", spec, remedy)
    weights, metadata = read_backbone(Path(path), path)
    geometry = {name: metadata["geometry"][name] for name in GEOMETRY}
    try:
        problem = check_geometry(geometry)
        model = None if problem else ViTSmallPatch16(**geometry)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:  # e.g. sizes of 0 or below
        problem = str(error)
    if problem:
        raise lct.UserError(f"its geometry makes no model: {problem}", path, EXPORT_WANTED)
    fill_model(model, weights, path)
    return model.eval()


def read_backbone(path: Path, where: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read weights and metadata of an exported backbone without executing anything in the file; messages call it `where`.

    Raises:
        UserError: the file is missing, damaged, or no export.
    """
    if not path.is_file():
        raise lct.UserError("there is no such file", where, EXPORT_WANTED)
    try:
        lct.check_zip(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, I/O and other errors of damaged or foreign files
        if lct.is_out_of_memory(error):
            raise
        problem = f"cannot be read as an exported backbone: {str(error).split('. ')[0][:200]}"
        raise lct.UserError(problem, where, EXPORT_WANTED) from error
    geometry = {name: (int, float) if name == "mlp_ratio" else int for name in GEOMETRY}
    try:
        lct.check_form(payload, {"model": {str: torch.Tensor}, "metadata": {"geometry": geometry}})
    except ValueError as error:
        raise lct.UserError(f"is no exported backbone: {error}", where, EXPORT_WANTED) from error
    lct.check_weights_finite(payload["model"], where)
    return payload["model"], payload["metadata"]


def check_geometry(geometry: Mapping[str, Any]) -> str:
    """Describe what is wrong with the geometry of a ViT; return '' if it is valid."""
    if geometry["image_size"] % geometry["patch_size"]:
        return f"{geometry['image_size']} px is not a multiple of patches of {geometry['patch_size']} px"
    if geometry["embed_dim"] % geometry["num_heads"]:
        return f"{geometry['embed_dim']} dimensions are not a multiple of {geometry['num_heads']} heads"
    return ""


def fill_model(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Load weights into a model.

    Raises:
        UserError: names the tensors that are missing, unexpected, or of another shape.
    """
    lct.check_weights(model.state_dict(), weights, where, EXPORT_WANTED)
    model.load_state_dict(weights, strict=False)


class MultiStreamEncoder(nn.Module):
    """Fuses face and hand crops and the pose frame by frame: a backbone and a projection per stream, their sum, a LayerNorm."""

    def __init__(
        self, backbones: Mapping[str, ViTSmallPatch16], d_model: int = 512, pose_dim: int | None = None
    ) -> None:
        """Args:
        backbones: backbone of each stream in use, of face, hand_left and hand_right.
        d_model: width of the output.
        pose_dim: values per frame of the pose; None ignores the pose.
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
        """Return the fused features (B, T, d_model).

        Args:
            face: normalised crops (B, T, 3, H, W), like both hands; crops of a stream without backbone are ignored.
            hand_left: see `face`.
            hand_right: see `face`.
            pose: (B, T, pose_dim), or more dimensions that flatten to it.
            masks: bool (B, T) of a stream: True where it was seen; a learned vector replaces it elsewhere.

        Raises:
            ValueError: a stream that the encoder was built with is None.
        """
        streams = {"face": face, "hand_left": hand_left, "hand_right": hand_right, "pose": pose}
        fused = 0
        for name, projection in self.projections.items():
            if streams[name] is None:
                raise ValueError(f"{name} is None, but the encoder was built with it")
            features = streams[name].flatten(2) if name == "pose" else self._embed(name, streams[name])
            projected = projection(features)
            if masks is not None and name in masks:
                projected = torch.where(masks[name][:, :, None], projected, self.missing[name])
            fused = fused + projected
        return self.norm(fused)

    def _embed(self, name: str, crops: torch.Tensor) -> torch.Tensor:
        """Return the class tokens (B, T, embed_dim) of a stream."""
        return self.backbones[name].encode(crops.flatten(0, 1))[:, 0].unflatten(0, crops.shape[:2])
