#!/usr/bin/env python3
"""Draw a data set of eleven hand tools, train on it, and pre-label a photo of a workbench: the whole workflow, without any data.

    python lct_dino3.py demo                       the same as: python tools/demo.py
    python lct_dino3.py demo --epochs 5 --gpus 0   training flags are passed on

Everything is drawn with exact masks; a few files are odd or broken on purpose, as in every real folder. The same command continues
an interrupted demo. The demo starts the script as a command, without importing it, and reads the COCO labels that it writes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
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

from drawn_scenes import draw_dataset, draw_unknown_objects, draw_workbench, encode_jpeg
from drawn_tools import CLASS_NAMES
from fonts import load_font
from PIL import Image, ImageDraw

SCRIPT = Path(__file__).resolve().parents[1] / "lct_dino3.py"
IMAGES_PER_KIND = 40  # of unknown objects
# A small ResNet learns the drawn tools from scratch in a minute; with a margin of 0.30 it would need several. With eleven classes,
# a scale of 30 saturates too early: unknown objects then look more like tools. Val images do not show how similar an unknown object
# can get, so the images in --unknown_dir set the thresholds; they show other kinds of objects than the one on the photo.
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
OUTLINE = 3  # line width of a drawn box, px in an image of 1,000 px

# Drawing the answers into the photo.

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in px


def show_workbench(images: Path, out: Path) -> str:
    """Draw the pre-labels of the photo into workbench.jpg, and return a sentence on how many are right."""
    labels = json.loads((out / "coco" / "annotations" / "instances_default.json").read_text(encoding="utf-8"))
    truth = json.loads((images / "truth.json").read_text(encoding="utf-8"))
    name_of = {category["id"]: category["name"] for category in labels["categories"]}  # the last one is `unknown`
    answers = {}
    objects = []
    for item in labels["annotations"]:
        name = name_of[item["category_id"]]
        is_known = item["category_id"] < len(name_of)
        answers[str(item["attributes"]["detection_id"])] = name
        text = f"{name} {item['score']:.2f}" if is_known else name
        objects.append((item["bbox"], item["category_id"] - 1 if is_known else -1, text))
    with Image.open(images / labels["images"][0]["file_name"]) as photo:
        picture = encode_jpeg(draw_prelabels(photo, objects))
    temporary = out / f".workbench.jpg.{os.getpid()}.tmp"  # the next prelabel removes it if this process is killed
    temporary.write_bytes(picture)
    temporary.replace(out / "workbench.jpg")
    return describe_answers(truth, answers)


def draw_prelabels(image: Image.Image, objects: Sequence[tuple[Sequence[float], int, str]]) -> Image.Image:
    """Return an RGB copy of an image of any mode, with labelled boxes in the colours of their classes.

    `objects` are (box, label, text): the box is x, y, width, height in px; label -1 is `unknown` and drawn black on white.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    scale = max(drawn.size) / 1000
    line = max(1, round(OUTLINE * scale))  # px
    font = load_font(max(11, round(18 * scale)))
    frames = [(x - line, y - line, x + w - 1 + line, y + h - 1 + line) for (x, y, w, h), _, _ in objects]
    tags: list[Rectangle] = []
    for (_, label, text), frame in zip(objects, frames, strict=True):
        # White text is legible on these colours; consecutive labels are far apart on the colour circle.
        ink = f"hsl({label * 137.508 % 360:.0f}, 75%, {(30, 36)[label % 2]}%)" if label >= 0 else "black"
        draw.rectangle(frame, outline=ink, width=line)  # around the box, so that the object stays visible
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        size = (right - left + 4 * line, bottom - top + 4 * line)
        tag = _place_tag(size, frame, drawn.size, [*tags, *(other for other in frames if other != frame)])
        tags.append(tag)
        draw.rectangle(tag, fill=ink if label >= 0 else "white", outline=ink, width=line)
        draw.text((tag[0] + 2 * line - left, tag[1] + 2 * line - top), text, "white" if label >= 0 else ink, font)
    return drawn


def _place_tag(
    size: tuple[float, float], frame: Rectangle, image_size: tuple[int, int], occupied: list[Rectangle]
) -> Rectangle:
    """Return the place for the text of a box that hides least of `occupied`: above its top edge, else below it, else inside."""
    width, height = size
    left, top, right, bottom = frame
    places = []
    for y in (top - height, bottom, top):
        for x in (left, right - width):
            inside_x = min(max(0.0, x), max(0.0, image_size[0] - width))
            inside_y = min(max(0.0, y), max(0.0, image_size[1] - height))
            places.append((inside_x, inside_y, inside_x + width, inside_y + height))

    def hidden_area(tag: Rectangle) -> float:
        overlaps = (
            (min(tag[2], other[2]) - max(tag[0], other[0]), min(tag[3], other[3]) - max(tag[1], other[1]))
            for other in occupied
        )
        return sum(max(0.0, w) * max(0.0, h) for w, h in overlaps)

    return min(places, key=hidden_area)


