"""AlphaGRPO: decomposed questions, refinement with rectification, edits, several rounds, guidance in training."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from referees import judge
from referees import questions
from grpo import anchored_advantage, group_advantage, rectified
from policy import Guidance
from recipes import check, parse
from referees.questions import (PHOTO_QUALITY, TOY_QUALITY, Question, Questions, by_rule,
    decompose, of_answer, questions_of_row)
from rewards import Decomposed, Samples, aggregate
from sample import TOY, Draw, Write, refine, replay_rollout, sample_plan, subset
from support.checkpoint import load_policy
from support.memory import memory
from support.run import Ranks
from toy import world
from support import rows
from studies import refinement
import eval as evaluation
import flow_grpo
import sample
import tasks
import train
from toy import shapes

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = ["--group_size", "4", "--steps", "1", "--eval_every", "0", "--save_every", "0"]
REWARDS_OF_A_GROUP = st.lists(st.floats(0, 1).map(lambda x: round(x, 3)), min_size=4, max_size=4)
PROMPTS = [m for m in shapes.prompts("train") if m["tag"] == "position"][:3]


@pytest.fixture(scope="module")
def policy():
    return load_policy(TOY)


def small(tmp_path, *more):
    return parse([*SMALL, *map(str, more), "--out", str(tmp_path)])


# ---- rectification ----


@given(REWARDS_OF_A_GROUP, st.floats(0, 1), st.sampled_from(["group", "initial"]))
def test_who_does_not_improve_never_gets_a_positive_advantage(group, initial, how):
    reward, floor = torch.tensor(group), torch.full((4,), round(initial, 3))
    adv = group_advantage(rectified(reward, floor, 4, how), 4)
    assert (adv[reward <= floor] <= 1e-6).all()
    if (reward <= floor).all():
        assert adv.tolist() == [0.0] * 4
    elif (reward <= floor).any():
        assert (adv[reward <= floor] < 0).all()


@given(st.lists(st.booleans(), min_size=4, max_size=4), st.floats(0.05, 0.5))
def test_both_readings_agree_where_all_who_improve_have_one_reward(better, gain):
    initial = torch.full((4,), 0.5)
    reward = torch.where(torch.tensor(better), 0.5 + gain, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    group, code = (group_advantage(rectified(reward, initial, 4, how), 4, eps=0) for how in ("group", "initial"))
    assert torch.allclose(group, code, atol=1e-5)


def test_rectification_is_told_apart_by_hand_and_off_changes_nothing():
    reward, initial = torch.tensor([0.5, 0.6, 0.9, 0.95]), torch.full((4,), 0.8)
    assert rectified(reward, initial, 4, "group").tolist() == pytest.approx([0.5, 0.5, 0.9, 0.95])
    assert rectified(reward, initial, 4, "initial").tolist() == pytest.approx([0.8, 0.8, 0.9, 0.95])
    assert torch.equal(rectified(reward, initial, 4, "off"), reward)
    with pytest.raises(ValueError, match='how is "min"'):
        rectified(reward, initial, 4, "min")


@given(REWARDS_OF_A_GROUP, st.floats(0, 1))
def test_the_anchor_is_the_better_of_first_picture_and_mean(group, initial):
    reward = torch.tensor(group)
    adv = anchored_advantage(reward, torch.full((4,), initial), 4)
    above = reward - max(reward.mean().item(), initial)
    assert (adv.sign() * above.sign() >= 0).all() and adv.square().mean() <= 1 + 1e-4
    assert (adv[reward < initial] <= 0).all()
    assert (anchored_advantage(reward, torch.full((4,), initial), 4, clamp=0.3).abs() <= 0.3).all()


# ---- decomposed questions ----


def asked(semantic, quality):
    return [Question(f"s{i}", "Count") for i in range(semantic)] + [Question(f"q{i}", "Texture", True) for i in range(quality)]


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.permutations(range(5)), st.integers(0, 4), st.floats(0, 1),
       st.sampled_from(["geometric", "arithmetic", "pooled", "binary"]))
def test_aggregation_is_in_range_monotone_and_blind_to_order(answers, order, place, higher, how):
    questions = asked(3, 2)
    value = aggregate(answers, questions, how)
    assert 0 <= value <= 1
    assert aggregate([answers[i] for i in order], [questions[i] for i in order], how) == pytest.approx(value)
    raised = [max(a, higher) if i == place else a for i, a in enumerate(answers)]
    assert aggregate(raised, questions, how) >= value - 1e-9


def test_aggregation_by_hand_and_an_empty_half_is_an_error():
    answers, questions = [1.0, 0.5, 0.0, 0.81], asked(3, 1)
    assert aggregate(answers, questions) == pytest.approx((0.5 * 0.81) ** 0.5)
    assert aggregate(answers, questions, "arithmetic") == pytest.approx((0.5 + 0.81) / 2)
    assert aggregate(answers, questions, "pooled") == pytest.approx(2.31 / 4)
    assert aggregate(answers, questions, "binary") == pytest.approx((1 / 3) ** 0.5)
    with pytest.raises(ValueError, match="2 semantic and 0 quality questions"):
        aggregate([1.0, 1.0], asked(2, 0))


class Told:
    """A judge that answers by a table, and keeps what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def yes_probability(self, images, questions, of=None):
        self.asked += list(zip(questions, of if of is not None else range(len(images))))
        return torch.tensor([self.answers.get(q, 0.9) for q in questions])


