"""The decoding step as CUDA graphs: one launch a token instead of a thousand.

A graph holds addresses and sizes. So rows, pages and work lists are padded to a few sizes, every
number that changes lives on the device, and what a burst starts from is copied into the tensors
that the graph was recorded on. Weights may change in place beneath it; where they or the KV memory
move, graphs are recorded anew.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from srlm_fast.sampler.decode import Rules, State, decode_step
from srlm_fast.sampler.runner import Runner
from srlm_kernels.sample import SampleParams
from srlm_kernels.tree_attention import TreePlan

_LOG = getLogger("srlm_fast.sampler")
_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MOST_GRAPHS = 32


def bucket(rows: int) -> int:
    """The number of rows that a burst of `rows` rows is padded to."""
    return next((size for size in _BUCKETS if size >= rows), -(-rows // 512) * 512)


def round_up(count: int) -> int:
    """The next power of two; 0 stays 0."""
    return 1 << (count - 1).bit_length() if count else 0


class StepGraphs:
    """Recorded steps of `runner`, by the sizes of everything in them."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._graphs: dict[Hashable, _Recorded] = {}
        self._at: Hashable = None
        self._works = True
        self._pool: Any = None  # of memory for what lives within a step: graphs run one by one
        self._stream: Any = None  # where graphs are recorded

    def run(self, state: State, plan: TreePlan, rules: Rules, steps: int) -> State:
        """The state after `steps` steps from `state`. Without graphs where the model cannot be
        recorded, said once."""
        with torch.cuda.device(self._runner.device):
            if self._works and (recorded := self._find(state, plan, rules)):
                recorded.load(state, plan, rules)
                for _ in range(steps):
                    recorded.graph.replay()
                return recorded.state
            for _ in range(steps):
                decode_step(self._runner, state, plan, rules)
        return state

    def clear(self) -> None:
        """Forgets all graphs, and with them the memory they hold."""
        self._graphs.clear()
        self._pool = None

    def _find(self, state: State, plan: TreePlan, rules: Rules) -> _Recorded | None:
        model, memory = self._runner.model, self._runner.memory
        tensors = [*model.parameters(), *model.buffers(), *memory.keys, *memory.values]
        at = tuple(t.data_ptr() for t in tensors)
        if at != self._at:
            self.clear()
            self._at = at
        shapes = tuple(None if t is None else t.shape for t in _flat(state, plan, rules))
        key = (shapes, plan.launches)
        if key not in self._graphs:
            if len(self._graphs) >= _MOST_GRAPHS:
                self.clear()
            try:
                self._graphs[key] = self._record(state, plan, rules)
            except RuntimeError as error:  # a model that waits for the GPU, for instance
                self._works = False
                self.clear()
                _LOG.warning("decoding without CUDA graphs, slower: %s", error)
                return None
        return self._graphs[key]

    def _record(self, state: State, plan: TreePlan, rules: Rules) -> _Recorded:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # A recording that fails would leave its stream the current one for good.
        with torch.cuda.stream(torch.cuda.current_stream()):
            return _Recorded(self._runner, state, plan, rules, self._pool, self._stream)


class _Recorded:
    """A step recorded on copies of `state`, `plan` and `rules`."""

    def __init__(
        self, runner: Runner, state: State, plan: TreePlan, rules: Rules, pool: Any, stream: Any
    ) -> None:
        self.state, self._plan, self._rules = _copies(state, plan, rules)
        # Kernels are compiled, and workspaces of the stream made, by a step outside of the graph.
        # It writes to memory what the first replay will write again.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decode_step(runner, self.state, self._plan, self._rules)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile is no part of it, and no error.
        mode = "thread_local"
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode=mode):
            decode_step(runner, self.state, self._plan, self._rules)

    def load(self, state: State, plan: TreePlan, rules: Rules) -> None:
        """Puts a burst's start where the graph reads it."""
        ours = _flat(self.state, self._plan, self._rules)
        for mine, new in zip(ours, _flat(state, plan, rules), strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)


def _flat(state: State, plan: TreePlan, rules: Rules) -> list[Tensor | None]:
    own = [value for name, value in vars(state).items() if name != "params"]
    return [*own, *state.params, *plan[:5], rules.is_stop, rules.bias]


def _copies(state: State, plan: TreePlan, rules: Rules) -> tuple[State, TreePlan, Rules]:
    def copies(of: dict[str, Any]) -> dict[str, Any]:
        return {name: x.clone() if isinstance(x, Tensor) else x for name, x in of.items()}

    params = SampleParams(**copies(state.params._asdict()))
    return (
        replace(state, **copies(vars(state)) | {"params": params}),
        TreePlan(**copies(plan._asdict())),
        Rules(**copies(vars(rules))),
    )
