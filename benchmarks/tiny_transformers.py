"""Networks of transformers with random weights, small enough for seconds each.

Each is built from its configuration alone, seeded, in eval mode, with batches of two of its inputs.  What transformers
has no usual name for stands beside the class.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LENGTH, VOCABULARY, PIXELS = 12, 128, 64
Draw = Callable[[torch.Generator], Mapping[str, Tensor]]

# what configurations call the sizes of a network
SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32,
    "embedding_size": 32, "num_hidden_layers": 1, "n_layer": 1, "n_layers": 1, "num_layers": 1, "encoder_layers": 1,
    "decoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "d_kv": 8, "hidden_dim": 64, "n_inner": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
    "n_positions": 64, "image_size": PIXELS, "patch_size": 16, "type_vocab_size": 2, "num_labels": 5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "projection_dim": 16,
}  # fmt: skip


def _tokens(random: torch.Generator) -> Tensor:
    """Each row ends as texts do, with the token 2."""
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=random)
    tokens[:, -1] = SMALL["eos_token_id"]
    return tokens


def text(random: torch.Generator) -> Mapping[str, Tensor]:
    return {"input_ids": _tokens(random), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}


def pair(random: torch.Generator) -> Mapping[str, Tensor]:
    """Of an encoder and a decoder."""
    return {**text(random), "decoder_input_ids": _tokens(random)}


def image(random: torch.Generator) -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, PIXELS, PIXELS, generator=random)}


def image_and_text(random: torch.Generator) -> Mapping[str, Tensor]:
    return {**text(random), **image(random)}


def film(random: torch.Generator) -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(2, 4, 3, PIXELS, PIXELS, generator=random)}


def wave(random: torch.Generator) -> Mapping[str, Tensor]:
    return {"input_values": torch.randn(2, 2000, generator=random)}


def spectrum(random: torch.Generator) -> Mapping[str, Tensor]:
    return {"input_features": torch.randn(2, 80, 100, generator=random), "decoder_input_ids": _tokens(random)}


def frames(random: torch.Generator) -> Mapping[str, Tensor]:
    return {"input_values": torch.randn(2, 128, 64, generator=random)}


def layout(random: torch.Generator) -> Mapping[str, Tensor]:
    corners = torch.randint(0, 30, (2, LENGTH, 2), generator=random)
    return {**text(random), "bbox": torch.cat([corners, corners + 30], -1)}


@dataclass(frozen=True)
class Tiny:
    """A network to be.

    Args:
        name: of the class.
        draw: a batch of its inputs.
        own: of the configuration, beside SMALL.
    """

    name: str
    draw: Draw
    own: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        import transformers

        made = getattr(transformers, self.name)
        torch.manual_seed(0)
        model: nn.Module = made(configuration(made.config_class, self.own)).eval()
        for parameter in model.parameters():  # those of a normal of .02 would make every answer alike
            if parameter.ndim == 2:
                parameter.data.mul_(3)
            elif parameter.ndim > 2:
                nn.init.kaiming_normal_(parameter)  # with a tenth of it, deep networks would answer nothing but zeros
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # of deviation .02 too
                module.reset_parameters()
        return model

    def batches(self, count: int = 2) -> list[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(1)
        return [dict(self.draw(random)) for _ in range(count)]


def configuration(kind: Any, own: Mapping[str, Any]) -> Any:
    """A small configuration of a class."""
    usual = kind()
    sizes = {
        name: value
        for name, value in SMALL.items()
        if isinstance(getattr(usual, name, None), int) and not isinstance(getattr(kind, name, None), property)
    }
    parts = {
        name: configuration(type(getattr(usual, name)), own.get(name, {})).to_dict()
        for name in getattr(kind, "sub_configs", {})
        if getattr(usual, name, None) is not None
    }
    return kind(**{**sizes, **parts, **{name: value for name, value in own.items() if name not in parts}})


SEGFORMER = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128], "decoder_hidden_size": 32,
    "num_attention_heads": [1, 2, 4, 8], "patch_sizes": [7, 3, 3, 3],
}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
PYRAMID = {"num_attention_heads": [1, 2, 4, 8], "patch_sizes": [4, 2, 2, 2]}
WINDOWS = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
EFFICIENTNET = {"width_coefficient": 0.5, "depth_coefficient": 0.2, "hidden_dim": 640}
MOBILEVIT = {
    "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 16, 24, 32, 32, 64], "patch_size": 2,
    "expand_ratio": 2.0,
}  # fmt: skip
SPEECH = {
    "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 4,
}  # fmt: skip
HEARD = {"num_mel_bins": 80, "max_source_positions": 50, "max_target_positions": 64}

_DECODERS = """
Llama Qwen2 Qwen3 Mistral Mixtral Gemma Gemma2 Phi Phi3 SmolLM3 GPTNeoX OPT Bloom Falcon Olmo Olmo2 StableLm Cohere
Granite Qwen2Moe Qwen3Moe Olmoe Starcoder2 GPTBigCode XGLM BioGpt GptOss Helium Glm Mamba
"""
_ENCODERS = """
BertForMaskedLM RobertaForMaskedLM DistilBertForSequenceClassification AlbertForMaskedLM
ElectraForSequenceClassification DebertaV2ForMaskedLM XLMRobertaForTokenClassification MPNetForMaskedLM
ConvBertForSequenceClassification ModernBertForMaskedLM NystromformerForMaskedLM RoFormerForMaskedLM
FNetForSequenceClassification SqueezeBertForSequenceClassification MobileBertForMaskedLM BigBirdForMaskedLM
"""
_PAIRS = """
T5ForConditionalGeneration T5ForSequenceClassification BartForConditionalGeneration MBartForConditionalGeneration
PegasusForConditionalGeneration MarianMTModel M2M100ForConditionalGeneration BlenderbotForConditionalGeneration
"""

TINY: tuple[Tiny, ...] = (
    *(Tiny(f"{stem}ForCausalLM", text) for stem in _DECODERS.split()),
    Tiny("NemotronForCausalLM", text, {"head_dim": 8, "num_key_value_heads": 2}),
    Tiny("GPT2LMHeadModel", text, {"use_cache": True}),
    Tiny("GPTJForCausalLM", text, {"rotary_dim": 4}),
    Tiny("CodeGenForCausalLM", text, {"rotary_dim": 4}),
    Tiny("Gemma3ForCausalLM", text, {"num_hidden_layers": 2, "sliding_window": 6}),
    Tiny("DeepseekV3ForCausalLM", text, LATENT),
    Tiny("MptForCausalLM", text, {"max_seq_len": 64}),
    *(Tiny(name, text) for name in _ENCODERS.split()),
    Tiny("FunnelForSequenceClassification", text, {"block_sizes": [1, 1], "d_head": 8, "d_inner": 64}),
    Tiny("XLNetForSequenceClassification", text, {"d_inner": 64}),
    *(Tiny(name, pair) for name in _PAIRS.split()),
    Tiny("ViTForImageClassification", image),
    Tiny("DeiTForImageClassification", image),
    Tiny("BeitForImageClassification", image),
    Tiny("Dinov2ForImageClassification", image),
    Tiny("SwinForImageClassification", image, WINDOWS),
    Tiny("Swinv2ForImageClassification", image, WINDOWS),
    Tiny("ConvNextForImageClassification", image, STAGES | {"patch_size": 4, "num_hidden_layers": 4}),
    Tiny("ConvNextV2ForImageClassification", image, STAGES | {"patch_size": 4, "num_hidden_layers": 4}),
    Tiny("ResNetForImageClassification", image, STAGES | {"layer_type": "basic"}),
    Tiny("RegNetForImageClassification", image, STAGES | {"groups_width": 16}),
    Tiny("MobileNetV1ForImageClassification", image, {"depth_multiplier": 0.25}),
    Tiny("MobileNetV2ForImageClassification", image, {"depth_multiplier": 0.35}),
    Tiny(
        "EfficientNetForImageClassification",
        image,
        {"width_coefficient": 0.5, "depth_coefficient": 0.2, "hidden_dim": 640},
    ),
    Tiny("MobileViTForImageClassification", image, MOBILEVIT),
    Tiny("SegformerForSemanticSegmentation", image, SEGFORMER),
    Tiny("PoolFormerForImageClassification", image, STAGES | {"patch_size": 7}),
    Tiny("PvtForImageClassification", image, STAGES | PYRAMID),
    Tiny("FocalNetForImageClassification", image, {"embed_dim": 16, "depths": [1, 1, 1, 1], "patch_size": 4}),
    Tiny("YolosForObjectDetection", image, {"image_size": [64, 64], "num_detection_tokens": 6}),
    Tiny("ViTMAEModel", image, {"mask_ratio": 0.0}),
    Tiny("VideoMAEForVideoClassification", film, {"num_frames": 4}),
    Tiny("TimesformerForVideoClassification", film, {"num_frames": 4}),
    Tiny("Wav2Vec2ForCTC", wave, SPEECH),
    Tiny("HubertForCTC", wave, SPEECH),
    Tiny("WavLMForCTC", wave, SPEECH),
    Tiny("Data2VecAudioForCTC", wave, SPEECH | {"num_conv_pos_embeddings": 2}),
    Tiny("WhisperForConditionalGeneration", spectrum, HEARD),
    Tiny("ASTForAudioClassification", frames, {"max_length": 128, "num_mel_bins": 64}),
    Tiny("CLIPModel", image_and_text),
    Tiny("SiglipModel", image_and_text),
    Tiny("ChineseCLIPModel", image_and_text),
    Tiny("AltCLIPModel", image_and_text),
    Tiny("BlipForImageTextRetrieval", image_and_text),
    Tiny("GitForCausalLM", image_and_text),
    Tiny("ViltForQuestionAnswering", image_and_text),
    Tiny("LayoutLMForTokenClassification", layout),
    Tiny("CLIPSegForImageSegmentation", image_and_text, {"extract_layers": [0], "reduce_dim": 16}),
)