def test_an_attribute_of_an_absent_thing_scores_0_and_tags_are_counted():
    m = PROMPTS[0]
    a, b = (clause["class"] for clause in m["include"])
    judge = Told({f"is there a {a} ?": 0.2})
    reward = Decomposed(judge, Questions("", toy=True))
    value = reward(Samples([m["prompt"]] * 2, [m] * 2, images=torch.zeros(2, 3, 8, 8)))
    # Of existence, number of both, relation, and the third shape: those of the absent one and the relation fall.
    assert value.tolist() == pytest.approx([((0.2 + 0.0 + 0.9 + 0.9 + 0.0 + 0.9) / 6 * 0.9) ** 0.5] * 2)
    assert reward.by_tag["Spatial"] == (0.0, 2) and reward.by_tag["Count"] == pytest.approx((1.8, 4))
    assert [n for _, n in judge.asked] == [0] * 8 + [1] * 8
    whole = Decomposed(Told({f"is this {m['prompt']} ?": 0.3}), None, "holistic")
    assert whole(Samples([m["prompt"]], [m], images=torch.zeros(1, 3, 8, 8))).tolist() == pytest.approx([0.3])


def test_a_need_that_fell_takes_its_own_with_it():
    chain = [Question("a ?", "Existence"), Question("b ?", "Count", needs=(0,)), Question("c ?", "Attribute", needs=(1,)), *PHOTO_QUALITY]
    reward = Decomposed(Told({"a ?": 0.1}), lambda prompt, metadata: chain, "pooled")
    assert reward(Samples(["p"], [{}], images=torch.zeros(1, 3, 8, 8))).tolist() == pytest.approx([(0.1 + 0 + 0 + 0.9 + 0.9) / 5])


def test_the_rule_asks_what_metadata_say_and_nothing_twice():
    m = {"include": [{"class": "bench", "count": 2, "color": "red"}, {"class": "dog", "count": 1, "color": "blue", "position": ["above", 0]}],
         "exclude": [{"class": "bench", "count": 3}, {"class": "cat", "count": 1}]}
    made = by_rule(m, PHOTO_QUALITY)
    assert [(q.text, q.tag, q.needs) for q in made if not q.quality] == [
        ("is there a bench ?", "Existence", ()), ("are there two benches ?", "Count", (0,)), ("is there a red bench ?", "Attribute", (0,)),
        ("is there a dog ?", "Existence", ()), ("is there one dog ?", "Count", (3,)), ("is the dog blue ?", "Attribute", (3,)),
        ("is the dog above the bench ?", "Spatial", (3, 0)), ("are there zero cats ?", "Negative", ())]
    assert [q for q in made if q.quality] == list(PHOTO_QUALITY)
    both = by_rule({"include": [{"class": "cup", "count": 1, "color": c} for c in ("red", "blue")]}, TOY_QUALITY)
    assert [q.text for q in both][:2] == ["is there a cup ?", "are there two cups ?"] and len({q.text for q in both}) == len(both)
    with pytest.raises(ValueError, match="no objects to ask about; give its questions by --dv"):
        by_rule({"prompt": "a mood", "include": []}, TOY_QUALITY)


def test_every_toy_prompt_is_decomposed_into_questions_that_its_judge_can_read():
    judge = judge.load_judge(str(TOY.parent / "judge"))
    known, ask = set(judge.tokenizer.get_vocab()), Questions("", toy=True)
    pool = shapes.prompts("train") + shapes.implicit_prompts("eval") + [world.toy_edit(np.random.default_rng(i)).metadata for i in range(30)]
    for m in pool:
        for q in ask(m["prompt"], m):
            assert set(q.text.split()) <= known, q.text


def test_the_toys_judge_prefers_the_right_picture():
    rng, judge = np.random.default_rng(0), judge.load_judge(str(TOY.parent / "judge"))
    asked = [shapes.pick(rng, shapes.prompts("eval")) for _ in range(60)]
    reward, values = Decomposed(judge, Questions("", toy=True)), []
    for some in (asked, [shapes.wrong_metadata(m, rng) for m in asked]):
        images = world.rendered([shapes.sample_scene(m, rng, training=False) for m in some]) * 0.5 + 0.5
        values.append(reward(Samples([m["prompt"] for m in asked], asked, images=images)))
    assert (values[0] > values[1]).float().mean() > 0.95


