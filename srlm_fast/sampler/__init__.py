"""Sampling and scoring with the trainer's own model; each prompt is computed once."""

from srlm_fast.sampler.engine import Sampler
from srlm_fast.sampler.params import Completion, Output, SamplingParams

__all__ = ["Completion", "Output", "Sampler", "SamplingParams"]
