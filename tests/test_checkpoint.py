"""Checkpoints that survive crashes and full disks, models of others, publishing, and the optimizer Muon."""
import copy
import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import checkpoint
from ar import AR
from checkpoint import find, find_mask_id, load_checkpoint, load_optimizers, save_checkpoint
from data import batch_from_documents, byte_tokenizer
from mdm import MDM
from model import ModelConfig, Transformer
from muon import Muon, newton_schulz

ROOT = Path(__file__).parent.parent
TOK = byte_tokenizer()                              # 258 ids: 256 bytes, <|endoftext|>, <|mask|>


def backbone(vocab=320, seed=0, **kw):
    torch.manual_seed(seed)
    shape = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16)
    return Transformer(ModelConfig(vocab, **shape, **kw))


def tiny(**kw): return MDM(backbone(), TOK.mask_id, separator=TOK.sep_id, eos_id=TOK.eos_id, **kw)


def make_optimizers(obj):
    """As train.py does with optimizer='muon'."""
    matrices = [p for p in obj.model.layers.parameters() if p.ndim == 2 and p.requires_grad]
    rest = [p for p in obj.parameters() if p.requires_grad and all(p is not q for q in matrices)]
    return [Muon([dict(params=matrices)], lr=0.01), torch.optim.AdamW(rest, lr=0.01)]


def train_steps(obj, optimizers, steps):
    for step in steps:
        document = [TOK.sep_id, *TOK.encode(f'step {step} of many'), TOK.eos_id]
        batch = batch_from_documents([document, document], step=step)
        loss, _ = obj(obj.prepare(batch, seed=0))
        loss.backward()
        for opt in optimizers: opt.step(); opt.zero_grad()


def save(out, kind='step', step=1, obj=None, **kw):
    return save_checkpoint(out, kind, obj or tiny(), TOK, dict(step=step), **kw)


def names(out): return sorted(p.name for p in Path(out).iterdir())


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True): assert torch.equal(p, q), name


# ---- save, load, continue ----------------------------------------------------------------------------------
@pytest.mark.parametrize('frozen', [(), ('embed_tokens', 'layers.0')])
def test_training_goes_on_bit_for_bit(tmp_path, frozen):
    """Weights, Adam's moments and step counts, Muon's momentum: 2 steps, save, load, 2 steps = 4 steps."""
    def freeze(obj):
        for name, p in obj.model.named_parameters(): p.requires_grad_(not name.startswith(frozen))
        return obj
    whole = freeze(tiny().train())
    optimizers = make_optimizers(whole)
    train_steps(whole, optimizers, (0, 1))
    path = save(tmp_path, step=2, obj=whole, optimizers=optimizers)
    train_steps(whole, optimizers, (2, 3))

    parts = freeze(load_checkpoint(str(path))[0].train())
    optimizers = make_optimizers(parts)
    load_optimizers(path, parts, optimizers)
    assert all(len(opt.state) == sum(len(g['params']) for g in opt.param_groups) for opt in optimizers)
    train_steps(parts, optimizers, (2, 3))
    assert_same(whole, parts)


def test_a_checkpoint_remembers_what_it_is(tmp_path):
    obj = MDM(backbone(), TOK.mask_id, shift=True, separator=TOK.sep_id, eos_id=TOK.eos_id)
    again, tok = load_checkpoint(str(save(tmp_path, obj=obj)), t_min=0.2)
    assert again.dlm == obj.dlm and again.t_min == 0.2 and not again.model.cfg.causal and not again.training
    assert tok.encode('für') == TOK.encode('für') and tok.decode(TOK.encode('für')) == 'für'
    assert {p.suffix for p in (tmp_path / 'step-000001').iterdir()} == {'.json', '.safetensors'}  # no pickle


