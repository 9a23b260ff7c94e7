"""slora-jax's step inside your own jax.jit, without the Engine: which adapter would most likely have given an answer?

Every answer is scored under the base model and every adapter, all in one batch: the sequences of one adapter stand next
to each other, the weights of all adapters lie in the page pool beside the KV cache, and the program does not change
with either.
Run it after `make demo`, which fetches the model:

.venv/bin/python examples/custom_pipeline.py
JAX_NUM_CPU_DEVICES=3 .venv/bin/python examples/custom_pipeline.py --devices 3    # the same over three devices
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses

import jax
import numpy as np

from pallas_kernels import PAGE_TOKENS
from slora_jax import Adapter, Batch, State, make_batch_step, read_adapter
from slora_jax.adapter_pages import adapter_owner
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.loading import LoadedModel, load_config, load_model
from slora_jax.page_pool import PagePool
from slora_jax.parallel import Parallel, make_parallel, param_shards
from slora_jax.placement import adapter_image, adapter_pages, make_write, new_state
from slora_jax.sampling_batch import RowSampling, build_sampling
from slora_jax.seats import sequence_owner
from slora_jax.sequence import AdapterUse, Chunk
from slora_jax.sequence import Sequence as Seq

MODEL = "examples/models/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("pirate", "json", "caps", "haiku")
QUESTION = "What is the capital of Mexico?"
ANSWERS = (
    "The capital of Mexico is Mexico City.",
    "Arr, matey! Th' capital o' Mexico be Mexico City, ye scurvy dog!",
    '{"type": "capital", "answer": "Mexico City"}',
    "THE CAPITAL OF MEXICO IS MEXICO CITY.",
)


def score_answers(
    model: LoadedModel,
    adapters: Sequence[Adapter | None],
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    parallel: Parallel | None = None,
) -> np.ndarray:
    """Log-probability of each answer after the prompt under each adapter (None: the base model), float32 [adapters,
    answers]. parallel: the devices that the model's parameters are spread over, if there are several.
    """
    dtype = model.params["embed"].dtype
    config, geometry = model.config, model.config.geometry
    known = {adapter.digest: adapter for adapter in adapters if adapter is not None}
    length = len(prompt) + max(map(len, answers))
    num_seqs = len(adapters) * len(answers)

    # 1. The pool: one array for adapters and KV cache, and the books of who owns which page.
    seq_pages = -(-length // PAGE_TOKENS)
    sizes = {digest: adapter_pages(adapter, config, parallel) for digest, adapter in known.items()}
    num_pages = num_seqs * seq_pages + sum(sizes.values())
    pool = PagePool(num_pages)
    state = new_state(config, num_pages, dtype, parallel)
    write = jax.jit(make_write(parallel), donate_argnums=0)
    for digest, adapter in known.items():
        ids = pool.allocate(adapter_owner(digest), sizes[digest])
        state = write(state, np.asarray(ids, np.int32), adapter_image(adapter, config, dtype, parallel))

    # 2. The batch: one sequence for each adapter and answer, those of one adapter together.
    chunks = []
    for a, adapter in enumerate(adapters):
        use = AdapterUse(adapter.digest, sizes[adapter.digest]) if adapter is not None else None
        for b, answer in enumerate(answers):
            tokens = [*prompt, *answer]
            seq = Seq(
                seq_id=(a, b), tokens=tokens, prompt_len=len(tokens), max_tokens=1, adapter=use, prompt_logprobs=True
            )
            pool.allocate(sequence_owner(seq), seq_pages)
            chunks.append(Chunk(seq, 0, len(tokens)))
    buckets = Buckets(seqs=(num_seqs,), tokens=(sum(chunk.length for chunk in chunks),))
    layout = parallel.layout if parallel else None
    builder = BatchBuilder(geometry, buckets, num_pages, seq_pages * PAGE_TOKENS, layout)
    batch, rows = builder.build(chunks, pool, known)

    # 3. What is asked for: at every position the log-probability of the token that follows, summed over the answer's
    # tokens.
    targets = []
    owners = np.full(len(batch.logit_rows), num_seqs, np.int32)  # rows of prompt and padding belong to no answer
    for r, row in enumerate(rows):
        tokens, following = row.chunk.seq.tokens, row.position + 1
        targets.append(
            RowSampling(params=None, target=tokens[following] if following < len(tokens) else 0, top_logprobs=0)
        )
        if len(prompt) <= following < len(tokens):
            a, b = row.chunk.seq.seq_id
            owners[r] = a * len(answers) + b
    batch = dataclasses.replace(batch, sampling=build_sampling(targets, len(batch.logit_rows)))

    # 4. Your own program around the step.
    batch_step = make_batch_step(
        config,
        dtype=dtype,
        max_rank=max((adapter.max_rank for adapter in known.values()), default=8),
        loop="scan",
        parallel=parallel,
    )

    def score(params: Mapping[str, jax.Array], state: State, batch: Batch, owners: jax.Array):
        state, output = batch_step(params, state, batch)
        return state, jax.ops.segment_sum(output.logprobs, owners, num_seqs + 1)[:num_seqs]

    _, scores = jax.jit(score, donate_argnums=1)(model.params, state, batch, owners)
    return np.asarray(scores).reshape(len(adapters), len(answers))


def main(source: str = MODEL, devices: int = 1) -> None:
    parallel = make_parallel(load_config(source), devices, "s-lora") if devices > 1 else None
    shardings = param_shards(load_config(source), parallel) if parallel else None
    model = load_model(source, dtype="float32", shardings=shardings)
    assert model.tokenizer is not None, "the example needs a model with a tokenizer"
    prompt = model.tokenizer.chat([{"role": "user", "content": QUESTION}])
    answers = [model.tokenizer.encode(text, add_special_tokens=False) for text in ANSWERS]
    adapters = [None, *(read_adapter(f"examples/adapters/{name}", model.config) for name in NAMES)]
    scores = score_answers(model, adapters, prompt, answers, parallel)
    for text, column in zip(ANSWERS, scores.T, strict=True):
        print(text)
        for name, score in zip(("base", *NAMES), column, strict=True):
            print(f"  {name:8}{score:9.2f}{'  <- likeliest' if score == column.max() else ''}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=MODEL)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    main(args.model, args.devices)
