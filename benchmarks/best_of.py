"""Seconds for the best k of N candidates: diffusers with transformers, as documented and tuned, and ours beside them.

    python benchmarks/best_of.py [--workload shapes64 ...] [--way unclip ...] [--dtype float32 ...] [--profile]

Every contestant paints the same candidates (weights, noise, steps, guidance), ranks them by the same CLIP and has the
best at the end. Each lives in a process of its own, so that its memory is its own, and they take turns: A B C A B C.
What comes before the first counted turn (loading, the search for the best batch size, compilation, a first call) is
not in the seconds. All are in memory at once; where that is too much, name fewer ways or precisions.

Beside the speed stands how far the final latents are from those of stock diffusers in float32, and whether the same
candidates are kept. In float32 ours must be as good as equal, and in a lower precision as near as stock in the same
one; where it is not, the command ends with status 1, after the result is kept in benchmarks/results/best_of.json.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Annotated, Any, NamedTuple, Protocol

import diffusers
import numpy as np
import torch
import transformers
import typer
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from clip_core.tokenizer import train_tokenizer
from gen import TextToImage
from gen.checkpoint import Card, find
from training.provenance import provenance

RESULT = Path(__file__).parent / "results" / "best_of.json"
PROMPT = "a small red circle above a large blue square"
SEED = 0  # of the first candidate; the k-th has k more
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOSE = 1e-4  # how far latents in float32 may be from stock's, of the largest of them
NO_WORSE = 1.5  # how many times the error of stock in its own lower precision ours may have
SEARCH_SHARE = 4  # a batch size is tried with this part of the steps
NOT_MEASURED = "not_measured"


# --- what is painted ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model of random weights, in the layout of Stable unCLIP."""

    unet: tuple[int, ...]  # channels of each level; all but the last attend
    unet_layers: int
    unet_heads: int
    latent_size: int  # cells along each side
    vae: tuple[int, ...]  # channels of each level
    groups: int  # of every group norm
    text: tuple[int, int, int]  # CLIP's text tower: width, which is the embedding's too, layers, heads
    vision: tuple[int, int, int]  # CLIP's image tower: width, layers, heads
    image_size: int  # pixels that CLIP looks at
    patch_size: int
    text_tokens: int = 77


@dataclass(frozen=True)
class Workload:
    """What every contestant is to paint."""

    model: str | Shape  # a bundled name, or one to be made
    number: int  # N
    keep: int  # k
    steps: int | None = None  # None: as the model's card says, as below
    guidance_scale: float | None = None


SMALL = Shape(
    unet=(128, 256, 256),  # 36 M parameters
    unet_layers=2,
    unet_heads=8,
    latent_size=32,
    vae=(32, 64, 128, 128),
    groups=32,
    text=(384, 12, 6),  # ViT-S/32
    vision=(384, 12, 6),
    image_size=224,
    patch_size=32,
)
MEDIUM = replace(SMALL, unet=(128, 256, 512, 512))  # 139 M parameters
STABLE_DIFFUSION = Shape(
    unet=(320, 640, 1280, 1280),  # that of version 1.5 and a class input: 863 M parameters
    unet_layers=2,
    unet_heads=8,
    latent_size=64,
    vae=(128, 256, 512, 512),
    groups=32,
    text=(768, 12, 12),  # ViT-L/14
    vision=(1024, 24, 16),
    image_size=224,
    patch_size=14,
)
TINY = Shape(
    unet=(8, 16),
    unet_layers=1,
    unet_heads=2,
    latent_size=8,
    vae=(4, 4, 8, 8),
    groups=4,
    text=(16, 2, 2),
    vision=(16, 1, 2),
    image_size=64,
    patch_size=16,
    text_tokens=32,
)

WORKLOADS = {
    "shapes64": Workload("shapes64", number=16, keep=4),
    "unet-36m": Workload(SMALL, number=8, keep=4, steps=20, guidance_scale=5.0),
    "unet-139m": Workload(MEDIUM, number=8, keep=4, steps=20, guidance_scale=5.0),
    "sd15": Workload(STABLE_DIFFUSION, number=16, keep=4, steps=30, guidance_scale=7.5),
    "sd15-one": Workload(STABLE_DIFFUSION, number=1, keep=1, steps=30, guidance_scale=7.5),
    "shapes64-tiny": Workload("shapes64", number=3, keep=2, steps=2),
    "tiny": Workload(TINY, number=4, keep=2, steps=4, guidance_scale=3.0),
}
# What is measured where nothing is named, by sizes and kind of device.
USUAL = {
    "real": {"cpu": ["shapes64", "unet-36m"], "cuda": ["shapes64", "sd15", "sd15-one"]},
    "tiny": {"cpu": ["shapes64-tiny", "tiny"], "cuda": ["shapes64-tiny", "tiny"]},
}


