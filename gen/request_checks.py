"""What of a request does not go together, or not with the model that is asked; and what of it is not read.

Each check is a ValueError of one line. One value by itself is `gen.checks`' matter, settings are `gen.settings`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gen.candidate import SHOWN, SHOWN_PICTURE, check_seeing, check_shown
from gen.checks import shape_of
from gen.prompts import parse
from gen.request import Request
from gen.settings import SCORES, SIZES, Abilities, Settings
from gen.source import Source, check_mask, check_sized

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

Pictures = Mapping[str, Sequence[Source | None]]
"""Those of each prompt, by their names in `PICTURES`"""


def check_beginning(request: Request, abilities: Abilities) -> None:
    """Refuse a prior beside another's image embedding, and a picture to a model that cannot begin with one."""
    if request.prior and request.has_embedding:
        name = "image_embeds" if request.variation_of is None else "variation_of"
        raise ValueError(f"prior=True and {name} were both given; an image embedding needs no prior")
    if request.image is not None and abilities.strength is None:
        raise ValueError("image was given, but this model cannot begin with a picture; leave it out")


def check_conditions(request: Request, settings: Settings, abilities: Abilities) -> None:
    """Refuse what leaves a network without something that it is to be told: a text, an image embedding or a null."""
    if not request.has_embedding and settings.prior and request.prompt is None:
        raise ValueError("the prior reads the prompt as text; give prompt as well, or prior=False")
    if abilities.needs_image and not request.has_embedding and not settings.prior:
        problem, cure = "this model has no prior and", "give image_embeds or variation_of"
        if abilities.prior_max_steps:
            problem, cure = "without its prior this model", "leave prior=False out"
        elif abilities.takes_null_image:
            cure = "give image_embeds, or load it with prior_model=NAME"
        raise ValueError(f"{problem} paints nothing from a text alone; {cure}")
    if request.variation_of is not None:
        check_seeing(settings, abilities)
    is_lacking = abilities.takes_null_image and not abilities.has_null_image and request.negative_image_embeds is None
    if is_lacking and settings.guidance_scale != 1:
        problem = "without its prior this model has no image to be guided away from"
        raise ValueError(f"{problem}; give negative_image_embeds, or guidance_scale=1")
    if request.prior_latents is not None and settings.num_prior_samples > 1:
        raise ValueError("prior_latents are the start of one answer of the prior, but several are asked for")
    if settings.clip_guidance_scale and request.prompt is None:
        raise ValueError("clip_guidance_scale needs the prompt as text; give prompt as well, or leave it out")


def check_variation(request: Request) -> None:
    """Refuse what makes or moves an image embedding, where it lacks what it goes with or meets what it stands for."""
    for name, wanted in (("interpolate_image", "variation_of"), ("edit_from", "variation_of")):
        if getattr(request, name) is not None and getattr(request, wanted) is None:
            raise ValueError(f"{name} was given without {wanted}; give the picture to begin from with {wanted}")
    for name, wanted in (("interpolate_prompt", "prompt"), ("edit_from", "prompt")):
        if getattr(request, name) is not None and request.prompt is None:
            raise ValueError(f"{name} was given without {wanted}; give it in words as well")
    if request.interpolate_prompt is not None and (request.has_embedding or request.prompt_embeds is not None):
        problem = "interpolate_prompt goes from the prompt in words"
        raise ValueError(f"{problem}; leave out what stands in its place, or use interpolate_image between pictures")
    if request.interpolation is not None and request.interpolate_prompt is None and request.interpolate_image is None:
        raise ValueError("interpolation was given without interpolate_prompt or interpolate_image; give one of them")
    if request.edit_amount is not None and request.edit_from is None:
        raise ValueError("edit_amount was given without edit_from; say what the picture shows")
    if request.variation_of is not None and request.image_embeds is not None:
        raise ValueError("variation_of and image_embeds were both given; give one of them")
    for name in ("interpolate_prompt", "edit_from"):
        if isinstance(text := getattr(request, name), str) and not text.strip():
            raise ValueError(f"{name} is empty ({text!r}); give it in words, or leave it out")


def check_pictures(request: Request, settings: Settings, abilities: Abilities, pictures: Pictures) -> None:
    """Refuse a picture or a mask where the other lacks, or in a form in which it cannot be painted from."""
    if request.image is None:
        for name in ("mask_image", "strength"):
            if getattr(request, name) is not None:
                raise ValueError(f"{name} was given without image; give the picture as well, or leave {name} out")
    if abilities.needs_picture and request.image is None:
        raise ValueError("this model refines a picture and paints none from words alone; give image")
    if abilities.inpaints_alone and (request.image is None or request.mask_image is None):
        raise ValueError("this model paints a part of a picture anew and does nothing else; give image and mask_image")
    for image, mask in zip(pictures["image"], pictures["mask_image"], strict=True):
        if image is not None:
            check_sized("image", image, settings.height, settings.width)
        if image is not None and mask is not None:
            check_mask(mask, image, settings.height, settings.width, abilities.size_multiple)


