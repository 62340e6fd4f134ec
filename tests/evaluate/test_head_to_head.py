from dataclasses import dataclass
from itertools import product

import pytest

from srlm_fast.data.records import Vote
from srlm_fast.evaluate.head_to_head import head_to_head


@dataclass
class Verdict:
    outcome: float | None
    votes: tuple = ()


class BothOrders:
    """Reads its two verdicts from the prompt: what A, then what B in the first place would get."""

    name = "both orders"

    def compare(self, prompts, ones, others):
        assert [one.prompt for one in ones] == [other.prompt for other in others] == prompts
        return [self._verdict(*prompt[0].content.split()) for prompt in prompts]

    def _verdict(self, first, second):
        scores = [{"win": 1.0, "tie": 0.5, "lose": 0.0, "none": None}[w] for w in (first, second)]
        votes = tuple(Vote("", score) for score in scores)
        if None in scores:
            return Verdict(None, votes)
        return Verdict(scores[0] if scores[0] == scores[1] else 0.5, votes)


@pytest.fixture
def duel(make_sample):
    def run(*verdicts):
        ours = [make_sample("ours", prompt=f"{a} {b}") for a, b in verdicts]
        theirs = [make_sample("theirs", prompt=f"{a} {b}") for a, b in verdicts]
        return head_to_head(BothOrders(), ours, theirs)

    return run


def test_only_what_both_orders_say_is_a_win(duel):
    """The truth table of the paper's rule."""
    table = list(product(("win", "tie", "lose"), repeat=2))
    rates = duel(*table)
    assert (rates["win"], rates["tie"], rates["lose"]) == pytest.approx((1 / 9, 7 / 9, 1 / 9))
    assert rates["inconsistent"] == pytest.approx(6 / 9)
    assert (rates["prompts"], rates["unscored"], rates["judged_by"]) == (9, 0, "both orders")


def test_a_judge_that_prefers_the_first_place_makes_ties(duel):
    rates = duel(*[("win", "lose")] * 4)
    assert (rates["tie"], rates["inconsistent"], rates["first_place"]) == (1.0, 1.0, 1.0)
    rates = duel(("win", "win"), ("lose", "lose"))
    assert (rates["inconsistent"], rates["first_place"]) == (0.0, 0.5)
    assert duel(("lose", "win"))["first_place"] == 0.0


def test_a_missing_verdict_is_left_out_and_counted(duel):
    rates = duel(("win", "win"), ("none", "win"), ("win", "none"))
    assert (rates["win"], rates["prompts"], rates["unscored"]) == (1.0, 1, 2)


def test_a_judge_that_was_not_asked_has_no_place_to_prefer(make_sample):
    class Scores:
        name = "scores"

        def compare(self, prompts, ones, others):
            return [Verdict(1.0) for _ in prompts]

    rates = head_to_head(Scores(), [make_sample("a")], [make_sample("b")])
    assert rates["win"] == 1.0
    assert rates["inconsistent"] is rates["first_place"] is None
