"""Tiny random models of mlx-vlm's families, each with an image or a sound of its own.

As `tiny_models` does for mlx-lm: `tiny_models.USUAL` gives text fields their small
values, `VISION` those of vision towers, and `FAMILIES` says what a family needs beyond
that and what its processor would hand over.
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path
from tiny_models import ODD, RECURRENT, SLIDING, USUAL, calm
from vlm_media import (
    GRID,
    IMAGE,
    PATCH,
    SIDE,
    SOUND,
    VIDEO,
    VISION_START,
    VOCAB,
    Medium,
    image,
    kimi,
    lfm2,
    patches,
    sound,
    text_alone,
    video,
)

VISION = {
    **dict.fromkeys(("hidden_size", "width", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("patch_size", "spatial_patch_size"), PATCH),
    **dict.fromkeys(("num_channels", "in_channels", "in_chans"), 3),
    **dict.fromkeys(("spatial_merge_size", "temporal_patch_size"), 2),
    **dict.fromkeys(("out_hidden_size", "projection_dim"), 64),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps", "norm_eps"), 1e-5),
    **dict.fromkeys(("num_position_embeddings", "num_patches"), GRID * GRID),
    **dict.fromkeys(("image_size", "window_size"), SIDE),
    "intermediate_size": 48,
    "mlp_ratio": 2.0,
    "head_dim": 16,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
}
#: Beside the configs of text and vision.
TOP = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "pad_token_id": 0,
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE),
    **dict.fromkeys(("media_placeholder_token_id", "im_patch_id"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id"), VISION_START),
    "audio_token_id": SOUND,
}


@dataclass(frozen=True)
class Family:
    """What a family needs beyond the usual fields.

    Attributes:
        medium: Makes its image or sound.
        text: Fields of the text config.
        vision: Fields of the vision config.
        top: Fields beside these.
    """

    medium: Callable[[], Medium]
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)


def mrope(*section):
    """Rotary positions in time, height and width."""
    return {"rope_scaling": {"type": "default", "mrope_section": list(section)}}


GLM = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
QWEN3_5 = {
    "rope_parameters": {
        "type": "default",
        "mrope_section": [2, 1, 1],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    "full_attention_interval": 2,
    "layer_types": RECURRENT,
}
GEMMA4 = {**ODD["gemma4_text"], "global_head_dim": 16}
GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "pooling_kernel_size": 2,
    "position_embedding_size": GRID * GRID,
}
GEMMA4_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": (8, 4),
    "output_proj_dims": 32,
}
OMNI_VISION = {"model_type": "qwen3_omni_moe_vision_encoder"}
OMNI_AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "output_dim": 64,
    "downsample_hidden_size": 8,
}
LLAMA4_VISION = {
    "intermediate_size": 128,
    "initializer_range": 0.02,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 64),
    "vision_output_dim": 64,
    "rope_theta": 10000.0,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
MLLAMA_VISION = {
    **dict.fromkeys(("max_num_tiles", "num_global_layers"), 1),
    "vision_output_dim": 64,
    "intermediate_layers_indices": [0],
}
ENCODER = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
}
DAVIT = {
    "model_type": "davit",
    "image_size": (SIDE, SIDE),
    "depths": [1, 1],
    "dim_embed": [16, 32],
    "num_heads": [2, 2],
    "num_groups": [2, 2],
    "patch_size": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [3, 1],
    "patch_prenorm": [False, False],
}
SIGLIP = {"model_type": "siglip_vision_model"}
CLIP = {"model_type": "clip_vision_model"}
MOONVIT = {
    "model_type": "moonvit",
    **dict.fromkeys(("init_pos_emb_height", "init_pos_emb_width"), GRID),
}


SIZES = {"image_sizes": mx.array([[SIDE, SIDE]])}
#: By name of mlx-vlm's module; what is behind a colon tells two media apart.
FAMILIES = {
    "aya_vision": Family(
        image(4, 1),
        {"sliding_window_pattern": 2},
        SIGLIP,
    ),
    "ernie4_5_moe_vl": Family(
        patches(1),
        {
            **mrope(3, 3, 2),
            "freq_allocation": 2,
            "moe_k": 4,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_num_shared_experts": 1,
            "moe_num_experts": [4, 4],
            "moe_intermediate_size": [32, 32],
        },
        top={"pixel_hidden_size": 32},
    ),
    "florence2": Family(text_alone, ENCODER, DAVIT),
    "gemma3": Family(
        image(4, 1), {"mm_tokens_per_image": 4, "sliding_window_pattern": 2}
    ),
    "gemma3n": Family(
        text_alone,
        {
            **ODD["gemma3n"],  # its last two layers read the caches of the two before
            "num_hidden_layers": 6,
            "layer_types": [*SLIDING, *SLIDING[:2]],
            "intermediate_size": [96] * 6,
            "activation_sparsity_pattern": [0.5, 0.0] * 3,
        },
        {"model_type": "gemma3n_vision"},
        {"audio_config": {"hidden_size": 32, "conf_num_hidden_layers": 1}},
    ),
    "gemma4": Family(image(4, 1), GEMMA4, GEMMA4_VISION, {"audio_config": None}),
    "gemma4:sound": Family(
        sound(8, (1, 32, 128), input_features_mask=mx.ones((1, 32), mx.bool_)),
        GEMMA4,
        GEMMA4_VISION,
        {"audio_config": GEMMA4_AUDIO},
    ),
    "glm4v": Family(patches(), {**GLM, "eos_token_id": [1]}),
    "glm4v_moe": Family(patches(), GLM),
    "hunyuan_vl": Family(
        patches(1, 12),  # and a token at the end of a row, of the image, of its start
        {"rope_scaling": {"type": "xdrope", "xdrope_section": [2] * 4, "alpha": 1e3}},
    ),
    "idefics3": Family(image(4, 1, 1)),
    "internvl_chat": Family(image(4, 1), {}, {"model_type": "intern_vit_6b"}),
    "kimi_k25": Family(kimi, {}, MOONVIT),
    "kimi_vl": Family(kimi, {}, MOONVIT),
    "lfm2_vl": Family(lfm2, ODD["lfm2"]),
    "llama4": Family(
        image(4, 1), {**ODD["llama4"], **ODD["llama4_text"]}, LLAMA4_VISION
    ),
    "llava": Family(image(16, 1), {"model_type": "llama"}, CLIP),
    "llava_next": Family(image(32, 1, 1), {"model_type": "llama"}, CLIP),
    "minicpmo": Family(
        text_alone,  # its language model cannot tell positions by itself
        mrope(2, 3, 3),
        SIGLIP,
        {"init_audio": False, "init_tts": False, "query_num": 4},
    ),
    "mistral3": Family(
        image(4, 1, **SIZES),
        {**ODD["ministral3"], "layer_types": SLIDING, "model_type": "ministral3"},
        {"model_type": "pixtral"},
    ),
    "mllama": Family(
        image(
            *(0, 1, 1, 1),  # not in the prompt: layer 1 attends to it across
            aspect_ratio_ids=mx.array([[1]]),
            aspect_ratio_mask=mx.ones((1, 1, 1), mx.int32),
        ),
        {"cross_attention_layers": [1]},
        MLLAMA_VISION,
    ),
    "molmo": Family(
        text_alone,
        {
            "mlp_hidden_size": 96,
            "max_sequence_length": 512,
            **dict.fromkeys(("embedding_size", "additional_vocab_size"), VOCAB),
        },
    ),
    "paligemma": Family(
        image(16, 1, at=0),  # an image comes first
        {"model_type": "gemma"},
        SIGLIP,
    ),
    "phi3_v": Family(
        text_alone,
        vision={"image_dim_out": 32},
        top={
            "num_key_value_heads": 2,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 96,
        },
    ),
    "pixtral": Family(image(16, 1, **SIZES)),
    "qwen2_5_vl": Family(patches(), mrope(2, 3, 3)),
    "qwen2_5_vl:video": Family(video, mrope(2, 3, 3)),
    "qwen2_vl": Family(patches(), mrope(2, 3, 3), {"hidden_size": 64}),
    "qwen3_5": Family(patches(), QWEN3_5, {"deepstack_visual_indexes": []}),
    "qwen3_5_moe": Family(patches(), QWEN3_5, {"deepstack_visual_indexes": []}),
    "qwen3_omni_moe": Family(
        patches(), mrope(2, 3, 3), OMNI_VISION, {"audio_config": OMNI_AUDIO}
    ),
    "qwen3_omni_moe:sound": Family(
        sound(4, (1, 16, 32), audio_feature_lengths=mx.array([32])),
        mrope(2, 3, 3),
        OMNI_VISION,
        {"audio_config": OMNI_AUDIO},
    ),
    "qwen3_vl": Family(patches(), mrope(2, 3, 3)),
    "qwen3_vl_moe": Family(patches(), mrope(2, 3, 3)),
    "smolvlm": Family(image(4, 1, 1), {}, {"model_type": "idefics3"}),
}


def _fields(kind, known):
    return {f.name: known[f.name] for f in dataclasses.fields(kind) if f.name in known}


def config(name):
    """A family's config, as a file has it."""
    family, kind = FAMILIES[name], name.partition(":")[0]
    home = importlib.import_module(f"mlx_vlm.models.{kind}")
    ids = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB)
    known = {"model_type": kind, **USUAL, **ids, **family.text}
    text = _fields(home.TextConfig, known)
    known = {"model_type": kind, **VISION, **family.vision}
    parts = {"text_config": text, "vision_config": _fields(home.VisionConfig, known)}
    if kind == "qwen3_omni_moe":
        thinker = {**TOP, **parts, **family.top}
        speaker = {"talker_config": {"text_config": text}, "enable_audio_output": False}
        return {"model_type": kind, "thinker_config": thinker, **speaker}
    # Some families have the fields of the text beside the vision config.
    return {**text, **TOP, "model_type": kind, **parts, **family.top}


def build(name, given=None):
    """A random model of a family, as mlx-vlm loads one; of a config if one is given."""
    from mlx_vlm.utils import update_module_configs

    given = given or config(name)
    home = importlib.import_module(f"mlx_vlm.models.{given['model_type']}")
    made = home.ModelConfig.from_dict(dict(given))
    mx.random.seed(1)
    parts = ["text", "vision", "audio"]
    model = home.Model(update_module_configs(made, home, given, parts))
    is_text = FAMILIES[name].medium is text_alone

    def drawn(path, array):
        if is_text and "vision" in path:
            return array  # never evaluated
        is_zero = not mx.any(array).item()
        return 0.3 * mx.random.normal(array.shape, array.dtype) if is_zero else array

    model.update(tree_map_with_path(drawn, model.parameters()))
    if name.startswith(("gemma3n", "gemma4")):  # attention without a scale
        model.apply_to_modules(calm)
    return model.eval()
