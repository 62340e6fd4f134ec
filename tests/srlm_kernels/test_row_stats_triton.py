"""The Triton kernel of row_stats against the reference in float64."""

import pytest
import torch
from torch import Tensor

from srlm_kernels import row_stats as rs
from srlm_kernels.backends import refusal
from srlm_kernels.row_stats_triton import row_stats_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := refusal("triton", torch.empty(0, device=DEVICE)):
    pytest.skip(f"{reason}; test_interpreter.py runs this file", allow_module_level=True)

OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "capped": {"logit_scale": 1.4, "softcap": 6.0, "temperature": 0.8},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTPUTS = ("entropy",)  # any name asks for all three sums
INF = float("inf")


def normal(*size: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale


def block(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers as part of a wider buffer: reading one column too many shows."""
    buffer = torch.full((values.shape[0], values.shape[1] + 24), 1e4, dtype=dtype)
    buffer[:, : values.shape[1]] = values
    return buffer.to(DEVICE)[:, : values.shape[1]]


def run(
    logits: Tensor,
    target: Tensor,
    cuts: tuple[int, ...] = (),
    wide: bool = False,
    **options: object,
) -> Tensor:
    """The state after the blocks of columns between `cuts`, by Triton or in float64."""
    dtype = torch.float64 if wide else torch.float32
    state = rs.new_state(
        len(target), outputs=options.pop("outputs", ()), dtype=dtype, device=torch.device(DEVICE)
    )
    for lo, hi in zip((0, *cuts), (*cuts, logits.shape[1]), strict=True):
        part = {k: v[..., lo:hi] if isinstance(v, Tensor) else v for k, v in options.items()}
        if not wide:
            row_stats_triton(state, logits[:, lo:hi], target, first_column=lo, **part)
            continue
        part = {k: v.double() if isinstance(v, Tensor) else v for k, v in part.items()}
        transform = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, **part}
        rs.row_stats_ref(state, logits[:, lo:hi].double(), target, first_column=lo, **transform)
    return state


def assert_state(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours.double(), truth, rtol=3e-6, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_three_streams_over_two_calls(dtype: torch.dtype, options: dict[str, float]) -> None:
    columns, cut = 4500, 2300  # each of several blocks, the last of them cut off
    z = normal(6, columns)
    logits, ref_logits = block(z, dtype), block(z + normal(6, columns, seed=1, scale=1.0), dtype)
    # First, last, around the cut, and one that no block has.
    target = torch.tensor([0, columns - 1, cut - 1, cut, -100, 1777], device=DEVICE)
    arguments = {
        "ref_logits": ref_logits,
        "bias": normal(columns, seed=2).to(DEVICE),
        "ref_bias": normal(columns, seed=3).to(DEVICE),
        "extrapolation": 0.5,
        "outputs": OUTPUTS,
        **options,
    }
    ours = run(logits, target, (cut,), **arguments)
    assert_state(ours, run(logits, target, (cut,), wide=True, **arguments))
    assert ours[rs.TARGET].isnan().tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("columns", [1, 7, 1023, 1024, 1025])
def test_tails(columns: int) -> None:
    logits = block(normal(2, columns), torch.float32)
    ref_logits = block(normal(2, columns, seed=1), torch.float32)
    target = torch.tensor([columns - 1, columns], device=DEVICE)  # the second is no column
    arguments = {"ref_logits": ref_logits, "extrapolation": 2}
    assert_state(run(logits, target, **arguments), run(logits, target, wide=True, **arguments))


def test_what_was_not_given_is_left_alone() -> None:
    logits = block(normal(2, 300), torch.float32)
    target = torch.tensor([5, 299], device=DEVICE)
    state = run(logits, target)
    assert_state(state, run(logits, target, wide=True))
    assert state[rs.REF_MAX].eq(-INF).all() and state[rs.EXT_MAX].eq(-INF).all()
    state = run(logits, target, ref_logits=logits)
    assert state[rs.EXT_MAX].eq(-INF).all() and state[rs.EXT_SUM].eq(0).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_streams_have_equal_bits(dtype: torch.dtype, options: dict[str, float]) -> None:
    logits, bias = block(normal(3, 2100), dtype), normal(2100, seed=1).to(DEVICE)
    target = torch.tensor([1, 2099, 1500], device=DEVICE)
    state = run(
        logits, target, (900,), ref_logits=logits.clone(), bias=bias, ref_bias=bias.clone(),
        extrapolation=0.3, **options,
    )  # fmt: skip
    policy = state[[rs.POLICY_MAX, rs.POLICY_SUM, rs.TARGET]]
    assert policy.equal(state[[rs.REF_MAX, rs.REF_SUM, rs.REF_TARGET]])
    assert policy[:2].equal(state[[rs.EXT_MAX, rs.EXT_SUM]])


def test_logits_of_minus_infinity() -> None:
    z, z_ref = normal(6, 2500), normal(6, 2500, seed=1)
    z[0] = -INF  # nothing else
    z[1, :2200] = -INF  # nothing else in whole blocks
    z[2, ::3] = -INF  # and the reference at other columns, both at some
    z_ref[2, ::5] = -INF
    z_ref[3] = -INF
    z[4, 77] = -INF  # the target
    z[5] = -1e30  # as masks are often written: no -inf
    target = torch.tensor([3, 2499, 1, 2, 77, 5], device=DEVICE)
    arguments = {
        "ref_logits": block(z_ref, torch.float32), "extrapolation": 0.5, "outputs": OUTPUTS,
    }  # fmt: skip
    logits = block(z, torch.float32)
    for cuts in ((), (2100,)):
        ours = run(logits, target, cuts, **arguments)
        assert_state(ours, run(logits, target, cuts, wide=True, **arguments))
        assert not ours[: rs.TARGET].isnan().any()


def test_nan_and_infinity_stay_in_their_row() -> None:
    z = normal(4, 1500)
    arguments = {"extrapolation": 0.5, "outputs": OUTPUTS}
    target = torch.tensor([0, 1, 2, 3], device=DEVICE)
    clean = run(block(z, torch.float32), target, ref_logits=block(z, torch.float32), **arguments)
    z_ref = z.clone()
    z[1, 1100] = torch.nan
    z[2, 3] = INF
    z_ref[3, 1499] = torch.nan
    arguments["ref_logits"] = block(z_ref, torch.float32)
    ours = run(block(z, torch.float32), target, **arguments)
    truth = run(block(z, torch.float32), target, wide=True, **arguments)
    assert ours[:, 0].equal(clean[:, 0])
    assert ours.isnan().equal(truth.isnan())
    assert ours[[rs.POLICY_MAX, rs.POLICY_SUM]][:, 3].equal(clean[[0, 1], 3])


def test_large_and_peaked_logits() -> None:
    z = normal(3, 3000, scale=1e4)
    z[1] = 0.0
    z[1, -1] = 60.0  # the maximum in the last column
    z[2] = 1.0  # uniform
    target = torch.tensor([17, 2999, 2999], device=DEVICE)
    logits = block(z, torch.float32)
    ours, truth = run(logits, target), run(logits, target, wide=True)
    assert_state(ours, truth)
    logp = ours[rs.TARGET] - ours[rs.POLICY_MAX] - ours[rs.POLICY_SUM].log()
    assert logp[2].item() == pytest.approx(-torch.tensor(3000.0).log().item(), abs=1e-6)


def test_the_lowest_number_is_a_logit() -> None:
    logits = block(torch.full((1, 1500), torch.finfo(torch.float32).min), torch.float32)
    state = run(logits, torch.tensor([3], device=DEVICE))
    assert state[rs.POLICY_MAX] == state[rs.TARGET] == torch.finfo(torch.float32).min
    assert state[rs.POLICY_SUM] == 1500


def test_no_rows() -> None:
    target = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert run(torch.empty(0, 5, device=DEVICE), target).shape == (8, 0)
