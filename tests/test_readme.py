"""The documents: their commands, flags, links, tables and snippets are those of the script and of the tools."""

import functools
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO

import lct_dino3 as lct

README = (REPO / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "configs/README.md", "tools/README.md", "tests/README.md", "tests/benchmarks/README.md")
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w.-]*")
# Not ours are the flags before the script in a command of torchrun, and those of other programs.
FOREIGN = re.compile(
    r"torchrun\b.*?(?=lct_dino3\.py|tools/\w+\.py|\.\.\.|`|$)"
    r"|(?<![\w-])(?:pip|tensorboard|clearml-task) [^`#\n]*|label-studio`|pytest[^`#\n]*"
)
STARTED = re.compile(r"lct_dino3\.py +([a-z]+)\b|\b(lct_dino3)\.py|\b(?:tools/)([a-z_]+)\.py")
PRETRAINING = ("pretrain_dino_face", "pretrain_dino_hands")  # tools that the script does not start


def flags_of_parser(options_class: type[lct.Options], command: str) -> set[str]:
    """Return the flags of a class of options, with their other spellings."""
    parser = lct.build_parser(options_class, command)
    return {flag for action in parser._actions for flag in action.option_strings}


def flags_of_tool(path: Path) -> set[str]:
    """Return the flags of a tool: those of its options, where it has a class of them, else those that its --help shows."""
    if "import lct_dino3" in path.read_text(encoding="utf-8"):
        classes = [entry for entry in vars(importlib.import_module(path.stem)).values() if isinstance(entry, type)]
        options = [entry for entry in classes if issubclass(entry, lct.Options) and entry.__module__ == path.stem]
        return set().union(*(flags_of_parser(entry, path.stem) for entry in options))
    command = [sys.executable, path, "--help"]
    return set(FLAG.findall(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout))


@functools.cache
def flags_of_rooms() -> dict[str, set[str]]:
    """Return the flags of each command and tool."""
    rooms = {
        command: flags_of_parser(lct.COMMAND_OPTIONS.get(command, lct.Config), command) | {"--help"}
        for command in lct.COMMANDS
    }
    for path in (REPO / "tools").glob("*.py"):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            rooms[path.stem] = flags_of_tool(path) | {"--help"}
    rooms["demo"] |= rooms["train"]  # it passes them on
    rooms["pretraining"] = rooms[PRETRAINING[0]]
    return rooms


def read(document: str) -> str:
    """Return a document with lines that end in a backslash joined, and without what belongs to other programs."""
    text = (REPO / document).read_text(encoding="utf-8").replace("\\\n", " ")
    return FOREIGN.sub("", text)


def rooms_started(line: str) -> list[str]:
    """Return the commands and tools that a line starts."""
    return [command or tool or "train" for command, _, tool in STARTED.findall(line)]


def flags_of_benchmark(line: str) -> set[str]:
    """Return the flags of the benchmarks that a line names."""
    paths = [REPO / "tests" / "benchmarks" / name for name in re.findall(r"(\w+\.py)", line)]
    return {flag for path in paths if path.is_file() for flag in re.findall(r'"(--\w+)"', path.read_text("utf-8"))}


def test_the_two_commands_stand_first() -> None:
    commands = re.findall(r"^ *(?:\$ )?(pip install -r .*)$", README, re.MULTILINE)[:2]
    assert commands == [
        "pip install -r requirements.txt && python lct_dino3.py demo",
        "pip install -r tests/requirements.txt && python -m pytest",
    ]


def test_it_is_short() -> None:
    assert len(README.encode()) < 10_000


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_exists_in_the_room_that_it_is_said_of(document: str) -> None:
    """A line that starts a program speaks of it, a section of tools/README.md of its tool or of training, all else of training."""
    rooms, section, wrong = flags_of_rooms(), "", []
    for line in read(document).splitlines():
        if line.startswith("## "):
            section = line[3:].strip()
        named = set(FLAG.findall(line))
        started = [room for room in rooms_started(line) if room in rooms]
        known = set().union(*(rooms[room] for room in started)) if started else rooms["train"]
        if document == "tools/README.md" and not started:
            known = known | rooms.get(section, set())
        for room in re.findall(r"`(\w+) --\w+", line):
            known = known | rooms.get(room, set())
        wrong += [f"{flag}: {line}" for flag in sorted(named - known - flags_of_benchmark(line))]
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_program_and_command_exists(document: str) -> None:
    text = (REPO / document).read_text(encoding="utf-8")
    commands = set(re.findall(r"python lct_dino3\.py ([a-z]+)\b", text))
    assert commands <= lct.COMMANDS.keys() | lct.TOOLS.keys()
    assert all((REPO / "tools" / f"{name}.py").is_file() for name in commands & lct.TOOLS.keys())
    paths = re.findall(r"python ((?:tools|tests)/[a-z_/]+\.py)", text)
    assert [path for path in paths if not (REPO / path).is_file()] == []


