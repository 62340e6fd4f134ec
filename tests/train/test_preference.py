import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from srlm_fast.config import PreferenceConfig
from srlm_fast.errors import UserError
from srlm_fast.model.weights import frozen_copy
from srlm_fast.train import preference
from srlm_fast.train.noise import Refinement
from srlm_fast.train.plan import plan_steps
from srlm_fast.train.preference import train_preference
from srlm_kernels import losses

CONFIG = PreferenceConfig(
    learning_rate=3e-3,
    num_train_epochs=2,
    per_device_train_batch_size=3,
    logging_steps=1,
    lr_scheduler_type="constant",
)
REFINE = Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6)


@pytest.fixture
def train(make_model, pairs):
    def run(config=CONFIG, refine=None, *, dtype=torch.float64, data=pairs, seed=0):
        model = make_model(dtype=dtype)
        logs = []
        summary = train_preference(
            model,
            frozen_copy(model),
            data,
            config,
            refine=refine,
            seed=seed,
            pad_id=0,
            log=logs.append,
        )
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return weights, summary, logs

    return run


@pytest.fixture
def plain_weights(make_model, pairs):
    """Training written from the papers' formulas: full logits, one pair at a time, plain AdamW."""

    def logits(model, prompt, response):
        ids = torch.tensor([[*prompt, *response]])
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]

    def pick(logits, response):
        return logits.log_softmax(-1)[torch.arange(len(response)), list(response)].sum()

    def run(
        plan, *, alphas=None, lam=0.0, window=0, k=0.0, rpo_alpha=0.0, beta=0.1, smoothing=None,
        sync=(1000, 0.0),
    ):  # fmt: skip
        model = make_model()
        reference = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, foreach=False)
        seen, flags = [], {}
        for step, indices in enumerate(plan):
            tau = sorted(seen[-window:])[int(window * k)] if 0 < window <= len(seen) else 0.0
            alpha, total = alphas[step] if alphas else 0.0, 0.0
            for i in indices:
                pair, sides = pairs[i], []
                for response in (pair.chosen_ids, pair.rejected_ids):
                    policy, ref = (logits(m, pair.prompt_ids, response) for m in (model, reference))
                    mixed = (1 + lam) * policy - lam * ref
                    logp, ref, ext = (pick(z, response) for z in (policy, ref, mixed))
                    sides.append((logp - ref.detach(), (ext - ref).detach(), logp / len(response)))
                margin = beta * (sides[0][0] - sides[1][0])
                ext_margin = beta * (sides[0][1] - sides[1][1]).item()
                seen.append(ext_margin)
                z = float(ext_margin < tau)
                if alpha:
                    flags[i] = bool(z)
                e = smoothing[i] if smoothing else alpha * z
                total = total - (1 - e) * logsigmoid(margin)
                total = total - e * logsigmoid(-margin) - rpo_alpha * sides[0][2]
            (total / len(indices)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            every, a = sync
            if (step + 1) % every == 0:
                for frozen, weight in zip(reference.parameters(), model.parameters(), strict=True):
                    frozen.data = a * weight.data + (1 - a) * frozen.data
        return torch.cat([p.detach().flatten() for p in model.parameters()]), flags

    return run


@pytest.fixture
def plan(pairs):
    """The optimiser steps of CONFIG at seed 0, in the order in which pairs are seen."""

    def longest(i):
        return len(pairs[i].prompt_ids) + max(len(pairs[i].chosen_ids), len(pairs[i].rejected_ids))

    return [sorted(step, key=longest) for step in plan_steps(range(len(pairs)), CONFIG, seed=0)]


@pytest.mark.parametrize("rpo_alpha", [0.0, 0.3])
def test_dpo_training_is_the_papers_formula(train, plain_weights, plan, rpo_alpha):
    """A known defect elsewhere: log-probs neither shifted nor summed."""
    weights, _, _ = train(replace(CONFIG, rpo_alpha=rpo_alpha))
    expected, _ = plain_weights(plan, rpo_alpha=rpo_alpha)
    torch.testing.assert_close(weights, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, micro_batch_size=1, rpo_alpha=0.2)])
