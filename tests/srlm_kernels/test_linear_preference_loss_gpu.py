"""The chunked ops on a CUDA device: no waiting, no race, memory by formula, large offsets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from srlm_kernels import linear_logp, linear_preference_loss, losses

pytestmark = pytest.mark.gpu

SPA = losses.spa(0.1, 0.1, 0.0)
# One slope for both responses; two; pairs that wait for each other.
LOSSES = {"spa": SPA, "ipo": losses.ipo(0.1), "aot": losses.aot(0.1)}


def tensors(rows: int, width: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda").to(dtype)

    return {
        "hidden": normal(rows, width).requires_grad_(),
        "weight": (normal(columns, width) * width**-0.5).requires_grad_(),
        "target": torch.randint(columns, (rows,), generator=generator, device="cuda"),
        "ref_hidden": normal(rows, width),
        "ref_weight": normal(columns, width) * width**-0.5,
    }


def step(loss_fn: Callable[..., Tensor] = SPA, **arguments: object) -> list[Tensor]:
    """The loss, margins and token log-probabilities, and the gradients of both leaves."""
    out = linear_preference_loss(loss_fn=loss_fn, extrapolation=0.5, impl="chunked", **arguments)
    leaves = (arguments["hidden"], arguments["weight"])
    grads = torch.autograd.grad(out.loss, leaves)
    return [out.loss.detach(), out.margins, out.token_logp, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("chunk_rows", [None, 50])
def test_against_float64_on_the_cpu(dtype: torch.dtype, loss_fn: object, chunk_rows: int) -> None:
    on_gpu = tensors(129, 96, 5021, dtype)
    on_gpu["target"][::7] = -100
    cu = torch.tensor([0, 31, 60, 60, 129])
    on_cpu = {name: t.detach().cpu() for name, t in on_gpu.items()}
    exact = {name: t if name == "target" else t.double() for name, t in on_cpu.items()}
    exact |= {name: exact[name].requires_grad_() for name in ("hidden", "weight")}
    options = {"cu_seqlens": cu, "chunk_rows": chunk_rows, "logits_dtype": torch.float32}
    ours = step(loss_fn, **options, **on_gpu)
    truth = step(loss_fn, cu_seqlens=cu, **exact)
    for found, expected in zip(ours[1:3], truth[1:3], strict=True):
        atol = 1e-4 if dtype == torch.float32 else 5e-3
        torch.testing.assert_close(found.cpu().double(), expected, atol=atol, rtol=0)
    for found, expected in zip(ours[3:], truth[3:], strict=True):
        limit = 1e-5 if dtype == torch.float32 else 2.5e-3
        assert (found.cpu().double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("chunk_rows", [None, 50])
def test_nothing_waits_for_the_device(loss_fn: object, chunk_rows: int) -> None:
    arguments = tensors(129, 96, 5021, torch.bfloat16)
    arguments["target"][::7] = -100
    arguments |= {"rows": torch.arange(129, device="cuda") % 100}
    arguments["cu_seqlens"] = torch.tensor([0, 31, 60, 60, 129])  # on the host, as documented
    step(loss_fn, chunk_rows=chunk_rows, **arguments)  # what compiles may wait
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(loss_fn, chunk_rows=chunk_rows, **arguments)
        arguments.pop("cu_seqlens")
        linear_logp(**arguments, extrapolation=0.5, impl="chunked").logp.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ten_repeats_are_equal_bit_for_bit() -> None:
    arguments = tensors(700, 128, 32003, torch.bfloat16)
    arguments["rows"] = torch.arange(700, device="cuda") % 9
    arguments["cu_seqlens"] = torch.tensor([0, 300, 500, 600, 700])
    first = step(chunk_rows=256, **arguments)
    for _ in range(9):
        assert all(map(torch.equal, step(chunk_rows=256, **arguments), first))


def test_other_streams_at_work_change_no_bit() -> None:
    arguments = tensors(700, 128, 32003, torch.bfloat16)
    arguments["rows"] = torch.arange(700, device="cuda") % 9
    arguments["cu_seqlens"] = torch.tensor([0, 300, 500, 600, 700])
    first = step(chunk_rows=256, **arguments)
    busy, own = torch.cuda.Stream(), torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    for cycles in (0, 10**5, 10**7):
        busy.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(busy):
            torch.cuda._sleep(cycles)
            for _ in range(20):
                noise = (noise @ noise).tanh()
        beside = step(chunk_rows=256, **arguments)
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            elsewhere = step(chunk_rows=256, **arguments)
        torch.cuda.synchronize()
        for found in (beside, elsewhere):
            assert all(map(torch.equal, found, first))


def test_compiled_it_is_eager_bit_for_bit() -> None:
    arguments = tensors(129, 96, 5021, torch.bfloat16)
    arguments["cu_seqlens"] = torch.tensor([0, 31, 60, 60, 129])
    expected = step(**arguments)
    torch._dynamo.reset()

    def call(**given: object) -> tuple[Tensor, Tensor, Tensor]:
        out = linear_preference_loss(loss_fn=SPA, extrapolation=0.5, impl="chunked", **given)
        return out.loss, out.margins, out.token_logp

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(**arguments)
    grads = torch.autograd.grad(found[0], (arguments["hidden"], arguments["weight"]))
    assert all(map(torch.equal, [*found, *grads], expected))


# Of a 7B and an 8B model.
@pytest.mark.parametrize("shape", [(1937, 3584, 152064), (8192, 4096, 128256)], ids=str)
def test_shapes_of_real_models_against_float64(shape: tuple[int, int, int]) -> None:
    """All log-probabilities, dX of 64 rows, and dW along a random direction."""
    rows, width, columns = shape
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    check_large_shape(tensors(rows, width, columns, torch.bfloat16))


def check_large_shape(arguments: dict[str, Tensor]) -> None:
    rows = len(arguments["target"])
    cu = torch.tensor([0, rows // 3, rows // 2, rows - 100, rows])
    _, margins, token_logp, grad_hidden, grad_weight = step(
        losses.dpo(0.1), cu_seqlens=cu, logits_dtype=torch.float32, **arguments
    )
    slope = -0.1 * (-0.1 * margins.double()).sigmoid() / 2
    lengths = cu.diff().to(slope.device)
    slopes = torch.stack([slope, -slope], 1).flatten().repeat_interleave(lengths)
    hidden, weight = (arguments[name].detach().double() for name in ("hidden", "weight"))
    direction = torch.randn(hidden.shape[1], device=hidden.device, dtype=torch.float64)
    along = torch.zeros(len(weight), dtype=torch.float64, device=hidden.device)
    for some in torch.arange(rows, device=hidden.device).split(512):
        target = arguments["target"][some, None]
        logp = (hidden[some] @ weight.T).log_softmax(1)
        found = token_logp[some].double()
        torch.testing.assert_close(found, logp.gather(1, target)[:, 0], atol=3e-5, rtol=0)
        dz = -logp.exp_()
        dz.scatter_add_(1, target, torch.ones_like(target, dtype=torch.float64))
        dz *= slopes[some, None]
        along += dz.T @ (hidden[some] @ direction)
        seen = slice(0, None, max(1, rows // 64))
        dx = dz[seen] @ weight
        assert (grad_hidden[some][seen] - dx).norm() <= 2.5e-3 * dx.norm()
    assert (grad_weight.double() @ direction - along).norm() <= 2.5e-3 * along.norm()


def test_equal_models_have_margins_of_zero_bit_for_bit() -> None:
    arguments = tensors(700, 128, 32003, torch.bfloat16)
    arguments |= {f"ref_{name}": arguments[name].detach().clone() for name in ("hidden", "weight")}
    arguments["cu_seqlens"] = torch.tensor([0, 300, 500, 600, 700])
    out = linear_preference_loss(loss_fn=SPA, extrapolation=0.5, impl="chunked", **arguments)
    assert not out.margins.any()
    assert not out.ext_margins.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_what_the_formula_says(dtype: torch.dtype) -> None:
    rows, width, columns, chunk = 8192, 512, 64000, 4096
    arguments = tensors(rows, width, columns, dtype)
    cu = torch.arange(0, rows + 1, rows // 8)
    logits, tile = 4 * chunk * columns, 4 * chunk * 32000
    rounded = columns * width * dtype.itemsize if dtype != torch.float32 else 0
    formula = max(logits + tile, rounded) + 4 * columns * width + 4 * rows * width
    step(cu_seqlens=cu, chunk_rows=chunk, **arguments)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(cu_seqlens=cu, chunk_rows=chunk, **arguments)
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * formula


def test_a_chunk_of_more_logits_than_int32_counts() -> None:
    rows, columns, width = 20_000, 128_256, 32
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    arguments = tensors(rows, width, columns, torch.bfloat16)
    cu = torch.tensor([0, rows // 2, rows])
    whole = step(cu_seqlens=cu, chunk_rows=rows, **arguments)
    cut = step(cu_seqlens=cu, chunk_rows=1000, **arguments)
    torch.testing.assert_close(whole[2], cut[2], atol=3e-5, rtol=0)
    for a, b in zip(whole[3:], cut[3:], strict=True):
        assert (a.float() - b.float()).norm() <= 2.5e-3 * b.float().norm()
    seen = torch.arange(rows - 64, rows, device="cuda")
    z = arguments["hidden"].detach()[seen].double() @ arguments["weight"].detach().double().T
    truth = z.log_softmax(1).gather(1, arguments["target"][seen, None])[:, 0]
    torch.testing.assert_close(whole[2][seen].double(), truth, atol=3e-5, rtol=0)
