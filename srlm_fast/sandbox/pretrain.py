"""Makes the base model M0, or finds it in the cache.

The cached folder's name is a hash of all that determines the weights. The time cap does not, unless
it is hit: the model then depends on the machine's speed, and its name says so.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from srlm_fast.config import SandboxConfig
from srlm_fast.data.jsonl import write_json
from srlm_fast.errors import UserError
from srlm_fast.model.weights import save_model
from srlm_fast.sandbox.documents import JUDGE_PROMPT, TASK_LIST
from srlm_fast.sandbox.tokenizer import make_tokenizer
from srlm_fast.sandbox.training import Pretraining, pretrain
from srlm_fast.sandbox.world import get_world

RECORD = "pretraining.json"
SOURCES = ("world", "oracle", "responses", "documents", "tokenizer", "model", "training")

log = logging.getLogger(__name__)


def make_base_model(config: SandboxConfig, *, seed: int, num_threads: int = 0) -> Path:
    """The folder of M0: an ordinary HF model with tokenizer, chat template, generation config.

    Trains it on the CPU (minutes) unless the cache holds it. `num_threads` 0 keeps torch's
    setting; the number of threads changes the last bits of sums, but not the cache's key.
    Raises UserError on an unknown world, and when the disk is full.
    """
    get_world(config.world)
    folder = _cache_dir(config) / f"m0-{cache_key(config, seed)}"
    capped = folder.with_name(f"{folder.name}-within-{config.max_seconds:g}s")
    for found in (folder, capped):
        if found.is_dir():
            return found
    try:  # before minutes of training, not after them
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent}: {error.strerror}; set --sandbox.cache_dir"
        ) from error
    tokenizer = make_tokenizer()
    with _threads(num_threads):
        model, record = pretrain(config, tokenizer, seed=seed)
    _report(record, config)
    return _save(model, tokenizer, record, capped if record.capped else folder)


def cache_key(config: SandboxConfig, seed: int) -> str:
    """A hash of what determines M0: settings, seed, the prompts it learns, code, versions."""
    sources = [resources.files("srlm_fast.sandbox") / f"{name}.py" for name in SOURCES]
    parts = {
        "settings": [config.world, config.pretrain_steps, config.min_exact, seed],
        "prompts": [JUDGE_PROMPT.text, dataclasses.asdict(TASK_LIST)],
        # Parsed and written again, so that comments and formatting do not count.
        "sources": [ast.unparse(ast.parse(path.read_text("utf-8"))) for path in sources],
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _cache_dir(config: SandboxConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlm_fast"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _report(record: Pretraining, config: SandboxConfig) -> None:
    if record.capped:
        log.warning(
            "the base model's pre-training was cut to %d steps by sandbox.max_seconds = %g, so it"
            " depends on this machine's speed",
            record.steps,
            config.max_seconds,
        )
    if record.exact["all"] < config.min_exact:
        log.warning(
            "the base model copies %.2f of the test prompts exactly, below sandbox.min_exact = %g;"
            " expect weaker rounds",
            record.exact["all"],
            config.min_exact,
        )


def _save(model: Any, tokenizer: Any, record: Pretraining, folder: Path) -> Path:
    """Writes the folder under a temporary name and renames it: it is complete or absent."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as work:
        fresh = Path(work) / folder.name
        save_model(model, tokenizer, fresh)
        write_json(fresh / RECORD, dataclasses.asdict(record))
        try:
            fresh.rename(folder)
        except OSError:
            # Another process finished the same model first, and somebody may be reading it.
            if not folder.is_dir():
                raise
    return folder
