"""TextToImage: words in, ranked pictures out; the face that people call from Python.

A call becomes a `Request`, checked before any network runs; an engine paints its candidates, decodes them and lets
CLIP score them; a search says which are kept. Every picture has a record that paints it again. Here the parts are
put in order; each step itself, and the answer, is another module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_core.device import weights_dtype
from gen import checkpoint
from gen.adapters import drafts, ip_adapter, lora, textual_inversion
from gen.adapters.file import Adapter
from gen.answer import Interrupted, Result, answer
from gen.attention.kernels import AUTO
from gen.attention.network import set_attention
from gen.bucket import Buckets
from gen.candidate import Candidate, check_shown
from gen.card import Card
from gen.checks import check_callback, check_name, integer
from gen.engine import Engine
from gen.families import FamilyModel
from gen.families.reader import Reader
from gen.flight import Account, Callback, Painted
from gen.offload import Offload
from gen.origins import Origins
from gen.progress import bar, moving
from gen.record import Record
from gen.request import Job, Request
from gen.resolve import resolve
from gen.room import check_picture
from gen.runtime import TORCH, Compute, dtype_of
from gen.settings import JSON
from gen.source import Picture, either, num_of, sources
from gen.tf32 import without_tf32
from gen.weights import folder_hash
from gen.whole_folder import whole_folder
from gen.words import CallRequest, called_with


class TextToImage:
    """A text-to-image model with the CLIP that ranks its pictures."""

    def __init__(
        self,
        model: FamilyModel,
        origins: Origins = Origins(),  # noqa: B008 - frozen
        compute: Compute | None = None,  # None: by torch, in the precision of its weights
        model_hash: Callable[[], str] | None = None,  # None: it was not read from files
        clip_hash: Callable[[], str] | None = None,  # of the CLIP that `origins` names; None: it names none
    ) -> None:
        self.model = model
        self.origins = origins
        self.compute = Compute(weights_dtype(model.unet)) if compute is None else compute
        self.adapters: tuple[Adapter, ...] = ()  # what was added since, in order
        self._hash, self._clip_hash = model_hash, clip_hash
        self._offload = Offload(model.modules(), model.device)
        # Compiled networks are asked where their weights were.
        self._buckets = Buckets(relief=self._offload.relieve if self.compute.runtime == TORCH else None)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,  # a bundled name, a diffusers folder, a single .safetensors file or a hub id
        device: torch.device | str | int | None = None,  # None: CUDA where there is one
        dtype: torch.dtype | str = torch.float32,  # of the networks, or its name; rows are always float32
        *,
        runtime: str = TORCH,  # who computes the networks: torch, compile, or openvino on the CPU
        attention: str = AUTO,  # the UNet's kernel: auto, sdpa, flash, cudnn, efficient, math, xformers, avx512
        weak_unet: str | Path | None = None,  # folder of a weaker UNet, for guidance_rule="autoguidance"
        draft_unet: str | Path | None = None,  # UNet or LoRA for search="draft"; None: the model's own, if any
        prior_model: str | Path | None = None,  # where it is apart: a folder or a hub id, of Karlo for Stable unCLIP
        clip: str | Path | None = None,  # what ranks: a CLIP or SigLIP folder, a hub id, "open_clip:NAME/TAG"
        config: str | Path | None = None,  # of a single file: folder of its configurations; None: its family's
    ) -> TextToImage:
        """Load a model; what is unknown, missing or damaged is a ValueError of one line that names it.

        Attention 'auto' measures each shape once, on CUDA and in bfloat16 on the CPU, and takes torch's own choice
        elsewhere; a kernel that does not take some shape leaves it to torch's own choice and logs why. See
        `gen.attention`. `clip` None: the whole CLIP in the model's `clip/`; a model that has none paints, and does not
        rank. Runtime 'openvino' computes UNet, decoder and CLIP's image tower, in float32 or bfloat16, on the CPU; all
        else, and every gradient, is torch's in float32. Runtime 'compile' compiles the same networks by torch.compile,
        on CUDA as CUDA graphs, which takes a minute each; it is made for a GPU. See `gen.openvino_runtime` and
        `gen.compile_runtime`.
        """
        origins = Origins(
            name_or_path=name_or_path,
            config=config,
            prior_model=prior_model,
            clip=clip,
            weak_unet=weak_unet,
            draft_unet=draft_unet,
        )
        return cls._read(origins, Compute(dtype_of(dtype), runtime, attention), device)

    @classmethod
    def of_record(
        cls,
        record: Mapping[str, Any],  # of a picture, as `Result.records` or its PNG has it
        device: torch.device | str | int | None = None,  # None: CUDA where there is one
        *,  # what lies elsewhere now, or is to be computed otherwise; None: as the record says
        model: str | Path | None = None,
        weak_unet: str | Path | None = None,
        clip: str | Path | None = None,
        config: str | Path | None = None,
        prior_model: str | Path | None = None,
        runtime: str | None = None,
    ) -> TextToImage:
        """Load the model that painted a picture, with its adapters, as it was computed, for `repaint`.

        Where the device cannot run the record's kernel of attention it is 'auto'. ValueError for a record that is
        damaged or says too little, and as `from_pretrained`.
        """
        made = Record.from_json(record)
        if model is None and not made.model:
            raise ValueError("the record names no model; give it with model=NAME")
        if not made.model_hash:
            raise ValueError("the record has no model_hash, so no model can be told to be its own")
        if clip is not None and not made.asks_clip:
            raise ValueError("clip was given, but CLIP ranked the picture and did not paint it; leave it out")
        origins = replace(
            made.origins,
            name_or_path=model or made.model,
            config=config or made.origins.config,
            prior_model=prior_model or made.origins.prior_model,
            clip=clip or made.origins.clip,
            weak_unet=weak_unet or made.origins.weak_unet,
        )
        compute = replace(made.compute, runtime=runtime or made.compute.runtime).possible_on(device)
        painter = cls._read(origins, compute, device)
        painter.load_again(record)
        return painter

    @classmethod
    def _read(cls, origins: Origins, compute: Compute, device: torch.device | str | int | None) -> TextToImage:
        origins.check()
        device = compute.on(device)
        if compute.runtime == TORCH:
            loaded, takes_turns = origins.read_where_it_fits(device, compute.weights_in)
        else:
            loaded, takes_turns = origins.read(device, compute.weights_in), False
        compute.check_unets(loaded.model.unets, loaded.model.saved_as)
        for network in loaded.model.networks():
            compute.lay_out(network, device)
        painter = cls(loaded.model, origins, compute, loaded.hash, loaded.clip_hash)
        if takes_turns:
            painter._offload.begin_on(device)
        for unet in loaded.model.unets:
            set_attention(unet, compute.kernel(device))
        painter._hand_over()
        return painter

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """While networks are changed: all of their weights lie where they stay."""
        with self._offload.turn:
            was_on = self._offload.end()
            try:
                yield
            finally:
                self._offload.networks = self.model.modules()
                if was_on:
                    self._offload.begin()

    def _hand_over(self) -> None:
        """Let the runtime read the networks, anew where their weights have changed."""
        for network in self.model.networks():
            self.compute.run(network)

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Merge a LoRA into the weights, `scale` times: a file, a folder or a hub id; see `gen.adapters.lora`.

        Several add up. Not while an engine of this model runs; to be without it again, load the model again. A network
        for drafts does not follow what the UNet has become, so the UNet paints drafts itself from here on.
        """
        with self._changing():
            model = replace(self.model.with_own_texts(), drafter=None)
            adapter = lora.merge(model, path, scale)
            self.model, self.adapters = model, (*self.adapters, adapter)
        self._hand_over()

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> None:
        """Teach the text towers a word: a file, a folder or a hub id; see `gen.adapters.textual_inversion`.

        `token` is what prompts call it; None: as the file says, or the file's name. Not while an engine of this model
        runs. CLIP, which ranks, does not learn it.
        """
        with self._changing():
            model = self.model.with_own_texts()
            adapter = textual_inversion.learn(model, path, token)
            self.model, self.adapters = model, (*self.adapters, adapter)

    def load_ip_adapter(
        self,
        path: str | Path,
        scale: float = 1.0,
        image_encoder: str | Path | None = None,  # folder; None: `image_encoder/` beside the file, where it is
    ) -> None:
        """Let pictures be shown beside the text (`ip_adapter_image`): a file, a folder or a hub id.

        It is plain, Plus or Full Face (see `gen.adapters.ip_adapter`), takes the place of one loaded before, and is not
        saved with the model. Not while an engine of this model runs.
        """
        if not isinstance(self.model, Reader):
            raise ValueError(f"a {self.model.saved_as} takes no IP-Adapter; its UNet reads no text by cross-attention")
        if self.compute.runtime != TORCH:
            raise ValueError(
                f"an IP-Adapter is computed by runtime 'torch' alone, and this is '{self.compute.runtime}'"
            )
        with self._changing():
            loaded, adapter = ip_adapter.load(self.model.unet, path, scale, image_encoder)
            self.model = replace(self.model, ip_adapter=loaded)
            self.adapters = (*(each for each in self.adapters if each.kind != adapter.kind), adapter)

    def embed_ip_adapter_image(self, images: Picture | Sequence[Picture]) -> Tensor:
        """What an IP-Adapter reads of pictures, for `ip_adapter_image_embeds`: (B, E), or (B, S, E) of Plus."""
        check_shown(self.model.abilities)
        assert isinstance(self.model, Reader), "no other takes an IP-Adapter"
        if not (number := num_of(images)):
            raise ValueError("ip_adapter_image is empty; give at least one picture")
        given = [one for one in sources("ip_adapter_image", images, number) if one is not None]
        with self._offload.turn, without_tf32(self.model.device):
            return torch.stack([self.model.see_beside(one.sized(*one.size)) for one in given])

    def load_again(self, record: Mapping[str, Any]) -> None:
        """Add what the model of a record had been given, from where its record says it lies."""
        for each in Record.from_json(record).adapters:
            if each.kind == "lora" and each.scale is not None:
                self.load_lora(each.name, each.scale)
            elif each.kind == "ip_adapter" and each.scale is not None:
                self.load_ip_adapter(each.name, each.scale, each.image_encoder)
            elif each.kind == "embedding":
                self.load_textual_inversion(each.name, each.token)
            else:
                raise ValueError(f"the record names an adapter of kind '{each.kind}', which is not known here")

    @property
    def name(self) -> str:
        """What it was loaded by; empty for a model that was not."""
        return str(self.origins.name_or_path)

    @property
    def hash(self) -> str:
        """SHA-256 of the model's files as loaded; empty for a model that was not loaded from any."""
        return "" if self._hash is None else self._hash()

    @cached_property
    def weak_hash(self) -> str:
        """SHA-256 of the weaker UNet's files; empty where there is none."""
        weak = self.origins.weak_unet
        return folder_hash(Path(weak).expanduser(), [""]) if weak else ""

    @cached_property
    def clip_hash(self) -> str:
        """SHA-256 of the files of the CLIP that `clip` named; empty where the model's own ranks, or none."""
        return "" if self._clip_hash is None else self._clip_hash()

    @property
    def card(self) -> Card:
        """What the model says of itself: what it knows, its defaults, its scores."""
        return self.model.card

    @called_with(CallRequest)
    def __call__(self, words: CallRequest) -> Result:
        """Paint candidates of every prompt, rank them and keep the best; `Request` says what each word is.

        Raises ValueError, before any network runs, for what this model cannot paint; `Cancelled` when the
        callback cancels; `Interrupted`, which is a KeyboardInterrupt, on Ctrl-C.
        """
        return self.paint([words], batch_size=words.batch_size, callback=words.callback, progress=words.progress)[0]

    def paint(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> list[Result]:
        """Many requests at once: their pictures share every network call, whatever their settings.

        The callback sees each request's pictures by themselves; when it cancels one, the whole call is over. So it is
        on Ctrl-C, and `Interrupted` has what was painted by then.
        """
        if batch_size is not None:
            batch_size = integer("batch_size", batch_size, 1, hint="None: as memory allows")
        check_callback(callback)
        for request in requests:
            if not isinstance(request, Request):
                raise TypeError(f"request is of type {type(request).__name__}; give a Request")
        jobs = [resolve(request, self.model.abilities) for request in requests]
        if not progress:
            return self._paint(jobs, batch_size, callback)
        with bar() as shown:
            return self._paint(jobs, batch_size, moving(shown, self.model, jobs, callback))

    def engine(self, *, max_rows: int | None = None) -> Engine[Result]:
        """What paints requests as they come: `with model.engine() as engine: future = engine.submit(request)`.

        `max_rows` is how many pictures are in flight at most; None: as memory allows. On a GPU the engines of a model
        take turns, tick by tick, so a callback must not wait for another one.
        """
        if max_rows is not None:
            max_rows = integer("max_rows", max_rows, 1, hint="None: as memory allows")
        return Engine(
            self.model,
            self._result,
            max_rows=max_rows,
            buckets=self._buckets,
            check=self._check_room,
            turn=self._offload.turn if self.compute.runtime == TORCH and self.model.device.type == "cuda" else None,
        )

    def _check_room(self, job: Job) -> None:
        """ValueError for pictures of which a single one cannot be held in memory."""
        is_decoded = job.rank or job.output_type != "latent"
        for settings in {id(each.settings): each.settings for each in job.candidates}.values():
            numbers = self.model.held_at_once(settings, is_decoded)
            tiled = self.model.held_at_once(replace(settings, vae_tiling=self.model.abilities.can_tile), is_decoded)
            width = min(self.compute.dtype.itemsize, weights_dtype(self.model.unet).itemsize)
            leaving = self._offload.could_leave if self.compute.runtime == TORCH else 0
            check_picture(numbers * width, tiled * width, self.model.device, settings, leaving)

    @torch.no_grad()
    def repaint(self, record: Mapping[str, Any], images: Sequence[Picture] = ()) -> Tensor:
        """Paint one picture again from its record: (3, H, W) in [0, 1], to compare with the one on file.

        What it was painted from is looked for among `images`, and then in the files that the record names. Raises
        ValueError where the record lacks something, a file has changed or the model has another hash. Warns where it
        was painted in another dtype, by another kernel or by another runtime, which may change pixels.
        """
        made = Record.from_json(record)
        here = self._recorded(made.picture, made.asks_weak)
        made.check_model(here)  # first, for another may not be able to paint it at all
        candidate = Candidate.from_json(made.picture, self.model.abilities, [either("image", one) for one in images])
        made.check_beside(here)
        job = Job(candidates=(candidate,), num_images_per_prompt=1, keep=1, rank=False, output_type="pt")
        (result,) = self._paint([job], None, None)
        assert isinstance(result.images, Tensor), "output_type is pt"
        return result.images[0]

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write a stock diffusers folder with CLIP, card and network for drafts beside; see `checkpoint.save`.

        It is there whole or not at all. ValueError for a folder that holds something, or cannot be written.
        """
        check_name("folder", folder)
        model, folder = self.model, Path(folder)
        with whole_folder(folder) as fresh:
            checkpoint.save(fresh, model.saved_as, model.parts(), model.clip_beside, self.card, dtype, model.index)
            if model.drafter is not None:
                drafts.save(model.drafter, fresh / drafts.FOLDER, dtype)
        return folder

    def _paint(self, jobs: Sequence[Job], max_rows: int | None, callback: Callback | None) -> list[Result]:
        """The engine's loop in the calling thread; what goes wrong with one job ends it, and so does Ctrl-C."""
        engine = self.engine(max_rows=max_rows)
        try:
            return tick_until_done(engine, [engine.submit(job, callback=callback) for job in jobs])
        except Interrupted:
            with suppress(KeyboardInterrupt):  # one more would hide what was painted
                engine.close(cancel=True)
            raise
        except BaseException:
            engine.close(cancel=True)
            raise

    def _result(self, job: Job, painted: Mapping[int, Painted], account: Account) -> Result:
        return answer(job, painted, account, self._record, self.adapters, self.compute.dtype)

    @property
    def record(self) -> Record:
        """What the records of its pictures say of it."""
        return self._recorded({}, self.origins.weak_unet is not None)

    def _record(self, candidate: Candidate, score: float | None) -> dict[str, JSON]:
        """All that paints a picture again, and how it scored."""
        asks_weak = candidate.settings.guidance_rule == "autoguidance"
        return self._recorded(candidate.to_json(), asks_weak).to_json() | {"score": score}

    def _recorded(self, picture: Mapping[str, Any], asks_weak: bool) -> Record:
        """The record of a picture that this model paints, guided by the weaker UNet or not."""
        return Record(
            picture=picture,
            model=self.name,
            model_hash=self.hash,
            weak_unet=str(self.origins.weak_unet or "") if asks_weak else "",
            weak_unet_hash=self.weak_hash if asks_weak else "",
            clip=str(self.origins.clip or ""),
            clip_hash=self.clip_hash,
            config=str(self.origins.config or ""),
            prior_model=str(self.origins.prior_model or ""),
            adapters=self.adapters,
            compute=self.compute,
        )


def tick_until_done(engine: Engine[Result], futures: Sequence[Future[Result]]) -> list[Result]:
    """Tick until all of an engine's futures are there; the first that goes wrong is raised at once."""
    failed: list[Future[Result]] = []

    def note(future: Future[Result]) -> None:
        if not future.cancelled() and future.exception() is not None:
            failed.append(future)

    for future in futures:
        future.add_done_callback(note)
    try:
        while engine.tick():
            for future in failed:
                future.result()
        return [future.result() for future in futures]
    except KeyboardInterrupt:
        raise Interrupted([engine.so_far(future) for future in futures]) from None
