"""Scores, retrieval and zero-shot: exact answers by hand, and a CLIP whose embeddings are known."""

import doctest

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_core import retrieval, zero_shot
from clip_core.clip import CLIP
from clip_core.retrieval import ranks, recall_at_k, top1_of_n
from clip_core.score import cosine, keep_best
from clip_core.zero_shot import accuracy, class_weights, classify
from gen.checkpoint import find
from tests.tiny import tiny_clip, tiny_tokenizer
from training.data.shapes import SHAPES
from training.data.suite import load


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cosine_by_hand() -> None:
    image = torch.tensor([[3.0, 0], [0, -2], [1, 1]])
    assert cosine(image, torch.tensor([[1.0, 0]])).tolist() == pytest.approx([1, 0, 0.5**0.5])
    assert cosine(image, torch.tensor([1.0, 0])).tolist() == pytest.approx([1, 0, 0.5**0.5])
    assert cosine(image, -image).tolist() == pytest.approx([-1, -1, -1])
    with torch.autocast("cpu", torch.bfloat16):
        assert cosine(image.half(), image.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="do not pair"):
        cosine(image, image[:2])
    with pytest.raises(ValueError, match="do not pair"):
        cosine(image, torch.ones(3, 3))


def test_keep_best() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [float("nan"), -1.0, -3.0, -2.0]])
    assert keep_best(scores, 3).tolist() == [[1, 3, 2], [1, 3, 2]]  # ties in drawing order, nan last
    assert keep_best(scores).tolist() == [[1, 3, 2, 0], [1, 3, 2, 0]]
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"keep is {wrong}; give 1 to 4"):
            keep_best(scores, wrong)
    with pytest.raises(ValueError, match="candidates of each"):
        keep_best(scores[0], 1)


def test_ranks_by_hand() -> None:
    gallery = torch.eye(3)
    query = torch.tensor([[1.0, 0.5, 0.2], [1, 0.5, 0.2], [1, 0.5, 0.2]])
    assert ranks(query, gallery).tolist() == [0, 1, 2]
    assert recall_at_k(query, gallery, (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1})
    either = torch.tensor([[False, True, True]] * 3)
    assert ranks(query, gallery, either).tolist() == [1, 1, 1]  # the better of two right ones counts


def test_collapsed_embeddings_find_nothing() -> None:
    same = random(1, 7).expand(50, 7) * torch.linspace(0.5, 2, 50)[:, None]
    assert recall_at_k(same, same, (1, 49, 50)) == {1: 0, 49: 0, 50: 1}
    assert top1_of_n(same, same, 10) == 0


def test_top1_of_n_looks_within_groups() -> None:
    gallery = random(40, 16)
    query = gallery + random(40, 16, seed=1) * 0.01
    assert top1_of_n(query, gallery, 20) == 1
    # a twin in the same group hides its like; in another group it does not
    near, far = gallery.clone(), gallery.clone()
    near[5] = gallery[0]
    far[25] = gallery[0]
    assert top1_of_n(near, near, 20) == pytest.approx(38 / 40)
    assert top1_of_n(far, far, 20) == 1
    assert recall_at_k(far, far, (1, 2)) == pytest.approx({1: 38 / 40, 2: 1})


def test_chance_is_one_of_n() -> None:
    rate = top1_of_n(random(4000, 8), random(4000, 8, seed=1), 20)
    assert rate == pytest.approx(1 / 20, abs=0.015)


def test_bad_retrieval_input() -> None:
    with pytest.raises(ValueError, match="multiple of n"):
        top1_of_n(random(30, 4), random(30, 4), 20)
    with pytest.raises(ValueError, match="3 queries, 4 items"):
        ranks(random(3, 4), random(4, 4))
    with pytest.raises(ValueError, match="an answer to every query"):
        ranks(random(2, 4), random(2, 4), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="at least 1"):
        recall_at_k(random(2, 4), random(2, 4), (0,))


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return CLIP(tiny_clip(tokenizer), tokenizer)


def test_zero_shot_is_the_softmax_of_scaled_cosines(clip: CLIP) -> None:
    names, pixels = ["red circle", "blue square", "star"], torch.rand(4, 3, 64, 64)
    weights = class_weights(clip, names, ["a {}"])
    texts = [f"a {name}" for name in names]
    scores = torch.stack([clip.score(pixels, text) for text in texts], dim=1)
    expected = (scores * clip.logit_scale.exp()).softmax(dim=1)
    torch.testing.assert_close(classify(clip, pixels, weights), expected)
    assert accuracy(expected, expected.argmax(dim=1)) == 1
    assert accuracy(expected, expected.argmin(dim=1)) == 0
    assert accuracy(expected, expected.argmin(dim=1), k=3) == 1
    assert accuracy(expected, expected.topk(2).indices[:, 1], k=2) == 1


def test_templates_are_averaged_as_unit_vectors(clip: CLIP) -> None:
    templates = ["a {}", "a small {}"]
    both = class_weights(clip, ["star", "circle"], templates)
    single = torch.stack([class_weights(clip, ["star", "circle"], [one]) for one in templates])
    torch.testing.assert_close(both, F.normalize(single.mean(dim=0), dim=-1))
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))


@torch.no_grad()
def test_the_examples_in_both_modules_are_true() -> None:
    """Of the bundled CLIP and true pictures."""
    clip = CLIP.from_pretrained(find("shapes64") / "clip")
    pairs = [prompt for prompt in load() if prompt.group == "retrieval"]
    single = [prompt for prompt in pairs if prompt.claim.kind == "one"]
    labels = torch.tensor([SHAPES.index(prompt.claim.first.shape) for prompt in single])
    for module, prompts in ((zero_shot, single), (retrieval, pairs)):
        pixels = torch.stack([torch.from_numpy(prompt.picture()) for prompt in prompts]).permute(0, 3, 1, 2) / 255
        words = {"clip": clip, "pixels": pixels, "labels": labels, "captions": [prompt.text for prompt in prompts]}
        done = doctest.testmod(module, extraglobs=words)
        assert done.attempted >= 2 and not done.failed


def test_bad_zero_shot_input(clip: CLIP) -> None:
    for names, templates in (([], ["a {}"]), (["star"], []), (["star"], ["a star"])):
        with pytest.raises(ValueError, match="make no classifier"):
            class_weights(clip, names, templates)
    with pytest.raises(ValueError, match="k is 3; give 1 to 2"):
        accuracy(torch.ones(1, 2), torch.tensor([0]), k=3)
