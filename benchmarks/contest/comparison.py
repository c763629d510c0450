"""The contest itself: all contestants in turns, how far each is from stock, and what must hold and does not."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np

from contest.tasks import Task
from contest.ways import OURS, STOCK, WAYS, Entrant, refusal
from contest.workers import Worker

CLOSE = 1e-4  # how far latents in float32 may be from stock's, of the largest of them
NO_WORSE = 1.5  # how many times the error of stock in its own lower precision ours may have
NOT_MEASURED = "not_measured"


def contest(task: Task, entrants: Sequence[Entrant], repeats: int, profiled: bool) -> dict[str, Any]:
    """All contestants in turns, what they are worth beside each other, and what must hold and does not."""
    with ExitStack() as stack:
        workers: dict[Entrant, Worker] = {}
        rows: dict[Entrant, dict[str, Any]] = {}
        for entrant in entrants:
            rows[entrant] = entered(entrant, task, stack, workers)
        turns: dict[Entrant, list[dict[str, Any]]] = {entrant: [] for entrant in workers}
        for _ in range(repeats):
            for entrant, worker in workers.items():
                turns[entrant].append(worker.ask("turn"))
        for entrant, taken in turns.items():
            rows[entrant] |= {name: [one[name] for one in taken] for name in ("seconds", "peak_memory_mb")}
            rows[entrant]["kept"] = taken[-1]["kept"]
        compare(workers, rows)
        found = list(rows.values())
        looked = looked_into(workers, rows, repeats) if profiled else {"profile": {}}
    return {"rows": found, "faults": faults(found), **looked}


def looked_into(
    workers: Mapping[Entrant, Worker], rows: Mapping[Entrant, dict[str, Any]], repeats: int
) -> dict[str, Any]:
    """Where the time of stock and of each way of ours goes, and what of a precision's roof each row reaches.

    The roof is large matrices multiplied by torch in the same minutes. A way that multiplies less often than its
    networks are written to, as convolutions by Winograd do, may stand above it.
    """
    shown = [each for each in workers if each == STOCK or WAYS[each.way].is_ours]
    shares = {" ".join(each): workers[each].ask("profile", repeats) for each in shown}
    operations = workers[STOCK].ask("operations")
    roofs = {dtype: workers[STOCK].ask("roof", dtype) for dtype in dict.fromkeys(each.dtype for each in workers)}
    for entrant in workers:
        rows[entrant]["of_roof"] = operations / median(rows[entrant]["seconds"]) / roofs[entrant.dtype]
    return {"profile": shares, "operations": operations, "roofs": roofs}


def entered(entrant: Entrant, task: Task, stack: ExitStack, workers: dict[Entrant, Worker]) -> dict[str, Any]:
    """A contestant's row; one that can run here is now ready among the workers."""
    row: dict[str, Any] = entrant._asdict()
    reason = refusal(WAYS[entrant.way])
    if reason is not None:
        return row | {NOT_MEASURED: reason}
    worker = stack.enter_context(Worker(entrant, task))
    try:
        answer = worker.answer()
    except RuntimeError as error:
        if entrant in (STOCK, OURS):
            raise
        return row | {NOT_MEASURED: f"it failed: {str(error).strip().splitlines()[-1]}"}
    workers[entrant] = worker
    return row | answer


def compare(workers: Mapping[Entrant, Worker], rows: Mapping[Entrant, dict[str, Any]]) -> None:
    """Write into each row how far it is from stock in float32: its latents, and what both rankings keep of it."""
    stock = workers[STOCK].ask("latents")
    by_ours = workers[OURS].ask("rank", workers[STOCK].ask("pictures"))
    for entrant, worker in workers.items():
        row, pictures = rows[entrant], worker.ask("pictures")
        ours = row["kept"] if WAYS[entrant.way].is_ours else workers[OURS].ask("rank", pictures)
        row |= apart(worker.ask("latents"), stock)
        row["same_kept"] = {
            "transformers": set(workers[STOCK].ask("rank", pictures)) == set(rows[STOCK]["kept"]),
            "unclip": set(ours) == set(by_ours),
        }


def apart(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far latents are from the reference: of its norm (`error`), and of its largest (`max_error`)."""
    difference = found.astype(np.float64) - reference
    return {
        "error": float(np.linalg.norm(difference) / np.linalg.norm(reference)),
        "max_error": float(np.abs(difference).max() / np.abs(reference).max()),
    }


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of ours must hold and does not, a line each."""
    stock = {row["dtype"]: row["error"] for row in measured(rows) if row["way"] == STOCK.way}
    found = []
    for row in measured(rows):
        if WAYS[row["way"]].is_ours:
            wrong = inexact(row) if row["dtype"] == STOCK.dtype else worse(row, stock.get(row["dtype"]))
            found += [f"{row['way']} {row['dtype']}: {each}" for each in wrong]
    return found


def inexact(row: Mapping[str, Any]) -> Iterator[str]:
    """What differs in the precision of the reference; a number that is none differs."""
    if not row["max_error"] <= CLOSE:
        yield f"latents differ by {row['max_error']:.1e} from stock's, more than {CLOSE}"
    for ranking, same in row["same_kept"].items():
        if not same:
            yield f"others are kept, as {ranking} ranks"


def worse(row: Mapping[str, Any], stock: float | None) -> Iterator[str]:
    """What is too far away in a lower precision, beside stock in the same one (None: it was not asked for)."""
    if stock is not None and not row["error"] <= NO_WORSE * stock:
        yield f"latents are off by {row['error']:.1e}, more than {NO_WORSE} times stock's {stock:.1e}"


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that have numbers."""
    return [row for row in rows if NOT_MEASURED not in row]
