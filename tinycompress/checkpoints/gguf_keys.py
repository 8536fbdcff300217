"""What to do with the keys of a GGUF file that describe the model: read, known to change nothing, or refused.

llama.cpp reads a key only in the architectures that it was made for and passes over it in others. A file whose model
has more to it than this library computes would then load and be wrong; here it does not load.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .config_keys import SUSPECT

_READ = """
attention.head_count attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon
attention.sliding_window attention.sliding_window_pattern attention.value_length block_count context_length
embedding_length feed_forward_length rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.attn_factor
rope.scaling.factor rope.scaling.original_context_length rope.scaling.type rope.scaling.yarn_attn_factor
rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor
"""
# the vocabulary is as long as the embedding; the others are notes, or of norms and uses that these models do not have
_HARMLESS = """
attention.group_norm_epsilon attention.group_norm_groups attention.layer_norm_epsilon classifier.output_labels
classifier.pooling_type decoder_start_token_id expert_gating_func pooling_type rope.scaling.finetuned
tensor_data_layout vocab_size
"""
KNOWN = frozenset(_READ.split()) | frozenset(_HARMLESS.split())
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {  # the values with which these say nothing out of the ordinary
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "embedding_length_out": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}


def check_keys(values: Mapping[str, Any], architecture: str, head_dim: int, theta: float, where: str) -> None:
    """Refuses or names the keys of the architecture (without its prefix) that nothing reads."""
    ordinary: dict[str, tuple[Any, ...]] = {
        **WITHOUT_EFFECT,
        "attention.scale": (0, 1 / math.sqrt(head_dim)),
        "attention.key_length_swa": (head_dim,),
        "attention.value_length_swa": (head_dim,),
        "rope.dimension_count_swa": (head_dim,),
        "rope.freq_base_swa": (theta,),
    }
    passed: list[str] = []
    for key in sorted(set(values) - KNOWN):
        name = f"{architecture}.{key}"
        if key in ordinary:
            if not any(_same(values[key], value) for value in ordinary[key]):
                accepted = f"{ordinary[key][-1]!r}, or no such key"
                raise InputError(f"{name} in {where}", repr(values[key])[:80], accepted)
        elif SUSPECT.search(key):
            accepted = "a file without it: what it asks for is no part of the models that are carried"
            raise InputError(f"{name} in {where}", repr(values[key])[:80], accepted)
        else:
            passed.append(name)
    if passed:
        warnings.warn(f"{where}: not known, and taken to change nothing: {', '.join(passed)}", stacklevel=2)


def _same(value: Any, ordinary: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, ordinary, rel_tol=1e-6)
