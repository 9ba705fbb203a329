"""tools/benchmark.py on a CPU: what it measures, and what it concludes from it."""
import re
from argparse import Namespace

import pytest
import torch
from conftest import CPU, drifting, read_json, write_video

from tools import benchmark


def test_a_rehearsal_measures_all_parts_and_concludes(tmp_path, capsys):
    for n in range(4):
        write_video(tmp_path / f"videos/{n}.avi", drifting(60, seed=n))
    benchmark.main(["--quick", "--videos", str(tmp_path / "videos"), "--batch-sizes", "4", "8",
                    "--out", str(tmp_path / "benchmark.json")])
    result = read_json(tmp_path / "benchmark.json")
    rows = result["steps"] | result["workers"]
    rates = {name: row["clips_per_s"] for name, row in rows.items()}
    assert list(rates) == [
        "r3d18_narrow, 8 x 24², 4 videos, off", "r3d18_narrow, 8 x 24², 8 videos, off", "step",
        "loader, 0 workers", "both, 0 workers", "loader, 1 workers", "both, 1 workers"]
    both = {n: rates[f"both, {n} workers"] for n in (0, 1)}
    assert result["paper_hours"] == benchmark.paper_hours(max(both.values()))
    assert result["verdict"] == benchmark.verdict(rates["step"], both)
    assert result["verdict"] in capsys.readouterr().out


def test_rate_and_waiting_are_those_of_a_loader_and_a_step_of_known_times(monkeypatch):
    def spend(seconds):
        clock.append(clock[-1] + seconds)

    def batches():
        while True:
            spend(1)
            yield dict(video=torch.arange(3))
    clock = [0]
    monkeypatch.setattr(benchmark, "time", Namespace(perf_counter=lambda: clock[-1]))
    rate, waiting, _ = benchmark.measure(batches(), 1, 10, lambda _: spend(3), CPU)
    assert (rate, waiting) == (2 * 3 / 4, 1 / 4)


@pytest.mark.parametrize("step, both, expected", [
    (400, {0: 90, 1: 60, 2: 100}, "loader-bound: .* about 8 workers"),
    (100, {0: 50, 1: 80, 4: 95, 8: 96}, "step-bound: .* 4 workers would do")])
def test_the_verdict_follows_from_the_rates(step, both, expected):
    assert re.match(expected, benchmark.verdict(step, both))


def test_the_papers_run_takes_ten_hours_at_200_clips_a_second():
    assert benchmark.paper_hours(200) == pytest.approx(10.45, abs=0.01)
