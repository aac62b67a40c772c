"""Held-out figures of an exported model, quantized as it will run: bits a byte, and tau at temperature 0.

  python measure.py --model DIR --corpus corpus.jsonl.xz --run RUN [--documents 40] [--prompts 8]

tau is the mean of tokens committed a cycle with all drafts verified (accepted and one more), over text that
the target itself wrote greedily after held-out prompts."""
import argparse, os, random
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
import model as M
from checkpoint import load
from data import MIX, load_documents, token_bytes
from generate import prompts
from train_drafter import block_embeddings, draft_logits


@torch.no_grad()
def bits_a_byte(target, docs, size, sparse=True):
    """docs: list of ids -> bits for each byte of their text, the first token given"""
    nats = text = 0.
    for d in docs:
        ids = torch.from_numpy(d).long()
        hidden, _, _ = target(ids[None, :-1], sparse)
        nats += F.cross_entropy(target.logits(hidden), ids[1:], reduction="sum").item()
        text += size[ids[1:]].sum().item()
    return nats / text / 0.6931472


@torch.no_grad()
def continue_greedily(target, prompt, n):
    """The whole text again for each token: slow, and independent of any cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and ids[-1] != target.c.eos_token_id:
        hidden, _, _ = target(torch.tensor([ids]), sparse=True)
        ids.append(int(target.logits(hidden[-1:]).argmax()))
    return ids


@torch.no_grad()
def drafts(target, drafter, ids, p):
    """p [A] -> greedy drafts [A, K] for the text after ids[:p+2], whose last token is the anchor"""
    _, _, main = target(ids[None], sparse=True, taps=True)
    previous = ids[p + 1]
    x = drafter(drafter.window(main[None]), torch.zeros_like(p), p, block_embeddings(target, previous))
    out = []
    for i in range(x.shape[1]):
        logits, _ = draft_logits(drafter, target, x[:, i:i + 1], previous[:, None])
        previous = logits[:, 0].argmax(-1)
        out.append(previous)
    return torch.stack(out, 1)


def cycles(target, drafter, ids, n_prompt):
    """-> tokens committed in each cycle over ids[n_prompt:], which the target wrote greedily"""
    ids, K = torch.tensor(ids), target.c.dspark_block_size
    p = torch.arange(n_prompt - 1, len(ids) - K - 1)
    if len(p) == 0: return []
    right = drafts(target, drafter, ids, p) == ids[p[:, None] + 2 + torch.arange(K)]
    accepted, out, at = right.long().cumprod(-1).sum(-1).tolist(), [], 0
    while at < len(p):
        out.append(accepted[at] + 1)
        at += out[-1]
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--corpus", required=True)
    p.add_argument("--run", required=True, help="folder for encoded text")
    p.add_argument("--documents", type=int, default=40, help="a domain, for bits a byte")
    p.add_argument("--tokens", type=int, default=512, help="of a document, at most")
    p.add_argument("--prompts", type=int, default=8, help="a domain, for tau")
    p.add_argument("--answer", type=int, default=64, help="tokens of an answer, at most")
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    file = os.path.join(a.model, "tokenizer.json")
    target, drafter = load(a.model)
    M.quantize(target), M.quantize(drafter)
    size, tokenizer = token_bytes(file), Tokenizer.from_file(file)
    for name, docs in load_documents(a.corpus, file, "heldout", a.run).items():
        docs = [d[:a.tokens] for d in random.Random(0).sample(docs, min(a.documents, len(docs)))]
        print(f"{name}: {bits_a_byte(target, docs, size):.3f} bits a byte", flush=True)
    lengths = {name: [] for name in MIX}
    done = dict.fromkeys(MIX, 0)
    for name, text, _ in prompts(a.corpus, "heldout", random.Random(0)):
        if min(done.values()) >= a.prompts: break
        if done[name] >= a.prompts: continue
        done[name] += 1
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        lengths[name] += cycles(target, drafter, continue_greedily(target, prompt, a.answer), len(prompt))
    for name, n in lengths.items():
        print(f"{name}: tau {sum(n) / max(len(n), 1):.2f} over {len(n)} cycles", flush=True)


if __name__ == "__main__":
    main()
