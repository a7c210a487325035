"""Pre-train a ViT on unlabelled crops of faces, or of anything else, with DINO or iBOT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct  # before torch: it sets environment variables that torch reads at import

# isort: split
import pretrain_utils


@dataclass(frozen=True)
class FaceOptions(pretrain_utils.PretrainOptions):
    """Pre-train a ViT on unlabelled crops of faces, or of anything else, with DINO or iBOT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return lct.run_program("pretrain_dino_face", FaceOptions, pretrain_utils.pretrain, argv)


if __name__ == "__main__":
    lct.exit_process(main())
