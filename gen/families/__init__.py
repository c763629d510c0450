"""One module per family of checkpoints: what its networks are told, and what a request may ask of it."""

from gen.families.base import FamilyModel
from gen.families.kandinsky import Kandinsky22
from gen.families.kandinsky_2_1 import Kandinsky21
from gen.families.karlo import Karlo
from gen.families.stable_diffusion import StableDiffusion
from gen.families.stable_diffusion_xl import StableDiffusionXL
from gen.families.stable_unclip import StableUnCLIP

FAMILIES: dict[str, type[FamilyModel]] = {  # by the pipeline class of model_index.json
    "KandinskyCombinedPipeline": Kandinsky21,
    "KandinskyPipeline": Kandinsky21,
    "KandinskyInpaintCombinedPipeline": Kandinsky21,
    "KandinskyInpaintPipeline": Kandinsky21,
    "KandinskyV22CombinedPipeline": Kandinsky22,
    "KandinskyV22Pipeline": Kandinsky22,
    "KandinskyV22InpaintCombinedPipeline": Kandinsky22,
    "KandinskyV22InpaintPipeline": Kandinsky22,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionInpaintPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXL,
    "StableDiffusionXLInpaintPipeline": StableDiffusionXL,
    "StableUnCLIPPipeline": StableUnCLIP,
    "StableUnCLIPImg2ImgPipeline": StableUnCLIP,
    "UnCLIPPipeline": Karlo,
    "UnCLIPImageVariationPipeline": Karlo,
}
