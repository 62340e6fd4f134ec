"""The same code on a CUDA device: ops, sampler, training, and a whole tiny run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_fast.config import PreferenceConfig
from srlm_fast.data.records import Pair, user
from srlm_fast.loop import main
from srlm_fast.model.weights import frozen_copy
from srlm_fast.sampler import Sampler, SamplingParams
from srlm_fast.train.checkpoint import Checkpoint, Checkpoints
from srlm_fast.train.preference import train_preference
from srlm_kernels import linear_preference_loss, losses

pytestmark = pytest.mark.gpu


def tiny_llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preference_loss_matches_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab = 60, 64, 5021
    shapes = {"hidden": (rows, width), "weight": (vocab, width), "ref_hidden": (rows, width)}
    tensors = {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}
    target = torch.randint(vocab, (rows,), generator=generator)
    offsets = torch.tensor([0, 20, 31, 31, 60])

    def run(device: str, wide: torch.dtype) -> list[torch.Tensor]:
        moved = {k: t.detach().clone().to(device, wide) for k, t in tensors.items()}
        for name in ("hidden", "weight"):
            moved[name] = moved[name].detach().requires_grad_()
        result = linear_preference_loss(
            target=target.to(device),
            cu_seqlens=offsets.to(device),
            loss_fn=losses.spa(0.1, 0.1, 0.0),
            extrapolation=0.5,
            **moved,
        )
        result.loss.backward()
        found = (result.loss, moved["hidden"].grad, moved["weight"].grad, result.ext_margins)
        return [t.detach().double().cpu() for t in found]

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, expected in zip(run("cuda", dtype), run("cpu", torch.float64), strict=True):
        assert float((got - expected).norm() / expected.norm()) < tolerance


def test_greedy_tokens_are_those_of_the_cpu() -> None:
    model = tiny_llama(torch.float32)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    params = SamplingParams(n=2, temperature=0.0, max_tokens=12)
    on_gpu = Sampler(model).generate(prompts, params)
    on_cpu = Sampler(model.cpu()).generate(prompts, params)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_with_margins_of_exactly_zero(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    pairs = [
        Pair(user("q"), (3, 4, 5 + i), "a", (6, 7, 1), "b", (8, 9, 10, 1), 1.0, 0.0, 1)
        for i in range(6)
    ]
    summary = train_preference(
        model,
        frozen_copy(model),
        pairs,
        PreferenceConfig(learning_rate=1e-3, per_device_train_batch_size=3),
        seed=0,
        pad_id=0,
        log=lambda row: None,
    )
    assert summary["loss_first"] == pytest.approx(0.693147, abs=1e-4)
    assert summary["loss_last"] < summary["loss_first"]


def test_a_training_goes_on_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the state of the fused AdamW. Sums on a GPU may differ in their last bits."""
    pairs = [
        Pair(user("q"), (3, 4, 5 + i), "a", (6, 7 + i, 1), "b", (8, 9, 10, 1), 1.0, 0.0, 1)
        for i in range(6)
    ]
    config = PreferenceConfig(
        learning_rate=1e-3, num_train_epochs=3, per_device_train_batch_size=3, save_steps=1
    )

    def train(folder: Path | None) -> list[torch.Tensor]:
        model = tiny_llama(torch.float32)
        train_preference(
            model, frozen_copy(model), pairs, config, seed=0, pad_id=0, log=lambda row: None,
            checkpoint=folder,
        )  # fmt: skip
        return [parameter.detach() for parameter in model.parameters()]

    def write_and_stop(checkpoints: Checkpoints, found: Checkpoint) -> None:
        write(checkpoints, found)
        raise KeyboardInterrupt

    write, stops = Checkpoints.write, 0
    expected = train(None)
    monkeypatch.setattr(Checkpoints, "write", write_and_stop)
    while True:
        try:
            found = train(tmp_path)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_whole_run(tmp_path: Path) -> None:
    settings = {
        "--recipe": "sandbox-srlm",
        "--device": "cuda",
        "--sandbox.scale": "smoke",
        "--sandbox.pretrain_steps": "40",
        "--sandbox.min_exact": "0",
        "--sandbox.cache_dir": str(tmp_path / "cache"),
        "--judge.kind": "random",
        "--eft.target": "rank",
        "--prompts.source": "dataset",
        "--sampling.keep_truncated": "true",
        "--out": str(tmp_path / "run"),
    }
    assert main([word for item in settings.items() for word in item]) == 0
