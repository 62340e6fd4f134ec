"""Fast ops for preference training on torch alone: no models, no data, no loops.

Ops: `linear_logp`, `linear_preference_loss`. `losses`: what `linear_preference_loss` accepts as
`loss_fn`. `explain`: which implementation of an op runs here.
"""

from srlm_kernels import losses
from srlm_kernels.dispatch import explain
from srlm_kernels.linear_logp import LinearLogp, linear_logp
from srlm_kernels.linear_preference_loss import PreferenceLoss, linear_preference_loss
from srlm_kernels.losses import PairLogps

__all__ = [
    "LinearLogp",
    "PairLogps",
    "PreferenceLoss",
    "explain",
    "linear_logp",
    "linear_preference_loss",
    "losses",
]
