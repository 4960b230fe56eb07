"""An adapter at a linear map, on all tokens, is a LoRA and a plain model: equal logits, equal texts, or a reason."""

import copy
import json

import pytest
import tiny
import torch
from torch import nn
from transformers import BitsAndBytesConfig

import reft_lightning as rl
from reft_lightning.adapters.attaching import NOTE
from reft_lightning.exchange.folding import affine
from reft_lightning.interventions import Intervention

VECTORS = ["bias", "difference_in_means"]
LORAS = ["loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft", *VECTORS]
LLAMA_DOWN = "model.layers.{layer}.mlp.down_proj"
INPUT = f"{LLAMA_DOWN}.input"
# every method at the output of a map; at its input, and in attention, a low rank, a constant and a full rank
ELSEWHERE = [("loreft", "attention_output"), ("loreft", INPUT), ("bias", INPUT)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed but the targeted layer.*"),
    # peft 0.21 asks
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated.*:FutureWarning"),
]

BATCH = tiny.padded(tiny.rows(5, 9, 7))
REAL = BATCH["attention_mask"].bool()


def attached(method="loreft", family="llama", dtype=torch.float32, base=None, **settings):
    torch.manual_seed(3)
    settings = {"positions": "all", "component": "mlp_output", **settings}
    if method not in ("red", *VECTORS):
        settings = {"rank": 2, **settings}
    reft = rl.attach(base or tiny.model(family, dtype), method, **settings).eval()
    with torch.no_grad():
        for parameter in (p for p in reft.parameters() if p.requires_grad):
            parameter.add_(0.5 * torch.randn_like(parameter))
    reft.scale = 0.7
    return reft


def logits(model):  # of real tokens: a weight acts on padding too, which nothing reads
    with torch.no_grad():
        found = model(**BATCH).logits
    return found[REAL] if found.ndim == 3 else found


def texts(model):
    prompts = tiny.padded(tiny.rows(4, 6), "left")
    return model.generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=0)


def from_peft(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


def close(found, wanted):  # float32: about ten roundings of logits of order 1 to 10
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(("method", "component"), [*((method, "mlp_output") for method in LORAS), *ELSEWHERE])
def test_peft_loads_the_adapter_with_equal_logits_and_texts(method, component, tmp_path):
    reft = attached(method, component=component)
    rl.to_lora(reft, tmp_path)
    lora = from_peft(tiny.model("llama"), tmp_path)
    close(logits(lora), logits(reft))
    assert (logits(lora) - logits(tiny.model("llama"))).abs().max() > 0.1  # something was there to export
    assert torch.equal(texts(lora), texts(reft))


@pytest.mark.parametrize(
    ("method", "component"),
    [*((method, "mlp_output") for method in (*LORAS, "red")), *ELSEWHERE, ("red", INPUT)],
)
def test_a_merged_model_is_a_plain_one_that_is_saved_loaded_and_generates(method, component, tmp_path):
    reft = attached(method, component=component)
    wanted, said = logits(reft), texts(reft)
    model = rl.merge(reft)
    assert type(model) is type(tiny.model("llama"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert NOTE not in vars(model)
    close(logits(model), wanted)
    assert torch.equal(texts(model), said)
    model.save_pretrained(tmp_path)
    again, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3", "mistral", "gpt2", "gptj", "gpt_neox", "opt", "falcon"]
)
def test_every_family_exports_its_linear_maps(family, tmp_path):
    reft = attached(family=family, layers={0: {}, 1: {"component": "attention_output"}})
    rl.to_lora(reft, tmp_path)
    close(logits(from_peft(tiny.model(family), tmp_path)), logits(reft))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "falcon"])
def test_families_with_biases_take_the_edit_in(family):
    base = tiny.model(family)
    for parameter in (p for p in base.parameters() if p.ndim == 1):  # biases of a random model are 0
        torch.nn.init.normal_(parameter, std=0.3)
    wanted = logits(reft := attached(base=base))
    close(logits(rl.merge(reft)), wanted)


