"""Calls that schemathesis makes of the OpenAPI document: whatever is sent, no answer is an error of the server's."""

import json
import urllib.request

from hypothesis import HealthCheck, Phase, given, settings
import pytest
import schemathesis

EXAMPLES = 12  # of each call


@pytest.mark.filterwarnings("default")  # of schemathesis and what it brings along
def test_no_call_makes_the_server_fail(running):
    with running(max_answer_tokens=16) as server:
        base = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{base}/openapi.json") as response:
            document = json.load(response)
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):  # a name made at random would get no further than 404
                schema["properties"]["model"] = {"enum": ["tiny", "one", "nobody"]}
        operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
        assert len(operations) >= 15
        for operation in operations:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy())
            def attempt(case):
                answer = case.call(base_url=base, timeout=30)
                assert answer.status_code < 500, (case.method, case.path, case.body, answer.text)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"], (case.method, case.path)

            attempt()
        assert server.metric("slora_http_responses_total") >= len(operations) * EXAMPLES / 2
