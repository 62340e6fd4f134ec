import random

import pytest
import torch

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.forward import hidden_states
from srlm_fast.train.batches import collate, plan_steps, usable_items

ROWS = [((5, 6, 7), (8, 9)), ((4,), (3, 2, 1))]


def test_collate_padded_is_what_the_docstring_says():
    batch = collate(ROWS, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.rows.tolist() == [2, 3, 5, 6, 7]
    assert batch.target.tolist() == [8, 9, 3, 2, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert batch.num_tokens == 9


def test_collate_packed_is_what_the_docstring_says():
    batch = collate(ROWS, pad_id=0, layout="packed")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.rows.tolist() == [2, 3, 5, 6, 7]
    assert batch.target.tolist() == [8, 9, 3, 2, 1]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_each_target_is_predicted_by_the_token_before_it(rows, layout):
    """A known defect elsewhere: token t gathered from the logits at t, unshifted."""
    batch = collate(rows, pad_id=0, layout=layout)
    flat = batch.input_ids.flatten()
    assert flat[batch.rows + 1].tolist() == batch.target.tolist()
    first = batch.rows[batch.cu_seqlens[:-1].long()]
    assert flat[first].tolist() == [prompt[-1] for prompt, _ in rows]


# Eager attention has its softmax in fp32 whatever the inputs are.
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-5)])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("training", [True, False])
def test_sequences_see_neither_padding_nor_each_other(
    make_model, rows, attention, tolerance, layout, sliding_window, training
):
    """transformers builds the block-diagonal mask from position_ids alone, batch 1, no cache."""
    model = make_model(attention=attention, sliding_window=sliding_window).train(training)
    batch = collate(rows, pad_id=0, layout=layout)
    hidden = hidden_states(model, batch.input_ids, position_ids=batch.position_ids).flatten(0, 1)
    alone = [hidden_states(model, torch.tensor([[*p, *r]]))[0, len(p) - 1 : -1] for p, r in rows]
    torch.testing.assert_close(hidden[batch.rows], torch.cat(alone), atol=tolerance, rtol=0)


def test_eos_is_trained_when_present_and_never_added(rows):
    batch = collate(rows, pad_id=0)
    ends = batch.cu_seqlens.tolist()
    for i, (_, response) in enumerate(rows):
        assert batch.target[ends[i] : ends[i + 1]].tolist() == list(response)
    assert 0 < sum(r[-1] == 1 for _, r in rows) < len(rows)


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
    items = [(row,) for row in rows]
    config = TrainConfig(num_train_epochs=2, per_device_train_batch_size=5, micro_batch_size=2)
    kept = [i for i in range(len(items)) if i != 7]
    plan = plan_steps(items, kept, config, seed=3)
    assert len(plan) == 10
    assert [len(m) for m in plan[0]] == [2, 2, 1]
    epochs = [[i for step in plan[k : k + 5] for m in step for i in m] for k in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == kept
    assert epochs[0] != epochs[1]
    assert plan == plan_steps(items, kept, config, seed=3)
    assert plan != plan_steps(items, kept, config, seed=4)


def test_the_plan_leaves_the_global_generator_alone(rows):
    state = random.getstate()
    plan_steps([(row,) for row in rows], range(9), TrainConfig(), seed=0)
    assert random.getstate() == state


def test_micro_batches_group_similar_lengths_within_a_step(rows):
    items = [(row,) for row in rows]
    config = TrainConfig(per_device_train_batch_size=24, micro_batch_size=6, num_train_epochs=1)
    (step,) = plan_steps(items, range(24), config, seed=0)
    lengths = [[sum(map(len, rows[i])) for i in micro] for micro in step]
    assert [n for micro in lengths for n in micro] == sorted(n for m in lengths for n in m)
