"""Finds a TFDS data set that is prepared on this machine, or says in one line what to do.

Nothing here needs TensorFlow, downloads or builds.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import shlex
from collections.abc import Iterator
from typing import Any

_BLOCK = 512  # records read at a time


def open_builder(name: str, data_dir: str | None, embedded: str) -> Any:
    """The TFDS builder of data that is there, or a ValueError that says what to do.

    Args:
        name: as TFDS has it.
        data_dir: where it looks, or None for its default.
        embedded: the name that is known beside TFDS's, for messages.
    """
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = os.path.expanduser(os.fspath(data_dir))
        if not os.path.isdir(data_dir):
            raise ValueError(
                f'data.data_dir {data_dir!r} is not a directory; {_how_to_prepare(name, data_dir)}'
            )
    try:
        with quiet():
            builder = tfds.builder(name, data_dir=data_dir)
    except ImportError:  # its builder needs more than reading does, so it was not prepared here
        raise ValueError(_not_prepared(name, data_dir)) from None
    except tfds.core.DatasetNotFoundError:
        close = ' or '.join(map(repr, _similar(base_name(name), embedded)))
        hint = f'did you mean {close}?' if close else 'none is similar'
        raise ValueError(
            f'data.name {name!r} is neither {embedded!r} nor a TFDS data set; {hint} '
            '(https://www.tensorflow.org/datasets/catalog lists them)'
        ) from None
    except (ValueError, AssertionError, RuntimeError) as error:  # a config or version not there
        reason = 'TFDS says: ' + str(error).strip().splitlines()[0].strip()
        if '/' in name:
            with contextlib.suppress(ValueError):  # not even the form of a name
                configs = ', '.join(tfds.builder_cls(base_name(name)).builder_configs) or 'none'
                reason = f'the configurations of {base_name(name)!r} are: {configs}'
        raise ValueError(f'data.name {name!r} cannot be opened; {reason}') from error
    if not builder.info.splits:
        raise ValueError(_not_prepared(name, _data_dir(builder, name), builder))
    file_format = builder.info.file_format.value
    if file_format != 'array_record':
        raise ValueError(
            f'{name!r} in {os.fspath(builder.data_path)!r} is stored as {file_format}, which has '
            f'no random access without TensorFlow; '
            f'{_how_to_prepare(name, _data_dir(builder, name), " --overwrite")}'
        )
    return builder


def _similar(name: str, embedded: str) -> list[str]:
    """Names that may have been meant: spelt alike, or beginning with what was given."""
    import tensorflow_datasets as tfds

    known = [embedded, *tfds.list_builders(with_community_datasets=False)]
    name = name.lower()
    close = difflib.get_close_matches(name, known, n=3)
    longer = [other for other in known if other.startswith(name) and other not in close]
    return close + longer[:3]


def base_name(name: str) -> str:
    """The name without config and version: 'emnist' of 'emnist/letters:3.1.0'."""
    return name.split('/')[0].split(':')[0]


def _data_dir(builder: Any, name: str) -> str:
    """The `data_dir` in which the builder looks: above name, configuration and version."""
    path = os.fspath(builder.data_path)
    base = base_name(name)
    while os.path.basename(path) != base and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return os.path.dirname(path)


def _not_prepared(name: str, data_dir: str | None, builder: Any = None) -> str:
    where = f'data.data_dir {data_dir!r}' if data_dir else "TFDS's default directory"
    manual = ''
    if getattr(builder, 'MANUAL_DOWNLOAD_INSTRUCTIONS', None):
        manual = (
            'put the files that https://www.tensorflow.org/datasets/catalog/'
            f'{base_name(name)} names into downloads/manual there, then '
        )
    return f'{name!r} is not prepared in {where}; {manual}{_how_to_prepare(name, data_dir)}'


def _how_to_prepare(name: str, data_dir: str | None, extra: str = '') -> str:
    where = f' --data_dir={shlex.quote(data_dir)}' if data_dir else ''
    return (
        "prepare it once: pip install 'attention_jax[prepare]' && "
        f'tfds build {shlex.quote(name)}{where} --file_format=array_record{extra}'
    )


def records(builder: Any, split: str) -> Any:
    """The records of a split by position, their pictures as encoded bytes."""
    import tensorflow_datasets as tfds

    # Pillow decodes them the same way whether OpenCV is installed or not.
    encoded = isinstance(builder.info.features['image'], tfds.features.Image)
    decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
    with quiet():
        return builder.as_data_source(split=split, decoders=decoders)


def read_all(records: Any) -> Iterator[Any]:
    """All records in order, by blocks: one by one, reading costs more than decoding."""
    for start in range(0, len(records), _BLOCK):
        stop = min(start + _BLOCK, len(records))
        yield from records.__getitems__(list(range(start, stop)))


def feature_names(features: Any) -> list[str]:
    """The keys of a dict of features; of what has none, a tuple or a single feature, its type."""
    return list(features.keys()) if hasattr(features, 'keys') else [type(features).__name__]


def check_label(name: str, what: str, label: Any, task: str) -> None:
    """Raises a ValueError unless `what`, the feature `label`, is a class that `task` can learn."""
    import tensorflow_datasets as tfds

    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise ValueError(
            f'data.name {name!r}: {what} is a {type(label).__name__}, and {task} needs a ClassLabel'
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back TFDS's warnings (OpenCV, folders without data): our errors say what matters."""
    from absl import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
