"""Every architecture of transformers, as small as its configuration allows.

A configuration is shrunk by the names of its sizes, those of its parts too. What that leaves too large, or does not
fit together, is not built; :func:`build` says why.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY, WIDTH, LAYERS = 64, 32, 4
MOST = 20_000_000  # parameters
PAD, BOS, EOS = 0, 1, 2

SIZES: list[tuple[Any, str]] = [
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size "
        "codebook_size"),
    (WIDTH, "hidden_size d_model n_embd embed_dim embedding_size dim word_embed_proj_dim encoder_hidden_size "
        "text_hidden_size out_hidden_size output_dim projection_dim lru_width attention_hidden_size "
        "vision_output_dim intermediate_size_mlp hidden_dim mm_hidden_size adapter_out_dim hidden_size_global "
        "projector_hidden_size encoder_width audio_hidden_size mlp_dim entity_emb_size image_size input_size"),
    (48, "intermediate_size ffn_dim ffn_hidden_size n_inner d_ff encoder_ffn_dim decoder_ffn_dim dim_ff "
        "expert_ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size dense_intermediate_size expert_dim "
        "mlp_hidden_size downsample_hidden_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers depth num_blocks resampler_depth layers"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads swa_num_attention_heads index_n_heads linear_num_value_heads linear_num_heads "
        "mamba_n_heads mamba_num_heads n_mamba_heads n_routed_experts num_experts num_local_experts "
        "moe_num_experts number_experts n_attention_heads num_attn_heads attn_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads linear_num_key_value_heads "
        "num_experts_per_tok num_experts_per_token moe_k moe_topk n_shared_experts num_random_blocks "
        "temporal_patch_size moe_num_shared_experts n_layers_per_attn_res_block"),
    (1, "n_group topk_group num_expert_group num_nextn_predict_layers first_k_dense_replace num_dense_layers "
        "mamba_n_groups n_groups num_shared_experts mamba_ngroups"),
    (8, "head_dim kv_channels d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_dim mamba_headdim "
        "mamba_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim linear_head_dim kv_lora_rank "
        "q_lora_rank index_head_dim swa_head_dim state_size mamba_d_state ssm_state_size laurel_rank "
        "hidden_size_per_layer_input d_rel dim_head global_head_dim rotary_dim swa_v_head_dim qkv_dim "
        "query_pre_attn_scalar"),
    (16, "qk_head_dim mamba_chunk_size chunk_size sliding_window sliding_window_size local_attention block_size "
        "index_topk rel_extent prompt_length attn_window_size"),
    (128, "max_position_embeddings n_positions max_seq_len max_position max_2d_position_embeddings "
        "max_source_positions max_target_positions n_ctx max_seq_length"),
    (0.0, "dropout attention_dropout activation_dropout hidden_dropout hidden_dropout_prob "
        "attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop emb_pdrop classifier_dropout dropout_rate "
        "embedding_dropout mlp_dropout summary_first_dropout layerdrop encoder_layerdrop decoder_layerdrop "
        "summary_last_dropout projector_dropout projection_dropout ffn_dropout"),
    (0.4, "initializer_range init_std"),
    (PAD, "pad_token_id padding_idx"),
    (BOS, "bos_token_id decoder_start_token_id"),
    (EOS, "eos_token_id sep_token_id forced_eos_token_id"),
]  # fmt: skip
DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "num_encoder_layers",
    "layers",
    "n_layer",
    "n_layers",
)
BY_NAME = {name: size for size, names in SIZES for name in names.split()}
# What a name alone does not tell, by model_type.
MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4}  # keys and values of every head come from one latent vector
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
WORDS = {"emb_dim": WIDTH, "n_words": VOCABULARY}
ROPE_3D = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
LATENT_MODELS = (
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note_text glm4_moe_lite glm5_next glm_moe_dsa "
    "longcat_flash minicpm3 mistral4 youtu"
)
ROPE_3D_MODELS = "glm4v_text glm_ocr_text paddleocr_vl_text qwen2_5_omni_text qwen2_5_vl_text qwen2_vl_text"
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LATENT_MODELS.split(), LATENT),
    **dict.fromkeys(ROPE_3D_MODELS.split(), ROPE_3D),
    **dict.fromkeys(("xlm", "flaubert"), WORDS),
    **dict.fromkeys(("bamba", "granitemoehybrid"), MAMBA_HEADS | MIXED),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), LATENT | MIXED),
    "falcon_h1": MAMBA_HEADS | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(kind: type[PretrainedConfig], **own: Any) -> PretrainedConfig:
    """Return a small configuration of a class."""
    return kind(**_arguments(kind, own))


def _arguments(kind: type[PretrainedConfig], own: dict[str, Any], text: bool = True) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(kind):
        size = BY_NAME.get(field.name)
        if size is None or ("list" in str(field.type) and not field.name.endswith("token_id")):
            continue
        # towers have other numbers of blocks than the language model
        size = LAYERS - 2 if field.name in DEPTHS and not text else size
        found[field.name] = type(field.default)(size) if isinstance(field.default, int | float) else size
    found |= SPECIAL.get(kind.model_type, {})
    parts = {name for name in kind.sub_configs if name not in found}
    default = kind() if parts else None
    for name in parts:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            inside = _arguments(type(part), {}, "text" in name or "decoder" in name or "thinker" in name)
            found[name] = inside | {"model_type": part.model_type}
    return found | own


_built: dict[str, PreTrainedModel] = {}


def build(auto: Any, kind: type[PretrainedConfig], **own: Any) -> PreTrainedModel:
    """Return a copy of a small random model in eval mode, always the same, which is not built again soon.

    Raises:
        Exception: what the configuration or the model raise, or ValueError if it is not small.
    """
    key = f"{auto.__name__} {kind.__name__} {own}"
    if key not in _built:
        if len(_built) > 20:  # the slow suite builds hundreds
            _built.clear()
        _built[key] = _first(auto, shrunk(kind, **own))
    return copy.deepcopy(_built[key])


def _first(auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return auto.from_config(config).eval()
