"""Errors in the command line's words: options where Python has names, and all else as it was said."""

import re
from pathlib import Path

import pytest

from gen.wording import in_options

GEN = Path(__file__).resolve().parents[2] / "gen"
MESSAGES = {
    "keep=5 is more than num_images_per_prompt=4": "--keep 5 is more than -n 4",
    "strength was given without image; give the picture as well, or leave strength out": (
        "--strength was given without --image; give the picture as well, or leave --strength out"
    ),
    "mask_image was given without image; leave mask_image out": "--mask was given without --image; leave --mask out",
    "image was given, but this model cannot begin with a picture": (
        "--image was given, but this model cannot begin with a picture"
    ),
    "interpolation was given without interpolate_prompt or interpolate_image; give one of them": (
        "--interpolation was given without --interpolate-prompt or --interpolate-image; give one of them"
    ),
    "keep=2 of 4 needs a ranking; leave keep out, or let it rank": (
        "--keep 2 of 4 needs a ranking; leave --keep out, or let it rank"
    ),
    "rerank=True, but this model has no clip/; or leave rerank out": (
        "--rerank, but this model has no clip/; or leave --rerank out"
    ),
    "this model refines a picture; give image": "this model refines a picture; give --image",
    "this model paints a part of a picture anew; give image and mask_image": (
        "this model paints a part of a picture anew; give --image and --mask"
    ),
    "image is 9 x 9, and only one of height and width was given; give both": (
        "--image is 9 x 9, and only one of --height and --width was given; give both"
    ),
    "image holds pictures of 9 x 9 pixels; give height and width to have them resized": (
        "--image holds pictures of 9 x 9 pixels; give --height and --width to have them resized"
    ),
    "diverse=True chooses among candidates, but all are kept; give a smaller keep": (
        "--diverse chooses among candidates, but all are kept; give a smaller --keep"
    ),
    "give image_embeds or variation_of": "give image_embeds or --variation-of",
    "prompt_weights=True, but this model reads a prompt only as it stands; leave prompt_weights out": (
        "--prompt-weights, but this model reads a prompt only as it stands; leave --prompt-weights out"
    ),
    # what a user gave, and what are words, stays as it is
    "take a smaller dtype or a smaller model": "take a smaller dtype or a smaller model",
    "picture /tmp/mask_image.png does not exist": "picture /tmp/mask_image.png does not exist",
    "model part 'my guidance_scale=3/weak_unet' is missing": "model part 'my guidance_scale=3/weak_unet' is missing",
    'prompt "it\'s guidance_scale" is long': 'prompt "it\'s guidance_scale" is long',
    "search 'x' goes by CLIP's scores and the model's clip/; leave prior=False out": (
        "search 'x' goes by CLIP's scores and the model's clip/; leave --no-prior out"
    ),
    "the prior reads text, and the image is seen": "the prior reads text, and the image is seen",
}


@pytest.mark.parametrize(("python", "typed"), MESSAGES.items())
def test_names_become_options_and_nothing_else_does(python: str, typed: str) -> None:
    assert in_options(python) == typed


def test_no_error_of_a_request_speaks_of_a_bare_name() -> None:
    """The sentences as they stand in the source, for whoever writes another."""
    modules = ("candidate.py", "request_checks.py", "resolve.py", "settings.py", "settings_checks.py", "source.py")
    source = "".join((GEN / name).read_text(encoding="utf-8") for name in modules)
    sentences = [
        sentence for sentence in re.findall(r'"([^"\n]*)"', source) if " " in sentence and "damaged" not in sentence
    ]
    assert len(sentences) > 100
    for sentence in map(in_options, sentences):
        assert not re.search(r"(?<!-)\b(strength|keep|rerank|interpolation) (was given|out\b)", sentence), sentence
        assert not re.search(r"without (image|strength|keep)\b", sentence), sentence
