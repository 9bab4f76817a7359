"""Tiny configs of the architectures that are tried as models, and what each can do as a student.

`tests/unit/architecture/test_matrix.py` tries each of them beside transformers as a student,
`tests/integration/test_teacher_matrix.py` some as teachers, and `docs/make_architectures.py` writes
the tables of `docs/architectures.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
"""Settings that most configs share. Weights are large, so that every layer matters."""
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.15,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Settings of the configs that descend from GPT-2's."""
ATTENTION_ONLY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "init_std": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
"""Settings that architectures without the names of `SHAPE` share."""
RECURRENT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Settings of state-space models."""
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
"""Multi-head latent attention."""
GROUPED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
"""Experts behind a router with a correction bias, after one dense layer."""
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}
"""Gated delta nets in three of four layers."""


INDEXED: dict[str, Any] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
"""Sparse attention to keys that an index chooses. With few heads many keys have the index 0, and
the choice between equal ones is nobody's.
"""
SECOND_FULL: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
SECOND_SPARSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
FLOAT32 = "student.dtype: float32"
NO_CHECKPOINTING = "student.gradient_checkpointing: false"


@dataclass(frozen=True)
class Architecture:
    """A model with random weights, and what it can do as a student.

    Attributes:
        name: name in the tests and in the page.
        kind: `model_type` of its config.
        settings: the config's fields beside those of `SHAPE`.
        whole: whether `settings` are all fields.
        attention: `student.attn_implementation` with which it trains.
        packs: whether its sequences can be packed.
        needs: settings without which it is refused.
        refused: part of the sentence with which it is refused; empty if it trains.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    attention: str = "sdpa"
    packs: bool = True
    needs: tuple[str, ...] = ()
    refused: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """All fields of the config."""
        return self.settings if self.whole else SHAPE | self.settings


def _windowed(size: int = 8) -> dict[str, Any]:
    return {"sliding_window": size}


