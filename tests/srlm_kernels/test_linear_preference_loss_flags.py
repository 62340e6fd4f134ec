"""Every combination of options against the same loss written out in float64 for autograd."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from srlm_kernels import PairLogps, linear_preference_loss, losses

pytestmark = pytest.mark.usefixtures("implementation")

CU = torch.tensor([0, 2, 5, 5, 9, 10, 16])  # the third sequence is empty
ROWS = torch.tensor([0, 1, 0, 2, 3, 3, 4, 5, 6, 7, 1, 1, 8, 9, 10, 11])
IGNORED = [3, 9, 12]  # 9 is all of the fifth sequence
STRENGTH = 0.5
LOSSES = {
    "spa": losses.spa(0.5, 0.3, 0.1),
    "rpo": losses.with_nll(losses.dpo(0.5), 0.7),
    "sppo": losses.sppo_hard(0.5),
    "aot": losses.aot(0.5),
}


@pytest.fixture
def p(problem):
    p = problem((16, 6, 37), torch.float64)
    p.target[IGNORED] = -100
    return p


def sequence_sums(p, hidden, weight, bias, transform):
    """Logits [16, 37], and of them the sums per sequence of the targets' log-probabilities."""
    z = F.linear(hidden[ROWS], weight, bias) * transform["logit_scale"]
    if transform["softcap"] is not None:
        z = torch.tanh(z / transform["softcap"]) * transform["softcap"]
    return z, per_sequence(p, z)


def per_sequence(p, z):
    logp = z.log_softmax(1).gather(1, p.target.clamp(min=0)[:, None])[:, 0]
    counted = logp * (p.target != -100)
    return torch.stack([counted[i:j].sum() for i, j in itertools.pairwise(CU.tolist())])


def expected(p, leaves, reference, loss_fn, transform):
    hidden, weight, bias = leaves
    z, policy = sequence_sums(p, hidden, weight, bias, transform)
    ref = ext = policy.detach()
    if reference:
        head = reference.get("ref_weight", weight)
        ref_bias = reference.get("ref_bias", None if "ref_weight" in reference else bias)
        z_ref, ref = sequence_sums(p, reference["ref_hidden"], head, ref_bias, transform)
        ext = per_sequence(p, (1 + STRENGTH) * z - STRENGTH * z_ref)
    else:
        ref = torch.zeros_like(policy)
    counts = (p.target != -100).double()
    lengths = torch.stack([counts[i:j].sum() for i, j in itertools.pairwise(CU.tolist())])
    streams = (policy, ref.detach(), ext.detach(), lengths)
    return loss_fn(PairLogps(*(half for s in streams for half in (s[0::2], s[1::2])))).mean()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", ["no reference", "own head", "shared head"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("capped", [False, True], ids=["", "softcap"])
def test_loss_and_gradients(p, loss, head, biased, capped):
    transform = {"logit_scale": 0.7, "softcap": 4.0 if capped else None}
    reference = {}
    if head != "no reference":
        reference["ref_hidden"] = p.ref_hidden
    if head == "own head":
        reference |= {"ref_weight": p.ref_weight} | ({"ref_bias": p.ref_bias} if biased else {})
    for trained in itertools.product([False, True], repeat=3 if biased else 2):
        both = []
        for run in ("ours", "truth"):
            tensors = (p.hidden, p.weight, p.bias if biased else None)
            leaves = [None if t is None else t.clone() for t in tensors]
            for leaf, train in zip(leaves, trained, strict=False):
                leaf.requires_grad_(train)
            if run == "truth":
                value = expected(p, leaves, reference, LOSSES[loss], transform)
            else:
                value = linear_preference_loss(
                    *leaves[:2],
                    p.target,
                    CU,
                    LOSSES[loss],
                    rows=ROWS,
                    bias=leaves[2],
                    **reference,
                    extrapolation=STRENGTH if reference else None,
                    **transform,
                ).loss
            assert value.requires_grad == any(trained)
            if any(trained):
                value.backward()
            both.append((value.detach(), *[None if t is None else t.grad for t in leaves]))
        for ours, truth in zip(*both, strict=True):
            assert (ours is None) == (truth is None)
            if ours is not None:
                torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


def test_dw_predicts_the_loss_along_random_directions(p):
    weight = p.weight.requires_grad_()
    generator = torch.Generator().manual_seed(0)

    def loss(head):
        return linear_preference_loss(
            p.hidden,
            head,
            p.target,
            CU,
            losses.spa(0.5, 0.3, 0.1),
            rows=ROWS,
            bias=p.bias,
            **p.reference,
            extrapolation=STRENGTH,
        ).loss

    loss(weight).backward()
    for _ in range(20):
        step = 1e-5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (loss(weight + step) - loss(weight - step)) / 2
        torch.testing.assert_close(slope, (weight.grad * step).sum(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_any_share_of_ignored_rows(p, share):
    """Ignored rows are as if they were not there; with none left the loss is that of no text."""
    keep = torch.rand(16, generator=torch.Generator().manual_seed(3)) >= share
    target = p.target.clamp(min=0)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)])[CU]
    results = []
    for labels, rows, cu in (
        (target.masked_fill(~keep, -100), ROWS, CU),
        (target[keep], ROWS[keep], ends),
    ):
        leaves = p.trainable()
        out = linear_preference_loss(
            *leaves[:2],
            labels,
            cu,
            losses.with_nll(losses.ipo(0.5), 0.7),
            rows=rows,
            bias=leaves[2],
            **p.reference,
            extrapolation=STRENGTH,
        )
        out.loss.backward()
        results.append([out.losses, out.logp, out.extrapolated_logp, *[t.grad for t in leaves]])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth)
    assert keep.any() or not any(t.any() for t in results[0][1:])
