"""The recipe `spa-official`: the authors' code where it differs from the paper.

What each switch does is tested where it is made: tau and its flags in tests/train/test_noise.py
and, in whole runs, in test_spa_algorithm.py; slices in tests/data/test_slices.py; scores without
beta and an odd number of responses in tests/judge/test_implicit.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from srlm_fast.config import Config, SamplingConfig
from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Judgement, Pair, Sample, user
from srlm_fast.errors import UserError
from srlm_fast.model.load import load_model
from srlm_fast.recipes import load_config
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.spa import refinement
from srlm_fast.sampler import Sampler


def test_what_differs_from_the_paper() -> None:
    official, paper = load_config("spa-official"), load_config("spa")
    refine, theirs = refinement(official, 1), refinement(paper, 1)
    assert refine and theirs
    assert (refine.lam, theirs.lam) == (0.0, 0.5)  # 1: no decoupled detection
    assert (refine.tau, theirs.tau) == ("official", "window")  # 2, 3
    assert official.preference.micro_batch_size == 1  # whose means tau is made of
    assert (official.rounds, paper.rounds) == (2, 3)  # 4
    assert official.prompts.num_prompts_by_round == (8000, 20000, 30000)
    assert official.preference.reference_cache == "none"  # 6
    assert official.sampling.force_eos and not paper.sampling.force_eos  # 7
    assert (official.data.slices, official.data.shuffle_seed) == ("rows", 42)  # 8
    assert official.data.num_gold == 2000
    for name in ("alpha", "k_percent", "warmup_fraction", "seed_epochs"):
        assert getattr(official.spa, name) == getattr(paper.spa, name)
    same = ("learning_rate", "beta", "per_device_train_batch_size", "warmup_ratio", "max_length")
    assert all(getattr(official.preference, n) == getattr(paper.preference, n) for n in same)


def test_cut_off_responses_end_in_an_eos_that_is_judged_and_trained_on(
    run_loop: Any, tmp_path: Path
) -> None:
    """And the file of samples has what was sampled."""
    out = tmp_path / "run"
    changes = {"rounds": "1", "sampling__force_eos": "true", "sampling__max_new_tokens": "4"}
    assert run_loop("spa", out, **changes) == 0
    samples = read_jsonl(out / "round-1" / "samples.jsonl", Sample)
    cut = [s for s in samples if s.finish_reason == "length"]
    assert cut and all(len(s.response_ids) == 4 == len(s.logprobs) for s in cut)
    sampled = {s.response_ids: s.finish_reason for s in samples}
    samplers = [
        Sampler(load_model(str(out / "models" / name), device=torch.device("cpu")))
        for name in ("DPO", "SFT")
    ]
    [eos] = {s.response_ids[-1] for s in samples if s.finish_reason == "stop"} or {4}
    for pair in read_jsonl(out / "round-1" / "pairs.jsonl", Pair):
        for ids in (pair.chosen_ids, pair.rejected_ids):
            assert ids[-1] == eos
            assert sampled.get(ids) == "stop" or sampled[ids[:-1]] == "length"
    for verdict in read_jsonl(out / "round-1" / "judgements.jsonl", Judgement)[:3]:
        sample = samples[verdict.sample or 0]
        closed = [*sample.response_ids] + [eos] * (sample.finish_reason == "length")
        policy, initial = (
            float(s.score([list(sample.prompt_ids)], [[closed]])[0][0].sum()) for s in samplers
        )
        assert verdict.score == pytest.approx(policy - initial, abs=1e-4)


def test_a_forced_eos_has_room() -> None:
    """Regression: at the limit it stood behind the end of the context, where the implicit judge
    gave no score, and CREAM's stopped the run."""
    template = SimpleNamespace(encode_prompt=lambda prompt: list(range(int(prompt[0].content))))
    for force_eos, lengths in ((False, [5, 6]), (True, [5])):
        sampling = SamplingConfig(max_new_tokens=4, keep_truncated=True, force_eos=force_eos)
        engine = SimpleNamespace(context=10, config=Config(sampling=sampling), template=template)
        found = Engine.with_room(cast(Engine, engine), [user("5"), user("6"), user("7")])
        assert [len(ids) for _, ids in found] == lengths


def test_an_eos_can_only_be_forced_on_what_is_kept() -> None:
    with pytest.raises(UserError, match="force_eos needs keep_truncated"):
        SamplingConfig(force_eos=True)
