"""Files that must be refused, and what the message says; nothing a file holds may end in another kind of error."""

import errno
import json
import os
import re
import struct

from adapter_files import CONFIG, qv_fields, qv_tensors, tensor_name, write_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from slora_jax.adapters import AdapterLimits, read_adapter
from slora_jax.adapters.safetensors_file import read_data
from slora_jax.errors import AdapterError

Q0A, Q0B = tensor_name(0, "q", "A"), tensor_name(0, "q", "B")


def raw_file(header, data: bytes = b"") -> bytes:
    """A safetensors file with a header of our choice (an object, or bytes)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed(**tensors) -> dict:
    """The right tensors with some replaced, or left out where None."""
    result = qv_tensors() | tensors
    return {name: tensor for name, tensor in result.items() if tensor is not None}


def renamed(old: str, new: str) -> dict:
    return {new if name == old else name: tensor for name, tensor in qv_tensors().items()}


def filled(value, dtype=np.float32) -> np.ndarray:
    tensor = np.zeros((4, 32), dtype)
    tensor[2, 5] = value
    return tensor


ENTRY = {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}

REFUSED_FILES = [
    ("missing", changed(**{Q0A: None}), f"tensor {Q0A} is missing"),
    ("missing_two", changed(**{Q0A: None, Q0B: None}), "is missing (and 1 more)"),
    ("untargeted", changed(**{tensor_name(1, "k", "A"): np.zeros((4, 32), np.float32)}), "do not name its module"),
    ("bias", changed(**{Q0B.replace("weight", "bias"): np.zeros(32, np.float32)}), "a trained bias"),
    ("dora", changed(**{"x.q_proj.lora_magnitude_vector": np.zeros(32, np.float32)}), "DoRA magnitudes"),
    ("head", changed(**{"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}), "a changed output head"),
    ("embedding", changed(**{"m.embed_tokens.lora_embedding_A": np.zeros(2, np.float32)}), "a LoRA on the embedding"),
    ("resized", changed(**{"m.embed_tokens.weight": np.zeros(2, np.float32)}), "a replaced or resized embedding"),
    ("foreign", changed(surprise=np.zeros(2, np.float32)), "unexpected tensor surprise"),
    ("control", raw_file({"a\nb\ud800": ENTRY}, bytes(512)), "unexpected tensor a\\nb\\ud800"),
    ("prefix", renamed(Q0A, Q0A.removeprefix("base_model.model.")), "unexpected tensor model.layers.0"),
    ("layer", renamed(Q0A, tensor_name(3, "q", "A")), "this base model has only 3 layers"),
    ("block", renamed(Q0A, Q0A.replace("self_attn", "mlp")), "unexpected tensor"),
    ("width_a", changed(**{Q0A: np.zeros((4, 64), np.float32)}), "has shape [4, 64], expected [4, 32]: q_proj of this"),
    (
        "width_b",
        changed(**{Q0B: np.zeros((48, 4), np.float32)}),
        "base model has 32 outputs; the adapter is for another",
    ),
    ("rank", changed(**{Q0A: np.zeros((8, 32), np.float32)}), "its rank is 8, not 4"),
    ("swapped", changed(**{Q0A: np.zeros((32, 4), np.float32)}), "its axes look swapped"),
    ("axes", changed(**{Q0A: np.zeros((4, 32, 1), np.float32)}), "has shape [4, 32, 1]"),
    (
        "dtype",
        changed(**{Q0A: np.zeros((4, 32), np.float64)}),
        f"tensor {Q0A} has dtype F64; save the adapter in float32",
    ),
    ("nan", changed(**{Q0A: filled(np.nan)}), f"tensor {Q0A} holds NaN"),
    ("inf", changed(**{Q0A: filled(-np.inf)}), f"tensor {Q0A} holds infinity"),
    ("inf_f16", changed(**{Q0A: filled(np.inf, np.float16)}), "holds infinity"),
    ("nan_bf16", changed(**{Q0A: filled(np.nan, ml_dtypes.bfloat16)}), "holds NaN"),
    ("huge", changed(**{Q0A: filled(3.4e38)}), "holds a value too large for bfloat16"),
    ("twice", changed(**{Q0A.replace(".weight", ".default.weight"): qv_tensors()[Q0A]}), "stand for the same weight"),
    ("two_adapters", renamed(Q0A, Q0A.replace(".weight", ".other.weight")), "tensors of several adapters in one file"),
    ("none", {}, "is missing (and 11 more)"),
    ("empty", b"", "is truncated or no safetensors file (0 bytes"),
    ("short", b"\x01\x02", "is truncated or no safetensors file (2 bytes"),
    ("garbage", b"PK\x03\x04" * 100, "is truncated or no safetensors file"),
    ("cut", save(qv_tensors())[:-1], "adapter_model.safetensors is truncated: its header describes"),
    ("cut_header", save(qv_tensors())[:100], "is truncated or no safetensors file"),
    ("tail", save(qv_tensors()) + b"x", "is followed by bytes that belong to no tensor"),
    ("no_json", raw_file(b"{" + b" " * 20), "its header is not a JSON object"),
    ("list", raw_file([1]), "its header is not a JSON object"),
    ("deep", raw_file(b'{"a":' + b"[" * 100_000), "its header is not a JSON object"),
    ("space", raw_file(b' {"a": 1}'), "its header is not a JSON object"),
    ("no_entry", raw_file({Q0A: 3}), "has no proper header entry"),
    ("extra_key", raw_file({Q0A: ENTRY | {"x": 1}}), "has no proper header entry"),
    ("negative", raw_file({Q0A: ENTRY | {"data_offsets": [-512, 0]}}), "malformed shape or offsets"),
    ("fraction", raw_file({Q0A: ENTRY | {"shape": [4.0, 32]}}), "malformed shape or offsets"),
    ("true", raw_file({Q0A: ENTRY | {"shape": [True, 128]}}), "malformed shape or offsets"),
    ("big_shape", raw_file({Q0A: ENTRY | {"shape": [2**62, 2**62]}}), "malformed shape or offsets"),
    ("misfit", raw_file({Q0A: ENTRY | {"shape": [4, 33]}}), "does not fit its bytes"),
    ("dtype_type", raw_file({Q0A: ENTRY | {"dtype": ["F32"]}}), "has dtype ['F32']"),
    ("overlap", raw_file({Q0A: ENTRY, Q0B: ENTRY}, bytes(1024)), "does not begin where the one before it ends"),
    ("gap", raw_file({Q0A: ENTRY | {"data_offsets": [512, 1024]}}, bytes(1024)), "does not begin where the one before"),
    ("beyond", raw_file({Q0A: ENTRY}, bytes(511)), "truncated: its header describes 512 bytes"),
    ("named_twice", raw_file(b'{"a": 1, "b": 2, "a": 1}'), "names a twice"),
]


@pytest.mark.parametrize(("tensors", "words"), [case[1:] for case in REFUSED_FILES], ids=[c[0] for c in REFUSED_FILES])
def test_file_is_refused(tmp_path, tensors, words):
    path = write_adapter(tmp_path / "bad", tensors=tensors)
    with pytest.raises(AdapterError, match=re.escape(words)) as error:
        read_adapter(path, CONFIG)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600


LIMITS = [
    ("max_file_bytes", "adapter_model.safetensors has "),
    ("max_header_bytes", "has a header of "),
    ("max_tensors", "holds 12 tensors, over the limit of 10"),
    ("max_config_bytes", "adapter_config.json has more than 10 bytes"),
]


@pytest.mark.parametrize(("limit", "words"), LIMITS, ids=[limit for limit, _ in LIMITS])
def test_limits(tmp_path, limit, words):
    path = write_adapter(tmp_path)
    with pytest.raises(AdapterError, match=re.escape(words)) as error:
        read_adapter(path, CONFIG, limits=AdapterLimits(**{limit: 10}))
    assert f"raise AdapterLimits.{limit}" in str(error.value)


def test_a_header_that_claims_a_terabyte_is_not_read(tmp_path):
    path = write_adapter(tmp_path, tensors=struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(AdapterError, match="truncated or no safetensors file"):
        read_adapter(path, CONFIG)


def test_another_base_model_is_named(tmp_path):
    path = write_adapter(
        tmp_path, qv_fields(base_model_name_or_path="org/big"), changed(**{Q0A: np.zeros((4, 64), np.float32)})
    )
    with pytest.raises(AdapterError, match=r"the adapter is for another base model \(it names org/big\)"):
        read_adapter(path, CONFIG)


def test_source_that_is_no_adapter_directory(tmp_path):
    for name in ("no/such/place/at/all", "missing", "../missing", ""):
        with pytest.raises(AdapterError, match="no such directory; give|no adapter_config.json in it"):
            read_adapter(name, CONFIG)
    with pytest.raises(AdapterError, match="no adapter_config.json in it"):
        read_adapter(tmp_path, CONFIG)
    path = write_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match="this is a file; give the directory"):
        read_adapter(path / "adapter_model.safetensors", CONFIG)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="no adapter_model.safetensors in it"):
        read_adapter(path, CONFIG)
    (path / "adapter_config.json").write_bytes(b"\x80")
    (path / "adapter_model.safetensors").mkdir()
    with pytest.raises(AdapterError, match="no adapter_model.safetensors in it"):
        read_adapter(path, CONFIG)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pth", "x.pkl", "x.ckpt"])
def test_pickles_are_never_opened(tmp_path, name):
    path = write_adapter(tmp_path)
    (path / name).write_bytes(b"cos\nsystem\n")
    read_adapter(path, CONFIG)  # beside safetensors it is left alone
    (path / "adapter_model.safetensors").unlink()
    for source in (path, path / name):
        with pytest.raises(AdapterError, match=f"{name} is a pickle, which can run any code when it is read"):
            read_adapter(source, CONFIG)


def test_file_that_cannot_be_read(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = write_adapter(tmp_path)
    monkeypatch.setattr("slora_jax.adapters.directory.read_data", fail)
    with pytest.raises(AdapterError, match=r"cannot be read \(Input/output error\); check the files"):
        read_adapter(path, CONFIG)


def test_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    path = write_adapter(tmp_path)

    def shrink(file, *args):
        with open(path / "adapter_model.safetensors", "r+b") as other:
            other.truncate(os.fstat(file.fileno()).st_size - 100)
        return read_data(file, *args)

    monkeypatch.setattr("slora_jax.adapters.directory.read_data", shrink)
    with pytest.raises(AdapterError, match="became shorter while it was read"):
        read_adapter(path, CONFIG)


def test_hub_id_is_fetched_with_its_revision_and_only_two_files(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def download(repo, *, revision, allow_patterns, dry_run=False, local_files_only=False):
        calls.append((repo, revision, allow_patterns))
        return [] if dry_run else str(write_adapter(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    adapter = read_adapter("org/name@v1.2", CONFIG)
    assert set(adapter.targets) == {"q", "v"}
    assert calls == [("org/name", "v1.2", ["adapter_config.json", "adapter_model.safetensors"])] * 2


def test_hub_file_over_the_limit_is_not_downloaded(monkeypatch):
    import huggingface_hub

    class Info:
        filename, file_size = "adapter_model.safetensors", 11

    def download(repo, *, dry_run=False, **_):
        assert dry_run
        return [Info]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(AdapterError, match="adapter_model.safetensors has 11 bytes, over the limit of 10"):
        read_adapter("org/name", CONFIG, limits=AdapterLimits(max_file_bytes=10))


def test_hub_without_network_uses_what_is_there_or_says_so(tmp_path, monkeypatch):
    import huggingface_hub

    def download(repo, *, local_files_only=False, **_):
        if local_files_only and repo == "org/cached":
            return str(write_adapter(tmp_path / "cached"))
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_adapter("org/cached", CONFIG).max_rank == 4
    with pytest.raises(AdapterError, match=r"org/name: no such directory, .* \(OSError: no network\); check the name"):
        read_adapter("org/name", CONFIG)


def test_adapter_name_inside_tensor_names(tmp_path):
    plain = read_adapter(write_adapter(tmp_path / "a"), CONFIG)
    tensors = {name.replace(".weight", ".default.weight"): tensor for name, tensor in qv_tensors().items()}
    assert read_adapter(write_adapter(tmp_path / "b", tensors=tensors), CONFIG) == plain


def test_tensors_of_mixed_dtypes_at_odd_offsets(tmp_path):
    tensors = qv_tensors(rank=3)
    tensors[Q0A] = tensors[Q0A].astype(np.float16)
    tensors[Q0B] = tensors[Q0B].astype(ml_dtypes.bfloat16)
    header, data = {}, b""
    for name in sorted(tensors, reverse=True):
        dtype = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[tensors[name].dtype.name]
        end = len(data) + tensors[name].nbytes
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [len(data), end]}
        data += tensors[name].tobytes()
    adapter = read_adapter(write_adapter(tmp_path, qv_fields(r=3), raw_file(header, data)), CONFIG)
    for layer in range(3):
        np.testing.assert_array_equal(adapter.a(layer, "q"), tensors[tensor_name(layer, "q", "A")])
        np.testing.assert_array_equal(adapter.b(layer, "v"), tensors[tensor_name(layer, "v", "B")])


GOOD = save(qv_tensors())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.one_of(st.integers(0, 12), st.integers(0, len(GOOD))),
    cut=st.integers(0, 40),
    insert=st.one_of(st.binary(max_size=12), st.sampled_from([b'"', b"[]", b"-1", b"99999999999", b"{", b"null"])),
)
def test_damaged_files_end_in_adapter_error_or_are_sound(tmp_path, start, cut, insert):
    data = GOOD[:start] + insert + GOOD[start + cut :]
    path = write_adapter(tmp_path, tensors=data)
    try:
        read_adapter(path, CONFIG)
    except AdapterError as error:
        assert "\n" not in str(error)
        return
    try:
        deserialize(data)
    except SafetensorError as error:
        raise AssertionError("read a file that the safetensors library refuses") from error
