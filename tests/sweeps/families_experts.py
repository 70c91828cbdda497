"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

from .families_decoders import GROUPED, SIZES, decoder
from .families_encoders import BART, T5, both
from .families_inputs import TOKENS
from .families_model import Config, Family


def experts(name: str, model: str, base: Config | None = None, **config: Any) -> Family:
    return decoder(name, model, base, experts=True, **config)


EXPERTS = [
    decoder("llama4", "Llama4ForCausalLM", GROUPED, head_dim=4, num_local_experts=3, intermediate_size_mlp=20, attention_chunk_size=4),
    experts("mixtral", "MixtralForCausalLM", GROUPED, num_local_experts=3, num_experts_per_tok=2),
    experts(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        GROUPED,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
    ),
    experts("qwen3_moe", "Qwen3MoeForCausalLM", GROUPED, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12),
    experts("olmoe", "OlmoeForCausalLM", GROUPED, num_experts=3, num_experts_per_tok=2),
    experts("gpt_oss", "GptOssForCausalLM", GROUPED, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=4),
    experts(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        SIZES,
        num_key_value_heads=2,
        moe_intermediate_size=12,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
    ),
    decoder(
        "dbrx",
        "DbrxForCausalLM",
        split=True,
        vocab_size=TOKENS,
        d_model=16,
        n_heads=2,
        n_layers=2,
        max_seq_len=32,
        attn_config={"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 16},
    ),
    experts("phimoe", "PhimoeForCausalLM", GROUPED, train=False, num_local_experts=3, num_experts_per_tok=2),
    experts("granitemoe", "GraniteMoeForCausalLM", GROUPED, num_local_experts=3, num_experts_per_tok=2),
    both(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        T5,
        split=True,
        num_experts=3,
        expert_capacity=8,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
    both(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        BART,
        split=True,
        num_experts=3,
        expert_capacity=8,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        attention_dropout=0.0,
        activation_dropout=0.0,
        moe_token_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    ),
    experts(
        "jamba",
        "JambaForCausalLM",
        GROUPED,
        num_experts=3,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=3,
        mamba_d_state=4,
    ),
    experts(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        GROUPED,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
        layer_types=["linear_attention", "full_attention"],
    ),
]
