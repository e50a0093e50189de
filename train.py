"""Trains or evaluates a network.

    python train.py --config FILE[:DATASET] [--workdir DIR] [--eval_only] [--config.KEY=VALUE ...]

  --config FILE[:DATASET]  a file of configs/; DATASET is digits (default), cifar10, imagenet2012,
                           or what the file's first lines name
  --config.KEY=VALUE       another value for a key, --config.train.epochs=3; attention_jax/config.py
                           has all keys
  --workdir DIR            checkpoints and results, default runs/CONFIG-DATASET; the run goes on
                           from the latest checkpoint in it
  --eval_only              evaluate the latest checkpoint on the test split

Exit status: 0 done, 2 what was given is wrong, 1 anything else, 130 interrupted.
"""

import re
import sys

from absl import flags


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns its exit status."""
    if {'-h', '-help', '--help'} & set(argv):
        print(__doc__)
        return 0

    from attention_jax.cli import command_line

    return command_line.run(lambda: train_or_evaluate(argv))


def train_or_evaluate(argv: list[str]) -> None:
    """Parses `argv` and does what it says."""
    from attention_jax.cli import command_line

    values, name = command_line.parse(argv, define_options)
    dataset = re.sub(r'\W+', '_', values.config.data.name)
    workdir = values.workdir or f'runs/{name}-{dataset}'

    from attention_jax import training  # takes seconds: only once the command line is right

    if values.eval_only:
        training.evaluate(values.config, workdir)
    else:
        training.train(values.config, workdir)


def define_options(values: flags.FlagValues) -> None:
    """Defines the options beside --config."""
    flags.DEFINE_string('workdir', None, 'work directory', flag_values=values)
    flags.DEFINE_bool('eval_only', False, 'evaluate only', flag_values=values)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
