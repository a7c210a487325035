"""Sections 03, 05 and 17: names and files that are odd or meant to do harm. Each costs itself, and is named with its reason."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import socket
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_image, image_bytes, make_dataset
from killing import Nursery
from PIL import Image

import lct_dino3 as lct

SETTINGS = (
    "--model_id test_resnet --no-pretrained --img_size 32 --batch 8 --workers 0 --gpus 0 --emb_dim 16 --epochs 1"
).split()
MARKUP = "<script>alert('x')</script>&\"%s{{7*7}}"


def scan(nursery: Nursery, root: Path, out_dir: Path, *flags: object) -> tuple[dict[str, str], dict[str, Any], str]:
    """Return {path: reason} of the quarantined, the data report, and what was printed."""
    code, text = nursery.run("scan", "--data_root", root, "--out_dir", out_dir, *flags)
    assert code == 0, text
    report = json.loads((out_dir / "data_report.json").read_text("utf-8"))
    return {item["path"]: item["reason"] for item in report["quarantined"]}, report, text


def is_clean(text: str) -> bool:
    """Say whether a terminal shows the text as it is: no control characters but line ends."""
    return re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", text) is None


# --- names

ODD_NAMES = {
    "newline": b"a\n2026-01-01 00:00:00  epoch 99 forged.png",
    "carriage return": b"a\rforged.png",
    "escape": b"a\x1b[31m\x1b]0;title\x07.png",
    "C1 control": "a\x9b31m.png".encode(),
    "no UTF-8": b"\xff\xfe\xe9.png",
    "line separator": "a\u2028b.png".encode(),
}


def test_names_that_would_forge_a_log_line_or_reach_the_terminal_raw(nursery: Nursery, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", {"a": 4, "b": 4})
    for name in ODD_NAMES.values():
        (Path(os.fsdecode(os.fsencode(root / "a") + b"/" + name))).write_bytes(image_bytes(draw_image(1, 7), "PNG"))
        folder = Path(os.fsdecode(os.fsencode(root) + b"/" + name.replace(b".png", b"")))
        folder.mkdir()
        (folder / "1.png").write_bytes(b"x")
    quarantined, report, text = scan(nursery, root, tmp_path / "scan")
    named = [path for path, reason in quarantined.items() if "not UTF-8, or has control characters" in reason]
    assert len(named) == 2 * len(ODD_NAMES) and report["num_usable"] == 8
    assert is_clean(text) and all(is_clean(path) for path in quarantined)
    code, text = nursery.run("--data_root", root, "--out_dir", tmp_path / "run", *SETTINGS)
    assert code == 0 and is_clean(text)
    log = (tmp_path / "run" / "train.log").read_text("utf-8")
    assert is_clean(log) and "epoch 99" in log
    assert not [line for line in log.splitlines() if re.match(r"\S+ \S+  (epoch 99|forged)", line)]


def test_names_with_markup_quotes_and_255_bytes_train_and_stay_text_in_the_report(
    nursery: Nursery, tmp_path: Path
) -> None:
    names = [
        MARKUP.replace("/", "∕"),
        "'; DROP TABLE--",
        "ё" * 127 + "a",
        '"quoted" \\ $(id) `id`',
        "-rf",
        "NaN",
        "null",
    ]
    root = make_dataset(tmp_path / "data", dict.fromkeys(names, 4))
    long_name = "я" * 125 + "b.png"
    (root / names[0] / "0000.png").rename(root / names[0] / long_name)
    (root / names[1] / "0000.png").rename(root / names[1] / "<img src=x onerror=alert(1)>.png")
    assert len(names[2].encode()) == len(long_name.encode()) == 255
    quarantined, report, _ = scan(nursery, root, tmp_path / "scan")
    assert quarantined == {} and set(report["classes"]) == set(names)
    code, text = nursery.run("--data_root", root, "--out_dir", tmp_path / "run", *SETTINGS)
    assert code == 0, text
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page
    gallery, _ = lct.load_gallery(tmp_path / "run" / "prototypes.npz")
    assert set(gallery.class_names) == set(names) and any(path.endswith(long_name) for path in gallery.stack_paths)


def test_twins_by_unicode_form_and_by_case(nursery: Nursery, tmp_path: Path) -> None:
    import unicodedata

    forms = [unicodedata.normalize(form, "ключ й") for form in ("NFC", "NFD")]
    root = make_dataset(tmp_path / "data", {**dict.fromkeys(forms, 4), "Hammer": 4, "hammer": 4})
    for index, form in enumerate(forms):  # and two files whose names are twins
        draw_image(5, index).save(root / "hammer" / f"{form}.png")
    quarantined, report, _ = scan(nursery, root, tmp_path / "scan")
    assert quarantined == {} and {name: row["usable"] for name, row in report["classes"].items()} == {
        forms[0]: 8,
        "Hammer": 4,
        "hammer": 6,
    }
    assert any("2 folders are all named" in line for line in report["warnings"])
    assert any("Hammer, hammer differ only in case" in line for line in report["warnings"])


def test_a_class_map_cannot_bring_in_control_characters(nursery: Nursery, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", {"a": 4, "b": 4})
    lines = [f'"new{escape}name": [a]\n' for escape in (r"\n", r"\e[31m", r"\u2028", r"\0")]
    for line in (*lines, 'a: "new\\tname"\n'):
        (tmp_path / "map.yaml").write_text(line, "utf-8")
        code, text = nursery.run(
            "scan", "--data_root", root, "--out_dir", tmp_path / "x", "--class_map", tmp_path / "map.yaml"
        )
        assert code == 2 and "control characters" in text and is_clean(text)


def test_paths_on_the_command_line_reach_the_terminal_escaped(nursery: Nursery, tmp_path: Path) -> None:
    for flags in (
        ("--data_root", "\x1b[31mno\nwhere"),
        ("--data_root", tmp_path, "--class_map", "\x1b]0;x\x07"),
        ("\x1b[1m",),
    ):
        code, text = nursery.run("scan", "--out_dir", tmp_path / "run", *flags)
        assert code == 2 and "\x1b" not in text and "\x07" not in text


# --- things that are no files


def test_links_in_circles_pipes_sockets_devices_and_folders_named_jpg(nursery: Nursery, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", {"a": 4, "b": 4})
    folder = root / "a"
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "folder.jpg").mkdir()
    (folder / "up.jpg").symlink_to("..")
    (folder / "circle").symlink_to("circle")
    (root / "circle").symlink_to("circle")
    (root / "up").symlink_to(".")
    (root / "file").write_text("no folder")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "good link.png").symlink_to("0000.png")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # names of sockets are limited to 108 bytes
        server.bind("socket.jpg")
        (tmp_path / "map.yaml").write_text("null: [up]")
        quarantined, report, _ = scan(nursery, root, tmp_path / "scan", "--class_map", tmp_path / "map.yaml")
    kinds = ("circle", "dangling", "device", "folder", "pipe", "socket", "up")
    assert set(quarantined) == {f"a/{kind}.jpg" for kind in kinds}
    assert set(quarantined.values()) <= {"is not a regular file", os.strerror(40)}
    assert report["classes"]["a"]["usable"] == 5


def test_a_file_that_becomes_a_pipe_after_it_was_listed_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(lct.ImageError, match="not a regular file"):
        lct.load_image(tmp_path / "pipe.jpg")
    with pytest.raises(lct.ImageError, match="not a regular file"):
        lct.load_image("/dev/zero")


@pytest.mark.skipif(not Path("/proc/version").is_file(), reason="has no file that hides its size")
def test_a_file_that_does_not_tell_its_size_is_read_whole() -> None:
    assert Path("/proc/version").stat().st_size == 0
    assert lct.read_file("/proc/version") == Path("/proc/version").read_bytes() != b""


def holds_for_nobody(folder: Path, check: Callable[[], bool]) -> bool:
    """Return what `check` says in a child without the rights of root, which can reach `folder`."""
    for path in (folder, *folder.parents):
        if path != Path("/") and path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | 0o055)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            code = int(not check())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="drops the rights of root in a child")
def test_folders_and_files_without_permission(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", {"a": 4, "b": 4, "locked": 4})
    (root / "a" / "0000.png").chmod(0)
    (root / "locked").chmod(0)

    def check() -> bool:
        listing = lct.list_images(root)
        _, reason = lct.check_image(root, "a/0000.png")
        says = [what for path, what in listing.problems if path == "locked"]
        return reason == "Permission denied" and says == ["the folder cannot be read: Permission denied"]

    assert holds_for_nobody(tmp_path, check)


@pytest.mark.skipif(os.geteuid() != 0, reason="drops the rights of root in a child")
def test_a_data_root_or_a_split_folder_without_permission(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_dataset(tmp_path / "data" / split, {"a": 4, "b": 4})
    (tmp_path / "data" / "train").chmod(0)
    (tmp_path / "shut").mkdir(mode=0)

    def check() -> bool:
        with pytest.raises(lct.UserError, match="shut: Permission denied"):
            lct.scan_dataset(lct.Config(data_root=tmp_path / "shut", out_dir=tmp_path / "run"))
        listing = lct.list_images(tmp_path / "data", splits="from_folders")
        return (
            listing.problems == [("train", "the folder cannot be read: Permission denied")] and len(listing.paths) == 8
        )

    assert holds_for_nobody(tmp_path, check)


@pytest.mark.skipif(os.geteuid() != 0, reason="drops the rights of root in a child")
@pytest.mark.parametrize("is_mask", [False, True])
def test_a_file_that_could_not_be_read_is_read_again_and_a_broken_one_is_not(is_mask: bool, tmp_path: Path) -> None:
    """A permission that comes back changes neither size nor mtime."""
    paths, read = ["bad.png", "shut.png"], []
    real = functools.partial(lct.check_mask, masks_dirname="") if is_mask else lct.check_image

    def check_file(root: Path, path: str) -> tuple:
        read.append(path)
        return real(root, path)

    Image.fromarray(np.eye(24, dtype=np.uint8) * 255).save(tmp_path / "shut.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "shut.png").chmod(0)
    (tmp_path / "run").mkdir()
    for name in ("run", "shut.png"):
        os.chown(tmp_path / name, 65534, 65534)
    memory = lct.FileMemory(tmp_path / "run")
    dtype = lct.MASK_DTYPE if is_mask else lct.IMAGE_DTYPE

    def check() -> bool:
        _, first = lct.check_files(tmp_path, paths, "file", dtype, check_file, memory)
        memory.save()
        (tmp_path / "shut.png").chmod(0o644)
        _, second = lct.check_files(tmp_path, paths, "file", dtype, check_file, memory)
        is_read_again = sorted(read) == [*paths, paths[1]]
        return first[paths[1]] == "Permission denied" and [*second] == paths[:1] and is_read_again

    assert holds_for_nobody(tmp_path, check)


# --- contents


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """Return a PNG with a text of 200 MB in 200 KB."""
    whole = png_header(8, 8)
    data = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    bomb = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return whole[:33] + bomb + whole[33:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/owned) (w) file closefile showpage\n%%EOF\n"
FOREIGN = {
    "eps.jpg": EPS,
    "pdf.jpg": b"%PDF-1.4\n1 0 obj <</Type /Catalog>> endobj\n%%EOF\n",
    "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "gif.jpg": b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff!\xf9\x04\x01\0\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;",
    "html.webp": b"<html></html>",
    "zip.tif": b"PK\x05\x06" + bytes(18),
    "elf.bmp": b"\x7fELF" + bytes(60),
    "nothing.jpg": bytes(4096),
}


def test_only_the_five_decoders_are_ever_tried(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(tmp_path / "data", {"a": 4, "b": 4})
    for name, content in FOREIGN.items():
        (root / "a" / name).write_bytes(content)
    for kind in ("ICO", "TGA", "PPM", "PCX", "SGI", "JPEG2000", "DDS"):
        (root / "b" / f"{kind}.jpg").write_bytes(image_bytes(draw_image(1, 1).resize((32, 32)), kind))
    quarantined, _, _ = scan(nursery, root, tmp_path / "scan")
    assert len(quarantined) == len(FOREIGN) + 7
    assert set(quarantined.values()) == {"is no JPEG, PNG, BMP, WebP or TIFF"}

    def go_off(*_: object) -> None:
        raise SystemExit("another decoder was tried")

    Image.init()
    for kind in Image.OPEN.keys() - {*lct.IMAGE_FORMATS}:
        monkeypatch.setitem(Image.OPEN, kind, (go_off, go_off))
    for path in (*sorted((root / "a").iterdir()), *sorted((root / "b").iterdir())):
        lct.check_image(root, path)


def test_bombs_are_refused_by_their_header_or_cost_little(nursery: Nursery, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", {"a": 4, "b": 4})
    claims = {
        "900": (30_000, 30_000),
        "120": (12_000, 10_000),
        "200": (20_000, 10_000),
        "wide": (2**31 - 1, 1),
        "long": (1, 2**31 - 1),
    }
    for name, size in claims.items():
        (root / "a" / f"{name}.png").write_bytes(png_header(*size))
    (root / "a" / "text.png").write_bytes(text_bomb())
    quarantined, _, text = scan(nursery, root, tmp_path / "scan")
    assert set(quarantined) == {f"a/{name}.png" for name in (*claims, "text")}
    assert all(reason for reason in quarantined.values()) and "Warning" not in text
    assert "is more than 100 megapixels" in quarantined["a/120.png"], "Pillow's own limit is higher"


def read_megabytes(name: str) -> int:
    return int(re.search(name + r":\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def check_several(*paths: str) -> int:
    """Print how many MB checking images adds to this process, several at a time as in a scan; return how many are refused."""
    before = read_megabytes("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # imports have a higher peak
    with ThreadPoolExecutor(4) as pool:
        reasons = [reason for _, reason in pool.map(functools.partial(lct.check_image, Path()), paths)]
    print(read_megabytes("VmHWM") - before)
    return sum(map(bool, reasons))


def test_the_largest_images_that_are_accepted_take_less_than_1500_mb(nursery: Nursery, tmp_path: Path) -> None:
    """With a quarter of their pixels: 354 to 515 MB, 618 if several were decoded at a time, 723 if converted at once."""
    side = 5_000
    upright = Image.Exif()
    upright[0x0112] = 6
    Image.new("RGB", (side, side), (9, 8, 7)).save(tmp_path / "turned.jpg", exif=upright)
    Image.new("RGBA", (side, side), (9, 8, 7, 100)).save(tmp_path / "rgba.png", compress_level=1)
    Image.fromarray(np.full((side, side), 0.5, np.float32)).save(tmp_path / "float.tif", compression="tiff_lzw")
    paths = [tmp_path / name for name in ("turned.jpg", "rgba.png", "float.tif")]
    code, text = nursery.run(*paths, function=("test_hostile", "check_several"))
    assert code == 0 and 0 < int(text.splitlines()[-1]) < 560, text


@pytest.mark.parametrize("file_format", lct.IMAGE_FORMATS)
def test_cut_off_and_flipped_images_are_refused_or_read_and_never_raise(file_format: str) -> None:
    whole = image_bytes(draw_image(2, 3), file_format)
    rng = np.random.default_rng(0)
    refused = 0
    hurt = [whole[:length] for length in np.linspace(1, len(whole) - 1, 40).astype(int)]
    for _ in range(150):
        flipped = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 4)).tolist():
            flipped[position] ^= 1 << int(rng.integers(8))
        hurt.append(bytes(flipped))
    for data in hurt:
        try:
            image, _, _ = lct.decode_image(data)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except lct.ImageError as error:
            refused += 1
            assert str(error) and is_clean(str(error))
    assert refused >= 10


@pytest.mark.parametrize("orientation", range(9))
def test_orientations_are_undone_as_pillow_does_it(orientation: int) -> None:
    from PIL import ImageOps

    image = draw_image(1, 2).resize((40, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for file_format in ("PNG", "JPEG", "TIFF", "WEBP"):
        data = image_bytes(image, file_format, exif=exif)
        ours, _, _ = lct.decode_image(data)
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            assert np.array_equal(ours, np.asarray(ImageOps.exif_transpose(opened).convert("RGB")))


def test_an_image_of_many_strips_is_the_same_as_whole(patch_used: Callable) -> None:
    rng = np.random.default_rng(1)
    images = [
        Image.fromarray(rng.integers(0, 65536, (41, 37), dtype=np.uint16)),
        Image.fromarray(rng.random((41, 37), dtype=np.float32)),
        Image.fromarray(rng.integers(0, 256, (41, 37, 4), dtype=np.uint8), "RGBA"),
        Image.fromarray(rng.integers(0, 256, (41, 37, 4), dtype=np.uint8), "CMYK"),
        Image.fromarray(rng.integers(0, 256, (41, 37), dtype=np.uint8)).convert("1"),
        Image.fromarray(rng.integers(0, 256, (41, 37, 3), dtype=np.uint8)).quantize(16),
    ]
    whole = [lct.to_rgb(image) for image in images]
    patch_used(lct, "STRIP_PIXELS", 100)
    assert all(np.array_equal(lct.to_rgb(image), expected) for image, expected in zip(images, whole, strict=True))


# --- logs


def test_the_logs_stay_lines_whatever_is_written(tmp_path: Path) -> None:
    nasty = "a\nb\rc\x1b[31m\x00\u2028\udc80\ud800 \U0001f528"
    with lct.RunDirectory(tmp_path / "run") as run:
        run.event("odd", text=nasty, number=float("nan"), path=Path(nasty), nested={"x\n": [float("inf")]})
        run.log(nasty)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["event"] for line in lines[:-1]] == ["odd", "run_end"] and lines[-1] == b""
    assert all(
        re.match(r"\d{4}-\d\d-\d\d ", line) for line in (tmp_path / "run" / "train.log").read_text("utf-8").splitlines()
    )


def test_a_fingerprint_tells_apart_what_is_not_the_same() -> None:
    array = np.arange(6, dtype=np.int32)
    different = [
        *(("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), (["ab", "c"],), ({"ab": "c"},), ("\udcffabc",), (None,), ()),
        *((array,), (array.reshape(2, 3),), (array.astype(np.uint32),), (array[::-1],), (array.tolist(),)),
    ]
    assert len({lct.fingerprint(*parts) for parts in different}) == len(different)
    assert lct.fingerprint({"a": 1, "b": (2.5, "c")}) == lct.fingerprint({"b": [2.5, "c"], "a": np.int64(1)})
    assert lct.fingerprint(array.reshape(2, 3).T) == lct.fingerprint(array.reshape(2, 3).T.copy())
