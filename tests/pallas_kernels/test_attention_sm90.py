"""The Hopper attention kernels against float64: interpreted, lowered to CUDA, and (marked gpu) on the machine."""

import jax
from jax import numpy as jnp
import numpy as np
from oracles import attention, fill_kv, relative_error
import pytest

from pallas_kernels.geometry import PAGE_TOKENS, Geometry, ceil_div
from pallas_kernels.paged_attention import decode_schedule as schedule
from pallas_kernels.paged_attention import prefill_sm90 as prefill
from pallas_kernels.paged_attention.config import DecodeConfig, PrefillConfig
from pallas_kernels.paged_attention.decode_sm90 import decode_sm90, unsupported
from pallas_kernels.paged_attention.mixed_sm90 import mixed_sm90


def geometry(heads, kv_heads, dim, layers=2):
    return Geometry(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        in_sizes=(64,) * 7,
        out_sizes=(heads * dim, kv_heads * dim, kv_heads * dim, 64, 64, 64, 64),
    )


class Batch:
    """Sequences of `lens` tokens whose last `queries` are asked about, in random pages of a pool full of NaN. shared:
    pages with which all begin; each has at least as many.
    """

    def __init__(self, g, lens, queries, seed=0, layer=1, padding=2, dtype=jnp.bfloat16, max_pages=None, shared=0):
        rng = np.random.default_rng(seed)
        need = [ceil_div(n, PAGE_TOKENS) for n in lens]
        num_pages = sum(need) + 3
        free = list(rng.permutation(num_pages))
        pages = np.full((g.num_layers, num_pages, g.page_elements), np.nan, np.float32)
        tables = rng.integers(0, num_pages, (len(lens), max_pages or max(need) + 1)).astype(np.int32)
        self.geometry, self.layer, self.lens, self.queries = g, layer, lens, queries
        self.q_start = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        shape = (int(self.q_start[-1]) + padding, g.num_heads, g.head_dim)
        self.q = jnp.asarray(rng.standard_normal(shape), dtype)
        self.kvs = []
        for b, n in enumerate(lens):
            tables[b, : need[b]] = [free.pop() for _ in range(need[b])]
            kv = jnp.asarray(rng.standard_normal((2, n, g.num_kv_heads, g.head_dim)), dtype).astype(jnp.float32)
            k, v = np.array(kv)
            if b:
                tables[b, :shared] = tables[0, :shared]
                k[: shared * PAGE_TOKENS], v[: shared * PAGE_TOKENS] = (x[: shared * PAGE_TOKENS] for x in self.kvs[0])
            fill_kv(pages, layer, tables[b], k, v, g)
            self.kvs.append((k, v))
        self.pages, self.tables = jnp.asarray(pages, dtype), tables

    def args(self):
        kv_lens = np.asarray(self.lens, np.int32)
        return self.q, self.pages, jnp.asarray(self.tables), jnp.asarray(self.q_start), jnp.asarray(kv_lens)

    def kwargs(self):
        return dict(layer=self.layer, geometry=self.geometry, sm_scale=self.geometry.head_dim**-0.5)

    def expected(self, window=None, cap=None):
        """Float64 result, and which rows belong to a sequence with 1 token / with several."""
        want = np.zeros(self.q.shape)
        one, several = (np.zeros(len(want), bool) for _ in range(2))
        q = np.asarray(self.q, np.float64)
        for b, (k, v) in enumerate(self.kvs):
            rows = slice(self.q_start[b], self.q_start[b + 1])
            if self.queries[b]:
                want[rows] = attention(q[rows], k, v, self.geometry.head_dim**-0.5, window, cap)
                (one if self.queries[b] == 1 else several)[rows] = True
        return want, one, several


