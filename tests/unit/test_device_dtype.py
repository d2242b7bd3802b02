"""Where a model runs and in which dtype: what was asked for, what is stored, what a CPU is slow at."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvid import cli
from cogvid.weights import placement
from cogvid.weights.load import load_transformer, load_vae
from cogvid.weights.placement import resolve_device, resolve_dtype


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("float32", torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (None, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_is_what_was_asked_for_or_stored(
    monkeypatch: pytest.MonkeyPatch, asked: Any, stored: torch.dtype, expected: torch.dtype
) -> None:
    monkeypatch.setattr(placement, "cpu_has_bfloat16", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_dtype(asked, torch.device("cpu"), stored) is expected


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("fast", "words"), [(True, "bfloat16 instead$"), (False, "float32 .*twice the memory$")])
@pytest.mark.parametrize(("asked", "stored"), [("float16", torch.float32), (None, torch.float16)])
def test_float16_is_not_run_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, stored: torch.dtype, fast: bool, words: str
) -> None:
    monkeypatch.setattr(placement, "cpu_has_bfloat16", lambda: fast)
    with pytest.warns(UserWarning, match=rf"^float16 arithmetic is not run on a CPU: running in {words}"):
        assert resolve_dtype(asked, CPU, stored) is (torch.bfloat16 if fast else torch.float32)
    assert resolve_dtype(asked, GPU, stored) is torch.float16


def test_bfloat16_that_nobody_asked_for_is_not_run_on_a_cpu_that_is_slow_at_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "cpu_has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match=r"^bfloat16 is slow on this CPU.*running in float32.*twice the memory"):
        assert resolve_dtype(None, CPU, torch.bfloat16) is torch.float32
    for asked in ("bfloat16", torch.bfloat16):
        placement._warn_of_slow_bfloat16.cache_clear()
        with pytest.warns(UserWarning, match=r"^bfloat16 is slow on this CPU, .*; float32 is faster$"):
            assert resolve_dtype(asked, CPU, torch.float32) is torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_dtype(None, GPU, torch.bfloat16) is torch.bfloat16
        assert resolve_dtype(None, CPU, torch.float32) is torch.float32


def test_slowness_is_said_once_for_all_the_parts_of_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(placement, "cpu_has_bfloat16", lambda: False)
    placement._warn_of_slow_bfloat16.cache_clear()
    options = ["--num-inference-steps", "1", "--num-frames", "1", "--dtype", "bfloat16"]
    assert cli.main(["generate", "the red circle moves right", "-o", str(tmp_path / "x.mp4"), *options]) == 0
    assert capsys.readouterr().err.count("bfloat16 is slow on this CPU") == 1


ASK = "import warnings; from cogvid.weights.placement import cpu_has_bfloat16; print(cpu_has_bfloat16())"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the limit is of x86 instructions")
@pytest.mark.slow
def test_limits_of_the_environment_count_as_the_cpu() -> None:
    for limit in ("SSE41", "AVX2"):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
        done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"


def test_a_pytorch_that_cannot_be_asked_is_taken_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement.cpu_has_bfloat16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert placement.cpu_has_bfloat16() is False


@pytest.mark.parametrize("dtype", ["fp16", "int8", "", torch.float64, 16])
def test_unknown_dtypes_are_refused_with_the_known_ones(pristine: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"^dtype: got .*, want one of float32, float16, bfloat16$"):
        load_transformer(pristine, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "meta", "cuda:99"])
def test_unknown_devices_are_refused(pristine: Path, device: str) -> None:
    with pytest.raises(ValueError, match=r"^device: got "):
        load_vae(pristine, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^device: got 'cuda', want one of the 0 CUDA GPUs here$"):
        resolve_device("cuda")
