"""README is true: its snippet runs, its commands parse, and a stranger's path from clone to results works."""
import itertools
import json
import math
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
SHORT = dict(re.findall(r'(?:^| )(\w)="([^"]*)"', README, re.M))                     # what README writes as $P, $U ...
LISTS = dict(S=[SHORT["U"], SHORT["H"]], A=["r3d18", "r2plus1d18", "s3dg"])     # what $S and $A stand for, in turn
SCRIPTS = {f"{script.__name__}.py": script for script in (pretrain, linear_probe, retrieval, finetune)}


def commands():
    """The commands of README for our scripts, with $P, $U ... written out: (script, its arguments, processes)."""
    found = []
    texts = re.findall(r"`([^`\n]+)`", README) + re.findall(r"^(?:python|torchrun|srun) .*$", README, re.M)
    for text, S, A in itertools.product(texts, LISTS["S"], LISTS["A"]):
        names = dict(SHORT, S=S, A=A)
        text = re.sub(r"\$(\w+)", lambda name: names.get(name[1], name[0]), text.split("#")[0])
        for flags, script, rest in re.findall(r"(?:python|torchrun([^&]*?)) (\w+\.py)([^&|]*)", text):
            processes = [int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", flags)]
            command = script, shlex.split(rest), math.prod(processes)
            if script in SCRIPTS and command not in found:
                found.append(command)
    return found


def test_readme_names_a_command_for_each_stage():
    assert {script for script, *_ in commands()} == set(SCRIPTS)


@pytest.mark.parametrize("script, argv, processes", commands(),
                         ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else str(x))
def test_each_command_of_readme_parses_and_its_batch_splits_over_its_processes(script, argv, processes):
    args = SCRIPTS[script].parse_args(argv)
    if script in ("pretrain.py", "finetune.py"):
        assert args.batch_size % (2 * processes * vars(args).get("accumulate", 1)) == 0


def test_each_table_of_the_paper_has_its_cells():
    rows = re.findall(r"^\| ((?:Table|Fig|\(|UCF101:|HMDB51:)[^|]*)\|", README.split("## Results")[1], re.M)
    assert set(re.findall(r"\((\w)\)", " ".join(rows))) >= set("abcdefghijklmno")
    assert {name for name in re.findall(r"Table \d|Fig\. \d", " ".join(rows))} == {
        "Table 1", "Fig. 5", "Table 2", "Table 3", "Table 4"}


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
