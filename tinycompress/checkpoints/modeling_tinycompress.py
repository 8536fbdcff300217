"""A language model whose layers may differ in width and whose weights may be packed, for transformers 4.57 and 5.x.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

This file lies beside the weights that tinycompress saved and needs torch and transformers only. config.json says in
`layers` the query heads, key/value heads and FFN channels of every layer (0: no such sublayer), its window and whether
it has RoPE; `rope` holds the frequencies; `quantized` the bits and zero points of packed weights, which are unpacked
whenever they are used. `model.unpack()` makes ordinary linears of them: faster, and what adapters (PEFT) and training
need, at the memory of a float model.
"""

# SPDX-License-Identifier: Apache-2.0
# types of transformers differ between 4.57 and 5.x
# mypy: ignore-errors

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class TinycompressConfig(PretrainedConfig):
    """config.json of a folder that tinycompress saved."""

    model_type = "tinycompress"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        layers: list | None = None,
        rope: dict | None = None,
        quantized: dict | None = None,
        biases: list | None = None,
        qk_norm_eps: float | None = None,
        tied_head: bool = False,
        **kwargs: Any,
    ) -> None:
        self.layers = layers or []
        self.rope = rope or {}
        self.quantized = quantized or {}
        self.biases = biases or []
        self.qk_norm_eps = qk_norm_eps
        self.tied_head = tied_head  # not tie_word_embeddings, by which transformers would look for a head
        super().__init__(**(kwargs | {"tie_word_embeddings": False}))


