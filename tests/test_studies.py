"""The studies besides the claims: benchmarks compare equal work, rewards against the truth,
GenEval's folders.
"""

import json

import numpy as np
import pytest
import torch

from studies import bench, geneval, reward_truth
from toy import shapes, world

# ---- memory ----


def test_a_sharded_policy_needs_less_memory_on_each_of_more_gpus(capsys):
    bench.main([])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    peak = {tuple(row[:3]): row[-1] for row in rows}
    one, eight = peak["| all weights", "512", "1"], peak["| all weights", "512", "8"]
    assert int(eight.removesuffix(" |")) < int(one.removesuffix(" |")) / 4


# ---- a GPU ----


def test_each_part_of_the_measurement_of_a_gpu_stands_alone(monkeypatch, capsys):
    def break_down(run):
        raise RuntimeError("out of memory\nwith details")

    monkeypatch.setattr(bench, "PARTS", (break_down, *bench.PARTS))
    with pytest.raises(SystemExit):
        bench.main(["gpu", "--small"])
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert rows.pop("break_down") == "failed: out of memory"
    assert not [value for value in rows.values() if "failed" in value]
    for what in ("write 8 x 24 tokens", "denoise 24 images", "improve"):
        assert rows[f"{what}, again"].endswith(" s, 0.0 GB")


def test_a_gpu_is_measured_at_the_scale_of_the_release(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.train, "begin", lambda cfg, ranks: cfg)
    assert bench.begin("bagel", tmp_path, None).checkpointing


def test_without_a_gpu_only_the_small_measurement_is_made():
    with pytest.raises(SystemExit, match="no GPU here; --small tries"):
        bench.main(["gpu"])


# ---- rewards against the truth ----


def test_every_reward_of_pictures_is_compared_with_the_truth(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(world, "PROMPTS_PER_TAG", 2)
    reward_truth.main(["--out", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    table = result["table"]
    assert result["means"].keys() == table.keys()
    assert 0 < result["means"]["sem"][0] < 1
    assert table.keys() == {
        "sem", "kn", "dense", "ins", "recaption", "likeness", "dvreward", "pref", "tim"}
    assert all(-1 <= row["overall"] <= 1 for row in table.values())
    assert table["ins"]["overall"] > 0.5
    assert sum(row["share"] for row in table.values()) == pytest.approx(1)
    assert "| `dvreward` |" in capsys.readouterr().out


def test_correlation_is_pearsons_and_unknown_of_what_does_not_vary():
    a, b = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert reward_truth.correlation(a, 3 * a - 1) == pytest.approx(1)
    assert reward_truth.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert reward_truth.correlation(a, torch.ones(4)) is None


# ---- GenEval's folders ----


@pytest.fixture
def folder(tmp_path):
    """A folder of two pictures of each of three prompts, and the command that made it."""
    rows = shapes.prompts("eval")[:3]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [
        "--metadata", str(tmp_path / "m.jsonl"), "--samples", "2", "--steps", "2", "--out",
        str(tmp_path / "g")]
    geneval.main(flags)
    return tmp_path / "g", flags


def test_pictures_lie_as_genevals_own_script_reads_them(folder):
    out, _ = folder
    assert sorted(path.name for path in out.glob("0*")) == ["00000", "00001", "00002"]
    assert len(list((out / "00002" / "samples").glob("000[01].png"))) == 2
    metadata = json.loads((out / "00002" / "metadata.jsonl").read_text())
    assert metadata["prompt"] == shapes.prompts("eval")[2]["prompt"]


def test_a_folder_is_gone_on_with_and_its_other_pictures_stay(folder):
    out, flags = folder
    missing, there = out / "00001" / "samples" / "0001.png", out / "00000" / "samples" / "0000.png"
    content = missing.read_bytes()
    missing.unlink()
    there.write_bytes(content)
    geneval.main(flags)
    assert missing.read_bytes() == there.read_bytes() == content


@pytest.mark.parametrize("more", [["--guidance", "2"], ["--steps", "3"]])
def test_a_folder_with_pictures_of_other_settings_is_refused(folder, more):
    out, flags = folder
    with pytest.raises(
        SystemExit, match="settings.json is of other settings than these; give another --out"):
        geneval.main([*flags, *more])


def test_a_folder_with_pictures_of_other_prompts_is_refused(folder, tmp_path):
    out, flags = folder
    (tmp_path / "m.jsonl").write_text(json.dumps(shapes.prompts("eval")[0]))
    with pytest.raises(SystemExit, match="is of other settings"):
        geneval.main(flags)


def test_prompts_without_rules_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle")
    with pytest.raises(
        SystemExit,
        match="--ins reads GenEval's include and exclude, which 1 rows of .*p.txt do not have"):
        geneval.main(["--metadata", str(tmp_path / "p.txt")])
