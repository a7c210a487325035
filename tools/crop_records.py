"""The records that `crop` keeps of its crops: `crops.jsonl` in --out, and the progress of an interrupted job. No program."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
        # Size in bytes, mtime in ns and hash of each photo when it was cut; older records have no mtime and no hash.
        self.photos: dict[str, tuple[int, int | None, str | None]] = {}
        for record in read_lines(out / RECORDS_NAME):
            self.crops.setdefault(record["photo"], []).append(to_line(record))
            self._add_photo(record)
        for entry in read_lines(out / PROGRESS_NAME):
            photo = entry["photo"]
            self.stale.setdefault(photo, []).extend(self.crops.get(photo, []))
            self.crops[photo] = [to_line(record) for record in entry["crops"]]
            for record in entry["crops"]:
                self._add_photo(record)

    def _add_photo(self, record: dict[str, Any]) -> None:
        stamp = (record["photo_bytes"], record.get("photo_mtime_ns"), record.get("photo_sha256"))
        self.photos[record["photo"]] = stamp

    def check_photos(self, images: Path, paths: Sequence[str], stamps: Sequence[Sequence[int]]) -> None:
        """Refuse a photo with the name of a different, earlier one, as cameras reuse names: it would take over the earlier crops.

        Reads photos of the same size that were written since.

        Args:
            images: folder of the photos.
            paths: of the photos, relative to `images`.
            stamps: size in bytes and mtime in ns of each photo.

        Raises:
            UserError: naming the first such photo.
        """
        rewritten = []
        for path, (num_bytes, mtime_ns) in zip(paths, stamps, strict=True):
            earlier_bytes, earlier_mtime, digest = self.photos.get(path, (num_bytes, mtime_ns, None))
            if earlier_bytes != num_bytes:
                raise _other_photo(images / path, f"it has {num_bytes:,} bytes, that one had {earlier_bytes:,}")
            if digest and earlier_mtime != mtime_ns:
                rewritten.append(path)
        hashed = lct.map_in_threads(lambda path: hash_file(images / path), rewritten)
        for path, digest in lct.progress(hashed, len(rewritten), "comparing photos", "photo"):
            if digest not in ("", self.photos[path][2]):
                raise _other_photo(images / path, "it has as many bytes, but others")


def _other_photo(path: Path, difference: str) -> lct.UserError:
    remedy = "choose another --out, or give the folder above both sets of photos as --images"
    return lct.UserError(f"is not the photo that was cut before: {difference}", str(path), remedy)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; '' if it cannot be read, which is reported where it is cut."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


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
