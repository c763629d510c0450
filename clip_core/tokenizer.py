"""A small byte-level BPE tokenizer of CLIP's kind, trained on captions (Radford et al. 2021, section 2.4).

The result is a stock `transformers.CLIPTokenizer`: `save_pretrained` writes it, stock `from_pretrained` reads
it. The vocabulary holds all 256 bytes, inside a word and at its end, so no text is ever unknown. Text is
lower-cased and its white space is joined, as in CLIP.
"""

import json
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
NUM_FIXED = 2 * 256 + 2  # every byte inside a word and at its end, begin and end of text


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learn byte-pair merges (Sennrich et al. 2016) from captions; equal captions give equal results.

    The ids are CLIP's in order: 256 bytes, 256 bytes that end a word, one per merge, begin, end. Padding is
    the end token, as in CLIP, so the end id is the last one and never 2 (which transformers pools by another,
    legacy rule). `vocab_size` is at most reached: few captions hold few pairs that repeat, so read the
    embedding's size from `len(tokenizer)`. `max_length` counts the begin and end tokens.
    """
    if vocab_size < NUM_FIXED:
        raise ValueError(f"vocab_size is {vocab_size}; give at least {NUM_FIXED}: all bytes twice, begin and end")
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}; give at least 3: begin, one token, end")
    if isinstance(captions, str):
        raise ValueError("captions is one string; give an iterable of strings")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [symbol + WORD_END for symbol in symbols]
    merges = _learn_merges(captions, vocab_size - 2, symbols, ends)
    tokens = dict.fromkeys([*symbols, *ends, *(left + right for left, right in merges)])  # each once, in order
    return _clip_tokenizer({token: i for i, token in enumerate(tokens)}, merges, max_length)


def _learn_merges(
    captions: Iterable[str], vocab_size: int, symbols: list[str], ends: list[str]
) -> list[tuple[str, str]]:
    """Merges in the order learned, over words split as `CLIPTokenizer` splits them."""
    split = _clip_tokenizer({symbol: i for i, symbol in enumerate(symbols)}, [], 3).backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = split.normalizer, split.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is chance
        # Pairs seen equally often are merged in the order of their ids. Word ends would get theirs in the order
        # of a hash table, another in every process; as "special" tokens they have them from the start.
        special_tokens=ends,
        initial_alphabet=symbols,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for caption in captions:
            count += bool(caption.strip())
            yield caption

    learner.train_from_iterator(counted(), trainer)
    if not count:
        raise ValueError("captions holds no text; give at least one caption that is not empty")
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def _clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    vocab = {**vocab, BOS: len(vocab), EOS: len(vocab) + 1}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=max_length,
    )
