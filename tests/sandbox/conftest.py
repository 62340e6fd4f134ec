from pathlib import Path

import pytest

from srlm_fast.config import SandboxConfig
from srlm_fast.sandbox import training


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SandboxConfig:
    """Three steps of pre-training on small batches, no gate, a cache of its own."""
    monkeypatch.setattr(training, "ROWS", 2)
    monkeypatch.setattr(training, "ROW_LENGTH", 32)
    monkeypatch.setattr(training, "GATE_PROMPTS", 4)
    cache = str(tmp_path / "cache")
    return SandboxConfig(pretrain_steps=3, min_exact=0.0, max_seconds=600.0, cache_dir=cache)
