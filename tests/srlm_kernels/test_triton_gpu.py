"""What only a GPU can show of the Triton kernels: real launches, races, offsets beyond 32 bits.

Their arithmetic is tested by test_row_stats_triton.py and its neighbours, which run on a GPU too.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from srlm_kernels import row_stats as rs
from srlm_kernels.linear_logp import linear_logp_ref
from srlm_kernels.linear_logp_tiled import linear_logp_tiled
from srlm_kernels.logits_grad import logits_grad_ref
from srlm_kernels.logits_grad_triton import logits_grad_triton
from srlm_kernels.losses import spa
from srlm_kernels.pair_grad_triton import pair_grad_triton
from srlm_kernels.row_stats_triton import row_stats_triton

pytestmark = pytest.mark.gpu

PLAIN = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0}
DTYPES = [torch.float32, torch.bfloat16]


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").to(dtype)


def targets(rows: int, columns: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(columns, (rows,), generator=generator, device="cuda")


def new_state(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rs.new_state(rows, dtype=dtype, device=torch.device("cuda"))


def log_sum_exp(state: Tensor, stream: int) -> Tensor:
    return state[stream] + state[stream + 1].log()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [32003, 128256])
def test_row_stats(columns: int, dtype: torch.dtype) -> None:
    z = normal(257, columns, dtype=dtype) * 4
    z_ref = (z + normal(257, columns, seed=1)).to(dtype)
    y, state, truth = targets(257, columns), new_state(257), new_state(257, torch.float64)
    row_stats_triton(state, z, y, ref_logits=z_ref, extrapolation=0.5)
    rs.row_stats_ref(truth, z.double(), y, ref_logits=z_ref.double(), extrapolation=0.5, **PLAIN)
    for stream in (rs.POLICY_MAX, rs.REF_MAX, rs.EXT_MAX):
        ours, expected = log_sum_exp(state, stream), log_sum_exp(truth, stream)
        torch.testing.assert_close(ours.double(), expected, atol=5e-6, rtol=0)
    assert state[rs.TARGET].double().equal(truth[rs.TARGET])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_grad_over_its_own_input(grad_dtype: torch.dtype) -> None:
    rows, columns = 1031, 128256
    z, y = normal(rows, columns) * 4, targets(rows, columns)
    lse, upstream = z.logsumexp(1), normal(rows, seed=2)
    upstream[::7] = 0
    sample = torch.arange(0, rows, 13, device="cuda")
    expected = logits_grad_ref(
        z[sample].double(), y[sample], lse[sample].double(), upstream[sample].double()
    )
    found = logits_grad_triton(z, y, lse, upstream, grad_dtype=grad_dtype)[sample].double()
    slack = expected.abs() * (2**-8 if grad_dtype == torch.bfloat16 else 0) + 3e-6
    assert ((found - expected).abs() <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(257, 192, 32003), (64, 896, 151936), (1937, 3584, 152064)])
@pytest.mark.parametrize("extrapolation", [None, 0.5])
def test_linear_logp(
    shape: tuple[int, int, int], dtype: torch.dtype, extrapolation: float | None
) -> None:
    rows, width, columns = shape
    hidden, ref_hidden = normal(rows, width, dtype=dtype), normal(rows, width, seed=1, dtype=dtype)
    weight = (normal(columns, width, seed=2) * 3 * width**-0.5).to(dtype)
    y = targets(rows, columns)
    ours = linear_logp_tiled(hidden, weight, y, ref_hidden=ref_hidden, extrapolation=extrapolation)
    sample = torch.arange(0, rows, max(1, rows // 40), device="cuda")
    truth = linear_logp_ref(
        hidden[sample].double(), weight.double(), y[sample],
        ref_hidden=ref_hidden[sample].double(), extrapolation=extrapolation,
    )  # fmt: skip
    for name in ("logp", "ref_logp", "extrapolated_logp"):
        if (expected := getattr(truth, name)) is not None:
            found = getattr(ours, name)[sample].double()
            torch.testing.assert_close(found, expected, atol=1e-4 if "ex" in name else 3e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_models_have_equal_bits(dtype: torch.dtype) -> None:
    hidden, weight = normal(300, 512, dtype=dtype), normal(32003, 512, seed=1, dtype=dtype)
    for extrapolation in (None, 0.5):
        ours = linear_logp_tiled(
            hidden, weight, targets(300, 32003), ref_hidden=hidden.clone(),
            ref_weight=weight.clone(), extrapolation=extrapolation, logit_scale=0.7,
            temperature=1.3,
        )  # fmt: skip
        assert ours.logp.equal(ours.ref_logp)
        assert extrapolation is None or ours.logp.equal(ours.extrapolated_logp)
    z, state = normal(300, 32003, dtype=dtype), new_state(300)
    row_stats_triton(
        state, z, targets(300, 32003), ref_logits=z.clone(), extrapolation=0.5, logit_scale=0.7,
        softcap=5.0,
    )  # fmt: skip
    assert state[[0, 1]].equal(state[[2, 3]]) and state[[0, 1]].equal(state[[4, 5]])


def ten_times(run: Callable[[], Tensor]) -> None:
    first = run()
    assert all(run().equal(first) for _ in range(9))


def test_ten_runs_give_equal_bits() -> None:
    rows, columns = 513, 50257
    z, y = normal(rows, columns), targets(rows, columns)
    lse, upstream = z.logsumexp(1), normal(rows, seed=2)
    hidden = normal(rows, 256, dtype=torch.bfloat16)
    weight = normal(columns, 256, seed=1, dtype=torch.bfloat16)

    def stats() -> Tensor:
        state = new_state(rows)
        row_stats_triton(state, z, y, ref_logits=z * 0.9, extrapolation=0.5)
        return state[: rs.TARGET]

    def gradient() -> Tensor:
        return logits_grad_triton(z.clone(), y, lse, upstream, grad_dtype=torch.bfloat16).clone()

    def scores() -> Tensor:
        return linear_logp_tiled(
            hidden, weight, y, ref_hidden=hidden * 2, extrapolation=0.5
        ).extrapolated_logp

    def slopes() -> Tensor:
        offsets = torch.tensor([0, 100, 300, 301, rows])
        return pair_grad_triton(
            lse, lse > 0, offsets, spa(0.1, 0.2, 0.0), scale=0.5, ref_logp=upstream
        ).slopes

    for run in (stats, gradient, scores, slopes):
        ten_times(run)


def test_offsets_beyond_32_bits() -> None:
    rows, columns = 16500, 131072  # 2^31 elements and more
    z = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    last = normal(2, columns, seed=3, dtype=torch.bfloat16)
    z[-2:] = last
    y = targets(rows, columns)
    state = new_state(rows)
    row_stats_triton(state, z, y)
    lse = log_sum_exp(state, rs.POLICY_MAX)
    torch.testing.assert_close(lse[-2:].double(), last.double().logsumexp(1), atol=5e-6, rtol=0)
    assert lse[:-2].eq(lse[0]).all()
    upstream = torch.zeros(rows, device="cuda")
    upstream[-2:] = 1
    grad = logits_grad_triton(z, y, lse, upstream)
    expected = logits_grad_ref(last.double(), y[-2:], lse[-2:].double(), upstream[-2:].double())
    assert ((grad[-2:].double() - expected).abs() <= 2**-8 * expected.abs() + 3e-6).all()
    assert not grad[:-2].any()
