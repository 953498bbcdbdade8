"""Our own OpenAPI description against the server: whatever fits it, and whatever does not."""

from __future__ import annotations

import serve_libraries  # noqa: F401  # isort: skip

import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from running_server import Running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402


def _try(server: Running, examples: int) -> int:
    """Send that many requests of each kind to each route; how many were sent."""
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    sent = 0
    phases = (Phase.explicit, Phase.generate)
    for found in description.get_all_operations():
        operation = found.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(
                max_examples=examples,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
                phases=phases,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                nonlocal sent
                sent += 1
                answer = case.call(timeout=120)
                assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text
                # Settings that exclude each other, or that a model does not take, are more than a description can say.
                case.validate_response(answer, excluded_checks=[positive_data_acceptance])
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                    assert "Traceback" not in answer.text

            with contextlib.suppress(Unsatisfiable):  # a route without parameters can be asked in one way only
                one()
    assert server.count("fastgen_failures_total", code="internal") == 0
    return sent


def test_a_few_requests_that_the_description_allows_or_not_cause_no_server_error(server: Running) -> None:
    assert _try(server, 12) >= 60


@pytest.mark.slow
def test_thousands_of_requests_cause_no_server_error(server: Running) -> None:
    assert _try(server, 400) >= 2000
