"""The tokeniser: Hugging Face files, chat templates, streaming, and the golden prompts of the demo model."""

import json
import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from slora_jax.errors import ModelError, RequestError
from slora_jax.loading.gguf import GGUFFile
from slora_jax.loading.gguf_tokenizer import tokenizer_from_gguf
from slora_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS = len(ALPHABET) + 2, len(ALPHABET) + 3


def byte_level_backend() -> Backend:
    """One token a byte, two merges, <s> and </s>; runs of x are split off, which no model-specific class does."""
    vocabulary = {token: index for index, token in enumerate([*ALPHABET, "th", "the"])}
    backend = Backend(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("x+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return backend


def byte_fallback_backend() -> Backend:
    """SentencePiece style: spaces as ▁, unknown characters as byte tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    backend = Backend(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [("▁", "a")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return backend


def build(backend=byte_level_backend, template=TEMPLATE, **options) -> Tokenizer:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return Tokenizer(fast, name="tiny", **options)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build()


def test_encode_and_decode(tokenizer):
    ids = tokenizer.encode("the 🦜")
    assert ids[0] == BOS and len(ids) == 1 + 1 + 1 + 4
    assert tokenizer.decode(ids) == "the 🦜"
    assert tokenizer.decode(ids, skip_special=False) == "<s>the 🦜"
    assert tokenizer.encode("the 🦜", add_special_tokens=False) == ids[1:]
    assert tokenizer.encode("") == [BOS] and tokenizer.decode([]) == ""
    assert tokenizer.vocab_size == EOS + 1 and tokenizer.eos_token_ids == (EOS,)


def test_more_end_tokens_and_padded_vocabularies():
    tokenizer = build(eos_token_ids=(5, EOS), model_vocab_size=EOS + 10)
    assert tokenizer.eos_token_ids == (EOS, 5)
    a = tokenizer.encode("a", add_special_tokens=False)[0]
    assert tokenizer.decode([a, EOS + 9, a]) == "aa"
    stream = tokenizer.stream()
    assert [stream.push(token) for token in (a, EOS + 9, a)] == ["a", "", "a"]


@pytest.mark.parametrize("token", [-1, EOS + 1, 10**12, 1.5, "7", None])
def test_invalid_ids(tokenizer, token):
    with pytest.raises(RequestError, match="is not in the vocabulary"):
        tokenizer.decode([1, token])
    with pytest.raises(RequestError, match="is not in the vocabulary"):
        tokenizer.stream().push(token)


def test_prompts_that_are_no_text(tokenizer):
    with pytest.raises(RequestError, match="must be a string, not bytes"):
        tokenizer.encode(b"text")
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("lone surrogate \ud800")


def test_chat(tokenizer):
    messages = [{"role": "user", "content": "the"}]
    text = tokenizer.render(messages)
    assert text == "<s>[user] the</s>[assistant]"
    ids = tokenizer.chat(messages)
    assert ids == tokenizer.encode(text, add_special_tokens=False) and ids.count(BOS) == 1
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.render(messages, add_generation_prompt=False) == "<s>[user] the</s>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (["hello"], r"messages\[0\] must be a mapping"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], r"messages\[1\] needs the string 'content'"),
        ([{"content": "x"}], r"messages\[0\] needs the string 'role'"),
        ([{"role": "tool", "content": "x"}], "the chat template refuses these messages: no tools here"),
    ],
)
def test_refused_messages(tokenizer, messages, message):
    with pytest.raises(RequestError, match=message):
        tokenizer.chat(messages)


def test_no_chat_template():
    tokenizer = build(template=None)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="tiny has no chat template; send a plain prompt"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_limits_in_the_files_never_cut_a_prompt():
    def limited():
        backend = byte_level_backend()
        backend.enable_truncation(4)
        backend.enable_padding(length=16)
        return backend

    assert len(build(limited).encode("a" * 40)) == 41
    assert len(build(limited).encode("a")) == 2


def test_save_and_load(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "t")
    again = Tokenizer.from_directory(tmp_path / "t", model_vocab_size=1000)
    for text in ("the xx1234 🦜", "a</s>b"):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.chat([{"role": "user", "content": "x"}]) == tokenizer.chat([{"role": "user", "content": "x"}])
    assert again.eos_token_ids == tokenizer.eos_token_ids and again.decode([999]) == ""


def test_tokenizer_json_is_used_as_it_stands(tmp_path, tokenizer):
    """transformers' model classes would put their own pre-tokeniser in the place of the one in the file."""
    tokenizer.save(tmp_path / "t")
    settings_file = tmp_path / "t" / "tokenizer_config.json"
    raw = json.loads(settings_file.read_text())
    for kind in ("GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"):
        settings_file.write_text(
            json.dumps(raw | {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": ["evil.Code", None]}})
        )
        (tmp_path / "t" / "evil.py").write_text("raise SystemExit('code of the model was run')\n")
        assert Tokenizer.from_directory(tmp_path / "t").encode("axxb12") == tokenizer.encode("axxb12")


def test_directories_without_or_with_broken_files(tmp_path):
    assert Tokenizer.from_directory(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("backend", [byte_level_backend, byte_fallback_backend])
def test_streaming_holds_back_unfinished_characters(backend):
    tokenizer = build(backend)
    text = "a 🦜é€ b"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    told = [stream.push(token) for token in ids]
    assert "".join(told) == text and stream.flush() == ""
    assert "🦜" in told and told[told.index("🦜") - 3 : told.index("🦜")] == ["", "", ""]
    assert not any("�" in piece for piece in told)


@pytest.mark.parametrize("backend", [byte_level_backend, byte_fallback_backend])
def test_flush_tells_an_unfinished_character(backend):
    tokenizer = build(backend)
    ids = tokenizer.encode("a🦜")[:-2]
    stream = tokenizer.stream()
    told = "".join(stream.push(token) for token in ids)
    assert told == "a"
    assert told + stream.flush() == tokenizer.decode(ids) != told
    assert stream.flush() == ""


def test_streaming_special_tokens(tokenizer):
    ids = tokenizer.encode("a</s>b")
    for skip, text in ((True, "ab"), (False, "<s>a</s>b")):
        stream = tokenizer.stream(skip)
        assert "".join(stream.push(token) for token in ids) + stream.flush() == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_streamed_text_is_decoded_text(text):
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        told = [stream.push(token) for token in ids]
        assert "".join(told) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, EOS), max_size=20))
def test_streamed_random_bytes_are_decoded_bytes(ids):
    stream = BYTE_LEVEL.stream()
    assert "".join([stream.push(token) for token in ids]) + stream.flush() == BYTE_LEVEL.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 262), max_size=20))
