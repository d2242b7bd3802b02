"""The model on paper of several devices: its limits, its bytes, its page, and the script that measures beside it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench_parallel
import scaling_model as paper
from cogvid.parallel import costs as traffic
from cogvid.run.costs import tokens
from cogvid.run.plan_devices import rank_parts
from cogvid.weights.parallel_option import Parallel, best_split
from scaling_tables import PAGE, computed, put

ROOT = Path(__file__).parents[2]
EVEN = [
    Parallel(1, 1, 1),
    Parallel(2, 1, 1),
    Parallel(2, 8, 1),
    Parallel(2, 1, 4),
    Parallel(2, 8, 2),
    Parallel(1, 16, 1),
]
CONFIG, SIZE = paper.model_of("cogvideox-5b")  # 17,776 tokens, which 16 divides, and 48 heads


@pytest.mark.parametrize("split", EVEN, ids=str)
def test_where_bytes_cost_nothing_a_step_is_its_flops_over_devices_and_rates(split: Parallel) -> None:
    step, alone = (
        paper.step_time(CONFIG, SIZE, split, paper.infinite()),
        rank_parts(CONFIG, Parallel(), 0, 2, 226, SIZE),
    )
    expected = alone["linears"] / paper.H200.linears + alone["attention"] / paper.H200.attention
    # The modulation, a thousandth of a product of all tokens, is not divided.
    assert step.linears + step.attention == pytest.approx(expected / split.devices, rel=1e-3)
    assert step.whole == alone["whole"] / paper.H200.linears
    assert step.total == step.linears + step.attention + step.whole
    assert paper.step_time(CONFIG, SIZE, split).total >= step.total


@pytest.mark.parametrize("split", EVEN, ids=str)
def test_bytes_are_those_of_the_formulas(split: Parallel) -> None:
    step, total = paper.step_time(CONFIG, SIZE, split), 226 + tokens(CONFIG, SIZE)
    sent = {
        CONFIG.num_layers * traffic.bytes_of_block(split, rank, 2, total, 48, 64, 2).sent
        + traffic.bytes_of_gather(split, rank, 2, total, 3072, 2).sent
        for rank in range(split.devices)
    }
    assert step.sent in sent
    if split == Parallel(1, 16, 1):  # as the page says: 4 (U - 1) / U^2 of [B, N, D]
        block = traffic.bytes_of_block(split, 0, 2, total, 48, 64, 2).sent
        assert block == 4 * 15 * 2 * total * 3072 * 2 // 256


@pytest.mark.parametrize("name", paper.MODELS)
def test_no_split_is_faster_than_the_best_and_more_devices_are_not_slower(name: str) -> None:
    config, size = paper.model_of(name)
    times = []
    for devices in paper.counts():
        split, step = paper.best(config, size, devices)
        times.append(step.total)
        assert split.devices == devices
        for sizes in itertools.product((1, 2), paper.counts(), paper.counts()):
            other = Parallel(*sizes)
            if other.devices == devices and other.ulysses <= config.num_attention_heads:
                assert paper.step_time(config, size, other).total >= step.total, other
        rule = best_split(devices, config.num_attention_heads, guided=True, per_node=min(8, devices))
        assert paper.step_time(config, size, rule).total < 1.2 * step.total
    assert times == sorted(times, reverse=True)


def test_attention_hides_a_ring_from_the_crossover_on() -> None:
    hardware = dataclasses.replace(paper.H200, near_latency=0.0, far_latency=0.0)
    for devices, far in ((8, False), (64, True)):
        enough = paper.hidden_from(hardware, far=far)
        split = Parallel(ring=devices)
        for share, hidden in ((1.05, True), (0.95, False)):
            video = int(enough * share) * devices
            size = (1, 2, 2 * (video - video % devices - 226))
            step = paper.step_time(dataclasses.replace(CONFIG, num_layers=1), size, split, hardware)
            assert (step.hidden == pytest.approx(step.ring, rel=1e-9)) is hidden
            assert step.hidden <= step.ring


def test_links_between_nodes_are_the_slow_ones() -> None:
    inside, across = (paper.step_time(CONFIG, SIZE, Parallel(ulysses=n)) for n in (8, 16))
    assert across.ulysses > inside.ulysses
    one_node = dataclasses.replace(paper.H200, per_node=64)
    assert paper.step_time(CONFIG, SIZE, Parallel(ulysses=16), one_node).ulysses < inside.ulysses
    assert paper.step_time(CONFIG, SIZE, Parallel(ring=16)).ring > paper.step_time(CONFIG, SIZE, Parallel(ring=8)).ring


def test_the_page_has_what_is_computed() -> None:
    text = PAGE.read_text()
    assert put(text, "computed", computed()) == text, "python scripts/bench_parallel.py --paper --write"


def test_a_plain_check_predicts_and_measures(capfd: pytest.CaptureFixture[str]) -> None:
    bench_parallel.main(["--check", "cogvideox-2b", "--layers", "0", "--latents", "1", "2", "2"])
    rates, predicted, last = capfd.readouterr().out.splitlines()[1:]
    assert rates.startswith("rates: ")
    assert predicted.startswith("predicted, ms: linears 0, attention 0, elementwise 0, whole ")
    assert "measured / predicted" in last


@pytest.mark.slow  # processes that are started
@pytest.mark.parametrize("parts", ["transformer", "vae"])
def test_the_benchmark_measures_and_counts(tmp_path: Path, parts: str) -> None:
    command = [sys.executable, "scripts/bench_parallel.py", "--size", "toy", "--parts", parts, "--processes", "1", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["processes"] for row in found["rows"]} == {1, 2}
    assert f"**{parts}, weak scaling**" in done.stdout
    for row in found["rows"]:
        assert row["sent"] == 0 if row["processes"] == 1 else row["sent"] > 0
        assert row["formula"] in (None, row["sent"])
        assert row["balance"] >= 1
    again = [*command[:2], "--measured", str(tmp_path / "found.json")]
    assert done.stdout == subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=True).stdout
