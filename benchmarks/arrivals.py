"""Requests that arrive at random: rows in flight against static batching, on the same model and the same requests.

    python benchmarks/arrivals.py [MODEL] [--requests 40] [--load 1.1] [--faster 1.35] [--repeats 5] ...

Requests of mixed lengths, guidance, samplers and numbers of candidates arrive one by one (a Poisson process at `load`
of what the model paints when it is given all at once). Either an engine takes each as it comes, or a static batcher
paints, with our own networks and rows, the oldest request that waits together with all that wait of its kind, and then
the next. Of a kind are those that one call of a pipeline can paint: with the same sampler, number of steps and
guidance_scale, of which a call takes one each; their prompts and seeds may differ.

Both take turns within each repeat with the same arrivals, and the engine a third one with these `faster`. It is better
where it paints that much more and still answers sooner. The result is kept in benchmarks/results/arrivals.json.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import typer

from gen import Request, TextToImage
from report import RESULTS, markdown, save, spread
from training.provenance import provenance

WORDS = ["a small red circle", "a large blue square", "two green stars", "a yellow circle above a black square"]


@dataclass(frozen=True)
class Arrival:
    """A request, and when it comes."""

    seconds: float  # after the first could have come
    request: Request


def mixed(number: int, draw: random.Random) -> list[Request]:
    """Requests of many kinds."""
    return [
        Request(
            prompt=draw.choice(WORDS),
            seed=draw.randrange(2**31),
            num_images_per_prompt=draw.choice([1, 1, 2, 4]),
            num_inference_steps=draw.choice([4, 8, 12, 20]),
            guidance_scale=draw.choice([1.0, 3.0, 5.0]),
            sampler=draw.choice(["ddim", "dpmpp_2m", "heun"]),
            rerank=False,
            output_type="pt",
        )
        for _ in range(number)
    ]


def timed(arrivals: Sequence[Arrival], deliver: Callable[[Request, Callable[[], None]], None]) -> list[float]:
    """Hand each request over when it comes; the seconds that each took, from then until it was done."""
    began, done, latencies = time.perf_counter(), threading.Semaphore(0), [0.0] * len(arrivals)
    for index, arrival in enumerate(arrivals):
        time.sleep(max(0.0, began + arrival.seconds - time.perf_counter()))

        def finish(index: int = index, arrival: Arrival = arrival) -> None:
            latencies[index] = time.perf_counter() - began - arrival.seconds
            done.release()

        deliver(arrival.request, finish)
    for _ in arrivals:
        done.acquire()
    return latencies


def in_flight(model: TextToImage, arrivals: Sequence[Arrival]) -> list[float]:
    """Every request joins as it comes."""
    with model.engine() as engine:

        def deliver(request: Request, finish: Callable[[], None]) -> None:
            future = engine.submit(request)
            future.add_done_callback(lambda future: finish())

        return timed(arrivals, deliver)


def kind(request: Request) -> tuple[object, ...]:
    """What requests have in common that a static batch can hold."""
    return request.sampler, request.num_inference_steps, request.guidance_scale


def batch_of(waiting: Sequence[Request], largest: int) -> list[int]:
    """Which of those that wait, oldest first, are painted with the oldest: `largest` pictures at most, one at least."""
    chosen, pictures = [0], waiting[0].num_images_per_prompt or 1
    for place, request in enumerate(waiting[1:], 1):
        number = request.num_images_per_prompt or 1
        if kind(request) == kind(waiting[0]) and pictures + number <= largest:
            chosen.append(place)
            pictures += number
    return chosen


def static(model: TextToImage, arrivals: Sequence[Arrival], largest: int) -> list[float]:
    """The oldest that waits is painted with those of its kind, and the next when all of these are done."""
    waiting: deque[tuple[Request, Callable[[], None]]] = deque()
    changed, is_over = threading.Condition(), threading.Event()

    def work() -> None:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or is_over.is_set())
                if not waiting:
                    return
                batch = [waiting[place] for place in batch_of([request for request, _ in waiting], largest)]
                for each in batch:
                    waiting.remove(each)
            model.paint([request for request, _ in batch])
            for _, finish in batch:
                finish()

    def deliver(request: Request, finish: Callable[[], None]) -> None:
        with changed:
            waiting.append((request, finish))
            changed.notify()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        return timed(arrivals, deliver)
    finally:
        with changed:
            is_over.set()
            changed.notify()
        worker.join()


def summary(latencies: Sequence[float], arrivals: Sequence[Arrival]) -> dict[str, float]:
    """Of one run: pictures a second from the first arrival to the last answer, and the seconds to an answer."""
    last = max(arrival.seconds + latency for arrival, latency in zip(arrivals, latencies, strict=True))
    pictures = sum(arrival.request.num_images_per_prompt for arrival in arrivals)
    return {
        "pictures_per_second": pictures / (last - arrivals[0].seconds),
        "mean_seconds": sum(latencies) / len(latencies),
        "p95_seconds": quantiles(latencies, n=20, method="inclusive")[-1],
    }


def arriving(requests: Sequence[Request], rate: float, seed: int) -> list[Arrival]:
    """At random, so many a second; at another rate the same ones at the same shares of the whole time."""
    draw, at, arrivals = random.Random(seed), 0.0, []
    for request in requests:
        at += draw.expovariate(1.0) / rate
        arrivals.append(Arrival(at, request))
    return arrivals


def main(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder or a hub id.")] = "shapes64",
    requests: Annotated[int, typer.Option(min=2, help="That arrive in a run.")] = 40,
    load: Annotated[float, typer.Option(min=0.01, help="Share of what is painted when all is given at once.")] = 1.1,
    faster: Annotated[float, typer.Option(min=1.0, help="How much faster they come to the engine alone.")] = 1.35,
    largest: Annotated[int, typer.Option(min=1, help="Pictures in a static batch, at most.")] = 16,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    device: Annotated[str | None, typer.Option(help="cuda where there is one.")] = None,
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "arrivals.json",
) -> None:
    """Measure both."""
    painter = TextToImage.from_pretrained(model, device)
    asked = mixed(requests, random.Random(0))
    painter.paint(asked[:2])  # warms up
    began = time.perf_counter()
    painter.paint(asked)
    rate = load * requests / (time.perf_counter() - began)
    sooner = f"in flight, {faster:g} times the rate"
    runs: dict[str, list[dict[str, float]]] = {"static": [], "in flight": [], sooner: []}
    for repeat in range(repeats):
        arrivals, hurried = arriving(asked, rate, repeat), arriving(asked, faster * rate, repeat)
        runs["static"].append(summary(static(painter, arrivals, largest), arrivals))
        runs["in flight"].append(summary(in_flight(painter, arrivals), arrivals))
        runs[sooner].append(summary(in_flight(painter, hurried), hurried))
    settings: dict[str, Any] = {"model": model, "requests": requests, "load": load, "faster": faster}
    found = {**settings, "largest": largest, "arrivals_per_second": rate, "runs": runs}
    save({**found, **provenance(painter.model.device)}, result)
    print(f"{requests} requests, {rate:.2g} a second (load {load}), median of {repeats} (range)\n")
    measures = {"pictures_per_second": "pictures a second", "mean_seconds": "mean seconds"}
    measures |= {"p95_seconds": "95 % are answered within, s"}
    rows = ([name, *(spread([run[each] for run in taken]) for each in measures)] for name, taken in runs.items())
    print(markdown(["", *measures.values()], rows))
    print()
    for name in ("in flight", sooner):
        pairs = list(zip(runs[name], runs["static"], strict=True))
        more, later = (
            spread([ours[each] / theirs[each] for ours, theirs in pairs])
            for each in ("pictures_per_second", "p95_seconds")
        )
        print(f"{name}: {more} times static's pictures a second, 95 % within {later} times its seconds")


if __name__ == "__main__":
    typer.run(main)
