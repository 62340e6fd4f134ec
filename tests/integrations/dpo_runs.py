"""Trainings by TRL's DPO, accelerated and by ours, and what has to be equal in them."""

import pytest
import trl

from srlm_fast.integrations.trl import SrlmDPOTrainer, accelerate

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip
CUTS = ((12, 12), (5, 5), (1, 12), (7, 3), (2, 2), (12, 4), (8, 8), (3, 9))


class OnTokenIds(trl.DPOTrainer):
    """TRL tokenises what it is given; our rows are token ids."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def record(trainer):
    """The loss and gradients of one batch, and then all that is logged in training."""
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.log({})  # what that batch was measured as
    trainer._total_train_tokens = 0
    trainer.state.log_history.clear()
    trainer.train()
    return loss.detach(), found, trainer.state.log_history


def check_equal(found, expected, what=""):
    """From equal weights equal losses and gradients, and equal ways from there."""
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-5, abs=1e-7), what
    assert found[1].keys() == expected[1].keys()
    # discopop weighs by sigmoid(x / 0.05), twenty times the rounding of a log-prob.
    tolerance = 1e-4 if what == "discopop" else 1e-5
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name
    check_logs(found[2], expected[2])


def check_logs(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if "runtime" not in name and "per_second" not in name:
                wanted = pytest.approx(theirs[name], rel=1e-5 if name == "loss" else 1e-4, abs=1e-5)
                assert ours[name] == wanted, (name, theirs["step"])


def compare(make, what="", **options):
    """TRL's trainer, the same accelerated, and ours."""
    expected = record(make(OnTokenIds, **options))
    check_equal(record(accelerate(make(OnTokenIds, **options))), expected, what)
    trainer = make(SrlmDPOTrainer, **options)
    check_equal(record(trainer), expected, what)
    return trainer
