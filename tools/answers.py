"""The units that `prelabel` answers, and its answers, stored on disk and read image by image. No program."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import geometry
import label_writers
from label_objects import Problem

import lct_dino3 as lct

# isort: split
import numpy as np

ANSWER_FORM = {"unit": str, "size": [int], "objects": [list], "problems": [list]}
UNIT_OBJECTS = 256  # of one image in a unit, decoded once for each unit; bounds the crops that wait in a loader


@dataclass(frozen=True)
class Detections:
    """The images and the objects detected in them: image i has the objects `borders[i]:borders[i + 1]`."""

    root: Path
    paths: np.ndarray  # (M,) str, relative to root
    stamps: np.ndarray  # (M, 2) int64: size in bytes, mtime in ns
    image_ids: list[Any]  # (M,) from the COCO file, else 1, 2, ...
    sizes: np.ndarray  # (M, 2) int64 width and height that the file claims, 0 if it claims none
    objects: np.ndarray  # (N,) JSON for `geometry.to_pixels`: compact in memory, even with polygons
    borders: np.ndarray  # (M + 1,) int64
    problems: list[Problem]  # known before any image is read
    notes: list[str]  # lines for the log
    image_bits: tuple[int, ...] = ()  # from `find_photo_bits`, or the run's

    def list_with_objects(self) -> list[str]:
        """Return the paths of the images that have objects."""
        return [path for path, count in zip(self.paths, np.diff(self.borders), strict=True) if count]


class Unit(NamedTuple):
    """Consecutive objects of one image, answered together."""

    image_index: int
    first: int
    last: int  # exclusive
    digest: str  # over the image's path, size and time, and the objects: key of the answers on disk


def plan_units(detections: Detections) -> list[Unit]:
    """Return the units to answer: one for each image, even without objects; several for an image with many objects."""
    units = []
    for image in range(len(detections.paths)):
        start, end = detections.borders[image : image + 2].tolist()
        head = f"{detections.paths[image]}\n{detections.stamps[image].tolist()}{detections.sizes[image].tolist()}"
        for first in range(start, max(end, start + 1), UNIT_OBJECTS):
            last = min(first + UNIT_OBJECTS, end)
            digest = hashlib.blake2b(f"{head}\n{first - start}".encode(), digest_size=12)
            for index in range(first, last):
                digest.update(detections.objects[index].encode() + b"\n")
            units.append(Unit(image, first, last, digest.hexdigest()))
    return units


def group_units(units: Sequence[Unit], batch: int) -> list[list[Unit]]:
    """Return the units in groups of about `batch` crops, the same whichever units are answered already."""
    groups: list[list[Unit]] = []
    room = 0
    for unit in units:
        if room <= 0:
            groups.append([])
            room = batch
        groups[-1].append(unit)
        room -= max(1, unit.last - unit.first)
    return groups


class Prelabel(NamedTuple):
    """An object and its answer."""

    object_index: int  # in the detections
    box: Sequence[float]  # x, y, width, height in px of the upright image, clipped
    has_mask: bool  # the crop was matched with a mask
    label: int  # most similar class
    is_known: bool  # `cosine` reaches the threshold of that class; otherwise the answer is `unknown`
    cosine: float  # similarity to that class, by the gallery's matcher
    probability: float  # that the object is of a known class and this class is right
    runner_up: int  # second most similar class, -1 if the gallery has only one class
    margin: float  # cosine minus the runner-up's; 2 without a runner-up
    reference: int  # nearest reference of that class, an index into the gallery's stacks
    rival: int  # nearest reference of the runner-up, -1 without one


class AnsweredImage(NamedTuple):
    """An image and the answers for its objects."""

    image_index: int  # in the detections
    path: str
    size: tuple[int, int]  # width, height
    objects: list[Prelabel]


def answer_crops(gallery: lct.Gallery, embeddings: np.ndarray) -> list[tuple]:
    """Return for each of the embeddings (N, D) the fields of `Prelabel` from `label` on."""
    if not len(embeddings):
        return []
    scores = gallery.scores(embeddings)
    rows = np.arange(len(scores))
    order = np.argsort(-scores, axis=1, kind="stable")
    labels = order[:, 0]
    best = scores[rows, labels]
    is_known = best >= gallery.thresholds[labels]
    probabilities = gallery.probability(labels, best)
    has_second = scores.shape[1] > 1
    seconds = order[:, 1] if has_second else np.full(len(rows), -1)
    margins = best - scores[rows, seconds] if has_second else np.full(len(rows), 2.0)
    rivals = lct.nearest_references(gallery, embeddings, seconds) if has_second else seconds
    best, probabilities, margins = np.round(np.stack([best, probabilities, margins]).astype(np.float64), 6)
    nearest = lct.nearest_references(gallery, embeddings, labels)
    columns = (labels, is_known, best, probabilities, seconds, margins, nearest, rivals)
    return list(zip(*(column.tolist() for column in columns), strict=True))


class AnswerFile:
    """Answers on disk, one line per unit, in the order of writing; memory holds only the offset of each line.

    The first line holds a key of everything besides images and objects that answers depend on. Another key starts the file afresh.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._starts: dict[str, int] = {}  # digest of a unit -> offset of its line
        header = (json.dumps({"key": key}) + "\n").encode()
        if not self._read_starts(path, header):
            lct.write_bytes(path, header)
        self._log = lct.LineFile(path)
        self._end = path.stat().st_size
        self._file = open(path, "rb")  # noqa: SIM115  closed by `close`

    def _read_starts(self, path: Path, header: bytes) -> bool:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            if file.readline() != header:
                return False
            start = file.tell()
            for line in file:
                if not line.endswith(b"\n"):  # half a line, which `LineFile` cuts off
                    break
                with contextlib.suppress(ValueError, RecursionError):  # the unit of a damaged line is answered again
                    record = json.loads(line)
                    lct.check_form(record, ANSWER_FORM)
                    if 0 not in record["size"]:  # else it is tried again: a permission changes neither size nor mtime
                        self._starts[record["unit"]] = start
                start += len(line)
        return True

    def __contains__(self, digest: str) -> bool:
        return digest in self._starts

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append the answers of some units, all or none.

        Raises:
            UserError: the disk is full; earlier answers stay.
        """
        lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
        self._log.append("".join(lines))
        for record, line in zip(records, lines, strict=True):
            self._starts[record["unit"]] = self._end
            self._end += len(line)  # in bytes, because JSON is ASCII

    def read(self, digest: str) -> dict[str, Any]:
        """Return the answers of a unit."""
        self._file.seek(self._starts[digest])
        return json.loads(self._file.readline())

    def close(self) -> None:
        """Close the file."""
        self._log.close()
        self._file.close()


@dataclass(frozen=True)
class Prelabels:
    """All answers; iterating reads them from disk, image by image in the order of the detections."""

    detections: Detections
    units: list[Unit]
    answers: AnswerFile
    gallery: lct.Gallery
    meta: dict[str, Any]  # of the gallery
    box_pad: float

    def __iter__(self) -> Iterator[AnsweredImage]:
        for image_index, units in itertools.groupby(self.units, key=operator.attrgetter("image_index")):
            records = [self.answers.read(unit.digest) for unit in units]
            if 0 in records[0]["size"]:  # the image cannot be used; `problems` says why
                continue
            first = int(self.detections.borders[image_index])
            rows = itertools.chain.from_iterable(record["objects"] for record in records)
            objects = [Prelabel(first + offset, *fields) for offset, *fields in rows]
            yield AnsweredImage(image_index, self.detections.paths[image_index], tuple(records[0]["size"]), objects)

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each image or object that has no answer or a less certain one."""
        yield from self.detections.problems
        for image_index, units in itertools.groupby(self.units, key=operator.attrgetter("image_index")):
            first = int(self.detections.borders[image_index])
            # All units of an image say so if it cannot be read, or if its size is doubtful.
            problems = dict.fromkeys(tuple(row) for unit in units for row in self.answers.read(unit.digest)["problems"])
            for offset, reason in problems:
                detection_id = None if offset < 0 else self.detection(first + offset).get("id")
                yield Problem(self.detections.paths[image_index], detection_id, reason)

    def detection(self, index: int) -> dict[str, Any]:
        """Return an object as it was in the detections."""
        return json.loads(self.detections.objects[index])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Return the label names: all classes, and last a name that no class has, for unknown objects."""
        unknown = "unknown"
        while unknown in self.gallery.class_names:
            unknown += "_"
        return (*self.gallery.class_names, unknown)

    def number(self, prelabel: Prelabel) -> int:
        """Return the index of an object's label in `names`."""
        return prelabel.label if prelabel.is_known else len(self.names) - 1

    def decision_margin(self, prelabel: Prelabel) -> float:
        """Return the smallest change of cosine that would give another answer."""
        distance = abs(prelabel.cosine - float(self.gallery.thresholds[prelabel.label]))
        return min(distance, prelabel.margin) if prelabel.is_known else distance

    @property
    def model(self) -> str:
        """Return the model's id and weights hash, for annotation tools."""
        return f"{self.meta['model_id']} {self.meta['weights_hash']}"

    def label_set(self) -> label_writers.LabelSet:
        """Return the answers in the form that label_writers.py takes."""
        description = f"pre-labels by {lct.SCRIPT_NAME}"
        return label_writers.LabelSet(self.detections.root, self.names, self.model, description, self._labelled_images)

    def _labelled_images(self) -> Iterator[label_writers.LabelledImage]:
        gallery = self.gallery
        for image in self:
            objects = []
            for item in image.objects:
                detection = geometry.to_pixels(self.detection(item.object_index), *image.size)
                has_second = item.runner_up >= 0
                details = {
                    "best_class": gallery.class_names[item.label],
                    "cosine": item.cosine,
                    "threshold": round(float(gallery.thresholds[item.label]), 6),
                    "probability": item.probability,
                    "runner_up": gallery.class_names[item.runner_up] if has_second else None,
                    "margin": item.margin if has_second else None,
                    "nearest_reference": gallery.stack_paths[item.reference],
                    "judged_by_mask": item.has_mask,
                    "detection_id": detection.get("id"),
                    "detection_category": detection.get("category_id"),
                    "detection_score": detection.get("score"),
                }
                objects.append(
                    label_writers.LabelledObject(
                        object_index=item.object_index,
                        box=item.box,
                        label=self.number(item),
                        score=item.probability,
                        details=details,
                        segmentation=detection.get("segmentation"),
                        is_crowd=detection.get("iscrowd") == 1,
                    )
                )
            image_id = self.detections.image_ids[image.image_index]
            yield label_writers.LabelledImage(image.image_index, image_id, image.path, image.size, objects)
