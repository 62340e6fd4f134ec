"""Every argument that does not fit is refused with a sentence that names it."""

import pytest
import torch

from srlm_kernels import linear_logp, linear_preference_loss, losses

T, D, V = 4, 3, 5
LOGP = {
    "hidden": torch.zeros(T, D),
    "weight": torch.zeros(V, D),
    "target": torch.zeros(T, dtype=torch.int64),
}
LOSS = {**LOGP, "cu_seqlens": torch.tensor([0, 1, 2, 2, 4]), "loss_fn": losses.dpo(0.1)}

BAD_PROJECTION = [
    (TypeError, r"hidden must be a 2-D float tensor, got 3-D", {"hidden": torch.zeros(1, T, D)}),
    (TypeError, r"weight must be a 2-D float", {"weight": torch.zeros(V, D, dtype=torch.int8)}),
    (ValueError, r"weight must have shape \[5, 3\]", {"weight": torch.zeros(V, D + 1)}),
    (ValueError, r"bias must have shape \[5\]", {"bias": torch.zeros(D)}),
    (ValueError, r"target must have shape \[4\]", {"target": torch.zeros(3, dtype=torch.int64)}),
    (TypeError, r"target must be a 1-D int", {"target": torch.zeros(T)}),
    (ValueError, r"target must have shape \[2\]", {"rows": torch.tensor([0, 1])}),
    (TypeError, r"rows must be a 1-D int.*got 1-D bool", {"rows": torch.ones(T).bool()}),
    (ValueError, r"softcap must be positive", {"softcap": 0.0}),
    (ValueError, r"softcap must be positive and finite", {"softcap": float("inf")}),
    (ValueError, r"chunk_rows must be at least 1, got 0", {"chunk_rows": 0}),
    (ValueError, r"chunk_rows must be at least 1, got -7", {"chunk_rows": -7}),
    (ValueError, r"outputs must be names without repetition", {"outputs": "entropy"}),
    (ValueError, r"outputs must be names without repetition", {"outputs": ["entropy"] * 2}),
    (ValueError, r"weight is empty, shape \[0, 3\]", {"weight": torch.zeros(0, D)}),
    (ValueError, r"bias .*cpu.*meta|bias .*meta.*cpu", {"bias": torch.zeros(V, device="meta")}),
    (TypeError, r"logits_dtype must be a float dtype", {"logits_dtype": torch.int32}),
    (ValueError, r"unknown outputs \['perplexity'\]; known: entropy", {"outputs": ["perplexity"]}),
    (TypeError, r"process_group must be a torch.distributed group", {"process_group": object()}),
    (ValueError, r"need ref_hidden", {"ref_weight": torch.zeros(V, D)}),
    (ValueError, r"extrapolation needs ref_hidden", {"extrapolation": 0.0}),
    (ValueError, r"ref_hidden must have shape", {"ref_hidden": torch.zeros(T + 1, D)}),
    (
        ValueError,
        r"share one vocabulary, got 5 and 6 rows",
        {"ref_hidden": torch.zeros(T, D), "ref_weight": torch.zeros(V + 1, D)},
    ),
    *(
        (
            ValueError,
            r"extrapolation must be finite and >= 0",
            {"ref_hidden": torch.zeros(T, D), "extrapolation": strength},
        )
        for strength in (-0.5, float("nan"), float("inf"))
    ),
]

BAD_PAIRS = [
    (TypeError, r"cu_seqlens must be a 1-D int", {"cu_seqlens": torch.zeros(5)}),
    (ValueError, r"2P\+1 offsets .* got 4", {"cu_seqlens": torch.tensor([0, 1, 2, 4])}),
    (ValueError, r"2P\+1 offsets .* got 0", {"cu_seqlens": torch.tensor([], dtype=torch.int64)}),
    (ValueError, r"rise from 0 to the 4 rows", {"cu_seqlens": torch.tensor([0, 1, 3])}),
    (ValueError, r"rise from 0 to the 4 rows", {"cu_seqlens": torch.tensor([0, 5, 4])}),
    (ValueError, r"pair\['w'\] must have shape \[2\]", {"pair": {"w": torch.zeros(4)}}),
    (ValueError, r"scale must have shape \[\]", {"scale": torch.ones(1)}),
    (
        ValueError,
        r"scale requires a gradient, which this op does not give",
        {"scale": torch.ones((), requires_grad=True)},
    ),
    (
        ValueError,
        r"pair\['label_smoothing'\] requires a gradient, which this op does not give",
        {"pair": {"label_smoothing": torch.zeros(2, requires_grad=True)}},
    ),
    (ValueError, r"ref_logp must have shape \[4\]", {"ref_logp": torch.zeros(2)}),
    (
        ValueError,
        r"ref_hidden or ref_logp, not both",
        {"ref_logp": torch.zeros(4), "ref_hidden": torch.zeros(T, D)},
    ),
    (
        ValueError,
        r"which ref_logp cannot give",
        {"ref_logp": torch.zeros(4), "extrapolation": 0.5},
    ),
    (ValueError, r"grad_weight_out must have shape", {"grad_weight_out": torch.zeros(D, V)}),
    (
        TypeError,
        r"grad_weight_out must be torch.float32",
        {"grad_weight_out": torch.zeros(V, D, dtype=torch.bfloat16)},
    ),
    (
        ValueError,
        r"one loss per pair, shape \[2\], got \[\]",
        {"loss_fn": lambda s: s.margin.mean()},
    ),
    (ValueError, r"one loss per pair, shape \[2\], got None", {"loss_fn": lambda s: None}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD_PROJECTION)
def test_both_ops_refuse_a_bad_projection(error, message, change):
    with pytest.raises(error, match=message):
        linear_logp(**{**LOGP, **change})
    with pytest.raises(error, match=message):
        linear_preference_loss(**{**LOSS, **change})


@pytest.mark.parametrize(("error", "message", "change"), BAD_PAIRS)
def test_bad_pairs_are_refused(error, message, change):
    with pytest.raises(error, match=message):
        linear_preference_loss(**{**LOSS, **change})


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logp(**LOGP, temperature=0.0)


def test_the_unchanged_arguments_are_accepted():
    assert linear_logp(**LOGP).logp.shape == (T,)
    assert linear_preference_loss(**LOSS).losses.shape == (2,)


@pytest.mark.parametrize("token", [-1, V])
def test_a_target_outside_the_vocabulary_is_an_error(token):
    with pytest.raises(IndexError, match="out of bounds"):
        linear_logp(**{**LOGP, "target": torch.tensor([0, token, 1, 2])})
