"""Training with sharded weights is training in one process: gradients, weights, metrics, flags."""

import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.sizes import PeakBytes
from srlm_fast.model.weights import frozen_copy
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.sampler import Sampler, SamplingParams
from srlm_fast.train import checkpoint
from srlm_fast.train.checkpoint import Checkpoint, Checkpoints
from srlm_fast.train.optim import Optimizer
from srlm_fast.train.plan import MicroBatches
from srlm_fast.train.preference import train_preference
from srlm_fast.train.sft import train_sft
from srlm_fast.train.sharded import check_replicas, sharded
from tests.srlm_kernels import ranks as processes
from tests.train.test_parallel import (
    CONFIG,
    REFINE,
    assert_goes_on,
    assert_same,
    here,
    shared_folder,
    states,
)
from tests.train.tiny import draw_pairs, draw_rows, new_model

CONFIG = replace(CONFIG, parallel="shard")
SFT = TrainConfig(
    learning_rate=3e-3, per_device_train_batch_size=7, logging_steps=3, parallel="shard"
)


def made(*, tied=True, biased=None, dtype=torch.float64):
    """A model; a head of its own has a bias, and a tied one if it is to."""
    model = new_model(dtype=dtype, tied=tied)
    if biased or not tied:
        head = model.get_output_embeddings()
        bias = torch.linspace(-1, 1, len(head.weight), dtype=dtype)
        head.bias = torch.nn.Parameter(bias)
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def tuned(ranks, config=SFT, *, folder=None, **kind):
    model, logs = made(**kind), []
    summary = train_sft(
        model, draw_rows(), config, seed=0, pad_id=0, log=logs.append, ranks=ranks,
        eval_rows=draw_rows()[:5], checkpoint=folder,
    )  # fmt: skip
    return weights(model), summary, logs


def preferred(ranks, config=CONFIG, refine=None, *, own=False, cache=None, **kind):
    """own: the model is its own reference, which a cache makes possible."""
    model, logs = made(**kind), []
    reference = model if own else frozen_copy(model)
    summary = train_preference(
        model, reference, draw_pairs(), config, refine=refine, seed=0, pad_id=0, log=logs.append,
        ranks=ranks, cache=cache, eval_pairs=draw_pairs()[:5], checkpoint=cache,
    )  # fmt: skip
    if not own:
        assert torch.equal(weights(reference), weights(made(**kind))), "the reference is as it was"
    return weights(model), summary, logs


def sft_is_that_of_one_process():
    padded = replace(SFT, micro_batch_size=2, layout="padded", eval_steps=4)
    for config, tied in ((SFT, True), (padded, False)):
        assert_same(tuned(here(), config, tied=tied), tuned(ALONE, config, tied=tied))


def dpo_is_that_of_one_process():
    cut = replace(CONFIG, micro_batch_size=1, rpo_alpha=0.2, logging_steps=1, eval_steps=4)
    for config in (CONFIG, cut):
        assert_same(preferred(here(), config), preferred(ALONE, config))
    assert_same(preferred(here(), tied=False), preferred(ALONE, tied=False))


def spa_is_that_of_one_process():
    for refine in (REFINE, replace(REFINE, tau="dataset", interval=2)):
        found = preferred(here(), refine=refine)
        assert_same(found, preferred(ALONE, refine=refine))
        assert {True, False} <= set(found[1]["flags"])


@contextmanager
def gradients(found):
    """Appends the gradients of each step to `found`, the shares of all ranks put together."""
    plain, ranks = Optimizer.step, here()

    def step(self, *args):
        shares = [m.grad.clone() for m in self.masters]
        if self._ranks.sharded:
            assert all(p.grad is None for p in self.params), "they are collected"
            parts = [ranks.gather([g]) for g in shares]
            shares = [torch.cat(part) for part in parts]
        found.append(torch.cat([g.flatten() for g in shares]))
        return plain(self, *args)

    with mock.patch.object(Optimizer, "step", step):
        yield


def the_bias_of_a_tied_head_is_that_of_one_process():
    assert_same(tuned(here(), biased=True), tuned(ALONE, biased=True))
    found = preferred(here(), refine=REFINE, biased=True)
    assert_same(found, preferred(ALONE, refine=REFINE, biased=True))


def a_parameter_that_cannot_be_shared_out_is_refused():
    model = made()
    model.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match="cannot share out scale"), sharded(model, here()):
        pass


def gradients_are_sums():
    """Adam would hide a factor, and one of the head alone would hide in the norm."""
    for kind in ({}, {"biased": True}, {"tied": False}):
        found, expected = [], []
        with gradients(found):
            preferred(here(), **kind)
        with gradients(expected):
            preferred(ALONE, **kind)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def checkpointed_layers_are_computed_again():
    config = replace(CONFIG, gradient_checkpointing=True)
    assert_same(preferred(here(), config, REFINE), preferred(ALONE, CONFIG, REFINE))


