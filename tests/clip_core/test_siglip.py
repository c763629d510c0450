"""SigLIP behind CLIP's face: what transformers says of its own folder, and a model ranked by it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from clip_core import load
from clip_core.clip import CLIP
from clip_core.convert import convert, largest_difference, save_transformers
from clip_core.preprocess import Preprocess
from gen import TextToImage, command
from tests.tiny import make_tiny_siglip, make_tiny_stable_diffusion, tiny_clip, tiny_tokenizer

TEXTS = ["a small red circle", "", "naïve Café!", "left of right " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_siglip(tmp_path_factory.mktemp("siglip") / "siglip")


@pytest.fixture(scope="module")
def clip(folder: Path) -> CLIP:
    return CLIP.from_pretrained(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((48, 48), (60, 90), (200, 77))]


def stock_ids(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    """As the tokenizer's documentation has it: every text padded to the whole length."""
    return dict(
        AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", truncation=True, return_tensors="pt")
    )


@torch.no_grad()
def test_embeddings_equal_transformers(clip: CLIP, folder: Path) -> None:
    stock = SiglipModel.from_pretrained(folder).eval()
    ids = stock_ids(folder, TEXTS)
    theirs = stock.get_text_features(**ids)
    ours = clip.text(TEXTS)
    torch.testing.assert_close(ours.embedding, theirs.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.tokens, theirs.last_hidden_state, atol=1e-5, rtol=0)
    assert ours.mask.sum(dim=1).tolist() == ids["attention_mask"].sum(dim=1).tolist()
    values = clip.preprocess.from_images(pictures())
    theirs = SiglipImageProcessorPil.from_pretrained(folder)(pictures(), return_tensors="pt").pixel_values
    assert (values - theirs).abs().max() < 1.01 / 255 / 0.5  # one level: Pillow 13 shrinks some shapes height first
    seen = stock.get_image_features(pixel_values=values).pooler_output
    torch.testing.assert_close(clip.image(pictures()), seen, atol=1e-5, rtol=0)
    # and scores are its sigmoid's
    pairs = stock(**{name: ids[name][:3] for name in ids}, pixel_values=values).logits_per_image.diagonal()
    scores = clip.score(pictures(), TEXTS[:3])
    likely = clip.probability(scores)
    assert likely is not None and len(set(likely.tolist())) == 3
    torch.testing.assert_close(likely, pairs.sigmoid(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_tokenizer_that_hands_over_no_mask(copy: Path, clip: CLIP) -> None:
    """As SigLIP's own does: the text tower then reads the padding too."""
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids"]}))
    ids = stock_ids(copy, TEXTS)
    assert set(ids) == {"input_ids"}
    ours = CLIP.from_pretrained(copy).text(TEXTS)
    theirs = SiglipModel.from_pretrained(copy).eval().get_text_features(**ids).pooler_output
    torch.testing.assert_close(ours.embedding, theirs, atol=1e-5, rtol=0)
    assert (ours.embedding - clip.text(TEXTS).embedding).abs().max() > 1e-2
    assert torch.equal(ours.mask, clip.text(TEXTS).mask)


def test_it_ranks_a_model_and_is_saved_beside_it(clip: CLIP, folder: Path, tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(make_tiny_stable_diffusion(tmp_path / "model"), device="cpu", clip=folder)
    asked = {"num_images_per_prompt": 3, "num_inference_steps": 2, "seed": 3}
    result = model("a star", keep=2, **asked)
    assert result.scores == sorted(result.scores or [], reverse=True) and len(result.scores) == 2
    torch.testing.assert_close(torch.tensor(result.scores), clip.score(result.images, "a star"), atol=1e-5, rtol=0)
    saved = TextToImage.from_pretrained(model.save(tmp_path / "saved"), device="cpu")
    assert saved("a star", keep=2, **asked).scores == pytest.approx(result.scores, abs=1e-5)


def test_score_tells_both(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures()[1].save(tmp_path / "one.png")
    arguments = ["score", str(tmp_path / "one.png"), "a star", "a circle", "--model", str(folder)]
    assert command.main([*arguments, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    clip = CLIP.from_pretrained(folder)
    expected = clip.score(clip.image(pictures()[1:2]).expand(2, -1), ["a star", "a circle"])
    assert [one["score"] for one in scores] == pytest.approx(expected.tolist())
    likely = clip.probability(expected)
    assert likely is not None and [one["probability"] for one in scores] == pytest.approx(likely.tolist())
    assert command.main(arguments) == 0
    assert f"{likely[0]:6.1%}  {tmp_path / 'one.png'}  a star" in capsys.readouterr().out


def test_written_and_read_again(clip: CLIP, tmp_path: Path) -> None:
    save_transformers(clip, tmp_path / "again")
    pixels = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    assert largest_difference(clip, CLIP.from_pretrained(tmp_path / "again"), TEXTS, pixels) == 0


def test_what_a_silent_file_means() -> None:
    ours = Preprocess.from_config({"image_processor_type": "SiglipImageProcessor"})
    half = (0.5, 0.5, 0.5)
    assert ours == Preprocess((224, 224), None, half, half, "bicubic")


def test_what_cannot_be_is_said(
    clip: CLIP, copy: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="clip_skip needs a CLIP text tower"):
        clip.text("a", clip_skip=1)
    with pytest.raises(ValueError, match="cannot be converted exactly: it is a SigLIP"):
        convert(folder, tmp_path / "out")
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "SiglipTokenizer"}))
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is a SiglipTokenizer, for which pip install 'unclip\[siglip\]'"):
        CLIP.from_pretrained(copy)
    path.write_text(json.dumps(config))
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be read"):
        CLIP.from_pretrained(copy)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is missing"):
        CLIP.from_pretrained(copy)
    tokenizer = clip.tokenizer
    pad = tokenizer.pad_token
    tokenizer.pad_token = None
    try:
        with pytest.raises(ValueError, match="has no pad token"):
            CLIP(clip.model, tokenizer, clip.preprocess)
    finally:
        tokenizer.pad_token = pad


def test_a_clip_has_no_probability() -> None:
    tokenizer = tiny_tokenizer()
    preprocess = Preprocess().with_size(64)
    assert CLIP(tiny_clip(tokenizer), tokenizer, preprocess).probability(torch.zeros(2)) is None
