"""Cut labelled photos into one folder of crops a class, to train on; corrected labels move, add and remove crops.

    python lct_dino3.py crop --images PHOTOS --labels labels.json --out DATA

Cuts with the same function as `prelabel`. `crops.jsonl` in --out records each crop with the hash of its file: the same command
continues an interrupted job, and leaves alone the files that a person has added, edited or deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct

# isort: split
import geometry
import numpy as np
import simplejpeg
from crop_records import PROGRESS_NAME, RECORDS_NAME, Records, hash_file, list_files, parse_number, read_lines, to_line
from label_objects import LabelError, Problem, find_class_name
from labels import read_labels
from photos import find_photo_bits
from PIL import Image

VERSION = 1  # of cutting and writing crops; another version cuts all of them anew
JPEG_QUALITY = 95
MAX_NAME_BYTES = 160  # of the photo's name in a file name, which also has number, suffix and process id: at most 255
SAME_OBJECT = 0.5  # IoU from which a box counts as a redrawn box of an earlier crop
GROUP_REGEX = r"^(.+)_\d+\.jpg$"  # the photo of a crop: greedy, because names of photos may end in numbers too
MAX_SHOWN = 5  # problems printed, and kinds of ignored files; problems.json has all problems
LABEL_SUFFIXES = (".json", ".txt", ".xml", ".csv", ".yaml", ".yml", ".names", ".data")  # may lie beside photos


@dataclass(frozen=True)
class CropOptions(lct.Options):
    """Cut labelled photos into one folder of crops a class, to train on."""

    # fmt: off
    images: Path | None = lct.option(None, "folder of the photos, subfolders included", "cropping", metavar="DIR",
        needed=True, folder=True)
    labels: Path | None = lct.option(None,
        "COCO, Label Studio, VIA or LabelMe .json, folder of YOLO .txt or LabelMe .json, CVAT .xml, .csv",
        "cropping", metavar="PATH", needed=True)
    out: Path | None = lct.option(None, "data_root to write; the crops in it follow the labels", "cropping", metavar="DIR",
        needed=True)
    box_pad: float = lct.option(0.0, "share of a box's side added on each side, as prelabel has it", "cropping", low=0.0, high=5.0)
    image_bits: tuple[int, ...] = lct.option((),
        "bits a channel that photos of more than 8 really use, such as 12 (default: what their values show)",
        "cropping", metavar="N", nargs="+", low=8, high=16)
    unknown: tuple[str, ...] = lct.option((), "classes that are none: their crops go beside --out, for --unknown_dir",
        "cropping", metavar="NAME", nargs="+", action="extend")
    # fmt: on
    debug: bool = lct.same_option("debug")


def check_options(options: CropOptions) -> None:
    """Check the options as far as possible without reading labels; writes nothing.

    Raises:
        UserError: a file or folder is missing, of the wrong kind, or holds something else.
    """
    if not options.labels.exists():
        raise lct.UserError("does not exist", options.describe("labels"), "check the path")
    where = options.describe("out")
    images = options.images.resolve()
    for folder in (options.out.resolve(), unknown_folder(options.out)):
        lct.check_outside(folder, f"{options.place('out')} {folder}", {"--images": images})
        if folder in images.parents:
            raise lct.UserError("holds --images, which would be taken for a class", where, "choose another folder")
        if folder.exists() and not folder.is_dir():
            raise lct.UserError(f"{folder} is a file, not a folder", where, "choose another path")
        is_used = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
        if is_used and not any((options.out / name).exists() for name in (RECORDS_NAME, PROGRESS_NAME)):
            problem = f"{folder} is neither empty nor made by this tool: it has no {RECORDS_NAME}"
            raise lct.UserError(problem, where, "choose a new folder")


def unknown_folder(out: Path) -> Path:
    """Return the folder for crops of no class: beside --out, because each folder inside would be trained as a class."""
    out = out.resolve()
    return out.with_name(f"{out.name}_unknown")


# --- reading labels


class Photo(NamedTuple):
    """A photo, the objects in it, and its earlier crops."""

    path: str  # relative to --images
    stamp: tuple[int, int]  # size in bytes, mtime in ns
    claimed: tuple[int, int]  # width and height that the labels claim; 0 = no claim
    objects: list[tuple[str, str]]  # JSON for `geometry.cut_object`, class
    key: str  # hash of everything that the crops depend on
    crops: list[dict[str, Any]]  # records of `crops.jsonl`
    stale: list[dict[str, Any]]  # records that an interrupted job was replacing
    was_interrupted: bool  # the files may not have been written
    digest: str = ""  # SHA-256 of the file, once it is cut


@dataclass
class Labelled:
    """The photos that the labels name, and their objects."""

    paths: list[str]
    stamps: list[tuple[int, int]]  # size in bytes, mtime in ns
    claimed: list[tuple[int, int]]
    objects: list[list[tuple[str, str]]]  # for each photo: JSON, class
    folders: dict[str, str]  # class -> name of its folder
    unknown: set[str]  # names given with --unknown
    problems: list[Problem]
    notes: list[str]


def read_labelled(options: CropOptions) -> Labelled:
    """List the photos that the labels name and their objects, each with its class; opens no photo.

    Raises:
        UserError: no photos, labels that cannot be read, no object with a class, or two classes with the same folder.
    """
    tree = lct.list_image_tree(options.images)
    if not tree.paths:
        raise lct.UserError("holds no images", options.describe("images"), f"of {' '.join(lct.IMAGE_SUFFIXES)}")
    try:
        labels = read_labels(options.labels, tree.paths)
    except LabelError as error:
        raise lct.UserError(error.what, f"--labels {error.where}", error.remedy) from error
    paths = [tree.paths[index] for index in labels.images]
    problems = [Problem(path, None, reason) for path, reason in tree.problems] + labels.problems
    objects: list[list[tuple[str, str]]] = [[] for _ in paths]
    for index, text in labels.objects:
        detection = json.loads(text)
        try:
            if detection.get("iscrowd") == 1:
                raise geometry.BoxError("is a crowd of objects, not one")
            name = find_class_name(labels.class_names, detection.get("category_id"))
        except geometry.BoxError as error:
            problems.append(Problem(paths[index], detection.get("id"), str(error)))
            continue
        objects[index].append((text, unicodedata.normalize("NFC", name)))
    folders = {name: name_folder(name) for name in dict.fromkeys(name for items in objects for _, name in items)}
    if not folders:
        first = f": {problems[0]}" if problems else ""
        raise lct.UserError(
            f"holds no object of a class{first}", options.describe("labels"), "check --images and --labels"
        )
    class_of_folder: dict[str, str] = {}
    for name, folder in folders.items():
        earlier = class_of_folder.setdefault(folder, name)
        if earlier != name:
            problem = f"has the classes {earlier!r} and {name!r}, whose crops would go to one folder {folder}"
            raise lct.UserError(problem, options.describe("labels"), "rename one of them in the labels")
    stamps = list(map(tuple, lct.stat_files(options.images, paths).tolist()))
    ignored = [(kind, count) for kind, count in tree.ignored.most_common() if kind not in LABEL_SUFFIXES]
    counts = ", ".join(f"{count:,} {kind}" for kind, count in ignored[:MAX_SHOWN])
    notes = [*labels.notes, *([lct.printable(f"passed over, as they are no images: {counts}")] if ignored else [])]
    unknown = {unicodedata.normalize("NFC", name) for name in options.unknown}
    return Labelled(paths, stamps, labels.sizes, objects, folders, unknown, problems, notes)


def name_folder(class_name: str) -> str:
    """Return the folder name of a class: on one level, not hidden, without control characters.

    Raises:
        UserError: the name is too long.
    """
    refused = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories that the scan refuses in folder names
    name = "".join("_" if char in "/\\" or unicodedata.category(char) in refused else char for char in class_name)
    name = re.sub(r"^\.+", lambda match: "_" * len(match[0]), name.strip())
    if len(name.encode()) > MAX_NAME_BYTES:
        raise lct.UserError("is too long for the name of a folder", f"class {name[:60]}...", "shorten it in the labels")
    return name


def plan_photos(options: CropOptions, labelled: Labelled, records: Records) -> Iterator[Photo]:
    """Yield each photo that the labels name, with its objects in the labels and its earlier crops."""
    rows = zip(labelled.paths, labelled.stamps, labelled.claimed, labelled.objects, strict=True)
    for path, stamp, claimed, objects in rows:
        crops = [json.loads(text) for text in records.crops.get(path, ())]
        stale = [json.loads(text) for text in records.stale.get(path, ())]
        unknown = [name in labelled.unknown for _, name in objects]
        key = lct.fingerprint(VERSION, path, stamp[0], claimed, options.box_pad, objects, unknown, *options.image_bits)
        yield Photo(path, stamp, claimed, objects, key, crops, stale, path in records.stale)


# --- cutting


class NewCrop(NamedTuple):
    """A crop of an object, not written yet."""

    id: Any  # of the object in the labels
    class_name: str
    box: tuple[float, ...]  # x, y, width, height in px of the upright photo, clipped, not padded
    jpeg: bytes
    mask: bytes | None  # PNG; b"" = hides nothing, which the scan refuses; None = the labels have no mask


@dataclass
class CutPhoto:
    """The new crops of a photo, and the state of its earlier ones."""

    photo: Photo
    crops: list[NewCrop] | None  # None = the earlier crops stay
    # Record of each earlier crop, and whether the crop is `sound`, `edited` by a person, or `gone`.
    states: list[tuple[dict[str, Any], str]]
    problems: list[Problem] = field(default_factory=list)


class Cutter:
    """Cuts the crops of a photo unless they are up to date; runs in threads and writes nothing."""

    def __init__(self, options: CropOptions) -> None:
        self.images = options.images
        self.roots = {False: options.out, True: unknown_folder(options.out)}  # True: of crops of no class
        self.box_pad = options.box_pad
        self.image_bits = options.image_bits

    def __call__(self, photo: Photo) -> CutPhoto:
        cut = CutPhoto(photo, None if photo.objects else [], self._inspect(photo))
        is_cut = [record["key"] for record, _ in cut.states] == [photo.key] * len(photo.objects)
        files = sorted(record["file"] for record, _ in cut.states)
        if photo.objects and (not is_cut or files != sorted(record["file"] for record in photo.crops)):
            self._cut(cut)
        return cut

    def _inspect(self, photo: Photo) -> list[tuple[dict[str, Any], str]]:
        """Return the earlier crops and their states; of several records of one file, only the one that matches the file."""
        by_file: dict[tuple[bool, str], list[dict[str, Any]]] = {}
        for record in (*photo.crops, *photo.stale):
            by_file.setdefault((record["unknown"], record["file"]), []).append(record)
        states = (self._judge(versions, photo.was_interrupted) for versions in by_file.values())
        return [state for state in states if state is not None]

    def _judge(self, versions: list[dict[str, Any]], was_interrupted: bool) -> tuple[dict[str, Any], str] | None:
        """Return the record of a crop that matches its files, else the newest of `versions`, and its state; None = never written.

        A kill may have left a crop without its mask, or with the mask of an earlier box: the record then gets empty hashes, so that
        both files are written anew.
        """
        file = versions[0]["file"]
        pairs = {pair for version in versions for pair in list_files(version)}
        paths = {name: self.roots[versions[0]["unknown"]] / name for name, _ in pairs}
        hashes = {name: hash_file(path) for name, path in paths.items() if os.path.lexists(path)}
        sound = next((version for version in versions if dict(list_files(version)) == hashes), None)
        record = sound or versions[0]
        was_gone = record.pop("gone", False)
        was_edited = record.pop("edited", False)
        if sound is not None:
            return record, "sound"
        if hashes and hashes.items() <= pairs and was_interrupted and not was_gone and not was_edited:
            mask = next((name for name in paths if name != file), None)
            return {**record, "key": "", "sha256": "", "mask": mask, "mask_sha256": mask and ""}, "sound"
        if file in hashes:
            return {**record, "edited": True}, "edited"
        if was_gone or not was_interrupted:  # else the job never wrote it, or removed it
            return {**record, "gone": True}, "gone"
        return None

    def _cut(self, cut: CutPhoto) -> None:
        """Fill in the new crops of a photo, its digest, and the problems."""
        photo = cut.photo
        # The photo may have been half copied when it was listed.
        (stamp,) = lct.stat_files(self.images, [photo.path]).tolist()
        cut.photo = photo._replace(stamp=tuple(stamp), digest=hash_file(self.images / photo.path))
        try:
            image = lct.load_image(self.images / photo.path, self.image_bits)
            size = image.shape[1::-1]
            objects = (geometry.to_pixels(json.loads(text), *size) for text, _ in photo.objects)
            doubt = geometry.check_size(size, photo.claimed, objects)
            cut.problems += [Problem(photo.path, None, doubt)] if doubt else []
        except (lct.ImageError, geometry.BoxError) as error:
            reason = f"cannot be read: {error}" if isinstance(error, lct.ImageError) else str(error)
            cut.problems.append(Problem(photo.path, None, reason))
            return
        cut.crops = []
        for text, class_name in photo.objects:
            detection = json.loads(text)
            try:
                cutting = geometry.cut_object(image, detection, self.box_pad, with_mask=True)
                pixels = np.ascontiguousarray(cutting.pixels)
                jpeg = simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
            except ValueError as error:  # a BoxError, or a side longer than JPEG allows
                cut.problems.append(Problem(photo.path, detection.get("id"), str(error)))
                continue
            if cutting.problem:
                reason = f"{cutting.problem}; it is cut without a mask"
                cut.problems.append(Problem(photo.path, detection.get("id"), reason))
            # b"": it hides nothing.
            mask = None if cutting.mask is None else b"" if cutting.mask.all() else encode_png(cutting.mask)
            cut.crops.append(NewCrop(detection.get("id"), class_name, cutting.box, jpeg, mask))


def hash_bytes(data: bytes) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    return hashlib.sha256(data).hexdigest()


def encode_png(mask: np.ndarray) -> bytes:
    """Encode a mask bool (h, w) as PNG of one bit a pixel."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


