"""Which ranks are chosen, what they cost, and which arguments are refused."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pcafast
from pcafast.errors import ArgumentError, PcafastError
from pcafast.functional import MeanCovariance
from pcafast.models import build
from pcafast.plan import Budget, plan_low_rank


class Net(nn.Module):
    """Stride, groups, a layer used twice, adjacent linear layers, and attention, whose MACs no layer owns."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=2)
        self.again = nn.Conv2d(24, 24, 3, padding=1)
        self.expand = nn.Conv2d(24, 32, 1)
        self.reduce = nn.Conv2d(32, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.norm(self.down(self.stem(x).relu())).relu()
        x = self.again(self.again(self.grouped(x).relu()).relu()).relu()
        x = self.reduce(self.expand(x)).flatten(2).mT
        x = nn.functional.scaled_dot_product_attention(x, x, x)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def _collected(model, x):
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model(x)
    return stats["covariance"]


@pytest.fixture(scope="module")
def covariance(net, images):
    return _collected(net, images)


def _measured(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return {"macs": counter.get_total_flops() // 2, "params": sum(p.numel() for p in model.parameters())}


@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize("share", [0.31, 0.45, 0.6, 0.75, 0.9, 1.0])
def test_budget_is_never_exceeded_and_the_plan_tells_the_truth(net, covariance, images, quantity, share):
    plan = plan_low_rank(net, covariance, budget=Budget(**{quantity: share}), example_input=images)
    before, after = _measured(net, images), _measured(plan.apply(net), images)
    assert after[quantity] / before[quantity] <= share
    assert after[quantity] / before[quantity] > share - 0.03
    for counted in ("macs", "params"):
        assert plan.reached[counted]["before"] == before[counted]
        assert plan.reached[counted]["after"] == after[counted]
        assert plan.reached[counted]["share"] == after[counted] / before[counted]
    assert plan.asked == {"method": "low_rank", quantity: share}


@pytest.mark.parametrize("rule", [{"ratio": 0.4}, {"energy": 0.8}])
@pytest.mark.parametrize("with_example", [False, True])
def test_counts_are_true_for_every_rule(net, covariance, images, rule, with_example):
    plan = plan_low_rank(net, covariance, **rule, example_input=images if with_example else None)
    after = _measured(plan.apply(net), images)
    assert plan.reached["params"]["after"] == after["params"]
    assert plan.reached.get("macs", {}).get("after") == (after["macs"] if with_example else None)
    assert all((action.macs is not None) == with_example for action in plan.actions)


def test_whole_budget_changes_nothing(net, covariance, images):
    plan = plan_low_rank(net, covariance, budget=Budget(macs=1.0), example_input=images)
    assert plan.actions == []
    assert torch.equal(plan.apply(net)(images), net(images))


def _kept_by_hand(covariance, rank, groups):
    blocks = covariance.reshape(groups, *covariance.shape[-2:])
    spectra = torch.linalg.eigvalsh(blocks).flip(-1)
    return (spectra[:, :rank].sum() / spectra.sum()).item()


def test_budget_keeps_the_largest_product_of_variance_shares():
    """Against all combinations of ranks, at the budgets where the choice uses up what it is given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7))
    x = torch.randn(500, 9)
    covariance = _collected(model, x)
    options = []
    for name in ("0", "2", "4"):
        layer = model.get_submodule(name)
        matrix = covariance[name].compute().covariance
        n, k = layer.weight.shape
        ranked = [(r * (n + k) + r + n, _kept_by_hand(matrix, r, 1)) for r in range(1, n) if r * (n + k) < n * k]
        ranked = [(cost, kept) for cost, kept in ranked if cost < n * k + n]
        options.append([*ranked, (n * k + n, 1.0)])
    combinations = [
        (sum(cost for cost, _ in choice), math.prod(kept for _, kept in choice))
        for choice in itertools.product(*options)
    ]
    whole = sum(p.numel() for p in model.parameters())
    exact = 0
    for params in range(min(cost for cost, _ in combinations), whole + 1):
        plan = plan_low_rank(model, covariance, budget=Budget(params=params / whole))
        kept = math.prod(action.kept for action in plan.actions)
        best = max(kept for cost, kept in combinations if cost <= params)
        assert plan.reached["params"]["after"] <= params
        assert kept <= best + 1e-12
        assert kept > 0.85 * best
        exact += kept == pytest.approx(best)
    assert exact > 0.7 * (whole - min(cost for cost, _ in combinations))


def test_ratio_is_rounded_to_nearest_and_at_least_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 25), nn.ReLU(), nn.Linear(25, 3), nn.ReLU(), nn.Conv1d(1, 30, 20))
    model = nn.Sequential(*list(model)[:3])
    covariance = _collected(model, torch.randn(100, 40))
    ranks = {
        ratio: {action.layer: action.rank for action in plan_low_rank(model, covariance, ratio=ratio).actions}
        for ratio in (0.1, 0.3, 0.01)
    }
    assert ranks == {0.1: {"0": 3, "2": 1}, 0.3: {"0": 8, "2": 1}, 0.01: {"0": 1, "2": 1}}  # 2.5 -> 3, 7.5 -> 8


def test_energy_keeps_the_fewest_directions(net, covariance):
    plan = plan_low_rank(net, covariance, energy=0.7)
    assert plan.actions
    for action in plan.actions:
        matrix = covariance[action.layer].compute().covariance
        groups = getattr(net.get_submodule(action.layer), "groups", 1)
        assert action.kept == pytest.approx(_kept_by_hand(matrix, action.rank, groups))
        assert action.kept >= 0.7
        assert action.rank == 1 or _kept_by_hand(matrix, action.rank - 1, groups) < 0.7


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_a_budget_that_cannot_be_met_names_the_nearest_that_can(net, covariance, images, quantity):
    with pytest.raises(ArgumentError, match=rf"budget: {quantity}=0.01 cannot be met.*at rank 1") as error:
        plan_low_rank(net, covariance, budget=Budget(**{quantity: 0.01}), example_input=images)
    nearest = Budget.parse(str(error.value).split()[-1].rstrip("."))
    assert (
        plan_low_rank(net, covariance, budget=nearest, example_input=images).reached[quantity]["share"] <= nearest.share
    )
    closer = dataclasses.replace(nearest, **{quantity: nearest.share - 0.0002})
    with pytest.raises(ArgumentError, match="cannot be met"):
        plan_low_rank(net, covariance, budget=closer, example_input=images)


@pytest.mark.parametrize(("text", "quantity", "share"), [("macs=0.5", "macs", 0.5), ("params=1", "params", 1.0)])
def test_budget_from_text(text, quantity, share):
    budget = Budget.parse(text)
    assert (budget.quantity, budget.share) == (quantity, share)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs", "expected a number after macs=, got 'macs'"),
        ("macs=half", "expected a number after macs=, got 'macs=half'"),
        ("flops=0.5", r"expected macs=SHARE or params=SHARE or channels=SHARE, .* got 'flops=0.5'"),
        ("macs=0", r"expected a share in \(0, 1\] of the model's macs, got macs=0"),
        ("params=1.5", r"share in \(0, 1\] of the model's params, got params=1.5"),
        ("macs=nan", r"share in \(0, 1\]"),
    ],
)
def test_bad_budget_text(text, message):
    with pytest.raises(ArgumentError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize("given", [{}, {"macs": 0.5, "params": 0.5}])
def test_budget_is_of_exactly_one_quantity(given):
    with pytest.raises(ArgumentError, match="exactly one of macs, params, channels"):
        Budget(**given)


@pytest.mark.parametrize("share", [1 / 3, 0.29, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("whole", [1, 7, 100, 999, 10**9 + 7])
def test_allowance_is_the_largest_count_within_the_share(share, whole):
    count = Budget(macs=share).allowance(whole)
    assert count / whole <= share < (count + 1) / whole


@dataclasses.dataclass(kw_only=True)
class _Given(pcafast.Covariance):
    """A covariance that has seen just what the test says."""

    mean: torch.Tensor | None = None
    covariance: torch.Tensor | None = None

    has_data = True

    def compute(self):
        return MeanCovariance(self.mean, self.covariance)


def _two_arguments():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, mask):
            return self.fc(x) * mask

    return Masked()


LINEAR = nn.Sequential(nn.Linear(4, 4))
EYE = torch.eye(4)


@pytest.mark.parametrize(
    ("model", "statistics", "options", "message"),
    [
        (LINEAR, {}, {"ratio": 0.5}, "statistics: expected the covariance of at least one layer"),
        (LINEAR, {"fc": _Given()}, {"ratio": 0.5}, "statistics: 'fc' is not a layer of the model, which has 0"),
        (
            LINEAR,
            {"0": pcafast.Taylor()},
            {"ratio": 0.5},
            "expected the Covariance or PatchCovariance of layer '0', or a basis .*, got a Taylor",
        ),
        (LINEAR, {"0": _Given(tap="norm")}, {"ratio": 0.5}, "right at layer '0'.* after its norm"),
        (
            LINEAR,
            {"0": _Given(mean=torch.zeros(3), covariance=torch.eye(3))},
            {"ratio": 0.5},
            r"expected an output mean of shape \(4,\) and directions of shape \(1, 4, 4\) for layer '0', got \(3,\)",
        ),
        (
            nn.Sequential(nn.Conv2d(8, 4, 3, groups=2)),
            {"0": _Given(mean=torch.zeros(4), covariance=EYE)},
            {"ratio": 0.5},
            r"directions of shape \(2, 2, 2\) for layer '0', got \(4,\) and \(1, 4, 4\)",
        ),
        (
            nn.Sequential(nn.Conv2d(4, 4, 3)),
            {"0": _Given(side="input", mean=torch.zeros(4), covariance=EYE)},
            {"ratio": 0.5},
            "input side of layer '0'.* Collect PatchCovariance",
        ),
        (
            LINEAR,
            {"0": _Given(mean=torch.zeros(4), covariance=EYE * torch.nan)},
            {"ratio": 0.5},
            "statistics of layer '0': covariance: expected finite numbers",
        ),
        (LINEAR, {"0": _Given()}, {}, "exactly one of budget, ratio, energy and ranks, got none"),
        (LINEAR, {"0": _Given()}, {"ratio": 0.5, "energy": 0.9}, "exactly one .* got ratio, energy"),
        (LINEAR, {"0": _Given()}, {"ratio": 0.0}, r"ratio: expected a share in \(0, 1\], got 0.0"),
        (LINEAR, {"0": _Given()}, {"energy": 1.1}, r"energy: expected a share in \(0, 1\], got 1.1"),
        (LINEAR, {"0": _Given()}, {"budget": Budget(macs=0.5)}, "example_input: .* got None"),
        (
            _two_arguments(),
            {"fc": _Given()},
            {"ratio": 0.5, "example_input": torch.zeros(2, 4)},
            r"example_input: the model's forward failed on it \(TypeError: .*'mask'.*a tuple of one tensor for each",
        ),
    ],
)
def test_wrong_arguments(model, statistics, options, message):
    with pytest.raises(ArgumentError, match=message):
        plan_low_rank(model, statistics, **options)


def test_statistics_that_have_seen_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        pass
    with pytest.raises(PcafastError, match="has seen no batch"):
        plan_low_rank(model, stats["covariance"], ratio=0.25)
    with pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model[0](torch.randn(30, 4))
    plan = plan_low_rank(model, stats["covariance"], ratio=0.25)
    assert [action.layer for action in plan.actions] == ["0"]
    assert "has seen no batch" in plan.skipped["2"]


def test_a_tuple_is_one_tensor_per_argument():
    model, x = _two_arguments(), torch.randn(50, 4)
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model(x, x)
    plan = plan_low_rank(model, stats["covariance"], ratio=0.25, example_input=(x, x))
    assert plan.reached["macs"] == {"before": 800, "after": 400, "share": 0.5}


def test_two_plans_in_a_row_are_one():
    """The second is made for what the first makes; together they rebuild its structure from the original."""
    model = build("digits_cnn").eval()
    x = torch.randn(2, 1, 8, 8)
    scores = pcafast.scores.filter_norm
    first = pcafast.plan_pruning(model, scores(model), budget=pcafast.Budget(macs=0.7), example_input=x)
    middle = first.apply(model)
    second = pcafast.plan_pruning(middle, scores(middle), budget=pcafast.Budget(macs=0.7), example_input=x)
    small = second.apply(middle)
    both = first.then(second)
    rebuilt = both.apply_structure(model)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(rebuilt(x), small(x))
    before, after = first.reached["macs"]["before"], second.reached["macs"]["after"]
    assert both.reached["macs"] == {"before": before, "after": after, "share": after / before}
    assert both.asked == first.asked
    with pytest.raises(PcafastError, match="holds no tensors"):
        both.apply(model)


def test_low_rank_has_no_budget_of_channels():
    with pytest.raises(ArgumentError, match=r"since no channels are removed, got channels=0\.5"):
        plan_low_rank(nn.Linear(4, 4), {}, budget=Budget(channels=0.5))
