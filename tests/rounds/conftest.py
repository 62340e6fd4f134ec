"""Whole runs that take seconds: M0 hardly trained, few prompts, short responses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from srlm_fast.loop import main

TINY = {
    "--device": "cpu",  # where the same bytes are promised
    "--sandbox.pretrain_steps": "40",
    "--sandbox.num_ift": "24",
    "--sandbox.num_eft": "12",
    "--sandbox.min_exact": "0",
    "--sampling.keep_truncated": "true",
    "--sampling.max_new_tokens": "6",
    "--prompts.source": "dataset",
    "--prompts.num_prompts": "8",
    "--evaluate.num_prompts": "4",
    "--evaluate.num_judge_groups": "3",
    "--judge.max_new_tokens": "6",
    "--preference.per_device_train_batch_size": "4",
    "--preference.logging_steps": "1",
}
# A model that has learned nothing cannot judge in words, so the SRLM loop here runs on a control.
METHODS = {
    "spa": {"--recipe": "sandbox-spa", "--spa.num_seed_pairs": "6"},
    "srlm": {"--recipe": "sandbox-srlm", "--judge.kind": "random", "--eft.target": "rank"},
}

RunLoop = Callable[..., int]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run_loop(cache: Path) -> RunLoop:
    """Runs the command line in this process; keyword `method`, then flags that replace the tiny
    ones (None drops one)."""

    def run(method: str, out: Path, *flags: str, **changes: str | None) -> int:
        settings: dict[str, str | None] = {
            **TINY, **METHODS[method], "--sandbox.cache_dir": str(cache), "--out": str(out),
            **{"--" + key.replace("__", "."): value for key, value in changes.items()},
        }  # fmt: skip
        pairs = [item for item in settings.items() if item[1] is not None]
        return main([word for key, value in pairs for word in (key, str(value))] + list(flags))

    return run
