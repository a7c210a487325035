"""The structure of the single file: sections, their order, the size of functions, and what importing it does."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "lct_dino3.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
BANNER = re.compile(r"^# =+\n# (\d\d)  ([A-Z& ]+)\n# =+$", re.MULTILINE)


@functools.cache
def list_sections() -> list[tuple[int, str, int]]:
    """Return (number, name, first line) of every section."""
    return [(int(m[1]), m[2], SOURCE.count("\n", 0, m.start()) + 1) for m in BANNER.finditer(SOURCE)]


def section_of(line: int) -> int:
    return max((number for number, _, start in list_sections() if start <= line), default=0)


def count_lines(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def test_the_docstring_lists_the_sections() -> None:
    listed = re.findall(r"^    (\d\d)  ([A-Z& ]+)$", ast.get_docstring(TREE, clean=False), re.MULTILINE)
    found = [(f"{number:02}", name) for number, name, _ in list_sections()]
    assert listed == found
    assert [number for number, _ in found] == sorted(number for number, _ in found)
    assert len(found) >= 16


def test_code_names_only_what_stands_in_its_section_or_before() -> None:
    """The single file's substitute for import rules; annotations are strings and do not count."""
    defined = {
        node.name: section_of(node.lineno) for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    wrong = []
    for node in TREE.body:
        annotations = {id(inner) for part in ast.walk(node) for inner in _annotation_nodes(part)}
        for inner in ast.walk(node):
            is_code = isinstance(inner, ast.Name) and id(inner) not in annotations
            if is_code and defined.get(inner.id, 0) > section_of(inner.lineno):
                wrong.append(f"line {inner.lineno} names {inner.id} of section {defined[inner.id]:02}")
    assert not wrong


def _annotation_nodes(node: ast.AST) -> list[ast.AST]:
    parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [inner for part in parts if part is not None for inner in ast.walk(part)]


def test_private_helpers_are_not_used_by_another_section() -> None:
    private = {
        node.name: section_of(node.lineno) for node in FUNCTIONS if node.name.startswith("_") and node in TREE.body
    }
    used = [(n.id, section_of(n.lineno)) for n in ast.walk(TREE) if isinstance(n, ast.Name) and n.id in private]
    foreign = sorted({f"{name} in section {section:02}" for name, section in used if section != private[name]})
    assert foreign == [], "a helper that two sections share is public"


def test_functions_are_short() -> None:
    lengths = sorted(count_lines(node) for node in FUNCTIONS)
    assert lengths[len(lengths) // 2] <= 15
    assert [f"{node.name}: {count_lines(node)} lines" for node in FUNCTIONS if count_lines(node) > 60] == []


def test_functions_have_few_parameters_and_little_nesting() -> None:
    for node in FUNCTIONS:
        parameters = [arg.arg for arg in node.args.args + node.args.kwonlyargs if arg.arg not in ("self", "cls")]
        assert len(parameters) <= 6, node.name
        assert _depth(node) <= 4, f"{node.name} nests {_depth(node)} deep"


def _depth(node: ast.AST) -> int:
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    return max((_depth(child) + isinstance(child, blocks) for child in ast.iter_child_nodes(node)), default=0)


def test_everything_public_is_documented_and_typed() -> None:
    top_level = [node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    methods = [m for c in top_level if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, ast.FunctionDef)]
    for node in top_level + methods:
        if not node.name.startswith("_") and node.name != "error":
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in FUNCTIONS:
        arguments = [arg for arg in node.args.args if arg.arg not in ("self", "cls")]
        assert node.returns is not None and all(arg.annotation for arg in arguments), f"{node.name} lacks types"


def test_errors_are_never_swallowed_in_silence() -> None:
    for node in ast.walk(TREE):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
            body = ast.unparse(ast.Module(node.body, []))
            assert "raise" in body or "log(" in body or "warn(" in body, f"line {node.lineno} swallows {body}"
    assert "assert " not in "\n".join(
        line.strip() for line in SOURCE.splitlines() if line.strip().startswith("assert ")
    )


def test_importing_the_file_does_nothing(tmp_path: Path) -> None:
    code = f"import sys; sys.argv = ['x', '--no_such_flag']; sys.path.insert(0, {str(ROOT)!r}); import lct_dino3"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_ruff_is_clean() -> None:
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff"]
    done = subprocess.run([*command, "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [*command, "format", "--no-cache", "--check", "."], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_the_top_level_holds_what_it_should() -> None:
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert {"lct_dino3.py", "README.md", "requirements.txt", "tests"} <= visible
    assert visible <= {"lct_dino3.py", "README.md", "requirements.txt", "tests", "configs", "tools", "demo", "runs"}