def match_crops(crops: Sequence[NewCrop], records: Sequence[dict[str, Any]]) -> dict[int, int]:
    """Match new crops to earlier ones, greedily by IoU of their boxes: new index -> earlier index.

    In ties, crops that a kill left half done come last, because one that is moving still has its mask at the old place; then the
    same class comes first.
    """
    if not crops or not records:
        return {}
    new = np.array([crop.box for crop in crops], dtype=np.float64)[:, None]
    old = np.array([record["box"] for record in records], dtype=np.float64)[None]
    top_left = np.maximum(new[..., :2], old[..., :2])
    bottom_right = np.minimum(new[..., :2] + new[..., 2:], old[..., :2] + old[..., 2:])
    intersection = np.clip(bottom_right - top_left, 0, None).prod(axis=-1)
    iou = intersection / (new[..., 2:].prod(axis=-1) + old[..., 2:].prod(axis=-1) - intersection)
    candidates = [
        (-round(iou[i, j], 2), not records[j]["sha256"], crops[i].class_name != records[j]["class"], i, j)
        for i, j in np.argwhere(iou >= SAME_OBJECT).tolist()
    ]
    matches: dict[int, int] = {}
    for *_, i, j in sorted(candidates):
        if i not in matches and j not in matches.values():
            matches[i] = j
    return matches