# ---- files of questions ----


LINE = {"prompt": "a red dog", "semantic_questions": [{"question": "is there a dog ?", "tag": "existence"},
                                                     {"question": "is the dog red ?", "tag": "Attribute", "needs": [0]}, "does it sit ?"],
        "quality_questions": [{"question": "is it sharp ?", "tag": "Texture"}]}


def test_a_line_of_questions_is_read_with_needs_and_plain_strings(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(LINE))
    made = Questions(str(tmp_path / "q.jsonl"), toy=False)("a red dog", {})
    assert [(q.text, q.tag, q.needs) for q in made] == [("is there a dog ?", "Existence", ()), ("is the dog red ?", "Attribute", (0,)),
                                                         ("does it sit ?", "Existence", ()), ("is it sharp ?", "Texture", ())]


@pytest.mark.parametrize("change, said", [
    (dict(semantic_questions=[]), "semantic_questions must be a list of at least one question"),
    (dict(quality_questions="x"), "quality_questions must be a list"),
    (dict(semantic_questions=[{"question": " ", "tag": "Count"}]), r"semantic_questions\[0\] must have a text"),
    (dict(semantic_questions=[{"question": "a ?", "tag": "Mood"}]), r"a \"tag\" of"),
    (dict(semantic_questions=[{"question": "a ?", "tag": "Count", "needs": [0]}]), '"needs" must be places of earlier semantic questions'),
    (dict(semantic_questions=[{"question": "\ud800 ?", "tag": "Count"}]), r"semantic_questions\[0\] must have a text"),
    (dict(quality_questions=[{"question": "a ?", "tag": "Texture", "needs": [0]}]), '"needs" must be places')])
def test_a_bad_line_of_questions_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        questions_of_row({**LINE, **change}, "q.jsonl")


def test_prompts_without_questions_are_named_before_the_run(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(7)))
    (tmp_path / "q.jsonl").write_text(json.dumps({**LINE, "prompt": "prompt 3"}))
    more = ["--recipe", "alphagrpo", "--prompts", tmp_path / "p.txt", "--dv", tmp_path / "q.jsonl"]
    with pytest.raises(ValueError, match="has no questions for 6 of 7 prompts, such as .'prompt 0', 'prompt 1', 'prompt 2', 'prompt 4', 'prompt 5'.;"):
        tasks.Source(small(tmp_path, *more), load_policy(TOY))
    tasks.Source(small(tmp_path, *more, "--dv_by", "holistic"), load_policy(TOY))


@pytest.mark.parametrize("row", [
    dict(include=[{"class": "dog"}]), dict(include=[{"class": "dog", "count": 1, "position": ["above", 3]}]),
    dict(include=[{"class": "dog", "count": 1}], exclude=[{}])])
def test_metadata_that_the_rule_cannot_read_are_refused_before_the_run(row):
    with pytest.raises(ValueError, match="prompt 'a dog': its include or exclude is not GenEval's"):
        Questions("", toy=False).check([{"prompt": "a dog", **row}])


def test_questions_of_an_edit_are_found_by_its_caption_or_its_instruction(tmp_path):
    for text in ("make it red", "a red dog"):
        (tmp_path / "q.jsonl").write_text(json.dumps({**LINE, "prompt": text}))
        ask, row = Questions(str(tmp_path / "q.jsonl"), toy=False), {"instruction": "make it red", "caption": "a red dog", "include": []}
        ask.check([row], "instruction")
        assert len(ask("a red dog", row)) == 4


ANSWER = json.dumps({k: v for k, v in LINE.items() if k != "prompt"})


