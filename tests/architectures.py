"""Tiny models with random weights, of each architecture that transformers has a causal language model of."""

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from toolweaver_hf.adapter import auto_class


def _sizes(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# The attributes that set sizes, as the architectures name them
SIZES = {
    **_sizes(32, "hidden_size d_model n_embd embed_dim dim emb_dim decoder_hidden_size hidden_dim embedding_size"),
    **_sizes(64, "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff"),
    **_sizes(64, "d_inner feed_forward_size shared_intermediate_size mamba_d_ssm"),
    **_sizes(256, "max_position_embeddings n_positions max_seq_len max_target_positions"),
    **_sizes(16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank"),
    **_sizes(16, "kv_lora_rank mamba_d_head mamba_head_dim index_head_dim attention_head_dim o_lora_rank"),
    **_sizes(16, "out_hidden_size shared_experts_intermediate_size router_hidden_size rel_extent hc_lowrank"),
    **_sizes(8, "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_state d_state state_size"),
    **_sizes(8, "ssm_state_size linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input"),
    **_sizes(8, "sliding_window sliding_window_size window_size attention_window_size"),
    **_sizes(8, "global_head_dim swa_head_dim linear_head_dim dim_head d_rel laurel_rank pronunciation_embed_dim"),
    **_sizes(8, "shape_embed_dim image_size adapter_rank"),
    **_sizes(4, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers"),
    **_sizes(4, "num_encoder_layers num_attention_heads n_head n_heads num_heads encoder_attention_heads"),
    **_sizes(4, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts"),
    **_sizes(4, "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads rotary_dim"),
    **_sizes(4, "linear_num_value_heads linear_num_heads swa_num_attention_heads patch_size num_layer vision_layers"),
    **_sizes(2, "num_key_value_heads num_experts_per_tok moe_k index_n_heads linear_num_key_heads attn_layer_period"),
    **_sizes(2, "expert_layer_period swa_num_key_value_heads n_mamba_heads moe_topk zero_expert_num num_blocks depth"),
    **_sizes(2, "layer_group_size num_global_key_value_heads altup_num_inputs n_layers_per_attn_res_block"),
    **_sizes(1, "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups n_groups mamba_ngroups"),
    **_sizes(1, "attn_layer_offset expert_layer_offset n_input_layers n_output_layers num_dense_layers"),
    **_sizes(0, "num_kv_shared_layers num_nextn_predict_layers num_mtp_layers"),
}
LATENT = {"num_key_value_heads": 4}  # heads that are rebuilt from a latent vector
# What an architecture needs beside its sizes
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
NEEDS = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        **{f"swa_num_{name}": 4 for name in ("attention_heads", "key_value_heads")},
        **{f"swa_{name}": 8 for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "swa_head_dim": 16,
    },
    "emu3": {"vocabulary_map": {"<image>": 3, "<|visual token 000000|>": 4, "<|extra_200|>": 5}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": LINEAR,
    "kimi_linear": LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen2_5_vl_text": SECTIONS,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
    },
    "xlstm": {"hidden_size": 128, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


# What cannot be built, or not as a model of text alone
UNBUILT = {
    "blt": "it reads bytes in patches that another model makes",
    "dbrx": "its configuration fails with its own defaults",
    "dots3_note": "its vision model is not tiny; the text model is built",
    "gemma3n": "its vision model is in timm; the text model is built",
    "gemma4_assistant": "it drafts from the states of another model",
    "gemma4_unified_assistant": "it drafts from the states of another model",
    "musicgen": "its tokens are sounds",
    "musicgen_melody": "its tokens are sounds",
}


# Of those that read images beside text, and are no causal language models by their class, the ones that many train
IMAGE_TEXT = ("idefics3", "llava", "mistral3", "mistral4", "qwen2_5_vl", "qwen3_vl", "smolvlm")


def causal_architectures() -> list[str]:
    """The model types whose causal language models can be built, one of each class."""
    one_of_class = {name: model_type for model_type, name in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())}
    return [model_type for model_type in reversed(one_of_class.values()) if model_type not in UNBUILT]


def tiny_config(model_type: str, vocab_size: int) -> PreTrainedConfig:
    """Build the configuration of a tiny model."""
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class.__dataclass_fields__)
    tokens = {"vocab_size": vocab_size, "vocab_size_per_layer_input": vocab_size, "is_decoder": True}
    tokens |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values = {name: value for name, value in (SIZES | tokens).items() if name in known}
    if "unpadded_vocab_size" in known:
        values["unpadded_vocab_size"] = vocab_size
    if "kv_lora_rank" in known:
        values |= LATENT
    for name in config_class.sub_configs:
        default = getattr(config_class(), name, None)
        if default is not None and default.model_type in CONFIG_MAPPING:
            values[name] = tiny_config(default.model_type, vocab_size).to_dict()
    return config_class(**(values | NEEDS.get(model_type, {})))


def tiny_model(model_type: str, vocab_size: int, pad_token_id: int = 0) -> PreTrainedModel:
    """Build a tiny model, with weights large enough that its predictions differ."""
    config = tiny_config(model_type, vocab_size)
    config.get_text_config().pad_token_id = pad_token_id
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(3)
    return model