def check_decode(g, lens, *, queries=None, window=None, cap=None, shared=0, **options):
    batch = Batch(g, lens, queries or [min(n, 1) for n in lens], shared=shared)
    run = jax.jit(lambda *a: decode_sm90(*a, **batch.kwargs(), sliding_window=window, soft_cap=cap, **options))
    got = np.asarray(run(*batch.args()), np.float64)
    want, one, _ = batch.expected(window, cap)
    assert relative_error(got[one], want[one]) < 1e-2
    assert not np.any(got[batch.q_start[-1] :]), "padding rows are zero"
    return got


def check_prefill(g, lens, queries, *, window=None, cap=None, padding=2, skip_decode=False, **options):
    batch = Batch(g, lens, queries, padding=padding)
    kwargs = batch.kwargs() | dict(sliding_window=window, soft_cap=cap, skip_decode=skip_decode) | options
    run = jax.jit(lambda *a: prefill.prefill_sm90(*a, **kwargs))
    got = np.asarray(run(*batch.args()), np.float64)
    want, one, several = batch.expected(window, cap)
    rows = several if skip_decode else one | several
    assert relative_error(got[rows], want[rows]) < 1e-2
    assert not np.any(got[batch.q_start[-1] :]), "padding rows are zero"


SMALL = DecodeConfig(stages=2, unsplit=64, min_split=64, max_splits=4)


@pytest.mark.parametrize(
    "heads, kv_heads, dim, lens, options",
    [
        (8, 4, 64, [5, 0, 200, 64], {}),
        (16, 2, 128, [130, 17], dict(window=50, cap=20.0)),
        (6, 2, 128, [130, 300], {}),
        (8, 4, 64, [100, 40, 64], dict(shared=2)),
    ],
)
def test_decode_interpreted(monkeypatch, heads, kv_heads, dim, lens, options):
    monkeypatch.setattr(schedule, "sm_count", lambda: 1)
    check_decode(geometry(heads, kv_heads, dim), lens, config=SMALL, interpret=True, **options)


@pytest.mark.parametrize(
    "heads, kv_heads, dim, lens, queries, options",
    [
        (2, 1, 64, [150, 0, 70, 20], [3, 0, 70, 1], {}),
        (2, 2, 128, [80], [75], dict(window=50, cap=20.0)),
    ],
)
def test_prefill_interpreted(heads, kv_heads, dim, lens, queries, options):
    config = PrefillConfig(block_kv=64)
    check_prefill(geometry(heads, kv_heads, dim), lens, queries, config=config, interpret=True, **options)


