"""What a GPU would be asked to do, seen without one: no step waits for it, nothing of a fixed size is made anew for each batch."""

from __future__ import annotations

import importlib.util
import operator
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import make_dataset, shrink_config
from killing import Nursery
from torch.utils._python_dispatch import TorchDispatchMode

import lct_dino3 as lct

CPU, META = torch.device("cpu"), torch.device("meta")
DINOV3 = "vit_tiny_patch16_dinov3_qkvb"  # the smallest that timm has
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}


class WaitFinder(TorchDispatchMode):
    """Notes what would have the CPU wait for a device, which the meta device stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note values that are read from the device, and copies that are not left to it."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        of_device = [value for value in torch.utils._pytree.tree_leaves(args) if getattr(value, "device", CPU) == META]
        if name in READS and of_device:
            self.waits.append(name)
        if name in ("_to_copy", "copy_"):
            goes_to = kwargs.get("device") or args[0].device if name == "_to_copy" else args[0].device
            comes_from = args[name == "copy_"].device
            is_left = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if goes_to != comes_from and not (is_left and goes_to == META):
                self.waits.append(f"{name} from {comes_from} to {goes_to}")
        return func(*args, **kwargs)


def make_batch(config: lct.Config, size: int) -> lct.Batch:
    images = torch.randint(0, 256, (size, 3, config.img_size, config.img_size), dtype=torch.uint8)
    labels = torch.arange(size) % 3
    return lct.Batch(images, labels, labels, labels.byte(), [])


@pytest.mark.parametrize(
    ("mixing", "options"),
    [
        ("none", {}),
        ("mixup", {}),
        ("cutmix", {"freeze_backbone": False, "drop_path": 0.1, "accumulate_grad_batches": 2}),
        ("none", {"lora_rank": 2, "criterion": "subcenter_arcface", "max_grad_norm": 1.0}),
        ("mixup", {"unfreeze_blocks": 1, "criterion": "focal", "ema_decay": 0.9}),
    ],
    ids=["frozen", "mixup", "fine-tuned", "lora", "last block"],
)
def test_no_step_waits_for_the_device(mixing: str, options: dict[str, Any]) -> None:
    config = lct.Config(
        model_id=f"{DINOV3}:depth=2", pretrained=False, img_size=32, emb_dim=16, mixing=mixing, mixing_p=1.0, **options
    )
    backbone, info = lct.build_backbone(config, print)
    model = lct.build_recognizer(config, 3, backbone, info).to(META)
    state = lct.start_state(model, config, lct.Runtime(CPU, 0, torch.float32))
    for group in state.optimizer.param_groups:
        group["fused"] = False  # torch's own way on a GPU, which the meta device has not
    model.train()
    batches = [make_batch(config, 4), make_batch(config, 3)]
    with WaitFinder() as finder:
        for step in range(2):
            loss, logits = lct.train_step(config, lct.Runtime(META, 0, torch.float32), backbone, state, batches)
            state.tally.add(loss, logits, torch.cat([batch.labels for batch in batches]))
            if state.average:
                state.average.update(step)
    assert loss.device == META and logits.shape == (7, 3)
    assert finder.waits == []


def test_what_waits_is_found() -> None:
    """Or the test above would find nothing where there is something."""
    values = torch.zeros(3, device=META)
    with WaitFinder() as finder:
        torch.zeros(3).to(META)
        torch.zeros(3).to(META, non_blocking=True)
        for read in (lambda: values.to(CPU, non_blocking=True), lambda: values.sum().item()):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read()
        values.copy_(torch.ones(3))
    assert finder.waits == [
        "_to_copy from cpu to meta",
        "_to_copy from meta to cpu",
        "_local_scalar_dense",
        "copy_ from cpu to meta",
    ]


def test_what_goes_to_a_gpu_goes_from_pinned_memory() -> None:
    """From other memory the driver may wait for the device, whatever it is asked."""

    class Values(list):
        def pin_memory(self) -> Values:
            return Values([*self, "pinned"])

        def to(self, device: torch.device, non_blocking: bool) -> Values:
            return Values([*self, device, non_blocking])

    gpu = torch.device("cuda", 1)
    assert lct.send(Values(), gpu) == ["pinned", gpu, True]
    assert lct.send(Values(), CPU) == [CPU, True]


@pytest.mark.parametrize("name", [DINOV3, "test_vit", "eva02_tiny_patch14_224"])
def test_positions_are_made_once_and_features_are_those_of_timm(name: str, tmp_path: Any) -> None:
    """Bit for bit, at a size that is not the model's own, with weights saved from the model as timm builds it."""
    size = 56 if "14" in name else 48
    made = {"img_size": size} if "14" in name else {"dynamic_img_size": True}
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False, num_classes=0, global_pool="token", **made).eval()
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if "gamma" in key:  # LayerScale starts at 1e-5, with which the blocks hardly show
                parameter.fill_(0.5)
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    config = lct.Config(
        model_id=name, img_size=size, backbone_weights=tmp_path / "weights.pth", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    if name == "test_vit":  # its position table is a weight, which timm resamples for another size
        config = lct.Config(**{**vars(config), "img_size": 160})
    backbone, _ = lct.build_backbone(config, print)
    images = make_batch(config, 2).images
    with torch.no_grad():
        features = backbone.eval()(images)
        expected = plain((images.float() - backbone.mean) / backbone.std)
    assert torch.equal(features, expected)
    backbone.to(META)
    with torch.no_grad(), WaitFinder() as finder:
        backbone(images.to(META, non_blocking=True))
    assert finder.waits == []


def test_float32_is_never_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does it in convolutions unless it is told not to, and in products of matrices if somebody asks for it."""
    for precision in ("auto", "fp32", "bf16"):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        lct.make_runtime(0, precision)
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert lct.Runtime(torch.device("cuda"), 1, torch.float32).describe() == "1 x NVIDIA H200, float32, no TF32"


class ConvolutionFinder(TorchDispatchMode):
    """Notes the types of what is convolved or multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note the operation."""
        result = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        if name in ("convolution", "conv2d", "mm", "bmm", "addmm", "baddbmm"):  # conv2d: without autograd
            self.calls.add((name, result.dtype))
        return result


@pytest.mark.parametrize(("emb_dim", "heads"), [(32, 1), (64, 4)])
def test_the_head_multiplies_float32_matrices_and_takes_the_weights_of_a_convolution(emb_dim: int, heads: int) -> None:
    config = lct.Config(model_id="test_vit", pretrained=False, img_size=160, emb_dim=emb_dim, heads=heads)
    backbone, info = lct.build_backbone(config, print)
    model = lct.build_recognizer(config, 3, backbone, info).eval()
    backbone.dtype = torch.bfloat16
    width = heads * lct.HEAD_WIDTHS[heads > 1]
    torch.manual_seed(3)
    output = torch.nn.Conv1d(width, emb_dim, kernel_size=1, groups=heads)
    model.head.output.load_state_dict(output.state_dict())
    images = make_batch(config, 5).images
    with torch.no_grad(), ConvolutionFinder() as finder:
        features = backbone(images)
    assert ("convolution", torch.bfloat16) in finder.calls and features.dtype == torch.float32
    with ConvolutionFinder() as finder:
        embeddings = model.embed(features)
        model.criterion(embeddings, torch.arange(5) % 3)[0].sum().backward()
    assert {dtype for _, dtype in finder.calls} == {torch.float32}
    assert "convolution" not in {name for name, _ in finder.calls}
    model.double()
    output.double()
    hidden = torch.relu(model.head.norm(model.head.hidden(features.double())))
    expected = lct.normalize_heads(output(hidden[:, :, None])[:, :, 0], heads)
    assert (embeddings - expected).abs().max() < 1e-6


@pytest.fixture
def rounding_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have frozen backbones compute on the CPU as they do on a GPU."""
    rule = property(lambda self: self.frozen and self.dtype == torch.bfloat16)
    monkeypatch.setattr(lct.Backbone, "rounds_weights", rule)


@pytest.mark.parametrize(
    "name", ["test_vit", DINOV3, "test_resnet", "test_efficientnet", "test_convnext", "mobilenetv2_035"]
)
def test_a_frozen_backbone_computes_with_weights_in_bf16(name: str, rounding_cpu: None) -> None:
    """As near to float32 as autocast is, whose rounding it does once; statistics of BatchNorm are not rounded."""
    config = lct.Config(model_id=name, pretrained=False, img_size=160)
    backbone, info = lct.build_backbone(config, print)
    model = lct.build_recognizer(config, 3, backbone, info).eval()
    identity = lct.describe_embedding(config, info, model)
    images = make_batch(config, 4).images
    features = {"float32": backbone(images)}
    statistics = {key: value.clone() for key, value in backbone.state_dict().items() if "running" in key}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lct.Backbone, "rounds_weights", False)
        features["autocast"] = backbone.with_dtype(torch.bfloat16)(images)
    rounded = backbone.with_dtype(torch.bfloat16)
    with ConvolutionFinder() as finder:
        features["weights"] = rounded(images)
    assert {dtype for _, dtype in finder.calls} == {torch.bfloat16}
    norms = tuple(f"{key}." for key, module in rounded.named_modules() if lct.is_batchnorm(module))
    for key, parameter in rounded.named_parameters():
        assert parameter.dtype == (torch.float32 if key.startswith(norms) else torch.bfloat16), key
    assert all(torch.equal(rounded.state_dict()[key], value) for key, value in statistics.items())
    assert torch.equal(backbone(images), features["float32"]), "what answers is as it was"
    apart = {
        key: 1 - torch.cosine_similarity(features[key], features["float32"]).min() for key in ("autocast", "weights")
    }
    assert 0 < apart["weights"] < max(4 * apart["autocast"], 1e-3), apart
    assert lct.describe_embedding(config, info, model) == identity
    assert not any(key.startswith("backbone.") for key in model.trained_state())


