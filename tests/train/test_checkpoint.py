"""A training that is stopped and goes on is, to the last bit, the one that was never stopped."""

import errno
import json
import weakref
from dataclasses import replace

import pytest
import torch

from srlm_fast.config import PreferenceConfig, TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.weights import frozen_copy
from srlm_fast.parallel import Ranks
from srlm_fast.train import batches, checkpoint
from srlm_fast.train.checkpoint import Checkpoint, Checkpoints
from srlm_fast.train.noise import Refinement
from srlm_fast.train.preference import train_preference
from srlm_fast.train.sft import train_sft

SFT = TrainConfig(
    learning_rate=3e-3, per_device_train_batch_size=7, logging_steps=3, save_steps=1,
    weight_decay=0.1,
)  # fmt: skip
# Two epochs of five, five and two pairs; what is logged spans checkpoints.
DPO = PreferenceConfig(
    learning_rate=3e-3, num_train_epochs=2, per_device_train_batch_size=5, logging_steps=4,
    eval_steps=3, save_steps=1,
)  # fmt: skip
CUT = replace(DPO, micro_batch_size=2)
MOVING = replace(CUT, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3)
SPA = Refinement(alpha=0.3, lam=0.5, k_percent=40.0, window=6)


class Stopped(BaseException):
    """Not an Exception, so that no handler of the product can swallow it."""


@pytest.fixture
def sft(make_model, rows):
    def run(config, folder, dtype=torch.float64):
        model, logs = make_model(dtype=dtype), []
        summary = train_sft(
            model, rows[:16], config, seed=0, pad_id=0, log=logs.append, eval_rows=rows[16:],
            checkpoint=folder,
        )  # fmt: skip
        return model, summary, logs

    return run


def nothing(model):
    pass


def one_weight(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 3] += 0.5


def softcap(model):
    model.config.final_logit_softcapping = 2.0


def one_token(pairs):
    """The pairs with another token in the first of them."""
    first = pairs[0]
    ids = (*first.chosen_ids[:-1], first.chosen_ids[-1] + 1)
    return [replace(first, chosen_ids=ids), *pairs[1:]]


@pytest.fixture
def preference(make_model, pairs):
    def run(config, folder, refine=None, dtype=torch.float64, **other):
        """other: what differs; pairs, seed, and what is done to the model and its reference."""
        model, logs = make_model(dtype=dtype), []
        other.get("both", nothing)(model)
        reference = frozen_copy(model) if config.reference_cache == "none" else model
        other.get("start", nothing)(model)
        other.get("reference", nothing)(reference)
        summary = train_preference(
            model, reference, other.get("pairs", pairs), config, refine=refine,
            seed=other.get("seed", 0), pad_id=0, log=logs.append,
            reference_is_start=not {"start", "reference"} & set(other),
            eval_pairs=other.get("eval_pairs", pairs[:3]), cache=folder, checkpoint=folder,
        )  # fmt: skip
        return model, summary, logs

    return run


@pytest.fixture
def stopped_at_every_step(monkeypatch):
    """Runs a training anew each time it has written a checkpoint, until it gets to its end."""
    write = Checkpoints.write

    def write_and_stop(self, found):
        write(self, found)
        raise Stopped

    def run(train):
        stops = 0
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "write", write_and_stop)
            while True:
                try:
                    return train(), stops
                except Stopped:
                    stops += 1

    return run


def assert_same(found, expected):
    for tensor, other in zip(found[0].parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(tensor, other)
    assert found[1:] == expected[1:], "summary and metrics"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (replace(SFT, eval_steps=2), torch.float64),
        (replace(SFT, micro_batch_tokens=40, gradient_checkpointing=True), torch.float32),
        (SFT, torch.bfloat16),
    ],
)
def test_sft(config, dtype, sft, stopped_at_every_step, tmp_path):
    whole = sft(replace(config, save_steps=0), tmp_path / "none", dtype)
    found, stops = stopped_at_every_step(lambda: sft(config, tmp_path, dtype))
    assert stops == whole[1]["steps"] == 6
    assert_same(found, whole)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("config", "refine", "dtype"),
    [
        (DPO, None, torch.float64),
        (replace(CUT, reference_cache="logps", rpo_alpha=0.2), None, torch.float32),
        (replace(CUT, reference_cache="states"), None, torch.float64),
        (replace(CUT, gradient_checkpointing=True), None, torch.bfloat16),
        (CUT, SPA, torch.float64),
        (MOVING, None, torch.bfloat16),
        (MOVING, SPA, torch.float64),
        (replace(MOVING, ref_model_mixup_alpha=1.0), None, torch.float32),
        (replace(CUT, reference_cache="states"), SPA, torch.float32),
        (CUT, replace(SPA, tau="dataset"), torch.float64),
        (DPO, replace(SPA, tau="dataset", interval=2), torch.bfloat16),
        (replace(CUT, micro_batch_size=1, num_train_epochs=6), replace(SPA, tau="official"), None),
    ],
)
def test_preference(config, refine, dtype, preference, stopped_at_every_step, tmp_path):
    dtype = dtype or torch.float32
    whole = preference(replace(config, save_steps=0), tmp_path / "whole", refine, dtype)
    found, stops = stopped_at_every_step(lambda: preference(config, tmp_path, refine, dtype))
    assert stops == whole[1]["steps"] >= 6
    assert_same(found, whole)
    assert not refine or {True, False} <= set(whole[1]["flags"])


