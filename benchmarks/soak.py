"""Thousands of requests through one engine, which must leave nothing behind.

    python benchmarks/soak.py [MODEL] [--requests 10000] [--in-flight 32]

Short requests of several kinds, among them some that are cancelled and some that fail, through a tiny model of random
weights where none is named. Ten times on the way the engine is let run empty, and what is in memory is counted: objects
of requests, tensors and the resident set. It fails where there are more objects than after the first tenth, or the
resident set has grown by more than a tenth since then, or a request has not ended as it should. The result is kept in
benchmarks/results/soak.json.
"""

import gc
import os
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from contest.models import TINY, write_random
from gen import Engine, Request, Result, Step, TextToImage
from gen.conditioning import Condition, Conditions
from gen.flight import Flight
from gen.request import Job
from gen.row import Live, Row
from gen.settings import Abilities
from report import RESULTS, markdown, save
from training.provenance import provenance

COUNTED = (Condition, Conditions, Flight, Future, Job, Live, Result, Row, torch.Tensor)
SLACK = 50  # objects of the requests that the engine is just taking out; a leak would leave thousands
GROWTH = 1.1  # of the resident set


def request(index: int, abilities: Abilities) -> Request:
    """A short one; what each says is its own, so that nothing is shared."""
    several = {"num_images_per_prompt": 3, "keep": 1, "rerank": True, "search": "halving", "num_inference_steps": 4}
    kinds: list[dict[str, Any]] = [
        {},
        {"prior": False},
        {"guidance_scale": 1.0},
        {"sampler": "heun"},
        {"sampler": "dpmpp_2m_sde", "num_inference_steps": 3},
        {"width": abilities.defaults.width + abilities.size_multiple},
        several if abilities.can_rank else {},
    ]
    asked = Request(
        prompt=f"a small red circle, number {index}",
        seed=index,
        num_inference_steps=2,
        prior=abilities.prior_max_steps > 0,
        rerank=False,
        output_type="pt" if index % 5 == 0 else "latent",
    )
    asked = replace(asked, **kinds[index % len(kinds)])
    if abilities.needs_image:
        assert abilities.embedding_width is not None, "it takes image embeddings"
        drawn = torch.randn(1, abilities.embedding_width, generator=torch.Generator().manual_seed(index))
        asked = replace(asked, image_embeds=drawn, prior=None)
    return replace(asked, prior_num_inference_steps=2) if asked.prior else asked


def fails(index: int) -> bool:
    """Whether this request's callback does."""
    return index % 11 == 0


def fail(step: Step) -> None:
    """As a user's callback may."""
    raise ValueError("a callback's own error")


def paint(engine: Engine[Result], first: int, number: int, in_flight: int) -> Counter[str]:
    """How so many requests ended, with at most `in_flight` of them at once."""
    room, ends = threading.Semaphore(in_flight), Counter[str]()

    def ended(future: Future[Result]) -> None:
        ends["cancelled" if future.cancelled() else "failed" if future.exception() else "painted"] += 1
        room.release()

    for index in range(first, first + number):
        room.acquire()
        asked = request(index, engine.model.abilities)
        future = engine.submit(asked, callback=fail if fails(index) else None)
        future.add_done_callback(ended)
        if index % 7 == 0:
            future.cancel()
    for _ in range(in_flight):
        room.acquire()
    return ends


def counted() -> dict[str, int]:
    """What is in memory."""
    gc.collect()
    objects = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in COUNTED)
    return dict(sorted(objects.items()))


def resident() -> int:
    """Bytes of the resident set."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(
    model: Annotated[str | None, typer.Argument(help="A bundled name, a folder or a hub id.")] = None,
    requests: Annotated[int, typer.Option(min=20)] = 10_000,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    device: Annotated[str | None, typer.Option(help="cuda where there is one.")] = None,
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "soak.json",
) -> None:
    """Paint them all and count."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            write_random(TINY, "a small red circle, number 0123456789", Path(folder))
        painter = TextToImage.from_pretrained(model or folder, device)
    ends, rounds = Counter[str](), []
    began = time.perf_counter()
    with painter.engine() as engine:
        for tenth in range(10):
            ends += paint(engine, tenth * (requests // 10), requests // 10, in_flight)
            rounds.append({"objects": counted(), "resident_bytes": resident()})
    seconds = time.perf_counter() - began
    first, last = rounds[0], rounds[-1]
    before = first["objects"]
    leaked = {name: number for name, number in last["objects"].items() if number > before.get(name, 0) + SLACK}
    lost = requests // 10 * 10 - sum(ends.values())
    unfailed = sum(fails(index) and index % 7 != 0 for index in range(requests // 10 * 10)) - ends["failed"]
    found = {"model": model, "requests": requests, "in_flight": in_flight, "ends": dict(ends), "rounds": rounds}
    save({**found, "seconds": seconds, **provenance(painter.model.device)}, result)
    rows = []
    for tenth, each in enumerate(rounds, 1):
        tensors, megabytes = each["objects"].get("Tensor", 0), each["resident_bytes"] / 1e6
        rows.append([str(tenth * (requests // 10)), str(tensors), f"{megabytes:.0f}"])
    print(markdown(["after", "tensors", "resident, MB"], rows))
    print(f"\n{dict(ends)} in {seconds:.0f} s")
    faults = {
        f"left behind: {leaked}": bool(leaked),
        "the resident set has grown": last["resident_bytes"] > GROWTH * first["resident_bytes"],
        f"{lost} lost": lost != 0,
        f"{unfailed} answered that were to fail": unfailed > 0,
    }
    if any(faults.values()):
        print(*(fault for fault, is_so in faults.items() if is_so), sep="\n")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
