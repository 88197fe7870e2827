"""Rules for every test: in CI a skipped test is a failed test; what concerns connections between two pods of a node
runs with acceleration off and on.
"""

import os

import pytest


@pytest.fixture(scope="session", params=["direct", "native"])
def same_node(request: pytest.FixtureRequest) -> str:
    """The setting of that name. Whoever asks for it, a test or the world it lives in, runs twice."""
    return str(request.param)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turns a green run with skipped tests red where CI=true."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if reporter is not None and skipped and os.environ.get("CI") == "true" and session.exitstatus == 0:
        reporter.write_line(f"CI: {len(skipped)} test(s) skipped; a skipped test is a failed test", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
