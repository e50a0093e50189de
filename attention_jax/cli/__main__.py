"""`python -m attention_jax.cli`, the command where its script is not installed."""

import sys

from attention_jax.cli import main

sys.exit(main())