@pytest.mark.parametrize(
    ("family", "component"),
    [("mistral", "attention_output"), ("qwen3", "mlp_output"), ("gptj", "attention_output")],
)
def test_a_map_that_can_have_no_bias_is_not_merged(family, component):
    reft = attached(family=family, component=component)
    wanted = logits(reft)
    with pytest.raises(ValueError, match=r"has no bias at .*0.* Use to_lora\(\)"):
        rl.merge(reft)
    assert torch.equal(logits(reft), wanted)  # and is as it was


def test_layers_of_other_ranks_and_methods_are_exported_together(tmp_path):
    reft = attached(layers={0: {"rank": 1}, 2: {"method": "direft", "rank": 3}})
    rl.to_lora(reft, tmp_path)
    close(logits(from_peft(tiny.model("llama"), tmp_path)), logits(reft))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize("method", ["loreft", "noreft", "red"])
def test_in_bfloat16_the_merged_model_is_as_near_to_float32_as_the_adapted_one(method, tmp_path):
    half = tiny.model("llama", torch.bfloat16)
    exact = logits(attached(method, base=copy.deepcopy(half).float()))
    reft = attached(method, base=half)
    adapted = (logits(reft).float() - exact).abs().mean()
    if method != "red":
        rl.to_lora(reft, tmp_path)
        lora = from_peft(tiny.model("llama", torch.bfloat16), tmp_path)
        assert (logits(lora).float() - exact).abs().mean() < 1.3 * adapted
    merged = rl.merge(reft)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged).float() - exact).abs().mean() < 1.3 * adapted


def test_weights_in_bfloat16_as_the_authors_keep_them_are_exported(tmp_path):
    reft = attached(weight_dtype="bfloat16", dropout=0.1, dropout_on="output")
    rl.to_lora(reft, tmp_path)
    found, wanted = logits(from_peft(tiny.model("llama"), tmp_path)), logits(reft)
    # the edit rounds W h to 8 bits, the LoRA does not
    assert (found - wanted).abs().mean() < 0.02 * wanted.std()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_trained_heads_go_along(family, tmp_path):
    reft = attached(family=family)
    rl.to_lora(reft, tmp_path / "lora")
    wanted = logits(reft)
    close(logits(from_peft(tiny.model(family), tmp_path / "lora")), wanted)
    model = rl.merge(reft)
    close(logits(model), wanted)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "merged").eval()), logits(model))


def tied():
    config = copy.deepcopy(tiny.model("llama").config)
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    return type(tiny.model("llama"))(config).eval()


@pytest.mark.parametrize("heads", [[], ["lm_head"]])
@pytest.mark.filterwarnings("ignore:.*tied weights.*", "ignore:.*tie_word_embeddings.*")
def test_tied_embeddings_stay_tied(heads, tmp_path):
    reft = attached(base=tied(), heads=heads)
    wanted = logits(reft)
    rl.to_lora(reft, tmp_path / "lora")
    close(logits(from_peft(tied(), tmp_path / "lora")), wanted)
    model = rl.merge(reft)
    close(logits(model), wanted)
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_saving_exporting_and_merging_twice_give_the_same_bytes(tmp_path):
    for time in ("first", "second"):
        reft = attached()
        reft.save_pretrained(tmp_path / time / "reft")
        rl.to_lora(reft, tmp_path / time / "lora")
        rl.to_lora(reft, tmp_path / time / "lora")  # over itself
        rl.merge(copy.deepcopy(reft)).save_pretrained(tmp_path / time / "merged")
    for kind in ("reft", "lora", "merged"):
        assert bytes_of(tmp_path / "first" / kind) == bytes_of(tmp_path / "second" / kind)


