"""Makes the PEFT fixtures of tests/data/peft; see README.md beside this file. Needs torch, transformers and peft."""

import argparse
from collections.abc import Callable
import copy
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any
import warnings
import zlib

import numpy as np
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

LAYERS = 3
MODULES = ("q", "k", "v", "o", "gate", "up", "down")
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One adapter: fields of LoraConfig, and the dtype of its file."""

    name: str
    architecture: str
    fields: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16


_ALL = [f"{module}_proj" for module in MODULES]
_NAMES = [f"model.layers.0.self_attn.{module}_proj" for module in "qkvo"]
CASES = [
    Case("list", "llama", {"r": 8, "lora_alpha": 16, "target_modules": _ALL}, torch.float32),
    Case(
        "regex",
        "llama",
        {"r": 3, "lora_alpha": 5, "target_modules": r".*\.(0|2)\.self_attn\.(q|v)_proj"},
        torch.float32,
    ),
    Case("all_linear", "llama", {"r": 1, "lora_alpha": 1, "target_modules": "all-linear"}, torch.float16),
    Case("default_targets", "llama", {"r": 2, "lora_alpha": 4.5}, torch.float32),
    Case("layers_int", "llama", {"r": 12, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1}),
    Case("only_q", "llama", {"r": 1, "target_modules": ["q_proj"]}),
    Case("only_k", "llama", {"r": 5, "target_modules": ["self_attn.k_proj"], "lora_dropout": 0.5}),
    Case(
        "rank_over_width",
        "llama",
        {"r": 72, "lora_alpha": 9, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [2]},
    ),
    Case(
        "all_linear_upper_case",
        "mistral",
        {"r": 4, "target_modules": "All-Linear", "exclude_modules": ["k_proj", "1.mlp.up_proj"]},
    ),
    Case(
        "exclude_regex",
        "mistral",
        {"r": 6, "target_modules": _ALL[:4], "exclude_modules": r".*\.1\..*(q|o)_proj"},
        torch.float16,
    ),
    Case(
        "layers_pattern",
        "mistral",
        {"r": 8, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ),
    Case("fan_in_fan_out", "mistral", {"r": 4, "target_modules": ["o_proj", "v_proj"], "fan_in_fan_out": True}),
    Case("only_v", "mistral", {"r": 7, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"}),
    Case("only_o", "mistral", {"r": 16, "target_modules": ["o_proj"], "init_lora_weights": "orthogonal"}),
    Case(
        "full_names_with_layers",
        "mistral",
        {"r": 3, "target_modules": [*_NAMES, "down_proj"], "layers_to_transform": [1]},
        torch.float32,
    ),
    Case(
        "rank_pattern",
        "qwen2",
        {
            "r": 8,
            "lora_alpha": 24,
            "target_modules": _ALL,
            "rank_pattern": {
                "layers.1.self_attn.q_proj": 16,
                "k_proj": 3,
                "^model.layers.2.mlp.down_proj": 5,
                ".*gate_proj": 1,
                "layers.0.self_attn.k_proj": 40,
                "_proj": 2,
            },
        },
    ),
    Case(
        "alpha_pattern",
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": _ALL,
            "alpha_pattern": {r"layers\.[12]\.mlp\.\w+": 2, "self_attn.v_proj": 0.5, "o_proj": 32},
        },
        torch.float16,
    ),
    Case(
        "rslora",
        "qwen2",
        {"r": 16, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj"], "use_rslora": True},
    ),
    Case(
        "layers_pattern_list",
        "qwen2",
        {"r": 8, "target_modules": ["k_proj"], "layers_to_transform": [1, 7], "layers_pattern": ["h", "layers"]},
    ),
    Case("only_gate", "qwen2", {"r": 9, "target_modules": ["gate_proj"]}),
    Case("only_up", "qwen2", {"r": 10, "target_modules": r"model\.layers\.\d+\.mlp\.up_proj"}),
    Case(
        "rslora_patterns",
        "qwen3",
        {
            "r": 8,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": "all-linear",
            "exclude_modules": r"model\.layers\.0\.mlp\..*",
            "rank_pattern": {"q_proj": 12, "down_proj": 1},
            "alpha_pattern": {"q_proj": 3, "layers.2.*": 10},
        },
    ),
    Case("float32", "qwen3", {"r": 4, "target_modules": ["q_proj", "o_proj"], "use_rslora": True}, torch.float32),
    Case("layer_list", "qwen3", {"r": 12, "target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [2, 0]}),
    Case(
        "only_down",
        "qwen3",
        {"r": 24, "lora_alpha": 3, "target_modules": ["mlp.down_proj"], "init_lora_weights": False},
    ),
    Case(
        "mica", "qwen3", {"r": 8, "target_modules": ["k_proj", "up_proj"], "init_lora_weights": "mica"}, torch.float16
    ),
]


def probe(width: int) -> np.ndarray:
    """The two fixed vectors by which a delta [out, width] is multiplied: float32 [width, 2]."""
    index = np.arange(width, dtype=np.float64)
    return np.stack([np.cos(index), np.sin(0.7 * index + 1)], axis=1).astype(np.float32)


def make_base(architecture: str, directory: Path) -> None:
    """Writes a base model with random bfloat16 weights large enough that every part of it shows in the logits."""
    torch.manual_seed(zlib.crc32(architecture.encode()))
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[architecture]), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                value = 1 + 0.2 * torch.randn(parameter.shape)
            elif name.endswith("bias"):
                value = 0.3 * torch.randn(parameter.shape)
            else:
                value = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
            parameter.copy_(value)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)


def make_adapter(case: Case, base: Path, directory: Path) -> None:
    """Writes an adapter with random weights; its configuration as given, before PEFT rewrites target_modules."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    config = LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=f"tiny-{case.architecture}", inference_mode=True, **case.fields
    )
    config.save_pretrained(str(directory))
    file = directory / "adapter_config.json"
    fields = json.loads(file.read_text())
    # PEFT keeps names in a set, whose order changes from run to run.
    fields |= {
        name: sorted(value) for name, value in fields.items() if name.endswith("_modules") and type(value) is list
    }
    file.write_text(json.dumps(fields, indent=2) + "\n")
    model = get_peft_model(_load(base), copy.deepcopy(config))
    tensors = {}
    for name, tensor in get_peft_model_state_dict(model).items():
        tensors[name] = (0.6 * torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5).to(case.dtype).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def reference(base: Path, adapter: Path | None, prompt: np.ndarray) -> dict[str, np.ndarray]:
    """What PEFT computes from the files, in float32: see the table in README.md. Of the base model only the logits."""
    model = _load(base)
    result = {}
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
        result = _deltas(model)
    model.eval()
    with torch.no_grad():
        result["logits"] = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0].numpy()
    return result


