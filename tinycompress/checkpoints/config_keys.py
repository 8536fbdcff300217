"""What to do with a key of config.json that no reader asks for: let it pass, name it, or refuse the file.

A key can pass where it is known to change nothing that the model computes. One that looks like a part of the model
(attention, positions, norms, scales, quantization, adapters, …) is refused, for a model without that part would be
another model. Any other is named in a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError

_READ = """
attention_bias bos_token_id eos_token_id head_dim hidden_act hidden_size intermediate_size layer_types
max_position_embeddings max_window_layers mlp_bias model_type no_rope_layer_interval no_rope_layers num_attention_heads
num_hidden_layers num_key_value_heads original_max_position_embeddings pad_token_id partial_rotary_factor
quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings
use_sliding_window vocab_size
"""
# of training, of other heads, of how a framework runs; and what generation_config.json has taken over
_HARMLESS = """
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
_flash_attn_2_enabled _name_or_path _output_attentions _remove_final_layer_norm add_cross_attention architectures
attention_dropout attn_implementation auto_map bad_words_ids base_model begin_suppress_tokens chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
gradient_checkpointing hidden_dropout id2label initializer_range is_decoder is_encoder_decoder is_llama_config
keys_to_ignore_at_inference label2id length_penalty max_length max_sequence_length min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_router_logits output_scores
prefix pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict
return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
tinycompress_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache vocab_file
"""
_ROPE = """
rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale
mscale_all_dim truncate low_freq_factor high_freq_factor short_factor long_factor partial_rotary_factor finetuned
"""  # `finetuned` is a note of the first YaRN models
KNOWN = frozenset(_READ.split()) | frozenset(_HARMLESS.split())
ROPE = frozenset(_ROPE.split())
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {  # the values with which these say nothing out of the ordinary
    "alibi": (False,),
    "embedding_multiplier": (1, 1.0),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "residual_multiplier": (1, 1.0),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}
SUSPECT = re.compile(
    "act|adapter|alibi|attention|attn|bias|clip|compress|cross|embedding|expert|ffn|head|hidden|hook|layer|logit|lora|"
    "mask|mlp|moe|multiplier|norm|parallel|peft|position|prun|quant|residual|rope|rotary|router|scal|skip|softcap|"
    "softmax|sparse|tie|transform|window"
)


def check_keys(data: Mapping[str, Any], where: str) -> None:
    """Refuses or names the keys of a config.json that nothing reads."""
    passed: list[str] = []
    for key in sorted(set(data) - KNOWN):
        value = data[key]
        if value is None or value in WITHOUT_EFFECT.get(key, ()):
            continue
        if key in WITHOUT_EFFECT or SUSPECT.search(key.lower()):
            accepted = "a config without it: what it asks for is no part of the models that are carried"
            if key in WITHOUT_EFFECT:
                accepted = f"{WITHOUT_EFFECT[key][0]!r}, or nothing"
            raise InputError(f"{key} in {where}", repr(value)[:80], accepted)
        passed.append(key)
    if passed:
        warnings.warn(f"{where}: not known, and taken to change nothing: {', '.join(passed)}", stacklevel=2)


def check_rope_keys(keys: Iterable[str], where: str) -> None:
    """Refuses keys of a rope dictionary that no type of RoPE has."""
    if unknown := sorted(set(keys) - ROPE):
        raise InputError(where, f"the unknown {', '.join(unknown)}", " | ".join(sorted(ROPE)))