@pytest.mark.parametrize("options", [{"freeze_backbone": False}, {"lora_rank": 2}, {"unfreeze_blocks": 1}])
def test_what_is_trained_of_a_backbone_keeps_its_weights(options: dict[str, Any], rounding_cpu: None) -> None:
    config = lct.Config(model_id="test_vit", pretrained=False, img_size=160, **options)
    backbone, info = lct.build_backbone(config, print)
    lct.build_recognizer(config, 3, backbone, info)
    rounded = backbone.with_dtype(torch.bfloat16)
    rounded(make_batch(config, 2).images)
    assert rounded is not backbone and all(map(operator.is_, rounded.parameters(), backbone.parameters()))
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_the_rule_is_for_gpus_and_bf16() -> None:
    backbone, _ = lct.build_backbone(lct.Config(model_id="test_vit", pretrained=False, img_size=160), print)
    backbone.freeze()
    backbone.dtype = torch.bfloat16
    assert not backbone.rounds_weights
    del backbone.mean
    backbone.mean = types.SimpleNamespace(device=torch.device("cuda"))
    assert backbone.rounds_weights
    backbone.dtype = torch.float16
    assert not backbone.rounds_weights


def test_a_run_with_rounded_weights_answers_as_it_was_trained(
    small_data: Path, tmp_path: Path, rounding_cpu: None, call_main: Callable, patch_used: Callable
) -> None:
    """Its gallery belongs to the weights as the hub has them: the run is found whole, by a device that does not round too.

    Its thresholds, and those of what is built later, leave room for what rounding moves.
    """
    fitted = patch_used(lct, "fit_thresholds")
    flags = (
        "--model_id test_resnet --no-pretrained --img_size 32 --batch 8 --workers 0 --gpus 0 --emb_dim 16 --epochs 1"
    )
    places = ("--data_root", small_data, "--out_dir", tmp_path / "run")
    assert call_main(*places, *flags.split(), "--precision", "bf16") == 0
    again = ("prototypes", "--run", tmp_path / "run", "--gpus", 0, "--workers", 0, "--precision")
    new = make_dataset(tmp_path / "new", {"bolt": 3})
    for words in ([], ["--add", new]):
        assert call_main(*again, "bf16", *words) == 0
    assert [call[-1] for call in fitted.calls] == [torch.bfloat16] * 2
    for precision in ("bf16", "fp32"):
        run = lct.load_run(tmp_path / "run", lct.make_runtime(0, precision))
        embeddings = run.embed(make_batch(run.config, 3).images, 2)
        assert np.isfinite(embeddings).all() and run.model.backbone.is_rounded == (precision == "bf16")


