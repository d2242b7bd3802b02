"""Both benchmarks run to their end on a CPU, kernels in Triton's interpreter, and never time what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_kernels
from cogvid import ops

ROOT = Path(__file__).parents[2]
RIGHT_OPS = {
    "attention", "norm_rope_attention", "qk_norm_rope", "layer_norm_modulate", "gate_residual",
    "gate_residual_norm_modulate", "rms_norm", "group_norm_silu", "spatial_norm_silu", "linear_gelu",
}  # fmt: skip


def run(script: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Run a benchmark; return its output and the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_bench_kernels_runs_to_its_end(tmp_path: Path) -> None:
    files = tmp_path / "out.json", tmp_path / "out.png"
    out, result = run(
        "bench_kernels.py", "--device", "cpu", "--runs", "1", "--json", str(files[0]), "--plot", str(files[1])
    )
    assert json.loads(files[0].read_text()) == result
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert {"commit", "torch", "triton", "command", "copy_gbs", "matmul_tflops"} <= result["header"].keys()
    rows = result["rows"]
    assert {row["op"] for row in rows} == RIGHT_OPS
    for row in rows:
        assert ("reason" in row) != (row.get("median_ms", 0) > 0), row
        assert row["provider"] in out
    # Everything of ours is right and was timed, but the form of the GELU that only CUDA has.
    ours = [row for row in rows if row["provider"].startswith("ours")]
    assert {row["op"] for row in ours} == RIGHT_OPS
    assert [row["provider"] for row in ours if "reason" in row] == ["ours/epilogue"]
    # So is everything of diffusers and transformers, which are installed; what is missing says so.
    others = [row for row in rows if row["provider"] in ("torch", "diffusers", "transformers", "SDPA MATH")]
    assert len(others) > 15
    assert not [row for row in others if "reason" in row]
    assert any("No module named" in row.get("reason", "") for row in rows)


def test_bench_model_runs_to_its_end() -> None:
    parts = ("text", "step", "decode")
    _, result = run("bench_model.py", "--size", "toy", "--device", "cpu", "--runs", "1", "--parts", *parts)
    assert result["rows"]
    assert not [row for row in result["rows"] if "wrong" in row]
    for part in parts:
        providers = {row["provider"] for row in result["rows"] if row["part"].startswith(part)}
        assert {"cogvid torch", "cogvid triton"} < providers, providers


def test_an_operator_costs_more_than_its_function(capsys: pytest.CaptureFixture[str]) -> None:
    bench_kernels.main(["--overhead"])
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["function, us"] < found["operator, us"]
    assert found["operator with a gradient, us"] > found["function, us"]


def test_help_says_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_kernels.main(["--help"])
    out = capsys.readouterr().out
    assert "4 B H N^2 hd flop" in out
    assert all(f"  {name} " in out for name in RIGHT_OPS)


def test_what_is_wrong_or_raises_is_not_timed() -> None:
    def nearly(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        y = ops.rms_norm(x, weight, eps=eps)
        y[-1, -1] += 3
        return y

    def raises(inputs: dict[str, Any]) -> Any:
        raise OSError(f"no backend for {inputs['x'].shape}")

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        x = torch.randn(6, 32, device=device, dtype=dtype)
        return {"x": x, "weight": torch.ones(32, device=device, dtype=dtype), "eps": 1e-6}

    case = bench_kernels.Case("6x32", 2.0 * 6 * 32 * 4, inputs)
    op = bench_kernels.Op("rms_norm", "byte", "", lambda *_: [case], ops.rms_norm, nearly, {"absent": raises})
    args = argparse.Namespace(compile=False, providers="", dtype="fp32", runs=2)
    limits = {"copy_gbs": 10.0, "matmul_tflops": 1.0}
    rows = bench_kernels.bench_case(op, case, torch.device("cpu"), torch.float32, limits, args)
    found = {row["provider"]: row for row in rows}
    assert found["torch"]["median_ms"] > 0
    assert found["torch"]["percent_measured"] == pytest.approx(10 * found["torch"]["rate"])
    assert found["ours"]["reason"].startswith("wrong: relative RMS")
    assert found["absent"]["reason"] == "OSError: no backend for torch.Size([6, 32])"
    assert not [name for name in ("ours", "absent") if "median_ms" in found[name]]
