#!/usr/bin/env python3
"""convert.py DIR CHECKPOINT OUT.gguf [--dspark]: a DeepSeek-V4 checkpoint, or with --dspark its drafter, for llama.cpp.

DIR is what build.sh built. llama.cpp's own converter does the work (FP8 becomes Q8_0, FP4 stays); only the
vocabulary is replaced, by 256 bytes and then <tN>, since it refuses a tokenizer whose hash it does not know.
Needs torch, safetensors, transformers and gguf's dependencies (numpy, pyyaml, tqdm)."""
import argparse, logging, sys
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
p.add_argument("dir", type=Path)
p.add_argument("checkpoint", type=Path)
p.add_argument("out", type=Path)
p.add_argument("--dspark", action="store_true")
a = p.parse_args()
source = a.dir / "src" / "vendor" / "llama.cpp"
sys.path[:0] = [str(source), str(source / "gguf-py")]
import gguf, torch
import conversion.deepseek as deepseek
from conversion import base     # noqa: F401, registers the models


def byte_tokens():
    """GPT-2's printable stand-in for each byte"""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b if b in plain else 256 + rest.index(b)) for b in range(256)]


def set_vocab(self):
    n, bos, eos = (self.hparams[k] for k in ("vocab_size", "bos_token_id", "eos_token_id"))
    names = byte_tokens() + [f"<t{i}>" for i in range(256, n)]
    names[256] = "\u0120t"
    kinds = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.USER_DEFINED] * (n - 257)
    kinds[bos] = kinds[eos] = gguf.TokenType.CONTROL
    w = self.gguf_writer
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("gpt-2")
    w.add_token_list(names), w.add_token_types(kinds), w.add_vocab_size(n)
    w.add_token_merges(["\u0120 t"])        # a list of none is refused
    w.add_bos_token_id(bos), w.add_eos_token_id(eos), w.add_add_bos_token(False)
    if a.dspark: w.add_mask_token_id(self.hparams["dspark_noise_token_id"])


logging.basicConfig(level=logging.WARNING)
model = deepseek.DeepseekV4DSparkModel if a.dspark else deepseek.DeepseekV4Model
model.set_vocab = set_vocab
with torch.inference_mode():
    model(a.checkpoint, gguf.LlamaFileType.MOSTLY_BF16, a.out, target_model_dir=a.checkpoint).write()
print(f"{a.out}: {a.out.stat().st_size / 1e6:.1f} MB")