@pytest.mark.parametrize("flags", ["", "--cache_views 1", "--no-freeze_backbone"])
def test_what_answers_is_embedded_in_float32_however_the_backbone_is_trained(
    small_data: Path,
    tmp_path: Path,
    rounding_cpu: None,
    call_main: Callable,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
) -> None:
    """With --precision auto: references, val and test are those of an exported file."""
    automatic = lct.Runtime(CPU, 0, torch.bfloat16)
    monkeypatch.setattr(lct, "training_runtime", lambda config: automatic)
    words = "--model_id test_resnet --no-pretrained --img_size 32 --emb_dim 16 --epochs 1 --workers 0 --gpus 0"
    with ConvolutionFinder() as finder:
        assert call_main(*f"{words} {flags}".split(), "--data_root", small_data, "--out_dir", tmp_path / "run") == 0
    assert {dtype for _, dtype in finder.calls} == {torch.float32, torch.bfloat16}
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert log.count("augmented views of") == ("cache_views" in flags), "the baseline and training share them"
    run = lct.load_run(tmp_path / "run", lct.make_runtime(0, "auto"))
    assert run.meta["precision"] == "float32"
    dtype = lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["backbone_dtype"]
    assert dtype == "bfloat16", "in which training goes on after an interruption"
    with np.load(tmp_path / "run" / "embeddings.npz", allow_pickle=False) as saved:
        paths, embeddings, splits = (saved[key] for key in ("paths", "embeddings", "splits"))
    assert set(splits.tolist()) == {"train", "val", "test"}
    images = np.stack([run.transform()(lct.load_image(small_data / path), None, 0) for path in paths.tolist()])
    exact = run.embed(torch.from_numpy(images).permute(0, 3, 1, 2), 8)
    np.testing.assert_allclose(embeddings, exact, atol=1e-5)
    rows = [paths.tolist().index(path) for path in run.gallery.stack_paths]
    np.testing.assert_allclose(run.gallery.stacks, exact[rows], atol=1e-5)
    if flags:  # one of them is enough
        return
    monkeypatch.setattr(lct, "training_runtime", lambda config: lct.Runtime(CPU, 0, torch.float32))  # another machine
    words = words.replace("--epochs 1", "--epochs 2")
    with ConvolutionFinder() as finder:
        assert call_main(*words.split(), "--data_root", small_data, "--out_dir", tmp_path / "run") == 0
    assert {dtype for _, dtype in finder.calls} == {torch.float32, torch.bfloat16}
    assert lct.load_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["backbone_dtype"] == "bfloat16"


def test_every_check_of_a_gpu_has_a_line_on_a_cpu_too_and_passes_for_nothing_there(
    gpu: types.ModuleType,
    nursery: Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu.Bench, "nursery", nursery)
    if importlib.util.find_spec("sam2"):
        monkeypatch.setattr(gpu, "SAM2_CFG", shrink_config(gpu.SAM2_CFG, tmp_path))
    code = gpu.main(["--dry"])
    said = capsys.readouterr()
    assert code == 0, said
    _, *lines, total = said.out.splitlines()
    verdicts = dict(reversed(line.split(":")[0].split()) for line in lines)
    assert len(lines) == len(verdicts) and verdicts.keys() == {check.__name__ for check in gpu.MEASURED + gpu.COMPARED}
    assert {name for name, verdict in verdicts.items() if verdict == "skip"} <= {
        *("waits_a_step", "out_of_memory", "compiled_run", "sam2_in_bf16")
    }
    assert set(verdicts.values()) == {"dry", "skip"} and " in " in total
