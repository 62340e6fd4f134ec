"""A step that runs out of memory is done again in smaller parts, and changes nothing."""

from dataclasses import replace

import pytest
import torch

from srlm_fast.config import PreferenceConfig
from srlm_fast.errors import UserError
from srlm_fast.model.weights import frozen_copy
from srlm_fast.parallel import ALONE
from srlm_fast.train import batches
from srlm_fast.train.evaluation import held_out_means
from srlm_fast.train.noise import Refinement
from srlm_fast.train.plan import MicroBatches
from srlm_fast.train.preference import PairForward, train_preference

CONFIG = PreferenceConfig(
    learning_rate=3e-3, num_train_epochs=2, per_device_train_batch_size=6, logging_steps=1
)


@pytest.fixture
def train(make_model, pairs, tmp_path):
    def run(config=CONFIG, refine=None, eval_pairs=()):
        model, logs = make_model(), []
        other = frozen_copy(model) if config.reference_cache == "none" else model
        summary = train_preference(
            model, other, pairs, config, refine=refine, seed=0, pad_id=0, log=logs.append,
            eval_pairs=eval_pairs, cache=tmp_path,
        )  # fmt: skip
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return weights, summary, logs

    return run


@pytest.fixture
def small_memory(monkeypatch):
    """Room for so many tokens in a forward that has gradients, from the third one on, or later."""

    def limit(tokens, after=2):
        states, calls = batches.Batch.states, 0

        def limited(self, model):
            nonlocal calls
            calls += torch.is_grad_enabled()
            if torch.is_grad_enabled() and calls > after and self.num_tokens > tokens:
                raise torch.OutOfMemoryError("no room")
            return states(self, model)

        monkeypatch.setattr(batches.Batch, "states", limited)

    return limit


