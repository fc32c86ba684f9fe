"""What the module's own `on_ranks` found, on two and on four ranks."""

import pytest

from tests.distributed.ranks import run


def found_on(size, request, tmp_path_factory):
    return run(request.module.on_ranks, size, size, str(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def two(request, tmp_path_factory):
    return found_on(2, request, tmp_path_factory)


@pytest.fixture(scope="module")
def four(request, tmp_path_factory):
    return found_on(4, request, tmp_path_factory)


@pytest.fixture(params=["two", "four"])
def ranks(request):
    return request.getfixturevalue(request.param)
