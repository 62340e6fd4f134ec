"""Checks that the groups of a configuration share."""

from __future__ import annotations

from srlm_fast.errors import UserError


def require(holds: bool, rule: str) -> None:
    """`rule` begins with the field's name, to which the loader adds the group's."""
    if not holds:
        raise UserError(rule)


def require_sampling(temperature: float, top_p: float) -> None:
    """Raises UserError where no distribution could be sampled so."""
    require(temperature >= 0, "temperature must not be negative")
    require(0 < top_p <= 1, "top_p must be above 0 and at most 1")
