"""Muon for the matrices, AdamW for the rest, both stepped as one."""
import collections
import torch

# Polar Express coefficients: each line one iteration of a x + b x^3 + c x^5 on the singular values
POLAR = [(8.2873, -23.5959, 17.3004), (4.1070, -2.9478, .5448), (3.9487, -2.9089, .5518), (3.3184, -2.4885, .5100)]


def orthogonal(g):
    """g [k, m, n], m <= n -> about U V^T of each; bf16 is exact enough"""
    x = (g / (g.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)).bfloat16()
    for a, b, c in POLAR:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.float()


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = collections.defaultdict(list)
            for p in group["params"]:
                if p.grad is not None: shapes[p.shape].append(p)
            for shape, params in shapes.items():
                self.step_shape(params, shape, group["lr"], group["momentum"])

    def step_shape(self, params, shape, lr, momentum):
        updates = []
        for p in params:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            m.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(m, momentum))
        u = torch.stack(updates)
        u = orthogonal(u.mT).mT if shape[0] > shape[1] else orthogonal(u)
        for p, update in zip(params, u):
            p.add_(update, alpha=-lr * max(1, shape[0] / shape[1]) ** .5)


def is_matrix(name, p):
    """What Muon takes: the linears inside the blocks"""
    return p.dim() == 2 and min(p.shape) >= 64 and not any(s in name for s in ("embed", "head.", "markov", "hc_", ".ape"))


def is_output(name):
    """What writes to the residual stream, where all layers' steps add up"""
    return name.endswith(("wo_b.weight", "w2.weight"))


def adam_share(name):
    """Rows that sum over many inputs take smaller steps."""
    if name.endswith(".fn"): return .03
    return .3 if any(s in name for s in ("gate.weight", "head.weight", "weights_proj", "proj.weight")) else 1.


def is_embedding(name): return name.startswith("embed") or "markov" in name


class Both:
    def __init__(self, model, muon_lr, adam_lr, embed_lr):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = collections.defaultdict(list)
        for n, p in named:
            if not is_matrix(n, p): groups[embed_lr if is_embedding(n) else adam_lr * adam_share(n)].append(p)
        inner, outer = ([p for n, p in named if is_matrix(n, p) and is_output(n) == out] for out in (False, True))
        self.parts = [Muon([{"params": inner, "lr": muon_lr}, {"params": outer, "lr": .2 * muon_lr}], muon_lr),
                      torch.optim.AdamW([{"params": ps, "lr": lr} for lr, ps in groups.items()],
                                        betas=(.9, .99), eps=1e-10, weight_decay=0., fused=True)]
        self.peak = [[g["lr"] for g in o.param_groups] for o in self.parts]

    def step(self, factor):
        """factor: share of the peak rates"""
        for o, peaks in zip(self.parts, self.peak):
            for g, peak in zip(o.param_groups, peaks): g["lr"] = peak * factor
            o.step()
            o.zero_grad(set_to_none=True)

    def state_dict(self): return [o.state_dict() for o in self.parts]

    def load_state_dict(self, states):
        for o, s in zip(self.parts, states): o.load_state_dict(s)
