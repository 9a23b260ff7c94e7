"""``python -m slora_jax`` is the command ``slora-jax``."""

import sys

from slora_jax.cli import main

sys.exit(main())
