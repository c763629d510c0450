"""The prior with its constant prefix kept: the same numbers as diffusers' own module, for fewer tokens."""

from __future__ import annotations

import copy
import gc
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from gen import TextToImage
from gen.attention.network import set_attention
from gen.bucket import PROBE
from gen.candidate import Candidate
from gen.conditioning import Condition, Conditions, Distinct, Table
from gen.prior import STAGE, Prior
from gen.prior_prefix import CachedPrior, folded
from gen.row import Row
from gen.rows import Rows
from gen.settings import Settings
from samplers.noise import noise
from tests.tiny import WIDTH

LENGTH, HEADS, HEAD_WIDTH, LAYERS = 12, 2, 8, 3
PREFIX = LENGTH + 1  # the text and its embedding
LENGTHS = [2, 12, 5, 7, 1]  # tokens of each condition that are not padding

VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "norm_in": {"norm_in_type": "layer"},
    "embedding_proj_norm": {"embedding_proj_norm_type": "layer"},
    "no_encoder_hid_proj": {"encoder_hid_proj_type": None},
    "no_prd": {"added_emb_type": None, "additional_embeddings": 3},
    "gelu_time": {"time_embed_act_fn": "gelu", "time_embed_dim": 24},
    "wide_text_embedding": {"embedding_proj_dim": 20},
    "dropout": {"dropout": 0.5},
}
CALLS = {
    "one": [0],
    "candidates": [2] * 16,
    "guided": [0] * 3 + [1] * 3,
    "prompts": [0] * 6 + [1] * 3 + [3] * 3,
    "unequal": [0, 1, 1, 1, 2, 3, 3, 3, 4, 4],
    "ungrouped": [3, 0, 3, 1, 0],
}


