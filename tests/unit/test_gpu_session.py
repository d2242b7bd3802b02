"""The GPU session, rehearsed on a CPU: a fault costs one result, and the tables come from what was written."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_session import DEVICE_FAULT, OUT_OF_TIME, RESULTS, ROOT, RUNNING, Recorder, main, read_results, run_stages
from gpu_tables import attention_orders, best_tiles, markdown, tiles_source

DIES_AT = "step/5B step, cogvid torch"


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_session.py", "--out", out, "--device", "cpu", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


STAGES = ("limits", "step", "a", "hangs", "after")


def states(out: Path) -> dict[str, str]:
    return {f"{stage}/{key}": line["state"] for (stage, key), line in read_results(out).items() if stage in STAGES}


@pytest.mark.slow
def test_a_stage_that_is_killed_loses_one_result(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    out = tmp_path / "out"
    done = run(out, "--stages", "limits", "step", "--die-at", DIES_AT)
    assert done.returncode == 0, done.stdout + done.stderr
    first = states(out)
    assert read_results(out)["step", DIES_AT.partition("/")[2]]["reason"] == "the process died: -9"
    assert first["limits/limits"] == "done"
    after = list(first)[list(first).index(DIES_AT) + 1 :]
    assert "step/5B step, cogvid triton, adaLN computed before" in after
    # A CPU has no CUDA graphs, and nobody asked for torch.compile.
    failed = {key for key, state in first.items() if state == "failed"}
    assert failed == {DIES_AT, "step/5B step, cogvid triton, CUDA graph", "step/5B step, torch.compile"}
    table = (out / "RESULTS.md").read_text()
    assert "the process died: -9" in table
    assert "| 5B step, diffusers |" in table
    assert not (out / RUNNING).exists()

    lines = (out / RESULTS).read_text().splitlines()
    again = run(out, "--stages", "limits", "step", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(out) == first
    assert len((out / RESULTS).read_text().splitlines()) == len(lines) + 3  # of the new session and its two stages


@pytest.mark.slow
def test_every_stage_runs_to_its_end(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--budget", "600")
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_results(tmp_path / "out")
    assert {stage for stage, _ in results} >= {"limits", "compile", "numerics", "parity", "attention", "memory", "vae"}
    gpu_alone = ("CUDA graph", "torch.compile")
    assert not [line for line in results.values() if "reason" in line and not line["key"].endswith(gpu_alone)]
    tiles = runpy.run_path(str(tmp_path / "out" / "_tiles.py"))["TILES"]
    assert {("attention", "pointer/16x64"), ("rows", "4096")} <= tiles.keys()


def test_results_are_not_mixed_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text("")
    done = run(tmp_path, "--stages", "limits")
    assert done.returncode == 2
    assert f"--out: got {tmp_path} with results in it, want another directory, or --resume" in done.stderr
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "new"), "--budget", "0"])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_stage_that_hangs_is_killed_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages are stand-ins: one that sleeps inside a result, and one that writes a result."""
    program = tmp_path / "stages.py"
    program.write_text(
        "import argparse, sys, time\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from pathlib import Path\n"
        "from gpu_session import Recorder\n"
        "p = argparse.ArgumentParser()\n"
        "for name in ('--out', '--device', '--worker', '--deadline'): p.add_argument(name)\n"
        "a = p.parse_args()\n"
        "r = Recorder(Path(a.out), a.worker, float(a.deadline))\n"
        "r.measure('one', lambda: {'x': 1.0})\n"
        "if a.worker == 'hangs': r.measure('two', lambda: time.sleep(600))\n"
    )
    monkeypatch.setattr("gpu_session.__file__", str(program))
    monkeypatch.setattr("gpu_session.GRACE", 0.5)
    args = argparse.Namespace(out=tmp_path, budget=8.0, device="cpu", compile=False, die_at=None)
    begin = time.monotonic()
    run_stages(args, {"hangs": 1.0, "after": 1.0})
    assert time.monotonic() - begin < 30
    assert states(tmp_path) == {"hangs/one": "done", "hangs/two": "cut", "after/one": "done"}
    ends = [line["note"] for (stage, _), line in read_results(tmp_path).items() if stage == "stages"]
    assert ends == ["out of time, at two", "done"]


def recorder(out: Path, seconds: float = 60, stage: str = "a") -> Recorder:
    return Recorder(out, stage, time.time() + seconds)


