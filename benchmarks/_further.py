"""More models for the coverage benchmark: other transformers architectures, diffusers, graph
networks of torch_geometric, and plain torch with in-place operations.

None of timm: it imports torchvision, whose compiled operators do not load beside the CPU build of
torch 2.13 ("operator torchvision::nms does not exist"); plain torch has its kinds of layers.

As in `zoo`: tiny, from configs or plain code, with seeded random weights; nothing is fetched, and a
library is imported only when one of its entries is built.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import (
    CAUSAL,
    ENC_DEC,
    GQA,
    IMAGE,
    MOE,
    PATCH,
    PIXELS,
    SEQ2SEQ,
    SPEECH,
    STAGES,
    TEXT,
    TOKENS,
    TOWERS,
    UNMASKED,
    VOCAB,
    Inputs,
    floats,
    image_and_text,
    tokens,
)  # fmt: skip

Feed = Callable[[torch.Generator], Inputs]


@dataclasses.dataclass(frozen=True)
class Made:
    """A model that a function makes; otherwise as `zoo.Entry`.

    Args:
        name: unique among all entries.
        family: diffusers, graph or plain.
        make: builds the model; its random numbers are seeded for it.
        feed: makes the keyword arguments of one forward.
        library: what it must be able to import, where that is not a matter of course.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    feed: Feed
    library: str = "torch"

    def build(self) -> nn.Module:
        """The model in eval mode; the same weights at every call. Global RNG state is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    def inputs(self) -> Inputs:
        """Keyword arguments of one forward; the same values at every call, fresh tensors."""
        return self.feed(torch.Generator().manual_seed(1))


Entry = zoo.Entry | Made


def further(names: list[str] | None = None, *, quick: bool = False) -> list[Entry]:
    """The entries by name, or all; `quick` keeps one of every library.

    Raises:
        ValueError: a name is not among them.
    """
    if names:
        unknown = sorted(set(names) - set(NAMES))
        if unknown:
            raise ValueError(f"no entry {', '.join(unknown)} among {', '.join(NAMES)}")
        return [e for e in FURTHER if e.name in names]
    if quick:
        return [e for e in FURTHER if e.name in QUICK]
    return list(FURTHER)


def absent(entry: Entry) -> str | None:
    """Why the entry cannot be built here; None where it can."""
    library = getattr(entry, "library", "transformers")
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    try:
        importlib.import_module(library)
    except Exception as error:  # the row says so
        return f"{library} does not import: {type(error).__name__}: {error}".splitlines()[0]
    return None


# ---- transformers ---------------------------------------------------------------------------

VIDEO = floats("pixel_values", 2, 4, 3, IMAGE, IMAGE)


def bbox(rng: torch.Generator) -> Inputs:
    """Every token with its box on the page."""
    feed = TEXT(rng)
    low = torch.randint(0, 30, (*feed["input_ids"].shape, 2), generator=rng)
    size = torch.randint(1, 30, low.shape, generator=rng)
    return feed | {"bbox": torch.cat([low, low + size], dim=-1)}


def two_towers_of_text(rng: torch.Generator) -> Inputs:
    """Text, and two objects in the image with their places."""
    return UNMASKED(rng) | {
        "visual_feats": torch.randn(2, 2, 16, generator=rng),
        "visual_pos": torch.rand(2, 2, 4, generator=rng),
    }


def returns_and_states(rng: torch.Generator) -> Inputs:
    return {
        "states": torch.randn(2, 5, 7, generator=rng),
        "actions": torch.randn(2, 5, 3, generator=rng),
        "returns_to_go": torch.randn(2, 5, 1, generator=rng),
        "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5),
    }


_TRANSFORMERS: dict[str, list[tuple[Any, ...]]] = {
    # name, model class, inputs, config beyond zoo.TINY
    "text": [
        ("convbert", "ConvBertModel", TEXT, {"embedding_size": 32}),
        ("ibert", "IBertModel", TEXT, {}),
        ("data2vec-text", "Data2VecTextModel", TEXT, {}),
        ("roberta-prelayernorm", "RobertaPreLayerNormModel", TEXT, {}),
        ("xlm-roberta-xl", "XLMRobertaXLModel", TEXT, {}),
        ("xmod", "XmodModel", TEXT, {"default_language": "en_XX"}),
        ("splinter", "SplinterModel", TEXT, {"question_token_id": 5}),
        ("flaubert", "FlaubertModel", TEXT, {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
        ("canine", "CanineModel", tokens(2, 32), {
            "local_transformer_stride": 8, "downsampling_rate": 2, "num_hash_buckets": 64,
        }),
        ("mra", "MraModel", tokens(2, 64, mask=False), {"block_per_row": 2}),
        ("layoutlm", "LayoutLMModel", bbox, {"max_2d_position_embeddings": 64}),
        ("bert-generation", "BertGenerationEncoder", TEXT, {}),
        ("dpr", "DPRQuestionEncoder", TEXT, {}),
    ],
    "decoder": [
        ("openai-gpt", "OpenAIGPTLMHeadModel", CAUSAL, {}),
        ("ctrl", "CTRLLMHeadModel", CAUSAL, {"dff": 64}),
        ("glm", "GlmForCausalLM", CAUSAL, GQA | {"head_dim": 8}),
        ("cohere2", "Cohere2ForCausalLM", CAUSAL, GQA | {"sliding_window": 8}),
        ("olmo3", "Olmo3ForCausalLM", CAUSAL, GQA | {"sliding_window": 8}),
        ("helium", "HeliumForCausalLM", CAUSAL, GQA | {"head_dim": 8}),
        ("persimmon", "PersimmonForCausalLM", CAUSAL, {}),
        ("diffllama", "DiffLlamaForCausalLM", CAUSAL, GQA | {"head_dim": 8}),
        ("apertus", "ApertusForCausalLM", CAUSAL, GQA),
        ("arcee", "ArceeForCausalLM", CAUSAL, GQA),
        ("bitnet", "BitNetForCausalLM", CAUSAL, GQA),
        ("seed-oss", "SeedOssForCausalLM", CAUSAL, GQA | {"head_dim": 8}),
        ("gpt-neox-japanese", "GPTNeoXJapaneseForCausalLM", CAUSAL, {}),
        ("trocr", "TrOCRForCausalLM", CAUSAL, {
            "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
        }),
        ("exaone4", "Exaone4ForCausalLM", CAUSAL, GQA | {"sliding_window": 8}),
        ("modernbert-decoder", "ModernBertDecoderForCausalLM", CAUSAL, {
            "cls_token_id": 1, "sep_token_id": 2,
        }),
    ],
    "moe": [
        ("jetmoe", "JetMoeForCausalLM", CAUSAL, {
            "num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2,
        }),
        ("ernie4-5-moe", "Ernie4_5_MoeForCausalLM", CAUSAL, GQA | {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
        }),
        ("glm4-moe", "Glm4MoeForCausalLM", CAUSAL, GQA | {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "head_dim": 8,
        }),
        ("qwen3-next", "Qwen3NextForCausalLM", CAUSAL, MOE | {
            "head_dim": 8, "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        }),
    ],
    "seq2seq": [
        ("plbart", "PLBartForConditionalGeneration", SEQ2SEQ, ENC_DEC),
        ("blenderbot-small", "BlenderbotSmallForConditionalGeneration", SEQ2SEQ, ENC_DEC),
        ("bigbird-pegasus", "BigBirdPegasusForConditionalGeneration", SEQ2SEQ, ENC_DEC | {
            "attention_type": "original_full",
        }),
        ("pegasus-x", "PegasusXForConditionalGeneration", tokens(2, 16, decoder=9), ENC_DEC | {
            "block_size": 4, "num_global_tokens": 4,
        }),
        ("fsmt", "FSMTForConditionalGeneration", SEQ2SEQ, ENC_DEC | {
            "langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB,
        }),
        ("nllb-moe", "NllbMoeForConditionalGeneration", SEQ2SEQ, ENC_DEC | {
            "num_experts": 4, "expert_capacity": 8,
        }),
    ],
    "vision": [
        ("convnextv2", "ConvNextV2ForImageClassification", PIXELS, STAGES | {
            "num_stages": 2, "patch_size": 2,
        }),
        ("efficientnet", "EfficientNetModel", PIXELS, {"width_coefficient": 0.25,
                                                      "depth_coefficient": 0.2,
                                                      "hidden_dim": 320}),
        ("mobilenet-v1", "MobileNetV1ForImageClassification", PIXELS, {"depth_multiplier": 0.25}),
        ("bit", "BitForImageClassification", PIXELS, STAGES | {"embedding_size": 16,
                                                              "num_groups": 4}),
        ("pvt", "PvtModel", PIXELS, {
            "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2],
            "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
        }),
        ("focalnet", "FocalNetModel", PIXELS, {
            "embed_dim": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
            "focal_levels": [2, 2], "focal_windows": [3, 3], "patch_size": 4,
        }),
        ("swiftformer", "SwiftFormerModel", PIXELS, {
            "depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32],
        }),
        ("mobilevit", "MobileViTModel", PIXELS, {
            "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
            "patch_size": 2,
        }),
        ("vit-msn", "ViTMSNModel", PIXELS, PATCH),
        ("dinov2-registers", "Dinov2WithRegistersModel", PIXELS, PATCH | {
            "num_register_tokens": 2,
        }),
        ("videomae", "VideoMAEModel", VIDEO, PATCH | {"num_frames": 4}),
        ("vivit", "VivitModel", VIDEO, {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
        ("timesformer", "TimesformerModel", VIDEO, PATCH | {"num_frames": 4}),
        ("swin2sr", "Swin2SRForImageSuperResolution", PIXELS, {
            "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
        }),
        ("glpn", "GLPNForDepthEstimation", PIXELS, STAGES | {
            "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1],
            "decoder_hidden_size": 16, "patch_sizes": [7, 3], "strides": [4, 2],
            "mlp_ratios": [2, 2],
        }),
        ("table-transformer", "TableTransformerForObjectDetection", PIXELS, {
            k: v for k, v in ENC_DEC.items() if k != "decoder_start_token_id"
        } | {"num_queries": 5, "backbone_config": zoo.RESNET | {"out_features": ["stage2"]},
             "use_timm_backbone": False}),
    ],
    "audio": [
        ("sew-d", "SEWDModel", SPEECH, zoo.CONV_AUDIO | {"squeeze_factor": 1}),
        ("wav2vec2-bert", "Wav2Vec2BertModel", floats("input_features", 2, 16, 16), {
            "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 7,
        }),
        ("moonshine", "MoonshineForConditionalGeneration",
         floats("input_values", 2, 2400, extra={"decoder_input_ids": (2, 9)}), {
            "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
            "decoder_start_token_id": 1,
        }),
    ],
    "multimodal": [
        ("visual-bert", "VisualBertModel", TEXT, {}),
        ("lxmert", "LxmertModel", two_towers_of_text, {
            "l_layers": 1, "r_layers": 1, "x_layers": 1, "visual_feat_dim": 16,
        }),
        ("vilt", "ViltModel", image_and_text, PATCH),
        ("altclip-vision", "AltCLIPVisionModel", PIXELS, PATCH),
        ("chinese-clip", "ChineseCLIPModel", image_and_text, TOWERS | {"projection_dim": 16}),
        ("clipseg-vision", "CLIPSegVisionModel", PIXELS, PATCH),
        ("owlvit-vision", "OwlViTVisionModel", PIXELS, PATCH),
        ("groupvit-text", "GroupViTTextModel", TEXT, {}),
    ],
    "series": [
        ("decision-transformer", "DecisionTransformerModel", returns_and_states, {
            "state_dim": 7, "act_dim": 3, "max_ep_len": 16,
        }),
        ("patchtst", "PatchTSTModel", floats("past_values", 2, 32, 3), {
            "num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4,
            "d_model": 32, "ffn_dim": 64,
        }),
        ("patchtsmixer", "PatchTSMixerModel", floats("past_values", 2, 32, 3), {
            "num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4,
            "d_model": 32, "num_layers": 2,
        }),
    ],
}  # fmt: skip

# ---- diffusers ------------------------------------------------------------------------------


def _diffusers(cls: str, /, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = importlib.import_module("diffusers")
        model: nn.Module = getattr(module, cls)(**config)
        for parameter in model.parameters():  # several start as zeros, which hides every fault
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return model

    return make


def _fields(**shapes: tuple[int, ...] | Tensor) -> Feed:
    """Normal noise of every shape; a tensor is fed as it is."""

    def feed(rng: torch.Generator) -> Inputs:
        return {
            name: value.clone() if isinstance(value, Tensor) else torch.randn(value, generator=rng)
            for name, value in shapes.items()
        }

    return feed


STEP = torch.tensor([3, 7])
LATENT = (2, 4, 8, 8)
PROMPT = (2, 5, 32)
BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}

_DIFFUSERS: list[tuple[str, Callable[[], nn.Module], Feed]] = [
    ("unet-2d", _diffusers(
        "UNet2DModel", sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **BLOCKS,
    ), _fields(sample=LATENT, timestep=STEP)),
    ("unet-2d-condition", _diffusers(
        "UNet2DConditionModel", sample_size=8, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **BLOCKS,
    ), _fields(sample=LATENT, timestep=STEP, encoder_hidden_states=PROMPT)),
    ("unet-3d-condition", _diffusers(
        "UNet3DConditionModel", sample_size=8, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), **BLOCKS,
    ), _fields(sample=(2, 4, 3, 8, 8), timestep=STEP, encoder_hidden_states=PROMPT)),
    ("controlnet", _diffusers(
        "ControlNetModel", cross_attention_dim=32, attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), **BLOCKS,
    ), _fields(sample=LATENT, timestep=STEP, encoder_hidden_states=PROMPT,
               controlnet_cond=(2, 3, 16, 16))),
    ("autoencoder-kl", _diffusers(
        "AutoencoderKL", down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, **BLOCKS,
    ), _fields(sample=(2, 3, 16, 16))),
    ("vq-model", _diffusers(
        "VQModel", down_block_types=("DownEncoderBlock2D",) * 2, num_vq_embeddings=16,
        up_block_types=("UpDecoderBlock2D",) * 2, **BLOCKS,
    ), _fields(sample=(2, 3, 16, 16))),
    ("autoencoder-tiny", _diffusers(
        "AutoencoderTiny", encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ), _fields(sample=(2, 3, 16, 16))),
    ("dit", _diffusers(
        "DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=4,
        out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4,
    ), _fields(hidden_states=LATENT, timestep=STEP, class_labels=torch.tensor([1, 4]))),
    ("pixart", _diffusers(
        "PixArtTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=4,
        out_channels=8, num_layers=2, sample_size=8, cross_attention_dim=32, caption_channels=32,
        norm_num_groups=4, use_additional_conditions=False,
    ), _fields(hidden_states=LATENT, encoder_hidden_states=PROMPT, timestep=STEP)),
    ("sd3", _diffusers(
        "SD3Transformer2DModel", sample_size=8, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
    ), _fields(hidden_states=LATENT, encoder_hidden_states=PROMPT, pooled_projections=(2, 16),
               timestep=STEP)),
    ("flux", _diffusers(
        "FluxTransformer2DModel", in_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    ), _fields(hidden_states=(2, 16, 4), encoder_hidden_states=PROMPT, pooled_projections=(2, 16),
               timestep=torch.tensor([0.3, 0.7]), img_ids=torch.arange(48.0).view(16, 3) % 4,
               txt_ids=torch.zeros(5, 3))),
    ("sana", _diffusers(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, num_cross_attention_heads=4,
        cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=32, sample_size=8,
    ), _fields(hidden_states=LATENT, encoder_hidden_states=PROMPT, timestep=STEP)),
    ("wan", _diffusers(
        "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=32, freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    ), _fields(hidden_states=(2, 4, 2, 8, 8), timestep=STEP, encoder_hidden_states=PROMPT)),
    ("ltx-video", _diffusers(
        "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=4,
        attention_head_dim=8, cross_attention_dim=32, num_layers=1, caption_channels=32,
    ), lambda rng: _fields(
        hidden_states=(2, 16, 8), encoder_hidden_states=PROMPT, timestep=STEP,
        encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool),
    )(rng) | {"num_frames": 1, "height": 4, "width": 4}),  # type: ignore[dict-item]
    ("uvit", _diffusers(
        "UVit2DModel", hidden_size=32, cond_embed_dim=32, micro_cond_encode_dim=8,
        micro_cond_embed_dim=40, encoder_hidden_size=32, vocab_size=VOCAB, codebook_size=90,
        in_channels=32, block_out_channels=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, sample_size=8, block_num_heads=4,
    ), lambda rng: {"input_ids": torch.randint(0, 90, (2, 8, 8), generator=rng)} | _fields(
        encoder_hidden_states=PROMPT, pooled_text_emb=(2, 32), micro_conds=(2, 5),
    )(rng)),
    ("prior", _diffusers(
        "PriorTransformer", num_attention_heads=4, attention_head_dim=8, num_layers=2,
        embedding_dim=16, num_embeddings=5, additional_embeddings=4,
    ), _fields(hidden_states=(2, 16), timestep=STEP, proj_embedding=(2, 16),
               encoder_hidden_states=(2, 5, 16))),
]  # fmt: skip

# ---- graphs ---------------------------------------------------------------------------------

NODES, FEATURES = 12, 16


def graph(rng: torch.Generator) -> Inputs:
    """A ring with chords: node features and edges."""
    ring = torch.arange(NODES)
    other = torch.randint(0, NODES, (NODES,), generator=rng)
    edges = torch.cat([torch.stack([ring, ring.roll(1)]), torch.stack([ring, other])], dim=1)
    return {"x": torch.randn(NODES, FEATURES, generator=rng), "edge_index": edges}


class GraphNet(nn.Module):
    """Two graph convolutions with an in-place ReLU and dropout between, and a head."""

    def __init__(self, conv: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = conv(FEATURES, 32), conv(32, 32)
        self.act, self.drop, self.head = nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(32, 4)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.drop(self.act(self.first(x, edge_index)))
        head: Tensor = self.head(F.relu_(self.second(h, edge_index)))
        return head


def _conv(cls: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        pyg = importlib.import_module("torch_geometric.nn")
        return GraphNet(lambda i, o: getattr(pyg, cls)(i, o, **options))

    return make


def _gin() -> nn.Module:
    pyg = importlib.import_module("torch_geometric.nn")

    def conv(i: int, o: int) -> nn.Module:
        layers = nn.Sequential(nn.Linear(i, o), nn.ReLU(inplace=True), nn.Linear(o, o))
        conv: nn.Module = pyg.GINConv(layers, train_eps=True)
        return conv

    return GraphNet(conv)


def _edge() -> nn.Module:
    pyg = importlib.import_module("torch_geometric.nn")

    def conv(i: int, o: int) -> nn.Module:
        conv: nn.Module = pyg.EdgeConv(
            nn.Sequential(nn.Linear(2 * i, o), nn.ReLU(inplace=True)), aggr="mean"
        )
        return conv

    return GraphNet(conv)


_GRAPHS: list[tuple[str, Callable[[], nn.Module]]] = [
    ("gcn", _conv("GCNConv")),
    ("gat", _conv("GATConv", heads=4, concat=False)),
    ("gatv2", _conv("GATv2Conv", heads=4, concat=False)),
    ("graphsage", _conv("SAGEConv")),
    ("gin", _gin),
    ("graph-transformer", _conv("TransformerConv", heads=2, concat=False)),
    ("cheb", _conv("ChebConv", K=2)),
    ("tag", _conv("TAGConv", K=2)),
    ("edge-conv", _edge),
    ("res-gated", _conv("ResGatedGraphConv")),
]

# ---- plain torch ----------------------------------------------------------------------------


class Translator(nn.Module):
    """nn.Transformer with padding masks and a causal mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32, padding_idx=0)
        self.body = nn.Transformer(32, 4, 2, 2, 64, batch_first=True, **options)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.bool)
        padding = source == 0
        body = self.body(
            self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        head: Tensor = self.head(body)
        return head


def pairs(rng: torch.Generator) -> Inputs:
    feed = SEQ2SEQ(rng)
    return {"source": feed["input_ids"], "target": feed["decoder_input_ids"]}


class Encoder(nn.Module):
    """nn.TransformerEncoder over embedded tokens, with a padding mask, pooled."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.body(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        head: Tensor = self.head(h[:, 0])
        return head


class Recurrent(nn.Module):
    """A language model of recurrent layers."""

    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.cell = cell(32, 32, num_layers=2, dropout=0.1, batch_first=True)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        h, _ = self.cell(self.embed(input_ids))
        h = self.mix(h)
        h += self.embed(input_ids)  # in place, after a linear layer
        head: Tensor = self.head(h)
        return head


def _relu(i: int, o: int, kernel: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False, **options),
        nn.BatchNorm2d(o),
        nn.ReLU(inplace=True),
    )


def alexnet() -> nn.Module:
    """Convolutions, in-place ReLU and in-place dropout before linear layers (not after a ReLU,
    whose backward reads its result)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.Linear(128, 64), nn.ReLU(inplace=True),
        nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 10),
    )  # fmt: skip


