"""Models that read images and text: laws of nine of them, from their configurations only."""

import pytest
import torch
import vision_models
from laws import shaken
from model_laws import Recorder
from vision_models import BOI, EOI, IMAGE, LAYERS, NAMES, TOWER, VIDEO, WIDTH, batch

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import places_of
from reft_lightning.adapters.reft.sites import find_sites
from reft_lightning.base_models.reading import keeps_its_columns, reading_of
from reft_lightning.base_models.vision import image_tokens
from reft_lightning.config import compose

# a random model may well say the token of an image, of which there is none
GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "suppress_tokens": [BOI, EOI, IMAGE, VIDEO],
}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
EVERY = pytest.mark.parametrize("name", NAMES)
PATHS = {"smolvlm": "model.text_model.layers", "idefics3": "model.text_model.layers"}
VISUAL = ("vision_block_output", "connector_output")


def attached(base, positions="f2+l1", method="loreft", **settings):
    torch.manual_seed(3)
    rank = {} if method == "bias" else {"rank": 2}
    reft = rl.attach(base, method, positions=positions, **rank, **settings)
    shaken(reft.interventions)
    return reft.eval()


def without_labels(inputs):
    return {name: value for name, value in inputs.items() if name not in ("labels", "prompt_mask")}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def real(values, inputs):
    return [row[mask.bool()] for row, mask in zip(values, inputs["attention_mask"], strict=True)]


# --- attaching ---------------------------------------------------------------------------------------------------


@EVERY
def test_layers_are_those_of_the_language_model_and_components_name_the_tower_and_the_connector(name):
    base = vision_models.model(name)
    # from the configuration only; R and W (1, d), b (1,) of each layer
    counted = rl.count_parameters(base.config, rank=1, positions="image:0.01", task="image_text_to_text")
    assert counted.trainable == LAYERS * (2 * WIDTH + 1)
    assert reading_of(base).causal  # the text after a prompt is read forward
    assert not keeps_its_columns(base)
    tower = find_sites(base, dict.fromkeys(range(3), "vision_block_output"))
    assert [site.path.rpartition(".")[2] for site in tower.values()] == ["0", "1", "2"]
    assert len({site.path.rpartition(".")[0] for site in tower.values()}) == 1
    assert {site.width for site in tower.values()} == {TOWER}
    assert find_sites(base, {0: "connector_output"})[0].width == WIDTH
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.2, as the model has 3 layers; got 3"):
        attached(base, "image", layers=[3], component="vision_block_output")
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.0"):
        attached(base, "image", layers=[1], component="connector_output")
    reft = attached(base)
    paths = [reft.sites[str(layer)].path for layer in range(LAYERS)]
    assert paths == [f"{PATHS.get(name, 'model.language_model.layers')}.{i}" for i in range(LAYERS)]
    assert {site.width for site in reft.sites.values()} == {WIDTH}
    assert image_tokens(base.config)[0] == IMAGE


# --- the base model stays what it is ------------------------------------------------------------------------------


@EVERY
def test_disabled_is_the_base_exactly(name):
    base, inputs = vision_models.model(name), batch(name)
    expected, text = logits(base, inputs), base.generate(**inputs, **GREEDY)
    reft = attached(base)
    assert not torch.equal(logits(reft, inputs), expected)
    with reft.disabled():
        assert torch.equal(logits(reft, inputs), expected)
        assert torch.equal(reft.generate(**inputs, **GREEDY), text)


# --- forward and generate -----------------------------------------------------------------------------------------

# all of them on one model, and on each other model one of which most are parts
CASES = [("llava", p) for p in ("f2+l1", "image", "image:0.5+l1", "text", "all", "image+decode:2")]
CASES += [(name, "f2+image:0.5+l1+decode:2") for name in NAMES if name != "llava"]


@pytest.mark.parametrize(("name", "positions"), CASES)
def test_teacher_forcing_is_decoding(name, positions):
    reft, prompts = attached(vision_models.model(name), positions), batch(name)
    settings = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    found = reft.generate(**prompts, **settings)
    width = prompts["input_ids"].shape[1]
    whole = batch(name, targets=found.sequences[:, width:])
    forced = logits(reft, whole)[:, width - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), forced, **CLOSE)
    again = reft.generate(**prompts, **GREEDY, use_cache=False)
    if name not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        assert torch.equal(again, found.sequences)


