"""torchao's 8-bit AdamW on two ranks, each with the whole model or a share of it."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE
from srlm_fast.train.optim import Optimizer
from srlm_fast.train.sft import train_sft
from tests.srlm_kernels import ranks as processes
from tests.train.test_parallel import here
from tests.train.tiny import draw_rows

pytest.importorskip("torchao.optim", reason="torchao is not installed (extra [torchao])")

EIGHT = TrainConfig(
    learning_rate=1e-3, num_train_epochs=4, per_device_train_batch_size=7,
    optim="adamw_torch_8bit",
)  # fmt: skip
ROUNDED = replace(EIGHT, bf16_stochastic_rounding=True)


def made(dtype, hidden=128):
    """Half of a matrix has 8-bit moments too."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).float()


def trained(ranks, config, dtype, *, seed=0, **shape):
    model = made(dtype, **shape)
    # Compiling has a test of its own, and takes longer than all of this.
    with mock.patch.object(torch, "compile", lambda function, **options: function):
        summary = train_sft(
            model, draw_rows(), config, seed=seed, pad_id=0, log=lambda row: None, ranks=ranks
        )
    assert summary["loss_last"] < 0.8 * summary["loss_first"]
    return weights(model), summary


def assert_that_of_one_rank(config):
    """Eight bits make the same number, or its neighbour, of what two orders of summing give: as
    near as one rank in two micro-batches is to itself in one."""
    start = weights(made(torch.float32))
    one, two = (trained(ALONE, replace(EIGHT, micro_batch_size=n), torch.float32) for n in (0, 4))
    noise, moved = (one[0] - two[0]).norm(), (one[0] - start).norm()
    assert 0 < noise < 0.01 * moved
    found, summary = trained(here(), config, torch.float32)
    assert all(torch.equal(other, found) for other in here().gather([found]))
    assert (found - one[0]).norm() < 4 * noise
    assert summary["loss_last"] == pytest.approx(one[1]["loss_last"], rel=1e-3)


def replicas_take_the_step_of_one_rank():
    assert_that_of_one_rank(EIGHT)


def shares_take_the_step_of_one_rank():
    assert_that_of_one_rank(replace(EIGHT, parallel="shard"))


def masters_of_16_bit_weights_stay_the_same_on_all_ranks():
    for parallel in ("replicate", "shard"):
        found = trained(here(), replace(EIGHT, parallel=parallel), torch.bfloat16)
        assert all(torch.equal(other, found[0]) for other in here().gather([found[0]]))


def replicas_round_alike():
    """By chance that is drawn from the seed and the step, not from the rank."""
    found = trained(here(), ROUNDED, torch.bfloat16)
    assert all(torch.equal(other, found[0]) for other in here().gather([found[0]]))
    again, other = (trained(here(), ROUNDED, torch.bfloat16, seed=seed) for seed in (0, 1))
    assert torch.equal(again[0], found[0]) and not torch.equal(other[0], found[0])


def shares_are_rounded_without_masters():
    kinds, plain = set(), Optimizer.step

    def step(self, *args):
        kinds.update(m.dtype for m in self.masters if m.ndim >= 2)
        return plain(self, *args)

    with mock.patch.object(Optimizer, "step", step):
        found = trained(here(), replace(ROUNDED, parallel="shard"), torch.bfloat16)
    assert kinds == {torch.bfloat16}
    assert all(torch.equal(other, found[0]) for other in here().gather([found[0]]))


def shares_too_small_to_be_rounded_are_said_on_all_ranks():
    with pytest.raises(UserError, match="each or its share on a process"):
        trained(here(), replace(ROUNDED, parallel="shard"), torch.bfloat16, hidden=32)


CHECKS = [
    replicas_take_the_step_of_one_rank,
    shares_take_the_step_of_one_rank,
    masters_of_16_bit_weights_stay_the_same_on_all_ranks,
    replicas_round_alike,
    shares_are_rounded_without_masters,
    shares_too_small_to_be_rounded_are_said_on_all_ranks,
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return processes.start(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ranks(check, outputs):
    processes.assert_passed(check, outputs[2])


if __name__ == "__main__":
    processes.main({2: CHECKS})
