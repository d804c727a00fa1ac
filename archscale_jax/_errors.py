"""The words of an error: what was found, what is accepted, and the nearest to what was meant."""

import difflib
from collections.abc import Iterable

_SHOWN = 20
"""Names that a message lists; a network may have hundreds of layers."""


def unknown(what: str, found: object, accepted: Iterable[object]) -> str:
    """Returns the message for a name that is not accepted.

    Args:
      what: what the name is of, such as `learning-rate rule`.
      found: the name that was given.
      accepted: the names there are.
    """
    names = [str(name) for name in accepted]
    shown = ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" * (len(names) > _SHOWN))
    near = difflib.get_close_matches(found, names, 1) if isinstance(found, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    accepted_are = f"accepted are {shown}" if names else "there are none"
    return f"unknown {what} {found!r}; {accepted_are}{hint}"
