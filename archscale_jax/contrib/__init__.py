"""Methods around the core: GradInit (learned initialization) and TINY (networks that grow)."""

from archscale_jax.contrib._gradinit import (
    GradInitRecord,
    gradinit,
    scale_parameters,
    vertex_groups,
)
from archscale_jax.contrib._growth import (
    Bottleneck,
    Edit,
    Growth,
    GrowthSchedule,
    Link,
    NeuronGroup,
    bottleneck,
    choose_growth,
    compact,
    count_neurons,
    count_parameters,
    find_neuron_groups,
    geometric,
    grow,
    grown_architecture,
    widen,
)

__all__ = [
    "Bottleneck",
    "Edit",
    "GradInitRecord",
    "Growth",
    "GrowthSchedule",
    "Link",
    "NeuronGroup",
    "bottleneck",
    "choose_growth",
    "compact",
    "count_neurons",
    "count_parameters",
    "find_neuron_groups",
    "geometric",
    "gradinit",
    "grow",
    "grown_architecture",
    "scale_parameters",
    "vertex_groups",
    "widen",
]


def __dir__() -> list[str]:
    return __all__