def test_smaller_micro_batches_stay(preference, stopped_at_every_step, monkeypatch, tmp_path):
    states = batches.Batch.states

    def limited(self, model):
        if torch.is_grad_enabled() and self.num_tokens > 60:
            raise torch.OutOfMemoryError("no room")
        return states(self, model)

    monkeypatch.setattr(batches.Batch, "states", limited)
    with pytest.warns(UserWarning, match="out of memory"):
        whole = preference(replace(DPO, save_steps=0), None)
        found, _ = stopped_at_every_step(lambda: preference(DPO, tmp_path))
    assert whole[1]["out_of_memory"] > 0
    assert_same(found, whole)


def test_what_was_skipped_stays_counted(sft, rows, stopped_at_every_step, monkeypatch, tmp_path):
    states, odd = batches.Batch.states, torch.tensor(rows[3][1])

    def broken(self, model):
        found = states(self, model)
        lengths = self.cu_seqlens.diff().tolist()
        parts = zip(self.rows.split(lengths), self.target.split(lengths), strict=True)
        bad = [where for where, ids in parts if torch.equal(ids, odd)]
        return found.index_fill(0, torch.cat(bad), torch.nan) if bad else found

    monkeypatch.setattr(batches.Batch, "states", broken)
    config = replace(SFT, logging_steps=1)
    whole = sft(replace(config, save_steps=0), None)
    found, _ = stopped_at_every_step(lambda: sft(config, tmp_path))
    assert whole[1]["skipped_steps"] == 2
    assert str(found[1:]) == str(whole[1:]), "NaN is not itself"
    assert_same((found[0],), (whole[0],))


def stop_after(train, steps, monkeypatch):
    write = Checkpoints.write

    def write_and_stop(self, found):
        write(self, found)
        if found.step == steps:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Checkpoints, "write", write_and_stop)
        train()


def saved(folder):
    return sorted(folder.glob("training-*/checkpoint-*"))


def truncate(path):
    path = path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def edit_tensors(path):
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)


def edit_state(path):
    state = json.loads((path / "state.json").read_text())
    state["states"][0]["training"]["num_tokens"] += 1
    (path / "state.json").write_text(json.dumps(state))


def cut_state(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:-9])


def lose(path):
    (path / "state.safetensors").unlink()


def replace_state(path):
    (path / "state.json").write_text("[]")


