"""Runs of the script that die at a chosen call, forked from one process that has imported everything, because torch takes 4 s.

`python tests/killing.py` is this process: it reads one job per line from stdin, runs it in a child and prints the exit code.
Tests use it through `Nursery`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
# Modules that a run imports on demand; the parent imports them before it forks.
LAZY = (
    "albumentations cv2 jinja2 scipy.fft scipy.optimize scipy.sparse.csgraph"
    " scipy.stats sklearn.cluster sklearn.linear_model sklearn.manifold sklearn.pipeline sklearn.preprocessing timm timm.optim"
    " torchvision.transforms.v2 torch.utils.serialization.config yaml PIL.GifImagePlugin PIL.JpegImagePlugin"
    " prelabel report"
)
DEAD_WORKER_POLL = 0.2  # seconds between torch's looks for dead loader workers, which are 5 s otherwise
FEW_DRAWS = 25  # of each interval: those of a run take half of a small one's time
# Functions at whose calls a run can die; the soak test draws from all calls of all of them.
TARGETS = (
    "read_deep_rgb list_images assign_splits build_backbone measure_baseline TrainFeed.batches decode_image train_step"
    " torch.optim.AdamW.step nn.utils.clip_grad_norm_ Tally.add Tally.fetch check_finite score_epoch compute_metrics"
    " score_val RunDirectory.event RunDirectory.log os.write save_checkpoint open torch.serialization._save os.fsync"
    " open_store Path.replace sync_folder Path.unlink copy_checkpoint save_epoch SquareStore.get embed build_gallery save_gallery"
    " score_classifier compute_gallery_metrics write_embeddings write_predictions start_report os.pwrite FileMemory.save"
).split()


def resolve(root: Any, name: str) -> tuple[Any, str]:
    """Return the object that holds the last attribute of a dotted name, and the name of the attribute."""
    *path, last = name.split(".")
    return functools.reduce(getattr, path, root), last


def install(module: Any, name: str, action: Any) -> None:
    """Replace a function of the script, or of a library it uses, by `action(number of the call, call, arguments)`."""
    owner, last = resolve(module, name)
    original = getattr(owner, last, None) or getattr(__builtins__, last)
    count = itertools.count(1)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return action(next(count), lambda: original(*args, **kwargs), args)

    setattr(owner, last, wrapper)


class Trap:
    """Sends a signal to this process from `__del__`, where Python drops exceptions."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        for _ in range(100):
            time.sleep(0.001)