def test_a_checkpoint_is_a_hugging_face_directory(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    obj = AR(backbone(), separator=TOK.sep_id, eos_id=TOK.eos_id)
    path = save(tmp_path, obj=obj)
    ids = torch.tensor([[TOK.sep_id, *TOK.encode('hello')]])
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    torch.testing.assert_close(theirs(ids).logits, obj.model(ids), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(path)('hello').input_ids == TOK.encode('hello')


# ---- rolling, best, crashes --------------------------------------------------------------------------------
def test_rolling_and_best(tmp_path):
    for step in (1, 2, 10): save(tmp_path, step=step, keep=2)
    save(tmp_path, 'best', 2)
    assert names(tmp_path) == ['best-000002', 'step-000002', 'step-000010']
    assert find(tmp_path).name == 'best-000002' and find(tmp_path, 'step').name == 'step-000010'
    for step in (11, 12): save(tmp_path, step=step, keep=0)         # 0 = all
    save(tmp_path, 'best', 1)                           # after a resume, the best may be an earlier one
    assert names(tmp_path) == ['best-000001', *(f'step-{i:06d}' for i in (2, 10, 11, 12))]
    assert find(tmp_path / 'nowhere') is None and find(tmp_path / 'step-000002') is None


@pytest.mark.parametrize('owner, moment', [(os, 'fsync'), (checkpoint, 'save_file'), (os, 'rename'),
                                           (shutil, 'rmtree')])
def test_killed_while_saving(tmp_path, owner, moment):
    """kill -9 while files are flushed, before the optimizer's file, before the rename, when the old one goes:
    the last complete checkpoint opens, training can go on from it, and the next save cleans up."""
    obj = tiny()
    optimizers = make_optimizers(obj)
    train_steps(obj, optimizers, (0,))
    old = copy.deepcopy(obj)
    save(tmp_path, step=1, obj=obj, optimizers=optimizers)
    train_steps(obj, optimizers, (1,))                  # not in the child: autograd's threads do not survive a fork
    if child := os.fork(): status = os.waitpid(child, 0)[1]
    else:
        try:
            signal.alarm(60)                            # a fork that hangs
            torch.set_num_threads(1)
            setattr(owner, moment, lambda *args, **kw: os.kill(os.getpid(), signal.SIGKILL))
            save(tmp_path, step=2, obj=obj, optimizers=optimizers)
        finally: os._exit(1)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    complete = find(tmp_path)
    assert complete.name == ('step-000002' if moment == 'rmtree' else 'step-000001')
    assert any(name.startswith('.tmp') for name in names(tmp_path))
    obj, _ = load_checkpoint(str(complete))
    load_optimizers(complete, obj, make_optimizers(obj))
    if moment != 'rmtree': assert_same(obj, old)
    save(tmp_path, step=3)
    assert names(tmp_path) == ['step-000003']


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'),
                                   SafetensorError('I/O error: No space left on device (os error 28)')])
def test_a_full_disk(tmp_path, monkeypatch, error):
    save(tmp_path, step=1)

    def save_file(*args, **kw): raise error
    with monkeypatch.context() as m, pytest.raises(type(error)) as e:
        m.setattr(checkpoint, 'save_file', save_file)
        save(tmp_path, step=2, optimizers=[torch.optim.AdamW(tiny().parameters())])
    assert checkpoint.disk_is_full(e.value) and not checkpoint.disk_is_full(ValueError('28'))
    assert names(tmp_path) == ['step-000001']                       # the half-written one gave its space back
    save(tmp_path, step=2)
    assert names(tmp_path) == ['step-000002']


