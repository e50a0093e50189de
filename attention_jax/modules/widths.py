"""Widths: of bottlenecks, and rounded to a multiple."""

from attention_jax import checks


def hidden_width(
    channels: int,
    *,
    reduction: int,
    hidden: int | None = None,
    divisor: int | None = None,
    minimum: int | None = None,
    guard: bool = False,
    prefix: str = '',
) -> int:
    """Width of a bottleneck: `hidden`, or `channels` divided by `reduction`.

    Args:
        channels: width to be reduced.
        reduction: divisor, rounded down (the papers' convention).
        hidden: the width itself; wins over everything else.
        divisor: rounds `channels / reduction` by `round_to_multiple` (timm).
        minimum: lower bound of the result.
        guard: of `round_to_multiple`.
        prefix: of the two arguments' names in messages, e.g. 'value_'.

    Raises:
        ValueError: a width below 1, or `reduction` below 1.
    """
    if hidden is not None:
        checks.at_least(f'{prefix}hidden', hidden, 1)
        return hidden
    checks.at_least(f'{prefix}reduction', reduction, 1)
    if divisor is None:
        width = max(channels // reduction, minimum or 0)
        if width < 1:
            raise ValueError(
                f'{prefix}reduction {reduction} leaves no width for {channels} channels: '
                f'use a reduction of at most {channels}, or give {prefix}hidden'
            )
        return width
    checks.at_least('hidden_divisor', divisor, 1)
    return round_to_multiple(channels / reduction, divisor, minimum=minimum, guard=guard)


def round_to_multiple(
    width: float, divisor: int, *, minimum: int | None = None, guard: bool = False
) -> int:
    """The multiple of `divisor` nearest to `width`, ties upwards; at least `minimum`, or one of it.

    With `guard` one step further up if rounding lost over 10 % (MobileNetV3, timm).
    """
    rounded = max(minimum or divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if guard and rounded < 0.9 * width else rounded
