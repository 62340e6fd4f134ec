"""What the report runs: the methods, their ablations and controls; recipes with overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Pre-training is never cut short, so that M0 does not depend on the machine's speed. The evaluation
# is that of scale `full`: differences are small.
SETTINGS = {
    "sandbox.scale": "small",
    "sandbox.max_seconds": "6000",
    "evaluate.num_prompts": "200",
    "evaluate.num_judge_groups": "60",
}
NO_REFINEMENT = {"spa.self_refinement": "false"}  # DPO on the labels as they are
# As the sandbox's recipe for srlm has it; the paper's baselines with another judge do not refine.
IN_WORDS = NO_REFINEMENT | {
    "judge.kind": "prompted",
    "judge.prompt": "sandbox",
    "judge.max_new_tokens": "60",
}


@dataclass(frozen=True)
class Variant:
    """One way to run a method on the sandbox; `key` names it in the rows."""

    key: str
    overrides: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Whose recipe it changes."""
        return self.key.partition("/")[0]

    def settings(self, extra: Mapping[str, str]) -> dict[str, str]:
        """All that is set beyond the recipe; `extra` comes from the command line, and wins."""
        return {**SETTINGS, **self.overrides, **extra}


# The most wanted first, so that a study that is stopped has whole tables of what it has.
VARIANTS = (
    Variant("srlm"),
    Variant("spa"),
    Variant("spa/expansion", NO_REFINEMENT),
    Variant("spa/refinement", {"spa.decoupled": "false"}),
    Variant("spa/previous", {"judge.reference": "previous"}),
    Variant("spa/none", {"judge.reference": "none"}),
    Variant("spa/words", IN_WORDS),
    # The recipe's 48 pairs stand for the paper's 2,000 of 60,000, 3.3 %.
    Variant("spa/0.8%", {"spa.num_seed_pairs": "12"}),
    Variant("spa/1.7%", {"spa.num_seed_pairs": "24"}),
    Variant("spa/10%", {"spa.num_seed_pairs": "144"}),
    # pi_0 is the SFT model, judged against its own base, as the paper's figure 4 has it.
    Variant("spa/no-seed", {"spa.no_seed": "true", "judge.reference": "base"}),
    Variant("srlm/no-eft", {"eft.enabled": "false"}),
    Variant("srlm/positives", {"srlm.training": "positives"}),
    Variant("srlm/random", {"judge.kind": "random"}),
    Variant("srlm/longest", {"judge.kind": "longest"}),
    Variant("spa/random", {"judge.kind": "random"}),
    Variant("spa/longest", {"judge.kind": "longest"}),
)
