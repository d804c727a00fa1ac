"""Are models that others wrote read right? `python -m benchmarks.public_models`

Models of packages that people install, unmodified, at small and at real size, in environments of
their own: traced and every leaf bound; roles against `roles.json`, which was checked by hand;
trained for five updates of AdamW as the plan says; audited; labels of Muon; seconds and memory of
`parametrize` at real size, on shapes. An environment sees the packages of this one, and adds those
of its models without their dependencies. A run that was cut off goes on.

With `--coordinates`: how much five updates change some of these models at one, two and four times a
width, see `benchmarks.public_models.coordinates`.
"""

import json
import os
import pathlib
import subprocess
import sysconfig
import venv
from typing import Any

from absl import flags

from benchmarks import common

FLAGS = flags.FLAGS
PACKAGES = {
    "hugging_face": (
        "transformers==4.57.6",
        "tokenizers==0.22.1",
        "huggingface-hub<1",
        "safetensors",
        "regex",
        "pyyaml",
        "filelock",
        "hf-xet",
    ),
    "equinox_models": (
        "equinox",
        "equimo",
        "jaxonmodels",
        "flowjax",
        "paramax",
        "lineax",
        "beartype",
        "einops",
        "ftfy",
        "jaxtyping",
        "regex",
        "requests",
        "wadler-lindig",
        "wcwidth",
    ),
    "others": (
        "dm-haiku",
        "mamba2-jax",
        "flaxdiff",
        "diffusers==0.35.1",
        "huggingface-hub<1",
        "safetensors",
        "regex",
        "pyyaml",
        "filelock",
        "hf-xet",
        "einops",
    ),
    "keras_models": (
        "keras==3.15.1",
        "keras-hub==0.32.0",
        "namex",
        "optree",
        "h5py",
        "kagglehub",
        "kagglesdk",
        "tokenizers==0.22.1",
        "regex",
        "sentencepiece",
    ),
    "more_models": (
        "brax==0.14.2",
        "mujoco==4.0.0",
        "mujoco-core==4.0.0",
        "mujoco-studio==4.0.0",
        "mujoco-mjx==3.17.0",
        "flask",
        "jaxopt",
        "ml_collections",
        "trimesh",
        "distrax==0.1.9",
        "tfp-nightly",
        "decorator",
        "gast",
        "haliax==1.4.dev453",
        "aqtp",
        "diffrax==0.7.2",
        "optimistix",
        "lineax",
        "equinox",
        "jaxtyping",
        "wadler-lindig",
    ),
}
flags.DEFINE_bool("coordinates", False, "Measure the changes that updates make, over width.")
flags.DEFINE_list("module", list(PACKAGES), "Modules of benchmarks/public_models.")
flags.DEFINE_list("only", [], "Names of models; all by default.")
flags.DEFINE_string("workdir", "runs/public_models", "Folder of environments and results.jsonl.")
ROLES = pathlib.Path(__file__).parent / "roles.json"


def main() -> None:
    workdir = pathlib.Path(FLAGS.workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    kind = "coordinates" if FLAGS.coordinates else "measure"
    journal = workdir / ("coordinates.jsonl" if FLAGS.coordinates else "results.jsonl")
    for module in common.sized(FLAGS.module, FLAGS.module[:1]):
        python = environment(workdir / module, module)
        command = [str(python), "-m", f"benchmarks.public_models.{kind}", f"--module={module}",
                   f"--journal={journal}", f"--only={','.join(FLAGS.only)}"]  # fmt: skip
        paths = os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, cwd=common.ROOT, env=os.environ | {"PYTHONPATH": paths})
    found = [json.loads(line) for line in journal.read_text().splitlines()]
    if FLAGS.coordinates:
        lines = [[str(row[one]) for one in CHANGES] for row in found]
        common.show("Changes over width ×1, ×2, ×4 (flat: 1.5)", [list(CHANGES), *lines])
        common.write_results("public_models_coordinates", {"rows": found})
        return
    golden = json.loads(ROLES.read_text())
    rows = [judged(row, golden) for row in found]
    common.show(
        "Public models", [list(COLUMNS), *([str(row[one]) for one in COLUMNS] for row in rows)]
    )
    common.write_results("public_models", {"rows": rows})


def environment(folder: pathlib.Path, module: str) -> pathlib.Path:
    """Returns the interpreter of an environment, which is made where there is none."""
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, clear=True, with_pip=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "base.pth").write_text(sysconfig.get_paths()["purelib"])
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, *PACKAGES[module]], check=True)
        ready.touch()
    return python


CHANGES = ("model", "outputs", "outputs ratio", "hidden", "hidden ratio", "worst", "flat",
           "vertices", "seconds")  # fmt: skip
COLUMNS = ("model", "parameters", "roles", "falls", "audit", "muon", "real", "seconds", "GiB")


def judged(row: dict[str, Any], golden: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Returns the row of the table: what is right, and what is not by name."""
    if row["small"] != "ok":
        return dict.fromkeys(COLUMNS, "") | {"model": row["model"], "roles": row["small error"]}
    expected = golden.get(row["model"])
    wrong = {
        name: role for name, role in row["roles"].items() if (expected or {}).get(name) != role
    }
    return {
        "model": row["model"],
        "parameters": row["parameters"],
        "roles": "right" if not wrong else "not checked" if expected is None else wrong,
        "falls": f"{row['losses'][0]:.3g} to {row['losses'][-1]:.3g}",
        "audit": row["findings"] if row.get("audit") else row.get("audit error", "clean"),
        "muon": f"{row['muon']} of {row['hidden']}" if "hidden" in row else row["muon error"],
        "real": row.get("real", row.get("real error")),
        "seconds": row.get("real seconds", ""),
        "GiB": row.get("real GiB", ""),
    }


if __name__ == "__main__":
    common.run(main)
