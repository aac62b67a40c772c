"""Write a trained target as a checkpoint in the released format; its drafter is still random.

  python export.py --run RUN --tokenizer tokenizer.json --out DIR"""
import argparse, os
import torch
import model as M
from checkpoint import export


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", required=True)
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--out", required=True)
    a = p.parse_args()
    torch.manual_seed(0)
    saved = torch.load(os.path.join(a.run, "target.pt"), weights_only=False)
    c = M.Config(M.CONFIG)
    target = M.Target(c)
    target.load_state_dict(saved["target"])
    export(a.out, target, M.Drafter(c), a.tokenizer)
    print(f"{a.out}: after {saved['tokens']} tokens, {saved['steps']} steps, {saved['elapsed'] / 60:.0f} minutes")


if __name__ == "__main__":
    main()
