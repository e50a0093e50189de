import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import attention_jax
from attention_jax import cli
from attention_jax.analysis import benchmark, compiled, markdown, mechanism_table, network_table
from attention_jax.cli import printing
from attention_jax.interop import cards, files, torch
from tests import helpers

REPORT = {
    'model': 'configs/resnet_gc.py: tiny_resnet with gc',
    'device': 'v5e:2x4',
    'mesh': {'data': 4, 'fsdp': 2},
    'dtype': 'bfloat16',
    'batch_per_chip': 8,
    'image': [32, 32, 1],
    'num_classes': 10,
    'note': '',
    'parameters': 75854,
    'macs': 11969792,
    'bytes_moved': 115_000_000,
    'bytes_off_chip': 3_440_000,
    'flops': 570_000_000,
    'loops': 2,
    'memory': {
        'arguments': 1_730_000,
        'state': 609_000,
        'batch': 8224,
        'outputs': 2560,
        'temporaries': 9_100_000,
        'program': 5_400_000,
        'total': 16_232_560,
        'chip': 16 * 2**30,
    },
    'collectives': [
        {'kind': 'all-reduce', 'bytes': 4000, 'shapes': [[1000]], 'where': 'jit(f)'},
        {'kind': 'all-reduce', 'bytes': 40, 'shapes': [[10]], 'where': 'jit(f)'},
    ],
    'batch_gathers': [],
    'seconds': 4.2e-6,
    'images_per_second': 15_216_614.0,
}


