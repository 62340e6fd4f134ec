"""Training on pairs that are made on the way: against a plain loop, and against offline."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from srlm_fast.config import PreferenceConfig
from srlm_fast.errors import UserError
from srlm_fast.model.weights import frozen_copy
from srlm_fast.train.noise import Refinement
from srlm_fast.train.online import train_online
from srlm_fast.train.plan import plan_steps
from srlm_fast.train.preference import train_preference

CONFIG = PreferenceConfig(
    learning_rate=3e-3, num_train_epochs=2, per_device_train_batch_size=5, logging_steps=1,
    warmup_ratio=0.3,
)  # fmt: skip
REFINE = Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6)


@pytest.fixture
def online(make_model):
    def run(draw, steps, config=CONFIG, refine=None, dtype=torch.float64):
        """draw: called with the model and the step."""
        model, logs = make_model(dtype=dtype), []
        reference = frozen_copy(model)
        pairs, summary = train_online(
            model, reference, lambda step: draw(model, step), steps, config, refine=refine,
            num_pairs=12, seed=0, pad_id=0, log=logs.append,
        )  # fmt: skip
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return weights, summary, logs, pairs

    return run


def log_likelihood(model, pair, response):
    ids = torch.tensor([[*pair.prompt_ids, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), list(response)].sum()


def ordered(model, pair):
    """The likelier response of `pair` chosen, by the model as it is."""
    with torch.no_grad():
        first, second = (
            float(log_likelihood(model, pair, r)) for r in (pair.chosen_ids, pair.rejected_ids)
        )
    if first >= second:
        return pair
    return replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)


def test_each_step_is_judged_by_the_model_as_it_is_then(online, make_model, pairs):
    """Online DPO written out: a step's labels are those of the weights before it, AdamW, and a
    fixed reference. Nine steps over four prompts, whose labels change on the way."""
    batches = [pairs[i % 4 : i % 4 + 2] for i in range(9)]
    config = replace(CONFIG, lr_scheduler_type="constant", warmup_ratio=0, learning_rate=3e-2)
    weights, summary, _, found = online(
        lambda model, step: [ordered(model, pair) for pair in batches[step]], 9, config
    )
    model = make_model()
    reference, drawn = copy.deepcopy(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.0, foreach=False)
    for batch in batches:
        total, labelled = 0.0, [ordered(model, pair) for pair in batch]
        for pair in labelled:
            policy, ref = (
                log_likelihood(m, pair, pair.chosen_ids)
                - log_likelihood(m, pair, pair.rejected_ids)
                for m in (model, reference)
            )
            total = total - logsigmoid(0.1 * (policy - ref.detach())) / len(batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        drawn += labelled
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights, expected, atol=1e-9, rtol=0)
    assert found == drawn and summary["pairs"] == 18 and summary["steps"] == 9
    assert found != [ordered(reference, pair) for batch in batches for pair in batch]


@pytest.mark.parametrize(
    ("changes", "refine"),
    [
        ({}, None),
        ({"micro_batch_size": 2, "gradient_checkpointing": True, "rpo_alpha": 0.2}, None),
        ({"micro_batch_size": 2}, REFINE),
        ({}, replace(REFINE, tau="official")),
        ({"sync_ref_model": True, "ref_model_sync_steps": 2}, None),
    ],
)
def test_pairs_that_are_known_train_as_they_do_offline(online, make_model, pairs, changes, refine):
    """Bit for bit, with the same log and summary."""
    config = replace(CONFIG, **changes)
    plan = plan_steps(range(len(pairs)), config, seed=0)
    weights, summary, logs, found = online(
        lambda model, step: [pairs[i] for i in plan[step]], len(plan), config, refine
    )
    model, expected_logs = make_model(), []
    expected = train_preference(
        model, frozen_copy(model), pairs, config, refine=refine, seed=0, pad_id=0,
        log=expected_logs.append,
    )  # fmt: skip
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert logs == expected_logs and found == [pairs[i] for step in plan for i in step]
    assert summary.pop("empty_steps") == 0 and summary.pop("pairs") == 2 * expected.pop("pairs")
    if refine:
        flags = summary.pop("flags")
        assert len(flags) == 24
        last = dict(zip([i for s in plan for i in s], flags, strict=True))
        assert [last[i] for i in range(12)] == expected.pop("flags")
    assert summary == expected


def test_steps_without_pairs_pass(online, pairs):
    """The first, one in the midst and the last; weights are those of the others' steps at their
    learning rates."""
    batches = [[], pairs[:3], [], pairs[3:5], []]
    weights, summary, logs, found = online(lambda _, step: batches[step], 5)
    assert found == pairs[:5] and summary["empty_steps"] == 3
    assert summary["steps"] == 5 and summary["pairs"] == 5 and summary["skipped_steps"] == 0
    assert [math.isnan(row["loss"]) for row in logs] == [True, False, True, False, True]
    assert summary["loss_first"] == logs[1]["loss"] and summary["loss_last"] == logs[3]["loss"]
    rarely, _, rows, _ = online(lambda _, step: batches[step], 5, replace(CONFIG, logging_steps=5))
    assert torch.equal(rarely, weights)
    assert rows[0]["loss"] == pytest.approx((logs[1]["loss"] + logs[3]["loss"]) / 2)


def test_a_training_without_any_pair_changes_nothing(online, make_model):
    weights, summary, _, found = online(lambda _, step: [], 3)
    assert torch.equal(
        weights, torch.cat([p.detach().flatten() for p in make_model().parameters()])
    )
    assert found == [] and summary["empty_steps"] == 3 and math.isnan(summary["loss_first"])


def test_what_cannot_be_used_is_counted(online, pairs):
    """Too long for the model, and without a response."""
    long = replace(pairs[0], chosen_ids=(2,) * 70)
    empty = replace(pairs[1], rejected_ids=())
    _, summary, _, found = online(
        lambda _, step: [long, pairs[2], empty] if step == 0 else [long], 2, refine=REFINE
    )
    assert found == [long, pairs[2], empty, long]
    assert summary["dropped"] == {"too_long": 2, "empty": 1} and summary["pairs"] == 1
    assert summary["empty_steps"] == 1 and len(summary["flags"]) == 4
    assert summary["flags"][0] is summary["flags"][2] is summary["flags"][3] is None


@pytest.mark.parametrize(
    ("changes", "refine", "complaint"),
    [
        ({"save_steps": 1}, None, "save_steps must be 0 where pairs are made"),
        ({"eval_steps": 1}, None, "eval_steps must be 0 where pairs are made"),
        ({"parallel": "shard"}, None, "parallel must be replicate where pairs are made"),
        ({"reference_cache": "logps"}, None, "reference_cache must be none where pairs are made"),
        ({}, replace(REFINE, tau="dataset"), "tau dataset scores all pairs of a round"),
    ],
)
def test_what_needs_all_pairs_is_refused(online, pairs, changes, refine, complaint):
    with pytest.raises(UserError, match=complaint):
        online(lambda _, step: pairs, 1, replace(CONFIG, **changes), refine)
