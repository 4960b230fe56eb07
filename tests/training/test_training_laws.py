"""What a plain PyTorch loop can rely on; nothing here uses Lightning."""

import pytest
import tiny
import torch

import reft_lightning as rl

METHODS = ["loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft"]
BATCH = tiny.prompt_target(tiny.rows(5, 3), tiny.rows(2, 3, seed=1))
TEXTS = tiny.padded(tiny.rows(6, 4)) | {"labels": torch.tensor([0, 1])}


def attached(method="loreft", family="llama", **settings):
    torch.manual_seed(2)
    settings = {"rank": 2, "positions": "f1+l1", **settings}
    return rl.attach(tiny.model(family), method, **settings)


def train(reft, steps, batch=BATCH, lr=0.02, **settings):
    trained = [p for p in reft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1, **settings)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = reft(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tensors(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method):
    losses = train(attached(method, positions="all"), 30)
    assert losses[-1] < 0.9 * losses[0]


def test_a_low_rank_edit_of_all_tokens_learns_a_batch_by_heart():
    losses = train(attached(positions="all", rank=4), 80, lr=0.05)
    assert losses[-1] < 0.1 * losses[0]


def test_the_adapter_state_with_the_base_is_the_whole_model():
    """The state after training, loaded into a fresh model, gives the same logits, so nothing trained is missing."""
    for family, settings, batch in (("llama", {}, BATCH), ("roberta", {"heads": ["classifier"]}, TEXTS)):
        reft = attached(family=family, **settings)
        train(reft, 3, batch)
        fresh = attached(family=family, **settings)
        assert not torch.equal(fresh(**batch).logits, reft(**batch).logits)
        fresh.load_adapter_state_dict(reft.adapter_state_dict())
        assert torch.equal(fresh.eval()(**batch).logits, reft.eval()(**batch).logits)


@pytest.mark.parametrize("clear", ["module", "optimizer"])
def test_zero_grad_clears_interventions_and_heads(clear):  # pyreft never resets the head's gradients (D3)
    reft = attached(family="roberta", heads=["classifier"])
    trained = {name: p for name, p in reft.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    gradients = []
    for _ in range(2):
        reft(**TEXTS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        (reft if clear == "module" else optimizer).zero_grad()
        assert all(p.grad is None for p in reft.parameters())
    assert not changed(*gradients)


def test_every_trained_parameter_has_one_role():
    reft = attached("loreft", family="roberta", heads=["classifier"], layers={0: {}, 1: {"method": "direft"}, 2: {
        "method": "consreft"}})  # fmt: skip
    roles = reft.parameter_roles()
    loreft, direft, consreft = (reft.interventions[key][0] for key in "012")
    expected = {
        "rotation": [loreft.basis, consreft.basis],  # the optimizer never decays these
        "weight": [loreft.source.weight, direft.source.weight, direft.projection.weight],
        "bias": [loreft.source.bias, direft.source.bias, consreft.bias],
        "head": list(reft.base_model.classifier.parameters()),
    }
    assert {role: {id(p) for p in found} for role, found in roles.items()} == {
        role: {id(p) for p in found} for role, found in expected.items()
    }
    given = [id(p) for found in roles.values() for p in found]
    assert sorted(given) == sorted(id(p) for p in reft.parameters() if p.requires_grad)


def rows_of(reft):
    return torch.stack([phi.R for group in reft.interventions.values() for phi in group])


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}])
def test_rows_stay_orthonormal_through_any_optimizer(kind):
    reft = attached()
    before = rows_of(reft)
    train(reft, 10, **kind)
    after = rows_of(reft)
    torch.testing.assert_close(after @ after.mT, torch.eye(2).expand(3, 2, 2), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-2


def test_training_on_after_loading_is_training_on(tmp_path):
    """A reloaded adapter takes the same next steps (pyreft puts R into a new random basis, D6)."""
    reft = attached()
    train(reft, 5)
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert train(again, 5) == train(reft, 5)
    assert not changed(reft.adapter_state_dict(), again.adapter_state_dict())
    rows = rows_of(again)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(2).expand(3, 2, 2), atol=1e-5, rtol=0)


def test_loading_keeps_the_parameters_that_an_optimizer_holds():
    reft, other = attached(), attached()
    train(other, 3)
    held = list(reft.parameters())
    optimizer = torch.optim.AdamW(reft.interventions.parameters(), lr=0.02)
    reft.load_adapter_state_dict(other.adapter_state_dict())
    assert all(a is b for a, b in zip(held, reft.parameters(), strict=True))
    before = rows_of(reft)
    reft(**BATCH).loss.backward()
    optimizer.step()
    assert (rows_of(reft) - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.popitem(), "missing interventions"),
        (lambda state: state.update(stray=torch.zeros(1)), "unexpected stray"),
        (
            lambda state: state.update({k: v[..., :1] for k, v in state.items()}),
            r"\(2, 1\) instead of \(2, 16\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(change, said):
    reft, state = attached(), {k: v + 1 for k, v in attached().adapter_state_dict().items()}
    change(state)
    before = tensors(reft.interventions)
    with pytest.raises(ValueError, match=said):
        reft.load_adapter_state_dict(state)
    assert not changed(before, tensors(reft.interventions))


def test_accumulated_gradients_are_those_of_one_batch():
    reft = attached()
    reft(**BATCH).logits[BATCH["attention_mask"].bool()].sum().backward()
    whole = {name: p.grad.clone() for name, p in reft.interventions.named_parameters()}
    reft.zero_grad()
    for row in range(2):
        part = {key: value[row : row + 1] for key, value in BATCH.items()}
        reft(**part).logits[part["attention_mask"].bool()].sum().backward()
    for name, parameter in reft.interventions.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_training():
    assert train(attached(dropout=0.2), 5) == train(attached(dropout=0.2), 5)
