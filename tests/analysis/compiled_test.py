import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from attention_jax.analysis import compiled, compiler, devices, mechanism_table
from attention_jax.modules.registry import attention_entry, list_attention

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="libtpu is not installed: pip install 'attention_jax[compile]'",
)


@pytest.mark.parametrize(
    ('text', 'chip', 'count'),
    [('v5e', 'v5e', 1), ('v5e:2x4', 'v5e', 8), ('v6e:16x16', 'v6e', 256), ('v5p:2x2x2', 'v5p', 8),
     ('h100', 'h100', 1), ('h100:8', 'h100', 8)],
)  # fmt: skip
def test_device(text, chip, count):
    name, shape = devices.parse_device(text)
    assert name == chip
    assert jnp.prod(jnp.array(shape)) == count


@pytest.mark.parametrize('text', ['', 'v9', 'v5e:', 'v5e:8', 'v5e:2x4x4', 'v5e:0x2', 'h100:2x4'])
def test_device_that_cannot_be(text):
    with pytest.raises(ValueError, match='device'):
        devices.parse_device(text)


def answers(tmp_path, monkeypatch, *jobs):
    """What the process that compiles writes, with this machine's devices for the chips."""
    monkeypatch.setattr(compiler, 'topology_devices', lambda device: jax.devices())
    request, written = tmp_path / 'request.json', tmp_path / 'answers.jsonl'
    request.write_text(json.dumps({'device': 'v5e:2x4', 'jobs': jobs}))
    compiler.main(request, written)
    return [json.loads(line) for line in written.read_text().splitlines()]


def test_report_of_a_module(tmp_path, monkeypatch):
    job = {'kind': 'module', 'name': 'se', 'shape': [16, 4, 6, 32], 'dtype': 'float32'}
    forward, vjp = answers(tmp_path, monkeypatch, job, {**job, 'vjp': True})
    assert forward['memory']['outputs'] == 2 * 4 * 6 * 32 * 4
    assert vjp['passes'] > forward['passes'] > 2
    assert not forward['collectives']
    assert {c['kind'] for c in vjp['collectives']} == {'all-reduce'}
    assert not vjp['batch_gathers']


@pytest.mark.slow
def test_report_of_a_step(tmp_path, monkeypatch):
    step = {'kind': 'step', 'model': 'tiny_resnet', 'attention': 'se', 'placement': None}
    # Where the maps are smaller than the kernels, XLA may rather gather the maps.
    step |= {'batch': 8, 'size': 32, 'num_classes': 7, 'dtype': 'float32', 'fsdp': 2}
    (report,) = answers(tmp_path, monkeypatch, step)
    assert report['mesh'] == {'data': 4, 'fsdp': 2}
    assert report['image'] == [32, 32, 3]
    assert report['num_classes'] == 7
    assert report['memory']['batch'] == 8 * (32 * 32 * 3 + 4)
    # Parameters and momentum, of which two kernels are split, and statistics of the norms.
    assert report['parameters'] * 4 < report['memory']['state'] < report['parameters'] * 8
    assert {c['kind'] for c in report['collectives']} >= {'all-gather', 'all-reduce'}
    assert not report['batch_gathers']
    assert report['images_per_second'] == pytest.approx(64 * 819e9 / report['bytes_off_chip'])


def test_wrong_job_is_one_line_and_the_rest_goes_on(tmp_path, monkeypatch):
    wrong = {'kind': 'module', 'name': 'sse', 'shape': [8, 4, 4, 32]}
    right = {**wrong, 'name': 'eca'}
    first, second = answers(tmp_path, monkeypatch, wrong, right)
    assert 'did you mean' in first['error']
    assert '\n' not in first['error']
    assert second['name'] == 'eca'


def test_what_does_not_fit_is_one_line():
    text = (
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
        'temporaries (24.50G) exceeds available HBM (15.75G).\n\nLargest allocations: ...'
    )
    line = compiler._refusal(jax.errors.JaxRuntimeError(text), 'v5e:2x4')
    assert '16 GiB of v5e' in line
    assert '24.50G' in line
    assert '\n' not in line


