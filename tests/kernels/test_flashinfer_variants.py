"""The FlashInfer declarations, exact text, as host C++ under AddressSanitizer against float64; planted mutants caught.

What this proves is indexing, guards, mask bits and the arithmetic of one logit. Kernels, tiles and synchronisation are
FlashInfer's and run only on a GPU.
"""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from keepkv_sglang.kernels.attention import flashinfer_variants as variants

HERE = Path(__file__).parent
CXX = shutil.which("g++")
FLASHINFER = importlib.util.find_spec("flashinfer")
pytestmark = pytest.mark.skipif(not (CXX and FLASHINFER), reason="needs g++ and the flashinfer sources")
PADDING = 9  # as in flashinfer_host.cpp


def flashinfer_text(path: str) -> str:
    assert FLASHINFER is not None and FLASHINFER.origin is not None
    return (Path(FLASHINFER.origin).parent / "data" / path).read_text()


def macros(path: str, pattern: str = r"#define REGISTER_\w+\((?:.*\\\n)+.*\n") -> str:
    found = re.findall(pattern, flashinfer_text(path))
    assert found, f"FlashInfer's {path} has changed"
    return "\n".join(found)


def params_structs(template: str, args: list) -> str:
    """The structs that FlashInfer's template generates for these jit_args."""
    import jinja2
    from flashinfer.jit.attention.utils import generate_additional_params

    declared, _, _ = generate_additional_params(*args[7:11])
    text = flashinfer_text(f"csrc/{template}")
    structs = text[re.search(r"^struct ", text, re.M).start() : text.index("{{ variant_decl }}")]
    return jinja2.Template(structs).render(additional_params_decl=declared)


def source(kind: str, args: list, declaration: str) -> str:
    """The translation unit: shim, FlashInfer's own macros and structs, the declaration, the driver."""
    hopper = kind == "fa3"
    member = macros("include/flashinfer/utils.cuh", r"#define DEFINE_HAS_MEMBER(?:.*\\\n)+.*\n")
    helper = macros(f"include/flashinfer/attention/{'hopper/' if hopper else ''}variant_helper.cuh")
    # AttentionVariantBase's default mask, and what FlashInfer declares before a variant is compiled.
    base = "namespace flashinfer {\nDEFINE_HAS_MEMBER(maybe_mask_indptr)\n"
    base += "struct Base : AttentionVariantBase { REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, "
    base += "kv_head_idx, { return true; }) };\n}\n#define AttentionVariantBase Base\nusing namespace flashinfer;\n"
    types = "using DTypeQ = float; using DTypeKV = float; using DTypeO = float; using IdType = int32_t;\n"
    defines = f"#define VARIANT {args[11].replace('use_custom_mask', 'CUSTOM')}\n"
    if kind == "fa3":
        defines = "#define FA3\nstruct Extra { float* log_votes; double sm_scale; int64_t log_votes_heads; };\n"
        defines += "struct Mainloop { int32_t* kv_indices; Extra additional_params; };\n"
        structs = ""  # the mainloop's own struct is CUTLASS's; compiling with nvcc checks these names
    elif kind == "decode":
        defines += "#define PARAMS Params\n"
        structs = params_structs("batch_decode_customize_config.jinja", args)
    else:
        defines += f"#define CUSTOM {'true' if kind == 'custom' else 'false'}\n#define PREFILL\n"
        defines += (
            "#define PARAMS RaggedParams\n#define RAGGED\n" if kind == "ragged" else "#define PARAMS PagedParams\n"
        )
        structs = params_structs("batch_prefill_customize_config.jinja", args)
    driver = (HERE / "flashinfer_host.cpp").read_text()
    shim = (HERE / "flashinfer_host.h").read_text()
    return "\n".join([shim, helper, member, base, types, structs, declaration, defines, driver])


ARGS = {
    "decode": variants.decode_args(torch.bfloat16, 64),
    "causal": variants.prefill_args(torch.bfloat16, 64),
    "custom": variants.prefill_args(torch.bfloat16, 64),
    "ragged": variants.prefill_args(torch.bfloat16, 64),
    "fa3": variants.fa3_args(torch.bfloat16, 64, experimental=True),
}


