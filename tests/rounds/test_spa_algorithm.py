"""Whole runs in float64 against Algorithm 1 transcribed, step by step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import GPT2Config, GPT2LMHeadModel

from srlm_fast.data.jsonl import read_jsonl, write_jsonl
from srlm_fast.data.records import Judgement, Pair, Sample
from srlm_fast.loop import main
from srlm_fast.model.load import load_model
from srlm_fast.recipes import load_config
from srlm_fast.rounds import engine
from srlm_fast.rounds.manifest import stage_seed
from srlm_fast.sandbox.tokenizer import make_tokenizer
from srlm_fast.sandbox.world import ITEMS
from srlm_fast.train.plan import plan_steps
from tests.rounds import spa_algorithm as paper

# The strengths are such that this model, which knows nothing, flags some pairs in every mode.
SETTINGS = {
    "--preference.beta": "0.5", "--preference.learning_rate": "2e-2",
    "--preference.warmup_ratio": "0.2", "--preference.weight_decay": "0.1",
    "--preference.per_device_train_batch_size": "4", "--preference.logging_steps": "1",
    "--preference.num_train_epochs": "2", "--spa.seed_epochs": "2",
    "--spa.lambdas": "[2, 0.5]", "--spa.alpha": "0.2", "--spa.k_percent": "30",
    "--sampling.max_new_tokens": "5", "--sampling.temperature": "1", "--rounds": "2",
    "--data.num_gold": "10", "--data.num_test_pairs": "2", "--prompts.num_prompts": "14",
    "--evaluate.num_prompts": "2", "--evaluate.greedy": "false",
}  # fmt: skip
# A quarter of the steps is a whole number of them. The authors' code, whose lambda is 0, also flags
# margins that equal tau: all of its first ones, which are exactly 0, where alpha is on.
MODES = {
    "window": {"--spa.tau_window": "6", "--spa.warmup_fraction": "0.25"},
    "dataset": {"--spa.tau": "dataset", "--spa.warmup_fraction": "0.25"},
    "official": {
        "--spa.tau": "official", "--spa.decoupled": "false", "--spa.warmup_fraction": "0",
        "--preference.micro_batch_size": "1", "--preference.num_train_epochs": "6",
    },
}  # fmt: skip


@dataclass
class Taken:
    """Gradients and weights of every optimiser step of a run."""

    grads: list[list[torch.Tensor]] = field(default_factory=list)
    weights: list[list[torch.Tensor]] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, whose layers all compute in the dtype of their inputs, and preference rows."""
    where = tmp_path_factory.mktemp("algorithm")
    tokenizer = make_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=48,
        initializer_range=0.3, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(1)
        GPT2LMHeadModel(config).save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")
    words = list(combinations(ITEMS[:10], 2))
    rows = [
        {"prompt": f"sort {a} {b}", "chosen": f"{b} {a}" if i % 3 else a, "rejected": f"{a} {b}"}
        for i, (a, b) in enumerate(words)
    ]
    write_jsonl(where / "pairs.jsonl", rows)
    return where


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine computes in float64, and its optimiser is watched."""
    seen = Taken()

    def in_float64(path: str, *, device: torch.device, dtype: Any = "auto") -> Any:
        return load_model(path, device=device, dtype=torch.float64)

    def params(optimizer: Any) -> list[torch.Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def before(optimizer: Any, *_: Any) -> None:
        seen.grads.append([p.grad.clone() for p in params(optimizer)])

    def after(optimizer: Any, *_: Any) -> None:
        seen.weights.append([p.detach().clone() for p in params(optimizer)])

    monkeypatch.setattr(engine, "load_model", in_float64)
    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield seen
    for hook in hooks:
        hook.remove()


def triples(pairs: list[Pair]) -> list[paper.Triple]:
    return [paper.Triple(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs]


def near(found: Any, expected: Any) -> bool:
    return bool(found == pytest.approx(expected, rel=1e-9, abs=1e-9))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_algorithm_1(mode: str, folder: Path, tmp_path: Path, taken: Taken) -> None:
    out, flags = tmp_path / "run", SETTINGS | MODES[mode]
    flags |= {"--model": str(folder / "model"), "--data.preferences": str(folder / "pairs.jsonl")}
    words = [word for item in flags.items() for word in item]
    assert main(["--recipe", "spa", "--out", str(out), *words]) == 0
    config = load_config(str(out / "config.yaml"))
    train, spa = config.preference, config.spa
    manifest = json.loads((out / "manifest.json").read_text())["stages"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    settings = {
        name: getattr(train, name)
        for name in ("beta", "learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm")
    }
    device, done, flagged = torch.device("cpu"), 0, 0

    def follow(name: str, data: list[paper.Triple], epochs: int, s: paper.Settings) -> None:
        """Trains the transcription's policy as the engine trained its own."""
        nonlocal done, flagged
        repeated = replace(train, num_train_epochs=epochs)
        plan = plan_steps(range(len(data)), repeated, stage_seed(config.seed, name))
        logged = [row for row in rows if row["stage"] == f"train/{name}" and "loss" in row]
        steps = paper.train(policy, data, plan, s)
        assert len(logged) == len(steps)
        latest: dict[int, bool | None] = dict.fromkeys(range(len(data)))
        for step, row in zip(steps, logged, strict=True):
            assert near(row["loss"], step.loss)
            for found, expected in (
                *zip(taken.grads[done], step.grads, strict=True),
                *zip(taken.weights[done], step.weights, strict=True),
            ):
                assert torch.allclose(found, expected, rtol=1e-8, atol=1e-9)
            if s.alpha:
                assert near(row["spa/tau"], sum(step.taus) / len(step.taus))
                mean = sum(step.ext_margins) / len(step.ext_margins)
                assert near(row["spa/extrapolated_margin"], mean)
                share = sum(step.flags.values()) / len(step.taus)
                assert row["spa/flagged_share"] == pytest.approx(share)
                latest |= step.flags
            done += 1
        if s.alpha:
            assert manifest[f"train/{name}"]["info"]["flags"] == list(latest.values())
            flagged += sum(flag is True for flag in latest.values())

    init = load_model(str(folder / "model"), device=device, dtype=torch.float64)
    policy = load_model(str(folder / "model"), device=device, dtype=torch.float64)
    gold = triples(read_jsonl(out / "seed" / "pairs.jsonl", Pair))
    follow("DPO", gold, spa.seed_epochs, paper.Settings(**settings))
    for i in (1, 2):
        samples = read_jsonl(out / f"round-{i}" / "samples.jsonl", Sample)
        verdicts = read_jsonl(out / f"round-{i}" / "judgements.jsonl", Judgement)
        reward: dict[tuple[paper.Ids, paper.Ids], float] = {}
        for verdict in verdicts:
            sample = samples[verdict.sample or 0]
            key = sample.prompt_ids, sample.response_ids
            log_pi, log_init = paper.judgment(policy, init, *key)
            reward[key] = log_pi - log_init
            # The sampler keeps log-probs of tokens as floats of 24 bits.
            assert abs(verdict.score - reward[key]) <= -(log_pi + log_init) * 2**-24
        made = []
        for one, two in zip(samples[::2], samples[1::2], strict=True):
            x, y_1, y_2 = one.prompt_ids, one.response_ids, two.response_ids
            judged = [reward[x, y] for y in (y_1, y_2) if (x, y) in reward]
            if y_1 != y_2 and len(judged) == 2:  # not the same, and none of them empty
                made.append(paper.preferred(x, y_1, y_2, *judged, train.beta))
        assert triples(read_jsonl(out / f"round-{i}" / "pairs.jsonl", Pair)) == made
        assert len(made) >= 12
        s = paper.Settings(
            **settings, alpha=spa.alpha, lam=spa.lambdas[i - 1] if spa.decoupled else 0.0,
            k_percent=spa.k_percent, warmup_fraction=spa.warmup_fraction, tau=spa.tau,
            window=spa.tau_window, micro_batch_size=train.micro_batch_size,
        )  # fmt: skip
        follow(f"SPA{i}", made, train.num_train_epochs, s)
    assert done == len(taken.weights)
    assert 2 <= flagged <= 20, "a detector that flags none or all shows nothing"
