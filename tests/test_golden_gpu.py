"""The golden answers in bfloat16 on a GPU, through the whole engine."""

from golden import ROWS, make_engine, requests
import pytest

from slora_jax import Request, SamplingParams

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["auto", "xla"])
def engine(smollm2_gguf, request):
    """Two programs to compile, for the kernels that this GPU gets and for plain XLA."""
    settings = dict(max_seqs=256, max_step_tokens=2048, seq_buckets=(256,), token_buckets=(2048,))
    settings |= dict(page_pool_bytes=4 << 30, loop="scan", implementation=request.param)
    with make_engine(smollm2_gguf, "bfloat16", **settings) as engine:
        yield engine


def test_teacher_forced_tokens_agree_with_float32(engine):
    """Every step of every row as a request of its own whose prompt is the reference's text so far."""
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    steps = [(name, row, i) for name, row in ROWS for i in range(32)]
    outputs = engine.generate(
        [Request(None, n, params, row["prompt_token_ids"] + row["output_token_ids"][:i]) for n, row, i in steps]
    )
    differ = [
        (name or "base", row["name"], i, row["gaps"][i])
        for (name, row, i), output in zip(steps, outputs, strict=True)
        if output.token_ids[0] != row["output_token_ids"][i]
    ]
    print(f"\ntop-1 agreement {1 - len(differ) / len(steps):.4f} of {len(steps)} positions; differing:")
    for adapter, prompt, i, gap in differ:
        print(f"  {adapter}/{prompt} step {i}: gap of the reference {gap:.3f}")
    assert len(differ) <= 0.03 * len(steps)
    assert all(gap < 0.6 for *_, gap in differ)


def test_decoding_follows_the_reference_until_a_near_tie(engine):
    """Greedy decoding with the cache; an answer may leave the reference only where its two best logits are close."""
    outputs = engine.generate(requests())
    same = 0
    for (name, row), output in zip(ROWS, outputs, strict=True):
        pairs = zip(output.token_ids, row["output_token_ids"], strict=True)
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        same += step is None
        assert step is None or row["gaps"][step] < 0.6, f"{name or 'base'}/{row['name']} leaves at step {step}"
    print(f"\n{same} of {len(ROWS)} greedy answers are the reference's, token by token")
    engine.check_integrity()