def test_what_is_done_or_failed_is_not_measured_again_and_what_was_cut_is(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise ValueError("two\nlines")

    first = recorder(tmp_path)
    first.measure("good", lambda: {"x": 1.0})
    assert first.measure("bad", fails)["reason"] == "ValueError: two lines"
    with (tmp_path / RESULTS).open("a") as file:
        file.write(json.dumps({"stage": "a", "key": "late", "state": "cut"}) + "\n")
        file.write('{"stage": "a", "key": "torn", "sta')

    def never() -> dict[str, Any]:
        raise AssertionError("measured again")

    second = recorder(tmp_path)
    assert second.measure("good", never)["x"] == 1.0
    assert second.measure("bad", never)["state"] == "failed"
    assert second.measure("late", lambda: {"x": 2.0})["state"] == "done"
    assert states(tmp_path) == {"a/good": "done", "a/bad": "failed", "a/late": "done"}
    assert second.value("a", "good")["x"] == 1.0
    assert second.value("a", "bad") == {}


def test_nothing_is_begun_after_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        recorder(tmp_path, seconds=-1).measure("x", dict)
    assert stopped.value.code == OUT_OF_TIME
    assert read_results(tmp_path) == {}


def test_a_lost_device_ends_the_process_after_its_result_is_written(tmp_path: Path) -> None:
    def fault() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit) as stopped:
        recorder(tmp_path).measure("x", fault)
    assert stopped.value.code == DEVICE_FAULT
    assert read_results(tmp_path)["a", "x"]["state"] == "failed"


def test_the_fastest_correct_tile_is_proposed(tmp_path: Path) -> None:
    place = {"stage": "attention", "operation": "attention", "shape_class": "tma/16x64", "arch": 90}
    lines = {
        ("attention", key): {**place, "key": key, **values}
        for key, values in {
            "slow": {"state": "done", "median_ms": 2.0, "tile": [{"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3]},
            "fast": {"state": "done", "median_ms": 1.0, "tile": [{"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2]},
            "wrong": {"state": "failed", "reason": "error: got 1, want less"},
        }.items()
    }
    assert [line["key"] for line in best_tiles(lines).values()] == ["fast"]
    (tmp_path / "_tiles.py").write_text(tiles_source(lines))
    tile = runpy.run_path(str(tmp_path / "_tiles.py"))["TILES"]["attention", "tma/16x64"][90]
    assert (dict(tile.blocks), tile.num_warps, tile.num_stages) == ({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2)
    assert "- attention: wrong: error: got 1, want less" in markdown(lines)


def attention_line(
    variant: str, milliseconds: float, tile: str = "(128, 64, 8, 3)", state: str = "done"
) -> dict[str, Any]:
    key = f"5B {variant} {tile}"
    line = {"stage": "attention", "key": key, "state": state, "variant": variant, "arch": 90}
    return line | {"median_ms": milliseconds, "operation": "attention", "shape_class": "tma/16x64", "tile": [{}, 8, 3]}


def test_the_order_of_attention_is_that_of_the_variants_that_were_right(tmp_path: Path) -> None:
    found = [
        attention_line("tma", 3.0),
        attention_line("tma_bounded", 4.0),
        attention_line("tma_bounded", 2.0, "(64, 64, 4, 3)"),
        attention_line("tma_bounded", 0.5, "(128, 128, 8, 3)", "failed"),  # one block size, not the variant
        attention_line("tma_ahead", 1.0),
        attention_line("tma_ws_bounded", 0.9),
        attention_line("tma_persistent", 9.0),
        attention_line("pointer", 5.0),
        {"stage": "numerics", "key": "attention toy bf16 ours/tma_ahead", "state": "failed", "reason": "x"},
        {"stage": "probe", "key": "tma_ws_bounded bf16 193 tokens", "state": "cut", "reason": "x"},
    ]
    lines = {(line["stage"], line["key"]): line for line in found}
    assert attention_orders(lines) == {90: {"tma_bounded": 2.0, "tma": 3.0, "pointer": 5.0}}
    (tmp_path / "_tiles.py").write_text(tiles_source(lines))
    orders = runpy.run_path(str(tmp_path / "_tiles.py"))["ATTENTION_ORDER"]
    assert orders[90] == ("tma_bounded", "tma", "pointer")
    assert orders[80] == ("pointer",)
    # Without "pointer" there is nothing for tensors that TMA cannot take.
    assert attention_orders({k: v for k, v in lines.items() if v.get("variant") != "pointer"}) == {}


def test_what_the_probe_did_not_find_right_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_stages

    monkeypatch.setattr(gpu_stages, "specialised", lambda _: ["tma_ws_bounded"])
    keys = [gpu_stages.probe_key("tma_ws_bounded", *what) for what in gpu_stages.PROBES]
    probe = recorder(tmp_path, stage="probe")
    for key in keys[:-1]:
        probe.measure(key, lambda: {"error": 0.0})
    later = recorder(tmp_path, stage="attention")
    assert "tma_ws_bounded" not in {name for name, _ in gpu_stages.attention_jobs(later, "cpu")}
    assert later.all["attention", "tma_ws_bounded"]["reason"].endswith("so it is not run")
    probe.measure(keys[-1], lambda: {"error": 0.0})
    jobs = gpu_stages.attention_jobs(recorder(tmp_path, stage="attention"), "cpu")
    assert [tile for name, tile in jobs if name == "tma_ws_bounded"] == gpu_stages.SPECIALISED_TILES
