"""Where the time of a UNet's call goes in OpenVINO, by kind of operation.

    python benchmarks/operations.py [--workload unet-36m ...] [--dtype bfloat16] [--rows 4] [--repeats 5]

A UNet of `benchmarks/best_of.py` is asked as `runtime="openvino"` asks it: rows of one text, its keys and values handed
in, on one thread. OpenVINO's own clock says how long each operation takes; what it has fused is one ("Subgraph"). The
result is kept in benchmarks/results/operations.json.
"""

import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from contest.tasks import WORKLOADS, task_of
from gen import TextToImage
from gen.openvino_runtime import PRECISIONS, compiled, convert, read_of
from gen.openvino_weights import WeightCache
from gen.runtime import DTYPES
from gen.traced import Call
from options import PROMPT, chosen, known
from report import RESULTS, markdown, save
from training.provenance import provenance

ATTENTION = "scaled_dot_product_attention"
LINEAR = "our linear layers"
OURS = {
    "TileAttention": "our attention",
    "TileLinear": LINEAR,
    "TileFeedForward": LINEAR,
    "GroupNormLast": "our group norm",
    "WinogradConvolution": "our convolutions",
}


def call_of(model: TextToImage, rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the UNet is handed in a step of so many candidates that are not guided."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = model.model.unet.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    model(PROMPT, num_images_per_prompt=rows, guidance_scale=1.0, num_inference_steps=1, seed=0, rerank=False)
    hook.remove()
    return max(calls, key=lambda call: len(call[0][0]))  # smaller ones measure memory


@torch.no_grad()
def measure(model: TextToImage, rows: int, dtype: str, repeats: int) -> dict[str, float]:
    """Milliseconds of each kind of operation, the median of so many calls."""
    call = Call.of(*call_of(model, rows))
    converted = convert(model.model.unet, call, PRECISIONS[DTYPES[dtype]], WeightCache())
    arrays = [tensor.contiguous().numpy() for tensor in call.given]
    levels = None if converted.levels is None else converted.levels(arrays)
    inputs = converted.inputs(arrays, levels, read_of(call.texts), True, slice(0, rows), [])
    fixed = converted.of_sizes([each.shape for each in inputs], threads=1)
    request = compiled(fixed, converted.precision, threads=1, counted=True).create_infer_request()
    milliseconds: list[Counter[str]] = []
    for _ in range(repeats + 1):
        request.infer(inputs)
        milliseconds.append(Counter())
        for each in request.profiling_info:
            milliseconds[-1][kind_of(each)] += 1e3 * each.real_time.total_seconds()
    kinds = {kind for each in milliseconds for kind in each}
    return {kind: median(each[kind] for each in milliseconds[1:]) for kind in kinds}  # the first plans


def kind_of(operation: Any) -> str:
    """What an operation of a profile does: ours, attention between cells, to the text, or by OpenVINO's own name."""
    if operation.node_type == "Reference":
        return next((name for kind, name in OURS.items() if operation.node_name.startswith(kind)), "Reference")
    if ATTENTION in operation.node_name and operation.node_type == "Subgraph":
        return "attention to the text" if ".attn2" in operation.node_name else "attention of a picture to itself"
    return str(operation.node_type)


def main(
    workload: Annotated[list[str] | None, typer.Option(help=f"From: {', '.join(WORKLOADS)}.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    rows: Annotated[int, typer.Option(min=1, help="In the call.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Counted calls.")] = 5,
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "operations.json",
) -> None:
    """Measure operations."""
    dtype = known(dtype, ["float32", "bfloat16"], "dtype")
    found: dict[str, Any] = {"dtype": dtype, "rows": rows, "workloads": {}}
    for name in chosen(workload or ["shapes64", "unet-36m"], WORKLOADS, "workload"):
        with tempfile.TemporaryDirectory() as folder:
            task, _ = task_of(WORKLOADS[name], Path(folder), "cpu")
            found_milliseconds = measure(TextToImage.from_pretrained(task.model), rows, dtype, repeats)
        found["workloads"][name] = found_milliseconds
        save({**found, **provenance("cpu")}, result)
        total = sum(found_milliseconds.values())
        print(f"\n{name}, {rows} rows, {dtype}, one thread: {total:.1f} ms\n")
        lines = [
            [kind, f"{milliseconds:.2f}", f"{milliseconds / total:.0%}"]
            for kind, milliseconds in sorted(found_milliseconds.items(), key=lambda item: -item[1])
            if milliseconds > 0.01 * total
        ]
        print(markdown(["operation", "ms", "share"], lines))


if __name__ == "__main__":
    typer.run(main)
