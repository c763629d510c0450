"""Many requests into a folder: the same pictures as one by one, none lost, none painted twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gen import Batch, TextToImage, batch_folder
from gen.batch import UNWRITTEN, WAITING, Progress, _Painting
from gen.engine import Engine
from gen.picture import largest_difference, read_png
from gen.stages import Stages

LINES: list[dict[str, Any]] = [
    {"prompt": "a red circle", "id": "first"},
    {"prompt": "a blue square", "num_inference_steps": 3, "sampler": "heun"},
    {"prompt": "a red square", "num_images_per_prompt": 2, "keep": 2, "seed": 7},
    {"prompt": "a green star", "guidance_scale": 1, "prior": True},
    {"prompt": "a blue circle", "search": "halving", "diverse": True},
]
WORDS: dict[str, Any] = {"num_inference_steps": 4, "num_images_per_prompt": 3, "keep": 1}


def manifest(folder: Path, lines: list[dict[str, Any]] = LINES) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def results(out: Path) -> dict[int, dict[str, Any]]:
    """What stands there, by line; each once."""
    records = [
        json.loads(line) for path in sorted(out.glob("results*.jsonl")) for line in path.read_text().splitlines()
    ]
    found = {each["line"]: each for each in records}
    assert len(found) == len(records)
    return found


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "pictures").rglob("*.*"))}


def stopping(after: int) -> Callable[[Progress], None]:
    """Ctrl-C when so many lines are through."""

    def note(progress: Progress) -> None:
        if progress.painted + progress.failed == after:
            raise KeyboardInterrupt

    return note


def test_each_line_as_if_it_were_asked_for_alone(tiny: TextToImage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    batch = Batch(tiny, manifest(tmp_path), out, words=WORDS)
    heard: list[Progress] = []
    progress = batch.paint(heard.append)
    assert heard[-1] == progress == batch.progress and progress.is_done
    assert [each.painted for each in heard] == [1, 2, 3, 4, 5]
    found = results(out)
    assert (progress.lines, progress.failed, progress.pictures) == (5, 0, 6)
    assert progress.candidates == sum(len(each["candidates"]) for each in found.values())
    assert found[1]["id"] == "first" and found[2]["id"] is None
    for number, line in enumerate(LINES, 1):
        asked = {"seed": 0, **WORDS, **{name: value for name, value in line.items() if name != "id"}}
        alone = tiny(**asked)
        assert found[number]["request"] == asked
        assert [each["seed"] for each in found[number]["pictures"]] == alone.seeds
        assert [each["score"] for each in found[number]["pictures"]] == pytest.approx(alone.scores, abs=1e-5)
        assert [each["seed"] for each in found[number]["candidates"] if each["kept"]] == alone.seeds
        for each, image, record in zip(found[number]["pictures"], alone.images, alone.records, strict=True):
            on_file, noted = read_png(out / each["path"])
            assert largest_difference(on_file, image) <= 1
            assert noted["settings"] == record["settings"] and noted["prompt"] == line["prompt"]
    assert len(bytes_of(out)) == 6, "nothing but what is named"


@pytest.mark.parametrize("after", [1, 3])
def test_what_was_interrupted_goes_on(after: int, tiny: TextToImage, tmp_path: Path) -> None:
    lines = [*LINES, {"prompt": "a blue star", "num_inference_steps": 60}]  # which are not all through at once
    path, whole, out = manifest(tmp_path, lines), tmp_path / "whole", tmp_path / "out"
    Batch(tiny, path, whole, words=WORDS).paint()
    batch = Batch(tiny, path, out, words=WORDS)
    with pytest.raises(KeyboardInterrupt):
        batch.paint(stopping(after))
    before = {number: line["pictures"] for number, line in results(out).items()}
    assert after <= len(before) == batch.progress.painted < len(lines)
    times = {one["path"]: (out / one["path"]).stat().st_mtime_ns for pictures in before.values() for one in pictures}

    again = Batch(tiny, path, out, words=WORDS)
    assert again.progress == Progress(lines=6, before=len(before))
    assert again.paint().is_done
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times, "what was there was not painted again"
    assert {n: line["request"] for n, line in results(out).items()} == {
        n: line["request"] for n, line in results(whole).items()
    }
    assert bytes_of(out).keys() == bytes_of(whole).keys()
    for name in bytes_of(out):
        assert largest_difference(read_png(out / name)[0], read_png(whole / name)[0]) <= 1
    assert Batch(tiny, path, out, words=WORDS).paint() == Progress(lines=6, before=6)


def test_a_crash_leaves_nothing_half(tiny: TextToImage, tmp_path: Path) -> None:
    """A line cut in the middle counts for nothing, nor do pictures without a line."""
    path, out = manifest(tmp_path, LINES[:3]), tmp_path / "out"
    Batch(tiny, path, out, words=WORDS).paint()
    whole = results(out)
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])
    (out / "results.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    kept = out / last["pictures"][0]["path"]
    kept.with_name(f".{kept.name}.123.part").write_bytes(b"half")
    again = Batch(tiny, path, out, words=WORDS)
    assert again.progress.before == 2
    assert again.paint().painted == 1
    assert [each["request"] for each in results(out).values()] == [each["request"] for each in whole.values()]
    assert bytes_of(out).keys() == {one["path"] for each in whole.values() for one in each["pictures"]}


def test_a_line_that_fails_leaves_the_others(tiny: TextToImage, tmp_path: Path) -> None:
    lines = [LINES[0], {"prompt": "a star", "guidance_scale": 1e38}, LINES[2]]
    path, out = manifest(tmp_path, lines), tmp_path / "out"
    progress = Batch(tiny, path, out, words=WORDS).paint()
    assert (progress.painted, progress.failed) == (2, 1) and progress.is_done
    found = results(out)
    assert "not finite" in found[2]["error"] and "pictures" not in found[2]
    again = Batch(tiny, path, out, words=WORDS)
    assert again.progress.before == 2
    assert again.paint().failed == 1, "it is tried again"


def test_processes_share_a_folder(tiny: TextToImage, tmp_path: Path) -> None:
    path, out = manifest(tmp_path), tmp_path / "out"
    parts = [Batch(tiny, path, out, words=WORDS, part=(which, 2)) for which in (1, 2)]
    assert [each.paint().painted for each in parts] == [3, 2]
    assert sorted(each.name for each in out.glob("results*")) == ["results-1of2.jsonl", "results-2of2.jsonl"]
    assert results(out).keys() == {1, 2, 3, 4, 5}
    assert Batch(tiny, path, out, words=WORDS).progress.before == 5, "one process sees what both did"
    for part in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match=rf"part {part[0]}/2 is out of range; give which of how many, as 2/8"):
            Batch(tiny, path, out, part=part)


@pytest.mark.parametrize(("part", "others"), [((1, 1), (1, 1)), ((1, 2), (1, 1)), ((1, 1), (2, 2)), ((1, 2), (1, 4))])
def test_two_do_not_write_to_the_same_lines(
    part: tuple[int, int], others: tuple[int, int], tiny: TextToImage, tmp_path: Path
) -> None:
    path, out = manifest(tmp_path), tmp_path / "out"
    one, other = (Batch(tiny, path, out, words=WORDS, part=each) for each in (part, others))
    refusals: list[str] = []

    def note(progress: Progress) -> None:
        with pytest.raises(ValueError) as error:
            other.paint()
        refusals.append(str(error.value))

    assert one.paint(note).is_done
    assert refusals and all("another process writes to" in each for each in refusals)
    there = bytes_of(out)
    progress = other.paint()
    assert progress.is_done and bytes_of(out).items() >= there.items(), "it sees what was painted since it was made"
    assert results(out).keys() >= set(range(part[0], 6, part[1])) | set(range(others[0], 6, others[1]))


def test_parts_of_one_kind_paint_side_by_side(tiny: TextToImage, tmp_path: Path) -> None:
    path, out = manifest(tmp_path), tmp_path / "out"
    one, other = (Batch(tiny, path, out, words=WORDS, part=(which, 2)) for which in (1, 2))

    def note(progress: Progress) -> None:
        if progress.painted == 1:
            assert other.paint().is_done

    assert one.paint(note).is_done
    assert results(out).keys() == {1, 2, 3, 4, 5}
    assert bytes_of(out).keys() == {one["path"] for each in results(out).values() for one in each["pictures"]}


def test_a_manifest_may_grow_and_not_change(tiny: TextToImage, tmp_path: Path) -> None:
    path, out = manifest(tmp_path, LINES[:1]), tmp_path / "out"
    Batch(tiny, path, out, words=WORDS).paint()
    manifest(tmp_path, LINES[:3])
    assert Batch(tiny, path, out, words=WORDS).paint().painted == 2
    manifest(tmp_path, [LINES[0], {**LINES[1], "seed": 9}])
    with pytest.raises(ValueError, match=r"line 2 asks for another seed than when out folder .* give the same"):
        Batch(tiny, path, out, words=WORDS)
    with pytest.raises(ValueError, match="line 1 asks for another num_inference_steps than"):
        Batch(tiny, manifest(tmp_path, LINES[:1]), out, words={**WORDS, "num_inference_steps": 5})


def test_another_model_is_refused(tiny: TextToImage, tiny_folder: Path, tmp_path: Path) -> None:
    path, out = manifest(tmp_path, LINES[:1]), tmp_path / "out"
    Batch(tiny, path, out, words=WORDS).paint()
    lower = TextToImage.from_pretrained(tiny_folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="was begun by a model that differs in dtype; give the same"):
        Batch(lower, path, out, words=WORDS)
    (out / "batch.json").write_text(json.dumps(replace(tiny.record, model_hash="0" * 64).to_json()), "utf-8")
    with pytest.raises(ValueError, match="that differs in model;"):
        Batch(tiny, path, out, words=WORDS)
    for damage, told in {"{": "damaged", "[]": "differs in everything", '{"version": 99}': "use a newer"}.items():
        (out / "batch.json").write_text(damage, "utf-8")
        with pytest.raises(ValueError, match=told):
            Batch(tiny, path, out, words=WORDS)


def test_a_model_without_files_cannot_go_on(tiny: TextToImage, tmp_path: Path) -> None:
    """Nobody can tell that it is the same."""
    made, out = TextToImage(tiny.model), tmp_path / "out"
    assert Batch(made, manifest(tmp_path, LINES[:1]), out, words=WORDS).paint().painted == 1
    with pytest.raises(ValueError, match="differs in model"):
        Batch(made, manifest(tmp_path, LINES[:2]), out, words=WORDS)


def test_parts_begun_by_two_models_at_once(tiny: TextToImage, tiny_folder: Path, tmp_path: Path) -> None:
    path, out = manifest(tmp_path), tmp_path / "out"
    lower = TextToImage.from_pretrained(tiny_folder, dtype="bfloat16")
    one, other = (Batch(each, path, out, words=WORDS, part=(k, 2)) for k, each in ((1, tiny), (2, lower)))
    one.paint()
    with pytest.raises(ValueError, match="differs in dtype"):
        other.paint()


def test_every_mistake_is_told_before_anything_is_painted(tiny: TextToImage, tmp_path: Path) -> None:
    path, out = manifest(tmp_path, [*LINES, {"prompt": "a star", "sampler": "eular"}]), tmp_path / "out"
    with pytest.raises(ValueError, match=r"prompts\.jsonl:6: sampler 'eular' is unknown"):
        Batch(tiny, path, out, words=WORDS)
    with pytest.raises(ValueError, match=r"prompts\.jsonl:6: num_images_per_prompt='x' is"):
        Batch(tiny, manifest(tmp_path, [*LINES, {"prompt": "a", "num_images_per_prompt": "x"}]), out, words=WORDS)
    with pytest.raises(ValueError, match="'budget' is no word of a line"):
        Batch(tiny, manifest(tmp_path), out, words={"budget": 3.0})
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds something that is no batch; choose another"):
        Batch(tiny, manifest(tmp_path), out)
    with pytest.raises(ValueError, match="cannot be read"):
        Batch(tiny, manifest(tmp_path), out / "mine.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        Batch(tiny, manifest(tmp_path), tmp_path / ("long" * 99))
    with pytest.raises(ValueError, match=r"^num_inference_steps=0 is out of range"):  # no line's mistake
        Batch(tiny, manifest(tmp_path), tmp_path / "new", words={"num_inference_steps": 0})
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: prompt is missing; say in words what to paint"):
        Batch(tiny, manifest(tmp_path, [{"seed": 3}]), tmp_path / "new")
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: rerank='false'; give True or False"):
        Batch(tiny, manifest(tmp_path, [{"prompt": "a", "rerank": "false"}]), tmp_path / "new")
    damaged = tmp_path / "damaged"
    Batch(tiny, manifest(tmp_path, LINES[:1]), damaged, words=WORDS).paint()
    (damaged / "results.jsonl").write_text("nonsense\n", "utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl:1 is damaged"):
        Batch(tiny, manifest(tmp_path), damaged, words=WORDS)


def test_how_many_where_nobody_says(tiny: TextToImage, tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "a", "num_images_per_prompt": 2}, {"prompt": "a", "rerank": False}]
    batch = Batch(tiny, manifest(tmp_path, lines), tmp_path / "out", words={"num_inference_steps": 1})
    asked = [each.words for each in batch._entries]
    assert [(each["num_images_per_prompt"], each["keep"]) for each in asked] == [(16, 4), (2, 2), (16, 16)]


@pytest.mark.parametrize("fails", [False, True])
def test_a_long_manifest_takes_no_more_room(
    fails: bool, tiny: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few requests are with the engine, and few answers wait for their files; also where all of them fail."""
    number, path = 10 * WAITING, tmp_path / "many.txt"
    path.write_text("a star\n" * number, "utf-8")
    batch = Batch(tiny, path, tmp_path / "out", words={"num_inference_steps": 1, "num_images_per_prompt": 1})
    waiting, unwritten = [], []
    submit, write = Engine.submit, _Painting.write

    def submitting(self: Any, *given: Any, **words: Any) -> Any:
        if fails:
            raise ValueError("nothing is free")
        waiting.append(self.num_waiting)
        return submit(self, *given, **words)

    def writing(self: Any, *given: Any, **words: Any) -> None:
        unwritten.append(len(self._unwritten))
        write(self, *given, **words)

    monkeypatch.setattr(Engine, "submit", submitting)
    monkeypatch.setattr(_Painting, "write", writing)
    progress = batch.paint()
    assert progress.is_done and progress.failed == number * fails
    assert len(results(tmp_path / "out")) == number
    assert max(waiting, default=0) < WAITING and max(unwritten) <= UNWRITTEN
    assert [each.name for each in (tmp_path / "out").glob("pictures/*")] == ([] if fails else ["000"])