def test_pairs_may_have_a_label_smoothing_of_their_own(train, plain_weights, plan, pairs, config):
    """CREAM's weight; the others have the configuration's."""
    own = [i / 11 if i % 3 else None for i in range(12)]
    data = [replace(pair, label_smoothing=e) for pair, e in zip(pairs, own, strict=True)]
    weights, _, _ = train(replace(config, label_smoothing=0.25), data=data)
    smoothing = [0.25 if e is None else e for e in own]
    expected, _ = plain_weights(plan, smoothing=smoothing, rpo_alpha=config.rpo_alpha)
    torch.testing.assert_close(weights, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("every", "alpha"), [(2, 0.6), (3, 1.0)])
@pytest.mark.parametrize("refine", [None, replace(REFINE, lam=4.0)])
def test_the_reference_may_follow_the_policy(train, plain_weights, plan, refine, every, alpha):
    """TR-DPO, soft and hard; with SPA, whose extrapolation is from the reference as it is then."""
    config = replace(
        CONFIG, sync_ref_model=True, ref_model_mixup_alpha=alpha, ref_model_sync_steps=every
    )
    weights, summary, logs = train(config, refine)
    spa = {"alphas": [0.0, 0.0, *[0.3] * 6], "lam": 4.0, "window": 6, "k": 0.4} if refine else {}
    expected, flags = plain_weights(plan, sync=(every, alpha), **spa)
    torch.testing.assert_close(weights, expected, atol=1e-9, rtol=0)
    assert (weights - plain_weights(plan, **spa)[0]).abs().max() > 1e-6, "it matters"
    assert summary["reference_updates"] == 8 // every
    assert not refine or summary["flags"] == [flags.get(i) for i in range(12)]
    if alpha == 1:  # the step after has policy and reference equal again
        assert [row["rewards/margins"] == 0 for row in logs] == [s % every == 0 for s in range(8)]


def test_only_dpo_can_smooth_the_labels_of_single_pairs(train, pairs):
    data = [replace(pairs[0], label_smoothing=0.1), *pairs[1:]]
    for config, refine in ((replace(CONFIG, loss_type="ipo"), None), (CONFIG, REFINE)):
        with pytest.raises(UserError, match=r"need preference\.loss_type sigmoid"):
            train(config, refine, data=data)
    with pytest.raises(UserError, match=r"must lie in 0\.\.1"):
        train(data=[replace(pairs[0], label_smoothing=1.5)])


@pytest.mark.parametrize("lam", [0.0, 4.0])
def test_spa_training_is_the_papers_formula(train, plain_weights, plan, lam):
    """Refined loss with decoupled flags; lambda 0 is plain self-refinement."""
    weights, summary, _ = train(refine=replace(REFINE, lam=lam))
    alphas = [0.0, 0.0, *[0.3] * 6]  # off in the first 20 % of 8 steps
    expected, flags = plain_weights(plan, alphas=alphas, lam=lam, window=6, k=0.4)
    torch.testing.assert_close(weights, expected, atol=1e-9, rtol=0)
    assert summary["flags"] == [flags.get(i) for i in range(12)]
    assert {True, False} <= set(summary["flags"])


@pytest.mark.parametrize("tau", ["window", "dataset", "official"])
def test_alpha_zero_is_dpo_bit_for_bit(train, tau):
    plain, _, _ = train(dtype=torch.float32)
    refined, summary, _ = train(refine=replace(REFINE, alpha=0.0, tau=tau), dtype=torch.float32)
    assert torch.equal(plain, refined)
    assert summary["flags"] == [None] * 12


def test_lambda_zero_is_plain_self_refinement_bit_for_bit(train, monkeypatch):
    """The same run with the detector reading the policy's own margins instead."""
    zero, summary, _ = train(refine=replace(REFINE, lam=0.0), dtype=torch.float32)
    op = preference.linear_preference_loss

    def without_extrapolation(*args, extrapolation, **kwargs):
        return op(*args, extrapolation=None, **kwargs)

    monkeypatch.setattr(preference, "linear_preference_loss", without_extrapolation)
    plain, other, _ = train(refine=REFINE, dtype=torch.float32)
    assert torch.equal(zero, plain)
    assert summary["flags"] == other["flags"]


def test_decoupling_changes_the_flags(train):
    """Guards against lambda being ignored, as in the authors' shipped configuration."""
    flags = [train(refine=replace(REFINE, lam=lam))[1]["flags"] for lam in (0.0, 4.0)]
    assert flags[0] != flags[1]


