"""`attention-jax inspect`: what training needs on a device that is not there."""

import argparse
import pathlib
import sys
from typing import Any

from attention_jax import files
from attention_jax.cli import printing


def add(commands: Any) -> None:
    """Adds the subcommand to `commands`, of argparse."""
    parser = commands.add_parser(
        'inspect',
        help='what training needs on a device that is not there',
        description='Compiles the training step for a device that need not be there, and shows '
        'what it moves, keeps and sends, per chip. Takes minutes for a large network.',
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        'model',
        metavar='MODEL_OR_CONFIG',
        help="a network's name (resnet50), or a config (configs/resnet_gc.py:imagenet2012)",
    )
    parser.add_argument(
        '--device',
        default='v5e',
        help='v5e, v5e:2x4, v6e:8x8, v5p:2x2x2, h100, h100:8; %(default)s',
    )
    parser.add_argument('--attention', metavar='NAME', help='put this mechanism into the network')
    parser.add_argument('--placement', metavar='TEXT', help='where, such as branch@2+3')
    parser.add_argument(
        '--batch', type=int, metavar='N', help="images a chip; 128, or the config's over the chips"
    )
    parser.add_argument('--size', type=int, metavar='N', help='side of the images in pixels')
    parser.add_argument('--num_classes', type=int, metavar='N', help='number of classes')
    parser.add_argument(
        '--dtype',
        default='bfloat16',
        choices=('bfloat16', 'float32'),
        help='type of the computation; parameters are float32; %(default)s',
    )
    parser.add_argument(
        '--fsdp', type=int, metavar='N', help='chips that parameters are split over; 1'
    )
    parser.add_argument(
        '--timeout', type=float, default=1800, metavar='S', help='seconds; %(default)s'
    )
    parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='write the numbers there')


def _run(options: argparse.Namespace) -> None:
    files.check_folder('--json', options.json)
    from attention_jax.analysis import compiled, devices

    devices.parse_device(options.device)
    print(f'Compiling for {options.device} ...', file=sys.stderr, flush=True)
    asked = {k: v for k, v in vars(options).items() if k not in ('run', 'json')}
    report = compiled.inspect(asked.pop('model'), **asked)
    if options.json:
        files.write_json(options.json, report)
    printing.tables(_rows(report))


def _rows(report: dict[str, Any]) -> dict[str, list[printing.Row]]:
    """Returns title -> rows for a report of `analysis.compiled.inspect`."""
    memory, chips = report['memory'], report['mesh']['data'] * report['mesh']['fsdp']
    device, classes = report['device'].partition(':')[0], report['num_classes']
    size = 'x'.join(map(str, report['image']))
    mesh = ', '.join(f'{axis} {n}' for axis, n in report['mesh'].items())
    batch = report['batch_per_chip']
    program = [
        ('network', report['model'], ''),
        ('images', size, f'{classes} classes; {report["note"]}'.rstrip('; ')),
        ('parameters', f'{report["parameters"]:,}', ''),
        ('multiply-adds', f'{report["macs"]:,}', 'an image, forward'),
        ('batch', f'{batch} a chip', f'{batch * chips} in all'),
        ('computed in', report['dtype'], 'parameters in float32'),
        ('chips', str(chips), mesh),
    ]
    # Where hardly anything leaves the chip, something else decides, and the bound is far off.
    stays = report['bytes_off_chip'] < report['bytes_moved'] / 2
    limit = 'though memory is not the limit' if stays else 'that memory allows'
    traffic = [
        ('moved', printing.size(report['bytes_moved']), 'read and written by kernels'),
        (
            'to chip memory',
            printing.size(report['bytes_off_chip']),
            'of it; the rest stays on the chip',
        )
        if report['bytes_off_chip'] < report['bytes_moved']
        else None,
        ('FLOPs', f'{report["flops"]:.3g}', 'before optimisation') if report['flops'] else None,
        ('loops', str(report['loops']), 'bodies counted once, whatever their length')
        if report['loops']
        else None,
        (
            'a step takes',
            printing.duration(report['seconds']),
            f"at least, by {device}'s bandwidth",
        ),
        (
            'images a second',
            f'{report["images_per_second"]:,.0f}',
            f'at most, of all chips, {limit} (computed, not measured)',
        ),
    ]
    share = memory['total'] / memory['chip']
    kept = [
        ('arguments', printing.size(memory['arguments']), 'as laid out on the chip'),
        ('  state', printing.size(memory['state']), 'of it, without padding'),
        ('  batch', printing.size(memory['batch']), 'of it, without padding'),
        (
            'outputs',
            printing.size(memory['outputs']),
            'beside the state, which is updated in place',
        ),
        ('temporaries', printing.size(memory['temporaries']), ''),
        ('program', printing.size(memory['program']), ''),
        (
            'total',
            printing.size(memory['total']),
            f'{share:.1%} of {memory["chip"] / 2**30:.0f} GiB',
        ),
    ]
    tables = {'Program': program, 'Moved in a step, per chip': [r for r in traffic if r]}
    tables['Memory, per chip'] = kept
    if chips > 1:
        tables['Sent in a step, per chip'] = _sent_rows(report)
    return tables


def _sent_rows(report: dict[str, Any]) -> list[printing.Row]:
    """A row for each kind of exchange, then whether the batch is gathered."""
    means = {
        'all-gather': 'split parameters, each whole for its use',
        'all-reduce': 'gradients, batch statistics, sums',
        'reduce-scatter': 'gradients of split parameters',
    }
    rows = []
    for kind in sorted({c['kind'] for c in report['collectives']}):
        same = [c for c in report['collectives'] if c['kind'] == kind]
        size = printing.size(sum(c['bytes'] for c in same))
        rows.append((kind, f'{len(same)} times, {size}', means.get(kind, '')))
    for line in report['batch_gathers']:
        rows.append(('GATHERS THE BATCH', line, 'every chip gets the examples of others'))
    if not report['batch_gathers']:
        rows.append(('batch', 'not gathered', 'no chip gets the examples of another'))
    return rows
