"""Coming from lct-dino-3.py: what it left is named, its backbone is taken, and the programs that read its runs can read ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import REPO, draw_image, interrupt_writing, make_dataset, run_main
from torch import nn

import lct_dino3 as lct

CLASSES = ("hammer", "pliers", "wrench")
SETTINGS = (
    "--model_id test_vit --no-pretrained --img_size 32 --emb_dim 32 --heads 1 --epochs 1 --gpus 0 --workers 0".split()
)
SETTINGS += ["--precision", "fp32"]


class EmbedNet(nn.Module):
    """The network whose weights its checkpoints hold."""

    def __init__(self, model_name: str, img_size: int, emb_dim: int) -> None:
        super().__init__()
        self.backbone = timm.create_model(model_name, num_classes=0, global_pool="token", img_size=img_size)
        width = self.backbone.num_features
        self.head = nn.Sequential(nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, emb_dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.head(self.backbone(images)), dim=1)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as lct-dino-3.py leaves it."""
    folder = tmp_path_factory.mktemp("old") / "out" / "run_001"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = EmbedNet("test_vit", 32, 32)
    number = {name: label for label, name in enumerate(CLASSES)}
    optimizer = torch.optim.AdamW(model.head.parameters()).state_dict()
    payload = {
        "model": model.state_dict(), "arc": {"W": torch.randn(3, 32)}, "opt": optimizer, "epoch": 5, "best_acc": 0.9,
        "cls2id": number, "model_name": "test_vit", "emb_dim": 32, "freeze_backbone": True, "img_size": 32,
        "data_cfg": timm.data.resolve_model_data_config(model.backbone), "data_parallel": False,
    }  # fmt: skip
    for name in ("last", "best", "ep005"):
        torch.save(payload, folder / f"checkpoint_{name}.pth")
    vectors = dict(zip(CLASSES, np.eye(3, 32, dtype=np.float32), strict=True))
    stacks = {name: vector[None] for name, vector in vectors.items()}
    id2cls = dict(enumerate(CLASSES))
    np.savez_compressed(folder / "prototypes.npz", centroids=vectors, stacks=stacks, cls2id=number, id2cls=id2cls)
    flags = {"data_root": "/home/u/data", "model_id": "test_vit", "emb_dim": 32, "epochs": 15, "resume": ""}
    made = {"optimizer": {"name": "AdamW"}, "loss": {"arcface_s": 30.0}, "data_parallel": False, "num_devices": 1}
    (folder / "config.json").write_text(json.dumps(flags | made))
    (folder / "splits.json").write_text(json.dumps({"train": [{"path": "/home/u/data/a.jpg", "class": "hammer"}]}))
    (folder / "metrics.jsonl").write_text('{"event": "run_start", "timestamp": 1.0, "run_number": 1, "args": {}}\n')
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours with one head on a ViT."""
    folder = tmp_path_factory.mktemp("ours")
    make_dataset(folder / "data", dict.fromkeys(CLASSES, 12))
    assert run_main("--data_root", folder / "data", "--out_dir", folder / "run", *SETTINGS) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "words",
    [
        "--data_root DATA --out_dir OLD",
        "--data_root DATA --out_dir PARENT",
        "--data_root OLD --out_dir NEW",
        "--data_root DATA --out_dir NEW --resume OLD/checkpoint_last.pth",
        "--config OLD --out_dir NEW",
        "evaluate --run OLD",
        "evaluate --run OLD/checkpoint_best.pth",
        "prototypes --run OLD --list",
        "prelabel --run PARENT --images DATA --out NEW",
        "export --run OLD",
        "report OLD",
        "track OLD --tensorboard",
    ],
)
def test_what_it_left_is_named_wherever_it_is_given(
    old_run: Path, small_data: Path, tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"OLD": old_run, "PARENT": old_run.parent, "DATA": small_data, "NEW": tmp_path / "new"}
    words = re.sub("[A-Z]{3,}", lambda name: str(places[name[0]]), words)
    if words.startswith(("report", "track")):  # programs that know nothing of ours
        tool, *others = words.split()
        done = subprocess.run([sys.executable, str(REPO / f"tools/{tool}.py"), *others], capture_output=True, text=True)
        code, said = done.returncode, done.stderr
    else:
        code = run_main(*words.split())
        said = capsys.readouterr().err
    assert code == 2 and "is of lct-dino-3.py" in said
    assert not (tmp_path / "new").exists()
    if "run " in words:
        assert f"--load_from {old_run}, which takes its backbone" in said


def test_a_new_folder_beside_its_runs_is_free(old_run: Path) -> None:
    lct.check_predecessor(lct.Config(out_dir=old_run.parent / "new", data_root=old_run.parent))
    with pytest.raises(lct.UserError, match="is of lct-dino"):
        lct.check_predecessor(lct.Config(out_dir=old_run.parent / "new", data_root=old_run))


def test_load_from_takes_its_backbone(old_run: Path, small_data: Path, tmp_path: Path) -> None:
    assert run_main("--data_root", small_data, "--out_dir", tmp_path / "run", "--load_from", old_run, *SETTINGS) == 0
    own = lct.load_run(tmp_path / "run", lct.make_runtime(0, "fp32")).model.backbone.model.state_dict()
    old = torch.load(old_run / "checkpoint_best.pth", weights_only=True)["model"]
    assert len(own) > 10 and all(torch.equal(value, old[f"backbone.{key}"]) for key, value in own.items())


def test_a_file_alone_is_named_too(old_run: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name in ("checkpoint_best.pth", "prototypes.npz"):
        shutil.copyfile(old_run / name, tmp_path / "run" / name)
    with pytest.raises(lct.UserError, match=r"is a checkpoint of lct-dino-3\.py.*\n.*--load_from"):
        lct.load_checkpoint(tmp_path / "run" / "checkpoint_best.pth")
    with pytest.raises(lct.UserError, match=r"they are of lct-dino-3\.py"):
        lct.load_gallery(tmp_path / "run" / "prototypes.npz")
    with pytest.raises(lct.UserError, match=f"give the folder of its run, {old_run}"):
        lct.read_start(lct.Config(load_from=old_run / "prototypes.npz"))


@pytest.mark.parametrize("name", ["checkpoint_best.pth", "checkpoint_last.pth"])
def test_its_programs_do_not_go_on_with_our_checkpoint(run: Path, name: str) -> None:
    payload = torch.load(run / name, weights_only=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.3\.weight"):
        EmbedNet("test_vit", 32, 32).load_state_dict(payload.get("model") or payload, strict=False)


def test_its_network_gives_our_embeddings_and_matches_them(run: Path) -> None:
    assert run_main("export", "--run", run, "--format", "predecessor") == 0
    payload = torch.load(run / "predecessor" / "checkpoint_best.pth", weights_only=True)
    network = EmbedNet(payload["model_name"], payload["img_size"], payload["emb_dim"]).eval()
    network.load_state_dict(payload["model"], strict=True)
    tables = np.load(run / "predecessor" / "prototypes.npz", allow_pickle=True)
    centroids, stacks, cls2id, id2cls = (tables[name].item() for name in ("centroids", "stacks", "cls2id", "id2cls"))
    assert cls2id == payload["cls2id"] == {name: label for label, name in id2cls.items()}
    assert list(centroids) == list(stacks) == list(CLASSES)

    ours = lct.load_run(run, lct.make_runtime(0, "fp32"))
    assert ours.gallery.fusion.weight > 0, "else nothing is to be left out"
    transform, root = ours.transform(), ours.config.data_root
    mean, std = (torch.tensor(payload["data_cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for label, name in id2cls.items():
        paths = [ours.gallery.stack_paths[row] for row in np.flatnonzero(ours.gallery.stack_labels == label)]
        squares = np.stack([transform(lct.load_image(root / path), None, 0) for path in paths])
        images = torch.from_numpy(squares).permute(0, 3, 1, 2)
        with torch.inference_mode():
            embeddings = network((images / 255 - mean) / std)
            own = ours.model.embed(ours.model.backbone(images))
        np.testing.assert_allclose(embeddings, own, atol=1e-5)
        np.testing.assert_allclose(stacks[name], embeddings, atol=1e-5)
        np.testing.assert_allclose(centroids[name], F.normalize(embeddings.mean(0), dim=0), atol=1e-5)
    assert all(array.dtype == np.float32 for array in (*centroids.values(), *stacks.values()))


def test_interrupted_while_it_is_written_it_is_written_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".checkpoint_best.pth.1.tmp").touch()  # of an earlier start that was killed
    interrupt_writing(monkeypatch, "checkpoint_best")
    assert run_main("export", "--run", run, "--format", "predecessor", "--out", tmp_path / "new") == 143
    assert "interrupted (SIGTERM)" in capsys.readouterr().err
    assert sorted(path.name for path in lct.visible_entries(tmp_path / "new")) == [
        "checkpoint_best.pth",
        "prototypes.npz",
    ]


def test_what_its_network_cannot_be_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import export

    ours = lct.load_run(run, lct.make_runtime(0, "fp32"))
    replace = lct.dataclasses.replace
    for changed, remedy in (
        (replace(ours, config=replace(ours.config, emb_dim=64, heads=4)), "train with --heads 1"),
        (replace(ours, info=replace(ours.info, pool="avg")), "train with --pool token"),
        (replace(ours, info=replace(ours.info, mean=(0.1, 0.2, 0.3))), "train with neither --mean nor --std"),
    ):
        with pytest.raises(lct.UserError, match=remedy):
            export.export_predecessor(changed, tmp_path / "new")
    assert run_main("export", "--run", run, "--format", "predecessor", "--out", run) == 2
    assert "is no empty folder" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_ready_file_leaves_out_and_merges_what_its_code_did(tmp_path: Path) -> None:
    screwdrivers = ("1 Отвертка «-»", "2 Отвертка «+»", "3 Отвертка на смещенный крест")
    make_dataset(tmp_path / "data", dict.fromkeys(screwdrivers, 2) | {"Бокорезы": 3, "Линейка 30 см": 2})
    draw_image(0).save(tmp_path / "data" / "Бокорезы" / "a_линейка.png")
    (tmp_path / "data" / "Групповые для тренировки").mkdir()
    numbers = (4679, 4680, 4699, 4700, 4719, 4720, 4721, 4857, 4858, 4859, 4860, 4879, 4884, 4885, 46800)
    for number in numbers:
        draw_image(1, number).save(tmp_path / "data" / "Бокорезы" / f"{'dscn' if number % 2 else 'DSCN'}{number}_1.png")
        draw_image(2, number).save(tmp_path / "data" / "Групповые для тренировки" / f"{number}.png")
    words = ["--config", str(REPO / "configs" / "lct-dino-3.yaml"), "--data_root", str(tmp_path / "data")]
    scan = lct.scan_dataset(lct.parse_command_line([*words, "--out_dir", str(tmp_path / "run")]))
    assert scan.records.class_names == ("Бокорезы", "Отвертка")
    names = [Path(path).stem for path in scan.records.paths if path.startswith("Бокорезы")]
    kept = [number for number in numbers if not (4680 <= number <= 4720 or 4858 <= number <= 4884)]
    assert sorted(int(name[4:].partition("_")[0]) for name in names if name.lower().startswith("dscn")) == sorted(kept)
    assert len(scan.records.paths) == 6 + 3 + 1 + len(kept)
