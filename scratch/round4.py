import importlib.util, subprocess, sys, time
import torch
T0 = time.time()
def say(*a): print(f"[{time.time()-T0:5.1f}]", *a, flush=True)
from dit_accel.kernels.block_attention import triton as bt
from dit_accel import presets
from dit_accel.state import State
from dit_accel.types import Context
from dit_accel.eval.kernel_cases import SHAPES, Shape, inputs
from dit_accel.kernels.error_probe import triton as ep
from dit_accel.kernels.kmeans import triton as km
from dit_accel.kernels.kmeans import kmeans
spec = importlib.util.spec_from_file_location("blocks", "tests/kernels/test_block_attention.py")
shared = importlib.util.module_from_spec(spec); spec.loader.exec_module(shared)
REAL = bt._setting
def boxed(box): bt._setting = (lambda q, kl: {**REAL(q, kl), "BN": box}) if box else REAL

def attention(name, dtype, depth, kinds):
    for kind, taylor in kinds:
        worst = 0
        q, k, v, queries, keys, code, valid = shared.problem(batch=1, heads=2, length=1500, depth=depth, dtype=dtype)
        q, k, v, valid, code = (x.cuda() for x in (q, k, v, valid, code))
        queries = shared.Blocks(queries.perm.cuda(), queries.offsets.cuda()); keys = shared.Blocks(keys.perm.cuda(), keys.offsets.cuda())
        for val in (None, valid):
            def run(backend, q, k, v):
                rest = None if kind is None else shared.terms(k, v, keys, val, kind, taylor, "reference")
                return shared.run(q, k, v, queries, keys, code, val, rest, backend=backend)
            exact = run("reference", q.double(), k.double(), v.double()); low = run("reference", q, k, v); got = run("triton", q, k, v); again = run("triton", q, k, v)
            same = torch.equal(got[0], again[0])
            for g, l, e in zip(got, low, exact):
                if not (g.isfinite() == e.isfinite()).all(): worst = 99.0; continue
                f = e.isfinite()
                bound = 2 * (l.double() - e)[f].abs().max() + 2 * torch.finfo(dtype).eps * e[f].abs().max()
                worst = max(worst, float((g.double() - e)[f].abs().max() / bound))
        say(f"attention {name} {kind} {taylor}: error over bound {worst:.2f}, same twice {same}", "OK" if worst <= 1 and same else "WRONG")

def nearest(name, dtype, depth, padded):
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 3, 1013, depth, generator=g, device="cuda").to(dtype)
    valid = torch.rand(2, 1013, generator=g, device="cuda") < 0.9 if padded else None
    given = x if valid is None else x.masked_fill(~valid[:, None, :, None], torch.nan)
    for clusters in (37, 130):
        before, _ = kmeans(given, clusters, iterations=1, seed=3, valid=valid)
        labels, centroids = kmeans(given, clusters, iterations=2, seed=3, valid=valid)
        again, same = kmeans(given, clusters, iterations=2, seed=3, valid=valid)
        ok = torch.equal(labels, again) and torch.equal(centroids, same)
        d = torch.cdist(x.double(), centroids.to(dtype).double())
        off = d.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - d.amin(-1)
        if valid is not None: off = off * valid[:, None]
        say(f"kmeans {name} C={clusters}: furthest off {float(off.max()):.2g}, range {int(labels.min())}..{int(labels.max())}", "OK" if ok and float(off.max()) < 1e-3 and 0 <= int(labels.min()) and int(labels.max()) < clusters else "WRONG")

def small(box=0, method=None):
    boxed(box)
    shape = Shape((5, 18, 26), 2, 40)
    q, k, v = inputs(shape, torch.bfloat16, "cuda")
    m = method or presets.svg_ear(density=0.22); st = State()
    for step in (0, 1): m(q, k, v, Context(shape.context.geometry, step=step, num_steps=50, layer=0, state=st))

def method():
    from dit_accel.eval import method_cases as mc
    mc._FULL = {"svg_ear": mc._FULL["svg_ear"]}
    mc.check_methods(torch.bfloat16, 128, "cuda"); say("svg_ear at full density OK")

def probes(some):
    from dit_accel.eval.kernel_checks import check_error_probe
    for p in some:
        ep._SETTING = p
        try: check_error_probe(torch.bfloat16, 128, "cuda"); say("probe", tuple(p.values()), "OK")
        except Exception as e: say("probe", tuple(p.values()), "WRONG", type(e).__name__, str(e)[:100])

PROBES = [{"BM": bm, "BN": bn, "STAGES": st, "num_warps": w} for bm, bn, st, w in
          ((64, 64, 3, 4), (64, 32, 3, 4), (64, 32, 4, 4), (128, 64, 3, 8), (128, 32, 3, 8))]
