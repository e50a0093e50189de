"""`attention-jax benchmark`: times of mechanisms, beside PyTorch's."""

import argparse
import pathlib
from typing import Any

from attention_jax import files


def add(commands: Any) -> None:
    """Adds the subcommand to `commands`, of argparse."""
    parser = commands.add_parser(
        'benchmark',
        help="times of mechanisms, beside PyTorch's",
        description='Times mechanisms, forward (evaluation mode) and forward + backward (training '
        "mode), beside PyTorch's form of the same where the extra `parity` is installed, "
        'alternating in one run.',
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        'names', nargs='*', metavar='NAME', help='mechanisms, or NAME/VARIANT; none: all of them'
    )
    parser.add_argument(
        '--shape',
        nargs='+',
        type=_shape,
        metavar='BxHxWxC',
        help='of the input; 8x56x56x64 8x28x28x256',
    )
    parser.add_argument('--repeats', type=int, default=10, metavar='N', help='%(default)s')
    parser.add_argument(
        '--dtype', default='float32', choices=('bfloat16', 'float32'), help='%(default)s'
    )
    parser.add_argument('--threads', type=int, metavar='N', help='CPU cores for both; all')
    parser.add_argument(
        '--channels_last', action='store_true', help="PyTorch's maps in that memory layout"
    )
    parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='write the numbers there')


def _shape(text: str) -> tuple[int, ...]:
    sides = text.split('x')
    if len(sides) != 4 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f'{text} must be four numbers, such as 8x56x56x64')
    return tuple(map(int, sides))


def _run(options: argparse.Namespace) -> None:
    files.check_folder('--json', options.json)
    from attention_jax.analysis import benchmark

    asked = {k: v for k, v in vars(options).items() if k not in ('run', 'json', 'names', 'shape')}
    found = benchmark.measure(options.names, shapes=options.shape or benchmark.SHAPES, **asked)
    report = {'environment': next(found), 'repeats': options.repeats, 'rows': []}
    for line in _environment_lines(report['environment'], options):
        print(line)
    print(_LINE.format('name', 'shape', 'ours', '', 'PyTorch', '', 'ratio', '', '').rstrip())
    print(_LINE.format('', '', *['forward', '+ backward'] * 3, '').rstrip())
    for row in found:
        report['rows'].append(row)
        print(_line(row), flush=True)
        if options.json:  # each time: a long run that is stopped leaves what it has
            files.write_json(options.json, report)


_LINE = '{:30}  {:12}  {:>22}  {:>22}  {:>22}  {:>22}  {:>7}  {:>10}  {}'


def _environment_lines(machine: dict[str, Any], options: argparse.Namespace) -> list[str]:
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    return [
        f'{machine["cpu"]}, {machine["cores"]} cores; JAX on {machine["device"]}; '
        f'{machine["system"]}; load {machine["load"]}',
        f'Python {machine["python"]}, {versions}',
        f'not beside PyTorch: {machine["alone"]}' if machine['alone'] else 'beside PyTorch',
        f'{options.dtype}; milliseconds: median (quartiles) of {options.repeats}; ratio: ours over '
        "PyTorch's",
    ]


def _line(row: dict[str, Any]) -> str:
    cells = [row['name'], 'x'.join(map(str, row['shape']))]
    what = ('forward', 'forward_backward')
    for times in (row['ours'], row['torch']):
        for t in (times[w] if times else None for w in what):
            cells.append(f'{t["median"]:.3g} ({t["low"]:.3g}-{t["high"]:.3g})' if t else '-')
    cells += [f'{row["ratio"][w]:.2f}' if row['ratio'] else '-' for w in what]
    return _LINE.format(*cells, row['note']).rstrip()
