"""CPU kernels given what nobody should give them: NaN in the cache, wrong dtypes, no memory, no compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keepkv_sglang.kernels import cpu_build
from keepkv_sglang.kernels.merge import cpp_impl as merge
from keepkv_sglang.kernels.merge.torch_impl import Segments
from keepkv_sglang.kernels.score import cpp_impl as score

HEADS, GROUP, DIM = 2, 3, 64


def attend(kernel, n, new=None, bad_key=None, bad_query=None, dim=DIM):
    """isnan [T, heads] of two requests of n tokens; the first has NaN in one key of kv head 0, or in one query."""
    gen = torch.Generator().manual_seed(n)
    queries = 2 * (new or 1)
    q = torch.randn(queries, HEADS * GROUP, dim, generator=gen)
    k, v = (torch.randn(2 * n, HEADS, dim, generator=gen) for _ in range(2))
    votes = torch.rand(2 * n, HEADS, generator=gen)
    if bad_key is not None:
        k[bad_key, 0, 3] = torch.nan
    if bad_query is not None:
        q[bad_query, 1] = torch.nan
    table, rows, lens = torch.arange(2 * n, dtype=torch.int32).view(2, n), torch.arange(2), torch.full((2,), n)
    out = torch.empty_like(q)
    if new is None:
        kernel.decode(q, k, v, votes, table, rows, lens, 0.1, out)
    else:
        kernel.extend(q, k, v, votes, table, rows, lens, torch.full((2,), new), 0.1, out)
    assert out.isnan().any(dim=2).equal(out.isnan().all(dim=2))
    return out.isnan().any(dim=2)


@pytest.mark.parametrize("dim", [64, 24])
@pytest.mark.parametrize(("n", "key"), [(1, 0), (7, 0), (7, 2), (16, 3), (300, 255), (300, 291), (300, 299)])
def test_a_nan_key_makes_what_sees_it_nan_and_nothing_else(kernel, n, key, dim):
    wanted = torch.zeros(2, HEADS * GROUP, dtype=torch.bool)
    wanted[0, :GROUP] = True
    assert attend(kernel, n, bad_key=key, dim=dim).equal(wanted)


@pytest.mark.parametrize("key", [0, 150, 291, 299])
def test_earlier_queries_of_an_extend_do_not_see_it(kernel, key):
    n, new = 300, 20
    wanted = torch.zeros(2 * new, HEADS * GROUP, dtype=torch.bool)
    wanted[max(0, key - (n - new)) : new, :GROUP] = True
    assert attend(kernel, n, new, bad_key=key).equal(wanted)


@pytest.mark.parametrize(("n", "new"), [(5, None), (300, None), (300, 20)])
def test_a_nan_query_gives_nan(kernel, n, new):
    wanted = torch.zeros(2 * (new or 1), HEADS * GROUP, dtype=torch.bool)
    wanted[0, 1] = True
    assert attend(kernel, n, new, bad_query=0).equal(wanted)


@pytest.mark.parametrize("lens", [[-1, 3], [2, -1], [9, 1]])
def test_lengths_that_cannot_be(kernel, lens):
    q, pool = torch.zeros(sum(lens), HEADS, DIM), torch.zeros(8, HEADS, DIM)
    table, rows = torch.zeros(2, 4, dtype=torch.int32), torch.arange(2)
    seq_lens = torch.tensor([4, 4])
    with pytest.raises(IndexError, match="outside"):
        kernel.extend(q, pool, pool, None, table, rows, seq_lens, torch.tensor(lens), 1.0, torch.empty_like(q))


def test_arguments_of_merge_are_checked():
    k = torch.randn(2, 20, DIM)
    dropped, kept, allowed = torch.arange(10).expand(2, -1), torch.arange(10, 20).expand(2, -1), torch.ones(2, 10) > 0
    merge.nearest_kept(k, dropped, kept, allowed)
    for wrong in ((dropped.int(), kept, allowed), (dropped, kept, allowed.byte()), (dropped, kept, allowed[:, :9])):
        with pytest.raises(ValueError, match="int64"):
            merge.nearest_kept(k, *wrong)
    with pytest.raises(ValueError, match="one row per head"):
        merge.nearest_kept(k[:1], dropped, kept, allowed)
    seg = Segments.from_assignment(torch.arange(20).expand(2, -1) % 5, 5)
    merge.merge_segments(k, k, torch.zeros(2, 20), torch.zeros(40), seg)
    with pytest.raises(ValueError, match="int64 indices"):
        merge.merge_segments(k, k, torch.zeros(2, 20), torch.zeros(40), replace(seg, rows=seg.rows.int()))


@pytest.mark.parametrize("fixed", [-1, 6])
def test_fit_refuses_more_fixed_slots_than_there_are(fixed):
    k, q, z = torch.randn(1, 5, DIM), torch.randn(1, 8, DIM), torch.zeros(1, 8)
    numbers = dict(steps=5, max_correction=4.0, max_log_mass=20.0, ridge=0.03, min_ridge=1e-3)
    rest = (q, torch.full((8,), 20), z, z, torch.randn(1, 8, DIM), torch.ones(8))
    merge.fit(k, k, torch.zeros(1, 5), torch.arange(5)[None], *rest, fixed=5, **numbers)
    with pytest.raises(ValueError, match="fixed"):
        merge.fit(k, k, torch.zeros(1, 5), torch.arange(5)[None], *rest, fixed=fixed, **numbers)


def test_window_sums_refuses_what_is_not_on_the_cpu():
    q, k, lv = torch.zeros(1, 4, 8), torch.zeros(6, 1, 8), torch.zeros(6, 1)
    position = torch.full((4,), 6)
    with pytest.raises(ValueError, match="on a CPU"):
        score.window_sums(q, position.to("meta"), k[:0], lv[:0], k, k, lv, torch.ones(1, 4), False)


@pytest.mark.parametrize("name", ["k", "v", "votes", "out"])
def test_attention_refuses_what_is_not_on_the_cpu(kernel, name):
    given = dict(k=torch.zeros(8, HEADS, DIM), v=torch.zeros(8, HEADS, DIM), votes=torch.zeros(8, HEADS))
    given["out"] = q = torch.zeros(1, HEADS, DIM)
    given[name] = given[name].to("meta")
    table, one = torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="meta: pass CPU tensors"):
        kernel.decode(q, given["k"], given["v"], given["votes"], table, one - 1, one, 1.0, given["out"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_a_nan_key_are_nan_for_the_queries_that_see_it(dtype):
    gen = torch.Generator().manual_seed(0)
    q, k, lv = torch.randn(2, 4, 8, generator=gen), torch.randn(40, 2, 8, generator=gen).to(dtype), torch.zeros(40, 2)
    v = k.clone()
    k[30, 0, 1] = torch.nan
    position, weights = torch.tensor([10, 29, 30, 40]), torch.ones(1, 4)
    sums = score.window_sums(q, position, k[:0], lv[:0], k, v, lv, weights, True)
    log_z, output = sums.log_z, sums.output
    assert log_z.isnan().tolist() == [[False, False, True, True], [False] * 4]
    assert output.isnan().any(2).tolist() == [[False, False, True, True], [False] * 4]
    q[1, 2, 0] = torch.nan  # a query
    sums = score.window_sums(q, position, k[:0], lv[:0], k, v, lv, weights, False)
    assert sums.log_z[1].isnan().tolist() == [False, False, True, False]


OUT_OF_MEMORY = """
import resource, torch
from keepkv_sglang.kernels.score import cpp_impl
torch.set_num_threads(2)
n, heads = 3_000_000, 2
k, lv = torch.zeros(n, heads, 8), torch.zeros(n, heads)
q, position, weights = torch.zeros(heads, 4, 8), torch.full((4,), n), torch.ones(1, 4)
cpp_impl.window_sums(q, position, k[:0], lv[:0], k[:9], k[:9], lv[:9], weights, True)  # threads and their stacks
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)  # results: 48 MB, logits of a head: 96 or more
try:
    cpp_impl.window_sums(q, position, k[:0], lv[:0], k, k, lv, weights, True)