# --- writing


@dataclass
class Change:
    """The new records of a photo's crops, and the files to write and remove for them."""

    photo: str
    records: list[dict[str, Any]] = field(default_factory=list)
    writes: dict[Path, bytes] = field(default_factory=dict)
    removals: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)  # of cutting, then crops that a person has changed

    def write(self) -> None:
        """Write the new files. Raises UserError if a file or folder cannot be written."""
        for path, data in self.writes.items():
            lct.create_out_dir(path.parent, "--out")
            lct.write_bytes(path, data)

    def remove(self) -> None:
        """Remove the old files, and the folders that are then empty. Raises UserError if a file cannot be removed."""
        for path in self.removals:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                problem = f"cannot be removed: {error.strerror}"
                raise lct.UserError(problem, str(path), "make it writable; the same command continues") from error
            with contextlib.suppress(OSError):  # folders that are not empty stay
                path.parent.rmdir()  # an empty folder would be a class without images
                path.parent.parent.rmdir()


class Planner:
    """Chooses the file of each crop; knows all names that are taken."""

    def __init__(self, labelled: Labelled, cutter: Cutter, records: Records) -> None:
        self.labelled = labelled
        self.roots = cutter.roots
        self._stems: dict[str, str] = {}  # photo -> start of the file names of its crops
        for photo, lines in (*records.stale.items(), *records.crops.items()):
            if lines:
                self._stems[photo] = Path(json.loads(lines[0])["file"]).stem.rpartition("_")[0]
        self._taken = {stem.casefold() for stem in self._stems.values()}

    def stem(self, photo: str) -> str:
        """Return the start of the file names of a photo's crops: its path on one level, unique among the photos."""
        if photo not in self._stems:
            flat = unicodedata.normalize("NFC", photo.rpartition(".")[0].replace("/", "__"))
            if len(flat.encode()) > MAX_NAME_BYTES or flat.casefold() in self._taken:
                digest = hashlib.blake2b(photo.encode(), digest_size=6).hexdigest()
                flat = f"{flat.encode()[: MAX_NAME_BYTES - 13].decode(errors='ignore')}-{digest}"
            self._taken.add(flat.casefold())
            self._stems[photo] = flat
        return self._stems[photo]

    def plan(self, cut: CutPhoto) -> Change:
        """Return the change that replaces the earlier crops of a photo by the new ones, except those that a person has changed."""
        change = Change(cut.photo.path, problems=list(cut.problems))
        if cut.crops is None:
            change.records = [record for record, _ in cut.states]
            change.problems += [report_edit(record, state, "") for record, state in cut.states if state != "sound"]
            return change
        sound = [record for record, state in cut.states if state == "sound"]
        contents = {self.roots[item["unknown"]] / name: digest for item in sound for name, digest in list_files(item)}
        last_number = max((int(parse_number(record["file"])) for record, _ in cut.states), default=0)
        new_names = (f"{self.stem(cut.photo.path)}_{number}" for number in itertools.count(last_number + 1))
        matches = match_crops(cut.crops, [record for record, _ in cut.states])
        moved_masks: set[Path] = set()
        # Without a key, a photo with problems is cut again by the next call, which then reports them again.
        key = "" if cut.problems else cut.photo.key
        for index, crop in enumerate(cut.crops):
            old, state = cut.states[matches[index]] if index in matches else (None, "")
            if state in ("edited", "gone"):
                # Without a key, the next call reports again that the labels disagree.
                is_same = old["class"] == crop.class_name
                change.records.append({**old, "key": key if is_same else ""})
                addition = "" if is_same else f"; the labels now say {crop.class_name}"
                change.problems.append(report_edit(old, state, addition))
                continue
            moves_mask = False
            if crop.mask is None and old and not old["unknown"] and old["sha256"] == hash_bytes(crop.jpeg):
                # Annotation tools may give back boxes without masks: an unchanged crop then keeps its mask. A mask that
                # someone else, such as SAM-2, has drawn since moves with its crop.
                file = self.roots[False] / old["file"]
                mask_path = file.parents[1] / "masks" / f"{file.stem}_mask.png"
                is_moved = crop.class_name not in (old["class"], *self.labelled.unknown) and mask_path.is_file()
                if old["mask"] or is_moved:
                    crop = crop._replace(mask=mask_path.read_bytes())
                moves_mask = is_moved and not old["mask"]
            taken = {Path(item["file"]).stem for item in change.records}
            names = itertools.chain([Path(old["file"]).stem] if old else [], new_names)
            names = itertools.filterfalse(taken.__contains__, names)
            record = self._place(crop, cut.photo, names, contents.keys() - change.writes.keys())
            change.records.append({**record, "key": key})
            if moves_mask and record["mask"]:  # else another mask lies in its way, and both stay
                moved_masks.add(mask_path)
            if crop.mask and not record["mask"] and not record["unknown"]:
                reason = f"has a crop {record['file']} whose mask someone else has drawn, which is kept"
                change.problems.append(Problem(cut.photo.path, crop.id, reason))
            paths = [self.roots[record["unknown"]] / name for name, _ in list_files(record)]
            # `list_files` names the mask only if the record has one.
            change.writes.update(zip(paths, (crop.jpeg, crop.mask), strict=False))
        for index, (record, state) in enumerate(cut.states):
            if state == "edited" and index not in matches.values():
                change.records.append(record)
                change.problems.append(report_edit(record, state, "; the labels no longer have it"))
        change.removals = sorted((contents.keys() | moved_masks) - change.writes.keys())
        change.writes = {path: data for path, data in change.writes.items() if contents.get(path) != hash_bytes(data)}
        return change

    def _place(self, crop: NewCrop, photo: Photo, names: Iterator[str], may_replace: set[Path]) -> dict[str, Any]:
        """Return the record of a crop, under the first of the names whose file does not exist or is in `may_replace`."""
        is_unknown = crop.class_name in self.labelled.unknown
        folder = self.labelled.folders[crop.class_name]

        def is_free(file: str) -> bool:
            path = self.roots[is_unknown] / file
            return path in may_replace or not os.path.lexists(path)

        for name in names:
            file = f"{folder}/{name}.jpg" if is_unknown else f"{folder}/cropped/{name}.jpg"
            if is_free(file):
                break
        mask = f"{folder}/masks/{name}_mask.png"
        # A folder of unknown objects is read with its subfolders, so it has no masks; a mask that someone else has drawn stays.
        has_mask = bool(crop.mask) and not is_unknown and is_free(mask)
        return {
            "file": file,
            "class": crop.class_name,
            "photo": photo.path,
            "box": crop.box,
            "id": crop.id,
            "unknown": is_unknown,
            "sha256": hash_bytes(crop.jpeg),
            "mask": mask if has_mask else None,
            "mask_sha256": hash_bytes(crop.mask) if has_mask else None,
            "photo_bytes": photo.stamp[0],
            "photo_mtime_ns": photo.stamp[1],
            "photo_sha256": photo.digest,
        }


