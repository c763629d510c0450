"""Textual inversion (Gal et al. 2022): words whose vectors were learned, added to text towers and their tokenizers.

A word of several vectors is several tokens, `word`, `word_1`, ..., as diffusers names them; whoever reads a text writes
them out (`clip_core.text.spelled_out`), and so does stock diffusers with a model that was saved. Nothing of a model is
changed before all of a file fits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from clip_core.weights import content_hash
from gen.adapters.file import Adapter, found, read
from gen.families.base import FamilyModel

logger = logging.getLogger(__name__)

USUAL = "learned_embeds.safetensors"  # as diffusers names the file
TOWERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# What files of several programs call the vectors of each tower. Diffusers' own call them by the word itself.
NAMES = {"text_encoder": ("emb_params", "clip_l"), "text_encoder_2": ("clip_g",)}
LEGACY_EOS_ID = 2  # transformers then pools a text at its highest id, which would be the new word's


@torch.no_grad()
def learn(model: FamilyModel, name: str | Path, token: str | None = None) -> Adapter:
    """Teach a model's text towers a word; they are changed in place and must be its own (`FamilyModel.with_own_texts`).

    `token` None: the word that the file says, or else the file's name. ValueError for a file that does not fit the
    towers and for a word that they know already; then nothing was changed.
    """
    path = found("embedding", name, USUAL).path
    tensors = read(path).tensors
    word = token_in(tensors, path) if token is None else token
    if not word or any(letter.isspace() for letter in word):
        raise ValueError(f"embedding '{name}': token {word!r} is no word; give one without spaces, such as <cat>")
    parts = model.parts()
    towers = {tower: (parts[tokenizer], parts[tower]) for tower, tokenizer in TOWERS.items() if tower in parts}
    vectors = {tower: vectors_of(str(name), tensors, tower, len(towers)) for tower in towers}
    if not towers or len({len(each) for each in vectors.values()}) != 1:
        lengths = ", ".join(f"{len(each)} for {tower}" for tower, each in vectors.items()) or "no text tower"
        raise ValueError(f"embedding '{name}' does not fit this model: its vectors are {lengths}")
    for tower, (tokenizer, encoder) in towers.items():
        if not isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
            raise ValueError(
                f"embedding '{name}' is a word of CLIP's; this model's {tower} is {type(encoder).__name__}"
            )
        given, width = vectors[tower].shape[1], encoder.config.hidden_size
        if given != width:
            raise ValueError(f"embedding '{name}' is of another base model: it is {given} wide, {tower} {width}")
        known = tokenizer.get_vocab()
        if taken := [each for each in spelling(word, len(vectors[tower])) if each in known]:
            raise ValueError(f"embedding '{name}': the model knows {taken[0]!r} already; give another token")
    for tower, (tokenizer, encoder) in towers.items():
        words = spelling(word, len(vectors[tower]))
        tokenizer.add_tokens(words)
        rows = encoder.get_input_embeddings().num_embeddings
        encoder.resize_token_embeddings(max(rows, len(tokenizer)), mean_resizing=False)
        weight = encoder.get_input_embeddings().weight
        weight[tokenizer.convert_tokens_to_ids(words)] = vectors[tower].to(weight.device, weight.dtype)
        weight.requires_grad_(False)
        pool_at_the_end(encoder, tokenizer.eos_token_id)
    if model.prior is not None and model.prior.text_encoder is not parts["text_encoder"]:
        logger.warning("the prior does not know %r and reads it letter by letter; the decoder knows it", word)
    return Adapter("embedding", str(name), content_hash(path), token=word)


def token_in(tensors: Mapping[str, Tensor], path: Path) -> str:
    """The word of a file: what diffusers says in it, or else its name, as other programs take it."""
    of_programs = {name for names in NAMES.values() for name in names}
    return path.stem if set(tensors) & of_programs or len(tensors) != 1 else next(iter(tensors))


def vectors_of(name: str, tensors: Mapping[str, Tensor], tower: str, num_towers: int) -> Tensor:
    """The vectors (k, D) of one tower."""
    found = [tensors[key] for key in NAMES[tower] if key in tensors]
    if num_towers == len(tensors) == 1:
        found = list(tensors.values())
    if len(found) != 1 or found[0].ndim not in (1, 2) or not found[0].numel() or len(tensors) != num_towers:
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:5]) or "nothing"
        wanted = " and ".join(NAMES[each][-1] for each in list(TOWERS)[:num_towers]) if num_towers > 1 else "one tensor"
        raise ValueError(f"embedding '{name}' holds {shapes}; this model takes {wanted} of shape (vectors, width)")
    return torch.atleast_2d(found[0])


def spelling(word: str, vectors: int) -> list[str]:
    """The tokens of a word of so many vectors."""
    return [word, *(f"{word}_{k}" for k in range(1, vectors))]


def pool_at_the_end(encoder: Any, eos: int) -> None:
    """Let a text tower of an old configuration pool a text at its end, and not at its highest id."""
    tower = getattr(encoder, "text_model", encoder)  # without its projection
    for holder in (tower, encoder.config, tower.config):
        if holder.eos_token_id == LEGACY_EOS_ID:
            holder.eos_token_id = eos
