"""tools/masks.py: the real package with a small model of random weights; the gate, the memory, the messages."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import masks
import numpy as np
import pytest
import torch
from conftest import TINY_RUN, draw_image, shrink_config
from PIL import Image
from test_masks import make_masked_dataset, scan

import lct_dino3 as lct

TINY = "configs/sam2.1/sam2.1_hiera_t.yaml"
# File names that a user may have; the first crop is wide, so that a squashed mask would show.
CROPS = {"hammer/0000.png": (90, 60), "hammer/кадр 1.png": (48, 64), "pliers/0000.png": (56, 56)}
PROPOSED: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}  # what the model says of a crop, which takes it seconds


@pytest.fixture(scope="session")
def sam2_ckpt(sam2_cfg: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the official layout, with random weights; its IoU head tells candidates apart, as a trained one does."""
    from sam2.build_sam import build_sam2

    torch.manual_seed(0)
    model = build_sam2(sam2_cfg, None, device="cpu")
    with torch.no_grad():
        model.sam_mask_decoder.iou_prediction_head.layers[-1].weight.mul_(10)
    path = tmp_path_factory.mktemp("sam2") / "small.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def sam2_cfg(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The official tiny config, made smaller."""
    pytest.importorskip("sam2")
    return shrink_config(TINY, tmp_path_factory.mktemp("configs"))


