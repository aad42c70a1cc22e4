"""The benchmarks run, and compare functions that give the same numbers."""

import pytest
import torch

from studies import bench
from sample import TOY
from support.checkpoint import load_policy


@pytest.mark.parametrize("name", [f"{what}-{way}" for what in bench.BENCHES for way in ("plain", "shared")])
def test_every_variant_of_the_benchmark_runs(name):
    bench.bench_case(name, load_policy(TOY))()


def test_the_benchmark_of_a_large_policy_measures_every_part(tmp_path):
    rows = bench.bench_release(load_policy(TOY).requires_grad_(False), size=32, steps=3, batches=(1, 2), words=4, G=2).splitlines()
    assert len(rows) == 8 and all(row.count("|") == 5 for row in rows)
    for words in ("batch 2", "4 tokens", "rollout of 4 tokens", "ceiling"):
        assert any(words in row for row in rows), words


def test_the_release_is_not_measured_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="bench.py: --policy 7b measures 29 GB of weights on a GPU"):
        bench.main(["--policy", "7b"])


def test_each_reward_of_pictures_is_timed_and_names_its_model(capsys):
    bench.main(["rewards", "--sem", "1", "--tifa", "1", "--ins", "1"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["`sem`", "`kn`", "`ins`", "`tifa`"]
    assert all(float(row.split("|")[4]) > 0 for row in rows) and "toy/judge" in rows[3]
