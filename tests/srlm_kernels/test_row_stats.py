"""`row_stats` in torch and in C++ against log-sum-exps of whole rows in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_kernels import native
from srlm_kernels import row_stats as api
from srlm_kernels.row_stats import new_state, row_stats_ref

PLAIN = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0}
TRANSFORMS = [
    {},
    {"logit_scale": 0.25},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"softcap": 20.0, "logit_scale": 1.5, "temperature": 1.3},
]
# One column; less than a vector; tails; around and past what one pass over the cache takes.
COLUMNS = [1, 11, 123, 511, 512, 513, 1000, 1024, 1025, 2051]
EXTRAPOLATION = 0.7
Fold = Callable[..., None]


@pytest.fixture(params=["torch", "cpp"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and not native.available():
        pytest.skip(native.why())
    return request.param


@pytest.fixture
def fold(impl: str) -> Fold:
    function = {"torch": row_stats_ref, "cpp": native.row_stats_cpp}[impl]
    return lambda *args, **kwargs: function(*args, **(PLAIN | kwargs))


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@dataclass
class Rows:
    logits: Tensor
    ref_logits: Tensor
    target: Tensor
    bias: Tensor
    ref_bias: Tensor
    transform: dict[str, float] = field(default_factory=dict)

    def streams(self) -> dict[str, Tensor]:
        """The final logits in float64."""
        options: dict[str, Any] = PLAIN | self.transform
        z, z_ref = (
            (x.double() + b.double()) * options["logit_scale"]
            for x, b in ((self.logits, self.bias), (self.ref_logits, self.ref_bias))
        )
        if cap := options["softcap"]:
            z, z_ref = (cap * (1 - 2 / ((2 * x / cap).exp() + 1)) for x in (z, z_ref))
        z, z_ref = z / options["temperature"], z_ref / options["temperature"]
        extrapolated = (1 + EXTRAPOLATION) * z - EXTRAPOLATION * z_ref
        extrapolated[(z == -torch.inf) | (z_ref == -torch.inf)] = -torch.inf
        return {"policy": z, "ref": z_ref, "extrapolated": extrapolated}

    def fold(self, fold: Fold, widths: list[int] | None = None, outputs: bool = True) -> Tensor:
        """The state after blocks of these widths, or after one."""
        state = empty_state(self.logits.shape[0], outputs)
        first = 0
        for width in widths or [self.logits.shape[1]]:
            block = slice(first, first + width)
            fold(
                state,
                self.logits[:, block],
                self.target,
                ref_logits=self.ref_logits[:, block],
                bias=self.bias[block],
                ref_bias=self.ref_bias[block],
                first_column=first,
                extrapolation=EXTRAPOLATION,
                **self.transform,
            )
            first += width
        return state


def empty_state(rows: int, outputs: bool = False) -> Tensor:
    names = ["entropy"] if outputs else []
    return new_state(rows, outputs=names, dtype=torch.float32, device=torch.device("cpu"))


def make(columns: int, dtype: torch.dtype = torch.float32, rows: int = 7, **transform: Any) -> Rows:
    g = torch.Generator().manual_seed(columns)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    logits = 4 * normal(rows, columns)
    return Rows(
        logits.to(dtype),
        (logits + normal(rows, columns)).to(dtype),
        torch.randint(0, columns, (rows,), generator=g),
        normal(columns),
        normal(columns),
        transform,
    )


def lse(state: Tensor, largest: int) -> Tensor:
    return state[largest].double() + state[largest + 1].double().log()


def assert_true(state: Tensor, rows: Rows, tolerance: float = 1e-6) -> None:
    """The state says what whole rows in float64 say; the tolerance is relative to the logits."""
    streams = rows.streams()
    z = streams["policy"]
    bound = {name: tolerance * x.abs().amax(1).clamp(min=1) for name, x in streams.items()}
    for name, largest in (("policy", 0), ("ref", 2), ("extrapolated", 4)):
        error = (lse(state, largest) - streams[name].logsumexp(1)).abs()
        assert (error <= bound[name]).all(), (name, error.max())
    for name, row in (("policy", api.TARGET), ("ref", api.REF_TARGET)):
        target = streams[name].gather(1, rows.target[:, None])[:, 0]
        assert ((state[row] - target).abs() <= bound[name]).all(), name
    total, log_probs = state[api.POLICY_SUM].double(), z.log_softmax(1)
    entropy = total.log() - state[api.WEIGHTED] / total
    squares = state[api.SQUARES].double().log() - 2 * total.log()
    assert ((entropy + (log_probs.exp() * log_probs).sum(1)).abs() <= 4 * bound["policy"]).all()
    assert ((squares - (2 * log_probs).logsumexp(1)).abs() <= 4 * bound["policy"]).all()
    assert ((state[api.TOTAL] / z.shape[1] - z.mean(1)).abs() <= bound["policy"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_statistics_of_odd_widths(fold: Fold, columns: int, dtype: torch.dtype) -> None:
    rows = make(columns, dtype)
    assert_true(rows.fold(fold), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_statistics_of_transformed_logits(
    fold: Fold, transform: dict[str, float], dtype: torch.dtype
) -> None:
    rows = make(1203, dtype, **transform)
    assert_true(rows.fold(fold), rows)


def test_a_bias_may_be_bf16(fold: Fold) -> None:
    rows = make(123)
    rows.bias, rows.ref_bias = rows.bias.bfloat16(), rows.ref_bias.bfloat16()
    assert_true(rows.fold(fold), rows)


def test_the_parts_that_are_not_asked_for_are_left_alone(fold: Fold) -> None:
    rows = make(123)
    whole = rows.fold(fold, outputs=False)
    policy, pair = empty_state(7), empty_state(7)
    fold(policy, rows.logits, rows.target, bias=rows.bias)
    assert torch.equal(policy[[0, 1, 6]], whole[[0, 1, 6]])
    untouched = [api.REF_MAX, api.REF_SUM, api.EXT_MAX, api.EXT_SUM, api.REF_TARGET]
    torch.testing.assert_close(
        policy[untouched], empty_state(7)[untouched], rtol=0, atol=0, equal_nan=True
    )
    biases = {"bias": rows.bias, "ref_bias": rows.ref_bias}
    fold(pair, rows.logits, rows.target, ref_logits=rows.ref_logits, **biases)
    assert torch.equal(pair[[0, 1, 2, 3, 6, 7]], whole[[0, 1, 2, 3, 6, 7]])
    assert torch.equal(pair[[4, 5]], empty_state(7)[[4, 5]])
    assert torch.equal(rows.fold(fold)[:8], whole)


@pytest.mark.parametrize("widths", [[1, 2050], [1024, 1024, 3], [700, 1, 1350], [513] * 3 + [512]])
@pytest.mark.parametrize("transform", [{}, {"softcap": 5.0}], ids=str)
def test_pieces_add_up(fold: Fold, widths: list[int], transform: dict[str, float]) -> None:
    rows = make(2051, **transform)
    one, several = rows.fold(fold), rows.fold(fold, widths)
    assert_true(several, rows)
    assert torch.equal(one[:5:2], several[:5:2])  # maxima
    largest = one[api.TOTAL].abs().clamp(min=2051)
    torch.testing.assert_close(several[:10], one[:10], rtol=1e-6, atol=1e-6 * largest.max().item())
    for row in (api.POLICY_SUM, api.REF_SUM, api.EXT_SUM, api.WEIGHTED, api.SQUARES):
        torch.testing.assert_close(several[row], one[row], rtol=2e-6, atol=2e-6)


def test_targets_outside_the_block_change_nothing(fold: Fold) -> None:
    rows = make(40)
    rows.target = torch.tensor([-100, -1, 9, 10, 49, 50, 2**40])
    state = empty_state(7)
    options = {"ref_logits": rows.ref_logits, "first_column": 10}
    fold(state, rows.logits, rows.target, **options)
    inside = torch.tensor([False, False, False, True, True, False, False])
    assert torch.equal(state[api.TARGET].isnan(), ~inside)
    assert torch.equal(state[api.REF_TARGET].isnan(), ~inside)
    assert state[api.TARGET, 3] == rows.logits[3, 0]
    assert state[api.TARGET, 4] == rows.logits[4, 39]
    seen = state[api.TARGET].clone()
    fold(state, rows.ref_logits, rows.target, first_column=2000)
    assert torch.equal(state[api.TARGET, inside], seen[inside])


def test_columns_of_minus_infinity(fold: Fold) -> None:
    rows = make(1100)
    rows.bias[::3] = -torch.inf
    rows.ref_bias[::2] = -torch.inf
    rows.target[:] = 1  # finite in both
    state = rows.fold(fold)
    for name, largest in (("policy", 0), ("ref", 2), ("extrapolated", 4)):
        torch.testing.assert_close(
            lse(state, largest), rows.streams()[name].logsumexp(1), rtol=1e-6, atol=1e-6
        )
    assert state[[api.WEIGHTED, api.SQUARES]].isfinite().all()
    assert (state[api.TOTAL] == -torch.inf).all()
    rows.target[:] = 0
    assert (rows.fold(fold)[api.TARGET] == -torch.inf).all()


@pytest.mark.parametrize("first", [5, 1024, 1500])
def test_blocks_of_minus_infinity_are_neutral(fold: Fold, first: int) -> None:
    rows = make(2051)
    rows.bias[:first] = rows.ref_bias[:first] = -torch.inf
    rows.target[:] = 2050
    state = rows.fold(fold, [first, 2051 - first])
    assert not state.isnan().any()
    streams = rows.streams()
    for name, largest in (("policy", 0), ("ref", 2), ("extrapolated", 4)):
        torch.testing.assert_close(
            lse(state, largest), streams[name].logsumexp(1), rtol=1e-6, atol=1e-6
        )
    after = state.clone()
    fold(after, torch.full((7, 33), -torch.inf), rows.target, first_column=5000)
    kept = [api.POLICY_MAX, api.POLICY_SUM, api.TARGET, api.WEIGHTED, api.SQUARES]
    assert torch.equal(after[kept], state[kept])


def test_a_row_of_nothing_but_minus_infinity(fold: Fold) -> None:
    state = empty_state(2, outputs=True)
    logits = torch.full((2, 1100), -torch.inf)
    target = torch.tensor([3, 4])
    fold(state, logits, target, ref_logits=logits.clone(), extrapolation=EXTRAPOLATION)
    assert (state[:5:2] == -torch.inf).all()
    assert (state[1:6:2] == 0).all()
    assert (state[[api.WEIGHTED, api.SQUARES]] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_with_nan_or_infinity_keeps_it_to_itself(fold: Fold, value: float) -> None:
    rows, broken = make(1100), make(1100)
    broken.logits[2, 1050] = value
    broken.ref_logits[4, 7] = value
    clean = rows.fold(fold, [600, 500])
    state = broken.fold(fold, [600, 500])
    others = [0, 1, 3, 5, 6]
    assert torch.equal(state[:, others], clean[:, others])
    assert lse(state, api.POLICY_MAX)[2].isnan() and not lse(state, api.POLICY_MAX)[4].isnan()
    assert lse(state, api.REF_MAX)[4].isnan() and not lse(state, api.REF_MAX)[2].isnan()
    # An infinite reference sends the extrapolated logit to minus infinity, which is no error.
    assert lse(state, api.EXT_MAX)[2].isnan()
    assert lse(state, api.EXT_MAX)[4].isnan() == (value != torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(fold: Fold, dtype: torch.dtype) -> None:
    rows = make(1100, dtype)
    rows.bias.zero_()
    rows.ref_bias.zero_()
    for logits in (rows.logits, rows.ref_logits):
        logits *= 1000
        logits[0, 3], logits[1, 1099], logits[2] = 1e4, -1e4, 1e4
    assert_true(rows.fold(fold), rows)
    assert_true(rows.fold(fold, [4, 1000, 96]), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_equal_rows_have_equal_statistics(
    fold: Fold, transform: dict[str, float], outputs: bool, dtype: torch.dtype
) -> None:
    rows = make(2051, dtype, **transform)
    rows.ref_logits, rows.ref_bias = rows.logits.clone(), rows.bias.clone()
    state = rows.fold(fold, [1100, 951], outputs)
    for policy, ref in ((0, 2), (1, 3), (0, 4), (1, 5), (api.TARGET, api.REF_TARGET)):
        assert torch.equal(state[policy], state[ref])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_lie_apart(fold: Fold, dtype: torch.dtype) -> None:
    rows = make(513, dtype)
    state = empty_state(30, outputs=True)
    before = state.clone()
    apart = {
        name: torch.full((14, 700), torch.nan, dtype=dtype)[::2, 5:518].copy_(getattr(rows, name))
        for name in ("logits", "ref_logits")
    }
    target = rows.target.repeat_interleave(3)[::3]
    fold(
        state[:, 2:9],
        apart["logits"],
        target,
        ref_logits=apart["ref_logits"],
        bias=rows.bias.repeat_interleave(2)[::2],
        ref_bias=rows.ref_bias,
        extrapolation=EXTRAPOLATION,
    )
    assert torch.equal(state[:, 2:9], rows.fold(fold))
    rest = [0, 1, *range(9, 30)]
    torch.testing.assert_close(state[:, rest], before[:, rest], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("two_threads")
def test_results_do_not_depend_on_threads(fold: Fold) -> None:
    rows = make(2051, rows=67, softcap=20.0)
    two = [rows.fold(fold) for _ in range(5)]
    torch.set_num_threads(1)
    one = rows.fold(fold)
    assert all(torch.equal(state, one) for state in two)


def test_no_rows(fold: Fold) -> None:
    fold(empty_state(0), torch.empty(0, 5), torch.empty(0, dtype=torch.int64))


def test_the_op_runs_what_impl_names(impl: str, fold: Fold) -> None:
    rows = make(123, temperature=0.5)
    assert torch.equal(
        rows.fold(lambda *a, **k: api.row_stats(*a, **k, impl=impl)), rows.fold(fold)
    )


def test_the_op_refuses_what_the_implementation_cannot_take() -> None:
    state = empty_state(2).double()
    target = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="float64"):
        api.row_stats(state, torch.zeros(2, 3).double(), target, impl="cpp")
    with pytest.raises(ValueError, match="known: auto, torch, cpp"):
        api.row_stats(empty_state(2), torch.zeros(2, 3), target, impl="fortran")
