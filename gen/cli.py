"""The verbs that paint and look: generate, score, info, reproduce.

Owns: options and what is printed. A verb is a plain function that typer reads; heavy libraries are
imported when it runs, so that `unclip VERB --help` answers at once. What Python callers need too is decided
elsewhere. Standard output has the answer (with --json one object and nothing else), standard error the rest.
"""

import json
import re
import sys
import time
from dataclasses import replace
from itertools import dropwhile
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from gen.output_folder import output_folder
from gen.picture import Writer, largest_difference, read_picture, read_png
from gen.prompts import plain
from gen.sheet import contact_sheet
from gen.wording import check_text, say, speaking

if TYPE_CHECKING:
    import torch

    from gen.pipeline import Result, TextToImage

DEFAULT_MODEL = "shapes64"
DEFAULT_OUT = Path("out")
TOLERANCE = 1  # 8-bit levels by which a picture may differ when painted again

Model = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="Bundled name, diffusers folder, .safetensors or hub id.")
]
Config = Annotated[
    str | None, typer.Option(metavar="DIR", help="Configurations of a single file, if not its family's: a folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _advanced(metavar: str, help: str) -> Any:
    """An option that few need; --help has them in a panel of their own."""
    return typer.Option(metavar=metavar, help=help, rich_help_panel="Advanced")


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to paint, in words.")],
    number: Annotated[
        int | None,
        typer.Option("-n", "--num-images", metavar="N", help="Candidates (default: 16; with --budget as many as fit)."),
    ] = None,
    keep: Annotated[
        int | None, typer.Option(metavar="K", help="Best candidates to keep (default: 4, or all of fewer).")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Decoder steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="W", help="Weight of the prompt against the null; 1 is off.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Candidate k is painted from seed S + k.")] = 0,
    sampler: Annotated[
        str | None, typer.Option(metavar="NAME", help="euler, ddim, dpmpp_2m, ...; a wrong name lists all.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    search: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which go on: best_of, halving, draft, racing, feynman_kac, zero_order."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Paint as many candidates as fit, one at least.")
    ] = None,
    diverse: Annotated[bool, typer.Option("--diverse/--no-diverse", help="Keep no near-copies.")] = False,
    prior: Annotated[
        bool | None,
        typer.Option("--prior/--no-prior", help="Through an image embedding (unCLIP), or from the text alone."),
    ] = None,
    prior_steps: Annotated[int | None, typer.Option(metavar="N", help="Prior steps.")] = None,
    prior_guidance: Annotated[float | None, typer.Option(metavar="W", help="Prior guidance; 1 is off.")] = None,
    super_res_steps: Annotated[int | None, typer.Option(metavar="N", help="Super-resolution steps.")] = None,
    negative: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to steer away from, in place of the empty text.")
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Begin with this picture (img2img).")] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Paint --image anew where this is white, as large as it.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="S", help="How far from --image, above 0 and up to 1 (1: all steps).")
    ] = None,
    variation_of: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Paint what CLIP sees in this picture, in place of a prior.")
    ] = None,
    interpolate_image: Annotated[Path | None, _advanced("FILE", "Go from --variation-of towards this picture.")] = None,
    interpolate_prompt: Annotated[str | None, _advanced("TEXT", "Go from PROMPT towards this one.")] = None,
    prompt_weights: Annotated[
        bool | None, typer.Option("--prompt-weights", help="(word:1.3), (word) count more, [word] less; \\( is itself.")
    ] = None,
    long_prompts: Annotated[
        bool | None, typer.Option("--long-prompts", help="Read texts too long for the model in pieces.")
    ] = None,
    interpolation: Annotated[float | None, _advanced("T", "How far to go there, 0 to 1 (default: half way).")] = None,
    edit_from: Annotated[
        str | None, _advanced("TEXT", "What --variation-of shows, where PROMPT says what it should.")
    ] = None,
    edit_amount: Annotated[float | None, _advanced("T", "How far to turn it there (default: 0.3).")] = None,
    prior_best_of: Annotated[int | None, _advanced("K", "Best of K answers of the prior, by CLIP.")] = None,
    prompt_2: Annotated[str | None, _advanced("TEXT", "What XL's second text tower reads, if not PROMPT.")] = None,
    negative_2: Annotated[str | None, _advanced("TEXT", "The same of --negative.")] = None,
    original_size: Annotated[
        tuple[int, int] | None, _advanced("PX PX", "Height and width that XL is told a picture had.")
    ] = None,
    target_size: Annotated[tuple[int, int] | None, _advanced("PX PX", "And those that it should have.")] = None,
    crops_coords_top_left: Annotated[
        tuple[int, int] | None, _advanced("PX PX", "How much XL is told was cut off above and on the left.")
    ] = None,
    negative_original_size: Annotated[
        tuple[int, int] | None, _advanced("PX PX", "--original-size of what to steer away from.")
    ] = None,
    negative_target_size: Annotated[tuple[int, int] | None, _advanced("PX PX", "--target-size of it.")] = None,
    negative_crops_coords_top_left: Annotated[
        tuple[int, int] | None, _advanced("PX PX", "--crops-coords-top-left of it.")
    ] = None,
    aesthetic_score: Annotated[
        float | None, _advanced("SCORE", "What XL's refiner is told that the picture is worth (default: 6).")
    ] = None,
    negative_aesthetic_score: Annotated[
        float | None, _advanced("SCORE", "The same of what to steer away from (default: 2.5).")
    ] = None,
    width: Annotated[int | None, typer.Option(metavar="PX", help="Pixels across.")] = None,
    height: Annotated[int | None, typer.Option(metavar="PX", help="Pixels down.")] = None,
    eta: Annotated[float | None, _advanced("E", "Fresh noise per step: 0 none, 1 ancestral.")] = None,
    s_churn: Annotated[float | None, _advanced("S", "Noise added and taken away again, over all steps.")] = None,
    s_tmin: Annotated[float | None, _advanced("SIGMA", "Lowest level churned.")] = None,
    s_tmax: Annotated[float | None, _advanced("SIGMA", "Highest level churned.")] = None,
    s_noise: Annotated[float | None, _advanced("D", "Deviation of what churn adds.")] = None,
    guidance_rule: Annotated[str | None, _advanced("RULE", "How to guide: cfg, cfg_zero, apg, autoguidance.")] = None,
    weak_unet: Annotated[Path | None, _advanced("DIR", "autoguidance: folder of a weaker UNet.")] = None,
    draft_unet: Annotated[Path | None, _advanced("DIR", "--search draft: folder of a UNet or LoRA for them.")] = None,
    guidance_rescale: Annotated[float | None, _advanced("R", "Keep the prompt's own contrast; 0 is off.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, _advanced("LOW HIGH", "Guide where LOW < noise level <= HIGH.")
    ] = None,
    zero_init_steps: Annotated[int | None, _advanced("N", "cfg_zero: first steps of output 0.")] = None,
    apg_eta: Annotated[float | None, _advanced("E", "apg: share kept of guidance along the estimate.")] = None,
    apg_norm_threshold: Annotated[float | None, _advanced("R", "apg: largest norm of guidance; 0 is any.")] = None,
    apg_momentum: Annotated[float | None, _advanced("B", "apg: what earlier steps' guidance counts.")] = None,
    clip_guidance_scale: Annotated[
        float | None, _advanced("W", "By the gradient of CLIP's score, some 5 to 10; slow. 0 is off.")
    ] = None,
    thresholding: Annotated[
        float | None, _advanced("BOUND", "Dynamic thresholding: what clean values keep within; 0 is off.")
    ] = None,
    dynamic_thresholding_ratio: Annotated[float | None, _advanced("P", "Share of values not clipped.")] = None,
    attention: Annotated[
        str, _advanced("NAME", "Attention's kernel: auto, sdpa, flash, cudnn, efficient, math, xformers, avx512.")
    ] = "auto",
    dtype: Annotated[
        str, _advanced("NAME", "What networks compute in: float32, bfloat16, float16; the lower two change pixels.")
    ] = "float32",
    runtime: Annotated[
        str,
        _advanced("NAME", "Who computes them: torch, compile, or openvino on CPUs (pip install 'unclip[openvino]')."),
    ] = "torch",
    prior_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The prior, where it is apart (Kandinsky, Stable unCLIP): folder or hub id."),
    ] = None,
    rerank: Annotated[bool, typer.Option("--rerank/--no-rerank", help="Let CLIP choose among them.")] = True,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="CLIP or SigLIP that ranks, if not its own: folder, hub id, open_clip:NAME/TAG."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="LoRA to merge into the model; repeatable.")
    ] = None,
    config: Config = None,
    embedding: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:TOKEN]", help="Textual inversion: a learned word; repeatable.")
    ] = None,
    ip_adapter: Annotated[
        str | None, typer.Option(metavar="FILE[:SCALE]", help="IP-Adapter that shows --ip-image beside PROMPT.")
    ] = None,
    ip_image: Annotated[Path | None, typer.Option(metavar="IMAGE", help="The picture an IP-Adapter shows.")] = None,
    ip_encoder: Annotated[
        Path | None, _advanced("DIR", "IP-Adapter's image encoder (default: image_encoder/ beside it).")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where to write; when it holds something, a new DIR/002, DIR/003, ..."),
    ] = DEFAULT_OUT,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths of the kept pictures.")] = False,
) -> None:
    """Paint N candidates of PROMPT, let CLIP rank them and keep the best K.

    Writes the kept pictures, best first, and sheet.png: with every candidate, or with the kept ones alone where
    --budget, --diverse or a --search other than best_of was given. Other defaults are the model's.
    """
    started = time.perf_counter()
    with speaking("generate"), output_folder(out) as folder:
        check_text(prompt, *(text or "" for text in (negative, prompt_2, negative_2, interpolate_prompt, edit_from)))
        scaled = [_scaled("--lora", given) for given in lora or []]
        shown = None if ip_adapter is None else _scaled("--ip-adapter", ip_adapter)
        if (ip_adapter is None) != (ip_image is None):
            raise ValueError("--ip-adapter and --ip-image go together; give both or none")
        painter = _load(model, attention, weak_unet, clip, dtype, runtime, config, prior_model, draft_unet)
        if runtime != "torch" and not quiet:
            say("generate", f"{runtime} reads and compiles each network when it is first asked, which takes a while")
        for file, scale in scaled:
            painter.load_lora(file, scale)
        for file, token in map(_called, embedding or []):
            painter.load_textual_inversion(file, token)
        if shown is not None:
            painter.load_ip_adapter(*shown, ip_encoder)
        loaded = time.perf_counter()
        from gen.request import Request

        can_rank = painter.model.abilities.can_rank
        if number is None and budget is None:
            number = 16
        if keep is None and number is not None:
            keep = min(4, number) if rerank and can_rank else number
        elif keep is None and rerank and can_rank:
            keep = 4
        request = Request(
            prompt=prompt,
            negative_prompt=negative,
            prompt_2=prompt_2,
            negative_prompt_2=negative_2,
            original_size=original_size,
            target_size=target_size,
            crops_coords_top_left=crops_coords_top_left,
            negative_original_size=negative_original_size,
            negative_target_size=negative_target_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
            num_images_per_prompt=number,
            keep=keep,
            rerank=None if rerank else False,
            search=search,
            budget=budget,
            diverse=diverse,
            seed=seed,
            image=image,
            mask_image=mask,
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_rule=guidance_rule,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            zero_init_steps=zero_init_steps,
            apg_eta=apg_eta,
            apg_norm_threshold=apg_norm_threshold,
            apg_momentum=apg_momentum,
            clip_guidance_scale=clip_guidance_scale,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sampler=sampler,
            eta=eta,
            s_churn=s_churn,
            s_tmin=s_tmin,
            s_tmax=s_tmax,
            s_noise=s_noise,
            prior=prior,
            prior_num_inference_steps=prior_steps,
            prior_guidance_scale=prior_guidance,
            prior_best_of=prior_best_of,
            variation_of=variation_of,
            interpolate_image=interpolate_image,
            interpolate_prompt=interpolate_prompt,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
            interpolation=interpolation,
            edit_from=edit_from,
            edit_amount=edit_amount,
            ip_adapter_image=ip_image,
            super_res_num_inference_steps=super_res_steps,
        )
        request.resolve(painter.model.abilities)  # every mistake, before the note on words
        foreign = painter.card.unknown_words(plain(prompt) if prompt_weights else prompt)
        note = _foreign_words(model, painter.card.knows, foreign) if foreign else None
        if note:
            say("generate", note)
        # Of a plain best-of-N all come back, best first, for the sheet shows them all; the first `keep` become files.
        shows_all = search in (None, "best_of") and budget is None and not diverse
        show = not quiet and sys.stderr.isatty()
        (result,) = painter.paint([replace(request, keep=None) if shows_all else request], progress=show)
        painted = time.perf_counter()
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
            sheet = folder / "sheet.png"
            num_kept = len(pictures) if len(pictures) < len(images) else 0
            writer.write(contact_sheet(images, captions, num_kept=num_kept, title=prompt), sheet)
    first = result.records[0]
    answer = {
        "prompt": prompt,
        "model": {"name": first["model"], "hash": first["model_hash"], "knows": painter.card.knows},
        "unknown_words": foreign,
        "note": note,
        "settings": first["settings"],
        "out": str(folder),
        "sheet": str(sheet),
        "pictures": pictures,  # the kept ones, best first
        "candidates": _candidates(result, {one["seed"] for one in pictures}),
        "shown": len(images),  # on the sheet
        "account": vars(result.account),
        "seconds": {
            "load": round(loaded - started, 3),
            "paint": round(painted - loaded, 3),
            "total": round(time.perf_counter() - started, 3),
        },
        "peak_memory_bytes": _peak_memory(),
    }
    if as_json:
        print(json.dumps(answer))
    elif quiet:
        print(*(one["path"] for one in pictures), sep="\n")
    else:
        print(*_summary(answer), sep="\n")


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
    ] = DEFAULT_MODEL,
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
        {"image": str(path), "text": text, **told}
        for path, row in zip(paths, rows, strict=True)
        for text, told in zip(texts, row, strict=True)
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
        recorded = record.get("model")
        if model is None and not isinstance(recorded, str):
            raise ValueError(f"the record of {picture} names no model; give it with --model NAME")
        if not record.get("model_hash"):
            raise ValueError(f"the record of {picture} has no model_hash, so no model can be told to be its own")
        texts = ("weak_unet", "clip", "clip_hash", "attention", "runtime", "config", "prior_model")
        for name, kind in (("settings", dict), *((each, str) for each in texts)):
            if not isinstance(record.get(name, kind()), kind):
                raise ValueError(f"the record of {picture} is damaged: its {name} is {record[name]!r}")
        from gen.pipeline import as_output, computed
        from gen.request import asks_clip

        if asks_clip(record):
            clip = clip or record.get("clip")
        elif clip is not None:
            raise ValueError(f"--clip was given, but CLIP ranked {picture} and did not paint it; leave it out")
        dtype, attention = computed(record)
        if attention != record.get("attention", attention):
            say("reproduce", f"attention '{record['attention']}' does not run here; pixels may differ by torch's own")
        weak, config = weak_unet or record.get("weak_unet"), config or record.get("config")
        name, runtime = model or str(recorded), runtime or record.get("runtime", "torch")
        prior_model = prior_model or record.get("prior_model")
        painter = _load(name, attention, weak, clip, dtype, runtime, config, prior_model)
        painter.load_again(record)
        again = as_output([painter.repaint(record, image or ())], "pil")
        assert isinstance(again, list)
        difference = largest_difference(before, again[0])
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


