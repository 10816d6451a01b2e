"""Time and memory grow with the pairs that are computed: no tensor may be as large as L x L."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit_accel
from dit_accel import presets
from dit_accel.kernels import ragged


class Watch(TorchDispatchMode):
    """The largest storage that any operation returned, in bytes, and the products' operations."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "baddbmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return out


@pytest.fixture
def one_thread():
    """Modes see one thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(length, depth, heads=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, depth, generator=generator).to(dtype) for _ in "qkv"]


@pytest.mark.parametrize("taylor", ["global", "rest"])
@pytest.mark.parametrize("rest", ["drop", "moment"])
def test_no_tensor_is_quadratic(monkeypatch, one_thread, rest, taylor):
    """4,096 tokens: L x L is 64 MiB, [N, D, D] 4 MiB; nothing is above output and workspace."""
    monkeypatch.setattr(ragged, "WORKSPACE_BYTES", 2**20)
    for module in ("block_attention", "block_summary"):
        monkeypatch.setattr(f"dit_accel.kernels.{module}.reference.WORKSPACE_BYTES", 2**20)
    q, k, v = inputs(4096, 128)
    method = presets.pisa(density=0.1, block_size=64, rest=rest, taylor=taylor)
    with Watch() as watch:
        dit_accel.attention(q, k, v, method, grid=(16, 16, 16))
    output = 4096 * 128 * 4
    assert watch.bytes <= output + 2**20
    assert watch.bytes < 4096 * 4096 * 4 / 20
    assert watch.bytes < 64 * 128 * 128 * 4


def test_the_mode_would_see_a_quadratic_tensor(one_thread):
    q, k, _ = inputs(512, 8)
    with Watch() as watch:
        torch.softmax(q @ k.mT, -1)
    assert watch.bytes == 512 * 512 * 4


def test_text_rows_are_bounded_too(monkeypatch, one_thread):
    """Text queries see every key; a row of 4,096 keys does not fit this workspace."""
    monkeypatch.setattr("dit_accel.kernels.block_attention.reference.WORKSPACE_BYTES", 2**19)
    q, k, v = inputs(4096 + 128, 32)
    with Watch() as watch:
        dit_accel.attention(
            q, k, v, presets.pisa(density=0.05), grid=(16, 16, 16), text=slice(4096, 4224)
        )
    # the output, or a head's keys, or 2**19 bytes
    assert watch.bytes <= (4096 + 128) * 32 * 4


@pytest.mark.parametrize("rest", ["drop", "taylor", "moment"])
def test_work_follows_density(one_thread, rest):
    q, k, v = inputs(4096, 32)

    def flops(density):
        with Watch() as watch:
            method = presets.pisa(density=density, rest=rest)
            _, report = dit_accel.attention(q, k, v, method, grid=(16, 16, 16), return_report=True)
        return watch.flops, report.density

    few, low = flops(0.125)
    many, high = flops(0.5)
    exact = 4 * 4096 * 4096 * 32
    assert many - few == pytest.approx(exact * (high - low), rel=1e-3)
    # beside the exact pairs: the centroids (one block in 64), twice with variances, and statistics
    assert few <= exact * (low + 0.06)


def test_kernels_know_nothing_of_the_library():
    """Arrows run one way: kernels import torch and kernels."""
    root = Path(ragged.__file__).parent
    files = list(root.rglob("*.py"))
    assert len(files) > 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                assert node.level == 0, file
            for name in names:
                if name.split(".")[0] == "dit_accel":
                    assert name.startswith("dit_accel.kernels"), f"{file} imports {name}"


def test_importing_the_library_is_light():
    code = (
        "import sys, dit_accel; "
        "print([m for m in ('diffusers', 'transformers', 'triton', 'rich', 'typer') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
