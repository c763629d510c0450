"""A single .safetensors file of Stable Diffusion 1, 2, XL or its refiner, in its authors' layout, as parts of a folder.

Which family a file is, its names and shapes tell. Weights are renamed by diffusers' own converters; what no file of
weights says (sizes, scheduler, tokenizer) is in a folder of configurations: the family's, which comes with this
package, or one that the user names. The vocabulary is open_clip's, where that folder has none. Nothing is fetched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

from clip_core.convert import clip_tokenizer
from clip_core.fit import check_sizes, named
from clip_core.load import load_tokenizer
from clip_core.weights import PICKLES, fill, read_json, shapes
from gen.card import CARD, Card
from gen.checkpoint import Parts
from gen.model_folder import ASSETS
from gen.model_index import INDEX, listed, part_class
from gen.part import load_settings, unfilled
from gen.room import check_room
from gen.weights import damaged, read

logger = logging.getLogger(__name__)

CONFIGS = ASSETS / "configs"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
LATENT_CHANNELS = 4  # those that a text-to-image UNet takes
CLIP_KIND, OPEN_CLIP_KIND = "transformer.", "model."  # how a text tower's names go on, by the library that trained it
# Beside the parts in a file: a schedule's tables, an average of the UNet that diffusers leaves as well, CLIP's scale.
IDLE = (
    *("model_ema.", "alphas_", "betas", "log_", "logvar", "posterior_", "sqrt_", "denoiser.", "scale_factor"),
    *("cond_stage_model.", "conditioner.", "global_step"),
)
SAYS_V = ("v_pred", "ztsnr")  # names without a use of their own: that the UNet predicts v


@dataclass(frozen=True)
class Layout:
    """How a family's files are laid out."""

    name: str
    pipeline: str  # the class of the configurations' index
    config: str  # the configurations that come with this package
    prefixes: Mapping[str, str]  # of each part's names


LAYOUTS = (
    Layout(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        "stable-diffusion-xl-base-1.0",
        {
            "unet": UNET,
            "vae": VAE,
            "text_encoder": f"conditioner.embedders.0.{CLIP_KIND}",
            "text_encoder_2": f"conditioner.embedders.1.{OPEN_CLIP_KIND}",
        },
    ),
    Layout(
        "Stable Diffusion 1",
        "StableDiffusionPipeline",
        "stable-diffusion-v1-5",
        {"unet": UNET, "vae": VAE, "text_encoder": f"cond_stage_model.{CLIP_KIND}"},
    ),
    Layout(
        "Stable Diffusion 2",
        "StableDiffusionPipeline",
        "stable-diffusion-2-1",
        {"unet": UNET, "vae": VAE, "text_encoder": f"cond_stage_model.{OPEN_CLIP_KIND}"},
    ),
    Layout(
        "Stable Diffusion XL's refiner",
        "StableDiffusionXLImg2ImgPipeline",
        "stable-diffusion-xl-refiner-1.0",
        {"unet": UNET, "vae": VAE, "text_encoder_2": f"conditioner.embedders.0.{OPEN_CLIP_KIND}"},
    ),
)
OTHERS = {  # what a name that begins so is of
    "lora_": "a LoRA, which load_lora takes",
    "control_model.": "a ControlNet",
    "edm_mean": "Playground 2.5, whose noise levels are EDM's",
    "noise_augmentor.": "Stable unCLIP; give its diffusers folder",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "down_blocks.": "one part in diffusers' layout; give the folder of the whole model",
    "text_model.": "a text tower alone",
}


def is_single(name_or_path: str | Path) -> bool:
    """Whether this is a file, and so no folder, bundled name or hub id."""
    return Path(name_or_path).expanduser().is_file()


def layout_of(path: Path, held: Mapping[str, tuple[int, ...]]) -> Layout:
    """The family of a file by the names and shapes it holds; ValueError of one line where it is none of ours."""
    for begins, what in OTHERS.items():
        if any(name.startswith(begins) for name in held):
            raise ValueError(f"model file '{path}' is of {what}; single files are read of: {_families()}")

    def lacking(layout: Layout) -> list[str]:
        return [part for part, prefix in layout.prefixes.items() if not any(name.startswith(prefix) for name in held)]

    layout = min(LAYOUTS, key=lambda each: len(lacking(each)))
    if FIRST not in held or "text_encoder" in lacking(layout):
        raise ValueError(f"model file '{path}' is of no family known here; single files are read of: {_families()}")
    if lacks := lacking(layout):
        raise ValueError(f"model file '{path}' is of {layout.name} and has no {', '.join(lacks)}; it is not complete")
    if (taken := held[FIRST][1]) != LATENT_CHANNELS:
        raise ValueError(
            f"model file '{path}' has a UNet that takes {taken} channels, as those for inpainting, depth or editing "
            f"do; a text-to-image one takes {LATENT_CHANNELS}"
        )
    if layout.pipeline == "StableDiffusionPipeline" and f"{UNET}label_emb.0.0.weight" in held:
        raise ValueError(f"model file '{path}' has a UNet with a class input, as Stable unCLIP has; give its folder")
    return layout


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: str | Path | None = None,
) -> Parts:
    """Load every part of a file; what is unknown, missing or damaged is a ValueError that names it.

    `config` is a diffusers folder, of which configurations and tokenizers are read and no weights, or the name of one
    that comes with this package; None: that of the file's family.
    """
    path = Path(path).expanduser()
    layout, folder = opened(path, config)
    index = read_json(folder / INDEX)
    modules: dict[str, Any] = {}
    check_room(sum(parameters(shapes(path), layout).values()), device, dtype, str(path))
    for name, (library, class_name) in listed(index).items():
        kind = part_class(library, class_name, folder / INDEX)
        if issubclass(kind, CLIPTokenizer):
            modules[name] = tokenizer_of(folder / name)
        elif issubclass(kind, nn.Module):
            if name not in layout.prefixes:
                raise ValueError(f"config '{folder}' lists {name}, which no file of {layout.name} holds")
            network = network_of(kind, folder / name, path, layout.prefixes[name], dtype)
            modules[name] = network.to(device).eval().requires_grad_(False)
        else:
            modules[name] = load_settings(kind, folder / name)
    options = {name: value for name, value in index.items() if not isinstance(value, list)}
    return Parts(layout.pipeline, modules, None, Card(), path, options, files(path, folder))


