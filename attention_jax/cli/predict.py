"""`attention-jax predict`: boxes on photos."""

import argparse
import pathlib
import sys
from typing import Any

from attention_jax import files


def add(commands: Any) -> None:
    """Adds the subcommand to `commands`, of argparse."""
    parser = commands.add_parser(
        'predict',
        help='boxes on photos, by a network that was trained to detect',
        description='Writes DIR/NAME.png, the photo with boxes, names and scores, and '
        'DIR/NAME.json, the same as numbers: (x1, y1, x2, y2) in pixels of the photo, upright as '
        'its camera says.',
    )
    parser.set_defaults(run=_run)
    parser.add_argument('workdir', metavar='WORKDIR', type=pathlib.Path, help='of a training run')
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=pathlib.Path, help='photos')
    parser.add_argument('--output', metavar='DIR', required=True, type=pathlib.Path)
    parser.add_argument(
        '--score-threshold', type=float, default=0.5, metavar='S', help='%(default)s'
    )
    parser.add_argument('--iou-threshold', type=float, default=0.3, metavar='I', help='%(default)s')


def _run(options: argparse.Namespace) -> None:
    for name in ('score_threshold', 'iou_threshold'):
        if not 0 <= getattr(options, name) <= 1:
            option = f'--{name.replace("_", "-")}'
            raise ValueError(f'{option} must be in 0 to 1, got {getattr(options, name)}')
    output = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f'--output {output} is a file: give a folder')
    beside = [image for image in options.images if image.parent.resolve() == output.resolve()]
    if beside:
        raise ValueError(
            f'--output {output} is the folder of photo {beside[0]}, which could be overwritten: '
            'give another'
        )
    stems = [image.stem for image in options.images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(f'two photos are called {twice[0]!r}: predict them into different folders')

    from PIL import Image

    from attention_jax.tasks.detection import annotations, prediction
    from attention_jax.training.checkpoints import load
    from attention_jax.training.workdir import read_config

    config = read_config(options.workdir)
    if config.task != 'detection':
        raise ValueError(f'workdir {options.workdir} holds a run of {config.task}, not detection')
    missing = [image for image in options.images if not image.is_file()]
    if missing:
        what = 'a folder: give the photos in it' if missing[0].is_dir() else 'not there'
        raise ValueError(f'photo {missing[0]} is {what}')
    model, variables, config = load(options.workdir)
    names = config.dataset.class_names
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    for path in options.images:
        try:
            photo = prediction.upright(Image.open(path))
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
        target = output / f'{path.stem}.png'
        prediction.draw(photo, found, names).save(target)
        report = {'image': str(path), 'width': photo.width, 'height': photo.height, 'boxes': rows}
        files.write_json(target.with_suffix('.json'), report)
        print(f'{path}: {len(rows)} boxes above {options.score_threshold:g}: {target}')
    if failed:
        raise ValueError(f'{len(failed)} of {len(options.images)} photos could not be read')
