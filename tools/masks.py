#!/usr/bin/env python3
"""Draw missing masks with SAM-2, and show crops and masks on one sheet.

    python lct_dino3.py masks --data_root DATA --out_dir MASKS --sam2_ckpt sam2.1_hiera_large.pt
    python lct_dino3.py masks --data_root DATA --out_dir MASKS --no-draw      only the sheet, of the existing masks

`--auto_generate_masks` of training starts this program. A mask goes to `<class>/masks/<stem>_mask.png`, or below --masks_out. Each
is on disk before the next crop is begun, and `masks.jsonl` in out_dir records every attempt: after an interruption the same
command does only the remaining crops, and does not retry crops that were refused with the same settings.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import sys
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lct_dino3 as lct  # before torch: it sets environment variables that torch reads on import

# isort: split
import numpy as np
import torch
from fonts import load_font
from PIL import Image, ImageDraw

MAX_NAME_BYTES = 255 - len("..1234567.tmp")  # the longest name that `lct.atomic_file` can write
MASK_AREA_RANGE = (0.02, 0.98)  # plausible share of a crop that its object fills
SPECK_SHARE = 0.01  # of the largest part's area; the smaller jaw of pliers cut in two by a finger is far larger
HOLE_SHARE = 0.005  # of the object's area; the eye of a wrench and the finger ring of scissors are larger
SAM2_BOX_INSET = 0.02  # distance of the box prompt from the edges of the crop, as a share of the side
# A plain install would fetch a second torch (2.6 GB) and compile a CUDA extension that single images do not need.
SAM2_INSTALL = "SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2"
SAM2_URLS = {  # https://github.com/facebookresearch/sam2/blob/main/checkpoints/download_ckpts.sh
    "sam2": "https://dl.fbaipublicfiles.com/segment_anything_2/072824",
    "sam2.1": "https://dl.fbaipublicfiles.com/segment_anything_2/092824",
}
SAM2_SIZES = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}
MASKS_OUT_REMEDY = "give --masks_out DIR, a folder of your own that the masks go to"
PREVIEW_CROPS = 60  # on the sheet
PREVIEW_COLUMNS = 3  # crops a row
PREVIEW_SIDE = 176  # px of a panel
PREVIEW_PAPER = "#ffffff"
PREVIEW_EMPTY = "#e8eaee"
PREVIEW_GRAY = "#6b7280"
PREVIEW_RED = "#b91c1c"


@dataclass(frozen=True)
class MaskOptions(lct.Options):
    """Draw the masks that are missing with SAM-2, and show crops and masks on one sheet."""

    # fmt: off
    config: Path | None = lct.option(None, "YAML, TOML or JSON with options; what is typed wins", "data", metavar="FILE",
        once=True)
    data_root: Path | None = lct.option(None, "folder with one folder of crops a class", "data", metavar="DIR",
        needed=True, folder=lct.DATA_TREE)
    out_dir: Path | None = lct.option(None, "where masks.jsonl, masks_preview.png and data_report.json go", "data", metavar="DIR",
        needed=True)
    # Options that decide which crops are used, as in training.
    class_map: Path | None = lct.same_option("class_map")
    exclude: tuple[str, ...] = lct.same_option("exclude")
    data_fraction: float = lct.same_option("data_fraction")
    near_dup_bits: int = lct.same_option("near_dup_bits")
    val_split: float = lct.same_option("val_split")
    test_split: float = lct.same_option("test_split")
    splits: str = lct.same_option("splits")
    image_bits: tuple[int, ...] = lct.same_option("image_bits")
    group_regex: str | None = lct.same_option("group_regex")
    seed: int = lct.same_option("seed")
    masks_dirname: str = lct.same_option("masks_dirname")
    masks_out: Path | None = lct.same_option("masks_out")
    draw: bool = lct.option(True, "draw what is missing; --no-draw only shows what there is", "masks")
    sam2_cfg: str = lct.same_option("sam2_cfg")
    sam2_ckpt: Path | None = lct.option(None, "checkpoint of SAM-2 that belongs to the config", "masks", metavar="FILE")
    # sam2's automatic mask generator keeps predicted IoUs from 0.8 (pred_iou_thresh). Strict is safe: a crop without a mask is
    # used whole, while a wrong mask hides the object.
    mask_min_score: float = lct.option(0.8, "IoU that SAM-2 must predict for a mask to be written", "masks", low=0.0, high=1.0)
    mask_cleanup: bool = lct.option(True, "remove specks and fill small holes of drawn masks", "masks")
    gpus: int | None = lct.same_option("gpus")
    workers: int | None = lct.same_option("workers")
    precision: str = lct.same_option("precision")
    debug: bool = lct.same_option("debug")
    # fmt: on


def draw_masks(options: MaskOptions) -> None:
    """Draw a mask for every crop without one, show crops and masks in masks_preview.png, and write data_report.json."""
    lct.check_out_dir(options)
    out_dir = options.out_dir
    if options.gpus == 0:
        # While sam2 is imported and built, even for the CPU, it fills its tables on any visible GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    is_sam2_checked = options.draw and options.sam2_ckpt is not None
    if is_sam2_checked:
        check_sam2(options)
    runtime = lct.make_runtime(options.gpus, options.precision)
    scan = lct.scan_dataset(options)
    with lct.keep_memory(scan.memory):
        scan = lct.attach_masks(scan, options)
    requests = request_masks(scan, options) if options.draw else []
    if requests and not is_sam2_checked:  # without a checkpoint it is needed only if there is something to draw
        check_sam2(options)
    with lct.lock_directory(out_dir):
        scan.memory.save()
        if requests:
            lct.show(f"{len(requests):,} of {len(scan.records.paths):,} crops lack a usable mask")
            generate_masks(options, runtime, requests)
            scan = lct.attach_masks(scan, options)
            scan.memory.save()
        preview_masks(scan, out_dir)
        written = [str(out_dir / "masks_preview.png")]
        if not (out_dir / "metrics.jsonl").exists():  # a run keeps the data report of its first start
            lct.write_json(out_dir / "data_report.json", scan.report)
            written.append(str(out_dir / "data_report.json"))
    rows = {
        name: (row["usable"], row["masks"], row["made"], row["not_made"], row["usable"] - row["masks"])
        for name, row in scan.report["classes"].items()
    }
    lct.show(lct.format_table(("crops", "with mask", "by SAM-2", "not drawn", "without"), rows, 11))
    lct.show(lct.format_findings(scan.report))
    lct.show(f"written: {', '.join(written)}")


class MaskRequest(NamedTuple):
    """A crop that needs a mask."""

    path: str  # relative to data_root, for records and captions
    source: Path  # file of the crop
    target: Path  # file of the mask; the folder need not exist
    image_bits: tuple[int, ...] = ()


def request_masks(scan: lct.Scan, options: MaskOptions) -> list[MaskRequest]:
    """Return a request for each record without a mask. A file refused as a mask stays: the new mask gets another name."""
    records = scan.records
    root = (options.masks_out or options.data_root).absolute()
    num_crops = Counter(
        (lct.class_folder(path, options.splits), Path(path).stem)
        for path in (*scan.listing.paths, *scan.listing.excluded)
    )
    requests = []
    for row in np.flatnonzero(~records.has_mask).tolist():
        path = records.paths[row]
        folder = lct.class_folder(path, options.splits)
        crop = Path(path)
        names = [f"{crop.name}_mask.png"]
        if num_crops[folder, crop.stem] == 1:
            names.insert(0, f"{crop.stem}_mask.png")
        targets = [root / folder / options.masks_dirname / name for name in names]
        free = [target for target in targets if not os.path.lexists(target)]
        if free:
            requests.append(MaskRequest(path, options.data_root / path, free[0], records.image_bits))
    return requests


# A crop, uint8 (side, side, 3), resized to the model's input, and its height and width in px before that; or why it cannot be used.
Crop = tuple[np.ndarray, tuple[int, int]] | lct.ImageError


# SAM-2: the package, one of its configs, and the checkpoint for that config.


def check_sam2(options: MaskOptions) -> None:
    """Check before any work that masks can be drawn: package, config, checkpoint, and that they fit together.

    Reads the names and shapes in the checkpoint, not its hundreds of megabytes: 3 s for the large model.

    Raises:
        UserError: with the command that fetches what is missing.
    """
    _import_sam2()
    _find_sam2_checkpoint(options)
    _read_sam2_weights(options, _build_sam2(options))


class Sam2:
    """SAM-2, prompted for the one object that fills a crop."""

    def __init__(self, options: MaskOptions, runtime: lct.Runtime) -> None:
        _import_sam2()
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        model = _build_sam2(options)
        model.load_state_dict(_read_sam2_weights(options, model))
        self.side = model.image_size
        self._device = runtime.device
        self._is_bf16 = runtime.dtype == torch.bfloat16  # SAM-2 is not made for fp16, which older GPUs use
        with _quiet_sam2():
            self._predictor = SAM2ImagePredictor(model.to(runtime.device).eval())

    def propose(self, square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return three candidates for uint8 (side, side, 3): predicted IoUs float32 (3,), mask logits float32 (3, 256, 256)."""
        low = self.side * SAM2_BOX_INSET
        high = self.side * (1 - SAM2_BOX_INSET)
        with _quiet_sam2(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16):
            self._predictor.set_image(square)
            _, scores, logits = self._predictor.predict(
                box=np.array([low, low, high, high], np.float32),
                point_coords=np.array([[self.side / 2, self.side / 2]], np.float32),
                point_labels=np.array([1]),  # 1 = on the object
                multimask_output=True,
            )
        return scores, logits


