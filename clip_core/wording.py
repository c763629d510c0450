"""What libraries and people say, in one line."""

from __future__ import annotations

MOST = 300  # letters of a line
QUOTED, HEAD = 80, 45  # letters of a text that a line is about, and how many of them are its beginning


def one_line(error: BaseException) -> str:
    """An error's message on one line, cut where it is endless; its class where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST else text[: MOST - 3] + "..."


def quoted(text: str) -> str:
    """A text in quotation marks; of a long one its beginning and its end, where it is cut when it is too long."""
    return repr(text if len(text) <= QUOTED else f"{text[:HEAD]}...{text[HEAD + 3 - QUOTED :]}")
