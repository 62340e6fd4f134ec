"""Training on two and three ranks is training on one: weights, losses, kept pairs, flags."""

import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from srlm_fast.config import PreferenceConfig, TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.weights import frozen_copy
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.batches import Batch
from srlm_fast.train.checkpoint import Checkpoints
from srlm_fast.train.noise import Refinement
from srlm_fast.train.plan import MicroBatches, plan_steps
from srlm_fast.train.preference import PreferenceSteps, train_preference
from srlm_fast.train.sft import train_sft
from tests.srlm_kernels import ranks as processes
from tests.train.tiny import draw_pairs, draw_rows, new_model

# 12 pairs in steps of five, five and two: on three ranks somebody has nothing in the last.
CONFIG = PreferenceConfig(
    learning_rate=3e-3, num_train_epochs=2, per_device_train_batch_size=5, logging_steps=2
)
MOVING = replace(
    CONFIG, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3, eval_steps=3
)
REFINE = Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6)


def here():
    return Ranks(dist.get_rank(), dist.get_world_size())


def trained(ranks, config=CONFIG, refine=None, *, dtype=torch.float64, cache=None, data=None):
    model, logs = new_model(dtype=dtype), []
    summary = train_preference(
        model, frozen_copy(model), data or draw_pairs(), config, refine=refine, seed=0, pad_id=0,
        log=logs.append, ranks=ranks, cache=cache,
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters()]), summary, logs


def assert_same(found, expected, *, rtol=1e-9):
    """Weights to 1e-10, and every number of the summary and of the logs."""
    weights, summary, logs = found
    torch.testing.assert_close(weights, expected[0], atol=1e-10, rtol=0)
    for row, other in zip([summary, *logs], [expected[1], *expected[2]], strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            if isinstance(value, float):
                assert math.isclose(value, other[key], rel_tol=rtol, abs_tol=1e-11), key
            else:
                assert value == other[key], key
    ranks = here()
    for other in ranks.gather([weights]):
        assert torch.equal(other, weights), "the ranks differ among themselves"
    assert ranks.gather([str((summary, logs))]) == [str((summary, logs))] * ranks.world


def sft_is_that_of_one_rank():
    def run(ranks, config):
        model, logs = new_model(), []
        summary = train_sft(
            model, draw_rows(), config, seed=0, pad_id=0, log=logs.append, ranks=ranks
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()]), summary, logs

    config = TrainConfig(learning_rate=3e-3, per_device_train_batch_size=7, logging_steps=3)
    for changed in (config, replace(config, micro_batch_size=2, layout="padded")):
        assert_same(run(here(), changed), run(ALONE, changed))


def dpo_is_that_of_one_rank():
    for config in (CONFIG, replace(CONFIG, micro_batch_size=1, rpo_alpha=0.2, logging_steps=1)):
        assert_same(trained(here(), config), trained(ALONE, config))


def spa_is_that_of_one_rank():
    for refine in (REFINE, replace(REFINE, tau="dataset", interval=2)):
        found = trained(here(), CONFIG, refine)
        assert_same(found, trained(ALONE, CONFIG, refine))
        assert {True, False} <= set(found[1]["flags"])


def official_tau_knows_its_own_rank_only():
    weights, summary, _ = trained(here(), CONFIG, replace(REFINE, tau="official"))
    assert None not in summary["flags"]
    assert all(torch.equal(other, weights) for other in here().gather([weights]))


def most_ranks_may_have_nothing():
    """Steps of one pair; the other ranks never compute anything, and know no metric's name."""
    config = replace(CONFIG, per_device_train_batch_size=1)
    for refine in (None, REFINE):
        assert_same(trained(here(), config, refine), trained(ALONE, config, refine))


def references_may_be_cached():
    ranks = here()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(ranks.from_main(name))  # where all of them look
        for kind, refine in (("logps", None), ("states", REFINE)):
            config = replace(CONFIG, reference_cache=kind)
            found = trained(ranks, config, refine, cache=folder / "shared")
            assert_same(found, trained(ALONE, config, refine, cache=Path(name) / "alone"))
        ranks.barrier()


