"""Projection-loss Hessians against planted quadratic forms, closed forms and patches projected one by one."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import pcafast
from pcafast.collect.projection import Site, projected
from pcafast.errors import ArgumentError
from pcafast.loop import projection_hessians
from pcafast.statistics import ProjectionHessian


def unit_directions(count, dimensions):
    return F.normalize(torch.randn(count, dimensions, dtype=torch.float64))


def planted(dimensions, count):
    """An indefinite form, directions, their losses and their products."""
    form = torch.randn(dimensions, dimensions, dtype=torch.float64)
    form = form + form.T
    directions = unit_directions(count, dimensions)
    return form, directions, ((directions @ form) * directions).sum(1), directions @ form


def fitted(directions, values, **settings):
    statistic = ProjectionHessian(**settings)
    statistic.update(directions, values)
    return statistic


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


# The fits.


@pytest.mark.parametrize(("dimensions", "count"), [(1, 1), (2, 3), (7, 28), (16, 136), (16, 256), (48, 2304)])
def test_sampled_recovers_a_planted_form(dimensions, count):
    form, directions, losses, _ = planted(dimensions, count)
    found = fitted(directions, losses).compute()
    assert relative_error(found.hessian, form) < 1e-9
    assert found.residual < 1e-9


@pytest.mark.parametrize(("dimensions", "count"), [(1, 1), (7, 7), (48, 48), (48, 500)])
def test_local_recovers_a_planted_form(dimensions, count):
    form, directions, _, products = planted(dimensions, count)
    found = fitted(directions, products, fit="local").compute()
    assert relative_error(found.hessian, form) < 1e-9
    assert found.residual < 1e-9


def independent_elements(dimensions):
    """The symmetric matrices that every symmetric matrix is a sum of."""
    for i, j in itertools.combinations_with_replacement(range(dimensions), 2):
        element = torch.zeros(dimensions, dimensions, dtype=torch.float64)
        element[i, j] = element[j, i] = 1
        yield element


@pytest.mark.parametrize("fit", ["sampled", "local"])
def test_least_squares_of_noisy_samples(fit):
    _, directions, losses, products = planted(6, 60)
    values = losses if fit == "sampled" else products
    values = values + torch.randn_like(values)
    found = fitted(directions, values, fit=fit).compute()
    elements = list(independent_elements(6))
    columns = [((directions @ e) * directions).sum(1) if fit == "sampled" else directions @ e for e in elements]
    design = torch.stack([column.flatten() for column in columns], dim=1)
    solution = torch.linalg.lstsq(design, values.flatten()).solution
    expected = sum(weight * element for weight, element in zip(solution, elements, strict=True))
    assert relative_error(found.hessian, expected) < 1e-9
    misfit = (design @ solution - values.flatten()).norm() / values.norm()
    assert found.residual == pytest.approx(float(misfit), rel=1e-9)


@pytest.mark.parametrize("fit", ["sampled", "local"])
def test_the_form_is_symmetric_to_the_bit(fit):
    _, directions, losses, products = planted(20, 500)
    values = losses if fit == "sampled" else products
    hessian = fitted(directions, values + torch.randn_like(values), fit=fit).compute().hessian
    assert torch.equal(hessian, hessian.T)


def test_equal_losses_share_the_mean_of_their_ranks():
    directions = unit_directions(8, 2)
    losses = torch.tensor([5.0, 1.0, 5.0, -2.0, 5.0, 1.0, 7.0, 0.0], dtype=torch.float64)
    ranks = torch.tensor([5.0, 2.5, 5.0, 0.0, 5.0, 2.5, 7.0, 1.0], dtype=torch.float64)
    found = fitted(directions, losses, ranked=True).compute()
    expected = fitted(directions, ranks).compute()
    assert torch.equal(found.hessian, expected.hessian)
    assert found.residual == expected.residual


@pytest.mark.parametrize("fit", ["sampled", "local"])
def test_no_loss_at_all_fits_zero(fit):
    values = torch.zeros(20, 3) if fit == "local" else torch.zeros(20)
    found = fitted(unit_directions(20, 3), values, fit=fit).compute()
    assert not found.hessian.any()
    assert found.residual == 0


# End to end, where the projection loss is exactly quadratic on the sphere.


def quadratic_case(side, kind):
    """A model, an image and the mean and form of its projection loss, from materialised activations in float64.

    After the layer everything is kept as it is, and for the input side the layer keeps lengths, so that the squared
    error of projecting v out of the activations p is the mean of (v.(p - m))^2.
    """
    if kind == "conv":
        layer = nn.Conv2d(2, 24, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        x = torch.randn(1, 2, 7, 6, dtype=torch.float64)
        patches = F.unfold(x, (3, 2), padding=(1, 2), stride=(2, 1), dilation=(1, 2))[0].T
    elif kind == "conv1d":
        layer = nn.Conv1d(3, 13, 4, stride=2, padding=1, padding_mode="circular")
        x = torch.randn(1, 3, 11, dtype=torch.float64)
        patches = F.pad(x, (1, 1), mode="circular").unfold(2, 4, 2)[0].movedim(0, 1).flatten(1)
    else:
        layer = nn.Linear(5, 9)
        x = torch.randn(1, 4, 5, dtype=torch.float64)
        patches = x[0]
    nn.init.orthogonal_(layer.double().weight)
    if side == "output":
        patches = patches @ layer.weight.flatten(1).T + layer.bias
    centred = (patches - patches.mean(0)).detach()
    outputs = layer.out_features if kind == "linear" else layer.out_channels
    form = centred.T @ centred / (outputs * len(centred))
    return nn.Sequential(layer, nn.Flatten()), x, patches.mean(0).detach(), form


@pytest.mark.parametrize("fit", ["sampled", "local"])
@pytest.mark.parametrize("kind", ["conv", "conv1d", "linear"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_an_exactly_quadratic_loss(side, kind, fit):
    model, x, mean, form = quadratic_case(side, kind)
    batches = [x.expand(50, *x.shape[1:])]
    statistic = projection_hessians(model, batches, side=side, fit=fit)["0"]
    found = statistic.compute()
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-12)
    assert relative_error(found.hessian, form) < 1e-8
    assert found.residual < 1e-8
    dimensions = len(form)
    expected = dimensions**2 if fit == "sampled" else dimensions  # in batches of 50: no overshoot
    assert statistic.state_dict()["directions"].shape == (expected, dimensions)


def network():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 4)).double()


def images(count=10):
    return torch.randn(count, 3, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize(("layer", "side"), [("0", "output"), ("0", "input"), ("3", "output"), ("3", "input")])
def test_a_local_product_is_the_derivative_of_the_second_order_loss(layer, side, loss):
    """Half the gradient of Q(v) / |v|^2 at a unit v, Q being the whole network's loss to second order by autograd."""
    torch.manual_seed(3)
    model, x = network(), images(5)
    statistic = projection_hessians(model, [x], layers=layer, side=side, fit="local", loss=loss, samples=5)[layer]
    state = statistic.state_dict()
    mean = state["total"] / state["count"]
    site = Site(layer, model.get_submodule(layer), side)

    def second_order(direction, example):
        """Half the second derivative by t of the loss where t times the change of a projection is made."""

        def along(t):
            with site.replacing(lambda x, y: y + t * site.change(x, y, direction[None], mean)):
                changed = model(example)
            return measure(model(example), changed)

        return torch.func.hessian(along)(torch.zeros((), dtype=torch.float64)) / 2

    def measure(a, b):
        if loss == "mse":
            return F.mse_loss(a, b)
        p, q = a.log_softmax(1), b.log_softmax(1)
        return F.kl_div(p, q, log_target=True, reduction="sum") + F.kl_div(q, p, log_target=True, reduction="sum")

    for direction, product, example in zip(state["directions"], state["values"], x, strict=True):
        v = direction.clone().requires_grad_()
        on_sphere = second_order(v, example[None]) / v.square().sum()
        (gradient,) = torch.autograd.grad(on_sphere, v)
        torch.testing.assert_close(product, gradient / 2, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(direction @ product, on_sphere.detach(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_local_products_add_up_to_the_loss_itself_and_not_to_twice_of_it(dtype):
    """Of directions that hardly matter, of which the loss is that of second order."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4)).to(dtype)
    x = images(200).to(dtype)
    with torch.no_grad():
        model[0].weight *= 0.01
    losses, products = (
        projection_hessians(model, [x], layers="0", fit=fit, samples=200, loss="kl")["0"].state_dict()
        for fit in ("sampled", "local")
    )
    assert torch.equal(losses["directions"], products["directions"])
    of_products = (products["directions"] * products["values"]).sum(1)
    torch.testing.assert_close(of_products.mean(), losses["values"].mean(), rtol=0.02, atol=0)


# Projection itself, against activations and patches that are projected one by one.


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 5, 3),
    "padded": nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 1), bias=False),
    "dilated": nn.Conv2d(3, 5, 2, dilation=2, padding="same"),
    "one pixel": nn.Conv2d(3, 5, 1, stride=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_projection_of_patches(kind):
    layer = copy.deepcopy(CONVOLUTIONS[kind]).double()
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    padding = 1 if layer.padding == "same" else layer.padding
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    directions = unit_directions(4, patches.shape[1])
    mean = torch.randn(patches.shape[1], dtype=torch.float64)
    coefficients = torch.einsum("ndl,nd->nl", patches - mean[:, None], directions)
    changed = patches - coefficients[:, None] * directions[:, :, None]
    expected = torch.einsum("od,ndl->nol", layer.weight.flatten(1), changed)
    if layer.bias is not None:
        expected = expected + layer.bias[:, None]
    site = Site("layer", layer, "input")
    plain = layer(x)
    with torch.no_grad(), projected(site, directions, mean):
        found = layer(x)
    torch.testing.assert_close(found.flatten(2), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer(x), plain)  # nothing is left behind
    found_mean, count = site.mean(x, plain)
    torch.testing.assert_close(found_mean, patches.mean((0, 2)), rtol=1e-10, atol=1e-12)
    assert count == 4 * patches.shape[2]


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_projection_at_a_linear_layer(side, shape):
    layer, x = nn.Linear(6, 6).double(), torch.randn(shape, dtype=torch.float64)
    directions, mean = unit_directions(4, 6), torch.randn(6, dtype=torch.float64)

    def project(rows):
        return torch.stack([row - ((row - mean) @ v)[..., None] * v for row, v in zip(rows, directions, strict=True)])

    expected = project(layer(x)) if side == "output" else layer(project(x))
    with projected(Site("layer", layer, side), directions, mean):
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_sampled_losses_and_means_are_those_of_the_network():
    model, x = network(), images(10)
    batches = [(x[:4], 0), (x[4:], 0)]
    statistic = projection_hessians(model, batches, layers="0", samples=13, mean_images=7)["0"]
    state = statistic.state_dict()
    convolved = model[0](x).detach()
    mean = convolved[:7].mean((0, 2, 3))
    torch.testing.assert_close(state["total"] / state["count"], mean, rtol=1e-10, atol=0)
    assert state["count"] == 7 * 16
    assert len(state["values"]) == 13  # not 14, and the data was gone through again
    for v, loss, i in zip(state["directions"], state["values"], [*range(10), 0, 1, 2], strict=True):
        assert v.norm() == pytest.approx(1)
        changed = convolved[i] - v[:, None, None] * torch.einsum("chw,c->hw", convolved[i] - mean[:, None, None], v)
        expected = (model[1:](changed[None]) - model(x[i : i + 1])).square().mean()
        torch.testing.assert_close(loss[0], expected.detach(), rtol=1e-9, atol=0)


def test_directions_differ_between_passes_and_not_with_the_choice_of_layers():
    model, x = network(), images(10)
    some = projection_hessians(model, [x], layers="0", samples=30)["0"].state_dict()["directions"]
    assert len({tuple(row.tolist()) for row in some}) == 30
    both = projection_hessians(model, [x], samples=30)
    assert list(both) == ["0", "3"]
    assert torch.equal(both["0"].state_dict()["directions"], some)
    other = projection_hessians(model, [x], layers="0", samples=30, seed=1)["0"].state_dict()["directions"]
    assert not torch.equal(other, some)


@pytest.mark.parametrize("fit", ["sampled", "local"])
def test_an_infinite_loader_is_left_when_there_is_enough(fit):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield images(4), None

    found = projection_hessians(network(), endless(), layers="0", fit=fit, samples=10, mean_images=8)
    assert len(found["0"].state_dict()["values"]) == 10
    assert taken == 2 + 3


def test_a_function_as_loss():
    def largest_change(original, outputs):
        return (original - outputs).abs().amax(1)

    statistic = projection_hessians(network(), [images()], layers="0", loss=largest_change)["0"]
    assert statistic.loss == "largest_change"
    assert (statistic.state_dict()["values"] > 0).all()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        return F.scaled_dot_product_attention(*(part[:, None] for part in self.project(x).chunk(3, -1))).flatten(1)


def test_local_products_through_attention():
    statistic = projection_hessians(Attention(), [torch.randn(6, 5, 8)], fit="local")["project"]
    state = statistic.state_dict()
    assert statistic.skipped == 0
    assert ((state["directions"] * state["values"]).sum(1) > 0).all()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


@pytest.mark.parametrize("fit", ["sampled", "local"])
def test_an_output_that_nothing_uses_has_no_loss(fit):
    found = projection_hessians(Unused(), [torch.randn(9, 4)], fit=fit)["unused"].compute()
    assert not found.hessian.any()


# Nothing of the model changes.


@pytest.mark.parametrize("fit", ["sampled", "local"])
def test_the_model_is_left_as_it_was(fit):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten(), nn.Linear(24, 4)
    ).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    twin = copy.deepcopy(model)
    batch = images().float()
    random = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        projection_hessians(model, [batch], fit=fit)
    (warning,) = [one for one in caught if issubclass(one.category, pcafast.PcafastWarning)]
    assert "dropout would drown" in str(warning.message)
    assert [module.training for module in model.modules()] == [module.training for module in twin.modules()]
    assert all(not (module._forward_hooks or module._forward_pre_hooks) for module in model.modules())
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad
        assert mine is model[4].weight or mine.grad is None
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(random, torch.get_rng_state())


def test_no_warning_in_evaluation_mode(recwarn):
    projection_hessians(nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Dropout()).eval(), [images().float()])
    assert not [one for one in recwarn if issubclass(one.category, pcafast.PcafastWarning)]


def test_an_exception_removes_the_hooks():
    model = network()

    def failing(original, outputs):
        raise KeyError("the user's own")

    with pytest.raises(KeyError):
        projection_hessians(model, [images()], loss=failing)
    assert all(not module._forward_hooks for module in model.modules())


# State: any split, merged, saved, reduced over processes.


@pytest.mark.parametrize("fit", ["sampled", "local"])
def test_law_1_two_halves_are_the_whole(fit, tmp_path):
    _, directions, losses, products = planted(5, 40)
    values = losses if fit == "sampled" else products
    means, counts = torch.randn(2, 5, dtype=torch.float64), [30, 10]
    whole = fitted(directions, values, fit=fit)
    whole.update_mean((means[0] * 30 + means[1] * 10) / 40, 40)
    halves = [fitted(directions[part], values[part], fit=fit) for part in (slice(0, 22), slice(22, 40))]
    for half, mean, count in zip(halves, means, counts, strict=True):
        half.update_mean(mean, count)
    pcafast.save_statistics({"hessian": {"layer": halves[1]}}, tmp_path / "half.safetensors")
    loaded = pcafast.load_statistics(tmp_path / "half.safetensors")["hessian"]["layer"]
    assert loaded.settings == whole.settings
    halves[0].merge(loaded)
    for found, expected in zip(halves[0].compute(), whole.compute(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(halves[0].state_dict()["directions"], directions)
    assert len(loaded.state_dict()["directions"]) == 18  # what is merged in stays as it was
    empty = ProjectionHessian(fit=fit)
    empty.merge(whole)
    whole.merge(ProjectionHessian(fit=fit))
    assert torch.equal(empty.compute().hessian, whole.compute().hessian)


def _process(rank, folder, directions, losses):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    statistic = ProjectionHessian()
    part = [slice(0, 7), slice(7, 30), slice(0, 0)][rank]  # the last process has no samples at all
    if part.stop:
        statistic.update(directions[part], losses[part])
        statistic.update_mean(torch.full((4,), float(rank)), 10)
    statistic.all_reduce()
    pcafast.save_statistics({"hessian": {"layer": statistic}}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_law_1_any_number_of_processes(tmp_path):
    _, directions, losses, _ = planted(4, 30)
    mp.spawn(_process, (str(tmp_path), directions, losses), nprocs=3)
    expected = fitted(directions, losses).compute()
    for rank in range(3):
        found = pcafast.load_statistics(tmp_path / f"{rank}.safetensors")["hessian"]["layer"].compute()
        assert torch.equal(found.hessian, expected.hessian)
        assert torch.equal(found.mean, torch.full((4,), 0.5, dtype=torch.float64))


def test_law_6_samples_with_nan_are_left_out_and_counted():
    form, directions, losses, _ = planted(3, 20)
    losses[4], losses[9] = torch.nan, torch.inf
    statistic = fitted(directions, losses)
    assert statistic.skipped == 2
    assert relative_error(statistic.compute().hessian, form) < 1e-9
    with pytest.raises(pcafast.NonFiniteError, match="holds NaN"):
        fitted(directions, losses, nonfinite="raise")


# Bad input.


@pytest.mark.parametrize(("fit", "needed"), [("sampled", "15 samples, D"), ("local", "5 samples, D for")])
def test_too_few_samples(fit, needed):
    _, directions, losses, products = planted(5, 4)
    statistic = fitted(directions, losses if fit == "sampled" else products, fit=fit)
    with pytest.raises(ArgumentError, match=rf"at least {needed}.*D = 5, got 4\. Take more"):
        statistic.compute()


def test_an_empty_statistic():
    with pytest.raises(pcafast.PcafastError, match="has seen no batch"):
        ProjectionHessian().compute()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "global"}, "fit: expected one of sampled, local, got 'global'"),
        ({"side": "before"}, "side: expected one of output, input"),
        ({"tap": "activation"}, "tap: expected one of layer"),
        ({"fit": "local", "ranked": True}, 'ranked: expected fit="sampled"'),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ArgumentError, match=message):
        ProjectionHessian(**settings)


def test_wrong_samples():
    statistic = ProjectionHessian()
    with pytest.raises(ArgumentError, match=r"directions: expected shape \(N, D\), got \(3,\)"):
        statistic.update(torch.ones(3), torch.ones(3))
    with pytest.raises(ArgumentError, match=r"values: expected losses of shape \(4,\), got \(4, 2\)"):
        statistic.update(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ArgumentError, match=r"values: expected products of shape \(4, 2\), got \(4,\)"):
        ProjectionHessian(fit="local").update(torch.ones(4, 2), torch.ones(4))
    with pytest.raises(ArgumentError, match=r"mean: expected shape \(D,\)"):
        statistic.update_mean(torch.ones(3, 3), 1)
    statistic.update(torch.ones(4, 2), torch.ones(4))
    with pytest.raises(ArgumentError, match="expected 2 dimensions as before, got 3"):
        statistic.update(torch.ones(4, 3), torch.ones(4))
    with pytest.raises(ArgumentError, match="state 'values': expected 2 of each sample for fit='local'"):
        ProjectionHessian(fit="local").load_state_dict(statistic.state_dict())
    with pytest.raises(ArgumentError, match="other: expected a ProjectionHessian"):
        statistic.merge(ProjectionHessian(loss="kl"))


def test_collect_says_what_makes_it():
    with pytest.raises(ArgumentError, match=r"pcafast\.projection_hessians\(model, batches\)"):
        pcafast.collect(network(), hessian=ProjectionHessian())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.never, self.grouped, self.once = (
            nn.Conv2d(3, 3, 1),
            nn.Linear(2, 2),
            nn.Conv2d(3, 3, 1, groups=3),
            nn.Linear(48, 2),
        )

    def forward(self, x):
        return self.once(self.grouped(self.twice(self.twice(x))).flatten(1))


def test_layers_that_cannot_be_projected_are_not_chosen_by_default():
    assert list(projection_hessians(Twice().double(), [images()], samples=4)) == ["once"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("twice", "'twice' is called 2 times"),
        ("never", "'never' is called 0 times"),
        ("grouped", "layer 'grouped': its 3 groups"),
    ],
)
def test_layers_that_cannot_be_projected(layer, message):
    with pytest.raises(ArgumentError, match=f"layers: .*{message}"):
        projection_hessians(Twice().double(), [images()], layers=layer)


def test_layers_of_other_types_have_no_input_side():
    model = nn.Sequential(nn.ConvTranspose2d(3, 2, 2), nn.Flatten()).double()
    with pytest.raises(ArgumentError, match=r'"input" takes a Linear, Conv1d or Conv2d, and it is a ConvTranspose2d'):
        projection_hessians(model, [images()], layers="0", side="input")
    assert list(projection_hessians(model, [images()], layers="0")) == ["0"]


class Mixes(nn.Module):
    """Its layer sees rows that are no examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x.flatten(0, 2)).view(len(x), -1)


def test_a_layer_whose_rows_are_no_examples():
    with pytest.raises(ArgumentError, match=r"layer 'layer' to have the 10 examples.*\(120, 4\)"):
        projection_hessians(Mixes().double(), [images()])


@pytest.mark.parametrize("fit", ["sampled", "local"])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("cosine", "loss: expected one of mse, kl or a function, got 'cosine'"),
        (F.mse_loss, r"loss: expected a loss for each example, a tensor of shape \(N,\) = \(10,\), got shape \(\)"),
        (lambda a, b: (a - b).square(), r"loss: expected .*\(10,\), got shape \(10, 4\)"),
        (lambda a, b: 0.0, "loss: expected .* got float"),
    ],
)
def test_wrong_losses(loss, message, fit):
    with pytest.raises(ArgumentError, match=message):
        projection_hessians(network(), [images()], loss=loss, fit=fit, samples=10)


def test_a_loss_without_derivatives():
    with pytest.raises(ArgumentError, match="loss: expected one with a derivative"):
        projection_hessians(network(), [images()], fit="local", loss=lambda a, b: (a.argmax(1) != b.argmax(1)).double())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x), x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples: expected a whole number from 1 on, got 0"),
        ({"mean_images": 0}, "mean_images: expected a whole number from 1 on, got 0"),
        ({"batches": []}, "batches: expected at least one batch"),
        ({"batches": [{"x": 1}]}, "batches: expected tensors, or sequences"),
        ({"batches": iter([images()])}, "batches: ended before there were enough samples"),
        (
            {"model": Pair().double()},
            "model: expected a tensor with a row for each of 10 examples as output, got tuple",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        projection_hessians(**({"model": network(), "batches": [images()]} | arguments))
