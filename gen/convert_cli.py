"""The verb that carries a CLIP from one library to the other: convert.

Owns its arguments and what is printed; the work is `clip_core.convert`'s.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from gen.wording import speaking

EXACT = 1e-3  # the largest difference that float32 explains: towers of 24 and more layers sum in another order


def convert(
    source: Annotated[str, typer.Argument(metavar="CLIP", help="CLIP folder, hub id or open_clip:NAME/TAG.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; new, or empty.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Write an open_clip CLIP as a transformers folder, or a transformers one as open_clip's.

    The folder is read again and both are asked about the same texts and pictures; exit status 1 when their answers
    differ by more than float32 explains.
    """
    with speaking("convert"):
        from clip_core.convert import convert as converted
        from gen.weights import quiet

        with quiet():
            library, difference = converted(source, out)
    exact = difference <= EXACT
    if as_json:
        # JSON has no infinity, which stands for other token ids
        finite = difference if difference < float("inf") else None
        print(json.dumps({"folder": str(out), "library": library, "largest_difference": finite, "exact": exact}))
    else:
        verdict = "the same" if exact else "something else"
        print(f"{out}: a CLIP of {library}, which says {verdict}; largest difference {difference:.2g}")
    if not exact:
        raise typer.Exit(1)
