"""Measure the peak memory of every mode that saves some, against diffusers in the same mode, on a CPU.

    python scripts/bench_memory.py                     # the table of MEMORY.md
    python scripts/bench_memory.py --size toy          # seconds; keeps this script from rotting

Each run is a process of its own, which loads a checkpoint and makes a video. Its figure is VmHWM, the resident set with
the pages of mapped weights that were read, at its peak. The two providers take turns. Checkpoints are random, fp32 in
the file and in the run: one with T5 and transformer of 5B's width and few layers and a small VAE, one with the official
VAE and little else. What a provider refuses is written as such. Only a CPU is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import measure
from cogvid.config import CONFIGS
from cogvid.models.quantize import CONFIGS as TORCHAO
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.weights.hub import PACKS
from cogvid.weights.load import save_transformer, save_vae

# (checkpoint, options of `load`, what is called in diffusers)
ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("weights", {}, ""),
    ("weights", {"offload": "model"}, "enable_model_cpu_offload"),
    ("weights", {"offload": "block"}, "enable_sequential_cpu_offload"),
    ("weights", {"offload": "block"}, "enable_group_offload"),
    ("weights", {"quantize": "int8"}, "torchao"),
    ("weights", {"quantize": "int8-dynamic"}, "torchao"),
    ("weights", {"quantize": "fp8"}, "torchao"),
    ("weights", {"quantize": "fp8-storage"}, "enable_layerwise_casting"),
    ("weights", {"quantize": "int8", "offload": "model"}, ""),
    ("VAE", {}, ""),
    ("VAE", {"vae_tiling": True}, "enable_tiling"),
    ("VAE", {"vae_tiling": True, "offload": "block"}, ""),
]
VIDEO = {"weights": {"height": 64, "width": 64, "num_frames": 9}, "VAE": {"height": 480, "width": 720, "num_frames": 1}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="reduced", choices=["reduced", "toy"])
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))), metavar="N", help="from 0")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(run(**json.loads(args.one))))
        return
    command = " ".join(["python scripts/bench_memory.py", *(sys.argv[1:] if argv is None else argv)])
    print("| checkpoint | mode | cogvid MB | cogvid s | in diffusers | diffusers MB | diffusers s |")
    print("|---|---|--:|--:|---|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        made = {which: write(Path(folder, which), which, toy=args.size == "toy") for which in VIDEO}
        for which, options, theirs in [ROWS[i] for i in args.rows]:
            given = {"directory": str(made[which]), "video": VIDEO[which], "options": options}
            ours = measured(provider="cogvid", **given)
            other = measured(provider="diffusers", call=theirs, **given) if theirs or not options else {}
            mode = ", ".join(f"{k} {v}" if v is not True else k for k, v in options.items()) or "resident"
            print(f"| {which} | {mode} | {cells(ours)} | {theirs} | {cells(other)} |", flush=True)
    print(f"\n`{command}`, {measure.caption(measure.header(torch.device('cpu'), command))}.")


def cells(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"refused: {found['error']} | "
    return f"{found['peak'] / 1e6:.0f} | {found['seconds']:.1f}" if found else " | "


def measured(**job: Any) -> dict[str, Any]:
    """Run one job in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.match(r"\w*(\.\w+)*Error: ", line)]
        return {"error": (errors or [f"exit status {done.returncode}"])[-1][:120].replace("|", "/")}
    return json.loads(done.stdout.splitlines()[-1])


def run(
    provider: str, directory: str, video: dict[str, int], options: dict[str, Any], call: str = ""
) -> dict[str, Any]:
    begun = time.perf_counter()
    torch.manual_seed(0)
    if provider == "cogvid":
        import cogvid

        pipe: Any = cogvid.load(directory, device="cpu", dtype="float32", **options)
        pipe("x", **video, num_inference_steps=2, seed=1, output_type="uint8", progress=False)
    else:
        run_diffusers(directory, video, options, call)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return {"peak": peak, "seconds": time.perf_counter() - begun}


def run_diffusers(directory: str, video: dict[str, int], options: dict[str, Any], call: str) -> None:
    from diffusers import CogVideoXPipeline

    pipe: Any = CogVideoXPipeline.from_pretrained(directory, torch_dtype=torch.float32)
    cpu = torch.device("cpu")
    if call in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        getattr(pipe, call)(device=cpu)
    elif call == "enable_group_offload":
        how: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        with tempfile.TemporaryDirectory() as folder:
            pipe.transformer.enable_group_offload(cpu, cpu, offload_to_disk_path=folder, **how)
            pipe("x", **video, num_inference_steps=2, guidance_scale=6.0, output_type="np")
        return
    elif call == "enable_tiling":
        pipe.vae.enable_tiling()
    elif call == "enable_layerwise_casting":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    elif call == "torchao":
        import torchao.quantization as quantization  # pyright: ignore[reportMissingImports]

        config = getattr(quantization, TORCHAO[options["quantize"]])
        names = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
        quantization.quantize_(pipe.transformer, config(), filter_fn=lambda _, name: name.endswith(names))
        quantization.quantize_(pipe.text_encoder, config())
    pipe("x", **video, num_inference_steps=2, guidance_scale=6.0, output_type="np")


def write(folder: Path, which: str, *, toy: bool) -> Path:
    """Write a random checkpoint in the official layout."""
    from transformers import T5Config, T5EncoderModel

    folder.mkdir(parents=True)
    pack = PACKS / "tiny-t2v"
    for part in ("scheduler", "tokenizer", "model_index.json", *([] if which == "weights" else ["text_encoder"])):
        (folder / part).symlink_to((pack / part).resolve())
    known = json.loads((pack / "text_encoder" / "config.json").read_text())
    heads, layers, width = (2, 2, known["d_model"]) if toy or which == "VAE" else (48, 3, 4096)
    config = dataclasses.replace(
        CONFIGS["cogvideox-5b"].transformer,
        num_attention_heads=heads,
        num_layers=layers,
        text_embed_dim=width,
        max_text_seq_length=16,
        sample_height=8,
        sample_width=8,
        sample_frames=9,
    )
    save_transformer(Transformer(config), folder / "transformer")
    save_vae(VAE(CONFIGS["tiny-t2v" if toy or which == "weights" else "cogvideox-5b"].vae), folder / "vae")
    if which == "weights":
        wide = {} if toy else {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 2}
        T5EncoderModel(T5Config(**{**known, **wide})).save_pretrained(folder / "text_encoder")
    return folder


if __name__ == "__main__":
    main()
