"""The whole op on the Triton kernels, from hidden states to gradients, against float64."""

import pytest
import torch
from torch import Tensor

from srlm_kernels import linear_preference_loss, losses
from srlm_kernels.backends import refusal, row_kernel
from srlm_kernels.pair_grad import pair_grad
from srlm_kernels.tiles import tile_bounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := refusal("triton", torch.empty(0, device=DEVICE)):
    pytest.skip(f"{reason}; test_interpreter.py runs this file", allow_module_level=True)

CU = torch.tensor([0, 3, 5, 5, 9, 9, 9, 20, 27])  # pairs of 5, 4, 0 and 18 rows
LOSSES = {
    "dpo": (losses.dpo(0.5), {}),
    "cdpo": (losses.dpo(0.5), {"label_smoothing": torch.tensor([0.0, 0.3, 0.5, 1.0])}),
    "spa": (losses.spa(0.5, 0.3, 0.0), {}),  # flags some of these pairs
    "ipo": (losses.ipo(0.5), {}),  # its pair step is torch's; a long pair has two slopes
}
OPTIONS = {"extrapolation": 0.5, "softcap": 6.0, "logit_scale": 1.3, "chunk_rows": 10}


@pytest.fixture
def kernels(monkeypatch):
    """Makes the op run the named kernels in tiles of 64 columns, chunks of 10 rows."""

    def use(name: str) -> None:
        monkeypatch.setattr("srlm_kernels.tiles.tile_bounds", lambda c, _: tile_bounds(c, 64))
        monkeypatch.setattr(
            "srlm_kernels.tiles.row_kernel", lambda op, _, like: row_kernel(op, name, like)
        )
        built_in = "triton" if name == "triton" else "torch"
        monkeypatch.setattr(
            "srlm_kernels.preference_pass.pair_grad",
            lambda logp, scored, cu, loss_fn, **options: pair_grad(
                logp, scored, cu, loss_fn, **options,
                impl="auto" if isinstance(loss_fn, losses.ipo) else built_in,
            ),
        )  # fmt: skip

    return use


def run(p, loss: str, dtype: torch.dtype, impl: str) -> dict[str, Tensor]:
    loss_fn, pair = LOSSES[loss]
    moved = {name: t.to(DEVICE) for name, t in vars(p).items()}
    target = moved.pop("target")
    tensors = {name: t.detach().to(dtype, copy=True) for name, t in moved.items()}
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    options = {k: v for k, v in OPTIONS.items() if impl == "chunked" or k != "chunk_rows"}
    out = linear_preference_loss(
        target=target, cu_seqlens=CU, loss_fn=loss_fn, impl=impl,
        pair={name: t.to(DEVICE) for name, t in pair.items()}, **tensors, **options,
    )  # fmt: skip
    out.loss.backward()
    names = ("losses", "margins", "ext_margins", "token_logp")
    found = {name: getattr(out, name) for name in names}
    found |= dict(zip(("hidden", "weight", "bias"), (x.grad for x in leaves), strict=True))
    return {name: t.double().cpu() for name, t in found.items()}


@pytest.fixture
def p(problem):
    p = problem((27, 16, 150))
    p.target[[4, 19]] = -100
    p.target[:3] = torch.tensor([0, 149, 64])
    return p


@pytest.mark.parametrize("loss", LOSSES)
def test_fp32(p, kernels, loss) -> None:
    truth = run(p, loss, torch.float64, "reference")
    kernels("triton")
    found = run(p, loss, torch.float32, "chunked")
    if loss == "spa":
        flagged = losses.spa(0.5, 0.3, 0.0).flagged(truth["ext_margins"])
        assert flagged.any() and not flagged.all()
    for name, values in truth.items():
        if name in ("hidden", "weight", "bias"):
            assert (found[name] - values).norm() <= 1e-6 * 16**0.5 * values.norm(), name
        else:
            torch.testing.assert_close(found[name], values, atol=1e-4, rtol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_that_of_the_torch_kernels(p, kernels, dtype) -> None:
    for name in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(p, name, getattr(p, name).to(dtype))
    truth = run(p, "spa", torch.float64, "reference")
    found = {}
    for name in ("torch", "triton"):
        kernels(name)
        found[name] = run(p, "spa", dtype, "chunked")
    for name, values in truth.items():
        ours, allowed = (float((found[k][name] - values).norm()) for k in ("triton", "torch"))
        assert ours <= 1.1 * allowed + 1e-5 * values.norm(), name
