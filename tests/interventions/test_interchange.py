"""DAS, boundless DAS and CDAS: laws, published formulas, and hidden states that come from another text."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from laws import D, OrthonormalLaws, R, shaken, tokens
from model_laws import CLOSE

import reft_lightning as rl
from reft_lightning.interventions import CDAS, DAS, BoundlessDAS, Tokens


def other(h):
    """Return what stands for the source of tokens: another token for each, of which it knows nothing else."""
    return h.flip(-1) * 1.5 + 0.3


class FromOther:
    """Takes from :func:`other` where no text is given, as the laws call an intervention."""

    def edit(self, h):
        states, one = other(h)[:, None], torch.ones(len(h), dtype=torch.long)
        where = Tokens(torch.arange(len(h)), len(h), one.bool(), source=(states, one))
        return self.edit_rows(h, where).edit


class GivenDAS(FromOther, DAS):
    pass


class GivenBoundlessDAS(FromOther, BoundlessDAS):
    pass


class GivenCDAS(FromOther, CDAS):
    pass


class TestDAS(OrthonormalLaws):
    cls = GivenDAS

    def make(self, **settings):
        return self.cls(D, R, **settings)

    def num_parameters(self):
        return R * D

    def formula(self, phi, h):
        rows = torch.linalg.qr(phi.basis.mT).Q  # of which DAS knows the span alone
        pairs = zip(h, other(h), strict=True)
        return torch.stack([row + rows @ (rows.mT @ s - rows.mT @ row) for row, s in pairs])

    def test_it_is_the_identity_at_its_identity_parameters(self):
        phi, h = DAS(D, R), tokens()
        where = replace(Tokens.alone(h), source=(h[None], torch.tensor([len(h)])))
        assert torch.equal(
            phi(h, 1.0, where), h
        )  # for no parameters, but where the source is the text itself

    def test_it_has_the_coordinates_of_the_source(self, phi):
        h = tokens()
        torch.testing.assert_close(phi(h) @ phi.R.mT, other(h) @ phi.R.mT, atol=1e-5, rtol=1e-5)
        whole = self.cls(D, D)
        torch.testing.assert_close(whole(h), other(h), atol=1e-5, rtol=1e-5)


class TestBoundlessDAS(TestDAS):
    cls = GivenBoundlessDAS

    def make(self, **settings):
        return self.cls(D, R, start=2.0, end=0.5, **settings)

    def num_parameters(self):
        return R * D + 1

    def formula(self, phi, h):
        boundary, total = 10 * phi.boundary.item(), torch.zeros_like(h)
        boundary = min(max(boundary, 1e-3), 1)
        for i, row in enumerate(phi.R):
            mask = 1 / (1 + math.exp(-i / 2.0)) / (1 + math.exp(-(boundary * R - i) / 2.0))
            total += mask * ((other(h) - h) @ row)[:, None] * row
        return h + total

    @pytest.fixture
    def phi(self):
        torch.manual_seed(0)
        return within(shaken(self.make()))

    def test_it_equals_the_papers_formula(self):
        phi = within(shaken(self.make().double()))
        phi.annealed = 0.0
        h = tokens(dtype=torch.float64)
        torch.testing.assert_close(phi(h), self.formula(phi, h), atol=1e-12, rtol=1e-12)

    def test_gradients_are_those_of_finite_differences(self):
        phi = within(shaken(self.make().double()))

        def outputs(h, *values):
            given = dict(zip([name for name, _ in phi.named_parameters()], values, strict=True))
            return torch.func.functional_call(phi, given, (h,))

        inputs = (tokens(2, torch.float64).requires_grad_(), *phi.parameters())
        assert torch.autograd.gradcheck(outputs, inputs)

    def test_it_has_the_coordinates_of_the_source(self):
        phi = self.cls(D, end=1e-4).eval()  # all directions, a hard edge
        with torch.no_grad():
            phi.boundary.fill_(0.0999)
        h = tokens()
        swapped = (phi(h) - h) @ phi.R.mT / ((other(h) - h) @ phi.R.mT)
        torch.testing.assert_close(swapped[:, 0], torch.full((7,), 0.5))  # as in pyvene
        torch.testing.assert_close(swapped[:, 1:], torch.ones(7, D - 1), atol=1e-4, rtol=1e-4)

    def test_the_temperature_falls_in_training_and_is_the_last_in_evaluation(self):
        phi = self.make().train()
        for annealed, T in ((0.0, 2.0), (0.5, 1.25), (1.0, 0.5)):
            phi.annealed = annealed
            from_0, to_boundary = torch.tensor([0.0, 1, 2]), torch.tensor([1.5, 0.5, -0.5])
            expected = torch.sigmoid(from_0 / T) * torch.sigmoid(to_boundary / T)
            torch.testing.assert_close(phi.mask(), expected)
        phi.annealed = 0.0
        torch.testing.assert_close(phi.eval().mask(), expected)
        assert self.make(sparsity=0.5).penalty().item() == pytest.approx(0.25)
        assert BoundlessDAS(D).rank == D
        with pytest.raises(ValueError, match=r"must be above 0; got 0 and 0\.1"):
            BoundlessDAS(D, start=0)


def within(phi):
    """Return it with a boundary between its ends, beyond which it has no gradient."""
    with torch.no_grad():
        phi.boundary.fill_(0.06)
    return phi


class TestCDAS(TestDAS):
    cls = GivenCDAS


# --- in a model -----------------------------------------------------------------------------------------------


def attached(method="das", dtype=torch.float64, **settings):
    torch.manual_seed(3)
    reft = rl.attach(tiny.model("llama", dtype), method, **{"rank": 3, "positions": "f1+l2", **settings})
    return reft.to(dtype).eval()


def sources(side="left"):
    texts = tiny.padded(tiny.rows(4, 7, 5, seed=4), side)
    return {"source_ids": texts["input_ids"], "source_mask": texts["attention_mask"]}


def states_of(base, texts, layer):
    return [base(text[None], output_hidden_states=True).hidden_states[layer + 1][0] for text in texts]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_take_the_hidden_states_of_the_other_text_in_their_places(side):
    reft = attached(rank=tiny.WIDTH, layers=[0, 1])  # the whole state
    texts = tiny.rows(6, 4, 5)
    swapped = reft(**tiny.padded(texts, side), **sources(side), output_hidden_states=True).hidden_states[2]
    others = states_of(reft.base_model, tiny.rows(4, 7, 5, seed=4), 1)
    for row, (text, theirs) in enumerate(zip(texts, others, strict=True)):
        start = 0 if side == "right" else 6 - len(text)
        found = swapped[row, start : start + len(text)]
        torch.testing.assert_close(found[[0, -2, -1]], theirs[[0, -2, -1]], **CLOSE)


def test_the_other_text_is_read_by_the_frozen_base_and_by_no_edit():
    one, both = (attached(layers=layers) for layers in ([1], [0, 1]))
    with torch.no_grad():
        both.interventions["1"][0].basis.copy_(one.interventions["1"][0].basis)
        both.interventions["0"][0].basis.copy_(one.interventions["1"][0].basis)
    inputs = tiny.padded(tiny.rows(6, 4, 5))
    first = attached(layers=[0])
    with torch.no_grad():
        first.interventions["0"][0].basis.copy_(one.interventions["1"][0].basis)
    R = one.interventions["1"][0].R
    alone, together = (
        reft(**inputs, **sources(), output_hidden_states=True).hidden_states[2] for reft in (one, both)
    )
    torch.testing.assert_close(alone[0, -1] @ R.mT, together[0, -1] @ R.mT, **CLOSE)


def test_generation_goes_on_from_the_exchanged_prompt():
    reft = attached(dtype=torch.float32, rank=8, layers=[1])
    prompts, settings = tiny.padded(tiny.rows(6, 4, 5), "left"), {"max_new_tokens": 5, "do_sample": False}
    cached = reft.generate(**prompts, **sources(), **settings)
    assert torch.equal(cached, reft.generate(**prompts, **sources(), **settings, use_cache=False))
    with reft.disabled():
        assert not torch.equal(cached, reft.generate(**prompts, **sources(), **settings))
    beams = reft.generate(**prompts, **sources(), **settings, num_beams=3)
    assert torch.equal(beams, reft.generate(**prompts, **sources(), **settings, num_beams=3, use_cache=False))
    alone = {name: value[1:2] for name, value in {**prompts, **sources()}.items()}
    assert torch.equal(cached[1:2], reft.generate(**alone, **settings))


def test_all_tokens_of_cdas_take_the_last_of_the_other_prompt():
    reft = attached("cdas", rank=tiny.WIDTH, positions="all", layers=[1])
    batch = tiny.prompt_target(tiny.rows(6, 2, 4), tiny.rows(3, 4, 1, seed=1))
    swapped = reft(**batch, **sources(), output_hidden_states=True).hidden_states[2]
    for row, theirs in enumerate(states_of(reft.base_model, tiny.rows(4, 7, 5, seed=4), 1)):
        found = swapped[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(found, theirs[-1:].expand_as(found), **CLOSE)


def test_latents_are_the_coordinates_that_clamping_needs():
    from reft_lightning.adapters.reft.measuring import watching

    reft, seen = attached("cdas", rank=1, positions="all", layers=[1]), []
    with watching(reft, lambda found: seen.append((found.before, found.latents))):
        reft(**tiny.padded(tiny.rows(5, 3, 4)), **sources())
    h, latents = seen[-1]
    torch.testing.assert_close(latents, h @ reft.interventions["1"][0].R.mT)


def test_gradients_are_the_same_under_checkpointing():
    reft = attached(layers=[0, 1]).train()
    batch = tiny.prompt_target(tiny.rows(6, 3, 4), tiny.rows(3, 4, 1, seed=1))

    def gradients():
        reft.zero_grad()
        reft(**batch, **sources()).loss.backward()
        return [p.grad.clone() for p in reft.interventions.parameters()]

    expected = gradients()
    assert all(g.abs().max() > 1e-6 for g in expected)
    reft.base_model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected, atol=1e-9, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    reft, inputs = attached(), tiny.padded(tiny.rows(6, 4, 5))
    with pytest.raises(ValueError, match="pass source_ids"):
        reft(**inputs)
    with pytest.raises(ValueError, match="source_ids have 2 rows, but the batch has 3"):
        reft(**inputs, source_ids=torch.ones(2, 5, dtype=torch.long))
    short = tiny.padded(tiny.rows(4, 2, 5, seed=4))
    others = {"source_ids": short["input_ids"], "source_mask": short["attention_mask"]}
    with pytest.raises(ValueError, match=r"row 1 has 3 tokens at the positions .* source text has 2"):
        reft(**inputs, **others)
    with pytest.raises(ValueError, match=r"loreft takes no hidden states from source_ids; das, .*cdas.* do"):
        rl.attach(tiny.model("llama"), "loreft", rank=2)(**inputs, **sources())
    for positions in ("all", "l1+decode"):
        with pytest.raises(
            ValueError, match=rf"das exchanges tokens between prompts, .* the positions {positions[:3]}"
        ):
            rl.attach(tiny.model("llama"), "das", rank=2, positions=positions)
    with pytest.raises(ValueError, match="not a sum of directions"):
        reft.add_partition("halves", [0])


def test_one_adapter_at_two_strengths_reads_the_sources_once():
    reft = rl.attach(tiny.model("llama"), "das", rank=2, layers=[1], positions="l1").eval()
    shaken(reft.interventions)
    inputs, others = tiny.padded(tiny.rows(6, 4, 5), "left"), sources("left")
    whole = reft(**inputs, **others).logits
    mixed = reft(**inputs, **others, adapter_names=["default", ("default", 0.5), "default"]).logits
    assert torch.equal(mixed[[0, 2]], whole[[0, 2]])
    reft.scale = 0.5
    torch.testing.assert_close(mixed[1], reft(**inputs, **others).logits[1])


@pytest.mark.parametrize("positions", ["critical:1", "given"])
def test_positions_that_only_the_text_itself_has_are_refused(positions):
    with pytest.raises(ValueError, match="takes hidden states from another text, in which positions"):
        rl.attach(tiny.model("llama"), "das", rank=2, positions=positions)
