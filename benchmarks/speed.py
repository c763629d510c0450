"""Seconds from start to files written, and peak memory, of `unclip generate PROMPT -n 16 --keep 4`.

    python benchmarks/speed.py [--runs 5] [--model shapes64]

Every run is a fresh process, timed from its start to its end by this one; the first, which warms the file
cache, is not counted. The result is kept in benchmarks/results/speed.json and printed in markdown.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from options import PROMPT
from report import RESULTS, markdown, save, spread
from training.provenance import provenance


def main(
    runs: Annotated[int, typer.Option(min=1, help="Counted runs.")] = 5,
    model: Annotated[str, typer.Option(help="Bundled name, diffusers folder or hub id.")] = "shapes64",
    number: Annotated[int, typer.Option("-n", help="Candidates.")] = 16,
    keep: Annotated[int, typer.Option(help="Pictures kept.")] = 4,
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "speed.json",
) -> None:
    """Measure speed."""
    words = [PROMPT, "-n", str(number), "--keep", str(keep), "--seed", "0", "--model", model]
    with tempfile.TemporaryDirectory() as folder:
        each = [run(words, Path(folder) / str(index), keep) for index in range(runs + 1)][1:]
    seconds, peaks = [one["seconds"] for one in each], [one["peak_memory_mb"] for one in each]
    found = {
        "command": " ".join(["unclip generate", f'"{PROMPT}"', *words[1:]]),
        "seconds": {"median": median(seconds), "least": min(seconds), "most": max(seconds)},
        "peak_memory_mb": {"median": median(peaks), "most": max(peaks)},
        "runs": each,
        **provenance("cuda" if has_cuda() else "cpu"),
    }
    save(found, result)
    columns = ["command", "seconds, median of fresh processes (least–most)", "peak memory"]
    print(markdown(columns, [[f"`{found['command']}`", spread(seconds, ".1f"), f"{max(peaks):.0f} MB"]]))


def run(words: list[str], out: Path, keep: int) -> dict[str, float]:
    """One fresh process; its seconds from start to end and its peak resident memory."""
    command = [sys.executable, "-m", "gen.command", "generate", *words, "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)  # this child's own peak, where getrusage gives the largest of all
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    written = [path for path in out.rglob("*.png") if path.name != "sheet.png"]
    if process.returncode != 0 or len(written) != keep:
        raise SystemExit(f"{' '.join(command)} failed ({process.returncode}): {errors.decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {"seconds": round(seconds, 2), "peak_memory_mb": round(usage.ru_maxrss * unit / 1e6, 1)}


def has_cuda() -> bool:
    """Asked in a process of its own, so that no GPU memory is held while others are timed."""
    words = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", words]).returncode == 0


if __name__ == "__main__":
    typer.run(main)
