"""Tests run from any folder, on the modules beside this one, with a cache of their own and a thread a process."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                                                 # real videos and lists; may be missing
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"                                             # for the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Indexes of data sets go to a folder of this run, not to the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared():
    """The folder of real videos and annotation files; tests that need it are skipped, visibly, where it is not."""
    if not (SHARED / "videos").is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED
