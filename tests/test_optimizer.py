"""An optimizer goes on with the smaller model, as if it had had it all along."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcafast
from pcafast.errors import ArgumentError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, bias=False)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        return self.linear(torch.tanh(self.conv2(x)).mean((2, 3)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.1, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.1, momentum=0.5, centered=True),
}


def trained(kind: str) -> tuple[Net, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(3):
        step(model, optimizer, x)
    return model.eval(), optimizer, x


def pruning(model: nn.Module, x: Tensor) -> pcafast.Plan:
    scores = {"conv1": torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0]), "conv2": torch.tensor([0.0, 1, 1, 1, 1, 0])}
    return pcafast.plan_pruning(model, scores, budget=pcafast.Budget(channels=9 / 14), example_input=x)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_is_cut_like_the_parameters(kind: str) -> None:
    model, optimizer, x = trained(kind)
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    plan = pruning(model, x)
    small = plan.apply(model)
    pcafast.rebind_optimizer(optimizer, plan, model, small)
    kept1, kept2 = [0, 2, 3, 5, 6], [1, 2, 3, 4]
    expected = {
        "conv1.weight": lambda t: t[kept1],
        "conv1.bias": lambda t: t[kept1],
        "bn.weight": lambda t: t[kept1],
        "bn.bias": lambda t: t[kept1],
        "conv2.weight": lambda t: t[kept2][:, kept1],
        "linear.weight": lambda t: t[:, kept2],
        "linear.bias": lambda t: t,
    }
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in small.parameters()}
    for name, parameter in small.named_parameters():
        state = optimizer.state[parameter]
        assert state.keys() == old[name].keys()
        for key, value in old[name].items():
            if isinstance(value, Tensor) and value.ndim:
                assert torch.equal(state[key], expected[name](value)), (name, key)
            else:
                assert state[key] == value
    assert len(optimizer.state) == len(list(small.parameters()))
    step(small, optimizer, x)


def test_a_step_of_the_kept_channels_is_that_of_the_masked_model() -> None:
    """Training the pruned model with the cut momenta moves it as the whole one moves, were the others not there."""
    model, optimizer, x = trained("sgd")
    plan = pruning(model, x)
    small = plan.apply(model)
    with torch.no_grad():
        model.conv2.weight[:, [1, 4, 7]] = 0
        model.linear.weight[:, [0, 5]] = 0
    twin = OPTIMIZERS["sgd"](model.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, cut in ((model.conv2.weight, [1, 4, 7]), (model.linear.weight, [0, 5])):
        twin.state[parameter]["momentum_buffer"][:, cut] = 0
    pcafast.rebind_optimizer(optimizer, plan, model, small)
    step(small, optimizer, x)
    step(model, twin, x)
    kept1, kept2 = [0, 2, 3, 5, 6], [1, 2, 3, 4]
    torch.testing.assert_close(small.conv1.weight, model.conv1.weight[kept1])
    torch.testing.assert_close(small.conv2.weight, model.conv2.weight[kept2][:, kept1])
    torch.testing.assert_close(small.linear.weight, model.linear.weight[:, kept2])


def test_groups_options_and_schedules_go_on() -> None:
    model = Net()
    other = nn.Linear(2, 2)
    groups = [
        {"params": [model.conv1.weight, model.conv1.bias, *other.parameters()], "lr": 0.5},
        {
            "params": [*model.bn.parameters(), *model.conv2.parameters(), *model.linear.parameters()],
            "weight_decay": 0.1,
        },
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    x = torch.randn(4, 3, 8, 8)
    step(model, optimizer, x)
    plan = pruning(model.eval(), x)
    small = plan.apply(model)
    pcafast.rebind_optimizer(optimizer, plan, model, small)
    first = [small.conv1.weight, small.conv1.bias, *other.parameters()]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in first]
    assert optimizer.param_groups[1]["weight_decay"] == 0.1
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1])


def test_state_can_be_forgotten() -> None:
    model, optimizer, x = trained("adamw")
    plan = pruning(model, x)
    small = plan.apply(model)
    pcafast.rebind_optimizer(optimizer, plan, model, small, keep_state=False)
    assert not optimizer.state
    step(small, optimizer, x)


def test_factors_join_the_group_of_their_layer_without_state() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    x = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[3].parameters()}])
    step(model, optimizer, x)
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance(), layers="0") as stats:
        model(x)
    plan = pcafast.plan_low_rank(model, stats["covariance"], ratio=0.25)
    small = plan.apply(model)
    pcafast.rebind_optimizer(optimizer, plan, model, small)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in small[0].parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in small[3].parameters()}
    step(small, optimizer, x)


def test_new_bias_joins_the_group_of_its_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1, bias=False), nn.ReLU(), nn.Conv2d(5, 2, 1))
    x = torch.randn(2, 3, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer, x)
    with torch.no_grad(), pcafast.collect(model, moments=pcafast.ChannelMoments(side="input")) as stats:
        model(x)
    plan = pcafast.plan_pruning(
        model.eval(), {"0": torch.rand(6)}, budget=pcafast.Budget(channels=0.5), example_input=x, means=stats["moments"]
    )
    small = plan.apply(model)
    pcafast.rebind_optimizer(optimizer, plan, model, small)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in small.parameters()}
    assert small[2].bias not in optimizer.state


def test_optimizer_of_another_model_is_refused_and_left_as_it_was() -> None:
    model, _, x = trained("sgd")
    stranger = torch.optim.SGD(Net().parameters(), 0.1)
    before = [id(p) for p in stranger.param_groups[0]["params"]]
    plan = pruning(model, x)
    with pytest.raises(ArgumentError, match="owns none of them"):
        pcafast.rebind_optimizer(stranger, plan, model, plan.apply(model))
    assert [id(p) for p in stranger.param_groups[0]["params"]] == before


def test_model_that_is_not_the_smaller_one_is_refused() -> None:
    model, optimizer, x = trained("sgd")
    with pytest.raises(ArgumentError, match=r"small: expected the model that plan\.apply returned"):
        pcafast.rebind_optimizer(optimizer, pruning(model, x), model, nn.Linear(2, 2))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_smaller_model_of_another_plan_is_refused() -> None:
    model, optimizer, x = trained("sgd")
    other = pcafast.plan_pruning(model, {"conv1": torch.rand(8)}, budget=pcafast.Budget(channels=0.5), example_input=x)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ArgumentError, match=r"'bn.bias' of shape \(5,\), found \(4,\)"):
        pcafast.rebind_optimizer(optimizer, pruning(model, x), model, other.apply(model))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before
    assert all(id(parameter) in before for parameter in optimizer.state)


def test_state_of_another_shape_than_the_parameter_is_forgotten() -> None:
    """Adafactor keeps rows and columns of matrices; of vectors as much as they hold."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, x)
    old = optimizer.state[model.bn.weight]["variance"]
    plan = pruning(model.eval(), x)
    small = plan.apply(model)
    pcafast.rebind_optimizer(optimizer, plan, model, small)
    assert small.conv1.weight not in optimizer.state
    assert torch.equal(optimizer.state[small.bn.weight]["variance"], old[[0, 2, 3, 5, 6]])
    step(small, optimizer, x)


def test_optimizer_that_sees_all_parameters_as_one_is_refused() -> None:
    model, _, x = trained("sgd")
    plan = pruning(model, x)
    with pytest.raises(ArgumentError, match=r"LBFGS sees them as one vector.*torch\.optim\.LBFGS\(small"):
        pcafast.rebind_optimizer(torch.optim.LBFGS(model.parameters()), plan, model, plan.apply(model))
