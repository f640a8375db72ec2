"""The vision-language model's training: packed questions are separate ones; it learns, resumes, and is judged right."""

import copy
import json
import random

import pytest
import torch

from patchkit.zoo import stills
from patchkit.zoo.chat import load_chat
from patchkit.zoo.questions import KINDS, Question, View, ask_all
from patchkit.zoo.training import vlm, vlm_assemble, vlm_evaluate, vlm_model, vlm_tower
from patchkit.zoo.training.plot import read_log
from patchkit.zoo.training.vlm import Stage
from patchkit.zoo.training.vlm_evaluate import Sample
from patchkit.zoo.training.vlm_rows import HINTS, Batch, Hints, Packer, pixels
from patchkit.zoo.world import COLOURS, SHAPES

STAGES = (Stage(2, 2, 60, False), Stage(1, 4, 60, True))


def _run(out, stages=STAGES):
    out.mkdir(exist_ok=True)
    run = vlm.Run(out, stages, lr=0.02, seed=0)
    run.resume()
    return run


@pytest.fixture(scope="module")
def model():
    return vlm_model.build_model().eval()


def _drawn(n, seed=0):
    rng = random.Random(seed)
    shown = [stills.draw(stills.sample_description(rng, 1.0), rng) for _ in range(n)]
    return [View.of_still(s) for s in shown], pixels(stills.render(shown))


def _logits(model, rows, pictures):
    batch = Batch.of(rows, 0)
    with torch.no_grad():
        out = model(input_ids=batch.ids, pixel_values=pictures, attention_mask=batch.mask, position_ids=batch.places)
    return batch, out.logits


def test_packed_questions_are_as_if_asked_alone(model):
    views, pictures = _drawn(2)
    packer = Packer()
    asked = [ask_all(v, random.Random(0)) for v in views]
    asked[1] = asked[1][:3]  # a shorter row, which is padded
    batch, together = _logits(model, [packer.row(q) for q in asked], pictures)
    for n, questions in enumerate(asked):
        for question, (begin, end) in zip(questions, packer.row(questions).answers, strict=True):
            alone = packer.row([question])
            ((first, last),) = alone.answers
            _, expected = _logits(model, [alone], pictures[n : n + 1])
            assert (together[n, begin - 1 : end - 1] - expected[0, first - 1 : last - 1]).abs().max() < 1e-4
            told = packer.tokenizer.decode(batch.labels[n, begin - 1 : end - 1])
            assert told == f"{question.answer} </s>"
    assert (batch.labels >= 0).sum() == sum(e - b for q in asked for b, e in packer.row(q).answers)


def test_the_mask_is_needed(model):
    """In a conversation the turns before are seen, and the answers then differ."""
    views, pictures = _drawn(1)
    packer, questions = Packer(), ask_all(views[0], random.Random(0))
    apart, chat = packer.row(questions), packer.row(questions, chat=True)
    assert chat.places == list(range(len(chat.ids)))
    assert max(apart.places) < 110 < len(chat.ids)
    _, one = _logits(model, [apart], pictures)
    _, two = _logits(model, [chat], pictures)
    a, b = apart.answers[-1], chat.answers[-1]
    assert apart.ids[a[0] : a[1]] == chat.ids[b[0] : b[1]]
    assert (one[0, a[0] - 1] - two[0, b[0] - 1]).abs().max() > 1e-3


