"""Data sets of meshes: downloads from a server on 127.0.0.1, archives that mean harm, the cache, the menu."""

from __future__ import annotations

import io
import os
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import dataset_loader
import meshes
import numpy as np
import pytest
from conftest import REPO
from dataset_loader import Link, download_file, extract_archive, load_dataset

import lct_dino3 as lct

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server:
    """One file over HTTP; how it fails is set by the test."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.tag = '"one"'
        self.cuts: list[int] = []  # bytes after which the next answers break off
        self.codes: list[int] = []  # of the next answers
        self.knows_ranges = True
        self.asked: list[str | None] = []  # Range of each request
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/set.zip"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        if self.codes:
            request.send_error(self.codes.pop(0))
            return
        start = 0
        if wanted and self.knows_ranges and request.headers.get("If-Range") == self.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(self.content):
            request.send_error(416)
            return
        body = self.content[start:]
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", self.tag)
        request.end_headers()
        request.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(dataset_loader, "TRY_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(dataset_loader, "TIMEOUT_SECONDS", 5)
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def make_zip(members: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# --- downloads


def test_a_download_goes_on_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    server.cuts = [1_000_000, 500_000]
    download_file(server.url, tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["set.zip"]


def test_another_start_goes_on_too_but_not_with_another_file(server: Server, tmp_path: Path) -> None:
    server.cuts = [700_000] + [0] * 3
    with pytest.raises(lct.UserError, match="ended after 700,000 of 3,000,000 bytes"):
        download_file(server.url, tmp_path / "set.zip")
    assert (tmp_path / "set.zip.part").stat().st_size == 700_000 and not (tmp_path / "set.zip").exists()
    server.content, server.tag, server.asked = CONTENT[::-1], '"two"', []
    download_file(server.url, tmp_path / "set.zip")
    assert server.asked == ["bytes=700000-"] and (tmp_path / "set.zip").read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_and_one_that_is_busy(server: Server, tmp_path: Path) -> None:
    server.knows_ranges, server.cuts, server.codes = False, [1_000_000], [503]
    download_file(server.url, tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT and len(server.asked) == 3


def test_a_part_that_is_whole_already_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(CONTENT)
    lct.write_json(tmp_path / "set.zip.part.json", {"url": server.url, "validator": '"one"', "length": len(CONTENT)})
    download_file(server.url, tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT


@pytest.mark.parametrize(("codes", "requests"), [([404], 1), ([500] * 9, 4)])
def test_what_cannot_be_fetched_is_one_sentence(
    server: Server, tmp_path: Path, codes: list[int], requests: int
) -> None:
    server.codes = codes
    with pytest.raises(lct.UserError, match="cannot be fetched") as caught:
        download_file(server.url, tmp_path / "set.zip")
    assert server.url in str(caught.value) and len(server.asked) == requests


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "closed connection"),
        (b"SSH-2.0\r\n\r\n", "SSH-2.0"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc", "many"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", "IncompleteRead"),
        (b"HTTP/1.1 302 F\r\nLocation: /set.zip\r\nContent-Length: 0\r\n\r\n", "redirect"),
    ],
)
def test_servers_that_end_early_or_speak_no_http_cost_one_sentence(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, said: str
) -> None:
    def reply(request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.wfile.write(answer)

    monkeypatch.setattr(server, "answer", reply)
    with pytest.raises(lct.UserError, match="cannot be fetched") as caught:
        download_file(server.url, tmp_path / "set.zip")
    assert said in caught.value.what and "\n" not in caught.value.what and not (tmp_path / "set.zip").exists()


def test_a_full_disk_is_not_called_a_network_failure(server: Server, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        with pytest.raises(lct.UserError, match="cannot be written: File too large"):
            download_file(server.url, tmp_path / "set.zip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(server.asked) == 1


# --- archives


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/etc/evil.off", "leads out"),
        ("a/../../evil.off", "leads out"),
        (r"..\evil.off", "leads out"),
        ("c:/evil.off", "leads out"),
    ],
)
def test_paths_that_lead_out_are_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(make_zip({"fine.off": "OFF", name: "OFF"}))
    with pytest.raises(lct.UserError, match=said):
        extract_archive(tmp_path / "set.zip", tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("*.off"))


def test_links_bombs_doubles_and_damage_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_loader, "MAX_UNPACKED_BYTES", 15_000_000)
    link = zipfile.ZipInfo("link.off")
    link.external_attr = 0o120777 << 16
    archives = {
        "is a link": make_zip({link: "/etc/passwd"}),
        "would unpack to": make_zip({"bomb.off": b"\0" * 30_000_000}),
        "is far too large": make_zip({name: b"\0" * 10_000_000 for name in ("one.off", "two.off")}),
        "is damaged": make_zip({"fine.off": "OFF\n" * 1000, "other.off": "OFF"}).replace(b"PK\x01\x02", b"PK\x01\x03"),
    }
    with pytest.warns(UserWarning):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.off", "1")
            archive.writestr("a.off", "2")
        archives["is there twice"] = buffer.getvalue()
    flipped = bytearray(make_zip({"fine.off": CONTENT[:1000]}))
    flipped[100] ^= 1
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("fine.off", os.urandom(1000))
    packed = bytearray((tmp_path / "lzma.zip").read_bytes())
    packed[60] ^= 255
    misspelt = make_zip({"стул.off": ""}).replace("стул".encode(), b"\xff" * 8)
    others = [("is damaged", bytes(data)) for data in (flipped, packed, misspelt)]
    for members in ({"a": "", "a/b.off": ""}, {"a/b.off": "", "a": ""}, {"a" * 300: ""}, {".": ""}):
        others.append(("cannot be unpacked", make_zip(members)))
    for said, data in [*archives.items(), *others]:
        (tmp_path / "set.zip").write_bytes(data)
        with pytest.raises(lct.UserError, match=said):
            extract_archive(tmp_path / "set.zip", tmp_path / "out")
        assert not (tmp_path / "out").exists(), said


# --- data sets


NET = {
    f"ModelNet10/{name}/{split}/{name}_000{number}.off": meshes.format_off(np.eye(3), [[0, 1, 2]])
    for name in ("chair", "table", "sofa")
    for number, split in ((1, "train"), (2, "test"))
}


def test_a_known_set_is_fetched_once_and_filtered(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = {
        name: link._replace(url=server.url if link.url else "") for name, link in dataset_loader.DATASET_LINKS.items()
    }
    monkeypatch.setattr(dataset_loader, "DATASET_LINKS", links)
    server.content = make_zip(NET)
    with monkeypatch.context() as patch, pytest.raises(lct.UserError, match="make room"):
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        load_dataset("chairs", tmp_path / "sets")
    (chairs,) = load_dataset("chairs", tmp_path / "sets")
    assert sorted(path.name for path in chairs.rglob("*.off")) == ["chair_0001.off", "chair_0002.off"]
    (whole,) = load_dataset("ModelNet10", tmp_path / "sets")
    assert len(list(whole.rglob("*.off"))) == 6 and len(server.asked) == 1
    assert not list((tmp_path / "sets").glob("*.zip*"))
    (tmp_path / "sets" / "modelnet40").mkdir()
    with pytest.raises(lct.UserError, match="was not made here"):
        load_dataset("modelnet40", tmp_path / "sets")


def test_a_killed_start_leaves_no_half_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = dataset_loader.draw_chair
    monkeypatch.setitem(dataset_loader.TOY_CLASSES, "table", lambda rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_dataset("toy", tmp_path)
    assert not (tmp_path / "toy").exists()
    monkeypatch.setitem(dataset_loader.TOY_CLASSES, "table", draw)
    (folder,) = load_dataset("toy", tmp_path)
    assert len(list(folder.rglob("*.off"))) == 240 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shapenetsem", "registered at https://shapenet.org"),
        ("modelnet11", "did you mean"),
        ("nowhere", "nor a known data set"),
    ],
)
def test_what_cannot_be_had_says_why(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(lct.UserError, match=said):
        load_dataset(name, tmp_path)
    assert set(dataset_loader.list_available_datasets()) == set(dataset_loader.DATASET_LINKS)


def test_a_folder_stands_for_itself_and_a_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy").mkdir()
    assert load_dataset("toy") == [Path("toy")], "a folder of that name wins"
    Path("mesh.off").write_text("OFF")
    with pytest.raises(lct.UserError, match="is a file"):
        load_dataset("mesh.off")


def test_only_what_was_made_here_is_cleared(tmp_path: Path) -> None:
    load_dataset("toy", tmp_path)
    (tmp_path / "modelnet10").mkdir()
    (tmp_path / "modelnet10" / "mine.off").write_text("OFF")
    (tmp_path / "mine").mkdir()
    (tmp_path / "modelnet40.zip.part").write_bytes(b"half")
    assert dataset_loader.clear_dataset_cache(tmp_path) == ["toy"]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["mine", "modelnet10"]
    assert (tmp_path / "modelnet10" / "mine.off").exists()
    assert dataset_loader.clear_dataset_cache(tmp_path / "nowhere") == []


def test_the_toy_set_is_always_the_same_and_closed(tmp_path: Path) -> None:
    import trimesh

    for name in ("first", "second"):
        dataset_loader.draw_toy_set(tmp_path / name, 3)
    files = sorted((tmp_path / "first").rglob("*.off"))
    assert len(files) == 12 == len({path.read_bytes() for path in files})
    for path in files:
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()
        mesh = meshes.read_mesh(path)
        bodies = trimesh.Trimesh(mesh.vertices, mesh.faces).split(only_watertight=False)
        assert all(body.is_watertight and body.volume > 0 for body in bodies), path.name


# --- the menu and the window


def test_the_menu_takes_answers_from_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, REPO / "tools" / "dataset_loader.py", "--download_path", tmp_path / "sets"]
    answers = "1\nclear\nshapenetcore\n99\n0\ntoy\n"
    done = subprocess.run(command, input=answers, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert f"ready: {tmp_path / 'sets' / 'toy'}" in done.stdout and "deleted: toy" in done.stdout
    assert "registered at" in done.stderr and "99" in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == 2, "a script must learn that an answer failed"
    assert done.stderr.count("99") == 1 and "answers that failed: 2" in done.stderr
    assert not (tmp_path / "sets" / "toy").exists(), "0 ends it, whatever follows"


def test_a_window_that_cannot_be_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PyQt5", None)
    with pytest.raises(lct.UserError, match="pip install PyQt5"):
        dataset_loader.select_local_dataset()


def test_a_window_that_is_closed_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    window = MagicMock()
    monkeypatch.setitem(sys.modules, "PyQt5", window)
    monkeypatch.setitem(sys.modules, "PyQt5.QtWidgets", window)
    monkeypatch.setenv("DISPLAY", ":0")
    for answer, folder in (("", None), ("/meshes", Path("/meshes"))):
        window.QFileDialog.getExistingDirectory.return_value = answer
        assert dataset_loader.select_local_dataset() == folder


def test_links_name_a_source_or_say_why_not() -> None:
    for name, link in dataset_loader.DATASET_LINKS.items():
        assert isinstance(link, Link) and (link.url.endswith(".zip") or name == "toy" or "login" in link.text)
