"""What must be equal: exactly where the arithmetic is the same, else to rounding."""

import math

import pytest
import torch

from srlm_kernels import linear_logp, linear_preference_loss, losses

pytestmark = pytest.mark.usefixtures("implementation")

BETA = 0.1
SCALED = {"logit_scale": 1.3, "softcap": 6.0}


def grads_of(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [None, 0.0, 0.5])
def test_equal_models_have_margin_zero_and_loss_ln2(problem, shape, dtype, strength, packed):
    p = problem(shape, dtype)
    hidden, weight, bias = p.trainable()
    cu = packed(shape[0])
    reference = {"ref_weight": p.weight.clone(), "ref_bias": p.bias.clone()}
    out = linear_preference_loss(
        hidden,
        weight,
        p.target,
        cu,
        losses.dpo(BETA),
        bias=bias,
        ref_hidden=p.hidden.clone(),
        **reference,
        extrapolation=strength,
        **SCALED,
    )
    pairs = len(cu) // 2
    assert out.margins.tolist() == out.ext_margins.tolist() == [0.0] * pairs
    assert torch.equal(out.losses, torch.full((pairs,), math.log(2)))
    assert out.loss.item() == pytest.approx(math.log(2), rel=2e-7)


def test_lambda_zero_is_plain_self_refinement_bit_for_bit(problem, shape, packed):
    p = problem(shape)
    results = []
    for strength in (None, 0.0):
        leaves = p.trainable()
        out = linear_preference_loss(
            *leaves[:2],
            p.target,
            packed(shape[0]),
            losses.spa(BETA, 0.2, 0.0),
            **p.reference,
            extrapolation=strength,
        )
        results.append([out.loss.detach(), out.ext_margins, *grads_of(out.loss, leaves[:2])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_alpha_zero_is_dpo_bit_for_bit(problem, shape, packed):
    p = problem(shape)
    results = []
    for loss_fn in (losses.dpo(BETA), losses.spa(BETA, 0.0, 1e9)):
        leaves = p.trainable()
        out = linear_preference_loss(
            *leaves[:2],
            p.target,
            packed(shape[0]),
            loss_fn,
            **p.reference,
            extrapolation=0.5,
        )
        results.append([out.loss.detach(), *grads_of(out.loss, leaves[:2])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("w", [0.0, 0.25, 0.5, 1.0])
def test_swapping_chosen_and_rejected_with_one_minus_w_changes_nothing(problem, w):
    p = problem((5, 31, 123), torch.float64)
    rows = torch.tensor([0, 1, 2, 3, 4])
    swapped_rows = torch.tensor([2, 3, 4, 0, 1])
    results = []
    for index, cu, weight in (
        (rows, [0, 2, 5], w),
        (swapped_rows, [0, 3, 5], 1 - w),
    ):
        leaves = p.trainable()[:2]
        out = linear_preference_loss(
            *leaves,
            p.target[index],
            torch.tensor(cu),
            losses.dpo(BETA, label_smoothing=1 - weight),
            rows=index,
            ref_hidden=p.ref_hidden,
        )
        results.append((out.margins, out.losses, grads_of(out.loss, leaves)))
    (margin, loss, grads), (swapped_margin, swapped_loss, swapped_grads) = results
    torch.testing.assert_close(swapped_margin, -margin)
    torch.testing.assert_close(swapped_loss, loss)
    torch.testing.assert_close(swapped_grads, grads)


def test_packed_sequences_equal_the_same_sequences_alone(problem, packed):
    p = problem((64, 16, 31))
    cu = packed(64)
    together = linear_preference_loss(
        p.hidden, p.weight, p.target, cu, losses.dpo(BETA), **p.reference
    )
    ends = cu.tolist()
    for i in range(3):
        lo, mid, hi = ends[2 * i : 2 * i + 3]
        alone = linear_preference_loss(
            p.hidden[lo:hi],
            p.weight,
            p.target[lo:hi],
            torch.tensor([0, mid - lo, hi - lo]),
            losses.dpo(BETA),
            ref_hidden=p.ref_hidden[lo:hi],
            ref_weight=p.ref_weight,
            ref_bias=p.ref_bias,
        )
        torch.testing.assert_close(together.losses[i : i + 1], alone.losses)
        torch.testing.assert_close(together.logp[2 * i : 2 * i + 2], alone.logp)


def test_shared_prompt_row_serves_both_responses(problem):
    """The last prompt row predicts the first token of the chosen and of the rejected response."""
    p = problem((6, 8, 11), torch.float64)
    cu = torch.tensor([0, 3, 6])
    rows = torch.tensor([0, 1, 2, 0, 3, 4])
    leaves = p.trainable()
    shared = linear_preference_loss(*leaves[:2], p.target, cu, losses.dpo(1.0), rows=rows)
    ours = grads_of(shared.loss, leaves[:2])
    copies = p.hidden[rows].requires_grad_()
    weight = p.weight.clone().requires_grad_()
    apart = linear_preference_loss(copies, weight, p.target, cu, losses.dpo(1.0))
    d_copies, d_weight = grads_of(apart.loss, (copies, weight))
    assert torch.equal(shared.loss, apart.loss)
    torch.testing.assert_close(ours[0][0], d_copies[0] + d_copies[3])
    torch.testing.assert_close(ours[0][1:5], d_copies[[1, 2, 4, 5]])
    assert not ours[0][5].any()
    torch.testing.assert_close(ours[1], d_weight)


def test_ignored_rows_equal_absent_rows(problem):
    p = problem((10, 8, 11), torch.float64)
    target = p.target.clone()
    target[[0, 4, 9]] = -100
    kept = [1, 2, 3, 5, 6, 7, 8]
    results = []
    for rows, labels, cu in (
        (torch.arange(10), target, [0, 5, 10]),
        (torch.tensor(kept), target[kept], [0, 3, 7]),
    ):
        leaves = p.trainable()
        out = linear_preference_loss(
            *leaves[:2],
            labels,
            torch.tensor(cu),
            losses.sigmoid_norm(5.0),  # sees the counts too
            rows=rows,
            ref_hidden=p.ref_hidden,
        )
        results.append([out.loss.detach(), *grads_of(out.loss, leaves[:2])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_known_reference_sums_replace_reference_states(problem, packed):
    p = problem((64, 16, 31))
    results = []
    live = linear_preference_loss(
        p.hidden, p.weight, p.target, packed(64), losses.dpo(BETA), **p.reference
    )
    for reference in (p.reference, {"ref_logp": live.ref_logp}):
        leaves = p.trainable()[:2]
        out = linear_preference_loss(*leaves, p.target, packed(64), losses.dpo(BETA), **reference)
        results.append([out.loss.detach(), out.margins, *grads_of(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_permuted_pairs_carry_their_tensors_along(problem, packed):
    p = problem((64, 16, 31), torch.float64)
    cu = packed(64).tolist()
    smoothing = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    order = [2, 0, 1]
    rows = torch.cat([torch.arange(cu[2 * i], cu[2 * i + 2]) for i in order])
    lengths = [cu[j + 1] - cu[j] for i in order for j in (2 * i, 2 * i + 1)]
    permuted_cu = torch.tensor([0, *lengths]).cumsum(0)
    results = []
    for index, offsets, e in (
        (torch.arange(64), packed(64), smoothing),
        (rows, permuted_cu, smoothing[order]),
    ):
        leaves = p.trainable()[:2]
        out = linear_preference_loss(
            *leaves,
            p.target[index],
            offsets,
            losses.dpo(BETA),
            pair={"label_smoothing": e},
            rows=index,
            ref_hidden=p.ref_hidden,
        )
        x = BETA * out.margins
        truth = (1 - e) * (1 + (-x).exp()).log() + e * (1 + x.exp()).log()
        torch.testing.assert_close(out.losses, truth)
        results.append((out.losses, grads_of(out.loss, leaves)))
    (straight, grads), (permuted, permuted_grads) = results
    torch.testing.assert_close(permuted, straight[order])
    torch.testing.assert_close(permuted_grads, grads)


@pytest.mark.parametrize("folded", [False, True], ids=["autograd", "grad_weight_out"])
def test_micro_batches_accumulate_to_the_whole_batch(problem, folded, packed):
    p = problem((64, 16, 31), torch.float64)
    cu = packed(64)

    def run(pair_ranges):
        hidden, weight, _ = p.trainable()
        out_buffer = torch.zeros_like(p.weight) if folded else None
        total = 0.0
        for first, last in pair_ranges:
            lo, hi = int(cu[2 * first]), int(cu[2 * last])
            out = linear_preference_loss(
                hidden,
                weight,
                p.target[lo:hi],
                cu[2 * first : 2 * last + 1] - lo,
                losses.dpo(BETA),
                rows=torch.arange(lo, hi),
                scale=1 / 3,
                ref_hidden=p.ref_hidden,
                grad_weight_out=out_buffer,
            )
            out.loss.backward()
            total += out.loss.item()
        return total, hidden.grad, out_buffer if folded else weight.grad

    whole, micro = run([(0, 3)]), run([(0, 1), (1, 2), (2, 3)])
    default = linear_preference_loss(
        p.hidden, p.weight, p.target, cu, losses.dpo(BETA), ref_hidden=p.ref_hidden
    )
    assert whole[0] == pytest.approx(default.loss.item())
    assert micro[0] == pytest.approx(whole[0])
    torch.testing.assert_close(micro[1:], whole[1:])


def repeated(problem, packed):
    p = problem((64, 128, 1000))
    results = set()
    for _ in range(10):
        leaves = p.trainable()[:2]
        out = linear_preference_loss(
            *leaves, p.target, packed(64), losses.dpo(BETA), rows=torch.arange(64) % 9
        )
        grads = grads_of(out.loss, leaves)
        results.add(tuple(t.detach().numpy().tobytes() for t in (out.loss, *grads)))
    return results


def test_repeats_bit_for_bit(problem, packed):
    assert len(repeated(problem, packed)) == 1


@pytest.mark.parametrize("implementation", ["chunked"], indirect=True)
def test_two_threads_repeat_bit_for_bit(problem, packed, thread_count):
    thread_count(2)
    assert len(repeated(problem, packed)) == 1


def test_nan_stays_in_its_pair(problem, packed):
    p = problem((64, 16, 31))
    results = []
    for value in (0.5, math.nan):
        hidden = p.hidden.index_fill(0, torch.tensor([10]), value).requires_grad_()
        out = linear_preference_loss(hidden, p.weight, p.target, packed(64), losses.dpo(BETA))
        out.loss.backward()
        results.append((out, hidden.grad))
    (clean, gradient), (out, broken) = results
    assert out.logp.isnan().tolist() == [False, True, False, False, False, False]
    assert out.losses[0].isnan()
    assert torch.equal(out.losses[1:], clean.losses[1:])
    assert torch.equal(broken[23:], gradient[23:])  # where the second pair begins


def test_a_common_beginning_of_both_responses_cancels(problem):
    """The same tokens after the same states: without them margin and gradients are the same."""
    p = problem((12, 8, 37), torch.float64)
    shared = torch.tensor([0, 1, 2])
    chosen, rejected = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8, 9])
    results = []
    for start in (shared, shared[:0]):
        rows = torch.cat([start, chosen, start, rejected])
        cu = torch.tensor([0, len(start) + 3, len(rows)])
        leaves = p.trainable()[:2]
        out = linear_preference_loss(
            *leaves,
            p.target[rows],
            cu,
            losses.spa(BETA, 0.2, 0.1),
            rows=rows,
            **p.reference,
            extrapolation=0.5,
        )
        results.append((out.margins, out.ext_margins, out.loss, *grads_of(out.loss, leaves)))
    torch.testing.assert_close(*results)


def test_token_results_are_those_of_linear_logp(problem, packed):
    p = problem((5, 31, 123))
    names = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
    rows = torch.tensor([4, 4, 0, 1, 2])
    common = {"rows": rows, "bias": p.bias, "outputs": names, **SCALED}
    out = linear_preference_loss(
        p.hidden, p.weight, p.target, packed(5), losses.dpo(BETA), **common
    )
    token = linear_logp(p.hidden, p.weight, p.target, **common)
    assert torch.equal(out.token_logp, token.logp)
    assert all(torch.equal(getattr(out, name), getattr(token, name)) for name in names)
