"""Every family's own mathematics through pages, against transformers' `generate` and plain forward.

Prompts begin alike, stand alone, and end around pages of 64 and windows of 20, 70 and 100, which
are then crossed by the prompt or by the response.
"""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from srlm_fast.sampler import Output, Sampler, SamplingParams
from tests.sampler.families import FAMILIES, UNSUPPORTED, VOCAB

TOKENS = 8
GREEDY = SamplingParams(n=2, temperature=0.0, max_tokens=TOKENS)


def _ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


LONG, OTHER = _ids(126, 0), _ids(130, 1)
PROMPTS = [LONG[:60], LONG, LONG[:1], LONG[:15], OTHER, OTHER[:64], LONG[:95]]


class Case:
    """A model, its sampler, what was sampled greedily in one call, and what that should be."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sampler = Sampler(model)
        self.outputs = self.sampler.generate(PROMPTS, GREEDY)
        self.expected = [greedy(model, prompt) for prompt in PROMPTS]


def greedy(model: Any, prompt: list[int], tokens: int = TOKENS, **options: Any) -> list[int]:
    """What `generate` gives for one prompt; no choice may be so close that rounding makes it."""
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    best = torch.cat(made.logits).float().topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a tie: take another seed of weights"
    tokens_made: list[int] = made.sequences[0, len(prompt) :].tolist()
    return tokens_made


def plain_logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None])[:, 0]


def tokens(outputs: list[Output]) -> list[list[list[int]]]:
    return [[row.token_ids for row in output.outputs] for output in outputs]


def last_layer(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[-1]


def state(model: Any) -> list[Any]:
    """All that a call borrows and must give back."""
    return [
        [config._attn_implementation for config in _configs(model)],
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [weight.requires_grad for weight in model.parameters()],
        [weight.grad for weight in model.parameters()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    ]


def _configs(model: Any) -> Iterator[Any]:
    seen = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return (config for config in seen.values() if hasattr(config, "_attn_implementation"))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(FAMILIES[request.param]())


def test_family_runs_on_pages(case: Case) -> None:
    assert case.sampler.backend.startswith("paged")


def test_greedy_equals_transformers_generate(case: Case) -> None:
    assert tokens(case.outputs) == [[ids, ids] for ids in case.expected]


def test_a_prompt_alone_gives_the_same_tokens(case: Case) -> None:
    for prompt in (0, 4):
        case.sampler.sleep()  # or the prompt would come from the pages of the earlier call
        alone = case.sampler.generate(PROMPTS[prompt : prompt + 1], GREEDY)
        assert tokens(alone)[0][0] == case.expected[prompt]


def test_logprobs_equal_a_plain_forward(case: Case) -> None:
    for output in case.outputs:
        for row in output.outputs:
            expected = plain_logprobs(case.model, output.prompt_token_ids, row.token_ids)
            torch.testing.assert_close(torch.tensor(row.logprobs), expected, atol=1e-4, rtol=0)


def test_scores_equal_a_plain_forward(case: Case) -> None:
    completions = [[ids, _ids(70, 2)[: 5 * row], []] for row, ids in enumerate(case.expected)]
    scores = case.sampler.score(PROMPTS, completions)
    for prompt, group, found in zip(PROMPTS, completions, scores, strict=True):
        for completion, logps in zip(group, found, strict=True):
            expected = plain_logprobs(case.model, prompt, completion)
            torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)


def test_the_model_comes_back_as_it_was(case: Case) -> None:
    check_that_the_model_comes_back(case.model, case.sampler)


def check_that_the_model_comes_back(model: Any, sampler: Sampler) -> None:
    """After calls, and after one that is broken off in a layer of its second forward pass."""
    model.train().requires_grad_(True)
    last_layer(model).eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, calls = state(model), 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    params = SamplingParams(n=2, max_tokens=3)
    first = tokens(sampler.generate(PROMPTS[3:4], params))
    sampler.score(PROMPTS[3:4], [[[5, 6]]])
    assert state(model) == before
    hook = last_layer(model).register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sampler.generate([OTHER[:21]], params)
    hook.remove()
    assert state(model) == before
    assert tokens(sampler.generate(PROMPTS[3:4], params)) == first
    model.requires_grad_(True).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_gives_the_tokens_of_a_cpu(name: str) -> None:
    """By Triton kernels and, where the model can be recorded, by graphs."""
    model = FAMILIES[name]()
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    sampler = Sampler(model.cuda())
    assert sampler.backend == "paged (triton)"
    outputs = sampler.generate(PROMPTS, GREEDY)
    assert tokens(outputs) == [[ids, ids] for ids in expected]
    scores = sampler.score(PROMPTS, [[ids] for ids in expected])
    for output, (logps,) in zip(outputs, scores, strict=True):
        found = torch.tensor(output.outputs[0].logprobs)
        torch.testing.assert_close(found, logps, atol=1e-4, rtol=0)


@torch.no_grad()
def cache_is_right(model: Any) -> bool:
    """Whether the model's last logits are the same with and without its cache; doge's were not in
    transformers 5.17."""
    ids = torch.tensor([LONG[:30]])
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    last = [model(ids).logits[0, -1], model(ids[:, -1:], past_key_values=cache).logits[0, -1]]
    return torch.allclose(*last, atol=1e-3)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_pages_cannot_serve_falls_back_with_one_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = UNSUPPORTED[name]()
    if not cache_is_right(model):
        pytest.skip("this version of transformers computes other logits with a cache")
    with caplog.at_level("WARNING", logger="srlm_fast.sampler"):
        case = Case(model)
        scores = case.sampler.score(PROMPTS, [[ids] for ids in case.expected])
    assert case.sampler.backend == "fallback"
    said = [r.getMessage() for r in caplog.records if r.name.startswith("srlm_fast")]
    assert len(said) == 1
    assert repr(model.config.model_type) in said[0]
    assert tokens(case.outputs) == [[ids, ids] for ids in case.expected]
    for output, (logps,) in zip(case.outputs, scores, strict=True):
        row = output.outputs[0]
        expected = plain_logprobs(model, output.prompt_token_ids, row.token_ids)
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    check_that_the_model_comes_back(model, case.sampler)


def test_a_row_that_grows_into_other_rotary_frequencies() -> None:
    """Keys that were cached with the frequencies of short rows must not serve a long one."""
    model = UNSUPPORTED["phi3 with longrope"]()
    prompt = LONG[:105]
    (output,) = Sampler(model).generate([prompt], SamplingParams(n=2, temperature=0, max_tokens=12))
    # Some versions of transformers serve the long one with the old keys themselves.
    expected = greedy(model, prompt, tokens=12, use_cache=False)
    assert [row.token_ids for row in output.outputs] == [expected, expected]


@pytest.fixture
def adapted() -> Any:
    """A llama with two adapters that change its tokens; the first is active."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    config = peft.LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(5)
        model = peft.get_peft_model(FAMILIES["llama"](), config, adapter_name="first")
        model.add_adapter("second", config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(3.0)
    return model.eval()


def test_adapters_that_are_on_count_and_those_that_are_off_do_not(adapted: Any) -> None:
    """One sampler all along: what it keeps of a prompt must not outlive a switch."""
    sampler = Sampler(adapted)
    assert sampler.backend.startswith("paged")

    def check() -> list[list[list[int]]]:
        made = tokens(sampler.generate(PROMPTS, GREEDY))
        expected = [greedy(adapted, prompt) for prompt in PROMPTS]
        assert made == [[ids, ids] for ids in expected]
        return made

    first = check()
    with adapted.disable_adapter():
        base = check()
    assert check() == first
    adapted.set_adapter("second")
    second = check()
    assert len({str(made) for made in (first, base, second)}) == 3


def test_merged_adapters(adapted: Any) -> None:
    sampler = Sampler(adapted)
    apart = tokens(sampler.generate(PROMPTS[:2], GREEDY))
    adapted.merge_adapter()
    assert tokens(sampler.generate(PROMPTS[:2], GREEDY)) == apart
    adapted.unmerge_adapter()
    assert tokens(sampler.generate(PROMPTS[:2], GREEDY)) == apart
