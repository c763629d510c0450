"""The trained tokenizer: takes any text, loads in stock transformers with the same ids, is reproducible."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from clip_core.tokenizer import NUM_FIXED, train_tokenizer

CAPTIONS = [
    f"a {size} {colour} {shape} {place} a {colour} square on {ground}"
    for size in ("small", "large")
    for colour in ("red", "green", "blue", "purple")
    for shape in ("circle", "star", "heart")
    for place in ("above", "to the left of")
    for ground in ("white", "a black background")
]
TEXTS = [
    "a small red circle",
    "",
    "zażółć gęślą jaźń",
    "日本語 の 文",
    "🦊 🏳️‍🌈 👩🏽‍🚀",
    "x \u0000 y \u200b ٣",
    "1 2 3 # @ ~",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=570, max_length=32)


def ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return tokenizer(text, padding="max_length", truncation=True)["input_ids"]


def test_ids_follow_clip(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.model_max_length == 32
    assert len(tokenizer) == 570
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (568, 569, 569)
    row = ids(tokenizer, "a small red")
    # words seen often are one token; the rest is padding
    assert row[0] == 568 and row[4:] == [569] * 28 and all(512 <= i < 568 for i in row[2:4])
    vocab = tokenizer.get_vocab()
    assert vocab["!"] == 0 and vocab["!</w>"] == 256 and row[1] == vocab["a</w>"]  # as in OpenAI's vocabulary


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(tokenizer: CLIPTokenizer, text: str) -> None:
    row = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in row[1:-1]
    assert tokenizer.decode(row, skip_special_tokens=True) == text


def test_every_byte_has_a_token(tokenizer: CLIPTokenizer) -> None:
    text = "".join(chr(i) for i in range(0x20, 0x3000) if not chr(i).isspace())
    row = tokenizer(text, truncation=False)["input_ids"]
    assert tokenizer.unk_token_id not in row[1:-1]


def test_stock_loads_it_with_the_same_ids(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    stock = CLIPTokenizer.from_pretrained(tmp_path)
    assert stock.model_max_length == 32 and stock.eos_token_id == tokenizer.eos_token_id
    for text in [*TEXTS, *CAPTIONS[:10], "A  Small\nRED circle's", "word " * 50]:
        assert ids(stock, text) == ids(tokenizer, text)
        assert len(ids(stock, text)) == 32


def test_same_captions_same_tokenizer(tokenizer: CLIPTokenizer) -> None:
    def once() -> Iterator[str]:
        yield from CAPTIONS

    def learned(tokenizer: CLIPTokenizer) -> dict:
        return json.loads(tokenizer.backend_tokenizer.to_str())["model"]

    for _ in range(20):  # every training seeds the library's hash tables anew, and these captions are full of ties
        again = learned(train_tokenizer(once(), vocab_size=570, max_length=32))
        assert again["merges"] == learned(tokenizer)["merges"]
        assert again["vocab"] == learned(tokenizer)["vocab"]


def test_smaller_vocabulary_is_a_prefix(tokenizer: CLIPTokenizer) -> None:
    small = train_tokenizer(CAPTIONS, vocab_size=540, max_length=32)
    assert len(small) == 540
    large = tokenizer.get_vocab()
    assert all(large[token] == i for token, i in small.get_vocab().items() if i < 538)


def test_no_captions_to_learn_pairs_from_leaves_bytes() -> None:
    tokenizer = train_tokenizer(["ab"], vocab_size=2000, max_length=8)
    assert len(tokenizer) == NUM_FIXED and tokenizer.eos_token_id == NUM_FIXED - 1
    assert tokenizer.decode(tokenizer("hello 🙂")["input_ids"], skip_special_tokens=True) == "hello 🙂"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="vocab_size is 100; give at least 514"):
        train_tokenizer(["a"], vocab_size=100, max_length=32)
    with pytest.raises(ValueError, match="max_length is 2"):
        train_tokenizer(["a"], vocab_size=600, max_length=2)
    with pytest.raises(ValueError, match="one string"):
        train_tokenizer("a red circle", vocab_size=600, max_length=32)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", " "], vocab_size=600, max_length=32)
