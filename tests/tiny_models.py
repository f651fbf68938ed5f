"""Tiny random models of every type mlx-lm has, built from field names.

Most configs differ in names only, so `USUAL` gives each name one small value, and
`ODD` says what a type needs beyond that. `build` fills in what its ``ModelArgs``
declares.
"""

import dataclasses
import functools
import importlib
import pkgutil

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_map

LAYERS, VOCAB, WINDOW = 4, 96, 80
SLIDING = ["sliding_attention", "full_attention"] * 2

USUAL = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    "num_transformer_layers": LAYERS,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim"), 64),
    **dict.fromkeys(("hidden_dim", "block_dim", "dim_model_base"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "ff_intermediate_size"), 96),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    "num_attention_groups": 2,
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), 1e-5),
    **dict.fromkeys(("layer_norm_epsilon", "layernorm_epsilon"), 1e-5),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("block_size", "model_max_length"), 512),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "swa_rope_theta"), 10000.0),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 0.5),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), None),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("attention_window_size", "loop_window_size"), WINDOW),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "conv_bias"), False),
    **dict.fromkeys(("use_conv_bias", "use_qkv_bias", "mamba_proj_bias"), False),
    **dict.fromkeys(("tie_word_embeddings", "mla_scale_q_lora"), True),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "mla_scale_kv_lora"), True),
    # Experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    "moe_num_experts": 4,
    # All of them: which of a few were chosen could jump with a rounding.
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k"), 4),
    **dict.fromkeys(("num_experts_per_token", "top_k_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size"), 32),
    "shared_expert_intermediate_size": 32,
    **dict.fromkeys(("expert_ffn_hidden_size", "share_expert_dim"), 32),
    "moe_shared_expert_intermediate_size": 32,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_group", "topk_group", "moe_layer_freq"), 1),
    **dict.fromkeys(("decoder_sparse_step", "zero_expert_num"), 1),
    **dict.fromkeys(("routed_scaling_factor", "embedding_multiplier"), 1.0),
    **dict.fromkeys(("logits_scaling", "residual_multiplier"), 1.0),
    "attention_multiplier": 0.25,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "mlp_only_layers": [],
    # Latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    # Recurrent layers
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "conv_L_cache"), 3),
    "linear_conv_kernel_dim": 3,
    "time_step_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # Others
    "layer_types": SLIDING,
    "dim_ff": 96,
    "hidden_act": "silu",
    "scale_depth": 1.4,
    "scale_emb": 1.0,
    "rotary_dim": 8,
}

RECURRENT = ["linear_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = dict.fromkeys(("sliding_attention", "full_attention"), ROPE)
KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 3,
}

INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 100}

#: Beyond `USUAL`: fields of single types, and values that must fit one another.
ODD = {
    "afm7": {"num_kv_reuse_layers": 2},
    "apertus": {"post_norm": False},
    "baichuan_m1": {
        "sliding_window_layers": [0, 2],
        "conv_window": 2,
        "tie_word_embeddings": False,
    },
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_v3": {"layer_group_size": 2, "short_conv_kernel_size": 3},
    "deepseek_v32": INDEXER,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 4},
    },
    "deepseek_v2": {"rope_scaling": {"factor": 1.0, "type": "yarn"}},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True] * 2},
    "gear": {
        "layer_types": [*SLIDING[:3], "conv_mixer"],
        "attn_logit_softcapping": 30.0,
    },
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
    },
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
        "hidden_size_per_layer_input": 8,
        "rope_local_base_freq": 10000.0,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "glm_moe_dsa": {"rope_parameters": ROPE, **INDEXER},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4},
    "hunyuan": {
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_k3": {
        "linear_attn_config": KDA,
        "attn_res_block_size": 2,
        "hidden_act": "situ",
        "activation_situ_beta": 1.0,
    },
    "kimi_linear": {"linear_attn_config": KDA},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "use_expert_bias": True,
    },
    "llama4": {
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {"zero_expert_type": "identity", "attention_method": "MLA"},
    "mamba2": {"n_groups": 1, "time_step_limit": (0.001, 100.0), "num_heads": 8},
    "mellum": {"rope_parameters": ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0] * 2,
        "moe_layer_freq": [0, 1] * 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": True,
    },
    "minicpm3": {"rope_scaling": {}},
    "minimax_m3_vl": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "moe_layer_freq": [0, 1] * 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 12,
    },
    "muse_glimmer": {"qk_scale_factor": 1.0},
    "nanbeige": {"num_loops": 2},
    "phimoe": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "ministral3": {
        "rope_parameters": {
            **ROPE,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral4": {
        "rope_parameters": {
            **ROPE,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
        ]
        * 2
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "*"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
    },
    "olmo_hybrid": {"layer_types": RECURRENT, "linear_allow_neg_eigval": True},
    "openelm": {
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.0] * LAYERS,
        "ffn_dim_divisor": 8,
    },
    "phi3small": {
        "vocab_size": 100352,  # it writes to fixed ids
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "hidden_size_per_head": 16,
        "mamba_num_heads": 4,
        "full_attention_idx": [3],
    },
    "qwen3_5": {"full_attention_interval": 2},
    "qwen3_next": {"full_attention_interval": 2},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "conv1d_width": 3,
        "logits_soft_cap": 30.0,
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "spark2_5": {"rope_parameters": ROPES, "hidden_act": "gelu"},
}

