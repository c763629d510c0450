"""What is asked of searches: those that choose among candidates, those that make new ones; and of the networks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from gen import Request, TextToImage
from gen.search import FeynmanKac, Halving, Racing, ZeroOrder

STEPS = 10
ASKED = Request(
    prompt=["a small red circle", "a star above a blue square"],
    num_images_per_prompt=8,
    keep=2,
    seed=[5, 50],
    num_inference_steps=STEPS,
    output_type="pt",
)
NOISY = replace(ASKED, sampler="ddpm")
CHOOSING: dict[str, Request] = {
    "halving": replace(ASKED, search="halving"),
    "late halving": replace(ASKED, search=Halving(rungs=(0.8, 0.9), goes_on=0.4), prior=False),
    "draft": replace(ASKED, search="draft"),
    "racing": replace(ASKED, search=Racing(wave=1, risk=0.9), keep=1),
}
LARGE = replace(ASKED, prompt="a star", height=136, width=136, num_images_per_prompt=5, prior=False, seed=5)
CHOOSING |= {
    "large halving": replace(LARGE, search="halving"),
    "large racing": replace(LARGE, search=Racing(wave=1, risk=0.9), keep=1),
}
MAKING: dict[str, Request] = {
    "feynman_kac": replace(NOISY, search=FeynmanKac(strength=20.0)),
    "zero_order": replace(ASKED, search=ZeroOrder(rounds=3)),
    "zero_order, noisy": replace(NOISY, search="zero_order", prior=False),
}


@dataclass
class Counted:
    """What the networks were really asked."""

    model: TextToImage
    seen: Counter[str]
