"""README is true: its snippet runs, its commands parse, and a stranger's path from clone to results works."""
import json
import re
import shlex

import pytest

import data
import finetune
import linear_probe
import pretrain
import retrieval
from conftest import ROOT

README = (ROOT / "README.md").read_text().replace("\\\n", " ")                  # a command's lines joined
SHORT = {"U": "--dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist",     # what README writes for short
         "C": "--checkpoint runs/ucf101-r3d18_narrow/backbone.pt"}
PARSERS = {"pretrain.py": pretrain.parse_args, "linear_probe.py": linear_probe.parse_args,
           "retrieval.py": retrieval.parse_args, "finetune.py": finetune.parse_args}


def commands():
    """The commands of README for our scripts, with U and C written out: (script, its arguments)."""
    found = []
    inline, lines = r"`([^`\n]*?\b\w+\.py\b[^`\n]*)`", r"^(?:python|torchrun|srun) .*$"
    for text in re.findall(inline, README) + re.findall(lines, README, re.M):
        for script, rest in re.findall(r"(?:python|torchrun [^&]*?) (\w+\.py)([^&|]*)", text):
            if script in PARSERS and "..." not in rest:
                words = re.sub(r"(?<!-)\b[UC]\b", lambda short: SHORT[short[0]], rest.split("#")[0])
                found.append((script, shlex.split(words)))
    return found


def test_readme_names_a_command_for_each_stage():
    assert {script for script, _ in commands()} == set(PARSERS)


@pytest.mark.parametrize("script, argv", commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_each_command_of_readme_parses(script, argv):
    PARSERS[script](argv)


@pytest.mark.parametrize("flags", re.findall(r"^\| [^|]*\| ((?:`--[^|]*)+)\|$", README, re.M))
def test_each_row_of_the_table_of_ablations_parses(flags):
    for words in re.findall(r"`(--[^`]*)`", flags):
        if "..." in words or words.startswith("--step"):
            continue
        pretrain.parse_args(shlex.split(words) + ["--data", "somewhere"])


def test_the_snippet_for_other_projects_runs():
    snippet, = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(snippet, "README.md", "exec"), {})


def test_each_name_in_the_equation_table_exists():
    table = README.split("## Equation → code")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+)\.(\w+)`", table)
    assert len(names) > 10
    for module, name in names:
        if name != "py":
            assert hasattr(__import__(module), name), f"{module}.{name}"


def test_a_strangers_path_from_clone_to_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pretrain.main(["--epochs", "1"])                                            # makes the toy set, trains, saves
    lines = [json.loads(line) for line in (tmp_path / "runs/toy-r3d18_narrow/log.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == 1
    data.preview(["--out", "figure2.png"])
    linear_probe.main(["--windows", "1"])
    retrieval.main(["--windows", "1", "--picture", "neighbours.png"])
    finetune.main(["--windows", "1", "--epochs", "1"])
    said = capsys.readouterr().out
    assert "linear SVM on toy" in said and "R@1" in said and "fine-tuned on toy" in said
    for name in ("figure2.png", "neighbours.png", "runs/toy-r3d18_narrow/backbone.pt"):
        assert (tmp_path / name).stat().st_size > 1000
