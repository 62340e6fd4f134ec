"""Peak memory of calls on the CPU, in bytes over what was there before each.

python peak_memory.py '[{"op": ..., "rows": ..., "width": ..., "columns": ..., "dtype": ...}, ...]'

prints a list of numbers. Run it in a process of its own: what else is done there counts.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from srlm_kernels import linear_logp, linear_preference_loss, losses


def prepare(
    rows, op, width, columns, dtype, *, train=True, frozen=False, reference=False, folded=False
):
    """A call of the op and the backward of its result; returns all that the caller gets."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(getattr(torch, dtype))

    hidden, weight = normal(rows, width), normal(columns, width)
    target = torch.randint(columns, (rows,), generator=generator)
    ends = torch.linspace(0, rows, 5).long()
    options = {"impl": "chunked"}
    if reference:
        options |= {"ref_hidden": normal(rows, width), "ref_weight": normal(columns, width)}
        options["extrapolation"] = 0.5
    if folded:
        options["grad_weight_out"] = torch.zeros(columns, width)

    def call():
        leaves = hidden.detach(), weight.detach()
        for leaf, trained in zip(leaves, (True, not frozen), strict=True):
            leaf.requires_grad_(train and trained)
        if op == "linear_logp":
            out = linear_logp(*leaves, target, **options)
            loss = out.logp.sum()
        else:
            out = linear_preference_loss(*leaves, target, ends, losses.dpo(0.1), **options)
            loss = out.loss
        if loss.requires_grad:
            loss.backward()
        return out, [leaf.grad for leaf in leaves]

    return call


def size(field):
    """Of /proc/self/status, where it stands in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(rows, **case):
    prepare(min(rows, 64), **case)()  # what libraries set up once is not the call's
    call = prepare(rows, **case)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is there
    before = size("VmRSS")
    kept = call()
    highest = size("VmHWM")
    del kept
    return highest - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    print([peak(**case) for case in json.loads(sys.argv[1])])
