"""What `keep_freed_memory` and OMP_WAIT_POLICY=PASSIVE give on a CPU: images/s of a small frozen backbone.

    python tests/benchmarks/cpu.py [rounds]

Each figure is a process of its own; the variants take turns, so that a machine whose speed drifts treats them alike. The second
block keeps one core busy with something else, as loader workers do.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "plain": {"OMP_WAIT_POLICY": "ACTIVE", "BENCHMARK_KEEP": ""},
    "passive waiting": {"OMP_WAIT_POLICY": "PASSIVE", "BENCHMARK_KEEP": ""},
    "freed memory kept": {"OMP_WAIT_POLICY": "ACTIVE", "BENCHMARK_KEEP": "1"},
    "both (ours)": {"OMP_WAIT_POLICY": "PASSIVE", "BENCHMARK_KEEP": "1"},
}


def measure_forward() -> float:
    """Return images/s of mobilenetv2_035 at 160 px in batches of 64."""
    sys.path.insert(0, str(ROOT))
    import timm
    import torch

    import lct_dino3 as lct

    if os.environ["BENCHMARK_KEEP"]:
        lct.keep_freed_memory()
    model = timm.create_model("mobilenetv2_035", num_classes=0).eval().to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, 160, 160).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(images)
        started = time.perf_counter()
        for _ in range(8):
            model(images)
    return 8 * 64 / (time.perf_counter() - started)


def compare(title: str, rounds: int) -> None:
    """Print the median of each variant and its ratio to the plain one."""
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, settings in VARIANTS.items():
            command = [sys.executable, __file__, "--measure"]
            done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
            found[name].append(float(done.stdout))
    print(title)
    plain = statistics.median(found["plain"])
    for name, rates in found.items():
        rate = statistics.median(rates)
        print(f"  {name:<20}{rate:8.0f} images/s{rate / plain:7.2f} x   ({min(rates):.0f} to {max(rates):.0f})")


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        print(measure_forward())
        sys.exit()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    compare("an idle machine", rounds)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        compare("one core busy", rounds)
        busy.kill()
