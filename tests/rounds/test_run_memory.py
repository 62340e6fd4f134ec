"""What a dry run says of each phase is what the system measures in the run."""

from pathlib import Path
from typing import Any

import pytest

from tests import peaks
from tests.rounds.writer import SMALL, WRITES

HERE = Path(__file__).resolve().parent
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "eos_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip
# Much of the memory is for rows.
ROWS: dict[str, Any] = {
    "recipe": "spa",
    "model": LLAMA,
    "rows": 14,
    "prompt_words": 192,  # with 64 of a response they fill the context
    "settings": {
        "device": "cpu", "rounds": "1", "data.num_gold": "2", "data.num_test_pairs": "2",
        "data.num_test_prompts": "2", "prompts.num_prompts": "8", "evaluate.num_prompts": "2",
        "sampling.max_new_tokens": "64", "spa.seed_epochs": "1",
        "preference.per_device_train_batch_size": "4",
    },
    "phases": {
        "sampling": "round-1/samples", "scoring": "round-1/judgements", "preference": "train/SPA1",
    },
}  # fmt: skip
# Nearly all is weights.
FEW = {"max_position_embeddings": 64, "num_attention_heads": 4, "num_key_value_heads": 1}
HEAVY = LLAMA | FEW | {"intermediate_size": 4096, "num_hidden_layers": 8}
WEIGHTS = ROWS | {
    "model": HEAVY,
    "prompt_words": 32,
    "settings": ROWS["settings"] | {
        "sampling.max_new_tokens": "32", "prompts.num_prompts": "4",
        "preference.per_device_train_batch_size": "1",
    },
}  # fmt: skip


def weights(phases: dict[str, str], **changes: Any) -> dict[str, Any]:
    """`WEIGHTS` with other settings, of which `phases` are looked at."""
    return WEIGHTS | {"phases": phases, "settings": WEIGHTS["settings"] | changes}


TRAINED = {"preference": "train/SPA1"}
CASES = {
    "rows": ROWS,
    "weights": WEIGHTS,
    "a judge prompt": {
        "recipe": "srlm",
        "model": LLAMA | {"vocab_size": 600},
        "rows": 20,
        "prompt_words": 128,
        # A response, a prompt and a judgement fill the context. So ordered no two begin alike.
        "judge_prompt": "<RESPONSE_HERE> <INSTRUCTION_HERE>",
        "settings": {
            "device": "cpu", "rounds": "1", "eft.enabled": "false", "prompts.source": "dataset",
            "prompts.num_prompts": "8", "evaluate.num_prompts": "2", "data.num_test_prompts": "2",
            "judge.max_new_tokens": "64",
            "sampling.max_new_tokens": "64", "sampling.keep_truncated": "true",
            "sft.max_length": "131", "sft.per_device_train_batch_size": "4",
        },
        "phases": {"sft": "train/SFT", "judging": "round-1/judgements"},
    },
    "a judging reference of its own": weights({"scoring": "round-1/judgements"})
    | {"model": LLAMA | FEW, "reference": HEAVY},
    "a model that writes prompts": {
        "recipe": "srlm",
        "model": LLAMA,
        "rows": 20,
        "prompt_words": 8,  # of which a list shows eight, and with 60 tokens it fills the context
        "writer": {
            "hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 12,
            "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 160,
        },
        "settings": {
            **{key.removeprefix("--"): value for key, value in (SMALL | WRITES).items()},
            "device": "cpu", "prompts.max_calls": "8", "evaluate.num_prompts": "2",
        },
        "phases": {"writing": "round-1/prompts"},
    },
    # The judge's reference stays while the model trains, which has another.
    "online": weights({"preference": "round-1/pairs"}, online="true"),
    "a reference that moves": weights(
        TRAINED, **{"preference.sync_ref_model": "true", "preference.ref_model_sync_steps": "1"}
    ),
    "an average of references": weights(TRAINED, **{"preference.reference": "ema"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_phases_of_a_run_are_within_a_seventh(name: str, tmp_path: Path) -> None:
    script = HERE / "peak_run.py"
    found, backend = peaks.predicted_and_measured(script, CASES[name], tmp_path)
    if backend != "cpp":
        pytest.skip(f"the sampler's ops run in {backend}, which the prediction is not for")
    ratios = {phase: predicted / measured for phase, (predicted, measured) in found.items()}
    assert all(0.87 <= ratio <= 1.15 for ratio in ratios.values()), ratios
