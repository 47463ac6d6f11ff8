from overpaint_worker.speed import OVER_S, Speed


def test_speed_is_that_of_the_last_half_minute() -> None:
    now = 100.0
    speed = Speed(lambda: now)
    assert speed.per_s() is None
    speed.add(10)
    now += 5
    speed.add(10)
    assert speed.per_s() == 4.0
    now += OVER_S
    assert speed.per_s() == 10 / OVER_S
    now += 1
    assert speed.per_s() == 0.0
