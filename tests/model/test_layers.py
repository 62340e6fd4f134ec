"""Which layers of a model run in kernels of ours, that they compute the same, and give back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srlm_fast.model.forward import hidden_states
from srlm_fast.model.layers import _agree, _fused, fused_layers
from srlm_kernels import layers, native
from tests.sampler.families import FAMILIES

pytestmark = pytest.mark.skipif(not layers.available(), reason=native.why())
NORM, MLP, ROTARY = "RMSNorm", "MLP", "Attention"
# What of a family is recognised; Gemma's MLPs are of another activation, OLMo's norms no RMSNorms.
RECOGNISED = {
    "llama": {NORM, MLP, ROTARY},
    "qwen2": {NORM, MLP, ROTARY},
    "qwen3": {NORM, MLP, ROTARY},
    "mistral": {NORM, MLP, ROTARY},
    "olmo2": {NORM, MLP, ROTARY},
    "deepseek_v3": {NORM, MLP, ROTARY},
    "gemma2": {NORM, ROTARY},
    "gemma3_text": {NORM, ROTARY},
    "phi3": {NORM, ROTARY},
    "mixtral": {NORM, ROTARY},
    "gpt_oss": {NORM},
    "olmo": {MLP, ROTARY},
    "gpt_neox": {ROTARY},
    "cohere": {MLP},  # whose rotary embedding turns neighbours, not halves
    "gpt2": set(),
}


def replaced(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("family", RECOGNISED)
def test_what_is_recognised(family: str) -> None:
    model = FAMILIES[family]()
    with fused_layers(model):
        names = {type(m).__name__ for m in replaced(model)}
    assert {k for k in (NORM, MLP, ROTARY) if any(n.endswith(k) for n in names)} == RECOGNISED[
        family
    ]
    assert not replaced(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_the_model(family: str) -> None:
    model = FAMILIES[family]()
    ids = (torch.arange(34).view(2, 17) * 7 + 3) % 96

    def run() -> list[Tensor]:
        model.zero_grad()
        states = hidden_states(model, ids)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        return [states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = run()
    with fused_layers(model):
        found = run()
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(x - y) <= 1e-5 * torch.linalg.vector_norm(y) + 1e-6


def test_they_are_given_back_whatever_happens() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(KeyboardInterrupt), fused_layers(model):
        assert replaced(model)
        with fused_layers(model):  # inside another: nothing is left to replace
            pass
        assert replaced(model)
        raise KeyboardInterrupt
    assert not replaced(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_computed_as_before(dtype: torch.dtype) -> None:
    model = FAMILIES["llama"]().to(dtype)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = hidden_states(model, ids)
        with fused_layers(model):
            assert torch.equal(hidden_states(model, ids), expected)


def test_one_class_may_have_several_activations() -> None:
    model = FAMILIES["llama"]()
    mlp: Any = model.model.layers[0].mlp
    mlp.act_fn = nn.GELU()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = mlp(x)
    with fused_layers(model):
        assert "forward" not in vars(mlp) and "forward" in vars(model.model.layers[1].mlp)
        assert torch.equal(mlp(x), expected)


class Sums(nn.Module):
    """Looks like one of a family's norms; `rule` is what it computes."""

    def __init__(self, rule: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        super().__init__()
        self.weight, self.eps, self.rule = nn.Parameter(torch.ones(12)), 1e-3, rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, self.weight, self.eps)


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("rule", "known"),
    [
        (lambda x, w, eps: x * (mean_square(x) + eps).rsqrt() * w, True),
        (lambda x, w, eps: x * (mean_square(x) + eps).rsqrt() * (1 + w), True),
        (lambda x, w, eps: x / (mean_square(x).sqrt() + eps) * w, False),
        (lambda x, w, eps: x * (mean_square(x) + 1e-6).rsqrt() * w, False),
        (lambda x, w, eps: x * (mean_square(centred(x)) + eps).rsqrt() * w, False),
        (lambda x, w, eps: x * (mean_square(x) + eps).rsqrt() * w.square(), False),
        (lambda x, w, eps: x * w, False),
    ],
)  # fmt: skip
def test_a_norm_of_another_formula_keeps_it(
    rule: Callable[[Tensor, Tensor, float], Tensor], known: bool
) -> None:
    kind = type("OddRMSNorm", (Sums,), {})  # of every rule a class of its own, as families are
    assert (_fused(kind, kind(rule)) is not None) == known


class Gated(nn.Module):
    def __init__(self, limit: float, dropout: float | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(5, 7), nn.Linear(5, 7)
        self.down_proj, self.act_fn, self.limit = nn.Linear(7, 5), nn.SiLU(), limit
        if dropout is not None:
            self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x).clamp(-self.limit, self.limit)
        out: Tensor = self.down_proj(gate * up)
        return self.dropout(out) if hasattr(self, "dropout") else out


@pytest.mark.parametrize(
    ("limit", "dropout", "known"),
    [(torch.inf, None, True), (7.0, None, False), (torch.inf, 0.5, False)],
)
def test_an_mlp_of_another_formula_keeps_it(
    limit: float, dropout: float | None, known: bool
) -> None:
    example: Any = type("OddMLP", (Gated,), {})(limit, dropout)
    assert (_fused(type(example), example.eval()) is not None) == known


def test_trying_a_class_takes_no_random_numbers_of_the_users() -> None:
    examples = type("NewRMSNorm", (Sums,), {})(lambda x, w, eps: x), type("NewMLP", (Gated,), {})(9)
    state = torch.random.get_rng_state()
    for example in examples:
        _fused(type(example), example)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_class_patched_after_it_was_tried_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    mlp: Any = model.model.layers[0].mlp
    with fused_layers(model):
        assert "forward" in vars(mlp)
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: 2 * x)
    with fused_layers(model):
        assert torch.equal(mlp(torch.ones(3, 32)), torch.full((3, 32), 2.0))


def test_a_class_may_make_its_instances_in_a_way_of_its_own() -> None:
    """As those that FSDP2 puts in the place of a family's."""

    class Wrapped(Sums):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return Sums(*args, **kwargs)

    example = Sums(lambda x, w, eps: x * (mean_square(x) + eps).rsqrt() * w)
    example.__class__ = type("WrappedRMSNorm", (Wrapped,), {})
    assert _fused(type(example), example) is not None


def test_layers_may_be_called_by_keywords() -> None:
    model = FAMILIES["llama"]()
    layer: Any = model.model.layers[0]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = layer.input_layernorm(x), layer.mlp(x)
    with fused_layers(model):
        assert torch.equal(layer.input_layernorm(hidden_states=x), expected[0])
        assert torch.equal(layer.mlp(x=x), expected[1])


def test_what_cannot_be_tried_is_no_match() -> None:
    def asks(*_: Any) -> Any:
        raise AttributeError("no such thing")

    assert not _agree(asks, lambda: torch.ones(1))
    assert not _agree(lambda: torch.ones(1), lambda: torch.zeros(1))
