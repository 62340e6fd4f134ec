"""Compiles every Triton kernel for GPUs that are not here, and checks what it would use there.

    python tests/srlm_kernels/aot.py [--arch 80 90 100] [--max-spills 0] [--triton 3.6.0]

The launchers run as they are, on CPU tensors, with a driver that knows an architecture and nothing
else: so each kernel is compiled for the very arguments, options and alignments of a real launch,
and then not launched. Not under TRITON_INTERPRET. Exit status 1: something does not compile, stores
more registers to memory than allowed, needs more shared memory than the chip has, lost its tensor
cores, reads pages in small pieces, or may write logits before they were read.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from srlm_kernels import linear_logp_tiled, losses
from srlm_kernels import row_stats as rs
from srlm_kernels.kv_write_triton import kv_write_triton
from srlm_kernels.logits_grad_triton import logits_grad_triton
from srlm_kernels.merge_states_triton import merge_states_triton
from srlm_kernels.pair_grad_triton import pair_grad_triton
from srlm_kernels.row_stats_triton import row_stats_triton
from srlm_kernels.sample import SampleParams
from srlm_kernels.sample_triton import sample_triton
from srlm_kernels.tree_attention import TreePlan
from srlm_kernels.tree_attention_triton import partial_states

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes that one program may have
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
DESCRIPTOR_LOAD, SPILL = "UTMALDG", "STL"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Launch = Callable[[], object]


class AbsentDevice:
    """What Triton asks of a driver when it compiles: a target, and nothing of a device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        limits = {"max_shared_mem": SHARED_MEMORY[arch]}
        self.utils = SimpleNamespace(get_device_properties=lambda device: limits)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the key under which a kernel keeps what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(launch: Launch, arch: int) -> list[Any]:
    """The kernels that `launch` would have started on `arch`."""
    original, found = JITFunction.run, []

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(original(self, *args, warmup=True, **kwargs))

    triton.runtime.driver.set_active(AbsentDevice(arch))
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = original
    return found


def row_stats_cases() -> Iterator[tuple[str, Launch]]:
    target, cpu = torch.zeros(32, dtype=torch.int64), torch.device("cpu")
    for dtype in DTYPES:
        logits, odd = torch.zeros(32, 4096, dtype=dtype), torch.zeros(32, 4097, dtype=dtype)
        both = {"ref_logits": logits}
        spa = {"ref_logits": logits, "extrapolation": 1}
        more = {"bias": logits[0], "ref_bias": logits[0], "softcap": 30.0, "temperature": 1.3}
        for name, z, options, outputs in (
            ("policy", logits, {}, ()),
            ("policy and reference", logits, both, ()),
            ("three streams", logits, spa, ()),
            ("three streams odd", odd, spa | {"ref_logits": odd}, ()),
            ("policy with outputs", logits, {}, ("entropy",)),
            ("everything", logits, spa | more, ("entropy",)),
        ):
            state = rs.new_state(32, outputs=outputs, dtype=torch.float32, device=cpu)
            yield (
                f"row_stats {dtype} {name}",
                lambda s=state, x=z, o=options: row_stats_triton(s, x, target, **o),
            )


def logits_grad_cases() -> Iterator[tuple[str, Launch]]:
    target, lse = torch.zeros(32, dtype=torch.int64), torch.zeros(32)
    to_narrow = ((torch.float32, half) for half in HALVES)
    for dtype, grad_dtype in (*((dtype, dtype) for dtype in DTYPES), *to_narrow):
        logits = torch.zeros(32, 4096, dtype=dtype)
        for what, options in (("", {}), (" capped", {"bias": logits[0], "softcap": 30.0})):
            yield (
                f"logits_grad {dtype} to {grad_dtype}{what}",
                lambda z=logits, g=grad_dtype, o=options: logits_grad_triton(
                    z, target, lse, lse, grad_dtype=g, **o
                ),
            )


