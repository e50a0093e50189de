"""`attention-jax convert`: weights from PyTorch's names to ours, and back."""

import argparse
import json
from typing import Any

from attention_jax.cli import printing


def add(commands: Any) -> None:
    """Adds the subcommand to `commands`, of argparse."""
    parser = commands.add_parser(
        'convert',
        help="weights from PyTorch's files or the hub to ours, and back",
        description='Reads weights and writes them to a .safetensors file, under our names with a '
        "card that says what they are, or under PyTorch's.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        'src',
        metavar='SRC',
        help='.safetensors, or .pth and the like (needs PyTorch), a work directory, or a hub id '
        'such as timm/seresnet50.a1_in1k',
    )
    parser.add_argument('dst', metavar='DST', help='.safetensors file to write')
    parser.add_argument(
        '--model', metavar='NAME', help="network or mechanism; what the card or timm's config says"
    )
    parser.add_argument(
        '--arguments', default='{}', metavar='JSON', help='of the network: {"num_classes": 10}'
    )
    parser.add_argument('--channels', type=int, metavar='N', help="of the images; the weights' own")
    parser.add_argument(
        '--to', default='ours', choices=('ours', 'torch'), help='names to write; %(default)s'
    )
    parser.add_argument(
        '--source',
        metavar='SCHEME',
        help="with --to torch: whose names, such as timm; the authors'",
    )


def _run(options: argparse.Namespace) -> None:
    try:
        arguments = json.loads(options.arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f'--arguments {options.arguments} is not JSON: {error}') from None
    if not isinstance(arguments, dict):
        raise ValueError(f'--arguments {options.arguments} must be an object, {{"NAME": VALUE}}')
    from attention_jax.interop import cards, convert
    from attention_jax.training.pretrained import weights_in

    done = convert.convert(
        weights_in(options.src),
        options.dst,
        model=options.model,
        arguments=cards.revive(arguments),
        channels=options.channels,
        to=options.to,
        scheme=options.source,
    )
    printing.tables({'Converted': _rows(options, done)})


def _rows(options: argparse.Namespace, done: Any) -> list[printing.Row]:
    """Returns the rows for an `interop.convert.Converted`."""
    facts, report = done.report.preprocessing, done.report
    rows = [
        ('model', done.model, ', '.join(f'{k}={v!r}' for k, v in done.arguments.items())),
        ('from', options.src, f'read as {report.source}'),
        (
            'to',
            options.dst,
            "PyTorch's names" if options.to == 'torch' else 'our names, and a card',
        ),
        ('arrays', str(done.arrays), f'{done.parameters:,} parameters'),
    ]
    for kind, names in (('new', report.new), ('dropped', report.dropped)):
        if names:
            more = ', ...' if len(names) > 5 else ''
            rows.append((kind, str(len(names)), ', '.join(names[:5]) + more))
    if facts:
        size = 'x'.join(map(str, facts.input_size))
        rows.append(('images', size, f'crop {facts.crop:g}, {facts.interpolation}'))
        rows.append(('normalised', f'mean {facts.mean}', f'deviation {facts.std}'))
    if done.licence:
        rows.append(('licence', done.licence, ''))
    return rows
