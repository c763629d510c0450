"""What was asked: `Request`, the user's words, unchecked, and `Job`, what `gen.resolve` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gen.candidate import Candidate
from gen.search import BestOf, Search
from gen.source import Picture


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

    @property
    def has_embedding(self) -> bool:
        """Whether an image embedding comes from elsewhere than a prior."""
        return self.image_embeds is not None or self.variation_of is not None

    @property
    def is_whole(self) -> bool:
        """Whether it ends with a picture, and not on the way."""
        return self.denoising_end in (None, 1)


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