# ---- models of others --------------------------------------------------------------------------------------
@pytest.fixture
def foreign(tmp_path):
    """foreign(rows, **special tokens) -> a Hugging Face directory that knows nothing of us: a byte-level
    tokenizer of 257 ids (and specials), and a causal model with so many rows in its embedding."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(rows, **special):
        vocab = tokenizers.Tokenizer.from_str(TOK.json).get_vocab(with_added_tokens=False)
        raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = tokenizers.decoders.ByteLevel()
        tok = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token='</s>', **special)
        tok.save_pretrained(tmp_path / 'hf')
        backbone(rows).save_pretrained(tmp_path / 'hf')
        return str(tmp_path / 'hf')
    return make


def test_a_foreign_model_opens_as_ar(foreign):
    obj, tok = load_checkpoint(foreign(320))
    assert isinstance(obj, AR) and obj.model.cfg.causal and obj.mask_id is None
    assert obj.separator is None and obj.eos_id == tok.eos_id == 256                # its prompts stay raw
    with pytest.raises(SystemExit, match="objective must be one of ar, mdm, repr_align, ldlm, got 'diffusion'"):
        load_checkpoint(foreign(320), 'diffusion')


@pytest.mark.parametrize('rows, special, mask_id, grown', [
    (320, dict(mask_token='<mask>'), 257, 320),             # the tokenizer's own
    (320, {}, 257, 320),                                    # a row that no token uses
    (257, {}, 257, 320),                                    # every row is used: new ones, to a multiple of 64
])
def test_a_foreign_model_opens_as_mdm(foreign, rows, special, mask_id, grown):
    path = foreign(rows, **special)
    obj, tok = load_checkpoint(path, 'mdm')
    before = Transformer.from_pretrained(path).embed_tokens.weight
    weight = obj.model.embed_tokens.weight
    assert (obj.mask_id, len(weight), obj.model.cfg.vocab_size) == (mask_id, grown, grown)
    assert obj.shift and not obj.model.cfg.causal and find_mask_id(obj.model, tok) == mask_id
    assert torch.equal(weight[:rows], before)   # nothing else changes; a new row is the mean of the old
    if grown > rows: torch.testing.assert_close(weight[mask_id], before.mean(0))
    assert load_checkpoint(path, 'mdm', shift=False, mask_id=7)[0].dlm | dict(shift=False, mask_id=7) == \
        load_checkpoint(path, 'mdm', shift=False, mask_id=7)[0].dlm


def test_a_tokenizer_larger_than_the_embedding(foreign):
    with pytest.raises(SystemExit, match='the tokenizer has 257 ids, the embedding only 200 rows'):
        load_checkpoint(foreign(200))


@pytest.mark.parametrize('objective', [AR, MDM])
def test_weight_decay_on_matrices_only(objective):
    obj = objective(backbone(qkv_bias=True, tied=False), mask_id=300)
    obj.model.lm_head.weight.requires_grad_(False)
    decayed, plain = obj.param_groups(0.1)
    name = {id(p): n for n, p in obj.named_parameters()}
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.1, 0.0)
    assert all(name[id(p)].endswith(('_proj.weight', 'embed_tokens.weight')) for p in decayed['params'])
    assert all(name[id(p)].endswith(('norm.weight', '.bias')) for p in plain['params'])
    assert len(decayed['params']) + len(plain['params']) == len(name) - 1           # all but the frozen one


# ---- publishing --------------------------------------------------------------------------------------------
@pytest.fixture
def command(monkeypatch):
    """`python checkpoint.py --key=value ...` in this process."""
    def run(**settings):
        monkeypatch.setattr(sys, 'argv', ['checkpoint.py', *(f'--{k}={v}' for k, v in settings.items())])
        runpy.run_path(str(ROOT / 'checkpoint.py'), run_name='__main__')
    return run


def test_export_and_upload(tmp_path, command, monkeypatch):
    calls, export = [], str(tmp_path / 'export')

    class HfApi:
        def create_repo(self, **kw): calls.append(kw)
        def upload_folder(self, **kw): calls.append(kw)
    monkeypatch.setattr('huggingface_hub.HfApi', HfApi)
    save_checkpoint(tmp_path / 'run', 'best', tiny(), TOK, dict(
        step=40, tokens=5000, config=dict(dataset='stdlib'), val=dict(nats_per_token=2.34567, n_rows=8)))
    command(out_dir=tmp_path / 'run', export=export, push_to_hub='me/model')
    assert calls == [dict(repo_id='me/model', repo_type='model', exist_ok=True),
                     dict(repo_id='me/model', repo_type='model', folder_path=export)]
    assert json.loads(Path(export, 'config.json').read_text())['dtype'] == 'bfloat16'
    card = Path(export, 'README.md').read_text()
    for fact in ('# me/model', 'A diffusion language model', '| objective | mdm |', '| dataset | stdlib |',
                 '| steps | 40 |', '| validation nats_per_token | 2.3457 |', '--out_dir=me/model'):
        assert fact in card
    obj, _ = load_checkpoint(export)
    assert obj.separator == TOK.sep_id and obj.mask_id == TOK.mask_id
    with pytest.raises(SystemExit, match='export is not empty'):
        command(out_dir=tmp_path / 'run', export=export)
    with pytest.raises(SystemExit, match="dtype must be bfloat16, float16 or float32, got 'int8'"):
        command(out_dir=tmp_path / 'run', export=tmp_path / 'x', dtype='int8')
    with pytest.raises(SystemExit, match='say --out_dir='): command(out_dir=tmp_path / 'run')


def test_a_failed_upload_keeps_the_export(tmp_path, monkeypatch):
    class HfApi:
        def create_repo(self, **kw): raise ConnectionError('401 Unauthorized')
    monkeypatch.setattr('huggingface_hub.HfApi', HfApi)
    tiny().model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match='but the hub says ConnectionError: 401.*\n.*hf auth login'):
        checkpoint.upload(tmp_path, 'me/model', 'card')


def test_provenance_without_git(monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, 'which', lambda name: None)
    monkeypatch.setenv('COMMIT', 'abc')
    facts = checkpoint.provenance('cpu', 0.0)
    assert facts['commit'] == 'abc' and facts['hardware'].startswith('CPU') and facts['peak_gib'] is None


# ---- Muon --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('shape', [(16, 16), (16, 64), (64, 16), (3, 32, 48)])
def test_newton_schulz_flattens_the_spectrum(shape):
    """The update keeps the singular vectors of g and makes all singular values about 1."""
    torch.manual_seed(0)
    U, s, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(1, 0.05, s.shape[-1])                            # one direction is 20 times another
    u = newton_schulz(100 * U * s @ Vh)
    core = U.mT @ u @ Vh.mT                                             # in the basis of g: diagonal, near 1
    values = core.diagonal(dim1=-2, dim2=-1)
    assert u.shape == shape and 0.6 < values.min() and values.max() < 1.3
    torch.testing.assert_close(core, torch.diag_embed(values), rtol=0, atol=1e-4)
    torch.testing.assert_close(u, U @ core @ Vh, rtol=0, atol=1e-4)


def test_muon_takes_fused_matrices_apart():
    """q|k|v in one parameter moves as three would, and as no stack orthogonalised as a whole would."""
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(32, 16))
    parts = [torch.nn.Parameter(p.detach().clone()) for p in whole.split([16, 8, 8])]
    stack = torch.nn.Parameter(whole.detach().clone())
    for _ in range(2):
        g = torch.randn(32, 16)
        whole.grad, stack.grad = g, g
        for p, gp in zip(parts, g.split([16, 8, 8])): p.grad = gp
        settings = dict(lr=0.1, weight_decay=0.1)
        Muon([dict(params=[whole], rows=[16, 8, 8])], **settings).step()
        Muon(parts, **settings).step()
        Muon([stack], **settings).step()
    torch.testing.assert_close(whole, torch.cat(parts))
    assert not torch.allclose(whole, stack, atol=0.01)


def test_muon_step_by_hand():
    """w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, cols)) NewtonSchulz(g + beta m), m the running sum."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(8, 24))
    expected, m = w.detach().clone(), torch.zeros(8, 24)
    opt = Muon([w], lr=0.1, weight_decay=0.5, momentum=0.9)
    for _ in range(3):
        w.grad = torch.randn(8, 24)
        opt.step()
        m = 0.9 * m + w.grad
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 24 ** 0.5 * newton_schulz(w.grad + 0.9 * m)
    torch.testing.assert_close(w.detach(), expected)
