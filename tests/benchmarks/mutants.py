"""Put single faults of the kind that a rewrite makes into a copy of the repository, and see that a test notices.

    python tests/benchmarks/mutants.py [--only NAME ...]

A fault is a file, a piece of text that occurs once in it, what stands in its place, and the tests that must fail then, and must
pass without it. Prints a line a fault, and the count; exit code 1 if one is not noticed, or if its text is not there any more.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
SCRIPT = "lct_dino3.py"


class Fault(NamedTuple):
    """One wrong line."""

    old: str
    new: str
    tests: str  # of tests/, as pytest takes them
    path: str = SCRIPT


FAULTS = {
    # What feeds a figure
    "whole match of --group_regex": Fault(
        "match and match.group(1)", "match and match.group(0)", "test_figures.py -k captures"
    ),
    "verdict against val": Fault(
        'best_baseline(baseline["val"]), features["test"]\n',
        'best_baseline(baseline["val"]), features["val"]\n',
        "test_figures.py -k compared_with",
    ),
    "baseline chosen on test": Fault(
        'best_baseline(baseline["val"]), features',
        'best_baseline(baseline["test"]), features',
        "test_unseen.py -k best_on_val",
    ),
    "val matched against itself": Fault(
        'references = embed(model, features["train"])',
        'references = embed(model, features["val"])',
        "test_figures.py -k each_epoch",
    ),
    "a head that has seen the unseen classes": Fault(
        "    train = train.take(np.isin(train.labels, seen))\n    labels = torch.from_numpy(np.searchsorted(seen, train.labels))",
        "    labels = torch.from_numpy(np.searchsorted(seen, train.labels).clip(max=len(seen) - 1))",
        "test_unseen.py -k sees_nothing",
    ),
    "the other strangers fit": Fault(
        '{"unknown": unknown["val"]}', '{"unknown": unknown["test"]}', "test_figures.py -k thresholds"
    ),
    "the other strangers measure": Fault('unknown.get("test")', 'unknown.get("val")', "test_figures.py -k not_tuned"),
    "evaluate measures the other strangers": Fault(
        'unknown_half.rows("test")', 'unknown_half.rows("val")', "test_figures.py -k evaluate"
    ),
    "strangers count as right": Fault(
        "np.append(self.is_right, np.zeros(len(strangers), bool))",
        "np.append(self.is_right, np.ones(len(strangers), bool))",
        "test_figures.py -k thresholds",
    ),
    "a head's own strangers": Fault(
        "answers = Answers(head.scores[is_val], head.is_right[is_val], other_strangers, share)",
        "answers = Answers(head.scores[is_val], head.is_right[is_val], strangers[0], share)",
        "test_unseen.py -k strangers_of_the_others",
    ),
    "strangers in the temperature": Fault(
        "fit_temperature(gallery.scores(val.values[few]), val.labels[few])",
        "fit_temperature(gallery.scores(val.values), gallery.answer(val.values)[0])",
        "test_figures.py -k temperature",
    ),
    "thresholds of the true class": Fault(
        "above(gallery.thresholds[answers])", "above(gallery.thresholds[test.labels])", "test_figures.py -k not_tuned"
    ),
    "by view over other crops": Fault(
        "val.take(has_mask & (val.views == view))", "val.take(val.views == view)", "test_figures.py -k val_by_view"
    ),
    "logistic regression as it is": Fault(
        "make_pipeline(StandardScaler(), LogisticRegression(",
        "make_pipeline(LogisticRegression(",
        "test_figures.py -k compared_with",
    ),
    "class vectors not normalised": Fault(
        "F.linear(embeddings, normalize_heads(self.weight, self.num_heads))",
        "F.linear(embeddings, self.weight)",
        "test_figures.py -k each_epoch",
    ),
    # Which weights
    "--best_metric loss, the wrong sign": Fault(
        '"value": sign * value', '"value": value', "test_figures.py -k best_metric"
    ),
    "the last epoch is exported": Fault(
        "deployed_weights(load_checkpoint(run.path / BEST_NAME))",
        "deployed_weights(load_checkpoint(run.path / LAST_NAME))",
        "test_figures.py -k references_are",
    ),
    "val judges the live weights": Fault(
        "with state.average.applied() if state.average else contextlib.nullcontext():",
        "if True:",
        "test_figures.py -k each_epoch",
    ),
    "no warm-up of the EMA": Fault(
        "min(self._decay, (1 + step) / (10 + step))", "self._decay", "test_figures.py -k forgets_faster"
    ),
    "the best checkpoint of another position": Fault(
        "and progress_of(payload) == (state.best", "or () == (state.best", "test_figures.py -k found_again"
    ),
    "the head's seed": Fault("    seed_torch(config.seed, 1)\n", "", "test_wiring.py -k the_head"),
    "bound of the linear head": Fault(
        "math.sqrt(self.num_heads / config.emb_dim)", "math.sqrt(1 / config.emb_dim)", "test_wiring.py -k the_head"
    ),
    # Steps
    "the same mixing at every step": Fault(
        "draw_mixing(config, (state.epoch, state.batches",
        "draw_mixing(config, (0, 0 * state.batches",
        "test_wiring.py -k each_step",
    ),
    "the same mixing in every epoch": Fault(
        "draw_mixing(config, (state.epoch, state.batches",
        "draw_mixing(config, (0, state.batches",
        "test_wiring.py -k each_step",
    ),
    "the same dropout at every step": Fault(
        "seed_torch(config.seed, 5, state.step", "seed_torch(config.seed, 5, 0", "test_wiring.py -k each_step"
    ),
    "floor of the steps": Fault(
        "math.ceil(feed.num_batches / job.config.accumulate_grad_batches)",
        "max(1, feed.num_batches // job.config.accumulate_grad_batches)",
        "test_figures.py -k learning_rate",
    ),
    # Intervals and errors
    "two views are two images": Fault(
        "unique, inverse = np.unique(groups, return_inverse=True)\n    positions",
        "unique, inverse = np.unique(np.arange(len(groups)), return_inverse=True)\n    positions",
        "test_figures.py -k two_views",
    ),
    "an interval of 90 %": Fault("(0.025, 0.975)", "(0.05, 0.95)", "test_figures.py -k intervals"),
    "no bin for certainty": Fault(
        "np.minimum((probability * num_bins).astype(int), num_bins - 1)",
        "(probability * num_bins).astype(int) % num_bins",
        "test_metrics.py -k calibration_error",
    ),
    # Data, masks, galleries
    "masks at the wrong crops": Fault(
        "masks=np.array(masks, dtype=STRINGS),\n        digests=np.append",
        'masks=np.array([*records.masks, *[""] * len(rows)][: len(rows)], dtype=STRINGS),\n        digests=np.append',
        "test_figures.py -k masks_stay",
    ),
    "a new class takes every stranger": Fault(
        'thresholds[label] = measured["threshold"]', "thresholds[label] = 0.0", "test_figures.py -k enrolled_class"
    ),
    "singles ignore what groups fill": Fault(
        "np.maximum(targets[label] - assigned[label], 0)", "targets[label]", "test_wiring.py -k single_images"
    ),
    "the border of a moved mask is object": Fault(
        "borderValue=(PADDING_GRAY,) * 3 + (0,)",
        "borderValue=(PADDING_GRAY,) * 3 + (255,)",
        "test_wiring.py -k outside",
    ),
    "EXIF of masks": Fault(
        "        upright = ImageOps.exif_transpose(image)\n        has_alpha",
        "        upright = image\n        has_alpha",
        "test_wiring.py -k exif",
    ),
    "order of the review page": Fault(
        "return min(distance, prelabel.margin) if prelabel.is_known else distance",
        "return min(distance, prelabel.margin)",
        "test_figures.py -k review",
        "tools/answers.py",
    ),
}


def run_tests(repo: Path, *words: str) -> int:
    """Return the exit code of pytest; what waits for ever has failed."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *words]
    try:
        return subprocess.run(command, cwd=repo, capture_output=True, timeout=600).returncode
    except subprocess.TimeoutExpired:
        return 1