def test_decomposition_retries_resumes_and_leaves_out_what_stays_invalid(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    out, heard = tmp_path / "q.jsonl", []

    def write(requests, temperature):
        heard.append((len(requests), temperature))
        answers = {"one": f"Here it is: {ANSWER}", "two": "no JSON", "three": ANSWER if temperature else '{"semantic_questions": [}'}
        return [answers[r.rsplit("Prompt: ", 1)[1]] for r in requests]

    left = decompose(str(tmp_path / "p.txt"), write, "m", str(out), batch=2, tries=3)
    assert left == ["two: invalid JSON (substring not found)"]
    assert heard == [(2, 0.0), (1, 0.0), (2, 0.7), (1, 0.7)]
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["one", "three"]
    assert Questions(str(out), toy=False).of_file["three"] == questions_of_row(LINE, "")
    with out.open("a") as file:
        file.write('{"prompt": "cut')                           # as a kill leaves it
    heard.clear()
    with pytest.raises(ValueError, match="m gave no valid questions for any of 1 prompts in 2 tries each; the last reason: invalid JSON"):
        decompose(str(tmp_path / "p.txt"), write, "m", str(out), tries=2)
    assert heard == [(1, 0.0), (1, 0.7)]
    decompose(str(tmp_path / "p.txt"), lambda r, t: [ANSWER] * len(r), "other", str(out))           # another model is another question
    assert sum('"prompt": "two"' in line for line in out.read_text().splitlines()) == 1
    assert set(Questions(str(out), toy=False).of_file) == {"one", "two", "three"}                    # the cut line is gone


def test_an_answer_is_validated():
    assert len(of_answer("a red dog", ANSWER)["semantic_questions"]) == 3
    with pytest.raises(ValueError, match="the answer: prompt 'x': quality_questions must be"):
        of_answer("x", json.dumps({"semantic_questions": ["a ?"]}))


def test_a_real_language_model_is_asked_through_its_chat_template(tmp_path):
    """A tiny Qwen2 of random weights: the public path, whose answers are no JSON."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    tokenizer = load_policy(TOY).tokenizer
    tokenizer.chat_template = "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "llm")
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "llm")
    write = questions.load_writer(str(tmp_path / "llm"), "cpu", longest=4)
    assert len(write(["a red circle", "two"], 0.0)) == 2 and write(["a red circle"], 0.0) == write(["a red circle"], 0.0)
    (tmp_path / "p.txt").write_text("a circle\n")
    with pytest.raises(SystemExit) as error:
        questions.main(["decompose", str(tmp_path / "p.txt"), "--llm", str(tmp_path / "llm"), "--out", str(tmp_path / "q.jsonl")])
    assert "gave no valid questions for any of 1 prompts in 5 tries each" in str(error.value)


# ---- the judge ----


def test_all_questions_of_an_image_are_answered_as_one_by_one_and_it_is_encoded_once(monkeypatch):
    judge = judge.load_judge(str(TOY.parent / "judge"), batch_size=4)
    images, counted, features = torch.rand(3, 3, 32, 32), [], judge.Judge.features
    monkeypatch.setattr(judge.Judge, "features", lambda self, x: counted.append(len(x)) or features(self, x))
    asked = ["is there a circle ?", "is the picture clean ?", "are there three squares ?", "is this a red circle ?", "are the shapes whole ?"]
    of = [0, 0, 2, 1, 2]
    together = judge.yes_probability(images, asked, of)
    assert counted == [3]
    alone = torch.cat([judge.yes_probability(images[i:i + 1], [q]) for i, q in zip(of, asked)])
    assert torch.allclose(together, alone, atol=1e-5) and ((together >= 0) & (together <= 1)).all()


def test_spellings_of_yes_are_found_in_the_tokenizer_and_counted_once():
    words = {"yes": 3, "Yes": 4, " yes": 5, " Yes": 4, "no": 0}
    tokenizer = lambda text, add_special_tokens: SimpleNamespace(input_ids=[words[text]] if text in words else [8, 9])  # noqa: E731
    tokenizer.unk_token_id = 0
    assert judge.spellings(tokenizer, "yes") == [3, 5, 4] and judge.spellings(tokenizer, "no") == []


def test_a_judge_that_does_not_think_of_yes_and_no_is_reported(monkeypatch):
    judge = judge.load_judge(str(TOY.parent / "judge"))
    monkeypatch.setattr(judge.Judge, "next_logits", lambda self, seen, asked: torch.zeros(len(asked), 50).index_fill(1, torch.tensor([40]), 30.0))
    with pytest.raises(ValueError, match="the judge puts .* of its probability on yes and no"):
        judge.yes_probability(torch.rand(1, 3, 32, 32), ["is there a circle ?"])


# ---- edits ----


@given(st.integers(0, 10**6))
def test_an_edit_is_true_of_its_target_and_false_of_its_source(seed):
    rng = np.random.default_rng(seed)
    m = world.toy_edit(rng).metadata
    assert shapes.edited(m["source"], m["target"], m["target"]) == (True, True)
    changed, kept = shapes.edited(m["source"], m["target"], m["source"])
    assert not changed and kept
    others = sorted(set(m["source"]) & set(m["target"]))
    if others:                                                  # one of the others is lost, or something comes beside it
        assert shapes.edited(m["source"], m["target"], [o for o in m["target"] if o != others[0]]) == (True, False)
    stranger = ("square", "purple", 9, 9) if m["tag"] != "add" else ("square", "purple", 9, 9)
    assert shapes.edited(m["source"], m["target"], [*m["target"], stranger])[1] is False or stranger[0] in m["prompt"]
    assert shapes.edited(m["source"], m["target"], ()) == (m["tag"] == "remove", not others)


def test_an_added_thing_may_stand_anywhere_free_but_only_once():
    source, target = (("circle", "red", 0, 0),), (("circle", "red", 0, 0), ("square", "blue", 0, 1))
    assert shapes.edited(source, target, (source[0], ("square", "blue", 1, 1))) == (True, True)
    assert shapes.edited(source, target, (source[0], ("square", "blue", 1, 1), ("square", "blue", 0, 1))) == (True, False)
    assert shapes.edited(source, target, (source[0], ("square", "red", 1, 1))) == (False, False)


def test_edits_of_a_file_are_read_with_their_questions_and_cut_square(tmp_path):
    Image.new("RGB", (60, 32), (200, 30, 0)).save(tmp_path / "i.png")
    row = {"image": "i.png", "instruction": "make the circle red", "caption": "a red circle", **{k: v for k, v in LINE.items() if k != "prompt"}}
    (tmp_path / "e.jsonl").write_text(json.dumps(row))
    cfg = small(tmp_path, "--recipe", "alphagrpo", "--edits", tmp_path / "e.jsonl", "--edit", 2)
    (batch,) = tasks.Source(cfg, load_policy(TOY)).batches(0, ALONE)
    assert batch.task == "edit" and batch.rows[0].pixels.shape == batch.rows[0].full.shape == (3, 32, 32)
    assert [q.text for q in batch.rows[0].metadata["questions"]][:2] == ["is there a dog ?", "is the dog red ?"]
    train.train(cfg, ALONE)


@pytest.mark.parametrize("row, more, said", [
    (dict(image="gone.png"), ["--ins", "0", "--dvreward", "1"], "1 images do not exist"),
    (dict(instruction=""), [], r"lacks \['instruction'\]"),
    (dict(include=[{"class": "circle", "count": 1}]), ["--sem", "1"], '--sem compares an edited image with a caption of it'),
    (dict(), ["--recipe", "alphagrpo"], "--dvreward has no questions for 1 of 1 prompts")])
def test_edits_that_cannot_be_used_are_refused(tmp_path, row, more, said):
    Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
    (tmp_path / "e.jsonl").write_text(json.dumps({"image": "i.png", "instruction": "make it red", **row}))
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        tasks.Source(small(tmp_path, "--edits", tmp_path / "e.jsonl", "--edit", 2, "--kn", "0", *more), load_policy(TOY))


def test_images_of_mixed_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images have the sizes \[\(8, 8\), \(8, 9\)\], must all be of one"):
        Samples(["a", "b"], [{}, {}], images=[torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)])


# ---- layouts ----


def laid_out(policy, name, guidance=None, G=3):
    """A rollout of a task of the toy in training, two prompts of different length."""
    cfg = parse(["--recipe", "lvrpo", "--window", "2"])
    task, choices = tasks.TASKS[name], tasks.choices_of(cfg, tasks.LOOK["toy"]["neutral"], (0, 2), (1, 3))
    rows = [task.toy()((3, 0, 1), 8, range(8))[i] for i in (0, 5)]
    if task.begin:
        rows, _ = task.begin(policy, rows, choices, seed=0, step=0, index=[0, 1], n=1)
    return sample_plan(policy, task.plan(rows, choices), seed=0, step=0, prompts=[0, 1], G=G, guidance=guidance)


def logp_of(scored):
    return scored.logp if scored.flow is None else scored.flow.logp


@pytest.mark.parametrize("guidance", [None, Guidance(3.0), Guidance(3.0, 2.0, "text_channel", 0.0, (0.0, 1.0))])
@pytest.mark.parametrize("name", ["edit", "reflect", "rounds"])
def test_replay_is_rollout_in_every_layout_whole_and_in_micro_batches(policy, name, guidance):
    r = laid_out(policy, name, guidance)
    for scored in replay_rollout(policy, r):
        assert torch.allclose(logp_of(scored), logp_of(scored.segment) if scored.flow is None else scored.segment.flow.logp, atol=1e-5) \
            if scored.flow is not None else torch.allclose(scored.logp, scored.segment.logp, atol=1e-5)
    for whole, part in zip(replay_rollout(policy, r), replay_rollout(policy, subset(r, range(1, 2), range(1, 3)))):
        assert torch.allclose(logp_of(whole)[4:6], logp_of(part), atol=1e-5)


def test_the_second_image_of_two_rounds_has_a_window_of_its_own(policy):
    first, second = (s.flow.window for s in laid_out(policy, "rounds").segments if getattr(s, "flow", None))
    assert (first, second) == ((0, 2), (1, 3))


def gradients(policy, losses):
    policy.zero_grad()
    for loss in losses:
        loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["reflect", "rounds"])
def test_segment_by_segment_gradients_add_up_to_the_whole(policy, name):
    r = laid_out(policy, name)
    weights = [torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(r.chosen)]
    loss = lambda scored, w: (logp_of(scored).sum(1) * w).sum()  # noqa: E731
    whole = gradients(policy, [sum(loss(s, w) for s, w in zip(replay_rollout(policy, r), weights))])
    parts = gradients(policy, (loss(replay_rollout(policy, r, only=i)[0], w) for i, w in enumerate(weights)))
    assert whole.keys() == parts.keys() and len(whole) > 20
    for n in whole:
        assert (whole[n] - parts[n]).norm() <= 1e-4 * whole[n].norm() + 1e-6, n
    policy.zero_grad()


def test_a_picture_that_is_read_back_leaks_no_gradient_into_its_own_segment(policy):
    """Of what stands behind the first picture, only reading it can reach the latents and pixels that are kept: they have no graph, and the
    generation expert's head, which drew it, gets no gradient from the second text."""
    r = laid_out(policy, "rounds")
    (first, *_) = [s for s in r.segments if getattr(s, "flow", None)]
    assert not first.flow.data.requires_grad and not any(p.requires_grad for p in first.pixels)
    grads = gradients(policy, [logp_of(replay_rollout(policy, r, only=2)[0]).sum()])
    assert "latent_out.weight" not in grads and grads["embed.weight"].norm() > 0
    policy.zero_grad()


def test_the_guided_velocitys_gradient_is_that_of_finite_differences():
    policy = load_policy(TOY).double()
    r = laid_out(load_policy(TOY), "edit", Guidance(2.0, 1.5, "text_channel", 0.0, (0.0, 1.0)), G=2)
    wide = lambda held: replace(held, **{k: v.double() for k, v in vars(held).items() if isinstance(v, torch.Tensor) and v.is_floating_point()})
    see, read, drawn = r.segments
    see = replace(see, pixels=[p.double() for p in see.pixels], latents=see.latents.double())
    r = replace(r, segments=(see, read, replace(drawn, flow=wide(drawn.flow))))
    value = lambda: replay_rollout(policy, r)[0].flow.logp.sum()  # noqa: E731
    weight = policy.blocks[1].experts[1].v.weight
    policy.zero_grad()
    value().backward()
    direction = weight.grad / weight.grad.norm()                # norms and rotations are fp32 inside, so the difference must be large
    with torch.no_grad():
        ends = []
        for h in (1e-3, -2e-3):
            weight += h * direction
            ends.append(value())
    assert weight.grad.norm().item() == pytest.approx(((ends[0] - ends[1]) / 2e-3).item(), rel=1e-3)


# ---- runs ----


RECIPES = {"alphagrpo": ["--think", 2], "alphagrpo_reflect": ["--reflect", 2], "unigrpo_rounds": ["--rounds", 2]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_a_step_and_logs_what_it_learns(tmp_path, recipe):
    train.train(small(tmp_path, "--recipe", recipe, *RECIPES[recipe]), ALONE)
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])
    task = RECIPES[recipe][0][2:]
    assert row["grad_norm"] > 0 and 0 <= row[f"{task}/truth"] <= 1
    if recipe != "unigrpo_rounds":
        assert 0 <= row[f"{task}/rewards/dvreward/Existence"] <= 1
    if task != "think":
        assert {f"{task}/initial", f"{task}/repaired", f"{task}/spoiled"} <= row.keys()


