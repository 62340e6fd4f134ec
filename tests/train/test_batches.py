import pytest
import torch

from srlm_fast.model.forward import hidden_states
from srlm_fast.train.batches import collate
from srlm_kernels import PrefixPlan

ROWS = [((5, 6, 7), (8, 9)), ((4,), (3, 2, 1))]


def test_collate_padded_is_what_the_docstring_says():
    batch = collate(ROWS, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.rows.tolist() == [2, 3, 5, 6, 7]
    assert batch.target.tolist() == [8, 9, 3, 2, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert batch.num_tokens == 9


def test_collate_shared_is_what_the_docstring_says():
    rows = [*ROWS, ((4,), (9,)), ((5, 6, 7), (2,))]
    batch = collate(rows, pad_id=0, layout="shared")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1, 9, 5, 6, 7, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 1, 0, 1, 2, 3]]
    assert batch.rows.tolist() == [2, 3, 5, 6, 7, 5, 12]
    assert batch.target.tolist() == [8, 9, 3, 2, 1, 9, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 6, 7]
    assert batch.num_tokens == 14
    assert batch.plan == PrefixPlan.of([(5, ()), (1, (3, 1)), (4, ())])


@pytest.fixture
def pairs_of_rows(rows):
    """Rows of which every two neighbours have the same prompt."""
    return [(rows[i - i % 2][0], response) for i, (_, response) in enumerate(rows)]


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_each_target_is_predicted_by_the_token_before_it(pairs_of_rows, layout):
    """A known defect elsewhere: token t gathered from the logits at t, unshifted."""
    batch = collate(pairs_of_rows, pad_id=0, layout=layout)
    flat, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    ends = batch.cu_seqlens.tolist()
    for (prompt, response), start, end in zip(pairs_of_rows, ends, ends[1:], strict=False):
        rows = batch.rows[start:end]
        assert flat[rows].tolist() == [prompt[-1], *response[:-1]]
        assert batch.target[start:end].tolist() == list(response)
        place = len(prompt) - 1
        assert positions[rows].tolist() == [*range(place, place + len(response))]


# Eager attention has its softmax in fp32 whatever the inputs are.
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-5)])
@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("training", [True, False])
def test_sequences_see_neither_padding_nor_each_other(
    make_model, pairs_of_rows, attention, tolerance, layout, sliding_window, training
):
    rows = pairs_of_rows
    model = make_model(attention=attention, sliding_window=sliding_window).train(training)
    batch = collate(rows, pad_id=0, layout=layout)
    hidden = batch.states(model)
    assert model.config._attn_implementation == attention
    alone = [hidden_states(model, torch.tensor([[*p, *r]]))[0, len(p) - 1 : -1] for p, r in rows]
    torch.testing.assert_close(hidden[batch.rows], torch.cat(alone), atol=tolerance, rtol=0)


def test_eos_is_trained_when_present_and_never_added(rows):
    batch = collate(rows, pad_id=0)
    ends = batch.cu_seqlens.tolist()
    for i, (_, response) in enumerate(rows):
        assert batch.target[ends[i] : ends[i + 1]].tolist() == list(response)
    assert 0 < sum(r[-1] == 1 for _, r in rows) < len(rows)
