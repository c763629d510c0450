"""The four packages' arrows point one way (docs/design.md): read from the source, so unused paths count too.

samplers -> torch alone; clip_core -> torch, transformers, open_clip; gen -> samplers, clip_core, diffusers;
training -> all of them, and nobody -> training. Nor does anybody import a test module: what several of them need
lies beside them.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("samplers", "clip_core", "gen", "training")
ARROWS = {
    "samplers": set(),
    "clip_core": set(),
    "gen": {"samplers", "clip_core"},
    "training": {"samplers", "clip_core", "gen"},
}
SMALL = {"numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub"}  # what lies under the large libraries
LIBRARIES = {
    "samplers": {"torch"},
    "clip_core": {"torch", "transformers", "open_clip"} | SMALL,
    "gen": {"torch", "diffusers", "transformers", "scipy", "rich", "typer", "filelock"} | SMALL,
    "training": {"torch", "torchvision", "diffusers", "transformers", "accelerate", "rich", "typer", "yaml", "pydantic"}
    | SMALL,
}
EXTRAS = {"gen": {"openvino", "xformers"}}  # optional: imported inside the function that needs it, and nowhere else
LATE = ("cli.py", "command.py")  # endings of the modules that import on purpose when called: `--help` is quick


def modules_of(source: str) -> set[str]:
    """Every module that a module imports: at its top, inside functions, for types only, or by name.

    By their full names, beside those of what is taken from them; names that begin with a dot are relative.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                module = "." * node.level + (node.module or "")
                names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
                names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def imported(source: str) -> set[str]:
    """Every package that a module imports."""
    return {name.partition(".")[0] for name in modules_of(source) if not name.startswith(".")}


def imported_tests(source: str) -> set[str]:
    """Every test module that a module imports."""
    return {name for name in modules_of(source) if re.match(r"(tests)?\.(.*\.)?test_", name)}


def violations(package: str, source: str) -> set[str]:
    found = imported(source) - set(sys.stdlib_module_names) - {package}
    wrong = (found & set(OURS)) - ARROWS[package]
    return wrong | (found - set(OURS) - LIBRARIES[package] - EXTRAS.get(package, set()))


MODULES = [(package, path) for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("package, path", MODULES, ids=[path.relative_to(ROOT).as_posix() for _, path in MODULES])
def test_imports_follow_the_arrows(package: str, path: Path) -> None:
    assert violations(package, path.read_text()) == set()


@pytest.mark.parametrize(
    "package, source, wrong",
    [
        ("samplers", "import numpy", {"numpy"}),
        ("samplers", "def f():\n    from clip_core.clip import CLIP", {"clip_core"}),
        ("clip_core", "import samplers.noise as n", {"samplers"}),
        ("clip_core", "if TYPE_CHECKING:\n    import diffusers", {"diffusers"}),
        ("gen", "import importlib\nimportlib.import_module('training.loop')", {"training"}),
        ("samplers", "def f():\n    import xformers", {"xformers"}),
        ("training", "import gen, samplers, clip_core, accelerate, torch", set()),
    ],
)
def test_a_wrong_arrow_is_seen(package: str, source: str, wrong: set[str]) -> None:
    assert violations(package, source) == wrong


@pytest.mark.parametrize("package, path", MODULES, ids=[path.relative_to(ROOT).as_posix() for _, path in MODULES])
def test_only_the_command_line_imports_inside_functions(package: str, path: Path) -> None:
    source, extras = path.read_text(), EXTRAS.get(package, set())
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    late = {name for function in functions for name in imported(ast.unparse(function))} - set(sys.stdlib_module_names)
    assert path.name.endswith(LATE) or not late - extras
    assert not (imported(source) - late) & extras


def test_no_test_module_is_imported() -> None:
    """By tests, nor by what lies beside them."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    assert [path for path in paths if imported_tests(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "from tests.gen.test_rows import PLAIN",
        "from tests.gen import test_rows",
        "def f():\n    import tests.test_bundled as bundled",
        "from .test_rows import PLAIN",
        "from .. import test_bundled",
        "import importlib\nimportlib.import_module('tests.gen.test_rows')",
    ],
)
def test_an_imported_test_module_is_seen(source: str) -> None:
    assert imported_tests(source)
    assert not imported_tests(source.replace("test_", ""))


def owners(design: str) -> set[str]:
    """What the table of the design names in its first column: modules, and folders (`gen/search/`) as a whole.

    A name without a folder lies where the one before it does, in its row.
    """
    found: set[str] = set()
    for row in re.findall(r"^\| (`[^`]+/[^`]*`(?:, `[^`]+`)*) \|", design, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            inside, _, last = name.rstrip("/").rpartition("/")
            folder = inside or folder
            found.add(f"{folder}/{last}" + "/" * name.endswith("/"))
    return found


def test_the_design_has_every_module() -> None:
    """Its table says who owns what: by the module's name, or by the folder's where it says so of all in it."""
    owned = owners((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    modules = [path.relative_to(ROOT) for _, path in MODULES if path.name != "__init__.py"]
    where = {path: {path.as_posix(), *(f"{folder.as_posix()}/" for folder in path.parents)} for path in modules}
    assert [path for path in modules if not where[path] & owned] == []
    assert [name for name in owned if not (ROOT / name).exists()] == []


def test_a_row_of_the_table_names_what_lies_in_its_folder() -> None:
    design = "| `gen/a.py`, `b.py`, `gen/c/d.py`, `training/e.py`, `f/` | not `g.py` |\n| `gen/h.py` and so | no |"
    assert owners(design) == {"gen/a.py", "gen/b.py", "gen/c/d.py", "training/e.py", "training/f/"}
