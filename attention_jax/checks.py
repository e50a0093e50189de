"""Checks of arguments: one message, with what was given and what is allowed."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import jax


def choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        listing = ', '.join(repr(a) for a in allowed)
        raise ValueError(f'{name} {value!r} is unknown: use one of {listing}')


def at_least(name: str, value: int | float | None, minimum: int | float) -> None:
    """Raises a ValueError unless `value >= minimum`; None is an argument that was not given."""
    if value is not None and not value >= minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')


def odd(name: str, value: int) -> None:
    """Raises a ValueError unless `value` is an odd positive integer."""
    if value < 1 or value % 2 == 0:
        raise ValueError(f'{name} must be odd and positive, got {value}')


def divides(name: str, value: int, what: str, total: int) -> None:
    """Raises a ValueError unless `value` is positive and divides `total`."""
    if value < 1 or total % value:
        raise ValueError(f'{name} {value} must be positive and divide {what} {total}')


def rate(name: str, value: float) -> None:
    """Raises a ValueError unless `0 <= value < 1`."""
    if not 0 <= value < 1:
        raise ValueError(f'{name} must be at least 0 and below 1, got {value}')


def covers_stride(x: jax.Array, stride: int) -> None:
    """Raises a ValueError if x `[..., h, w, c]` is smaller than a network's `stride`."""
    h, w = x.shape[-3:-1]
    if min(h, w) < stride:
        raise ValueError(f'x has {h} x {w} pixels, the network needs at least {stride} x {stride}')


def feature_map(x: jax.Array, spatial_dims: int = 2, name: str = 'x') -> None:
    """Raises a ValueError unless `x` is a floating map `[..., *spatial, c]` with no empty axis."""
    axes = {1: 'l', 2: 'h, w', 3: 't, h, w'}[spatial_dims]
    if x.ndim < spatial_dims + 1:
        raise ValueError(f'{name} must be [..., {axes}, c], got an array of shape {x.shape}')
    if 0 in x.shape[-spatial_dims - 1 :]:
        raise ValueError(f'{name} must have no empty axis among [{axes}, c], got shape {x.shape}')
    if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
        raise ValueError(
            f'{name} must be of a floating type, got {x.dtype}: divide or cast it first'
        )


def pool_fits(x: jax.Array, pool_size: int, spatial_dims: int = 2) -> None:
    """Raises a ValueError unless a pool of `pool_size` leaves something of the map's sides.

    Time, the first of three axes, is never pooled.
    """
    at_least('pool_size', pool_size, 1)
    side = min(x.shape[-1 - min(spatial_dims, 2) : -1])
    if side < pool_size:
        raise ValueError(
            f'pool_size {pool_size} leaves nothing of x of shape {x.shape}: use at most {side}'
        )


def arguments(what: str, given: Collection[str], allowed: Collection[str]) -> None:
    """Raises a ValueError for an argument that `what` does not take."""
    for argument in given:
        if argument not in allowed:
            close = difflib.get_close_matches(argument, allowed, n=1)
            hint = f', did you mean {close[0]}?' if close else ':'
            raise ValueError(
                f'{what} has no argument {argument!r}{hint} it takes {", ".join(allowed)}'
            )


def registered(kind: str, name: str, entries: Mapping[str, Any], listing: str) -> Any:
    """Returns the entry `name`; a ValueError has the names like it, and what lists all names."""
    if name in entries:
        return entries[name]
    close = difflib.get_close_matches(str(name).lower(), entries, n=3)
    hint = f'did you mean {" or ".join(close)}?' if close else 'there is none like it.'
    raise ValueError(f'{kind} {name!r} is not registered: {hint} {listing} has all names')
