from repopt_timm.reporting import take_turns


def test_the_order_of_turns_rotates_and_warm_up_rounds_do_not_count():
    calls = []

    def turn(name):
        def measure():
            calls.append(name)
            return len(calls)

        return measure

    found = take_turns({name: turn(name) for name in 'abc'}, rounds=2, warmup=1)
    assert ''.join(calls) == 'abcbcacab'
    assert found == {'a': [6, 8], 'b': [4, 9], 'c': [5, 7]}
