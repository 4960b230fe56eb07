"""ReFT-r1 and differences in means: laws, formulas, penalties, and what is found in closed form."""

import csv

import pytest
import short_runs
import tiny
import torch
from laws import D, InterventionLaws, shaken, tokens
from torch import nn

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import saved_interventions, watching
from reft_lightning.config import compose
from reft_lightning.interventions import CAST, RED, MeanDifference, ReFTr1, Tokens
from reft_lightning.runs import experiment
from reft_lightning.runs.build import outline
from reft_lightning.training.penalties import ExponentialPenalty, LinearPenalty, PIDPenalty, mean_penalty


def rows_of(*lengths):
    """Return the tokens of rows, all of them prompt."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Tokens(rows, len(lengths), torch.ones(len(rows), dtype=torch.bool))


class TestReFTr1(InterventionLaws):
    def make(self, **settings):
        return ReFTr1(D, top_k=3, **settings)

    def num_parameters(self):
        return D

    def formula(self, phi, h):
        v = phi.direction / phi.direction.square().sum().sqrt()
        detected = [max(0.0, sum(a * b for a, b in zip(row, v, strict=True))) for row in h]
        strength = sum(sorted(detected, reverse=True)[:3]) / 3
        return torch.stack([row + strength * v for row in h])

    def test_tokens_are_independent(self, phi):
        """Those of other rows; the tokens of one row share a strength."""
        h = tokens(7)
        together = phi(h, 1.0, rows_of(4, 3))
        torch.testing.assert_close(together, torch.cat([phi(h[:4]), phi(h[4:])]), atol=1e-6, rtol=1e-5)
        other = h.clone()
        other[1] += 3
        changed = (phi(other, 1.0, rows_of(4, 3)) - other != together - h).any(-1)
        assert changed.tolist() == [True] * 4 + [False] * 3

    def test_it_is_the_identity_at_its_identity_parameters(self):
        phi = self.make()  # for no parameters, but where nothing of v is found
        h = -tokens().abs() * phi.directions.sign()
        assert torch.equal(phi(h), h)

    def test_the_length_of_the_parameter_is_free(self, phi):
        before = phi(tokens())
        with torch.no_grad():
            phi.direction.mul_(7.0)
        torch.testing.assert_close(phi(tokens()), before, atol=1e-5, rtol=1e-5)
        assert phi.directions.norm().item() == pytest.approx(1, abs=1e-6)

    def test_the_penalty_is_the_mean_of_the_latents_that_are_not_on_top(self):
        phi = shaken(self.make(l1=0.5)).double()
        h, where = tokens(9, torch.float64), rows_of(5, 4)
        where.prompt[[3, 4, 8]] = False
        phi(h, 1.0, where)
        latents = (h @ phi.directions[0]).relu()
        means = []
        for row, prompt in ((range(5), range(3)), (range(5, 9), range(5, 8))):
            top = sorted(prompt, key=lambda i: -latents[i])[:3]
            means.append(sum(latents[i] for i in row if i not in top) / len(row))
        torch.testing.assert_close(where.found.penalty, 0.5 * sum(means) / 2)
        torch.testing.assert_close(where.found.latents, latents[:, None])

    def test_a_short_prompt_has_fewer_than_k(self):
        phi = shaken(self.make()).double()
        h = tokens(2, torch.float64)
        expected = (h @ phi.directions[0]).relu().mean() * phi.directions
        torch.testing.assert_close(phi(h) - h, expected.expand_as(h))

    def test_k_is_at_least_one(self):
        with pytest.raises(ValueError, match="top_k must be at least 1"):
            ReFTr1(D, top_k=0)


def test_latents_say_where_a_concept_is():
    reft = rl.attach(tiny.model("llama"), "reft_r1", layers=[1], positions="all", top_k=2).eval()
    shaken(reft.interventions)
    seen = []
    with watching(reft, lambda found: seen.append((found.before, found.latents))):
        reft(**tiny.padded(tiny.rows(5, 3)))
    (h, latents) = seen[0]
    torch.testing.assert_close(latents[:, 0], (h @ reft.interventions["1"][0].directions[0]).relu())


@pytest.mark.parametrize(
    ("positions", "tied"), [("decode", "all"), ("decode:2", "all"), ("l1+decode", "group")]
)
def test_a_strength_needs_tokens_of_the_prompt(positions, tied):
    with pytest.raises(ValueError, match="reft_r1 takes the strength of its edits from the prompt tokens"):
        rl.attach(tiny.model("llama"), "reft_r1", positions=positions, tied=tied)
    rl.attach(tiny.model("llama"), "reft_r1", positions="l1+decode")


class TestMeanDifference(InterventionLaws):
    def make(self, **settings):
        return shaken(MeanDifference(D, **settings))

    def num_parameters(self):
        return D

    def formula(self, phi, h):
        return h + phi.bias

    def test_it_is_the_identity_at_its_identity_parameters(self):
        assert torch.equal(MeanDifference(D)(tokens()), tokens())  # where it starts

    def test_one_step_of_gradient_descent_is_the_difference_of_the_means(self):
        h, where = tokens(10, torch.float64), rows_of(2, 3, 4, 1)
        for start in (0.0, 2.0):  # from anywhere
            phi = self.make().double()
            nn.init.constant_(phi.bias, start)
            where.given = {"sign": torch.tensor([1.0, 1.0, -1.0, -1.0])}
            phi(h, 1.0, where)
            where.found.penalty.backward()
            found = (phi.bias - phi.bias.grad).detach()
            expected = (h[:2].mean(0) + h[2:5].mean(0)) / 2 - (h[5:9].mean(0) + h[9]) / 2
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


class TestCAST(InterventionLaws):
    def make(self, **settings):
        phi = CAST(D, **{"threshold": -0.9, **settings})  # which every prompt of the laws is above
        phi.condition.data = torch.linspace(-1, 1, D)
        return shaken(phi)

    def num_parameters(self):
        return 2 * D

    def formula(self, phi, h):
        c, mean = phi.condition, sum(h) / len(h)
        left = torch.tanh(torch.outer(c, c) / (c @ c) @ mean)
        cosine = left @ mean / (left.norm() * mean.norm())
        return h + phi.bias if cosine > phi.threshold else h

    def test_it_is_the_identity_at_its_identity_parameters(self):
        assert torch.equal(CAST(D)(tokens()), tokens())  # where it starts
        assert torch.equal(
            shaken(self.make(threshold=0.99))(tokens()), tokens()
        )  # and where the gate is shut

    def test_tokens_are_independent(self, phi):
        """Those of other rows; the tokens of one row share a gate."""
        h = tokens(7)
        together = phi(h, 1.0, rows_of(4, 3))
        torch.testing.assert_close(together, torch.cat([phi(h[:4]), phi(h[4:])]), atol=1e-6, rtol=1e-5)

    def test_every_parameter_gets_a_gradient(self, phi):
        phi(tokens()).square().sum().backward()  # that of the condition by the sigmoid
        assert all(p.grad.abs().max() > 1e-6 for p in phi.parameters())

    def test_gradients_are_those_of_finite_differences(self):
        phi = shaken(self.make().double())
        h, c = tokens(5, torch.float64), torch.linspace(-1, 1, D, dtype=torch.float64).requires_grad_()
        phi.condition.data = c.detach()
        mean = h.mean(0)
        left = torch.tanh((mean @ c) / (c @ c) * c)
        soft = torch.sigmoid((torch.cosine_similarity(mean, left, dim=0) + 0.9) / 0.1)
        (5 * soft * phi.bias.detach().sum()).backward()
        phi(h).sum().backward()
        torch.testing.assert_close(phi.condition.grad, c.grad, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(phi.bias.grad, torch.full((D,), 5.0, dtype=torch.float64))

    @pytest.mark.parametrize("below", [False, True])
    def test_only_prompts_that_meet_the_condition_are_edited(self, below):
        phi = shaken(self.make(threshold=0.0, below=below))
        c = phi.condition.detach()
        h = torch.cat([c + 0.1 * tokens(4), -c * 2 + 0.1 * tokens(3)])
        like = (phi(h, 1.0, rows_of(4, 3)) != h).any(-1)
        assert like.tolist() == [not below] * 7  # P h has the side of c that h has
        aside = torch.linalg.qr(torch.stack([c, tokens()[0]]).mT).Q[:, 1]
        strict = shaken(self.make(threshold=0.5, below=below))
        h = torch.cat([c.repeat(2, 1), aside.repeat(2, 1) * 3])
        assert ((strict(h, 1.0, rows_of(2, 2)) != h).any(-1)).tolist() == [not below] * 2 + [below] * 2

    def test_a_threshold_is_a_cosine(self):
        with pytest.raises(ValueError, match="threshold is a cosine and must lie between -1 and 1"):
            CAST(D, threshold=3)


def test_one_layer_decides_for_those_above_it_once_a_prompt():
    reft = rl.attach(
        tiny.model("llama"), "cast", layers={0: {"threshold": 0.2}, 2: {"decides": False}}, positions="all"
    ).eval()
    assert sum(p.numel() for p in reft.interventions.parameters()) == 3 * tiny.WIDTH
    shaken(reft.interventions)
    prompts = tiny.padded(tiny.rows(6, 3, 4, 5), "left")
    seen = []
    with watching(reft, lambda found: seen.append((found.after - found.before).norm(dim=-1) > 1e-6)):
        ids = reft.generate(**prompts, max_new_tokens=4, do_sample=False)
    gates = seen[0][[0, 6, 9, 13]].tolist()
    assert set(gates) == {True, False}
    assert seen[1][[0, 6, 9, 13]].tolist() == gates
    assert [step.tolist() for step in seen[2:]] == [gates] * 6
    assert torch.equal(ids, reft.generate(**prompts, max_new_tokens=4, do_sample=False, use_cache=False))
    alone = rl.attach(tiny.model("llama"), "cast", layers=[1], decides=False, positions="all")
    with pytest.raises(ValueError, match="cast with decides=False needs a layer below that decides"):
        alone(**prompts)


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    path = tmp_path_factory.mktemp("choices") / "choices.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "yes", "no"])
        writer.writerows([f"is number {i} {'large' * (i % 3)}?", "A", "B"] for i in range(17))
    return path


def test_a_run_without_training_finds_the_mean_difference_of_all_pairs(choices, tmp_path):
    config = compose.compose([
        "model=tiny_random", "data=custom", f"data.path={choices}", "data.prompt=question", "data.target=yes",
        "data.options=[yes,no]", "data.validation_size=2", "data.batch_size=4", "decoding.max_new_tokens=2",
        "intervention=difference_in_means", "intervention.positions=decode:1", "intervention.layers=[0]",
        "objective=difference_in_means", "optimizer=closed_form", "trainer=closed_form", "scheduler=constant",
        "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    ])  # fmt: skip
    results = experiment.run(config, tmp_path / "run")
    assert results["steps"] == 1
    objects = experiment.build(config)
    model, rows = objects.model.base_model.eval(), objects.data.train_rows
    assert len(rows) == 15
    differences = []
    for pair in rows:
        texts = (torch.tensor([row.prompt_ids + row.target_ids]) for row in pair)
        states = [model(text, output_hidden_states=True).hidden_states[1] for text in texts]
        differences.append((states[0] - states[1])[0, len(pair[0].prompt_ids)].detach())
    reft = rl.ReftModel.from_pretrained(model, tmp_path / "run" / "adapter")
    expected = torch.stack(differences).mean(0)
    torch.testing.assert_close(reft.interventions["0"][0].bias, expected, atol=1e-5, rtol=1e-4)


def test_the_weight_of_penalties_follows_its_schedule():
    assert [LinearPenalty().weight(step, 4) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert ExponentialPenalty(0.5, 0.1).weight(10, 99) == pytest.approx(0.5 * 2.718281828**-1)


# --- a penalty under control ----------------------------------------------------------------------------------


def test_the_controller_follows_its_formula():
    pid = PIDPenalty(target=1.0, start=0.01, kp=0.1, ki=0.02, kd=0.05)
    weight, total, before = 0.01, 0.0, 0.0
    for penalty in (1.5, 1.2, 0.4):
        error = penalty - 1.0
        total += 0.02 * error
        weight *= 1 + 5 * (0.1 * error + total + 0.05 * (error - before))
        before = error
        pid.move(penalty)
        assert pid.state["weight"] == pytest.approx(weight)
    other = PIDPenalty(target=1.0)
    other.load_state_dict(pid.state_dict())
    assert other.state == pid.state
    for penalty, bound in ((9.0, 0.1), (-9.0, 1e-5)):
        for _ in range(9):
            pid.move(penalty)
        assert pid.state["weight"] == bound
    with pytest.raises(ValueError, match="must satisfy 0 < lowest <= start <= highest"):
        PIDPenalty(1.0, start=2.0)
    with pytest.raises(ValueError, match="the model has none"):
        mean_penalty(rl.attach(tiny.model("llama"), "red", positions="all"))


@pytest.mark.parametrize("method", ["red", "peft/lora"])
def test_a_pid_without_a_penalty_is_refused_before_weights_are_loaded(method):
    config = compose.compose(
        ["model=tiny_random", "data=boolq", f"intervention={method}", "callbacks=penalty_pid"]
    )
    with pytest.raises(ValueError, match=f"PIDPenalty.*{method} has none.*intervention=brep"):
        outline(config)


def test_a_run_of_brep_holds_the_length_of_its_vectors(choices, tmp_path):
    """The longer the vectors than the target, the heavier the penalty; targets are cut."""

    def lengths(target):
        config = compose.compose([
            "model=tiny_random", "data=custom", f"data.path={choices}", "data.prompt=question", "data.target=yes",
            "data.validation_size=0", "data.batch_size=3", "data.target_tokens=1", "decoding.max_new_tokens=2",
            "intervention=brep", "callbacks=penalty_pid", f"callbacks.penalty.target={target}", "optimizer.lr=5e-2",
            "+callbacks.penalty.highest=100", "+callbacks.penalty.kp=2", "trainer.max_epochs=8",
            "trainer.accelerator=cpu",
            "trainer.log_every_n_steps=4", "trainer.enable_progress_bar=false",
        ])  # fmt: skip
        experiment.run(config, tmp_path / str(target))
        rows = experiment.build(config).data.train_rows
        assert {len(row.target_ids) for row in rows} == {1}
        assert rows.targets == [1] * 17
        weights = short_runs.logged(tmp_path / str(target), "train/penalty_weight")
        phis = [phi for (phi,) in saved_interventions(tmp_path / str(target) / "adapter").values()]
        assert isinstance(phis[0], RED)
        return max(weights.values()), sum(phi.bias.norm().item() for phi in phis) / len(phis)

    (heavy, short), (light, long) = lengths(0.05), lengths(50)
    assert heavy > 0.01 > light
    assert short < 0.7 * long
