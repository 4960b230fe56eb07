"""Edits that depend on whole prompts or on values of each row, and return more than hidden states."""

import copy

import pytest
import tiny
import torch
from laws import shaken
from model_laws import CLOSE, exact_loss

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import watching
from reft_lightning.evaluation.prefix_reader import ColumnReader
from reft_lightning.exchange.folding import affine
from reft_lightning.interventions import Found, Tokens
from reft_lightning.speed.choose_part import choose_part


class PromptGate(rl.Intervention, name="prompt_gate"):
    """A vector times a gate of the prompt."""

    def __init__(self, dim, **settings):
        super().__init__(dim, **settings)
        self.bias, self.condition = torch.nn.Parameter(torch.randn(dim)), torch.nn.Parameter(torch.randn(dim))

    def edit_rows(self, h, tokens):
        gate = tokens.keep(self, torch.tanh(tokens.mean_of_prompts(h @ self.condition)))
        return Found(gate[tokens.rows, None] * self.bias, gate.square().sum(), (h @ self.condition)[:, None])


class Concepts(rl.Intervention, name="concepts"):
    """A vector for each concept; the caller names that of each row."""

    def __init__(self, dim, concepts=3, **settings):
        super().__init__(dim, **settings)
        self.vectors = torch.nn.Parameter(torch.randn(concepts, dim))

    def edit_rows(self, h, tokens):
        return self.vectors[tokens.given["concept"][tokens.rows]]


class Shrinking(rl.RED, name="shrinking"):
    """RED that pays for the length of its bias."""

    def penalty(self):
        return self.bias.norm()


def attached(method="prompt_gate", dtype=torch.float64, **settings):
    torch.manual_seed(3)
    reft = rl.attach(tiny.model("llama", dtype), method, **{"positions": "all", **settings})
    shaken(reft.to(dtype).interventions)
    return reft.eval()


def batch():
    return tiny.prompt_target(tiny.rows(6, 2, 4), tiny.rows(3, 4, 1, seed=1))


def logits_of(reft, inputs, **more):
    given = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        return reft(**given, **more).logits[inputs["attention_mask"].bool()]


def test_a_row_is_read_as_if_it_were_alone():
    reft, texts = attached(), tiny.rows(6, 3, 1, 5)
    alone = torch.cat([logits_of(reft, tiny.padded([text])) for text in texts])
    for side, extra in (("right", 0), ("left", 2)):
        torch.testing.assert_close(logits_of(reft, tiny.padded(texts, side, extra)), alone, **CLOSE)


