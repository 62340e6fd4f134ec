"""A model whose responses share their prompt: what is computed, refused and restored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_fast.model import prefix
from srlm_fast.model.prefix import packed_states, refusal
from srlm_kernels import PrefixPlan

PROMPT, TAILS = [5, 9, 3, 7, 8], ([4, 6, 2], [11, 10, 13, 12])
PLAN = PrefixPlan.of([(5, (3, 4))])
IDS = torch.tensor([[*PROMPT, *TAILS[0], *TAILS[1]]])
POSITIONS = torch.tensor([[*range(5), *range(5, 8), *range(5, 9)]])


def alone(model: Any) -> Tensor:
    rows = [torch.tensor([[*PROMPT, *tail]]) for tail in TAILS]
    first, second = (model.model(row).last_hidden_state[0] for row in rows)
    return torch.cat([first, second[5:]])


def test_states_are_those_of_the_rows_alone(make_model: Callable[..., Any]) -> None:
    model = make_model("qwen2").double()
    packed = packed_states(model, IDS, POSITIONS, PLAN)[0]
    torch.testing.assert_close(packed, alone(model), rtol=1e-10, atol=1e-10)
    assert model.config._attn_implementation == "sdpa"


def test_the_attention_is_restored_after_an_error(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("no")

    model = make_model()
    monkeypatch.setattr(prefix, "prefix_attention", fail)
    with pytest.raises(RuntimeError, match="no"):
        packed_states(model, IDS, POSITIONS, PLAN)
    assert model.config._attn_implementation == "sdpa"
    model(IDS)


def test_attention_outside_of_a_packed_pass_says_so(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.config._attn_implementation = "srlm_prefix"
    with pytest.raises(RuntimeError, match="nothing is packed"):
        model(IDS)


def test_models_that_can_share_are_not_refused(make_model: Callable[..., Any]) -> None:
    model = make_model().train()
    assert refusal(model) is None
    assert model.training and all(p.grad is None for p in model.parameters())
    assert refusal(make_model("mistral", sliding_window=3)) is None
    assert refusal(make_model().bfloat16()) is None


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("bloom", {}, "0 of its 2 layers"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "1 of its 2 layers"),
        ("llama", {"max_position_embeddings": 8}, "too short"),
    ],
)
def test_models_that_cannot_are_refused_with_a_reason(
    family: str, options: dict[str, Any], why: str, make_model: Callable[..., Any]
) -> None:
    assert why in (refusal(make_model(family, **options)) or "")


def test_a_model_that_ignores_positions_is_found(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    forward = model.model.forward

    def counted(*args: Any, position_ids: Any = None, **options: Any) -> Any:
        return forward(*args, position_ids=None, **options)

    monkeypatch.setattr(model.model, "forward", counted)
    assert "off by" in (refusal(model) or "")
