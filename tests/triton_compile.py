"""Compiles kernels for cards that need not be there; run as a script, in a process without the interpreter.

    python tests/triton_compile.py '[["decode", 90, "bf16", 4, 128]]'

Each case is a kernel, a compute capability, a type, query heads of a group and a head dimension. What comes
out is a JSON list with the size of each program and whether it uses matrix units.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hetis_exec.kernels import fused, paged, prompts

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BLOCK = 16

Case = tuple[str, int, str, int, int]


def compiled(kernel: Any, target: int, pointers: dict[str, str], numbers: dict[str, str],
             constants: dict[str, Any], warps: int) -> dict[str, Any]:
    """One kernel, with arguments aligned as they are in practice."""
    names: list[str] = kernel.arg_names
    signature = {name: {**pointers, **numbers}.get(name, "constexpr") for name in names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names)
               if name in pointers or name.endswith(("_token", "_group", "width"))}
    source = ASTSource(fn=kernel, signature=signature, attrs=aligned,
                       constexprs={(names.index(key),): value for key, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})
    return {"bytes": len(made.asm["cubin"]), "matrix_units": "mma" in made.asm["ptx"],
            "shared_bytes": made.metadata.shared}


def decode(target: int, kind: str, heads: int, head_dim: int, parts: bool) -> dict[str, Any]:
    """Decode attention as it is launched on a card; ``parts``: of some of the tokens."""
    launch = paged.choose_launch(heads, head_dim, TYPES[kind], divmod(target, 10))
    wide = paged.power_of_two(head_dim)
    element = ("queries", "new_keys", "new_values", "out", "key_pool", "value_pool")
    single = ("parts", "tops", "sums")
    whole_numbers = ("query_token", "query_group", "key_token", "key_group", "value_token", "value_group",
                     "layer", "groups")
    pointers = {**dict.fromkeys(element, f"*{kind}"), **dict.fromkeys(single, "*fp32"), "arena": "*i32",
                **dict.fromkeys(("spans", "positions", "pieces"), "*i64")}
    numbers = {**dict.fromkeys(whole_numbers, "i32"), "scale": "fp32"}
    return compiled(paged.decode_rows, target, pointers, numbers,
                    {"G": heads, "G_PAD": paged.padded_heads(heads, launch), "D": head_dim, "D_PAD": wide,
                     "BLOCK": BLOCK, "TILE": launch.tile, "DOT": launch.dot,
                     "STAGES": launch.stages, "PARTS": parts}, launch.warps)


def prompt(target: int, kind: str, heads: int, head_dim: int) -> dict[str, Any]:
    """Attention of prompts as it is launched on a card."""
    launch = prompts.choose_prompt_launch(heads, head_dim, TYPES[kind], divmod(target, 10))
    assert launch is not None
    element = ("queries", "new_keys", "new_values", "out", "key_pool", "value_pool")
    whole = ("query_token", "query_group", "key_token", "key_group", "value_token", "value_group", "layer",
             "groups")
    pointers = {**dict.fromkeys(element, f"*{kind}"), "arena": "*i32",
                **dict.fromkeys(("spans", "prompts", "blocks"), "*i64")}
    return compiled(prompts.prompt_rows, target, pointers, {**dict.fromkeys(whole, "i32"), "scale": "fp32"},
                    {"G": heads, "D": head_dim, "D_PAD": paged.power_of_two(head_dim), "BLOCK": BLOCK,
                     "TOKENS": launch.tokens, "TOKENS_PAD": paged.power_of_two(launch.tokens),
                     "ROWS": launch.rows, "TILE": launch.tile, "STAGES": launch.stages, "PRECISE": False},
                    launch.warps)


def join(target: int, kind: str, heads: int, head_dim: int, parts: bool) -> dict[str, Any]:
    """The second kernel of decode attention in pieces."""
    pointers = {**dict.fromkeys(("parts", "tops", "sums", "logs"), "*fp32"), "out": f"*{kind}",
                **dict.fromkeys(("spans", "runs"), "*i64")}
    if not parts:
        pointers["logs"] = f"*{kind}"
    return compiled(paged.join_pieces, target, pointers, {"groups": "i32", "log_2": "fp32"},
                    {"G": heads, "D": head_dim, "D_PAD": paged.power_of_two(head_dim), "JOINED": paged.JOINED,
                     "PARTS": parts}, 4)


def add_norm(target: int, kind: str, adds: bool, layer_norm: bool) -> dict[str, Any]:
    """Residual sum and norm."""
    pointers = dict.fromkeys(("hidden", "change", "normal", "weight", "bias"), f"*{kind}")
    return compiled(fused.add_norm_rows, target, pointers, {"epsilon": "fp32", "width": "i32"},
                    {"WIDTH_PAD": 4096, "ADDS": adds, "LAYER_NORM": layer_norm}, 8)


def turn(target: int, kind: str, head_dim: int, norms: bool) -> dict[str, Any]:
    """Norm and rotation of heads."""
    element = f"*{kind}" if norms else "*fp32"
    pointers = {"heads": f"*{kind}", "cos": "*fp32", "sin": "*fp32", "query_norm": element,
                "key_norm": element}
    half = head_dim // 2
    return compiled(fused.turn_heads, target, pointers,
                    {"epsilon": "fp32", **dict.fromkeys(("token_stride", "queries", "number"), "i32")},
                    {"HALF": half, "HALF_PAD": paged.power_of_two(half), "AT_ONCE": fused.HEADS_AT_ONCE,
                     "NORMS": norms}, 2)


def gate(target: int, kind: str) -> dict[str, Any]:
    """The gate of an MLP."""
    return compiled(fused.gate_columns, target, {"inner": f"*{kind}", "out": f"*{kind}"}, {"width": "i32"},
                    {"COLUMNS": fused.COLUMNS_AT_ONCE}, 4)


def one(kernel: str, target: int, kind: str, heads: int, head_dim: int) -> dict[str, Any]:
    """One case."""
    if kernel in ("decode", "decode_parts"):
        return decode(target, kind, heads, head_dim, kernel == "decode_parts")
    if kernel == "prompt":
        return prompt(target, kind, heads, head_dim)
    if kernel in ("join", "join_parts"):
        return join(target, kind, heads, head_dim, kernel == "join_parts")
    if kernel in ("norm", "add_layer_norm"):
        return add_norm(target, kind, kernel != "norm", kernel != "norm")
    if kernel in ("turn", "turn_norm"):
        return turn(target, kind, head_dim, kernel == "turn_norm")
    assert kernel == "gate"
    return gate(target, kind)


if __name__ == "__main__":
    print(json.dumps([one(*case) for case in json.loads(sys.argv[1])]))
