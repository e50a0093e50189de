"""The package as a whole: what it imports, and in which direction."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import attention_jax
from attention_jax.modules.registry import attention_entry

PACKAGE = pathlib.Path(attention_jax.__file__).parent

# What each part may import from the package, beside itself.
ALLOWED = {
    'checks': set(),
    'functional': {'checks'},
    'modules': {'checks', 'functional'},
    'models': {'checks', 'functional', 'modules'},
    'data': set(),
    'tasks': {'checks', 'functional', 'models', 'modules', 'data'},
    'interop': {'checks', 'functional', 'modules', 'models', 'version'},
    'analysis': {'checks', 'functional', 'modules', 'models'},
}
# Compiling a training step for another device needs the training step.
EXCEPTIONS = {
    'analysis/compiled.py': {'data', 'tasks', 'training', 'command_line'},
    'interop/runs.py': {'training'},
}


def imports(path):
    """The parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split('.')
            if parts[0] == 'attention_jax' and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize('part', ALLOWED)
def test_imports_point_one_way(part):
    folder = PACKAGE / part
    for path in [folder.with_suffix('.py')] if not folder.is_dir() else folder.rglob('*.py'):
        key = path.relative_to(PACKAGE).as_posix()
        allowed = ALLOWED[part] | {part} | EXCEPTIONS.get(key, set())
        assert imports(path) <= allowed, key


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
