"""Every attention kernel at every kind of shape, and what one text read by many rows costs.

    python benchmarks/attention.py [--sizes real|tiny] [--device cuda] [--dtype float16]

The first table: the error against float64 on the same inputs, whether three runs give the same bits, how far a row
alone is from the same row among others, milliseconds, and the peak of memory beside what is there before; a kernel that
a shape is refused by says why in the file. The second: keys and values of a text read by blocks of its rows, as
`gen.attention` does it, beside three other ways and beside projecting the text for each row, as stock does. The
result is kept in benchmarks/results/attention_DTYPE.json, as far as it has come.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.benchmark import Timer

from gauges import now, peak_mb, reset_peak
from gen.attention.kernels import AUTO, KERNELS, TORCHS_CHOICE, Shape, chosen, refusal
from gen.runtime import DTYPES
from options import known
from report import RESULTS, markdown, save
from training.provenance import provenance

ROWS = 4
SECONDS = 1.0  # that a measurement of time takes at least
LIBC = ctypes.CDLL(None)
MASKED = (1, 1)  # one bias for all heads and queries, as a UNet makes it

# (heads, head size, queries, keys, mask) of one row
SIZES: dict[str, dict[str, tuple[int, int, int, int, tuple[int, int] | None]]] = {
    "real": {
        "SD 1, 512 px, self, 64x64": (8, 40, 4096, 4096, None),
        "SD 1, 512 px, text, 64x64": (8, 40, 4096, 77, None),
        "SD 1, 512 px, self, 16x16": (8, 160, 256, 256, None),
        "SD 1, 512 px, text, 16x16": (8, 160, 256, 77, None),
        "SD XL, 1024 px, self, 64x64": (10, 64, 4096, 4096, None),
        "SD XL, 1024 px, text, 32x32": (20, 64, 1024, 77, None),
        "Karlo, 64 px, added, 32x32": (12, 64, 1024, 1024 + 77 + 4, MASKED),
        "VAE, 512 px, self, 64x64": (1, 512, 4096, 4096, None),
        "UNet of 36 M, self, 32x32": (8, 16, 1024, 1024, None),
        "UNet of 36 M, text, 32x32": (8, 16, 1024, 77, None),
    },
    "tiny": {
        "self": (2, 8, 64, 64, None),
        "text": (2, 8, 64, 32, None),
        "added": (2, 8, 16, 16 + 32, MASKED),
    },
}
# (heads, head size, queries, keys) of one row of a layer that reads the text, and the text's width
READ = {"real": ((8, 80, 1024, 77), 768), "tiny": ((2, 8, 64, 32), 16)}
# rows of each text: one prompt and null, four prompts and null, pruned, one candidate of each prompt and null
COUNTS = ([16, 16], [16, 4, 4, 4, 4], [7, 3, 4], [9] + [1] * 9)


@torch.no_grad()
def main(
    sizes: Annotated[str, typer.Option(help=f"One of: {', '.join(SIZES)}.")] = "real",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of: {', '.join(DTYPES)}.")] = "float32",
    result: Annotated[Path | None, typer.Option(help="The file kept (default: attention_DTYPE.json).")] = None,
) -> None:
    """Measure attention."""
    of = (torch.empty(0, device=device).device, DTYPES[known(dtype, DTYPES, "dtype")])
    kept = RESULTS / f"attention_{dtype}.json" if result is None else result
    shapes = {kind: Shape(*of, *size) for kind, size in SIZES[known(sizes, SIZES, "sizes")].items()}
    kernels: list[dict[str, Any]] = []
    reads: list[dict[str, Any]] = []
    found = {"sizes": sizes, "dtype": dtype, "rows": ROWS, "kernels": kernels, "reads": reads, **provenance(device)}
    found["is_whole"] = False
    cells = [(kind, name, shape) for kind, shape in shapes.items() for name in (*KERNELS, AUTO)]
    for cell in track(cells, "kernels", console=Console(stderr=True)):
        kernels.append(measured(*cell))
        save(found, kept)
    layer, width = READ[sizes]
    for counts in track(COUNTS, "texts", console=Console(stderr=True)):
        reads.append(read(counts, Shape(*of, *layer), width))
        save(found, kept)
    save(found | {"is_whole": True}, kept)
    print(table(kernels))
    print()
    print(table(reads))


def measured(kind: str, name: str, shape: Shape) -> dict[str, Any]:
    """One kernel at one shape."""
    found = {"shape": kind, "kernel": name}
    runs = chosen(name, shape) if name == AUTO else name
    reason = None if runs == TORCHS_CHOICE else refusal(runs, shape)
    if reason is not None:
        return found | {"refused": reason, "size": size(shape)}
    arguments, kernel = shape.example(ROWS), KERNELS[runs]
    out = kernel(*arguments)
    alone = kernel(*(each[:1] if isinstance(each, Tensor) else each for each in arguments))
    exact = KERNELS["math"](*(each[:1].double() if isinstance(each, Tensor) else each for each in arguments))
    return found | {
        "runs": runs,
        "error": (alone - exact).abs().max().item(),
        "same_again": all(torch.equal(out, kernel(*arguments)) for _ in range(2)),
        "alone": (alone - out[:1]).abs().max().item(),
        "ms": milliseconds(lambda: kernel(*arguments)),
        "peak_mb": beside(lambda: kernel(*arguments), shape.device),
        "size": size(shape),
    }


def size(shape: Shape) -> dict[str, Any]:
    """What a shape is, in JSON."""
    return {name: value for name, value in asdict(shape).items() if name not in ("device", "dtype")}


def milliseconds(call: Callable[[], Tensor]) -> float:
    """What a call takes, the median."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return round(1e3 * timer.blocked_autorange(min_run_time=SECONDS).median, 4)


