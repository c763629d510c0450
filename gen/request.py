"""What was asked: every mistake a user can make is found here, before any network runs.

`Request` holds the user's words, named as in diffusers, unchecked. `Request.resolve` checks them against what
a model can do (`Abilities`) and fills in what was left out, giving a `Job`: prompts, one seed per candidate,
and `Settings`, which with the model, the prompt and the seed are all that a picture depends on. It knows no
network and no file.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gen.search import BestOf, Search, by_name
from samplers.guidance import RULES, Guide
from samplers.sample import SAMPLERS

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

POOLED = {"prompt_embeds": "pooled_prompt_embeds", "negative_prompt_embeds": "negative_pooled_prompt_embeds"}
TENSORS = ("latents", "prior_latents", *POOLED, *POOLED.values(), "image_embeds")
OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")  # of samplers, each taken by some of them
NULLS = ("negative_prompt", "negative_prompt_embeds")
GUIDED = (*NULLS, "guidance_rule", "guidance_rescale")  # read where there is guidance
APG = ("apg_eta", "apg_norm_threshold", "apg_momentum")
PRIORS = ("prior_latents", "prior_num_inference_steps", "prior_guidance_scale")  # read where there is a prior
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
MAX_SEED = 2**32 - 1  # torch's CPU generator reads 32 bits of a seed
MOST_IN_BUDGET = 4096  # candidates of a prompt, where only a budget says how many


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a model can be asked for; a family fills it in from its networks' configurations."""

    size_multiple: int  # pixels per latent cell: height and width are multiples of it
    latent_channels: int
    text_shape: tuple[int, int]  # (L, D) of prompt_embeds
    text_layers: int  # clip_skip is smaller than this
    pooled_width: int | None = None  # P of pooled_prompt_embeds; None: this model takes none
    embedding_width: int | None  # E of image_embeds; None: this model takes none
    num_noise_levels: int  # noise_level is smaller than this; 0: no image embedding to noise
    max_steps: int  # the timesteps the decoder was trained on
    prior_max_steps: int  # 0: the model has no prior
    can_rank: bool  # a whole CLIP lies beside the model
    can_autoguide: bool = False  # a weaker network was loaded beside the decoder's
    defaults: Settings  # the model's own, from its scheduler and unclip.json


