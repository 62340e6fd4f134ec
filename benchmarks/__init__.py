"""Benchmarks. `python -m benchmarks` measures the ops; README.md says how to read the rows."""

import srlm_fast  # noqa: F401  (in a bare clone this is what makes srlm_kernels importable)
