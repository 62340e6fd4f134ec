"""8-bit moments and random rounding: torchao's where it is installed, and a stand-in everywhere."""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_fast import installed
from srlm_fast.config import Config, PreferenceConfig, TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.weights import frozen_copy
from srlm_fast.parallel import Ranks
from srlm_fast.rounds.plan import check_training
from srlm_fast.train import low_bit
from srlm_fast.train.memory import optimizer_bytes
from srlm_fast.train.optim import Optimizer
from srlm_fast.train.preference import train_preference

CPU = torch.device("cpu")
EIGHT = TrainConfig(optim="adamw_torch_8bit", learning_rate=1e-3, max_grad_norm=0.0)
ROUNDED = replace(EIGHT, bf16_stochastic_rounding=True)


class StandIn(torch.optim.Optimizer):
    """What torchao's class is to us: rates that are tensors, no `found_inf`, global randomness."""

    def __init__(self, params, lr, betas, bf16_stochastic_round):
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "weight_decay": 0.0})
        self.rounds = bf16_stochastic_round

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._one(p, group)

    def _one(self, p, group):
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": torch.tensor(0.0), "m": p * 0, "v": p * 0}
        state["step"] += 1
        m = state["m"].float().lerp(p.grad, 1 - b1)
        v = state["v"].float().lerp(p.grad.square(), 1 - b2)
        state["m"].copy_(m), state["v"].copy_(v)
        m, v = m / (1 - b1 ** state["step"]), v / (1 - b2 ** state["step"])
        new = p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * m / (v.sqrt() + 1e-8)
        if self.rounds and p.dtype == torch.bfloat16:
            new = new.view(torch.int32) + torch.randint(1 << 16, p.shape, dtype=torch.int32)
            new = (new & -65536).view(torch.float32)
        p.copy_(new)


@pytest.fixture(params=["stand-in", "torchao"])
def library(request, monkeypatch):
    """torchao without its compiler, which has a test of its own."""
    if request.param == "torchao":
        found = installed.probe("torchao", *installed.OPTIONAL["torchao"])
        if not found[0].isdigit() or "not load" in found:
            pytest.skip(f"torchao: {found}")
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        return
    module = types.ModuleType("torchao")
    module.optim = types.ModuleType("torchao.optim")
    module.optim.AdamW8bit, module.__version__ = StandIn, "0"
    monkeypatch.setitem(sys.modules, "torchao", module)
    monkeypatch.setitem(sys.modules, "torchao.optim", module.optim)
    monkeypatch.setattr(low_bit, "require", lambda extra: None)


