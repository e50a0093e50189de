"""What a config asks of a data set: a split of it, and how its pictures are to be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

CACHE_LIMIT = 2**30  # bytes of pixels that are held decoded unless data.cache says otherwise


def split_ranges(name: str, split: str, splits: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Resolves a split string to (split, first, last + 1), or a ValueError that lists the splits.

    TFDS's reading of slices, for `digits` too, so that 'train[:90%]' means the same everywhere.
    """
    there = ', '.join(f'{key} ({count:,} examples)' for key, count in splits.items())
    if not isinstance(split, str):
        raise ValueError(f'data.split {split!r} must be a string; {name!r} has {there}')
    if split in splits:
        ranges = [(split, 0, splits[split])]
    else:
        parts = [part.split('[')[0].strip() for part in split.split('+')]
        unknown = [part for part in parts if part not in splits and part != 'all']
        if unknown:
            raise ValueError(
                f'data.split {split!r}: {name!r} has no {unknown[0]!r}; it has {there}: choose '
                'by data.split and data.test_split'
            )
        import tensorflow_datasets as tfds  # only for slices: digits alone does not need it

        infos = {
            key: tfds.core.SplitInfo(name=key, shard_lengths=[count], num_bytes=0)
            for key, count in splits.items()
        }
        try:
            absolute = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        except (ValueError, AssertionError, NotImplementedError):
            raise ValueError(
                f"data.split {split!r} cannot be read; write 'train', 'train[:90%]', "
                f"'train[100:200]' or a sum of such; {name!r} has {there}"
            ) from None
        ranges = [
            (x.splitname, x.from_ or 0, splits[x.splitname] if x.to is None else x.to)
            for x in absolute
        ]
    if sum(max(0, high - low) for _, low, high in ranges) == 0:
        raise ValueError(f'data.split {split!r} has no examples; {name!r} has {there}')
    return ranges


def image_size(
    data_config: Any, default: tuple[int, int] | None, what: str
) -> tuple[int, int] | None:
    """`image_size` as (h, w), `default` where it is None, or a ValueError; `what` names that."""
    size = getattr(data_config, 'image_size', None)
    if size is None:
        return default
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or min(sides) < 1:
        raise ValueError(
            f'data.image_size {size!r} must be a positive whole number of pixels, or two of them '
            f'(height, width), or None for {what}'
        )
    return sides


def augmentation(data_config: Any, allowed: Collection[str], auto: str) -> str:
    """`augment`, `auto` where it is None or 'auto', or a ValueError unless it is allowed."""
    augment = getattr(data_config, 'augment', None)
    if augment is None or augment == 'auto':
        return auto
    if augment not in allowed:
        raise ValueError(f'data.augment {augment!r} must be one of {", ".join(allowed)}, or auto')
    return augment


def cache(data_config: Any) -> bool | None:
    """`cache` as True, False or None, or a ValueError."""
    value = getattr(data_config, 'cache', None)
    if value is None or value == 'auto':
        return None
    if not isinstance(value, bool):
        raise ValueError(f'data.cache {value!r} must be True, False or auto')
    return value
