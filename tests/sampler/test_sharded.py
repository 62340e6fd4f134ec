"""What several ranks sample and score together is what one does, to the last bit on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_fast.errors import UserError
from srlm_fast.parallel import Ranks
from srlm_fast.sampler import Sampler, SamplingParams
from srlm_fast.sampler import engine as sampler_engine
from srlm_fast.sampler.sharded import ShardedSampler
from srlm_kernels import native
from tests.srlm_kernels import ranks as processes

VOCAB = 256
COUNTS = (0, 1, 2, 7)  # of prompts: none, fewer than ranks, uneven shares


def here() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())


def new_model() -> Any:
    # Sizes are multiples of a vector, so that a row is its own to the last bit in any batch.
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def samplers() -> tuple[ShardedSampler, Sampler]:
    model = new_model()
    return ShardedSampler(model, ranks=here()), Sampler(model)


def prompts(count: int) -> list[list[int]]:
    """Of which every fifth is the first one again."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, VOCAB, (4 + i,), generator=generator).tolist() for i in range(count)]
    return [drawn[0] if i % 5 == 4 else prompt for i, prompt in enumerate(drawn)]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    if native.available():
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)


def candidates_are_those_of_one_rank() -> None:
    sharded, alone = samplers()
    for count in COUNTS:
        asked = prompts(count)
        params = SamplingParams(n=3, max_tokens=8, top_p=0.95, seed=5)
        each = [SamplingParams(n=1 + i % 2, max_tokens=4, seed=i) for i in range(count)]
        for wanted in (params, each):
            found, expected = sharded.generate(asked, wanted), alone.generate(asked, wanted)
            if native.available():
                assert found == expected
            for one, other in zip(found, expected, strict=True):
                assert one.prompt_token_ids == other.prompt_token_ids
                assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]


def scores_are_those_of_one_rank() -> None:
    sharded, alone = samplers()
    for count in COUNTS:
        asked, groups = prompts(count), [prompts(i)[:3] for i in range(count)]
        found, expected = sharded.score(asked, groups), alone.score(asked, groups)
        for one, other in zip(found, expected, strict=True):
            for logps, others in zip(one, other, strict=True):
                assert_close(logps, others)


def next_logprobs_are_those_of_one_rank() -> None:
    sharded, alone = samplers()
    for count in COUNTS:
        found = sharded.next_logprobs(prompts(count), [7, 9])
        assert found.shape == (count, 2)
        assert_close(found, alone.next_logprobs(prompts(count), [7, 9]))


def each_prompt_is_computed_on_one_rank() -> None:
    ranks, (sharded, _) = here(), samplers()
    with mock.patch.object(sampler_engine, "completion", wraps=sampler_engine.completion) as made:
        sharded.generate(prompts(7), SamplingParams(n=2, max_tokens=2))
    own = {call.args[0].prompt for call in made.call_args_list}
    together = [prompt for theirs in ranks.gather([own]) for prompt in theirs]
    assert sorted(together) == sorted(set(map(tuple, prompts(7))))


def a_mistake_is_refused_by_every_rank() -> None:
    """Also where the prompt is another rank's, and under its number in the whole call."""
    sharded, _ = samplers()
    for row in (0, 4):
        asked = prompts(5)
        asked[row] = []
        with pytest.raises(UserError, match=f"prompt {row} is empty"):
            sharded.generate(asked, SamplingParams())
        with pytest.raises(UserError, match=f"prompt {row} is empty"):
            sharded.score(asked, [[[5]]] * 5)


CHECKS: list[Callable[[], None]] = [
    candidates_are_those_of_one_rank,
    scores_are_those_of_one_rank,
    next_logprobs_are_those_of_one_rank,
    each_prompt_is_computed_on_one_rank,
    a_mistake_is_refused_by_every_rank,
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    return processes.start(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ranks(check: Callable[[], None], world: int, outputs: dict[int, list[str]]) -> None:
    processes.assert_passed(check, outputs[world])


if __name__ == "__main__":
    processes.main({2: CHECKS, 3: CHECKS})
