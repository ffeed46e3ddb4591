"""A zoo of transformers architectures: from configs, at tiny size, with seeded random weights.

Capture coverage is measured over it. One row of the table is one architecture; nothing is fetched,
and transformers is imported only when an entry is built. Run as a script, it builds every entry
and runs it in eval and train mode:

    python benchmarks/zoo.py [--quick] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]

VOCAB = 99
IMAGE = 32
TOKENS = 12
WAVE = 1600

# What every config gets, as far as it has such a field (or an alias of it).
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": IMAGE,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One architecture of the zoo.

    Args:
        name: unique in the zoo; with `family` it says what the row is about.
        family: text, decoder, moe, recurrent, seq2seq, vision, audio or multimodal.
        model: class name in `transformers`.
        feed: makes the keyword arguments of one forward.
        config: what the config gets beyond `TINY`.
    """

    name: str
    family: str
    model: str
    feed: Callable[[torch.Generator], Inputs]
    config: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The model in eval mode; the same weights at every call. Global RNG state is kept."""
        import transformers

        cls = getattr(transformers, self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(_config(cls.config_class, self.config)).eval()

    def inputs(self) -> Inputs:
        """Keyword arguments of one forward; the same values at every call, fresh tensors."""
        return self.feed(torch.Generator().manual_seed(1))


def entries(names: list[str] | None = None, *, quick: bool = False) -> list[Entry]:
    """The entries by name, or all; `quick` keeps the first row of every family.

    Raises:
        ValueError: a name is not in the zoo.
    """
    if names:
        unknown = sorted(set(names) - {e.name for e in ZOO})
        if unknown:
            raise ValueError(f"not in the zoo: {', '.join(unknown)}; it has {', '.join(NAMES)}")
        return [e for e in ZOO if e.name in names]
    if quick:
        return list({e.family: e for e in reversed(ZOO)}.values())[::-1]
    return list(ZOO)


def _config(cls: Any, overrides: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
    aliases = {cls.attribute_map.get(name, name) for name in overrides}
    tiny = {
        name: value
        for name, value in TINY.items()
        if name in known and cls.attribute_map.get(name, name) not in aliases
    }
    return cls(**tiny, **overrides)


# ---- inputs ---------------------------------------------------------------------------------


def _ids(rng: torch.Generator, rows: int, tokens: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=rng)


def tokens(
    rows: int = 2, length: int = TOKENS, *, mask: bool = True, decoder: int = 0
) -> Callable[[torch.Generator], Inputs]:
    """input_ids [rows, length]; with `mask`, the last row is padded by a quarter of its length;
    with `decoder`, decoder_input_ids [rows, decoder] too."""

    def feed(rng: torch.Generator) -> Inputs:
        feed = {"input_ids": _ids(rng, rows, length)}
        if mask:
            feed["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
            feed["attention_mask"][-1, -(length // 4) :] = 0
            feed["input_ids"][-1, -(length // 4) :] = 0
        if decoder:
            feed["decoder_input_ids"] = _ids(rng, rows, decoder)
        return feed

    return feed


def floats(
    name: str, *shape: int, extra: Mapping[str, tuple[int, ...]] | None = None
) -> Callable[[torch.Generator], Inputs]:
    """`name` [*shape] of normal noise, and token ids for every name and shape in `extra`."""

    def feed(rng: torch.Generator) -> Inputs:
        feed = {name: torch.randn(shape, generator=rng)}
        for key, size in (extra or {}).items():
            feed[key] = torch.randint(3, VOCAB, size, generator=rng)
        return feed

    return feed


def image_and_text(rng: torch.Generator) -> Inputs:
    return tokens()(rng) | floats("pixel_values", 2, 3, IMAGE, IMAGE)(rng)


def masked_pixels(rng: torch.Generator) -> Inputs:
    """The noise decides which patches are masked; without it the model would draw its own."""
    return PIXELS(rng) | floats("noise", 3, (IMAGE // 8) ** 2)(rng)


def llava(rng: torch.Generator) -> Inputs:
    """Sixteen image tokens (id 98) in front of the text."""
    feed = image_and_text(rng)
    image = torch.full((2, 16), VOCAB - 1)
    text = feed["input_ids"].clamp(max=VOCAB - 2)
    feed["input_ids"] = torch.cat([image, text], dim=1)
    feed["attention_mask"] = torch.cat([torch.ones_like(image), feed["attention_mask"]], dim=1)
    return feed


TEXT = tokens(3)
CAUSAL = tokens(2)
UNMASKED = tokens(2, mask=False)
SEQ2SEQ = tokens(2, decoder=9)
PIXELS = floats("pixel_values", 3, 3, IMAGE, IMAGE)
SPEECH = floats("input_values", 2, WAVE)

# ---- config pieces that several rows share --------------------------------------------------

GQA = {"num_key_value_heads": 2}
MOE = GQA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
ENC_DEC = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
PATCH = {"patch_size": 8}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}
CONV_AUDIO = {
    "conv_dim": [16, 32],
    "conv_kernel": [10, 8],
    "conv_stride": [5, 4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 4,
    "num_feat_extract_layers": 2,
}
TEXT_TOWER = {k: v for k, v in TINY.items() if k != "image_size"}
VISION_TOWER = {k: v for k, v in TINY.items() if "token" not in k and "position" not in k} | PATCH
VISION_TOWER.pop("vocab_size")
RESNET = {"model_type": "resnet", "embedding_size": 16, "layer_type": "basic"} | STAGES
TOWERS = {"text_config": TEXT_TOWER, "vision_config": VISION_TOWER}

# ---- the zoo --------------------------------------------------------------------------------

_ROWS: dict[str, list[tuple[Any, ...]]] = {
    # name, model class, inputs, config beyond TINY
    "text": [
        ("bert", "BertModel", TEXT, {}),
        ("bert-mlm", "BertForMaskedLM", TEXT, {}),
        ("roberta", "RobertaForSequenceClassification", TEXT, {}),
        ("xlm-roberta", "XLMRobertaForTokenClassification", TEXT, {}),
        ("albert", "AlbertModel", TEXT, {"embedding_size": 16}),
        ("distilbert", "DistilBertForSequenceClassification", TEXT, {"hidden_dim": 64}),
        ("electra", "ElectraForPreTraining", TEXT, {"embedding_size": 16}),
        ("deberta", "DebertaModel", TEXT, {"relative_attention": True, "pos_att_type": "p2c|c2p"}),
        (
            "deberta-v2",
            "DebertaV2Model",
            TEXT,
            {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8},
        ),
        ("mpnet", "MPNetModel", TEXT, {}),
        ("modernbert", "ModernBertForMaskedLM", TEXT, {"cls_token_id": 1, "sep_token_id": 2}),
        ("xlm", "XLMModel", TEXT, {}),
        ("xlnet", "XLNetModel", TEXT, {"d_inner": 64, "d_head": 8}),
        ("fnet", "FNetModel", UNMASKED, {"tpu_short_seq_length": 12}),
        (
            "funnel",
            "FunnelModel",
            TEXT,
            {
                "d_model": 32,
                "n_head": 4,
                "d_head": 8,
                "d_inner": 64,
                "block_sizes": [1, 1],
                "num_decoder_layers": 1,
            },
        ),
        ("bigbird", "BigBirdModel", tokens(2, 64), {"block_size": 4, "num_random_blocks": 1}),
        ("longformer", "LongformerModel", tokens(2, 16), {"attention_window": 4}),
        (
            "reformer",
            "ReformerModel",
            tokens(2, 16),
            {
                "attention_head_size": 8,
                "attn_layers": ["local", "lsh"],
                "feed_forward_size": 64,
                "axial_pos_embds": False,
                "local_attn_chunk_length": 4,
                "lsh_attn_chunk_length": 4,
                "num_buckets": 2,
                "hash_seed": 0,
            },
        ),
        ("roformer", "RoFormerModel", TEXT, {"embedding_size": 32}),
        ("squeezebert", "SqueezeBertModel", TEXT, {"embedding_size": 32}),
        (
            "mobilebert",
            "MobileBertModel",
            TEXT,
            {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
        ),
        (
            "nystromformer",
            "NystromformerModel",
            TEXT,
            {"num_landmarks": TOKENS, "segment_means_seq_len": TOKENS, "conv_kernel_size": 5},
        ),
        ("yoso", "YosoModel", TEXT, {"use_expectation": True}),
        ("camembert", "CamembertForMaskedLM", TEXT, {}),
        ("ernie", "ErnieModel", TEXT, {}),
        ("esm", "EsmModel", TEXT, {"position_embedding_type": "rotary", "token_dropout": False}),
        ("megatron-bert", "MegatronBertModel", TEXT, {}),
        ("rembert", "RemBertModel", TEXT, {"input_embedding_size": 16}),
        ("nomic-bert", "NomicBertModel", TEXT, {}),
        ("eurobert", "EuroBertModel", TEXT, GQA),
    ],
    "decoder": [
        ("gpt2", "GPT2LMHeadModel", CAUSAL, {}),
        (
            "gpt-neo",
            "GPTNeoForCausalLM",
            CAUSAL,
            {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        ),
        ("gpt-neox", "GPTNeoXForCausalLM", CAUSAL, {}),
        ("gpt-j", "GPTJForCausalLM", CAUSAL, {"rotary_dim": 4}),
        ("gpt-bigcode", "GPTBigCodeForCausalLM", CAUSAL, {}),
        ("codegen", "CodeGenForCausalLM", CAUSAL, {"rotary_dim": 4}),
        ("opt", "OPTForCausalLM", CAUSAL, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("bloom", "BloomForCausalLM", CAUSAL, {}),
        ("llama", "LlamaForCausalLM", CAUSAL, GQA),
        ("mistral", "MistralForCausalLM", CAUSAL, GQA | {"sliding_window": 8}),
        ("qwen2", "Qwen2ForCausalLM", CAUSAL, GQA),
        ("qwen3", "Qwen3ForCausalLM", CAUSAL, GQA | {"head_dim": 8}),
        ("gemma", "GemmaForCausalLM", CAUSAL, {"head_dim": 8, "num_key_value_heads": 1}),
        ("gemma2", "Gemma2ForCausalLM", CAUSAL, GQA | {"head_dim": 8, "sliding_window": 8}),
        ("gemma3", "Gemma3ForCausalLM", CAUSAL, GQA | {"head_dim": 8, "sliding_window": 8}),
        ("phi", "PhiForCausalLM", CAUSAL, {}),
        ("phi3", "Phi3ForCausalLM", CAUSAL, GQA),
        ("falcon", "FalconForCausalLM", CAUSAL, {}),
        ("stablelm", "StableLmForCausalLM", CAUSAL, GQA),
        ("cohere", "CohereForCausalLM", CAUSAL, GQA),
        ("olmo", "OlmoForCausalLM", CAUSAL, GQA),
        ("olmo2", "Olmo2ForCausalLM", CAUSAL, GQA),
        ("granite", "GraniteForCausalLM", CAUSAL, GQA),
        ("mpt", "MptForCausalLM", CAUSAL, {"d_model": 32, "max_seq_len": 64}),
        ("starcoder2", "Starcoder2ForCausalLM", CAUSAL, GQA),
        ("smollm3", "SmolLM3ForCausalLM", CAUSAL, GQA),
        ("nemotron", "NemotronForCausalLM", CAUSAL, GQA | {"head_dim": 8}),
        ("glm4", "Glm4ForCausalLM", CAUSAL, GQA | {"head_dim": 8}),
        ("biogpt", "BioGptForCausalLM", CAUSAL, {}),
        ("xglm", "XGLMForCausalLM", CAUSAL, {"ffn_dim": 64}),
    ],
    "moe": [
        ("mixtral", "MixtralForCausalLM", CAUSAL, GQA | {"num_local_experts": 4}),
        ("qwen2-moe", "Qwen2MoeForCausalLM", CAUSAL, MOE | {"shared_expert_intermediate_size": 32}),
        ("qwen3-moe", "Qwen3MoeForCausalLM", CAUSAL, MOE | {"head_dim": 8}),
        ("olmoe", "OlmoeForCausalLM", CAUSAL, GQA | {"num_experts": 4, "num_experts_per_tok": 2}),
        ("deepseek-v2", "DeepseekV2ForCausalLM", CAUSAL, MLA),
        ("deepseek-v3", "DeepseekV3ForCausalLM", CAUSAL, MLA | {"num_key_value_heads": 4}),
        (
            "gpt-oss",
            "GptOssForCausalLM",
            CAUSAL,
            GQA
            | {
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "head_dim": 8,
                "sliding_window": 8,
            },
        ),
        ("phimoe", "PhimoeForCausalLM", CAUSAL, GQA | {"num_local_experts": 4}),
        ("granitemoe", "GraniteMoeForCausalLM", CAUSAL, GQA | {"num_local_experts": 4}),
        (
            "switch-transformers",
            "SwitchTransformersForConditionalGeneration",
            SEQ2SEQ,
            T5
            | {
                "num_experts": 4,
                "num_decoder_layers": 2,
                "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1,
            },
        ),
    ],
    "recurrent": [
        ("mamba", "MambaForCausalLM", UNMASKED, {"state_size": 8}),
        (
            "mamba2",
            "Mamba2ForCausalLM",
            UNMASKED,
            {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
        ),
        ("falcon-mamba", "FalconMambaForCausalLM", UNMASKED, {"state_size": 8}),
        ("rwkv", "RwkvForCausalLM", UNMASKED, {"context_length": 64}),
        (
            "recurrent-gemma",
            "RecurrentGemmaForCausalLM",
            UNMASKED,
            {
                "num_hidden_layers": 3,
                "num_key_value_heads": 1,
                "lru_width": 32,
                "attention_window_size": 8,
            },
        ),
        (
            "jamba",
            "JambaForCausalLM",
            CAUSAL,
            GQA
            | {
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "num_experts": 4,
                "mamba_d_state": 8,
                "use_mamba_kernels": False,
            },
        ),
        (
            "bamba",
            "BambaForCausalLM",
            CAUSAL,
            GQA
            | {
                "attn_layer_indices": [1],
                "mamba_n_heads": 8,
                "mamba_d_head": 8,
                "mamba_d_state": 8,
                "mamba_chunk_size": 4,
            },
        ),
        (
            "zamba2",
            "Zamba2ForCausalLM",
            CAUSAL,
            {
                "layers_block_type": ["mamba", "hybrid"],
                "mamba_d_state": 8,
                "mamba_headdim": 8,
                "n_mamba_heads": 8,
                "chunk_size": 4,
                "num_mem_blocks": 1,
            },
        ),
        ("lfm2", "Lfm2ForCausalLM", CAUSAL, GQA | {"layer_types": ["conv", "full_attention"]}),
    ],
    "seq2seq": [
        ("t5", "T5ForConditionalGeneration", SEQ2SEQ, T5),
        (
            "mt5-gated",
            "MT5ForConditionalGeneration",
            SEQ2SEQ,
            T5 | {"feed_forward_proj": "gated-gelu"},
        ),
        ("bart", "BartForConditionalGeneration", SEQ2SEQ, ENC_DEC),
        ("pegasus", "PegasusForConditionalGeneration", SEQ2SEQ, ENC_DEC),
        ("mbart", "MBartForConditionalGeneration", SEQ2SEQ, ENC_DEC),
        ("marian", "MarianMTModel", SEQ2SEQ, ENC_DEC),
        ("blenderbot", "BlenderbotForConditionalGeneration", SEQ2SEQ, ENC_DEC),
        ("m2m-100", "M2M100ForConditionalGeneration", SEQ2SEQ, ENC_DEC),
        (
            "prophetnet",
            "ProphetNetForConditionalGeneration",
            SEQ2SEQ,
            {
                "num_encoder_layers": 2,
                "num_decoder_layers": 2,
                "num_encoder_attention_heads": 4,
                "num_decoder_attention_heads": 4,
                "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64,
                "decoder_start_token_id": 2,
            },
        ),
        (
            "led",
            "LEDForConditionalGeneration",
            tokens(2, 16, decoder=9),
            ENC_DEC
            | {
                "attention_window": 4,
                "max_encoder_position_embeddings": 64,
                "max_decoder_position_embeddings": 64,
            },
        ),
        ("umt5", "UMT5ForConditionalGeneration", SEQ2SEQ, T5),
        ("longt5", "LongT5ForConditionalGeneration", SEQ2SEQ, T5 | {"local_radius": 4}),
    ],
    "vision": [
        ("vit", "ViTForImageClassification", PIXELS, PATCH),
        ("deit", "DeiTForImageClassification", PIXELS, PATCH),
        ("swin", "SwinForImageClassification", PIXELS, SWIN),
        ("swinv2", "Swinv2Model", PIXELS, SWIN),
        ("beit", "BeitModel", PIXELS, PATCH | {"use_relative_position_bias": True}),
        (
            "convnext",
            "ConvNextForImageClassification",
            PIXELS,
            STAGES | {"num_stages": 2, "patch_size": 2},
        ),
        (
            "resnet",
            "ResNetForImageClassification",
            PIXELS,
            STAGES | {"embedding_size": 16, "layer_type": "basic"},
        ),
        (
            "regnet",
            "RegNetForImageClassification",
            PIXELS,
            STAGES | {"embedding_size": 16, "groups_width": 8},
        ),
        ("mobilenet-v2", "MobileNetV2ForImageClassification", PIXELS, {"depth_multiplier": 0.35}),
        (
            "segformer",
            "SegformerForSemanticSegmentation",
            PIXELS,
            STAGES
            | {
                "num_encoder_blocks": 2,
                "num_attention_heads": [2, 4],
                "sr_ratios": [2, 1],
                "decoder_hidden_size": 32,
            },
        ),
        ("dinov2", "Dinov2Model", PIXELS, PATCH),
        (
            "vit-mae",
            "ViTMAEForPreTraining",
            masked_pixels,
            PATCH
            | {
                "decoder_hidden_size": 32,
                "decoder_num_hidden_layers": 1,
                "decoder_num_attention_heads": 4,
                "decoder_intermediate_size": 64,
            },
        ),
        (
            "dpt",
            "DPTForDepthEstimation",
            PIXELS,
            PATCH
            | {
                "num_hidden_layers": 4,
                "backbone_out_indices": [0, 1, 2, 3],
                "neck_hidden_sizes": [16, 16, 32, 32],
                "reassemble_factors": [4, 2, 1, 0.5],
                "fusion_hidden_size": 32,
            },
        ),
        ("siglip-vision", "SiglipVisionModel", PIXELS, PATCH),
        (
            "yolos",
            "YolosForObjectDetection",
            PIXELS,
            PATCH | {"image_size": [IMAGE, IMAGE], "num_detection_tokens": 5},
        ),
        (
            "hiera",
            "HieraModel",
            PIXELS,
            {
                "image_size": [IMAGE, IMAGE],
                "embed_dim": 16,
                "depths": [1, 1],
                "num_heads": [2, 4],
                "patch_stride": [4, 4],
                "masked_unit_size": [4, 4],
                "num_query_pool": 1,
            },
        ),
        (
            "poolformer",
            "PoolFormerModel",
            PIXELS,
            {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]},
        ),
        (
            "levit",
            "LevitModel",
            PIXELS,
            {
                "hidden_sizes": [16, 32, 64],
                "num_attention_heads": [2, 4, 8],
                "depths": [1, 1, 1],
                "key_dim": [8, 8, 8],
            },
        ),
        (
            "detr",
            "DetrForObjectDetection",
            PIXELS,
            {k: v for k, v in ENC_DEC.items() if k != "decoder_start_token_id"}
            | {"num_queries": 5, "backbone_config": RESNET | {"out_features": ["stage2"]}},
        ),
        (
            "mask2former",
            "Mask2FormerForUniversalSegmentation",
            PIXELS,
            {
                "backbone_config": {
                    "model_type": "swin",
                    "image_size": IMAGE,
                    "embed_dim": 16,
                    "depths": [1, 1, 1, 1],
                    "num_heads": [2, 2, 2, 2],
                    "window_size": 4,
                    "patch_size": 4,
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
                "feature_size": 32,
                "mask_feature_size": 32,
                "hidden_dim": 32,
                "encoder_feedforward_dim": 64,
                "dim_feedforward": 64,
                "encoder_layers": 2,
                "decoder_layers": 3,
                "num_attention_heads": 4,
                "num_queries": 5,
            },
        ),
    ],
    "audio": [
        (
            "whisper",
            "WhisperForConditionalGeneration",
            floats("input_features", 2, 16, 32, extra={"decoder_input_ids": (2, 9)}),
            ENC_DEC | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32},
        ),
        ("wav2vec2", "Wav2Vec2ForCTC", SPEECH, CONV_AUDIO),
        ("hubert", "HubertModel", SPEECH, CONV_AUDIO),
        ("wavlm", "WavLMModel", SPEECH, CONV_AUDIO),
        ("data2vec-audio", "Data2VecAudioModel", SPEECH, CONV_AUDIO),
        ("sew", "SEWModel", SPEECH, CONV_AUDIO),
        ("unispeech", "UniSpeechModel", SPEECH, CONV_AUDIO),
        ("unispeech-sat", "UniSpeechSatModel", SPEECH, CONV_AUDIO),
        (
            "wav2vec2-conformer",
            "Wav2Vec2ConformerModel",
            SPEECH,
            CONV_AUDIO | {"conv_depthwise_kernel_size": 7},
        ),
        (
            "ast",
            "ASTForAudioClassification",
            floats("input_values", 2, 32, 16),
            {
                "patch_size": 8,
                "frequency_stride": 4,
                "time_stride": 4,
                "max_length": 32,
                "num_mel_bins": 16,
            },
        ),
        (
            "speech-to-text",
            "Speech2TextForConditionalGeneration",
            floats("input_features", 2, 32, 16, extra={"decoder_input_ids": (2, 9)}),
            ENC_DEC
            | {
                "conv_channels": 32,
                "input_feat_per_channel": 16,
                "max_source_positions": 64,
                "max_target_positions": 32,
            },
        ),
    ],
    "multimodal": [
        ("clip", "CLIPModel", image_and_text, TOWERS | {"projection_dim": 16}),
        ("siglip", "SiglipModel", image_and_text, TOWERS),
        (
            "blip",
            "BlipForConditionalGeneration",
            image_and_text,
            {
                "text_config": TEXT_TOWER | {"encoder_hidden_size": 32, "sep_token_id": 2},
                "vision_config": VISION_TOWER,
                "projection_dim": 16,
            },
        ),
        (
            "llava",
            "LlavaForConditionalGeneration",
            llava,
            {
                "text_config": TEXT_TOWER | GQA | {"model_type": "llama"},
                "vision_config": VISION_TOWER | {"model_type": "clip_vision_model"},
                "image_token_index": VOCAB - 1,
            },
        ),
        ("git", "GitForCausalLM", image_and_text, {"vision_config": VISION_TOWER}),
    ],
}

ZOO: tuple[Entry, ...] = tuple(
    Entry(name, family, model, feed, config)
    for family, rows in _ROWS.items()
    for name, model, feed, config in rows
)
NAMES: tuple[str, ...] = tuple(entry.name for entry in ZOO)


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the zoo and runs it once in each mode.")
    parser.add_argument("--quick", action="store_true", help="one entry per family")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    args = parser.parse_args()
    failed = 0
    for entry in entries(args.only, quick=args.quick):
        start = time.perf_counter()
        result = "ok"
        try:
            model, inputs = entry.build(), entry.inputs()
            with torch.no_grad():
                model(**inputs)
                model.train()(**inputs)
        except Exception as error:  # a survey: the row says so, and the exit code does
            failed += 1
            result = f"{type(error).__name__}: {error}".splitlines()[0]
        seconds = time.perf_counter() - start
        print(f"{entry.family:10} {entry.name:20} {seconds:5.1f} s  {result[:140]}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
