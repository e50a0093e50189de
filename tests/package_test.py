"""The package as a whole: what importing it loads, and what it offers."""

import json
import subprocess
import sys

import pytest

import attention_jax
from attention_jax.modules.registry import attention_entry


def run(code):
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def loaded_by(module):
    code = f'import json, sys, {module}; print(json.dumps(list(sys.modules)))'
    return set(json.loads(run(code)))


def test_import_is_light():
    """Neither TensorFlow nor PyTorch, nor what only training needs, beyond what flax imports."""
    loaded = loaded_by('attention_jax') - loaded_by('flax.linen')
    heavy = {'tensorflow', 'torch', 'tensorflow_datasets', 'grain', 'orbax', 'sklearn', 'rich'}
    heavy |= {'tensorboardX', 'matplotlib', 'optax', 'jax.experimental.pallas'}
    assert not heavy & loaded


def test_public_names_are_there():
    for name in attention_jax.__all__:
        assert getattr(attention_jax, name) is not None
    assert set(attention_jax.__all__) <= set(dir(attention_jax))
    with pytest.raises(AttributeError, match='no attribute'):
        _ = attention_jax.attention


def test_registered_classes_are_exported():
    for name in attention_jax.list_attention():
        cls = attention_entry(name).cls
        assert getattr(attention_jax, cls.__name__) is cls
