"""Bases other than PCA, by what they promise, in plain float64."""

import pytest
import torch
from torch import nn

import pcafast
from pcafast import bases
from pcafast.errors import ArgumentError
from pcafast.plan import plan_low_rank

RANK = 3


def _rows(count=400, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 2


def _covariance(rows):
    covariance = pcafast.Covariance(channel_dim=-1)
    covariance.update(rows)
    return covariance


def _coded(basis, rows, rank=RANK):
    """Rows as the basis leaves them at a rank."""
    return (rows - basis.mean) @ basis.encoder[0, :rank].T @ basis.decoder[0, :, :rank].T + basis.mean


def test_uncentred_keeps_the_most_of_the_second_moment():
    rows = _rows()
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    expected = left[:, :RANK] * values[:RANK] @ right[:RANK]
    basis = bases.uncentred(_covariance(rows))
    torch.testing.assert_close(_coded(basis, rows), expected, rtol=1e-9, atol=1e-9)
    shares = values.square() / values.square().sum()
    torch.testing.assert_close(basis.left_out[RANK], shares[RANK:].sum())


def test_fisher_leaves_the_least_error_weighted_by_gradients():
    rows = _rows()
    gradients = _rows(seed=1) * torch.logspace(0, -2, 8, dtype=torch.float64)
    statistic = pcafast.GradientCovariance(channel_dim=-1, loss_reduction="sum")
    statistic.update(gradients)
    fisher = gradients.T @ gradients / len(gradients)

    def error(basis):
        difference = rows - _coded(basis, rows)
        return ((difference @ fisher) * difference).sum(1).mean()

    basis = bases.fisher(_covariance(rows), statistic)
    values, vectors = torch.linalg.eigh(fisher)
    root = vectors * values.sqrt() @ vectors.T
    singular = torch.linalg.svdvals((rows - rows.mean(0)) @ root)
    best = singular[RANK:].square().sum() / len(rows)
    torch.testing.assert_close(error(basis), best, rtol=1e-8, atol=0)
    torch.testing.assert_close(basis.left_out[RANK], best * len(rows) / singular.square().sum(), rtol=1e-8, atol=0)
    assert best < 0.9 * error(bases.pca(_covariance(rows)))


def test_fisher_of_gradients_in_few_directions_can_be_inverted():
    rows, gradients = _rows(), _rows(seed=1)
    gradients[:, 2:] = 0
    statistic = pcafast.GradientCovariance(channel_dim=-1)
    statistic.update(gradients)
    basis = bases.fisher(_covariance(rows), statistic)
    torch.testing.assert_close(_coded(basis, rows, 8), rows, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(_coded(basis, rows, 2)[:, :2], rows[:, :2], rtol=1e-2, atol=1e-2)


def _matrix(changes):
    """A statistic of which leaving out the i-th of some directions changes the loss by the i-th number."""
    directions = torch.linalg.qr(torch.randn(len(changes), len(changes), dtype=torch.float64)).Q
    rows = torch.randn(64, len(changes), dtype=torch.float64)
    rows -= rows.mean(0)
    rows = torch.linalg.qr(rows).Q * 8  # of unit variance
    gradients = -rows @ (directions.T * torch.tensor(changes, dtype=torch.float64)) @ directions
    statistic = pcafast.ActivationGradient(channel_dim=-1, loss_reduction="sum")
    statistic.update(rows, gradients)
    return statistic, directions


@pytest.mark.parametrize(("select", "order"), [("signed", [1, 3, 2, 0]), ("magnitude", [0, 1, 3, 2])])
def test_gradient_basis_orders_directions_by_the_change_of_the_loss_with_or_without_its_sign(select, order):
    torch.manual_seed(0)
    statistic, directions = _matrix([-5.0, 3.0, -1.0, 2.0])
    basis = bases.gradient(statistic, select=select)
    cosines = (basis.encoder[0] @ directions.T).abs()
    torch.testing.assert_close(cosines, torch.eye(4, dtype=torch.float64)[order], rtol=0, atol=1e-9)
    worth = {"signed": [3.0, 2.0, 0.0, 0.0], "magnitude": [5.0, 3.0, 2.0, 1.0]}[select]
    shares = -basis.left_out.diff()
    torch.testing.assert_close(shares, torch.tensor(worth, dtype=torch.float64) / sum(worth), rtol=0, atol=1e-9)


def test_signed_gradient_basis_scores_directions_as_greedy_does():
    """pca-compress: the eigenvectors b of aj + aj', those of the largest -(b' aj b) kept."""
    activations, gradients = _rows(), _rows(seed=5)
    statistic = pcafast.ActivationGradient(channel_dim=-1, loss_reduction="sum")
    statistic.update(activations, gradients)
    aj = activations.T @ gradients / 400 - torch.outer(activations.mean(0), gradients.mean(0))
    vectors = torch.linalg.eigh(aj + aj.T).eigenvectors.T
    scores = -((vectors @ aj) * vectors).sum(1)
    kept = vectors[scores.argsort(descending=True)[:RANK]]
    found = bases.gradient(statistic, select="signed").encoder[0, :RANK]
    torch.testing.assert_close(found.T @ found, kept.T @ kept, rtol=1e-9, atol=1e-9)


def test_hessian_basis_keeps_what_costs_the_most_to_leave_out():
    torch.manual_seed(0)
    matrix = torch.diag(torch.tensor([0.5, 4.0, -1.0, 2.0], dtype=torch.float64))
    fit = pcafast.ProjectionHessian()
    directions = nn.functional.normalize(torch.randn(60, 4, dtype=torch.float64))
    fit.update(directions, ((directions @ matrix) * directions).sum(1))
    fit.update_mean(torch.ones(4), 1)
    signed, magnitude = bases.hessian(fit), bases.hessian(fit, select="magnitude")
    assert signed.encoder[0].abs().argmax(1).tolist() == [1, 3, 0, 2]
    assert magnitude.encoder[0].abs().argmax(1).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(matrix=torch.zeros(2, 3)), r"matrix: expected square matrices, .* got shape \(2, 3\)"),
        (dict(matrix=torch.tensor([[1.0, 0.5], [0.4, 1.0]])), "matrix: expected a symmetric matrix"),
        (dict(matrix=torch.full((2, 2), torch.nan)), "matrix: expected finite numbers"),
        (dict(mean=torch.full((2,), torch.nan)), "mean: expected finite numbers"),
        (dict(mean=torch.zeros(3)), r"mean: expected shape \(2,\), as the matrix has, got \(3,\)"),
        (dict(select="largest"), "select: expected 'magnitude' or 'signed', got 'largest'"),
        (dict(side="both"), "side: expected 'output' or 'input', got 'both'"),
    ],
)
def test_wrong_matrices_are_refused(arguments, message):
    arguments = {"matrix": torch.eye(2), "mean": torch.zeros(2), "select": "signed", **arguments}
    with pytest.raises(ArgumentError, match=message):
        bases.eigen(arguments.pop("matrix"), arguments.pop("mean"), **arguments)


