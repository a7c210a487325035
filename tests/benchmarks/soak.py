"""Kill a small run at many random calls, start it again until it ends, and count the endings identical to a run left alone.

    python tests/benchmarks/soak.py --number 200 --seed 0

The calls are drawn evenly over the functions of killing.TARGETS, among them every step of a save (open, write, fsync, rename, fsync
of the folder) and of a log line; of each, one of all its calls in a whole run. A quarter is killed twice, a third reads with two
workers. Signals: SIGKILL half the time, else SIGTERM, SIGINT or SIGHUP. Prints one line a run, and the count; exit code 1 if one
differs.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import make_dataset
from killing import Nursery, differences, kill

SETTINGS = (
    "--model_id test_resnet --no-pretrained --no-freeze_backbone --img_size 32 --batch 8 --gpus 0 --emb_dim 16"
    " --epochs 3 --save_every 2"
).split()
EXPECTED = {-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT}
OF_WORKERS = ("decode_image", "SquareStore.get", "open")  # with workers these are called there


def draw_plan(rng: random.Random, calls: dict[str, int], workers: int) -> dict:
    """Draw a function, one of its calls, a signal, and whether it comes before or after that call."""
    names = [name for name in sorted(calls) if not (workers and name in OF_WORKERS)]
    at = rng.choice(names)
    number = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    return kill(at, rng.randint(1, calls[at]), number, when=rng.choice(["before", "after"]))


def soak(rng: random.Random, folder: Path, number: int) -> int:
    """Do `number` runs; return how many did not end like the one left alone."""
    data = make_dataset(folder / "data", {"молоток": 14, "side cutter": 11, "wrench": 17})
    nursery = Nursery(folder)
    common = ("--data_root", data, *SETTINGS)
    code, text = nursery.run(
        *common, "--save_minutes", 1e-6, "--workers", 0, "--out_dir", folder / "whole", count=str(folder / "n")
    )
    if code:
        raise RuntimeError(text)
    calls, kinds, wrong = json.loads((folder / "n").read_text()), collections.Counter(), 0
    for index in range(number):
        out_dir, workers, minutes = folder / "run", rng.choice([0, 0, 2]), rng.choice([0, 1e-6])
        argv = (*common, "--workers", workers, "--save_minutes", minutes, "--out_dir", out_dir)
        deaths, story = rng.choice([1, 1, 1, 2]), []
        while len(story) < deaths:
            plan = draw_plan(rng, calls, workers)
            code, text = nursery.run(*argv, plans=[plan])
            if code in EXPECTED:
                kinds[plan["at"]] += 1
                story.append(f"{signal.Signals(plan['signal']).name} {plan['when']} {plan['at']} {plan['nth']}")
            elif code:
                raise RuntimeError(f"{plan}: exit code {code}\n{text}")
            elif story:  # what was left had no such call
                break
            else:
                shutil.rmtree(out_dir)
        code, text = nursery.run(*argv)
        different = differences(folder / "whole", out_dir) if code == 0 else [text]
        wrong += bool(different)
        print(
            f"{index + 1:4} {'DIFFERS' if different else 'identical'}  workers {workers}  {', then '.join(story)}",
            *different[:5],
            flush=True,
        )
        shutil.rmtree(out_dir)
    nursery.close()
    print(f"killed {kinds.total()} times in {len(kinds)} functions: {dict(kinds.most_common())}")
    return wrong


def main() -> int:
    """Read the command line, and say how many endings were identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = soak(random.Random(options.seed), Path(folder), options.number)
    print(f"{options.number - wrong} of {options.number} endings identical")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
