"""Section 02: the command line."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from conftest import REPO, SCRIPT, TINY_RUN, run_cli

import lct_dino3 as lct

HEAVY = ("torch", "numpy", "PIL", "scipy", "timm", "albumentations", "cv2", "sklearn", "clearml")


def refusal(*argv: object) -> str:
    with pytest.raises(lct.UserError) as caught:
        lct.parse_command_line([str(word) for word in argv])
    return str(caught.value)


def answer_before_heavy_imports(*argv: object) -> tuple[int, str, str]:
    """Run the script as a user does, which must import nothing heavy; return exit code, stdout and stderr."""
    done = run_cli(*argv, python=("-X", "importtime"))
    imported = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, flags=re.MULTILINE))
    assert "argparse" in imported  # the measurement works
    assert not imported & set(HEAVY)
    return done.returncode, done.stdout, re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE)


COMMANDS = [(), ("evaluate",), ("prototypes",)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option_of_the_command_once_on_one_line_with_its_default(command):
    code, text, _ = answer_before_heavy_imports(*command, "--help")
    assert code == 0
    fields = lct.option_fields(lct.COMMAND_OPTIONS.get(command[0], lct.Config) if command else lct.Config)
    for field in fields:
        lines = [line for line in text.splitlines() if re.match(rf"  --(\[no-\])?{field.name}\b", line)]
        assert len(lines) == 1, field.name
        assert field.metadata["help"] in lines[0], f"--{field.name} takes two lines"
        if field.default not in (None, ()):
            shown = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else field.default
            assert f"[{shown}]" in lines[0], field.name
    assert len(re.findall(r"^  --", text, re.MULTILINE)) == len(fields)
    if not command:
        assert all(name in text.split("commands, ")[1] for name in (*lct.COMMANDS, *lct.TOOLS))


def test_every_option_describes_itself():
    for options in (lct.Config, *lct.COMMAND_OPTIONS.values()):
        for field in dataclasses.fields(options)[2:]:  # `command` and `origins` are no flags
            assert field.metadata["help"] and field.metadata["group"], field.name
            assert lct.field_kind(field) in (int, float, str, bool, lct.Path, dict), field.name


def test_defaults_are_those_of_the_design():
    config = lct.parse_command_line([])
    design = {
        "command": "train", "model_id": "vit_large_patch16_dinov3.lvd1689m", "emb_dim": 128, "epochs": 15, "batch": 64,
        "lr": 1e-3, "img_size": 224, "workers": None, "seed": 42, "val_split": 0.2, "test_split": 0.1, "save_every": 5,
        "max_refs_per_class": None, "gpus": None, "min_per_class": 3, "samples_per_class": 300, "freeze_backbone": True,
        "clearml_project": "DINOv3-Embeddings", "arc_scale": 30.0, "arc_margin": 0.30, "best_metric": "acc",
        "balanced_per_class": False, "use_clearml": False, "heads": 4, "criterion": "arcface", "label_smoothing": 0.0,
        "optimizer": "adamw", "lr_type": "two_lrs", "layer_decay": 1.0, "drop_path": 0.0, "mixing": "none", "aug_start_p": 1.0,
        "aug_end_p": 1.0, "insert_background_p": 0.0, "ema_decay": 0.0, "accumulate_grad_batches": 1, "unfreeze_blocks": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in design} == design


def test_a_continued_run_may_change_these_options_alone():
    """They change no step of training, or only the data, which are compared by themselves."""
    words = """
        config data_root out_dir class_map min_per_class near_dup_bits masks_out auto_generate_masks sam2_cfg sam2_ckpt
        backgrounds backbone_weights load_from n_classes epochs val_batch patience target_precision unknown_share unknown_dir
        max_refs_per_class matcher match_features prototypes_per_class gpus workers cache_crops fsdp resume experiment_name
        models overwrite save_every save_checkpoints save_metrics save_minutes preview debug use_clearml use_tensorboard
        clearml_project clearml_task_name
    """
    assert {field.name for field in lct.option_fields() if not field.metadata.get("fixed")} == set(words.split())


def test_values_arrive_with_their_types():
    words = (
        "scan --data_root a --exclude *.bmp x* --mean 0.1 0.2 0.3 --std 1 1 1 --no-freeze_backbone --gpus 0 --resume"
    )
    config = lct.parse_command_line(words.split())
    assert (config.command, config.data_root, config.exclude) == ("scan", lct.Path("a"), ("*.bmp", "x*"))
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert (config.freeze_backbone, config.gpus, config.resume) == (False, 0, "last")
    assert config.as_plain()["data_root"] == str(lct.Path.cwd() / "a") and config.as_plain()["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--epoch", "3"], "--epochs"),
        (["--data-root", "x"], "--data_root"),
        (["--dataroot=x"], "--data_root"),
        (["scan", "--min_per_clas", "3"], "--min_per_class"),
        (["--freeze-backbone"], "--freeze_backbone"),
        (["trian"], "train"),
        (["sacn"], "scan"),
        (["--criterion", "arc"], "arcface"),
        (["evaluate", "--split", "vla"], "val"),
    ],
)
def test_typos_get_the_closest_name(argv, hint):
    text = refusal(*argv)
    assert "did you mean" in text and hint in text.split("did you mean")[1]


def test_dashes_make_no_word_alike():
    assert "did you mean" not in refusal("--nonsense")
    assert refusal("--bacth", "3").endswith("did you mean --batch?")


def test_a_word_like_nothing_points_to_the_help():
    assert "--help" in refusal("--qqqqqqqq")


@pytest.mark.parametrize(
    "flag, values",
    [
        ("epochs", "1.5"),
        ("epochs", "0"),
        ("epochs", "-3"),
        ("batch", "1"),
        ("lr", "fast"),
        ("lr", "nan"),
        ("lr", "inf"),
        ("lr", "0"),
        ("lr", "-1"),
        ("val_split", "1.5"),
        ("val_split", "-0.1"),
        ("val_split", "nan"),
        ("val_split", "0"),
        ("test_split", "1"),
        ("img_size", "4"),
        ("img_size", "100000"),
        ("emb_dim", "1"),
        ("heads", "0"),
        ("seed", "-1"),
        ("seed", "99999999999"),
        ("gpus", "-1"),
        ("workers", "-1"),
        ("save_every", "-1"),
        ("min_per_class", "0"),
        ("max_refs_per_class", "0"),
        ("samples_per_class", "0"),
        ("near_dup_bits", "65"),
        ("arc_margin", "3"),
        ("arc_scale", "0"),
        ("precision", "fp8"),
        ("best_metric", "accuracy"),
        ("mean", "0.5 0.5"),
        ("std", "0 0.5 0.5"),
        ("exclude", ""),
        ("samples_per_class", "9" * 30),
        ("masks_dirname", "cropped"),
        ("masks_dirname", "a/b"),
        ("experiment_name", "  "),
    ],
)
def test_absurd_values_are_refused_by_name(flag, values):
    text = refusal(f"--{flag}", *values.split())
    assert f"--{flag}" in text and text.count("\n") <= 1


@pytest.mark.parametrize("word", ["False", "true", "0"])
def test_a_flag_that_is_on_or_off_takes_no_value(word):
    assert "on is --freeze_backbone, off is --no-freeze_backbone" in refusal("--debug", "--freeze_backbone", word)
    assert "without a value" not in refusal("--seed", 1, word)
    assert "without a value" not in refusal("--nonsense", "--debug")


def test_a_home_folder_that_the_shell_leaves_alone():
    assert lct.parse_command_line(["--data_root=~/crops"]).data_root == lct.Path.home() / "crops"


def test_splits_that_leave_nothing_to_train_on_are_refused():
    assert "--val_split, --test_split" in refusal("--val_split", 0.5, "--test_split", 0.5)
    assert lct.parse_command_line("--val_split 0.5 --test_split 0.4".split()).test_split == 0.4


@pytest.mark.parametrize("flag", ["mean", "std"])
def test_mean_and_std_come_together(flag):
    assert "--mean, --std" in refusal(f"--{flag}", 0.5, 0.5, 0.5)


def test_a_command_stands_first():
    assert "put the command first" in refusal("--data_root", "x", "scan")
    assert lct.parse_command_line(["scan", "--data_root", "x"]).command == "scan"


@pytest.mark.parametrize("name", lct.TOOLS)
def test_the_usage_of_a_tool_begins_with_the_command_that_starts_it(name):
    assert run_cli(name, "--help").stdout.startswith(f"usage: python lct_dino3.py {name} ")


def test_a_copy_of_the_script_without_its_tools_says_so(tmp_path):
    copy = tmp_path / "lct_dino3.py"
    copy.write_bytes(SCRIPT.read_bytes())
    done = subprocess.run([sys.executable, str(copy), "prelabel", "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(tmp_path / "tools" / "prelabel.py") in done.stderr and "put the folder tools/" in done.stderr


@pytest.mark.parametrize(
    "program", [SCRIPT, *(REPO / "tools" / f"{name}.py" for name in ("masks", "prelabel", "modelit"))]
)
def test_ctrl_c_during_the_imports_shows_no_traceback(program, tmp_path):
    (tmp_path / "cv2.py").write_text("import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)")
    (tmp_path / "data").mkdir()
    command = [sys.executable, program, "scan", "--data_root", tmp_path / "data", "--out_dir", tmp_path / "run"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted (SIGINT) before anything began\n")


@pytest.mark.parametrize(
    "pattern, complaint",
    [
        (r"^src\d+_", "0 capture groups"),
        (r"^(a)(b)", "2 capture groups"),
        ("(", "no regular expression"),
        ("(a{" + "9" * 30 + "})", "no regular expression"),
    ],
)
def test_group_regex_needs_exactly_one_group(tmp_path, small_data, pattern, complaint):
    argv = ["--data_root", str(small_data), "--out_dir", str(tmp_path / "run"), "--group_regex", pattern]
    with pytest.raises(lct.UserError, match=complaint):
        lct.check_paths(lct.parse_command_line(argv))


@pytest.mark.parametrize("missing", ["data_root", "out_dir"])
def test_data_root_and_out_dir_are_asked_for(tmp_path, small_data, missing):
    argv = {"data_root": str(small_data), "out_dir": str(tmp_path / "run")}
    del argv[missing]
    with pytest.raises(lct.UserError, match=f"--{missing}: is missing"):
        lct.check_paths(lct.Config(**{name: lct.Path(value) for name, value in argv.items()}))


@pytest.mark.parametrize("argv", [["--epoch", "3"], ["trian"], ["--epochs", "many"], ["--lr", "nan"]])
def test_usage_errors_take_two_lines_of_stderr_and_exit_2(argv):
    code, said, error = answer_before_heavy_imports(*argv)
    assert code == 2 and said == ""
    assert error.startswith("error: ") and 1 <= len(error.splitlines()) <= 2


def test_only_debug_shows_the_traceback(tmp_path):
    argv = ["--data_root", tmp_path / "nowhere", "--out_dir", tmp_path / "run", *TINY_RUN]
    quiet, loud = run_cli(*argv), run_cli(*argv, "--debug")
    assert quiet.returncode == loud.returncode == 2
    assert "Traceback" not in quiet.stderr and str(tmp_path / "nowhere") in quiet.stderr
    assert "Traceback" in loud.stderr and "UserError" in loud.stderr
