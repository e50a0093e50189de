"""Which file imports which: one direction between the rooms, no circle between files."""

import ast
import graphlib
import pathlib
import shutil

import pytest

import attention_jax

PACKAGE = pathlib.Path(attention_jax.__file__).parent

# What each room may import from the package, beside itself.
BOTTOM = {'checks', 'files', 'version'}
MECHANISMS = BOTTOM | {'functional', 'modules'}
NETWORKS = MECHANISMS | {'models'}
TASKS = NETWORKS | {'config', 'data', 'tasks'}
TRAINING = TASKS | {'interop', 'training'}
ALLOWED = {
    'version': set(),
    'checks': set(),
    'files': {'checks'},
    'config': BOTTOM,
    'data': BOTTOM,
    'functional': BOTTOM,
    'modules': MECHANISMS,
    'models': NETWORKS,
    'tasks': TASKS,
    'interop': TASKS | {'interop'},
    'training': TRAINING,
    'analysis': TRAINING | {'analysis'},
    'cli': TRAINING | {'analysis', 'cli'},
}


def modules(package):
    """Dotted name -> file of every module."""
    found = {}
    for path in sorted(package.rglob('*.py')):
        parts = ['attention_jax', *path.relative_to(package).with_suffix('').parts]
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def imported(name, path, known):
    """The modules that a file imports from the package; 'attention_jax' is the package itself."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b.c` binds and loads `a` itself.
                yield alias.name if alias.asname else alias.name.partition('.')[0]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parents = package.split('.')[: len(package.split('.')) + 1 - node.level]
                base = '.'.join([*parents, base] if base else parents)
            for alias in node.names:
                inner = f'{base}.{alias.name}'
                yield inner if inner in known else base
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = getattr(called, 'id', called)
            if called in ('import_module', '__import__'):
                # By a text that only running it would tell.
                text = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                yield text or 'attention_jax'


def faults(package):
    """A line for each import that points up or at the package itself, and for a circle."""
    known = modules(package)
    graph, found = {}, []
    for name, path in known.items():
        if name == 'attention_jax':
            continue  # it offers what lies below
        room = name.split('.')[1]
        ours = {n for n in imported(name, path, known) if n.split('.')[0] == 'attention_jax'}
        graph[name] = ours - {name}
        if room not in ALLOWED:
            found.append(f'{name}: the room {room} is not in ALLOWED')
        for other in sorted(ours):
            if other == 'attention_jax':
                found.append(f'{name} imports the package itself')
            elif other.split('.')[1] not in ALLOWED.get(room, ()) | {room}:
                found.append(f'{name} imports {other}, which lies above it')
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f'a circle: {" -> ".join(error.args[1])}')
    return found


def test_imports_point_one_way():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ('path', 'line'),
    [
        ('training/step.py', 'from attention_jax import cli'),
        ('functional/conv.py', 'import attention_jax'),
        ('functional/conv.py', 'import attention_jax.functional.pooling'),
        ('functional/cost.py', 'from attention_jax import create_model'),
        ('functional/cost.py', 'from attention_jax.functional import conv'),
        ('models/resnet.py', 'from ..training import loop'),
        ('modules/se.py', "__import__('attention_jax.models')"),
        ('interop/torch.py', 'def f():\n    from attention_jax.training import workdir'),
        ('data/loader.py', 'if False:\n    import attention_jax.tasks as tasks'),
        ('tasks/task.py', 'import importlib; importlib.import_module(f"attention_jax.{1}")'),
        ('newroom.py', 'import math'),
    ],
)
def test_an_import_that_points_up_is_seen(path, line, tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / 'attention_jax')
    with (copy / path).open('a') as file:
        file.write(f'\n{line}\n')
    assert len(faults(copy)) >= 1
