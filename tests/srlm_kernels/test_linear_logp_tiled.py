"""The fused Triton kernel of linear_logp against float64."""

import pytest
import torch
from torch import Tensor

from srlm_kernels import linear_logp_tiled as tiled
from srlm_kernels import row_stats as rs
from srlm_kernels.backends import refusal
from srlm_kernels.linear_logp import linear_logp_ref
from srlm_kernels.linear_logp_tiled import linear_logp_tiled, takes, tiled_state
from srlm_kernels.triton_support import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := refusal("triton", torch.empty(0, device=DEVICE)):
    pytest.skip(f"{reason}; test_interpreter.py runs this file", allow_module_level=True)

OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "capped": {"logit_scale": 1.4, "softcap": 4.0, "temperature": 0.8},
}
# Loads through pointers and through descriptors; fp32 has the same tiles everywhere.
KINDS = [(80, torch.float32), (80, torch.float16), (90, torch.float16), (90, torch.bfloat16)]
if not INTERPRETED:  # one GPU has one architecture
    KINDS = [(None, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
INF = float("inf")


@pytest.fixture(params=KINDS, ids=lambda kind: f"sm{kind[0]}-{kind[1]}".replace("torch.", ""))
def dtype(request, monkeypatch):
    """A dtype of operands, under the tiles of an architecture."""
    arch, dtype = request.param
    if arch is not None:
        monkeypatch.setattr(tiled, "target_arch", lambda: arch)
    return dtype


@pytest.fixture
def shapes(dtype):
    """Rows, width and vocabulary: one tile; odd; several tiles and slices, all of them cut off."""
    tile = tiled.tiling(2, True, tiled.target_arch())
    return [(1, 8, 11), (5, 24, 123), (tile.rows + 3, 72, 1100)]


def moved(p) -> dict[str, Tensor]:
    """The tensors of a problem on the device, under the names of the op."""
    return {name: t.to(DEVICE) for name, t in vars(p).items()}


def assert_logp(ours, truth, z_max: float = 1.0) -> None:
    """fused_loss: 2e-6 of the largest logit for log-probabilities, 1e-5 for extrapolated ones."""
    for name, atol in (("logp", 2e-6), ("ref_logp", 2e-6), ("extrapolated_logp", 1e-5)):
        found, expected = getattr(ours, name), getattr(truth, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), expected, atol=atol * max(1.0, z_max), rtol=0, equal_nan=True
        )


def in_float64(arguments: dict[str, object]):
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()}  # fmt: skip
    return linear_logp_ref(**wide)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_float64(problem, dtype, shapes, options):
    for shape in shapes:
        arguments = moved(problem(shape, dtype)) | {"extrapolation": 0.5, **options}
        arguments["target"][-1] = shape[2] - 1
        arguments["target"][0] = 0
        if shape[0] > 2:
            arguments["target"][1] = -100
        assert_logp(linear_logp_tiled(**arguments), in_float64(arguments), z_max=12.0)


