"""Softmaxes over parts of the keys, merged, against the softmax over all of them in float64."""

from itertools import chain

import pytest
import torch
from torch import Tensor

from srlm_kernels.merge_states import merge_states, merge_states_ref

DTYPES = [torch.float64, torch.float32]
COUNTS = {"one": [1], "pairs": [2, 2, 2], "ragged": [1, 7, 0, 3], "many": [40]}


class Parts:
    """T tokens, each with some parts of up to 5 keys; `tensors` are what `merge_states` takes."""

    def __init__(self, counts: list[int], heads: int = 3, width: int = 24, spread: float = 3.0):
        self.generator = torch.Generator().manual_seed(len(counts))
        self.heads, self.width = heads, width
        self.scores: list[list[Tensor]] = []
        self.values: list[list[Tensor]] = []
        for count in counts:
            sizes = [1 + i % 5 for i in range(count)]
            self.scores.append([spread * self.normal(heads, size) for size in sizes])
            self.values.append([self.normal(heads, size, width) for size in sizes])
        self.sinks = self.normal(heads)
        # Two entries belong to nobody.
        self.entries = torch.randperm(sum(counts) + 2, generator=self.generator)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """o and lse, NaN where no part is, token_ptr and token_entries."""
        o = torch.full((len(self.entries), self.heads, self.width), torch.nan, dtype=dtype)
        lse = torch.full(o.shape[:2], torch.nan, dtype=dtype)
        scores, values = chain(*self.scores), chain(*self.values)
        for entry, s, v in zip(self.entries.tolist(), scores, values, strict=False):
            if s.isneginf().all():  # an empty part, with rubbish for its result
                lse[entry] = -torch.inf
                continue
            o[entry] = torch.einsum("hk,hkd->hd", s.softmax(1), v)
            lse[entry] = s.logsumexp(1)
        ends = torch.tensor([0, *map(len, self.scores)]).cumsum(0)
        return o, lse, ends.int(), self.entries.int()

    def truth(self, sinks: Tensor | None = None) -> Tensor:
        """One softmax per token and head over the keys of all its parts."""
        out = torch.zeros(len(self.scores), self.heads, self.width, dtype=torch.float64)
        for token, (scores, values) in enumerate(zip(self.scores, self.values, strict=True)):
            if scores:
                s, v = torch.cat(scores, 1), torch.cat(values, 1)
                s = s if sinks is None else torch.cat([s, sinks[:, None]], 1)
                p = s.softmax(1)[:, : v.shape[1]]
                out[token] = torch.einsum("hk,hkd->hd", p, v).nan_to_num(0)  # nothing but -inf
        return out

    def empty(self, token: int, part: int) -> None:
        self.scores[token][part].fill_(-torch.inf)


def merged(parts: Parts, dtype: torch.dtype, **options: object) -> Tensor:
    return merge_states(*parts.tensors(dtype), impl="torch", **{"dtype": dtype, **options})


def assert_merged(out: Tensor, truth: Tensor) -> None:
    atol = {torch.float64: 1e-13, torch.float32: 1e-6}[out.dtype]
    torch.testing.assert_close(out.cpu().double(), truth, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_make_the_whole(with_sinks, counts, dtype) -> None:
    parts = Parts(counts)
    sinks = parts.sinks if with_sinks else None
    assert_merged(merged(parts, dtype, sinks=sinks), parts.truth(sinks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_empty_parts_count_for_nothing(with_sinks, dtype) -> None:
    parts = Parts([3, 2, 1])
    for token, part in ((0, 1), (1, 0), (1, 1), (2, 0)):
        parts.empty(token, part)
    sinks = parts.sinks if with_sinks else None
    out = merged(parts, dtype, sinks=sinks)
    assert_merged(out, parts.truth(sinks))
    assert not out[1:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_two_heads_is_empty(dtype) -> None:
    parts = Parts([2])
    parts.scores[0][0][1] = -torch.inf
    o, lse, *csr = parts.tensors(dtype)
    o[parts.entries[0], 1] = torch.nan
    out = merge_states(o, lse, *csr, dtype=dtype, impl="torch")
    assert_merged(out, parts.truth())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_log_sum_exps(shift, dtype) -> None:
    parts = Parts([4, 3], spread=100.0)
    o, lse, *csr = parts.tensors(dtype)
    rounded = (lse + shift).double() - shift  # what is left of them in `dtype`
    truth = merge_states_ref(o.double(), rounded, *csr, dtype=torch.float64)
    out = merge_states(o, lse + shift, *csr, dtype=dtype, impl="torch")
    assert_merged(out, truth)


@pytest.mark.parametrize("sink", [-200.0, 50.0, 200.0])
def test_a_sink_far_from_the_rest(sink) -> None:
    parts = Parts([2, 1])
    sinks = torch.full_like(parts.sinks, sink)
    assert_merged(merged(parts, torch.float32, sinks=sinks), parts.truth(sinks))


def test_pairwise_is_all_at_once() -> None:
    parts = Parts([3])
    o, lse, _, entries = parts.tensors(torch.float64)
    o, lse = o[entries[:3].long()], lse[entries[:3].long()]
    int32 = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    pair = merge_states(o[:2], lse[:2], int32(0, 2), int32(0, 1), dtype=torch.float64, impl="torch")
    both = torch.stack([pair[0], o[2]]), torch.stack([lse[:2].logsumexp(0), lse[2]])
    out = merge_states(*both, int32(0, 2), int32(1, 0), dtype=torch.float64, impl="torch")
    assert_merged(out, parts.truth())


def test_a_single_part_is_returned_bit_for_bit() -> None:
    parts = Parts([1, 1])
    o, lse, ptr, entries = parts.tensors(torch.float32)
    out = merge_states(o, lse, ptr, entries, dtype=torch.float32, impl="torch")
    assert out.equal(o[entries[:2].long()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_once(dtype) -> None:
    parts = Parts([3, 2])
    whole = merged(parts, torch.float32)
    out = merge_states(*parts.tensors(torch.float32), dtype=dtype, impl="torch")
    assert out.equal(whole.to(dtype))


def test_nan_stays_with_its_token_and_head() -> None:
    parts = Parts([2, 2])
    o, lse, *csr = parts.tensors(torch.float32)
    lse[parts.entries[0], 1] = torch.nan
    out = merge_states(o, lse, *csr, dtype=torch.float32, impl="torch")
    assert out.isnan().any(2).tolist() == [[False, True, False], [False] * 3]


WRONG = {
    "shape": ({"lse": torch.zeros(2, 4)}, ValueError, r"o must be \[Q, H, Dv\]"),
    "strides": ({"o": torch.zeros(2, 8, 3).mT}, ValueError, "contiguous"),
    "half": ({"o": torch.zeros(2, 3, 8).half(), "lse": torch.zeros(2, 3).half()}, TypeError,
             "float32 or float64"),
    "offsets": ({"token_ptr": torch.tensor([0, 2])}, TypeError, "must be int32"),
    "sinks": ({"sinks": torch.zeros(4)}, ValueError, r"sinks must have shape \[3\]"),
    "cpp": ({"impl": "cpp"}, ValueError, "merge_states has no impl='cpp'|cannot run here"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_named(change, error, message) -> None:
    arguments = {
        "o": torch.zeros(2, 3, 8), "lse": torch.zeros(2, 3), "dtype": torch.float32,
        "token_ptr": torch.tensor([0, 2], dtype=torch.int32),
        "token_entries": torch.tensor([0, 1], dtype=torch.int32),
    }  # fmt: skip
    assert not merge_states(**arguments).any()
    with pytest.raises(error, match=message):
        merge_states(**arguments | change)