def layer(dtype=torch.bfloat16, size=(64, 64)):
    made = torch.nn.Linear(*reversed(size), dtype=dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.weight.copy_(torch.randn(size, generator=g))
        made.bias.zero_()
    return made


def step(module, optimizer, seed, *, loss=1.0, factor=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
    optimizer.collect()
    return optimizer.step(torch.tensor(loss), factor)


def after(config, seed=0, steps=4, dtype=torch.bfloat16):
    module = layer(dtype)
    optimizer = Optimizer(module, config, seed=seed)
    for i in range(steps):
        step(module, optimizer, i)
    return module


def test_close_to_adamw(library):
    whole = replace(EIGHT, optim="adamw_torch", weight_decay=0.5)
    expected = after(whole, dtype=torch.float32)
    found = after(replace(EIGHT, weight_decay=0.5), dtype=torch.float32)
    start = layer(torch.float32).weight
    moved, off = expected.weight - start, found.weight - expected.weight
    assert moved.norm() > 0 and off.norm() < 0.1 * moved.norm()


def test_clipping_and_schedule_reach_it(library):
    module = layer(torch.float32)
    optimizer = Optimizer(module, replace(EIGHT, max_grad_norm=1.0))
    norm, taken = step(module, optimizer, 0, factor=0.25)
    assert norm > 50 and bool(taken)
    moved = (module.weight - layer(torch.float32).weight).abs()
    assert moved.max().item() == pytest.approx(0.25e-3, rel=0.01)


def test_masters_only_where_nothing_is_rounded(library):
    for config, dtypes in (
        (EIGHT, [torch.float32] * 2),
        (ROUNDED, [torch.bfloat16, torch.float32]),
    ):
        module = layer()
        optimizer = Optimizer(module, config)
        assert [m.dtype for m in optimizer.masters] == dtypes
        shared = optimizer.masters[0].data_ptr() == module.weight.data_ptr()
        assert shared == (config is ROUNDED)
        start, version = module.weight.detach().clone(), module.weight._version
        for i in range(3):
            step(module, optimizer, i)
        assert not torch.equal(module.weight, start) and module.weight._version > version
        assert module.weight.dtype == torch.bfloat16 and module.weight.grad is None


def test_rounding_keeps_small_updates_on_average_and_accumulates_in_fp32(library):
    """Each is far below the resolution of a bf16 weight of size 1."""
    module = layer()
    with torch.no_grad():
        module.weight.fill_(1.0)
    optimizer = Optimizer(module, replace(ROUNDED, learning_rate=1e-4))
    for _ in range(100):
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.collect()
        optimizer.step(torch.tensor(1.0), 1.0)
    moved = 1 - module.weight.double().mean().item()
    assert moved == pytest.approx(0.01, rel=0.1)
    for _ in range(300):  # bf16 would stop counting at 256
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.collect()
    norm, _ = optimizer.step(torch.tensor(1.0), 1.0)
    assert norm.item() == pytest.approx(300 * 64)


def test_seeds_decide_the_rounding(library):
    module, one = layer(), after(ROUNDED, seed=1)
    before = torch.random.get_rng_state()
    step(module, Optimizer(module, ROUNDED), 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(after(ROUNDED, seed=1).weight, one.weight)
    assert not torch.equal(after(ROUNDED, seed=2).weight, one.weight)


def test_a_training_that_goes_on_rounds_as_one_that_was_not_stopped(library):
    """Its next step is told from the optimiser's own state, and skipped ones draw nothing."""
    module, whole = layer(), after(ROUNDED, seed=1, steps=4)
    first = Optimizer(module, ROUNDED, seed=1)
    for i in range(2):
        step(module, first, i)
        step(module, first, i, loss=math.inf)
    second = Optimizer(module, ROUNDED, seed=1)
    second._adamw.load_state_dict(first._adamw.state_dict())
    second.masters[1].copy_(first.masters[1])
    for i in (2, 3):
        step(module, second, i)
    assert torch.equal(module.weight, whole.weight) and torch.equal(module.bias, whole.bias)


def test_a_gradient_that_only_another_rank_has(library):
    class OfTwo(Ranks):
        def any_of_each(self, values):
            return [True for _ in values]

        def sum_(self, tensors):
            for tensor in tensors:
                tensor += 1.0

    module = layer()
    optimizer = Optimizer(module, ROUNDED, OfTwo())
    optimizer.reduce(torch.tensor(0.0))
    norm, _ = optimizer.step(torch.tensor(1.0), 1.0)
    assert norm.item() == pytest.approx(math.sqrt(64 * 65))


@pytest.mark.parametrize("size", [(63, 64), (64, 65), (4096,)])
def test_what_has_no_8bit_moments_keeps_its_master(library, size):
    """torchao gives it moments of its own dtype, and bf16 is too coarse for those."""
    module = layer()
    module.extra = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    optimizer = Optimizer(module, ROUNDED)
    assert [m.dtype for m in optimizer.masters] == [torch.bfloat16, torch.float32, torch.float32]
    step(module, optimizer, 0)
    states = optimizer._adamw.state
    for master in optimizer.masters[1:]:
        moments = [t for key, t in states[master].items() if key != "step"]
        assert {t.dtype for t in moments} == {torch.float32}


def test_another_process_may_have_what_is_rounded(library):
    """All that this one has of the matrix is too small."""

    class Two(Ranks):
        def any(self, flag):
            return True

    share = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    assert Optimizer(share, ROUNDED, Two()).masters[0].dtype == torch.float32
    with pytest.raises(UserError, match=r"its share on a process.*leave it off$"):
        Optimizer(share, ROUNDED)
    with pytest.raises(UserError, match=r"set dtype to bfloat16$"):
        Optimizer(share.float(), ROUNDED)


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(library, where):
    module, twin = layer(), layer()
    optimizers = [Optimizer(m, ROUNDED) for m in (module, twin)]
    for i, good in enumerate((True, False, True)):
        for m, optimizer in zip((module, twin), optimizers, strict=True):
            if good:
                step(m, optimizer, i)
            elif m is module:
                m.weight.grad = torch.full_like(m.weight, math.nan if where == "gradient" else 1.0)
                optimizer.collect()
                _, taken = optimizer.step(torch.tensor(math.nan if where == "loss" else 1.0), 1.0)
                assert not bool(taken)
    assert torch.equal(module.weight, twin.weight) and [int(o.skipped) for o in optimizers] == [
        1,
        0,
    ]


def wide_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def test_a_preference_training(library, pairs):
    found = []
    for config in (ROUNDED, ROUNDED, replace(EIGHT, optim="adamw_torch")):
        model = wide_model()
        settings = {k: getattr(config, k) for k in ("optim", "bf16_stochastic_rounding")}
        train = PreferenceConfig(
            learning_rate=3e-3, num_train_epochs=4, per_device_train_batch_size=6, **settings
        )
        summary = train_preference(
            model, frozen_copy(model), pairs, train, seed=5, pad_id=0, log=lambda row: None
        )
        found.append((summary, [p.clone() for p in model.parameters()]))
    (one, weights), (again, same), (whole, _) = found
    assert one == again and all(map(torch.equal, weights, same))
    assert one["loss_last"] < 0.8 * one["loss_first"]
    assert one["loss_last"] == pytest.approx(whole["loss_last"], abs=0.1)


@pytest.mark.slow
def test_compiled_steps_are_repeated_whether_they_were_compiled_before_or_not():
    pytest.importorskip("torchao.optim", reason="torchao is not installed (extra [torchao])")
    torch.compiler.reset()
    one, again, other = (after(ROUNDED, seed=s, steps=2) for s in (1, 1, 2))
    assert torch.equal(one.weight, again.weight) and torch.equal(one.bias, again.bias)
    assert not torch.equal(one.weight, other.weight)


def test_what_cannot_be_is_said(library, monkeypatch):
    with pytest.raises(UserError, match="bf16_stochastic_rounding needs optim adamw_torch_8bit"):
        TrainConfig(bf16_stochastic_rounding=True)
    with pytest.raises(UserError, match=r"is for bf16 matrices .* and none are trained here"):
        Optimizer(layer(torch.float32), ROUNDED)
    module = layer()
    optimizer = Optimizer(module, ROUNDED)

    def fails():
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(optimizer._adamw, "step", fails)
    with pytest.raises(
        UserError, match=r"torchao .*, compiled for cpu by torch .*no compiler here;"
    ):
        step(module, optimizer, 0)


def test_without_torchao_a_run_does_not_start(monkeypatch):
    monkeypatch.setattr(installed, "probe", lambda *names: "not installed: pip install it")
    run = Config(model="sandbox", preference=PreferenceConfig(optim="adamw_torch_8bit"))
    with pytest.raises(UserError, match="torchao is needed, and cannot be used here: not inst"):
        check_training(run, torch.float32, CPU)
    with pytest.raises(UserError, match="torchao is needed"):
        Optimizer(layer(), EIGHT)
    monkeypatch.setattr(
        installed,
        "probe",
        lambda extra, name, module: installed._version(name) or "unknown version",
    )
    run = Config(model="sandbox", sft=ROUNDED)
    with pytest.raises(UserError, match="this run's are fp32; leave it off, or set --dtype"):
        check_training(run, torch.float32, CPU)
    check_training(run, torch.bfloat16, CPU)


def test_bytes_of_a_weight():
    whole = replace(EIGHT, optim="adamw_torch")
    wide, narrow = torch.float32, torch.bfloat16
    assert [optimizer_bytes(c, wide) for c in (whole, EIGHT)] == [8, 2]
    assert [optimizer_bytes(c, narrow) for c in (whole, EIGHT, ROUNDED)] == [12, 6, 2]
