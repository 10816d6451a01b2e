"""Dense attention by every backend, what each refuses, and which partial `auto` takes."""

import pytest
import torch

import dit_accel
from dit_accel import InputError, Method, presets
from dit_accel.kernels.dense_attention import (
    BACKENDS,
    api,
    dense_attention,
    flash,
    partial_attention,
    why_not,
    xformers_ops,
)

HERE = [
    name
    if why_not(name) is None
    else pytest.param(
        name,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.is_available(), reason=f"{name}: {why_not(name)}"),
        ],
    )
    for name in BACKENDS
]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def inputs(dtype=torch.float32, depth=8, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 2, 40, depth, generator=generator).to(dtype).to(device)


def exact(q, k, v, valid=None, scale=None):
    logits = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v.double()


MASKS = {
    "none": lambda place: None,
    "all": lambda place: (place >= 0).expand(3, -1),
    "padded": lambda place: place < torch.tensor([[40], [25], [1]]),
    "scattered": lambda place: (place % torch.tensor([[2], [3], [7]])) == 1,
    "empty": lambda place: place < torch.tensor([[40], [0], [33]]),
}


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_every_backend_is_dense_attention_over_the_valid_keys(backend, mask, scale):
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    q, k, v = inputs(dtype, 64 if gpu else 8, "cuda" if gpu else "cpu")
    valid = MASKS[mask](torch.arange(40))
    if valid is not None:
        valid = valid.to(q.device)
    out = dense_attention(q, k, v, key_valid=valid, scale=scale, backend=backend)
    wanted = exact(q, k, v, valid, scale)
    low = dense_attention(q, k, v, key_valid=valid, scale=scale).double()
    bound = 2 * (low - wanted).abs().max() + 4 * torch.finfo(torch.float32).eps
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert (out.double() - wanted).abs().max() <= bound
    if mask == "empty":
        assert not out[1].any()


def test_forced_flash_is_what_runs(monkeypatch):
    """torch is told which kernel, and no other one may take its place."""
    from torch.nn.attention import SDPBackend

    asked = []

    def sdpa_kernel(kinds):
        asked.append(kinds)
        return real(kinds)

    real = torch.nn.attention.sdpa_kernel
    monkeypatch.setattr("dit_accel.kernels.dense_attention.backends.sdpa_kernel", sdpa_kernel)
    dense_attention(*inputs(), backend="flash")
    assert asked == [[SDPBackend.FLASH_ATTENTION]]


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match=r"backend: expected sdpa or cudnn or .*got 'fast'"):
        dense_attention(*inputs(), backend="fast")
    with pytest.raises(InputError, match=r"backend: expected sdpa \| cudnn .*got 'fast'"):
        Method(None, None, None, backend="fast")
    with pytest.raises(InputError, match=r"dense: backend: expected sdpa .*did you mean 'flash'"):
        presets.dense(backend="flas")


@NO_GPU
@pytest.mark.parametrize("backend", ["cudnn", "xformers"])
def test_what_needs_a_gpu_is_refused_when_it_is_asked_for(backend):
    reason = "needs a CUDA device, and there is none"
    assert why_not(backend) == reason
    assert why_not(backend, *inputs()) == reason
    with pytest.raises(ValueError, match=f"can run this, got '{backend}': {reason}"):
        dense_attention(*inputs(), backend=backend)
    with pytest.raises(InputError, match=f"can run here, got '{backend}': {reason}"):
        presets.dense(backend=backend)
    with pytest.raises(InputError, match=f"can run here, got '{backend}': {reason}"):
        Method.from_config({"method": "dense", "options": {"backend": backend}})


def test_xformers_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(xformers_ops, "find_spec", lambda name: None)
    assert why_not("xformers") == "xformers is not installed: pip install xformers"
    with pytest.raises(InputError, match="xformers is not installed"):
        presets.dense(backend="xformers")


@NO_GPU
def test_xformers_gives_its_own_reasons(monkeypatch):
    pytest.importorskip("xformers.ops")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 0)

    q, k, v = (x.as_subclass(Elsewhere) for x in inputs())
    assert "on a CUDA device, got cpu" in why_not("xformers", *inputs())
    reason = why_not("xformers", q, k, v)
    assert "wasn't built" in reason or "not available" in reason
    assert "dtype=torch.float32" in reason