def die_at(plan: dict[str, Any]) -> Any:
    """Return an action that sends this process a signal before, after or halfway through the nth call."""

    def action(number: int, call: Any, args: tuple) -> Any:
        if number != plan["nth"]:
            return call()
        when = plan.get("when", "before")
        if when == "half":  # writes half of the bytes first, as when the machine loses power
            os.write(args[0], bytes(args[1])[: len(args[1]) // 2])
        if when == "swallowed":
            Trap(plan["signal"])
            return call()
        result = call() if when == "after" else None
        for press in range(plan.get("times", 1)):
            # A second press of Ctrl-C comes later than an echo of the first.
            time.sleep(plan.get("gap", 0.6) * (press > 0))
            os.kill(os.getpid(), plan["signal"])
        return result if when == "after" else call()

    return action


def fail_at(plan: dict[str, Any]) -> Any:
    """Return an action that raises an error instead of the nth call, and instead of all later ones if `on` is set."""

    def action(number: int, call: Any, args: tuple) -> Any:
        if number == plan["nth"] or (plan.get("on") and number > plan["nth"]):
            if "errno" in plan:
                raise OSError(plan["errno"], os.strerror(plan["errno"]))
            raise getattr(__builtins__, plan["error"])(plan.get("text", ""))
        return call()

    return action


def do_at(plan: dict[str, Any]) -> Any:
    """Return an action that has a side effect before the nth call, and before all later ones if `on` is set."""

    def action(number: int, call: Any, args: tuple) -> Any:
        if number == plan["nth"] or (plan.get("on") and number > plan["nth"]):
            if "shell" in plan:
                subprocess.run(plan["shell"], shell=True, check=True)
            if "worker_signal" in plan:
                os.kill(multiprocessing.active_children()[0].pid, plan["worker_signal"])
        return call() + plan.get("add", 0) if "add" in plan and number >= plan["nth"] else call()

    return action


def count_calls(module: Any, path: Path) -> None:
    """Count the calls of all targets; `module.count_calls_done` writes the counts to a JSON file."""
    counts: collections.Counter[str] = collections.Counter()

    def counting(name: str) -> Any:
        def action(number: int, call: Any, _: tuple) -> Any:
            counts[name] = number
            return call()

        return action

    for name in TARGETS:
        install(module, name, counting(name))
    module.count_calls_done = lambda: path.write_text(json.dumps(counts))


def find_main(module: Any, argv: list[str]) -> tuple[Any, list[str], Any]:
    """Return `main` of the tool that the first argument names, else of the script, with its arguments and its module."""
    if argv and (REPO / "tools" / f"{argv[0]}.py").is_file():
        module, argv = importlib.import_module(argv[0]), argv[1:]
    return module.main, argv, module


def run_child(module: Any, job: dict[str, Any]) -> int:
    """Run a job in this forked process and return the exit code."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests started with nohup ignore it
    if job.get("deaf"):  # output goes to a pipe without a reader
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
    os.environ.update(job.get("env", {}))
    main, argv, module = find_main(module, job["argv"])
    if "count" in job:
        count_calls(module, Path(job["count"]))
    if "file_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    if "open_files" in job:
        resource.setrlimit(resource.RLIMIT_NOFILE, (job["open_files"], job["open_files"]))
    for name, value in job.get("constants", {}).items():
        setattr(module, name, value)
    for plan in job.get("plans", ()):
        kinds = {"signal": die_at, "errno": fail_at, "error": fail_at}
        install(module, plan["at"], next((kinds[key] for key in plan if key in kinds), do_at)(plan))
    if "ranks" in job:
        os.environ.update(job["env"])
        signal.alarm(400)  # seconds; ends a rank that waits for the others forever
    if "function" in job:
        file, name = job["function"]
        return getattr(importlib.import_module(file), name)(*job["argv"])
    code = main(argv)
    if "count" in job:
        module.count_calls_done()
    return code


def report_here(run: Any) -> bool:
    """Write the report as `start_report` does, in this process: another interpreter is a fifth of a small run's time."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module("report").main([str(run.path)]) == 0


def serve() -> None:
    """Read jobs one by one; fork a child for each, or for each of its `ranks`, and print the exit codes."""
    sys.path[:0] = [str(REPO), str(REPO / "tools")]
    module = importlib.import_module(os.environ.get("LCT_MODULE", "lct_dino3"))
    module.BOOTSTRAP_DRAWS = FEW_DRAWS
    module.start_report = report_here
    for name in LAZY.split():
        importlib.import_module(name)
    importlib.import_module("report").load_template()
    import cv2
    import numpy as np
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    _MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (DEAD_WORKER_POLL,)
    cv2.setNumThreads(0)
    cv2.cvtColor(np.zeros((1, 1, 3), np.uint8), cv2.COLOR_RGB2LAB)  # fills tables in a quarter of a second
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a process with threads must not be forked")
    for line in sys.stdin:
        job = json.loads(line)
        children = [fork_child(module, {**job, **rank_job}) for rank_job in job.get("ranks", [{}])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(*codes, flush=True)


def fork_child(module: Any, job: dict[str, Any]) -> int:
    """Fork a child process that runs a job; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run_child(module, job)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Nursery:
    """Starts the forking process once and runs the script in its children as often as tests need."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *argv: object, **job: Any) -> tuple[int, str]:
        """Run the script; return the exit code, negative for the signal that killed it, and the output."""
        output = self._folder / f"output{next(self._number)}.txt"
        job = {"argv": [str(arg) for arg in argv], "output": str(output), **job}
        return self._ask(job)[0], output.read_text("utf-8", "replace")

    def run_team(self, *argv: object, ranks: list[dict[str, Any]], **job: Any) -> list[tuple[int, str]]:
        """Run the script as torchrun does, with a process for each job of `ranks`; return exit code and output of each."""
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent holds it
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "test"}
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        env |= {name: str(len(ranks)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        output = self._folder / f"output{next(self._number)}"
        jobs = []
        for rank, rank_job in enumerate(ranks):
            of_rank = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | rank_job.get("env", {})
            jobs.append(rank_job | {"env": of_rank, "output": f"{output}.{rank}.txt"})
        codes = self._ask({"argv": [str(arg) for arg in argv], "ranks": jobs, **job})
        return [
            (code, Path(rank_job["output"]).read_text("utf-8", "replace"))
            for code, rank_job in zip(codes, jobs, strict=True)
        ]

    def _ask(self, job: dict[str, Any]) -> list[int]:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that forks the runs has died")
        return [int(code) for code in answer.split()]

    def close(self) -> None:
        """End the forking process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


def kill(at: str, nth: int, number: int = signal.SIGKILL, **more: Any) -> dict[str, Any]:
    """Return the plan of a signal at the nth call of a function."""
    return {"at": at, "nth": nth, "signal": int(number), **more}


def do(at: str, nth: int, **effect: Any) -> dict[str, Any]:
    """Return the plan of a side effect at the nth call of a function: `shell`, `worker_signal`, or `add` to its return value."""
    return {"at": at, "nth": nth, **effect}


def fail(at: str, nth: int, **more: Any) -> dict[str, Any]:
    """Return the plan of an error at the nth call of a function."""
    return {"at": at, "nth": nth, **more}


def read_run(out_dir: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, comparable value) of everything in a finished run that interruptions must not change."""
    import numpy as np
    import torch

    for name in ("last", "best", *sorted(path.stem[11:] for path in out_dir.glob("checkpoint_ep*.pth"))):
        payload = torch.load(out_dir / f"checkpoint_{name}.pth", weights_only=True)
        payload.pop("seconds")
        for key, value in flatten(payload, f"{name}"):
            yield key, (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value
    with np.load(out_dir / "prototypes.npz", allow_pickle=False) as content:
        for key in content.files:
            if key != "meta":
                yield f"prototypes {key}", (content[key].dtype.str, content[key].tobytes())
        meta = json.loads(str(content["meta"]))
    yield "prototypes meta", {key: value for key, value in meta.items() if key != "date"}
    with np.load(out_dir / "embeddings.npz", allow_pickle=False) as content:
        for key in content.files:
            yield f"embeddings {key}", (content[key].dtype.str, content[key].tobytes())
    yield "predictions", (out_dir / "predictions.csv").read_bytes()
    events = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_bytes().splitlines()]
    for event in events:
        event.pop("time"), event.pop("seconds", None), event.pop("pace", None)
    for kind in ("baseline_end", "epoch_end", "best_update"):
        yield kind, [event for event in events if event["event"] == kind]
    yield "test_end", [event for event in events if event["event"] == "test_end"][-1]
    yield "ended", events[-1]
    yield "splits", (out_dir / "splits.json").read_bytes()
    yield "files", sorted(path.name for path in out_dir.iterdir() if ".damaged-" not in path.name)


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{name}/{key}")
    else:
        yield name, value


def differences(first: Path, second: Path) -> list[str]:
    """Return the names of the values that differ between two finished runs."""
    a, b = dict(read_run(first)), dict(read_run(second))
    return sorted({name for name in a.keys() | b.keys() if name not in a or name not in b or a[name] != b[name]})


if __name__ == "__main__":
    serve()
