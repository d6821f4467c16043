"""The served OpenAPI document, fuzzed: no 500, and nothing that the document does not say."""

import pytest
from serving import served

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import checks  # noqa: E402
from schemathesis.specs.openapi import checks as openapi  # noqa: E402

from bon import BestOfN  # noqa: E402
from bon.engines.scripted import ScriptedEngine  # noqa: E402

CHECKS = (
    checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.negative_data_rejection,
)


def fuzz(examples):
    """Send that many generated requests to each operation; half of them break the schema."""
    with served(BestOfN(ScriptedEngine(), "flip", n=2, sampling={"max_tokens": 20}), max_n=8) as site:
        schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
        sent = {}
        for found in schema.get_all_operations():
            operation = found.ok()

            def send(case, label=operation.label):
                sent[label] = sent.get(label, 0) + 1
                case.call_and_validate(checks=CHECKS, timeout=30)

            strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
            if operation.method == "post":
                strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
            run(strategy, send, examples if operation.method == "post" else 2)
        assert site.server.admission.running == 0
    return sent


def run(strategy, send, examples):
    @settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def check(case):
        send(case)

    check()


def test_generated_requests_get_what_the_document_promises():
    sent = fuzz(30)
    posts = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/score", "POST /v1/rerank"}
    assert posts | {"GET /v1/models", "GET /ready"} <= set(sent)


@pytest.mark.slow
def test_two_thousand_generated_requests_get_what_the_document_promises():
    assert sum(fuzz(1000).values()) >= 2000
