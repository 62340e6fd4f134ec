"""What the policy is compared with: a frozen model beside it, the policy's own with other adapters
on, or what was kept of one pass.

A cache costs one pass of the reference over the pairs before training, and no second copy of the
weights: the model itself is the reference then. It pays from the second epoch on, or where two
copies do not fit. Log-probabilities are enough for every loss but SPA's, whose detector mixes
logits: it needs hidden states, which are read from files as they are needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srlm_fast.config import PreferenceConfig
from srlm_fast.errors import UserError
from srlm_fast.model.adapters import FrozenAdapter, active_scaling, active_state
from srlm_fast.model.forward import Head, lm_head
from srlm_fast.model.load import text_config
from srlm_fast.model.phase import inference
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.batches import Batch, on_device
from srlm_fast.train.sharded import gathered
from srlm_kernels import linear_logp

# How far cached sums may be from the same sums in another batch, in times of what is measured.
_SLACK = 4.0

# Numbers of a weight that are summed at once; a multiple of the strides, so that the sums are those
# of the whole.
_STRETCH = 7 * 11 << 16

# Entries of a model's configuration that leave what it computes as it is.
_NO_FUNCTION = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip

Collate = Callable[[Sequence[int]], Batch]


class Reference(Protocol):
    """Gives `linear_preference_loss` the reference of a batch of pairs."""

    @property
    def floor(self) -> float:
        """Nats by which a margin may differ from 0 where the policy is the reference."""
        ...

    def inputs(self, indices: Sequence[int], batch: Batch) -> dict[str, Any]:
        """Keywords of the op for the pairs `indices`, whose tokens `batch` holds."""
        ...


@dataclass(frozen=True)
class LiveReference:
    """A second model, in eval mode, along the very path of the policy."""

    model: Any
    floor: float = 0.0

    def inputs(self, indices: Sequence[int], batch: Batch) -> dict[str, Any]:
        with torch.no_grad():
            hidden = batch.states(self.model)
        head = lm_head(self.model)
        return {"ref_hidden": hidden, "ref_weight": head.weight, "ref_bias": head.bias}


@dataclass(frozen=True)
class LoraReference:
    """The policy's own model with a frozen adapter on, or none; the head is the policy's."""

    adapter: FrozenAdapter
    floor: float = 0.0

    def inputs(self, indices: Sequence[int], batch: Batch) -> dict[str, Any]:
        with self.adapter.active() as model:
            return {"ref_hidden": batch.states(model)}


@dataclass(frozen=True)
class CachedLogps:
    """Summed log-probabilities [items, 2] of chosen and rejected; rows of other items are NaN."""

    sums: Tensor
    floor: float

    def inputs(self, indices: Sequence[int], batch: Batch) -> dict[str, Any]:
        rows = on_device(indices, device=self.sums.device)
        return {"ref_logp": self.sums.index_select(0, rows).flatten()}


@dataclass(frozen=True)
class CachedStates:
    """Hidden states of the positions that predict a response token, in files by item, and a copy of
    the head alone."""

    folder: Path
    place: dict[int, tuple[str, int, int]]
    """File, first row and end of each item."""
    weight: Tensor | None
    """None: the head does not train, and is the policy's."""
    bias: Tensor | None
    none: Tensor
    """States of no position, [0, D]."""
    floor: float

    def inputs(self, indices: Sequence[int], batch: Batch) -> dict[str, Any]:
        found = []
        for index in indices:
            name, start, end = self.place[index]
            with safe_open(self.folder / name, framework="pt") as file:  # mapped, not read
                found.append(file.get_slice("states")[start:end])
        rows = torch.cat(found or [self.none])
        if batch.rows.is_cuda:
            rows = rows.pin_memory()  # an unpinned copy would wait for the device
        rows = rows.to(batch.rows.device, non_blocking=True)
        # Where responses share a prompt its last row occurs twice, with the same states but for
        # rounding if the two were cached in different batches.
        hidden = rows.new_zeros(batch.input_ids.numel(), rows.shape[1])
        hidden.index_copy_(0, batch.rows, rows)
        return {"ref_hidden": hidden, "ref_weight": self.weight, "ref_bias": self.bias}


