"""Which items are trained on, in which order, and which of them share a forward."""

import random
from itertools import pairwise

import pytest

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.parallel import Ranks
from srlm_fast.train.plan import MicroBatches, longest_row, plan_steps, usable_items


def test_unusable_items_are_counted_by_reason():
    items = [(((1, 2), (3,)),), (((), (3,)),), (((1,), ()),), (((1, 2), (3, 4)),)]
    kept, dropped = usable_items(items, max_length=3)
    assert kept == [0]
    assert dropped == {"empty": 2, "too_long": 1}


def test_a_pair_is_too_long_if_either_row_is():
    item = (((1,), (2,)), ((1,), (2, 3, 4)))
    with pytest.raises(
        UserError, match=r"all 1 .*'too_long': 1.*max_length \(now 3 tokens\).*context"
    ):
        usable_items([item], max_length=3)
    with pytest.raises(UserError, match="rows that have a prompt and a response"):
        usable_items([(((1,), ()),)], max_length=3)
    assert usable_items([item], max_length=4) == ([0], {})


def test_nothing_to_train_on_is_a_user_error():
    with pytest.raises(UserError, match="empty"):
        usable_items([], max_length=9)


def test_every_epoch_sees_every_item_once_in_its_own_reproducible_order(rows):
    config = TrainConfig(num_train_epochs=2, per_device_train_batch_size=5)
    kept = [i for i in range(len(rows)) if i != 7]
    plan = plan_steps(kept, config, seed=3)
    assert [len(step) for step in plan] == [5, 5, 5, 5, 3] * 2
    epochs = [[i for step in plan[k : k + 5] for i in step] for k in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == kept
    assert epochs[0] != epochs[1]
    assert plan == plan_steps(kept, config, seed=3)
    assert plan != plan_steps(kept, config, seed=4)


def test_the_plan_leaves_the_global_generator_alone():
    state = random.getstate()
    plan_steps(range(9), TrainConfig(), seed=0)
    assert random.getstate() == state


def item(prompt, *responses):
    """With as many tokens."""
    return tuple(((1,) * prompt, (2,) * n) for n in responses)


ITEMS = [item(4, 3, 2), item(5, 1, 2), item(1, 1, 1), item(9, 1, 1)]


@pytest.mark.parametrize(
    ("layout", "tokens"), [("shared", [9, 8, 3, 11]), ("padded", [14, 14, 4, 20])]
)
def test_tokens_of_a_forward(layout, tokens):
    micros = MicroBatches(ITEMS, TrainConfig(), layout)
    assert [micros.tokens([i]) for i in range(4)] == tokens
    assert micros.tokens([0, 3]) == (20 if layout == "shared" else 40)
    different = MicroBatches([(((1,), (2,)), ((3,), (2,)))], TrainConfig(), layout)
    assert different.tokens([0]) == 4


def test_micro_batches_group_similar_lengths_within_limits():
    def split(layout="shared", **limits):
        config = TrainConfig(**{f"micro_batch_{name}": n for name, n in limits.items()})
        return MicroBatches(ITEMS, config, layout).split(range(4))

    assert split() == [[2, 0, 1, 3]]
    assert split(size=3) == [[2, 0, 1], [3]]
    assert split(tokens=12) == [[2, 0], [1], [3]]
    assert split(tokens=1) == [[2], [0], [1], [3]], "an item at least"
    assert split("padded", tokens=42) == [[2, 0, 1], [3]], "six rows of seven tokens"


def test_halving_cuts_what_it_can_beside_an_item_that_is_longer_than_the_limit():
    items = [item(5, 5)] * 99 + [item(500, 500)]
    micros, counts = MicroBatches(items, TrainConfig(), "shared"), []
    with pytest.raises(UserError, match="out of memory with a single item of 1000 tokens"):
        for _ in range(20):
            counts.append(len(micros.split(range(100))))
            micros.halve(range(100))
    assert counts[0] == 1 and counts[-1] == 100
    assert all(a < b for a, b in pairwise(counts))


def test_halving_ends_at_single_items():
    micros = MicroBatches(ITEMS, TrainConfig(), "shared")
    sizes = [len(micros.split(range(4)))]
    with pytest.raises(UserError, match=r"out of memory with a single item of 11 tokens.*checkp"):
        for _ in range(9):
            micros.halve(range(4))
            sizes.append(len(micros.split(range(4))))
    assert sizes[0] == 1 and sizes == sorted(sizes) and sizes[-1] == 4


def test_a_pass_has_no_more_at_once_than_a_step_has_on_one_rank():
    """It had the whole step of all ranks, several times the memory of what is trained on."""
    items = [item(3, 2, 2) for _ in range(8)]
    for batch, world, size in ((4, 1, 4), (4, 2, 2), (4, 8, 1)):
        config = TrainConfig(per_device_train_batch_size=batch)
        micro_batches = MicroBatches(items, config, "shared", Ranks(0, world))
        forwards = micro_batches.forwards(range(8))
        assert [len(micro) for micro in forwards] == [size] * (8 // size)
        assert [len(micro) for micro in micro_batches.forwards(range(8), kept=True)] == [4, 4]


@pytest.mark.parametrize(("asked", "longest"), [(0, 64), (10, 10), (1000, 64)])
def test_no_row_is_longer_than_the_models_positions(make_model, asked, longest):
    """A larger max_length let rows through for which a table of positions has no entries."""
    assert longest_row(make_model(), TrainConfig(max_length=asked)) == longest