def _import_sam2() -> None:
    try:
        with _quiet_sam2():
            import sam2.build_sam
            import sam2.sam2_image_predictor  # noqa: F401
    except Exception as error:  # RuntimeError if a clone of the sam2 repository shadows the package
        _raise_if_memory_is_short(error)
        problem = f"cannot be imported: {lct.printable(str(error)).split('. ')[0][:200]}"
        remedy = SAM2_INSTALL
        if importlib.util.find_spec("sam2") is None:
            problem = "is not installed"
            remedy = f"{SAM2_INSTALL}  (it takes the torch that is here)"
        raise lct.UserError(problem, "the package sam2", remedy) from error


def _build_sam2(options: MaskOptions) -> torch.nn.Module:
    """Build the model of --sam2_cfg on the CPU with random weights; leaves Hydra and the random generator as they were."""
    import sam2
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import MissingConfigException
    from sam2.build_sam import build_sam2

    hydra = GlobalHydra.instance().hydra
    root = Path(sam2.__path__[0])
    configs = sorted(path.relative_to(root).as_posix() for path in root.glob("configs/*/*.yaml"))
    known = [name for name in configs if "training" not in name]
    try:
        with _quiet_sam2(), torch.random.fork_rng(devices=[]):
            GlobalHydra.instance().clear()
            initialize_config_module("sam2", version_base="1.2")
            return build_sam2(options.sam2_cfg, None, device="cpu")
    except MissingConfigException as error:
        closest = difflib.get_close_matches(options.sam2_cfg, known, n=1)
        remedy = f"did you mean {closest[0]}?" if closest else f"it has {', '.join(known)}"
        raise lct.UserError("is no config of the sam2 package", options.describe("sam2_cfg"), remedy) from error
    except Exception as error:  # a config of another kind can cause any error, in Hydra, OmegaConf or the constructors
        _raise_if_memory_is_short(error)
        problem = f"cannot be built: {lct.printable(str(error)).split('. ')[0][:200]}"
        raise lct.UserError(problem, options.describe("sam2_cfg"), f"give one of {', '.join(known)}") from error
    finally:
        GlobalHydra.instance().hydra = hydra


