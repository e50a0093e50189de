import os
import types

import numpy as np
import pytest

from attention_jax.analysis import benchmark
from attention_jax.modules.registry import create_attention, list_attention

SHAPE = (2, 4, 4, 16)
TIMM = ['cbam/timm', 'gc/timm', 'non_local/timm']


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """A machine that does nothing else, whatever it does."""
    monkeypatch.setattr(benchmark, '_busy', lambda: None)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A place without PyTorch forms."""
    monkeypatch.setattr(benchmark, 'FORMS', tmp_path / 'missing.py')


def measured(*names, **options):
    rows = list(benchmark.measure(names, **{'shapes': [SHAPE], 'repeats': 1, **options}))
    return rows[0], rows[1:]


def test_quartiles():
    assert benchmark.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {'median': 3, 'low': 2, 'high': 4}


def test_programs_alternate(monkeypatch):
    monkeypatch.setattr(benchmark, '_SECONDS', 0)
    order = []
    calls = {key: lambda key=key: order.append(key) for key in 'ab'}
    times = benchmark._alternate(calls, 3)
    assert order == [*'aabb', *'aabb' * 3]
    assert all(t['calls'] == 1 and t['low'] <= t['median'] <= t['high'] for t in times.values())


def test_a_busy_machine_is_noted(alone, monkeypatch):
    seconds = iter([100.0, 10_000.0])
    monkeypatch.setattr(benchmark, '_busy', lambda: next(seconds))
    _, (row,) = measured('eca')
    assert row['others'] > 1
    assert row['note'] == f'other processes used {row["others"]:.1f} cores'


def test_a_mechanism_alone(alone):
    machine, rows = measured('eca', 'se/timm')
    assert machine['alone']
    assert machine['cores'] >= 1
    assert {'jax', 'flax', 'numpy'} <= set(machine['versions'])
    assert [row['name'] for row in rows] == ['eca', 'se/timm']
    assert rows[1]['arguments'] == {'hidden_divisor': 8}
    for row in rows:
        assert row['shape'] == list(SHAPE)
        assert row['torch'] is None
        assert row['ratio'] is None
        assert row['note'] == ''
        assert row['others'] is None
        assert row['ours']['compile_seconds'] > 0
        for what in ('forward', 'forward_backward'):
            assert row['ours'][what]['median'] > 0
            assert row['ours'][what]['calls'] >= 1


def test_what_a_mechanism_refuses_is_a_note(alone):
    _, (row,) = measured('isqrt_cov', shapes=[(2, 1, 1, 16)])
    assert row['ours'] is None
    assert 'x' in row['note']


@pytest.mark.parametrize(('error', 'busy'), [(0.0, False), (0.5, False), (0.0, True)])
def test_beside_another_form(monkeypatch, error, busy):
    """Its numbers are compared before the times are; a busy machine gives no ratio."""
    if busy:
        seconds = iter([100.0, 10_000.0])
        monkeypatch.setattr(benchmark, '_busy', lambda: next(seconds))
    module = create_attention('eca')

    def create(name, variables, inputs, cotangents, arguments, **options):
        assert (name, arguments, options['dtype']) == ('eca', {}, 'float32')
        assert [g.shape for g in cotangents] == [SHAPE]
        values = benchmark._Ours(module, variables, inputs).values()
        values[2][0] = values[2][0] + error * np.abs(values[2][0]).max()
        idle = lambda: None  # noqa: E731
        return types.SimpleNamespace(
            source='plain', forward=idle, forward_backward=idle, values=lambda: values
        )

    machine = {**benchmark.environment(), 'alone': ''}
    monkeypatch.setattr(benchmark, 'environment', lambda: machine)
    monkeypatch.setattr(benchmark, 'load_forms', lambda: types.SimpleNamespace(create=create))
    _, (row,) = measured('eca')
    assert row['torch']['source'] == 'plain'
    if error or busy:
        assert row['ratio'] is None
        assert row['note'].startswith('other processes' if busy else 'differs from PyTorch by ')
    else:
        assert row['torch']['difference'] < 1e-6
        assert row['ratio']['forward'] > 1
        assert row['note'] == ''


def test_threads_are_given_back(alone):
    if not hasattr(os, 'sched_setaffinity'):
        pytest.skip('threads are set on Linux only')
    before = os.sched_getaffinity(0)
    machine, _ = measured('eca', threads=1)
    assert machine['cores'] == 1
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match='threads must be from 1 to'):
        measured('eca', threads=10_000)


@pytest.mark.parametrize(
    ('names', 'options', 'what'),
    [
        (['secc'], {}, "attention 'secc' is not registered"),
        (['se/nobody'], {}, "variant of se 'nobody'"),
        (['se'], {'shapes': [(8, 56, 56)]}, 'shape 8x56x56 must be four numbers'),
        (['se'], {'shapes': [(0, 56, 56, 8)]}, 'shape 0x56x56x8'),
        (['se'], {'repeats': 0}, 'repeats must be at least 1'),
        (['se'], {'dtype': 'float16'}, 'dtype'),
    ],
)
def test_bad_arguments(names, options, what):
    with pytest.raises(ValueError, match=what):
        measured(*names, **options)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*list_attention(), *TIMM])
def test_pytorch_computes_the_same(name):
    pytest.importorskip(
        'torch', reason="PyTorch is not installed: pip install 'attention_jax[parity]'"
    )
    forms = benchmark.load_forms()
    if name in TIMM and not forms.timm_layers():
        pytest.skip('timm is not installed')
    machine, (row,) = measured(name, shapes=[(2, 16, 8, 64)])
    assert not machine['alone']
    assert row['torch']['difference'] < 1e-4
    assert row['note'] == ''
    if forms.timm_layers() and name in forms.TIMM:
        assert row['torch']['source'] == 'timm'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['eca', 'ese', 'se', 'sk', 'split_attention'])
def test_pytorch_without_timm_computes_the_same(name, monkeypatch):
    pytest.importorskip(
        'torch', reason="PyTorch is not installed: pip install 'attention_jax[parity]'"
    )
    forms = benchmark.load_forms()
    monkeypatch.setattr(forms, 'TIMM', {})
    monkeypatch.setattr(benchmark, 'load_forms', lambda: forms)
    _, (row,) = measured(name, shapes=[(2, 16, 8, 64)])
    assert row['torch']['source'] == 'plain'
    assert row['torch']['difference'] < 1e-4