def compiled(kind: str, declaration: str, folder: Path) -> Path:
    path = folder / f"{kind}.cpp"
    path.write_text(source(kind, ARGS[kind], declaration))
    # -fpermissive: the templates' `using DTypeQ = DTypeQ` inside a struct is an error for g++ otherwise.
    flags = ["-std=c++17", "-O0", "-fpermissive", "-w", "-fsanitize=address"]
    done = subprocess.run([CXX, *flags, path, "-o", path.with_suffix("")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[:3000]
    return path.with_suffix("")


@dataclass
class Case:
    """Requests with scattered pages; log_votes has a row per slot and every array is as long as the contract says."""

    kind: str
    page_size: int
    kv_heads: int
    group: int
    lens: tuple[int, ...]
    qo_lens: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        pages = [-(-n // self.page_size) for n in self.lens]
        total = sum(pages)
        self.scale = 0.125 * (1 + self.seed % 3)
        self.indices = rng.permutation(total + 3)[:total].astype(np.int32)
        self.indptr = np.cumsum([0, *pages]).astype(np.int32)
        self.last = np.array([(n - 1) % self.page_size + 1 if n else 0 for n in self.lens], np.int32)
        self.qo_indptr = np.cumsum([0, *self.qo_lens]).astype(np.int32)
        self.slots = (total + 3) * self.page_size
        self.votes = (rng.random((self.slots, self.kv_heads)) * 4 - 1).astype(np.float32)
        masked = rng.random(self.votes.shape)
        self.votes[masked < 0.05] = -1e30
        self.votes[masked < 0.02] = -np.inf
        self.votes[masked > 0.99] = -1e29
        self.mask = [rng.random((q, n)) < 0.6 for q, n in zip(self.qo_lens, self.lens, strict=True)]
        packed = [np.packbits(m.reshape(-1), bitorder="little") for m in self.mask]  # segment_packbits, per request
        self.mask_indptr = np.cumsum([0, *(len(p) for p in packed)]).astype(np.int32)
        self.packed = np.concatenate(packed) if packed else np.zeros(0, np.uint8)
        self.shape = [(q + 1, n + PADDING) for q, n in zip(self.qo_lens, self.seen(), strict=True)]
        if self.kind == "fa3":
            self.shape = [(1, k) for _, k in self.shape]
        self.heads = self.kv_heads * self.group
        self.logits = (rng.standard_normal(sum(q * k for q, k in self.shape) * self.heads) * 9).astype(np.float32)

    def seen(self) -> tuple[int, ...]:
        return self.qo_lens if self.kind == "ragged" else self.lens

    def payload(self) -> bytes:
        head = np.array([self.page_size, self.kv_heads, self.group, len(self.lens)], np.int32)
        arrays = [head, np.array([self.scale])]
        arrays += [self.indptr, self.indices, self.last, self.qo_indptr, self.votes, self.packed, self.mask_indptr]
        return b"".join(struct.pack("<Q", a.size) + a.tobytes() for a in [*arrays, self.logits])

    def wanted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float64 logits and masks in the driver's order, and which of them the kernels use."""
        logits, masks, used = [], [], []
        at = 0
        for b, (queries, keys) in enumerate(self.shape):
            size = queries * keys * self.heads
            raw = self.logits[at : at + size].astype(np.float64)
            at += size
            if self.kind == "fa3":  # head blocks outermost
                raw = raw.reshape(self.kv_heads, keys, self.group).transpose(1, 0, 2).reshape(1, keys, self.heads)
            out = raw.reshape(queries, keys, self.heads) * self.scale
            length = self.seen()[b]
            if self.kind != "ragged":
                kv = np.arange(length)
                pages = self.indices[self.indptr[b] + kv // self.page_size]
                votes = self.votes[pages * self.page_size + kv % self.page_size].astype(np.float64)
                votes[votes <= -1e29] = -np.inf
                out[:, :length] += votes.repeat(self.group, axis=1)
            visible = np.zeros((queries, keys, 1), bool)
            visible[:, :] = True
            if self.kind == "custom":
                visible[:] = False
                visible[: self.qo_lens[b], :length, 0] = self.mask[b]
            inside = np.broadcast_to((np.arange(keys) < length)[None, :, None], out.shape)
            if self.kind == "fa3":
                out, inside = (x.reshape(keys, self.kv_heads, self.group).transpose(1, 0, 2) for x in (out, inside))
            logits.append(out.reshape(-1))
            masks.append(np.broadcast_to(visible, (queries, keys, self.heads)).reshape(-1))
            used.append(inside.reshape(-1))
        return np.concatenate(logits), np.concatenate(masks), np.concatenate(used)


def cases(kind: str) -> list[Case]:
    lens, qo = (70, 0, 1, 33), (1, 1, 1, 1)
    if kind in ("causal", "custom", "ragged"):
        qo = (5, 0, 1, 12)
    shapes = [(1, 3, 3), (1, 1, 4), (4, 2, 1)] if kind != "fa3" else [(1, 3, 3), (1, 1, 4)]
    return [Case(kind, *shape, lens, qo, seed) for seed, shape in enumerate(shapes)]


def disagreement(program: Path, case: Case) -> str:
    """What is wrong with the program's answer, in words; "" when nothing is."""
    done = subprocess.run([program], input=case.payload(), capture_output=True, timeout=60)
    if done.returncode:
        report = done.stderr.decode(errors="replace")
        return f"exit {done.returncode}: " + ("AddressSanitizer" if "AddressSanitizer" in report else report[:500])
    got = np.frombuffer(done.stdout, np.float32).reshape(-1, 3).astype(np.float64)
    logits, masks, used = case.wanted()
    assert len(got) == len(logits)
    problems = []
    for name, mine, scale in (("transformed logit", got[:, 0], 1.0), ("in base 2", got[:, 1], math.log2(math.e))):
        wanted = logits[used] * scale
        finite = np.isfinite(wanted)
        if not np.array_equal(mine[used][~finite], wanted[~finite]):
            problems.append(f"{name}: a masked entry has weight")
        # float32: one product, one sum, one product on values up to 50; a wrong vote or scale is off by 1e-2.
        if not np.allclose(mine[used][finite], wanted[finite], rtol=1e-6, atol=1e-5):
            problems.append(f"{name}: wrong")
    if not np.array_equal(got[:, 2] != 0, masks):
        problems.append("mask: wrong bit")
    return "; ".join(problems)


@pytest.mark.parametrize("kind", ARGS)
def test_the_declarations_are_equation_6(kind, tmp_path):
    program = compiled(kind, ARGS[kind][12], tmp_path)
    counted = {"transforms": 0, "masks": 0}
    for case in cases(kind):
        assert disagreement(program, case) == ""
        _, masks, used = case.wanted()
        counted["transforms"] += int(used.sum())
        counted["masks"] += len(masks) if kind == "custom" else 0
    assert counted["transforms"] > (100 if kind == "ragged" else 1000)
    assert counted["masks"] > 1000 or kind != "custom"
    print(kind, counted)


VOTE = "x = vote > -1.0e+29f ? x + vote : -math::inf;"
MUTANTS = {
    "page_index": (
        "custom",
        "params.paged_kv.indptr[batch_idx] + page)",
        "params.paged_kv.indptr[batch_idx] + kv_idx)",
    ),
    "no_entry": ("decode", "uint32_t(params.paged_kv.page_size) + entry", "uint32_t(params.paged_kv.page_size)"),
    "first_request": ("decode", "params.paged_kv.indptr[batch_idx]", "params.paged_kv.indptr[0]"),
    "no_guard": ("decode", "if (kv_idx < kv_len) {", "if (true) {"),
    "query_head": ("custom", "num_heads + kv_head_idx", "num_heads + qo_head_idx"),
    "head_stride": ("decode", "* params.paged_kv.num_heads", "* 1"),
    "no_scale": ("decode", "logits * sm_scale;", "logits;"),
    "no_log2e": ("decode", "sm_scale_log2 = math::log2e;", "sm_scale_log2 = 1.f;"),
    "scaled_twice": ("custom", "sm_scale_log2 = math::log2e;", "sm_scale_log2 = math::log2e * sm_scale;"),
    "subtracted": ("decode", "x + vote :", "x - vote :"),
    "masked_is_finite": ("custom", VOTE, "x = x + vote;"),
    "mask_bit": ("custom", "(offset & 7)", "((offset + 1) & 7)"),
    "mask_row": ("custom", "uint64_t(qo_idx) * kv_len", "uint64_t(qo_idx) * qo_len"),
    "mask_request": ("custom", "+ params.maybe_mask_indptr[batch_idx]", ""),
    "mask_guard": ("custom", "qo_idx >= qo_len || kv_idx >= kv_len", "qo_idx >= qo_len"),
    "fa3_request": ("fa3", "params.kv_indices + kv_indptr", "params.kv_indices"),
    "fa3_guard": ("fa3", "if (int(kv_idx) < kv_len) {", "if (true) {"),
    "fa3_head": ("fa3", "log_votes + kv_head_idx", "log_votes"),
    "fa3_no_log2e": ("fa3", "sm_scale_log2 = math::log2e;", "sm_scale_log2 = 1.f;"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mutant_is_caught(name, tmp_path):
    kind, right, wrong = MUTANTS[name]
    declaration = ARGS[kind][12]
    assert right in declaration, "the mutant no longer applies: plant it anew"
    program = compiled(kind, declaration.replace(right, wrong), tmp_path)
    assert any(disagreement(program, case) for case in cases(kind))
