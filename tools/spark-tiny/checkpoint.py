"""To and from the released format: safetensors by hand, since a library may not know F8_E8M0."""
import json, os, shutil, struct
import torch
from formats import fp4_pack, fp8_pack, unpack
from model import Config, Drafter, Linear, Target

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "I64": torch.int64,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
NAMES = {v: k for k, v in DTYPES.items()}
GENERATION = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True,
              "temperature": 1.0, "top_p": 1.0, "transformers_version": "4.57.1"}


def save_tensors(path, tensors):
    header, offset, blobs = {"__metadata__": {"format": "pt"}}, 0, []
    for name, t in tensors.items():
        blob = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def load_tensors(path):
    data = bytearray(open(path, "rb").read())
    n, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])
    header.pop("__metadata__", None)
    out = {}
    for name, h in header.items():
        a, b = (8 + n + o for o in h["data_offsets"])
        out[name] = torch.frombuffer(data[a:b], dtype=torch.uint8).view(DTYPES[h["dtype"]]).reshape(h["shape"])
    return out


def official(name):
    """A parameter's name in the file: `hc_attn.fn` is stored as `hc_attn_fn`."""
    for hc in ("hc_attn.", "hc_ffn.", "hc_head."):
        name = name.replace(hc, hc[:-1] + "_")
    return name


def is_f32(name):
    return any(s in name for s in (".fn", ".scale", ".base", "attn_sink", "gate.bias", ".ape"))


def tensors(model, prefix=""):
    """A model's tensors as the file stores them"""
    kinds = {n + ".weight": m.kind for n, m in model.named_modules() if isinstance(m, Linear)}
    out = {}
    for name, t in model.state_dict().items():
        kind, full = kinds.get(name, "bf16"), prefix + official(name)
        if kind != "bf16":
            pack = fp4_pack if kind == "fp4" else fp8_pack
            out[full], out[full.removesuffix("weight") + "scale"] = pack(t.float())
        elif t.dtype == torch.int64 or is_f32(name): out[full] = t
        else: out[full] = t.bfloat16()
    return out


def export(folder, target, drafter, tokenizer):
    os.makedirs(folder, exist_ok=True)
    write = lambda name, v: open(os.path.join(folder, name), "w").write(json.dumps(v, indent=1, sort_keys=True) + "\n")
    write("config.json", target.c.__dict__)
    write("generation_config.json", GENERATION)
    both = tensors(target) | tensors(drafter, "mtp.0.")
    save_tensors(os.path.join(folder, "model.safetensors"), dict(sorted(both.items())))
    copy = os.path.join(folder, "tokenizer.json")
    if os.path.realpath(tokenizer) != os.path.realpath(copy): shutil.copyfile(tokenizer, copy)


def fill(model, stored, prefix=""):
    """Load a model's state from the file's tensors."""
    state = {}
    for name, t in model.state_dict().items():
        full = prefix + official(name)
        scale = stored.get(full.removesuffix("weight") + "scale") if name.endswith("weight") else None
        value = stored[full] if scale is None else unpack(stored[full], scale)
        state[name] = value.to(t.dtype)
    model.load_state_dict(state)


def load(folder):
    """-> target, drafter"""
    c = Config(json.load(open(os.path.join(folder, "config.json"))))
    stored = load_tensors(os.path.join(folder, "model.safetensors"))
    target, drafter = Target(c), Drafter(c)
    fill(target, stored)
    fill(drafter, stored, "mtp.0.")
    return target, drafter
