"""`attention-jax inspect`: what training needs on a device that is not there."""

import argparse
import pathlib
import sys
from typing import Any

from attention_jax import files
from attention_jax.cli import printing
from attention_jax.cli.printing import duration, size


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
    for option, metavar, type_, default, text in (
        ('--device', 'DEVICE', str, 'v5e', 'v5e, v5e:2x4, v6e:8x8, v5p:2x2x2, h100, h100:8'),
        ('--attention', 'NAME', str, None, 'put this mechanism into the network'),
        ('--placement', 'TEXT', str, None, 'where, such as branch@2+3'),
        ('--batch', 'N', int, None, "images a chip; 128, or the config's over the chips"),
        ('--size', 'N', int, None, 'side of the images in pixels'),
        ('--num_classes', 'N', int, None, 'number of classes'),
        ('--fsdp', 'N', int, None, 'chips that parameters are split over; 1'),
        ('--timeout', 'S', float, 1800, 'seconds'),
    ):
        text += '; %(default)s' if default else ''
        parser.add_argument(option, metavar=metavar, type=type_, default=default, help=text)
    parser.add_argument(
        '--dtype',
        default='bfloat16',
        choices=('bfloat16', 'float32'),
        help='type of the computation; parameters are float32; %(default)s',
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
    device, batch = report['device'].partition(':')[0], report['batch_per_chip']
    images = 'x'.join(map(str, report['image']))
    note = f'{report["num_classes"]} classes; {report["note"]}'.rstrip('; ')
    mesh = ', '.join(f'{axis} {n}' for axis, n in report['mesh'].items())
    program = [
        ('network', report['model'], ''),
        ('images', images, note),
        ('parameters', f'{report["parameters"]:,}', ''),
        ('multiply-adds', f'{report["macs"]:,}', 'an image, forward'),
        ('batch', f'{batch} a chip', f'{batch * chips} in all'),
        ('computed in', report['dtype'], 'parameters in float32'),
        ('chips', str(chips), mesh),
    ]
    moved, off_chip = report['bytes_moved'], report['bytes_off_chip']
    traffic = [('moved', size(moved), 'read and written by kernels')]
    if off_chip < moved:
        traffic.append(('to chip memory', size(off_chip), 'of it; the rest stays on the chip'))
    if report['flops']:
        traffic.append(('FLOPs', f'{report["flops"]:.3g}', 'before optimisation'))
    if report['loops']:
        note = 'bodies counted once, whatever their length'
        traffic.append(('loops', str(report['loops']), note))
    note = f"at least, by {device}'s bandwidth"
    traffic.append(('a step takes', duration(report['seconds']), note))
    # Where hardly anything leaves the chip, something else decides, and the bound is far off.
    limit = 'though memory is not the limit' if off_chip < moved / 2 else 'that memory allows'
    note = f'at most, of all chips, {limit} (computed, not measured)'
    traffic.append(('images a second', f'{report["images_per_second"]:,.0f}', note))
    kept = {
        'arguments': 'as laid out on the chip',
        '  state': 'of it, without padding',
        '  batch': 'of it, without padding',
        'outputs': 'beside the state, which is updated in place',
        'temporaries': '',
        'program': '',
        'total': f'{memory["total"] / memory["chip"]:.1%} of {memory["chip"] / 2**30:.0f} GiB',
    }
    tables = {
        'Program': program,
        'Moved in a step, per chip': traffic,
        'Memory, per chip': [(name, size(memory[name.strip()]), kept[name]) for name in kept],
    }
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
        sent = size(sum(c['bytes'] for c in same))
        rows.append((kind, f'{len(same)} times, {sent}', means.get(kind, '')))
    for line in report['batch_gathers']:
        rows.append(('GATHERS THE BATCH', line, 'every chip gets the examples of others'))
    if not report['batch_gathers']:
        rows.append(('batch', 'not gathered', 'no chip gets the examples of another'))
    return rows
