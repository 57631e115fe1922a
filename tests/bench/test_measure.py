import pytest

from repopt_timm.bench.measure import Spread, paired


class Clock:
    """A clock that runs as told, and a machine whose speed changes."""

    def __init__(self):
        self.now = 0.0
        self.slowness = 1.0
        self.calls = []

    def contender(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds * self.slowness

        return call

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_ratio_is_that_of_calls_in_the_same_round(clock):
    def slow_down_each_round():
        clock.slowness = 1 + len(clock.calls) // 2

    contenders = {'base': clock.contender('base', 2), 'other': clock.contender('other', 3)}
    timings = paired(contenders, 'base', rounds=5, warmup=0, prepare=slow_down_each_round, clock=clock)
    assert timings['other'].ratio == Spread(1.5, 1.5, 1.5, 1.5, 1.5)
    assert timings['other'].seconds == Spread(median=9, lower=6, upper=12, lowest=3, highest=15)


def test_the_order_rotates_and_warm_up_rounds_do_not_count(clock):
    contenders = {name: clock.contender(name, 1) for name in 'abc'}
    clock.slowness = 100

    def warm_up():
        if len(clock.calls) >= 3:
            clock.slowness = 1

    timings = paired(contenders, 'a', rounds=2, warmup=1, prepare=warm_up, clock=clock)
    assert ''.join(clock.calls) == 'abcbcacab'
    assert timings['c'].seconds.highest == 1


def test_preparing_is_not_timed(clock):
    prepare = clock.contender('prepare', 50)
    timings = paired({'a': clock.contender('a', 1)}, 'a', rounds=2, warmup=0, prepare=prepare, clock=clock)
    assert clock.calls == ['prepare', 'a'] * 2
    assert timings['a'].seconds.highest == 1


def test_a_single_value_has_no_spread():
    assert Spread.of([3.0]) == Spread(3, 3, 3, 3, 3)
