"""A whole CLIP of two towers that are stored apart, as the priors of diffusers have them.

The towers are shared and not copied. A temperature is not stored with them; CLIP's first one stands in, and cosines do
not depend on it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from clip_core.clip import CLIP
from clip_core.preprocess import Preprocess

TEMPERATURE = 0.07  # Radford et al. 2021, section 2.5: where training begins


def joined(
    text: CLIPTextModelWithProjection, image: CLIPVisionModelWithProjection, tokenizer: Any, preprocess: Preprocess
) -> CLIP:
    """The CLIP of these towers; ValueError where they embed into spaces of different widths."""
    widths = text.config.projection_dim, image.config.projection_dim
    if widths[0] != widths[1]:
        raise ValueError(f"the text tower embeds into {widths[0]} numbers, the image tower into {widths[1]}")
    config = CLIPConfig(
        text_config=text.config.to_dict(), vision_config=image.config.to_dict(), projection_dim=widths[0]
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    model.text_model, model.text_projection = text.text_model, text.text_projection
    model.vision_model, model.visual_projection = image.vision_model, image.visual_projection
    scale = torch.tensor(math.log(1 / TEMPERATURE), dtype=image.dtype, device=image.device)
    model.logit_scale = nn.Parameter(scale, requires_grad=False)
    return CLIP(model.eval(), tokenizer, preprocess)
