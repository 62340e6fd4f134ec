"""Adapters on two ranks train as on one, and a training that is stopped goes on."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from srlm_fast.config import TrainConfig
from srlm_fast.parallel import ALONE
from srlm_fast.train.preference import train_preference
from srlm_fast.train.sft import train_sft
from tests.srlm_kernels import ranks as processes
from tests.train.test_lora import BASE, CONFIG, REFINE, adapted, policy_of
from tests.train.test_parallel import assert_goes_on, assert_same, here, shared_folder
from tests.train.tiny import draw_pairs, draw_rows

SFT = TrainConfig(learning_rate=3e-3, per_device_train_batch_size=7, logging_steps=3)
CUT = replace(CONFIG, micro_batch_size=1, gradient_checkpointing=True)


def weights(model):
    return torch.cat([p.detach().flatten() for p in policy_of(model).values()])


def assert_base_is_as_it_was(ours):
    for name, weight in adapted("llama", ours.model.dtype).model.named_parameters():
        if not weight.requires_grad:
            assert torch.equal(ours.model.get_parameter(name), weight), name


def tuned(ranks, config=SFT, folder=None, dtype=torch.float64):
    ours, logs = adapted("llama", dtype), []
    summary = train_sft(
        ours.model, draw_rows(), config, seed=0, pad_id=0, log=logs.append, ranks=ranks,
        eval_rows=draw_rows()[:5], checkpoint=folder,
    )  # fmt: skip
    assert_base_is_as_it_was(ours)
    return weights(ours.model), summary, logs


def preferred(ranks, config=CONFIG, refine=None, *, fixed=False, folder=None, dtype=torch.float64):
    ours, logs = adapted("llama", dtype), []
    summary = train_preference(
        ours.model, ours.frozen(BASE if fixed else None), draw_pairs(), config, refine=refine,
        seed=0, pad_id=0, log=logs.append, ranks=ranks, reference_is_start=not fixed,
        eval_pairs=draw_pairs()[:5], cache=folder, checkpoint=folder,
    )  # fmt: skip
    assert_base_is_as_it_was(ours)
    return weights(ours.model), summary, logs


def sft_is_that_of_one_rank():
    for config in (SFT, replace(SFT, micro_batch_size=2, gradient_checkpointing=True)):
        assert_same(tuned(here(), config), tuned(ALONE, config))


def dpo_is_that_of_one_rank():
    for config, fixed in ((CONFIG, False), (replace(CUT, eval_steps=3), True)):
        assert_same(preferred(here(), config, fixed=fixed), preferred(ALONE, config, fixed=fixed))


def spa_is_that_of_one_rank():
    for refine in (REFINE, replace(REFINE, tau="dataset", interval=2)):
        found = preferred(here(), CUT, refine)
        assert_same(found, preferred(ALONE, CUT, refine))
        assert {True, False} <= set(found[1]["flags"])


def references_may_be_cached():
    for kind, refine in (("logps", None), ("states", REFINE)):
        config = replace(CONFIG, reference_cache=kind)
        with shared_folder() as folder:
            found = preferred(here(), config, refine, folder=folder / "shared")
            alone = preferred(ALONE, config, refine, folder=folder / f"alone-{here().rank}")
            assert_same(found, alone)


def sixteen_bit_adapters_stay_the_same_on_all_ranks():
    found, summary, _ = preferred(here(), dtype=torch.bfloat16)
    assert all(torch.equal(other, found) for other in here().gather([found]))
    assert summary["loss_last"] < summary["loss_first"]


def a_training_that_is_stopped_goes_on():
    """From checkpoints of adapters and their moments alone."""
    ranks = here()

    def sft(dtype, folder, save_steps):
        return tuned(ranks, replace(SFT, save_steps=save_steps, eval_steps=4), folder, dtype)

    def spa(cache, fixed, folder, save_steps):
        config = replace(CUT, save_steps=save_steps, logging_steps=4, reference_cache=cache)
        return preferred(ranks, config, REFINE, fixed=fixed, folder=folder, dtype=torch.float32)

    for train in (
        partial(sft, torch.float32), partial(sft, torch.bfloat16),
        partial(spa, "none", False), partial(spa, "none", True), partial(spa, "states", False),
    ):  # fmt: skip
        assert_goes_on(train)


CHECKS = {
    1: [a_training_that_is_stopped_goes_on],
    2: [
        sft_is_that_of_one_rank,
        dpo_is_that_of_one_rank,
        spa_is_that_of_one_rank,
        references_may_be_cached,
        sixteen_bit_adapters_stay_the_same_on_all_ranks,
        a_training_that_is_stopped_goes_on,
    ],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return processes.start(__file__, tmp_path_factory.mktemp("ranks"))


@processes.each(CHECKS)
def test_ranks(world, check, outputs):
    processes.assert_passed(check, outputs[world])


if __name__ == "__main__":
    processes.main(CHECKS)
