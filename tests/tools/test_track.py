"""tools/track.py: the real ClearML package, offline and with servers that are dead in several ways; TensorBoard, read back."""

from __future__ import annotations

import argparse
import csv
import fcntl
import html
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import track
from conftest import REPO, make_dataset
from killing import Nursery, kill

import lct_dino3 as lct

FLAGS = "--model_id test_resnet --no-pretrained --img_size 32 --batch 8 --workers 0 --gpus 0 --emb_dim 16 --epochs 2".split()
TOOL = REPO / "tools" / "track.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("track") / "data", {"nut": 12, "bolt": 12})


@pytest.fixture(scope="module")
def finished(nursery: Nursery, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a file of answers in which two bolts are taken for nuts. Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    code, text = nursery.run("--data_root", data, "--out_dir", run, *FLAGS)
    assert code == 0, text
    with open(run / "predictions.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "view", "class", "answer"])
        writer.writerows(
            [["a", "bbox", "bolt", "nut"]] * 2 + [["b", "bbox", "nut", "nut"], ["c", "bbox", "bolt", "bolt"]]
        )
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def no_server(tmp_path: Path) -> dict[str, str]:
    """An environment in which ClearML finds no configuration of the user's."""
    cleared = {name: "" for name in os.environ if name.startswith(("CLEARML_", "TRAINS_"))}
    return {**cleared, "HOME": str(tmp_path / "home"), "CLEARML_CONFIG_FILE": str(tmp_path / "no.conf")}


def record(run: Path, *flags: str, env: dict[str, str] | None = None, timeout: float = 120) -> str:
    """Record a run, return what was said."""
    words = [sys.executable, str(TOOL), str(run), *flags]
    env = {**os.environ, **(env or {})}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=timeout, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def read_session(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the task and the reported metrics of the newest offline session."""
    session = max((run / "clearml").rglob("*.zip"), key=lambda path: path.stat().st_mtime_ns)
    with zipfile.ZipFile(session) as archive:
        task = json.loads(archive.read("task.json"))
        names = [name for name in archive.namelist() if name.endswith("metrics.jsonl")]
        lines = [line for name in names for line in archive.read(name).splitlines()]
    return task, [event for line in lines for event in json.loads(line)]


def read_board(run: Path) -> Any:
    """Return what TensorBoard itself reads from the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    return board


def read_text(board: Any, tag: str) -> str:
    return board.Tensors(tag)[-1].tensor_proto.string_val[0].decode()


# --- what is recorded -------------------------------------------------------------------------------------------------
def test_without_a_server_the_run_is_recorded_offline(run: Path, no_server: dict[str, str]) -> None:
    said = record(run, "--clearml", "--project", "Tools", env=no_server)
    assert said.count("ClearML:") == 1 and "no server is configured" in said and "recording offline" in said
    task, events = read_session(run)
    assert task["name"] == "run" and task["project_name"] == "Tools"
    assert task["hyperparams"]["options"]["model_id"]["value"] == "test_resnet"
    assert not (task.get("script") or {}).get("diff"), "the run is not this program"
    scalars = {
        (e["metric"], e["variant"], e["iter"]): e["value"] for e in events if e["type"] == "training_stats_scalar"
    }
    for epoch in (record for record in lct.read_events(run) if record["event"] == "epoch_end"):
        assert scalars["acc", "val", epoch["epoch"]] == pytest.approx(epoch["val"]["acc"])
        f1 = epoch["val_per_class"]["bolt"]["f1"]
        assert scalars["val f1 by class", "bolt", epoch["epoch"]] == pytest.approx(f1)
    (confusion,) = [event for event in events if event["metric"] == "test" and event["variant"] == "confusion"]
    assert json.loads(confusion["plot_str"])["data"][0]["z"] == [[1, 2], [0, 1]], "rows true: bolt, nut"
    artifacts = {item["key"] for item in task["execution"]["artifacts"]}
    assert artifacts == {"prototypes", "report", "config", "data_report", "checkpoint_best"}


def test_tensorboard_shows_every_figure_once_however_often_it_is_recorded(run: Path) -> None:
    for _ in range(2):
        said = record(run, "--tensorboard")
        assert said.count("\n") == 1 and said.endswith(f"recorded: {run}, completed\n")
    board = read_board(run)
    epochs = [record for record in lct.read_events(run) if record["event"] == "epoch_end"]
    for tag, value in (
        ("acc/val", lambda e: e["val"]["acc"]),
        ("loss/train", lambda e: e["train"]["loss"]),
        ("val f1 by class/bolt", lambda e: e["val_per_class"]["bolt"]["f1"]),
    ):
        shown = [(scalar.step, scalar.value, scalar.wall_time) for scalar in board.Scalars(tag)]
        assert [step for step, *_ in shown] == [1, 2]
        assert [figure for _, figure, _ in shown] == pytest.approx([value(epoch) for epoch in epochs])
        assert [when for *_, when in shown] == pytest.approx([epoch["time"] for epoch in epochs]), "as it was trained"
    test = next(record for record in lct.read_events(run) if record["event"] == "test_end")
    (scalar,) = board.Scalars("test prototypes acc")
    assert (scalar.step, scalar.value) == (2, pytest.approx(test["prototypes"]["acc"]))
    (scalar,) = board.Scalars("test f1 by class/bolt")
    assert (scalar.step, scalar.value) == (2, pytest.approx(test["per_class"]["bolt"]["f1"]))
    assert "| **bolt** | 1 | 2 |" in read_text(board, "test confusion")
    assert "| `model_id` | `test_resnet` |" in read_text(board, "options") and read_text(board, "status") == "completed"


def test_of_many_classes_the_confusions_are_listed(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(40)]
    matrix = [[10 * (row == column) for column in range(40)] for row in range(40)]
    matrix[3][5], matrix[7][2] = 1, 4
    board = track.TensorBoard(tmp_path)
    board.add_confusion(matrix, names, 0.0)
    board.close("completed", 0.0)
    lines = read_text(read_board(tmp_path), "test confusion").splitlines()
    assert lines[2:] == ["| class 7 | class 2 | 4 |", "| class 3 | class 5 | 1 |"]


def test_names_in_a_table_are_no_markdown(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    names = ["a|b", "<b>*c*</b> `d` __e__ [f](g) \\"]
    board = track.TensorBoard(tmp_path)
    board.add_confusion([[1, 2], [3, 4]], names, 0.0)
    board.close("completed", 0.0)
    shown = markdown_to_safe_html(read_text(read_board(tmp_path), "test confusion"))
    cells = re.findall(r"<t[hd][^>]*>(?:<strong>)?(.*?)(?:</strong>)?</t[hd]>", shown)
    heads = [html.escape(name, quote=False) for name in names]
    assert cells == ["true \\ answered", *heads, heads[0], "1", "2", heads[1], "3", "4"]


def test_nothing_is_kept_of_a_figure_that_is_not_defined_nor_by_class_of_too_many() -> None:
    rows = {f"{index}": {"f1": 1.0} for index in range(track.MAX_CLASSES + 1)}
    line = {
        "event": "epoch_end",
        "epoch": 1,
        "lr": 0.1,
        "pace": {"images_per_s": 9},
        "train": {"acc": 1, "auc_macro": None},
    }
    assert track.list_scalars({**line, "train_per_class": rows}) == [("acc", "train", 1)]


# --- following --------------------------------------------------------------------------------------------------------
class Writer:
    """Writes metrics.jsonl as a run does, with the lock of its folder, while it is followed in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._lock = filelock.FileLock(path.with_name(".lock"))
        self._lock.acquire()
        path.touch()
        self._thread.start()

    def _follow(self) -> None:
        self.taken.extend([])
        for line in track.follow(self.path, None):
            self.taken.append(line)

    def append(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)

    def replace(self, text: str) -> None:
        temporary = self.path.with_name(".new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)

    def wait_for(self, count: int) -> list[Any]:
        deadline = time.monotonic() + 10
        while len(self.taken) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return [line.get("epoch", line["event"]) for line in self.taken]

    def has_ended(self) -> bool:
        self._thread.join(10)
        return not self._thread.is_alive()


def line_of(epoch: int, **more: Any) -> str:
    return json.dumps({"event": "epoch_end", "epoch": epoch, **more}) + "\n"


def test_half_a_line_is_waited_for_and_a_damaged_one_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "POLL_SECONDS", 0.02)
    writer = Writer(tmp_path / "metrics.jsonl")
    writer.append(line_of(1) + line_of(2)[:20])
    assert writer.wait_for(1) == [1]
    time.sleep(0.1)
    assert writer.taken == [{"event": "epoch_end", "epoch": 1}]
    writer.append(line_of(2)[20:] + '{"event": "epo\n[]\n' + line_of(3))
    assert writer.wait_for(3) == [1, 2, 3]
    writer.append('{"event": "run_end"}\n')
    assert writer.has_ended() and len(writer.taken) == 4


def test_a_file_that_is_written_anew_is_read_again_without_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half line is cut off at a resume, and epochs beyond the checkpoint are forgotten and done again."""
    monkeypatch.setattr(track, "POLL_SECONDS", 0.02)
    writer = Writer(tmp_path / "metrics.jsonl")
    writer.append(line_of(1) + line_of(2, try_=1) + line_of(3)[:9])
    assert writer.wait_for(2) == [1, 2]
    writer.replace(line_of(1))
    time.sleep(0.1)
    writer.append(line_of(2, try_=2) + line_of(3))
    assert writer.wait_for(4) == [1, 2, 2, 3]
    writer.append('{"event": "run_end"}\n')
    assert writer.has_ended()


def test_an_epoch_that_is_done_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    board = track.TensorBoard(tmp_path)
    for epoch, value in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25)):
        board.add_scalars([("acc", "val", value)], epoch, 0.0)
    board.close("completed", 0.0)
    shown = [(scalar.step, scalar.value) for scalar in read_board(tmp_path).Scalars("acc/val")]
    assert shown == [(1, pytest.approx(0.1)), (2, pytest.approx(0.25))]


def test_it_ends_with_the_process_of_the_run_and_takes_its_last_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]), encoding="utf-8")  # killed in its second epoch
    code = "import sys, time; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as owner:
        words = [sys.executable, str(TOOL), str(run), "--tensorboard", "--pid", str(owner.pid)]
        tracker = subprocess.Popen(words)
        time.sleep(2)
        assert tracker.poll() is None, "the run lives"
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.writelines(line for line in lines[3:] if '"epoch_end"' in line)
        owner.kill()
    assert tracker.wait(10) == 0
    board = read_board(run)
    assert [scalar.step for scalar in board.Scalars("acc/val")] == [1, 2]
    assert read_text(board, "status") == "the process of the run has gone"


