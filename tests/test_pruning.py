"""Structured pruning: what is removed together, which goes first, and that the result computes the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from masking import masked_outputs, randomised, scores_of
from torch import Tensor, nn

import pcafast
from pcafast.errors import ArgumentError
from pcafast.models import build
from pcafast.plan.ties import Place
from pcafast.plan.units import find_units


class ConvNet(nn.Module):
    """conv-bn-relu-conv-pool-linear, with a functional forward."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, groups=groups)
        self.linear = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.adaptive_avg_pool2d(torch.tanh(self.conv2(x)), 2)
        return self.linear(x.flatten(1))


class Residual(nn.Module):
    """A stream of 8 channels with two branches, one of them depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branch1 = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.branch2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.PReLU(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.branch1(x))
        x = x + self.branch2(x)
        return self.head(x.mean((2, 3)))


class Concatenation(nn.Module):
    """Two branches next to each other, as in GoogLeNet and DenseNet, and the input itself as a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(13)
        self.c = nn.Conv2d(13, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.norm(torch.cat([self.a(x), x, self.b(x)], 1)))).mean((2, 3))


class PaddedShortcut(nn.Module):
    """A shortcut that pads channels, by a module or by a number in the forward."""

    def __init__(self, by_module: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 10, 3, padding=1)
        self.pad = nn.ZeroPad3d((0, 0, 0, 0, 2, 4)) if by_module else None
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(x))
        shortcut = F.pad(x, (0, 0, 0, 0, 2, 4)) if self.pad is None else self.pad(x)
        return self.head(torch.sigmoid(self.conv2(x) + shortcut).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(x).mean((2, 3))


MODELS = {
    "plain": ConvNet,
    "grouped, whole groups": lambda: ConvNet(groups=4),
    "grouped, same channels": lambda: ConvNet(groups=2),
    "residual": Residual,
    "concatenation": Concatenation,
    "padded by a module": lambda: PaddedShortcut(True),
    "padded in code": lambda: PaddedShortcut(False),
    "squeeze and excite": SqueezeExcite,
    "resnet20": lambda: build("resnet20"),
    "digits_cnn": lambda: build("digits_cnn"),
    "lenet5": lambda: build("lenet5"),
}
SHAPES = {"resnet20": (2, 3, 32, 32), "digits_cnn": (2, 1, 8, 8), "lenet5": (2, 1, 28, 28)}


@pytest.mark.parametrize("share", [0.8, 0.45])
@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_model_does_without_the_removed_channels(name: str, share: float) -> None:
    torch.manual_seed(0)
    model = randomised(MODELS[name]())
    x = torch.randn(SHAPES.get(name, (2, 3, 9, 9)))
    before = copy.deepcopy(model.state_dict())
    plan = pcafast.plan_pruning(model, scores_of(model), budget=pcafast.Budget(params=share), example_input=x)
    small = plan.apply(model)
    assert plan.actions
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked_outputs(model, plan, x), rtol=1e-4, atol=1e-4)
    params = sum(p.numel() for p in small.parameters())
    assert params == plan.reached["params"]["after"] <= share * plan.reached["params"]["before"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(small.train()(x).sum(), small(x).sum())  # it trains, too


def test_residual_stream_is_one_unit_per_channel() -> None:
    units = find_units(Residual().eval(), (torch.randn(1, 3, 5, 5),)).units
    stream = [unit for unit in units if Place("stem", "output") in unit]
    assert [unit[Place("stem", "output")] for unit in stream] == [[index] for index in range(8)]
    assert set(stream[3]) == {
        Place("stem", "output"),
        Place("branch1.0", "input"),
        Place("branch1.3", "output"),
        Place("branch2.0", "output"),
        Place("branch2.0", "input"),
        Place("branch2.1", "output"),
        Place("head", "input"),
    }
    assert all(indices == [3] for indices in stream[3].values())


def test_padded_shortcut_ties_only_the_channels_it_carries() -> None:
    """Channel c of the first layer meets channel c + 2 of the second; the added ones are free if a module pads."""
    x = (torch.randn(1, 3, 5, 5),)
    found = find_units(PaddedShortcut(True).eval(), x)
    carried = [unit for unit in found.units if Place("conv1", "output") in unit]
    assert [(unit[Place("conv1", "output")], unit[Place("conv2", "output")]) for unit in carried] == [
        ([index], [index + 2]) for index in range(4)
    ]
    free = [unit for unit in found.units if Place("pad", "output") in unit]
    assert [(unit[Place("pad", "output")], unit[Place("conv2", "output")]) for unit in free] == [
        ([index], [index if index < 2 else index + 4]) for index in range(6)
    ]
    in_code = find_units(PaddedShortcut(False).eval(), x)
    assert [unit[Place("conv2", "output")] for unit in in_code.units if Place("conv2", "output") in unit] == [
        [index + 2] for index in range(4)
    ]
    assert "pads by a fixed number" in in_code.obstacles["conv2"]


def test_padding_follows_the_channels() -> None:
    model = PaddedShortcut(True).eval()
    scores = {"conv2": torch.tensor([0.0, 9, 9, 0, 9, 9, 9, 0, 0, 9])}
    plan = pcafast.plan_pruning(
        model, scores, budget=pcafast.Budget(channels=0.6), example_input=torch.randn(1, 3, 5, 5)
    )
    small = plan.apply(model)
    # Of the outputs 0 and 1 before the carried 2..5, and 6..9 after them, 0 is gone, 3, 7 and 8.
    assert small.pad.padding == (0, 0, 0, 0, 1, 2)
    assert (small.conv1.out_channels, small.conv2.out_channels) == (3, 6)


def test_lowest_scores_go_first_and_of_equal_ones_the_last() -> None:
    model = ConvNet().eval()
    x = torch.randn(1, 3, 9, 9)
    scores = {"conv1": torch.tensor([1.0, 5, 5, 2, 5, 5, 3, 5])}
    plans = {
        kept: pcafast.plan_pruning(model, scores, budget=pcafast.Budget(channels=kept / 8), example_input=x)
        for kept in (7, 5, 3)
    }
    outputs = {kept: next(a.outputs for a in plan.actions if a.layer == "conv1") for kept, plan in plans.items()}
    assert outputs == {7: [1, 2, 3, 4, 5, 6, 7], 5: [1, 2, 4, 5, 7], 3: [1, 2, 4]}
    again = pcafast.plan_pruning(model, scores, budget=pcafast.Budget(channels=3 / 8), example_input=x)
    assert str(again) == str(plans[3])


def test_score_of_a_unit_is_the_sum_over_the_layers_with_scores() -> None:
    model = Residual().eval()
    scores = {"stem": torch.arange(8.0), "branch1.3": torch.tensor([0.0, 9, 9, 9, 0, 9, 9, 9])}
    plan = pcafast.plan_pruning(
        model, scores, budget=pcafast.Budget(channels=0.75), example_input=torch.randn(1, 3, 5, 5)
    )
    assert next(action.outputs for action in plan.actions if action.layer == "stem") == [1, 2, 3, 5, 6, 7]


def test_global_scope_weighs_scores_by_what_is_saved() -> None:
    """conv1's channels save nine times the MACs of conv2's, so at equal scores they go first."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(98, 2))
    scores = {"0": torch.ones(8), "1": torch.ones(8)}
    plan = pcafast.plan_pruning(
        model.eval(), scores, budget=pcafast.Budget(macs=0.9), example_input=torch.randn(1, 3, 9, 9)
    )
    assert [action.layer for action in plan.actions] == ["0", "1"]
    assert plan.actions[0].outputs is not None
    assert plan.actions[1].outputs is None


def test_layer_scope_removes_the_same_share_everywhere() -> None:
    model = build("resnet20").eval()
    plan = pcafast.plan_pruning(
        model,
        {name: score for name, score in scores_of(model).items() if name.startswith("layer") and "conv1" in name},
        budget=pcafast.Budget(channels=0.5),
        example_input=torch.randn(1, 3, 32, 32),
        scope="layer",
    )
    kept = {action.layer: len(action.outputs) for action in plan.actions if action.macs and action.outputs}
    assert kept == {f"layer{s}.{b}.conv1": 8 * 2 ** (s - 1) for s in (1, 2, 3) for b in range(3)}


@pytest.mark.parametrize("round_to", [4, 8])
def test_widths_are_rounded_and_no_layer_gets_too_narrow(round_to: int) -> None:
    model = build("resnet20").eval()
    plan = pcafast.plan_pruning(
        model,
        scores_of(model),
        budget=pcafast.Budget(macs=0.5),
        example_input=torch.randn(1, 3, 32, 32),
        round_to=round_to,
        min_width=round_to,
    )
    widths = [m.out_channels for m in plan.apply(model).modules() if isinstance(m, nn.Conv2d)]
    assert all(width % round_to == 0 for width in widths)
    assert min(widths) >= round_to
    assert 0.4 < plan.reached["macs"]["share"] <= 0.5


def test_minimum_width_holds() -> None:
    model = ConvNet().eval()
    scores = {"conv1": torch.zeros(8), "conv2": torch.ones(12)}
    x = torch.randn(1, 3, 9, 9)
    plan = pcafast.plan_pruning(model, scores, budget=pcafast.Budget(channels=0.5), example_input=x, min_width=5)
    assert {a.layer: len(a.outputs) for a in plan.actions if a.outputs and a.macs} == {"conv1": 5, "conv2": 5}


def test_outputs_of_the_model_stay() -> None:
    model = ConvNet().eval()
    plan = pcafast.plan_pruning(
        model, scores_of(model), budget=pcafast.Budget(params=0.3), example_input=torch.randn(1, 3, 9, 9)
    )
    assert plan.apply(model).linear.out_features == 5
    assert "output" in plan.skipped["linear"]


def test_plan_replays_from_json_without_the_graph(tmp_path, monkeypatch) -> None:
    model = randomised(build("resnet20"))
    x = torch.randn(2, 3, 32, 32)
    plan = pcafast.plan_pruning(model, scores_of(model), budget=pcafast.Budget(macs=0.5), example_input=x)
    plan.save(tmp_path / "plan.json")
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    again = pcafast.Plan.load(tmp_path / "plan.json")
    with torch.no_grad():
        assert torch.equal(again.apply(model)(x), plan.apply(model)(x))


def test_what_the_parameters_are_is_kept() -> None:
    model = ConvNet().to(torch.float64, memory_format=torch.channels_last).eval()
    model.conv1.weight.requires_grad_(False)
    model.bn1.bias.requires_grad_(False)
    plan = pcafast.plan_pruning(
        model,
        scores_of(model),
        budget=pcafast.Budget(params=0.5),
        example_input=torch.randn(1, 3, 9, 9, dtype=torch.float64),
    )
    small = plan.apply(model)
    for name, parameter in small.named_parameters():
        old = model.get_parameter(name)
        assert (parameter.dtype, parameter.requires_grad) == (old.dtype, old.requires_grad)
    assert small.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.training


def test_empty_plan_changes_nothing() -> None:
    model = randomised(build("resnet20"))
    x = torch.randn(2, 3, 32, 32)
    plan = pcafast.plan_pruning(model, scores_of(model), budget=pcafast.Budget(macs=1.0), example_input=x)
    assert not plan.actions
    with torch.no_grad():
        assert torch.equal(plan.apply(model)(x), model(x))


def test_layers_in_use_twice_are_handled() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))

    model = Twice().eval()
    x = torch.randn(3, 4)
    plan = pcafast.plan_pruning(model, scores_of(model), budget=pcafast.Budget(params=0.5), example_input=x)
    small = plan.apply(model)
    assert small.again.in_features == small.again.out_features == small.first.out_features < 6
    torch.testing.assert_close(small(x), masked_outputs(model, plan, x))


def test_shared_weights_are_left_alone() -> None:
    model = ConvNet().eval()
    model.twin = nn.Conv2d(3, 8, 3, padding=1)
    model.twin.weight = model.conv1.weight
    plan = pcafast.plan_pruning(
        model, scores_of(model), budget=pcafast.Budget(params=0.9), example_input=torch.randn(1, 3, 9, 9)
    )
    assert "shares" in plan.skipped["conv1"]
    assert plan.apply(model).conv1.out_channels == 8


# Means


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_removing_constant_channels_changes_nothing_with_means(bias: bool, norm: bool) -> None:
    """Their mean is all there is to them: into the bias, the norm, or a new bias."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=bias), nn.BatchNorm2d(5) if norm else nn.Identity()
    )
    model = randomised(nn.Sequential(*model, nn.ReLU(), nn.Conv2d(5, 2, 1)))
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([3.0, 0.7])
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad(), pcafast.collect(model, moments=pcafast.ChannelMoments(side="input")) as stats:
        model(x)
    plans = {
        compensated: pcafast.plan_pruning(
            model,
            {"0": torch.tensor([1.0, 0, 1, 1, 0, 1])},
            budget=pcafast.Budget(channels=4 / 6),
            example_input=x,
            means=stats["moments"] if compensated else None,
        )
        for compensated in (True, False)
    }
    with torch.no_grad():
        torch.testing.assert_close(plans[True].apply(model)(x), model(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plans[False].apply(model)(x), model(x), rtol=1e-2, atol=1e-2)
    into = next(action.means_into for action in plans[True].actions if action.layer == "2")
    assert into == ("3" if norm and not bias else "2")


def test_new_biases_are_within_the_budget(tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False), nn.ReLU())
    model = nn.Sequential(*model, nn.Conv2d(8, 2, 1, bias=False)).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), pcafast.collect(model, moments=pcafast.ChannelMoments(side="input")) as stats:
        model(x)
    plan = pcafast.plan_pruning(
        model, scores_of(model), budget=pcafast.Budget(params=0.6), example_input=x, means=stats["moments"]
    )
    small = plan.apply(model)
    assert sum(p.numel() for p in small.parameters()) == plan.reached["params"]["after"] <= 0.6 * 104
    assert small[4].bias is not None
    pcafast.save(small, plan, tmp_path)
    assert torch.equal(pcafast.load(model, tmp_path)(x), small(x))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": {}}, "scores: expected those of at least one layer"),
        ({"scores": {"conv9": torch.ones(8)}}, "'conv9' is not a linear layer or convolution of the model"),
        ({"scores": {"conv1": torch.ones(7)}}, r"layer 'conv1': expected shape \(8,\).*got \(7,\)"),
        ({"scores": {"conv1": torch.full((8,), torch.nan)}}, "layer 'conv1': expected finite numbers, got 8 NaN"),
        ({"scores": {"conv1": pcafast.Taylor()}}, r"pcafast.scores.taylor\(stats\['taylor'\]\)"),
        ({"budget": 0.5}, r"budget: expected a pcafast.Budget"),
        (
            {"budget": pcafast.Budget(params=0.01)},
            r"budget: params=0.01 cannot be met.*\d+\.\d+% of the model's params",
        ),
        ({"scope": "everywhere"}, "scope: expected one of global, layer, got 'everywhere'"),
        ({"min_width": 0}, "min_width: expected a whole number of at least 1, got 0"),
        ({"round_to": 2.5}, "round_to: expected a whole number of at least 1, got 2.5"),
        ({"example_input": torch.randn(1, 4, 9, 9)}, "example_input: the model's forward failed on it"),
        ({"means": {"conv1": pcafast.ChannelMoments()}}, r"means: expected the ChannelMoments\(side='input'\)"),
    ],
)
def test_wrong_arguments(options, message) -> None:
    model = ConvNet().eval()
    before = copy.deepcopy(model.state_dict())
    arguments = {
        "scores": scores_of(model),
        "budget": pcafast.Budget(params=0.5),
        "example_input": torch.randn(1, 3, 9, 9),
        **options,
    }
    with pytest.raises(ArgumentError, match=message):
        pcafast.plan_pruning(model, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_misread_graph_is_refused_by_name() -> None:
    """A channel shuffle, which the graph takes for nothing."""

    class Shuffled(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            x = F.adaptive_avg_pool2d(torch.tanh(self.conv2(x)), 2)
            return self.linear(x.flatten(1))

    model = randomised(Shuffled())
    with pytest.raises(ArgumentError, match=r"computes something else, from layer 'conv2' on.*plan_low_rank"):
        pcafast.plan_pruning(
            model,
            {"conv1": torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])},
            budget=pcafast.Budget(channels=0.75),
            example_input=torch.randn(1, 3, 9, 9),
        )


