"""The contrastive loss against exact answers: the textbook formula, known minima, duplicate captions."""

import math

import pytest
import torch
from torch.nn import functional as F

from clip_core.loss import MAX_LOGIT_SCALE, clamp_logit_scale_, contrastive_loss, equal_captions


def test_equals_textbook_cross_entropy() -> None:
    rng = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 8, generator=rng), torch.randn(6, 8, generator=rng)
    logits = 10.0 * F.normalize(image) @ F.normalize(text).T
    labels = torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, math.log(10.0)), expected)


def test_equal_embeddings_give_log_of_batch() -> None:
    ones = torch.ones(5, 3)
    assert contrastive_loss(ones, ones, 1.0).item() == pytest.approx(math.log(5))


def test_duplicates_are_positives() -> None:
    image = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    same = equal_captions(["a", "a", "b"])
    logits = 5.0 * image @ image.T
    target = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(contrastive_loss(image, image, math.log(5.0), same), expected)
    # a perfect pair of duplicates has no gradient; without the mask it would be torn apart
    start = image.clone().requires_grad_()
    (masked,) = torch.autograd.grad(contrastive_loss(start, image, 3.0, same), start)
    assert masked[:2].abs().max() < 1e-6


def test_direction_and_rows_do_not_matter() -> None:
    rng = torch.Generator().manual_seed(1)
    image, text = torch.randn(4, 8, generator=rng), torch.randn(4, 8, generator=rng)
    same = equal_captions([0, 1, 0, 2])
    loss = contrastive_loss(image, text, 2.0, same)
    torch.testing.assert_close(contrastive_loss(text, image, 2.0, same), loss)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(contrastive_loss(image[order], text[order], 2.0, same[order][:, order]), loss)


def test_temperature_learns_and_stays_in_range() -> None:
    scale = torch.tensor(MAX_LOGIT_SCALE, requires_grad=True)
    wrong = torch.eye(3).roll(1, 0)
    contrastive_loss(torch.eye(3), wrong, scale).backward()
    assert scale.grad is not None and scale.grad > 0  # all wrong: colder must hurt, even at the limit
    assert clamp_logit_scale_(scale.detach() + 3).item() == pytest.approx(MAX_LOGIT_SCALE)
    beyond = contrastive_loss(torch.eye(3), wrong, 9.0)
    torch.testing.assert_close(beyond, contrastive_loss(torch.eye(3), wrong, MAX_LOGIT_SCALE))


def test_half_precision_inputs_give_float32() -> None:
    rng = torch.Generator().manual_seed(2)
    image, text = torch.randn(4, 8, generator=rng).bfloat16(), torch.randn(4, 8, generator=rng).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(image, text, MAX_LOGIT_SCALE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrastive_loss(image.float(), text.float(), MAX_LOGIT_SCALE))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, E\)"):
        contrastive_loss(torch.ones(2, 3), torch.ones(3, 3), 1.0)
    with pytest.raises(ValueError, match="captions_equal"):
        contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, torch.ones(3, 3, dtype=torch.bool))
