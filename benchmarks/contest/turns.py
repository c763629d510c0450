"""What a contestant does in its own process: it gets ready, takes counted turns, and is looked into."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contest.backends import compile_mode, compile_networks, to_openvino
from contest.contestants import Contestant, Ours, Peer
from contest.tasks import Task
from contest.ways import WAYS, Entrant
from gauges import Moment, moment, now, peak_mb, reset_peak, seconds_between
from gen.runtime import DTYPES


def ready(entrant: Entrant, task: Task) -> tuple[Contestant, dict[str, Any]]:
    """A contestant that has painted once, and what it took to get there."""
    way = WAYS[entrant.way]
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean that
    loaded = torch.float32 if way.backend == "openvino" else DTYPES[entrant.dtype]  # OpenVINO lowers it by itself
    contestant: Contestant
    if way.is_ours:
        contestant = Ours.load(task, loaded, way.is_tuned, way.runtime)
    else:
        contestant = Peer.load(task, loaded, way.is_tuned)
    prepared = contestant.prepare(way)
    began = now(task.device)
    if way.backend == "inductor":
        parts = contestant.parts()
        compile_networks([*parts["UNet"], *parts["VAE"]], compile_mode(way, task.device))
    elif way.backend == "openvino":
        assert isinstance(contestant, Peer), "ours has no such way"
        to_openvino(contestant, entrant.dtype)
    contestant.warm_up()
    return contestant, prepared | {"ready_seconds": now(task.device) - began}


def turn(contestant: Contestant) -> dict[str, Any]:
    """One counted turn: seconds, the peak of memory meanwhile, and what was kept."""
    device = contestant.task.device
    is_counted = reset_peak(device)
    began = now(device)
    kept = contestant.paint()
    seconds = now(device) - began
    return {"seconds": seconds, "peak_memory_mb": peak_mb(device) if is_counted else None, "kept": kept}


def profile(contestant: Contestant, turns: int) -> dict[str, float]:
    """The share of wall time inside each kind of network, and outside them all (`host`)."""
    device = contestant.task.device
    with clocked(contestant.parts(), device) as spent:
        began = now(device)
        for _ in range(turns):
            contestant.paint()
        whole = now(device) - began
    shares = {name: seconds / whole for name, seconds in spent.items()}
    return shares | {"host": 1 - sum(shares.values())}


def operations(contestant: Contestant) -> int:
    """Floating-point operations of a turn as its networks are written, a product and its sum being two."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:  # of others not all are counted
        contestant.paint()
    return counted.get_total_flops()


@contextmanager
def clocked(parts: Mapping[str, Sequence[nn.Module]], device: str) -> Iterator[dict[str, float]]:
    """Seconds spent in the calls of these networks, told when it ends; a call within a call is the outer one's.

    On CUDA no call is waited for.
    """
    spent = dict.fromkeys(parts, 0.0)
    began: list[Moment] = []
    calls: list[tuple[str, Moment, Moment]] = []

    def enter(*_: object) -> None:
        began.append(moment(device))

    def leave(name: str) -> Callable[..., None]:
        def left(*_: object) -> None:
            start = began.pop()
            if not began:
                calls.append((name, start, moment(device)))

        return left

    with ExitStack() as hooks:
        for name, networks in parts.items():
            for network in networks:
                hooks.callback(network.register_forward_pre_hook(enter).remove)
                hooks.callback(network.register_forward_hook(leave(name)).remove)
        yield spent
    now(device)
    for name, start, end in calls:
        spent[name] += seconds_between(start, end)
