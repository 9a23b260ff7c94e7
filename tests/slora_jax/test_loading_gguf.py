"""GGUF files written with the gguf package: round trips, rotary permutation, quantisation, tokenisers, refusals."""

import itertools
import math

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax.errors import ModelError
from slora_jax.loading import load_config, load_model, random_params
from slora_jax.loading.gguf import unpermute
from slora_jax.model_config import ModelConfig
from slora_jax.shapes import named_shape

ARCHS = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
F32, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_1"))


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py does it to q and k, here for single heads."""
    out = []
    for head in np.split(weight, heads):
        first, second = np.split(head, 2)
        out += [row for pair in zip(first, second, strict=True) for row in pair]
    return np.stack(out)


def rope_freqs(config: ModelConfig, factor=8.0, low=1.0, high=4.0, original=8192) -> np.ndarray:
    """rope_freqs.weight, case by case as llama.cpp's converter writes it."""
    out = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def gguf_tensors(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    p = {name: np.asarray(array) for name, array in params.items()}
    q, kv, f = config.q_size, config.kv_size, config.mlp_size
    tensors = {"token_embd.weight": p["embed"], "output_norm.weight": p["final_norm"]}
    if not config.tied_embeddings:
        tensors["output.weight"] = p["lm_head"]
    if config.rope_scaling:
        tensors["rope_freqs.weight"] = rope_freqs(config)
    llama = config.architecture == "LlamaForCausalLM"
    for i in range(config.num_layers):
        at, wq, wk = f"blk.{i}.", p["wqkv"][i, :, :q].T, p["wqkv"][i, :, q : q + kv].T
        tensors |= {
            at + "attn_norm.weight": p["attn_norm"][i],
            at + "ffn_norm.weight": p["mlp_norm"][i],
            at + "attn_q.weight": permute(wq, config.num_heads) if llama else wq,
            at + "attn_k.weight": permute(wk, config.num_kv_heads) if llama else wk,
            at + "attn_v.weight": p["wqkv"][i, :, q + kv :].T,
            at + "attn_output.weight": p["wo"][i].T,
            at + "ffn_gate.weight": p["wgu"][i, :, :f].T,
            at + "ffn_up.weight": p["wgu"][i, :, f:].T,
            at + "ffn_down.weight": p["wdown"][i].T,
        }
        if config.qkv_bias:
            tensors[at + "attn_q.bias"] = p["bqkv"][i, :q]
            tensors[at + "attn_k.bias"] = p["bqkv"][i, q : q + kv]
            tensors[at + "attn_v.bias"] = p["bqkv"][i, q + kv :]
        if config.qk_norm:
            tensors[at + "attn_q_norm.weight"] = p["q_norm"][i]
            tensors[at + "attn_k_norm.weight"] = p["k_norm"][i]
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def write_gguf(path, shape="tiny-gqa", *, tensors=None, quant=F32, arch=None, metadata=None, tokenizer=None):
    """A GGUF of a named shape with random weights; ``metadata`` adds or (None) leaves out keys. Returns the params."""
    config = named_shape(shape)
    params = random_params(config, seed=11, dtype="float32")
    arch = arch or ARCHS[config.architecture]
    fields = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.mlp_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Tiny")
    for key, value in fields.items():
        if value is None:
            continue
        name = key.removeprefix("/") if key.startswith("/") else f"{arch}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](name, value)
    if tokenizer:
        tokenizer(writer)
    for name, array in (gguf_tensors(config, params) if tensors is None else tensors).items():
        if quant != F32 and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-gqa", "tiny-qwen2", "tiny-qwen3", "tiny-tied"])
def test_round_trip(tmp_path, shape):
    params = write_gguf(tmp_path / "m.gguf", shape)
    model = load_model(tmp_path / "m.gguf", dtype="float32")
    assert model.config == named_shape(shape) == load_config(tmp_path, check_weights=True)
    assert model.name == "m" and model.tokenizer is None and model.eos_token_ids == ()
    assert model.params.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(model.params[name], array)


def test_unpermute_undoes_the_interleaving():
    weight = np.arange(4 * 6 * 3).reshape(24, 3)
    np.testing.assert_array_equal(unpermute(permute(weight, 4), 4), weight)
    assert not np.array_equal(permute(weight, 4), weight)


@pytest.mark.parametrize("quant", [Q8_0, Q4_1])
def test_quantised_values_are_rounded_to_bfloat16(tmp_path, quant):
    config = named_shape("tiny-gqa")
    params = write_gguf(tmp_path / "m.gguf", quant=quant)
    value = np.ascontiguousarray(np.asarray(params["wdown"])[1].T)
    try:
        exact = gguf.quants.dequantize(gguf.quants.quantize(value, quant), quant).T
    except NotImplementedError:
        pytest.skip(f"this gguf package cannot quantise {quant.name}")
    rounded = exact.astype(jnp.bfloat16)
    assert not np.array_equal(exact, rounded.astype(np.float32))
    default = load_model(tmp_path / "m.gguf", dtype="float32").params["wdown"]
    np.testing.assert_array_equal(default[1], rounded.astype(np.float32))
    as_is = load_model(tmp_path / "m.gguf", dtype="float32", weight_dtype="float32").params["wdown"]
    np.testing.assert_array_equal(as_is[1], exact)
    low = load_model(tmp_path / "m.gguf").params["wdown"]
    assert low.dtype == jnp.bfloat16 and low.shape == (config.num_layers, config.mlp_size, config.hidden_size)
    np.testing.assert_array_equal(low[1], rounded)


@pytest.mark.parametrize(
    ("freqs", "metadata", "expected"),
    [
        ({}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, ("linear", 4.0)),
        ({}, {"rope.scale_linear": 2.0}, ("linear", 2.0)),
        ({"factor": 32.0}, {}, ("llama3", 32.0)),
        ({"factor": 1.0}, {}, None),
    ],
)
def test_rope_scaling(tmp_path, freqs, metadata, expected):
    config = named_shape("tiny-gqa")
    tensors = gguf_tensors(config, random_params(config, dtype="float32"))
    del tensors["rope_freqs.weight"]
    if freqs:
        tensors["rope_freqs.weight"] = rope_freqs(config, **freqs)
    write_gguf(tmp_path / "m.gguf", tensors=tensors, metadata=metadata)
    scaling = load_config(tmp_path / "m.gguf").rope_scaling
    assert (scaling and (scaling.kind, scaling.factor)) == expected


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "rope scaling yarn is not supported"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"attention.sliding_window": 128}, "sliding window 128"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count 8 differs"),
        ({"attention.value_length": 32}, "llama.attention.value_length 32 differs"),
        ({"block_count": None}, "metadata llama.block_count is missing"),
        ({"attention.head_count_kv": [2, 2, 1]}, "head_count_kv must be one positive integer"),
        ({"attention.head_count_kv": 3}, "not a multiple"),
        ({"/split.count": 2}, "one of 2 parts; join them"),
        ({"feed_forward_length": 128}, "wrong shape: .*mlp"),
        ({"block_count": 2}, "does not have: model.layers.2"),
        ({"block_count": 4}, "missing tensors: model.layers.3"),
    ],
)
def test_refused_metadata(tmp_path, metadata, message):
    write_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "m.gguf")


