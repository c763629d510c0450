"""The same CLIP in the other library: open_clip <-> transformers, weights, pad and end-of-text rules and all.

What each library means by its settings is written down here once. A model that the other cannot hold exactly is
refused with what stands in the way. `largest_difference` is the proof that two CLIPs answer alike.

Text is cleaned before it is tokenized, and differently: open_clip mends mis-decoded letters and HTML entities
(ftfy), transformers composes Unicode (NFC). Plain text gets the same ids.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, get_clean_fn
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedModel, SiglipModel

from clip_core.clip import CLIP
from clip_core.load import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from clip_core.preprocess import CONFIG_NAME
from clip_core.tokenizer import BOS, EOS

# open_clip's name: transformers' name
PLAIN = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
TOWERS = {"visual.transformer.resblocks": "vision_model.encoder.layers"}
TOWERS["transformer.resblocks"] = "text_model.encoder.layers"
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one matrix in open_clip, in this order
DEFAULT_EPS = 1e-5  # of torch's and both libraries' layer norms
COMPARED = ("a photo of a cat", "", "naïve café!", "two words " * 99)  # plain, empty, beyond ASCII, too long


class Conversion(NamedTuple):
    """What a conversion wrote."""

    library: str  # whose folder it is now: "transformers" or "open_clip"
    difference: float  # of any number the two say of the same texts and pictures, by `largest_difference`


def convert(name_or_folder: str | Path, folder: str | Path) -> Conversion:
    """Write a CLIP as the other library's folder, read it again and compare: open_clip to transformers, or back.

    Raises ValueError for a folder that holds something, and for a CLIP that the other library cannot hold exactly.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty; give a new folder")
    clip = CLIP.from_pretrained(name_or_folder)
    library, save = "transformers", save_transformers
    if isinstance(clip.model, PreTrainedModel):
        library, save = "open_clip", save_open_clip
    save(clip, folder)
    pixels = torch.rand(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    return Conversion(library, largest_difference(clip, CLIP.from_pretrained(folder), COMPARED, pixels))


def to_transformers(clip: CLIP) -> CLIP:
    """An open_clip CLIP as transformers' CLIPModel and CLIPTokenizer, weights copied; transformers' own returns as is.

    open_clip pads with id 0, which is also the token "!". So does the tokenizer that comes out, as Stable
    Diffusion 2's does; a "!" that stands alone in a text is then taken for padding, one after a word is not.
    """
    if isinstance(clip.model, PreTrainedModel):
        return clip
    model, tokenizer = clip.model, as_clip_tokenizer(clip.tokenizer)
    assert isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP)
    text = model.text if isinstance(model, open_clip.CustomTextCLIP) else model
    visual = model.visual
    tower = type(visual).__name__  # ModifiedResNet, TimmModel
    _refuse_unless(isinstance(visual, VisionTransformer), f"its image tower is a {tower} and no VisionTransformer")
    _refuse_unless(hasattr(text, "token_embedding"), "its text tower is not open_clip's TextTransformer")
    _refuse_unless(visual.pool_type == "tok", f"its image tower pools by {visual.pool_type!r}")
    _refuse_unless(text.attn_mask is not None, "its text tower is not causal")
    _refuse_unless(isinstance(text.text_projection, nn.Parameter), "its text projection is no plain matrix")
    if (pool := text.text_pool_type if text is model else text.pool_type) == "argmax":
        pooled_id = tokenizer.vocab_size - 1
    else:
        _refuse_unless(pool == "eos", f"its text tower pools by {pool!r}")
        pooled_id = text.text_eos_id if text is model else text.eos_id
    _refuse_unless(
        pooled_id == tokenizer.eos_token_id,
        f"its text is pooled at id {pooled_id}, and the tokenizer ends it with {tokenizer.eos_token_id}",
    )
    size, patch = set(visual.image_size), set(visual.patch_size)
    _refuse_unless(len(size) == len(patch) == 1, f"it takes {visual.image_size} pixels, which is no square")
    projection_dim = text.text_projection.shape[1]
    config = CLIPConfig(
        projection_dim=projection_dim,
        text_config={
            **_tower_config(text.transformer, text.ln_final.eps),
            "projection_dim": projection_dim,
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": text.positional_embedding.shape[0],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **_tower_config(visual.transformer, visual.ln_post.eps),
            "projection_dim": projection_dim,
            "image_size": size.pop(),
            "patch_size": patch.pop(),
        },
    )
    weights = _rename({key.removeprefix("text."): value for key, value in model.state_dict().items()})
    converted = CLIPModel(config).to(clip.dtype)
    converted.load_state_dict(weights)
    converted.train(model.training).requires_grad_(clip.logit_scale.requires_grad)
    return CLIP(converted, tokenizer, clip.preprocess).to(clip.device)


