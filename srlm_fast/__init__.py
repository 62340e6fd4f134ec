"""srlm_fast: self-improving preference training of HuggingFace causal LMs, in one process."""

import importlib.util
import sys
from pathlib import Path

# A bare clone runs too: `kernels/` is a second source root that only an install would map.
if importlib.util.find_spec("srlm_kernels") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))

__version__ = "0.1.0"
