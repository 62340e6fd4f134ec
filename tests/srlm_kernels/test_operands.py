"""What an op is given: heads sharded by FSDP2, under autocast, or not there at all.

The FSDP2 checks compare with float64 torch on one machine that sees the data of all ranks.
"""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from srlm_kernels import linear_logp, linear_preference_loss, losses
from srlm_kernels import operands as module
from srlm_kernels.linear_logp import linear_logp_ref
from srlm_kernels.linear_preference_loss import linear_preference_loss_ref
from srlm_kernels.operands import ready_operands
from tests.srlm_kernels import ranks


class Model(nn.Module):
    """Hidden states of tokens [T]; with `loss_of` what that makes of them inside the forward."""

    def __init__(self, tied: bool, frozen: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.embed, self.body, self.head = nn.Embedding(37, 8), nn.Linear(8, 8), nn.Linear(8, 37)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
        if tied:
            self.head.weight = self.embed.weight
        self.head.requires_grad_(not frozen)

    def forward(self, tokens: Tensor, loss_of: Callable | None = None) -> Tensor:
        hidden = self.body(self.embed(tokens)).tanh()
        return hidden if loss_of is None else loss_of(self, hidden)


def tokens_of(rank: int, step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(10 * rank + step)
    tokens, target = (torch.randint(0, 37, (20,), generator=g) for _ in range(2))
    # A rank without a row that counts must not leave the others waiting.
    return tokens, torch.full_like(target, -100) if (rank, step) == (1, 1) else target


def of_rows(model: Model, hidden: Tensor, target: Tensor, op: Callable, kind: type = Tensor):
    head = model.head
    assert type(head.weight.data) is kind
    ref = {"ref_hidden": hidden.flip(0), "ref_weight": head.weight, "ref_bias": head.bias}
    out = op(hidden, head.weight, target, bias=head.bias, **ref, extrapolation=1.0)
    return (out.logp * torch.linspace(-1, 2, 20)).sum()


def of_pairs(model: Model, hidden: Tensor, target: Tensor, op: Callable, kind: type = Tensor):
    head = model.head
    assert type(head.weight.data) is kind
    offsets, loss_fn = torch.tensor([0, 4, 9, 15, 20]), losses.sppo_hard(0.5)
    ref = {"bias": head.bias, "ref_hidden": hidden.flip(0)}
    return op(hidden, head.weight, target, offsets, loss_fn, **ref).loss


OPS = (
    (of_rows, linear_logp, linear_logp_ref),
    (of_pairs, linear_preference_loss, linear_preference_loss_ref),
)


def compare_gradients(
    wrap: Callable[[Model], None], *, kind: type, tied=False, frozen=False, inside=False
) -> None:
    """Two micro-batches, other data on each rank, against the mean over ranks on one machine.

    `kind`: what the op sees as the head's weight. `inside`: it is called in the model's forward.
    """
    for loss_of, op, op_ref in OPS:
        truth, model = Model(tied, frozen), Model(tied, frozen)
        for rank in range(dist.get_world_size()):
            for step in range(2):
                tokens, target = tokens_of(rank, step)
                loss = loss_of(truth, truth(tokens), target, op_ref)
                (loss / dist.get_world_size()).backward()
        wrap(model)
        for step in range(2):
            tokens, target = tokens_of(dist.get_rank(), step)
            run = partial(loss_of, target=target, op=op, kind=kind)
            loss = model(tokens, run) if inside else run(model, model(tokens))
            loss.backward()
        for (name, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
            assert isinstance(p, DTensor), name
            if frozen and name.startswith("head"):
                assert p.grad is None, name
                continue
            assert p.grad.placements == p.placements, name
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, atol=1e-12, rtol=1e-12)


def wrapped_alone(model: Model) -> None:
    fully_shard(model.head)
    fully_shard(model)


def resharded(model: Model) -> None:
    fully_shard(model, reshard_after_forward=True)


def dtensor_head_gives_the_mean_gradient_over_ranks() -> None:
    compare_gradients(wrapped_alone, kind=DTensor)
    compare_gradients(resharded, kind=DTensor)
    compare_gradients(resharded, kind=DTensor, tied=True)


def frozen_dtensor_head_gets_no_gradient() -> None:
    compare_gradients(wrapped_alone, kind=DTensor, frozen=True)


def head_that_fsdp_left_unsharded_gives_the_same() -> None:
    """The root keeps its parameters whole from forward to backward; inside a forward all are."""
    compare_gradients(fully_shard, kind=Tensor)
    compare_gradients(fully_shard, kind=Tensor, tied=True)
    compare_gradients(resharded, kind=Tensor, inside=True)
    compare_gradients(resharded, kind=Tensor, inside=True, tied=True)


def hybrid_sharding_averages_over_both_dimensions() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))

    def hybrid(model: Model) -> None:
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)

    compare_gradients(hybrid, kind=DTensor)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def random_hidden() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()


