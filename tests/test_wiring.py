"""What reaches the model, step by step: a small timm model that remembers its inputs is trained as users train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import draw_image, image_bytes, make_dataset
from PIL import Image
from scipy.ndimage import label as find_regions
from timm.models import register_model
from torch import nn

SEEN: list[torch.Tensor] = []  # (B, C, H, W), what training showed at each step
DROPPED: list[torch.Tensor] = []  # (B, 6) bool, what dropout took at each step


class Recorder(nn.Module):
    """A linear layer on mean colours, with dropout, that notes what it sees while it is trained."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "input_size": (in_chans, 32, 32)}
        self.layer = nn.Linear(in_chans, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (B, 6)."""
        features = self.layer(images.mean(dim=(2, 3)))
        kept = F.dropout(torch.ones_like(features), 0.5, self.training)
        if self.training and images.device.type == "cpu":
            SEEN.append(images.detach().clone())
            DROPPED.append(kept == 0)
        return features * kept


@register_model
def lct_test_recorder(pretrained: bool = False, in_chans: int = 3, **_: object) -> Recorder:
    """Build the model for timm."""
    return Recorder(in_chans)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Begin each test with nothing seen."""
    SEEN.clear()
    DROPPED.clear()
    yield
    SEEN.clear()
    DROPPED.clear()


RECORDED = (
    "--model_id lct_test_recorder --no-pretrained --no-freeze_backbone --img_size 32 --gpus 0 --workers 0".split()
)


def test_each_step_draws_its_own_mixing_and_its_own_dropout(tmp_path: Path, call_main: Callable) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(24):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            pixels[16:] = 255 * (number % 2)  # black or white: what is between them has been mixed
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number:02d}.png")
    mixing = ("--mixing", "mixup", "--mixing_p", 1, "--train_augmentations", "[]")
    places = ("--data_root", tmp_path / "data", "--out_dir", tmp_path / "run")
    assert call_main(*places, *RECORDED, "--batch", 10, "--epochs", 3, *mixing) == 0
    shares = []
    for images in SEEN:
        mixed = images[:, 0, 24, 16]
        mixed = mixed[(mixed > 0.002) & (mixed < 0.998)]
        shares += (
            mixed[:1].maximum(1 - mixed[:1]).tolist()
        )  # of the image itself; the least of the two is its partner's
    assert len(SEEN) >= 9 and len(shares) >= 6
    assert len({round(share, 2) for share in shares}) >= 0.7 * len(shares)
    first = {tuple(dropped[:5].flatten().tolist()) for dropped in DROPPED}
    assert len(first) == len(DROPPED)


def test_a_mask_that_moves_brings_in_no_object_from_outside(tmp_path: Path, call_main: Callable) -> None:
    """The mask, as the model sees it, stays in one piece, whatever is shown beyond the border of the crop."""
    make_dataset(tmp_path / "data", {"a": 30, "b": 30}, side=48)
    mask = np.zeros((48, 48), np.uint8)
    mask[7:-7, 7:-7] = 255
    for path in sorted((tmp_path / "data").glob("*/*.png")):
        (path.parent / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(path.parent / "masks" / path.name)
    places = ("--data_root", tmp_path / "data", "--out_dir", tmp_path / "run")
    assert call_main(*places, *RECORDED, "--batch", 20, "--epochs", 2, "--crop_mode", "mask", "--in_channels", 4) == 0
    masks = torch.cat([images[:, 3] for images in SEEN]).numpy() > 0
    assert len(masks) > 60 and len(np.unique(masks.reshape(len(masks), -1), axis=0)) > 30, "they move"
    assert [find_regions(own)[1] for own in masks] == [1] * len(masks)


def test_the_head_is_a_function_of_the_seed_however_the_backbone_came(
    small_data: Path, tmp_path: Path, call_main: Callable
) -> None:
    """And the linear layer of --criterion cross_entropy is drawn as torch.nn.Linear draws that of one head."""

    def train(name: str, *flags: object) -> dict[str, torch.Tensor]:
        places = ("--data_root", small_data, "--out_dir", tmp_path / name)
        model = "--model_id test_resnet --img_size 32 --emb_dim 32 --heads 2 --precision fp32 --gpus 0 --workers 0"
        recipe = "--seed 1 --epochs 1 --lr 1e-8 --criterion cross_entropy"  # so that it stays where it began
        assert call_main(*places, *model.split(), *recipe.split(), *flags) == 0
        weights = torch.load(tmp_path / name / "checkpoint_best.pth", weights_only=True)["model"]
        return {
            key: value for key, value in weights.items() if key.endswith("weight") and "norm" not in key and len(value)
        }

    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "backbone.pth")
    random = train("random", "--no-pretrained")
    from_file = train("file", "--backbone_weights", tmp_path / "backbone.pth")
    assert random.keys() == from_file.keys() and {key.split(".")[0] for key in random} == {"head", "criterion"}
    assert all(torch.allclose(random[key], from_file[key], atol=1e-5) for key in random)
    other = train("seed", "--backbone_weights", tmp_path / "backbone.pth", "--seed", 2)
    assert not any(torch.allclose(other[key], from_file[key], atol=1e-2) for key in other)
    bound = (2 / 32) ** 0.5  # two heads, each of which sees half of the 32 numbers
    assert 0.95 * bound < random["criterion.weight"].abs().max() < bound + 1e-5


# --- data


def test_a_mask_is_turned_as_its_exif_says(tmp_path: Path, call_main: Callable) -> None:
    """A mask of other sides than its crop is refused; one that lies on its side in the file is not."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name in ("a", "b"):
        (tmp_path / "data" / name / "masks").mkdir(parents=True)
        for number in range(4):
            crop = draw_image(ord(name), number).crop((0, 0, 56, 30))
            crop.save(tmp_path / "data" / name / f"{number}.png")
            mask = Image.new("L", (30, 56))
            mask.paste(255, (5, 5, 20, 40))
            data = image_bytes(mask, "PNG", **({"exif": exif} if name == "a" else {}))
            (tmp_path / "data" / name / "masks" / f"{number}.png").write_bytes(data)
    assert call_main("scan", "--data_root", tmp_path / "data", "--out_dir", tmp_path / "run") == 0
    report = json.loads((tmp_path / "run" / "data_report.json").read_text("utf-8"))
    assert (report["classes"]["a"]["masks"], report["classes"]["b"]["masks"]) == (4, 0)
    assert {Path(item["path"]).parts[0] for item in report["masks"]["refused"]} == {"b"}


def test_single_images_fill_what_groups_have_left_of_each_split(tmp_path: Path, call_main: Callable) -> None:
    """All groups together go to some split first; single images then make up the shares that were asked for."""
    make_dataset(tmp_path / "data", {"a": 60, "b": 60})
    for path in sorted((tmp_path / "data").glob("*/*.png")):
        number = int(path.stem)
        shot = 100 + number // 6 if number < 18 else number  # three groups of six, and 42 single images
        path.rename(path.with_name(f"{number:04d}_{path.parent.name}{shot}.png"))
    flags = ("--group_regex", r"^\d+_([ab]\d+)", "--val_split", 0.2, "--test_split", 0.1)
    assert call_main("scan", "--data_root", tmp_path / "data", "--out_dir", tmp_path / "run", *flags) == 0
    report = json.loads((tmp_path / "run" / "data_report.json").read_text("utf-8"))
    for name in ("a", "b"):
        assert report["classes"][name]["groups"] == 45
        assert [report["classes"][name][split] for split in ("train", "val", "test")] == [42, 12, 6]