def report_edit(record: dict[str, Any], state: str, addition: str) -> Problem:
    """Return the problem of a crop that a person has edited or removed; `addition` is appended to its text."""
    verb = "was edited by hand and is kept" if state == "edited" else "was removed by hand and stays so"
    return Problem(record["photo"], record["id"], f"has a crop {record['file']} that {verb}{addition}")


def main(argv: Sequence[str] | None = None) -> int:
    """Cut crops with command-line arguments, and return the exit code."""
    return lct.run_program("crop", CropOptions, crop_photos, argv)


def crop_photos(options: CropOptions) -> None:
    """Cut labelled photos into one folder of crops a class; a later call makes the crops follow corrected labels."""
    check_options(options)
    labelled = read_labelled(options)
    for folder in labelled.folders.values():
        path = options.out / folder
        if path.is_dir() and not (path / "cropped").exists():
            images = [file.name for file in lct.visible_entries(path) if file.name.lower().endswith(lct.IMAGE_SUFFIXES)]
            if images:  # of a person
                problem = f"holds images of its own ({images[0]}), which a folder cropped in it would hide"
                raise lct.UserError(problem, str(path), "move them into a folder cropped there")
    with lct.lock_directory(options.out, "--out"):
        records = Records(options.out)
        records.check_photos(options.images, labelled.paths, labelled.stamps)
        for root in (options.out, unknown_folder(options.out)):
            for pattern in ("", "*/", "*/cropped/", "*/masks/"):  # leftovers of a job killed while writing
                for leftover in root.glob(f"{pattern}.*.[0-9]*.tmp"):
                    leftover.unlink()
        for note in labelled.notes:
            lct.show(note)
        if not options.image_bits:
            paths = [path for path, items in zip(labelled.paths, labelled.objects, strict=True) if items]
            options = dataclasses.replace(options, image_bits=find_photo_bits(options.images, paths))
        num_objects = sum(map(len, labelled.objects))
        totals = [lct.count_of(num_objects, "object"), lct.count_of(len(labelled.paths), "photo")]
        lct.show(f"{' in '.join(totals)}, {lct.count_of(len(labelled.folders), 'class')}")
        problems = labelled.problems + cut_photos(options, labelled, records)
        lct.write_json(options.out / "problems.json", [problem._asdict() for problem in problems])
        counts = write_records(options, records)
    unlabelled = records.crops.keys() - set(labelled.paths)
    print_summary(options, labelled, counts, problems, sum(len(records.crops[photo]) for photo in unlabelled))