def test_refused_tensors(tmp_path):
    config = named_shape("tiny-gqa")
    tensors = gguf_tensors(config, random_params(config, dtype="float32"))
    for change, message in [
        ({"rope_freqs.weight": rope_freqs(config, high=2.0)}, "rope_freqs.weight is not Llama 3's scaling"),
        ({"rope_freqs.weight": np.ones(3, np.float32) * 2}, "rope_freqs.weight is not Llama 3's scaling"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, "does not have: model.layers.0.self_attn.q_proj.bias"),
        ({"blk.0.odd.weight": np.ones(64, np.float32)}, "does not have: blk.0.odd.weight"),
    ]:
        write_gguf(tmp_path / "m.gguf", tensors=tensors | change)
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", tensors={"output.weight": tensors["output.weight"]})
    with pytest.raises(ModelError, match=r"missing tensors: token_embd.weight"):
        load_model(tmp_path / "m.gguf")


def test_refused_files(tmp_path):
    write_gguf(tmp_path / "m.gguf", arch="gemma2")
    with pytest.raises(
        ModelError, match="architecture gemma2 is not supported; supported in GGUF are llama, qwen2, qwen3"
    ):
        load_model(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    for broken in (b"", b"not a model at all", data[:100], data[:-1000]):
        (tmp_path / "m.gguf").write_bytes(broken)
        with pytest.raises(ModelError, match="damaged, truncated or not a GGUF file"):
            load_model(tmp_path / "m.gguf")
    (tmp_path / "n.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(m.gguf, n.gguf\); give the path of one"):
        load_model(tmp_path)


def test_quantisations_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", quant=Q8_0)

    def fail(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", fail)
    with pytest.raises(ModelError, match=r"token_embd.weight is quantised as Q8_0, which the gguf package cannot"):
        load_model(tmp_path / "m.gguf")


def byte_level(text: str) -> str:
    return text.replace(" ", "Ġ").replace("\n", "Ċ")


def write_bpe(writer, pre: str, words=("th",), special=("<|bos|>", "<|eos|>", "<|eot|>"), **flags):
    """A byte-level BPE whose merges build ``words`` letter by letter."""
    import tokenizers

    tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in map(byte_level, words):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    start = len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *special])
    writer.add_token_types([1] * len(tokens) + [3] * len(special))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(start)
    writer.add_eos_token_id(start + 1)
    writer.add_eot_token_id(start + 2)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)


