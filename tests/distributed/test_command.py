"""The command line under torchrun does what it does in one process, and the first rank alone prints and writes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogvid.cli import main
from cogvid.media.video import read_video
from cogvid.run.record import read_record
from measure import rel_rms
from tests import tolerances
from tests.distributed import torchrun

SMALL = ["--height", "32", "--width", "32", "--num-frames", "9", "--num-inference-steps", "4", "--guidance-scale", "2",
         "--device", "cpu"]  # fmt: skip
RED = ["a red circle moves right", *SMALL, "--seed", "3"]


def latents(folder: Path) -> torch.Tensor:
    return load_file(folder / "trajectory.safetensors")["latents"]


def generate(folder: Path) -> list[str]:
    """Arguments of a run that writes all that it can into a folder."""
    folder.mkdir()
    side = {"sidecar": "sidecar.json", "save-trajectory": "trajectory.safetensors", "save-noise": "noise.safetensors"}
    options = [word for name, file in side.items() for word in (f"--{name}", str(folder / file))]
    return ["generate", *RED, "-o", str(folder / "out.mp4"), *options]


def check_same(a: Path, b: Path, split: str) -> None:
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))
    assert rel_rms(latents(b), latents(a)) <= tolerances.SPLIT_LATENTS
    assert (b / "noise.safetensors").read_bytes() == (a / "noise.safetensors").read_bytes()
    one, many = (read_record(folder / "out.mp4") for folder in (a, b))
    assert (one.pop("parallel"), many.pop("parallel")) == (None, split)
    assert {**many, "machine": one["machine"]} == one
    assert json.loads((b / "sidecar.json").read_text())["record"]["parallel"] == split


def test_generate_on_two_processes(tmp_path: Path) -> None:
    assert main(generate(tmp_path / "one")) == 0
    ended = torchrun.cogvid(2, *generate(tmp_path / "two"))
    assert ended.status == 0, ended.err
    assert ended.out == f"{tmp_path / 'two' / 'out.mp4'}\n"
    assert ended.err.count("seed 3") == 1
    assert ended.err.count("9/9") >= 1
    check_same(tmp_path / "one", tmp_path / "two", "cfg=2,ulysses=1,ring=1")
    assert read_video(tmp_path / "two" / "out.mp4")[0].shape == (9, 32, 32, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "split"), [(3, "ulysses=3"), (4, "cfg=2,ring=2"), (6, "cfg=1,ulysses=2,ring=3")])
def test_generate_on_more(count: int, split: str, tmp_path: Path) -> None:
    assert main(generate(tmp_path / "one")) == 0
    ended = torchrun.cogvid(count, *generate(tmp_path / "many"), "--parallel", split)
    assert ended.status == 0, ended.err
    check_same(tmp_path / "one", tmp_path / "many", str(read_record(tmp_path / "many" / "out.mp4")["parallel"]))


@pytest.mark.slow
def test_generate_on_two_nodes(tmp_path: Path) -> None:
    assert main(generate(tmp_path / "one")) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "cogvid", *generate(tmp_path / "two")]
    nodes = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    agents = [torchrun.start(1, command, nodes=[*nodes, "--node-rank", str(node)]) for node in (0, 1)]
    first, second = (torchrun.wait(agent) for agent in agents)
    assert (first.status, second.status) == (0, 0), (first.err, second.err)
    assert (first.out, second.out) == (f"{tmp_path / 'two' / 'out.mp4'}\n", "")
    check_same(tmp_path / "one", tmp_path / "two", "cfg=2,ulysses=1,ring=1")


@pytest.mark.slow
def test_a_batch_is_done_by_all(tmp_path: Path) -> None:
    """Jobs that go together, one alone, one that fails, and one that was done before."""
    jobs: list[dict[str, Any]] = [{"prompt": "a red circle", "seed": 1}, {"prompt": "a blue square", "seed": 2}]
    jobs += [{"prompt": "x", "height": 33}, {"prompt": "y", "step_cache": "pyramid=2", "num_inference_steps": 4}]
    listed = tmp_path / "jobs.jsonl"
    listed.write_text("\n".join(map(json.dumps, jobs)))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    command = ["batch", str(listed), *SMALL, "--batch-size", "4", "-o"]
    assert main([*command, str(tmp_path / "one")]) == 3
    for _ in range(2):  # the second time all but one are done
        ended = torchrun.cogvid(2, *command, str(tmp_path / "two"))
        assert ended.status == 1  # torchrun's own, for the 3 of each rank
        assert "exitcode  : 3" in ended.err
        assert len(ended.errors) == 1
        assert "jobs: got 1 of 4 that failed (2), want none" in ended.errors[0]
        assert ended.out == f"{tmp_path / 'two' / 'manifest.jsonl'}\n"
    assert ended.err.count("cogvid: job") == 1
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "manifest.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    timing = ("seconds", "peak_memory", "stages", "ended")
    plain = {
        name: [{k: v for k, v in entry.items() if k not in timing} for entry in each] for name, each in lines.items()
    }
    assert plain["one"] == plain["two"]
    for entry in lines["one"]:
        if entry["status"] == "done":
            records = [read_record(tmp_path / name / entry["output"]) for name in ("one", "two")]
            assert [record.pop("parallel") for record in records] == [None, "cfg=2,ulysses=1,ring=1"]
            assert {**records[1], "machine": records[0]["machine"]} == records[0]


@pytest.mark.slow
def test_a_replay_is_done_by_all(tmp_path: Path) -> None:
    """On as many processes as the run had, with its split, it gives the same bytes; on others, the split of there."""
    out = str(tmp_path / "out.mp4")
    assert torchrun.cogvid(2, "generate", *RED, "-o", out, "--parallel", "ring=2").status == 0
    same = torchrun.cogvid(2, "replay", out, "-o", str(tmp_path / "same.mp4"))
    assert same.status == 0, same.err
    assert f"has the same bytes as '{out}'" in same.err
    assert "parallel: " not in same.err
    other = torchrun.cogvid(3, "replay", out, "-o", str(tmp_path / "three.mp4"))
    assert other.status == 0, other.err
    assert "parallel: 'cfg=1,ulysses=1,ring=2' in the record, 'cfg=1,ulysses=3,ring=1' in this run" in other.err
    assert main(["replay", out, "-o", str(tmp_path / "one.mp4")]) == 0
    assert read_record(tmp_path / "one.mp4")["parallel"] is None


@pytest.mark.slow
def test_what_one_process_does(tmp_path: Path) -> None:
    for command, line in ((["plan", "x"], "legal  "), (["inspect", "tiny-t2v"], "model  ")):
        ended = torchrun.cogvid(2, *command)
        assert (ended.status, ended.errors) == (0, [])
        assert ended.out.count(line) == 1
    ended = torchrun.cogvid(2, "compare", "--trace", "a.mp4", "b.mp4")
    assert ended.errors == ["cogvid: error: trace: got it on 2 processes, want one"]
    ended = torchrun.cogvid(2, "generate", *RED, "-o", str(tmp_path / "out.mp4"), "--capture", str(tmp_path / "kept"))
    assert len(ended.errors) == 1
    assert "capture: got " in ended.errors[0]
    assert "on 2 processes, want it on one" in ended.errors[0]
    assert os.listdir(tmp_path) == []


def test_a_split_of_other_devices_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", *RED, "-o", str(tmp_path / "out.mp4"), "--parallel", "cfg=2,ulysses=2"]
    assert main(command) == 2
    wanted = "parallel: got cfg=2,ulysses=2,ring=1 on 1 process, want 4: torchrun --nproc-per-node 4 ..."
    assert capsys.readouterr().err == f"cogvid: error: {wanted}\n"
    assert os.listdir(tmp_path) == []