@pytest.mark.parametrize("refine", [None, REFINE, replace(REFINE, tau="dataset", interval=2)])
@pytest.mark.parametrize(("layout", "micro"), [("padded", 0), ("shared", 2), ("padded", 2)])
def test_layout_and_accumulation_do_not_change_the_training(train, refine, layout, micro):
    whole, summary, _ = train(refine=refine)
    other, again, _ = train(replace(CONFIG, layout=layout, micro_batch_size=micro), refine)
    torch.testing.assert_close(other, whole, atol=1e-10, rtol=0)
    assert again.get("flags") == summary.get("flags")


def test_first_loss_is_ln_2_and_first_margin_exactly_0(train):
    one_step = replace(CONFIG, num_train_epochs=1, per_device_train_batch_size=12)
    for config in (one_step, replace(one_step, layout="padded", micro_batch_size=5)):
        _, summary, logs = train(config, dtype=torch.float32)
        assert summary["loss_first"] == pytest.approx(math.log(2), abs=1e-6)
        assert logs[0]["rewards/margins"] == 0.0 and logs[0]["rewards/chosen"] == 0.0


def test_a_reference_that_is_not_the_start_is_found_before_any_update(make_model, pairs):
    model, reference = make_model(), frozen_copy(make_model())
    with torch.no_grad():
        reference.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-9
    before = copy.deepcopy(model.state_dict())
    arguments = {"seed": 0, "pad_id": 0, "log": lambda row: None}
    with pytest.raises(RuntimeError, match="margin of the first step is"):
        train_preference(model, reference, pairs, CONFIG, **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    train_preference(model, reference, pairs, CONFIG, reference_is_start=False, **arguments)


def test_a_broken_model_is_told_from_a_wrong_reference(make_model, pairs):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(RuntimeError, match="not finite, before any training"):
        train_preference(
            model, frozen_copy(model), pairs, CONFIG, seed=0, pad_id=0, log=lambda row: None
        )


@pytest.mark.parametrize("refine", [None, REFINE, replace(REFINE, tau="dataset")])
@pytest.mark.parametrize("bad_step", [0, 3])
def test_a_pair_that_is_not_finite_costs_its_step_alone(make_model, pairs, plan, refine, bad_step):
    """In the first step it ended the training: the model was called broken."""
    model, start = make_model(tied=False), make_model(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = math.nan
    config, first = replace(CONFIG, num_train_epochs=1, micro_batch_size=1), plan[bad_step][0]
    safe = [
        replace(
            p, prompt_ids=tuple(min(t, 59) for t in p.prompt_ids),
            chosen_ids=tuple(min(t, 59) for t in p.chosen_ids),
            rejected_ids=tuple(min(t, 59) for t in p.rejected_ids),
        )
        for p in pairs
    ]  # fmt: skip
    safe[first] = replace(safe[first], chosen_ids=(60, *safe[first].chosen_ids[1:]))
    logs = []
    summary = train_preference(
        model, frozen_copy(model), safe, config, refine=refine, seed=0, pad_id=0, log=logs.append
    )
    assert summary["skipped_steps"] == 1 and summary["steps"] == 4
    assert [math.isnan(row["loss"]) for row in logs] == [step == bad_step for step in range(4)]
    weights = {name: p for name, p in model.named_parameters() if "embed" not in name}
    moved = [not torch.equal(p, start.get_parameter(name)) for name, p in weights.items()]
    assert all(p.isfinite().all() for p in weights.values()) and all(moved)


def test_a_wrong_loss_is_found_at_the_first_step(train, monkeypatch):
    monkeypatch.setattr(losses.dpo, "__call__", lambda self, s: -2 * logsigmoid(s.margin))
    with pytest.raises(RuntimeError, match="differs from ln 2"):
        train(CONFIG)


def test_metrics_are_trls_and_their_values_those_of_the_models(
    train, make_model, pairs, response_logps
):
    config = replace(CONFIG, num_train_epochs=1, per_device_train_batch_size=12)
    _, summary, (row,) = train(config, REFINE)
    names = "loss grad_norm learning_rate epoch step num_tokens logps/chosen logps/rejected "
    names += "rewards/chosen rewards/rejected rewards/accuracies rewards/margins "
    names += "rewards/displaced spa/tau spa/flagged_share spa/extrapolated_margin"
    assert set(row) == set(names.split())
    model = make_model()
    with torch.no_grad():
        chosen = [response_logps(model, p.prompt_ids, p.chosen_ids).sum().item() for p in pairs]
    assert row["logps/chosen"] == pytest.approx(sum(chosen) / 12, rel=1e-5)
    lengths = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs]
    assert row["num_tokens"] == sum(lengths)
    assert row["rewards/accuracies"] == row["rewards/displaced"] == 0.0 and summary["pairs"] == 12


def test_summary_tells_displacement_in_nats_over_the_last_quarter(train):
    _, summary, logs = train()
    late = logs[6:]  # of 8
    for key, metric, unit in [
        ("margins", "rewards/margins", 1.0),
        ("accuracies", "rewards/accuracies", 1.0),
        ("displaced", "rewards/displaced", 1.0),
        ("chosen_logp_change", "rewards/chosen", CONFIG.beta),
        ("rejected_logp_change", "rewards/rejected", CONFIG.beta),
    ]:
        assert summary[key] == pytest.approx(
            sum(r[metric] for r in late) / len(late) / unit, rel=1e-5
        )
    assert summary["accuracies"] > 0.5 and summary["loss_last"] < summary["loss_first"]
    assert summary["chosen_logp_change"] > summary["rejected_logp_change"]


def test_the_reference_is_never_touched(make_model, pairs):
    model = make_model()
    reference = frozen_copy(model)
    before = copy.deepcopy(reference.state_dict())
    train_preference(
        model, reference, pairs, CONFIG, refine=REFINE, seed=0, pad_id=0, log=lambda row: None
    )
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())
    assert all(p.grad is None for m in (model, reference) for p in m.parameters())