def test_guidance_in_training_is_the_policys_mean_in_rollout_and_replay(tmp_path):
    run = train.begin(small(tmp_path, "--recipe", "alphagrpo_reflect", "--reflect", 2, "--think", 2, "--guidance", 2, "--image_guidance", 1.5), ALONE)
    stats = train.one_step(run, 0)
    assert max(v for k, v in stats.items() if k.startswith("self_check/")) < 1e-4
    think, reflect = (r.guidance for _, r, _ in run.work)
    assert think == Guidance(2.0) and reflect == Guidance(2.0, 1.5, "text_channel", 0.0, (0.0, 1.0))


def test_the_lowest_of_the_first_pictures_is_refined(policy):
    rows = [rows.prompt_row(m) for m in PROMPTS]
    choices = tasks.choices_of(parse([]), "{prompt}", (0, 3))
    seen = []

    def value(samples):
        seen.append(samples.images)
        return samples.images.mean((1, 2, 3)).cpu()

    begun, least = tasks.first_drawn(policy, rows, choices, seed=0, step=1, index=[4, 5, 6], n=3, value=value)
    groups = value(SimpleNamespace(images=seen[0])).view(3, 3)
    assert torch.equal(least, groups.amin(1))
    for b, row in enumerate(begun):
        assert torch.allclose(row.source, seen[0][3 * b + groups[b].argmin()], atol=1e-6)
        assert torch.allclose(row.full * 0.5 + 0.5, row.source) and row.text == PROMPTS[b]["prompt"]
    (again, _), (one, _) = (tasks.first_drawn(policy, rows[:n], choices, seed=0, step=1, index=[4, 5, 6][:n], n=1) for n in (3, 1))
    assert torch.allclose(again[0].full, one[0].full, atol=1e-5)                                   # whoever else is in the batch


