"""The crops of a run: lists and checks them, holds some out, and reads the labelled ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lct_dino3 as lct  # before torch: it sets environment variables that torch reads at import

# isort: split
import numpy as np
import torch
from slt.options import PretrainOptions
from slt.views import Images, resize

HELD_OUT_IMAGES = 512  # most crops for two-view retrieval
HELD_OUT_SHARE = 0.1  # largest share of the crops to hold out, if no labelled crops serve instead
KNN_IMAGES = 4000  # labelled crops in memory: of a larger folder every n-th of each class, about so many
MAX_UNREADABLE = 0.5  # share of the files that are left out if they cannot be read; above it the folder is at fault


@dataclass(frozen=True)
class Data:
    """The crops of a run."""

    train: Images
    held_out: Images
    fingerprint: str  # of names and sizes of all files, and of the choice of crops to train on
    gallery: LabelledImages | None
    queries: LabelledImages | None  # None: k-NN classifies each gallery crop by the others


@dataclass(frozen=True)
class LabelledImages:
    """Crops with labels, for evaluation only."""

    pixels: torch.Tensor  # uint8 (N, 3, S, S)
    labels: np.ndarray  # (N,) int64
    fingerprint: str  # of paths inside the folder and sizes of all its files


def read_data(options: PretrainOptions) -> Data:
    """List and check the crops; without labelled crops, hold out some of them for two-view retrieval.

    Raises:
        UserError: there are too few crops, too many of them cannot be read, or a labelled folder has no usable classes.
    """
    files = list_files(options)
    paths = [path for path, _ in files]
    readable, squares = check_files(paths, options.source_size, options.place("train_dir"))
    gallery = queries = None
    labelled_paths: list[str] = []
    if options.knn_dir:
        gallery, labelled_paths, names = read_labelled(options, options.knn_dir[0], None)
        where = f"{options.place('knn_dir')} {options.knn_dir[0]}"
        num_classes = len(np.unique(gallery.labels))
        if num_classes < 2:
            problem = "has readable crops of one class alone, and classes need two"
            raise lct.UserError(problem, where, "mend or remove the others")
        if len(options.knn_dir) > 1:
            queries, labelled_paths, _ = read_labelled(options, options.knn_dir[1], names)
        elif num_classes == len(gallery.labels):
            problem = "holds one crop of each class, and each is matched with the others"
            remedy = "give more crops, or a second folder with queries"
            raise lct.UserError(problem, where, remedy)
    order = np.random.default_rng((0, options.seed)).permutation(len(readable))
    num_held_out = 0 if labelled_paths else min(HELD_OUT_IMAGES, max(2, int(HELD_OUT_SHARE * len(readable))))
    train_rows = np.sort(order[num_held_out:])

    def select(rows: np.ndarray) -> Images:
        return Images([paths[readable[row]] for row in rows], None if squares is None else squares[rows])

    if labelled_paths:
        sample = labelled_paths[:: -(-len(labelled_paths) // HELD_OUT_IMAGES)]
        sample_indices, sample_squares = check_files(sample, options.source_size, options.place("knn_dir"))
        held_out = Images([sample[index] for index in sample_indices], sample_squares)
    else:
        held_out = select(np.sort(order[:num_held_out]))
    if len(train_rows) < options.batch_size:
        problem = f"is more than the {len(train_rows)} crops to train on"
        raise lct.UserError(problem, options.describe("batch_size"), "lower it, or give more crops")
    fingerprint = lct.fingerprint([[Path(path).name, size] for path, size in files], train_rows.tolist())
    return Data(select(train_rows), held_out, fingerprint, gallery, queries)


def list_files(options: PretrainOptions) -> list[tuple[str, int]]:
    """Return absolute path and size in bytes of each image in --train-dir, sorted and without duplicates.

    Raises:
        UserError: a file is no image, or there are fewer than two images.
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


def read_labelled(
    options: PretrainOptions, folder: Path, names: list[str] | None
) -> tuple[LabelledImages, list[str], list[str]]:
    """Read a folder of labelled crops; return the crops, their paths, and the class names that labels index.

    Args:
        options: give the size of the crops.
        folder: holds a folder per class, as for lct_dino3.py.
        names: class names of the gallery when queries are read; None for the gallery itself.

    Raises:
        UserError: a gallery has fewer than two classes, or queries have classes that the gallery lacks.
    """
    listing = lct.list_images(folder)
    where = f"{options.place('knn_dir')} {folder}"
    class_names = [listing.class_of(path) for path in listing.paths]
    classes = sorted(set(class_names))
    if names is None and len(classes) < 2:
        raise lct.UserError(f"holds {len(classes)} folders of images, and classes need two", where, "a folder a class")
    if not classes:
        raise lct.UserError("holds no folders of images", where, "a folder a class")
    if unknown := sorted(set(classes) - set(names or classes)):
        raise lct.UserError(f"has classes that the gallery lacks: {', '.join(unknown[:3])}", where, "leave them out")
    names = names or classes
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[name] for name in class_names], dtype=np.int64)
    step = -(-len(labels) // KNN_IMAGES)
    rows = np.concatenate([rows[::step] for rows in lct.rows_by_class(labels, len(names))])  # some of every class
    paths = [str((folder / listing.paths[row]).resolve()) for row in rows.tolist()]
    readable, squares = check_files(paths, options.image_size, where)
    fingerprint = lct.fingerprint(listing.paths, lct.stat_files(folder, listing.paths)[:, 0])
    images = LabelledImages(torch.from_numpy(squares).permute(0, 3, 1, 2), labels[rows[readable]], fingerprint)
    return images, [paths[index] for index in readable], names


def check_files(paths: Sequence[str], side: int, where: str) -> tuple[list[int], np.ndarray | None]:
    """Decode every image once; return the indices of the readable ones and, unless side is 0, squares uint8 (N, side, side, 3).

    Raises:
        UserError: more than MAX_UNREADABLE of the images cannot be read; the message places them at `where`.
    """

    def read(path: str) -> np.ndarray | str | None:
        try:
            image = lct.load_image(path)
        except lct.ImageError as error:
            return str(error)
        return resize(torch.from_numpy(image)[None].permute(0, 3, 1, 2), side) if side else None

    squares = []
    readable = []
    problems = []
    results = lct.progress(lct.map_in_threads(read, paths), len(paths), "reading", "image")
    for index, (path, result) in enumerate(results):
        if isinstance(result, str):
            problems.append(f"{path}: {result}")
            lct.show(f"warning: left out: {problems[-1]}")
        else:
            readable.append(index)
            squares.append(result)
    if len(problems) > MAX_UNREADABLE * len(paths):
        problem = f"{len(problems)} of {len(paths)} images cannot be read, such as {problems[0]}"
        raise lct.UserError(problem, where, "mend or remove them; up to half are left out")
    return readable, np.stack(squares) if side else None
