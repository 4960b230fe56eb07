"""Every defect that was found in pyreft and adapters within this scope, and the test that holds it off here.

Numbers are those under which the defects were catalogued when this project began. The table is checked: each test
exists under its name.
"""

from pathlib import Path

import pytest
import tiny
import torch

import reft_lightning as rl
from reft_lightning.interventions import settings_of

HERE = Path(__file__).parent
DEFECTS = {
    "D1 any weight decay turns R to exactly 0": "test_rows_stay_orthonormal_under_weight_decay",
    "D2 weight decay never reaches W": "test_decay_acts_on_weights_and_never_on_rotations_or_biases",
    "D3 gradients of a head are never cleared": "test_a_step_starts_without_the_gradients_of_the_last",
    "D4 train() and eval() do not reach Phi": "test_training_trains_everything_and_validation_evaluates_everything",
    "D5 one call changes the next for ever": "test_one_call_leaves_no_trace_in_the_next",
    "D6 a reloaded R loses orthonormality": "test_rows_stay_orthonormal_after_loading_and_training_on",
    "D7 l1 is the last but one token": "test_the_last_prompt_token_is_the_same_column_in_every_row_D7",
    "D8 tied layers read each other's hidden states": "test_each_layer_edits_its_own_hidden_states",
    "D9 reload forgets settings": "test_save_and_load_give_equal_logits_and_generate_the_same_ids",
    "D10 saving skips a folder that is not empty": "test_saving_again_replaces_the_old_adapter",
    "D11 trained heads are not saved": "test_the_head_of_a_classifier_is_trained_and_saved",
    "D12 left padding is found by searching for BOS": "test_a_batch_gives_what_its_rows_give_padded_on_either_side",
    "D13 subset first, split after": "test_split_first_subset_after_D13",
    "D14 genuine pad or eos tokens are masked out": "test_genuine_pad_tokens_in_the_text_stay_visible_D14",
    "D16 dropout drops whole hidden states": "test_dropout_acts_on_the_edit",
    "D17 Phi is trained in pure bf16": "test_casting_the_module_keeps_float32_parameters",
    "D19 counts are passed by hand": "test_the_papers_untied_formula_has_one_intervention_a_position",
    "D20 odd counts and short prompts crash": "test_a_batch_gives_what_its_rows_give_padded_on_either_side",
    "D21 options are parsed and never used": "test_every_experiment_composes",
    "D22 double BOS": "test_a_prompt_that_spells_bos_out_gets_no_second_one_D22",
    "D23 a dummy token shifts positions": "test_no_dummy_token_stands_in_front_D23",
    "D25 widths guessed from hidden_size": "test_a_module_path_gives_the_width_of_the_linear_map_at_either_end",
    "D26 floor and ceil of the suffix clip": "test_the_floor_clip_selects_what_pyreft_selects",
    "D35 checkpoints load onto cuda:0": "test_an_adapter_goes_where_its_layer_is",
    "D36 unknown architectures cannot be loaded": "test_the_head_of_a_classifier_is_trained_and_saved",
    "D37 the paper's DiReFT cannot be reloaded": "test_save_and_load_give_equal_logits_and_generate_the_same_ids",
    "D38 older file names cannot be read": "test_logits_are_those_of_pyreft",
    "D39 an unknown component is an AttributeError": "test_an_unknown_component_lists_what_there_is_and_the_nearest",
    "D40 gradient checkpointing fails, hooks of others vanish": "test_gradient_checkpointing_gives_the_same_gradients",
    "D41 base and Phi of different dtypes crash": "test_low_precision_base_models_work",
    "D42 Phi does not follow its layer's device": "test_an_adapter_goes_where_its_layer_is",
    "D43 an existing pad token is overwritten": "test_an_existing_pad_token_stays_else_unk_else_eos",
    "D44 beams, several sequences and chunked prompts": "test_beams_give_each_row_what_it_gets_alone",
    "D46 a missing trigger is an exception": "test_scores_counts_and_predictions_agree",
    "D49 over-long prompts give NaN": "test_a_batch_of_long_prompts_has_a_finite_loss_D49",
    "D60 a d x d buffer an intervention": "test_an_intervention_has_no_buffers",
    "D61 R is computed at every access": "test_R_is_computed_once_a_forward_pass_for_all_layers",
    "D62 DDP broadcasts d x d buffers": "test_an_intervention_has_no_buffers",
    "D63 files hold the d x d base": "test_save_and_load_give_equal_logits_and_generate_the_same_ids",
    "D66 edits write into module outputs": "test_the_input_is_not_written_to",
    "D67 hooks come and go with each forward": "test_hooks_are_registered_once",
    "D69 every rank sees all rows": "test_ranks_get_equally_many_batches_and_share_the_rows_D69",
    "D71 no evaluation while training": "test_the_best_checkpoint_is_tested_and_saved_and_not_the_last",
    "D72 a file names code to import": "test_a_config_cannot_name_code_to_import",
    "adapters 1.2 (1) DiReFT becomes NoReFT": "test_noreft_or_direft_is_asked_as_adapters_does_not_save_it",
    "adapters 1.2 (2) suffix positions count the answer": "test_the_edit_of_a_prompt_does_not_see_the_target",
    "adapters 1.2 (3) every decoded token is edited": "test_cached_and_uncached_generation_and_teacher_forcing_agree",
    "adapters 1.2 (7) twice the parameters": "test_the_papers_untied_formula_has_one_intervention_a_position",
}  # fmt: skip


