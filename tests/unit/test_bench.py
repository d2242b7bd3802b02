"""The benchmark of the kernels with what a user brings: functions, shapes, inputs, a history."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.cli import main as cogvid_main
from cogvid.ops import BlockContext, Ops
from cogvid_kernels.bench import command, history, plots, timing
from cogvid_kernels.bench.cases import GRIDS, grid_of
from cogvid_kernels.bench.registry import make_registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "kernels" / "README.md").read_text()
FUNCTIONS = """
import torch
from cogvid import ops

seen = []

def right(q, k, v, context):
    seen.append((tuple(q.shape), q.dtype, context))
    return ops.attention(q, k, v)

def no_context(q, k, v):
    return ops.attention(q, k, v)

def wrong_row(q, k, v, context):
    out = ops.attention(q, k, v)
    out[:, -1] *= 1.5
    return out

def wide(q, k, v, context):
    return ops.attention(q, k, v).float()

def greedy(q, k, v, context):
    return ops.attention(q, k.mul_(1), v.zero_())

def raises(q, k, v, context):
    raise RuntimeError("no tensor cores here")

def norm(x, weight, *, eps):
    return ops.rms_norm(x, weight, eps=eps)

def renamed(hidden, gain, *, eps):
    return ops.rms_norm(hidden, gain, eps=eps)

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the user, which is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_there\n")
    for name in ("mine", "broken", "my_attention"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def bench(*arguments: str, ops: str = "attention", others: str = "torch") -> int:
    gradients = torch.is_grad_enabled()
    try:
        return command.main(["--device", "cpu", "--runs", "1", "--ops", ops, "--providers", others, *arguments])
    finally:
        torch.set_grad_enabled(gradients)


def result(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


def rows(out: str) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in result(out)["rows"]}


@pytest.mark.usefixtures("here")
def test_a_function_of_the_user_is_checked_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--shape", "batch=2", "tokens=37", "heads=3", "head_dim=16", "text=7")
    assert bench("--provider", "mine:right", "--dtype", "fp32", *shape) == 0
    row = rows(capsys.readouterr().out)["mine:right"]
    assert row["own"]
    assert row["case"] == "given B2 H3 N37 hd16"
    assert row["median_ms"] > 0
    assert row["error"] < 1e-5
    # It gets what a model passes.
    size, dtype, context = sys.modules["mine"].seen[0]
    assert (size, dtype) == ((2, 37, 3, 16), torch.float32)
    assert isinstance(context, BlockContext)
    assert (context.text_len, context.shard.total, context.layer, context.step) == (7, 37, 0, 0)
    assert len(context.temb) == 2
    frames, height, width = context.grid
    assert frames * height * width == 30


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong_row", "wrong: relative RMS"),
        ("wide", "ValueError: result: got torch.float32 on cpu, want torch.bfloat16 on cpu"),
        ("greedy", "ValueError: v: got an input that was written to, want it as it was"),
        ("raises", "RuntimeError: no tensor cores here"),
    ],
)
def test_a_wrong_function_is_reported_and_not_timed(name: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--provider", f"mine:{name}", "--provider", "mine:right") == 1
    out, err = capsys.readouterr()
    found = rows(out)
    assert found[f"mine:{name}"]["reason"].startswith(reason)
    assert "median_ms" not in found[f"mine:{name}"]
    assert found["mine:right"]["median_ms"] > 0  # with the inputs as they were
    assert found["mine:right"]["error"] == found["torch"]["error"]
    assert re.fullmatch(rf"bench: error: provider: got mine:{name} with .*, want a right result\n", err)


@pytest.mark.usefixtures("here")
def test_other_operations_are_called_as_models_call_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--provider", "mine:norm", "--provider", "mine:renamed", ops="rms_norm") == 0
    found = result(capsys.readouterr().out)["rows"]
    assert len([row for row in found if row["own"] and row["median_ms"] > 0]) == 4
    for op in make_registry():  # every operation of a model can have one, and its own reference is right
        name = f"cogvid.ops:{op.name}"
        if op.name in vars(Ops.torch()):
            assert bench("--provider", name, ops=op.name) == 0
            assert rows(capsys.readouterr().out)[name]["median_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--provider", "mine:no_context"), "want one that takes (q, k, v, context)"),
        (("--provider", "mine"), "provider: got 'mine', want MODULE:FUNCTION"),
        (("--provider", "mine:absent"), "which cannot be imported (AttributeError"),
        (("--provider", "broken:f"), "(ModuleNotFoundError: No module named 'a_package_that_is_not_there'), want"),
        (("--provider", "mine:number"), "provider: got mine:number, which is a int, want a function"),
        (("--provider", "mine:right", "--ops", "attention", "rms_norm"), "got 2 operations, want one --ops"),
        (("--provider", "mine:right", "--ops", "norm_rope_attention"), "got --ops norm_rope_attention, want one of"),
        (("--cuda-graph",), "--cuda-graph: got --device cpu, want cuda"),
        (("--shape", "tokens=many"), "shape: got 'tokens=many', want tokens=NUMBER with a number from 1"),
        (("--shape", "tokens=0"), "shape: got 'tokens=0'"),
        (("--shape", "tokens=\u0665"), "shape: got 'tokens=\u0665'"),
        (("--shape", "length=3"), "want NAME=NUMBER with a name of batch, tokens, heads, head_dim, text"),
        (("--shape", "tokens"), "shape: got 'tokens', want NAME=NUMBER"),
        (("--shape", "tokens=9", "text=9"), "shape: got text=9, want fewer than tokens=9"),
        (("--shape", "head_dim=7"), "shape: got head_dim=7, want an even number"),
        (("--shape", "tokens=9", "--sweep"), "--shape, --sweep: got both"),
        (("--ops", "group_norm_silu", "--shape", "channels=9", "frames=1"), "got channels=9, want 4 or a multiple"),
        (("--ops", "group_norm_silu", "--shape", "latent_frames=1"), "want NAME=NUMBER with a name of channels"),
        (("--ops", "spatial_norm_silu", "--shape", "latent_frames=1"), "got latent_frames=1, want 2 or more"),
        (("--ops", "spatial_norm_silu", "--shape", "width=2"), "got latent_width=3, want at most width=2"),
        (("--inputs", "absent"), "inputs: got 'absent', which holds no capture, want a --capture DIR"),
        (("--inputs", "absent", "--ops", "rms_norm"), "--inputs: got --ops rms_norm, want attention alone"),
        (("--baseline", "absent.json"), "--baseline: got 'absent.json', which is no file"),
        (("--baseline", "mine.py"), "--baseline: got 'mine.py', which has no results"),
        (("--plot-history", "a.png"), "--plot-history: got no --history, want one"),
        (("--max-slowdown", "0.5"), "--max-slowdown: got 0.5, want a finite number, 1 or more"),
        (("--json", "no/a.json"), "--json: got 'no/a.json', want a file in a directory that exists"),
        (("--plot", "a.png", "--roofline", "a.png"), "--roofline: got a.png, which is that of --plot, want another"),
        (("--runs", "0"), "--runs: got 0, want at least 1"),
        (("--ops", "softmax"), "invalid choice: 'softmax'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in here.iterdir()} | {"__pycache__"}
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert {path.name for path in here.iterdir()} <= before


@pytest.mark.usefixtures("here")
def test_without_matplotlib_a_plot_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--roofline", "a.png") == 2
    assert "--roofline: got an environment without it" in capsys.readouterr().err


def test_names_that_a_shape_leaves_out_are_those_of_the_models() -> None:
    for op in make_registry():
        full, toy = (op.shapes.given([], size, torch.bfloat16) for size in ("full", "toy"))
        numbers = full.label.removeprefix("given ")
        assert any(case.label.endswith(numbers) for case in op.cases("full", False, torch.bfloat16)), numbers
        assert toy.flop < full.flop
        assert toy.bytes < full.bytes
    fewer = make_registry()[0].shapes.given(["tokens=5", "heads=1"], "full", torch.bfloat16)
    assert fewer.inputs(torch.device("cpu"), torch.float32)["_context"].text_len == 4


@pytest.mark.usefixtures("here")
def test_a_shape_that_does_not_fit_ends_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--shape", "tokens=2147483647", "heads=100000", "--shape", "tokens=9", "--json", "a.json") == 1
    out, err = capsys.readouterr()
    assert err.startswith("bench: error: shape: got attention given B1 H100000 N2147483647 hd64 and ")
    assert err.endswith(", want one whose inputs can be made\n")
    assert [row["case"] for row in result(out)["rows"] if "median_ms" in row] == ["given B1 H2 N9 hd64"]
    assert json.loads(Path("a.json").read_text()) == result(out)


def test_a_cuda_graph_is_what_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, with a stand-in for the capture; one of its results is wrong, and another fails."""
    calls: dict[str, int] = {}

    def graphed(run: Any) -> Any:
        out = run()
        name = f"capture {len(calls)}"
        calls[name] = 0

        def replay() -> Any:
            calls[name] += 1
            return out * 2 if name == "capture 1" else out

        if name == "capture 2":
            calls[name] = 0
            raise RuntimeError("operation not permitted when stream is capturing")
        return replay

    monkeypatch.setattr(timing, "graphed", graphed)
    op = next(op for op in make_registry() if op.name == "rms_norm")
    case, cpu = op.shapes.given([], "toy", torch.float32), torch.device("cpu")
    own = {name: lambda inputs: (lambda: op.reference(**inputs), lambda out: out) for name in ("wrong", "fails")}
    options = {"runs": 3, "compiled": False, "only": "torch", "own": own, "cuda_graph": True}
    found = timing.bench_case(op, case, cpu, torch.float32, {"copy_gbs": 1.0, "matmul_tflops": 1.0}, **options)
    rows = {row["provider"]: row for row in found}
    assert all(row["cuda_graph"] for row in found)
    assert rows["torch"]["median_ms"] > 0
    assert calls == {"capture 0": 1 + 3, "capture 1": 1, "capture 2": 0}
    assert rows["wrong"]["reason"].startswith("wrong: relative RMS")
    assert "when stream is capturing" in rows["fails"]["reason"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("here")
def test_on_a_gpu_each_provider_is_a_graph(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "toy", "--no-compile", "--runs", "3", "--cuda-graph", "--ops", "attention"]
    assert command.main([*arguments, "--device", "cuda", "--provider", "mine:right"]) == 0
    found = rows(capsys.readouterr().out)
    assert all(found[name]["median_ms"] > 0 for name in ("torch", "ours", "mine:right"))


def test_the_grids_are_those_of_the_models() -> None:
    for frames, height, width, model in ((49, 480, 720, "cogvideox-5b"), (81, 768, 1360, "cogvideox1.5-5b")):
        config = cogvid.CONFIGS[model]
        latent_frames, h, w = config.latent_size(height, width, frames)
        grid = (latent_frames // (config.transformer.patch_size_t or 1), h // 2, w // 2)
        assert GRIDS[math.prod(grid)] == grid
    for tokens in (1, 7, 51, 798, 17550, 44880):
        assert math.prod(grid_of(tokens)) == tokens


def test_flop_and_bytes_are_those_of_the_tensors() -> None:
    """Bytes: what goes in and comes out, but for what is read twice and vectors; FLOP of products: PyTorch's count."""
    from torch.utils.flop_counter import FlopCounterMode

    for op in make_registry():
        shape = ["batch=2", "tokens=4096", "heads=2"] if "batch" in op.shapes.defaults else []
        case = op.shapes.given(shape, "full" if shape else "toy", torch.float32)
        inputs = {n: x for n, x in case.inputs(torch.device("cpu"), torch.float32).items() if not n.startswith("_")}
        with FlopCounterMode(display=False) as counter:
            made = op.reference(**inputs)
        outputs = [made] if isinstance(made, torch.Tensor) else list(made)
        large = [x for x in [*inputs.values(), *outputs] if isinstance(x, torch.Tensor) and x.ndim > 1]
        moved = sum(x.numel() * x.element_size() for x in large)
        again = outputs[0].numel() * 4 if op.name.endswith("norm_silu") else 0
        assert case.bytes == pytest.approx(moved + again, rel=0.15), op.name
        if op.unit == "flop":
            assert case.flop == pytest.approx(counter.get_total_flops() or case.flop, rel=1e-6), op.name


def test_attention_is_checked_in_every_tile() -> None:
    """A kernel that leaves out any one tile of 128 rows is wrong."""
    op = make_registry()[0]
    inputs = op.shapes.given(["tokens=8000", "heads=1"], "toy", torch.float32).inputs(
        torch.device("cpu"), torch.float32
    )
    reference = timing.Reference(op, inputs)
    right = op.reference(*(inputs[name] for name in "qkv"))
    assert reference.error(right) < 1e-5
    for start in range(0, 8000, 128):
        wrong = right.clone()
        wrong[:, start : start + 128] = 0
        assert reference.error(wrong) > 0.05, start


HEADER = {"device": "a GPU", "commit": "abc", "date": "2026-01-01"}


def row(median: float | None, spread: float = 0.1, **changes: Any) -> dict[str, Any]:
    times = {} if median is None else {"median_ms": median, "p20_ms": median - spread, "p80_ms": median + spread}
    return {
        "op": "attention",
        "case": "toy",
        "dtype": "bf16",
        "cuda_graph": False,
        "provider": "ours",
        **times,
        **changes,
    }


@pytest.mark.parametrize(
    ("now", "verdict", "regression"),
    [
        (row(1.0), "within the spread", False),
        (row(1.15), "within the spread", False),
        (row(1.3, 0.01), "slower", True),
        (row(1.3, 0.3), "within the spread", False),  # more than the factor, but noisy
        (row(1.15, 0.01), "slower", False),  # beyond the spread, and less than the factor
        (row(0.7), "faster", False),
        (row(None, reason="wrong"), "not timed", True),
    ],
)
def test_slower_is_what_lies_outside_the_spread(now: dict[str, Any], verdict: str, regression: bool) -> None:
    [change] = history.compare([now], history.baseline([{"header": HEADER, "rows": [row(1.0)]}], "a GPU"), 1.2)
    assert (change["verdict"], change["regression"]) == (verdict, regression)


def test_a_baseline_is_the_last_of_the_same_case_on_the_same_device() -> None:
    runs = [{"header": {**HEADER, "device": device}, "rows": [row(t)]} for device, t in
            (("a GPU", 1.0), ("a GPU", 2.0), ("another", 3.0))]  # fmt: skip
    runs.append({"header": HEADER, "rows": [row(None, reason="wrong"), row(5.0, cuda_graph=True)]})
    before = history.baseline(runs, "a GPU")
    assert before[history.place(row(0.0))]["median_ms"] == 2.0
    others = [{"dtype": "fp16"}, {"case": "5B"}, {"provider": "torch"}, {"op": "rms_norm"}]
    assert not history.compare([row(9.0, **other) for other in others], before, 1.1)


@pytest.mark.usefixtures("here")
def test_a_history_grows_and_a_regression_is_an_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--history", "times.jsonl") == 0
    first = result(capsys.readouterr().out)
    with open("times.jsonl", "a") as file:
        file.write('{"header": {"commit": ')  # of a process that was killed
    pictures = ("--plot-history", "times.png")
    assert bench("--history", "times.jsonl", "--baseline", "times.jsonl", "--max-slowdown", "1e9", *pictures) == 0
    second = result(capsys.readouterr().out)
    assert [change["provider"] for change in second["changes"]] == ["torch"]
    kept = history.read("history", "times.jsonl")
    assert kept == [first, second]
    assert {"date", "commit", "machine", "torch", "triton"} <= kept[0]["header"].keys()
    assert Path("times.png").read_bytes().startswith(b"\x89PNG")
    # As if it had been a thousand times faster before.
    for each in first["rows"]:
        for name in ("median_ms", "p20_ms", "p80_ms"):
            if name in each:
                each[name] /= 1000
    Path("fast.json").write_text(json.dumps(first))
    assert bench("--baseline", "fast.json", "--json", "now.json") == 1
    out, err = capsys.readouterr()
    assert "slower, a regression" in out
    assert re.fullmatch(r"bench: error: --baseline: got torch \S+ times .*, want at most 1.1 times as long\n", err)
    assert Path("now.json").exists()  # the figures are not lost
    # What cannot be compared is refused before the work.
    first["header"]["device"] = "another"
    Path("other.json").write_text(json.dumps(first))
    for arguments in (("--baseline", "other.json"), ("--baseline", "now.json", "--shape", "tokens=9")):
        assert bench(*arguments) == 2
        assert "nothing of this run was timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "[]", '{"header": {}, "rows": []}', json.dumps({"header": HEADER, "rows": [{"op": 1}]}),
             json.dumps({"header": HEADER, "rows": [row(1.0) | {"median_ms": "1"}]}), "\0", "[" * 10**5]
)  # fmt: skip
def test_a_damaged_history_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "times.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^--baseline: got .*, which has no results, want a file of"):
        history.read("--baseline", path)


