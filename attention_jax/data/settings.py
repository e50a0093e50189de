"""What a config asks of a data set: a split, and whether its pictures are held in memory."""

from __future__ import annotations

from collections.abc import Mapping
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


def cache_setting(data_config: Any) -> bool | None:
    """`cache` as True, False or None, or a ValueError."""
    cache = getattr(data_config, 'cache', None)
    if cache is None or cache == 'auto':
        return None
    if not isinstance(cache, bool):
        raise ValueError(f'data.cache {cache!r} must be True, False or auto')
    return cache
