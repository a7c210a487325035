#!/usr/bin/env python3
"""Record a run in ClearML or TensorBoard, while it trains or afterwards.

    python tools/track.py RUN --tensorboard              into RUN/tensorboard; show it with: tensorboard --logdir RUN
    python tools/track.py RUN --clearml                  on the server that clearml-init has set up, else offline into RUN/clearml

`--use_clearml` and `--use_tensorboard` of training start this program beside the run. It follows RUN/metrics.jsonl from the first
line and ends when the run has ended. The file is the queue: whatever happens here, the run neither notices nor waits, and the same
command records the whole run again. Reads files only: imports neither the script nor torch.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import fcntl
import functools
import html
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.5
SILENT_SECONDS = 60.0  # longest wait for an answer of ClearML
CLOSE_SECONDS = 300.0  # longest wait for uploads at the end
RUN_WAITS_SECONDS = 4.4  # longest time to finish when the run waits, which kills this program after 4.5 s
MAX_CLASSES = 1000  # with more classes, no figures by class and no confusion matrix, which would have a million entries
MAX_TABLE_CLASSES = 30  # with more classes, TensorBoard shows the most frequent confusions instead of the matrix
DEFAULT_PROJECT = "DINOv3-Embeddings"
# Artifacts of a run, by the event after which the files are complete.
ARTIFACTS = {
    "run_start": ("config.json", "data_report.json"),
    "proto_end": ("prototypes.npz", "checkpoint_best.pth"),
    "run_end": ("report.html",),
}
# Integrations of ClearML that would patch or inspect this process: all are off, because the run is another process.
CLEARML_BINDINGS = (
    "detect_repository matplotlib tensorflow tensorboard pytorch xgboost scikit fastai lightgbm hydra tfdefines joblib megengine"
    " catboost gradio jsonargparse"
)


def say(text: str) -> None:
    """Print a line with the time, past the redirection of `sys.stdout` that silences ClearML; where it can go no more, go on."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", file=sys.__stdout__, flush=True)


# Following the file.