def test_where_no_eigenvalue_is_positive_no_direction_is_free():
    basis = bases.eigen(-torch.diag(torch.arange(1.0, 5)), torch.zeros(4), select="signed")
    torch.testing.assert_close(basis.left_out, torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    assert basis.encoder[0].abs().argmax(1).tolist() == [0, 1, 2, 3]


def test_statistics_of_another_kind_are_refused():
    with pytest.raises(ArgumentError, match=r"covariance: expected the Covariance or PatchCovariance .* GradientCov"):
        bases.pca(pcafast.GradientCovariance())
    with pytest.raises(ArgumentError, match=r"covariance: expected that right at layer .* Collect it with tap='layer'"):
        bases.pca(pcafast.Covariance(tap="activation"))
    one, other = pcafast.Covariance(), pcafast.GradientCovariance()
    one.layer, other.layer = "conv1", "conv2"
    with pytest.raises(ArgumentError, match="gradient: expected that of layer 'conv1', got that of 'conv2'"):
        bases.fisher(one, other)
    with pytest.raises(ArgumentError, match="matrix: expected the ActivationGradient of a layer, got a Covariance"):
        bases.gradient(_covariance(_rows()), select="signed")
    with pytest.raises(ArgumentError, match="covariance: expected that of the layer's output"):
        bases.fisher(pcafast.Covariance(side="input"), pcafast.GradientCovariance())
    gradient = pcafast.GradientCovariance(channel_dim=-1)
    gradient.update(_rows(width=5))
    with pytest.raises(ArgumentError, match=r"gradient: expected that of the same layer, of shape \(8, 8\)"):
        bases.fisher(_covariance(_rows()), gradient)


def _stats(model, x):
    statistics = {
        "output": pcafast.Covariance(),
        "patches": pcafast.PatchCovariance(),
        "gradient": pcafast.GradientCovariance(),
        "matrix": pcafast.ActivationGradient(),
        "patch_matrix": pcafast.ActivationGradient(side="input"),
    }
    with pcafast.collect(model, **statistics) as stats:
        model(x).square().mean().backward()
    return {name: of["0"] for name, of in stats.items()}


KINDS = {
    "pca": lambda stats: bases.pca(stats["output"]),
    "pca of patches": lambda stats: bases.pca(stats["patches"]),
    "uncentred": lambda stats: bases.uncentred(stats["output"]),
    "uncentred patches": lambda stats: bases.uncentred(stats["patches"]),
    "fisher": lambda stats: bases.fisher(stats["output"], stats["gradient"]),
    "gradient": lambda stats: bases.gradient(stats["matrix"], select="magnitude"),
    "greedy": lambda stats: bases.gradient(stats["matrix"], select="signed"),
    "greedy of patches": lambda stats: bases.gradient(stats["patch_matrix"], select="signed"),
    "any matrix": lambda stats: bases.eigen(-stats["output"].compute().covariance, torch.ones(16), select="magnitude"),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_basis_makes_the_layer_it_codes(kind, groups):
    """A factorised layer equals the layer with its output, or its patches, coded explicitly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3, groups=groups)).double()
    x = torch.randn(6, 4, 9, 9, dtype=torch.float64) + 1
    basis = KINDS[kind](_stats(model, x))
    layer = model[0]
    plan = plan_low_rank(model, {"0": basis}, ranks={"0": 2})
    patches = nn.functional.unfold(x, 3).unflatten(1, (groups, -1))
    weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    encoder, decoder, mean = basis.encoder[:, :2], basis.decoder[:, :, :2], basis.mean.view(groups, -1, 1)
    bias = layer.bias.detach().view(groups, -1, 1)
    if basis.side == "input":
        expected = weight @ (decoder @ (encoder @ (patches - mean)) + mean) + bias
    else:
        expected = decoder @ (encoder @ (weight @ patches + bias - mean)) + mean
    found = plan.apply(model)(x).detach().flatten(2).unflatten(1, (groups, -1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_random_factors_have_the_plans_shapes_and_depend_on_the_seed_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 16, 3), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(4, 6, 9, 9)
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model(x)
    plan = plan_low_rank(model, stats["covariance"], ratio=0.25, example_input=x)
    assert [action.fuse_into for action in plan.actions] == ["1", None]
    state = torch.get_rng_state()
    first, again, other = (pcafast.random_factors(model, plan, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    small = plan.apply(model)
    assert {name: one.shape for name, one in first.state_dict().items()} == {
        name: one.shape for name, one in small.state_dict().items()
    }
    for name, one in first.state_dict().items():
        assert torch.equal(one, again.state_dict()[name])
        assert not torch.equal(one, other.state_dict()[name])
        assert one.std() > 0
    with pytest.raises(ArgumentError, match="plan: expected low-rank layers only, got a prune action on '0'"):
        pruning = pcafast.plan_pruning(
            model, {"0": torch.rand(16)}, budget=pcafast.Budget(channels=0.5), example_input=x[:1]
        )
        pcafast.random_factors(model, pruning)
