"""The configuration of a run: frozen dataclasses that refuse values which could only fail later.

Field names are TRL's and transformers' wherever the meaning is theirs. `srlm_fast.recipes` makes a
`Config` from a recipe and the command line. Each file here holds some of its groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from srlm_fast.config.data import DataConfig, SandboxConfig
from srlm_fast.config.judge import EFTConfig, EvaluateConfig, JudgeConfig, PairsConfig
from srlm_fast.config.methods import check_methods
from srlm_fast.config.options import check_options
from srlm_fast.config.pairwise import PairwiseConfig, check_pairwise
from srlm_fast.config.rules import require
from srlm_fast.config.sample import PromptsConfig, SamplingConfig
from srlm_fast.config.spa import SPAConfig
from srlm_fast.config.srlm import SRLMConfig, check_srlm
from srlm_fast.config.train import LoraConfig, PreferenceConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "EFTConfig",
    "EvaluateConfig",
    "JudgeConfig",
    "LoraConfig",
    "PairsConfig",
    "PairwiseConfig",
    "PreferenceConfig",
    "PromptsConfig",
    "SPAConfig",
    "SRLMConfig",
    "SamplingConfig",
    "SandboxConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class Config:
    """Everything that determines a run's result."""

    method: Literal["srlm", "spa"] = "srlm"
    model: str = ""  # HF folder or hub id, or "sandbox": the embedded world and its own model
    template: str = "auto"  # chat template: the tokenizer's own, or a name in data/chat_templates
    seed: int = 0
    rounds: int = 2
    online: bool = False  # sample, judge and train on the prompts of each optimiser step at once
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    use_liger_kernel: bool = False  # norms and MLPs in Liger's kernels, on a GPU
    num_threads: int = 0  # CPU threads; 0: torch's default
    report_to: tuple[str, ...] = ()  # tensorboard, trackio, wandb, beside metrics.jsonl
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    pairwise: PairwiseConfig = field(default_factory=PairwiseConfig)
    eft: EFTConfig = field(default_factory=EFTConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    srlm: SRLMConfig = field(default_factory=SRLMConfig)
    spa: SPAConfig = field(default_factory=SPAConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        check_methods(self)
        require(self.num_threads >= 0, "num_threads must not be negative (0: torch's default)")
        require(
            not self.lora.r or "shard" not in (self.sft.parallel, self.preference.parallel),
            "lora trains with parallel: replicate only, in sft and preference",
        )
        check_srlm(self)
        check_options(self)
        check_pairwise(self)

    @property
    def refines_labels(self) -> bool:
        """Whether the rounds train on labels that SPA refines (its equation 10)."""
        return self.spa.self_refinement if self.method == "spa" else self.spa.refine_srlm

    @property
    def teaches_judging(self) -> bool:
        """Whether a model writes judgements that the next one is taught (EFT)."""
        return self.method == "srlm" and self.eft.enabled and self.eft.target == "judge"

    def input_files(self) -> list[Path]:
        """The files of the user that the run reads; names of recipes and HF datasets are none."""
        return [Path(path) for path in self._paths().values() if Path(path).is_file()]

    def with_absolute_paths(self) -> Config:
        """This configuration with what exists here named absolutely: a run may be resumed from
        anywhere."""
        paths = {name: _absolute(path) for name, path in self._paths().items()}
        data: dict[str, Any] = {name: paths[name] for name in ("trees", "preferences", "prompts")}
        return replace(
            self,
            model=self.model if self.model == "sandbox" else _absolute(self.model),
            data=replace(self.data, **data),
            judge=replace(
                self.judge,
                prompt=paths["judge"],
                reference=_absolute(self.judge.reference_model) or self.judge.reference,
            ),
            pairwise=replace(self.pairwise, prompt=paths["pairwise"]),
            prompts=replace(
                self.prompts, template=paths["template"], model=_absolute(self.prompts.model)
            ),
            sandbox=replace(self.sandbox, cache_dir=_absolute(self.sandbox.cache_dir)),
        )

    def _paths(self) -> dict[str, str]:
        return {
            "trees": self.data.trees,
            "preferences": self.data.preferences,
            "prompts": self.data.prompts,
            "judge": self.judge.prompt,
            "pairwise": self.pairwise.prompt,
            "template": self.prompts.template,
        }


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).exists() else name
