import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pcafast import data, models
from pcafast.errors import ArgumentError, FileError

INPUTS = {"digits_cnn": (1, 8, 8), "lenet5": (1, 28, 28), "mnist_cnn": (1, 28, 28)}


@pytest.mark.parametrize("name", models.available())
@pytest.mark.parametrize("num_classes", [None, 7])
def test_built_in_networks_score_every_class(name, num_classes):
    model = models.build(name, num_classes=num_classes)
    images = torch.randn(2, *INPUTS.get(name, (3, 32, 32)))
    assert model(images).shape == (2, num_classes or 10)


def test_lenet5_has_the_weights_of_the_experiments():
    weights = [p.numel() for name, p in models.build("lenet5").named_parameters() if name.endswith("weight")]
    assert weights == [150, 14400, 288000, 10080, 840]


def test_mnist_cnn_is_what_was_described():
    """Layer by layer, in plain functions; PyTorch's own example has 1,199,882 parameters, too."""
    model = models.build("mnist_cnn").eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_199_882
    images, state = torch.randn(3, 1, 28, 28), model.state_dict()
    maps = F.conv2d(images, state["conv1.weight"], state["conv1.bias"]).clamp(min=0)
    maps = F.conv2d(maps, state["conv2.weight"], state["conv2.bias"])  # no activation here
    pooled = maps.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)).reshape(3, 9216)
    hidden = (pooled @ state["fc1.weight"].T + state["fc1.bias"]).clamp(min=0)
    torch.testing.assert_close(model(images), hidden @ state["fc2.weight"].T + state["fc2.bias"])
    dropouts = {name: (type(m), m.p) for name, m in model.named_modules() if hasattr(m, "p")}
    assert dropouts == {"dropout1": (nn.Dropout2d, 0.25), "dropout2": (nn.Dropout, 0.5)}


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_published_depth_and_size(depth, millions):
    model = models.build(f"resnet{depth}")
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == depth
    size = sum(p.numel() for p in model.parameters()) / 1e6
    assert size == pytest.approx(millions, abs=0.03 if depth == 110 else 0.005)