@contextmanager
def states(change) -> Iterator[None]:
    """`change(batch, states)` in place of what a forward gives."""
    plain = Batch.states
    with mock.patch.object(Batch, "states", lambda self, model: change(self, plain(self, model))):
        yield


def a_step_that_is_not_finite_is_skipped_by_all():
    """One pair's forward is NaN, and so on one rank only; it is in one step of each epoch."""
    pairs = draw_pairs()
    steps = plan_steps(range(len(pairs)), CONFIG, 0)
    odd = next(i for i in range(len(pairs)) if i not in steps[0])
    marker = torch.tensor(pairs[odd].chosen_ids)

    def change(batch, found):
        lengths = batch.cu_seqlens.diff().tolist()
        for rows, part in zip(batch.rows.split(lengths), batch.target.split(lengths), strict=True):
            if torch.equal(part, marker):
                return found.index_fill(0, rows, math.nan)
        return found

    with states(change):
        found, alone = trained(here(), CONFIG, REFINE), trained(ALONE, CONFIG, REFINE)
    assert found[1]["skipped_steps"] == 2 and found[0].isfinite().all()
    assert_same(found, alone)


def memory_may_run_out_on_one_rank():
    ranks, once = here(), []

    def change(batch, found):
        """The last rank has no room for two pairs at once, but in the first step."""
        once.append(batch)
        if ranks.rank == ranks.world - 1 and len(once) > 2 and len(batch.cu_seqlens) > 3:
            raise torch.OutOfMemoryError("no room")
        return found

    for refine in (None, REFINE, replace(REFINE, tau="dataset", interval=2)):
        config = replace(CONFIG, per_device_train_batch_size=8)
        alone = trained(ALONE, config, refine)
        once.clear()
        with states(change), warnings.catch_warnings(record=True):
            found = trained(ranks, config, refine)
        assert found[1].pop("out_of_memory") > 0 == alone[1].pop("out_of_memory")
        assert_same(found, alone)


def a_pair_that_does_not_fit_ends_all_ranks():
    ranks = here()

    def change(batch, found):
        if ranks.rank == ranks.world - 1:
            raise torch.OutOfMemoryError("no room")
        return found

    refused = pytest.raises(UserError, match="out of memory with a single item")
    with states(change), warnings.catch_warnings(record=True), refused:
        trained(ranks)


def sixteen_bit_weights_stay_the_same_on_all_ranks():
    weights, summary, _ = trained(here(), dtype=torch.bfloat16)
    assert all(torch.equal(other, weights) for other in here().gather([weights]))
    assert summary["loss_last"] < summary["loss_first"]


def weights_that_differ_are_noticed():
    """Before the first step, and where they parted on the way."""
    ranks = here()
    noticed = pytest.raises(RuntimeError, match="weights differ between the processes")
    model = new_model(seed=ranks.rank)
    with noticed:
        train_preference(
            model, frozen_copy(model), draw_pairs(), CONFIG, seed=0, pad_id=0,
            log=lambda row: None, ranks=ranks,
        )  # fmt: skip
    with noticed, mock.patch.object(Ranks, "sum_", lambda self, tensors: None):
        trained(ranks)


@contextmanager
def shared_folder():
    """Where all ranks look."""
    ranks = here()
    with tempfile.TemporaryDirectory() as name:
        yield Path(ranks.from_main(name)) / "files"
        ranks.barrier()


def assert_goes_on(train):
    """`train(folder, save_steps)`, stopped after every step, is what it is in one go, to the last
    bit. It returns a tensor, the summary and the logs."""
    write = Checkpoints.write

    def write_and_stop(self, found):
        write(self, found)
        raise KeyboardInterrupt

    with shared_folder() as folder:
        expected, stops = train(folder / "whole", 0), 0
        while True:
            try:
                with mock.patch.object(Checkpoints, "write", write_and_stop):
                    found = train(folder, 1)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops == expected[1]["steps"]
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def a_training_that_is_stopped_goes_on():
    """With what each rank keeps of its own; evaluation is shared as well."""
    config = replace(CONFIG, eval_steps=3, logging_steps=4, micro_batch_size=1)

    def train(refine, folder, save_steps):
        model, logs = new_model(dtype=torch.float32), []
        summary = train_preference(
            model, frozen_copy(model), draw_pairs(), replace(config, save_steps=save_steps),
            refine=refine, seed=0, pad_id=0, log=logs.append, ranks=here(),
            eval_pairs=draw_pairs()[:5], checkpoint=folder,
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()]), summary, logs

    for refine in (REFINE, replace(REFINE, tau="official")):
        assert_goes_on(partial(train, refine))