class Bottleneck(nn.Module):
    """ResNet's: 1×1, 3×3, 1×1, added in place."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _relu(i, o // 2, 1), _relu(o // 2, o // 2, 3, stride=stride),
            nn.Conv2d(o // 2, o, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip
        self.skip = nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.body(x)
        h += self.skip(x)
        return F.relu_(h)


class InvertedResidual(nn.Module):
    """MobileNet's and EfficientNet's: 1×1 up, depthwise, squeeze-and-excite, 1×1 down."""

    def __init__(self, width: int, act: Callable[..., nn.Module]) -> None:
        super().__init__()
        wide = 4 * width
        self.up = nn.Sequential(nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), act(inplace=True))
        self.depth = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide),
            act(inplace=True),
        )  # fmt: skip
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 8, 1), nn.ReLU(inplace=True),
            nn.Conv2d(8, wide, 1), nn.Hardsigmoid(inplace=True),
        )  # fmt: skip
        self.down = nn.Sequential(nn.Conv2d(wide, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.depth(self.up(x))
        out: Tensor = self.down(h.mul_(self.squeeze(h)))
        return out.add_(x)


def _images(*body: nn.Module, width: int) -> nn.Module:
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(_relu(3, 16, 3, stride=2), *body, *pooled)


class Mixer(nn.Module):
    """MLP-Mixer: linear layers over tokens and over channels, transposed views between."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.channels = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.SiLU(inplace=True), nn.Linear(64, 32))
            for _ in range(2)
        )

    def forward(self, input: Tensor) -> Tensor:
        h = self.patch(input).flatten(2).transpose(1, 2)
        for over_tokens, over_channels in zip(self.tokens, self.channels, strict=True):
            h = h + over_tokens(h.transpose(1, 2)).transpose(1, 2)
            h = h + over_channels(h).mul_(0.5)
        return h.mean(1)


