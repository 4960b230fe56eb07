"""Law suites of adapted models. A new base family gets those that can depend on it in two lines.

Models are float64 where results are compared to rounding (some norms compute in float32 all the same) and float32
where equality is exact.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
import torch.nn.functional as F
from laws import shaken
from torch import Tensor, nn
from transformers import PreTrainedModel

import reft_lightning as rl

CLOSE = {"atol": 2e-6, "rtol": 1e-5}
COMPONENTS = ("block_output", "block_input", "attention_output", "mlp_output")


class Recorder:
    """A hook of somebody else: notes what comes out of a module, changes nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.seen: list[Tensor] = []
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    @property
    def last(self) -> Tensor:
        return self.seen[-1]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients(reft: rl.ReftModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in reft.interventions.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return found


class AdaptedModelLaws:
    """Laws that can depend on the architecture. Subclass with the name of a family of ``tiny``, or with make_base()."""

    family: str
    recomputed = {"atol": 1e-9, "rtol": 1e-5}  # noqa: RUF012  gradients with and without checkpointing

    def make_base(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        return tiny.model(self.family, dtype)

    def attach(self, base: PreTrainedModel | None = None, method: str = "loreft", **settings) -> rl.ReftModel:
        """Attach interventions that edit much, in the dtype of the base model."""
        base = self.make_base() if base is None else base
        reft = rl.attach(base, method, **{"rank": 2, "positions": "f2+l1", "heads": False, **settings})
        shaken(reft.to(base.dtype).interventions)
        return reft.eval()

    def hidden(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return the last hidden state of the real tokens of each row."""
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
        return [row[mask.bool()] for row, mask in zip(states, batch["attention_mask"], strict=True)]

    def loss(self, reft: rl.ReftModel, seed: int = 0) -> Tensor:
        batch = tiny.padded(tiny.rows(6, 4, seed=seed))
        return reft(**batch).logits.square().mean()

    def block(self, reft: rl.ReftModel, layer: int) -> nn.Module:
        return reft.base_model.get_submodule(reft.sites[str(layer)].path)

    # --- the base model stays what it is -------------------------------------------------------------------------

    def test_a_zero_edit_equals_the_base_exactly(self):
        base = self.make_base(torch.float32)
        batch = tiny.padded(tiny.rows(6, 4), "left")
        position_ids = {}
        if not reads_its_own_positions(base):
            position_ids["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        expected = base(**batch, **position_ids).logits
        for positions in ("f2+l1", "all"):
            reft = rl.attach(base, "direft", rank=2, init="identity", positions=positions, heads=False)
            assert torch.equal(reft(**batch).logits, expected)
        loreft = self.attach(base)
        assert not torch.equal(loreft(**batch).logits, expected)
        loreft.scale = 0.0
        assert torch.equal(loreft(**batch).logits, expected)

    def test_disabled_equals_the_base_exactly(self):
        reft = self.attach(base := self.make_base(torch.float32))
        batch = tiny.padded(tiny.rows(5, 5))
        expected, edited = base(**batch).logits, reft(**batch).logits
        with reft.disabled():
            with reft.disabled():
                pass
            assert torch.equal(reft(**batch).logits, expected)
        assert torch.equal(reft(**batch).logits, edited)
        with pytest.raises(KeyError), reft.disabled():
            raise KeyError
        assert torch.equal(reft(**batch).logits, edited)

    def test_the_base_model_called_by_itself_is_unedited(self):
        batch = tiny.padded(tiny.rows(5, 5))
        untouched = self.make_base(torch.float32)
        reft = self.attach(base := self.make_base(torch.float32))
        base.train()
        base.gradient_checkpointing_enable()
        reft(**batch).logits.sum().backward()
        reft(**batch)  # no backward pass follows
        base.gradient_checkpointing_disable()
        base.eval()
        assert torch.equal(base(**batch).logits, untouched(**batch).logits)
        reft(**batch)
        inside, expected = base.base_model(**batch), untouched.base_model(**batch)
        assert torch.equal(inside.last_hidden_state, expected.last_hidden_state)

    # --- which tokens are edited ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("positions", ["f2+l1", "all"])
    def test_padding_side_and_amount_change_nothing(self, positions):
        reft = self.attach(positions=positions)
        texts = tiny.rows(6, 3, 1, 5)
        expected = self.hidden(reft, tiny.padded(texts))
        alone = [self.hidden(reft, tiny.padded([text]))[0] for text in texts]
        torch.testing.assert_close(expected, alone, **CLOSE)
        for side, extra in (("left", 0), ("left", 3), ("right", 3)):
            got = self.hidden(reft, tiny.padded(texts, side, extra))
            torch.testing.assert_close(got, expected, **CLOSE)
        unedited = self.hidden(reft.base_model, tiny.padded(texts))
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(expected, unedited, strict=True))

    @pytest.mark.parametrize("component", [name for name in COMPONENTS if name.endswith("output")])
    def test_unselected_tokens_at_the_site_are_unchanged(self, component):
        base = self.make_base(torch.float32)
        where = rl.attach(copy.deepcopy(base), rank=1, heads=False, layers=[1], component=component).sites[
            "1"
        ]
        module = base.get_submodule(where.path)
        before = Recorder(module)
        reft = self.attach(base, layers=[1], component=component)
        after = Recorder(module)
        reft(**tiny.padded(tiny.rows(6, 3)))
        shape = (2, 6, -1)  # some feed-forward modules see tokens of all rows in one list
        changed = (before.last.view(shape) != after.last.view(shape)).any(-1).int().tolist()
        assert changed == [[1, 1, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0]]

    # --- gradients and hooks -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("component", COMPONENTS)
    def test_gradient_checkpointing_gives_the_same_gradients(self, component):
        reft = self.attach(component=component)
        reft.train()
        self.loss(reft).backward()
        expected = copy.deepcopy(gradients(reft))
        reft.zero_grad()
        inside = rl.attach(
            copy.deepcopy(reft.base_model), rank=1, heads=False, layers=[1], component="attention_output"
        )
        before = Recorder(reft.base_model.get_submodule(inside.sites["1"].path))
        reft.base_model.gradient_checkpointing_enable()
        self.loss(reft).backward()
        assert len(before.seen) == 2, "no block was run again: checkpointing is not on"
        torch.testing.assert_close(gradients(reft), expected, **self.recomputed)

    def test_hooks_of_others_survive_and_see_the_edit(self):
        base = self.make_base()
        paths = [rl.attach(copy.deepcopy(base), rank=1, heads=False).sites[str(i)].path for i in range(2)]
        theirs = [Recorder(base.get_submodule(path)) for path in paths]
        reft = self.attach(base)
        late = Recorder(base.get_submodule(paths[0]))
        reft.train()
        base.gradient_checkpointing_enable()
        self.loss(reft).backward()
        with reft.disabled():
            self.loss(reft)
        counts = [len(hook.seen) for hook in (*theirs, late)]
        assert min(counts) == 2  # an older transformers runs some again for the gradient
        assert not torch.equal(theirs[0].seen[0], late.seen[0])
        for hook in (*theirs, late):
            assert hook.handle.id in hook.handle.hooks_dict_ref()
        assert torch.equal(theirs[0].seen[0], theirs[0].seen[-1])


class ReftModelLaws(AdaptedModelLaws):
    """Laws that do not depend on the architecture: inherited by one decoder and one encoder."""

    def test_a_failed_call_leaves_nothing_behind(self):
        reft = self.attach(base := self.make_base(torch.float32))
        batch = tiny.padded(tiny.rows(5, 5))
        expected = base(**batch).logits
        with pytest.raises(IndexError):
            reft(input_ids=torch.tensor([[3, 4, base.config.vocab_size]]))  # no such token
        assert torch.equal(base(**batch).logits, expected)

    def test_training_changes_interventions_and_nothing_else(self):
        reft = self.attach(self.make_base(torch.float32))
        base, own = weights(reft.base_model), weights(reft.interventions)
        trained = [p for p in reft.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in reft.interventions.parameters()}
        optimizer = torch.optim.AdamW(reft.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            self.loss(reft).backward()
            optimizer.step()
        assert equal(weights(reft.base_model), base)
        assert all(p.grad is None for p in reft.base_model.parameters())
        moved = weights(reft.interventions)
        assert not any(torch.equal(moved[name], own[name]) for name in own)

    def test_the_order_of_the_batch_is_irrelevant(self):
        reft = self.attach()
        batch = tiny.padded(tiny.rows(6, 3, 5))
        order = torch.tensor([2, 0, 1])
        expected = self.hidden(reft, batch)
        got = self.hidden(reft, {key: value[order] for key, value in batch.items()})
        torch.testing.assert_close(got, [expected[i] for i in order], **CLOSE)

    def test_scale_multiplies_the_edit(self):
        base = self.make_base()
        before = Recorder(
            base.get_submodule(rl.attach(copy.deepcopy(base), rank=1, heads=False).sites["0"].path)
        )
        reft = self.attach(base, layers=[0])
        after = Recorder(self.block(reft, 0))
        batch = tiny.padded(tiny.rows(6))
        reft(**batch)
        edit = after.last - before.last
        reft.scale = -0.5
        reft(**batch)
        assert edit.abs().max() > 1e-2
        torch.testing.assert_close(after.last - before.last, -0.5 * edit, **CLOSE)

    def test_one_call_leaves_no_trace_in_the_next(self):
        """A call with other shapes, masks and positions in between changes nothing (pyreft's sticky use_fast)."""
        reft = self.attach(self.make_base(torch.float32))
        batch = tiny.padded(tiny.rows(6, 3), "left")
        expected = reft(**batch).logits
        reft(input_ids=tiny.rows(9)[0][None])
        with torch.no_grad():
            reft(**tiny.padded(tiny.rows(2, 2, 2)))
        assert torch.equal(reft(**batch).logits, expected)

    def test_a_change_of_parameters_is_seen_at_once(self):
        reft = self.attach()
        batch = tiny.padded(tiny.rows(6))
        with torch.no_grad():
            first = reft(**batch).logits
            for phi in reft.interventions["0"]:
                phi.basis.data.copy_(torch.randn_like(phi.basis))  # behind autograd's back
            second = reft(**batch).logits
        assert (first - second).abs().max() > 1e-3
        torch.testing.assert_close(reft(**batch).logits, second, **CLOSE)

    def test_a_call_leaves_the_base_model_s_checkpointing_as_it_was(self):
        reft = self.attach()
        reft.train()
        reft.base_model.gradient_checkpointing_enable()

        def functions():
            return [vars(module).get("_gradient_checkpointing_func") for module in reft.base_model.modules()]

        before = functions()
        assert any(before)
        self.loss(reft).backward()
        assert all(a is b for a, b in zip(before, functions(), strict=True))

    def test_checkpointed_calls_may_be_followed_by_others_before_the_backward_pass(self):
        reft = self.attach(component="mlp_output")
        reft.train()
        self.loss(reft, 0).backward()
        self.loss(reft, 1).backward()
        expected = copy.deepcopy(gradients(reft))
        reft.zero_grad()
        reft.base_model.gradient_checkpointing_enable()
        first, second = self.loss(reft, 0), self.loss(reft, 1)
        with torch.no_grad():
            reft(**tiny.padded(tiny.rows(3, 3, 3)))
        (first + second).backward()
        torch.testing.assert_close(gradients(reft), expected, **self.recomputed)

    def test_gradients_are_those_of_finite_differences(self):
        reft = self.attach(layers=[0, 1])
        self.loss(reft).backward()
        # A change of 1e-3 must be visible although some norms round to float32.
        for parameter in list(reft.interventions.parameters())[:3]:
            direction = torch.randn_like(parameter)
            slope = (parameter.grad * direction).sum()
            step, losses = 1e-3, []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * step * direction)
                    losses.append(self.loss(reft))
                    parameter.sub_(sign * step * direction)
            torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope, atol=1e-3, rtol=1e-2)

    def test_two_adapters_on_one_base_do_not_meet(self):
        base, batch = self.make_base(torch.float32), tiny.padded(tiny.rows(5, 4))
        first = self.attach(base)
        expected = first(**batch).logits
        second = self.attach(base, "direft", positions="all")
        assert torch.equal(first(**batch).logits, expected)
        assert not torch.equal(second(**batch).logits, expected)

    def test_train_and_eval_reach_everything(self):
        reft = self.attach(dropout=0.5)
        batch = tiny.padded(tiny.rows(5, 4))
        assert reft.train() is reft
        assert all(module.training for module in reft.modules())
        assert not torch.equal(reft(**batch).logits, reft(**batch).logits)
        assert reft.eval() is reft
        assert not any(module.training for module in reft.modules())
        assert torch.equal(reft(**batch).logits, reft(**batch).logits)

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_a_copy_edits_by_its_own_parameters(self, way):
        reft = self.attach(self.make_base(torch.float32))
        batch = tiny.padded(tiny.rows(5, 4))
        expected = reft(**batch).logits  # a call before the copy: its graph must not be in the way
        other = copy.deepcopy(reft) if way == "deepcopy" else pickle.loads(pickle.dumps(reft))
        assert torch.equal(other(**batch).logits, expected)
        shaken(other.interventions, seed=5)
        changed = other(**batch).logits
        assert not torch.equal(changed, expected)
        assert torch.equal(reft(**batch).logits, expected)
        other.scale = 0.0
        assert torch.equal(reft(**batch).logits, expected)
        with other.disabled():
            assert torch.equal(reft(**batch).logits, expected)

    def test_low_precision_base_models_work(self):
        for dtype in (torch.bfloat16, torch.float16):
            reft = self.attach(self.make_base(dtype))
            assert {p.dtype for p in reft.interventions.parameters()} == {torch.float32}
            assert (reft.dtype, reft.device) == (dtype, torch.device("cpu"))
            loss = self.loss(reft)
            loss.float().backward()
            assert loss.isfinite()
            assert all(grad.isfinite().all() for grad in gradients(reft).values())

    def test_autocast_keeps_the_rows_orthonormal(self):
        reft = self.attach(self.make_base(torch.float32), method="lobireft", layers=[0])
        batch = tiny.padded(tiny.rows(5))
        phi = reft.interventions["0"][0]
        lent = []
        phi.register_forward_hook(lambda module, args, output: lent.append(module.R))
        with torch.autocast("cpu", torch.bfloat16):
            reft(**batch)
        torch.testing.assert_close(lent[0] @ lent[0].T, torch.eye(2), atol=1e-6, rtol=0)


def exact_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the next token in the dtype of the logits."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def reads_its_own_positions(base: PreTrainedModel) -> bool:
    return base.config.model_type in ("roberta", "opt")


class DecoderLaws(AdaptedModelLaws):
    """Further laws of causal language models."""

    def batch(self) -> dict[str, Tensor]:
        return tiny.prompt_target(tiny.rows(6, 2, 4), tiny.rows(3, 4, 1, seed=1))

    def loss(self, reft: rl.ReftModel, seed: int = 0) -> Tensor:
        batch = tiny.prompt_target(tiny.rows(6, 4, seed=seed), tiny.rows(3, 2, seed=seed + 9))
        labels = batch.pop("labels")
        return exact_loss(reft(**batch).logits, labels)

    def test_labels_and_prompt_mask_say_the_same(self):
        reft, batch = self.attach(self.make_base(torch.float32)), self.batch()
        expected = reft(**batch)
        assert torch.equal(
            reft(**{k: v for k, v in batch.items() if k != "prompt_mask"}).logits, expected.logits
        )
        assert torch.equal(reft(**{k: v for k, v in batch.items() if k != "labels"}).logits, expected.logits)
        everything = reft(batch["input_ids"], batch["attention_mask"]).logits
        assert not torch.equal(everything, expected.logits)

    def test_the_layout_of_the_batch_does_not_matter(self):
        """prompt | target, and the ordinary right-padded rows, give the same logits of real tokens."""
        reft = self.attach()
        prompts, targets = tiny.rows(6, 2, 4), tiny.rows(3, 4, 1, seed=1)
        split = tiny.prompt_target(prompts, targets)
        plain = tiny.padded([torch.cat(pair) for pair in zip(prompts, targets, strict=True)])
        plain["prompt_mask"] = torch.arange(plain["input_ids"].shape[1]) < torch.tensor([[6], [2], [4]])
        a, b = (self.hidden(reft, {k: v for k, v in x.items() if k != "labels"}) for x in (split, plain))
        torch.testing.assert_close(a, b, **CLOSE)

    def test_target_only_logits_give_the_same_loss_and_gradients(self):
        reft, batch = self.attach(), self.batch()
        kept = 4 + 1  # the longest target and the column before it
        cut = {**batch, "labels": batch["labels"][:, -kept:], "logits_to_keep": kept}
        results = []
        for inputs in (batch, cut):
            reft.zero_grad()
            out = reft(**inputs)
            exact_loss(out.logits, inputs["labels"]).backward()
            results.append((out.loss, out.logits[:, -kept:], copy.deepcopy(gradients(reft))))
        (loss, logits, expected), (cut_loss, cut_logits, got) = results
        torch.testing.assert_close(
            cut_loss, loss, atol=1e-5, rtol=1e-5
        )  # transformers computes it in float32
        torch.testing.assert_close(cut_logits, logits, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)

    def test_the_edit_of_a_prompt_does_not_see_the_target(self):
        """The prompt's hidden states in training are those of the prompt alone, as in generation."""
        reft = self.attach()
        prompts = tiny.rows(6, 2, 4)
        alone = self.hidden(reft, tiny.padded(prompts, "left"))
        batch = tiny.prompt_target(prompts, tiny.rows(3, 4, 1, seed=1))
        batch.pop("labels")
        together = self.hidden(reft, batch)
        torch.testing.assert_close(
            [h[: len(p)] for h, p in zip(together, prompts, strict=True)], alone, **CLOSE
        )


class EncoderLaws(AdaptedModelLaws):
    """Further laws of encoders with a classification head."""

    def loss(self, reft: rl.ReftModel, seed: int = 0) -> Tensor:
        return reft(**tiny.padded(tiny.rows(6, 4, seed=seed)), labels=torch.tensor([0, 1])).loss

    def test_labels_of_whole_texts_leave_the_text_a_prompt(self):
        reft = self.attach(self.make_base(torch.float32))
        batch = tiny.padded(tiny.rows(6, 4))
        expected = reft(**batch).logits
        assert torch.equal(reft(**batch, labels=torch.tensor([0, 1])).logits, expected)
        reft.base_model.config.problem_type = "multi_label_classification"
        several = reft(**batch, labels=torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        assert torch.equal(several.logits, expected)
        assert several.loss.isfinite()

    def test_a_head_is_trained_beside_the_interventions(self):
        reft = self.attach(self.make_base(torch.float32), heads=["classifier"])
        head = {id(p) for p in reft.base_model.classifier.parameters()}
        assert {id(p) for p in reft.parameter_roles()["head"]} == head
        assert {id(p) for p in reft.base_model.parameters() if p.requires_grad} == head
        before = weights(reft.base_model)
        optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=0.01)
        self.loss(reft).backward()
        optimizer.step()
        changed = {
            name for name, tensor in weights(reft.base_model).items() if not torch.equal(tensor, before[name])
        }
        assert changed == {name for name in before if name.startswith("classifier.")}
