"""Several adapters on one base model: stacked, summed, or one for each row of a batch; partitions of an adapter."""

import copy
import json

import pytest
import tiny
import torch
from adapted_models import state_of
from laws import shaken
from torch import nn

import reft_lightning as rl

PROMPTS = tiny.padded(tiny.rows(7, 5, 6, 4), "left")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
CLOSE = {"atol": 1e-9, "rtol": 1e-7}
OTHERS = {
    "style": ("direft", {"positions": "prompt", "layers": [0, 1], "rank": 3}),
    "bias": ("lobireft", {"positions": "all", "component": "mlp_output", "rank": 1}),
    "late": ("noreft", {"positions": "l1+decode:2", "rank": 2, "tied": "group"}),
}
NAMES = ["default", "style", "bias", "late", None]


def several(family="llama", dtype=torch.float64, base=None, **settings):
    torch.manual_seed(0)
    base = base or tiny.model(family, dtype)
    reft = rl.attach(base, "loreft", **{"rank": 4, "positions": "f2+l1", **settings})
    for name, (method, more) in OTHERS.items():
        reft.add_adapter(name, method, **more)
    for seed, adapter in enumerate(reft.adapters.values()):
        shaken(adapter, seed=seed)
    return reft.to(dtype).eval()


def alone(name, family="llama", dtype=torch.float64):
    """The same adapter on a base model of its own."""
    reft = several(family, dtype)
    method, settings = OTHERS.get(name, ("loreft", {"rank": 4, "positions": "f2+l1"}))
    other = rl.attach(tiny.model(family, dtype), method, heads=False, **settings).to(dtype).eval()
    own = other.adapter_state_dict().keys()
    other.load_adapter_state_dict({k: t for k, t in reft.adapters[name].state_dict().items() if k in own})
    return other


def logits(model, **more):
    with torch.no_grad():
        return model(**PROMPTS, **more).logits


def row(i, batch=PROMPTS):
    return {name: tensor[i : i + 1] for name, tensor in batch.items()}


# --- the active adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", *OTHERS])
def test_the_active_adapter_edits_as_it_does_alone(name):
    reft = several(dtype=torch.float32)
    assert reft.adapter_names == ["default", *OTHERS]
    if name != "default":  # which edits until another one is set
        reft.set_adapter(name)
    assert reft.active_adapters == [name]
    expected = alone(name, dtype=torch.float32)
    assert torch.equal(logits(reft), logits(expected))
    assert torch.equal(reft.generate(**PROMPTS, **GREEDY), expected.generate(**PROMPTS, **GREEDY))


def test_a_stack_edits_what_the_adapter_before_left():
    reft = rl.attach(tiny.model("llama", torch.float64), "consreft", rank=2, positions="all", layers=[1])
    reft.add_adapter("second", "consreft", rank=2, positions="all", layers=[1])
    first, second = (
        shaken(reft.adapters[name], seed=seed).double() for seed, name in enumerate(reft.adapters)
    )
    seen = {}

    def note(name):
        return lambda module, args, output: seen.update({name: (args[0], output)})

    for name, adapter in (("first", first), ("second", second)):
        adapter.interventions["1"][0].register_forward_hook(note(name))
    reft.eval().set_adapter(["default", "second"])
    ordered = logits(reft)
    assert torch.equal(seen["second"][0], seen["first"][1])
    reft.set_adapter(["second", "default"])
    assert not torch.allclose(logits(reft), ordered)
    assert torch.equal(seen["first"][0], seen["second"][1])


def test_a_weighted_sum_adds_the_edits_of_one_hidden_state():
    reft = rl.attach(tiny.model("llama", torch.float64), "loreft", rank=2, positions="all", layers=[2])
    reft.add_adapter("other", "direft", rank=3, positions="l2", layers=[2])
    for seed, adapter in enumerate(reft.adapters.values()):
        shaken(adapter, seed=seed).double()
    found = []
    block = reft.base_model.model.layers[2]
    handle = block.register_forward_hook(lambda module, args, output: found.append(output))

    def states(chosen):
        reft.set_adapter(chosen)
        logits(reft.eval())
        return found[-1]

    h = states(None)
    first, other = (states(name) - h for name in ("default", "other"))
    both = states({"default": 0.75, "other": -0.5})
    handle.remove()
    torch.testing.assert_close(both - h, 0.75 * first - 0.5 * other, **CLOSE)
    assert first.abs().max() > 1e-2
    assert other.abs().max() > 1e-2


