"""What was asked: every mistake a user can make is found here, before any network runs.

`Request` holds the user's words, named as in diffusers, unchecked. `Request.resolve` checks them against what
a model can do (`Abilities`) and fills in what was left out, giving a `Job`: prompts, one seed per candidate,
and `Settings`, which with the model, the prompt and the seed are all that a picture depends on. It knows no
network and no file.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from torch import Tensor

from gen.candidate import MAX_SEED, PICTURES, SHOWN, SHOWN_PICTURE, TENSORS, Candidate, check_seeing, check_shown
from gen.checks import as_number, count_of, is_number, one_of, refusal, shape_of, texts, whole
from gen.prompts import parse
from gen.search import BestOf, Search, by_name
from gen.settings import SAMPLER_OPTIONS, SCORES, SECOND, SIZES, Abilities, Settings, check_settings
from gen.source import RGB, Picture, Source, check_alike, check_mask, check_sized, num_of, size_of, sources

POOLED = {"prompt_embeds": "pooled_prompt_embeds", "negative_prompt_embeds": "negative_pooled_prompt_embeds"}
# beside negative_prompt, which a prior may read too
NULLS = ("negative_prompt_2", "negative_prompt_embeds", "negative_image_embeds")
NULL_SIZES = tuple(name for name in (*SIZES, *SCORES) if name.startswith("negative_"))
GUIDED = (*NULLS, *NULL_SIZES, "guidance_rule", "guidance_rescale")  # read where there is guidance
APG = ("apg_eta", "apg_norm_threshold", "apg_momentum")
PRIORS = (
    "prior_latents",
    "prior_num_inference_steps",
    "prior_guidance_scale",
    "prior_best_of",
)  # read where there is a prior
SUPER_RES = ("super_res_latents", "super_res_num_inference_steps")  # read where there is super resolution
NUMBERS = ("int | None", "float | None")  # what the words of a call that are numbers are annotated with
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
MOST_IN_BUDGET = 4096  # candidates of a prompt, where only a budget says how many


Pictures = Mapping[str, Sequence[Source | None]]
"""Those of each prompt, by their names in `PICTURES`"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that can be painted: nothing left to choose, nothing left to refuse."""

    candidates: tuple[Candidate, ...]  # prompt by prompt, num_images_per_prompt of each
    num_images_per_prompt: int
    keep: int  # per prompt
    rank: bool
    output_type: str
    search: Search = BestOf()  # noqa: RUF009 - frozen
    budget: float | None = None  # seconds; None: as long as it takes
    diverse: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """The words of one call, named as in diffusers; None leaves a choice to the model.

    A call of a model takes them from these fields (`gen.words`). `Settings` has those that a picture depends on once
    more, with nothing left to choose.
    """

    prompt: str | Sequence[str] | None = field(default=None, kw_only=False)
    negative_prompt: str | Sequence[str] | None = None
    prompt_2: str | Sequence[str] | None = None  # what XL's second text tower reads; None: the prompt
    negative_prompt_2: str | Sequence[str] | None = None  # None: negative_prompt
    original_size: tuple[int, int] | None = None  # (height, width) that XL is told; None: the picture's
    target_size: tuple[int, int] | None = None  # the same, of the size asked for
    crops_coords_top_left: tuple[int, int] | None = None  # (top, left) that XL is told; None: (0, 0)
    negative_original_size: tuple[int, int] | None = None  # the same three with the null; None: as with the prompt
    negative_target_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] | None = None
    aesthetic_score: float | None = None  # that XL's refiner is told, some 1 to 10; None: 6
    negative_aesthetic_score: float | None = None  # the same with the null; None: 2.5
    num_images_per_prompt: int | None = None  # None: 1, or with a budget as many as fit
    keep: int | None = None  # best so many of each prompt; None: all, still ranked
    rerank: bool | None = None  # None: ranked where the model has a CLIP and the prompt is text
    search: str | Search | None = None  # which candidates are painted to their end; None: best_of, all
    budget: float | None = None  # seconds for all of it; what is painted by then is kept, one at least
    diverse: bool = False  # keep no two near-copies; see `gen.search.choice`
    seed: int | Sequence[int] | None = None  # candidate k has seed + k; one per prompt; None: drawn
    # what it begins with: a picture in any form, or latents
    image: Picture | Sequence[Picture] | None = field(default=None, repr=False)
    # white where that is painted anew; None: everywhere
    mask_image: Picture | Sequence[Picture] | None = field(default=None, repr=False)
    strength: float | None = None  # the share of the steps taken from image on; None: as stock's class has it
    denoising_start: float | None = None  # go on from image, latents that a run to denoising_end ended with
    denoising_end: float | None = None  # end at this share of the noise, for another model to go on
    height: int | None = None  # pixels; as everywhere below, None is the model's own, or image's
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None  # 1: off
    guidance_interval: tuple[float, float] | None = None  # guided where low < sigma <= high
    guidance_rescale: float | None = None  # 0: off; Lin et al. 2024
    guidance_rule: str | None = None  # cfg, cfg_zero, apg or autoguidance; see `samplers.guidance.RULES`
    zero_init_steps: int | None = None  # cfg_zero: first steps of output 0, for flows and v
    apg_eta: float | None = None  # apg: how much stays of guidance along the prompt's own estimate
    apg_norm_threshold: float | None = None  # apg: the largest norm of guidance; 0: any
    apg_momentum: float | None = None  # apg: what the guidance of earlier steps counts
    clip_guidance_scale: float | None = None  # by the gradient of CLIP's cosine (Nichol et al. 2022); 0: off
    thresholding: float | None = None  # what clean values keep within (Saharia et al. 2022); 0: off
    dynamic_thresholding_ratio: float | None = None  # the share of values that are not clipped
    sampler: str | None = None  # None: the checkpoint's own scheduler
    eta: float | None = None  # fresh noise of a step: 0 none, 1 ancestral
    s_churn: float | None = None  # noise added before each step and taken away by it (Karras et al. 2022)
    s_tmin: float | None = None  # churned where s_tmin <= sigma <= s_tmax
    s_tmax: float | None = None
    s_noise: float | None = None  # the deviation of what churn adds
    clip_skip: int | None = None  # layers of the text tower left out; None: none, as trained
    noise_level: int | None = None  # on the image embedding
    prior: bool | None = None  # False: from the text alone
    prior_num_inference_steps: int | None = None
    prior_guidance_scale: float | None = None
    prior_best_of: int | None = None  # of so many answers of the prior that nearest to the text
    # its CLIP embedding in place of the prior's answer
    variation_of: Picture | Sequence[Picture] | None = field(default=None, repr=False)
    # towards whose embedding that goes
    interpolate_image: Picture | Sequence[Picture] | None = field(default=None, repr=False)
    interpolate_prompt: str | None = None  # towards which the prompt goes, and the prior's answer
    prompt_weights: bool | None = None  # (word:1.3), (word), [word] say what words count; see `gen.prompts`
    long_prompts: bool | None = None  # texts too long for the text tower are read in pieces, and not cut
    interpolation: float | None = None  # how far, 0 to 1; None: half way
    edit_from: str | None = None  # what variation_of shows, where prompt says what it should show
    edit_amount: float | None = None  # how far to turn it there, some 0.25 to 0.5
    super_res_num_inference_steps: int | None = None  # where the model paints small pictures first
    vae_tiling: bool | None = None  # large pictures through the autoencoder in tiles: less memory, other pixels
    latents: Tensor | None = field(default=None, repr=False)  # (prompts * num_images_per_prompt, C, h, w) unit noise
    prior_latents: Tensor | None = field(default=None, repr=False)  # (prompts * num_images_per_prompt, E) unit noise
    # (prompts * num_images_per_prompt, C, H, W) unit noise
    super_res_latents: Tensor | None = field(default=None, repr=False)
    prompt_embeds: Tensor | None = field(default=None, repr=False)  # (prompts, L, D)
    negative_prompt_embeds: Tensor | None = field(default=None, repr=False)  # (prompts, L, D)
    # (prompts, P), with prompt_embeds of Stable Diffusion XL
    pooled_prompt_embeds: Tensor | None = field(default=None, repr=False)
    negative_pooled_prompt_embeds: Tensor | None = field(default=None, repr=False)  # (prompts, P)
    image_embeds: Tensor | None = field(default=None, repr=False)  # (prompts, E), in place of the prior's answer
    # shown beside the text; one, or per prompt
    ip_adapter_image: Picture | Sequence[Picture] | None = field(default=None, repr=False)
    # (prompts, E) or (prompts, S, E) in its place
    ip_adapter_image_embeds: Tensor | None = field(default=None, repr=False)
    # (prompts, E), what Kandinsky is guided away from
    negative_image_embeds: Tensor | None = field(default=None, repr=False)
    output_type: str = "pil"  # "pil", "pt", "np" or "latent"

    def resolve(self, able: Abilities) -> Job:
        """Check every word against what the model can do and fill in what was left out.

        Raises ValueError with one line: what was given, what is allowed, what to do.
        """
        return self._with_numbers()._resolve(able)

    def _with_numbers(self) -> Request:
        """The same with numbers as Python's own."""
        numbers = {item.name: as_number(getattr(self, item.name)) for item in fields(self) if item.type in NUMBERS}
        for name, value in numbers.items():
            if isinstance(value, Tensor | np.ndarray):
                raise refusal(name, value, "a number")
        return replace(self, **numbers)

    def _resolve(self, able: Abilities) -> Job:
        prompts = self._prompts()
        if self.budget is not None and (not is_number(self.budget, 0.0) or self.budget == 0):
            raise refusal("budget", self.budget, "a number of seconds above 0")
        n = 1 if self.budget is None else MOST_IN_BUDGET
        if self.num_images_per_prompt is not None:
            n = whole("num_images_per_prompt", self.num_images_per_prompt, 1)
        if n > MAX_SEED:
            raise ValueError(f"num_images_per_prompt={n} is more than there are seeds; give at most {MAX_SEED}")
        keep = n if self.keep is None else whole("keep", self.keep, 1)
        if keep > n:
            raise ValueError(f"keep={keep} is more than num_images_per_prompt={n}; keep at most what is painted")
        rank = self._rank(able)
        if keep < n and not rank:
            why, cure = "rerank=False", "let it rank"
            if not self._is_whole:
                why, cure = f"denoising_end={self.denoising_end} leaves no whole picture", "leave that out"
            if not able.can_rank:
                why, cure = "this model has no clip/ to rank with", "load it with clip=NAME"
            raise ValueError(f"keep={keep} of {n} needs a ranking, but {why}; leave keep out, or {cure}")
        search = self._search(rank, keep < n)
        one_of("output_type", self.output_type, OUTPUT_TYPES)
        latents = self._image_latents(able, len(prompts), n)
        handed = {name: getattr(self, name) for name in PICTURES} | ({"image": None} if latents else {})
        pictures = {name: sources(name, handed[name], len(prompts), PICTURES[name]) for name in PICTURES}
        settings = self._settings(able, pictures, latents)
        ignored = self._ignored(settings, able)
        for name, reason in ignored:
            warnings.warn(f"{name} is ignored: {reason}", UserWarning, stacklevel=3)
        self._check_pictures(settings, able, pictures)
        self._check_embedding(settings, able)
        negatives = self._negatives(len(prompts))
        self._check_words(settings, [*prompts, *negatives, settings.interpolate_prompt])
        second = {name: each_of(name, getattr(self, name), len(prompts)) for name in SECOND}
        seeds = candidate_seeds(self.seed, len(prompts), n)
        self._check_tensors(settings, able, len(prompts), n)

        # taken apart once, so that the candidates of a prompt share its tensors
        unread = {name for name, _ in ignored}
        unread |= {POOLED[name] for name in unread & POOLED.keys()}
        told = {name: entries(None if name in unread else getattr(self, name)) for name in (*TENSORS, SHOWN)}
        settled = [
            replace(settings, negative_prompt=negative, prompt_2=prompt, negative_prompt_2=null)
            for negative, prompt, null in zip(negatives, *second.values(), strict=True)
        ]
        check_settings(settled[0], able)
        candidates = []
        for index, seed in enumerate(seeds):
            at = index // n  # whose prompt
            candidates.append(
                Candidate(
                    prompt=prompts[at],
                    seed=seed,
                    settings=settled[at],
                    latents=told["latents"].get(index),
                    prior_latents=told["prior_latents"].get(index),
                    super_res_latents=told["super_res_latents"].get(index),
                    prompt_embeds=told["prompt_embeds"].get(at),
                    negative_prompt_embeds=told["negative_prompt_embeds"].get(at),
                    pooled_prompt_embeds=told["pooled_prompt_embeds"].get(at),
                    negative_pooled_prompt_embeds=told["negative_pooled_prompt_embeds"].get(at),
                    image_embeds=told["image_embeds"].get(at),
                    image=pictures["image"][at],
                    image_latents=latents[index] if latents else None,
                    mask_image=pictures["mask_image"][at],
                    variation_of=pictures["variation_of"][at],
                    interpolate_image=pictures["interpolate_image"][at],
                    ip_adapter_image=pictures[SHOWN_PICTURE][at],
                    ip_adapter_image_embeds=told[SHOWN].get(at),
                    negative_image_embeds=told["negative_image_embeds"].get(at),
                )
            )
        return Job(
            candidates=tuple(candidates),
            num_images_per_prompt=n,
            keep=keep,
            rank=rank,
            output_type=self.output_type,
            search=search,
            budget=self.budget,
            diverse=self.diverse,
        )

    def _prompts(self) -> tuple[str, ...]:
        if self.prompt is None:
            source = self.prompt_embeds if self.prompt_embeds is not None else self.image_embeds
            if source is None and self.variation_of is not None:
                if not (number := num_of(self.variation_of)):
                    raise ValueError("variation_of is empty; give at least one picture")
                return ("",) * number
            if source is None:
                told = "give a text, a list of texts, prompt_embeds, image_embeds or variation_of"
                raise ValueError(f"prompt is missing; {told}")
            if not isinstance(source, Tensor) or source.ndim < 2 or not len(source):
                raise ValueError("without a prompt, prompt_embeds or image_embeds must be a tensor of one or more")
            return ("",) * len(source)
        prompts = texts("prompt", self.prompt)
        if not prompts:
            raise ValueError("prompt is an empty list; give at least one text")
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError(f"prompt is empty ({prompt!r}); say in words what to paint")
        return prompts

    def _negatives(self, num_prompts: int) -> tuple[str, ...]:
        if self.negative_prompt is None:
            return ("",) * num_prompts
        if self.negative_prompt_embeds is not None:
            raise ValueError("negative_prompt and negative_prompt_embeds were both given; give one of them")
        return tuple(text or "" for text in each_of("negative_prompt", self.negative_prompt, num_prompts))

    @property
    def _is_whole(self) -> bool:
        """Whether it ends with a picture, and not on the way."""
        return self.denoising_end in (None, 1)

    def _image_latents(self, able: Abilities, num_prompts: int, n: int) -> list[Tensor] | None:
        """What `image` says as latents, for each candidate one; None: it is a picture, or missing."""
        image, channels = self.image, able.latent_channels
        is_latents = isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels != RGB
        if not is_latents:
            if self.denoising_start:
                told = "denoising_start goes on from latents; give image=latents of a request with denoising_end"
                raise ValueError(f"{told} and output_type='latent'")
            return None
        assert isinstance(image, Tensor)
        each = image.detach().cpu().float().clone().unbind(0)
        for name in ("mask_image", "latents"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} and image as latents were both given; leave {name} out")
        repeats = {1: num_prompts * n, num_prompts: n, num_prompts * n: 1}
        if len(each) not in repeats:
            told = f"image has {len(each)} latents for {count_of(num_prompts, 'prompt')} of {count_of(n, 'picture')}"
            raise ValueError(f"{told}; give one, one for each prompt, or one for each picture")
        return [one for one in each for _ in range(repeats[len(each)])]

    def _rank(self, able: Abilities) -> bool:
        if self.rerank is None:
            return able.can_rank and self.prompt is not None and self._is_whole
        if self.rerank and not self._is_whole:
            raise ValueError(f"rerank=True needs whole pictures, and denoising_end={self.denoising_end} leaves none")
        if self.rerank and not able.can_rank:
            told = "load it with clip=NAME (a CLIP folder, hub id or open_clip:NAME/TAG), or leave rerank out"
            raise ValueError(f"rerank=True, but this model has no clip/ to rank with; {told}")
        if self.rerank and self.prompt is None:
            raise ValueError("rerank=True needs the prompt as text; give prompt as well, or leave rerank out")
        return self.rerank

    def _search(self, rank: bool, chooses: bool) -> Search:
        search = by_name("best_of" if self.search is None else self.search)
        if self.denoising_start and not isinstance(search, BestOf):
            raise ValueError(f"search '{search.name}' begins with noise, and denoising_start does not; leave one out")
        if not rank and not isinstance(search, BestOf):
            raise ValueError(f"search '{search.name}' goes by CLIP's scores, but nothing is ranked; let it rank")
        if not isinstance(self.diverse, bool):
            raise ValueError(f"diverse={self.diverse!r}; give True or False")
        if self.diverse and not chooses:
            raise ValueError("diverse=True chooses among candidates, but all are kept; give a smaller keep")
        return search

    def _settings(self, able: Abilities, pictures: Pictures, latents: Sequence[Tensor] | None) -> Settings:
        names = {item.name for item in fields(Settings)} - {"negative_prompt", *SECOND}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.sampler not in (None, able.defaults.sampler):
            given = dict.fromkeys(SAMPLER_OPTIONS) | given  # the model's own are its own sampler's
        if self._has_embedding:
            if self.prior:
                name = "image_embeds" if self.variation_of is None else "variation_of"
                raise ValueError(f"prior=True and {name} were both given; an image embedding needs no prior")
            given["prior"] = False
        if self.image is None:
            given.setdefault("strength", 1.0)
        elif able.strength is None:
            raise ValueError("image was given, but this model cannot begin with a picture; leave it out")
        else:
            given.setdefault("strength", able.strength if self.mask_image is None else able.mask_strength)
        if self.denoising_start:  # which says where it begins
            given["strength"] = 1.0
        if (first := pictures["image"][0]) is not None:
            check_alike(pictures["image"], self.height, self.width)
            given["height"], given["width"] = size_of(first, self.height, self.width, able.size_multiple)
        if latents:
            given["height"], given["width"] = size_of_latents(latents[0], able.cell_size, self.height, self.width)
        settings = able.defaults.updated(given, "request")
        check_settings(settings, able)
        if not self._has_embedding and settings.prior and self.prompt is None:
            raise ValueError("the prior reads the prompt as text; give prompt as well, or prior=False")
        if able.needs_image and not self._has_embedding and not settings.prior:
            told, cure = "this model has no prior and", "give image_embeds or variation_of"
            if able.prior_max_steps:
                told, cure = "without its prior this model", "leave prior=False out"
            elif able.takes_null_image:
                cure = "give image_embeds, or load it with prior_model=NAME"
            raise ValueError(f"{told} paints nothing from a text alone; {cure}")
        if self.variation_of is not None:
            check_seeing(settings, able)
        is_lacking = able.takes_null_image and not able.has_null_image and self.negative_image_embeds is None
        if is_lacking and settings.guidance_scale != 1:
            told = "without its prior this model has no image to be guided away from"
            raise ValueError(f"{told}; give negative_image_embeds, or guidance_scale=1")
        if self.prior_latents is not None and settings.num_thoughts > 1:
            raise ValueError("prior_latents are the start of one answer of the prior, but several are asked for")
        if settings.clip_guidance_scale and self.prompt is None:
            raise ValueError("clip_guidance_scale needs the prompt as text; give prompt as well, or leave it out")
        return settings

    @property
    def _has_embedding(self) -> bool:
        """Whether an image embedding comes from elsewhere than a prior."""
        return self.image_embeds is not None or self.variation_of is not None

    def _check_words(self, settings: Settings, said: Sequence[str]) -> None:
        if settings.prompt_weights:
            for text in dict.fromkeys(said):
                if text and not any(part.text.strip() for part in parse("prompt", text)):
                    raise ValueError(f"prompt {text!r} has brackets and no words; say in words what to paint")
        given = next((name for name in POOLED if getattr(self, name) is not None), None)
        if settings.long_prompts and given:
            raise ValueError(f"long_prompts=True and {given} were both given; give texts, or embeddings of all of them")

    def _check_embedding(self, settings: Settings, able: Abilities) -> None:
        for name, wanted in (("interpolate_image", "variation_of"), ("edit_from", "variation_of")):
            if getattr(self, name) is not None and getattr(self, wanted) is None:
                raise ValueError(f"{name} was given without {wanted}; give the picture to begin from with {wanted}")
        for name, wanted in (("interpolate_prompt", "prompt"), ("edit_from", "prompt")):
            if getattr(self, name) is not None and self.prompt is None:
                raise ValueError(f"{name} was given without {wanted}; give it in words as well")
        if self.interpolate_prompt is not None and (self._has_embedding or self.prompt_embeds is not None):
            told = "interpolate_prompt goes from the prompt in words"
            raise ValueError(f"{told}; leave out what stands in its place, or use interpolate_image between pictures")
        if self.interpolation is not None and self.interpolate_prompt is None and self.interpolate_image is None:
            raise ValueError(
                "interpolation was given without interpolate_prompt or interpolate_image; give one of them"
            )
        if self.edit_amount is not None and self.edit_from is None:
            raise ValueError("edit_amount was given without edit_from; say what the picture shows")
        if self.variation_of is not None and self.image_embeds is not None:
            raise ValueError("variation_of and image_embeds were both given; give one of them")
        for name in ("interpolate_prompt", "edit_from"):
            if isinstance(text := getattr(self, name), str) and not text.strip():
                raise ValueError(f"{name} is empty ({text!r}); give it in words, or leave it out")

    def _check_pictures(self, settings: Settings, able: Abilities, pictures: Pictures) -> None:
        if self.image is None:
            for name in ("mask_image", "strength"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} was given without image; give the picture as well, or leave {name} out")
        if able.needs_picture and self.image is None:
            raise ValueError("this model refines a picture and paints none from words alone; give image")
        if able.inpaints_alone and (self.image is None or self.mask_image is None):
            raise ValueError(
                "this model paints a part of a picture anew and does nothing else; give image and mask_image"
            )
        for image, mask in zip(pictures["image"], pictures["mask_image"], strict=True):
            if image is not None:
                check_sized("image", image, settings.height, settings.width)
            if image is not None and mask is not None:
                check_mask(mask, image, settings.height, settings.width, able.size_multiple)

    def _ignored(self, settings: Settings, able: Abilities) -> list[tuple[str, str]]:
        """What was given and is not read, by name, and why."""
        image = settings.prior or self._has_embedding
        by_prior = settings.prior and able.prior_reads_negative
        reads_negative = by_prior or (able.reads_text and settings.guidance_scale != 1)
        unread = "guidance_scale is 1" if able.reads_text else "the prior is off"
        unheard: list[tuple[bool, str, tuple[str, ...]]] = [
            (settings.guidance_scale == 1, "guidance_scale is 1", GUIDED),
            (not reads_negative, unread, ("negative_prompt",)),
            (
                settings.guidance_rule == "autoguidance",
                "autoguidance has another null",
                ("negative_prompt", *NULLS, *NULL_SIZES),
            ),
            (settings.guidance_rule != "cfg_zero", "guidance_rule is not cfg_zero", ("zero_init_steps",)),
            (settings.guidance_rule != "apg", "guidance_rule is not apg", APG),
            (not settings.thresholding, "thresholding is 0", ("dynamic_thresholding_ratio",)),
            (not settings.s_churn, "s_churn is 0", ("s_tmin", "s_tmax", "s_noise")),
            (self.prompt_embeds is not None, "prompt_embeds was given", ("clip_skip", "prompt_2")),
            (settings.denoising_start > 0, "denoising_start says where it begins", ("strength",)),
            (not settings.prior, "the prior is off", PRIORS),
            (not image and bool(self.noise_level), "the prior is off", ("noise_level",)),
            (not able.super_res_max_steps, "this model has no super resolution", SUPER_RES),
            (able.tells_score, "this model is told a score in its place", ("target_size", "negative_target_size")),
        ]
        return [
            (name, reason)
            for holds, reason, names in unheard
            for name in names
            if holds and getattr(self, name) is not None
        ]

    def _check_tensors(self, settings: Settings, able: Abilities, num_prompts: int, n: int) -> None:
        cells = (settings.height // able.cell_size, settings.width // able.cell_size)
        shape_of("latents", self.latents, (num_prompts * n, able.latent_channels, *cells))
        if able.embedding_width is None:
            for name in ("image_embeds", "prior_latents"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} was given, but this model takes no image embedding; leave it out")
        else:
            shape_of("prior_latents", self.prior_latents, (num_prompts * n, able.embedding_width))
            shape_of("image_embeds", self.image_embeds, (num_prompts, able.embedding_width))
            shape_of("negative_image_embeds", self.negative_image_embeds, (num_prompts, able.embedding_width))
        if self.negative_image_embeds is not None and not able.takes_null_image:
            raise ValueError("negative_image_embeds was given, but this model is guided away from a text; leave it out")
        if able.super_res_max_steps:
            large = (able.latent_channels, settings.height, settings.width)
            shape_of("super_res_latents", self.super_res_latents, (num_prompts * n, *large))
        if self.ip_adapter_image is not None:
            check_shown(able)
            if self.ip_adapter_image_embeds is not None:
                raise ValueError(f"{SHOWN_PICTURE} and {SHOWN} were both given; give one of them")
        if able.ip_adapter_shape is not None:
            shape_of(SHOWN, self.ip_adapter_image_embeds, (num_prompts, *able.ip_adapter_shape))
        elif self.ip_adapter_image_embeds is not None:
            raise ValueError(f"{SHOWN} was given, but this model has no IP-Adapter; load one with load_ip_adapter")
        words, null = self.prompt_embeds, self.negative_prompt_embeds
        if able.text_shape is None:
            for name in (*POOLED, *POOLED.values()):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} was given, but this model reads its texts itself; give them as text")
            return
        length, width = able.text_shape
        if isinstance(words, Tensor) and words.ndim == 3 and null is not None:
            length = words.shape[1]  # any length, when words and null agree on it
        shape_of("prompt_embeds", words, (num_prompts, length, width))
        shape_of("negative_prompt_embeds", null, (num_prompts, length, width))
        for name, pooled in POOLED.items():
            if able.pooled_width is None:
                if getattr(self, pooled) is not None:
                    raise ValueError(f"{pooled} was given, but this model takes no pooled text; leave it out")
            elif (getattr(self, name) is None) != (getattr(self, pooled) is None):
                raise ValueError(f"this model takes {name} and {pooled} together; give both or none")
            else:
                shape_of(pooled, getattr(self, pooled), (num_prompts, able.pooled_width))