def test_all_that_fail_in_one_tick_are_not_the_end(
    tiny: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any) -> None:
        raise RuntimeError("the text tower is ill")

    number, path = 3 * WAITING, tmp_path / "many.txt"
    path.write_text("a star\n" * number, "utf-8")
    batch = Batch(tiny, path, tmp_path / "out", words={"num_inference_steps": 1, "num_images_per_prompt": 1})
    monkeypatch.setattr(Stages, "encode_prompts", failing)
    assert batch.paint().failed == number
    assert {each["error"] for each in results(tmp_path / "out").values()} == {"the text tower is ill"}


def test_what_lies_beside_is_left_alone(tiny: TextToImage, tmp_path: Path) -> None:
    """Files of other names, and what is hidden where nothing else is."""
    out = tmp_path / "out"
    out.mkdir()
    for name in (".DS_Store", ".results.jsonl.lock"):
        (out / name).touch()
    batch = Batch(tiny, manifest(tmp_path), out, words=WORDS)
    with pytest.raises(KeyboardInterrupt):
        batch.paint(stopping(1))
    (out / "pictures" / "000" / "1-favourite.txt").touch()
    (out / "pictures" / "000" / "2-mine").mkdir()
    (out / "results copy.jsonl").write_text("nonsense\n", "utf-8")
    assert Batch(tiny, manifest(tmp_path), out, words=WORDS).paint().is_done
    assert (out / "pictures" / "000" / "1-favourite.txt").exists() and (out / ".DS_Store").exists()