def test_a_weight_of_a_single_adapter_is_its_scale():
    reft = several(dtype=torch.float32)
    reft.set_adapter({"style": -0.5})
    weighted = logits(reft)
    reft.set_adapter("style")
    reft.adapters["style"].scale = -0.5
    assert torch.equal(logits(reft), weighted)


def test_scale_is_that_of_every_adapter_and_each_has_its_own():
    reft = several()
    reft.adapters["style"].scale = 0.25
    assert reft.scale == 1
    reft.scale = 2.0
    assert [adapter.scale for adapter in reft.adapters.values()] == [2.0] * 4


def test_disabling_leaves_the_others_in_their_order():
    reft = several()
    reft.set_adapter({"late": 1.0, "style": 0.5, "bias": 2.0})
    reft.disable_adapter("style")
    assert reft.active_adapters == ["late", "bias"]
    expected = several()
    expected.set_adapter({"late": 1.0, "bias": 2.0})
    assert torch.equal(logits(reft), logits(expected))


def test_a_deleted_adapter_leaves_neither_hooks_nor_parameters():
    reft, expected = several(), alone("default")

    def hooks(model):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base_model.modules())

    for name in OTHERS:
        reft.delete_adapter(name)
    assert hooks(reft) == hooks(expected)
    assert reft.parameter_count() == expected.parameter_count()
    assert torch.equal(logits(reft), logits(expected))
    reft.detach()
    assert hooks(reft) == 0


@pytest.mark.parametrize("copied", [False, True])
def test_a_base_model_is_free_again_whichever_adapter_was_deleted(copied):
    reft = several()
    reft = copy.deepcopy(reft) if copied else reft
    reft.delete_adapter("default")
    base = reft.detach()
    assert all(parameter.requires_grad for parameter in base.parameters())
    rl.attach(base, "loreft", rank=2, heads=["lm_head"])  # which needs the model to itself


# --- one adapter a row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_row_has_its_own_adapter_in_forward(family):
    reft = several(family)
    for names in (["default", "style", "bias", "late"], ["late", None, "late", "__base__"]):
        mixed = logits(reft, adapter_names=names)
        for i, name in enumerate(names):
            reft.set_adapter(None if name == "__base__" else name)
            real = PROMPTS["attention_mask"][i].bool()
            torch.testing.assert_close(mixed[i][real], logits(reft)[i][real], **CLOSE)


def test_rows_without_an_adapter_are_the_base_model_to_the_bit():
    reft = several(dtype=torch.float32)
    with reft.disabled():
        base = logits(reft)
    assert not torch.equal(logits(reft), base)
    assert torch.equal(logits(reft, adapter_names=[None] * 4), base)
    reft.set_adapter(None)
    assert reft.active_adapters == []
    assert torch.equal(logits(reft), base)
    assert torch.equal(logits(reft, adapter_names=[None, "style", None, None])[[0, 2, 3]], base[[0, 2, 3]])


def test_a_row_may_give_the_strength_of_its_adapter():
    reft = several()
    mixed = logits(reft, adapter_names=["style", ("style", 0.5), ("style", -2), None])
    for i, strength in enumerate((1, 0.5, -2, 0)):
        reft.set_adapter({"style": strength})
        torch.testing.assert_close(mixed[i], logits(reft)[i], **CLOSE)


@pytest.mark.parametrize(
    ("family", "how"),
    [("llama", {}), ("llama", {"num_beams": 2, "num_return_sequences": 2}), ("llama", {"use_cache": False}),
     ("llama", {"cache_implementation": "static"}), ("gpt2", {"num_beams": 3}), ("mistral", {})],
    ids=str,
)  # fmt: skip
def test_every_row_generates_with_its_own_adapter(family, how):
    reft, names = several(family), ["late", "default", None, "style"]
    mixed = reft.generate(**PROMPTS, **GREEDY, **how, adapter_names=names)
    copies = how.get("num_return_sequences", 1)
    for i, name in enumerate(names):
        reft.set_adapter(name)
        apart = reft.generate(**PROMPTS, **GREEDY, **how)[i * copies : (i + 1) * copies]
        assert torch.equal(mixed[i * copies : (i + 1) * copies], apart)
    reft.set_adapter(None)
    assert not torch.equal(mixed, reft.generate(**PROMPTS, **GREEDY, **how))


