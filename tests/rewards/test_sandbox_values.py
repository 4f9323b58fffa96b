"""What crosses the border of the sandbox: the encoding, the comparison, the filter of calls."""

from __future__ import annotations

import ctypes
import errno
import math
import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast.rewards.sandbox import seccomp
from grpo_fast.rewards.sandbox.child import NotPlain, decode, encode
from grpo_fast.rewards.sandbox.values import Unordered, neutral, read, same

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters()),
    st.binary(),
)
KEYS = st.recursive(
    SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner), max_leaves=3
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.sets(KEYS, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=8,
)


def _spelled(value) -> str:
    """repr of a value, the items of its sets in one order."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(map(_spelled, value))}"
    if isinstance(value, dict):
        return f"dict{[(_spelled(key), _spelled(item)) for key, item in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}{[_spelled(item) for item in value]}"
    return repr(value)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_what_goes_in_comes_out(value):
    """repr tells types, NaN and -0.0 apart, which == does not."""
    assert _spelled(decode(encode(value))) == _spelled(value)
    assert same(neutral(value), neutral(value))
    assert same(read(encode(value)), neutral(value), types="json")


@settings(max_examples=100, deadline=None)
@given(VALUES, VALUES)
def test_equal_means_equal(one, other):
    """Where all types agree, `same` is Python's ==."""
    if "nan" not in repr(one) + repr(other) and same(neutral(one), neutral(other)):
        assert one == other
    if encode(one) == encode(other):
        assert same(neutral(one), neutral(other))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_data_or_refused(data):
    for reader in (read, decode):
        try:
            reader(data)
        except NotPlain:
            continue


@settings(max_examples=200, deadline=None)
@given(VALUES, st.randoms(use_true_random=False))
def test_damaged_bytes_are_data_or_refused(value, chance):
    data = bytearray(encode(value))
    for _ in range(chance.randint(1, 3)):
        data[chance.randrange(len(data))] = chance.choice(b"NTFifcsbltSZd0123456789:;-\xff")
    try:
        read(bytes(data))
    except NotPlain:
        return


class _Loud:
    """Fails the test when anything of it is called."""

    def __eq__(self, other):
        raise AssertionError("called")

    __hash__ = __lt__ = __len__ = __iter__ = __bool__ = __eq__


