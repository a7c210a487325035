"""Sections 02, 07 and 09: lists of transforms in place of the built-in augmentation, and what is wrong with an entry."""

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_RUN

import lct_dino3 as lct

CROP = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
SHORT_NAMES = (
    "normalize longest_max_size pad_if_needed random_crop_from_borders shift_scale_rotate elastic_transform grid_distortion"
    " random_brightness_contrast median_blur rgb_shift planckian_jitter coarse_dropout randaugment trivialaugment to_tensor"
).split()


def entry(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": name, **arguments}


def build(*entries: dict[str, Any], augment: bool = True, fill: lct.Fill | None = None, **lists: Any) -> lct.Transform:
    name = "train_augmentations" if augment else "val_augmentations"
    return lct.build_transform(48, augment, fill, lct.given_lists(lct.Config(**{**lists, name: entries})))


def test_every_short_name_of_the_recipe_is_a_square_uint8_picture_without_a_warning() -> None:
    needed = {"longest_max_size": {"max_size": 40}, "pad_if_needed": {"min_height": 99, "min_width": 99}}
    for name in SHORT_NAMES:
        p = {} if name in ("normalize", "to_tensor") else {"p": 1.0}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            transform = build(entry(name, **needed.get(name, {}), **p))
            picture = transform(CROP, None, 3)
        assert (picture.shape, picture.dtype) == ((48, 48, 3), np.uint8), name
        plain = lct.fit_square(CROP, 48)
        assert np.array_equal(picture, plain) == (name in ("normalize", "to_tensor")), name


def test_lists_do_what_albumentations_does_with_the_same_draws() -> None:
    import albumentations as A

    transform = build(
        entry("CoarseDropout", p=1.0, fill=7), entry("horizontal_flip", p=0.5), entry("MedianBlur", p=1.0)
    )
    steps = [A.CoarseDropout(p=1.0, fill=7), A.HorizontalFlip(p=0.5), A.MedianBlur(p=1.0)]
    for seed in range(5):
        rng, generator, expected = np.random.default_rng((seed, 4)), lct.random.Random(8 * seed + 4), CROP
        for step in steps:
            composed = A.Compose([step])
            composed.set_random_state(rng, generator)
            expected = composed(image=expected)["image"]
        assert np.array_equal(transform(CROP, None, seed), lct.fit_square(expected, 48))


def test_the_same_seed_gives_the_same_picture_also_in_another_process() -> None:
    one_of = entry("OneOf", transforms=[entry("median_blur"), entry("rgb_shift")], p=0.9)
    transform = build(entry("randaugment"), one_of, entry("trivialaugment", p=0.7), entry("elastic_transform"))
    first = [transform(CROP, None, seed).tobytes() for seed in range(20)]
    lct.torch.manual_seed(5)
    state = lct.torch.get_rng_state()
    again = pickle.loads(pickle.dumps(transform))
    assert [again(CROP, None, seed).tobytes() for seed in range(20)] == first and len(set(first)) >= 18
    assert lct.torch.equal(lct.torch.get_rng_state(), state), "the generator of the training is left alone"


def test_the_order_is_pre_then_train_or_val_then_post() -> None:
    """Crops of known corners: each list takes its part of what the one before has left."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = np.arange(64)[:, None], np.arange(64)[None]
    cut = {"pre_transforms": (entry("crop", x_min=8, y_min=8, x_max=64, y_max=64),)}
    cut |= {"train_augmentations": (entry("crop", x_min=4, y_min=4, x_max=56, y_max=56),)}
    cut |= {"val_augmentations": (entry("crop", x_min=2, y_min=2, x_max=56, y_max=56),)}
    cut |= {"post_transforms": (entry("crop", x_min=1, y_min=1, x_max=49, y_max=49),)}
    lists = lct.given_lists(lct.Config(**cut))
    train, val = (lct.build_transform(48, augment, None, lists) for augment in (True, False))
    assert train(image, None, 0)[0, 0].tolist() == [13, 13, 0] and val(image, None, 0)[0, 0].tolist() == [11, 11, 0]
    assert train(image, None, 0, False).shape == (48, 48, 3)
    assert train(image, None, 0, False)[0, 0].tolist() == [9, 9, 0], "the schedule gates what is between pre and post"
    built_in = lct.build_transform(48, True, None, {"pre_transforms": lists["pre_transforms"]})
    assert built_in.colours is not None and built_in(image, None, 0).shape == (48, 48, 3)


@pytest.mark.parametrize("name", ["shift_scale_rotate", "grid_distortion", "random_crop_from_borders", "randaugment"])
def test_masks_travel_along_and_the_fill_stays(name: str) -> None:
    image, mask = np.full((60, 80, 3), 30, np.uint8), np.zeros((60, 80), np.uint8)
    image[15:45, 20:60], mask[15:45, 20:60] = (250, 240, 230), 255
    fill = lct.Fill("gray", (114,) * 3)
    moved = 0
    for seed in range(30):
        picture = build(entry(name, p=1.0), fill=fill)(image, mask, seed)
        assert 0.2 < (picture == 114).all(axis=2).mean() < 0.95, "gray is all around the object"
        elsewhere = np.where(mask[:, :, None] > 0, image, 222).astype(np.uint8)
        assert np.array_equal(build(entry(name, p=1.0), fill=fill)(elsewhere, mask, seed), picture), (
            "nothing shows through"
        )
        moved += not np.array_equal(picture, build(fill=fill)(image, mask, seed))
    assert moved > 10


@pytest.mark.parametrize("name", ["pre_transforms", "train_augmentations", "val_augmentations", "post_transforms"])
def test_colours_change_on_the_object_alone(name: str) -> None:
    """Also where the crop has the size of the model already, and nothing is fitted afterwards."""
    image, mask = np.full((32, 32, 3), 30, np.uint8), np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    lists = lct.given_lists(lct.Config(**{name: (entry("invert_img", p=1.0),)}))
    fill = lct.Fill("black", (0, 0, 0))
    is_training = name == "train_augmentations"
    picture = lct.build_transform(32, is_training, fill, lists)(image, mask, 1)
    assert (picture[mask > 0] == 225).all() and (picture[mask == 0] == 0).all()


@pytest.mark.parametrize("kind", lct.POLICIES)
def test_the_mask_of_a_policy_is_the_mask_of_what_has_moved(kind: str) -> None:
    """A picture of the mask itself: wherever only its place has changed, mask and picture are still the same."""
    mask = np.zeros((60, 80), np.uint8)
    mask[20:50, 10:35], mask[5:15, 50:70] = 255, 255
    policy, rng, moved = lct.Policy(lct.ListEntry("", kind, kind, {"fill": 0})), np.random.default_rng(0), 0
    policy.set_random_state(rng, lct.random.Random(0))
    for _ in range(60):
        found = policy(image=np.dstack([mask] * 3), mask=mask)
        if set(np.unique(found["image"])) <= {0, 255} and found["image"].any():
            assert np.array_equal(found["image"][:, :, 0], found["mask"])
            moved += not np.array_equal(found["mask"], mask)
    assert moved > 5


@pytest.mark.parametrize(
    "old, new",
    [
        (entry("coarse_dropout", max_holes=4, max_height=9, max_width=9, fill_value=200, p=1.0),
         entry("CoarseDropout", num_holes_range=[4, 4], hole_height_range=[9, 9], hole_width_range=[9, 9], fill=200, p=1.0)),
        (entry("coarse_dropout", min_holes=1, max_holes=4, p=1.0), entry("coarse_dropout", num_holes_range=[1, 4], p=1.0)),
        (entry("shift_scale_rotate", value=9, border_mode="cv2.BORDER_CONSTANT", always_apply=True),
         entry("ShiftScaleRotate", fill=9, border_mode=0, p=1.0)),
        (entry("pad_if_needed", min_height=99, min_width=99, value=7), entry("PadIfNeeded", min_height=99, min_width=99, fill=7)),
        (entry("ImageCompression", quality_lower=20, quality_upper=30, p=1),
         entry("ImageCompression", quality_range=[20, 30], p=1)),
    ],
)  # fmt: skip
def test_arguments_of_albumentations_1_mean_what_they_meant(old: dict, new: dict) -> None:
    for seed in range(5):
        pictures = [build(item)(CROP, None, seed) for item in (old, new)]
        assert np.array_equal(*pictures) and not np.array_equal(pictures[0], lct.fit_square(CROP, 48))


WRONG = {
    "[{type: corse_dropout}]": ("[0].type", "did you mean coarse_dropout"),
    "[{type: median_blur}, {type: ResizeIt}]": ("[1].type: ResizeIt is no transform", "Resize"),
    "[{p: 0.5}]": ("[0]: has no type", "coarse_dropout"),
    "[{type: coarse_dropout, fil: 3}]": ("[0].fil: is no argument of CoarseDropout", "did you mean fill"),
    "[{type: coarse_dropout, min_holes: 3}]": ("[0].min_holes", "write num_holes_range: [low, high]"),
    "[{type: coarse_dropout, num_holes_range: 4}]": ("[0].num_holes_range: cannot be used", "valid tuple"),
    "[{type: elastic_transform, alpha_affine: 4}]": ("[0].alpha_affine: is no argument", "alpha"),
    "[{type: median_blur, p: 1.5}]": ("[0].p: cannot be used", "less than or equal to 1"),
    "[{type: OneOf, transforms: [{type: median_blur, blur: 3}]}]": ("[0].transforms[0].blur", "blur_limit"),
    "[{type: OneOf, transforms: [{type: randaugment}]}]": ("[0].transforms[0]", "cannot stand inside"),
    "[{type: randaugment, n: 3}]": ("[0].n: is no argument of RandAugment", "num_ops"),
    "[{type: randaugment, magnitude: 31}]": ("[0]", "magnitude 31 is none of 31 bins"),
    "[{type: randaugment, p: 2}]": ("[0].p", "is no probability"),
    "[{type: to_float, p: 1}]": ("train_augmentations: fail", "ToFloat makes float32"),
    "[{type: normalize, normalization: image}]": ("[0].normalization", "--mean and --std"),
    "[{type: normalize, mean: 0.5, std: 0.5}]": ("[0].mean", "three numbers"),
    "[{type: normalize, mean: [0.5, 0.5, 0.5], std: [0, 0, 0]}]": ("[0].std", "from 0.001 to 1"),
    "[{type: randaugment, magnitude: high}]": ("[0]", "magnitude high is none of 31 bins"),
    "[{type: randaugment, num_magnitude_bins: 5}]": ("[0]", "magnitude 9 is none of 5 bins"),
    "[{type: DualTransform}]": ("[0].type", "is no transform"),
    "[{type: HistogramMatching, p: 1}]": ("train_augmentations: fail", "metadata"),
    "[{type: OneOf}]": ("[0]: cannot be used", "transforms"),
    "[{type: normalize}, {type: median_blur}]": ("[1]: comes after --train_augmentations[0]", "put it before"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_entry_is_named_before_anything_is_loaded(text: str) -> None:
    config = lct.parse_command_line(["--train_augmentations", text])
    with pytest.raises(lct.UserError) as caught:
        lct.check_transforms(config)
    assert all(part in str(caught.value) for part in WRONG[text]), str(caught.value)


def test_a_wrong_list_ends_the_command_and_nothing_is_written(
    call_main: Any, small_data: Path, tmp_path: Path, capsys: Any
) -> None:
    argv = ("--data_root", small_data, "--out_dir", tmp_path / "run", *TINY_RUN)
    assert call_main(*argv, "--val_augmentations", '[{"type": "medianblur", "bluur_limit": 3}]') == 2
    assert "--val_augmentations[0].bluur_limit" in capsys.readouterr().err and not (tmp_path / "run").exists()
    (tmp_path / "run.yaml").write_text("dataset: {val_augmentations: [{type: medianblur, bluur_limit: 3}]}", "utf-8")
    assert call_main(*argv, "--config", tmp_path / "run.yaml") == 2
    assert f"{tmp_path / 'run.yaml'}: dataset.val_augmentations[0].bluur_limit" in capsys.readouterr().err
    for text in ("coarse_dropout", "{type: median_blur}", "[median_blur]", "[{type: "):
        with pytest.raises(lct.UserError, match="--pre_transforms"):
            lct.parse_command_line(["--pre_transforms", text])


def test_normalize_sets_what_the_device_subtracts(call_main: Any, small_data: Path, tmp_path: Path) -> None:
    half, lists = [0.5, 0.5, 0.5], "[{type: to_tensor}, {type: normalize, mean: [.5, .5, .5], std: [.5, .5, .5]}]"
    config = lct.parse_command_line(["--post_transforms", lists])
    assert lct.given_normalization(config) == (tuple(half), tuple(half))
    plain = lct.parse_command_line(["--post_transforms", "[{type: normalize, mean: [0, 0, 0], std: [1, 1, 1]}]"])
    assert lct.given_normalization(plain) == ((0.0,) * 3, (1.0,) * 3)
    for text in ("[{type: normalize}]", "[{type: normalize, always_apply: true}]"):
        assert lct.given_normalization(lct.parse_command_line(["--post_transforms", text])) == ((), ())
    with pytest.raises(lct.UserError, match=r"(?s)post_transforms\[1\].* give one mean and std"):
        lct.given_normalization(lct.dataclasses.replace(config, mean=(0.4, 0.4, 0.4), std=(0.5, 0.5, 0.5)))
    argv = ("--data_root", small_data, "--out_dir", tmp_path / "run", *TINY_RUN, "--post_transforms", lists)
    assert call_main(*argv, "--pre_transforms", "[{type: median_blur, p: 1}]") == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert written["model"]["mean"] == half and written["options"]["pre_transforms"] == [entry("median_blur", p=1)]
    run = lct.load_run(tmp_path / "run", lct.make_runtime(0, "auto"))
    assert run.config.post_transforms == config.post_transforms
    assert run.meta["transforms"] == [entry("median_blur", p=1)], "what else a query must go through"
    blurred = run.transform()(CROP, None, 0)
    assert not np.array_equal(blurred, lct.fit_square(CROP, 32)), "production sees what val saw"


def test_flags_written_back_are_read_again() -> None:
    typed = "--exclude *.tif a b.png --val_split 0.3 --class_map c.yaml --debug".split()
    config = lct.parse_command_line(typed)
    words = lct.format_flags(config, lct.MASK_FLAGS)
    assert lct.parse_command_line(words) == config and sorted(words) == sorted(typed)
    assert lct.Config(**{"val_augmentations": ()}).as_plain()["val_augmentations"] == []


@pytest.mark.parametrize("name", ["train_augmentations", "val_augmentations"])
def test_a_list_that_does_not_fit_the_smallest_crop_is_refused_before_training(
    name: str, call_main: Any, small_data: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(small_data, tmp_path / "data")
    with lct.Image.open(tmp_path / "data" / "pliers" / "0003.png") as image:
        image.resize((50, 40)).save(tmp_path / "data" / "pliers" / "0003.png")
    argv = ("--data_root", tmp_path / "data", "--out_dir", tmp_path / "run", *TINY_RUN, f"--{name}")
    assert call_main(*argv, "[{type: RandomCrop, height: 48, width: 48}]") == 2
    error = capsys.readouterr().err
    assert f"--{name}" in error and "RandomCrop cannot be applied" in error and not (tmp_path / "run").exists()
    assert "fail on pliers/0003.png of 50 x 40 px" in error and "pad_if_needed" in error


def test_a_random_evaluation_is_warned_of(small_data: Path) -> None:
    scan = lct.scan_dataset(lct.Config(data_root=small_data, out_dir=small_data.parent / "none"))
    for text, is_random in (("{type: HorizontalFlip, p: 0.5}", True), ("{type: HorizontalFlip, p: 1}", False)):
        config = lct.parse_command_line(["--val_augmentations", f"[{text}]"])
        assert bool(lct.check_transforms_fit(scan, config)) == is_random
        config = lct.parse_command_line(["--train_augmentations", f"[{text}]"])
        assert lct.check_transforms_fit(scan, config) == []
    config = lct.parse_command_line(
        ["--train_augmentations", "[{type: CropNonEmptyMaskIfExists, height: 9, width: 9}]"]
    )
    with pytest.raises(lct.UserError, match="Can not find mask"):  # what the library says of crops without one
        lct.check_transforms_fit(scan, config)


def test_an_image_that_a_transform_cannot_take_is_left_out_by_name(tmp_path: Path) -> None:
    for name, side in (("0.png", 300), ("1.png", 60)):
        lct.Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / name)
    numbers = np.arange(2, dtype=np.int32)
    records = lct.Records(
        tmp_path, ("a",), np.array(["0.png", "1.png"], dtype=lct.STRINGS), 0 * numbers, numbers, np.zeros(2, np.int8)
    )
    dataset = lct.CropDataset(records, build(entry("random_crop", height=128, width=128)))
    batch = dataset.collate([dataset[lct.SampleKey(row, (), 0)] for row in (0, 1)])
    assert batch.rows.tolist() == [0] and batch.failures[0][0] == 1 and "RandomCrop" in batch.failures[0][1]