def pieces(tokenizer, text):
    return [tokenizer.decode([token], skip_special=False) for token in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["a", " b", "1", "2", "3", "4", "!"]),
        ("gpt-2", ["a", " b", "1234", "!"]),
        ("qwen2", ["a", " b", "1", "2", "3", "4", "!"]),
        ("tekken", ["<|bos|>", "a", " b", "1", "2", "3", "4", "!"]),
        ("llama-bpe", ["<|bos|>", "a", " b", "123", "4", "!"]),
    ],
)
def test_byte_level_tokenizers(tmp_path, pre, expected):
    write_gguf(tmp_path / "m.gguf", "tiny-tied", tokenizer=lambda writer: write_bpe(writer, pre, [" b", "1234"]))
    model = load_model(tmp_path / "m.gguf")
    assert pieces(model.tokenizer, "a b1234!") == expected
    assert model.tokenizer.decode(model.tokenizer.encode("a b1234! ü\n🦜")) == "a b1234! ü\n🦜"
    assert model.tokenizer.eos_token_ids == (model.tokenizer.vocab_size - 2, model.tokenizer.vocab_size - 1)
    # Ids that the model cannot produce end nothing.
    assert model.eos_token_ids == ()


def test_flags_say_whether_bos_and_eos_are_added(tmp_path):
    flags = {"add_bos_token": False, "add_eos_token": True}
    write_gguf(tmp_path / "m.gguf", tokenizer=lambda writer: write_bpe(writer, "llama-bpe", **flags))
    assert pieces(load_model(tmp_path / "m.gguf").tokenizer, "ab") == ["a", "b", "<|eos|>"]


PIECES = ["▁", "t", "h", "e", "c", "a", "▁t", "he", "▁the", "▁c", "at", "▁cat", "th", "▁th", "ca", "s", "▁s", "at▁"]
SCORES = [-9.0, -9.0, -9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -1.5, -2.5, -7.0, -9.0, -8.0, -3.5]


def write_spm(writer):
    """A SentencePiece BPE as Llama 2's: control tokens, byte tokens, pieces with scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + SCORES)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def sentencepiece(text: str) -> list[str]:
    """SentencePiece's own algorithm: join the neighbours that make the best-scored piece, leftmost first."""
    parts = list("▁" + text.replace(" ", "▁"))
    score = dict(zip(PIECES, SCORES, strict=True))
    while True:
        joined = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not joined:
            return parts
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_sentencepiece_tokenizer(tmp_path):
    write_gguf(tmp_path / "m.gguf", "tiny-gqa", tokenizer=write_spm)
    model = load_model(tmp_path / "m.gguf")
    tokenizer = model.tokenizer
    assert model.eos_token_ids == (2,)
    for text in ("the cat", "that cat sat", "cats  the the", "a the cat", ""):
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        expected = sentencepiece(text) if text else []
        assert [PIECES[token - 259] for token in ids[1:]] == expected
        assert tokenizer.decode(ids) == text
    ids = tokenizer.encode("the €")
    assert ids[-3:] == [3 + byte for byte in "€".encode()]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids[-3:]] == ["", "", "€"]


def test_unsupported_tokenizer_kinds(tmp_path):
    write_gguf(tmp_path / "m.gguf", tokenizer=lambda writer: write_bpe(writer, "jais"))
    with pytest.raises(ModelError, match=r"tokenizer gpt2/jais is not supported; put the model's tokenizer.json"):
        load_model(tmp_path / "m.gguf")
    write_gguf(tmp_path / "other.gguf", tokenizer=lambda writer: write_bpe(writer, "smollm"))
    load_model(tmp_path / "other.gguf").tokenizer.save(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        file.rename(tmp_path / file.name)
    assert pieces(load_model(tmp_path / "m.gguf").tokenizer, "12") == ["1", "2"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda writer: writer.add_tokenizer_model("gpt2"), "tokenizer gpt2/default is not supported"),
        (lambda writer: [writer.add_tokenizer_model("llama"), writer.add_token_list(["a"])], "token_type is missing"),
        (lambda writer: write_bpe(writer, "smollm", special=("<a>", "<a>")), "holds 1 tokens twice"),
    ],
)
def test_incomplete_tokenizers(tmp_path, edit, message):
    write_gguf(tmp_path / "m.gguf", tokenizer=edit)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "m.gguf")


def test_a_file_is_parsed_once_for_config_and_model(tmp_path, monkeypatch):
    parsed = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or reader(path))
    path = tmp_path / "m.gguf"
    write_gguf(path)
    assert load_config(path) == load_model(path).config
    assert len(parsed) == 1
    write_gguf(path, "tiny-tied")
    assert load_config(path).tied_embeddings and len(parsed) == 2
