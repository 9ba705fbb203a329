"""tools/table1.py: the commands of a row, real and imitated runs to a table, stops and failures."""
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, drifting, fails, read_json

import pretrain
from common.splits import load_split
from common.toy import TOY_CLASSES, VIDEOS
from tools import table1

TINY = dict(
    videos=16, shrink="16", clips="--arch r3d18_narrow --frames 2 --size 16",
    batch_size=4, epochs=1, warmup_epochs=0, pretrain="",
    finetune="--batch-size 4 --epochs 1 --warmup-epochs 0 --windows 1 --crops centre")
IMITATION = """
import json
import os
import signal
import sys
from pathlib import Path

flags = dict(zip(sys.argv, sys.argv[1:]))
script, out = Path(sys.argv[0]).stem, Path(flags["--out"])
if os.environ.get("FAIL") == f"{script} {out.name}":
    sys.exit("no checkpoint")
if os.environ.get("STOP") == script:
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()                                              # until SIGTERM comes here, too
figure = dict(pretrain=0, linear_probe=0.2, retrieval=0.4)[script]
figure += 0.02 * int(flags["--seed"]) + 0.1 * ("auto" in sys.argv)
top1 = dict(checkpoint=figure, random=figure / 2)
recall = {name: {"R@1": x, "R@5": x + 0.1} for name, x in (top1 | dict(chance=0.1)).items()}
out.mkdir(parents=True, exist_ok=True)
if script == "pretrain":
    log = [dict(psi_nearest=n / 100 + figure, psi_chance=0.05) for n in range(12)]
    (out / "log.jsonl").write_text("\\n".join(map(json.dumps, log)))
(out / "tmp").write_text(json.dumps(dict(top1=top1, recall=recall, chance=0.125)))
(out / "tmp").replace(out / f"{script}-toy.json")               # the table may be read meanwhile
"""


def commands(words, row):
    """Of a run with seed 7 -> [(name of the script, its arguments), ...]"""
    found = [argv for argv, _ in table1.steps(table1.parse_args(words), row, 7)]
    return [(Path(script).stem, more) for _, script, *more in found]


def changed(words, given):
    """What words change in pretrain.py's arguments; videos and epochs: by which factor."""
    args, default = (vars(pretrain.parse_args(more)) for more in ([*given, *words], given))
    factors = {name: args[name] / default[name] for name in
               ("batch_size", "epochs", "warmup_epochs") if args[name] != default[name]}
    return {name: value for name, value in args.items() if value != default[name]} | factors


@pytest.mark.parametrize("row", sorted(table1.ROWS.keys() - {"random", "distinct-aux"}))
def test_each_row_is_pre_trained_with_the_flags_that_the_docs_give_it(row):
    listed = (ROOT / "docs/results.md").read_text()
    flags = re.search(rf"`\$P \$U --out runs/{row}( [^`]*)?`", listed)[1] or ""
    given = "--seed", "7", "--workers", "0", "--out", f"runs/{row}-7"
    ours = changed(commands(["--out", "runs"], row)[0][1], given)
    assert ours == changed(flags.split(), ["--dataset", "ucf101", "--data", "videos"])


@pytest.mark.parametrize("words, videos", [
    ([], 320), (["--large-batch"], 1920),
    (["--data", "videos"], 743), (["--data", "videos", "--large-batch"], 743)])
def test_all_rows_see_as_many_clips_per_step_in_as_many_steps(words, videos):
    seen = []
    for row in table1.ROWS.keys() - {"random"}:
        args = pretrain.parse_args(commands(words, row)[0][1])
        steps = videos // 2 // (args.batch_size // 2)           # of an epoch; its rest is dropped
        clips = args.batch_size * (4 if "distinct" in args.losses else 2)
        seen.append((clips, steps * args.epochs, steps * args.warmup_epochs))
    assert all(each == pytest.approx(seen[0], rel=0.002) for each in seen)


@pytest.mark.parametrize("words", [[], ["--data", "videos"]])
def test_a_large_batch_is_the_papers(words):
    ours = pretrain.parse_args(commands([*words, "--large-batch"], "k")[0][1])
    papers = pretrain.parse_args(["--dataset", "ucf101", "--data", "videos"])
    assert ours.batch_size == papers.batch_size


def test_a_large_batch_trains_on_new_toy_videos_of_every_class(tmp_path, monkeypatch):
    drawn = []

    def imitated_video(cls, rng):
        drawn.append((cls, rng.random()))
        return drifting(2)

    monkeypatch.setattr(table1, "toy_video", imitated_video)
    monkeypatch.setitem(table1.TOY_192, "videos", 40)
    args = table1.parse_args(["--large-batch", "--out", str(tmp_path)])
    for _ in range(2):                                          # the second time, they are there
        table1.make_more_toy(args)
    videos = load_split("folder", pretrain.parse_args(
        commands(["--large-batch", "--out", str(tmp_path)], "k")[0][1]).data).files
    assert len(videos) == len(set(drawn)) == 40
    assert {cls for cls, _ in drawn} == set(TOY_CLASSES)
    of_toy = {np.random.default_rng(seed).random() for seed in range(len(VIDEOS))}
    assert not of_toy & {number for _, number in drawn}


