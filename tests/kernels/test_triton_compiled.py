"""Every kernel and configuration compiles for compute capability 9.0 (H100) without a GPU: no register spilt,
and no more shared memory than a block can have there."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from unimoe.kernels import triton_grouped, triton_packed, triton_routing, triton_swiglu  # noqa: E402

MOST_SHARED = 227 * 1024
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INTEGERS = {"token": "i64", "left_token": "i64", "right_token": "i64", "offsets": "i64", "order": "i64"}
INTEGERS |= {"tiles": "i32", "start": "i32", "table": "i64", "codes": "u8", "x_codes": "i8", "scales": "fp16"}
INTEGERS |= dict.fromkeys(("numbers", "x_scale", "x_sum"), "fp32")
SHIPPED = [
    (tiles, torch.bfloat16 if size == 2 else torch.float32)
    for (_, size), tiles in triton_swiglu.TILES.items()
]


def compiled(
    kernel: Any, dtype: torch.dtype, options: dict, absent: tuple = ()
) -> tuple[Any, dict[str, int]]:
    """The compiled kernel and its use of registers and stack. Pointers are aligned, sizes (capital letters)
    are multiples of 16."""
    launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: value for name, value in options.items() if name not in launch}
    constants |= dict.fromkeys(absent)
    names, types = kernel.arg_names, {}
    for name in names:
        types[name] = (
            "i32" if name.isupper() or name == "rows_per_tile" else "*" + INTEGERS.get(name, NAMES[dtype])
        )
        types[name] = "constexpr" if name in constants else types[name]
    aligned = [
        i
        for i, name in enumerate(names)
        if types[name][0] == "*" or (name in ("H", "I", "K", "C", "L") and name not in constants)
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = Path(triton.knobs.cache.dir) / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    )
    fields = (
        field.split(":") for field in usage.stdout.split() if field.startswith(("REG:", "STACK:", "LOCAL:"))
    )
    return binary, {name: int(value) for name, value in fields}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("tiles, dtype", SHIPPED)
def test_the_products_fit_the_chip(tiles, dtype):
    gate_up, rows = tiles.gate_up.options(dtype) | {"ACT": "silu"}, tiles.rows.options(dtype)
    gathered, weights = (tiles.weights.options(dtype, gathers) for gathers in (True, False))
    for kernel, options, absent in (
        (triton_swiglu._gate_up_kernel, gate_up, ()),
        (triton_swiglu._gate_up_kernel, gate_up, ("h",)),
        (triton_grouped._rows_kernel, rows | {"TRANSPOSE": True}, ("token",)),
        (triton_grouped._rows_kernel, rows | {"TRANSPOSE": False}, ()),
        (triton_grouped._weights_kernel, gathered, ("left_token",)),
        (triton_grouped._weights_kernel, weights, ("left_token", "right_token")),
    ):
        binary, usage = compiled(kernel, dtype, options, absent)
        assert usage["STACK"] == usage["LOCAL"] == 0, (kernel.__name__, options, usage)
        assert binary.metadata.shared <= MOST_SHARED
        # 64 rows are what Hopper's own matrix instruction takes; loads are 16 bytes wide and do not wait
        assert ("wgmma.mma_async" in binary.asm["ptx"]) == (options["ROWS"] >= 64)
        assert "cp.async.cg.shared.global" in binary.asm["ptx"]


def test_biases_are_products_with_one_column():
    """As triton_linear.bias has them: nothing to load in wide pieces, but nothing spilt either."""
    for tiles, dtype in (SHIPPED[0], SHIPPED[-1]):
        for tile, kernel, options in (
            (tiles.rows, triton_grouped._rows_kernel, {"TRANSPOSE": True, "K": 1}),
            (tiles.weights, triton_grouped._weights_kernel, {"C": 1}),
        ):
            absent = ("token",) if "K" in options else ("left_token", "right_token")
            binary, usage = compiled(kernel, dtype, tile.options(dtype) | options, absent)
            assert usage["STACK"] == usage["LOCAL"] == 0 and binary.metadata.shared <= MOST_SHARED


@pytest.mark.parametrize("tile", triton_packed.TILES.values())
def test_products_of_packed_weights_fit_the_chip(tile):
    options = {"CHUNKS": 2, "ROWS": tile.rows, "COLUMNS": tile.columns}
    options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    for absent in ((), ("token",)):
        binary, usage = compiled(triton_packed._packed_kernel, torch.float32, options, absent)
        assert usage["STACK"] == usage["LOCAL"] == 0 and binary.metadata.shared <= MOST_SHARED
        assert ("wgmma.mma_async" in binary.asm["ptx"]) == (tile.rows >= 64)


@pytest.mark.parametrize(
    "kernel, options",
    [
        *(
            (triton_swiglu._swiglu_backward_kernel, {"ROWS": 2, "COLUMNS": 1024, "ACT": act})
            for act in ("silu", "gelu", "gelu_tanh")
        ),
        (triton_routing._combine_kernel, {"PAIRS": 8, "BLOCK": 1024}),
        (triton_routing._tile_map_kernel, {"GROUPS": 256, "BLOCK": 16}),
        (triton_routing._rank_kernel, {"BLOCK": 32, "OTHERS": 128}),
    ],
)
def test_the_others_fit_the_chip(kernel, options):
    binary, usage = compiled(kernel, torch.bfloat16, options)
    assert usage["STACK"] == usage["LOCAL"] == 0 and binary.metadata.shared <= MOST_SHARED
