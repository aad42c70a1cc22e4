"""Merging: two policies that were trained from one base become one, tensor by tensor."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.checkpoint import load_policy, save_policy
from support.merge import gaussian_merge, main, merge

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
SEEDS, BOUNDS = st.integers(0, 10**6), st.floats(0, 6)


def change(seed, n=200, std=1.0):
    return std * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the rules ----


@given(SEEDS, BOUNDS, st.floats(0.1, 9))
def test_gaussian_merging_is_the_formula_entry_by_entry(seed, bound, std):
    a, b = change(seed, 20), change(seed + 1, 20, std)
    mean, spread = (a.mean() + b.mean()).item() / 2, min(a.std().item(), b.std().item())
    wanted = []
    for pair in zip(a.tolist(), b.tolist()):
        wanted.append(sum(x / 2 if abs(x - mean) < bound * spread else x for x in pair))
    assert gaussian_merge(a, b, bound).tolist() == pytest.approx(wanted)


def test_a_policy_merged_with_itself_keeps_its_bulk_and_doubles_what_lies_two_stds_out():
    a = change(0)
    outlier = (a - a.mean()).abs() >= 2 * a.std()
    assert torch.equal(gaussian_merge(a, a), torch.where(outlier, 2 * a, a))


def test_a_change_next_to_none_has_no_window_and_is_kept_whole():
    a = change(1)
    assert torch.equal(gaussian_merge(a, torch.zeros_like(a)), a)


# ---- folders ----


def shift(folder, seed):
    """Save the golden policy with other weights everywhere."""
    policy, generator = load_policy(GOLDEN), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if not name.startswith("autoencoder."):
                p += 0.1 * torch.randn(p.shape, generator=generator)
    save_policy(policy, folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return shift(folder / "a", 1), shift(folder / "b", 2)


def tensors_of(folder):
    return load_file(folder / "ema.safetensors")


def test_whole_policies_merge_and_load(pair, tmp_path):
    merge(*pair, GOLDEN, tmp_path / "c")
    base, one, two, merged = map(tensors_of, (GOLDEN, *pair, tmp_path / "c"))
    for key, x in base.items():
        wanted = x + gaussian_merge(one[key] - x, two[key] - x)
        assert merged[key].dtype == x.dtype
        assert torch.allclose(merged[key], wanted, atol=1e-6), key
    load_policy(tmp_path / "c")


def test_a_merged_folder_holds_what_a_saved_one_holds(pair, tmp_path):
    base = shutil.copytree(GOLDEN, tmp_path / "base", copy_function=shutil.copyfile)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    merge(*pair, base, tmp_path / "c")
    save_policy(load_policy(base), tmp_path / "saved")
    files = {path.name for path in (tmp_path / "c").iterdir()}
    assert files == {path.name for path in (tmp_path / "saved").iterdir()}
    with safe_open(tmp_path / "c" / "ema.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, key: t.update({key: torch.cat([t[key]] * 2)}), "b: {key} has shape .* the base"),
        (lambda t, key: t.pop(key), "b and the base do not fit: {key}"),
        (lambda t, key: t.update(strange=t[key].clone()), "b and the base do not fit: strange"),
        (lambda t, key: t.update({key: t[key] * float("nan")}), "{key} is not finite"),
        (lambda t, key: t.update({key: t[key].to(torch.float8_e4m3fn)}), "{key} has dtype F8_E4M3")],
)
def test_what_does_not_match_is_refused_by_name(pair, tmp_path, change, words):
    tensors = tensors_of(GOLDEN)
    key = sorted(tensors)[3]
    change(tensors, key)
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "ema.safetensors")
    with pytest.raises(ValueError, match=words.format(key=key)):
        merge(pair[0], tmp_path / "b", GOLDEN, tmp_path / "c")
    assert not (tmp_path / "c" / "ema.safetensors").exists()


def test_a_policy_is_not_made_of_none(pair, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no ema.safetensors"):
        merge(pair[0], tmp_path, GOLDEN, tmp_path / "c")


def test_the_command_merges_and_says_in_one_line_what_is_wrong(pair, tmp_path, capsys):
    command = [*map(str, pair), "--base", str(GOLDEN), "--out"]
    main([*command, str(tmp_path / "c")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'c'}\n"
    load_policy(tmp_path / "c")
    with pytest.raises(
        SystemExit, match="^support.merge: .* holds files already; give another --out$"):
        main([*command, str(pair[0])])
