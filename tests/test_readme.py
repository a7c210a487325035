"""README: its commands and tables are those of the script."""

import re
import tempfile
from pathlib import Path

import export
import numpy as np
import prelabel

import lct_dino3 as lct

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_stand_first() -> None:
    commands = re.findall(r"^ *(?:\$ )?(pip install -r .*)$", README, re.MULTILINE)[:2]
    assert commands == [
        "pip install -r requirements.txt && python lct_dino3.py demo",
        "pip install -r tests/requirements.txt && python -m pytest",
    ]


def test_every_flag_and_command_that_it_names_exists() -> None:
    classes = (lct.Config, *lct.COMMAND_OPTIONS.values(), prelabel.PrelabelOptions, export.ExportOptions)
    fields = [field for options_class in classes for field in lct.option_fields(options_class)]
    known = {f"--{field.name}" for field in fields} | {"--help"}
    known |= {f"--no-{field.name}" for field in fields if lct.field_kind(field) is bool}
    named = set(
        re.findall(
            r"(?<![\w-])--[a-z][\w-]*",
            re.sub(r".*(?:pip install|tests/benchmarks).*|torchrun --.*?(lct_dino3\.py|\.\.\.|`)", "", README),
        )
    )
    assert named - known == set()
    assert set(re.findall(r"python lct_dino3\.py ([a-z]+)\b", README)) <= lct.COMMANDS.keys() | lct.TOOLS.keys()


def test_every_output_and_exit_code_is_explained() -> None:
    for name in (
        "train.log",
        "metrics.jsonl",
        "config.json",
        "splits.json",
        "data_report.json",
        "prototypes.npz",
        "report.html",
    ):
        assert name in README, name
    for code in (0, 1, 2, 3, 130, 143):
        assert re.search(rf"\| {code} \|", README), code


def test_the_consumer_gives_the_answers_of_the_gallery() -> None:
    """The snippet runs as written, and agrees with the matcher that the run measured."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 6)
    stacks = rng.normal(size=(18, 8)) + 2 * np.eye(3, 8)[labels]
    stacks = (stacks / np.linalg.norm(stacks, axis=1, keepdims=True)).astype(np.float32)
    centroids, thresholds = lct.class_centroids(stacks, labels, 3), np.float32([0.5, 0.6, 0.7])
    for matcher in ("centroid", "prototypes", "knn"):
        gallery = lct.Gallery(
            class_names=("a", "b", "c"), centroids=centroids, prototypes=centroids, prototype_labels=np.arange(3),
            stacks=stacks, stack_labels=labels, stack_paths=("p",) * 18, stack_views=np.zeros(18, np.uint8),
            thresholds=thresholds, matcher=matcher, knn_counts=np.array([3, 1, 2]), temperature=0.1, is_pooled=np.zeros(3, bool),
        )  # fmt: skip
        if matcher == "prototypes":
            gallery = lct.split_classes(gallery, lct.Embedded(labels, labels, labels, stacks), 2)
            assert len(gallery.prototypes) > 3
        with tempfile.TemporaryDirectory() as folder:
            lct.save_gallery(Path(folder) / "prototypes.npz", gallery, {})
            for query in np.concatenate([stacks, -stacks[:3]]):
                scope = {"query": query}
                exec(code.replace("RUN/", f"{folder}/"), scope)
                scores = gallery.scores(query[None])[0]
                expected = "abc"[scores.argmax()] if scores.max() >= thresholds[scores.argmax()] else "unknown"
                assert scope["name"] == expected
