"""Language models that read from left to right: transformers and state spaces."""

from __future__ import annotations

from typing import Any

from .families_inputs import TOKENS, language, padded
from .families_model import Config, Family, family

SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
ENCODER = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {
    "vocab_size": TOKENS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def decoder(name: str, model: str, base: Config | None = None, **config: Any) -> Family:
    return family(name, model, language, base, padded=padded(language), **{"use_cache": False, **config})


DECODERS = [
    decoder("gpt2", "GPT2LMHeadModel", GPT2, with_dropout={"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.3}),
    decoder("gptj", "GPTJForCausalLM", GPT2, rotary_dim=4),
    decoder("gpt_neo", "GPTNeoForCausalLM", SIZES, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=4),
    decoder("gpt_bigcode", "GPTBigCodeForCausalLM", GPT2),
    decoder("codegen", "CodeGenForCausalLM", GPT2, n_head=4, rotary_dim=4),
    decoder("llama", "LlamaForCausalLM", GROUPED),
    decoder("mistral", "MistralForCausalLM", GROUPED, sliding_window=4),
    decoder("qwen2", "Qwen2ForCausalLM", GROUPED),
    decoder("qwen3", "Qwen3ForCausalLM", GROUPED, head_dim=8),
    decoder("gemma", "GemmaForCausalLM", GROUPED, head_dim=8),
    decoder("gemma2", "Gemma2ForCausalLM", GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    decoder("gemma3", "Gemma3ForCausalLM", GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    decoder("olmo2", "Olmo2ForCausalLM", GROUPED),
    decoder("cohere", "CohereForCausalLM", GROUPED),
    decoder("granite", "GraniteForCausalLM", GROUPED),
    decoder("smollm3", "SmolLM3ForCausalLM", GROUPED),
    decoder("starcoder2", "Starcoder2ForCausalLM", GROUPED),
    decoder("stablelm", "StableLmForCausalLM", GROUPED),
    decoder("phi", "PhiForCausalLM", GROUPED, resid_pdrop=0.0),
    decoder("phi3", "Phi3ForCausalLM", GROUPED),
    decoder("opt", "OPTForCausalLM", SIZES, ffn_dim=24, word_embed_proj_dim=12, dropout=0.0, pad_token_id=1),
    decoder("bloom", "BloomForCausalLM", vocab_size=TOKENS, hidden_size=16, n_layer=2, n_head=2),
    decoder("mpt", "MptForCausalLM", vocab_size=TOKENS, d_model=16, n_layers=2, n_heads=2, max_seq_len=32),
    decoder("gpt_neox", "GPTNeoXForCausalLM", SIZES),
    decoder("falcon", "FalconForCausalLM", SIZES),
    decoder("glm4", "Glm4ForCausalLM", GROUPED, head_dim=8),
    decoder(
        "xglm",
        "XGLMForCausalLM",
        vocab_size=TOKENS,
        d_model=16,
        num_layers=2,
        attention_heads=2,
        ffn_dim=24,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    decoder(
        "ctrl",
        "CTRLLMHeadModel",
        vocab_size=TOKENS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        dff=24,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
    decoder("biogpt", "BioGptForCausalLM", ENCODER),
    decoder("mamba", "MambaForCausalLM", vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
    decoder("falcon_mamba", "FalconMambaForCausalLM", vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
    decoder(
        "mamba2",
        "Mamba2ForCausalLM",
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
    ),
    decoder("rwkv", "RwkvForCausalLM", vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16),
    decoder("recurrent_gemma", "RecurrentGemmaForCausalLM", GROUPED, num_hidden_layers=3, lru_width=16, attention_window_size=4),
    decoder("xlstm", "xLSTMForCausalLM", vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, num_heads=2, chunk_size=4),
    decoder(
        "bamba",
        "BambaForCausalLM",
        GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=4,
        mamba_chunk_size=4,
    ),
]