def save_transformers(clip: CLIP, folder: str | Path) -> None:
    """Write a CLIP as a transformers folder: model, tokenizer and preprocessor_config.json."""
    clip = to_transformers(clip)
    folder = Path(folder)
    clip.model.save_pretrained(folder)
    clip.tokenizer.save_pretrained(folder)
    (folder / CONFIG_NAME).write_text(json.dumps(clip.preprocess.to_config(), indent=2) + "\n")


def save_open_clip(clip: CLIP, folder: str | Path) -> None:
    """Write a transformers CLIP as a folder for open_clip: `open_clip.create_model("local-dir:FOLDER")`."""
    _refuse_unless(not isinstance(clip.model, SiglipModel), "it is a SigLIP")
    if not isinstance(clip.model, CLIPModel):
        raise ValueError("an open_clip model does not carry its config; convert it to transformers first")
    preprocess, size = clip.preprocess, clip.image_size[0]
    squash = preprocess.resize == clip.image_size and preprocess.crop in (None, clip.image_size)
    _refuse_unless(squash or preprocess.resize == size, f"pictures are resized to {preprocess.resize}")
    _refuse_unless(preprocess.resample in ("bicubic", "bilinear"), f"they are resized by {preprocess.resample}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model_config = _open_clip_model_config(clip.model.config, clip.max_length)
    model_config["text_cfg"]["hf_tokenizer_name"] = folder.resolve().name  # its presence is what counts
    preprocess_config = {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.resample,
        "resize_mode": "squash" if squash else "shortest",
    }
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config}
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    weights = {key: value.contiguous() for key, value in _rename_back(clip.model.state_dict()).items()}
    save_file(weights, folder / OPEN_CLIP_WEIGHTS[0], metadata={"format": "pt"})
    clip.tokenizer.save_pretrained(folder)


@torch.no_grad()
def largest_difference(a: CLIP, b: CLIP, texts: Sequence[str], pixels: Tensor) -> float:
    """How far two CLIPs are apart on texts and pixels (B, 3, H, W) in [0, 1]: ids, states and both embeddings.

    Infinite where the ids or masks differ; else the largest absolute difference of any number.
    """
    ids_a, ids_b = a.tokenize(texts), b.tokenize(texts)
    if not torch.equal(ids_a.input_ids, ids_b.input_ids) or not torch.equal(ids_a.attention_mask, ids_b.attention_mask):
        return float("inf")
    text_a, text_b = a.text(ids_a), b.text(ids_b)
    pairs = [
        (text_a.tokens, text_b.tokens),
        (text_a.embedding, text_b.embedding),
        (a.image(pixels), b.image(pixels)),
        (a.logit_scale, b.logit_scale),
    ]
    return max((x.float().cpu() - y.float().cpu()).abs().max().item() for x, y in pairs)


def _refuse_unless(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(f"this CLIP cannot be converted exactly: {why}")


def _tower_config(transformer: Any, eps: float) -> dict[str, Any]:
    """The part of a tower's config that text and image share, read from the modules themselves."""
    block = transformer.resblocks[0]
    width, inner = block.mlp.c_fc.in_features, block.mlp.c_fc.out_features
    activation = block.mlp.gelu
    if isinstance(activation, QuickGELU):
        name = "quick_gelu"
    else:
        _refuse_unless(isinstance(activation, nn.GELU), f"its activation is {type(activation).__name__}")
        name = "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": name,
        "layer_norm_eps": eps,
    }


def clip_tokenizer(length: int, pad_token: str) -> CLIPTokenizer:
    """CLIP's own vocabulary, which comes with open_clip, for texts of so many tokens, padded by this one."""
    return as_clip_tokenizer(open_clip.SimpleTokenizer(context_length=length), pad_token)


