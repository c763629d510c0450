"""Networks that do not all fit a GPU paint the same there: who is asked comes, and who is not asked leaves."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any
from unittest.mock import patch
from weakref import ref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gen import TextToImage, offload
from gen.bucket import UNBOUNDED, Bucket, Buckets
from gen.offload import Offload, Traveller, Turn, large
from gen.request import Request
from tests.cuda import GPU, pretended
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl
from tests.tiny_karlo import make_tiny_karlo

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU, and there is one")

PROMPT = "a small red circle"
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "stable diffusion": make_tiny_stable_diffusion,
    "stable diffusion xl": make_tiny_stable_diffusion_xl,
    "karlo": make_tiny_karlo,
}


@pytest.fixture(autouse=True)
def small_weights_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 2000)


@contextmanager
def gpu(num_bytes: int) -> Iterator[Any]:
    """A GPU that always says that so much of its memory is free."""
    with pretended() as watch, patch.object(torch.cuda, "mem_get_info", lambda device=None: (num_bytes, num_bytes)):
        yield watch


def too_small(model: TextToImage) -> int:
    """Bytes that the largest network of a model fits into, and not all of them."""
    each = [sum(weight.nbytes for weight in network.parameters()) for network in model.model.modules()]
    return (sum(each) + max(each)) // 2


def loaded(folder: Path, **origins: Any) -> TextToImage:
    return TextToImage.from_pretrained(folder, "cuda", attention="sdpa", **origins)


def painted(model: TextToImage, steps: int = 3, **settings: Any) -> Any:
    words: dict[str, Any] = {"num_images_per_prompt": 2, "seed": 3, "output_type": "pt", **settings}
    return model(PROMPT, num_inference_steps=steps, **words)


def there(network: nn.Module) -> bool:
    """Whether a network's large weights lie on the GPU, all of them or none."""
    (place,) = {weight.device for layer in network.modules() for weight in large(layer)}
    return place == GPU


def test_a_model_too_large_for_a_gpu_paints_there_as_on_the_cpu(tiny_folder: Path, tiny: TextToImage) -> None:
    expected, most = painted(tiny, prior=True), list[int]()
    with gpu(too_small(tiny)):
        model = loaded(tiny_folder)
        travel = model._offload
        assert travel.is_on and not travel.here and model.model.device == GPU

        def looked(*call: object) -> None:
            most.append(sum(each.num_bytes for each in travel.here))

        for network in model.model.modules():
            network.register_forward_hook(looked)
        found = painted(model, prior=True)
        again = painted(model, seed=4, prior=True)
    assert 0 < max(most) <= travel.most, "a network that is large came alone"
    assert (found.images - expected.images).abs().max() < 1e-4 and found.seeds == expected.seeds
    assert (again.images - painted(tiny, seed=4, prior=True).images).abs().max() < 1e-4


