"""From latents to pictures and CLIP's scores, for many requests at once.

Finished latents wait until they make a chunk or a request waits for nothing else, are decoded and scored together,
and where that fails the request is found that it fails for. A search's looks at unfinished pictures go through here
too. It knows what requests have finished, and neither rows nor searches nor answers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_core.clip import CLIP
from clip_core.device import to_host
from clip_core.score import cosine
from gen.bucket import PROBE, Bucket, Buckets, is_out_of_memory
from gen.candidate import Candidate
from gen.conditioning import in_turns
from gen.embeds import slerp
from gen.flight import Flight, Painted
from gen.model import Family, tiling
from gen.row import Likeness

DECODE_CHUNK = 16  # pictures decoded and scored at once at most; the autoencoder is the largest user of memory
SMALL_CHUNK, SMALL = 64, 256  # the same of pictures with so few values of latents at most, such as of 64 x 64

Member = tuple[Flight[Any], int]
"""A request and one of its candidates"""
Fail = Callable[[Flight[Any], Exception], None]
"""fail(request, why): it is out, and its future says so"""


class DecodeKey(NamedTuple):
    """What latents have in common that are decoded together."""

    shape: tuple[int, ...]
    is_tiled: bool  # whether they are decoded tile by tile


@dataclass(frozen=True, eq=False)
class DecodeQueue:
    """Where latents become pictures; see the module."""

    model: Family
    buckets: Buckets

    @property
    def clip(self) -> CLIP:
        """The CLIP that ranks."""
        assert self.model.clip is not None, "a ranking is refused where there is no CLIP"
        return self.model.clip

    def text(self, flight: Flight[Any], index: int) -> Tensor:
        """CLIP's embedding (E,) of a candidate's prompt, or between it and another where it goes there."""
        self._read([flight])
        candidate = flight.job.candidates[index]
        text, *others = (flight.texts[each] for each in _texts(candidate))
        return slerp(text, others[0], candidate.settings.interpolation) if others else text

    def likeness(self, flight: Flight[Any], index: int) -> Likeness:
        """CLIP's cosine (B,) of estimated latents with a candidate's prompt, through which a gradient is taken."""
        model = tiling(self.model, flight.candidates[index].settings.vae_tiling)
        return partial(_likeness, model, self.text(flight, index)[None])

    def _read(self, flights: Sequence[Flight[Any]]) -> None:
        """Let CLIP read the prompts of these requests together, of each once."""
        texts_of: dict[int, dict[str, None]] = {}
        for flight in flights:
            if not flight.texts:
                texts_of[flight.number] = dict.fromkeys(text for one in flight.job.candidates for text in _texts(one))
        texts = list(dict.fromkeys(text for each in texts_of.values() for text in each))
        if texts:
            read = in_turns(texts, lambda some: self.clip.text(some).embedding.unbind(0))
            found = dict(zip(texts, read, strict=True))
            for flight in flights:
                flight.texts = flight.texts or {text: found[text] for text in texts_of[flight.number]}

    def decode_ready(self, flights: Mapping[int, Flight[Any]], fail: Fail) -> None:
        """Decode and score what has finished, once it makes a whole chunk or a request waits for nothing else.

        `flights` are the requests in flight by their numbers; one that fails is out of them once `fail` was told.
        """
        for key, members in _by_key(flights.values()).items():
            here = [(flight, index) for flight, index in members if flight.number in flights]
            if len(here) >= chunk_of(key.shape) or any(flight.is_through for flight, _ in here):
                self._decode_members(key, here, flights, fail)

    def finish(self, flight: Flight[Any]) -> None:
        """Decode and score at once what has finished of a request that nobody paints any more; raises what fails."""

        def fail(flight: Flight[Any], error: Exception) -> None:
            raise error

        for key, members in _by_key([flight]).items():
            self._decode_members(key, members, {flight.number: flight}, fail)

    def look(self, flight: Flight[Any], candidates: Sequence[int]) -> list[float]:
        """CLIP's cosine of candidates as they stand; the device is waited for.

        Small pictures are seen through the autoencoder itself, others through what stands in for it.
        """
        small = self.model.is_small(flight.job.candidates[0].settings)
        waiting, scores = deque(candidates), list[Tensor]()
        while waiting:
            key = key_of(flight, waiting[0], flight.estimates[waiting[0]])
            bucket = self._bucket(key) if small else self.buckets.of("preview", key.shape, self.model.device)
            chunk = [waiting.popleft() for _ in range(min(len(waiting), chunk_of(key.shape), bucket.size))]
            latents = torch.stack([flight.estimates[index] for index in chunk])
            try:
                pixels = self._decode(key, latents) if small else self.model.preview(latents)
                texts = torch.stack([self.text(flight, index) for index in chunk])
                scores.append(cosine(self._seen(pixels), texts))
                bucket.succeed(len(chunk))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames hold what the call had made
                if not bucket.halve(len(chunk)):
                    raise self._overflow(bucket, key, error) from error.with_traceback(None)
                waiting.extendleft(reversed(chunk))
                continue
            flight.account.decodes += small * len(chunk)
            flight.account.previews += (not small) * len(chunk)
            flight.account.scores += len(chunk)
        return torch.cat(scores).tolist() if scores else []

    def _decode_members(
        self, key: DecodeKey, members: Sequence[Member], flights: Mapping[int, Flight[Any]], fail: Fail
    ) -> None:
        bucket, waiting = self._bucket(key), deque(members)
        bucket.refresh()
        while waiting:
            size = min(len(waiting), chunk_of(key.shape), bucket.size)
            chunk = [waiting.popleft() for _ in range(size)]
            try:
                if bucket.wants_probe(size):
                    latents = [flight.latents[index] for flight, index in chunk[:PROBE]]
                    bucket.probe(partial(self._decode, key, torch.stack(latents)))
                self._paint(key, chunk)
                bucket.succeed(len(chunk))
            except Exception as error:
                if not is_out_of_memory(error):
                    self._find_fault(key, chunk, error, fail)
                else:
                    error.__traceback__ = None
                    if bucket.halve(size):
                        waiting.extendleft(reversed(chunk))
                    else:
                        self._find_fault(key, chunk, self._overflow(bucket, key, error), fail)
            waiting = deque((flight, index) for flight, index in waiting if flight.number in flights)

    def _find_fault(self, key: DecodeKey, chunk: Sequence[Member], error: Exception, fail: Fail) -> None:
        """A chunk failed: the request it was of, or where there are several, those whose own pictures fail alone."""
        shares: dict[int, list[Member]] = {}
        for flight, index in chunk:
            shares.setdefault(flight.number, []).append((flight, index))
        for share in shares.values():
            try:
                if len(shares) == 1:
                    raise error
                self._paint(key, share)
            except Exception as its_own:
                fail(share[0][0], its_own)

    def _paint(self, key: DecodeKey, chunk: Sequence[Member]) -> None:
        """Decode and score these latents; all of them or, where something raises, none."""
        for flight in {id(flight): flight for flight, _ in chunk}.values():
            flight.thin()
        latents = [flight.latents[index] for flight, index in chunk]
        pixels = self._decode(key, torch.stack(latents))
        scores: dict[int, Tensor] = {}
        scored: torch.cuda.Event | None = None
        embeddings: dict[int, Tensor] = {}
        ranked = [place for place, (flight, _) in enumerate(chunk) if flight.job.rank]
        if ranked:
            self._read([chunk[place][0] for place in ranked])
            texts = torch.stack([self.text(*chunk[place]) for place in ranked])
            seen = self._seen(torch.stack([pixels[place] for place in ranked]))
            embeddings = dict(zip(ranked, seen.unbind(0), strict=True))
            found, scored = to_host(cosine(seen, texts))
            scores = dict(zip(ranked, found.unbind(0), strict=True))
        # a view would keep its whole chunk
        alone = [pixels[place].clone() if flight.lets_go else pixels[place] for place, (flight, _) in enumerate(chunk)]
        for place, (flight, index) in enumerate(chunk):
            scored_by = scores.get(place), scored, embeddings.get(place)
            flight.paint(index, Painted(latents[place], alone[place], *scored_by))

    def _decode(self, key: DecodeKey, latents: Tensor) -> Tensor:
        return tiling(self.model, key.is_tiled).decode(latents)

    def _overflow(self, bucket: Bucket, key: DecodeKey, error: Exception) -> MemoryError:
        if key.is_tiled or not self.model.abilities.can_tile:
            return bucket.overflow(error)
        return bucket.overflow(error, "paint smaller, in another dtype, or with vae_tiling=True")

    def _bucket(self, key: DecodeKey) -> Bucket:
        return self.buckets.of("tiled decode" if key.is_tiled else "decode", key.shape, self.model.device)

    def _seen(self, pixels: Tensor) -> Tensor:
        """CLIP's embedding (B, E) of pictures (B, 3, H, W); they are read as 8-bit, as a file holds them."""
        return self.clip.image((pixels * 255).round_().div_(255))


