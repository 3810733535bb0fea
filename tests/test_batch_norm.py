import copy

import pytest
import torch
from torch import nn

from pcafast.apply import reestimate_batch_norm
from pcafast.errors import ArgumentError, PcafastError


class _Shifted(nn.Module):
    """A batch norm behind an affine layer and dropout, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Conv2d(3, 3, 1)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(3, momentum=0.3)
        self.unused = nn.BatchNorm2d(2)
        nn.init.constant_(self.unused.running_mean, 7.0)

    def forward(self, x):
        return self.norm(self.drop(self.scale(x)))


@pytest.mark.parametrize("new_share", [0.25, 1.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_statistics_move_to_the_averages_over_the_batches(labelled, new_share):
    torch.manual_seed(0)
    model = _Shifted()  # its norm starts with mean 0 and variance 1
    batches = [torch.randn(n, 3, 5, 5) for n in (4, 4, 6)]
    with torch.no_grad():
        seen = [model.scale(batch).double() for batch in batches]
    given = [(batch, torch.zeros(len(batch))) for batch in batches] if labelled else batches
    reestimate_batch_norm(model, given, new_share=new_share)
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model.norm.running_mean.double(), new_share * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var.double(), 1 + new_share * (variance - 1), rtol=1e-5, atol=1e-6)


def test_modes_momentum_and_unreached_norms_stay():
    model = _Shifted()
    model.norm.eval()
    reestimate_batch_norm(model, [torch.randn(4, 3, 5, 5)])
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert model.norm.momentum == 0.3
    assert torch.equal(model.unused.running_mean, torch.full((2,), 7.0))


@pytest.mark.parametrize(
    ("batches", "error"), [([], ArgumentError), ([torch.randn(2, 3, 5, 5), torch.randn(2, 4)], RuntimeError)]
)
def test_failure_leaves_the_statistics_as_they_were(batches, error):
    model = _Shifted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error):
        reestimate_batch_norm(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.norm.momentum == 0.3
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("new_share", [0.0, 1.5])
def test_share_out_of_range_is_an_error(new_share):
    with pytest.raises(ArgumentError, match=r"new_share: expected a number in \(0, 1\], got"):
        reestimate_batch_norm(_Shifted(), [torch.randn(4, 3, 5, 5)], new_share=new_share)


def test_no_batch_is_an_error():
    with pytest.raises(ArgumentError, match="batches: expected at least one"):
        reestimate_batch_norm(_Shifted(), iter(()))


def test_a_batch_of_one_example_is_left_out_and_counts_are_kept():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    model(torch.randn(8, 3))
    twin = copy.deepcopy(model)
    batch = torch.randn(6, 3)
    reestimate_batch_norm(model, [torch.randn(1, 3), batch], new_share=1.0)
    torch.testing.assert_close(model[1].running_mean, model[0](batch).mean(0).detach())
    assert model[1].num_batches_tracked == twin[1].num_batches_tracked == 1
    with pytest.raises(ArgumentError, match="of two examples or more"):
        reestimate_batch_norm(model, [torch.randn(1, 3)])


def test_statistics_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PcafastError, match="NaN or infinities"):
        reestimate_batch_norm(model, [torch.full((2, 3), torch.nan)])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_batches_of_something_else_are_refused():
    with pytest.raises(ArgumentError, match="batches: expected tensors"):
        reestimate_batch_norm(nn.BatchNorm1d(2), [{"x": torch.zeros(2, 2)}])
