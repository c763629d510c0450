"""IP-Adapter (Ye et al. 2023): a picture beside the text, by keys and values of its own in every layer that reads one.

What a CLIP image tower says of a picture becomes a few tokens, which each cross-attention reads with weights of the
adapter's own and adds, `scale` times, to what it reads of the text. The scale is in the values, for attention is linear
in them. The plain kind reads CLIP's embedding, Plus and Full Face the tower's last states but one. What a layer does
with the keys and values is `gen.attention`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clip_core.fit import named
from clip_core.preprocess import CONFIG_NAME, Preprocess
from clip_core.weights import content_hash, read_json
from clip_core.wording import one_line
from gen.adapters.file import Adapter, Found, fetched, found, read
from gen.attention.network import text_layers
from gen.attention.processor import per_head
from gen.checks import finite_float
from gen.hub import needed
from gen.part import load_part
from gen.weights import damaged, named_folder, weight_files

USUAL = "ip-adapter_sd15.safetensors"
ENCODER = "image_encoder"  # the folder beside the file, as it is published
PROJECTION = "image_proj."
MARKS = {"proj.weight": "plain", "latents": "Plus", "proj.3.weight": "Full Face"}  # what the projection of each has
KEYS, VALUES = "ip_adapter.{}.to_k_ip.weight", "ip_adapter.{}.to_v_ip.weight"

Projection: TypeAlias = ImageProjection | IPAdapterPlusImageProjection | IPAdapterFullImageProjection


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """CLIP's image tower, and how pictures are brought to it."""

    tower: CLIPVisionModelWithProjection
    preprocess: Preprocess

    @property
    def num_states(self) -> int:
        """S of the tower's states: its patches, and one for all of them."""
        config = self.tower.config
        return (config.image_size // config.patch_size) ** 2 + 1

    def values(self, pixels: Tensor) -> Tensor:
        """What the tower takes (1, 3, h, w) for pixels (3, H, W) in [0, 1]."""
        return self.preprocess.from_pixels(pixels[None].to(self.tower.device)).to(self.tower.dtype)


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """A loaded IP-Adapter of one UNet."""

    projection: Projection  # (B, E) or (B, S, E) -> (B, T, D)
    layers: tuple[tuple[Tensor, Tensor], ...]  # weights (heads * d, D) of keys and scaled values, layer by layer
    encoder: ImageEncoder | None  # None: only embeddings can be given, and only of the plain kind

    @property
    def shape(self) -> tuple[int, ...]:
        """(E,) of CLIP's embedding, or (S, E) of its states."""
        width = width_of(self.projection)
        if not reads_states(self.projection):
            return (width,)
        assert self.encoder is not None, "an adapter that reads states is refused without one"
        return (self.encoder.num_states, width)

    def embed(self, pixels: Tensor) -> Tensor:
        """What is read of pixels (3, H, W) in [0, 1]: (E,) or (S, E) float32."""
        assert self.encoder is not None, "a picture is refused where there is none"
        return self._features(self.encoder, self.encoder.values(pixels))

    @torch.no_grad()
    def _features(self, encoder: ImageEncoder, values: Tensor) -> Tensor:
        if reads_states(self.projection):
            return encoder.tower(values, output_hidden_states=True).hidden_states[-2][0].float()
        return encoder.tower(values).image_embeds[0].float()

    @torch.no_grad()
    def tokens(self, embeds: Sequence[Tensor]) -> Tensor:
        """What the layers read of embeddings (E,) or (S, E), B of them: (B, T, D)."""
        like = self.layers[0][0]
        return self.projection(torch.stack([each.to(like) for each in embeds]))

    @cached_property
    def null(self) -> Tensor:
        """Tokens (T, D) that a null is shown, as in diffusers.

        They are of an embedding of zeros, or of the tower's states of a picture that is zeros where it takes it.
        """
        if not reads_states(self.projection):
            return self.tokens([torch.zeros(self.shape)])[0]
        assert self.encoder is not None, "an adapter that reads states is refused without one"
        size = self.encoder.tower.config.image_size
        nothing = torch.zeros_like(self.encoder.values(torch.zeros(3, size, size)))
        return self.tokens([self._features(self.encoder, nothing)])[0]

    @cached_property
    def blank(self) -> Tensor:
        """Tokens (T, D) that add nothing: keys and values have no bias, so zeros give zeros."""
        return torch.zeros_like(self.null)

    @torch.no_grad()
    def pairs(self, network: UNet2DConditionModel, pictures: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Keys and scaled values (2, heads, T, d) of every picture's tokens (T, D), of each layer that reads them."""
        tokens = torch.stack(list(pictures))  # (U, T, D)
        both = [
            torch.stack([per_head(F.linear(tokens, weight), layer.heads) for weight in weights], 1)
            for layer, weights in zip(text_layers(network), self.layers, strict=True)
        ]  # of each layer (U, 2, heads, T, d)
        return [tuple(of_layer[picture] for of_layer in both) for picture in range(len(tokens))]


def load(
    unet: UNet2DConditionModel, name: str | Path, scale: float = 1.0, image_encoder: str | Path | None = None
) -> tuple[IPAdapter, Adapter]:
    """Read an adapter for a UNet; ValueError for a file of another kind or of another base model.

    `image_encoder` is the folder of a CLIPVisionModelWithProjection; None: `image_encoder/` beside the file, if any, or
    of a hub repository the one that fits. Plus and Full Face need one.
    """
    scale = finite_float("scale", scale, -float("inf"))
    place = found("IP-Adapter", name, USUAL, beside=[f"*{ENCODER}/*.json"])
    tensors = read(place.path).tensors
    kind = kind_of(str(name), tensors)
    layers = layers_of(str(name), unet, tensors)
    projection = projection_of(str(name), unet, tensors)
    if image_encoder is None:
        folder = encoder_folder(str(name), place, projection)
    else:
        folder = named_folder("image_encoder", image_encoder)
    if folder is not None:
        check_encoder(str(name), folder, projection)
    elif reads_states(projection):
        problem = (
            f"reads the states of an image encoder, and there is no {ENCODER}/ beside it; give image_encoder=FOLDER"
        )
        raise ValueError(f"IP-Adapter '{name}' is of the kind {kind}, which {problem}")
    scaled = tuple((keys, values * scale) for keys, values in layers)
    adapter = IPAdapter(projection, scaled, None if folder is None else load_encoder(unet, folder))
    if folder is None or not reads_states(projection):  # pictures are painted by embeddings, whoever made them
        return adapter, Adapter("ip_adapter", str(name), content_hash(place.path), scale)
    digest = content_hash(place.path, *encoder_files(folder))
    encoder = None if image_encoder is None else str(image_encoder)
    return adapter, Adapter("ip_adapter", str(name), digest, scale, image_encoder=encoder)


def layers_of(
    name: str, unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Weights of keys and values, layer by layer; ValueError where they are not those of this UNet's layers."""
    layers, like = list(text_layers(unet)), unet.conv_in.weight
    if any(layer.added_kv_proj_dim is not None for layer in layers):
        raise ValueError(f"IP-Adapter '{name}' cannot be added: this UNet reads its text among the picture's own keys")
    numbers = range(1, 2 * len(layers), 2)  # self-attentions are counted too
    shapes = {KEYS.format(n): layer.to_k.weight.shape for n, layer in zip(numbers, layers, strict=True)}
    shapes |= {VALUES.format(n): layer.to_v.weight.shape for n, layer in zip(numbers, layers, strict=True)}
    given = {key for key in tensors if not key.startswith(PROJECTION)}
    for keys, which in ((shapes.keys() - given, "missing"), (given - shapes.keys(), "of no layer here")):
        if keys:
            raise ValueError(f"IP-Adapter '{name}' is of another base model: {named(sorted(keys))} {which}")
    if wrong := sorted(key for key, shape in shapes.items() if tensors[key].shape != shape):
        raise ValueError(f"IP-Adapter '{name}' is of another base model: {named(wrong)} of another shape here")
    return tuple((tensors[KEYS.format(n)].to(like), tensors[VALUES.format(n)].to(like)) for n in numbers)


# --- its projection --------------------------------------------------------------------------------------------------


def kind_of(name: str, tensors: Mapping[str, Tensor]) -> str:
    """The kind of an adapter by its weights; ValueError for one that is not read."""
    kind = next((kind for mark, kind in MARKS.items() if f"{PROJECTION}{mark}" in tensors), None)
    if kind is None:
        raise ValueError(f"IP-Adapter '{name}' is of no kind that is read ({', '.join(MARKS.values())}); FaceID is not")
    return kind


def projection_of(name: str, unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> Projection:
    """The network that makes tokens, by diffusers' own conversion of what files call its weights."""
    given = {key.removeprefix(PROJECTION): tensor for key, tensor in tensors.items() if key.startswith(PROJECTION)}
    try:
        projection = unet._convert_ip_adapter_image_proj_to_diffusers(given, low_cpu_mem_usage=False)
    except (KeyError, IndexError, RuntimeError) as error:  # what is missing, no matrix, too much or of another shape
        problem = f"its {PROJECTION}* do not fit each other ({one_line(error)})"
        raise ValueError(f"IP-Adapter '{name}' is damaged: {problem}") from error
    norm = projection.norm_out if isinstance(projection, IPAdapterPlusImageProjection) else projection.norm
    (wide,), reads = norm.normalized_shape, unet.config.cross_attention_dim
    if wide != reads:
        raise ValueError(
            f"IP-Adapter '{name}' is of another base model: its tokens are {wide} wide, the UNet's {reads}"
        )
    return projection.to(unet.device, unet.dtype).eval().requires_grad_(False)


def reads_states(projection: Projection) -> bool:
    """Whether it reads the tower's states, and not its embedding."""
    return not isinstance(projection, ImageProjection)


def width_of(projection: Projection) -> int:
    """E of what it reads."""
    if isinstance(projection, IPAdapterPlusImageProjection):
        return projection.proj_in.in_features
    if isinstance(projection, IPAdapterFullImageProjection):
        return projection.ff.net[0].proj.in_features
    return projection.image_embeds.in_features


# --- its image encoder -----------------------------------------------------------------------------------------------


def encoder_folder(name: str, place: Found, projection: Projection) -> Path | None:
    """The image encoder beside the file, or of a hub repository the first that fits, fetched; None: there is none."""
    beside = place.path.parent / ENCODER
    if not place.repository:
        return beside if beside.is_dir() else None
    others = sorted(path.parent for path in place.copy.rglob(f"{ENCODER}/config.json") if path.parent != beside)
    folders = [folder for folder in [beside, *others] if (folder / "config.json").is_file()]
    if not folders:
        return None
    chosen = next((each for each in folders if encoder_width(each, projection) == width_of(projection)), folders[0])
    part = chosen.relative_to(place.copy).as_posix()
    fetched("IP-Adapter", name, place.repository, lambda names: needed(names, [part]))
    return chosen


def encoder_width(folder: Path, projection: Projection) -> int:
    """E of what the image encoder of a folder says where a projection reads it."""
    content = read_json(folder / "config.json")
    with damaged(folder):
        config = CLIPVisionConfig.from_dict(content)
    return config.hidden_size if reads_states(projection) else config.projection_dim


def check_encoder(name: str, folder: Path, projection: Projection) -> None:
    """ValueError for an image encoder that a projection cannot read, before it is loaded."""
    wanted, given = width_of(projection), encoder_width(folder, projection)
    if given != wanted:
        what = "states" if reads_states(projection) else "embeddings"
        problem = f"takes {what} of width {wanted}, not {given} of its image encoder"
        raise ValueError(f"IP-Adapter '{name}' {problem}; give another with image_encoder=FOLDER")


def load_encoder(unet: UNet2DConditionModel, folder: Path) -> ImageEncoder:
    """The image encoder of a folder, where the UNet is, and its preprocessing: CLIP's own where the folder has none."""
    tower = load_part(CLIPVisionModelWithProjection, folder, unet.device, unet.dtype)
    if (folder / CONFIG_NAME).is_file():
        return ImageEncoder(tower, Preprocess.from_folder(folder))
    return ImageEncoder(tower, Preprocess().with_size(tower.config.image_size))


def encoder_files(folder: Path) -> list[Path]:
    """The files of an image encoder that its answers depend on."""
    configs = [folder / name for name in ("config.json", CONFIG_NAME)]
    return [*(path for path in configs if path.is_file()), *weight_files(folder)]