def test_sampled_rows_come_from_the_distribution_of_their_adapter():
    reft, names = several(), ["late", "default", None, "bias"]
    torch.manual_seed(0)
    found = reft.generate(
        **PROMPTS, max_new_tokens=5, do_sample=True, top_k=0, pad_token_id=tiny.PAD, adapter_names=names,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    columns = PROMPTS["input_ids"].shape[1]
    attention = nn.functional.pad(PROMPTS["attention_mask"], (0, 5), value=1)
    prompt = nn.functional.pad(PROMPTS["attention_mask"], (0, 5)).bool()
    for i, name in enumerate(names):
        reft.set_adapter(name)
        with torch.no_grad():
            again = reft(found.sequences, attention, prompt_mask=prompt).logits[i, columns - 1 : -1]
        sampled = torch.stack(found.logits)[:, i]  # which transformers keeps in float32
        torch.testing.assert_close(sampled, again.float(), atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_train_their_own_adapters():
    reft, names = several(), ["default", "style", None, "style"]
    batch = tiny.prompt_target(tiny.rows(5, 4, 6, 3), tiny.rows(2, 2, 2, 2, seed=1))
    reft(**batch, adapter_names=names).loss.backward()
    mixed = {
        name: [p.grad.clone() for p in reft.adapters[name].parameters()] for name in ("default", "style")
    }
    assert all(p.grad is None for name in ("bias", "late") for p in reft.adapters[name].parameters())
    for name in ("default", "style"):
        reft.zero_grad()
        reft.set_adapter(name)
        mine = torch.tensor([given == name for given in names])
        labels = batch["labels"].masked_fill(~mine[:, None], -100)
        (reft(**{**batch, "labels": labels}).loss * mine.sum() / 4).backward()
        for parameter, grad in zip(reft.adapters[name].parameters(), mixed[name], strict=True):
            torch.testing.assert_close(parameter.grad, grad, **CLOSE)


def test_gradient_checkpointing_keeps_each_row_at_its_adapter():
    reft, names = several(component="mlp_output").train(), ["default", "style", None, "late"]
    batch = tiny.prompt_target(tiny.rows(5, 4, 6, 3), tiny.rows(2, 2, 2, 2, seed=1))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            reft.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        reft.zero_grad()
        reft(**batch, adapter_names=names).loss.backward()
        grads.append([p.grad.clone() for p in reft.adapters.parameters() if p.grad is not None])
    assert len(grads[0]) > 10
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, **CLOSE)


# --- wrong names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda reft: reft.set_adapter("styel"),
        lambda reft: reft.set_adapter(["default", "styel"]),
        lambda reft: reft.set_adapter({"styel": 1.0}),
        lambda reft: reft.disable_adapter("styel"),
        lambda reft: reft.delete_adapter("styel"),
        lambda reft: reft.add_partition("half", [0], of="styel"),
        lambda reft: reft(**PROMPTS, adapter_names=["default", None, "styel", None]),
        lambda reft: reft.generate(**PROMPTS, **GREEDY, adapter_names=["default", None, "styel", None]),
    ],
)
def test_a_misspelt_name_is_an_error_and_never_the_base_model(use):
    reft = several()
    before = logits(reft)
    with pytest.raises(ValueError, match=r"there is no adapter 'styel'.*did you mean 'style'"):
        use(reft)
    assert torch.equal(logits(reft), before)


def test_a_name_that_is_taken_or_impossible_is_refused():
    reft = several()
    for name in ("default", "style", "peft", "__base__", "a.b", "", "keys", "active", "a/b"):
        with pytest.raises(ValueError, match=r"is taken|cannot be named"):
            reft.add_adapter(name, rank=1)
    assert reft.adapter_names == ["default", *OTHERS]


def test_names_must_be_one_for_each_row():
    reft = several()
    for names in (["style"], "style", ["style"] * 5):
        with pytest.raises(ValueError, match="one name for each of the 4 rows"):
            logits(reft, adapter_names=names)


def test_a_weight_is_a_finite_number_and_an_adapter_edits_once():
    reft = several()
    for weight in (float("nan"), float("inf"), "1", True, None):
        with pytest.raises(ValueError, match="weight of the adapter 'style' must be a finite number"):
            reft.set_adapter({"style": weight})
    with pytest.raises(ValueError, match="each adapter can be named only once"):
        reft.set_adapter(["style", "style"])