def test_a_large_batch_is_evaluated_on_the_toy_set():
    for script, words in commands(["--large-batch"], "k")[1:]:
        assert importlib.import_module(script).parse_args(words).data == "toy-videos"


def test_all_scripts_get_the_seed_and_one_shape_of_clips():
    parsed = [importlib.import_module(script).parse_args(words)
              for script, words in commands(["--data", "videos"], "k")]
    assert [vars(args).get("C") for args in parsed] == [None, 1e-3, "auto", None, None]
    assert {args.seed for args in parsed} == {7}
    assert len({(args.arch, args.frames, args.size) for args in parsed}) == 1


def test_the_table_of_a_real_run_on_ucf101_8_alone(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table1, "CPU", TINY)
    monkeypatch.setattr(table1, "UCF101_8", ("Climb", "Dive"))  # without Bend
    data = str(world / "UCF-101")
    words = ["--data", data, "--out", str(tmp_path), "--rows", "k", "--seeds", "7"]
    table1.make_ucf101_8(table1.parse_args(words))
    assert {path.parent.name for path in tmp_path.glob("UCF-101/*/*.avi")} == {"Climb", "Dive"}
    for script, argv in commands(words, "k"):
        importlib.import_module(script).main(argv)
    table1.main(words)
    printed = capsys.readouterr().out
    written = (tmp_path / "table.md").read_text("utf-8")
    assert "0 of 1 runs to do" in printed and printed.endswith(written)
    names = "linear_probe-ucf101", "auto/linear_probe-ucf101", "finetune-ucf101-4x"
    svm, auto, tuned = (
        read_json(tmp_path / f"k-7/{name}.json")["top1"]["checkpoint"] for name in names)
    recall = read_json(tmp_path / "k-7/retrieval-ucf101.json")["recall"]["checkpoint"]
    figures = svm, auto, recall["R@1"], recall["R@5"], tuned
    assert f"| k | 1 | {' | '.join(f'{100 * x:.1f}' for x in figures)} |" in printed
    assert fails(table1.main, [*words, "--epochs", "2"]).endswith("give another --out")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that calls table1; scripts that write figures at once stand for the project's."""
    for name in ("pretrain", "linear_probe", "retrieval"):
        (tmp_path / f"{name}.py").write_text(IMITATION)
    monkeypatch.setattr(table1, "ROOT", tmp_path)
    monkeypatch.setattr(table1, "make_toy", lambda root: None)
    monkeypatch.chdir(tmp_path)
    return lambda words: table1.main([*words, "--out", "out", "--jobs", "2"])


def test_the_table_has_means_and_half_ranges_of_the_seeds(run):
    run(["--rows", "f", "random", "--seeds", "0", "1", "4"])
    assert Path("out/table.md").read_text().splitlines()[2:] == [
        "| random | 3 | 11.7 ± 2.0 | 16.7 ± 2.0 | 21.7 ± 2.0 | 31.7 ± 2.0 |  |",
        "| f | 3 | 23.3 ± 4.0 | 33.3 ± 4.0 | 43.3 ± 4.0 | 53.3 ± 4.0 |  |",
        "| chance | | 12.5 | 12.5 | 10.0 | 20.0 |  |",
        "",
        "| row (chance) | speed_acc | direction_acc | order_acc | psi_nearest | phi_nearest |",
        "|---|---|---|---|---|---|",
        "| f |  |  |  | 9.8 ± 4.0 (5.0) |  |"]                # of the last ten lines


def test_a_run_that_fails_is_named_and_the_others_finish(run, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "retrieval f-1")
    words = "--rows", "f", "k", "--seeds", "0", "1"
    assert fails(run, words).endswith("1 of 4 runs failed: f-1")
    assert "f-1 failed: no checkpoint" in capsys.readouterr().err
    table = Path("out/table.md").read_text()
    assert "| f | 2 | 21.0 ± 1.0 | 31.0 ± 1.0 | 40.0 | 50.0 |  |" in table
    assert "| k | 2 | 21.0 ± 1.0 | 31.0 ± 1.0 | 41.0 ± 1.0 | 51.0 ± 1.0 |  |" in table


def test_the_same_command_resumes_after_an_interruption(run, monkeypatch):
    words = ["--rows", "k", "--seeds", "0"]
    monkeypatch.setenv("STOP", "retrieval")
    assert fails(run, words).endswith("interrupted")
    monkeypatch.delenv("STOP")
    run(words)
    scripts = re.findall(r"^\$ .*?(\w+)\.py ", Path("out/k-0.txt").read_text(), re.MULTILINE)
    assert scripts == ["pretrain", "linear_probe", "linear_probe", "retrieval", "retrieval"]