def test_tensors_elsewhere_are_refused_at_the_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    method = presets.dense(backend="cudnn")
    with pytest.raises(
        InputError, match="can run this, got 'cudnn': needs tensors on a CUDA device, got cpu"
    ):
        dit_accel.attention(*inputs(), method, grid=(1, 5, 8))


@pytest.mark.gpu
def test_torchs_own_reasons_are_told():
    q, k, v = (x.cuda() for x in inputs(torch.float32, 64))
    for backend in ("flash", "cudnn"):
        assert "dtype" in why_not(backend, q, k, v).lower()
    q, k, v = (x.cuda() for x in inputs(torch.bfloat16, 512))
    assert why_not("flash", q, k, v)


def test_methods_run_the_backend_that_they_name(monkeypatch):
    ran = []
    real = api.attend

    def attend(backend, *rest):
        ran.append(backend)
        return real(backend, *rest)

    monkeypatch.setattr(api, "attend", attend)
    q, k, v = inputs()
    sparse = {"block_size": 4, "dense_steps": 1, "dense_backend": "flash"}
    for method, step, wanted in (
        (presets.dense(backend="flash"), 0, ["flash"]),
        (presets.dense(backend="sdpa"), 0, ["sdpa"]),
        (presets.dense(), 0, ["sdpa"]),
        (presets.custom(**sparse), 0, ["flash"]),
        (presets.custom(**sparse), 1, []),
    ):
        ran.clear()
        dit_accel.attention(q, k, v, method, grid=(1, 5, 8), step=step)
        assert ran == wanted
    assert presets.dense().is_dense(dit_accel.Context(dit_accel.Geometry((1, 5, 8))))
    assert not presets.dense(backend="sdpa").is_dense(
        dit_accel.Context(dit_accel.Geometry((1, 5, 8)))
    )


@pytest.mark.parametrize(
    ("can", "wanted"),
    [
        (("xformers", "flash"), "xformers"),
        (("xformers",), "xformers"),
        (("flash",), "flash"),
        ((), "chunked"),
    ],
)
def test_the_partial_that_auto_takes(monkeypatch, can, wanted):
    from dit_accel.kernels.dense_attention import chunked

    for name, module in (("xformers", xformers_ops), ("flash", flash), ("chunked", chunked)):
        monkeypatch.setattr(module, "partial_attention", lambda *given, name=name: name)
        if name != "chunked":
            reason = None if name in can else f"{name} has a reason"
            monkeypatch.setattr(module, "refuses", lambda *given, reason=reason: reason)
    assert partial_attention(*inputs()) == wanted
    for name in {"xformers", "flash"} - set(can):
        with pytest.raises(ValueError, match=f"can run here, got {name!r}: {name} has a reason"):
            partial_attention(*inputs(), backend=name)


@NO_GPU
def test_the_partial_of_xformers_is_refused_here():
    with pytest.raises(ValueError, match="can run here, got 'xformers': needs a CUDA device"):
        partial_attention(*inputs(), backend="xformers")
    valid = torch.ones(3, 40, dtype=torch.bool)
    with pytest.raises(ValueError, match="can run here, got 'xformers': it takes no key mask"):
        partial_attention(*inputs(), key_valid=valid, backend="xformers")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(40, 40), (33, 7)])
def test_the_partial_of_xformers(dtype, lengths):
    q, k, v = (x.cuda() for x in inputs(dtype, 64))
    q, k, v = q[:, :, : lengths[0]], k[:, :, : lengths[1]], v[:, :, : lengths[1]]
    if xformers_ops.refuses(q, k, v, None) is not None:
        pytest.skip(xformers_ops.refuses(q, k, v, None))
    out, lse = partial_attention(q, k, v, backend="xformers")
    logits = q.double() @ k.double().mT * 64**-0.5
    low = (q @ k.mT * 64**-0.5).softmax(-1) @ v
    bound = 2 * (low.double() - exact(q, k, v)).abs().max()
    assert (out.double() - exact(q, k, v)).abs().max() <= bound
    assert lse.shape == q.shape[:3]
    low_lse = (q @ k.mT * 64**-0.5).float().logsumexp(-1).double()
    bound = 2 * (low_lse - logits.logsumexp(-1)).abs().max()
    assert (lse.double() - logits.logsumexp(-1)).abs().max() <= bound
