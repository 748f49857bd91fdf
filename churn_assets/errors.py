"""The error a person can act on."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can mend: one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with 2.
    """
