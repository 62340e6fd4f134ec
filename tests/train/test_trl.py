"""Steps of TRL's own DPOTrainer: equal gradients from equal weights, then equal losses, and its
evaluation."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.train_engines import policy_and_reference, random_pairs, trl_trainer
from srlm_fast.config import PreferenceConfig
from srlm_fast.train.loss import pair_loss
from srlm_fast.train.preference import PairForward, train_preference
from srlm_fast.train.reference import LiveReference
from srlm_kernels import losses

trl = pytest.importorskip("trl", reason="trl is not installed (extra [bench])")

SHAPE = {
    "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip
STEPS, RATE = 20, 1e-4
KINDS = sorted(set(losses.LOSSES) - {"simpo", "r_dpo"})  # which are not TRL's


@pytest.fixture(scope="module")
def models():
    return policy_and_reference(SHAPE, torch.float32)


@pytest.fixture(scope="module")
def pairs():
    """Ragged ones; the first two have equal responses' lengths."""
    made = random_pairs(4, 9, 12, SHAPE["vocab_size"])
    cuts = ((12, 12), (5, 5), (1, 12), (7, 3))
    return [
        replace(p, chosen_ids=p.chosen_ids[:a], rejected_ids=p.rejected_ids[:b])
        for p, (a, b) in zip(made, cuts, strict=True)
    ]


def trl_step(policy, reference, pairs, kind, smoothing):
    trainer, batch = trl_trainer(
        policy, reference, pairs, loss_type=[kind], beta=0.1, label_smoothing=smoothing
    )
    return lambda: trainer.compute_loss(trainer.model, dict(batch))


def our_step(policy, reference, pairs, kind, smoothing, layout):
    config = PreferenceConfig(loss_type=kind, beta=0.1, label_smoothing=smoothing)
    items = [((p.prompt_ids, p.chosen_ids), (p.prompt_ids, p.rejected_ids)) for p in pairs]
    forward = PairForward(policy, items, config, layout, 0, None)
    compared, loss = LiveReference(reference), pair_loss(config)
    return lambda: forward(range(len(pairs)), compared, loss, scale=1 / len(pairs))[0].loss


def gradients(policy, step):
    policy.zero_grad()
    step().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def run(policy, step):
    """Losses of plain SGD, which would show an error of scale that Adam hides."""
    optimizer, found = torch.optim.SGD(policy.parameters(), lr=RATE), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = step()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_losses_are_trls(models, pairs, kind, layout):
    smoothing = 0.1 if kind in ("exo_pair", "robust") else 0.0
    theirs, ours = (copy.deepcopy(models[0]) for _ in range(2))
    trl_runs = trl_step(theirs, models[1], pairs, kind, smoothing)
    we_run = our_step(ours, models[1], pairs, kind, smoothing, layout)
    expected, found = gradients(theirs, trl_runs), gradients(ours, we_run)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    losses_of_both = run(ours, we_run), run(theirs, trl_runs)
    assert losses_of_both[0] == pytest.approx(losses_of_both[1], rel=1e-5)
    assert losses_of_both[0][-1] < losses_of_both[0][0] - 1e-4


def test_evaluation_is_trls(models, pairs):
    """Every name that both give has the same value."""
    policy, logs = copy.deepcopy(models[0]), []
    config = PreferenceConfig(beta=0.1, learning_rate=1e-3, eval_steps=1)
    train_preference(
        policy, models[1], pairs, config, seed=0, pad_id=0, log=logs.append, eval_pairs=pairs,
        reference_is_start=False,
    )  # fmt: skip
    ours = {key: value for key, value in logs[-1].items() if key.startswith("eval_")}
    assert 0 <= ours.pop("eval_rewards/displaced") <= 1  # which TRL does not have
    trainer, _ = trl_trainer(policy, models[1], pairs, loss_type=["sigmoid"], beta=0.1)
    theirs = trainer.evaluate(eval_dataset=trainer.train_dataset)
    assert ours.keys() <= theirs.keys() and len(ours) == 7
    assert ours == pytest.approx({key: theirs[key] for key in ours}, rel=1e-5, abs=1e-6)