def cut_photos(options: CropOptions, labelled: Labelled, records: Records) -> list[Problem]:
    """Make the crops follow the labels, photo by photo; return the problems.

    The records of a photo are on disk before its files change: after a kill, every file is known to be written by this tool.
    """
    cutter = Cutter(options)
    planner = Planner(labelled, cutter, records)
    progress_log = lct.LineFile(options.out / PROGRESS_NAME)
    bar = lct.progress((), len(labelled.paths), "cropping", unit="photo")
    problems: list[Problem] = []
    photos = plan_photos(options, labelled, records)
    with contextlib.closing(progress_log), contextlib.closing(bar):
        while chunk := list(itertools.islice(photos, 4 * lct.count_cores())):
            changes = [planner.plan(cut) for _, cut in lct.map_in_threads(cutter, chunk)]
            changed = [change for change in changes if change.writes or change.removals]
            entries = [{"photo": change.photo, "crops": change.records} for change in changed]
            if entries:
                progress_log.append("".join(to_line(entry) + "\n" for entry in entries))
            for _ in lct.map_in_threads(Change.write, changed):
                pass
            # After all writes: else a folder could go as empty just before a thread writes into it.
            for change in changed:
                change.remove()
            for change in changes:
                records.crops[change.photo] = [to_line(record) for record in change.records]
                problems += change.problems
            bar.update(len(chunk))
    return problems


