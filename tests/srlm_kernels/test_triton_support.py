"""What the Triton kernels share, and installations without Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srlm_kernels.backends import refusal
from srlm_kernels.triton_support import INTERPRETED, final_logit, jit, tanh, tl, transform_factors

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFUSAL = refusal("triton", torch.empty(0, device=DEVICE))
needs_triton = pytest.mark.skipif(REFUSAL is not None, reason=f"{REFUSAL}; see test_interpreter.py")


def in_a_new_process(code: str) -> None:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(KERNELS)!r})\n{code}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_the_ops_leaves_triton_alone() -> None:
    in_a_new_process("import srlm_kernels; assert 'triton' not in sys.modules")


def test_without_triton_the_kernels_say_so() -> None:
    in_a_new_process("""
sys.modules["triton"] = None
import torch
from srlm_kernels import linear_logp_tiled, logits_grad_triton, pair_grad_triton, row_stats_triton
from srlm_kernels.losses import dpo
from srlm_kernels.pair_grad import pair_grad
x = torch.zeros(4, 8)
assert "triton" in linear_logp_tiled.takes(x, x)
assert not pair_grad_triton.takes(x[0], dpo(0.1), None)
scored = torch.ones(4, dtype=torch.bool)
pair_grad(x[:, 0], scored, torch.tensor([0, 2, 4]), dpo(0.1), scale=1.0)
""")


@jit
def transform_kernel(x, out, inner, outer, CAPPED: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, final_logit(tl.load(x + at), inner, outer, CAPPED))


@jit
def tanh_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tanh(tl.load(x + at)))


@needs_triton
def test_tanh_to_the_last_digits() -> None:
    near, far = torch.linspace(-1, 1, 4096), torch.logspace(-30, 38, 4092)
    x = torch.cat([near, far, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])]).to(DEVICE)
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, SIZE=8192)
    # A GPU's exponential is not rounded correctly.
    rtol = 2.5e-7 if INTERPRETED else 6e-7
    torch.testing.assert_close(out.double(), x.double().tanh(), rtol=rtol, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_final_logit(softcap: float | None) -> None:
    x = torch.linspace(-100, 100, 1024, device=DEVICE)
    out = torch.empty_like(x)
    inner, outer = transform_factors(softcap, 1.7, 0.6)
    transform_kernel[(1,)](x, out, inner, outer, CAPPED=softcap is not None, SIZE=1024)
    z = 1.7 * x.double()
    z = z if softcap is None else softcap * (z / softcap).tanh()
    torch.testing.assert_close(out.double(), z / 0.6, rtol=5e-7, atol=0)
