import json
from pathlib import Path
import re
from types import SimpleNamespace

from adapter_files import CONFIG, qv_fields
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from slora_jax.adapters import AdapterLimits
from slora_jax.adapters.peft_config import HONOURED, INFORMATIVE, REFUSED, decode_config, parse_config
from slora_jax.adapters.targets import HF_MODULES, projection_name, resolve
from slora_jax.errors import AdapterError

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"

# Fields of LoraConfig in PEFT 0.21.2, with those it inherits.
PEFT_FIELDS = """
alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version qalora_group_size r
rank_pattern revision runtime_config target_modules target_parameters task_type trainable_token_indices use_bdlora
use_dora use_qalora use_rslora velora_config
""".split()

REFUSALS = [
    ("peft_type", "LOHA", 'peft_type "LOHA" is not supported'),
    ("use_dora", True, "use_dora = true is not supported: DoRA rescales"),
    ("bias", "all", 'bias = "all" is not supported: the adapter changes biases'),
    ("bias", "lora_only", 'train with bias="none"'),
    ("bias", None, "bias = null"),
    ("lora_bias", True, "lora_bias = true is not supported: the adapter adds a bias"),
    ("modules_to_save", ["lm_head"], "the adapter replaces whole modules"),
    ("trainable_token_indices", [1, 2], "the adapter replaces rows of the embedding"),
    ("trainable_token_indices", {"embed_tokens": [1]}, "trainable_token_indices"),
    ("alora_invocation_tokens", [5, 6], "activated LoRA"),
    ("use_qalora", True, "QALoRA averages"),
    ("layer_replication", [[0, 2], [1, 3]], "repeated layers"),
    ("target_parameters", ["experts.down_proj"], "bare parameters"),
    ("megatron_config", {"a": 1}, "Megatron"),
    ("arrow_config", {}, "Arrow routes"),
    ("use_bdlora", {}, "block-diagonal"),
    ("kasa_config", {"x": 1}, "KaSA truncates the base weights"),
    ("velora_config", {}, "VeLoRA"),
    ("monteclora_config", {}, "MonteCLoRA"),
    ("init_lora_weights", "pissa", "changes the base weights; convert the adapter with PEFT's save_pretrained"),
    ("init_lora_weights", "pissa_niter_16", "changes the base weights"),
    ("init_lora_weights", "olora", "changes the base weights"),
    ("init_lora_weights", "OLoRA", "changes the base weights"),
    ("init_lora_weights", "corda", "changes the base weights"),
    ("init_lora_weights", "loftq", "changes the base weights"),
    ("init_lora_weights", "lora_ga", "changes the base weights"),
    ("init_lora_weights", "brand_new", "is not known"),
    ("init_lora_weights", 1, "is not known"),
    ("use_hypernetwork", True, 'unknown field "use_hypernetwork" = true may change what the adapter computes'),
    ("gate_scale", 0, 'unknown field "gate_scale" = 0'),
    ("r", 0, "r must be a whole number of at least 1"),
    ("r", 8.0, "r must be a whole number"),
    ("r", True, "r must be a whole number"),
    ("r", None, "r must be a whole number"),
    ("r", 513, "r = 513 is over the limit of 512; raise AdapterLimits.max_rank"),
    ("lora_alpha", "16", "lora_alpha must be a finite number"),
    ("lora_alpha", float("nan"), "lora_alpha must be a finite number"),
    ("lora_alpha", 1e39, "lora_alpha must be a finite number"),
    ("use_rslora", "yes", "use_rslora must be true or false"),
    ("fan_in_fan_out", 1, "fan_in_fan_out must be true or false"),
    ("target_modules", [], "target_modules is empty"),
    ("target_modules", [1], "target_modules must be a list of names or a string"),
    ("target_modules", ["w_pack"], "name no projection of this model of 3 layers"),
    ("target_modules", "q_proj", "name no projection"),  # a string must match the whole name
    ("target_modules", "(", "target_modules '(' is not a regular expression"),
    ("target_modules", ["q_proj", "embed_tokens"], "names model.embed_tokens, the embedding or output head"),
    ("target_modules", ["q_proj", "lm_head"], "names lm_head, the embedding or output head"),
    ("target_modules", ".*embed_tokens|.*q_proj", "model.embed_tokens"),
    ("target_modules", ["mlp"], "names model.layers.0.mlp, a module that is not a linear projection"),
    ("target_modules", ".*norm", "input_layernorm, a module that is not a linear projection"),
    ("exclude_modules", ["q_proj", "v_proj"], "name no projection"),
    ("exclude_modules", "*", "exclude_modules '*' is not a regular expression"),
    ("exclude_modules", 3, "exclude_modules must be a list of names or a string"),
    ("layers_to_transform", 3, "name no projection"),
    ("layers_to_transform", ["0"], "layers_to_transform must be a layer index or a list"),
    ("layers_to_transform", True, "layers_to_transform must be a layer index"),
    ("layers_pattern", "layers", "layers_pattern is set without layers_to_transform"),
    ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] must be a whole number"),
    ("rank_pattern", {"q_proj": 600}, "rank_pattern['q_proj'] = 600 is over the limit of 512"),
    ("rank_pattern", {"(": 4}, "rank_pattern '(' is not a regular expression"),
    ("rank_pattern", [["q_proj", 4]], "rank_pattern must be an object"),
    ("rank_pattern", {str(i): 1 for i in range(2049)}, "rank_pattern has 2049 entries, over the limit of 2048"),
    ("alpha_pattern", {"q_proj": "8"}, "alpha_pattern['q_proj'] must be a finite number"),
    ("alpha_pattern", {"[": 4}, "alpha_pattern '[' is not a regular expression"),
]

