"""Checkpoints: the latest two and the best, saved in the background, whole or not at all."""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import linen as nn
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from attention_jax.tasks import create_task
from attention_jax.training import sharding
from attention_jax.training.state import State
from attention_jax.training.workdir import read_config


def open_manager(
    directory: str | os.PathLike[str], metric: str = '', *, read_only: bool = False
) -> ocp.CheckpointManager:
    """Opens the checkpoints in `directory`; use it as a context, which waits for the last save.

    Args:
        directory: made if it is missing.
        metric: name of the number that ranks checkpoints, larger is better; a reader needs none.
        read_only: change nothing on disk, for a reader beside a run that goes on.
    """

    def value(metrics: Mapping[str, float]) -> float:
        return metrics[metric]

    # `max_to_keep` with `best_fn` would delete each new step that is not among the best: a killed
    # run would fall back by many epochs.
    policy = AnyPreservationPolicy(
        [LatestN(n=2), BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False)]
    )
    handlers = {'state': ocp.StandardCheckpointHandler(), 'data': ocp.JsonCheckpointHandler()}
    with _quiet():
        options = ocp.CheckpointManagerOptions(
            best_fn=value,
            best_mode='max',
            preservation_policy=policy,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        return ocp.CheckpointManager(
            os.path.abspath(directory), options=options, item_handlers=handlers
        )


def existing(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder of a work directory's checkpoints; a ValueError if there is none."""
    directory = pathlib.Path(workdir) / 'checkpoints'
    if not directory.is_dir():
        raise ValueError(f'workdir {workdir} holds no checkpoint: train first')
    return directory


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: State,
    data: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
) -> None:
    """Starts to save; the state may be donated as soon as this returns.

    Args:
        manager: see `open_manager`.
        step: number of batches seen.
        state: the state after them.
        data: JSON: what else the run needs to go on, the loader's position above all.
        metrics: results of the evaluation at this step, or None.

    Raises:
        RuntimeError: the step was not saved.
    """
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    with _quiet():
        saved = manager.save(step, args=items, metrics=metrics)
    if not saved:
        raise RuntimeError(f'checkpoint of step {step} was not saved in {manager.directory}')


def restore(manager: ocp.CheckpointManager, abstract: State) -> tuple[State, dict[str, Any]] | None:
    """Returns the newest whole checkpoint on any number of devices, or None if there is none.

    A step that holds no state (a disk that filled up, a folder emptied by hand) is passed over with
    a warning, and deleted unless the manager is read-only.

    Args:
        manager: see `open_manager`.
        abstract: the state to fill: shapes, types and shardings.

    Raises:
        ValueError: the checkpoint is of another network or optimiser.
    """
    step, saved = _newest(manager)
    if step is None:
        return None
    _check_fit(f'{manager.directory}/{step}', _shapes(saved), _shapes(abstract))
    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
    )
    restored = manager.restore(step, args=items)
    return restored['state'], restored['data']


def restore_tree(
    manager: ocp.CheckpointManager, mesh: jax.sharding.Mesh
) -> tuple[int, dict[str, Any]]:
    """Returns the newest whole step and its state as plain dicts and lists.

    The shapes come from the checkpoint itself: neither network nor data nor optimiser are needed.

    Args:
        manager: see `open_manager`.
        mesh: where the state goes.

    Raises:
        ValueError: there is no checkpoint.
    """
    step, saved = _newest(manager)
    if step is None:
        raise ValueError(f'{manager.directory} holds no checkpoint: train first')
    items = ocp.args.Composite(state=ocp.args.StandardRestore(sharding.with_sharding(mesh, saved)))
    return step, manager.restore(step, args=items)['state']


def restore_variables(
    manager: ocp.CheckpointManager, mesh: jax.sharding.Mesh
) -> tuple[int, dict[str, Any]]:
    """Returns the newest whole step and its variables: the moving average, where one is kept.

    Arguments and errors are those of `restore_tree`.
    """
    step, state = restore_tree(manager, mesh)
    return step, state['ema'] or {'params': state['params'], **state['collections']}


def load(workdir: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any], ConfigDict]:
    """Returns the network that was trained in a work directory.

    Args:
        workdir: as given to `train`.

    Returns:
        The Linen module; its variables after the latest checkpoint's step (the moving average,
        where one is kept), on the first device; and the config, whose group `dataset` has
        image_shape, num_classes, class_names, and what else the data set is described by.

    Raises:
        ValueError: the directory holds no run, or no checkpoint.
    """
    config = read_config(workdir)
    model = create_task(config, config.dataset).model
    directory = existing(workdir)
    mesh = sharding.make_mesh(1, 1, jax.local_devices()[:1])
    with open_manager(directory, read_only=True) as manager:
        _, variables = restore_variables(manager, mesh)
    return model, variables, config


def _newest(manager: ocp.CheckpointManager) -> tuple[int | None, Any]:
    """Returns the newest whole step with the shapes and types of its state, or None twice.

    A step is whole once its directory has its final name; but one emptied later still counts for
    Orbax, and would be in the way when the run comes to that step again.
    """
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            with _quiet():
                return step, manager.item_metadata(step)['state'].tree
        except (AttributeError, KeyError, OSError, ValueError):
            warnings.warn(
                f'checkpoint {manager.directory}/{step} holds no state: trying the one before it',
                stacklevel=3,
            )
            manager.delete(step)
    return None, None


def _shapes(tree: Any) -> dict[str, str]:
    """Returns path -> type and shape, the key apart: it is saved as its numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in leaves}
    return {path: f'{x.dtype}{list(x.shape)}' for path, x in named.items() if path != 'rng'}


def _check_fit(where: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises a ValueError that tells the differences; Orbax would cast types without a word."""
    # The parameters first: a reader knows them best.
    paths = sorted(saved.keys() | wanted.keys(), key=lambda p: (not p.startswith('params/'), p))
    different = [
        f'{path} is {saved.get(path, "missing")} there and {wanted.get(path, "missing")} here'
        for path in paths
        if saved.get(path) != wanted.get(path)
    ]
    if different:
        more = f'; and {len(different) - 3} more' if len(different) > 3 else ''
        raise ValueError(
            f'checkpoint {where} does not fit this network and optimizer: '
            f'{"; ".join(different[:3])}{more}. Choose another workdir, or delete the checkpoint'
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back Orbax's warnings about what is meant: no metrics, nothing to be written."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