def check_reading(request: Request, settings: Settings, texts: Sequence[str]) -> None:
    """Refuse texts that cannot be weighed, and embeddings in their place where they are to be read in pieces."""
    if settings.prompt_weights:
        for text in dict.fromkeys(texts):
            if text and not any(part.text.strip() for part in parse("prompt", text)):
                raise ValueError(f"prompt {text!r} has brackets and no words; say in words what to paint")
    given = next((name for name in POOLED if getattr(request, name) is not None), None)
    if settings.long_prompts and given:
        raise ValueError(f"long_prompts=True and {given} were both given; give texts, or embeddings of all of them")


def check_tensors(request: Request, settings: Settings, abilities: Abilities, num_prompts: int, n: int) -> None:
    """Refuse tensors that the model does not take, or in other shapes: `n` noises and one of the rest a prompt."""
    cells = (settings.height // abilities.cell_size, settings.width // abilities.cell_size)
    shape_of("latents", request.latents, (num_prompts * n, abilities.latent_channels, *cells))
    if abilities.embedding_width is None:
        for name in ("image_embeds", "prior_latents"):
            if getattr(request, name) is not None:
                raise ValueError(f"{name} was given, but this model takes no image embedding; leave it out")
    else:
        shape_of("prior_latents", request.prior_latents, (num_prompts * n, abilities.embedding_width))
        shape_of("image_embeds", request.image_embeds, (num_prompts, abilities.embedding_width))
        shape_of("negative_image_embeds", request.negative_image_embeds, (num_prompts, abilities.embedding_width))
    if request.negative_image_embeds is not None and not abilities.takes_null_image:
        raise ValueError("negative_image_embeds was given, but this model is guided away from a text; leave it out")
    if abilities.super_res_max_steps:
        large = (abilities.latent_channels, settings.height, settings.width)
        shape_of("super_res_latents", request.super_res_latents, (num_prompts * n, *large))
    check_ip_adapter(request, abilities, num_prompts)
    check_text_tensors(request, abilities, num_prompts)


def check_ip_adapter(request: Request, abilities: Abilities, num_prompts: int) -> None:
    """Refuse what an IP-Adapter is to show where there is none, where it comes twice or in another shape."""
    if request.ip_adapter_image is not None:
        check_shown(abilities)
        if request.ip_adapter_image_embeds is not None:
            raise ValueError(f"{SHOWN_PICTURE} and {SHOWN} were both given; give one of them")
    if abilities.ip_adapter_shape is not None:
        shape_of(SHOWN, request.ip_adapter_image_embeds, (num_prompts, *abilities.ip_adapter_shape))
    elif request.ip_adapter_image_embeds is not None:
        raise ValueError(f"{SHOWN} was given, but this model has no IP-Adapter; load one with load_ip_adapter")


def check_text_tensors(request: Request, abilities: Abilities, num_prompts: int) -> None:
    """Refuse embeddings of texts that the model does not take, or not alone, or not in this shape."""
    words, null = request.prompt_embeds, request.negative_prompt_embeds
    if abilities.text_shape is None:
        for name in (*POOLED, *POOLED.values()):
            if getattr(request, name) is not None:
                raise ValueError(f"{name} was given, but this model reads its texts itself; give them as text")
        return
    length, width = abilities.text_shape
    if isinstance(words, Tensor) and words.ndim == 3 and null is not None:
        length = words.shape[1]  # any length, when words and null agree on it
    shape_of("prompt_embeds", words, (num_prompts, length, width))
    shape_of("negative_prompt_embeds", null, (num_prompts, length, width))
    for name, pooled in POOLED.items():
        if abilities.pooled_width is None:
            if getattr(request, pooled) is not None:
                raise ValueError(f"{pooled} was given, but this model takes no pooled text; leave it out")
        elif (getattr(request, name) is None) != (getattr(request, pooled) is None):
            raise ValueError(f"this model takes {name} and {pooled} together; give both or none")
        else:
            shape_of(pooled, getattr(request, pooled), (num_prompts, abilities.pooled_width))


def ignored(request: Request, settings: Settings, abilities: Abilities) -> list[tuple[str, str]]:
    """What was given and is not read, by name, and why."""
    image = settings.prior or request.has_embedding
    by_prior = settings.prior and abilities.prior_reads_negative
    reads_negative = by_prior or (abilities.reads_text and settings.guidance_scale != 1)
    unread = "guidance_scale is 1" if abilities.reads_text else "the prior is off"
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
        (request.prompt_embeds is not None, "prompt_embeds was given", ("clip_skip", "prompt_2")),
        (settings.denoising_start > 0, "denoising_start says where it begins", ("strength",)),
        (not settings.prior, "the prior is off", PRIORS),
        (not image and bool(request.noise_level), "the prior is off", ("noise_level",)),
        (not abilities.super_res_max_steps, "this model has no super resolution", SUPER_RES),
        (abilities.tells_score, "this model is told a score in its place", ("target_size", "negative_target_size")),
    ]
    return [
        (name, reason)
        for holds, reason, names in unheard
        for name in names
        if holds and getattr(request, name) is not None
    ]