def try_fault(fault: Fault) -> str:
    """Return in words whether the tests notice a fault."""
    source = (REPO / fault.path).read_text(encoding="utf-8") if (REPO / fault.path).is_file() else ""
    if source.count(fault.old) != 1:
        return "NO LONGER APPLIES"
    with tempfile.TemporaryDirectory() as folder:
        repo = Path(folder) / "repo"
        shutil.copytree(REPO, repo, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs", "demo"))
        (repo / fault.path).write_text(source.replace(fault.old, fault.new), encoding="utf-8")
        file, _, keyword = fault.tests.split()
        code = run_tests(repo, f"tests/{file}", "-k", keyword)
    return {0: "NOT NOTICED", 1: "noticed"}.get(code, "NO SUCH TEST")


def find_failing_files(faults: list[Fault]) -> list[str]:
    """Return the files in which a test that some fault names fails as it is."""
    keywords: dict[str, set[str]] = {}
    for fault in faults:
        file, _, keyword = fault.tests.split()
        keywords.setdefault(file, set()).add(keyword)
    return [file for file, own in keywords.items() if run_tests(REPO, f"tests/{file}", "-k", " or ".join(sorted(own)))]


def main() -> int:
    """Try all faults, or those named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = "of: " + "; ".join(FAULTS).replace("%", "%%")
    parser.add_argument("--only", nargs="+", default=list(FAULTS), metavar="NAME", help=names)
    chosen = parser.parse_args().only
    if strange := [name for name in chosen if name not in FAULTS]:
        parser.error(f"there is no fault {strange[0]}")
    if failing := find_failing_files([FAULTS[name] for name in chosen]):
        parser.error(f"without any fault, tests fail in {', '.join(failing)}")
    outcomes = []
    for name in chosen:
        outcomes.append(try_fault(FAULTS[name]))
        print(f"{outcomes[-1]:<18}{name}", flush=True)
    print(f"{outcomes.count('noticed')} of {len(chosen)} faults are noticed")
    return int(outcomes.count("noticed") < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
