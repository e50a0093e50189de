"""Where arrays live: the mesh, the batch over all of it, the state over its `fsdp` axis.

The same program runs on one device and on many: batch statistics and gradients are global because
the batch is one global array, and nothing else asks for the number of devices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

# Elements below which a parameter is cheaper to keep whole than to gather for every use.
MIN_SIZE = 2**14


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes `data` and `fsdp`.

    Args:
        data: number of parts of the batch that share no parameters; -1 for all that `fsdp` leaves.
        fsdp: number of parts that parameters and optimiser state are split into as well.
        devices: default all devices of all processes.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (len(devices) // max(fsdp, 1) if data == -1 else data, fsdp)
    if sizes[0] * sizes[1] != len(devices):
        raise ValueError(
            f'mesh.data {data} times mesh.fsdp {fsdp} must be the number of devices, {len(devices)}'
        )
    # Linen networks need Auto axes; the default of make_mesh is Explicit.
    return jax.make_mesh(sizes, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2, devices=devices)


def mesh_of(config: ConfigDict) -> Mesh:
    """Returns the mesh that a config asks for, over all devices.

    Raises:
        ValueError: the devices cannot be divided so, or the batch not among them.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch_size(config.train.batch_size, mesh)
    return mesh


def describe(mesh: Mesh) -> str:
    """Returns e.g. '8 x cpu (data 4, fsdp 2)'."""
    shape = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
    return f'{mesh.size} x {mesh.devices.flat[0].device_kind} ({shape})'


def this_process() -> dict[str, int]:
    """Returns which part of each batch is this process's."""
    return {'process_index': jax.process_index(), 'process_count': jax.process_count()}


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises a ValueError unless every device gets the same number of examples."""
    if batch_size % mesh.size:
        below = batch_size - batch_size % mesh.size
        near = [str(size) for size in (below, below + mesh.size) if size]
        raise ValueError(
            f'train.batch_size {batch_size} must be divisible by the {mesh.size} devices: '
            f'use {" or ".join(near)}'
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device has whole."""
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh, x: jax.ShapeDtypeStruct | jax.Array) -> NamedSharding:
    """Returns the sharding of one array of the state, by its shape.

    The largest axis that `fsdp` divides is split (the last one of several); an array of fewer than
    `MIN_SIZE` elements, or with no such axis, is replicated.
    """
    fsdp = mesh.shape['fsdp']
    axes = [i for i, n in enumerate(x.shape) if n % fsdp == 0]
    if fsdp == 1 or not axes or math.prod(x.shape) < MIN_SIZE:
        return replicated(mesh)
    split = max(axes, key=lambda i: (x.shape[i], i))
    return NamedSharding(mesh, P(*(None,) * split, 'fsdp'))


def with_sharding(mesh: Mesh, tree: Any) -> Any:
    """Returns the abstract state `tree` with the sharding of each array in it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state_sharding(mesh, x)), tree
    )


def with_batch_sharding(mesh: Mesh, tree: Any) -> Any:
    """Returns the abstract batch `tree` with the sharding of each array in it."""
    split = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), tree)


def global_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns global arrays of which this process gives its rows, `[b / processes, ...]` each."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
