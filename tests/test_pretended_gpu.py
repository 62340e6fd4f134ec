"""What the pretended GPU sees, and whole runs on it: no tensor is on the wrong device."""

from pathlib import Path

import pytest
import torch

from srlm_fast.loop import main
from tests.pretended_gpu import Device, Waits, gpu

__all__ = ["gpu"]

TINY = {
    "--device": "cuda",
    "--sandbox.scale": "smoke",
    "--sandbox.pretrain_steps": "40",
    "--sandbox.min_exact": "0",
    "--prompts.source": "dataset",
    "--prompts.num_prompts": "8",
    "--sampling.keep_truncated": "true",
    "--sampling.max_new_tokens": "6",
    "--evaluate.num_prompts": "4",
    "--evaluate.num_judge_groups": "3",
}
METHODS = {
    "srlm": {"--recipe": "sandbox-srlm", "--judge.kind": "random", "--eft.target": "rank"},
    "spa": {"--recipe": "sandbox-spa", "--spa.num_seed_pairs": "6"},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run(method: str, gpu: Device, tmp_path: Path) -> None:
    folders = {"--sandbox.cache_dir": str(tmp_path / "cache"), "--out": str(tmp_path / "run")}
    settings = {**TINY, **METHODS[method], **folders}
    assert main([word for item in settings.items() for word in item]) == 0
    assert sum(graph.replays for graph in gpu.graphs) > 0


def test_waiting_is_seen(gpu: Device) -> None:
    x = torch.arange(3.0).to("cuda")
    waiting = [
        x.tolist, x.cpu, x.nonzero, lambda: float(x[0]), lambda: bool(x.any()), lambda: x[x > 1],
        lambda: x[torch.tensor([1])], lambda: torch.ones(3).to("cuda"),
        lambda: torch.tensor([1], device="cuda"), lambda: x.new_tensor([1]),
        lambda: x.repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda")),
    ]  # fmt: skip
    with gpu.nothing_waits():
        assert (x + torch.ones(3, device="cuda")).device.type == "cuda"
        x.to("cpu", non_blocking=True)
        torch.ones(3).to("cuda", non_blocking=True)
        for wait in waiting:
            with pytest.raises(Waits):
                wait()
    with pytest.raises(RuntimeError, match="all tensors on one device"):
        x + torch.ones(3)