def sharded_head() -> nn.Linear:
    return fully_shard(Model(tied=False, frozen=False).head.float())


def a_reference_that_shares_the_head_gathers_it_once() -> None:
    head, other = sharded_head(), sharded_head()
    hidden, target = random_hidden(), torch.arange(5)
    for ref, count in (
        ({}, 1),
        ({"ref_weight": head.weight}, 1),
        ({"ref_weight": other.weight}, 2),
    ):
        with mock.patch.object(module, "whole_head", wraps=module.whole_head) as gather:
            out = linear_logp(hidden, head.weight, target, ref_hidden=hidden, **ref)
        assert gather.call_count == count
        assert torch.equal(out.logp.detach(), out.ref_logp)
        out.logp.sum().backward()
    assert head.weight.grad is not None and other.weight.grad is None


def autocast_gathers_the_head_in_its_dtype() -> None:
    head, hidden, target = sharded_head(), random_hidden(), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_logp(hidden, head.weight, target, bias=head.bias).logp
    ours.sum().backward()
    half = [leaf(full(t).bfloat16()) for t in (hidden, head.weight, head.bias)]
    apart = linear_logp(half[0], half[1], target, bias=half[2]).logp
    apart.sum().backward()
    assert torch.equal(ours, apart)
    for t, other in zip((hidden, head.weight, head.bias), half, strict=True):
        assert t.grad.dtype == torch.float32
        assert torch.equal(full(t.grad), other.grad.float())


def what_would_lose_gradients_of_a_dtensor_head_is_refused() -> None:
    head, hidden, target = sharded_head(), random_hidden(), torch.arange(5)
    pairs = (torch.tensor([0, 2, 5]), losses.dpo(0.1))
    with pytest.raises(
        TypeError, match=r"grad_weight_out would miss .* pass weight.full_tensor\(\).detach"
    ):
        linear_preference_loss(
            hidden, head.weight, target, *pairs, grad_weight_out=torch.zeros(37, 8)
        )
    for op, args in ((linear_logp, ()), (linear_preference_loss, pairs)):
        with pytest.raises(
            TypeError, match=r"must be this rank's rows.*; pass weight.to_local\(\)"
        ):
            op(hidden, head.weight, target, *args, process_group=dist.group.WORLD)


