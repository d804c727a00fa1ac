import email
import json
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

import archscale_jax

ROOT = pathlib.Path(__file__).parents[1]
SLOW = {"IPython", "rich", "scipy"}
"""What the import does without, and core functions or JAX need."""
MISSING = {"flax", "matplotlib", "nats_bench", "orbax", "ray", "sklearn", "tensorflow_datasets"}
"""What core functions do without: Python does not find these packages."""

USE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax

before = set(sys.modules)
import archscale_jax
added = {name.partition(".")[0] for name in set(sys.modules) - before}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())

from archscale_jax import *

def apply(params, x):
    for weight in params["hidden"]:
        x = jax.nn.relu(x @ weight)
    return x @ params["readout"]

def zeros(depth):
    return {"hidden": [jnp.zeros((8, 8))] * depth, "readout": jnp.zeros((8, 3))}

x = jnp.ones((4, 8))
arch, base = (trace(apply, zeros(depth), x) for depth in (4, 2))
params = initialize(jax.random.key(0), zeros(4), arch)
tx = optax.chain(optax.sgd(0.1), scale_by_architecture(arch, base))
updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
print(report(arch, base), file=sys.stderr)

errors = []
try:
    draw(arch)
except ImportError as error:
    errors.append([error.name, str(error)])
print(json.dumps({
    "path": archscale_jax.__file__,
    "added": sorted(added),
    "factors": np.unique(updates["hidden"][0] / -0.1).tolist(),
    "deviation": float(jnp.std(params["hidden"][0])),
    "errors": errors,
}))
"""


EXTRAS = [  # the package that is missing, a part of who needs it, the extra
    ("matplotlib", "archscale_jax.draw ", "plot"),
]


def build(root, folder):
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder in which the wheel is installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(built[0])], check=True)
    return folder


def test_wheel_holds_the_library_alone(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(metadata_name))
    information = metadata_name.removesuffix("METADATA")
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("archscale_jax/**/*.py")}
    files = ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    assert names == sources | {"archscale_jax/py.typed", *(information + file for file in files)}
    assert metadata["Version"] == archscale_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()


def test_sdist_builds_the_same_wheel_and_the_same_sdist(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    tops = {path.name for path in root.iterdir()}
    assert {"tests", "docs", "experiments", "benchmarks", "Makefile", "constraints.txt"} <= tops
    assert not tops & {"runs", "data", "build", "dist", ".venv", ".git"}
    assert not list(root.rglob("*.pyc"))
    assert max(path.stat().st_size for path in root.rglob("*")) <= 2**20
    again = build(root, tmp_path / "again")
    assert [one.read_bytes() for one in again] == [wheel.read_bytes(), sdist.read_bytes()]


def test_core_is_quick_to_import_works_alone_and_names_the_extras(installed, binary_environment):
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", USE, *MISSING],
        cwd=installed,  # not the checkout
        env=binary_environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert pathlib.Path(found["path"]).is_relative_to(installed)
    assert "archscale_jax" in found["added"]
    assert not (SLOW | MISSING) & set(found["added"])
    # A path of 4 layers beside one of 2, the stem counted: η ∝ (ΣL³)^-1/2 [AAS Eq. 8].
    assert found["factors"] == pytest.approx([8**-0.5], rel=1e-5)
    assert found["deviation"] == pytest.approx((2 / 8) ** 0.5, rel=0.25)  # of 64 draws
    assert len(found["errors"]) == len(EXTRAS)
    for (name, message), (package, user, extra) in zip(found["errors"], EXTRAS, strict=True):
        how = f"run, in a checkout of archscale_jax, pip install '.[{extra}]'"
        assert name == package
        assert message.endswith(f"{user}needs {package}, which is not installed: {how}")
