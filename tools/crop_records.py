"""The records that `crop` keeps of its crops: `crops.jsonl` in --out, and the progress of an interrupted job. No program."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lct_dino3 as lct

RECORDS_NAME = "crops.jsonl"  # one line per crop; a folder with this file was made by `crop`
# One line per photo, on disk before its crops are written: after a kill, `crop` recognises every file that it wrote.
PROGRESS_NAME = ".crops.progress.jsonl"
RECORD_FORM = {
    **dict.fromkeys("file class photo sha256 key".split(), str),
    **dict.fromkeys(("mask", "mask_sha256"), (str, type(None))),
    **{"box": [(int, float)], "id": object, "unknown": bool, "photo_bytes": int},
}


class Records:
    """The records of the crops in --out, as JSON texts by photo, from `crops.jsonl` and an interrupted job."""

    def __init__(self, out: Path) -> None:
        self.crops: dict[str, list[str]] = {}
        self.stale: dict[str, list[str]] = {}  # earlier records of each photo whose files may not have been written
        self.photo_bytes: dict[str, int] = {}
        for record in read_lines(out / RECORDS_NAME):
            self.crops.setdefault(record["photo"], []).append(to_line(record))
            self.photo_bytes[record["photo"]] = record["photo_bytes"]
        for entry in read_lines(out / PROGRESS_NAME):
            photo = entry["photo"]
            self.stale.setdefault(photo, []).extend(self.crops.get(photo, []))
            self.crops[photo] = [to_line(record) for record in entry["crops"]]
            self.photo_bytes.update((photo, record["photo_bytes"]) for record in entry["crops"])

    def check_photos(self, images: Path, paths: Sequence[str], sizes: Sequence[int]) -> None:
        """Refuse a photo with the name of a different, earlier one, as cameras reuse names: it would take over the earlier crops.

        Args:
            images: folder of the photos.
            paths: of the photos, relative to `images`.
            sizes: of the photos, in bytes.

        Raises:
            UserError: naming the first such photo.
        """
        for path, num_bytes in zip(paths, sizes, strict=True):
            earlier = self.photo_bytes.get(path, num_bytes)
            if earlier != num_bytes:
                problem = f"is not the photo that was cut before: it has {num_bytes:,} bytes, that one had {earlier:,}"
                remedy = "choose another --out, or give the folder above both sets of photos as --images"
                raise lct.UserError(problem, str(images / path), remedy)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `crops.jsonl` or of the progress file, where a kill may leave half a line at the end, which is skipped.

    Raises:
        UserError: a line that this tool cannot have written.
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
                problem = f"line {number} is damaged: {error}"
                raise lct.UserError(problem, str(path), "restore the file, or choose a new --out") from error
            yield entry


def check_record(record: dict[str, Any]) -> None:
    """Refuse a record that this tool cannot have written, because records decide which files are removed.

    Raises:
        ValueError: a field is missing, or a file is not below the folder.
    """
    lct.check_form(record, RECORD_FORM)
    is_below = all(not name.startswith("/") and ".." not in name.split("/") for name, _ in list_files(record))
    is_number = parse_number(record["file"]).isdecimal()
    if not is_below or not is_number or len(record["box"]) != 4:
        raise ValueError("names a file that is none of ours")


def list_files(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the file names of a crop and of its mask, if any, each with the hash of the file as written."""
    pairs = [(record["file"], record["sha256"]), (record["mask"], record["mask_sha256"])]
    return [(name, digest) for name, digest in pairs if name]


def parse_number(file: str) -> str:
    """Return the number at the end of a crop's file name, as text."""
    return Path(file).stem.rpartition("_")[2]


def to_line(value: Any) -> str:
    """Return a value as one line of ASCII JSON, without a newline."""
    return json.dumps(value, separators=(",", ":"))