def test_the_only_adapter_stays():
    reft = alone("default")
    with pytest.raises(ValueError, match=r"only adapter: use detach\(\) to remove everything"):
        reft.delete_adapter("default")
    assert reft.active_adapters == ["default"]


def test_a_failed_addition_changes_nothing():
    reft = several()
    before, names, base = logits(reft), reft.adapter_names, state_of(reft.base_model)
    for settings in (
        {"rank": 99},
        {"layers": [7]},
        {"component": "nowhere"},
        {"positions": "x3"},
        {"rnak": 2},
    ):
        with pytest.raises(ValueError, match=r"rank|layer|component|positions|setting"):
            reft.add_adapter("new", **{"rank": 2, **settings})
    assert reft.adapter_names == names
    assert state_of(reft.base_model) == base
    assert torch.equal(logits(reft), before)


def test_trained_heads_have_the_model_to_themselves():
    reft = rl.attach(tiny.model("bert"), rank=2, positions="f1")
    with pytest.raises(ValueError, match="trained heads cannot share"):
        reft.add_adapter("other", rank=2, positions="f1")
    with pytest.raises(ValueError, match=r"disabled\(\) runs it without them"):
        reft.set_adapter(None)
    with pytest.raises(ValueError, match="cannot choose trained heads"):
        reft(**tiny.padded(tiny.rows(3, 4)), adapter_names=[None, "default"])
    plain = rl.attach(tiny.model("bert"), rank=2, positions="f1", heads=False)
    with pytest.raises(ValueError, match="trained heads cannot share"):
        plain.add_adapter("other", rank=2, positions="f1", heads=["classifier"])
    plain.add_adapter("other", rank=2, positions="f1")
    assert plain.adapter_names == ["default", "other"]


# --- partitions --------------------------------------------------------------------------------------------------


def halves(method="loreft", **settings):
    torch.manual_seed(0)
    reft = rl.attach(tiny.model("llama", torch.float64), method, **{"rank": 4, "positions": "l2", **settings})
    shaken(reft.interventions).double()
    reft.add_partition("left", range(2))
    reft.add_partition("right", [2, 3])
    return reft.eval()


def test_a_partition_of_loreft_moves_its_rows_to_where_their_source_points():
    phi = halves().interventions["0"][0]
    h = torch.randn(5, tiny.WIDTH, dtype=torch.float64)
    part = halves().adapters["left"].interventions["0"][0]
    R, W, b = phi.R[:2], phi.source.weight[:2], phi.source.bias[:2]
    torch.testing.assert_close(part(h), h + (h @ W.T + b - h @ R.T) @ R, **CLOSE)
    torch.testing.assert_close(part(h) @ R.T, h @ W.T + b, **CLOSE)


@pytest.mark.parametrize(
    "method", ["loreft", "direft", "noreft", "direft_orthonormal", "consreft", "lobireft"]
)
def test_both_parts_together_are_the_whole(method):
    reft = halves(method)
    whole = logits(reft)
    reft.set_adapter({"left": 1.0, "right": 1.0})
    torch.testing.assert_close(logits(reft), whole, **CLOSE)
    reft.set_adapter("left")
    assert not torch.allclose(logits(reft), whole)


def test_only_sums_of_directions_can_be_divided():
    reft = rl.attach(tiny.model("llama"), "red")
    with pytest.raises(
        ValueError,
        match="RED cannot be partitioned, as its edit is not a sum of directions; these can: loreft",
    ):
        reft.add_partition("left", [0])
    assert reft.adapter_names == ["default"]
    assert reft.adapters["default"].partitions == {}


def test_a_partition_has_rows_of_the_subspace():
    reft = rl.attach(tiny.model("llama"), rank=4)
    for rows in ([], [0, 0], [4], [-1]):
        with pytest.raises(ValueError, match=r"must be distinct and in 0\.\.3, as the rank is 4"):
            reft.add_partition("part", rows)
    assert reft.adapter_names == ["default"]


def test_rows_of_a_part_may_be_an_array(tmp_path):
    reft = rl.attach(tiny.model("llama"), rank=4)
    reft.add_partition("part", torch.arange(2))
    assert reft.adapters["default"].partitions == {"part": [0, 1]}
    reft.save_pretrained(tmp_path)
    other = rl.attach(tiny.model("llama"), rank=4)
    other.add_partition("part", [2, 3])
    with pytest.raises(ValueError, match="partitions"):
        other.load_adapter(tmp_path, "default")


