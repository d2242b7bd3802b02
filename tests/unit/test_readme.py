"""What the README, and the pages that it leads to, show runs as it stands there."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import cogvid
from cogvid.cli import main
from cogvid.ops import BlockContext, Ops, Shard
from file_table import counted, statements
from tests.checkpoints import write_variant
from tests.llm_server import LLMServer

ROOT = Path(__file__).parents[2]
PAGES = {  # in the order in which a reader gets to them
    name: (ROOT / name).read_text()
    for name in (
        "README.md", "cogvid/README.md", "cogvid/run/README.md", "tests/README.md", "tests/parity/README.md",
        "tests/parity/DIFFERENCES.md", "scripts/SPEED.md", "scripts/MEMORY.md",
    )
}  # fmt: skip
README, EXAMPLES = PAGES["README.md"], PAGES["cogvid/README.md"]


def blocks(language: str) -> list[str]:
    return [block for page in PAGES.values() for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]


def test_the_python_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    registries = [(registry, dict(registry)) for registry in (cogvid.SAMPLERS, cogvid.GUIDANCE)]
    try:
        for block in blocks("python"):
            exec(block.replace("scripts/demo", str(ROOT / "scripts" / "demo")), namespace)
    finally:
        for registry, before in registries:  # examples add to them
            registry.clear()
            registry.update(before)
    frames, fps = cogvid.read_video(tmp_path / "out.mp4")
    assert frames.shape == (17, 64, 64, 3)
    assert fps == cogvid.CONFIGS["tiny-i2v"].fps
    check_near_frames(namespace["near_frames"])


def check_near_frames(near_frames: Any) -> None:
    """The sparse attention of the examples equals attention with a mask."""
    text, (frames, height, width) = 5, (4, 2, 3)
    size = text + frames * height * width
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, size, 2, 8, generator=generator)
    context = BlockContext(torch.zeros(2, 4), None, text, (frames, height, width), Shard(0, size, size), 1, 5)
    frame = torch.arange(frames).repeat_interleave(height * width)
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[text:, text:] = (frame[:, None] - frame).abs() <= 1
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(near_frames(q, k, v, context), expected)
    unmasked = Ops.torch().attention(q, k, v, context)
    assert not torch.allclose(unmasked, expected, atol=1e-2)
    assert torch.equal(near_frames(q, k, v, context.at(0)), unmasked)


FEATURES = re.findall(
    r"^\| ([^|]+) \| `([^`]+)` \|", README[README.index("## Features") : README.index("## What is")], re.M
)


@pytest.fixture(scope="module")
def out_mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first example of the README writes."""
    path = tmp_path_factory.mktemp("features") / "out.mp4"
    return Path(cogvid.export_to_video(torch.zeros(17, 64, 64, 3, dtype=torch.uint8), path, fps=8) or path)


STAND_INS = {  # for models that are not shipped, a pack with as many channels, in a directory of their name
    "feizhengcong/CogvideoX-Interpolation": ("tiny-i2v", None, 0),
    "alibaba-pai/CogVideoX-Fun-V1.1-5b-Pose": ("tiny-t2v", "CogVideoXFunControlPipeline", 16),
    "alibaba-pai/CogVideoX-Fun-V1.1-5b-InP": ("tiny-t2v", "CogVideoXFunInpaintPipeline", 17),
}


def _case(feature: str, line: str) -> Any:
    return pytest.param(feature, line, id=feature, marks=pytest.mark.slow if "--ray" in line else ())  # Ray starts long


