"""Many jobs in a directory: what is made, what is left out, what is reported, and several processes at once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.cli import main
from cogvid.media.video import read_metadata, read_video
from cogvid.models.text import TextEncoder
from cogvid.run import batch, given
from cogvid.run.jobs import BatchJob, make_jobs, read_jobs, read_prompts, read_sweep
from references import picture

ROOT = Path(__file__).parents[2]
STEPS = ["--num-inference-steps", "2", "--num-frames", "9", "--dtype", "float32", "--device", "cpu"]
RED, BLUE = "the red circle moves right", "the blue square moves left"


def write_jobs(path: Path, *jobs: dict[str, Any]) -> str:
    path.write_text("\n\n".join(json.dumps(job) for job in jobs) + "\n")
    return str(path)


def manifest(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "manifest.jsonl").read_text().splitlines()]


def videos(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.mp4"))


def test_jobs_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loads, encoded = [], []
    load, encode = batch.load, TextEncoder.__call__
    monkeypatch.setattr(batch, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(
        TextEncoder, "__call__", lambda self, prompts, n: encoded.extend(prompts) or encode(self, prompts, n)
    )
    jobs = write_jobs(
        tmp_path / "jobs.jsonl",
        {"prompt": RED, "seed": 5},
        {"prompt": BLUE, "seed": 5, "height": 100},
        {"prompt": BLUE, "seed": 6, "guidance_scale": 3, "fps": 4, "scheduler": "ddim"},
        {"prompt": RED},
    )
    out = tmp_path / "out"
    arguments = ["batch", jobs, "-o", str(out), "--model", "tiny-t2v", *STEPS]
    assert main(arguments) == 3
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out / "manifest.jsonl")
    assert captured.err.splitlines()[-1] == "cogvid: error: jobs: got 1 of 4 that failed (1), want none"
    assert "cogvid: job 1 of 4: failed: height: got 100, want a multiple of 16" in captured.err
    assert len(loads) == 1
    assert sorted(encoded) == sorted([RED, BLUE, ""])  # each once, and the negative prompt

    entries = manifest(out)
    assert [entry["status"] for entry in entries] == ["done", "failed", "done", "done"]
    assert [entry["error"] is None for entry in entries] == [True, False, True, True]
    assert entries[2]["job"] == {
        "prompt": BLUE, "seed": 6, "guidance_scale": 3.0, "fps": 4, "scheduler": "ddim", "model": "tiny-t2v",
        "num_inference_steps": 2, "num_frames": 9, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    done = [entry for entry in entries if entry["status"] == "done"]
    assert all(entry["seconds"] > 0 and entry["peak_memory"] > 50 * 2**20 for entry in done)
    assert {"text", "denoise", "decode"} <= set(entries[2]["stages"])
    assert videos(out) == [entry["output"] for entry in entries if entry["status"] == "done"]
    assert entries[0]["output"] == "0000-seed5.mp4"
    with (out / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["place"], row["status"], row["prompt"]) for row in rows] == [
        ("0", "done", RED), ("1", "failed", BLUE), ("2", "done", BLUE), ("3", "done", RED),
    ]  # fmt: skip

    # Each is what `generate` makes of the same options.
    single = tmp_path / "single.mp4"
    options = ["--seed", "6", "--guidance-scale", "3", "--fps", "4", "--scheduler", "ddim", "--model", "tiny-t2v"]
    assert main(["generate", BLUE, "-o", str(single), *options, *STEPS]) == 0
    assert single.read_bytes() == (out / entries[2]["output"]).read_bytes()

    # Again: what is finished is left out, what failed is tried again, what was changed or is gone is made anew.
    before = {name: (out / name).stat().st_mtime_ns for name in videos(out)}
    (out / entries[3]["output"]).unlink()
    assert main(arguments) == 3
    again = {name: (out / name).stat().st_mtime_ns for name in videos(out)}
    assert [name for name in before if again[name] != before[name]] == [entries[3]["output"]]
    assert [entry["ended"] == now["ended"] for entry, now in zip(entries, manifest(out), strict=True)] == [
        True, False, True, False,
    ]  # fmt: skip
    assert len(loads) == 2
    write_jobs(tmp_path / "jobs.jsonl", {"prompt": BLUE, "seed": 5}, {"prompt": BLUE, "seed": 5})
    assert main(arguments) == 0
    assert read_metadata(out / "0000-seed5.mp4")["prompt"] == [BLUE]
    assert [entry["status"] for entry in manifest(out)] == ["done"] * 4
    loads.clear()
    assert main(arguments) == 0
    assert not loads  # nothing to do


@pytest.mark.slow
def test_a_sweep_over_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{RED}\n\n  {BLUE}\n", encoding="utf-8")
    options = ["-o", str(tmp_path / "out"), "--model", "tiny-t2v", *STEPS]
    sweep = ["--sweep", "seed=3..4", "guidance-scale=1,2.5"]
    assert main(["batch", "--prompt-file", str(tmp_path / "prompts.txt"), *sweep, *options]) == 0
    found = [(e["job"]["prompt"], e["job"]["seed"], e["job"]["guidance_scale"]) for e in manifest(tmp_path / "out")]
    assert found == [(p, s, g) for p in (RED, BLUE) for s in (3, 4) for g in (1.0, 2.5)]
    for entry in manifest(tmp_path / "out"):
        made = read_metadata(tmp_path / "out" / entry["output"])
        assert (made["prompt"], made["seed"], made["guidance_scale"]) == (
            [entry["job"]["prompt"]], entry["seed"], entry["job"]["guidance_scale"],
        )  # fmt: skip
        assert "batch_size" not in made


def test_jobs_of_one_shape_are_sampled_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = batch._run_together
    monkeypatch.setattr(batch, "_run_together", lambda pipe, ready: calls.append(len(ready)) or real(pipe, ready))
    for seed in (0, 1):
        picture(64, 64, seed=seed).save(tmp_path / f"{seed}.png")
    jobs = write_jobs(
        tmp_path / "jobs.jsonl",
        {"prompt": RED, "seed": 9, "image": str(tmp_path / "0.png")},
        {"prompt": RED, "seed": 1, "guidance_scale": 4.0, "image": str(tmp_path / "0.png")},
        {"prompt": BLUE, "seed": 3, "image": str(tmp_path / "1.png")},
        {"prompt": BLUE, "seed": 4, "image": str(tmp_path / "missing.png")},
        {"prompt": BLUE, "seed": 5, "image": str(tmp_path / "1.png")},
    )
    options = [jobs, "--model", "tiny-i2v", *STEPS]
    assert main(["batch", "-o", str(tmp_path / "alone"), *options]) == 3
    assert calls == [1, 1, 1, 1]
    calls.clear()
    assert main(["batch", "-o", str(tmp_path / "together"), *options, "--batch-size", "3"]) == 3
    assert calls == [2, 1, 1]  # the missing picture fails alone
    entries = manifest(tmp_path / "together")
    assert [entry["status"] for entry in entries] == ["done", "done", "done", "failed", "done"]
    for place, size, index, seeds in ((0, 2, 0, [9, 3]), (2, 2, 1, [9, 3])):
        made = read_metadata(tmp_path / "together" / entries[place]["output"])
        assert entries[place]["batch_size"] == size
        expected = {"batch_size": size, "batch_index": index, "seeds": seeds, "seed": seeds[index], "given": []}
        assert {name: made[name] for name in expected} == expected
        assert made["prompt"] == [RED, BLUE]

    def frames(folder: str, place: int) -> torch.Tensor:
        return read_video(tmp_path / folder / entries[place]["output"])[0].float()

    # The encoder makes levels of rounding's last bits; another prompt and picture are far more.
    others = (frames("alone", 0) - frames("alone", 2)).abs().mean()
    for place in (0, 2):
        assert (frames("alone", place) - frames("together", place)).abs().mean() < 0.05 * others
    for place in (1, 4):
        name = entries[place]["output"]
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_together_is_alone_to_rounding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In latents: fp32 rounding, which matrix products of another size change."""
    seen: list[torch.Tensor] = []
    decode = cogvid.run.pipeline.decode_output
    monkeypatch.setattr(
        "cogvid.run.pipeline.decode_output", lambda vae, x, *rest: seen.append(x) or decode(vae, x, *rest)
    )
    options = ["--prompt", RED, "--sweep", "seed=3,8", "--model", "tiny-t2v", *STEPS]
    assert main(["batch", "-o", str(tmp_path / "alone"), *options]) == 0
    assert main(["batch", "-o", str(tmp_path / "together"), *options, "--batch-size", "2"]) == 0
    first, second, both = seen
    assert (torch.cat([first, second]) - both).norm() < 1e-5 * both.norm()


