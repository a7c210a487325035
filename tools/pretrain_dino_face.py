"""Pre-train a ViT on unlabelled crops of faces, or of anything else, with DINO or iBOT."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_utils import PretrainOptions, lct, pretrain


@dataclass(frozen=True)
class FaceOptions(PretrainOptions):
    """Pre-train a ViT on unlabelled crops of faces, or of anything else, with DINO or iBOT."""


def main(argv: list[str] | None = None) -> int:
    """Pre-train as the command line says, and return the exit code."""
    return lct.run_program("pretrain_dino_face", FaceOptions, pretrain, argv)


if __name__ == "__main__":
    lct.exit_process(main())
