"""The unCLIP prior with its constant prefix kept (Ramesh et al. 2022, section 2.2: a causal transformer).

Its tokens are the text's, the text embedding, the timestep, the noisy embedding and a learned query. Attention is
causal, so what all but the last three say in any layer depends neither on the step nor on the noise. `CachedPrior`
keeps their keys and values once per condition, as a language model does for its prompt, and a step runs three
tokens per evaluation; the candidates of a prompt read one copy. It wraps diffusers' PriorTransformer and leaves it
as it is; it knows no rows, samplers or texts. What cannot be done this way runs whole, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from diffusers import PriorTransformer
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from clip_core.device import network_device, to_device, weights_dtype
from gen.attention.processor import STOCK, Processor
from gen.conditioning import Condition, Conditions

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""attend(query, key, value) -> output, all (B, tokens, D) before heads are split"""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What U conditions' constant tokens are to those behind them."""

    keys: Tensor  # (layers, U, H, P, d)
    values: Tensor  # (layers, U, H, P, d)
    bias: Tensor  # (U, P), added to their scores: 0, or -10000 where the text is padded

    def one(self, index: int) -> Prefix:
        """The prefix of one condition, a view."""
        at = slice(index, index + 1)
        return Prefix(self.keys[:, at], self.values[:, at], self.bias[at])

    @classmethod
    def cat(cls, parts: Sequence[Prefix]) -> Prefix:
        """One behind the other, copied."""
        return cls(
            torch.cat([part.keys for part in parts], dim=1),
            torch.cat([part.values for part in parts], dim=1),
            torch.cat([part.bias for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Fold:
    """Conditions that equally many evaluations read, so that these fold into the query axis of one product."""

    prefix: Prefix
    evaluations: slice  # of those in `PrefixPlan.order`; condition by condition

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, tail_bias: Tensor) -> Tensor:
        """Attention of the tail, (U * n, K, D) each, to prefix and tail under one softmax; `tail_bias` is (K, K)."""
        keys, values = self.prefix.keys[layer], self.prefix.values[layer]  # (U, H, P, d)
        num_conditions, heads, length, width = keys.shape
        query, key, value = (
            part.reshape(num_conditions, -1, part.shape[1], heads, width).permute(0, 3, 1, 2, 4)
            for part in (query * width**-0.5, key, value)
        )  # (U, H, n, K, d)
        to_prefix = (query.flatten(2, 3) @ keys.mT).unflatten(2, query.shape[2:4])  # (U, H, n, K, P)
        to_prefix = to_prefix + self.prefix.bias[:, None, None, None]
        scores = torch.cat([to_prefix, query @ key.mT + tail_bias], dim=-1)
        weights = scores.softmax(dim=-1).to(value.dtype)
        from_prefix = (weights[..., :length].flatten(2, 3) @ values).unflatten(2, query.shape[2:4])
        out = from_prefix + weights[..., length:] @ value  # (U, H, n, K, d)
        return out.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1)  # (U * n, K, D)


@dataclass(frozen=True, eq=False)
class PrefixPlan:
    """How the evaluations of a call read the prefixes."""

    folds: list[Fold]
    order: Tensor  # (M,) the evaluations, fold by fold
    back: Tensor  # (M,) where each evaluation is in `order`


@dataclass(eq=False)
class CachedPrior:
    """A prior as rows ask it, `network(x, timestep, conditions)`; equal to the stock call.

    It keeps a prefix for as long as somebody refers to its condition, and how to read the conditions of a call for as
    long as those are referred to, so it never holds more than what is in flight. The network's weights may not change
    meanwhile.
    """

    network: PriorTransformer
    # None: run whole
    _plans: WeakKeyDictionary[Conditions, PrefixPlan | None] = field(default_factory=WeakKeyDictionary)
    _kept: WeakKeyDictionary[Condition, Prefix] = field(default_factory=WeakKeyDictionary)  # views of what plans hold
    _logged: str | None = None  # the reason last logged

    def __call__(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """(M, E) noisy embeddings -> the network's own output, (M, E)."""
        plan = self._plan_for(conditions)
        x = x.to(weights_dtype(self.network))
        return (
            whole(self.network, x, timestep, conditions)
            if plan is None
            else last_tokens(self.network, x, timestep, plan)
        )

    def _plan_for(self, conditions: Conditions) -> PrefixPlan | None:
        """How to read these conditions; None, and a word in the log, where the network has to run whole."""
        if torch.is_grad_enabled():
            self._say("gradients are recorded")
            return None
        if conditions not in self._plans:
            distinct = conditions.distinct
            new = [condition for condition in distinct.unique if condition not in self._kept]
            reason = why_whole(self.network) or why_not_constant(self.network, new)
            self._plans[conditions] = None if reason else self._planned(distinct.unique, distinct.of, new)
            self._say(reason)
        return self._plans[conditions]

    def _say(self, reason: str | None) -> None:
        if reason not in (None, self._logged):
            logger.info("the prior runs all its tokens at every step: %s", reason)
        self._logged = reason

    def _planned(self, unique: Sequence[Condition], of: Sequence[int], new: Sequence[Condition]) -> PrefixPlan:
        if new:
            fresh = read_prefix(self.network, new)
            self._kept |= {condition: fresh.one(place) for place, condition in enumerate(new)}
        folds: list[Fold] = []
        order: list[int] = []
        for places, evaluations in folded(of):
            prefix = Prefix.cat([self._kept[unique[place]] for place in places])
            self._kept |= {unique[place]: prefix.one(at) for at, place in enumerate(places)}
            folds.append(Fold(prefix, slice(len(order), len(order) + len(evaluations))))
            order += evaluations
        ordered, device = torch.tensor(order), network_device(self.network)
        return PrefixPlan(folds, to_device(ordered, device), to_device(ordered.argsort(), device))


def why_whole(network: PriorTransformer) -> str | None:
    """Why this network has to run as it is, in words; None where its prefix can be kept."""
    if type(network) is not PriorTransformer:
        return f"{type(network).__name__} is not diffusers' PriorTransformer itself"
    if network.training:
        return "it is in training mode, where dropout makes every call another"
    expected = num_tail_tokens(network) + 1  # beside the text's: the text embedding as well
    if network.config.additional_embeddings != expected:
        given = network.config.additional_embeddings
        return f"it has additional_embeddings={given} where its tokens beside the text are {expected}"
    for block in network.transformer_blocks:
        if type(block.attn1.processor) not in (*STOCK, Processor):
            return f"its attention processor {type(block.attn1.processor).__name__} may do more than attend"
    if any(is_hooked(module) for module in passed_by(network)):
        return "its modules have hooks (offloading, for one) that only a whole call runs"
    return None


def why_not_constant(network: PriorTransformer, conditions: Sequence[Condition]) -> str | None:
    """Why the first tokens of some of these would see the last ones, in words; None where none does.

    diffusers' masks add up: -10000 for what comes later, -10000 for padding. A query with nothing but padding
    before it has the same -10000 there and on later text, so that it sees both; this is so for some query exactly
    where the first token is padding.
    """
    length = network.config.num_embeddings
    for condition in conditions:
        states, mask = condition.encoder_hidden_states, condition.attention_mask
        if states is None or mask is None:
            return "without text tokens and their mask it is not causal"
        if states.shape[0] != length:
            return f"a text has {states.shape[0]} tokens where its masks and positions are for {length}"
    masks = [condition.attention_mask for condition in conditions if condition.attention_mask is not None]
    if masks and not torch.stack(masks)[:, 0].all():
        return "a text begins with padding, for which its mask is not causal"
    return None


def passed_by(network: PriorTransformer) -> Iterator[nn.Module]:
    """The modules whose own `forward` a cached call does not run."""
    yield network
    for block in network.transformer_blocks:
        yield from (block, block.attn1)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class says; accelerate and diffusers replace `forward`."""
    return "forward" in vars(module) or bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def folded(of: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Conditions that equally many evaluations read, and those evaluations condition by condition.

    M evaluations make fewer than sqrt(2 M) of these folds, since each has a count of its own.
    """
    readers: dict[int, list[int]] = {}
    for evaluation, condition in enumerate(of):
        readers.setdefault(condition, []).append(evaluation)
    equal: dict[int, list[int]] = {}
    for condition, evaluations in readers.items():
        equal.setdefault(len(evaluations), []).append(condition)
    return [(found, [evaluation for each in found for evaluation in readers[each]]) for found in equal.values()]


def whole(network: PriorTransformer, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
    """The stock call; without a learned query it answers (M, 1, E), here (M, E) always."""
    output = network(
        x,
        timestep,
        proj_embedding=conditions.pooled_projections,
        encoder_hidden_states=conditions.encoder_hidden_states,
        attention_mask=conditions.attention_mask,
    )
    return output.predicted_image_embedding.reshape(len(x), -1)


def read_prefix(network: PriorTransformer, conditions: Sequence[Condition]) -> Prefix:
    """Run the constant tokens of U conditions and keep every layer's keys and values."""
    together = Conditions(tuple(conditions))
    tokens, vector, mask = together.encoder_hidden_states, together.pooled_projections, together.attention_mask
    assert tokens is not None and vector is not None and mask is not None
    if network.embedding_proj_norm is not None:
        vector = network.embedding_proj_norm(vector)
    if network.encoder_hidden_states_proj is not None:
        tokens = network.encoder_hidden_states_proj(tokens)
    hidden = torch.cat([tokens, network.embedding_proj(vector)[:, None]], dim=1)  # (U, P, D)
    length = hidden.shape[1]
    hidden = placed(network, hidden, slice(0, length))
    padding = F.pad((1 - mask.to(hidden.dtype)) * -10000.0, (0, 1))  # (U, P), as the stock forward writes it
    causal = network.causal_attention_mask[:, :length, :length]
    bias = (padding[:, None] + causal).to(hidden.dtype)[:, None]  # (U, 1, P, P)
    keys, values = [], []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (network.config.num_attention_heads, -1)).transpose(1, 2) for part in (query, key, value)
        )  # (U, H, P, d)
        keys.append(key)
        values.append(value)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)

    for block in network.transformer_blocks:
        hidden = through(block, hidden, attend)
    return Prefix(torch.stack(keys), torch.stack(values), padding)


