"""Tests that need root: commands enter network namespaces, which must not happen to the process of the tests."""

import pytest

from tests.conftest import Run


@pytest.fixture(scope="session")
def run(run_process: Run) -> Run:
    """Run a command of ours in a process of its own."""
    return run_process
