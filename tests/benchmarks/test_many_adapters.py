"""benchmarks/many_adapters.py on a tiny model."""

import json

from benchmarks import many_adapters


def test_every_request_is_answered(tmp_path):
    out = tmp_path / "out.json"
    arguments = "--shape tiny-gqa --adapters 5 --requests 8 --prompt 4,9 --answer 2,5 --dtype float32 --max-seqs 4"
    result = many_adapters.main([*arguments.split(), "--ranks", "4,8", "--json", str(out)])
    assert result["ok"] and 1 < result["adapter_loads"] <= 5 and result["pages"]["free"] > 0
    assert 8 * 2 <= result["answer_tokens"] < 8 * 5
    assert json.loads(out.read_text())["requests_per_second"] == result["requests_per_second"] > 0
