"""`logits_grad` in torch and in C++ against autograd through whole rows in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_kernels import logits_grad as api
from srlm_kernels import native
from srlm_kernels.logits_grad import logits_grad_ref

PLAIN = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0}
TRANSFORMS = [
    {},
    {"logit_scale": 0.25},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"softcap": 20.0, "logit_scale": 1.5, "temperature": 1.3},
]
COLUMNS = [1, 11, 123, 511, 512, 513, 1000, 2051]
DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float32, torch.bfloat16),
]
Gradient = Callable[..., Tensor]


@pytest.fixture(params=["torch", "cpp"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and not native.available():
        pytest.skip(native.why())
    return request.param


@pytest.fixture
def gradient(impl: str) -> Gradient:
    return {"torch": logits_grad_ref, "cpp": native.logits_grad_cpp}[impl]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def final(logits: Tensor, bias: Tensor, **options: Any) -> Tensor:
    options = PLAIN | options
    z = (logits.double() + bias.double()) * options["logit_scale"]
    if cap := options["softcap"]:
        z = cap * (1 - 2 / ((2 * z / cap).exp() + 1))
    return z / options["temperature"]


class Case:
    """Arguments of one call, and the true gradient."""

    def __init__(self, columns: int, dtype: torch.dtype, rows: int = 7, **transform: Any) -> None:
        self.logits = (4 * normal(rows, columns)).to(dtype)
        self.bias, self.upstream, self.transform = normal(columns), normal(rows), transform
        self.target = torch.arange(rows) * 31 % columns
        self.target[0] = columns - 1
        leaf = self.logits.double().requires_grad_()
        log_probs = final(leaf, self.bias, **transform).log_softmax(1)
        logp = log_probs.gather(1, self.target[:, None])[:, 0]
        (self.true,) = torch.autograd.grad(logp, leaf, self.upstream.double())
        self.lse = final(self.logits, self.bias, **transform).logsumexp(1).float()

    def run(self, gradient: Gradient, columns: slice = slice(None), **options: Any) -> Tensor:
        """The gradient of a block of columns, formed in a copy of the logits."""
        return gradient(
            self.logits.clone()[:, columns],
            self.target,
            self.lse,
            self.upstream,
            bias=self.bias[columns],
            first_column=columns.start or 0,
            **self.transform,
            **options,
        )

    def check(self, got: Tensor) -> None:
        """As exact as fp32 logits and log-sum-exps allow: their rounding is p's relative error."""
        z = final(self.logits, self.bias, **self.transform)
        options = PLAIN | self.transform
        size = (z - self.lse.double()[:, None]).exp()
        size[torch.arange(len(size)), self.target] += 1
        size *= self.upstream.abs()[:, None] * options["logit_scale"] / options["temperature"]
        bound = 3e-7 * size * z.abs().amax(1).maximum(self.lse.abs()).clamp(min=1)[:, None]
        if got.dtype == torch.bfloat16:
            bound += 2**-8 * self.true.abs()
        assert got.shape == self.true.shape
        assert ((got.double() - self.true).abs() <= bound).all()


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_gradient_of_odd_widths(
    gradient: Gradient, columns: int, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    case = Case(columns, dtype)
    got = case.run(gradient, grad_dtype=grad_dtype)
    assert got.dtype == (grad_dtype or dtype)
    case.check(got)


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradient_of_transformed_logits(
    gradient: Gradient,
    transform: dict[str, float],
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None,
) -> None:
    case = Case(603, dtype, **transform)
    case.check(case.run(gradient, grad_dtype=grad_dtype))


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_blocks_are_parts_of_the_whole(
    gradient: Gradient, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    case = Case(1203, dtype, softcap=20.0)
    blocks = [slice(0, 1), slice(1, 700), slice(700, 1203)]
    parts = [case.run(gradient, block, grad_dtype=grad_dtype) for block in blocks]
    case.check(torch.cat(parts, 1))


def test_a_target_outside_the_block_has_no_onehot(gradient: Gradient) -> None:
    case = Case(40, torch.float32)
    case.target[:] = torch.tensor([-100, -1, 9, 50, 51, 2**32 + 12, 2**40])
    got = gradient(
        case.logits.clone(),
        case.target,
        case.lse,
        torch.ones(7),
        bias=case.bias,
        first_column=10,
    )
    assert (got < 0).all()  # -p everywhere


def test_a_bias_may_be_bf16(gradient: Gradient) -> None:
    case = Case(123, torch.float32)
    bias = case.bias.bfloat16()
    case.bias = bias.float()
    wide = case.run(gradient)
    case.bias = bias
    assert torch.equal(case.run(gradient), wide)


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_the_gradient_takes_the_place_of_the_logits(
    gradient: Gradient, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    case = Case(513, dtype)
    around = torch.full((14, 700), 5.0, dtype=dtype)
    logits = around[::2, 5:518].copy_(case.logits)
    got = gradient(
        logits, case.target, case.lse, case.upstream, bias=case.bias, grad_dtype=grad_dtype
    )
    assert got.data_ptr() == logits.data_ptr() and got.shape == logits.shape
    assert torch.equal(got, case.run(gradient, grad_dtype=grad_dtype))
    rest = torch.ones(14, 700, dtype=torch.bool)
    rest[::2, 5:518] = False
    assert (around[rest] == 5).all()


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_rows_without_upstream_become_zero_whatever_they_hold(
    gradient: Gradient, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    case = Case(123, dtype)
    case.logits[1], case.lse[1] = torch.nan, torch.nan
    case.logits[2], case.lse[3] = -torch.inf, -torch.inf
    case.upstream[1:4] = torch.tensor([0.0, -0.0, 0.0])
    got = case.run(gradient, grad_dtype=grad_dtype)
    assert (got[1:4] == 0).all()
    others = [0, 4, 5, 6]
    assert got[others].isfinite().all() and (got[others] != 0).any(1).all()


def test_nan_stays_in_its_row(gradient: Gradient) -> None:
    case = Case(123, torch.float32)
    clean = case.run(gradient)
    case.logits[2, 100], case.lse[4] = torch.nan, torch.nan
    got = case.run(gradient)
    assert got[2].isnan().nonzero().flatten().tolist() == [100]
    assert got[4].isnan().all()
    assert torch.equal(got[[0, 1, 3, 5, 6]], clean[[0, 1, 3, 5, 6]])


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_logits_of_minus_infinity_have_no_probability(
    gradient: Gradient, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    case = Case(123, dtype)
    case.logits[:, ::3] = -torch.inf
    case.logits[3], case.lse[3] = -torch.inf, -torch.inf
    case.target[:] = torch.tensor([0, 1, 3, 3, 4, 5, 6])
    got = case.run(gradient, grad_dtype=grad_dtype)
    assert got.isfinite().all()
    onehot = torch.nn.functional.one_hot(case.target, 123)
    expected = (onehot * case.upstream[:, None]).to(got.dtype)
    assert torch.equal(got[:, ::3], expected[:, ::3])
    assert torch.equal(got[3], expected[3])


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_one_minus_p_is_formed_before_rounding(
    gradient: Gradient, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    logits = torch.full((1, 50), -12.0, dtype=dtype)
    logits[0, 7] = 0
    lse = logits.double().logsumexp(1)
    got = gradient(
        logits, torch.tensor([7]), lse.float(), torch.ones(1), grad_dtype=grad_dtype, **PLAIN
    )
    true = -torch.expm1(-lse)  # 3e-4, where bf16 numbers next to 1 are 4e-3 apart
    assert abs(got[0, 7].item() / true.item() - 1) < 2**-8
    assert abs(got.double().sum().item()) < 2**-8 * true.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(gradient: Gradient, dtype: torch.dtype) -> None:
    logits = torch.full((3, 123), -1e4, dtype=dtype)
    logits[0, 5] = logits[1, 6] = 1e4
    lse = logits.double().logsumexp(1).float()
    got = gradient(logits, torch.tensor([5, 7, 8]), lse, torch.ones(3))
    assert got.isfinite().all()
    assert (got[0] == 0).all()  # p is exactly 0 or 1
    assert got[1, 6] == -1 and got[1, 7] == 1 and got[1].count_nonzero() == 2
    assert abs(got[2, 8].item() - 122 / 123) < 2**-8 and abs(got[2, 9].item() + 1 / 123) < 1e-4


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_results_do_not_depend_on_threads(
    gradient: Gradient, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    case = Case(2051, dtype, rows=67, softcap=20.0)
    two = [case.run(gradient, grad_dtype=grad_dtype) for _ in range(5)]
    torch.set_num_threads(1)
    one = case.run(gradient, grad_dtype=grad_dtype)
    assert all(torch.equal(got, one) for got in two)


def test_no_rows(gradient: Gradient) -> None:
    none = torch.empty(0)
    assert gradient(torch.empty(0, 5), none.long(), none, none).shape == (0, 5)


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_the_op_runs_what_impl_names(
    impl: str, gradient: Gradient, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    case = Case(123, dtype, temperature=0.5)
    got = case.run(lambda *a, **k: api.logits_grad(*a, **k, impl=impl), grad_dtype=grad_dtype)
    assert torch.equal(got, case.run(gradient, grad_dtype=grad_dtype))