@dataclass(frozen=True)
class Task:
    """A workload as a contestant is given it, with nothing left to look up."""

    model: str  # a bundled name or a folder
    number: int
    keep: int
    steps: int
    guidance_scale: float
    device: str

    @property
    def seeds(self) -> list[int]:
        """Of the candidates, in drawing order."""
        return list(range(SEED, SEED + self.number))

    def best(self, scores: Tensor) -> list[int]:
        """The candidates kept, best first; of equals the earlier one."""
        order: list[int] = torch.sort(scores.float(), descending=True, stable=True).indices.tolist()
        return order[: self.keep]


# --- a model of random weights -----------------------------------------------------------------------------------


def write_random(shape: Shape, folder: Path) -> int:
    """Write a folder that stock diffusers and we load, CLIP in clip/ beside it; the UNet's parameters are returned."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        tokenizer = train_tokenizer([PROMPT] * 10, vocab_size=700, max_length=shape.text_tokens)
        clip = random_clip(shape, tokenizer)
        text_encoder = CLIPTextModel(clip.config.text_config).eval()
        text_encoder.load_state_dict(clip.text_model.state_dict())
        unet = random_unet(shape)
        StableUnCLIPImg2ImgPipeline(
            feature_extractor=None,
            image_encoder=no_image_encoder(),
            image_normalizer=StableUnCLIPImageNormalizer(shape.text[0]),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=DDIMScheduler(
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
            ),
            vae=random_vae(shape),
        ).save_pretrained(folder)
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    size = shape.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder / "clip"
    )
    return num_parameters(unet)


def random_clip(shape: Shape, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Weights large enough that words and pictures show in the scores."""

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return sizes | {"num_attention_heads": heads, "initializer_factor": 5.0}

    words = {"vocab_size": len(tokenizer), "max_position_embeddings": shape.text_tokens}
    words |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    seen = {"image_size": shape.image_size, "patch_size": shape.patch_size}
    text, vision = tower(*shape.text) | words, tower(*shape.vision) | seen
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.text[0])).eval()


def random_unet(shape: Shape) -> UNet2DConditionModel:
    """Its answers are as large as the noise, so that an error in it shows in the latents."""
    width, attending = shape.text[0], len(shape.unet) - 1
    unet = UNet2DConditionModel(
        sample_size=shape.latent_size,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        block_out_channels=shape.unet,
        layers_per_block=shape.unet_layers,
        attention_head_dim=shape.unet_heads,  # the number of heads, by diffusers' own mistake
        norm_num_groups=shape.groups,
        cross_attention_dim=width,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * width,
    ).eval()
    noise = torch.randn(1, 4, shape.latent_size, shape.latent_size)
    answer = unet(noise, 500, torch.randn(1, shape.text_tokens, width), class_labels=torch.zeros(1, 2 * width)).sample
    scale_up(unet.conv_out, 1.0 / answer.std().item())
    return unet


def random_vae(shape: Shape) -> AutoencoderKL:
    """Its pictures use the whole range."""
    levels = len(shape.vae)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=shape.vae,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=shape.groups,
        sample_size=shape.latent_size * 2 ** (levels - 1),
        scaling_factor=1.0,
    ).eval()
    pixels = vae.decode(torch.randn(1, 4, shape.latent_size, shape.latent_size)).sample
    scale_up(vae.decoder.conv_out, 0.5 / pixels.std().item())
    return vae


def scale_up(layer: nn.Conv2d, factor: float) -> None:
    """Multiply what a layer answers."""
    for weight in layer.parameters():
        weight.mul_(factor)


def no_image_encoder() -> CLIPVisionModelWithProjection:
    """What stock's pipeline has to have and, told an embedding, asks for nothing but the type of its weights."""
    tiny = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return CLIPVisionModelWithProjection(tiny).eval()