@contextlib.contextmanager
def _quiet_sam2() -> Iterator[None]:
    """Silence sam2: it logs every image to the root logger, which thereby gets a handler, and makes torch warn of old calls."""
    handler = logging.NullHandler()
    level = logging.root.manager.disable
    logging.root.addHandler(handler)
    logging.disable(max(level, logging.INFO))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        logging.root.removeHandler(handler)


def _read_sam2_weights(options: MaskOptions, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Map the checkpoint into memory without executing anything in it, and check that its tensors fit the model.

    Raises:
        UserError: the checkpoint is missing, unreadable, not of SAM-2, or of another config.
    """
    path = _find_sam2_checkpoint(options)
    where = f"--sam2_ckpt {path}"
    remedy = _how_to_get_checkpoint(options.sam2_cfg)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or foreign file can cause any error: zip, pickle, I/O
        _raise_if_memory_is_short(error)
        is_foreign = not isinstance(error, OSError) and not zipfile.is_zipfile(path)
        reason = "it is not what torch.save writes" if is_foreign else lct.printable(str(error)).split(". ")[0][:200]
        raise lct.UserError(f"is no checkpoint, or not a complete one: {reason}", where, remedy) from error
    weights = payload.get("model") if isinstance(payload, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise lct.UserError("is no checkpoint of SAM-2: it has no 'model' with tensors", where, remedy)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    actual = {name: value.shape for name, value in weights.items()}
    unfit = [name for name in expected | actual if expected.get(name) != actual.get(name)]
    if unfit:
        examples = lct.printable(", ".join(map(str, unfit[:3])))
        verb = "is" if len(unfit) == 1 else "are"
        more = ", ..." if len(unfit) > 3 else ""
        problem = f"{lct.count_of(len(unfit), 'tensor')} {verb} missing, foreign or of another shape ({examples}{more})"
        raise lct.UserError(f"does not fit --sam2_cfg {options.sam2_cfg}: {problem}", where, remedy)
    return weights


def _find_sam2_checkpoint(options: MaskOptions) -> Path:
    path = options.sam2_ckpt
    remedy = _how_to_get_checkpoint(options.sam2_cfg)
    if path is None:
        raise lct.UserError("is missing: masks are drawn by SAM-2", "--sam2_ckpt", remedy)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise lct.UserError(problem, f"--sam2_ckpt {path}", remedy)
    return path


def _how_to_get_checkpoint(sam2_cfg: str) -> str:
    """Return the command that fetches the official checkpoint of a config, and the flag that names it."""
    match = re.search(r"(sam2(?:\.1)?)_hiera_(t|s|b\+|l)(?:\.yaml)?$", sam2_cfg)
    if not match:
        return "give the checkpoint that was trained with this config"
    name = f"{match[1]}_hiera_{SAM2_SIZES[match[2]]}.pt"
    return f"curl -LO {SAM2_URLS[match[1]]}/{name}  and then  --sam2_ckpt {name}"


def _raise_if_memory_is_short(error: Exception) -> None:
    """Raise the out-of-memory error behind `error`, if any, as on a GPU that others fill; Hydra wraps it in errors of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if lct.is_out_of_memory(cause):
            raise cause
        cause = cause.__cause__ or cause.__context__


# From candidates to a mask.


def _draw_mask(sam2: Sam2, crop: Crop, options: MaskOptions) -> tuple[float, float, str, np.ndarray | None]:
    """Return a mask's predicted IoU and share of the crop, NaN without one; why it is refused, or ''; and the mask, bool (H, W)."""
    if isinstance(crop, lct.ImageError):
        return math.nan, math.nan, str(crop), None
    square, size = crop
    scores, logits = sam2.propose(square)
    best = choose_mask(scores, (logits > 0).mean(axis=(1, 2)))
    # Like sam2, enlarges the logits instead of the mask, which gives smooth outlines.
    candidate = torch.from_numpy(logits[best])[None, None]
    enlarged = torch.nn.functional.interpolate(candidate, size, mode="bilinear")
    mask = enlarged[0, 0].numpy() > 0
    if options.mask_cleanup:
        mask = clean_mask(mask)
    score = float(scores[best])
    area = float(mask.mean())
    reason = judge_mask(score, area, options.mask_min_score)
    return score, area, reason, None if reason else mask


def choose_mask(scores: np.ndarray, areas: np.ndarray) -> int:
    """Return the index of the best of M candidates: highest predicted IoU among those of plausible area, else among all."""
    low, high = MASK_AREA_RANGE
    scores = np.nan_to_num(scores, nan=-1.0)
    return int(np.argmax(scores + 10.0 * ((areas >= low) & (areas <= high))))  # 10: more than any IoU


def clean_mask(mask: np.ndarray) -> np.ndarray:
    """Return bool (H, W) without specks and small holes; large parts, the eye of a wrench and finger rings remain.

    A speck touches no other part, not even at a corner, and is smaller than SPECK_SHARE of the largest part; a small hole is
    background enclosed by the object and smaller than HOLE_SHARE of the object.
    """
    from scipy.ndimage import label

    components, _ = label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    cleaned = (sizes >= max(1, SPECK_SHARE * sizes.max()))[components]
    holes, count = label(~cleaned)
    fill = np.bincount(holes.ravel(), minlength=count + 1) < HOLE_SHARE * cleaned.sum()
    for border in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):
        fill[border] = False
    return cleaned | fill[holes]


