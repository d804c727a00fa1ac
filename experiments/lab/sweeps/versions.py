"""What must be the same wherever the trials of a study run, for its numbers to be of one study."""

import hashlib
import importlib.metadata
import importlib.util
import pathlib
import platform
from collections.abc import Iterable, Mapping

DISTRIBUTIONS = ("flax", "jax", "jaxlib", "numpy", "optax")


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Returns the versions of Python and of what computes, and digests of the source of packages.

    Args:
      packages: names of further packages whose source counts; `archscale_jax` always does. One
        that cannot be found, such as `__main__`, is omitted.
    """
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    for name in sorted({"archscale_jax", *packages} - {"__main__"}):
        if digest := source_digest(name):
            found[f"source of {name}"] = digest
    return found


def source_digest(package: str) -> str | None:
    """Returns 12 hex digits of SHA-256 over a package's Python files; None where it has none."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin in (None, "built-in", "frozen"):
        return None
    origin = pathlib.Path(spec.origin)
    folder = origin.parent
    paths = sorted(folder.rglob("*.py")) if spec.submodule_search_locations else [origin]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def differing_versions(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """Lists what differs, `name found (expected)`; empty where nothing does."""
    return ", ".join(
        f"{name} {found.get(name, 'missing')} (not {expected.get(name, 'missing')})"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    )
