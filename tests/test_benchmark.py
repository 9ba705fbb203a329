"""tools/benchmark.py on a CPU: what it measures, and what it concludes from it."""
import re
import time

import pytest
import torch
from conftest import CPU, drifting, read_json, write_video

from tools import benchmark


def test_a_rehearsal_measures_all_parts_and_concludes(tmp_path, capsys):
    for n in range(4):
        write_video(tmp_path / f"videos/{n}.avi", drifting(120, seed=n))
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


@pytest.mark.parametrize("loading, computing, expected", [(0.02, 0.0, 1.0), (0.01, 0.03, 0.25)])
def test_rate_and_waiting_are_those_of_a_loader_and_a_step_of_known_times(
        loading, computing, expected):
    def batches():
        while True:
            time.sleep(loading)
            yield dict(video=torch.arange(3))

    rate, waiting, _ = benchmark.measure(batches(), 1, 10, lambda _: time.sleep(computing), CPU)
    assert 0.2 < rate / (6 / (loading + computing)) <= 1         # sleep() may take longer
    assert waiting == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("step, both, expected", [
    (400, {0: 90, 1: 60, 2: 100}, "loader-bound: .* about 8 workers"),
    (100, {0: 50, 1: 80, 4: 95, 8: 96}, "step-bound: .* 4 workers would do")])
def test_the_verdict_follows_from_the_rates(step, both, expected):
    assert re.match(expected, benchmark.verdict(step, both))


def test_the_papers_run_takes_as_long_as_docs_speed_says():
    assert benchmark.paper_hours(200) == pytest.approx(10.45, abs=0.01)
