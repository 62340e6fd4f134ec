"""axolotl: `plugins: [srlm_fast.integrations.axolotl.SrlmFastPlugin]` in its YAML file."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from srlm_fast.errors import UserError
from srlm_fast.integrations.liger import replace_liger_loss


class SrlmFastPlugin(BasePlugin):  # type: ignore[misc]
    """Our head in the preference trainer that axolotl has made; everything else stays axolotl's.

    With `dpo_use_liger_kernel: true` (axolotl on TRL up to 1.12) it takes the place of Liger's
    loss, and on TRL 1.16 it is `srlm_fast.integrations.trl.accelerate`.
    """

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Raises UserError for a trainer that neither of the two is for."""
        if replace_liger_loss(trainer):
            return
        try:
            from srlm_fast.integrations.trl import accelerate

            accelerate(trainer)
        except UserError as error:
            raise UserError(
                "srlm_fast's plugin has nothing to speed up here: set rl: dpo and "
                f"dpo_use_liger_kernel: true, or remove it from plugins ({error})"
            ) from error
