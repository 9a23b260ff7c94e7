"""The tokeniser inside a GGUF file, rebuilt with the ``tokenizers`` library.

transformers' own GGUF path needs PyTorch (5.23) and drops the digit split of the "smollm" pre-tokeniser. What each
pre-tokeniser name means is llama.cpp's (src/llama-vocab.cpp); the patterns are those of the models' tokenizer.json.
"""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from slora_jax.errors import ModelError
from slora_jax.loading.gguf import GGUFFile, eos_from_gguf
from slora_jax.tokenizer import Tokenizer, import_transformers

# Token types of the GGUF specification.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _LLAMA3, "llama-v3": _LLAMA3, "llama3": _LLAMA3, "qwen2": _QWEN2, "tekken": _TEKKEN}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama-v3", "llama3", "tekken"}
_STARTS_WITH_BOS = {"llama-bpe", "llama-v3", "llama3", "tekken"}
_GPT2_STYLE = {"smollm", "gpt-2", "gpt2"}


def tokenizer_from_gguf(file: GGUFFile, model_vocab_size: int = 0) -> Tokenizer | None:
    """The tokeniser and chat template of a GGUF file; None where the file carries none.

    Files of a Hugging Face tokeniser beside the GGUF serve where the embedded kind is not supported. Raises ModelError
    naming the kind where there are none.
    """
    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if kind is None or kind == "none":
        return None
    if kind == "gpt2" and (pre in _PATTERNS or pre in _GPT2_STYLE):
        backend = _byte_level_bpe(file, pre)
        add_bos = file.get("tokenizer.ggml.add_bos_token", pre in _STARTS_WITH_BOS)
    elif kind == "llama":
        backend = _sentencepiece_bpe(file)
        add_bos = file.get("tokenizer.ggml.add_bos_token", True)
    else:
        beside = Tokenizer.from_directory(file.path.parent, model_vocab_size=model_vocab_size)
        if beside is None:
            raise ModelError(
                f"{file.path}: tokenizer {kind}/{pre} is not supported; put the model's tokenizer.json and "
                "tokenizer_config.json beside the file"
            )
        return beside
    tokens = _tokens(file)
    special = {
        f"{name}_token": tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := file.get(f"tokenizer.ggml.{key}_token_id")) is not None and 0 <= index < len(tokens)
    }
    _set_post_processor(backend, file, special, bool(add_bos))
    fast = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=file.get("tokenizer.chat_template"), **special
    )
    return Tokenizer(fast, name=file.name, eos_token_ids=eos_from_gguf(file), model_vocab_size=model_vocab_size)


def _byte_level_bpe(file: GGUFFile, pre: str) -> Backend:
    """GPT-2's byte-level BPE behind the pre-tokeniser that ``pre`` names."""
    merges = [tuple(merge.split(" ", 1)) for merge in _required(file, "merges")]
    backend = Backend(models.BPE(_vocabulary(file), merges, fuse_unk=False, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if pre in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, file)
    return backend


def _sentencepiece_bpe(file: GGUFFile) -> Backend:
    """SentencePiece BPE (Llama 1 and 2, Mistral): merges are not stored but follow from the scores of the pieces."""
    vocabulary, types = _vocabulary(file), _types(file)
    scores = _required(file, "scores")
    pieces = {token: index for token, index in vocabulary.items() if types[index] in (_NORMAL, _USER_DEFINED)}
    merges = []
    for token, index in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[index], len(left), len(right), pieces[left], left, right))
    merges.sort()
    unknown = next((token for token, index in vocabulary.items() if types[index] == _UNKNOWN), None)
    backend = Backend(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    _add_special_tokens(backend, file)
    return backend


def _set_post_processor(backend: Backend, file: GGUFFile, special: dict[str, str], add_bos: bool) -> None:
    """Put the start and end token around a prompt where the file says so."""
    add_eos = bool(file.get("tokenizer.ggml.add_eos_token", False))
    for wanted, name in ((add_bos, "bos_token"), (add_eos, "eos_token")):
        if wanted and name not in special:
            raise ModelError(f"{file.path}: the tokenizer is to add a {name} but the file names none")
    start = [special["bos_token"]] if add_bos else []
    end = [special["eos_token"]] if add_eos else []
    if start or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end],
            pair=[*start, "$A", "$B:1", *end],
            special_tokens=[(token, backend.token_to_id(token)) for token in (*start, *end)],
        )


def _add_special_tokens(backend: Backend, file: GGUFFile) -> None:
    """Mark control tokens as special and user-defined ones as whole, both found in the text before anything else."""
    types = _types(file)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, found in zip(_tokens(file), types, strict=True)
                if found == kind
            ]
        )


def _tokens(file: GGUFFile) -> list[str]:
    return _required(file, "tokens")


def _types(file: GGUFFile) -> list[int]:
    types = _required(file, "token_type")
    if len(types) != len(_tokens(file)):
        raise ModelError(f"{file.path}: the tokenizer has {len(_tokens(file))} tokens but {len(types)} token types")
    return types


def _vocabulary(file: GGUFFile) -> dict[str, int]:
    tokens = _tokens(file)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError(f"{file.path}: the tokenizer holds {len(tokens) - len(vocabulary)} tokens twice")
    return vocabulary


def _required(file: GGUFFile, key: str) -> list[Any]:
    value = file.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value:
        raise ModelError(f"{file.path}: metadata tokenizer.ggml.{key} is missing")
    return value
