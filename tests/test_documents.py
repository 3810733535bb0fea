"""The tables in the documents are those of the result files, and the README's code runs."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from pcafast.models import build

REPOSITORY = Path(__file__).parent.parent


def test_tables_are_up_to_date():
    command = [sys.executable, "benchmarks/render.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build("resnet20")
    names = {
        "model": model,
        "fresh_model": build("resnet20"),
        "loader": [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))],
        "criterion": torch.nn.CrossEntropyLoss(),
        "activations": torch.randn(2, 3, 8, 8),
        "gradients": torch.randn(2, 3, 8, 8),
    }
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    x = torch.randn(1, 3, 32, 32)
    plan_applied, loaded = names["plan"].apply(model).eval(), names["small"].eval()
    torch.testing.assert_close(loaded(x), plan_applied(x))
    assert names["ranks"].shape == (2, 3)