def test_a_copy_is_merged_where_the_adapter_is_still_needed():
    reft = attached()
    wanted = logits(reft)
    close(logits(rl.merge(copy.deepcopy(reft))), wanted)
    assert torch.equal(logits(reft), wanted)
    rl.merge(reft)
    with pytest.raises(ValueError, match="detached from its base model"):
        reft(**BATCH)
    with pytest.raises(ValueError, match="detached from its base model"):
        rl.merge(reft)


def test_a_merged_model_can_be_adapted_and_merged_again():
    model = rl.merge(attached())
    wanted = logits(reft := attached("direft", base=model, component="attention_output"))
    close(logits(rl.merge(reft)), wanted)


def test_resized_embeddings_are_exported_and_merged(tmp_path):
    def resized():
        torch.manual_seed(5)
        model = tiny.model("llama")
        model.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
        return model

    reft = attached(base=resized())
    wanted = logits(reft)
    rl.to_lora(reft, tmp_path / "lora")
    close(logits(from_peft(resized(), tmp_path / "lora")), wanted)
    rl.merge(reft).save_pretrained(tmp_path / "merged")
    close(logits(type(resized()).from_pretrained(tmp_path / "merged").eval()), wanted)


@pytest.mark.parametrize(
    "active", [["default", "more"], {"default": 1.0, "more": -0.5}, "more", None], ids=str
)
def test_the_active_adapters_are_exported_with_their_weights(active, tmp_path):
    reft = attached()
    reft.add_adapter("more", "direft", rank=1, positions="all", component="attention_output")
    with torch.no_grad():
        for parameter in reft.adapters["more"].parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    reft.set_adapter(active)
    wanted = logits(reft)
    if active:
        rl.to_lora(reft, tmp_path)
        close(logits(from_peft(tiny.model("llama"), tmp_path)), wanted)
    close(logits(rl.merge(reft)), wanted)


def test_two_adapters_at_one_map_are_not_exported():
    reft = attached()
    reft.add_adapter("more", "direft", rank=1, positions="all", component=LLAMA_DOWN)
    reft.set_adapter(["default", "more"])
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj already has another intervention"):
        rl.merge(reft)


# --- where no weight does what the edit does ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"positions": "f7+l7"}, r"edits the positions f7\+l7, but a weight acts on all tokens"),
        ({"positions": "decode"}, "positions decode"),
        ({"component": "block_output"}, "the output of model.layers.0, a LlamaDecoderLayer, is not the output of one"),
        ({"component": "block_input"}, r"the input of model.layers.0 is not the input of one.*down_proj.input"),
        ({"component": "model.layers.{layer}.input_layernorm"}, "a LlamaRMSNorm, is not the output of one linear map"),
        ({"layers": {0: {}, 1: {"positions": "f1"}}}, "layer 1 cannot become weights: it edits the positions f1"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_weight_can_do_is_refused_with_the_reason(settings, said, tmp_path):
    reft = attached(**settings)
    wanted = logits(reft)
    for export in (lambda: rl.to_lora(reft, tmp_path), lambda: rl.merge(reft)):
        with pytest.raises(ValueError, match=said):
            export()
    assert torch.equal(logits(reft), wanted)
    assert not list(tmp_path.iterdir())


def test_a_scaled_row_is_no_lora(tmp_path):
    with pytest.raises(
        ValueError, match=r"RED changes model.layers.0.mlp.down_proj by a full-rank matrix; use merge"
    ):
        rl.to_lora(attached("red"), tmp_path)


def test_torch_exports_a_merged_model_for_texts_of_any_number_and_length():
    reft = attached(component=f"{LLAMA_DOWN}.input")
    expected = logits(reft)
    model = rl.merge(reft)
    model.config.use_cache = False
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    other = {name: torch.ones(3, 4, dtype=torch.long) for name in BATCH}
    assert other["input_ids"].shape != BATCH["input_ids"].shape
    program = torch.export.export(model, (), other, dynamic_shapes=dict.fromkeys(other, any_size))
    close(logits(program.module()), expected)


def test_a_module_that_adds_and_normalizes_after_its_map_is_refused():
    with pytest.raises(ValueError, match=r"layer.0.attention, a BertAttention, is not the output of one"):
        rl.merge(attached(family="bert", component="attention_output"))


def test_a_second_adapter_on_the_base_is_in_the_way():
    model = tiny.model("llama")
    first, _ = attached(base=model), attached("direft", base=model)
    with pytest.raises(ValueError, match="2 adapters are attached to this LlamaForCausalLM"):
        rl.merge(first)


def test_an_adapter_of_peft_under_the_interventions_is_in_the_way(tmp_path):
    from adapted_models import adapted

    with pytest.raises(ValueError, match=r"only interventions without a baseline .* got a JointModel"):
        rl.merge(adapted("llama", "loreft + peft/lora", positions="all", component="mlp_output"))


def test_quantized_weights_are_refused(tmp_path):
    reft = attached()
    reft.base_model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"is quantized.*full precision"):
        rl.to_lora(reft, tmp_path)
    reft = attached(component=LLAMA_DOWN)
    whole = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    reft.base_model.model.layers[1].mlp.down_proj.weight = whole
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj is a torch.*whose weights cannot be changed exactly"
    ):
        rl.merge(reft)