def test_forward_that_autograd_cannot_follow() -> None:
    class Detached(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(ArgumentError, match=r"autograd can follow.*plan_low_rank"):
        pcafast.plan_pruning(
            Detached().eval(),
            {"conv1": torch.ones(8)},
            budget=pcafast.Budget(params=0.5),
            example_input=torch.randn(1, 3, 9, 9),
        )


def test_plan_for_another_model_shows_the_difference() -> None:
    model = ConvNet().eval()
    plan = pcafast.plan_pruning(
        model, scores_of(model), budget=pcafast.Budget(params=0.5), example_input=torch.randn(1, 3, 9, 9)
    )
    with pytest.raises(ArgumentError, match=r"'conv2'.*expected a weight of shape \(12, 8, 3, 3\).*\(12, 2, 3, 3\)"):
        plan.apply(ConvNet(groups=4))
    with pytest.raises(ArgumentError, match="expected a layer 'conv1'"):
        plan.apply(Residual())


@pytest.mark.parametrize(
    ("side", "kept", "message"),
    [
        ("outputs", [], "expected some of its channels 0 to 7, got"),
        ("outputs", [0, 8], "expected some of its channels 0 to 7, got"),
    ],
)
def test_layer_that_would_vanish_in_an_edited_plan(side, kept, message) -> None:
    import dataclasses

    model = ConvNet().eval()
    plan = pcafast.plan_pruning(
        model, {"conv1": torch.rand(8)}, budget=pcafast.Budget(params=0.9), example_input=torch.randn(1, 3, 9, 9)
    )
    plan.actions = [dataclasses.replace(plan.actions[0], **{side: kept}), *plan.actions[1:]]
    with pytest.raises(ArgumentError, match=message):
        plan.apply(model)
