"""The command `attention-jax`.

    attention-jax table --write README.md
    attention-jax table networks --write docs/networks.md
    attention-jax benchmark se gc --shape 8x56x56x64
    attention-jax inspect MODEL_OR_CONFIG --device v5e:2x4
    attention-jax convert timm/seresnet50.a1_in1k seresnet50.safetensors
    attention-jax anchors voc:VOCdevkit/VOC2007 --split trainval
    attention-jax predict runs/yolov4_tiny-digit_scenes photo.jpg --output boxes

Exit status: 0 done, 2 what was given is wrong, 1 anything else, 130 interrupted.

A subcommand is a function `_add_NAME` that declares its options and the function that runs it.
Nothing that takes time to import is imported before the command line is right.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

Row = tuple[str, str, str]  # what, how much, and what it means


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, as the rest of the package has it."""

    def error(self, message: str) -> None:
        self.exit(2, f'error: {message}; {self.prog} --help says more\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (None: the process's) and returns its exit status."""
    parser = _Parser(prog='attention-jax', description='Visual attention in JAX: tools.')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for add in (
        _add_table,
        _add_benchmark,
        _add_inspect,
        _add_convert,
        _add_anchors,
        _add_predict,
    ):
        add(commands)
    try:
        options = parser.parse_args(argv)
    except SystemExit as end:  # help, or an error that is printed
        return end.code

    from attention_jax import command_line

    return command_line.run(lambda: options.run(options))


# table


def _add_table(commands: Any) -> None:
    parser = commands.add_parser(
        'table',
        help='the table of mechanisms, or of networks',
        description='Writes a table in Markdown. Of mechanisms: parameters, multiply-adds, memory, '
        'complexity, passes, in a minute or two. Of networks: parameters, multiply-adds, published '
        'accuracies, in some minutes.',
    )
    parser.set_defaults(run=_table)
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


def _table(options: argparse.Namespace) -> None:
    if options.what == 'networks':
        _network_table(options)
        return
    from attention_jax.analysis import markdown, mechanism_table

    readme = pathlib.Path(__file__).resolve().parents[1] / 'README.md'
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


# benchmark


def _add_benchmark(commands: Any) -> None:
    parser = commands.add_parser(
        'benchmark',
        help="times of mechanisms, beside PyTorch's",
        description='Times mechanisms, forward (evaluation mode) and forward + backward (training '
        "mode), beside PyTorch's form of the same where the extra `parity` is installed, "
        'alternating in one run.',
    )
    parser.set_defaults(run=_benchmark)
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


def _benchmark(options: argparse.Namespace) -> None:
    _check_folder(options.json)
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
        print(_benchmark_line(row), flush=True)
        if options.json:  # each time: a long run that is stopped leaves what it has
            temporary = options.json.with_name(f'.{options.json.name}')
            temporary.write_text(json.dumps(report, indent=2) + '\n')
            os.replace(temporary, options.json)


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


def _benchmark_line(row: dict[str, Any]) -> str:
    cells = [row['name'], 'x'.join(map(str, row['shape']))]
    for side in ('ours', 'torch'):
        for what in ('forward', 'forward_backward'):
            t = row[side] and row[side][what]
            cells.append(f'{t["median"]:.3g} ({t["low"]:.3g}-{t["high"]:.3g})' if t else '-')
    for what in ('forward', 'forward_backward'):
        cells.append(f'{row["ratio"][what]:.2f}' if row['ratio'] else '-')
    return _LINE.format(*cells, row['note']).rstrip()


def _check_folder(path: pathlib.Path | None) -> None:
    if path and not path.absolute().parent.is_dir():
        raise ValueError(f'--json {path}: there is no folder {path.parent}')


# inspect


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        'inspect',
        help='what training needs on a device that is not there',
        description='Compiles the training step for a device that need not be there, and shows '
        'what it moves, keeps and sends, per chip. Takes minutes for a large network.',
    )
    parser.set_defaults(run=_inspect)
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


def _inspect(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from attention_jax.analysis import compiled, devices

    devices.parse_device(options.device)
    print(f'Compiling for {options.device} ...', file=sys.stderr, flush=True)
    asked = {k: v for k, v in vars(options).items() if k not in ('run', 'json')}
    report = compiled.inspect(asked.pop('model'), **asked)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + '\n')
    _print_tables(_inspect_rows(report))


def _inspect_rows(report: dict[str, Any]) -> dict[str, list[Row]]:
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
        ('moved', _bytes(report['bytes_moved']), 'read and written by kernels'),
        ('to chip memory', _bytes(report['bytes_off_chip']), 'of it; the rest stays on the chip')
        if report['bytes_off_chip'] < report['bytes_moved']
        else None,
        ('FLOPs', f'{report["flops"]:.3g}', 'before optimisation') if report['flops'] else None,
        ('loops', str(report['loops']), 'bodies counted once, whatever their length')
        if report['loops']
        else None,
        ('a step takes', _seconds(report['seconds']), f"at least, by {device}'s bandwidth"),
        (
            'images a second',
            f'{report["images_per_second"]:,.0f}',
            f'at most, of all chips, {limit} (computed, not measured)',
        ),
    ]
    share = memory['total'] / memory['chip']
    kept = [
        ('arguments', _bytes(memory['arguments']), 'as laid out on the chip'),
        ('  state', _bytes(memory['state']), 'of it, without padding'),
        ('  batch', _bytes(memory['batch']), 'of it, without padding'),
        ('outputs', _bytes(memory['outputs']), 'beside the state, which is updated in place'),
        ('temporaries', _bytes(memory['temporaries']), ''),
        ('program', _bytes(memory['program']), ''),
        ('total', _bytes(memory['total']), f'{share:.1%} of {memory["chip"] / 2**30:.0f} GiB'),
    ]
    tables = {'Program': program, 'Moved in a step, per chip': [r for r in traffic if r]}
    tables['Memory, per chip'] = kept
    if chips > 1:
        tables['Sent in a step, per chip'] = _sent_rows(report)
    return tables


def _sent_rows(report: dict[str, Any]) -> list[Row]:
    """A row for each kind of exchange, then whether the batch is gathered."""
    means = {
        'all-gather': 'split parameters, each whole for its use',
        'all-reduce': 'gradients, batch statistics, sums',
        'reduce-scatter': 'gradients of split parameters',
    }
    rows = []
    for kind in sorted({c['kind'] for c in report['collectives']}):
        same = [c for c in report['collectives'] if c['kind'] == kind]
        size = _bytes(sum(c['bytes'] for c in same))
        rows.append((kind, f'{len(same)} times, {size}', means.get(kind, '')))
    for line in report['batch_gathers']:
        rows.append(('GATHERS THE BATCH', line, 'every chip gets the examples of others'))
    if not report['batch_gathers']:
        rows.append(('batch', 'not gathered', 'no chip gets the examples of another'))
    return rows


# convert


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        'convert',
        help="weights from PyTorch's files or the hub to ours, and back",
        description='Reads weights and writes them to a .safetensors file, under our names with a '
        "card that says what they are, or under PyTorch's.",
    )
    parser.set_defaults(run=_convert)
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


def _convert(options: argparse.Namespace) -> None:
    try:
        arguments = json.loads(options.arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f'--arguments {options.arguments} is not JSON: {error}') from None
    if not isinstance(arguments, dict):
        raise ValueError(f'--arguments {options.arguments} must be an object, {{"NAME": VALUE}}')
    from attention_jax.interop import convert, pretrained

    done = convert.convert(
        options.src,
        options.dst,
        model=options.model,
        arguments=pretrained.revive(arguments),
        channels=options.channels,
        to=options.to,
        scheme=options.source,
    )
    _print_tables({'Converted': _convert_rows(options, done)})


def _convert_rows(options: argparse.Namespace, done: Any) -> list[Row]:
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


# anchors


def _add_anchors(commands: Any) -> None:
    parser = commands.add_parser(
        'anchors',
        help='sizes of boxes that stand for those of a data set',
        description='Groups the boxes of a data set by k-means with the distance 1 - IoU of their '
        'sizes, on pictures letterboxed to the input size, and prints the medians by rising area.',
    )
    parser.set_defaults(run=_anchors)
    parser.add_argument(
        'dataset',
        metavar='DATASET',
        help='digit_scenes, voc:PATH, coco:PATH, or a prepared TFDS name such as voc/2007',
    )
    parser.add_argument('--split', default='train', help='%(default)s')
    parser.add_argument('--data-dir', metavar='DIR', help='where TFDS finds it')
    parser.add_argument('--size', type=int, metavar='PIXELS', help="a side; the data set's, or 416")
    parser.add_argument('--number', type=int, default=6, metavar='K', help='%(default)s')
    parser.add_argument('--seed', type=int, default=0, help='of the first centres; %(default)s')


def _anchors(options: argparse.Namespace) -> None:
    import types

    from attention_jax.data import anchors, detection

    config = types.SimpleNamespace(
        data=types.SimpleNamespace(
            name=options.dataset, data_dir=options.data_dir, image_size=options.size
        ),
        detection=types.SimpleNamespace(max_boxes=1),  # of a training example
    )
    source = detection.source(config, options.split, train=False)
    sizes = source.box_sizes()
    found = anchors.kmeans(sizes, options.number, options.seed)
    best = anchors.overlap(sizes, found).max(-1)
    print(
        f'{len(sizes):,} boxes of {len(source):,} pictures; mean IoU with the best anchor', end=''
    )
    print(f' {best.mean():.4f}')
    listed = ''.join(f'({round(w)}, {round(h)}), ' for w, h in found)
    print(f'--config.detection.anchors="({listed.rstrip()})"')
    for line in source.warnings():
        print(line, file=sys.stderr)


# predict


def _add_predict(commands: Any) -> None:
    parser = commands.add_parser(
        'predict',
        help='boxes on photos, by a network that was trained to detect',
        description='Writes DIR/NAME.png, the photo with boxes, names and scores, and '
        'DIR/NAME.json, the same as numbers: (x1, y1, x2, y2) in pixels of the photo, upright as '
        'its camera says.',
    )
    parser.set_defaults(run=_predict)
    parser.add_argument('workdir', metavar='WORKDIR', type=pathlib.Path, help='of a training run')
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=pathlib.Path, help='photos')
    parser.add_argument('--output', metavar='DIR', required=True, type=pathlib.Path)
    parser.add_argument(
        '--score-threshold', type=float, default=0.5, metavar='S', help='%(default)s'
    )
    parser.add_argument('--iou-threshold', type=float, default=0.3, metavar='I', help='%(default)s')


def _predict(options: argparse.Namespace) -> None:
    for name in ('score_threshold', 'iou_threshold'):
        if not 0 <= getattr(options, name) <= 1:
            option = f'--{name.replace("_", "-")}'
            raise ValueError(f'{option} must be in 0 to 1, got {getattr(options, name)}')
    stems = [image.stem for image in options.images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(f'two photos are called {twice[0]!r}: predict them into different folders')

    from PIL import Image, ImageOps

    import attention_jax
    from attention_jax.data import annotations
    from attention_jax.tasks import prediction
    from attention_jax.training.workdir import read_config

    config = read_config(options.workdir)
    if config.task != 'detection':
        raise ValueError(f'workdir {options.workdir} holds a run of {config.task}, not detection')
    missing = [image for image in options.images if not image.is_file()]
    if missing:
        raise ValueError(f'photo {missing[0]} is not there')
    model, variables, config = attention_jax.load(options.workdir)
    names = config.dataset.class_names
    options.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for path in options.images:
        try:
            photo = ImageOps.exif_transpose(Image.open(path)).convert('RGB')
        except annotations.BROKEN as error:
            failed.append(path)
            print(f'{path}: cannot be read: {error}', file=sys.stderr)
            continue
        found = prediction.predict(
            model,
            variables,
            photo,
            score_threshold=options.score_threshold,
            iou_threshold=options.iou_threshold,
        )
        rows = [
            {
                'box': [round(float(v), 2) for v in box],
                'class': names[number],
                'score': float(score),
            }
            for box, number, score in zip(
                found['boxes'], found['classes'], found['scores'], strict=True
            )
        ]
        target = options.output / f'{path.stem}.png'
        prediction.draw(photo, found, names).save(target)
        report = {'image': str(path), 'width': photo.width, 'height': photo.height, 'boxes': rows}
        target.with_suffix('.json').write_text(json.dumps(report, indent=2) + '\n')
        print(f'{path}: {len(rows)} boxes: {target}')
    if failed:
        raise ValueError(f'{len(failed)} of {len(options.images)} photos could not be read')


def _bytes(n: float) -> str:
    for unit in ('B', 'kB', 'MB'):
        if n < 999.5:
            return f'{n:.3g} {unit}'
        n /= 1000
    return f'{n:,.2f} GB'


def _seconds(s: float) -> str:
    return f'{s * 1e3:.3g} ms' if s < 1 else f'{s:.3g} s'


def _print_tables(tables: dict[str, list[Row]]) -> None:
    """Prints tables; plain lines where nobody reads them from a terminal."""
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for rows in tables.values() for row in rows) for i in range(2)]
        for title, rows in tables.items():
            print(title)
            for what, value, note in rows:
                print(f'  {what.ljust(widths[0])}  {value.ljust(widths[1])}  {note}'.rstrip())
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for title, rows in tables.items():
        table = Table(title=title, show_header=False, title_justify='left')
        table.add_column()
        table.add_column(style='bold')
        table.add_column(style='dim')
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


if __name__ == '__main__':
    sys.exit(main())
