"""What the command lines share: overrides of a config, and errors in one line with a status."""

import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from attention_jax.config import KEYS, flatten, load_config, suggest

# Under these, arguments of whatever mechanism or network is chosen, any key may be given.
_OPEN = tuple(f'config.{name}.' for name, key in KEYS.items() if key.default == {})


def run(command: Callable[[], Any]) -> int:
    """Calls `command` and returns the exit status.

    A ValueError raised by this repository is about what the user gave: one line and 2. One raised
    inside a library is a bug, and keeps its traceback. A file that the system refuses to read or
    write gives one line and 2. A run whose numbers are not finite gives one
    line and 1, an interrupted one 130.
    """
    try:
        command()
    except flags.Error as error:
        return _fail(error, 2)
    except ValueError as error:
        raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.resolve().is_relative_to(pathlib.Path(__file__).resolve().parents[2]):
            raise
        return _fail(error, 2)
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f'{error.filename}: {error.strerror}', 2)
    except FloatingPointError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    return 0


def parse(
    argv: Sequence[str], options: Callable[[flags.FlagValues], None]
) -> tuple[flags.FlagValues, str]:
    """Returns the parsed options, and the name of the config file without its ending.

    The option `config` is the config with its overrides, locked.

    Args:
        argv: the program's name, and what was given to it.
        options: defines the options beside `config`.

    Raises:
        ValueError: an unknown config file or key, or an argument too many.
        flags.Error: an unknown option, or a value of another type.
    """
    first = flags.FlagValues()
    flags.DEFINE_string('config', None, 'config file', flag_values=first)
    rest = first(argv, known_only=True)
    if not first.config:
        raise ValueError('--config is missing: give it a file of configs/')
    config = load_config(first.config)
    names = flatten(config, 'config.')
    groups = {key.rpartition('.')[0] for key in names}
    known = {key: f'--{key}' for key in (*names, *groups)}
    for argument in rest:
        match = re.match(r'--?(?:no)?(config\.[^=]*)', argument)
        if match and match[1] not in known and not match[1].startswith(_OPEN):
            raise ValueError(f'--{match[1]}: there is no such key{suggest(match[1], known)}')

    values = flags.FlagValues()
    options(values)
    config_flags.DEFINE_config_dict(
        'config',
        config,
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=rest,
    )
    unexpected = values(rest)[1:]
    if unexpected:
        raise ValueError(f'unexpected argument {unexpected[0]!r}: options start with --')
    config.lock()
    return values, pathlib.Path(first.config.partition(':')[0]).stem


def _fail(error: Exception | str, status: int) -> int:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
    return status
