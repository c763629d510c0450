"""Each sampler beside the diffusers scheduler that it stands for: whole loops of both, from one start and one network.

    python benchmarks/schedulers.py [--result FILE]

What is compared, and how, is in peers.py. Where stock has a fault (docs/differences.md), its class is measured as it is
and with the fault mended, by mended.py. The result is kept in benchmarks/results/schedulers.json; the table printed is
that of docs/schedulers.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from peers import PEERS, SHAPE, STEPS, compare
from report import RESULTS, markdown, save
from training.provenance import provenance


def main(result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "schedulers.json") -> None:
    """Measure every pair."""
    found = [(peer, compare(peer)) for peer in PEERS]
    pairs = [{**peer.spelled, **vars(each)} for peer, each in found]
    save({"pairs": pairs, "shape": SHAPE, "steps": STEPS, **provenance()}, result)
    print(table(pairs))


def table(pairs: list[dict[str, Any]]) -> str:
    """As docs/schedulers.md has it."""
    columns = ["ours", "diffusers", "network", "loops", "largest difference", "from stock with its fault"]
    return markdown(columns, (_cells(pair) for pair in pairs))


def _cells(pair: Mapping[str, Any]) -> list[str]:
    stock = "" if pair["stock"] is None else f"{pair['stock']:.0e}"
    return [pair["ours"], pair["theirs"], pair["network"], str(pair["loops"]), f"{pair['right']:.0e}", stock]


if __name__ == "__main__":
    typer.run(main)