@EVERY
def test_a_row_is_read_as_it_is_alone(name):
    """Whatever the padding, and whether the other rows have images."""
    reft = attached(vision_models.model(name), "f2+image:0.5+l1")
    rows = [(5, 1), (3, 0), (4, 2)]
    alone = []
    for i, row in enumerate(rows):
        inputs = batch(name, [(1, 0)] * i + [row])
        alone.append(real(logits(reft, inputs), inputs)[i])
    for side, extra in (("left", 0), ("left", 3), ("right", 2)):
        inputs = batch(name, rows, side=side, extra=extra)
        torch.testing.assert_close(real(logits(reft, inputs), inputs), alone, **CLOSE)


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"]
)  # Qwen's note where images stood
def test_a_generation_does_not_depend_on_the_one_before(name):
    fresh, used = (attached(vision_models.model(name), "f2+image+l1+decode") for _ in range(2))
    text, other = batch(name, [(6, 0), (4, 0)], seed=5), batch(name, [(3, 2)], seed=6)
    expected, seen = fresh.generate(**text, **GREEDY), logits(fresh, text)
    used.generate(**batch(name), **GREEDY)
    logits(used, batch(name))
    assert torch.equal(logits(used, text), seen)
    assert torch.equal(used.generate(**text, **GREEDY), expected)
    used.generate(**text, **GREEDY)
    assert torch.equal(used.generate(**other, **GREEDY), fresh.generate(**other, **GREEDY))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "paligemma"])
def test_the_loss_of_target_columns_is_that_of_all(name):
    reft = attached(vision_models.model(name), "image+l1").train()
    inputs = batch(name, targets=torch.randint(5, 100, (3, 4)))
    reft(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in reft.interventions.named_parameters()}
    whole = reft(**inputs).loss
    reft.zero_grad()
    inputs |= {"labels": inputs["labels"][:, -5:], "logits_to_keep": 5}
    output = reft(**inputs)
    torch.testing.assert_close(output.loss, whole)
    output.loss.backward()
    for n, p in reft.interventions.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], atol=1e-5, rtol=1e-3)
        assert p.grad.abs().max() > 0, n


@pytest.mark.parametrize("name", ["llava", "idefics3"])  # two paths to the language model
def test_a_saved_adapter_generates_the_same(name, tmp_path):
    reft, inputs = attached(vision_models.model(name), "image:0.5+l2"), batch(name)
    expected = reft.generate(**inputs, **GREEDY)
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(vision_models.model(name), tmp_path)
    assert str(again.positions["0"][0]) == "image:0.5+l2"
    assert torch.equal(again.generate(**inputs, **GREEDY), expected)
    assert torch.equal(logits(again, inputs), logits(reft, inputs))


# --- which tokens are edited --------------------------------------------------------------------------------------


def edited(name, positions, inputs, component="block_output", layer=0):
    """Return which tokens a bias at one layer changes."""
    base = vision_models.model(name)
    site = find_sites(base, {layer: component})[layer]
    reft = attached(base, positions, "bias", layers=[layer], component=component)
    with torch.no_grad():
        for parameter in reft.interventions[str(layer)].parameters():
            parameter.fill_(1.0)
    record = Recorder(base.get_submodule(site.path))
    with reft.disabled():
        logits(reft, inputs)
    logits(reft, inputs)
    before, after = record.seen
    return (before != after).any(-1)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])  # images alone, and between two marks
def test_prefix_and_suffix_pass_over_images(name):
    inputs = batch(name, [(5, 1), (3, 0), (1, 2)])
    image = inputs["input_ids"] == IMAGE
    prompt = inputs["attention_mask"].bool()
    found = edited(name, "f2+l1", inputs)
    assert not (found & image).any()
    assert found.sum(-1).tolist() == [3, 3, min(3, int((prompt & ~image)[2].sum()))]
    text = (prompt & ~image).long()
    rank = text.cumsum(-1) * text
    last = (rank == text.sum(-1, keepdim=True)) & text.bool()
    assert torch.equal(found, ((rank > 0) & (rank <= 2)) | last)
    assert torch.equal(edited(name, "image", inputs), image)
    assert torch.equal(edited(name, "text", inputs), prompt & ~image)
    assert torch.equal(edited(name, "prompt", inputs), prompt)
    assert edited(name, "image:0.5", inputs).sum(-1).tolist() == [2, 0, 4]
    assert edited(name, "image:0.01", inputs).sum(-1).tolist() == [1, 0, 1]
    assert torch.equal(edited(name, "f1+image:0.01+l1", inputs) & image, edited(name, "image:0.01", inputs))


def test_a_model_of_text_has_no_images():
    import tiny

    with pytest.raises(ValueError, match=r"positions=image:0\.01: LlamaForCausalLM reads no images"):
        rl.attach(tiny.model("llama"), rank=2, positions="image:0.01")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no vision tower"):
        rl.attach(tiny.model("llama"), rank=2, positions="image", component="vision_block_output")
    with pytest.raises(ValueError, match=r"has no connector .* it reads no images"):
        rl.attach(tiny.model("llama"), rank=2, positions="image", component="connector_output")
    every = rl.attach(tiny.model("llama"), rank=2, positions="text")
    assert every.config.positions == "text"