def beside(call: Callable[[], Tensor], device: torch.device) -> float | None:
    """The peak of memory beside what is there before a call, its answer included; None where nobody counts."""
    if device.type == "cpu" and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # or what was given back before is taken again, and nothing is told
    if not reset_peak(device):
        return None
    before = peak_mb(device)
    call()
    now(device)
    return round(peak_mb(device) - before, 2)


def read(counts: list[int], shape: Shape, width: int) -> dict[str, Any]:
    """Milliseconds of one layer's attention to texts of so many rows, by each way of reading them."""
    rng = torch.Generator(shape.device).manual_seed(0)
    of = {"generator": rng, "dtype": shape.dtype, "device": shape.device}
    query = torch.randn(sum(counts), shape.queries, shape.heads * shape.size, **of)  # (M, N, heads * d)
    states = torch.randn(len(counts), shape.keys, width, **of)  # (U, L, D)
    weight = torch.randn(2 * shape.heads * shape.size, width, **of) * width**-0.5
    each = [place for place, rows in enumerate(counts) for _ in range(rows)]

    def projected(states: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (2, heads, L, d) of every text."""
        both = F.linear(states, weight).unflatten(-1, (2, shape.heads, shape.size))
        return both.permute(0, 2, 3, 1, 4).unbind(0)

    texts = projected(states)

    def attend(rows: Tensor, pairs: Sequence[Tensor]) -> Tensor:
        """Rows (M, ...), M / len(pairs) of them to each pair of keys and values."""
        folded = rows.reshape(len(pairs), -1, shape.heads, shape.size).transpose(1, 2)
        out = F.scaled_dot_product_attention(folded, *torch.stack(list(pairs), 1))
        return out.transpose(1, 2).reshape(rows.shape)

    def blocks(block: int) -> Tensor:
        return attend(query, [text for text, rows in zip(texts, counts, strict=True) for _ in range(rows // block)])

    def loop() -> Tensor:
        return torch.cat([attend(rows, [text]) for rows, text in zip(query.split(counts), texts, strict=True)])

    def padded() -> Tensor:
        wide = query.new_zeros(len(counts), max(counts), *query.shape[1:])
        for place, rows in enumerate(query.split(counts)):
            wide[place, : len(rows)] = rows
        out = attend(wide.flatten(0, 1), texts).unflatten(0, wide.shape[:2])
        return torch.cat([out[place, :rows] for place, rows in enumerate(counts)])

    ways: dict[str, Callable[[], Tensor]] = {
        "blocks": lambda: blocks(math.gcd(*counts)),
        "one row a block": lambda: blocks(1),
        "loop": loop,
        "padded": padded,
        "projected for each row": lambda: attend(query, projected(states[each])),
    }
    answers = [way() for way in ways.values()]
    assert all(torch.allclose(answers[0], other, atol=1e-2) for other in answers), "the ways must agree"
    took = {name: milliseconds(way) for name, way in ways.items()}
    return {"rows of each text": " + ".join(str(rows) for rows in counts), **took}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown of what was measured; refusals are left to the file."""
    shown = [cell for cell in cells if "refused" not in cell]
    columns = [name for name in shown[0] if name != "size"]
    return markdown(columns, ([word(cell[name]) for name in columns] for cell in shown))


def word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
