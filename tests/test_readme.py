"""README: its commands and tables are those of the script."""

import re
from pathlib import Path

import lct_dino3 as lct

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_stand_first() -> None:
    commands = re.findall(r"^ *(?:\$ )?(pip install -r .*)$", README, re.MULTILINE)[:2]
    assert commands == [
        "pip install -r requirements.txt && python lct_dino3.py demo",
        "pip install -r tests/requirements.txt && python -m pytest",
    ]


def test_every_flag_and_command_that_it_names_exists() -> None:
    known = {f"--{field.name}" for field in lct.option_fields()} | {"--help"}
    known |= {f"--no-{field.name}" for field in lct.option_fields() if lct.field_kind(field) is bool}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert named - known == set()
    assert set(re.findall(r"python lct_dino3\.py ([a-z]+)\b", README)) <= set(lct.COMMANDS)


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
