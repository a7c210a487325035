"""Section 05, second half: who goes to train, val and test, and how that is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image, make_dataset, snapshot

import lct_dino3 as lct

SHARES = (0.7, 0.2, 0.1)
NO_TEST = (0.8, 0.2, 0.0)


def make_records(labels: np.ndarray, groups: np.ndarray, splits: np.ndarray) -> lct.Records:
    names = tuple(f"class {i}" for i in range(int(labels.max()) + 1))
    paths = np.array([f"{names[label]}/{i:06d}.png" for i, label in enumerate(labels.tolist())], dtype=lct.STRINGS)
    return lct.Records(Path("data"), names, paths, labels.astype(np.int32), groups.astype(np.int32), splits)


def random_data(seed: int, num_classes: int = 12, mixed: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels and groups: classes of 1 to 400 images, groups of 1 to 30, a share `mixed` of them joined."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), np.exp(rng.uniform(0, 6, num_classes)).astype(int))
    groups, count = np.zeros(len(labels), dtype=np.int64), 0
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)
        while len(rows):
            size = min(len(rows), int(rng.choice([1, 1, 2, 5, 30])))
            groups[rows[:size]] = count
            rows, count = rows[size:], count + 1
    for group in np.flatnonzero(rng.random(count) < mixed):
        groups[groups == group] = rng.integers(count)  # joins another group, mostly of another class
    shuffled = rng.permutation(len(labels))
    return labels[shuffled], groups[shuffled] * 7 + 3  # group numbers need not be dense


def splits_of_groups(groups: np.ndarray, splits: np.ndarray) -> list[set[int]]:
    return [set(splits[groups == group].tolist()) for group in np.unique(groups)]


def splits_of_class(labels: np.ndarray, splits: np.ndarray, label: int) -> set[int]:
    return set(splits[labels == label].tolist())


def groups_of_class(labels: np.ndarray, groups: np.ndarray, label: int) -> int:
    return len(np.unique(groups[labels == label]))


@pytest.mark.parametrize("size", [12, 15, 33, 35])  # fewer, and the least of one each weighs more
@pytest.mark.parametrize("shares", [SHARES, NO_TEST, (0.1, 0.45, 0.45)])
def test_shares_hold_over_all_classes_however_each_one_is_rounded(size, shares):
    labels = np.repeat(np.arange(40), size)
    splits = lct.assign_splits(labels, np.arange(len(labels)), shares, 0)
    assert np.abs(np.bincount(splits, minlength=3) - np.array(shares) * len(labels)).max() <= 1
    by_class = np.stack([np.bincount(splits[labels == label], minlength=3) for label in range(40)])
    assert np.abs(by_class - np.array(shares) * size).max() < 1  # each class is rounded down or up, no more


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shares", [SHARES, NO_TEST, (0.1, 0.45, 0.45)])
def test_groups_stay_whole_and_classes_get_what_their_groups_allow(seed, shares):
    labels, groups = random_data(seed)
    splits = lct.assign_splits(labels, groups, shares, seed)
    assert splits.shape == labels.shape and set(splits.tolist()) <= {0, 1, 2}
    assert all(len(found) == 1 for found in splits_of_groups(groups, splits))
    wanted = [split for split in range(3) if shares[split] > 0]
    for label in np.unique(labels):
        least = set(wanted[: groups_of_class(labels, groups, label)])  # train first, then val, then test
        assert least <= splits_of_class(labels, splits, label), label
    if shares[2] == 0:
        assert not (splits == 2).any()


@pytest.mark.parametrize("seed", range(25))
def test_classes_that_share_groups_are_everywhere_too(seed):
    labels, groups = random_data(seed, mixed=0.15)
    splits = lct.assign_splits(labels, groups, SHARES, seed)
    assert all(len(found) == 1 for found in splits_of_groups(groups, splits))
    for label in np.unique(labels):
        if groups_of_class(labels, groups, label) >= 3:
            assert splits_of_class(labels, splits, label) == {0, 1, 2}, label


@pytest.mark.parametrize("seed", range(10))
def test_few_large_groups_of_several_classes(seed):
    """Crops of a photo are one group and show several tools: 8 photos, 4 classes, each class on 4 to 6 of them."""
    rng = np.random.default_rng(seed)
    pairs = [(label, photo) for label in range(4) for photo in rng.permutation(8)[: rng.integers(4, 7)]]
    labels, groups = np.repeat(np.array(pairs), rng.integers(1, 6, len(pairs)), axis=0).T
    splits = lct.assign_splits(labels, groups, SHARES, seed)
    assert all(len(found) == 1 for found in splits_of_groups(groups, splits))
    for label in range(4):
        assert splits_of_class(labels, splits, label) == {0, 1, 2}


def can_be_everywhere(labels: np.ndarray, groups: np.ndarray) -> bool:
    """Say by trying all 3^G splits whether each class can have a group in train, val and test."""
    splits = np.array(list(itertools.product(range(3), repeat=int(groups.max()) + 1)))
    possible = np.ones(len(splits), dtype=bool)
    for label, split in itertools.product(np.unique(labels), range(3)):
        possible &= (splits[:, groups[labels == label]] == split).any(axis=1)
    return bool(possible.any())


def test_what_is_possible_with_few_shared_groups_is_found():
    """6 classes on 8 photos, each class on 3 or 4 of them: often possible, seldom easy."""
    missed, num_possible = [], 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        photos = [rng.permutation(8)[: rng.integers(3, 5)] for _ in range(6)]
        labels, groups = np.repeat(np.arange(6), [len(mine) for mine in photos]), np.concatenate(photos)
        if can_be_everywhere(labels, groups):
            num_possible += 1
            splits = lct.assign_splits(labels, groups, SHARES, seed)
            if any(splits_of_class(labels, splits, label) != {0, 1, 2} for label in range(6)):
                missed.append(seed)
    assert num_possible > 30 and missed == []


def test_each_class_is_trained_on_however_few_and_mixed_the_groups_are():
    splits = lct.assign_splits(np.array([2, 0, 0, 2, 1]), np.array([0, 0, 0, 1, 1]), SHARES, 0)
    assert splits.tolist() == [0] * 5, "class 1 shares its only group, and so does class 0"
    for seed in range(300):
        rng = np.random.default_rng(seed)
        size = rng.integers(4, 16)
        labels, groups = rng.integers(0, 4, size), rng.integers(0, rng.integers(2, 6), size)  # a number may be no class
        splits = lct.assign_splits(labels, groups, (SHARES, NO_TEST, (0.1, 0.3, 0.6))[seed % 3], seed)
        assert set(labels[splits == 0].tolist()) == set(labels.tolist()), seed
        assert all(len(found) == 1 for found in splits_of_groups(groups, splits))


def test_a_very_rare_class_beside_very_common_ones():
    labels = np.repeat([0, 1, 2, 3], [20_000, 3, 2, 1])
    for seed in range(5):
        splits = lct.assign_splits(labels, np.arange(len(labels)), SHARES, seed)
        assert [splits_of_class(labels, splits, label) for label in range(4)] == [{0, 1, 2}, {0, 1, 2}, {0, 1}, {0}]


def test_one_group_is_trained_on_whatever_the_shares():
    for shares in (SHARES, (0.1, 0.6, 0.3), (0.1, 0.3, 0.6)):
        splits = lct.assign_splits(np.zeros(5, int), np.zeros(5, int), shares, 0)
        assert splits.tolist() == [0] * 5
        splits = lct.assign_splits(np.zeros(4, int), np.array([0, 0, 0, 1]), shares, 0)
        assert set(splits.tolist()) == {0, 1}


@pytest.mark.parametrize("shares", [SHARES, NO_TEST, (0.5, 0.25, 0.25)])
def test_single_images_are_shared_out_exactly(shares):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [40, 57, 100, 333, 1000]))
    splits = lct.assign_splits(labels, np.arange(len(labels)), shares, 0)
    for label, count in enumerate([40, 57, 100, 333, 1000]):
        found = np.bincount(splits[labels == label], minlength=3)
        assert np.abs(found - count * np.asarray(shares)).max() < 1


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_shared_out_closely(seed):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(8), 1000)
    groups = labels * 1000 + rng.integers(0, 150, len(labels))  # about 7 images a group
    splits = lct.assign_splits(labels, groups, SHARES, seed)
    for label in range(8):
        assert np.abs(np.bincount(splits[labels == label], minlength=3) / 1000 - SHARES).max() < 0.01


def test_the_seed_decides_and_nothing_else():
    labels, groups = random_data(1)
    first = lct.assign_splits(labels, groups, SHARES, 42)
    assert np.array_equal(first, lct.assign_splits(labels, groups, SHARES, 42))
    np.random.seed(5)  # global state has no say
    assert np.array_equal(first, lct.assign_splits(labels, groups * 3 + 1, SHARES, 42))
    assert not np.array_equal(first, lct.assign_splits(labels, groups, SHARES, 43))


@pytest.mark.parametrize("seed", range(4))
def test_leaks_are_counted_as_by_hand(tmp_path, seed):
    root = make_dataset(tmp_path / "data", {"a": 20, "b": 12}, side=24)
    for path in sorted(root.rglob("*.png")):  # frames of shots, of which some show both classes
        path.rename(path.with_name(f"shot{int(path.stem) // 3}_{path.name}"))
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", seed=seed, near_dup_bits=0)
    alone = lct.scan_dataset(config)
    grouped = lct.scan_dataset(dataclasses.replace(config, group_regex="^(shot[0-9]+)_"))
    records, naive = grouped.records, alone.records.splits
    trained_on = set(records.groups[naive == 0].tolist())
    expected = sum(group in trained_on for group in records.groups[naive != 0].tolist())
    assert expected > 0 and grouped.report["leaks_prevented"] == expected
    assert alone.report["leaks_prevented"] == 0


def test_warnings_name_the_class_and_what_it_lacks():
    labels, groups = np.repeat([0, 1, 2], [6, 5, 4]), np.r_[0:6, [6] * 5, [7, 7, 8, 8]]
    records = make_records(labels, groups, lct.assign_splits(labels, groups, SHARES, 0))
    _, found = lct.count_classes(records, Counter(), lct.Config())
    assert len(found) == 2
    assert found[0].startswith("class 1: 5 images in 1 group, so none in val and test")
    assert found[1].startswith("class 2: 4 images in 2 groups, so none in test")
    no_test = make_records(labels, groups, lct.assign_splits(labels, groups, NO_TEST, 0))
    _, found = lct.count_classes(no_test, Counter(), lct.Config(test_split=0.0))
    assert [text.split(":")[0] for text in found] == ["class 1"]


# --- grouping by name


def test_group_keys_join_what_the_regex_captures_equal():
    paths = ["a/src1_1.jpg", "a/src1_2.jpg", "a/src2_1.jpg", "b/src1_9.jpg", "b/other.jpg", "src1_/plain.jpg"]
    keys = lct.group_keys(paths, r"^(src\d+)_")
    assert keys[0] == keys[1] == keys[3]  # one photo, also across classes
    assert len(set(keys.tolist())) == 4  # src1, src2 and two that stand alone
    assert len(set(lct.group_keys(paths, None).tolist())) == 6
    optional = r"^(?:src(\d+)_)?"  # a group that took no part captures nothing
    assert len(set(lct.group_keys(paths, optional).tolist())) == 4
    with pytest.raises(lct.UserError, match=r"src1_1\.jpg"):
        lct.group_keys(paths, "^(shot)_")


def test_groups_from_names_and_from_duplicates_join(tmp_path):
    root = make_dataset(tmp_path / "data", {"a": 6, "b": 6})
    for folder in ("a", "b"):
        for i in range(6):
            (root / folder / f"{i:04d}.png").rename(root / folder / f"{folder}{i // 2}_{i}.png")
    (root / "b" / "b2_copy.png").write_bytes((root / "a" / "a0_0.png").read_bytes())
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", group_regex=r"^(\w\d)_")
    records = lct.scan_dataset(config).records
    groups = {records.paths[i]: int(records.groups[i]) for i in range(13)}
    assert len({groups[p] for p in ("a/a0_0.png", "a/a0_1.png", "b/b2_copy.png", "b/b2_4.png", "b/b2_5.png")}) == 1
    assert len(set(groups.values())) == 5


# --- splits.json


@pytest.fixture
def written(tmp_path):
    """Records of a small data set, their splits.json, and the config."""
    root = make_dataset(tmp_path / "data", {"молоток": 7, "a b": 9})
    config = lct.Config(data_root=root, out_dir=tmp_path / "run")
    records = lct.scan_dataset(config).records
    lct.write_splits(tmp_path / "splits.json", records, config.seed)
    return records, tmp_path / "splits.json", config


def same_records(left: lct.Records, right: lct.Records) -> bool:
    arrays = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("labels", "groups", "splits"))
    return arrays and list(left.paths) == list(right.paths) and left.class_names == right.class_names


def test_splits_json_lists_every_image_once_by_split_and_class(written):
    records, path, config = written
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["seed"] == config.seed and table["classes"] == ["a b", "молоток"]
    listed = [item for split in lct.SPLIT_NAMES for items in table[split].values() for item in items]
    assert sorted(listed) == sorted(records.paths) and len(set(listed)) == 16
    for number, split in enumerate(lct.SPLIT_NAMES):
        for name, items in table[split].items():
            assert all((config.data_root / item).is_file() and item.startswith(f"{name}/") for item in items)
            mine = (records.splits == number) & (records.labels == table["classes"].index(name))
            assert len(items) == int(mine.sum())


def test_splits_are_read_back_as_they_were_written(written):
    records, path, _ = written
    again, notes = lct.reuse_splits(path, records)
    assert same_records(again, records) and notes == []
    shuffled = lct.assign_splits(records.labels, records.groups, SHARES, 7)
    other = dataclasses.replace(records, splits=shuffled)
    assert not np.array_equal(shuffled, records.splits)
    assert same_records(lct.reuse_splits(path, other)[0], records)  # the file decides, not today's split


def test_vanished_files_keep_their_place_and_new_ones_stay_out(written):
    records, path, config = written
    gone, new = records.paths[4], config.data_root / "a b" / "0002b.png"
    new.write_bytes((config.data_root / "молоток" / "0001.png").read_bytes())
    again, (note,) = lct.reuse_splits(path, lct.scan_dataset(config).records)
    assert "a b/0002b.png" in note and again.fingerprint == records.fingerprint, "the images of the run are the same"
    (config.data_root / gone).unlink()
    again, notes = lct.reuse_splits(path, lct.scan_dataset(config).records)
    assert list(again.paths) == list(records.paths)
    assert np.array_equal(again.splits, records.splits) and np.array_equal(again.labels, records.labels)
    assert len(notes) == 2 and f"1 image of this run's split gone or broken now, e.g. {gone}" in notes[0]
    assert "a b/0002b.png" in notes[1]
    assert len(again.groups) == 16 and len(np.unique(again.groups)) == 16
    assert again.fingerprint != records.fingerprint


def test_other_classes_than_the_run_had_are_refused(written):
    records, path, config = written
    make_dataset(config.data_root, {"новый": 3})
    with pytest.raises(lct.UserError, match="новый"):
        lct.reuse_splits(path, lct.scan_dataset(config).records)
    fewer = lct.Records(records.root, ("a b",), records.paths, records.labels, records.groups, records.splits)
    with pytest.raises(lct.UserError, match="молоток"):
        lct.reuse_splits(path, fewer)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"classes": ["a b", "молоток"]}'])
def test_a_damaged_splits_json_is_the_users_to_mend(written, content):
    records, path, _ = written
    path.write_text(content, encoding="utf-8")
    with pytest.raises(lct.UserError, match=r"splits\.json"):
        lct.reuse_splits(path, records)


def test_a_checkpoint_without_its_splits_json_is_the_users_to_mend(written):
    records, path, _ = written
    path.unlink()
    with pytest.raises(lct.UserError, match=r"splits\.json"):
        lct.reuse_splits(path, records)


# --- real data


def test_real_crops_of_one_photo_stay_together_and_all_classes_are_everywhere(shared_data, tmp_path):
    root = shared_data / "tools17"
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", group_regex=r"^(src\d+)_")
    found = lct.scan_dataset(config)
    records = found.records
    assert len(records.paths) == 1500 and list(records.class_names) == names and not found.report["quarantined"]
    photos = np.array([Path(path).name.split("_")[0] for path in records.paths])
    for photo in np.unique(photos):
        assert len(set(records.splits[photos == photo].tolist())) == 1, photo
    for label in range(len(names)):
        assert splits_of_class(records.labels, records.splits, label) == {0, 1, 2}
    assert np.abs(np.bincount(records.splits) / 1500 - SHARES).max() < 0.03
    assert found.report["leaks_prevented"] > 100 and snapshot(tmp_path) == {}


# --- a part of the data


def test_data_fraction_keeps_whole_groups_shares_and_splits(tmp_path):
    root = make_dataset(tmp_path / "data", {"a": 60, "b": 30, "c": 6}, side=24)
    for path in sorted(root.rglob("*.png")):  # three frames of each shot
        path.rename(path.with_name(f"{path.parent.name}{int(path.stem) // 3}_{path.name}"))
    options = {"data_root": root, "out_dir": tmp_path / "run", "group_regex": r"^(\w\d+)_", "near_dup_bits": 0}
    whole = lct.scan_dataset(lct.Config(**options)).records
    scan = lct.scan_dataset(lct.Config(data_fraction=0.3, **options))
    part, split_of = scan.records, dict(zip(whole.paths, whole.splits.tolist(), strict=True))
    assert all(split_of[path] == split for path, split in zip(part.paths, part.splits.tolist(), strict=True))
    everyone, kept = ({path.split("_")[0] + "_" for path in own.paths} for own in (whole, part))
    assert len(part.paths) == 3 * len(kept) < 3 * len(everyone), "groups are kept or left out as a whole"
    counts = [np.histogram2d(own.labels, own.splits, bins=(3, 3))[0] / 3 for own in (whole, part)]
    wanted = np.maximum(0.3 * counts[0], counts[0] > 0)
    assert (np.abs(counts[1] - wanted) <= 1).all() and (counts[1][counts[0] > 0] >= 1).all(), counts
    assert scan.report["num_usable"] == 96 and f"{len(part.paths)} of them are used" in lct.format_findings(
        scan.report | {"masks": {"usable": 0, "refused": [], "not_made": []}}
    )
    again, other = (lct.scan_dataset(lct.Config(data_fraction=0.3, seed=seed, **options)).records for seed in (42, 7))
    assert same_records(again, part) and list(other.paths) != list(part.paths)


def test_a_part_of_data_that_have_grown_is_what_it_was(tmp_path):
    """Another part would be drawn of them."""
    root = make_dataset(tmp_path / "data", {"a": 20, "b": 20}, side=24)
    config = lct.Config(data_root=root, out_dir=tmp_path / "run", data_fraction=0.5, near_dup_bits=0)
    part, path = lct.scan_dataset(config).records, tmp_path / "splits.json"
    lct.write_splits(path, part, config.seed)
    for number in range(12):
        draw_image(0, 99, number, side=24).save(root / "a" / f"0{number}.png")
    assert list(lct.scan_dataset(config).records.paths) != list(part.paths)
    again, notes = lct.reuse_splits(path, lct.scan_dataset(config, path).records)
    assert list(again.paths) == list(part.paths) and np.array_equal(again.splits, part.splits) and notes == []
    grown = lct.scan_dataset(config, path).records
    for gone in range(20):
        rows = np.delete(np.arange(20), gone)
        arrays = {name: getattr(grown, name)[rows] for name in ("labels", "groups", "splits")}
        left = dataclasses.replace(
            grown, paths=np.array([grown.paths[row] for row in rows], dtype=lct.STRINGS), **arrays
        )
        groups = lct.reuse_splits(path, left)[0].groups
        assert len(set(groups.tolist())) == 20, "a missing image gets a group of its own"
    for folder in ("a", "b"):  # none of the run's images is where it was
        (root / folder).rename(tmp_path / "cropped")
        (root / folder).mkdir()
        (tmp_path / "cropped").rename(root / folder / "cropped")
    with pytest.raises(lct.UserError, match="a: 0 usable"):
        lct.check_trainable(lct.scan_dataset(config, path), config)


def test_too_few_images_of_a_part_of_the_data_are_no_reason_to_add_some(tmp_path):
    root = make_dataset(tmp_path / "data", {"a": 8, "b": 8}, side=24)
    for fraction, ending in ((0.5, "--class_map, or raise --data_fraction"), (1.0, "--class_map")):
        config = lct.Config(data_root=root, out_dir=tmp_path / "run", data_fraction=fraction, min_per_class=9)
        with pytest.raises(lct.UserError) as caught:
            lct.check_trainable(lct.scan_dataset(config), config)
        assert str(caught.value).endswith(ending)
