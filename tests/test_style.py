"""The structure of the script and its tools: sections, who imports whom, the size of functions, what importing does."""

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from killing import Nursery

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "lct_dino3.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
SOURCES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "lct_dino3.py", *sorted(ROOT.glob("tools/**/*.py")))
}
# Who may import whom of ours; a tool that has no row here is not a tool yet.
MAY_IMPORT: dict[str, set[str]] = {
    "lct_dino3": set(),  # it starts tools
    "geometry": set(),
    "label_objects": {"geometry"},
    "label_yolo": {"geometry", "label_objects"},
    "labels": {"geometry", "label_objects", "label_yolo"},
    "label_writers": {"geometry", "label_objects", "label_yolo", "labels"},
    "report": {"report_comparison", "report_page", "run_files"},
    "report_comparison": {"report_page", "run_files"},
    "report_page": {"run_files"},
    "run_files": set(),
    "track": set(),
    "demo": {"drawn_scenes", "drawn_tools", "fonts"},  # it starts the others
    "drawn_scenes": {"drawn_tools"},
    "drawn_tools": set(),
    "fonts": set(),
    "crop": {"crop_records", "geometry", "label_objects", "labels", "lct_dino3", "photos"},
    "prelabel": {"answers", "geometry", "label_objects", "label_writers", "labels", "lct_dino3", "photos"},
    "photos": {"lct_dino3"},
    "crop_records": {"lct_dino3"},
    "answers": {"geometry", "label_objects", "label_writers", "lct_dino3"},
    "masks": {"fonts", "lct_dino3"},
    "export": {"lct_dino3"},
    "pretrain_dino_face": {"lct_dino3", "pretrain_utils"},
    "pretrain_dino_hands": {"lct_dino3", "pretrain_utils"},
    "pretrain_utils": {"lct_dino3", "slt.data", "slt.losses", "slt.measures", "slt.models", "slt.options", "slt.views"},
    "slt.data": {"lct_dino3", "slt.options", "slt.views"},
    "slt.losses": set(),
    "slt.measures": set(),
    "slt.models": {"lct_dino3"},
    "slt.options": {"lct_dino3", "slt.models", "slt.views"},
    "slt.views": {"lct_dino3"},
    "meshes": {"fonts"},
    "voxel_gan": {"lct_dino3"},
    "dataset_loader": {"meshes", "lct_dino3"},
    "modelit": {"dataset_loader", "meshes", "voxel_gan", "lct_dino3"},
}
# In tools/, and imported by tools alone; as what lies in folders there.
LIBRARIES = (
    *("answers", "crop_records", "drawn_scenes", "drawn_tools", "fonts", "geometry", "label_objects", "label_writers"),
    *("label_yolo", "labels", "meshes", "photos", "pretrain_utils", "report_comparison", "report_page", "run_files"),
    "voxel_gan",
)
BANNER = re.compile(r"^# =+\n# (\d\d)  ([A-Z& ]+)\n# =+$", re.MULTILINE)


@functools.cache
def parse(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def functions_of(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parse(name)) if isinstance(node, ast.FunctionDef)]


@pytest.fixture(params=list(SOURCES))
def source(request: pytest.FixtureRequest) -> str:
    """Each source file in turn, by its path from the root."""
    return request.param


def module_name(source: str) -> str:
    return source.removeprefix("tools/").removesuffix(".py").replace("/", ".")


def imports_of_ours(source: str) -> set[str]:
    """Return the files of ours that a file imports, anywhere in it; `import_module` counts."""
    ours, found = {module_name(other) for other in SOURCES}, set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            found |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return {name.removeprefix("tools.") for name in found} & ours


def test_arrows_run_one_way(source: str) -> None:
    """Tools import the script and some of each other, the script imports none of them: by the table above."""
    name = module_name(source)
    assert name in MAY_IMPORT, "a new tool needs a row in the table"
    assert imports_of_ours(source) <= MAY_IMPORT[name]


def test_there_is_no_circle() -> None:
    left = {module_name(source): imports_of_ours(source) for source in SOURCES}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        left = {name: imported for name, imported in left.items() if name not in free}
    assert left == {}