except MemoryError as error:
    print("MemoryError", error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_scratch_memory_that_cannot_be_had_is_a_memory_error():
    """Out of an OpenMP team an exception would end the process."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("MemoryError no memory"), done.stdout + done.stderr


def test_a_machine_without_a_compiler_takes_a_library_that_is_there(monkeypatch, tmp_path):
    built = cpu_build.build("merge")
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    for bad, message in (("no-such-compiler --flag", "install g\\+\\+ or set CXX"), ("g++ '", "cannot be read")):
        monkeypatch.setenv("CXX", bad)
        with pytest.raises(RuntimeError, match=message):
            cpu_build.build("merge")
    (tmp_path / "kernels").mkdir()
    there = Path(shutil.copy(built, tmp_path / "kernels"))
    assert cpu_build.build("merge") == there


def test_cxx_may_have_arguments_and_they_make_another_library(monkeypatch, tmp_path):
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in cpu_build.FLAGS))
    (command,) = cpu_build.compiler()
    built = []
    for arguments in (["-DX"], ["-DY"]):
        monkeypatch.setenv("CXX", f"env '{command}' {arguments[0]}")
        assert cpu_build.compiler()[1:] == [command, *arguments]
        built.append(cpu_build.build("merge"))
    assert built[0] != built[1] and set((tmp_path / "kernels").iterdir()) == set(built)
