#!/usr/bin/env python3
"""Draw a data set of eleven hand tools, train on it, and pre-label a photo of a workbench: the whole job, without any data.

    python lct_dino3.py demo                       the same as: python tools/demo.py
    python lct_dino3.py demo --epochs 5 --gpus 0   flags of training are passed on

Everything is drawn with exact masks, and a few files are odd or broken on purpose, as in every real folder. The same command
continues an interrupted demo. Knows the script only as a command that it starts, and reads the COCO labels that this writes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drawn_scenes import draw_dataset, draw_strangers, draw_workbench, encode_jpeg
from drawn_tools import CLASS_NAMES
from PIL import Image, ImageDraw, ImageFont

SCRIPT = Path(__file__).resolve().parents[1] / "lct_dino3.py"
IMAGES_PER_STRANGER = 40
# A small ResNet learns the drawn tools from scratch in a minute; with the margin of 0.30 it would need several. A scale of 30 is
# content with eleven classes too early: things of no class then look more like tools. The crops have 1 to 6 % of bench around them.
# Val alone is too easy to tell how near a stranger may come: things of other kinds than the one on the photo set the thresholds.
TRAIN_FLAGS = {
    "--group_regex": r"^(shot\d+)_",
    "--target_precision": "0.92",
    "--model_id": "test_resnet",
    "--no-pretrained": None,
    "--no-freeze_backbone": None,
    "--img_size": "64",
    "--arc_scale": "12",
    "--arc_margin": "0.1",
    "--lr": "0.01",
    "--arc_lr": "0.01",
    "--batch": "32",
    "--epochs": "18",
    "--save_every": "0",
}
FONT_NAMES = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "Arial.ttf")
OUTLINE = 3  # px of a box that is drawn, in an image of 1,000 px

# The answers on the photo.

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in px


def draw_prelabels(image: Image.Image, objects: Sequence[tuple[Sequence[float], int, str]]) -> Image.Image:
    """Return a copy of an image with boxes in the colours of their classes, and words on them.

    Args:
        image: any mode.
        objects: (box, label, words); the box is x, y, width, height in px, label -1 is `unknown`: black on white.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    scale = max(drawn.size) / 1000
    line = max(1, round(OUTLINE * scale))
    font = load_font(max(11, round(18 * scale)))
    frames = [(x - line, y - line, x + w - 1 + line, y + h - 1 + line) for (x, y, w, h), _, _ in objects]
    tags: list[Rectangle] = []
    for (_, label, words), frame in zip(objects, frames, strict=True):
        # White text can be read on these colours; classes that follow each other are far apart on the circle.
        ink = f"hsl({label * 137.508 % 360:.0f}, 75%, {(30, 36)[label % 2]}%)" if label >= 0 else "black"
        draw.rectangle(frame, outline=ink, width=line)  # around the box: what is in it stays visible
        left, top, right, bottom = draw.textbbox((0, 0), words, font=font)
        size = (right - left + 4 * line, bottom - top + 4 * line)
        tag = _place_tag(size, frame, drawn.size, [*tags, *(other for other in frames if other != frame)])
        tags.append(tag)
        draw.rectangle(tag, fill=ink if label >= 0 else "white", outline=ink, width=line)
        draw.text((tag[0] + 2 * line - left, tag[1] + 2 * line - top), words, "white" if label >= 0 else ink, font)
    return drawn


def _place_tag(
    size: tuple[float, float], frame: Rectangle, canvas: tuple[int, int], taken: list[Rectangle]
) -> Rectangle:
    """Return where the words on a box go: on its top edge, else below it, else inside, where they hide least of other objects."""
    width, height = size
    left, top, right, bottom = frame
    places = []
    for y in (top - height, bottom, top):
        for x in (left, right - width):
            inside_x = min(max(0.0, x), max(0.0, canvas[0] - width))
            inside_y = min(max(0.0, y), max(0.0, canvas[1] - height))
            places.append((inside_x, inside_y, inside_x + width, inside_y + height))

    def hidden_area(tag: Rectangle) -> float:
        overlaps = (
            (min(tag[2], other[2]) - max(tag[0], other[0]), min(tag[3], other[3]) - max(tag[1], other[1]))
            for other in taken
        )
        return sum(max(0.0, w) * max(0.0, h) for w, h in overlaps)

    return min(places, key=hidden_area)


def load_font(size: int) -> Any:
    """Return a font of the system; else the one that Pillow brings."""
    for name in FONT_NAMES:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def show_workbench(images: Path, out: Path) -> str:
    """Draw the labels that were written for the photo into workbench.jpg, and return how many of them are right."""
    labels = json.loads((out / "coco" / "annotations" / "instances_default.json").read_text(encoding="utf-8"))
    truth = json.loads((images / "truth.json").read_text(encoding="utf-8"))
    name_of = {category["id"]: category["name"] for category in labels["categories"]}  # the last one is `unknown`
    answers = {}
    objects = []
    for item in labels["annotations"]:
        name = name_of[item["category_id"]]
        is_known = item["category_id"] < len(name_of)
        answers[str(item["attributes"]["detection_id"])] = name
        words = f"{name} {item['score']:.2f}" if is_known else name
        objects.append((item["bbox"], item["category_id"] - 1 if is_known else -1, words))
    with Image.open(images / labels["images"][0]["file_name"]) as photo:
        picture = encode_jpeg(draw_prelabels(photo, objects))
    temporary = out / f".workbench.jpg.{os.getpid()}.tmp"  # the next pre-labelling removes it, should this be killed
    temporary.write_bytes(picture)
    temporary.replace(out / "workbench.jpg")
    return describe_answers(truth, answers)