def slugs(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text, folder = (REPO / document).read_text(encoding="utf-8"), (REPO / document).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = (folder / path).resolve() if path else REPO / document
        assert linked.is_file(), target
        assert not anchor or anchor in slugs(linked.read_text(encoding="utf-8")), target


def test_every_document_is_linked_from_the_first() -> None:
    assert set(re.findall(r"\]\(([\w/]+\.md)", README)) == set(DOCUMENTS) - {"README.md"}


def test_every_room_is_in_the_table() -> None:
    rooms = README.partition("## Rooms")[2].partition("\n## ")[0]
    tools_table = (REPO / "tools" / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    for path in (REPO / "tools").glob("*.py"):
        command = f"lct_dino3.py {path.stem}" if path.stem in lct.TOOLS else f"tools/{path.name}"
        is_program = '__name__ == "__main__"' in path.read_text(encoding="utf-8")
        if is_program:
            assert f"`{path.name}`" in rooms and f"python {command} " in rooms.replace("`", " "), path.name
        else:
            assert f"`{path.name}`" in tools_table, path.name
    for command in set(lct.COMMANDS) - {"train"}:
        assert f"python lct_dino3.py {command} " in rooms, command


def test_every_config_file_and_benchmark_is_in_its_table() -> None:
    for folder, pattern in (("configs", "*.yaml"), ("tests/benchmarks", "*.py")):
        text = (REPO / folder / "README.md").read_text(encoding="utf-8")
        for path in (REPO / folder).glob(pattern):
            assert f"`{path.name}`" in text, path.name


def test_promises_name_tests_that_exist() -> None:
    """Each line of the tables of tests/README.md has one, and what it names is there."""
    text = (REPO / "tests" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 60
    for path, name in named:
        source = (REPO / "tests" / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path}::{name}"
    promises = text.partition("## Promises")[2].partition("\n## ")[0]
    assert [int(number) for number in re.findall(r"^\| (\d) ", promises, re.MULTILINE)] == [1, 2, 3, 4, 5, 6, 7, 8]
    for row in re.findall(r"^\| (?!promise|file|rule).*$", promises, re.MULTILINE):
        assert "::" in row or "below" in row, row


def test_every_test_file_and_helper_is_listed() -> None:
    text = (REPO / "tests" / "README.md").read_text(encoding="utf-8")
    for path in sorted((REPO / "tests").glob("*.*")) + sorted((REPO / "tests" / "tools").glob("test_*.py")):
        assert path.name in text or path.name == "README.md", path.name


def test_every_output_and_exit_code_is_explained() -> None:
    for name in (
        "train.log",
        "metrics.jsonl",
        "config.json",
        "splits.json",
        "data_report.json",
        "predictions.csv",
        "embeddings.npz",
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
    galleries = []
    for matcher in ("centroid", "prototypes", "knn"):
        gallery = lct.Gallery(
            class_names=("a", "b", "c"), centroids=centroids, prototypes=centroids, prototype_labels=np.arange(3),
            stacks=stacks, stack_labels=labels, stack_paths=("p",) * 18, stack_views=np.zeros(18, np.uint8),
            thresholds=thresholds, matcher=matcher, knn_counts=np.array([3, 1, 2]), temperature=0.1, is_pooled=np.zeros(3, bool),
            is_enrolled=np.zeros(3, bool), offsets=np.zeros(3, np.float32), log_odds=np.array([(8, -4), (9, -5), (3, -1)], float),
        )  # fmt: skip
        if matcher == "prototypes":
            gallery = lct.split_classes(gallery, lct.Embedded(labels, labels, labels, stacks), 2)
            assert len(gallery.prototypes) > 3
        for is_enrolled in ([False] * 3, [False, True, False]):
            offsets = 0.2 * np.float32(is_enrolled)
            galleries.append(lct.dataclasses.replace(gallery, is_enrolled=np.array(is_enrolled), offsets=offsets))
    bare = {
        "stacks": stacks[:12],
        "stack_labels": labels[:12],
        "stack_paths": ("p",) * 12,
        "stack_views": np.zeros(12, np.uint8),
    }
    few = lct.dataclasses.replace(gallery, knn_counts=np.array([9, 9, 9]))  # more than a class has
    galleries += [few, lct.dataclasses.replace(few, **bare)]  # "c" has no references
    for gallery in galleries:
        with tempfile.TemporaryDirectory() as folder:
            lct.save_gallery(Path(folder) / "prototypes.npz", gallery, {})
            for query in np.concatenate([stacks, -stacks[:3]]):
                scope = {"query": query}
                exec(code.replace("RUN/", f"{folder}/"), scope)
                scores = gallery.scores(query[None])[0]
                expected = "abc"[scores.argmax()] if scores.max() >= thresholds[scores.argmax()] else "unknown"
                assert scope["name"] == expected
                expected = gallery.probability(scores[None].argmax(axis=1), scores[None].max(axis=1))
                assert scope["probability"] == pytest.approx(expected[0], abs=1e-5)