@pytest.mark.parametrize("seed", range(20))
def test_schedule_gives_each_item_to_one_worker(seed):
    rng = np.random.default_rng(seed)
    num_seqs, workers, kv_heads = rng.integers(1, 20), int(rng.integers(1, 40)), int(rng.choice([1, 2, 8]))
    counts = rng.choice([0, 1, 1, 1, 5], num_seqs)
    q_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lens = np.where(counts > 0, rng.integers(1, 4000, num_seqs), 0).astype(np.int32)
    options = dict(num_workers=workers, kv_heads=kv_heads, block=64, min_split=256, unsplit=512)
    options |= dict(max_splits=int(rng.choice([1, 4, 32])), sliding_window=[None, 100][seed % 2])
    pages = jnp.zeros((num_seqs, 250), jnp.int32)
    tables = schedule.decode_schedule(jnp.asarray(q_start), jnp.asarray(lens), pages, **options)
    seqs, shares = (np.asarray(x) for x in tables)
    assert np.all((seqs[:, schedule.SPLITS] > 0) == ((counts == 1) & (lens > 0)))
    got, loads = [], []
    for seq, item, count, _ in shares:
        loads.append(0)
        for _ in range(count):
            got.append((seq, item))
            per, blocks = seqs[seq, schedule.PER_SPLIT], seqs[seq, schedule.BLOCKS]
            loads[-1] += schedule.ITEM_COST + min(per, blocks - item // kv_heads * per)
            item += 1
            if item == seqs[seq, schedule.SPLITS] * kv_heads:
                seq, item = seqs[seq, schedule.NEXT], 0
    assert got == [(b, i) for b in range(num_seqs) for i in range(seqs[b, schedule.SPLITS] * kv_heads)]
    assert max(loads) <= sum(loads) / workers + max(seqs[:, schedule.PER_SPLIT]) + schedule.ITEM_COST + 1


def test_schedule_knows_what_neighbours_share():
    pages = jnp.array([[7, 8, 9], [7, 8, 1], [7, 2, 1], [3, 4, 5], [3, 4, 5], [6, 4, 5]], jnp.int32)
    options = dict(num_workers=2, kv_heads=1, block=64, min_split=256, unsplit=512, max_splits=1, sliding_window=None)

    def shared(pages):
        lens = jnp.full(len(pages), 48)
        seqs, _ = schedule.decode_schedule(jnp.arange(len(pages) + 1), lens, pages, **options)
        return seqs[:, schedule.SHARED].tolist()

    assert shared(pages) == [2, 2, 1, 3, 3, 0]
    assert shared(pages[:1]) == [0]


NAMED = [(32, 32, 128), (32, 8, 128), (32, 4, 64), (16, 1, 256), (12, 4, 128), (64, 8, 128)]


@pytest.mark.parametrize("heads, kv_heads, dim", NAMED)
def test_decode_lowers_to_cuda(heads, kv_heads, dim):
    g = geometry(heads, kv_heads, dim)
    assert unsupported(g, jnp.bfloat16) is None
    s = jax.ShapeDtypeStruct
    shapes = s((64, heads, dim), jnp.bfloat16), s((2, 512, g.page_elements), jnp.bfloat16)
    run = jax.jit(lambda *a: decode_sm90(*a, layer=1, geometry=g, sm_scale=0.1))
    for max_pages, launches in ((64, 1), (128, 2)):  # contexts of up to 1024 tokens need no merging
        ints = s((64, max_pages), jnp.int32), s((65,), jnp.int32), s((64,), jnp.int32)
        text = run.trace(*shapes, *ints).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu_v2") == launches


@pytest.mark.parametrize("heads, kv_heads, dim", NAMED)
def test_prefill_lowers_to_cuda(heads, kv_heads, dim):
    g = geometry(heads, kv_heads, dim)
    assert prefill.unsupported(g, jnp.bfloat16) is None
    s = jax.ShapeDtypeStruct
    shapes = s((512, heads, dim), jnp.bfloat16), s((2, 512, g.page_elements), jnp.bfloat16)
    ints = s((4, 64), jnp.int32), s((5,), jnp.int32), s((4,), jnp.int32)
    run = jax.jit(lambda *a: prefill.prefill_sm90(*a, layer=1, geometry=g, sm_scale=0.1))
    assert "@mosaic_gpu_v2" in run.trace(*shapes, *ints).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "g, dtype, reason",
    [
        (geometry(32, 8, 80), jnp.bfloat16, "head_dim"),
        (geometry(32, 8, 128), jnp.float32, "float32"),
        (geometry(32, 1, 128), jnp.bfloat16, "16 query heads"),
    ],
)
def test_unsupported_says_why(g, dtype, reason):
    assert reason in unsupported(g, dtype)


