"""The command `attention-jax`.

    attention-jax table --write README.md
    attention-jax table networks --write docs/networks.md
    attention-jax benchmark se gc --shape 8x56x56x64
    attention-jax inspect MODEL_OR_CONFIG --device v5e:2x4
    attention-jax convert timm/seresnet50.a1_in1k seresnet50.safetensors
    attention-jax anchors voc:VOCdevkit/VOC2007 --split trainval
    attention-jax predict runs/yolov4_tiny-digit_scenes photo.jpg --output boxes

Exit status: 0 done, 2 what was given is wrong, 1 anything else, 130 interrupted.

A subcommand is a module here whose `add` declares its options and the function that runs it. What
only a subcommand needs and takes time to import is imported when the command line is right.
"""

import argparse
from collections.abc import Sequence

from attention_jax.cli import anchors, benchmark, command_line, convert, inspection, predict, table


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, as the rest of the package has it."""

    def error(self, message: str) -> None:
        self.exit(2, f'error: {message}; {self.prog} --help says more\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (None: the process's) and returns its exit status."""
    parser = _Parser(prog='attention-jax', description='Visual attention in JAX: tools.')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for subcommand in (table, benchmark, inspection, convert, anchors, predict):
        subcommand.add(commands)
    try:
        options = parser.parse_args(argv)
    except SystemExit as end:  # help, or an error that is printed
        return end.code
    return command_line.run(lambda: options.run(options))
