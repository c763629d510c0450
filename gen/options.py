"""The words of a request, and of the model that paints it, as options of the command line.

Owns: how each is written there, its help, its place in --help, and what it is where it is not given: None, and the
model's own, but for a few. `with_options` shows typer all of them where a verb says `**words`, and `typed` tells others
what is typed for a word. Here no word is checked. It must not import torch, for `--help` answers at once.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

Verb = TypeVar("Verb", bound=Callable[..., None])

Config = Annotated[
    str | None, typer.Option(metavar="DIR", help="Configurations of a single file, if not its family's: a folder.")
]


def _advanced(metavar: str | None, help: str, *names: str) -> Any:
    """An option that few need; --help has them in a panel of their own."""
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel="Advanced")


# By the word of a request or of its model, in the order of --help. One without a name of its own is typed with dashes.
OPTIONS: dict[str, Any] = {
    "num_images_per_prompt": Annotated[
        int | None,
        typer.Option("-n", "--num-images", metavar="N", help="Candidates (default: 16)."),
    ],
    "keep": Annotated[
        int | None, typer.Option(metavar="K", help="Best candidates to keep (default: 4, or all of fewer).")
    ],
    "num_inference_steps": Annotated[int | None, typer.Option("--steps", metavar="N", help="Decoder steps.")],
    "guidance_scale": Annotated[
        float | None, typer.Option("--guidance", metavar="W", help="Weight of the prompt against the null; 1 is off.")
    ],
    "seed": Annotated[int, typer.Option(metavar="S", help="Candidate k is painted from seed S + k.")],
    "sampler": Annotated[
        str | None, typer.Option(metavar="NAME", help="euler, ddim, dpmpp_2m, ...; a wrong name lists all.")
    ],
    "model": Annotated[
        str,
        typer.Option("--model", "-m", metavar="NAME", help="Bundled name, diffusers folder, .safetensors or hub id."),
    ],
    "search": Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which go on: best_of, halving, draft, racing, feynman_kac, zero_order."),
    ],
    "budget": Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Paint as many candidates as fit, one at least; with -n, N at most."),
    ],
    "diverse": Annotated[bool, typer.Option("--diverse/--no-diverse", help="Keep no near-copies.")],
    "prior": Annotated[
        bool | None,
        typer.Option("--prior/--no-prior", help="Through an image embedding (unCLIP), or from the text alone."),
    ],
    "prior_num_inference_steps": Annotated[int | None, typer.Option("--prior-steps", metavar="N", help="Prior steps.")],
    "prior_guidance_scale": Annotated[
        float | None, typer.Option("--prior-guidance", metavar="W", help="Prior guidance; 1 is off.")
    ],
    "super_res_num_inference_steps": Annotated[
        int | None, typer.Option("--super-res-steps", metavar="N", help="Super-resolution steps.")
    ],
    "negative_prompt": Annotated[
        str | None,
        typer.Option("--negative", metavar="TEXT", help="What to steer away from, in place of the empty text."),
    ],
    "image": Annotated[Path | None, typer.Option(metavar="FILE", help="Begin with this picture (img2img).")],
    "mask_image": Annotated[
        Path | None,
        typer.Option("--mask", metavar="FILE", help="Paint --image anew where this is white, as large as it."),
    ],
    "strength": Annotated[
        float | None, typer.Option(metavar="S", help="How far from --image, above 0 and up to 1 (1: all steps).")
    ],
    "variation_of": Annotated[
        Path | None, typer.Option(metavar="FILE", help="Paint what CLIP sees in this picture, in place of a prior.")
    ],
    "interpolate_image": Annotated[Path | None, _advanced("FILE", "Go from --variation-of towards this picture.")],
    "interpolate_prompt": Annotated[str | None, _advanced("TEXT", "Go from PROMPT towards this one.")],
    "prompt_weights": Annotated[
        bool | None, typer.Option("--prompt-weights", help="(word:1.3), (word) count more, [word] less; \\( is itself.")
    ],
    "long_prompts": Annotated[
        bool | None, typer.Option("--long-prompts", help="Read texts too long for the model in pieces.")
    ],
    "interpolation": Annotated[float | None, _advanced("T", "How far to go there, 0 to 1 (default: half way).")],
    "edit_from": Annotated[
        str | None, _advanced("TEXT", "What --variation-of shows, where PROMPT says what it should.")
    ],
    "edit_amount": Annotated[float | None, _advanced("T", "How far to turn it there (default: 0.3).")],
    "noise_level": Annotated[int | None, _advanced("N", "Timesteps of noise on the image embedding (unCLIP).")],
    "prior_best_of": Annotated[int | None, _advanced("K", "Best of K answers of the prior, by CLIP.")],
    "clip_skip": Annotated[int | None, _advanced("N", "Last layers of the text tower to leave out.")],
    "prompt_2": Annotated[str | None, _advanced("TEXT", "What XL's second text tower reads, if not PROMPT.")],
    "negative_prompt_2": Annotated[str | None, _advanced("TEXT", "The same of --negative.", "--negative-2")],
    "original_size": Annotated[
        tuple[int, int] | None, _advanced("PX PX", "Height and width that XL is told a picture had.")
    ],
    "target_size": Annotated[tuple[int, int] | None, _advanced("PX PX", "And those that it should have.")],
    "crops_coords_top_left": Annotated[
        tuple[int, int] | None, _advanced("PX PX", "How much XL is told was cut off above and on the left.")
    ],
    "negative_original_size": Annotated[
        tuple[int, int] | None, _advanced("PX PX", "--original-size of what to steer away from.")
    ],
    "negative_target_size": Annotated[tuple[int, int] | None, _advanced("PX PX", "--target-size of it.")],
    "negative_crops_coords_top_left": Annotated[
        tuple[int, int] | None, _advanced("PX PX", "--crops-coords-top-left of it.")
    ],
    "aesthetic_score": Annotated[
        float | None, _advanced("SCORE", "What XL's refiner is told that the picture is worth (default: 6).")
    ],
    "negative_aesthetic_score": Annotated[
        float | None, _advanced("SCORE", "The same of what to steer away from (default: 2.5).")
    ],
    "width": Annotated[int | None, typer.Option(metavar="PX", help="Pixels across.")],
    "height": Annotated[int | None, typer.Option(metavar="PX", help="Pixels down.")],
    "vae_tiling": Annotated[
        bool | None,
        _advanced(
            None, "Large pictures through the autoencoder in tiles: less memory.", "--vae-tiling/--no-vae-tiling"
        ),
    ],
    "eta": Annotated[float | None, _advanced("E", "Fresh noise per step: 0 none, 1 ancestral.")],
    "s_churn": Annotated[float | None, _advanced("S", "Noise added and taken away again, over all steps.")],
    "s_tmin": Annotated[float | None, _advanced("SIGMA", "Lowest level churned.")],
    "s_tmax": Annotated[float | None, _advanced("SIGMA", "Highest level churned.")],
    "s_noise": Annotated[float | None, _advanced("D", "Deviation of what churn adds.")],
    "guidance_rule": Annotated[str | None, _advanced("RULE", "How to guide: cfg, cfg_zero, apg, autoguidance.")],
    "weak_unet": Annotated[Path | None, _advanced("DIR", "autoguidance: folder of a weaker UNet.")],
    "draft_unet": Annotated[Path | None, _advanced("DIR", "--search draft: folder of a UNet or LoRA for them.")],
    "guidance_rescale": Annotated[float | None, _advanced("R", "Keep the prompt's own contrast; 0 is off.")],
    "guidance_interval": Annotated[
        tuple[float, float] | None, _advanced("LOW HIGH", "Guide where LOW < noise level <= HIGH.")
    ],
    "zero_init_steps": Annotated[int | None, _advanced("N", "cfg_zero: first steps of output 0.")],
    "apg_eta": Annotated[float | None, _advanced("E", "apg: share kept of guidance along the estimate.")],
    "apg_norm_threshold": Annotated[float | None, _advanced("R", "apg: largest norm of guidance; 0 is any.")],
    "apg_momentum": Annotated[float | None, _advanced("B", "apg: what earlier steps' guidance counts.")],
    "clip_guidance_scale": Annotated[
        float | None, _advanced("W", "By the gradient of CLIP's score, some 5 to 10; slow. 0 is off.")
    ],
    "thresholding": Annotated[
        float | None, _advanced("BOUND", "Dynamic thresholding: what clean values keep within; 0 is off.")
    ],
    "dynamic_thresholding_ratio": Annotated[float | None, _advanced("P", "Share of values not clipped.")],
    "attention": Annotated[
        str, _advanced("NAME", "Attention's kernel: auto, sdpa, flash, cudnn, efficient, math, xformers, avx512.")
    ],
    "dtype": Annotated[
        str, _advanced("NAME", "What networks compute in: float32, bfloat16, float16; the lower two change pixels.")
    ],
    "runtime": Annotated[
        str,
        _advanced("NAME", "Who computes them: torch, compile, or openvino on CPUs (pip install 'unclip[openvino]')."),
    ],
    "prior_model": Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The prior, where it is apart (Kandinsky, Stable unCLIP): folder or hub id."),
    ],
    "rerank": Annotated[bool, typer.Option("--rerank/--no-rerank", help="Let CLIP choose among them.")],
    "clip": Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="CLIP or SigLIP that ranks, if not its own: folder, hub id, open_clip:NAME/TAG."
        ),
    ],
    "lora": Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="LoRA to merge into the model; repeatable.")
    ],
    "config": Config,
    "embedding": Annotated[
        list[str] | None, typer.Option(metavar="FILE[:TOKEN]", help="Textual inversion: a learned word; repeatable.")
    ],
    "ip_adapter": Annotated[
        str | None, typer.Option(metavar="FILE[:SCALE]", help="IP-Adapter that shows --ip-image beside PROMPT.")
    ],
    "ip_adapter_image": Annotated[
        Path | None, typer.Option("--ip-image", metavar="IMAGE", help="The picture an IP-Adapter shows.")
    ],
    "image_encoder": Annotated[
        Path | None, _advanced("DIR", "IP-Adapter's image encoder (default: image_encoder/ beside it).", "--ip-encoder")
    ],
}

DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "model": "shapes64",
    "diverse": False,
    "attention": "auto",
    "dtype": "float32",
    "runtime": "torch",
    "rerank": True,
}


def typed(word: str) -> str:
    """What is typed for a word: `--steps` for `num_inference_steps`; of a flag, what says yes."""
    return _names(word)[0]


def flags(word: str) -> dict[bool, str]:
    """What is typed where a word is True, and where there is something for that, False; empty for any other word."""
    kind = get_args(OPTIONS[word])[0]
    return dict(zip((True, False), _names(word), strict=False)) if bool in (kind, *get_args(kind)) else {}


def _names(word: str) -> list[str]:
    """The first name of a word's option, and of a flag the one that says no."""
    option = get_args(OPTIONS[word])[1]
    # typer.Option takes its first name in a default's place, and leaves it there
    name = f"--{word.replace('_', '-')}" if option.default is ... else option.default
    return str(name).split("/")


def with_options(*without: str) -> Callable[[Verb], Verb]:
    """A verb to which typer hands all words of OPTIONS but some: what it names itself, the others in its `**words`.

    Its own arguments come first in --help, its own options last; the latter are keyword-only.
    """

    def dressed(verb: Verb) -> Verb:
        own = inspect.signature(verb).parameters
        assert any(each.kind is each.VAR_KEYWORD for each in own.values()), f"{verb.__name__} takes no **words"
        shown = [each for each in own.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
        for word, option in OPTIONS.items():
            assert word not in own or own[word].annotation == get_args(option)[0], f"{word} is of two types"
            if word not in without:
                default = DEFAULTS.get(word)
                shown.append(
                    inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)
                )
        shown += [each for each in own.values() if each.kind is each.KEYWORD_ONLY and each.name not in OPTIONS]
        verb.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        return verb

    return dressed