def _load(
    name: str,
    attention: str = "auto",
    weak_unet: Path | str | None = None,
    clip: str | None = None,
    dtype: "torch.dtype | str" = "float32",
    runtime: str = "torch",
    config: str | None = None,
    prior_model: str | None = None,
    draft_unet: Path | None = None,
) -> "TextToImage":
    """The model, on the GPU where there is one that the runtime takes."""
    from gen.pipeline import TextToImage

    return TextToImage.from_pretrained(
        name,
        dtype=dtype,
        runtime=runtime,
        attention=attention,
        weak_unet=weak_unet,
        clip=clip,
        config=config,
        prior_model=prior_model,
        draft_unet=draft_unet,
    )


def _scaled(option: str, given: str) -> tuple[str, float]:
    """FILE[:SCALE] as file and scale, which is 1 where it is left out; ValueError where that is no number."""
    path, _, scale = given.rpartition(":")
    try:
        return (path, float(scale)) if path else (given, 1.0)
    except ValueError:
        if Path(given).exists() or len(path) < 2 or "/" in scale:  # a colon of the path's own, or a drive's
            return given, 1.0
        told = f"{option} '{given}': {scale!r} is no scale; give a number, as in {path}:0.8, or leave it out"
        raise ValueError(told) from None


def _called(given: str) -> tuple[str, str | None]:
    """FILE[:TOKEN] as file and token, which is the file's own where it is left out."""
    path, _, token = given.rpartition(":")
    return (path, token) if path and not Path(given).exists() else (given, None)


