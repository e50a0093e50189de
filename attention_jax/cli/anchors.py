"""`attention-jax anchors`: sizes of boxes that stand for those of a data set."""

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    """Adds the subcommand to `commands`, of argparse."""
    parser = commands.add_parser(
        'anchors',
        help='sizes of boxes that stand for those of a data set',
        description='Groups the boxes of a data set by k-means with the distance 1 - IoU of their '
        'sizes, on pictures letterboxed to the input size, and prints the medians by rising area.',
    )
    parser.set_defaults(run=_run)
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


def _run(options: argparse.Namespace) -> None:
    from attention_jax.config import defaults
    from attention_jax.tasks.detection import anchors
    from attention_jax.tasks.detection.source import open_split

    config = defaults()
    config.data.name = options.dataset
    config.data.data_dir = options.data_dir
    config.data.image_size = options.size
    config.data.cache = False
    source = open_split(config, options.split, train=False)
    sizes = source.box_sizes()
    if not len(sizes):
        reasons = '; '.join(source.warnings()) or 'its pictures have none'
        raise ValueError(f'no box is left in {options.split!r} of {options.dataset!r}: {reasons}')
    found = anchors.kmeans(sizes, options.number, options.seed)
    best = anchors.overlap(sizes, found).max(-1)
    print(
        f'{len(sizes):,} boxes of {len(source):,} pictures; mean IoU with the best anchor '
        f'{best.mean():.4f}'
    )
    middle = len(found) // 2  # the larger half at stride 32, the smaller one at stride 16
    listed = tuple((round(w), round(h)) for w, h in found)
    masks = (tuple(range(middle, len(found))), tuple(range(middle or 1)))
    print(f'--config.detection.anchors="{listed}" --config.detection.masks="{masks}"')
    for line in source.warnings():
        print(line, file=sys.stderr)
