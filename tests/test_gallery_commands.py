"""Commands evaluate and prototypes: a finished run judged again, classes enrolled and taken out without training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import signal
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_RUN, draw_image, make_dataset, run_main
from killing import Nursery, kill

import lct_dino3 as lct

Main = Callable[..., int]
QUIET = ("--gpus", "0", "--workers", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data of four classes, a fifth that a class map leaves out, and a finished run on them."""
    folder = tmp_path_factory.mktemp("gallery")
    data = make_dataset(folder / "data", {"axe": 24, "bit": 24, "clamp": 24, "drill": 24})
    make_dataset(folder / "data", {"rubbish": 3}, seed=8)
    (folder / "map.yaml").write_text("null: [rubbish]\n")
    recipe = (
        "--model_id test_resnet --no-freeze_backbone --epochs 10 --batch 16 --lr 0.01 --arc_lr 0.01 --arc_margin 0.1"
    )
    flags = (*TINY_RUN, *recipe.split(), "--save_every", 0, "--class_map", folder / "map.yaml")
    assert run_main("--data_root", data, "--out_dir", folder / "run", *flags) == 0
    return data, folder / "run"


@pytest.fixture
def run_dir(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(trained[1], tmp_path / "run")
    return tmp_path / "run"


def new_class(folder: Path, name: str, kind: int, count: int = 5) -> Path:
    """Draw crops of a class that the run has never seen."""
    (folder / name).mkdir(parents=True)
    for index in range(count):
        draw_image(kind, 77, index).save(folder / name / f"{index}.png")
    return folder


def test_evaluate_repeats_the_figures_of_the_run(run_dir: Path, call_main: Main) -> None:
    assert call_main("evaluate", "--run", run_dir, *QUIET) == 0
    again = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    measured = next(event for event in lct.read_events(run_dir) if event["event"] == "measured")
    for key in ("closed", "retrieval", "answers", "thresholds", "ece", "few"):
        assert again[key] == measured[key], key
    assert again["open_set"]["auroc"] == measured["open_set"]["auroc"] and 0 < again["ece"] < 1
    assert call_main("evaluate", "--run", run_dir, "--split", "val", *QUIET) == 0
    splits = json.loads((run_dir / "splits.json").read_text(encoding="utf-8"))
    num_val = sum(map(len, splits["val"].values()))
    of_val = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert (of_val["images"], of_val["split"]) == (num_val, "val") and again["split"] == "test"


def test_evaluate_finds_the_images_of_a_split_where_they_are_now(
    run_dir: Path, trained: tuple[Path, Path], tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    """Without those of a class that was taken out, which is neither known nor strange."""
    moved = shutil.copytree(trained[0], tmp_path / "moved")
    command = ("evaluate", "--run", run_dir, "--split", "test", "--data_root", moved, *QUIET)
    assert call_main(*command) == 0
    again = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    measured = next(event for event in lct.read_events(run_dir) if event["event"] == "measured")
    assert again["closed"] == measured["closed"] and again["data"] == str(moved)
    assert f"test images of {moved}" in capsys.readouterr().out
    assert call_main("prototypes", "--run", run_dir, "--remove", "axe", *QUIET) == 0
    assert call_main(*command) == 0
    fewer = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    splits = json.loads((run_dir / "splits.json").read_text(encoding="utf-8"))
    assert fewer["images"] == again["images"] - len(splits["test"]["axe"]) and "unknown_passed" not in fewer
    splits["test"] = {"axe": splits["test"]["axe"]}
    (run_dir / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    assert call_main(*command) == 2 and "has no test images" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "prototypes"])
def test_places_that_are_typed_replace_those_of_the_run(command: str, run_dir: Path, tmp_path: Path) -> None:
    moved = {name: tmp_path / name for name in ("data_root", "masks_out", "class_map")}
    flags = itertools.chain(*((f"--{name}", str(path)) for name, path in moved.items()))
    options = lct.choose_options(
        lct.read_run_config(run_dir), lct.parse_command_line([command, "--run", str(run_dir), *flags])
    )
    assert {name: getattr(options, name) for name in moved} == moved


def test_evaluate_takes_another_folder_and_its_foreign_classes_are_unknown(
    trained: tuple[Path, Path], run_dir: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    other = make_dataset(tmp_path / "other", {"axe": 4, "bit": 4}, seed=5)
    new_class(other, "stranger", 9, 6)
    assert call_main("evaluate", "--run", run_dir, "--data_root", other, *QUIET) == 0
    figures = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert figures["images"] == 8 and figures["open_set"]["unknowns"] == 6
    hint = f"for folders that are named as those of the run, give its --class_map {trained[0].parent / 'map.yaml'} too"
    printed = capsys.readouterr().out
    assert f"unknown objects: 'stranger'; {hint}" in printed and "warning" not in printed
    assert "the run matches by: " in printed
    train = json.loads((run_dir / "splits.json").read_text(encoding="utf-8"))["train"]["axe"]
    for path in train[:2]:
        shutil.copy(trained[0] / path, other / "axe" / f"copy of {Path(path).name}")
    assert call_main("evaluate", "--run", run_dir, "--data_root", other, *QUIET) == 0
    assert "warning: 2 of 16 images are references of the gallery" in capsys.readouterr().out
    (other / "axe" / "linked.png").symlink_to(trained[0] / train[2])
    assert call_main("evaluate", "--run", run_dir, "--data_root", other, "--precision", "bf16", *QUIET) == 0
    said = capsys.readouterr().out
    assert "warning: 1 of 17 images are references" in said, "in another precision the file itself alone"
    num_references = len(lct.load_gallery(run_dir / "prototypes.npz")[0].stacks)
    assert call_main("evaluate", "--run", run_dir, "--data_root", trained[0], "--precision", "bf16", *QUIET) == 0
    assert f"warning: {num_references} of 99 images are references" in capsys.readouterr().out, "also of other cosines"
    only_foreign = new_class(tmp_path / "foreign", "stranger", 9)
    (only_foreign / "axe").mkdir()  # a class without images is none to measure
    assert call_main("evaluate", "--run", run_dir, "--data_root", only_foreign, *QUIET) == 2
    error = capsys.readouterr().err
    assert "no class of the gallery" in error and hint in error


def test_a_new_class_is_enrolled_from_five_crops_and_recognised(
    run_dir: Path, trained: tuple[Path, Path], tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    before, _ = lct.load_gallery(run_dir / "prototypes.npz")
    added = new_class(tmp_path / "more", "эскиз", 9)
    assert call_main("prototypes", "--run", run_dir, "--add", added, *QUIET) == 0
    gallery, _ = lct.load_gallery(run_dir / "prototypes.npz")
    assert gallery.class_names == (*before.class_names, "эскиз")
    assert np.array_equal(gallery.centroids[:4], before.centroids)
    assert np.array_equal(gallery.thresholds[:4], before.thresholds)
    assert gallery.thresholds[4] == before.thresholds.max(), "of four classes no head without some can be measured"
    assert (gallery.stack_labels == 4).sum() == 5 and (np.diff(gallery.stack_labels) >= 0).all()
    mean = gallery.stacks[gallery.stack_labels == 4].mean(axis=0)
    np.testing.assert_allclose(gallery.centroids[4], mean / np.linalg.norm(mean), atol=1e-6)
    assert gallery.is_enrolled.tolist() == [False] * 4 + [True] and (gallery.offsets[:4] == 0).all()
    crops = gallery.stacks[gallery.stack_labels == 4]
    spread = 1 - (crops @ crops.T)[np.triu_indices(5, 1)].mean()
    of_references, of_val = gallery.spreads
    assert gallery.offsets[4] == pytest.approx(((4 * spread + 2 * of_val) / 6 - of_references) / 4, abs=1e-6)
    (old,) = run_dir.glob("prototypes.2*.npz")
    assert lct.load_gallery(old)[0].class_names == before.class_names
    query = new_class(tmp_path / "query", "эскиз", 9, 12)
    for index in range(5):
        (query / "эскиз" / f"{index}.png").unlink()  # those that were enrolled
    make_query = make_dataset(tmp_path / "query2", {"axe": 6, "bit": 6, "clamp": 6, "drill": 6}, seed=3)
    shutil.copytree(make_query, query, dirs_exist_ok=True)
    capsys.readouterr()
    assert call_main("evaluate", "--run", run_dir, "--data_root", query, *QUIET) == 0
    figures = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert figures["closed"][gallery.matcher]["acc"]["value"] > 0.6


def test_a_class_of_few_crops_among_nearest_references_is_told_the_way_out(
    run_dir: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    added = new_class(tmp_path / "more", "saw", 6, 2)
    for matcher, is_warned in (("knn", True), ("centroid", False)):
        assert call_main("prototypes", "--run", run_dir, "--matcher", matcher, *QUIET) == 0
        assert lct.load_gallery(run_dir / "prototypes.npz")[0].matcher == matcher
        assert call_main("prototypes", "--run", run_dir, "--add", added, *QUIET) == 0
        assert ("saw: of many references" in capsys.readouterr().out) == is_warned
    assert len(list(run_dir.glob("prototypes.2*"))) == 4, "each is kept, also of the same second"


def test_more_crops_of_a_known_class_move_its_centroid_and_no_threshold(
    run_dir: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    before, _ = lct.load_gallery(run_dir / "prototypes.npz")
    assert call_main("prototypes", "--run", run_dir, "--add", new_class(tmp_path / "more", "bit", 1), *QUIET) == 0
    assert "threshold of bit" not in capsys.readouterr().out, "it is no new class"
    gallery, _ = lct.load_gallery(run_dir / "prototypes.npz")
    assert gallery.class_names == before.class_names and np.array_equal(gallery.thresholds, before.thresholds)
    moved = np.abs(gallery.centroids - before.centroids).max(axis=1) > 1e-6
    assert moved.tolist() == [False, True, False, False]
    assert len(gallery.stacks) == len(before.stacks) + 5
    mean = gallery.stacks[gallery.stack_labels == 1].mean(axis=0)
    np.testing.assert_allclose(gallery.centroids[1], mean / np.linalg.norm(mean), atol=1e-6)


def test_crops_added_to_a_class_of_limited_references_do_not_replace_the_images_left_out(
    run_dir: Path, tmp_path: Path, call_main: Main
) -> None:
    assert call_main("prototypes", "--run", run_dir, "--max_refs_per_class", 2, *QUIET) == 0
    before, _ = lct.load_gallery(run_dir / "prototypes.npz")
    assert call_main("prototypes", "--run", run_dir, "--add", new_class(tmp_path / "more", "bit", 1, 1), *QUIET) == 0
    gallery, _ = lct.load_gallery(run_dir / "prototypes.npz")
    first, second, added = gallery.stacks[gallery.stack_labels == 1]
    mean = np.linalg.norm(first + second) * before.centroids[1] + added
    np.testing.assert_allclose(gallery.centroids[1], mean / np.linalg.norm(mean), atol=1e-6)


def test_crops_that_the_run_is_judged_on_are_said_to_be_so(
    run_dir: Path, trained: tuple[Path, Path], tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "axe").symlink_to(trained[0] / "axe")
    splits = json.loads((run_dir / "splits.json").read_text("utf-8"))
    num_judged = len(splits["val"]["axe"]) + len(splits["test"]["axe"])
    assert call_main("prototypes", "--run", run_dir, "--add", tmp_path / "more", *QUIET) == 0
    assert f"warning: {num_judged} of the crops are val or test images of the run" in capsys.readouterr().out


def test_a_folder_that_is_one_class_is_blamed_on_the_flag_that_gave_it(
    run_dir: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    folder = new_class(tmp_path / "new", "saw", 4) / "saw"
    for words in (
        ("prototypes", "--run", run_dir, "--add", folder),
        ("evaluate", "--run", run_dir, "--data_root", folder),
    ):
        assert call_main(*words, *QUIET) == 2
        said = capsys.readouterr().err
        assert "config.json" not in said and f"{words[3]} {folder}" in said


def test_a_class_that_collides_is_named_with_its_twin(
    run_dir: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    twin = new_class(tmp_path / "twin", "axe too", 0)  # drawn as axe is
    assert call_main("prototypes", "--run", run_dir, "--add", twin, *QUIET) == 0
    assert "axe too is hard to tell from axe" in capsys.readouterr().out


def test_a_class_is_removed_and_a_wrong_name_is_corrected(
    run_dir: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    before, _ = lct.load_gallery(run_dir / "prototypes.npz")
    late = dataclasses.replace(before, is_enrolled=np.array([True, True, True, False]))
    with pytest.raises(lct.UserError, match="drill: is the last class that the run was trained on"):
        lct.remove_class(late, "drill")
    assert call_main("prototypes", "--run", run_dir, "--remove", "clmp", *QUIET) == 2
    assert "did you mean clamp?" in capsys.readouterr().err
    assert call_main("prototypes", "--run", run_dir, "--remove", "clamp", *QUIET) == 0
    gallery, _ = lct.load_gallery(run_dir / "prototypes.npz")
    assert gallery.class_names == ("axe", "bit", "drill")
    assert np.array_equal(gallery.stacks, before.stacks[before.stack_labels != 2])
    assert gallery.stack_labels.max() == 2 and np.array_equal(gallery.thresholds, before.thresholds[[0, 1, 3]])
    assert call_main("prototypes", "--run", run_dir, "--add", new_class(tmp_path / "more", "кий", 9), *QUIET) == 0
    capsys.readouterr()
    assert call_main("prototypes", "--run", run_dir, "--remove", unicodedata.normalize("NFD", "кий"), *QUIET) == 0
    assert "warning" not in capsys.readouterr().out, "it is no other name, and nothing has to be added again"


def test_interrupted_while_the_gallery_is_written_it_says_so(run_dir: Path, nursery: Nursery) -> None:
    plans = [kill("zipfile._ZipWriteFile.__init__", 1, signal.SIGTERM, when="after")]  # numpy has begun an array
    code, text = nursery.run("prototypes", "--run", run_dir, "--remove", "clamp", *QUIET, plans=plans)
    assert code == 143 and "interrupted (SIGTERM)" in text, text
    assert lct.load_gallery(run_dir / "prototypes.npz")[0].class_names == ("axe", "bit", "drill")


def test_list_shows_each_class_and_writes_nothing(
    run_dir: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(path.name for path in run_dir.iterdir())
    assert call_main("prototypes", "--run", run_dir, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["axe", "bit", "clamp", "drill"]
    assert sorted(path.name for path in run_dir.iterdir()) == before


def test_a_folder_that_is_no_run_is_not_sent_on_to_another_command(
    tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    assert call_main("prototypes", "--run", tmp_path, "--list") == 2
    assert capsys.readouterr().err.endswith("has no prototypes.npz\n  give the out_dir of a finished run\n")


def test_a_gallery_is_made_anew_as_the_run_made_it(
    run_dir: Path, tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    before, meta = lct.load_gallery(run_dir / "prototypes.npz")
    (run_dir / "prototypes.npz").unlink()
    assert call_main("evaluate", "--run", run_dir, *QUIET) == 2
    assert "has no prototypes.npz" in capsys.readouterr().err
    assert call_main("prototypes", "--run", run_dir, *QUIET) == 0
    again, new_meta = lct.load_gallery(run_dir / "prototypes.npz")
    names = {field.name for field in lct.dataclasses.fields(lct.Gallery)} - {"fusion", "by_centroid"}
    of_both = [{name: getattr(one, name) for name in names} | one.arrays() for one in (again, before)]
    for name in of_both[1]:
        own, other = (np.array(values[name]) for values in of_both)
        # Other batches than in training: sums differ in their last bits.
        same = np.allclose(own, other, atol=1e-5) if own.dtype.kind == "f" else np.array_equal(own, other)
        assert same, name
    fitted = dict.fromkeys(("date", "temperature", "val_thresholds", "spreads", "by_centroid"))
    assert new_meta | fitted == meta | fitted
    assert call_main("prototypes", "--run", run_dir, "--add", new_class(tmp_path / "more", "saw", 6), *QUIET) == 0
    capsys.readouterr()
    options = ("--prototypes_per_class", 2, "--max_refs_per_class", 6, "--target_precision", 0.6)
    assert call_main("prototypes", "--run", run_dir, *options, *QUIET) == 0
    assert "have to be added again: saw" in capsys.readouterr().out
    split, meta = lct.load_gallery(run_dir / "prototypes.npz")
    assert split.class_names == before.class_names and np.allclose(split.centroids, before.centroids, atol=1e-5)
    assert np.bincount(split.stack_labels).tolist() == [6] * 4 and meta["target_precision"] == 0.6
    assert split.most_prototypes == 2
    assert call_main("evaluate", "--run", run_dir, *QUIET) == 0
    assert "nearest of several prototypes a class" in capsys.readouterr().out


def test_with_several_prototypes_a_class_enrolling_and_removing_keep_them_apart(
    run_dir: Path, tmp_path: Path, call_main: Main
) -> None:
    assert call_main("prototypes", "--run", run_dir, "--prototypes_per_class", 2, *QUIET) == 0
    before, _ = lct.load_gallery(run_dir / "prototypes.npz")
    more = new_class(new_class(tmp_path / "more", "saw", 6, 8), "bit", 1, 8)
    assert call_main("prototypes", "--run", run_dir, "--add", more, *QUIET) == 0
    grown, _ = lct.load_gallery(run_dir / "prototypes.npz")
    for label in (0, 2, 3):
        own = before.prototypes[before.prototype_labels == label]
        assert np.array_equal(grown.prototypes[grown.prototype_labels == label], own)
    assert (grown.prototype_labels == 4).any() and (np.diff(grown.prototype_labels) >= 0).all()
    smaller = lct.remove_class(grown, "bit")
    assert np.array_equal(smaller.prototypes, grown.prototypes[grown.prototype_labels != 1])
    assert np.array_equal(np.unique(smaller.prototype_labels), np.arange(4))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("prototypes",), "--run"),
        (("prototypes", "--run", "RUN", "--prototypes_per_class", "many"), "'many' is none of auto, 1"),
        (("prototypes", "--run", "RUN", "--list", "--remove", "axe"), "one thing at a time"),
        (("prototypes", "--run", "RUN", "--remove", "quux", *QUIET), "class quux\n  --list shows what there is"),
        (("prototypes", "--run", "RUN", "--add", "nowhere"), "does not exist"),
        (("prototypes", "--run", "RUN", "--remove", "axe", "--no-match_features"), "has no effect beside --remove"),
        (("prototypes", "--run", "RUN", "--remove", "axe", "--exclude", "*_bad*"), "--exclude: has no effect beside"),
        (("prototypes", "--run", "RUN", "--list", "--class_map", "RUN/config.json"), "has no effect beside --list"),
        (("prototypes", "--run", "RUN", *QUIET, "--exclude", "*_bad*"), "no effect on the images of the run itself"),
        (("evaluate", "--run", "RUN", *QUIET, "--exclude", "*_bad*"), "no effect on the images of the run itself"),
        (("evaluate", "--run", "nowhere"), "does not exist"),
        (("evaluate", "--run", "RUN", "--unknown_dir", "nowhere"), "does not exist"),
    ],
)
def test_bad_words_cost_one_sentence(
    run_dir: Path, call_main: Main, capsys: pytest.CaptureFixture, words: tuple[str, ...], text: str
) -> None:
    assert call_main(*(word.replace("RUN", str(run_dir)) for word in words)) == 2
    assert text in capsys.readouterr().err


def test_folders_without_a_usable_crop_are_not_enrolled(
    run_dir: Path, trained: tuple[Path, Path], tmp_path: Path, call_main: Main, capsys: pytest.CaptureFixture
) -> None:
    """Wherever they stand among the others."""
    added = new_class(tmp_path / "more", "эскиз", 9)
    for name in ("a_broken", "яяя"):
        (added / name).mkdir()
    (added / "a_broken" / "1.png").write_bytes(b"\x89PNG cut off")
    new_class(added, "blurred", 6)
    assert call_main("prototypes", "--run", run_dir, "--add", added, "--exclude", "blurred/*", *QUIET) == 0
    assert "warning: without one usable crop, and not added: a_broken, яяя" in capsys.readouterr().out
    gallery, _ = lct.load_gallery(run_dir / "prototypes.npz")
    assert gallery.class_names[4:] == ("эскиз",) and len(gallery.knn_counts) == 5


def test_a_collision_counts_the_crops_whose_nearest_other_reference_is_of_that_class() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), (6, 4, 1))
    values = rng.normal(size=(11, 8)).astype(np.float32)
    values[5] = values[7] + 0.01  # a crop of `a` that lies beside one of `b`
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    gallery = lct.Gallery(
        class_names=("a", "b", "c"), centroids=(centroids := lct.class_centroids(values, labels, 3)),
        prototypes=centroids, prototype_labels=np.arange(3), stacks=values,
        stack_labels=labels, stack_paths=tuple("abcdefghijk"), stack_views=np.zeros(11, np.uint8),
        thresholds=np.full(3, 2.0, np.float32), matcher="centroid", knn_counts=np.ones(3, np.int64), temperature=0.1,
        is_pooled=np.zeros(3, bool), is_enrolled=np.zeros(3, bool), offsets=np.zeros(3, np.float32),
        log_odds=np.zeros((3, 2)),
    )  # fmt: skip
    cosine = values @ values.T
    np.fill_diagonal(cosine, -np.inf)
    neighbours = labels[cosine.argmax(axis=1)]
    for label, name in enumerate(gallery.class_names):
        counts = np.bincount(neighbours[labels == label], minlength=3)
        counts[label] = 0
        counts *= name != "c"  # one crop has no other of its class, which says nothing
        sentences = lct.find_collisions(gallery, [name])
        assert len(sentences) == bool(counts.any())
        if sentences:
            twin = gallery.class_names[counts.argmax()]
            reason = f"{counts.max()} of its {(labels == label).sum()} crops are nearer to a crop of that class"
            assert sentences[0].startswith(f"{name} is hard to tell from {twin}: {reason}")
    views = np.repeat(np.arange(11), 2)  # two of each crop, which lie beside each other
    twofold = dict(
        stacks=values[views], stack_labels=labels[views], stack_paths=tuple(gallery.stack_paths[i] for i in views)
    )
    both = lct.dataclasses.replace(gallery, **twofold)
    assert lct.find_collisions(both, gallery.class_names) == lct.find_collisions(gallery, gallery.class_names)
    assert lct.find_collisions(gallery, ["a"]), "the crop of it beside one of `b`"
    close = lct.dataclasses.replace(gallery, thresholds=np.full(3, -1.0, np.float32))
    assert len(lct.find_collisions(close, ["a", "b", "c"])) == 3, "centroids above the thresholds"


def test_too_few_unknown_images_are_refused_before_training(
    trained: tuple[Path, Path], tmp_path: Path, call_main: Main, capsys: Any
) -> None:
    strangers = new_class(tmp_path / "strangers", "any", 9, 1)
    args = ("--data_root", trained[0], *TINY_RUN, "--out_dir", tmp_path / "run", "--unknown_dir", strangers)
    assert call_main(*args) == 2
    assert "leaves one half empty" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_unknown_images_are_looked_for_where_every_other_image_is(tmp_path: Path) -> None:
    """Neither in hidden folders nor among hidden files; in any depth, whatever the case of the suffix."""
    strangers = new_class(tmp_path / "strangers", "any", 9, 12)
    (strangers / "any" / "0.png").rename(strangers / "A.PNG")
    expected = sorted(path.relative_to(strangers).as_posix() for path in strangers.rglob("*.*"))
    shutil.copytree(strangers / "any", strangers / "any" / ".thumbs")
    shutil.copy(strangers / "A.PNG", strangers / "any" / "._1.png")
    (strangers / "notes.txt").touch()
    assert sorted(lct.unknown_records(strangers, lct.Config()).paths) == expected


def test_intervals_draw_the_crops_of_one_photo_together(
    tmp_path: Path, call_main: Main, patch_used: Callable[..., Any]
) -> None:
    """Known and unknown ones, in the verdict too: drawn alone, they would make each figure look surer than it is."""
    data = make_dataset(tmp_path / "data", {"axe": 24, "bit": 24})
    strangers = new_class(tmp_path / "strangers", "any", 9, 40)
    for path in [*data.rglob("*.png"), *strangers.rglob("*.png")]:
        path.rename(path.with_name(f"{path.parent.name}{int(path.stem) // 4}_{path.name}"))
    drawn = patch_used(lct, "with_intervals")
    flags = ("--group_regex", r"^([a-z]+\d+)_", "--near_dup_bits", 0, "--unknown_dir", strangers)
    assert call_main("--data_root", data, *TINY_RUN, "--out_dir", tmp_path / "run", *flags) == 0
    assert call_main("evaluate", "--run", tmp_path / "run", *QUIET, "--unknown_dir", strangers) == 0
    counts = {(len(groups), len(np.unique(groups))) for _, groups in drawn.calls}
    drawn.calls.clear()
    other = make_dataset(tmp_path / "other", {"axe": 20, "bit": 16}, seed=3)
    for path in other.rglob("*.png"):
        path.rename(path.with_name(f"{path.parent.name}{int(path.stem) // 4}_{path.name}"))
    assert call_main("evaluate", "--run", tmp_path / "run", *QUIET, "--data_root", other) == 0
    assert {(len(groups), len(np.unique(groups))) for _, groups in drawn.calls} == {(36, 9)}, "named alike"
    test = json.loads((tmp_path / "run" / "splits.json").read_text("utf-8"))["test"]
    known = [path for paths in test.values() for path in paths]
    records = lct.unknown_records(strangers, lct.Config(group_regex=r"^([a-z]+\d+)_"))
    unknown = [records.paths[row] for row in records.rows("test").tolist()]
    assert len(known) > 4 < len(unknown)
    expected = [
        (len(paths), len({path.split("_")[0] for path in paths})) for paths in (known, unknown, known + unknown)
    ]
    assert counts == {*expected}


def test_unknown_images_of_one_photo_stay_in_one_half(tmp_path: Path) -> None:
    """Else thresholds would be set on other crops of the photos that measure them."""
    strangers = new_class(tmp_path / "strangers", "any", 9, 40)
    for path in (strangers / "any").iterdir():
        path.rename(path.with_name(f"shot{int(path.stem) // 4}_{path.name}"))
    halves = lct.unknown_records(strangers, lct.Config(group_regex=r"^(shot\d+)_"))
    splits_of_shots = {path.split("_")[0]: set() for path in halves.paths}
    for path, split in zip(halves.paths, halves.splits.tolist(), strict=True):
        splits_of_shots[path.split("_")[0]].add(split)
    assert len(splits_of_shots) == 10 and all(len(splits) == 1 for splits in splits_of_shots.values())
    assert {*halves.splits.tolist()} == {1, 2}
    apart = lct.unknown_records(strangers, lct.Config(group_regex=r"^(video\d+)_"))  # fits no name, and costs nothing
    assert apart.splits.tolist() == lct.unknown_records(strangers, lct.Config()).splits.tolist()
    with pytest.raises(lct.UserError, match=r"40 images in 1 group \(--group_regex\), which leaves one half empty"):
        lct.unknown_records(strangers, lct.Config(group_regex="^(shot)"))


def test_unknown_images_set_the_thresholds_with_one_half_and_measure_with_the_other(
    trained: tuple[Path, Path], tmp_path: Path, call_main: Main
) -> None:
    strangers = new_class(tmp_path / "strangers", "any", 9, 40)
    before = lct.unknown_records(strangers, lct.Config())
    new_class(strangers / ".thumbs", "any", 9, 5)
    (strangers / ".hidden.png").write_bytes(b"")
    halves = lct.unknown_records(strangers, lct.Config())
    assert list(halves.paths) == list(before.paths), "what is hidden is passed over"
    assert halves.splits.tolist() == before.splits.tolist()
    num_measured = len(halves.rows("test"))
    assert num_measured + len(halves.rows("val")) == len(halves.paths) == 40
    # Strangers may change the weight of features, and the matcher: thresholds are of another scale then.
    args = ("--data_root", trained[0], *TINY_RUN, "--no-match_features", "--matcher", "centroid")
    assert call_main(*args, "--out_dir", tmp_path / "plain") == 0
    assert call_main(*args, "--out_dir", tmp_path / "run", "--unknown_dir", strangers) == 0
    strict, plain = (lct.load_gallery(tmp_path / name / "prototypes.npz")[0] for name in ("run", "plain"))
    assert np.array_equal(strict.stacks, plain.stacks)
    assert (strict.thresholds >= plain.thresholds).all() and (strict.thresholds > plain.thresholds).any()
    measured = next(event for event in lct.read_events(tmp_path / "run") if event["event"] == "measured")
    assert measured["open_set"]["unknowns"] == num_measured and 0 <= measured["unknown_passed"]["value"] <= 1
    others = measured["open_set"]["others"]
    assert len(others) == 4 and all(own["unknowns"] == num_measured for own in others.values())
