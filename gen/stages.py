"""The stages that a request's candidates go through: a prior where there is one, the decoder, super resolution.

Owns the rows of each, says what a candidate's rows are, and takes them from one stage to the next. It knows what a
request in flight has noted, and neither who decides which of its candidates go on nor who waits for it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor

from gen.bucket import Buckets
from gen.conditioning import Condition, Table
from gen.decode_queue import DecodeQueue
from gen.drafter import SAMPLER
from gen.edit import beginning, read, schedule_of
from gen.embeds import decided, encode_prompts, prior_samples, with_embeds
from gen.flight import DECODER, NULL, PRIOR, SUPER_RESOLUTION, Flight, Painted, RowKey, Stage, Waiting, row_key, row_of
from gen.lane import Lane
from gen.model import Family, WithImage
from gen.request import Candidate
from gen.row import Row
from gen.rows import Finished, Rows
from samplers.schedule import Schedule


class Stages:
    """The rows of one model; see the module."""

    def __init__(self, model: Family, buckets: Buckets, decode_queue: DecodeQueue) -> None:
        self.model = model
        self.decode_queue = decode_queue
        self.table = Table()
        self.rows: dict[Stage, Rows] = {}  # in their order, so that what one has finished goes on within a tick
        if model.prior is not None:
            asked, scaling = model.prior.cached_network(), model.prior.levels.scaling
            self.rows[PRIOR] = Rows(asked, scaling, PRIOR, model.device, buckets)
        self.rows[DECODER] = Rows(model.call, model.levels.scaling, DECODER, model.device, buckets)
        if model.upscaler is not None:
            enlarge, scaling = model.upscaler.call, model.upscaler.levels.scaling
            self.rows[SUPER_RESOLUTION] = Rows(enlarge, scaling, SUPER_RESOLUTION, model.device, buckets)

    def shape_of(self, flight: Flight[Any]) -> tuple[int, ...]:
        """Of its rows in the decoder; a request's pictures are of one size."""
        return self.model.latent_shape(flight.job.candidates[0].settings)

    def has_room(self, flight: Flight[Any], coming: Sequence[Flight[Any]], max_rows: int | None) -> bool:
        """Whether a request may begin where all of `coming` do, and so many rows may be in flight (None: any).

        There is room while the calls that its rows will be in are not full: so far they are the faster for its coming,
        and from there on all would wait for each other. Pictures of another size are in other calls of the decoder.
        """
        shape, decoder = self.shape_of(flight), self.rows[DECODER]
        beside = [candidate for each in coming if self.shape_of(each) == shape for candidate in each.job.candidates]
        evaluations = decoder.num_evaluations(shape) + sum(map(num_evaluations, beside))
        others = sum(rows.filling for stage, rows in self.rows.items() if stage != DECODER)
        if evaluations / decoder.bucket_of(shape).enough + others >= 1:
            return False
        return max_rows is None or self._num_rows + sum(len(each.job.candidates) for each in coming) < max_rows

    def room(self, flight: Flight[Any], max_rows: int | None) -> int:
        """How many rows of a request that has begun may come in where those do that wait longest.

        They come in while more evaluations of the decoder are worth having in flight. What a prior has answered goes on
        to the decoder unasked: so many may be in the prior meanwhile, and twice as many in both.
        """
        shape, decoder, first = self.shape_of(flight), self.rows[DECODER], flight.job.candidates[0]
        most, painted, rows = decoder.bucket_of(shape).most, decoder.num_evaluations(shape), 1
        free = most - painted
        if flight.waiting[0].stage == PRIOR:
            assert self.model.prior is not None, "a request for a prior is refused where there is none"
            thinking = {(key.request, key.candidate) for key in map(row_key, self._prior_rows)}
            coming = num_evaluations(first) * len(thinking)
            free, rows = min(most - coming, 2 * most - painted - coming), self.model.prior.num_answers(first)
        room = max(0, -(-free // num_evaluations(first))) * rows
        return room if max_rows is None else max(0, min(room, max_rows - self._num_rows))

    @property
    def _prior_rows(self) -> list[Row]:
        """The rows in the prior."""
        return [one.row for one in self.rows[PRIOR].live]

    @property
    def _num_rows(self) -> int:
        """In flight, of all stages."""
        return sum(len(rows.live) for rows in self.rows.values())

    def encode_prompts(self, flights: Sequence[Flight[Any]]) -> list[Condition]:
        """Encode the texts of requests that begin, together.

        Returns what their first rows are to find in the table: hold it until they are admitted, since the table itself
        holds it weakly.
        """
        for flight in flights:
            flight.candidates = with_embeds(self.model, flight.candidates)
        candidates = [candidate for flight in flights for candidate in flight.candidates]
        pairs = iter(encode_prompts(self.model, candidates, self.table))
        for flight in flights:
            flight.conditions = dict(enumerate(islice(pairs, len(flight.candidates))))
            flight.read = read(self.model, flight.candidates)
        asking = [each for one in candidates if one.settings.prior for each in prior_samples(one)]
        if not asking:
            return []
        assert self.model.prior is not None, "a request for a prior is refused where there is none"
        return list(self.model.prior.conditions_of(asking, self.table).values())

    def begin(self, flight: Flight[Any], candidates: Sequence[int]) -> Iterator[Waiting]:
        """The first row of each candidate: the prior's, or the decoder's."""
        asking = [index for index in candidates if index in flight.awaiting_prior]
        if asking:
            assert self.model.prior is not None, "a request for a prior is refused where there is none"
            prior = self.model.prior
            asked = {index: prior_samples(flight.candidates[index]) for index in asking}
            keys = [RowKey(flight.number, index, prior_sample=k) for index in asking for k in range(len(asked[index]))]
            rows = prior.rows([one for each in asked.values() for one in each], keys, self.table)
            guided = {index: one for index in asking if prior.predicts_null(one := flight.candidates[index])}
            keys = [RowKey(flight.number, index, prior_sample=NULL) for index in guided]
            rows += prior.null_rows(list(guided.values()), keys, self.table)
            order = {index: place for place, index in enumerate(asking)}
            rows.sort(key=lambda row: order[row_key(row).candidate])  # so that a candidate's come in together
            yield from (Waiting(PRIOR, row) for row in rows)
        for index in candidates:
            if index not in flight.awaiting_prior:
                yield Waiting(DECODER, self._decoder_row(flight, index))

    def admit(self, chosen: Sequence[Waiting]) -> None:
        """Let these in, at their beginning or where they were halted."""
        for stage, rows in self.rows.items():
            here = [row for where, row in chosen if where == stage]
            rows.admit([row for row in here if isinstance(row, Row)])
            rows.resume([lane for lane in here if isinstance(lane, Lane)])

    def go_on(self, flight: Flight[Any], stage: Stage, finished: Sequence[Finished]) -> None:
        """Where rows of a request go from a stage's end: on to the next one, and from the last to be decoded."""
        if stage == PRIOR:
            self._prior_finished(flight, finished)
            return
        indices = [row_key(one.row).candidate for one in finished]
        ended: dict[int, Tensor] = {}
        for index, one in zip(indices, finished, strict=True):
            if row_key(one.row).is_draft:
                flight.estimates[index] = one.x
                del flight.goals[index]
            else:
                ended[index] = one.x
        if stage == DECODER and self.model.upscaler is not None:
            candidates = [flight.candidates[index] for index in ended]
            keys = [RowKey(flight.number, index) for index in ended]
            self.rows[SUPER_RESOLUTION].admit(self.model.upscaler.rows(candidates, keys, list(ended.values())))
            return
        for index, x in ended.items():
            flight.latents[index] = x
            if not flight.wants_pixels:
                flight.paint(index, Painted(x))

    def halt(self, flight: Flight[Any], candidates: Collection[int]) -> None:
        """Take rows of the decoder that stand still out of their batch."""
        if candidates:
            halted = self.rows[DECODER].halt(flight.row_keys(candidates))
            flight.halted |= {row_key(row_of(lane)).candidate: lane for lane in halted.values()}
            flight.halting.difference_update(list(candidates))

    def branch(self, flight: Flight[Any], source: int, target: int) -> Lane:
        """A copy of a halted row that goes on as another candidate, by the noise of that one's seed."""
        key = RowKey(flight.number, target)
        return self.rows[DECODER].branch(flight.halted[source], key, flight.candidates[target].seed)

    def drop(self, keys: AbstractSet[Hashable]) -> None:
        """Give up the rows of these keys, wherever they are."""
        for rows in self.rows.values():
            rows.drop(keys)

    def _prior_finished(self, flight: Flight[Any], finished: Sequence[Finished]) -> None:
        """The prior has answered: candidates of which all answers are there go on to the decoder."""
        assert self.model.prior is not None and isinstance(self.model, WithImage), "its rows are in flight"
        for one in finished:
            key = row_key(one.row)
            flight.answers.setdefault(key.candidate, {})[key.prior_sample] = one
        prior = self.model.prior
        candidates = {
            index: flight.candidates[index]
            for index, answers in flight.answers.items()
            if len(answers) == prior.num_answers(flight.candidates[index])
        }
        if not candidates:
            return
        answers = {index: flight.answers.pop(index) for index in candidates}
        nulls = {index: each.pop(NULL) for index, each in answers.items() if NULL in each}
        every = [one for each in answers.values() for _, one in sorted(each.items())]
        answered = iter(zip(every, prior.embeds([one.x for one in every]), strict=True))
        embeds = []
        for index, candidate in candidates.items():
            rows, vectors = zip(*(next(answered) for _ in answers[index]), strict=True)
            embeds.append(decided(candidate, vectors, [one.row.prompt.pooled_projections for one in rows]))
        pairs = [flight.conditions[index] for index in candidates]
        prompts = self.model.add_image_embeds(list(candidates.values()), [prompt for prompt, _ in pairs], embeds)
        for index, prompt, (_, null) in zip(candidates, prompts, pairs, strict=True):
            flight.conditions[index] = (prompt, null)
        self._guide_away(flight, nulls)
        flight.awaiting_prior.difference_update(candidates)
        self.rows[DECODER].admit([self._decoder_row(flight, index) for index in candidates])

    def _guide_away(self, flight: Flight[Any], nulls: Mapping[int, Finished]) -> None:
        """Show what candidates are guided away from the prior's answer to that."""
        if not nulls:
            return
        assert self.model.prior is not None and isinstance(self.model, WithImage), "its rows are in flight"
        conditions = [null for _, null in (flight.conditions[index] for index in nulls) if null is not None]
        embeds = self.model.prior.embeds([one.x for one in nulls.values()]).unbind(0)
        shown = self.model.add_image_embeds([flight.candidates[index] for index in nulls], conditions, embeds)
        for index, null in zip(nulls, shown, strict=True):
            flight.conditions[index] = (flight.conditions[index][0], null)

    def _decoder_row(self, flight: Flight[Any], index: int) -> Row:
        row, goal, levels = self._row(flight, index), flight.goals[index], self.model.levels
        if not goal.by_drafter:
            return row
        assert goal.draft_steps is not None and self.model.drafter is not None, "it is a draft, and a network was found"
        return replace(
            row,
            schedule=levels.schedule(SAMPLER, goal.draft_steps),
            sampler=SAMPLER,
            options=levels.options(SAMPLER),
            prompt=replace(row.prompt, network="draft"),
            null=None,
            guidance_scale=1.0,
            guidance_interval=None,
        )

    def _row(self, flight: Flight[Any], index: int) -> Row:
        candidate, levels = flight.candidates[index], self.model.levels
        settings, draft_steps = candidate.settings, flight.goals[index].draft_steps
        shape = self.model.latent_shape(settings)
        schedule, interval = schedule_of(levels, settings, draft_steps), settings.guidance_interval
        if draft_steps is not None and interval is None:
            interval = inner_levels(schedule)
        begins = beginning(candidate, flight.read[index], shape, schedule)
        prompt, null = begins.with_concat_channels(flight.conditions[index])
        return Row(
            key=RowKey(flight.number, index, draft_steps is not None),
            seed=candidate.seed,
            shape=shape,
            schedule=schedule,
            sampler=settings.sampler,
            prompt=prompt,
            null=null,
            guidance_scale=settings.guidance_scale,
            guidance_interval=interval,
            guidance_rescale=settings.guidance_rescale,
            guide=settings.guide,
            thresholding=settings.dynamic_thresholding,
            clip_guidance_scale=settings.clip_guidance_scale,
            likeness=self.decode_queue.likeness(flight, index) if settings.clip_guidance_scale else None,
            options=levels.options(settings.sampler) | settings.sampler_options,
            start=begins.start,
            drawn=begins.drawn,
            past=tuple((segment.seed, segment.steps) for segment in candidate.noise_path),
            origin=begins.origin,
            known_region=begins.known_region,
        )


def num_evaluations(candidate: Candidate) -> int:
    """Of the decoder, each time that a candidate's row asks it where it is guided."""
    return 1 + (candidate.settings.guidance_scale != 1)


def inner_levels(schedule: Schedule) -> tuple[float, float] | None:
    """Where a draft is guided (low < sigma <= high): at all its steps but the first and the last; None: everywhere.

    That is so of samplers that ask once a step and do not churn; others are guided in part of these two, and CLIP's
    gradient is left out there as well. Guidance in the middle alone makes better pictures (Kynkäänniemi et al. 2024),
    and what drafts save by it makes them finer: `benchmarks/looks.py` has both beside each other. Of fewer than four
    steps all are guided.
    """
    if schedule.num_steps < 4:
        return None
    return float(schedule.sigmas[schedule.last - 1]), float(schedule.sigmas[schedule.first + 1])
