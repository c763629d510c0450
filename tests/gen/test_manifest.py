"""A file of prompts: what a line may say, and how one that says no request is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gen import Request
from gen.manifest import APART, Entry, checked, read_manifest
from gen.search import by_name


def written(folder: Path, *lines: str, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeff  a red star ", "", 'a "blue" circle\u2028above\r', name="prompts.txt")
    assert read_manifest(path) == [
        Entry(1, {"prompt": "a red star"}),
        Entry(3, {"prompt": 'a "blue" circle\u2028above'}),
    ]


def test_a_request_a_line(tmp_path: Path) -> None:
    record = {"prompt": "a red star", "seed": 3, "guidance_interval": [0.5, 9], "sampler": None, "id": ["any", 1]}
    (entry,) = read_manifest(written(tmp_path, json.dumps(record)))
    assert entry.id == ["any", 1] and "sampler" not in entry.words and "id" not in entry.words
    assert entry.request() == Request("a red star", seed=3, guidance_interval=(0.5, 9))


def test_files_lie_beside_the_manifest(tmp_path: Path) -> None:
    record = {"prompt": "a star", "image": "in/one.png", "mask_image": str(tmp_path / "elsewhere.png")}
    (entry,) = read_manifest(written(tmp_path, json.dumps(record)))
    assert entry.words["image"] == str(tmp_path / "in" / "one.png")
    assert entry.words["mask_image"] == str(tmp_path / "elsewhere.png")


def test_words_of_all_lines_are_json_too(tmp_path: Path) -> None:
    words = {"guidance_interval": (0.5, 9.0), "image": Path("in/../a.png"), "eta": None, "keep": np.int64(2)}
    found = checked(words, tmp_path)
    assert found == {"guidance_interval": [0.5, 9.0], "image": str(tmp_path / "a.png"), "keep": 2}
    with pytest.raises(ValueError, match=r"search=.*Halving.* cannot be written as JSON"):
        checked({"search": by_name("halving")}, tmp_path)
    assert json.loads(json.dumps(found)) == found


MISTAKES = {
    "no JSON": ("a red star", "no JSON (Expecting value: line 1 column 1 (char 0)); write one object a line"),
    "no object": ('["a red star"]', "no object; write one a line"),
    "deep": ("[" * 100_000, "no JSON ("),
    "a long number": ('{"seed": ' + "9" * 9999 + "}", "no JSON ("),
    "unknown word": ('{"promt": "a star"}', "'promt' is no word of a request; did you mean 'prompt'?"),
    "a word like no other": ('{"xyzzy": 1}', "'xyzzy' is no word of a request; leave it out"),
    "part of a word": ('{"steps": 3}', "did you mean 'num_inference_steps'?"),
    "another part": ('{"num_images": 3}', "did you mean 'num_images_per_prompt'?"),
    "half a character": ('{"prompt": "a \\ud83d"}', "cannot be written as JSON ('utf-8' codec can't encode"),
    "no number": ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale=nan cannot be written as JSON"),
    "an id that is none": ('{"prompt": "a", "id": Infinity}', "id=inf cannot be written as JSON"),
    "two prompts": ('{"prompt": ["a star", "a circle"]}', "is no text; write one prompt a line"),
    "picture in numbers": ('{"prompt": "a", "image": [[1]]}', "image=[[1]] is no path; name one picture file"),
    "seconds": ('{"prompt": "a", "budget": 5}', "'budget' is no word of a line, for all requests share the machine"),
    "numpy": ('{"prompt": "a", "output_type": "np"}', "'output_type' is no word of a line"),
    "tensor": ('{"prompt": "a", "latents": [1]}', "'latents' is no word of a line, for tensors are no JSON"),
}


@pytest.mark.parametrize(("line", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_with_its_line(line: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a star"}', "", line)
    with pytest.raises(ValueError) as error:
        read_manifest(path)
    assert str(error.value).startswith(f"{path}:3: ") and words in str(error.value)


def test_what_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts.json' is of no known format; give .* \.jsonl or \.txt"):
        read_manifest(written(tmp_path, "[]", name="prompts.json"))
    with pytest.raises(ValueError, match=r"none\.txt' cannot be read \(No such file"):
        read_manifest(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is empty; write one prompt a line"):
        read_manifest(written(tmp_path, "", "  "))
    (tmp_path / "latin.txt").write_bytes("ein grüner Stern".encode("latin-1"))
    with pytest.raises(ValueError, match=r"is not text in UTF-8 \(byte 6\)"):
        read_manifest(tmp_path / "latin.txt")


def test_what_no_line_can_say_are_words_of_a_request() -> None:
    assert all(name in Request.__dataclass_fields__ for name in APART)
