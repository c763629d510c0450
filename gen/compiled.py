"""C++ of our own, built by the machine's compiler when it is first asked for and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpp")
COMPILERS = ("c++", "g++", "clang++")


def built(name: str, flags: Sequence[str]) -> Path:
    """The shared library of a source in `SOURCES`, built where it is not there yet.

    It is kept by the content of all sources, the command and the compiler's version, in the folder `unclip` of
    XDG_CACHE_HOME (None: ~/.cache). RuntimeError that says in one line why it cannot be built.
    """
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise RuntimeError(f"it needs a C++ compiler ({', '.join(COMPILERS)}, or what CXX names)")
    command = [*shlex.split(found), "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", str(SOURCES / name), *flags]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip"
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, check=True, text=True).stdout
        texts = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]pp"))]
        content = hashlib.sha256("\0".join([*texts, shlex.join(command), version]).encode()).hexdigest()
        path = folder / f"{Path(name).stem}-{content[:16]}.so"
        if not path.exists():
            began = time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as apart:
                made = Path(apart) / path.name
                subprocess.run([*command, "-o", str(made)], capture_output=True, check=True, text=True)
                made.replace(path)
            logger.info("compiled %s in %.1f s", path, time.perf_counter() - began)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{command[0]} failed on {name}: {first_error(error.stderr)}") from None
    except OSError as error:
        raise RuntimeError(f"it cannot be built in {folder} ({error})") from None
    return path


def first_error(output: str) -> str:
    """The line of a compiler's words that says what is wrong."""
    lines = output.splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line), lines[0]).strip()
