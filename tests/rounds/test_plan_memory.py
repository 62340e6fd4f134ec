"""What a dry run says of memory, and that a run which cannot fit does not start."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from srlm_fast.config import Config, LoraConfig, PreferenceConfig, SamplingConfig
from srlm_fast.errors import UserError
from srlm_fast.parallel import Ranks
from srlm_fast.rounds import plan
from srlm_fast.train.memory import TrainMemory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary model folder."""
    where = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(where)
    return where


def config(**preference: Any) -> Config:
    return Config(
        model="m",
        device="cpu",
        preference=PreferenceConfig(**preference),
        sampling=SamplingConfig(max_new_tokens=100),
    )


def test_lines_of_a_dry_run(folder: Path) -> None:
    text = "\n".join(plan._memory(config(reference_cache="states"), folder))
    assert re.search(r"sft: at most \d+\.\d+ GB in forwards of 4,096 tokens \(weights", text)
    assert re.search(r"preference: at most \d.* of 5,696 tokens .*reference 0\.00", text)
    assert "states of the reference: at most 0.03 GB on disk" in text


def test_what_makes_a_training_smaller(folder: Path) -> None:
    def peak(**preference: Any) -> int:
        return plan.training_memory(config(**preference), folder, "preference")[0].peak

    whole = peak()
    shared = plan.training_memory(config(), folder, "preference", Ranks(0, 4))
    assert shared[0].peak < whole
    assert peak(micro_batch_size=1) < whole
    assert peak(micro_batch_tokens=400) < peak(micro_batch_tokens=800) < whole
    assert peak(gradient_checkpointing=True) < whole
    assert peak(reference_cache="logps") < whole
    assert peak(reference_cache="logps", reference="fixed") == whole


def test_shares_of_the_weights_are_less_than_the_whole(folder: Path) -> None:
    def memory(parallel: str, world: int) -> TrainMemory:
        return plan.training_memory(
            config(parallel=parallel), folder, "preference", Ranks(0, world)
        )[0]  # fmt: skip

    whole, share = memory("replicate", 4), memory("shard", 4)
    assert memory("shard", 1) == memory("replicate", 1)
    assert (share.optimizer, share.gradients) == (whole.optimizer // 4, whole.gradients // 4)
    assert share.reference == whole.reference // 4
    assert whole.weights // 4 < share.weights < whole.weights
    # Both are whole when the shares are cut.
    assert share.start == (whole.weights + whole.reference) * 5 // 4 and whole.start == 0


def test_what_fits_as_shares_is_not_refused(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan, "_room", lambda device: 1_500_000)
    with pytest.raises(UserError, match=r"preference\.parallel to shard"):
        plan.check_memory(config(), folder, Ranks(0, 4))
    plan.check_memory(config(parallel="shard"), folder, Ranks(0, 4))


def test_layers_that_cannot_run_without_data_are_unknown_and_nothing_worse(tmp_path: Path) -> None:
    """In fp32 on the CPU experts run, but not as tensors without data."""
    shape = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "num_local_experts": 4,
    }  # fmt: skip
    MixtralForCausalLM(MixtralConfig(**shape)).save_pretrained(tmp_path)
    plan.check_memory(config(), tmp_path)
    text = "\n".join(plan._memory(config(), tmp_path))
    assert text.count("at most") == 2 or text.count("at least") == 2 == text.count("ons unknown")


@pytest.mark.parametrize(
    ("preference", "cure"),
    [({}, "reference_cache"), ({"reference_cache": "logps"}, "train adapters")],
)
def test_a_run_whose_weights_cannot_fit_does_not_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, preference: dict[str, Any], cure: str
) -> None:
    """Rows as long as the context, which no data may have, are no reason."""
    plan.check_memory(config(**preference), folder)
    count = plan._parameters(folder)
    assert count is not None
    need = count * (20 if not preference else 16)
    monkeypatch.setattr(plan, "_room", lambda device: need)
    plan.check_memory(config(**preference), folder)
    monkeypatch.setattr(plan, "_room", lambda device: need - 1)
    with pytest.raises(UserError, match=rf"weights, gradients and optimiser alone.*{cure}"):
        plan.check_memory(config(**preference), folder)
    both = Ranks(0, 2, local_world=2)  # a copy each, in the same memory
    monkeypatch.setattr(plan, "_room", lambda device: 2 * need)
    plan.check_memory(config(**preference), folder, both)
    monkeypatch.setattr(plan, "_room", lambda device: 2 * need - 1)
    with pytest.raises(UserError, match="alone"):
        plan.check_memory(config(**preference), folder, both)
    monkeypatch.setattr(plan, "_room", lambda device: None)
    plan.check_memory(config(**preference), folder)


def test_adapters_alone_are_counted_as_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    full, count = config(), plan._parameters(folder)
    lora = replace(full, lora=LoraConfig(r=4))
    # r times (in + out) of the seven matrices of both layers, which are 64 by 64 or 64 by 96
    trained = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 96))
    memory = plan.training_memory(lora, folder, "preference")[0]
    assert count is not None and memory.weights == 4 * (count + trained)
    assert (memory.reference, memory.optimizer, memory.gradients) == (
        4 * trained, 8 * trained, 4 * trained,
    )  # fmt: skip
    assert memory.head < plan.training_memory(full, folder, "preference")[0].head
    assert "adapters of 0.0M parameters, which alone train" in plan._memory(lora, folder)
    need = 4 * count + 12 * trained
    monkeypatch.setattr(plan, "_room", lambda device: need)
    plan.check_memory(lora, folder)
    monkeypatch.setattr(plan, "_room", lambda device: need - 1)
    with pytest.raises(UserError, match=r"take a smaller model or a larger device$"):
        plan.check_memory(lora, folder)


def test_free_memory_is_known_here() -> None:
    room = plan._room(torch.device("cpu"))
    assert room is None or 10**7 < room < 10**14