def _deltas(model: PeftModel) -> dict[str, np.ndarray]:
    found: dict[tuple[int, int], LoraLayer] = {}
    widths = [0] * len(MODULES)
    for name, layer in model.named_modules():
        parts = name.split(".")
        if parts[-1].removesuffix("_proj") in MODULES and "layers" in parts:
            module = MODULES.index(parts[-1].removesuffix("_proj"))
            widths[module] = layer.out_features
            if isinstance(layer, LoraLayer):
                found[int(parts[parts.index("layers") + 1]), module] = layer
    starts = np.cumsum([0, *widths])
    ranks = np.zeros((LAYERS, len(MODULES)), np.int32)
    scaling = np.zeros((LAYERS, len(MODULES)), np.float32)
    probes = np.zeros((LAYERS, starts[-1], 2), np.float32)
    for (layer, module), lora in found.items():
        ranks[layer, module] = lora.r["default"]
        scaling[layer, module] = lora.scaling["default"]
        delta = lora.get_delta_weight("default").detach().numpy()
        probes[layer, starts[module] : starts[module + 1]] = delta @ probe(delta.shape[1])
    return {"ranks": ranks, "scaling": scaling, "probes": probes}


def write_fixtures(directory: Path) -> None:
    """Writes all fixtures below `directory`, replacing what is there."""
    shutil.rmtree(directory, ignore_errors=True)
    for number, architecture in enumerate(ARCHITECTURES):
        base = directory / architecture
        make_base(architecture, base)
        prompt = ((np.arange(9) * 23 + 7 * number + 3) % _SIZES["vocab_size"]).astype(np.int32)
        np.savez_compressed(base / "expected.npz", prompt=prompt, **reference(base, None, prompt))
        for case in CASES:
            if case.architecture == architecture:
                make_adapter(case, base, base / case.name)
                np.savez_compressed(base / case.name / "expected.npz", **reference(base, base / case.name, prompt))


def compare_live(
    logits_of: Callable[[Path, Path | None, np.ndarray], np.ndarray], directory: Path, tolerance: float = 1e-4
) -> dict[str, float]:
    """Compares a model with the PEFT that is installed, over all architectures and cases.

    logits_of: from base directory, adapter directory (None: base model) and prompt int32 [T] to float32 logits [T, V].
    directory: an empty one for the files. Returns the largest difference of each case; raises AssertionError over
    `tolerance`.
    """
    write_fixtures(directory)
    differences = {}
    for architecture in ARCHITECTURES:
        base = directory / architecture
        prompt = np.load(base / "expected.npz")["prompt"]
        names = [case.name for case in CASES if case.architecture == architecture]
        for path in [base, *(base / name for name in names)]:
            expected = np.load(path / "expected.npz")["logits"]
            actual = np.asarray(logits_of(base, None if path == base else path, prompt), np.float32)
            differences[str(path.relative_to(directory))] = float(np.abs(actual - expected).max())
    wrong = {name: difference for name, difference in differences.items() if not difference <= tolerance}
    assert not wrong, f"logits differ from PEFT's by more than {tolerance}: {wrong}"
    return differences


def _load(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to write, for instance tests/data/peft")
    # PEFT warns about fields that it ignores, which is what some cases are for.
    warnings.simplefilter("ignore")
    write_fixtures(parser.parse_args().directory)