@pytest.mark.parametrize(
    "value",
    [
        _Loud(),
        type("Int", (int,), {"__eq__": lambda a, b: True})(1),
        type("L", (list,), {})(),
        (1).real.__class__,
        bytearray(b"x"),
        range(3),
        iter([]),
        [_Loud()],
        {1: _Loud()},
        (object(),),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_plain_data(value):
    with pytest.raises(NotPlain):
        encode(value)


def test_depth():
    value = []
    for _ in range(99):
        value = [value]
    assert decode(encode(value)) == value
    with pytest.raises(NotPlain, match="deeper than 100"):
        encode([[value]])
    with pytest.raises(NotPlain, match="deeper than 100"):
        read(b"l1:" * 5000 + b"N")


def test_counts_ask_for_no_memory():
    for data in (
        b"l999999999999:N",
        b"s99999:x",
        b"b-1:",
        b"l-5:",
        b"S1:l0:",
        b"d1:d0:N",
        b"i;",
        b"",
    ):
        with pytest.raises(NotPlain):
            decode(data)
    with pytest.raises(NotPlain):
        decode(b"NN")


def test_hostile_values_cost_no_time():
    """60,000 integers of one hash: a set of them takes minutes, and they are never in one."""
    colliding = [k * (2**61 - 1) for k in range(60_000)]
    assert len({hash(value) for value in colliding}) == 1
    data = b"S60000:" + b"".join(map(encode, colliding))
    start = time.process_time()
    value = read(data)
    shuffled = Unordered(b"S", random.sample(value.items, 60_000))
    assert same(value, shuffled) and not same(value, neutral({1, 2}))
    assert read(b"i" + b"f" * 1_000_000 + b";") > 0
    assert time.process_time() - start < 3


def test_same_by_hand():
    def equal(one, other, **options):
        return same(neutral(one), neutral(other), **options)

    assert equal(math.nan, math.nan) and equal(0.0, -0.0) and equal({0.0}, {-0.0})
    assert (
        not equal(1, True) and not equal(1, 1.0) and not equal({1}, {True}) and not equal([1], (1,))
    )
    assert (
        equal({1: [1, 2.0]}, {1: [1, 2.0]})
        and not equal({1: 2}, {1: 3})
        and not equal({1: 2}, {2: 2})
    )
    assert equal({1, 2}, {2, 1}) and not equal({1, 2}, {1, 3}) and not equal({1}, frozenset([1]))
    assert equal(1, 1.0, types="json") and equal({1: (2,)}, {1.0: [2]}, types="json")
    assert not equal(1, True, types="json") and not equal(10**400, 1.0, types="json", tolerance=0.5)
    assert equal([1.0, 1e9], [1.0 + 5e-7, 1e9 + 500], tolerance=1e-6)
    assert not equal(1.0, 1.0 + 2e-6, tolerance=1e-6) and not equal(1, 2, tolerance=0.9)
    assert not equal(math.inf, 1.0, tolerance=0.9) and not equal(1.0, math.inf, tolerance=0.9)
    assert not equal(math.inf, -math.inf, tolerance=0.9) and not equal(math.nan, 1.0, tolerance=0.9)
    # a repeated item is no set
    assert not same(read(b"S2:i1;i1;"), neutral({1})) and not same(
        read(b"S2:i1;i1;"), neutral({1, 2})
    )


def _decide(program: bytes, machine: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the filter answers to a call: the kernel's little machine in a few lines."""
    words = struct.pack("=iIQ6Q", number, machine, 0, *(arguments + (0,) * 6)[:6])
    steps = list(struct.iter_unpack("HBBI", program))
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            accumulator = struct.unpack_from("=I", words, value)[0]
        else:
            hit = accumulator == value if code == 0x15 else accumulator & value
            at += if_true if hit else if_false


ALLOW = 0x7FFF0000


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_by_simulation(machine):
    """Every number from 0 to 600, with the arguments that matter; the same for both machines."""
    program, architecture = seccomp.build(machine), seccomp._MACHINES[machine][0]
    allowed = seccomp.numbers(seccomp._ALLOWED, machine)
    checked = seccomp.numbers(seccomp._CHECKED, machine)
    refused = seccomp.numbers(seccomp._REFUSED, machine)
    assert len(program) % 8 == 0 and len(program) // 8 < 4096

    def answer(number, *arguments):
        return _decide(program, architecture, number, arguments)

    for number in range(600):
        if number in checked.values():
            continue
        expected = 0x50000 | (errno.EPERM if number in refused.values() else errno.ENOSYS)
        assert answer(number) == (ALLOW if number in allowed.values() else expected), number
    assert _decide(program, 0x40000003, 0) == 0x80000000
    assert answer(0x40000000) == 0x50000 | errno.EPERM
    thread = 0x3D0F00
    for flags, allowed_flags in (
        (thread, True),
        (0x11, False),
        (0x4111, False),
        (thread | 0x10000000, False),
    ):
        assert (answer(checked["clone"], flags) == ALLOW) == allowed_flags
    for name in ("exit", "exit_group"):
        assert [answer(checked[name], s) == ALLOW for s in (0, 1, 127, 128, 137, 2**32 - 1)] == [
            True,
            True,
            True,
            False,
            False,
            False,
        ]
    assert answer(checked["ioctl"], 0, 0x5401) == ALLOW
    assert answer(checked["ioctl"], 0, 0x5412) == 0x50000 | errno.ENOTTY
    assert answer(checked["prctl"], 15) == ALLOW and answer(checked["prctl"], 1) != ALLOW
    assert answer(checked["socketpair"], 1) == ALLOW and answer(checked["socketpair"], 2) != ALLOW


def test_numbers_of_this_machine():
    """The table against the C library: each call by its number does what its name says."""
    import os
    import platform

    if not seccomp.supported(platform.machine()):
        pytest.skip("no table for this machine")
    numbers = seccomp.numbers(seccomp._ALLOWED + "," + seccomp._CHECKED, platform.machine())
    call = ctypes.CDLL(None, use_errno=True).syscall
    assert call(numbers["getpid"]) == os.getpid() and call(numbers["getuid"]) == os.getuid()
    assert call(numbers["getppid"]) == os.getppid() and call(numbers["getsid"], 0) == os.getsid(0)
    assert call(numbers["close"], -1) == -1 and ctypes.get_errno() == errno.EBADF
    assert len(set(numbers.values())) == len(numbers)
