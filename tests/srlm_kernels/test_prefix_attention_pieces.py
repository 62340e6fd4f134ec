"""How exact the parts are in fp32 and bf16, and what they keep for backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from srlm_kernels import PrefixPlan, prefix_attention
from tests.srlm_kernels.packed import HEADS, PLANS, gradients, operands


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_single_and_half_precision(dtype: torch.dtype, limit: float) -> None:
    plan = PrefixPlan.of(PLANS["ragged"])
    qkv = operands(plan, HEADS[1], dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out, truth = prefix_attention(*qkv, plan, impl="pieces"), prefix_attention(*exact, plan)
    found = (out, *gradients(out, qkv)), (truth, *gradients(truth, exact))
    for mine, wide in zip(*found, strict=True):
        assert (mine.double() - wide).norm() <= limit * wide.norm()


def test_bf16_is_no_worse_than_rows_that_repeat_the_prompt() -> None:
    plan = PrefixPlan.of([(64, (50, 50))])
    q, k, v = operands(plan, (4, 4, 64, 64), torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = prefix_attention(*exact, plan)
    places = torch.tensor([[*range(64), *range(start, start + 50)] for start in (64, 114)])
    rows = [x[places].transpose(1, 2) for x in (q, k, v)]
    plain = F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)
    out = prefix_attention(q, k, v, plan, impl="pieces")
    ours, theirs = out[64:], torch.cat([plain[0, 64:], plain[1, 64:]])
    error, allowed = ((x.double() - truth[64:]).norm() for x in (ours, theirs))
    # The parts are rounded to bf16, and so is their mixture: twice the variance at most.
    assert error <= 2**0.5 * allowed


def test_pieces_save_no_scores() -> None:
    plan = PrefixPlan.of([(300, (200, 200))])
    qkv, saved = operands(plan, (2, 2, 8, 8)), []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prefix_attention(*qkv, plan, impl="pieces")
    assert sum(saved) == 700 * 2 * (4 * 8 + 1)
