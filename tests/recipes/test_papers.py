"""The recipes of the papers: their numbers, and that they can be planned for the true models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from srlm_fast.config import Config
from srlm_fast.loop import main
from srlm_fast.parallel import Ranks
from srlm_fast.recipes import load_config, recipe_names
from srlm_fast.rounds.machine import Machine
from srlm_fast.rounds.memory import RunMemory

# What the models' own config.json say, as far as it has a size.
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_2_70B = LLAMA | {
    "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "max_position_embeddings": 4096, "dtype": "float16",
}  # fmt: skip
ZEPHYR_7B = LLAMA | {
    "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768,
    "sliding_window": 4096, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_3_8B = LLAMA | {"vocab_size": 128256, "max_position_embeddings": 8192, "dtype": "bfloat16"}
PHI_2 = {
    "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 2048, "partial_rotary_factor": 0.4, "tie_word_embeddings": False,
    "dtype": "float16",
}  # fmt: skip
QWEN_1_5B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
# The model, millions of parameters as published, processes, GB of each one's GPU.
RECIPES: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "srlm-llama2-70b": (LLAMA_2_70B, "68,976.6", 16, 288),
    "spa-zephyr-7b": (ZEPHYR_7B, "7,241.7", 4, 48),
    "spa-phi2": (PHI_2, "2,779.7", 4, 48),
    "spa-llama3-8b": (LLAMA_3_8B, "8,030.3", 8, 48),
    "srlm-qwen-1.5b-24gb": (QWEN_1_5B, "1,543.7", 1, 24),
    "srlm-qwen-1.5b-80gb": (QWEN_1_5B, "1,543.7", 1, 80),
    "spa-qwen-1.5b-24gb": (QWEN_1_5B, "1,543.7", 1, 24),
    "spa-qwen-1.5b-80gb": (QWEN_1_5B, "1,543.7", 1, 80),
}
SEVERAL = [name for name, (_, _, world, _) in RECIPES.items() if world > 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """As few and short rows as the recipes take, in their words on the command line."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(60600)]
    reply = {"role": "assistant", "lang": "en", "replies": []}
    replies = [{**reply, "text": text, "rank": rank} for rank, text in enumerate("abc")]
    trees = [
        {
            "message_tree_id": str(i),
            "prompt": {"role": "prompter", "lang": "en", "text": f"p{i}", "replies": replies},
        }
        for i in range(30)
    ]
    for name, rows in (("pairs", pairs), ("trees", trees)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "spa": ["--data.preferences", str(folder / "pairs.jsonl")],
        "srlm": ["--data.trees", str(folder / "trees.jsonl")],
    }


