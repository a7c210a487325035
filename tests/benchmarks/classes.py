"""Memory and time of a gallery of many classes: built, calibrated on val, measured on test, from drawn embeddings.

    python tests/benchmarks/classes.py [classes]

Five references a class of 128 dimensions (100,000 classes unless said), 1,000 images of val and as many of test, each about as far
from its class as a second picture of one object. Prints seconds and the peak of the process, libraries included.
"""

import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lct_dino3 as lct

PER_CLASS, NUM_JUDGED, DIMENSIONS = 5, 1_000, 128


def draw(centres: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> lct.Embedded:
    """Draw an embedding near the centre of each label, unit norm."""
    values = centres[labels] + 0.05 * rng.standard_normal((len(labels), DIMENSIONS), np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return lct.Embedded(np.arange(len(labels)), np.zeros(len(labels), np.uint8), labels, values)


def main() -> None:
    """Build and measure one gallery, and print what it took."""
    num_classes = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((num_classes, DIMENSIONS), np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    references = draw(centres, np.repeat(np.arange(num_classes), PER_CLASS), rng)
    val, test = (draw(centres, rng.integers(0, num_classes, NUM_JUDGED), rng) for _ in range(2))
    del centres
    paths = [f"{row}.jpg" for row in range(len(references.labels))]
    records = SimpleNamespace(class_names=tuple(map(str, range(num_classes))), paths=paths)
    started = time.perf_counter()
    gallery = lct.build_gallery(records, references, val, lct.Config())
    gallery = lct.calibrate(gallery, val, lct.Config(), None, {}, torch.float32)
    built = time.perf_counter()
    lct.measure_gallery(gallery, test, test.rows)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    print(f"{num_classes:,} classes, {len(references.labels):,} references: built in {built - started:.0f} s,", end=" ")
    print(f"measured in {ended - built:.0f} s, peak {peak:.1f} GB")


if __name__ == "__main__":
    main()
