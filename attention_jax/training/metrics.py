"""Records of a run: metrics.jsonl, TensorBoard events and summary.json."""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX

from attention_jax import files


class MetricsWriter:
    """Writes one row a step to metrics.jsonl and to TensorBoard.

    Rows after `step` are cut away first: a restarted run writes them again. On processes other than
    the first it writes nothing.

    Args:
        workdir: work directory.
        step: step from which the run goes on.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self._enabled = jax.process_index() == 0
        if not self._enabled:
            return
        path = workdir / 'metrics.jsonl'
        files.write_text(
            path, ''.join(f'{json.dumps(row)}\n' for row in read_rows(path, last=step))
        )
        self._file = path.open('a')
        # Without the suffix, a file opened in the same second would replace the one before.
        self._events = tensorboardX.SummaryWriter(
            str(workdir), purge_step=step + 1, filename_suffix=f'.{step}'
        )

    def write(self, row: Mapping[str, float]) -> None:
        """Writes `row`, which has 'step', 'epoch', 'wall_time' and named values."""
        if not self._enabled:
            return
        self._file.write(json.dumps(row) + '\n')
        self._file.flush()
        for name, value in row.items():
            if name not in ('step', 'wall_time'):
                self._events.add_scalar(name, value, row['step'], walltime=row['wall_time'])
        self._events.flush()

    def write_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 `[h, w, 3]` by name, to TensorBoard."""
        if not self._enabled:
            return
        for name, picture in pictures.items():
            self._events.add_image(name, picture, step, dataformats='HWC')

    def close(self) -> None:
        """Closes the files."""
        if self._enabled:
            self._file.close()
            self._events.close()


@dataclasses.dataclass
class Window:
    """What happened since the last row: the task's sums, time, and time without data."""

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    grad_norm: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0

    def add(self, sums: Mapping[str, float], grad_norm: float) -> None:
        """Adds one step's numbers."""
        self.steps += 1
        self.sums = {k: self.sums.get(k, 0) + v for k, v in sums.items()}
        self.grad_norm = grad_norm


def read_rows(path: pathlib.Path, last: float = math.inf) -> list[dict[str, float]]:
    """Returns the rows of a metrics.jsonl up to step `last`; a last line cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row['step'] <= last:
            rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """Returns what a result depends on beside the config: versions, devices, git revision."""
    packages = ('attention_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
    versions = {'python': platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            versions[package] = None
    device = jax.devices()[0]
    return {
        'versions': versions,
        'devices': {
            'platform': device.platform,
            'kind': device.device_kind,
            'count': jax.device_count(),
            'processes': jax.process_count(),
        },
        'git_revision': git_revision(),
    }


def git_revision() -> str | None:
    """Returns the commit of the checkout that this package lies in, or None if it lies in none."""
    folder = pathlib.Path(__file__).resolve().parents[1]
    command = ['git', '-C', str(folder), 'rev-parse', '--show-prefix', 'HEAD']
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    prefix, revision = output.stdout.split()
    # An installed copy may lie inside somebody else's checkout.
    return revision if prefix == f'{folder.name}/' else None
