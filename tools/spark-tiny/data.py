"""The corpus as token ids: documents by domain, endless training rows, held-out documents."""
import collections, json, lzma, os
import numpy as np
import torch
from tokenizers import Tokenizer

BOS, EOS, NOISE = 0, 1, 4095
USER, ASSISTANT, NO_THINK = "<｜User｜>", "<｜Assistant｜>", "</think>"
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
MIX = {"math": .36, "code": .24, "story": .22, "chat": .18}      # shares of the training rows


def prompt_text(question):
    return BEGIN + USER + question + ASSISTANT + NO_THINK


def document_text(d):
    """One corpus line as the model sees it: questions and turns in the chat form, text plain."""
    if "text" in d:
        return BEGIN + d["text"] + END
    turns = d.get("turns") or [{"role": "user", "content": d["prompt"]},
                               {"role": "assistant", "content": d["response"]}]
    out = BEGIN
    for t in turns:
        out += USER + t["content"] + ASSISTANT + NO_THINK if t["role"] == "user" else t["content"] + END
    return out


def read_corpus(path, split):
    with lzma.open(path, "rt", encoding="utf-8") as f:
        return [d for d in map(json.loads, f) if d["split"] == split]


def load_documents(corpus, tokenizer, split, cache):
    """{domain: [ids, ...]}; encoded once, kept in the folder `cache`"""
    path = os.path.join(cache, f"{split}.pt")
    if not os.path.exists(path):
        encode = Tokenizer.from_file(tokenizer)
        lines = read_corpus(corpus, split)
        ids = encode.encode_batch([document_text(d) for d in lines], add_special_tokens=False)
        docs = collections.defaultdict(list)
        for d, e in zip(lines, ids):
            docs[d["domain"]].append(np.array(e.ids, np.int16))
        os.makedirs(cache, exist_ok=True)
        torch.save(dict(docs), path)
    return torch.load(path, weights_only=False)


def token_bytes(tokenizer):
    """[V] bytes of text in each token: a byte-level entry has a character a byte; added tokens have none."""
    spec = json.load(open(tokenizer, encoding="utf-8"))
    size = {i: len(s) for s, i in spec["model"]["vocab"].items()}
    size |= {t["id"]: 0 for t in spec["added_tokens"]}
    return torch.tensor([size[i] for i in range(len(size))])


class Rows:
    """Rows of ids for training: each row is cut from one domain's shuffled documents, end to end."""
    def __init__(self, docs, seed, mix=MIX):
        self.docs, self.rng = docs, np.random.default_rng(seed)
        self.names, self.share = list(mix), np.array(list(mix.values()))
        self.left = {name: np.zeros(0, np.int16) for name in mix}

    def row(self, name, length):
        while len(self.left[name]) < length:
            order = self.rng.permutation(len(self.docs[name]))
            self.left[name] = np.concatenate([self.left[name]] + [self.docs[name][i] for i in order])
        row, self.left[name] = self.left[name][:length], self.left[name][length:]
        return row

    def batch(self, rows, length):
        """-> [rows, length + 1]: inputs and, one to the right, targets"""
        names = self.rng.choice(self.names, rows, p=self.share / self.share.sum())
        return torch.from_numpy(np.stack([self.row(n, length + 1) for n in names])).long()
