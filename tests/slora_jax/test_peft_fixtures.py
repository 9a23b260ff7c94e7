"""What we make of a PEFT adapter's files against what PEFT makes of them (tests/peft_reference writes the fixtures)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from steps import prompt_logits

from pallas_kernels.geometry import MODULES
from slora_jax.adapters import Adapter, read_adapter
from slora_jax.loading import load_config, load_model
from slora_jax.model_config import ModelConfig

FIXTURES = Path(__file__).parents[1] / "data" / "peft"
CASES = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.glob("*/*/adapter_config.json"))


def probe(width: int) -> np.ndarray:
    """The vectors by which the script multiplied PEFT's deltas."""
    index = np.arange(width, dtype=np.float64)
    return np.stack([np.cos(index), np.sin(0.7 * index + 1)], axis=1).astype(np.float32)


def probed_deltas(adapter: Adapter, config: ModelConfig) -> np.ndarray:
    starts = np.cumsum([0, *config.out_sizes])
    result = np.zeros((config.num_layers, starts[-1], 2), np.float32)
    for layer, module in np.argwhere(adapter.ranks).tolist():
        a = adapter.a(layer, MODULES[module]).astype(np.float32)
        b = adapter.b(layer, MODULES[module]).astype(np.float32)
        delta = adapter.scaling[layer, module] * (b @ a)
        result[layer, starts[module] : starts[module + 1]] = delta @ probe(a.shape[1])
    return result


def test_all_fixtures_are_there():
    assert len(CASES) == 26


@pytest.mark.parametrize("case", CASES)
def test_adapter_computes_what_peft_computes(case):
    config = load_config((FIXTURES / case).parent)
    adapter = read_adapter(FIXTURES / case, config)
    expected = np.load(FIXTURES / case / "expected.npz")
    np.testing.assert_array_equal(adapter.ranks, expected["ranks"])
    np.testing.assert_array_equal(adapter.scaling, expected["scaling"])
    np.testing.assert_allclose(probed_deltas(adapter, config), expected["probes"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_logits_equal_pefts_in_one_mixed_batch(base):
    """The base model and all its adapters at once, through the step with its pages."""
    model = load_model(str(FIXTURES / base), dtype="float32")
    cases = [case for case in CASES if case.startswith(f"{base}/")]
    expected = [np.load(FIXTURES / path / "expected.npz")["logits"] for path in (base, *cases)]
    prompt = np.load(FIXTURES / base / "expected.npz")["prompt"].tolist()
    adapters = [None, *(read_adapter(FIXTURES / case, model.config) for case in cases)]
    got = prompt_logits(model.config, model.params, [(prompt, adapter) for adapter in adapters])
    for name, logits, want in zip((base, *cases), got, expected, strict=True):
        np.testing.assert_allclose(logits, want, atol=1e-4, err_msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")  # PEFT's
def test_logits_equal_those_of_the_peft_that_is_installed(tmp_path):
    """The same against a live PEFT, where torch and PEFT can be imported (this project does not install them)."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    script = FIXTURES.parents[1] / "peft_reference" / "make_fixtures.py"
    spec = importlib.util.spec_from_file_location("make_fixtures", script)
    make_fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_fixtures)

    def logits_of(base, adapter, prompt):
        model = load_model(str(base), dtype="float32")
        read = read_adapter(adapter, model.config) if adapter else None
        return prompt_logits(model.config, model.params, [(np.asarray(prompt).tolist(), read)], loop="scan")[0]

    make_fixtures.compare_live(logits_of, tmp_path)