def num_parameters(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


# --- who paints --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How candidates are painted and ranked."""

    label: str
    is_ours: bool = False
    # Weights are channels-last; a peer also makes no Pillow pictures, ranks tensors and has its best batch size.
    is_tuned: bool = False
    backend: str | None = None  # of the UNet and the autoencoder's decoder: None (eager), "inductor", "openvino"
    devices: tuple[str, ...] = ("cpu", "cuda")


WAYS = {
    "diffusers": Way("diffusers, Pillow pictures, transformers' CLIP"),
    "tuned": Way("the same: channels-last, tensors, best batch size", is_tuned=True),
    "compiled": Way("tuned, fused projections, torch.compile", is_tuned=True, backend="inductor"),
    "openvino": Way("tuned, OpenVINO", is_tuned=True, backend="openvino", devices=("cpu",)),
    "unclip": Way("**unclip**", is_ours=True),
    "unclip-channels-last": Way("**unclip**, channels-last from outside", is_ours=True, is_tuned=True),
    "unclip-compiled": Way("**unclip**, torch.compile from outside", is_ours=True, backend="inductor"),
}


class Entrant(NamedTuple):
    """A way in a precision."""

    way: str
    dtype: str


STOCK, OURS = Entrant("diffusers", "float32"), Entrant("unclip", "float32")  # always there, for what is compared


def refusal(way: Way) -> str | None:
    """Why this way cannot be measured here; None: it can."""
    if way.backend == "openvino" and importlib.util.find_spec("openvino") is None:
        return "openvino is not installed"
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if way.backend == "inductor" and not any(name and shutil.which(name) for name in compilers):
        return "there is no C++ compiler"
    return None


class Contestant(Protocol):
    """One that paints the candidates of a task."""

    task: Task

    def paint(self) -> list[int]:
        """All there is to do, which is what is timed; the candidates kept, best first."""

    def latents(self) -> Tensor:
        """The final latents (N, C, h, w) of all candidates."""

    def pictures(self) -> np.ndarray:
        """All candidates as 8-bit pictures (N, H, W, 3)."""

    def rank(self, pictures: np.ndarray) -> list[int]:
        """Which of these pictures it would keep, best first."""

    def prepare(self, way: Way) -> dict[str, Any]:
        """Do what the way wants before a backend takes the networks over; what is to be told of it."""

    def parts(self) -> dict[str, list[nn.Module]]:
        """Its networks, by what they are for."""


@dataclass(eq=False)
class Peer:
    """Stock diffusers, then a ranking by stock transformers."""

    pipeline: Any
    clip: Any
    tokenizer: Any
    processor: Any
    task: Task
    is_tuned: bool
    batch_size: int

    @classmethod
    def load(cls, task: Task, dtype: torch.dtype, is_tuned: bool) -> "Peer":
        folder = find(task.model)
        pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
            folder, torch_dtype=dtype, image_encoder=no_image_encoder().to(dtype), feature_extractor=None
        ).to(task.device)
        pipeline.set_progress_bar_config(disable=True)
        # From the text alone: zeros over the whole class input, where stock would put the sinusoids of a noise level.
        pipeline.noise_image_embeddings = lambda image_embeds, **_: torch.cat([image_embeds, image_embeds], dim=1)
        clip = CLIPModel.from_pretrained(folder / "clip", dtype=dtype).to(task.device).eval()
        if is_tuned:
            channels_last(pipeline.unet, pipeline.vae)
        return cls(
            pipeline=pipeline,
            clip=clip,
            tokenizer=CLIPTokenizer.from_pretrained(folder / "clip"),
            processor=CLIPImageProcessor.from_pretrained(folder / "clip"),
            task=task,
            is_tuned=is_tuned,
            batch_size=task.number,
        )

    def paint(self) -> list[int]:
        if not self.is_tuned:
            return self._rank(self._painted("pil"))
        pixels = torch.stack(self._painted("pt"))
        return self.task.best(self._scores(self._prepared(pixels.float(), do_rescale=False), [PROMPT]))

    def latents(self) -> Tensor:
        return torch.stack(self._painted("latent"))

    def pictures(self) -> np.ndarray:
        return np.stack([np.asarray(picture) for picture in self._painted("pil")])

    def rank(self, pictures: np.ndarray) -> list[int]:
        return self._rank([Image.fromarray(each) for each in pictures])

    def parts(self) -> dict[str, list[nn.Module]]:
        return {
            "UNet": [self.pipeline.unet],
            "VAE": [self.pipeline.vae.decoder],
            "CLIP": [self.clip.vision_model],
            "text": [self.pipeline.text_encoder, self.clip.text_model],
        }

    def prepare(self, way: Way) -> dict[str, Any]:
        if way.backend == "inductor":
            self.pipeline.fuse_qkv_projections()
        searched = self.search() if way.is_tuned else {}
        return {"batch_size": self.batch_size, "searched_seconds": searched}

    def search(self) -> dict[int, float]:
        """Take the batch size that paints all candidates soonest; seconds of each that divides them."""
        steps, took = max(1, self.task.steps // SEARCH_SHARE), {}
        for size in sizes_of(self.task.number):
            self.batch_size = size
            took[size] = min(self._seconds(steps) for _ in range(2))  # the first call of a shape plans
        self.batch_size = min(took, key=lambda size: took[size])
        return took

    def _seconds(self, steps: int) -> float:
        began = now(self.task.device)
        self._painted("pt", steps)
        return now(self.task.device) - began

    def _painted(self, output_type: str, steps: int | None = None) -> list[Any]:
        """All candidates, a batch after the other; `steps` None: as many as the task has."""
        unet, found = self.pipeline.unet, []
        empty = torch.zeros(1, self.pipeline.image_normalizer.config.embedding_dim, dtype=unet.dtype)
        for first in range(0, self.task.number, self.batch_size):
            seeds = self.task.seeds[first : first + self.batch_size]
            found += self.pipeline(
                prompt=PROMPT,
                image_embeds=empty.to(unet.device),
                num_images_per_prompt=len(seeds),
                latents=noise_of(seeds, unet).to(unet.device, unet.dtype),
                num_inference_steps=steps or self.task.steps,
                guidance_scale=self.task.guidance_scale,
                output_type=output_type,
            ).images
        return found

    def _rank(self, pictures: list[Image.Image]) -> list[int]:
        return self.task.best(self._scores(self._prepared(pictures), [PROMPT] * len(pictures)))

    def _prepared(self, images: list[Image.Image] | Tensor, do_rescale: bool = True) -> Tensor:
        prepared: Tensor = self.processor(images=images, do_rescale=do_rescale, return_tensors="pt").pixel_values
        return prepared

    @torch.no_grad()
    def _scores(self, pixel_values: Tensor, texts: list[str]) -> Tensor:
        """Of each picture with its text, or with the one text."""
        words = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        answer = self.clip(**words, pixel_values=pixel_values.to(self.clip.device, self.clip.dtype))
        scores: Tensor = answer.logits_per_image[:, 0]  # all texts are equal
        return scores


def noise_of(seeds: Sequence[int], unet: Any) -> Tensor:
    """What one CPU generator per picture draws in float32, in every precision the same."""
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sizes_of(number: int) -> list[int]:
    """The powers of two that divide a number, and itself: batches of equal size."""
    powers = [1 << power for power in range(number.bit_length()) if number % (1 << power) == 0]
    return sorted({*powers, number})


@dataclass(eq=False)
class Ours:
    """This project, by its Python face."""

    model: TextToImage
    task: Task

    @classmethod
    def load(cls, task: Task, dtype: torch.dtype, is_tuned: bool) -> "Ours":
        model = TextToImage.from_pretrained(task.model, device=task.device, dtype=dtype)
        if is_tuned:
            channels_last(model.model.unet, model.model.vae)
        return cls(model, task)

    def paint(self) -> list[int]:
        return [seed - SEED for seed in self._painted(keep=self.task.keep).seeds]

    def latents(self) -> Tensor:
        latents = self._painted(rerank=False, output_type="latent").images
        assert isinstance(latents, Tensor), "output_type is latent"
        return latents

    def pictures(self) -> np.ndarray:
        return np.stack([np.asarray(picture) for picture in self._painted(rerank=False).images])

    def rank(self, pictures: np.ndarray) -> list[int]:
        assert self.model.model.clip is not None, "a model that is measured can rank"
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255  # (N, 3, H, W)
        return self.task.best(self.model.model.clip.score(pixels, PROMPT))

    def parts(self) -> dict[str, list[nn.Module]]:
        model = self.model.model
        assert model.clip is not None, "a model that is measured can rank"
        return {
            "UNet": [model.unet],
            "VAE": [model.vae.decoder],
            "CLIP": [model.clip.model.vision_model],
            "text": [model.text.encoder, model.clip.model.text_model],
        }

    def prepare(self, way: Way) -> dict[str, Any]:
        self.paint()  # the first time measures memory, which is not to be compiled
        return {}

    def _painted(self, keep: int | None = None, rerank: bool | None = None, output_type: str = "pil") -> Any:
        return self.model(
            PROMPT,
            num_images_per_prompt=self.task.number,
            keep=keep,
            rerank=rerank,
            seed=SEED,
            num_inference_steps=self.task.steps,
            guidance_scale=self.task.guidance_scale,
            prior=False,
            output_type=output_type,
        )


def channels_last(*networks: nn.Module) -> None:
    """Lay out the weights of convolutions as the fast kernels want them."""
    for network in networks:
        nn.Module.to(network, memory_format=torch.channels_last)


# --- other backends ----------------------------------------------------------------------------------------------


def compile_networks(networks: Sequence[nn.Module], mode: str) -> None:
    """By torch.compile, in place; they are compiled when they are first called."""
    for network in networks:
        network.compile(mode=mode, fullgraph=True)


def compile_mode(way: Way, device: str) -> str:
    """The fastest that the way allows."""
    if device == "cpu":
        return "default"
    # CUDA graphs answer into the same memory again, and an engine keeps a call's answer until the step's last call
    return "max-autotune-no-cudagraphs" if way.is_ours else "max-autotune"


class Positional(nn.Module):
    """A UNet as a tracer reads it: tensors in, a tensor out."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, tokens: Tensor, vector: Tensor) -> Tensor:
        answer: Tensor = self.unet(x, timestep, encoder_hidden_states=tokens, class_labels=vector, return_dict=False)[0]
        return answer


def to_openvino(peer: Peer, dtype: str) -> None:
    """Have OpenVINO answer for the UNet and the decoder; the modules stay for what the pipeline asks of them."""
    pipeline, unet = peer.pipeline, peer.pipeline.unet
    x = noise_of(range(peer.batch_size), unet)
    asked = torch.cat([x, x]) if peer.task.guidance_scale > 1 else x
    width = unet.config.cross_attention_dim
    tokens = torch.zeros(len(asked), pipeline.tokenizer.model_max_length, width)
    vector = torch.zeros(len(asked), unet.config.projection_class_embeddings_input_dim)
    run_unet = openvino_of(Positional(unet), (asked, torch.tensor(1), tokens, vector), dtype)
    run_decoder = openvino_of(pipeline.vae.decoder, (x,), dtype)

    def unet_forward(
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor,
        cross_attention_kwargs: None,
        return_dict: bool,
    ) -> tuple[Tensor]:
        assert cross_attention_kwargs is None and not return_dict, "as StableUnCLIPImg2ImgPipeline asks"
        return (run_unet(x, timestep, encoder_hidden_states, class_labels),)

    unet.forward, pipeline.vae.decoder.forward = unet_forward, run_decoder


def openvino_of(network: nn.Module, example: tuple[Tensor, ...], dtype: str) -> Callable[..., Tensor]:
    """A network for inputs of the example's shapes; `dtype` is what OpenVINO computes in."""
    openvino = importlib.import_module("openvino")
    with torch.no_grad():
        model = openvino.convert_model(network, example_input=example, input=[tuple(each.shape) for each in example])
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    return lambda *inputs: torch.from_numpy(compiled([each.numpy() for each in inputs])[0])


# --- a process of its own ----------------------------------------------------------------------------------------


def ready(entrant: Entrant, task: Task) -> tuple[Contestant, dict[str, Any]]:
    """A contestant that has painted once, and what it took to get there."""
    way = WAYS[entrant.way]
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean that
    loaded = torch.float32 if way.backend == "openvino" else DTYPES[entrant.dtype]  # OpenVINO lowers it by itself
    contestant = (Ours if way.is_ours else Peer).load(task, loaded, way.is_tuned)
    told = contestant.prepare(way)
    began = now(task.device)
    if way.backend == "inductor":
        parts = contestant.parts()
        compile_networks([*parts["UNet"], *parts["VAE"]], compile_mode(way, task.device))
    elif way.backend == "openvino":
        assert isinstance(contestant, Peer), "ours has no such way"
        to_openvino(contestant, entrant.dtype)
    contestant.paint()
    return contestant, told | {"ready_seconds": now(task.device) - began}


def turn(contestant: Contestant) -> dict[str, Any]:
    """One counted turn: seconds, the peak of memory meanwhile, and what was kept."""
    device = contestant.task.device
    is_counted = reset_peak(device)
    began = now(device)
    kept = contestant.paint()
    seconds = now(device) - began
    return {"seconds": seconds, "peak_memory_mb": peak_mb(device) if is_counted else None, "kept": kept}


def profile(contestant: Contestant, turns: int) -> dict[str, float]:
    """The share of wall time inside each kind of network, and outside them all (`host`)."""
    device = contestant.task.device
    with clocked(contestant.parts(), device) as spent:
        began = now(device)
        for _ in range(turns):
            contestant.paint()
        whole = now(device) - began
    shares = {name: seconds / whole for name, seconds in spent.items()}
    return shares | {"host": 1 - sum(shares.values())}


@contextmanager
def clocked(parts: Mapping[str, Sequence[nn.Module]], device: str) -> Iterator[dict[str, float]]:
    """Seconds spent in the calls of these networks; a call within a call is the outer one's."""
    spent = dict.fromkeys(parts, 0.0)
    began: list[float] = []

    def enter(*_: object) -> None:
        began.append(now(device))

    def leave(name: str) -> Callable[..., None]:
        def left(*_: object) -> None:
            start = began.pop()
            if not began:
                spent[name] += now(device) - start

        return left

    with ExitStack() as hooks:
        for name, networks in parts.items():
            for network in networks:
                hooks.callback(network.register_forward_pre_hook(enter).remove)
                hooks.callback(network.register_forward_hook(leave(name)).remove)
        yield spent


def now(device: str) -> float:
    """The clock, when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(device: str) -> bool:
    """Forget the peak of memory so far; False where that cannot be done."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins again at what is resident
    except OSError:
        return False
    return True


def peak_mb(device: str) -> float:
    """The peak of memory: what torch held on the GPU, or what of this process was resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


# What a contestant's process can be asked; tensors go between processes as arrays.
ASKED: dict[str, Callable[..., Any]] = {
    "turn": turn,
    "latents": lambda contestant: contestant.latents().float().cpu().numpy(),
    "pictures": lambda contestant: contestant.pictures(),
    "rank": lambda contestant, pictures: contestant.rank(pictures),
    "profile": profile,
}


def quiet() -> None:
    """Let the libraries say nothing while they load and save."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # the new name is not known to 0.35


@dataclass(frozen=True)
class Raised:
    """What went wrong in a contestant's process."""

    trace: str


def serve(line: Connection, entrant: Entrant, task: Task) -> None:
    """The life of a contestant's process: it gets ready, says so, and does what it is asked until told None."""
    quiet()
    try:
        contestant, told = ready(entrant, task)
        line.send(told)
        while (asked := line.recv()) is not None:
            name, *arguments = asked
            line.send(ASKED[name](contestant, *arguments))
    except Exception:
        line.send(Raised(traceback.format_exc()))


class Worker:
    """A contestant in a process of its own, which does nothing while it is not asked."""

    def __init__(self, entrant: Entrant, task: Task) -> None:
        self.name = " ".join(entrant)
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, entrant, task))
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._process.is_alive():
            self._line.send(None)
        else:
            self._process.terminate()
        self._process.join()

    def ask(self, name: str, *arguments: object) -> Any:
        """What the contestant answers; RuntimeError where it failed."""
        self._line.send((name, *arguments))
        return self.answer()

    def answer(self) -> Any:
        """The next thing it says; the first is how it got ready."""
        try:
            said = self._line.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name} died with exit status {self._process.exitcode}") from None
        if isinstance(said, Raised):
            raise RuntimeError(f"{self.name}: {said.trace}")
        return said


