"""A case: several ways to compute one op at one shape, and what they must agree on.

A bench file `bench_<op>.py` has `cases(suite) -> Iterable[Case]`, the safest case first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

SUITES = ("smoke", "cpu", "gpu")

Outputs = Mapping[str, Tensor]
Call = Callable[[], Outputs]


class Unavailable(Exception):
    """A variant that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the op.

    `build` takes the case's inputs and returns the function that is timed. It imports what it
    needs, and raises Unavailable where that fails.
    """

    build: Callable[[Any], Call]
    computes: str | None = ""
    """Which result of the oracle the outputs must match; None: a bound, which computes none."""
    compiles: bool = False
    """The first call takes tens of seconds."""
    elsewhere: bool = False
    """It computes in a process of its own, whose memory is not seen from here."""


@dataclass(frozen=True)
class Work:
    """What any implementation must do, so that a time becomes a fraction of the machine's best."""

    flop: float
    bytes: float
    gemm: tuple[int, int, int]
    """M, K, N of the product whose measured rate is the ceiling."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    `params` is plain data and identifies the case in a row; "dtype" and "device" must be there.
    `variants` come safest first. `oracle(inputs, computes)` gives the expected outputs; a variant
    must return every one of them within `tolerance`, |a - b| / |b| in the Frobenius norm. Ratios
    are taken to the variants named in `baselines`.
    """

    op: str
    name: str
    params: dict[str, Any]
    make_inputs: Callable[[], Any]
    variants: dict[str, Variant]
    oracle: Callable[[Any, str], Outputs]
    tolerance: float
    work: Work
    baselines: tuple[str, ...]

    @property
    def device(self) -> str:
        return str(self.params["device"])

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.params["dtype"])
        return dtype


class Bench(Protocol):
    """What a bench module offers."""

    def cases(self, suite: str) -> Iterable[Case]: ...


def discover(folder: Path) -> dict[str, str]:
    """Op -> name of its bench module, for every `bench_<op>.py` of `folder` that has `cases`."""
    package = folder.name if (folder / "__init__.py").exists() else ""
    found = {}
    for path in sorted(folder.glob("bench_*.py")):
        name = f"{package}.{path.stem}".lstrip(".")
        if hasattr(importlib.import_module(name), "cases"):
            found[path.stem.removeprefix("bench_")] = name
    return found


def load_cases(module: str, suite: str) -> list[Case]:
    """The cases of a bench module, safest first."""
    bench: Bench = importlib.import_module(module)
    return list(bench.cases(suite))


def optional(module: str) -> ModuleType:
    """An optional package, or Unavailable with the reason."""
    try:
        return importlib.import_module(module)
    # A binary built for another torch fails as RuntimeError or OSError as often as ImportError.
    except Exception as error:
        raise Unavailable(f"{module} does not load: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text[:300]}"


def relative_errors(outputs: Outputs, expected: Outputs) -> dict[str, float]:
    """Relative error of every expected output; infinite where it is missing or misshapen."""
    errors = {}
    for name, want in expected.items():
        got = outputs.get(name)
        if got is None or got.shape != want.shape:
            errors[name] = float("inf")
            continue
        want = want.double()
        difference = torch.linalg.vector_norm(got.detach().double() - want)
        size = torch.linalg.vector_norm(want).clamp(min=torch.finfo(torch.float64).tiny)
        errors[name] = float(difference / size)
    return errors
