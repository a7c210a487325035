"""What `crop` remembers of its crops: `crops.jsonl` in --out, and what a job that was interrupted has done since. No program."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct

RECORDS_NAME = "crops.jsonl"  # a line a crop; a folder that holds it is ours
# A line a photo, which is on disk before its crops are written: whatever a kill leaves is known to be ours.
PROGRESS_NAME = ".crops.progress.jsonl"
RECORD_FORM = {
    **dict.fromkeys("file class photo sha256 key".split(), str),
    **dict.fromkeys(("mask", "mask_sha256"), (str, type(None))),
    **{"box": [(int, float)], "id": object, "unknown": bool, "photo_bytes": int},
}


class Records:
    """What `crops.jsonl` and an interrupted job say of the crops in --out, a JSON text a crop by photo."""

    def __init__(self, out: Path) -> None:
        self.crops: dict[str, list[str]] = {}
        self.stale: dict[str, list[str]] = {}  # of each photo whose files may not have been written
        self.photo_bytes: dict[str, int] = {}
        for record in read_lines(out / RECORDS_NAME):
            self.crops.setdefault(record["photo"], []).append(to_line(record))
            self.photo_bytes[record["photo"]] = record["photo_bytes"]
        for entry in read_lines(out / PROGRESS_NAME):
            photo = entry["photo"]
            self.stale.setdefault(photo, []).extend(self.crops.get(photo, []))
            self.crops[photo] = [to_line(record) for record in entry["crops"]]

    def check_photos(self, images: Path, paths: Sequence[str], sizes: Sequence[int]) -> None:
        """Refuse photos that have the names of others, as cameras give them, whose crops would be taken for theirs.

        Args:
            images: the folder of the photos.
            paths: of the photos, relative to it.
            sizes: of the photos, in bytes.

        Raises:
            UserError: naming the first.
        """
        for path, num_bytes in zip(paths, sizes, strict=True):
            before = self.photo_bytes.get(path, num_bytes)
            if before != num_bytes:
                what = f"is not the photo that was cut before: it has {num_bytes:,} bytes, that one had {before:,}"
                remedy = "choose another --out, or give the folder above both sets of photos as --images"
                raise lct.UserError(what, str(images / path), remedy)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of ours; half a line at its end, which a kill leaves, is passed over.

    Raises:
        UserError: a line is not what this tool writes.
    """
    is_progress = path.name == PROGRESS_NAME
    with open(path, "rb") if path.exists() else io.BytesIO() as file:
        for number, line in enumerate(file, 1):
            if is_progress and not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                if is_progress and not isinstance(entry["photo"], str):
                    raise ValueError("names no photo")
                for record in entry["crops"] if is_progress else [entry]:
                    check_record(record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"line {number} is damaged: {error}"
                raise lct.UserError(what, str(path), "restore the file, or choose a new --out") from error
            yield entry


def check_record(record: dict[str, Any]) -> None:
    """Refuse a record that this tool cannot have written: it says which files are removed.

    Raises:
        ValueError: it lacks something, or its files lie elsewhere.
    """
    lct.check_form(record, RECORD_FORM)
    is_below = all(not name.startswith("/") and ".." not in name.split("/") for name, _ in list_files(record))
    is_number = parse_number(record["file"]).isdecimal()
    if not is_below or not is_number or len(record["box"]) != 4:
        raise ValueError("names a file that is none of ours")


def list_files(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names of a crop and, if it has one, of its mask, each with the hash of what was written."""
    pairs = [(record["file"], record["sha256"]), (record["mask"], record["mask_sha256"])]
    return [(name, digest) for name, digest in pairs if name]


def parse_number(file: str) -> str:
    """Return the number that the name of a crop ends in."""
    return Path(file).stem.rpartition("_")[2]


def to_line(value: Any) -> str:
    """Return a value as one line of JSON, in ASCII."""
    return json.dumps(value, separators=(",", ":"))