def test_streaming_survives_invalid_byte_tokens(ids):
    """A run of byte tokens that is no UTF-8 re-reads as a whole; what was told stays, the rest goes on."""
    stream = BYTE_FALLBACK.stream()
    told = "".join([stream.push(token) for token in [*ids, 260, 261]]) + stream.flush()
    assert told.endswith("ab")


BYTE_LEVEL, BYTE_FALLBACK = build(), build(byte_fallback_backend)


def smollm2() -> Path:
    if named := os.environ.get("SLORA_SMOLLM2_GGUF"):
        return Path(named)
    found = sorted((ROOT / "examples" / "models").glob("*.gguf"))
    if not found:
        pytest.skip("SmolLM2 GGUF not found: set SLORA_SMOLLM2_GGUF or run make demo once")
    return found[0]


def golden() -> list[dict]:
    places = [ROOT / "tests" / "data" / "golden.json", ROOT / "examples" / "adapters" / "golden.json"]
    if named := os.environ.get("SLORA_GOLDEN"):
        places = [Path(named)]
    for path in places:
        if path.is_file():
            rows = json.loads(path.read_text(encoding="utf-8"))
            return rows["base"] + [row for adapter in rows["adapters"].values() for row in adapter["prompts"]]
    return pytest.skip("golden.json not found: set SLORA_GOLDEN to its path")


def test_golden_prompts(tmp_path):
    rows, file = golden(), GGUFFile(smollm2())
    embedded = tokenizer_from_gguf(file)
    embedded.save(tmp_path / "t")
    assert embedded.eos_token_ids == (2,) and embedded.vocab_size == 49152
    for tokenizer in (embedded, Tokenizer.from_directory(tmp_path / "t")):
        for row in rows:
            if row["chat"]:
                messages = [{"role": "user", "content": row["user_text"]}]
                assert tokenizer.render(messages) == row["prompt_text"]
                assert tokenizer.chat(messages) == row["prompt_token_ids"]
            else:
                assert tokenizer.encode(row["prompt_text"]) == row["prompt_token_ids"]
            stream = tokenizer.stream()
            told = "".join(stream.push(token) for token in row["output_token_ids"]) + stream.flush()
            assert told == tokenizer.decode(row["output_token_ids"])