def test_names_and_sweeps() -> None:
    jobs = make_jobs([{"prompt": "a"}, {"prompt": "b", "height": 32}], ["seed=1..3"], {"height": 16, "fps": 8})
    assert [job.name for job in jobs] == [f"{i:04d}-seed{i % 3 + 1}.mp4" for i in range(6)]
    assert [job.values["height"] for job in jobs] == [16] * 3 + [32] * 3
    drawn = [BatchJob(place, {"prompt": "a"}).seed for place in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]  # the same in each run
    assert read_sweep("scheduler=dpm,ddim") == ("scheduler", ["dpm", "ddim"])
    assert read_sweep("num-frames=9") == ("num_frames", [9])
    assert read_sweep("guidance_scale=1,2.5,4..5") == ("guidance_scale", [1.0, 2.5, 4.0, 5.0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "guidnce": 2}', r"jobs\.jsonl:2: guidnce: got an unknown option, want one of prompt, neg"),
        ('{"prompt": "a"', r"jobs\.jsonl:2: got .*, want a JSON object"),
        ("[1]", r"jobs\.jsonl:2: got list, want a JSON object"),
        ('{"seed": 1}', r"jobs\.jsonl:2: prompt: got none, want one"),
        ('{"prompt": 3}', r"jobs\.jsonl:2: prompt: got 3, want a value of type str"),
        ('{"prompt": "a", "seed": true}', r"jobs\.jsonl:2: seed: got True, want a value of type int"),
        ('{"prompt": "a", "height": 32.5}', r"jobs\.jsonl:2: height: got 32\.5, want a value of type int"),
        (
            '{"prompt": "a", "strength": 1' + "0" * 400 + "}",
            r"jobs\.jsonl:2: got int too large to convert",
        ),
        ("[" * 100_000, r"jobs\.jsonl:2: got .*, want a JSON object"),
    ],
    ids=["name", "cut off", "list", "no prompt", "prompt", "bool", "float", "huge", "deep"],
)
def test_a_line_that_is_no_job_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_jobs(str(tmp_path / "jobs.jsonl"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", ["/dev/zero", "long.jsonl"])
def test_a_list_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with open("long.jsonl", "wb") as file:
        file.truncate(2**40)
    for read in (read_jobs, read_prompts):
        with pytest.raises(ValueError, match=rf"{path}: got more than 67108864 bytes, want fewer"):
            read(path)


@pytest.mark.parametrize(
    "line",
    [
        "[1]", "3", "x", '{"place": 0}', "[" * 100_000,
        '{"place": 0, "status": "failed", "ended": null, "job": {}, "job_sha256": ""}',
        '{"place": [], "status": "done", "ended": 1, "job": {}, "job_sha256": ""}',
        '{"place": 0, "status": "done", "ended": 1, "job": [], "job_sha256": ""}',
    ],
)  # fmt: skip
def test_a_broken_manifest_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    assert main(["batch", "--prompt", RED, "-o", str(tmp_path), "--model", "tiny-t2v"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert "manifest.jsonl: got a broken file (" in said
    assert said.endswith("), want one that a batch wrote")
    assert (tmp_path / "manifest.jsonl").read_text() == line + "\n"


def test_secrets_of_a_picture_are_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs that differ in a secret alone are still two."""
    fetched: list[str] = []

    def load_image(url: str) -> Any:
        fetched.append(url)
        raise ValueError(f"image: got no picture at\n{url}, want " + "one " * 1000)

    monkeypatch.setattr(given, "load_image", load_image)
    url, options = "https://me:S3CR3T@host.example/a.png?key=S3CR3T", ["-o", str(tmp_path / "out"), *STEPS]
    for name in (url, url, url + "2"):
        jobs = write_jobs(tmp_path / "jobs.jsonl", {"prompt": RED, "image": name, "seed": 1})
        done = fetched[-1:] == [name]
        assert main(["batch", jobs, *options, "--model", "tiny-i2v"]) == (0 if done else 3)
        if done:
            continue
        written = [path.read_text() for path in (tmp_path / "out").glob("manifest.*")]
        said = "".join(capsys.readouterr())
        assert len(written) == 2
        assert all("host.example/a.png" in text and "S3CR3T" not in text for text in [*written, said])
        assert max(map(len, said.splitlines())) < 1100
        entry = manifest(tmp_path / "out")[0]
        entry |= {"status": "done"}  # as if it had been
        (tmp_path / "out" / "manifest.jsonl").write_text(json.dumps(entry) + "\n")
        (tmp_path / "out" / entry["output"]).touch()
    assert fetched == [url, url + "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "JOBS, --prompt, --prompt-file: got none, want one of them"),
        (["a.jsonl", "--prompt", "x"], "got JOBS and --prompt, want one of them"),
        (["missing.jsonl"], "missing.jsonl"),
        (["--prompt", "x", "--batch-size", "0"], "batch_size: got 0, want an integer, 1 or more"),
        (["--prompt", "x", "--sweep", "sed=1"], "sweep: got 'sed=1', want NAME=VALUES with a NAME of prompt, "),
        (["--prompt", "x", "--sweep", "seed"], "sweep: got 'seed', want NAME=VALUES"),
        (["--prompt", "x", "--sweep", "seed=a"], "sweep: got 'a' for seed, want a value of type int"),
        (["--prompt", "x", "--sweep", "seed=9..1"], "sweep: got '9..1', want FIRST..LAST"),
        (["--prompt", "x", "--sweep", "seed=1..99999999999"], "want FIRST..LAST with at most 100000 values"),
        (["--prompt", "x", "--sweep", "seed=1", "--seed", "2"], "sweep: got 'seed', which is given elsewhere too"),
        (["--prompt", "x", "--sweep", "seed=1", "seed=2"], "sweep: got 'seed', which is given elsewhere too"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["batch", "-o", "out", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


SHARED = """
import os, signal, sys, time
import torch, transformers, av
from transformers import T5EncoderModel
import cogvid.run.batch
from cogvid.cli import main

directory, kill, *arguments = sys.argv[1:]
children = []
for name in ("a", "b", "c"):
    if (child := os.fork()) == 0:
        sys.stderr = open(directory + "/" + name, "w", buffering=1)
        status = 99
        try:
            status = main(arguments)
        finally:
            os._exit(status)
    children.append(child)
if kill == "yes":
    while "job" not in open(directory + "/a").read():
        time.sleep(0.01)
    os.kill(children[0], signal.SIGKILL)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["no", "yes"])
def test_processes_share_a_directory(tmp_path: Path, kill: str) -> None:
    """Each job is done once; those of a process that is killed are done by the others."""
    out = tmp_path / "out"
    arguments = [
        "batch",
        "--prompt",
        RED,
        "--sweep",
        "seed=1..6",
        "height=64,100",
        "-o",
        out,
        "--model",
        "tiny-t2v",
        *STEPS,
    ]
    done = subprocess.run(
        [sys.executable, "-c", SHARED, str(tmp_path), kill, *map(str, arguments)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"{-signal.SIGKILL if kill == 'yes' else 3} 3 3"
    entries = manifest(out)
    assert [entry["status"] for entry in entries] == ["done", "failed"] * 6
    assert videos(out) == [entry["output"] for entry in entries if entry["status"] == "done"]
    lines = [line for name in "abc" for line in (tmp_path / name).read_text().replace("\r", "\n").splitlines()]
    reported = sorted(line.split()[2] for line in lines if line.startswith("cogvid: job "))
    if kill == "yes":  # the killed one may have written its video and not the manifest, or that and not the line
        assert set(map(str, range(12))) >= set(reported)
        assert len(reported) in (11, 12)
    else:
        assert reported == sorted(map(str, range(12)))
