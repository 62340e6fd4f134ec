"""A benchmark whose variants fit, fail, lack a package or take memory, for the tests beside it."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Variant, Work, optional

CALLS: Counter[str] = Counter()
MEGABYTES = 96


def double(inputs: Tensor) -> Call:
    def call() -> dict[str, Tensor]:
        CALLS["double"] += 1
        return {"y": inputs * 2}

    return call


def add(inputs: Tensor) -> Call:
    return lambda: {"y": inputs + inputs}


def wrong(inputs: Tensor) -> Call:
    def call() -> dict[str, Tensor]:
        CALLS["wrong"] += 1
        return {"y": inputs * 2.1}

    return call


def not_a_number(inputs: Tensor) -> Call:
    return lambda: {"y": inputs * float("nan")}


def silent(inputs: Tensor) -> Call:
    return lambda: {}


def raises(inputs: Tensor) -> Call:
    def call() -> dict[str, Tensor]:
        raise RuntimeError("the kernel is broken")

    return call


def not_installed(inputs: Tensor) -> Call:
    optional("a_package_that_nobody_has")
    return add(inputs)


def bound(inputs: Tensor) -> Call:
    return lambda: {}


def hungry(inputs: Tensor) -> Call:
    def call() -> dict[str, Tensor]:
        scratch = torch.ones(MEGABYTES * 10**6, dtype=torch.uint8)
        return {"y": inputs * (1 + scratch[0])}

    return call


def cases(suite: str) -> Iterator[Case]:
    failing = {f.__name__: Variant(f) for f in (wrong, not_a_number, silent, raises, not_installed)}
    passing = {"bound": Variant(bound, None), "add": Variant(add), "double": Variant(double)}
    yield Case(
        op="toy",
        name="doubling",
        params={"n": 1000, "dtype": "float32", "device": "cpu"},
        make_inputs=lambda: torch.arange(1000.0),
        variants=(passing | failing)
        if suite == "smoke"
        else {"add": Variant(add), "hungry": Variant(hungry)},
        oracle=lambda inputs, computes: {"y": inputs.double() * 2},
        tolerance=1e-6,
        work=Work(flop=2e3, bytes=8e3, gemm=(10, 10, 10)),
        baselines=("add",),
    )