def _foreign_words(model: str, knows: str, foreign: list[str]) -> str:
    """What is said when a prompt asks for something that the model cannot know."""
    unseen = ", ".join(dict.fromkeys(foreign))
    told = f"model '{model}' has never seen: {unseen}. It paints all the same, from what it knows"
    told += f": {knows.strip().rstrip('.')}." if knows else "."
    return f"{told} For other pictures choose another model with --model (a diffusers folder or a hub id)."


def _candidates(result: "Result", kept: set[Any]) -> list[dict[str, Any]]:
    """All candidates that were painted, best first."""
    painted = sorted((each for each in result.candidates if each.painted), key=lambda each: -(each.score or 0.0))
    return [{"seed": each.seed, "score": each.score, "kept": each.seed in kept} for each in painted]


def _caption(score: float | None, seed: int) -> str:
    """What stands under a picture on the sheet."""
    return f"seed {seed}" if score is None else f"{score:.3f}  seed {seed}"


def _summary(answer: dict[str, Any]) -> list[str]:
    """What `generate` prints for people."""
    lines = []
    for one in answer["pictures"]:
        told = "" if one["score"] is None else f"score {one['score']:.4f}  "
        lines.append(f"{one['path']}  {told}seed {one['seed']}")
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
    from gen.checkpoint import ASSETS, INDEX, find

    if (ASSETS / model / INDEX).exists() or (Path(model) / INDEX).exists():
        source = find(model) / "clip"
        if not source.is_dir():
            raise ValueError(f"model '{model}' has no clip/ to score with; give a CLIP folder with --model")
        model = str(source)
    clip = CLIP.from_pretrained(model, "cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        said = clip.text(texts).embedding  # (T, E)
        scores = torch.stack([cosine(one.expand(len(texts), -1), said) for one in clip.image(pictures)])  # (B, T)
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

    peak = {"host": _peak_host_memory()}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_host_memory() -> int:
    """Largest resident set of this process; 0 where the system does not tell."""
    try:
        told = Path("/proc/self/status").read_text()  # Linux; unlike getrusage not inherited from the parent
    except OSError:
        told = ""
    if found := re.search(r"VmHWM:\s+(\d+) kB", told):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
