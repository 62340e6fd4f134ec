"""Log-probs of a bf16 model are no further from float64 than those of a plain forward."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_fast.sampler import Sampler, SamplingParams


def forward_logprobs(model: Any, prompt: list[int], ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids], device=model.device)).logits
    logps = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1).cpu()
    return logps.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_rounds_no_more_on_pages(device: str, make_model: Callable[..., Any]) -> None:
    """Texts are not compared: where rounding decides, another token is as right."""
    model = make_model(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        head_dim=32, vocab_size=500, max_position_embeddings=512, initializer_range=0.1,
    ).to(device, torch.bfloat16)  # fmt: skip
    exact = copy.deepcopy(model).double()
    long = torch.randint(3, 500, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [long, long[:130], [*long[:64], 7], [9]]
    sampler = Sampler(model)
    assert sampler.backend.startswith("paged")
    outputs = sampler.generate(prompts, SamplingParams(n=8, max_tokens=64, ignore_eos=True))
    scores = sampler.score(prompts, [[row.token_ids for row in o.outputs] for o in outputs])
    errors: dict[str, list[Tensor]] = {"sampled": [], "scored": [], "plain": []}
    for prompt, output, group in zip(prompts, outputs, scores, strict=True):
        for row, scored in zip(output.outputs, group, strict=True):
            truth = forward_logprobs(exact, prompt, row.token_ids)
            errors["sampled"].append(torch.tensor(row.logprobs).double() - truth)
            errors["scored"].append(scored.double() - truth)
            errors["plain"].append(forward_logprobs(model, prompt, row.token_ids) - truth)
    rms = {name: float(torch.cat(e).square().mean().sqrt()) for name, e in errors.items()}
    assert rms["plain"] > 1e-3, "nothing is rounded"
    # Of 2048 tokens: three standard errors of the estimate are 5%.
    assert rms["sampled"] <= 1.05 * rms["plain"]
    assert rms["scored"] <= 1.05 * rms["plain"]
