"""A network for drafts decides who goes on, never a pixel of them; where it does not follow it is not asked."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableUnCLIPPipeline
from torch import Tensor

from gen import Request, TextToImage
from gen.adapters import drafts, lora
from gen.drafter import Drafter
from gen.facts import facts_of
from gen.search import Draft, Field, Moves, Scout
from tests.tiny import tiny_unet

STEPS, DRAFTED, SCALE = 6, 2, 3.0
ASKED = Request(
    prompt="a small red circle",
    num_images_per_prompt=8,
    keep=2,
    seed=5,
    num_inference_steps=STEPS,
    guidance_scale=SCALE,
    prior=False,
    search="draft",
    output_type="pt",
)
FINISHED = 3  # of the eight: one and a quarter for each that is kept, rounded up


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for drafts of the tiny model: its UNet with every weight moved."""
    model = TextToImage.from_pretrained(tiny_folder, device="cpu")
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.model.unet.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=rng)
    folder = tmp_path_factory.mktemp("models") / "draft"
    drafts.save(Drafter(model.model.unet, DRAFTED, SCALE), folder)
    return folder


@pytest.fixture(scope="module")
def drafting(tiny_folder: Path, folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_folder, device="cpu", draft_unet=folder)


def painted(model: TextToImage, **changes: Any) -> Any:
    return model.paint([replace(ASKED, **changes)])[0]


def pictures(result: Any) -> dict[int, Tensor]:
    return dict(zip(result.seeds, result.images, strict=True))


def test_it_drafts_and_the_decoder_paints(drafting: TextToImage, tiny: TextToImage) -> None:
    result = painted(drafting)
    assert result.account.evaluations["decoder"] == 8 * DRAFTED + FINISHED * 2 * STEPS
    every = pictures(painted(tiny, search=None, keep=None))
    for seed, picture in pictures(result).items():
        assert (picture - every[seed]).abs().max() <= 1 / 255