def most_ranks_may_have_nothing():
    """Steps of one pair: the other ranks compute nothing, in as many forwards."""
    config = replace(CONFIG, per_device_train_batch_size=1, num_train_epochs=1)
    assert_same(preferred(here(), config, REFINE), preferred(ALONE, config, REFINE))


def references_may_be_cached():
    ranks = here()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(ranks.from_main(name)) / "files"  # where all of them look
        for kind, refine in (("logps", None), ("states", REFINE)):
            config = replace(CONFIG, reference_cache=kind, eval_steps=3)
            alone = preferred(ALONE, config, refine, own=True, cache=Path(name) / "alone")
            assert_same(preferred(ranks, config, refine, own=True, cache=folder), alone)
        files = {path: path.stat().st_mtime_ns for path in folder.glob("states-*")}
        of_one = {path.name for path in (Path(name) / "alone").iterdir()}
        assert {path.name for path in folder.iterdir()} == of_one
        ranks.barrier()
        if ranks.main:  # a pass that was interrupted: this one is made again, the others are kept
            min(files).unlink()
        ranks.barrier()
        assert_same(preferred(ranks, config, refine, own=True, cache=folder), alone)
        ranks.barrier()
        again = {path: path.stat().st_mtime_ns for path in files}
        assert sum(again[path] == time for path, time in files.items()) == len(files) - 1
        ranks.barrier()


def a_step_that_is_not_finite_is_skipped_by_all():
    marker = torch.tensor(draw_pairs()[3].chosen_ids)

    def change(batch, found):
        for part in batch.target.split(batch.cu_seqlens.diff().tolist()):
            if torch.equal(part, marker):
                return found * torch.nan
        return found

    config = replace(CONFIG, logging_steps=1, micro_batch_size=1)
    with states(change), mock.patch("srlm_fast.train.preference.check_start"):
        found = preferred(here(), config, REFINE)
        assert found[1]["skipped_steps"] == 2 and found[0].isfinite().all()
        alone = preferred(ALONE, config, REFINE)
    for summary in (found[1], alone[1]):
        summary.pop("loss_first"), summary.pop("loss_last")  # NaN, if that was the step
    for logs in (found[2], alone[2]):
        logs[:] = [row for row in logs if row["loss"] == row["loss"]]
    assert len(found[2]) == len(alone[2]) == found[1]["steps"] - 2
    assert_same(found, alone)


def sixteen_bit_weights_have_sharded_masters():
    """The updates are far below what the weights resolve."""
    config = replace(CONFIG, learning_rate=1e-4)
    start = weights(made(dtype=torch.bfloat16))
    found, alone = (preferred(r, config, dtype=torch.bfloat16) for r in (here(), ALONE))
    assert all(torch.equal(other, found[0]) for other in here().gather([found[0]]))
    moved, expected = ((run[0] - start).float() for run in (found, alone))
    assert expected.norm() > 0 and (moved - expected).norm() < 0.2 * expected.norm()
    assert found[1]["loss_last"] == pytest.approx(alone[1]["loss_last"], rel=2e-2)


def every_rank_holds_its_share():
    """Of weights, gradients and optimiser state; the model itself is empty meanwhile, and then
    what it was: its own objects, which are sampled from and saved."""
    ranks, plain, held = here(), Optimizer.step, []
    model = made(tied=False, dtype=torch.bfloat16)
    objects, total = list(model.parameters()), weights(model).numel()
    sampler, greedy = Sampler(model), SamplingParams(temperature=0.0, max_tokens=8)
    before = sampler.generate([[5, 6, 7]], greedy)[0].outputs[0].token_ids

    def step(self, *args):
        assert not any(p.numel() for p in objects)
        result = plain(self, *args)
        state = [t for s in self._adamw.state.values() for t in s.values() if t.ndim]
        kinds = ([p.to_local() for p in self.params], self.masters, state)
        held.append([sum(t.numel() for t in kind) for kind in kinds])
        return result

    with mock.patch.object(Optimizer, "step", step):
        train_sft(model, draw_rows(), SFT, seed=0, pad_id=0, log=lambda row: None, ranks=ranks)
    shares = ranks.gather([held[0]])
    assert [sum(kind) for kind in zip(*shares, strict=True)] == [total, total, 2 * total]
    assert max(share[0] for share in shares) < 1.1 * total / ranks.world
    assert all(p is q for p, q in zip(objects, model.parameters(), strict=True))
    if ranks.main:  # the one that writes
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = load_file(Path(folder) / "model.safetensors")
        assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    after, fresh = (
        s.generate([[5, 6, 7]], greedy)[0].outputs[0].token_ids for s in (sampler, Sampler(model))
    )
    assert after == fresh != before


