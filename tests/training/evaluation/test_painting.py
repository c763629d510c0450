"""Which seeds candidates have, and what is kept of them to look at."""

from pathlib import Path

from PIL import Image

from clip_core.clip import CLIP
from gen.sheet import GAP, TILE
from tests.training.evaluation.draughtsman import Draughtsman, measured
from training.data.suite import load


def test_no_two_candidates_of_the_suite_share_a_seed() -> None:
    seeds = [prompt.seed + k for prompt in load() for k in range(16)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**31


def test_each_prompt_keeps_its_candidates_as_a_strip(clip: CLIP, tmp_path: Path) -> None:
    measured(Draughtsman(), clip, tmp_path, number=1)
    strips = sorted(path.relative_to(tmp_path / "strips").as_posix() for path in tmp_path.rglob("*.png"))
    names = ("count-000", "held_out-000", "one-000", "relation-000")
    assert strips == [f"{mode}/{name}.png" for mode in ("no_prior", "prior") for name in names]
    with Image.open(tmp_path / "strips" / strips[0]) as strip:
        assert strip.width == GAP + 4 * (TILE + GAP) and TILE < strip.height < 2 * TILE
