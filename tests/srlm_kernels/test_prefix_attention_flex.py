"""FlexAttention's mask and options: its forward on the CPU, all of it on CUDA."""

import pytest
import torch
from torch import Tensor

from srlm_kernels import PrefixPlan, prefix_attention
from tests.srlm_kernels.packed import OPTIONS, PLANS, operands, with_sinks


@pytest.mark.parametrize("options", ["plain", "window", "softcap", "sinks", "all"])
@pytest.mark.parametrize("name", ["a pair", "ragged"])
def test_flex_has_the_same_mask(name: str, options: str) -> None:
    """Its forward runs on the CPU; the kernel that it is made of on CUDA does not."""
    plan = PrefixPlan.of(PLANS[name])
    qkv = [x.detach() for x in operands(plan, (4, 2, 16, 16), torch.float32)]
    chosen = {k: v.detach() if isinstance(v, Tensor) else v
              for k, v in with_sinks(OPTIONS[options], qkv[0]).items()}  # fmt: skip
    out = prefix_attention(*qkv, plan, impl="flex", **chosen)
    truth = prefix_attention(*qkv, plan, impl="reference", **chosen)
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PLANS)
def test_flex_on_a_gpu(name: str, options: str) -> None:
    plan = PrefixPlan.of(PLANS[name])
    qkv = [
        x.detach().cuda().requires_grad_() for x in operands(plan, (4, 2, 64, 64), torch.float32)
    ]
    chosen = with_sinks(OPTIONS[options], qkv[0])
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].detach().cuda().requires_grad_()
    leaves = [*qkv, *([chosen["sinks"]] if "sinks" in chosen else [])]
    runs = [prefix_attention(*qkv, plan, impl=impl, **chosen) for impl in ("flex", "reference")]
    found = [(run, *torch.autograd.grad(run.square().sum(), leaves)) for run in runs]
    for flex, exact in zip(*found, strict=True):
        assert (flex - exact).norm() <= 1e-2 * exact.norm() + 1e-5  # TF32 products
