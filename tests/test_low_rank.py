"""Factorised layers against projections in float64."""

import copy

import pytest
import torch
from patch_truth import columns
from torch import nn
from torch.nn.utils import prune

import pcafast
from pcafast.bases import pca
from pcafast.errors import ArgumentError
from pcafast.plan import LowRank, Plan, plan_low_rank


def _covariance(model, x, side="output"):
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance(side=side)) as stats:
        model(x)
    return stats["covariance"]


def _projected(activation, rank, groups, channel_dim):
    """The activation, projected per group onto its first principal components, with plain torch in float64."""
    rows = activation.detach().double().movedim(channel_dim, -1)
    blocks = rows.reshape(-1, rows.shape[-1]).chunk(groups, dim=1)
    projected = []
    for block in blocks:
        mean = block.mean(0)
        _, _, directions = torch.linalg.svd(block - mean, full_matrices=False)
        kept = directions[:rank]
        projected.append((block - mean) @ kept.T @ kept + mean)
    return torch.cat(projected, dim=1).reshape(rows.shape).movedim(-1, channel_dim)


LAYERS = {
    "linear": (lambda: nn.Linear(20, 24), (50, 20)),
    "linear without bias": (lambda: nn.Linear(20, 24, bias=False), (50, 20)),
    "linear on tokens": (lambda: nn.Linear(20, 24), (5, 7, 20)),
    "conv": (lambda: nn.Conv2d(6, 16, 3), (4, 6, 9, 9)),
    "conv without bias": (lambda: nn.Conv2d(6, 16, 3, bias=False), (4, 6, 9, 9)),
    "stride": (lambda: nn.Conv2d(6, 16, 3, stride=(2, 3), padding=1), (4, 6, 12, 12)),
    "padding": (lambda: nn.Conv2d(6, 16, (3, 5), padding=(0, 2)), (4, 6, 9, 9)),
    "string padding": (lambda: nn.Conv2d(6, 16, 3, padding="same"), (4, 6, 9, 9)),
    "padding mode": (lambda: nn.Conv2d(6, 16, 3, padding=1, padding_mode="reflect"), (4, 6, 9, 9)),
    "dilation": (lambda: nn.Conv2d(6, 16, 3, dilation=(1, 2)), (4, 6, 9, 9)),
    "groups": (lambda: nn.Conv2d(8, 24, 3, padding=1, groups=4), (4, 8, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(6, 16, 5, stride=2), (8, 6, 31)),
    "conv3d": (lambda: nn.Conv3d(3, 12, 3, padding=1), (2, 3, 6, 6, 6)),
    "pointwise with stride": (lambda: nn.Conv2d(12, 16, 1, stride=2), (4, 12, 9, 9)),
    "grouped pointwise": (lambda: nn.Conv2d(12, 16, 1, groups=2), (4, 12, 9, 9)),
}


def _model_and_input(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    return nn.Sequential(make()).double(), torch.randn(shape, dtype=torch.float64) + 1


def _channel_dim(layer):
    return -1 if isinstance(layer, nn.Linear) else 1


@pytest.mark.parametrize("kind", LAYERS)
def test_output_side_projects_the_output(kind):
    model, x = _model_and_input(kind)
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.34)
    (action,) = plan.actions
    layer = model[0]
    groups = getattr(layer, "groups", 1)
    expected = _projected(model(x), action.rank, groups, _channel_dim(layer))
    torch.testing.assert_close(plan.apply(model)(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind.startswith("linear") or "pointwise" in kind])
def test_input_side_projects_the_input(kind):
    model, x = _model_and_input(kind)
    plan = plan_low_rank(model, _covariance(model, x, side="input"), ratio=0.34)
    (action,) = plan.actions
    layer = model[0]
    groups = getattr(layer, "groups", 1)
    expected = layer(_projected(x, action.rank, groups, _channel_dim(layer)))
    torch.testing.assert_close(plan.apply(model)(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_factors_keep_the_geometry_and_save_weights(kind):
    model, x = _model_and_input(kind)
    first, second = plan_low_rank(model, _covariance(model, x), ratio=0.34).apply(model)[0]
    layer = model[0]
    if not isinstance(layer, nn.Linear):
        geometry = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        assert [getattr(first, name) for name in geometry] == [getattr(layer, name) for name in geometry]
        assert set(second.kernel_size) == set(second.stride) == {1}
        assert second.groups == layer.groups
    assert first.weight.numel() + second.weight.numel() < layer.weight.numel()


PATCH_KINDS = [kind for kind in LAYERS if kind.split(" ")[0] not in ("linear", "conv1d", "conv3d")]


@pytest.mark.parametrize("kind", PATCH_KINDS)
def test_input_side_projects_the_patches(kind):
    model, x = _model_and_input(kind)
    with torch.no_grad(), pcafast.collect(model, patches=pcafast.PatchCovariance()) as stats:
        expected_shape = model(x).shape
    plan = plan_low_rank(model, stats["patches"], side="input", ratio=0.1)
    (action,) = plan.actions
    layer = model[0]
    padding = layer.padding if layer.padding != "same" else (1, 1)
    cut = columns(
        x, layer.kernel_size, layer.stride, [(size, size) for size in padding], layer.dilation, layer.padding_mode
    )
    projected = _projected(cut, action.rank, layer.groups, 0).unflatten(0, (layer.groups, -1))
    weight = layer.weight.detach().flatten(1).unflatten(0, (layer.groups, -1))
    outputs = (weight @ projected).flatten(0, 1)
    if layer.bias is not None:
        outputs = outputs + layer.bias.detach()[:, None]
    expected = outputs.unflatten(1, (len(x), -1)).movedim(0, 1).reshape(expected_shape)
    found = plan.apply(model)(x).detach()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert isinstance(plan.apply(model)[0], nn.Sequential)


def test_patches_of_another_layer_are_refused():
    model, x = _model_and_input("conv")
    with torch.no_grad(), pcafast.collect(model, patches=pcafast.PatchCovariance()) as stats:
        model(x)
    model[0].padding = (1, 1)
    with pytest.raises(ArgumentError, match="the patches of layer '0' are cut otherwise"):
        plan_low_rank(model, stats["patches"], ratio=0.5)


def test_a_side_that_the_statistics_are_not_of_is_refused():
    model, x = _model_and_input("conv")
    with pytest.raises(ArgumentError, match=r"side: .* layer '0' is of its output. Collect PatchCovariance\(\)"):
        plan_low_rank(model, _covariance(model, x), side="input", ratio=0.5)
    with pytest.raises(ArgumentError, match="side: expected 'output' or 'input', got 'both'"):
        plan_low_rank(model, _covariance(model, x), side="both", ratio=0.5)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", ["linear", "pointwise with stride", "grouped pointwise"])
def test_full_rank_reproduces_the_layer(kind, side):
    model, x = _model_and_input(kind)
    statistic = _covariance(model, x, side)["0"]
    basis = pca(statistic)
    action = LowRank(
        layer="0",
        weight_shape=list(model[0].weight.shape),
        side=side,
        rank=basis.encoder.shape[1],
        fuse_into=None,
        kept=1.0,
        params={"before": 0, "after": 0},
        macs=None,
    )
    tensors = {"encoder": basis.encoder, "decoder": basis.decoder, "mean": basis.mean, "offset": basis.mean}
    plan = Plan([action], tensors={f"0.{name}": tensor for name, tensor in tensors.items()})
    torch.testing.assert_close(plan.apply(model)(x), model(x), rtol=1e-10, atol=1e-10)


def test_empty_plan_changes_nothing():
    model, x = _model_and_input("conv")
    assert torch.equal(Plan().apply(model)(x), model(x))


def test_applying_twice_gives_the_same_model_and_leaves_the_old_one_alone():
    model, x = _model_and_input("conv")
    before = copy.deepcopy(model.state_dict())
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.5)
    random_state = torch.get_rng_state()
    first, second = plan.apply(model).state_dict(), plan.apply(model).state_dict()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first.keys() == second.keys() != before.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_new_layers_keep_dtype_memory_format_mode_and_trainability(dtype, fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 16, 3), nn.Conv2d(16, 8, 1, bias=False))
    model = model.to(dtype, memory_format=torch.channels_last)
    model[0].eval()
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    x = torch.randn(4, 6, 9, 9).to(dtype)
    covariance = {"0": _covariance(model, x)["0"]}
    small = plan_low_rank(model, covariance, ratio=0.5, example_input=x if fused else None).apply(model)
    layers = list(small) if fused else [*small[0], small[1]]
    assert [type(layer) for layer in layers] == [nn.Conv2d] * (2 if fused else 3)
    for layer in layers:
        assert layer.weight.dtype == dtype
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert not layer.weight.requires_grad
    assert [module.training for module in small] == [False, True]
    assert not any(module.training for module in small[0].modules())
    assert layers[0].bias.dtype == dtype
    assert layers[0].bias.requires_grad
    if fused:
        assert not layers[1].bias.requires_grad  # it had none, so its weight decides


def test_frozen_biases_stay_frozen():
    model, x = _model_and_input("conv")
    model[0].bias.requires_grad_(False)
    first, second = plan_low_rank(model, _covariance(model, x), ratio=0.5).apply(model)[0]
    assert first.weight.requires_grad
    assert second.weight.requires_grad
    assert not first.bias.requires_grad
    assert not second.bias.requires_grad


class _Borrowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.free = nn.Linear(12, 12)

    def forward(self, x):
        return nn.functional.linear(self.free(torch.relu(self.fc(x))), self.fc.weight)


def _tied():
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[4].weight = model[0].weight
    return model


def _twice_named():
    layer = nn.Linear(12, 12)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(12, 12))


