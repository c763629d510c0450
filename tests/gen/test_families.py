"""Every family by hub id and from the command line: what is fetched of its repository is enough, and no more.

A cache that diffusers' own folders lie in stands for the hub, and only what is asked of that is copied from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableUnCLIPImg2ImgPipeline
from huggingface_hub import constants
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from clip_core import hub
from gen.model_index import OF_KARLO
from gen.picture import read_png
from tests.pictures import noise
from tests.stock_unclip import img2img
from tests.tiny import (
    make_tiny_clip,
    make_tiny_stable_diffusion,
    make_tiny_stable_diffusion_xl,
    make_tiny_stable_unclip,
)
from tests.tiny_kandinsky import make_tiny_kandinsky
from tests.tiny_karlo import make_tiny_karlo
from tests.typed import answer

COMMIT = "0" * 40
UNREAD = b"nothing here reads this"
SMALL = ["--height", "64", "--width", "64", "--prior-steps", "2"]
FOREIGN = (  # what published repositories hold besides
    *("README.md", "unet/diffusion_pytorch_model.bin", "decoder/diffusion_pytorch_model.bin", "model.safetensors"),
    *("safety_checker/model.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/model.onnx"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "onnx/model.safetensors", "unet/code.py"),
)
# what is typed for each family beside its hub id, the CLIP that ranks and the number of steps
FAMILIES: dict[str, list[str]] = {
    "stable-diffusion": [],
    "stable-diffusion-2": ["--image", "in.png", "--strength", "0.6"],
    "inpainting": ["--image", "in.png", "--mask", "mask.png"],
    "xl": ["--negative", "a star"],
    "unclip": ["--prior-steps", "2", "--prior-best-of", "2"],
    "unclip-pictures": ["--variation-of", "in.png"],
    "unclip-joined": ["--prior-model", "someone/karlo", "--prior-steps", "2"],
    "karlo": ["--prior-steps", "2", "--super-res-steps", "2"],
    "karlo-pictures": ["--variation-of", "in.png", "--super-res-steps", "2"],
    "kandinsky-2.1": SMALL,
    "kandinsky-2.2": SMALL,
    "kandinsky-2.2-apart": ["--prior-model", "someone/kandinsky-2.2-prior", *SMALL],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    unclip = make_tiny_stable_unclip(root / "unclip")
    parts = {name: part for name, part in img2img(unclip).components.items() if part is not None}
    parts |= {"image_encoder": CLIPVisionModelWithProjection.from_pretrained(unclip / "clip").eval()}
    parts |= {"feature_extractor": CLIPImageProcessor.from_pretrained(unclip / "clip")}
    StableUnCLIPImg2ImgPipeline(**parts).save_pretrained(root / "unclip-pictures")
    one, two = (make_tiny_kandinsky(root / version, version) for version in ("2.1", "2.2"))
    return {
        "clip": make_tiny_clip(root / "clip"),
        "stable-diffusion": make_tiny_stable_diffusion(root / "1"),
        "stable-diffusion-2": make_tiny_stable_diffusion(root / "2", version=2),
        "inpainting": make_tiny_stable_diffusion(root / "inpainting", inpaints=True),
        "xl": make_tiny_stable_diffusion_xl(root / "xl"),
        "unclip": unclip,
        "unclip-pictures": root / "unclip-pictures",
        "unclip-joined": root / "unclip-pictures",
        "karlo": make_tiny_karlo(root / "karlo"),
        "karlo-pictures": make_tiny_karlo(root / "karlo-pictures", prior=False),
        "kandinsky-2.1": one["combined"],
        "kandinsky-2.2": two["combined"],
        "kandinsky-2.2-apart": two["decoder"],
        "kandinsky-2.2-prior": two["prior"],
    }


@pytest.fixture(scope="module")
def cache(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache of all of them, with files that nothing here reads."""
    root = tmp_path_factory.mktemp("hub")
    for name, folder in folders.items():
        repository = root / f"models--someone--{name}"
        snapshot = Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))
        for file in FOREIGN if name != "clip" else ():
            if (snapshot / file).parent.is_dir():
                (snapshot / file).write_bytes(UNREAD)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_by_its_hub_id(
    family: str,
    folders: dict[str, Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    noise(0).save("in.png")
    Image.fromarray(np.where(np.arange(64)[:, None] < 32, 255, np.zeros((64, 64))).astype(np.uint8)).save("mask.png")

    def snapshot(repository: str) -> Path:
        return cache / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT

    def files(repository: str) -> list[str]:
        there = snapshot(repository)
        return [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()]

    def download(repository: str, allow_patterns: list[str]) -> str:
        fetched = tmp_path / "fetched" / repository
        for file in sorted(set(files(repository)) & set(allow_patterns)):
            (fetched / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(snapshot(repository) / file, fetched / file)
        return str(fetched)

    monkeypatch.setattr(hub, "list_repo_files", files)
    monkeypatch.setattr(hub, "snapshot_download", download)

    asked = ["--model", f"someone/{family}", "--clip", "someone/clip", "-n", "2", "--keep", "1", "--steps", "3"]
    printed = answer(capsys, "generate", "a red star", *asked, *FAMILIES[family], "--out", "out")
    (picture,) = printed["pictures"]
    assert picture["score"] == max(one["score"] for one in printed["candidates"])
    image, record = read_png(Path(picture["path"]))
    assert len(np.unique(np.asarray(image))) > 2 and record["clip"] == "someone/clip"
    fetched = [path for path in (tmp_path / "fetched").rglob("*") if path.is_file()]
    assert fetched and not [path for path in fetched if path.read_bytes() == UNREAD]
    facts = answer(capsys, "info", f"someone/{family}")
    of_folder = answer(capsys, "info", folders[family])
    assert facts["family"] == of_folder["family"] and facts["parts"].keys() == of_folder["parts"].keys()
    if "--prior-model" not in FAMILIES[family]:
        assert facts["hash"] == of_folder["hash"] == record["model_hash"]
    elif family == "unclip-joined":  # of Karlo's repository its prior alone
        karlo = tmp_path / "fetched" / "someone" / "karlo"
        assert {path.parent.name for path in fetched if path.parent.parent == karlo} == {*OF_KARLO.values()}
