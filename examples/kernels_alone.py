"""DPO on hidden states of your own: the loss and its gradients, without logits.

python examples/kernels_alone.py
"""

import torch

from srlm_kernels import explain, linear_preference_loss, losses

T, D, V = 64, 128, 5000  # tokens of the packed batch, width, vocabulary
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(T, D, generator=generator, requires_grad=True)
head = (torch.randn(V, D, generator=generator) / D**0.5).requires_grad_()
ref_hidden = torch.randn(T, D, generator=generator)
ref_head = torch.randn(V, D, generator=generator) / D**0.5

# Two pairs: sequences 0 and 1 are chosen and rejected of the first, 2 and 3 of the second.
cu_seqlens = torch.tensor([0, 16, 26, 46, 60], dtype=torch.int32)
rows = torch.arange(60)  # the positions that predict the response tokens
target = torch.randint(V, (60,), generator=generator)

out = linear_preference_loss(
    hidden, head, target, cu_seqlens, losses.dpo(beta=0.1), rows=rows, ref_hidden=ref_hidden,
    ref_weight=ref_head,
)  # fmt: skip
out.loss.backward()
print(explain("linear_preference_loss", hidden=hidden, weight=head))
print(f"loss {out.loss.item():.4f}, margins {out.margins.tolist()}")
print(f"gradients: hidden {hidden.grad.norm():.4f}, head {head.grad.norm():.4f}")

# SPA in the same pass: pairs whose extrapolated margin is below a threshold count as noise.
out = linear_preference_loss(
    hidden, head, target, cu_seqlens, losses.spa(beta=0.1, alpha=0.1, threshold=0.0), rows=rows,
    ref_hidden=ref_hidden, ref_weight=ref_head, extrapolation=0.5,
)  # fmt: skip
print(f"SPA {out.loss.item():.4f}, extrapolated margins {out.ext_margins.tolist()}")
