"""DeepSeek-V4 with a DSpark drafter, to be trained: the released forward pass over batches, with the
quantization points switched on by `quantize(model)`. Parameters carry the checkpoint's names.

Shapes: B rows of T tokens (n = B*T), h hidden, C residual copies, H heads, D head_dim, R compressed rows,
A drafting anchors, K = block size, V vocabulary."""
import math
import torch
import torch.nn as nn
import torch.nn.functional as F
from formats import fp4_round, fp8_round, weight_round

CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "compress_ratios": [0, 0] + [4, 128] * 5 + [0], "compress_rope_theta": 160000,
    "dspark_block_size": 5, "dspark_markov_rank": 64, "dspark_noise_token_id": 4095,
    "dspark_target_layer_ids": [3, 7, 11], "eos_token_id": 1, "expert_dtype": "fp4", "hc_eps": 1e-06,
    "hc_mult": 4, "hc_sinkhorn_iters": 8, "head_dim": 128, "hidden_act": "silu", "hidden_size": 256,
    "index_head_dim": 64, "index_n_heads": 4, "index_topk": 32, "initializer_range": 0.02,
    "max_position_embeddings": 8192, "model_type": "deepseek_v4", "moe_intermediate_size": 128,
    "n_routed_experts": 8, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "num_hash_layers": 2, "num_hidden_layers": 12, "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1, "o_groups": 2, "o_lora_rank": 128, "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16,
                     "original_max_position_embeddings": 65536, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus",
    "sliding_window": 128, "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.57.1", "use_cache": True, "vocab_size": 4096,
}
CHUNK = 128      # queries that attend together


class Config:
    def __init__(self, values): self.__dict__.update(values)


# ---------------------------------------------------------------- small parts
class Product(torch.autograd.Function):
    """a @ b with operands rounded to bf16, there and back: twice as fast where the CPU has such products"""
    @staticmethod
    def forward(ctx, a, b):
        a, b = a.bfloat16(), b.bfloat16()
        ctx.save_for_backward(a, b)
        return (a @ b).float()

    @staticmethod
    def backward(ctx, g):
        (a, b), g = ctx.saved_tensors, g.bfloat16()
        return ((g @ b.mT).float() if ctx.needs_input_grad[0] else None,
                (a.mT @ g).float() if ctx.needs_input_grad[1] else None)


product = torch.matmul      # Product.apply for training


def linear(x, w):
    """x [..., k], w [out, k] -> [..., out]"""
    return product(x.flatten(0, -2), w.T).unflatten(0, x.shape[:-1])


class Linear(nn.Module):
    """kind fp8 or fp4: input and weight are quantized; bf16: only the weight is rounded."""
    def __init__(self, k, out, kind="fp8", gain=1.0, quantize_input=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, k) * gain * k ** -.5)
        self.kind, self.quantize_input, self.quantized = kind, quantize_input and kind != "bf16", False

    def values(self):
        return weight_round(self.weight, self.kind) if self.quantized else self.weight

    def forward(self, x):
        if self.quantized and self.quantize_input: x = fp8_round(x)
        return linear(x, self.values())


class Norm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x): return rms(x, self.eps) * self.weight


