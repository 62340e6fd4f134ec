"""Memory that runs out where weights are sharded ends all processes; called again, they go on."""

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE
from srlm_fast.train.plan import MicroBatches
from srlm_fast.train.preference import PreferenceSteps
from tests.srlm_kernels import ranks as processes
from tests.train.test_parallel import REFINE, assert_same, here, states
from tests.train.test_sharded import CONFIG, preferred

# Two epochs of eight and four pairs. Eight have 35 tokens on each of four ranks, 67 on one of two.
CONFIG = replace(CONFIG, per_device_train_batch_size=8)
ROOM = 34


def full(batch, found):
    """The last rank has room for so many tokens in a forward."""
    if here().rank == here().world - 1 and batch.num_tokens > ROOM:
        raise torch.OutOfMemoryError("no room")
    return found


def folder(name):
    """The same on all ranks, and for the checks that other numbers of ranks make later."""
    return Path(sys.argv[1]) / name


def ends(train, name, words, rank=-1):
    """That rank says why, and the others do not wait for it once its process has ended."""
    full = here().rank == rank % here().world
    kind = UserError if full else RuntimeError
    with pytest.raises(kind, match=words if full else None):
        train()
    print("passed", name, flush=True)
    os._exit(0)


def a_step_on_one_rank_ends_all():
    with states(full):
        ends(
            lambda: preferred(here(), CONFIG, REFINE, cache=folder("spa")),
            "a_step_on_one_rank_ends_all",
            r"resume it, and it has at most \d+ tokens",
        )


def it_goes_on_in_smaller_parts():
    """On however many ranks; the other one left no word."""
    (left,) = folder("spa").glob("forwards-*.json")
    assert left.name == "forwards-1.json" and 0 < json.loads(left.read_text()) <= ROOM
    with states(full):
        found = preferred(here(), CONFIG, REFINE, cache=folder("spa"))
    assert_same(found, preferred(ALONE, CONFIG, REFINE))


def an_evaluation_on_one_rank_ends_all():
    config, plain = replace(CONFIG, eval_steps=2), PreferenceSteps.eval_sums

    def limited(self, indices):
        if here().main and len(indices) > 1:
            raise torch.OutOfMemoryError("no room")
        return plain(self, indices)

    with (
        mock.patch.object(PreferenceSteps, "eval_sums", limited),
        warnings.catch_warnings(record=True),
    ):
        ends(
            lambda: preferred(here(), config, cache=folder("dpo")),
            "an_evaluation_on_one_rank_ends_all",
            "resume it",
            rank=0,
        )


def without_a_folder_the_setting_is_named():
    with states(full):
        ends(
            lambda: preferred(here(), CONFIG),
            "without_a_folder_the_setting_is_named",
            r"set micro_batch_tokens to \d+$",
        )


# One that ends its processes is the last of them.
CHECKS = {
    2: [a_step_on_one_rank_ends_all],
    3: [it_goes_on_in_smaller_parts, an_evaluation_on_one_rank_ends_all],
    4: [it_goes_on_in_smaller_parts, without_a_folder_the_setting_is_named],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return processes.start(__file__, tmp_path_factory.mktemp("ranks"))


@processes.each(CHECKS)
def test_ranks(world, check, outputs):
    processes.assert_passed(check, outputs[world])


def test_a_limit_that_was_left_is_for_sharded_weights_alone(tmp_path):
    sharded = replace(ALONE, sharded=True)
    config = replace(CONFIG, micro_batch_tokens=40)

    def limit(ranks):
        return MicroBatches([], config, "padded", ranks, tmp_path).max_tokens

    assert limit(sharded) == 40
    for rank, text in enumerate(("30", "25", "", "[", "90")):
        (tmp_path / f"forwards-{rank}.json").write_text(text)
    assert limit(sharded) == 25 and limit(ALONE) == 40


if __name__ == "__main__":
    processes.main(CHECKS)
