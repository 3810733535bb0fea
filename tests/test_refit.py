"""Factors fitted front to back, against reduced-rank regression in plain float64."""

import copy
from dataclasses import replace

import pytest
import torch
from patch_truth import columns
from torch import nn

import pcafast
from pcafast.errors import ArgumentError
from pcafast.plan import plan_low_rank

RANK = 2


def _statistics(model, batches):
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        for inputs, _ in batches:
            model(inputs)
    return stats["covariance"]


def _plan(model, batches, **ranks):
    ranks = {name.replace("_", "."): rank for name, rank in ranks.items()}
    statistics = {name: one for name, one in _statistics(model, batches).items() if name in ranks}
    return plan_low_rank(model, statistics, ranks=ranks)


def _batches(*shape, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5, None) for _ in range(count)]


def _regressed(x, y, rank):
    """The best prediction of rows y by an affine map of rows x whose matrix has this rank.

    A millionth of the variance of each x counts as noise: as rows that are to be predicted as zero.
    """
    deviations, targets = x - x.mean(0), y - y.mean(0)
    noise = (1e-6 * deviations.square().sum(0)).sqrt().diag()
    seen = torch.cat([deviations, noise])
    weights = torch.linalg.lstsq(seen, torch.cat([targets, targets.new_zeros(len(noise), y.shape[1])])).solution
    _, _, directions = torch.linalg.svd(seen @ weights, full_matrices=False)
    return deviations @ weights @ directions[:rank].T @ directions[:rank] + y.mean(0)


LAYERS = {
    "conv": nn.Conv2d(8, 10, 3, padding=1),
    "stride": nn.Conv2d(8, 10, 3, stride=2, bias=False),
    "dilation": nn.Conv2d(8, 10, 3, dilation=2, padding=(1, 2)),
    "reflect": nn.Conv2d(8, 10, (3, 1), padding=(1, 0), padding_mode="reflect"),
    "groups": nn.Conv2d(8, 20, 3, padding=1, groups=2),
    "pointwise": nn.Conv2d(8, 10, 1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_second_layer_is_the_best_of_its_rank_for_what_the_first_has_become(kind):
    torch.manual_seed(0)
    second = copy.deepcopy(LAYERS[kind])
    second.reset_parameters()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), second).double()
    batches = _batches(4, 3, 9, 9)
    plan = pcafast.refit(model, _plan(model, batches, **{"0": RANK, "2": RANK}), batches)
    small = plan.apply(model)
    x = torch.cat([inputs for inputs, _ in batches])
    with torch.no_grad():
        wanted, found = model(x), small(x)
        taken_in = small[:2](x)
    padding = [(size, size) for size in second.padding]
    cut = columns(taken_in, second.kernel_size, second.stride, padding, second.dilation, second.padding_mode)
    by_group = zip(cut.chunk(second.groups), wanted.movedim(1, 0).flatten(1).chunk(second.groups), strict=True)
    best = torch.cat([_regressed(patches.T, y.T, RANK).T for patches, y in by_group])
    torch.testing.assert_close(found.movedim(1, 0).flatten(1), best, rtol=1e-8, atol=1e-8)
    explained = (
        1 - (best - wanted.movedim(1, 0).flatten(1)).square().mean() / wanted.var((0, 2, 3), correction=0).mean()
    )
    assert plan.actions[1].kept == pytest.approx(float(explained), abs=1e-5)
    assert {action.side for action in plan.actions} == {"both"}


def test_linear_and_conv1d_layers_are_fitted_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(56, 12)).double()
    batches = _batches(40, 4, 9)
    small = pcafast.refit(model, _plan(model, batches, **{"0": RANK, "3": RANK}), batches).apply(model)
    x = torch.cat([inputs for inputs, _ in batches])
    with torch.no_grad():
        best = _regressed(small[:3](x), model(x), RANK)
        torch.testing.assert_close(small(x), best, rtol=1e-8, atol=1e-8)