def make_prior(**config: Any) -> PriorTransformer:
    """A random prior in which every token, position and norm shows in the answer."""
    sizes: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH, "num_layers": LAYERS}
    sizes |= {"embedding_dim": WIDTH, "num_embeddings": LENGTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = PriorTransformer(**(sizes | config)).eval()
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return prior


def texts_for(prior: PriorTransformer) -> list[Condition]:
    rng = torch.Generator().manual_seed(1)
    conditions, width = [], prior.config.embedding_proj_dim or WIDTH
    for length in LENGTHS:
        tokens, vector = torch.randn(LENGTH, WIDTH, generator=rng), torch.randn(width, generator=rng)
        conditions.append(Condition(tokens, vector, torch.arange(LENGTH) < length))
    return conditions


def gathered(texts: Sequence[Condition], indices: Sequence[int]) -> Conditions:
    return Conditions(tuple(texts[index] for index in indices))


def stock(prior: PriorTransformer) -> Callable[[Tensor, Tensor, Conditions], Tensor]:
    """Stock's own call, as the engine asks a network."""

    def call(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        asked = {
            "proj_embedding": conditions.pooled_projections,
            "encoder_hidden_states": conditions.encoder_hidden_states,
            "attention_mask": conditions.attention_mask,
        }
        return prior(x.to(prior.dtype), timestep, **asked).predicted_image_embedding.reshape(len(x), -1)

    return call


def asked(rows: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=rng), torch.randint(1000, (rows,), generator=rng)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """As generation runs."""
    with torch.no_grad():
        yield


def read(prior: PriorTransformer) -> list[tuple[int, ...]]:
    """(batch, tokens) that a prior's first block is given from now on."""
    shapes: list[tuple[int, ...]] = []
    prior.transformer_blocks[0].norm1.register_forward_hook(lambda _, given, out: shapes.append(out.shape[:2]))
    return shapes


# --- one call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("call", CALLS)
def test_one_call_equals_diffusers(variant: str, call: str) -> None:
    prior = make_prior(**VARIANTS[variant])
    conditions, (x, timestep) = gathered(texts_for(prior), CALLS[call]), asked(len(CALLS[call]))
    theirs = stock(prior)(x, timestep, conditions)
    shapes = read(prior)
    ours = CachedPrior(prior)(x, timestep, conditions)
    assert (ours - theirs).abs().max() < 1e-5
    tail = 2 if variant == "no_prd" else 3
    assert shapes == [(len(set(CALLS[call])), PREFIX), (len(CALLS[call]), tail)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_can_fail(variant: str) -> None:
    """Step, noise, text, text embedding and mask all show in the answer."""
    prior = make_prior(**VARIANTS[variant])
    condition, (x, timestep) = texts_for(prior)[2], asked(1)
    tokens, vector, mask = condition.encoder_hidden_states, condition.pooled_projections, condition.attention_mask
    assert tokens is not None and vector is not None and mask is not None

    def answer(condition: Condition = condition, x: Tensor = x, timestep: Tensor = timestep) -> Tensor:
        return stock(prior)(x, timestep, Conditions((condition,)))

    changed = [answer(x=x + 1), answer(timestep=timestep + 300)]
    changed += [answer(Condition(tokens.flip(1), vector, mask)), answer(Condition(tokens, vector.flip(0), mask))]
    changed += [answer(Condition(tokens, vector, torch.arange(LENGTH) < 9))]
    assert all((other - answer()).abs().max() > 1e-3 for other in changed)


def test_padding_says_nothing() -> None:
    """What is padded may be anything, in the stock call as in ours."""
    prior = make_prior()
    condition, (x, timestep) = texts_for(prior)[2], asked(1)
    assert condition.encoder_hidden_states is not None
    other = Condition(condition.encoder_hidden_states.clone(), condition.pooled_projections, condition.attention_mask)
    assert other.encoder_hidden_states is not None
    other.encoder_hidden_states[LENGTHS[2] :] += 5
    plain, padded = (Conditions((each,)) for each in (condition, other))
    for network in (stock(prior), CachedPrior(prior)):
        assert (network(x, timestep, plain) - network(x, timestep, padded)).abs().max() < 1e-5


def eager(prior: PriorTransformer) -> None:
    prior.set_attn_processor(AttnProcessor())


@pytest.mark.parametrize("change", [eager, set_attention])
def test_other_kernels_are_cached_too(change: Callable[[PriorTransformer], None]) -> None:
    prior = make_prior()
    change(prior)
    conditions, (x, timestep) = gathered(texts_for(prior), CALLS["unequal"]), asked(10)
    theirs = stock(prior)(x, timestep, conditions)
    shapes = read(prior)
    assert (CachedPrior(prior)(x, timestep, conditions) - theirs).abs().max() < 1e-5
    assert shapes[-1] == (10, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_diffusers(dtype: torch.dtype) -> None:
    prior = make_prior()
    texts, (x, timestep) = texts_for(prior), asked(10)
    true = stock(prior)(x, timestep, gathered(texts, CALLS["unequal"]))
    half = copy.deepcopy(prior).to(dtype)
    kinds = [(one.encoder_hidden_states, one.pooled_projections) for one in texts]
    cast = [
        Condition(tokens.to(dtype), vector.to(dtype), one.attention_mask)
        for one, (tokens, vector) in zip(texts, kinds, strict=True)
        if tokens is not None and vector is not None
    ]
    conditions = Conditions(tuple(cast[index] for index in CALLS["unequal"]))
    theirs, ours = (network(x, timestep, conditions).float() for network in (stock(half), CachedPrior(half)))
    assert (ours - true).abs().mean() < 1.5 * (theirs - true).abs().mean()


# --- whole loops -----------------------------------------------------------------------------------------------

PROMPTS = ["a small red circle", "a star", "a large blue square above a small green star on white"]


def candidates_of(prompts: Sequence[str], number: int, scale: float, steps: int = 5) -> list[Candidate]:
    settings = Settings(prior=True, prior_num_inference_steps=steps, prior_guidance_scale=scale)
    return [Candidate(prompt=text, seed=seed, settings=settings) for text in prompts for seed in range(number)]


def stock_loop(prior: Prior, candidates: Sequence[Candidate], scale: float, steps: int = 5) -> Tensor:
    """As StableUnCLIPPipeline runs its prior: every row beside its own copy of the empty prompt."""
    conditions = prior.conditions([one.prompt for one in candidates])
    null = prior.conditions([""] * len(candidates))
    scheduler, network = copy.deepcopy(prior.levels.stock), stock(prior.network)
    scheduler.set_timesteps(steps)
    x = noise([one.seed for one in candidates], STAGE, 0, (WIDTH,))
    for t in scheduler.timesteps:
        timestep = t.expand(len(x))
        answer = network(x, timestep, Conditions(tuple(conditions)))
        if scale > 1:
            away = network(x, timestep, Conditions(tuple(null)))
            answer = away + scale * (answer - away)
        x = scheduler.step(answer, t, x).prev_sample
    return prior.network.post_process_latents(x)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("number", [1, 3, 16])
def test_a_whole_loop_equals_diffusers(tiny: TextToImage, number: int, scale: float) -> None:
    prior = tiny.model.prior
    assert prior is not None
    asked = candidates_of(PROMPTS, number, scale)
    theirs = stock_loop(prior, asked, scale)
    ours = prior.sample(asked)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp(min=1)
    if number == 3:  # every prompt's rows come and go on their own
        assert (prior.sample(asked, max_rows=2) - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp(min=1)
    wrong = stock_loop(prior, asked[::-1], scale)
    assert (wrong - theirs).abs().max() > 1e-2


def test_every_text_is_read_once_and_forgotten(tiny: TextToImage) -> None:
    prior = copy.deepcopy(tiny.model.prior)
    assert prior is not None
    shapes, length = read(prior.network), prior.text.shape[0] + 1
    seen: list[int] = []
    gc.collect()  # what tests before this one have left
    for max_rows in (None, 3):
        shapes.clear()
        seen += [num_kept(prior.network) for _ in running(prior, candidates_of(PROMPTS, 4, 3.0), max_rows)]
        # the first evaluations are measured before any is asked for its answer, with texts of their own
        assert sum(batch for batch, tokens in shapes if tokens == length) == len(PROMPTS) + 1 + PROBE
        assert sum(batch for batch, tokens in shapes if tokens == 3) == 2 * 4 * len(PROMPTS) * 5 + PROBE
        assert num_kept(prior.network) == 0
    # three rows at a time are of two prompts at most, beside the empty one
    assert seen[:5] == [4] * 5 and max(seen[5:]) == 3


@torch.no_grad()
def running(prior: Prior, candidates: Sequence[Candidate], max_rows: int | None) -> Iterator[None]:
    """A pause after every step, as `Prior.sample` takes them."""
    rows = Rows(prior.cached_network(), prior.levels.scaling, STAGE)
    for finished in rows.run(prior.rows(candidates, range(len(candidates)), Table()), max_rows):
        del finished
        yield


def num_kept(network: PriorTransformer) -> int:
    """Conditions whose keys and values (layers, U, H, P, d) are in memory, told by the storages; none waits for gc."""
    config = network.config
    rest = (config.num_attention_heads, config.num_embeddings + 1, config.attention_head_dim)
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and each.ndim == 5]
    ours = [each for each in tensors if each.shape[0] == config.num_layers and each.shape[2:] == rest]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in ours}
    one = 2 * 4 * config.num_layers * math.prod(rest)  # keys and values in float32
    return sum(storages.values()) // one


@pytest.mark.parametrize("seed", range(4))
def test_rows_join_and_leave_at_random(tiny: TextToImage, seed: int) -> None:
    """Rows of several prompts and schedules, guided or not, admitted and dropped at any tick."""
    prior = tiny.model.prior
    assert prior is not None
    draw, conditions = random.Random(seed), prior.conditions(["", *PROMPTS])

    def row(key: int) -> Row:
        schedule = prior.levels.schedule(prior.levels.sampler, draw.choice([3, 5, 8]))
        prompt = conditions[draw.randint(1, len(PROMPTS))]
        weight = draw.choice([1.0, 3.0, 5.0])
        return Row(
            key, key, (WIDTH,), schedule, prior.levels.sampler, prompt, null=conditions[0], guidance_scale=weight
        )

    rows = [row(key) for key in range(14)]

    def over(network: Any) -> Rows:
        return Rows(network, prior.levels.scaling, STAGE)

    alone = {one.row.key: one.x for each in rows for done in over(stock(prior.network)).run([each]) for one in done}
    together, waiting, found, dropped = over(CachedPrior(prior.network)), list(rows), {}, set()
    while waiting or together.lanes:
        number = draw.randint(0, 4)
        together.admit(waiting[:number])
        waiting = waiting[number:]
        if draw.random() < 0.3 and together.live:
            dropped.add(draw.choice(together.live).row.key)
            together.drop(dropped)
        found |= {one.row.key: one.x for one in together.tick().finished}
    assert set(found) == set(alone) - dropped and dropped and len(found) > 5
    for key, x in found.items():
        assert (x - alone[key]).abs().max() < 1e-5 * alone[key].abs().max().clamp(min=1)


# --- what cannot be cached -------------------------------------------------------------------------------------


class Doubled(PriorTransformer):
    """A subclass may do anything."""

    def forward(self, *given: Any, **named: Any) -> Any:
        out = super().forward(*given, **named)
        out.predicted_image_embedding = 2 * out.predicted_image_embedding
        return out


def doubled(prior: PriorTransformer) -> PriorTransformer:
    prior.__class__ = Doubled
    return prior


def training(prior: PriorTransformer) -> PriorTransformer:
    return prior.train()


class Negative(AttnProcessor2_0):
    """So may a processor's."""

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        return -super().__call__(*given, **named)


def negative(prior: PriorTransformer) -> PriorTransformer:
    prior.set_attn_processor(Negative())
    return prior


def hooked(prior: PriorTransformer) -> PriorTransformer:
    prior.transformer_blocks[1].register_forward_hook(lambda module, given, out: out + 1)
    return prior


def replaced(prior: PriorTransformer) -> PriorTransformer:
    """As accelerate and diffusers offload: the module's own `forward` is put away behind another."""
    forward = prior.transformer_blocks[0].attn1.forward
    prior.transformer_blocks[0].attn1.forward = lambda *given, **named: 2 * forward(*given, **named)
    return prior


@pytest.mark.parametrize(
    ("change", "word"),
    [(doubled, "Doubled"), (training, "training"), (negative, "Negative"), (hooked, "hooks"), (replaced, "hooks")],
)
def test_other_networks_run_whole_and_say_so(
    caplog: pytest.LogCaptureFixture, change: Callable[[PriorTransformer], PriorTransformer], word: str
) -> None:
    prior = change(make_prior())
    conditions, (x, timestep) = gathered(texts_for(prior), [0, 1, 1]), asked(3)
    network = CachedPrior(prior)
    with caplog.at_level(logging.INFO, "gen.prior_prefix"):
        ours = [network(x, timestep, conditions) for _ in range(3)]
    theirs = stock(prior)(x, timestep, conditions)
    assert all(torch.equal(each, theirs) for each in ours)
    assert [word in record.message for record in caplog.records] == [True]


def test_a_text_that_begins_with_padding_runs_whole(caplog: pytest.LogCaptureFixture) -> None:
    """The stock masks then let the first tokens see the last ones, so they are not constant."""
    prior = make_prior()
    texts = texts_for(prior)
    left, none = len(texts), len(texts) + 1
    for mask in (torch.arange(LENGTH) >= 4, torch.zeros(LENGTH, dtype=torch.bool)):
        texts.append(Condition(texts[0].encoder_hidden_states, texts[0].pooled_projections, mask))
    network, (x, timestep) = CachedPrior(prior), asked(2)
    with caplog.at_level(logging.INFO, "gen.prior_prefix"):
        for call in ([0, 1], [left, 1], [none, left], [0, 1]):
            conditions = gathered(texts, sorted(call))
            assert (network(x, timestep, conditions) - stock(prior)(x, timestep, conditions)).abs().max() < 1e-5
    assert ["begins with padding" in record.message for record in caplog.records] == [True]


def test_without_a_mask_it_is_not_causal(caplog: pytest.LogCaptureFixture) -> None:
    prior = make_prior()
    conditions = Conditions(
        tuple(Condition(one.encoder_hidden_states, one.pooled_projections) for one in texts_for(prior))
    )
    x, timestep = asked(len(LENGTHS))
    theirs, shapes = stock(prior)(x, timestep, conditions), read(prior)
    with caplog.at_level(logging.INFO, "gen.prior_prefix"):
        assert torch.equal(CachedPrior(prior)(x, timestep, conditions), theirs)
    assert shapes == [(len(LENGTHS), LENGTH + 4)] and "not causal" in caplog.text


def test_shapes_that_diffusers_refuses_are_refused() -> None:
    """A text of another length, or positions for another number of tokens, is never answered by the cache alone."""
    conditions, (x, timestep) = gathered(texts_for(make_prior()), [0, 1]), asked(2)
    sizes = [(LENGTH + 2, 4), (LENGTH + 1, 3), (LENGTH, 6), (LENGTH, 3)]
    for num_embeddings, additional in sizes:
        prior = make_prior(num_embeddings=num_embeddings, additional_embeddings=additional)
        for network in (stock(prior), CachedPrior(prior)):
            with pytest.raises(RuntimeError):
                network(x, timestep, conditions)


def test_gradients_are_whole(caplog: pytest.LogCaptureFixture) -> None:
    prior = make_prior()
    conditions, (x, timestep) = gathered(texts_for(prior), [0, 1]), asked(2)
    network, weight = CachedPrior(prior), prior.transformer_blocks[0].attn1.to_k.weight
    network(x, timestep, conditions)
    with torch.enable_grad(), caplog.at_level(logging.INFO, "gen.prior_prefix"):
        ours, theirs = (
            torch.autograd.grad(call(x, timestep, conditions).sum(), weight)[0] for call in (network, stock(prior))
        )
    assert torch.equal(ours, theirs) and "gradients" in caplog.text


# --- who is told what ------------------------------------------------------------------------------------------


def test_conditions_are_told_apart_by_identity() -> None:
    words, other = torch.zeros(3, 2), torch.zeros(3, 2)
    texts = [
        Condition(tokens, vector)
        for tokens, vector in ((words, torch.ones(1)), (other, torch.ones(1)), (words, torch.zeros(1)))
    ]
    conditions = gathered(texts, [0, 0, 1, 2])
    assert conditions.distinct.unique == tuple(texts) and conditions.distinct.of == (0, 0, 1, 2)
    assert [id(each) for each in conditions.distinct_encoder_hidden_states.unique] == [id(words), id(other)]
    assert conditions.distinct_encoder_hidden_states.of == (0, 0, 1, 0)
    assert conditions.encoder_hidden_states is not None and conditions.encoder_hidden_states.shape == (4, 3, 2)
    assert conditions.attention_mask is None
    assert Distinct.among([words, words]).of == (0, 0)
    twins = Conditions((texts[0], texts[0].copy()))
    assert len(twins.distinct.unique) == len(twins.distinct_encoder_hidden_states.unique) == 2


def test_a_table_gives_the_same_to_all_who_say_the_same_while_they_are_told_it() -> None:
    table, made = Table(), list[str]()

    def make(names: list[str]) -> list[Condition]:
        made.extend(names)
        return [Condition(torch.zeros(1, 1)) for _ in names]

    first = table.of(["a", "b"], make)
    second = table.of(["b", "a", "c"], make)
    assert made == ["a", "b", "c"] and second["a"] is first["a"] and second["b"] is first["b"] and len(table) == 3
    del first, second["a"]
    assert len(table) == 2
    table.of(["a", "b"], make)
    assert made == ["a", "b", "c", "a"]


@pytest.mark.parametrize("seed", range(5))
def test_folds_hold_every_evaluation_once(seed: int) -> None:
    draw = random.Random(seed)
    of = [draw.randrange(9) for _ in range(40)]
    folds = folded(of)
    assert sorted(evaluation for _, evaluations in folds for evaluation in evaluations) == list(range(40))
    for conditions, evaluations in folds:
        each = len(evaluations) // len(conditions)
        assert [of[evaluation] for evaluation in evaluations] == [one for one in conditions for _ in range(each)]
    assert len(folds) == len({of.count(one) for one in set(of)})
