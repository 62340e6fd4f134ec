"""The C++ kernel of sample: the reference's draws, on any number of threads, and its checks."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from srlm_kernels import SampleParams, native
from tests.srlm_kernels.draws import assert_same_draws, draw, normal

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.01},
        {"temperature": 1.5, "top_k": 500, "top_p": 0.95},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize(("rows", "columns"), [(20_000, 1000), (1000, 32000)])
def test_same_draws(rows: int, columns: int, options: dict[str, float]) -> None:
    assert_same_draws("cpp", rows, columns, **options)


def test_scores_far_apart() -> None:
    """Bisection must not depend on the distance of scores, nor on their number."""
    logits = -torch.logspace(-30, 37, 200).flip(0).repeat(3, 1)
    logits[1] *= -1
    logits[2, :150] = -torch.inf
    for options in ({"top_k": 20}, {"top_p": 0.999}, {"top_k": 190, "top_p": 0.9}):
        ours, theirs = (draw(name, logits, **options) for name in ("cpp", "torch"))
        assert ours.token.equal(theirs.token)
        assert_close(ours.kept_mass, theirs.kept_mass)


def test_threads_change_nothing(thread_count: Callable[[int], None]) -> None:
    logits = normal(37, 20_000)
    options = {"temperature": 1.1, "top_p": [0.9, 1.0, 0.5, 0.99] * 9 + [0.7]}
    thread_count(1)
    one = draw("cpp", logits, **options)
    for threads in (2, 3):
        thread_count(threads)
        many = draw("cpp", logits, **options)
        assert all(x.equal(y) for x, y in zip(one, many, strict=True))


def arguments(dtype: torch.dtype = torch.float32) -> list[object]:
    rows, columns = 4, 70
    params = SampleParams(
        torch.ones(rows), torch.full((rows,), 9).int(), torch.full((rows,), 0.9),
        torch.full((rows,), 0.01), torch.full((rows,), 1.2), torch.full((rows,), 3).int(),
    )  # fmt: skip
    outputs = [
        torch.zeros(rows, dtype=torch.int64), torch.zeros(3, rows), torch.zeros(rows).bool(),
    ]  # fmt: skip
    seed, is_stop = torch.arange(rows), torch.arange(columns) % 7 == 0
    seen = normal(rows, columns, seed=1) > 1
    logits = normal(rows, columns).to(dtype)
    return [*outputs, logits, seed, seed, *params, torch.ones(columns), seen, is_stop]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    overload = torch.ops.srlm_kernels_c.sample.default
    torch.library.opcheck(overload, tuple(arguments(dtype)))
    few = [None if i > 6 else x for i, x in enumerate(arguments(dtype))]
    torch.library.opcheck(overload, tuple(few))


def test_fake_tensors_pass() -> None:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in arguments()]
        assert torch.ops.srlm_kernels_c.sample(*fakes) is None


@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [
        (0, torch.zeros(4), "token must be"),
        (1, torch.zeros(4, 3), "numbers must be"),
        (2, torch.zeros(4), "stopped must be"),
        (3, torch.zeros(4, 70, dtype=torch.float16), "fp32 or bf16"),
        (3, torch.zeros(70, 4).T, "unit column stride"),
        (3, torch.zeros(4, 0), "no token to draw"),
        (4, torch.zeros(3, dtype=torch.int64), "seed must be"),
        (5, torch.zeros(4), "step must be"),
        (6, torch.zeros(3), "parameters must be"),
        (7, torch.zeros(4), "parameters must be"),
        (12, torch.zeros(69), "bias must be"),
        (13, torch.zeros(4, 69).bool(), "seen must be"),
        (13, torch.zeros(70, 4).bool().T, "seen must be"),
        (14, torch.zeros(69).bool(), "is_stop must be"),
        (14, torch.zeros(140).bool()[::2], "is_stop must be"),
    ],
)
def test_no_memory_is_used_that_is_not_there(
    position: int, replacement: torch.Tensor, message: str
) -> None:
    given = arguments()
    given[position] = replacement
    with pytest.raises(RuntimeError, match=message):
        torch.ops.srlm_kernels_c.sample(*given)