def choose_reference(
    model: Any,
    config: PreferenceConfig,
    micros: Sequence[Sequence[int]],
    collate: Collate,
    folder: Path | None,
    ranks: Ranks = ALONE,
) -> Reference:
    """What `config.reference_cache` stands for; `model` is the reference as it is now, or a
    `FrozenAdapter`. Several `ranks` share the pass that makes a cache, and the `folder` of its
    files.

    Raises ValueError when states are to be kept and there is no `folder`.
    """
    if isinstance(model, FrozenAdapter):
        if config.reference_cache == "none":
            return LoraReference(model)
        with model.active() as adapted:
            return _cached(adapted, config, micros, collate, folder, ranks, head_is_shared=True)
    if config.reference_cache != "none":
        return _cached(model, config, micros, collate, folder, ranks)
    model.eval()
    return LiveReference(model)


def _cached(
    model: Any,
    config: PreferenceConfig,
    micros: Sequence[Sequence[int]],
    collate: Collate,
    folder: Path | None,
    ranks: Ranks,
    head_is_shared: bool = False,
) -> Reference:
    if config.reference_cache == "logps":
        return cache_logps(model, micros, collate, folder, ranks)
    if folder is None:
        raise ValueError("reference_cache='states' needs a folder for its files")
    return cache_states(model, micros, collate, folder, ranks, head_is_shared)


def cache_logps(
    model: Any,
    micros: Sequence[Sequence[int]],
    collate: Collate,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> CachedLogps:
    """Those of `model` as it is now, for the items of `micros`; `collate` makes a batch of one.

    They are kept in `folder`, if there is one, under a name that other weights or items do not
    have, and found there the next time.
    """
    path = None
    if folder:
        digests = [_digest(_ids(collate(micro), micro)) for micro in micros]
        path = folder / f"logps-{_digest([fingerprint(model), digests])}.safetensors"
    found = ranks.from_main(_read(path) if path and ranks.main else None)
    if found is None:
        with inference(model), ranks.running_out_together():
            mine = [_sums(model, collate(micro)).cpu() for micro in ranks.share(micros, [])]
            noise = _floor(model, micros, collate)
        parts = ranks.gather(mine)[: len(micros)]
        sums = parts[0].new_full((max(map(max, micros)) + 1, 2), torch.nan)
        for micro, part in zip(micros, parts, strict=True):
            sums[list(micro)] = part
        found = {"sums": sums, "floor": torch.tensor(noise, dtype=torch.float64)}
        if path and ranks.main:
            _write(path, found)
    return CachedLogps(found["sums"].to(model.device), float(found["floor"]))


def _ids(batch: Batch, micro: Sequence[int]) -> list[list[int]]:
    """What a cached batch is recognised by."""
    return [batch.input_ids.tolist(), batch.rows.tolist(), list(micro)]


def _digest(thing: Any) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:24]


def _read(path: Path) -> dict[str, Tensor] | None:
    """None: there is no such file, or it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _is_whole(path: Path) -> bool:
    """Whether it is there, and as long as its header says: a computer that lost its power may have
    cut it short after it was renamed."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot keep the reference in {path.parent}: {error}; free some space, or set"
            " preference.reference_cache to none"
        ) from error


def _sums(model: Any, batch: Batch) -> Tensor:
    """[items, 2] log-probabilities, by the products of the loss and summed in fp64 as there."""
    head, states = lm_head(model), batch.states(model)
    logp = linear_logp(
        states, head.weight, batch.target, rows=batch.rows, bias=head.bias, softcap=head.softcap,
        logit_scale=head.logit_scale, impl="chunked" if states.is_cuda else "auto",
    ).logp  # fmt: skip
    offsets = batch.cu_seqlens.to(logp.device, torch.int64)
    sums = torch.segment_reduce(logp.double(), "sum", offsets=offsets)
    return sums.to(logp.dtype).view(-1, 2)