def test_what_the_prompt_said_is_kept_while_decoding():
    reft = attached(dtype=torch.float32)
    prompts = tiny.padded(tiny.rows(6, 3), "left")
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = reft.generate(**prompts, **settings)
    assert torch.equal(cached, reft.generate(**prompts, **settings, use_cache=False))
    settings |= {"num_beams": 3, "num_return_sequences": 2}
    beams = reft.generate(**prompts, **settings)
    assert torch.equal(beams, reft.generate(**prompts, **settings, use_cache=False))
    mask = torch.cat([prompts["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    forced = reft(cached, mask, prompt_mask=torch.nn.functional.pad(prompts["attention_mask"].bool(), (0, 6)))
    assert torch.equal(forced.logits[:, 5:-1].argmax(-1), cached[:, 6:])


def test_the_target_does_not_change_the_gate():
    reft = attached()
    prompts = tiny.rows(6, 2, 4)
    alone, together = tiny.padded(prompts, "left"), batch()
    seen = []
    with watching(reft, lambda found: seen.append((found.after - found.before, found.latents))):
        logits_of(reft, alone)
        logits_of(reft, together)
    assert seen[0][1].shape == (12, 1)
    torch.testing.assert_close(seen[3][0][[0, 9, 15]], seen[0][0][[0, 6, 8]], **CLOSE)  # a token of each row


def test_each_row_has_its_own_adapter_and_strength():
    reft = attached()
    reft.add_adapter("other", "prompt_gate", positions="f2")
    shaken(reft.double().adapters["other"], seed=8)
    inputs, names = tiny.padded(tiny.rows(5, 3, 4, 2)), ["other", ("default", 2.0), None, ("default", -1.0)]
    mixed = reft(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        torch.testing.assert_close(mixed[row], reft(**alone, adapter_names=[name]).logits[0], **CLOSE)
    settings = {"max_new_tokens": 4, "do_sample": False}
    left = tiny.padded(tiny.rows(5, 3, 4, 2), "left")
    texts = [
        reft.generate(**left, **settings, adapter_names=names, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*texts)


def test_the_caller_says_something_of_each_row():
    reft, inputs = attached("concepts"), tiny.padded(tiny.rows(5, 3), "left")
    both = reft(**inputs, row_values={"concept": torch.tensor([2, 0])}).logits
    for row, concept in enumerate((2, 0)):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        expected = reft(**alone, row_values={"concept": torch.tensor([concept])}).logits[0]
        torch.testing.assert_close(both[row], expected, **CLOSE)
    told = {"row_values": {"concept": torch.tensor([2, 0])}, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(reft.generate(**inputs, **told), reft.generate(**inputs, **told, use_cache=False))
    searched = reft.generate(**inputs, **told, num_beams=2)
    for row, concept in enumerate((2, 0)):
        alone = {k: v[row : row + 1] for k, v in inputs.items()} | told
        alone["row_values"] = {"concept": torch.tensor([concept])}
        assert torch.equal(reft.generate(**alone, num_beams=2)[0], searched[row])
    with pytest.raises(ValueError, match=r"row_values\['concept'\] has 3 rows, but the batch has 2"):
        reft(**inputs, row_values={"concept": torch.tensor([2, 0, 1])})


def test_a_penalty_joins_the_loss_in_training_only():
    for method, expected in (("prompt_gate", None), ("shrinking", 3)):
        reft, inputs = attached(method, positions="prompt"), batch()
        plain = reft(**inputs)
        assert "penalty" not in plain
        reft.train()
        out = reft(**inputs)
        torch.testing.assert_close(out.loss, plain.loss + out.penalty)
        if expected:
            norms = sum(group[0].bias.norm() for group in reft.interventions.values())
            torch.testing.assert_close(out.penalty, norms)
        reft.penalty_weight = 0.5
        torch.testing.assert_close(reft(**inputs).penalty, out.penalty / 2)
        with torch.no_grad():
            assert "penalty" not in reft(**inputs)
        with reft.disabled():
            assert "penalty" not in reft(**inputs)
        with pytest.raises(ValueError, match="return_dict=False"):
            reft(**inputs, return_dict=False)


@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_checkpointing_gives_the_same_gradients_of_loss_and_penalty(component):
    reft, inputs = attached(component=component).train(), batch()
    labels = inputs.pop("labels")

    def gradients():
        reft.zero_grad()
        out = reft(**inputs)
        (exact_loss(out.logits, labels) + out.penalty).backward()
        return [p.grad.clone() for p in reft.interventions.parameters()]

    expected = gradients()
    reft.base_model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected, atol=1e-9, rtol=1e-6)


def test_what_was_found_in_a_prompt_is_not_in_a_cache():
    reft, inputs = attached(dtype=torch.float32), tiny.padded(tiny.rows(5, 3), "left")
    assert reft(**inputs, use_cache=True).past_key_values is None
    with reft.disabled():
        cache = reft(**inputs, use_cache=True).past_key_values
    assert cache is not None
    whole = torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="PromptGate needs whole prompts"):
        reft(torch.full((2, 1), 5), whole, prompt_mask=whole.bool(), past_key_values=cache)
    with pytest.raises(ValueError, match="PromptGate needs whole prompts"):
        reft.generate(**inputs, max_new_tokens=2, prefill_chunk_size=2)


def test_shortcuts_step_aside():
    reft, inputs = attached(dtype=torch.float32, positions="l1"), {**batch(), "boundary": 6}
    reader = ColumnReader(reft)
    first = reader.logits(inputs)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 8:] = 7
    assert torch.equal(reader.logits(other)[:, :2], first[:, :2])
    assert reader.take_cache() is None

    class Rows:
        lengths, prompt_lengths = [40, 30], [30, 20]

    assert choose_part(reft, Rows, causal=True) is None
    with pytest.raises(ValueError, match="cannot be compiled: PromptGate"):
        reft.compile()
    with pytest.raises(ValueError, match="no weight can do that"):
        affine(reft.interventions["0"][0], tiny.WIDTH)


def test_files_and_copies_hold_everything(tmp_path):
    reft, inputs = attached(dtype=torch.float32), batch()
    reft.save_pretrained(tmp_path)
    loaded = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert torch.equal(logits_of(loaded, inputs), logits_of(reft, inputs))
    assert torch.equal(logits_of(copy.deepcopy(reft), inputs), logits_of(reft, inputs))


def test_tokens_are_summed_by_row():
    tokens = Tokens(torch.tensor([0, 0, 2, 2, 2]), 3, torch.tensor([True, False, True, True, False]))
    x = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    assert tokens.counts().tolist() == [2, 0, 3]
    assert tokens.sums(x).tolist() == [3.0, 0.0, 15.0]
    assert tokens.mean_of_prompts(x).tolist() == [1.0, 0.0, 4.0]
    assert tokens.padded(x, -1.0).tolist() == [[1.0, 2.0, -1.0], [-1.0, -1.0, -1.0], [3.0, 5.0, 7.0]]
    assert tokens.keep("a", torch.tensor([1.0, 1.0, 1.0])).tolist() == [1.0, 1.0, 1.0]
    assert tokens.keep("a", torch.tensor([2.0, 2.0, 2.0])).tolist() == [2.0, 1.0, 2.0]


def test_row_values_may_be_lists():
    reft = rl.attach(tiny.model("llama"), "difference_in_means", positions="all").train()
    signs = [1, -1, 1]
    found = [reft(**batch(), row_values={"sign": sign}).penalty for sign in (signs, torch.tensor(signs))]
    assert torch.equal(*found)