def pair_grad_cases() -> Iterator[tuple[str, Launch]]:
    logp, offsets = torch.zeros(64), torch.tensor([0, 10, 20, 30, 64])
    weights, number = torch.full((2,), 0.3), torch.tensor(0.5)
    tokens = {"ref_logp": logp, "extrapolated_logp": logp}
    for name, loss_fn, options in (
        ("dpo", losses.dpo(0.1), {"scale": 0.5, "ref_sums": torch.zeros(4)}),
        ("cdpo", losses.dpo(0.1), {"scale": number, "pair": {"label_smoothing": weights}}),
        ("spa integers", losses.spa(1, 1, 1), {"scale": 1, **tokens}),
        ("spa tensor", losses.spa(0.1, 0.1, number), {"scale": number, **tokens}),
    ):
        yield (
            f"pair_grad {name}",
            lambda f=loss_fn, o=options: pair_grad_triton(logp, logp < 0, offsets, f, **o),
        )


def linear_logp_cases() -> Iterator[tuple[str, Launch]]:
    target = torch.zeros(256, dtype=torch.int64)
    for dtype in DTYPES:
        hidden, weight = torch.zeros(256, 256, dtype=dtype), torch.zeros(4096, 256, dtype=dtype)
        bias = torch.zeros(4096, dtype=dtype)
        for paired in (False, True):
            streams: dict[str, Any] = {}
            if paired:
                streams = {"ref_hidden": hidden, "ref_weight": weight, "extrapolation": 1}
            for capped in (False, True):
                options = {"bias": bias, "ref_bias": bias, "softcap": 30.0} if capped else {}
                yield (
                    f"linear_logp {dtype}{' paired' * paired}{' capped' * capped}",
                    lambda h=hidden, w=weight, o=streams | options: linear_logp_tiled.tiled_state(
                        h, w, target, **o
                    ),
                )