def _floor(model: Any, micros: Sequence[Sequence[int]], collate: Collate) -> float:
    """What the company of a batch does to a margin, in nats.

    Some short and some long items are computed together and alone. Roundings of tokens are
    independent of each other, so their sum grows with the root of their number, up to that of the
    longest item.
    """
    # A micro-batch begins with its shortest item and ends with its longest.
    size = max(2, max(map(len, micros)))
    some = micros[:: max(1, 2 * len(micros) // size)]
    items = list(dict.fromkeys(index for micro in some for index in (micro[-1], micro[0])))[:size]
    shapes = [(b.input_ids.numel(), int(b.cu_seqlens.diff().max())) for b in map(collate, micros)]
    room, longest = map(max, zip(*shapes, strict=True))
    batch = collate(items)
    while len(items) > 2 and batch.input_ids.numel() > room:  # as much as the pass had at once
        items.pop()
        batch = collate(items)
    with inference(model):
        together = _sums(model, batch)
        alone = torch.cat([_sums(model, collate([index])) for index in items])
    lengths = batch.cu_seqlens.diff().view(-1, 2).clamp(min=1).to(together.device)
    off = (together - alone).abs() * (longest / lengths).sqrt()
    sound = off.isfinite()  # an item that is not has no margin either
    if not bool(sound.any()):
        return 0.0
    rounding = torch.finfo(together.dtype).eps * float(together[sound].abs().max())
    return _SLACK * (2 * float(off[sound].max()) + rounding)


def cache_states(
    model: Any,
    micros: Sequence[Sequence[int]],
    collate: Collate,
    folder: Path,
    ranks: Ranks = ALONE,
    head_is_shared: bool = False,
) -> CachedStates:
    """Those of `model` as it is now, a file for each of `micros`, in `folder`; and its head, unless
    `head_is_shared` with the policy and does not train.

    The files of other weights or items have other names; those that are there already are kept, so
    that a caching pass that was interrupted goes on.
    """
    place, files, weights = {}, [], fingerprint(model)
    for micro in micros:
        batch = collate(micro)
        files.append(folder / f"states-{_digest([weights, _ids(batch, micro)])}.safetensors")
        ends = batch.cu_seqlens[::2].tolist()
        for i, index in enumerate(micro):
            place[index] = (files[-1].name, ends[i], ends[i + 1])
    missing = ranks.any_of_each([not _is_whole(path) for path in files])
    todo = list(compress(zip(micros, files, strict=True), missing))
    with inference(model), ranks.running_out_together():
        for micro, path in ranks.share(todo, ([], folder)):
            batch = collate(micro)
            states = batch.states(model)[batch.rows].cpu()
            if micro:
                _write(path, {"states": states})
        floor = _floor(model, micros, collate)
    ranks.barrier()
    head: Head = lm_head(model)
    none = torch.empty(0, head.weight.shape[1], dtype=head.weight.dtype)
    if head_is_shared:
        return CachedStates(folder, place, None, None, none, floor)
    bias = None if head.bias is None else head.bias.detach().clone()
    return CachedStates(folder, place, head.weight.detach().clone(), bias, none, floor)


def fingerprint(model: Any) -> str:
    """Of the weights, or of those that a `FrozenAdapter` computes with, and of what is done with
    them: where one is changed it is another, but for the rarest accident. Whole numbers, whose sums
    are the same in any order, and so on any number of threads."""
    if isinstance(model, FrozenAdapter):
        with model.active() as adapted:
            return fingerprint(adapted)
    state, whole = hashlib.sha256(), {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in active_state(model).items():
        flat = gathered(weight).contiguous().flatten()
        bits = flat.view(whole[flat.element_size()])
        # As 64-bit numbers a large embedding would be a second model.
        parts = [
            torch.stack([x.sum(), x.square().sum(), x[::7].sum(), x[::11].sum()])
            for x in map(Tensor.long, torch.split(bits, _STRETCH))
        ]
        sums = torch.stack(parts).sum(0)
        state.update(f"{name}{list(weight.shape)}{sums.tolist()}".encode())
    state.update(f"{_configuration(model)}{active_scaling(model)}".encode())
    return state.hexdigest()


def _configuration(model: Any) -> dict[str, Any]:
    """What the family computes, such as RoPE and scales; not what saving and loading change."""
    if not hasattr(model, "config"):
        return {}
    facts: dict[str, Any] = json.loads(text_config(model).to_json_string())
    return {key: facts[key] for key in sorted(facts.keys() - _NO_FUNCTION)}