def describe_answers(truth: dict[str, str], answers: dict[str, str]) -> str:
    """Return a sentence: how many tools on the photo are right, which are wrong, and the answer for the unknown object."""
    tools = {number: name for number, name in truth.items() if name in CLASS_NAMES}
    wrong = [f"the {name} is `{answers[number]}`" for number, name in tools.items() if answers[number] != name]
    unknown = [f"the {name} is `{answers[number]}`" for number, name in truth.items() if name not in CLASS_NAMES]
    return ", ".join([f"{len(tools) - len(wrong)} of {len(tools)} tools right", *wrong, *unknown])


# The whole workflow.


class Starter:
    """Starts commands of the script and passes signals on to the running one; between commands, a signal ends the demo."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self._early: list[int] | None = None  # signals that came while a process is being started; None = none is
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: Any) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)  # the terminal sends Ctrl-C too; two within 0.5 s count as one
        elif self._early is not None:
            self._early.append(number)
        elif number != signal.SIGUSR1:
            # At once: a library that draws may swallow an exception. What is half drawn has no name yet.
            os.write(2, f"interrupted ({signal.Signals(number).name}); the same command continues\n".encode())
            os._exit(128 + (signal.SIGTERM if number == signal.SIGHUP else number))

    def run(self, *arguments: str) -> None:
        """Run a command to its end. Raises SystemExit with its exit code if that is not 0; the command has printed why."""
        show(f"the same as: python {SCRIPT.name} {shlex.join(arguments)}")
        self._early = []
        self.process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments])
        early, self._early = self._early, None
        for number in early:
            self.process.send_signal(number)
        code = self.process.wait()
        if code:
            raise SystemExit(code if code > 0 else 128 - code)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is missing, train or continue, and pre-label the photo. Raises SystemExit with the code of a failed command."""
    options, train_arguments = parse_command_line(argv)
    starter = Starter()
    seed = options.seed
    draw_once(options.data_root, "eleven hand tools", lambda f: draw_dataset(f, options.images_per_class, seed))
    draw_once(options.unknown_dir, "things of no class", lambda f: draw_unknown_objects(f, IMAGES_PER_KIND, seed))
    draw_once(options.images, "a photo of a workbench", lambda f: draw_workbench(f, seed))
    hardware = {"--gpus": options.gpus, "--workers": options.workers}
    hardware = {name: value for name, value in hardware.items() if value is not None}
    shared = ("data_root", "out_dir", "unknown_dir", "seed")
    flags = {f"--{name}": getattr(options, name) for name in shared} | TRAIN_FLAGS
    typed = {argument.split("=")[0] for argument in train_arguments}
    flags = {name: value for name, value in flags.items() if name not in typed} | hardware
    starter.run(*to_arguments(flags), *train_arguments)
    detections = options.images / "detections.json"
    folders = {"--run": options.out_dir, "--images": options.images, "--detections": detections, "--out": options.out}
    starter.run("prelabel", *to_arguments(folders | {"--box_pad": options.box_pad} | hardware))
    show(f"{show_workbench(options.images, options.out)}\ndrawn: {options.out / 'workbench.jpg'}")


def parse_command_line(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the demo, and the arguments for training."""
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
    # The drawn crops have 1 to 6 % of bench around the tool.
    parser.add_argument("--box_pad", default="0.04", metavar="X", help="as of prelabel [0.04]")
    parser.add_argument("--gpus", metavar="N", help="as of training and prelabel")
    parser.add_argument("--workers", metavar="N", help="as of training and prelabel")
    options, train_arguments = parser.parse_known_args(argv)
    if options.seed < 0 or options.images_per_class < 1:
        parser.error("--seed cannot be negative, and --images_per_class is 1 at least")
    return options, train_arguments


def draw_once(folder: Path, content: str, draw: Callable[[Path], None]) -> None:
    """Draw the content of a folder unless the folder exists; it gets its name only when the drawing is complete.

    Raises SystemExit if it cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        if folder.exists():
            return
        show(f"drawing {content} into {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        parent = os.open(folder.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(parent, fcntl.LOCK_EX)  # waits for another demo that draws here
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            draw(unfinished)
            unfinished.rename(folder)
        os.close(parent)
    except OSError as error:
        remedy = "start the demo in a folder of your own, or name other folders (--help)"
        print(f"error: {folder}: cannot be written: {error.strerror}\n  {remedy}", file=sys.stderr)
        raise SystemExit(2) from error


def show(text: str) -> None:
    """Print without buffering, because the started commands print to the same stream."""
    print(text, flush=True)


def to_arguments(flags: dict[str, Any]) -> list[str]:
    """Return flags and their values as arguments of a command line; a flag whose value is None stands alone."""
    return [part for name, value in flags.items() for part in ((name,) if value is None else (name, str(value)))]


if __name__ == "__main__":
    main()
