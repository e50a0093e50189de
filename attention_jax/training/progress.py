"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Column


class ProgressLine:
    """Shows how far a run is; a context. Processes other than the first show nothing.

    Args:
        steps: of the whole run.
        step: already done.
    """

    def __init__(self, steps: int, step: int = 0):
        self._silent = jax.process_index() != 0
        self._live = sys.stdout.isatty() and not self._silent
        self._steps = steps
        self._bar = Progress(
            SpinnerColumn(),
            # Narrow terminals get a second line instead of a line cut short.
            TextColumn('{task.description}', table_column=Column(no_wrap=False, ratio=1)),
            expand=True,
            transient=True,
            console=Console(),
            disable=not self._live,
        )
        self._task = self._bar.add_task('', total=steps, completed=step)

    def __enter__(self) -> 'ProgressLine':
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._live:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._silent:
            print(text, flush=True)

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Says what takes a while, and afterwards how long it took."""
        start = time.perf_counter()
        if self._live:
            self._bar.update(self._task, description=text)
        else:
            self.say(f'{text} ...')
        yield
        self.say(f'{text}: {time.perf_counter() - start:.1f} s')

    def update(self, row: Mapping[str, float], seconds_left: float) -> None:
        """Shows the row that was just recorded."""
        line = describe_row(row, self._steps, seconds_left)
        if not self._live or any(name.startswith('test/') for name in row):
            self.say(line)
        if self._live:
            self._bar.update(self._task, completed=row['step'], description=line)


def describe_row(row: Mapping[str, float], steps: int, seconds_left: float) -> str:
    """Returns the line for a row of metrics.jsonl."""
    parts = [f'step {row["step"]}/{steps}', f'epoch {row["epoch"]:.2f}']
    parts.append(describe({k: v for k, v in row.items() if k.startswith(('train/', 'test/'))}))
    parts.append(f'{row["images_per_second"]:.0f} images/s')
    parts.append(f'data wait {row["data_wait"]:.0%}')
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f'ETA {hours}:{minutes:02}:{seconds:02}')
    return '  '.join(parts)


def describe(results: Mapping[str, float]) -> str:
    """Returns e.g. 'test/loss 0.0312  test/accuracy 0.9916', without results of single classes."""
    return '  '.join(f'{name} {x:.4f}' for name, x in results.items() if name.count('/') < 2)


def say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)
