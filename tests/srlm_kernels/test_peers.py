"""The ops against their peers, in fp32: the same values and the same gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from srlm_kernels import linear_logp, linear_preference_loss, losses
from srlm_kernels.dispatch import implementations

BETA = 0.3
# (rows, D, V) of linear_logp; (pairs, tokens, D, V) of linear_preference_loss.
ROWS = [(5, 31, 123), (129, 96, 5021)]
PAIRS = [(1, 2, 8, 11), (3, 7, 31, 123), (4, 19, 96, 1009)]


# "tiled" computes no gradients.
@pytest.fixture(params=[name for name in implementations("linear_logp") if name != "tiled"])
def logp_impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=implementations("linear_preference_loss"))
def loss_impl(request: pytest.FixtureRequest) -> str:
    return request.param


def some_ignored(target: Tensor) -> Tensor:
    """Every third row ignored, the first row kept."""
    return target.masked_fill(torch.arange(len(target), device=target.device) % 3 == 1, -100)


def logp_bound(*logits: Tensor) -> float:
    """Each of two sides may be off by 2e-6 of the largest logit."""
    return 4e-6 * max(1.0, *(float(z.abs().max()) for z in logits))


def assert_same_grads(ours, theirs, tolerance: float = 2e-6) -> None:
    """Relative to the norm, tolerance * sqrt(D); the first of the leaves is hidden [..., D]."""
    for our, their in zip(ours, theirs, strict=True):
        bound = tolerance * ours[0].shape[-1] ** 0.5 * their.grad.norm()
        assert bound > 0
        assert (our.grad - their.grad.view_as(our)).norm() <= bound


TRL_OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "capped": {"logit_scale": 1.4, "softcap": 4.0, "temperature": 0.8},
}


@pytest.mark.parametrize("options", TRL_OPTIONS.values(), ids=TRL_OPTIONS)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_trl_chunked_logp(shape, biased, options, problem, true_logits, logp_impl):
    pytest.importorskip("trl", reason="trl is not installed (extra [bench])")
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

    p = problem(shape)
    count = 3 if biased else 2
    ours, theirs = p.trainable()[:count], p.trainable()[:count]
    target = some_ignored(p.target)
    scored = target != -100
    upstream = torch.linspace(-1.0, 2.0, len(target))
    names = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")  # TRL's, in TRL's order

    bias = ours[2] if biased else None
    out = linear_logp(*ours[:2], target, bias=bias, outputs=names, impl=logp_impl, **options)
    out.logp.backward(upstream)
    hidden, weight, *bias = theirs
    logp, *outputs = ChunkedLogProbFunction.apply(
        hidden[scored],
        weight,
        bias[0] if bias else None,
        target[scored],
        options.get("temperature", 1.0),
        1000,
        options.get("softcap"),
        options.get("logit_scale", 1.0),
        OPTIONAL_OUTPUTS,
    )
    logp.backward(upstream[scored])

    z = true_logits(p.hidden, p.weight, p.bias if biased else None, **options)
    assert not out.logp[~scored].any()
    torch.testing.assert_close(out.logp[scored], logp, atol=logp_bound(z), rtol=0)
    for name, their in zip(names, outputs, strict=True):
        our = getattr(out, name)[scored]
        torch.testing.assert_close(our, their.detach(), atol=2e-5, rtol=2e-6)
    assert_same_grads(ours, theirs)


@pytest.mark.slow  # it compiles, so for one shape only
def test_cut_cross_entropy(problem, true_logits, logp_impl):
    """Its compiled path, which is exact."""
    cce = pytest.importorskip(
        "cut_cross_entropy", reason="cut-cross-entropy is not installed (extra [bench])"
    )
    p = problem(ROWS[-1])
    ours, theirs = p.trainable()[:2], p.trainable()[:2]
    target = some_ignored(p.target)
    upstream = torch.linspace(-1.0, 2.0, len(target))
    out = linear_logp(*ours, target, softcap=4.0, impl=logp_impl)
    out.logp.backward(upstream)
    nll = cce.linear_cross_entropy(
        *theirs, target, softcap=4.0, reduction="none", impl="torch_compile"
    )
    nll.backward(-upstream)
    bound = logp_bound(true_logits(p.hidden, p.weight, softcap=4.0))
    torch.testing.assert_close(out.logp, -nll, atol=bound, rtol=0)
    assert_same_grads(ours, theirs)


@pytest.mark.gpu
def test_cut_cross_entropy_unfiltered(problem, true_logits, logp_impl):
    """Its Triton kernels with nothing filtered; their backward multiplies in TF32."""
    cce = pytest.importorskip(
        "cut_cross_entropy", reason="cut-cross-entropy is not installed (extra [bench])"
    )
    p = problem(ROWS[-1])
    ours, theirs = (
        [t.detach().cuda().requires_grad_() for t in p.trainable()[:2]] for _ in range(2)
    )
    target = some_ignored(p.target).cuda()
    out = linear_logp(*ours, target, impl=logp_impl)
    out.logp.sum().backward()
    nll = cce.linear_cross_entropy(*theirs, target, reduction="none", impl="cce", filter_eps=None)
    (-nll.sum()).backward()
    bound = logp_bound(true_logits(p.hidden, p.weight))
    torch.testing.assert_close(out.logp, -nll, atol=bound, rtol=0)
    assert_same_grads(ours, theirs, tolerance=1e-3)


class PaddedPairs:
    """[2P, S] as Liger and the SPA authors lay them out: all chosen, then all rejected."""

    def __init__(self, problem, shape: tuple[int, int, int, int]) -> None:
        self.pairs, self.tokens, width, vocabulary = shape
        self.problem = problem((2 * self.pairs * self.tokens, width, vocabulary))
        self.target = some_ignored(self.problem.target)
        if self.pairs > 1:
            self.target[-self.tokens :] = -100  # an empty rejected response
        row = torch.arange(len(self.target)).view(2, self.pairs, self.tokens)
        self.rows = row.transpose(0, 1).flatten()
        self.cu_seqlens = torch.arange(0, len(self.target) + 1, self.tokens)

    def padded(self, rows: Tensor) -> Tensor:
        return rows.view(2 * self.pairs, self.tokens, *rows.shape[1:])

    def ours(self, leaves, loss_fn, **options):
        hidden, weight, bias = leaves
        return linear_preference_loss(
            hidden,
            weight,
            self.target[self.rows],
            self.cu_seqlens,
            loss_fn,
            rows=self.rows,
            bias=bias,
            **self.problem.reference,
            **options,
        )


LIGER_LOSSES = {
    "sigmoid": losses.dpo(BETA),
    "robust": losses.robust(BETA, 0.1),
    "exo_pair": losses.exo_pair(BETA, 0.1),
    "apo_down": losses.apo_down(BETA),
    "sppo_hard": losses.sppo_hard(BETA),
}


@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_liger_fused_dpo(shape, loss_type, problem, true_logits, loss_impl):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (extra [bench])")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    batch = PaddedPairs(problem, shape)
    p, pairs = batch.problem, batch.pairs
    ours, theirs = p.trainable(), p.trainable()
    out = batch.ours(ours, LIGER_LOSSES[loss_type], impl=loss_impl)
    (3 * out.loss).backward()

    liger = LigerFusedLinearDPOLoss(
        beta=BETA, loss_type=loss_type, label_smoothing=0.1, compiled=False
    )
    hidden, weight, bias = theirs
    loss, (chosen, rejected, *_, chosen_reward, rejected_reward) = liger(
        weight,
        batch.padded(hidden),
        batch.padded(batch.target),
        bias,
        batch.padded(p.ref_hidden),
        p.ref_weight,
        p.ref_bias,
    )
    (3 * loss).backward()

    z = true_logits(p.hidden, p.weight, p.bias)
    z_ref = true_logits(p.ref_hidden, p.ref_weight, p.ref_bias)
    close = {"atol": batch.tokens * logp_bound(z, z_ref), "rtol": 1e-6}
    ratio = BETA * (out.logp - out.ref_logp)
    torch.testing.assert_close(out.logp.view(pairs, 2), torch.stack((chosen, rejected), 1), **close)
    rewards = torch.stack((chosen_reward, rejected_reward), 1)
    torch.testing.assert_close(ratio.view(pairs, 2), rewards, **close)
    torch.testing.assert_close(out.loss, loss, **close)
    assert_same_grads(ours, theirs)


def official_spa(batch, leaves, strength: float, alpha: float, gap: float):
    """The authors' code on whole logits: the loss of each pair, and the mixed margins times beta.

    In their names `mix` is 1 + lambda, and a pair is clean when its mixed margin exceeds `gap`.
    """
    p = batch.problem
    labels = batch.padded(batch.target)
    mask = labels != -100
    index = labels.masked_fill(~mask, 0)[..., None]

    def margin(logits: Tensor) -> Tensor:
        per_token = logits.log_softmax(-1).gather(-1, index).squeeze(-1)
        chosen, rejected = (per_token * mask).sum(-1).chunk(2)
        return chosen - rejected

    hidden, weight, bias = leaves
    policy = batch.padded(hidden) @ weight.T + bias
    with torch.no_grad():
        reference = batch.padded(p.ref_hidden) @ p.ref_weight.T + p.ref_bias
        mix = 1 + strength
        mixed = mix * policy + (1 - mix) * reference
        mix_margin = BETA * (margin(mixed) - margin(reference))
        clean = (mix_margin > gap).to(policy.dtype)
    x = BETA * (margin(policy) - margin(reference))
    w = 1 - alpha + alpha * clean
    return -w * logsigmoid(x) - (alpha - alpha * clean) * logsigmoid(-x), mix_margin


def lowest_two(margins: Tensor) -> tuple[float, float]:
    """The second is made up where there is one only."""
    low, *rest = sorted(margins.tolist())
    return low, rest[0] if rest else low + 1


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_official_spa(shape, strength, problem, true_logits, loss_impl):
    batch = PaddedPairs(problem, shape)
    p, alpha = batch.problem, 0.2
    ours, theirs = p.trainable(), p.trainable()
    low, next_low = lowest_two(official_spa(batch, theirs, strength, alpha, gap=0.0)[1])
    gap = (low + next_low) / 2
    assert gap - low > 1e-3  # no rounding reaches it
    values, mix_margin = official_spa(batch, theirs, strength, alpha, gap)
    values.mean().backward()
    spa = losses.spa(BETA, alpha, gap, flag_equal=True)
    out = batch.ours(ours, spa, extrapolation=strength, impl=loss_impl)
    out.loss.backward()

    assert torch.equal(spa.flagged(out.ext_margins), mix_margin < gap)
    z = true_logits(p.hidden, p.weight, p.bias)
    z_ref = true_logits(p.ref_hidden, p.ref_weight, p.ref_bias)
    # Four sums make a margin.
    mixed = (1 + strength) * z - strength * z_ref
    close = {"atol": 4 * batch.tokens * logp_bound(z, z_ref, mixed), "rtol": 1e-6}
    torch.testing.assert_close(BETA * out.ext_margins, mix_margin, **close)
    torch.testing.assert_close(out.losses, values, **close)
    assert_same_grads(ours, theirs)


@pytest.mark.parametrize("shift", [-1e-4, 0.0, 1e-4])
def test_official_spa_at_its_gap(shift, problem, loss_impl):
    """In the band around the gap rounding decides; a pair outside keeps its flag."""
    batch, alpha = PaddedPairs(problem, (4, 19, 96, 1009)), 0.2
    leaves = batch.problem.trainable()
    low, gap = lowest_two(official_spa(batch, leaves, 0.5, alpha, gap=0.0)[1])
    assert gap - low > 1e-3
    values, mix_margin = official_spa(batch, leaves, 0.5, alpha, gap)
    spa = losses.spa(BETA, alpha, gap + shift, flag_equal=True)
    out = batch.ours(leaves, spa, extrapolation=0.5, impl=loss_impl)
    clean, smoothed = (
        batch.ours(leaves, losses.dpo(BETA, e), impl=loss_impl).losses for e in (0.0, alpha)
    )
    tie = mix_margin == gap
    assert int(tie.sum()) == 1
    torch.testing.assert_close(out.losses[~tie], values[~tie], atol=1e-4, rtol=1e-5)
    assert (clean - smoothed)[tie].abs() > 1e-2
    either = torch.minimum((out.losses - clean).abs(), (out.losses - smoothed).abs())
    assert either[tie] < 1e-4