@pytest.mark.parametrize(("feature", "line"), [_case(*each) for each in FEATURES])
def test_the_line_of_a_feature_runs(
    feature: str, line: str, out_mp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: LLMServer
) -> None:
    """With two steps, which are enough to run all that it names, and with a server in OPENAI_BASE_URL."""
    if "--quantize int8" in line:
        pytest.importorskip("torchao", reason="needs the extra quant")
    if "--ray" in line:
        pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    shutil.copy(out_mp4, tmp_path / "out.mp4")
    for repo, (pack, class_name, extra) in STAND_INS.items():
        if repo in line:
            write_variant(tmp_path / repo, pack, class_name, extra)
    if line.startswith("cogvid "):
        for command in os.path.expandvars(line).split(" && "):
            arguments = shlex.split(command)[1:]
            makes = arguments[0] in ("generate", "batch") and "--resume" not in arguments
            assert main([*arguments, *(["--num-inference-steps", "2"] if makes else [])]) == 0, feature
        assert len(llm.paths) == line.count("enhance ")
        return
    if line.startswith("python "):
        subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True)
        return
    pipe = cogvid.load("tiny-i2v")
    pipe.model = dataclasses.replace(pipe.model, num_inference_steps=2)
    image = cogvid.load_image("scripts/demo.png")
    exec(line, {"cogvid": cogvid, "pipe": pipe, "image": image, "prompt": "the red circle moves right"})


@pytest.mark.parametrize("block", [block for block in blocks("bash") if re.search("^cogvid ", block, re.MULTILINE)])
def test_the_commands_are_understood(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: LLMServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of a block run one after the other, with a server in OPENAI_BASE_URL."""
    monkeypatch.chdir(ROOT)
    made = set(re.findall(r" -o (\S+)", block))
    for line in block.splitlines():
        if not line.startswith("cogvid "):
            continue
        words = shlex.split(os.path.expandvars(line.split("#")[0]))
        pairs = itertools.pairwise(words)
        arguments = [str(tmp_path / a) if a in made or a.endswith(".mp4") else a for _, a in pairs]
        if arguments[0] == "ui":  # it would serve until a signal comes
            assert main([*arguments, "--port=-1"]) == 2
            assert "port: got -1" in capsys.readouterr().err
        elif any(
            "/CogVideoX" in a for a in arguments
        ):  # official weights: refused before a byte is fetched, but parsed
            assert main([*arguments, "--local-files-only", "--guidance-scale", "nan"]) == 2
        else:
            assert main(arguments) == 0
    assert len(llm.paths) == len(re.findall("^cogvid .*enhance ", block, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_the_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor


def test_the_file_table_has_every_file() -> None:
    rows = re.findall(r"^\| \[`([^`]+)`\]\(cogvid/([^)]+\.py)\) \| \d+ \|", README, re.MULTILINE)
    assert all(shown == target for shown, target in rows)
    files = [path.relative_to(ROOT / "cogvid").as_posix() for path in (ROOT / "cogvid").rglob("*.py")]
    assert sorted(shown for shown, _ in rows) == sorted(files)


def test_the_table_of_operations_has_each_one() -> None:
    table = EXAMPLES[EXAMPLES.index("## Where each operation runs") :].split("\n\n")[1]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {field.name for field in dataclasses.fields(Ops)}


def test_the_line_counts_are_right() -> None:
    """If this fails: `python scripts/file_table.py`."""
    assert counted(README) == README
    assert counted(EXAMPLES) == EXAMPLES
    assert len(re.findall(r"^\*\*.+\*\* \(\d+ lines\)", EXAMPLES, re.MULTILINE)) == 7
    assert len(re.findall(r" lines in all:\s", README)) == 1


def test_a_wrong_line_count_is_noticed() -> None:
    for page, count in (
        (README, r"\.py\) \| (\d+) \|"),
        (README, r"/`\]\([^)]+\) \| (\d+) \|"),
        (README, r"([\d,]+) lines in all"),
        (EXAMPLES, r"\*\* \((\d+) lines\)"),
    ):
        found = list(re.finditer(count, page))
        assert found, count
        for match in found:
            wrong = page[: match.start(1)] + "7" + page[match.end(1) :]
            assert counted(wrong) == page


def test_lines_of_an_example_are_counted() -> None:
    code = "import a\nfrom b import c\n\ndef f(x):  # why\n    import d\n\n    return x\n"
    assert statements(code) == 3
