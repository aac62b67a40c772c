"""Train the target model for a given number of minutes.

  python train_target.py --corpus corpus.jsonl.xz --tokenizer tokenizer.json --run RUN --minutes 70

Three phases by elapsed time: short rows without quantization, short rows quantized, long rows quantized
and attending only to what the index picks. The learning rate falls to zero at the end. A stopped run
goes on from RUN/target.pt; `--init DIR` starts from an exported model instead of random weights."""
import argparse, os, time
import torch
import torch._inductor.config
import torch.nn.functional as F
from tqdm import tqdm
import bigrams
import cores
import model as M
from checkpoint import load
from data import Rows, load_documents
from optim import Both

BALANCE = .002     # step of the router's bias
WARM_UP = 40       # steps


def compile_parts():
    """The elementwise work, which costs as much as the products do when run piece by piece; products in bf16"""
    torch._inductor.config.cpp.dynamic_threads = True
    M.product = M.Product.apply
    M.hc_in, M.hc_out = (torch.compile(f, dynamic=False) for f in (M.hc_in, M.hc_out))


def start_from_bigrams(target, docs, steps):
    unit = lambda w: M.rms(w, 1e-6)
    embed = target.embed.weight
    bigrams.fit(bigrams.counts(docs, target.c.vocab_size), embed, target.head.weight, steps, unit)
    with torch.no_grad(): embed.copy_(unit(embed))


def phase(done):
    """Share of the time that is gone -> quantized, rows, length"""
    if done < .88: return False, 8, 256
    if done < .94: return True, 8, 256
    return True, 2, 1024


def step_loss(target, ids, sparse):
    hidden, index_loss, _ = target(ids[:, :-1], sparse)
    return F.cross_entropy(target.logits(hidden), ids[:, 1:].flatten()), index_loss


class Run:
    def __init__(self, a):
        self.path, self.seconds, self.threads = os.path.join(a.run, "target.pt"), a.minutes * 60, a.threads
        docs = load_documents(a.corpus, a.tokenizer, "train", a.run)
        self.rows, self.steps, self.tokens, self.elapsed = Rows(docs, a.seed), 0, 0, 0.
        self.target = load(a.init)[0] if a.init else M.Target(M.Config(M.CONFIG))
        if os.path.exists(self.path): self.resume(a)
        else:
            if not a.init: start_from_bigrams(self.target, docs, a.bigram_steps)
            self.optimizer = Both(self.target, a.muon_lr, a.adam_lr, a.embed_lr)
        self.started = time.time() - self.elapsed

    def resume(self, a):
        saved = torch.load(self.path, weights_only=False)
        self.target.load_state_dict(saved["target"])
        self.optimizer = Both(self.target, a.muon_lr, a.adam_lr, a.embed_lr)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.steps, self.tokens, self.elapsed, self.rows = (saved[k] for k in ("steps", "tokens", "elapsed", "rows"))

    def save(self):
        state = {"target": self.target.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps,
                 "tokens": self.tokens, "elapsed": time.time() - self.started, "rows": self.rows}
        torch.save(state, self.path + ".new")
        os.replace(self.path + ".new", self.path)

    def step(self, done):
        cores.take_free(self.threads)
        quantized, rows, length = phase(done)
        M.quantize(self.target, quantized)
        loss, index_loss = step_loss(self.target, self.rows.batch(rows, length), sparse=quantized)
        (loss + index_loss).backward()
        self.optimizer.step(min(1, (self.steps + 1) / WARM_UP) * (1 - done))
        for block in self.target.layers: block.ffn.balance(BALANCE)
        self.steps, self.tokens = self.steps + 1, self.tokens + rows * length
        return loss.item(), float(index_loss)

    def train(self):
        bar, saved, mean = tqdm(total=round(self.seconds), unit="s"), time.time(), None
        while (elapsed := time.time() - self.started) < self.seconds:
            loss, index_loss = self.step(elapsed / self.seconds)
            mean = loss if mean is None else mean + .05 * (loss - mean)
            bar.update(round(time.time() - self.started) - bar.n)
            bar.set_postfix_str(f"step {self.steps} tokens {self.tokens} loss {mean:.3f} index {index_loss:.2f}")
            if time.time() - saved > 300:
                self.save()
                saved = time.time()
        self.save()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--corpus", required=True)
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--run", required=True, help="folder for encoded text and checkpoints")
    p.add_argument("--minutes", type=float, required=True)
    p.add_argument("--init", help="exported model to start from")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--muon-lr", type=float, default=.008)
    p.add_argument("--adam-lr", type=float, default=1e-3)
    p.add_argument("--embed-lr", type=float, default=2e-3)
    p.add_argument("--bigram-steps", type=int, default=100)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    cores.keep_memory()
    compile_parts()
    Run(a).train()


if __name__ == "__main__":
    main()
