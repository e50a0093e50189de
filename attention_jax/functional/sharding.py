"""Running a function on each device's part of the batch, where XLA's partitioner would not."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def per_example(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes `function(x, *weights)` run on each device's own examples.

    For an operation that treats every example alike, but that the partitioner does not know how to
    split over the batch (it gathers the whole batch on every device) or cannot split at all
    (a Pallas kernel). Acts under `jax.set_mesh(mesh)`, whose axes must all be automatic: the batch
    is taken as split over all of them, the weights as whole on every device; their gradients are
    summed over the devices.

    Where that cannot be, the function is called as it is: no mesh, one device, a batch that the
    devices do not divide (as in the `init` of a module with one example), or code that already
    runs on one device's part (inside `shard_map`). `vmap` works, but not with `spmd_axis_name`.

    Args:
        function: `x [b, ...]`, an array or a tuple of them, and any number of weights ->
            `y [b, ...]`, examples independent.

    Returns:
        A function of the same arguments and result.
    """

    def call(x: Any, *weights: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
        size = jax.tree.leaves(x)[0].shape[0]
        if mesh.empty or mesh.size == 1 or not automatic or size % mesh.size:
            return function(x, *weights)
        batch = PartitionSpec(mesh.axis_names)
        split = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(batch,) + (PartitionSpec(),) * len(weights),
            out_specs=batch,
            check_vma=False,  # a Pallas kernel does not say over which axes its result varies
        )
        return split(x, *weights)

    return call