def judge_mask(score: float, area: float, min_score: float) -> str:
    """Return why a mask is refused, or '' if it is accepted."""
    low, high = MASK_AREA_RANGE
    if not score >= min_score:  # also NaN
        return f"score {score:.2f} is below --mask_min_score {min_score:g}"
    if area < low:
        return f"covers {area:.1%} of the crop, less than {low:.0%}"
    return f"covers {area:.1%} of the crop, more than {high:.0%}" if area > high else ""


# Drawing all masks; it can be interrupted anywhere.


def generate_masks(options: MaskOptions, runtime: lct.Runtime, requests: Sequence[MaskRequest]) -> None:
    """Draw the requested masks, and record the outcome of every attempt.

    Never touches an existing mask file, and does not retry a crop that was refused with the same settings. Each mask is on disk
    before the next crop is begun: after an interruption the next call does only the remaining crops.

    Raises:
        UserError: something is missing or does not fit together (see `check_sam2`), or a mask cannot be written.
    """
    jobs, settings = _plan_jobs(options, requests)
    if not jobs:
        return
    requests = [request for request, _ in jobs]
    for folder in sorted({request.target.parent for request in requests}):
        existing = lct.existing_folder(folder)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise lct.UserError(f"masks cannot be written into {folder}", str(existing), MASKS_OUT_REMEDY)
    lct.create_out_dir(options.out_dir)
    sam2 = Sam2(options, runtime)
    read = functools.partial(_read_crop, side=sam2.side)
    with (
        contextlib.closing(lct.LineFile(options.out_dir / lct.MASK_LOG_NAME)) as log,
        contextlib.closing(_read_ahead(requests, read, max(1, lct.count_workers(options.workers)))) as crops,
        lct.progress((), len(jobs), "masks", "crop") as bar,
    ):
        for (request, stamp), crop in zip(jobs, crops, strict=True):
            score, area, reason, mask = _draw_mask(sam2, crop, options)
            # The record goes first: a mask on disk then always has a score, and a record whose mask is missing is done again.
            values = (request.path, *stamp, score, area, reason or None, settings)
            record = lct.to_json(dict(zip(lct.MASK_RECORD_KEYS, values, strict=True)))
            log.append(json.dumps(record, ensure_ascii=False) + "\n")
            if mask is not None:
                _write_mask(request.target, mask)
            bar.update()