# --- the contest -------------------------------------------------------------------------------------------------


def contest(task: Task, entrants: Sequence[Entrant], repeats: int, profiled: bool) -> dict[str, Any]:
    """All contestants in turns, what they are worth beside each other, and what must hold and does not."""
    with ExitStack() as stack:
        workers: dict[Entrant, Worker] = {}
        rows: dict[Entrant, dict[str, Any]] = {}
        for entrant in entrants:
            rows[entrant] = entered(entrant, task, stack, workers)
        turns: dict[Entrant, list[dict[str, Any]]] = {entrant: [] for entrant in workers}
        for _ in range(repeats):
            for entrant, worker in workers.items():
                turns[entrant].append(worker.ask("turn"))
        for entrant, taken in turns.items():
            rows[entrant] |= {name: [one[name] for one in taken] for name in ("seconds", "peak_memory_mb")}
            rows[entrant]["kept"] = taken[-1]["kept"]
        compare(workers, rows)
        shares = {}
        if profiled:
            shares = {" ".join(each): workers[each].ask("profile", repeats) for each in (STOCK, OURS)}
    found = list(rows.values())
    return {"rows": found, "faults": faults(found), "profile": shares}


def entered(entrant: Entrant, task: Task, stack: ExitStack, workers: dict[Entrant, Worker]) -> dict[str, Any]:
    """A contestant's row; one that can run here is now ready among the workers."""
    row: dict[str, Any] = entrant._asdict()
    reason = refusal(WAYS[entrant.way])
    if reason is not None:
        return row | {NOT_MEASURED: reason}
    worker = stack.enter_context(Worker(entrant, task))
    try:
        told = worker.answer()
    except RuntimeError as error:
        if entrant in (STOCK, OURS):
            raise
        return row | {NOT_MEASURED: f"it failed: {str(error).strip().splitlines()[-1]}"}
    workers[entrant] = worker
    return row | told