@pytest.mark.parametrize(
    "damage", [truncate, edit_tensors, edit_state, cut_state, lose, replace_state]
)
def test_a_damaged_checkpoint_is_passed_over(damage, sft, monkeypatch, tmp_path):
    whole = sft(replace(SFT, save_steps=0), None)
    stop_after(lambda: sft(SFT, tmp_path), 4, monkeypatch)
    assert [path.name for path in saved(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    damage(saved(tmp_path)[-1])
    with pytest.warns(UserWarning, match=r"checkpoint-4 cannot be used .*earlier") as said:
        found = sft(SFT, tmp_path)
    assert len(said) == 1
    assert_same(found, whole)
    assert [path.name for path in saved(tmp_path)] == ["checkpoint-5", "checkpoint-6"]


def test_where_all_are_damaged_the_training_begins_anew(sft, monkeypatch, tmp_path):
    stop_after(lambda: sft(SFT, tmp_path), 4, monkeypatch)
    for path in saved(tmp_path):
        truncate(path)
    with pytest.warns(UserWarning, match="begins anew") as said:
        found = sft(SFT, tmp_path)
    assert len(said) == 2
    assert_same(found, sft(replace(SFT, save_steps=0), None))
    assert [path.name for path in saved(tmp_path)] == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_that_is_half_written_is_not_seen(sft, monkeypatch, tmp_path):
    whole = sft(replace(SFT, save_steps=0), None)
    stop_after(lambda: sft(SFT, tmp_path), 3, monkeypatch)
    partial = saved(tmp_path)[0].with_name(".partial")
    partial.mkdir()
    (partial / "state.safetensors").write_text("half")
    assert_same(sft(SFT, tmp_path), whole)
    assert not partial.exists()


def test_another_training_has_other_checkpoints(sft, preference, monkeypatch, tmp_path):
    stop_after(lambda: sft(SFT, tmp_path), 4, monkeypatch)
    other = replace(SFT, learning_rate=1e-3)
    assert_same(sft(other, tmp_path), sft(replace(other, save_steps=0), None))
    assert_same(preference(DPO, tmp_path), preference(replace(DPO, save_steps=0), None))
    # How often one is saved makes no other training.
    rare = replace(SFT, save_steps=5, save_total_limit=1)
    assert_same(sft(rare, tmp_path), sft(replace(SFT, save_steps=0), None))
    kept = {path.parent.name: path.name for path in saved(tmp_path)}
    assert sorted(kept.values()) == ["checkpoint-5", "checkpoint-6", "checkpoint-6"]


def test_a_training_that_goes_on_does_not_keep_the_file(sft, monkeypatch, tmp_path):
    """It is mapped, and its room on the disk is free only when it is let go."""
    stop_after(lambda: sft(SFT, tmp_path), 3, monkeypatch)
    newest, write, tensors = Checkpoints.newest, Checkpoints.write, []

    def spy(self):
        found = newest(self)
        tensors.extend(map(weakref.ref, found.tensors.values()))
        return found

    def write_without(self, found):
        assert tensors and not any(ref() is not None for ref in tensors)
        write(self, found)

    monkeypatch.setattr(Checkpoints, "newest", spy)
    monkeypatch.setattr(Checkpoints, "write", write_without)
    assert sft(SFT, tmp_path)[1]["steps"] == 6


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("pairs", one_token),
        ("eval_pairs", one_token),
        ("seed", 1),
        ("start", one_weight),
        ("reference", one_weight),
        ("both", softcap),
        ("refine", replace(SPA, alpha=0.2)),
    ],
)
def test_what_makes_another_training(kind, change, preference, pairs, monkeypatch, tmp_path):
    """The checkpoint of one that differs in this alone is not taken up."""
    other = {kind: change}
    if change is one_token:
        other = {kind: one_token(pairs[:3] if kind == "eval_pairs" else pairs)}
    stop_after(lambda: preference(DPO, tmp_path, refine=SPA), 5, monkeypatch)
    found = preference(DPO, tmp_path, **{"refine": SPA, **other})
    expected = preference(replace(DPO, save_steps=0), None, **{"refine": SPA, **other})
    assert_same(found, expected)
    unlike = preference(replace(DPO, save_steps=0), None, refine=SPA)
    assert unlike[1:] != expected[1:], "it is another"


def test_another_smoothing_of_one_label_makes_another_training(
    preference, pairs, monkeypatch, tmp_path
):
    smoothed = [replace(pairs[0], label_smoothing=0.4), *pairs[1:]]
    stop_after(lambda: preference(DPO, tmp_path), 5, monkeypatch)
    found = preference(DPO, tmp_path, pairs=smoothed)
    assert_same(found, preference(replace(DPO, save_steps=0), None, pairs=smoothed))


def test_no_pass_of_the_reference_is_made_again(preference, monkeypatch, tmp_path):
    config = replace(DPO, reference_cache="logps")
    whole = preference(replace(config, save_steps=0), None)
    stop_after(lambda: preference(config, tmp_path), 2, monkeypatch)

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr("srlm_fast.train.reference._sums", never)
    assert_same(preference(config, tmp_path), whole)


def state(step, ranks=1):
    rows = [{"loss": float("nan"), "step": step}]
    return Checkpoint(step, rows, [{"a": [0.1, None]}] * ranks, {"x": torch.arange(3.0)})


def test_all_may_be_kept(tmp_path):
    found = Checkpoints(tmp_path, limit=0)
    for step in (2, 4, 10):
        found.write(state(step))
    assert len(list(tmp_path.iterdir())) == 3
    newest = found.newest()
    assert newest.step == 10 and newest.states == [{"a": [0.1, None]}]
    assert newest.tensors["x"].tolist() == [0, 1, 2]


def test_a_checkpoint_of_more_processes_is_passed_over(tmp_path):
    Checkpoints(tmp_path).write(state(2, ranks=2))
    with pytest.warns(UserWarning, match="2 processes wrote it, and now there are 1"):
        assert Checkpoints(tmp_path).newest() is None


def test_only_the_main_rank_writes(tmp_path):
    Checkpoints(tmp_path, ranks=Ranks(rank=1, world=2)).write(state(2))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    found = Checkpoints(tmp_path)
    found.write(state(2))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full"):
        patch.setattr(checkpoint.os, "fsync", full)
        found.write(state(4))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
