"""A CUDA device in pretence: what code for a GPU asks of it can be watched where there is none.

Tensors "on the device" say so (`device`, `is_cuda`) and lie in the host's memory. What would make
the host wait for the device is counted, and raises where nothing may wait; what mixes tensors of
host and device raises. Kernels are their torch references. A recorded graph keeps operations and
addresses, as CUDA does: a replay computes the same from and into the same memory.

What it cannot show: races, time, memory, and whether a kernel runs.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_ROOT = Path(__file__).parents[1]
_OURS = (str(_ROOT / "srlm_fast"), str(_ROOT / "kernels"))
# Operations whose result, or its shape, the host has to know.
_WAITING = {
    "aten::_local_scalar_dense", "aten::_unique", "aten::_unique2", "aten::bincount", "aten::equal",
    "aten::masked_select", "aten::nonzero", "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip


class Waits(AssertionError):
    """The host would wait for the device where nothing may."""


@dataclass
class Device:
    """What is seen of the pretended device. `waits`: by what waited, and the line that asked."""

    waits: Counter[str] = field(default_factory=Counter)
    forbidden: bool = False
    graph: Graph | None = None  # that is being recorded
    stream: str = "default"
    graphs: list[Graph] = field(default_factory=list)

    def wait(self, what: str) -> None:
        """The host waits, or would."""
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(_OURS)]
        at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what} in {at}")
        if self.forbidden:
            raise Waits(f"{what} in {at}")
        self.waits[f"{what} in {at}"] += 1

    @contextlib.contextmanager
    def nothing_waits(self) -> Iterator[None]:
        """Inside, what would wait raises `Waits`."""
        before, self.forbidden = self.forbidden, True
        try:
            yield
        finally:
            self.forbidden = before


_device = Device()  # of the test that runs


class OnDevice(Tensor):
    """A tensor on the device; `memory` is a plain tensor over the same bytes."""

    memory: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, memory: Tensor) -> OnDevice:
        tensor = Tensor._make_subclass(cls, memory.detach(), memory.requires_grad)
        tensor.memory = memory.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        if id(self) not in memo:
            twin: Any = OnDevice(self.memory.clone())
            twin = torch.nn.Parameter(twin) if isinstance(self, torch.nn.Parameter) else twin
            memo[id(self)] = twin.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.memory})"

    def get_device(self) -> int:
        return 0

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def new_tensor(self, values: Any, **kwargs: Any) -> OnDevice:
        _device.wait("new_tensor")
        return OnDevice(self.memory.new_tensor(values, **kwargs))

    def cuda(self, *_: Any) -> OnDevice:
        return self

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def to(self, *args: Any, non_blocking: bool = False, copy: bool = False, **more: Any) -> Any:
        target, args, more = _split_device(args, more)
        if target is None or target.type == "cuda":
            return super().to(*args, copy=copy, **more) if args or more or copy else self
        if not non_blocking:
            _device.wait("copy to the host")
        return _ToHost.apply(self).to(*args, **more)


def _reading(name: str) -> Callable[..., Any]:
    def read(self: OnDevice, *args: Any) -> Any:
        _device.wait(name)
        return getattr(self.memory, name)(*args)

    return read


for _name in ("tolist", "item", "__bool__", "__float__", "__int__", "__index__"):
    setattr(OnDevice, _name, _reading(_name))


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: OnDevice) -> Tensor:
        return x.memory.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return OnDevice(grad)


def _memory(found: Any) -> Any:
    return tree_map(lambda x: x.memory if isinstance(x, OnDevice) else x, found)


def _on_device(found: Any) -> Any:
    return tree_map(lambda x: OnDevice(x) if type(x) is Tensor else x, found)


def _tensors(found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def _compute(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation that has tensors on the device among its arguments."""
    name = getattr(getattr(func, "_schema", None), "name", "a kernel")
    hosts = [x for x in _tensors((args, kwargs)) if type(x) is Tensor and x.ndim]
    masks = [x for x in _tensors(args[1:2]) if x.dtype == torch.bool and "::index" in name]
    sizeless = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
    if name in _WAITING or sizeless:
        _device.wait(name)
    if masks:
        _device.wait(f"{name} by a mask")
    if hosts and name == "aten::copy_":
        if not (len(args) > 2 and args[2]):
            _device.wait("blocking copy")
    elif hosts and "::index" in name:
        _device.wait(f"{name} by numbers of the host")
    elif hosts:
        raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and cpu")
    func, (args, kwargs) = _LACKING.get(func, func), _memory((args, kwargs))
    found = func(*args, **kwargs)
    if _device.graph is not None:
        _device.graph.record(func, args, kwargs, found)
    return _on_device(found)