def costs(name, size):
    """MACs and parameters, without ever making the weights."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = models.build(name).eval()
        model(torch.zeros(1, 3, size, size))
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters()), layers


@pytest.mark.parametrize(
    ("name", "mega_macs", "mega_params"),
    [
        ("vgg16", 313.73, 14.98),
        ("vgg16_bn", 313.73, 14.98),
        ("resnet56", 125.49, 0.85),
        ("resnet110", 252.89, 1.72),
        ("densenet40", 282.92, 1.04),
        ("googlenet", 1520, 6.15),
    ],
)
def test_networks_of_hrank_have_its_published_costs(name, mega_macs, mega_params):
    """Lin et al. 2020, arXiv 2002.10179, tables 1 to 4, to the last digit.

    As counted there: additions too in linear layers; parameters of convolutions and linear layers, each with biases.
    """
    macs, _, layers = costs(name, 32)
    macs += sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    assert macs / 1e6 == pytest.approx(mega_macs, abs=5 if mega_macs > 1000 else 0.005)
    params = sum(layer.weight.numel() + len(layer.weight) for layer in layers)
    assert params / 1e6 == pytest.approx(mega_params, abs=0.005)


@pytest.mark.parametrize(
    ("name", "giga_macs", "params"),
    [("resnet50", 4.09, 25_557_032), ("vgg16", 15.47, 138_357_544), ("vgg16_bn", 15.47, 138_365_992)],
)
def test_torchvision_networks_have_their_published_costs(name, giga_macs, params):
    macs, built, _ = costs(f"torchvision:{name}", 224)
    assert macs / 1e9 == pytest.approx(giga_macs, abs=0.005)
    assert built == params


def test_vgg16_has_batch_norms_or_biases():
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    plain, normed = (models.build(name) for name in ("vgg16", "vgg16_bn"))
    assert sum(isinstance(module, kinds) for module in plain.modules()) == 0
    assert sum(isinstance(module, kinds) for module in normed.modules()) == 14
    biased = [module.bias is not None for module in normed.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert biased == [False] * 14 + [True]


def test_densenet_layer_keeps_what_it_is_given_and_adds_twelve_channels():
    layer = models.build("densenet40").block2[3]
    x = torch.randn(2, 24 + 15 * 12, 8, 8)
    out = layer(x)
    assert torch.equal(out[:, :-12], x)
    expected = F.conv2d(F.relu(layer.bn(x)), layer.conv.weight, padding=1)
    torch.testing.assert_close(out[:, -12:], expected)


def test_googlenet_block_puts_its_branches_side_by_side():
    block = models.build("googlenet").eval().block3a
    x = torch.randn(2, 192, 8, 8)
    ones, threes, fives, pooled = block(x).split([64, 128, 32, 32], dim=1)
    torch.testing.assert_close(ones, block.branch1(x))
    torch.testing.assert_close(threes, block.branch3(x))
    torch.testing.assert_close(fives, block.branch5(x))
    torch.testing.assert_close(pooled, block.branch_pool[1](F.max_pool2d(x, 3, 1, 1)))
    # One pixel of the branch of fives sees 5x5 pixels of its reduction.
    reduced = block.branch5[0](x).detach().requires_grad_()
    block.branch5[1:](reduced)[0, :, 4, 4].sum().backward()
    seen = reduced.grad[0].abs().sum(0).nonzero()
    assert (seen.min(0).values >= 2).all()
    assert (seen.max(0).values <= 6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cifar_resnet_shortcut_is_a_strided_slice_between_zero_channels(dtype, memory_format):
    model = models.build("resnet20")
    for stage, width in ((model.layer2, 16), (model.layer3, 32)):
        shortcut = stage[0].shortcut
        x = torch.randn(2, width, 8, 10).to(dtype, memory_format=memory_format)
        x[0, 0, 0, :3] = torch.tensor([torch.nan, 1.0, -torch.inf])
        expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, width // 2, width // 2))
        torch.testing.assert_close(shortcut(x), expected, rtol=0, atol=0, equal_nan=True)
        assert not list(shortcut.parameters())


def test_channels_of_a_cifar_resnet_shortcut_can_be_changed():
    shortcut = models.build("resnet20").layer2[0].shortcut
    (padding,) = (module for module in shortcut.modules() if isinstance(module, nn.ZeroPad3d))
    padding.padding = (0, 0, 0, 0, 3, 5)
    x = torch.randn(2, 11, 8, 8)
    assert torch.equal(shortcut(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5)))


def test_digits_cnn_learns_the_digits_in_a_few_epochs():
    torch.manual_seed(0)
    model = models.build("digits_cnn")
    batches = data.loader(data.open_dataset("digits", "train"), batch_size=64, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6 * len(batches))
    for _ in range(6):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    test = data.open_dataset("digits", "test")
    images, labels = next(iter(data.loader(test, batch_size=len(test))))
    with torch.inference_mode():
        accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.975


def test_torchvision_model_with_its_own_and_with_other_classes():
    assert models.build("torchvision:squeezenet1_1").num_classes == 1000
    assert models.build("torchvision:resnet18", num_classes=3).fc.out_features == 3


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_models_have_no_auxiliary_classifiers(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.build(f"torchvision:{name}", num_classes=5)
    assert model.training
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet21", "no built-in model 'resnet21'.*digits_cnn, googlenet, lenet5, .*resnet20"),
        ("torchvision:resnet19", "no classification model 'resnet19'.*resnet18"),
        ("torchvision:fcn_resnet50", "no classification model 'fcn_resnet50'"),
        ("./nets.py:small", r"package\.module:function, got './nets.py'"),
        (":small", r"package\.module:function, got ''"),
        ("no_such_module:small", "'no_such_module' cannot be imported.*current directory"),
    ],
)
def test_unknown_model_says_what_exists(spec, message):
    with pytest.raises(ArgumentError, match=message):
        models.build(spec)


def test_num_classes_must_be_positive():
    with pytest.raises(ArgumentError, match="num_classes must be at least 1, got 0"):
        models.build("lenet5", num_classes=0)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "not_callable = 3\n"
        "def small(num_classes=4): return nn.Linear(2, num_classes)\n"
        "def fixed(): return nn.Linear(2, 5)\n"
        "def needy(width): return nn.Linear(width, 5)\n"
        "def text(): return 'a model'\n"
    )
    (tmp_path / "my_broken_nets.py").write_text("import a_library_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.usefixtures("user_module")
def test_callable_of_the_current_directory():
    assert models.build("my_nets:small").out_features == 4
    assert models.build("my_nets:small", num_classes=6).out_features == 6
    assert models.build("my_nets:fixed").out_features == 5


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "num_classes", "message"),
    [
        ("my_nets:large", None, "no callable 'large'; it has fixed, needy, small, text"),
        ("my_nets:not_callable", None, "no callable 'not_callable'"),
        ("my_nets:text", None, "must return a torch.nn.Module, got str; my_nets has fixed, needy"),
        ("my_nets:needy", None, "cannot be called with no arguments: missing a required argument: 'width'"),
        ("my_nets:fixed", 3, "cannot be called with num_classes=3: got an unexpected keyword"),
        (
            "my_broken_nets:small",
            None,
            "cannot be imported: ModuleNotFoundError: No module named 'a_library_not_installed'",
        ),
    ],
)
def test_callable_that_does_not_serve(name, num_classes, message):
    with pytest.raises(ArgumentError, match=message):
        models.build(name, num_classes=num_classes)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("suffix", "save"),
    [(".pt", torch.save), (".pth", torch.save), (".th", save_legacy), (".bin", torch.save)],
)
def test_checkpoint_layouts(tmp_path, nest, prefix, suffix, save):
    trained = models.build("resnet20")
    path = tmp_path / f"weights{suffix}"
    save(nest({prefix + key: value for key, value in trained.state_dict().items()}), path)
    assert_same_weights(models.build("resnet20", weights=path), trained)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(tmp_path, prefix):
    trained = models.build("lenet5")
    path = tmp_path / "weights.safetensors"
    save_file({prefix + key: value for key, value in trained.state_dict().items()}, path)
    assert_same_weights(models.build("lenet5", weights=str(path)), trained)


def test_checkpoint_without_batch_counters_and_with_versions(tmp_path):
    trained = models.build("torchvision:mnasnet0_5", num_classes=2)  # refuses a state dict without versions
    state = trained.state_dict()
    state._metadata["layers.1"]["version"] = 1
    del state["layers.1.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pt")
    loaded = models.build("torchvision:mnasnet0_5", num_classes=2, weights=tmp_path / "old.pt")
    assert_same_weights(loaded, trained)


@pytest.mark.parametrize(
    ("other", "num_classes", "message"),
    [
        (
            "resnet20",
            7,
            r"this CifarResNet: 2 of another shape \(linear.weight \(7, 64\) for \(10, 64\), linear.bias",
        ),
        ("resnet32", None, r"CifarResNet: 72 unexpected \(layer1.3.conv1.weight, .*, \.\.\.\)\. Build"),
        (
            "digits_cnn",
            None,
            r": 90 missing \(layer1.0.*\); 12 unexpected \(conv2.weight, .*\); 5 of another",
        ),
    ],
)
def test_checkpoint_of_another_network_changes_nothing(tmp_path, other, num_classes, message):
    torch.save(models.build(other, num_classes=num_classes).state_dict(), tmp_path / "other.pt")
    model = models.build("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        models.load_weights(model, tmp_path / "other.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(("suffix", "save"), [(".pt", torch.save), (".th", save_legacy), (".safetensors", save_file)])
def test_truncated_checkpoint(tmp_path, suffix, save, share):
    path = tmp_path / f"weights{suffix}"
    save(models.build("digits_cnn").state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match=r"cannot read weights .*(truncated|no PyTorch checkpoint)"):
        models.build("digits_cnn", weights=path)


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("code-has-run"),)


@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_python_objects_are_refused_and_not_run(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"state_dict": models.build("lenet5").state_dict(), "run": RunsCode()}, tmp_path / "weights.pt")
    with pytest.raises(FileError, match=r"objects other than tensors.*Save model.state_dict\(\)"):
        models.build("lenet5", weights=tmp_path / "weights.pt")
    assert not Path("code-has-run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.pt", "cannot read weights .*absent.pt: No such file"),
        ("absent.safetensors", "cannot read weights .*absent.safetensors: No such file"),
        ("folder.pt", "cannot read weights .*folder.pt: Is a directory"),
        ("text.pt", "no PyTorch checkpoint"),
        ("text.safetensors", "no safetensors file"),
        ("weights.h5", r"weights.h5: expected a file ending in .pt, .pth, .th, .bin, .tar or .safetensors"),
        ("number.pt", "hold no state dict.*found int"),
        ("numbered.pt", "hold no state dict.*found 0"),
        ("report.pt", "hold no state dict.*found epoch, loss"),
    ],
)
def test_file_that_holds_no_weights(tmp_path, name, message):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "text.pt").write_text("hello world")
    (tmp_path / "text.safetensors").write_text("hello world")
    torch.save(3, tmp_path / "number.pt")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbered.pt")
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "report.pt")
    with pytest.raises(FileError, match=message):
        models.build("lenet5", weights=tmp_path / name)


def assert_same_weights(model, expected):
    state = expected.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