def test_parts_are_trained_by_their_own_rows_of_the_batch():
    reft = halves()
    batch = tiny.prompt_target(tiny.rows(5, 4), tiny.rows(2, 2, seed=1))
    reft(**batch, adapter_names=["right", None]).loss.backward()
    for part in reft.interventions["1"][0].source.parameters():
        assert part.grad[:2].abs().max() == 0
        assert part.grad[2:].abs().min() > 0


def test_training_one_part_of_direft_leaves_the_other_to_the_bit():
    reft = halves("direft").float().train()
    batch = tiny.prompt_target(tiny.rows(5, 4), tiny.rows(2, 2, seed=1))
    reft.set_adapter("left")
    with torch.no_grad():
        left = reft(**batch).logits
    reft.set_adapter("right")
    optimizer = torch.optim.Adam(reft.adapters.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        reft(**batch).loss.backward()
        optimizer.step()
    reft.set_adapter("left")
    with torch.no_grad():
        assert torch.equal(reft(**batch).logits, left)


def test_parts_count_once_and_are_saved_with_what_they_are_part_of(tmp_path):
    reft = halves()
    assert reft.parameter_count() == rl.count_parameters(reft.base_model.config, rank=4, positions="l2")
    assert len(list(reft.adapters.parameters())) == len(reft.parameter_roles()["rotation"]) * 3
    reft.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["README.md", "reft.safetensors", "reft_config.json"]
    again = rl.ReftModel.from_pretrained(tiny.model("llama", torch.float64), tmp_path).double()
    assert again.adapter_names == ["default", "left", "right"]
    for name in again.adapter_names:
        reft.set_adapter(name)
        again.set_adapter(name)
        # saved as float64, loaded as float32
        torch.testing.assert_close(logits(again), logits(reft), atol=1e-5, rtol=1e-5)


def test_an_adapter_outlives_its_parts_only_in_this_order():
    reft = halves()
    with pytest.raises(ValueError, match="has partitions, delete them first: left, right"):
        reft.delete_adapter("default")
    with pytest.raises(ValueError, match="left are parts of other adapters"):
        reft.save_pretrained("nowhere", selected_adapters=["left"])
    reft.delete_adapter("left")
    reft.delete_adapter("right")
    assert reft.adapters["default"].partitions == {}


# --- files and copies --------------------------------------------------------------------------------------------


def test_each_adapter_is_saved_in_a_folder_of_its_own_and_loads_by_name(tmp_path):
    reft = several(dtype=torch.float32)
    reft.adapters["style"].scale = 0.5
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert again.adapter_names == ["default"]
    for name in OTHERS:
        again.load_adapter(tmp_path / name, name)
    assert again.adapters["style"].scale == 0.5
    for chosen in ("default", ["late", "default"], {"style": 2.0, "bias": -1.0}):
        reft.set_adapter(chosen)
        again.set_adapter(chosen)
        assert torch.equal(logits(again), logits(reft))


def test_selected_adapters_are_saved(tmp_path):
    several().save_pretrained(tmp_path, selected_adapters=["late"])
    assert [path.name for path in tmp_path.iterdir()] == ["late"]
    assert rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "late").config.method == "noreft"


def test_a_checkpoint_holds_all_adapters():
    reft, other = several(), several()
    shaken(other.adapters, seed=9)
    assert not torch.equal(other.adapter_state_dict()["adapters.late.interventions.0.0.source.bias"],
                           reft.adapter_state_dict()["adapters.late.interventions.0.0.source.bias"])  # fmt: skip
    other.load_adapter_state_dict(reft.adapter_state_dict())
    for chosen in ("default", *OTHERS):
        reft.set_adapter(chosen)
        other.set_adapter(chosen)
        assert torch.equal(logits(other), logits(reft))
    roles = {id(p) for parameters in reft.parameter_roles().values() for p in parameters}
    assert roles == {id(p) for p in reft.parameters() if p.requires_grad}


def test_loading_onto_a_name_replaces_the_numbers_in_place(tmp_path):
    reft, newer = several(), several()
    shaken(newer.adapters["style"], seed=5)
    newer.adapters["style"].scale = 0.5
    newer.save_pretrained(tmp_path)
    parameters = list(reft.adapters["style"].parameters())
    reft.load_adapter(tmp_path / "style", "style")
    assert all(a is b for a, b in zip(reft.adapters["style"].parameters(), parameters, strict=True))
    for model in (reft, newer):
        model.set_adapter("style")
    assert torch.equal(logits(reft), logits(newer))


