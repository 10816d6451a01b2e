import importlib.util, sys, time, os
from pathlib import Path
import torch
sys.path.insert(0, "scratch")
T0 = time.time()
def say(*a): print(f"[{time.time()-T0:5.1f}]", *a, flush=True)
from dit_accel.kernels.block_attention import triton as bt, hopper, runs, problem, block_attention
spec = importlib.util.spec_from_file_location("blocks", "tests/kernels/test_block_attention.py")
shared = importlib.util.module_from_spec(spec); spec.loader.exec_module(shared)
import hopper_old, hopper_pp
NEW = hopper.attend
say(torch.cuda.get_device_name())

def check(name):
    worst = 0
    for dtype, depth, kinds in CASES:
        if True:
            for kind, taylor in kinds:
                q, k, v, queries, keys, code, valid = shared.problem(batch=1, heads=2, length=1500, depth=depth, dtype=dtype)
                q, k, v, valid = (x.cuda() for x in (q, k, v, valid))
                queries = shared.Blocks(queries.perm.cuda(), queries.offsets.cuda())
                keys = shared.Blocks(keys.perm.cuda(), keys.offsets.cuda())
                code = code.cuda()
                for val in (None, valid):
                    def run(backend, q, k, v):
                        rest = None if kind is None else shared.terms(k, v, keys, val, kind, taylor, "reference")
                        return shared.run(q, k, v, queries, keys, code, val, rest, backend=backend)
                    exact = run("reference", q.double(), k.double(), v.double()); low = run("reference", q, k, v); got = run("triton", q, k, v); again = run("triton", q, k, v)
                    assert torch.equal(got[0], again[0]), "not the same twice"
                    for g, l, e in zip(got, low, exact):
                        assert (g.isfinite() == e.isfinite()).all(), (name, dtype, depth, kind)
                        f = e.isfinite()
                        bound = 2 * (l.double() - e)[f].abs().max() + 2 * torch.finfo(dtype).eps * e[f].abs().max()
                        err = (g.double() - e)[f].abs().max()
                        worst = max(worst, float(err / bound))
    say("check", name, f"worst error over bound {worst:.2f}", "OK" if worst <= 1 else "WRONG")

def small(mod, box, method=None, real=bt._setting):
    from dit_accel.eval.kernel_cases import Shape, inputs
    from dit_accel import presets
    from dit_accel.state import State
    from dit_accel.types import Context
    hopper.attend = mod
    if box: bt._setting = lambda q, kl: {**real(q, kl), "BN": box}
    shape = Shape((5, 18, 26), 2)
    q, k, v = inputs(shape, torch.bfloat16, "cuda")
    m = method or presets.svg_ear(density=0.22)
    m(q, k, v, Context(shape.context.geometry, step=0, num_steps=50, layer=0, state=State()))

KINDS = ((None, None), ("taylor", None), ("taylor", "global"), ("second", "global"))
CASES = [(torch.bfloat16, 128, KINDS), (torch.float16, 64, KINDS[1:2])]
if len(sys.argv) > 1:
    from dit_accel import presets
    pisa = presets.pisa(density=0.15)
    from dit_accel.kernels.kmeans import triton as km
    job = {
        "a": lambda: [CASES.pop(), check("a")], "b": lambda: [CASES.pop(0), check("b")],
        "c": lambda: [small(hopper_old.attend, 16), small(hopper_old.attend, 64, pisa)],
        "d": lambda: [small(hopper_pp.attend, 16), small(hopper_pp.attend, 64, pisa)],
        "e": lambda: [small(NEW, 32), small(NEW, 64), small(NEW, 8)],
        "f": lambda: [small(NEW, 64, pisa), small(NEW, 32, pisa)],
    }[sys.argv[1]]
    with torch.inference_mode(): job()
    sys.exit()
