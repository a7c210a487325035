"""What users get wrong: one sentence on stderr that names what and where, exit code 2, nothing written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import REPO, TINY_RUN, draw_image, make_dataset, snapshot


@pytest.fixture
def refuse(tmp_path, call_main, capsys):
    """Return a function that runs a job that must be refused, and returns what stderr says."""

    def run(data: Path, *flags: object, out: Path | None = None, command: str = "train") -> str:
        out = out or tmp_path / "out" / "run"
        before = snapshot(data), snapshot(out), out.exists(), set(tmp_path.iterdir())
        code = call_main(command, "--data_root", data, "--out_dir", out, *TINY_RUN, *flags)
        text = capsys.readouterr().err
        assert code == 2, text
        assert text.startswith("error: ") and "Traceback" not in text
        assert (snapshot(data), snapshot(out), out.exists(), set(tmp_path.iterdir())) == before
        return text

    return run


# --- data_root


@pytest.mark.parametrize("command", ["train", "scan"])
def test_a_data_root_that_is_missing_or_no_folder_shows_the_expected_tree(tmp_path, refuse, command):
    (tmp_path / "file").write_text("x")
    assert "does not exist" in refuse(tmp_path / "nowhere", command=command)
    text = refuse(tmp_path / "file", command=command)
    assert "is not a folder" in text and str(tmp_path / "file") in text
    assert "hammer/" in text and "cropped/" in text


def test_a_data_root_without_class_folders_shows_the_expected_tree(tmp_path, refuse):
    (tmp_path / "data").mkdir()
    for _ in range(2):  # empty first, then with images right in it
        text = refuse(tmp_path / "data")
        assert "holds no class folders" in text and str(tmp_path / "data") in text and "pliers/" in text
        draw_image(0, 0).save(tmp_path / "data" / "loose.png")


def test_class_folders_without_images(tmp_path, refuse):
    for name in ("a", "b", "c/cropped", "c/not_cropped"):
        (tmp_path / "data" / name).mkdir(parents=True)
    draw_image(0, 0).save(tmp_path / "data/c/not_cropped/1.png")
    assert "holds no images" in refuse(tmp_path / "data")
    (tmp_path / "data/b/9.png").mkdir()
    assert "no usable images (the first: b/9.png: is not a regular file)" in refuse(tmp_path / "data")


def test_everything_excluded(small_data, refuse):
    assert "--exclude" in refuse(small_data, "--exclude", "*")


def test_one_class_is_not_enough(tmp_path, refuse):
    text = refuse(make_dataset(tmp_path / "data", {"hammer": 6}))
    assert "one class only (hammer)" in text and str(tmp_path / "data") in text


def test_a_class_whose_images_are_all_broken_is_named(tmp_path, refuse):
    root = make_dataset(tmp_path / "data", {"hammer": 6, "pliers": 6, "wrench": 6})
    for path in (root / "pliers").iterdir():
        path.write_bytes(b"no picture")
    text = refuse(root)
    assert "pliers: 0 usable, 6 broken" in text and "1 of 3 classes" in text
    assert "hammer" not in text and "lower --min_per_class" not in text, "which takes no class without images"


def test_all_images_broken(tmp_path, refuse):
    root = make_dataset(tmp_path / "data", {"hammer": 3, "pliers": 3})
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    text = refuse(root)
    assert "none of 6 images can be read" in text and "hammer/0000.png: the file is empty" in text


def test_all_classes_below_min_per_class_are_listed(tmp_path, refuse):
    root = make_dataset(tmp_path / "data", {"a": 9, "few": 2, "fewer": 1, "z": 9})
    (root / "none").mkdir()
    text = refuse(root)
    assert all(part in text for part in ("few: 2 usable", "fewer: 1 usable", "none: 0 usable", "3 of 5 classes"))
    assert "9 usable" not in text and "lower --min_per_class" in text
    assert "a: 9 usable" in refuse(root, "--min_per_class", 10)


def test_splits_that_would_be_empty(tmp_path, refuse):
    root = make_dataset(tmp_path / "data", {"a": 4, "b": 4})
    text = refuse(root, "--group_regex", r"^(\d)")  # all names begin with 0: one group
    assert "8 images in 1 group" in text and "leave none for val" in text and "--group_regex" in text
    text = refuse(root, "--group_regex", r"^000([01])", "--exclude", "000[23].*", "--min_per_class", 2)  # two groups
    assert "4 images in 2 groups leave none for test" in text


def test_identical_images_everywhere_leave_nothing_for_val(tmp_path, refuse):
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(0, 0).save(tmp_path / "data" / name)
    assert "leave none for val" in refuse(tmp_path / "data")


@pytest.mark.parametrize(
    "pattern, complaint", [("(", "regular expression"), ("a", "0 capture groups"), ("(a)(b)", "2 capture groups")]
)
def test_group_regex_that_cannot_be_used(small_data, refuse, pattern, complaint):
    text = refuse(small_data, "--group_regex", pattern)
    assert complaint in text and f"--group_regex {pattern}" in text


def test_group_regex_that_matches_nothing_shows_a_name(small_data, refuse):
    text = refuse(small_data, "--group_regex", r"^(src\d+)_")
    assert "matches no file name" in text and "0000.png" in text


# --- out_dir


@pytest.mark.parametrize("command", ["train", "scan"])
def test_out_dir_inside_the_data(tmp_path, refuse, command):
    root = make_dataset(tmp_path / "data", {"a": 3, "b": 3})
    (tmp_path / "link").symlink_to(root / "a")
    for out in (root, root / "run", root / "a/deep/run", tmp_path / "link" / "run", root / ".." / "data" / "run"):
        assert "inside data_root" in refuse(root, out=out, command=command)


def test_out_dir_that_is_a_file_or_below_one(tmp_path, small_data, refuse):
    (tmp_path / "file").write_text("mine")
    assert "is a file, not a folder" in refuse(small_data, out=tmp_path / "file")
    assert "not a folder that can be written to" in refuse(small_data, out=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_out_dir_with_foreign_files(tmp_path, small_data, refuse):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("mine")
    for flags in ((), ("--overwrite",)):
        text = refuse(small_data, *flags, out=tmp_path / "thesis")
        assert "neither empty nor a run" in text and str(tmp_path / "thesis") in text


def test_a_project_folder_is_no_run_because_it_has_a_config_json(tmp_path, small_data, refuse):
    (tmp_path / "project").mkdir()
    for name in ("config.json", "train.py"):
        (tmp_path / "project" / name).write_text("mine")
    for flags in ((), ("--overwrite",)):
        assert "neither empty nor a run" in refuse(small_data, *flags, out=tmp_path / "project")


@pytest.mark.parametrize(("command", "name"), [("train", "metrics.jsonl"), ("scan", "data_report.json")])
def test_a_file_of_such_a_name_alone_makes_no_run(tmp_path, small_data, refuse, command, name):
    (tmp_path / "mine").mkdir()
    for other in (name, "report.html", "prototypes.npz"):
        (tmp_path / "mine" / other).write_text('{"mine": 1}\n')
    assert "neither empty nor a run" in refuse(small_data, out=tmp_path / "mine", command=command)
    assert {path.read_text() for path in (tmp_path / "mine").iterdir()} == {'{"mine": 1}\n'}


def test_unknown_objects_are_not_among_the_known(tmp_path, small_data, refuse):
    for folder, count in ((small_data, 24), (small_data / "hammer", 8), (small_data.parent, 24)):
        text = refuse(small_data, "--unknown_dir", folder, out=tmp_path / "run")
        assert f"holds {count} of the images to train on" in text


def test_a_class_that_is_left_out_may_be_the_unknown(tmp_path, small_data, call_main, capsys):
    words = ("scan", "--data_root", small_data, "--out_dir", tmp_path / "scan", "--exclude", "hammer/*")
    assert call_main(*words, "--unknown_dir", small_data / "hammer") == 0, capsys.readouterr().err


def test_a_folder_whose_name_begins_that_of_the_data_holds_none_of_them(tmp_path, small_data, call_main, capsys):
    root = shutil.copytree(small_data, tmp_path / "crops_2")
    unknown = shutil.copytree(small_data / "hammer", tmp_path / "crops")
    words = ("scan", "--data_root", root, "--out_dir", tmp_path / "scan", "--unknown_dir", unknown)
    assert call_main(*words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "scan"])
def test_data_inside_out_dir_is_never_moved_aside(tmp_path, refuse, command):
    root = make_dataset(tmp_path / "project" / "data", {"a": 3, "b": 3})
    for name in (
        "metrics.jsonl",
        "data_report.json",
        "config.json",
        ".lock",
        ".lock_holder",
    ):  # out_dir was a run before
        (tmp_path / "project" / name).write_text("{}")
    for flags in ((), ("--overwrite",)):
        assert "--out_dir" in refuse(root, *flags, out=tmp_path / "project", command=command)


@pytest.mark.parametrize("flag", ["masks_out", "unknown_dir"])
def test_what_a_run_reads_is_not_moved_aside_with_the_old_one(tmp_path, small_data, refuse, flag):
    path = tmp_path / "run" / "mine"
    path.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    text = refuse(small_data, "--overwrite", "--crop_mode", "mask", f"--{flag}", path, out=tmp_path / "run")
    assert f"--{flag} {path}: would be moved aside by --overwrite" in text


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can create anything")
@pytest.mark.parametrize("command", ["train", "scan"])
def test_out_dir_where_nothing_can_be_created(small_data, refuse, command):
    """Root may write everywhere by the permission bits, as a user may on some network drives: only trying tells."""
    assert "--out_dir /proc/run" in refuse(small_data, out=Path("/proc/run"), command=command)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_dir_without_permission(tmp_path, small_data, refuse):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "can be written to" in refuse(small_data, out=tmp_path / "locked" / "run")


@pytest.mark.parametrize("flag", ["data_root", "out_dir", "load_from", "resume"])
def test_folders_of_somebody_else(tmp_path, small_data, call_main, capsys, monkeypatch, flag):
    (tmp_path / "private").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("private"))  # root may read everywhere
    paths = {"data_root": small_data, "out_dir": tmp_path / "run", flag: tmp_path / "private"}
    assert call_main(*(word for name, path in paths.items() for word in (f"--{name}", path)), *TINY_RUN) == 2
    assert f"--{flag} {tmp_path}/private: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["data_root", "out_dir", "class_map", "backbone_weights"])
def test_names_that_are_too_long_for_the_file_system(tmp_path, small_data, call_main, capsys, flag):
    paths = {"data_root": small_data, "out_dir": tmp_path / "run", flag: tmp_path / ("x" * 300)}
    argv = [word for name, path in paths.items() for word in (f"--{name}", path)]
    assert call_main(*argv, *TINY_RUN) == 2
    assert f"--{flag} {tmp_path}/xxx" in capsys.readouterr().err


# --- machine and model


def test_more_gpus_than_there_are(small_data, refuse):
    text = refuse(small_data, "--gpus", 64)
    assert "--gpus 64" in text and f"this machine has {torch.cuda.device_count()}" in text


@pytest.mark.parametrize(
    "name, close",
    [("resnet10x", "resnet10t"), ("mobilnetv2_035", "mobilenetv2_035"), ("test_vit.r160", "test_vit.r160_in1k")],
)
def test_an_unknown_model_gets_the_closest_names(small_data, refuse, name, close):
    text = refuse(small_data, "--model_id", name)
    assert f"--model_id {name}" in text and close in text.split("did you mean")[1]


def test_a_pooling_that_the_model_lacks(small_data, refuse):
    assert "--pool nonsense" in refuse(small_data, "--pool", "nonsense")


@pytest.fixture
def one_model(monkeypatch):
    """Let timm list one model, because forty are built to find one that fits a file."""
    monkeypatch.setattr(timm, "list_models", lambda: ["test_resnet"])


def test_weights_of_another_model_name_the_keys(tmp_path, small_data, refuse, one_model):
    torch.save({"foreign.weight": torch.zeros(3), "conv1.0.weight": torch.zeros(5)}, tmp_path / "weights.pth")
    text = refuse(small_data, "--backbone_weights", tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in text and "foreign.weight" in text
    assert re.search(r"size mismatch for conv1.0.weight.*\[5\].*\[\d+, 3, 3, 3\]", text)
    assert re.search(r"Missing key.*conv1.1.weight", text) and len(text) < 1500, (
        "one sentence, not a list of all layers"
    )


def test_real_weights_do_not_fit_another_model(small_data, shared_data, refuse, one_model):
    weights = shared_data / "weights" / "mobilenetv2_035.timm.pth"
    assert "Unexpected key" in refuse(small_data, "--backbone_weights", weights)


@pytest.mark.parametrize(
    "name, content",
    [("text.pth", b"hello"), ("empty.pth", b""), ("a.safetensors", b"\xff" * 64), ("pickle.pth", b"\x80\x02K\x01.")],
)
def test_files_that_are_no_weights(tmp_path, small_data, refuse, name, content):
    (tmp_path / name).write_bytes(content)
    text = refuse(small_data, "--backbone_weights", tmp_path / name)
    assert "cannot be read as weights" in text and name in text


def test_a_pickle_is_not_executed(tmp_path, small_data, refuse):
    marker = tmp_path / "executed"
    torch.save({"conv1.0.weight": _Bomb(marker)}, tmp_path / "bomb.pth")
    assert "cannot be read as weights" in refuse(small_data, "--backbone_weights", tmp_path / "bomb.pth")
    assert not marker.exists()


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("flag", ["backbone_weights", "class_map"])
def test_named_files_that_are_missing_or_folders(tmp_path, small_data, refuse, flag):
    assert f"--{flag} {tmp_path / 'nowhere'}: does not exist" in refuse(small_data, f"--{flag}", tmp_path / "nowhere")
    assert f"--{flag} {tmp_path}: is not a file" in refuse(small_data, f"--{flag}", tmp_path)


# --- resume


def test_resume_without_anything_to_resume(tmp_path, small_data, refuse):
    assert "no checkpoint_last.pth" in refuse(small_data, "--resume")
    assert str(tmp_path / "nowhere.pth") in refuse(small_data, "--resume", tmp_path / "nowhere.pth")
    assert "checkpoint_last.pth" in refuse(small_data, "--resume", small_data)
    assert "--resume, --overwrite" in refuse(small_data, "--resume", "--overwrite")


@pytest.mark.parametrize("content", [b"", b"hello", "tensors"])
def test_resume_from_something_that_is_no_checkpoint(tmp_path, small_data, refuse, content):
    path = tmp_path / "some.pth"
    if content == "tensors":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    assert str(path) in refuse(small_data, "--resume", path)


# --- class map


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("tools: [hamer]", "did you mean hammer?"),
        ("tools: [hammer, pliers]\nothers: [pliers]", "names pliers twice"),
        ("- hammer\n- pliers", "holds no mapping"),
        ("", "holds no mapping"),
        ("tools: [hammer", "no valid YAML"),
        (b"tools: [\xe9]", "is not UTF-8"),
        ("tools: {hammer: pliers}", "--class_map"),
        ("tools: 7.5", "--class_map"),
        ("null: [hammer, pliers, wrench]", "--class_map"),
        ("tools: [nothing like it]", "data_root has hammer, pliers, wrench"),
        ("0: hammer\n1: pliers\n2: wrench", "lists numbers and names of classes"),
        ("tools: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_class_maps_that_make_no_sense(tmp_path, small_data, refuse, content, complaint):
    path = tmp_path / "map.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = refuse(small_data, "--class_map", path)
    assert complaint in text and ("map.yaml" in text or "null" in str(content))


# --- as a user sees it


def test_a_refusal_in_the_shell(tmp_path):
    """A terminal without Unicode gets the message too."""
    root = make_dataset(tmp_path / "data", {"ключ": 3, "молоток": 2})
    starts = (
        ("utf-8", "lct_dino3.py", f"--data_root data --out_dir run {' '.join(TINY_RUN)}"),
        ("latin-1", "lct_dino3.py", "scan --data_root data --out_dir scan"),
        ("latin-1", "tools/masks.py", "--no-draw --data_root data --out_dir sheet"),
    )
    code = f"""if True:  # all in one interpreter, because torch takes seconds
        import runpy, sys
        sys.path.insert(0, "{REPO}/tools")  # as Python does for a script in it
        for encoding, script, words in {starts}:
            sys.argv = [script, *words.split()]
            sys.stdout.reconfigure(encoding=encoding, errors="strict")
            sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
            try:
                runpy.run_path("{REPO}/" + script, run_name="__main__")
            except SystemExit as end:
                print(script, "ends with", end.code)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.stdout.startswith("lct_dino3.py ends with 2\n"), done.stdout + done.stderr
    assert "lct_dino3.py ends with 2\n" in done.stdout[9:] and "tools/masks.py ends with 0\n" in done.stdout, (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    assert "молоток: 2 usable" in done.stderr and done.stderr.count("2 usable") == 2
    assert done.stderr.count("--data_root data") == 2
    assert r"\u043a\u043b\u044e\u0447" in done.stdout
    assert not (tmp_path / "run").exists() and len(list(root.rglob("*"))) == 7


def test_a_run_directory_in_use_is_refused_and_stays(tmp_path, small_data, refuse):
    import lct_dino3 as lct

    out = tmp_path / "busy"
    with lct.RunDirectory(out):
        assert (out / "metrics.jsonl").exists()
        for flags in ((), ("--overwrite",)):
            text = refuse(small_data, *flags, out=out)
            assert "in use by process" in text and str(out) in text
    shutil.rmtree(out)
