#!/usr/bin/env python3
"""heldout.py CORPUS.jsonl.xz > heldout.jsonl: the text that bench/ measures on, from the corpus' heldout split.

50 prompts and 40 documents a domain (math, code, chat, story), drawn with a fixed seed. A line is {"domain", "source"}
and "prompt" (with "chat": 1 a question, else the beginning of a text) or "document" in the form in which the small
model was trained: questions and turns as chat, its first 4000 characters.

heldout.py CORPUS.jsonl.xz SPLIT N: for tools/calibrate, up to N prompts a domain: turns that are asked for, answers
begun, places in a text."""
import json, lzma, random, sys

DOMAINS = "math", "code", "chat", "story"
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜></think>"


def turns(d):
    return d.get("turns") or [{"role": "user", "content": d["prompt"]}, {"role": "assistant", "content": d["response"]}]


def spoken(turns):
    return BEGIN + "".join(USER + t["content"] + ASSISTANT if t["role"] == "user" else t["content"] + END
                           for t in turns)


def document(d): return BEGIN + d["text"] + END if "text" in d else spoken(turns(d))


def prompt(d, rng):
    question = d.get("prompt") or (d["turns"][0]["content"] if "turns" in d else None)
    if question: return {"chat": 1, "prompt": question}
    return {"chat": 0, "prompt": BEGIN + d["text"][:rng.randrange(80, 400)]}


def places(d, rng):
    """Texts that the model may be asked to continue: up to each user turn, each answer begun in three places; a text in
    sixteen"""
    if "text" in d:
        starts = [rng.randrange(max(1, len(d["text"]) - 400)) for _ in range(16)]
        return [BEGIN + d["text"][start:start + rng.randrange(80, 400)] for start in starts]
    out = []
    for i, t in enumerate(turns(d)):
        before, said = spoken(turns(d)[:i]), t["content"]
        if t["role"] == "user": out.append(spoken(turns(d)[:i + 1]))
        else: out += [before + said[:rng.randrange(1, len(said))] for _ in range(3) if len(said) > 1]
    return out


def bench(lines, rng):
    out = [(d, prompt(d, rng)) for d in lines[-50:]]
    return out + [(d, {"document": document(d)[:4000]}) for d in lines[:40]]


def calibration(lines, rng, n):
    out = [(d, {"chat": 0, "prompt": text}) for d in lines for text in places(d, rng) if len(text) < 4000]
    rng.shuffle(out)
    return out[:n]


def main(corpus, split="heldout", n=0):
    with lzma.open(corpus, "rt", encoding="utf-8") as f: docs = [d for d in map(json.loads, f) if d["split"] == split]
    rng = random.Random(0)
    for domain in DOMAINS:
        lines = [d for d in docs if d["domain"] == domain]
        rng.shuffle(lines)
        for d, fields in calibration(lines, rng, int(n)) if n else bench(lines, rng):
            print(json.dumps({"domain": domain, "source": d["source"]} | fields, ensure_ascii=False))


main(*sys.argv[1:])