def test_first_pictures_drawn_in_parts_are_those_drawn_at_once(tmp_path):
    seen = []
    for name, more in (("whole", []), ("parts", ["--rollout_batch", 2])):
        run = train.begin(small(tmp_path / name, "--recipe", "alphagrpo_reflect", "--reflect", 3, "--initial", 2, *more), ALONE)
        (batch,) = run.source.batches(0, ALONE)
        seen.append(train.begun(run, batch))
    whole, parts = seen
    assert torch.allclose(whole.initial, parts.initial, atol=1e-5) and len(parts.rows) == 3
    assert all(torch.allclose(a.full, b.full, atol=1e-5) for a, b in zip(whole.rows, parts.rows))


def test_a_step_in_which_nothing_improves_changes_nothing(tmp_path, monkeypatch):
    run = train.begin(small(tmp_path, "--recipe", "alphagrpo_reflect", "--reflect", 2), ALONE)
    before = {n: p.detach().clone() for n, p in run.policy.named_parameters()}
    worse = iter([torch.ones(2), torch.rand(8) * 0.9])
    monkeypatch.setitem(run.rewards, "dvreward", lambda samples: next(worse))
    stats = train.one_step(run, 0)
    assert stats["reflect/improved"] == 0 and all(torch.equal(p, before[n]) for n, p in run.policy.named_parameters())


