"""A benchmark that takes a known time, for the tests beside it."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Variant, Work

SECONDS = {"short": 100.0, "long": 200.0}
sleep = time.sleep


def cases(suite: str) -> Iterator[Case]:
    def build(name: str) -> Variant:
        def sleeper(inputs: Tensor) -> Call:
            def call() -> dict[str, Tensor]:
                sleep(SECONDS[name])
                return {"y": inputs}

            return call

        return Variant(sleeper)

    for number in range(2):
        yield Case(
            op="sleep",
            name=f"case {number}",
            params={"number": number, "dtype": "float32", "device": "cpu"},
            make_inputs=lambda: torch.ones(1),
            variants={name: build(name) for name in SECONDS},
            oracle=lambda inputs, computes: {"y": inputs.double()},
            tolerance=0.0,
            work=Work(flop=2e3, bytes=8.0, gemm=(10, 10, 10)),
            baselines=("short",),
        )
