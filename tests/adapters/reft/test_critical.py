"""Positions that a first pass finds: the tokens of a prompt that the others attend to most."""

import csv

import pytest
import tiny
import torch
from laws import shaken

import reft_lightning as rl
from reft_lightning.adapters.reft.critical import most_attended
from reft_lightning.adapters.reft.measuring import places_of, watching
from reft_lightning.adapters.reft.positions import parse_positions
from reft_lightning.config import compose
from reft_lightning.evaluation.prefix_reader import ColumnReader
from reft_lightning.runs import experiment
from reft_lightning.runs.build import outline


def eager(family="llama", dtype=torch.float32):  # in float64, left padding gives Hugging Face's softmax NaN
    model = tiny.model(family, dtype)
    model.set_attn_implementation("eager")
    return model


def attached(positions="critical:2", dtype=torch.float32, **settings):
    torch.manual_seed(3)
    reft = rl.attach(eager(dtype=dtype), "loreft", **{"rank": 2, "positions": positions, **settings})
    shaken(reft.to(dtype).interventions)
    return reft.eval()


def found_in(reft, inputs, **more):
    """Return which tokens were edited."""
    seen = []
    with watching(reft, lambda found: seen.append(found.before)):
        reft(**inputs, **more)
    return seen


def by_hand(model, text, count):
    """Return the columns of a prompt that are attended to most."""
    A = torch.stack(model(text[None], output_attentions=True).attentions).mean((0, 2))[0]  # (s, s)
    n = len(text)
    scores = [sum(A[i, j].item() for i in range(j, n)) / (n - j) for j in range(n)]
    return sorted(sorted(range(n), key=lambda j: -scores[j])[:count])


def test_the_score_is_the_mean_attention_of_the_tokens_that_come_no_earlier():
    A = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.7, 0.1, 0], [0.1, 0.1, 0.1, 0.7]])[None, None]
    prompt = torch.tensor([[True, True, True, False]])  # 0.57, 0.6 and 0.1
    assert most_attended([A, None], prompt, 1).tolist() == [[False, True, False, False]]
    assert most_attended([A], prompt, 2).tolist() == [[True, True, False, False]]
    assert most_attended([A], prompt, 9).tolist() == prompt.tolist()
    with pytest.raises(ValueError, match=r"its attn_implementation must stay eager"):
        most_attended([None], prompt, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_prompt_has_its_own_whatever_its_padding_and_its_target(side):
    reft, texts = attached(layers=[0]), tiny.rows(7, 3, 1, 5)
    expected = [by_hand(reft.base_model, text, 2) for text in texts]
    assert len({tuple(columns) for columns in expected}) > 2
    rows = [reft.base_model(text[None], output_hidden_states=True).hidden_states[1][0] for text in texts]
    wanted = torch.cat([row[columns] for row, columns in zip(rows, expected, strict=True)])
    torch.testing.assert_close(found_in(reft, tiny.padded(texts, side, 2))[0], wanted, atol=1e-4, rtol=1e-4)
    with_target = tiny.prompt_target(texts, tiny.rows(2, 4, 1, 1, seed=5))
    torch.testing.assert_close(found_in(reft, with_target)[0], wanted, atol=1e-4, rtol=1e-4)


def test_generation_edits_what_training_does():
    reft = attached(dtype=torch.float32)
    prompts, settings = tiny.padded(tiny.rows(6, 3, 5), "left"), {"max_new_tokens": 5, "do_sample": False}
    cached = reft.generate(**prompts, **settings)
    assert torch.equal(cached, reft.generate(**prompts, **settings, use_cache=False))
    assert not torch.equal(cached, attached("l2", dtype=torch.float32).generate(**prompts, **settings))
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    forced = reft(cached, mask, prompt_mask=torch.nn.functional.pad(prompts["attention_mask"].bool(), (0, 5)))
    assert torch.equal(forced.logits[:, 5:-1].argmax(-1), cached[:, 6:])
    beams = reft.generate(**prompts, **settings, num_beams=3)
    assert torch.equal(beams, reft.generate(**prompts, **settings, num_beams=3, use_cache=False))
    base = eager().generate(**prompts, **settings)
    with reft.disabled():
        assert torch.equal(reft.generate(**prompts, **settings), base)


def test_marks_of_the_caller_are_for_given_only():
    reft, inputs = attached(layers=[0]), tiny.padded(tiny.rows(6, 3))
    marks = torch.ones(2, 6, dtype=torch.bool)
    assert len(found_in(reft, inputs, edit_mask=marks)[0]) == len(found_in(reft, inputs)[0]) == 4


def test_an_encoder_s_tokens_are_attended_to_by_all_others():
    attention = torch.full((1, 1, 6, 6), 1 / 6)
    attention[..., 1] = 2 / 6
    prompt = torch.ones(1, 6, dtype=torch.bool)
    assert most_attended([attention], prompt, 1, causal=False).nonzero().tolist() == [[0, 1]]


def test_caches_and_other_attention_are_refused():
    with pytest.raises(
        ValueError, match=r"critical:N need the attention weights .* model\.attn_implementation=eager"
    ):
        rl.attach(tiny.model("llama"), "loreft", rank=2, positions="critical:2")
    reft, inputs = attached(), tiny.padded(tiny.rows(5, 3), "left")
    assert reft(**inputs, use_cache=True).past_key_values is None
    with reft.disabled():
        cache = reft(**inputs, use_cache=True).past_key_values
    whole = torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="found by reading the whole prompt"):
        reft(torch.full((2, 1), 5), whole, prompt_mask=whole.bool(), past_key_values=cache)
    two = attached(layers={0: {}, 1: {"positions": "critical:3"}})
    with pytest.raises(ValueError, match=r"critical:2, critical:3 are found .* the same N in all layers"):
        two(**inputs)
    for positions, said in (("critical", "cannot read 'critical'"), ("critical:2+l1", "'critical' already covers l"),
                            ("given+critical:2", "'critical' already covers given")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            parse_positions(positions)
    assert str(parse_positions("critical:4+decode")) == "critical:4+decode"
    assert places_of(reft) == ["critical:2"]
    with pytest.raises(ValueError, match="needs a fixed number of positions"):
        attached(tied="position")


def test_shortcuts_step_aside_and_files_hold_it(tmp_path):
    reft = attached(dtype=torch.float32)
    reader = ColumnReader(reft)
    batch = tiny.prompt_target(tiny.rows(6, 3), tiny.rows(2, 2, seed=1)) | {"boundary": 6}
    reader.logits(batch)
    assert reader.take_cache() is None
    reft.save_pretrained(tmp_path)
    loaded = rl.ReftModel.from_pretrained(eager(dtype=torch.float32), tmp_path).eval()
    prompts = tiny.padded(tiny.rows(6, 3), "left")
    assert torch.equal(loaded(**prompts).logits, reft(**prompts).logits)


def test_a_run_finds_them_itself(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        rows = ([f"number {i} is", "odd" if i % 2 else "even"] for i in range(16))
        csv.writer(file).writerows([["q", "a"], *rows])
    arguments = [
        "model=tiny_random", "data=custom", f"data.path={path}", "data.prompt=q", "data.target=a",
        "data.validation_size=4", "data.batch_size=4", "decoding.max_new_tokens=2", "intervention.rank=2",
        "intervention.positions=critical:3",
        "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.attn_implementation=eager"):
        outline(compose.compose(arguments))  # before a weight is loaded
    config = compose.compose([*arguments, "model.attn_implementation=eager"])
    assert experiment.run(config, tmp_path / "run")["steps"] == 6
