"""What every test shares: a bounded machine, repeatable examples, the golden vectors.

The environment is set while this file is imported, before any test module imports JAX.
"""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# On a GPU: the workers share its memory instead of each claiming most of it at start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_caches: list[str] = []
"""The folder of compiled programs that this process made, and removes at its end."""


def _share_cores() -> None:
    """Gives an xdist worker its share of the cores; a run without workers keeps them all.

    NPROC sizes XLA's CPU thread pools. --xla_cpu_multi_thread_eigen=false no longer does.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if workers == 0:
        return
    share = str(max(1, (os.cpu_count() or 1) // workers))
    for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, share)


_share_cores()


def _compile_faster() -> None:
    """Has XLA compile for CPUs in a third to two thirds of the time that it takes by default.

    Its older generator of code takes half to a quarter of the newer one's, and code in one piece
    three quarters of code in many. XLA_FLAGS=--xla_cpu_use_fusion_emitters=true in the environment
    tests with the generator that users have; `tests.devices` does where bits are compared. An
    unknown flag would end every process, so flags are set for versions of JAX that have been tried.
    """
    if not importlib.metadata.version("jax").startswith("0.10."):
        return
    faster = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
    flags = os.environ.get("XLA_FLAGS", "")
    added = [f"--{name}={value}" for name, value in faster.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *added]).strip()


_compile_faster()


def _share_compiled() -> None:
    """What one process has compiled, the others find: workers, and the binaries they start.

    Of this run alone, unless the environment names a folder, which is then kept. Workers inherit
    the environment of the process that starts them.
    """
    if _CACHE not in os.environ:
        _caches.append(tempfile.mkdtemp(prefix="archscale_jax_compiled_"))
        os.environ[_CACHE] = _caches[0]
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if importlib.metadata.version("jaxlib") == "0.10.0":
        # It complains on standard error of every program that another process has compiled.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


_share_compiled()


def pytest_unconfigure() -> None:
    for folder in _caches:
        shutil.rmtree(folder, ignore_errors=True)


# The same examples on every run. Compilation makes a first example slow, so time fails nothing.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden vectors beside the checkout; skips where it is absent."""
    folder = _ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("no golden vectors: there is no folder ../shared/golden beside the project")
    return folder


def pytest_collection_finish() -> None:
    """Spares the garbage collector what is there for good: all that was imported, all tests.

    What tests leave behind it walks a hundred times less often than by default, where that takes a
    twentieth of all time.
    """
    gc.collect()
    gc.freeze()
    youngest, middle, oldest = gc.get_threshold()
    gc.set_threshold(youngest, middle, 100 * oldest)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles with few optimizations where a test is marked so.

    JAX does not tell what it has compiled so from the rest, hence forgets it where that changes.
    """
    import jax  # not before the environment is set

    quick = item.get_closest_marker("quick_compilation") is not None
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()


@pytest.fixture(scope="session")
def binary_environment() -> dict[str, str]:
    """The environment of binaries: this one, on CPUs, quick to compile (see above)."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture
def run_again(tmp_path_factory):
    """Runs a binary as its users do: name, --workdir, further flags; `prepare` as in `run_forked`.

    Forked from a process that has imported what all binaries need, which takes them seconds.
    """
    from tests.binaries import run_forked  # imports JAX

    def run(name: str, workdir: Path, *flags: str, prepare=None):
        folder = tmp_path_factory.mktemp("output")
        return run_forked(name, [f"--workdir={workdir}", *flags], folder, _ROOT, prepare=prepare)

    return run
