"""The emulator of a GPU computes what PTX says, and refuses what a machine leaves undefined."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from emulator import Code, Fault, Traffic, run
from emulator.arithmetic import compared, converted, decoded, encoded, field, permuted, shifted

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid {threads}
{{
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %tid.x;
	mad.wide.u32 	%rd2, %r2, 4, %rd1;
	setp.lt.s32 	%p1, %r2, %r1;
"""  # %rd2 is the address of the thread's own element, and %p1 says whether there is one


def launched(body, x, number, *, threads=32, shared_bytes=0, grid=1, seed=0, traffic=None) -> torch.Tensor:
    """What a kernel of these lines leaves in x."""
    code = Code(HEAD.format(threads=threads) + body + "\n\tret;\n}\n", shared_bytes)
    storage = x.untyped_storage()
    parameters = [x.data_ptr().to_bytes(8, "little"), number.to_bytes(4, "little")]
    memory = [(storage.data_ptr(), storage.nbytes())]
    run(code, grid, parameters, memory, np.random.default_rng(seed), traffic or Traffic())
    return x


DOUBLE = """
	@%p1 ld.global.b32 { %r3 }, [ %rd2 + 0 ];
	add.f32 	%r3, %r3, %r3;
	@%p1 st.global.b32 [ %rd2 + 0 ], { %r3 };
"""


def test_threads_read_and_write_their_own_elements() -> None:
    assert launched(DOUBLE, torch.arange(20.0), 20).tolist() == [2.0 * i for i in range(20)]
    assert launched(DOUBLE, torch.ones(5), 3).tolist() == [2, 2, 2, 1, 1]


def test_an_address_may_have_an_offset_either_way() -> None:
    body = "@%p1 ld.global.b32 { %r3 }, [ %rd2 + 4 ];\n add.s64 %rd3, %rd2, 8;\n @%p1 st.global.b32 [%rd3+-8], { %r3 };"
    assert launched(body, torch.arange(5.0), 4).tolist() == [1, 2, 3, 4, 4]


def test_an_address_behind_the_end_is_refused() -> None:
    with pytest.raises(Fault, match=r"ld\.global\.b32 .* is outside of every tensor"):
        launched(DOUBLE, torch.ones(20), 21)


def test_an_address_that_is_not_aligned_is_refused() -> None:
    with pytest.raises(Fault, match="isn't aligned to 8 bytes"):
        launched("@%p1 ld.global.v2.b32 { %r3, %r4 }, [ %rd2 + 0 ];", torch.ones(20), 10)


def test_different_values_at_one_address_are_refused() -> None:
    assert (
        launched("mov.b32 %r3, 1; \n st.global.b32 [ %rd1 + 0 ], { %r3 };", torch.zeros(1, dtype=torch.int32), 0) == 1
    )
    with pytest.raises(Fault, match="different values to one address"):
        launched("st.global.b32 [ %rd1 + 0 ], { %r2 };", torch.zeros(1, dtype=torch.int32), 0)


REVERSE = """
	shl.b32 	%r3, %r2, 2;
	mov.b32 	%r4, global_smem;
	add.s32 	%r3, %r3, %r4;
	ld.global.b32 { %r5 }, [ %rd2 + 0 ];
	st.shared.b32 [ %r3 + 0 ], %r5;
	bar.sync 	0;
	sub.s32 	%r6, 252, %r3;
	ld.shared.b32 	%r7, [%r6];
	st.global.b32 [ %rd2 + 0 ], { %r7 };
"""


def test_a_barrier_lets_warps_exchange() -> None:
    expected = list(range(63, -1, -1))
    reverse = {"threads": 64, "shared_bytes": 256}
    for seed in range(5):
        x = torch.arange(64, dtype=torch.int32)
        assert launched(REVERSE, x, 64, **reverse, seed=seed).tolist() == expected
        x = torch.arange(64, dtype=torch.int32)
        assert launched(REVERSE.replace("bar.sync 	0;", ""), x, 64, **reverse, seed=seed).tolist() != expected


def test_an_address_behind_the_shared_memory_is_refused() -> None:
    with pytest.raises(Fault, match="outside of the shared memory"):
        launched(REVERSE, torch.arange(64, dtype=torch.int32), 64, threads=64, shared_bytes=252)


@pytest.mark.parametrize(("by", "sources"), [
    ("up.b32 	%r4, %r3, 2, 0, -1", [0, 1, *range(30)]),
    ("down.b32 	%r4, %r3, 3, 31, -1", [*range(3, 32), 29, 30, 31]),
    ("bfly.b32 	%r4, %r3, 16, 31, -1", [*range(16, 32), *range(16)]),
    ("idx.b32 	%r4, %r3, 5, 31, -1", [5] * 32),
    ("up.b32 	%r4, %r3, 1, 6144, -1", [i - 1 if i % 8 else i for i in range(32)]),
])  # fmt: skip
def test_lanes_of_a_warp_exchange(by, sources) -> None:
    body = f"ld.global.b32 {{ %r3 }}, [ %rd2 + 0 ];\n shfl.sync.{by};\n st.global.b32 [ %rd2 + 0 ], {{ %r4 }};"
    assert launched(body, torch.arange(32, dtype=torch.int32), 32).tolist() == sources


MEET = """
	mov.b32 	%r3, 1;
	@%p1 bra 	$L_first;
	mov.b32 	%r3, 2;
	bra.uni 	$L_both;
$L_after:
	redux.sync.add.s32 	%r4, %r3, %r5;
	st.global.b32 [ %rd2 + 0 ], { %r4 };
	ret;
$L_first:
	mov.b32 	%r3, 3;
$L_both:
	bra.uni 	$L_after;
"""