def _wide_mm(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    assert a.dtype == b.dtype and a.dtype.itemsize == 2 and dtype == torch.float32
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _wide_addmm(
    total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    return torch.add(total, _wide_mm(a, b, dtype), out=out)


# What CUDA can and the CPU cannot: fp32 products of half operands.
_LACKING: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.dtype: _wide_mm,
    torch.ops.aten.mm.dtype_out: _wide_mm,
    torch.ops.aten.addmm.dtype: _wide_addmm,
    torch.ops.aten.addmm.dtype_out: _wide_addmm,
}


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.replays = 0
        self._operations: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        _device.graphs.append(self)

    def record(self, func: Callable[..., Any], args: Any, kwargs: Any, found: Any) -> None:
        """One operation, and where its results lie; views need no work."""
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        made = _tensors(found)
        new = [x for x in made if x.untyped_storage().data_ptr() not in given]
        if new or not made or _changes_arguments(func):
            self._operations.append((func, args, kwargs, made if new else []))

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, places in self._operations:
            for place, result in zip(places, _tensors(func(*args, **kwargs)), strict=False):
                place.copy_(result)


def _changes_arguments(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is None or schema.is_mutable


class _Recording:
    """Stands for `torch.cuda.graph`, which after an error leaves its stream the current one."""

    def __init__(self, graph: Graph, *, pool: Any, stream: str, capture_error_mode: str) -> None:
        self._graph, self._stream = graph, stream

    def __enter__(self) -> None:
        self._before, _device.stream = _device.stream, self._stream
        _device.graph = self._graph

    def __exit__(self, kind: Any, *_: Any) -> None:
        _device.graph = None
        if kind is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        _device.stream = self._before


class _Stream(str):
    """Stands for `torch.cuda.Stream`."""

    def wait_stream(self, other: str) -> None:
        pass


@contextlib.contextmanager
def _on_stream(stream: str) -> Iterator[None]:
    before, _device.stream = _device.stream, stream
    try:
        yield
    finally:
        _device.stream = before


class _Placing(TorchFunctionMode):
    """Sends to the pretended device what is made on, or moved to, "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "pin_memory":
            return args[0]
        if name in ("to", "cuda") and not isinstance(args[0], OnDevice):
            target, rest, more = _split_device(args[1:], kwargs)
            if name == "cuda" or (target is not None and target.type == "cuda"):
                if not (more.pop("non_blocking", False) or True in rest[:2]):
                    _device.wait("blocking copy")
                dtypes = [x for x in rest if isinstance(x, torch.dtype)]
                more.pop("copy", None)
                x = args[0].detach().clone()
                return OnDevice(x.to(*dtypes, **more) if dtypes or more else x)
        elif name != "to" and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            if name in ("tensor", "as_tensor"):
                _device.wait("blocking copy")
            found = func(*_memory(args), **kwargs | {"device": "cpu"})
            return OnDevice(found.detach()).requires_grad_(found.requires_grad)
        return func(*args, **kwargs)


def _split_device(args: Any, kwargs: Any) -> tuple[torch.device | None, Any, dict[str, Any]]:
    """The device among the arguments of `to`, and the other arguments."""
    named = [x for x in (*args, kwargs.get("device")) if isinstance(x, (torch.device, str))]
    likes = [x for x in (*args, kwargs.get("other")) if isinstance(x, Tensor)]
    target = torch.device(named[0]) if named else likes[0].device if likes else None
    rest = [x for x in args if not isinstance(x, (torch.device, str, Tensor))]
    rest += [x.dtype for x in likes]
    return target, rest, {k: v for k, v in kwargs.items() if k not in ("device", "other")}


def _launch(op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What launches the kernel of `op`: its reference, as one operation on the device."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        if any(type(x) is Tensor for x in _tensors((args, kwargs))):
            raise RuntimeError(f"{op}: a kernel cannot read the host's memory")
        return _compute(reference, args, kwargs)

    return launch


def _use_references(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = import_module("srlm_kernels.backends")
    function = backends._function
    monkeypatch.setattr(backends, "refusal", lambda *_: None)
    monkeypatch.setattr(backends, "best_backend", lambda x: "triton" if x.is_cuda else "torch")

    def kernel(op: str, backend: str) -> Callable[..., Any]:
        return _launch(op, function(op, "torch")) if backend == "triton" else function(op, backend)

    monkeypatch.setattr(backends, "_function", kernel)
    tiled = import_module("srlm_kernels.linear_logp_tiled")
    monkeypatch.setattr(tiled, "takes", lambda *_: "there is no such kernel in pretence")
    triton = import_module("srlm_kernels.pair_grad_triton")
    monkeypatch.setattr(
        triton, "pair_grad_triton", import_module("srlm_kernels.pair_grad").pair_grad_ref
    )
    monkeypatch.setattr(
        import_module("srlm_kernels.prefix_attention_flex"),
        "attend",
        import_module("srlm_kernels.prefix_attention").prefix_attention_ref,
    )


def _use_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = contextlib.nullcontext
    stand_ins = {
        "CUDAGraph": Graph,
        "Stream": lambda: _Stream("side"),
        "current_stream": lambda *_: _Stream(_device.stream),
        "device": nothing,
        "device_count": lambda: 1,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "graph": _Recording,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: _device.graph is not None,
        "mem_get_info": lambda *_: (1 << 30, 1 << 30),
        "stream": _on_stream,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(tensors: Any, with_indices: bool = False) -> Any:
        ours = any(isinstance(x, OnDevice) for x in tree_leaves(tensors))
        found = group(tensors, with_indices)
        return {(CUDA if ours else at, dtype): some for (at, dtype), some in found.items()}

    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The pretended device: what a test moves to "cuda" is there."""
    global _device
    _device = Device()
    _use_references(monkeypatch)
    _use_cuda(monkeypatch)
    overwrite = torch.__future__.set_overwrite_module_params_on_conversion
    overwrite(True)  # a parameter cannot become one of another class
    try:
        with _Placing():
            yield _device
    finally:
        overwrite(False)


def on_gpu(model: Any) -> Any:
    """`model` on the pretended device; its parameters are new ones, tied as before."""
    model.to("cuda")
    model.tie_weights()
    return model
