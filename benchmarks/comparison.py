"""One case from its first call to its rows: gate, times, memory."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import memory, timing
from benchmarks.budget import Budget
from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, one_line, relative_errors
from benchmarks.ceilings import ceiling, gemm
from benchmarks.rows import Row

# Guesses for what is not known before the first call; too high only means "left for another run".
_COMPILE_SECONDS = 40.0
_CHILD_START_SECONDS = 15.0
_TIMES_THE_GEMMS = 6.0

_MEASURED = (
    "seconds", "ratio_to", "peak_bytes", "why_no_peak", "first_call_seconds", "ceiling", "gate",
    "skipped",
)  # fmt: skip


def cache_state(case: Case, flush_l2: bool) -> str:
    """What a timed call finds in the device's cache."""
    return "L2 flushed" if flush_l2 and case.device == "cuda" else "warm"


class GateFailed(Exception):
    """A variant whose results are wrong."""


@dataclass
class Contender:
    """A variant that passed its gate."""

    call: Call
    gate: Row
    first_call_seconds: float
    seconds: float
    """Of the second call: what a round will take."""
    memory_seconds: float
    """Predicted, of measuring its memory."""


@dataclass
class Comparison:
    """Measures `wanted` variants of a case, and with them the baselines their ratios need.

    `emit` gets a row as soon as nothing is missing from it; variants without a row did not fit into
    the budget.
    """

    case: Case
    module: str
    suite: str
    wanted: list[str]
    budget: Budget
    emit: Callable[[Row], None]
    flush_l2: bool = False
    with_memory: bool = True

    def run(self) -> None:
        """Raises OutOfTime or KeyboardInterrupt between rows, never inside one."""
        names = [n for n in self.case.variants if n in self.wanted or n in self.case.baselines]
        if not self.budget.fits(self._start_seconds(self.case.variants[names[0]])):
            return
        limits = ceiling(self.case)
        torch.compiler.reset()  # shapes of an earlier case must not make this one's dynamic
        inputs = self.case.make_inputs()
        expected = functools.cache(lambda computes: self.case.oracle(inputs, computes))
        ready: dict[str, Contender] = {}
        for name in names:
            variant = self.case.variants[name]
            if not self.budget.fits(self._planned(ready) + self._first_seconds(variant, ready)):
                break  # not a later one either: it would lack a baseline
            contender = self._prepare(name, variant, inputs, expected)
            if contender is not None:
                ready[name] = contender
        if any(n in self.wanted for n in ready) and self.budget.fits(self._planned(ready)):
            self._measure(ready, limits)

    def _prepare(
        self, name: str, variant: Variant, inputs: Any, expected: Callable[[str], Outputs]
    ) -> Contender | None:
        """First call, gate, second call. None where one of them fails; that is a row too."""
        device, gate = self.case.device, None
        want = None if variant.computes is None else expected(variant.computes)
        try:
            call = variant.build(inputs)
            timing.synchronize(device)
            first, outputs = timing.time_call(call, device)
            gate = self._gate(outputs, want)
            del outputs
            if not gate["ok"]:
                raise GateFailed(f"relative errors {gate['errors']}, allowed {gate['tolerance']}")
            seconds, _ = timing.time_call(call, device)
        except Unavailable as reason:
            self._emit(name, skipped=str(reason))
        except Exception as error:
            self._emit(name, gate={**(gate or {}), "ok": False, "error": one_line(error)})
            timing.synchronize(device)  # raises if the error broke the device for all that follow
        else:
            memory_seconds = seconds if self.with_memory else 0.0
            if self._in_child:
                memory_seconds += _CHILD_START_SECONDS + min(first, _COMPILE_SECONDS) + seconds
            return Contender(call, gate, first, seconds, memory_seconds)
        return None

    def _gate(self, outputs: Outputs, want: Outputs | None) -> Row:
        if want is None:
            return {"ok": True, "errors": {}, "note": "a bound: it computes no result"}
        errors = relative_errors(outputs, want)
        return {
            # `<=` on every one, so that NaN fails.
            "ok": bool(errors) and all(e <= self.case.tolerance for e in errors.values()),
            "errors": {k: e if math.isfinite(e) else str(e) for k, e in errors.items()},
            "tolerance": self.case.tolerance,
        }

    def _measure(self, ready: dict[str, Contender], limits: Row) -> None:
        """Rounds over all contenders, then memory and row of each that is wanted."""
        afterwards = sum(c.memory_seconds for n, c in ready.items() if n in self.wanted)
        device, flush = self.case.device, self.flush_l2

        def timer(call: Call) -> Callable[[], float]:
            return lambda: timing.time_call(call, device, flush_l2=flush)[0]

        def spare() -> float:
            return 0.8 * (self.budget.left() - afterwards)

        rounds = timing.rounds_for(sum(c.seconds for c in ready.values()), spare())
        gc.collect()
        timers = {name: timer(contender.call) for name, contender in ready.items()}
        times = timing.interleave(timers, rounds, spare)
        for name, contender in ready.items():
            if name not in self.wanted:
                continue
            seconds = timing.spread(times[name])
            peak, why_no_peak = self._peak(name, contender.call)
            self._emit(
                name,
                seconds={**seconds, "rounds": len(times[name])},
                ratio_to={
                    base: timing.paired_ratio(times[name], times[base])
                    for base in self.case.baselines
                    if base in times and base != name
                },
                peak_bytes=peak,
                why_no_peak=why_no_peak,
                first_call_seconds=contender.first_call_seconds,
                ceiling={**limits, "fraction": limits["seconds"] / seconds["median"]},
                gate=contender.gate,
            )

    def _peak(self, name: str, call: Call) -> memory.Peak:
        if not self.with_memory:
            return None, "not measured in this suite"
        if self.case.variants[name].elsewhere:
            return None, "it computes in a process of its own"
        if self.case.device == "cuda":
            return memory.peak_on_gpu(call)
        left = self.budget.left()
        return memory.peak_on_cpu(
            self.module, self.suite, self.case.name, name, None if left == math.inf else left
        )

    def _emit(self, name: str, **measured: Any) -> None:
        if name not in self.wanted:
            return  # a baseline that has its row already
        empty = dict.fromkeys(_MEASURED)
        what = {
            "op": self.case.op, "case": self.case.name, "params": self.case.params,
            "cache": cache_state(self.case, self.flush_l2), "variant": name,
            "bound": self.case.variants[name].computes is None,
        }  # fmt: skip
        self.emit({**what, **empty, **measured})

    @property
    def _in_child(self) -> bool:
        return self.with_memory and self.case.device == "cpu"

    def _start_seconds(self, first: Variant) -> float:
        """Predicted: inputs, oracle and ceilings, and a first variant that can be finished."""
        return 3 * self._call_guess({}) + self._first_seconds(first, {})

    def _first_seconds(self, variant: Variant, ready: dict[str, Contender]) -> float:
        """Predicted: everything about a variant that was never called."""
        compiling = _COMPILE_SECONDS if variant.compiles else 0.0
        child = _CHILD_START_SECONDS if self._in_child else 0.0
        return compiling + child + (4 + timing.MIN_ROUNDS) * self._call_guess(ready)

    def _call_guess(self, ready: dict[str, Contender]) -> float:
        """Predicted: one call of a variant, from those that were called or from the machine."""
        if ready:
            return 2 * max(contender.seconds for contender in ready.values())
        side = 512 if self.case.device == "cpu" else 4096
        rate = gemm(side, side, side, self.case.dtype, self.case.device)
        assert rate is not None
        return _TIMES_THE_GEMMS * self.case.work.flop / rate

    def _planned(self, ready: dict[str, Contender]) -> float:
        """Predicted: the rounds of all contenders and the memory of those that get a row."""
        rounds = timing.MIN_ROUNDS * sum(c.seconds for c in ready.values())
        return rounds + sum(c.memory_seconds for n, c in ready.items() if n in self.wanted)