@pytest.mark.parametrize("vocabulary", [127, 128, 129, 1024, 1025])
def test_tails(problem, dtype, vocabulary):
    arguments = moved(problem((3, 16, vocabulary), dtype))
    arguments["target"] = torch.tensor([vocabulary - 1, 0, vocabulary // 2], device=DEVICE)
    arguments["extrapolation"] = 1
    # The head's memory ends with its last row: whatever lies behind must not count.
    for name in ("weight", "ref_weight"):
        rows, width = arguments[name].shape
        memory = torch.full((rows + 200, width), torch.nan, dtype=dtype, device=DEVICE)
        memory[:rows] = arguments[name]
        arguments[name] = memory[:rows]
    assert_logp(linear_logp_tiled(**arguments), in_float64(arguments), z_max=12.0)


def test_state_is_that_of_row_stats(problem, true_logits, dtype):
    p = problem((7, 40, 1300), dtype)
    truth = rs.new_state(7, dtype=torch.float64, device=torch.device("cpu"))
    z, z_ref = (
        true_logits(h, w, b)
        for h, w, b in ((p.hidden, p.weight, p.bias), (p.ref_hidden, p.ref_weight, p.ref_bias))
    )
    rs.row_stats_ref(
        truth, z, p.target, ref_logits=z_ref, extrapolation=0.5,
        softcap=None, logit_scale=1.0, temperature=1.0,
    )  # fmt: skip
    state = tiled_state(**moved(p), extrapolation=0.5).cpu().double()
    torch.testing.assert_close(state, truth, rtol=5e-6, atol=5e-6)
    apart = tiled_state(**moved(p)).cpu().double()
    for row in (rs.EXT_MAX, rs.EXT_SUM):
        truth[row] = rs.new_state(7, dtype=torch.float64, device=truth.device)[row]
    torch.testing.assert_close(apart, truth, rtol=5e-6, atol=5e-6)


def test_policy_alone_rows_twice_and_ignored(problem):
    p = moved(problem((6, 16, 300)))
    rows = torch.tensor([5, 0, 0, 3, 5], device=DEVICE)
    target = torch.tensor([299, 7, -1, -1, 12], device=DEVICE)
    arguments = {
        "hidden": p["hidden"], "weight": p["weight"], "target": target,
        "rows": rows, "ignore_index": -1,
    }  # fmt: skip
    ours, truth = linear_logp_tiled(**arguments), in_float64(arguments)
    torch.testing.assert_close(ours.logp.double(), truth.logp, atol=2e-5, rtol=0)
    assert ours.logp[2:4].eq(0).all() and ours.ref_logp is None and ours.extrapolated_logp is None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equal_models_have_equal_bits(problem, dtype, options):
    p = moved(problem((9, 72, 1300), dtype))
    policy = {k: p[k] for k in ("hidden", "weight", "bias", "target")}
    for extrapolation in (None, 0.5):
        ours = linear_logp_tiled(
            **policy, ref_hidden=p["hidden"].clone(), ref_weight=p["weight"].clone(),
            ref_bias=p["bias"].clone(), extrapolation=extrapolation, **options,
        )  # fmt: skip
        assert ours.logp.equal(ours.ref_logp)
        if extrapolation:
            assert ours.logp.equal(ours.extrapolated_logp)


def test_shared_head_and_no_extrapolation(problem):
    arguments = moved(problem((9, 24, 500)))
    for name in ("ref_weight", "ref_bias"):
        del arguments[name]
    arguments["extrapolation"] = 0.0
    ours, truth = linear_logp_tiled(**arguments), in_float64(arguments)
    assert_logp(ours, truth, z_max=12.0)
    assert ours.extrapolated_logp.equal(ours.logp)
    with_own_bias = arguments | {"ref_bias": torch.zeros_like(arguments["bias"])}
    assert_logp(linear_logp_tiled(**with_own_bias), in_float64(with_own_bias), z_max=12.0)


def test_reference_of_another_width(problem):
    arguments = moved(problem((4, 24, 300)))
    other = problem((4, 40, 300))
    arguments |= {"ref_hidden": other.hidden.to(DEVICE), "ref_weight": other.weight.to(DEVICE)}
    arguments["extrapolation"] = 0.5
    assert_logp(linear_logp_tiled(**arguments), in_float64(arguments), z_max=12.0)


def test_bias_of_minus_infinity(problem, dtype):
    arguments = moved(problem((4, 16, 1200), dtype))
    arguments["target"] = torch.tensor([3, 5, 1199, 700], device=DEVICE)
    arguments["bias"][3] = -INF
    arguments["bias"][:1024] = -INF  # a slice of nothing else
    arguments["ref_bias"][700] = arguments["ref_bias"][1100] = -INF
    arguments["extrapolation"] = 0.5
    ours = linear_logp_tiled(**arguments)
    assert_logp(ours, in_float64(arguments), z_max=12.0)
    assert ours.logp.isneginf().tolist() == [True, True, False, True]


def test_nan_stays_in_its_row_and_strange_targets_become_nan(problem, dtype):
    arguments = moved(problem((5, 16, 700), dtype)) | {"extrapolation": 0.5}
    clean = linear_logp_tiled(**arguments)
    arguments["hidden"][1, 3] = torch.nan
    arguments["ref_hidden"][2, 3] = torch.nan
    arguments["target"][3], arguments["target"][4] = 700, 701  # within the last tile, not a token
    ours = linear_logp_tiled(**arguments)
    assert ours.logp.isnan().tolist() == [False, True, False, True, True]
    assert ours.ref_logp.isnan().tolist() == [False, False, True, True, True]
    for name in ("logp", "ref_logp", "extrapolated_logp"):
        assert getattr(ours, name)[0].equal(getattr(clean, name)[0])


def test_a_row_depends_on_no_other(problem):
    p = moved(problem((140, 72, 1100), torch.float16))
    if INTERPRETED:  # numpy's BLAS may look at the number of rows: whole numbers are exact
        p |= {k: p[k].round() for k in ("hidden", "weight")}
    arguments = {k: p[k] for k in ("weight", "bias")}
    together = linear_logp_tiled(p["hidden"], target=p["target"], **arguments).logp
    for lo, hi in ((3, 4), (100, 140)):
        alone = linear_logp_tiled(p["hidden"][lo:hi], target=p["target"][lo:hi], **arguments).logp
        assert alone.equal(together[lo:hi])


def test_groups_of_row_tiles(problem, monkeypatch):
    monkeypatch.setattr(tiled, "GROUP", 3)
    arguments = moved(problem((250, 8, 1030)))  # four tiles: a group of three and the rest
    arguments = {k: v for k, v in arguments.items() if not k.startswith("ref")}
    ours, truth = linear_logp_tiled(**arguments).logp, in_float64(arguments).logp
    torch.testing.assert_close(ours.double(), truth, atol=2.4e-5, rtol=0)


def test_hidden_states_need_not_be_aligned(problem):
    p = moved(problem((6, 24, 90), torch.float16))
    odd = torch.zeros(6, 29, dtype=torch.float16, device=DEVICE)[:, 3:27]
    odd.copy_(p["hidden"])
    ours = linear_logp_tiled(odd, p["weight"], p["target"]).logp
    assert ours.equal(linear_logp_tiled(p["hidden"], p["weight"], p["target"]).logp)


def test_no_rows(problem):
    p = moved(problem((3, 16, 40)))
    out = linear_logp_tiled(p["hidden"][:0], p["weight"], p["target"][:0])
    assert out.logp.shape == (0,)


def test_it_says_what_it_cannot_do(problem):
    p = moved(problem((3, 16, 40)))
    hidden, weight = p["hidden"], p["weight"]
    assert takes(hidden, weight) is None
    assert "float64" in takes(hidden.double(), weight.double())
    assert "bfloat16" in takes(hidden.bfloat16(), weight)
    assert "16 bytes" in takes(hidden[:, :15], weight[:, :15].contiguous())
    assert "16 bytes" in takes(hidden, weight.T.contiguous().T)
    with pytest.raises(ValueError, match="16 bytes"):
        linear_logp_tiled(hidden, weight, p["target"], ref_hidden=hidden[:, :15],
                          ref_weight=weight[:, :15].contiguous())  # fmt: skip
    with pytest.raises(ValueError, match="outputs"):
        linear_logp_tiled(hidden, weight, p["target"], outputs=("entropy",))
