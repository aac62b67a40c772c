"""Let an exported model write, with the C engine, text to train its drafter on.

  python generate.py --model DIR --engine ./dspark --corpus corpus.jsonl.xz --out FILE --texts 1000

Prompts are questions and beginnings of the train split; every second text is drawn at temperature 0, the
others at 1. A line is {"ids": prompt and answer, "prompt_tokens", "domain", "temperature"}."""
import argparse, json, os, random, subprocess
from tokenizers import Tokenizer
from tqdm import tqdm
from data import BEGIN, MIX, prompt_text, read_corpus


def prompts(corpus, split, rng):
    """Endless (domain, prompt as text, engine arguments)"""
    lines = {name: [d for d in read_corpus(corpus, split) if d["domain"] == name] for name in MIX}
    while True:
        name = rng.choices(list(MIX), list(MIX.values()))[0]
        d = rng.choice(lines[name])
        question = d.get("prompt") or (d["turns"][0]["content"] if "turns" in d else None)
        if question: yield name, prompt_text(question), ["--chat", "-p", question]
        else:
            text = d["text"][:rng.randrange(80, 400)]
            yield name, BEGIN + text, ["-p", text]


def write(engine, model, arguments, n, temperature, seed):
    """-> the ids that the engine adds, or None where it failed"""
    command = [engine, "-m", model, "--plain", "--threads", "1", "--json",     # on a busy machine two threads wait
               "-n", str(n), "-t", str(temperature), "--seed", str(seed)]
    done = subprocess.run(command + arguments, capture_output=True)
    return json.loads(done.stdout.decode("utf-8", "replace"), strict=False)["tokens"] if done.returncode == 0 else None


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--engine", required=True, help="the driver that `make` builds")
    p.add_argument("--corpus", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--texts", type=int, required=True)
    p.add_argument("--tokens", type=int, default=200, help="of an answer, at most")
    p.add_argument("--seed", type=int, default=3)
    a = p.parse_args()
    rng, tokenizer = random.Random(a.seed), Tokenizer.from_file(os.path.join(a.model, "tokenizer.json"))
    source = prompts(a.corpus, "train", rng)
    with open(a.out, "w") as out:
        for i in tqdm(range(a.texts)):
            domain, text, arguments = next(source)
            answer = write(a.engine, a.model, arguments, a.tokens, i % 2, i)
            if answer is None: continue
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            out.write(json.dumps({"ids": ids + answer, "prompt_tokens": len(ids), "domain": domain,
                                  "temperature": i % 2}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