@dataclass(frozen=True, kw_only=True)
class Settings:
    """With the model, the prompt and the seed, all that a picture depends on; JSON both ways."""

    height: int = 0  # pixels; 0 only before a model has filled it in
    width: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 5.0  # 1: off
    guidance_interval: tuple[float, float] | None = None  # guided where low < sigma <= high; None: all
    guidance_rescale: float = 0.0  # 0: off, 1: the guided output keeps the prompt's own contrast
    guidance_rule: str = "cfg"  # one of `samplers.guidance.RULES`
    zero_init_steps: int = 0  # cfg_zero: first steps of output 0, for flows and v; the paper's 1
    apg_eta: float = 0.0  # apg: how much stays of guidance along the prompt's own estimate; 1: all
    apg_norm_threshold: float = 15.0  # apg: the largest norm of guidance; 0: any
    apg_momentum: float = -0.5  # apg: what the guidance of earlier steps counts
    clip_guidance_scale: float = 0.0  # of the gradient of CLIP's cosine (Nichol et al. 2022), some 10; 0: off
    thresholding: float = 0.0  # dynamic thresholding: what clean values keep within, 1 for pixels; 0: off
    dynamic_thresholding_ratio: float = 0.995  # the share of values that are not clipped
    negative_prompt: str = ""  # what the null condition says
    sampler: str = "ddim"
    eta: float | None = None  # fresh noise of a step, 0 none, 1 ancestral; None: the sampler's own
    s_churn: float | None = None  # noise added and taken away again, over all steps (Karras et al. 2022); None: none
    s_tmin: float | None = None  # churned where s_tmin <= sigma <= s_tmax; None: no limit
    s_tmax: float | None = None
    s_noise: float | None = None  # the deviation of what is added; None: 1
    clip_skip: int | None = None  # layers of the text tower left out; None: none, as trained
    noise_level: int = 0  # noise on the image embedding
    prior: bool = False  # whether a prior turns the text into an image embedding first
    prior_num_inference_steps: int = 25
    prior_guidance_scale: float = 1.0  # 1: off

    @property
    def sampler_options(self) -> dict[str, float]:
        """The sampler's options that were chosen."""
        chosen = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def guide(self) -> Guide:
        """By which rule it is guided."""
        return Guide(
            rule=self.guidance_rule,
            zero_init_steps=self.zero_init_steps,
            apg_eta=self.apg_eta,
            apg_norm_threshold=self.apg_norm_threshold or math.inf,
            apg_momentum=self.apg_momentum,
        )

    @property
    def dynamic_thresholding(self) -> tuple[float, float] | None:
        """Percentile and bound, as `samplers.wrap.thresholded` takes them; None: off."""
        return (self.dynamic_thresholding_ratio, self.thresholding) if self.thresholding else None

    def to_json(self) -> dict[str, JSON]:
        """The settings as one flat JSON object."""
        values = asdict(self)
        if self.guidance_interval is not None:
            values["guidance_interval"] = list(self.guidance_interval)
        return values

    def updated(self, values: Mapping[str, Any], origin: str) -> Settings:
        """These settings with `values` in place; an unknown name is a ValueError that names its `origin`."""
        known = [item.name for item in fields(self)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{origin}: setting '{unknown[0]}' is unknown; choose from: {', '.join(known)}")
        interval = values.get("guidance_interval")
        if isinstance(interval, list):  # as JSON and YAML hold it
            values = {**values, "guidance_interval": tuple(interval)}
        return replace(self, **values)


@dataclass(frozen=True)
class Before:
    """Whose noise a picture went by before the next seed's; a search that copies or turns rows makes such paths."""

    seed: int
    steps: int  # of the decoder, from the start on; 0: its start alone, which the next seed's then turns
    share: float = 0.0  # of the turned start that is the next seed's; 0 where steps is not

    @classmethod
    def from_json(cls, told: object) -> Before:
        """As a record has it; ValueError where it is damaged."""
        if not isinstance(told, Mapping) or told.keys() != {"seed", "steps", "share"}:
            raise ValueError(f"the record is damaged: its noise_path has {told!r}")
        seed, steps = whole("seed", told["seed"], 0, MAX_SEED), whole("steps", told["steps"], 0)
        return cls(seed, steps, real("share", told["share"], 0.0, 1.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One picture to paint: all that its pixels depend on but the model."""

    prompt: str
    seed: int
    settings: Settings
    latents: Tensor | None = None  # (C, h, w) unit noise in place of the seed's
    prior_latents: Tensor | None = None  # (E,) unit noise in place of the seed's
    prompt_embeds: Tensor | None = None  # (L, D) in place of the prompt's
    negative_prompt_embeds: Tensor | None = None  # (L, D) in place of the negative prompt's
    pooled_prompt_embeds: Tensor | None = None  # (P,) with prompt_embeds, where the UNet takes them pooled too
    negative_pooled_prompt_embeds: Tensor | None = None  # (P,)
    image_embeds: Tensor | None = None  # (E,) in place of the prior's answer
    noise_path: tuple[Before, ...] = ()  # whose noise it went by before its own seed's; empty: its own throughout

    @property
    def first_seed(self) -> int:
        """The seed that its prior and the noise of its image embedding go by."""
        return self.noise_path[0].seed if self.noise_path else self.seed

    def to_json(self) -> dict[str, JSON]:
        """Prompt, seed and settings, and the names of tensors handed in, which JSON does not hold."""
        record: dict[str, JSON] = {
            "prompt": self.prompt,
            "seed": self.seed,
            "settings": self.settings.to_json(),
        }
        if self.noise_path:
            record["noise_path"] = [asdict(before) for before in self.noise_path]
        given = [name for name in TENSORS if getattr(self, name) is not None]
        return record | ({"given": list(given)} if given else {})

    @classmethod
    def from_json(cls, record: Mapping[str, Any], able: Abilities) -> Candidate:
        """The candidate of a record, checked as a request is; ValueError says what the record lacks."""
        if given := record.get("given"):
            raise ValueError(f"the picture was painted from tensors ({', '.join(given)}) that its record lacks")
        try:
            prompt, seed, told = record["prompt"], record["seed"], record["settings"]
        except KeyError as error:
            raise ValueError(f"the record has no {error}; give one that a picture was saved with") from None
        if not isinstance(prompt, str) or not isinstance(told, Mapping):
            raise ValueError("the record is damaged: its prompt is no text or its settings no object")
        settings = able.defaults.updated(told, "record")
        check_settings(settings, able)
        told = record.get("noise_path", [])
        if not isinstance(told, list):
            raise ValueError(f"the record is damaged: its noise_path is {told!r}")
        path = tuple(Before.from_json(each) for each in told)
        return cls(prompt=prompt, seed=whole("seed", seed, 0, MAX_SEED), settings=settings, noise_path=path)


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
    """The words of one call, named as in diffusers; None leaves a choice to the model (see `TextToImage`)."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    num_images_per_prompt: int | None = None
    keep: int | None = None
    rerank: bool | None = None
    search: str | Search | None = None
    budget: float | None = None
    diverse: bool = False
    seed: int | Sequence[int] | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    guidance_rule: str | None = None
    zero_init_steps: int | None = None
    apg_eta: float | None = None
    apg_norm_threshold: float | None = None
    apg_momentum: float | None = None
    clip_guidance_scale: float | None = None
    thresholding: float | None = None
    dynamic_thresholding_ratio: float | None = None
    sampler: str | None = None
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    clip_skip: int | None = None
    noise_level: int | None = None
    prior: bool | None = None
    prior_num_inference_steps: int | None = None
    prior_guidance_scale: float | None = None
    latents: Tensor | None = field(default=None, repr=False)
    prior_latents: Tensor | None = field(default=None, repr=False)
    prompt_embeds: Tensor | None = field(default=None, repr=False)
    negative_prompt_embeds: Tensor | None = field(default=None, repr=False)
    pooled_prompt_embeds: Tensor | None = field(default=None, repr=False)
    negative_pooled_prompt_embeds: Tensor | None = field(default=None, repr=False)
    image_embeds: Tensor | None = field(default=None, repr=False)
    output_type: str = "pil"

    def resolve(self, able: Abilities) -> Job:
        """Check every word against what the model can do and fill in what was left out.

        Raises ValueError with one line: what was given, what is allowed, what to do.
        """
        prompts = self._prompts()
        if self.budget is not None and (not is_number(self.budget, 0.0) or self.budget == 0):
            raise ValueError(f"budget={self.budget!r} is out of range; give a number of seconds above 0")
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
            if not able.can_rank:
                why, cure = "this model has no clip/ to rank with", "load it with clip=NAME"
            raise ValueError(f"keep={keep} of {n} needs a ranking, but {why}; leave keep out, or {cure}")
        search = self._search(rank, keep < n)
        one_of("output_type", self.output_type, OUTPUT_TYPES)
        settings = self._settings(able)
        negatives = self._negatives(len(prompts))
        seeds = candidate_seeds(self.seed, len(prompts), n)
        self._check_tensors(settings, able, len(prompts), n)

        # taken apart once, so that the candidates of a prompt share its tensors
        told = {name: entries(getattr(self, name)) for name in TENSORS}
        settled = [replace(settings, negative_prompt=negative) for negative in negatives]
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
                    prompt_embeds=told["prompt_embeds"].get(at),
                    negative_prompt_embeds=told["negative_prompt_embeds"].get(at),
                    pooled_prompt_embeds=told["pooled_prompt_embeds"].get(at),
                    negative_pooled_prompt_embeds=told["negative_pooled_prompt_embeds"].get(at),
                    image_embeds=told["image_embeds"].get(at),
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
            if source is None:
                raise ValueError("prompt is missing; give a text, a list of texts, prompt_embeds or image_embeds")
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
        negatives = texts("negative_prompt", self.negative_prompt)
        if isinstance(self.negative_prompt, str):
            negatives *= num_prompts
        if len(negatives) != num_prompts:
            raise ValueError(
                f"negative_prompt has {len(negatives)} texts for {num_prompts} prompts; give one or as many"
            )
        return negatives

    def _rank(self, able: Abilities) -> bool:
        if self.rerank is None:
            return able.can_rank and self.prompt is not None
        if self.rerank and not able.can_rank:
            told = "load it with clip=NAME (a CLIP folder, hub id or open_clip:NAME/TAG), or leave rerank out"
            raise ValueError(f"rerank=True, but this model has no clip/ to rank with; {told}")
        if self.rerank and self.prompt is None:
            raise ValueError("rerank=True needs the prompt as text; give prompt as well, or leave rerank out")
        return self.rerank

    def _search(self, rank: bool, chooses: bool) -> Search:
        search = by_name("best_of" if self.search is None else self.search)
        if not rank and not isinstance(search, BestOf):
            raise ValueError(f"search '{search.name}' goes by CLIP's scores, but nothing is ranked; let it rank")
        if not isinstance(self.diverse, bool):
            raise ValueError(f"diverse={self.diverse!r}; give True or False")
        if self.diverse and not chooses:
            raise ValueError("diverse=True chooses among candidates, but all are kept; give a smaller keep")
        return search

    def _settings(self, able: Abilities) -> Settings:
        names = {item.name for item in fields(Settings)} - {"negative_prompt"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.sampler not in (None, able.defaults.sampler):
            given = dict.fromkeys(OPTIONS) | given  # the model's own are its own sampler's
        if self.image_embeds is not None:
            if self.prior:
                raise ValueError("prior=True and image_embeds were both given; an image embedding needs no prior")
            given["prior"] = False
        settings = able.defaults.updated(given, "request")
        check_settings(settings, able)
        if self.image_embeds is None and settings.prior and self.prompt is None:
            raise ValueError("the prior reads the prompt as text; give prompt as well, or prior=False")
        if settings.clip_guidance_scale and self.prompt is None:
            raise ValueError("clip_guidance_scale needs the prompt as text; give prompt as well, or leave it out")
        self._warn_ignored(settings)
        return settings

    def _warn_ignored(self, settings: Settings) -> None:
        image = settings.prior or self.image_embeds is not None
        unheard: list[tuple[bool, str, tuple[str, ...]]] = [
            (settings.guidance_scale == 1, "guidance_scale is 1", GUIDED),
            (settings.guidance_rule == "autoguidance", "autoguidance has another null", NULLS),
            (settings.guidance_rule != "cfg_zero", "guidance_rule is not cfg_zero", ("zero_init_steps",)),
            (settings.guidance_rule != "apg", "guidance_rule is not apg", APG),
            (not settings.thresholding, "thresholding is 0", ("dynamic_thresholding_ratio",)),
            (not settings.s_churn, "s_churn is 0", ("s_tmin", "s_tmax", "s_noise")),
            (self.prompt_embeds is not None, "prompt_embeds was given", ("clip_skip",)),
            (not settings.prior, "the prior is off", PRIORS),
            (not image and bool(self.noise_level), "the prior is off", ("noise_level",)),
        ]
        for holds, reason, names in unheard:
            for name in names:
                if holds and getattr(self, name) is not None:
                    warnings.warn(f"{name} is ignored: {reason}", UserWarning, stacklevel=4)

    def _check_tensors(self, settings: Settings, able: Abilities, num_prompts: int, n: int) -> None:
        cells = (settings.height // able.size_multiple, settings.width // able.size_multiple)
        shape_of("latents", self.latents, (num_prompts * n, able.latent_channels, *cells))
        if able.embedding_width is None:
            for name in ("image_embeds", "prior_latents"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} was given, but this model takes no image embedding; leave it out")
        else:
            shape_of("prior_latents", self.prior_latents, (num_prompts * n, able.embedding_width))
            shape_of("image_embeds", self.image_embeds, (num_prompts, able.embedding_width))
        length, width = able.text_shape
        words, null = self.prompt_embeds, self.negative_prompt_embeds
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
            raise ValueError(f"seed has {len(starts)} numbers for {num_prompts} prompts; give one, or one for each")
    return tuple(start + k for start in starts for k in range(n))


def check_settings(settings: Settings, able: Abilities) -> None:
    """Refuse settings this model cannot paint with (ValueError)."""
    for name in ("height", "width"):
        pixels = whole(name, getattr(settings, name), 1)
        if pixels % able.size_multiple:
            below = max(pixels // able.size_multiple, 1) * able.size_multiple
            raise ValueError(
                f"{name}={pixels} cannot be halved into latents; give a multiple of {able.size_multiple}, "
                f"such as {below}"
            )
    texts("negative_prompt", settings.negative_prompt)
    whole("num_inference_steps", settings.num_inference_steps, 1, able.max_steps)
    real("guidance_scale", settings.guidance_scale, 1.0, hint="1 turns guidance off")
    real("guidance_rescale", settings.guidance_rescale, 0.0, 1.0)
    one_of("guidance_rule", settings.guidance_rule, list(RULES))
    if settings.guidance_rule == "autoguidance" and not able.can_autoguide:
        raise ValueError("guidance_rule=autoguidance needs a weaker UNet; load the model with weak_unet=FOLDER")
    whole("zero_init_steps", settings.zero_init_steps, 0, settings.num_inference_steps)
    real("apg_eta", settings.apg_eta, 0.0, 1.0)
    real("apg_norm_threshold", settings.apg_norm_threshold, 0.0)
    real("apg_momentum", settings.apg_momentum, -1.0, 1.0)
    if real("clip_guidance_scale", settings.clip_guidance_scale, 0.0) and not able.can_rank:
        raise ValueError("clip_guidance_scale was given, but this model has no clip/ to guide by; leave it out")
    real("thresholding", settings.thresholding, 0.0)
    if real("dynamic_thresholding_ratio", settings.dynamic_thresholding_ratio, 0.0, 1.0) == 0:
        raise ValueError(
            "dynamic_thresholding_ratio=0 is out of range; give a share above 0, or thresholding=0 for off"
        )
    one_of("sampler", settings.sampler, sorted(SAMPLERS))
    check_sampler_options(settings)
    if settings.guidance_interval is not None:
        interval = settings.guidance_interval
        if not isinstance(interval, tuple) or len(interval) != 2:
            raise ValueError(f"guidance_interval={interval} is not a pair (lowest, highest) of noise levels")
        low, high = (real("guidance_interval", end, 0.0) for end in interval)
        if low > high:
            raise ValueError(f"guidance_interval={interval} is upside down; give (lowest, highest) noise level")
    if settings.clip_skip is not None:
        whole("clip_skip", settings.clip_skip, 0, able.text_layers - 1)
    if not isinstance(settings.prior, bool):
        raise ValueError(f"prior={settings.prior!r}; give True, False or None")
    if settings.prior:
        if able.prior_max_steps == 0:
            raise ValueError("prior=True, but this model has no prior; leave prior out, or give image_embeds")
        whole("prior_num_inference_steps", settings.prior_num_inference_steps, 1, able.prior_max_steps)
        real("prior_guidance_scale", settings.prior_guidance_scale, 1.0, hint="1 turns guidance off")
    whole("noise_level", settings.noise_level, 0, max(able.num_noise_levels - 1, 0))


def check_sampler_options(settings: Settings) -> None:
    """Refuse options that this sampler does not take or that do not go together (ValueError)."""
    options = settings.sampler_options
    for name, value in options.items():
        real(name, value, 0.0, 1.0 if name == "eta" else math.inf)
        if name not in SAMPLERS[settings.sampler].defaults:
            takes = ", ".join(known for known, sampler in sorted(SAMPLERS.items()) if name in sampler.defaults)
            raise ValueError(f"{name}={value}, but sampler '{settings.sampler}' takes none; choose from: {takes}")
    low, high = options.get("s_tmin", 0.0), options.get("s_tmax", math.inf)
    if low > high:
        raise ValueError(f"s_tmin={low} is above s_tmax={high}; give the lowest level churned and the highest")
    if options.get("eta", 0.0) > 0 and options.get("s_churn", 0.0) > 0:  # a step's noise is spent once
        told = f"eta={options['eta']} and s_churn={options['s_churn']}"
        raise ValueError(f"{told} were both given, and each would spend the noise of a step; set one of them to 0")


def texts(name: str, value: object) -> tuple[str, ...]:
    """One text or a list of them as a tuple, else ValueError."""
    given = (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
    for text in given:
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}; give a text or a list of texts")
    return given


def entries(tensor: Tensor | None) -> dict[int, Tensor]:
    """The entries of a tensor along its first axis, by their index; none of one that was not given."""
    return {} if tensor is None else dict(enumerate(tensor.unbind(0)))


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` if it is a whole number of [low, high] (None: no end), else ValueError."""
    allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number of {low} or more"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r} is out of range; give {allowed}")
    return value


def is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Whether it is a finite number of [low, high]."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type, operator]


def real(name: str, value: object, low: float, high: float = math.inf, hint: str = "") -> float:
    """`value` if it is a finite number of [low, high], else ValueError."""
    if not is_number(value, low, high):
        allowed = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of {low:g} or more"
        raise ValueError(f"{name}={value!r} is out of range; give {allowed}" + (f" ({hint})" if hint else ""))
    return float(value)  # type: ignore[arg-type]


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} '{value}' is unknown; choose from: {', '.join(choices)}")


def shape_of(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """ValueError unless `tensor` is None or a finite tensor of `shape`."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; give a torch tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give {shape}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has numbers that are not finite; give finite ones")