def last_tokens(network: PriorTransformer, x: Tensor, timestep: Tensor, plan: PrefixPlan) -> Tensor:
    """One step: the tail of M evaluations (M, K, D) behind their prefixes; the network's output, (M, E)."""
    x, timestep = x[plan.order], timestep[plan.order]
    noisy = network.proj_in(x)  # (M, D)
    tail = [network.time_embedding(network.time_proj(timestep).to(noisy.dtype)), noisy]
    if network.prd_embedding is not None:
        tail.append(network.prd_embedding[0].to(noisy.dtype).expand(len(x), -1))
    hidden = torch.stack(tail, dim=1)  # (M, K, D)
    at = slice(-len(tail), None)
    hidden = placed(network, hidden, at)
    bias = network.causal_attention_mask[0, at, at].to(hidden.dtype)  # (K, K)
    for layer, block in enumerate(network.transformer_blocks):

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int = layer) -> Tensor:
            return torch.cat(
                [
                    fold.attend(layer, query[fold.evaluations], key[fold.evaluations], value[fold.evaluations], bias)
                    for fold in plan.folds
                ]
            )

        hidden = through(block, hidden, attend)
    answer = network.norm_out(hidden[:, -1])  # the learned query's, or the noisy embedding's where there is none
    return network.proj_to_clip_embeddings(answer)[plan.back]


def num_tail_tokens(network: PriorTransformer) -> int:
    """K: the timestep, the noisy embedding and, where there is one, the learned query."""
    return 2 if network.prd_embedding is None else 3


def placed(network: PriorTransformer, hidden: Tensor, at: slice) -> Tensor:
    """Tokens (B, tokens, D) at their positions, as the first block reads them."""
    hidden = hidden + network.positional_embedding[:, at].to(hidden.dtype)
    return hidden if network.norm_in is None else network.norm_in(hidden)


def through(block: BasicTransformerBlock, hidden: Tensor, attend: Attend) -> Tensor:
    """A block as PriorTransformer builds them (pre-norm, self-attention alone), its attention replaced."""
    attention, normed = block.attn1, block.norm1(hidden)
    out = attend(attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
    for module in attention.to_out:
        out = module(out)
    hidden = out + hidden
    return block.ff(block.norm3(hidden)) + hidden
