from repopt_timm.bench.rows import Goal, Row, Spread, quantity, ratio_rows, ratio_table


def row(ratio, goal):
    return Row('step', 'ours', 2e-3, 's', Spread(ratio, 0.9 * ratio, 1.1 * ratio, 0, 9), 'theirs', goal)


def test_a_goal_is_for_the_ratio_or_for_the_value():
    assert row(1.25, Goal(1.25, '<= 1.25 x')).reached
    assert not row(1.26, Goal(1.25, '<= 1.25 x')).reached
    assert not row(1.0, Goal(1, '< 1 x', strict=True)).reached
    assert not row(0.8, Goal(1.1, '0.9 to 1.1', least=0.9)).reached
    assert row(5.0, Goal(1, '< 1 s', of_value=True)).reached
    assert row(5.0, None).reached is None


def test_a_table_has_values_ratios_and_whether_goals_are_reached():
    baseline = Row('step', 'theirs', 1.5, 's', Spread.of([1.0]), 'theirs')
    head, _, first, second = ratio_table([baseline, row(2.0, Goal(1.25, '<= 1.25 x'))]).splitlines()
    assert [cell.strip() for cell in head.split('|')[2:4]] == ['contender', 'measured']
    assert [cell.strip() for cell in first.split('|')[1:]] == ['step', 'theirs', '1.5 s', '', '', '', '', '']
    cells = ['', 'ours', '2 ms', '2.000 (1.800 to 2.200)', 'theirs', '<= 1.25 x', 'NO', '']
    assert [cell.strip() for cell in second.split('|')[1:]] == cells


def test_a_ratio_compares_values_of_the_same_round():
    seconds = {'base': [2, 4, 6, 8, 10], 'other': [3, 6, 9, 12, 15]}
    base, other = ratio_rows('step', 's', seconds, 'base')
    assert (base.value, other.value) == (6, 9)
    assert other.ratio == Spread(1.5, 1.5, 1.5, 1.5, 1.5)


def test_a_spread_has_quartiles_and_range():
    assert Spread.of([3, 6, 9, 12, 15]) == Spread(median=9, lower=6, upper=12, lowest=3, highest=15)
    assert Spread.of([3.0]) == Spread(3, 3, 3, 3, 3)


def test_quantities_have_fitting_units():
    assert quantity(0.0182, 's') == '18.2 ms'
    assert quantity(42e-6, 's') == '42 µs'
    assert quantity(3 * 2**30, 'B') == '3 GiB'
    assert quantity(0, 'B') == '0 B'
    assert quantity(7, 'tensors') == '7 tensors'
