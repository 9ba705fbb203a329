"""tools/table1.py: the commands of a row, real and imitated runs to a table, stops and failures."""
import importlib
import re
import time
from pathlib import Path

import pytest
from conftest import ROOT, fails, read_json

import pretrain
from common.video import probe
from tools import pyplot, table1

TINY = dict(
    shrink="16", clips="--arch r3d18_narrow --frames 2 --size 16",
    pretrain="--batch-size 4 --epochs 1 --warmup-epochs 0",
    finetune="--batch-size 4 --epochs 1 --warmup-epochs 0 --windows 1 --crops centre")
EVALUATIONS = ["linear_probe", "linear_probe", "retrieval"]
IMITATION = """
import json
import os
import signal
import sys
import time
from pathlib import Path

def flag(name):
    return sys.argv[sys.argv.index(name) + 1]

script, out = Path(sys.argv[0]).stem, Path(flag("--out"))
exec(os.environ.get("FAULT", ""))
figure = dict(pretrain=0, linear_probe=0.2, retrieval=0.4, finetune=0.6)[script]
figure += 0.02 * int(flag("--seed")) + 0.1 * ("auto" in sys.argv)
top1 = dict(checkpoint=figure, random=figure / 2)
recall = {name: {"R@1": x, "R@5": x + 0.1} for name, x in (top1 | dict(chance=0.1)).items()}
name = f"{script}-{flag('--dataset')}" + "-4x" * (script == "finetune")
out.mkdir(parents=True, exist_ok=True)
(out / "tmp").write_text(json.dumps(dict(top1=top1, recall=recall, chance=0.125)))
(out / "tmp").replace(out / f"{name}.json")                     # the table may be read meanwhile
"""


def commands(words, row):
    """Of a run with seed 7 -> [(name of the script, its arguments), ...]"""
    found = [argv for argv, _ in table1.steps(table1.parse_args(words), row, 7)]
    return [(Path(script).stem, more) for _, script, *more in found]


# ---- Commands ----

@pytest.mark.parametrize("row", sorted(table1.ROWS.keys() - {"random"}))
def test_each_row_is_pre_trained_with_the_flags_that_the_docs_give_it(row):
    name = "d192" if row == "distinct" else row
    listed = (ROOT / "docs/results.md").read_text()
    flags = re.search(rf"`\$P \$U --out runs/{name}( [^`]*)?`", listed)[1] or ""
    ours = pretrain.parse_args(commands(["--out", "runs"], row)[0][1])
    theirs = [*flags.split(), "--data", "toy-videos", "--seed", "7", "--out", f"runs/{row}-7"]
    assert vars(ours) == vars(pretrain.parse_args(theirs)) | dict(workers=ours.workers)


@pytest.mark.parametrize("settings", ["CPU", "GPU"])
def test_all_scripts_get_the_seed_the_shape_of_clips_and_fewer_epochs(settings, monkeypatch):
    monkeypatch.setattr(table1, "CPU", getattr(table1, settings))
    found = commands(["--data", "videos", "--epochs", "3"], "k")
    assert [script for script, _ in found] == ["pretrain", *EVALUATIONS, "finetune"]
    parsed = [importlib.import_module(script).parse_args(words) for script, words in found]
    assert {args.seed for args in parsed} == {7}
    assert len({(args.arch, args.frames, args.size) for args in parsed}) == 1
    assert (parsed[0].epochs, parsed[-1].epochs) == (3, 3)


# ---- A real run ----

@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    """Row k on two of three classes, its commands run in this process -> words of table1, OUT"""
    out = tmp_path_factory.mktemp("real")
    words = ["--data", str(tiny / "UCF-101"), "--out", str(out), "--rows", "k", "--seeds", "7"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table1, "CPU", TINY)
        patch.setattr(table1, "UCF101_8", ("Climb", "Dive"))
        table1.make_ucf101_8(table1.parse_args(words))
        for script, argv in commands(words, "k"):
            importlib.import_module(script).main(argv)
        yield words, out


def test_the_lists_and_the_shrunk_copy_hold_the_classes_of_ucf101_8_alone(tiny, real):
    lists = real[1] / "ucfTrainTestlist"
    for name, count in (("trainlist01.txt", 12), ("testlist01.txt", 6)):
        rows = (tiny / "ucfTrainTestlist" / name).read_text().splitlines()
        assert (lists / name).read_text().splitlines() == rows[-count:]         # Bend is first
    assert (lists / "classInd.txt").read_text().splitlines() == ["1 Climb", "2 Dive"]
    videos = list(real[1].glob("UCF-101/*/*.avi"))
    assert {path.parent.name for path in videos} == {"Climb", "Dive"}
    assert probe(videos[0])[1:3] == (16, 24)