class Noted(nn.Module):
    """Linear layers whose outputs are changed in place in every common way, and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 16)
        self.register_buffer("mean", torch.zeros(32))
        self.mean: Tensor

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = F.leaky_relu(self.a(x), inplace=True)
        if self.training:
            self.mean.lerp_(h.detach().mean((0, 1)), 0.1)
        h = self.b(h).masked_fill_(mask[..., None], 0.0)
        h.sub_(self.mean)
        h[..., :8] *= 2
        out: Tensor = self.c(h)
        out += x
        return out.clamp_(-3, 3)


def noted(rng: torch.Generator) -> Inputs:
    x = torch.randn(3, 6, 16, generator=rng)
    return {"x": x, "mask": torch.rand(3, 6, generator=rng) < 0.2}


IMAGES = floats("input", 3, 3, IMAGE, IMAGE)
IDS = tokens(2, TOKENS, mask=False)

_PLAIN: list[tuple[str, Callable[[], nn.Module], Feed]] = [
    ("nn-transformer", Translator, pairs),
    ("nn-transformer-pre", functools.partial(Translator, norm_first=True), pairs),
    ("nn-encoder", Encoder, TEXT),
    ("nn-encoder-gelu", functools.partial(Encoder, activation="gelu", norm_first=True), TEXT),
    ("lstm", functools.partial(Recurrent, nn.LSTM), IDS),
    ("gru", functools.partial(Recurrent, nn.GRU), IDS),
    ("alexnet", alexnet, IMAGES),
    ("bottlenecks", lambda: _images(Bottleneck(16, 32, 2), Bottleneck(32, 32, 1), width=32),
     IMAGES),
    ("mobilenet", lambda: _images(InvertedResidual(16, nn.ReLU6), width=16), IMAGES),
    ("efficientnet-like", lambda: _images(InvertedResidual(16, nn.SiLU), width=16), IMAGES),
    ("mixer", Mixer, IMAGES),
    ("in-place", Noted, noted),
]  # fmt: skip

FURTHER: tuple[Entry, ...] = (
    *(
        zoo.Entry(name, family, model, feed, config)
        for family, rows in _TRANSFORMERS.items()
        for name, model, feed, config in rows
    ),
    *(Made(name, "diffusers", make, feed, "diffusers") for name, make, feed in _DIFFUSERS),
    *(Made(name, "graph", make, graph, "torch_geometric") for name, make in _GRAPHS),
    *(Made(name, "plain", make, feed) for name, make, feed in _PLAIN),
)
NAMES = tuple(entry.name for entry in FURTHER)
QUICK = ("dpr", "dit", "gat", "in-place")
"""One of every library that is always there."""
