"""Outcomes as rates with their intervals, and CLIP's retrieval, which is measured without painting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clip_core.retrieval import ranks
from training.data.checker import FACTS
from training.data.suite import Prompt
from training.evaluation.ledger import Judged, Outcome

_RESAMPLES = 10_000
_Z = 1.959964  # 97.5 % point of the normal distribution


class TwoTowers(Protocol):
    """A CLIP, as `clip_core.clip.CLIP`."""

    def text(self, texts: list[str]) -> Any:
        """Features whose `embedding` is (B, E)."""

    def image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, E)."""


def summarise(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Rates by mode and group: {mode: {group: ...}}.

    `all`: share of candidates that are right, which is also what one picked at random reaches (`chance`);
    `best`: prompts whose highest-scored candidate is right; `any`: prompts with a right candidate at all, the
    most that any choice could reach. Intervals are 95 %. `best_of` k looks at the first k seeds alone, as if
    no more had been painted. `faults` are the shares of candidates (`all`) and of chosen ones (`best`) that
    have a fact wrong; one picture may have several.
    """
    summary: dict[str, dict[str, Any]] = {}
    for mode in dict.fromkeys(outcome.mode for outcome in outcomes):
        groups = dict.fromkeys(outcome.group for outcome in outcomes if outcome.mode == mode)
        summary[mode] = {
            group: _rates([each for each in outcomes if (each.mode, each.group) == (mode, group)]) for group in groups
        }
    return summary


def _rates(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    right = [outcome.right for outcome in outcomes]
    shares = np.array([np.mean(each) for each in right])
    number = len(outcomes)
    everything = [candidate for outcome in outcomes for candidate in outcome.candidates]
    chosen = [outcome.candidates[0] for outcome in outcomes]
    return {
        "prompts": number,
        "candidates": len(everything),
        "all": {"rate": float(shares.mean()), "interval": bootstrap(shares)},
        "best": {
            "rate": sum(each[0] for each in right) / number,
            "interval": wilson(sum(each[0] for each in right), number),
        },
        "any": {"rate": sum(map(any, right)) / number, "interval": wilson(sum(map(any, right)), number)},
        "chance": float(shares.mean()),
        "best_of": _best_of(outcomes),
        "faults": {"all": _fault_shares(everything), "best": _fault_shares(chosen)},
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
    }


def _best_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of prompts whose best-scored of the first k seeds is right, k = 1, 2, 4, ... and all."""
    most = min(len(outcome.candidates) for outcome in outcomes)
    rates = {}
    for k in sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most}):
        first = [sorted(outcome.candidates, key=lambda one: one.seed)[:k] for outcome in outcomes]
        rates[str(k)] = sum(not max(each, key=lambda one: one.score).faults for each in first) / len(first)
    return rates


def _fault_shares(candidates: Sequence[Judged]) -> dict[str, float]:
    counts = Counter(fact for candidate in candidates for fact in candidate.faults)
    return {fact: counts[fact] / len(candidates) for fact in FACTS}


def wilson(successes: int, trials: int) -> list[float]:
    """95 % score interval of a rate (Wilson 1927, JASA 22); [0, 1] without trials."""
    if not trials:
        return [0.0, 1.0]
    rate, spread = successes / trials, _Z**2 / trials
    middle = (rate + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def bootstrap(shares: np.ndarray) -> list[float]:
    """95 % percentile interval of the mean of per-prompt shares, prompts drawn anew (Efron 1979).

    The candidates of a prompt succeed or fail together, so they are not drawn one by one.
    """
    draws = np.random.default_rng(0).integers(0, len(shares), (_RESAMPLES, len(shares)))
    low, high = np.percentile(shares[draws].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


@torch.no_grad()
def retrieval(clip: TwoTowers, prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> dict[str, Any]:
    """CLIP's choice among the prompts' true pictures: share of captions that find theirs first, and back."""
    pictures = np.stack([prompt.picture() for prompt in prompts])  # (B, H, W, 3)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device).float() / 255
    image, text = clip.image(pixels), clip.text([prompt.text for prompt in prompts]).embedding  # (B, E)
    found, back = (ranks(text, image) == 0).tolist(), (ranks(image, text) == 0).tolist()
    kinds = dict.fromkeys(prompt.claim.kind for prompt in prompts)
    by_kind = {
        kind: float(np.mean([hit for hit, prompt in zip(found, prompts, strict=True) if prompt.claim.kind == kind]))
        for kind in kinds
    }
    return {
        "captions": len(prompts),
        "text_to_image": {"rate": sum(found) / len(found), "interval": wilson(sum(found), len(found))},
        "image_to_text": {"rate": sum(back) / len(back), "interval": wilson(sum(back), len(back))},
        "by_kind": by_kind,
    }
