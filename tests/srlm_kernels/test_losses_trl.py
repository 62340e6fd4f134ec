"""Every loss that TRL knows by the same name: same value, same gradients.

TRL's own lines run, on a stand-in for the trainer and for the model's per-token log-probabilities.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_kernels import PairLogps, losses

pytest.importorskip("trl", reason="trl is not installed (extra [bench])")

BETA = 0.3
PROMPT, WIDTH = 2, 9
CHOSEN_LENGTHS, REJECTED_LENGTHS = [4, 1, 3, 6, 2], [5, 7, 2, 6, 1]
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)


@dataclass
class Batch:
    """TRL's layout: all chosen responses, then all rejected ones, padded to one width."""

    completion_mask: Tensor
    tokens: Tensor
    ref: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.completion_mask.sum(1)

    def sums(self) -> tuple[Tensor, PairLogps]:
        """Summed log-probabilities [2P], trainable, and the pairs made of them."""
        logp = (self.tokens * self.completion_mask[:, 1:]).sum(1).requires_grad_()
        halves = [half for x in (logp, self.ref, logp, self.lengths) for half in x.chunk(2)]
        return logp, PairLogps(*halves)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(chosen: list[int] = CHOSEN_LENGTHS, rejected: list[int] = REJECTED_LENGTHS) -> Batch:
        g = torch.Generator().manual_seed(5)
        lengths = torch.tensor(chosen + rejected)[:, None]
        position = torch.arange(WIDTH)
        mask = ((position >= PROMPT) & (position < PROMPT + lengths)).long()
        tokens = -3 * torch.rand(len(mask), WIDTH - 1, generator=g, dtype=torch.float64)
        noise = torch.randn(len(mask), generator=g, dtype=torch.float64)
        return Batch(mask, tokens, (tokens * mask[:, 1:]).sum(1) + 3 * noise)

    return make


def trl_loss(batch: Batch, loss_type: str | list[str], **options: Any) -> tuple[Tensor, Tensor]:
    """TRL's loss (a mean over pairs), and its slope for every sequence [2P]."""
    from trl.trainer.dpo_trainer import DPOTrainer

    types = [loss_type] if isinstance(loss_type, str) else loss_type
    tau = options.pop("discopop_tau", 0.05)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        args=SimpleNamespace(discopop_tau=tau),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        beta=BETA,
        loss_types=types,
        **{"label_smoothing": 0.0, "loss_weights": [1.0] * len(types), **options},
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    tokens = batch.tokens.clone().requires_grad_()
    scored = batch.completion_mask[:, 1:]
    outputs = SimpleNamespace(
        log_probs=tokens * scored,
        entropy=torch.zeros_like(tokens),
        mean_logits=torch.zeros_like(tokens),
        is_top1=torch.zeros_like(scored, dtype=torch.bool),
    )
    ref_chosen, ref_rejected = batch.ref.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(batch.completion_mask),
        "attention_mask": torch.ones_like(batch.completion_mask),
        "completion_mask": batch.completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    loss.backward()
    # Every scored token of a sequence has the same slope.
    slopes = tokens.grad.sum(1) / batch.lengths
    torch.testing.assert_close(tokens.grad, slopes[:, None] * scored)
    return loss.detach(), slopes


def our_loss(batch: Batch, loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    logp, pairs = batch.sums()
    mean = loss(pairs).mean()
    (slopes,) = torch.autograd.grad(mean, logp)
    return mean.detach(), slopes


TRL_LOSSES = {
    "sigmoid": (losses.dpo(BETA), {}),
    "hinge": (losses.hinge(BETA), {}),
    "ipo": (losses.ipo(BETA), {}),
    "exo_pair": (losses.exo_pair(BETA, 0.05), {"label_smoothing": 0.05}),
    "nca_pair": (losses.nca_pair(BETA), {}),
    "robust": (losses.robust(BETA, 0.1), {"label_smoothing": 0.1}),
    "bco_pair": (losses.bco_pair(BETA), {}),
    "sppo_hard": (losses.sppo_hard(BETA), {}),
    "aot": (losses.aot(BETA, 0.1), {"label_smoothing": 0.1}),
    "aot_unpaired": (losses.aot_unpaired(BETA, 0.1), {"label_smoothing": 0.1}),
    "apo_zero": (losses.apo_zero(BETA), {}),
    "apo_down": (losses.apo_down(BETA), {}),
    "discopop": (losses.discopop(BETA, 0.2), {"discopop_tau": 0.2}),
    "sigmoid_norm": (losses.sigmoid_norm(BETA), {}),
}


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], rtol: float = 1e-12):
    assert theirs[1].abs().max() > 1e-4
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_loss_and_gradients_are_trls(loss_type, make_batch):
    loss, options = TRL_LOSSES[loss_type]
    assert type(loss) is losses.LOSSES[loss_type]
    batch = make_batch()
    # TRL rounds exo_pair's label smoothing and its logarithms to fp32.
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-12
    assert_equal(our_loss(batch, loss), trl_loss(batch, loss_type, **options), rtol)


def test_every_shared_name_is_compared():
    import inspect

    from trl.trainer.dpo_trainer import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    known = {name for name in losses.LOSSES if f'loss_type == "{name}"' in source}
    assert known == set(TRL_LOSSES)
    assert set(losses.LOSSES) - known == {"simpo", "r_dpo"}


def test_nll_term_is_trls_where_chosen_lengths_are_equal(make_batch):
    """`sft` is normalised by the batch's chosen tokens, `with_nll` by each response's own."""
    weights = {"loss_weights": [1.0, 0.5]}
    loss = losses.with_nll(losses.dpo(BETA), 0.5)
    even = make_batch(chosen=[3] * 5)
    assert_equal(our_loss(even, loss), trl_loss(even, ["sigmoid", "sft"], **weights))
    uneven = make_batch()
    theirs = trl_loss(uneven, ["sigmoid", "sft"], **weights)
    assert not torch.allclose(our_loss(uneven, loss)[0], theirs[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("loss_type", "loss", "label_smoothing"),
    [("simpo", losses.simpo(BETA, 0.7), 0.0), ("sigmoid", losses.dpo(BETA, 0.2), 0.2)],
)
def test_losses_without_a_reference_are_trls_cpo(loss_type, loss, label_smoothing, make_batch):
    """SimPO; and smoothed DPO (cDPO), which TRL has only here."""
    from trl.experimental.cpo import CPOTrainer

    batch = make_batch()
    batch.ref = torch.zeros_like(batch.ref)
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=BETA,
        loss_type=loss_type,
        simpo_gamma=0.7,
        label_smoothing=label_smoothing,
        accelerator=ACCELERATOR,
    )
    logp, _ = batch.sums()
    # Its get_batch_logps averages over tokens for SimPO.
    per_token = logp / batch.lengths if loss_type == "simpo" else logp
    mean = CPOTrainer.cpo_loss(trainer, *per_token.chunk(2))[0].mean()
    theirs = (mean.detach(), *torch.autograd.grad(mean, logp))
    assert_equal(our_loss(batch, loss), theirs)
