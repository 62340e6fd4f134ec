"""What is installed, and which ops run here: for whoever needs an optional package.

Nothing optional is imported before it is asked about.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform

import torch

import srlm_fast
from srlm_fast.errors import UserError
from srlm_kernels.backends import row_backend

REQUIRED = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
OPS = ("linear_logp", "linear_preference_loss", "prefix_attention", "layers")
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


def sampler_backend() -> str:
    """What the ops of the sampler run in here: triton, cpp or torch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return row_backend("auto", torch.empty(0, device=device))
