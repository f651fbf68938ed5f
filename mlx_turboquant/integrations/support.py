"""Which of mlx-lm's models cannot take a compressed cache, and why.

Owns that table; `mlx_lm` asks it before any work.
"""

#: Model types whose layers compute on cached keys or values themselves.
READS_CACHE_ITSELF = {
    **dict.fromkeys(
        (
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "kimi_linear",
            "kimi_vl",
            "longcat_flash",
            "longcat_flash_ngram",
        ),
        "multi-head latent attention stores a latent, not keys",
    ),
    **dict.fromkeys(("gemma2", "phi3small"), "computes its own softmax"),
    **dict.fromkeys(("plamo", "plamo2", "stablelm"), "transforms the cached keys"),
}
