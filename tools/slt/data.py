"""The crops of a run: which there are, which can be read, which are held out, and what is known of some of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lct_dino3 as lct  # before torch: it sets what torch reads when it is imported

# isort: split
import numpy as np
import torch
from slt.options import PretrainOptions
from slt.views import Images, resize

HELD_OUT_IMAGES = 512  # that two-view retrieval is measured on, and
HELD_OUT_SHARE = 0.1  # no more than this share of the crops, where there are no labelled ones
KNN_IMAGES = 4000  # labelled crops kept in memory
MAX_UNREADABLE = 0.1  # share of the files


@dataclass(frozen=True)
class Data:
    """The crops of a run."""

    train: Images
    held_out: Images
    fingerprint: str  # of the names and sizes of the files
    gallery: LabelledImages | None
    queries: LabelledImages | None  # None = the gallery answers for itself, one left out at a time


@dataclass(frozen=True)
class LabelledImages:
    """Crops whose class is known; nothing is trained on the classes."""

    pixels: torch.Tensor  # uint8 (N, 3, S, S)
    labels: np.ndarray  # (N,) int64


def list_files(options: PretrainOptions) -> list[tuple[str, int]]:
    """Return absolute path and size of the images that --train-dir names, each once.

    Raises:
        UserError: a path that is no image, or none at all.
    """
    files: dict[str, int] = {}
    for source in options.train_dir:
        if source.is_dir():
            tree = lct.list_image_tree(source)
            for path, reason in tree.problems:
                lct.show(f"warning: left out: {source / path}: {reason}")
            sizes = lct.stat_files(source, tree.paths)[:, 0].tolist()
            files |= {str((source / path).resolve()): size for path, size in zip(tree.paths, sizes, strict=True)}
        elif source.suffix.lower() in lct.IMAGE_SUFFIXES:
            files[str(source.resolve())] = source.stat().st_size
        else:
            remedy = f"give folders, or files of {' '.join(lct.IMAGE_SUFFIXES)}"
            raise lct.UserError("is no image", f"{options.place('train_dir')} {source}", remedy)
    where = f"{options.place('train_dir')} {' '.join(map(str, options.train_dir))}"
    if not files:
        raise lct.UserError("holds no images", where, f"of {' '.join(lct.IMAGE_SUFFIXES)}")
    if len(files) == 1:
        raise lct.UserError("holds one image, and learning needs others to tell it from", where, "give more")
    return sorted(files.items())


def check_files(paths: Sequence[str], side: int, where: str) -> tuple[list[int], np.ndarray | None]:
    """Decode every image once; return the numbers of those that can be used and, if a side is given, their squares.

    `where` says in a message what has named them.

    Raises:
        UserError: too many cannot be read.
    """

    def read(path: str) -> np.ndarray | str | None:
        try:
            image = lct.load_image(path)
        except lct.ImageError as error:
            return str(error)
        return resize(torch.from_numpy(image)[None].permute(0, 3, 1, 2), side) if side else None

    squares, good, bad = [], [], []
    for number, (path, result) in enumerate(
        lct.progress(lct.map_in_threads(read, paths), len(paths), "reading", "image")
    ):
        if isinstance(result, str):
            bad.append(f"{path}: {result}")
            lct.show(f"warning: left out: {bad[-1]}")
        else:
            good.append(number)
            squares.append(result)
    if len(bad) > MAX_UNREADABLE * len(paths):
        problem = f"{len(bad)} of {len(paths)} images cannot be read, such as {bad[0]}"
        raise lct.UserError(problem, where, "mend or remove them; a few are left out")
    return good, np.stack(squares) if side else None


def read_data(options: PretrainOptions) -> Data:
    """List and check the crops, and hold out some of them where there are no labelled ones to measure on.

    Raises:
        UserError: too few, too many that cannot be read, or labelled folders that are none.
    """
    files = list_files(options)
    paths = [path for path, _ in files]
    good, squares = check_files(paths, options.source_size, options.place("train_dir"))
    gallery = queries = None
    labelled_paths: list[str] = []
    if options.knn_dir:
        gallery, labelled_paths, names = read_labelled(options, options.knn_dir[0], None)
        if len(options.knn_dir) > 1:
            queries, labelled_paths, _ = read_labelled(options, options.knn_dir[1], names)
    order = np.random.default_rng((0, options.seed)).permutation(len(good))
    num_held_out = 0 if labelled_paths else min(HELD_OUT_IMAGES, max(2, int(HELD_OUT_SHARE * len(good))))
    chosen, held_out = np.sort(order[num_held_out:]), np.sort(order[:num_held_out])

    def take(rows: np.ndarray) -> Images:
        return Images([paths[good[row]] for row in rows], None if squares is None else squares[rows])

    if labelled_paths:
        picked = labelled_paths[:: -(-len(labelled_paths) // HELD_OUT_IMAGES)]
        readable, held_out_squares = check_files(picked, options.source_size, options.place("knn_dir"))
        held_out_images = Images([picked[number] for number in readable], held_out_squares)
    else:
        held_out_images = take(held_out)
    if len(chosen) < options.batch_size:
        where = options.said("batch_size")
        raise lct.UserError(f"is more than the {len(chosen)} crops to train on", where, "lower it, or give more crops")
    fingerprint = lct.fingerprint([[Path(path).name, size] for path, size in files], [int(row) for row in chosen])
    return Data(take(chosen), held_out_images, fingerprint, gallery, queries)


def read_labelled(
    options: PretrainOptions, folder: Path, names: list[str] | None
) -> tuple[LabelledImages, list[str], list[str]]:
    """Return the crops of a folder of classes, their paths, and the names of the classes.

    Args:
        options: for their size.
        folder: one folder a class, as lct_dino3.py has it.
        names: classes of the gallery; others cannot be answered.

    Raises:
        UserError: it holds no classes, or classes that the gallery lacks.
    """
    listing = lct.list_images(folder)
    where = f"{options.place('knn_dir')} {folder}"
    folders = [listing.class_of(path) for path in listing.paths]
    classes = sorted(set(folders))
    if names is None and len(classes) < 2:
        raise lct.UserError(f"holds {len(classes)} folders of images, and classes need two", where, "a folder a class")
    if lacking := sorted(set(classes) - set(names or classes)):
        raise lct.UserError(f"has classes that the gallery lacks: {', '.join(lacking[:3])}", where, "leave them out")
    names = names or classes
    rows = range(0, len(listing.paths), -(-len(listing.paths) // KNN_IMAGES) or 1)
    paths = [str((folder / listing.paths[row]).resolve()) for row in rows]
    good, squares = check_files(paths, options.image_size, where)
    labels = np.array([names.index(folders[rows[number]]) for number in good], dtype=np.int64)
    return (
        LabelledImages(torch.from_numpy(squares).permute(0, 3, 1, 2), labels),
        [paths[number] for number in good],
        names,
    )
