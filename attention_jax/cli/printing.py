"""How subcommands show what they found."""

import sys

Row = tuple[str, str, str]  # what, how much, and what it means


def size(n: float) -> str:
    """`n` bytes with a unit."""
    for unit in ('B', 'kB', 'MB'):
        if n < 999.5:
            return f'{n:.3g} {unit}'
        n /= 1000
    return f'{n:,.2f} GB'


def duration(s: float) -> str:
    """`s` seconds with a unit."""
    return f'{s * 1e3:.3g} ms' if s < 1 else f'{s:.3g} s'


def tables(named: dict[str, list[Row]]) -> None:
    """Prints tables; plain lines where nobody reads them from a terminal."""
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for rows in named.values() for row in rows) for i in range(2)]
        for title, rows in named.items():
            print(title)
            for what, value, note in rows:
                print(f'  {what.ljust(widths[0])}  {value.ljust(widths[1])}  {note}'.rstrip())
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for title, rows in named.items():
        table = Table(title=title, show_header=False, title_justify='left')
        table.add_column()
        table.add_column(style='bold')
        table.add_column(style='dim')
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
