"""A generated table in a Markdown file, between two lines that mark its place."""

import os
import pathlib
import re
import tempfile
from collections.abc import Sequence


def marks(name: str) -> tuple[str, str]:
    """The two lines around the table `name`."""
    return f'<!-- {name}: begin -->', f'<!-- {name}: end -->'


def table(name: str, rows: Sequence[Sequence[str]], legend: str) -> str:
    """Writes a table.

    Args:
        name: of the marked place.
        rows: the titles of the columns, their alignment (`---` or `---:`), then the cells.
        legend: stands below.

    Returns:
        The table with its legend, between the two lines that mark it.
    """
    begin, end = marks(name)
    lines = ['| ' + ' | '.join(cells) + ' |' for cells in rows]
    return '\n'.join([begin, *lines, '', legend, end])


def read_rows(name: str, text: str) -> dict[str, list[str]]:
    """Reads a table: what the first cell has in backquotes -> the cells of the row."""
    begin, end = marks(name)
    match = re.search(f'{begin}(.*?){end}', text, re.DOTALL)
    rows = {}
    for line in match[1].splitlines() if match else ():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| `'):
            rows[re.match('`(.*?)`', cells[0])[1]] = cells
    return rows


def check_place(path: pathlib.Path, name: str) -> str:
    """The text of a file that has one place for a table.

    Args:
        path: a Markdown file.
        name: of the marked place.

    Raises:
        ValueError: there is no such file, or it has no such place.
    """
    if not path.is_file():
        raise ValueError(f'{path}: there is no such file')
    text = path.read_text(encoding='utf-8')
    begin, end = marks(name)
    if len(re.findall(f'{begin}.*?{end}', text, re.DOTALL)) != 1:
        raise ValueError(f'{path} must have one place for the table: a line {begin}, a line {end}')
    return text


def update(path: pathlib.Path, name: str, new: str) -> None:
    """Puts a table in the place of the one in a file; the file is never half written.

    Args:
        path: a Markdown file with the two lines that mark the place.
        name: of the marked place.
        new: see `table`.

    Raises:
        ValueError: there is no such file, or it has no such place.
    """
    text = check_place(path, name)
    begin, end = marks(name)
    text = re.sub(f'{begin}.*?{end}', lambda match: new, text, flags=re.DOTALL)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix='.table')
    with os.fdopen(handle, 'w', encoding='utf-8') as file:
        file.write(text)
    os.chmod(temporary, path.stat().st_mode)
    os.replace(temporary, path)
