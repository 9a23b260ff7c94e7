"""Settings of every test run: caches inside the checkout, no network, GPU tests only where a GPU is."""

import os
from pathlib import Path

from hypothesis import settings
import pytest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"

# Before jax is imported. Compiled programs are shared by the processes of a run, and by later runs.
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # for tests/sharding; all else uses the first
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("slora-jax", deadline=None)  # a first call compiles
settings.load_profile("slora-jax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_golden.py")  # the slowest file first, for several processes
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import jax

    if jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct; the test is skipped where it was not fetched."""
    named = os.environ.get("SLORA_SMOLLM2_GGUF")
    path = Path(named) if named else ROOT / "examples" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("SmolLM2 GGUF not found: run make model, or set SLORA_SMOLLM2_GGUF")
    return path