pisa = presets.pisa(density=0.15)
BF, HF = torch.bfloat16, torch.float16
KIDS = {
    "kmeans": lambda: nearest("bf16 128", BF, 128, False),
    "kmeans2": lambda: nearest("fp16 64 padded", HF, 64, True),
    "plain": lambda: attention("bf16 128", BF, 128, ((None, None), ("taylor", None))),
    "fp16": lambda: attention("fp16 64", HF, 64, (("taylor", None),)),
    "first": lambda: attention("bf16 128", BF, 128, (("taylor", "global"),)),
    "second": lambda: attention("bf16 128", BF, 128, (("second", None),)),
    "probe": lambda: probes(PROBES[:2]), "probe2": lambda: probes(PROBES[2:]),
    "pisa": lambda: small(0, pisa), "svg": lambda: [small(), method()], "box32": lambda: small(32),
}
if len(sys.argv) > 1:
    with torch.inference_mode(): KIDS[sys.argv[1]]()
    sys.exit()
kids = {x: subprocess.Popen([sys.executable, "-W", "ignore", __file__, x]) for x in KIDS}
while time.time() - T0 < 27 and any(kid.poll() is None for kid in kids.values()): time.sleep(0.2)
codes = {x: kid.poll() for x, kid in kids.items()}
for kid in kids.values():
    if kid.poll() is None: kid.kill()
say("kids", {x: c for x, c in codes.items() if c != 0} or "all done", torch.cuda.get_device_name())
if codes["kmeans"] != 0:
    km.is_hopper = lambda device: False; say("k-means falls back to Triton")
def ms(call, n=5):
    call(); torch.cuda.synchronize()
    ev = []
    for _ in range(n):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record(); call(); b.record(); ev.append((a, b))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in ev)[n // 2]
from torch.profiler import profile, ProfilerActivity
from torch.nn.attention import SDPBackend, sdpa_kernel
with torch.inference_mode():
    for name in ("wan14b", "hunyuan", "wan1.3b"):
        shape = SHAPES[name]
        q, k, v = inputs(shape, torch.bfloat16, "cuda")
        state = State()
        def ctx(step): return Context(shape.context.geometry, step=step, num_steps=50, layer=0, state=state)
        m = presets.svg_ear(density=0.22)
        a = time.time(); m(q, k, v, ctx(0)); torch.cuda.synchronize(); first = time.time() - a
        n = 9 if name == "wan1.3b" else 5
        whole = ms(lambda: m(q, k, v, ctx(1)), n)
        def dense():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): torch.nn.functional.scaled_dot_product_attention(q, k, v)
        d = ms(dense, 3)
        say(f"{name}: svg_ear {whole:.2f} ms, cuDNN {d:.2f}, ratio {d/whole:.2f}; first call {first*1e3:.0f} ms")
        tr = m.trace(q, k, v, ctx(1)); blocked, plan = tr.blocked, tr.plan
        lay, rou = ms(lambda: m.layout(q, k, v, ctx(1)), n), ms(lambda: m.route(blocked, m.rest, ctx(1)), n)
        rest = m.rest.terms(blocked, ctx(1))
        def att(rest=rest):
            return bt.block_attention(q, k, v, plan.code, q_perm=blocked.queries.perm, q_offsets=blocked.queries.offsets, k_perm=blocked.keys.perm,
                k_offsets=blocked.keys.offsets, key_valid=None, scale=blocked.scale, rest=rest)
        line = f"16 {ms(att, n):.2f}"
        if name != "hunyuan": boxed(32); line += f", 32 {ms(att, n):.2f}"; boxed(0)
        say(f"  layout {lay:.2f}, route {rou:.2f}, attention by box {line}")
        if name != "hunyuan":
            line = []
            for p in PROBES:
                ep._SETTING = p
                try: line.append(f"{tuple(p.values())} {ms(lambda: m.route(blocked, m.rest, ctx(1)), 3):.2f}")
                except Exception as e: line.append(f"{tuple(p.values())} {type(e).__name__}")
            ep._SETTING = PROBES[0]
            say("  route by probe:", "; ".join(line))
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            m(q, k, v, ctx(1)); torch.cuda.synchronize()
        rows = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)
        for e in rows[:12]: print(f"   {e.self_device_time_total/1000:8.3f} ms x{e.count:3d} {e.key[:60]}", flush=True)
        print(f"   in all {sum(e.self_device_time_total for e in rows)/1000:.2f} ms, {sum(e.count for e in rows)} launches", flush=True)
        if name == "wan14b":
            st = State(); say(f"  pisa {ms(lambda: pisa(q, k, v, Context(shape.context.geometry, step=1, num_steps=50, layer=0, state=st))):.2f}")
        del q, k, v, blocked, plan, tr, rest, state; torch.cuda.empty_cache()
