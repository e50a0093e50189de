"""Devices to compile for: their published figures, and how XLA is told of them."""

import dataclasses
import math
import re

import jax
from jax.experimental import topologies

from attention_jax import checks


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes:
        memory: bytes of its own (high-bandwidth) memory.
        bandwidth: bytes a second between that memory and the cores.
        axes: number of axes of a slice of several; 0 for a GPU.
    """

    memory: int
    bandwidth: float
    axes: int


# cloud.google.com/tpu/docs/{v5e,v6e,v5p}, and NVIDIA's data sheet of the H100 SXM. (TPU v4 is not
# here: compiled without the chip, its two cores count as two devices.)
CHIPS = {
    'v5e': Chip(16 * 2**30, 819e9, 2),
    'v6e': Chip(32 * 2**30, 1640e9, 2),
    'v5p': Chip(95 * 2**30, 2765e9, 3),
    'h100': Chip(80 * 2**30, 3.35e12, 0),
}

# What XLA asks of a GPU that it cannot ask the GPU: an H100 SXM.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 13 }
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
"""

TPU_SETTINGS = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # else a lock file allows one process at a time
}
GPU_SETTINGS = {
    'JAX_PLATFORMS': 'cpu',
    'CUDA_VISIBLE_DEVICES': '-1',
    'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
    'XLA_FLAGS': '--xla_gpu_autotune_level=0',  # autotuning would run the kernels
}


def parse_device(text: str) -> tuple[str, tuple[int, ...]]:
    """Reads a device: a chip, or a slice of several.

    Args:
        text: 'v5e' (one chip), 'v5e:2x4', 'v6e:16x16', 'v5p:4x4x4'; 'h100', 'h100:8'.

    Returns:
        The chip's name, a key of `CHIPS`, and the sides of the slice; their product is the number
        of chips.

    Raises:
        ValueError: unknown chip, or a slice that cannot be of it.
    """
    name, colon, sides = text.partition(':')
    checks.choice('device', name, list(CHIPS))
    axes = CHIPS[name].axes
    if not colon:
        return name, (1,) * max(axes, 1)
    shape = tuple(int(n) for n in sides.split('x')) if re.fullmatch(r'\d+(x\d+)*', sides) else ()
    if len(shape) != max(axes, 1) or 0 in shape:
        example = {0: '8', 2: '2x4', 3: '2x2x2'}[axes]
        raise ValueError(f'device {text!r} cannot be read: write {name} or {name}:{example}')
    return name, shape


def topology_devices(device: str) -> list[jax.Device]:
    """The devices to compile for, in the process that has the settings."""
    name, shape = parse_device(device)
    count = math.prod(shape)
    try:
        if not CHIPS[name].axes:
            hosts = max(1, count // 8)
            layout = f'1x{hosts}x{count // hosts}'
            description = topologies.get_topology_desc(
                platform='cuda', target_config=_H100, topology=layout
            )
        else:
            layout = f'{name}:{"x".join(map(str, shape))}'
            one = {'chips_per_host_bounds': [1, 1, 1]} if count == 1 else {}
            description = topologies.get_topology_desc(layout, 'tpu', **one)
    except Exception as error:  # XLA's, of several types
        raise ValueError(
            f'device {device!r} is no slice that there is; sides are even numbers such as 2x4: '
            f'{first_line(error)}'
        ) from error
    return list(description.devices)


def first_line(error: Exception) -> str:
    """The first line of an error, which in XLA's says it all."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