ARCHITECTURES = (
    Architecture("Llama", "llama"),
    Architecture("Llama, tied", "llama", {"tie_word_embeddings": True}),
    Architecture(
        "Llama, YaRN",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    Architecture(
        "Llama 4",
        "llama4_text",
        EXPERTS
        | {
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 4,
        },
        packs=False,
    ),
    Architecture("Mistral", "mistral", _windowed()),
    Architecture("Ministral", "ministral", _windowed()),
    Architecture(
        "Ministral 3",
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.1,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
        },
    ),
    Architecture("Mixtral", "mixtral", EXPERTS),
    Architecture("Qwen2", "qwen2"),
    Architecture("Qwen2-MoE", "qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    Architecture("Qwen3", "qwen3"),
    Architecture(
        "Qwen3-MoE", "qwen3_moe", EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
    Architecture(
        "Qwen3-Next",
        "qwen3_next",
        EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32, "full_attention_interval": 4},
        packs=False,
    ),
    Architecture("Qwen3.5", "qwen3_5_text", LINEAR, packs=False),
    Architecture(
        "Qwen3.5-MoE",
        "qwen3_5_moe_text",
        EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32},
        packs=False,
    ),
    Architecture(
        "Qwen4, experimental",
        "qwen4_exp_text",
        EXPERTS
        | LINEAR
        | {
            "shared_expert_intermediate_size": 32,
            "hc_count": 2,
            "hc_lowrank": 8,
            "ple_embed_dim": 32,
            "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 128,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 4,
        },
        packs=False,
    ),
    Architecture("Gemma", "gemma"),
    Architecture(
        "Gemma 2",
        "gemma2",
        _windowed() | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    ),
    Architecture("Gemma 3", "gemma3_text", _windowed() | {"query_pre_attn_scalar": 16}),
    Architecture(
        "Gemma 3n",
        "gemma3n_text",
        _windowed()
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 8,
            "final_logit_softcapping": 3.0,
        },
    ),
    Architecture(
        "Gemma 4",
        "gemma4_text",
        _windowed()
        | {
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
        },
    ),
    Architecture(
        "VaultGemma",
        "vaultgemma",
        _windowed() | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    ),
    Architecture("Phi", "phi", {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0}),
    Architecture("Phi-3", "phi3", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    Architecture(
        "Phi-3, LongRoPE",
        "phi3",
        {
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    Architecture("PhiMoE", "phimoe", EXPERTS | {"router_jitter_noise": 0.0}),
    Architecture("OLMo", "olmo"),
    Architecture("OLMo 2", "olmo2"),
    Architecture("OLMo 3", "olmo3", _windowed()),
    Architecture("OLMoE", "olmoe", EXPERTS),
    Architecture("FlexOlmo", "flex_olmo", EXPERTS),
    Architecture("OLMo-Hybrid", "olmo_hybrid", LINEAR, packs=False),
    Architecture("SmolLM3", "smollm3", {"no_rope_layer_interval": 2, "num_hidden_layers": 4}),
    Architecture("StarCoder 2", "starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    Architecture("StableLM", "stablelm"),
    Architecture("GLM", "glm", {"partial_rotary_factor": 0.5}),
    Architecture("GLM-4", "glm4", {"partial_rotary_factor": 0.5}),
    Architecture("GLM-4-MoE", "glm4_moe", EXPERTS | GROUPED | {"partial_rotary_factor": 0.5}),
    Architecture("GLM-4-MoE-Lite", "glm4_moe_lite", EXPERTS | LATENT | GROUPED | SECOND_SPARSE),
    Architecture("GLM-5", "glm_moe_dsa", EXPERTS | LATENT | GROUPED | INDEXED),
    Architecture(
        "DeepSeek-V2", "deepseek_v2", EXPERTS | LATENT | GROUPED | {"topk_method": "greedy"}
    ),
    Architecture("DeepSeek-V3", "deepseek_v3", EXPERTS | LATENT | GROUPED),
    Architecture("DeepSeek-V3.2", "deepseek_v32", EXPERTS | LATENT | GROUPED | INDEXED),
    Architecture(
        "DeepSeek-V4",
        "deepseek_v4",
        EXPERTS
        | INDEXED
        | _windowed()
        | {
            "n_routed_experts": 4,
            "q_lora_rank": 24,
            "o_groups": 2,
            "o_lora_rank": 16,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "mlp_layer_types": ["hash_moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        },
        attention="eager",
        packs=False,
        needs=(FLOAT32,),
    ),
    Architecture(
        "Kimi-Linear",
        "kimi_linear",
        EXPERTS
        | LATENT
        | {
            "linear_num_heads": 4,
            "linear_head_dim": 16,
            "num_experts_per_token": 2,
            "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"],
        },
        packs=False,
    ),
    Architecture(
        "LongCat-Flash",
        "longcat_flash",
        EXPERTS
        | LATENT
        | {
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
    Architecture("Youtu", "youtu", LATENT),
    Architecture("A.X K1", "axk1", EXPERTS | LATENT | GROUPED),
    Architecture(
        "A.X K2",
        "axk2",
        EXPERTS | LATENT | GROUPED | INDEXED | SECOND_SPARSE | {"gated_norm_rank": 8},
    ),
    Architecture("gpt-oss", "gpt_oss", EXPERTS | _windowed(), attention="eager", packs=False),
    Architecture("EXAONE 4", "exaone4", _windowed()),
    Architecture("EXAONE-MoE", "exaone_moe", EXPERTS | _windowed() | SECOND_FULL | SECOND_SPARSE),
    Architecture("Seed-OSS", "seed_oss", {"residual_dropout": 0.0}),
    Architecture("ERNIE 4.5", "ernie4_5"),
    Architecture(
        "ERNIE 4.5-MoE",
        "ernie4_5_moe",
        EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    ),
    Architecture("Hunyuan", "hunyuan_v1_dense"),
    Architecture("Hunyuan-MoE", "hunyuan_v1_moe", EXPERTS | {"moe_topk": 2}),
    Architecture("Hy3", "hy_v3", EXPERTS | SECOND_SPARSE),
    Architecture(
        "Hy4",
        "hy_v4",
        EXPERTS
        | LATENT
        | GROUPED
        | INDEXED
        | SECOND_SPARSE
        | {"indexer_types": ["full", "shared"], "hc_mult": 2},
        attention="eager",
    ),
    Architecture("HyperCLOVA X", "hyperclovax", {"logits_scaling": 0.125}),
    Architecture("MiniMax-M2", "minimax_m2", EXPERTS),
    Architecture(
        "MiniMax-M3",
        "minimax_m3_vl_text",
        EXPERTS
        | SECOND_SPARSE
        | {
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 32,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 8,
            "index_topk_blocks": 2,
        },
        packs=False,
    ),
    Architecture(
        "MiniMax",
        "minimax",
        EXPERTS | {"block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
        packs=False,
    ),
    Architecture(
        "MiMo-V2-Flash",
        "mimo_v2_flash",
        EXPERTS | GROUPED | _windowed() | SECOND_FULL | SECOND_SPARSE | {"v_head_dim": 16},
        attention="eager",
    ),
    Architecture("Solar Open", "solar_open", EXPERTS | GROUPED),
    Architecture(
        "Inkling",
        "inkling_text",
        EXPERTS
        | GROUPED
        | SECOND_SPARSE
        | {
            "layer_types": ["hybrid_sliding", "hybrid"],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 8,
            "d_rel": 4,
            "rel_extent": 64,
        },
        packs=False,
    ),
    Architecture(
        "Laguna",
        "laguna",
        EXPERTS
        | _windowed()
        | SECOND_FULL
        | SECOND_SPARSE
        | {"shared_expert_intermediate_size": 32, "num_attention_heads_per_layer": [4, 4]},
    ),
    Architecture("Mellum 2", "mellum", EXPERTS | _windowed() | SECOND_FULL | SECOND_SPARSE),
    Architecture(
        "Zaya",
        "zaya",
        {"num_experts": 4, "moe_intermediate_size": 32, "router_hidden_size": 16},
        packs=False,
    ),
    Architecture("dots.llm1", "dots1", EXPERTS | GROUPED),
    Architecture("Apertus", "apertus"),
    Architecture("Arcee", "arcee"),
    Architecture(
        "Trinity",
        "afmoe",
        EXPERTS | _windowed() | SECOND_FULL | {"num_dense_layers": 1, "num_shared_experts": 1},
        packs=False,
    ),
    Architecture("BitNet", "bitnet"),
    Architecture("CWM", "cwm", _windowed() | SECOND_FULL),
    Architecture("DiffLlama", "diffllama"),
    Architecture("Doge", "doge", {"keep_window_size": 48}),
    Architecture("HRM", "hrm_text", {"num_layers_per_stack": 1, "num_hidden_layers": 8}),
    Architecture("Jais 2", "jais2"),
    Architecture("Helium", "helium"),
    Architecture("Nemotron", "nemotron"),
    Architecture("NanoChat", "nanochat", {"final_logit_softcapping": 15.0}),
    Architecture(
        "GPT",
        "openai-gpt",
        GPT2,
        whole=True,
        attention="eager",
        packs=False,
        needs=(NO_CHECKPOINTING,),
    ),
    Architecture("GPT-2", "gpt2", GPT2, whole=True),
    Architecture("GPT-BigCode", "gpt_bigcode", GPT2, whole=True),
    Architecture("GPT-NeoX", "gpt_neox", {"hidden_dropout": 0.0}),
    Architecture(
        "GPT-NeoX Japanese",
        "gpt_neox_japanese",
        {"hidden_dropout": 0.0},
        attention="eager",
        needs=(NO_CHECKPOINTING,),
    ),
    Architecture(
        "GPT-Neo",
        "gpt_neo",
        ATTENTION_ONLY
        | {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
        },
        whole=True,
        attention="eager",
    ),
    Architecture(
        "GPT-J",
        "gptj",
        GPT2 | {"rotary_dim": 8, "tie_word_embeddings": False},
        whole=True,
        attention="eager",
    ),
    Architecture(
        "CodeGen",
        "codegen",
        GPT2 | {"rotary_dim": 8, "tie_word_embeddings": False},
        whole=True,
        attention="eager",
    ),
    Architecture("CTRL", "ctrl", GPT2 | {"dff": 96}, whole=True, needs=(NO_CHECKPOINTING,)),
    Architecture(
        "DBRX",
        "dbrx",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "initializer_range": 0.15,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
        whole=True,
    ),
    Architecture("JetMoE", "jetmoe", EXPERTS | {"kv_channels": 16}, needs=(NO_CHECKPOINTING,)),
    Architecture("Persimmon", "persimmon", {"hidden_dropout": 0.0}),
    Architecture(
        "OPT",
        "opt",
        ATTENTION_ONLY | {"ffn_dim": 96, "word_embed_proj_dim": 64},
        whole=True,
        packs=False,
    ),
    Architecture(
        "BioGPT",
        "biogpt",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        packs=False,
    ),
    Architecture(
        "Falcon",
        "falcon",
        ATTENTION_ONLY | {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
        whole=True,
        packs=False,
    ),
    Architecture(
        "BLOOM",
        "bloom",
        ATTENTION_ONLY | {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0},
        whole=True,
        attention="eager",
        packs=False,
    ),
    Architecture(
        "MPT",
        "mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "initializer_range": 0.15,
        },
        whole=True,
        attention="eager",
        packs=False,
    ),
    Architecture(
        "Mamba",
        "mamba",
        RECURRENT,
        whole=True,
        attention="eager",
        packs=False,
    ),
    Architecture(
        "Mamba 2",
        "mamba2",
        RECURRENT | {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
        whole=True,
        attention="eager",
        packs=False,
    ),
    Architecture(
        "Falcon-Mamba", "falcon_mamba", RECURRENT, whole=True, attention="eager", packs=False
    ),
    Architecture(
        "RWKV",
        "rwkv",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "num_hidden_layers": 2,
            "context_length": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        whole=True,
        attention="eager",
        packs=False,
    ),
    Architecture(
        "xLSTM",
        "xlstm",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_blocks": 2,
            "num_heads": 4,
            "chunk_size": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        whole=True,
        attention="eager",
        packs=False,
        needs=(FLOAT32,),
    ),
    Architecture(
        "Zamba",
        "zamba",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        packs=False,
    ),
    Architecture(
        "Zamba 2",
        "zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_key_value_heads": 4,
            "n_mamba_heads": 8,
            "mamba_d_state": 8,
            "chunk_size": 16,
            "adapter_rank": 8,
            "use_mamba_kernels": False,
        },
        packs=False,
    ),
    Architecture(
        "LFM2",
        "lfm2",
        {
            "block_ff_dim": 96,
            "block_dim": 64,
            "conv_dim": 64,
            "conv_L_cache": 3,
            "layer_types": ["conv", "full_attention"],
        },
        packs=False,
    ),
    Architecture(
        "LFM2-MoE",
        "lfm2_moe",
        EXPERTS
        | {"num_dense_layers": 1, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"]},
        packs=False,
    ),
    Architecture(
        "Falcon-H1",
        "falcon_h1",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "lm_head_multiplier": 0.0390625,
        },
        packs=False,
    ),
    Architecture(
        "Bamba",
        "bamba",
        {
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "attn_layer_indices": [1],
        },
        packs=False,
    ),
    Architecture(
        "Jamba",
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "num_experts": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        packs=False,
    ),
    Architecture(
        "Nemotron-H",
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
        packs=False,
    ),
    Architecture(
        "Granite",
        "granite",
        {
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
        },
    ),
    Architecture("Granite-MoE", "granitemoe", EXPERTS | {"logits_scaling": 8.0}),
    Architecture(
        "Granite-MoE, shared experts",
        "granitemoeshared",
        EXPERTS | {"shared_intermediate_size": 32, "logits_scaling": 8.0},
    ),
    Architecture(
        "Granite, windows",
        "granite_swa",
        _windowed() | SECOND_FULL | {"layer_rope_theta": [10000.0, 10000.0]},
        attention="eager",
    ),
    Architecture(
        "Granite-MoE, windows",
        "granitemoe_swa",
        EXPERTS | _windowed() | SECOND_FULL | {"layer_rope_theta": [10000.0, 10000.0]},
        attention="eager",
    ),
    Architecture(
        "Granite 4",
        "granitemoehybrid",
        EXPERTS
        | {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "shared_intermediate_size": 96,
        },
        packs=False,
    ),
    Architecture("Cohere", "cohere", {"logit_scale": 0.0625}),
    Architecture("Cohere 2", "cohere2", _windowed() | {"logit_scale": 0.0625}),
    Architecture(
        "Cohere 2-MoE", "cohere2_moe", EXPERTS | _windowed() | SECOND_FULL | {"logit_scale": 0.0625}
    ),
    Architecture(
        "MiniCPM3",
        "minicpm3",
        LATENT | {"dim_model_base": 16, "scale_emb": 12, "scale_depth": 1.4},
    ),
    Architecture(
        "RecurrentGemma",
        "recurrent_gemma",
        {
            "num_hidden_layers": 3,
            "lru_width": 64,
            "attention_window_size": 64,
            "logits_soft_cap": 30.0,
        },
        packs=False,
    ),
    Architecture("BERT", "bert", {"is_decoder": True}, refused="not supported"),
    Architecture(
        "ModernBERT decoder",
        "modernbert-decoder",
        {
            "local_attention": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        refused="not supported",
    ),
)

TEACHERS = (
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Qwen3-MoE",
    "Gemma 2",
    "Gemma 3",
    "Phi-3",
    "OLMo 2",
    "GLM-4",
    "gpt-oss",
    "Falcon-H1",
    "Granite",
)
"""Names of the architectures that are tried as teachers, in vLLM's engine."""


@dataclass(frozen=True)
class RefusedTeacher:
    """A teacher of which vLLM 0.32 computes other rows than transformers.

    Attributes:
        name: name of the architecture.
        reason: what vLLM computes instead.
        block: the teacher's `vllm:` block.
    """

    name: str
    reason: str
    block: dict[str, Any] = field(default_factory=dict)


REFUSED_TEACHERS = (
    RefusedTeacher(
        "Granite",
        "logits are not divided by `logits_scaling`",
        {"model_impl": "transformers"},
    ),
    RefusedTeacher("LFM2", "on a CPU, rotary positions are applied to the wrong rows"),
    RefusedTeacher("Cohere 2", "a token sees `sliding_window` + 1 tokens"),
)