def key_of(flight: Flight[Any], index: int, latents: Tensor) -> DecodeKey:
    """Of a candidate's latents (C, h, w)."""
    return DecodeKey(tuple(latents.shape), flight.candidates[index].settings.vae_tiling)


def _by_key(flights: Iterable[Flight[Any]]) -> dict[DecodeKey, list[Member]]:
    """What has finished of these requests and is not decoded."""
    found: dict[DecodeKey, list[Member]] = {}
    for flight in flights:
        for index, latents in flight.latents.items():
            found.setdefault(key_of(flight, index, latents), []).append((flight, index))
    return found


def chunk_of(shape: Sequence[int]) -> int:
    """How many pictures with latents of a shape are decoded and scored at once at most."""
    return SMALL_CHUNK if math.prod(shape) <= SMALL else DECODE_CHUNK


def _texts(candidate: Candidate) -> list[str]:
    """The prompt, and the one it goes towards where there is one, as CLIP reads them."""
    settings = candidate.settings
    return [settings.plain(text) for text in (candidate.prompt, settings.interpolate_prompt) if text]


def _likeness(model: Family, text: Tensor, x0: Tensor) -> Tensor:
    assert model.clip is not None, "clip_guidance_scale is refused where there is no CLIP"
    return cosine(model.clip.image(model.decode(x0), rounded=False), text)
