"""One module per family of checkpoints: what its networks are told, and what a request may ask of it."""

from gen.families.karlo import Karlo
from gen.families.painter import Painter
from gen.families.stable_diffusion import StableDiffusion
from gen.families.stable_diffusion_xl import StableDiffusionXL
from gen.families.stable_unclip import StableUnCLIP

FAMILIES: dict[str, type[Painter]] = {  # by the pipeline class of model_index.json
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionInpaintPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLInpaintPipeline": StableDiffusionXL,
    "StableUnCLIPPipeline": StableUnCLIP,
    "StableUnCLIPImg2ImgPipeline": StableUnCLIP,
    "UnCLIPPipeline": Karlo,
    "UnCLIPImageVariationPipeline": Karlo,
}
