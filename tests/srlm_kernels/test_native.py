"""The C++ library: how it is found, what its ops promise to torch, and life without it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from srlm_kernels import native
from srlm_kernels.row_stats import new_state

needs_library = pytest.mark.skipif(not native.available(), reason=native.why())
PACKAGE = Path(native.__file__).parent
MISSING = "not built: install with SRLM_BUILD_EXT=1 to build it, or to see why it fails"


def row_stats_arguments(dtype: torch.dtype) -> list[object]:
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 5, 33, generator=g).to(dtype)
    bias, target = torch.randn(33, generator=g), torch.arange(5)
    state = new_state(5, outputs=["entropy"], dtype=torch.float32, device=logits.device)
    state[6:8] = 0  # not NaN, which equals nothing
    return [state, logits, target, ref_logits, bias, bias, 0, 0.5, 20.0, 1.5, 0.7]


def logits_grad_arguments(dtype: torch.dtype) -> list[object]:
    _, logits, target, _, bias, *_ = row_stats_arguments(dtype)
    assert isinstance(logits, torch.Tensor)
    lse = logits.float().logsumexp(1)
    return [logits.clone(), target, lse, torch.ones(5), bias, 0, 20.0, 1.5, 0.7, False]


ARGUMENTS = {"row_stats": row_stats_arguments, "logits_grad": logits_grad_arguments}


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    overload = getattr(torch.ops.srlm_kernels_c, op).default
    torch.library.opcheck(overload, tuple(ARGUMENTS[op](dtype)))
    options = {"row_stats": (3, 4, 5, 7, 8), "logits_grad": (4, 6)}[op]
    arguments = [None if i in options else x for i, x in enumerate(ARGUMENTS[op](dtype))]
    torch.library.opcheck(overload, tuple(arguments))


@needs_library
@pytest.mark.parametrize("op", ARGUMENTS)
def test_fake_tensors_pass(op: str) -> None:
    with FakeTensorMode() as mode:
        arguments = [
            mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for x in ARGUMENTS[op](torch.float32)
        ]
        assert getattr(torch.ops.srlm_kernels_c, op)(*arguments) is None


@needs_library
def test_why_names_the_file() -> None:
    path = Path(native.why().removeprefix("built: "))
    assert path.parent == PACKAGE and path.is_file()


@needs_library
def test_the_library_is_a_python_module_too() -> None:
    import srlm_kernels._C as module

    assert Path(module.__file__) == Path(native.why().removeprefix("built: "))


@needs_library
@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [
        (0, torch.zeros(9, 5), r"state must be \[8, N\] or \[11, N\]"),
        (0, torch.zeros(8, 4), "state must be"),
        (1, torch.zeros(5, 33, dtype=torch.float64), "fp32 or bf16"),
        (1, torch.zeros(33, 5).T, "unit column stride"),
        (2, torch.zeros(5, dtype=torch.int32), "target must be"),
        (3, torch.zeros(5, 32), "ref_logits must be"),
        (3, torch.zeros(5, 33, dtype=torch.bfloat16), "share a dtype"),
        (3, None, "extrapolation needs ref_logits"),
        (4, torch.zeros(32), "bias must be"),
    ],
)
def test_row_stats_reads_no_memory_that_is_not_there(
    position: int, replacement: torch.Tensor | None, message: str
) -> None:
    arguments = row_stats_arguments(torch.float32)
    arguments[position] = replacement
    with pytest.raises(RuntimeError, match=message):
        torch.ops.srlm_kernels_c.row_stats(*arguments)


@needs_library
@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [
        (0, torch.zeros(5, 33, dtype=torch.float16), "fp32 or bf16"),
        (0, torch.zeros(33, 5).T, "unit column stride"),
        (1, torch.zeros(4, dtype=torch.int64), "target must be"),
        (2, torch.zeros(5, dtype=torch.float64), "lse must be"),
        (3, torch.zeros(1), "upstream must be"),
        (4, torch.zeros(66)[::2], "contiguous"),
    ],
)
def test_logits_grad_writes_no_memory_that_is_not_there(
    position: int, replacement: torch.Tensor, message: str
) -> None:
    arguments = logits_grad_arguments(torch.float32)
    arguments[position] = replacement
    with pytest.raises(RuntimeError, match=message):
        torch.ops.srlm_kernels_c.logits_grad(*arguments)


@needs_library
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)]
)
def test_logits_grad_refuses_other_dtypes(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    logits, target, lse, upstream, *_ = logits_grad_arguments(dtype)
    with pytest.raises(TypeError, match=r"write .* not "):
        native.logits_grad_cpp(logits, target, lse, upstream, grad_dtype=grad_dtype)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, MISSING), (b"no library", "_C.abi3.so does not load: OSError: ")]
)
def test_without_a_library_there_is_a_reason_and_no_exception(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    package = tmp_path / "srlm_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    if content is not None:
        (package / "_C.abi3.so").write_bytes(content)
    code = """
import torch
from srlm_kernels import native
print(native.available())
print(native.why())
try:
    native.row_stats_cpp(torch.zeros(8, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
except RuntimeError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    available, why, error = done.stdout.splitlines()
    assert available == "False"
    assert why.startswith(reason)
    assert error == f"the C++ kernels cannot be used: {why}"
