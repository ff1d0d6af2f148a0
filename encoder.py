"""The features that ldlm.py writes in: one hidden state of a frozen language model, and a cache of them on disk."""
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from model import Transformer, look_up, resolve
from tokenizer import gguf_path


class FeatureCache:
    """Rows of features (T, width) on disk, in bf16, found by a hash of the row's ids. A process appends to files of its
    own, the key after the row, and reads what was complete when it started."""

    def __init__(self, folder, shape):
        self.shape, self.size, self.where = shape, 2 * math.prod(shape), {}
        folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
        for keys in folder.glob('*.keys'):
            raw, rows = keys.read_bytes(), keys.with_suffix('.rows')
            complete = min(len(raw) // 16, rows.stat().st_size // self.size) if rows.exists() else 0
            self.where |= {raw[i:i + 16]: (rows, i // 16) for i in range(0, 16 * complete, 16)}
        name = folder / f'{time.time_ns()}-{os.getpid()}'
        self.rows, self.keys = open(f'{name}.rows', 'ab'), open(f'{name}.keys', 'ab')

    def features(self, ids, compute):
        """ids (B, T) -> (B, T, width) on the CPU, in fp32; compute(ids) of the rows that are not there."""
        keys = [hashlib.sha256(row.numpy().tobytes()).digest()[:16] for row in ids]
        new = {key: i for i, key in enumerate(keys) if key not in self.where}
        if new:
            for key, h in zip(new, compute(ids[list(new.values())]).bfloat16().cpu().contiguous()):
                self.where[key] = (Path(self.rows.name), self.rows.tell() // self.size)
                self.rows.write(h.view(torch.int16).numpy().tobytes())
                self.keys.write(key)
            self.rows.flush(); self.keys.flush()
        found = [np.fromfile(file, np.int16, self.size // 2, offset=i * self.size)
                 for file, i in map(self.where.get, keys)]
        return torch.from_numpy(np.stack(found)).view(torch.bfloat16).view(len(ids), *self.shape).float()


class Encoder:
    """hidden_states[layer] of a frozen language model; blocks after that one are not even kept. No nn.Module: it is
    in no state dict, optimizer or DDP; a checkpoint keeps its path and hash.

    path: anything that Transformer.from_pretrained opens, another model of transformers (GPT-2), or
    'random:<width>:<vocabulary>', which stands in for a model that is not there. Loaded when first used.
    device: '' = that of the ids; 'cpu' or 'cuda:1' keeps it there and sends the features over.
    cache: a folder; rows of training and validation data are then encoded once, T x width x 2 bytes each."""

    def __init__(self, path, layer=-3, device='', cache='', hash=''):
        self.path, self.layer, self.device, self.cache, self.hash = str(path), layer, device, cache, hash
        self.model, self.caches, self.where = None, {}, look_up(path)

    def load(self):
        if self.model is not None: return self
        try: self.model = self._open()
        except SystemExit as e:
            known = '; no other will do than that of the training (a run that goes on deletes its earlier best)'
            raise SystemExit(f"the encoder: {e}" + known * bool(self.hash)) from None
        self.model.eval().requires_grad_(False)
        if self.causal is None: self.causal = self._looks_left()
        digest = hashlib.sha256()
        for p in self.model.parameters():                                       # a sample of every tensor, in bf16
            part = p.detach().flatten()[:4096].cpu().bfloat16().view(torch.int16)
            digest.update(f'{tuple(p.shape)}'.encode() + part.numpy().tobytes())
        if self.hash not in ('', found := digest.hexdigest()[:16]):
            raise SystemExit(f"the encoder {self.path} is not the one that this checkpoint was trained with")
        self.hash = found
        return self

    def _open(self):
        if self.path.startswith('random:'):
            try: self.width, self.vocab_size = map(int, self.path.split(':')[1:])
            except ValueError:
                raise SystemExit(f"a random encoder is random:<width>:<vocabulary>, got {self.path}") from None
            self.causal, self.config = True, ''
            return RandomFeatures(self.width, self.vocab_size)
        kind = 'llama' if gguf_path(self.where) else json.loads(
            (resolve(self.where) / 'config.json').read_text()).get('model_type')
        if kind == 'ldlm': raise SystemExit(f"{self.path} is a latent diffusion model: it has no features of tokens")
        if kind in ('llama', 'qwen2', 'qwen3'):
            model = Transformer.from_pretrained(self.where)
            model.layers = model.layers[:self._upto(len(model.layers))]
            model.lm_head, model.norm = None, model.norm if self.is_last else nn.Identity()
            self.width, self.vocab_size, self.causal = model.cfg.n_embd, model.cfg.vocab_size, model.cfg.causal
            self.config = str(model.cfg)
            return model
        from transformers import AutoModel
        model = AutoModel.from_pretrained(resolve(self.where), dtype=torch.float32)
        c, n = model.config, model.config.num_hidden_layers
        owner, name = next(((m, name) for m in model.modules() for name, child in m.named_children()
                            if isinstance(child, nn.ModuleList) and len(child) == n), (None, ''))
        if owner is None: raise SystemExit(f"{self.path}: cannot find the {n} blocks in {type(model).__name__}")
        setattr(owner, name, getattr(owner, name)[:self._upto(n)])
        model.config.num_hidden_layers = self._upto(n)
        self.width, self.vocab_size, self.causal, self.config = c.hidden_size, c.vocab_size, None, c.to_json_string()
        if not self.is_last: getattr(owner, name)[-1].register_forward_hook(self._tap)
        return model

    def _looks_left(self):
        """Whether features stay as they are when a later token changes."""
        ids = torch.arange(8).repeat(2, 1) % self.vocab_size
        ids[1, -1] = self.vocab_size - 1
        h = self.features(ids)[:, :-1]
        return torch.allclose(*h, rtol=1e-4, atol=1e-4 * h.abs().max().item())

    def is_of(self, path):
        """Whether these features come from the model at `path`."""
        if path == self.path: return True
        try: return Encoder(path, self.layer).load().hash == self.hash
        except SystemExit: return False                                         # it has not so many layers

    def _upto(self, n_layer):
        """How many blocks to run. The last hidden state, but no other, is behind the final norm."""
        upto = n_layer + 1 + self.layer if self.layer < 0 else self.layer
        if not 1 <= upto <= n_layer:
            raise SystemExit(f"encoder_layer {self.layer}: {self.path} has {n_layer} blocks, so -1 to -{n_layer}")
        self.is_last = upto == n_layer
        return upto

    def _tap(self, module, args, output): self.tapped = output[0] if isinstance(output, tuple) else output

    def cached(self, ids):
        """`features`, by way of the cache if there is one."""
        if not self.cache: return self.features(ids)
        T = ids.shape[1]
        if T not in self.caches:
            self.load()
            key = hashlib.sha256(f'{self.hash} {self.config} {self.layer}'.encode()).hexdigest()[:16]
            self.caches[T] = FeatureCache(f'{self.cache}/{key}-{T}', (T, self.width))
        return self.caches[T].features(ids.cpu(), lambda rows: self.features(rows.to(ids.device))).to(ids.device)

    @torch.no_grad()
    def features(self, ids):
        """ids (B, T) -> (B, T, width) in fp32, on the device of the ids. Computed in bf16 on a GPU, in fp32 on a CPU,
        whatever autocast the caller is in."""
        x = ids.to(self.device or ids.device)
        model = self.load().model.to(x.device, torch.bfloat16 if x.is_cuda else None)
        with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):     # Triton: on the current device
            if isinstance(model, Transformer): h = model.hidden(x, upto=None if self.is_last else len(model.layers))
            elif isinstance(model, RandomFeatures): h = model(x)
            else:
                h = model(input_ids=x, use_cache=False).last_hidden_state
                if not self.is_last: h = self.tapped
        return h.to(ids.device).float()


class RandomFeatures(nn.Module):
    """A stand-in of the right width: each token's own random vector, and some of its left neighbour's."""
    def __init__(self, width, vocab_size):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.low = nn.Parameter(torch.randn(1021, width, generator=generator))
        self.high = nn.Parameter(torch.randn(vocab_size // 1021 + 1, width, generator=generator))

    def forward(self, ids):
        h = self.low[ids % 1021] + self.high[ids // 1021]
        return h + 0.5 * h.roll(1, 1) * (torch.arange(ids.shape[1], device=ids.device) > 0)[:, None]
