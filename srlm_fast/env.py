"""What is installed, what this machine can do, and which implementation each op takes here.

`python -m srlm_fast.env` prints it. Nothing optional is imported before it is asked about.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

import srlm_fast
import srlm_kernels
from srlm_fast.errors import UserError
from srlm_kernels import native
from srlm_kernels.backends import row_backend

REQUIRED = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
OPS = ("linear_logp", "linear_preference_loss", "prefix_attention")
SAMPLER_OPS = "tree_attention, kv_write, sample"
# extra of pyproject.toml: (distribution, the module whose import shows that it works)
OPTIONAL = {
    "liger": ("liger-kernel", "liger_kernel.transformers"),
    "peft": ("peft", "peft"),
    "torchao": ("torchao", "torchao.optim"),
    "trl": ("trl", "trl"),
    "ray": ("ray", "ray"),
    "track": ("trackio", "trackio"),
    "datasets": ("datasets", "datasets"),
}


def versions() -> dict[str, str]:
    """What a result depends on besides its configuration: the machine type and the versions."""
    found = {"machine": platform.machine(), "python": platform.python_version()}
    found["srlm_fast"] = srlm_fast.__version__
    return found | {name: _version(name) or "not installed" for name in REQUIRED}


def collect() -> dict[str, Any]:
    """Everything `python -m srlm_fast.env` prints, as one JSON object.

    Keys: `versions`, `device` (one line per fact), `optional` (extra -> version, or why it is not
    usable; each installed one is imported), `extensions` (the C++ ops: their file, or why they are
    not in use) and `ops` (op -> implementation that `auto` takes).
    """
    return {
        "versions": versions(),
        "device": _device(),
        "optional": {extra: probe(extra, *names) for extra, names in OPTIONAL.items()},
        "extensions": {"C++ kernels": native.why()},
        "ops": _ops(),
    }


def probe(extra: str, distribution: str, module: str) -> str:
    """The version of an optional package, or why it cannot be used here."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"not installed: pip install 'srlm_fast[{extra}]'"
    version = _version(distribution) or "unknown version"
    try:
        importlib.import_module(module)
    # A binary built for another torch fails as RuntimeError or OSError as often as ImportError.
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        return f"{version}, but does not load: {type(error).__name__}: {reason}"
    return version


def require(extra: str) -> None:
    """Raises UserError, with the reason, where the optional package of `extra` cannot be used."""
    distribution, module = OPTIONAL[extra]
    found = probe(extra, distribution, module)
    if found != (_version(distribution) or "unknown version"):
        raise UserError(f"{distribution} is needed, and cannot be used here: {found}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, str]:
    cpu = torch.cpu.get_capabilities()
    fast = [name for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16") if cpu.get(name)]
    facts = {
        "cpu": f"{cpu.get('cpu_name') or platform.machine()}, {torch.get_num_threads()} threads",
        "cpu bf16": ", ".join(fast) or "no instructions for it: slower than float32",
    }
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no device or no driver" if built else "this torch is a CPU build"
        return facts | {"gpu": f"none: {why}"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        facts[f"gpu {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}"
    return facts


def _ops() -> dict[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, query = torch.zeros(4, 8, device=device), torch.zeros(4, 1, 64, device=device)
    found = {}
    for op in OPS:
        given = {"query": query} if op == "prefix_attention" else {"hidden": hidden}
        found[op] = srlm_kernels.explain(op, **given).removeprefix(f"{op}: ")
    return found | {SAMPLER_OPS: sampler_backend()}


def sampler_backend() -> str:
    """What the ops of the sampler run in here: triton, cpp or torch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return row_backend("auto", torch.empty(0, device=device))


def main() -> None:
    """Print `collect()` as short tables."""
    for title, rows in collect().items():
        print(title)
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    main()
