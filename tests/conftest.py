import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device there is; on a machine with a GPU the same tests run on both."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
