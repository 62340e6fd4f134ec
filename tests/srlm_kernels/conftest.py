"""Random problems, and the float64 truth that every implementation is held to."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from srlm_kernels import dispatch
from srlm_kernels.backends import row_kernel
from srlm_kernels.tiles import tile_bounds

# One row; odd and prime; a round tile; wide with V no multiple of anything.
SHAPES = [(1, 8, 11), (5, 31, 123), (64, 128, 1000), (129, 96, 5021)]

# Rows of packed pairs, with empty sequences among them; 1 row is half of a pair.
OFFSETS = {
    1: [0, 1, 1],
    5: [0, 2, 3, 3, 5],
    64: [0, 9, 22, 23, 40, 40, 64],
    129: [0, 31, 60, 77, 129],
}


def many_tiles(columns: int, width: int) -> list[tuple[int, int]]:
    """About twenty tiles, of no less than 32 columns."""
    return tile_bounds(columns, max(32, columns // 20))


@pytest.fixture(params=["reference", "chunked", "small chunks"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the implementation that impl="auto" stands for during the test.

    "small chunks": chunks and tiles so small that most pairs are cut and the vocabulary has many
    tiles, and the row kernels in torch whatever else is there.
    """
    name = "reference" if request.param == "reference" else "chunked"

    def choose(op: str, impl: str, need: dispatch.Need) -> str:
        return dispatch.choose(op, name if impl == "auto" else impl, need)

    for op in ("linear_logp", "linear_preference_loss"):
        # Not by dotted name: the package has functions of the modules' names.
        monkeypatch.setattr(import_module(f"srlm_kernels.{op}"), "choose", choose)
    if request.param == "small chunks":
        monkeypatch.setattr("srlm_kernels.problem.chunk_rows", lambda columns, device: 7)
        monkeypatch.setattr("srlm_kernels.tiles.tile_bounds", many_tiles)
        monkeypatch.setattr(
            "srlm_kernels.tiles.row_kernel", lambda op, impl, like: row_kernel(op, "torch", like)
        )
    return name


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor
    target: Tensor

    @property
    def reference(self) -> dict[str, Tensor]:
        names = ("ref_hidden", "ref_weight", "ref_bias")
        return {name: getattr(self, name) for name in names}

    def trainable(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh leaves of hidden, weight and bias."""
        tensors = (self.hidden, self.weight, self.bias)
        return tuple(t.detach().clone().requires_grad_() for t in tensors)


@pytest.fixture(params=SHAPES, ids=lambda s: "N{}-D{}-V{}".format(*s))
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.fixture
def problem() -> Callable[..., Problem]:
    def make(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Problem:
        rows, width, vocabulary = shape
        g = torch.Generator().manual_seed(rows)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g).to(dtype)

        head = normal(vocabulary, width) * width**-0.5 * 3
        return Problem(
            hidden=normal(rows, width),
            weight=head,
            bias=normal(vocabulary),
            ref_hidden=normal(rows, width),
            ref_weight=head + normal(vocabulary, width) * 0.1,
            ref_bias=normal(vocabulary),
            target=torch.randint(0, vocabulary, (rows,), generator=g),
        )

    return make


@pytest.fixture
def true_logits() -> Callable[..., Tensor]:
    def logits(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        z = torch.einsum("nd,vd->nv", hidden.detach().double(), weight.detach().double())
        if bias is not None:
            z = z + bias.detach().double()
        z = z * logit_scale
        if softcap is not None:
            z = softcap * (1 - 2 / ((2 * z / softcap).exp() + 1))
        return z / temperature

    return logits


@pytest.fixture
def true_logp() -> Callable[[Tensor, Tensor], Tensor]:
    def logp(z: Tensor, target: Tensor) -> Tensor:
        """z_y - ln sum exp z in float64, the sum shifted by the row's maximum."""
        top = z.max(dim=1).values
        lse = top + (z - top[:, None]).exp().sum(dim=1).log()
        return torch.stack([z[n, y] for n, y in enumerate(target.tolist())]) - lse

    return logp


@pytest.fixture
def packed() -> Callable[[int], Tensor]:
    """`cu_seqlens` of whole pairs over that many rows."""
    return lambda rows: torch.tensor(OFFSETS[rows], dtype=torch.int32)


@pytest.fixture
def thread_count() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
