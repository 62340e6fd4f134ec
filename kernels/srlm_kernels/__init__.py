"""Fast ops for preference training on torch alone: no models, no data, no loops.

Ops with an LM head: `linear_logp`, `linear_preference_loss`; `losses` are what the latter takes as
`loss_fn`. For training: `prefix_attention`. For sampling: `tree_attention`, `merge_states`,
`kv_write`, `sample`, `invariant_linear`. For both, on a CPU: `layers`. `explain`: which
implementation of an op runs here.
"""

from srlm_kernels import layers, losses
from srlm_kernels.explanation import explain
from srlm_kernels.invariant_linear import invariant_linear
from srlm_kernels.kv_write import kv_write
from srlm_kernels.linear_logp import LinearLogp, linear_logp
from srlm_kernels.linear_preference_loss import PreferenceLoss, linear_preference_loss
from srlm_kernels.losses import PairLogps
from srlm_kernels.merge_states import merge_states
from srlm_kernels.prefix_attention import PrefixPlan, prefix_attention
from srlm_kernels.sample import Draw, SampleParams, sample
from srlm_kernels.tree_attention import TreePlan, tree_attention

__all__ = [
    "Draw",
    "LinearLogp",
    "PairLogps",
    "PreferenceLoss",
    "PrefixPlan",
    "SampleParams",
    "TreePlan",
    "explain",
    "invariant_linear",
    "kv_write",
    "layers",
    "linear_logp",
    "linear_preference_loss",
    "losses",
    "merge_states",
    "prefix_attention",
    "sample",
    "tree_attention",
]
