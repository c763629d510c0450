"""The verbs that paint and look: generate, score, info, reproduce.

Owns: options and what is printed. A verb is a plain function that typer reads; heavy libraries are
imported when it runs, so that `unclip VERB --help` answers at once. What Python callers need too is decided
elsewhere. Standard output has the answer (with --json one object and nothing else), standard error the rest.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import dropwhile
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from gen.counts import how_many
from gen.interrupt import deferred_interrupt
from gen.model_cli import typed_model
from gen.options import DEFAULTS, Config, with_options
from gen.output_folder import output_folder
from gen.picture import Writer, largest_difference, read_picture, read_png
from gen.prompts import plain
from gen.sheet import contact_sheet
from gen.wording import check_text, say, speaking

if TYPE_CHECKING:
    from gen.answer import Result
    from gen.pipeline import TextToImage
    from gen.request import Request

DEFAULT_OUT = Path("out")
SHEET = "sheet.png"
TOLERANCE = 1  # 8-bit levels by which a picture may differ when painted again

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@with_options()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to paint, in words.")],
    *,  # words that more is done with than to hand them on; gen.options has what is typed for them
    num_images_per_prompt: int | None,
    keep: int | None,
    budget: float | None,
    diverse: bool,
    rerank: bool,
    ip_adapter_image: Path | None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where to write; when it holds something, a new DIR/002, DIR/003, ..."),
    ] = DEFAULT_OUT,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths of the kept pictures.")] = False,
    **words: Any,  # the rest of a request's, handed on
) -> None:
    """Paint N candidates of PROMPT, let CLIP rank them and keep the best K.

    Writes the kept pictures, best first, and sheet.png: with every candidate, or with the kept ones alone where
    --budget, --diverse or a --search other than best_of was given. Ctrl-C writes what is painted by then. Other
    defaults are the model's.
    """
    started = time.perf_counter()
    with speaking("generate"), output_folder(out) as folder:
        check_text(prompt, *(word for word in words.values() if isinstance(word, str)))
        if (words["ip_adapter"] is None) != (ip_adapter_image is None):
            raise ValueError("--ip-adapter and --ip-image go together; give both or none")
        painter = typed_model("generate", words, quiet=quiet)
        from gen.request import Request
        from gen.resolve import resolve

        loaded = time.perf_counter()
        abilities = painter.model.abilities
        is_ranked = rerank and abilities.can_rank
        num_images_per_prompt, keep = how_many(num_images_per_prompt, keep, budget, is_ranked=is_ranked)
        request = Request(
            prompt=prompt,
            num_images_per_prompt=num_images_per_prompt,
            keep=keep,
            budget=budget,
            diverse=diverse,
            rerank=None if rerank else False,
            ip_adapter_image=ip_adapter_image,
            **words,
        )
        resolve(request, abilities)  # every mistake, before the note on words
        foreign = painter.card.unknown_words(plain(prompt) if request.prompt_weights else prompt)
        note = _foreign_words(painter.name, painter.card.knows, foreign) if foreign else None
        if note:
            say("generate", note)
        # Of a plain best-of-N all come back, best first, for the sheet shows them all; the first `keep` become files.
        shows_all = request.search in (None, "best_of") and budget is None and not diverse
        asked = replace(request, keep=None) if shows_all else request
        result, interrupted = _painted(painter, asked, not quiet and sys.stderr.isatty())
        painted = time.perf_counter()
        with deferred_interrupt() as came:
            pictures = _written(result, keep, folder, prompt)
            interrupted = interrupted or came()
    answer = {
        "prompt": prompt,
        "unknown_words": foreign,
        "note": note,
        **_report(painter, result, folder, pictures),
        "interrupted": interrupted,  # by Ctrl-C, with these painted
        "seconds": {
            "load": round(loaded - started, 3),
            "paint": round(painted - loaded, 3),
            "total": round(time.perf_counter() - started, 3),
        },
        "peak_memory_bytes": _peak_memory(),
    }
    if as_json:
        print(json.dumps(answer))
    else:
        print(*([one["path"] for one in pictures] if quiet else _summary(answer)), sep="\n")
    if interrupted:
        wanted = "" if num_images_per_prompt is None else f" of {num_images_per_prompt}"
        num_painted = sum(each.painted for each in result.candidates)
        say("generate", f"interrupted with {num_painted}{wanted} candidates painted")
        raise typer.Abort  # so that no more is said of it


def score(
    given: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE... TEXT", help="Picture files, and behind them what they may show."),
    ],
    more: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", metavar="IMAGE", help="A further picture; repeatable."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME", help="Model whose CLIP judges, or CLIP or SigLIP by folder or hub id."
        ),
    ] = DEFAULTS["model"],
    as_json: AsJson = False,
) -> None:
    """Say how well each IMAGE fits each TEXT: the cosine of their CLIP embeddings, from -1 to 1.

    All files that come first are pictures, the rest are texts. A SigLIP says beside it how likely they belong together,
    in percent.
    """
    with speaking("score"):
        paths, texts = _pictures_and_texts(given, more or [])
        pictures = [read_picture(path) for path in paths]
        rows = _scores(model, pictures, texts)
    scores = [
        {"image": str(path), "text": text, **cell}
        for path, row in zip(paths, rows, strict=True)
        for text, cell in zip(texts, row, strict=True)
    ]
    if as_json:
        print(json.dumps({"model": model, "scores": scores}))
    else:
        for one in scores:
            likely = f"  {one['probability']:6.1%}" if "probability" in one else ""
            print(f"{one['score']:7.4f}{likely}  {one['image']}  {one['text']}")


def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Bundled name, diffusers folder, .safetensors, hub id.")
    ],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a model is made of, what it knows, how it was trained and what it reaches; no weight is read."""
    with speaking("info"):
        from gen.facts import facts_of, lines_of

        facts = facts_of(model, config)
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{facts['name']}: {facts['family']} in {facts['folder']}, hash {facts['hash'][:12]}")
    for name, part in facts["parts"].items():
        print(f"  {name:<24} {part['class']:<28} {part['parameters']:>13,} parameters {_size(part['bytes']):>9}")
    print(f"  {'together':<53} {facts['parameters']:>13,} parameters {_size(facts['bytes']):>9}")
    card = {name: value for name, value in facts["card"].items() if value not in ("", {}, [])}
    for line in lines_of({**facts["told"], **card}):
        print(line)


