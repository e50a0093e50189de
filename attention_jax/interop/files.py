"""Weights in files: safetensors and PyTorch's, on this machine or on the Hugging Face hub.

A PyTorch file is a pickle, and reading a pickle can run code that it brings: such files are read by
PyTorch alone, and only as arrays (`weights_only`).
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from attention_jax.files import check_folder, replacing

TORCH_ENDINGS = ('.pth', '.pt', '.bin', '.tar', '.ckpt')
ENDINGS = ('.safetensors', *TORCH_ENDINGS)
# Where training code puts the arrays beside its own state.
_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'net')
_HUB_ID = re.compile(
    r'(?P<prefix>hf[-_]hub:)?(?P<id>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?', re.ASCII
)
_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


def locate(source: str | os.PathLike[str]) -> tuple[pathlib.Path, Mapping[str, Any]]:
    """Finds weights.

    Args:
        source: a file, or the id of a repository on the hub, such as 'timm/seresnet50.a1_in1k' or
            'hf_hub:ORGANISATION/NAME@REVISION'.

    Returns:
        The path of the file (in the hub's cache), and what timm's `config.json` beside it says,
        empty where there is none.

    Raises:
        ValueError: there is nothing of this name, or the hub cannot be reached.
    """
    path = pathlib.Path(source)
    if path.exists():
        if path.suffix not in ENDINGS:
            raise ValueError(
                f'source {source} is neither a work directory nor a file that ends in one of '
                f'{", ".join(ENDINGS)}'
            )
        if path.stat().st_size == 0:
            raise ValueError(f'source {source} is an empty file')
        return path, _timm_config(path.with_name('config.json'))
    match = _HUB_ID.fullmatch(str(source))
    if match is None or (path.suffix in ENDINGS and not match['prefix']):
        raise ValueError(
            f'source {source} does not exist: give a file, a work directory or a hub id such as '
            'timm/seresnet50.a1_in1k'
        )
    return _from_hub(str(source), match['id'], match['revision'])


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file, of the types that it has (bfloat16 too).

    Args:
        path: ends in one of `ENDINGS`.

    Returns:
        Name -> array.

    Raises:
        ValueError: the file is not whole, holds anything but arrays, or needs PyTorch, which is not
            installed.
    """
    return _read_safetensors(path)[0] if path.suffix == '.safetensors' else _read_torch(path)


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Reads the texts beside the arrays of a safetensors file; other files have none."""
    return _read_safetensors(path, arrays=False)[1] if path.suffix == '.safetensors' else {}


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file, whole or not at all.

    Args:
        path: ends in .safetensors; a file there is replaced.
        arrays: name -> array.
        metadata: texts to keep beside them.

    Raises:
        ValueError: another ending, or a folder that does not exist.
    """
    from safetensors.numpy import save_file

    # Not ascontiguousarray, which would make a vector of a scalar.
    arrays = {name: np.asarray(value, order='C') for name, value in arrays.items()}
    with replacing(check_destination(path)) as new:
        save_file(arrays, new, metadata=dict(metadata))


def check_destination(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of a safetensors file to write, or raises a ValueError."""
    path = pathlib.Path(path)
    if path.suffix != '.safetensors':
        raise ValueError(f'destination {path} must end in .safetensors')
    check_folder('destination', path)
    return path


def _read_safetensors(
    path: pathlib.Path, *, arrays: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='np') as file:
            found = {name: file.get_tensor(name) for name in file.keys()} if arrays else {}  # noqa: SIM118
            return found, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f'source {path} is no whole safetensors file: {error}') from None


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f'source {path} is a file of PyTorch, which is not installed: '
            "pip install 'attention_jax[parity]', or give a .safetensors file"
        ) from None
    from pickle import UnpicklingError  # an exception; nothing is unpickled with it

    try:
        tree = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        what = re.search(r'GLOBAL (\S+) was not an allowed', str(error))
        held = f'{what[1]}, which' if what else 'what'
        raise ValueError(
            f'source {path} was refused: it holds {held} could run code when it is read, or it is '
            'damaged. Save its state_dict alone, best as .safetensors, where you trust it'
        ) from None
    except Exception as error:  # whatever PyTorch meets in bytes that are no file of its own
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f'source {path} is no whole PyTorch file: {lines[0]}') from None
    return {name: _to_numpy(path, name, value) for name, value in _unwrap(path, tree).items()}


def _unwrap(path: pathlib.Path, tree: Any) -> Mapping[str, Any]:
    """The state dict inside what training code saved."""
    if not isinstance(tree, Mapping) or not tree:
        raise ValueError(f'source {path} holds {type(tree).__name__}, not a state_dict with arrays')
    for key in _WRAPPERS:
        if isinstance(tree.get(key), Mapping):
            return _unwrap(path, tree[key])
    return tree


def _to_numpy(path: pathlib.Path, name: str, value: Any) -> np.ndarray:
    import torch

    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f'source {path} holds no plain state_dict: {name!r} is a {type(value).__name__}'
        )
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:  # PyTorch has no NumPy type for it
        return value.view(torch.int16).numpy().view(jnp.bfloat16)
    return value.numpy()


def _timm_config(path: pathlib.Path) -> Mapping[str, Any]:
    """What timm wrote beside its weights; empty where the file is missing or is not timm's."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f'{path}, beside the weights, is not JSON') from None
    return config if isinstance(config, dict) and 'architecture' in config else {}


def _from_hub(
    source: str, repository: str, revision: str | None
) -> tuple[pathlib.Path, Mapping[str, Any]]:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f'source {source} is no file or directory here; to read it as a hub id, '
            "pip install 'attention_jax[hub]'"
        ) from None

    def fetch(name: str) -> pathlib.Path | None:
        try:
            return pathlib.Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError as error:
            failures.append(error)
        return None

    failures: list[Exception] = []
    try:
        path = next(filter(None, map(fetch, _HUB_FILES)), None)
        config = path and fetch('config.json')
    except Exception as error:  # of the hub, of the connection, of its HTTP library
        raise _unreachable(source, error) from None
    if path is None:
        # A file that is not in the cache while the hub cannot be asked may well be on the hub.
        for error in failures:
            if isinstance(error, LocalEntryNotFoundError):
                raise _unreachable(source, error)
        raise ValueError(f'source {source}: the hub has none of {", ".join(_HUB_FILES)} there')
    return path, _timm_config(config) if config else {}


def _unreachable(source: str, error: Exception) -> ValueError:
    lines = str(error).splitlines() or [type(error).__name__]
    return ValueError(
        f'source {source} is no file or directory here, and as a hub id it cannot be fetched and '
        f'is not in the cache: {lines[0]}'
    )
