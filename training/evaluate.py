"""What a model reaches on the committed test prompts: is what it paints right, does its CLIP choose well?

`evaluate` does it all. `paint` paints every prompt's candidates and lets the checker read them; a `Ledger`
keeps each prompt's outcome on disk as soon as it is known, so an interrupted evaluation goes on where it
stopped; `summarise` turns outcomes into rates with their intervals, `retrieval` asks CLIP alone, `table`
writes them for people. Takes a model as its users call it and must not look inside it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_core.retrieval import ranks
from clip_core.weights import content_hash
from gen.sheet import contact_sheet
from training.data import checker
from training.data.checker import FACTS, faults, read
from training.data.suite import Prompt
from training.provenance import provenance

MODES = {"prior": True, "no_prior": False}  # through an image embedding (unCLIP), or from the text alone
MAX_SEED = 2**31  # added to a prompt's own, which is below 2^31, it stays below the 2^32 that a seed may be
COLUMNS = 16  # candidates of a prompt in a row
_RESAMPLES = 10_000
_Z = 1.959964  # 97.5 % point of the normal distribution


Look = Callable[[str, Prompt, list[Image.Image]], None]
"""look(mode, prompt, its pictures best first)"""


class Painted(Protocol):
    """What a call of a model gives back."""

    @property
    def images(self) -> Any:
        """Pillow pictures, flat: prompt by prompt, best first within a prompt."""

    @property
    def scores(self) -> Any:
        """Of each, CLIP's."""

    @property
    def seeds(self) -> Any:
        """Of each."""


class Painter(Protocol):
    """A model, called as in `gen.TextToImage`."""

    def __call__(
        self, prompt: list[str], *, num_images_per_prompt: int, rerank: bool, seed: list[int], prior: bool
    ) -> Painted:
        """Paint and rank."""


class TwoTowers(Protocol):
    """A CLIP, as `clip_core.CLIP`."""

    def text(self, texts: list[str]) -> Any:
        """Features whose `embedding` is (B, E)."""

    def image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, E)."""


@dataclass(frozen=True)
class Candidate:
    """One painted picture: its seed, CLIP's score, and the facts of its prompt that it gets wrong."""

    seed: int
    score: float
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One prompt in one mode; `candidates` best first, as CLIP ranks them."""

    prompt: str  # its id
    group: str
    mode: str
    seconds: float  # of painting, a share of the batch it was painted in
    candidates: tuple[Candidate, ...]

    @property
    def right(self) -> list[bool]:
        """Per candidate, best first."""
        return [not candidate.faults for candidate in self.candidates]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Outcome:
        """From what `dataclasses.asdict` made of one."""
        each = [Candidate(one["seed"], one["score"], tuple(one["faults"])) for one in fields["candidates"]]
        return cls(**{**fields, "candidates": tuple(each)})


class Ledger:
    """Outcomes on disk, one JSON line each, under a first line that says what is being evaluated."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open or begin; ValueError where the file belongs to another evaluation.

        A last line that an interruption left unfinished is dropped.
        """
        self.path = path
        self.outcomes: list[Outcome] = []
        try:
            whole = path.read_text(encoding="utf-8") if path.exists() else ""
            lines = whole[: whole.rfind("\n") + 1].splitlines()
            if not lines:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(header) + "\n", encoding="utf-8")
                return
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}); give another folder") from None
        try:
            found = json.loads(lines[0])
            self.outcomes = [Outcome.from_json(json.loads(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, or give another folder") from None
        other = [key for key in {**found, **header} if found.get(key) != header.get(key)]
        if other:
            key = other[0]
            told = f"{key} {found.get(key)!r}, not {header.get(key)!r}"
            raise ValueError(f"{path} holds an evaluation of {told}; remove it, or give another folder")
        if not whole.endswith("\n"):
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Keep outcomes; they are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
            file.flush()
            os.fsync(file.fileno())
        self.outcomes.extend(outcomes)

    def missing(self, prompts: Iterable[Prompt], mode: str) -> list[Prompt]:
        """The prompts that have no outcome in this mode yet."""
        done = {outcome.prompt for outcome in self.outcomes if outcome.mode == mode}
        return [prompt for prompt in prompts if prompt.id not in done]


def evaluate(
    model: Painter,
    clip: TwoTowers,
    prompts: Sequence[Prompt],
    folder: Path,  # candidates.jsonl and strips/ are kept there
    *,
    about: dict[str, Any],  # what was evaluated: JSON; a folder holds evaluations of one thing
    modes: Sequence[str] = tuple(MODES),
    num_candidates: int = 16,
    seed: int = 0,
    batch_size: int = 64,  # pictures painted together; no picture depends on it
    device: torch.device | str = "cpu",  # where clip is
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Paint, check and summarise; the result is one JSON object.

    Run again after an interruption, it paints what is missing. ValueError where `folder` holds an evaluation
    of something else.
    """
    if not 0 <= seed < MAX_SEED - num_candidates:
        raise ValueError(f"seed is {seed}; give one from 0 to {MAX_SEED - num_candidates - 1}")
    about = about | {
        "checker": digest(Path(checker.__file__)),
        "num_candidates": num_candidates,
        "seed": seed,
    }
    ledger = Ledger(folder / "candidates.jsonl", about)
    painted = [prompt for prompt in prompts if prompt.group != "retrieval"]
    total = len(painted) * len(modes)
    left = {mode: ledger.missing(painted, mode) for mode in modes}
    done = total - sum(map(len, left.values()))
    progress(done, total)
    for mode in modes:
        for outcomes in paint(
            model,
            left[mode],
            mode,
            num_candidates=num_candidates,
            seed=seed,
            batch_size=batch_size,
            look=Strips(folder / "strips"),
        ):
            ledger.append(outcomes)
            done += len(outcomes)
            progress(done, total)
    ids = {prompt.id for prompt in painted}
    chosen = [outcome for outcome in ledger.outcomes if outcome.mode in modes and outcome.prompt in ids]
    to_retrieve = [prompt for prompt in prompts if prompt.group == "retrieval"]
    return {
        **about,
        "painted": summarise(chosen),
        "retrieval": retrieval(clip, to_retrieve, device) if to_retrieve else None,
        "seconds": round(sum(outcome.seconds for outcome in chosen), 1),
        **provenance(device),
    }


