"""The distribution holds what it should, and the packages' imports point one way."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Each package with all that it may import besides the standard library (DESIGN section 3), and what lies under
# those libraries anyway: numbers, pictures, tokenizers, files. `samplers` needs none of these.
SMALL = {"numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub"}
MAY_IMPORT = {
    "samplers": {"torch"},
    "clip_core": {"torch", "transformers", "open_clip"} | SMALL,
    "gen": {"torch", "samplers", "clip_core", "diffusers", "transformers", "rich"} | SMALL,
    "training": {"torch", "samplers", "clip_core", "gen", "diffusers", "transformers", "accelerate"}
    | {"rich", "yaml", "pydantic"}
    | SMALL,
}
EXTRA = {"xformers", "webdataset", "tensorboard"}  # imported where used
LATE = ("cli.py", "command.py")  # endings of the modules that import on purpose when called: `--help` is quick


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of all absolute imports below a node, the standard library's left out."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    assert modules(package), f"package {package} has no modules"
    for path in modules(package):
        allowed = MAY_IMPORT[package] | {package}
        if package != "samplers":
            allowed |= EXTRA
        if path.name.endswith(LATE):
            allowed |= {"typer", "rich"}
        unexpected = imports(ast.parse(path.read_text())) - allowed
        assert not unexpected, f"{path.relative_to(ROOT)} imports {sorted(unexpected)}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_functions_import_only_extras(package: str) -> None:
    for path in modules(package):
        if path.name.endswith(LATE):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                late = imports(function) - EXTRA - {"torch"}
                assert not late, f"{path.relative_to(ROOT)}: {function.name} imports {sorted(late)} when called"


def test_help_needs_only_metadata_and_the_command_module() -> None:
    code = "import gen.command, sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(loaded.stdout.split()) & {"torch", "typer", "rich", "numpy", "PIL", "diffusers"} == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from the files of this checkout, by the build backend itself."""
    source = tmp_path_factory.mktemp("source")
    for name in (*MAY_IMPORT, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    return zipfile.ZipFile(next(source.glob("unclip-*.whl")))


def test_wheel_holds_the_packages_their_data_and_no_tests(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(MAY_IMPORT)
    for package in MAY_IMPORT:
        assert {path.relative_to(ROOT).as_posix() for path in modules(package)} <= names
    data = [path for path in (ROOT / "gen" / "assets").rglob("*") if path.is_file()]
    data += [*(ROOT / "training" / "recipes").glob("*.yaml"), *(ROOT / "training" / "data").glob("*.jsonl")]
    assert data, "no bundled model and no recipes"
    missing = {path.relative_to(ROOT).as_posix() for path in data} - names
    assert not missing


def test_metadata_says_what_installs_and_under_which_licence(wheel: zipfile.ZipFile) -> None:
    folder = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = message_from_string(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Name"] == "unclip" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert "torch>=2.11" in required
    assert not any(name in line for line in required for name in ("xformers", "tensorboard", "pytest"))
    assert {"train", "test", "xformers"} <= set(metadata.get_all("Provides-Extra"))


def test_every_verb_joins_with_its_help_line() -> None:
    verbs = PROJECT["project"]["entry-points"]["unclip.commands"]
    names = [entry.partition(":")[0] for entry in verbs]
    assert {"generate", "score", "info", "reproduce", "train", "data", "evaluate"} <= set(names)
    for entry in verbs:
        assert len(entry.partition(": ")[2].split()) > 3, f"{entry!r} says too little"