import subprocess
kids = [subprocess.Popen([sys.executable, __file__, x]) for x in "abcdef"]
for kid in kids: kid.wait()
say("compiled")
def ms(call, n=5):
    call(); torch.cuda.synchronize()
    ev = []
    for _ in range(n):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record(); call(); b.record(); ev.append((a, b))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in ev)[n // 2]
with torch.inference_mode():
    check("new")
    from dit_accel.eval.kernel_cases import SHAPES, inputs
    from dit_accel import presets
    from dit_accel.state import State
    from dit_accel.types import Context
    shape = SHAPES["wan14b"]
    q, k, v = inputs(shape, torch.bfloat16, "cuda")
    state = State()
    def ctx(step): return Context(shape.context.geometry, step=step, num_steps=50, layer=0, state=state)
    m = presets.svg_ear(density=0.22)
    m(q, k, v, ctx(0)); say("first call done")
    whole = ms(lambda: m(q, k, v, ctx(1)))
    say(f"svg_ear whole call, new: {whole:.2f} ms")
    layout = ms(lambda: m.layout(q, k, v, ctx(1)))
    tr = m.trace(q, k, v, ctx(1))
    blocked, plan = tr.blocked, tr.plan
    route = ms(lambda: m.route(blocked, m.rest, ctx(1)))
    say(f"layout {layout:.2f}, route (statistics known) {route:.2f}, density {tr.report.density}")
    rest = m.rest.terms(blocked, ctx(1))
    def att(rest=rest, **setting):
        return bt.block_attention(q, k, v, plan.code, q_perm=blocked.queries.perm, q_offsets=blocked.queries.offsets, k_perm=blocked.keys.perm,
            k_offsets=blocked.keys.offsets, key_valid=None, scale=blocked.scale, rest=rest, setting=setting or None)
    base = att()
    for name, mod in (("split", NEW), ("no split (before)", hopper_old.attend), ("split, ping-pong", hopper_pp.attend)):
        hopper.attend = mod
        got = att()
        say(f"attention, runs, {name}: box16 {ms(att):.2f}, differs {float((got[0].float()-base[0].float()).abs().max()):.2g}")
    hopper.attend = NEW
    say(f"runs split box32 {ms(lambda: att(BN=32)):.2f} box64 {ms(lambda: att(BN=64)):.2f} box8 {ms(lambda: att(BN=8)):.2f}; no rest box16 {ms(lambda: att(rest=None)):.2f}")
    # as before: tiles by cluster
    was = bt.packed_runs
    def tiled(code, offsets, batch, heads, length, size, ahead):
        return problem.packed(code, bt.tiles(offsets, length, size, None) if hasattr(bt, "tiles") else __import__("dit_accel.kernels.packed", fromlist=["tiles"]).tiles(offsets, length, size, None), batch, heads, size)
    bt.packed_runs = tiled
    for name, mod in (("split", NEW), ("no split (before)", hopper_old.attend)):
        hopper.attend = mod
        say(f"attention, tiles by cluster, {name}: box16 {ms(att):.2f}")
    bt.packed_runs = was; hopper.attend = NEW
    del base, got; torch.cuda.empty_cache()
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        m(q, k, v, ctx(1)); torch.cuda.synchronize()
    rows = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)[:24]
    for e in rows: print(f"   {e.self_device_time_total/1000:8.3f} ms x{e.count:3d} {e.key[:90]}", flush=True)
    # pisa: before, new, ping-pong, small boxes, 64 queries
    from dit_accel.kernels.block_attention import triton as bt2
    real = bt._setting
    for label, kw in (("pisa", {}), ("pisa 64 queries", {"block_q": 64})):
        p = presets.pisa(density=0.15, **kw); st = State()
        c = lambda: p(q, k, v, Context(shape.context.geometry, step=1, num_steps=50, layer=0, state=st))
        line = []
        for name, mod in (("before", hopper_old.attend), ("new", NEW), ("ping-pong", hopper_pp.attend)):
            hopper.attend = mod; line.append(f"{name} {ms(c):.2f}")
        hopper.attend = NEW
        if not kw:
            for bn in (32, 16):
                bt._setting = lambda q, kl, bn=bn: {**real(q, kl), "BN": bn}
                line.append(f"box{bn} {ms(c):.2f}")
            bt._setting = real
        say(label, ", ".join(line))
    # k-means assignment by launch
    from dit_accel.kernels.kmeans import triton as km
    import triton
    mem = state.slot(0, "")
    for what, x in (("kmeans keys", k), ("kmeans queries", q)):
        st = km.Clusters(x, mem[what].shape[2], 1, mem[what], None, 0)
        n = mem[what].shape[2]
        def assign(bm, bn, warps, stages):
            km._assign[(triton.cdiv(x.shape[2], bm), x.shape[1])](x, st.centre, st.half, st.labels, st.labels, st.changed, *st.arguments(x, 0),
                D=128, BM=bm, BN=bn, HAS_VALID=False, num_warps=warps, num_stages=stages)
        for cfg in ((128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 2), (256, 64, 8, 3), (128, 64, 8, 4), (64, 128, 4, 3), (64, 64, 4, 3)):
            try: say(f"assign {what} {cfg}: {ms(lambda: assign(*cfg)):.3f} ms, {2*x.numel()*n/ms(lambda: assign(*cfg))/1e9:.0f} TFLOP/s")
            except Exception as e: say("assign", cfg, type(e).__name__)
            if time.time() - T0 > 68: break
        say(f"update {what}: {ms(lambda: km.update_means(x, st, 1)):.3f}")