def compare(workers: Mapping[Entrant, Worker], rows: Mapping[Entrant, dict[str, Any]]) -> None:
    """Write into each row how far it is from stock in float32: its latents, and what both rankings keep of it."""
    stock = workers[STOCK].ask("latents")
    by_ours = workers[OURS].ask("rank", workers[STOCK].ask("pictures"))
    for entrant, worker in workers.items():
        row, pictures = rows[entrant], worker.ask("pictures")
        ours = row["kept"] if WAYS[entrant.way].is_ours else workers[OURS].ask("rank", pictures)
        row |= apart(worker.ask("latents"), stock)
        row["same_kept"] = {
            "transformers": set(workers[STOCK].ask("rank", pictures)) == set(rows[STOCK]["kept"]),
            "unclip": set(ours) == set(by_ours),
        }


def apart(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far latents are from the reference: of its norm (`error`), and of its largest (`max_error`)."""
    difference = found.astype(np.float64) - reference
    return {
        "error": float(np.linalg.norm(difference) / np.linalg.norm(reference)),
        "max_error": float(np.abs(difference).max() / np.abs(reference).max()),
    }


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of ours must hold and does not, a line each."""
    stock = {row["dtype"]: row["error"] for row in measured(rows) if row["way"] == STOCK.way}
    found = []
    for row in measured(rows):
        if WAYS[row["way"]].is_ours:
            wrong = inexact(row) if row["dtype"] == STOCK.dtype else worse(row, stock.get(row["dtype"]))
            found += [f"{row['way']} {row['dtype']}: {each}" for each in wrong]
    return found


def inexact(row: Mapping[str, Any]) -> Iterator[str]:
    """What differs in the precision of the reference; a number that is none differs."""
    if not row["max_error"] <= CLOSE:
        yield f"latents differ by {row['max_error']:.1e} from stock's, more than {CLOSE}"
    for ranking, same in row["same_kept"].items():
        if not same:
            yield f"others are kept, as {ranking} ranks"


def worse(row: Mapping[str, Any], stock: float | None) -> Iterator[str]:
    """What is too far away in a lower precision, beside stock in the same one (None: it was not asked for)."""
    if stock is not None and not row["error"] <= NO_WORSE * stock:
        yield f"latents are off by {row['error']:.1e}, more than {NO_WORSE} times stock's {stock:.1e}"


# --- what is told ------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of a contest; `stock takes` and `best peer takes` are beside the row, in its precision."""
    columns = ["contestant", "precision", "seconds, median (range)", "stock takes", "best peer takes", "peak MB"]
    columns += ["getting ready, s", "error of latents", "keeps the same (transformers, unclip)"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        told = [WAYS[row["way"]].label, row["dtype"]]
        if NOT_MEASURED in row:
            told += [f"not measured: {row[NOT_MEASURED]}", *[""] * (len(columns) - 3)]
        else:
            told += cells(row, [each for each in measured(rows) if each["dtype"] == row["dtype"]])
        lines.append(told)
    return markdown(lines)


def cells(row: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a row's columns say; `alike` are all rows of its precision."""
    seconds, peaks = row["seconds"], [peak for peak in row["peak_memory_mb"] if peak is not None]
    stock = [each for each in alike if each["way"] == STOCK.way]
    peers = [each for each in alike if WAYS[row["way"]].is_ours and not WAYS[each["way"]].is_ours]
    return [
        f"{median(seconds):.3g} ({min(seconds):.3g}–{max(seconds):.3g})",
        beside(row, stock),
        beside(row, peers),
        f"{max(peaks):.0f}" if peaks else "",
        f"{row['ready_seconds']:.1f}",
        f"{row['error']:.1e}",
        ", ".join("yes" if same else "no" for same in row["same_kept"].values()),
    ]


def beside(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """How many times as long as the row the fastest of others takes; empty where there is none."""
    if not others:
        return ""
    best = min(others, key=lambda each: median(each["seconds"]))
    return f"{median(best['seconds']) / median(row['seconds']):.2f}× ({best['way']})"


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that have numbers."""
    return [row for row in rows if NOT_MEASURED not in row]


def profile_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of where the time went."""
    columns = list(next(iter(shares.values())))
    lines = [["share of wall time", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(f"{100 * each[column]:.1f} %" for column in columns)] for name, each in shares.items()]
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def chosen(given: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    """What was asked for, or all; BadParameter for what is unknown."""
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(f"{what} '{name}' is unknown; choose from: {', '.join(known)}")
    return list(given or known)


def entrants_of(ways: Sequence[str], dtypes: Sequence[str], device: str) -> list[Entrant]:
    """Who takes part, in the order of their turns; the two that others are compared with always do."""
    asked = {Entrant(way, dtype) for way in ways for dtype in dtypes} | {STOCK, OURS}
    every = [Entrant(way, dtype) for dtype in DTYPES for way in WAYS]
    return [each for each in every if each in asked and device in WAYS[each.way].devices]


def task_of(workload: Workload, folder: Path, device: str) -> tuple[Task, dict[str, Any]]:
    """A workload as contestants are given it, its model written to a folder where it is random; and what it is."""
    told: dict[str, Any] = asdict(workload)
    if isinstance(workload.model, Shape):
        model = str(folder)
        told["unet_parameters"] = write_random(workload.model, folder)
    else:
        model = workload.model
    defaults = Card.read(find(model)).defaults
    steps = defaults["num_inference_steps"] if workload.steps is None else workload.steps
    scale = defaults["guidance_scale"] if workload.guidance_scale is None else workload.guidance_scale
    task = Task(model, workload.number, min(workload.keep, workload.number), steps, scale, device)
    return task, told | {"keep": task.keep, "steps": steps, "guidance_scale": scale}


def main(
    sizes: Annotated[str, typer.Option(help=f"Which workloads where none is named: {', '.join(USUAL)}.")] = "real",
    workload: Annotated[list[str] | None, typer.Option(help=f"From: {', '.join(WORKLOADS)}.")] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"From: {', '.join(WAYS)}; all when not given.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 and bfloat16 on the CPU, bfloat16 on CUDA.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted turns of each contestant.")] = 5,
    number: Annotated[int | None, typer.Option("-n", min=1, help="Candidates, in place of the workload's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="In place of the workload's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time goes, of stock and of ours.")] = False,
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULT,
) -> None:
    """Measure best-of-N."""
    quiet()
    (sizes,), (device,) = chosen([sizes], list(USUAL), "sizes"), chosen([device], ["cpu", "cuda"], "device")
    names = chosen(workload or USUAL[sizes][device], list(WORKLOADS), "workload")
    usual = ["float32", "bfloat16"] if device == "cpu" else ["bfloat16"]
    dtypes = chosen(dtype or usual, list(DTYPES), "dtype")
    entrants = entrants_of(chosen(way, list(WAYS), "way"), dtypes, device)
    found: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "workloads": {}, **provenance(device)}
    found["versions"]["openvino"] = openvino_version()
    result.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            asked = WORKLOADS[name]
            asked = replace(asked, number=number or asked.number, steps=steps or asked.steps)
            task, told = task_of(asked, Path(folder), device)
            outcome = contest(task, entrants, repeats, profile)
        found["workloads"][name] = told | outcome
        result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"\n{name}: best {task.keep} of {task.number}, {task.steps} steps, guidance {task.guidance_scale}\n")
        print(table(outcome["rows"]))
        if profile:
            print(f"\n{profile_table(outcome['profile'])}")
    wrong = [f"{name}: {fault}" for name, one in found["workloads"].items() for fault in one["faults"]]
    if wrong:
        sys.exit("\n".join(wrong))


def openvino_version() -> str | None:
    """None: it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return None
    return importlib.metadata.version("openvino")


if __name__ == "__main__":
    typer.run(main)
