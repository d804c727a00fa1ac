"""The pictures of docs/your_model.md: ResNet-18 and a transformer block, as they are traced.

python -m experiments.lab.pictures --workdir=docs/figures
"""

import pathlib

from absl import flags

import archscale_jax as archscale
from experiments.lab import common
from experiments.lab.gallery import IMAGES, TOKENS, OneBlock, ResNet, traced

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/pictures", "Folder for the pictures.")


def run() -> None:
    """Draws both models."""
    workdir = pathlib.Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    pictures = {
        "resnet18": ("ResNet-18", ResNet(), IMAGES),
        "transformer_block": ("A transformer block", OneBlock(), TOKENS),
    }
    for name, (title, model, inputs) in pictures.items():
        path = workdir / f"{name}.png"
        archscale.draw(traced(model, inputs), path, title=title)
        print(f"figure: {path}")


if __name__ == "__main__":
    common.run_binary(run)