def test_the_roofline_has_the_limits_and_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure))
    timed = [
        row(1.0, own=False, provider=name, flop_per_byte=intensity, tflops=speed)
        for name, intensity, speed in (("ours", 0.5, 1.0), ("torch", 1000.0, 300.0))
    ]
    values = {"matmul_tflops": 700.0, "copy_gbs": 4000.0, "sheet_tflops": 989.0, "sheet_gbs": 4800.0}
    plots.check_matplotlib("--roofline")
    plots.roofline(
        [*timed, row(None, own=False)], values | {"machine": "", "torch": "", "triton": "", "commit": ""}, ""
    )
    [axes] = figures[0].axes
    measured, sheet = axes.lines
    for line, tflops, gbs in ((measured, 700.0, 4000.0), (sheet, 989.0, 4800.0)):
        xs, ys = line.get_xdata(), line.get_ydata()
        assert ys[0] == pytest.approx(1e-3 * gbs * xs[0])
        assert xs[1] == pytest.approx(1e3 * tflops / gbs)
        assert ys[1] == ys[2] == tflops
        assert xs[0] < 0.5
        assert xs[2] > 1000
    points = sorted(tuple(map(float, point)) for each in axes.collections for point in each.get_offsets())
    assert [point for point in points if point[0] == point[0]] == [(0.5, 1.0), (1000.0, 300.0)]


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_on_an_attention_of_ones_own_runs(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Commands and code of kernels/README.md, in their order."""
    ran = []
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL):
        if code.startswith("# my_attention.py"):
            Path("my_attention.py").write_text(code)
        elif language == "python":
            exec(code, {})
        else:
            for line in code.splitlines():
                ran.append(run_line(shlex.split(line)))
                capfd.readouterr()
    assert len(ran) == 5
    assert len(history.read("history", "times.jsonl")) == 2
    assert {"times.png", "bars.png", "roofline.png", "a.mp4", "captured"} <= {path.name for path in here.iterdir()}
    assert len(fences("python")[0].splitlines()) <= 10
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "kernels" / target).exists(), target


def run_line(words: list[str]) -> str:
    if words[0] == "cogvid":
        assert cogvid_main([*words[1:], "--device", "cpu"]) == 0
    else:
        assert words[:3] == ["python", "-m", "cogvid_kernels.bench"]
        assert command.main([*words[3:], "--device", "cpu", "--runs", "2", "--providers", "torch"]) == 0
        torch.set_grad_enabled(True)
    return words[0]


@pytest.mark.usefixtures("here")
@pytest.mark.slow
def test_the_module_finds_a_function_in_the_working_directory() -> None:
    """As a process, whatever is on its path; the interpreter has no say in what PyTorch computes."""
    arguments = [
        "--device",
        "cpu",
        "--ops",
        "rms_norm",
        "--provider",
        "mine:norm",
        "--runs",
        "1",
        "--providers",
        "ours",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cogvid_kernels.bench", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = result(done.stdout)
    assert found["header"]["command"].endswith("python -m cogvid_kernels.bench " + " ".join(arguments))
    assert [row["provider"] for row in found["rows"] if "median_ms" in row] == ["ours", "mine:norm"] * 2
