"""`attention-jax table`: the table of mechanisms, or of networks."""

import argparse
import pathlib
import sys
from typing import Any


def add(commands: Any) -> None:
    """Adds the subcommand to `commands`, of argparse."""
    parser = commands.add_parser(
        'table',
        help='the table of mechanisms, or of networks',
        description='Writes a table in Markdown. Of mechanisms: parameters, multiply-adds, memory, '
        'complexity, passes, in a minute or two. Of networks: parameters, multiply-adds, published '
        'accuracies, in some minutes.',
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        'what',
        nargs='?',
        choices=('mechanisms', 'networks'),
        default='mechanisms',
        help='%(default)s unless given',
    )
    parser.add_argument(
        '--write',
        type=pathlib.Path,
        metavar='FILE',
        help='put it in the place of the one in FILE; else it is printed',
    )
    parser.add_argument(
        '--passes',
        nargs='*',
        metavar='NAME',
        help='mechanisms: compile these (none named: all) for a TPU v5e and count passes again, '
        'which takes minutes; else the passes are those in FILE, or in the README',
    )


def _run(options: argparse.Namespace) -> None:
    if options.what == 'networks' and options.passes is not None:
        raise ValueError('--passes is for the table of mechanisms, not for that of networks')
    from attention_jax.analysis import markdown, mechanism_table, network_table

    kind = {'mechanisms': mechanism_table, 'networks': network_table}[options.what]
    text = markdown.check_place(options.write, kind.PLACE) if options.write else _readme()
    more = {'passes': _passes(options.passes, text)} if kind is mechanism_table else {}
    table = kind.table(progress=lambda name: _say(f'counting {name} ...'), **more)
    if options.write:
        markdown.update(options.write, kind.PLACE, table)
    else:
        print(table)


def _readme() -> str:
    path = pathlib.Path(__file__).resolve().parents[2] / 'README.md'
    return path.read_text(encoding='utf-8') if path.is_file() else ''


def _passes(names: list[str] | None, text: str) -> dict[str, str]:
    """The passes in a text, those of `names` (none named: all) measured again."""
    from attention_jax.analysis import mechanism_table

    passes = mechanism_table.read_passes(text)
    for name in () if names is None else mechanism_table.choose(names):
        _say(f'compiling {name} for v5e ...')
        passes[name] = mechanism_table.measure_passes(name)
        _say(f'  {passes[name]}')
    return passes


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