CHECKS = {
    2: [
        dtensor_head_gives_the_mean_gradient_over_ranks,
        frozen_dtensor_head_gets_no_gradient,
        head_that_fsdp_left_unsharded_gives_the_same,
        a_reference_that_shares_the_head_gathers_it_once,
        autocast_gathers_the_head_in_its_dtype,
        what_would_lose_gradients_of_a_dtensor_head_is_refused,
    ],
    4: [hybrid_sharding_averages_over_both_dimensions],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    return ranks.start(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("size", "check"),
    [(size, check) for size, checks in CHECKS.items() for check in checks],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_ranks(size: int, check: Callable[[], None], outputs: dict[int, list[str]]) -> None:
    ranks.assert_passed(check, outputs[size])


# On one process -----------------------------------------------------------------------------------


def rows_or_pairs(op: Callable, inputs: list[Tensor], ref: list[Tensor], **options):
    """The op's loss and its results for [64, 128] hidden states and 1000 tokens."""
    target = torch.arange(0, 1000, 16)
    args = () if op is linear_logp else (torch.tensor([0, 9, 22, 40, 63]), losses.dpo(0.1))
    names = {"ref_hidden": ref[0], "ref_weight": ref[1], "ref_bias": ref[2], "extrapolation": 0.5}
    rows = torch.arange(63)
    out = op(inputs[0], inputs[1], target, *args, bias=inputs[2], rows=rows, **names, **options)
    results = {name: values for name, values in vars(out).items() if values is not None}
    return results.get("loss", out.logp.sum()), results


@pytest.mark.parametrize(
    ("impl", "inside"), [("chunked", False), ("chunked", True), ("reference", False)]
)
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("op", [linear_logp, linear_preference_loss])
def test_autocast_is_the_op_on_cast_operands(problem, op, logits_dtype, impl, inside):
    """Bit for bit, wherever backward is called; gradients reach the fp32 leaves in fp32."""
    p = problem((64, 128, 1000))
    options, ref = {"logits_dtype": logits_dtype, "impl": impl}, list(p.reference.values())
    inputs = p.trainable()
    with torch.autocast("cpu", torch.bfloat16):
        loss, ours = rows_or_pairs(op, inputs, ref, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        loss.backward()
    half = [leaf(t.bfloat16()) for t in inputs]
    loss, apart = rows_or_pairs(op, half, [t.bfloat16() for t in ref], **options)
    loss.backward()
    for name, values in ours.items():
        assert torch.equal(values, apart[name]), name
    for t, other in zip(inputs, half, strict=True):
        assert t.grad.dtype == torch.float32
        assert torch.equal(t.grad, other.grad.float())


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_backward_keeps_the_dtypes_of_its_forward(problem, logits_dtype):
    """A forward outside of the autocast region in which backward runs."""
    p = problem((64, 128, 1000))
    grads = []
    for inside in (False, True):
        hidden, weight, _ = p.trainable()
        logp = linear_logp(hidden, weight, p.target, logits_dtype=logits_dtype, impl="chunked").logp
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            logp.sum().backward()
        grads.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_leaves_grad_weight_out_in_fp32(problem):
    p = problem((64, 128, 1000))
    inputs, ref = p.trainable(), list(p.reference.values())
    into, apart = torch.zeros(2, 1000, 128)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = rows_or_pairs(linear_preference_loss, inputs, ref, grad_weight_out=into)
    loss.backward()
    half = [t.detach().bfloat16() for t in inputs]
    ref = [t.bfloat16() for t in ref]
    rows_or_pairs(linear_preference_loss, half, ref, grad_weight_out=apart)
    assert inputs[1].grad is None and into.any()
    assert torch.equal(into, apart)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("region", [torch.float16, torch.bfloat16, None], ids=str)
def test_dtypes_are_those_that_linear_sees(dtype, region):
    x, w, b = (torch.zeros(shape, dtype=dtype) for shape in ((3, 8), (11, 8), (11,)))
    with torch.autocast("cpu", region, enabled=region is not None):
        expected = F.linear(x, w, b).dtype
        found = ready_operands(x, w, b, x, w.clone(), b.clone())
    assert [t.dtype for t in found] == [expected] * 6


def test_autocast_spares_float64():
    x, w = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(11, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in ready_operands(x, w)[:2]] == [F.linear(x, w).dtype] * 2


def test_a_shared_head_is_cast_once_and_the_reference_is_constant():
    hidden, weight, bias = (leaf(torch.ones(shape)) for shape in ((3, 8), (11, 8), (11,)))
    with torch.autocast("cpu", torch.bfloat16):
        found = ready_operands(hidden, weight, bias, hidden, weight, bias)
    assert [t.requires_grad for t in found] == [True] * 3 + [False] * 3
    assert [t.data_ptr() for t in found[4:]] == [t.data_ptr() for t in found[1:3]]


def test_without_autocast_nothing_is_copied():
    tensors = [torch.ones(shape) for shape in ((3, 8), (11, 8), (11,))]
    assert all(a is b for a, b in zip(ready_operands(*tensors), tensors, strict=False))


@pytest.mark.parametrize("name", ["weight", "bias", "ref_weight", "ref_bias"])
@pytest.mark.parametrize("shape", [(0,), (0, 8)])
def test_head_that_is_not_there_names_the_cure(name, shape):
    """As DeepSpeed ZeRO-3 shows parameters outside of their module's forward."""
    tensors = {"weight": torch.zeros(11, 8), "bias": torch.zeros(11)}
    tensors |= {"ref_" + key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name] = torch.zeros(shape)
    hidden, target = torch.zeros(3, 8), torch.arange(3)
    match = rf"{name} is empty, shape \[.*inside deepspeed.zero.GatheredParameters"
    for op, pairs in (
        (linear_logp, ()),
        (linear_preference_loss, (torch.tensor([0]), losses.dpo(1.0))),
    ):
        with pytest.raises(ValueError, match=match):
            op(
                hidden,
                tensors["weight"],
                target,
                *pairs,
                ref_hidden=hidden,
                **{k: t for k, t in tensors.items() if k != "weight"},
            )


if __name__ == "__main__":
    ranks.main(CHECKS)
