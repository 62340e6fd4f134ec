"""The Triton kernel of logits_grad against the reference in float64."""

import pytest
import torch
from torch import Tensor

from srlm_kernels.backends import refusal
from srlm_kernels.logits_grad import logits_grad_ref
from srlm_kernels.logits_grad_triton import logits_grad_triton
from srlm_kernels.row_stats import final_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := refusal("triton", torch.empty(0, device=DEVICE)):
    pytest.skip(f"{reason}; test_interpreter.py runs this file", allow_module_level=True)

OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "capped": {"logit_scale": 1.4, "softcap": 6.0, "temperature": 0.8},
}
# Of the logits and of the gradient: in place, and into the first half of each row.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
PAD, MARK = 16, 123.0
INF = float("inf")


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * 3


def log_sum_exp(z: Tensor, bias: Tensor | None = None, **options: float) -> Tensor:
    transform = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, **options}
    final = final_logits(z, bias, torch.float64, **transform)
    return final.logsumexp(1).float().to(DEVICE)


def run(z: Tensor, target: Tensor, lse: Tensor, upstream: Tensor, **options: object) -> Tensor:
    """The gradient by Triton, once it was seen to write nothing but the gradient."""
    memory = torch.full((z.shape[0], z.shape[1] + PAD), MARK, dtype=z.dtype, device=DEVICE)
    logits = memory[:, : z.shape[1]]
    logits.copy_(z)
    grad = logits_grad_triton(logits, target.to(DEVICE), lse, upstream.to(DEVICE), **options)
    assert grad.data_ptr() == memory.data_ptr() and grad.shape == z.shape
    assert memory[:, z.shape[1] :].eq(MARK).all()
    return grad.cpu()


def truth(z: Tensor, target: Tensor, lse: Tensor, upstream: Tensor, **options: object) -> Tensor:
    wide = {k: v.double().cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    wide.pop("grad_dtype", None)
    return logits_grad_ref(z.double(), target, lse.double().cpu(), upstream.double(), **wide)


def assert_grad(grad: Tensor, expected: Tensor) -> None:
    """Rounded once to the dtype of the gradient, from a value that fp32 computed."""
    half_a_step = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[grad.dtype]
    tiny = 6e-8 if grad.dtype == torch.float16 else 0.0  # below its normal numbers
    slack = half_a_step * expected.abs() + 3e-6 + tiny
    assert ((grad.double() - expected).abs() <= slack).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
def test_against_float64(
    dtypes: tuple[torch.dtype, torch.dtype], options: dict[str, float]
) -> None:
    columns, first = 6500, 4096  # four blocks of 2048, the last cut off
    z = normal(5, columns).to(dtypes[0])
    bias = normal(columns, seed=1)
    # First, last, one of a middle block, and one on either side of these columns.
    target = torch.tensor([0, columns - 1, 2500, columns, -1]) + first
    upstream = torch.tensor([1.0, -0.7, 2.5, 0.3, 1.1])
    lse = log_sum_exp(z, bias, **options)
    common = {"first_column": first, **options}
    grad = run(z, target, lse, upstream, bias=bias.to(DEVICE), grad_dtype=dtypes[1], **common)
    assert grad.dtype == dtypes[1]
    assert_grad(grad, truth(z, target, lse, upstream, bias=bias, **common))


@pytest.mark.parametrize("columns", [1, 7, 2047, 2048, 2049, 4097])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tails(columns: int, grad_dtype: torch.dtype) -> None:
    z, upstream = normal(2, columns), torch.tensor([1.0, -2.0])
    target = torch.tensor([columns - 1, columns // 2])
    lse = log_sum_exp(z)
    grad = run(z, target, lse, upstream, grad_dtype=grad_dtype)
    assert_grad(grad, truth(z, target, lse, upstream))
    assert grad.double().sum(1).abs().max() < 2e-3 * 2


def test_rows_that_nobody_asks_for_become_zero() -> None:
    z = normal(4, 2100)
    z[1], z[2, 5] = torch.nan, INF
    lse = log_sum_exp(z)
    upstream = torch.tensor([1.0, 0.0, -0.0, 0.0])
    for grad_dtype in (torch.float32, torch.bfloat16):
        grad = run(z, torch.tensor([3, 4, 5, -100]), lse, upstream, grad_dtype=grad_dtype)
        assert grad[1:].eq(0).all() and not grad[0].isnan().any() and grad[0].ne(0).any()


def test_nan_stays_in_its_row() -> None:
    z = normal(3, 2100)
    z[1, 7] = torch.nan
    lse, target = log_sum_exp(z), torch.tensor([1, 2, 3])
    grad = run(z, target, lse, torch.ones(3))
    assert grad[1].isnan().all() and not grad[[0, 2]].isnan().any()


def test_logits_of_minus_infinity_have_no_gradient() -> None:
    z = normal(3, 2100)
    z[0, ::2] = -INF
    z[1, 9] = -INF  # the target
    z[2] = -INF
    lse, target, upstream = log_sum_exp(z), torch.tensor([1, 9, 5]), torch.ones(3)
    grad = run(z, target, lse, upstream)
    assert_grad(grad, truth(z, target, lse, upstream))
    assert grad[0, ::2].eq(0).all() and grad[1, 9] == 1


def test_one_minus_p_is_formed_before_it_is_rounded() -> None:
    z = torch.zeros(1, 3000)
    z[0, 4] = 18.0  # p differs from 1 by 4.6e-5, less than bf16 can tell from 1
    lse, target = log_sum_exp(z), torch.tensor([4])
    grad = run(z, target, lse, torch.ones(1), grad_dtype=torch.bfloat16)
    expected = truth(z, target, lse, torch.ones(1))
    assert grad[0, 4].item() == pytest.approx(expected[0, 4].item(), rel=1e-2)


def test_no_rows() -> None:
    empty = torch.empty(0, device=DEVICE)
    target = empty.long()
    logits = torch.empty(0, 5, device=DEVICE)
    assert logits_grad_triton(logits, target, empty, empty).shape == (0, 5)
