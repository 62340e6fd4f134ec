"""`sample` as a Triton kernel: one program per row, each logit is read once.

With top_k, top_p or min_p that read also leaves the best score of every 32 columns in memory. From
these follow the few groups of columns that can hold a kept token, and only they are read again.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.sample import SPLITMIX64, Draw, SampleParams
from srlm_kernels.triton_support import EXACT, constant, dense, jit, tl, triton

GOLDEN, MIX_1, MIX_2 = map(constant, SPLITMIX64)
HIGHEST, LOWEST = constant(torch.finfo(torch.float32).max), constant(torch.finfo(torch.float32).min)
COLUMNS, COLUMNS_OF_GROUP = 2048, 32
BLOCK, GROUP = constant(COLUMNS), constant(COLUMNS_OF_GROUP)


def sample_triton(
    logits: Tensor,
    seed: Tensor,
    step: Tensor,
    params: SampleParams,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    is_stop: Tensor | None = None,
) -> Draw:
    """`sample` for fp32, bf16 or fp16 logits; arguments are not checked.

    Nothing waits for the host, and what is launched depends on shapes, dtypes and which parameters
    are None alone: a CUDA graph can hold it.
    """
    rows, columns = logits.shape
    token = logits.new_empty(rows, dtype=torch.int64)
    numbers = logits.new_empty(3, rows, dtype=torch.float32)
    stopped = logits.new_empty(rows, dtype=torch.bool)
    logprob, sample_logprob, kept_mass = numbers.unbind()
    draw = Draw(token, logprob, sample_logprob, kept_mass, stopped)
    if rows == 0:
        return draw
    seen = None if params.repetition_penalty is None else seen
    tops = chosen = None
    if any(x is not None for x in (params.top_k, params.top_p, params.min_p)):
        tops = logits.new_empty(rows, triton.cdiv(columns, COLUMNS_OF_GROUP), dtype=torch.float32)
        chosen = torch.empty_like(tops, dtype=torch.int32)
    with torch.cuda.device_of(logits):
        _sample_kernel[(rows,)](
            token, numbers, stopped, logits, dense(seed), dense(step), *map(dense, params),
            dense(bias), seen, dense(is_stop), tops, chosen, columns, logits.stride(0),
            0 if seen is None else seen.stride(0),
            PROCESSED=not (bias is None and seen is None and params.min_tokens is None),
            BLOCKS=max(2, triton.next_power_of_2(triton.cdiv(columns, COLUMNS))),
            num_warps=8,
            maxnreg=128,  # unasked, ptxas spills to get by with 80
            **EXACT,
        )  # fmt: skip
    return draw


@jit
def _sample_kernel(
    token,
    numbers,
    stopped,
    logits,
    seed,
    step,
    temperature,
    top_k,
    top_p,
    min_p,
    repetition_penalty,
    min_tokens,
    bias,
    seen,
    is_stop,
    tops,
    chosen,
    columns,
    logits_stride,
    seen_stride,
    PROCESSED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # Row offsets are 64-bit: rows * columns passes 2^31.
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    penalty, early = None, None
    if seen is not None:
        seen += row * seen_stride
        penalty = tl.load(repetition_penalty + row)
    if min_tokens is not None:
        early = tl.load(step + row) < tl.load(min_tokens + row)
    processing = (bias, seen, penalty, is_stop, early)
    greedy, sharpness = _sharpness(row, temperature, top_k)
    if tops is not None:
        groups = tl.cdiv(columns, GROUP)
        tops += row * groups
        chosen += row * groups

    best, masses, unit_total, raw_lse = _read(
        logits, processing, columns, sharpness, tops, PROCESSED, BLOCKS
    )
    total = tl.sum(masses, 0)
    cutoff = tl.full((), LOWEST, tl.float32)
    length = columns
    scale = (best, sharpness)
    if tops is not None:
        limits = _limits(row, top_k, top_p, min_p, total)
        length = _choose(tops, chosen, groups, scale, limits) * GROUP
        place = (logits, processing, columns, chosen, length)
        cutoff = _cutoff(place, scale, limits, BLOCKS)
        masses = _masses(place, scale, cutoff, BLOCKS)
    place = (logits, processing, columns, chosen, length)
    mass = tl.sum(masses, 0)
    level = tl.where(greedy, 0.0, mass * _uniform(tl.load(seed + row), tl.load(step + row)))
    drawn, gap = _draw(place, scale, cutoff, masses, level)

    # NaN or +inf make NaN of every sum, and a row of nothing but -inf weighs nothing.
    drawable = total > 0
    drawn = tl.where(drawable, drawn, 0)
    logprob = tl.load(logits + drawn).to(tl.float32) - raw_lse
    sample_logprob = tl.where(greedy, 0.0, gap - tl.log(mass.to(tl.float32)))
    kept = tl.where(greedy, 1.0 / unit_total, tl.minimum(mass / total, 1.0).to(tl.float32))
    rows = tl.num_programs(0)
    tl.store(token + row, drawn.to(tl.int64))
    tl.store(numbers + row, logprob)
    tl.store(numbers + rows + row, tl.where(drawable, sample_logprob, float("nan")))
    tl.store(numbers + 2 * rows + row, tl.where(drawable, kept, float("nan")))
    ends = False
    if is_stop is not None:
        ends = tl.load(is_stop + drawn)
    tl.store(stopped + row, ends)


@jit
def _sharpness(row, temperature, top_k):
    """Whether the row is greedy, and 1 / temperature: greedy is what is left of it near 0."""
    t = tl.load(temperature + row)
    greedy = t == 0
    if top_k is not None:
        greedy |= tl.load(top_k + row) == 1
    t = tl.where(greedy, 1.0, t)
    return greedy, tl.where(greedy, HIGHEST, tl.minimum(tl.div_rn(1.0, t), HIGHEST))


@jit
def _uniform(seed, step):
    """A multiple of 2^-48 in [0, 1): splitmix64 of the seed at its step."""
    x = seed.to(tl.uint64, bitcast=True) + (step + 1).to(tl.uint64, bitcast=True) * GOLDEN
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return ((x ^ (x >> 31)) >> 16).to(tl.int64).to(tl.float64) * 2.0**-48


@jit
def _read(
    logits, processing, columns, sharpness, tops, PROCESSED: tl.constexpr, BLOCKS: tl.constexpr
):
    """One pass over a row: the best score, the weights of each block [BLOCKS], the sum of the
    weights at temperature 1, and the log-sum-exp of the logits as they came."""
    # All sums are relative to the best score so far. LOWEST stands for "nothing seen": unlike -inf
    # it can be subtracted from -inf.
    lane, index = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    best = tl.full((), LOWEST, tl.float32)
    raw_best = best
    unit, raw_sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    masses = tl.zeros([BLOCKS], tl.float64)
    ahead = tl.load(logits + lane, mask=lane < columns, other=0.0)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        raw = tl.where(inside, ahead.to(tl.float32), -float("inf"))
        ahead = tl.load(logits + BLOCK + column, mask=column + BLOCK < columns, other=0.0)
        x = _processed(raw, column, inside, processing)
        if tops is not None:
            group = tl.arange(0, BLOCK // GROUP) + start // GROUP
            top = tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), 1)
            tl.store(tops + group, top, mask=group * GROUP < columns)
        higher = tl.maximum(best, tl.max(x, 0))
        back, gap = best - higher, x - higher
        masses *= _weight(back * sharpness).to(tl.float64)
        masses = tl.where(index == start // BLOCK, _sum(_weight(gap * sharpness)), masses)
        unit = unit * tl.exp(back) + tl.exp(gap)
        best = higher
        if PROCESSED:
            higher = tl.maximum(raw_best, tl.max(raw, 0))
            raw_sums = raw_sums * tl.exp(raw_best - higher) + tl.exp(raw - higher)
            raw_best = higher
    if not PROCESSED:
        raw_best, raw_sums = best, unit
    return best, masses, tl.sum(unit, 0), raw_best + tl.log(tl.sum(raw_sums, 0))


@jit
def _processed(x, column, inside, processing):
    """The scores that temperature is applied to."""
    bias, seen, penalty, is_stop, early = processing
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0)
    if seen is not None:
        penalised = tl.where(x > 0, tl.div_rn(x, penalty), x * penalty)
        x = tl.where(tl.load(seen + column, mask=inside, other=False), penalised, x)
    if early is not None:
        banned = tl.load(is_stop + column, mask=inside, other=False)
        x = tl.where(banned & early, -float("inf"), x)
    return x


@jit
def _weight(gap):
    """e^gap. Where `tl.exp` rounds the product with log2(e), this keeps what was rounded off, so
    that devices agree on the CDF."""
    gap = tl.maximum(gap, -200.0, tl.PropagateNan.ALL)  # its weight is 0; -inf would give NaN
    product = gap * 1.44269502
    rest = tl.fma(gap, 1.92596303e-8, tl.fma(gap, 1.44269502, -product))
    power = tl.exp2(product)
    return tl.fma(power, rest * 0.693147181, power)


@jit
def _sum(x):
    """In fp64 but for the first two additions."""
    quarters = tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1)
    return tl.sum(quarters.to(tl.float64), 0)


@jit
def _limits(row, top_k, top_p, min_p, total):
    """top_k or 0, top_p, the lowest gap that min_p keeps, and the weight that is all of it."""
    k = tl.zeros((), tl.int32)
    p = tl.full((), 1.0, tl.float32)
    least = tl.full((), LOWEST, tl.float32)
    if top_k is not None:
        k = tl.load(top_k + row)
    if top_p is not None:
        p = tl.load(top_p + row)
    if min_p is not None:
        least = tl.maximum(tl.log(tl.load(min_p + row).to(tl.float64)).to(tl.float32), LOWEST)
    return k, p, least, total


@jit
def _choose(tops, chosen, groups, scale, limits):
    """Lists the groups of columns that can hold a kept token, from left to right."""
    k, p, least, total = limits
    tl.debug_barrier()  # `tops` was written by other threads
    # Of the groups' best alone: among all scores there are at least as many, and as much weight.
    place = (tops, (None, None, None, None, None), groups, None, groups)
    bound = tl.where((k > 0) | (p < 1), LOWEST, least)
    if k > 0:
        bound = _highest_with(place, scale, bound, k.to(tl.float64), False)
    elif p < 1:
        bound = _highest_with(place, scale, bound, p.to(tl.float64) * total, True)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((), tl.int32)
    for start in range(0, groups, BLOCK):
        group = start + lane
        gap, _ = _gaps(place, scale, group)
        kept = (gap >= bound).to(tl.int32)
        tl.store(chosen + count + tl.cumsum(kept, 0) - 1, group, mask=kept > 0)
        count += tl.sum(kept, 0)
    tl.debug_barrier()
    return count


@jit
def _cutoff(place, scale, limits, BLOCKS: tl.constexpr):
    """The lowest gap that is kept."""
    k, p, least, total = limits
    cutoff = tl.full((), LOWEST, tl.float32)
    if k > 0:
        cutoff = _highest_with(place, scale, cutoff, k.to(tl.float64), False)
        if p < 1:
            total = tl.sum(_masses(place, scale, cutoff, BLOCKS), 0)
    if p < 1:
        cutoff = _highest_with(place, scale, cutoff, p.to(tl.float64) * total, True)
    return tl.maximum(cutoff, least)


@jit
def _gaps(place, scale, i):
    """Gaps of the entries `i` of a place, -inf outside, and their columns.

    A place is a row of scores; of its columns only those of the `chosen` groups, if any, count as
    entries, `length` of them.
    """
    scores, processing, columns, chosen, length = place
    best, sharpness = scale
    column, inside = i, i < length
    if chosen is not None:
        column = tl.load(chosen + i // GROUP, mask=inside, other=0) * GROUP + i % GROUP
        inside &= column < columns
    x = tl.load(scores + column, mask=inside, other=0.0).to(tl.float32)
    x = _processed(x, column, inside, processing)
    return tl.where(inside, (x - best) * sharpness, -float("inf")), column


@jit
def _highest_with(place, scale, low, needed, BY_WEIGHT: tl.constexpr):
    """The highest gap from which on there are `needed` entries, or that weight; `low` if there is
    none above it. Bisects between gaps that occur, so that it ends on one."""
    length = place[4]
    lane = tl.arange(0, BLOCK)
    high = tl.zeros((), tl.float32)
    while low < high:
        pivot = low + (high - low) * 0.5
        pivot = tl.where(pivot > low, pivot, high)
        above = tl.zeros([BLOCK], tl.float32)
        under = tl.full([BLOCK], -float("inf"), tl.float32)
        over = tl.full([BLOCK], float("inf"), tl.float32)
        for start in range(0, length, BLOCK):
            gap, _ = _gaps(place, scale, start + lane)
            reached = gap >= pivot
            if BY_WEIGHT:
                above += tl.where(reached, _weight(gap), 0.0)
            else:
                above += tl.where(reached, 1.0, 0.0)
            under = tl.maximum(under, tl.where(reached, -float("inf"), gap))
            over = tl.minimum(over, tl.where(reached, gap, float("inf")))
        enough = tl.sum(above.to(tl.float64), 0) >= needed
        low = tl.where(enough, tl.min(over, 0), low)
        high = tl.where(enough, high, tl.max(under, 0))
    return low


@jit
def _masses(place, scale, cutoff, BLOCKS: tl.constexpr):
    """The kept weight of each block of entries [BLOCKS]."""
    lane, index = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    masses = tl.zeros([BLOCKS], tl.float64)
    for start in range(0, place[4], BLOCK):
        gap, _ = _gaps(place, scale, start + lane)
        kept = tl.where(gap >= cutoff, _weight(gap), 0.0)
        masses = tl.where(index == start // BLOCK, _sum(kept), masses)
    return masses


@jit
def _draw(place, scale, cutoff, masses, level):
    """The column where the CDF passes `level`, and its gap; `masses` are those of the blocks."""
    lane, index = tl.arange(0, BLOCK), tl.arange(0, masses.shape[0])
    block = _first_above(masses, tl.cumsum(masses, 0), level, index)
    below = tl.sum(tl.where(index < block, masses, 0.0), 0)
    gap, column = _gaps(place, scale, block * BLOCK + lane)
    kept = tl.where(gap >= cutoff, _weight(gap), 0.0)
    drawn = _first_above(kept, below + tl.cumsum(kept.to(tl.float64), 0), level, lane)
    column = tl.sum(tl.where(lane == drawn, column, 0), 0)
    return column, tl.sum(tl.where(lane == drawn, gap, 0.0), 0)


@jit
def _first_above(weight, cdf, level, index):
    """Of the entries that weigh anything: the first whose CDF is above `level`, or the last of all,
    since sums in another order may be below it by rounding. Prefix sums need not be monotone."""
    alive = weight > 0
    first = tl.min(tl.where(alive & (cdf > level), index, 2**30), 0)
    return tl.minimum(first, tl.max(tl.where(alive, index, 0), 0))