def rms(x, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def quantize(module, on=True):
    for m in module.modules():
        if hasattr(m, "quantized"): m.quantized = on


def rope_freqs(c, compressed):
    """[rope dims / 2] angles a position"""
    d, base = c.qk_rope_head_dim, c.compress_rope_theta if compressed else c.rope_theta
    i = torch.arange(d // 2, dtype=torch.float32)
    freqs = 1.0 / base ** (2 * i / d)
    if not compressed: return freqs
    y = c.rope_scaling
    turns = lambda beta: d * math.log(y["original_max_position_embeddings"] / (beta * 2 * math.pi)) / (2 * math.log(base))
    low, high = max(math.floor(turns(y["beta_fast"])), 0), min(math.ceil(turns(y["beta_slow"])), d - 1)
    ramp = ((i - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freqs * (1 - ramp) + freqs / y["factor"] * ramp


def rope(x, angle):
    """x [..., d] turns its last dims, adjacent pairs, by angle [..., r/2] (broadcast)"""
    r = 2 * angle.shape[-1]
    a, b = x[..., -r:].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-r], turned], -1)


def hadamard(d):
    m = torch.ones(1, 1)
    while len(m) < d:
        m = torch.cat([torch.cat([m, m], 1), torch.cat([m, -m], 1)])
    return m * d ** -.5


# ---------------------------------------------------------------- hyper-connections
def sinkhorn(comb, iters, eps):
    """comb [C, C, n]: rows j, columns k"""
    comb = comb.softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb


def hc_project(z, fn, eps):
    """z [n, C*h], fn [rows, C*h] -> [rows, n]"""
    return (fn @ z.T) * torch.rsqrt(z.square().mean(-1) + eps)


def hc_in(z, fn, scale, base, norm, C, iters, hc_eps, eps):
    """stream z [n, C*h] -> normed sub-layer input [n, h], post [C, n], comb [C, C, n]"""
    m = hc_project(z, fn, eps)
    pre = torch.sigmoid(m[:C] * scale[0] + base[:C, None]) + hc_eps
    post = 2 * torch.sigmoid(m[C:2 * C] * scale[1] + base[C:2 * C, None])
    comb = sinkhorn((m[2 * C:] * scale[2] + base[2 * C:, None]).unflatten(0, (C, C)), iters, hc_eps)
    copies = z.unflatten(1, (C, -1)).unbind(1)
    x = sum(pre[j][:, None] * copies[j] for j in range(C))
    return rms(x, eps) * norm, post, comb


def hc_out(z, y, post, comb, C):
    """new copy k = post_k y + sum_j comb_jk copy_j"""
    copies = z.unflatten(1, (C, -1)).unbind(1)
    new = [post[k][:, None] * y + sum(comb[j, k][:, None] * copies[j] for j in range(C)) for k in range(C)]
    return torch.cat(new, 1)


class HyperConnection(nn.Module):
    """One sub-layer's `hc_*`; copy `read` is the one it reads at first."""
    def __init__(self, c, read):
        super().__init__()
        C, self.c = c.hc_mult, c
        self.fn = nn.Parameter(torch.randn((2 + C) * C, C * c.hidden_size) * .02 * (C * c.hidden_size) ** -.5)
        self.scale = nn.Parameter(torch.ones(3))
        pre = torch.full((C,), -1.5)
        pre[read % C] = 1.5
        self.base = nn.Parameter(torch.cat([pre, torch.zeros(C), 3 * torch.eye(C).flatten()]))

    def enter(self, z, norm):
        c = self.c
        return hc_in(z, self.fn, self.scale, self.base, norm.weight, c.hc_mult, c.hc_sinkhorn_iters,
                     c.hc_eps, c.rms_norm_eps)


class HyperHead(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, C = c, c.hc_mult
        self.fn = nn.Parameter(torch.randn(C, C * c.hidden_size) * .02 * (C * c.hidden_size) ** -.5)
        self.scale, self.base = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((C,), -1.0))

    def forward(self, z):
        """[n, C*h] -> [n, h]"""
        m = hc_project(z, self.fn, self.c.rms_norm_eps)
        pre = torch.sigmoid(m * self.scale + self.base[:, None]) + self.c.hc_eps
        return sum(p[:, None] * copy for p, copy in zip(pre, z.unflatten(1, (self.c.hc_mult, -1)).unbind(1)))


# ---------------------------------------------------------------- attention
def attend(q, rows, bias, sink):
    """q [B, n, H, D] over rows [B, m, D] with bias [1 or B, n, m], sink [H] -> o [B, n, H, D], p [B, n, H, m]"""
    B, n, H, D = q.shape
    score = product(q.flatten(1, 2), rows.transpose(1, 2)).unflatten(1, (n, H)) * D ** -.5 + bias[:, :, None]
    top = torch.maximum(score.amax(-1, keepdim=True), sink[:, None]).detach()
    p = (score - top).clamp(min=-87).exp()                               # an exp that underflows is slow
    p = p / (p.sum(-1, keepdim=True) + (sink[:, None] - top).exp())      # the sink has no value
    return product(p.flatten(1, 2), rows).unflatten(1, (n, H)), p


class Compressor(nn.Module):
    def __init__(self, c, ratio, d):
        super().__init__()
        w = d * (2 if ratio == 4 else 1)
        self.ratio, self.quantized = ratio, False
        self.wkv, self.wgate = Linear(c.hidden_size, w, "bf16"), Linear(c.hidden_size, w, "bf16", .1)
        self.ape, self.norm = nn.Parameter(torch.zeros(ratio, w)), Norm(d, c.rms_norm_eps)

    def forward(self, x, freqs):
        """x [B, T, h] -> a row for each complete group [B, T // ratio, d], normed and turned, not rounded"""
        r, n = self.ratio, x.shape[1] // self.ratio
        x = x[:, :n * r]
        kv = self.wkv(x).unflatten(1, (n, r))                                  # [B, n, r, d or 2d]
        g = self.wgate(x).unflatten(1, (n, r)) + self.ape
        if r == 4:      # the first halves of the group before, the second halves of this one
            d = kv.shape[-1] // 2
            kv = torch.cat([F.pad(kv[:, :-1, :, :d], (0, 0, 0, 0, 1, 0)), kv[..., d:]], 2)
            g = torch.cat([F.pad(g[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=-1e30), g[..., d:]], 2)
        row = self.norm((g.softmax(2) * kv).sum(2))
        return rope(row, (torch.arange(n) * r)[:, None] * freqs)


class Indexer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.d, self.quantized = c.index_n_heads, c.index_head_dim, False
        self.wq_b = Linear(c.q_lora_rank, self.heads * self.d)
        self.weights_proj = Linear(c.hidden_size, self.heads, "bf16")
        self.compressor = Compressor(c, 4, self.d)
        self.register_buffer("hadamard", hadamard(self.d), persistent=False)

    def forward(self, x, qr, angle, freqs):
        """-> scores [B, T, R]"""
        q = rope(self.wq_b(qr).unflatten(-1, (self.heads, self.d)), angle[:, None]) @ self.hadamard
        k = self.compressor(x, freqs) @ self.hadamard
        if self.quantized: q, k = fp4_round(q), fp4_round(k)
        w = self.weights_proj(x) * (self.d * self.heads) ** -.5                # [B, T, heads]
        score = product(q.flatten(1, 2), k.transpose(1, 2)).unflatten(1, (-1, self.heads))
        return (F.relu(score) * w[..., None]).sum(2)


class Attention(nn.Module):
    def __init__(self, c, ratio):
        super().__init__()
        self.c, self.ratio, self.quantized = c, ratio, False
        H, D, h = c.num_attention_heads, c.head_dim, c.hidden_size
        self.attn_sink = nn.Parameter(torch.zeros(H))
        self.wq_a, self.q_norm = Linear(h, c.q_lora_rank), Norm(c.q_lora_rank, c.rms_norm_eps)
        self.wq_b = Linear(c.q_lora_rank, H * D)
        self.wkv, self.kv_norm = Linear(h, D), Norm(D, c.rms_norm_eps)
        self.wo_a = Linear(H * D // c.o_groups, c.o_groups * c.o_lora_rank, quantize_input=False)
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, h, gain=.1)
        if ratio: self.compressor = Compressor(c, ratio, D)
        if ratio == 4: self.indexer = Indexer(c)
        self.register_buffer("freqs", rope_freqs(c, ratio > 0), persistent=False)

    def round_row(self, kv):
        """FP8 in blocks of 64 on all but the rope dims"""
        r = self.c.qk_rope_head_dim
        return torch.cat([fp8_round(kv[..., :-r], 64), kv[..., -r:]], -1) if self.quantized else kv

    def kv_rows(self, x, angle):
        return self.round_row(rope(self.kv_norm(self.wkv(x)), angle))

    def queries(self, qr, angle):
        """qr [B, T, q_lora] -> [B, T, H, D]"""
        q = rms(self.wq_b(qr).unflatten(-1, (self.c.num_attention_heads, -1)), self.c.rms_norm_eps)
        return rope(q, angle.unsqueeze(-2))

    def project(self, o, angle):
        """o [B, T, H, D] -> [B, T, h]: the turn undone, then both output matrices"""
        o = rope(o, -angle.unsqueeze(-2)).flatten(2).unflatten(-1, (self.c.o_groups, -1))
        slices = self.wo_a.values().unflatten(0, (self.c.o_groups, -1))        # [G, rank, H*D/G]
        return self.wo_b(torch.cat([linear(o[:, :, g], s) for g, s in enumerate(slices)], -1))

    def forward(self, x, sparse):
        """x [B, T, h] -> out [B, T, h], index loss. sparse: attend only to the rows that the index picks."""
        T, W = x.shape[1], self.c.sliding_window
        t = torch.arange(T)
        angle = t[:, None] * self.freqs
        qr = self.q_norm(self.wq_a(x))
        q, rows = self.queries(qr, angle), self.kv_rows(x, angle)
        pooled, seen, index = self.pool(x, qr, angle, sparse) if self.ratio else (None, None, None)
        out, loss = [], 0.
        for a in range(0, T, CHUNK):
            b, first = min(a + CHUNK, T), max(0, a - W)
            here, keys = t[a:b, None], t[first:b]
            visible = ((keys <= here) & (keys > here - W))[None]
            r = b // self.ratio if self.ratio else 0                           # complete by the chunk's end
            chunk_rows = rows[:, first:b]
            if r:
                chunk_rows = torch.cat([chunk_rows, pooled[:, :r]], 1)
                visible = torch.cat([visible.expand(len(seen), -1, -1), seen[:, a:b, :r]], -1)
            bias = torch.where(visible, 0., -1e30)
            o, p = attend(q[:, a:b], chunk_rows, bias, self.attn_sink)
            out.append(o)
            if r and index is not None:
                loss = loss + index_loss(p[..., -r:].detach().sum(2), index[:, a:b, :r], seen[:, a:b, :r]) / x.shape[0] / T
        return self.project(torch.cat(out, 1), angle), loss

    def pool(self, x, qr, angle, sparse):
        """-> rows [B, R, D], seen [1 or B, T, R], index scores [B, T, R] or None"""
        pooled = self.round_row(self.compressor(x, self.freqs))
        t, R = torch.arange(x.shape[1]), pooled.shape[1]
        seen = (torch.arange(R) < ((t + 1) // self.ratio)[:, None])[None]
        if self.ratio != 4: return pooled, seen, None
        index = self.indexer(x.detach(), qr.detach(), angle, self.freqs)
        if sparse and R > self.c.index_topk:
            order = index.detach().masked_fill(~seen, -math.inf).sort(dim=-1, descending=True, stable=True)
            best = order.indices[..., :self.c.index_topk]               # among equals the lower row wins
            seen = seen & torch.zeros_like(index, dtype=torch.bool).scatter(2, best, True)
        return pooled, seen, index


def index_loss(p, index, seen):
    """KL from the attention that the rows get, p [B, n, r], to the index's softmax; summed over tokens"""
    has = seen.any(-1)
    log_q = index.masked_fill(~seen, -1e4).log_softmax(-1)
    p = p / (p.sum(-1, keepdim=True) + 1e-9)
    kl = torch.where(seen, p * ((p + 1e-9).log() - log_q), 0.).sum(-1)
    return torch.where(has, kl, 0.).sum()


# ---------------------------------------------------------------- experts
class Permute(torch.autograd.Function):
    """Rows reordered; the gradient goes back by the inverse order."""
    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, g): return g.index_select(0, ctx.saved_tensors[0]), None, None


class Gate(nn.Module):
    def __init__(self, c, hashed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c.n_routed_experts, c.hidden_size) * .5 * c.hidden_size ** -.5)
        self.quantized = False
        if hashed:
            order = torch.rand(c.vocab_size, c.n_routed_experts).argsort(-1)
            self.register_buffer("tid2eid", order[:, :c.num_experts_per_tok].contiguous())
        else:
            self.register_buffer("bias", torch.zeros(c.n_routed_experts))

    def forward(self, x):
        return F.linear(x, weight_round(self.weight, "bf16") if self.quantized else self.weight)


class Expert(nn.Module):
    def __init__(self, c, width, kind):
        super().__init__()
        self.limit = c.swiglu_limit
        self.w1, self.w3 = Linear(c.hidden_size, width, kind), Linear(c.hidden_size, width, kind)
        self.w2 = Linear(width, c.hidden_size, kind, .1)

    def forward(self, x, weight=None):
        y = F.silu(self.w1(x).clamp(max=self.limit)) * self.w3(x).clamp(-self.limit, self.limit)
        return self.w2(y if weight is None else weight * y)


class Experts(nn.Module):
    def __init__(self, c, hashed):
        super().__init__()
        self.c, self.gate = c, Gate(c, hashed)
        self.experts = nn.ModuleList(Expert(c, c.moe_intermediate_size, c.expert_dtype) for _ in range(c.n_routed_experts))
        self.shared_experts = Expert(c, c.moe_intermediate_size * c.n_shared_experts, "fp8")
        self.load = torch.zeros(c.n_routed_experts)      # tokens to each expert since the last balance()

    def route(self, x, ids):
        """x [n, h] -> chosen [n, k], weights [n, k]"""
        scores = F.softplus(self.gate(x)).sqrt()
        if hasattr(self.gate, "tid2eid"): chosen = self.gate.tid2eid[ids]
        else: chosen = (scores.detach() + self.gate.bias).topk(self.c.num_experts_per_tok, -1).indices
        w = scores.gather(-1, chosen)
        return chosen, w / w.sum(-1, keepdim=True) * self.c.routed_scaling_factor

    def forward(self, x, ids):
        """x [n, h], ids [n] -> [n, h]"""
        chosen, weight = self.route(x, ids)
        k, order = chosen.shape[1], chosen.flatten().argsort()
        inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        self.load += counts
        repeated = x[:, None].expand(-1, k, -1).reshape(-1, x.shape[1])
        xs = Permute.apply(repeated, order, inverse).split(counts.tolist())
        ws = Permute.apply(weight.reshape(-1, 1), order, inverse).split(counts.tolist())
        y = torch.cat([e(xi, wi) for e, xi, wi in zip(self.experts, xs, ws)])
        return self.shared_experts(x) + Permute.apply(y, inverse, order).unflatten(0, (-1, k)).sum(1)

    def balance(self, rate):
        """Experts with more than their share become less likely picks, and the other way round."""
        if hasattr(self.gate, "bias"): self.gate.bias += rate * (self.load.mean() - self.load).sign()
        self.load.zero_()


# ---------------------------------------------------------------- target and drafter
class Block(nn.Module):
    def __init__(self, c, layer, ratio, hashed=False):
        super().__init__()
        self.c = c
        self.attn, self.ffn = Attention(c, ratio), Experts(c, hashed)
        self.attn_norm, self.ffn_norm = Norm(c.hidden_size, c.rms_norm_eps), Norm(c.hidden_size, c.rms_norm_eps)
        self.hc_attn, self.hc_ffn = HyperConnection(c, 2 * layer), HyperConnection(c, 2 * layer + 1)

    def around(self, hc, norm, z, sublayer):
        """z [n, C*h] -> the same, around a sub-layer [n, h] -> ([n, h], extra)"""
        x, post, comb = hc.enter(z, norm)
        y, extra = sublayer(x)
        return hc_out(z, y, post, comb, self.c.hc_mult), extra

    def forward(self, z, attention, ids):
        """attention: [n, h] -> ([n, h], index loss)"""
        z, loss = self.around(self.hc_attn, self.attn_norm, z, attention)
        z, _ = self.around(self.hc_ffn, self.ffn_norm, z, lambda x: (self.ffn(x, ids), None))
        return z, loss


class Embedding(nn.Module):
    def __init__(self, rows, width, std):
        super().__init__()
        self.weight, self.quantized = nn.Parameter(torch.randn(rows, width) * std), False

    def values(self):
        return weight_round(self.weight, "bf16") if self.quantized else self.weight

    def forward(self, ids): return F.embedding(ids, self.values())


class Target(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed = Embedding(c.vocab_size, c.hidden_size, .5)
        self.layers = nn.ModuleList(Block(c, l, c.compress_ratios[l], l < c.num_hash_layers)
                                    for l in range(c.num_hidden_layers))
        self.hc_head, self.norm = HyperHead(c), Norm(c.hidden_size, c.rms_norm_eps)
        self.head = Embedding(c.vocab_size, c.hidden_size, .02)

    def forward(self, ids, sparse=False, taps=False):
        """ids [B, T] -> final normed hidden [n, h], index loss, main_hidden [n, taps*h] or None"""
        (B, T), c, loss, main = ids.shape, self.c, 0., []
        flat = ids.flatten()
        z = self.embed(flat).repeat(1, c.hc_mult)
        for l, block in enumerate(self.layers):
            def attention(x):
                y, extra = block.attn(x.unflatten(0, (B, T)), sparse)
                return y.flatten(0, 1), extra
            z, extra = block(z, attention, flat)
            loss = loss + extra
            if taps and l in c.dspark_target_layer_ids: main.append(z.unflatten(1, (c.hc_mult, -1)).mean(1))
        return self.norm(self.hc_head(z)), loss, torch.cat(main, -1) if taps else None

    def logits(self, hidden): return linear(hidden, self.head.values())


class Markov(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.markov_w1 = Embedding(c.vocab_size, c.dspark_markov_rank, .1)
        self.markov_w2 = Embedding(c.vocab_size, c.dspark_markov_rank, .1)


class Confidence(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.proj = Linear(c.hidden_size + c.dspark_markov_rank, 1, "bf16", .1)


class Drafter(Block):
    """The only stage, mtp.0. The embedding and the head are the target's."""
    def __init__(self, c):
        super().__init__(c, 0, 0)
        h = c.hidden_size
        self.main_proj, self.main_norm = Linear(len(c.dspark_target_layer_ids) * h, h), Norm(h, c.rms_norm_eps)
        self.hc_head, self.norm = HyperHead(c), Norm(h, c.rms_norm_eps)
        self.markov_head = Markov(c) if c.dspark_markov_rank else None      # rank 0: DFlash
        self.confidence_head = Confidence(c)

    def window(self, main_hidden):
        """main_hidden [B, T, taps*h] -> rows [B, T, D]"""
        t = torch.arange(main_hidden.shape[1])
        return self.attn.kv_rows(self.main_norm(self.main_proj(main_hidden)), t[:, None] * self.attn.freqs)

    def forward(self, rows, where, p, first):
        """rows [B, T, D]; where, p [A]: the batch row and the last position that the target has run on;
        first [A, K, h]: embeddings of anchor and noise -> x [A, K, h], before the norm"""
        A, K, W = len(p), first.shape[1], self.c.sliding_window
        back = p[:, None] - torch.arange(W - 1, -1, -1)                        # [A, W]: p-W+1 .. p
        context = rows[where[:, None], back.clamp(min=0)]                      # [A, W, D]
        bias = F.pad(torch.where(back >= 0, 0., -1e30), (0, K))[:, None].expand(A, K, W + K)
        angle = (p[:, None] + 1 + torch.arange(K))[..., None] * self.attn.freqs    # [A, K, r/2]

        def attention(x):
            x = x.unflatten(0, (A, K))
            q = self.attn.queries(self.attn.q_norm(self.attn.wq_a(x)), angle)
            both = torch.cat([context, self.attn.kv_rows(x, angle)], 1)
            o, _ = attend(q, both, bias, self.attn.attn_sink)
            return self.attn.project(o, angle).flatten(0, 1), None

        z, _ = super().forward(first.flatten(0, 1).repeat(1, self.c.hc_mult), attention, None)
        return self.hc_head(z).unflatten(0, (A, K))
