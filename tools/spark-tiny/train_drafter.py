"""Train the drafter of an exported model; its target stays as it is.

  python train_drafter.py --model DIR --corpus corpus.jsonl.xz --run RUN --minutes 30 [--generated FILE]
      [--markov-rank 0]

The target runs once over the text and what the drafter needs of it is kept; logits are recomputed. A
generated file (see generate.py) gives half of the text. Loss of draft k, weighed exp(-(k-1)/K):
.1 cross-entropy with the text + .9 total variation from the target + 1.0 confidence. A stopped run goes
on from RUN/drafter.pt; DIR is rewritten at the end."""
import argparse, json, os, time
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
import bigrams
import cores
import model as M
from checkpoint import export, load
from data import Rows, load_documents
from optim import Both

ROWS, ANCHORS = 8, 32      # a step: rows of cached text, anchors in each


def load_generated(path):
    """JSON lines with `ids` -> {"generated": [ids, ...]}"""
    return {"generated": [np.array(json.loads(line)["ids"], np.int16) for line in open(path)]}


@torch.no_grad()
def run_target(target, ids):
    """ids [B, T+1] -> what a step needs: ids, taps [B, T, taps*h] and final hidden [B, T, h], in bf16"""
    hidden, _, main = target(ids[:, :-1], sparse=True, taps=True)
    shape = (ids.shape[0], -1)
    return {"ids": ids, "main": main.bfloat16().unflatten(0, shape), "hidden": hidden.bfloat16().unflatten(0, shape)}


def build_cache(target, sources, batches, length, threads):
    """Batches of ROWS rows, taken from the sources in turn"""
    cache = []
    for i in tqdm(range(batches), desc="target"):
        cores.take_free(threads)
        cache.append(run_target(target, sources[i % len(sources)].batch(ROWS, length)))
    return cache


def draft_logits(drafter, target, x, previous):
    """x [A, K, h], previous [A, K]: the token before each draft -> logits [A, K, V], confidence logits [A, K]"""
    logits, seen = target.logits(drafter.norm(x)), x
    if drafter.markov_head:
        e = drafter.markov_head.markov_w1(previous)                            # [A, K, rank]
        logits, seen = logits + F.linear(e, drafter.markov_head.markov_w2.values()), torch.cat([x, e], -1)
    return logits, drafter.confidence_head.proj(seen)[..., 0]


def block_embeddings(target, anchors):
    """anchors [A] -> [A, K, h]: the anchor, then noise"""
    c = target.c
    ids = torch.full((len(anchors), c.dspark_block_size), c.dspark_noise_token_id)
    ids[:, 0] = anchors
    return target.embed(ids)


def draft_loss(drafter, target, item, where, p):
    """where, p [A]: batch row and last position run -> loss, acceptance of each draft [K]"""
    K = target.c.dspark_block_size
    with torch.no_grad():
        at = p[:, None] + 1 + torch.arange(K)                                  # [A, K]: x_1's position - 1, ...
        previous, label = item["ids"][where[:, None], at], item["ids"][where[:, None], at + 1]
        truth = target.logits(item["hidden"][where[:, None], at].float()).softmax(-1)      # [A, K, V]
        first = block_embeddings(target, previous[:, 0])
    x = drafter(drafter.window(item["main"].float()), where, p, first)
    logits, confidence = draft_logits(drafter, target, x, previous)
    log_p = logits.log_softmax(-1)
    tv = .5 * (log_p.exp() - truth).abs().sum(-1)                              # [A, K]
    ce = -log_p.gather(-1, label[..., None])[..., 0]
    bce = F.binary_cross_entropy_with_logits(confidence, 1 - tv.detach(), reduction="none")
    weight = torch.exp(-torch.arange(K) / K)
    return ((.1 * ce + .9 * tv + bce) * weight).sum(-1).mean() / weight.sum(), 1 - tv.detach().mean(0)


def start(drafter, target, pairs, steps):
    """Its context starts as the last tap, its experts as the last layer's, its Markov head as bigrams."""
    h = target.c.hidden_size
    with torch.no_grad():
        drafter.main_proj.weight[:, -h:] += torch.eye(h)
        drafter.ffn.load_state_dict(target.layers[-1].ffn.state_dict())
        drafter.attn.load_state_dict(target.layers[1].attn.state_dict())
        drafter.hc_head.load_state_dict(target.hc_head.state_dict())
        drafter.norm.load_state_dict(target.norm.state_dict())
    if drafter.markov_head:
        bigrams.fit(pairs, drafter.markov_head.markov_w1.weight, drafter.markov_head.markov_w2.weight, steps)


