"""What a dry run says of the disk."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from srlm_fast.config import (
    Config,
    DataConfig,
    PairsConfig,
    PreferenceConfig,
    PromptsConfig,
    SamplingConfig,
)
from srlm_fast.job import prepare
from srlm_fast.recipes import load_config
from srlm_fast.rounds.disk import cached_rows
from srlm_fast.rounds.machine import Machine
from srlm_fast.rounds.memory import RunMemory
from srlm_fast.rounds.plan import plan

LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 2 * 256 * 100),
        ({"pairs": PairsConfig(selection="all")}, 2 * 256 * 6 * 100),
        ({"method": "spa"}, 2 * 2000 * 256),  # the gold seed, whose answers are as long as a row
        ({"method": "spa", "preference": {"eval_steps": 1}}, 2 * (2000 + 500) * 256),
        ({"method": "spa", "data": DataConfig(num_gold=10)}, 2 * 256 * 100),
        (
            {
                "method": "spa",
                "data": DataConfig(num_gold=10),
                "pairs": PairsConfig(gold_replay=0.5),
            },
            2 * (256 * 100 + 10 * 256),
        ),
    ],
)
def test_states_on_disk_are_those_of_all_that_is_trained_on(
    changes: dict[str, Any], rows: int
) -> None:
    """Gold pairs, all pairs of a prompt and held-out ones were left out, below an "at most"."""
    changes = dict(changes)
    loss = changes.pop("preference", {})
    run = replace(
        Config(model="m", device="cpu"),
        preference=PreferenceConfig(reference_cache="states", **loss),
        prompts=PromptsConfig(source="dataset", num_prompts=256),
        sampling=SamplingConfig(max_new_tokens=100, num_candidates=4),
        **changes,
    )
    lines = RunMemory.of(run, LLAMA, Machine(torch.device("cpu"), None)).lines()
    assert f"states of the reference: at most {rows * 64 * 4 / 1e9:.2f} GB on disk" in lines
    assert cached_rows(run, 256, 256) == rows


def test_each_against_each_makes_many_pairs_of_a_prompt() -> None:
    """A dry run said that a round has as many pairs as prompts."""
    for selection, count in (("min_max", 200), ("all", 200 * 6)):
        job = prepare(load_config("sandbox-srlm", {"pairs.selection": selection}))
        text = " ".join(plan(job.config, job.task, job.memory).split())
        assert f"round 1: preference at most {count} pairs" in text
