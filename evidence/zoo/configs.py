"""Tiny configs of many architectures: two layers, width 32, 64 words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

COMMON: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2}
GPT: Mapping[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64}
MOE: Mapping[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
                          "moe_intermediate_size": 24}
SCALED: Mapping[str, Any] = {"logits_scaling": 8.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.3,
                             "attention_multiplier": 0.1}
LATENT: Mapping[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                             "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4,
                             "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24,
                             "first_k_dense_replace": 1, "num_experts_per_tok": 2}

GENERATE: Mapping[str, Mapping[str, Any]] = {
    **{kind: {} for kind in (
        "llama", "mistral", "qwen2", "olmo", "olmo2", "phi", "stablelm", "cohere", "helium",
        "hunyuan_v1_dense", "apertus", "seed_oss", "diffllama", "nemotron", "starcoder2", "arcee", "ernie4_5",
        "persimmon", "smollm3", "glm4", "gemma", "vaultgemma")},
    "llama_tied": {"tie_word_embeddings": True}, "olmo_clip": {"clip_qkv": 0.05}, "qwen3": {"head_dim": 8},
    "phi3": {"sliding_window": 4}, "mistral_window": {"sliding_window": 4}, "olmo3": {"sliding_window": 4},
    "exaone4": {"sliding_window": 4, "sliding_window_pattern": 2}, "ministral": {"sliding_window": 4, "head_dim": 8},
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5}, "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4}, "cohere2": {"sliding_window": 4},
    "gpt2": GPT, "gptj": {**GPT, "rotary_dim": 4}, "gpt_bigcode": GPT, "codegen": {**GPT, "rotary_dim": 4},
    "openai-gpt": GPT, "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                                   "window_size": 4, "max_position_embeddings": 64},
    "gpt_neox": {}, "bloom": {"n_layer": 2, "n_head": 4}, "falcon": {"new_decoder_architecture": False},
    "falcon_new": {"new_decoder_architecture": True, "num_kv_heads": 2}, "falcon_alibi": {"alibi": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "opt": {
        "ffn_dim": 48, "word_embed_proj_dim": 32}, "opt_projected": {
        "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, "biogpt": {},
    "granite": SCALED, "granitemoe": {**MOE, **SCALED}, "mixtral": MOE, "qwen3_moe": MOE, "olmoe": MOE, "gpt_oss": {
        **MOE, "head_dim": 8, "sliding_window": 4}, "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
    "mixtral_aux": {**MOE, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    "phimoe": MOE, "deepseek_v2": LATENT, "deepseek_v3": LATENT, "glm4_moe": {**LATENT, "num_key_value_heads": 2},
    "mamba": {"state_size": 4, "time_step_rank": 4}, "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "jamba": {**MOE, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {"lm_head_multiplier": 0.3, "embedding_multiplier": 3.0, "mamba_d_ssm": 32, "mamba_n_heads": 4,
                  "mamba_d_head": 8, "mamba_d_state": 4,
                  "mamba_chunk_size": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4,
              "mamba_chunk_size": 4},
    "zamba2": {"mamba_d_state": 4, "n_mamba_heads": 4, "mamba_headdim": 16, "chunk_size": 4, "num_mem_blocks": 1,
               "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "qwen3_next": {**MOE, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24,
                   "layer_types": ["linear_attention", "full_attention"]},
    "llama4_text": {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64}, "recurrent_gemma": {
        "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4},
    "modernbert-decoder": {"local_attention": 4, "global_attn_every_n_layers": 2}, "gemma3n_text": {
        "head_dim": 8, "sliding_window": 4, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
        "laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "layer_types": [
            "sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    "xlnet_lm": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "bert_lm": {},
}
"""Architectures that continue texts; what follows the first underscore of a name that is none is a variant."""

ENCODE: Mapping[str, Mapping[str, Any]] = {
    **{kind: {} for kind in ("bert", "electra", "rembert", "ernie", "megatron-bert", "roc_bert", "mpnet", "eurobert")},
    **{kind: {"max_position_embeddings": 66} for kind in ("roberta", "xlm-roberta", "camembert", "data2vec-text")},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, "albert": {"embedding_size": 16},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2}, "big_bird": {"block_size": 4},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
                   "norm_rel_ebd": "layer_norm", "share_att_key": True, "max_relative_positions": 16},
    "longformer": {"attention_window": 4, "max_position_embeddings": 66}, "xlnet": {
        "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3}, "nystromformer": {
        "num_landmarks": 4, "segment_means_seq_len": 4},
    "fnet": {}, "roformer": {}, "vit": {"image_size": 8, "patch_size": 4},
    "clip": {}, "t5_encoder": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}
"""Architectures that read texts, under a classifier of ours."""

MASKED: Mapping[str, Mapping[str, Any]] = {name: ENCODE[name] for name in (
    "bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "modernbert", "mpnet", "deberta", "deberta-v2",
    "longformer", "big_bird", "convbert", "nystromformer", "fnet", "roformer")}
"""Architectures that name hidden words."""

TOWER: Mapping[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                            "num_attention_heads": 2}
SEE: Mapping[str, Any] = {"image_size": 16, "patch_size": 8, **TOWER}
MATCH: Mapping[str, Mapping[str, Any]] = {
    "clip": {"text_config": {**TOWER, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2,
                             "bos_token_id": 1, "pad_token_id": 0}, "vision_config": SEE, "projection_dim": 12},
    "siglip": {"text_config": {**TOWER, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 16,
                               "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}, "vision_config": SEE}}
"""Architectures that match pictures with texts."""

TASKS: Mapping[str, tuple[Mapping[str, Mapping[str, Any]], Any]] = {
    "generation": (GENERATE, AutoModelForCausalLM), "classification": (ENCODE, AutoModel),
    "masked_words": (MASKED, AutoModelForMaskedLM), "image_text": (MATCH, AutoModel)}
"""Of each task: its architectures, and the class that makes them."""

VARIANTS = ("_tied", "_clip", "_window", "_new", "_alibi", "_projected", "_aux", "_lm", "_encoder")


def config_of(name: str, task: str = "generation") -> Any:
    """The tiny config of this architecture."""
    kind = name
    for end in VARIANTS:
        kind = kind.removesuffix(end)
    if task == "image_text":
        return AutoConfig.for_model(kind, **MATCH[name])
    known = AutoConfig.for_model(kind)
    known = vars(known) | dict.fromkeys(known.attribute_map)
    given = {k: v for k, v in COMMON.items() if k in known} | dict(TASKS[task][0][name])
    return AutoConfig.for_model(kind, **given)


def tiny(name: str, task: str = "generation", dtype: torch.dtype = torch.float64) -> Any:
    """A random network of this architecture; the same for the same name."""
    config = config_of(name, task)
    torch.manual_seed(0)
    net = TASKS[task][1].from_config(config)
    with torch.no_grad():
        for p in net.parameters():  # larger than transformers starts them, so that every part matters
            if p.dim() > 1:
                p.mul_(2)
            elif p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.1)
    if "pooler" in dict(net.named_children()):
        net.pooler = None  # not used: what is pooled is the last hidden states
    return net.to(dtype).eval()
