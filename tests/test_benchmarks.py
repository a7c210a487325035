"""tests/benchmarks/run.py: the table is printed. Times are not asserted, machines differ."""

import subprocess
import sys

from conftest import REPO

RUNNER = str(REPO / "tests/benchmarks/run.py")


def test_a_row_is_measured_in_forks_and_printed() -> None:
    command = [sys.executable, RUNNER, "--quick", "batch, bytes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    head, line = done.stdout.splitlines()
    assert head.split() == ["what", "reference", "ours", "ratio", "target"]
    assert line.startswith("batch, bytes") and "38.54 MB" in line and "4.00 x" in line and line.endswith("pass")


def test_a_row_that_is_not_there_is_refused_with_those_that_are() -> None:
    done = subprocess.run([sys.executable, RUNNER, "no such row"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "train item" in done.stderr
