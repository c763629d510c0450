"""CLIP over transformers: equal to the stock models, with their traps of pooling, padding and masks tried out."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_core import hub
from clip_core.clip import CLIP, Tokens
from clip_core.preprocess import Preprocess
from tests.hub import cached
from tests.tiny import (
    LENGTH,
    WIDTH,
    decoder_scheduler,
    tiny_clip,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

TEXTS = ["a small red circle", "", "🙂 ünïcode", "a large green star above a blue square " * 9]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    tiny_clip(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5, 0.4, 0.3]
    ).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> CLIP:
    return CLIP.from_pretrained(folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


def pixels(batch: int = 3, height: int = 80, width: int = 100) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_text_equals_stock(clip: CLIP, folder: Path) -> None:
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    ours = clip.text(TEXTS)
    plain = CLIPTextModel.from_pretrained(folder).eval()(tokens.input_ids)
    projected = CLIPTextModelWithProjection.from_pretrained(folder).eval()(input_ids=tokens.input_ids)
    torch.testing.assert_close(ours.tokens, plain.last_hidden_state)
    torch.testing.assert_close(ours.embedding, projected.text_embeds)
    assert torch.equal(ours.mask, tokens.attention_mask.bool())
    assert ours.tokens.shape == (4, LENGTH, WIDTH) and ours.embedding.shape == (4, WIDTH)
    # no pad reaches what counts: with the mask the states up to the end, and the embedding, are the same
    masked = CLIPModel.from_pretrained(folder).eval().get_text_features(**tokens)
    torch.testing.assert_close(ours.embedding, masked.pooler_output)
    torch.testing.assert_close(ours.tokens[ours.mask], masked.last_hidden_state[ours.mask])


@torch.no_grad()
def test_embedding_is_the_state_at_the_end_of_the_text(clip: CLIP) -> None:
    features = clip.text(TEXTS)
    last = features.mask.sum(dim=1) - 1
    assert last.tolist()[1] == 1 and last.tolist()[3] == LENGTH - 1
    end = features.tokens[torch.arange(4), last]
    torch.testing.assert_close(features.embedding, clip.model.text_projection(end))


@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch(clip: CLIP) -> None:
    together = clip.text(TEXTS)
    for i, text in enumerate(TEXTS):
        alone = clip.text(text)
        torch.testing.assert_close(alone.tokens[0], together.tokens[i])
        torch.testing.assert_close(alone.embedding[0], together.embedding[i])


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
@torch.no_grad()
def test_clip_skip_follows_diffusers(clip: CLIP, folder: Path, clip_skip: int) -> None:
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        # with a projection, since diffusers' clip_skip reads `.text_model`, which a bare CLIPTextModel has no more
        text_encoder=CLIPTextModelWithProjection.from_pretrained(folder).eval(),
        tokenizer=clip.tokenizer,
        unet=tiny_unet(None),
        scheduler=decoder_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    expected, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, False, clip_skip=clip_skip)
    ours, last = clip.text(TEXTS, clip_skip=clip_skip), clip.text(TEXTS)
    torch.testing.assert_close(ours.tokens, expected)
    torch.testing.assert_close(ours.embedding, last.embedding)
    assert (clip_skip == 0) == ((ours.tokens - last.tokens).abs().max().item() < 1e-5)


def test_clip_skip_out_of_range(clip: CLIP) -> None:
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"clip_skip is {wrong}; give 0 to 2"):
            clip.text("a", clip_skip=wrong)


@torch.no_grad()
def test_image_equals_stock(clip: CLIP, folder: Path) -> None:
    images = [Image.fromarray((row.permute(1, 2, 0).numpy() * 255).round().astype("uint8")) for row in pixels()]
    values = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    expected = CLIPVisionModelWithProjection.from_pretrained(folder).eval()(**values).image_embeds
    torch.testing.assert_close(clip.image(pixels()), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.image(images), expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
def test_score_equals_stock_logits(clip: CLIP, stock: CLIPModel) -> None:
    ids = clip.tokenize(TEXTS[:3]).input_ids
    values = clip.preprocess.from_pixels(pixels())
    logits = stock(input_ids=ids, pixel_values=values).logits_per_image / stock.logit_scale.exp()
    torch.testing.assert_close(clip.score(pixels(), TEXTS[:3]), logits.diagonal())
    torch.testing.assert_close(clip.score(pixels(), TEXTS[0]), logits[:, 0])
    torch.testing.assert_close(clip.score(clip.image(pixels()), clip.text(TEXTS[0])), logits[:, 0])
    assert torch.equal(clip.logit_scale, stock.logit_scale)
    with pytest.raises(ValueError, match="do not pair"):
        clip.score(pixels(), TEXTS[:2])


def test_gradient_reaches_the_pixels_and_weights_are_frozen(clip: CLIP) -> None:
    x = pixels().requires_grad_()
    F.cosine_similarity(clip.image(x), clip.text(TEXTS[0]).embedding).sum().backward()
    assert x.grad is not None and x.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert not any(weight.requires_grad for weight in clip.model.parameters())
    assert not clip.model.training


def test_long_text_is_cut_with_a_warning(clip: CLIP, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokens = clip.tokenize(TEXTS)
    assert tokens.input_ids.shape == (4, LENGTH) and tokens.input_ids[3, -1] == clip.tokenizer.eos_token_id
    ours = [record.getMessage() for record in caplog.records if record.name == "clip_core.text"]
    assert len(ours) == len(caplog.records) == 1 and "is cut to 32: 'a large green star" in ours[0]


def test_a_warning_has_both_ends_of_a_long_text(clip: CLIP, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        clip.tokenize(["a large green star " * 999 + "zebra"])
    (message,) = [record.getMessage() for record in caplog.records if record.name == "clip_core.text"]
    assert (
        ": 'a large green star a" in message
        and message.endswith(" a large green star zebra'")
        and "large...en" in message
    )
    assert len(message) < 140


def test_tokens_can_be_handed_in(clip: CLIP) -> None:
    tokens = clip.tokenize(TEXTS)
    assert isinstance(tokens, Tokens)
    assert torch.equal(clip.text(tokens).embedding, clip.text(TEXTS).embedding)


@pytest.mark.parametrize("texts", [[], [1], None])
def test_what_is_no_text_is_refused(clip: CLIP, texts: list) -> None:
    with pytest.raises((ValueError, TypeError)):
        clip.tokenize(texts)


# The end-of-text rule


def with_eos(tokenizer: CLIPTokenizer, eos: int) -> CLIPModel:
    model = tiny_clip(tokenizer)
    model.config.text_config.eos_token_id = eos
    model.text_model.eos_token_id = eos
    return model


@torch.no_grad()
def test_legacy_eos_id_pools_alike_where_the_end_is_the_highest_id(tokenizer: CLIPTokenizer) -> None:
    legacy = with_eos(tokenizer, 2)
    right = tiny_clip(tokenizer)
    right.load_state_dict(legacy.state_dict())
    torch.testing.assert_close(
        CLIP(legacy.eval(), tokenizer).text(TEXTS).embedding, CLIP(right, tokenizer).text(TEXTS).embedding
    )


def test_wrong_eos_id_is_refused(tokenizer: CLIPTokenizer) -> None:
    # stock pools at position 0 here, so all texts embed alike: why this must not pass
    wrong = with_eos(tokenizer, 7)
    ids = tokenizer(TEXTS[:2], padding="max_length", return_tensors="pt").input_ids
    alike = wrong.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(alike[0], alike[1])
    with pytest.raises(ValueError, match="eos_token_id is 7"):
        CLIP(wrong, tokenizer)


def test_end_id_two_is_refused() -> None:
    small = CLIPTokenizer(vocab={"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "b</w>": 3}, merges=[])
    assert small.eos_token_id == 2
    model = tiny_clip(small)
    with pytest.raises(ValueError, match="and not 2"):
        CLIP(model, small)


def test_tokenizer_and_tower_must_fit(tokenizer: CLIPTokenizer) -> None:
    model = tiny_clip(tokenizer)
    model.config.text_config.vocab_size = len(tokenizer) - 1
    with pytest.raises(ValueError, match="ids, the text tower only"):
        CLIP(model, tokenizer)
    with pytest.raises(ValueError, match="prepared at"):
        CLIP(tiny_clip(tokenizer), tokenizer, Preprocess(resize=32, crop=(32, 32)))
    with pytest.raises(ValueError, match="CLIPTextModel is not a CLIP"):
        CLIP(CLIPTextModel(model.config.text_config), tokenizer)


# Loading


@torch.no_grad()
def test_loading_is_quiet_and_keeps_global_randomness(
    folder: Path, capfd: pytest.CaptureFixture[str], stock: CLIPModel
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    capfd.readouterr()
    loaded = CLIP.from_pretrained(str(folder))
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in stock.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key
    assert not any(tensor.is_meta for tensor in (*loaded.model.parameters(), *loaded.model.buffers()))
    assert loaded.model.config._attn_implementation == "sdpa"
    eager = CLIP.from_pretrained(folder, attn_implementation="eager")
    assert eager.model.text_model.config._attn_implementation == "eager"
    torch.testing.assert_close(eager.text(TEXTS).embedding, loaded.text(TEXTS).embedding)


@torch.no_grad()
def test_half_precision_on_disk_and_in_use(folder: Path, copy: Path, clip: CLIP) -> None:
    weights = {key: value.half() for key, value in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    wide = CLIP.from_pretrained(copy)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.text(TEXTS).embedding, clip.text(TEXTS).embedding, atol=0.02, rtol=0.02)
    half = CLIP.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.image(pixels()).dtype == torch.bfloat16
    scores = half.score(pixels(), TEXTS[0])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, clip.score(pixels(), TEXTS[0]), atol=0.05, rtol=0)


@torch.no_grad()
def test_sharded_weights(folder: Path, tmp_path: Path, clip: CLIP, stock: CLIPModel) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(CLIP.from_pretrained(tmp_path).text(TEXTS).tokens, clip.text(TEXTS).tokens)
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"{shards[0].name}' is missing"):
        CLIP.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": 3}}))
    with pytest.raises(ValueError, match=r"index\.json' names 3, which is no file beside it"):
        CLIP.from_pretrained(tmp_path)


CONFIGS = ["config.json", "tokenizer.json", "preprocessor_config.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
OTHERS = ["README.md", "pytorch_model.bin", "open_clip_pytorch_model.bin", "sub/model.safetensors"]


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["model.safetensors", "open_clip_model.safetensors"], ["model.safetensors"]),
        (["open_clip_config.json", "open_clip_model.safetensors", "model.safetensors"], None),
        (["model.safetensors.index.json", *SHARDS, "open_clip_model.safetensors"], [*SHARDS]),
    ],
)
def test_of_a_hub_repository_only_what_is_read_is_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], fetched: list[str] | None
) -> None:
    """As LAION's hold a CLIP for both libraries."""
    asked: list[str] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    configs = CONFIGS if fetched is not None else CONFIGS[1:]  # without config.json it is open_clip's
    monkeypatch.setattr(hub, "list_repo_files", lambda repository: [*configs, *there, *OTHERS])
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    CLIP.from_pretrained("someone/clip")
    beside = [name for name in there if name.endswith(".json")]
    assert set(asked) == {*configs, *beside, *(fetched or ["open_clip_model.safetensors"])}


