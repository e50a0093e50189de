"""Files that are written whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives the path of a new file, which takes the place of `path` when the context ends.

    Where writing fails, `path` stays as it was, and nothing is left beside it.
    """
    new = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield new
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text in UTF-8; see `replacing`."""
    with replacing(path) as new:
        new.write_text(text, encoding='utf-8')


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as indented JSON; see `replacing`."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def check_folder(what: str, path: pathlib.Path | None) -> None:
    """Raises a ValueError if a file, `what` to the user, has no folder to be written to."""
    if path and not path.absolute().parent.is_dir():
        raise ValueError(f'{what} {path}: there is no folder {path.parent}')
