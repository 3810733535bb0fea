"""The tables in the documents are those of the result files, and the README's code runs."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pcafast import load
from pcafast.models import build

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "benchmarks/README.md")


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("render")


def test_tables_are_up_to_date():
    command = [sys.executable, "benchmarks/render.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_table_stands_in_a_document_and_a_changed_one_is_made_anew(render):
    texts = [(REPOSITORY / name).read_text() for name in DOCUMENTS]
    assert [document.relative_to(REPOSITORY) for document in render.DOCUMENTS] == list(map(Path, DOCUMENTS))
    assert {name for text in texts for name in re.findall(r"<!-- (\w+) -->\n", text)} - {"end"} == set(render.TABLES)
    for text in texts:
        assert "x |\n" in text
        assert render.rendered(text.replace("x |\n", "y |\n")) == text


def test_commands_of_results_hold_no_folder_of_the_machine_they_were_measured_on():
    files = sorted((REPOSITORY / "benchmarks/results").glob("*.json"))
    assert files
    words = {file.name: shlex.split(json.loads(file.read_text())["command"]) for file in files}
    assert {name: bad for name, parts in words.items() if (bad := [part for part in parts if part[:1] == "/"])} == {}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_between_files_lead_somewhere(name):
    document = REPOSITORY / name
    links = re.findall(r"\]\((?!http)([^)]+)\)", document.read_text())
    assert links
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build("resnet20")
    batches = [(torch.randn(12, 3, 32, 32), torch.randint(0, 10, (12,)))]
    names = {
        "model": model,
        "fresh_model": build("resnet20"),
        "loader": batches,
        "train_loader": batches,
        "test_loader": batches,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        "criterion": torch.nn.CrossEntropyLoss(),
        "activations": torch.randn(2, 3, 8, 8),
        "inputs": torch.randn(2, 3, 8, 8),
        "gradients": torch.randn(2, 3, 8, 8),
    }
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    collecting, pruning, fitting, patches, loop, functional = blocks
    x = torch.randn(1, 3, 32, 32)
    exec(collecting, names)
    torch.testing.assert_close(names["small"].eval()(x), names["plan"].apply(model).eval()(x))
    exec(pruning, names)
    assert names["plan"].reached["macs"]["share"] <= 0.5
    owned = {id(parameter) for group in names["optimizer"].param_groups for parameter in group["params"]}
    assert owned == {id(parameter) for parameter in names["small"].parameters()}
    exec(fitting, names)
    assert {action.side for action in names["plan"].actions} == {"both"}
    assert names["plan"].reached["macs"]["share"] <= 0.5
    exec(patches, names)
    assert {action.side for action in names["plan"].actions} == {"input"}
    exec(loop, names)
    torch.testing.assert_close(load(build("resnet20"), "smaller").eval()(x), names["small"].eval()(x))
    assert names["report"]["reached"] == names["plan"].reached
    exec(functional, names)
    assert names["covariance"].shape == (27, 27)
    assert names["ranks"].shape == (2, 3)
