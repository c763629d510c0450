"""The committed test prompts are those that the code makes, and are what the README says they are."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from training.data.checker import read, right
from training.data.shapes import HELD_OUT_PAIRS, has_held_out_pair, held_out
from training.data.suite import GROUPS, RETRIEVAL, SHAPES_TEST, Prompt, load, write


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return load()


def of(prompts: list[Prompt], group: str) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.group == group]


def test_the_committed_file_is_what_the_code_makes(tmp_path: Path) -> None:
    write(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == SHAPES_TEST.read_bytes(), "run training.data.suite.write()"


def test_there_are_enough_of_every_group(prompts: list[Prompt]) -> None:
    assert Counter(prompt.group for prompt in prompts) == GROUPS | {"retrieval": sum(RETRIEVAL.values())}
    assert GROUPS["one"] >= 60 and GROUPS["relation"] >= 80 and GROUPS["count"] >= 40 and GROUPS["held_out"] >= 30
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    for group in ("one", "relation", "count"):
        assert {prompt.claim.kind for prompt in of(prompts, group)} == {group}
    assert Counter(prompt.claim.relation for prompt in of(prompts, "relation")).most_common()[-1][1] == 20
    assert set(Counter(prompt.claim.count for prompt in of(prompts, "count"))) == {2, 3, 4}


def test_nothing_is_said_in_training(prompts: list[Prompt]) -> None:
    assert all(held_out(prompt.claim) for prompt in prompts)
    for prompt in prompts:
        assert has_held_out_pair(prompt.claim) == (prompt.group == "held_out")
    shown = of(prompts, "held_out")
    assert {(prompt.claim.first.colour, prompt.claim.first.shape) for prompt in shown} == HELD_OUT_PAIRS
    assert {prompt.claim.kind for prompt in shown} == {"one"}


def test_sizes_and_backgrounds_are_named_in_some_and_left_out_in_some(prompts: list[Prompt]) -> None:
    for group in GROUPS:
        named = [noun.size is not None for prompt in of(prompts, group) for noun in prompt.claim.nouns()]
        assert 0.5 < sum(named) / len(named) < 0.9
        named = [prompt.claim.background is not None for prompt in of(prompts, group)]
        assert 0.4 < sum(named) / len(named) < 0.9


@pytest.mark.parametrize("group", [*GROUPS, "retrieval"])
def test_no_prompt_comes_twice(prompts: list[Prompt], group: str) -> None:
    texts = [prompt.text for prompt in of(prompts, group)]
    assert len(set(texts)) == len(texts)


def test_each_retrieval_caption_is_true_of_its_own_picture_and_of_no_other(prompts: list[Prompt]) -> None:
    retrieval = of(prompts, "retrieval")
    for prompt in retrieval:
        assert all(noun.size for noun in prompt.claim.nouns()) and prompt.claim.background
    readings = [read(prompt.picture()) for prompt in retrieval]
    for i, reading in enumerate(readings):
        assert [j for j, prompt in enumerate(retrieval) if right(reading, prompt.claim)] == [i]


def test_a_prompt_goes_to_its_line_and_back(prompts: list[Prompt], tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(prompts[70].to_json() + "\n")
    assert load(tmp_path / "one.jsonl") == [prompts[70]]


def test_what_is_no_prompt_file_is_refused(prompts: list[Prompt], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
    for text, message in (("{", ":1 is not a test prompt"), ('{"id": "x"}', ":1 is not a test prompt")):
        path.write_text(text + "\n")
        with pytest.raises(ValueError, match=message):
            load(path)
    other = replace(prompts[0].claim, count=2)
    path.write_text(prompts[0].to_json().replace('"count": 1', '"count": 2') + "\n")
    with pytest.raises(ValueError, match=f"its claim reads '{other.text()}'"):
        load(path)
