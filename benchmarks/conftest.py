"""Timing of the operators' cases by pytest-benchmark: every peer on every case, those of one case back to back.

A module of tests says which cases (CASES, and TINY ones that show that all runs), how they are made and checked (make),
and whom to time (PEERS). ``pcafast bench`` runs them and shows the tables; its file says with which options.
"""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="of torch")
    parser.addoption("--tiny", action="store_true", help="small inputs, only to see that everything runs")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("threads"))


def pytest_generate_tests(metafunc):
    module = metafunc.module
    cases = module.TINY if metafunc.config.getoption("tiny") else module.CASES
    metafunc.parametrize("case", cases, ids=str, indirect=True, scope="module")
    metafunc.parametrize("peer", module.PEERS)


@pytest.fixture(scope="module")
def case(request):
    return request.module.make(*request.param)


@pytest.fixture
def measure(case, peer, benchmark):
    """Times the peer."""

    def measure():
        if peer in case.absent:
            pytest.skip(f"{peer}: {case.absent[peer]}")
        benchmark.group = f"{case.operator} {case.inputs}"
        benchmark.extra_info.update(operator=case.operator, peer=peer, inputs=case.inputs, absent=case.absent)
        if peer in case.multiply_adds:
            benchmark.extra_info["multiply_adds"] = case.multiply_adds[peer]
        benchmark(case.calls[peer])

    return measure
