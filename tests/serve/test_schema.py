"""The server does what its OpenAPI description says, by schemathesis."""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = 6
NOT_CHECKED = []


@pytest.fixture(scope="module")
def schema(served):
    try:
        import schemathesis
    except ImportError:
        message = "needs schemathesis: launch/install.sh test"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    checks = pytest.importorskip("schemathesis.specs.openapi.checks")
    # No schema of JSON says what an image is, or a list as long as its shape says.
    NOT_CHECKED.append(checks.positive_data_acceptance)
    return schemathesis.openapi.from_url(f"{served.url}openapi.json")


def test_every_operation_answers_as_described(schema):
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 12
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case):
            case.call_and_validate(excluded_checks=NOT_CHECKED)

        check()