def test_a_killed_run_is_recorded_and_not_waited_for(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"run_end"' not in line), encoding="utf-8")
    said = record(run, "--tensorboard", timeout=30)
    assert said.endswith("the process of the run has gone\n") and read_board(run).Scalars("acc/val")


def test_a_process_of_another_user_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert track.is_running(1, is_child=False)


def test_a_tracker_that_ctrl_c_ends_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(track, "follow", interrupt)
    options = argparse.Namespace(run=tmp_path, tensorboard=True, clearml=False, pid=None)
    assert track.record_run(options) == 0 and capfd.readouterr().out.endswith(f"recorded: {tmp_path}, interrupted\n")


def test_where_clearml_fails_offline_too_tensorboard_goes_on_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(track.os, "execv", lambda _, command: started.append(command[2:]))
    monkeypatch.setattr(sys, "argv", ["track.py", "run", "--clearml", "--tensorboard", "--offline"])
    options = argparse.Namespace(offline=True, tensorboard=True)
    track.ClearML._restart_offline(argparse.Namespace(_options=options), "gone")
    assert started == [["run", "--tensorboard", "--offline"]]


def test_what_cannot_be_recorded_costs_a_sentence(run: Path, tmp_path: Path, no_server: dict[str, str]) -> None:
    def refuse(*flags: str, limit: str = "unlimited", **env: str) -> str:
        command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", sys.executable, str(TOOL), str(run), *flags]
        env = {**os.environ, **no_server, **env}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "usage" not in done.stderr, done.stderr
        return done.stdout

    (run / "clearml").write_text("")
    assert "clearml cannot be written: File exists" in refuse("--clearml")
    (run / "clearml").unlink()
    assert "recording stops here: [Errno 27] File too large" in refuse("--tensorboard", limit="4")
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['clearml'] = None")
    assert "ClearML: No module named 'clearml'; pip install clearml" in refuse("--clearml", PYTHONPATH=str(tmp_path))
    (tmp_path / "sitecustomize.py").unlink()
    (tmp_path / "clearml.py").write_text("")
    said = refuse("--clearml", PYTHONPATH=str(tmp_path))
    assert said.count("cannot import name") == 2 and "recording to ClearML stops here" in said


def test_a_damaged_file_of_answers_costs_the_confusion_matrix(run: Path) -> None:
    (run / "predictions.csv").write_bytes("class,answer\nбита,бита\n".encode("cp1251"))
    assert "no confusion matrix" in record(run, "--tensorboard")
    board = read_board(run)
    assert read_text(board, "status") == "completed" and "test confusion" not in board.Tags()["tensors"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for words in (
        [str(tmp_path), "--clearml"],
        [str(tmp_path)],
        ["a" * 256, "--clearml"],
        [str(tmp_path), "--tensorbord"],
    ):
        done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and " error: " in done.stderr and list(tmp_path.iterdir()) == []
    assert "did you mean --tensorboard?" in done.stderr


# --- beside training --------------------------------------------------------------------------------------------------
def test_training_starts_it_and_waits_for_its_end(
    nursery: Nursery, data: Path, tmp_path: Path, no_server: dict[str, str]
) -> None:
    out_dir = tmp_path / "run"
    flags = ("--data_root", data, "--out_dir", out_dir, *FLAGS, "--use_tensorboard", "--use_clearml")
    code, text = nursery.run(*flags, env=no_server, plans=[{"at": "save_gallery", "nth": 1, "shell": "sleep 5"}])
    assert code == 0 and "warning: the tracker" not in text, text
    assert "tracked by process" in text and "track.log" in (out_dir / "train.log").read_text("utf-8")
    assert (out_dir / "track.log").read_text("utf-8").count("ClearML:") == 1
    board = read_board(out_dir)
    assert [scalar.step for scalar in board.Scalars("acc/val")] == [1, 2] and read_text(board, "status") == "completed"
    assert "true \\ answered" in read_text(board, "test confusion")
    task, events = read_session(out_dir)
    assert task["name"] == "run" and {event["iter"] for event in events if event["metric"] == "acc"} == {1, 2}
    assert "report" in {item["key"] for item in task["execution"]["artifacts"]}


def test_an_interrupted_run_is_recorded_as_such_and_continued(
    nursery: Nursery, data: Path, tmp_path: Path, no_server: dict[str, str]
) -> None:
    flags = ("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS, "--use_tensorboard")
    code, text = nursery.run(*flags, env=no_server, plans=[kill("score_val", 2, signal.SIGTERM)])
    assert code == 143, text
    assert read_text(read_board(tmp_path / "run"), "status") == "interrupted"
    code, text = nursery.run(*flags, env=no_server)
    assert code == 0, text
    board = read_board(tmp_path / "run")
    assert [scalar.step for scalar in board.Scalars("acc/val")] == [1, 2] and read_text(board, "status") == "completed"


def seconds_waited(run: Path) -> float:
    """Return how long after the end of a run its tracker was ended, by the logs: one of them has whole seconds."""
    stamp = re.search(r"^(.{19})  warning: the tracker", (run / "train.log").read_text("utf-8"), re.MULTILINE)[1]
    return time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")) + 0.5 - lct.read_events(run)[-1]["time"]


def train_beside(tools: str, *argv: str) -> int:
    """Train with the tools of another folder, in a forked process."""
    lct.TOOLS_DIR = Path(tools)
    return lct.main(argv)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", "was ended"),
        ("raise RuntimeError('broken')", "tracked by process"),
        ("", "the run is not tracked"),
    ],
    ids=["hangs", "crashes", "is not there"],
)
def test_a_tracker_neither_stops_nor_outlives_the_run(
    nursery: Nursery, data: Path, tmp_path: Path, program: str, said: str
) -> None:
    tools = tmp_path / "tools"
    if program:
        tools.mkdir()
        (tools / "track.py").write_text(program)
    flags = ("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS, "--epochs", 1, "--use_clearml")
    code, text = nursery.run(tools, *flags, function=("tools.test_track", "train_beside"))
    assert code == 0 and said in text, text
    assert said in (tmp_path / "run" / "train.log").read_text("utf-8")
    assert lct.read_events(tmp_path / "run")[-1]["status"] == "completed"
    if "was ended" in said:
        assert 3.9 < seconds_waited(tmp_path / "run") < 5.5
    if match := re.search(r"tracked by process (\d+)", text):
        with pytest.raises(ProcessLookupError):
            os.kill(int(match[1]), 0)


# --- servers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["refuses", "accepts and never answers"])
def test_a_dead_server_is_replaced_by_an_offline_record(run: Path, no_server: dict[str, str], kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connections: list[socket.socket] = []
        if kind == "refuses":
            server.close()
        else:
            threading.Thread(target=lambda: connections.append(server.accept()[0]), daemon=True).start()
        keys = {"CLEARML_API_ACCESS_KEY": "k", "CLEARML_API_SECRET_KEY": "s"}
        said = record(run, "--clearml", env={**no_server, **keys, "CLEARML_API_HOST": f"http://127.0.0.1:{port}"})
    assert said.count("ClearML:") == 1 and f"127.0.0.1:{port}" in said
    assert read_session(run)[1]


class Server(http.server.BaseHTTPRequestHandler):
    """A ClearML server that answers the first ping, and then fails in one of the ways that servers fail."""

    kind = ""

    def do_GET(self) -> None:
        if self.path != "/debug.ping" and self.kind == "falls silent":
            time.sleep(300)
        self.send_response(200 if self.path == "/debug.ping" else 500)
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def test_of_two_at_once_the_second_waits(run: Path) -> None:
    """Both files stayed, and TensorBoard showed each figure twice."""
    folder = run / "tensorboard"
    folder.mkdir(exist_ok=True)
    before = {*folder.iterdir()}
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    words = [sys.executable, str(TOOL), str(run), "--tensorboard"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert "another process records into" in process.stdout.readline()
        assert {*folder.iterdir()} == before
        os.close(lock)
        assert "completed" in process.communicate(timeout=120)[0] and process.returncode == 0
    assert len([*folder.glob("events.out.tfevents.*")]) == 1


@pytest.mark.parametrize("output", [">&-", "> /dev/full", "| true"])
@pytest.mark.parametrize("tool", ["report.py", "track.py --tensorboard"])
def test_output_that_goes_nowhere_costs_nothing(tool: str, output: str, run: Path) -> None:
    (run / "predictions.csv").unlink()  # lacks columns that the report needs
    (run / "report.html").unlink(missing_ok=True)
    words = f"cd {shlex.quote(str(run))}; set -o pipefail; {sys.executable} {TOOL.parent}/{tool} . {output}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (run / "report.html").is_file() if tool == "report.py" else any((run / "tensorboard").iterdir())


@pytest.fixture
def failing_server(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    handler = type("Handler", (Server,), {"kind": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        hosts = {f"CLEARML_{name}_HOST": address for name in ("API", "WEB", "FILES")}
        yield {**hosts, "CLEARML_API_ACCESS_KEY": "k", "CLEARML_API_SECRET_KEY": "s"}
        server.shutdown()


@pytest.mark.parametrize("failing_server", ["falls silent", "fails"], indirect=True)
def test_a_server_that_fails_later_is_replaced_by_an_offline_record_of_all(
    run: Path, tmp_path: Path, no_server: dict[str, str], failing_server: dict[str, str]
) -> None:
    program = tmp_path / "track.py"
    program.write_text(re.sub(r"SILENT_SECONDS = [\d.]+", "SILENT_SECONDS = 8.0", TOOL.read_text("utf-8")), "utf-8")
    words = [sys.executable, str(program), str(run), "--clearml", "--tensorboard"]
    env = {**os.environ, **no_server, **failing_server}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("ClearML:") == 1 and "recording offline" in done.stdout
    assert {event["iter"] for event in read_session(run)[1] if event["metric"] == "acc"} == {1, 2}
    assert [scalar.step for scalar in read_board(run).Scalars("acc/val")] == [1, 2]


def test_a_run_with_a_silent_server_ends_within_five_seconds(
    nursery: Nursery, data: Path, tmp_path: Path, no_server: dict[str, str]
) -> None:
    handler = type("Handler", (Server,), {"kind": "falls silent"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        hosts = {f"CLEARML_{name}_HOST": address for name in ("API", "WEB", "FILES")}
        env = {**no_server, **hosts, "CLEARML_API_ACCESS_KEY": "k", "CLEARML_API_SECRET_KEY": "s"}
        flags = ("--data_root", data, "--out_dir", tmp_path / "run", *FLAGS, "--use_clearml")
        code, text = nursery.run(*flags, env=env)
        server.shutdown()
    assert code == 0 and "the tracker had not finished" in text, text
    assert 3.9 < seconds_waited(tmp_path / "run") < 5.5