def test_threads_that_parted_meet_again_where_they_exchange() -> None:
    assert launched(MEET, torch.zeros(32, dtype=torch.int32), 10).tolist() == [3 * 10 + 2 * 22] * 32


def test_an_exchange_that_some_do_not_come_to_is_refused() -> None:
    with pytest.raises(Fault, match="not all threads of a warp come to it"):
        launched(MEET.replace("$L_both:", "\tret;\n$L_both:"), torch.zeros(32, dtype=torch.int32), 10)


def test_warps_at_different_barriers_are_refused() -> None:
    with pytest.raises(Fault, match="different barriers"):
        launched("@%p1 bra $L;\n bar.sync 0;\n$L:\n", torch.zeros(1), 32, threads=64)


def test_atomic_additions_give_every_program_its_number() -> None:
    body = """
	mov.u32 	%r3, %ctaid.x;
	setp.eq.b32 	%p2, %r2, 0;
	mov.b32 	%r4, 1;
	@%p2 atom.global.gpu.acq_rel.add.u32 %r5, [ %rd1 + 0 ], %r4;
	mad.wide.u32 	%rd3, %r5, 4, %rd1;
	@%p2 st.global.b32 [ %rd3 + 4 ], { %r3 };
"""
    found = launched(body, torch.zeros(101, dtype=torch.int32), 0, grid=100).tolist()
    assert found[0] == 100
    assert sorted(found[1:]) == list(range(100))
    assert found[1:] != sorted(found[1:])


def test_a_warp_moves_a_sector_once_in_an_access() -> None:
    traffic = Traffic()
    launched(DOUBLE, torch.ones(64), 20, threads=64, traffic=traffic)  # 20 elements are 3 sectors
    assert (traffic.loaded, traffic.stored) == (3, 3)
    assert traffic.executed == 8 + 6, "the second warp has no elements to load and store"
    launched("ld.global.b32 { %r3 }, [ %rd1 + 0 ];", torch.ones(1), 1, threads=64, grid=3, traffic=traffic)
    assert traffic.loaded == 3 + 6, "once for each warp of each program"
    launched("@%p1 ld.global.v2.b32 { %r3, %r4 }, [ %rd1 + 8 ];", torch.ones(8), 1, traffic=traffic)
    assert traffic.loaded == 10


FLOATS = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-40, 65504.0, 3.3895e38, 1.00390625, 1.01171875, torch.inf, -torch.inf])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrow_numbers_are_rounded_to_nearest(name, dtype) -> None:
    bits = encoded(FLOATS.numpy(), name)
    assert bits.tolist() == FLOATS.to(dtype).view(torch.uint16).tolist()
    assert decoded(bits, name).tolist() == FLOATS.to(dtype).float().tolist()
    assert np.isnan(decoded(encoded(np.float32([np.nan]), name), name)).all()


def test_conversions_to_integers_keep_to_their_range() -> None:
    x = np.float32([2.5, -2.5, 1e20, -1e20, np.nan]).view(np.uint32)
    assert converted(x, "f32", "s32", "rzi").view(np.int32).tolist() == [2, -2, 2**31 - 1, -(2**31), 0]
    assert converted(x[:2], "f32", "s32", "rni").view(np.int32).tolist() == [2, -2]
    halves = np.float32([1.5, -1.5]).view(np.uint32)
    for rounding, expected in {"rmi": [1, -2], "rpi": [2, -1], "rzi": [1, -1], "rni": [2, -2]}.items():
        assert converted(halves, "f32", "f32", rounding).view(np.float32).tolist() == expected
    assert converted(np.uint32([2**32 - 1]), "s32", "s64", "s64").view(np.int64).tolist() == [-1]
    assert converted(np.uint32([2**32 - 1]), "u32", "u64", "u64").tolist() == [2**32 - 1]


@pytest.mark.parametrize(("how", "expected"), [
    ("lt", [True, False, False]), ("ne", [True, False, False]), ("neu", [True, False, True]),
    ("geu", [False, True, True]), ("nan", [False, False, True]), ("num", [True, True, False]),
])  # fmt: skip
def test_a_nan_compares_as_unordered(how, expected) -> None:
    assert compared(how, np.float32([1, 2, np.nan]), np.float32([2, 2, 2])).tolist() == expected


def test_shifts_and_fields() -> None:
    x, by = np.int32([-8, -8, 8, 1]), np.uint32([1, 40, 2, 31])
    assert shifted(x, by, left=False).tolist() == [-4, -1, 2, 0]
    assert shifted(x.view(np.uint32), by, left=True).tolist() == [2**32 - 16, 0, 32, 2**31]
    x = np.uint32([0xABCD1234])
    start, length = np.int64([[8], [16], [0]]), np.int64([[8], [16], [0]])
    assert field(x, start[0], length[0]).tolist() == [0x12]
    assert field(x.view(np.int32), start[1], length[1]).tolist() == [0xABCD - 0x10000]
    assert field(x, start[2], length[2]).tolist() == [0]


def test_bytes_are_permuted() -> None:
    low, high = np.uint32([0x03020100]), np.uint32([0x87060504])
    assert permuted(low, high, np.uint32([0x7610])).tolist() == [0x87060100]
    assert permuted(low, high, np.uint32([0xF000])).tolist() == [0xFF000000]
