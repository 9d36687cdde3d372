"""Tiny random models of every causal family that the installed transformers knows.

A family's config is the default of its own class with every size made small. So what shapes the computation
(kinds of layers, norms, scales, rotary kinds, biases, dropout) is what the family publishes, and a family that
comes with another version of transformers needs no line here.
"""

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB_SIZE = 96
NUM_HEADS = 4
NUM_POSITIONS = 128

_LAYERS = r"(num_)?(hidden|decoder)?_?layers|n_layers?|num_blocks"
_ATTENTION_KINDS = ["sliding_attention", "full_attention"]
_NO_HEAD_DIM = ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")


def _sizes(width: int) -> dict[str, int]:
    """By a field's whole name as a pattern. Fields without one keep their default; the first pattern counts."""
    head = width // NUM_HEADS
    return {
        r"(bos|cls|decoder_start|eod|image)_token_id": 0,
        r"(eos|sep)_token_id": 1,
        r"pad_token_id": 2,
        r"(unpadded_|decoder_)?vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab": VOCAB_SIZE,
        r"ngram_vocab_size_base": 64,
        r"max_position_embeddings|n_positions|n_ctx|context_length|max_seq_len|model_max_length": NUM_POSITIONS,
        r"max_(source|target)_positions|keep_window_size|index_topk": NUM_POSITIONS,
        r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size": NUM_POSITIONS,
        _LAYERS + "|encoder_layers": 2,
        r"num_layers_per_stack": 1,
        r"hidden_size|d_model|n_embd|embedding_dim|emb_dim|word_embed_proj_dim|embedding_size": width,
        r"lru_width|(in|out)put_embedding_size|dim_model_base": width,
        r"(moe_.*|expert_ffn_.*|shared_experts?_.*)(intermediate|hidden)_size": width // 2,
        r".*intermediate_size(_mlp)?|.*ffn_dim|ffn_hidden_size|d_inner|dff|dim_ff|feed_forward_size": 2 * width,
        r".*attention_heads|n_heads?|num_heads|index_n_heads|linear_num_(value_)?heads": NUM_HEADS,
        r".*key_value_heads|linear_num_key_heads|num_kv_heads|num_query_groups": NUM_HEADS // 2,
        r"(swa_|v_|linear_.*|index_)?head_dim|dim_head|kv_channels|attention_head_size|d_head|qk_nope_head_dim": head,
        r"qk_rope_head_dim|rotary_dim": head // 2,
        r"mamba_d_state|ssm_state_size|state_size": 8,
        r"(mamba_)?chunk_size|block_size|max_inference_chunksize": 16,
        r"mamba_d_ssm": 2 * width,
        r"mamba_(d_head|headdim)": width // 2,
        r"mamba_(n|num)_heads|n_mamba_heads": NUM_HEADS,
        r"(q|kv|o)_lora_rank": width // 2,
        r"(num|n|moe_num)_?(local|routed)?_?experts": 4,
        r"num_experts_per_tok(en)?|moe_topk|moe_k": 2,
        r"n_group|topk_group|num_expert_group|mamba_n_groups|n_groups": 1,
    }


def _special(width: int) -> dict[str, dict[str, Any]]:
    """By family: what its parts demand of each other, and values without which its default cannot be built."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    indexer = {"n_heads": NUM_HEADS, "kv_heads": 1, "head_dim": width // NUM_HEADS, "budget": 64, "compress_ratio": 4}
    qwen4 = {f"indexer_{name}": size for name, size in indexer.items()}
    conv = {"layer_types": ["conv", "full_attention"]}
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": 2 * _ATTENTION_KINDS}
    experts = {"num_experts_per_tok": 2}
    own: dict[str, dict[str, Any]] = {
        "cohere_compass_text": {"rope_parameters": dict.fromkeys(_ATTENTION_KINDS, rope)},
        "deepseek_v2": experts,
        "dots1": experts | {"n_routed_experts": 4, "n_shared_experts": 1},
        "dots3_note_text": {"head_dim": 3 * width // NUM_HEADS // 2, "per_layer_config": {}},
        "gemma3n_text": shared,
        "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
        "lfm2": conv,
        "lfm2_moe": conv | {"num_dense_layers": 1},
        "mamba2": {"head_dim": width // 2},
        "nemotron": {"num_key_value_heads": NUM_HEADS // 2},
        "nemotron_h": {"moe_shared_expert_overlap": True, "n_shared_experts": 1},
        "qwen4_exp": {"text_config": _small(CONFIG_MAPPING["qwen4_exp_text"], width) | qwen4},
        "qwen4_exp_text": qwen4,
        "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, width - 16]},
        "roc_bert": {"shape_vocab_size": 32, "pronunciation_vocab_size": 32},
        "zamba": {"num_hidden_layers": 6, "layers_block_type": 2 * ["linear_attention", "linear_attention", "hybrid"]},
        "zaya": {"num_experts_per_tok": 1},
    }
    return own | {family: {"head_dim": width // NUM_HEADS} for family in _NO_HEAD_DIM}


def build_family(family: str, width: int, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a random model of a family, in evaluation mode; `overrides` go into its config.

    Raises:
        Exception: whatever the library raises for a family that its defaults, or this machine, cannot build.
    """
    kind = CONFIG_MAPPING[family]
    config = kind(**(_small(kind, width) | _special(width).get(family, {}) | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # What starts at zero must count, as it does in trained models.
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def _small(kind: type[PretrainedConfig], width: int) -> dict[str, Any]:
    try:
        default = vars(kind())
    except StrictDataclassError:
        return {}
    sizes = _sizes(width)
    values: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, PretrainedConfig):
            values[name] = _small(type(value), width)
        elif type(value) is int:
            values |= [(name, size) for pattern, size in sizes.items() if re.fullmatch(pattern, name)][:1]
    if "kv_lora_rank" in values:  # One latent serves all heads, and what is rotated has a width of its own.
        values |= {"num_key_value_heads": NUM_HEADS} if "num_key_value_heads" in values else {}
        values |= {"head_dim": values["qk_rope_head_dim"]} if default.get("head_dim") else {}
    return values | _one_layer_of_each_kind(default)


def _one_layer_of_each_kind(default: dict[str, Any]) -> dict[str, Any]:
    """Lists that name a kind for each layer, cut to the first layer of each kind; at least two layers."""
    name = next((name for name in default if re.fullmatch(_LAYERS, name) and type(default[name]) is int), None)
    if name is None:
        return {}
    lists = {key: value for key, value in default.items() if _is_by_layer(value, default[name])}
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)]
    firsts = sorted({kinds.index(kind) for kind in kinds})
    places = firsts if len(firsts) > 1 else [0, 0]
    return {name: len(places)} | {key: [value[place] for place in places] for key, value in lists.items()}


def _is_by_layer(value: Any, num_layers: int) -> bool:
    """Whether this names a kind for each layer; a list of layers' numbers does not."""
    return type(value) is list and len(value) == num_layers and len(set(map(repr, value))) <= 4