def test_a_step_in_which_nothing_improves_stops_momentum_too(tmp_path, monkeypatch):
    run = train.begin(small(tmp_path, "--recipe", "alphagrpo_reflect", "--reflect", 2), ALONE)
    train.one_step(run, 0)
    before = {n: p.detach().clone() for n, p in run.policy.named_parameters()}
    worse = iter([torch.ones(2), torch.rand(8) * 0.9])
    monkeypatch.setitem(run.rewards, "dvreward", lambda samples: next(worse))
    train.one_step(run, 1)
    assert all(torch.equal(p, before[n]) for n, p in run.policy.named_parameters())


def test_segments_go_with_the_generation_expert_alone(tmp_path):
    train.train(small(tmp_path, "--recipe", "alphagrpo", "--think", 2, "--segments", "--experts", "generation"), ALONE)


def test_edits_of_several_sizes_are_drawn_in_chunks_as_whole():
    tiny = load_policy(evaluation.Path(__file__).parent / "golden" / "bagel_tiny")
    side, patch = tiny.config.stride, tiny.config.vit["patch_size"]
    made = lambda unit, n: torch.rand(3, 2 * unit, n * unit, generator=torch.Generator().manual_seed(n)) * 2 - 1  # noqa: E731
    pixels, full = ([made(unit, n) for n in (2, 3)] for unit in (patch, side))
    draw = Draw((2 * side, 2 * side), flow_grpo.time_grid(3), (0, 2), 0.5)
    walk = lambda i: sample_plan(tiny, [sample.See(pixels[i], full[i]), sample.Read(["a", "b"][i]), draw], seed=0, step=0,  # noqa: E731
                                 prompts=list(range(2))[i], G=2)
    whole, parts = walk(slice(None)), sample.join([walk(slice(i, i + 1)) for i in range(2)])
    for a, b in zip(replay_rollout(tiny, whole), replay_rollout(tiny, parts)):
        assert torch.allclose(a.flow.logp, b.flow.logp, atol=1e-4)


def test_refinements_that_do_not_improve_are_pushed_nowhere_or_down(tmp_path, monkeypatch):
    """Group minimum and initial reward through the loop; the anchor pushes all of them down."""
    for i, (more, want) in enumerate((
            (["--rectify", "group"], lambda adv, better: (adv[~better] <= 0).all()),
            (["--rectify", "initial"], lambda adv, better: (adv[~better] <= 0).all()),
            (["--rectify", "off", "--baseline", "anchor"], lambda adv, better: (adv[~better] < 0).all()))):
        run = train.begin(small(tmp_path / str(i), "--recipe", "alphagrpo_reflect", "--reflect", 2, *more), ALONE)
        rewards = torch.tensor([0.2, 0.3, 0.9, 0.4, 0.1, 0.2, 0.3, 0.35])
        values = iter([torch.full((2,), 0.5), rewards])
        monkeypatch.setitem(run.rewards, "dvreward", lambda samples: next(values))
        train.one_step(run, 0)
        ((_, _, adv),) = run.work
        assert want(adv, rewards > 0.5) and adv[2] > 0


@pytest.mark.parametrize("more, said", [
    (["--recipe", "alphagrpo", "--rectify", "group"], "no task of this run refines; see --reflect"),
    (["--recipe", "alphagrpo_reflect", "--normalise", "each", "--advantage", "group"], "--normalise each compares no refinement"),
    (["--initial", "2"], "--initial 2 is of first pictures that are refined"),
    (["--instruction", "failed"], "--instruction failed is of tasks that look at a picture"),
    (["--dv", "q.jsonl"], "--dv q.jsonl is of --dvreward and --tifa"),
    (["--image_guidance", "2"], "--image_guidance 2 acts under --guidance above 1 alone")])
