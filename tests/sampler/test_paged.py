"""The paged engine whole: sharing, preemption, bursts, pages that all come back."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.sampler import Output, Sampler, SamplingParams
from srlm_fast.sampler.paged import PagedEngine
from srlm_fast.sampler.pool import KVMemory

IMPLS = ["auto", "reference"]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(max_position_embeddings=1024)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Around multiples of a page, nested, and one alone."""
    generator = torch.Generator().manual_seed(3)
    long = torch.randint(3, 96, (530,), generator=generator).tolist()
    return [long[:130], long[:64], long[:65], [*long[:128], 7, 8], [9], long, long[:63]]


@pytest.fixture(params=IMPLS)
def make(request: pytest.FixtureRequest, model: Any) -> Iterator[Callable[..., Sampler]]:
    """Samplers on `model`; every one of their pages is accounted for when the test ends."""
    made: list[Sampler] = []

    def sampler(steps: int = 0, **options: Any) -> Sampler:
        made.append(Sampler(model, impl=request.param, **options))
        if steps:
            made[-1]._engine.steps = steps
        return made[-1]

    yield sampler
    for sampler_ in made:
        sampler_._engine.check()
        assert all(node.users == 0 for node in sampler_._engine.forest.nodes())


def engine(sampler: Sampler) -> PagedEngine:
    assert isinstance(sampler._engine, PagedEngine)
    return sampler._engine


def tokens(outputs: list[Output]) -> list[list[list[int]]]:
    return [[c.token_ids for c in output.outputs] for output in outputs]


def logprobs(outputs: list[Output]) -> torch.Tensor:
    return torch.tensor([x for o in outputs for c in o.outputs for x in c.logprobs])


def plain(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    return logps[len(prompt) - 1 :].gather(-1, torch.tensor(completion)[:, None])[:, 0]


def test_sharing_changes_no_logits(
    make: Callable[..., Sampler], model: Any, prompts: list[list[int]]
) -> None:
    params = SamplingParams(n=2, max_tokens=70, ignore_eos=True)
    for prompt, output in zip(prompts, make().generate(prompts, params), strict=True):
        for row in output.outputs:
            expected = plain(model, prompt, row.token_ids)
            got = torch.tensor(row.logprobs, dtype=torch.float64)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_trees_that_branch_at_every_depth(
    make: Callable[..., Sampler], model: Any, prompts: list[list[int]]
) -> None:
    """Before, at and behind the end of each of four pages, against float64: as close as the plain
    forward, which is off by about 1e-5 at most."""
    long, exact = prompts[5], copy.deepcopy(model).double()
    cuts = [1, *(64 * page + near for page in (1, 2, 3, 4) for near in (-1, 0, 1))]
    tree = [long[:300], *(long[:cut] + [3 + cut % 90] * 2 for cut in cuts)]
    outputs = make().generate(tree, SamplingParams(n=2, max_tokens=4, ignore_eos=True))
    ours, theirs = [], []
    for prompt, output in zip(tree, outputs, strict=True):
        for row in output.outputs:
            truth = plain(exact, prompt, row.token_ids)
            ours.append(torch.tensor(row.logprobs).double() - truth)
            theirs.append(plain(model, prompt, row.token_ids) - truth)
    found, allowed = torch.cat(ours), torch.cat(theirs)
    assert allowed.abs().max() < 5e-5
    assert found.abs().max() <= 2 * allowed.abs().max()
    assert found.square().mean() <= 2 * allowed.square().mean()


def test_tokens_do_not_depend_on_company_order_or_bursts(
    make: Callable[..., Sampler], prompts: list[list[int]]
) -> None:
    params = SamplingParams(n=3, max_tokens=40, seed=5, logit_bias={2: 3.0})
    together = make().generate(prompts, params)
    lengths = {len(ids) for group in tokens(together) for ids in group}
    assert len(lengths) > 6, "rows must end one by one"
    assert tokens([make().generate([p], params)[0] for p in prompts]) == tokens(together)
    assert tokens(make().generate(prompts[::-1], params)[::-1]) == tokens(together)
    for steps in (1, 5, 64):
        again = make(steps=steps).generate(prompts, params)
        assert tokens(again) == tokens(together)
        torch.testing.assert_close(logprobs(again), logprobs(together), atol=1e-5, rtol=1e-5)


def test_a_small_pool_gives_the_same_tokens(
    make: Callable[..., Sampler], prompts: list[list[int]]
) -> None:
    params = SamplingParams(n=4, max_tokens=300, ignore_eos=True, seed=1)
    roomy = make(batch_tokens=64 * 400).generate(prompts[:4], params)
    # 20 pages: admission expects 256 tokens of a row, and rows draw 300.
    small = make(batch_tokens=64 * 20)
    outputs = small.generate(prompts[:4], params)
    assert engine(small).preemptions > 0
    assert tokens(outputs) == tokens(roomy)
    torch.testing.assert_close(logprobs(outputs), logprobs(roomy), atol=2e-5, rtol=1e-5)


def count_tokens(sampler: Sampler, fed: list[int]) -> Any:
    return sampler.model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )


