"""Section 02: config files. Every key is tested, from `Config` itself, so that a new one cannot be forgotten."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPO, TINY_RUN, run_main

import lct_dino3 as lct

FIELDS = [field for field in lct.option_fields() if not field.metadata.get("once") and field.name != "fsdp"]
# Two values, neither of them the default, for options whose values have a form of their own; all others are made below.
SPECIAL = {
    "prototypes_per_class": ("2", "3"),
    "formats": ("coco", "csv"),
    "val_split": (0.3, 0.4),
    "test_split": (0.3, 0.4),
    "mean": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    "std": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
}
BESIDE = {
    "mean": {"std": [0.5] * 3},
    "std": {"mean": [0.5] * 3},
    "in_channels": {"crop_mode": "mask"},
    "insert_background_p": {"backgrounds": "pictures"},
}  # what an option cannot stand without


def two_values(field):
    """Return two values of an option, as the config has them, that differ from each other and from the default."""
    if field.name in SPECIAL:
        return SPECIAL[field.name]
    kind, meta = lct.field_kind(field), field.metadata
    if kind is bool:
        return not field.default, field.default
    low, high = meta.get("low"), meta.get("high")
    if "choices" in meta:
        choices = list(meta["choices"])
    elif kind is int:
        choices = [low or 1, (low or 1) + 1, (low or 1) + 2]
    elif kind is float:
        choices = [low + (min(high, low + 1) - low) * share for share in (0.25, 0.5, 0.75)]
    elif kind is lct.Path:
        return Path("/a/file"), Path("/b/file")
    else:
        choices = ["one", "two"]
    if field.type.startswith("tuple["):
        count = meta["nargs"] if isinstance(meta.get("nargs"), int) else 1
        choices = [({"type": choice},) if kind is dict else (choice,) * count for choice in choices]
    written, *others = [choice for choice in choices if choice != field.default]
    return written, (others or [field.default])[0]


def plain(value):
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def flag_words(field, value):
    if lct.field_kind(field) is bool:
        return [f"--{'' if value else 'no-'}{field.name}"]
    if lct.field_kind(field) is dict:
        return [f"--{field.name}", json.dumps(value)]
    return [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]


def resolve(tmp_path, text, *argv, name="run.yaml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return lct.parse_command_line(["--config", str(tmp_path / name), *map(str, argv)])


def refusal(*args, **kwargs):
    with pytest.raises(lct.UserError) as caught:
        resolve(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_command_line_beats_file_beats_default_for_every_option(tmp_path, field):
    written, typed = two_values(field)
    beside = BESIDE.get(field.name, {})
    for key in (field.name, field.metadata.get("key", field.name)):
        tree = inner = dict(beside)
        *sections, last = key.split(".")
        for section in sections:
            inner[section] = inner = {}
        inner[last] = plain(written)
        config = resolve(tmp_path, yaml.safe_dump(tree))
        assert getattr(config, field.name) == written
        assert config.origins[field.name] == f"{tmp_path / 'run.yaml'}: {key}" == config.place(field.name)
        both = resolve(tmp_path, yaml.safe_dump(tree), *flag_words(field, typed))
        assert getattr(both, field.name) == typed
        flag = f"--no-{field.name}" if typed is False else f"--{field.name}"
        assert both.origins[field.name] == "command line" and both.place(field.name) == flag
        inner[last] = None
        if not beside:
            config = resolve(tmp_path, yaml.safe_dump(tree))
            assert getattr(config, field.name) == field.default and field.name not in config.origins


def test_yaml_toml_and_json_say_the_same(tmp_path):
    tree = {
        "seed": 7,
        "optimizer": {"lr": 4e-4},
        "dataset": {"data_loaders": {"train_batch_size": 16}},
        "mean": [0.5] * 3,
    }
    tree["std"] = [0.25] * 3
    toml = (
        "seed = 7\nmean = [0.5, 0.5, 0.5]\nstd = [0.25, 0.25, 0.25]\n[optimizer]\nlr = 4e-4\n"
        "[dataset.data_loaders]\ntrain_batch_size = 16\n"
    )
    configs = [
        resolve(tmp_path, text, name=name)
        for name, text in (("a.yaml", yaml.safe_dump(tree)), ("a.toml", toml), ("a.json", json.dumps(tree)))
    ]
    for config in configs:
        assert (config.seed, config.lr, config.batch) == (7, 4e-4, 16)
        assert (config.mean, config.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    "text, value", [("4e-4", 4e-4), ("4E-4", 4e-4), ("1", 1.0), (".5", 0.5), ("1e1", 10.0), ("+2.5e-1", 0.25)]
)
def test_numbers_of_yaml_are_numbers(tmp_path, text, value):
    config = resolve(tmp_path, f"lr: {text}")
    assert config.lr == value and type(config.lr) is float


def test_old_name_of_the_flag_and_dotted_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("training: {epochs: 3}")
    config = lct.parse_command_line(
        ["--config_filename", str(tmp_path / "run.yaml"), "--optimizer.lr", "0.5", "--no-model.pretrained"]
    )
    assert (config.epochs, config.lr, config.pretrained) == (3, 0.5, False)


def test_paths_of_a_file_start_from_its_folder(tmp_path):
    config = resolve(
        tmp_path, "directories: {images: crops}\nout_dir: /abs/run\nunknown_dir: ~/strangers", "--class_map", "m.yaml"
    )
    assert config.data_root == tmp_path / "crops"
    assert config.out_dir == Path("/abs/run")
    assert config.unknown_dir == Path.home() / "strangers"
    assert config.class_map == Path("m.yaml")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("optimizer: {lrr: 1}", ["optimizer.lrr", "no known key", "optimizer.lr"]),
        ("epoch: 3", ["epoch", "did you mean", "epochs"]),
        ("model: {lr: 1}", ["model.lr", "did you mean", "optimizer.lr"]),
        ("training: {epochs: ten}", ["training.epochs", "'ten' is not a whole number"]),
        ("training: {epochs: 3.5}", ["training.epochs", "3.5 is not a whole number"]),
        ("epochs: true", ["epochs", "True is not a whole number"]),
        ("optimizer: {lr: '4e-4'}", ["optimizer.lr", "'4e-4' is not a number"]),
        ("optimizer: {lr: 99}", ["optimizer.lr", "99.0 is out of range"]),
        ("lr: .nan", ["lr", "not a finite number"]),
        ("model: {pretrained: 'no'}", ["model.pretrained", "'no' is not true or false"]),
        ("crop_mode: bbx", ["crop_mode", "did you mean bbox"]),
        ("mean: [1, 2]", ["mean", "is not a list of 3 numbers"]),
        ("mean: [0.1, x, 0.2]", ["mean[1]", "'x' is not a number"]),
        ("dataset: 3", ["dataset", "is a section", "dataset.image_size"]),
        ("lr: 1\nlr: 2", ["lr stands there twice in line 2"]),
        ("trainning: {epochs: 3}", ["trainning", "did you mean training"]),
        ("optimizer: {lr: 1, lr: 2}", ["lr stands there twice"]),
        ("lr: 1\noptimizer: {lr: 2}", ["optimizer.lr", "says the same as lr"]),
        ("overwrite: true", ["overwrite", "command line"]),
        ("config: other.yaml", ["config", "command line"]),
        ("- lr", ["holds no options"]),
        ("lr: [", ["cannot be read", "line 1"]),
        ("out_dir: ''", ["out_dir", "is empty"]),
        ("data_root: ~no-such-user/x", ["data_root", "not known here"]),
        ("? [a, b]\n: 1", ["run.yaml"]),
        ("pre_transforms: [{type: median_blur, p: !!binary aaaa}]", ["pre_transforms[0]", "Object of type bytes"]),
    ],
)
def test_mistakes_name_file_key_and_remedy(tmp_path, text, parts):
    message = refusal(tmp_path, text)
    assert str(tmp_path / "run.yaml") in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "name, text, part",
    [
        ("a.json", '{"lr": 1, "lr": 2}', "lr stands there twice"),
        ("a.json", '{"lr": NaN}', "NaN is no number"),
        ("a.json", "{", "cannot be read"),
        ("a.toml", "lr = 1\nlr = 2", "cannot be read"),
        ("a.ini", "lr = 1", "not named .yaml"),
    ],
)
def test_mistakes_in_the_other_formats(tmp_path, name, text, part):
    message = refusal(tmp_path, text, name=name)
    assert str(tmp_path / name) in message and part in message


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "lr: 0.5"), ("a.json", '{"lr": 0.5}'), ("a.toml", "lr = 0.5")], ids=lambda text: text
)
def test_a_file_from_windows(tmp_path, name, text):
    assert resolve(tmp_path, "\ufeff" + text + "\r\n", name=name).lr == 0.5


def test_a_mistake_that_is_found_later_names_file_and_key_too(tmp_path):
    with pytest.raises(lct.UserError, match=r"run\.yaml: group_regex 5: has 0 capture groups"):
        lct.check_paths(resolve(tmp_path, "group_regex: 5\ndata_root: .\nout_dir: ../run"))


@pytest.mark.parametrize("name", ["out_dir", "masks_out", "load_from", "class_map"])
@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "x" * 300], ids=["nul", "surrogate", "long"])
def test_a_path_that_no_file_can_have(tmp_path, small_data, name, text):
    config = resolve(tmp_path, json.dumps({"data_root": str(small_data), "out_dir": "run", name: text}), name="a.json")
    with pytest.raises(lct.UserError, match=rf"(?s)a\.json: {name} .*check the path"):
        lct.check_paths(config)


def test_names_stay_as_they_are_written(tmp_path):
    assert resolve(tmp_path, "experiment_name: 007").experiment_name == "007"
    assert resolve(tmp_path, "experiment_name: 7").experiment_name == "7"
    assert "1.1 is a number" in refusal(tmp_path, "experiment_name: 1.10")


def test_keys_of_ones_own_win_over_merged_ones(tmp_path):
    text = "pre_transforms:\n- &a {type: median_blur, p: 0.1}\n- {<<: *a, p: 0.3}\n"
    assert resolve(tmp_path, text).pre_transforms == (
        {"type": "median_blur", "p": 0.1},
        {"type": "median_blur", "p": 0.3},
    )


def test_an_empty_list_is_no_default_where_the_default_is_another(tmp_path):
    """Without any augmentation is not the built-in one."""
    assert resolve(tmp_path, "dataset: {train_augmentations: []}").train_augmentations == ()
    assert resolve(tmp_path, "dataset: {train_augmentations: }").train_augmentations is None
    assert resolve(tmp_path, "betas: []").betas == ()
    assert "[] is not a whole number" in refusal(tmp_path, "seed: []")


def test_none_on_the_command_line_takes_back_what_a_file_says(tmp_path):
    text = "class_map: m.yaml\nbackbone_lr: 0.1\nn_classes: 3\ntrain_augmentations: [{type: median_blur}]"
    names = ("class_map", "backbone_lr", "n_classes", "train_augmentations")
    config = resolve(tmp_path, text, *(word for name in names for word in (f"--{name}", "none")))
    assert [getattr(config, name) for name in names] == [None] * 4
    with pytest.raises(lct.UserError, match="--epochs: 'none' is not a whole number"):
        lct.parse_command_line(["--epochs", "none"])


def test_options_without_effect_are_known():
    given = {
        "drop_path", "pct_start", "focal_gamma", "sub_centers", "mixing_p", "background_max_ratio", "samples_per_class",
        "mix_mask_p", "masks_out",
    }  # fmt: skip
    assert given <= set(lct.ineffective_options(lct.Config()))
    needed = {"freeze_backbone": False, "scheduler": "onecycle", "mixing": "mixup", "insert_background_p": 0.5}
    needed |= {"balanced_per_class": True, "crop_mode": "mix", "criterion": "focal"}
    assert lct.ineffective_options(lct.Config(**needed)) == [
        "warmup_epochs", "sub_centers", "arc_margin", "sam2_cfg", "sam2_ckpt",
    ]  # fmt: skip
    assert "masks_out" not in lct.ineffective_options(lct.Config(auto_generate_masks=True))
    assert "test_split" in lct.ineffective_options(lct.Config(splits="from_folders"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(lct.UserError, match="No such file"):
        lct.parse_command_line(["--config", str(tmp_path / "none.yaml")])


def test_an_empty_file_and_empty_sections_are_defaults(tmp_path):
    assert resolve(tmp_path, "# nothing yet\n").lr == lct.Config.lr
    assert resolve(tmp_path, "optimizer:\nmodel: {}\n").lr == lct.Config.lr


def test_a_range_that_the_command_line_breaks_names_the_flag(tmp_path):
    assert refusal(tmp_path, "epochs: 3", "--epochs", "0").startswith("--epochs: 0 is out of range")


def test_experiment_name_names_the_folder_unless_out_dir_does(tmp_path):
    text = "experiment_name: bench_a\ndirectories: {models: runs}"
    assert resolve(tmp_path, text).out_dir == tmp_path / "runs" / "bench_a"
    assert resolve(tmp_path, text, "--out_dir", "own").out_dir == Path("own")
    for name in ("a/b", "''", ".."):
        assert "not the name of a folder" in refusal(tmp_path, f"experiment_name: {name}")


def test_config_json_of_a_run_says_where_each_value_comes_from_and_repeats_it(tmp_path, small_data, capsys):
    words = shlex.join(TINY_RUN).replace("--batch 16 --epochs 1 ", "").split()  # those stand in the file
    text = f"training: {{epochs: 2}}\nbatch: 4\ndirectories: {{images: {small_data}}}"
    (tmp_path / "run.yaml").write_text(text)
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_main("--config", tmp_path / "run.yaml", *words, "--overwrite", "--out_dir", first) == 0
    record = json.loads((first / "config.json").read_text())
    assert record["origins"]["epochs"] == f"{tmp_path / 'run.yaml'}: training.epochs"
    assert (record["origins"]["img_size"], record["origins"]["lr"]) == ("command line", "default")
    assert record["origins"].keys() == record["options"].keys() - {"command"}
    assert run_main("--config", first, "--out_dir", second) == 0, capsys.readouterr().err
    assert [event["val"] for event in epochs_of(first)] == [event["val"] for event in epochs_of(second)]
    repeated = json.loads((second / "config.json").read_text())
    changed = {key for key, value in record["options"].items() if repeated["options"][key] != value}
    assert changed == {"out_dir", "overwrite", "config"}


def epochs_of(run):
    return [event for event in lct.read_events(run) if event["event"] == "epoch_end"]


# --- the files in configs/

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))


def test_the_ready_files_are_there():
    assert [path.name for path in CONFIGS] == [
        "classifier.yaml",
        "finetune.yaml",
        "lct-dino-3.yaml",
        "smoke.yaml",
        "tools_bbox.yaml",
        "tools_mix.yaml",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_ready_file_resolves_and_says_what_it_is_for(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = [line[2:].split(":")[0] for line in lines if line.startswith("# ") and not line.startswith("#  ")]
    assert starts == ["purpose", "command", "hardware", "time", "expected"]
    assert f"--config configs/{path.name}" in lines[1] or f"--config configs/{path.name}" in lines[2]
    config = lct.parse_command_line(["--config", str(path), "--data_root", "data"])
    lct.check_optimizer(config)
    for augment in (True, False):
        picture = lct.build_transform(64, augment, None, lct.given_lists(config))(
            np.zeros((70, 50, 3), np.uint8), None, 0
        )
        assert picture.shape == (64, 64, 3)


def test_classifier_yaml_shows_every_key_of_the_sections():
    def walk(tree, prefix=""):
        for name, value in tree.items():
            yield from walk(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]

    tree = yaml.safe_load((REPO / "configs" / "classifier.yaml").read_text(encoding="utf-8"))
    assert {field.metadata["key"] for field in FIELDS if "key" in field.metadata} <= set(walk(tree))


def test_the_smoke_file_trains(tmp_path, small_data, capsys):
    argv = ("--config", REPO / "configs" / "smoke.yaml", "--data_root", small_data, "--out_dir", tmp_path / "run")
    assert run_main(*argv, "--gpus", 0) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "prototypes.npz").is_file()
    assert not list((tmp_path / "run").glob("checkpoint_ep*"))


def test_classifier_yaml_trains(tmp_path, small_data, capsys):
    """With a network small enough to start from random weights."""
    argv = ("--config", REPO / "configs" / "classifier.yaml", "--data_root", small_data, "--out_dir", tmp_path / "run")
    small = "--model_id test_resnet --no-pretrained --img_size 48 --epochs 2 --gpus 0 --workers 0 --batch 8".split()
    assert run_main(*argv, *small, "--no-save_metrics") == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").is_file()
    said = json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]
    assert said["head"] == {"lr": 1e-3, "weight_decay": 0.01} and said["backbone"] == {"lr": 3e-4, "weight_decay": 0.01}
    assert all("val_per_class" not in event and "acc" in event["val"] for event in epochs_of(tmp_path / "run"))


def test_files_that_say_fsdp_are_read_unless_they_want_it(tmp_path):
    assert resolve(tmp_path, "training: {fsdp: false}").fsdp is False
    assert "training.fsdp: is gone" in refusal(tmp_path, "training: {fsdp: true}")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DOUBLED = ", ".join(f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}]" if i else "k0: &k0 [1]" for i in range(60))
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{last}'] * 7)}]}}\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = [
    ("a.yaml", BOMB + "seed: *i", "stand for more than 100,000 values"),
    ("a.yaml", f"seed: {{{DOUBLED}}}", "stand for"),
    ("a.yaml", MERGED, "stand for"),
    ("a.yaml", "mean: &a [*a]", "for themselves"),
    ("a.yaml", "seed: " + "9" * 400, "seed: is too large a number"),
    ("a.yaml", "lr: " + "9" * 400, "lr: is too large a number"),
    ("a.yaml", "lr: " + "9" * 5000, "cannot be read"),
    ("a.yaml", "epochs: !!int [1]", "line 1"),
    ("a.yaml", "lr: !!float {a: 1}", "line 1"),
    ("a.yaml", "debug_it: !!bool maybe", "what its tag says"),
    ("a.yaml", "seed: !!timestamp x", "what its tag says"),
    ("a.yaml", "seed: !!python/object/apply:os.getcwd []", "line 1"),
    ("a.yaml", "seed: " + "[" * 100_000, "nested too deeply"),
    ("a.yaml", "crop_mode: " + "x" * 900_000, "crop_mode"),
    ("a.yaml", "x" * 2_000_000, "larger than 1 MB"),
    ("a.yaml", "seed: 1\nlr: \0", "special characters are not allowed in line 2"),
    ("a.json", '{"seed": ' + "[" * 200_000, "nested too deeply"),
    ("a.json", '{"lr": ' + "9" * 400 + "}", "lr: is too large a number"),
    ("a.json", '{"seed": [[1, 2], {"a": "' + "b" * 100_000 + '"}]}', "seed: [[1, 2], {'a': '"),
    ("a.toml", "seed = " + "[" * 100_000, "recursion depth"),
    ("a.toml", "epochs = 0x" + "f" * 5000, "epochs: is too large a number"),
]


@pytest.mark.parametrize("name, text, part", HOSTILE, ids=range(len(HOSTILE)))
def test_files_that_stand_for_too_much_end_soon_in_one_short_sentence(tmp_path, name, text, part):
    started = time.monotonic()
    message = refusal(tmp_path, text, name=name)
    assert str(tmp_path / name) in message and part in message, message
    assert len(message) < 4000 and time.monotonic() - started < 10


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_a_config_file_that_never_ends_is_refused(tmp_path, kind):
    path = tmp_path / "a.yaml"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    with pytest.raises(lct.UserError, match="is not a regular file"):
        lct.parse_command_line(["--config", str(path)])


def test_a_list_on_the_command_line_is_read_as_safely():
    for text in ("[{type: a, p: !!int [1]}]", "[" * 5000, "&a [*a]"):
        with pytest.raises(lct.UserError, match=r"--pre_transforms: is no YAML"):
            lct.parse_command_line(["--pre_transforms", text])


@pytest.mark.parametrize(
    "key, value",
    [("group_regex", "'^(nothing)_'"), ("class_map", "map.yaml"), ("model_id", "resnet10x"), ("prototypes_per_class", "many"),
     ("gpus", "60"), ("exclude", "[scan]"), ("pool", "nonsense"), ("backbone_weights", "w.pth")],
)  # fmt: skip
def test_errors_about_what_a_file_gives_name_file_and_key(tmp_path, small_data, capsys, key, value):
    (tmp_path / "map.yaml").write_text("tool: [nowhere]")
    (tmp_path / "w.pth").write_text("no weights")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"{key}: {value}\nmodel: {{pretrained: false}}\nimg_size: 32\n"
        + ("" if key == "model_id" else "model_id: test_resnet")
    )
    argv = ("--config", path, "--data_root", small_data, "--out_dir", tmp_path / "run")
    assert run_main(*argv) == 2
    assert f"{path}: {key}" in capsys.readouterr().err


def test_ready_files_hold_nothing_of_our_own_sample():
    for path in CONFIGS:
        if path.stem == "lct-dino-3":  # holds what that script had in its code, for those whose data it was
            continue
        assert not {"group_regex", "exclude", "class_map"} & yaml.safe_load(path.read_text(encoding="utf-8")).keys()