def size_of_latents(latents: Tensor, cell: int, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels of latents (C, h, w); ValueError where others were asked for."""
    own = latents.shape[-2] * cell, latents.shape[-1] * cell
    for name, asked, pixels in zip(("height", "width"), (height, width), own, strict=True):
        if asked not in (None, pixels):
            raise ValueError(f"{name}={asked}, and image's latents are of {pixels}; leave it out")
    return own


def each_of(name: str, value: str | Sequence[str] | None, num_prompts: int) -> tuple[str | None, ...]:
    """A text for each prompt, of one for all or of as many; None for each where none was given."""
    if value is None:
        return (None,) * num_prompts
    given = texts(name, value)
    if isinstance(value, str):
        given *= num_prompts
    if len(given) != num_prompts:
        told = f"{name} has {count_of(len(given), 'text')} for {count_of(num_prompts, 'prompt')}"
        raise ValueError(f"{told}; give one or as many")
    return given


def candidate_seeds(seed: int | Sequence[int] | None, num_prompts: int, n: int) -> tuple[int, ...]:
    """Seeds of all candidates, prompt by prompt: candidate k of a prompt with seed s has seed s + k."""
    last = MAX_SEED - (n - 1)
    if seed is None:
        starts = [secrets.randbelow(last + 1)] * num_prompts
    elif isinstance(seed, str) or not isinstance(seed, Sequence):
        starts = [whole("seed", seed, 0, last)] * num_prompts
    else:
        starts = [whole("seed", value, 0, last) for value in seed]
        if len(starts) != num_prompts:
            told = f"seed has {count_of(len(starts), 'number')} for {count_of(num_prompts, 'prompt')}"
            raise ValueError(f"{told}; give one, or one for each")
    return tuple(start + k for start in starts for k in range(n))


def entries(tensor: Tensor | None) -> dict[int, Tensor]:
    """The entries of a tensor along its first axis, by their index; none of one that was not given.

    Copied, for a request in flight must not see what becomes of the caller's memory.
    """
    return {} if tensor is None else dict(enumerate(tensor.detach().clone().unbind(0)))