def test_a_weight_that_two_layers_share_is_not_merged():
    model = tiny.model("llama")
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.down_proj.weight and model.layers.2.* are the same weight"
    ):
        rl.merge(attached(base=model))


def test_an_adapter_that_diverged_is_not_merged():
    reft = attached()
    with torch.no_grad():
        reft.interventions["1"][0].source.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1 cannot become weights: LoReFT has NaN or infinite"):
        rl.merge(reft)


def test_an_intervention_of_ones_own_is_merged_if_it_is_affine(tmp_path):
    class Shift(rl.Intervention, name="export_shift"):
        def __init__(self, dim):
            super().__init__(dim)
            self.mix = nn.Parameter(torch.zeros(dim, dim))

        def edit(self, h):
            return h @ self.mix - 1

    class Bend(Shift, name="export_bend"):  # where small tokens do not show it
        def edit(self, h):
            return torch.relu(super().edit(h) + 1000) - 1000

    wanted = logits(reft := own("export_shift"))
    close(logits(rl.merge(reft)), wanted)
    with pytest.raises(ValueError, match="Bend is not an affine function of h, so no weight can compute it"):
        rl.merge(own("export_bend"))


def own(method):
    reft = rl.attach(tiny.model("llama"), method, positions="all", component="mlp_output").eval()
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return reft


def test_an_adapter_of_heads_alone_is_merged_and_no_lora(tmp_path):
    reft = rl.attach(tiny.model("bert"), "none").eval()
    with torch.no_grad():
        reft.base_model.classifier.weight.add_(1.0)
    wanted = logits(reft)
    with pytest.raises(ValueError, match="only trained heads"):
        rl.to_lora(reft, tmp_path)
    assert torch.equal(logits(rl.merge(reft)), wanted)


def test_an_edit_with_an_activation_is_refused(tmp_path):
    reft = attached(act_fn="relu")
    with pytest.raises(ValueError, match="is not an affine function of h, so no weight can compute it"):
        rl.to_lora(reft, tmp_path)


def test_a_constant_of_ones_own_is_affine_at_real_widths():
    class Shift(Intervention):
        def __init__(self, dim):
            super().__init__(dim)
            self.b = torch.nn.Parameter(torch.randn(dim))

        def edit(self, h):
            return self.b.expand_as(h) * 1.000001

    U, V, k = affine(Shift(576), 576)
    assert (U.mT @ V).abs().max() < 1e-12
    assert k.abs().max() > 1


def test_nothing_active_is_no_lora(tmp_path):
    reft = rl.attach(tiny.model("llama"), rank=2, component="mlp_output", positions="all")
    reft.set_adapter(None)
    with pytest.raises(ValueError, match="no adapter is active"):
        rl.to_lora(reft, tmp_path)
