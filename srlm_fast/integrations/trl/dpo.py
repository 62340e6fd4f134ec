"""`DPOTrainer` on packed batches, with the loss and its gradients in one pass over the head."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from srlm_fast.data.jsonl import write_json
from srlm_fast.errors import UserError
from srlm_fast.integrations.trl.accelerate import accelerate
from srlm_fast.integrations.trl.metrics import PairMetrics
from srlm_fast.integrations.trl.packed import Packed, PackingCollator
from srlm_fast.model.forward import lm_head
from srlm_fast.model.prefix import refusal
from srlm_fast.train.noise import NoiseDetector, Refinement
from srlm_kernels import PreferenceLoss, linear_preference_loss, losses

TOKENISED = {"prompt_ids", "chosen_ids", "rejected_ids"}
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # TRL's other losses ignore the option
FUSED = losses.LOSSES.keys() - {"simpo", "r_dpo"}  # which TRL does not have
NOISE = "spa_noise.json"  # in a checkpoint's folder


@dataclass
class SrlmDPOConfig(DPOConfig):  # type: ignore[misc]
    """`DPOConfig` with SPA's settings, for `loss_type="spa"`; see `train.noise.Refinement`."""

    spa_alpha: float = field(default=0.1, metadata={"help": "Share of a flagged label reversed."})
    spa_lambda: float = field(default=0.5, metadata={"help": "Extrapolation strength."})
    spa_k_percent: float = field(default=10.0, metadata={"help": "Share of pairs to flag."})
    spa_tau: Literal["window", "official"] = field(
        default="window", metadata={"help": "How the threshold is found."}
    )
    spa_warmup_fraction: float = field(
        default=0.2, metadata={"help": "First share of the steps, without refinement."}
    )


class SrlmDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """A drop-in for `DPOTrainer`: its arguments, losses, metrics and checkpoints.

    Batches are packed and a pair's prompt runs once (`padding_free` is always on, so to speak)
    where the model allows it; else TRL's padded batches are kept, with a warning. Datasets may hold
    token ids: `prompt_ids`, `chosen_ids`, `rejected_ids`. A single `loss_type` without WPO
    weights, f-divergence or ld_alpha is computed together with its gradients; any other by TRL's
    own code from per-token log-probs. Metrics wait for the device once per logging interval.
    `loss_type="spa"` is SPA's refined loss, on one process.
    """

    args: Any
    data_collator: Any
    model: Any
    ref_model: Any
    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._packed: Packed | None = None
        self._is_ready = False
        self._pair_metrics = {mode: PairMetrics() for mode in ("train", "eval")}
        self._noise: NoiseDetector | None = None
        self._noise_step = -1
        self._stopped_at: Path | None = None  # what a resumed training's detector knew
        super().__init__(*args, **kwargs)
        self._get_ready()

    def _get_ready(self) -> None:
        """Once, as soon as the models are there; precomputing reference log-probs needs it too."""
        if self._is_ready:
            return
        self._is_ready = True
        if unknown := set(self.loss_types) - FUSED - {"sft", "spa"}:
            known = ", ".join(sorted(FUSED | {"sft", "spa"}))
            raise UserError(f"unknown loss_type {min(unknown)!r}; known are {known}")
        accelerate(self, packed=lambda: self._packed)
        reason = self._padded_because()
        if reason is None:
            self.data_collator = PackingCollator(self.data_collator)
        else:
            warnings.warn(f"batches are padded: {reason}", stacklevel=3)
        self._loss = self._fused_loss_type() if reason is None else None
        if "spa" in self.loss_types:
            self._check_spa(reason)

    def _padded_because(self) -> str | None:
        peft = getattr(self.model, "peft_config", {}).values()
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in peft):
            return "prompt-learning adapters add tokens of their own"
        config = self.model.config.get_text_config()
        if self.aux_loss_enabled or getattr(config, "output_router_logits", False):
            return "the loss of the experts' router is one of padded batches"
        if any(len({*getattr(m, "hf_device_map", {}).values()}) > 1 for m in self._models()):
            return "the model is split over several devices"
        if self._is_vlm:
            return "images stand between the tokens"
        if not self.args.disable_dropout:
            return "packed attention has no dropout, and disable_dropout is False"
        checkpointing = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            return "reentrant checkpointing cannot recompute packed attention"
        if self.args.neftune_noise_alpha is not None:
            return "NEFTune scales its noise by the length of a row"
        reasons = [refusal(model) for model in self._models()]
        return next((reason for reason in reasons if reason), None)

    def _models(self) -> list[Any]:
        """The policy, and a reference that is another model."""
        models = [model for model in (self.model, self.ref_model) if model is not None]
        return [self.accelerator.unwrap_model(model) for model in models]

    def _fused_loss_type(self) -> Callable[..., Tensor] | None:
        """The loss as a callable of sums of log-probs; None: TRL computes it token by token."""
        if len(self.loss_types) != 1 or self.use_weighting or self.ld_alpha is not None:
            return None
        if self.f_divergence_type != "reverse_kl":
            return None
        if len({(h.softcap, h.logit_scale) for h in map(lm_head, self._models())}) > 1:
            return None  # one pass has one transform of logits
        name = self.loss_types[0]
        if name == "spa":
            name = "sigmoid"  # until refinement begins, and in evaluation
        if name not in FUSED:
            return None
        options = {"label_smoothing": self.label_smoothing} if name in SMOOTHED else {}
        if name == "discopop":
            options["tau"] = self.args.discopop_tau
        kind: Any = losses.LOSSES[name]
        try:
            made: Callable[..., Tensor] = kind(beta=self.beta, **options)
        except ValueError as error:
            raise UserError(f"loss_type {name}: {error}") from error
        return made

    def _check_spa(self, padded_because: str | None) -> None:
        if not hasattr(self.train_dataset, "__len__"):
            raise UserError("loss_type spa needs a dataset whose length is known, no stream")
        if self._loss is None:
            why = padded_because or "it is combined with other losses, weights or divergences"
            raise UserError(f"loss_type spa needs packed batches and nothing beside it: {why}")
        if self.precompute_ref_logps:
            raise UserError(
                "loss_type spa mixes logits of policy and reference: set "
                "precompute_ref_log_probs to False"
            )
        if not isinstance(self.args, SrlmDPOConfig):
            raise UserError("loss_type spa has settings of its own: pass a SrlmDPOConfig as args")
        if self.accelerator.num_processes > 1:
            raise UserError(
                "loss_type spa of SrlmDPOTrainer runs on one process; several are for "
                "srlm_fast.train.preference.train_preference"
            )
        if self.args.spa_tau not in ("window", "official"):
            raise UserError(f"spa_tau must be window or official, not {self.args.spa_tau!r}")
        self._refinement()

    def _refinement(self) -> Refinement:
        """Raises UserError for settings out of range."""
        config = self.args
        return Refinement(
            alpha=config.spa_alpha, lam=config.spa_lambda, k_percent=config.spa_k_percent,
            tau=config.spa_tau, warmup_fraction=config.spa_warmup_fraction,
        )  # fmt: skip

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        if not next(iter(dataset)).keys() >= TOKENISED:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None or args.truncation_mode != "keep_start":
            return dataset
        return dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._get_ready()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        inputs, packed = _without_packed(inputs)
        return self._with_packed(packed, partial(super().compute_ref_log_probs, model, inputs))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs, packed = _without_packed(inputs)
        if packed is None or self._loss is None:
            theirs = partial(super()._compute_loss, model, inputs, return_outputs)
            return self._with_packed(packed, theirs)
        loss = self._fused_loss(model, inputs, packed.to(self.accelerator.device))
        if not return_outputs:
            return loss
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():  # the logits that `compute_metrics` is given
            return loss, model(input_ids=ids, attention_mask=mask, use_cache=False)

    def _with_packed(self, packed: Packed | None, call: Callable[[], Any]) -> Any:
        self._packed = packed
        try:
            return call()
        finally:
            self._packed = None

    def _fused_loss(self, model: Any, inputs: dict[str, Any], packed: Packed) -> Tensor:
        mode = "train" if self.model.training else "eval"
        pairs = (len(packed.cu_seqlens) - 1) // 2
        loss_fn, extrapolation = self._current_loss(mode)
        compared = self._reference(inputs, packed)

        def inside(base: Any) -> PreferenceLoss:
            head = lm_head(base)
            return linear_preference_loss(
                packed.states(base), head.weight, packed.target, packed.cu_seqlens, loss_fn,
                scale=self.loss_weights[0] / pairs, rows=packed.rows, bias=head.bias, **compared,
                extrapolation=extrapolation, softcap=head.softcap, logit_scale=head.logit_scale,
                outputs=("entropy", "mean_logit", "is_top1"),
            )  # fmt: skip

        result: PreferenceLoss = model(inside=inside)
        noise = None
        if self._noise is not None and mode == "train":
            noise = self._noise.observe(range(pairs), result.ext_margins)
        state = self.accelerator.gradient_state  # as `gather_for_metrics` asks it
        repeated = state.end_of_dataloader and 0 < state.remainder <= self.accelerator.process_index
        self._pair_metrics[mode].add(result, packed, self.beta, noise, repeated)
        return result.loss

    def _reference(self, inputs: dict[str, Any], packed: Packed) -> dict[str, Any]:
        """Keywords of `linear_preference_loss`."""
        if self.precompute_ref_logps:
            sums = [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
            return {"ref_logp": torch.stack(sums, 1).flatten()}

        def inside(base: Any) -> Any:
            return packed.states(base), lm_head(base)

        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            if self.ref_model is None:
                plain = self.accelerator.unwrap_model(self.model)
                name = "ref" if "ref" in plain.peft_config else None
                with use_adapter(plain, adapter_name=name):
                    hidden, head = self.model(inside=inside)
            else:
                hidden, head = self.ref_model(inside=inside)
        return {"ref_hidden": hidden, "ref_weight": head.weight, "ref_bias": head.bias}

    def _current_loss(self, mode: str) -> tuple[Callable[..., Tensor], float | None]:
        assert self._loss is not None
        if "spa" not in self.loss_types or mode == "eval":
            return self._loss, None
        steps = max(1, self.state.max_steps)  # 0 before training
        if self._noise is None or self._noise.steps != steps:
            self._noise = NoiseDetector(
                self._refinement(), beta=self.beta, num_pairs=len(self.train_dataset), steps=steps,
                like=torch.zeros((), device=self.accelerator.device),
            )  # fmt: skip
            if self._stopped_at is not None:
                self._noise.restore(json.loads(self._stopped_at.read_text("utf-8")))
                self._stopped_at = None
        if self._noise_step != self.state.global_step:
            self._noise_step = self.state.global_step
            self._noise.begin_step(self._noise_step, _no_pass_over_all)
        return self._noise.loss(), self.args.spa_lambda

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._noise is not None:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            write_json(folder / NOISE, self._noise.state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, NOISE)
        if "spa" in self.loss_types and not path.is_file():
            raise UserError(f"{path.parent} was not written with loss_type spa: it has no {NOISE}")
        self._stopped_at = path if path.is_file() else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; what was collected on the device is read first."""
        # Both: an evaluation logs how many tokens were trained on.
        for mode in ("train", "eval"):
            for row in self._pair_metrics[mode].read(self.accelerator):
                tokens = int(row.pop("num_tokens"))
                self._total_train_tokens += tokens if mode == "train" else 0
                for name, value in row.items():
                    self._metrics[mode][name].append(value)
                self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)


def _without_packed(inputs: dict[str, Any]) -> tuple[dict[str, Any], Packed | None]:
    """What models and TRL take, and our form of it."""
    return {k: v for k, v in inputs.items() if k != "packed"}, inputs.get("packed")


def _no_pass_over_all() -> Tensor:
    raise AssertionError("only tau: dataset scores all pairs")
