"""The command line on real (embedded) data, and what it says to bad input."""

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pcafast
from pcafast.cli import main
from pcafast.models import build


@pytest.fixture
def pcafast_command(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pcafast", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        output = capsys.readouterr()
        return done.value.code, output.out, output.err

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of the small network for digits."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "digits.pt"
    torch.save(build("digits_cnn").state_dict(), path)
    return path


def test_demo(pcafast_command):
    code, out, err = pcafast_command("demo")
    assert (code, err) == (0, "")
    for method in ("pca", "taylor", "rank"):
        folder = Path("pcafast-demo", method)
        report = json.loads((folder / "report.json").read_text())
        before, after = report["before"], report["after"]
        assert before["accuracy"] > 0.98
        assert after["accuracy"] >= before["accuracy"] - 0.015
        assert after["macs"] <= 0.5 * before["macs"]
        assert f"{after['accuracy']:.2%}" in out
        assert str(folder / "report.html") in out
        assert "digits_cnn" in (folder / "report.html").read_text()
        small = pcafast.load(build("digits_cnn"), folder)
        assert sum(parameter.numel() for parameter in small.parameters()) == after["params"]


def test_stats_compress_evaluate(pcafast_command, weights):
    code, out, _ = pcafast_command(
        *("stats", "digits_cnn", "--weights", weights, "--out", "s.safetensors", "--images", 200),
        *("--statistics", "covariance,patches,taylor,rank,gradient,moments,activation_gradient"),
    )
    assert code == 0
    assert "conv3" in out
    stats = pcafast.load_statistics("s.safetensors")
    assert stats["taylor"]["conv1"].state_dict()["examples"] == 200

    code, out, _ = pcafast_command(
        *("compress", "digits_cnn", "--weights", weights, "--budget", "params=0.6", "--images", 200, "--out", "small"),
        "--keep-batch-norm",
    )
    assert code == 0
    report = json.loads(Path("small/report.json").read_text())
    assert report["after"]["params"] <= 0.6 * report["before"]["params"]
    assert report["command"].startswith("pcafast compress digits_cnn")
    assert not pcafast.load(build("digits_cnn"), "small").bn3.running_mean.any()  # as it was, in fresh weights

    code, out, _ = pcafast_command("evaluate", "digits_cnn", "--compressed", "small")
    assert code == 0
    assert f"{report['after']['correct']} of 360 test images of digits are right" in out


@pytest.mark.parametrize(
    ("method", "options"),
    [("pca", []), ("taylor", ["--round-to", 4]), ("rank", ["--scope", "layer"]), ("l1", ["--compensate-means"])],
)
def test_compress_in_steps_with_retraining(method, options, pcafast_command, weights):
    command = [
        *("compress", "digits_cnn", "--weights", weights, "--out", "out", "--method", method, "--budget", "macs=0.5"),
        *("--layers", "conv[23]", "--steps", 2, "--retrain-epochs", 2, "--images", 200, "--learning-rate", 0.1),
        *("--label-smoothing", 0.1, "--seed", 4, *options),
    ]
    code, out, err = pcafast_command(*command)
    assert (code, err) == (0, "")
    report = json.loads(Path("out/report.json").read_text())
    assert (report["name"], report["command"]) == ("digits_cnn", shlex.join(["pcafast", *map(str, command)]))
    assert report["data"] == {"train": "digits", "test": "digits", "images": 200, "batch_size": 128, "augment": True}
    asked = {
        "method": method,
        "budget": {"macs": 0.5},
        "steps": 2,
        "retrain_epochs": 2,
        "label_smoothing": 0.1,
        "seed": 4,
    }
    assert asked.items() <= report["asked"].items()
    assert f"{report['after']['accuracy']:.2%}" in out
    assert report["after"]["accuracy"] > report["before"]["accuracy"] + 0.3
    after = {layer["layer"]: layer["after"] for layer in report["layers"]}
    assert after["conv1"] == 32
    if method == "taylor":
        assert after["conv2"] % 4 == after["conv3"] % 4 == 0
    if method == "rank":
        assert after["conv2"] == pytest.approx(after["conv3"], abs=6)
    assert report["asked"].get("compensate_means") == {"pca": None, "l1": True}.get(method, False)
    written = {path: path.read_bytes() for path in Path("out").iterdir()}
    code, out, err = pcafast_command(*command)
    assert (code, err.count("note: out holds the result of this very command")) == (0, 1)
    assert f"{report['after']['accuracy']:.2%}" in out
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == written
    assert pcafast_command("evaluate", "digits_cnn", "--compressed", "out")[0] == 0


def test_a_run_without_weights_can_be_gone_on_with(pcafast_command):
    """Its random weights are those of the seed."""
    command = ("compress", "digits_cnn", "--out", "out", "--budget", "macs=0.5", "--images", 64)
    assert pcafast_command(*command)[0] == 0
    torch.rand(1)
    assert "holds the result of this very command" in pcafast_command(*command)[2]


def test_doctor(pcafast_command):
    code, out, _ = pcafast_command("doctor")
    assert code == 0
    assert torch.__version__ in out
    assert "covariance_update_" in out


class TwoInputs(nn.Module):
    """A model whose forward needs more than images."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, num_classes, 8)

    def forward(self, x, lengths):
        return self.conv(x).flatten(1) * lengths


USER_MODEL = "import torch\nclass Model(torch.nn.Linear):\n    def __init__(self): super().__init__(64, 3)\n" + (
    "    def forward(self, x): return super().forward(x.flatten(1))\ndef fails(): return {}['x']\n"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stats", "digits_cnn", "--out", "s", "--layers", "conv9"],
            "no layer of the model matches 'conv9'.*conv1, bn1",
        ),
        (["stats", "digits_cnn", "--out", "s", "--statistics", "mean"], "--statistics: expected any of covariance"),
        (
            ["stats", "digits_cnn", "--out", "s", "--statistics", "rank", "--layers", "linear"],
            r"rank: none of the chosen layers \(linear\) can have a FeatureMapRank",
        ),
        (["evaluate", "resnet21"], "no built-in model 'resnet21'. There are"),
        (["evaluate", "resnet20"], r"cannot take a batch of images of shape \(256, 1, 8, 8\)"),
        (["evaluate", "test_cli:TwoInputs"], "cannot take a batch.*missing 1 required positional argument: 'lengths'"),
        (["evaluate", "digits_cnn", "--weights", "{weights}", "--num-classes", "5"], "linear.weight"),
        (["evaluate", "resnet20", "--weights", "{weights}"], "conv1"),
        (["evaluate", "digits_cnn", "--weights", "absent.pt"], "absent.pt"),
        (["evaluate", "digits_cnn", "--weights", "{half}"], "half.pt"),
        (["evaluate", "digits_cnn", "--compressed", "nowhere"], "nowhere"),
        (["evaluate", "digits_cnn", "--data", "absent"], "no data set absent exists"),
        (["evaluate", "digits_cnn", "--data", "{empty}"], "empty"),
        (["evaluate", "digits_cnn", "--data", "{negative}"], "labels out of range"),
        (["evaluate", "user_model:Model"], "labels: expected 0 to 2, as the model has 3 outputs, got 9"),
        (["evaluate", "digits_cnn", "--device", "tpu9"], "--device: expected cpu, cuda"),
        (["evaluate", "digits_cnn", "--device", "meta"], "--device: expected cpu, cuda"),
        (["evaluate", "user_model:fails"], "model 'user_model:fails' failed: KeyError: 'x'"),
        (["evaluate", "broken_model:Model"], "'broken_model' cannot be imported: SyntaxError"),
        (
            ["compress", "digits_cnn", "--out", "o", "--budget", "macs=0.5", "--layers", "bn1"],
            "BatchNorm2d cannot be fac",
        ),
        (["compress", "digits_cnn", "--out", "o", "--budget", "macs=7"], r"expected a share in \(0, 1\]"),
        (["compress", "digits_cnn", "--out", "{file}", "--budget", "macs=0.5"], "out: expected a folder"),
        (["compress", "digits_cnn", "--out", "o", "--budget", "channels=0.5"], "expected a share of macs or params"),
        (["compress", "digits_cnn", "--out", "o", "--budget", "macs=0.5", "--round-to", "2"], "only with pruning"),
        (
            ["compress", "digits_cnn", "--out", "o", "--budget", "macs=0.0005", "--method", "l1"],
            "budget: macs=0.0005 cannot be met by removing channels",
        ),
        (
            ["compress", "digits_cnn", "--out", "o", "--budget", "macs=0.5", "--learning-rate", "-1"],
            "learning_rate: expected a positive number",
        ),
        (["compress", "digits_cnn", "--out", "o", "--budget", "macs=0.01"], "The nearest that can be met is macs="),
        (
            ["compress", "digits_cnn", "--out", "o", "--budget", "time=0.5"],
            "expected macs=SHARE or params=SHARE or channels=SHARE",
        ),
        (["compress", "digits_cnn", "--out", "{file}/o", "--budget", "macs=0.5"], "cannot write"),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(arguments, message, pcafast_command, weights, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    (tmp_path / "user_model.py").write_text(USER_MODEL)
    (tmp_path / "broken_model.py").write_text("def Model(:")
    (tmp_path / "file").write_text("")
    (tmp_path / "half.pt").write_bytes(weights.read_bytes()[:1000])
    np.savez(tmp_path / "empty.npz", images=np.zeros((0, 8, 8), np.uint8), labels=np.zeros(0, np.int64))
    np.savez(tmp_path / "negative.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, -1]))
    places = {name: tmp_path / name for name in ("file", "half", "empty", "negative")}
    places |= {"half": tmp_path / "half.pt", "empty": tmp_path / "empty.npz", "negative": tmp_path / "negative.npz"}
    before = sorted(tmp_path.iterdir())
    code, _, err = pcafast_command(*(argument.format(weights=weights, **places) for argument in arguments))
    assert code == 2, err
    import re

    assert re.search(message, err.replace("\n", " ")), err
    assert "Traceback" not in err
    paragraphs = [line for line in err.strip().splitlines() if not line.startswith("note: without --weights")]
    assert len(paragraphs) == 1, err
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_a_result_is_evaluated_with_the_options_it_was_made_with(pcafast_command):
    made = ("torchvision:squeezenet1_1", "--num-classes", 10)
    code, _, _ = pcafast_command(
        "compress", *made, "--data", "rgb.npz", "--budget", "macs=0.8", "--out", "small", "--images", 3
    )
    assert code == 2  # there is no such file yet
    np.savez("rgb.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.arange(4))
    code, out, _ = pcafast_command("compress", *made, "--data", "rgb.npz", "--budget", "macs=0.8", "--out", "small")
    assert (code, "left alone, since" in out) == (0, True)
    report = json.loads(Path("small/report.json").read_text())
    assert report["after"]["latency_batch_size"] == 4
    code, _, err = pcafast_command("evaluate", made[0], "--data", "rgb.npz", "--compressed", "small")
    assert code == 2
    assert "the options, such as --num-classes, that it was compressed with" in err
    assert pcafast_command("evaluate", *made, "--data", "rgb.npz", "--compressed", "small")[0] == 0


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pcafast", "evaluate", "resnet21", "--debug"])
    with pytest.raises(pcafast.ArgumentError, match="no built-in model"):
        main()


def test_wrong_usage_is_status_2(pcafast_command):
    for arguments in (["evaluate"], ["evaluate", "digits_cnn", "--spam"], ["spam"], ["compress", "digits_cnn"]):
        code, _, err = pcafast_command(*arguments)
        assert code == 2
        assert "Traceback" not in err


@pytest.mark.parametrize("command", ["stats", "compress"])
def test_a_full_disk_leaves_nothing_half_behind(command, tmp_path, weights, pcafast_command):
    """A limit on file size, hit in the middle of writing, stands for the full disk."""
    out = tmp_path / ("s.safetensors" if command == "stats" else "small")
    arguments = [command, "digits_cnn", "--weights", weights, "--out", out, "--images", 64]
    arguments += ["--budget", "macs=0.5"] if command == "compress" else []
    done = subprocess.run(
        [sys.executable, "-c", "from pcafast.cli import main; main()", *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "Nothing was changed" in done.stderr
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ([] if command == "stats" else ["checkpoint.safetensors"])
    code, _, err = pcafast_command(*arguments)
    assert code == 0
    assert ("Going on with the run" in err) == (command == "compress")


def test_sensitivity_is_measured_and_chooses_the_ranks_of_compress(pcafast_command, weights):
    common = ("digits_cnn", "--weights", weights, "--images", 64, "--layers", "conv?")
    code, out, _ = pcafast_command("sensitivity", *common, "--out", "losses.json")
    assert code == 0
    losses = json.loads(Path("losses.json").read_text())["losses"]
    assert list(losses) == ["conv1", "conv2", "conv3"]
    assert len(losses["conv2"]) == 7
    assert f"{losses['conv2'][max(losses['conv2'], key=int)]:.2g}" in out
    code, _, _ = pcafast_command(
        "compress", *common, "--budget", "macs=0.5", "--losses", "losses.json", "--out", "small"
    )
    assert code == 0
    actions = json.loads(Path("small/plan.json").read_text())["actions"]
    assert actions
    assert all(action["rank"] >= min(map(int, losses[action["layer"]])) for action in actions)
    for other, message in ((("--method", "fisher"), "another method (pca, not fisher)"), (("--seed", 1), "model")):
        left_out = 3 if other[0] == "--seed" else 0  # with random weights
        options = (common[0], *common[left_out:]) if left_out else common
        code, _, err = pcafast_command(
            "compress", *options, *other, "--budget", "macs=0.5", "--losses", "losses.json", "--out", "other"
        )
        assert code == 2
        assert "losses.json was measured with another" in err
        assert message in err


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "pcafast rank losses", "version": 2, "losses": {}}'])
def test_a_file_that_is_not_of_losses_is_refused(content, pcafast_command, tmp_path):
    (tmp_path / "losses.json").write_text(content)
    code, _, err = pcafast_command(
        "compress", "digits_cnn", "--budget", "macs=0.5", "--losses", "losses.json", "--out", "x"
    )
    assert code == 2
    assert "losses.json is not a file" in err.replace("\n", " ")
