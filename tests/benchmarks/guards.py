"""Take each guard out of a copy of the script, and see that a test notices.

    python tests/benchmarks/guards.py [NAME ...]

A guard is a piece of text that must occur once in lct_dino3.py, what stands in its place without the guard, and the tests that must
fail then. Prints a line a guard, and the count; exit code 1 if one is not missed, or if its text is not there any more.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
GUARDS = {
    "checksums of archives": (
        "            damaged = archive.testzip()\n",
        "            damaged = None\n",
        "tests/test_resume.py -k 'flipped'",
    ),
    "fsync before rename": (
        "                file.flush()\n                os.fsync(file.fileno())\n            temporary.replace(path)\n",
        "                file.flush()\n            temporary.replace(path)\n",
        "tests/test_resume.py -k reaches_the_disk",
    ),
    "fsync of the folder": (
        "        sync_folder(path.parent)\n    except (OSError, RuntimeError) as error:\n",
        "    except (OSError, RuntimeError) as error:\n",
        "tests/test_resume.py -k reaches_the_disk",
    ),
    "temporary file and rename": (
        'temporary, written = path.with_name(f".{path.name}.{os.getpid()}.tmp"), 0',
        "temporary, written = path, 0",
        "tests/test_resume.py -k system_calls",
    ),
    "cleaning of leftovers": (
        "            leftover.unlink()\n        self._log",
        "            pass\n        self._log",
        "tests/test_resume.py -k leftovers",
    ),
    "half a line is taken back": ("os.ftruncate(self._fd, size)", "pass", "tests/test_resume.py -k taken_back"),
    "fsync of log lines": ("                os.fsync(self._fd)\n", "", "tests/test_resume.py -k reaches_the_disk"),
    "half lines of logs": (
        'os.ftruncate(self._fd, data.rfind(b"\\n") + 1)',
        "pass",
        "tests/test_resume.py -k half_lines",
    ),
    "no NaN in metrics.jsonl": (
        "        return value if math.isfinite(value) else None\n",
        "        return value\n",
        "tests/test_hostile.py -k logs_stay_lines",
    ),
    "a step is not interrupted": (
        "        with SIGNALS.hold():  # weights, position and tally change together\n",
        "        with contextlib.nullcontext():\n",
        "tests/test_resume.py -k costs_no_step",
    ),
    "torch.save is not interrupted": (
        "with SIGNALS.hold(), atomic_file(path) as file:\n        torch.save(",
        "with atomic_file(path) as file:\n        torch.save(",
        "tests/test_resume.py -k inside_torchs_writer",
    ),
    "echo of a Ctrl-C": (
        "time.monotonic() - self._asked_at > SECOND_PRESS_SECONDS",
        "True",
        "tests/test_resume.py -k repeated",
    ),
    "second Ctrl-C": (
        "                os._exit(128 + number)\n            return\n",
        "                pass\n            return\n",
        "tests/test_resume.py -k second_ctrl",
    ),
    "swallowed interrupt": ("        SIGNALS.check()\n", "", "tests/test_resume.py -k swallowed"),
    "nohup": (
        "is not signal.SIG_IGN:\n                signal.signal(number, self._stop if",
        "is not None:\n                signal.signal(number, self._stop if",
        "tests/test_resume.py -k nohup",
    ),
    "weights only": (
        '        payload = torch.load(path, map_location="cpu", weights_only=True)\n    except Exception as error:  # any',
        '        payload = torch.load(path, map_location="cpu", weights_only=False)\n    except Exception as error:  # any',
        "tests/test_resume.py -k 'hostile_checkpoint'",
    ),
    "no pickle in prototypes": (
        "np.load(path, allow_pickle=False) as content",
        "np.load(path, allow_pickle=True) as content",
        "tests/test_resume.py -k hostile_gallery",
    ),
    "strict load": (
        "    if unfit:\n        named",
        "    if False:\n        named",
        "tests/test_resume.py -k lack_a_tensor",
    ),
    "quarantine": (
        "        rename_damaged(path, reason, run.log)\n    if point",
        "        pass\n    if point",
        "tests/test_resume.py -k set_aside",
    ),
    "stop when no checkpoint is sound": (
        "    if point is None and damaged:\n        lines",
        "    if False:\n        lines",
        "tests/test_resume.py -k no_checkpoint_is_sound",
    ),
    "stop when all checkpoints are gone": (
        "        raise UserError(problem, str(folder), RESTORE_OR_OVERWRITE)\n",
        "        return None\n",
        "tests/test_resume.py -k no_checkpoint_is_sound",
    ),
    "finite weights": (
        "    if not all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point()):\n",
        "    if False:\n",
        "tests/test_run.py -k ruins_the_weights",
    ),
    "finite losses": (
        "    if steps_ago is not None and get_rank() == 0:",
        "    if False:",
        "tests/test_run.py -k loss_that_is_not_finite",
    ),
    "lock": (
        "        proxy = lock.acquire(timeout=0)\n",
        '        proxy = filelock.FileLock(path / f".lock{os.getpid()}{time.time()}").acquire(timeout=0)\n',
        "tests/test_resume.py -k lock",
    ),
    "other settings are refused": (
        '    if lines:\n        problem = "belongs to a run with other settings',
        '    if False:\n        problem = "belongs to a run with other settings',
        "tests/test_resume.py -k change_the_result_are_refused",
    ),
    "dead workers are replaced": (
        "if isinstance(error, RuntimeError) and not str(error).startswith(DEAD_WORKER",
        "if True or str(error).startswith(DEAD_WORKER",
        "tests/test_resume.py -k loader_worker",
    ),
    "saved before validation": (
        "    save_state(job, state)  # before evaluation, which can be interrupted too\n",
        "    check_finite(state, job.run.path)\n",
        "tests/test_resume.py -k without_save_minutes",
    ),
    "figures of the epoch so far": (
        '    state.tally = Tally(payload["tally"])\n',
        "",
        "tests/test_resume.py -k 'ends_as_if and steps'",
    ),
    "position in the epoch": (
        "            if number >= self.first_batch:\n",
        "            if True:\n",
        "tests/test_resume.py -k 'ends_as_if and steps'",
    ),
    "records of epochs that are done again": (
        "        run.forget_epochs_after(state.epoch)\n",
        "",
        "tests/test_resume.py -k 'ends_as_if and validation'",
    ),
    "best checkpoint after a rewind": (
        "    if not state.best:  # the first epoch will write the file\n        return {}\n",
        "    if True:\n        return state.best\n",
        "tests/test_run.py tests/test_resume.py -k 'older_checkpoint or damaged_best'",
    ),
    "dead terminal": (
        "    except OSError:\n        with contextlib.suppress(OSError):  # else the text",
        "    except ZeroDivisionError:\n        with contextlib.suppress(OSError):  # else the text",
        "tests/test_resume.py -k nobody_reads",
    ),
    "checkpoint_interrupt.pth": (
        "            copy_checkpoint(folder / LAST_NAME, folder / INTERRUPT_NAME)\n",
        "            pass\n",
        "tests/test_resume.py -k 'ends_as_if and steps'",
    ),
    "an interrupted scan is kept": (
        "    except Interrupted:\n        memory.save_early()\n",
        "    except Interrupted:\n",
        "tests/test_resume.py -k interrupted_scan",
    ),
    "no other file is taken for the squares": (
        "if not np.array_equal(stat_files(Path(), [path]), stamp):",
        "if False:",
        "tests/test_store.py -k another_process",
    ),
    "a full disk gets its room back": (
        "                    self.file.truncate(0)\n",
        "                    pass\n",
        "tests/test_store.py -k fills_up",
    ),
    "values of the memory have a checksum": (
        "if isinstance(value, bytes) and zlib.crc32(value) == checksum",
        "if True",
        "tests/test_store.py -k flipped",
    ),
    "a picture at the threshold passes in another batch too": (
        "max(last - SCORE_ROUNDING[dtype], (last + below) / 2)",
        "last",
        "tests/test_metrics.py -k precision_threshold",
    ),
    "squares are those of their records": (
        "store is not None and store.records is records",
        "store is not None",
        "tests/test_store.py -k 'others or fine_tuned'",
    ),
    "pipes do not hang": (
        "if not stat.S_ISREG(status.st_mode):",
        "if False:",
        "tests/test_hostile.py -k becomes_a_pipe",
    ),
    "five decoders": (", formats=IMAGE_FORMATS) as image", ") as image", "tests/test_hostile.py -k five_decoders"),
    "bombs": (
        "            if image.width * image.height > MAX_PIXELS:\n",
        "            if False:\n",
        "tests/test_hostile.py tests/test_scan.py -k 'bomb or pixel'",
    ),
    "conversion in strips": (
        "STRIP_PIXELS = 4_000_000",
        "STRIP_PIXELS = 4_000_000_000",
        "tests/test_hostile.py -k 1500",
    ),
    "escapes in messages": (
        '"\\n".join(printable(line, MAX_ERROR_LINE) for line in text.split("\\n")) for text',
        "text for text",
        "tests/test_hostile.py -k escaped",
    ),
    "a tracker is given 5 s": (
        "self._tracker.wait(CLOSE_SECONDS)",
        "self._tracker.wait(60)",
        "tests/tools/test_track.py -k hangs",
    ),
}


def is_missed(name: str, folder: Path) -> bool | None:
    """Say whether the tests fail without a guard; None when its text does not occur once."""
    old, new, tests = GUARDS[name]
    source = (REPO / "lct_dino3.py").read_text(encoding="utf-8")
    if source.count(old) != 1:
        return None
    repo = folder / "repo"
    shutil.copytree(REPO, repo, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs"))
    (repo / "lct_dino3.py").write_text(source.replace(old, new), encoding="utf-8")
    command = f"{sys.executable} -m pytest -n 0 -x -q --no-header -p no:cacheprovider {tests}"
    try:
        done = subprocess.run(command, shell=True, cwd=repo, capture_output=True, timeout=240)
        code = done.returncode
    except subprocess.TimeoutExpired:  # what the guard kept from waiting for ever
        code = 1
    shutil.rmtree(repo)
    return code == 1  # 5 would mean that there is no such test


def main() -> int:
    """Try all guards, or those named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="GUARD", help="of: " + "; ".join(GUARDS).replace("%", "%%"))
    names = parser.parse_args().names or list(GUARDS)
    if strange := [name for name in names if name not in GUARDS]:
        parser.error(f"there is no guard {strange[0]}")
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = is_missed(name, Path(folder))
        said = {True: "missed", False: "NOT MISSED", None: "NOT FOUND IN THE SCRIPT"}[found[name]]
        print(f"{said:<12}{name}", flush=True)
    print(
        f"{sum(value is True for value in found.values())} of {len(names)} guards are missed by a test when they are gone"
    )
    return int(not all(found.values()))


if __name__ == "__main__":
    sys.exit(main())
