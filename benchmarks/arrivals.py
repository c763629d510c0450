"""Requests that arrive at random: rows in flight against static batching, on the same model and the same requests.

    python benchmarks/arrivals.py [MODEL] [--requests 40] [--load 0.7] [--repeats 5] ...

Requests of mixed lengths, guidance, samplers and numbers of candidates arrive one by one (a Poisson process at `load`
of what the model paints when it is given all at once). Either an engine takes each as it comes, or the requests that
wait are painted together and the next ones when all of these are done. Static batching has our own sharing of calls
here, whatever the requests' settings, so what is compared is only who may join and leave. Both take turns within each
repeat, with the same arrivals. The result is kept in benchmarks/results/arrivals.json.
"""

import queue
import random
import threading
import time
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


def static(model: TextToImage, arrivals: Sequence[Arrival], largest: int) -> list[float]:
    """Those that wait are painted together, `largest` requests at most, and the next when all of these are done."""
    waiting: queue.SimpleQueue[tuple[Request, Callable[[], None]] | None] = queue.SimpleQueue()

    def work() -> None:
        while (first := waiting.get()) is not None:
            batch = [first]
            while len(batch) < largest and not waiting.empty():
                following = waiting.get()
                assert following is not None, "the end comes when all is done"
                batch.append(following)
            model.paint([request for request, _ in batch])
            for _, finish in batch:
                finish()

    worker = threading.Thread(target=work)
    worker.start()
    latencies = timed(arrivals, lambda request, finish: waiting.put((request, finish)))
    waiting.put(None)
    worker.join()
    return latencies


def summary(latencies: Sequence[float], arrivals: Sequence[Arrival]) -> dict[str, float]:
    """Of one run: pictures a second from the first arrival to the last answer, and the seconds to an answer."""
    last = max(arrival.seconds + latency for arrival, latency in zip(arrivals, latencies, strict=True))
    pictures = sum(arrival.request.num_images_per_prompt for arrival in arrivals)
    return {
        "pictures_per_second": pictures / (last - arrivals[0].seconds),
        "mean_seconds": sum(latencies) / len(latencies),
        "p95_seconds": quantiles(latencies, n=20, method="inclusive")[-1],
    }


def main(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder or a hub id.")] = "shapes64",
    requests: Annotated[int, typer.Option(min=2, help="That arrive in a run.")] = 40,
    load: Annotated[float, typer.Option(min=0.01, help="Share of what is painted when all is given at once.")] = 0.7,
    largest: Annotated[int, typer.Option(min=1, help="Requests in a static batch, at most.")] = 16,
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
    ways = {"in flight": in_flight, "static": lambda model, arrivals: static(model, arrivals, largest)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(repeats):
        draw, at = random.Random(repeat), 0.0
        arrivals = []
        for request in asked:
            at += draw.expovariate(rate)
            arrivals.append(Arrival(at, request))
        for name, way in ways.items():
            runs[name].append(summary(way(painter, arrivals), arrivals))
    settings: dict[str, Any] = {"model": model, "requests": requests, "load": load, "largest": largest}
    found = {**settings, "arrivals_per_second": rate, "runs": runs, **provenance(painter.model.device)}
    save(found, result)
    print(f"{requests} requests, {rate:.2g} a second (load {load}), median of {repeats} (range)\n")
    columns = ["", "pictures a second", "mean seconds", "95 % are answered within, s"]
    measures = ("pictures_per_second", "mean_seconds", "p95_seconds")
    rows = ([name, *(spread([run[each] for run in taken]) for each in measures)] for name, taken in runs.items())
    print(markdown(columns, rows))


if __name__ == "__main__":
    typer.run(main)