class Packed(nn.Module):
    """Integers in groups along the rows of a matrix [N, K]: w = (q - z) · s."""

    def __init__(self, rows: int, columns: int, grid: dict, dtype: torch.dtype) -> None:
        super().__init__()
        bits, groups = grid["bits"], columns // (grid["group_size"] or columns)
        self.shape, self.bits, self.zero = (rows, columns), bits, 2 ** (bits - 1)
        self.group = columns // groups
        self.register_buffer("packed", torch.empty(rows, groups, -(-self.group * bits // 8), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(rows, groups, dtype=dtype))
        kind = dtype if grid.get("float_zero") else torch.uint8
        self.register_buffer("zeros", None if grid["symmetric"] else torch.empty(rows, groups, dtype=kind))

    def ints(self) -> Tensor:
        """uint8 [N, groups, values]: values fill bytes from the low bits on, at 3 bits eight of them three bytes."""
        bits, mask = self.bits, 2**self.bits - 1
        if bits == 8:
            return self.packed[..., : self.group]
        if bits == 3:
            whole = F.pad(self.packed, (0, -self.packed.shape[-1] % 3))
            parts = whole.unflatten(-1, (-1, 3)).to(torch.int32)
            word = parts[..., 0] | (parts[..., 1] << 8) | (parts[..., 2] << 16)
            values = torch.stack([(word >> (3 * j)) & mask for j in range(8)], -1)
        else:
            values = torch.stack([(self.packed >> (bits * j)) & mask for j in range(8 // bits)], -1)
        return values.flatten(-2)[..., : self.group]

    def dense(self) -> Tensor:
        """float [N, K]."""
        q = self.ints().to(self.scales.dtype)
        z = self.zero if self.zeros is None else self.zeros.to(q.dtype)[..., None]
        return ((q - z) * self.scales[..., None]).view(self.shape)


class PackedLinear(nn.Module):
    def __init__(self, rows: int, columns: int, grid: dict, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = Packed(rows, columns, grid, dtype)
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dense().to(x.dtype), self.bias)


class PackedEmbedding(nn.Module):
    def __init__(self, rows: int, columns: int, grid: dict, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = Packed(rows, columns, grid, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight.dense())


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def linear(config: TinycompressConfig, name: str, rows: int, columns: int) -> nn.Module:
    """The linear of that name, packed or not."""
    bias, grid = name.rsplit(".", 1)[-1] in config.biases, config.quantized.get(f"{name}.weight")
    if grid:
        return PackedLinear(rows, columns, grid, bias, torch.get_default_dtype())
    return nn.Linear(columns, rows, bias=bias)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(nn.Module):
    """Grouped-query attention with as many heads as its layer has."""

    def __init__(self, config: TinycompressConfig, index: int, place: int) -> None:
        super().__init__()
        at = f"model.layers.{index}.self_attn"
        heads, kv_heads, _, *more = config.layers[index]
        width, self.head_dim = config.hidden_size, config.head_dim
        self.place = place  # in the cache, where only layers with attention have one
        self.window = more[0] if more else None
        self.rope = more[1] if len(more) > 1 else True
        self.q_proj = linear(config, f"{at}.q_proj", heads * self.head_dim, width)
        self.k_proj = linear(config, f"{at}.k_proj", kv_heads * self.head_dim, width)
        self.v_proj = linear(config, f"{at}.v_proj", kv_heads * self.head_dim, width)
        self.o_proj = linear(config, f"{at}.o_proj", width, heads * self.head_dim)
        self.q_norm = self.k_norm = None
        if config.qk_norm_eps is not None:
            self.q_norm = Norm(self.head_dim, config.qk_norm_eps)
            self.k_norm = Norm(self.head_dim, config.qk_norm_eps)

    def forward(self, x: Tensor, tables: tuple, mask: Tensor, positions: tuple, cache: Any) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, d)
        if self.rope:
            q, k = rotated(q, *tables), rotated(k, *tables)
        if cache is not None:
            k, v = cache.update(k, v, self.place)
        if self.window:
            mask = mask & (positions[1] > positions[0] - self.window)
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TinycompressConfig, index: int) -> None:
        super().__init__()
        at, width, channels = f"model.layers.{index}.mlp", config.hidden_size, config.layers[index][2]
        self.gate_proj = linear(config, f"{at}.gate_proj", channels, width)
        self.up_proj = linear(config, f"{at}.up_proj", channels, width)
        self.down_proj = linear(config, f"{at}.down_proj", width, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: TinycompressConfig, index: int, place: int) -> None:
        super().__init__()
        heads, _, channels = config.layers[index][:3]
        self.self_attn = self.mlp = None
        if heads:
            self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
            self.self_attn = Attention(config, index, place)
        if channels:
            self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
            self.mlp = MLP(config, index)

    def forward(self, x: Tensor, *how: Any) -> Tensor:
        if self.self_attn is not None:
            x = x + self.self_attn(self.input_layernorm(x), *how)
        return x if self.mlp is None else x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: TinycompressConfig) -> None:
        super().__init__()
        rows, width = config.vocab_size, config.hidden_size
        grid = config.quantized.get("model.embed_tokens.weight")
        dtype = torch.get_default_dtype()
        self.embed_tokens = PackedEmbedding(rows, width, grid, dtype) if grid else nn.Embedding(rows, width)
        places = [sum(bool(layer[0]) for layer in config.layers[:i]) for i in range(len(config.layers))]
        self.layers = nn.ModuleList(Layer(config, i, place) for i, place in enumerate(places))
        self.norm = Norm(width, config.rms_norm_eps)


def frequencies(rope: dict, head_dim: int, length: int, device: Any) -> Tensor:
    """Radians a position, float32 [head_dim / 2], for a text of `length` positions."""
    values = rope["long"] if rope.get("long") and length > rope["original"] else rope["short"]
    if rope.get("dynamic") and length > rope["original"]:
        factor, theta = rope["dynamic"]["factor"], rope["dynamic"]["theta"]
        theta *= (factor * length / rope["original"] - (factor - 1)) ** (head_dim / (head_dim - 2))
        values = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    return torch.tensor(values, dtype=torch.float32, device=device)


class TinycompressForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinycompressConfig
    base_model_prefix = "model"
    _no_split_modules = ("Layer",)
    _supports_sdpa = True

    def __init__(self, config: TinycompressConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        if not config.tied_head:
            self.lm_head = linear(config, "lm_head", config.vocab_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every weight comes from the file."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def unpack(self) -> "TinycompressForCausalLM":
        """Makes ordinary linears and an ordinary embedding of what is packed, in place."""
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, PackedLinear):
                    weight = child.weight.dense()
                    plain = nn.Linear(weight.shape[1], weight.shape[0], child.bias is not None, device="meta")
                    plain.weight = nn.Parameter(weight)
                    plain.bias = child.bias
                    setattr(parent, name, plain)
                elif isinstance(child, PackedEmbedding):
                    setattr(parent, name, nn.Embedding.from_pretrained(child.weight.dense(), freeze=False))
        self.config.quantized = {}
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        if not self.config.tied_head:
            return self.lm_head(hidden)
        table = self.model.embed_tokens.weight
        return F.linear(hidden, table.dense().to(hidden.dtype) if isinstance(table, Packed) else table)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        keys = torch.arange(past + length, device=x.device)
        queries = keys[past:]
        mask = (keys <= queries[:, None])[None, None]  # (1, 1, T, S)
        if attention_mask is not None and attention_mask.dim() == 2:
            seen = attention_mask[:, : past + length].bool()
            mask = (mask & seen[:, None, None, :]) | (keys == queries[:, None])  # a padded row sees itself
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past : past + length]
        if position_ids is None:
            position_ids = queries[None].expand(batch, -1)
        rope = self.config.rope
        frequency = frequencies(rope, self.config.head_dim, int(position_ids.max()) + 1, x.device)
        angles = (position_ids[..., None].float() * frequency)[:, None]  # (B, 1, T, d/2)
        angles = torch.cat((angles, angles), -1)
        tables = ((angles.cos() * rope["scale"]).to(x.dtype), (angles.sin() * rope["scale"]).to(x.dtype))
        for layer in self.model.layers:
            x = layer(x, tables, mask, (queries[:, None], keys), past_key_values)
        x = self.model.norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.logits(x[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
