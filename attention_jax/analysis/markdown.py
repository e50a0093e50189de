"""A generated table in a Markdown file, between two lines that mark its place."""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from attention_jax import files


def marks(name: str) -> tuple[str, str]:
    """The two lines around the table `name`."""
    return f'<!-- {name}: begin -->', f'<!-- {name}: end -->'


def table(name: str, columns: Mapping[str, str], rows: Iterable[Sequence[str]], legend: str) -> str:
    """Writes a table with its legend below, between the two lines that mark it.

    Args:
        name: of the marked place.
        columns: title -> alignment, `---` or `---:`.
        rows: the cells.
        legend: stands below.
    """
    begin, end = marks(name)
    lines = [f'| {" | ".join(cells)} |' for cells in (columns, columns.values(), *rows)]
    return '\n'.join([begin, *lines, '', legend, end])


def read_rows(name: str, text: str) -> dict[str, list[str]]:
    """Reads a table: what the first cell has in backquotes -> the cells of the row."""
    match = _place(name).search(text)
    lines = match[0].splitlines() if match else ()
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in lines
        if line.startswith('| `')
    ]
    return {re.match('`(.*?)`', cells[0])[1]: cells for cells in rows}


def check_place(path: pathlib.Path, name: str) -> str:
    """The text of a file that has one place for the table `name`.

    Raises:
        ValueError: there is no such file, or it has no such place.
    """
    if not path.is_file():
        raise ValueError(f'{path}: there is no such file')
    text = path.read_text(encoding='utf-8')
    if len(_place(name).findall(text)) != 1:
        begin, end = marks(name)
        raise ValueError(f'{path} must have one place for the table: a line {begin}, a line {end}')
    return text


def update(path: pathlib.Path, name: str, new: str) -> None:
    """Puts a table (see `table`) in the place of the one in a file, which is never half written.

    Raises:
        ValueError: see `check_place`.
    """
    files.write_text(path, _place(name).sub(lambda match: new, check_place(path, name)))


def _place(name: str) -> re.Pattern[str]:
    begin, end = marks(name)
    return re.compile(f'{begin}.*?{end}', re.DOTALL)
