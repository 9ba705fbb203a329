"""The house keeps its rules: who imports whom, how long a file, a function and a line may be, what the top shows."""
import ast
import graphlib
import subprocess

import pytest
from conftest import ROOT

PLACES = {file: folder for folder in ("", "common", "tools", "tests") for file in sorted((ROOT / folder).glob("*.py"))}
FILES = list(PLACES)
TREES = {file: ast.parse(file.read_text()) for file in FILES}
STAGES = {"pretrain", "finetune", "linear_probe", "retrieval"}
ROOMS = {f"common.{file.stem}" for file in FILES if PLACES[file] == "common"}
TOOLS = {file.stem for file in FILES if PLACES[file] == "tools"}
MAY_IMPORT = {"losses": set(), "models": set(), "common.judging": ROOMS | {"data", "models"},
              "data": {"common.video", "common.splits", "common.loading", "common.colour"}}
MAY_IMPORT |= {room: ROOMS | {"models"} for room in ROOMS - {"common.judging"}}
MAY_IMPORT |= {stage: ROOMS | STAGES | {"data", "losses", "models"} for stage in STAGES}
MAY_IMPORT |= {tool: ROOMS | STAGES | TOOLS | {"data", "losses", "models"} for tool in TOOLS}


def imports(tree):
    """The modules that a syntax tree imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} if node.module == "tools" else set()
            found.add(node.module.removeprefix("tools."))
    return found


def module(file):
    """How a file is imported."""
    return f"common.{file.stem}" if PLACES[file] == "common" else file.stem


def functions(file):
    return [node for node in ast.walk(TREES[file]) if isinstance(node, ast.FunctionDef)]


OURS = {module(file): imports(TREES[file]) & {"common", "tests", *map(module, FILES)}
        for file in FILES if PLACES[file] != "tests"}


def test_every_file_imports_of_ours_only_what_its_place_allows():
    assert {name: found - MAY_IMPORT[name] for name, found in OURS.items()} == {name: set() for name in OURS}


def test_no_files_import_each_other_even_by_way_of_others():
    graphlib.TopologicalSorter(OURS).prepare()                                  # CycleError


def test_losses_py_imports_torch_alone():
    assert imports(TREES[ROOT / "losses.py"]) == {"torch", "torch.nn.functional"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_functions_and_lines_keep_their_caps_and_imports_stand_at_the_top(file):
    lines, tests = file.read_text().splitlines(), PLACES[file] == "tests"
    assert len(lines) <= (600 if file.name == "benchmark.py" else 450 if tests else 375)
    assert [line for line in lines if len(line) > 120] == []
    assert tests or [node.name for node in functions(file) if node.end_lineno - node.lineno >= 45] == []
    inside = set().union(*(imports(node) for node in functions(file)))
    assert {name for name in inside if not name.startswith(("matplotlib", "torch.utils.tensorboard"))} == set()


def test_the_sampler_is_read_whole_within_the_first_110_lines_of_data_py():
    ends = {node.name: node.end_lineno for node in TREES[ROOT / "data.py"].body if hasattr(node, "name")}
    assert ends["Tau"] < ends["sample_tau"] < ends["sample_pair"] < 110


def test_the_top_level_shows_the_stages_the_method_and_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        *(f"{name}.py" for name in STAGES | {"data", "losses", "models"}), "requirements.txt", "README.md", "LICENSE",
        "common", "docs", "tests", "tools"}
