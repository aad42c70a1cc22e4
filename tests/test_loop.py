"""The loop: what one update is made of, that pieces change nothing, what stops a run, and that
rewards rise.
"""

import dataclasses

import pytest
import torch
from tiny_runs import (
    ALONE, assert_close, checkpoint, gradients, records, run_to_end, small, write_rows)

import eval as evaluation
import flow_grpo
import train
from grpo import group_advantage, grpo_loss, normalise_each
from recipes import RECIPES
from referees.judge import load_judge
from sample import Text, replay_rollout, sample_plan
from support.checkpoint import load_policy
from toy import pretrain, shapes


def begin(out, *flags):
    run = train.begin(small(out, *flags), ALONE)
    run.log.owner.close()
    return run


def numbers_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- acting and learning are one function ----


@pytest.mark.parametrize("recipe", RECIPES)
def test_rollout_and_replay_agree_before_the_first_update(tiny, recipe):
    """Of every kind of segment of every task."""
    first, run = tiny(recipe).rows[0], tiny(recipe).run
    kinds = {f"{task.name}/image" for task in run.source.tasks if task.draws}
    kinds |= {f"{task.name}/text" for task in run.source.tasks if task.writes}
    gaps = {k.removeprefix("self_check/"): v for k, v in first.items() if "self_check" in k}
    assert gaps.keys() == {f"{kind}/{name}" for kind in kinds for name in ("mean", "q99")}
    assert max(gaps.values()) <= 1e-4


def spoil_samples(monkeypatch, spoil):
    """spoil(segments) changes the log-probs that a rollout kept."""

    def sample_and_spoil(*args, **kwargs):
        rollout = sample_plan(*args, **kwargs)
        spoil(rollout.segments)
        return rollout

    monkeypatch.setattr(train, "sample_plan", sample_and_spoil)


@pytest.mark.parametrize("loss, shift, words", [
    ("grpo", 3.0, "must be one function"), ("grpo", 0.04, None), ("nft", 3.0, "must be one function"),
    ("nft", 0.2, None)])
def test_the_self_check_stops_a_run_whose_paths_differ_and_warns_beyond_the_clip_range(
    tmp_path, monkeypatch, capsys, loss, shift, words
):
    run = begin(tmp_path, "--think 0 --ask 0 --image_loss", loss)
    kept = "v" if loss == "nft" else "logp"
    spoil_samples(monkeypatch, lambda segments: getattr(segments[-1].drawn, kept).add_(shift))
    if words:
        with pytest.raises(ValueError, match=words):
            train.one_step(run, 0)
    else:
        train.one_step(run, 0)
        assert f"draw/image differs by {shift} before any update" in capsys.readouterr().err


@pytest.mark.parametrize("each, refused", [(10**6, False), (10, True)])
def test_the_self_check_forgives_one_token_but_not_a_tenth_of_them(
    tmp_path, monkeypatch, each, refused
):
    run = begin(tmp_path, "--draw 0 --think 4 --ask 0")

    def spoil_some(segments):
        _, text, _ = segments
        text.logp[tuple(text.chosen.nonzero()[::each].T)] -= 3.0

    spoil_samples(monkeypatch, spoil_some)
    if refused:
        with pytest.raises(ValueError, match="in think/text; they must be one function"):
            train.one_step(run, 0)
        return
    row = train.one_step(run, 0)
    assert row["self_check/think/text/q99"] < 1e-4
    assert 3 / 1000 < row["self_check/think/text/mean"] < 3 / 50


# ---- one update ----


def test_the_old_log_probs_of_a_text_are_those_of_its_first_replay(tiny):
    """So the first ratios are exactly 1, though decoding and replay round differently."""
    run = tiny("unigrpo").run
    cfg = dataclasses.replace(run.cfg, text_beta=0.0, image_beta=0.0, mse_weight=0.0)
    (part,) = (part for part in run.parts if part.name == "think")
    piece = train.Piece(
        part.name, part.rollout, torch.linspace(-1, 1, 8)[:, None].expand(-1, 2),
        dict(text=50.0, image=30.0), None)
    _, first = train.piece_loss(run.policy, piece, cfg)
    assert first["text/ratio/min"] == first["text/ratio/max"] == 1
    _, later = train.piece_loss(run.frozen, piece, cfg)         # under other weights
    assert later["text/ratio/min"] < 1 < later["text/ratio/max"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The gradients of one step with three prompts a task, as one micro-batch."""
    return gradients(tmp_path_factory.mktemp("whole"), "--draw 3 --think 3 --ask 3")


@pytest.mark.parametrize(
    "flags", ["--micro 3", "--micro 8", "--rollout_batch 4", "--checkpointing"]
)
def test_pieces_of_samples_of_groups_or_of_batches_leave_the_gradient_equal(tmp_path, whole, flags):
    assert_close(gradients(tmp_path, "--draw 3 --think 3 --ask 3", flags), whole)


def test_single_samples_leave_the_gradient_of_an_average_over_texts_equal(tmp_path):
    flags = "--draw 0 --think 0 --text_average sequence --text_ratio sequence"
    one, pieces = gradients(tmp_path, flags), gradients(tmp_path, flags, "--micro 1")
    assert_close(pieces, one)


def test_groups_without_a_signal_are_left_out_of_a_replay_that_no_penalty_holds(tmp_path, monkeypatch):
    """The gradient stays; it is of the same totals."""
    flags, kept, drop = "--image_loss grpo --text_beta 0 --ask 3 --kn 0 --sem 0", [], train.drop_tied

    def remember(rollout, adv, ranks):
        less, some = drop(rollout, adv, ranks)
        kept.append((rollout.B, less.B, bool((some.view(less.B, -1) != 0).any(1).all())))
        return less, some

    monkeypatch.setattr(train, "drop_tied", remember)
    less = gradients(tmp_path / "less", flags)
    assert all(signal for _, _, signal in kept)
    assert sum(few for _, few, _ in kept) < sum(many for many, _, _ in kept)
    monkeypatch.setattr(train, "drop_tied", lambda rollout, adv, ranks: (rollout, adv))
    assert_close(less, gradients(tmp_path / "all", flags))


def test_a_step_whose_groups_are_all_tied_moves_no_weight(tmp_path, monkeypatch):
    run = begin(tmp_path, "--recipe alphagrpo --think 2 --draw 0 --ask 0")
    monkeypatch.setitem(run.rewards, "dvreward", lambda samples: torch.ones(len(samples.prompts)))
    monkeypatch.setitem(run.rewards, "format", lambda samples: torch.ones(len(samples.prompts)))
    assert train.one_step(run, 0)["grad_norm"] == 0


def test_an_epoch_starts_from_no_gradient(tmp_path):
    """At a rate that moves nothing every epoch has the same gradient."""
    still = "--ask 0 --think 0 --lr_understanding 1e-30 --lr_generation 1e-30"
    one = gradients(tmp_path, still)
    assert_close(gradients(tmp_path, still, "--epochs 3"), one)


def test_the_gradient_is_clipped_to_the_norm_of_the_config(tmp_path):
    clipped = gradients(tmp_path, "--ask 0 --think 0 --grad_clip 1e-3")
    norm = torch.stack([g.norm() for g in clipped.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("recipe", ["lvrpo", "corl"])
def test_every_epoch_is_one_step_of_the_optimiser(tiny, recipe):
    finished = tiny(recipe)
    steps = {int(v) for k, v in checkpoint(finished.out).items() if k.startswith("adamw.step.")}
    assert steps == {2 * finished.run.cfg.epochs}


@pytest.mark.parametrize("frozen, expert", [("generation", "0"), ("understanding", "1")])
def test_an_expert_without_a_rate_stays_as_it_was(tmp_path, frozen, expert):
    run = begin(tmp_path, f"--ask 0 --lr_{frozen} 0")
    before, old = run.policy.state_dict(), load_policy(run.cfg.policy).state_dict()
    train.one_step(run, 0)
    moved = {name for name in before if not torch.equal(before[name], old[name])}
    experts = {name.split(".experts.")[1][0] for name in moved if ".experts." in name}
    assert experts == {expert}


def test_a_run_leaves_the_reference_and_the_referees_alone(tiny):
    run = tiny("lvrpo").run
    start = numbers_of(load_policy(run.cfg.policy))
    assert torch.equal(numbers_of(run.frozen), start)
    assert not torch.equal(numbers_of(run.policy), start)
    judge = load_judge(run.cfg.judge).model
    assert torch.equal(numbers_of(run.rewards["kn"].judge.model), numbers_of(judge))


def test_adapters_train_against_the_policy_without_them(tmp_path):
    flags = "--ask 0 --think 0 --lora 4 --lr_generation 1e-2 --mse_weight 0.1"
    finished = run_to_end(small(tmp_path, flags, "--steps 2"))
    first, second = (row["draw/image/velocity_mse"] for row in finished.rows)
    assert first < 1e-10
    assert second > 1e-6
    assert finished.run.frozen is None
    trained = [name for name in checkpoint(tmp_path) if name.startswith("policy.")]
    assert trained
    assert all(name.endswith((".A", ".B")) for name in trained)


def test_the_seed_of_a_run_decides_its_adapters(tmp_path):
    def first_adapter(seed):
        policy = train.prepare_policy(small(tmp_path, "--lora 2 --seed", seed), ALONE)
        return policy.blocks[0].experts[0].q.A

    assert torch.equal(first_adapter(0), first_adapter(0))
    assert not torch.equal(first_adapter(0), first_adapter(1))


WEIGHTS = dict(sem=1.0, ins=2.0)
VALUES = dict(sem=torch.arange(8) % 4 / 10, ins=torch.tensor([0.0, 1, 1, 0, 1, 0, 1, 1]))


@pytest.mark.parametrize("advantage", train.ADVANTAGES)
def test_the_weighted_sum_of_rewards_is_compared_in_the_unit_of_the_config(tmp_path, advantage):
    cfg = small(tmp_path, "--advantage", advantage)
    adv, stats, _ = train.advantages(VALUES, WEIGHTS, cfg, ALONE)
    total = VALUES["sem"] + 2 * VALUES["ins"]
    std = "unbiased" if advantage == "unbiased" else "population"
    scale = {"unbiased": "group"}.get(advantage, advantage)
    torch.testing.assert_close(adv, group_advantage(total, 4, scale=scale, std=std))
    assert stats["reward"] == pytest.approx(total.mean().item())


@pytest.mark.parametrize("advantage", ["group", "batch"])
def test_rewards_normalised_each_and_then_over_the_batch_are_gdpo(tmp_path, advantage):
    """Over the group, which each has been divided by, they are not divided again."""
    cfg = small(tmp_path, "--normalise each --advantage", advantage)
    adv, _, _ = train.advantages(VALUES, WEIGHTS, cfg, ALONE)
    each = normalise_each(VALUES, 4)
    total = each["sem"] + 2 * each["ins"]
    if advantage == "batch":
        total = (total - total.mean()) / (total.std(correction=0) + 1e-4)
    torch.testing.assert_close(adv, total)


@pytest.mark.parametrize(
    "settings",
    [
        dict(image_loss="ratio_norm", step_weights="none", text_average="sequence", text_ratio="token"),
        dict(image_loss="grpo", step_weights="dt", text_average="token", text_ratio="sequence")],
)
def test_a_segment_is_weighed_clipped_and_compared_as_the_config_says(tiny, settings):
    run, adv, totals = tiny("unigrpo").run, torch.linspace(-1, 1, 8), dict(text=50.0, image=30.0)
    cfg = dataclasses.replace(
        run.cfg, text_clip=0.01, text_clip_high=0.02, image_clip=1e-4, text_beta=0.3,
        image_beta=0.5, mse_weight=0.7, text_weight=3.0, image_weight=20.0, **settings)
    for part in run.parts:
        with torch.no_grad():
            scored = replay_rollout(run.policy, part.rollout)
            reference = replay_rollout(run.frozen, part.rollout)
        want, olds = 0.0, {}
        for i, (ours, ref) in enumerate(zip(scored, reference)):
            old = ours.segment
            if isinstance(old, Text):
                olds[i] = old.logp
                loss, _ = grpo_loss(
                    ours.logp, old.logp, adv, old.chosen, total=50.0, per=cfg.text_average,
                    level=cfg.text_ratio, low=0.01, high=0.02, beta=0.3, logp_ref=ref.logp)
                want += 3.0 * loss.item()
                continue
            weights = None
            if cfg.step_weights != "none":
                weights = flow_grpo.step_weights(
                    old.drawn.times, old.drawn.window, over=old.drawn.window)
            loss, _ = flow_grpo.flow_grpo_loss(
                ours.flow, old.drawn, adv, total=30.0, low=1e-4, high=1e-4, weights=weights,
                ratio_norm=cfg.image_loss == "ratio_norm", reference=ref.flow, kl_beta=0.5, mse_weight=0.7)
            want += 20.0 * loss.item()
        columns = adv[:, None].expand(-1, len(scored))
        piece = train.Piece(part.name, part.rollout, columns, totals, reference, olds)
        with torch.no_grad():
            loss, _ = train.piece_loss(run.policy, piece, cfg)
        assert loss.item() == pytest.approx(want, rel=1e-5)


def test_the_control_imitates_with_the_optimiser_and_the_clip_of_the_run(tmp_path, monkeypatch):
    few, corpus = dict(pictures=96, thoughts=64, scenes=64, edits=96), pretrain.Corpus
    monkeypatch.setattr(pretrain, "Corpus", lambda policy: corpus(policy, **few))
    run = begin(tmp_path, "--recipe control --grad_clip 1e-3")
    stats = train.one_step(run, 0)
    grads = [p.grad.norm() for p in run.policy.parameters() if p.grad is not None]
    assert run.frozen is None
    assert stats["loss"] > 0
    assert torch.stack(grads).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_what_micro_batches_log_is_averaged_but_for_min_and_max():
    values = {"a/mean": [1.0, 2.0, 6.0], "a/min": [2.0, 1.0, 3.0], "a/max": [2.0, 3.0, 1.0]}
    want = {"a/mean": 3.0, "a/min": 1.0, "a/max": 3.0}
    assert ALONE.mean_over_ranks(values) == want


# ---- what stops a run ----


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_a_checkpoint(
    tmp_path, monkeypatch
):
    def nan_loss(logp, *args, **kwargs):
        return logp.sum() * float("nan"), {}

    monkeypatch.setattr(train, "grpo_loss", nan_loss)
    with pytest.raises(FloatingPointError, match="step 0: the think loss is nan; stopped"):
        train.train(small(tmp_path, "--ask 0 --steps 1"), ALONE)
    assert not list(tmp_path.iterdir())


def test_a_reward_that_fails_stops_the_run_with_its_name_and_the_prompt(tmp_path, monkeypatch):
    run = begin(tmp_path, "--think 0 --ask 0")
    monkeypatch.setitem(
        run.rewards, "sem", lambda samples: torch.full((len(samples.prompts),), float("nan")))
    with pytest.raises(ValueError, match="reward 'sem' failed on prompt '.+nan"):
        train.one_step(run, 0)


# ---- runs on files ----


def test_prompts_questions_and_edits_of_files_are_trained_on_and_drawn(tmp_path):
    rows = dict(
        prompts=dict(prompt="a red circle"),
        questions=dict(question="how many circles ?", answer="zero"),
        edits=dict(instruction="make the circle red", caption="a red circle"))
    flags = []
    for name, row in rows.items():
        flags += [f"--{name}", write_rows(tmp_path / f"{name}.jsonl", row)]
    out = tmp_path / "out"
    flags += ["--draw 1 --ask 1 --edit 1 --think 0 --ins 0 --steps 1 --eval_every 1"]
    finished = run_to_end(small(out, *flags))
    (row,) = finished.rows                      # no evaluation: truth is not known
    assert {
        "draw/rewards/sem/mean", "ask/rewards/accuracy/mean", "edit/rewards/kn/mean"} <= row.keys()
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["000000.png", "000001.png"]


def test_samples_that_a_run_shows_of_one_prompt_differ(tiny):
    """Also where the run itself starts each group from one noise."""
    run = tiny("corl_t2i").run
    assert run.cfg.shared_noise
    images = evaluation.preview(run.policy, run.source, run.cfg)
    assert len(images.flatten(1).unique(dim=0)) == len(images) == 16


# ---- it learns ----


def test_an_update_makes_the_better_samples_likelier(tmp_path):
    """Of texts and of pictures: the change of log-probs has the sign of the advantage."""
    run = begin(tmp_path, "--recipe unigrpo --draw 0 --think 4 --ask 0")
    train.one_step(run, 0)
    (part,) = run.parts
    with torch.no_grad():
        for scored in replay_rollout(run.policy, part.rollout):
            if isinstance(scored.segment, Text):
                change = (scored.logp - scored.segment.logp).sum(1)
            else:
                change = (scored.flow.logp - scored.segment.drawn.logp).sum(1)
            assert (part.adv * change).mean() > 0


def test_the_reward_and_the_truth_of_a_short_run_rise(tmp_path, monkeypatch):
    """On four prompts again and again; measured over three seeds, they rise at least twice as
    far.
    """
    every = shapes.prompts
    monkeypatch.setattr(
        shapes, "prompts", lambda split: [m for m in every(split) if m["tag"] == "colors"][:4])
    flags = "--draw 4 --think 0 --ask 0 --group_size 16 --sem 0 --kn 0 --image_beta 0 --seed 1"
    train.train(small(tmp_path, flags, "--steps 10"), ALONE)
    rows = records(tmp_path)
    for key, least in (("draw/reward", 0.015), ("draw/truth", 0.06)):
        value = torch.tensor([row[key] for row in rows])
        assert value[-4:].mean() - value[:4].mean() > least
    assert rows[-1]["draw/layout_entropy"] > 0.7 * rows[0]["draw/layout_entropy"]