def references_may_move():
    """Whole or in shares, and when the training is stopped."""

    def train(config, ranks, folder=None, save_steps=0):
        model, logs = new_model(), []
        reference = frozen_copy(model)
        summary = train_preference(
            model, reference, draw_pairs(), replace(config, save_steps=save_steps), refine=REFINE,
            seed=0, pad_id=0, log=logs.append, ranks=ranks, eval_pairs=draw_pairs()[:5],
            checkpoint=folder,
        )  # fmt: skip
        both = [p.detach().flatten() for m in (model, reference) for p in m.parameters()]
        return torch.cat(both), summary, logs

    for config in (MOVING, replace(MOVING, parallel="shard")):
        assert_same(train(config, here()), train(config, ALONE))
        assert_goes_on(partial(train, config, here()))


def evaluated(ranks, config):
    model, logs = new_model(), []
    train_preference(
        model, frozen_copy(model), draw_pairs(), config, seed=0, pad_id=0, log=logs.append,
        ranks=ranks, eval_pairs=draw_pairs()[:5],
    )  # fmt: skip
    found = [row for row in logs if "eval_loss" in row]
    assert len(found) == 2
    return found


def held_out_pairs_are_shared():
    config = replace(CONFIG, eval_steps=3)
    for row, expected in zip(evaluated(here(), config), evaluated(ALONE, config), strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-11)


def memory_may_run_out_in_an_evaluation_on_one_rank():
    config, ranks = replace(CONFIG, eval_steps=2, per_device_train_batch_size=8), here()
    plain, alone = PreferenceSteps.eval_sums, evaluated(ALONE, config)

    def limited(self, indices):
        if ranks.main and len(indices) > 1:
            raise torch.OutOfMemoryError("no room")
        return plain(self, indices)

    small = mock.patch.object(PreferenceSteps, "eval_sums", limited)
    with small, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = evaluated(ranks, config)
    assert sum("in an evaluation" in str(warning.message) for warning in said) >= 2
    for row, expected in zip(found, alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-11)


CHECKS = [
    sft_is_that_of_one_rank,
    dpo_is_that_of_one_rank,
    spa_is_that_of_one_rank,
    official_tau_knows_its_own_rank_only,
    most_ranks_may_have_nothing,
    references_may_be_cached,
    references_may_move,
    a_step_that_is_not_finite_is_skipped_by_all,
    memory_may_run_out_on_one_rank,
    a_pair_that_does_not_fit_ends_all_ranks,
    sixteen_bit_weights_stay_the_same_on_all_ranks,
    weights_that_differ_are_noticed,
    a_training_that_is_stopped_goes_on,
    held_out_pairs_are_shared,
    memory_may_run_out_in_an_evaluation_on_one_rank,
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return processes.start(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ranks(check, world, outputs):
    processes.assert_passed(check, outputs[world])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_whole_and_balanced(world):
    items = [(row,) for row in draw_rows()]
    step = [3, 17, 4, 9, 20, 11, 0]
    found = [
        MicroBatches(items, CONFIG, "padded", Ranks(rank, world)).shares(step)
        for rank in range(world)
    ]
    assert all(shares == found[0] for shares in found), "every rank finds the same"
    assert sorted(i for share in found[0] for i in share) == sorted(step)
    tokens = [sum(len(x) for i in share for x in items[i][0]) for share in found[0]]
    assert max(tokens) - min(tokens) <= max(sum(map(len, items[i][0])) for i in step)
    assert MicroBatches(items, CONFIG, "padded").shares(step) == [step]


if __name__ == "__main__":
    processes.main({2: CHECKS, 3: CHECKS})
