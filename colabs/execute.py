"""Executes notebooks from top to bottom in place, with the Python that runs this script.

    python colabs/execute.py [NOTEBOOK ...]

Without a name: all that lie beside this file.
"""

import pathlib
import re
import sys
import tempfile

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient


class _ThisPython(AsyncKernelManager):
    """Starts the interpreter at hand, whatever kernel is registered as 'python3' elsewhere."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of a fresh run; the file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        kernel_name='python3',
        kernel_manager_class=_ThisPython,
        resources={'metadata': {'path': str(path.parent)}},
        timeout=900,  # seconds a cell
        coalesce_streams=True,
        record_timing=False,
    ).execute()
    notebook.metadata.language_info = {'name': 'python'}
    for output in (output for cell in notebook.cells for output in cell.get('outputs', ())):
        if output.output_type == 'stream':
            output.text = without_temporary_folders(output.text)
    return notebook


def without_temporary_folders(text: str) -> str:
    """Shortens paths in temporary folders: their names differ from run to run."""
    return re.sub(re.escape(tempfile.gettempdir()) + r'/tmp\w+/', '', text)


def main(names: list[str]) -> None:
    """Executes the notebooks `names` and writes them back."""
    folder = pathlib.Path(__file__).parent
    for path in map(pathlib.Path, names) if names else sorted(folder.glob('*.ipynb')):
        print(path, flush=True)
        nbformat.write(execute(path.resolve()), path)


if __name__ == '__main__':
    main(sys.argv[1:])
