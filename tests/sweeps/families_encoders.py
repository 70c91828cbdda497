"""Language models that read both ways, and those that do before they write."""

from __future__ import annotations

from functools import partial
from typing import Any

from .families_decoders import ENCODER, GPT2, GROUPED, SIZES
from .families_inputs import TOKENS, classes, classes_with_end, masked_language, padded, questions, translation
from .families_model import Config, Family, family

BART = {
    "vocab_size": TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "vocab_size": TOKENS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "dropout_rate": 0.0,
}


def encoder(name: str, model: str, base: Config | None = None, **config: Any) -> Family:
    return family(name, model, masked_language, base, padded=padded(masked_language), **config)


def classifier(name: str, model: str, base: Config | None = None, **config: Any) -> Family:
    return family(name, model, classes, base, padded=padded(classes), **{"num_labels": 3, **config})


def both(name: str, model: str, base: Config | None = None, **config: Any) -> Family:
    return family(name, model, translation, base, padded=padded(translation), **{"use_cache": False, **config})


ENCODERS = [
    encoder("bert", "BertForMaskedLM", ENCODER, with_dropout={"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}),
    encoder("roberta", "RobertaForMaskedLM", ENCODER, pad_token_id=0),
    encoder("xlm_roberta", "XLMRobertaForMaskedLM", ENCODER, pad_token_id=0),
    encoder(
        "distilbert",
        "DistilBertForMaskedLM",
        vocab_size=TOKENS,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    encoder("albert", "AlbertForMaskedLM", ENCODER, embedding_size=12),
    encoder("electra", "ElectraForMaskedLM", ENCODER, embedding_size=12),
    encoder("deberta", "DebertaForMaskedLM", ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], legacy=True),
    encoder(
        "deberta_v2",
        "DebertaV2ForMaskedLM",
        ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    encoder("modernbert", "ModernBertForMaskedLM", SIZES, pad_token_id=0, local_attention=4, global_attn_every_n_layers=2),
    encoder("convbert", "ConvBertForMaskedLM", ENCODER, embedding_size=12, conv_kernel_size=3),
    encoder(
        "mobilebert",
        "MobileBertForMaskedLM",
        ENCODER,
        embedding_size=8,
        intra_bottleneck_size=8,
        true_hidden_size=8,
        num_feedforward_networks=2,
    ),
    encoder(
        "squeezebert",
        "SqueezeBertForMaskedLM",
        ENCODER,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        intermediate_groups=2,
        output_groups=2,
        post_attention_groups=1,
        embedding_size=16,
    ),
    encoder(
        "rembert",
        "RemBertForMaskedLM",
        SIZES,
        input_embedding_size=12,
        output_embedding_size=14,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    encoder("roformer", "RoFormerForMaskedLM", ENCODER, embedding_size=16),
    family(
        "nystromformer",
        "NystromformerForMaskedLM",
        partial(masked_language, length=12),
        ENCODER,
        num_landmarks=4,
        segment_means_seq_len=12,
    ),
    encoder("mpnet", "MPNetForMaskedLM", ENCODER),
    encoder("esm", "EsmForMaskedLM", ENCODER, pad_token_id=0, mask_token_id=3, position_embedding_type="rotary"),
    encoder("ibert", "IBertForMaskedLM", ENCODER, pad_token_id=0),
    encoder("longformer", "LongformerForMaskedLM", ENCODER, attention_window=4, pad_token_id=0),
    family("longformer_global", "LongformerForMaskedLM", questions, ENCODER, split=True, attention_window=4, pad_token_id=0),
    encoder("big_bird", "BigBirdForMaskedLM", ENCODER, attention_type="original_full"),
    encoder("fnet", "FNetForMaskedLM", SIZES, hidden_dropout_prob=0.0, pad_token_id=0),
    encoder(
        "funnel",
        "FunnelForMaskedLM",
        vocab_size=TOKENS,
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=24,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    ),
    encoder("xlnet", "XLNetLMHeadModel", vocab_size=TOKENS, d_model=16, n_layer=2, n_head=2, d_inner=24, dropout=0.0),
    encoder(
        "xlm",
        "XLMWithLMHeadModel",
        vocab_size=TOKENS,
        emb_dim=16,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    encoder(
        "perceiver",
        "PerceiverForMaskedLM",
        vocab_size=TOKENS,
        d_model=16,
        d_latents=12,
        num_latents=5,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        qk_channels=8,
        v_channels=12,
        max_position_embeddings=11,
        attention_probs_dropout_prob=0.0,
    ),
    classifier("bert_classes", "BertForSequenceClassification", ENCODER),
    classifier("llama_classes", "LlamaForSequenceClassification", GROUPED),
    classifier("gpt2_classes", "GPT2ForSequenceClassification", GPT2, pad_token_id=0),
    family("bart_classes", "BartForSequenceClassification", classes_with_end, BART, num_labels=3),
    family("t5_classes", "T5ForSequenceClassification", classes_with_end, T5, num_labels=3, eos_token_id=2),
]
BOTH = [
    both("t5", "T5ForConditionalGeneration", T5, with_dropout={"dropout_rate": 0.2}),
    both("mt5", "MT5ForConditionalGeneration", T5, feed_forward_proj="gated-gelu"),
    both("umt5", "UMT5ForConditionalGeneration", T5),
    both("longt5", "LongT5ForConditionalGeneration", T5, local_radius=3, encoder_attention_type="local"),
    both("bart", "BartForConditionalGeneration", BART),
    both("mbart", "MBartForConditionalGeneration", BART),
    both("pegasus", "PegasusForConditionalGeneration", BART),
    both("marian", "MarianMTModel", BART, decoder_vocab_size=TOKENS),
    both(
        "m2m_100",
        "M2M100ForConditionalGeneration",
        BART,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    ),
    both("blenderbot", "BlenderbotForConditionalGeneration", BART),
    both("blenderbot_small", "BlenderbotSmallForConditionalGeneration", BART),
    both(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        vocab_size=TOKENS,
        hidden_size=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=20,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    ),
    both(
        "led",
        "LEDForConditionalGeneration",
        BART,
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
        attention_window=4,
    ),
    both("plbart", "PLBartForConditionalGeneration", BART, attention_dropout=0.0, activation_dropout=0.0),
]
