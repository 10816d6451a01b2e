import importlib.util, sys, time
import torch
sys.path.insert(0, "scratch")
T0 = time.time()
def say(*a): print(f"[{time.time()-T0:5.1f}]", *a, flush=True)
from dit_accel.kernels.block_attention import triton as bt, hopper
from dit_accel import presets
from dit_accel.state import State
from dit_accel.types import Context
from dit_accel.eval.kernel_cases import SHAPES, Shape, inputs
from dit_accel.kernels.error_probe import triton as ep
spec = importlib.util.spec_from_file_location("blocks", "tests/kernels/test_block_attention.py")
shared = importlib.util.module_from_spec(spec); spec.loader.exec_module(shared)
import hopper_pp, hopper_ahead
NEW = hopper.attend
REAL = bt._setting
def boxed(box): bt._setting = (lambda q, kl: {**REAL(q, kl), "BN": box}) if box else REAL

def check(cases):
    worst = 0
    for dtype, depth, kinds in cases:
        for kind, taylor in kinds:
            q, k, v, queries, keys, code, valid = shared.problem(batch=1, heads=2, length=1500, depth=depth, dtype=dtype)
            q, k, v, valid, code = (x.cuda() for x in (q, k, v, valid, code))
            queries = shared.Blocks(queries.perm.cuda(), queries.offsets.cuda()); keys = shared.Blocks(keys.perm.cuda(), keys.offsets.cuda())
            for val in (None, valid):
                def run(backend, q, k, v):
                    rest = None if kind is None else shared.terms(k, v, keys, val, kind, taylor, "reference")
                    return shared.run(q, k, v, queries, keys, code, val, rest, backend=backend)
                exact = run("reference", q.double(), k.double(), v.double()); low = run("reference", q, k, v); got = run("triton", q, k, v); again = run("triton", q, k, v)
                assert torch.equal(got[0], again[0]), "not the same twice"
                for g, l, e in zip(got, low, exact):
                    assert (g.isfinite() == e.isfinite()).all(), (dtype, depth, kind)
                    f = e.isfinite()
                    bound = 2 * (l.double() - e)[f].abs().max() + 2 * torch.finfo(dtype).eps * e[f].abs().max()
                    worst = max(worst, float((g.double() - e)[f].abs().max() / bound))
    say("check of attention: worst error over bound", f"{worst:.2f}", "OK" if worst <= 1 else "WRONG")

def other_checks():
    from dit_accel.eval.kernel_checks import check_kmeans, check_error_probe
    from dit_accel.eval.method_cases import check_methods
    for name, call in (("kmeans", check_kmeans), ("probe", check_error_probe)):
        for dtype, depth in ((torch.bfloat16, 128), (torch.float16, 64)):
            try: call(dtype, depth, "cuda"); say(name, dtype, depth, "OK")
            except Exception as e: say(name, dtype, depth, "WRONG", type(e).__name__, e)
    try: check_methods(torch.bfloat16, 128, "cuda"); say("methods OK")
    except Exception as e: say("methods WRONG", type(e).__name__, e)