class Run:
    def __init__(self, a):
        self.path, self.threads = os.path.join(a.run, "drafter.pt"), a.threads
        self.unit, self.length = ("steps", a.steps) if a.steps else ("s", a.minutes * 60)
        self.tokenizer = os.path.join(a.model, "tokenizer.json")
        self.target, self.drafter = load(a.model)
        if a.markov_rank is not None:
            self.target.c.dspark_markov_rank = a.markov_rank
            self.drafter = M.Drafter(self.target.c)
        self.target.requires_grad_(False)
        M.quantize(self.target)
        docs = load_documents(a.corpus, self.tokenizer, "train", a.run)
        self.sources = [Rows(docs, a.seed)]
        if a.generated:
            self.sources.append(Rows(load_generated(a.generated), a.seed, {"generated": 1}))
        saved = torch.load(self.path, weights_only=False) if os.path.exists(self.path) else None
        if saved: self.drafter.load_state_dict(saved["drafter"])
        elif not a.keep:
            self.drafter = M.Drafter(self.target.c)
            start(self.drafter, self.target, bigrams.counts(docs, self.target.c.vocab_size), a.bigram_steps)
        M.quantize(self.drafter)
        self.optimizer = Both(self.drafter, a.muon_lr, a.adam_lr, a.embed_lr)
        if saved: self.optimizer.load_state_dict(saved["optimizer"])
        self.steps, self.elapsed = (saved["steps"], saved["elapsed"]) if saved else (0, 0.)
        self.cache = build_cache(self.target, self.sources, a.batches, a.length, a.threads)
        self.started = time.time() - self.elapsed

    def save(self):
        torch.save({"drafter": self.drafter.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "steps": self.steps, "elapsed": time.time() - self.started}, self.path + ".new")
        os.replace(self.path + ".new", self.path)

    def step(self, done):
        cores.take_free(self.threads)
        item = self.cache[torch.randint(len(self.cache), ()).item()]
        where = torch.arange(ROWS).repeat_interleave(ANCHORS)
        p = torch.randint(item["ids"].shape[1] - self.target.c.dspark_block_size - 1, where.shape)
        loss, accepted = draft_loss(self.drafter, self.target, item, where, p)
        loss.backward()
        self.optimizer.step(min(1, (self.steps + 1) / 20) * (1 - done))
        self.drafter.ffn.balance(.002)
        self.steps += 1
        return accepted

    def spent(self):
        return self.steps if self.unit == "steps" else time.time() - self.started

    def train(self):
        bar, saved, mean = tqdm(total=round(self.length), unit=self.unit), time.time(), None
        while (done := self.spent() / self.length) < 1:
            accepted = self.step(done)
            mean = accepted if mean is None else mean + .05 * (accepted - mean)
            bar.update(round(self.spent()) - bar.n)
            bar.set_postfix_str(f"step {self.steps} accepted " + " ".join(f"{v:.3f}" for v in mean.tolist()))
            if time.time() - saved > 300:
                self.save()
                saved = time.time()
        self.save()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--corpus", required=True)
    p.add_argument("--run", required=True, help="folder for encoded text and checkpoints")
    length = p.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of training, after the target has run")
    length.add_argument("--steps", type=int, help="of training, where the time is not to matter")
    p.add_argument("--generated", help="text by the target itself, JSON lines")
    p.add_argument("--keep", action="store_true", help="go on from the drafter in --model")
    p.add_argument("--markov-rank", type=int, help="start anew with this rank; 0: no Markov head (DFlash)")
    p.add_argument("--batches", type=int, default=120, help="of 8 rows, kept in memory")
    p.add_argument("--length", type=int, default=320)
    p.add_argument("--seed", type=int, default=2)
    p.add_argument("--muon-lr", type=float, default=.01)
    p.add_argument("--adam-lr", type=float, default=3e-3)
    p.add_argument("--embed-lr", type=float, default=3e-3)
    p.add_argument("--bigram-steps", type=int, default=60)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    run = Run(a)
    run.train()
    export(a.model, run.target, run.drafter, run.tokenizer)


if __name__ == "__main__":
    main()
