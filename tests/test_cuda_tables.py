"""That the tables of the CUDA kernels speak of the kernels as they are, and say what is measured and what is not."""

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cuda_kernels import ROOT

H200 = {"copy_bytes_per_second": 4e12, "bfloat16_matmul_flops": 8e14, "float32_matmul_flops": 5e13}
H200 |= {"tf32_matmul_flops": 3.6e14, "float64_multiply_add_flops": 3e13}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """With the folder of results in another place, where there are only estimates."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("cuda_tables")
    shutil.copy(ROOT / "benchmarks/results/cuda_estimates.json", tmp_path)
    monkeypatch.setattr(module.results, "FOLDER", tmp_path)
    return module


def gpu_results(tables: ModuleType, **sections: Any) -> None:
    """As gpu.py writes them."""
    found = {name: {"status": 0, "found": one} for name, one in sections.items()}
    text = json.dumps({"results": {"kernels_digest": tables.kernels_digest(), **found}})
    (tables.results.FOLDER / "gpu.json").write_text(text)


def lines(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_estimates_are_of_the_kernels_as_they_are(tables: ModuleType) -> None:
    digest = tables.estimated()["digest"]
    assert digest == tables.estimates_digest(), "what they are made of has changed: python benchmarks/cuda_estimates.py"


def test_without_a_gpu_all_is_estimated(tables: ModuleType) -> None:
    assert "**all times below are estimates**" in tables.cuda_source()
    assert {line[-1] for line in lines(tables.cuda_targets())} == {"not measured"}
    shares = [float(line[-2].rstrip("%")) for line in lines(tables.cuda_roofline())]
    assert shares == sorted(shares)
    assert shares[-1] <= 100
    assert len(lines(tables.cuda_kernels())) == len({row["kernel"] for row in tables.estimated()["rows"]})


def test_results_of_other_kernels_do_not_count(tables: ModuleType) -> None:
    gpu_results(tables, kernels={"name": "NVIDIA H200"})
    assert "NVIDIA H200" in tables.cuda_source()
    assert "timed on one NVIDIA H200" in tables.cuda_status()
    text = (tables.results.FOLDER / "gpu.json").read_text()
    (tables.results.FOLDER / "gpu.json").write_text(text.replace(tables.kernels_digest(), "another"))
    assert "estimates" in tables.cuda_source()
    assert "have not been timed" in tables.cuda_status()


def test_what_is_measured_takes_the_place_of_estimates(tables: ModuleType) -> None:
    """Taylor at 2 TB/s, of a batch of which all is read twice; the least time by the ceilings that were measured."""
    rows = [row for row in tables.estimated()["rows"] if row["operator"] == "taylor"]
    section = [
        {
            **{key: row[key] for key in ("shape", "dtype", "layout")},
            "milliseconds": {"pcafast": 1.0, "operator": 1e3 * row["least"]["moved_bytes"] / 2e12, "expression": 5.0},
            "share_of_copy_bandwidth": 0.5,
        }
        for row in rows
    ]
    gpu_results(tables, roofline=H200, taylor=section)
    table = [line for line in lines(tables.cuda_roofline()) if line[1] == "taylor"]
    assert table
    assert {line[-2] for line in table} == {"50%"}
    targets = {line[0]: line[2] for line in lines(tables.cuda_targets())}
    assert targets["Taylor, share of copy bandwidth"] == "50%, least 50%"
    largest = max(row["least"]["moved_bytes"] for row in rows)
    assert targets["Taylor against pytorch-pruning's expression"].endswith(f"least {5e-3 / (largest / 2e12):.2f}x")
    assert targets["covariance, share of the roofline"] == "not measured"


def test_targets(tables: ModuleType) -> None:
    times = {"pcafast": 2.0, "permute, matmul": 8.0, "bmm, sum": 3.0}
    covariance = [{"milliseconds": times, "share_of_roofline": 0.8}] * 2
    rank = [
        {
            "side": side,
            "pcafast": {"microseconds_per_map": 1.0},
            "batched": {"microseconds_per_map": float(side)},
            "one by one": {"microseconds_per_map": 100.0 * side},
        }
        for side in (8, 16, 32, 56, 112, 224)
    ]
    training = {
        "times_plain": {"taylor": 1.04, "covariance": 1.25},
        "growth_of_peak": {"both": 0.01},
        "hook_microseconds": {"covariance": {"python": 8.4}, "taylor": {"python": 15.6}},
    }
    gpu_results(tables, covariance=covariance, rank=rank, training=training, hrank={"estimated_speedup": 1234.5})
    targets = {line[0]: line[2] for line in lines(tables.cuda_targets())}
    assert targets["covariance against the fastest recipe of torch calls"] == "1.50x, least 1.50x"
    assert targets["covariance against a permuted copy and its product"] == "4.00x, least 4.00x"
    assert targets["rank 16x16 and 8x8, batched"] == "11.31x, least 8.00x"
    assert targets["rank 32x32 against one SVD per map"] == "3200.00x, least 3200.00x"
    assert targets["rank scores of ResNet-56, 640 images, against HRank's procedure"] == "1,234x"
    assert targets["training step of ResNet-50 with Taylor"] == "1.040 times"
    assert targets["its peak memory, with both"] == "1.010 times"
    assert targets["Python of one hook call"] == "covariance 8 us, taylor 16 us"
