"""Models of transformers, small configurations of them, for the committed tables of their routes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from lightning_namo.routing.split import ParameterGroups

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
SIZES = {"layers": 2, "ffn_dim": 48, "attention_heads": 4}
VISION = {**TEXT, "image_size": 32, "patch_size": 8, "num_labels": 10}
BOTH: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    **{f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in SIZES.items()},
}
MAMBA = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def _model(config: str, model: str, *parts: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    """What makes a model, without memory for it, of the classes of that name."""

    def make() -> nn.Module:
        arguments: dict[str, Any] = {}
        for part in (*parts, more):
            arguments |= part
        with torch.device("meta"):
            made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**arguments))
        return made

    return make


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    # decoders
    "gpt2": _model(
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=96,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
    ),
    "gpt2_double_heads": _model(
        "GPT2Config",
        "GPT2DoubleHeadsModel",
        vocab_size=96,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
    ),
    "llama": _model("LlamaConfig", "LlamaForCausalLM", TEXT, GROUPED),
    "llama_reward": _model("LlamaConfig", "LlamaForSequenceClassification", TEXT, GROUPED, num_labels=1),
    "qwen3": _model("Qwen3Config", "Qwen3ForCausalLM", TEXT, GROUPED, tie_word_embeddings=True),
    "phi3": _model("Phi3Config", "Phi3ForCausalLM", TEXT, GROUPED),
    "gpt_neox": _model("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "bloom": _model("BloomConfig", "BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _model("FalconConfig", "FalconForCausalLM", TEXT),
    "mpt": _model(
        "MptConfig",
        "MptForCausalLM",
        vocab_size=96,
        d_model=32,
        n_layers=2,
        n_heads=4,
        max_seq_len=24,
    ),
    "opt": _model("OPTConfig", "OPTForCausalLM", TEXT, ffn_dim=48, word_embed_proj_dim=16),
    "gpt_bigcode": _model(
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        vocab_size=96,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
    ),
    "gemma3n": _model(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        TEXT,
        GROUPED,
        num_hidden_layers=5,
        intermediate_size=[48] * 5,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 5,
        activation_sparsity_pattern=[0.0] * 5,
    ),
    # mixtures of experts
    "mixtral": _model("MixtralConfig", "MixtralForCausalLM", TEXT, GROUPED, EXPERTS),
    "qwen2_moe": _model(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        TEXT,
        GROUPED,
        EXPERTS,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
    ),
    "gpt_oss": _model(
        "GptOssConfig",
        "GptOssForCausalLM",
        TEXT,
        GROUPED,
        EXPERTS,
        layer_types=["full_attention"] * 2,
    ),
    "deepseek_v3": _model(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        TEXT,
        EXPERTS,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "llama4_text": _model(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        TEXT,
        GROUPED,
        EXPERTS,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
    ),
    "jetmoe": _model("JetMoeConfig", "JetMoeForCausalLM", TEXT, EXPERTS, kv_channels=8, num_key_value_heads=2),
    "switch_transformers": _model(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    # state spaces and recurrences
    "mamba": _model("MambaConfig", "MambaForCausalLM", MAMBA),
    "mamba2": _model("Mamba2Config", "Mamba2ForCausalLM", MAMBA, num_heads=8, head_dim=8, n_groups=2),
    "falcon_mamba": _model("FalconMambaConfig", "FalconMambaForCausalLM", MAMBA),
    "jamba": _model(
        "JambaConfig",
        "JambaForCausalLM",
        TEXT,
        GROUPED,
        EXPERTS,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
    ),
    "zamba": _model(
        "ZambaConfig",
        "ZambaForCausalLM",
        TEXT,
        num_hidden_layers=12,
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "rwkv": _model("RwkvConfig", "RwkvForCausalLM", vocab_size=96, hidden_size=32, num_hidden_layers=2),
    "recurrent_gemma": _model(
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        TEXT,
        GROUPED,
        num_hidden_layers=3,
        lru_width=32,
    ),
    # encoders of text
    "bert_masked": _model("BertConfig", "BertForMaskedLM", TEXT),
    "bert_pretraining": _model("BertConfig", "BertForPreTraining", TEXT),
    "bert_two_labels": _model("BertConfig", "BertForSequenceClassification", TEXT, num_labels=2),
    "bert_three_labels": _model("BertConfig", "BertForSequenceClassification", TEXT, num_labels=3),
    "bert": _model("BertConfig", "BertModel", TEXT),
    "roberta_classification": _model("RobertaConfig", "RobertaForSequenceClassification", TEXT, num_labels=3),
    "albert_answers": _model("AlbertConfig", "AlbertForQuestionAnswering", TEXT, embedding_size=16),
    "deberta_v2": _model(
        "DebertaV2Config",
        "DebertaV2ForTokenClassification",
        TEXT,
        relative_attention=True,
        num_labels=5,
    ),
    "distilbert": _model(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        vocab_size=96,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
    ),
    "modernbert": _model("ModernBertConfig", "ModernBertForMaskedLM", TEXT),
    "electra_pretraining": _model("ElectraConfig", "ElectraForPreTraining", TEXT, embedding_size=16),
    "xlnet": _model(
        "XLNetConfig",
        "XLNetLMHeadModel",
        vocab_size=96,
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=48,
    ),
    "funnel": _model(
        "FunnelConfig",
        "FunnelForMaskedLM",
        vocab_size=96,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
        block_sizes=[1, 1],
    ),
    # encoders and decoders
    "t5": _model(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
    ),
    "bart_classification": _model(
        "BartConfig",
        "BartForSequenceClassification",
        BOTH,
        max_position_embeddings=24,
    ),
    # images
    "vit": _model("ViTConfig", "ViTForImageClassification", VISION),
    "deit_teacher": _model("DeiTConfig", "DeiTForImageClassificationWithTeacher", VISION),
    "dinov2_registers": _model("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", VISION),
    "beit": _model("BeitConfig", "BeitForImageClassification", VISION, use_relative_position_bias=True),
    "swin": _model(
        "SwinConfig",
        "SwinForImageClassification",
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        num_labels=10,
    ),
    "convnext": _model(
        "ConvNextConfig",
        "ConvNextForImageClassification",
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
    ),
    "resnet": _model(
        "ResNetConfig",
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_labels=10,
    ),
    "segformer": _model(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "sam": _model(
        "SamVisionConfig",
        "SamVisionModel",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        output_channels=16,
    ),
    "perceiver": _model(
        "PerceiverConfig",
        "PerceiverForMaskedLM",
        vocab_size=96,
        d_model=32,
        d_latents=48,
        num_latents=12,
        num_self_attends_per_block=1,
    ),
    # images and text, sound, series
    "clip": _model("CLIPConfig", "CLIPModel", text_config=TEXT, vision_config=VISION, projection_dim=16),
    "layoutlmv3": _model(
        "LayoutLMv3Config",
        "LayoutLMv3ForQuestionAnswering",
        TEXT,
        input_size=32,
        patch_size=8,
        coordinate_size=5,
        shape_size=6,
    ),
    "blip2_qformer": _model("Blip2QFormerConfig", "Blip2QFormerModel", TEXT, encoder_hidden_size=24),
    "whisper": _model(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        BOTH,
        pad_token_id=0,
    ),
    "wav2vec2_pretraining": _model(
        "Wav2Vec2Config",
        "Wav2Vec2ForPreTraining",
        TEXT,
        conv_dim=[16, 16],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        codevector_dim=16,
        proj_codevector_dim=16,
    ),
    "wav2vec2_conformer_ctc": _model(
        "Wav2Vec2ConformerConfig",
        "Wav2Vec2ConformerForCTC",
        TEXT,
        conv_dim=[16, 16],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        position_embeddings_type="relative",
    ),
    "musicgen": _model("MusicgenDecoderConfig", "MusicgenForCausalLM", TEXT, ffn_dim=48, num_codebooks=2),
    "patchtst": _model(
        "PatchTSTConfig",
        "PatchTSTForRegression",
        d_model=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=48,
    ),
    "decision_transformer": _model(
        "DecisionTransformerConfig",
        "DecisionTransformerModel",
        state_dim=5,
        act_dim=3,
        hidden_size=32,
        n_layer=2,
        n_head=4,
    ),
}


def table(groups: ParameterGroups) -> str:
    """The routes, a line for all those that differ only by numbers in their names, and the summary."""
    rows: dict[tuple[str, ...], int] = {}
    for route in groups.routes:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", route.name)
        reason = re.sub(r"(tied to [\w.]+?\.)\d+(?=\.)", r"\1*", route.reason)
        row = (name, "x".join(map(str, route.shape)), route.group, route.confidence, reason)
        rows[row] = rows.get(row, 0) + 1
    cells = [("parameter", "count", "shape", "group", "confidence", "reason")]
    cells += [(row[0], str(count), *row[1:]) for row, count in rows.items()]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = ["  ".join([*map(str.ljust, row[:5], widths), row[5]]) for row in cells]
    return "\n".join([*lines, *groups.summary, ""])