def write_records(options: CropOptions, records: Records) -> Counter[str]:
    """Write `crops.jsonl`; return the number of crops, and of crops added, removed, moved and cut anew."""
    path = options.out / RECORDS_NAME
    # By file name, which a crop keeps when it moves to another class.
    earlier = {Path(record["file"]).name: record for record in read_lines(path)}
    lines = [text for photo in sorted(records.crops) for text in records.crops[photo]]
    counts: Counter[str] = Counter()
    for record in map(json.loads, lines):
        exists = "gone" not in record
        counts.update(crops=exists, unknown=exists and record["unknown"], masks=exists and bool(record["mask"]))
        counts[name_change(earlier.pop(Path(record["file"]).name, None), record)] += 1
    counts["removed"] = len(earlier)
    lct.write_bytes(path, "".join(f"{text}\n" for text in lines).encode())
    (options.out / PROGRESS_NAME).unlink(missing_ok=True)
    return counts


def name_change(old: dict[str, Any] | None, record: dict[str, Any]) -> str:
    """Return how a crop has changed since the last call, as a key of the counts."""
    if old is None:
        return "added"
    if (old["file"], old["unknown"]) != (record["file"], record["unknown"]):
        return "moved"
    is_same = (old["sha256"], old["mask_sha256"]) == (record["sha256"], record["mask_sha256"])
    return "unchanged" if is_same else "cut anew"


