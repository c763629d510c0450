"""IP-Adapter (Ye et al. 2023): a picture beside the text, by keys and values of its own in every layer that reads one.

The plain kind: a CLIP image embedding becomes a few tokens, which each cross-attention reads with weights of the
adapter's own and adds, `scale` times, to what it reads of the text. The scale is in the values, for attention is linear
in them. What a layer does with the keys and values is `gen.attention`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from clip_core.fit import named
from clip_core.preprocess import CONFIG_NAME, Preprocess
from gen.adapters.file import Adapter, content_hash, found, read
from gen.attention import per_head, text_layers
from gen.checkpoint import load_part
from gen.checks import real

USUAL = "ip-adapter_sd15.safetensors"
ENCODER = "image_encoder"  # the folder beside the file, as it is published
PROJECTION = {  # the file's names, and those of diffusers' ImageProjection
    "image_proj.proj.weight": "image_embeds.weight",
    "image_proj.proj.bias": "image_embeds.bias",
    "image_proj.norm.weight": "norm.weight",
    "image_proj.norm.bias": "norm.bias",
}
KEYS, VALUES = "ip_adapter.{}.to_k_ip.weight", "ip_adapter.{}.to_v_ip.weight"


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """A loaded IP-Adapter of one UNet."""

    projection: ImageProjection  # (B, E) -> (B, T, D)
    layers: tuple[tuple[Tensor, Tensor], ...]  # weights (heads * d, D) of keys and scaled values, layer by layer
    encoder: CLIPVisionModelWithProjection | None  # None: only embeddings can be given
    preprocess: Preprocess | None

    @property
    def width(self) -> int:
        """E of the image embedding."""
        return self.projection.image_embeds.in_features

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """CLIP's embeddings (B, E) float32 of pictures; ValueError without an image encoder."""
        if self.encoder is None or self.preprocess is None:
            told = "load it with image_encoder=FOLDER, or give ip_adapter_image_embeds"
            raise ValueError(f"the IP-Adapter has no image encoder; {told}")
        if not images or not all(isinstance(each, Image.Image) for each in images):
            raise ValueError("ip_adapter_image is no Pillow picture; give one, or a list of one or more")
        values = self.preprocess.from_images(images).to(self.encoder.device, self.encoder.dtype)
        return self.encoder(values).image_embeds.float()

    @torch.no_grad()
    def tokens(self, embeds: Tensor) -> Tensor:
        """What the layers read of embeddings (B, E): (B, T, D). Zeros are the picture of a null."""
        return self.projection(embeds.to(self.layers[0][0]))

    @cached_property
    def null(self) -> Tensor:
        """Tokens (T, D) of an embedding of zeros, which a null is shown."""
        return self.tokens(torch.zeros(1, self.width))[0]

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

    `image_encoder` is the folder of a CLIPVisionModelWithProjection; None: `image_encoder/` beside the file, if any.
    """
    scale = real("scale", scale, -float("inf"))
    path = found("IP-Adapter", name, USUAL).path
    tensors = read(path).tensors
    layers, like = list(text_layers(unet)), unet.conv_in.weight
    if any(layer.added_kv_proj_dim is not None for layer in layers):
        raise ValueError(f"IP-Adapter '{name}' cannot be added: this UNet reads its text among the picture's own keys")
    numbers = range(1, 2 * len(layers), 2)  # self-attentions are counted too
    wanted = {*PROJECTION, *(kind.format(number) for number in numbers for kind in (KEYS, VALUES))}
    if missing := sorted(set(PROJECTION) - tensors.keys()):
        told = "Plus, Full Face and FaceID are not read"
        raise ValueError(f"IP-Adapter '{name}' is not of the plain kind ({told}): {named(missing)} missing")
    for keys, which in ((wanted - tensors.keys(), "missing"), (tensors.keys() - wanted, "of no layer here")):
        if keys:
            raise ValueError(f"IP-Adapter '{name}' is of another base model: {named(sorted(keys))} {which}")
    width = unet.config.cross_attention_dim
    *_, rows, embedding = (1, 1, *tensors["image_proj.proj.weight"].shape)  # what is no matrix is refused below
    projection = ImageProjection(embedding, width, num_image_text_embeds=max(rows // width, 1))
    shapes = {theirs: projection.state_dict()[ours].shape for theirs, ours in PROJECTION.items()}
    shapes |= {KEYS.format(n): layer.to_k.weight.shape for n, layer in zip(numbers, layers, strict=True)}
    shapes |= {VALUES.format(n): layer.to_v.weight.shape for n, layer in zip(numbers, layers, strict=True)}
    if wrong := sorted(key for key, shape in shapes.items() if tensors[key].shape != shape):
        raise ValueError(f"IP-Adapter '{name}' is of another base model: {named(wrong)} of another shape here")
    projection.load_state_dict({ours: tensors[theirs] for theirs, ours in PROJECTION.items()})
    projection.to(unet.device, unet.dtype).eval().requires_grad_(False)
    weights = tuple((tensors[KEYS.format(n)].to(like), tensors[VALUES.format(n)].to(like) * scale) for n in numbers)
    encoder, preprocess = load_encoder(unet, path, image_encoder)
    adapter = IPAdapter(projection, weights, encoder, preprocess)
    if encoder is not None and encoder.config.projection_dim != adapter.width:
        told = f"{encoder.config.projection_dim} of its image encoder"
        raise ValueError(f"IP-Adapter '{name}' takes embeddings of width {adapter.width}, not {told}; give another")
    return adapter, Adapter("ip_adapter", str(name), content_hash(path), scale)


def load_encoder(
    unet: UNet2DConditionModel, path: Path, given: str | Path | None
) -> tuple[CLIPVisionModelWithProjection | None, Preprocess | None]:
    """The image encoder and its preprocessing, from the folder given or beside the file; None: there is none."""
    folder = path.parent / ENCODER if given is None else Path(given).expanduser()
    if given is None and not folder.is_dir():
        return None, None
    encoder = load_part(CLIPVisionModelWithProjection, folder, unet.device, unet.dtype)
    if (folder / CONFIG_NAME).is_file():
        return encoder, Preprocess.from_folder(folder)
    return encoder, Preprocess().with_size(encoder.config.image_size)
