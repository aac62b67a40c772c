#!/usr/bin/env python3
"""heldout.py CORPUS.jsonl.xz > heldout.jsonl: the text that bench/ measures on, from the corpus' heldout split.

50 prompts and 40 documents a domain (math, code, chat, story), drawn with a fixed seed. A line is {"domain", "source"}
and "prompt" (with "chat": 1 a question, else the beginning of a text) or "document" in the form in which the small
model was trained: questions and turns as chat, its first 4000 characters."""
import json, lzma, random, sys

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜></think>"


def document(d):
    if "text" in d: return BEGIN + d["text"] + END
    turns = d.get("turns") or [{"role": "user", "content": d["prompt"]}, {"role": "assistant", "content": d["response"]}]
    return BEGIN + "".join(USER + t["content"] + ASSISTANT if t["role"] == "user" else t["content"] + END for t in turns)


def prompt(d, rng):
    question = d.get("prompt") or (d["turns"][0]["content"] if "turns" in d else None)
    if question: return {"chat": 1, "prompt": question}
    return {"chat": 0, "prompt": BEGIN + d["text"][:rng.randrange(80, 400)]}


with lzma.open(sys.argv[1], "rt", encoding="utf-8") as f:
    heldout = [d for d in map(json.loads, f) if d["split"] == "heldout"]
rng = random.Random(0)
for domain in "math", "code", "chat", "story":
    lines = [d for d in heldout if d["domain"] == domain]
    rng.shuffle(lines)
    out = [(d, prompt(d, rng)) for d in lines[-50:]] + [(d, {"document": document(d)[:4000]}) for d in lines[:40]]
    for d, fields in out:
        print(json.dumps({"domain": domain, "source": d["source"]} | fields, ensure_ascii=False))