def test_two_runs_are_equal_bit_for_bit(train):
    runs = [train(refine=REFINE, dtype=torch.float32, seed=seed) for seed in (4, 4, 5)]
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert not torch.equal(runs[0][0], runs[2][0])


def test_bf16_trains_from_an_exact_start(train):
    _, summary, _ = train(replace(CONFIG, learning_rate=1e-3), REFINE, dtype=torch.bfloat16)
    assert summary["loss_first"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["loss_last"] < summary["loss_first"]


def test_every_loss_type_trains(train):
    config = replace(CONFIG, num_train_epochs=2, per_device_train_batch_size=12)
    for name in losses.LOSSES:
        smoothing = 0.1 if name == "exo_pair" else 0.0
        _, summary, _ = train(replace(config, loss_type=name, label_smoothing=smoothing))
        assert math.isfinite(summary["loss_last"]) and summary["skipped_steps"] == 0


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_a_loss_that_sorts_pairs_says_that_a_cut_step_is_another_one(train, loss_type, recwarn):
    config = replace(CONFIG, loss_type=loss_type)
    train(config)
    train(replace(CONFIG, micro_batch_size=2))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"{loss_type} sorts the pairs of a forward"):
        train(replace(config, micro_batch_size=2))


def test_identical_responses_give_no_gradient_but_are_allowed(train, pairs):
    same = [replace(p, rejected_ids=p.chosen_ids) for p in pairs]
    _, summary, logs = train(data=same)
    # Not exactly 0: a BLAS may give equal rows of one matrix unequal last bits.
    assert abs(summary["margins"]) < 1e-12
    assert all(row["grad_norm"] < 1e-12 for row in logs)


def test_dropped_pairs_are_counted_and_have_no_flag(train, pairs):
    data = [replace(pairs[0], chosen_ids=(5,) * 40), *pairs[1:]]
    _, summary, _ = train(replace(CONFIG, max_length=20), REFINE, data=data)
    assert summary["pairs"] == 11 and summary["dropped"] == {"too_long": 1}
    assert summary["flags"][0] is None and len(summary["flags"]) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "exo_pair"}, r"preference.loss_type exo_pair: label_smoothing must lie in"),
        ({"loss_type": "sigmod"}, "unknown preference.loss_type 'sigmod'.*sigmoid"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"max_length": 2}, "all 12 training rows were dropped"),
    ],
)
def test_user_mistakes_are_one_sentence(train, change, message):
    with pytest.raises(UserError, match=message):
        train(replace(CONFIG, **change))


def test_no_pairs_is_a_user_error(train):
    with pytest.raises(UserError, match="empty"):
        train(data=[])


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(
    train, layout, monkeypatch
):
    calls = 0
    forward = MistralDecoderLayer.forward

    def counted(self, *args, **kwargs):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MistralDecoderLayer, "forward", counted)
    config = replace(CONFIG, layout=layout)
    plain, summary, _ = train(config, REFINE)
    once, calls = calls, 0
    kept, again, _ = train(replace(config, gradient_checkpointing=True), REFINE)
    assert calls == 2 * once > 0
    assert torch.equal(kept, plain) and again == summary
