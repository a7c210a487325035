"""The networks of modelit.py: text encoders, a conditional VAE over voxels, its discriminator, and their optimizers.

An architecture is a dict of the options named in `ARCHITECTURE`; checkpoints store it. Voxels are float32 (B, 1, size, size, size).
Conditions are float32 (B, cond_dim): embedded prompts of unit norm, or the learned condition of the model for no prompt.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lct_dino3 as lct

# isort: split
import numpy as np
import torch
from torch import nn

ARCHITECTURE = (
    *("voxel_size", "cond_dim", "latent_dim", "hidden_channels", "num_encoder_layers", "num_decoder_layers"),
    *("use_batch_norm", "dropout_rate", "disc_hidden_channels", "disc_num_layers"),
)
CLIP_MODEL = "ViT-B-32"  # its text embeddings have 512 numbers, the default of --cond_dim
ENCODER_NAMES = {
    "openclip": f"open_clip {CLIP_MODEL}",
    "hash": "hash of letters, which knows spellings and no meanings",
}
LR_INPUTS = 64  # layers with at most this many inputs train at the full learning rate
MAX_GRADIENT_NORM = 1.0  # per network; without it and BatchNorm, one bad batch at lr 5e-3 costs the generator epochs


def embed_prompts(prompts: Sequence[str], text: dict[str, Any], cond_dim: int) -> np.ndarray:
    """Embed N prompts as unit vectors, float32 (N, cond_dim).

    `text["encoder"]` and `text["pretrained"]` are the values of --text_encoder and --clip_pretrained. Raises UserError if open_clip
    or its weights are missing, or if its embeddings do not have `cond_dim` numbers.
    """
    if text["encoder"] == "hash":
        return np.stack([_hash_prompt(prompt, cond_dim) for prompt in prompts])
    where = f"--text_encoder openclip --clip_pretrained {text['pretrained']}"
    offline = "--text_encoder hash works offline, and knows letters only"
    try:
        import open_clip
    except ImportError as error:
        raise lct.UserError("open_clip is not installed", where, f"pip install open_clip_torch; {offline}") from error
    if os.sep in text["pretrained"] and not Path(text["pretrained"]).is_file():
        raise lct.UserError("is no file", where, f"check the path; {offline}")
    logging.disable(logging.ERROR)  # the hub client logs each of ten retries; the UserError below says what matters
    try:
        build = functools.partial(open_clip.create_model, CLIP_MODEL, pretrained=text["pretrained"])
        model = build() if Path(text["pretrained"]).is_file() else lct.build_from_cache(build, CLIP_MODEL, lct.show)
    except Exception as error:  # the hub, a damaged file and an unknown name raise many types
        if lct.is_out_of_memory(error):
            raise
        problem = f"the text encoder has no weights: {lct.printable(str(error)).split('. ')[0][:200]}"
        if Path(text["pretrained"]).is_file():
            problem = f"the file holds no weights of {CLIP_MODEL}"
        remedy = f"give --clip_pretrained FILE with weights on this disk, or a network; {offline}"
        raise lct.UserError(problem, where, remedy) from error
    finally:
        logging.disable(logging.NOTSET)
    with torch.inference_mode():
        vectors = model.eval().encode_text(open_clip.get_tokenizer(CLIP_MODEL)(list(prompts)), normalize=True)
    if vectors.shape[1] != cond_dim:
        raise lct.UserError(f"{CLIP_MODEL} has {vectors.shape[1]}", f"--cond_dim {cond_dim}", "give that number")
    return vectors.float().numpy()


def _hash_prompt(prompt: str, cond_dim: int) -> np.ndarray:
    """Sum one random vector per letter trigram, so that chairs is near chair; words that most prompts share are left out."""
    words = re.findall(r"\w+", prompt.lower())
    words = [word for word in words if word not in ("a", "an", "the", "of", "3d", "model", "generate")] or words or [""]
    vector = np.zeros(cond_dim)
    for word in words:
        padded = f"<{word}>"
        for start in range(max(1, len(padded) - 2)):
            digest = hashlib.blake2b(padded[start : start + 3].encode(), digest_size=8).digest()
            vector += np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(cond_dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def score_baselines(shapes: Any, size: int) -> dict[str, float]:
    """Return the IoU of two predictions without learning: the mean training shape, and the mean training shape of the class.

    `shapes` is a `Shapes` of dataset_loader.py; its held-out shapes are scored, or the training shapes if none is held out. Each
    mean is thresholded at the level that does best on the first 200 training shapes.
    """
    train_rows = np.flatnonzero(~shapes.held_out)
    val_rows = np.flatnonzero(shapes.held_out)

    def grid(row: int) -> torch.Tensor:
        return torch.from_numpy(shapes.grids(np.array([row]), size))

    groups = {"mean_shape": np.zeros_like(shapes.labels), "class_mean": shapes.labels}
    scores = {}
    for name, labels in groups.items():
        means: dict[int, torch.Tensor] = {}
        for label in np.unique(labels[train_rows]).tolist():
            rows = train_rows[labels[train_rows] == label]
            total = np.zeros((1, 1, size, size, size), np.float32)
            for start in range(0, len(rows), 64):
                total += shapes.grids(rows[start : start + 64], size).sum(axis=0)
            means[label] = torch.from_numpy(total / len(rows))

        def score(rows: np.ndarray, level: float, labels: np.ndarray = labels, means: dict = means) -> float:
            ious = [
                compute_iou(means[labels[row]] + (0.5 - level), grid(row)).item()
                for row in rows
                if labels[row] in means  # a class without training shapes has no mean
            ]
            return float(np.mean(ious)) if ious else math.nan

        level = max(np.arange(1, 10) / 10, key=functools.partial(score, train_rows[:200]))
        scores[name] = score(val_rows if len(val_rows) else train_rows, level)
    return scores


def compute_iou(probabilities: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Return the IoU of each shape, (B,), with voxels filled from a probability of 0.5 on; two empty shapes have IoU 1."""
    predicted = (probabilities >= 0.5).flatten(1)
    target = (voxels >= 0.5).flatten(1)
    union = (predicted | target).sum(dim=1)
    return torch.where(union > 0, (predicted & target).sum(dim=1) / union.clamp(min=1), 1.0)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(q(z|x) || N(0, 1)) in nats per latent dimension, averaged over the batch."""
    mean = mean.float()
    log_variance = log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def make_latents(options: Any, latent_dim: int) -> torch.Tensor:
    """Return z (num_samples, latent_dim): drawn with --latent_seed, or read from --z; `options` are those of modelit.py.

    Raises UserError if the file does not hold such an array.
    """
    if options.z is None:
        generator = torch.Generator().manual_seed(options.latent_seed)
        return torch.randn(options.num_samples, latent_dim, generator=generator)
    try:
        with open(options.z, "rb") as file:  # `numpy.load` takes archives too
            values = np.lib.format.read_array(file, allow_pickle=False)
        with np.errstate(over="ignore"):  # infinity is refused below
            z = torch.from_numpy(np.atleast_2d(values).astype(np.float32, casting="same_kind"))
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).partition(". ")[0]
        raise lct.UserError(
            f"cannot be read: {reason}", options.describe("z"), "write numbers with numpy.save"
        ) from error
    if z.ndim != 2 or z.shape[1] != latent_dim or not len(z) or not torch.isfinite(z).all():
        problem = f"has the shape {values.shape}, or numbers that are not finite"
        remedy = f"give finite numbers of shape ({latent_dim},) or (N, {latent_dim})"
        raise lct.UserError(problem, options.describe("z"), remedy)
    if "num_samples" in options.origins and options.num_samples != len(z):
        raise lct.UserError(f"--z has {lct.count_of(len(z), 'row')}", options.describe("num_samples"), "leave it out")
    return z


class VoxelEncoder(nn.Module):
    """Maps voxels and a condition to the mean and log variance of z."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        channels = layer_channels(architecture["hidden_channels"], architecture["num_encoder_layers"])
        side = architecture["voxel_size"] >> len(channels)
        self.tower = make_tower(channels, architecture)
        self.posterior = nn.Linear(channels[-1] * side**3 + architecture["cond_dim"], 2 * architecture["latent_dim"])

    def forward(self, voxels: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance, each (B, latent_dim)."""
        mean, log_variance = self.posterior(torch.cat([self.tower(voxels), condition], dim=1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)


class ConditionalVoxelDecoder(nn.Module):
    """Maps z and a condition to the logits of voxels."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        channels = layer_channels(architecture["hidden_channels"], architecture["num_decoder_layers"])[::-1]
        side = architecture["voxel_size"] >> len(channels)
        num_inputs = architecture["latent_dim"] + architecture["cond_dim"]
        self.start = nn.Sequential(nn.Linear(num_inputs, channels[0] * side**3), nn.LeakyReLU(0.2))
        self.grid = nn.Unflatten(1, (channels[0], side, side, side))
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += make_block(nn.ConvTranspose3d(inputs, outputs, 4, stride=2, padding=1), outputs, architecture)
        self.layers = nn.Sequential(*layers, nn.ConvTranspose3d(channels[-1], 1, 4, stride=2, padding=1))

    def forward(self, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 1, size, size, size)."""
        # Scaled so that its entries are as large as those of z, and neither drowns the other. The encoder does not scale it: a step
        # of Adam at lr 5e-3 would move the mean of z by several units, and KL would start at 60 nats per dimension.
        scaled = condition * condition.shape[1] ** 0.5
        return self.layers(self.grid(self.start(torch.cat([z, scaled], dim=1))))


class CVAE_Conditional(nn.Module):  # noqa: N801  the name that users know
    """The generator: encoder, decoder, and the learned condition for no prompt."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = VoxelEncoder(architecture)
        self.decoder = ConditionalVoxelDecoder(architecture)
        self.empty = nn.Parameter(torch.zeros(architecture["cond_dim"]))

    def make_condition(self, prompts: torch.Tensor, has_prompt: torch.Tensor) -> torch.Tensor:
        """Return conditions (B, cond_dim): the embedded prompt where `has_prompt` (B,) is true, else the learned one."""
        return torch.where(has_prompt[:, None], prompts, self.empty)

    def forward(
        self, voxels: torch.Tensor, prompts: torch.Tensor, has_prompt: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return logits, mean and log variance; z is drawn in training, and is the mean in evaluation."""
        condition = self.make_condition(prompts, has_prompt)
        mean, log_variance = self.encoder(voxels, condition)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(z, condition), mean, log_variance

    def reconstruct(self, voxels: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Return probabilities (B, 1, size, size, size) of shapes and their embedded prompts; in evaluation, from mean z."""
        logits, _, _ = self(voxels, prompts, torch.ones(len(voxels), dtype=torch.bool, device=voxels.device))
        return logits.float().sigmoid()

    def generate(self, z: torch.Tensor, prompts: torch.Tensor | None, guidance: float = 1.0) -> torch.Tensor:
        """Return probabilities (B, 1, size, size, size) for z and embedded prompts; None = without prompt."""
        empty = self.empty.expand(len(z), -1)
        if prompts is None:
            return self.decoder(z, empty).float().sigmoid()
        logits = self.decoder(z, prompts)
        if guidance != 1.0:  # classifier-free guidance, arXiv:2207.12598
            unconditional = self.decoder(z, empty)
            logits = unconditional + guidance * (logits - unconditional)
        return logits.float().sigmoid()


class Discriminator(nn.Module):
    """Maps voxel probabilities and a condition to the logit of being a real shape of that prompt."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        channels = layer_channels(architecture["disc_hidden_channels"], architecture["disc_num_layers"])
        side = architecture["voxel_size"] >> len(channels)
        self.tower = make_tower(channels, architecture)
        self.score = nn.Linear(channels[-1] * side**3 + architecture["cond_dim"], 1)

    def forward(self, voxels: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return logits (B,)."""
        return self.score(torch.cat([self.tower(voxels), condition], dim=1)).flatten()


def layer_channels(first: int, num_layers: int) -> list[int]:
    """Return the channels of each layer: twice as many in each further one, up to eight times the first."""
    return [first * min(2**layer, 8) for layer in range(num_layers)]


def make_tower(channels: Sequence[int], architecture: dict[str, Any]) -> nn.Sequential:
    """Return layers that each halve the grid, one for each number of channels, and a final Flatten."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *channels[:-1]), channels, strict=True):
        layers += make_block(nn.Conv3d(inputs, outputs, 4, stride=2, padding=1), outputs, architecture)
    return nn.Sequential(*layers, nn.Flatten())


def make_block(convolution: nn.Module, channels: int, architecture: dict[str, Any]) -> list[nn.Module]:
    """Return a convolution followed by BatchNorm, LeakyReLU and dropout, as far as the architecture has them."""
    block = [convolution]
    if architecture["use_batch_norm"]:
        block.append(nn.BatchNorm3d(channels))
    block.append(nn.LeakyReLU(0.2))
    if architecture["dropout_rate"]:
        block.append(nn.Dropout3d(architecture["dropout_rate"]))
    return block


# --- training


@dataclass
class TrainState:
    """Everything that changes during training."""

    model: CVAE_Conditional
    discriminator: Discriminator
    optimizers: list[torch.optim.Optimizer]  # of model and discriminator
    scalers: list[torch.amp.GradScaler]  # one per optimizer
    epoch: int = 0  # finished epochs


def start_state(options: Any, runtime: lct.Runtime) -> TrainState:
    """Return the state before the first epoch; `options` are those of modelit.py."""
    architecture = {name: getattr(options, name) for name in ARCHITECTURE}
    lct.seed_torch(options.seed, 0)
    model = CVAE_Conditional(architecture).to(runtime.device)
    discriminator = Discriminator(architecture).to(runtime.device)
    optimizers = [
        torch.optim.Adam(parameter_groups(network, lr))
        for network, lr in ((model, options.lr), (discriminator, options.lr * 0.1))
    ]
    # One scaler per optimizer: an overflow in one network must not lower the scale of the other.
    return TrainState(model, discriminator, optimizers, [runtime.make_scaler() for _ in optimizers])


def parameter_groups(network: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return one parameter group per learning rate; the rate of a layer falls with the square root of its number of inputs.

    Adam moves each weight by about the learning rate, whatever its size, and 5e-3 is a quarter of the initial weights of a layer
    with thousands of inputs. At one rate for all layers, KL exceeds 1,000 nats at 32^3 with the default networks.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for layer in network.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            num_inputs = 1
            if name == "weight" and isinstance(layer, nn.ConvTranspose3d):
                num_inputs = layer.in_channels * math.prod(layer.kernel_size) // math.prod(layer.stride)
            elif name == "weight" and isinstance(layer, nn.Conv3d | nn.Linear):
                num_inputs = parameter[0].numel()
            groups.setdefault(lr * min(1.0, (LR_INPUTS / num_inputs) ** 0.5), []).append(parameter)
    return [{"params": parameters, "lr": rate, "peak_lr": rate} for rate, parameters in groups.items()]


def fits_architecture(payload: dict[str, Any]) -> bool:
    """Return whether the weights in a checkpoint have the names and shapes of its architecture."""
    with torch.device("meta"):  # shapes without memory
        networks = {"model": CVAE_Conditional, "discriminator": Discriminator}
        expected = {name: network(payload["architecture"]).state_dict() for name, network in networks.items()}
    return all(
        {key: value.shape for key, value in weights.items()}
        == {key: value.shape for key, value in payload[name].items()}
        for name, weights in expected.items()
    )


def restore_state(state: TrainState, payload: dict[str, Any]) -> None:
    """Load a checkpoint into the state."""
    state.epoch = payload["epoch"]
    state.model.load_state_dict(payload["model"])
    state.discriminator.load_state_dict(payload["discriminator"])
    for optimizer, saved in zip(state.optimizers, payload["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for scaler, saved in zip(state.scalers, payload["scalers"], strict=True):
        if saved and scaler.is_enabled():
            scaler.load_state_dict(saved)


def take_step(state: TrainState, index: int, loss: torch.Tensor) -> None:
    """Step one of the two optimizers. Gradients that its loss leaves in the other network are zeroed before that network steps."""
    optimizer = state.optimizers[index]
    scaler = state.scalers[index]
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
    scaler.step(optimizer)
    scaler.update()
