"""benchmarks/host_step.py fits the engine's core as it is now."""

from benchmarks import host_step


def test_every_part_of_a_decode_step_is_timed():
    found = host_step.measure(seqs=2, num_adapters=3, steps=150, temperature=0.0)
    assert found["decode_steps"] > 0
    parts = found["decode_ms"]
    assert parts.keys() == {
        "schedule",
        "build",
        "put",
        "forward",
        "sample",
        "fetch",
        "rest",
        "total",
        "delivery_thread",
    }
    assert all(value >= 0 for value in parts.values())