def test_another_adapter_does_not_replace_one_of_its_name(tmp_path):
    reft = several()
    reft.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"there is already an adapter 'style', attached differently .*method 'noreft'"
    ):
        reft.load_adapter(tmp_path / "late", "style")
    with pytest.raises(ValueError, match="the name 'late' is taken"):
        reft.add_adapter("late", rank=1)


def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path):
    reft = several()
    reft.save_pretrained(tmp_path)
    before = logits(reft)
    (tmp_path / "late" / "reft.safetensors").write_bytes(b"no tensors")
    for name in ("late", "new"):
        with pytest.raises(ValueError, match="damaged"):
            reft.load_adapter(tmp_path / "late", name)
    assert reft.adapter_names == ["default", *OTHERS]
    assert torch.equal(logits(reft), before)


def test_copies_have_all_adapters_and_edit_with_their_own():
    reft = halves()
    reft.add_adapter("other", "direft", rank=2, positions="all")
    other = copy.deepcopy(reft.double())
    with torch.no_grad():
        for parameter in reft.adapters.parameters():
            parameter.mul_(3)
    for name in reft.adapter_names:
        reft.set_adapter(name)
        other.set_adapter(name)
        assert not torch.equal(logits(other), logits(reft))
    part, whole = (other.adapters[name].interventions["0"][0] for name in ("left", "default"))
    assert part.phi is whole


def test_an_added_adapter_has_the_mode_of_the_model():
    reft = several()
    reft.add_adapter("new", rank=1, dropout=0.5)
    assert not reft.adapters["new"].training


# --- torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own internals
def test_compiled_steps_follow_the_adapters():
    batch = tiny.prompt_target(tiny.rows(5, 4), tiny.rows(2, 2, seed=1))
    plain, graphs = several(dtype=torch.float32).train(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = copy.deepcopy(plain)
    compiled.compile(backend=backend)
    chosen = [["default"], ["default", "bias"], {"style": 1.0, "late": -1.0}, None, ["default"]]
    for names in chosen:
        for model in (plain, compiled):
            model.set_adapter(names)
        torch.testing.assert_close(compiled(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=1e-5)
    before = len(graphs)
    assert before > 0
    for model in (plain, compiled):
        model.add_adapter("new", "direft", rank=2, component="block_input", positions="all")
    compiled.adapters["new"].load_state_dict(shaken(plain.adapters["new"]).state_dict())
    for model in (plain, compiled):
        model.set_adapter("new")
    torch.testing.assert_close(compiled(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_swap_of_numbers_keeps_the_compiled_graph(tmp_path):
    batch = tiny.prompt_target(tiny.rows(5, 4), tiny.rows(2, 2, seed=1))
    bases = (tiny.model("llama", num_hidden_layers=2) for _ in range(2))
    (reft, newer), graphs = (several(dtype=torch.float32, base=base).train() for base in bases), []
    shaken(newer.adapters["default"], seed=5)
    newer.save_pretrained(tmp_path)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    reft.compile(backend=backend)
    reft(**batch)
    before = len(graphs)
    reft.load_adapter(tmp_path, "default")
    torch.testing.assert_close(reft(**batch).logits, newer(**batch).logits, atol=1e-5, rtol=1e-5)
    assert len(graphs) == before > 0
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"partitions": {"default": [0]}}, "the name 'default' is taken"),
        ({"partitions": {"a.b": [0]}}, "cannot be named 'a.b'"),
        ({"partitions": {"a": ["x"]}}, "the partition 'a' must be a list of rows"),
        ({"per_layer": {"0": [1]}}, "per_layer must map layer numbers to settings"),
        ({"per_layer": {"0": {"method": ["x"]}}}, "per_layer must map layer numbers to settings"),
        ({"settings": {"rank": 4, "act_fn": ["relu"]}}, "act_fn must be one of"),
        ({"scale": float("nan")}, "scale must be finite"),
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused_with_its_folder(tmp_path, values, said):
    halves().save_pretrained(tmp_path)
    path = tmp_path / "reft_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=said) as refused:
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_an_inactive_adapter_that_cannot_be_nulled_does_not_prevent_nulling():
    reft = rl.attach(tiny.model("llama"), "bias")
    reft.add_adapter("red", "red")
    with reft.nulled():
        pass
    reft.set_adapter("red")
    with pytest.raises(ValueError, match="cannot be nulled"), reft.nulled():
        pass
