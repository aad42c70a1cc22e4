"""Every test runs on the CPU, on one thread unless OMP_NUM_THREADS asks for more, offline, from one
seed.
"""

import functools
import os
import sys
import tempfile
from pathlib import Path

# Before torch and transformers are loaded; programs that a test starts inherit it. A user's own
# GPUs and cache of downloaded models must not change what a test sees.
os.environ |= dict(
    CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", ROCR_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1",
    HF_HOME=str(Path(tempfile.gettempdir()) / "no-models-are-here"), MPLBACKEND="Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")   # small tensors gain nothing by more

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A test must not time anything, and torch's first call takes longer than hypothesis' default
# deadline.
settings.register_profile(
    "repository", deadline=None, derandomize=True, max_examples=100, database=None
)
settings.load_profile("repository")


def pytest_configure(config):
    alone = "ignore:torch.distributed is disabled"              # which one process means
    config.addinivalue_line("filterwarnings", alone)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def policy():
    """The toy's policy, which no test changes."""
    from sample import TOY
    from support.checkpoint import load_policy

    return load_policy(TOY)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(recipe): two steps of a recipe on the toy, run once. See tiny_runs.Finished."""
    import tiny_runs

    @functools.cache
    def run(recipe):
        return tiny_runs.run_recipe(recipe, tmp_path_factory.mktemp(recipe))

    return run
