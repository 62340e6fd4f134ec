"""The one exception that means "the user can fix this"."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one sentence that says what is wrong and what to do about it; the command line
    prints it without a traceback (`--debug` shows the traceback). Exit code 2 when it is raised
    before the run starts, 1 when it is raised inside a run.
    """
