"""Seeds, threads and the hypothesis profile of every test."""

import os
import tempfile
import zlib

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
os.environ["TNLAYERS_CACHE"] = tempfile.mkdtemp(prefix="tnlayers-test-")  # plans do not depend on this machine's file

settings.register_profile(
    "tnlayers",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tnlayers")


def _seed(request: pytest.FixtureRequest) -> int:
    """A number that depends on the test's name alone, so that a test draws the same alone and in the suite."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture(autouse=True)
def _global_seed(request):
    torch.manual_seed(_seed(request))


@pytest.fixture
def unchecked(request) -> None:
    """For tests that pass wrong types, or look at the stack: the shape-checked job puts its own refusals and frames."""
    if request.config.getoption("--jaxtyping-packages", default=None):
        pytest.skip("not under the shape checker")


@pytest.fixture
def rng(request) -> torch.Generator:
    """A generator of this test's own."""
    return torch.Generator().manual_seed(_seed(request) + 1)
