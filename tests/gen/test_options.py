"""A request's words on the command line: each is an option or says why not, of the type that Python takes."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest
import typer

from gen.batch_cli import batch
from gen.cli import generate
from gen.model_cli import ADDED, READ
from gen.options import DEFAULTS, OPTIONS, flags, typed, with_options
from gen.request import Request

TENSOR = "a command line holds no tensors"
PYTHON_ONLY = {
    "latents": TENSOR,
    "prior_latents": TENSOR,
    "super_res_latents": TENSOR,
    "prompt_embeds": TENSOR,
    "negative_prompt_embeds": TENSOR,
    "pooled_prompt_embeds": TENSOR,
    "negative_pooled_prompt_embeds": TENSOR,
    "image_embeds": TENSOR,
    "ip_adapter_image_embeds": TENSOR,
    "negative_image_embeds": TENSOR,
    "denoising_start": "goes on from latents",
    "denoising_end": "ends with latents",
    "output_type": "generate writes PNG",
}
TAKEN = get_type_hints(Request)


def members(kind: Any) -> set[Any]:
    """The types of a union, of which None is what was not given; any other type by itself."""
    found = set(get_args(kind)) if type(None) in get_args(kind) else {kind}
    return found - {type(None)}


def typer_of(verb: Any) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(verb)
    return typer.main.get_command(app)


def test_every_word_of_a_request_is_an_option_or_says_why_not() -> None:
    words = {item.name for item in fields(Request)} - {"prompt"}  # which is the argument
    assert words == (OPTIONS.keys() & words) | PYTHON_ONLY.keys()
    assert not OPTIONS.keys() & PYTHON_ONLY.keys()


@pytest.mark.parametrize("verb", [generate, batch])
def test_what_a_verb_hands_on_are_words_of_a_request(verb: Callable[..., None]) -> None:
    named = verb.__annotations__.keys()  # of its source, not of what typer is shown
    assert "out" in named and OPTIONS.keys() - named - {*READ, *ADDED} <= TAKEN.keys()
    assert {*READ, *ADDED} <= OPTIONS.keys() - named


@pytest.mark.parametrize("word", sorted(OPTIONS.keys() & TAKEN.keys()))
def test_an_option_is_of_a_type_that_the_request_takes(word: str) -> None:
    assert members(get_args(OPTIONS[word])[0]) <= members(TAKEN[word])


def test_what_is_typed_is_what_typer_reads() -> None:
    read = {each.name: each for each in typer_of(generate).params}
    for word in OPTIONS:
        option = read[word]
        assert option.opts[0] == typed(word)
        yes_and_no = zip((True, False), [option.opts[0], *option.secondary_opts], strict=False)
        assert flags(word) == (dict(yes_and_no) if option.is_flag else {})


def test_a_verb_is_handed_every_word() -> None:
    handed: dict[str, Any] = {}

    @with_options("budget")
    def verb(
        text: Annotated[str, typer.Argument()],
        *,
        seed: int,
        own: Annotated[str, typer.Option()] = "x",
        **words: Any,
    ) -> None:
        handed.update(words, text=text, seed=seed, own=own)

    given = ["a star", "--steps", "3", "--negative", "grey", "--guidance-interval", "0.5", "2", "--no-prior"]
    typer_of(verb).main([*given, "--mask", "m.png", "--own", "y"], standalone_mode=False)
    wanted = {"num_inference_steps": 3, "negative_prompt": "grey", "guidance_interval": (0.5, 2.0), "prior": False}
    wanted |= {"mask_image": Path("m.png"), "seed": 0, "text": "a star", "own": "y"}
    assert handed == dict.fromkeys(OPTIONS.keys() - {"budget"}) | DEFAULTS | wanted
    with pytest.raises(typer.TyperException, match="--budget"):
        typer_of(verb).main([*given, "--budget", "5"], standalone_mode=False)


def test_a_word_of_another_type_than_its_option_is_our_own_mistake() -> None:
    def verb(*, seed: str = "", **words: Any) -> None: ...

    with pytest.raises(AssertionError, match="seed is of two types"):
        with_options()(verb)
