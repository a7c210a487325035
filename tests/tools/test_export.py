"""tools/export.py: what other programs get answers as PyTorch does."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import export
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import REPO, TINY_RUN, draw_image, make_dataset, run_main
from PIL import Image

import lct_dino3 as lct

Main = Callable[..., int]
NAMES = ["embeddings", "scores", "probability", "labels"]
SMALL_VIT = "test_vit:depth=2"  # torch's exporter takes seconds for each block


@pytest.fixture(scope="session")
def run_dir(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run, to export into."""
    return shutil.copytree(tiny_run / "run", tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def onnx_file(run_dir: Path) -> Path:
    pytest.importorskip("onnxruntime")
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert run_main("export", "--run", run_dir) == 0
    assert "mean cosine 1.0000, least 1.0000, 0 of their answers change\nread by onnxruntime 1.14" in told.getvalue()
    return run_dir / "model.onnx"


# The last of three classes, as if it had been enrolled.
ENROLLED = {
    "is_enrolled": np.array([False, False, True]),
    "offsets": np.float32([0, 0, 0.1]),
    "log_odds": np.array([(9.0, -5.0), (9.0, -5.0), (4.0, -3.0)]),
}


@pytest.fixture(scope="module")
def trained(run_dir: Path) -> lct.TrainedRun:
    return lct.load_run(run_dir, lct.Runtime(torch.device("cpu"), 0, torch.float32))


def read_checks(path: Path) -> dict[str, float]:
    """Return what an ONNX file says of its comparison with PyTorch and the gallery."""
    import onnxruntime

    return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["lct_dino3"])["checks"]


@pytest.mark.parametrize(("matcher", "k"), [("centroid", 1), ("prototypes", 1), ("knn", 1), ("knn", 10)])
def test_exported_scores_are_those_of_the_gallery(trained: lct.TrainedRun, matcher: str, k: int) -> None:
    gallery = lct.dataclasses.replace(trained.gallery, matcher=matcher, knn_counts=np.array([k, 1, k]), **ENROLLED)
    if matcher == "prototypes":
        stacks = [gallery.stacks[gallery.stack_labels == label] for label in range(3)]
        gallery = lct.take_prototypes(gallery, [stacks[0][:3], stacks[1][:1], stacks[2][:2]])
    model = export.ExportedModel(lct.dataclasses.replace(trained, gallery=gallery)).eval()
    images = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeddings, scores, probability, labels = (output.numpy() for output in model(images))
    np.testing.assert_allclose(embeddings, trained.embed(images.permute(0, 3, 1, 2), 4), atol=1e-5)
    expected = gallery.scores(embeddings)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(
        probability, gallery.probability(expected.argmax(axis=1), expected.max(axis=1)), atol=1e-4
    )
    answers = expected.argmax(axis=1)
    passed = expected.max(axis=1) >= gallery.thresholds[answers]
    assert labels.tolist() == np.where(passed, answers, -1).tolist()


def test_onnx_runs_on_onnxruntime_alone_with_any_batch(onnx_file: Path, trained: lct.TrainedRun) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    meta = json.loads(session.get_modelmeta().custom_metadata_map["lct_dino3"])
    assert meta["classes"] == ["axe", "bit", "клещи"] and meta["img_size"] == 32
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    for batch in (1, 5):
        embeddings, scores, _, labels = session.run(None, {"images": images[:batch]})
        expected = trained.embed(torch.from_numpy(images[:batch]).permute(0, 3, 1, 2), 8)
        np.testing.assert_allclose(embeddings, expected, atol=1e-4)
        np.testing.assert_allclose(scores, trained.gallery.scores(expected), atol=1e-4)
        assert labels.shape == (batch,) and set(labels.tolist()) <= {-1, 0, 1, 2}