class Busy(HfHubHTTPError):
    """What the hub's client raises where the hub answers that it cannot; without the answer itself."""

    def __init__(self) -> None:
        Exception.__init__(self, "503 service unavailable")


@pytest.mark.parametrize("error", [RuntimeError("no route to host"), Busy()], ids=["unreachable", "busy"])
def test_without_the_hub_the_cache_has_the_clip(
    folder: Path, tmp_path: Path, clip: CLIP, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def unreachable(repository: str) -> list[str]:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(folder, cached(tmp_path, "someone", "clip"))
    monkeypatch.setattr(hub, "list_repo_files", unreachable)
    assert torch.equal(CLIP.from_pretrained("someone/clip").text(TEXTS).tokens, clip.text(TEXTS).tokens)
    with pytest.raises(ValueError, match="CLIP 'someone/else' is no folder and not on the hub"):
        CLIP.from_pretrained("someone/else")


def one_line(error: pytest.ExceptionInfo[ValueError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_missing_and_damaged_files_are_named(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no such thing"):
        (copy / name).write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            CLIP.from_pretrained(copy)
        one_line(error, name, "damaged")
    (copy / name).unlink()
    with pytest.raises(ValueError) as error:
        CLIP.from_pretrained(copy)
    one_line(error, name)


def test_weights_that_do_not_fit_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first five and how many more."""
    path = copy / "model.safetensors"
    weights = load_file(path)
    six = sorted(weights)[:6]
    for change, message in (
        ([], f"weights {', '.join(six[:5])} and 1 more are missing"),
        ([torch.zeros(3, 5)] * 6, f"weights {' (3, 5), '.join(six[:5])} (3, 5) and 1 more are of another shape"),
    ):
        kept = {name: tensor for name, tensor in weights.items() if name not in six}
        save_file(kept | {name: tensor.clone() for name, tensor in zip(six, change, strict=False)}, path)
        with pytest.raises(ValueError) as error:
            CLIP.from_pretrained(copy)
        one_line(error, f"CLIP '{copy}' is damaged", message)
    save_file(weights | {f"extra.{k}": torch.zeros(1) for k in range(7)}, path)
    CLIP.from_pretrained(copy)
    assert "weights extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more are not read" in caplog.text


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("config.json", "text_config", {"num_hidden_layers": 10**6}, "asks for num_hidden_layers=1000000 in its"),
        ("config.json", "vision_config", {"hidden_size": 10**9}, "asks for hidden_size=1000000000 in its"),
        ("config.json", "vision_config", {"image_size": 10**5}, "asks for image_size=100000 in its"),
        ("preprocessor_config.json", "size", {"shortest_edge": 10**9}, "asks for shortest_edge=1000000000 in its"),
    ],
)
def test_absurd_sizes_are_refused(copy: Path, name: str, part: str, change: dict[str, int], message: str) -> None:
    config = json.loads((copy / name).read_text())
    config[part] |= change
    (copy / name).write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        CLIP.from_pretrained(copy)
    one_line(error, message)


def test_pickled_weights_are_refused(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    CLIP.from_pretrained(copy)  # beside safetensors it does no harm
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        CLIP.from_pretrained(copy)
    one_line(error, "pickle (pytorch_model.bin)", "model.safetensors")


def test_other_models_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type 'bert'; only 'clip' and 'siglip' can be used"):
        CLIP.from_pretrained(copy)
    (copy / "config.json").write_text(json.dumps({**config, "text_config": {"hidden_size": 15}}))
    with pytest.raises(ValueError) as error:
        CLIP.from_pretrained(copy)
    one_line(error, "config.json does not describe a CLIP")
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="not a CLIP folder"):
        CLIP.from_pretrained(copy)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "nowhere", "tests/nowhere", "a/b/c", "~/no", "", "a b/c"])
def test_a_path_that_does_not_exist_never_reaches_the_network(name: str) -> None:
    with pytest.raises(ValueError, match="is no folder; give a CLIP folder, a hub id") as error:
        CLIP.from_pretrained(name)
    one_line(error, repr(name))


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a file"):
        CLIP.from_pretrained(folder / "config.json")


def test_hub_id_comes_from_the_cache_and_fails_in_one_line(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    code = """
import sys
from clip_core.clip import CLIP
print(CLIP.from_pretrained("someone/tiny-clip").text("a").embedding.shape[1])
for name in ("someone/else", "open_clip:ViT-B-32/laion2b_s34b_b79k"):
    try:
        CLIP.from_pretrained(name)
    except ValueError as error:
        print(error)
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert out[0] == str(WIDTH) and len(out) == 3
    assert "'someone/else'" in out[1] and "open_clip_model.safetensors" in out[2]
