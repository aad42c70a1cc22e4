"""Merging: two policies that were trained from one base become one, tensor by tensor."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support import merge
from policy import LoRA, add_lora
from support.checkpoint import load_policy, save_adapters, save_policy
from support.merge import MERGES, average_merge, gaussian_merge, inverse_norm_merge, merge

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "bagel_tiny"
BOUNDS = st.floats(0, 6)


def change(seed, n=200, std=1.0):
    return std * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6), BOUNDS, st.floats(0.1, 9))
def test_gaussian_merging_is_the_formula_entry_by_entry(seed, bound, std):
    a, b = change(seed, 20), change(seed + 1, 20, std)
    mean, spread = (a.mean() + b.mean()).item() / 2, min(a.std().item(), b.std().item())
    inside = lambda x: mean - bound * spread < x < mean + bound * spread
    want = [sum(0.5 * x if inside(x) else x for x in pair) for pair in zip(a.tolist(), b.tolist())]
    assert gaussian_merge(a, b, bound).tolist() == pytest.approx(want)


@given(st.integers(0, 10**6), BOUNDS, st.floats(0.25, 4))
def test_gaussian_merging_is_symmetric_and_scales_with_the_changes(seed, bound, c):
    a, b = change(seed), change(seed + 1, std=2.0)
    assert torch.equal(gaussian_merge(a, b, bound), gaussian_merge(b, a, bound))
    assert torch.allclose(gaussian_merge(2 * a, 2 * b, bound), 2 * gaussian_merge(a, b, bound))       # a power of two: no entry changes sides


@given(st.integers(0, 10**6))
def test_a_large_bound_is_the_average_and_0_is_the_sum(seed):
    a, b = change(seed), change(seed + 1, std=3.0)
    assert torch.allclose(gaussian_merge(a, b, 1e6), average_merge(a, b)) and torch.allclose(gaussian_merge(a, b, 0.0), a + b)


def test_a_policy_merged_with_itself_keeps_its_bulk_and_doubles_its_outliers():
    a = change(3)
    merged, outlier = gaussian_merge(a, a), (a - a.mean()).abs() >= 2 * a.std()
    assert outlier.any() and torch.equal(merged[outlier], 2 * a[outlier]) and torch.equal(merged[~outlier], a[~outlier])


def test_two_equal_gaussians_have_a_twentieth_of_outliers_with_a_quarter_of_the_squared_norm():
    a = change(0, 100_000)
    outlier = gaussian_merge(a, a) != a
    assert outlier.double().mean().item() == pytest.approx(0.046, abs=0.003)
    assert (a[outlier].square().sum() / a.square().sum()).item() == pytest.approx(0.26, abs=0.01)


@pytest.mark.parametrize("a, b", [(change(1), torch.zeros(200, dtype=torch.float64)), (change(1, 1), change(2, 1))])
def test_where_there_is_no_window_changes_are_added(a, b):
    assert torch.equal(gaussian_merge(a, b), a + b)


@given(st.integers(0, 10**6), st.floats(0.1, 9))
def test_inverse_norms_weigh_the_longer_change_less(seed, std):
    a, b = change(seed), change(seed + 1, std=std)
    s, t = 1 / a.norm(), 1 / b.norm()
    assert torch.allclose(inverse_norm_merge(a, b), (s * a + t * b) / (s + t))
    assert not inverse_norm_merge(a, 0 * a).any() and not inverse_norm_merge(0 * a, 0 * a).any()


def moved(folder, seed, dtype=None):
    """The golden policy with other weights everywhere."""
    policy, g = load_policy(GOLDEN, dtype=dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if not name.startswith("autoencoder."):
                p += 0.1 * torch.randn(p.shape, generator=g).to(p.dtype)
    save_policy(policy, folder)
    return folder


@pytest.mark.parametrize("how", list(MERGES))
def test_whole_policies_merge_and_load(tmp_path, how):
    a, b = moved(tmp_path / "a", 1), moved(tmp_path / "b", 2)
    merge(a, b, GOLDEN, tmp_path / "c", how, 1.5)
    base, one, two, got = (load_file(f / "ema.safetensors") for f in (GOLDEN, a, b, tmp_path / "c"))
    for key, x in base.items():
        want = x.float() + MERGES[how](one[key].float() - x.float(), two[key].float() - x.float(), 1.5)
        assert got[key].dtype == x.dtype and torch.allclose(got[key].float(), want, atol=1e-6), key
    load_policy(tmp_path / "c")


def adapted(folder, seed, rank):
    policy, g = add_lora(load_policy(GOLDEN), rank=rank, alpha=2.0 * rank), torch.Generator().manual_seed(seed)
    for m in policy.modules():
        if isinstance(m, LoRA):
            with torch.no_grad():
                m.A.copy_(torch.randn(m.A.shape, generator=g))
                m.B.copy_(torch.randn(m.B.shape, generator=g))
    save_adapters(policy, folder)
    save_policy(policy, folder.with_name(folder.name + "_whole"))
    return folder


def test_adapters_merge_by_their_dense_changes_also_with_a_whole_policy(tmp_path):
    a, b = adapted(tmp_path / "a", 1, 2), adapted(tmp_path / "b", 2, 3)
    merge(a, b, GOLDEN, tmp_path / "c")
    merge(tmp_path / "a_whole", b, GOLDEN, tmp_path / "d")
    merge(tmp_path / "a_whole", tmp_path / "b_whole", GOLDEN, tmp_path / "e")
    c, d, e = (load_file(tmp_path / x / "ema.safetensors") for x in "cde")
    base = load_file(GOLDEN / "ema.safetensors")
    assert any(not torch.equal(c[k], base[k]) for k in c)
    for k in c:                                                 # an entry at the window's very edge may fall on either side
        assert ((c[k] - e[k]).abs() < 1e-4).float().mean() > 0.99 and ((d[k] - e[k]).abs() < 1e-4).float().mean() > 0.99


def test_a_merge_holds_one_tensor_at_a_time_and_is_stored_as_safetensors_stores(tmp_path, monkeypatch):
    a, b, live = moved(tmp_path / "a", 1), moved(tmp_path / "b", 2), []
    whole = merge.MERGES["average"]
    monkeypatch.setitem(merge.MERGES, "average", lambda x, y, bound: live.append(x.numel()) or whole(x, y))
    merge(a, b, GOLDEN, tmp_path / "c", "average")
    got = load_file(tmp_path / "c" / "ema.safetensors")
    assert sorted(live) == sorted(x.numel() for x in got.values())
    save_file(got, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == got.keys() and all(torch.equal(again[k], got[k]) for k in got)


def other_width(folder):
    shutil.copytree(GOLDEN, folder)
    tensors = load_file(folder / "ema.safetensors")
    key = sorted(tensors)[3]
    tensors[key] = torch.cat([tensors[key]] * 2)
    save_file(tensors, folder / "ema.safetensors")
    return key


def test_what_does_not_match_is_refused_by_name(tmp_path):
    a, key = moved(tmp_path / "a", 1), other_width(tmp_path / "b")
    with pytest.raises(ValueError, match=f"b: {key} has shape .* the base"):
        merge(a, tmp_path / "b", GOLDEN, tmp_path / "c")
    tensors = load_file(a / "ema.safetensors")
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "b" / "ema.safetensors")
    with pytest.raises(ValueError, match=f"b has no {key}, which the base has"):
        merge(a, tmp_path / "b", GOLDEN, tmp_path / "c")
    with pytest.raises(ValueError, match="is one of the folders that are merged"):
        merge(a, a, GOLDEN, a)
    with pytest.raises(FileNotFoundError, match="has no ema.safetensors"):
        merge(a, tmp_path, GOLDEN, tmp_path / "c")
    save_file(tensors | {key: tensors[key] * float("nan")}, tmp_path / "b" / "ema.safetensors")
    with pytest.raises(ValueError, match=f"{key} is not finite"):
        merge(a, tmp_path / "b", GOLDEN, tmp_path / "c")
    assert not (tmp_path / "c" / "ema.safetensors").exists()


def test_the_command_merges_and_says_in_one_line_what_is_wrong(tmp_path):
    a, b = moved(tmp_path / "a", 1), moved(tmp_path / "b", 2)
    command = [sys.executable, "checkpoint.py", "merge", str(a), str(b), "--base", str(GOLDEN), "--out"]
    done = subprocess.run([*command, str(tmp_path / "c"), "--how", "average"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"wrote {tmp_path / 'c'}\n" and load_policy(tmp_path / "c")
    for more in ([str(a)], [str(tmp_path / "d"), "--bound", "-1"]):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("checkpoint.py: ") and done.stderr.count("\n") == 1
