"""The tests' own tools can fail."""

from __future__ import annotations

from pathlib import Path

pytest_plugins = ("pytester",)

TESTS = """
import numpy as np
import lct_dino3 as lct


def test_read(patch_used):
    patch_used(lct, "RETRIEVAL_CHUNK", 100)
    lct.reduce_scores(lambda own: own, np.zeros((3, 2)), lambda scores, _: (scores,))


def test_called(patch_used):
    calls = patch_used(lct, "log_softmax").calls
    lct.classify(lambda own: own, np.zeros((3, 2)), np.zeros(3, int), ("a", "b"))
    assert len(calls) == 1


def test_not_read(patch_used):
    patch_used(lct, "RETRIEVAL_CHUNK", 100)
    lct.log_softmax(np.zeros((3, 2)))


def test_not_called(patch_used):
    patch_used(lct, "log_softmax", lambda logits: logits)


def test_not_there(patch_used):
    patch_used(lct, "gone", 3)
"""


def test_a_patch_that_nothing_uses_fails(pytester) -> None:
    pytester.makeconftest(
        (Path(__file__).parent / "conftest.py")
        .read_text(encoding="utf-8")
        .replace("Path(__file__).resolve().parents[1]", f"Path({str(Path(__file__).resolve().parents[1])!r})")
    )
    pytester.makepyfile(TESTS)
    pytester.runpytest("-n", "0").assert_outcomes(passed=4, errors=2, failed=1)
