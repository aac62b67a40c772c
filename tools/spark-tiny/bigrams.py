"""The best model of "what follows this token" of a given width: where embedding, head and Markov head start.
It costs a minute and sees the whole corpus."""
import torch
from tqdm import tqdm


def counts(docs, vocab):
    """{domain: [ids, ...]} -> [V, V]"""
    pairs = torch.zeros(vocab * vocab)
    for d in (d for part in docs.values() for d in part):
        ids = torch.from_numpy(d).long()
        pairs.index_add_(0, ids[:-1] * vocab + ids[1:], torch.ones(len(ids) - 1))
    return pairs.view(vocab, vocab)


def fit(pairs, first, second, steps, rows=lambda w: w, lr=2e-2):
    """Fit second @ rows(first) to the log of pairs' row shares; first, second [V, width] parameters."""
    total, out = pairs.sum(), pairs.sum(1)
    optimizer = torch.optim.Adam([first, second], lr)
    for step in tqdm(range(steps), desc="bigrams"):
        for g in optimizer.param_groups: g["lr"] = lr * (1 - step / steps)
        logits = rows(first) @ second.T
        loss = (out @ logits.logsumexp(1) - (pairs * logits).sum()) / total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"bigram loss {loss.item():.3f} nats a token")