def test_first_layer_is_that_of_pca():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Conv2d(3, 8, 3)).double(), _batches(4, 3, 9, 9)
    plan = _plan(model, batches, **{"0": RANK})
    x = batches[0][0]
    found, expected = pcafast.refit(model, plan, batches).apply(model)(x), plan.apply(model)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_fused_factor_goes_into_the_next_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 3)).double()
    batches = _batches(4, 3, 9, 9)
    statistics = _statistics(model, batches)
    plan = plan_low_rank(model, statistics, ranks={"0": 3, "3": 3}, example_input=batches[0][0])
    assert [action.fuse_into for action in plan.actions] == ["1", None]
    fitted = pcafast.refit(model, plan, batches)
    small = fitted.apply(model)
    assert [type(layer) for layer in small] == [nn.Conv2d, nn.Conv2d, nn.ReLU, nn.Sequential]
    x = torch.cat([inputs for inputs, _ in batches])
    with torch.no_grad():
        y = model[0](x)
        cut = columns(x, (3, 3), (1, 1), [(0, 0)] * 2, (1, 1), "zeros").T
        wanted = model[1](y)
        expected = _regressed(cut, wanted.movedim(1, -1).flatten(0, -2), 3).unflatten(0, (*wanted[:, 0].shape,))
        torch.testing.assert_close(small[:2](x).movedim(1, -1), expected, rtol=1e-8, atol=1e-8)


def test_ranks_of_a_fitted_plan_can_be_lowered_by_hand():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Conv2d(3, 8, 3)).double(), _batches(4, 3, 9, 9)
    higher, lower = (
        pcafast.refit(model, _plan(model, batches, **{"0": rank}), batches).tensors for rank in (RANK + 2, RANK)
    )
    torch.testing.assert_close(higher["0.encoder"][:, :RANK], lower["0.encoder"])
    torch.testing.assert_close(higher["0.decoder"][..., :RANK], lower["0.decoder"])


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.again = nn.Linear(6, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.again(self.again(self.stem(x).relu()).relu_())


def test_a_layer_called_twice_is_fitted_to_both_calls():
    torch.manual_seed(0)
    model, batches = _Twice().double(), _batches(60, 6)
    plan = pcafast.refit(model, _plan(model, batches, stem=3, again=3), batches)
    small = plan.apply(model)
    taken_in, wanted = [], []
    # The second factor of the first call's input is not yet fitted when its second input is seen.
    partly = pcafast.Plan(plan.actions[:1], tensors=plan.tensors).apply(model)
    handles = [
        partly.again.register_forward_pre_hook(lambda _, args: taken_in.append(args[0].clone())),
        model.again.register_forward_hook(lambda _module, _args, y: wanted.append(y.clone())),
    ]
    with torch.no_grad():
        for inputs, _ in batches:
            model(inputs), partly(inputs)
        for handle in handles:
            handle.remove()
        x = torch.cat(taken_in)
        torch.testing.assert_close(small.again(x), _regressed(x, torch.cat(wanted), 3), rtol=1e-8, atol=1e-8)


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)).double()
    batches = _batches(4, 3, 9, 9)
    plan = _plan(model.eval(), batches, **{"0": 2, "3": 2})
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    pcafast.refit(model, plan, batches)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert [layer.training for layer in model] == [True, False, True, True]
    assert not any(layer._forward_hooks for layer in model.modules())


def test_layers_without_patches_keep_their_own_directions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)).double()
    batches = _batches(40, 2, 4, 4, 4)
    plan = _plan(model, batches, **{"0": 2, "3": 2})
    fitted = pcafast.refit(model, plan, batches)
    assert [action.side for action in fitted.actions] == ["output", "both"]
    assert torch.equal(fitted.tensors["0.encoder"], plan.tensors["0.encoder"])


def test_what_cannot_be_fitted_is_refused():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Conv2d(3, 8, 3)).double(), _batches(4, 3, 9, 9)
    plan = _plan(model, batches, **{"0": 2})
    with pytest.raises(ArgumentError, match=r"expected more than 27 patches to fit layer '0' to, .* got 18"):
        pcafast.refit(model, plan, _batches(2, 3, 5, 5, count=1))
    with pytest.raises(ArgumentError, match="batches: expected some that can be gone through many times"):
        pcafast.refit(model, plan, iter(batches))
    with pytest.raises(ArgumentError, match="batches: expected tensors, or sequences that start with one"):
        pcafast.refit(model, plan, ["images"])
    with pytest.raises(ArgumentError, match="batches: expected at least one to fit"):
        pcafast.refit(model, plan, [])
    with pytest.raises(pcafast.NonFiniteError, match="expected finite numbers in and out of layer '0'"):
        pcafast.refit(model, plan, [(torch.full((4, 3, 9, 9), torch.nan, dtype=torch.float64), None)])
    with pytest.raises(ArgumentError, match="plan: expected one of low-rank layers"):
        pcafast.refit(model, replace(plan, tensors=None), batches)


