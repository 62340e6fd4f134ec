"""`sample` in every implementation that runs here, against the textbook in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from srlm_kernels import SampleParams, sample
from srlm_kernels.sample import sample_ref, uniforms
from srlm_kernels.triton_support import INTERPRETED
from tests.srlm_kernels.draws import IMPLEMENTATIONS, draw, normal, parameters, seeds_of, textbook

INF, NAN = float("inf"), float("nan")
FEW, MANY = (15, 45) if INTERPRETED else (100, 2000)
# One parameter per row in turn: a batch mixes what is off, mild and strict.
MIXED: dict[str, list[Any]] = {
    "temperature": [1.0, 0.7, 1.8, 0.0, 1.0],
    "top_k": [0, 5, 1, 40, 300, -1, 7],
    "top_p": [1.0, 0.9, 0.5, 0.999, 0.01, 0.75],
    "min_p": [0.0, 0.05, 0.5, 0.001],
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "temperature": ("temperature",),
    "top_k": ("temperature", "top_k"),
    "top_p": ("temperature", "top_p"),
    "min_p": ("temperature", "min_p"),
    "top_k and top_p": ("top_k", "top_p"),
    "all": ("temperature", "top_k", "top_p", "min_p"),
}
# One token; less than a vector, a block or a group; tails of each; more than one block.
COLUMNS = [1, 2, 17, 31, 255, 257, 1000, 2048, 5021]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def mixed(names: tuple[str, ...], rows: int) -> dict[str, list[Any]]:
    return {name: [MIXED[name][r % len(MIXED[name])] for r in range(rows)] for name in names}


def assert_textbook(drawn: Any, logits: Tensor, uniform: Tensor, values: dict[str, Any]) -> None:
    """Numbers are those of the textbook, and each token is where its uniform hits the CDF."""
    for r, token in enumerate(drawn.token.tolist()):
        probs, mass = textbook(logits[r], **{name: v[r] for name, v in values.items()})
        cdf = probs.cumsum(0)
        assert probs[token] > 0
        if probs.max() < 1:  # of greedy rows the best
            assert cdf[token] > uniform[r] - 1e-6
            assert cdf[token] - probs[token] < uniform[r] + 1e-6
        raw = logits[r].double().log_softmax(-1)[token]
        expected = torch.stack([raw, probs[token].log(), torch.tensor(mass).double()])
        ours = torch.stack([drawn.logprob[r], drawn.sample_logprob[r], drawn.kept_mass[r]])
        assert_close(ours.double(), expected, atol=3e-6, rtol=1e-6, msg=f"row {r}: {values}")


@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_of_all_kinds(impl: str, columns: int, names: tuple[str, ...]) -> None:
    rows = 21 if columns < 1000 else 7
    logits = normal(rows, columns, seed=columns) * torch.linspace(0.1, 2, rows)[:, None]
    seed = torch.arange(rows) * 7919 - 40
    values = mixed(names, rows)
    drawn = draw(impl, logits, seed=seed, step=3, **values)
    assert_textbook(drawn, logits, uniforms(seed, torch.tensor(3)), values)


@pytest.mark.parametrize("columns", [32000, 152064])
def test_real_vocabularies(impl: str, columns: int) -> None:
    logits = normal(4, columns, scale=2.5)
    logits[1] *= 0.02  # hardly any difference
    logits[2, 777] = 25.0  # hardly any doubt
    for names in (("temperature",), ("top_p",), ("top_k", "top_p")):
        values = mixed(names, 4)
        drawn = draw(impl, logits, **values)
        assert_textbook(drawn, logits, uniforms(torch.arange(4), torch.tensor(0)), values)


def test_uniforms_are_splitmix64() -> None:
    """Runs on other machines and later versions must draw the same."""
    seed, step = torch.tensor([0, 1, -1, 2**62]), torch.tensor([0, 0, 5, 1000])
    expected = [248629889170205, 159472906176770, 232124422399032, 31749683059662]
    assert (uniforms(seed, step) * 2**48).long().tolist() == expected
    assert (uniforms(seeds_of([0, 1, 2**48 - 1]), torch.tensor(0)) * 2**48).tolist() == [
        0.0, 1.0, 2.0**48 - 1,
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9999}, {"min_p": 1e-4}])
def test_ends_of_the_cdf_hit_possible_tokens(impl: str, options: dict[str, Any]) -> None:
    logits = torch.full((2, 9000), -INF)
    logits[:, [2, 4500, 8000]] = torch.tensor([0.0, 1.0, 0.5])
    drawn = draw(impl, logits, seed=seeds_of([0, 2**48 - 1], step=9), step=9, **options)
    assert drawn.token.tolist() == [2, 8000]


def test_a_boundary_belongs_to_the_next_token(impl: str) -> None:
    """Between equal tokens boundaries are exact, those between blocks among them."""
    tokens = [1, 31, 32, 256, 1000, 2048, 4095]
    at = [token << 36 for token in tokens]
    seed = seeds_of([*at, *(bits - 1 for bits in at)])
    for options in ({}, {"top_p": 0.9}):  # of equal ones all are kept
        drawn = draw(impl, torch.zeros(2 * len(tokens), 4096), seed=seed, **options)
        assert drawn.token.tolist() == [*tokens, *(token - 1 for token in tokens)]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}]
)
def test_all_impossible_but_one(impl: str, options: dict[str, Any]) -> None:
    logits = torch.full((FEW, 500), -INF)
    logits[:, 405] = 1.0
    drawn = draw(impl, logits, **options)
    assert set(drawn.token.tolist()) == {405}
    assert drawn.sample_logprob.abs().max() == drawn.logprob.abs().max() == 0
    assert (drawn.kept_mass == 1).all()


def test_ties_at_the_cut_are_all_kept(impl: str) -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, -3.0]).repeat(MANY, 1)
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.36787}):
        assert set(draw(impl, logits, **options).token.tolist()) == {0, 1, 2, 3}
    equal = torch.zeros(MANY, 5)
    for options in ({"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}):
        drawn = draw(impl, equal, **options)
        assert set(drawn.token.tolist()) == {0, 1, 2, 3, 4}
        assert (drawn.kept_mass == 1).all()


def test_top_k_1_is_greedy_even_among_ties(impl: str) -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0]).repeat(FEW, 1)
    greedy = draw(impl, logits, temperature=0.0)
    assert (greedy.token == 1).all()
    for other in (draw(impl, logits, top_k=1), draw(impl, logits, top_k=1, temperature=2.0)):
        assert all(x.equal(y) for x, y in zip(greedy, other, strict=True))
    assert (greedy.sample_logprob == 0).all()
    assert_close(greedy.kept_mass, greedy.logprob.exp())
    nucleus = draw(impl, logits, temperature=0.0, top_p=0.9, min_p=0.9)
    assert nucleus.token.equal(greedy.token)


def test_low_temperature_becomes_greedy(impl: str) -> None:
    logits = normal(FEW, 30)
    for temperature in (1e-4, 1e-30, 1e-40):
        drawn = draw(impl, logits, temperature=temperature)
        assert drawn.token.equal(logits.argmax(-1))
        assert drawn.sample_logprob.abs().max() < 1e-6


def test_high_temperature_becomes_uniform(impl: str) -> None:
    drawn = draw(impl, normal(FEW, 30), temperature=1e30)
    assert_close(drawn.sample_logprob, torch.full((FEW,), -torch.tensor(30.0).log().item()))


def test_kept_mass_joins_the_two_logprobs(impl: str) -> None:
    logits = normal(FEW, 3000)
    for options in ({}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.0}):
        drawn = draw(impl, logits, **options)
        assert_close(
            drawn.sample_logprob - drawn.logprob, -drawn.kept_mass.log(), atol=4e-6, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_their_values(impl: str, dtype: torch.dtype) -> None:
    if (impl, dtype) == ("cpp", torch.float16):
        pytest.skip("the C++ kernels take float32 and bfloat16")
    logits = normal(FEW, 700).to(dtype)
    for names in (OPTIONS["plain"], OPTIONS["all"]):
        narrow, wide = (draw(impl, x, **mixed(names, FEW)) for x in (logits, logits.float()))
        assert all(x.equal(y) for x, y in zip(narrow, wide, strict=True))


def test_a_row_does_not_depend_on_the_others(impl: str) -> None:
    logits, seed = normal(14, 5000), torch.arange(14) * 31
    seen, is_stop = normal(14, 5000, seed=1) > 2, normal(5000, seed=2) > 2
    values = mixed(OPTIONS["all"], 14) | {"repetition_penalty": [1.0, 1.2] * 7}
    values["min_tokens"] = [0, 9, 2, 0, 0, 0, 5] * 2
    together = draw(impl, logits, seed=seed, step=3, seen=seen, is_stop=is_stop, **values)
    for r in (0, 1, 3, 6, 13):
        one = {name: v[r : r + 1] for name, v in values.items()}
        rest = {"seen": seen[r : r + 1], "is_stop": is_stop, "seed": seed[r : r + 1]}
        alone = draw(impl, logits[r : r + 1], step=3, **rest, **one)
        assert all(x[r : r + 1].equal(y) for x, y in zip(together, alone, strict=True))


def test_views(impl: str) -> None:
    wide = torch.full((FEW, 1224), 1e4)  # reading a column too many shows
    wide[:, 100:1200] = normal(FEW, 1100)
    view = wide[:, 100:1200]
    pairs = torch.arange(2 * FEW).view(FEW, 2)
    seen = torch.zeros(FEW, 1500, dtype=torch.bool)[:, 200:1300]
    seen[:, ::3] = True
    options = {"repetition_penalty": 1.3, "top_k": 50}
    ours = draw(impl, view, seed=pairs[:, 1], seen=seen, **options)
    dense = draw(impl, view.contiguous(), seed=torch.arange(FEW) * 2 + 1, seen=seen.clone(),
                 **options)  # fmt: skip
    assert all(x.equal(y) for x, y in zip(ours, dense, strict=True))
    same = draw(impl, view[:1].expand(FEW, -1))
    assert same.token.equal(draw(impl, view[:1].repeat(FEW, 1)).token)


def test_equal_to_transformers(impl: str) -> None:
    """Bias, penalty, minimum length, temperature, top_k, top_p and min_p, in that order."""
    from transformers import generation as hf

    rows, columns = FEW, 900
    logits = normal(rows, columns, seed=4)
    history = torch.randint(0, columns, (rows, 60), generator=torch.Generator().manual_seed(5))
    biases = {3: 4.0, 500: -2.5, 888: 7.0}
    is_stop = torch.zeros(columns, dtype=torch.bool)
    is_stop[[888, 20]] = True
    theirs = logits
    for processor in (
        hf.SequenceBiasLogitsProcessor({(i,): b for i, b in biases.items()}),
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.MinLengthLogitsProcessor(61, [888, 20], device="cpu"),
        hf.TemperatureLogitsWarper(0.8),
        hf.TopKLogitsWarper(40),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ):
        theirs = processor(history, theirs)
    ours = draw(
        impl, logits, step=60, bias=torch.zeros(columns).index_put_((torch.tensor([*biases]),),
        torch.tensor([*biases.values()])), is_stop=is_stop,
        seen=torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, history, True),
        repetition_penalty=1.3, min_tokens=61, temperature=0.8, top_k=40, top_p=0.9, min_p=0.02,
    )  # fmt: skip
    expected = theirs.double().log_softmax(-1).gather(1, ours.token[:, None])[:, 0]
    assert_close(ours.sample_logprob.double(), expected, atol=3e-6, rtol=0)
    raw = logits.double().log_softmax(-1).gather(1, ours.token[:, None])[:, 0]
    assert_close(ours.logprob.double(), raw, atol=3e-6, rtol=0)
    assert not ours.stopped.any()


def test_stop_tokens_wait_for_min_tokens(impl: str) -> None:
    logits = torch.zeros(MANY, 4)
    is_stop = torch.tensor([True, False, False, True])
    minimum = torch.arange(MANY) % 3
    drawn = draw(impl, logits, step=1, min_tokens=minimum, is_stop=is_stop)
    assert drawn.stopped.equal(is_stop[drawn.token])
    early = minimum == 2
    assert not drawn.stopped[early].any()
    assert set(drawn.token[~early].tolist()) == {0, 1, 2, 3}
    assert_close(drawn.sample_logprob.exp(), torch.where(early, 0.5, 0.25))
    assert_close(drawn.logprob.exp(), torch.full((MANY,), 0.25))
    free = draw(impl, logits, is_stop=is_stop)
    assert free.stopped.equal(is_stop[free.token]) and free.stopped.any()


def test_undrawable_rows_say_so(impl: str) -> None:
    logits = normal(6, 5000)
    logits[0, 4321] = NAN
    logits[1, 17] = INF
    logits[2] = -INF
    logits[3] = -INF
    logits[3, 44] = NAN
    logits[4, 10:] = -INF
    is_stop = torch.arange(5000) < 10  # the last row may draw others, the one before may not
    for options in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 7}, {"min_p": 0.1}):
        drawn = draw(impl, logits, min_tokens=1, is_stop=is_stop, **options)
        assert drawn.token[:5].tolist() == [0] * 5
        assert drawn.sample_logprob.isnan().tolist() == [True] * 5 + [False]
        assert drawn.kept_mass.isnan().tolist() == [True] * 5 + [False]
        assert drawn.logprob.isnan().tolist() == [True] * 4 + [False] * 2
        assert drawn.stopped.tolist() == [True] * 5 + [False]


def test_lowest_numbers_are_not_impossible(impl: str) -> None:
    """As masks are often written; a row of nothing else is uniform."""
    logits = torch.full((FEW, 40), torch.finfo(torch.float32).min)
    drawn = draw(impl, logits, top_k=[30] * FEW)
    assert_close(drawn.sample_logprob, torch.full((FEW,), -torch.tensor(40.0).log().item()))
    logits[:, 20:] = 0.0
    assert (draw(impl, logits).token >= 20).all()
    assert draw(impl, logits, top_k=30).kept_mass.equal(torch.ones(FEW))


def test_no_rows(impl: str) -> None:
    drawn = draw(impl, torch.empty(0, 7), top_k=3)
    assert [x.shape for x in drawn] == [(0,)] * 5


def test_float64_stays_float64() -> None:
    logits = normal(5, 300).double()
    seed = torch.arange(5)
    drawn = sample_ref(logits, seed, seed, parameters(5, top_p=0.9))
    expected = logits.log_softmax(-1).gather(1, drawn.token[:, None])[:, 0]
    assert_close(drawn.logprob, expected, atol=1e-14, rtol=0)
    assert_close(drawn.sample_logprob, drawn.logprob - drawn.kept_mass.log(), atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, TypeError, "logits must be a 2-D float tensor"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "logits must be a 2-D float"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "no column"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed must have shape \[3\]"),
        ({"step": torch.zeros(3, dtype=torch.int32)}, TypeError, "step must be torch.int64"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k must be torch.int32"),
        ({"top_p": torch.ones(3, 1)}, ValueError, r"top_p must have shape \[3\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[5\]"),
        ({"seen": torch.zeros(3, 5)}, TypeError, "seen must be torch.bool"),
        ({"is_stop": torch.zeros(5, device="meta").bool()}, ValueError, "is_stop is on meta"),
        ({"repetition_penalty": torch.ones(3)}, ValueError, "repetition_penalty needs seen"),
        ({"min_tokens": torch.ones(3).int()}, ValueError, "min_tokens needs is_stop"),
        ({"impl": "cuda"}, ValueError, "impl='cuda'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    zeros = torch.zeros(3, dtype=torch.int64)
    names = [name for name in change if name in SampleParams._fields]
    params = SampleParams(torch.ones(3))._replace(**{name: change.pop(name) for name in names})
    arguments = {"logits": torch.zeros(3, 5), "seed": zeros, "step": zeros, "params": params}
    with pytest.raises(error, match=message):
        sample(**(arguments | change))
