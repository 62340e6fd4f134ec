"""srlm_fast: self-improving preference training of HuggingFace causal LMs, in one process.

Importing it loads nothing else, torch included; a public name brings its module when it is first
asked for. How stable each is says docs/api.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A bare clone runs too: `kernels/` is a second source root that only an install would map.
if importlib.util.find_spec("srlm_kernels") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from srlm_fast.config import Config as Config
    from srlm_fast.config import JudgeConfig as JudgeConfig
    from srlm_fast.config import PreferenceConfig as PreferenceConfig
    from srlm_fast.config import TrainConfig as TrainConfig
    from srlm_fast.data.jsonl import read_rows as read_rows
    from srlm_fast.data.readers import read_preferences as read_preferences
    from srlm_fast.data.records import Judgement as Judgement
    from srlm_fast.data.records import Message as Message
    from srlm_fast.data.records import Pair as Pair
    from srlm_fast.data.records import Sample as Sample
    from srlm_fast.data.records import user as user
    from srlm_fast.data.template import ChatTemplate as ChatTemplate
    from srlm_fast.errors import UserError as UserError
    from srlm_fast.judge.base import Judge as Judge
    from srlm_fast.judge.base import text_samples as text_samples
    from srlm_fast.judge.expected import ExpectedJudge as ExpectedJudge
    from srlm_fast.judge.implicit import ImplicitJudge as ImplicitJudge
    from srlm_fast.judge.prompted import PromptedJudge as PromptedJudge
    from srlm_fast.model.load import context_length as context_length
    from srlm_fast.recipes import load_config as load_config
    from srlm_fast.sampler import Completion as Completion
    from srlm_fast.sampler import Output as Output
    from srlm_fast.sampler import Sampler as Sampler
    from srlm_fast.sampler import SamplingParams as SamplingParams
    from srlm_fast.train.noise import Refinement as Refinement
    from srlm_fast.train.preference import train_preference as train_preference
    from srlm_fast.train.sft import train_sft as train_sft

# The same once more, for the interpreter: a test compares the two.
_HOMES = {
    "config": ("Config", "JudgeConfig", "PreferenceConfig", "TrainConfig"),
    "data.jsonl": ("read_rows",),
    "data.readers": ("read_preferences",),
    "data.records": ("Judgement", "Message", "Pair", "Sample", "user"),
    "data.template": ("ChatTemplate",),
    "errors": ("UserError",),
    "judge.base": ("Judge", "text_samples"),
    "judge.expected": ("ExpectedJudge",),
    "judge.implicit": ("ImplicitJudge",),
    "judge.prompted": ("PromptedJudge",),
    "model.load": ("context_length",),
    "recipes": ("load_config",),
    "sampler": ("Completion", "Output", "Sampler", "SamplingParams"),
    "train.noise": ("Refinement",),
    "train.preference": ("train_preference",),
    "train.sft": ("train_sft",),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
