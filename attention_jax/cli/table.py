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
    if options.what == 'networks':
        _network_table(options)
        return
    from attention_jax.analysis import markdown, mechanism_table

    readme = pathlib.Path(__file__).resolve().parents[2] / 'README.md'
    if options.write:
        text = markdown.check_place(options.write, mechanism_table.PLACE)
    else:
        text = readme.read_text(encoding='utf-8') if readme.is_file() else ''
    passes = mechanism_table.read_passes(text)
    if options.passes is not None:
        for name in mechanism_table.choose(options.passes):
            _say(f'compiling {name} for v5e ...')
            passes[name] = mechanism_table.measure_passes(name)
            _say(f'  {passes[name]}')
    table = mechanism_table.table(passes=passes, progress=lambda name: _say(f'counting {name} ...'))
    if options.write:
        markdown.update(options.write, mechanism_table.PLACE, table)
    else:
        print(table)


def _network_table(options: argparse.Namespace) -> None:
    if options.passes is not None:
        raise ValueError('--passes is for the table of mechanisms, not for that of networks')
    from attention_jax.analysis import markdown, network_table

    if options.write:
        markdown.check_place(options.write, network_table.PLACE)
    table = network_table.table(progress=lambda name: _say(f'counting {name} ...'))
    if options.write:
        markdown.update(options.write, network_table.PLACE, table)
    else:
        print(table)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
