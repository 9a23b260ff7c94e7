"""Settings of every test run: caches inside the checkout, no network, GPU tests only where a GPU is."""

from collections.abc import Iterator
import os
from pathlib import Path
import re

from hypothesis import settings
import pytest
from typechecker import wrap_only_what_is_checked

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"

# Before jax is imported. Compiled programs are shared by the processes of a run, and by later runs.
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # for tests/sharding; make test gives all else one
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads of each only get into each other's way
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()

wrap_only_what_is_checked()  # before any module of the packages is imported
settings.register_profile("slora-jax", deadline=None)  # a first call compiles
settings.load_profile("slora-jax")


_SLOWEST = (  # these files come first
    "test_golden.py",
    "test_structured.py",
    "test_serving.py",
    "test_engine.py",
    "test_forward.py",
    "test_processes.py",
    "test_lora_sm90.py",
    "test_lora_matmul_sm90.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*_SLOWEST, item.path.name).index(item.path.name))  # for several processes
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import jax

    if jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Where make test gives tests one device, none may be skipped for want of others: it belongs to the other ones."""
    report = yield
    if report.skipped and call.excinfo is not None and os.environ["JAX_NUM_CPU_DEVICES"] == "1":
        if re.search(r"needs \d+ devices", str(call.excinfo.value)):
            report.outcome, report.longrepr = "failed", f"{item.nodeid}: name its file in SEVERAL_THREADS of Makefile"
    return report


_QUICK = pytest.StashKey[bool]()


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles for the CPU without LLVM's optimisations, which take longer than the steps of tiny models do: the same
    program of XLA's operations, in machine code that is less good. Also in processes that tests start. Files with a
    test of a real model, and GPUs, get everything.
    """
    import jax

    real = any(i.path == request.path and "smollm2_gguf" in i.fixturenames for i in request.session.items)
    quick = not real and jax.default_backend() == "cpu"
    stash = request.config.stash
    if stash.setdefault(_QUICK, quick) != quick:  # jit keeps programs by their arguments, not by this option
        jax.clear_caches()
        stash[_QUICK] = quick
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick)))
        jax.config.update("jax_disable_most_optimizations", quick)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    from interpreter import leave_arguments_of_callbacks  # imports jax

    leave_arguments_of_callbacks()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct; the test is skipped where it was not fetched."""
    named = os.environ.get("SLORA_SMOLLM2_GGUF")
    path = Path(named) if named else ROOT / "examples" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("SmolLM2 GGUF not found: run make model, or set SLORA_SMOLLM2_GGUF")
    return path
