"""Whole generations: against `model.generate`, a training forward, and each other."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.sampler import Completion, Output, Sampler, SamplingParams

Prompts = list[list[int]]
VOCAB_END = 95


def tokens(outputs: list[Output]) -> list[list[list[int]]]:
    return [[c.token_ids for c in output.outputs] for output in outputs]


def completions(outputs: list[Output]) -> list[Completion]:
    return [c for output in outputs for c in output.outputs]


def test_tokens_do_not_depend_on_batch_order_or_retirement(model: Any, prompts: Prompts) -> None:
    params = SamplingParams(n=3, max_tokens=20, seed=5, logit_bias={2: 3.0})
    together = tokens(Sampler(model).generate(prompts, params))
    assert len({len(ids) for group in together for ids in group}) > 4, "rows must retire one by one"
    alone = [tokens(Sampler(model).generate([p], params))[0] for p in prompts]
    backwards = tokens(Sampler(model).generate(prompts[::-1], params))[::-1]
    split = tokens(Sampler(model, batch_tokens=120).generate(prompts, params))
    assert alone == together
    assert backwards == together
    assert split == together


def test_seed_and_index_change_the_tokens(model: Any, prompts: Prompts) -> None:
    sampler = Sampler(model)
    runs = [
        tokens(sampler.generate(prompts, SamplingParams(n=4, max_tokens=10, seed=seed)))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert all(len({tuple(ids) for ids in group}) == 4 for group in runs[0])
    fewer = tokens(sampler.generate(prompts, SamplingParams(n=2, max_tokens=10)))
    assert fewer == [group[:2] for group in runs[0]]


def test_equal_prompts_are_computed_once(make_model: Callable[..., Any], prompts: Prompts) -> None:
    model = make_model()
    sampler = Sampler(model)
    fed: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    params = SamplingParams(n=3, max_tokens=1)
    repeated = sampler.generate([prompts[0], prompts[2], prompts[0]], params)
    assert fed == [len(prompts[0]) + len(prompts[2])]
    assert tokens(repeated)[0] == tokens(repeated)[2]


def test_logprobs_equal_a_training_forward(model: Any, prompts: Prompts) -> None:
    params = SamplingParams(n=3, max_tokens=15, temperature=0.8, top_p=0.9, logit_bias={2: 2.0})
    for output in Sampler(model).generate(prompts, params):
        for row in output.outputs:
            ids = torch.tensor([output.prompt_token_ids + row.token_ids])
            logps = model(ids).logits[0, :-1].float().log_softmax(-1)
            start = len(output.prompt_token_ids) - 1
            expected = logps[start:].gather(-1, ids[0, start + 1 :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(row.logprobs), expected, atol=1e-4, rtol=0)
            assert row.cumulative_logprob == pytest.approx(sum(row.logprobs))
            assert len(row.sample_logprobs) == len(row.kept_mass) == len(row.token_ids)


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}, {}], ids=str)
def test_kept_mass_joins_the_two_logprobs(
    options: dict[str, Any], model: Any, prompts: Prompts
) -> None:
    params = SamplingParams(n=3, max_tokens=9, **options)
    for row in completions(Sampler(model).generate(prompts, params)):
        raw, sampled, kept = map(torch.tensor, (row.logprobs, row.sample_logprobs, row.kept_mass))
        torch.testing.assert_close(sampled - raw, -kept.log(), atol=1e-5, rtol=0)
        assert (kept < 1).any() if options else (kept == 1).all()


def test_eos_is_kept_and_ends_the_row(model: Any, prompts: Prompts) -> None:
    params = SamplingParams(n=8, max_tokens=12, logit_bias={2: 3.0})
    rows = completions(Sampler(model).generate(prompts, params))
    ended = [row for row in rows if row.finish_reason == "stop"]
    assert ended and len(ended) < len(rows)
    for row in rows:
        assert 2 not in row.token_ids[:-1]
        assert (row.token_ids[-1] == 2) == (row.finish_reason == "stop")
        assert row.stop_reason is None
        assert row.finish_reason == "stop" or len(row.token_ids) == 12


def test_more_eos_ids_than_the_models_own(model: Any, prompts: Prompts) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=False)
    free = tokens(Sampler(model).generate(prompts, params))
    extra = free[0][0][3]
    cut = Sampler(model, eos_ids=[extra]).generate(prompts[:1], params)[0].outputs[0]
    assert cut.token_ids == free[0][0][: free[0][0].index(extra) + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", None)


def test_repetition_penalty_equals_transformers_generate(model: Any, prompts: Prompts) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=1.5)
    for prompt, output in zip(prompts, Sampler(model).generate(prompts, params), strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.5,
            pad_token_id=VOCAB_END,
        )
        assert output.outputs[0].token_ids == theirs[0, len(prompt) :].tolist()


def test_rows_grow_past_a_page(model: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100, min_tokens=100)
    ours = Sampler(model).generate([[5, 6, 7]], params)[0].outputs[0].token_ids
    theirs = model.generate(
        torch.tensor([[5, 6, 7]]), do_sample=False, min_new_tokens=100, max_new_tokens=100
    )
    assert len(ours) == 100
    assert ours == theirs[0, 3:].tolist()


@pytest.mark.parametrize(
    "prompts,options,message",
    [
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5], [5] * 120], {"max_tokens": 9}, "prompt 1 has 120 tokens.*9 response.*128"),
        ([[5, 96]], {}, "prompt 0 has token id 96.*vocabulary of 96"),
        ([[-1]], {}, "prompt 0 has token id -1"),
        ([[5]], {"logit_bias": {1000: 1.0}}, "logit_bias has token id 1000"),
        ([[5]], {"stop": ("x",)}, "stop strings need the tokenizer"),
        (["text"], {}, "need the tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(model: Any, prompts: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(model).generate(prompts, SamplingParams(**options))


def test_a_prompt_may_fill_the_context_exactly(model: Any) -> None:
    row = Sampler(model).generate([[5] * 120], SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(row[0].outputs[0].token_ids) == 8


def test_no_prompts_no_outputs(model: Any) -> None:
    assert Sampler(model).generate([]) == []


def test_texts_are_tokenised_and_decoded(make_model: Callable[..., Any], tokenizer: Any) -> None:
    sampler = Sampler(make_model(), tokenizer)
    params = SamplingParams(n=2, max_tokens=6)
    ids = tokenizer("a").input_ids
    by_text, by_ids = sampler.generate(["a", ids], params)
    assert by_text == by_ids
    for row in by_text.outputs:
        assert row.text == "".join(chr(29 + i) for i in row.token_ids if i > 2)


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_families_without_pages_fall_back_and_say_so_once(
    family: str,
    make_model: Callable[..., Any],
    prompts: Prompts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model(family)
    sampler = Sampler(model)
    assert sampler.backend == "fallback"
    (record,) = [r for r in caplog.records if r.name == "srlm_fast.sampler"]
    assert family in record.getMessage() and "falling back" in record.getMessage()
    with pytest.raises(UserError, match=f"{family}.*impl='paged'"):
        Sampler(model, impl="paged")
    outputs = sampler.generate(prompts[:3], SamplingParams(n=2, temperature=0.0, max_tokens=6))
    for prompt, output in zip(prompts[:3], outputs, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=VOCAB_END)
        expected = theirs[0, len(prompt) :].tolist()
        assert [c.token_ids for c in output.outputs] == [expected, expected]


def test_diverged_weights_are_named(make_model: Callable[..., Any]) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        Sampler(model)


@pytest.mark.parametrize("impl", ["auto", "reference", "fallback"])
def test_weights_that_diverge_between_calls_are_named(
    impl: str, make_model: Callable[..., Any], prompts: Prompts
) -> None:
    """Regression: rows of NaN drew token 0, and their text went on to the judge."""
    model = make_model()
    sampler, params = Sampler(model, impl=impl), SamplingParams(n=2, max_tokens=4)
    expected = sampler.generate(prompts, params)
    weight = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="a row had no token to draw"):
        sampler.generate(prompts, params)
    with torch.no_grad():
        model.model.norm.weight.copy_(weight)
    assert tokens(sampler.generate(prompts, params)) == tokens(expected)


def test_a_bias_that_bans_every_token_is_named(model: Any) -> None:
    nothing = SamplingParams(logit_bias=dict.fromkeys(range(96), -float("inf")))
    with pytest.raises(UserError, match="logit_bias, allowed and min_tokens leave none"):
        Sampler(model).generate([[5]], nothing)
    (out,) = Sampler(model).generate(
        [[5]], SamplingParams(n=9, logit_bias=dict.fromkeys(range(95), -float("inf")))
    )
    assert {token for row in out.outputs for token in row.token_ids} == {95}


def test_bfloat16_weights(make_model: Callable[..., Any], prompts: Prompts) -> None:
    model = make_model().to(torch.bfloat16)
    rows = completions(Sampler(model).generate(prompts, SamplingParams(n=2, max_tokens=8)))
    assert all(torch.tensor(row.logprobs).isfinite().all() for row in rows)


def test_numbers_of_any_kind(model: Any, prompts: Prompts) -> None:
    arrays = [np.array(prompt) for prompt in prompts]
    params = SamplingParams(n=2, max_tokens=5, logit_bias={7: 3})
    expected = Sampler(model).generate(prompts, params)
    torch.set_default_dtype(torch.float64)
    try:
        found = Sampler(model).generate(arrays, params)
        scores = Sampler(model).score(prompts, [[[5, 6]]] * len(prompts))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected
    assert {logps.dtype for group in scores for logps in group} == {torch.float32}


def test_equal_prompts_share_no_lists(model: Any, prompts: Prompts) -> None:
    first, second = Sampler(model).generate([prompts[0]] * 2, SamplingParams(max_tokens=3))
    assert first == second and first.outputs[0].token_ids is not second.outputs[0].token_ids


def test_a_model_that_was_cast_needs_a_new_sampler(make_model: Callable[..., Any]) -> None:
    sampler = Sampler(make_model())
    sampler.model.double()
    with pytest.raises(UserError, match=r"cast from torch\.float32 .* make a new Sampler"):
        sampler.generate([[5]], SamplingParams(max_tokens=2))


def test_a_sampler_may_run_within_another(make_model: Callable[..., Any], prompts: Prompts) -> None:
    model, other = make_model(), Sampler(make_model(seed=1))
    params = SamplingParams(max_tokens=4)
    expected = Sampler(model).generate(prompts, params)
    model.model.layers[0].register_forward_hook(lambda *_: other.score([[5]], [[[6]]]) and None)
    assert Sampler(model).generate(prompts, params) == expected