def test_a_gray_model_with_lora_is_exported_whole(tiny_run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    flags = (*TINY_RUN, "--model_id", SMALL_VIT, "--lora_rank", 2, "--backbone_lr", 0.01, "--in_channels", 1)
    assert run_main("--data_root", tiny_run / "data", "--out_dir", tmp_path / "run", *flags) == 0
    run = lct.load_run(tmp_path / "run", lct.Runtime(torch.device("cpu"), 0, torch.float32))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = run.embed(torch.from_numpy(images).permute(0, 3, 1, 2), 8)
    for name in ("onnx", "safetensors"):
        assert run_main("export", "--run", tmp_path / "run", "--format", name) == 0
    found = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx").run(["embeddings"], {"images": images})
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    assert not any("lora" in key for key in safetensors.torch.load_file(tmp_path / "run" / "model.safetensors"))


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three classes whose model sees the mask as a channel, of crops without and with their mask."""
    folder = tmp_path_factory.mktemp("masked")
    data = make_dataset(folder / "data", {"axe": 8, "bit": 8, "cap": 8})
    for path in sorted(data.glob("*/*.png")):
        mask = np.zeros((56, 56), np.uint8)
        mask[10:44, 12 : 36 + int(path.stem)] = 255
        (path.parent / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(path.parent / "masks" / path.name)
    flags = (*TINY_RUN, *f"--model_id {SMALL_VIT} --crop_mode mix --in_channels 4 --mask_fill keep --preview".split())
    assert run_main("--data_root", data, "--out_dir", folder / "run", *flags) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def knn_file(masked_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[lct.TrainedRun, Path]:
    """`masked_run` with classes, one enrolled, that are matched by 3, 1 and 2 of their nearest references, and its ONNX file."""
    pytest.importorskip("onnxruntime")
    run = lct.load_run(masked_run, lct.Runtime(torch.device("cpu"), 0, torch.float32))
    gallery = lct.dataclasses.replace(run.gallery, matcher="knn", knn_counts=np.array([3, 1, 2]), **ENROLLED)
    run, path = lct.dataclasses.replace(run, gallery=gallery), tmp_path_factory.mktemp("knn") / "model.onnx"
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        checks = export.export_onnx(run, path, export.load_references(run, run.config.data_root))
    assert checks["difference"] < export.TOLERANCE
    assert told.getvalue() == "", "the exporter shows its graph when a size depends on the data"
    return run, path


def test_a_model_that_sees_the_mask_as_a_channel_goes_all_the_way(
    masked_run: Path, knn_file: tuple[lct.TrainedRun, Path], tmp_path: Path, call_main: Main
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run, path = knn_file
    data = run.config.data_root
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 4), dtype=np.uint8)
    expected = run.embed(torch.from_numpy(images).permute(0, 3, 1, 2), 8)
    blind = run.embed(torch.from_numpy(images | np.uint8([0, 0, 0, 255])).permute(0, 3, 1, 2), 8)
    assert not np.allclose(expected, blind, atol=1e-3), "the mask counts"
    two_views = run.gallery.stacks[np.argsort(run.gallery.stack_paths)].reshape(-1, 2, run.gallery.stacks.shape[1])
    assert not np.allclose(two_views[:, 0], two_views[:, 1], atol=1e-3), "mix shows a crop without and with its mask"
    session = onnxruntime.InferenceSession(path)
    np.testing.assert_allclose(session.run(["embeddings"], {"images": images})[0], expected, atol=1e-4)
    assert read_checks(path)["least_cosine"] > 1 - export.TOLERANCE, "references of both views"
    assert set(run.gallery.stack_views[export.load_references(run, data).positions].tolist()) == {0, 1}
    assert call_main("prelabel", "--run", masked_run, "--images", data / "axe", "--out", tmp_path / "out") == 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_gallery_matched_by_nearest_references_answers_alike_everywhere(
    knn_file: tuple[lct.TrainedRun, Path], runtime: str
) -> None:
    package = pytest.importorskip(runtime)
    run, path = knn_file
    if runtime == "openvino":  # it gets sums over a mask wrong, and forgets to turn the scores of a class that is alone
        compiled = package.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answer = compiled.infer_new_request
    else:
        answer = functools.partial(package.InferenceSession(path).run, NAMES)
    images = np.random.default_rng(1).integers(0, 256, (64, 32, 32, 4), dtype=np.uint8)
    with torch.inference_mode():
        outputs = export.ExportedModel(run).eval()(torch.from_numpy(images))
    for batch in (1, 7, 64):
        answers = answer({"images": images[:batch]})
        for name, found, expected in zip(
            NAMES, answers if runtime == "onnxruntime" else answers.to_tuple(), outputs, strict=True
        ):
            np.testing.assert_allclose(found, expected[:batch], atol=1e-4, err_msg=f"{name} of {batch}")


def test_the_file_tells_nothing_of_the_machine_and_is_read_by_old_runtimes(
    knn_file: tuple[lct.TrainedRun, Path],
) -> None:
    onnx = pytest.importorskip("onnx")
    data = knn_file[1].read_bytes()
    assert not any(
        word in data
        for word in (b"stack_trace", b".py", b"site-packages", os.fsencode(REPO), os.fsencode(knn_file[0].path.parent))
    )
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (8, 18)
    newest = max(onnx.defs.get_schema(node.op_type, 18).since_version for node in model.graph.node)
    assert newest == 18, "the graph would allow an older opset"
    assert json.loads(model.metadata_props[0].value)["min_onnxruntime"] == "1.14"  # the first that knows opset 18


@pytest.mark.parametrize("side", [20, 90])
def test_the_snippets_of_the_readme_give_our_answers(
    onnx_file: Path, trained: lct.TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    """By onnxruntime, and by timm from the file of weights."""
    export.export_safetensors(trained, onnx_file.with_suffix(".safetensors"))
    (tmp_path / "RUN").symlink_to(onnx_file.parent)
    draw_image(0, 9, side=side).resize((side, side * 2 // 3)).save(tmp_path / "crop.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    chapter = (
        (REPO / "tools" / "README.md").read_text(encoding="utf-8").partition("\n## export")[2].partition("\n## ")[0]
    )
    scope: dict = {}
    for code in re.findall(r"```python\n(.*?)```", chapter, re.DOTALL):
        exec(code, scope)
    image = trained.transform()(lct.load_image(tmp_path / "crop.jpg"), None, 0)
    scores = trained.gallery.scores(trained.embed(torch.from_numpy(image[None]).permute(0, 3, 1, 2), 1))
    np.testing.assert_allclose(scope["scores"], scores, atol=0.03)  # Pillow and OpenCV resample alike, not the same
    assert scope["scores"].argmax() == scores.argmax()
    square = torch.from_numpy(np.array(scope["square"])[None]).permute(0, 3, 1, 2)
    assert trained.gallery.fusion.weight > 0 and trained.model.criterion.num_heads > 1, "the snippet has both"
    np.testing.assert_allclose(scope["embedding"], trained.embed(square, 1), atol=1e-5)


def test_the_file_is_compared_with_what_the_gallery_has_stored_and_the_remedy_makes_them_one(
    onnx_file: Path, tmp_path: Path, call_main: Main
) -> None:
    checks = read_checks(onnx_file)
    assert checks["references"] == 15 and checks["changed_answers"] == 0  # half of 29 training images, rounded up
    assert checks["least_cosine"] == pytest.approx(1, abs=1e-5), "embedded in float32 wherever the run was made"
    run_dir = tmp_path / "run"
    shutil.copytree(onnx_file.parent, run_dir)
    assert call_main("prototypes", "--run", run_dir, *"--precision bf16 --gpus 0 --workers 0".split()) == 0

    def compare() -> tuple[float, str]:
        """Return the least cosine, and what is said of it."""
        run = lct.load_run(run_dir, lct.make_runtime(0, "fp32"))
        references = export.load_references(run, run.config.data_root)
        exact = run.embed(torch.from_numpy(references.crops).permute(0, 3, 1, 2), 8)  # as an exported file does it
        checks = {"difference": 0.0, **export.compare_stored(run.gallery, references.positions, exact)}
        return checks["least_cosine"], export.format_checks(checks, run, export.ExportOptions(run=run_dir))

    least, told = compare()
    assert 0.9 < least < 1 - 1e-5 and "embedded in bfloat16" in told
    (remedy,) = re.findall(r"python lct_dino3.py (prototypes .*) makes it anew", told)
    assert call_main(*shlex.split(remedy), "--gpus", 0, "--workers", 0) == 0
    least, told = compare()
    assert least > 1 - 1e-5 and "warning" not in told


def test_references_that_are_compared_do_not_match_themselves(trained: lct.TrainedRun) -> None:
    vectors = np.float32([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]])
    gallery = lct.dataclasses.replace(
        trained.gallery, class_names=("a", "b"), stacks=vectors, stack_labels=np.array([0, 0, 1, 1]), matcher="knn",
        knn_counts=np.ones(2, np.int64), thresholds=np.float32([0.5, 0.5]),
    )  # fmt: skip
    turned = np.float32([[1, 0], [-1, 0]])  # number 2 is taken for unknown, and would be for itself if it were there
    figures = export.compare_stored(gallery, np.array([0, 2]), turned)
    assert figures == {"references": 2, "mean_cosine": 0.5, "least_cosine": 0.0, "changed_answers": 1}


@pytest.mark.parametrize("error", [0.001, float("nan")])
def test_an_onnx_file_that_answers_otherwise_is_not_written(
    onnx_file: Path, trained: lct.TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    """The graph is one that was exported before; PyTorch answers as it does, and then otherwise."""
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=onnx.load(onnx_file)))
    references = export.load_references(trained, trained.config.data_root)
    export.export_onnx(trained, tmp_path / "alike.onnx", references)
    assert (tmp_path / "alike.onnx").exists()
    real = export.ExportedModel.forward

    def drift(self: export.ExportedModel, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embeddings, scores, probability, labels = real(self, images)
        return embeddings, scores + error, probability, labels

    monkeypatch.setattr(export.ExportedModel, "forward", drift)
    with pytest.raises(lct.UserError, match="answers otherwise"):
        export.export_onnx(trained, tmp_path / "model.onnx", references)
    assert not (tmp_path / "model.onnx").exists()


def test_safetensors_holds_every_weight_and_what_rebuilds_the_model(
    run_dir: Path, trained: lct.TrainedRun, tmp_path: Path, call_main: Main
) -> None:
    from safetensors import safe_open

    path = tmp_path / "new" / "model.safetensors"
    assert call_main("export", "--run", run_dir, "--format", "safetensors", "--out", path) == 0
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["lct_dino3"])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
    own = trained.model.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[key], own[key]) for key in own)
    assert meta["options"]["model_id"] == "test_resnet" and meta["weights_hash"] == trained.meta["weights_hash"]
    assert str(run_dir.parent).encode() not in path.read_bytes(), "where the run lay is nobody's business"


def test_a_folder_for_a_file_crops_that_are_gone_and_a_model_too_large_cost_one_sentence(
    run_dir: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call_main("export", "--run", run_dir, "--out", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    place = ("--data_root", tmp_path / "empty", "--out", tmp_path / "m.onnx")
    assert call_main("export", "--run", run_dir, *place) == 2
    assert "--data_root" in capsys.readouterr().err
    assert call_main("export", "--run", run_dir, *place[:2], "--out", tmp_path / "empty" / "m.onnx") == 2
    assert "m.onnx: lies inside data_root" in capsys.readouterr().err
    monkeypatch.setattr(export, "MAX_ONNX_BYTES", 1000)  # a ViT-H+ has 3.4 GB
    assert call_main("export", "--run", run_dir, "--out", tmp_path / "m.onnx") == 2
    assert "give --format safetensors" in capsys.readouterr().err


def test_an_interrupted_export_starts_again() -> None:
    code, said = lct.explain_end(lct.Interrupted(signal.SIGTERM), export.ExportOptions(command="export"))
    assert code == 143 and said == "interrupted (SIGTERM); the same command starts again"
