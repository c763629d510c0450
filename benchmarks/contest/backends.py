"""Other backends under a contestant's networks: torch.compile in place, and OpenVINO behind stock's pipeline."""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from contest.contestants import Peer, noise_of
from contest.ways import Way
from gen.openvino_model import read


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
        model = read(network, example)
    model.reshape({place: tuple(each.shape) for place, each in enumerate(example)})
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    return lambda *inputs: torch.from_numpy(compiled([each.numpy() for each in inputs])[0])
