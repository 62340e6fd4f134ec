"""Teacher-forced scores."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.sampler import Sampler, SamplingParams, prefill, scoring


@pytest.fixture
def completions(prompts: list[list[int]]) -> list[list[list[int]]]:
    """Ragged, with an empty completion and a prompt without any."""
    generator = torch.Generator().manual_seed(2)
    counts = [[4, 0, 9], [1], [], [6, 6], [2], [3]]
    return [
        [torch.randint(3, 96, (n,), generator=generator).tolist() for n in group]
        for group in counts
    ]


def naive(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(ids).logits[0].float().log_softmax(-1)
    rows = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return torch.stack([logps[i, t] for i, t in zip(rows, completion, strict=True)])


@pytest.mark.parametrize(
    "family,options",
    [
        ("llama", {}),
        (
            "gemma2",
            {
                "final_logit_softcapping": 5.0,
                "sliding_window": 6,
                "attn_implementation": "eager",  # of older transformers not the default
            },
        ),
        ("cohere", {"logit_scale": 0.25}),
        ("phi", {}),
        ("gpt2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scores_equal_a_plain_forward(
    family: str,
    options: dict[str, Any],
    make_model: Callable[..., Any],
    prompts: list[list[int]],
    completions: list[list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (scoring, prefill):
        monkeypatch.setattr(module, "PASS_TOKENS", 40)  # several batches and passes
    monkeypatch.setattr(prefill, "CPU_PASS_TOKENS", 40)
    monkeypatch.setattr(scoring, "max_rows", lambda _vocab: 5)  # several calls of the head
    model = make_model(family, **options)
    scores = Sampler(model).score(prompts, completions)
    assert [[len(s) for s in group] for group in scores] == [
        [len(c) for c in group] for group in completions
    ]
    for prompt, group, found in zip(prompts, completions, scores, strict=True):
        for completion, logps in zip(group, found, strict=True):
            assert logps.dtype == torch.float32
            if completion:
                torch.testing.assert_close(
                    logps, naive(model, prompt, completion), atol=1e-4, rtol=0
                )


def test_scores_equal_the_logprobs_of_sampling(model: Any, prompts: list[list[int]]) -> None:
    sampler = Sampler(model)
    outputs = sampler.generate(prompts, SamplingParams(n=3, max_tokens=12, top_p=0.9))
    scores = sampler.score(prompts, [[c.token_ids for c in o.outputs] for o in outputs])
    for output, group in zip(outputs, scores, strict=True):
        for row, logps in zip(output.outputs, group, strict=True):
            torch.testing.assert_close(torch.tensor(row.logprobs), logps, atol=1e-4, rtol=0)


def test_scores_can_be_used_in_a_loss(model: Any, prompts: list[list[int]]) -> None:
    score = Sampler(model).score(prompts[:1], [[[5, 6]]])[0][0]
    weight = torch.ones(2, requires_grad=True)
    (weight * score).sum().backward()
    torch.testing.assert_close(weight.grad, score)


def test_next_logprobs(model: Any, prompts: list[list[int]]) -> None:
    wanted = [7, 3, 95]
    found = Sampler(model).next_logprobs([*prompts, prompts[0]], wanted)
    assert found.shape == (len(prompts) + 1, 3)
    for prompt, row in zip([*prompts, prompts[0]], found, strict=True):
        expected = torch.cat([naive(model, prompt, [token]) for token in wanted])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


def test_nothing_to_score(model: Any) -> None:
    sampler = Sampler(model)
    assert sampler.score([], []) == []
    assert sampler.score([[5]], [[]]) == [[]]
    assert sampler.next_logprobs([], [5, 6]).shape == (0, 2)


def test_bad_input_is_refused(model: Any) -> None:
    sampler = Sampler(model)
    with pytest.raises(ValueError, match="2 prompts, but 1"):
        sampler.score([[5], [6]], [[[5]]])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        sampler.score([[5], []], [[[5]], [[5]]])
    with pytest.raises(UserError, match=r"prompt 0 has 100 tokens.*29.*128"):
        sampler.score([[5] * 100], [[[5], [5] * 29]])
    with pytest.raises(UserError, match="completion of prompt 0 has token id 96"):
        sampler.score([[5]], [[[96]]])
    with pytest.raises(UserError, match="token_ids has token id 96"):
        sampler.next_logprobs([[5]], [96])


def test_dropout_is_off_and_the_mode_comes_back(
    make_model: Callable[..., Any], prompts: list[list[int]]
) -> None:
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    first, second = (Sampler(model).score(prompts[:1], [[[5, 6, 7]]])[0][0] for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
