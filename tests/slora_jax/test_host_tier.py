"""The budget of host memory, and the loader that fills it."""

import queue

from adapter_files import CONFIG
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from slora_jax.adapter_loader import AdapterLoader
from slora_jax.adapters import AdapterReader, random_adapter, save_adapter
from slora_jax.host_tier import HostTier
from slora_jax.placement import HostImages
from slora_jax.registry import AdapterRecord


@given(
    st.lists(
        st.tuples(st.sampled_from(["reserve", "fill", "drop", "touch"]), st.integers(0, 5), st.sets(st.integers(0, 5)))
    )
)
def test_the_budget_holds_and_the_least_recently_used_leave(calls):
    tier, sizes = HostTier(10), [1, 2, 3, 4, 5, 6]
    order: list[int] = []  # of what is there, the least recently used first
    filled: set[int] = set()
    for call, key, keep in calls:
        if call == "reserve" and key not in tier:
            room, out = 10 - sum(sizes[k] for k in order), []
            for other in order:
                if room < sizes[key] and other in filled and other not in keep:
                    out.append(other)
                    room += sizes[other]
            assert tier.reserve(key, sizes[key], keep) == (room >= sizes[key])
            if room >= sizes[key]:
                order = [k for k in order if k not in out] + [key]
                filled -= set(out)
        elif call == "fill" and key in tier:
            tier.fill(key, key, f"image {key}")
            order = [k for k in order if k != key] + [key]
            filled.add(key)
        elif call == "drop":
            tier.drop(key)
            order, filled = [k for k in order if k != key], filled - {key}
        elif call == "touch" and key in tier:
            tier.touch(key)
            order = [k for k in order if k != key] + [key]
        tier.check_integrity()
        assert {k for k in range(6) if k in tier} == set(order)
        assert tier.keys() == filled and all(tier.get(k) == f"image {k}" for k in filled)
        assert tier.used == sum(sizes[k] for k in order)


def test_the_same_image_under_two_keys_is_kept_once():
    tier = HostTier(10)
    assert tier.reserve("file a", 4, ()) and tier.reserve("file b", 4, ())
    tier.fill("file a", "weights", "image")
    tier.fill("file b", "weights", "the same")
    assert tier.used == 4 and tier.get("weights") == "image" and len(tier) == 1
    tier.fill("gone", "other", "image")  # its place was dropped meanwhile
    assert tier.used == 4 and "other" not in tier
    with pytest.raises(ValueError, match="has a place"):
        tier.reserve("weights", 1, ())
    with pytest.raises(ValueError, match="at least 1 byte"):
        HostTier(0)


class Loader:
    """An AdapterLoader whose reads are waited for."""

    def __init__(self, adapters=1.0, config=CONFIG):
        self.images = HostImages(config, np.float32, 2)
        self.reader = AdapterReader(config)
        self.woken: queue.SimpleQueue = queue.SimpleQueue()
        one = self.images.nbytes(random_adapter(config, 4))
        self.loader = AdapterLoader(int(adapters * one), self.images, self.reader, lambda: self.woken.put(None))

    def outcomes(self, count):
        for _ in range(count):
            self.woken.get(timeout=30)
        got = list(self.loader.finished())
        self.loader.tier.check_integrity()
        return got

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.loader.close()


def test_images_in_chunks_are_the_whole_image(tmp_path):
    adapter = random_adapter(CONFIG, 64, seed=3)
    whole = adapter.image(CONFIG.geometry, np.float32)
    images = HostImages(CONFIG, np.float32, 4)
    image = images.make(adapter)
    assert image.nbytes == images.nbytes(adapter) == whole.nbytes and len(whole) > 5
    assert [c.shape[0] for c in image.chunks[:2]] == [4, 4]
    np.testing.assert_array_equal(np.concatenate([np.asarray(c) for c in image.chunks]), whole)
    np.testing.assert_array_equal(np.asarray(images.to_device(image.chunks[0])), whole[:4])
    assert [at for at, _ in image.between(4, 8)] == [4]
    assert images.zeros(2).shape == (2, *whole.shape[1:])


