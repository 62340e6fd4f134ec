"""What is said of the implementation that an op takes."""

import pytest
import torch

import srlm_kernels
from srlm_kernels import PrefixPlan, explain, native
from srlm_kernels.explanation import OPS

NATIVE = "cpp" if native.available() else "torch"


def test_it_names_the_implementation_and_what_it_saw():
    line = explain("linear_logp", hidden=torch.zeros(4, 8), ref_hidden=None)
    assert line.startswith("linear_logp: chunked (")
    assert f"row kernels: {NATIVE}" in line
    assert "not tiled: it runs on CUDA" in line
    assert line.endswith("hidden float32 [4, 8] on cpu")
    assert explain("linear_preference_loss").startswith("linear_preference_loss: chunked (")


def test_it_knows_every_op():
    public = {name for name in srlm_kernels.__all__ if name[0].islower()}
    assert {*OPS} == public - {"explain", "losses"}
    for op in OPS:
        line = explain(op)
        assert line.startswith(f"{op}: ") and "\n" not in line


def test_an_unknown_op_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'softmax'.*linear_logp, linear_preference_loss, prefix"):
        explain("softmax")


def test_options_decide_too():
    half = torch.zeros(4, 8, dtype=torch.float16)
    line = explain("linear_preference_loss", hidden=half)
    assert "reference (" in line and "not chunked: float16 GEMMs are slow on a CPU" in line
    # The group itself is not looked at, only that there is one.
    line = explain("linear_preference_loss", hidden=half, process_group="a group")
    assert line.startswith("linear_preference_loss: chunked (")


@pytest.mark.parametrize("op", ["tree_attention", "kv_write", "sample"])
def test_ops_of_the_sampler_are_those_of_the_device(op, monkeypatch):
    assert explain(op).startswith(f"{op}: {NATIVE} (")
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why", lambda: "not built: no compiler")
    assert explain(op) == f"{op}: torch (plain torch; not cpp: not built: no compiler)"


def test_dtypes_decide_too():
    line = explain("sample", logits=torch.zeros(2, 5, dtype=torch.float64))
    assert line.startswith("sample: torch (") and "float64 is for impl='torch'" in line
    assert "a part of tree_attention" in explain("merge_states")


def test_prefix_attention_says_why_it_takes_the_reference(monkeypatch):
    monkeypatch.setattr(native, "has", lambda op: False)
    query = torch.zeros(9, 2, 16)
    plan = PrefixPlan.of([(3, [2, 4])])
    line = explain("prefix_attention", query=query)
    assert line.startswith("prefix_attention: pieces (") and "not cpp: " in line
    for options, reason in (
        ({"softcap": 3.0}, "not pieces: it does not do softcap"),
        ({"window": 5, "plan": plan}, "it does not do a window that cuts"),
        ({"window": 5}, "it does not do a window that cuts"),
        ({"value": torch.zeros(9, 2, 8)}, "keys are 16 wide and values 8"),
    ):
        line = explain("prefix_attention", query=query, **options)
        assert line.startswith("prefix_attention: reference (") and reason in line
    short = explain("prefix_attention", query=query, plan=plan, window=7)
    assert short.startswith("prefix_attention: pieces (")


@pytest.mark.skipif(not native.has("prefix_attention"), reason="not built, or without AVX-512")
def test_prefix_attention_in_cpp_takes_what_pieces_do_not():
    query = torch.zeros(9, 2, 16)
    line = explain("prefix_attention", query=query, softcap=3.0)
    assert line.startswith("prefix_attention: cpp (C++ on the CPU")
    line = explain("prefix_attention", query=query.double())
    assert line.startswith("prefix_attention: pieces (")
    assert "not cpp: it takes float32 and bfloat16, not torch.float64" in line
