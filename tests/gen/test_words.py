"""A model's call is spelled as the fields of a request are."""

import inspect
from dataclasses import dataclass, fields

import pytest

from gen import Request, TextToImage
from gen.words import CallRequest, called_with


@dataclass(frozen=True)
class Order:
    dish: str
    number: int = 1


class Kitchen:
    @called_with(Order)
    def cook(self, order: Order) -> tuple[str, int]:
        """Dish and number."""
        return order.dish, order.number


def test_a_model_is_called_with_every_word_of_a_request_and_three_more() -> None:
    owner, prompt, *others = inspect.signature(TextToImage.__call__).parameters.values()
    assert (owner.name, prompt.name, prompt.kind) == ("self", "prompt", prompt.POSITIONAL_OR_KEYWORD)
    assert all(each.kind is each.KEYWORD_ONLY for each in others)
    shown = {each.name: (each.annotation, each.default) for each in (prompt, *others)}
    watched = {
        "batch_size": ("int | None", None),
        "callback": ("Callback | None", None),
        "progress": ("bool", False),
    }
    assert shown == {item.name: (item.type, item.default) for item in fields(Request)} | watched


def test_what_a_model_is_called_with_is_a_request_that_begins_with_its_prompt() -> None:
    words = CallRequest("a star", num_inference_steps=3, progress=True)
    assert isinstance(words, Request) and (words.prompt, words.num_inference_steps) == ("a star", 3)
    with pytest.raises(TypeError, match="positional"):
        CallRequest("a star", "grey")  # type: ignore[misc]


def test_a_method_is_called_with_what_makes_its_parameter() -> None:
    assert Kitchen().cook("soup", number=2) == ("soup", 2) and Kitchen().cook(dish="pie") == ("pie", 1)
    assert str(inspect.signature(Kitchen().cook)) == "(dish: str, number: int = 1) -> tuple[str, int]"
    assert Kitchen.cook.__doc__ == "Dish and number."


@pytest.mark.parametrize("words", [{"dish": "pie", "numbr": 2}, {}])
def test_what_makes_none_is_a_type_error_that_names_the_word(words: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=r"Kitchen.cook\(\): .*" + ("'numbr'" if words else "'dish'")):
        Kitchen().cook(**words)  # type: ignore[arg-type]