def test_files_are_read_on_other_threads_and_named_by_their_contents(tmp_path):
    adapter = random_adapter(CONFIG, 4)
    with Loader(3) as it:
        records = [AdapterRecord(it.reader.check(save_adapter(adapter, tmp_path / name))) for name in "ab"]
        it.loader.want(records)
        got = it.outcomes(2)
        assert {o.digest for o in got} == {adapter.digest} and not any(o.error for o in got)
        assert len(it.loader.tier) == 1 and it.loader.tier.used == it.images.nbytes(adapter)
        for record in records:
            record.digest, record.weights_digest = adapter.digest, adapter.weights_digest
            assert it.loader.is_ready(record)
        it.loader.want(records)  # nothing is read again
        assert it.loader.counters["reads"] == 2 and it.woken.empty()


def test_the_most_urgent_come_first_and_are_not_evicted_by_others():
    adapters = [AdapterRecord(random_adapter(CONFIG, 4, seed=i)) for i in range(3)]
    a, b, c = adapters
    with Loader(2.5) as it:
        it.loader.want(adapters)
        it.outcomes(2)
        assert [it.loader.is_ready(r) for r in adapters] == [True, True, False]
        it.loader.want([b, c, a])
        it.outcomes(1)
        assert [it.loader.is_ready(r) for r in adapters] == [False, True, True]
        assert it.loader.tier.evictions == 1
        it.loader.forget(b.weights_digest)
        assert not it.loader.is_ready(b)


@pytest.mark.parametrize("change", ["weights", "config", "gone", "kept_time", "nan"])
def test_files_that_changed_are_never_taken_for_what_they_were(tmp_path, change):
    path = save_adapter(random_adapter(CONFIG, 4), tmp_path / "a")
    with Loader(2) as it:
        record = AdapterRecord(it.reader.check(path))
        weights, settings = path / "adapter_model.safetensors", path / "adapter_config.json"
        before = weights.stat()
        if change == "weights":
            save_adapter(random_adapter(CONFIG, 4, seed=1), path)
        elif change == "config":
            settings.write_text(settings.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 9.0'))
        elif change == "gone":
            weights.unlink()
        elif change == "kept_time":  # somebody sets the old time again, after the first read
            it.loader.want([record])
            (outcome,) = it.outcomes(1)
            record.digest, record.weights_digest = outcome.digest, outcome.weights_digest
            it.loader.forget(outcome.weights_digest)
        if change in ("kept_time", "nan"):
            data = bytearray(weights.read_bytes())
            data[-4:] = np.float32(np.nan if change == "nan" else 1).tobytes()
            weights.write_bytes(data)
            import os

            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        it.loader.want([record])
        (outcome,) = it.outcomes(1)
        words = {"gone": "no adapter_model.safetensors in it", "nan": "holds NaN"}.get(change, "have changed since")
        assert words in outcome.error and outcome.error.startswith(str(path)) and "\n" not in outcome.error
        assert len(it.loader.tier) == 0 and it.loader.tier.used == 0
        assert it.loader.counters["failures"] == 1


def test_an_error_nobody_thought_of_ends_that_read_alone(monkeypatch, caplog):
    good, bad = (AdapterRecord(random_adapter(CONFIG, 4, seed=i)) for i in range(2))
    with Loader(3) as it:
        make = it.images.make

        def failing(adapter):
            if adapter is bad.contents:
                raise MemoryError("no more")
            return make(adapter)

        monkeypatch.setattr(it.images, "make", failing)
        it.loader.want([bad, good])
        outcomes = {o.record: o.error for o in it.outcomes(2)}
        assert outcomes == {bad: "cannot be loaded (MemoryError: no more)", good: None}
        assert it.loader.is_ready(good) and it.loader.tier.used == it.images.nbytes(good.shape)


def test_a_full_pinned_memory_is_told_once_and_done_without(monkeypatch, caplog):
    import jax

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: pinned")

    adapter = random_adapter(CONFIG, 4)
    images = HostImages(CONFIG, np.float32, 1)
    monkeypatch.setattr(jax, "block_until_ready", full)
    image = images.make(adapter)
    assert all(isinstance(chunk, np.ndarray) for chunk in image.chunks) and len(image.chunks) > 1
    assert caplog.text.count("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB") == 1
