"""Networks whose graphs are easily misread: they are pruned rightly, left alone where they must be, or refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from masking import masked_outputs, randomised, scores_of
from torch import Tensor, nn

import pcafast
from pcafast.errors import ArgumentError


class Net(nn.Module):
    """A forward in one line."""

    def __init__(self, forward, **modules) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plan_for(model: nn.Module, x: Tensor, budget: pcafast.Budget | None = None, **options) -> pcafast.Plan:
    scores = options.pop("scores", None) or scores_of(model)
    return pcafast.plan_pruning(model, scores, budget=budget or pcafast.Budget(params=0.7), example_input=x, **options)


def widths(model: nn.Module) -> dict[str, int]:
    return {name: len(score) for name, score in scores_of(model).items()}


# Pruned rightly


IMAGE, SERIES, VOLUME, TOKENS = (2, 3, 8, 8), (2, 3, 10), (2, 3, 4, 4, 4), (2, 5, 6)
PRUNABLE = {
    "series, flattened": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)),
        SERIES,
    ),
    "volume, flattened": (
        lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)),
        VOLUME,
    ),
    "flattened, then normalised": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 4)),
        IMAGE,
    ),
    "concatenated, then flattened": (
        lambda: Net(
            lambda net, x: net.head(torch.cat([net.a(x), net.b(x)], 1).flatten(1)),
            a=nn.Conv2d(3, 6, 5),
            b=nn.Conv2d(3, 4, 5),
            head=nn.Linear(160, 4),
        ),
        IMAGE,
    ),
    "one slope for all channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(), nn.Conv2d(8, 4, 1)),
        IMAGE,
    ),
    "one slope for all channels, concatenated": (
        lambda: Net(
            lambda net, x: net.head(torch.cat([net.slope(net.a(x)), net.b(x)], 1)),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(3, 6, 1),
            slope=nn.PReLU(),
            head=nn.Conv2d(12, 4, 1),
        ),
        IMAGE,
    ),
    "changed in place after an instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)
        ),
        IMAGE,
    ),
    "grouped transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 4, 1)
        ),
        IMAGE,
    ),
    "padded by the operator": (
        lambda: Net(
            lambda net, x: net.head(torch.constant_pad_nd(net.a(x), [1, 0, 0, 0, 1, 2], 0.5)),
            a=nn.Conv2d(3, 8, 1),
            head=nn.Conv2d(11, 4, 1),
        ),
        IMAGE,
    ),
    "working on its input in place": (
        lambda: Net(lambda net, x: net.b(net.a(x.sub_(1))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1)),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", PRUNABLE)
def test_computes_what_the_model_does_without_the_removed_channels(name: str) -> None:
    torch.manual_seed(0)
    build, shape = PRUNABLE[name]
    model, x = randomised(build()), torch.randn(shape)
    scores = {name: score * (torch.arange(len(score)) > 0) for name, score in scores_of(model).items()}
    plan = plan_for(model, x, scores=scores)
    small = plan.apply(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x.clone()), masked_outputs(model, plan, x.clone()), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) == plan.reached["params"]["after"]
    assert plan.reached["params"]["share"] > 0.5  # not much less than was asked for


def test_layer_norm_normalises_the_kept_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3)).eval()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    x = torch.randn(TOKENS)
    plan = plan_for(model, x)
    kept = plan.actions[0].outputs
    with torch.no_grad():
        normalised = F.layer_norm(model[0](x)[..., kept], (len(kept),), model[1].weight[kept], model[1].bias[kept])
        expected = F.gelu(normalised) @ model[3].weight[:, kept].T + model[3].bias
        torch.testing.assert_close(plan.apply(model)(x), expected)


def test_random_numbers_are_left_to_the_user() -> None:
    model = PRUNABLE["padded by the operator"][0]()
    before = torch.get_rng_state()
    plan_for(model, torch.ones(IMAGE))  # an example that is the same everywhere is replaced by noise
    assert torch.equal(torch.get_rng_state(), before)


# Left alone


def around(operation, width: int) -> nn.Module:
    """Two layers that nothing hinders, and before them one whose output goes through the operation."""
    return Net(
        lambda net, x: net.last(torch.relu(net.free(operation(net.held(x))))),
        held=nn.Conv2d(3, 8, 3, padding=1),
        free=nn.Conv2d(width, 16, 3),
        last=nn.Conv2d(16, 4, 1),
    )


@pytest.mark.parametrize(
    ("operation", "width", "name"),
    [
        (lambda x: x.mean(1, keepdim=True), 1, "MeanBackward"),
        (lambda x: x[:, 2:], 6, "SliceBackward"),
        (lambda x: x[:, ::2], 4, "SliceBackward"),
        (lambda x: torch.cat(torch.split(x, [2, 6], 1)[::-1], 1), 8, "SplitWithSizesBackward"),
        (lambda x: F.glu(x, 1), 4, "GluBackward"),
        (lambda x: F.pad(x, (0, 0, 0, 0, -1, -1)), 6, "ConstantPadNdBackward"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"), 10, "ReplicationPad3DBackward"),
        (lambda x: F.pixel_shuffle(x, 2), 2, "PixelShuffleBackward"),
    ],
)
def test_layers_that_cannot_be_followed_are_left_alone(operation, width: int, name: str) -> None:
    torch.manual_seed(0)
    model, x = around(operation, width).eval(), torch.randn(IMAGE)
    plan = plan_for(model, x, pcafast.Budget(params=0.8))
    assert name in plan.skipped["held"]
    small = plan.apply(model)
    assert (small.held.out_channels, small.free.in_channels) == (8, width)
    assert small.free.out_channels < 16
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked_outputs(model, plan, x))


def test_norm_that_knows_its_width_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.RMSNorm(12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    plan = plan_for(model, torch.randn(TOKENS), pcafast.Budget(params=0.9))
    assert plan.skipped["0"] == "channels of nn.RMSNorm cannot be removed"
    assert plan.apply(model)[2].out_features < 12


def test_layer_that_loses_some_channels_is_not_called_left_alone() -> None:
    """Of the outputs of the layer, those that the input is added to must stay."""
    model = Net(
        lambda net, x: net.head(torch.cat([x, net.a(x)], 1) + net.b(x)),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(3, 11, 1),
        head=nn.Conv2d(11, 4, 1),
    ).eval()
    plan = plan_for(model, torch.randn(IMAGE))
    assert next(action for action in plan.actions if action.layer == "b").outputs[:3] == [0, 1, 2]
    assert plan.skipped.keys() == {"head"}


# Refused


def shuffled(x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("middle", "end", "x"),
    [
        ([nn.GroupNorm(1, 8)], [], torch.randn(IMAGE)),  # where removed channels change the others
        ([], [], torch.zeros(IMAGE)),  # of which the layers make nothing but zeros
        ([], [nn.Threshold(0, -torch.inf)], torch.randn(IMAGE)),
    ],
)
def test_misread_graph_is_refused_whatever_hides_it(middle, end, x: Tensor) -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1, bias=False)
    model = nn.Sequential(first, Net(lambda _, x: shuffled(x)), *middle, last, *end).eval()
    scores = {"0": torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])}
    with pytest.raises(ArgumentError, match="computes something else"):
        plan_for(model, x, scores=scores, budget=channels(0.75))


def channels(share: float) -> pcafast.Budget:
    return pcafast.Budget(channels=share)


def test_model_that_is_random_in_evaluation_is_refused() -> None:
    model = Net(lambda net, x: net.b(F.dropout(net.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))
    with pytest.raises(ArgumentError, match=r"differ each time.*training=self\.training"):
        plan_for(model, torch.randn(IMAGE))


def test_scores_below_zero_are_refused_where_they_are_divided() -> None:
    model, x = PRUNABLE["one slope for all channels"][0](), torch.randn(IMAGE)
    scores = {"0": torch.arange(8.0) - 3}
    with pytest.raises(ArgumentError, match=r"layer '0': expected none below 0 with scope='global'.*got -3"):
        plan_for(model, x, scores=scores)
    plan = plan_for(model, x, scores=scores, budget=channels(0.75), scope="layer")
    assert plan.actions[0].outputs == [2, 3, 4, 5, 6, 7]


def test_example_on_which_nothing_multiplies_is_refused() -> None:
    model = Net(lambda net, x: x + 1, a=nn.Conv2d(3, 8, 1))
    with pytest.raises(ArgumentError, match="example_input: expected one on which some layer multiplies"):
        plan_for(model, torch.randn(IMAGE))


# How much is removed


class Subclass(nn.Conv2d):
    pass


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, Subclass])
def test_macs_of_all_layers_count(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 32, 3), nn.ReLU(), kind(32, 32, 3), nn.ReLU(), kind(32, 4, 3)).eval()
    plan = plan_for(model, torch.randn(IMAGE), pcafast.Budget(macs=0.5))
    assert 0.47 < plan.reached["macs"]["share"] <= 0.5
    assert all(action.macs for action in plan.actions)


def test_widths_are_rounded_where_channels_count_several_times_or_must_stay() -> None:
    """A channel is 16 numbers for the norm; and of the 13 outputs of b, the input holds one."""
    flattened, x = PRUNABLE["flattened, then normalised"][0](), torch.randn(IMAGE)
    assert plan_for(flattened, x, round_to=4).apply(flattened)[0].out_channels == 4
    model = Net(
        lambda net, x: net.head(net.pad(x) + net.b(x)),
        pad=nn.ZeroPad3d((0, 0, 0, 0, 0, 12)),
        b=nn.Conv2d(1, 13, 1),
        head=nn.Conv2d(13, 4, 1),
    ).eval()
    scores = {"b": torch.ones(13)}
    small = plan_for(model, torch.randn(2, 1, 8, 8), scores=scores, budget=channels(0.95), round_to=4).apply(model)
    assert small.b.out_channels == 12


def test_layer_scope_puts_back_one_step_at_most() -> None:
    """The first layer has most of the MACs, so that after its last removal there is room for all of the others."""
    model = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 16))
    model = nn.Sequential(*model, nn.ReLU(), nn.Linear(16, 2)).eval()
    scores = {"0": torch.ones(4), "3": torch.full((16,), 2.0)}
    plan = plan_for(model, torch.randn(IMAGE), scores=scores, budget=pcafast.Budget(macs=0.6), scope="layer")
    small = plan.apply(model)
    assert small[0].out_channels == 2
    assert small[3].out_features == 10  # 9 are left when half of the first layer is gone


# Means


def test_norm_that_two_layers_share_takes_in_no_means() -> None:
    """What one of them loses is not what the other loses: each gets a bias."""
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.norm(net.b(net.a(x))) + net.norm(net.c(x)),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 6, 1, bias=False),
        c=nn.Conv2d(3, 6, 1, bias=False),
        norm=nn.BatchNorm2d(6),
    )
    model = randomised(model)
    with torch.no_grad():
        model.a.weight[[1, 4]] = 0
    x = torch.randn(IMAGE)
    with torch.no_grad(), pcafast.collect(model, moments=pcafast.ChannelMoments(side="input")) as stats:
        model(x)
    scores = {"a": torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])}
    plan = plan_for(model, x, scores=scores, budget=channels(0.75), means=stats["moments"])
    assert [action.means_into for action in plan.actions] == [None, "b"]
    with torch.no_grad():
        torch.testing.assert_close(plan.apply(model)(x), model(x))


# Edited plans


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        ("first", {"means_into": "last"}, "of layer 'first': expected null, the layer itself or the batch norm"),
        ("norm", {"means_into": "norm"}, "of layer 'norm': expected null, the layer itself or the batch norm"),
        ("norm", {"inputs": [0]}, "inputs of layer 'norm': expected null, as it has none"),
        ("last", {"means_into": "norm"}, r"expected the means of \d channels for a BatchNorm2d, got 4"),
        ("scale", {"outputs": [7, 8]}, "outputs of layer 'scale': expected some of its channels 0 to 7"),
        ("scale", {"outputs": []}, "outputs of layer 'scale': expected some of its channels 0 to 7"),
        ("scale", {"dim": 5}, "outputs of layer 'scale': expected null"),
    ],
)
def test_edited_plan_that_cannot_be_carried_out(layer: str, change, message: str) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.last(torch.relu(net.norm(net.first(x) * net.scale))),
        first=nn.Conv2d(3, 8, 1),
        norm=nn.BatchNorm2d(8),
        last=nn.Conv2d(8, 4, 1),
        scale=nn.Parameter(torch.ones(8, 1, 1)),
    )
    model = randomised(model)
    x = torch.randn(IMAGE)
    with torch.no_grad(), pcafast.collect(model, moments=pcafast.ChannelMoments(side="input")) as stats:
        model(x)
    plan = plan_for(model, x, means=stats["moments"])
    plan.actions = [
        dataclasses.replace(action, **change) if action.layer == layer else action for action in plan.actions
    ]
    with pytest.raises(ArgumentError, match=message):
        plan.apply(model)
