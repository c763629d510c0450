"""C++ is built once, whole or not at all, and who cannot build it is told why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gen import compiled
from gen.compiled import COMPILERS, built

NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder and sources of the test's own."""
    sources = tmp_path / "cpp"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return ONE; }\n')
    monkeypatch.setattr(compiled, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "unclip"


@NEEDS_COMPILER
def test_it_is_built_once_for_each_source_and_command(cache: Path) -> None:
    path = built("one.cpp", ["-DONE=1"])
    before = path.stat().st_mtime_ns
    assert built("one.cpp", ["-DONE=1"]) == path and path.stat().st_mtime_ns == before
    other = built("one.cpp", ["-DONE=2"])
    (compiled.SOURCES / "one.cpp").write_text('#include "one.hpp"\nextern "C" int one() { return -ONE; }\n')
    (compiled.SOURCES / "one.hpp").write_text("// what one is made of\n")
    third = built("one.cpp", ["-DONE=1"])
    (compiled.SOURCES / "one.hpp").write_text("// or of something else\n")
    fourth = built("one.cpp", ["-DONE=1"])
    assert len({path, other, third, fourth}) == 4
    assert sorted(cache.iterdir()) == sorted([path, other, third, fourth])  # and nothing beside


@NEEDS_COMPILER
def test_what_does_not_compile_leaves_nothing(cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"failed on one\.cpp: .*error: .*ONE.*") as caught:
        built("one.cpp", [])
    assert "\n" not in str(caught.value) and list(cache.iterdir()) == []


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler \(c\+\+, g\+\+, clang\+\+, or what CXX names\)"):
        built("one.cpp", [])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        built("one.cpp", [])


@NEEDS_COMPILER
def test_a_folder_in_the_way_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"it cannot be built in .*file"):
        built("one.cpp", ["-DONE=1"])