def test_the_table_reads_what_the_scripts_write_and_repeats_no_step(real, capsys):
    words, out = real
    table1.main(words)
    printed = capsys.readouterr().out
    assert printed.startswith("0 of 1 runs to do")
    assert printed.endswith((out / "table.md").read_text())
    names = "linear_probe-ucf101", "auto/linear_probe-ucf101", "finetune-ucf101-4x"
    svm, auto, tuned = (read_json(out / f"k-7/{name}.json") for name in names)
    recall = read_json(out / "k-7/retrieval-ucf101.json")["recall"]["checkpoint"]
    top1, top1_auto, top1_tuned = (x["top1"]["checkpoint"] for x in (svm, auto, tuned))
    figures = top1, top1_auto, recall["R@1"], recall["R@5"], top1_tuned
    assert f"| k | 1 | {' | '.join(f'{100 * x:.1f}' for x in figures)} |" in printed
    assert (svm["protocol"]["C"], auto["protocol"]["C"]) == (1e-3, "auto")


def test_runs_of_other_settings_are_refused_in_one_out(real):
    words, _ = real
    table1.main(words)
    assert fails(table1.main, [*words, "--epochs", "2"]).endswith("give another --out")


# ---- Imitated runs ----

@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that calls table1; scripts that write figures at once stand for the project's."""
    for name in ("pretrain", "linear_probe", "retrieval", "finetune"):
        (tmp_path / f"{name}.py").write_text(IMITATION)
    monkeypatch.setattr(table1, "ROOT", tmp_path)
    monkeypatch.setattr(table1, "make_ucf101_8", lambda args: None)
    monkeypatch.setattr(table1, "make_toy", lambda root: (tmp_path / f"made {root}").touch())
    monkeypatch.chdir(tmp_path)
    return lambda *words: table1.main([*words, "--out", "out", "--jobs", "2"])


def test_the_table_has_means_and_half_ranges_of_the_seeds_and_the_picture_each_of_them(run):
    words = "--data", "videos", "--rows", "f", "random", "--seeds", "0", "1", "4"
    run(*words)
    assert Path("out/table.md").read_text().splitlines()[2:] == [
        "| random | 3 | 11.7 ± 2.0 | 16.7 ± 2.0 | 21.7 ± 2.0 | 31.7 ± 2.0 | 31.7 ± 2.0 |",
        "| f | 3 | 23.3 ± 4.0 | 33.3 ± 4.0 | 43.3 ± 4.0 | 53.3 ± 4.0 |  |",
        "| chance | | 12.5 | 12.5 | 10.0 | 20.0 | 12.5 |"]

    run(*words, "--picture", "table.png")
    assert Path("table.png").read_bytes().startswith(b"\x89PNG")
    _, axes = pyplot().gcf().axes                               # of 1-NN
    assert [text.get_text() for text in axes.get_xticklabels()] == ["random", "f"]
    marks = [line.get_ydata() for line in axes.lines]
    wanted = [20, 21, 24], [40, 42, 48], [65 / 3] * 2, [10] * 2             # means, chance
    assert marks == [pytest.approx(values) for values in wanted]


def test_an_interruption_reaches_the_scripts_and_the_same_command_resumes(run, monkeypatch):
    monkeypatch.setenv("FAULT", """if script == "retrieval":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)""")
    assert fails(lambda words: run(*words), ["--rows", "k", "--seeds", "0"]).endswith("interrupted")
    log, end = Path("out/k-0.txt"), time.monotonic() + 30
    while "saved" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    monkeypatch.delenv("FAULT")
    run("--rows", "k", "--seeds", "0")
    scripts = re.findall(r"^\$ .*?(\w+)\.py ", log.read_text(), re.MULTILINE)
    assert scripts == ["pretrain", *EVALUATIONS, "retrieval"]
    assert Path("made toy-videos").exists()


def test_a_run_that_fails_is_named_and_the_others_finish(run, monkeypatch, capsys):
    monkeypatch.setenv("FAULT", """if script == "retrieval" and out.name == "f-1":
        sys.exit("no checkpoint")""")
    message = fails(lambda words: run(*words), ["--rows", "f", "k", "--seeds", "0", "1"])
    assert message.endswith("1 of 4 runs failed: f-1")
    assert "f-1 failed: no checkpoint" in capsys.readouterr().err
    table = Path("out/table.md").read_text()
    assert "| f | 2 | 21.0 ± 1.0 | 31.0 ± 1.0 | 40.0 | 50.0 |  |" in table
    assert "| k | 2 | 21.0 ± 1.0 | 31.0 ± 1.0 | 41.0 ± 1.0 | 51.0 ± 1.0 |  |" in table
