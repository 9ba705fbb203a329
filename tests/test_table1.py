"""tools/table1.py: UCF101-8 from UCF101, runs to a table, an interruption, a failing run."""
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SHARP, drifting, wait_until, write_lists, write_video

import pretrain
from common import UserError
from tools import table1

CLASSES = ("Archery", "Lunges", "Punch")                        # the last two are in UCF101-8
TINY = dict(
    shrink="16", clips="--arch r3d18_narrow --frames 2 --size 16",
    pretrain="--batch-size 4 --epochs 40 --warmup-epochs 0 --log-every 1",
    finetune="--batch-size 4 --epochs 1 --warmup-epochs 0 --windows 1 --crops centre")
STEPS = 80                                                      # 10 videos, 4 a batch, 40 epochs
PATCHES = dict(CPU=TINY, UCF101_8=CLASSES[1:], FINETUNED=("k",))
START = f"""import sys
from tools import table1
vars(table1).update({PATCHES})
table1.run(lambda: table1.main(sys.argv[1:]))"""


@pytest.fixture(autouse=True)
def patches(monkeypatch):
    """What START changes, for tests in this process."""
    for name, value in PATCHES.items():
        monkeypatch.setattr(table1, name, value)


def words(ucf101, out, *rows):
    return ["--data", str(ucf101 / "UCF-101"), "--annotations", str(ucf101 / "lists"), "--out",
            str(out), "--rows", *rows, "--seeds", "0", "--jobs", "2"]


def start(ucf101, out, *rows):
    return subprocess.Popen([sys.executable, "-c", START, *words(ucf101, out, *rows)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory):
    """Three classes of UCF101, each with five training and two test videos."""
    root, lists = tmp_path_factory.mktemp("ucf101"), {"trainlist01": [], "testlist01": []}
    for k, name in enumerate(CLASSES, 1):
        for n in range(7):
            path = f"{name}/v_{name}_g{n:02d}_c01.avi"
            write_video(root / "UCF-101" / path, drifting(40, seed=7 * k + n, axis=k % 2), **SHARP)
            lists["trainlist01" if n < 5 else "testlist01"].append(path)
    write_lists(root / "lists", CLASSES, **lists)
    return root


@pytest.fixture(scope="module")
def whole(ucf101, tmp_path_factory):
    """Two rows, stopped by SIGTERM in pre-training and resumed -> OUT, outputs of both commands"""
    out = tmp_path_factory.mktemp("table1")
    process = start(ucf101, out, "random", "k")
    wait_until((out / "k-0/log.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    stopped = process.communicate(timeout=600)
    resumed = start(ucf101, out, "random", "k").communicate(timeout=600)
    return out, stopped, resumed


@pytest.mark.parametrize("row", sorted(table1.ROWS.keys() - {"random"}))
def test_each_row_has_the_flags_that_the_docs_give_it(row):
    name = "d192" if row == "distinct" else row
    listed = (ROOT / "docs/results.md").read_text()
    flags = re.search(rf"`\$P \$U --out runs/{name}( [^`]*)?`", listed)[1]
    ours, theirs = (pretrain.parse_args((text or "").split()) for text in (table1.ROWS[row], flags))
    assert vars(ours) == vars(theirs)


def test_the_lists_and_the_copy_hold_the_classes_of_ucf101_8_alone(ucf101, whole):
    lists = whole[0] / "ucfTrainTestlist"
    for name, count in (("trainlist01.txt", 10), ("testlist01.txt", 4)):
        rows = (ucf101 / "lists" / name).read_text().splitlines()
        assert (lists / name).read_text().splitlines() == rows[-count:]         # Archery is first
    assert (lists / "classInd.txt").read_text().splitlines() == ["1 Lunges", "2 Punch"]
    videos = whole[0] / "UCF-101"
    assert {path.parent.name for path in videos.glob("*/*.avi")} == {"Lunges", "Punch"}


def test_a_stopped_command_saves_and_resumes_in_the_middle_of_pre_training(whole):
    out, (_, message), _ = whole
    assert message.splitlines()[-1].endswith("interrupted")
    log = (out / "k-0.txt").read_text()
    saved = int(re.search(rf"SIGTERM: saved step (\d+) of {STEPS}", log)[1])
    assert 0 < saved < STEPS and f"resumes at step {saved} of {STEPS}" in log


def test_two_rows_run_to_a_table_with_every_figure(whole):
    out, _, (printed, _) = whole
    table = (out / "table.md").read_text()
    assert printed.endswith(table)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[0] for row in rows] == ["row", "---", "random", "k", "chance"]
    random, k, chance = rows[2:]
    assert (random[1], k[1], chance[1], random[-1], chance[2]) == ("1", "1", "", "", "50.0")
    assert all(re.fullmatch(r"\d+\.\d", cell) for cell in random[2:-1] + k[2:] + chance[2:])
    probe = json.loads((out / "k-0/linear_probe-ucf101.json").read_text())
    assert k[2] == f"{100 * probe['top1']['checkpoint']:.1f}"


def test_the_spread_is_the_mean_and_half_the_range():
    assert [table1.spread(x) for x in ([], [0.5], [0.2, 0.3, 0.4])] == ["", "50.0", "30.0 ± 10.0"]


def test_the_picture_is_drawn(ucf101, whole, tmp_path):
    pytest.importorskip("matplotlib")
    table1.main([*words(ucf101, whole[0], "k"), "--picture", str(tmp_path / "table.png")])
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_finished_steps_are_not_repeated(ucf101, whole, capsys):
    def times():
        return {file: file.stat().st_mtime_ns for file in whole[0].glob("*-0*/**/*")}

    before = times()
    table1.main(words(ucf101, whole[0], "random", "k"))
    assert capsys.readouterr().out.startswith("0 of 2 runs to do") and times() == before


def test_runs_of_other_settings_are_refused_in_one_out(ucf101, whole):
    with pytest.raises(UserError, match="give another --out"):
        table1.main([*words(ucf101, whole[0], "k"), "--epochs", "1"])


def test_a_run_that_fails_is_named_and_the_others_finish(ucf101, whole, tmp_path, capsys):
    out = shutil.copytree(whole[0], tmp_path / "out")
    (out / "k-0/retrieval-ucf101.json").unlink()                # one step of k is to be done
    (out / "f-0").mkdir()
    (out / "f-0/checkpoint.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match="1 of 2 runs failed: f-0"):
        table1.main(words(ucf101, out, "f", "k"))
    assert "f-0 failed: " in capsys.readouterr().err
    assert (out / "k-0/retrieval-ucf101.json").exists()
