"""The notebooks: committed as they ran, and each still runs from top to bottom."""

import pathlib
import re
import runpy

import nbformat
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
COLABS = REPOSITORY / 'colabs'
NOTEBOOKS = sorted(path.name for path in COLABS.glob('*.ipynb'))
# Folders of one machine, where nothing of an address or a relative path stands before them.
MACHINE_PATH = re.compile(r'(?<![\w.:/~-])/(?:work|root|home|Users|tmp|var|opt|content)\b')


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def printed(cell):
    """All text of a cell's outputs."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get('text', ''))
        data = output.get('data', {})
        texts += [text for kind, text in data.items() if kind.startswith('text/')]
    return '\n'.join(texts)


def check_outputs(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == 'error']
    for cell in cells:
        assert not MACHINE_PATH.findall(cell.source)
        assert not MACHINE_PATH.findall(printed(cell))


def check_quickstart(notebook):
    text = '\n'.join(map(printed, code_cells(notebook)))
    (accuracy,) = re.findall(r'Final test accuracy: (\d\.\d+)', text)
    assert float(accuracy) >= 0.97
    (step,) = re.findall(r'the newest checkpoint is of step (\d+)', text)
    assert f'Going on from step {step} of ' in text
    figures = [o for cell in code_cells(notebook) for o in cell.outputs if 'image/png' in str(o)]
    assert len(figures) == 3


def test_there_is_a_notebook():
    assert 'quickstart.ipynb' in NOTEBOOKS


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_committed_as_it_ran(name):
    notebook = nbformat.read(COLABS / name, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert (COLABS / name).stat().st_size < 1.5e6
    if name == 'quickstart.ipynb':
        check_quickstart(notebook)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_runs(name, monkeypatch):
    # The package that is tested, installed or not: the notebook then installs nothing.
    monkeypatch.setenv('PYTHONPATH', str(REPOSITORY))
    notebook = runpy.run_path(str(COLABS / 'execute.py'))['execute'](COLABS / name)
    check_outputs(notebook)
    if name == 'quickstart.ipynb':
        check_quickstart(notebook)