def follow(path: Path, pid: int | None) -> Iterator[dict[str, Any]]:
    """Yield the records of metrics.jsonl as they are written, until the last one is `run_end` or the process of the run is gone.

    A run that goes back to an earlier epoch replaces the file: it is then read from the first line, without the lines already seen.
    """
    is_child = pid is not None and os.getppid() == pid
    seen: set[bytes] = set()
    inode = 0
    offset = 0
    last_event = ""
    while True:
        # Asked before reading, so that the last lines of the run are read.
        is_gone = not (is_in_use(path.parent) if pid is None else is_running(pid, is_child))
        data = b""
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != inode or status.st_size < offset:
                inode = status.st_ino
                offset = 0
            file.seek(offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        offset += len(complete)
        for line in complete.splitlines():
            if line in seen:
                continue
            seen.add(line)
            with contextlib.suppress(ValueError):  # a damaged line
                record = json.loads(line)
                if isinstance(record, dict) and "event" in record:
                    last_event = record["event"]
                    yield record
        if is_gone or (last_event == "run_end" and len(complete) == len(data)):
            return
        time.sleep(POLL_SECONDS)


def is_running(pid: int, is_child: bool) -> bool:
    """Whether a process exists. A parent that has ended, even one that is a zombie, has passed its children to another process."""
    if is_child:
        return os.getppid() == pid
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process of another user
        return True
    return True


def is_in_use(run: Path) -> bool:
    """Whether a process holds the lock in the folder of a run. Where none does, this shares the lock for an instant."""
    try:
        with open(run / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # it is held, or the file system has no locks
        return True
    return False


# Figures and where they are recorded.


def list_scalars(record: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return (title, series, value) of every defined figure of an epoch: by split, and by split and class."""
    scalars = []
    for group, figures in record.items():
        if not isinstance(figures, dict):
            continue
        split = group.removesuffix("_per_class")
        if group in ("train", "val"):
            scalars += [(key, split, value) for key, value in figures.items()]
        elif split != group and len(figures) <= MAX_CLASSES:
            for class_name, row in figures.items():
                scalars += [(f"{split} {key} by class", class_name, value) for key, value in row.items()]
    return [scalar for scalar in scalars if isinstance(scalar[2], (int, float))]


def read_confusion(run: Path, class_names: Sequence[str]) -> list[list[int]] | None:
    """Return how often test images of class i were answered with j; None without predictions.csv or with too many classes."""
    path = run / "predictions.csv"
    if not path.exists() or len(class_names) > MAX_CLASSES:
        return None
    index_of = {name: index for index, name in enumerate(class_names)}
    matrix = [[0] * len(class_names) for _ in class_names]
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            matrix[index_of[row["class"]]][index_of[row["answer"]]] += 1
    return matrix


class TensorBoard:
    """Writes RUN/tensorboard anew from the first record on: nothing appears twice, however often this program is started."""

    def __init__(self, run: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY)  # open, and locked, to the end: of two writers both files would stay
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"TensorBoard: another process records into {folder}; this one begins when that has ended")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError:  # some network file systems lock no folders
            pass
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = EventFileWriter(str(folder))
        self._last_epoch = 0
        self._forget_from(0)  # for a viewer that has read the old file

    def start(self, options: dict[str, Any], when: float) -> None:
        """Show the options of the run."""
        rows = [f"| `{name}` | `{value}` |" for name, value in options.items()]
        self._add_text("options", "\n".join(["| option | value |", "|---|---|", *rows]), 0, when)

    def add_scalars(self, scalars: Sequence[tuple[str, str, float]], epoch: int, when: float) -> None:
        """Write the figures of an epoch; those of a repeated epoch replace the old ones."""
        if epoch <= self._last_epoch:
            self._forget_from(epoch)
        self._last_epoch = epoch
        values = [{"tag": f"{title}/{series}", "simple_value": value} for title, series, value in scalars]
        self._add(epoch, when, summary={"value": values})

    def add_figures(self, figures: dict[str, float], when: float) -> None:
        """Write the final figures at the last epoch."""
        values = [{"tag": name, "simple_value": value} for name, value in figures.items()]
        self._add(self._last_epoch, when, summary={"value": values})

    def add_confusion(self, matrix: list[list[int]], names: Sequence[str], when: float) -> None:
        """Write the test's confusion matrix as a table, or with many classes its most frequent confusions."""
        names = [re.sub(r"([\\`*_|\[])", r"\\\1", html.escape(name)) for name in names]  # no Markdown, no HTML
        if len(names) <= MAX_TABLE_CLASSES:
            lines = ["| true \\ answered | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
            lines += [
                f"| **{name}** | " + " | ".join(map(str, row)) + " |" for name, row in zip(names, matrix, strict=True)
            ]
        else:
            cells = itertools.chain.from_iterable(matrix)
            counts = Counter(dict(zip(itertools.product(names, repeat=2), cells, strict=True)))
            wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1] and count][:100]
            lines = ["| true | answered | images |", "|---|---|---|"]
            lines += [f"| {true} | {answered} | {count} |" for (true, answered), count in wrong]
        self._add_text("test confusion", "\n".join(lines), self._last_epoch, when)

    def add_artifact(self, path: Path) -> None:
        """Do nothing: the files of the run lie beside the log already."""

    def close(self, status: str, when: float) -> None:
        """Write the status of the run, and finish the file."""
        self._add_text("status", status, self._last_epoch, when)
        self._writer.close()

    def _forget_from(self, epoch: int) -> None:
        self._add(epoch, time.time(), session_log={"status": "START"})

    def _add_text(self, tag: str, text: str, step: int, when: float) -> None:
        metadata = {"plugin_data": {"plugin_name": "text"}}
        tensor = {"dtype": "DT_STRING", "string_val": [text.encode("utf-8", "replace")]}
        self._add(step, when, summary={"value": [{"tag": tag, "metadata": metadata, "tensor": tensor}]})

    def _add(self, step: int, when: float, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(step=step, wall_time=when, **content))
        self._writer.flush()


class ClearML:
    """A task on the ClearML server, or offline in RUN/clearml.

    A call that fails or gets no answer restarts this program offline, from the first record on.
    """

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        self._run = run
        self._folder = (run / "clearml").resolve()
        self._folder.mkdir(exist_ok=True)
        self._options = options
        self._task: Any = None
        os.environ.setdefault("CLEARML_LOG_LEVEL", "ERROR")
        os.environ["CLEARML_CACHE_DIR"] = str(self._folder)  # offline sessions go there too
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for what ClearML prints
        if importlib.util.find_spec("clearml") is None:
            raise ImportError("No module named 'clearml'")

    def start(self, options: dict[str, Any], when: float) -> None:
        """Open the task; continue the task of an earlier start unless offline."""
        with self._limited(SILENT_SECONDS):
            from clearml import Task
            from clearml.config import config_obj

            obstacle = "" if self._options.offline else find_clearml_obstacle()
            if obstacle:
                self._options.offline = True
                say(f"ClearML: {obstacle}; recording offline into {self._folder}")
            Task.set_offline(self._options.offline)
            # A reporter in a subprocess could outlive this process.
            config_obj.set_overrides({"sdk": {"development": {"report_use_subprocess": False}}})
            id_path = self._folder / "task_id.txt"
            earlier_id = id_path.read_text() if id_path.exists() and not self._options.offline else ""
            name = options.get("clearml_task_name") or options.get("experiment_name") or self._run.resolve().name
            self._task = Task.init(
                project_name=self._options.project or options.get("clearml_project") or DEFAULT_PROJECT,
                task_name=self._options.task or name,
                reuse_last_task_id=earlier_id or False,
                continue_last_task=0 if earlier_id else False,  # 0: epochs keep their numbers and replace the old ones
                auto_connect_arg_parser=False,
                auto_connect_frameworks=dict.fromkeys(CLEARML_BINDINGS.split(), False),
                auto_resource_monitoring=False,
                auto_connect_streams=False,
            )
            self._task.connect({name: str(value) for name, value in options.items()}, name="options")
            if not self._options.offline:
                id_path.write_text(self._task.id)
                say(f"ClearML: recording into task {self._task.id}")

    def add_scalars(self, scalars: Sequence[tuple[str, str, float]], epoch: int, when: float) -> None:
        """Report the figures of an epoch."""
        with self._limited(SILENT_SECONDS):
            for title, series, value in scalars:
                self._task.get_logger().report_scalar(title, series, value, iteration=epoch)

    def add_figures(self, figures: dict[str, float], when: float) -> None:
        """Report the final figures."""
        with self._limited(SILENT_SECONDS):
            for name, value in figures.items():
                self._task.get_logger().report_single_value(name, value)

    def add_confusion(self, matrix: list[list[int]], names: Sequence[str], when: float) -> None:
        """Report the test's confusion matrix, with the true classes as rows."""
        labels = {"xlabels": list(names), "ylabels": list(names), "xaxis": "predicted", "yaxis": "true"}
        with self._limited(SILENT_SECONDS):
            self._task.get_logger().report_confusion_matrix("test", "confusion", matrix, iteration=0, **labels)

    def add_artifact(self, path: Path) -> None:
        """Attach a file of the run."""
        with self._limited(SILENT_SECONDS):
            self._task.upload_artifact(path.stem, artifact_object=str(path.resolve()), wait_on_upload=False)

    def close(self, status: str, when: float) -> None:
        """Finish the task as completed, stopped or failed."""
        with self._limited(CLOSE_SECONDS):
            self._task.flush(wait_for_uploads=True)  # `mark_stopped` drops queued reports
            if status == "interrupted":
                self._task.mark_stopped()
            elif status != "completed":
                self._task.mark_failed(status_message=status)
            self._task.close()

    @contextlib.contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        """Restart this program without the server (which never returns) if the block raises or takes longer than `seconds`."""
        timer = threading.Timer(seconds, self._restart_offline, [f"no answer for {seconds:.0f} s"])
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception as error:  # ClearML raises errors of many kinds
            self._restart_offline(f"{type(error).__name__}: {error}")
        finally:
            timer.cancel()

    def _restart_offline(self, reason: str) -> None:
        """Restart this program offline; if it is offline already, without ClearML."""
        reason = " ".join(reason.split())[:200]
        if not self._options.offline:
            say(f"ClearML: {reason}; recording offline into {self._folder}")
            arguments = [*sys.argv[1:], "--offline"]
        else:
            say(f"ClearML: {reason}; recording to ClearML stops here")
            if not self._options.tensorboard:
                os._exit(2)
            arguments = [argument for argument in sys.argv[1:] if argument != "--clearml"]
        os.execv(sys.executable, [sys.executable, __file__, *arguments])


def find_clearml_obstacle() -> str:
    """Return why no ClearML server can be used, or '' if one answers within 3 s."""
    import socket
    from urllib.parse import urlsplit

    from clearml.backend_api.session import Session
    from clearml.backend_api.session.defs import ENV_ACCESS_KEY, ENV_OFFLINE_MODE
    from clearml.config import config_obj

    if ENV_OFFLINE_MODE.get():
        return "offline mode is asked for"
    if not (ENV_ACCESS_KEY.get() or config_obj.get("api.credentials.access_key", None)):
        return "no server is configured (run clearml-init)"
    host = urlsplit(Session.get_api_server_host())
    port = host.port or (443 if host.scheme == "https" else 80)
    try:
        with socket.create_connection((host.hostname, port), timeout=3) as connection:
            if host.scheme != "https":  # a host that accepts but never answers would block Task.init for minutes
                connection.sendall(f"GET /debug.ping HTTP/1.0\r\nHost: {host.hostname}\r\n\r\n".encode())
                if not connection.recv(1):
                    return f"{host.hostname}:{port} closes the connection"
    except OSError as error:
        return f"{host.hostname}:{port} does not answer ({error})"
    return ""


# The whole job.


class Recording:
    """Passes the records of a run to the sinks; one method for each kind of event."""

    def __init__(self, run: Path, sinks: Sequence[TensorBoard | ClearML]) -> None:
        self.status = "the run has not begun"
        self._run = run
        self._sinks = sinks
        self._class_names: list[str] = []
        self._is_open = False
        self._when = time.time()  # time of the last record
        self._sent: dict[str, int] = {}  # name of an artifact -> mtime in ns of the file that was recorded

    def take(self, record: dict[str, Any]) -> None:
        """Record one line of metrics.jsonl, and the files that are complete after its event."""
        event = record["event"]
        self._when = record.get("time", self._when)
        handle = {
            "run_start": self._start,
            "resumed": self._resume,
            "epoch_end": self._add_epoch,
            "test_end": self._add_test,
            "run_end": self._end,
        }.get(event)
        if handle is not None:
            handle(record)
        for path in (self._run / name for name in ARTIFACTS.get(event, ())):
            if path.exists() and self._sent.get(path.name) != path.stat().st_mtime_ns:
                self._sent[path.name] = path.stat().st_mtime_ns
                for sink in self._sinks:
                    sink.add_artifact(path)

    def _start(self, record: dict[str, Any]) -> None:
        self._class_names = record.get("classes", [])
        self._resume(record)
        for sink in () if self._is_open else self._sinks:
            sink.start(record.get("options", {}), self._when)
        self._is_open = True

    def _resume(self, _: dict[str, Any]) -> None:
        self.status = "the process of the run has gone"  # unless a `run_end` follows

    def _add_epoch(self, record: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.add_scalars(list_scalars(record), record["epoch"], self._when)

    def _add_test(self, record: dict[str, Any]) -> None:
        ways = ("classifier", "prototypes")
        figures = {f"test {way} {key}": value for way in ways for key, value in record.get(way, {}).items()}
        by_class = list_scalars({"test_per_class": record.get("per_class", {})})
        figures |= {f"{title}/{class_name}": value for title, class_name, value in by_class}
        for sink in self._sinks:
            sink.add_figures({name: value for name, value in figures.items() if value is not None}, self._when)

    def _end(self, record: dict[str, Any]) -> None:
        self.status = record.get("status", "completed")
        matrix = None
        try:
            matrix = read_confusion(self._run, self._class_names) if self.status == "completed" else None
        except (OSError, ValueError, KeyError, csv.Error) as error:  # edited or damaged since the run
            say(f"no confusion matrix: {self._run / 'predictions.csv'} cannot be read: {error!r}")
        for sink in self._sinks if matrix else ():
            sink.add_confusion(matrix, self._class_names, self._when)

    def close(self) -> None:
        """Close the sinks, if a `run_start` has opened them."""
        for sink in self._sinks if self._is_open else ():
            sink.close(self.status, self._when)


def main() -> int:
    """Record the run that the command line names; ends the process."""
    parser = argparse.ArgumentParser(
        prog="python lct_dino3.py track", description="Record a run in ClearML or TensorBoard.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="out_dir of the run, which may still train")
    parser.add_argument(
        "--clearml", action="store_true", help="in ClearML; offline into RUN/clearml where no server answers"
    )
    parser.add_argument("--tensorboard", action="store_true", help="in TensorBoard, into RUN/tensorboard")
    parser.add_argument("--project", metavar="NAME", help=f"in ClearML [that of the run, or {DEFAULT_PROJECT}]")
    parser.add_argument("--task", metavar="NAME", help="in ClearML [that of the run, or the name of its folder]")
    parser.add_argument("--offline", action="store_true", help="ClearML: ask no server")
    parser.add_argument("--pid", type=int, metavar="N", help="number of the run's process: end with it")
    options = parse_options(parser)
    if not (options.clearml or options.tensorboard):
        parser.error("give --clearml, --tensorboard or both")
    try:
        if not (options.run / "metrics.jsonl").is_file():
            parser.error(f"{options.run} holds no run: metrics.jsonl is not there")
    except OSError as error:  # no permission on a folder, too long a name
        parser.error(str(error))
    with contextlib.suppress(OSError, ValueError, TypeError):  # the run may not have written it yet
        if "num_devices" in json.loads((options.run / "config.json").read_text("utf-8")):
            parser.error(f"{options.run} is of lct-dino-3.py, which records in ClearML itself; train anew")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.__stdout__ is None:  # it is closed
        sys.__stdout__ = open(os.devnull, "w")  # noqa: SIM115  stays open to the end
    sys.__stdout__.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show
    threading.excepthook = show_unless_raised_again
    code = 2
    try:
        code = record_run(options)
    except KeyboardInterrupt:  # while the sinks are opened or closed
        code = 130
    except OSError as error:  # the disk is full, or the folder is gone
        say(f"recording stops here: {error}; the same command records the whole run again")
    # Without waiting for ClearML's threads, which may wait for a silent server: everything that can be sent is sent.
    os._exit(code)


def show_unless_raised_again(failure: threading.ExceptHookArgs) -> None:
    """Show an error of a thread, but not a full disk: TensorBoard's writer raises it again in the main thread."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def record_run(options: argparse.Namespace) -> int:
    """Follow the run until it ends or this program is interrupted; return the exit code."""
    sinks = open_sinks(options)
    if not sinks:
        return 2
    recording = Recording(options.run, sinks)
    try:
        for record in follow(options.run / "metrics.jsonl", options.pid):
            recording.take(record)
    except KeyboardInterrupt:
        recording.status = "interrupted"
    if options.pid is not None:  # the run, if it still exists, waits no longer than this
        timer = threading.Timer(RUN_WAITS_SECONDS, os._exit, [1])
        timer.daemon = True
        timer.start()
    recording.close()
    if options.pid is None:
        say(f"recorded: {options.run}, {recording.status}")
    return 0


def open_sinks(options: argparse.Namespace) -> list[TensorBoard | ClearML]:
    """Return the sinks that are asked for, and say why one is missing."""
    sinks: list[TensorBoard | ClearML] = []
    makers = {"TensorBoard": TensorBoard, "ClearML": functools.partial(ClearML, options=options)}
    for name, make in makers.items():
        try:
            sinks += [make(options.run)] if getattr(options, name.lower()) else []
        except ImportError as error:
            say(f"{name}: {error}; pip install {name.lower()}")
        except OSError as error:
            say(f"{name}: {options.run / name.lower()} cannot be written: {error.strerror}")
    return sinks


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; the error for an unknown option names the closest one."""
    options, unknown = parser.parse_known_args()
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {close[0]}?" if close else ""))
    return options


if __name__ == "__main__":
    main()
