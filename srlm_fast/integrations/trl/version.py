"""Which TRL this integration was written for and tested with."""

from __future__ import annotations

import importlib.metadata

from srlm_fast.errors import UserError

# We replace what TRL keeps to itself, so another minor version may have other names or signatures.
TESTED = "1.16"


def check_trl() -> None:
    """Raises UserError when TRL is missing or of another minor version."""
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("TRL is not installed: pip install 'srlm_fast[trl]'") from None
    if ".".join(found.split(".")[:2]) != TESTED:
        raise UserError(
            f"srlm_fast.integrations.trl works with TRL {TESTED}, found {found}: "
            f"pip install 'trl~={TESTED}.0'"
        )
