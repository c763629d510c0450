"""The answer to a request: its pictures, best first, as they were asked for, and what became of each candidate.

It knows what was asked and what was painted, and neither networks nor who painted it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen.adapters.file import Adapter
from gen.candidate import Candidate
from gen.flight import Account, Painted, scores_of
from gen.request import Job
from gen.runtime import name_of
from gen.search import best_first, diverse_first, drawing_order
from gen.settings import JSON

Images = list[Image.Image] | Tensor | np.ndarray

Note = Callable[[Candidate, float | None], dict[str, JSON]]
"""note(candidate, its score, if it was ranked) -> its picture's record"""


@dataclass(frozen=True)
class Ranked:
    """A candidate, kept or not."""

    prompt_index: int
    seed: int
    score: float | None  # cosine of CLIP's picture and text embeddings; None: not ranked
    kept: bool
    painted: bool = True  # False: given up before its end


@dataclass(frozen=True, eq=False)
class Result:
    """The kept pictures, flat: prompt by prompt, best first within a prompt."""

    images: Images = field(repr=False)  # as output_type says; "pt" is (K, 3, H, W), "np" (K, H, W, 3), in [0, 1]
    scores: list[float] | None  # None: not ranked
    seeds: list[int]
    prompts: list[str]
    records: list[dict[str, JSON]] = field(repr=False)  # of each picture all that paints it again, JSON
    candidates: list[Ranked] = field(repr=False)  # all there were, in drawing order
    account: Account  # what they took

    def ranking(self) -> list[dict[str, JSON]]:
        """The candidates that were painted, best first, as JSON."""
        painted = sorted((each for each in self.candidates if each.painted), key=lambda each: -(each.score or 0.0))
        return [{"seed": each.seed, "score": each.score, "kept": each.kept} for each in painted]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a call of a model; what was painted by then can be had."""

    def __init__(self, answers: Sequence[Callable[[], Result] | None]) -> None:
        super().__init__()
        self._answers = answers

    def results(self) -> list[Result | None]:
        """Of each request the answer that its painted candidates make, ranked among themselves; None: there are none.

        They are made now: until somebody asks, nothing of it is waited for.
        """
        return [None if answer is None else answer() for answer in self._answers]


def answer(
    job: Job,
    painted: Mapping[int, Painted],  # its candidates that are, by their place in drawing order
    account: Account,
    note: Note,
    adapters: Sequence[Adapter],  # of the model, and what it computes in: what a picture may have failed by
    dtype: torch.dtype,
) -> Result:
    """The pictures of one request: the best of those painted, as it wants them.

    ValueError where one of them, or its score, is not made of finite numbers.
    """
    candidates, n = job.candidates, job.num_images_per_prompt
    scores = scores_of(painted) if job.rank else None
    for index, score in (scores or {}).items():  # whether these are numbers says whether the pictures are
        if not math.isfinite(score):
            raise not_finite(candidates[index], adapters, dtype)
    kept = best(job, painted, scores)
    found = {index: painted[index].latents if job.output_type == "latent" else painted[index].pixels for index in kept}
    pictures = {index: each for index, each in found.items() if each is not None}
    are_finite = torch.stack([each.isfinite().all() for each in pictures.values()]).tolist()  # waited for once
    for index, is_finite in zip(pictures, are_finite, strict=True):
        if not is_finite:
            raise not_finite(candidates[index], adapters, dtype)
    among = set(kept)
    return Result(
        images=as_output([*pictures.values()], job.output_type),
        scores=None if scores is None else [scores[i] for i in kept],
        seeds=[candidates[i].seed for i in kept],
        prompts=[candidates[i].prompt for i in kept],
        records=[note(candidates[i], None if scores is None else scores[i]) for i in kept],
        candidates=[
            Ranked(i // n, candidate.seed, (scores or {}).get(i), i in among, i in painted)
            for i, candidate in enumerate(candidates)
        ],
        account=account,
    )


def best(job: Job, painted: Mapping[int, Painted], scores: Mapping[int, float] | None) -> list[int]:
    """Which of a request's painted candidates are kept, prompt by prompt, best first or, unranked, as drawn."""
    number, n = len(job.candidates), job.num_images_per_prompt
    if scores is None:
        order = drawing_order(number, n)
    else:
        found = [scores.get(index, math.nan) for index in range(number)]
        order = best_first(found, n, n if job.diverse else job.keep)
    if job.diverse:
        order = [diverse(painted, group, job.keep) for group in order]
    return [index for group in order for index in group if index in painted]


def diverse(painted: Mapping[int, Painted], ranked: Sequence[int], keep: int) -> list[int]:
    """The best `keep` of candidates, given best first, no two of them near-copies as far as there are others."""
    seen = {index: each.embedding for index, each in painted.items() if each.embedding is not None}
    found = [index for index in ranked if index in seen]
    if not found:
        return []
    return [found[place] for place in diverse_first(torch.stack([seen[index] for index in found]), keep)]


def not_finite(candidate: Candidate, adapters: Sequence[Adapter], dtype: torch.dtype) -> ValueError:
    """What is said of a picture in which numbers are NaN or infinite: what may have made them so."""
    settings = candidate.settings
    names = ["guidance_scale", "clip_guidance_scale", "s_churn", "s_noise"]
    names += ["prior_guidance_scale"] * settings.prior
    factors = {f"{name}={value:g}": value for name in names if (value := getattr(settings, name)) is not None}
    factors |= {f"the scale of {each}": abs(each.scale) for each in adapters if each.scale is not None}
    largest = max(factors, key=lambda factor: factors[factor])
    ways = [f"lower {largest}"] if factors[largest] > 1 else []
    ways += [f"compute in float32, not {name_of(dtype)}"] if dtype != torch.float32 else []
    problem = f"the picture of seed {candidate.seed} came out as numbers that are not finite"
    return ValueError(f"{problem}; {', or '.join(ways) or 'the weights of its model may be damaged'}")


def as_output(pictures: Sequence[Tensor], output_type: str) -> Images:
    """Pictures (3, H, W) in [0, 1], or latents, as the user asked for them; all are of one size."""
    stacked = torch.stack(list(pictures))
    if output_type == "pil":
        return as_pillow(stacked)
    stacked = stacked.cpu()
    return stacked.permute(0, 2, 3, 1).numpy() if output_type == "np" else stacked


def as_pillow(pictures: Tensor) -> list[Image.Image]:
    """Pictures (N, 3, H, W) in [0, 1] as Pillow's."""
    levels = (pictures * 255).round().to(torch.uint8)  # on the device: a quarter of the bytes to fetch
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]
