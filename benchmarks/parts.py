"""What the parts of a model can do alone: its CLIP between two captions, its autoencoder there and back.

    python benchmarks/parts.py [--model shapes64] [--scenes 600]

CLIP chooses between a true caption and one that differs from it in one fact (chance: 50 %); the checker reads true
pictures after a round trip through the autoencoder. The result is kept in benchmarks/results/parts.json.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from gen import TextToImage
from report import RESULTS, markdown, save
from training.data.checker import faults, read
from training.data.shapes import Claim, contrast, render, scene
from training.provenance import provenance

FIRST = 900_000_000  # a seed far from those of training pictures


def changed(claim: Claim, other: Claim) -> str:
    """The fact in which two claims differ."""
    for fact in ("count", "background", "relation"):
        if getattr(claim, fact) != getattr(other, fact):
            return fact
    if claim.second is not None and other.second != claim.second:
        return "objects exchanged" if other.first == claim.second else "attribute exchanged"
    return next(
        fact for fact in ("colour", "shape", "size") if getattr(claim.first, fact) != getattr(other.first, fact)
    )


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="Bundled name, diffusers folder or hub id.")] = "shapes64",
    scenes: Annotated[int, typer.Option(min=1, help="Pictures.")] = 600,
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "parts.json",
) -> None:
    """Measure the parts."""
    family = TextToImage.from_pretrained(model, device="cpu").model
    assert family.clip is not None
    seeds = range(FIRST, FIRST + 4 * scenes, 4)
    true = [scene(seed) for seed in seeds]
    wrong = [contrast(one, seed + 1) for one, seed in zip(true, seeds, strict=True)]
    pixels = torch.from_numpy(np.stack([render(one) for one in true])).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    image = family.clip.image(pixels)
    scores = [family.clip.score(image, [one.claim.text() for one in captions]) for captions in (true, wrong)]
    won: dict[str, list[bool]] = {}
    for one, other, hit in zip(true, wrong, (scores[0] > scores[1]).tolist(), strict=True):
        won.setdefault(changed(one.claim, other.claim), []).append(hit)
    right = []
    for first in range(0, scenes, 64):
        latents = (
            family.vae.encode(pixels[first : first + 64] * 2 - 1).latent_dist.mean * family.vae.config.scaling_factor
        )
        again = (family.decode(latents) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        right += [not faults(read(each), one.claim) for each, one in zip(again, true[first:], strict=False)]
    found = {
        "forced_choice": {fact: {"rate": float(np.mean(hits)), "of": len(hits)} for fact, hits in sorted(won.items())},
        "round_trip_read_right": {"rate": float(np.mean(right)), "of": len(right)},
        "model": model,
        **provenance(),
    }
    save(found, result)
    cells = [("CLIP, forced choice", fact, cell) for fact, cell in found["forced_choice"].items()]
    cells.append(("autoencoder, round trip", "everything", found["round_trip_read_right"]))
    rows = ([part, fact, f"{100 * cell['rate']:.0f} %", str(cell["of"])] for part, fact, cell in cells)
    print(markdown(["part", "fact", "right", "of"], rows))


if __name__ == "__main__":
    typer.run(main)