def tree_attention_cases() -> Iterator[tuple[str, Launch]]:
    int32 = partial(torch.zeros, dtype=torch.int32)
    bf16 = product(
        [torch.bfloat16], [(64, 64), (128, 128), (256, 256), (192, 128), (80, 80)], [16, 128]
    )
    between = product([torch.bfloat16], [(64, 64), (128, 128)], [32])
    fp16 = product([torch.float16], [(128, 128)], [16, 128])
    fp32 = product([torch.float32], [(64, 64), (128, 128), (256, 256)], [16])  # one tile for all
    for dtype, (key, value), rows in (*bf16, *between, *fp16, *fp32):
        query = torch.zeros(128, 8, key, dtype=dtype)
        pages = [torch.zeros(4, 2, 64, width, dtype=dtype) for width in (key, value)]
        launches = ((rows // 4, 0, 2),)
        plan = TreePlan(int32(2, 4), int32(2, 4), int32(128), int32(129), int32(128), launches)
        for what, window, softcap in (("", None, None), (" window capped", 100, 30.0)):
            yield (
                f"tree_attention {dtype} {key} {value} {rows} rows{what}",
                partial(
                    partial_states, query, *pages, plan, int32(128), scale=0.1, window=window,
                    softcap=softcap,
                ),
            )  # fmt: skip


def page_cases() -> Iterator[tuple[str, Launch]]:
    csr, slot = torch.zeros(17, dtype=torch.int32), torch.zeros(16, dtype=torch.int64)
    for heads, width in ((32, 128), (14, 64)):
        o, lse = torch.zeros(16, heads, width), torch.zeros(16, heads)
        for dtype in DTYPES:
            for sinks in (None, lse[0]):
                yield (
                    f"merge_states {dtype} {heads} {width}{' sinks' * (sinks is not None)}",
                    partial(merge_states_triton, o, lse, csr, csr, sinks=sinks, dtype=dtype),
                )
            key = torch.zeros(16, heads, width, dtype=dtype)
            pages = torch.zeros(4, heads, 64, width, dtype=dtype)
            yield (
                f"kv_write {dtype} {heads} {width}",
                partial(kv_write_triton, key, key, pages, pages, slot),
            )


def sample_cases() -> Iterator[tuple[str, Launch]]:
    rows = 32
    seed, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    whole = ones.int()
    for dtype, columns in (*product(DTYPES[:2], (32768, 50257)), (torch.float16, 32768)):
        logits, seen = torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, columns).bool()
        given = {"bias": torch.zeros(columns), "seen": seen, "is_stop": seen[0]}
        every = SampleParams(ones, whole, ones, ones, ones, whole)
        for name, params, options in (
            ("plain", SampleParams(ones), {}),
            ("top_k", SampleParams(ones, top_k=whole), {}),
            ("top_p", SampleParams(ones, top_p=ones), {}),
            ("min_p", SampleParams(ones, min_p=ones), {}),
            ("processed", every._replace(top_k=None, top_p=None, min_p=None), given),
            ("everything", every, given),
        ):
            yield (
                f"sample {dtype} {columns} {name}",
                lambda z=logits, p=params, o=options: sample_triton(z, seed, seed, p, **o),
            )


def operations_of(kernel: Any) -> tuple[int, list[str]]:
    """Registers per thread, and the machine instructions in order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = output_of("cuobjdump", "--dump-resource-usage", file.name)
        code = output_of("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9.]*)", code, re.M)
    assert registers and operations, "cuobjdump or nvdisasm gave nothing"
    return int(registers.group(1)), operations


def output_of(tool: str, *arguments: str) -> str:
    command = [str(BINARIES / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def number_of(prefix: str, operations: list[str]) -> int:
    return sum(operation.startswith(prefix) for operation in operations)


def problems(
    name: str, arch: int, operations: list[str], shared: int, max_spills: int
) -> Iterator[str]:
    """What is wrong with a kernel."""
    if number_of(SPILL, operations) > max_spills:
        yield f"more than {max_spills} spills"
    if shared > SHARED_MEMORY[arch]:
        yield f"{shared} bytes of shared memory, the chip has {SHARED_MEMORY[arch]}"
    if re.match("linear_logp b?float16", name):
        if not number_of(TENSOR_CORES[arch], operations):
            yield f"no {TENSOR_CORES[arch]}"
        if arch >= 90 and not number_of(DESCRIPTOR_LOAD, operations):
            yield f"no {DESCRIPTOR_LOAD}"
    if re.match("tree_attention b?float16", name):
        if not number_of(TENSOR_CORES[arch], operations):
            yield f"no {TENSOR_CORES[arch]}"
        if narrow := {o for o in operations if re.fullmatch(r"LDGSTS.*(?<!\.128)", o)}:
            yield f"pages are not read 16 bytes at a time but by {narrow}"
    if "logits_grad" in name and "capped" not in name:  # the other loads the bias later
        order = "".join(o[0] for o in operations if o.startswith(("LDG", "BAR", "STG")))
        if not re.fullmatch("L+B+S+", order):
            yield f"loads, barriers and stores come as {order}"


def main(arguments: list[str] | None = None) -> int:
    """Compiles, prints one line per kernel, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=[80, 90, 100])
    parser.add_argument("--max-spills", type=int, default=0)
    parser.add_argument("--triton", default=triton.__version__, help="the version that is meant")
    options = parser.parse_args(arguments)
    assert triton.__version__ == options.triton, f"this is Triton {triton.__version__}"
    # Everything is on the CPU here, which the launcher would refuse.
    linear_logp_tiled.takes = lambda hidden, weight: None
    cases = [
        *row_stats_cases(), *logits_grad_cases(), *pair_grad_cases(), *linear_logp_cases(),
        *tree_attention_cases(), *page_cases(), *sample_cases(),
    ]  # fmt: skip
    print(f"triton {triton.__version__}, {len(cases)} kernels")
    failures = 0
    for arch in options.arch:
        for name, launch in cases:
            name = name.replace("torch.", "")
            (kernel,) = compiled_by(launch, arch)
            registers, operations = operations_of(kernel)
            shared = kernel.metadata.shared
            found = list(problems(name, arch, operations, shared, options.max_spills))
            failures += bool(found)
            print(
                f"sm_{arch:<4}{name:42} {registers:3} registers {number_of(SPILL, operations):3} "
                f"spills {shared:6} bytes {len(operations):5} instructions "
                f"{'; '.join(found) or 'ok'}",
                flush=True,
            )
    print(f"{failures} of {len(cases) * len(options.arch)} have problems")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