@pytest.fixture
def config(tmp_path: Path, sam2_cfg: str, sam2_ckpt: Path) -> masks.MaskOptions:
    """Three crops in two classes; a gate that lets pass what the random model proposes."""
    for index, (path, size) in enumerate(CROPS.items()):
        target = tmp_path / "data" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_image(index, side=120).resize(size).save(target)
    return masks.MaskOptions(
        data_root=tmp_path / "data",
        out_dir=tmp_path / "run",
        sam2_cfg=sam2_cfg,
        sam2_ckpt=sam2_ckpt,
        mask_min_score=0.0,
        gpus=0,
        workers=2,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The crops that the model was asked about; it is run once for each, and what it said then is said again."""
    calls, propose = [], masks.Sam2.propose

    def remember(self: masks.Sam2, square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        calls.append(square.tobytes())
        if calls[-1] not in PROPOSED:
            PROPOSED[calls[-1]] = propose(self, square)
        return PROPOSED[calls[-1]]

    monkeypatch.setattr(masks.Sam2, "propose", remember)
    return calls


def make_requests(config: masks.MaskOptions) -> list[masks.MaskRequest]:
    return [
        masks.MaskRequest(
            path, config.data_root / path, (config.data_root / path).parent / "masks" / f"{Path(path).stem}.png"
        )
        for path in sorted(CROPS)
    ]


def generate(config: masks.MaskOptions, requests: list[masks.MaskRequest] | None = None) -> dict[str, dict]:
    """Draw the masks, and return the newest records, by path."""
    runtime = lct.Runtime(torch.device("cpu"), 0, torch.float32)
    masks.generate_masks(config, runtime, make_requests(config) if requests is None else requests)
    return lct.read_mask_log(config.out_dir)


def read_lines(config: masks.MaskOptions) -> list[dict]:
    return [json.loads(line) for line in (config.out_dir / "masks.jsonl").read_text(encoding="utf-8").splitlines()]


def check_fails(config: masks.MaskOptions) -> str:
    """Return the message with which the check before any work refuses."""
    with pytest.raises(lct.UserError) as caught:
        masks.check_sam2(config)
    return str(caught.value)


# --- the whole path ---------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_masks_are_those_that_sam2_itself_draws_on_the_crop(
    config: masks.MaskOptions, asked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference gives sam2 the crop as it is; ours is squashed by a reading thread, and the mask enlarged again."""
    from sam2.build_sam import build_sam2
    from sam2.modeling.sam.prompt_encoder import PromptEncoder
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    prompts, encode = [], PromptEncoder.forward

    def spy(self: PromptEncoder, points: tuple, **rest: object) -> object:  # random weights hardly heed a prompt
        prompts.append(torch.cat([points[0], points[1][..., None].float()], dim=2).numpy())
        return encode(self, points=points, **rest)

    monkeypatch.setattr(PromptEncoder, "forward", spy)
    PROPOSED.clear()
    config = dataclasses.replace(config, mask_cleanup=False)
    outcomes = generate(config)
    assert list(outcomes) == sorted(CROPS) and len(asked) == 3
    image = np.asarray(Image.open(config.data_root / "hammer/0000.png").convert("RGB"))
    predictor = SAM2ImagePredictor(build_sam2(config.sam2_cfg, str(config.sam2_ckpt), device="cpu"))
    predictor.set_image(image)
    box = np.array([0.02 * 90, 0.02 * 60, 0.98 * 90, 0.98 * 60])
    drawn, scores, _ = predictor.predict(np.array([[45, 30]]), np.array([1]), box, multimask_output=True)
    assert len(prompts) == 4 and all(np.allclose(prompt, prompts[3], atol=1e-3) for prompt in prompts)
    best = np.argmax(scores)
    with Image.open(config.data_root / "hammer/masks/0000.png") as file:
        assert (file.format, file.mode, file.size) == ("PNG", "L", (90, 60))
        written = np.asarray(file)
    assert set(np.unique(written)) == {0, 255}
    expected = drawn[best] > 0
    written = written > 127
    assert 0.1 < written.mean() < 0.9, "a mask of all or nothing proves nothing"
    assert (expected & written).sum() / (expected | written).sum() > 0.98
    outcome = outcomes["hammer/0000.png"]
    assert outcome["score"] == pytest.approx(scores[best], abs=0.01) and outcome["area"] == pytest.approx(
        written.mean()
    )
    drawn = lct.read_file(config.data_root / "hammer/masks/0000.png")
    assert np.array_equal(lct.decode_mask(drawn, is_alpha=False), written)


def test_every_attempt_is_recorded(config: masks.MaskOptions, asked: list[bytes]) -> None:
    generate(config)
    records = read_lines(config)
    assert [record["path"] for record in records] == sorted(CROPS)
    status = (config.data_root / "hammer/0000.png").stat()
    assert (records[0]["size"], records[0]["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
    assert records[0]["reason"] is None and len({record["settings"] for record in records}) == 1
    assert lct.read_mask_log(config.out_dir / "elsewhere") == {}


def test_bf16_is_used_where_the_runtime_has_it_and_the_process_is_left_as_it_was(
    config: masks.MaskOptions, asked: list[bytes], capfd: pytest.CaptureFixture
) -> None:
    """sam2 logs every image to the root logger, which gives that a handler if it has none, and warns of torch's old parts."""
    from hydra.core.global_hydra import GlobalHydra

    request = make_requests(config)[0]
    generate(config, [request])  # scipy and others are imported by then
    request.target.unlink()
    exact = PROPOSED.pop(asked[0])
    capfd.readouterr()
    root_handlers, logging.root.handlers = logging.root.handlers, []
    before = _describe_process(), list(warnings.filters), GlobalHydra.instance().hydra
    try:
        masks.check_sam2(config)
        runtime = lct.Runtime(torch.device("cpu"), 0, torch.bfloat16)
        masks.generate_masks(config, runtime, [request])
        assert before == (_describe_process(), list(warnings.filters), GlobalHydra.instance().hydra)
    finally:
        logging.root.handlers = root_handlers
        rounded, PROPOSED[asked[0]] = PROPOSED[asked[0]], exact
    said = capfd.readouterr()
    assert len(asked) == 2 and said.out == ""
    assert all(line.startswith("masks:") for line in said.err.splitlines()), "its progress alone"
    assert not np.array_equal(rounded[0], exact[0]) and np.allclose(rounded[0], exact[0], atol=0.1)
    assert {array.dtype for array in rounded} == {np.dtype(np.float32)}


def _describe_process() -> tuple:
    random_state = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    return random_state, logging.root.level, logging.root.manager.disable, list(logging.root.handlers)


def test_another_use_of_hydra_is_given_back(config: masks.MaskOptions, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    (tmp_path / "mine.yaml").write_text("answer: 42\n")
    try:
        initialize_config_dir(str(tmp_path), version_base="1.2")
        masks.check_sam2(config)
        assert compose("mine").answer == 42
    finally:
        GlobalHydra.instance().hydra = before


# --- the gate ---------------------------------------------------------------------------------------------------------
def test_low_scores_are_refused_remembered_and_tried_again_with_other_settings(
    config: masks.MaskOptions, asked: list[bytes], patch_used: Callable
) -> None:
    built = patch_used(masks, "_build_sam2")
    scores = {path: outcome["score"] for path, outcome in generate(config).items()}
    for request in make_requests(config):
        request.target.unlink()
    worst, *better = sorted(scores, key=scores.get)
    assert scores[worst] < scores[better[0]], "the random model cannot tell the crops apart"
    strict = dataclasses.replace(config, mask_min_score=scores[better[0]])
    outcomes = generate(strict)
    assert [path for path, outcome in outcomes.items() if outcome["reason"]] == [worst]
    assert f"score {scores[worst]:.2f} is below --mask_min_score" in outcomes[worst]["reason"]
    assert [r.path for r in make_requests(config) if not r.target.exists()] == [worst]

    asked.clear()
    assert built.calls
    built.calls.clear()
    assert generate(strict)[worst] == outcomes[worst]
    assert not built.calls, "nothing to do: not even the model is built"
    copied = config.out_dir / "copied.pt"
    copied.write_bytes(config.sam2_ckpt.read_bytes())  # the same weights elsewhere are the same settings
    assert generate(dataclasses.replace(strict, sam2_ckpt=copied))[worst] == outcomes[worst] and asked == []
    request = next(request for request in make_requests(config) if request.path == worst)
    os.utime(request.source, ns=(1, 1))  # another crop under the old name
    assert generate(strict)[worst]["reason"] and len(asked) == 1
    assert generate(dataclasses.replace(strict, mask_cleanup=False))[worst]["reason"] and len(asked) == 2
    assert generate(config)[worst]["reason"] is None and len(asked) == 3 and request.target.exists()
    assert lct.read_mask_log(config.out_dir)[worst]["reason"] is None, "the newest record counts"
    assert read_lines(config)[-1]["settings"] != read_lines(config)[-2]["settings"]


@pytest.mark.parametrize(("allowed", "word"), [((0.97, 0.98), "less"), ((0.01, 0.02), "more")])
def test_implausible_areas_are_refused(
    config: masks.MaskOptions, asked: list[bytes], monkeypatch: pytest.MonkeyPatch, allowed: tuple, word: str
) -> None:
    monkeypatch.setattr(masks, "MASK_AREA_RANGE", allowed)
    outcomes = generate(config)
    assert all(f" of the crop, {word} than " in outcome["reason"] for outcome in outcomes.values())
    assert not list(config.data_root.rglob("masks/*"))
    assert [record["reason"] for record in read_lines(config)] == [outcome["reason"] for outcome in outcomes.values()]


def test_judge_mask() -> None:
    assert masks.judge_mask(0.8, 0.5, 0.8) == ""
    assert masks.judge_mask(0.79, 0.5, 0.8) == "score 0.79 is below --mask_min_score 0.8"
    assert masks.judge_mask(0.9, 0.019, 0.8) == "covers 1.9% of the crop, less than 2%"
    assert masks.judge_mask(0.9, 0.981, 0.8) == "covers 98.1% of the crop, more than 98%"
    assert masks.judge_mask(0.9, 0.02, 0.8) == masks.judge_mask(0.9, 0.98, 0.8) == ""
    assert "nan" in masks.judge_mask(float("nan"), 0.5, 0.0)


def test_choose_mask_takes_the_best_score_of_plausible_area() -> None:
    def choose(scores: list[float], areas: list[float]) -> int:
        return masks.choose_mask(np.array(scores, np.float32), np.array(areas))

    assert choose([0.5, 0.9, 0.7], [0.3, 0.3, 0.3]) == 1
    assert choose([0.5, 0.9, 0.7], [0.3, 0.999, 0.3]) == 2  # the whole crop is no object
    assert choose([0.5, 0.9, 0.7], [0.3, 0.0, 0.001]) == 0
    assert choose([0.5, 0.9, 0.7], [1.0, 0.0, 0.001]) == 1  # none is plausible: the gate will say so of the best
    assert choose([float("nan"), 0.0, float("nan")], [0.5, 0.5, 0.5]) == 1


def test_the_chosen_candidate_is_written(
    config: masks.MaskOptions, asked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best score covers everything: the second best, a half, must be taken."""
    logits = np.full((3, 256, 256), -1.0, np.float32)
    logits[0], logits[1, :, :128], logits[2, :8] = 1.0, 1.0, 1.0
    monkeypatch.setattr(masks.Sam2, "propose", lambda *_: (np.array([0.9, 0.8, 0.7], np.float32), logits))
    outcome = generate(config, make_requests(config)[:1])["hammer/0000.png"]
    assert (outcome["score"], outcome["area"], outcome["reason"]) == (pytest.approx(0.8), 0.5, None)
    written = np.asarray(Image.open(config.data_root / "hammer/masks/0000.png"))
    assert (written[:, :45] == 255).all() and (written[:, 45:] == 0).all()


# --- clean-up ---------------------------------------------------------------------------------------------------------
def test_clean_mask_removes_specks_and_small_holes_only() -> None:
    expected = np.zeros((200, 300), bool)
    expected[40:160, 40:160] = True  # the object, 14,400 px
    expected[60:80, 60:80] = False  # the eye of a wrench: 2.8 % of it stays open
    expected[90:110, 200:220] = True  # a part cut off by something in front: 2.8 % of it stays
    expected[39, 39] = True  # touches by a corner
    expected[100:104, 40:44] = False  # a notch, open to the background through the hole below
    dirty = expected.copy()
    dirty[120:125, 120:125] = False  # a hole of 25 px
    dirty[130, 130] = False
    dirty[10:13, 280:283] = True  # specks
    dirty[199, 299] = True
    assert np.array_equal(masks.clean_mask(dirty), expected)
    assert np.array_equal(masks.clean_mask(expected), expected)


def test_clean_mask_leaves_the_border_open() -> None:
    """What the crop cuts off is no hole, however small."""
    mask = np.ones((100, 100), bool)
    mask[0, 50] = mask[50, 0] = mask[99, 50] = mask[50, 99] = False
    assert np.array_equal(masks.clean_mask(mask), mask)


@pytest.mark.parametrize("value", [False, True])
def test_clean_mask_of_all_or_nothing(value: bool) -> None:
    mask = np.full((7, 9), value)
    assert np.array_equal(masks.clean_mask(mask), mask)


def test_clean_up_can_be_switched_off(
    config: masks.MaskOptions, asked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.full((3, 256, 256), -1.0, np.float32)
    logits[:, 64:192, 64:192], logits[:, 8:12, 8:12] = 1.0, 1.0
    monkeypatch.setattr(masks.Sam2, "propose", lambda *_: (np.array([0.9, 0.8, 0.7], np.float32), logits))
    areas = {}
    for cleanup in (True, False):
        chosen = dataclasses.replace(config, mask_cleanup=cleanup, out_dir=config.out_dir / str(cleanup))
        areas[cleanup] = generate(chosen, make_requests(config)[:1])["hammer/0000.png"]["area"]
        (config.data_root / "hammer/masks/0000.png").unlink()
    assert areas[True] == pytest.approx(0.25, abs=0.01) and areas[False] > areas[True]


# --- interruption and resumption --------------------------------------------------------------------------------------
@pytest.fixture
def signals_raise() -> Iterator[None]:
    """Handle signals as a run does."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    lct.SIGNALS.catch()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_an_interrupted_call_keeps_what_is_done_and_the_next_does_the_rest(
    config: masks.MaskOptions, asked: list[bytes], monkeypatch: pytest.MonkeyPatch, signals_raise: None
) -> None:
    first, second, third = make_requests(config)
    before = threading.enumerate()
    with monkeypatch.context() as patch:
        _after(patch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(lct.Interrupted):
            generate(config)
    assert [request.target.exists() for request in (first, second, third)] == [True, False, False]
    assert _wait_for_readers(before), "a reading thread hangs"
    assert [record["path"] for record in read_lines(config)] == [first.path]
    mtime = first.target.stat().st_mtime_ns
    asked.clear()
    outcomes = generate(config)
    assert len(asked) == 2 and first.target.stat().st_mtime_ns == mtime
    assert [record["path"] for record in read_lines(config)] == [first.path, second.path, third.path]
    assert list(outcomes) == sorted(CROPS) and not any(outcome["reason"] for outcome in outcomes.values())
    assert all(0 < outcome["score"] <= 1 for outcome in outcomes.values()), "also that of the first call"
    assert not [path for path in config.data_root.rglob("*") if path.name.endswith(".tmp")]


def _after(patch: pytest.MonkeyPatch, num_calls: int, act: Callable[[], None]) -> None:
    """Let the model answer so often, then act instead."""
    propose, left = masks.Sam2.propose, [num_calls]

    def answer(self: masks.Sam2, square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not left[0]:
            act()
        left[0] -= 1
        return propose(self, square)

    patch.setattr(masks.Sam2, "propose", answer)


def _wait_for_readers(before: list[threading.Thread]) -> bool:
    """Wait until no reading thread is left that was not there before; other files' tests may have left some."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        added = [thread.name for thread in threading.enumerate() if thread not in before]
        if not any(name.startswith("ThreadPoolExecutor") for name in added):
            return True
        time.sleep(0.02)
    return False


def test_killed_between_record_and_mask_it_is_drawn_again(
    config: masks.MaskOptions, asked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record goes first: a mask on disk never lacks its score."""
    request = make_requests(config)[0]
    with monkeypatch.context() as patch:
        patch.setattr(masks, "_write_mask", None)
        with pytest.raises(TypeError):
            generate(config, [request])
    assert lct.read_mask_log(config.out_dir)[request.path]["score"] > 0 and not request.target.exists()
    assert generate(config, [request])[request.path]["reason"] is None and len(asked) == 2 and request.target.exists()


def test_a_half_written_line_is_passed_over(config: masks.MaskOptions, asked: list[bytes]) -> None:
    requests = make_requests(config)
    generate(config, requests[:2])
    log = config.out_dir / "masks.jsonl"
    whole = log.read_bytes()
    cut = whole.index("кадр".encode()) + 3  # in the middle of a letter
    log.write_bytes(whole[:cut])
    requests[1].target.unlink()
    assert list(lct.read_mask_log(config.out_dir)) == [requests[0].path]
    asked.clear()
    generate(config)
    assert len(asked) == 2 and list(lct.read_mask_log(config.out_dir)) == sorted(CROPS)
    lines = log.read_bytes().split(b"\n")
    assert [json.loads(line)["path"] for line in lines[1:3]] == [requests[1].path, requests[2].path]


@pytest.mark.parametrize("line", ["[]", "7", '{"path": "hammer/0000.png"}', '"', "null"])
def test_foreign_lines_are_passed_over(tmp_path: Path, line: str) -> None:
    record = dict.fromkeys(lct.MASK_RECORD_KEYS) | {"path": "a/b.png"}
    (tmp_path / "masks.jsonl").write_text(f"{line}\n{json.dumps(record)}\n")
    assert list(lct.read_mask_log(tmp_path)) == ["a/b.png"]


def test_masks_that_exist_are_never_touched(config: masks.MaskOptions, asked: list[bytes]) -> None:
    """One lies there before, one is drawn by hand after the crop was refused."""
    refused = generate(dataclasses.replace(config, mask_min_score=1.0))
    assert all(outcome["reason"] for outcome in refused.values())
    mine = make_requests(config)[0].target
    mine.parent.mkdir()
    mine.write_bytes(b"drawn by hand")
    asked.clear()
    outcomes = generate(dataclasses.replace(config, mask_min_score=1.0))
    assert asked == [] and mine.read_bytes() == b"drawn by hand"
    assert outcomes == refused == generate(config, [])


def test_a_mask_is_not_named_like_that_of_a_crop_that_is_left_out(tmp_path: Path) -> None:
    root = make_masked_dataset(tmp_path / "data", 3)
    (root / "bolt/masks").rename(tmp_path / "masks")
    draw_image(0).save(root / "bolt/cropped/00.jpg")
    requests = masks.request_masks(scan(root, exclude=("*.jpg",)), masks.MaskOptions(data_root=root))
    assert [request.target.name for request in requests] == ["00.png_mask.png", "01_mask.png", "02_mask.png"]


# --- bad input --------------------------------------------------------------------------------------------------------
def test_a_broken_image_costs_that_image(config: masks.MaskOptions, asked: list[bytes]) -> None:
    broken, *good = make_requests(config)
    broken.source.write_bytes(broken.source.read_bytes()[:200])
    gone = masks.MaskRequest(
        "hammer/gone.png", config.data_root / "hammer/gone.png", broken.target.with_name("gone.png")
    )
    outcomes = generate(config, [broken, gone, *good])
    assert list(outcomes) == [broken.path, gone.path, *(request.path for request in good)]
    assert "truncated" in outcomes[broken.path]["reason"] and outcomes[broken.path]["score"] is None
    assert outcomes[gone.path]["reason"] == "No such file or directory"
    assert [request.target.exists() for request in (broken, gone, *good)] == [False, False, True, True]
    assert read_lines(config)[0]["score"] is None, "JSON has no NaN"
    asked.clear()
    assert str(generate(config, [broken, gone])) == str(outcomes)
    assert asked == []


def test_a_crop_that_could_not_be_read_is_tried_again(config: masks.MaskOptions, asked: list[bytes]) -> None:
    """A disk that is away for a minute changes neither the size nor the time of its files."""
    request = make_requests(config)[0]
    away = request.source.rename(request.source.with_suffix(".away"))
    stat_files = lct.stat_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lct, "stat_files", lambda root, paths: stat_files(root, [str(away) for _ in paths]))
        assert generate(config, [request])[request.path]["reason"] == "No such file or directory"
    away.rename(request.source)
    assert generate(config, [request])[request.path]["reason"] is None and request.target.exists()


def test_a_name_too_long_for_a_mask_costs_that_image(config: masks.MaskOptions, asked: list[bytes]) -> None:
    for length in (119, 124):  # a mask of the second name cannot even be looked for
        path = f"hammer/{'я' * length}.png"
        draw_image(length, side=120).save(config.data_root / path)
        masks.draw_masks(config)
        assert lct.read_mask_log(config.out_dir)[path]["reason"] == "the name of its mask is too long"
    request = make_requests(config)[0]
    fits = request._replace(target=request.target.with_name("n" * (masks.MAX_NAME_BYTES - 4) + ".png"))
    assert generate(config, [fits])[request.path]["reason"] is None and fits.target.exists()


@pytest.mark.parametrize("folder", ["/proc/masks", "FILE/masks"], ids=["read-only", "below a file"])
def test_a_target_that_cannot_be_written_names_the_way_out(
    config: masks.MaskOptions, asked: list[bytes], folder: str
) -> None:
    request = make_requests(config)[0]
    target = Path(folder.replace("FILE", str(config.sam2_ckpt)), "0000.png")
    with pytest.raises(lct.UserError, match=r"(?s)cannot be written.*--masks_out DIR"):
        generate(config, [request._replace(target=target)])


def test_the_missing_package_is_one_sentence_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sam2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sam2", None)
    message = check_fails(masks.MaskOptions())
    assert message.startswith("the package sam2: is not installed\n")
    assert "pip install --no-build-isolation sam2" in message
    clone = types.ModuleType("sam2")  # the folder of its repository, for which Python takes it in its parent folder
    clone.__path__, clone.__spec__ = [], types.SimpleNamespace(parent="sam2", name="sam2", _initializing=False)
    monkeypatch.setitem(sys.modules, "sam2", clone)
    assert "the package sam2: cannot be imported: No module named 'sam2.build_sam'" in check_fails(masks.MaskOptions())


@pytest.mark.parametrize(
    ("cfg", "url"),
    [
        ("configs/sam2.1/sam2.1_hiera_l.yaml", "092824/sam2.1_hiera_large.pt"),
        ("configs/sam2.1/sam2.1_hiera_b+.yaml", "092824/sam2.1_hiera_base_plus.pt"),
        ("configs/sam2.1/sam2.1_hiera_s.yaml", "092824/sam2.1_hiera_small.pt"),
        ("configs/sam2/sam2_hiera_t.yaml", "072824/sam2_hiera_tiny.pt"),
    ],
)
def test_the_missing_checkpoint_is_named_with_its_address(cfg: str, url: str, tmp_path: Path) -> None:
    pytest.importorskip("sam2")
    message = check_fails(masks.MaskOptions(sam2_cfg=cfg))
    assert "--sam2_ckpt: is missing" in message
    assert f"curl -LO https://dl.fbaipublicfiles.com/segment_anything_2/{url} " in message
    assert message.endswith(f"--sam2_ckpt {Path(url).name}")
    assert "does not exist" in check_fails(masks.MaskOptions(sam2_cfg=cfg, sam2_ckpt=tmp_path / "none.pt"))
    assert "is not a file" in check_fails(masks.MaskOptions(sam2_cfg=cfg, sam2_ckpt=tmp_path))


def test_the_addresses_are_those_that_the_package_names() -> None:
    build_sam = pytest.importorskip("sam2.build_sam")
    for cfg, name in build_sam.HF_MODEL_ID_TO_FILENAMES.values():
        assert masks._how_to_get_checkpoint(cfg).endswith(f"/{name}  and then  --sam2_ckpt {name}")
    assert "http" not in masks._how_to_get_checkpoint("configs/my_own.yaml")


def test_on_the_cpu_no_gpu_is_touched(
    config: masks.MaskOptions,
    two_missing: Path,
    asked: list[bytes],
    call_main: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sam2 puts tables on any GPU that CUDA shows: here there is one as long as it is visible, and using it fails."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    words = ("--out_dir", config.out_dir, *missing_flags(config, two_missing), "--mask_min_score", "0")
    assert call_main(*words, main=masks.main) == 0
    assert len(asked) == 2


@pytest.mark.parametrize(
    "place", ["sam2.build_sam.build_sam2", "sam2.modeling.position_encoding.torch.arange", "torch.load"]
)
def test_memory_that_is_full_is_not_blamed_on_a_file(
    config: masks.MaskOptions,
    two_missing: Path,
    place: str,
    call_main: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """What the constructors raise, as on a GPU that others fill, comes wrapped in Hydra's own exception."""
    words = ("--out_dir", config.out_dir, *missing_flags(config, two_missing))
    with monkeypatch.context() as patch:
        patch.setattr(place, _fill_memory)
        assert call_main(*words, main=masks.main) == 2
    said = capsys.readouterr().err
    assert "out of memory" in said and "--sam2_cfg" not in said and "--sam2_ckpt" not in said


def _fill_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")


def test_an_unknown_config_is_named_with_the_nearest(config: masks.MaskOptions) -> None:
    near = check_fails(dataclasses.replace(config, sam2_cfg="configs/sam2.1/sam2.1_hiera_x.yaml"))
    assert "is no config of the sam2 package" in near and "did you mean configs/sam2.1/sam2.1_hiera_" in near
    far = check_fails(dataclasses.replace(config, sam2_cfg="vit.yaml"))
    assert "it has configs/sam2.1/sam2.1_hiera_b+.yaml, " in far and "training" not in far
    other = "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"
    assert "cannot be built" in check_fails(dataclasses.replace(config, sam2_cfg=other))
    masks.check_sam2(config)  # none of the failures is left behind


class _Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def test_a_foreign_checkpoint_is_refused_and_not_executed(
    config: masks.MaskOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "picture": lambda path: draw_image(0).save(path, "PNG"),
        "empty": lambda path: path.touch(),
        "cut off": lambda path: path.write_bytes(config.sam2_ckpt.read_bytes()[:1_000_000]),
        "pickle": lambda path: path.write_bytes(pickle.dumps(_Bomb())),
        "zipped pickle": lambda path: torch.save({"model": _Bomb()}, path),
        "other layout": lambda path: torch.save({"state_dict": {}}, path),
        "list": lambda path: torch.save([1], path),
        "no tensors": lambda path: torch.save({"model": {"a": 1}}, path),
    }
    for name, write in files.items():
        path = tmp_path / f"{name}.pt"
        write(path)
        message = check_fails(dataclasses.replace(config, sam2_ckpt=path))
        assert f"--sam2_ckpt {path}: is no checkpoint" in message, name
        assert ("not what torch.save writes" in message) == (name in ("picture", "empty", "cut off", "pickle")), message
        assert len(message.splitlines()) == 2 and "curl -LO" in message and "weights_only=False" not in message
    assert not Path("executed").exists()


@pytest.mark.parametrize("official", ["configs/sam2.1/sam2.1_hiera_s.yaml", "configs/sam2/sam2_hiera_t.yaml"])
def test_a_checkpoint_of_another_config_is_refused(config: masks.MaskOptions, tmp_path: Path, official: str) -> None:
    """More blocks; and, in SAM 2.0, without three tensors of 2.1."""
    cfg = shrink_config(official, tmp_path)
    message = check_fails(dataclasses.replace(config, sam2_cfg=cfg))
    assert f"does not fit --sam2_cfg {cfg}" in message and len(message.splitlines()) == 2
    assert (", ...)" in message) == ("hiera_s" in cfg)  # three names are all that SAM 2.0 lacks
    with pytest.raises(lct.UserError, match="does not fit"):
        generate(dataclasses.replace(config, sam2_cfg=cfg))


def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused(config: masks.MaskOptions, tmp_path: Path) -> None:
    payload = torch.load(config.sam2_ckpt, weights_only=True)
    payload["model"]["no_mem_embed"] = payload["model"]["no_mem_embed"][..., :-1].clone()
    torch.save(payload, tmp_path / "other.pt")
    message = check_fails(dataclasses.replace(config, sam2_ckpt=tmp_path / "other.pt"))
    assert "1 tensor is missing, foreign or of another shape (no_mem_embed)" in message


# --- reading ahead ----------------------------------------------------------------------------------------------------
def test_read_ahead_keeps_the_order_and_stays_near() -> None:
    begun = []

    def read(item: int) -> int:
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    for index, value in enumerate(masks._read_ahead(range(50), read, 3)):
        assert value == index * index
        time.sleep(0.005)  # the model is slower than the readers
        assert len(begun) <= index + 1 + 2 * 3, "what is read ahead would fill the memory"
    assert sorted(begun) == list(range(50))


def test_read_ahead_can_be_left_while_threads_read() -> None:
    gate, begun, before = threading.Event(), [], threading.enumerate()

    def read(item: int) -> int:
        begun.append(item)
        if item:
            gate.wait(30)
        return item

    start = time.monotonic()
    crops = masks._read_ahead(range(100), read, 2)
    assert next(crops) == 0
    crops.close()
    assert time.monotonic() - start < 5, "leaving waits for the readers"
    gate.set()
    assert _wait_for_readers(before) and len(begun) <= 4


def test_an_error_of_a_reader_arrives() -> None:
    with pytest.raises(ZeroDivisionError):
        list(masks._read_ahead([1, 0, 2], lambda item: 1 // item, 2))


# --- contact sheet ----------------------------------------------------------------------------------------------------
def test_the_preview_shows_crop_mask_and_masked_crop(tmp_path: Path) -> None:
    side = masks.PREVIEW_SIDE
    image = np.zeros((40, 40, 3), np.uint8)
    image[:] = 200, 30, 40
    mask = np.zeros((40, 40), bool)
    mask[:, :20] = True
    items = [
        masks.MaskPreview("hammer/0000.png  0.91", image, mask),
        masks.MaskPreview("b", image, None, "score 0.2 is low"),
    ]
    masks.write_masks_preview(tmp_path / "preview.png", items, 7, "by score")
    sheet = np.asarray(Image.open(tmp_path / "preview.png")).astype(int)
    middle = 72 + side // 2
    left, right = side // 4, side * 3 // 4
    colours = [sheet[middle, 24 + panel * (side + 4) + x].tolist() for panel in range(3) for x in (left, right)]
    red, white, black, gray = [200, 30, 40], [255] * 3, [0] * 3, [lct.PADDING_GRAY] * 3
    assert colours == [red, red, white, black, red, gray]
    second = 24 + 3 * side + 32
    assert sheet[middle, second + left].tolist() == red and sheet[72 + 5, second + side + 4 + 5].min() > 220
    note_colour = [int(masks.PREVIEW_RED[i : i + 2], 16) for i in (1, 3, 5)]
    is_note = (sheet[72 + side :] == note_colour).all(axis=2)
    assert is_note[:, second:].any() and not is_note[:, :second].any(), "only the refused one is marked"


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (700, 500)])
@pytest.mark.parametrize(
    "name", ["шестигранный ключ", "扳手 🔧", "e\u0301 <b>\"'", "\udcff", "line\nbreak", "", "x" * 3000]
)
def test_the_preview_takes_any_name_and_size(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    for mask in (None, np.full(size, 255, np.uint8)):
        masks.write_masks_preview(tmp_path / "preview.png", [masks.MaskPreview(name, image, mask, name)], 1, "by score")
        with Image.open(tmp_path / "preview.png") as sheet:
            assert sheet.width < 1000 and sheet.height < 400


def test_an_empty_preview_and_a_long_one(tmp_path: Path) -> None:
    masks.write_masks_preview(tmp_path / "preview.png", [], 0, "by score")
    item = masks.MaskPreview("a", np.zeros((9, 9, 3), np.uint8), None)
    masks.write_masks_preview(tmp_path / "long.png", [item] * 7, 7, "by score")
    heights = [Image.open(tmp_path / name).height for name in ("preview.png", "long.png")]
    assert heights[1] - heights[0] > 3 * masks.PREVIEW_SIDE, "three rows"


def test_captions_are_readable_in_cyrillic_and_cut_in_the_middle() -> None:
    font = masks.load_font(14)
    if font.getname()[0] != "Aileron":  # Pillow's own, where the system has none of those that have Cyrillic
        assert bytes(font.getmask("Ж")) != bytes(font.getmask("\u0378")), "a box for a letter"
    text = "hammer/" + "very_" * 50 + "long.png  0.91"
    cut = masks.fit_text(text, font, 300)
    assert font.getlength(cut) <= 300 < font.getlength(cut + "mm") and "…" in cut
    assert cut.startswith("hammer/") and cut.endswith("0.91")
    assert masks.fit_text("short", font, 300) == "short"


# --- the commands -----------------------------------------------------------------------------------------------------
def missing_flags(config: masks.MaskOptions, root: Path) -> tuple[object, ...]:
    return ("--data_root", root, "--sam2_cfg", config.sam2_cfg, "--sam2_ckpt", config.sam2_ckpt, "--gpus", "0")


@pytest.fixture
def two_missing(tmp_path: Path) -> Path:
    """Three classes with masks, two of which are missing and one of which is refused."""
    root = make_masked_dataset(tmp_path / "masked", 6)
    remove_masks(root)
    return root


def remove_masks(root: Path) -> None:
    (root / "bolt/masks/00_mask.png").unlink()
    Image.new("L", (48, 48)).save(root / "nut/masks/01_mask.png")


@pytest.fixture(scope="session")
def confident_ckpt(sam2_ckpt: Path) -> Path:
    """The same model, which is sure of whatever it proposes: training takes the gate as it is."""
    payload = torch.load(sam2_ckpt, weights_only=True)
    payload["model"]["sam_mask_decoder.iou_prediction_head.layers.2.bias"] += 100
    path = sam2_ckpt.with_name("confident.pt")
    torch.save(payload, path)
    return path


def test_command_masks_draws_what_is_missing_and_overwrites_nothing(
    config: masks.MaskOptions, two_missing: Path, asked: list[bytes], call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in two_missing.rglob("*.png")}
    out_dir = config.out_dir
    words = ("--out_dir", out_dir, *missing_flags(config, two_missing), "--mask_min_score", "0")
    assert call_main(*words, main=masks.main) == 0
    drawn = set(two_missing.rglob("*.png")) - set(before)
    log = {record["path"]: record["reason"] for record in read_lines(config)}
    assert set(log) == {"bolt/cropped/00.png", "nut/cropped/01.png"} and len(asked) == 2
    expected = {"bolt/masks/00_mask.png": "bolt/cropped/00.png", "nut/masks/01.png_mask.png": "nut/cropped/01.png"}
    assert {str(path.relative_to(two_missing)) for path in drawn} == {
        target for target, crop in expected.items() if not log[crop]
    }
    assert all(path.read_bytes() == data for path, data in before.items())
    table = capsys.readouterr().out.splitlines()
    heads = next(line for line in table if line.startswith("class"))
    assert heads.split() == ["class", "crops", "with", "mask", "by", "SAM-2", "not", "drawn", "without"]
    total = next(line for line in table if line.startswith("all")).split()
    assert total == ["all", "18", str(16 + len(drawn)), str(len(drawn)), str(2 - len(drawn)), str(2 - len(drawn))]
    report = json.loads((out_dir / "data_report.json").read_text(encoding="utf-8"))
    assert report["masks"]["made"] == len(drawn) and len(report["masks"]["not_made"]) == 2 - len(drawn)
    with Image.open(out_dir / "masks_preview.png") as sheet:
        assert sheet.width > 600 and sheet.height > 600
    assert call_main(*words, main=masks.main) == 0
    assert len(asked) == 2, "a second start has nothing left to do"


def test_where_no_mask_is_missing_nothing_needs_sam2(
    tmp_path: Path, call_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither training nor, with masks missing later, the sheet beside the run, whose data report stays as it is."""
    root, out_dir = make_masked_dataset(tmp_path / "masked", 6), tmp_path / "run"
    words = ("--data_root", root, "--out_dir", out_dir)
    assert call_main(*words, "--crop_mode", "mask", "--auto_generate_masks", *TINY_RUN) == 0
    assert not (out_dir / "masks_preview.png").exists()
    before = (out_dir / "data_report.json").read_bytes()
    remove_masks(root)
    assert call_main(*words, main=masks.main) == 2, "to draw, it needs a checkpoint"
    assert call_main(*words, "--no-draw", main=masks.main) == 0
    assert Image.open(out_dir / "masks_preview.png").height > 600
    for path in (root / "nut/cropped/00.png", root / "nut/masks/00_mask.png"):
        Image.open(path).resize((96, 48)).save(path)
    sheets = []
    monkeypatch.setattr(masks, "PREVIEW_SIDE", 5)  # for crops as small as these, a photo is large
    monkeypatch.setattr(masks, "write_masks_preview", lambda _, items, *__: sheets.append(items))
    assert call_main(*words, "--no-draw", main=masks.main) == 0
    shapes = {(item.image.shape, item.mask.shape) for item in sheets[0]}
    assert shapes == {((side, 24, 3), (side, 24)) for side in (24, 12)}, "a sheet of large photos fits into memory"
    assert (out_dir / "data_report.json").read_bytes() == before and not (out_dir / "masks.jsonl").exists()


def test_training_draws_missing_masks_first(
    config: masks.MaskOptions, two_missing: Path, confident_ckpt: Path, call_main: Callable, tmp_path: Path,
    patch_used: Callable,
) -> None:  # fmt: skip
    """Beside the crops; then one that is missing again goes to --masks_out, and the new run knows what was tried."""
    config = dataclasses.replace(config, sam2_ckpt=confident_ckpt)

    def run_here(command: str, argv: list[str]) -> None:
        assert call_main(command, *argv) == 0

    patch_used(lct, "run_tool", run_here)  # imports of another interpreter take longer than the drawing
    # All crops are trained on but those of val: what is drawn must be among the references.
    flags = ("--crop_mode", "mask", "--auto_generate_masks", "--test_split", "0", *missing_flags(config, two_missing))
    written = b""
    before = set(two_missing.rglob("*"))
    for more in ((), ("--overwrite", "--masks_out", tmp_path / "made")):
        assert call_main("--out_dir", config.out_dir, *flags, *TINY_RUN, *more) == 0
        assert (config.out_dir / "masks.jsonl").read_bytes().startswith(written)
        log = {record["path"]: record["reason"] for record in read_lines(config)}
        assert log == dict.fromkeys(("bolt/cropped/00.png", "nut/cropped/01.png"))
        report = json.loads((config.out_dir / "data_report.json").read_text(encoding="utf-8"))
        assert (report["masks"]["usable"], report["masks"]["made"]) == (18, 2)
        with np.load(config.out_dir / "prototypes.npz", allow_pickle=False) as file:
            shown_masked = set(file["stack_paths"][file["stack_views"] == 1].tolist())
        splits = json.loads((config.out_dir / "splits.json").read_text(encoding="utf-8"))
        assert shown_masked == {path for paths in splits["train"].values() for path in paths}
        assert (config.out_dir / "masks_preview.png").exists()
        written = (config.out_dir / "masks.jsonl").read_bytes()
        if not more:
            drawn = set(two_missing.rglob("*")) - before
            assert {path.name for path in drawn} == {"00_mask.png", "01.png_mask.png"}
            (two_missing / "bolt/masks/00_mask.png").unlink()
            before = set(two_missing.rglob("*"))
    assert set(two_missing.rglob("*")) == before, "data_root is as it was"
    assert [path.name for path in (tmp_path / "made").rglob("*.png")] == ["00_mask.png"]
    assert len(read_lines(config)) == 3


def test_what_the_tool_refuses_ends_training_with_its_message_and_code(
    two_missing: Path, tmp_path: Path, call_main: Callable, capfd: pytest.CaptureFixture
) -> None:
    args = ("--data_root", two_missing, "--out_dir", tmp_path / "run", "--auto_generate_masks", *TINY_RUN)
    assert call_main(*args, "--sam2_ckpt", tmp_path / "none.pt") == 2
    assert "--sam2_ckpt" in capfd.readouterr().err and not (tmp_path / "run").exists()
    assert call_main(*args) == 2
    out, said = capfd.readouterr()
    assert out.startswith("--auto_generate_masks has no --sam2_ckpt: ")
    assert "--sam2_ckpt: is missing" in said and "curl -LO" in said
    assert "tools/masks.py has ended with exit code 2" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_signal_to_training_stops_the_drawing(
    config: masks.MaskOptions, confident_ckpt: Path, tmp_path: Path, call_main: Callable, capfd: pytest.CaptureFixture
) -> None:
    """Training waits for the tool to end; both say so, and the same command does the rest."""
    root = make_masked_dataset(tmp_path / "masked", 30)
    for path in root.rglob("*_mask.png"):
        path.unlink()
    config = dataclasses.replace(config, sam2_ckpt=confident_ckpt)
    words = ("--out_dir", config.out_dir, "--auto_generate_masks", *missing_flags(config, root), *TINY_RUN)

    def stop() -> None:
        deadline = time.monotonic() + 120
        while not list(root.rglob("*_mask.png")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert call_main(*words) == 143
    said = capfd.readouterr().err
    assert said.count("interrupted (SIGTERM)") == 2 and "Traceback" not in said, said
    assert 1 <= len(read_lines(config)) < 90
    assert not list(root.rglob("*.tmp"))


def test_the_options_that_training_passes_on_are_those_of_the_tool() -> None:
    names = {field.name for field in lct.option_fields(masks.MaskOptions)}
    assert names - set(lct.MASK_FLAGS) == {"config", "draw", "mask_min_score", "mask_cleanup"}
    assert set(lct.MASK_FLAGS) <= names & {field.name for field in lct.option_fields()}
