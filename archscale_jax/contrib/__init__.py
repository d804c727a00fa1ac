"""Methods around the core: learned initialization (GradInit, NIO), networks that grow (TINY)."""

from archscale_jax.contrib._gradinit import (
    GradInitRecord,
    NioRecord,
    gradinit,
    nio,
    scale_parameters,
    vertex_groups,
)
from archscale_jax.contrib._growth.architecture import grown_architecture
from archscale_jax.contrib._growth.bottleneck import Bottleneck, bottleneck
from archscale_jax.contrib._growth.expand import Expanded, expand
from archscale_jax.contrib._growth.find_groups import find_neuron_groups
from archscale_jax.contrib._growth.grow import Growth, grow
from archscale_jax.contrib._growth.neuron_groups import Link, NeuronGroup
from archscale_jax.contrib._growth.schedule import Edit, GrowthSchedule, choose_growth, geometric
from archscale_jax.contrib._growth.widen import compact, count_neurons, count_parameters, widen

__all__ = [
    "Bottleneck",
    "Edit",
    "Expanded",
    "GradInitRecord",
    "Growth",
    "GrowthSchedule",
    "Link",
    "NeuronGroup",
    "NioRecord",
    "bottleneck",
    "choose_growth",
    "compact",
    "count_neurons",
    "count_parameters",
    "expand",
    "find_neuron_groups",
    "geometric",
    "gradinit",
    "grow",
    "grown_architecture",
    "nio",
    "scale_parameters",
    "vertex_groups",
    "widen",
]


def __dir__() -> list[str]:
    return __all__
