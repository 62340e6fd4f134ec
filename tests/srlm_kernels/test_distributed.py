"""A vocabulary sharded over ranks: everything equals what one process with all of it computes."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from srlm_kernels import linear_logp, linear_preference_loss, losses, problem
from srlm_kernels.linear_logp import linear_logp_ref
from srlm_kernels.linear_preference_loss import linear_preference_loss_ref
from tests.srlm_kernels import ranks

ROWS, WIDTH, VOCAB = 40, 12, 2503
SHARES = {1: [VOCAB], 2: [1, VOCAB - 1], 4: [1500, 1, 601, 401]}  # of the 2503 rows, per rank
OFFSETS = torch.tensor([0, 9, 14, 14, 15, 26, 40])  # an empty response; some longer than a chunk
OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


@dataclass
class Shard:
    """This rank's place in a group of 1, 2 or 4 ranks."""

    group: dist.ProcessGroup
    rows: slice

    def of(self, whole: Tensor) -> Tensor:
        return whole.detach()[self.rows].clone().requires_grad_()


def shards() -> list[Shard]:
    rank, found = dist.get_rank(), []
    for size, shares in SHARES.items():
        blocks = [list(range(lo, lo + size)) for lo in range(0, dist.get_world_size(), size)]
        groups = [dist.new_group(ranks) for ranks in blocks]  # every rank must name every group
        lo = sum(shares[: rank % size])
        found.append(Shard(groups[rank // size], slice(lo, lo + shares[rank % size])))
    return found


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * scale).to(dtype)

    target = torch.randint(0, VOCAB, (ROWS,), generator=g)
    target[:6] = torch.tensor([0, 1, 1499, 1500, 1501, 2502])  # in every share of every size
    target[[7, 13, 30]] = -100
    return {
        "hidden": normal(ROWS - 2, WIDTH), "weight": normal(VOCAB, WIDTH), "bias": normal(VOCAB),
        "ref_hidden": normal(ROWS - 2, WIDTH), "ref_weight": normal(VOCAB, WIDTH),
        "ref_bias": normal(VOCAB), "target": target,
        "rows": torch.arange(ROWS).clamp(max=ROWS - 3),
        "upstream": normal(ROWS),
    }  # fmt: skip


def assert_close(ours: Tensor, truth: Tensor, dtype: torch.dtype, *, atol: float = 4e-5) -> None:
    """Values within `atol` (fp64: 1e-12): 2e-6 of the largest logit, about 20, for fp32."""
    assert ours.dtype == (torch.bool if truth.dtype == torch.bool else dtype)
    if ours.dtype == torch.bool:
        assert torch.equal(ours, truth)
        return
    tight = dtype == torch.float64
    torch.testing.assert_close(
        ours.detach().double(), truth.detach(), atol=1e-12 if tight else atol,
        rtol=1e-12 if tight else 1e-6, equal_nan=True,
    )  # fmt: skip


def assert_grads_close(ours: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    limit = 1e-12 if dtype == torch.float64 else 1e-6 * WIDTH**0.5
    for a, b in zip(ours, truth, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= limit * b.norm() + 1e-30


def assert_same_on_all_ranks(values: Tensor, group: dist.ProcessGroup) -> None:
    everyones = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, values.contiguous(), group=group)
    assert all(torch.equal(values, other) for other in everyones)


def leaves(t: dict[str, Tensor]) -> list[Tensor]:
    return [t[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]


def compare_logp(shard: Shard, t: dict[str, Tensor], own_reference: bool, **options) -> None:
    """The op on a shard against float64 torch on the whole, results and gradients."""
    dtype, wide = t["hidden"].dtype, {k: v.double() for k, v in t.items() if v.is_floating_point()}
    index = {"rows": t["rows"], "outputs": OUTPUTS, "extrapolation": 0.5, **options}
    whole = leaves(wide)
    names = ("ref_hidden", "ref_weight", "ref_bias")[: 3 if own_reference else 1]
    ref = {name: wide[name] for name in names}
    truth = linear_logp_ref(*whole[:2], t["target"], bias=whole[2], **ref, **index)
    truth.logp.backward(wide["upstream"])

    hidden, weight, bias = leaves(t)[0], shard.of(t["weight"]), shard.of(t["bias"])
    ref = {name: t[name] if name == "ref_hidden" else shard.of(t[name]) for name in names}
    ours = linear_logp(
        hidden, weight, t["target"], bias=bias, **ref, **index, process_group=shard.group,
        chunk_rows=16,
    )  # fmt: skip
    ours.logp.backward(t["upstream"])
    for name, values in vars(ours).items():
        assert_close(values, getattr(truth, name), dtype)
        assert_same_on_all_ranks(values, shard.group)
    assert_same_on_all_ranks(hidden.grad, shard.group)
    true_grads = [whole[0].grad, whole[1].grad[shard.rows], whole[2].grad[shard.rows]]
    assert_grads_close([hidden.grad, weight.grad, bias.grad], true_grads, dtype)


def linear_logp_is_that_of_the_whole_vocabulary() -> None:
    for shard in shards():
        for dtype in (torch.float64, torch.float32):
            compare_logp(shard, tensors(dtype), own_reference=True, softcap=15.0, temperature=0.8)
            compare_logp(shard, tensors(dtype), own_reference=False)


def minus_infinity_may_fill_a_shard() -> None:
    """Padded columns: one rank has nothing else, under the policy, the reference or both."""
    *_, shard = shards()
    second, third, fourth = slice(1500, 1501), slice(1501, 2102), slice(2102, VOCAB)
    for policy, reference in ((second, slice(0)), (third, fourth), (slice(1501), slice(1501))):
        t = tensors(torch.float64)
        t["bias"][policy] = -torch.inf
        t["ref_bias"][reference] = -torch.inf
        compare_logp(shard, t, own_reference=True)


def the_maximum_may_be_on_another_rank_than_the_target() -> None:
    *_, shard = shards()
    for column in (0, 1500, 2502):
        t = tensors(torch.float64)
        t["bias"][column] = 300.0
        compare_logp(shard, t, own_reference=False)


def a_target_that_no_rank_has_becomes_nan() -> None:
    *_, shard = shards()
    t = tensors(torch.float32)
    t["target"][[2, 5]] = torch.tensor([VOCAB, -7])
    logp = linear_logp(
        t["hidden"], shard.of(t["weight"]), t["target"], rows=t["rows"], process_group=shard.group
    ).logp
    assert logp.isnan().nonzero()[:, 0].tolist() == [2, 5]


def compare_preference(shard: Shard, dtype: torch.dtype, loss_fn: Callable, **options) -> None:
    t = tensors(dtype)
    wide = {k: v.double() for k, v in t.items() if v.is_floating_point()}
    into, folded = options.pop("grad_weight_out", False), None
    index = {"rows": t["rows"], "extrapolation": 0.5}
    whole = leaves(wide)
    truth = linear_preference_loss_ref(
        *whole[:2], t["target"], OFFSETS, loss_fn, bias=whole[2], ref_hidden=wide["ref_hidden"],
        **index,
    )  # fmt: skip
    truth.loss.backward()

    hidden, weight, bias = leaves(t)[0], shard.of(t["weight"]), shard.of(t["bias"])
    if into:
        options["grad_weight_out"] = folded = torch.ones_like(weight)
    ours = linear_preference_loss(
        hidden, weight, t["target"], OFFSETS, loss_fn, bias=bias, ref_hidden=t["ref_hidden"],
        **index, process_group=shard.group, **options,
    )  # fmt: skip
    ours.loss.backward()
    for name, values in vars(ours).items():
        if values is not None:
            assert_close(values, getattr(truth, name), dtype, atol=1e-4)
            assert_same_on_all_ranks(values, shard.group)
    assert_same_on_all_ranks(hidden.grad, shard.group)
    true_grads = [whole[0].grad, whole[1].grad[shard.rows], whole[2].grad[shard.rows]]
    if folded is not None:
        assert weight.grad is None
        weight.grad = folded - 1
    assert_grads_close([hidden.grad, weight.grad, bias.grad], true_grads, dtype)


def preference_losses_are_those_of_the_whole_vocabulary() -> None:
    suspect = losses.spa(0.1, alpha=0.2, threshold=-0.3)
    for shard in shards():
        for loss_fn in (losses.dpo(0.1), suspect, losses.sppo_hard(0.1), losses.aot(0.1)):
            for chunk_rows in (None, 7):
                compare_preference(shard, torch.float64, loss_fn, chunk_rows=chunk_rows)
        compare_preference(shard, torch.float32, suspect)
        compare_preference(shard, torch.float64, suspect, grad_weight_out=True, chunk_rows=7)


def count_collectives(shard: Shard, n: int, ignored: int, chunk_rows: int | None) -> list[int]:
    """Gathers of the forward of linear_logp, of its backward, and of the preference loss."""
    t = tensors(torch.float32)
    hidden, weight = leaves(t)[0], shard.of(t["weight"])
    target = t["target"].clamp(min=0)[:n]
    target[:ignored] = -100
    options = {"rows": t["rows"][:n], "chunk_rows": chunk_rows, "process_group": shard.group}
    counts = []
    with (
        mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
    ):
        logp = linear_logp(hidden, weight, target, **options).logp
        counts.append(gather.call_count)
        logp.sum().backward()
        counts.append(gather.call_count - sum(counts))
        loss_fn, offsets = losses.dpo(0.1), OFFSETS.clamp(max=n)
        out = linear_preference_loss(hidden, weight, target, offsets, loss_fn, **options)
        out.loss.backward()
        counts.append(gather.call_count - sum(counts))
        assert reduce.call_count == 2
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert bool(hidden.grad.any() and weight.grad.any()) == (n > ignored)
    return counts


def ranks_make_equally_many_collectives() -> None:
    """One per call and one per chunk, though the default chunk depends on the head's width."""
    *_, shard = shards()
    assert count_collectives(shard, ROWS, 0, 7) == [1 + 6, 1, 1 + (2 + 1) + 1 + (2 + 2)]
    assert count_collectives(shard, ROWS, 0, 10**6) == [2, 1, 2]
    assert count_collectives(shard, ROWS, 33, 7) == [2, 1, 2]
    assert count_collectives(shard, ROWS, ROWS, 7) == [2, 1, 2]
    assert count_collectives(shard, 0, 0, 7) == [2, 1, 2]
    with mock.patch.object(problem, "chunk_rows", lambda columns, device: 1 + 8000 // columns):
        counts = torch.tensor(count_collectives(shard, ROWS, 0, None))
    assert_same_on_all_ranks(counts, shard.group)


CHECKS = {
    4: [
        linear_logp_is_that_of_the_whole_vocabulary,
        minus_infinity_may_fill_a_shard,
        the_maximum_may_be_on_another_rank_than_the_target,
        a_target_that_no_rank_has_becomes_nan,
        preference_losses_are_those_of_the_whole_vocabulary,
        ranks_make_equally_many_collectives,
    ]
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    return ranks.start(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS[4], ids=lambda check: check.__name__)
def test_four_ranks(check: Callable[[], None], outputs: dict[int, list[str]]) -> None:
    ranks.assert_passed(check, outputs[4])


if __name__ == "__main__":
    ranks.main(CHECKS)
