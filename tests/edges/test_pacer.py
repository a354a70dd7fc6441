"""The pacer against a simulated device: it keeps the bound, uses it up, and follows a change of load."""

from __future__ import annotations

import random

import pytest

from swiftbalancer.pacer import FIRST_BYTES, LEAST_BYTES, UNBOUND, Pacer
from swiftbalancer.transport import AT_WORK, WAITING, Lately

BASE_S = 0.0035
BUSY = Lately(carried=True, held_back=True)


class Device:
    """Steps of `base_s` with noise, longer by `s_per_byte` for every byte carried; `long` of them take three times as
    long, prefills among the decodes."""

    def __init__(self, *, s_per_byte: float, noise: float, seed: int, long: float = 0.02) -> None:
        self.base_s = BASE_S
        self._long = long
        self.s_per_byte = s_per_byte
        self._noise = noise
        self._random = random.Random(seed)

    def step(self, num_bytes: int) -> float:
        time_s = self.base_s * (1 + abs(self._random.gauss(0, self._noise)))
        if self._random.random() < self._long:
            time_s *= 3
        return time_s + num_bytes * self.s_per_byte


def run(pacer: Pacer, device: Device, *, steps: int, piece: int = 1) -> tuple[float, int]:
    """Moves for `steps` steps in whole pieces; gives the added share of step time, and bytes carried."""
    carried = credit = 0
    for _ in range(steps):
        credit += min(pacer.allowance(), 1 << 30)
        now = -(-max(credit, 0) // piece) * piece  # the last piece may overdraw
        credit -= now
        carried += now
        pacer.observe(device.step(now), BUSY if now else WAITING)
        pacer.adapt()
    return carried * device.s_per_byte / (steps * BASE_S), carried


@pytest.mark.parametrize("piece", [1, 16 << 20])
@pytest.mark.parametrize(("noise", "long"), [(0.0, 0.02), (0.01, 0.02), (0.05, 0.02), (0.01, 0.2)])
@pytest.mark.parametrize("gib_per_s_lost", [5, 100, 2000])
def test_inflation_stays_in_the_bound_and_the_room_is_used(
    noise: float, long: float, gib_per_s_lost: int, piece: int
) -> None:
    device = Device(s_per_byte=1 / (gib_per_s_lost * 2**30), noise=noise, seed=1, long=long)
    pacer = Pacer(0.02)
    for _ in range(32):
        pacer.observe(device.step(0))
    run(pacer, device, steps=800, piece=piece)
    inflation, _ = run(pacer, device, steps=4000, piece=piece)
    assert inflation < 0.02 * 1.5
    assert inflation > 0.02 * 0.5


def test_a_step_that_became_longer_by_itself_is_not_blamed_on_the_transfer() -> None:
    device = Device(s_per_byte=1e-12, noise=0.01, seed=2)
    pacer = Pacer(0.02)
    for _ in range(32):
        pacer.observe(device.step(0))
    run(pacer, device, steps=500)
    before = pacer.bytes_per_step
    device.base_s *= 1.5
    run(pacer, device, steps=500)
    assert pacer.bytes_per_step > before / 4


def test_a_transfer_gets_on_however_slow_steps_become() -> None:
    device = Device(s_per_byte=1e-6, noise=0.0, seed=3)
    pacer = Pacer(0.02)
    run(pacer, device, steps=400)
    assert pacer.bytes_per_step == LEAST_BYTES
    assert sum(pacer.allowance() for _ in range(16)) == 14 * LEAST_BYTES


def test_without_usual_steps_the_resting_ones_are_the_measure() -> None:
    device = Device(s_per_byte=1 / (100 * 2**30), noise=0.0, seed=4)
    pacer = Pacer(0.02)
    run(pacer, device, steps=600)
    inflation, _ = run(pacer, device, steps=400)
    assert 0.01 < inflation < 0.03


def test_a_transfer_is_not_slowed_for_good_by_a_spell_of_long_steps() -> None:
    """Usual steps are known from the spell itself, also where a low rate lets pieces travel only now and then."""
    device = Device(s_per_byte=1 / (400 * 2**30), noise=0.02, seed=5)
    pacer = Pacer(0.02)
    for _ in range(32):
        pacer.observe(device.step(0))
    run(pacer, device, steps=500, piece=16 << 20)
    before = pacer.bytes_per_step
    device.base_s *= 1.5
    _, carried = run(pacer, device, steps=1000, piece=16 << 20)
    assert carried / 1000 > before / 2


def test_inflation_is_the_mean_over_a_transfer_not_of_its_busy_steps() -> None:
    pacer = Pacer(0.02)
    for _ in range(32):
        pacer.observe(1.0)
    for nth in range(20):
        pacer.allowance()
        pacer.observe(1.1 if nth % 5 == 0 else 1.0, WAITING if nth % 5 else BUSY)
        pacer.adapt()
    assert pacer.inflation == pytest.approx(0.02)


def test_steps_waited_are_allowed_what_they_might_have_carried() -> None:
    pacer = Pacer(0.02)
    assert [pacer.allowance(waited) // FIRST_BYTES for waited in [0] * 14 + [3, 3, 3]] == [0] + [1] * 13 + [4, 3, 3]


def test_a_bound_of_one_is_no_bound() -> None:
    pacer = Pacer(1.0)
    assert {pacer.allowance() for _ in range(20)} == {UNBOUND}


def test_a_rank_that_only_receives_keeps_its_rate() -> None:
    pacer = Pacer(0.02)
    for _ in range(32):
        pacer.observe(1.0)
    for time_s in (1.0, 1.5):
        for _ in range(200):
            pacer.allowance()
            pacer.observe(time_s, AT_WORK)
            pacer.adapt()
    assert pacer.bytes_per_step == FIRST_BYTES


def test_a_batch_that_fits_its_allowance_does_not_raise_the_rate() -> None:
    pacer = Pacer(0.02)
    for _ in range(32):
        pacer.observe(1.0)
    for _ in range(200):
        pacer.allowance()
        pacer.observe(1.0, Lately(carried=True))
        pacer.adapt()
    assert pacer.bytes_per_step == FIRST_BYTES
    for _ in range(20):
        pacer.allowance()
        pacer.observe(1.5, Lately(carried=True))
        pacer.adapt()
    assert pacer.bytes_per_step < FIRST_BYTES


def test_a_transfer_that_lengthens_few_steps_by_much_stays_in_the_bound() -> None:
    """A piece meets an all-to-all in one step of three, and nothing in the others."""
    pacer, turn, steps_s = Pacer(0.02), 0, []
    for _ in range(32):
        pacer.observe(BASE_S)
    for _ in range(4000):
        allowed = pacer.allowance()
        turn += bool(allowed)
        meets = bool(allowed) and turn % 3 == 0
        steps_s.append(BASE_S + (3 * allowed / (200 * 2**30) if meets else 0.0))
        pacer.observe(steps_s[-1], BUSY if allowed else WAITING)
        pacer.adapt()
    inflation = sum(steps_s[1000:]) / len(steps_s[1000:]) / BASE_S - 1
    assert 0.005 < inflation < 0.03