def _plan_jobs(
    options: MaskOptions, requests: Sequence[MaskRequest]
) -> tuple[list[tuple[MaskRequest, list[int]]], str]:
    """Return the requests left to do, with size and mtime in ns of each crop, and the hash of the settings for new records."""
    records = lct.read_mask_log(options.out_dir)
    missing = [request for request in requests if not os.path.lexists(request.target)]
    settings = _hash_settings(options) if missing else ""  # reads the whole checkpoint, which takes a second
    stamps = lct.stat_files(Path(), [str(request.source) for request in missing]).tolist()
    jobs = []
    for request, stamp in zip(missing, stamps, strict=True):
        record = records.get(request.path)
        # Without an area the crop could not be read, as on a disk that was away for a minute.
        was_refused = record is not None and record["area"] is not None and record["reason"]
        if not was_refused or [record["size"], record["mtime_ns"], record["settings"]] != [*stamp, settings]:
            jobs.append((request, stamp))
    return jobs, settings


def _hash_settings(options: MaskOptions) -> str:
    """Return a hash of all that decides whether a mask is accepted, 16 hex digits; the device does not count."""
    with open(_find_sam2_checkpoint(options), "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    recipe = (SAM2_BOX_INSET, MASK_AREA_RANGE, SPECK_SHARE, HOLE_SHARE)
    settings = (options.sam2_cfg, weights, options.mask_min_score, options.mask_cleanup, recipe)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _read_crop(request: MaskRequest, side: int) -> Crop:
    """Read a crop and resize it to the model's input, so that waiting crops are small however large the file is."""
    if len(os.fsencode(request.target.name)) > MAX_NAME_BYTES:
        return lct.ImageError("the name of its mask is too long")
    try:
        image = lct.load_image(request.source, request.image_bits)
    except lct.ImageError as error:
        return error
    square = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(square), image.shape[:2]


def _read_ahead(items: Sequence[Any], read: Callable[[Any], Any], num_threads: int) -> Iterator[Any]:
    """Yield `read(item)` in order, while threads read a few items ahead; closing it drops the reads not yet begun."""
    pool = ThreadPoolExecutor(num_threads)
    futures = deque()
    try:
        for item in items:
            futures.append(pool.submit(read, item))
            if len(futures) > 2 * num_threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _write_mask(target: Path, mask: np.ndarray) -> None:
    """Write bool (H, W) atomically as an 8-bit PNG of 0 and 255."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lct.atomic_file(target) as file:
            Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    except OSError as error:
        raise lct.UserError(f"cannot be written: {error.strerror or error}", str(target), MASKS_OUT_REMEDY) from error


# The sheet: crop, mask and masked crop side by side.


class MaskPreview(NamedTuple):
    """A crop on the sheet."""

    caption: str
    image: np.ndarray  # uint8 (H, W, 3)
    mask: np.ndarray | None  # (H, W) of bool or 0..255
    note: str = ""  # why it was refused


def preview_masks(scan: lct.Scan, out_dir: Path) -> None:
    """Write masks_preview.png: first the crops with the lowest scores of SAM-2, then other masks, spread over the classes."""
    records = scan.records
    row_of = {path: row for row, path in enumerate(records.paths)}
    drawn = [record for path, record in lct.read_mask_log(out_dir).items() if path in row_of]
    drawn.sort(key=lambda record: (record["score"] is not None, record["score"] or 0.0))
    chosen = [(row_of[record["path"]], record) for record in drawn[:PREVIEW_CROPS]]
    drawn_paths = {record["path"] for record in drawn}
    other_rows = [row for row in np.flatnonzero(records.has_mask).tolist() if records.paths[row] not in drawn_paths]
    num_others = min(len(other_rows), PREVIEW_CROPS - len(chosen))
    spread = np.linspace(0, len(other_rows) - 1, num_others).astype(int).tolist()
    items = []
    for row, record in chosen + [(other_rows[i], None) for i in spread]:
        with contextlib.suppress(lct.ImageError):  # gone since the scan
            image, mask, _ = lct.load_crop(records, row, 1)
            step = max(1, max(image.shape[:2]) // (4 * PREVIEW_SIDE))  # 60 photos of 24 megapixels would take 6 GB
            image = image[::step, ::step].copy()
            mask = None if mask is None else mask[::step, ::step].copy()
            score = note = ""
            if record is not None:
                score = "   nan" if record["score"] is None else f"   {record['score']:.2f}"
                note = record["reason"] or "" if mask is None else ""  # no note if drawn by hand since the refusal
            items.append(MaskPreview(records.paths[row] + score, image, mask, note))
    order = "the lowest scores first" if chosen else "spread over the classes"
    write_masks_preview(out_dir / "masks_preview.png", items, len(row_of), order)


def write_masks_preview(path: Path, items: Sequence[MaskPreview], total: int, order: str) -> None:
    """Write a contact sheet of some of `total` crops as PNG; its title states their `order`."""
    columns = max(1, min(PREVIEW_COLUMNS, len(items)))
    num_refused = sum(bool(item.note) for item in items)
    # Distances from crop to crop in px: panels, text, gap.
    step_x = 3 * PREVIEW_SIDE + 32
    step_y = PREVIEW_SIDE + (64 if num_refused else 44)
    sheet = Image.new("RGB", (max(24 + columns * step_x, 640), 72 + -(-len(items) // columns) * step_y), PREVIEW_PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"{len(items):,} of {total:,} crops, {order}" + (f"; {num_refused:,} refused" if num_refused else "")
    draw.text((24, 16), title, "black", load_font(20))
    draw.text((24, 44), "crop  |  mask  |  masked crop", PREVIEW_GRAY, load_font(13))
    for index, item in enumerate(items):
        _draw_preview(sheet, (24 + index % columns * step_x, 72 + index // columns * step_y), item)
    with lct.atomic_file(path) as file:
        sheet.save(file, "PNG")


def _draw_preview(sheet: Image.Image, corner: tuple[int, int], item: MaskPreview) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top = corner
    factor = PREVIEW_SIDE / max(item.image.shape[:2])
    size = tuple(max(1, round(factor * length)) for length in (item.image.shape[1], item.image.shape[0]))
    image = Image.fromarray(item.image).resize(size)
    panels: list[Image.Image | None] = [image, None, None]
    if item.mask is not None:
        mask = Image.fromarray((item.mask > 0).astype(np.uint8) * 255).resize(size)
        gray = Image.new("RGB", size, (lct.PADDING_GRAY,) * 3)
        panels[1:] = (mask.convert("RGB"), Image.composite(image, gray, mask))
    for index, panel in enumerate(panels):
        x = left + index * (PREVIEW_SIDE + 4)
        draw.rectangle((x, top, x + PREVIEW_SIDE - 1, top + PREVIEW_SIDE - 1), PREVIEW_EMPTY)
        if panel is None:
            middle = (x + PREVIEW_SIDE // 2, top + PREVIEW_SIDE // 2)
            draw.text(middle, "no mask", PREVIEW_GRAY, load_font(13), anchor="mm")
        else:
            sheet.paste(panel, (x + (PREVIEW_SIDE - panel.width) // 2, top + (PREVIEW_SIDE - panel.height) // 2))
    width = 3 * PREVIEW_SIDE + 2 * 4
    draw.text((left, top + PREVIEW_SIDE + 6), fit_text(item.caption, load_font(14), width), "black", load_font(14))
    draw.text((left, top + PREVIEW_SIDE + 26), fit_text(item.note, load_font(13), width), PREVIEW_RED, load_font(13))


def fit_text(text: str, font: Any, width: int) -> str:
    """Return `text` on one line of at most `width` px, shortened in the middle, because the ends of a path tell most."""
    text = lct.printable(text)
    if font.getlength(text) <= width:
        return text
    length = min(len(text) - 1, width // 3)  # no letter is narrower than 3 px
    while length > 2 and font.getlength(f"{text[: length // 2]}…{text[-(length // 2) :]}") > width:
        length -= 1
    return f"{text[: length // 2]}…{text[-(length // 2) :]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw masks and return the exit code."""
    return lct.run_program("masks", MaskOptions, draw_masks, argv)


if __name__ == "__main__":
    lct.exit_process(main())