ACCEPTED = [
    *((field, off) for field in REFUSED for off in (None, False)),
    *((field, []) for field in ("modules_to_save", "target_parameters", "layer_replication", "layers_to_transform")),
    *(("init_lora_weights", kind) for kind in (True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica")),
    ("loftq_config", {"bits": 4}),
    ("eva_config", {"rho": 2.0}),
    ("lora_dropout", 0.1),
    ("ensure_weight_tying", True),
    ("runtime_config", {"ephemeral_gpu_offload": True}),
    ("fan_in_fan_out", True),
    ("lora_alpha", 0),
    ("rank_pattern", None),
    ("brand_new", None),
    ("brand_new", {}),
    ("brand_new", ""),
]


def resolved(fields, limits=None):
    return resolve(parse_config(fields, limits or AdapterLimits()), CONFIG)


def targeted(fields):
    ranks, _ = resolved(fields)
    return {projection_name(layer, module) for layer, module in np.argwhere(ranks).tolist()}


def test_every_field_of_peft_is_classified_once():
    assert len(PEFT_FIELDS) == 42
    assert HONOURED | INFORMATIVE | REFUSED.keys() == set(PEFT_FIELDS)
    assert len(HONOURED) + len(INFORMATIVE) + len(REFUSED) == len(PEFT_FIELDS)
    example = json.loads((EXAMPLES / "haiku" / "adapter_config.json").read_text())
    assert len(example) == 41
    assert example.keys() <= set(PEFT_FIELDS)


@pytest.mark.parametrize(("field", "value", "words"), REFUSALS, ids=lambda v: str(v)[:30])
def test_refused_by_name_with_reason_and_remedy(field, value, words):
    with pytest.raises(AdapterError, match=re.escape(words)) as error:
        resolved(qv_fields(**{field: value}))
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    assert ";" in message or "must be" in message  # what is wrong, then what to do


@pytest.mark.parametrize(("field", "value"), ACCEPTED, ids=str)
def test_accepted_where_it_changes_nothing(field, value):
    ranks, scaling = resolved(qv_fields(**{field: value}))
    assert ranks[:, [0, 2]].all() and ranks.sum() == 4 * 6
    assert np.all(scaling[ranks > 0] == (0 if field == "lora_alpha" else 2))


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layers_and_a_target_string_exclude_each_other(field):
    fields = qv_fields(target_modules="all-linear", layers_to_transform=None) | {
        field: [0] if field[-1] == "m" else "h"
    }
    with pytest.raises(AdapterError, match=f"{field} cannot be combined with a target_modules string"):
        resolved(fields)


def test_missing_fields_take_peft_defaults():
    ranks, scaling = resolved({"peft_type": "LORA"})
    assert np.all(ranks == [8, 0, 8, 0, 0, 0, 0])
    assert np.all(scaling == [1, 0, 1, 0, 0, 0, 0])
    with pytest.raises(AdapterError, match="no peft_type"):
        resolved({})


def test_limits_can_be_raised_and_lowered():
    assert resolved(qv_fields(r=1024), AdapterLimits(max_rank=1024))[0].max() == 1024
    with pytest.raises(AdapterError, match="over the limit of 2"):
        resolved(qv_fields(), AdapterLimits(max_rank=2))


def test_first_matching_pattern_wins_and_patterns_match_whole_name_parts():
    fields = qv_fields(
        lora_alpha=12,
        rank_pattern={"layers.1.self_attn.q_proj": 3, "q_proj": 6, "j": 9, "layers.[02].*.v_proj": 1},
        alpha_pattern={"^model.layers.2.self_attn.v_proj": 5, "self_attn": 100},
    )
    ranks, scaling = resolved(fields)
    assert ranks[:, 0].tolist() == [6, 3, 6] and ranks[:, 2].tolist() == [1, 4, 1]
    np.testing.assert_array_equal(scaling[:, 0], np.float32([2, 4, 2]))
    np.testing.assert_array_equal(scaling[:, 2], np.float32([12, 3, 5]))


def test_rslora_divides_by_the_root_of_each_rank():
    _, scaling = resolved(qv_fields(use_rslora=True, lora_alpha=6, rank_pattern={"v_proj": 9}))
    np.testing.assert_array_equal(scaling[0], np.float32([3, 0, 2, 0, 0, 0, 0]))


def test_full_names_ignore_layers_to_transform_as_in_peft():
    names = targeted(qv_fields(target_modules=["model.layers.0.self_attn.o_proj", "q_proj"], layers_to_transform=[1]))
    assert names == {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"}


def test_layers_pattern_may_name_something_else():
    with pytest.raises(AdapterError, match="name no projection"):
        targeted(qv_fields(layers_to_transform=[1], layers_pattern="blocks"))
    assert len(targeted(qv_fields(layers_to_transform=[1], layers_pattern=["blocks", "layers"]))) == 2
    with pytest.raises(AdapterError, match="name no projection"):  # a pattern that takes the number away
        targeted(qv_fields(layers_to_transform=[1], layers_pattern="layers|x"))


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"], ids=lambda d: repr(d[:5]))
def test_configuration_that_is_no_json_object(data):
    with pytest.raises(AdapterError, match="adapter_config.json (is not valid JSON|does not hold a JSON object)"):
        decode_config(data)


def peft_matches(config: SimpleNamespace, key: str) -> bool:
    """`check_target_module_exists` of PEFT 0.21.2, written out again."""
    if config.exclude_modules:
        if isinstance(config.exclude_modules, str):
            if re.fullmatch(config.exclude_modules, key):
                return False
        elif key in config.exclude_modules or any(key.endswith(f".{e}") for e in config.exclude_modules):
            return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, key) is not None
    if key in config.target_modules:
        return True
    if not any(key.endswith(f".{t}") for t in config.target_modules):
        return False
    indexes, patterns = config.layers_to_transform, config.layers_pattern
    if indexes is None or indexes == []:
        return True
    match = None
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", key)
    for pattern in ([patterns] if isinstance(patterns, str) else patterns) if patterns else []:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", key)
        if match:
            break
    if not match or match["idx"] is None:
        return False
    return int(match["idx"]) == indexes if isinstance(indexes, int) else int(match["idx"]) in indexes


PARTS = st.sampled_from(
    ["q_proj", "k_proj", "proj", "self_attn.v_proj", "mlp.up_proj", "1.mlp.down_proj", "layers.2.self_attn.o_proj"]
    + ["model.layers.0.self_attn.q_proj", "odel.layers.0.self_attn.q_proj", "", ".", "gate_proj"]
)
NAMES = st.lists(PARTS, max_size=4)
REGEXES = st.sampled_from([r".*_proj", r".*\.(q|v)_proj", r".*[02]\.mlp\.(up|down)_proj", r"model\.layers\.1.*j", "x"])


@given(
    target=st.one_of(NAMES.filter(bool), REGEXES),
    exclude=st.one_of(st.none(), NAMES, REGEXES),
    layers=st.one_of(st.none(), st.integers(-1, 3), st.lists(st.integers(0, 3), max_size=3)),
    pattern=st.sampled_from([None, "", "layers", "model.layers", "l.*", ["h", "layers"], []]),
)
def test_targets_as_peft_matches_them(target, exclude, layers, pattern):
    if isinstance(target, str):
        layers = pattern = None
    if layers is None:
        pattern = None
    fields = dict(target_modules=target, exclude_modules=exclude, layers_to_transform=layers, layers_pattern=pattern)
    names = [projection_name(layer, module) for layer in range(3) for module in range(len(HF_MODULES))]
    expected = {name for name in names if peft_matches(SimpleNamespace(**fields), name)}
    if expected:
        assert targeted(qv_fields(**fields)) == expected
    else:
        with pytest.raises(AdapterError, match="name no projection"):
            targeted(qv_fields(**fields))
