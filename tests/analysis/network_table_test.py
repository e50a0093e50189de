import json

import pytest

import attention_jax
from attention_jax.analysis import markdown, network_table
from attention_jax.models.registry import model_entry
from tests import helpers
from tests.conftest import REPOSITORY

NAMES = attention_jax.list_models()
FILE = markdown.read_rows('networks', (REPOSITORY / 'docs' / 'networks.md').read_text())
QUICK = ('cifar_resnet20', 'eca_mobilenetv2', 'nl_resnet50_5', 'resnet18', 'tiny_resnet')


def test_rows_by_hand():
    assert network_table.row('cifar_resnet20') == [
        '`cifar_resnet20`',
        '[arXiv 1512.03385](https://arxiv.org/abs/1512.03385), section 4.2',
        '269,722',
        '40,551,040',
        '',
        '32x32 (10 classes)',
        '91.25 (paper, CIFAR-10)',
    ]
    cells = network_table.row('nl_resnet50_5')
    # Pairs of 28x28 and 14x14 positions with those of the pooled map, twice each.
    pairs = 2 * 2 * 256 * 28**2 * 14**2 + 3 * 2 * 512 * 14**2 * 7**2
    assert cells[4:] == [f'{pairs:,}', '224x224', '']
    assert network_table.row('resnet50')[6] == '76.13 (torchvision V1), 80.86 (torchvision V2)'


@pytest.mark.parametrize(
    'name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_file_is_current(name):
    assert name in FILE, 'attention-jax table networks --write docs/networks.md'
    assert FILE[name] == network_table.row(name)


def test_file_has_every_network_and_the_counts_of_the_originals():
    assert list(FILE) == NAMES
    counts = json.loads((helpers.REFERENCE / 'networks' / 'counts.json').read_text())
    for name, row in counts.items():
        assert FILE[name][2:4] == [f'{row["params"]:,}', f'{row["macs"]:,}']


def test_published_accuracies():
    published = {name: claims for name in NAMES if (claims := model_entry(name).published)}
    assert len(published) == 52
    for claims in published.values():
        for accuracy, whose in claims:
            assert 60 < accuracy < 100
            assert whose


def test_table_goes_into_the_file_and_back(tmp_path):
    path = tmp_path / 'networks.md'
    begin, end = markdown.marks('networks')
    path.write_text(f'above\n{begin}\nold\n{end}\nbelow\n')
    told = []
    for _ in range(2):
        new = network_table.table(['tiny_resnet'], told.append)
        markdown.update(path, network_table.PLACE, new)
    text = path.read_text()
    assert told == ['tiny_resnet'] * 2
    assert text.startswith(f'above\n{begin}\n| name | paper |')
    assert text.endswith('numbers is ours.\n' + end + '\nbelow\n')
    assert markdown.read_rows('networks', text) == {'tiny_resnet': network_table.row('tiny_resnet')}
    assert markdown.read_rows('mechanisms', text) == {}
    assert [p.name for p in tmp_path.iterdir()] == ['networks.md']


def test_file_without_a_place_is_refused(tmp_path):
    path = tmp_path / 'networks.md'
    with pytest.raises(ValueError, match='no such file'):
        markdown.update(path, 'networks', '')
    path.write_text('nothing')
    with pytest.raises(ValueError, match='must have one place for the table'):
        markdown.update(path, 'networks', '')
    assert path.read_text() == 'nothing'
