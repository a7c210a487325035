"""tests/benchmarks: run.py prints its table, gpu.py can fail, faults can be put in. Times are not asserted, machines differ."""

import importlib
import re
import runpy
import sys
from types import ModuleType

import pytest
from conftest import REPO
from killing import Nursery

RUNNER = str(REPO / "tests/benchmarks/run.py")


def print_table(*words: str) -> int:
    """Be run.py with these words."""
    sys.argv = [RUNNER, *words]
    return runpy.run_path(RUNNER)["main"]()


def test_a_row_is_measured_in_forks_and_printed(nursery: Nursery) -> None:
    code, text = nursery.run("--quick", "1M records", function=("test_benchmarks", "print_table"))
    assert code == 0, text
    _, head, line = text.splitlines()
    assert head.split() == ["what", "usual", "script", "strongest", "ours", "usual", "strongest", "target"]
    assert line.startswith("1M records") and line.count(" MB") == 4 and line.count(" x") == 2 and line.endswith("pass")


def test_a_row_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", [RUNNER, "no such row"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(RUNNER)["main"]()
    assert "train item" in capsys.readouterr().err


def test_the_text_that_each_fault_replaces_is_there_once() -> None:
    """Else mutants.py and guards.py, which take an hour and are run by hand, test less than they say."""
    faults = runpy.run_path(str(REPO / "tests/benchmarks/mutants.py"))["FAULTS"]
    guards = runpy.run_path(str(REPO / "tests/benchmarks/guards.py"))["GUARDS"]
    texts = {name: (fault.path, fault.old) for name, fault in faults.items()}
    texts |= {name: ("lct_dino3.py", old) for name, (old, _, _) in guards.items()}
    sources = {path: (REPO / path).read_text(encoding="utf-8") for path, _ in texts.values()}
    assert [name for name, (path, old) in texts.items() if sources[path].count(old) != 1] == []


def test_the_tests_that_each_fault_must_fail_are_there() -> None:
    """Else pytest selects none, which mutants.py and guards.py take for a fault that nothing notices."""
    faults = runpy.run_path(str(REPO / "tests/benchmarks/mutants.py"))["FAULTS"]
    guards = runpy.run_path(str(REPO / "tests/benchmarks/guards.py"))["GUARDS"]
    for selector in [fault.tests for fault in faults.values()] + [tests for _, _, tests in guards.values()]:
        paths = [name.removeprefix("tests/") for name in re.findall(r"\S+\.py", selector)]
        text = "".join((REPO / "tests" / path).read_text(encoding="utf-8") for path in paths)
        words = set(re.findall(r"\w+", selector.partition(" -k ")[2])) - {"and", "or"}
        assert words and [word for word in words if word not in text] == [], selector


def test_the_rows_of_whole_epochs_have_a_job_as_training_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO / "tests/benchmarks")
    epochs = importlib.import_module("epochs")
    job, state = epochs.make_job("fp32")
    assert len(job.records.rows("train")) == 64 and state.step == 0
    assert job.store.get(int(job.records.rows("train")[0]), False).shape == (
        job.config.img_size,
        job.config.img_size,
        3,
    )


def test_a_check_of_a_gpu_that_fails_costs_its_line_and_the_exit_code(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: object) -> tuple[str, str]:
        raise ValueError("the device\nis on fire")

    def wrong(bench: object) -> tuple[str, str]:
        return gpu.judge(False), "2 is not 1"

    def sound(bench: object) -> tuple[str, str]:
        return gpu.judge(True), "1 is 1"

    monkeypatch.setattr(gpu, "MEASURED", [broken, sound])
    monkeypatch.setattr(gpu, "COMPARED", [wrong])
    assert [gpu.main(["--dry", *words]) for words in ([], ["broken"], ["wrong"], ["sound"])] == [1, 1, 1, 0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "FAIL broken: ValueError: the device is on fire (0 s)",
        "dry  sound: 1 is 1 (0 s)",
        "FAIL wrong: 2 is not 1 (0 s)",
    ]
    assert lines[4].startswith("2 FAIL, 1 dry, in ") and "logs in" in lines[4]
    assert len(lines) == 5 + 3 * 3
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "no such check"])