def test_a_line_stands_as_soon_as_it_is_told(tiny: TextToImage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[bool] = []
    Batch(tiny, manifest(tmp_path), out, words=WORDS).paint(
        lambda progress: seen.append(len(results(out)) == progress.through)
    )
    assert seen == [True] * len(LINES)


def test_ctrl_c_leaves_no_line_twice(tiny: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes while answers are written."""

    def interrupted(*given: Any) -> None:
        append(*given)
        if len(results(out)) in (1, 3):
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "out"
    append = batch_folder.append
    monkeypatch.setattr("gen.batch.append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Batch(tiny, manifest(tmp_path), out, words=WORDS).paint()
    assert len(results(out)) >= 1
    monkeypatch.undo()
    assert Batch(tiny, manifest(tmp_path), out, words=WORDS).paint().is_done
    assert results(out).keys() == {1, 2, 3, 4, 5}


def test_words_that_the_model_never_saw_are_noted(tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text("a red dog\na red star\n", "utf-8")
    few = {"num_inference_steps": 1, "num_images_per_prompt": 1}
    Batch(TextToImage.from_pretrained("shapes64"), path, out, words=few).paint()
    found = results(out)
    assert found[1]["unknown_words"] == ["dog"] and "unknown_words" not in found[2]


def test_a_full_disk_ends_it(tiny: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    batch = Batch(tiny, manifest(tmp_path), out, words=WORDS)
    monkeypatch.setattr("gen.picture.write_png", full)
    with pytest.raises(OSError, match="No space left"):
        batch.paint()
    assert results(out) == {}
    monkeypatch.undo()
    assert Batch(tiny, manifest(tmp_path), out, words=WORDS).paint().painted == len(LINES)