def reproduce(
    picture: Annotated[Path, typer.Argument(metavar="FILE.png", help="A PNG that unclip wrote.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Where the model is now (default: as recorded)."),
    ] = None,
    weak_unet: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the weaker UNet is now, if it was guided by one.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Where a picture or mask is now that it was painted from; repeatable."),
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who computes: torch, compile, openvino (default: as recorded).")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where the CLIP is now that painted it, if not the model's own.")
    ] = None,
    config: Config = None,
    prior_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where the prior is now, if it is apart from the model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Paint FILE.png again from its own record; exit status 1 when a pixel is more than one level off."""
    with speaking("reproduce"):
        before, record = read_png(picture)
    with _naming(picture), speaking("reproduce"):
        from gen.answer import as_pillow
        from gen.pipeline import TextToImage

        painter = TextToImage.of_record(
            record,
            model=model,
            weak_unet=weak_unet,
            clip=clip,
            config=config,
            prior_model=prior_model,
            runtime=runtime,
        )
        made = record.get("attention", painter.compute.attention)
        if made != painter.compute.attention:
            say("reproduce", f"attention '{made}' does not run here; pixels may differ by torch's own")
        (again,) = as_pillow(painter.repaint(record, image or ())[None])
        difference = largest_difference(before, again)
    answer = {
        "picture": str(picture),
        "largest_difference": difference,
        "reproduced": difference <= TOLERANCE,
    }
    answer |= {"record": record}
    if as_json:
        print(json.dumps(answer))
    else:
        verdict = "painted again" if difference <= TOLERANCE else "painted differently"
        levels = "level" if difference == 1 else "levels"
        print(f"{picture}: {verdict}; largest pixel difference {difference} of 255 {levels}")
    if difference > TOLERANCE:
        raise typer.Exit(1)


@contextmanager
def _naming(picture: Path) -> Iterator[None]:
    """What cannot be painted again is told with the file it is of."""
    try:
        yield
    except ValueError as error:
        error.args = (f"{picture}: {error}",)
        raise


def _painted(painter: "TextToImage", request: "Request", shows_progress: bool) -> tuple["Result", bool]:
    """The answer, or on Ctrl-C what is painted by then, and whether it was that."""
    from gen.answer import Interrupted

    try:
        return painter.paint([request], progress=shows_progress)[0], False
    except Interrupted as stopped:
        (result,) = stopped.results()
        if result is None:
            raise
        return result, True


def _written(result: "Result", keep: int | None, folder: Path, title: str) -> list[dict[str, Any]]:
    """Write the best `keep` pictures (None: all) and the sheet of all; what is told of those pictures, best first."""
    images = result.images
    assert isinstance(images, list)  # Pillow's, as was asked for
    scores: list[float | None] = [*result.scores] if result.scores else [None] * len(images)
    pictures = []
    with Writer() as writer:
        for index, (picture, record) in enumerate(zip(images[:keep], result.records, strict=False)):
            path = folder / f"{index + 1:04d}-seed{result.seeds[index]}.png"
            writer.write(picture, path, record)
            pictures.append({"path": str(path), "score": scores[index], "seed": result.seeds[index]})
        captions = [_caption(score, one) for score, one in zip(scores, result.seeds, strict=True)]
        num_kept = len(pictures) if len(pictures) < len(images) else 0
        writer.write(contact_sheet(images, captions, num_kept=num_kept, title=title), folder / SHEET)
    return pictures


def _foreign_words(model: str, knows: str, foreign: list[str]) -> str:
    """What is said when a prompt asks for something that the model cannot know."""
    unseen = ", ".join(dict.fromkeys(foreign))
    note = f"model '{model}' has never seen: {unseen}. It paints all the same, from what it knows"
    note += f": {knows.strip().rstrip('.')}." if knows else "."
    return f"{note} For other pictures choose another model with --model (a diffusers folder or a hub id)."


def _report(painter: "TextToImage", result: "Result", folder: Path, pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """What `generate` tells of the model and of its pictures; `pictures` are those written."""
    first, kept = result.records[0], {one["seed"] for one in pictures}
    return {
        "model": {"name": first["model"], "hash": first["model_hash"], "knows": painter.card.knows},
        "settings": first["settings"],
        "out": str(folder),
        "sheet": str(folder / SHEET),
        "pictures": pictures,  # the kept ones, best first
        "candidates": [{**each, "kept": each["seed"] in kept} for each in result.ranking()],
        "shown": len(result.images),  # on the sheet
        "account": vars(result.account),
    }


def _caption(score: float | None, seed: int) -> str:
    """What stands under a picture on the sheet."""
    return f"seed {seed}" if score is None else f"{score:.3f}  seed {seed}"


def _summary(answer: dict[str, Any]) -> list[str]:
    """What `generate` prints for people."""
    lines = []
    for one in answer["pictures"]:
        shown_score = "" if one["score"] is None else f"score {one['score']:.4f}  "
        lines.append(f"{one['path']}  {shown_score}seed {one['seed']}")
    number = len(answer["candidates"])
    shown = f"all {number} candidates" if answer["shown"] == number else f"the {answer['shown']} kept"
    lines.append(f"{answer['sheet']}  contact sheet of {shown}")
    seconds = answer["seconds"]
    lines.append(
        f"{number} painted, {len(answer['pictures'])} kept, in {seconds['total']:.1f} s "
        f"({seconds['load']:.1f} s to load), peak memory {_size(answer['peak_memory_bytes']['host'])}"
    )
    return lines


def _pictures_and_texts(given: list[str], more: list[Path]) -> tuple[list[Path], list[str]]:
    """The files at the head of what was given, with more, and the texts behind them; ValueError where one is missing.

    What stands among the texts and is a file, or has a picture's ending, was hardly meant as words, so it is refused.
    """
    texts = list(dropwhile(isfile, given))  # not Path.is_file, which raises where a text is too long for a name
    paths = [*map(Path, given[: len(given) - len(texts)]), *more]
    check_text(*texts)
    if any(not text.strip() for text in texts):
        raise ValueError("a text is empty; say in words what the picture may show")
    for text in texts:
        if isfile(text):
            raise ValueError(f"picture '{text}' stands behind a text; give all pictures first, then TEXT...")
        if Path(text).suffix.lower() in Image.registered_extensions():
            raise ValueError(f"picture '{text}' does not exist; give image files, then TEXT...")
    if not paths:
        raise ValueError(f"no picture is given, for '{texts[0]}' is no file; give IMAGE... before TEXT...")
    if not texts:
        raise ValueError("no text is given; say in words what the pictures may show: IMAGE... TEXT...")
    return paths, texts


def _scores(model: str, pictures: list[Image.Image], texts: list[str]) -> list[list[dict[str, float]]]:
    """Per picture its CLIP `score` with every text, and of a SigLIP the `probability` that they belong together."""
    import torch

    from clip_core.clip import CLIP
    from clip_core.score import cosine
    from gen.model_folder import ASSETS, find
    from gen.model_index import INDEX

    if (ASSETS / model / INDEX).exists() or (Path(model) / INDEX).exists():
        source = find(model) / "clip"
        if not source.is_dir():
            raise ValueError(f"model '{model}' has no clip/ to score with; give a CLIP folder with --model")
        model = str(source)
    clip = CLIP.from_pretrained(model, "cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        text_embeds = clip.text(texts).embedding  # (T, E)
        scores = torch.stack(
            [cosine(one.expand(len(texts), -1), text_embeds) for one in clip.image(pictures)]
        )  # (B, T)
        likely = clip.probability(scores)
    if likely is None:
        return [[{"score": value} for value in row] for row in scores.tolist()]
    pairs = torch.stack([scores, likely], dim=-1).tolist()
    return [[{"score": value, "probability": chance} for value, chance in row] for row in pairs]


def _size(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _peak_memory() -> dict[str, int]:
    """Most bytes this process ever held: `host`, and `device` where there is a GPU."""
    import torch

    from gen.memory import peak_memory

    return {"host": peak_memory("cpu")} | ({"device": peak_memory("cuda")} if torch.cuda.is_available() else {})