def test_constant_inputs_do_no_harm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12)).double()
    batches = [(torch.ones(20, 6, dtype=torch.float64), None)]
    plan = pcafast.refit(model, _plan(model, batches, **{"0": 2}), batches)
    torch.testing.assert_close(plan.apply(model)(batches[0][0]), model(batches[0][0]))


def test_inputs_of_very_different_scales_are_fitted_as_well_as_by_the_plan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8)).double()
    x = torch.randn(512, 6, dtype=torch.float64)
    x[:, 0] *= 1e4
    with torch.no_grad():
        model[0].weight[:, 0] *= 1e-4
    batches = [(x, None)]
    plan = _plan(model, batches, **{"0": 3})
    fitted = pcafast.refit(model, plan, batches)
    errors = [float((one.apply(model)(x) - model(x)).square().sum().detach()) for one in (plan, fitted)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
    assert fitted.actions[0].kept == pytest.approx(plan.actions[0].kept, rel=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_where_factors_are_fused_the_next_layers_output_is_what_counts(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(12, 8, 3, groups=groups), nn.Conv1d(8, 12, 1)).double()
    with torch.no_grad():
        model[1].weight[:, 0] *= 5
    batches = _batches(40, 12, 9)
    plan = plan_low_rank(model, _statistics(model, batches), ranks={"0": 2}, example_input=batches[0][0])
    assert plan.actions[0].fuse_into == "1"
    fitted = pcafast.refit(model, plan, batches)
    x = torch.cat([inputs for inputs, _ in batches])
    with torch.no_grad():
        errors = [float((one.apply(model)(x) - model(x)).square().sum()) for one in (plan, fitted)]
        variance = float((model(x) - model(x).mean((0, 2), keepdim=True)).square().sum())
    assert errors[1] < 0.95 * errors[0]
    if groups == 1:
        assert fitted.actions[0].kept == pytest.approx(1 - errors[1] / variance, abs=1e-4)


def test_a_forward_that_works_in_place_on_its_input_is_no_matter():
    class Shifting(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(3.0))

    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12)).double(), _batches(60, 6)
    shifting = Shifting(*copy.deepcopy(model))
    before = [inputs.clone() for inputs, _ in batches]
    shifted = [(inputs - 3.0, None) for inputs, _ in batches]
    plan = _plan(model, shifted, **{"0": 3, "2": 3})
    expected = pcafast.refit(model, plan, shifted).tensors
    found = pcafast.refit(shifting, plan, batches).tensors
    assert all(torch.equal(inputs, old) for (inputs, _), old in zip(batches, before, strict=True))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_half_precision_empty_calls_and_keyword_arguments():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.expert = nn.Linear(6, 12), nn.Linear(12, 12)

        def forward(self, x):
            x = self.stem(input=x)
            return self.expert(x[: len(x) - 20])

    torch.manual_seed(0)
    model = Routed().half()
    with torch.no_grad():
        model.stem.weight *= 300  # whose squares half precision does not hold
    batches = [(torch.randn(count, 6).half(), None) for count in (20, 60)]
    plan = _plan(model, batches, stem=3, expert=3)
    fitted = pcafast.refit(model, plan, batches)
    assert [0.3 < action.kept <= 1 for action in fitted.actions] == [True, True]


def test_a_plan_of_another_model_is_refused_before_anything_is_run():
    model, batches = nn.Sequential(nn.Conv2d(3, 8, 3)).double(), _batches(4, 3, 9, 9)
    plan = _plan(model, batches, **{"0": 2})
    with pytest.raises(ArgumentError, match="layer '0' is not the one that the plan was made for"):
        pcafast.refit(nn.Sequential(nn.Conv2d(3, 6, 3)).double(), plan, batches)
    with pytest.raises(ArgumentError, match="plan: expected one of low-rank layers, with its tensors, got plan"):
        pcafast.refit(model, "plan", batches)