def test_settings_without_effect_are_refused(more, said):
    with pytest.raises(ValueError, match=said):
        check(parse(more), ALONE)


def test_memory_counts_images_that_are_read_and_the_referees(policy):
    need = {r: memory(policy, parse(["--recipe", r]), 1) for r in ("unigrpo", "unigrpo_rounds", "alphagrpo_reflect")}
    assert need["unigrpo"]["referees"] == 0
    rounds = [memory(policy, parse(["--recipe", "unigrpo_rounds", *more]), 1)["replay"] for more in ([], ["--segments"])]
    assert rounds[0] > rounds[1] > 0                            # both images' noisy steps at once, or one image's
    numbers = sum(p.numel() for p in judge.load_judge(str(TOY.parent / "judge")).model.parameters())
    assert need["alphagrpo_reflect"]["referees"] == pytest.approx(4e-9 * numbers, rel=0.1)
    plain = memory(policy, parse(["--recipe", "alphagrpo", "--think", "24"]), 1)
    assert need["alphagrpo_reflect"]["rollout"] > plain["rollout"]


# ---- refinement at inference ----


def refined(policy, select, value, rounds=2):
    draw = Draw((32, 32), flow_grpo.time_grid(4, 2.0))
    return refine(policy, [m["prompt"] for m in PROMPTS] * 2, rounds, select, value, [draw], [Write(24, 0.0), draw],
                  look=tasks.LOOK["toy"]["neutral"], seed=0)


def test_refinement_by_the_judge_never_lowers_its_score_and_always_takes_the_new(policy):
    prompts = [m["prompt"] for m in PROMPTS] * 2
    judged = refinement.value_of("judge", prompts, str(TOY.parent / "judge"), "cpu")
    rounds = refined(policy, "judge", judged)
    for old, new in zip(rounds, rounds[1:]):
        assert (new.value >= old.value).all() and torch.allclose(judged(new.kept), new.value, atol=1e-5)
    for each in refined(policy, "always", judged):
        assert torch.equal(each.kept, each.drawn) and torch.equal(each.worth, each.value)


def test_the_oracle_leaves_what_is_right_and_replaces_what_is_wrong(policy):
    answers = iter([torch.tensor([1.0, 0, 0, 1, 0, 0]), torch.tensor([0.0, 1, 0, 0, 1, 0])])
    first, second = refined(policy, "oracle", lambda images: next(answers), rounds=1)
    assert second.value.tolist() == [1, 1, 0, 1, 1, 0]
    for n, right in enumerate((True, False, False, True, False, False)):
        assert torch.equal(second.kept[n], (first if right else second).drawn[n])


def test_the_command_line_refines_and_says_how_it_selects(tmp_path, capsys):
    out = str(tmp_path / "r.png")
    sample.main(["two squares", "--refine", "1", "--select", "oracle", "--n", "2", "--steps", "2", "--out", out])
    assert "selected by oracle; truth: round 0: mean" in capsys.readouterr().out and Image.open(out).width > 400


@pytest.mark.parametrize("argv, said", [
    (["a mood", "--refine", "1", "--select", "oracle"], "--select oracle asks the toy's exact detector"),
    (["a circle", "--refine", "1", "--edit", "x.png"], "--refine draws the prompt"), (["a circle", "--refine", "0"], "--refine 0: must be"),
    (["a circle", "--select", "judge"], "--select and --judge are of --refine")])
def test_bad_refinement_ends_in_one_line(argv, said, tmp_path):
    with pytest.raises(SystemExit) as error:
        sample.main([*argv, "--out", str(tmp_path / "x.png")])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_policy_that_cannot_see_is_refused(tmp_path):
    import shutil
    shutil.copytree(TOY, tmp_path / "blind")
    (tmp_path / "blind" / "vit_config.json").unlink()
    with pytest.raises(SystemExit) as error:
        sample.main(["a circle", "--refine", "1", "--policy", str(tmp_path / "blind"), "--out", str(tmp_path / "x.png")])
    assert "vit_config.json" in str(error.value) and "\n" not in str(error.value)


def test_refinement_is_compared_with_drawing_as_many_pictures(monkeypatch, policy, tmp_path):
    monkeypatch.setattr(tasks, "PROMPTS_PER_TAG", 1)
    monkeypatch.setattr(evaluation, "ODE_STEPS", 2)
    table = refinement.refinement(policy, str(TOY.parent / "judge"), rounds=1, samples=2)
    assert set(table) == {"refine, always", "refine, judge", "refine, oracle", "best, judge", "best, oracle"}
    assert all(len(each) == 2 and each[0] == table["refine, always"][0] for each in table.values())
    assert table["best, oracle"][1] >= table["best, judge"][1] and table["refine, oracle"][1] >= table["refine, oracle"][0]
    assert refinement.print_refinement(table).count("\n") == 3