@dataclass(frozen=True)
class Strips:
    """Keeps each prompt's candidates in rows under its words, best first: `strips/MODE/PROMPT.png`."""

    folder: Path

    def __call__(self, mode: str, prompt: Prompt, images: list[Image.Image]) -> None:
        """Write one."""
        path = self.folder / mode / f"{prompt.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images, title=prompt.text, columns=COLUMNS).save(path)


def digest(path: Path) -> str:
    """What tells one version of a file from another: the start of its SHA-256."""
    return content_hash(path)[:16]


def paint(
    model: Painter,
    prompts: Sequence[Prompt],
    mode: str,
    *,
    num_candidates: int,
    seed: int,
    batch_size: int,  # pictures painted together, at least one prompt's
    look: Look | None = None,
) -> Iterator[list[Outcome]]:
    """Paint and check the prompts at the model's default settings, a batch at a time.

    Candidate k has seed `seed` + its prompt's own + k, whatever else is painted beside it.
    """
    step = max(1, batch_size // num_candidates)
    for batch in (prompts[start : start + step] for start in range(0, len(prompts), step)):
        began = time.perf_counter()
        seeds = [seed + prompt.seed for prompt in batch]
        texts = [prompt.text for prompt in batch]
        painted = model(texts, num_images_per_prompt=num_candidates, rerank=True, seed=seeds, prior=MODES[mode])
        seconds = (time.perf_counter() - began) / len(batch)
        outcomes = []
        for number, prompt in enumerate(batch):
            mine = slice(number * num_candidates, (number + 1) * num_candidates)
            images = list(painted.images[mine])
            read_each = [faults(read(np.asarray(image.convert("RGB"))), prompt.claim) for image in images]
            each = zip(painted.seeds[mine], painted.scores[mine], read_each, strict=True)
            candidates = tuple(Candidate(int(seed), float(score), wrong) for seed, score, wrong in each)
            outcomes.append(Outcome(prompt.id, prompt.group, mode, round(seconds, 3), candidates))
            if look is not None:
                look(mode, prompt, images)
        yield outcomes


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


def _fault_shares(candidates: Sequence[Candidate]) -> dict[str, float]:
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


_MEASURES = {
    "one": "one object right",
    "relation": "two objects with relation right",
    "held_out": "held-out colour-shape pairs, one object",
    "count": "counts of two to four right",
}


def table(result: dict[str, Any]) -> str:
    """The result in markdown: what is measured, with 95 % intervals."""
    number = result["num_candidates"]
    lines = [
        f"| measure | mode | all candidates (= chance) | best of {number} by our CLIP | any of {number} |",
        "|---|---|---|---|---|",
    ]
    for group, words in _MEASURES.items():
        for mode, groups in result["painted"].items():
            if group in groups:
                cells = [_cell(groups[group][name]) for name in ("all", "best", "any")]
                lines.append(f"| {words} | `--{mode.replace('_', '-')}` | {' | '.join(cells)} |")
    if found := result.get("retrieval"):
        words = f"CLIP text→image retrieval, top 1 of {found['captions']}"
        lines.append(f"| {words} | CLIP alone | | {_cell(found['text_to_image'])} | |")
    return "\n".join(lines)


def in_words(result: dict[str, Any]) -> dict[str, str]:
    """The result as lines for a model's card: measure and mode -> all candidates, best and any of N."""
    number = result["num_candidates"]
    lines = {"measured": f"{result['date'][:10]} on {result['on']}, weights as bundled, default settings"}
    for group, words in _MEASURES.items():
        for mode, groups in result["painted"].items():
            if group in groups:
                all_, best, any_ = (_cell(groups[group][name]) for name in ("all", "best", "any"))
                line = f"all candidates {all_}, best of {number} {best}, any of {number} {any_}"
                lines[f"{words}, --{mode.replace('_', '-')}"] = line
    if found := result.get("retrieval"):
        lines[f"CLIP text to image retrieval, top 1 of {found['captions']}"] = _cell(found["text_to_image"])
    return lines


def fault_table(result: dict[str, Any]) -> str:
    """Which facts are wrong, in markdown: share of all candidates / of the chosen ones."""
    lines = [f"| wrong fact, all / best | {' | '.join(FACTS)} |", "|---" * (len(FACTS) + 1) + "|"]
    for mode, groups in result["painted"].items():
        for group, rates in groups.items():
            shares = [rates["faults"][kind] for kind in ("all", "best")]
            cells = [" / ".join(f"{100 * share[fact]:.0f}" for share in shares) for fact in FACTS]
            lines.append(f"| {group}, `--{mode.replace('_', '-')}`, % | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(measure: dict[str, Any]) -> str:
    low, high = measure["interval"]
    return f"{100 * measure['rate']:.1f} % ({100 * low:.0f}–{100 * high:.0f})"