class _Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _patched():
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) + 1
    return model


def _pruned():
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


@pytest.mark.parametrize(
    ("make", "skipped", "done"),
    [
        (_Borrowed, {"fc": "also used outside of its own forward"}, ["free"]),
        (_tied, {"0": "shares its weight", "4": "shares its weight"}, ["2"]),
        (_twice_named, {"0": "several names"}, ["4"]),
        (lambda: nn.Sequential(_Doubling(12, 12), nn.ReLU(), nn.Linear(12, 12)), {"0": "a _Doubling cannot"}, ["2"]),
        (
            lambda: nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Linear(12, 12)), nn.ReLU(), nn.Linear(12, 12)
            ),
            {"0": "a ParametrizedLinear cannot"},
            ["2"],
        ),
        (_pruned, {"0": "computed from other parameters"}, ["2"]),
        (_patched, {"0": "forward was replaced"}, ["2"]),
        (lambda: nn.TransformerEncoderLayer(12, 2, 12, batch_first=True), {"linear1": "parent uses its weight"}, []),
        (lambda: nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1)), {"2": "no rank is cheaper"}, ["0"]),
    ],
)
def test_layers_that_cannot_be_factorised_are_left_alone_with_a_reason(make, skipped, done):
    torch.manual_seed(0)
    model = make()
    x = torch.randn(6, 5, 12)
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.25, example_input=x)
    assert [action.layer for action in plan.actions] == done
    for name, reason in skipped.items():
        assert reason in plan.skipped[name]
    plan.apply(model)(x)


