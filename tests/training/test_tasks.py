"""Each part learns: it overfits one batch in seconds, measures what it must, and is saved as its library's own."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, PriorTransformer, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import default_collate
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from clip_core.clip import CLIP
from gen import TextToImage
from gen.families.autoencoder import KLModel
from tests.cuda import pretended
from tests.tiny import make_tiny_stable_diffusion, tiny_vae
from tests.training.tiny_recipes import WIDTH, recipes
from training.alignment import misalignment
from training.captioner import Captioner
from training.clip_task import ClipRecipe, ClipTask
from training.data.pictures import Pictures
from training.decoder_task import DecoderRecipe, DecoderTask
from training.frozen import latents, load_clip, load_vae, transformers_model
from training.loop import train
from training.parts import PART_TASKS
from training.recipe import RecipeError, check
from training.soften import soften
from training.task import Task, validation_size
from training.vae_task import VaeRecipe, VaeTask
from training.vision_start import AMPLITUDE, whiten_patches_

PARTS = ["clip", "vae", "prior", "decoder", "draft"]
RECIPES = {
    "clip": (250, 1e-3),
    "vae": (60, 1e-2),
    "prior": (100, 1e-2),
    "decoder": (100, 1e-2),
    "draft": (100, 1e-2),
}  # steps and rate


def make(part: str, data: Path, trained: Path, **changes: Any) -> Any:
    """The part's task, reading the tiny CLIP and autoencoder that `trained` holds."""
    recipe_class, task_class = PART_TASKS[part]
    return task_class(check(recipe_class, recipes(data, trained)[part] | changes))


def first_batch(task: Task[Any], size: int = 8) -> Any:
    return default_collate([task.dataset[index] for index in range(size)])