def as_clip_tokenizer(tokenizer: Any, pad_token: str | None = None) -> CLIPTokenizer:
    """An open_clip tokenizer as transformers' CLIPTokenizer; `pad_token` None: id 0, as open_clip pads."""
    if isinstance(tokenizer, HFTokenizer):
        inner = tokenizer.tokenizer
        plain = isinstance(inner, CLIPTokenizer) and not tokenizer.strip_sep_token and not tokenizer.tokenizer_mode
        _refuse_unless(plain, f"its tokenizer is a {type(inner).__name__} with rules of its own")
        inner = copy.deepcopy(inner)
        inner.model_max_length = tokenizer.context_length
        return inner
    known = isinstance(tokenizer, open_clip.SimpleTokenizer)
    _refuse_unless(known, f"its tokenizer is a {type(tokenizer).__name__}")
    lower = tokenizer.clean_fn is get_clean_fn("lower")
    _refuse_unless(lower and tokenizer.reduction_fn is None, "its tokenizer cleans or shortens text in its own way")
    _refuse_unless(len(tokenizer.all_special_ids) == 2, "its tokenizer has special tokens of its own")
    names = {tokenizer.decoder[tokenizer.sot_token_id]: BOS, tokenizer.decoder[tokenizer.eot_token_id]: EOS}
    pad = tokenizer.decoder[0] if pad_token is None else pad_token
    return CLIPTokenizer(
        vocab={names.get(token, token): i for token, i in tokenizer.encoder.items()},
        merges=sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__),
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=pad if pad in (BOS, EOS) else AddedToken(pad, single_word=True, normalized=False, special=True),
        model_max_length=tokenizer.context_length,
    )


def _open_clip_model_config(config: CLIPConfig, context_length: int) -> dict[str, Any]:
    """open_clip's model_cfg for a transformers CLIP."""
    text, vision = config.text_config, config.vision_config
    activation = text.hidden_act
    _refuse_unless(
        activation == vision.hidden_act and activation in ("quick_gelu", "gelu"),
        f"its activations are {activation} and {vision.hidden_act}; open_clip has one of quick_gelu and gelu",
    )
    _refuse_unless(
        context_length == text.max_position_embeddings,
        f"it has {text.max_position_embeddings} positions and its tokenizer gives {context_length} tokens",
    )
    _refuse_unless(
        config.projection_dim == text.projection_dim == vision.projection_dim,
        "its projection_dim is not the same in all parts of its config",
    )

    def shared(tower: Any) -> dict[str, Any]:
        ratio = tower.intermediate_size / tower.hidden_size
        _refuse_unless(int(tower.hidden_size * ratio) == tower.intermediate_size, f"its MLP ratio is {ratio}")
        norm = {} if tower.layer_norm_eps == DEFAULT_EPS else {"norm_kwargs": {"eps": tower.layer_norm_eps}}
        return {"width": tower.hidden_size, "layers": tower.num_hidden_layers, "mlp_ratio": ratio, **norm}

    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            **shared(vision),
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            **shared(text),
            "heads": text.num_attention_heads,
            "context_length": context_length,
            "vocab_size": text.vocab_size,
            "pool_type": "eos",
            "eos_id": text.eos_token_id,
        },
    }


def _blocks(keys: Iterable[str], prefix: str) -> int:
    return len({key.removeprefix(prefix + ".").split(".")[0] for key in keys if key.startswith(prefix + ".")})


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names; ValueError where one is left over."""
    weights = dict(weights)
    out: dict[str, Tensor] = {}

    def take(key: str) -> Tensor:
        _refuse_unless(key in weights, f"it has no {key}")
        return weights.pop(key)

    for ours, theirs in PLAIN.items():
        out[theirs] = take(ours)
    out["logit_scale"] = out["logit_scale"].reshape(())
    for ours, theirs in TRANSPOSED.items():
        out[theirs] = take(ours).T.contiguous()
    for ours, theirs in TOWERS.items():
        for i in range(_blocks(weights, ours)):
            for kind in ("weight", "bias"):
                for mine, other in BLOCK.items():
                    out[f"{theirs}.{i}.{other}.{kind}"] = take(f"{ours}.{i}.{mine}.{kind}")
                parts = take(f"{ours}.{i}.attn.in_proj_{kind}").chunk(3)
                out.update({f"{theirs}.{i}.{q}.{kind}": p for q, p in zip(QKV, parts, strict=True)})
    _refuse_unless(not weights, f"transformers' CLIP has no place for {', '.join(sorted(weights)[:3])}")
    return out


def _rename_back(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: transformers' tensors under open_clip's names."""
    out = {ours: weights[theirs] for ours, theirs in PLAIN.items()}
    out |= {ours: weights[theirs].T.contiguous() for ours, theirs in TRANSPOSED.items()}
    for ours, theirs in TOWERS.items():
        for i in range(_blocks(weights, theirs)):
            for kind in ("weight", "bias"):
                for mine, other in BLOCK.items():
                    out[f"{ours}.{i}.{mine}.{kind}"] = weights[f"{theirs}.{i}.{other}.{kind}"]
                parts = [weights[f"{theirs}.{i}.{q}.{kind}"] for q in QKV]
                out[f"{ours}.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    return out
