"""`linear_preference_loss` for a loss that no schema can carry: it breaks a compiled graph here.

Importing this file imports the compiler, so only calls that are being compiled do.
"""

import torch

from srlm_kernels.linear_preference_loss_chunked import eager

outside_of_graphs = torch.compiler.disable(  # type: ignore[no-untyped-call]
    eager, reason="only a loss_fn of srlm_kernels.losses can be part of a compiled graph"
)