def test_the_mask_is_the_models_own_for_one_question(model):
    """The training's mask and positions give what a plain causal call gives."""
    views, pictures = _drawn(1)
    row = Packer().row(ask_all(views[0], random.Random(0))[:1])
    _, packed = _logits(model, [row], pictures)
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([row.ids]), pixel_values=pictures).logits
    assert (packed - plain).abs().max() < 1e-4


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    whole = _run(tmp_path / "whole")
    whole.fit()
    first = _run(tmp_path / "broken")
    first.train_step()
    first.train_step()
    first.checkpoint()
    second = _run(tmp_path / "broken")
    assert second.step == 2
    second.fit()
    for mine, theirs in ((whole.average, second.average), (whole.model, second.model)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    (row,) = read_log(tmp_path / "whole" / "log.jsonl")
    assert row["step"] == 3
    assert 0 <= row["right"] <= 1


def test_training_lowers_the_loss_and_teaches_words(tmp_path):
    run = _run(tmp_path / "run", (Stage(200, 4, 0, False),))
    losses = [run.train_step() for _ in range(16)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_every_weight_that_is_used_learns(tmp_path):
    run = _run(tmp_path / "run")
    run.loss(random.Random(0))[0].backward()
    idle = {n for n, p in run.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    tower = "llava.model.vision_tower"
    assert {n.removeprefix(f"{tower}.") for n in idle} == {  # what LLaVA leaves unused of CLIP
        "post_layernorm.weight",
        "post_layernorm.bias",
    }
    owned = [id(p) for o in run.optimisers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in run.model.parameters())
    assert len(run.optimisers[0].param_groups[0]["params"]) == 7 * vlm_model.LAYERS + 6 * vlm_model.TOWER_LAYERS + 2


def test_the_share_of_right_answers_is_counted(tmp_path):
    run = _run(tmp_path / "run")
    pictures, batch, _ = run.batch(random.Random(0))
    run.loss(random.Random(0))
    with torch.no_grad():
        logits = run.model["llava"](
            input_ids=batch.ids, pixel_values=pictures, attention_mask=batch.mask, position_ids=batch.places
        ).logits
    rights = []
    for n, row in enumerate(batch.labels):
        told: list[bool] = []
        for place in (row >= 0).nonzero().flatten().tolist():
            told.append(bool(logits[n, place].argmax() == row[place]))
            if row[place] == run.packer.tokenizer.eos_token_id:
                rights.append(all(told))
                told = []
    assert run.right == [(sum(rights), len(rights))]
    assert len(rights) >= 6


def test_the_last_word_that_speaks_of_an_object_has_to_tell_it():
    still = stills.Still(
        stills.Description.parse("a red circle left of a blue square on a black background"),
        ((16.0, 32.0, 8.0), (48.0, 32.0, 8.0)),
    )
    view = View.of_still(still)
    asked = [
        Question("shape", "tell me: what is the blue shape?", "the blue shape is a square", (("the blue shape", 1),)),
        Question("yes or no", "is there a red square?", "no", (("a red square", None),)),
        Question("yes or no", "is the square right of the circle?", "yes", (("the square", 1), ("the circle", 0))),
        Question("count", "how many shapes are there?", "two"),
    ]
    packer = Packer()
    row = packer.row(asked)
    words = packer.tokenizer.convert_ids_to_tokens([row.ids[token] for token, _ in row.named])
    assert words == ["shape", "square", "square", "circle"]
    hints = Hints.of([row], [view], [still])
    assert hints.there.tolist() == hints.painted.tolist() == [1, 0, 1, 1]
    assert [SHAPES[n] for n in hints.shape[hints.there > 0]] == ["square", "square", "circle"]
    assert hints.colour[3].tolist() == pytest.approx(COLOURS["red"])
    assert hints.place[0].tolist() == [0.75, 0.5]

    shape = torch.nn.functional.one_hot(hints.shape, len(SHAPES)) * 50.0
    right = torch.cat([shape, hints.colour, hints.place, hints.there[:, None] * 100 - 50], dim=-1)
    assert hints.loss(right) < 1e-6
    untold = right.clone()
    untold[1, : sum(HINTS) - 1] = 7.0  # of what is not there nothing else is asked
    assert hints.loss(untold) < 1e-6
    for column in (SHAPES.index("square"), len(SHAPES), sum(HINTS) - 2, sum(HINTS) - 1):
        wrong = right.clone()
        wrong[0, column] -= 60
        assert hints.loss(wrong) > 1, column
    tinted = Hints.of([row], [view], [stills.tint(still, random.Random(0))])
    assert not tinted.painted.any()
    assert tinted.shaped.tolist() == hints.there.tolist()
    reshaped = Hints.of([row], [view], [stills.reshape(still, random.Random(0))])
    assert not reshaped.shaped.any()
    assert reshaped.painted.tolist() == hints.there.tolist()
    assert Hints.of([packer.row(asked[3:])], [view], [still]).loss(torch.zeros(0, sum(HINTS))) == 0


def test_what_the_model_is_built_for(model):
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads) == (8, 2)
    assert text.num_hidden_layers >= 6
    assert model.config.image_seq_length == 64 == (vision.image_size // vision.patch_size) ** 2
    assert sum(p.numel() for p in model.parameters()) < 2.4e6


def test_the_tower_starts_with_patterns_and_places(model):
    embeddings = model.model.vision_tower.embeddings
    patterns = embeddings.patch_embedding.weight.detach().flatten(1)
    gram = patterns @ patterns.T
    assert torch.allclose(gram, gram.diag().diag(), atol=1e-5)  # no pattern says what another one says
    assert (gram.diag() > 0).sum() == vlm_model.WIDTH - vlm_model.PLACES
    places = embeddings.position_embedding.weight[1:, -vlm_model.PLACES :]
    assert torch.cdist(places, places).add(9 * torch.eye(64)).min() > 0.5
    assert torch.allclose(places @ vlm_model.turn(1, -2).T, vlm_model.waves(8, 1, -2), atol=1e-5)


def test_the_towers_heads_look_at_the_neighbours(model):
    """Before any training, a patch of any picture looks most at the neighbour that its head is for, mostly."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = tower(_drawn(8)[1], output_attentions=True).attentions
    for maps, offsets in zip(attentions, (vlm_model.SIDES, vlm_model.CORNERS), strict=False):
        for head, (row, column) in enumerate(offsets):
            inner = [(r, c) for r in range(1, 7) for c in range(1, 7)]
            seen = torch.stack([maps[:, head, 1 + 8 * r + c, 1:] for r, c in inner])
            wanted = torch.tensor([8 * (r + row) + c + column for r, c in inner])
            assert (seen.argmax(dim=-1) == wanted[:, None]).float().mean() > 0.6


def test_two_pictures_come_in_the_second_stage(tmp_path):
    run = _run(tmp_path / "run")
    seen = []
    for run.step in (0, 2, 5):
        pictures, batch, _ = run.batch(random.Random(run.step))
        seen.append((len(pictures), len(batch.ids)))
    assert seen == [(2, 2), (4, 4), (4, 2)]


class _Oracle:
    """Answers from the pictures themselves, or always the same."""

    def __init__(self, samples, always=None):
        self.known, self.always = {(s.question.text, id(s.pictures[0])): s.question.answer for s in samples}, always

    def answers(self, questions, pictures):
        return [self.always or self.known[q, id(p[0])] for q, p in zip(questions, pictures, strict=True)]


def test_the_judge_counts_right():
    _, pictures = vlm_evaluate.draw_pictures(12, 1, "new_scenes")
    asked = vlm_evaluate.samples_of(pictures, 1)
    samples = [s for about in asked for s in about]
    perfect, _ = vlm_evaluate.judge(_Oracle(samples), asked)
    assert {k: v["share"] for k, v in perfect.items()} == dict.fromkeys((*KINDS, "all", "one_a_picture"), 1.0)
    assert perfect["one_a_picture"]["of"] == 12
    assert perfect["all"]["of"] == len(samples) == 96
    constant, _ = vlm_evaluate.judge(_Oracle(samples, always="yes"), asked)
    yes = sum(s.question.answer == "yes" for s in samples)
    assert constant["yes or no"]["share"] == pytest.approx(yes / 12, abs=1e-4)
    assert constant["all"]["share"] == pytest.approx(yes / 96, abs=1e-4)
    assert constant["count"]["best_constant"] == 1.0


def test_swapped_pictures_keep_the_questions():
    _, pictures = vlm_evaluate.draw_pictures(4, 1, "seen")
    asked = vlm_evaluate.samples_of(pictures, 1)
    other = vlm_evaluate.swapped(asked)
    assert [one.question for (one,) in other] == [about[n % len(about)].question for n, about in enumerate(asked)]
    for mine, theirs in zip(asked, other, strict=True):
        assert mine[0].pictures[0] is not theirs[0].pictures[0]


def test_groups_are_what_they_say():
    for group, (held_out, count) in vlm_evaluate.GROUPS.items():
        views, pictures = vlm_evaluate.draw_pictures(30, 1, group)
        assert pictures.shape == (30, 3, 64, 64)
        if count:
            assert {len(v.things) for v in views} == {count}
            assert {v.description.held_out for v in views} == {held_out}


def test_pictures_with_questions_are_drawn(tmp_path):
    _, pictures = vlm_evaluate.draw_pictures(3, 1, "seen")
    asked = vlm_evaluate.samples_of(pictures, 1)
    answers = [s.question.answer for about in asked for s in about]
    vlm_evaluate.show(asked, answers, tmp_path / "a.png", rows=2)
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_assembled_model_loads_and_answers(tmp_path):
    run = _run(tmp_path / "run")
    run.train_step()
    run.checkpoint()
    size = vlm_assemble.save(vlm_assemble.assemble(tmp_path / "run"), tmp_path / "model")
    assert 2e6 < size < 5e6
    pair = load_chat(tmp_path / "model")
    for a, b in zip(run.average["llava"].parameters(), pair.model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3
    sample = Sample(Question("count", "how many shapes are there?", "none"), (torch.zeros(3, 64, 64),))
    assert len(vlm_evaluate.answer(pair, [sample] * 3, batch=2)) == 3


def test_one_command_goes_through_all_stages(tmp_path, monkeypatch):
    """The real stages, cut to one step and a few pictures each."""
    from patchkit.zoo.training import __main__ as command

    short = [(vlm_tower, ["--steps", "1", "--batch", "2"]), (vlm, ["--stages", "1x2x60x1"])]
    for module, options in (*short, (vlm_evaluate, ["--n", "2", "--control", "1"])):
        full = module.main
        monkeypatch.setattr(module, "main", lambda argv, full=full, options=options: full([*argv, *options]))
    monkeypatch.setattr("sys.argv", ["training", "vlm", "--out", str(tmp_path / "run"), "--threads", "1"])
    command.main()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"tower", "training", "model", "evaluation", "loss.png"}
    result = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert set(result) == {"trained", "untrained_control"}
    assert {*vlm_evaluate.GROUPS, "two_pictures"} < set(result["trained"])
    assert "swapped" in result["trained"]["new_scenes"]
