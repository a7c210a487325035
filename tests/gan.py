"""A program that uses the script without a data set of crops: a small GAN, which has two optimizers. See test_kit.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct

# isort: split
import torch
from torch import nn

FORM = {"epoch": int, "batches": int, "generator": dict, "critic": dict, "optimizers": [dict]}


@dataclass(frozen=True)
class GanOptions(lct.Options):
    """Learn a distribution on a circle."""

    config: Path | None = lct.option(None, "options", "data", metavar="FILE", once=True)
    out_dir: Path | None = lct.option(None, "where it is written", "data", metavar="DIR", needed=True)
    epochs: int = lct.option(4, "passes", "training", low=1, key="training.epochs")
    lr: float = lct.option(1e-3, "learning rate", "training", low=0.0, high=1.0)
    resume: str | None = lct.option(None, "go on", "run", metavar="PATH", nargs="?", const="last", once=True)
    overwrite: bool = lct.option(False, "start afresh", "run", once=True)
    seed: int = lct.same_option("seed")
    gpus: int | None = lct.same_option("gpus")


def train(options: GanOptions) -> None:
    """Train from the last checkpoint on, if there is one."""
    runtime = lct.make_runtime(options.gpus, "fp32")
    point = lct.find_resume_point(options.out_dir, options.resume, options.overwrite, FORM)
    lct.seed_torch(options.seed, 0)
    generator, critic = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizers = [torch.optim.Adam(part.parameters(), lr=options.lr) for part in (generator, critic)]
    first = 0
    with lct.RunDirectory(options.out_dir) as run, lct.keep_interrupted(options.out_dir):
        if point:
            first = point.payload["epoch"]
            generator.load_state_dict(point.payload["generator"])
            critic.load_state_dict(point.payload["critic"])
            for optimizer, state in zip(optimizers, point.payload["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            run.forget_epochs_after(first)
        for epoch in range(first, options.epochs):
            lct.seed_torch(options.seed, 1, epoch)
            for _ in range(20):
                lct.SIGNALS.check()
                real = nn.functional.normalize(torch.randn(16, 2))
                fake = generator(torch.randn(16, 2))
                for optimizer in optimizers[::-1]:  # the critic first
                    learns = optimizer is optimizers[1]
                    loss = critic(fake.detach()).mean() - critic(real).mean() if learns else -critic(fake).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            with lct.SIGNALS.hold():
                run.event("epoch_end", epoch=epoch + 1, loss=loss.item())
                payload = {"generator": generator.state_dict(), "critic": critic.state_dict()}
                payload["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
                lct.write_checkpoint(options.out_dir / lct.LAST_NAME, {"epoch": epoch + 1, "batches": 0, **payload})
        run.log(f"done on {runtime.describe()}")


def main(*argv: str) -> int:
    """Run the program with these arguments; return the exit code."""
    return lct.run_program("gan", GanOptions, train, argv)


if __name__ == "__main__":
    lct.exit_process(main(*sys.argv[1:]))