def test_every_defect_names_a_test():
    found = "".join(path.read_text(encoding="utf-8") for path in HERE.rglob("*.py"))
    assert [name for name in DEFECTS.values() if f"def {name}(" not in found] == []


def test_each_layer_edits_its_own_hidden_states():
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="all").eval()
    read: dict[str, torch.Tensor] = {}
    states: dict[str, torch.Tensor] = {}
    for key, group in reft.interventions.items():
        group[0].register_forward_pre_hook(lambda _, args, key=key: read.update({key: args[0]}))
    for layer, block in enumerate(reft.base_model.model.layers):
        block.mlp.register_forward_hook(lambda *a, layer=layer: states.update({str(layer): a[2]}))
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, layer=layer: states.update({f"residual {layer}": args[0]})
        )
    with torch.no_grad():
        reft(input_ids=torch.tensor([[5, 6, 7]]))
    for key, tokens in read.items():
        torch.testing.assert_close(tokens, (states[f"residual {key}"] + states[key])[0])


def test_an_adapter_goes_where_its_layer_is():
    base = tiny.model("llama")
    base.model.layers[1].to("meta")  # stands for another device
    reft = rl.attach(base, "loreft", rank=2)
    assert {key: next(group.parameters()).device.type for key, group in reft.interventions.items()} == {
        "0": "cpu", "1": "meta", "2": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize(
    "method", sorted(name for name, c in rl.INTERVENTIONS.items() if "reft" in c.__module__)
)
def test_an_intervention_has_no_buffers(method):
    cls = rl.INTERVENTIONS[method]
    settings = {"rank": 2} if "rank" in settings_of(cls) else {}
    assert list(cls(16, **settings).buffers()) == []


def test_R_is_computed_once_a_forward_pass_for_all_layers(monkeypatch):
    from reft_lightning.interventions import subspace

    shapes, original = [], subspace.orthonormal_rows
    monkeypatch.setattr(
        subspace, "orthonormal_rows", lambda A: (shapes.append(tuple(A.shape)), original(A))[1]
    )
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="f1+l1", tied="group")
    reft(input_ids=torch.tensor([[5, 6, 7]]))
    assert shapes == [(2 * tiny.LAYERS, 2, tiny.WIDTH)]
    shapes.clear()
    reft.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert shapes == [(2 * tiny.LAYERS, 2, tiny.WIDTH)]


def test_hooks_are_registered_once():
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="f1+l1")

    def hooks():
        return [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in reft.base_model.modules()]

    before = hooks()
    reft(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    reft.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    with reft.disabled():
        reft(input_ids=torch.tensor([[5, 6, 7]]))
    assert hooks() == before