def print_summary(
    options: CropOptions, labelled: Labelled, counts: Counter[str], problems: Sequence[Problem], num_unlabelled: int
) -> None:
    """Print the problems, the numbers of crops and of changes, and the command to train on the crops.

    Raises:
        UserError: there is no crop of a class.
    """
    if counts["crops"] == counts["unknown"]:
        first = f": {problems[0]}" if problems else ""
        if counts["unknown"] and labelled.folders.keys() <= labelled.unknown:
            reason = f"has {counts['unknown']:,} crops of no class, and none of a class: all labels are of --unknown"
            raise lct.UserError(reason, options.describe("out"), "name fewer classes with --unknown")
        raise lct.UserError(f"holds not one crop of a class{first}", options.describe("out"), "see problems.json in it")
    for problem in problems[:MAX_SHOWN]:
        lct.show(lct.printable(f"  {problem}"))
    if len(problems) > MAX_SHOWN:
        lct.show(f"  and {len(problems) - MAX_SHOWN:,} more")
    if num_unlabelled:
        lct.show(f"crops of photos that these labels do not name, which stay: {num_unlabelled:,}")
    unused = sorted(labelled.unknown - labelled.folders.keys())
    if unused:
        lct.show(f"warning: --unknown {shlex.join(unused)}: no object is of such a class")
    suspects = [name for name in labelled.folders if name.lower() in lct.UNKNOWN_NAMES and name not in labelled.unknown]
    if suspects:
        names = ", ".join(map(repr, suspects))
        lct.show(f"warning: {names} will be trained as a class; --unknown {shlex.join(suspects)} sets it apart")
    changes = ", ".join(f"{counts[change]:,} {change}" for change in ("added", "removed", "moved", "cut anew"))
    lct.show(
        f"{lct.count_of(counts['crops'], 'crop')}, {counts['masks']:,} with a mask, {counts['unknown']:,} of no class: {changes};"
        f" {lct.count_of(len(problems), 'problem')} (problems.json)\nwritten: {options.out}; train with"
    )
    command = ["python", lct.SCRIPT_NAME, "--data_root", options.out, "--out_dir", f"{options.out.resolve()}_run"]
    command += ["--group_regex", GROUP_REGEX]
    # The crops have 8 bits; the run needs the bits for the photos that it will label.
    command += ["--image_bits", *options.image_bits] if options.image_bits else []
    command += ["--unknown_dir", unknown_folder(options.out)] if counts["unknown"] else []
    lct.show(shlex.join(map(str, command)))


if __name__ == "__main__":
    lct.exit_process(main())
