"""What --help of a binary prints: its flags by what they decide, not by the alphabet."""

import sys

from absl import flags

from experiments.lab import display, runners

FLAGS = flags.FLAGS

GROUPS = {
    "Network": (
        *("architecture", "base_architecture", "family", "kind", "preset", "depth", "base_depth"),
        *("width", "base_width", "kernel_size", "activation", "normalization", "arrangement"),
        *("initialization", "precision", "context", "head_size", "queries_per_key"),
    ),
    "Data": ("dataset", "data_dir", "text", "flip", "padding"),
    "Training": (
        *("optimizer", "rate", "base_rate", "batch_size", "base_batch_size", "epochs", "steps"),
        *("base_steps", "momentum", "nesterov", "weight_decay", "clip", "schedule"),
        *("warmup_steps", "seed", "seeds", "num_seeds"),
    ),
}
"""Flags that mean the same in all binaries that have them."""

DAG = """\
A DAG string is a network: groups of digits between _, one for each vertex after the input. Group k
lists the edges into vertex k from vertices 0 to k-1: 0 none, 1 a skip, 2 a layer. 2 is one hidden
layer, 2_02_002 a chain of three, 2_12 two layers with a skip around both.
"""


def text(doc: str) -> str:
    """Returns the help of the binary that runs; its own flags come first."""
    key = {flag.name: flag for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    running = [flag.name for flag in FLAGS.flags_by_module_dict().get(runners.__name__, ())]
    output = [flag.name for flag in FLAGS.flags_by_module_dict().get(display.__name__, ())]
    known = {**GROUPS, "Where trials run": running, "Folder and output": ["workdir", *output]}
    ours = key.keys() - {name for names in known.values() for name in names}
    parts = [doc.strip()]
    for title, names in {"This binary": sorted(ours), **known}.items():
        found = flags.FlagValues()
        for name in names:
            if name in key:
                found[name] = key[name]
        if len(found):
            parts.append(f"{title}\n{found.get_help('  ', include_special_flags=False)}")
    if any("architecture" in name for name in key):
        parts.append(DAG.strip())
    return "\n\n".join(parts) + "\n"