CONFIGS = [DecodeConfig(block_kv=128, blocks_per_sm=1), DecodeConfig(unsplit=64, min_split=256, max_splits=2)]
LENS = [1, 16, 17, 0, 511, 512, 513, 1024, 3000, 64, 63, 65, 128, 5000]


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads, dim", [*NAMED, (8, 2, 64), (14, 2, 128), (16, 1, 128), (5, 5, 128)])
@pytest.mark.parametrize("options", [{}, dict(window=100), dict(cap=15.0), dict(window=600, cap=30.0)])
def test_decode_on_gpu(heads, kv_heads, dim, options):
    check_decode(geometry(heads, kv_heads, dim), LENS, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_heads", [8, 32])
def test_decode_of_shared_pages_on_gpu(kv_heads, window):
    check_decode(geometry(32, kv_heads, 128), [600, 49, 64, 1500, 3000, 200], shared=3, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_decode_configs_on_gpu(config):
    check_decode(geometry(32, 8, 128), LENS, config=config)


CHUNKS = [(1, 1), (16, 3), (17, 17), (0, 0), (600, 64), (600, 65), (1000, 127), (300, 300), (5000, 1), (2000, 900)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads, dim", [*NAMED, (8, 2, 64), (14, 2, 128), (16, 1, 128), (5, 5, 128)])
@pytest.mark.parametrize("options", [{}, dict(window=100), dict(cap=15.0), dict(window=600, skip_decode=True)])
def test_prefill_on_gpu(heads, kv_heads, dim, options):
    check_prefill(geometry(heads, kv_heads, dim), *zip(*CHUNKS, strict=True), padding=77, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads, dim", [(32, 32, 128), (32, 8, 128), (8, 2, 64)])
def test_mixed_on_gpu(heads, kv_heads, dim):
    ordered = sorted(CHUNKS, key=lambda c: c[1])
    batch = Batch(geometry(heads, kv_heads, dim), *zip(*ordered, strict=True), padding=9)
    run = jax.jit(lambda *a: mixed_sm90(*a, **batch.kwargs()))
    got = np.asarray(run(*batch.args()), np.float64)
    want, _, _ = batch.expected()
    assert relative_error(got, want) < 1e-2
    decode = jax.jit(lambda *a: decode_sm90(*a, **batch.kwargs()))(*batch.args())
    ones = [batch.q_start[b] for b, n in enumerate(batch.queries) if n == 1]
    np.testing.assert_array_equal(got[ones], np.asarray(decode, np.float64)[ones])


@pytest.mark.gpu
def test_prefill_does_not_depend_on_batch_chunking_or_pages():
    g = geometry(32, 8, 128)
    batch = Batch(g, *zip(*CHUNKS, strict=True))
    q, pages, tables, q_start, lens = batch.args()
    run = jax.jit(lambda *a: prefill.prefill_sm90(*a, **batch.kwargs()))
    got = np.asarray(run(q, pages, tables, q_start, lens))
    np.testing.assert_array_equal(got, np.asarray(run(q, pages, tables, q_start, lens)))
    move = np.random.default_rng(0).permutation(pages.shape[1])
    moved = jnp.zeros_like(pages).at[:, move].set(pages)
    for b, (_, n) in enumerate(CHUNKS):
        first = int(q_start[b])
        for begin, end in ((0, n), (n // 3, n), (0, n // 2)):  # whole, its end, its beginning
            if end > begin:
                alone = run(
                    q[first + begin : first + end],
                    moved,
                    move[tables[b]][None],
                    jnp.array([0, end - begin]),
                    lens[b][None] - (n - end),
                )
                np.testing.assert_array_equal(got[first + begin : first + end], np.asarray(alone))


@pytest.mark.gpu
def test_decode_skips_chunks_on_gpu():
    check_decode(geometry(32, 8, 128), [40, 700, 300, 9], queries=[1, 1, 7, 2])


@pytest.mark.gpu
def test_decode_is_batch_invariant_and_repeatable():
    g = geometry(32, 8, 128)
    rng = np.random.default_rng(0)
    batch = Batch(g, LENS, [min(n, 1) for n in LENS])
    q, pages, tables, q_start, lens = batch.args()
    run = jax.jit(lambda *a: decode_sm90(*a, **batch.kwargs()))
    got = np.asarray(run(q, pages, tables, q_start, lens))
    for _ in range(3):
        np.testing.assert_array_equal(got, np.asarray(run(q, pages, tables, q_start, lens)))
    # each sequence alone, its pages elsewhere
    move = rng.permutation(pages.shape[1])
    moved = jnp.zeros_like(pages).at[:, move].set(pages)
    for b, n in enumerate(LENS):
        if n:
            row = q_start[b]
            alone = run(q[row][None], moved, move[tables[b]][None], jnp.array([0, 1]), lens[b][None])
            np.testing.assert_array_equal(got[row], np.asarray(alone[0]))
