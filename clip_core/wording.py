"""What libraries say, in one line."""

from __future__ import annotations

MOST = 300  # letters of a line


def one_line(error: BaseException) -> str:
    """An error's message on one line, cut where it is endless; its class where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST else text[: MOST - 3] + "..."
