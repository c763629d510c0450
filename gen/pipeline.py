"""TextToImage: words in, ranked pictures out; the face that people call from Python.

A call becomes a `Request`, checked before any network runs; its candidates become rows of one engine, painted
together, decoded in chunks and scored by CLIP on the device; a search says which are kept. Every picture has
a record that paints it again. Here the parts are put in order; each step itself is another module's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from clip_core.score import cosine
from gen import checkpoint
from gen.conditioning import Table
from gen.engine import Engine, Row
from gen.families import stable_unclip
from gen.families.stable_unclip import StableUnCLIP
from gen.request import JSON, Candidate, Job, Request
from gen.search import best_of, drawing_order

Images = list[Image.Image] | Tensor | np.ndarray
DECODE_CHUNK = 16  # pictures decoded and scored at once; the autoencoder is the largest user of memory
RECORD_VERSION = 1


class Cancelled(Exception):
    """A callback asked to stop; nothing of the call is kept."""


@dataclass(frozen=True, eq=False)
class Step:
    """What a callback sees after every step that pictures take together."""

    stage: str  # "prior" or "decoder"
    seeds: list[int]  # of the B pictures that took this step together
    steps_left: list[int]
    x0: Tensor  # (B, ...) the clean estimates: latents, or embeddings in the prior

    def cancel(self) -> None:
        """Stop the whole call, which then raises `Cancelled`."""
        raise Cancelled(f"cancelled in the {self.stage} with {max(self.steps_left)} steps left")


Callback = Callable[[Step], None]


@dataclass(frozen=True)
class Ranked:
    """A candidate that was painted, kept or not."""

    prompt_index: int
    seed: int
    score: float | None  # cosine of CLIP's picture and text embeddings; None: not ranked
    kept: bool


@dataclass(frozen=True, eq=False)
class Result:
    """The kept pictures, flat: prompt by prompt, best first within a prompt."""

    images: Images  # as output_type says; "pt" is (K, 3, H, W), "np" (K, H, W, 3), in [0, 1]
    scores: list[float] | None  # None: not ranked
    seeds: list[int]
    prompts: list[str]
    records: list[dict[str, JSON]]  # of each picture all that paints it again, JSON
    candidates: list[Ranked]  # all that were painted, in drawing order


class TextToImage:
    """A text-to-image model with the CLIP that ranks its pictures."""

    def __init__(self, model: StableUnCLIP, name: str = "", model_hash: Callable[[], str] | None = None) -> None:
        self.model = model
        self.name = name
        self._hash = model_hash

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,  # a bundled name, a diffusers folder or a hub id
        device: torch.device | str | None = None,  # None: CUDA where there is one
        dtype: torch.dtype = torch.float32,  # of the networks; rows are always float32
    ) -> TextToImage:
        """Load a model; what is unknown, missing or damaged is a ValueError of one line that names it."""
        device = usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        parts = checkpoint.load(name_or_path, device, dtype)
        if parts.family not in stable_unclip.CLASSES:
            told = ", ".join(stable_unclip.CLASSES)
            raise ValueError(f"model '{name_or_path}' is a {parts.family or 'folder of no class'}; ours are: {told}")
        return cls(StableUnCLIP.of(parts), str(name_or_path), lambda: parts.hash)

    @property
    def hash(self) -> str:
        """SHA-256 of the model's files; empty for a model that was not loaded from any."""
        return "" if self._hash is None else self._hash()

    @property
    def card(self) -> checkpoint.Card:
        """What the model says of itself: what it knows, its defaults, its scores."""
        return self.model.card

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        keep: int | None = None,  # best so many of each prompt; None: all, still ranked
        rerank: bool | None = None,  # None: ranked where the model has a CLIP and the prompt is text
        seed: int | Sequence[int] | None = None,  # candidate k has seed + k; one per prompt; None: drawn
        height: int | None = None,  # pixels; as everywhere below, None is the model's own
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,  # 1: off
        guidance_interval: tuple[float, float] | None = None,  # guided where low < sigma <= high
        guidance_rescale: float | None = None,  # 0: off
        sampler: str | None = None,  # None: the checkpoint's own scheduler
        eta: float | None = None,
        clip_skip: int | None = None,
        noise_level: int | None = None,  # on the image embedding
        prior: bool | None = None,  # False: from the text alone
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        latents: Tensor | None = None,  # (prompts * num_images_per_prompt, C, h, w) unit noise
        prior_latents: Tensor | None = None,  # (prompts * num_images_per_prompt, E) unit noise
        prompt_embeds: Tensor | None = None,  # (prompts, L, D)
        negative_prompt_embeds: Tensor | None = None,  # (prompts, L, D)
        image_embeds: Tensor | None = None,  # (prompts, E), in place of the prior's answer
        output_type: str = "pil",  # "pil", "pt", "np" or "latent"
        batch_size: int | None = None,  # rows in flight at most; None: all. Pictures do not depend on it
        callback: Callback | None = None,  # called after every step, to look or to cancel
        progress: bool = False,  # a bar on standard error
    ) -> Result:
        """Paint candidates of every prompt, rank them and keep the best.

        Raises ValueError, before any network runs, for what this model cannot paint; `Cancelled` when the
        callback cancels.
        """
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            keep=keep,
            rerank=rerank,
            seed=seed,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            eta=eta,
            clip_skip=clip_skip,
            noise_level=noise_level,
            prior=prior,
            prior_num_inference_steps=prior_num_inference_steps,
            prior_guidance_scale=prior_guidance_scale,
            latents=latents,
            prior_latents=prior_latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image_embeds=image_embeds,
            output_type=output_type,
        )
        return self.paint([request], batch_size=batch_size, callback=callback, progress=progress)[0]

    @torch.no_grad()
    def paint(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> list[Result]:
        """Many requests at once: their pictures share every network call, whatever their settings."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is out of range; give 1 or more, or None for all at once")
        jobs = [request.resolve(self.model.abilities) for request in requests]
        candidates = [candidate for job in jobs for candidate in job.candidates]
        latents = self._latents(candidates, batch_size, callback, progress)
        results, first = [], 0
        for job in jobs:
            results.append(self._result(job, latents[first : first + len(job.candidates)]))
            first += len(job.candidates)
        return results

    @torch.no_grad()
    def repaint(self, record: Mapping[str, Any]) -> Tensor:
        """Paint one picture again from its record: (3, H, W) in [0, 1], to compare with the one on file.

        Raises ValueError where the record lacks something or comes from a model of another hash.
        """
        made_by = record.get("model_hash")
        if made_by and self.hash and made_by != self.hash:
            raise ValueError(
                f"the picture was painted by model '{record.get('model', '')}' of hash {str(made_by)[:12]}, "
                f"and this is '{self.name}' of hash {self.hash[:12]}; load the one it was painted by"
            )
        candidate = Candidate.from_json(record, self.model.abilities)
        return self.model.decode(torch.stack(self._latents([candidate], None, None, False)))[0]

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write a stock diffusers folder with the CLIP and the card beside; see `checkpoint.save`."""
        parts = self.model.parts()
        return checkpoint.save(folder, stable_unclip.CLASSES[0], parts, self.model.clip, self.card, dtype)

    def _latents(
        self,
        candidates: Sequence[Candidate],
        batch_size: int | None,
        callback: Callback | None,
        progress: bool,
    ) -> list[Tensor]:
        """Every candidate painted, as (C, h, w) latents in the candidates' order."""
        model, table = self.model, Table()
        # before the text tower and the prior run: a scheduler may refuse the sampler
        chosen = [candidate.settings for candidate in candidates]
        schedules = [model.levels.schedule(each.sampler, each.num_inference_steps) for each in chosen]
        with ExitStack() as stack:
            look = self._look(candidates, callback, stack.enter_context(bar()) if progress else None)
            told = model.tell(candidates, table, batch_size, look)
            rows = [
                Row(
                    key=key,
                    seed=candidate.seed,
                    schedule=schedules[key],
                    sampler=candidate.settings.sampler,
                    prompt=prompt,
                    null=null,
                    guidance_scale=candidate.settings.guidance_scale,
                    guidance_interval=candidate.settings.guidance_interval,
                    guidance_rescale=candidate.settings.guidance_rescale,
                    eta=candidate.settings.eta,
                    start=candidate.latents,
                )
                for key, (candidate, (prompt, null)) in enumerate(zip(candidates, told, strict=True))
            ]
            shapes = [model.latent_shape(candidate.settings) for candidate in candidates]
            engine = Engine(
                model.call, model.levels.scaling, table, "decoder", lambda row: shapes[row.key], model.device
            )
            painted: dict[int, Tensor] = {}
            for finished in engine.run(rows, batch_size):
                painted |= {one.row.key: one.x for one in finished}
                look(engine)
        return [painted[key] for key in range(len(candidates))]

    def _look(
        self, candidates: Sequence[Candidate], callback: Callback | None, shown: Progress | None
    ) -> Callable[[Engine], None]:
        """What happens after every tick: the bar moves and the callback looks."""
        steps = {
            "prior": sum(each.settings.prior_num_inference_steps for each in candidates if each.settings.prior),
            "decoder": sum(each.settings.num_inference_steps for each in candidates),
        }
        tasks = {} if shown is None else {name: shown.add_task(name, total=n) for name, n in steps.items() if n}

        def look(engine: Engine) -> None:
            if shown is not None:
                shown.update(tasks[engine.stage], completed=engine.num_steps_taken)
            if callback is None:
                return
            for taken in engine.last:
                step = Step(
                    stage=engine.stage,
                    seeds=[one.row.seed for one in taken.rows],
                    steps_left=[one.row.schedule.num_steps - one.index for one in taken.rows],
                    x0=taken.x0,
                )
                callback(step)

        return look

    def _result(self, job: Job, latents: Sequence[Tensor]) -> Result:
        """Decode, score, keep: the pictures of one request."""
        candidates, n = job.candidates, job.num_images_per_prompt
        pixels: list[Tensor] = []
        scores: list[float] | None = [] if job.rank else None
        if job.rank or job.output_type != "latent":
            for first in range(0, len(latents), DECODE_CHUNK):
                chunk = self.model.decode(torch.stack(list(latents[first : first + DECODE_CHUNK])))
                pixels += chunk.unbind(0)
                if scores is not None:
                    texts = [candidate.prompt for candidate in candidates[first : first + DECODE_CHUNK]]
                    scores += self._score(chunk, texts)
        order = drawing_order(len(candidates), n) if scores is None else best_of(scores, n, job.keep)
        kept = [index for group in order for index in group]
        among = set(kept)
        return Result(
            images=as_output([latents[i] if job.output_type == "latent" else pixels[i] for i in kept], job.output_type),
            scores=None if scores is None else [scores[i] for i in kept],
            seeds=[candidates[i].seed for i in kept],
            prompts=[candidates[i].prompt for i in kept],
            records=[self._record(candidates[i], None if scores is None else scores[i]) for i in kept],
            candidates=[
                Ranked(i // n, candidate.seed, None if scores is None else scores[i], i in among)
                for i, candidate in enumerate(candidates)
            ],
        )

    def _score(self, pixels: Tensor, texts: Sequence[str]) -> list[float]:
        """CLIP's cosine of each picture (B, 3, H, W) with its text, read as 8-bit, as a file holds it."""
        assert self.model.clip is not None, "a ranking is refused where there is no CLIP"
        rounded = (pixels * 255).round() / 255
        known = list(dict.fromkeys(texts))  # every text is encoded once
        embedding = self.model.clip.text(known).embedding[[known.index(text) for text in texts]]
        return cosine(self.model.clip.image(rounded), embedding).tolist()

    def _record(self, candidate: Candidate, score: float | None) -> dict[str, JSON]:
        """All that paints a picture again, and how it scored."""
        made: dict[str, JSON] = {"version": RECORD_VERSION, "model": self.name, "model_hash": self.hash}
        return candidate.to_json() | made | {"score": score}


def usable(device: torch.device | str) -> torch.device:
    """The device; ValueError where torch does not know it or cannot reach it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device '{device}' cannot be used ({reason}); give cpu, cuda, ..., or leave it out") from None


def bar() -> Progress:
    """A progress bar on standard error, which leaves standard output to the results."""
    return Progress(console=Console(stderr=True))


def as_output(pictures: Sequence[Tensor], output_type: str) -> Images:
    """Pictures (3, H, W) in [0, 1], or latents, as the user asked for them; all are of one size."""
    stacked = torch.stack(list(pictures)).cpu()
    if output_type in ("pt", "latent"):
        return stacked
    arrays = stacked.permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return arrays
    return [Image.fromarray(array) for array in (arrays * 255).round().astype(np.uint8)]
