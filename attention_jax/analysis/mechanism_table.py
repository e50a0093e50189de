"""The README's table of mechanisms.

Everything in it but the passes is computed from the registry and the modules. The passes are read
from programs compiled for a TPU, which takes minutes and libtpu: they are measured on request, and
else kept as the README has them.
"""

import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.analysis import compiled, markdown
from attention_jax.models.costs import costs
from attention_jax.modules.registry import attention_entry, create_attention, list_attention

SHAPE = (1, 56, 56, 256)  # of what is counted, float32
PASSES_SHAPE = (128, 56, 56, 256)  # of what is compiled for a TPU, bfloat16
PLACE = 'mechanisms'  # of the table in its file
NOT_MEASURED = '- (not measured)'

_COLUMNS = {
    'name': '---',
    'paper': '---',
    'parameters': '---:',
    'MACs': '---:',
    'memory (MB)': '---:',
    'complexity': '---',
    'passes': '---',
    'file': '---',
}

_LEGEND = """\
Default arguments, or those beside the name. Parameters, multiply-accumulates and memory are of a
map [1, 56, 56, 256] in float32. Memory: temporaries of forward and gradient (by input and
parameters, evaluation mode), as XLA compiles them for a CPU; input, output, parameters and their
gradients come on top. Passes: bytes that the compiled program for one TPU v5e moves, over the bytes
of its input [128, 56, 56, 256] in bfloat16, forward and gradient in training mode; a copy makes 2;
\\* counts the body of a loop once. Complexity: N = H W positions, C channels, r `reduction`,
k `kernel_size`, g `groups`, d `hidden`, M units of memory or positions of the other map, R `radix`
or `recurrence`, s `pool_size`."""


def table(
    names: Sequence[str] | None = None,
    passes: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> str:
    """Writes the table of mechanisms in Markdown.

    Args:
        names: registry names; None is every mechanism.
        passes: name -> what stands in the column of passes, see `read_passes`.
        progress: is told each name before its row is computed.

    Returns:
        See `markdown.table`.

    Raises:
        ValueError: a name is not registered.
    """

    def rows() -> Iterator[list[str]]:
        for name in list_attention() if names is None else names:
            progress(name)
            *counted, complexity, file = row(name)
            memory = f'{peak_memory(name) / 1e6:.1f}'
            yield [*counted, memory, complexity, (passes or {}).get(name, NOT_MEASURED), file]

    return markdown.table(PLACE, _COLUMNS, rows(), _LEGEND)


def row(name: str) -> list[str]:
    """The cells that need no compiler: name, paper, parameters, MACs, complexity, file."""
    entry, module, arguments = attention_entry(name), *example(name, SHAPE)
    counts = costs(module, *[SHAPE] * entry.maps)
    given = ', '.join(f'{key}={value}' for key, value in arguments.items())
    title = f'[{entry.paper}](https://arxiv.org/abs/{entry.arxiv})' if entry.arxiv else entry.paper
    path = entry.cls.__module__.replace('.', '/') + '.py'
    return [
        f'`{name}` ({given})' if given else f'`{name}`',
        f'{title}, {entry.year}',
        f'{counts["parameters"]:,}',
        f'{counts["macs"] + counts["matmul"]:,}',
        entry.complexity.replace('^2', '²').replace('^3', '³').replace('^4', '⁴'),
        f'[{pathlib.PurePath(path).name}]({path})',
    ]


def peak_memory(name: str) -> int:
    """Bytes of temporaries of forward and gradient in evaluation, at `SHAPE`, as a CPU has them."""
    module, _ = example(name, SHAPE)
    xs = (jax.ShapeDtypeStruct(SHAPE, jnp.float32),) * attention_entry(name).maps
    rest = dict(jax.eval_shape(module.init, jax.random.key(0), *xs))
    params = rest.pop('params', {})
    out = jax.eval_shape(module.apply, {'params': params, **rest}, *xs)

    def forward_and_gradient(params: Any, rest: Any, xs: Any, cotangent: Any) -> Any:
        run = lambda params, xs: module.apply({'params': params, **rest}, *xs)  # noqa: E731
        out, pullback = jax.vjp(run, params, xs)
        return out, pullback(cotangent)

    program = jax.jit(forward_and_gradient).lower(params, rest, xs, out)
    return program.compile().memory_analysis().temp_size_in_bytes


def example(name: str, shape: Sequence[int]) -> tuple[nn.Module, dict[str, Any]]:
    """A mechanism for maps of a shape `[b, h, w, c]`, and its arguments beside the defaults."""
    arguments = dict(attention_entry(name).example(shape))
    return create_attention(name, **arguments), arguments


# Passes.


def measure_passes(name: str, timeout: float | None = None) -> str:
    """Compiles a mechanism for one TPU v5e, forward and gradient, and counts its passes.

    Args:
        name: registry name.
        timeout: seconds; None waits for ever.

    Returns:
        'forward, gradient', such as '3.0, 4.0', with a star where a loop's body is counted once; or
        a dash with the reason why there are none.

    Raises:
        ValueError: libtpu is not installed.
    """
    _, arguments = example(name, PASSES_SHAPE)
    job = {'name': name, 'shape': list(PASSES_SHAPE), 'arguments': arguments}
    job['inputs'] = attention_entry(name).maps
    try:
        reports = compiled.compile_modules([job, {**job, 'vjp': True}], timeout=timeout)
    except RuntimeError as error:
        found = re.findall(r'^\w*(?:Error|Exception): .*', str(error), re.MULTILINE)
        return f'- ({_reason(found[-1] if found else str(error))})'
    if failed := [report['error'] for report in reports if 'error' in report]:
        return f'- ({_reason(failed[0])})'
    return ', '.join(f'{r["passes"]:.1f}{"*" if r["loops"] else ""}' for r in reports)


def _reason(error: str) -> str:
    """An error in few words, with nothing that ends a cell."""
    text = ' '.join(error.replace('|', '/').split())
    return text if len(text) <= 80 else text[:77] + '...'


def read_passes(text: str) -> dict[str, str]:
    """The passes that the table in a Markdown text has: name -> cell, of what was measured."""
    column = list(_COLUMNS).index('passes')
    found = {name: cells[column] for name, cells in markdown.read_rows(PLACE, text).items()}
    return {name: cell for name, cell in found.items() if cell != NOT_MEASURED}


def choose(names: Collection[str] | None) -> list[str]:
    """Checks registry names; none given is every mechanism."""
    return [attention_entry(name).name for name in names or list_attention()]
