"""Both benchmarks run to their end on a CPU, kernels in Triton's interpreter, and never time a wrong output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_model
import measure
from cogvid import ops
from cogvid_kernels.bench import command, timing
from cogvid_kernels.bench.cases import Case, Shapes
from cogvid_kernels.bench.registry import Op

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_of_memory_has_both_providers() -> None:
    command = [sys.executable, ROOT / "scripts" / "bench_memory.py", "--size", "toy", "--rows", "2", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| weights")]
    assert [row[1].strip() for row in rows] == ["offload block", "quantize fp8-storage"]
    assert all(float(row[2]) > 100 for row in rows)
    assert "refused: " in rows[0][5]  # a CPU is no device that diffusers offloads from, layer by layer
    assert float(rows[1][5]) > 100


RIGHT_OPS = {
    "attention", "norm_rope_attention", "qk_norm_rope", "layer_norm_modulate", "gate_residual",
    "gate_residual_norm_modulate", "rms_norm", "group_norm_silu", "spatial_norm_silu", "linear_gelu",
}  # fmt: skip


def run(script: str, *arguments: str, **environment: str) -> tuple[str, dict[str, Any]]:
    """Run a benchmark; return its output and the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_bench_kernels_runs_to_its_end(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    names = {"json": "out.json", "plot": "bars.png", "roofline": "roofline.png", "history": "times.jsonl"}
    names["plot-history"] = "times.png"
    files = [word for option, name in names.items() for word in (f"--{option}", str(tmp_path / name))]
    out, result = run("bench_kernels.py", "--device", "cpu", "--runs", "1", *files)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())
    for name in ("out.json", "times.jsonl"):
        assert json.loads((tmp_path / name).read_text()) == result
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
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
    # Both forms of the QK norm are timed, by PyTorch and by us.
    timed = {row["provider"] for row in rows if row["op"] == "qk_norm_rope" and "median_ms" in row}
    assert {"torch", "torch centred", "ours", "ours/centred"} <= timed
    # So is everything of diffusers and transformers, which are installed; what is missing says so.
    others = [row for row in rows if row["provider"] in ("torch", "diffusers", "transformers", "SDPA MATH")]
    assert len(others) > 15
    assert not [row for row in others if "reason" in row]
    assert any("No module named" in row.get("reason", "") for row in rows)


def table(out: str) -> dict[str, list[str]]:
    """Return the cells of the Markdown table by its first column."""
    rows = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


@pytest.mark.slow
def test_bench_model_times_all_models_beside_diffusers() -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    parts = ("text", "step", "decode")
    out, result = run(
        *("bench_model.py", "--size", "toy", "--device", "cpu", "--model", "all", "--runs", "1", "--parts", *parts),
        TRITON_INTERPRET="0",
    )
    assert not [row for row in result["rows"] if "wrong" in row]
    steps = [f"step of {model}, 2 layers of 2 heads, fp32" for model in bench_model.OFFICIAL]
    assert len(steps) == 5
    labels = ["text, 2 layers of T5, 16 tokens, bf16", *steps, "decode, 9 frames 64x64, fp32"]
    found = table(out)
    assert list(found) == ["part", *labels]
    for label in labels:
        theirs, ours, ratio = map(float, found[label][:3])
        assert ratio == pytest.approx(theirs / ours, rel=0.02)
        providers = {row["provider"]: row for row in result["rows"] if row["part"] == label}
        assert max(row["ratio"] for name, row in providers.items() if name != "cogvid") == 1
        expected = {"step": {"diffusers", "diffusers fused qkv"}, "decode": {"diffusers", "diffusers channels-last"}}
        assert set(providers) == {"cogvid"} | expected.get(label.split()[0].strip(","), {"transformers"})


@pytest.mark.slow
def test_bench_model_times_the_kernels_too() -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    _, result = run("bench_model.py", "--size", "toy", "--device", "cpu", "--runs", "1", "--parts", "step", "decode")
    for part in ("step", "decode"):
        providers = {row["provider"] for row in result["rows"] if row["part"].startswith(part) and "median" in row}
        assert {"cogvid torch", "cogvid triton"} < providers, providers


@pytest.mark.slow
def test_bench_model_loads_in_fresh_processes() -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    _, result = run("bench_model.py", "--size", "toy", "--device", "cpu", "--runs", "1", "--parts", "load")
    parts = {row["part"] for row in result["rows"]}
    assert parts == {
        "load of 5b, 2 layers of 2 heads, bf16",
        "load of the VAE, fp32 to bf16",
        "load of T5, 2 layers of 2 heads, bf16",
    }
    assert all(row["weights_mib"] > 0 and 0 < row["median"] < 60 for row in result["rows"])
    assert {row["provider"] for row in result["rows"]} == {"diffusers", "transformers", "cogvid"}