def test_help_and_errors_import_nothing_that_takes_time():
    # Beyond what the package imports for its modules.
    code = (
        'import sys, attention_jax\n'
        'before = set(sys.modules)\n'
        'from attention_jax import cli\n'
        'status = cli.main(sys.argv[1:])\n'
        'heavy = {"rich", "grain", "orbax", "optax", "sklearn", "PIL"}\n'
        'heavy |= {f"attention_jax.{part}" for part in ("analysis", "data", "interop", "tasks")}\n'
        'print(status, sorted(heavy & set(sys.modules) - before))'
    )
    names = ('table', 'benchmark', 'inspect', 'convert', 'anchors', 'predict')
    helps = [('--help', 0), *((f'{name} --help', 0) for name in names)]
    for arguments, status in (*helps, ('nothing', 2), ('', 2)):
        command = [sys.executable, '-c', code, *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f'{status} []'
        assert done.stdout.startswith('usage: attention-jax') == (status == 0)
        if status:
            assert len(done.stderr.splitlines()) == 1
            assert done.stderr.startswith('error: ')


@pytest.mark.parametrize(
    ('arguments', 'what'),
    [
        (['--device', 'v9'], "device 'v9'"),
        (['--device', 'v5e:8'], 'v5e:2x4'),
        (['--batch', '0'], 'batch must be at least 1'),
        (['--batch', 'many'], '--batch'),
        (['--dtype', 'float16'], '--dtype'),
        (['--json', 'no/such/folder/x.json'], '--json'),
    ],
)
def test_wrong_options_are_one_line(arguments, what, capsys):
    assert cli.main(['inspect', 'tiny_resnet', *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith('error: ')
    assert what in lines[-1]


def test_inspect_prints_the_report(monkeypatch, tmp_path, capsys):
    asked = {}
    monkeypatch.setattr(compiled, 'inspect', lambda model, **k: asked.update(k, m=model) or REPORT)
    path = tmp_path / 'report.json'
    command = 'inspect configs/resnet_gc.py --device v5e:2x4 --fsdp 2 --batch 8 --json'
    assert cli.main([*command.split(), str(path)]) == 0
    assert json.loads(path.read_text()) == REPORT
    wanted = {'m': 'configs/resnet_gc.py', 'device': 'v5e:2x4', 'fsdp': 2, 'batch': 8}
    assert asked.items() >= wanted.items()
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert 'network configs/resnet_gc.py: tiny_resnet with gc' in lines
    assert 'batch 8 a chip 64 in all' in lines
    assert 'chips 8 data 4, fsdp 2' in lines
    assert 'moved 115 MB read and written by kernels' in lines
    assert 'total 16.2 MB 0.1% of 16 GiB' in lines
    assert 'all-reduce 2 times, 4.04 kB gradients, batch statistics, sums' in lines
    assert any(line.startswith('images a second 15,216,614 at most') for line in lines)
    assert any(line.startswith('loops 2') for line in lines)
    assert any(line.startswith('batch not gathered') for line in lines)


def test_gathered_batch_is_shown(monkeypatch, capsys):
    line = 'all-gather [64, 8, 8, 64] in jit(step)/top_k'
    monkeypatch.setattr(compiled, 'inspect', lambda *a, **k: {**REPORT, 'batch_gathers': [line]})
    assert cli.main(['inspect', 'tiny_resnet']) == 0
    out = capsys.readouterr().out
    assert 'GATHERS THE BATCH' in out
    assert line in out
    assert 'not gathered' not in out


def test_terminal_gets_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    printing.tables({'Program': [('images', '[b, 3]', 'as given')]})
    out = capsys.readouterr().out
    assert '│' in out
    assert '[b, 3]' in out


def test_interrupt(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compiled, 'inspect', interrupted)
    assert cli.main(['inspect', 'tiny_resnet']) == 130


def test_table_is_printed_or_written(monkeypatch, tmp_path, capsys):
    given = []
    monkeypatch.setattr(
        mechanism_table, 'table', lambda passes, progress: given.append(passes) or 'THE TABLE'
    )
    monkeypatch.setattr(mechanism_table, 'measure_passes', lambda name: '3.0, 4.0')
    assert cli.main(['table']) == 0
    assert capsys.readouterr().out == 'THE TABLE\n'

    path = tmp_path / 'X.md'
    path.write_text('\n'.join(('a', *markdown.marks('mechanisms'), 'b\n')))
    assert cli.main(['table', '--passes', 'gc', 'se', '--write', str(path)]) == 0
    assert given[-1] == {'gc': '3.0, 4.0', 'se': '3.0, 4.0'}
    assert path.read_text() == 'a\nTHE TABLE\nb\n'
    assert 'compiling gc for v5e' in capsys.readouterr().err


def test_table_of_networks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(network_table, 'table', lambda progress: progress('x') or 'THE TABLE')
    assert cli.main(['table', 'networks']) == 0
    assert tuple(capsys.readouterr()) == ('THE TABLE\n', 'counting x ...\n')
    path = tmp_path / 'X.md'
    path.write_text('\n'.join(('a', *markdown.marks('networks'), 'b')))
    assert cli.main(['table', 'networks', '--write', str(path)]) == 0
    assert path.read_text() == 'a\nTHE TABLE\nb'


@pytest.mark.parametrize(
    ('arguments', 'what'),
    [
        ('table --write no/such/file.md', 'no such file'),
        ('table networks --write no/such/file.md', 'no such file'),
        ('table networks --write pyproject.toml', 'must have one place'),
        ('table networks --passes', '--passes is for the table of mechanisms'),
        ('table network', 'networks'),
        ('table --write pyproject.toml', 'must have one place'),
        ('table --passes secc', "'secc' is not registered"),
        ('benchmark secc', "'secc' is not registered"),
        ('benchmark se --shape 8x56x56', '--shape'),
        ('benchmark se --shape 8x56x0x3', '--shape'),
        ('benchmark se --dtype float16', '--dtype'),
        ('benchmark se --repeats 0', 'repeats'),
        ('benchmark se --threads 0', 'threads'),
        ('benchmark se --json no/such/folder/x.json', '--json'),
    ],
)
def test_wrong_options_of_table_and_benchmark(arguments, what, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).resolve().parents[1])
    assert cli.main(arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith('error: ')
    assert what in lines[-1]


def test_benchmark_prints_each_row_and_writes_them(monkeypatch, tmp_path, capsys):
    asked = {}
    time = {'median': 1.234, 'low': 1.2, 'high': 1.25, 'calls': 3}
    both = {'forward': time, 'forward_backward': {**time, 'median': 12.34}}
    row = {'name': 'gc', 'shape': [8, 56, 56, 64], 'ours': both, 'torch': both, 'note': ''}
    rows = [
        {**row, 'ratio': {'forward': 0.5, 'forward_backward': 1.25}},
        {**row, 'ours': None, 'torch': None, 'ratio': None, 'note': 'x is too small'},
    ]
    machine = {
        **dict.fromkeys(('cpu', 'cores', 'device', 'system', 'python', 'load'), '?'),
        'versions': {'jax': '1.2.3'},
        'alone': '',
    }

    def measure(names, **options):
        asked.update(options, names=names)
        yield machine
        yield from rows

    monkeypatch.setattr(benchmark, 'measure', measure)
    path = tmp_path / 'cpu.json'
    command = 'benchmark gc --shape 8x56x56x64 1x2x3x4 --repeats 3 --threads 2 --json'
    assert cli.main([*command.split(), str(path)]) == 0
    wanted = {'names': ['gc'], 'repeats': 3, 'threads': 2, 'dtype': 'float32'}
    assert asked.items() >= wanted.items()
    assert asked['shapes'] == [(8, 56, 56, 64), (1, 2, 3, 4)]
    report = json.loads(path.read_text())
    assert report['rows'] == rows
    assert report['environment'] == machine
    assert [p.name for p in tmp_path.iterdir()] == ['cpu.json']
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    times = '1.23 (1.2-1.25) 12.3 (1.2-1.25)'
    assert f'gc 8x56x56x64 {times} {times} 0.50 1.25' in lines
    assert 'gc 8x56x56x64 - - - - - - x is too small' in lines
    assert 'Python ?, jax 1.2.3' in lines


@pytest.fixture
def foreign(tmp_path):
    """A file of a tiny network under PyTorch's names, with timm's config.json beside it."""
    module = attention_jax.create_model('tiny_resnet', num_classes=4)
    variables = helpers.random_variables(module, np.ones((1, 8, 8, 1)), dtype=np.float32)
    path = tmp_path / 'theirs.safetensors'
    files.write(path, torch.to_state_dict('tiny_resnet', variables), {})
    config = {'architecture': 'tiny_resnet', 'pretrained_cfg': {'crop_pct': 0.9, 'license': 'mit'}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    return path


def test_convert_there_and_back(foreign, capsys):
    ours, back = foreign.with_name('ours.safetensors'), foreign.with_name('back.safetensors')
    assert cli.main(['convert', str(foreign), str(ours)]) == 0
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert 'model tiny_resnet num_classes=4' in lines
    assert f'from {foreign} read as torchvision' in lines
    assert 'images 224x224 crop 0.9, bicubic' in lines
    assert 'licence mit' in lines
    card = cards.read_card(ours)
    assert (card.model, card.arguments, card.licence) == ('tiny_resnet', {'num_classes': 4}, 'mit')
    assert card.source == str(foreign)

    assert cli.main(['convert', str(ours), str(back), '--to', 'torch']) == 0
    wanted, got = files.read_arrays(foreign), files.read_arrays(back)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)

    arguments = ['--arguments', '{"num_classes": 2, "attention": "se"}', '--channels', '3']
    assert cli.main(['convert', str(ours), str(back), *arguments]) == 0
    assert 'new' in capsys.readouterr().out
    card = cards.read_card(back)
    assert card.arguments['attention'] == 'se'
    module, variables, report = attention_jax.load_pretrained('tiny_resnet', back)
    assert (module.num_classes, report.new) == (2, ())
    assert variables['params']['stem_conv1']['kernel'].shape == (3, 3, 3, 16)


@pytest.mark.parametrize(
    ('arguments', 'what'),
    [
        (('none.safetensors', 'x.safetensors'), 'does not exist'),
        (('theirs.safetensors', 'x.pth'), 'must end in .safetensors'),
        (('theirs.safetensors', 'no/x.safetensors'), 'no folder'),
        (('theirs.safetensors', 'x.safetensors', '--model', 'tiny_resnt'), 'did you mean'),
        (('theirs.safetensors', 'x.safetensors', '--model', 'cifar_resnet20'), 'missing: layer1'),
        (('theirs.safetensors', 'x.safetensors', '--arguments', '{'), 'is not JSON'),
        (('theirs.safetensors', 'x.safetensors', '--arguments', '3'), 'must be an object'),
        (('theirs.safetensors', 'x.safetensors', '--source', 'timm'), "needs to='torch'"),
        (('theirs.safetensors', 'x.safetensors', '--to', 'torch', '--source', 'a'), "source 'a'"),
        (('theirs.safetensors', 'x.safetensors', '--to', 'caffe'), '--to'),
    ],
)
def test_wrong_options_of_convert(foreign, arguments, what, capsys, monkeypatch):
    monkeypatch.chdir(foreign.parent)
    assert cli.main(['convert', *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('error: ')
    assert what in lines[0]
    assert len(list(foreign.parent.iterdir())) == 2


def test_convert_needs_a_name(foreign, capsys):
    foreign.with_name('config.json').unlink()
    assert cli.main(['convert', str(foreign), str(foreign.with_name('x.safetensors'))]) == 2
    assert 'model is missing' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="libtpu is not installed: pip install 'attention_jax[compile]'",
)
def test_command_as_a_user_types_it():
    repository = pathlib.Path(__file__).resolve().parents[1]
    command = [sys.executable, '-m', 'attention_jax.cli', 'inspect', 'tiny_resnet', '--size', '16']
    command += ['--device', 'v5e:2x2', '--batch', '2', '--attention', 'se', '--num_classes', '7']
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    assert 'tiny_resnet with se' in done.stdout
    assert 'not gathered' in done.stdout
    assert '8 in all' in done.stdout