def ms(call, n=5):
    call(); torch.cuda.synchronize()
    ev = []
    for _ in range(n):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record(); call(); b.record(); ev.append((a, b))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in ev)[n // 2]

def small(mod, box, method=None):
    hopper.attend = mod; boxed(box)
    shape = Shape((5, 18, 26), 2)
    q, k, v = inputs(shape, torch.bfloat16, "cuda")
    m = method or presets.svg_ear(density=0.22); st = State()
    for step in (0, 1): m(q, k, v, Context(shape.context.geometry, step=step, num_steps=50, layer=0, state=st))

PROBES = [{"BM": bm, "BN": bn, "STAGES": st, "num_warps": w} for bm, bn, st, w in
          ((64, 64, 3, 4), (64, 64, 4, 4), (64, 64, 5, 4), (64, 32, 3, 4), (64, 32, 4, 4), (128, 64, 3, 8), (128, 64, 4, 8), (128, 32, 4, 8), (64, 128, 3, 4))]
def probes(some):
    for p in some:
        ep._SETTING = p
        try: small(NEW, 0)
        except Exception as e: print("probe", p, type(e).__name__)
KINDS = ((None, None), ("taylor", None), ("taylor", "global"), ("second", "global"))
CASES = [(torch.bfloat16, 128, KINDS), (torch.float16, 64, KINDS[1:2])]
pisa = presets.pisa(density=0.15)
if len(sys.argv) > 1:
    with torch.inference_mode():
        {"a": lambda: check(CASES[:1]), "b": lambda: check(CASES[1:]), "c": lambda: other_checks(),
         "d": lambda: [small(hopper_pp.attend, 0), small(hopper_ahead.attend, 0), small(hopper_pp.attend, 0, pisa)],
         "e": lambda: [small(NEW, 0), small(NEW, 32), small(NEW, 0, pisa)],
         "f": lambda: probes(PROBES[:3]), "g": lambda: probes(PROBES[3:6]), "h": lambda: probes(PROBES[6:])}[sys.argv[1]]()
    sys.exit()
import subprocess
kids = [subprocess.Popen([sys.executable, __file__, x]) for x in "abcdefgh"]
for kid in kids: kid.wait()
say("compiled", torch.cuda.get_device_name())
from torch.profiler import profile, ProfilerActivity
from torch.nn.attention import SDPBackend, sdpa_kernel
with torch.inference_mode():
    for name in ("wan14b", "wan1.3b", "hunyuan"):
        shape = SHAPES[name]
        q, k, v = inputs(shape, torch.bfloat16, "cuda")
        state = State()
        def ctx(step): return Context(shape.context.geometry, step=step, num_steps=50, layer=0, state=state)
        m = presets.svg_ear(density=0.22)
        a = time.time(); m(q, k, v, ctx(0)); torch.cuda.synchronize(); first = time.time() - a
        whole = ms(lambda: m(q, k, v, ctx(1)))
        def dense():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): torch.nn.functional.scaled_dot_product_attention(q, k, v)
        d = ms(dense, 3)
        say(f"{name}: svg_ear {whole:.2f} ms, dense {d:.2f}, ratio {d/whole:.2f}; first call {first*1e3:.0f} ms")
        tr = m.trace(q, k, v, ctx(1)); blocked, plan = tr.blocked, tr.plan
        lay, rou = ms(lambda: m.layout(q, k, v, ctx(1))), ms(lambda: m.route(blocked, m.rest, ctx(1)))
        rest = m.rest.terms(blocked, ctx(1))
        def att(rest=rest):
            return bt.block_attention(q, k, v, plan.code, q_perm=blocked.queries.perm, q_offsets=blocked.queries.offsets, k_perm=blocked.keys.perm,
                k_offsets=blocked.keys.offsets, key_valid=None, scale=blocked.scale, rest=rest)
        line = []
        base = att()[0].float()
        for label, mod, box in (("16", NEW, 0), ("32", NEW, 32), ("ping-pong 16", hopper_pp.attend, 0), ("read ahead 16", hopper_ahead.attend, 0)):
            hopper.attend = mod; boxed(box)
            line.append(f"{label} {ms(att):.2f} (differs {float((att()[0].float() - base).abs().max()):.1g})")
        hopper.attend = NEW; boxed(0)
        del base
        say(f"  layout {lay:.2f}, route {rou:.2f}, attention: {', '.join(line)}")
        line = []
        for p in PROBES:
            ep._SETTING = p
            try: line.append(f"{tuple(p.values())} {ms(lambda: m.route(blocked, m.rest, ctx(1)), 3):.2f}")
            except Exception as e: line.append(f"{tuple(p.values())} {type(e).__name__}")
            if name == "hunyuan": break
        ep._SETTING = PROBES[0]
        say("  route by probe:", "; ".join(line))
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            m(q, k, v, ctx(1)); torch.cuda.synchronize()
        rows = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)
        for e in rows[:16 if name == "wan14b" else 12]: print(f"   {e.self_device_time_total/1000:8.3f} ms x{e.count:3d} {e.key[:70]}", flush=True)
        print(f"   in all {sum(e.self_device_time_total for e in rows)/1000:.2f} ms, {sum(e.count for e in rows)} launches")
        if name == "wan14b":
            st = State(); c = lambda: pisa(q, k, v, Context(shape.context.geometry, step=1, num_steps=50, layer=0, state=st))
            a = ms(c); hopper.attend = hopper_pp.attend; b = ms(c); hopper.attend = NEW
            say(f"  pisa {a:.2f}, ping-pong {b:.2f}")
        del q, k, v, blocked, plan, tr, rest, state; torch.cuda.empty_cache()
