"""Every test runs with the repository root importable, a fixed seed, and hypothesis without a clock."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                    # before torch: small tensors gain nothing by two, and a busy machine loses

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# torch's first call can take longer than hypothesis' default deadline, and a test must not time anything.
settings.register_profile("repository", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("repository")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