def test_what_has_no_ids_needs_to_be_told_its_images():
    name = "llava"
    reft, inputs = attached(vision_models.model(name)), batch(name)
    expected = logits(reft, inputs)
    images = inputs["input_ids"] == IMAGE
    embeds = reft.base_model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds} | {k: v for k, v in inputs.items() if k != "input_ids"}
    with pytest.raises(ValueError, match=r"distinguish text from images, .* pass image_mask"):
        reft(**given)
    torch.testing.assert_close(logits(reft, given | {"image_mask": images}), expected)
    with pytest.raises(ValueError, match="image_mask must have the shape"):
        reft(**inputs, image_mask=images[:, 1:])
    text = reft.generate(**inputs, **GREEDY)[:, images.shape[1] :]
    assert torch.equal(reft.generate(**given, image_mask=images, **GREEDY), text)


def test_mores_is_its_formula_in_float64():
    """h + R^T (W h + b - R h) at the chosen tokens of images, and h elsewhere, as conf/intervention/mores.yaml says."""
    wanted = compose.compose(["model=tiny_vision", "data=boolq", "intervention=mores"]).intervention
    assert (wanted.method, wanted.rank, wanted.positions, wanted.layers) == ("loreft", 1, "image:0.01", "all")
    base, inputs = vision_models.model("llava").double(), batch("llava", [(5, 1), (3, 0), (4, 2)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    path = find_sites(base, {1: "block_output"})[1].path
    before = Recorder(base.get_submodule(path))
    reft = rl.attach(base, wanted.method, rank=wanted.rank, positions=wanted.positions, layers=[1])
    assert reft.parameter_count().trainable == 2 * WIDTH + 1
    (phi,) = shaken(reft.interventions.double())["1"]
    after = Recorder(base.get_submodule(path))
    logits(reft, inputs)
    h = before.last
    assert h.dtype == torch.float64
    A, W, b = phi.basis.detach(), phi.source.weight.detach(), phi.source.bias.detach()
    R = A / A.norm()  # (1, d), orthonormal at rank 1
    expected = h + (h @ W.mT + b - h @ R.mT) @ R
    chosen = torch.zeros(h.shape[:2], dtype=torch.bool)
    for row, image in enumerate(inputs["input_ids"] == IMAGE):
        if image.any():  # one of n, the last of an even spread
            chosen[row, image.nonzero()[-1]] = True
    assert chosen.sum() == 2
    wanted = torch.where(chosen[..., None], expected, h)
    torch.testing.assert_close(after.last, wanted, atol=1e-12, rtol=1e-12)


# --- the vision tower and the connector ---------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("component", VISUAL)
def test_an_edit_of_what_is_seen_reaches_the_text_and_its_gradient_comes_back(name, component):
    base, inputs = vision_models.model(name), batch(name)
    before, text = logits(base, inputs), base.generate(**inputs, **GREEDY)
    reft = attached(base, "image", layers=[0], component=component)
    found = logits(reft, inputs)
    words = batch(name, [(5, 0), (3, 0)], side="right")
    assert torch.equal(logits(reft, words), logits(base, words))  # where nothing is seen, nothing is edited
    assert (found - before)[0].abs().max() > 1e-3
    torch.testing.assert_close(real(found, inputs)[1], real(before, inputs)[1], **CLOSE)
    with reft.disabled():
        assert torch.equal(logits(reft, inputs), before)
        assert torch.equal(reft.generate(**inputs, **GREEDY), text)
    settings = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    generated = reft.generate(**inputs, **settings)
    width = inputs["input_ids"].shape[1]
    whole = batch(name, targets=generated.sequences[:, width:])
    torch.testing.assert_close(
        torch.stack(generated.logits, 1), logits(reft, whole)[:, width - 1 : -1], **CLOSE
    )
    reft.train()
    reft(**whole).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in reft.interventions.parameters())


@EVERY
def test_a_tower_that_ran_before_is_edited_like_a_new_one(name):
    inputs = batch(name)
    place = {"positions": "image", "component": "vision_block_output"}
    expected = logits(attached(vision_models.model(name), **place), inputs)
    base = vision_models.model(name)
    unedited = logits(base, without_labels(inputs))
    for _ in range(2):
        reft = attached(base, **place)
        found = logits(reft, inputs)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        reft.detach()
    assert not torch.equal(found[:, -1], unedited[:, -1])


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_a_share_of_what_is_seen_is_one_of_each_image(name):
    inputs = batch(name, [(5, 1), (4, 2)])
    found = edited(name, "image:0.5", inputs, "vision_block_output")
    assert found.shape[0] == 3
    assert len(set(found.sum(-1).tolist())) == 1
    assert int(found.sum(-1)[0]) == found.shape[1] // 2
    assert edited(name, "image", inputs, "connector_output").all()


def test_a_share_of_a_list_of_all_patches_is_refused():
    reft = attached(vision_models.model("qwen2_vl"), "image:0.5", component="connector_output")
    with pytest.raises(ValueError, match=r"the tokens of all images in one list.*use positions=image there"):
        reft(**batch("qwen2_vl"))


def test_a_vision_tower_has_no_text():
    base = vision_models.model("llava")
    for positions in ("f2+l1", "prompt", "image+l1", "text"):
        with pytest.raises(ValueError, match=r"positions must be image or image:S there; got"):
            attached(base, positions, component="vision_block_output")
    with pytest.raises(ValueError, match="needs the rows of a text"):
        rl.attach(base, "reft_r1", positions="image", component="connector_output")


def test_other_libraries_have_no_such_sites_and_positions(tmp_path):
    reft = attached(vision_models.model("llava"), "image", component="connector_output", layers=[0])
    with pytest.raises(ValueError, match="pyreft has no connector_output, which sees images"):
        rl.to_pyreft(reft, tmp_path)
    reft = attached(vision_models.model("llava"), "image:0.5", layers=[0])
    with pytest.raises(ValueError, match=r"EasySteer does not support positions image:0\.5"):
        rl.to_easysteer(reft, tmp_path)
    with pytest.raises(ValueError, match=r"edits the positions image:0\.5, but a weight acts on all tokens"):
        rl.merge(reft)


def test_editors_of_tower_connector_and_language_model_stand_together(tmp_path):
    """MRT: three adapters, one after the other."""
    name = "paligemma"
    base, inputs = vision_models.model(name), batch(name)
    expected = logits(base, inputs)
    reft = attached(base, "f2+l1")
    for adapter, component in (("tower", "vision_block_output"), ("connector", "connector_output")):
        reft.add_adapter(adapter, "loreft", rank=2, positions="image", component=component)
        shaken(reft.adapters[adapter])
    alone = logits(reft, inputs)
    reft.set_adapter(["tower", "connector", "default"])
    found = logits(reft, inputs)
    assert not torch.equal(found, alone)
    assert not torch.equal(alone, expected)
    with pytest.raises(ValueError, match="edits a vision tower, which has no rows"):
        reft(**inputs, adapter_names=["tower", None, "default"])
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(vision_models.model(name), tmp_path)
    for adapter in ("tower", "connector"):
        again.load_adapter(tmp_path / adapter, adapter)
    again.set_adapter(["tower", "connector", "default"])
    assert torch.equal(logits(again, inputs), found)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    reft = attached(vision_models.model(name), "image+l1").train()
    inputs = batch(name, targets=torch.randint(5, 100, (3, 4)))
    reft(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in reft.interventions.named_parameters()}
    reft.zero_grad()
    reft.base_model.gradient_checkpointing_enable()
    reft(**inputs).loss.backward()
    for n, p in reft.interventions.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_beams_and_several_texts_of_a_row_see_its_images(name):
    reft, inputs = attached(vision_models.model(name), "image"), batch(name, [(5, 1), (4, 2)])
    alone = [batch(name, [(5, 1)]), batch(name, [(4, 2)], seed=0)]
    beams = reft.generate(**inputs, **GREEDY, num_beams=2)
    one = reft.generate(**alone[0], **GREEDY, num_beams=2)
    assert torch.equal(beams[0, -4:], one[0, -4:])
    assert reft.generate(**inputs, **GREEDY | {"do_sample": True}, num_return_sequences=2).shape[0] == 4


# --- with what was written for text ------------------------------------------------------------------------------


def test_sources_are_texts_without_pictures():
    base = vision_models.model("llava")
    reft = rl.attach(base, "das", rank=2, layers=[1], positions="l1")
    inputs = batch("llava")
    with pytest.raises(ValueError, match="source_ids contain image tokens"):
        reft(**inputs, source_ids=inputs["input_ids"], source_mask=inputs["attention_mask"])


def test_critical_positions_are_refused_where_images_are_read():
    with pytest.raises(ValueError, match="reads images: mark the tokens yourself"):
        rl.attach(vision_models.model("llava"), rank=2, positions="critical:2")


@pytest.mark.parametrize("positions", ["image:0.5", "text+image"])
def test_edit_norms_have_a_name_for_each_place(positions):
    reft = rl.attach(vision_models.model("llava"), rank=2, positions=positions)
    assert places_of(reft) == sorted(positions.split("+"))
