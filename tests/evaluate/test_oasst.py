"""Reward-model metrics on real human rankings, against formulas written on the raw trees."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from srlm_fast.data.readers import read_trees
from srlm_fast.evaluate.reward_model import reward_model_metrics

TREES = Path(__file__).parents[3] / "shared" / "data" / "oasst_sample.trees.jsonl"
pytestmark = pytest.mark.skipif(
    not TREES.is_file(), reason="needs ../shared/data, which is not there"
)


def score(text):
    """A judge with many ties, that fails to answer now and then."""
    return None if len(text) % 11 == 0 else float(min(5, len(text) // 300))


@pytest.fixture(scope="module")
def raw():
    """(score, rank) of the ranked English replies of each tree, read without our reader."""
    trees = [json.loads(line) for line in TREES.read_text(encoding="utf-8").splitlines()]
    found = []
    for tree in trees:
        replies = [
            (score(reply["text"]), reply["rank"])
            for reply in tree["prompt"]["replies"]
            if reply.get("rank") is not None and reply["lang"] == "en" and not reply.get("deleted")
        ]
        if tree["prompt"]["lang"] == "en" and len(replies) > 1:
            found.append(replies)
    return found


@pytest.fixture(scope="module")
def metrics():
    groups = [g for g in read_trees(str(TREES)) if len(g.responses) > 1]
    return reward_model_metrics([[score(r) for r in g.responses] for g in groups],
                                [g.ranks for g in groups])  # fmt: skip


CREDIT = {"wrong": (0.0, 0.0), "half": (0.5, 0.0), "right": (1.0, 0.0), "drop": (None, None)}


def credits(group, policy):
    """What each strictly ranked pair of a prompt earns; ties and lost pairs by policy."""
    tie, lost = CREDIT[policy]
    earned = []
    for (a, rank_a), (b, rank_b) in combinations(group, 2):
        if rank_a == rank_b:
            continue
        if a is None or b is None:
            earned.append(lost)
        elif a == b:
            earned.append(tie)
        else:
            earned.append(float((a > b) == (rank_a < rank_b)))
    return [credit for credit in earned if credit is not None]


def kendall(x, y):
    """Tau-b from the sign matrices."""
    dx, dy = (np.sign(np.subtract.outer(v, v)) for v in (x, y))
    return (dx * dy).sum() / np.sqrt((dx**2).sum() * (dy**2).sum())


def spearman(x, y):
    """Pearson's coefficient of midranks: how many lie below, and half of those that are equal."""
    ranks = [np.greater.outer(v, v).sum(1) + np.equal.outer(v, v).sum(1) / 2 for v in (x, y)]
    return np.corrcoef(*ranks)[0, 1]


def known(group):
    x, y = zip(*[(s, -rank) for s, rank in group if s is not None], strict=True)
    return np.array(x, float), np.array(y, float)


def test_there_is_something_to_measure(raw, metrics):
    assert metrics["prompts"] == len(raw) > 50
    assert metrics["tied_pairs"] > 20 and metrics["unscored"] > 5


@pytest.mark.parametrize("policy", CREDIT)
def test_pairwise_accuracy(raw, metrics, policy):
    each = [credits(group, policy) for group in raw]
    pooled = np.mean([credit for row in each for credit in row])
    assert metrics["pairwise_accuracy"][policy] == pytest.approx(pooled, rel=1e-12)
    per_prompt = np.mean([np.mean(row) for row in each if row])
    assert metrics["pairwise_accuracy_per_prompt"][policy] == pytest.approx(per_prompt, rel=1e-12)


@pytest.mark.parametrize(("name", "formula"), [("spearman", spearman), ("kendall_tau", kendall)])
def test_correlations(raw, metrics, name, formula):
    x, y = known([row for group in raw for row in group])
    assert metrics[f"{name}_pooled"] == pytest.approx(formula(x, y), rel=1e-9)
    each = []
    for group in raw:
        scored = [row for row in group if row[0] is not None]
        varies = len(scored) > 1 and all(len(set(side)) > 1 for side in zip(*scored, strict=True))
        each.append(formula(*known(scored)) if varies else 0.0)
    assert metrics[name] == pytest.approx(np.mean(each), rel=1e-9)


def test_five_best_and_exact_match(raw, metrics):
    fives = [rank == min(r for _, r in group) for group in raw for s, rank in group if s == 5.0]
    assert metrics["five_best"] == pytest.approx(np.mean(fives)) and len(fives) > 20
    exact = [
        all(s is not None for s, _ in group)
        and all(np.sign(a - b) == np.sign(q - p) for (a, p), (b, q) in combinations(group, 2))
        for group in raw
    ]
    assert metrics["exact_match"] == pytest.approx(np.mean(exact))