def test_each_recipe_of_a_paper_is_tried() -> None:
    general = {"spa", "spa-official", "srlm", "sandbox-spa", "sandbox-srlm"}
    assert set(recipe_names()) - general == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_of_the_configuration_alone(
    name: str, data: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, millions, world, gigabytes = RECIPES[name]
    if name.endswith("gb"):
        pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    (tmp_path / "config.json").write_text(json.dumps(shape))
    words = ["--recipe", name, "--model", str(tmp_path), *data[name.partition("-")[0]]]
    writes = name == "srlm-llama2-70b"
    words += ["--prompts.model", str(tmp_path)] if writes else []  # of the same shape
    if world == 1:
        words += ["--device", "cuda", "--memory", str(gigabytes)]
    assert main([*words, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"{millions}M parameters in bfloat16" in said and "no weights in" in said
    peaks = [float(peak) for peak in re.findall(r": at most (\d+\.\d+) GB", said)]
    assert len(peaks) == (3 if name.startswith("spa") else 4) + writes and "unknown" not in said
    assert min(peaks) > 2e-3 * float(millions.replace(",", "")), "bf16 weights alone"
    assert max(peaks) < gigabytes or world > 1


def fits(name: str, world: int, gigabytes: int, **changes: str) -> bool:
    """Whether a process of so many, on a GPU of so many gigabytes, holds every phase."""
    machine = Machine(torch.device("cuda"), gigabytes * 10**9)
    config, model = load_config(name, {"model": "m", **changes}), RECIPES[name][0]
    memory = RunMemory.of(config, AutoConfig.for_model(**model), machine, Ranks(0, world))
    return max(phase.peak for phase in memory.phases) < gigabytes * 10**9


@pytest.mark.parametrize("name", SEVERAL)
def test_a_process_of_several_fits_its_gpu(name: str, tmp_path: Path) -> None:
    shape, _, world, gigabytes = RECIPES[name]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    writer = {"prompts.model": str(tmp_path)} if load_config(name).prompts.model else {}
    assert fits(name, world, gigabytes, **writer)
    if writer:  # as the recipe says
        assert not fits(name, world, 192, **writer) and not fits(name, 64, 80, **writer)
        assert fits(name, world, 192, **{"prompts.model": ""})


def test_llama3_does_not_fit_where_zephyr_does() -> None:
    """As the recipe says."""
    assert not fits("spa-llama3-8b", 4, 48)
    assert fits("spa-llama3-8b", 4, 80)


def value(config: Config, path: str) -> Any:
    found: Any = config
    for name in path.split("."):
        found = getattr(found, name)
    return found


SRLM = {
    "rounds": 2, "preference.beta": 0.1, "sampling.num_candidates": 4, "sampling.temperature": 0.7,
    "sampling.top_p": 0.9, "judge.prompt": "additive", "prompts.num_seed_demos": 6,
    "prompts.num_generated_demos": 2, "prompts.temperature": 0.6, "prompts.top_p": 0.9,
    "prompts.rouge_l": 0.7, "prompts.min_words": 4, "prompts.max_words": 150,
    "prompts.max_tasks": 7, "prompts.keep_truncated": False, "data.num_test_prompts": 256,
    "eft.max_tries": 1, "judge.num_samples": 3, "evaluate.num_prompts": 256,
    "sft.per_device_train_batch_size": 16, "sft.min_lr_ratio": 1.1 / 5.5,
    "preference.per_device_train_batch_size": 16, "preference.min_lr_ratio": 0.1,
}  # fmt: skip
SPA = {
    "rounds": 3, "preference.beta": 0.1, "spa.alpha": 0.1, "spa.k_percent": 10,
    "spa.lambdas": (1 / 2, 1 / 4, 1 / 8), "spa.warmup_fraction": 0.2, "spa.seed_epochs": 3,
    "preference.num_train_epochs": 1, "preference.warmup_ratio": 0.1, "judge.kind": "implicit",
    "preference.per_device_train_batch_size": 32, "preference.max_length": 2048,
    "sampling.num_candidates": 2, "sampling.temperature": 0.7, "sampling.top_p": 1.0,
    "sampling.max_new_tokens": 300, "data.num_gold": 2000, "data.shuffle_seed": 42,
    "prompts.num_prompts_by_round": (8000, 20000, 30000), "data.slices": "rows",
    "spa.decoupled": True, "preference.min_lr_ratio": 0.0, "dtype": "bfloat16",
    "preference.reference": "previous", "judge.reference": "sft", "seed": 42,
    "preference.lr_scheduler_type": "cosine", "sampling.keep_truncated": True,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_are_the_papers(name: str) -> None:
    config = load_config(name)
    expected: dict[str, Any] = SPA if name.startswith("spa") else SRLM
    if name == "srlm-llama2-70b":
        expected = expected | {"sft.learning_rate": 5.5e-6, "preference.learning_rate": 1e-6}
        expected |= {"judge.temperature": 0.7, "judge.top_p": 0.9}
        expected |= {"prompts.model": "meta-llama/Llama-2-70b-chat-hf", "judge.kind": "prompted"}
    elif not config.lora.r:
        expected = expected | {"preference.learning_rate": 5e-7, "lora.r": 0}
    for path, number in expected.items():
        assert value(config, path) == pytest.approx(number), path
