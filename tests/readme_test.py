"""What the README says can be typed works."""

import re

import pytest

from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / 'README.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize('number', range(len(SNIPPETS)))
def test_snippet_runs(number):
    exec(compile(SNIPPETS[number], f'README.md snippet {number}', 'exec'), {})


def test_files_named_in_the_readme_exist():
    for name in set(re.findall(r'\b(?:configs|colabs|tests|attention_jax)/[\w/]+\.\w+', TEXT)):
        assert (REPOSITORY / name).is_file(), name


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = re.findall(r'\.venv/bin/python -m pytest.*', TEXT)
    assert command in (REPOSITORY / '.ci' / 'run').read_text().splitlines()
