"""One strict JAX for all tests: eight CPU devices, no silent rank promotion."""

import ctypes
import gc
import os
import pathlib
import sys

# For the processes that tests start, too: no search for a TPU where libtpu is installed.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
# Most of the time of a test is compilation, and much of that is optimising code that runs once.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'

import jax
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# Compiled programs are kept between runs: most of the time of a test is compilation.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(REPOSITORY / '.pytest_cache' / 'xla'))
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
    """Drops compiled programs after each file: kept, they grow to 5 GB in a worker."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == 'linux':
        # Freed memory stays with the process until the allocator is told to give it back.
        getattr(ctypes.CDLL(None), 'malloc_trim', lambda pad: None)(0)


@pytest.fixture
def x64():
    """Turns 64-bit types on for one test."""
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', False)


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
    """The folder of large reference data beside the repository; skips where it is missing."""
    folder = REPOSITORY.parent / 'shared'
    if not folder.is_dir():
        pytest.skip(f'reference data not found: {folder}')
    return folder