def losses(task: Task[Any], seed: int = 0) -> dict[str, Tensor]:
    return task(first_batch(task), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("part", PARTS)
def test_it_overfits_one_batch(part: str, few_shapes: Path, trained: Path) -> None:
    """The same batch with the same noise again and again."""
    keys: dict[str, Any] = {"drop_text": 0.0} if part == "prior" else {}
    task = make(part, few_shapes, trained, **keys)
    num_steps, rate = RECIPES[part]
    optimizer = torch.optim.Adam((value for value in task.network.parameters() if value.requires_grad), rate)
    before = losses(task)["loss"].item()
    for _ in range(num_steps):
        loss = losses(task)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = losses(task)["loss"].item()
    assert after < 0.5 * before, (before, after)
    if part == "clip":
        assert losses(task)["batch_top1"] == 1  # hard negatives told apart


@pytest.mark.parametrize("part", PARTS)
def test_a_loss_is_a_function_of_batch_and_generator(part: str, few_shapes: Path, trained: Path) -> None:
    task = make(part, few_shapes, trained)
    state = torch.get_rng_state()
    first = losses(task)
    assert torch.equal(torch.get_rng_state(), state)  # no noise from anywhere else
    torch.manual_seed(5)
    assert torch.equal(losses(task)["loss"], first["loss"])
    assert all(value.ndim == 0 and value.isfinite() for value in first.values())
    if part != "clip":  # which draws nothing
        assert not torch.equal(losses(task, seed=1)["loss"], first["loss"])


@pytest.mark.parametrize("part", PARTS)
def test_only_the_network_is_trained(part: str, few_shapes: Path, trained: Path) -> None:
    task = make(part, few_shapes, trained)
    losses(task)["loss"].backward()
    own = {id(parameter) for parameter in task.network.parameters()}
    for name, parameter in task.named_parameters():
        if id(parameter) in own and parameter.requires_grad:
            assert parameter.grad is not None, f"{name} is trained but has no say in the loss"
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


@pytest.mark.parametrize("part", PARTS)
def test_held_back_examples_are_in_no_group(part: str, few_shapes: Path, trained: Path) -> None:
    task = make(part, few_shapes, trained)
    indices = sorted(index for group in task.groups() for index in group)
    assert indices == list(range(len(task.dataset) - task.num_validation))  # type: ignore[arg-type]
    if part == "clip":
        assert [len(group) for group in task.groups()] == [4] * 9 + [4 - task.num_validation]  # contrasts meet
    assert [validation_size(number) for number in (1, 40, 1000, 60_000)] == [1, 1, 20, 512]


@pytest.mark.parametrize("part", PARTS)
def test_sheets_and_scores(part: str, few_shapes: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(part, few_shapes, trained)
    task.num_validation = 6
    trained_network = task.network
    sheet, scores = task.sheet(task.network), task.measure(task.network)
    assert isinstance(sheet, Image.Image) and min(sheet.size) >= 64
    assert scores and all(isinstance(value, float) and value == value for value in scores.values())
    assert task.network is trained_network
    assert task.measure(task.network) == scores


def test_what_was_left_out_is_known(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (few_shapes / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["file_name"] = str(few_shapes / row["file_name"])
    rows[3]["text"] = ""
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for part in PARTS:
        task = make(part, tmp_path, trained)
        assert task.skipped.counts == {"empty caption": 1}


# --- CLIP -------------------------------------------------------------------------------------------------


def test_clip_is_a_transformers_folder_and_ours(few_shapes: Path, trained: Path) -> None:
    folder = trained / "clip" / "model"
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, CLIPTokenizerFast)
    eos = model.config.text_config.eos_token_id
    assert eos == tokenizer.eos_token_id != 2
    assert tokenizer.model_max_length == model.config.text_config.max_position_embeddings == 32
    processor = CLIPImageProcessor.from_pretrained(folder)
    pictures = Pictures(few_shapes, 64)
    batch = [pictures[index] for index in range(6)]
    images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels, _ in batch]
    ids = tokenizer([text for _, text in batch], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        stock = model(**ids, pixel_values=processor(images, return_tensors="pt").pixel_values)
        clip = load_clip(folder)
        image, text = clip.image(images), clip.text([text for _, text in batch]).embedding
    assert torch.allclose(torch.nn.functional.normalize(image, dim=-1), stock.image_embeds, atol=1e-4)
    assert torch.allclose(torch.nn.functional.normalize(text, dim=-1), stock.text_embeds, atol=1e-4)


def test_clip_is_trained_as_it_is_read(few_shapes: Path, trained: Path) -> None:
    """The loss of the saved model, through the face that everyone else uses, is the loss in training."""
    task = make("clip", few_shapes, trained)
    clip = CLIP.from_pretrained(trained / "clip" / "model")
    task.network.clip.load_state_dict(clip.model.state_dict())
    pixels, captions = first_batch(task)
    with torch.no_grad():
        image, text = clip.image(pixels.float() / 255), clip.text(list(captions)).embedding
        own_image, own_text = task._embed(task.network, pixels / 255, task._tokens(captions))
    assert torch.allclose(image, own_image, atol=1e-4) and torch.allclose(text, own_text, atol=1e-4)


def test_the_temperature_stays_in_range(few_shapes: Path, trained: Path) -> None:
    task = make("clip", few_shapes, trained)
    for given, kept in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2))):
        task.network.clip.logit_scale.data.fill_(given)
        assert losses(task)["temperature"].item() == pytest.approx(kept, rel=1e-5)
        assert task.network.clip.logit_scale.exp().item() == pytest.approx(kept, rel=1e-5)


