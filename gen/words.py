"""What a model is called with: the words of a request, and how its painting is watched.

Owns: the signature of such a call, which is made of a dataclass's fields. So a call has the words of a request
as the fields of `gen.request.Request` have them, and so have type checkers, editors and `help()`. It knows no word
of a request, and checks none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from gen.flight import Callback
from gen.request import Request

Spelled = ParamSpec("Spelled")
Made = TypeVar("Made")
Owner = TypeVar("Owner")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class CallRequest(Request):
    """A request that is painted at once, while the caller waits."""

    batch_size: int | None = None  # rows in flight at most; None: as memory allows. Pictures do not depend on it
    callback: Callback | None = None  # called after every step, to look or to cancel
    progress: bool = False  # a bar on standard error


def called_with(
    make: Callable[Spelled, Made],
) -> Callable[[Callable[[Owner, Made], Answer]], Callable[Concatenate[Owner, Spelled], Answer]]:
    """Let a method that takes what `make` makes be called with its arguments; TypeError for what makes none."""

    def of(method: Callable[[Owner, Made], Answer]) -> Callable[Concatenate[Owner, Spelled], Answer]:
        own, spelled = inspect.signature(method), inspect.signature(make)
        owner, _ = own.parameters.values()

        @wraps(method)
        def call(self: Owner, /, *given: Spelled.args, **words: Spelled.kwargs) -> Answer:
            try:
                spelled.bind(*given, **words)
            except TypeError as error:  # which else would name the constructor, of which a caller knows nothing
                raise TypeError(f"{method.__qualname__}(): {error}") from None
            return method(self, make(*given, **words))

        shown = own.replace(parameters=[owner, *spelled.parameters.values()])
        call.__signature__ = shown  # type: ignore[attr-defined] # what help() shows
        kinds = {name: each.annotation for name, each in shown.parameters.items() if each is not owner}
        call.__annotations__ = kinds | {"return": own.return_annotation}
        return call

    return of