def test_the_script_knows_tools_only_as_files_that_it_starts() -> None:
    """No import by another name, and no path that would make one possible."""
    used = {ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    assert not used & {
        "sys.path",
        "importlib.import_module",
        "importlib.util.spec_from_file_location",
        "runpy.run_path",
    }
    calls = {ast.unparse(node.func) for node in ast.walk(TREE) if isinstance(node, ast.Call)}
    assert not calls & {"exec", "eval", "__import__"}


def test_tools_are_scripts_and_no_package() -> None:
    assert not list(ROOT.glob("tools/**/__init__.py"))
    for source in SOURCES:
        named = [ast.unparse(node.test) for node in parse(source).body if isinstance(node, ast.If)]
        is_library = module_name(source) in LIBRARIES or "/" in source.removeprefix("tools/")
        assert is_library or "__name__ == '__main__'" in named, f"{source} cannot be started"


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
        node.name: section_of(node.lineno)
        for node in TREE.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_")
    }
    used = [(n.id, section_of(n.lineno)) for n in ast.walk(TREE) if isinstance(n, ast.Name) and n.id in private]
    foreign = sorted({f"{name} in section {section:02}" for name, section in used if section != private[name]})
    assert foreign == [], "a helper that two sections share is public"


def test_inside_a_section_the_reader_goes_down() -> None:
    """Callers stand before what they call. Few exceptions: helpers that serve several topics of a section."""
    functions = {node.name: node.lineno for node in TREE.body if isinstance(node, ast.FunctionDef)}
    upward, downward = [], []
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            called = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} & functions.keys()
            for name in called - {node.name}:
                if section_of(functions[name]) == section_of(node.lineno):
                    (upward if functions[name] < node.lineno else downward).append(f"{node.name} calls {name}")
    assert len(upward) < 0.15 * len(downward), upward


def test_constants_stand_in_the_first_section_that_uses_them() -> None:
    used: dict[str, set[int]] = {}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.setdefault(node.id, set()).add(section_of(node.lineno))
    for node in TREE.body:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name) and target.id.isupper() and target.id in used:
                first = min(used[target.id])
                assert first == section_of(node.lineno) or target.id == "SCRIPT_NAME", target.id


def test_functions_are_short(source: str) -> None:
    lengths = {node.name: count_lines(node) for node in functions_of(source)}
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def test_functions_have_few_parameters_and_little_nesting(source: str) -> None:
    for node in functions_of(source):
        parameters = [arg.arg for arg in node.args.args + node.args.kwonlyargs if arg.arg not in ("self", "cls")]
        assert len(parameters) <= 6, node.name
        assert _depth(node) <= 4, f"{node.name} nests {_depth(node)} deep"


def _depth(node: ast.AST) -> int:
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    return max((_depth(child) + isinstance(child, blocks) for child in ast.iter_child_nodes(node)), default=0)


def test_everything_public_is_documented_and_typed(source: str) -> None:
    assert ast.get_docstring(parse(source)), f"{source} has no docstring"
    top_level = [node for node in parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    methods = [m for c in top_level if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, ast.FunctionDef)]
    for node in top_level + methods:
        if not node.name.startswith("_") and node.name != "error":
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in functions_of(source):
        arguments = [arg for arg in node.args.args if arg.arg not in ("self", "cls")]
        assert node.returns is not None and all(arg.annotation for arg in arguments), f"{node.name} lacks types"


def test_errors_are_never_swallowed_in_silence(source: str) -> None:
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
            body = ast.unparse(ast.Module(node.body, []))
            is_passed_on = node.name and any(isinstance(n, ast.Name) and n.id == node.name for n in ast.walk(node))
            words = ("+= 1", ".add(", "raise", "log(", "warn(")
            said = is_passed_on or any(word in body for word in words)
            assert said, f"line {node.lineno} swallows {body}"
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(parse(source)))


def import_each(folder: str, *names: str) -> int:
    """Import each file in a fork; return how many end with an error."""
    os.chdir(folder)
    sys.argv = ["x", "--no_such_flag"]
    for name in names:
        sys.modules.pop(name, None)
    num_failed = 0
    for name in names:
        child = os.fork()
        if not child:
            code = 0
            try:
                importlib.import_module(name)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)
        num_failed += os.waitpid(child, 0)[1] != 0
        if name == "lct_dino3":  # tools import it, and it has just been shown to do nothing
            importlib.import_module(name)
    return num_failed


def test_importing_a_file_does_nothing(nursery: Nursery, tmp_path: Path) -> None:
    """In forks of a process that has the libraries, whose import is what takes the time."""
    names = [module_name(source) for source in SOURCES]
    assert nursery.run(tmp_path, *names, function=("test_style", "import_each")) == (0, "")
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
