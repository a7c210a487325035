"""Features that are no numbers, of weights that are none or by overflow, end a command in one sentence, wherever they are made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_dataset
from timm.models import register_model
from torch import nn

import lct_dino3 as lct

FLAGS = (
    "--model_id overflowing --no-pretrained --img_size 32 --batch 8 --workers 0 --gpus 0 --emb_dim 16 --save_every 0"
    " --precision fp32"
)
OVERFLOW: dict[str, float] = {}  # what the features of bright images are multiplied by, and after how many batches


class Overflowing(nn.Module):
    """Mean colours, and numbers that are too large for bright images, as activations are in fp16 for some images."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}
        self.layer = nn.Linear(3, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (B, 6)."""
        colours = images.mean(dim=(2, 3))
        features = self.layer(colours)
        if OVERFLOW and images.device.type == "cpu":
            OVERFLOW["after"] -= 1
            if OVERFLOW["after"] < 0:
                features = torch.where(colours.mean(dim=1, keepdim=True) > 0.6, features * OVERFLOW["factor"], features)
        return features


@register_model
def overflowing(pretrained: bool = False, **_: object) -> nn.Module:
    """Build it as timm builds models."""
    return Overflowing()


@pytest.fixture(autouse=True)
def no_overflow() -> None:
    OVERFLOW.clear()


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, with a white crop in each split that only its name tells from the others."""
    from PIL import Image

    root = make_dataset(tmp_path_factory.mktemp("crops") / "data", {"a": 12, "b": 12})
    for name in ("a", "b"):
        for number in range(12):
            if number % 3 == 0:
                Image.new("RGB", (56, 56), (255, 255, 255 - number)).save(root / name / f"white{number}.png")
    return root


def check_said(said: str, *words: str) -> None:
    """One sentence with the image, the weights and the precision."""
    error = said[said.index("error:") :]
    assert error.count("\n") == 1 and "Traceback" not in said and "unreadable" not in said
    assert "cannot be read" not in said and "white" in error
    assert all(word in error for word in ("overflowing", "random, seed 42", "float32", "not finite", *words)), error


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e38], ids=str)
@pytest.mark.parametrize("place", ["baseline", "views", "val"])
def test_training_ends_with_exit_code_3_where_features_are_made(
    factor: float, place: str, crops: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    after, flags = {"baseline": (0, ""), "views": (9, "--cache_views 2"), "val": (8, "--no-freeze_backbone")}[place]
    OVERFLOW.update(factor=factor, after=after)
    places = ("--data_root", crops, "--out_dir", tmp_path / "run", "--epochs", 1, "--near_dup_bits", 0)
    assert call_main(*places, *FLAGS.split(), *flags.split()) == 3
    said = capsys.readouterr()
    check_said(said.out + said.err, *(["lower --lr"] if place == "val" else []))
    assert OVERFLOW["after"] < 0
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert events[-1]["status"] == "diverged"
    assert ("baseline_end" in {event["event"] for event in events}) == (place == "val")


@pytest.fixture(scope="module")
def run_of_them(crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import run_main

    OVERFLOW.clear()
    out_dir = tmp_path_factory.mktemp("finite") / "run"
    places = ("--data_root", crops, "--out_dir", out_dir, "--epochs", 1, "--near_dup_bits", 0)
    assert run_main(*places, *FLAGS.split()) == 0
    return out_dir


@pytest.mark.parametrize("command", ["evaluate", "prototypes", "prototypes --add", "prelabel"])
def test_every_command_that_embeds_names_the_image(
    command: str, run_of_them: Path, crops: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    OVERFLOW.update(factor=float("nan"), after=0)
    others = shutil.copytree(crops, tmp_path / "others")  # crops that the gallery has are not added again
    words = [*command.split(), *([others] if "--add" in command else [])]
    if command == "prelabel":
        words += ["--images", crops / "a", "--out", tmp_path / "labels"]
    if command == "evaluate":
        words += ["--data_root", crops]
    assert call_main(*words, "--run", run_of_them, *"--gpus 0 --workers 0 --precision fp32".split()) == 3
    said = capsys.readouterr()
    check_said(said.out + said.err)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_are_refused_by_the_name_of_the_tensor(
    value: float, suffix: str, tmp_path: Path
) -> None:
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    weights = model.state_dict()
    weights["layer2.0.conv1.weight"][1, 2] = value
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    config = lct.Config(model_id="test_resnet", img_size=32, backbone_weights=path)
    with pytest.raises(lct.UserError, match=r"not finite, in layer2\.0\.conv1\.weight") as caught:
        lct.build_backbone(config, print)
    assert f"--backbone_weights {path}" in str(caught.value)


def test_weights_that_overflow_are_found_at_the_features(
    crops: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    import timm

    weights = timm.create_model("test_resnet", pretrained=False, num_classes=0).state_dict()
    weights["layer1.0.conv1.weight"].fill_(1e38)
    torch.save(weights, tmp_path / "large.pth")
    places = ("--data_root", crops, "--out_dir", tmp_path / "run", "--backbone_weights", tmp_path / "large.pth")
    flags = FLAGS.replace("overflowing --no-pretrained", "test_resnet").split()
    assert call_main(*places, *flags) == 3
    error = capsys.readouterr().err
    assert "large.pth" in error and "float32" in error and ".png" in error and "Traceback" not in error


def test_a_start_whose_head_is_not_finite_is_refused(run_of_them: Path, tmp_path: Path) -> None:
    payload = torch.load(run_of_them / "checkpoint_best.pth", weights_only=True)
    payload["model"]["head.norm.weight"][3] = float("inf")
    torch.save(payload, tmp_path / "start.pth")
    with pytest.raises(lct.UserError, match=r"not finite, in head\.norm\.weight"):
        lct.read_start(lct.Config(load_from=tmp_path / "start.pth"))


@pytest.mark.parametrize(
    ("content", "words"), [(None, "there is no checkpoint yet"), (b"PK", "checkpoint_last.pth cannot be read;")]
)
def test_a_weight_that_is_not_finite_is_named_as_one_and_not_saved(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    config = lct.Config(emb_dim=4)
    backbone = lct.Backbone(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), (0.5,) * 3, (0.5,) * 3)
    info = lct.BackboneInfo("m", "random", "0", 6, 2, "avg", (0.5,) * 3, (0.5,) * 3, "area")
    model = lct.build_recognizer(config, 3, backbone, info)
    model.head.norm.weight.data[1] = float("nan")
    state = lct.start_state(model, config, lct.training_runtime(config))
    path = tmp_path / "checkpoint_last.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(lct.Diverged, match=f"^a weight is not finite at step 0 .*{words}"):
        lct.save_checkpoint(path, state, {})
    assert content is None or path.read_bytes() == content


# --- fp16


@pytest.mark.parametrize(
    ("model_id", "dtype"),
    [
        ("vit_large_patch16_dinov3.lvd1689m", torch.float32),
        ("hf-hub:timm/vit_small_patch16_dinov3.lvd1689m", torch.float32),
        ("eva02_tiny_patch14_224", torch.float32),
        ("resnet50", torch.float16),
        ("vit_small_patch14_dinov2", torch.float16),
        ("levit_128", torch.float16),
    ],
)
def test_fp16_is_not_chosen_for_models_that_overflow_in_it(
    model_id: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU without bf16; whoever asks for fp16 gets it, and is told at the features."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    config = lct.Config(model_id=model_id)
    assert lct.training_runtime(config).dtype == dtype
    assert lct.training_runtime(lct.Config(model_id=model_id, precision="fp16")).dtype == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert lct.training_runtime(config).dtype == torch.bfloat16


def test_a_finished_run_answers_in_fp32_unless_another_type_is_asked_for(run_of_them: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        runtime = lct.Runtime(torch.device("cpu"), 0, torch.float16, dtype)
        assert lct.load_run(run_of_them, runtime).model.backbone.dtype == dtype
