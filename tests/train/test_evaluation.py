"""Evaluation inside a training: TRL's names, means over all held-out items, and nothing moved."""

import math
from dataclasses import replace

import pytest
import torch

from srlm_fast.config import PreferenceConfig, TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.weights import frozen_copy
from srlm_fast.train.noise import Refinement
from srlm_fast.train.preference import train_preference
from srlm_fast.train.sft import train_sft

SFT = TrainConfig(
    learning_rate=3e-3, per_device_train_batch_size=7, logging_steps=3, micro_batch_size=3
)
DPO = PreferenceConfig(
    learning_rate=3e-3, num_train_epochs=2, per_device_train_batch_size=4, logging_steps=2
)
SPA = Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6)
NAMES = {
    "eval_loss", "eval_logps/chosen", "eval_logps/rejected", "eval_rewards/chosen",
    "eval_rewards/rejected", "eval_rewards/accuracies", "eval_rewards/margins",
    "eval_rewards/displaced", "epoch", "step",
}  # fmt: skip


@pytest.fixture
def sft(make_model, rows):
    def run(config, held_out):
        model, logs = make_model(), []
        summary = train_sft(
            model, rows[:16], config, seed=0, pad_id=0, log=logs.append, eval_rows=held_out
        )
        return model, summary, logs

    return run


@pytest.fixture
def preference(make_model, pairs, tmp_path):
    def run(config, held_out, refine=None):
        model, logs = make_model(), []
        summary = train_preference(
            model, frozen_copy(model) if config.reference_cache == "none" else model, pairs[:8],
            config, refine=refine, seed=0, pad_id=0, log=logs.append, eval_pairs=held_out,
            cache=tmp_path,
        )  # fmt: skip
        return model, summary, logs

    return run


def assert_training_is_the_same(found, expected):
    for tensor, other in zip(found[0].parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(tensor, other)
    summary = dict(found[1])
    assert summary.pop("eval_dropped") == {}
    assert summary == expected[1]
    assert [row for row in found[2] if "loss" in row] == expected[2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(sft, rows, response_logps, checkpointing):
    config = replace(SFT, eval_steps=4, gradient_checkpointing=checkpointing)
    found = sft(config, rows[16:])
    assert_training_is_the_same(found, sft(replace(config, eval_steps=0), rows[16:]))
    evaluated = [row for row in found[2] if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [4, 6], "and at the end"
    found[0].requires_grad_(False)
    loss = -float(torch.cat([response_logps(found[0], *row) for row in rows[16:]]).mean())
    assert evaluated[-1] == {"eval_loss": pytest.approx(loss, rel=1e-9), "epoch": 2.0, "step": 6}


@pytest.mark.parametrize("refine", [None, SPA, replace(SPA, tau="dataset", interval=1)])
@pytest.mark.parametrize("cache", ["none", "states"])
def test_preference(preference, pairs, make_model, response_logps, refine, cache):
    config = replace(DPO, eval_steps=2, reference_cache=cache, rpo_alpha=0.2)
    found = preference(config, pairs[8:], refine)
    without = preference(replace(config, eval_steps=0), pairs[8:], refine)
    assert_training_is_the_same(found, without)
    evaluated = [row for row in found[2] if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4]
    assert all(row.keys() == NAMES for row in evaluated)

    def rewards(kind):
        return [
            0.1 * float((response_logps(found[0], *row) - response_logps(start, *row)).sum())
            for pair in pairs[8:]
            for row in [(pair.prompt_ids, getattr(pair, kind))]
        ]

    start, last = make_model().requires_grad_(False), evaluated[-1]
    found[0].requires_grad_(False)
    chosen, rejected = rewards("chosen_ids"), rewards("rejected_ids")
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    nll = [-response_logps(found[0], p.prompt_ids, p.chosen_ids).mean() for p in pairs[8:]]
    loss = sum(math.log1p(math.exp(-m)) for m in margins) + 0.2 * float(sum(nll))
    expected = {
        "eval_loss": loss / 4,  # without SPA's refined labels
        "eval_rewards/chosen": sum(chosen) / 4,
        "eval_rewards/rejected": sum(rejected) / 4,
        "eval_rewards/margins": sum(margins) / 4,
        "eval_rewards/accuracies": sum(m > 0 for m in margins) / 4,
        "eval_rewards/displaced": sum(reward < 0 for reward in chosen) / 4,
    }
    assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_cached_reference_holds_the_held_out_pairs_too(preference, pairs):
    config = replace(DPO, eval_steps=3)
    live = preference(config, pairs[8:])[2]
    kept = preference(replace(config, reference_cache="logps"), pairs[8:])[2]
    for row, expected in zip(kept, live, strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_what_cannot_be_evaluated_on_is_left_out_and_counted(sft, preference, rows, pairs):
    config = replace(SFT, eval_steps=6)
    long, empty = ((5,) * 40, (6,) * 40), ((5,), ())  # of a model with 64 positions
    found = sft(config, [*rows[16:], long, empty, long])
    assert found[2] == sft(config, rows[16:])[2]
    assert found[1]["eval_dropped"] == {"too_long": 2, "empty": 1} and not found[1]["dropped"]
    _, summary, logs = sft(config, [])
    assert not [row for row in logs if "eval_loss" in row] and "eval_dropped" not in summary
    odd = replace(pairs[8], rejected_ids=())
    summary = preference(replace(DPO, eval_steps=2), [*pairs[8:], odd])[1]
    assert summary["eval_dropped"] == {"empty": 1} and not summary["dropped"]
    with pytest.raises(UserError, match="all 1 evaluation rows were dropped"):
        sft(config, [long])
