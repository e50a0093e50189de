import importlib.util
import re

import pytest

from attention_jax.analysis import compiled, markdown, mechanism_table
from attention_jax.analysis.mechanism_table import PLACE
from attention_jax.modules.registry import attention_entry, list_attention
from tests.conftest import REPOSITORY

NAMES = list_attention()
README = markdown.read_rows(PLACE, (REPOSITORY / 'README.md').read_text())
PASSES = re.compile(r'\d+\.\d\*?, \d+\.\d\*?|- \(.+\)')


def without_memory(cells):
    """A row of the file as `mechanism_table.row` gives it: no memory, no passes."""
    return [*cells[:4], cells[5], cells[7]]


def test_rows_by_hand():
    assert mechanism_table.row('se') == [
        '`se`',
        '[Squeeze-and-Excitation Networks](https://arxiv.org/abs/1709.01507), 2018',
        f'{2 * 256 * 16 + 16 + 256:,}',
        f'{2 * 256 * 16:,}',
        'N C + C²/r',
        '[se.py](attention_jax/modules/se.py)',
    ]
    cells = mechanism_table.row('cross_layer_non_local')
    weights = 256 * 32
    norm = 2 * 256
    pairs = 56**4 * 32
    assert cells[2] == f'{4 * weights + norm:,}'
    assert cells[3] == f'{4 * 56**2 * weights + 2 * pairs:,}'
    assert mechanism_table.row('danet_head')[0] == '`danet_head` (num_classes=21)'
    assert mechanism_table.row('pam')[5] == '[danet.py](attention_jax/modules/danet.py)'


@pytest.mark.parametrize('name', NAMES)
def test_complexity_uses_the_letters_of_the_legend(name):
    complexity = attention_entry(name).complexity
    assert complexity
    assert set(complexity) <= set('NCHWMRrkgds 123456789()+/^')
    assert '^' not in mechanism_table.row(name)[4], 'a power without its character'


@pytest.mark.parametrize('name', NAMES)
def test_readme_is_current(name):
    """All but memory and passes, which a compiler tells: see the slow tests below."""
    assert name in README, 'attention-jax table --write README.md'
    assert without_memory(README[name]) == mechanism_table.row(name)
    assert float(README[name][4]) >= 0
    assert PASSES.fullmatch(README[name][6]), (
        f'attention-jax table --passes {name} --write README.md'
    )


def test_readme_has_nothing_else():
    assert set(README) <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_memory_in_the_readme_is_current(name):
    # Another version of XLA lays buffers out a little differently.
    now = mechanism_table.peak_memory(name) / 1e6
    assert float(README[name][4]) == pytest.approx(now, rel=0.25, abs=0.5)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="libtpu is not installed: pip install 'attention_jax[compile]'",
)
@pytest.mark.parametrize('name', NAMES)
def test_passes_in_the_readme_are_current(name):
    cell = README[name][6]
    if cell.startswith('-'):
        pytest.skip(f'the README says {cell}')
    now = mechanism_table.measure_passes(name)
    for old, new in zip(cell.split(', '), now.split(', '), strict=True):
        assert old.count('*') == new.count('*')
        assert float(old.strip('*')) == pytest.approx(float(new.strip('*')), rel=0.1, abs=0.11)


def test_memory_grows_with_what_is_kept():
    """ECA keeps a number a channel, and x times the cotangent at most."""
    x = 56 * 56 * 256 * 4
    assert 256 * 4 <= mechanism_table.peak_memory('eca') <= 1.1 * x


def test_examples_fit_their_shape():
    module, arguments = mechanism_table.example('pyramid_self_attention', (8, 28, 28, 256))
    assert arguments == {'images': 1, 'scales': (1, 2, 4)}
    assert module.scales == (1, 2, 4)
    assert mechanism_table.example('downsampled_self_attention', (8, 28, 28, 64))[1] == {
        'pool_size': 4
    }
    assert mechanism_table.example('gc', (8, 28, 28, 256))[1] == {}
    assert {n for n in NAMES if attention_entry(n).maps > 1} == {'cross_layer_non_local'}


def test_table_goes_into_the_file_and_back(tmp_path):
    path = tmp_path / 'README.md'
    path.write_text('above\n{}\n{}\nbelow\n'.format(*markdown.marks(PLACE)))
    passes = {'eca': '3.0, 4.1*'}
    told = []
    markdown.update(path, PLACE, mechanism_table.table(['eca'], passes, told.append))
    text = path.read_text()
    assert told == ['eca']
    assert text.startswith('above\n')
    assert text.endswith('\nbelow\n')
    assert mechanism_table.read_passes(text) == passes
    (cells,) = markdown.read_rows(PLACE, text).values()
    assert without_memory(cells) == mechanism_table.row('eca')
    markdown.update(path, PLACE, mechanism_table.table(['eca']))
    assert mechanism_table.read_passes(path.read_text()) == {}
    assert path.read_text().count(markdown.marks(PLACE)[0]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ['README.md']


def test_file_without_a_place_is_refused(tmp_path):
    path = tmp_path / 'README.md'
    with pytest.raises(ValueError, match='no such file'):
        markdown.update(path, PLACE, '')
    path.write_text('nothing')
    with pytest.raises(ValueError, match='must have one place'):
        markdown.update(path, PLACE, '')
    assert path.read_text() == 'nothing'


def test_passes_or_the_reason_why_not(monkeypatch):
    asked = []

    def compile_modules(jobs, *, timeout=None):
        asked.extend(jobs)
        return [{'passes': 3.04, 'loops': 0}, {'passes': 4.06, 'loops': 1}]

    monkeypatch.setattr(compiled, 'compile_modules', compile_modules)
    assert mechanism_table.measure_passes('pyramid_self_attention') == '3.0, 4.1*'
    assert [job.get('vjp', False) for job in asked] == [False, True]
    assert asked[0]['shape'] == [128, 56, 56, 256]
    assert asked[0]['arguments'] == {'images': 1}

    def refuse(jobs, *, timeout=None):
        return [{'error': 'does not fit the 16 GiB | of v5e' + ' at all' * 40}] * 2

    monkeypatch.setattr(compiled, 'compile_modules', refuse)
    cell = mechanism_table.measure_passes('pam')
    assert cell.startswith('- (does not fit the 16 GiB / of v5e')
    assert PASSES.fullmatch(cell)

    def crash(jobs, *, timeout=None):
        raise RuntimeError(
            'the compiler ended with status 1: Traceback\n  ...\nTypeError: no\n----\nhint'
        )

    monkeypatch.setattr(compiled, 'compile_modules', crash)
    assert mechanism_table.measure_passes('pam') == '- (TypeError: no)'
