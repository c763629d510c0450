"""What libraries and people say, in one line."""

from __future__ import annotations

MOST = 300  # letters of a line
QUOTED = 80  # letters of a text that a line is about


def one_line(error: BaseException) -> str:
    """An error's message on one line, cut where it is endless; its class where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST else text[: MOST - 3] + "..."


def quoted(text: str) -> str:
    """A text in quotation marks, its beginning alone where it is long."""
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 3] + "...")