def describe_answers(truth: dict[str, str], answers: dict[str, str]) -> str:
    """Return how many tools of the photo are right, which are not, and what the stranger is taken for."""
    tools = {number: name for number, name in truth.items() if name in CLASS_NAMES}
    wrong = [f"the {name} is `{answers[number]}`" for number, name in tools.items() if answers[number] != name]
    strangers = [f"the {name} is `{answers[number]}`" for number, name in truth.items() if name not in CLASS_NAMES]
    return ", ".join([f"{len(tools) - len(wrong)} of {len(tools)} tools right", *wrong, *strangers])


# The whole job.


class Starter:
    """Starts commands of the script; a signal goes on to the one that runs, and ends the demo where none does."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: Any) -> None:
        if self.process is not None:
            self.process.send_signal(number)  # the script takes no second Ctrl-C within half a second for another one
        elif number != signal.SIGUSR1:
            print(f"interrupted ({signal.Signals(number).name}); the same command continues", file=sys.stderr)
            raise SystemExit(128 + (signal.SIGTERM if number == signal.SIGHUP else number))

    def run(self, *words: str) -> None:
        """Run a command to its end.

        Raises:
            SystemExit: with its exit code, where that is not 0; it has said why.
        """
        show(f"the same as: python {SCRIPT.name} {shlex.join(words)}")
        self.process = subprocess.Popen([sys.executable, str(SCRIPT), *words])
        code = self.process.wait()
        self.process = None
        if code:
            raise SystemExit(code if code > 0 else 128 - code)


def show(text: str) -> None:
    """Print lines at once: the commands that are started print too."""
    print(text, flush=True)


def draw_once(folder: Path, content: str, draw: Callable[[Path], None]) -> None:
    """Draw the content of a folder unless the folder is there. It gets its name when all is drawn."""
    if folder.exists():
        return
    show(f"drawing {content} into {folder}")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    draw(unfinished)
    unfinished.rename(folder)


def parse_command_line(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the demo, and the words that are for training."""
    parser = argparse.ArgumentParser(
        prog=f"python {SCRIPT.name} demo",
        description="Draw a data set of eleven hand tools, train on it, and pre-label a photo of a workbench.",
        epilog="All other flags are passed on to training.",
        allow_abbrev=False,
    )
    folders = {
        "data_root": ("demo/data", "the drawn crops"),
        "unknown_dir": ("demo/unknown", "drawn things of no class"),
        "out_dir": ("demo/run", "the run"),
        "images": ("demo/workbench", "the drawn photo"),
        "out": ("demo/prelabels", "its pre-labels"),
    }
    for name, (default, content) in folders.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default), metavar="DIR", help=f"{content} [{default}]")
    parser.add_argument("--images_per_class", type=int, default=150, metavar="N", help="crops to draw [150]")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of drawing and training [42]")
    parser.add_argument("--box_pad", default="0.04", metavar="X", help="as of prelabel [0.04]")
    parser.add_argument("--gpus", metavar="N", help="as of training and prelabel")
    parser.add_argument("--workers", metavar="N", help="as of training and prelabel")
    options, train_words = parser.parse_known_args(argv)
    if options.seed < 0 or options.images_per_class < 1:
        parser.error("--seed cannot be negative, and --images_per_class is 1 at least")
    return options, train_words


def to_words(flags: dict[str, Any]) -> list[str]:
    """Return flags and their values as the words of a command line; a flag that is None has no value."""
    return [word for name, value in flags.items() for word in (name, *(() if value is None else (str(value),)))]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is not there yet, train on it or continue, and pre-label the photo.

    Raises:
        SystemExit: with the exit code of the command that failed.
    """
    options, typed = parse_command_line(argv)
    starter = Starter()
    seed = options.seed
    draw_once(options.data_root, "eleven hand tools", lambda f: draw_dataset(f, options.images_per_class, seed))
    draw_once(options.unknown_dir, "things of no class", lambda f: draw_strangers(f, IMAGES_PER_STRANGER, seed))
    draw_once(options.images, "a photo of a workbench", lambda f: draw_workbench(f, seed))
    folders = ("data_root", "out_dir", "unknown_dir")
    given = {f"--{name}": str(getattr(options, name)) for name in (*folders, "seed")} | TRAIN_FLAGS
    machine = {
        f"--{name}": getattr(options, name) for name in ("gpus", "workers") if getattr(options, name) is not None
    }
    typed_names = {word.split("=")[0] for word in typed}
    starter.run(*to_words({k: v for k, v in given.items() if k not in typed_names} | machine), *typed)
    detections = str(options.images / "detections.json")
    places = {"--run": options.out_dir, "--images": options.images, "--detections": detections, "--out": options.out}
    starter.run("prelabel", *to_words(places | {"--box_pad": options.box_pad} | machine))
    show(f"{show_workbench(options.images, options.out)}\ndrawn: {options.out / 'workbench.jpg'}")


if __name__ == "__main__":
    main()