def test_a_captioner_sees_the_picture_and_no_later_word() -> None:
    torch.manual_seed(0)
    captioner = Captioner(vocab_size=11, max_length=6, embedding_dim=16, num_layers=2)
    image = torch.randn(3, 16, requires_grad=True)
    ids = torch.tensor([[9, 1, 2, 3, 10], [9, 4, 5, 10, 10], [9, 6, 10, 10, 10]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    loss = captioner(image, ids, mask)
    loss.backward()
    assert image.grad is not None and bool((image.grad.abs().sum(dim=1) > 0).all())
    assert torch.equal(captioner(image, ids.where(mask, torch.tensor(7)), mask), loss)  # what is behind the end
    early = mask & (torch.arange(5) < 3)
    later = ids.clone()
    later[:, 3:] = 8
    assert torch.allclose(captioner(image, later, early), captioner(image, ids, early), atol=1e-6)
    assert torch.allclose(captioner(5 * image, ids, mask), loss, atol=1e-5)  # the direction alone counts


def test_a_captioner_teaches_clip_and_is_thrown_away(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    init = trained / "clip" / "model"
    fields = recipes(few_shapes, tmp_path)["clip"] | {"caption_weight": 0.5, "init": str(init)}
    recipe = check(ClipRecipe, fields)
    task = ClipTask(recipe)
    task.start_from(init)
    found = losses(task)
    assert found["loss"].item() == pytest.approx((found["contrast"] + 0.5 * found["caption"]).item(), rel=1e-5)
    train(ClipTask(recipe), recipe, progress=False)
    plain = load_file(init / "model.safetensors")
    taught = load_file(Path(recipe.out) / "model" / "model.safetensors")
    assert {name: value.shape for name, value in taught.items()} == {k: v.shape for k, v in plain.items()}
    assert train(ClipTask(recipe), recipe, progress=False).step == recipe.train.steps  # its checkpoint is read again


def test_softened_pictures_are_warped_and_blurred_each_by_its_own_amounts() -> None:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.zeros(32, 3, 64, 64)
    pixels[:, :, 20:44, 20:44] = 1
    assert torch.allclose(soften(pixels, 0.0, rng), pixels, atol=1e-5)
    soft = soften(pixels, 1.0, rng)
    assert soft.min() >= 0 and soft.max() <= 1 + 1e-5
    assert torch.allclose(soft.mean(dim=(1, 2, 3)), pixels.mean(dim=(1, 2, 3)), atol=0.03)  # what is there stays
    changes = (soft - pixels).abs().mean(dim=(1, 2, 3))
    assert changes.max() > 4 * changes.min() > 0
    some = soften(pixels, 0.5, torch.Generator().manual_seed(1))
    assert 8 <= ((some - pixels).abs().amax(dim=(1, 2, 3)) > 1e-3).sum() <= 24
    assert torch.equal(some, soften(pixels, 0.5, torch.Generator().manual_seed(1)))


def test_clip_is_shown_softened_pictures_and_measured_on_sharp_ones(few_shapes: Path, trained: Path) -> None:
    sharp, soft = (make("clip", few_shapes, trained, soften=share) for share in (0.0, 1.0))
    assert losses(sharp)["contrast"].item() != losses(soft)["contrast"].item()
    assert sharp.measure(sharp.network) == soft.measure(soft.network)


def test_the_image_tower_starts_with_whitened_patches_and_places(few_shapes: Path, trained: Path) -> None:
    task = make("clip", few_shapes, trained)
    start = task.network.clip.vision_model.embeddings
    pictures = torch.stack([task.dataset[index][0] for index in range(len(task.dataset))]).float() / 255
    answers = start.patch_embedding(task.preprocess.from_pixels(pictures)).transpose(0, 1).flatten(1)  # (D, N)
    second = answers @ answers.T / answers.shape[1]
    assert torch.allclose(second.diagonal(), torch.full((WIDTH,), AMPLITUDE**2), rtol=0.05)
    assert (second - second.diagonal().diag()).abs().max() < 0.01 * AMPLITUDE**2
    places = start.position_embedding.weight[1:].unflatten(0, (4, 4))
    assert len(places.flatten(0, 1).unique(dim=0)) == 16
    for other in (places[2, 1], places[1, 2]):  # a neighbour is nearer than who is further along the same way
        assert (places[1, 1] - other).norm() < (places[1, 1] - places[3, 3]).norm()
    assert start.position_embedding.weight[0].abs().max() < 0.2


def test_more_filters_than_a_patch_has_pixels_leave_the_rest_as_they_are() -> None:
    pictures = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.full((20, 3, 2, 2), 7.0)
    whiten_patches_(weight, pictures)
    assert (weight[12:] == 7).all() and (weight[:12] != 7).all()
    narrow = torch.zeros(5, 3, 2, 2)
    whiten_patches_(narrow, pictures)
    assert torch.allclose(narrow, weight[:5])


def test_clip_preprocessing_is_measured(few_shapes: Path, trained: Path) -> None:
    pictures = Pictures(few_shapes, 64)
    values = torch.stack([pixels for pixels, _ in (pictures[index] for index in range(len(pictures)))]).double() / 255
    config = json.loads((trained / "clip" / "model" / "preprocessor_config.json").read_text())
    assert config["image_mean"] == pytest.approx(values.mean(dim=(0, 2, 3)).tolist(), abs=1e-4)
    assert config["image_std"] == pytest.approx(values.std(dim=(0, 2, 3)).tolist(), abs=1e-4)


# --- the autoencoder --------------------------------------------------------------------------------------


def test_latents_are_saved_at_unit_variance(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    task = make("vae", few_shapes, trained)
    task.num_validation = len(task.dataset)  # all are held back, so all are measured
    (tmp_path / "vae").mkdir()
    task.save(task.network, tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    pixels = torch.stack([task.dataset[index][0] for index in range(len(task.dataset))]).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert latents.shape == (40, 4, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert vae.config.scaling_factor != 0.18215  # diffusers' default


def test_the_kl_weight_grows_from_a_hundredth(few_shapes: Path, tmp_path: Path) -> None:
    fields = recipes(few_shapes, tmp_path)["vae"] | {"kl_weight": 0.5, "kl_warmup": 0.4}
    task = VaeTask(check(VaeRecipe, fields))
    batch = first_batch(task)
    for progress, weight in ((0.0, 0.005), (0.2, 0.05), (0.4, 0.5), (0.9, 0.5)):
        task.progress = progress
        found = task(batch, torch.Generator().manual_seed(0))
        assert (found["loss"] - found["error"]).item() == pytest.approx(weight * found["kl"].item(), rel=1e-3)


def test_an_autoencoder_can_train_its_decoder_alone(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    init = trained / "vae" / "model"
    fields = recipes(few_shapes, tmp_path)["vae"] | {"freeze_encoder": True, "init": str(init)}
    recipe = check(VaeRecipe, fields)
    train(VaeTask(recipe), recipe, progress=False)
    before, after = load_vae(init), load_vae(Path(recipe.out) / "model")
    assert after.config.scaling_factor == before.config.scaling_factor
    kept, changed = before.state_dict(), after.state_dict()
    for name, value in kept.items():
        same = torch.equal(changed[name], value)
        assert same == name.startswith(("encoder.", "quant_conv.")), name
    with pytest.raises(RecipeError, match="freeze_encoder needs init"):
        check(VaeRecipe, fields | {"init": None})


# --- the prior --------------------------------------------------------------------------------------------


def image_embeddings(data: Path, clip: CLIP) -> Tensor:
    pictures = Pictures(data, 64)
    with torch.no_grad():
        return clip.image(torch.stack([pictures[index][0] for index in range(len(pictures))]).float() / 255)


def test_the_priors_normalisation_is_measured_and_saved(few_shapes: Path, trained: Path) -> None:
    prior = PriorTransformer.from_pretrained(trained / "prior" / "model")
    embeddings = image_embeddings(few_shapes, load_clip(trained / "clip" / "model"))
    assert embeddings.shape == (40, WIDTH)
    assert torch.allclose(prior.clip_mean[0], embeddings.mean(dim=0), atol=1e-4)
    assert torch.allclose(prior.clip_std[0], embeddings.std(dim=0), rtol=1e-3, atol=1e-5)
    assert prior.config.embedding_dim == WIDTH and prior.config.num_embeddings == 32
    scheduler = DDIMScheduler.from_pretrained(trained / "prior" / "model" / "scheduler")
    assert scheduler.config.prediction_type == "sample"


def test_the_prior_drops_its_text_as_often_as_asked(few_shapes: Path, trained: Path) -> None:
    task = make("prior", few_shapes, trained, drop_text=0.3)
    read: list[str] = []

    class Listening(type(task.prior(task.network))):  # type: ignore[misc]
        def conditions(self, texts: list[str]) -> Any:
            read.extend(texts)
            return super().conditions(texts)

    stock = task.prior(task.network)
    task.reader = Listening(task.network, stock.tokenizer, stock.text_encoder, stock.levels)
    for seed in range(60):
        losses(task, seed)
    assert read.count("") / len(read) == pytest.approx(0.3, abs=0.07)
    assert set(read) == {"", *first_batch(task)[1]}


def test_a_prior_needs_one_width(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    fields = recipes(few_shapes, tmp_path)["clip"] | {"projection_dim": 24}
    recipe_class, task_class = PART_TASKS["clip"]
    task = task_class(check(recipe_class, fields))
    (tmp_path / "clip" / "model").mkdir(parents=True)
    task.save(task.network, tmp_path / "clip" / "model")
    with pytest.raises(ValueError, match=r"the text width is 16 and the embedding width 24; a PriorTransformer needs"):
        make("prior", few_shapes, tmp_path)


# --- the decoder ------------------------------------------------------------------------------------------


class Asked:
    """Stands where the UNet stands and keeps what it is told, one row at a time."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet, self.tokens, self.vectors, self.timesteps = unet, [], [], []  # type: ignore[var-annotated]
        unet.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module: Any, given: Any, words: dict[str, Any]) -> None:
        self.timesteps.extend(given[1].tolist())
        self.tokens.extend(words["encoder_hidden_states"])
        self.vectors.extend(words["class_labels"])


def test_the_decoder_sees_four_kinds_in_the_shares_asked_for(few_shapes: Path, trained: Path) -> None:
    shares = {"both": 0.4, "text": 0.3, "image": 0.2, "none": 0.1}
    task = make("decoder", few_shapes, trained, kinds=shares)
    asked = Asked(task.network.unet)
    captions = list(first_batch(task)[-1])
    with torch.no_grad():
        for seed in range(80):
            losses(task, seed)
        empty, *states = task.text(["", *captions]).tokens
    rows = len(asked.tokens)
    found = dict.fromkeys(shares, 0)
    for index, (tokens, vector) in enumerate(zip(asked.tokens, asked.vectors, strict=True)):
        assert vector.shape == (2 * WIDTH,)
        with_image, null = bool(vector.any()), torch.allclose(tokens, empty, atol=1e-5)
        if not null:  # then it is the row's own caption
            assert torch.allclose(tokens, states[index % 8], atol=1e-5)
        found[{(False, True): "both", (False, False): "text", (True, True): "image", (True, False): "none"}[null, with_image]] += 1  # noqa: E501 # fmt: skip
    for kind, share in shares.items():
        assert found[kind] / rows == pytest.approx(share, abs=0.06), found
    assert min(asked.timesteps) < 50 and max(asked.timesteps) > 950


def test_the_class_input_is_what_stock_makes_of_an_embedding(few_shapes: Path, trained: Path) -> None:
    """Normalised by measured mean and deviation, noised to a level, and the level told beside it."""
    task = make("decoder", few_shapes, trained, noised_share=0.0, kinds={"both": 1.0, "text": 0, "image": 0, "none": 0})
    asked = Asked(task.network.unet)
    losses(task)
    embeddings = first_batch(task)[1]
    vectors = torch.stack(asked.vectors)
    assert torch.allclose(vectors[:, :WIDTH], embeddings, atol=0.1 * embeddings.abs().max().item())  # level 0: almost
    assert (vectors[:, WIDTH:] == vectors[:1, WIDTH:]).all()
    noised = make(
        "decoder", few_shapes, trained, noised_share=1.0, kinds={"both": 1.0, "text": 0, "image": 0, "none": 0}
    )
    asked = Asked(noised.network.unet)
    losses(noised)
    levels = torch.stack(asked.vectors)[:, WIDTH:]
    assert len(levels.unique(dim=0)) > 4


def test_the_image_normaliser_is_measured_and_saved(few_shapes: Path, trained: Path) -> None:
    folder = trained / "decoder" / "model"
    normalizer = StableUnCLIPImageNormalizer.from_pretrained(folder / "image_normalizer")
    embeddings = image_embeddings(few_shapes, load_clip(trained / "clip" / "model"))
    assert torch.allclose(normalizer.mean[0], embeddings.mean(dim=0), atol=1e-4)
    assert torch.allclose(normalizer.std[0], embeddings.std(dim=0), rtol=1e-3, atol=1e-5)
    unet = UNet2DConditionModel.from_pretrained(folder)
    assert unet.config.class_embed_type == "projection"
    assert unet.config.projection_class_embeddings_input_dim == 2 * WIDTH
    assert unet.config.cross_attention_dim == WIDTH and unet.config.in_channels == 4
    assert DDIMScheduler.from_pretrained(folder / "scheduler").config.prediction_type == "v_prediction"
    assert DDPMScheduler.from_pretrained(folder / "image_noising_scheduler").config.num_train_timesteps == 1000


def test_the_decoder_reads_the_autoencoders_latents(few_shapes: Path, trained: Path) -> None:
    task = make("decoder", few_shapes, trained)
    vae = load_vae(trained / "vae" / "model")
    pictures = Pictures(few_shapes, 64)
    pixels = torch.stack([pictures[index][0] for index in range(4)]).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert torch.allclose(torch.stack([task.dataset[index][0] for index in range(4)]), expected, atol=1e-4)


def test_latents_are_those_that_the_engine_decodes(few_shapes: Path, tmp_path: Path) -> None:
    """Also of an autoencoder that says a mean and a deviation of its own, as third parties' do."""
    stated = {"latents_mean": [1.0, -2.0, 0.5, 3.0], "latents_std": [0.5, 2.0, 1.5, 3.0]}
    tiny_vae(**stated).save_pretrained(tmp_path / "vae")
    vae, pictures = load_vae(tmp_path / "vae"), Pictures(few_shapes, 64)
    painter = TextToImage.from_pretrained(make_tiny_stable_diffusion(tmp_path / "model"), "cpu").model
    assert isinstance(painter, KLModel)
    pixels = pictures[0][0][None].float() / 255
    with torch.no_grad():
        read = latents(pictures, vae, tmp_path / "vae")[:1]
        through = vae.decode(vae.encode(pixels * 2 - 1).latent_dist.mode())[0] / 2 + 0.5
        assert torch.allclose(replace(painter, vae=vae).decode(read), through.clamp(0, 1), atol=1e-4)


def test_a_decoder_aligned_with_clip_learns_what_clip_sees_and_is_saved_alone(
    few_shapes: Path, trained: Path, tmp_path: Path
) -> None:
    init = trained / "decoder" / "model"
    fields = recipes(few_shapes, trained)["decoder"] | {"out": str(tmp_path), "align_weight": 0.5, "init": str(init)}
    fields["snr_gamma"] = None
    recipe = check(DecoderRecipe, fields)
    task = DecoderTask(recipe)
    clip, pictures = load_clip(trained / "clip" / "model"), Pictures(few_shapes, 64)
    values = clip.preprocess.from_pixels(pictures[0][0][None].float() / 255)
    states = transformers_model(clip).vision_model(values, output_hidden_states=True).hidden_states
    assert torch.allclose(task.dataset[0][2].float(), states[-2][0, 1:], atol=1e-2)
    found = losses(task)
    assert found["loss"].item() == pytest.approx((found["error"] + 0.5 * found["misalignment"]).item(), rel=1e-5)
    optimizer = torch.optim.Adam(task.network.parameters(), 1e-2)
    for _ in range(100):
        loss = losses(task)["misalignment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * found["misalignment"].item()
    assert task.network.unet.conv_in.weight.grad is not None and bool(task.network.unet.conv_in.weight.grad.any())
    train(DecoderTask(recipe), recipe, progress=False)
    plain, aligned = (
        load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (init, tmp_path / "model")
    )
    assert aligned.keys() == plain.keys()


def test_a_decoder_without_a_middle_cannot_be_aligned(few_shapes: Path, trained: Path) -> None:
    network = recipes(few_shapes, trained)["decoder"]["network"] | {"mid_block_type": None}
    with pytest.raises(RecipeError, match="align_weight needs a network with a middle block"):
        make("decoder", few_shapes, trained, align_weight=0.5, network=network)
    make("decoder", few_shapes, trained, network=network)


def test_a_misalignment_of_nothing_is_nothing() -> None:
    seen = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    patches = 3 * seen.flatten(2).transpose(1, 2)
    assert misalignment(seen, patches).item() == pytest.approx(0, abs=1e-6)
    assert misalignment(-seen, patches).item() == pytest.approx(2, abs=1e-6)
    halves = torch.cat([torch.ones(1, 2, 2, 1), -torch.ones(1, 2, 2, 1)], dim=3)  # left 1, right -1, on a 2 x 2 grid
    finer = halves.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).flatten(2).transpose(1, 2)
    assert misalignment(halves, finer).item() == pytest.approx(0, abs=1e-6)


def test_a_size_that_the_autoencoder_cannot_halve(few_shapes: Path, trained: Path) -> None:
    with pytest.raises(ValueError, match=r"resolution is 60 and the autoencoder in .* divides it by 8"):
        make("decoder", few_shapes, trained, resolution=60)


@pytest.mark.parametrize(("part", "missing"), [("prior", "clip"), ("decoder", "clip"), ("decoder", "vae")])
def test_a_part_that_is_not_there_is_named(few_shapes: Path, trained: Path, part: str, missing: str) -> None:
    with pytest.raises(ValueError, match="nowhere holds no trained part"):
        make(part, few_shapes, trained, **{missing: "nowhere"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU, and there is one")
@pytest.mark.parametrize("part", ["prior", "decoder"])
def test_a_data_set_is_read_by_the_gpu(
    few_shapes: Path, trained: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(part, few_shapes, trained).dataset
    data = shutil.copytree(few_shapes, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pretended() as watch:
        task = make(part, data, trained)
        assert task.dataset.embeddings.device.type == "cpu"
        assert any("training/data/cache.py" in wait for wait in watch.waits), "what was encoded comes back"
    assert torch.allclose(task.dataset.embeddings, expected.embeddings, atol=1e-4)
