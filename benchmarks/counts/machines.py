"""The GPUs that counts are turned into times for: assumptions, all of them in this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One GPU. Rates are per SM (compute unit) and clock in lanes, a warp being 32 or 64 of them.

    Occupancy: programs beside each other on an SM, by registers, warps, programs, shared memory.
    """

    target: str
    name: str
    sms: int
    clock: float
    """Hz under load, as assumed."""
    boost: float
    """Hz at best."""
    copy_rate: float
    """Bytes/s that a copy kernel reaches, read and written; about 0.9 of the data sheet."""
    l2_bytes: int
    issue: int
    fma: int
    alu: int
    mufu: int
    warp: int
    warps: int
    """Most warps of an SM."""
    programs: int
    """Most programs of an SM."""
    registers: int
    """32-bit registers of an SM."""
    register_unit: int
    """Registers are given to a warp in multiples of this."""
    shared_bytes: int
    shared_reserved: int
    """Of each program, by the system."""

    def resident(self, registers: int, num_warps: int, shared: int) -> int:
        """Programs beside each other on one SM."""
        per_warp = -(-registers * self.warp // self.register_unit) * self.register_unit
        limits = [
            self.programs,
            self.warps // num_warps,
            # registers belong to one of four schedulers, a warp takes all of its own from one
            self.registers // 4 // max(per_warp, 1) * 4 // num_warps,
        ]
        if shared:
            limits.append(self.shared_bytes // (shared + self.shared_reserved))
        return max(min(limits), 0)


_NVIDIA = {
    "issue": 128,
    "alu": 64,
    "mufu": 16,
    "warp": 32,
    "registers": 65536,
    "register_unit": 256,
    "shared_reserved": 1024,
}
KIB, MIB = 1024, 2**20
MACHINES = {
    m.target: m
    for m in (
        Machine(
            "sm_80",
            "A100 80GB SXM",
            sms=108,
            clock=1.41e9,
            boost=1.41e9,
            copy_rate=1.75e12,
            l2_bytes=40 * MIB,
            # 64 lanes of FP32 where sm_90 has 128
            fma=64,
            warps=64,
            programs=32,
            shared_bytes=164 * KIB,
            **_NVIDIA,
        ),
        Machine(
            "sm_90",
            "H200 SXM",
            sms=132,
            clock=1.755e9,
            boost=1.98e9,
            copy_rate=4.3e12,
            l2_bytes=50 * MIB,
            fma=128,
            warps=64,
            programs=32,
            shared_bytes=228 * KIB,
            **_NVIDIA,
        ),
        Machine(
            "sm_100",
            "B200",
            sms=148,
            clock=1.755e9,
            boost=1.965e9,
            copy_rate=7.2e12,
            l2_bytes=126 * MIB,
            fma=128,
            warps=64,
            programs=32,
            shared_bytes=228 * KIB,
            **_NVIDIA,
        ),
        Machine(
            "sm_120",
            "RTX PRO 6000",
            sms=188,
            clock=2.3e9,
            boost=2.6e9,
            copy_rate=1.6e12,
            l2_bytes=128 * MIB,
            fma=128,
            warps=48,
            programs=24,
            shared_bytes=100 * KIB,
            **_NVIDIA,
        ),
        # A compute unit starts one vector instruction of 64 lanes a clock (four SIMDs of 16 lanes);
        # scalar, memory and branch instructions start beside it from other waves.
        Machine(
            "gfx942",
            "MI300X",
            sms=304,
            clock=2.1e9,
            boost=2.1e9,
            copy_rate=4.3e12,
            l2_bytes=256 * MIB,
            issue=64,
            fma=64,
            alu=64,
            mufu=16,
            warp=64,
            warps=32,
            programs=16,
            registers=4 * 512 * 64,
            register_unit=8 * 64,
            shared_bytes=64 * KIB,
            shared_reserved=0,
        ),
    )
}
# The H100 of the public timings: an H200 with less bandwidth.
H100_COPY_RATE = 3.0e12
