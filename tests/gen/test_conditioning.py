"""gen/conditioning.py: what a call can work out once for evaluations that are told the same."""

from __future__ import annotations

import torch

from gen.conditioning import Condition, Conditions


def test_evaluations_of_a_row_are_alike_where_they_differ_in_their_text_alone() -> None:
    prompt, null, other = (Condition(torch.zeros(2, 3)) for _ in range(3))
    vector = Condition(torch.zeros(2, 3), pooled_projections=torch.zeros(4))
    same_vector = Condition(torch.zeros(2, 3), pooled_projections=vector.pooled_projections)
    rows = ("a", "b", "a", "b", "c")
    alike = Conditions((null, null, prompt, other, prompt), rows).alike
    assert alike is not None and alike.first.tolist() == [0, 1, 4] and alike.of.tolist() == [0, 1, 0, 1, 2]
    states = torch.arange(5.0)[:, None]
    assert torch.equal(alike.each(alike.once(states)), states[[0, 1, 0, 1, 4]])
    assert Conditions((null, prompt), ("a", "b")).alike is None
    assert Conditions((null, prompt)).alike is None  # nobody says whose they are
    assert Conditions((null, vector), ("a", "a")).alike is None
    assert Conditions((vector, same_vector), ("a", "a")).alike is not None


def test_those_that_ask_one_network_are_alike_by_themselves() -> None:
    null, prompt, weak = (Condition(torch.zeros(2, 3), network=name) for name in ("own", "own", "weak"))
    parts = Conditions((null, null, prompt, weak), ("a", "b", "a", "a")).parts
    assert parts["own"].alike is not None and parts["own"].alike.of.tolist() == [0, 1, 0]
    assert parts["weak"].alike is None