def test_every_shared_page_is_computed_once(
    make: Callable[..., Sampler], prompts: list[list[int]]
) -> None:
    sampler, fed = make(), []
    hook = count_tokens(sampler, fed)
    chosen = [prompts[0], prompts[3], prompts[0], prompts[5]]
    sampler.generate(chosen, SamplingParams(n=3, max_tokens=1))
    # 130 tokens; of the second the two behind 128; the third is the first; 530 - 128.
    assert fed == [130 + 2 + 402]
    fed.clear()
    sampler.generate(chosen, SamplingParams(n=3, max_tokens=1, seed=9))
    assert fed == [3], "a later call finds them; each prompt's last token is looked at again"
    fed.clear()
    sampler.score(chosen[:1], [[[5, 6, 7], [8]]])
    assert fed == [1 + 2]
    sampler.sleep()
    fed.clear()
    sampler.generate(chosen[:1], SamplingParams(max_tokens=1))
    assert fed == [130]
    hook.remove()


def test_a_cached_prompt_gives_the_same_tokens(
    make: Callable[..., Sampler], prompts: list[list[int]]
) -> None:
    params = SamplingParams(n=2, max_tokens=20)
    sampler = make()
    first = sampler.generate(prompts, params)
    assert tokens(sampler.generate(prompts, params)) == tokens(first)
    assert tokens(make().generate(prompts, params)) == tokens(first)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 7], ids=lambda n: f"pass {n}")
def test_all_pages_come_back_when_a_call_breaks(
    error: type[BaseException], call: int, make: Callable[..., Sampler], prompts: list[list[int]]
) -> None:
    sampler, calls = make(), 0
    params = SamplingParams(n=2, max_tokens=20)
    expected = tokens(sampler.generate(prompts, params))
    name = sampler.model.config._attn_implementation

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("in the middle")

    hook = sampler.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        sampler.generate([[*p, 3] for p in prompts], params)
    hook.remove()
    assert sampler.model.config._attn_implementation == name
    assert engine(sampler).pool.free == engine(sampler).pool.size
    assert tokens(sampler.generate(prompts, params)) == expected


def test_a_pool_too_small_for_one_row_is_refused(
    make: Callable[..., Sampler], prompts: list[list[int]]
) -> None:
    sampler = make(batch_tokens=256)
    with pytest.raises(UserError, match="needs 640 tokens of KV memory, and there are 256"):
        sampler.generate([prompts[5]], SamplingParams(max_tokens=10))
    with pytest.raises(UserError, match="there are 256"):
        sampler.score([prompts[0]], [[[5] * 200]])
    assert len(sampler.generate([[5] * 100], SamplingParams(max_tokens=90))) == 1


def test_scores_in_a_small_pool(
    make: Callable[..., Sampler], model: Any, prompts: list[list[int]]
) -> None:
    generator = torch.Generator().manual_seed(4)
    groups = [
        [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (1, 70, 0, 130)]
        for _ in prompts
    ]
    scores = make(batch_tokens=64 * 13).score(prompts, groups)
    for prompt, group, found in zip(prompts, groups, scores, strict=True):
        for completion, logps in zip(group, found, strict=True):
            assert len(logps) == len(completion)
            if completion:
                expected = plain(model, prompt, completion)
                torch.testing.assert_close(logps.double(), expected, atol=2e-5, rtol=1e-5)


def test_passes_are_cut_anywhere(
    make: Callable[..., Sampler], model: Any, prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    params = SamplingParams(n=2, max_tokens=5)
    expected = tokens(make().generate(prompts, params))
    completions = [[[5, 6, 7] * 20, [8, 9]] for _ in prompts]
    whole = make().score(prompts, completions)
    monkeypatch.setattr("srlm_fast.sampler.prefill.CPU_PASS_TOKENS", 37)
    assert tokens(make().generate(prompts, params)) == expected
    for some, others in zip(make().score(prompts, completions), whole, strict=True):
        for a, b in zip(some, others, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rows_of_different_parameters_run_together(
    make: Callable[..., Sampler], prompts: list[list[int]]
) -> None:
    mixed = [
        SamplingParams(n=1, temperature=0.0, max_tokens=9),
        SamplingParams(n=3, temperature=0.7, top_k=5, max_tokens=20),
        SamplingParams(n=2, top_p=0.8, seed=3, max_tokens=4),
        SamplingParams(n=2, min_p=0.2, repetition_penalty=1.3, max_tokens=12),
        SamplingParams(n=1, logit_bias={4: 5.0}, stop_token_ids=(7,), max_tokens=30),
        SamplingParams(n=2, min_tokens=6, logit_bias={2: 9.0}, max_tokens=11),
        SamplingParams(),
    ]
    together = make().generate(prompts, mixed)
    alone = [make().generate([p], each)[0] for p, each in zip(prompts, mixed, strict=True)]
    assert tokens(together) == tokens(alone)
    with pytest.raises(ValueError, match="7 prompts, but 1 SamplingParams"):
        make().generate(prompts, mixed[:1])


def test_small_calls_do_not_copy_all_memory_every_time(
    make: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = 0
    resize = KVMemory.resize

    def counted(self: KVMemory, pages: int) -> None:
        nonlocal copied
        copied += min(pages, self.pages)
        resize(self, pages)

    sampler = make()
    monkeypatch.setattr(KVMemory, "resize", counted)
    for i in range(3, 63):  # of a prompt that stays each
        sampler.generate([[i] * 64], SamplingParams(n=1, max_tokens=2))
    pages = engine(sampler).runner.memory.pages
    assert 60 <= pages <= 2 * 62
    assert copied <= 2 * pages
