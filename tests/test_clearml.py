"""Section 03: the real ClearML package, offline, and with servers that are dead in two ways."""

import json
import os
import socket
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import end_cli, make_dataset, run_cli

import lct_dino3 as lct

FLAGS = (
    "--model_id test_resnet --no-pretrained --img_size 32 --batch 8 --workers 0 --gpus 0 --emb_dim 16 --epochs 2"
    " --use_clearml"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("clearml") / "data", {"nut": 12, "bolt": 12})


@pytest.fixture
def no_server(tmp_path: Path) -> dict[str, str]:
    """An environment in which ClearML finds no configuration of the user's."""
    cleared = {name: "" for name in os.environ if name.startswith(("CLEARML_", "TRAINS_"))}
    return {**cleared, "HOME": str(tmp_path / "home"), "CLEARML_CONFIG_FILE": str(tmp_path / "no.conf")}


def read_session(out_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the task and the reported metrics of the one offline session."""
    (session,) = (out_dir / "clearml").rglob("*.zip")
    with zipfile.ZipFile(session) as archive:
        task = json.loads(archive.read("task.json"))
        lines = [
            line
            for name in archive.namelist()
            if name.endswith("metrics.jsonl")
            for line in archive.read(name).splitlines()
        ]
    return task, [event for line in lines for event in json.loads(line)]


def test_without_a_server_the_run_is_recorded_offline(data: Path, tmp_path: Path, no_server: dict[str, str]) -> None:
    out_dir = tmp_path / "run"
    done = run_cli("--data_root", data, "--out_dir", out_dir, *FLAGS, "--clearml_project", "Tools", env=no_server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ClearML:") == 1 and "recording offline" in done.stdout
    task, events = read_session(out_dir)
    assert task["name"] == "run" and task["project_name"] == "Tools"
    assert task["hyperparams"]["options"]["model_id"]["value"] == "test_resnet"
    scalars = {
        (e["metric"], e["variant"], e["iter"]): e["value"] for e in events if e["type"] == "training_stats_scalar"
    }
    for record in lct.read_events(out_dir):
        if record["event"] == "epoch_end":
            assert scalars["acc", "val", record["epoch"]] == pytest.approx(record["val"]["acc"])
            f1 = record["val_per_class"]["bolt"]["f1"]
            assert scalars["val f1 by class", "bolt", record["epoch"]] == pytest.approx(f1)
    assert any(event["metric"] == "test" and event["variant"] == "confusion" for event in events)
    assert {"prototypes", "report"} <= {item["key"] for item in task["execution"]["artifacts"]}


@pytest.mark.parametrize("kind", ["refuses", "accepts and never answers"])
def test_a_dead_server_neither_stops_nor_stalls_the_run(
    data: Path, tmp_path: Path, no_server: dict[str, str], kind: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connections: list[socket.socket] = []
        if kind == "refuses":
            server.close()
        else:
            threading.Thread(target=lambda: connections.append(server.accept()[0]), daemon=True).start()
        server_env = {
            "CLEARML_API_HOST": f"http://127.0.0.1:{port}",
            "CLEARML_API_ACCESS_KEY": "k",
            "CLEARML_API_SECRET_KEY": "s",
        }
        done = run_cli(
            "--data_root", data, "--out_dir", tmp_path / "run", *FLAGS, env={**no_server, **server_env}, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ClearML:") == 1 and f"127.0.0.1:{port}" in done.stdout
    assert read_session(tmp_path / "run")[1]


def test_an_interrupted_run_closes_its_session(data: Path, tmp_path: Path, no_server: dict[str, str]) -> None:
    flags = ("--data_root", data, *FLAGS, "--epochs", 5000)
    code, error, _ = end_cli(*flags, out_dir=tmp_path / "run", env=no_server)
    assert code == 143, error
    assert read_session(tmp_path / "run")[1]
