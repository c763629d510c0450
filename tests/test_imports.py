"""The four packages' arrows point one way (docs/design.md): read from the source, so unused paths count too.

samplers -> torch alone; clip_core -> torch, transformers, open_clip; gen -> samplers, clip_core, diffusers;
training -> all of them, and nobody -> training.
"""

import ast
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
LIBRARIES = {  # of the two that the others build on, with what lies under those libraries
    "samplers": {"torch"},
    "clip_core": {
        "torch",
        "transformers",
        "open_clip",
        "tokenizers",
        "PIL",
        "numpy",
        "safetensors",
        "huggingface_hub",
    },
}


def imported(source: str) -> set[str]:
    """Every package that a module imports: at its top, inside functions, for types only, or by name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom(level=0, module=str(module)):
                names.add(module)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
                names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name.partition(".")[0] for name in names}


def violations(package: str, source: str) -> set[str]:
    found = imported(source) - set(sys.stdlib_module_names) - {package}
    wrong = (found & set(OURS)) - ARROWS[package]
    if package in LIBRARIES:
        wrong |= found - set(OURS) - LIBRARIES[package]
    return wrong


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
        ("training", "import gen, samplers, clip_core, accelerate, torch", set()),
    ],
)
def test_a_wrong_arrow_is_seen(package: str, source: str, wrong: set[str]) -> None:
    assert violations(package, source) == wrong