#: Where a type of model keeps the config of its text part.
TEXT = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("ministral3", "ModelArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}

#: Types that no tiny random model can be made of here.
NOT_BUILT = {
    "bitnet": "its ternary layers run on Metal only",
    "muse_spark": "its query and key norms run on Metal only",
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "needs 2-bit weights packed with a manifest",
}


def config(name, kind="ModelArgs", home=None):
    """The fields of one config class, as a dict."""
    home = home or name
    module = importlib.import_module(f"mlx_lm.models.{home}")
    fields = {f.name for f in dataclasses.fields(getattr(module, kind))}
    known = {**USUAL, **ODD.get(home, {})}
    given = {field: known[field] for field in fields if field in known}
    if "text_config" in fields:
        text_home, text_kind = TEXT[name]
        given["text_config"] = config(name, text_kind, text_home)
    return {**given, "model_type": home}


def types():
    """Every model type of the installed mlx-lm that a model can be built of."""
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        if info.name in NOT_BUILT:
            continue
        module = importlib.import_module(f"mlx_lm.models.{info.name}")
        if hasattr(module, "Model") and hasattr(module, "ModelArgs"):
            yield info.name


def calm(path, module):
    if path.endswith("q_norm"):
        module.weight = module.weight / 4


def _round_to(step, path, module):
    if "quant_key_scale" in module:
        module.quant_key_scale = module.quant_value_scale = mx.array(step)


def build(name, **changes):
    """A random model of one type, its weights drawn anew.

    ``changes`` win over the fields of its config; ``rounding`` is afm7's own.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    rounding = changes.pop("rounding", 1e-3)
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict({**config(name), **changes}))
    # Zeros, such as learned sinks and biases start with, would hide what they do.
    drawn = tree_map(
        lambda p: p if mx.any(p).item() else 0.3 * mx.random.normal(p.shape, p.dtype),
        model.parameters(),
    )
    model.update(drawn)
    if name.startswith("gemma4"):  # attention without a scale
        model.apply_to_modules(calm)
    if name == "afm7":  # rounds keys and values
        model.apply_to_modules(functools.partial(_round_to, rounding))
    mx.eval(model.parameters())
    return model


CHUNKS = (70, 40, 1, 1)


def logits(model, caches):
    """Of a prompt in two chunks, longer than the windows, and of two decode steps."""
    ids = mx.random.randint(0, VOCAB, (1, sum(CHUNKS)), key=mx.random.key(5))
    steps, start = [], 0
    for count in CHUNKS:
        steps.append(model(ids[:, start : start + count], cache=caches))
        mx.eval(steps[-1], [cache.state for cache in caches])
        start += count
    # Some types write -inf to ids of their own beyond these.
    return mx.concatenate(steps, axis=1)[..., :VOCAB]