@pytest.mark.parametrize("tau", [None, "window", "dataset"])
@pytest.mark.filterwarnings("ignore:out of memory")
def test_the_result_is_that_of_enough_memory(train, small_memory, tau):
    refine = tau and Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6, tau=tau)
    weights, summary, logs = train(refine=refine)
    small_memory(60)
    again, other, later = train(refine=refine)
    torch.testing.assert_close(again, weights, atol=1e-10, rtol=0)
    assert summary["out_of_memory"] == 0 and other["out_of_memory"] > 0
    assert other.get("flags") == summary.get("flags")
    assert other["num_tokens"] == summary["num_tokens"]
    for row, expected in zip(later, logs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("tau", [None, "window"])
@pytest.mark.parametrize("after", [2, 10])  # in the first step, or in the last
@pytest.mark.filterwarnings("ignore:out of memory")
def test_what_a_step_had_before_memory_ran_out_is_forgotten(train, small_memory, tau, after):
    """Its shorter micro-batches had given gradients, losses, metrics and margins already."""
    refine = tau and Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6, tau=tau)
    config = replace(CONFIG, micro_batch_size=2)
    weights, summary, logs = train(config, refine)
    small_memory(32, after)
    again, other, later = train(config, refine)
    torch.testing.assert_close(again, weights, atol=1e-10, rtol=0)
    assert summary.pop("out_of_memory") == 0 < other.pop("out_of_memory")
    assert other.pop("flags", None) == summary.pop("flags", None)
    dropped = summary.pop("dropped"), other.pop("dropped")
    assert dropped == ({}, {}) and other == pytest.approx(summary, rel=1e-5, abs=1e-8)
    for row, expected in zip(later, logs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_it_is_said_and_the_smaller_parts_stay(train, small_memory):
    small_memory(60)
    with pytest.warns(UserWarning, match=r"out of memory in step \d.*at most \d+ tokens") as said:
        _, summary, _ = train()
    assert len(said) == summary["out_of_memory"] < 4


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_pair_that_does_not_fit_alone_ends_the_training(train, small_memory):
    small_memory(3)
    with pytest.raises(UserError, match=r"out of memory with a single item of .*checkpointing"):
        train(replace(CONFIG, micro_batch_size=2))


@pytest.fixture
def held_out(pairs):
    """Pairs that are longer than those trained on."""
    long = [(*range(2, 22),), (*range(20, 40),), (*range(12, 28),)]
    return [
        replace(pair, prompt_ids=(*long[0], i + 2), chosen_ids=long[1], rejected_ids=long[2])
        for i, pair in enumerate(pairs[:5])
    ]


@pytest.fixture
def small_evaluation(monkeypatch):
    """Room for so many tokens in a forward of any kind."""

    def limit(tokens):
        states = batches.Batch.states

        def limited(self, model):
            if self.num_tokens > tokens:
                raise torch.OutOfMemoryError("no room")
            return states(self, model)

        monkeypatch.setattr(batches.Batch, "states", limited)

    return limit


EVALUATED = replace(CONFIG, per_device_train_batch_size=3, eval_steps=3)


def test_an_evaluation_is_done_again_in_smaller_parts(train, small_evaluation, held_out):
    """And the training is as it was: what is trained on is short enough."""
    weights, summary, logs = train(EVALUATED, eval_pairs=held_out)
    small_evaluation(90)
    with pytest.warns(UserWarning, match=r"in an evaluation.*at most \d+ tokens"):
        again, other, later = train(EVALUATED, eval_pairs=held_out)
    assert torch.equal(again, weights) and other == summary and not other["out_of_memory"]
    for row, expected in zip(later, logs, strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-11)
        assert row == expected or "eval_loss" in row


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_held_out_pair_that_does_not_fit_alone_is_one_sentence(train, small_evaluation, held_out):
    small_evaluation(54)
    with pytest.raises(UserError, match=r"single item of 57 tokens: lower max_length"):
        train(replace(EVALUATED, per_device_train_batch_size=2), eval_pairs=held_out)


def test_an_evaluation_with_sharded_weights_ends_there(make_model):
    """The other ranks are in the midst of a forward."""

    def sums(indices):
        raise torch.OutOfMemoryError("no room")

    ranks, items = replace(ALONE, sharded=True), [(((2, 3), (4, 5)),)] * 4
    with pytest.raises(UserError, match=r"weights are sharded.*set micro_batch_tokens to \d+$"):
        held_out_means(
            make_model(), range(4), MicroBatches(items, CONFIG, "shared", ranks), sums, ranks
        )


@pytest.mark.parametrize("cache", ["logps", "states"])
def test_caching_a_reference_is_done_again_in_smaller_parts(train, monkeypatch, cache):
    """It ended the run with a traceback: only steps and evaluations were done again."""
    weights, summary, _ = train()
    states = batches.Batch.states

    def limited(self, model):
        """Room for 60 tokens in a forward of the reference."""
        if not torch.is_grad_enabled() and self.num_tokens > 60:
            raise torch.OutOfMemoryError("no room")
        return states(self, model)

    monkeypatch.setattr(batches.Batch, "states", limited)
    with pytest.warns(UserWarning, match=r"in caching the reference.*at most \d+ tokens"):
        again, other, _ = train(replace(CONFIG, reference_cache=cache))
    torch.testing.assert_close(again, weights, atol=1e-10, rtol=0)
    assert not other["out_of_memory"] and other["num_tokens"] == summary["num_tokens"]


def test_scoring_for_tau_is_done_again_in_smaller_parts(train, monkeypatch):
    """It halved what the steps have at once, and ended trainings whose steps were single pairs."""
    refine = Refinement(alpha=0.3, lam=0.5, k_percent=40.0, tau="dataset")
    weights, summary, _ = train(refine=refine)
    score = PairForward.ext_margins

    def limited(self, micros, *rest):
        if max(map(len, micros)) > 2:
            raise torch.OutOfMemoryError("no room")
        return score(self, micros, *rest)

    monkeypatch.setattr(PairForward, "ext_margins", limited)
    with pytest.warns(UserWarning, match="in scoring the pairs for tau"):
        again, other, _ = train(refine=refine)
    torch.testing.assert_close(again, weights, atol=1e-12, rtol=0)
    assert other["flags"] == summary["flags"] and not other["out_of_memory"]