@pytest.mark.slow
def test_bench_model_times_ours_where_diffusers_and_git_are_absent(tmp_path: Path) -> None:
    (tmp_path / "diffusers.py").write_text("raise ImportError('no diffusers here')")
    arguments = (
        "bench_model.py",
        "--size",
        "toy",
        "--device",
        "cpu",
        "--runs",
        "1",
        "--parts",
        "import",
        "step",
        "decode",
    )
    out, result = run(*arguments, PYTHONPATH=str(tmp_path), PATH=str(tmp_path), TRITON_INTERPRET="0")
    assert result["header"]["commit"] == "unknown"
    assert {row["provider"] for row in result["rows"]} == {
        "cogvid", "cogvid with T5", "import cogvid", "cogvid --help", "import torch",
    }  # fmt: skip
    cells = table(out)["step of 5b, 2 layers of 2 heads, fp32"]
    assert cells[0] == cells[2] == cells[3] == ""
    assert float(cells[1]) > 0
    assert "`import cogvid` 0." in out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak")
def test_memory_that_was_freed_before_does_not_hide_what_a_call_takes() -> None:
    """In a process of its own: the system may take pages from a large one while it measures itself."""
    code = """
import torch
import measure
pins = []

def call():  # 64 MiB in small pieces and 64 in one
    pieces = []
    for _ in range(1024):
        pieces.append(torch.ones(2**14))
        pins.append(torch.ones(8))  # lies between them and stays, so that the allocator keeps what is freed
    return torch.stack(pieces)

print(*(measure.peak_memory(call, torch.device("cpu"))[1] for _ in range(2)))
"""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("scripts", "", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = [float(peak) for peak in done.stdout.split()]
    assert len(peaks) == 2
    assert all(110 < peak < 200 for peak in peaks), peaks


def test_relative_rms_counts_every_part() -> None:
    expected = torch.ones(2**24 + 3)
    actual = expected.clone()
    actual[-1] = 4
    assert measure.rel_rms(actual, expected) == pytest.approx(3 / (2**24 + 3) ** 0.5)
    actual[0] = float("nan")
    assert not measure.rel_rms(actual, expected) <= 1
    with pytest.raises(ValueError, match=r"actual: got shape \(2,\), want \(2, 1\)"):
        measure.rel_rms(torch.ones(2), torch.ones(2, 1))


def test_a_caption_names_what_the_header_holds() -> None:
    values = measure.header(torch.device("cpu"), "python x.py")
    assert values["command"] == "python x.py"
    caption = measure.caption(values)
    assert all(str(value) in caption for name, value in values.items() if name != "command")


def test_what_is_not_installed_is_absent() -> None:
    assert measure.installed("torch") == torch.__version__
    assert measure.installed("no-such-package") == "absent"


def test_scripts_run_where_cogvid_is_not_installed() -> None:
    """Without what an editable install adds to the interpreter, the checkout's own cogvid is found."""
    program = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path = [p for p in sys.path if 'site-packages' in p or 'lib/python' in p] + [{str(ROOT / 'scripts')!r}]\n"
        "import measure, cogvid, cogvid_kernels\n"
        "print(cogvid.__file__, cogvid_kernels.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(ROOT / "cogvid/__init__.py"), str(ROOT / "kernels/cogvid_kernels/__init__.py")]


def test_an_operator_costs_more_than_its_function(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--overhead"])
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["function, us"] < found["operator, us"]
    assert found["operator with a gradient, us"] > found["function, us"]


def test_help_says_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "4 B H N^2 hd flop, 4 B N H hd elements" in out
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

    case = Case("6x32", 4.0 * 6 * 32, 2.0 * 6 * 32 * 4, inputs)
    shapes = Shapes({}, {}, lambda *_: iter([("", {})]), lambda *_: case)
    op = Op("rms_norm", "byte", "", shapes, ops.rms_norm, nearly, {"absent": raises})
    limits = {"copy_gbs": 10.0, "matmul_tflops": 1.0}
    rows = timing.bench_case(op, case, torch.device("cpu"), torch.float32, limits, runs=2, compiled=False)
    found = {row["provider"]: row for row in rows}
    assert found["torch"]["median_ms"] > 0
    assert found["torch"]["percent_measured"] == pytest.approx(10 * found["torch"]["rate"])
    assert found["torch"]["tflops"] == pytest.approx(1e-3 * found["torch"]["rate"] * found["torch"]["flop_per_byte"])
    assert found["ours"]["reason"].startswith("wrong: relative RMS")
    assert found["absent"]["reason"] == "OSError: no backend for torch.Size([6, 32])"
    assert not [name for name in ("ours", "absent") if "median_ms" in found[name]]
