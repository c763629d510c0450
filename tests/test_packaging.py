"""The distribution holds what it should, and its command joins the verbs."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("samplers", "clip_core", "gen", "training")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_help_needs_only_metadata_and_the_command_module() -> None:
    code = "import gen.command, sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(loaded.stdout.split()) & {"torch", "typer", "rich", "numpy", "PIL", "diffusers"} == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from the files of this checkout, by the build backend itself."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    return zipfile.ZipFile(next(source.glob("unclip-*.whl")))


def test_wheel_holds_the_packages_their_data_and_no_tests(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for package in PACKAGES:
        assert {path.relative_to(ROOT).as_posix() for path in sorted((ROOT / package).rglob("*.py"))} <= names
    data = [path for path in (ROOT / "gen" / "assets").rglob("*") if path.is_file()]
    data += (ROOT / "gen" / "cpp").glob("*.[ch]pp")
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
