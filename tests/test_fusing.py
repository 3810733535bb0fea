"""When the second factor goes into the next layer, and that nothing else ever sees the smaller activation."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcafast
from pcafast.plan import plan_low_rank


def _covariance(model, x):
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model(x)
    return stats["covariance"]


class Pair(nn.Module):
    """Two layers, and a forward of the test's own."""

    def __init__(self, first, second, forward=lambda self, x: self.second(self.first(x))):
        super().__init__()
        self.first, self.second, self.run = first, second, forward

    def forward(self, x):
        return self.run(self, x)


def _convs(forward=lambda self, x: self.second(self.first(x)), **options):
    torch.manual_seed(0)
    return Pair(nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 8, 1, **options), forward).double()


IMAGES = torch.randn(4, 6, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _fused(model, x=IMAGES):
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.5, example_input=x[:1])
    return {action.layer: action.fuse_into for action in plan.actions if action.fuse_into is not None}


def _without_fusing(model, x):
    """The same factorisation of the first layer alone; without an example input nothing is fused."""
    covariance = _covariance(model, x)
    return plan_low_rank(model, {"first": covariance["first"]}, ratio=0.4).apply(model)


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        (lambda: nn.Conv2d(6, 12, 3, padding=1), lambda: nn.Conv2d(12, 8, 1), (4, 6, 7, 7)),
        (lambda: nn.Conv2d(6, 12, 3, bias=False), lambda: nn.Conv2d(12, 8, 1, bias=False), (4, 6, 7, 7)),
        (lambda: nn.Conv2d(8, 16, 3, groups=4), lambda: nn.Conv2d(16, 8, 1, groups=4), (4, 8, 7, 7)),
        (lambda: nn.Conv2d(8, 16, 3, groups=4), lambda: nn.Conv2d(16, 8, 1, groups=2), (4, 8, 7, 7)),
        (lambda: nn.Conv2d(8, 16, 3, groups=2), lambda: nn.Conv2d(16, 8, 1), (4, 8, 7, 7)),
        (lambda: nn.Conv1d(6, 12, 3), lambda: nn.Conv1d(12, 8, 1, padding="same"), (4, 6, 20)),
        (lambda: nn.Linear(20, 24), lambda: nn.Linear(24, 9, bias=False), (3, 30, 20)),
    ],
)
def test_fused_equals_unfused_with_fewer_layers(first, second, shape):
    torch.manual_seed(0)
    model = Pair(first(), second()).double()
    x = torch.randn(shape, dtype=torch.float64)
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.4, example_input=x)
    assert [(action.layer, action.fuse_into) for action in plan.actions] == [("first", "second")]
    assert "second factor of 'first'" in plan.skipped["second"]
    fused = plan.apply(model)
    torch.testing.assert_close(fused(x), _without_fusing(model, x)(x), rtol=1e-9, atol=1e-9)
    assert (type(fused.first), type(fused.second)) == (type(model.first), type(model.second))
    assert sum(p.numel() for p in fused.parameters()) == plan.reached["params"]["after"]


def test_factorising_again_adds_no_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, bias=False))
    once = plan_low_rank(model, _covariance(model, IMAGES.float()), ratio=0.5).apply(model)
    plan = plan_low_rank(once, _covariance(once, IMAGES.float()), ratio=0.5, example_input=IMAGES.float())
    twice = plan.apply(once)
    assert {action.layer: action.fuse_into for action in plan.actions} == {"0.0": "0.1", "2.0": "2.1"}
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert [twice[i][0].out_channels for i in (0, 2)] == [8, 8]


def test_of_a_row_of_linear_layers_every_second_takes_in_a_factor():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    x = torch.randn(100, 16)
    assert _fused(model, x) == {"0": "1", "2": "3"}


def test_a_pair_called_twice_is_fused():
    model = _convs(lambda self, x: self.second(self.first(x)) + self.second(self.first(x.flip(-1))))
    assert _fused(model) == {"first": "second"}


def test_reading_dtype_and_device_hinders_nothing():
    def forward(self, x):
        y = self.first(x)
        assert y.dtype == self.run_dtype
        assert y.device.type == "cpu"
        return self.second(y)

    model = _convs(forward)
    model.run_dtype = torch.float64
    assert _fused(model) == {"first": "second"}


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def _unseen_mean(self, y):
    """As compiled extensions do, past torch's Python functions."""
    with torch._C.DisableTorchFunction():
        return y.mean()


def _other_use(use):
    def forward(self, x):
        y = self.first(x)
        extra = use(self, y)
        return self.second(y), extra

    return forward


def _in_place(self, x):
    return self.second(F.relu_(self.first(x)))


def _twice_by_second(self, x):
    y = self.first(x)
    return self.second(y) + self.second(y)


def _second_of_another_too(self, x):
    return self.second(self.first(x)) + self.second(torch.cat([x, x], 1))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.second(F.relu(self.first(x))),
        lambda self, x: self.second(self.first(x).view(x.shape[0], 12, 7, 7)),
        lambda self, x: self.second(self.first(x) + 1),
        lambda self, x: self.second(self.first(x).clone()),
        lambda self, x: self.second(_Scaled.apply(self.first(x))),
        _in_place,
        _twice_by_second,
        _second_of_another_too,
        _other_use(lambda self, y: y.mean()),
        _other_use(lambda self, y: y),
        _other_use(lambda self, y: {"features": [y]}),
        _other_use(lambda self, y: SimpleNamespace(features=y)),
        _other_use(lambda self, y: y.shape[1]),
        _other_use(lambda self, y: y.size(1)),
        _other_use(lambda self, y: y.detach().numpy().sum()),
        _other_use(lambda self, y: _Scaled.apply(y)),
        _other_use(_unseen_mean),
        _other_use(lambda self, y: F.conv2d(y, torch.ones_like(self.second.weight))),
    ],
)
def test_any_other_use_of_the_activation_prevents_fusing(forward):
    model = _convs(forward)
    assert _fused(model) == {}
    plan_low_rank(model, _covariance(model, IMAGES), ratio=0.5, example_input=IMAGES).apply(model)(IMAGES)


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 4}])
def test_a_second_layer_that_is_not_plainly_pointwise_prevents_fusing(options):
    assert _fused(_convs(**options)) == {}


def test_a_convolution_is_not_fused_into_a_linear_layer():
    model = Pair(nn.Conv2d(6, 12, 3, padding=1), nn.Linear(7, 3)).double()
    assert _fused(model) == {}


def test_a_hook_that_uses_the_activation_prevents_fusing():
    seen = []
    after, before = _convs(), _convs()
    after.first.register_forward_hook(lambda module, args, output: seen.append(output.mean()))
    before.second.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean()))
    assert _fused(after) == _fused(before) == {}
    assert seen


def test_a_second_layer_whose_weight_is_used_elsewhere_prevents_fusing():
    model = _convs(lambda self, x: self.second(self.first(x)) + self.second.weight.mean())
    plan = plan_low_rank(model, _covariance(model, IMAGES), ratio=0.5, example_input=IMAGES)
    assert [(action.layer, action.fuse_into) for action in plan.actions] == [("first", None)]
    assert plan.skipped == {"second": "its weight is also used outside of its own forward"}


def test_planning_leaves_no_trace_in_the_model():
    model = _convs()
    model.second.train(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    covariance = _covariance(model, IMAGES)
    plan_low_rank(model, covariance, ratio=0.5, example_input=IMAGES)
    with pytest.raises(pcafast.ArgumentError):
        plan_low_rank(model, covariance, ratio=0.5, example_input=IMAGES[0, 0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
