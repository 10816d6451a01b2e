import sys, glob, zipfile, time, os

t = time.time()
w = None
for base in sys.argv[1:] + ["/work/wt/gpu/carry", ".", "..", "carry"] + sys.path:
    for f in (
        glob.glob(os.path.join(base, "**/fa3_fwd*.whl"), recursive=True)[:1]
        + glob.glob(os.path.join(base, "**/fa3_fwd_interface.py"), recursive=True)[:1]
    ):
        w = w or f
print("fa3 at", w)
if w and w.endswith(".whl"):
    zipfile.ZipFile(w).extractall("/tmp/fa3")
    sys.path.insert(0, "/tmp/fa3")
elif w:
    sys.path.insert(0, os.path.dirname(w))
import torch

print("unzip %.1fs" % (time.time() - t))
import fa3_fwd_interface as fa

print([n for n in dir(fa) if "flash" in n])
q, k, v = (torch.randn(1, 4608, 24, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
o = fa.flash_attn_func(q, k, v)
o = o[0] if isinstance(o, tuple) else o
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

r = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
print("differs by", float((o - r).abs().max()))
for L, H in ((4608, 24), (32760, 12), (75600, 40)):
    q, k, v = (torch.randn(1, L, H, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    qt, kt, vt = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def cd():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(qt, kt, vt)

    n = 4 * L * L * H * 128
    a = do_bench(lambda: fa.flash_attn_func(q, k, v), warmup=5, rep=60, return_mode="median")
    b = do_bench(cd, warmup=5, rep=60, return_mode="median")
    c = do_bench(
        lambda: fa.flash_attn_func(qt.transpose(1, 2), kt.transpose(1, 2), vt.transpose(1, 2)),
        warmup=5,
        rep=60,
        return_mode="median",
    )
    print(
        f"L={L} H={H}: fa3 {a:.3f} ms {n / a / 1e9:.0f} TF  (heads first strides {c:.3f})  cudnn {b:.3f} ms {n / b / 1e9:.0f} TF",
        flush=True,
    )