def files(path: Path, folder: Path) -> dict[str, Path]:
    """All that a model of this file and these configurations depends on, by name."""
    others = sorted([*folder.glob("**/*.json"), *folder.glob("**/*.txt")])
    return {"weights": path, **{file.relative_to(folder).as_posix(): file for file in others if file.name != CARD}}


def opened(path: Path, config: str | Path | None) -> tuple[Layout, Path]:
    """A file's layout and its folder of configurations, by its header alone."""
    if path.suffix in PICKLES:
        raise ValueError(f"model file '{path}' is pickle and is never read; convert it to .safetensors")
    if path.suffix != ".safetensors":
        raise ValueError(f"model file '{path}' is not a .safetensors file; give one, a diffusers folder or a hub id")
    held = shapes(path)
    layout = layout_of(path, held)
    if config is None and (says := [name for name in SAYS_V if name in held]):
        raise ValueError(
            f"model file '{path}' says '{says[0]}' and so predicts v; give config=FOLDER whose scheduler says "
            "prediction_type v_prediction"
        )
    known = (*layout.prefixes.values(), *IDLE, *SAYS_V)
    if extra := sorted(name for name in held if not name.startswith(known)):
        logger.warning("model file '%s' has more than its family: %s not read", path, named(extra))
    return layout, config_folder(layout, config)


def config_folder(layout: Layout, config: str | Path | None) -> Path:
    """Where a file's configurations are; ValueError for one that is missing or of another family."""
    folder = CONFIGS / layout.config if config is None else CONFIGS / config
    if not (folder / INDEX).is_file():
        folder = Path(config or "").expanduser()
    if not (folder / INDEX).is_file():
        names = ", ".join(sorted(each.parent.name for each in CONFIGS.glob(f"*/{INDEX}")))
        raise ValueError(f"config '{config}' is no folder with a {INDEX}; give one, or one of: {names}")
    if (family := read_json(folder / INDEX).get("_class_name")) != layout.pipeline:
        raise ValueError(f"config '{folder}' is of a {family}, and the file is {layout.name}'s, a {layout.pipeline}")
    return folder


def network_of(kind: Any, config: Path, path: Path, prefix: str, dtype: torch.dtype) -> nn.Module:
    """One network of a file, of the sizes that its configuration says; it has to find every weight."""
    network_config = read_json(config / "config.json")
    check_sizes(network_config, f"config '{config}'")
    what = f"{config.name} of model file '{path}'"
    with damaged(config):
        network = unfilled(kind, network_config)
    weights = read(path, [prefix])
    try:
        converted = _converted(network, weights, prefix, network_config)
    except (KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{what} does not fit '{config}' ({error}); give config=FOLDER of its own sizes") from error
    return fill(network, converted, what, dtype)


def _converted(
    network: nn.Module, weights: dict[str, Tensor], prefix: str, config: dict[str, Any]
) -> dict[str, Tensor]:
    """Weights by the names of diffusers and transformers."""
    if isinstance(network, UNet2DConditionModel):
        return dict(convert_ldm_unet_checkpoint(weights, config))
    if isinstance(network, AutoencoderKL):
        return dict(convert_ldm_vae_checkpoint(weights, config))
    if prefix.endswith(CLIP_KIND):
        converted = convert_ldm_clip_checkpoint(weights)
    else:
        converted = convert_open_clip_checkpoint(network, weights, prefix=prefix)
    if not hasattr(network, "text_model"):  # transformers 5 has the tower itself there
        converted = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    return dict(converted)


def tokenizer_of(folder: Path) -> CLIPTokenizer:
    """A folder's tokenizer; where it has no vocabulary, CLIP's own, padded as its configuration says."""
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return load_tokenizer(folder)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    return clip_tokenizer(tokenizer_config["model_max_length"], tokenizer_config["pad_token"])


def parameters(held: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, int]:
    """How many numbers each part of a file holds."""
    return by_part({name: prod(shape) for name, shape in held.items()}, layout)


def by_part(amounts: Mapping[str, int], layout: Layout) -> dict[str, int]:
    """How much each part of a file holds, by how much each of its tensors does."""
    return {
        part: sum(amount for name, amount in amounts.items() if name.startswith(prefix))
        for part, prefix in layout.prefixes.items()
    }


def _families() -> str:
    return ", ".join(sorted(layout.name for layout in LAYOUTS))