def test_a_step_waits_for_nobody(tiny_folder: Path, tiny: TextToImage) -> None:
    waits = []
    with gpu(too_small(tiny)) as watch:
        model = loaded(tiny_folder)
        painted(model)
        for steps in (3, 6):
            watch.waits.clear()
            painted(model, steps)
            waits.append(Counter(watch.waits))
    assert waits[0] == waits[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_do_the_same(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    stock = TextToImage.from_pretrained(folder, "cpu")
    expected = painted(stock, rerank=False).images
    with gpu(too_small(stock)):
        model = loaded(folder)
        assert model._offload.is_on
        assert (painted(model, rerank=False).images - expected).abs().max() < 1e-3


@pytest.mark.parametrize("version", ["2.2", "2.1"])
def test_kandinsky_does_the_same(kandinsky_folders: Any, kandinskys: Any, version: str) -> None:
    small: dict[str, Any] = {"height": 64, "width": 64, "rerank": False}
    expected = painted(kandinskys[version], **small).images
    with gpu(too_small(kandinskys[version])):
        model = loaded(kandinsky_folders[version]["combined"])
        assert model._offload.is_on
        assert (painted(model, **small).images - expected).abs().max() < 1e-2


def test_a_network_that_is_too_large_alone_is_told(tiny_folder: Path, tiny: TextToImage) -> None:
    with gpu(10_000), pytest.raises(ValueError, match=r"\w+ alone needs 0\.0 GB for its weights, .* on cuda:0; take"):
        loaded(tiny_folder)


def test_what_is_compiled_does_not_travel(tiny_folder: Path, tiny: TextToImage) -> None:
    with gpu(too_small(tiny)), pytest.raises(ValueError, match=r"needs 0\.0 GB for its weights in float32"):
        TextToImage.from_pretrained(tiny_folder, "cuda", runtime="compile")


def test_where_one_picture_does_not_fit_beside_all_networks_the_others_leave(
    tiny_folder: Path, tiny: TextToImage
) -> None:
    expected, ran_out = painted(tiny), list[int]()
    with gpu(1 << 33):
        model = loaded(tiny_folder)
        assert not model._offload.is_on
        assert model.model.clip is not None
        ranking = model.model.clip.model

        def too_much(unet: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            if there(ranking):
                ran_out.append(len(given[0]))
                raise torch.OutOfMemoryError("no more")

        model.model.unet.register_forward_pre_hook(too_much)
        found = painted(model)
        assert ran_out[-1] == 1 and model._offload.is_on
        assert there(ranking) and there(model.model.unet), "the GPU has room for both, and only calls were too large"
        known = len(ran_out)
        again = painted(model, seed=4)
    assert len(ran_out) > known, "CLIP came back, so it leaves again"
    assert (found.images - expected.images).abs().max() < 1e-4
    assert (again.images - painted(tiny, seed=4).images).abs().max() < 1e-4


def test_where_nobody_can_leave_any_more_it_is_said(tiny_folder: Path) -> None:
    def too_much(*call: object) -> None:
        raise torch.OutOfMemoryError("no more")

    with gpu(1 << 33):
        model = loaded(tiny_folder)
        hook = model.model.unet.register_forward_pre_hook(too_much)
        with pytest.raises(MemoryError, match="not even one fits in memory"):
            painted(model)
        hook.remove()
        assert len(painted(model).images) == 2


def test_what_is_added_later_is_added_at_home(tiny_folder: Path, tiny: TextToImage, tmp_path: Path) -> None:
    width = tiny.model.parts()["text_encoder"].config.hidden_size
    vector = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vector}, tmp_path / "word.safetensors")
    other = TextToImage.from_pretrained(tiny_folder, "cpu")
    other.load_textual_inversion(tmp_path / "word.safetensors", "<word>")
    expected = other("a <word>", seed=3, num_inference_steps=3, output_type="pt").images
    with gpu(too_small(tiny)):
        model = loaded(tiny_folder)
        painted(model)
        model.load_textual_inversion(tmp_path / "word.safetensors", "<word>")
        assert model._offload.is_on and not model._offload.here
        found = model("a <word>", seed=3, num_inference_steps=3, output_type="pt").images
    assert (found - expected).abs().max() < 1e-4


def test_who_was_asked_longest_ago_leaves() -> None:
    networks = [nn.Linear(60, 60, bias=False) for _ in range(3)]  # 14,400 bytes each
    with gpu(2 * 2 * 14_400), torch.no_grad():
        travel = Offload(networks, GPU)
        travel.begin()
        x = torch.ones(1, 60, device="cuda")
        for order, here in (([0, 1], {0, 1}), ([2], {1, 2}), ([1, 0], {1, 0})):
            for place in order:
                networks[place](x)
            assert {place for place, network in enumerate(networks) if there(network)} == here
        assert travel.end() and not any(map(there, networks)) and not travel.end()
        with pytest.raises(RuntimeError, match="of tensors on cuda:0 and on cpu"):
            networks[0](x)


def test_a_weight_of_two_layers_travels_once_and_stays_one() -> None:
    first, second = nn.Linear(60, 60, bias=False), nn.Linear(60, 60, bias=False)
    second.weight = first.weight
    network = nn.Sequential(first, second)
    before = first.weight.detach().clone()
    with pretended():
        traveller = Traveller("both", [first, second])
        assert traveller.num_bytes == 14_400
        traveller.come(GPU)
        assert there(network) and second.weight is first.weight
        traveller.leave()
    assert not there(network) and second.weight is first.weight and torch.equal(first.weight, before)


def test_a_bucket_asks_for_relief_once_between_calls_that_succeed() -> None:
    asked: list[int] = []

    def relief() -> bool:
        asked.append(1)
        return len(asked) < 3

    bucket = Bucket("decoder", torch.device("cpu"), relief=relief)
    assert bucket.halve(4) and bucket.ceiling == 2
    assert bucket.halve(1) and (len(asked), bucket.size, bucket.ceiling) == (1, UNBOUNDED, UNBOUNDED)
    bucket.ask(1, lambda: None)
    assert not bucket.halve(1) and len(asked) == 1, "a call that succeeds is not yet a step"
    assert bucket.halve(1) and len(asked) == 2, "who is next is relieved again"
    bucket.succeed(1)
    assert not bucket.halve(1) and len(asked) == 3, "nobody is left"


def test_texts_that_do_not_fit_beside_all_networks_have_them_leave(tiny_folder: Path, tiny: TextToImage) -> None:
    expected, ran_out = painted(tiny), list[int]()
    with gpu(1 << 33):
        model = loaded(tiny_folder)

        def too_much(*call: object) -> None:
            if there(model.model.unet):
                ran_out.append(1)
                raise torch.OutOfMemoryError("no more")

        tower = model.model.parts()["text_encoder"]
        next(tower.children()).register_forward_pre_hook(too_much)
        found = painted(model)
    assert ran_out and (found.images - expected.images).abs().max() < 1e-4


def test_a_gradient_that_does_not_fit_ends(tiny: TextToImage) -> None:
    """Although the network that was asked before it had succeeded, and somebody always leaves."""

    def too_much(*call: object) -> None:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no more")

    model = TextToImage(tiny.model)
    model._buckets = Buckets(relief=lambda: True)
    assert model.model.clip is not None
    hook = model.model.clip.towers.image_network.register_forward_pre_hook(too_much)
    with pytest.raises(MemoryError, match="not even one fits in memory"):
        painted(model, clip_guidance_scale=2.0)
    hook.remove()


def test_who_a_gradient_goes_back_through_stays() -> None:
    networks = [nn.Linear(60, 60, bias=False) for _ in range(4)]
    with gpu(2 * 2 * 14_400):
        travel = Offload(networks, GPU)
        travel.begin()
        first, second, third, fourth = travel.travellers
        travel.ask(first)
        with torch.enable_grad():
            for each in (second, third, fourth):
                travel.ask(each)
            assert travel.here == [second, third, fourth]
        travel.ask(first)
        assert travel.here == [fourth, first]


def test_weights_that_came_in_inference_mode_take_gradients_later() -> None:
    network = nn.Linear(60, 60, bias=False)
    with gpu(1 << 20):
        travel = Offload([network], GPU)
        travel.begin()
        with torch.inference_mode():
            travel.ask(travel.travellers[0])
        assert there(network) and not network.weight.is_inference()
        travel.end()
    assert not network.weight.is_inference()


def test_a_copy_of_a_network_tells_nobody_and_nobody_keeps_one() -> None:
    network, other = nn.Linear(60, 60, bias=False), nn.Linear(60, 60, bias=False)
    with gpu(1 << 20):
        travel = Offload([network, other], GPU)
        travel.begin()
        twin = copy.deepcopy(network)
        (hook,) = twin._forward_pre_hooks.values()
        assert hook is offload.say_nothing and not travel.here
        gone = ref(network)
        gc.disable()
        try:
            del network, travel
            assert gone() is None
        finally:
            gc.enable()


def test_what_could_leave_is_room_for_a_picture(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended():
        model = loaded(tiny_folder)
        assert model._offload.could_leave > 50_000
        needed = 4 * model.model.held_at_once(model.model.abilities.defaults, is_decoded=True)
        monkeypatch.setattr("gen.room.free_memory", lambda device: needed - 50_000)
        message = r"needs \d+\.\d GB at the very least, and 0\.\d GB could be had"
        with pytest.raises(ValueError, match=message):
            model(PROMPT, height=2048, width=2048, num_inference_steps=1)
        model(PROMPT, num_inference_steps=1)


def test_a_turn_is_had_in_order_and_again_by_who_has_it() -> None:
    turn, had, waiting = Turn(), list[int](), list[Thread]()

    def take(number: int) -> None:
        with turn, turn:
            had.append(number)

    with turn:
        for number in range(8):
            waiting.append(Thread(target=take, args=(number,)))
            waiting[-1].start()
            while len(turn._waiting) <= number:
                sleep(0.001)
        assert not had
    for each in waiting:
        each.join()
    assert had == list(range(8))


def test_two_engines_paint_by_networks_that_take_turns(tiny_folder: Path, tiny: TextToImage) -> None:
    expected = [painted(tiny, seed=seed).images for seed in (3, 9)]
    with gpu(too_small(tiny)):
        model = loaded(tiny_folder)
        words: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 3, "output_type": "pt"}
        engines = [model.engine(), model.engine()]
        futures = [
            engine.submit(Request(PROMPT, seed=seed, **words)) for engine, seed in zip(engines, (3, 9), strict=True)
        ]
        while any([engine.tick() for engine in engines]):
            pass
        found = [future.result().images for future in futures]
    assert all((one - other).abs().max() < 1e-4 for one, other in zip(found, expected, strict=True))
