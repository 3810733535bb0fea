"""The native library: how its build is chosen, what import says of it, and life without it."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pcafast
from pcafast import native

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def setup_script(monkeypatch):
    """setup.py, with its functions as a dictionary; it does not build anything."""

    def run(**environment):
        for name in ("PCAFAST_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("setuptools.setup", lambda **_: None)
        monkeypatch.chdir(REPOSITORY)
        return runpy.run_path("setup.py")

    return run


def test_cuda_can_be_left_out(setup_script):
    assert setup_script(PCAFAST_CUDA="0")["with_cuda"](None) == (False, "left out by PCAFAST_CUDA=0")


def test_cuda_that_is_wished_for_but_missing_is_an_error(setup_script, monkeypatch):
    with_cuda = setup_script(PCAFAST_CUDA="0")["with_cuda"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PCAFAST_CUDA", "1")
    with pytest.raises(SystemExit, match="PCAFAST_CUDA=1, but no CUDA compiler was found; put nvcc on the PATH"):
        with_cuda(None)
    monkeypatch.setenv("PCAFAST_CUDA", "auto")
    assert with_cuda(None)[0] is False
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("PCAFAST_CUDA", "1")
    with pytest.raises(SystemExit, match="is a build without CUDA; install a CUDA build of torch"):
        with_cuda(None)


@pytest.mark.parametrize("by", ["CUDA_HOME", "PATH"])
def test_an_nvcc_of_another_major_version_is_not_used(by, setup_script, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    place = {"CUDA_HOME": str(tmp_path)} if by == "CUDA_HOME" else {"PATH": f"{nvcc.parent}:{os.environ['PATH']}"}
    script = setup_script(PCAFAST_CUDA="0", **place)
    assert script["find_nvcc"]() == nvcc
    assert script["toolkit_of"](nvcc) == tmp_path
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "is not of CUDA 13" in script["why_no_cuda"](nvcc)


def test_another_wish_is_an_error(setup_script):
    with pytest.raises(SystemExit, match="PCAFAST_CUDA: expected auto, 0 or 1, got 'yes'"):
        setup_script(PCAFAST_CUDA="yes")


def test_built_against_another_torch(monkeypatch):
    monkeypatch.setattr(native, "build_description", lambda: {"torch": "2.0.0"})
    reason = native._load()
    assert f"built against torch 2.0.0 and this is torch {torch.__version__}" in reason
    assert "pip install --force-reinstall" in reason


@pytest.fixture(scope="module")
def without_library(tmp_path_factory):
    """A copy of the package as it is where nothing could be built."""
    place = tmp_path_factory.mktemp("pure")
    shutil.copytree(
        Path(pcafast.__file__).parent,
        place / "pcafast",
        ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"),
    )
    return place


def run(code, place):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(place)},
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
    )


def test_without_the_library_everything_runs_with_one_warning(without_library):
    done = run(
        "import torch, pcafast; torch.manual_seed(0); x = torch.randn(2, 3, 8, 8)\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())\n"
        "with pcafast.collect(model, c=pcafast.Covariance(), t=pcafast.Taylor(), r=pcafast.FeatureMapRank(),\n"
        "                     m=pcafast.ChannelMoments(), g=pcafast.GradientCovariance()) as stats:\n"
        "    model(x).square().sum().backward()\n"
        "for layers in stats.values(): print(layers['0'].compute())\n"
        "assert torch.equal(pcafast.functional.feature_map_rank(x), torch.full((2, 3), 8))\n",
        without_library,
    )
    assert done.stderr.count("PcafastWarning") == 1
    assert "everything runs slowly in plain torch, because it was not built" in done.stderr
    assert "pip install" in done.stderr
    assert done.stdout.count("tensor(") >= 5


def test_doctor_says_why_there_are_no_kernels(without_library):
    done = run("import sys; sys.argv[1:] = ['doctor']; from pcafast.cli import main; main()", without_library)
    assert "The native library is not in use: it was not built" in done.stdout
    assert "reference" in done.stdout


def test_operators_without_a_cuda_kernel_borrow_the_reference():
    for name in native.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pcafast::{name}", "CUDA")
    assert ("taylor_update_" in native.OWN_CUDA_KERNELS) == (native.build_description()["cuda"] is not None)


def test_operators_compile():
    def mean_rank(x):
        return torch.ops.pcafast.feature_map_rank(x.relu(), 1e-6, 0.0).double().mean(0)

    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(torch.compile(mean_rank, fullgraph=True, backend="aot_eager")(x), mean_rank(x))