def test_those_go_on_whose_drafts_score_best(drafting: TextToImage) -> None:
    model = drafting.model
    assert model.drafter is not None and model.clip is not None
    alone = TextToImage(replace(model, unet=model.drafter.unet, drafter=None))
    few: dict[str, Any] = {"num_inference_steps": DRAFTED, "guidance_scale": 1.0, "sampler": "ddim"}
    drafts = painted(alone, **few, search=None, keep=None)
    scores = dict(zip(drafts.seeds, drafts.scores, strict=True))
    best = sorted(scores, key=lambda seed: -scores[seed])[:FINISHED]
    assert {each.seed for each in painted(drafting).candidates if each.painted} == set(best)


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": SCALE + 1},
        {"negative_prompt": "blue"},
        {"guidance_rescale": 0.5},
        {"guidance_interval": (0.1, 5.0)},
        {"eta": 1.0},
        {"prior": True},
        {"search": Draft(steps=0.5)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_where_it_does_not_follow_the_decoder_drafts(
    drafting: TextToImage, tiny: TextToImage, changes: dict[str, Any]
) -> None:
    with_it, without = (painted(model, **changes) for model in (drafting, tiny))
    assert with_it.account.evaluations == without.account.evaluations
    assert with_it.seeds == without.seeds


def test_requests_that_draft_by_either_share_calls(drafting: TextToImage) -> None:
    asked: Sequence[Request] = [ASKED, replace(ASKED, negative_prompt="blue"), replace(ASKED, search=None)]
    together = drafting.paint(list(asked))
    for one, result in zip(asked, together, strict=True):
        alone = drafting.paint([one])[0]
        assert alone.seeds == result.seeds
        assert (alone.images - result.images).abs().max() <= 1 / 255


def test_each_prompt_is_drafted_by_what_follows_it(drafting: TextToImage) -> None:
    both = painted(drafting, prompt=["a small red circle"] * 2, negative_prompt=["", "blue"], seed=[5, 5])
    apart = [painted(drafting), painted(drafting, negative_prompt="blue")]
    evaluations = [each.account.evaluations["decoder"] for each in (both, *apart)]
    assert evaluations[0] == sum(evaluations[1:]) and evaluations[1] < evaluations[2]
    assert both.seeds == [*apart[0].seeds, *apart[1].seeds]


def test_a_search_that_scouts_by_what_is_not_there_is_told(tiny: TextToImage) -> None:
    class Scouting(Draft):
        def __call__(self, field: Any) -> Any:
            yield Scout(field.candidates)

    with pytest.raises(ValueError, match="scouts by a network for drafts, and none follows what is asked; give steps"):
        painted(tiny, search=Scouting())


def test_it_lies_beside_the_model(drafting: TextToImage, tmp_path: Path) -> None:
    saved = drafting.save(tmp_path / "model")
    again = TextToImage.from_pretrained(saved, device="cpu")
    assert again.model.drafter is not None
    assert painted(again).account.evaluations == painted(drafting).account.evaluations
    StableUnCLIPPipeline.from_pretrained(saved)  # which does not look there
    facts = facts_of(str(saved))
    assert facts["told"]["draft_unet"] == f"{DRAFTED} steps, follows guidance {SCALE}"
    assert facts["hash"] == again.hash  # pictures do not depend on it


@pytest.mark.parametrize("config", [{}, {"num_inference_steps": 0, "guidance_scale": 3}, {"num_inference_steps": 2}])
def test_a_damaged_one_is_refused(config: dict[str, Any], tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "draft"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "draft.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"draft\.json' is damaged \(num_inference_steps .*; give 1 or more of each"):
        TextToImage.from_pretrained(tiny_folder, device="cpu", draft_unet=damaged)


def test_one_of_another_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    drafts.save(Drafter(tiny_unet(None), DRAFTED, SCALE), tmp_path / "draft")
    with pytest.raises(ValueError, match=r"draft_unet '.*': .* is .*, but the model's UNet has"):
        TextToImage.from_pretrained(tiny_folder, device="cpu", draft_unet=tmp_path / "draft")
    with pytest.raises(ValueError, match=r"^draft_unet: folder '.*nowhere' does not exist"):
        TextToImage.from_pretrained(tiny_folder, device="cpu", draft_unet=tmp_path / "nowhere")


def test_as_a_lora_of_full_rank_it_is_the_same(drafting: TextToImage, tiny: TextToImage, tmp_path: Path) -> None:
    """But for norms and biases, which a LoRA does not hold, and float16."""
    base, drafter = tiny.model.unet, drafting.model.drafter
    assert drafter is not None
    sizes = []
    for rank in (2, 1000):
        folder = tmp_path / str(rank)
        drafts.save_low_rank(drafter, base, rank, folder)
        sizes.append((folder / lora.USUAL).stat().st_size)
        again = drafts.read(folder, base)
        assert (again.num_inference_steps, again.guidance_scale) == (DRAFTED, SCALE)
    assert sizes[0] < sizes[1]
    moved, before = again.unet.state_dict(), base.state_dict()
    for name, wanted in drafter.unet.state_dict().items():
        is_layers = wanted.ndim > 1
        torch.testing.assert_close(
            moved[name], wanted if is_layers else before[name], atol=1e-3 if is_layers else 0, rtol=0
        )
    painted(TextToImage.from_pretrained(tiny.name, device="cpu", draft_unet=folder))


def test_a_lora_of_another_model_is_refused(drafting: TextToImage, tiny_folder: Path, tmp_path: Path) -> None:
    other = tiny_unet(block_out_channels=(16, 16))
    drafts.save_low_rank(Drafter(copy.deepcopy(other), DRAFTED, SCALE), other, 2, tmp_path)
    with pytest.raises(ValueError, match="is of another base model"):
        TextToImage.from_pretrained(tiny_folder, device="cpu", draft_unet=tmp_path)


class Stranger:
    """A search that scouts a candidate that is not its own."""

    name = "stranger"

    def check(self, asked: Any) -> None:
        pass

    def __call__(self, field: Field) -> Moves:
        yield Scout([100])


def test_a_draft_of_nobody_is_refused(drafting: TextToImage) -> None:
    with pytest.raises(ValueError, match=r"names candidates \[100\]; give each once, of its own"):
        painted(drafting, search=Stranger())
