"""What a person is told when something cannot be done: sentences with the remedy, never tracebacks."""

from collections.abc import Collection

# How many of many are named in a message.
NAMED = 3


class UserError(Exception):
    """The world does not fit the request (exit status 1); the message says why and what to do."""


class UsageError(UserError):
    """The request itself cannot be right, whatever the data (exit status 2)."""


def first_line(error: Exception) -> str:
    """Return the first line of what a library's error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def named(things: Collection[str], sep: str = "; ") -> str:
    """Name a few of many things, and count the rest."""
    some = sep.join(list(things)[:NAMED])
    return some if len(things) <= NAMED else f"{some}{sep}and {len(things) - NAMED:,} more"
