"""Section 03: the real ClearML package, offline, and with servers that are dead in two ways."""

import http.server
import json
import os
import signal
import socket
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import make_dataset
from killing import Nursery, kill

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
    deadline = time.monotonic() + 60  # a process of its own writes it, which a run waits for only so long
    while time.monotonic() < deadline:
        if any(zipfile.is_zipfile(path) for path in (out_dir / "clearml").rglob("*.zip")):
            break
        time.sleep(0.1)
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


def test_without_a_server_the_run_is_recorded_offline(
    nursery: Nursery, data: Path, tmp_path: Path, no_server: dict[str, str]
) -> None:
    out_dir = tmp_path / "run"
    flags = ("--data_root", data, "--out_dir", out_dir, *FLAGS, "--clearml_project", "Tools")
    code, text = nursery.run(*flags, env=no_server)
    assert code == 0, text
    assert text.count("ClearML:") == 1 and "recording offline" in text
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
    nursery: Nursery, data: Path, tmp_path: Path, no_server: dict[str, str], kind: str
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
        flags = ("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS)
        code, text = nursery.run(*flags, env={**no_server, **server_env})
    assert code == 0, text
    assert text.count("ClearML:") == 1 and f"127.0.0.1:{port}" in text
    assert read_session(tmp_path / "run")[1]


def test_an_interrupted_run_closes_its_session(
    nursery: Nursery, data: Path, tmp_path: Path, no_server: dict[str, str]
) -> None:
    flags = ("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS)
    code, text = nursery.run(*flags, env=no_server, plans=[kill("evaluate_val", 2, signal.SIGTERM)])
    assert code == 143, text
    assert read_session(tmp_path / "run")[1]


class Server(http.server.BaseHTTPRequestHandler):
    """A ClearML server that answers the first ping, and then fails in one of the ways that servers fail."""

    kind = ""

    def do_GET(self) -> None:
        if self.path != "/debug.ping":
            if self.kind == "falls silent":
                time.sleep(300)
            elif self.kind == "slow":
                time.sleep(3)
        self.send_response(200 if self.path == "/debug.ping" else 500)
        self.end_headers()
        self.wfile.write(b"{}" if self.kind != "talks nonsense" else b"\xff not JSON")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("kind", ["falls silent", "slow", "fails", "talks nonsense"])
def test_a_server_that_fails_later_is_replaced_by_an_offline_record(
    nursery: Nursery, data: Path, tmp_path: Path, no_server: dict[str, str], kind: str
) -> None:
    handler = type("Handler", (Server,), {"kind": kind})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        hosts = {f"CLEARML_{name}_HOST": address for name in ("API", "WEB", "FILES")}
        env = {**no_server, **hosts, "CLEARML_API_ACCESS_KEY": "k", "CLEARML_API_SECRET_KEY": "s"}
        code, text = nursery.run("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS, env=env)
        assert code == 0 and "Traceback" not in text, text
        assert text.count("ClearML:") == 1 and "recording offline" in text
        events = read_session(tmp_path / "run")[1]
        server.shutdown()
    assert {event["iter"] for event in events if event["metric"] == "acc"} == {1, 2}


def test_a_recorder_that_is_killed_is_replaced(tmp_path: Path, no_server: dict[str, str], monkeypatch: Any) -> None:
    for name, value in no_server.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    (tmp_path / "run").mkdir()
    tracker = lct.Tracker(lct.Config(out_dir=tmp_path / "run"), said.append)
    for epoch in (1, 2, 3):
        if epoch == 2:
            tracker._process.kill()
            tracker._process.wait()
        figures = {"train": {"acc": 0.5}, "val": {"acc": epoch / 10}, "train_per_class": {}, "val_per_class": {}}
        tracker.event({"event": "epoch_end", "epoch": epoch, **figures})
    tracker.close("completed")
    assert [text.startswith("ClearML: its process has ended") for text in said[:1]] == [True]
    values = {e["iter"]: e["value"] for e in read_session(tmp_path / "run")[1] if e["variant"] == "val"}
    assert values == {1: 0.1, 2: 0.2, 3: 0.3}
