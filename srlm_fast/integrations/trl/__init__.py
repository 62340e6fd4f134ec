"""TRL: `accelerate(trainer)` after construction, or `SrlmDPOTrainer` in `DPOTrainer`'s place."""

from srlm_fast.integrations.trl.version import check_trl

check_trl()  # before the others import what another TRL may not have

from srlm_fast.integrations.trl.accelerate import accelerate as accelerate  # noqa: E402
from srlm_fast.integrations.trl.accelerate import patch_logprobs as patch_logprobs  # noqa: E402
from srlm_fast.integrations.trl.dpo import SrlmDPOConfig as SrlmDPOConfig  # noqa: E402
from srlm_fast.integrations.trl.dpo import SrlmDPOTrainer as SrlmDPOTrainer  # noqa: E402
from srlm_fast.integrations.trl.rewards import judge_reward as judge_reward  # noqa: E402