def a_training_that_is_stopped_goes_on():
    """Each rank with its share of weights, masters and moments."""
    ranks = here()

    def sft(folder, save_steps):
        config = replace(SFT, eval_steps=4, save_steps=save_steps)
        return tuned(ranks, config, folder=folder, tied=False, dtype=torch.bfloat16)

    def spa(folder, save_steps):
        config = replace(CONFIG, eval_steps=3, logging_steps=4, micro_batch_size=1)
        config = replace(config, reference_cache="states", save_steps=save_steps)
        return preferred(ranks, config, REFINE, own=True, cache=folder, dtype=torch.float32)

    def dpo(folder, save_steps):
        config = replace(CONFIG, gradient_checkpointing=True, save_steps=save_steps)
        return preferred(ranks, config, cache=folder)

    for train in (sft, spa, dpo):
        assert_goes_on(train)


def a_checkpoint_that_one_rank_cannot_use_all_pass_over():
    ranks, config = here(), replace(SFT, save_steps=2)

    def again(folder):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = tuned(ranks, config, folder=folder)
        assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]
        return "".join(ranks.gather([str(warning.message) for warning in said]))

    expected = tuned(ranks)
    with shared_folder() as folder:
        if ranks.main:
            tuned(ALONE, config, folder=folder)
        ranks.barrier()
        said = again(folder)
        assert said.count("1 processes wrote it, and now there are 2") == 2, "two are kept"
        (last,) = folder.glob(f"training-*/checkpoint-{expected[1]['steps']}")
        assert [path.name for path in sorted(last.iterdir())] == [
            "state-0.safetensors", "state-1.safetensors", "state.json",
        ]  # fmt: skip
        if not ranks.main:
            (last / "state-1.safetensors").write_bytes(b"")
        ranks.barrier()
        said = again(folder)
        assert said.count("cannot be used") == 1 and "state-1.safetensors is not as" in said, said
        assert again(folder) == "", "it is written anew"


def a_share_that_cannot_be_written_ends_all():
    ranks = replace(here(), sharded=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    with shared_folder() as folder:
        found = Checkpoints(folder, ranks=ranks)
        found.write(Checkpoint(1, [], [None, None], {"x": torch.arange(ranks.rank + 2.0)}))
        assert found.newest().tensors["x"].tolist() == [0, 1, 2][: ranks.rank + 2]
        patch = mock.patch.object(
            checkpoint, "save_file", checkpoint.save_file if ranks.main else full
        )
        with patch, pytest.raises(UserError, match="the disk is full"):
            found.write(Checkpoint(2, [], [None, None], {"x": torch.zeros(3)}))
        assert found.newest().step == 1


def weights_that_differ_are_noticed():
    model = new_model(seed=here().rank)
    noticed = pytest.raises(RuntimeError, match="weights differ between the processes")
    with noticed, sharded(model, here()):
        pass


CHECKS = {
    2: [
        sft_is_that_of_one_process,
        dpo_is_that_of_one_process,
        spa_is_that_of_one_process,
        the_bias_of_a_tied_head_is_that_of_one_process,
        a_parameter_that_cannot_be_shared_out_is_refused,
        gradients_are_sums,
        checkpointed_layers_are_computed_again,
        most_ranks_may_have_nothing,
        references_may_be_cached,
        a_step_that_is_not_finite_is_skipped_by_all,
        sixteen_bit_weights_have_sharded_masters,
        every_rank_holds_its_share,
        a_training_that_is_stopped_goes_on,
        a_checkpoint_that_one_rank_cannot_use_all_pass_over,
        a_share_that_cannot_be_written_ends_all,
        weights_that_differ_are_noticed,
    ],
    3: [
        sft_is_that_of_one_process,
        most_ranks_may_have_nothing,
    ],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return processes.start(__file__, tmp_path_factory.mktemp("ranks"))


@processes.each(CHECKS)
def test_ranks(world, check, outputs):
    processes.assert_passed(check, outputs[world])


def test_one_process_shards_nothing():
    for train in (tuned, preferred):
        assert torch.equal(
            train(ALONE)[0],
            train(ALONE, replace(SFT if train is tuned else CONFIG, parallel="replicate"))[0],
        )


def test_comparing_the_weights_of_ranks_takes_no_second_model(monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda ranks, found: found)
    model = torch.nn.Embedding(100, 1 << 17)
    with PeakBytes(model.parameters()) as held:
        check_replicas(model, Ranks(0, 2))
    assert 0 < held.peak < model.weight.nbytes


def test_sharded_ranks_have_as_many_micro_batches():
    items = [(row,) for row in draw_rows()]
    step = [3, 17, 4, 9, 20, 11, 0]
    config = replace(SFT, micro_batch_size=1)
    found = [
        MicroBatches(
            items, config, "padded", replace(ALONE, rank=rank, world=3, sharded=True)
        ).mine(step)
        for rank in range(3)
    ]
    assert {len(micros) for micros in found} == {3}
    assert sorted(index for micros in found for micro in micros for index in micro) == sorted(step)


if __name__ == "__main__":
    processes.main(CHECKS)
