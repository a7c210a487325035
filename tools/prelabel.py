"""Give every detected object a class of a finished run, or `unknown`, for annotation tools.

Cuts objects from photos, matches them against the gallery of the run, and writes the formats of label_writers.py and a review page,
which shows the least certain answers first. Answers are stored in --out: the same command continues an interrupted job.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import heapq
import io
import itertools
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct  # before torch: it sets environment variables that torch reads on import

# isort: split
import geometry
import label_writers
import numpy as np
import torch
from answers import (
    AnsweredImage,
    AnswerFile,
    Detections,
    Prelabel,
    Prelabels,
    Unit,
    answer_crops,
    group_units,
    plan_units,
)
from label_objects import LabelError, Problem
from labels import read_objects
from photos import find_photo_bits, read_image_size
from PIL import Image
from torch.utils.data import Dataset

ANSWERS_NAME = ".progress.jsonl"  # answers so far; a folder with this file was made by this tool
WRITTEN_NAME = ".written.jsonl"  # path and digest of each label file; people have corrected those that differ
REVIEW_CARDS = 200  # a morning's work
REVIEW_PROBLEMS = 200
REVIEW_THUMB_PX = 160


@dataclass(frozen=True)
class PrelabelOptions(lct.RunOptions):
    """Give every detected object a class of a finished run, or `unknown`, for annotation tools."""

    # fmt: off
    images: Path | None = lct.option(None, "folder of the images, subfolders included", "pre-labelling", metavar="DIR",
        needed=True, folder=True)
    detections: Path | None = lct.option(None,
        "objects: COCO .json, folder of YOLO .txt, or labels of CVAT, Label Studio, CSV (default: each image is one)",
        "pre-labelling", metavar="PATH")
    out: Path | None = lct.option(None, "where the labels are written; an unfinished job in it is continued", "pre-labelling",
        metavar="DIR", needed=True)
    overwrite: bool = lct.option(False, "write --out anew; the old one is moved aside, not deleted", "pre-labelling", once=True)
    formats: str = lct.option(",".join(label_writers.WRITERS), "what to write, with commas between", "pre-labelling",
        metavar="LIST")
    box_pad: float = lct.option(0.0, "share of a box's side added on each side: as loose as the training crops were cut",
        "pre-labelling", low=0.0, high=5.0)
    # fmt: on


def check_options(options: PrelabelOptions) -> None:
    """Check the options as far as possible without reading images; writes nothing.

    Raises:
        UserError: an unknown format; a file or folder that is missing, of the wrong kind, or holds something else; an --out that
            overlaps with the inputs, or holds labels that were changed since they were written.
    """
    for name in options.formats.split(","):
        if name not in label_writers.WRITERS:
            problem = f"{name or 'an empty name'} is no format of labels"
            raise lct.UserError(problem, options.describe("formats"), f"give some of {','.join(label_writers.WRITERS)}")
    if options.detections is not None and not options.detections.exists():
        raise lct.UserError("does not exist", options.describe("detections"), "check the path")
    out = options.out.resolve()
    data_root = lct.read_run_config(options.run).data_root
    lct.check_outside(out, options.describe("out"), {"--images": options.images, "the run's data_root": data_root})
    if out.exists() and not out.is_dir():
        raise lct.UserError("is a file, not a folder", options.describe("out"), "choose another path")
    is_used = out.exists() and any(not path.name.startswith(".") for path in out.iterdir())
    if is_used and not (out / ANSWERS_NAME).exists():
        raise lct.UserError(
            "is neither empty nor a folder of pre-labels", options.describe("out"), "choose a new folder"
        )
    if options.detections is not None and options.detections.resolve().is_relative_to(out):
        problem = "lies in --out, where what is written would take its place"
        raise lct.UserError(problem, options.describe("detections"), "choose another --out")
    if options.overwrite and out in (Path.cwd(), *Path.cwd().parents):
        problem = "is the current folder, which --overwrite would move aside"
        raise lct.UserError(problem, options.describe("out"), "start from another folder")
    for name in ("run", "images"):
        if getattr(options, name).resolve().is_relative_to(out):
            raise lct.UserError(f"holds --{name}", options.describe("out"), "choose another folder")
    if not options.overwrite:
        check_corrections(options)


def check_corrections(options: PrelabelOptions) -> None:
    """Check that each label file about to be overwritten is still as this tool wrote it.

    Raises:
        UserError: naming the first file that is not.
    """
    digests: dict[str, list[str]] = {}  # of everything ever written, by path in --out
    if (options.out / WRITTEN_NAME).is_file():
        for line in (options.out / WRITTEN_NAME).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):  # half a line, left by a kill
                path, digest = json.loads(line)
                digests.setdefault(path, []).append(digest)
    for name in options.formats.split(","):
        paths = sorted(options.out.glob("objects.csv" if name == "csv" else f"{name}/**/*"))
        for path in paths:
            if not path.is_file() or path.is_symlink() or path.name[0] == "." or path.suffix == ".cache":
                continue
            digest = hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
            if digest not in digests.get(path.relative_to(options.out).as_posix(), ()):
                problem = "was changed after it was written" if digests else "may hold corrections"
                raise lct.UserError(
                    f"{problem}, and would be written anew",
                    str(path),
                    "give another --out, or --overwrite, which moves the old one aside",
                )


# --- reading detections


def read_detections(options: PrelabelOptions) -> Detections:
    """List the images and the objects detected in them; opens no image.

    Raises:
        UserError: no images, detections that cannot be read, or no object at all.
    """
    tree = lct.list_image_tree(options.images)
    source = options.detections
    if not tree.paths:
        instead = f", only {lct.describe_ignored(tree.ignored)}" if tree.ignored else ""
        raise lct.UserError(
            f"holds no images{instead}", options.describe("images"), f"of {' '.join(lct.IMAGE_SUFFIXES)}"
        )
    try:
        detected = read_objects(source, tree.paths)
    except LabelError as error:
        raise lct.UserError(error.what, f"--detections {error.where}", error.remedy) from error
    if not detected.objects:
        reason = f": {detected.problems[0]}" if detected.problems else ""
        remedy = "give a file with boxes of these images, or leave --detections out: then each image is one object"
        raise lct.UserError(f"holds no objects in these images{reason}", f"--detections {source}", remedy)
    paths = [tree.paths[index] for index in detected.images]
    problems = [Problem(path, None, reason) for path, reason in tree.problems] + detected.problems
    if "yolo" in options.formats.split(","):
        problems.extend(label_writers.find_equal_stems(paths))
    image_indices = np.array([image for image, _ in detected.objects], dtype=np.int64)
    order = np.argsort(image_indices, kind="stable")
    return Detections(
        root=options.images,
        paths=np.array(paths, dtype=lct.STRINGS),
        stamps=lct.stat_files(options.images, paths),
        image_ids=detected.image_ids,
        sizes=np.array(detected.sizes, dtype=np.int64).reshape(-1, 2),
        objects=np.array([detected.objects[index][1] for index in order.tolist()], dtype=lct.STRINGS),
        borders=np.concatenate([[0], np.cumsum(np.bincount(image_indices, minlength=len(paths)))]),
        problems=problems,
        notes=detected.notes + ([f"passed over: {lct.describe_ignored(tree.ignored)}"] if tree.ignored else []),
    )


# --- cutting


class CutUnit(NamedTuple):
    """The outcome of cutting a unit, apart from the pixels of its crops."""

    unit: Unit
    size: tuple[int, int]  # width and height of the upright image; 0, 0 = the image cannot be used
    # For each crop: index of the object; x, y, width, height in px, clipped, not padded; whether it was cut with a mask.
    objects: list[tuple[int, tuple[float, ...], bool]]
    problems: list[tuple[int, str]]  # index of the object, or -1 for the whole image; the reason


class DetectionDataset(Dataset):
    """Crops of detected objects, indexed by `Unit`: one decode of the image gives all crops of a unit."""

    def __init__(self, detections: Detections, run: lct.TrainedRun, box_pad: float) -> None:
        self.detections = detections
        self.transform = run.transform()
        self.box_pad = box_pad
        self.uses_masks = run.config.crop_mode != "bbox"

    def __getitem__(self, unit: Unit) -> tuple[list[np.ndarray], CutUnit]:
        path = self.detections.root / self.detections.paths[unit.image_index]
        try:
            image = lct.load_image(path, self.detections.image_bits) if unit.last > unit.first else None
            size = read_image_size(path) if image is None else (image.shape[1], image.shape[0])
        except lct.ImageError as error:
            return [], CutUnit(unit, (0, 0), [], [(-1, f"cannot be read: {error}")])
        claimed_size = tuple(self.detections.sizes[unit.image_index].tolist())
        start, end = self.detections.borders[unit.image_index : unit.image_index + 2].tolist()
        objects = (geometry.to_pixels(json.loads(self.detections.objects[i]), *size) for i in range(start, end))
        try:
            doubt = geometry.check_size(size, claimed_size, objects)
        except geometry.BoxError as error:
            return [], CutUnit(unit, (0, 0), [], [(-1, str(error))])
        cut = CutUnit(unit, size, [], [(-1, doubt)] if doubt else [])
        crops = (self._cut_object(image, index, cut) for index in range(unit.first, unit.last))
        return [crop for crop in crops if crop is not None], cut

    def _cut_object(self, image: np.ndarray, index: int, cut: CutUnit) -> np.ndarray | None:
        """Return the crop of an object and add it to `cut.objects`; on failure return None and add the reason to `cut.problems`."""
        detection = json.loads(self.detections.objects[index])
        try:
            cutting = geometry.cut_object(image, detection, self.box_pad, self.uses_masks)
            mask = None if cutting.mask is None else cutting.mask.astype(np.uint8) * 255
            crop = self.transform(cutting.pixels, mask, 0)
        except (geometry.BoxError, lct.ImageError) as error:
            cut.problems.append((index, str(error)))
            return None
        if cutting.problem:
            cut.problems.append((index, f"{cutting.problem}; it is judged with its background"))
        cut.objects.append((index, cutting.box, mask is not None))
        return crop

    def collate(self, samples: list[tuple[list[np.ndarray], CutUnit]]) -> tuple[torch.Tensor, list[CutUnit]]:
        """Stack the crops of all units, unit after unit, to uint8 (B, 3 or 4, H, W)."""
        crops = [crop for unit_crops, _ in samples for crop in unit_crops]
        stacked = np.stack(crops) if crops else np.zeros((0, 1, 1, 3), np.uint8)
        return torch.from_numpy(stacked).permute(0, 3, 1, 2), [cut for _, cut in samples]


def answer_objects(run: lct.TrainedRun, detections: Detections, options: PrelabelOptions) -> Prelabels:
    """Answer every object that has no answer in --out yet; return all answers."""
    units = plan_units(detections)
    # An answer depends on these settings, its image and its object alone; 3 is the version of the answers.
    settings = [
        3,
        lct.fingerprint(run.meta, *run.gallery.arrays().values()),
        run.meta["weights_hash"],
        str(run.model.backbone.dtype),
        run.runtime.device.type,
        options.box_pad,
        *detections.image_bits,
    ]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
    answers = AnswerFile(options.out / ANSWERS_NAME, key)
    groups = group_units(units, options.batch)
    pending = lct.broadcast([group for group in groups if not all(unit.digest in answers for unit in group)])
    num_images = len({unit.image_index for unit in units})
    num_answered = num_images - len({unit.image_index for group in pending for unit in group})
    if num_answered:
        lct.show(f"{num_answered:,} of {num_images:,} images are answered already")
    if pending:
        bar = lct.progress((), len(units), "pre-labelling", unit="image")
        bar.update(len(units) - sum(map(len, pending)))
        with contextlib.closing(bar):
            for records in answer_batches(run, detections, pending, options):
                answers.append(records)
                bar.update(len(records))
    return Prelabels(detections, units, answers, run.gallery, run.meta, options.box_pad)


def answer_batches(
    run: lct.TrainedRun, detections: Detections, groups: list[list[Unit]], options: PrelabelOptions
) -> Iterator[list[dict[str, Any]]]:
    """Yield in rank 0 the records of each group of units; the ranks that torchrun has started take turns at the groups."""
    dataset = DetectionDataset(detections, run, options.box_pad)
    batch_size = -(-options.batch // lct.get_world_size())

    def answer(batch: tuple[torch.Tensor, list[CutUnit]]) -> list[dict[str, Any]]:
        images, cuts = batch
        embeddings = np.zeros((0, 1), np.float32)
        if len(images):
            paths = [detections.paths[cut.unit.image_index] for cut in cuts for _ in cut.objects]
            embeddings = run.embed(images, paths.__getitem__, batch_size)
        answers = iter(answer_crops(run.gallery, embeddings))
        records = []
        for cut in cuts:
            # Records count objects within their image: the answers stay valid when other images come or go.
            first = int(detections.borders[cut.unit.image_index])
            objects = [[index - first, box, has_mask, *next(answers)] for index, box, has_mask in cut.objects]
            problems = [(index if index < 0 else index - first, reason) for index, reason in cut.problems]
            records.append({"unit": cut.unit.digest, "size": cut.size, "objects": objects, "problems": problems})
        return records

    return lct.take_turns(lambda units: lct.make_loader(dataset, units, options, run.runtime), groups, answer)


# --- writing


def main(argv: Sequence[str] | None = None) -> int:
    """Pre-label with command-line arguments, and return the exit code."""
    return lct.run_program("prelabel", PrelabelOptions, label_photos, argv, is_shared=True)


def label_photos(options: PrelabelOptions) -> None:
    """Give every detected object a class or `unknown`, and write labels for annotation tools; continues an interrupted job."""
    check_options(options)
    runtime = lct.make_runtime(options.gpus, options.precision)
    detections = lct.from_first(read_detections, options)
    run = lct.load_run(options.run, runtime, options.backbone_weights)
    bits = run.config.image_bits or lct.from_first(find_photo_bits, options.images, detections.list_with_objects())
    detections = dataclasses.replace(detections, image_bits=bits)
    if lct.get_rank():  # only rank 0 writes
        groups = lct.broadcast(None)  # the pending groups, which `answer_objects` sends from rank 0
        deque(answer_batches(run, detections, groups, options), maxlen=0)
        return
    if options.overwrite and options.out.exists():
        old = lct.move_aside(options.out, "--out")
        lct.show(f"the old labels are moved to {old}")
        lct.create_out_dir(options.out, "--out")
        with contextlib.suppress(FileNotFoundError):  # the answers stay valid: only the labels are written anew
            shutil.move(old / ANSWERS_NAME, options.out / ANSWERS_NAME)  # --out may have been a link to another disk
    with lct.lock_directory(options.out, "--out"):
        for pattern in ("", "*/", "coco/annotations/"):  # leftovers of a job killed while writing
            for leftover in options.out.glob(f"{pattern}.*.[0-9]*.tmp"):
                is_folder = leftover.is_dir() and not leftover.is_symlink()
                shutil.rmtree(leftover) if is_folder else leftover.unlink()
        for note in detections.notes:
            lct.show(note)
        lct.show(
            f"{lct.count_of(len(detections.objects), 'object')} in {lct.count_of(len(detections.paths), 'image')},"
            f" on {run.runtime.describe()}"
        )
        prelabels = answer_objects(run, detections, options)
        with contextlib.closing(prelabels.answers):
            summary = write_prelabels(prelabels, run, options)
    counts = f"{lct.count_of(summary['objects'], 'object')} in {lct.count_of(summary['images'], 'image')}"
    lct.show(
        f"{counts}: {summary['unknown']:,} unknown, {lct.count_of(summary['problems'], 'problem')} (problems.json)\n"
        f"written: {options.out}; begin with review.html"
    )
    if "labelstudio" in options.formats.split(","):
        lct.show(label_writers.explain_labelstudio(options.images, options.out))


def write_prelabels(prelabels: Prelabels, run: lct.TrainedRun, options: PrelabelOptions) -> dict[str, Any]:
    """Write the labels in every requested format, the problems and the review page; return the summary.

    Raises:
        UserError: no object has an answer.
    """
    problems = [problem._asdict() for problem in prelabels.problems()]
    lct.write_json(options.out / "problems.json", problems)
    counts = np.zeros(len(prelabels.names), dtype=np.int64)
    num_images = 0
    num_masked = 0
    for image in prelabels:
        num_images += 1
        for item in image.objects:
            counts[prelabels.number(item)] += 1
            num_masked += item.has_mask
    num_objects = int(counts.sum())
    if not num_objects:
        first = f"{problems[0]['image']} {problems[0]['reason']}" if problems else "no image has objects"
        raise lct.UserError(
            f"not one object can be labelled: {first}", str(options.images), "see problems.json in --out"
        )
    if run.config.crop_mode == "mask" and num_objects > num_masked:
        lct.show(
            f"warning: the run was trained on masked crops alone, and {num_objects - num_masked:,} objects have no mask:"
            " expect worse answers"
        )
    labels = prelabels.label_set()
    names = [name for name in label_writers.WRITERS if name in options.formats.split(",")]
    for name in lct.progress(names, len(names), "writing", unit="format"):
        write_labels(options.out, name, labels)
    summary = {
        "images": num_images,
        "objects": num_objects,
        "unknown": int(counts[-1]),
        "judged_by_mask": num_masked,
        "classes": dict(zip(prelabels.names, counts.tolist(), strict=True)),
        "model": prelabels.model,
        "matcher": prelabels.gallery.matcher,
        "box_pad": prelabels.box_pad,
        "problems": len(problems),
    }
    lct.write_json(options.out / "summary.json", summary)
    write_review(prelabels, summary, run.config.data_root, options.out / "review.html")
    return summary


def write_labels(out: Path, name: str, labels: label_writers.LabelSet) -> None:
    """Write the labels in one format: each file atomically, or a folder of very many files as a whole.

    The path and digest of each file are logged before it takes its place: after a kill, the next job recognises the files.
    """
    is_folder = name == "yolo"  # of a file per image: it is replaced as a whole, once complete
    new_folder = out / f".{name}.{os.getpid()}.tmp"
    lines: list[str] = []
    with contextlib.closing(lct.LineFile(out / WRITTEN_NAME)) as log:
        log_line = lines.append if is_folder else log.append
        for path, content in label_writers.WRITERS[name](labels):
            target = (new_folder if is_folder else out) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                _replace_link(target, content)
                continue
            with open(target, "wb") if is_folder else lct.atomic_file(target) as file:
                log_line(_write_chunks(file, path, content))
        if lines:
            log.append("".join(lines))
    if is_folder:
        old_folder = out / f".{name}.old.{os.getpid()}.tmp"
        if (out / name).exists():
            (out / name).rename(old_folder)
        (new_folder / name).rename(out / name)
        lct.sync_folder(out)
        shutil.rmtree(old_folder, ignore_errors=True)
        new_folder.rmdir()


def _replace_link(link: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems have no links
        if link.is_symlink():
            link.unlink()
        link.symlink_to(target.resolve(), target_is_directory=target.is_dir())


def _write_chunks(file: BinaryIO, path: str, chunks: Iterable[str]) -> str:
    """Write a file, and return its line for the log."""
    digest = hashlib.blake2b(digest_size=12)
    for text in chunks:
        data = text.encode("utf-8", "backslashreplace")
        digest.update(data)
        file.write(data)
    return json.dumps([path, digest.hexdigest()]) + "\n"


def write_review(prelabels: Prelabels, summary: dict[str, Any], data_root: Path, path: Path) -> None:
    """Write one self-contained page of the objects whose answers are easiest to overturn, the least certain first.

    Args:
        prelabels: all answers; read once.
        summary: counts by `write_prelabels`.
        data_root: data_root of the run, for the pictures of references; the page lacks them if it is gone.
        path: file of the page.
    """
    import jinja2

    pairs = ((image, item) for image in prelabels for item in image.objects)
    least_certain = heapq.nsmallest(REVIEW_CARDS, pairs, key=lambda pair: prelabels.decision_margin(pair[1]))
    bar = lct.progress(least_certain, len(least_certain), "review", unit="object")
    cards = [_make_card(prelabels, data_root, image, item) for image, item in bar]
    problems = list(itertools.islice(prelabels.problems(), REVIEW_PROBLEMS))
    # Names may hold markup, so they are escaped. StrictUndefined: a name misspelled in the template raises.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = "{:,}".format
    template = environment.get_template("review.html.j2")
    page = template.render(summary=summary, cards=cards, problems=problems)
    lct.write_bytes(path, page.encode("utf-8", "backslashreplace"))


def _make_card(prelabels: Prelabels, data_root: Path, image: AnsweredImage, item: Prelabel) -> dict[str, Any]:
    """Return the values that the page shows of an object; pictures are data URIs, or None if the file is gone."""
    gallery = prelabels.gallery
    has_second = item.runner_up >= 0
    threshold = float(gallery.thresholds[item.label])
    distance = abs(item.cosine - threshold)
    reason = f"{distance:.3f} {'above' if item.is_known else 'below'} the threshold"
    if item.is_known and item.margin < distance:
        reason = f"{item.margin:.3f} ahead of the runner-up"
    figures = f"cosine {item.cosine:.3f}, threshold {threshold:.3f}, probability {item.probability:.2f}"
    if has_second:
        figures += f", margin {item.margin:.3f}"
    edges = geometry.pad_box(item.box, prelabels.box_pad, *image.size)
    reference_path = gallery.stack_paths[item.reference]
    rival_path = gallery.stack_paths[item.rival] if item.rival >= 0 else None
    return {
        "path": image.path,
        "answer": prelabels.names[prelabels.number(item)],
        "is_known": item.is_known,
        "best": gallery.class_names[item.label],
        "runner_up": gallery.class_names[item.runner_up] if has_second else None,
        "figures": figures,
        "reason": reason,
        "crop": _make_picture(prelabels.detections.root / image.path, edges, prelabels.detections.image_bits),
        "reference": _make_picture(data_root / reference_path, bits=prelabels.detections.image_bits),
        "rival": _make_picture(data_root / rival_path, bits=prelabels.detections.image_bits) if rival_path else None,
        "reference_path": reference_path,
        "rival_path": rival_path,
    }


def _make_picture(path: Path, edges: tuple[int, int, int, int] | None = None, bits: Sequence[int] = ()) -> str | None:
    """Return a thumbnail of an image, or of the part left, top, right, bottom, as a data URI; None if it is gone or damaged."""
    try:
        picture = Image.fromarray(lct.load_image(path, bits)).crop(edges)
    except lct.ImageError:
        return None
    picture.thumbnail((REVIEW_THUMB_PX, REVIEW_THUMB_PX))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    lct.exit_process(main())
