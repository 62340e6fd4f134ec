import math
from dataclasses import replace

import pytest
import torch

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.train.sft import train_sft

CONFIG = TrainConfig(
    learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=8, logging_steps=2
)
ONE_STEP = replace(CONFIG, num_train_epochs=1, per_device_train_batch_size=24)


def _train(model, rows, config, seed=0):
    logs = []
    summary = train_sft(model, rows, config, seed=seed, pad_id=0, log=logs.append)
    return summary, logs


@pytest.fixture
def gradients(monkeypatch):
    """What `train_sft` hands to the optimiser at its only step, by parameter name."""

    def of(model, rows, config):
        found = {}

        def step(optimizer, loss, factor):
            assert not found, "more than one step"
            names = {p: n for n, p in model.named_parameters()}
            found.update({names[p]: p.grad.clone() for p in optimizer.params})
            optimizer._adamw.zero_grad()
            return torch.zeros(()), torch.tensor(True)

        with monkeypatch.context() as patch:
            patch.setattr("srlm_fast.train.optim.Optimizer.step", step)
            summary, _ = _train(model, rows, config)
        return found, summary["loss_first"]

    return of


def test_loss_and_gradients_are_the_mean_over_response_tokens(
    make_model, rows, gradients, response_logps
):
    """Two known defects elsewhere: unshifted targets, and an inverted mask that put the loss on
    the prompt."""
    model, twin = make_model(), make_model()
    found, loss = gradients(model, rows, ONE_STEP)
    logps = torch.cat([response_logps(twin, prompt, response) for prompt, response in rows])
    expected = -logps.mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)  # metrics are fp32
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-10, rtol=1e-10)


def test_prompt_tokens_carry_no_loss(make_model, rows, gradients, response_logps):
    """A token that occurs only as a prompt's next token must not be pushed up."""
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    marked = [((*prompt, 60), tuple(min(t, 59) for t in response)) for prompt, response in rows]
    found, _ = gradients(model, marked, ONE_STEP)
    # Softmax pushes a token down (positive gradient along its logit) unless it is a target.
    logit_push = found["lm_head.weight"][60]
    hidden = [
        (model.model(torch.tensor([[*p, *r]])).last_hidden_state[0, len(p) - 1 : -1]).detach()
        for p, r in marked
    ]
    hidden = torch.cat(hidden)
    probs = (hidden @ model.lm_head.weight.T).softmax(-1)[:, 60]
    torch.testing.assert_close(logit_push, (probs @ hidden / len(hidden)).detach())


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("micro", [0, 5, 1])
def test_layout_and_accumulation_do_not_change_the_gradients(
    make_model, rows, gradients, layout, micro
):
    one, _ = gradients(make_model(), rows, ONE_STEP)
    other, _ = gradients(
        make_model(), rows, replace(ONE_STEP, layout=layout, micro_batch_size=micro)
    )
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, atol=1e-10, rtol=1e-10)


def test_the_final_eos_is_trained(make_model, rows, gradients):
    """An EOS that was in the response pulls its logit up; without one nothing does."""
    without = [(p, tuple(t for t in r if t != 1)) for p, r in rows]
    pulls = []
    for data in (without, [(p, (*r, 1)) for p, r in without]):
        model = make_model()
        model.lm_head = torch.nn.Linear(32, 61, dtype=torch.float64)
        found, _ = gradients(model, data, ONE_STEP)
        pulls.append(found["lm_head.bias"][1].item())
    assert pulls[0] > 0 > pulls[1]


def test_training_lowers_the_loss_and_says_so(make_model, rows):
    summary, logs = _train(make_model(dtype=torch.float32), rows, CONFIG)
    assert summary["steps"] == 6 and summary["rows"] == 24 and summary["dropped"] == {}
    assert summary["num_tokens"] == 2 * sum(len(p) + len(r) for p, r in rows)
    assert summary["loss_last"] < 0.9 * summary["loss_first"]
    assert [row["step"] for row in logs] == [2, 4, 6]
    assert [row["epoch"] for row in logs] == pytest.approx([2 / 3, 4 / 3, 2])
    assert set(logs[0]) == {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens"}


def test_logged_loss_is_the_mean_of_its_steps_and_the_last_step_is_logged(make_model, rows):
    single = _train(make_model(), rows, replace(CONFIG, logging_steps=1))[1]
    grouped = _train(make_model(), rows, replace(CONFIG, logging_steps=4))[1]
    assert [row["step"] for row in grouped] == [4, 6]
    for row, part in zip(grouped, (single[:4], single[4:]), strict=True):
        for name in ("loss", "grad_norm"):
            mean = sum(r[name] for r in part) / len(part)
            assert row[name] == pytest.approx(mean, rel=1e-5)
    for row in (*single, *grouped):  # the rate of the row's last step, which makes the first 1
        rate = 1e-2 * (0.2 + 0.4 * (1 + math.cos(math.pi * (row["step"] - 1) / 6)))
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-12)


def test_two_runs_are_equal_bit_for_bit_and_seeds_differ(make_model, rows):
    models = [make_model(dtype=torch.float32) for _ in range(3)]
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        _train(model, rows, CONFIG, seed=seed)
    assert torch.equal(state, torch.random.get_rng_state())
    first, second, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_dropout_is_off_and_the_mode_comes_back(make_model, rows):
    plain, dropping = make_model(), make_model().train()
    dropping.config.attention_dropout = 0.5
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.5
    dropping.model.layers[0].eval()
    modes = [m.training for m in dropping.modules()]
    losses = [_train(m, rows, CONFIG)[0]["loss_first"] for m in (plain, dropping)]
    assert losses[0] == losses[1]
    assert not plain.training and [m.training for m in dropping.modules()] == modes


def test_long_rows_are_dropped_and_counted(make_model, rows):
    config = replace(CONFIG, max_length=9)
    kept = [row for row in rows if sum(map(len, row)) <= 9]
    summary, _ = _train(make_model(), rows, config)
    assert 0 < len(kept) < len(rows)
    assert summary["rows"] == len(kept)
    assert summary["dropped"] == {"too_long": len(rows) - len(kept)}
    too_long_for_the_model = [((3,) * 60, (4,) * 5)]
    with pytest.raises(UserError, match="now 64 tokens"):
        _train(make_model(), too_long_for_the_model, CONFIG)


def test_a_hopeless_learning_rate_ends_in_a_sentence(make_model, rows):
    config = replace(CONFIG, learning_rate=1e38, num_train_epochs=6)
    with pytest.raises(UserError, match="lower learning_rate"):
        _train(make_model(dtype=torch.float32), rows, config)


def test_one_bad_batch_is_skipped_and_left_out_of_the_metrics(make_model, rows):
    model = make_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = math.nan
    # Untied, so that only the rows which read token 60 are poisoned.
    model.lm_head.weight = torch.nn.Parameter(make_model(dtype=torch.float32).lm_head.weight)
    safe = [(tuple(min(t, 59) for t in p), tuple(min(t, 59) for t in r)) for p, r in rows]
    poisoned = [((60,), (5, 6)), *safe[1:]]
    config = replace(CONFIG, num_train_epochs=1, logging_steps=3)
    summary, logs = _train(model, poisoned, config)
    assert summary["skipped_steps"] == 1
    assert all(math.isfinite(value) for row in logs for value in row.values())
    assert model.model.norm.weight.isfinite().all()