@pytest.mark.parametrize(('device', 'what'), [('v5e', 'libtpu'), ('h100', 'CUDA')])
def test_compiler_that_is_not_installed(device, what, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=f'{what}.*pip install'):
        compiled.inspect('tiny_resnet', device=device)


@pytest.mark.slow
@needs_libtpu
def test_process_says_what_is_wrong():
    with pytest.raises(ValueError, match="model 'resnet5' is not registered"):
        compiled.inspect('resnet5')
    with pytest.raises(ValueError, match='v5e:3x5'):
        compiled.inspect('tiny_resnet', device='v5e:3x5')
    with pytest.raises(ValueError, match='longer timeout'):
        compiled.inspect('tiny_resnet', timeout=0.5)


# Passes over [128, 56, 56, 256] in bfloat16 on one v5e, forward and VJP: what was measured and a
# little more. By hand the least that XLA's fusions can do is 3 and 4 for SE and ECA, 4 and 8 for
# CBAM, 4 and 7 for GC.
PASSES = {'se': (3.1, 4.1), 'eca': (3.1, 4.1), 'cbam': (4.4, 9.8), 'gc': (4.2, 7.4)}


@pytest.mark.slow
@needs_libtpu
def test_mechanisms_on_one_chip():
    job = {'shape': [128, 56, 56, 256]}
    jobs = [{**job, 'name': n, 'vjp': vjp} for n in PASSES for vjp in (False, True)]
    jobs += [{'name': 'non_local', 'shape': [8, 14, 14, 256], 'vjp': True}]
    reports = compiled.compile_modules(jobs, timeout=500)
    assert [r.get('error') for r in reports] == [None] * len(jobs)
    found = [r['passes'] for r in reports]
    for i, (name, bounds) in enumerate(PASSES.items()):
        assert found[2 * i] <= bounds[0], name
        assert found[2 * i + 1] <= bounds[1], name


def jobs_of(name):
    """Forward and gradient at a small shape; where queries can be taken in chunks, so too."""
    shape = [24, 16, 16, 64]  # a batch like no other axis: sums are told from rows by it
    module, arguments = mechanism_table.example(name, shape)
    if name == 'isqrt_cov':
        arguments['hidden'] = 32  # its products of 256 take minutes to compile
    job = {'name': name, 'shape': shape, 'inputs': attention_entry(name).maps}
    forms = [{}, {'chunk_size': 64}] if hasattr(module, 'chunk_size') else [{}]
    return [
        {**job, 'arguments': {**arguments, **form}, 'vjp': vjp}
        for form in forms
        for vjp in (False, True)
    ]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('device', ['v5e', 'v5e:2x4'])
@pytest.mark.parametrize('name', list_attention())
def test_every_mechanism_compiles_and_gathers_no_batch(name, device):
    jobs = jobs_of(name)
    reports = compiled.compile_modules(jobs, device=device, timeout=500)
    assert [r.get('error') for r in reports] == [None] * len(jobs)
    assert [r['batch_gathers'] for r in reports] == [[]] * len(jobs)


@pytest.mark.slow
@needs_libtpu
def test_attention_kernel_gathers_no_batch():
    """More pairs of positions than the plain form takes: JAX's kernel."""
    job = {'name': 'non_local', 'shape': [16, 48, 48, 64]}
    reports = compiled.compile_modules([job, {**job, 'vjp': True}], device='v5e:2x4', timeout=500)
    assert [r.get('error') for r in reports] == [None] * 2
    assert [r['batch_gathers'] for r in reports] == [[]] * 2


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(('device', 'fsdp'), [('v5e', 1), ('v5e:2x4', 1), ('v5e:2x4', 2)])
def test_main_config(device, fsdp):
    report = compiled.inspect('configs/resnet_gc.py', device=device, fsdp=fsdp, timeout=500)
    kinds = {c['kind'] for c in report['collectives']}
    assert report['mesh']['data'] * fsdp == (1 if device == 'v5e' else 8)
    assert report['batch_gathers'] == []
    assert report['loops'] == 0
    assert ('all-reduce' in kinds) == (device != 'v5e')
    assert ('all-gather' in kinds) == (fsdp > 1)
    assert report['memory']['total'] < 2**26
    assert report['bytes_moved'] < 0.4e9
