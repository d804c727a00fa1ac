"""Packages that a part of the library needs and `import archscale_jax` does without."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed_by(user: str, extra: str) -> Iterator[None]:
    """Says how to install what an import in the `with` does not find.

    Args:
      user: public name of what imports.
      extra: the extra of archscale_jax that brings the package.

    Raises:
      ModuleNotFoundError: names the package, `user`, and the line that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{user} needs {error.name}, which is not installed: run, in a checkout of "
            f"archscale_jax, pip install '.[{extra}]'",
            name=error.name,
        ) from error
