"""A trainer and a sampler share one model: neither may notice the other."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from srlm_fast.sampler import Output, Sampler, SamplingParams
from tests.sampler.families import VOCAB

Change = Callable[[Any, Any], None]
PARAMS = SamplingParams(n=2, temperature=0.0, max_tokens=6)


def _ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


LONG = _ids(110, 0)
PROMPTS = [LONG[:70], LONG, LONG[:5]]  # a page is shared, and kept after a call


def tokens(outputs: list[Output]) -> list[list[list[int]]]:
    return [[row.token_ids for row in output.outputs] for output in outputs]


def sha256(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def train(model: Any, steps: int, every: int, sample: Callable[[], Any]) -> str:
    """Steps of AdamW with dropout; `sample` is called before every `every`-th."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.randint(VOCAB, (steps, 2, 16), generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        for step, ids in enumerate(batches):
            if step % every == 0:
                sample()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return sha256(model)


def test_training_with_a_sampler_beside_gives_the_same_bytes(
    make_model: Callable[..., Any],
) -> None:
    plain, shared = (make_model(attention_dropout=0.2) for _ in range(2))
    sampler, params = Sampler(shared), SamplingParams(n=2, max_tokens=4)
    calls = []

    def sample() -> None:
        outputs = sampler.generate(PROMPTS, params)
        sampler.score(PROMPTS, [[row.token_ids for row in out.outputs] for out in outputs])
        calls.append(tokens(outputs))

    start = sha256(plain)
    alone = train(plain, 300, 10, lambda: None)
    beside = train(shared, 300, 10, sample)
    assert alone != start
    assert beside == alone
    assert len(calls) == 30 and calls[0] != calls[-1], "the sampler must follow the training"
    assert calls[-1] != tokens(sampler.generate(PROMPTS, params))


def _to_other_values(model: Any, other: Any) -> None:
    with torch.no_grad():
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(new)


def _through_data(model: Any, other: Any) -> None:
    """Such changes do not count a tensor's version up."""
    for mine, new in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(new.data)


def _one_element_through_data(model: Any, _other: Any) -> None:
    model.model.norm.weight.data[3] *= -8


def _rows_swapped_through_data(model: Any, _other: Any) -> None:
    """The same numbers in other places: a sum of them stays as it was."""
    weight = model.model.embed_tokens.weight.data
    weight.copy_(weight.flip(0))


def _other_memory(model: Any, other: Any) -> None:
    for mine, new in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = new.data.clone()


def _load_state_dict(model: Any, other: Any) -> None:
    model.load_state_dict(other.state_dict())


def _load_state_dict_by_assignment(model: Any, other: Any) -> None:
    model.load_state_dict(other.state_dict(), assign=True)


def _step_of_an_optimizer(model: Any, _other: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    ids = torch.tensor([LONG[:16]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _other_head(model: Any, other: Any) -> None:
    model.lm_head = other.lm_head


CHANGES: list[Change] = [
    _to_other_values,
    _through_data,
    _one_element_through_data,
    _rows_swapped_through_data,
    _other_memory,
    _load_state_dict,
    _load_state_dict_by_assignment,
    _step_of_an_optimizer,
    _other_head,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_the_next_call_sees_changed_weights(change: Change, make_model: Callable[..., Any]) -> None:
    """Tokens, log-probs and scores are those of a sampler that has never seen the old ones."""
    model = make_model()
    sampler = Sampler(model)
    before = sampler.generate(PROMPTS, PARAMS)
    change(model, make_model(seed=1))
    after, fresh = sampler.generate(PROMPTS, PARAMS), Sampler(model).generate(PROMPTS, PARAMS)
    assert tokens(after) == tokens(fresh)
    assert tokens(after) != tokens(before)
    completions = [[row.token_ids for row in output.outputs] for output in before]
    scores = sampler.score(PROMPTS, completions)
    for output, row in zip(before, scores, strict=True):
        prompt, ids = output.prompt_token_ids, output.outputs[0].token_ids
        with torch.no_grad():
            logps = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logps.float().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(row[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("call", [1, 2, 4], ids=["prefill", "first step", "later step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_breaks_off_leaves_nothing_behind(
    error: type[BaseException], call: int, make_model: Callable[..., Any]
) -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    sampler = Sampler(model)
    expected = Sampler(model).generate(PROMPTS, PARAMS)
    layer, calls = model.model.layers[1], 0
    forward = layer.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("in the middle of a forward pass")
        return forward(*args, **kwargs)

    layer.forward = fail
    with pytest.raises(error, match="in the middle"):
        sampler.generate(PROMPTS, PARAMS)
    del layer.forward
    assert model.config._attn_implementation == "sdpa"
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(weight.requires_grad for weight in model.parameters())
    assert tokens(sampler.generate(PROMPTS, PARAMS)) == tokens(expected)
    ids = torch.tensor([LONG])
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
