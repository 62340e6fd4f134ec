"""SPA's seed DPO against TRL's DPOTrainer on real pairs: the same token ids, steps and order."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train_engines import trl_trainer
from srlm_fast.data.files import task_from_files
from srlm_fast.data.jsonl import read_jsonl, read_rows, write_jsonl
from srlm_fast.data.records import Pair
from srlm_fast.data.template import ChatTemplate
from srlm_fast.loop import main
from srlm_fast.model.load import load_model, load_tokenizer
from srlm_fast.recipes import load_config
from srlm_fast.rounds.manifest import stage_seed
from srlm_fast.train.plan import plan_steps

pytest.importorskip("trl", reason="trl is not installed (extra [bench])")

SHARED = Path(__file__).parents[3] / "shared"
GOLD, TEST, BATCH, RATE = 96, 64, 16, 1e-4
SETTINGS = {
    "--rounds": "0", "--spa.seed_epochs": "1", "--data.num_gold": str(GOLD),
    "--data.num_test_pairs": str(TEST), "--preference.warmup_ratio": "0",
    "--preference.learning_rate": str(RATE), "--preference.logging_steps": "1",
    "--preference.per_device_train_batch_size": str(BATCH), "--evaluate.num_prompts": "1",
    "--evaluate.greedy": "false", "--sampling.max_new_tokens": "8",
}  # fmt: skip


def token_ids(pairs: list[Pair]) -> list[dict[str, list[int]]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: list(getattr(pair, name)) for name in names} for pair in pairs]


def ours(seed: int, source: Path, out: Path) -> tuple[float, list[float]]:
    """The held-out accuracy in the run's own report, and the losses of its steps."""
    flags = SETTINGS | {"--model": str(SHARED / "models" / "tiny-english")}
    flags |= {"--data.preferences": str(source), "--out": str(out)}
    flags |= {"--seed": str(seed), "--data.shuffle_seed": str(seed)}
    assert main(["--recipe", "spa", *(word for item in flags.items() for word in item)]) == 0
    model = json.loads((out / "summary.json").read_text())["models"][-1]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return model["preference_accuracy"], [row["loss"] for row in rows if "loss" in row]


def trls(seed: int, out: Path) -> tuple[float, list[float]]:
    """The same of TRL's trainer, by its own evaluation, on the pairs of the run in `out`."""
    import datasets

    folder, device = SHARED / "models" / "tiny-english", torch.device("cpu")
    config = load_config(str(out / "config.yaml"))
    repeated = replace(config.preference, num_train_epochs=config.spa.seed_epochs)
    plan = plan_steps(range(GOLD), repeated, stage_seed(seed, "DPO"))
    gold = read_jsonl(out / "seed" / "pairs.jsonl", Pair)
    template = ChatTemplate(load_tokenizer(str(folder)))
    held_out = [
        {
            "prompt_ids": template.encode_prompt(row.prompt),
            "chosen_ids": template.encode_response(row.prompt, row.chosen),
            "rejected_ids": template.encode_response(row.prompt, row.rejected),
        }
        for row in task_from_files(config).test_pairs
    ]
    policy, reference = (load_model(str(folder), device=device) for _ in range(2))
    trainer, _ = trl_trainer(
        policy, reference.requires_grad_(False), [gold[i] for step in plan for i in step],
        per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="cosine",
        num_train_epochs=1, max_grad_norm=1.0, weight_decay=0.0, beta=0.1, loss_type=["sigmoid"],
        logging_steps=1, train_sampling_strategy="sequential", seed=seed,
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found: dict[str, Any] = trainer.evaluate(datasets.Dataset.from_list(held_out))
    return found["eval_rewards/accuracies"], losses


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="needs ../shared, which is not there")
def test_the_seed_dpo_is_no_worse_than_trls(tmp_path: Path) -> None:
    """Held-out accuracy over three draws of the seed pairs, and the losses that led there."""
    tokenizer = load_tokenizer(str(SHARED / "models" / "tiny-english"))
    source = tmp_path / "short.jsonl"
    rows = list(read_rows(str(SHARED / "data" / "preferences.jsonl")))
    texts = [f"{row['prompt']} {max(row['chosen'], row['rejected'], key=len)}" for row in rows]
    encoded = tokenizer(texts, truncation=True)["input_ids"]
    short = [row for row, ids in zip(rows, encoded, strict=True) if len(ids) < 124]
    write_jsonl(source, short)
    accuracies = []
    for seed in range(3):
        out = tmp_path / str(seed)
        (our_accuracy, our_losses), (their_accuracy, their_losses) = (
            ours(seed, source, out), trls(seed, out),
        )  # fmt: skip
        assert our_losses == pytest.approx(their_losses, abs=1e-4)
        assert our_losses[0] == pytest.approx(math.log(2)) != pytest.approx(our_losses[-1])
        accuracies.append((our_accuracy, their_accuracy))
    mine, theirs = ([pair[i] for pair in accuracies] for i in (0, 1))
    standard_error = statistics.stdev(theirs) / math.sqrt(3)
    assert statistics.mean(mine) >= statistics.mean(theirs) - standard_error, accuracies
