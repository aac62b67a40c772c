"""The number formats of a DeepSeek-V4 checkpoint: FP8 (E4M3) and FP4 (E2M1) with power-of-two scales.

`*_round` gives the nearest values that a format can carry (with a straight-through gradient), `*_pack`
and `unpack` go to and from what the file stores."""
import torch
import torch.nn.functional as F

E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])


def pow2_ceil(v):
    """2^ceil(log2 v), exactly, v > 0"""
    m, e = torch.frexp(v)                                  # v = m 2^e, .5 <= m < 1
    return torch.ldexp(torch.ones_like(v), e - (m == .5).to(e.dtype))


def e4m3(u):
    """|u| <= 448"""
    return u.to(torch.float8_e4m3fn).to(u.dtype)


def e2m1(u):
    """|u| <= 6; ties go to the even code"""
    a = u.abs()
    step = torch.where(a < 2, .5, torch.where(a < 4, 1., 2.))
    return torch.round(u / step) * step


def fp8_scale(b, dim):
    return pow2_ceil(b.abs().amax(dim, keepdim=True).clamp(min=1e-4) / 448)


def fp4_scale(b):
    amax = b.abs().amax(-1, keepdim=True)
    return pow2_ceil(torch.where(amax > 0, amax / 6, torch.ones_like(amax)))


def fp8_values(x, block):
    """x [..., k], one scale per `block` inputs"""
    k = x.shape[-1]
    b = F.pad(x, (0, -k % block)).unflatten(-1, (-1, block))
    s = fp8_scale(b, -1)
    return (e4m3(b / s) * s).flatten(-2)[..., :k]


def tiles(w):
    """w [out, in] -> [out/128, 128, in/128, 128], zero-padded"""
    out, k = w.shape
    return F.pad(w, (0, -k % 128, 0, -out % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))


def untile(b, shape):
    return b.flatten(2, 3).flatten(0, 1)[:shape[0], :shape[1]]


def fp8_weight_values(w):
    b = tiles(w)
    s = fp8_scale(b, (1, 3))
    return untile(e4m3(b / s) * s, w.shape)


def fp4_values(x):
    b = x.unflatten(-1, (-1, 32))
    s = fp4_scale(b)
    return (e2m1(b / s) * s).flatten(-2)


class Straight(torch.autograd.Function):
    """Forward: the rounded values. Backward: as if nothing had been rounded."""
    @staticmethod
    def forward(ctx, x, values, *args): return values(x, *args)

    @staticmethod
    def backward(ctx, g): return (g, None) + (None,) * (len(ctx.needs_input_grad) - 2)


def fp8_round(x, block=128): return Straight.apply(x, fp8_values, block)
def fp4_round(x): return Straight.apply(x, fp4_values)
def weight_round(w, kind): return Straight.apply(w, WEIGHT_VALUES[kind])


WEIGHT_VALUES = {"fp8": fp8_weight_values, "fp4": fp4_values, "bf16": lambda w: w.bfloat16().to(w.dtype)}


def exponent_byte(s):
    """A power of two as E8M0: exponent + 127"""
    return (torch.frexp(s)[1] - 1 + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def fp8_pack(w):
    """w [out, in] -> weight F8_E4M3 [out, in], scale F8_E8M0 [out/128, in/128]"""
    b = tiles(w)
    s = fp8_scale(b, (1, 3))
    return untile(b / s, w.shape).to(torch.float8_e4m3fn), exponent_byte(s[:, 0, :, 0])


def fp4_pack(w):
    """w [out, in] -> weight I8 [out, in/2], the low nibble first; scale F8_E8M0 [out, in/32]"""
    b = w.unflatten(-1, (-1, 32))
    s = fp4_scale(b)
    u = e2m1(b / s).flatten(-2)
    code = torch.searchsorted(E2M1, u.abs().contiguous()) + 8 * (u < 0)
    packed = (code[:, 0::2] + 16 * code[:, 1::2]).to(torch.uint8).view(torch.int8)
    return packed, exponent_byte(s[..., 0])


def unpack(weight, scale):
    """The stored pair -> [out, in] float32"""
    s = torch.exp2(scale.view(torch.uint8).float() - 127)
    if weight.dtype == torch.int8:
        b = weight.view(torch.uint8).long()
        table = torch.cat([E2M1, -E2M1])
        return table[torch.stack([b & 15, b >> 4], -1).flatten(-2)] * s.repeat_interleave(32, 1)
    s = s.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.float() * s[:weight.shape[0], :weight.shape[1]]