def test_depthwise_convolutions_are_left_alone():
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), torch.randn(4, 8, 9, 9)
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.5)
    assert plan.actions == []
    assert plan.skipped == {"0": "no rank is cheaper than the layer itself"}


def test_a_rank_that_is_not_cheaper_is_refused():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 24)), torch.randn(200, 24)
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.5)
    assert plan.actions == []
    assert plan.skipped == {"0": "rank 12 of 24 costs no less than the layer; 11 would"}


def test_a_layer_that_the_example_does_not_reach_is_left_alone():
    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.auxiliary = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.head(x) + (self.auxiliary(x) if self.training else 0)

    model, x = Training(), torch.randn(40, 12)
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.25, example_input=x)
    assert [action.layer for action in plan.actions] == ["head"]
    assert plan.skipped == {"auxiliary": "the forward of the example input does not reach it"}


def test_applying_to_another_model_names_the_layer_and_both_shapes():
    model, x = _model_and_input("conv")
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.5)
    with pytest.raises(ArgumentError, match=r"layer '0'.* expected a weight of shape \(16, 6, 3, 3\), found a Conv2d"):
        plan.apply(nn.Sequential(nn.Conv2d(6, 12, 3)))
    with pytest.raises(ArgumentError, match=r"layer '0'.* found a ReLU\."):
        plan.apply(nn.Sequential(nn.ReLU()))
    with pytest.raises(ArgumentError, match=r"expected a layer '0'.* found none. The nearest names are 'conv'"):
        plan.apply(nn.ModuleDict({"conv": nn.Conv2d(6, 16, 3)}))


def test_applying_a_fused_action_to_another_model_names_both_layers():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), torch.randn(40, 12)
    plan = plan_low_rank(model, _covariance(model, x), ratio=0.25, example_input=x)
    with pytest.raises(ArgumentError, match="layer '0' cannot be fused into '1': expected a Linear of 12 channels"):
        plan.apply(nn.Sequential(nn.Linear(12, 12), nn.Linear(6, 12)))


def test_a_layer_with_hooks_of_its_own_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(20, 8)
    with pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model(x)
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    plan = plan_low_rank(model, stats["covariance"], ratio=0.25)
    assert plan.skipped == {"0": "it has hooks, which would be lost"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.5}, "budget: expected a pcafast.Budget such as"),
        ({"ratio": "a"}, "ratio: expected a share in"),
        ({"budget": pcafast.Budget(macs=0.5), "example_input": torch.zeros(0, 8)}, "example_input: expected one that"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, message):
    model = nn.Sequential(nn.Linear(8, 8))
    with pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model(torch.randn(20, 8))
    with pytest.raises(ArgumentError, match=message):
        plan_low_rank(model, stats["covariance"], **arguments)
    with pytest.raises(ArgumentError, match=r"such as stats\['covariance'\], got a whole collection of 'covariance'"):
        plan_low_rank(model, stats, ratio=0.5)
